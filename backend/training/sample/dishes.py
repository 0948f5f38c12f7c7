"""What is on the plates: a dish is rows of pieces in a vessel, and a piece is a pile of blobs.

Some dishes are meant to be confused: two salads, two kinds of rice, frosting and ice cream.
"""

from cmath import rect
from typing import NamedTuple


class Blob(NamedTuple):
    """One layer of a piece, in radii of the piece; a place is x + yj, with y downwards."""

    size: float
    colors: str  # one is picked; "" is the last one again, "floor" what the dish lies on
    rise: float = 0.5  # up to 0.2 a flat slab, above it a dome, below 0 a hollow
    aspect: float = 1.0
    corners: float = 2.0  # 2 is an ellipse, 8 nearly a rectangle
    at: complex = 0
    taper: float = 0.0  # how much narrower it gets downwards


class Row(NamedTuple):
    """Pieces spread over a dish, in radii of the dish; one picture has `kinds` of those named."""

    pieces: str
    kinds: int
    fewest: int
    most: int
    size: float
    reach: float = 0.75


class View(NamedTuple):
    vessels: str
    rows: list[Row]
    upright: bool = False  # seen from the side


def one(pieces: str, size: float) -> Row:
    return Row(pieces, 1, 1, 1, size)


def scatter(count: int, colors: str, size: float, reach: float, at: complex = 0) -> list[Blob]:
    spots = [rect(reach * ((k + 0.5) / count) ** 0.5, 2.4 * k) for k in range(count)]
    return [Blob(size, colors, 0.5, 0.5, at=at + spot) for spot in spots]


def swirl(top: float, *sizes: float) -> list[Blob]:
    """Tiers of frosting or soft ice, from the lowest up."""
    heights = [top + 0.5 * sum(sizes[:k]) for k in range(len(sizes))]
    tiers = [Blob(s, "", 0.5, 0.45, at=-1j * h) for s, h in zip(sizes, heights, strict=True)]
    return [tiers[0]._replace(colors=SWEET), *tiers[1:]]


def burger(bun: str, *fillings: str) -> list[Blob]:
    bottom, top = -0.15j, -0.5j - 0.14j * len(fillings)
    places = [-0.32j - 0.14j * k for k in range(len(fillings))]
    layers = [Blob(0.87, c, 0.3, 0.14, 3.5, at) for c, at in zip(fillings, places, strict=True)]
    buns = Blob(0.8, bun, 0.3, 0.2, 3, bottom), Blob(0.86, bun, 0.5, 0.48, 2.3, top)
    return [buns[0], *layers, buns[1], *scatter(12, "cornsilk", 0.05, 0.5, top)]


# fmt: off
WOOD = "sienna saddlebrown burlywood peru"
CHINA = "white whitesmoke linen seashell ivory lightsteelblue #3e424a cadetblue indianred"
TABLES = f"{WOOD} linen gainsboro dimgray darkslategray cadetblue firebrick steelblue darkkhaki"
SWEET = "lightpink #ee96b2 #543222 #7a4a2c oldlace ivory #a0c478 tan lightsteelblue khaki plum"
BRIGHT = "crimson dodgerblue gold limegreen white darkorange"
CRUST, POTATO, MEAT = "#d6a05c #cd9655 peru", "#eec462 #e2ac4a #f6d684", "#5c3824 #7a4a2c"
LETTUCE, FILLING = "#588c34 #acc468 #ced892", "#588c34 #f6b232 #cc3828 #e2c8d8"
DARK = "#2c2c30"

RING = [Blob(1, CRUST, 0.35), Blob(0.92, SWEET, 0.3)]
HOLE = [Blob(0.4, "#b98447", -0.1), Blob(0.32, "floor", -0.2)]
CUP = Blob(0.55, f"{SWEET} {BRIGHT}", 0.1, 0.75, 8, -0.4j, 0.18)
MUFFIN = [CUP, Blob(0.64, MEAT, 0.3, 0.35, at=-0.82j)]
CAKE = [*MUFFIN, *swirl(0.95, 0.7, 0.5, 0.3)]
SPRINKLES = scatter(20, BRIGHT, 0.06, 0.4, -1j)
CONE, BALL = Blob(0.3, CRUST, 0.1, 2.2, 8, -0.66j, 0.9), Blob(0.55, SWEET, 0.7, 0.92, at=-1.6j)

PIECES: dict[str, list[Blob]] = {
    # ingredients
    "pea": [Blob(0.8, "#70a83c", 0.7)], "carrot": [Blob(0.8, "darkorange", 0.4, 0.9, 6)],
    "ham": [Blob(0.9, "#e8968c", 0.15, 0.8, 5)], "parmesan": [Blob(1, "cornsilk", 0.1, 0.35)],
    "feta": [Blob(0.9, "ivory white", 0.4, 0.8, 6)], "crouton": [Blob(0.9, CRUST, 0.4, 0.85, 6)],
    "cheese": [Blob(1, "#f3d480 #f0be60 ivory", 0.1)], "chicken": [Blob(1.2, "tan", 0.4, 0.5)],
    "pepper": [Blob(1.2, "red forestgreen", 0.25, 0.25)], "fry": [Blob(1, POTATO, 0.08, 0.1, 8)],
    "tomato": [Blob(1, "firebrick", 0.15), Blob(0.8, "tomato coral", 0.03)],
    "cucumber": [Blob(1, "darkgreen seagreen", 0.15), Blob(0.85, "#ccdea0", 0.03)],
    "pepperoni": [Blob(1, "brown maroon", 0.1), Blob(0.85, "firebrick indianred", 0.03)],
    "mushroom": [Blob(0.9, "tan", 0.15, 0.6), Blob(0.65, "antiquewhite", 0.03, 0.6)],
    "olive": [Blob(0.65, "#2c2630 #545c28", 0.5, 0.85), Blob(0.25, "sienna", -0.3)],
    "leaf": [Blob(1.5, LETTUCE, 0.25, 0.5), Blob(1.3, "#dbe6b0", 0.04, 0.06)],
    "onion": [Blob(size, "#b05a8c thistle", 0.04) for size in (1, 0.8, 0.6, 0.4)],
    "shrimp": [Blob(0.44 - 0.04 * k, "coral #faccb2", at=rect(0.65, 0.6 * k)) for k in range(6)],
    "mussel": [Blob(1.2, DARK, 0.3, 0.6), Blob(1, "gray", -0.2, 0.5), Blob(0.6, "coral", 0.4, 0.5)],
    "lemon": [Blob(1, "gold", 0.2), Blob(0.86, "ivory", 0.02), *scatter(6, "khaki", 0.3, 0.7)],
    "egg": [Blob(1, "ivory", 0.03), Blob(0.45, "orange", 0.4)], "grain": [Blob(1, "", 0.4, 0.4)],
    "rice": [Blob(1, "#eedeba #deba80 #cea060 #f0ce78", 0.25)],
    "yellow_rice": [Blob(1, "#eeba46 #e2a03e #deba80", 0.25)],
    "crust": [Blob(0.08, f"{CRUST} #a06230", at=rect(0.93, k)) for k in range(30)],
    "pizza": [Blob(1, CRUST, 0.08), Blob(0.86, "firebrick #ce5428 ivory", 0.02)],
    "missing_slice": [Blob(0.3, "floor", 0, 1.8, 9, 0.53j, -1)],
    # sweets and burgers; those seen from the side stand on the height 0
    "donut": RING + HOLE, "sprinkled_donut": [*RING, *scatter(40, BRIGHT, 0.07, 0.85), *HOLE],
    "scoop": [Blob(1, SWEET, 0.7)], "upright_scoop": [Blob(0.45, SWEET, 0.7, at=-1.1j)],
    "speckled_scoop": [Blob(1, SWEET, 0.7), *scatter(25, "#543222 ivory", 0.06, 0.7)],
    "cup_cake": CAKE, "cherry_cup_cake": [*CAKE, Blob(0.18, "#be1428 #3c468c", 0.9, at=-1.75j)],
    "high_cup_cake": [*MUFFIN, *swirl(0.95, 0.7, 0.6, 0.45, 0.3, 0.15)],
    "flat_cup_cake": [*MUFFIN, Blob(0.68, SWEET, 0.6, 0.6, at=-0.9j), *SPRINKLES],
    "cone": [CONE, BALL], "double_cone": [CONE, BALL, Blob(0.5, SWEET, 0.7, at=-2.2j)],
    "soft_ice": [CONE, *swirl(1.4, 0.62, 0.5, 0.36, 0.22)],
    "burger": burger("#c98a45", MEAT, LETTUCE, FILLING),
    "dark_burger": burger("#463430", MEAT, FILLING, MEAT, FILLING),
    "lettuce": scatter(20, f"{LETTUCE} firebrick", 0.3, 1.15),
    "bun": [Blob(0.95, CRUST), *scatter(30, "cornsilk", 0.06, 0.7)],
    "upright_fry": [Blob(0.06, POTATO, 0.08, 9, 8, -0.9j)],
    # what they are served in, and what else is on the table
    "plate": [Blob(1.45, CHINA, 0.06), Blob(1.4, CHINA, 0.02), Blob(1.02, "", -0.04)],
    "square": [Blob(1.45, CHINA, 0.06, 1, 6), Blob(1.02, "", -0.04, 1, 6)],
    "bowl": [Blob(1.25, CHINA, 0.2), Blob(1.17, CHINA, -0.2)],
    "pan": [Blob(1.6, DARK, 0.1, 0.15, 8), Blob(1.25, DARK, 0.2), Blob(1.17, f"{DARK} gray", -0.2)],
    "board": [Blob(1.45, WOOD, 0.1, 0.85, 7)], "paper": [Blob(1.4, "#f4f0e6 #ceb088", 0.02, 1, 9)],
    "stand": [Blob(1.3, CHINA, 0.03, 0.25), Blob(0.9, "", 0, 0.25)],
    "tray": [Blob(1.4, WOOD, 0.06, 0.22, 6)], "none": [],
    "carton": [Blob(0.5, "crimson #f6f2e8 tan #3c3c42 gold", 0.1, 0.9, 8, -0.45j, 0.2)],
    "tub": [Blob(0.55, f"{CHINA} {SWEET}", 0.1, 0.8, 8, -0.4j, 0.3)],
    "spoon": [Blob(1, "silver gray", 0.03, 0.05, 6), Blob(0.28, "", -0.2, 0.65, 2, 1.1)],
    "glass": [Blob(0.5, "#d6e2e8", 0.2), Blob(0.44, "#5a2814 #ecaa3c #bed2dc #781428", -0.3)],
    "side_dish": [Blob(0.7, CHINA, 0.06), Blob(0.5, f"firebrick #588c34 {SWEET}", 0.15)],
}

DEEP, FLAT, SIDE = "bowl bowl plate square board", "plate square board paper", "stand tray none"
CLUTTER = Row("spoon glass side_dish paper bowl", 3, 0, 4, 0.7, 2.2)
CAKES, DONUTS = "cup_cake cherry_cup_cake high_cup_cake flat_cup_cake", "donut sprinkled_donut"
GRAINS = Row("grain", 1, 300, 400, 0.05, 0.9)
DISHES: dict[str, list[View]] = {
    "caesar_salad": [View(DEEP, [
        Row("leaf", 1, 25, 45, 0.27), Row("crouton parmesan", 2, 12, 40, 0.12),
        Row("chicken tomato cucumber leaf onion olive", 3, 4, 16, 0.13),
        Row("parmesan", 1, 10, 60, 0.04),
    ])],
    "cup_cakes": [
        View(SIDE, [one(CAKES, 1)], upright=True),
        View(SIDE, [Row(CAKES, 3, 2, 3, 0.65, 1)], upright=True),
    ],
    "donuts": [View(FLAT, [one(DONUTS, 0.9)]), View(FLAT, [Row(DONUTS, 2, 2, 5, 0.5)])],
    "french_fries": [
        View(FLAT, [one("side_dish none", 0.5), Row("fry", 1, 40, 90, 0.5, 0.6)]),
        View(SIDE, [Row("upright_fry", 1, 22, 40, 1, 0.35), one("carton", 1)], upright=True),
    ],
    "fried_rice": [View(f"pan {DEEP}", [
        one("rice", 0.95), GRAINS,
        Row("pea carrot ham chicken shrimp pepper mushroom", 4, 25, 60, 0.08),
        one("egg none none", 0.5),
    ])],
    "greek_salad": [View(DEEP, [
        Row("leaf", 1, 6, 35, 0.27), Row("feta cucumber tomato olive", 4, 15, 40, 0.13),
        Row("onion pepper chicken leaf crouton", 3, 4, 16, 0.13),
    ])],
    "hamburger": [
        View(SIDE, [Row("fry", 1, 0, 15, 0.4, 1.2), one("burger dark_burger", 1)], upright=True),
        View(FLAT, [Row("fry", 1, 0, 30, 0.42, 0.9), one("lettuce", 0.65), one("bun", 0.65)]),
    ],
    "ice_cream": [
        View("none", [one("cone double_cone soft_ice", 0.8)], upright=True),
        View(SIDE, [Row("upright_scoop", 1, 1, 3, 1, 0.5), one("tub", 1)], upright=True),
        View(DEEP, [Row("scoop speckled_scoop", 2, 1, 3, 0.5, 0.5)]),
    ],
    "paella": [View(f"pan pan {DEEP}", [
        one("yellow_rice", 0.95), GRAINS, Row("pea pepper chicken", 3, 15, 40, 0.07),
        Row("shrimp mussel chicken", 2, 3, 10, 0.15), Row("lemon", 1, 0, 4, 0.18),
    ])],
    "pizza": [View(f"pan {FLAT}", [
        one("pizza", 1), one("crust", 1), Row("cheese", 1, 25, 70, 0.12),
        Row("pepperoni tomato mushroom olive leaf pepper ham onion", 3, 8, 26, 0.14),
        Row("missing_slice", 1, 0, 2, 1, 0),
    ])],
}
# fmt: on
