"""Draw the flat illustrations that the demo model learns from, and say in words what they show.

A *picture* is a plain dictionary (JSON types only) that fixes everything visible; `render` draws it, `describe` words it.
Three kinds: ``single`` (one shape on a ground), ``pair`` (two shapes), ``scene`` (sky, hills or sea, and what stands there).
Coordinates are fractions of the picture's width and height, radii fractions of its shorter side.
"""

from __future__ import annotations

import math
import random
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

Picture = dict[str, Any]
Point = tuple[float, float]
RGB = tuple[int, int, int]

PALETTE: dict[str, RGB] = {
    "red": (220, 40, 40), "orange": (245, 140, 30), "yellow": (250, 215, 50), "green": (50, 160, 75),
    "blue": (45, 95, 215), "purple": (130, 60, 175), "pink": (245, 150, 190), "brown": (125, 80, 45),
    "black": (25, 25, 28), "white": (248, 248, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
#: Where the nine position words put a shape's middle, as fractions of width and height.
PLACES: dict[str, Point] = {
    "center": (0.5, 0.5), "left": (0.25, 0.5), "right": (0.75, 0.5), "top": (0.5, 0.25), "bottom": (0.5, 0.75),
    "top left": (0.24, 0.24), "top right": (0.76, 0.24), "bottom left": (0.24, 0.76), "bottom right": (0.76, 0.76),
}
SIZES: dict[str, tuple[float, float]] = {"small": (0.11, 0.13), "medium": (0.18, 0.21), "large": (0.30, 0.34)}
TIMES = ("day", "sunset", "night")

#: What each thing in a scene is painted with, by the time of day.
INKS: dict[str, dict[str, RGB]] = {
    "day": {"sky": (140, 205, 245), "sea": (30, 115, 190), "wave": (110, 175, 225), "far": (110, 185, 105),
            "near": (80, 160, 70), "crown": (25, 95, 50), "sun": (255, 220, 60)},
    "sunset": {"sky": (245, 140, 80), "sky_top": (195, 90, 125), "sky_low": (255, 190, 100), "sea": (85, 70, 145),
               "wave": (215, 130, 120), "far": (135, 115, 75), "near": (105, 95, 55), "crown": (50, 60, 35),
               "sun": (255, 238, 120)},
    "night": {"sky": (22, 28, 75), "sea": (20, 65, 120), "wave": (80, 130, 175), "far": (35, 85, 80),
              "near": (30, 70, 60), "crown": (10, 32, 32), "moon": (245, 240, 205)},
}
THINGS: dict[str, RGB] = {"trunk": (110, 70, 40), "wall": (240, 230, 210), "roof": (190, 55, 45), "door": (110, 65, 40),
                          "pane": (110, 150, 180), "lamp": (255, 215, 90), "hull": (140, 60, 40), "sail": (250, 248, 240)}


# ---- drawing ---------------------------------------------------------------------------------------------------------

def outline(shape: str, turn: float = 0.0) -> list[Point]:
    """Return a shape's outer contour as points in the unit disc, y down; `turn` is its rotation in radians."""
    if shape in ("circle", "ring"):
        points = [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 96, endpoint=False)]
    elif shape == "heart":
        points = [_heart(a) for a in np.linspace(0, 2 * math.pi, 96, endpoint=False)]
    else:
        points = _corners(shape)
    c, s = math.cos(turn), math.sin(turn)
    return [(c * x - s * y, s * x + c * y) for x, y in points]


def _heart(a: float) -> Point:
    x = 16 * math.sin(a) ** 3
    y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
    return x / 16.5, -(y + 2.5) / 16.5


def _corners(shape: str) -> list[Point]:
    if shape == "square":
        return [(x * 0.86, y * 0.86) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    count, inner = {"triangle": (3, 0.0), "star": (5, 0.45)}[shape]
    points = []
    for k in range(count):
        a = -math.pi / 2 + 2 * math.pi * k / count
        points.append((1.1 * math.cos(a), 1.1 * math.sin(a)))
        if inner:
            b = a + math.pi / count
            points.append((1.1 * inner * math.cos(b), 1.1 * inner * math.sin(b)))
    return points


class Canvas:
    """A drawing surface in fractions of the picture, three times oversampled so that edges come out smooth."""

    OVER = 3

    def __init__(self, width: int, height: int, ground: RGB) -> None:
        self.size = (width, height)
        self.w, self.h = width * self.OVER, height * self.OVER
        self.unit = min(self.w, self.h)
        self.image = Image.new("RGB", (self.w, self.h), tuple(ground))
        self.pen = ImageDraw.Draw(self.image)

    def polygon(self, points: list[Point], ink: RGB) -> None:
        """Fill a polygon given in fractions of width and height."""
        self.pen.polygon([(x * self.w, y * self.h) for x, y in points], fill=tuple(ink))

    def local(self, at: Point, points: list[Point], radius: float, ink: RGB) -> None:
        """Fill a polygon given around `at`, scaled by `radius` (a fraction of the shorter side)."""
        r = radius * self.unit
        self.pen.polygon([(at[0] * self.w + x * r, at[1] * self.h + y * r) for x, y in points], fill=tuple(ink))

    def disc(self, at: Point, radius: float, ink: RGB) -> None:
        """Fill a disc around `at`."""
        self.local(at, outline("circle"), radius, ink)

    def pixels(self) -> np.ndarray:
        """Return the finished picture, uint8 of shape (height, width, 3)."""
        return np.asarray(self.image.reduce(self.OVER))


def render(picture: Picture, width: int = 256, height: int = 256) -> np.ndarray:
    """Draw a picture.

    Parameters: `picture` from `sample`; `width` and `height` in pixels.
    Returns uint8 of shape (height, width, 3).
    """
    if picture["kind"] == "scene":
        return _render_scene(picture, width, height)
    canvas = Canvas(width, height, PALETTE[picture["ground"]])
    for item in picture["shapes"]:
        canvas.local(item["at"], outline(item["shape"], item["turn"]), item["radius"], PALETTE[item["color"]])
        if item["shape"] == "ring":
            canvas.disc(item["at"], item["radius"] * 0.58, PALETTE[picture["ground"]])
    return canvas.pixels()


def _render_scene(p: Picture, width: int, height: int) -> np.ndarray:
    inks = INKS[p["time"]]
    canvas = Canvas(width, height, inks["sky"])
    if p["time"] == "sunset":
        canvas.polygon([(0, 0), (1, 0), (1, 0.2), (0, 0.2)], inks["sky_top"])
        canvas.polygon([(0, 0.4), (1, 0.4), (1, 1), (0, 1)], inks["sky_low"])
    _draw_sky(canvas, p, inks)
    if p["land"] != "hills":
        _draw_sea(canvas, p, inks)
    if p["land"] != "sea":
        _draw_land(canvas, p, inks)
    for x in p["trees"]:
        _draw_tree(canvas, (x, ridge(p, x)), p["tree_size"], p["conifer"], inks["crown"])
    if p["house"] is not None:
        _draw_house(canvas, (p["house"], ridge(p, p["house"])), p["time"] == "night")
    if p["boat"] is not None:
        _draw_boat(canvas, p["boat"])
    return canvas.pixels()


def _draw_sky(canvas: Canvas, p: Picture, inks: dict[str, RGB]) -> None:
    for x, y, radius in p["stars"]:
        canvas.local((x, y), [(0, -1), (0.3, -0.3), (1, 0), (0.3, 0.3), (0, 1), (-0.3, 0.3), (-1, 0), (-0.3, -0.3)],
                     radius, INKS["night"]["moon"])
    if p["light"] is None:
        return
    x, y, radius = p["light"]
    if p["time"] != "night":
        canvas.disc((x, y), radius, inks["sun"])
        return
    canvas.disc((x, y), radius, inks["moon"])
    if p["crescent"]:
        canvas.disc((x + 0.42 * radius, y - 0.2 * radius), radius * 0.85, inks["sky"])


def _draw_sea(canvas: Canvas, p: Picture, inks: dict[str, RGB]) -> None:
    top = p["horizon"]
    canvas.polygon([(0, top), (1, top), (1, 1), (0, 1)], inks["sea"])
    for x, y, length in p["waves"]:
        thick = 0.009
        canvas.polygon([(x, y), (x + length, y), (x + length, y + 2 * thick), (x, y + 2 * thick)], inks["wave"])


def ridge(p: Picture, x: float) -> float:
    """Return the height (fraction from the top) of the land's near edge at `x`."""
    if p["land"] == "shore":
        u = x if p["side"] == "left" else 1 - x
        return 0.60 + 0.45 * (0.5 - 0.5 * math.cos(math.pi * min(max((u - 0.25) / 0.6, 0.0), 1.0)))
    return p["near_y"] + p["swell"] * math.sin(2 * math.pi * (x * p["pitch"] + p["phase"]))


def _draw_land(canvas: Canvas, p: Picture, inks: dict[str, RGB]) -> None:
    xs = [k / 64 for k in range(65)]
    if p["land"] == "hills":
        far = [(x, p["near_y"] - 0.12 + 0.07 * math.sin(2 * math.pi * (x * 1.1 + p["phase"] + 0.45))) for x in xs]
        canvas.polygon([*far, (1, 1), (0, 1)], inks["far"])
    canvas.polygon([*((x, ridge(p, x)) for x in xs), (1, 1.1), (0, 1.1)], inks["near"])


def _draw_tree(canvas: Canvas, foot: Point, size: float, conifer: bool, crown: RGB) -> None:
    canvas.local(foot, [(-0.13, -1), (0.13, -1), (0.13, 0.15), (-0.13, 0.15)], size, THINGS["trunk"])
    if conifer:
        canvas.local(foot, [(0, -2.7), (0.8, -0.6), (-0.8, -0.6)], size, crown)
    else:
        canvas.local(foot, [(0.85 * x, 0.85 * y - 1.5) for x, y in outline("circle")], size, crown)


def _draw_house(canvas: Canvas, foot: Point, lit: bool) -> None:
    size = 0.11
    canvas.local(foot, [(-1, -1.1), (1, -1.1), (1, 0.3), (-1, 0.3)], size, THINGS["wall"])
    canvas.local(foot, [(-1.25, -1.1), (0, -2.1), (1.25, -1.1)], size, THINGS["roof"])
    canvas.local(foot, [(0.2, -0.65), (0.65, -0.65), (0.65, 0.3), (0.2, 0.3)], size, THINGS["door"])
    canvas.local(foot, [(-0.7, -0.75), (-0.2, -0.75), (-0.2, -0.25), (-0.7, -0.25)], size, THINGS["lamp" if lit else "pane"])


def _draw_boat(canvas: Canvas, boat: list[float]) -> None:
    x, y, size = boat
    canvas.local((x, y), [(-1, 0), (1, 0), (0.65, 0.45), (-0.65, 0.45)], size, THINGS["hull"])
    canvas.local((x, y), [(-0.1, -0.15), (-0.1, -1.7), (-0.8, -0.15)], size, THINGS["sail"])
    canvas.local((x, y), [(0.06, -0.15), (0.06, -1.5), (0.75, -0.15)], size, THINGS["sail"])


# ---- choosing --------------------------------------------------------------------------------------------------------

def sample(rng: random.Random, held_out: bool = False, kind: str | None = None) -> Picture:
    """Choose a picture.

    Parameters: `rng`, the only source of chance; `held_out`, whether to choose among the combinations kept out of training
    (one in sixteen, by a checksum of what the caption can say) or among the others; `kind` or `None` for the usual mix.
    """
    makers = {"single": _sample_single, "pair": _sample_pair, "scene": _sample_scene}
    while True:
        chosen = kind or rng.choices(tuple(makers), weights=(48, 17, 35))[0]
        picture = makers[chosen](rng)
        if is_held_out(picture) == held_out:
            return picture


def is_held_out(p: Picture) -> bool:
    """Tell whether a picture's combination is kept out of training (the salt spreads scene elements evenly)."""
    return zlib.crc32(f"880 {combination(p)}".encode()) % 16 == 0


def combination(p: Picture) -> str:
    """Return what is asked for in one line, without anything a caption cannot say: the unit of holding out."""
    if p["kind"] == "scene":
        parts = [p["time"], p["land"], p["light"] is not None, bool(p["stars"]), len(p["trees"]), p["house"] is not None,
                 p["boat"] is not None]
        return " ".join(map(str, parts))
    shapes = [f"{s['color']} {s['shape']} {s['place']}" for s in p["shapes"]]
    return " ".join([*shapes, "on", p["ground"]])


def _shape(rng: random.Random, color: str, place: str, at: Point, size: str, radius: float) -> Picture:
    shape = rng.choice(SHAPES)
    turn = 0.0 if shape in ("circle", "ring") else rng.uniform(-0.12, 0.12)
    return {"shape": shape, "color": color, "place": place, "at": at, "size": size, "radius": radius, "turn": turn}


def _sample_single(rng: random.Random) -> Picture:
    color, ground = rng.sample(tuple(PALETTE), 2)
    place = "center" if rng.random() < 0.3 else rng.choice(tuple(PLACES))
    sizes = ("small", "medium", "medium") if place != "center" else ("small", "medium", "large")
    size = rng.choice(sizes)
    near = 0.04 if place == "center" else 0.03
    at = (PLACES[place][0] + rng.uniform(-near, near), PLACES[place][1] + rng.uniform(-near, near))
    radius = rng.uniform(*SIZES[size]) * (1.0 if place == "center" else 0.92)
    return {"kind": "single", "ground": ground, "shapes": [_shape(rng, color, place, at, size, radius)]}


def _sample_pair(rng: random.Random) -> Picture:
    first, second, ground = rng.sample(tuple(PALETTE), 3)
    places = rng.choice((("left", "right"), ("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top")))
    radius = rng.uniform(0.15, 0.18)
    shapes = []
    for color, place in zip((first, second), places, strict=True):
        x, y = PLACES[place]
        at = (x + rng.uniform(-0.025, 0.025), y + rng.uniform(-0.025, 0.025))
        shapes.append(_shape(rng, color, place, at, "medium", radius * rng.uniform(0.95, 1.05)))
    return {"kind": "pair", "ground": ground, "shapes": shapes}


def _sample_scene(rng: random.Random) -> Picture:
    land = rng.choice(("hills", "hills", "sea", "shore"))
    p: Picture = {"kind": "scene", "time": rng.choice(TIMES), "land": land, "side": rng.choice(("left", "right")),
                  "horizon": rng.uniform(0.58, 0.66), "near_y": rng.uniform(0.68, 0.76), "swell": rng.uniform(0.02, 0.05),
                  "pitch": rng.uniform(0.6, 1.2), "phase": rng.random(), "conifer": rng.random() < 0.5,
                  "crescent": rng.random() < 0.5, "tree_size": rng.uniform(0.075, 0.095)}
    p["house"], p["trees"] = _sample_things(rng, p)
    p["boat"], p["waves"] = None, []
    if land != "hills":
        x = rng.uniform(0.4, 0.6) if land == "sea" else (0.74 if p["side"] == "left" else 0.26)
        p["boat"] = [x, rng.uniform(0.72, 0.77), rng.uniform(0.11, 0.13)] if rng.random() < 0.6 else None
        p["waves"] = [[0.04 + 0.33 * (k % 3) + rng.uniform(0, 0.12), p["horizon"] + 0.08 + 0.15 * (k // 3) + rng.uniform(0, 0.07),
                       rng.uniform(0.09, 0.15)] for k in range(6)]
    p["light"], p["stars"] = _sample_lights(rng, p["time"])
    return p


def _sample_things(rng: random.Random, p: Picture) -> tuple[float | None, list[float]]:
    """Put a house and up to three trees on the land, each in the place that is its own, or they would come out doubled."""
    if p["land"] == "sea":
        return None, []
    slots = [0.84, 0.16, 0.34]
    home = 0.54
    if p["land"] == "shore":
        slots, home = [0.10, 0.42, 0.26], 0.26
    house = home + rng.uniform(-0.03, 0.03) if rng.random() < 0.5 else None
    slots = [s for s in slots if house is None or abs(s - house) > 0.12]
    trees = [s + rng.uniform(-0.03, 0.03) for s in slots[:rng.choice(range(len(slots) + 1))]]
    if p["land"] == "shore" and p["side"] == "right":
        house, trees = None if house is None else 1 - house, [1 - t for t in trees]
    return house, sorted(trees)


def _sample_lights(rng: random.Random, time: str) -> tuple[list[float] | None, list[list[float]]]:
    """Choose the sun or moon (x, y, radius) and the stars of a sky.

    Each kind of light has one side of the sky for itself: where it may stand on either, a small model paints two.
    """
    light = None
    if rng.random() < 0.75:
        across, down, radius = {"day": ((0.68, 0.84), (0.17, 0.25), (0.09, 0.11)), "sunset": ((0.3, 0.46), (0.42, 0.5), (0.11, 0.13)),
                                "night": ((0.16, 0.32), (0.17, 0.25), (0.09, 0.11))}[time]
        light = [rng.uniform(*across), rng.uniform(*down), rng.uniform(*radius)]
    stars: list[list[float]] = []
    if time == "night" and rng.random() < 0.75:
        for k in range(10):
            x, y = 0.05 + 0.1 * k + rng.uniform(-0.03, 0.03), (0.08, 0.34, 0.21, 0.42)[k % 4] + rng.uniform(-0.04, 0.04)
            if light is None or math.hypot(x - light[0], y - light[1]) > light[2] + 0.06:
                stars.append([x, y, rng.uniform(0.026, 0.034)])
    return light, stars
