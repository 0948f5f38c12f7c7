"""Does a released model see that a picture is not food?

    python benchmarks/not_food.py --model_dir ml-models

Draws 200 pictures that are not food (eight kinds, 25 of each), adds the photographs that
scikit-learn and, if it is installed, scikit-image bring, and asks the model for its verdict on
them and on its own test images, which it finds through the version's report. Below that, the
scores that could have decided instead: the share that each refuses where it refuses 5 % of food.
"""

import argparse
import io
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import alternating
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from app.ml.artifacts import report_folder_name
from app.ml.predictor import FoodPredictor, load_model_for_inference, nearest_centroid
from app.ml.preprocessing import normalize
from training.release.calibration import verdict_shares
from training.release.tables import read_table

SIDE = 320
OF_EACH = 25
FOOD_REFUSED = 0.05
WORDS = ("the", "of", "and", "to", "in", "is", "it", "you", "that", "was", "for", "with", "have")


def color(random: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = random.integers(0, 256, 3).tolist()
    return red, green, blue


def texture(random: np.random.Generator) -> Image.Image:
    """Smooth noise in several sizes, between two colours."""
    pixels = np.zeros((SIDE, SIDE))
    for cells in random.choice([4, 8, 16, 40, 80], size=3, replace=False):
        noise = Image.fromarray(random.random((cells, cells)).astype(np.float32))
        pixels += np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    share = np.clip(pixels / 3, 0, 1)[..., None]
    mixed = share * np.array(color(random)) + (1 - share) * np.array(color(random))
    return Image.fromarray(mixed.astype(np.uint8))


def pattern(random: np.random.Generator) -> Image.Image:
    """Stripes, tiles or rings."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    turns, angle = random.uniform(3, 30), random.uniform(0, math.pi)
    waves = [
        np.sin(2 * math.pi * turns * (x * math.cos(angle) + y * math.sin(angle))),
        np.sin(2 * math.pi * turns * x) * np.sin(2 * math.pi * turns * y),
        np.sin(2 * math.pi * turns * np.hypot(x - random.random(), y - random.random())),
    ]
    share = (waves[int(random.integers(3))] > random.uniform(-0.5, 0.5))[..., None]
    return Image.fromarray(np.where(share, color(random), color(random)).astype(np.uint8))


def face(random: np.random.Generator) -> Image.Image:
    """A head with eyes and a mouth, in noise."""
    noise = random.normal(128, random.uniform(20, 60), (SIDE, SIDE, 3)).clip(0, 255)
    image = Image.fromarray(noise.astype(np.uint8)).filter(ImageFilter.GaussianBlur(2))
    draw, skin = ImageDraw.Draw(image), color(random)
    left, top = (int(v) for v in random.integers(20, 90, 2))
    width, height = (int(v) for v in random.integers(120, 200, 2))
    draw.ellipse((left, top, left + width, top + height), fill=skin)
    for share in (0.3, 0.7):
        x, y, size = left + share * width, top + 0.4 * height, width * 0.08
        draw.ellipse((x - size, y - size, x + size, y + size), fill="white")
        draw.ellipse((x - size / 2, y - size / 2, x + size / 2, y + size / 2), fill=color(random))
    box = (left + 0.3 * width, top + 0.6 * height, left + 0.7 * width, top + 0.8 * height)
    draw.arc(box, 0, 180, fill=color(random), width=5)
    return image


def text(random: np.random.Generator) -> Image.Image:
    """A page."""
    paper = tuple(int(v) for v in random.integers(215, 256, 3))
    image = Image.new("RGB", (SIDE, SIDE), paper)
    draw, size = ImageDraw.Draw(image), int(random.integers(9, 22))
    for y in range(12, SIDE - size, int(size * 1.6)):
        line = " ".join(random.choice(WORDS, int(random.integers(3, 14))))
        draw.text(
            (14, y), line, fill=tuple(int(v) for v in random.integers(0, 90, 3)), font_size=size
        )
    return image


def screenshot(random: np.random.Generator) -> Image.Image:
    """Windows with bars, text and buttons on a desktop."""
    image = Image.new("RGB", (SIDE, SIDE), color(random))
    draw = ImageDraw.Draw(image)
    for _ in range(int(random.integers(2, 5))):
        left, top = (int(v) for v in random.integers(0, 150, 2))
        right, bottom = left + int(random.integers(110, 170)), top + int(random.integers(80, 160))
        draw.rectangle((left, top, right, bottom), fill=(245, 245, 245), outline=(90, 90, 90))
        draw.rectangle((left, top, right, top + 14), fill=color(random))
        for y in range(top + 20, bottom - 26, 12):
            draw.text((left + 6, y), " ".join(random.choice(WORDS, 4)), fill=(40, 40, 40))
        button = (right - 46, bottom - 22, right - 6, bottom - 6)
        draw.rounded_rectangle(button, 4, fill=color(random))
    return image


def landscape(random: np.random.Generator) -> Image.Image:
    """Sky, sun, rows of hills and, in front, trees."""
    high, low = np.array([70, 120, 200]), np.array([220, 225, 235])
    share = np.linspace(0, 1, SIDE)[:, None, None]
    sky = (high * (1 - share) + low * share + random.normal(0, 3, (SIDE, SIDE, 3))).clip(0, 255)
    image = Image.fromarray(sky.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    x, y = (int(v) for v in random.integers(20, 140, 2))
    draw.ellipse((x, y, x + 30, y + 30), fill=(255, 240, 190))
    for row in range(4):
        base, phase = 130 + row * 50 + random.uniform(-10, 10), random.uniform(0, 6)
        heights = [base + 25 * math.sin(i / (30 + 9 * row) + phase) for i in range(SIDE)]
        green = (40 + 12 * row, 110 - 16 * row, 60)
        draw.polygon([(0, SIDE), *enumerate(heights), (SIDE, SIDE)], fill=green)
    for _ in range(int(random.integers(4, 20))):
        x, y = int(random.integers(0, SIDE)), int(random.integers(230, SIDE))
        draw.polygon([(x - 9, y), (x + 9, y), (x, y - 40)], fill=(20, 60, 25))
    return image.filter(ImageFilter.GaussianBlur(float(random.uniform(0, 1.5))))


def chart(random: np.random.Generator) -> Image.Image:
    """Bars, lines, points or a pie."""
    figure = Figure(figsize=(3.2, 3.2), dpi=100)
    FigureCanvasAgg(figure)
    axes, values = figure.add_subplot(), random.random(int(random.integers(4, 9)))
    kind = int(random.integers(4))
    if kind == 0:
        axes.bar(range(len(values)), values, color=np.array(color(random)) / 255)
    elif kind == 1:
        axes.plot(random.normal(size=(40, 3)).cumsum(axis=0))
    elif kind == 2:
        axes.scatter(*random.normal(size=(2, 80)), color=np.array(color(random)) / 255)
    else:
        axes.pie(values)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def room(random: np.random.Generator) -> Image.Image:
    """Walls and a floor with boxes in front of them, lit from one side."""
    image = Image.new("RGB", (SIDE, SIDE), color(random))
    draw, floor = ImageDraw.Draw(image), int(random.integers(180, 260))
    draw.rectangle((0, floor, SIDE, SIDE), fill=color(random))
    for _ in range(int(random.integers(3, 7))):
        x, width, height = (int(v) for v in random.integers((0, 20, 30), (260, 90, 160)))
        side, front = int(width * 0.3), color(random)
        y = floor + int(random.integers(0, 40))
        shade = tuple(int(v * 0.6) for v in front)
        draw.rectangle((x, y - height, x + width, y), fill=front)
        corner = [(x + width, y), (x + width + side, y - side)]
        draw.polygon(
            [*corner, (x + width + side, y - side - height), (x + width, y - height)], fill=shade
        )
    light = np.linspace(random.uniform(0.5, 1), random.uniform(0.7, 1.2), SIDE)[None, :, None]
    return Image.fromarray((np.asarray(image) * light).clip(0, 255).astype(np.uint8))


KINDS: tuple[Callable[[np.random.Generator], Image.Image], ...] = (
    *(texture, pattern, face, text),
    *(screenshot, landscape, chart, room),
)


def photographs() -> list[Image.Image]:
    """Those that come with installed packages; none of them shows food but a cup of coffee."""
    from sklearn.datasets import load_sample_images

    images = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    spec = find_spec("skimage")
    if spec and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0], "data")
        shipped = sorted([*folder.glob("*.png"), *folder.glob("*.jpg")])
        images += [Image.open(path).convert("RGB") for path in shipped if path.stem != "coffee"]
    return images


def test_images(model_dir: Path, version: int) -> list[tuple[Path, str]]:
    """Path and class of each test image of the version that is still there."""
    table = model_dir / report_folder_name(version) / "test_predictions.csv"
    rows = [(Path(row["file"]), row["actual"]) for row in read_table(table)]
    return [row for row in rows if row[0].exists()]


def outputs(model: FoodPredictor, images: list[Image.Image | Path]) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and similarities to the nearest class (N,)."""
    results = []
    for image in images:
        pixels = model.preprocess(image).unsqueeze(0)
        logits, pooled = model.network(normalize(pixels, model.record.preprocessing))
        results.append((logits, nearest_centroid(pooled, model.centroids)))
    logits, similarities = zip(*results, strict=True)
    return torch.cat(logits), torch.cat(similarities)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--version", type=int)
    parser.add_argument("--draw_into", type=Path, help="keep the drawn pictures, to look at them")
    options = parser.parse_args()
    model = load_model_for_inference(options.model_dir, options.version)
    record, decision = model.record, model.record.decision
    food = test_images(options.model_dir, record.version)
    if not food:
        parser.error(f"no test picture of version {record.version} is where it was any more")
    print(alternating.machine())
    print(f"version {record.version}, {record.model_name}, {len(record.classes)} classes")
    random = np.random.default_rng(0)
    kinds = {kind.__name__: [kind(random) for _ in range(OF_EACH)] for kind in KINDS}
    kinds["photograph"] = photographs()
    other: list[Tensor] = []
    for name, images in kinds.items():
        for i, image in enumerate(images if options.draw_into else []):
            options.draw_into.mkdir(parents=True, exist_ok=True)
            image.save(options.draw_into / f"{name}-{i}.png")
        result = outputs(model, list(images))
        other.append(result)
        refused = int((result[1] < decision.food_at).sum())
        print(f"  {name:<12} refused {refused:>3} of {len(images)}")
    logits, similarities = outputs(model, [path for path, _ in food])
    labels = np.array([record.class_to_idx[name] for _, name in food])
    said = verdict_shares(decision, logits.numpy(), labels, similarities.numpy())
    total = sum(len(result[1]) for result in other)
    refused = sum(int((result[1] < decision.food_at).sum()) for result in other)
    print(f"not food, refused   {refused / total:7.1%} of {total}")
    print(f"food, refused       {said['not_food']['share']:7.1%} of {len(food)}")
    right = said["confident"]["accuracy"]
    of_these = "" if right is None else f", of which right {right:.1%}"
    print(f"food, confident     {said['confident']['share']:7.1%}{of_these}")
    other_logits = torch.cat([result[0] for result in other])
    other_similarities = torch.cat([result[1] for result in other])
    print(f"refused by each score where it refuses {FOOD_REFUSED:.0%} of food:")
    for name, of_food, of_other in (
        ("largest probability", logits.softmax(1).amax(1), other_logits.softmax(1).amax(1)),
        ("largest logit", logits.amax(1), other_logits.amax(1)),
        ("energy", logits.logsumexp(1), other_logits.logsumexp(1)),
        ("nearest class, cosine", similarities, other_similarities),
    ):
        share = (of_other < of_food.quantile(FOOD_REFUSED)).float().mean()
        print(f"  {name:<22}{share:7.1%}")


if __name__ == "__main__":
    main()
