"""Every notebook runs from top to bottom in a process of its own, and its committed outputs are what the run shows."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
HANG_S = 600  # a guard against hanging, far above what any notebook takes
RUN = """
import sys
from nbdev.config import get_config
from nbdev.test import test_nb
passed, _ = test_nb(sys.argv[1], skip_flags=get_config().tst_flags.split(), save=True)
sys.exit(not passed)
"""


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def wants_to_run(notebook):
    return notebook["metadata"].get("nbdev", {}).get("eval") != "false"


def copy_of(path, folder):
    """The notebook in a repository of its own, so that saving its outputs changes nothing here."""
    for name in ("pyproject.toml", "settings.ini"):
        shutil.copy(ROOT / name, folder)
    (folder / "nbs").mkdir()
    return Path(shutil.copy(path, folder / "nbs"))


def blame(path, said):
    """The name of the notebook, its cell that failed, and what was said."""
    number = re.search(r"While Executing Cell #(\d+)", said)
    cells = read(path)["cells"]
    found = cells[int(number[1]) - 1:] if number else []
    where = f", cell {found[0]['id']}:\n{''.join(found[0]['source'])}\n" if found else ":\n"
    return f"{path.name}{where}{said}"


def texts(cell):
    """What a cell shows, but pictures: their last bits differ from machine to machine."""
    return "\n".join("".join(part) for output in cell.get("outputs", [])
                     for part in [output.get("text", []), *(body for kind, body in output.get("data", {}).items() if kind.startswith("text/"))]
                     ).strip()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path, tmp_path):
    if not wants_to_run(read(path)):
        pytest.skip("the notebook says that it is not to be run here")
    copy = copy_of(path, tmp_path)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", RUN, str(copy)], cwd=copy.parent, env=env, text=True, capture_output=True, timeout=HANG_S)
    assert done.returncode == 0, blame(path, done.stderr + done.stdout)
    for was, now in zip(read(path)["cells"], read(copy)["cells"], strict=True):
        source = "".join(was["source"])
        assert texts(now) == texts(was), f"{path.name}, cell {was['id']}: its committed output is not what it shows; run make nbs\n{source}"


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 13
