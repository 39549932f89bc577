"""Say in varied everyday wording what a picture from `demo_scenes` shows.

`describe` returns the words together with what they ask for, so that the scoring tool knows what may be demanded.
"""

from __future__ import annotations

import random
import string
from typing import Any

Picture = dict[str, Any]
Asked = dict[str, Any]

COLOR_WORDS = {"purple": ("purple", "purple", "violet"), "yellow": ("yellow", "yellow", "yellow", "golden"),
               "red": ("red", "red", "red", "scarlet")}
SHAPE_WORDS = {"circle": ("circle", "circle", "circle", "disc", "ball"), "ring": ("ring", "ring", "hoop"),
               "square": ("square", "square", "square", "box")}
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "big", "huge")}
PLACE_WORDS: dict[str, tuple[str, ...]] = {
    "center": ("in the center", "in the middle", "in the centre", "centered"),
    "left": ("on the left", "on the left side", "at the left", "to the left"),
    "right": ("on the right", "on the right side", "at the right", "to the right"),
    "top": ("at the top", "near the top", "at the top center"),
    "bottom": ("at the bottom", "near the bottom", "at the bottom center"),
}
GROUND_WORDS = ("on a {} background", "on a {} background", "on a {} ground", "against a {} background", "on {}",
                "over a {} backdrop", "with a {} background", ", {} background", ", {} background")
LEADS = ("", "", "", "", "", "", "a picture of ", "an image of ", "a drawing of ", "a simple illustration of ", "a painting of ",
         "draw ", "show me ", "flat illustration of ", "there is ")
TAILS = ("", "", "", "", "", "", ", flat illustration", ", simple", ", minimal vector art", ", clean flat colors",
         ", high quality", ", please")
FILLERS = ("beautiful", "nice", "pretty", "bright", "lovely", "single", "solid", "perfect", "cute", "plain", "detailed",
           "colorful", "quiet", "very", "clean", "flat", "modern", "one", "cozy", "calm")
TIME_WORDS = {
    "day": ("by day", "in daylight", "during the day", "under a blue sky", "on a bright day", "in the daytime"),
    "sunset": ("at sunset", "at sunset", "at dusk", "in the evening", "under an orange sky"),
    "night": ("at night", "at night", "by night", "in the dark", "under a night sky"),
}
TIME_TAGS = {"day": ("day", "daytime", "blue sky"), "sunset": ("sunset", "dusk", "evening sky"),
             "night": ("night", "night sky", "dark sky")}
SCENE_HEADS = {"day": ("a day scene with ", "a daytime landscape with "),
               "sunset": ("a sunset scene with ", "a sunset with ", "an evening landscape with "),
               "night": ("a night scene with ", "a night landscape with ", "a night sky with ")}


def describe(picture: Picture, rng: random.Random, plain: bool = False) -> tuple[str, Asked]:
    """Word a picture.

    Parameters: `picture` from `demo_scenes.sample`; `rng`, the only source of chance; `plain` keeps out vague captions,
    filler and unknown words.
    Returns the caption and what it asks for: for shapes the keys ``color``, ``ground``, ``shape``, ``place``, ``size``
    (and the same with ``2`` for a second shape), for scenes ``time`` and the set ``elements``; what goes unsaid is absent.
    """
    if not plain and rng.random() < 0.06:
        return _vague(picture, rng), {}
    maker = {"single": _single, "pair": _pair, "scene": _scene}[picture["kind"]]
    text, asked = maker(picture, rng)
    if not plain and rng.random() < 0.2:
        text = _with_filler(text, rng)
    return text, asked


def vocabulary() -> list[str]:
    """Return every word that a caption may hold, so that the tokenizer can give each a token of its own."""
    rng = random.Random(0)
    from demo_scenes import sample

    words = set(FILLERS) | {"gray", "grey", "cyan", "teal", "sky", "cloud", "clouds", "photo", "art", "style", "color",
                            "no", "without", "low", "bad", "blurry", "ugly", "text", "cat", "dog", "person", "city", "mountain"}
    for _ in range(30000):
        words.update(describe(sample(rng), rng, plain=True)[0].replace(",", " ").split())
        words.update(_vague(sample(rng), rng).replace(",", " ").split())
    return sorted(words)


def _pick(table: dict[str, tuple[str, ...]], key: str, rng: random.Random) -> str:
    return rng.choice(table.get(key, (key,)))


def _article(phrase: str, rng: random.Random) -> str:
    article = "an" if phrase[0] in "aeiou" else "a"
    return f"{rng.choice((article, article, article, article, 'the', 'one'))} {phrase}" if rng.random() < 0.93 else phrase


def _noun(item: Picture, rng: random.Random, asked: Asked, mark: str = "") -> str:
    """Name a shape: article, size (none means medium), colour, shape."""
    words = [_pick(COLOR_WORDS, item["color"], rng), _pick(SHAPE_WORDS, item["shape"], rng)]
    asked["color" + mark], asked["shape" + mark] = item["color"], item["shape"]
    if item["size"] != "medium":
        words.insert(0, _pick(SIZE_WORDS, item["size"], rng))
        asked["size" + mark] = item["size"]
    return _article(" ".join(words), rng)


def _place(item: Picture, rng: random.Random, asked: Asked) -> str:
    """Say where a shape is; always, unless it is in the middle, where saying nothing means the same."""
    place = item["place"]
    if place == "center" and rng.random() < 0.65:
        return ""
    asked["place"] = place
    if " " not in place:
        return _pick(PLACE_WORDS, place, rng)
    row, column = place.split()
    joined = rng.choice((f"{row} {column}", f"{row} {column}", f"{'upper' if row == 'top' else 'lower'} {column}"))
    return rng.choice((f"in the {joined} corner", f"in the {joined}", f"at the {joined}"))


def _ground(color: str, rng: random.Random, asked: Asked) -> str:
    asked["ground"] = color
    text = rng.choice(GROUND_WORDS).format(_pick(COLOR_WORDS, color, rng))
    return text.replace("a orange", "an orange")


def _tidy(text: str) -> str:
    return " ".join(text.replace(" ,", ",").split()).strip(" ,")


def _single(p: Picture, rng: random.Random) -> tuple[str, Asked]:
    asked: Asked = {}
    item = p["shapes"][0]
    noun, place, ground = _noun(item, rng, asked), _place(item, rng, asked), _ground(p["ground"], rng, asked)
    order = rng.random()
    if order < 0.4:
        text = f"{noun} {place} {ground}"
    elif order < 0.7:
        text = f"{noun} {ground} {place}" if not ground.startswith(",") else f"{noun} {place}{ground}"
    else:
        bare = _article(f"{_pick(COLOR_WORDS, p['ground'], rng)} {rng.choice(('background', 'background', 'ground'))}", rng)
        text = rng.choice((f"{bare} with {noun} {place}", f"{bare}, {noun} {place}", f"on {bare}, {noun} {place}"))
    return _tidy(rng.choice(LEADS) + text + rng.choice(TAILS)), asked


def _pair(p: Picture, rng: random.Random) -> tuple[str, Asked]:
    asked: Asked = {}
    first, second = p["shapes"]
    one, two = _noun(first, rng, asked), _noun(second, rng, asked, "2")
    ground = _ground(p["ground"], rng, asked)
    asked["relation"] = first["place"]
    link = {"left": ("{} to the left of {}", "{} left of {}", "{} and {}", "{} next to {}", "{} and {} side by side",
                     "{} on the left and {} on the right", "{} beside {}"),
            "right": ("{} to the right of {}", "{} right of {}", "{} on the right and {} on the left"),
            "top": ("{} above {}", "{} over {}", "{} on top of {}", "{} at the top and {} at the bottom"),
            "bottom": ("{} below {}", "{} under {}", "{} beneath {}", "{} at the bottom and {} at the top")}[first["place"]]
    text = rng.choice(link).format(one, two)
    if not ground.startswith(",") and rng.random() < 0.2:
        text = f"{ground}, {text}"
    else:
        text = f"{text} {ground}"
    return _tidy(rng.choice(LEADS) + text + rng.choice(TAILS)), asked


# ---- scenes ----------------------------------------------------------------------------------------------------------

def elements(p: Picture) -> set[str]:
    """Return everything that stands in a scene."""
    found = {"hills"} if p["land"] == "hills" else {"sea"}
    found |= {"house"} if p["house"] is not None else set()
    found |= {"boat"} if p["boat"] is not None else set()
    found |= {"trees"} if p["trees"] else set()
    found |= {"stars"} if p["stars"] else set()
    if p["light"] is not None:
        found.add("moon" if p["time"] == "night" else "sun")
    return found


def _scene(p: Picture, rng: random.Random) -> tuple[str, Asked]:
    here = elements(p)
    # A caption may leave a thing out now and then, so that a short prompt still yields a full picture.
    # Sorted, because the order of a set of words changes from process to process, and chance with it.
    said = {e for e in sorted(here) if e in ("house", "boat") or rng.random() < 0.88}
    asked: Asked = {"elements": said}
    if p["time"] == "day" and rng.random() < 0.3:
        when = tag = ""
    else:
        asked["time"] = p["time"]
        when, tag = rng.choice(TIME_WORDS[p["time"]]), rng.choice(TIME_TAGS[p["time"]])
    things = _things(p, said, rng)
    where = _where(p, said, rng)
    sky = [_light(e, rng) for e in ("sun", "moon", "stars") if e in said]
    style = rng.random()
    if style < 0.22:
        text = _tags(p, said, tag, rng)
    elif style < 0.42 and asked.get("time"):
        text = rng.choice(SCENE_HEADS[p["time"]]) + (_and([*sky, *things, *where[1:]], rng) or "nothing else")
    elif style < 0.6 and sky:
        text = f"{_and(sky, rng)} over {_and([where[1] if len(where) > 1 else 'the land', *things], rng)} {when}"
    else:
        text = f"{_and(things, rng)} {where[0]} {when}" if things else f"{where[1] if len(where) > 1 else 'a landscape'} {when}"
        text += (rng.choice((", ", " with ", " under ")) + _and(sky, rng)) if sky else ""
    return _tidy(rng.choice(LEADS) + text + rng.choice(TAILS)), asked


def _things(p: Picture, said: set[str], rng: random.Random) -> list[str]:
    """Name what stands on the land or floats, in any order."""
    out = []
    if "house" in said:
        out.append(rng.choice(("a house", "a house", "a little house", "a cottage", "a small white house")))
    if "boat" in said:
        out.append(rng.choice(("a boat", "a boat", "a sailing boat", "a sailboat", "a little boat")))
    if "trees" in said:
        many = {1: ("a tree", "one tree", "a tree"), 2: ("two trees", "trees", "some trees"), 3: ("three trees", "trees", "some trees")}
        out.append(rng.choice(many[len(p["trees"])]))
    rng.shuffle(out)
    return out


def _where(p: Picture, said: set[str], rng: random.Random) -> list[str]:
    """Return the place as a phrase after things ("by the sea") and, if it was said, as a noun ("the sea")."""
    if p["land"] == "hills":
        if "hills" not in said:
            return [""]
        noun = rng.choice(("hills", "green hills", "rolling hills", "the hills"))
        return [f"{rng.choice(('on', 'in', 'among'))} {noun}", noun]
    if "sea" not in said:
        return [""]
    noun = rng.choice(("the sea", "the sea", "the ocean", "a calm sea"))
    words = ("on", "at") if p["land"] == "sea" else ("by", "by", "near", "at")
    return [f"{rng.choice(words)} {noun}", noun if p["land"] == "sea" else f"{rng.choice(('a coast by ', 'the shore of '))}{noun}"]


def _light(element: str, rng: random.Random) -> str:
    return rng.choice({"sun": ("the sun", "the sun", "a sun", "a yellow sun"), "moon": ("the moon", "a moon", "moon"),
                       "stars": ("stars", "the stars", "bright stars")}[element])


def _tags(p: Picture, said: set[str], tag: str, rng: random.Random) -> str:
    words = ["shore" if p["land"] == "shore" and e == "sea" and rng.random() < 0.3 else e for e in sorted(said)]
    words = ["tree" if e == "trees" and len(p["trees"]) == 1 else e for e in words] + ([tag] if tag else [])
    rng.shuffle(words)
    return ", ".join(words) or "landscape"


def _and(parts: list[str], rng: random.Random) -> str:
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} {rng.choice(('and', 'and', 'with'))} {parts[-1]}"


def _vague(p: Picture, rng: random.Random) -> str:
    """Say only a part: what short prompts and negative prompts are made of."""
    if p["kind"] == "scene":
        return rng.choice((rng.choice(TIME_TAGS[p["time"]]), rng.choice(sorted(elements(p))), "a landscape", "a scene", p["time"]))
    item = p["shapes"][0]
    return rng.choice((item["color"], item["shape"], p["ground"], f"{p['ground']} background", f"a {item['shape']}",
                       f"a {item['color']} {item['shape']}", f"a {item['shape']} on a {p['ground']} background", "a shape",
                       f"{item['color']} and {p['ground']}"))


def _with_filler(text: str, rng: random.Random) -> str:
    """Put in one or two words that mean nothing here, known or made up: unknown words must do no harm."""
    words = text.split()
    for _ in range(rng.choice((1, 1, 2))):
        made_up = "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(3, 6)))
        word = rng.choice(FILLERS) if rng.random() < 0.75 else made_up
        words.insert(rng.randint(0, len(words)), word)
    return " ".join(words)
