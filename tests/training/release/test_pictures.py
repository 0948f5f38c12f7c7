"""The pictures of pages: small, shown however large the photo, shaded where nobody looked."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.ml.activation import ActivationMap
from app.ml.preprocessing import Limits
from training.release import pictures
from training.release.pictures import heat_of, picture_of, square, whole

CORNER = [[1.0, 0.0], [0.0, 0.0]]  # the network looked at the top left


def decoded(uri: str | None, kind: str) -> Image.Image:
    assert uri is not None
    head, data = uri.split(",")
    assert head == f"data:image/{kind};base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.mark.parametrize("size", [(300, 225), (225, 300), (180, 180), (300, 50)])
def test_heat_covers_the_picture_and_is_clear_where_the_network_looked(
    size: tuple[int, int],
) -> None:
    heat = decoded(heat_of(ActivationMap("dal", CORNER, side=0.5), size), "png")
    assert heat.mode == "LA" and max(heat.size) == 32
    assert heat.size == tuple(round(side * 32 / max(size)) for side in size)
    color, darkness = np.array(heat).transpose(2, 0, 1)
    assert (color == 0).all()
    height, width = darkness.shape
    seen = min(height, width) // 2
    top, left = (height - seen) // 2, (width - seen) // 2
    assert darkness[top, left] < 40
    assert darkness[top + seen - 1, left + seen - 1] > 170
    outside = np.ones_like(darkness, dtype=bool)
    outside[top : top + seen, left : left + seen] = False
    assert (darkness[outside] == 191).all()


def test_without_a_map_nothing_is_laid_over() -> None:
    assert heat_of(ActivationMap("dal", None, 1.0, "no places"), (180, 180)) is None


def test_a_photo_is_shown_small_with_what_the_look_says(tmp_path: Path) -> None:
    asked = []

    def look(image: Image.Image) -> ActivationMap:
        asked.append(image.size)
        return ActivationMap("dal", CORNER, side=1.0)

    Image.new("RGB", (900, 600), "red").save(tmp_path / "p.png")
    plain, shown = (picture_of(str(tmp_path / "p.png"), *how) for how in ((square,), (whole, look)))
    assert decoded(plain["photo"], "jpeg").size == (180, 180) and plain["heat"] is None
    assert decoded(shown["photo"], "jpeg").size == (300, 200) == (shown["width"], shown["height"])
    assert decoded(shown["heat"], "png").size == (32, 21)
    assert asked == [(900, 600)]  # the photo as it is, not the small one


def test_a_photo_that_is_gone_or_damaged_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "damaged.jpg").write_bytes(b"\xff\xd8\xff")
    for name in ("damaged.jpg", "gone.jpg"):
        shown = picture_of(str(tmp_path / name), whole)
        assert shown["photo"] is shown["heat"] is None


def test_photos_are_shown_within_the_limits_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes larger ones than the server does."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "p.png")
    assert picture_of(str(tmp_path / "p.png"), square)["photo"]
    monkeypatch.setattr(pictures, "TRAINING_LIMITS", Limits(memory=1, work=1))
    assert picture_of(str(tmp_path / "p.png"), square)["photo"] is None
