"""--export: what the files answer and say of themselves, and when none is written."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from tests.support import standin
from tests.support.pictures import resized_by_pillow
from tests.support.released import release_forms, release_model

import train_model
from app.ml.forms import Runtime
from app.ml.predictor import FoodPredictor, OnnxNetwork, load_model_for_inference
from app.ml.preprocessing import normalize
from training.commands.export import EXPORTS
from training.data.manifest import write_manifest
from training.data.splits import load_food_data
from training.release import standalone_formats
from training.release.hub import LOADING

CLASSES = ["apple_pie", "crème_brûlée", "samosa"]


def arguments(model_dir: Path, format: str) -> list[str]:
    return ["--output_dir", str(model_dir), "--export", "v1", "--format", format]


def export(model_dir: Path, format: str) -> Path:
    assert train_model.main(arguments(model_dir, format)) == 0
    return model_dir / EXPORTS / f"v1-{format}"


def photo(size: tuple[int, int] = (60, 40)) -> Image.Image:
    noise = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def probabilities_of(predictor: FoodPredictor, image: Image.Image) -> np.ndarray:
    top = dict(predictor.predict(image, len(CLASSES)).top)
    return np.array([top[name] for name in predictor.classes])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version of the stand-in in all its forms, and its export for ONNX."""
    folder = tmp_path_factory.mktemp("ml-models")
    with standin.registered():
        release_forms(folder, CLASSES)
        export(folder, "onnx")
    return folder


@pytest.mark.parametrize(("runtime", "suffix"), [("onnx", ".onnx"), ("int8", ".int8.onnx")])
def test_pixels_get_the_answer_of_the_same_form(
    runtime: Runtime, suffix: str, model_dir: Path
) -> None:
    file = model_dir / EXPORTS / "v1-onnx" / f"food_model_v1{suffix}"
    with standin.registered():
        predictor = load_model_for_inference(model_dir, runtime=runtime)
    session = OnnxNetwork(file.read_bytes(), 1).session
    pixels = predictor.preprocess(photo())
    image = pixels.permute(1, 2, 0).numpy()[None].repeat(3, axis=0)  # any number at once
    probabilities, similarity = session.run(["probabilities", "similarity"], {"image": image})
    assert probabilities == pytest.approx(
        np.tile(probabilities_of(predictor, photo()), (3, 1)), abs=1e-5
    )
    _, pooled = predictor.network(normalize(pixels[None], predictor.record.preprocessing))
    cosine = torch.nn.functional.cosine_similarity(pooled, predictor.centroids).max()
    assert similarity == pytest.approx([float(cosine)] * 3, abs=1e-5)

    facts = json.loads(file.with_name(f"{file.name}.json").read_text(encoding="utf-8"))
    assert facts["labels"] == CLASSES and (facts["resize"], facts["crop"]) == (36, 32)
    decision = predictor.decision
    assert (facts["confident_at"], facts["food_at"]) == (decision.confident_at, decision.food_at)
    inside = {p.key: p.value for p in onnx.load(file).metadata_props}
    assert json.loads(inside["labels"]) == CLASSES
    assert float(inside["temperature"]) == decision.temperature


def test_a_file_that_answers_otherwise_is_refused_and_the_earlier_export_stays(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = sorted((model_dir / EXPORTS).rglob("*"))
    monkeypatch.setattr(
        standalone_formats, "onnx_runner", lambda data: lambda images: _shifted(data, images)
    )
    with standin.registered():
        assert train_model.main(arguments(model_dir, "onnx")) == 1
    assert "food_model_v1.onnx does not answer as version 1 does" in caplog.text
    assert sorted((model_dir / EXPORTS).rglob("*")) == files


def _shifted(data: bytes, images: torch.Tensor) -> standalone_formats.Answers:
    pixels = images.roll(1, dims=3)  # the colors in another order
    given = OnnxNetwork(data, 1).session.run(None, {"image": pixels.numpy()})
    return standalone_formats.Answers(*map(torch.from_numpy, given))


# The hub --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_name",
    ["timm/test_convnext", pytest.param("efficientnet_lite0", marks=pytest.mark.slow)],
)
def test_timm_loads_its_networks_from_the_hub_folder(model_name: str, tmp_path: Path) -> None:
    """As from the hub, which is the same folder at another place."""
    import timm

    release_model(tmp_path, CLASSES, model_name, metrics={"test_top1": 0.5})
    folder = export(tmp_path, "hub")
    code = LOADING["timm"].replace("hf-hub:YOU/NAME", f"local-dir:{folder}")
    loaded: dict[str, object] = {"timm": timm}
    exec(code, loaded)
    check_loaded(loaded, load_model_for_inference(tmp_path, runtime="torch"))
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "timm" and card.data.pipeline_tag == "image-classification"
    assert card.data.eval_results[0].metric_value == 0.5


@pytest.mark.slow
def test_torchvision_loads_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release_model(tmp_path, CLASSES, "mobilenet_v2")
    folder = export(tmp_path, "hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda _: str(folder))
    loaded: dict[str, object] = {}
    exec(LOADING["torchvision"], loaded)
    check_loaded(loaded, load_model_for_inference(tmp_path, runtime="torch"))
    assert LOADING["torchvision"] in (folder / "README.md").read_text(encoding="utf-8")


def check_loaded(loaded: dict[str, object], predictor: FoodPredictor) -> None:
    """What was loaded prepares and answers a photo as the version does, by the same labels.

    Both prepare it with Pillow here; the version's own resizing differs by rounding.
    """
    model, transform = loaded["model"], loaded["transform"]
    images = transform(photo((700, 500)))[None]  # type: ignore[operator]
    expected = resized_by_pillow(photo((700, 500)), predictor.record.preprocessing)[None]
    assert torch.allclose(images, normalize(expected, predictor.record.preprocessing), atol=1e-6)
    with torch.no_grad():
        logits = model(images)  # type: ignore[operator]
    assert torch.allclose(logits, predictor.logits(expected), atol=1e-4)
    assert list(loaded["labels"]) == CLASSES  # type: ignore[call-overload]


# What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["--export", "v1"], ["--format", "onnx"], ["--export", "v1", "--format", "gguf"]]
)
def test_version_and_format_go_together(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_model.main(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert "onnx" in line and "coreml" in line


@pytest.mark.parametrize(
    ("format", "module", "package"),
    [("litert", "litert_torch", "litert-torch"), ("coreml", "coremltools", "coremltools")],
)
def test_a_package_that_is_not_there_is_named(
    format: str,
    module: str,
    package: str,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with standin.registered():
        assert train_model.main(arguments(model_dir, format)) == 1
    assert f"pip install {package}" in caplog.text
    assert [path.name for path in (model_dir / EXPORTS).iterdir()] == ["v1-onnx"]


def test_a_converter_that_fails_is_told_in_one_line(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise NotImplementedError("no such operator\n" + "in the whole program " * 100)

    monkeypatch.setattr(standalone_formats, "standalone_onnx", fail)
    with standin.registered():
        assert train_model.main(arguments(model_dir, "onnx")) == 1
    line = caplog.messages[-1]
    assert line.startswith("v1 cannot be written for onnx: no such operator") and len(line) < 300
    assert "\n" not in line


def test_a_version_without_the_form_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with standin.registered():
        release_model(tmp_path, CLASSES, standin.NAME)
        assert train_model.main(arguments(tmp_path, "onnx")) == 1
    assert "has no onnx form" in caplog.text and not list((tmp_path / EXPORTS).iterdir())


# Converters that are installed by hand --------------------------------------------------------


def run_export(folder: Path, format: str, model_name: str, photos: Path | None = None) -> str:
    """Export in a process of its own: the converters bring warnings and loggers along.

    photos: class folders that the version was trained on, if they are still there.
    """
    release_model(folder, CLASSES, model_name, run="run")
    if photos:
        (folder / "run").mkdir()
        data = load_food_data(photos, seed=1)
        write_manifest(folder / "run", data)
    command = [sys.executable, train_model.__file__, *arguments(folder, format)]
    command += ["--checkpoint_dir", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("litert_torch"), reason="needs pip install litert-torch"
)
def test_litert_answers_as_the_version_does(tmp_path: Path, photos: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    said = run_export(tmp_path, "litert", "mobilenet_v2", photos)
    assert "food_model_v1.tflite, " in said and "food_model_v1.fp16.tflite, " in said
    assert re.search(r"int8\.tflite(, .* MB)?: .* plain network on 6 validation", said)
    predictor = load_model_for_inference(tmp_path, runtime="torch")
    image = predictor.preprocess(photo()).permute(1, 2, 0).numpy()[None]
    expected = probabilities_of(predictor, photo())
    for suffix, allowed in ((".tflite", 1e-4), (".fp16.tflite", 0.02)):
        file = tmp_path / EXPORTS / "v1-litert" / f"food_model_v1{suffix}"
        given = Interpreter(str(file)).get_signature_runner()(image=image)
        assert given["probabilities"][0] == pytest.approx(expected, abs=allowed)
        assert json.loads(file.with_name(f"{file.name}.json").read_text())["labels"] == CLASSES


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("coremltools"), reason="needs pip install coremltools"
)
@pytest.mark.parametrize("model_name", ["mobilenet_v2", "timm/test_resnet"])
def test_core_ml_holds_the_weights_and_the_labels(model_name: str, tmp_path: Path) -> None:
    said = re.search(r"(\d+) of (\d+) constants", run_export(tmp_path, "coreml", model_name))
    assert said and int(said[1]) >= 0.9 * int(said[2]) > 20
    file = tmp_path / EXPORTS / "v1-coreml" / "food_model_v1.mlpackage"
    code = """if True:
        import coremltools, json, sys
        model = coremltools.models.MLModel(sys.argv[1], skip_model_load=True)
        image = model.get_spec().description.input[0].type.imageType
        print(json.dumps([model.user_defined_metadata["labels"], image.width]))
    """
    shown = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    ).stdout
    labels, width = json.loads(shown.splitlines()[-1])
    assert json.loads(labels) == CLASSES
    assert width == load_model_for_inference(tmp_path).record.preprocessing.crop
