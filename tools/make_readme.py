"""Write README.md from nbs/index.ipynb: prose, code and outputs, with the tables that come from code filled in.

    python tools/make_readme.py [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def settings_table() -> str:
    """The settings as a Markdown table, from their rows."""
    from colab_gpu.config import SETTINGS

    lines = ["| setting | default | what it is |", "|---|---|---|"]
    for row in SETTINGS.values():
        default = "secret" if row.secret else f"`{row.default}`" if row.default else ""
        lines.append(f"| `{row.name}` | {default} | {row.help} |")
    return "\n".join(lines)


def routes_table() -> str:
    """The routes as a Markdown table, from the router."""
    import tempfile

    from colab_gpu.config import Settings
    from colab_gpu.server import App
    from colab_gpu.store import MemoryStore

    lines = ["| route | who | what it does |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        app = App(Settings({"COLAB_GPU_DATA": folder}, environ={}), MemoryStore())
    for route in app.router.routes:
        info = route.info or {}
        lines.append(f"| `{route.method} {route.pattern}` | {info.get('door', '')} | {info.get('summary', '')} |")
    return "\n".join(lines)


TABLES = {"<!-- settings -->": settings_table, "<!-- routes -->": routes_table}


def cell_text(cell: dict) -> str:
    """A cell as Markdown; directives are dropped, hidden cells are left out."""
    source = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown":
        for mark, table in TABLES.items():
            if mark in source:
                source = source.replace(mark, table())
        return source
    lines = source.split("\n")
    if any(line.startswith("#| hide") for line in lines):
        return ""
    shown = "\n".join(line for line in lines if not line.startswith("#|")).strip()
    outputs = [text for output in cell.get("outputs", []) if (text := output_text(output))]
    return "\n\n".join([f"```python\n{shown}\n```", *outputs]) if shown else ""


def output_text(output: dict) -> str:
    """An output as an indented block."""
    text = "".join(output.get("text", output.get("data", {}).get("text/plain", [])))
    return "\n".join("    " + line for line in text.rstrip().split("\n")) if text.strip() else ""


def render() -> str:
    """The whole README."""
    notebook = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))
    parts = [text for cell in notebook["cells"] if (text := cell_text(cell))]
    return "<!-- Written by tools/make_readme.py from nbs/index.ipynb: edit that. -->\n\n" + "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the file, or compare it."""
    target = ROOT / "README.md"
    if "--check" in sys.argv:
        sys.exit(0 if target.read_text(encoding="utf-8") == render() else "README.md is not what nbs/index.ipynb says: run tools/make_readme.py")
    target.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
