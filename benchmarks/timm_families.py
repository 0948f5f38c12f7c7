"""How are timm's networks cut, do all forms of one answer alike, and how fast does it train?

    python benchmarks/timm_families.py            a network of each family, and MobileNetV2
    python benchmarks/timm_families.py --names timm/convnext_atto.d2_in1k --freeze_layers 8

A row for each network, in Markdown, with random weights, on drawn plates: its layers; what is
frozen; whether that runs as inference; how far the logits are from the whole network's, as a share
of the largest, of the frozen and the trained part (batch-norm folded, fp32) and of the ONNX file;
images/s of training epochs, end to end.
"""

import statistics
import tempfile
import time
from pathlib import Path

import alternating
import torch
from torch import Tensor, nn
from training_speed import OurLoop, shorten

import train_model
from app.ml.model import (
    ServedNetwork,
    backbone,
    build_model,
    head_linear,
    inference_copy,
    split_model,
)
from app.ml.predictor import OnnxNetwork
from training.config import TrainingConfig
from training.release.export import onnx_bytes
from training.sample.generate import draw_sample

CPU = torch.device("cpu")
NAMES = (
    "mobilenet_v2",  # to compare with
    "timm/resnet18.a1_in1k",
    "timm/efficientnet_b0.ra_in1k",
    "timm/mobilenetv3_large_100.ra_in1k",
    "timm/convnext_tiny.in12k_ft_in1k",
    "timm/regnety_004.tv2_in1k",
    "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "timm/swin_tiny_patch4_window7_224.ms_in1k",
)


def lived_in(model_name: str) -> nn.Module:
    """Build the network so that each layer does something and no batch-norm is the identity."""
    torch.manual_seed(0)
    model = build_model(model_name, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.uniform_(0.5, 1.5)
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None:
                norm.running_var.uniform_(0.5, 1.5)
        head_linear(model, model_name).weight.normal_(std=0.1)
    return model.eval()


def parity(config: TrainingConfig) -> tuple[int, bool, float, float]:
    """Return the layers, whether the frozen ones run as inference, and the two differences."""
    name, preprocessing = config.model_name, config.preprocessing
    model = lived_in(name)
    images = torch.randn(4, 3, preprocessing.crop, preprocessing.crop)
    with torch.no_grad():
        expected = model(images)

        def difference(logits: Tensor) -> float:
            return float((logits - expected).abs().max() / expected.abs().max())

        frozen, trained = split_model(model, name, int(config.freeze_layers))
        runner = inference_copy(frozen, CPU, torch.float32, preprocessing.crop)
        split = difference(trained.eval()(runner(images)))
        served = ServedNetwork(model, name).eval()
        assert difference(served(images)[0]) < 1e-5
        onnx = OnnxNetwork(onnx_bytes(model, name, preprocessing.crop), None)
        onnx_difference = difference(onnx(images)[0])
    num_layers = len(backbone(name).layers(model))
    return num_layers, any(True for _ in frozen.parameters()), split, onnx_difference


def images_per_second(config: TrainingConfig, images: int, rounds: int) -> float:
    """Return the median rate of training epochs, after one to warm up."""
    data = shorten(train_model.load_data(config), images)
    rates = []
    with tempfile.TemporaryDirectory() as folder:
        loop = OurLoop(config, data, Path(folder))
        for _ in range(rounds + 1):
            began = time.perf_counter()
            rates.append(loop.epoch() / (time.perf_counter() - began))
    return statistics.median(rates[1:])


def main() -> None:
    parser = alternating.make_parser(__doc__, rounds=3)
    parser.add_argument("--names", nargs="+", default=NAMES, help="(one of each family)")
    parser.add_argument("--freeze_layers", type=int, default=10, help="(10, or all there are)")
    parser.add_argument("--images", type=int, default=96, help="in an epoch (96)")
    options = parser.parse_args()
    print(alternating.machine())
    print("| network | layers | frozen | as inference | split | ONNX | images/s |")
    print("|---|---|---|---|---|---|---|")
    for name in options.names:
        row = backbone(name)
        freeze = min(options.freeze_layers, len(row.layers(row.build(10))))
        config = TrainingConfig(
            model_name=name,
            weights="none",
            freeze_layers=freeze,
            data_dir=draw_sample(alternating.REPOSITORY / "data" / "sample"),
        )
        num_layers, as_inference, split, onnx = parity(config)
        rate = images_per_second(config, options.images, options.rounds)
        print(
            f"| {name} | {num_layers} | {freeze} | {'yes' if as_inference else 'no'} | "
            f"{split:.0e} | {onnx:.0e} | {rate:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
