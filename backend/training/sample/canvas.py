"""A picture in the making: strokes on a table, then light and a camera.

Every stroke paints two things: a colour, and a height above the table. Light is worked out at the
end from the heights, so grains, leaves and frosting throw shadows and shine together, whatever
they lie on.
"""

import math
from cmath import rect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFilter

Floats = NDArray[np.floating[Any]]
RGB = tuple[int, int, int]
Color = str | RGB
Points = NDArray[np.complexfloating[Any, Any]]  # px of the canvas: x + yj, y downwards

SUPERSAMPLE = 2  # strokes are this many times larger than the picture: smooth edges for free
TABLES = ["#966842", "#5c3e2c", "#d6be9e", "#eceae4", "#3c3e44", "#788c84", "#b03c38", "#46608c"]


def _noise(rng: np.random.Generator, shape: tuple[int, int], *grids: tuple[float, float]) -> Floats:
    """Smooth noise: random grids of (rows, columns), each half as strong as the one before."""
    total = np.zeros(shape, np.float32)
    for octave, (rows, columns) in enumerate(grids):
        grid = rng.standard_normal((max(2, round(rows)), max(2, round(columns))), np.float32)
        smooth = Image.fromarray(grid).resize(shape[::-1], Image.Resampling.BILINEAR)
        total += np.asarray(smooth) / 2**octave
    return total


@lru_cache(maxsize=256)
def _named(color: str) -> RGB:
    red, green, blue = ImageColor.getrgb(color)[:3]
    return red, green, blue


def _rgb(color: Color) -> RGB:
    return _named(color) if isinstance(color, str) else color


@lru_cache
def _unit_outline(count: int, power: float) -> tuple[Floats, Points]:
    """Angles and points of a circle (power 2) on its way to a square (power 8)."""
    turn = np.linspace(0, 2 * np.pi, count, endpoint=False)
    cos, sin = np.cos(turn), np.sin(turn)
    x, y = (np.sign(v) * np.abs(v) ** (2 / power) for v in (cos, sin))
    return turn.astype(np.float32), x + 1j * y


# ------------------------------------------------------------------------------------------ strokes


class Canvas:
    """A picture in the making: colour and height, `SUPERSAMPLE` times larger than it will be."""

    def __init__(self, background: Floats, rng: np.random.Generator) -> None:
        self.rng, self.uniform, self.normal = rng, rng.uniform, rng.normal
        size = (background.shape[1] * SUPERSAMPLE, background.shape[0] * SUPERSAMPLE)
        small = Image.fromarray(background.clip(0, 255).astype(np.uint8))
        self.color = small.resize(size, Image.Resampling.NEAREST)
        self.relief = Image.new("F", size)
        self.ink, self.clay = ImageDraw.Draw(self.color), ImageDraw.Draw(self.relief)

    def pick(self, items: Sequence[Any]) -> Any:
        return items[int(self.rng.integers(len(items)))]

    def count(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high))

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def turn(self) -> float:
        return self.uniform(0, 2 * math.pi)

    def tint(self, color: Color, gain: float = 1.0) -> RGB:
        """The colour as one more batch of the kitchen would have it, `gain` times as bright."""
        gain *= self.normal(1, 0.07)
        shifts = self.normal(0, 5, 3).tolist()
        red, green, blue = (
            min(max(int(value * gain + shift), 0), 255)
            for value, shift in zip(_rgb(color), shifts, strict=True)
        )
        return red, green, blue

    def inside(self, p: complex) -> tuple[int, int]:
        width, height = self.relief.size
        return min(max(int(p.real), 0), width - 1), min(max(int(p.imag), 0), height - 1)

    def ground(self, p: complex) -> float:
        """Height in px of whatever lies at `p` so far."""
        return float(self.relief.getpixel(self.inside(p)))  # type: ignore[arg-type]

    def seen(self, p: complex) -> RGB:
        """Colour of whatever lies at `p` so far."""
        red, green, blue = self.color.getpixel(self.inside(p))  # type: ignore[misc]
        return red, green, blue

    def mound(
        self, points: Points, color: Color, rise: float, flat: bool, base: float | None = None
    ) -> None:
        """Raise an outline by `rise` px above `base` (or what lies there): dome or slab."""
        middle = complex(points.mean())
        floor = self.ground(middle) if base is None else base
        self.ink.polygon(points.view(float).tolist(), fill=color)
        steps = 1 if flat else int(np.clip(abs(points[0] - middle) / 6, 2, 30))
        for step in range(steps):
            inward = 1 if flat else (step + 0.5) / steps
            rim = middle + (points - middle) * (1 - step / steps)
            self.clay.polygon(rim.view(float).tolist(), fill=floor + rise * inward * (2 - inward))

    def outline(
        self, p: complex, r: float, aspect: float, angle: float | None, wobble: float, power: float
    ) -> Points:
        """An ellipse (power 2) to a rectangle (power 8), with a wavering edge."""
        turn, unit = _unit_outline(16 if r < 12 else 36, power)
        if wobble:
            waves = (self.normal() / k * np.cos(k * turn + self.turn()) for k in (2, 3, 5))
            unit = unit * (1 + wobble * sum(waves))
        flat = unit.real + 1j * aspect * unit.imag
        return p + flat * rect(r, self.turn() if angle is None else angle)

    def blob(
        self, p: complex, r: float, color: Color, rise: float = 0.2, aspect: float = 1.0,
        angle: float | None = None, wobble: float = 0.06, power: float = 2.0, flat: bool = False,
        base: float | None = None,
    ) -> None:  # fmt: skip
        """What nearly everything is made of: a mound whose `rise` counts in radii."""
        points = self.outline(p, r, aspect, angle, wobble, power)
        self.mound(points, self.tint(color), rise * r, flat, base)

    def ring(self, p: complex, r: float, width: float, color: Color) -> None:
        box = (p.real - r, p.imag - r, p.real + r, p.imag + r)
        self.ink.ellipse(box, outline=self.tint(color), width=max(1, int(width)))
        self.clay.ellipse(box, outline=self.ground(p + r) + width, width=max(1, int(width)))

    def line(
        self, points: Sequence[complex], color: Color, width: float, rise: float = 0.5
    ) -> None:
        path, lift = [(p.real, p.imag) for p in points], max(self.ground(p) for p in points)
        self.ink.line(path, fill=self.tint(color), width=max(1, int(width)), joint="curve")
        self.clay.line(path, fill=lift + rise * width, width=max(1, int(width)), joint="curve")

    def strew(
        self, spots: Points, length: float, width: float, colors: Sequence[Color], rise: float = 0.6
    ) -> None:
        """Scatter short strokes: rice, sprinkles, seeds, herbs, crumbs."""
        half = np.exp(1j * self.uniform(0, np.pi, len(spots))) * length / 2
        shades, thick = [self.tint(self.pick(colors)) for _ in range(24)], max(1, round(width))
        strokes = np.stack([spots - half, spots + half], axis=1).view(float).tolist()
        for i, (spot, ends) in enumerate(zip(spots.tolist(), strokes, strict=True)):
            lift = self.ground(spot) + rise * width
            self.ink.line(ends, fill=shades[i % 24], width=thick)
            self.clay.line(ends, fill=lift, width=thick)

    def spread(self, p: complex, r: float, count: int, squash: float = 1.0) -> Points:
        """`count` points over a disc, evenly but not regularly, in random order."""
        i = np.arange(count)
        reach = r * np.sqrt((i + 0.5) / count) + self.normal(0, r * 0.06, count)
        turn = i * 2.4 + self.turn() + self.normal(0, 0.2, count)
        return self.rng.permutation(p + reach * (np.cos(turn) + 1j * squash * np.sin(turn)))


# -------------------------------------------------------------------------- table, light and camera


def table_top(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """A table top or wall, (H, W, 3) in 0…255."""
    chosen = rng.choice(TABLES, 2, replace=False)
    one, two = (np.array(_rgb(str(tone)), np.float32) for tone in chosen)
    rows, columns = np.ogrid[: np.float32(shape[0]), : np.float32(shape[1])]
    angle, pitch, kind = rng.uniform(0, math.pi), rng.uniform(18, 60), int(rng.integers(5))
    along = rows * math.sin(angle) + columns * math.cos(angle)
    across = rows * math.cos(angle) - columns * math.sin(angle)
    if kind == 0:  # planks
        lengthwise = bool(rng.random() < 0.5)
        grain = _noise(rng, shape, *(((90, 6), (150, 4)) if lengthwise else ((6, 90), (4, 150))))
        side = rows if lengthwise else columns
        planks = rng.normal(0, 0.15, 80).astype(np.float32)[(side // (2 * pitch)).astype(int)]
        return (
            one
            * (1 + 0.08 * grain + planks - np.float32(0.4) * (side % (2 * pitch) < 2))[..., None]
        )
    if kind == 1:  # checked or striped cloth, with its weave
        stripes = np.float32(0.5) * (np.sin(along * (math.pi / pitch)) > 0)
        checks = stripes + np.float32(rng.choice([0, 0.5, 0.5])) * (
            np.sin(across * (math.pi / pitch)) > 0
        )
        weave = 0.06 * np.sin(rows * 2.1) * np.sin(columns * 2.1)
        return (one + (two - one) * checks[..., None]) * (1 + weave)[..., None]
    if kind == 2:  # marble
        veins = np.exp(-8 * np.abs(_noise(rng, shape, (3, 4), (7, 9), (16, 20))))
        return (
            np.array([236, 234, 230], np.float32)
            - (60 * veins + 6 * _noise(rng, shape, (4, 4)))[..., None]
        )
    if kind == 3:  # stone
        chips = _noise(rng, shape, (shape[0] / 5, shape[1] / 5), (shape[0] / 2, shape[1] / 2))
        return one + (two - one) * np.clip(chips - 1, 0, 0.5)[..., None] + 5 * chips[..., None]
    fade = (along - along.min()) / float(np.ptp(along)) * rng.uniform(0.2, 1)
    return one + (two - one) * fade[..., None] + 3 * _noise(rng, shape, (6, 6))[..., None]


def room(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """A table with a room out of focus behind it, for dishes seen from the side."""
    height, width = shape
    wall = table_top(rng, (height // 6, width // 6)) * rng.uniform(0.5, 1.1)
    far = Image.fromarray(wall.clip(0, 255).astype(np.uint8))
    lamps = ImageDraw.Draw(far)
    for _ in range(rng.integers(0, 14)):
        x, y, r = rng.uniform(0, width / 6), rng.uniform(0, height / 12), rng.uniform(1, 4)
        lamps.ellipse((x - r, y - r, x + r, y + r), fill=tuple(rng.integers(120, 256, 3).tolist()))
    far = far.filter(ImageFilter.GaussianBlur(0.8))
    wall = np.asarray(far.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    edge = np.arange(height, dtype=np.float32) - height * rng.uniform(0.35, 0.68)
    near = np.clip(edge / rng.uniform(2, 12), 0, 1)[:, None, None]
    return wall + (table_top(rng, shape) - wall) * near


def _soften(field: Floats, factor: float, shape: tuple[int, int] | None = None) -> Floats:
    size = [max(2, round(side / factor)) for side in field.shape[::-1]]
    small = Image.fromarray(field).resize((size[0], size[1]), Image.Resampling.BOX)
    return np.asarray(small.resize((shape or field.shape)[::-1], Image.Resampling.BILINEAR))


def _shade(relief: Floats, slope: float, toward: complex) -> Floats:
    """Light that each place keeps, 0…1: the lamp is `toward`, `slope` px up for each px across."""
    low = _soften(relief, 2, (relief.shape[0] // 2, relief.shape[1] // 2)) / 2
    blocked = np.zeros_like(low)
    for reach in (
        2,
        4,
        7,
        11,
        15,
    ):  # whatever this far towards the lamp rises above its ray throws shade
        step = -round(reach * toward.imag), -round(reach * toward.real)
        np.maximum(blocked, np.roll(low, step, (0, 1)) - low - reach * slope, out=blocked)
    hollow = np.clip(_soften(low, 8) - low, 0, 8) / 25
    return _soften((1 - 0.7 * np.clip(blocked / 3, 0, 1)) * (1 - hollow), 1.5, relief.shape)


def _light(color: Floats, relief: Floats, rng: np.random.Generator, upright: bool) -> Floats:
    """Lambert's law, cast shadows and a little gloss, under one lamp or window."""
    toward = rect(1, rng.uniform(-2.6, -0.5) if upright else rng.uniform(0, 2 * math.pi))
    elevation, ambient = rng.uniform(0.65, 1.2), rng.uniform(0.4, 0.75)
    rough = rng.uniform(0.04, 0.2) * _noise(
        rng, relief.shape, (relief.shape[0] / 4, relief.shape[1] / 4)
    )
    slope_y, slope_x = np.gradient(_soften(relief, 2) + rough * (relief > 1))
    normal_z = 1 / np.sqrt(1 + slope_x**2 + slope_y**2)
    climb = toward.real * slope_x + toward.imag * slope_y
    facing = (math.sin(elevation) - math.cos(elevation) * climb) * normal_z
    direct = np.clip(facing / math.sin(elevation), 0, 1.4) * _shade(
        relief, math.tan(elevation) * 0.6, toward
    )
    gloss = rng.uniform(0, 70) * np.clip(facing, 0, 1) ** 24 * (normal_z < 0.97)
    return color * (ambient + (1 - ambient) * direct)[..., None] + gloss[..., None]


def photograph(c: Canvas, size: tuple[int, int], upright: bool) -> Image.Image:
    """Frame, light and expose what lies on the canvas: (width, height) px, RGB."""
    rng, (wide, tall) = c.rng, c.color.size
    inset = rng.uniform(0, 0.05, (4, 2)) * [wide, tall]
    if not upright:  # the far edge of the table shows more of it than the near one
        inset[1:3, 0] += rng.uniform(0, 0.08) * wide
    corners = np.array([[0, 0], [0, tall], [wide, tall], [wide, 0]]) + inset * [
        [1, 1],
        [1, -1],
        [-1, -1],
        [-1, 1],
    ]
    color, relief = (
        layer.transform(
            size, Image.Transform.QUAD, corners.ravel().tolist(), Image.Resampling.BILINEAR
        )
        for layer in (c.color, c.relief)
    )
    scene = _light(np.asarray(color, np.float32), np.asarray(relief) / SUPERSAMPLE, rng, upright)
    y, x = (np.linspace(-1, 1, side, dtype=np.float32) for side in size[::-1])
    corner_light = rng.uniform(0, 0.2) * (x**2 + y[:, None] ** 2) + rng.uniform(-0.15, 0.15) * x
    exposure, white = (
        rng.uniform(0.75, 1.25),
        np.exp(rng.normal(0, [0.09, 0.02, 0.13])).astype(np.float32),
    )
    contrast = rng.uniform(0.85, 1.15)
    scene *= ((1 - corner_light) * exposure * contrast)[..., None] * white
    scene += 120 * (1 - contrast) + rng.uniform(0, 18)
    scene += rng.standard_normal((size[1], size[0], 1), np.float32) * rng.uniform(0, 9)
    photo = Image.fromarray(scene.clip(0, 255).astype(np.uint8))
    blur = float(rng.choice([0, 0, 0.6, 1, 1.8, 3]))
    return photo.filter(ImageFilter.BoxBlur(blur)) if blur else photo
