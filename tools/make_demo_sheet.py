"""Paint the README's contact sheet with the demo model, with fixed prompts and seeds: what the model does, unpicked.

    python tools/make_demo_sheet.py colab_gpu/demo_model docs/demo-contact-sheet.png
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from score_demo_model import painter, sheet

PROMPTS = ("a red circle on a blue background", "a small yellow star in the top left corner, green background",
           "a large pink heart on a black background", "a green ring on a white ground",
           "a red triangle to the left of a blue square on a yellow background", "an orange square above a purple star on white",
           "a house by the sea at sunset", "green hills with two trees on a sunny day", "a boat on the sea at night, moon and stars",
           "a house on the hills by day under the sun", "a sunset over the sea", "hills at night with stars")


def main() -> None:
    """Paint each prompt with the product's defaults and its number as the seed, and save the sheet."""
    paint = painter(Path(sys.argv[1]), 25, 7.0, 4)
    image = sheet(paint(list(PROMPTS), list(range(len(PROMPTS))), ""), 6, 192)
    image.quantize(128).save(sys.argv[2], optimize=True)


if __name__ == "__main__":
    main()
