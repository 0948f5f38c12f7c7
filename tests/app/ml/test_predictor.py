"""Loading a released model, and its answers."""

import dataclasses
import io
import math
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.support import standin
from tests.support.released import RECORD, release_forms, release_model
from torch import Tensor

from app.ml import predictor as predicting
from app.ml.artifacts import DamagedArtifactError, Decision, NoModelError, read_record, read_state
from app.ml.model import build_model
from app.ml.predictor import (
    FoodPredictor,
    OnnxNetwork,
    Runtime,
    TorchNetwork,
    fastest,
    forms_of,
    load_model_for_inference,
    predict_image,
    run_session,
    seconds_per_image,
)
from app.ml.preprocessing import ImageError, normalize


def answering(
    logits: Tensor, decision: Decision | None = None, pooled: Tensor | None = None
) -> FoodPredictor:
    """A predictor whose network answers this, whatever it is shown: (N, C) and (N, 2)."""
    seen = torch.ones(len(logits), 2) if pooled is None else pooled
    record = dataclasses.replace(
        RECORD,
        class_to_idx={f"class_{i}": i for i in range(logits.shape[1])},
        decision=decision or RECORD.decision,
    )
    network: Any = lambda images: (logits[: len(images)], seen[: len(images)])  # noqa: E731
    return FoodPredictor(record, network, centroids=torch.eye(2))


@pytest.mark.parametrize("words", ["Failed to allocate memory", "bad allocation", "std::bad_alloc"])
def test_onnxruntime_is_short_of_memory_in_pythons_own_words(words: str) -> None:
    class Session:
        def get_inputs(self) -> list[Any]:
            return [SimpleNamespace(name="images")]

        def run(self, *_: object) -> list[Any]:
            raise Exception(f"[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : {words}")

    with pytest.raises(MemoryError, match=words):
        run_session(Session(), torch.zeros(1, 3, 4, 4))
    words = "Invalid input"
    with pytest.raises(Exception, match=words) as raised:
        run_session(Session(), torch.zeros(1, 3, 4, 4))
    assert raised.type is Exception


def photo(seed: int = 0, size: int = 260) -> Image.Image:
    array = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(array)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)
DECISIONS = st.builds(
    Decision,
    temperature=st.floats(0.05, 20),
    confident_at=st.floats(0, 1),
    food_at=st.floats(-1, 1),
)


@st.composite
def some_logits(draw: st.DrawFn) -> Tensor:
    shape = (draw(st.integers(1, 8)), draw(st.integers(1, 120)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0, 1e4]))
    return torch.randn(shape, generator=generator) * scale


@settings(max_examples=200, deadline=None)
@given(logits=some_logits(), decision=DECISIONS, data=st.data())
def test_property_7_top_k_are_k_falling_probabilities(
    logits: Tensor, decision: Decision, data: st.DataObject
) -> None:
    num_classes = logits.shape[1]
    k = data.draw(st.integers(1, num_classes))
    predictions = answering(logits, decision).predict_batch(IMAGES, k)
    assert len(predictions) == len(logits)
    for row, prediction in zip(logits, predictions, strict=True):
        names, probabilities = zip(*prediction.top, strict=True)
        assert len(names) == len(set(names)) == k
        assert all(0 <= p <= 1 and math.isfinite(p) for p in probabilities)
        assert list(probabilities) == sorted(probabilities, reverse=True)
        assert sum(probabilities) <= 1 + 1e-5
        if k == num_classes:
            assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        expected = (row / decision.temperature).softmax(0)
        for name, probability in prediction.top:
            assert expected[int(name.removeprefix("class_"))].item() == pytest.approx(
                probability, abs=1e-6
            )
        assert row[int(names[0].removeprefix("class_"))] == row.max()


@settings(max_examples=150, deadline=None)
@given(logits=some_logits(), decision=DECISIONS)
def test_the_verdict_follows_similarity_and_confidence(logits: Tensor, decision: Decision) -> None:
    pooled = torch.randn(len(logits), 2, generator=torch.Generator().manual_seed(0))
    predictions = answering(logits, decision, pooled).predict_batch(IMAGES, 1)
    for seen, prediction in zip(pooled, predictions, strict=True):
        if (seen / seen.norm()).max().item() < decision.food_at:  # the centroids are the axes
            expected = "not_food"
        elif prediction.top[0].probability >= decision.confident_at:
            expected = "confident"
        else:
            expected = "unsure"
        assert prediction.verdict == expected


@pytest.mark.parametrize("k", [0, -1, 4])
def test_a_top_k_that_cannot_be_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k must be 1 to 3, not {k}"):
        answering(torch.zeros(8, 3)).predict_batch(IMAGES, k)


# A real model ---------------------------------------------------------------------------------


def test_a_loaded_model_gives_the_logits_of_the_network_that_was_saved(model_dir: Path) -> None:
    predictor = load_model_for_inference(model_dir)
    record = read_record(model_dir)
    model = build_model(record.model_name, 3)
    model.load_state_dict(read_state(model_dir, record))
    images = torch.stack([predictor.preprocess(photo(seed)) for seed in range(2)])
    with torch.no_grad():
        expected = model.eval()(normalize(images, record.preprocessing))
    torch.testing.assert_close(predictor.logits(images), expected, atol=1e-4, rtol=1e-3)
    assert predictor.classes == ["apple_pie", "samosa", "jalebi"]


def test_path_bytes_and_image_get_one_answer(model_dir: Path, tmp_path: Path) -> None:
    predictor = load_model_for_inference(str(model_dir))
    (tmp_path / "photo.png").write_bytes(png(photo()))
    expected = predict_image(predictor, photo())
    assert len(expected) == 3
    for source in (tmp_path / "photo.png", str(tmp_path / "photo.png"), png(photo())):
        assert predict_image(predictor, source) == expected
    assert predict_image(predictor, photo(), top_k=1) == expected[:1]
    assert predictor.predict(photo()).top == expected


def test_a_batch_is_answered_as_its_images_alone(model_dir: Path) -> None:
    predictor = load_model_for_inference(model_dir)
    images = torch.stack([predictor.preprocess(photo(seed)) for seed in range(3)])
    for alone, together in zip(images, predictor.predict_batch(images), strict=True):
        (single,) = predictor.predict_batch(alone.unsqueeze(0))
        assert [name for name, _ in single.top] == [name for name, _ in together.top]
        assert single.top[0].probability == pytest.approx(together.top[0].probability, abs=1e-4)


def test_no_gradients_are_kept_in_any_thread(model_dir: Path) -> None:
    """Grad mode is per thread, so that a switch at start would reach one of them only."""
    predictor, answers = load_model_for_inference(model_dir), list[Tensor]()
    image = predictor.preprocess(photo()).unsqueeze(0)
    threads = [
        threading.Thread(target=lambda: answers.append(predictor.logits(image))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 3 and torch.is_grad_enabled()
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert all(answer.is_inference() and not answer.requires_grad for answer in answers)


def test_what_is_no_picture_is_an_image_error(model_dir: Path) -> None:
    with pytest.raises(ImageError):
        predict_image(load_model_for_inference(model_dir), b"text")


def test_any_version_can_be_asked_for(tmp_path: Path) -> None:
    release_model(tmp_path, ["a", "b"], seed=1)
    release_model(tmp_path, ["c", "d", "e"], seed=2)
    assert load_model_for_inference(tmp_path).classes == ["c", "d", "e"]
    old = load_model_for_inference(tmp_path, version=1, device="cpu")
    assert old.classes == ["a", "b"] and old.record.version == 1
    with pytest.raises(NoModelError, match=r"no version 3 .*\[1, 2\]"):
        load_model_for_inference(tmp_path, version=3)


def test_weights_of_another_width_do_not_fit(model_dir: Path, tmp_path: Path) -> None:
    """A consistent set of JSON files beside a head that has one class fewer."""
    folder = shutil.copytree(model_dir, tmp_path / "ml-models")
    record = read_record(folder)
    wider = dataclasses.replace(record, class_to_idx={**record.class_to_idx, "dosa": 3})
    for name in ("food_model_v1.json", "model_config.json"):
        (folder / name).write_text(wider.to_json(), encoding="utf-8")
    for version in (None, 1):
        with pytest.raises(DamagedArtifactError):
            load_model_for_inference(folder, version)
    with pytest.raises(DamagedArtifactError, match="mobilenet_v2 with 4 classes"):
        load_model_for_inference(folder, 1)


def test_the_onnx_form_is_read_with_its_checksum(tmp_path: Path) -> None:
    from tests.app.ml.test_artifacts import save

    save(tmp_path)
    (tmp_path / "food_model_v1.onnx").write_bytes(b"something else")
    with pytest.raises(DamagedArtifactError, match=r"food_model_v1.onnx is damaged"):
        load_model_for_inference(tmp_path)
    with pytest.raises(DamagedArtifactError, match=r"do not fit a mobilenet_v2"):
        load_model_for_inference(tmp_path, runtime="torch")


# The forms of a model --------------------------------------------------------------------------


@pytest.fixture
def forms_dir(tmp_path: Path) -> Path:
    standin.register()
    release_forms(tmp_path / "models", ["a", "b", "c"])
    return tmp_path / "models"


def test_each_form_answers_with_what_is_its_own(forms_dir: Path) -> None:
    models = {r: load_model_for_inference(forms_dir, runtime=r) for r in get_args(Runtime)}
    pixels = models["torch"].preprocess(photo()).unsqueeze(0)
    logits = {runtime: model.logits(pixels) for runtime, model in models.items()}
    torch.testing.assert_close(logits["onnx"], logits["torch"], atol=1e-4, rtol=1e-4)
    assert (logits["int8"] - logits["torch"]).abs().max() > 0.1
    record = read_record(forms_dir)
    assert models["torch"].decision == models["onnx"].decision == record.decision
    own = models["int8"]
    assert own.decision == record.forms["int8"].decision != record.decision
    assert torch.equal(models["onnx"].centroids, models["torch"].centroids)
    assert not torch.equal(own.centroids, models["torch"].centroids)
    (answer,) = own.predict_batch(pixels)
    expected = (logits["int8"][0] / own.decision.temperature).softmax(0).max()
    assert answer.top[0].probability == pytest.approx(expected.item(), abs=1e-6)
    assert answer.verdict == "confident"  # from 0.1; of the plain network none is, up to 1.1
    assert models["onnx"].predict_batch(pixels)[0].verdict == "unsure"
    assert {runtime: model.runtime for runtime, model in models.items()} == {r: r for r in models}


def test_a_form_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    standin.register()
    release_forms(tmp_path, ["a", "b"], with_int8=False)
    wanted = r"^version 1 in .* has no int8 form; it has: torch, onnx$"
    with pytest.raises(NoModelError, match=wanted):
        load_model_for_inference(tmp_path, runtime="int8")
    assert load_model_for_inference(tmp_path).runtime == "onnx"


def test_without_other_forms_pytorch_answers(model_dir: Path) -> None:
    assert load_model_for_inference(model_dir).runtime == "torch"
    assert forms_of(read_record(model_dir)) == ["torch"]


def test_threads_that_wait_leave_their_cores_to_others(forms_dir: Path) -> None:
    """They spin between the layers of an answer, not for 40 ms after it, as they would."""
    model = load_model_for_inference(forms_dir, runtime="onnx")
    options = model.network.session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


@pytest.mark.parametrize("name", ["food_model_v1.int8.onnx", "food_model_v1.int8.centroids.pth"])
@pytest.mark.parametrize("runtime", ["auto", "int8"])
def test_the_files_of_the_int8_form_are_read_with_their_checksums(
    name: str, runtime: Any, forms_dir: Path
) -> None:
    data = bytearray((forms_dir / name).read_bytes())
    data[len(data) // 2] ^= 1
    (forms_dir / name).write_bytes(data)
    with pytest.raises(DamagedArtifactError, match=f"{name} is damaged"):
        load_model_for_inference(forms_dir, runtime=runtime)
    assert load_model_for_inference(forms_dir, runtime="onnx").runtime == "onnx"


@pytest.mark.parametrize(
    ("plain", "other", "chosen"),
    [(10.0, 5.0, "int8"), (10.0, 20.0, "onnx"), (10.0, 9.5, "onnx"), (10.0, 10.5, "onnx")],
)
def test_the_fastest_form_on_this_machine_answers(
    plain: float, other: float, chosen: str, forms_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small difference may be chance: answers should not change from start to start."""
    monkeypatch.setattr(predicting, "seconds_per_image", lambda _: {"onnx": plain, "int8": other})
    assert load_model_for_inference(forms_dir).runtime == chosen


def test_what_is_timed_is_one_image_through_each_network() -> None:
    shapes = []

    def network(seconds: float) -> Any:
        def answer(images: Tensor) -> tuple[Tensor, Tensor]:
            shapes.append(tuple(images.shape))
            time.sleep(seconds)
            return torch.zeros(1, 3), torch.zeros(1, 2)

        return answer

    slow, quick = (
        FoodPredictor(RECORD, network(seconds), torch.eye(2), runtime)
        for seconds, runtime in ((0.02, "onnx"), (0.002, "int8"))
    )
    began = time.perf_counter()
    seconds = seconds_per_image([slow, quick])
    assert time.perf_counter() - began < 5
    assert set(shapes) == {(1, 3, 224, 224)}
    assert seconds["int8"] < seconds["onnx"] and seconds["onnx"] >= 0.02
    assert fastest([slow, quick]) is quick
    assert fastest([quick]) is quick


def test_forms_are_computed_on_as_many_threads_as_asked_for(forms_dir: Path) -> None:
    for runtime in ("onnx", "int8"):
        network = load_model_for_inference(forms_dir, num_threads=1, runtime=runtime).network
        assert isinstance(network, OnnxNetwork)
        assert network.session.get_session_options().intra_op_num_threads == 1


def test_the_network_given_is_not_changed() -> None:
    model = build_model("mobilenet_v2", 3).train()
    before = list(model.state_dict())
    TorchNetwork(model, "mobilenet_v2", torch.device("cpu"))(torch.rand(1, 3, 64, 64))
    assert list(model.state_dict()) == before and model.training
    assert all(p.requires_grad for p in model.parameters())
