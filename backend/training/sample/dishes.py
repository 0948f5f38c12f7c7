"""Ten dishes as a camera might see them, each picture fixed by its class, number and seed.

Several pairs are meant to be confused (two salads, two rice dishes, frosting and ice cream, a
burger that comes with fries), and plates, tables, light and camera vary more than the food does:
colour alone does not give a dish away.
"""

import math
from cmath import rect
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from training.sample.canvas import TABLES, Canvas, Color, photograph, room, table_top

LONG_SIDES = (512, 448, 384, 384, 352, 320)  # px; Food-101's is 512
ASPECTS = (1, 1, 4 / 3, 4 / 3, 3 / 2, 16 / 9)

CRUST, DOUGH, CREAM, CHEESE, RICE = "#cd9655", "#d6a05c", "#f6ecd4", "#f3d480", "#eedeba"
LEAF, PALE_LEAF, RED, CHOCOLATE, POTATO = "#588c34", "#acc468", "#c43022", "#543222", "#eec462"
SWEET = ["#ee96b2", "#543222", "#f6ecd4", "#fcfaf6", "#a0c478", "#d69e5c", "#96aade", "#fade78"]
BRIGHT = ["#e83c50", "#4696dc", "#fad23c", "#5abe5a", "#fafaf5", "#f08228"]
CHINA = ["#f8f7f3", "#f0ece2", "#fafafa", "#f4f6f8", "#c4d0d6", "#3e424a", "#963a3a", "#78989e"]
BUNS = ["#c47e3a", "#d6a05c", "#aa622c", "#e0b26e", "#d08c46"]
LETTUCE = [LEAF, PALE_LEAF, "#ced892", "#78a446"]


# -------------------------------------------------------------------------------------- ingredients

Piece = Callable[[Canvas, complex, float], None]


def _disc(color: Color, inner: Color, rim: float = 0.8) -> Piece:
    def draw(c: Canvas, p: complex, r: float) -> None:
        aspect, angle = c.uniform(0.65, 1), c.turn()
        c.blob(p, r, color, 0.15, aspect, angle, flat=True)
        c.blob(p, r * rim, inner, 0.04, aspect, angle, flat=True)
        c.strew(c.spread(p, r * 0.5, 6), r * 0.14, r * 0.09, (color,))

    return draw


def _chunk(
    color: Color, aspect: float = 0.8, power: float = 5.0, rise: float = 0.5, wobble: float = 0.08
) -> Piece:
    def draw(c: Canvas, p: complex, r: float) -> None:
        width = aspect * c.uniform(0.75, 1.1)
        c.blob(p, r, color, rise, width, None, wobble, power, flat=power > 3)

    return draw


def olive(c: Canvas, p: complex, r: float) -> None:
    c.blob(p, r * 0.7, c.pick(("#2c2630", "#2c2630", "#545c28")), 0.5, c.uniform(0.7, 1))
    if c.chance(0.6):
        c.blob(p, r * 0.28, "#784632", -0.4, flat=True)


def leaf(c: Canvas, p: complex, r: float, color: Color = LEAF) -> None:
    angle = c.turn()
    c.blob(p, r * 1.4, color, 0.25, 0.5, angle, wobble=0.2)
    c.line(
        [p - rect(r * 1.2, angle), p + rect(r * 1.2, angle)], c.tint(color, 1.35), r * 0.08, -0.5
    )


def romaine(c: Canvas, p: complex, r: float) -> None:
    leaf(c, p, r, c.pick(LETTUCE))


def onion(c: Canvas, p: complex, r: float) -> None:
    for size in (1.0, 0.7):
        c.ring(p, r * size, r * 0.13, c.pick(("#b05a8c", "#e2c8d8", "#963c6e")))


def shrimp(c: Canvas, p: complex, r: float) -> None:
    start, bend = c.turn(), c.pick((-0.55, 0.55))
    for i in range(7):
        bit = p + rect(r * 0.7, start + bend * i)
        c.blob(bit, r * (0.42 - 0.035 * i), ("#f09668", "#faccb2")[i % 2], 0.35)


def mussel(c: Canvas, p: complex, r: float) -> None:
    angle = c.turn()
    c.blob(p, r * 1.2, "#282a3a", 0.35, 0.55, angle)
    c.blob(p, r * 0.95, "#60647a", -0.2, 0.5, angle)
    c.blob(p, r * 0.6, "#ec8c34", 0.4, 0.5, angle, wobble=0.15)


def lemon(c: Canvas, p: complex, r: float) -> None:
    rind = c.pick(("#f6d646", "#f6d646", "#8cb43c"))
    c.blob(p, r, rind, 0.35, flat=True)
    c.blob(p, r * 0.86, "#faf4ce", 0, flat=True)
    for angle in np.arange(8) * math.pi / 4:
        c.blob(p + rect(r * 0.47, angle), r * 0.33, rind, 0.1, 0.6, angle)


def mushroom(c: Canvas, p: complex, r: float) -> None:
    c.blob(p, r * 0.9, "#ceb496", 0.2, 0.6, wobble=0.14, flat=True)
    c.blob(p, r * 0.6, "#e8d6bc", 0.05, 0.6, wobble=0.14, flat=True)


def egg(c: Canvas, p: complex, r: float) -> None:
    c.blob(p, r, "#faf8f0", 0.12, wobble=0.12)
    c.blob(p + r * 0.1, r * 0.42, "#f8b82c", 0.4)


def fry(c: Canvas, p: complex, r: float, angle: float | None = None) -> None:
    angle, length = c.turn() if angle is None else angle, r * c.uniform(0.7, 1.15)
    gold, width = c.pick((POTATO, "#e2ac4a", "#f6d684")), c.uniform(0.09, 0.13)
    c.blob(p, length, gold, 0.12, width, angle, 0.01, 8, flat=True)
    c.blob(p + rect(length * c.pick((-0.86, 0.86)), angle), length * 0.1, "#be7a2e", 0.05)


def cutlery(c: Canvas, p: complex, r: float, angle: float) -> None:
    steel, fork = c.pick(("#bec0c6", "#787a80", "#ceb06e")), c.chance(0.5)
    c.blob(p, r, steel, 0.04, 0.045, angle, 0, 6)
    if not fork:
        return c.blob(p + rect(1.1 * r, angle), r * 0.25, steel, 0.2, 0.6, angle, 0)
    for side in (-0.09, -0.03, 0.03, 0.09):
        c.blob(p + rect(r, angle) * (1.1 + 1j * side), r * 0.22, steel, 0.1, 0.08, angle, 0, 6)


TOMATO, PEPPERONI = _disc("#ce3424", "#e46046"), _disc("#96281c", "#be3e2c", 0.86)
CUCUMBER, CROUTON = _disc("#467a36", "#ccdea0", 0.88), _chunk("#ce984e")
FETA, HAM, CARROT = _chunk("#faf8f0"), _chunk("#e8968c"), _chunk("#ec822c")
PARMESAN, CHICKEN = _chunk("#f8ecc4", 0.35, 2.5, 0.12, 0.15), _chunk("#e2b882", 0.4, 4, 0.4)
RED_PEPPER, GREEN_PEPPER = _chunk("#ce2c1e", 0.22, 4), _chunk("#54963c", 0.22, 4)
PEA, SCRAMBLED = _chunk("#70a83c", 1, 2, 0.8), _chunk("#fad660", 0.7, 2, 0.4, 0.25)
TOPPINGS = [PEPPERONI, PEPPERONI, TOMATO, mushroom, olive, leaf, GREEN_PEPPER, HAM, shrimp, onion]


def _mix(c: Canvas, p: complex, r: float, count: int, size: float, pieces: Sequence[Piece]) -> None:
    for spot in c.spread(p, r, count):
        c.pick(pieces)(c, spot, r * size * c.uniform(0.75, 1.25))


# ----------------------------------------------------------------------------- what stands below it


def _vessel(c: Canvas, p: complex, r: float, kinds: str) -> None:
    """Something to serve on, seen from above, with room for food of radius `r`."""
    kind, color, angle = c.pick(kinds.split()), c.pick(CHINA), c.uniform(-0.5, 0.5)
    accent = c.pick((color, color, *CHINA, "#3c5a96", "#aa3c32"))
    if kind in ("plate", "square", "oval"):
        aspect, power = {"plate": (1, 2), "square": (1, 6), "oval": (0.75, 2)}[kind]
        for size, tone, rise in ((1, accent, 0.07), (0.97, color, 0), (0.72, color, -0.05)):
            c.blob(p, r * 1.45 * size, tone, rise, aspect, angle, 0, power, flat=True)
    elif kind == "bowl":
        c.blob(p, r * 1.22, accent, 0.3, wobble=0, flat=True)
        c.blob(p, r * 1.16, color, -0.2, wobble=0)
    elif kind == "pan":
        for side in (-1.25, 1.25):
            c.blob(p + rect(r * side, angle), r * 0.25, "#2c2c30", 0.4, 0.5, angle + 1.57, 0, 4)
        c.blob(p, r * 1.22, "#3c3a3c", 0.3, wobble=0, flat=True)
        c.blob(p, r * 1.16, c.pick(("#2c2c30", "#46423f", "#78746f")), -0.2, wobble=0)
    elif kind == "board":
        c.blob(p, r * 1.35, c.pick(TABLES[:3]), 0.08, 0.9, angle, 0, c.pick((2, 7)), flat=True)
    elif kind == "paper":
        c.blob(p, r * 1.4, c.pick(("#f4f0e6", "#ceb088")), 0.03, 1, angle, 0.03, 9, flat=True)


def _stand(c: Canvas, p: complex, r: float) -> None:
    """The same seen from the side: a flat ellipse, and the dark touch where the food meets it."""
    kind, squash = c.pick(("plate", "board", "none")), c.uniform(0.2, 0.34)
    if kind != "none":
        color, power = (c.pick(CHINA), 2) if kind == "plate" else (c.pick(TABLES[:3]), 5)
        c.blob(p, r * 1.75, color, 0.05, squash, 0, 0, power, flat=True)
        c.blob(p, r * 1.3, color, -0.03, squash, 0, 0, flat=True)
    below = c.seen(p)
    c.blob(p, r * 1.08, c.tint(below, 0.55), 0, squash * 0.8, 0, 0, flat=True)


def _clutter(c: Canvas, p: complex, r: float) -> None:
    """What else is on the table, often cut off by the frame: never needed to name the dish."""
    for kind in c.rng.integers(0, 6, c.count(0, 4)):
        turn = c.turn()
        spot = p + rect(r * c.uniform(1.5, 2.1), turn)
        if kind == 0:
            cutlery(c, spot, r * 0.8, turn + 1.57 + c.normal(0, 0.3))
        elif kind == 1:  # a drink
            c.blob(spot, r * 0.42, "#d6e2e8", 0.8, wobble=0, flat=True)
            c.blob(
                spot, r * 0.37, c.pick(("#5a2814", "#ecaa3c", "#bed2dc", "#781428")), -0.3, wobble=0
            )
        elif kind == 2:  # a napkin
            c.blob(spot, r * 0.8, c.pick(CHINA + BRIGHT), 0.03, wobble=0.03, power=9, flat=True)
        elif kind == 3:  # somebody else's plate
            size = r * c.uniform(0.3, 0.8)
            _vessel(c, spot, size, "plate bowl")
            c.blob(spot, size * 0.8, c.pick((RED, LEAF, CREAM, CHOCOLATE, DOUGH)), 0.1, wobble=0.1)
        else:
            c.strew(c.spread(spot, r * 0.7, 25), r * 0.03, r * 0.02, (CRUST, LEAF, CREAM))


# ------------------------------------------------------------------------------------------- dishes


def pizza(c: Canvas, p: complex, r: float) -> None:
    _vessel(c, p, r, "plate board pan paper none")
    bare, turn = (c.color.copy(), c.relief.copy()), c.turn()
    c.blob(p, r, CRUST, 0.1, wobble=0.03, flat=True)
    for angle in c.uniform(0, 6.3, 26):  # puffed and charred in places
        baked = c.pick((CRUST, "#a06230", "#deb06e"))
        c.blob(p + rect(r * 0.92, angle), r * 0.07, baked, 0.3, wobble=0.2)
    c.blob(p, r * 0.86, c.pick((RED, "#ce5428", CREAM)), 0, wobble=0.03, flat=True, base=0.06 * r)
    for spot in c.spread(p, r * 0.74, c.count(25, 70)):
        molten = c.pick((CHEESE, CREAM, "#f0be60"))
        c.blob(spot, r * c.uniform(0.05, 0.16), molten, 0.15, wobble=0.25)
    chosen = [c.pick(TOPPINGS) for _ in range(c.pick((1, 2, 3)))]
    _mix(c, p, r * 0.76, c.count(8, 26), c.uniform(0.11, 0.17), chosen)
    for cut in turn + np.arange(c.pick((0, 3, 4))) * math.pi / 4:
        c.line([p - rect(r, cut), p + rect(r, cut)], "#966030", r * 0.02, -2)
    if c.chance(0.4):  # slices are missing, or one slice is all there is
        gone, start = Image.new("L", c.color.size), math.degrees(turn)
        box = (p.real - 2 * r, p.imag - 2 * r, p.real + 2 * r, p.imag + 2 * r)
        ImageDraw.Draw(gone).pieslice(box, start, start + c.pick((45, 90, 135, 270)), fill=255)
        c.color.paste(bare[0], mask=gone)
        c.relief.paste(bare[1], mask=gone)


def _donut(c: Canvas, p: complex, r: float) -> None:
    floor, below = c.ground(p), c.seen(p)
    glaze, dough, inner = c.tint(c.pick((*SWEET, DOUGH))), c.tint(DOUGH), c.uniform(0.2, 0.36)
    angle, aspect = c.turn(), c.uniform(0.9, 1)
    edges = c.outline(0, r, aspect, angle, 0.015, 2), c.outline(0, r, aspect, angle, 0.04, 2)
    for t in np.linspace(0, 0.95, 28):  # a ring climbs, and falls again on the way to its hole
        glazed = 0.12 < t < 0.85
        height = floor + r * 0.45 * math.sin(math.pi * (0.08 + 0.9 * t))
        points = p + edges[int(glazed)] * (1 - t * (1 - inner))
        c.mound(points, glaze if glazed else dough, 0, flat=True, base=height)
    c.blob(p, r * inner, c.tint(below, 0.6), 0, wobble=0, flat=True, base=floor)
    around = c.spread(p, r * 0.85, 80)
    around = around[np.abs(around - p) > r * (inner + 0.15)]
    style = c.pick(("sprinkles", "nuts", "drizzle", "plain"))
    if style == "sprinkles":
        c.strew(around, r * 0.13, r * 0.045, BRIGHT)
    elif style == "nuts":
        c.strew(around, r * 0.06, r * 0.05, ("#faf8f4", "#b47846"))
    elif style == "drizzle":
        tone = c.pick((CHOCOLATE, CREAM, SWEET[0]))
        for k in np.linspace(-0.7, 0.7, 8):
            for side in (-1, 1):
                reach = side * math.sqrt(0.85 - k * k) * r
                ends = [complex(r * k, reach * t) for t in (0.95, 0.55)]
                c.line([p + end * rect(1, angle) for end in ends], tone, r * 0.07, 0.3)


def donuts(c: Canvas, p: complex, r: float) -> None:
    _vessel(c, p, r, "plate square oval board paper none")
    count = c.pick((1, 1, 2, 3, 4, 5))
    for spot in c.spread(p, r * 0.8, count) if count > 1 else (p,):
        _donut(c, spot, r * (1.05 / math.sqrt(count) if count > 1 else 0.9))


def fries_heap(c: Canvas, p: complex, r: float) -> None:
    _vessel(c, p, r, "plate square bowl board paper oval")
    for spot in c.spread(p, r * 0.6, c.count(40, 90)):
        fry(c, spot, r * 0.5)
    if c.chance(0.5):
        dip = p + rect(r, c.turn())
        c.blob(dip, r * 0.34, c.pick(CHINA), 0.5, wobble=0, flat=True)
        c.blob(dip, r * 0.28, c.pick((RED, CREAM, CHOCOLATE)), -0.2)
    c.strew(c.spread(p, r * 0.7, 30), r * 0.03, r * 0.02, (c.pick((LEAF, CREAM)),))


def fries_carton(c: Canvas, p: complex, r: float) -> None:
    _stand(c, p + 1j * r, r * 0.7)
    for x in c.rng.permutation(np.linspace(-0.55, 0.55, c.count(22, 40))):
        spot = p + r * complex(x, c.uniform(-0.45, -0.15))
        fry(c, spot, r * 0.62, x * 0.6 + c.normal(-1.57, 0.12))
    foot, dip = c.uniform(0.35, 0.5), c.uniform(-0.1, 0.2)
    front = np.array([-0.66 - 0.1j, 1j * dip, 0.66 - 0.1j, foot + 1j, -foot + 1j]) * r + p
    paper = c.tint(c.pick((RED, "#f6f2e8", "#c4a070", "#3c3c42", "#f0c43c")))
    c.mound(front, paper, r * 0.2, flat=False, base=r * 0.15)
    for x in np.linspace(-0.8, 0.8, 5) if c.chance(0.5) else ():
        ends = complex(x * 0.66, 0.05 + dip * (1 - abs(x))), complex(x * foot, 0.97)
        c.line([p + r * end for end in ends], c.pick((RED, CREAM)), r * 0.08, 0)


def _rice(c: Canvas, p: complex, r: float, tone: Color) -> None:
    c.blob(p, r * 0.95, c.tint(tone, 0.85), 0.25, wobble=0.05)
    shades = tone, c.tint(tone, 1.08), c.tint(tone, 0.92)
    c.strew(c.spread(p, r * 0.9, 600), r * 0.09, r * 0.036, shades)


def fried_rice(c: Canvas, p: complex, r: float) -> None:
    _vessel(c, p, r, "pan pan bowl plate square oval")
    _rice(c, p, r, c.pick((RICE, "#deba80", "#cea060", "#f0ce78", "#e2a03e")))
    extras = PEA, CARROT, HAM, CHICKEN, shrimp, RED_PEPPER, mushroom, SCRAMBLED
    chosen = [c.pick(extras) for _ in range(4)]
    _mix(c, p, r * 0.8, c.count(35, 80), c.uniform(0.05, 0.09), (SCRAMBLED, *chosen))
    c.strew(c.spread(p, r * 0.8, 150), r * 0.09, r * 0.036, (RICE, "#deba80"))
    c.strew(c.spread(p, r * 0.7, 40), r * 0.06, r * 0.04, (LEAF, "#84b45a"))
    if c.chance(0.25):
        egg(c, p, r * 0.45)
    if c.chance(0.2):
        lemon(c, p + r * 0.7, r * 0.2)


def paella(c: Canvas, p: complex, r: float) -> None:
    _vessel(c, p, r, "pan pan plate square bowl oval")
    _rice(c, p, r, c.pick(("#eeba46", "#e2a03e", "#deba80", "#ce965a")))
    extras = [c.pick((PEA, RED_PEPPER, CHICKEN, GREEN_PEPPER)) for _ in range(3)]
    _mix(c, p, r * 0.8, c.count(15, 40), 0.07, extras)
    _mix(c, p, r * 0.75, c.count(3, 11), 0.14, (shrimp, c.pick((shrimp, mussel, CHICKEN))))
    for spot in c.spread(p, r * 0.85, c.count(0, 5)):
        lemon(c, spot, r * 0.18)
    c.strew(c.spread(p, r * 0.8, 30), r * 0.05, r * 0.03, (LEAF,))


def _salad(c: Canvas, p: complex, r: float, leaves: int, pieces: Sequence[Piece]) -> None:
    _vessel(c, p, r, "bowl bowl plate square oval board")
    for spot in c.spread(p, r * 0.75, leaves):
        romaine(c, spot, r * c.uniform(0.2, 0.34))
    _mix(c, p, r * 0.75, c.count(25, 50), c.uniform(0.1, 0.16), pieces)


def caesar_salad(c: Canvas, p: complex, r: float) -> None:
    extras = [c.pick((CHICKEN, TOMATO, CUCUMBER, romaine, onion, olive)) for _ in range(3)]
    _salad(c, p, r, c.count(25, 45), (CROUTON, PARMESAN, CROUTON, PARMESAN, romaine, *extras))
    c.strew(c.spread(p, r * 0.7, c.count(20, 150)), r * 0.05, r * 0.02, (CREAM, "#faf4e2"))


def greek_salad(c: Canvas, p: complex, r: float) -> None:
    extras = [c.pick((onion, GREEN_PEPPER, CHICKEN, romaine, romaine, CROUTON)) for _ in range(3)]
    _salad(c, p, r, c.count(6, 35), (FETA, CUCUMBER, TOMATO, olive, *extras))
    c.strew(c.spread(p, r * 0.7, 50), r * 0.03, r * 0.015, (LEAF, "#3c5a28"))


def _swirl(c: Canvas, p: complex, r: float, color: Color) -> complex:
    """Pipe tiers seen from the side, widest at `p`; returns the tip."""
    for t in np.linspace(0, 1, c.count(3, 6)):
        size = r * (1 - 0.75 * t)
        lean, place = c.normal(-0.1, 0.05), p + c.normal(0, r * 0.03)
        c.blob(place, size, color, 0.5, 0.42, lean, 0.03, base=r * 0.2)
        p -= 0.5j * size
    return p


def _topping(c: Canvas, p: complex, r: float) -> None:
    """Sweet things that fit frosting and ice cream alike."""
    if c.chance(0.5):
        c.strew(
            c.spread(p, r * 0.7, 40), r * 0.13, r * 0.045, c.pick((BRIGHT, (CHOCOLATE,), SWEET[:3]))
        )
    if c.chance(0.35):
        c.blob(p - 0.2j * r, r * 0.2, c.pick(("#be1428", "#3c468c", RED)), 0.9)
    if c.chance(0.2):
        c.blob(p + r * (0.4 - 0.4j), r * 0.5, DOUGH, 0.1, 0.22, -1.0, 0, 6, flat=True)


def _scoop(c: Canvas, p: complex, r: float, color: Color) -> None:
    for spot in c.spread(p + 0.55j * r, r * 0.7, 8, 0.25):  # the ragged skirt that the spoon leaves
        c.blob(spot, r * 0.24, color, 0.4, 0.6, 0, 0.15)
    c.blob(p, r, color, 0.8, 0.92, wobble=0.03)
    speck = c.tint(color, c.pick((0.5, 0.85, 1.15)))
    c.strew(c.spread(p, r * 0.8, 40), r * 0.06, r * 0.035, (speck, color), 0.5)


def _cup_cake(c: Canvas, p: complex, r: float) -> None:
    wrapper, frosting = c.pick(SWEET + BRIGHT), c.pick(SWEET)
    cup = np.array([-0.62 + 0.1j, 0.62 + 0.1j, 0.44 + 1j, -0.44 + 1j]) * r + p
    c.mound(cup, c.tint(wrapper), r * 0.3, flat=False)
    for x in np.linspace(-0.9, 0.9, 11):  # the pleats
        ends = complex(x * 0.6, 0.16), complex(x * 0.43, 0.97)
        c.line([p + r * end for end in ends], c.tint(wrapper, 0.8), r * 0.025, 0.4)
    c.blob(p + 0.08j * r, r * 0.66, c.pick((DOUGH, CHOCOLATE, CREAM)), 0.4, 0.35, 0)
    if c.chance(0.3):
        c.blob(p - 0.05j * r, r * 0.68, frosting, 0.6, 0.62, 0)
        return _topping(c, p - 0.15j * r, r * 0.6)
    tip = _swirl(c, p, r * 0.7, frosting)
    _topping(c, (p + tip) / 2, r * 0.6)


def cup_cakes_side(c: Canvas, p: complex, r: float) -> None:
    count = c.pick((1, 1, 2, 3))
    size = r / (1, 1.4, 1.75)[count - 1]
    _stand(c, p + 0.95j * size, r * (0.6 if count == 1 else 0.95))
    for k in range(count):
        _cup_cake(c, p + (k - (count - 1) / 2) * size * 1.35, size)


def cup_cakes_above(c: Canvas, p: complex, r: float) -> None:
    _vessel(c, p, r, "plate square board none paper")
    count = c.pick((1, 2, 3, 4, 6))
    size, turn = r * (0.8, 0.65, 0.55, 0.48, 0, 0.39)[count - 1], np.linspace(0, 2 * np.pi, 96)
    for spot in c.spread(p, r * 0.85, count) if count > 1 else (p,):
        pleats = size * (1 + 0.04 * np.cos(24 * turn)) * np.exp(1j * turn)
        c.mound(spot + pleats, c.tint(c.pick(SWEET + BRIGHT)), size * 0.3, flat=True)
        frosting = c.pick(SWEET)
        for t in np.linspace(0, 1, c.count(18, 30)):  # a rope of frosting wound to the middle
            rope = spot + rect(size * 0.68 * (1 - t), 15 * t**0.8)
            c.blob(rope, size * 0.27, frosting, 0.25 + t, base=size * (0.3 + 0.3 * t))
        _topping(c, spot, size * 0.8)


def ice_cream_cone(c: Canvas, p: complex, r: float) -> None:
    wafer, scoops = c.tint(DOUGH), c.pick((1, 1, 2, 2, 3))
    size = r * (0.52, 0.46, 0.4)[scoops - 1]
    cone = np.array([-0.9, 0.9, 0.1 + 2.5j, -0.1 + 2.5j]) * size + p + 0.05j * r
    c.mound(cone, wafer, size * 0.5, flat=False)
    for k in np.linspace(0, 0.75, 6):  # the lattice
        for a, b in ((0, 1), (1, 0)):
            start = cone[a] * (1 - k) + cone[3 - a] * k
            end = cone[b] * (0.75 - k) + cone[3 - b] * (0.25 + k)
            c.line([start, end], c.tint(wafer, 0.75), size * 0.05, -0.5)
    if c.chance(0.3):
        return _topping(c, (p + _swirl(c, p, size * 1.1, c.pick(SWEET))) / 2, size)
    for k in range(scoops):
        top = p - 1j * size * (0.45 + 1.15 * k) + c.normal(0, size * 0.1)
        _scoop(c, top, size, c.pick(SWEET))
    _topping(c, top, size)


def ice_cream_cup(c: Canvas, p: complex, r: float) -> None:
    _stand(c, p + 0.95j * r, r * 0.5)
    color, depth = c.pick(("#e2eaee", *CHINA, *SWEET)), c.pick((0.6, 0.95))
    if depth == 0.6:  # a stemmed glass
        c.blob(p + 0.92j * r, r * 0.45, color, 0.2, 0.2, 0, 0)
        c.blob(p + 0.7j * r, r * 0.28, color, 0.3, 0.2, 1.57, 0, 6)
    for spot in c.spread(p - 0.1j * r, r * 0.42, c.pick((1, 2, 3)), 0.5):
        _scoop(c, spot, r * 0.45, c.pick(SWEET))
    side = np.array([0.8 + 0.08j, 0.72 + 0.36j * depth, 0.55 + 0.72j * depth, 0.3 + 1j * depth])
    bowl = np.concatenate([side, -side[::-1].conj()]) * r + p
    c.mound(bowl, c.tint(color), r * 0.35, flat=False, base=r * 0.2)
    _topping(c, p - 0.3j * r, r * 0.5)


def ice_cream_bowl(c: Canvas, p: complex, r: float) -> None:
    _vessel(c, p, r * 0.85, "bowl bowl plate square")
    count = c.pick((1, 2, 3))
    for spot in c.spread(p, r * 0.5, count):
        _scoop(c, spot, r * (0.6, 0.5, 0.44)[count - 1], c.pick(SWEET))
        _topping(c, spot, r * 0.4)


def _bun(c: Canvas, p: complex, r: float, aspect: float, color: Color) -> None:
    c.blob(p, r, color, 0.55, aspect, 0, 0.02, 2.3)
    if c.chance(0.75):
        seeds = c.spread(p - 0.1j * r * aspect, r * 0.75, 40, aspect * 0.8)
        c.strew(seeds, r * 0.055, r * 0.04, (CREAM, "#ecd2a0"))


def _burger_layer(c: Canvas, p: complex, r: float, layer: str) -> None:
    if layer == "patty":
        c.blob(p, r * 0.84, c.pick(("#5c3824", "#7a4a2c")), 0.3, 0.17, 0, 0.04, 4)
        c.strew(c.spread(p, r * 0.75, 40, 0.12), r * 0.05, r * 0.03, ("#462a1c", "#8c5a38"))
    elif layer == "lettuce":
        for x in np.linspace(-0.82, 0.82, 14):
            spot = p + r * complex(x, c.normal(0.02, 0.03))
            c.blob(spot, r * 0.14, c.pick(LETTUCE), 0.5, 0.7, wobble=0.2)
    elif layer == "cheese":
        edge = np.array([-0.84, 0.84, 0.84 + 0.1j, 0.25 + 0.24j, 0.1j, -0.4 + 0.22j, -0.84 + 0.1j])
        c.mound((edge - 0.05j) * r + p, c.tint("#f6b232"), r * 0.12, flat=False)
    else:
        for x in (-0.45, 0.4):
            slice_of = {"tomato": "#cc3828", "onion": "#e2c8d8"}
            c.blob(p + x * r, r * 0.42, slice_of[layer], 0.3, 0.16, 0, power=4)


def burger_side(c: Canvas, p: complex, r: float) -> None:
    _stand(c, p + 0.62j * r, r * 0.85)
    if c.chance(0.4):
        for spot in c.spread(p + r * (c.pick((-1.1, 1.1)) + 0.55j), r * 0.45, 14, 0.4):
            fry(c, spot, r * 0.4)
    bun, level = c.pick((*BUNS, "#463430")), p + 0.5j * r
    c.blob(level, r * 0.8, bun, 0.3, 0.2, 0, 0.02, 4)
    more = c.rng.permutation(["lettuce", "cheese", "tomato", "onion", "patty"])[: c.count(1, 6)]
    for layer in ("patty", *more):
        level -= 0.15j * r
        _burger_layer(c, level, r, layer)
    _bun(c, level - 0.26j * r, r * 0.86, 0.48, bun)


def burger_above(c: Canvas, p: complex, r: float) -> None:
    _vessel(c, p, r, "plate square board paper oval")
    if c.chance(0.6):
        for spot in c.spread(p + rect(r * 0.75, c.turn()), r * 0.4, c.count(12, 40)):
            fry(c, spot, r * 0.42)
    for angle in c.uniform(0, 6.3, 16):
        c.pick((romaine, romaine, TOMATO, onion, PARMESAN))(c, p + rect(r * 0.6, angle), r * 0.17)
    c.blob(p, r * 0.68, "#643e28", 0.2, flat=True)
    _bun(c, p - r * (0.03 + 0.06j), r * 0.64, 0.95, c.pick(BUNS))


FROM_THE_SIDE = {burger_side, cup_cakes_side, fries_carton, ice_cream_cone, ice_cream_cup}
DISHES: dict[str, tuple[Piece, ...]] = {
    "caesar_salad": (caesar_salad,), "cup_cakes": (cup_cakes_side, cup_cakes_above),
    "donuts": (donuts,), "french_fries": (fries_heap, fries_carton), "fried_rice": (fried_rice,),
    "greek_salad": (greek_salad,), "hamburger": (burger_side, burger_above),
    "ice_cream": (ice_cream_cone, ice_cream_cup, ice_cream_bowl),
    "paella": (paella,), "pizza": (pizza,),
}  # fmt: skip
SAMPLE_CLASSES: tuple[str, ...] = tuple(DISHES)


# ----------------------------------------------------------------------------------------- pictures


def draw_dish(name: str, seed: int, index: int) -> tuple[Image.Image, int]:
    """One picture of a class, and its JPEG quality: the same for the same three arguments."""
    rng = np.random.default_rng([seed, SAMPLE_CLASSES.index(name), index])
    long_side = int(rng.choice(LONG_SIDES))
    size = long_side, round(long_side / float(rng.choice(ASPECTS)))
    size = size if rng.random() < 0.65 else size[::-1]
    draw = DISHES[name][int(rng.integers(len(DISHES[name])))]
    upright = draw in FROM_THE_SIDE
    tilt = 1 if upright else rng.uniform(1, 1.5)  # a lower camera sees circles as ellipses
    shape = round(size[1] * tilt), size[0]
    c = Canvas(room(rng, shape) if upright else table_top(rng, shape), rng)
    wide, tall = c.color.size
    r = min(wide, tall) * rng.uniform(0.2, 0.48) * (0.85 if upright else 1)
    p = complex(wide * rng.uniform(0.33, 0.67), tall * rng.uniform(0.36, 0.64))
    if not upright or rng.random() < 0.3:
        _clutter(c, p, r * 1.1)
    draw(c, p, r)
    return photograph(c, size, upright), int(rng.integers(35, 96))
