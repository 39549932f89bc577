"""The repository's own tools: what they decide and what they refuse."""

import base64
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup_env():
    return load("setup_env")


@pytest.fixture
def readme():
    return load("make_readme")


# --- setup_env


def run_setup(*args, **options):
    return subprocess.run([sys.executable, "tools/setup_env.py", *map(str, args)], cwd=ROOT, text=True, capture_output=True, **options)


def test_an_unknown_extra_is_refused(tmp_path):
    done = run_setup("imges", "--venv", tmp_path / "env")
    assert done.returncode == 2
    assert "'imges' is not one of images, chat" in done.stderr
    assert not (tmp_path / "env").exists()


def test_a_folder_of_somebody_else_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = run_setup("--venv", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"setup_env: {tmp_path} was not made by this script")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "env").write_text("mine")
    done = run_setup("--venv", tmp_path / "env")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (tmp_path / "env").read_text() == "mine"


@pytest.mark.skipif(os.name == "nt", reason="needs `sh`")
def test_an_old_python_gets_a_sentence(tmp_path):
    """The check comes before anything that an old Python cannot do; the oldest here that answers is asked."""
    for name in ("python3.6", "python3.7", "python3.8", "python3.9", "python3.10"):
        try:
            version = subprocess.run([name, "-c", "import sys; print(sys.version_info < (3, 11))"], text=True, capture_output=True).stdout.strip()
        except OSError:
            continue
        if version == "True":
            done = subprocess.run([name, "tools/setup_env.py", "images"], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            assert done.returncode == 1
            assert done.stdout.startswith("colab-gpu needs Python 3.11 or newer; this is 3.")
            return
    pytest.skip("no Python older than 3.11 here")


def test_old_syntax_up_to_the_check():
    import ast

    ast.parse((ROOT / "tools" / "setup_env.py").read_text(encoding="utf-8"), feature_version=(3, 7))


def test_a_silent_index_is_given_up_on(setup_env):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        assert not setup_env.reachable(url, timeout_s=0.2)
    assert not setup_env.reachable(url)


@pytest.fixture
def torch_asked(setup_env, monkeypatch, tmp_path):
    """What pip is asked for when torch is installed, with pip's answers given."""
    def ask(answers, reached=True, ci=False):
        asked, codes = [], iter(answers)
        monkeypatch.setattr(setup_env, "pip", lambda python, *args: asked.append(args) or subprocess.CompletedProcess(args, next(codes), "pip said no"))
        monkeypatch.setattr(setup_env, "reachable", lambda url: reached)
        monkeypatch.setenv("CI", "true") if ci else monkeypatch.delenv("CI", raising=False)
        setup_env.install_torch(tmp_path)
        return [("cpu" if setup_env.CPU_WHEELS in args else "ordinary", "pinned" if "-c" in args else "newest") for args in asked]
    return ask


@pytest.mark.parametrize(("answers", "options", "expected"), [
    ([0], {}, [("cpu", "pinned")]),
    ([1, 0], {}, [("cpu", "pinned"), ("cpu", "newest")]),
    ([1, 1, 0], {}, [("cpu", "pinned"), ("cpu", "newest"), ("ordinary", "pinned")]),
    ([0], {"reached": False}, [("ordinary", "pinned")]),
    ([1, 0], {"reached": False}, [("ordinary", "pinned"), ("ordinary", "newest")]),
    ([0], {"ci": True}, [("ordinary", "pinned")]),
])
def test_where_torch_comes_from(torch_asked, answers, options, expected):
    assert torch_asked(answers, **options) == expected


def test_pip_speaks_when_nothing_helps(torch_asked):
    with pytest.raises(SystemExit, match="pip said no[\\s\\S]*installing torch failed"):
        torch_asked([1, 1], reached=False)


class Tried:
    """An environment in a folder, with pip's and venv's work only recorded."""

    def __init__(self, setup_env, monkeypatch, folder):
        self.did, self.folder, self.setup_env, self.fail = [], folder, setup_env, False
        monkeypatch.setattr(setup_env.venv, "create", self.create)
        monkeypatch.setattr(setup_env, "install", self.install)
        monkeypatch.setattr(setup_env, "needs_cpu_build", lambda: False)
        monkeypatch.setattr(setup_env, "runs_here", lambda folder: setup_env.python_of(folder).exists())

    def create(self, folder, with_pip):
        python = self.setup_env.python_of(folder)
        python.parent.mkdir(parents=True)
        python.touch()
        self.did.append("create")

    def install(self, python, step, *args):
        if self.fail:
            raise KeyboardInterrupt
        self.did.append(args[-1].partition("[")[2].rstrip("]"))

    def __call__(self, *extras):
        self.did.clear()
        self.setup_env.setup(self.folder, list(extras))
        return list(self.did)


@pytest.fixture
def tried(setup_env, monkeypatch, tmp_path):
    return Tried(setup_env, monkeypatch, tmp_path / "env")


def test_a_second_run_does_nothing_and_extras_are_kept(tried):
    assert tried("images") == ["create", "images"]
    assert tried("images") == []
    assert tried("images", "dev") == ["dev,images"]
    assert tried("images") == []


def test_what_was_cut_short_is_done_again(tried):
    tried("images")
    tried.fail = True
    with pytest.raises(KeyboardInterrupt):
        tried("dev")
    tried.fail = False
    assert tried("images") == ["images"]


@pytest.mark.parametrize("name", ["settings.ini", "constraints-ci.txt"])
def test_changed_requirements_are_noticed(tried, setup_env, monkeypatch, tmp_path, name):
    tried("images")
    copy = tmp_path / "repo"
    for each in setup_env.INPUTS:
        (copy / each).parent.mkdir(parents=True, exist_ok=True)
        (copy / each).write_bytes((ROOT / each).read_bytes() + (b"\n# changed\n" if each == name else b""))
    stamp = setup_env.stamp_of(["images"])
    monkeypatch.setattr(setup_env, "ROOT", copy)
    assert setup_env.stamp_of(["images"])["inputs"] != stamp["inputs"]
    assert tried("images") == ["create", "images"], "another checkout's environment is made anew"


def test_another_python_makes_it_anew(tried, setup_env, monkeypatch):
    tried("images")
    monkeypatch.setattr(setup_env, "runs_here", lambda folder: False)
    (tried.folder / ".colab-gpu-stamp").write_text("{}")
    assert tried("images") == ["create", "images"]


# --- make_readme


def cells(*cells):
    return {"cells": [{"id": f"cell{i}", "metadata": {}, **cell} for i, cell in enumerate(cells)]}


def code(source, **data):
    outputs = [{"output_type": "display_data", "data": data}] if data else []
    return {"cell_type": "code", "source": source, "outputs": outputs}


PNG = b"\x89PNG\r\n\x1a\nrest"


def test_a_picture_is_saved_and_shown(readme):
    text, pictures = readme.render(cells(code("draw()", **{"image/png": base64.b64encode(PNG).decode(), "text/plain": "<a lighthouse>"})))
    assert "```python\ndraw()\n```\n\n![<a lighthouse>](docs/cell0-0.png)\n" in text
    assert pictures == {"docs/cell0-0.png": PNG}


def test_directives_and_hidden_cells_are_left_out(readme):
    text, _ = readme.render(cells(code("#| hide\nsecret()"), code("#| eval: false\nshown()", **{"text/plain": "42"})))
    assert text.split("\n\n", 1)[1] == "```python\nshown()\n```\n\n```text\n42\n```\n"


def test_a_table_stands_for_its_mark(readme):
    text, _ = readme.render(cells({"cell_type": "markdown", "source": "Before\n\n<!-- settings -->"}))
    assert "| setting | default | what it is |\n|---|---|---|\n| `STACK_API_BASE` |" in text
    with pytest.raises(KeyError, match="sttings"):
        readme.render(cells({"cell_type": "markdown", "source": "<!-- sttings -->"}))


def test_bars_in_a_cell_are_escaped(readme):
    assert readme.table(["a"], [["x | y\nz"]]) == "| a |\n|---|\n| x \\| y z |"


def test_check_names_what_is_stale(tmp_path):
    for name in ("tools", "nbs"):
        (tmp_path / name).mkdir()
    tool = tmp_path / "tools" / "make_readme.py"
    tool.write_bytes((ROOT / "tools" / "make_readme.py").read_bytes())
    (tmp_path / "nbs" / "index.ipynb").write_text(json.dumps(cells(code("draw()", **{"image/png": base64.b64encode(PNG).decode()}))))

    def make(*args):
        return subprocess.run([sys.executable, str(tool), *args], text=True, capture_output=True)

    assert "README.md, docs/cell0-0.png: not what nbs/index.ipynb says" in make("--check").stderr
    assert make().returncode == 0 and make("--check").returncode == 0
    (tmp_path / "docs" / "cell0-0.png").write_bytes(b"other")
    assert make("--check").stderr.startswith("docs/cell0-0.png: not what")


# --- build_notebooks


def test_what_is_no_notebook_is_refused():
    done = subprocess.run([sys.executable, "tools/build_notebooks.py", "nbs/none.ipynb"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 1 and done.stderr.endswith("none.ipynb is not a notebook.\n")
