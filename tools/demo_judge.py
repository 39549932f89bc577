"""Judge from the pixels alone whether a picture shows what its caption asked for.

Colours go to the nearest name, regions to connected components, shapes to contour analysis: the radius of the outline
around its centroid is compared with that of the ideal shapes in several turns. No network takes part.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from demo_scenes import INKS, PALETTE, SHAPES, THINGS, outline
from PIL import Image, ImageDraw

BINS = 60  # directions in a contour's profile
NAMES = tuple(PALETTE)
#: Mean squared distance of contours above which a region is none of the shapes.
FAR = 0.02
#: Share of the picture below which a region is taken for a speck.
SPECK = 0.004


# ---- regions ---------------------------------------------------------------------------------------------------------

def components(mask: np.ndarray) -> list[np.ndarray]:
    """Return the 4-connected regions of a boolean mask, largest first, each as a boolean mask of the same shape.

    Works on runs of each row, joined with a union-find, which is quick enough without a compiled library.
    """
    runs = _runs(mask)
    parent = list(range(len(runs)))

    def root(k: int) -> int:
        while parent[k] != k:
            parent[k] = parent[parent[k]]
            k = parent[k]
        return k

    above: list[int] = []
    row: list[int] = []
    for k, (y, start, stop) in enumerate(runs):
        if row and runs[row[-1]][0] != y:
            above, row = (row if runs[row[-1]][0] == y - 1 else []), []
        for j in above:
            if runs[j][1] < stop and start < runs[j][2]:
                parent[root(k)] = root(j)
        row.append(k)
    found: dict[int, np.ndarray] = {}
    for k, (y, start, stop) in enumerate(runs):
        found.setdefault(root(k), np.zeros_like(mask))[y, start:stop] = True
    return sorted(found.values(), key=lambda m: -int(m.sum()))


def _runs(mask: np.ndarray) -> list[tuple[int, int, int]]:
    """Return the runs of True as (row, start, stop), in reading order."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]
    return list(zip(rows.tolist(), starts.tolist(), stops.tolist(), strict=True))


def middle(mask: np.ndarray) -> tuple[float, float]:
    """Return a region's centroid as fractions of width and height."""
    y, x = np.nonzero(mask)
    return (float(x.mean()) + 0.5) / mask.shape[1], (float(y.mean()) + 0.5) / mask.shape[0]


def filled(mask: np.ndarray) -> np.ndarray:
    """Return a region with its holes filled."""
    outside = np.zeros_like(mask)
    for part in components(~mask):
        if part[0].any() or part[-1].any() or part[:, 0].any() or part[:, -1].any():
            outside |= part
    return ~outside


# ---- colours ---------------------------------------------------------------------------------------------------------

def nearest(pixels: np.ndarray, inks: list[tuple[int, int, int]]) -> np.ndarray:
    """Return the index of the nearest ink for each pixel, by distance in RGB."""
    gaps = pixels[..., None, :].astype(np.int32) - np.asarray(inks, np.int32)
    return (gaps ** 2).sum(-1).argmin(-1)


def name_of(pixels: np.ndarray, mask: np.ndarray) -> str:
    """Return the palette's name for the median colour under a mask."""
    return NAMES[int(nearest(np.median(pixels[mask], axis=0)[None], list(PALETTE.values()))[0])]


def share(pixels: np.ndarray, name: str) -> float:
    """Return the share (0..1) of pixels nearer to the named colour than to any other of the palette."""
    return float((nearest(pixels, list(PALETTE.values())) == NAMES.index(name)).mean())


# ---- shapes ----------------------------------------------------------------------------------------------------------

def profile(mask: np.ndarray) -> np.ndarray:
    """Return the outline's radius in `BINS` directions around the centroid, divided by its mean."""
    y, x = np.nonzero(mask)
    dy, dx = y - y.mean(), x - x.mean()
    bins = np.floor((np.arctan2(dy, dx) / (2 * math.pi) + 0.5) * BINS).astype(int) % BINS
    radius = np.zeros(BINS)
    np.maximum.at(radius, bins, np.hypot(dy, dx))
    return radius / max(radius.mean(), 1e-6)


@functools.cache
def ideals() -> list[tuple[str, np.ndarray]]:
    """Return each shape's profile in turns from -30 to 30 degrees (a ring counts as a circle with a hole)."""
    out = []
    for shape in SHAPES[:5]:
        for degrees in range(-30, 31, 5) if shape != "circle" else (0,):
            canvas = Image.new("1", (200, 200))
            points = [(100 + 80 * x, 100 + 80 * y) for x, y in outline(shape, math.radians(degrees))]
            ImageDraw.Draw(canvas).polygon(points, fill=1)
            out.append((shape, profile(np.asarray(canvas))))
    return out


def shape_of(mask: np.ndarray) -> str:
    """Return the class of the shape that a region has."""
    whole = filled(mask)
    best, gap = min(((name, float(((known - profile(whole)) ** 2).mean())) for name, known in ideals()), key=lambda found: found[1])
    if gap > FAR:
        return "other"
    hole = 1 - mask.sum() / whole.sum()
    return "ring" if best == "circle" and hole > 0.12 else best


def place_of(mask: np.ndarray) -> str:
    """Return the position word for a region's centroid, from a grid of three by three."""
    x, y = middle(mask)
    column = "left" if x < 0.39 else "right" if x > 0.61 else ""
    row = "top" if y < 0.39 else "bottom" if y > 0.61 else ""
    return f"{row} {column}".strip() or "center"


def see_shapes(pixels: np.ndarray) -> dict[str, Any]:
    """Return the ground's colour and the regions on it, largest first, each with colour, shape and place."""
    rim = np.ones(pixels.shape[:2], bool)
    edge = max(4, min(rim.shape) // 40)
    rim[edge:-edge, edge:-edge] = False
    ground = np.median(pixels[rim], axis=0)
    gap = np.sqrt(((pixels.astype(float) - ground) ** 2).sum(-1))
    found = []
    for region in components(gap > 40):
        if region.mean() < SPECK:
            break
        # Cut the edge half-way between the two colours, where it truly runs.
        region = components(region & (gap > 0.5 * np.median(gap[region])))[0]
        found.append({"color": name_of(pixels, region), "shape": shape_of(region), "place": place_of(region),
                      "at": middle(region), "share": float(region.mean())})
    return {"ground": name_of(pixels, rim), "regions": found}


def judge_shapes(pixels: np.ndarray, asked: dict[str, Any]) -> dict[str, bool]:
    """Return what came out right of a caption about one or two shapes; things not asked for have no entry."""
    seen = see_shapes(pixels)
    regions = seen["regions"][:2 if "color2" in asked else 1]
    main = next((r for r in regions if r["color"] == asked["color"]), regions[0] if regions else None)
    right = {"ground": seen["ground"] == asked["ground"],
             "color": bool(main) and main["color"] == asked["color"],
             "shape": bool(main) and main["shape"] == asked["shape"]}
    if "place" in asked:
        right["place"] = bool(main) and main["place"] == asked["place"]
    if "color2" in asked:
        other = next((r for r in regions if r is not main and r["color"] == asked["color2"]), None)
        right["second"] = bool(other) and other["shape"] == asked["shape2"]
        right["place"] = bool(main and other) and _stands(main["at"], other["at"], asked["relation"])
    if "size" in asked and "color2" not in asked:
        right["size"] = bool(main) and _sized(main, asked["size"], pixels.shape[1] / pixels.shape[0])
    right["alone"] = len(seen["regions"]) <= (2 if "color2" in asked else 1)
    return right


def _stands(a: tuple[float, float], b: tuple[float, float], relation: str) -> bool:
    dx, dy = b[0] - a[0], b[1] - a[1]
    return {"left": dx, "right": -dx, "top": dy, "bottom": -dy}[relation] > 0.15


def _sized(region: dict[str, Any], size: str, aspect: float) -> bool:
    """Compare the area with what lies midway between small, medium and large shapes (rings and stars have less ink).

    `aspect` is width by height: sizes go by the shorter side, shares by the whole picture.
    """
    full = {"circle": 3.14, "ring": 2.08, "square": 2.96, "triangle": 1.57, "star": 1.6, "heart": 1.9}.get(region["shape"], 2.0)
    radius = math.sqrt(region["share"] * max(aspect, 1 / aspect) / full)
    return radius < 0.15 if size == "small" else radius > 0.24


# ---- scenes ----------------------------------------------------------------------------------------------------------

def time_of(pixels: np.ndarray) -> str:
    """Return the time of day by the colour of the sky's upper tenth."""
    top = np.median(pixels[:max(2, len(pixels) // 10)], axis=(0, 1))
    return tuple(INKS)[int(nearest(top[None], [INKS["day"]["sky"], INKS["sunset"]["sky_top"], INKS["night"]["sky"]])[0])]


def see_scene(pixels: np.ndarray) -> set[str]:
    """Return the elements found in a scene."""
    return set(count_scene(pixels))


def count_scene(pixels: np.ndarray) -> dict[str, int]:
    """Return the elements found in a scene, and how many there are of those that come one at a time (else 1)."""
    time = time_of(pixels)
    # Near-equal paints go by one name; what they belong to is told by where they are.
    groups = {"moon": "pale", "wall": "pale", "sail": "pale", "trunk": "wood", "door": "wood", "hull": "wood", "wave": "sea",
              "sky_top": "sky", "sky_low": "sky", "near": "land", "far": "land"}
    inks = {**INKS[time], **THINGS}
    labels = np.asarray([groups.get(k, k) for k in inks])[nearest(pixels, list(inks.values()))]
    parts = {k: [m for m in components(labels == k) if m.mean() > 0.0001] for k in ("pale", "wood", "roof", "crown", "sun")}
    low = labels[len(labels) // 2:]
    sea = bool((low == "sea").mean() > 0.12)
    found = {"sea": sea, "hills": bool((low == "land").mean() > 0.35) and not sea, "trees": any(m.mean() > 0.004 for m in parts["crown"]),
             "sun": sum(_is_disc(m) for m in parts["sun"]), "house": _stacked(parts["roof"], 0.004, parts["pale"], 0.006)}
    if time == "night":
        found |= _night_lights(pixels, parts["pale"])
    # A house has pale above wood too, its wall above its door: what stands close under a roof is no sail.
    sails = [m for m in parts["pale"] if not _stacked(parts["roof"], 0.004, [m], 0.0)]
    hulls = [m for m in parts["wood"] if np.ptp(np.nonzero(m)[1]) > np.ptp(np.nonzero(m)[0])]
    found["boat"] = _stacked(hulls, 0.0025, sails, 0.002, above=False)
    return {name: int(many) for name, many in found.items() if many}


def _is_disc(mask: np.ndarray) -> bool:
    """Tell whether a region may be a sun: big enough, in the upper two thirds, about as wide as high or half sunk."""
    y, x = np.nonzero(mask)
    wide, high = np.ptp(x) + 1, np.ptp(y) + 1
    return mask.mean() > 0.005 and middle(mask)[1] < 0.62 and 0.6 < wide / high < 3 and mask.sum() > 0.55 * wide * high


def _night_lights(pixels: np.ndarray, pale: list[np.ndarray]) -> dict[str, int]:
    """Count the moons (pale regions up in the sky) and find stars (four bright specks at least)."""
    moons = sum(m.mean() > 0.003 and middle(m)[1] < 0.42 for m in pale)
    bright = pixels.mean(-1) > 125
    specks = [m for m in components(bright) if 1e-4 < m.mean() < 0.0028 and middle(m)[1] < 0.55]
    return {"moon": moons, "stars": len(specks) >= 4}


def _stacked(first: list[np.ndarray], first_min: float, second: list[np.ndarray], second_min: float, above: bool = True) -> int:
    """Count the regions of the first kind that stand close above (or under) one of the second; sizes as shares of the picture."""
    def close(a: np.ndarray, b: np.ndarray) -> bool:
        (ax, ay), (bx, by) = middle(a), middle(b)
        return abs(ax - bx) < 0.09 and 0.02 < (by - ay if above else ay - by) < 0.2
    return sum(any(close(a, b) for b in second if b.mean() > second_min) for a in first if a.mean() > first_min)


def judge_scene(pixels: np.ndarray, asked: dict[str, Any]) -> dict[str, Any]:
    """Return the asked elements that were found, whether the time of day is right, and whether nothing is there twice."""
    seen = count_scene(pixels)
    right: dict[str, Any] = {e: e in seen for e in sorted(asked["elements"])}
    right["alone"] = max(seen.values(), default=0) <= 1
    if "time" in asked:
        right["time"] = time_of(pixels) == asked["time"]
    return right
