"""What makes a released version a model of MLflow's: what it takes and gives, needs and runs.

The folder that MLflow loads holds the version's files as they are; beside them go `MLmodel`, the
requirements, an example, and a copy of `app.ml` under a name of its own. Many programs have a
package `app`, and one program may load versions that were made with different code.
"""

import hashlib
import io
import re
import tempfile
import warnings
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from PIL import Image

CORE = Path(__file__).resolve().parents[2] / "app" / "ml"
# Those of app.ml; MLflow adds itself, and with it pandas.
REQUIREMENTS = [
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pillow",
    "pillow-heif",
    "filelock",
    "onnxruntime",
]
CONFIG = {"runtime": "auto", "device": "cpu", "num_threads": None}
PROVIDERS = ["CPUExecutionProvider"]
COLUMN, TOP_K = "image", 3  # as in app.ml.pyfunc, which imports PyTorch


def write_package(folder: Path, record: dict[str, Any], run_id: str) -> None:
    """Write to an empty folder what goes beside the files of a version.

    record: its JSON, which becomes the model's config.
    """
    from mlflow import pyfunc
    from mlflow.models import Model

    model = Model(artifact_path="model", run_id=run_id)
    onnx = f"food_model_v{record['version']}.onnx"
    if onnx in record["sha256"]:  # mlflow.onnx.load_model gives the bare network
        model.add_flavor("onnx", data=onnx, providers=PROVIDERS)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice of MLflow's on its type hints
        code = write_code(Path(scratch))
        pyfunc.save_model(
            folder,
            mlflow_model=model,
            loader_module=f"{code.name}.pyfunc",
            code_paths=[str(code)],
            model_config={"record": record, **CONFIG},
            pip_requirements=requirements(),
            signature=_signature(),
            input_example=(_example(), {"top_k": TOP_K}),
        )


def warm_up() -> None:
    """Write a package for nothing: the first one in a process takes seconds.

    MLflow looks through all installed packages for it. While training runs nobody waits for that.
    """
    with tempfile.TemporaryDirectory() as scratch:
        write_package(Path(scratch, "model"), {"version": 0, "sha256": {}}, run_id="")


def write_code(folder: Path) -> Path:
    """Copy `app.ml` to a package named after what is in it; return the package's folder."""
    files = sorted(CORE.glob("*.py"))
    texts = {file.name: file.read_text(encoding="utf-8") for file in files}
    digest = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()
    package = folder / f"nutrilearn_{digest[:12]}"
    package.mkdir()
    for name, text in texts.items():
        renamed = re.sub(r"\bapp\.ml\b", package.name, text)
        (package / name).write_text(renamed, encoding="utf-8")
    return package


def requirements() -> list[str]:
    """Pin the packages that answering needs; without a local part (+cpu), which no index has."""
    return [f"{name}=={installed(name).partition('+')[0]}" for name in REQUIREMENTS]


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types.schema import (
        Array,
        ColSpec,
        DataType,
        Object,
        ParamSchema,
        ParamSpec,
        Property,
        Schema,
        TensorSpec,
    )

    text, number = DataType.string, DataType.double
    one = Object([Property("class_name", text), Property("confidence", number)])
    answer: list[ColSpec | TensorSpec] = [
        ColSpec(text, "class_name", required=False),
        ColSpec(number, "confidence", required=False),
        ColSpec(text, "verdict", required=False),
        ColSpec(Array(one), "top_predictions"),
        ColSpec(text, "error", required=False),
    ]
    return ModelSignature(
        # Binary: over HTTP this is base64, so that nobody there can name files of the server.
        inputs=Schema([ColSpec(DataType.binary, COLUMN)]),
        outputs=Schema(answer),
        params=ParamSchema([ParamSpec("top_k", DataType.integer, TOP_K)]),
    )


def _example() -> Any:
    import pandas as pd

    picture = io.BytesIO()
    Image.new("RGB", (64, 64), (196, 128, 64)).save(picture, "PNG")
    return pd.DataFrame({COLUMN: [picture.getvalue()]})
