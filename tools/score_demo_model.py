"""Score the demo model on held-out prompts, from the pixels alone.

    python tools/score_demo_model.py colab_gpu/demo_model            the whole score, as the model card quotes it
    python tools/score_demo_model.py --self-check                    the judge itself: drawn pictures, right and wrong prompts
    python tools/score_demo_model.py --count 60 --sheet sheet.png    fewer prompts, and a contact sheet to look at
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_captions import describe
from demo_judge import judge_scene, judge_shapes, share
from demo_scenes import render, sample

#: Rows of the score: name, the least share (0..1) it must reach, what it says. `None` is told, not demanded.
ROWS: tuple[tuple[str, float | None, str], ...] = (
    ("color", 0.95, "asked colour of the main shape"), ("ground", 0.95, "asked colour of the ground"),
    ("shape", 0.90, "asked class of the main shape"), ("place", 0.90, "asked position (word or relation)"),
    ("elements", 0.80, "asked scene elements present"), ("second", None, "second shape: colour and class"),
    ("size", None, "asked size word"), ("time", None, "asked time of day"), ("alone", None, "nothing there twice, no extra shape"),
)
Paint = Callable[..., list[np.ndarray]]
#: Words that no caption of the training holds, as people put them into prompts, and some that nobody knows.
UNKNOWN = ("photorealistic", "8k", "cinematic", "bokeh", "artstation", "masterpiece", "wunderbar", "volumetric", "zyxwv", "qrlmpf", "🎈", "1990s")
OTHER_SIZES = ((384, 256), (256, 384))  # width, height in pixels


def prompts(count: int, seed: int = 2024) -> list[tuple[dict[str, Any], str, dict[str, Any]]]:
    """Return `count` held-out pictures with caption and what it asks for: half single shapes, a fifth pairs, the rest scenes."""
    rng, out = random.Random(seed), []
    while len(out) < count:
        k = len(out) % 10
        picture = sample(rng, held_out=True, kind="single" if k < 5 else "pair" if k < 7 else "scene")
        text, asked = describe(picture, rng, plain=True)
        if picture["kind"] != "scene" or asked["elements"]:
            out.append((picture, text, asked))
    return out


def judge(pixels: np.ndarray, asked: dict[str, Any]) -> dict[str, bool]:
    """Judge one picture of either kind; keys are the rows' names, single scene elements keep theirs."""
    return judge_scene(pixels, asked) if "elements" in asked else judge_shapes(pixels, asked)


def tally(verdicts: list[dict[str, bool]]) -> dict[str, tuple[int, int]]:
    """Count (right, asked) by row; every scene element counts for the row ``elements`` as well as for itself."""
    counts: dict[str, list[bool]] = defaultdict(list)
    rows = {name for name, _, _ in ROWS}
    for verdict in verdicts:
        for name, right in verdict.items():
            counts[name].append(right)
            if name not in rows:
                counts["elements"].append(right)
    return {name: (sum(v), len(v)) for name, v in counts.items()}


def painter(folder: Path, steps: int, guidance: float, batch: int) -> Paint:
    """Load the folder the ordinary way and return a function from prompts, seeds and a negative prompt to pictures."""
    import torch
    from diffusers import AutoPipelineForText2Image

    pipe = AutoPipelineForText2Image.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def paint(texts: list[str], seeds: list[int], negative: str = "", width: int = 256, height: int = 256) -> list[np.ndarray]:
        out: list[np.ndarray] = []
        for k in range(0, len(texts), batch):
            some = texts[k:k + batch]
            chance = [torch.Generator().manual_seed(s) for s in seeds[k:k + batch]]
            images = pipe(some, negative_prompt=[negative] * len(some), num_inference_steps=steps, guidance_scale=guidance,
                          width=width, height=height, generator=chance).images
            out += [np.asarray(image) for image in images]
            if sys.stderr.isatty():
                print(f"\r{len(out)}/{len(texts)}", end="", file=sys.stderr, flush=True)
        return out

    return paint


def right_share(verdicts: list[dict[str, bool]]) -> float:
    """Return the share (0..1) of all that was asked, and is demanded, that came out right."""
    counts = tally(verdicts)
    rows = [counts[name] for name, least, _ in ROWS if least and name in counts]
    return sum(right for right, _ in rows) / sum(total for _, total in rows)


def unknown_words(paint: Paint, count: int) -> tuple[float, float]:
    """Return what share of the asked is right in the same prompts without and with two unknown words in each."""
    cases, rng = prompts(count, seed=55), random.Random(55)
    out = []

    def disturbed(text: str) -> str:
        words = text.split()
        for word in rng.sample(UNKNOWN, 2):
            words.insert(rng.randint(0, len(words)), word)
        return " ".join(words)

    for change in (str, disturbed):
        pictures = paint([change(text) for _, text, _ in cases], list(range(len(cases))))
        out.append(right_share([judge(p, asked) for p, (_, _, asked) in zip(pictures, cases, strict=True)]))
    return out[0], out[1]


def other_size(paint: Paint, count: int, width: int, height: int) -> float:
    """Return what share of the asked is right in pictures of that size (pixels)."""
    cases = prompts(count, seed=66)
    pictures = paint([text for _, text, _ in cases], list(range(len(cases))), "", width, height)
    return right_share([judge(p, asked) for p, (_, _, asked) in zip(pictures, cases, strict=True)])


def negative_shares(paint: Paint, count: int) -> tuple[float, float]:
    """Return the share of blue (0..1) without and with the negative prompt "blue", over the same vague prompts and seeds."""
    texts = (["a circle", "a star", "a shape", "a heart on a background", "a ring", "a square"] * count)[:count]
    seeds = list(range(500, 500 + count))
    return tuple(float(np.mean([share(p, "blue") for p in paint(texts, seeds, word)])) for word in ("", "blue"))  # type: ignore[return-value]


def seed_difference(paint: Paint, count: int) -> tuple[float, bool]:
    """Return how many pictures of two seeds differ visibly (0..1), and whether one seed gives the same bytes twice."""
    texts = [text for _, text, _ in prompts(count, seed=77)]
    one, two = paint(texts, list(range(count))), paint(texts, list(range(1000, 1000 + count)))
    again = paint(texts, list(range(count)))
    return (float(np.mean([visibly_apart(a, b) for a, b in zip(one, two, strict=True)])),
            all(a.tobytes() == b.tobytes() for a, b in zip(one, again, strict=True)))


def visibly_apart(a: np.ndarray, b: np.ndarray) -> bool:
    """Tell whether two pictures differ by more than 30 of 255 in a hundredth of all pixels, or in a fifth of what isn't ground.

    A small shape covers a fiftieth of the picture: moved by half its width it changes less than a hundredth of all pixels.
    """
    apart = (np.abs(a.astype(int) - b.astype(int)).max(-1) > 30).mean()
    figure = np.mean([(np.abs(p.astype(int) - np.median(p, axis=(0, 1))).max(-1) > 30).mean() for p in (a, b)])
    return bool(apart > 0.01 or apart > 0.2 * figure > 0)


TIMER = """
import sys, time
import psutil, torch
def peak():
    # Not getrusage: its peak outlives exec, so that it would begin at what the scoring process holds.
    try: return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
    except OSError: return psutil.Process().memory_info().rss / 2**20
torch.set_num_threads(2)
base, begun = peak(), time.perf_counter()
import transformers
from diffusers import AutoPipelineForText2Image
AutoPipelineForText2Image.from_pretrained  # lazily imported: this loads the pipelines
start = time.perf_counter()
pipe = AutoPipelineForText2Image.from_pretrained(sys.argv[1])
loaded = time.perf_counter()
pipe.set_progress_bar_config(disable=True)
pipe("a red circle on a blue background", num_inference_steps=25, guidance_scale=float(sys.argv[2]), width=256, height=256)
print(start - begun, loaded - start, time.perf_counter() - loaded, peak() - base)
"""


def measure(folder: Path, guidance: float) -> tuple[float, float, float, float]:
    """Measure in a new process, on two threads.

    Returns the seconds to import the libraries beyond torch, to load, and to make 25 steps at 256x256; and MiB resident beyond torch.
    """
    done = subprocess.run([sys.executable, "-c", TIMER, str(folder), str(guidance)], capture_output=True, text=True, check=True)
    libraries, load, run, memory = map(float, done.stdout.split()[-4:])
    return libraries, load, run, memory


def table(counts: dict[str, tuple[int, int]]) -> str:
    """Return the score as a Markdown table; the last column says whether what is demanded is reached."""
    lines = ["| what is asked for | right | of | share | must reach | |", "|---|--:|--:|--:|--:|---|"]
    for name, least, text in ROWS:
        right, total = counts.get(name, (0, 0))
        if total:
            need, verdict = (f"{least:.0%}", "yes" if right / total >= least else "NO") if least else ("", "")
            lines.append(f"| {text} | {right} | {total} | {right / total:.1%} | {need} | {verdict} |")
    extras = sorted(set(counts) - {name for name, _, _ in ROWS})
    lines += [f"| scene element: {name} | {counts[name][0]} | {counts[name][1]} | {counts[name][0] / counts[name][1]:.1%} | | |"
              for name in extras]
    return "\n".join(lines)


def sheet(pictures: list[np.ndarray], columns: int, side: int = 128) -> Image.Image:
    """Return a contact sheet; pictures keep their proportions on a light ground."""
    rows = -(-len(pictures) // columns)
    out = Image.new("RGB", (columns * (side + 4) + 4, rows * (side + 4) + 4), (235, 235, 235))
    for k, pixels in enumerate(pictures):
        image = Image.fromarray(pixels)
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        x, y = 4 + (k % columns) * (side + 4), 4 + (k // columns) * (side + 4)
        out.paste(image, (x + (side - image.width) // 2, y + (side - image.height) // 2))
    return out


def self_check(count: int) -> int:
    """Score drawn pictures against their own captions and against another picture's; the judge must tell them apart."""
    cases = prompts(count)
    drawn = [render(picture) for picture, _, _ in cases]
    own = tally([judge(p, asked) for p, (_, _, asked) in zip(drawn, cases, strict=True)])
    # Ten on is the same kind of picture, so that the wrong prompt can be judged at all.
    wrong = tally([judge(p, asked) for p, (_, _, asked) in zip(drawn[10:] + drawn[:10], cases, strict=True)])
    print("Drawn pictures against their own captions:", table(own), "", "and against another picture's:", table(wrong), sep="\n")
    rows = [name for name, least, _ in ROWS if least and own.get(name)]
    good = all(own[n][0] / own[n][1] >= 0.98 and wrong[n][0] / wrong[n][1] < 0.75 for n in rows)
    print("\nThe judge", "tells them apart." if good else "CANNOT tell them apart.")
    return 0 if good else 1


def score(args: argparse.Namespace) -> int:
    """Paint, judge, print; return 0 when all that is demanded is reached."""
    began = time.monotonic()
    paint = painter(args.folder, args.steps, args.guidance, args.batch)
    cases = prompts(args.count)
    pictures = paint([text for _, text, _ in cases], list(range(len(cases))), "")
    verdicts = [judge(p, asked) for p, (_, _, asked) in zip(pictures, cases, strict=True)]
    counts = tally(verdicts)
    said = [f"{len(cases)} held-out prompts, {args.steps} steps, guidance {args.guidance:g}", table(counts)]
    good = all(n in counts and counts[n][0] / counts[n][1] >= least for n, least, _ in ROWS if least)
    print(*said, "", sep="\n\n")
    if args.sheet:
        sheet(pictures[:80], 10).save(args.sheet)
    if args.failures:
        show_failures(args.failures, cases, pictures, verdicts)
    if not args.quick:
        more, holds = extras(args, paint)
        print(more)
        good, said = good and holds, [*said, more]
    if args.card:
        write_card(args.folder / "README.md", "\n\n".join(said))
    print(f"\nScored in {time.monotonic() - began:.0f} s.", file=sys.stderr)
    return 0 if good else 1


def write_card(path: Path, text: str) -> None:
    """Put the score between the model card's two marks."""
    head, _, rest = path.read_text("utf-8").partition("<!-- score -->")
    path.write_text(f"{head}<!-- score -->\n{text}\n<!-- /score -->{rest.partition('<!-- /score -->')[2]}", "utf-8")


def show_failures(path: Path, cases: list[Any], pictures: list[np.ndarray], verdicts: list[dict[str, bool]]) -> None:
    """Print what went wrong and save those pictures as a sheet."""
    wrong = [k for k, v in enumerate(verdicts) if not all(v.values())]
    for k in wrong:
        print(f"{k}: {cases[k][1]!r} wrong: {', '.join(n for n, right in verdicts[k].items() if not right)}")
    if wrong:
        sheet([pictures[k] for k in wrong[:80]], 10).save(path)


def extras(args: argparse.Namespace, paint: Paint) -> tuple[str, bool]:
    """Return the measures that are not shares of prompts as a Markdown table, and whether all hold."""
    without, with_it = negative_shares(paint, 24)
    apart, same = seed_difference(paint, 16)
    plain, filled = unknown_words(paint, args.count // 5)
    sizes = [(w, h, other_size(paint, args.count // 10, w, h)) for w, h in OTHER_SIZES]
    libraries, load, run, memory = measure(args.folder, args.guidance)
    size = sum(f.stat().st_size for f in args.folder.rglob("*") if f.is_file())
    rows = [("blue without and with the negative prompt \"blue\"", f"{without:.1%} and {with_it:.1%}", with_it < without / 2),
            ("right of all that is asked, without and with unknown words", f"{plain:.1%} and {filled:.1%}", filled >= plain - 0.05),
            *((f"right of all that is asked at {w}x{h}", f"{share:.1%}", share >= 0.8) for w, h, share in sizes),
            ("prompts whose two seeds differ visibly", f"{apart:.0%}", apart >= 0.9),
            ("one seed twice gives the same bytes", "yes" if same else "no", same),
            ("libraries beyond torch, load, 25 steps at 256x256, two threads", f"{libraries:.1f} + {load:.1f} + {run:.1f} s",
             libraries + load + run <= 5),
            ("resident beyond torch", f"{memory:.0f} MiB", memory <= 600),
            ("size of the folder", f"{size / 1e6:.2f} MB", size <= 8e6)]
    lines = ["| measure | value | holds |", "|---|---|---|", *(f"| {a} | {b} | {'yes' if c else 'NO'} |" for a, b, c in rows)]
    return "\n".join(lines), all(c for _, _, c in rows)


def main() -> int:
    """Read the command line and score."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, nargs="?", default=Path("colab_gpu/demo_model"), help="Diffusers folder")
    p.add_argument("--count", type=int, default=300, help="held-out prompts")
    p.add_argument("--steps", type=int, default=25)
    p.add_argument("--guidance", type=float, default=2.0, help="2 is what the model card recommends")
    p.add_argument("--batch", type=int, default=10, help="pictures painted at once")
    p.add_argument("--sheet", type=Path, help="write a contact sheet of the first 80 pictures")
    p.add_argument("--failures", type=Path, help="print what went wrong and write those pictures as a contact sheet")
    p.add_argument("--card", action="store_true", help="write the score into the model card, between its two marks")
    p.add_argument("--quick", action="store_true", help="only the shares of prompts")
    p.add_argument("--self-check", action="store_true", help="score the judge itself, without any model")
    args = p.parse_args()
    return self_check(args.count) if args.self_check else score(args)


if __name__ == "__main__":
    sys.exit(main())
