"""The INT8 form: what is in integers, what stays in float, and what making it may cost."""

import logging
import platform
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tests.support import standin
from torch import Tensor, nn

from app.ml.model import backbone, build_model, split_model
from app.ml.predictor import OnnxNetwork, has_vnni, open_session, run_session
from app.ml.preprocessing import PreprocessConfig, normalize
from training.compute import quantization
from training.compute.quantization import CalibrationBatches, quantize
from training.compute.tracing import trace
from training.release.export import onnx_bytes


def network(model_name: str) -> tuple[bytes, PreprocessConfig]:
    torch.manual_seed(0)
    model = build_model(model_name, 5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # so that no layer's output fades away
            nn.init.uniform_(module.weight, 0.8, 1.6)
    config = PreprocessConfig(**backbone(model_name).preprocessing)
    return onnx_bytes(model.eval(), model_name, config.crop), config


def photos(number: int, config: PreprocessConfig) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    coarse = torch.rand(number, 3, 6, 6, generator=generator)
    pixels = nn.functional.interpolate(coarse, config.crop, mode="bicubic").clamp(0, 1)
    return (255 * pixels).to(torch.uint8)


def pixels(number: int, config: PreprocessConfig) -> Tensor:
    return normalize(photos(number, config), config)


@pytest.fixture(scope="module")
def small() -> tuple[bytes, bytes, PreprocessConfig]:
    with standin.registered():
        plain, config = network(standin.NAME)
    return plain, quantize(plain, pixels(20, config)), config


def relative_error(plain: bytes, quantized: bytes, config: PreprocessConfig) -> float:
    """Of the features, on photos that were not calibrated with."""
    images = pixels(8, config)
    wanted, found = (OnnxNetwork(data, 1)(images)[1] for data in (plain, quantized))
    return float((found - wanted).norm() / wanted.norm())


def test_it_answers_nearly_as_the_plain_network(
    small: tuple[bytes, bytes, PreprocessConfig],
) -> None:
    assert 0 < relative_error(*small) < 0.05


def test_convolutions_are_in_integers_and_the_stem_and_the_head_in_float(
    small: tuple[bytes, bytes, PreprocessConfig],
) -> None:
    graph = onnx.load_from_string(small[1]).graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    stem, *convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert kinds[stem.input[1]] == onnx.TensorProto.FLOAT and stem.input[0] == "images"
    assert len(convolutions) == len(standin.WIDTHS) - 1
    for node in convolutions:
        assert made_by[node.input[0]] == made_by[node.input[1]] == "DequantizeLinear"
    weights = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert {len(onnx.numpy_helper.to_array(tensor)) for tensor in weights} == set(
        standin.WIDTHS[1:]
    )
    scales = [t for t in graph.initializer if t.name.endswith("weight_scale")]
    assert [list(t.dims) for t in scales] == [[w] for w in standin.WIDTHS[1:]], "per channel"
    assert len([node for node in graph.node if node.op_type == "Relu"]) == 1, "of the stem"
    (head,) = (node for node in graph.node if node.op_type == "Gemm")
    assert kinds[head.input[1]] == onnx.TensorProto.FLOAT
    assert [output.name for output in graph.output] == ["logits", "pooled"]
    (pool,) = (node for node in graph.node if node.op_type == "GlobalAveragePool")
    assert {made_by[name] for name in ("logits", "pooled")}.isdisjoint({"DequantizeLinear"})
    assert made_by[pool.input[0]] == "DequantizeLinear"


def test_what_a_head_is_trained_on_stays_in_float_if_the_pool_is_frozen(
    small: tuple[bytes, bytes, PreprocessConfig],
) -> None:
    config = small[2]
    with standin.registered():
        layers = split_model(build_model(standin.NAME, 3), standin.NAME, len(standin.WIDTHS))[0]
    pooled = nn.Sequential(layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    data = quantize(trace(pooled, config.crop, "features"), pixels(4, config))
    graph = onnx.load_from_string(data).graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    assert "DequantizeLinear" in made_by.values() and made_by["features"] == "Flatten"


@pytest.mark.parametrize("model_name", ["mobilenet_v2", "efficientnet_lite0", "efficientnet_b0"])
def test_layers_written_for_any_size_compute_what_they_do_on_pictures_32_pixels_smaller(
    model_name: str,
) -> None:
    """As training pictures grow by that much; timm's paddings are constants of the file."""
    torch.manual_seed(0)
    layers = split_model(build_model(model_name, 3).eval(), model_name, 4)[0]
    session = open_session(trace(layers, 128, "features", any_size=True), 1)
    for side in (128, 96, 64):
        images = torch.rand(2, 3, side, side)
        with torch.no_grad():
            expected = layers(images)
        (found,) = run_session(session, images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_is_in_memory_at_once_is_bounded_and_every_image_is_seen_once() -> None:
    config = PreprocessConfig(36, 32, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    images = pixels(7, config)
    batches = CalibrationBatches(images)
    seen = []
    while batch := batches.get_next():
        assert batch.keys() == {"images"} and len(batch["images"]) <= quantization.CALIBRATION_BATCH
        seen.append(batch["images"])
    np.testing.assert_array_equal(np.concatenate(seen), images.numpy())


def test_nothing_is_left_behind_when_memory_runs_out(
    small: tuple[bytes, bytes, PreprocessConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: CalibrationBatches) -> None:
        assert list(tmp_path.iterdir())
        raise MemoryError

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(CalibrationBatches, "get_next", fail)
    with pytest.raises(MemoryError):
        quantize(small[0], pixels(2, small[2]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["avx512_vnni", "avx_vnni"])
def test_a_cpu_whose_sums_would_overflow_computes_otherwise_and_answers_the_same(
    name: str, small: tuple[bytes, bytes, PreprocessConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, answers, may_overflow = pixels(8, small[2]), [], not has_vnni()
    for features in ({name: True}, {}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        network = OnnxNetwork(small[1], 1)
        options = network.session.get_session_options()
        setting = options.get_session_config_entry("session.x64quantprecision")
        assert setting == ("0" if features else "1")
        answers.append(network(images)[0])
    if platform.machine() in ("x86_64", "AMD64") and may_overflow:
        pytest.skip("this CPU would overflow in the first case")
    torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_real_backbone_takes_a_third_of_the_bytes() -> None:
    plain, config = network("mobilenet_v2")
    quantized = quantize(plain, pixels(6, config))
    assert len(quantized) < 0.35 * len(plain)
    assert 0 < relative_error(plain, quantized, config) < 0.2
    graph = onnx.load_from_string(quantized).graph
    clips = [node for node in graph.node if node.op_type == "Clip"]
    assert len(clips) == 2, "of the stem; the others are part of the ranges"


def test_the_quantizer_keeps_its_remarks_on_tensors_to_itself(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of a transformer it has hundreds, of which nobody can use one."""
    caplog.set_level(logging.INFO)
    plain, config = network("timm/test_vit")
    assert quantize(plain, pixels(2, config))
    assert not caplog.messages
    logging.info("shown again")
    assert caplog.messages == ["shown again"]
