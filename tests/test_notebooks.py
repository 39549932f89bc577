"""Every notebook runs from top to bottom: one test each, so that a failure names its notebook."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "nbs").glob("*.ipynb"))


def wants_to_run(path):
    return json.loads(path.read_text(encoding="utf-8"))["metadata"].get("nbdev", {}).get("eval") != "false"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path, monkeypatch):
    from nbdev.test import test_nb

    if not wants_to_run(path):
        pytest.skip("the notebook says that it is not to be run here")
    monkeypatch.chdir(path.parent)
    passed, _ = test_nb(path, do_print=False)
    assert passed, f"{path.name} failed: its traceback is above"


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 13
