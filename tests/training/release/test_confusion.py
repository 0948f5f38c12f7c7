"""The picture of the confusion matrix, from 2 classes to 2,000."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.release import confusion
from training.release.confusion import write_confusion_matrix
from training.release.metrics import evaluate

BACKEND = Path(confusion.__file__).resolve().parents[2]


def picture(path: Path) -> np.ndarray:
    """Its pixels, (side, side, 3)."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape[0] == pixels.shape[1]
    return pixels


def test_ten_classes(tmp_path: Path) -> None:
    labels = np.arange(100) % 10
    logits = 5.0 * np.eye(10)[labels]
    logits[0, 3] = 9.0  # class 0 taken for class 3, once
    results = evaluate(logits, labels, [f"dish_{i}" for i in range(10)])
    write_confusion_matrix(results, tmp_path / "matrix.png")
    pixels = picture(tmp_path / "matrix.png")
    assert 900 <= len(pixels) <= 1600
    red, blue = pixels[..., 0], pixels[..., 2]
    cell = (0.6 * 130) ** 2
    assert (blue - red > 60).sum() == pytest.approx(10 * cell, rel=0.15)  # the diagonal
    assert (red - blue > 60).sum() == pytest.approx(cell, rel=0.15)  # the one mistake


def test_101_classes_have_room_for_names_that_can_be_read(tmp_path: Path) -> None:
    labels = np.arange(505) % 101
    results = evaluate(
        5.0 * np.eye(101)[labels], labels, [f"a_long_dish_name_{i}" for i in labels[:101]]
    )
    write_confusion_matrix(results, tmp_path / "matrix.png")
    assert 101 * 30 <= len(picture(tmp_path / "matrix.png")) <= 5000  # 30 pixels a row


def test_two_classes_of_which_one_was_not_tested(tmp_path: Path) -> None:
    results = evaluate(np.array([[5.0, 0.0]]), np.array([0]), ["dal", "dosa"])
    write_confusion_matrix(results, tmp_path / "matrix.png")
    assert len(picture(tmp_path / "matrix.png")) >= 400


def test_dollars_in_names_are_no_formula(tmp_path: Path) -> None:
    names = ["$\\frac$", "menu_$5_to_$10", "pizza"]
    results = evaluate(5.0 * np.eye(3), np.arange(3), names)
    write_confusion_matrix(results, tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").stat().st_size


def test_letters_that_the_font_lacks_are_told_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = evaluate(5.0 * np.eye(3), np.arange(3), ["दाल", "寿司", "قرمه\u200cسبزی"])
    write_confusion_matrix(results, tmp_path / "matrix.png")
    (line,) = caplog.messages
    assert line == "matrix.png: its font lacks letters of some class names"
    assert len(picture(tmp_path / "matrix.png")) >= 400


DRAW = """
import resource, sys, time
import numpy as np
from pathlib import Path
from training.release.confusion import write_confusion_matrix
from training.release.metrics import evaluate
n, path = int(sys.argv[1]), Path(sys.argv[2])
rng = np.random.default_rng(0)
labels = np.repeat(np.arange(n), 4)
logits = np.zeros((4 * n, n), dtype=np.float32)
answers = np.where(rng.random(4 * n) < 0.7, labels, rng.integers(0, n, 4 * n))
logits[np.arange(4 * n), answers] = 5
results = evaluate(logits, labels, [f"a_rather_long_dish_name_{i}" for i in range(n)])
del logits
small = {**results, "classes": results["classes"][:2], "confusion_matrix": [[1, 0], [0, 1]]}
write_confusion_matrix(small, path)  # pays for the imports
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
write_confusion_matrix(results, path)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(time.process_time() - began, (after - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux does")
@pytest.mark.parametrize("num_classes", [1000, 2000])
def test_many_classes_stay_small_and_quick(num_classes: int, tmp_path: Path) -> None:
    path = tmp_path / "matrix.png"
    done = subprocess.run(
        [sys.executable, "-c", DRAW, str(num_classes), str(path)],
        env={"PYTHONPATH": str(BACKEND), "PATH": "", "MPLCONFIGDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 20 and megabytes < 300
    pixels = picture(path)
    assert 4000 <= len(pixels) <= 5000
    diagonal = pixels[..., 2] - pixels[..., 0] > 60
    assert diagonal.sum() > 2000  # the diagonal is still seen
