"""How many wrong labels does the audit find, and what is it worth to correct them?

    python benchmarks/label_audit.py --data_dir FOLDER --score OTHER --out labels --weights FILE

Gives a share of the training photos another dish's label, with each seed anew, and audits them: of
the first suggestions, as many as there are wrong labels, how many are wrong labels (precision,
which then is the recall too). The data's own wrong labels count as mistakes of the audit. Then
trains a linear head on the pooled features with the noisy, the corrected and the original labels,
and scores it on the photos of OTHER (class folders). Corrected: a person has decided rightly on the
first suggestions, or on all of them.

The files of labels are left in --out, so that whole trainings can be compared too:

    python benchmarks/accuracy.py --data_dir FOLDER --score OTHER --out runs \
        --setting "original" --setting "noisy labels=labels/0/noisy.csv" \
        --setting "corrected labels=labels/0/corrected.csv"
"""

import csv
import os
import time
from pathlib import Path

import alternating
import numpy as np
from sklearn.linear_model import LogisticRegression

from training.commands.audit import (
    CONFLICT,
    LABEL,
    Finding,
    Photos,
    find,
    pretrained_model,
    read_photos,
)
from training.config import TrainingConfig
from training.data.splits import FoodData, load_food_data
from training.release.label_audit import directions

PENALTY = 10.0  # scikit-learn's C


def swapped(data: FoodData, share: float, seed: int) -> dict[str, str]:
    """Draw other labels for a share of the photos that are trained on or validated with."""
    rng = np.random.default_rng(seed)
    paths = [*data.train.paths, *data.val.paths]
    labels = [*data.train.labels.tolist(), *data.val.labels.tolist()]
    chosen = rng.permutation(len(paths))[: round(share * len(paths))].tolist()
    others = rng.integers(1, len(data.classes), len(chosen)).tolist()
    return {
        paths[i]: data.classes[(labels[i] + other) % len(data.classes)]
        for i, other in zip(chosen, others, strict=True)
    }


def write_labels(path: Path, labels: dict[str, str], data_dir: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        for photo, label in labels.items():
            writer.writerow([os.path.relpath(photo, os.path.realpath(data_dir)), label])


def with_labels(photos: Photos, labels: dict[str, str], classes: list[str]) -> Photos:
    """Give photos other labels."""
    new = [
        classes.index(labels[path]) if path in labels else label
        for path, label in zip(photos.paths, photos.labels.tolist(), strict=True)
    ]
    return Photos(
        photos.paths, photos.names, np.array(new), photos.splits, photos.pooled, photos.hashes
    )


def accuracy(photos: Photos, other: Photos) -> float:
    """Train a linear head on all but the test photos, and score it on other photos."""
    is_known = np.array([split != "test" for split in photos.splits])
    head = LogisticRegression(C=PENALTY, max_iter=300)
    head.fit(directions(photos.pooled)[is_known], photos.labels[is_known])
    return float(head.score(directions(other.pooled), other.labels))


def main() -> None:
    parser = alternating.make_parser(__doc__)
    parser.add_argument("--data_dir", type=Path, required=True, help="photos, of known labels")
    parser.add_argument("--score", type=Path, required=True, help="class folders of other photos")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files of labels")
    parser.add_argument("--model_name", default="mobilenet_v2", help="backbone (mobilenet_v2)")
    parser.add_argument("--weights", default="imagenet", help="its weights (imagenet)")
    parser.add_argument("--share", type=float, default=0.08, help="of wrong labels (0.08)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    options = parser.parse_args()
    config = TrainingConfig(
        model_name=options.model_name, weights=options.weights, data_dir=options.data_dir
    )
    data = load_food_data(options.data_dir)
    other_data = load_food_data(options.score)
    assert other_data.classes == data.classes, "OTHER must have the same classes"
    print(alternating.machine())
    began = time.perf_counter()
    model = pretrained_model(config, data)
    photos = read_photos(model, config, data)
    print(f"{len(photos.paths)} photos read in {time.perf_counter() - began:.0f} s")
    other = read_photos(model, config, other_data)
    original = accuracy(photos, other)
    print("seed  wrong  first   of them wrong  listed  of them wrong  seconds   accuracy: noisy")
    print("      first corrected   all corrected   original")
    for seed in options.seeds:
        wrong = swapped(data, options.share, seed)
        noisy = with_labels(photos, wrong, data.classes)
        began = time.perf_counter()
        found = [f for f in find(noisy, data.classes, seed) if f.kind in (CONFLICT, LABEL)]
        seconds = time.perf_counter() - began
        first = hits(found[: len(wrong)], photos, wrong)
        listed = hits(found, photos, wrong)
        left = [{p: name for p, name in wrong.items() if p not in h} for h in (first, listed)]
        write_labels(options.out / str(seed) / "noisy.csv", wrong, options.data_dir)
        write_labels(options.out / str(seed) / "corrected.csv", left[0], options.data_dir)
        scores = [accuracy(with_labels(photos, w, data.classes), other) for w in (wrong, *left)]
        print(
            f"{seed}  {len(wrong)}  {len(found[: len(wrong)])}  {len(first)}  {len(found)}  "
            f"{len(listed)}  {seconds:.1f}  {'  '.join(f'{s:.4f}' for s in scores)}  "
            f"{original:.4f}",
            flush=True,
        )


def hits(found: list[Finding], photos: Photos, wrong: dict[str, str]) -> set[str]:
    """Return the paths of those findings whose label is wrong."""
    return {photos.paths[finding.photo] for finding in found} & wrong.keys()


if __name__ == "__main__":
    main()
