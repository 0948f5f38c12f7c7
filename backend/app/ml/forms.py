"""The forms in which a model is released, named after the runtime that computes them."""

from typing import Literal

Runtime = Literal["torch", "onnx", "int8"]
FORM_SUFFIXES: dict[Runtime, str] = {"torch": ".pth", "onnx": ".onnx", "int8": ".int8.onnx"}
