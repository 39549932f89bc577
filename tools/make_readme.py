"""Write README.md from nbs/index.ipynb: prose, code and outputs, with the tables that come from code filled in.

    python tools/make_readme.py             # write README.md, and docs/ for its pictures
    python tools/make_readme.py --check     # say whether that would change anything
"""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HEAD = "<!-- Written by tools/make_readme.py from nbs/index.ipynb: edit that. -->"
PICTURES = {"image/png": "png", "image/jpeg": "jpg", "image/svg+xml": "svg"}


def cell(text: str) -> str:
    """`text` as a table's cell: on one line, its bars escaped."""
    return " ".join(text.split()).replace("|", "\\|")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(["| " + " | ".join(map(cell, row)) + " |" if i != 1 else "|" + "---|" * len(head) for i, row in enumerate([head, [], *rows])])


def settings_table() -> str:
    """The settings, from their rows."""
    from colab_gpu.config import SETTINGS

    def default(row: Any) -> str:
        return "secret" if row.secret else f"`{row.default}`" if row.default else ""

    return table(["setting", "default", "what it is"], [[f"`{row.name}`", default(row), row.help] for row in SETTINGS.values()])


def routes_table() -> str:
    """The routes, from the router."""
    import tempfile

    from colab_gpu.config import Settings
    from colab_gpu.server import App
    from colab_gpu.store import MemoryStore

    with tempfile.TemporaryDirectory() as folder:
        app = App(Settings({"COLAB_GPU_DATA": folder}, environ={}), MemoryStore())
    infos = [(f"`{route.method} {route.pattern}`", route.info or {}) for route in app.router.routes]
    return table(["route", "who", "what it does"], [[name, info.get("door", ""), info.get("summary", "")] for name, info in infos])


TABLES: dict[str, Callable[[], str]] = {"settings": settings_table, "routes": routes_table}


def fill(source: str) -> str:
    """Put the tables where `<!-- name -->` stands alone on a line. Raises `KeyError` for a name without a table."""
    return re.sub(r"^<!-- (\w+) -->$", lambda mark: TABLES[mark[1]](), source, flags=re.M)


def output_text(output: dict[str, Any], name: str, pictures: dict[str, bytes]) -> str:
    """An output as Markdown: a picture goes into `pictures` as `docs/name`, Markdown stays, text becomes a block. Errors are left out."""
    data = output.get("data", {})
    for kind, suffix in PICTURES.items():
        if kind in data:
            body = "".join(data[kind])
            pictures[f"docs/{name}.{suffix}"] = body.encode() if suffix == "svg" else base64.b64decode(body)
            said = cell("".join(data.get("text/plain", [])))
            return f"![{said if said and not said.startswith('<PIL.') else 'what this draws'}](docs/{name}.{suffix})"
    if "text/markdown" in data:
        return "".join(data["text/markdown"]).strip()
    text = "".join(output.get("text", data.get("text/plain", [])))
    return f"```text\n{text.strip(chr(10))}\n```" if text.strip() else ""


def cell_text(item: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """A notebook's cell as Markdown; directives are dropped, hidden cells left out."""
    source = "".join(item["source"]).strip()
    if item["cell_type"] != "code":
        return fill(source) if item["cell_type"] == "markdown" else ""
    if re.search(r"^#\|\s*hide\b", source, re.M):
        return ""
    shown = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
    outputs = [output_text(output, f"{item['id']}-{i}", pictures) for i, output in enumerate(item.get("outputs", []))]
    return "\n\n".join(filter(None, [f"```python\n{shown}\n```" if shown else "", *outputs]))


def render(notebook: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """The README of `notebook`, and its pictures by path."""
    pictures: dict[str, bytes] = {}
    parts = [text for item in notebook["cells"] if (text := cell_text(item, pictures))]
    return "\n\n".join([HEAD, *parts]) + "\n", pictures


def main() -> None:
    """Write the files, or compare them."""
    text, pictures = render(json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8")))
    files = {"README.md": text.encode(), **pictures}
    if "--check" in sys.argv[1:]:
        stale = [name for name, body in files.items() if not (ROOT / name).is_file() or (ROOT / name).read_bytes() != body]
        sys.exit(f"{', '.join(stale)}: not what nbs/index.ipynb says; run tools/make_readme.py" if stale else 0)
    for name, body in files.items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(body)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
