"""How fast are augmented training images made, on one core, against torchvision's PIL pipeline?

    python benchmarks/input_pipeline.py                        on drawn plates
    python benchmarks/input_pipeline.py --data_dir FOLDER

Both sides open a picture, crop, flip, jitter its colour and standardize it. Ours reads the cached
copies that the first epoch leaves behind; the time to make them is printed too.
"""

import argparse
import tempfile
import time
from pathlib import Path

import alternating
import torch
from PIL import Image
from torchvision import transforms

import train_model
from app.ml.model import backbone
from app.ml.preprocessing import PreprocessConfig
from training.compute.devices import reuse_freed_memory
from training.config import TrainingConfig
from training.data.augmentation import color_jitter
from training.data.cache import ImageCache
from training.data.loader import Key, TrainImages, collate

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(alternating.machine())
    settings = {"data_dir": options.data_dir} if options.data_dir else {"sample": True}
    paths = train_model.load_data(TrainingConfig(**settings)).train.paths[: options.images]
    recipe = PreprocessConfig(**backbone("mobilenet_v2").preprocessing)
    plain_transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(recipe.crop),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.2, 0.2, 0.2, 0.05),
            transforms.ToTensor(),
            transforms.Normalize(recipe.mean, recipe.std),
        ]
    )

    def plain() -> int:
        alternating.usual_memory()
        for start in range(0, len(paths), BATCH):
            part = paths[start : start + BATCH]
            torch.stack([plain_transform(Image.open(path).convert("RGB")) for path in part])
        return len(paths)

    with tempfile.TemporaryDirectory() as folder:
        images = TrainImages(
            tuple(paths),
            ImageCache(Path(folder)),
            seed=0,
            crop=recipe.crop,
            smallest_crop=0.08,
        )

        def ours() -> int:
            reuse_freed_memory()
            for start in range(0, len(paths), BATCH):
                keys = [Key(i, 0, i) for i in range(start, min(start + BATCH, len(paths)))]
                batch = collate([images[key] for key in keys], recipe.crop)
                assert batch.color is not None
                color_jitter(batch.images, batch.color, recipe)
            return len(paths)

        began = time.perf_counter()
        ours()
        print(f"filling the cache: {len(paths) / (time.perf_counter() - began):.1f} images/s")
        print(f"{'augmented images/s on one core':<44} {'plain':>9} {'ours':>9}")
        result = alternating.compare(plain, ours, options.rounds)
        alternating.report("from the cache", "images/s", result)


if __name__ == "__main__":
    main()
