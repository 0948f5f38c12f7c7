"""Does a released model see that a picture is not food?

    python benchmarks/not_food.py --model_dir ml-models

Draws 200 pictures that are not food (eight kinds, 25 of each), adds the photographs that
scikit-learn and, if it is installed, scikit-image bring, and asks the model for its verdict on
them and on its own test images, which it finds through the version's report. Below that: what other
scores would refuse of them at the threshold where each refuses 5% of food.
"""

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
from training.sample.generate import noise

SIDE = 320
OF_EACH = 25
FOOD_REFUSED = 0.05
WORDS = ("the", "of", "and", "to", "in", "is", "it", "you", "that", "was", "for", "with", "have")


def color(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue


def texture(rng: np.random.Generator) -> Image.Image:
    """Smooth noise in several sizes, between two colors."""
    sizes = rng.choice([4, 8, 16, 40, 80], size=3, replace=False)
    total = sum(noise(rng, (SIDE, SIDE), cells, cells) for cells in sizes)
    share = np.clip(0.5 + total / 4, 0, 1)[..., None]
    mixed = share * np.array(color(rng)) + (1 - share) * np.array(color(rng))
    return Image.fromarray(mixed.astype(np.uint8))


def pattern(rng: np.random.Generator) -> Image.Image:
    """Stripes, tiles or rings."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    turns, angle = rng.uniform(3, 30), rng.uniform(0, math.pi)
    waves = [
        np.sin(2 * math.pi * turns * (x * math.cos(angle) + y * math.sin(angle))),
        np.sin(2 * math.pi * turns * x) * np.sin(2 * math.pi * turns * y),
        np.sin(2 * math.pi * turns * np.hypot(x - rng.random(), y - rng.random())),
    ]
    share = (waves[int(rng.integers(3))] > rng.uniform(-0.5, 0.5))[..., None]
    return Image.fromarray(np.where(share, color(rng), color(rng)).astype(np.uint8))


def face(rng: np.random.Generator) -> Image.Image:
    """A head with eyes and a mouth, in noise."""
    noise = rng.normal(128, rng.uniform(20, 60), (SIDE, SIDE, 3)).clip(0, 255)
    image = Image.fromarray(noise.astype(np.uint8)).filter(ImageFilter.GaussianBlur(2))
    draw, skin = ImageDraw.Draw(image), color(rng)
    left, top = (int(v) for v in rng.integers(20, 90, 2))
    width, height = (int(v) for v in rng.integers(120, 200, 2))
    draw.ellipse((left, top, left + width, top + height), fill=skin)
    for share in (0.3, 0.7):
        x, y, size = left + share * width, top + 0.4 * height, width * 0.08
        draw.ellipse((x - size, y - size, x + size, y + size), fill="white")
        draw.ellipse((x - size / 2, y - size / 2, x + size / 2, y + size / 2), fill=color(rng))
    box = (left + 0.3 * width, top + 0.6 * height, left + 0.7 * width, top + 0.8 * height)
    draw.arc(box, 0, 180, fill=color(rng), width=5)
    return image


def text(rng: np.random.Generator) -> Image.Image:
    """A page."""
    paper = tuple(int(v) for v in rng.integers(215, 256, 3))
    image = Image.new("RGB", (SIDE, SIDE), paper)
    draw, size = ImageDraw.Draw(image), int(rng.integers(9, 22))
    for y in range(12, SIDE - size, int(size * 1.6)):
        line = " ".join(rng.choice(WORDS, int(rng.integers(3, 14))))
        draw.text((14, y), line, fill=tuple(int(v) for v in rng.integers(0, 90, 3)), font_size=size)
    return image


def screenshot(rng: np.random.Generator) -> Image.Image:
    """Windows with bars, text and buttons on a desktop."""
    image = Image.new("RGB", (SIDE, SIDE), color(rng))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 5))):
        left, top = (int(v) for v in rng.integers(0, 150, 2))
        right, bottom = left + int(rng.integers(110, 170)), top + int(rng.integers(80, 160))
        draw.rectangle((left, top, right, bottom), fill=(245, 245, 245), outline=(90, 90, 90))
        draw.rectangle((left, top, right, top + 14), fill=color(rng))
        for y in range(top + 20, bottom - 26, 12):
            draw.text((left + 6, y), " ".join(rng.choice(WORDS, 4)), fill=(40, 40, 40))
        button = (right - 46, bottom - 22, right - 6, bottom - 6)
        draw.rounded_rectangle(button, 4, fill=color(rng))
    return image


def landscape(rng: np.random.Generator) -> Image.Image:
    """Sky, sun, rows of hills and, in front, trees."""
    high, low = np.array([70, 120, 200]), np.array([220, 225, 235])
    share = np.linspace(0, 1, SIDE)[:, None, None]
    sky = (high * (1 - share) + low * share + rng.normal(0, 3, (SIDE, SIDE, 3))).clip(0, 255)
    image = Image.fromarray(sky.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    x, y = (int(v) for v in rng.integers(20, 140, 2))
    draw.ellipse((x, y, x + 30, y + 30), fill=(255, 240, 190))
    for row in range(4):
        base, phase = 130 + row * 50 + rng.uniform(-10, 10), rng.uniform(0, 6)
        heights = [base + 25 * math.sin(i / (30 + 9 * row) + phase) for i in range(SIDE)]
        green = (40 + 12 * row, 110 - 16 * row, 60)
        draw.polygon([(0, SIDE), *enumerate(heights), (SIDE, SIDE)], fill=green)
    for _ in range(int(rng.integers(4, 20))):
        x, y = int(rng.integers(0, SIDE)), int(rng.integers(230, SIDE))
        draw.polygon([(x - 9, y), (x + 9, y), (x, y - 40)], fill=(20, 60, 25))
    return image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 1.5))))


def chart(rng: np.random.Generator) -> Image.Image:
    """Bars, lines, points or a pie."""
    figure = Figure(figsize=(3.2, 3.2), dpi=100)
    FigureCanvasAgg(figure)
    axes, values = figure.add_subplot(), rng.random(int(rng.integers(4, 9)))
    kind = int(rng.integers(4))
    if kind == 0:
        axes.bar(range(len(values)), values, color=np.array(color(rng)) / 255)
    elif kind == 1:
        axes.plot(rng.normal(size=(40, 3)).cumsum(axis=0))
    elif kind == 2:
        axes.scatter(*rng.normal(size=(2, 80)), color=np.array(color(rng)) / 255)
    else:
        axes.pie(values)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def room(rng: np.random.Generator) -> Image.Image:
    """Walls and a floor with boxes in front of them, lit from one side."""
    image = Image.new("RGB", (SIDE, SIDE), color(rng))
    draw, floor = ImageDraw.Draw(image), int(rng.integers(180, 260))
    draw.rectangle((0, floor, SIDE, SIDE), fill=color(rng))
    for _ in range(int(rng.integers(3, 7))):
        x, width, height = (int(v) for v in rng.integers((0, 20, 30), (260, 90, 160)))
        side, front = int(width * 0.3), color(rng)
        y = floor + int(rng.integers(0, 40))
        shade = tuple(int(v * 0.6) for v in front)
        draw.rectangle((x, y - height, x + width, y), fill=front)
        corner = [(x + width, y), (x + width + side, y - side)]
        draw.polygon(
            [*corner, (x + width + side, y - side - height), (x + width, y - height)], fill=shade
        )
    light = np.linspace(rng.uniform(0.5, 1), rng.uniform(0.7, 1.2), SIDE)[None, :, None]
    return Image.fromarray((np.asarray(image) * light).clip(0, 255).astype(np.uint8))


KINDS: tuple[Callable[[np.random.Generator], Image.Image], ...] = (
    *(texture, pattern, face, text),
    *(screenshot, landscape, chart, room),
)


def photographs() -> list[Image.Image]:
    """Those that come with installed packages, without the one of a cup of coffee."""
    from sklearn.datasets import load_sample_images

    images = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    spec = find_spec("skimage")
    if spec and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0], "data")
        shipped = sorted([*folder.glob("*.png"), *folder.glob("*.jpg")])
        images += [Image.open(path).convert("RGB") for path in shipped if path.stem != "coffee"]
    return images


def test_images(model_dir: Path, version: int) -> list[tuple[Path, str]]:
    """Path and class of each test image of the version that still exists."""
    rows = read_table(model_dir / report_folder_name(version) / "test_predictions.csv")
    found = [(Path(row["file"]), row["actual"]) for row in rows]
    return [(path, name) for path, name in found if path.exists()]


def outputs(model: FoodPredictor, images: list[Image.Image | Path]) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and similarities to the nearest class (N,)."""
    results = []
    for image in images:
        pixels = model.preprocess(image).unsqueeze(0)
        logits, pooled = model.network(normalize(pixels, model.record.preprocessing))
        results.append((logits, nearest_centroid(pooled, model.centroids)))
    return torch.cat([logits for logits, _ in results]), torch.cat([s for _, s in results])


def save_images(kinds: dict[str, list[Image.Image]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, images in kinds.items():
        for i, image in enumerate(images):
            image.save(folder / f"{name}-{i}.png")


def print_scores(food: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    """How much each score refuses at the threshold where it refuses FOOD_REFUSED of food."""
    print(f"refused by each score where it refuses {FOOD_REFUSED:.0%} of food:")
    for name, score in (
        ("largest probability", lambda logits, _: logits.softmax(1).amax(1)),
        ("largest logit", lambda logits, _: logits.amax(1)),
        ("energy", lambda logits, _: logits.logsumexp(1)),
        ("nearest class, cosine", lambda _, similarities: similarities),
    ):
        share = (score(*other) < score(*food).quantile(FOOD_REFUSED)).float().mean()
        print(f"  {name:<22}{share:7.1%}")


def main() -> None:
    parser = alternating.make_parser(__doc__)
    parser.add_argument("--model_dir", type=Path, required=True, help="folder of the model")
    parser.add_argument("--version", type=int, help="of the model (the current one)")
    parser.add_argument("--draw_into", type=Path, help="keep the drawn pictures in this folder")
    options = parser.parse_args()
    model = load_model_for_inference(options.model_dir, options.version)
    record, decision = model.record, model.record.decision
    test = test_images(options.model_dir, record.version)
    if not test:
        parser.error(f"none of the test images of version {record.version} exists any longer")
    print(alternating.machine())
    print(f"version {record.version}, {record.model_name}, {len(record.classes)} classes")
    rng = np.random.default_rng(0)
    kinds = {kind.__name__: [kind(rng) for _ in range(OF_EACH)] for kind in KINDS}
    if options.draw_into:
        save_images(kinds, options.draw_into)
    results = []
    for name, images in {**kinds, "photograph": photographs()}.items():
        results.append(outputs(model, list(images)))
        refused = int((results[-1][1] < decision.food_at).sum())
        print(f"  {name:<12} refused {refused:>3} of {len(images)}")
    other = torch.cat([logits for logits, _ in results]), torch.cat([s for _, s in results])
    food = outputs(model, [path for path, _ in test])
    labels = np.array([record.class_to_idx[name] for _, name in test])
    shares = verdict_shares(decision, food[0].numpy(), labels, food[1].numpy())
    refused_share = (other[1] < decision.food_at).float().mean()
    print(f"not food, refused   {refused_share:7.1%} of {len(other[1])}")
    print(f"food, refused       {shares['not_food']['share']:7.1%} of {len(test)}")
    correct = shares["confident"]["accuracy"]
    of_these = "" if correct is None else f", of which correct {correct:.1%}"
    print(f"food, confident     {shares['confident']['share']:7.1%}{of_these}")
    print_scores(food, other)


if __name__ == "__main__":
    main()
