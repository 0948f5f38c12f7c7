"""The programs that docs/exports.md shows are run on an exported model, in Python and Chromium."""

import functools
import http.server
import importlib.util
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.support import standin
from tests.support.released import release_forms
from tests.support.web_page import CHROMIUM, install_onnxruntime_web
from tests.training.commands.test_export import run_export

import train_model
from app.ml.predictor import FoodPredictor, load_model_for_inference
from training.config import REPOSITORY

CLOSE = 0.03  # of a probability: each program scales the photo with its own library


def programs(language: str) -> list[str]:
    """The page's blocks in a language, about version 1."""
    text = (REPOSITORY / "docs" / "exports.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
    return [block.replace("_v3.", "_v1.") for block in blocks]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an app would hold: the exported files, and a photo to ask about."""
    models = tmp_path_factory.mktemp("ml-models")
    with standin.registered():
        release_forms(models, ["apple_pie", "crème_brûlée", "samosa"])
        arguments = ["--output_dir", str(models), "--export", "v1", "--format", "onnx"]
        assert train_model.main(arguments) == 0
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((240, 160), Image.Resampling.BICUBIC)
    photo.save(models / "exports" / "v1-onnx" / "lunch.jpg", quality=95)
    return models


def predictor(folder: Path, runtime: Any) -> FoodPredictor:
    with standin.registered():
        return load_model_for_inference(folder, runtime=runtime)


def test_the_python_lines_answer_as_the_version_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder / "exports" / "v1-onnx")
    exec(programs("python")[0], {})
    label, confidence, verdict = capsys.readouterr().out.split()
    expected = predictor(folder, "onnx").predict("lunch.jpg")
    assert (label, verdict) == (expected.top[0].class_name, expected.verdict)
    assert float(confidence) == pytest.approx(expected.top[0].probability, abs=CLOSE)


@pytest.fixture(scope="module")
def site(folder: Path) -> Iterator[str]:
    """A server of the files, with the package of npm beside them and a page that runs the lines."""
    files = folder / "exports" / "v1-onnx"
    install_onnxruntime_web(files)
    (program,) = programs("js")
    page = f"<meta charset=utf-8><script type=module>{program}\nwindow.answer = answer;</script>"
    (files / "index.html").write_text(page, encoding="utf-8")
    handler = functools.partial(QuietHandler, directory=str(files))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()
    shutil.rmtree(files / "node_modules")  # 140 MB


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line for each."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")
def test_the_browser_lines_answer_as_the_version_does(folder: Path, site: str) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page()
        page.goto(site)
        page.wait_for_function("!!window.answer", timeout=60_000)
        given = page.evaluate("async () => answer(await (await fetch('lunch.jpg')).blob())")
        browser.close()
    expected = predictor(folder, "int8").predict(folder / "exports" / "v1-onnx" / "lunch.jpg")
    assert (given["label"], given["verdict"]) == (expected.top[0].class_name, expected.verdict)
    confidence = max(given["probabilities"])
    assert confidence == pytest.approx(expected.top[0].probability, abs=CLOSE)


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("litert_torch"), reason="needs pip install litert-torch"
)
def test_the_litert_lines_answer_as_the_version_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_export(tmp_path, "litert", "timm/test_convnext")
    model = load_model_for_inference(tmp_path)
    pixels = model.preprocess(Image.linear_gradient("L").convert("RGB"))
    monkeypatch.chdir(tmp_path / "exports" / "v1-litert")
    given = {"np": np, "labels": model.classes, "square": pixels.permute(1, 2, 0).numpy()}
    exec(programs("python")[1], given)
    label, _ = capsys.readouterr().out.split()
    assert label == model.predict_batch(pixels[None])[0].top[0].class_name
