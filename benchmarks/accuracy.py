"""How accurate is each of several settings, on photos that no setting was chosen with?

    python benchmarks/accuracy.py --data_dir FOLDER --score OTHER --out RUNS \
        --setting "default" --setting "small train_crop=160 test_crop=224" \
        --flags "--epochs 10 --weights FILE"

Trains every setting with every seed, one after the other, through the command line, and asks each
released model about the photos of OTHER (class folders). A setting is its name and values for
fields of TrainingConfig, those without a flag included. Differences are against the first setting,
photo by photo, with 95% intervals over the photos; how far the seeds disagree stands beside them.
--sizes scores the same models on pictures of other sizes as well, which trains nothing. With
--runs 3 among the flags, each run and the mean of them (v4) has its rows.

Killed, it goes on where it was: the same command resumes the training, and what is trained or
scored is kept. RUNS/table.md is the table; RUNS/SETTING/seed-N has the run and its scores.
"""

import argparse
import dataclasses
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import alternating
import numpy as np
import torch
from run_of_setting import parse_fields

from app.ml.artifacts import (
    ModelRecord,
    list_versions,
    read_centroids,
    read_record,
    read_state,
)
from app.ml.model import build_model
from app.ml.predictor import TorchNetwork, nearest_centroid
from app.ml.preprocessing import IMAGE_EXTENSIONS, PreprocessConfig
from training.config import TrainingConfig
from training.data.manifest import read_manifest
from training.data.splits import FoodData, Split
from training.release.calibration import (
    calibration_error,
    class_centroids,
    fit_decision,
    probabilities,
    reliability_bins,
)
from training.release.evaluation import predict_split, some_of_each

CPU = torch.device("cpu")
Z_95 = 1.959964
SPENT = "processor_seconds"  # written when a training has ended


@dataclass(frozen=True)
class Setting:
    """A name, and what differs from the defaults, each as FIELD=VALUE."""

    name: str
    pairs: tuple[str, ...]


@dataclass(frozen=True)
class Size:
    """The short side that a picture is resized to, and the side of its center crop."""

    resize: int
    crop: int

    def __str__(self) -> str:
        return f"{self.crop} of {self.resize}"


@dataclass(frozen=True)
class Scores:
    """What one model answered for each photo (N,), in the order of the photos."""

    hits: np.ndarray
    confidence: np.ndarray
    is_food: np.ndarray
    confident_at: float

    @property
    def top1(self) -> float:
        return float(self.hits.mean())

    @property
    def ece(self) -> float:
        return calibration_error(reliability_bins(self.confidence, self.hits))

    def row(self) -> list[str]:
        """Format top-1, ECE, how many are confident, how many of these right, how many refused."""
        is_sure = self.is_food & (self.confidence >= self.confident_at)
        right = f"{self.hits[is_sure].mean():.1%}" if is_sure.any() else "-"
        refused = f"{1 - self.is_food.mean():.1%}"
        return [f"{self.top1:.3f}", f"{self.ece:.3f}", f"{is_sure.mean():.0%}", right, refused]


# Training -------------------------------------------------------------------------------------


def parse_setting(text: str) -> Setting:
    """Read "NAME field=value field=value".

    Raises:
        ValueError: no such field, or a value that it does not take.
    """
    name, *pairs = shlex.split(text)
    try:
        TrainingConfig(**parse_fields(pairs))
    except ValueError as error:
        raise ValueError(f"--setting {name}: {error}") from error
    return Setting(name, tuple(pairs))


def train(setting: Setting, seed: int, folder: Path, options: argparse.Namespace) -> None:
    """Train and release, or go on doing so, unless that is done; the log goes to the folder."""
    if (folder / SPENT).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    flags = [f"--data_dir={options.data_dir}", f"--seed={seed}", "--no_mlflow", "--resume=auto"]
    flags += [f"--output_dir={folder / 'ml-models'}", f"--checkpoint_dir={folder / 'checkpoints'}"]
    script = Path(__file__).with_name("run_of_setting.py")
    command = [sys.executable, str(script), shlex.join(setting.pairs), *flags]
    before = os.times()
    with (folder / "log").open("a") as log:
        subprocess.run([*command, *shlex.split(options.flags)], stdout=log, stderr=log, check=True)
    after = os.times()
    spent = after.children_user + after.children_system
    spent -= before.children_user + before.children_system
    (folder / SPENT).write_text(f"{spent:.0f}\n", encoding="utf-8")


def seconds_of(folder: Path) -> list[str]:
    """Format the seconds of all epochs, and the processor's with calibration, test and release.

    The processor's are those since the last start of the training.
    """
    records = folder.glob("checkpoints/*/metrics.jsonl")
    events = [json.loads(line) for record in records for line in record.read_text().splitlines()]
    seconds = sum(event["seconds"] for event in events if event["event"] == "epoch")
    return [f"{seconds:.0f}", (folder / SPENT).read_text(encoding="utf-8").strip()]


# Scoring --------------------------------------------------------------------------------------


def photos_of(folder: Path, class_to_idx: dict[str, int]) -> Split:
    """List the photos of class folders, sorted."""
    found = [
        (str(path), class_to_idx[path.parent.name])
        for path in sorted(folder.resolve().glob("*/*"))
        if path.parent.name in class_to_idx and path.suffix.lower() in IMAGE_EXTENSIONS
    ]
    if not found:
        raise SystemExit(f"--score {folder}: no photos in folders named after the classes")
    return Split(tuple(path for path, _ in found), np.array([label for _, label in found]))


def score(folder: Path, version: int, photos: Path, size: Size | None) -> Scores:
    """Ask a version in a folder about the photos, or read what it answered before."""
    kept = folder / f"scores-v{version}-{f'{size.crop}-{size.resize}' if size else 'own'}.npz"
    record = read_record(folder / "ml-models", version)
    split = photos_of(photos, record.class_to_idx)
    if kept.exists():
        with np.load(kept) as found:
            if found["paths"].tolist() == list(split.paths):
                return Scores(*(found[f.name] for f in dataclasses.fields(Scores)))
    scores = answers(folder, record, split, size)
    np.savez_compressed(kept, paths=np.array(split.paths), **vars(scores))
    return scores


def answers(folder: Path, record: ModelRecord, split: Split, size: Size | None) -> Scores:
    """Ask with what was released, or, at another size, with what is fitted there in its way."""
    model = build_model(record.model_name, len(record.classes))
    model.load_state_dict(read_state(folder / "ml-models", record))
    network = TorchNetwork(model, record.model_name, CPU)
    preprocessing, decision = record.preprocessing, record.decision
    centroids = read_centroids(folder / "ml-models", record)
    if size and size != Size(preprocessing.resize, preprocessing.crop):
        preprocessing = dataclasses.replace(preprocessing, **vars(size))
        images = next(folder.glob("checkpoints/*/images.json"))  # the same ones for all --runs
        centroids, decision = fitted(network, read_manifest(images.parent), preprocessing)
    found = predict_split(network, split, preprocessing, 1, CPU)
    if len(found.labels) < len(split):
        raise SystemExit(f"{len(found.skipped)} photos cannot be read: {[*found.skipped][:3]}")
    similarities = nearest_centroid(found.pooled, centroids).numpy()
    return Scores(
        hits=found.hits,
        confidence=probabilities(found.logits, found.labels, decision.temperature).confidence,
        is_food=similarities >= decision.food_at,
        confident_at=decision.confident_at,
    )


def fitted(network: TorchNetwork, data: FoodData, preprocessing: PreprocessConfig) -> Any:
    """Find centroids and thresholds as a release does, with the run's own photos."""
    known = predict_split(network, some_of_each(data.train), preprocessing, 1, CPU)
    val = predict_split(network, data.val, preprocessing, 1, CPU)
    centroids = class_centroids(known.pooled, known.labels, len(data.class_to_idx))
    similarities = nearest_centroid(val.pooled, centroids).numpy()
    return centroids, fit_decision(val.logits, val.labels, similarities)


# The table ------------------------------------------------------------------------------------


def paired(old: list[Scores], new: list[Scores]) -> str:
    """Format the mean difference in points, with its interval over photos and the seeds' own."""
    by_seed = np.stack([n.hits.astype(float) - o.hits for o, n in zip(old, new, strict=True)])
    by_photo = by_seed.mean(axis=0)
    half = Z_95 * by_photo.std(ddof=1) / np.sqrt(len(by_photo))
    mean = by_photo.mean()
    seeds = ", ".join(f"{100 * d:+.1f}" for d in by_seed.mean(axis=1))
    return f"{100 * mean:+.1f} ({100 * (mean - half):+.1f} to {100 * (mean + half):+.1f}); {seeds}"


def table(results: dict[str, dict[int, tuple[Scores, list[str]]]]) -> str:
    """Format every run, the means, and the differences from the first setting."""
    head = ["setting", "seed", "top-1", "ECE", "confident", "of these right", "refused"]
    rows = [[*head, "seconds of epochs", "processor seconds"]]
    for name, runs in results.items():
        rows += [[name, str(s), *scores.row(), *spent] for s, (scores, spent) in runs.items()]
    rows.append([])
    rows.append(["setting", "mean top-1", "mean ECE", "against the first, points"])
    first = next(iter(results.values()))
    for name, runs in results.items():
        shared = [seed for seed in runs if seed in first]
        scores = [found for found, _ in runs.values()]
        means = [
            f"{np.mean([s.top1 for s in scores]):.3f}",
            f"{np.mean([s.ece for s in scores]):.3f}",
        ]
        pairs = [first[seed][0] for seed in shared], [runs[seed][0] for seed in shared]
        rows.append([name, *means, paired(*pairs) if shared and runs is not first else ""])
    return "\n".join(f"| {' | '.join(row)} |" if row else "" for row in with_rules(rows)) + "\n"


def with_rules(rows: list[list[str]]) -> list[list[str]]:
    """Put Markdown's rule under the first row of each table."""
    ruled: list[list[str]] = []
    for number, row in enumerate(rows):
        ruled.append(row)
        if row and (number == 0 or not rows[number - 1]):
            ruled.append(["---"] * len(row))
    return ruled


def make_parser() -> argparse.ArgumentParser:
    parser = alternating.make_parser(__doc__)
    parser.add_argument("--data_dir", type=Path, required=True, help="photos to train on")
    parser.add_argument("--score", type=Path, required=True, help="other photos, class folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and the table")
    parser.add_argument(
        "--setting", action="append", help='"NAME field=value …", several times (default)'
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2], help="(42 1 2)")
    parser.add_argument("--sizes", nargs="+", default=[], help="test sizes too, CROP/RESIZE each")
    parser.add_argument("--flags", default="", help="of every training, in one string")
    return parser


def parse_size(text: str) -> Size:
    crop, _, resize = text.partition("/")
    return Size(int(resize or crop), int(crop))


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    try:
        settings = [parse_setting(text) for text in options.setting or ["default"]]
        sizes = [parse_size(text) for text in options.sizes]
    except ValueError as error:
        parser.error(str(error))
    print(alternating.machine())
    results: dict[str, dict[int, tuple[Scores, list[str]]]] = {}
    for seed in options.seeds:
        for setting in settings:
            folder = options.out / setting.name / f"seed-{seed}"
            began = time.perf_counter()
            train(setting, seed, folder, options)
            for version, size in itertools.product(
                list_versions(folder / "ml-models"), [None, *sizes]
            ):
                name = setting.name + f", v{version}" * (version > 1) + f", {size}" * bool(size)
                scores = score(folder, version, options.score, size)
                results.setdefault(name, {})[seed] = scores, seconds_of(folder)
                print(f"{name}, seed {seed}: {scores.top1:.3f}", flush=True)
            print(f"{time.perf_counter() - began:.0f} s", flush=True)
            (options.out / "table.md").write_text(table(results), encoding="utf-8")
    print((options.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
