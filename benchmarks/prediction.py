"""How fast is one answer, against plain PyTorch and plain onnxruntime?

    python benchmarks/prediction.py --model_dir ml-models

The network alone (decoding excluded) and the whole way from a 12-megapixel JPEG, whose plain side
decodes it at full size. All sides use all cores.
"""

import argparse
import io
from pathlib import Path

import alternating
import numpy as np
import torch
from PIL import Image, ImageOps

from app.ml.artifacts import onnx_name, read_record, read_state
from app.ml.model import build_model
from app.ml.predictor import import_onnxruntime, load_model_for_inference
from app.ml.preprocessing import EvalTransform, normalize


def photo(width: int, height: int) -> bytes:
    """A JPEG with as much detail as a camera's: smooth shapes and some grain."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (height // 64, width // 64, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = random.normal(0, 6, (height, width, 1))
    pixels = (np.asarray(image) + grain).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    record = read_record(options.model_dir)
    predictor = load_model_for_inference(options.model_dir)
    eager = build_model(record.model_name, len(record.classes)).eval()
    eager.load_state_dict(read_state(options.model_dir, record))
    session = import_onnxruntime().InferenceSession(
        (options.model_dir / onnx_name(record.version)).read_bytes(),
        providers=["CPUExecutionProvider"],
    )
    transform = EvalTransform(record.preprocessing)
    print(alternating.machine())
    pixels = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    ready = normalize(pixels, record.preprocessing)
    jpeg = photo(4032, 3024)

    def repeated(work: object) -> object:
        def run() -> int:
            for _ in range(options.repeats):
                work()
            return options.repeats

        return run

    def eager_network() -> None:
        with torch.inference_mode():
            eager(ready)

    def plain_onnx() -> None:
        session.run(None, {"images": ready.numpy()})

    def ours_network() -> None:
        predictor.network(ready)

    def plain_photo() -> None:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(jpeg))).convert("RGB")
        with torch.inference_mode():
            eager(normalize(transform(image).unsqueeze(0), record.preprocessing)).softmax(1)

    def ours_photo() -> None:
        predictor.predict(jpeg)

    print(f"{record.model_name + ', calls/s':<44} {'plain':>9} {'ours':>9}")
    for name, plain, ours in (
        ("network, against eager PyTorch", eager_network, ours_network),
        ("network, against plain onnxruntime", plain_onnx, ours_network),
        ("12-megapixel JPEG to answer, against eager", plain_photo, ours_photo),
    ):
        result = alternating.compare(repeated(plain), repeated(ours), options.rounds)
        alternating.report(name, "calls/s", result)


if __name__ == "__main__":
    main()
