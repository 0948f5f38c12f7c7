"""How fast are augmented training images made, on one core, against torchvision's PIL pipeline?

    python benchmarks/input_pipeline.py                        on drawn plates
    python benchmarks/input_pipeline.py --data_dir FOLDER

Both sides open a picture, crop, flip, jitter its color and normalize it. Ours reads the cached
copies that the first epoch leaves behind; how fast they are made is printed too.
"""

import tempfile
import time
from pathlib import Path

import alternating
import torch
from PIL import Image
from training_speed import augmentation, config_from, make_parser

import train_model
from training.compute.devices import reuse_freed_memory
from training.data.augmentation import color_jitter
from training.data.cache import ImageCache
from training.data.loader import SampleKey, TrainImages, collate

BATCH_SIZE = 32


def main() -> None:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--images", type=int, default=256, help="in a round (256)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(alternating.machine())
    with tempfile.TemporaryDirectory() as folder:
        config = config_from(options, Path(folder))
        paths = train_model.load_data(config).train.paths[: options.images]
        preprocessing, crop = config.preprocessing, config.sizes["train_crop"]
        cache = ImageCache(Path(folder))
        images = TrainImages(paths, cache, config)
        transform = augmentation(preprocessing, crop)

        def plain() -> int:
            alternating.usual_memory()
            for start in range(0, len(paths), BATCH_SIZE):
                part = paths[start : start + BATCH_SIZE]
                torch.stack([transform(Image.open(path).convert("RGB")) for path in part])
            return len(paths)

        def ours() -> int:
            reuse_freed_memory()
            for start in range(0, len(paths), BATCH_SIZE):
                numbers = range(start, min(start + BATCH_SIZE, len(paths)))
                samples = [images[SampleKey(i, 0, i)] for i in numbers]
                batch = collate(samples, crop)
                assert batch.color is not None
                color_jitter(batch.images, batch.color, preprocessing)
            return len(paths)

        began = time.perf_counter()
        ours()
        print(f"filling the cache: {len(paths) / (time.perf_counter() - began):.1f} images/s")
        alternating.report_header("augmented images/s on one core", "plain", "ours")
        result = alternating.compare(plain, ours, options.rounds)
        alternating.report("from the cache", "images/s", result)


if __name__ == "__main__":
    main()
