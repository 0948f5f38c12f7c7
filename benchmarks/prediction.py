"""How fast is one answer, against plain PyTorch and plain onnxruntime?

    python benchmarks/prediction.py --model_dir ml-models
    python benchmarks/prediction.py --model_dir ml-models --photos FOLDER

The network alone (decoding excluded) and the whole way from a 12-megapixel JPEG, whose plain side
decodes it at full size. Both sides use all cores, or one where it is said. With the class folders
of FOLDER, how often each form of the model is right about their photos.
"""

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import alternating
import numpy as np
import torch
from PIL import Image, ImageOps

from app.ml.activation import MapMaker
from app.ml.artifacts import ModelRecord, file_name, onnx_name, read_record, read_state
from app.ml.machine import num_cores
from app.ml.model import build_model
from app.ml.predictor import (
    FORM_SUFFIXES,
    Runtime,
    forms_of,
    import_onnxruntime,
    load_model_for_inference,
)
from app.ml.preprocessing import IMAGE_EXTENSIONS, EvalTransform, normalize

BATCH = 32
REST = 0.1  # plain onnxruntime's threads go on for 40 ms after an answer, on the other side's core


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--photos", type=Path, help="class folders, named as the model's classes")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    record = read_record(options.model_dir)
    print(alternating.machine())
    alternating.report_header(f"{record.model_name}, calls/s", "plain", "ours")
    networks(options, record)
    whole_way(options, record)
    with_activation(options, record)
    sizes(options.model_dir, record)
    if options.photos:
        accuracy(options.model_dir, options.photos, record)


def timed(
    name: str,
    plain: Callable[[], Any],
    ours: Callable[[], Any],
    options: Any,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Print how many calls a second each side makes, in turn."""

    def repeated(work: Callable[[], Any]) -> Callable[[], int]:
        def run() -> int:
            for _ in range(options.repeats):
                work()
            return int(options.repeats)

        return run

    result = alternating.compare(
        repeated(plain), repeated(ours), options.rounds, clock=clock, rest=REST
    )
    alternating.report(name, "calls/s", result)


def networks(options: argparse.Namespace, record: ModelRecord) -> None:
    """One image through the network alone; plain onnxruntime has the same number of threads."""
    crop = record.preprocessing.crop
    pixels = torch.randint(0, 256, (1, 3, crop, crop), dtype=torch.uint8)
    ready = normalize(pixels, record.preprocessing)
    eager = eager_network(options.model_dir, record)
    ours = load_model_for_inference(options.model_dir)

    def plain_eager() -> None:
        with torch.inference_mode():
            eager(ready)

    timed(
        f"{ours.runtime}, against eager PyTorch", plain_eager, lambda: ours.network(ready), options
    )
    onnxruntime, file = import_onnxruntime(), options.model_dir / onnx_name(record.version)
    for threads in sorted({1, num_cores()}):
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(
            file.read_bytes(), settings, providers=["CPUExecutionProvider"]
        )
        for form in forms_of(record)[1:]:
            model = load_model_for_inference(options.model_dir, runtime=form, num_threads=threads)
            sides = (
                lambda session=session: session.run(None, {"images": ready.numpy()}),
                lambda model=model: model.network(ready),
            )
            timed(f"{form}, {threads} threads, against onnxruntime", *sides, options)
            if threads == 1:
                timed(f"{form}, of processor time", *sides, options, clock=time.thread_time)


def eager_network(model_dir: Path, record: ModelRecord) -> torch.nn.Module:
    network = build_model(record.model_name, len(record.classes)).eval()
    network.load_state_dict(read_state(model_dir, record))
    return network


def whole_way(options: argparse.Namespace, record: ModelRecord) -> None:
    """From the bytes of a photo to the answer."""
    jpeg, transform = photo(4032, 3024), EvalTransform(record.preprocessing)
    eager = eager_network(options.model_dir, record)
    ours = load_model_for_inference(options.model_dir)

    def plain_photo() -> None:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(jpeg))).convert("RGB")
        with torch.inference_mode():
            eager(normalize(transform(image).unsqueeze(0), record.preprocessing)).softmax(1)

    timed(
        "12-megapixel JPEG to answer, against eager",
        plain_photo,
        lambda: ours.predict(jpeg),
        options,
    )


def with_activation(options: argparse.Namespace, record: ModelRecord) -> None:
    """An answer, against the answer and where the network looked (?explain=true)."""
    model = load_model_for_inference(options.model_dir)
    map_maker = MapMaker(options.model_dir, record)
    crop = record.preprocessing.crop
    pixels = torch.randint(0, 256, (3, crop, crop), dtype=torch.uint8)

    def answer() -> str:
        return model.predict_batch(pixels.unsqueeze(0), 1)[0].top[0].class_name

    timed(
        f"{model.runtime} with a map, against without",
        answer,
        lambda: map_maker(pixels, answer()),
        options,
    )


def sizes(model_dir: Path, record: ModelRecord) -> None:
    """Print the size of each form's file, and its share of the ONNX file's."""
    files = {f: model_dir / file_name(record.version, FORM_SUFFIXES[f]) for f in forms_of(record)}
    plain = (model_dir / onnx_name(record.version)).stat().st_size
    for form, file in files.items():
        size = file.stat().st_size
        print(f"{form:<6} {size / 1e6:6.2f} MB  {size / plain:4.0%}")


def accuracy(model_dir: Path, photos: Path, record: ModelRecord) -> None:
    """Print how often the forms for CPUs are right, and how often each agrees with the first."""
    files = [
        (file, index)
        for name, index in record.class_to_idx.items()
        for file in sorted((photos / name).iterdir())
        if file.suffix.lower() in IMAGE_EXTENSIONS
    ]
    labels = np.array([index for _, index in files])
    models = {
        form: load_model_for_inference(model_dir, runtime=form) for form in forms_of(record)[1:]
    }
    first = next(iter(models))
    answers: dict[Runtime, list[int]] = {form: [] for form in models}
    for start in range(0, len(files), BATCH):
        images = [models[first].preprocess(file) for file, _ in files[start : start + BATCH]]
        for form, model in models.items():
            answers[form] += model.logits(torch.stack(images)).argmax(dim=1).tolist()
    for form, found in answers.items():
        hits, same = np.array(found) == labels, np.array(found) == np.array(answers[first])
        print(f"{form:<6} top-1 {hits.mean():.3f} of {len(labels)}, as {first} {same.mean():.1%}")


if __name__ == "__main__":
    main()
