"""The house rules: what is committed agrees with itself."""

import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(p for p in (ROOT / "colab_gpu").glob("*.py") if not p.name.startswith("_"))
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))

# Imports point upwards in this list only.
LAYERS = ["errors", "config", "jobs", "store", "broker", "archive", "httpd", "server", "client", "gpu", "images", "chat", "worker", "tunnel",
          "panel", "mcp_server", "cli"]
FORBIDDEN = {("worker", "server"), ("worker", "store"), ("worker", "broker"), ("client", "server"), ("client", "store"), ("broker", "httpd"),
             ("archive", "broker"), ("archive", "store"), ("httpd", "jobs"), ("httpd", "broker"), ("images", "client"), ("images", "httpd"),
             ("server", "client"), ("server", "worker"), ("server", "images")}
# Third-party names live in one room each.
HOMES = {"torch": {"images", "cli"}, "diffusers": {"images", "cli"}, "transformers": {"images"}, "PIL": {"images"}, "numpy": {"images"},
         "tokenizers": {"images"}, "requests": {"client"}, "google": {"config"}, "ollama": {"chat"}, "ipywidgets": {"panel"},
         "IPython": {"panel"}, "pyngrok": {"tunnel"}, "psycopg": {"postgres"}, "mcp": {"mcp_server"}}


def run(*command, **options):
    return subprocess.run(command, cwd=options.pop("cwd", ROOT), text=True, capture_output=True, **options)


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["colab_gpu" if node.level else "", node.module]))  # nbdev exports relative imports
            yield module
            if module == "colab_gpu":
                yield from (f"colab_gpu.{alias.name}" for alias in node.names)


def rooms_of(path):
    return {name.split(".")[1] for name in imports_of(path) if name.startswith("colab_gpu.")} - {"__version__"}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    target = tmp_path_factory.mktemp("copy") / "repo"
    ignore = shutil.ignore_patterns(".venv*", ".git", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "results")
    shutil.copytree(ROOT, target, ignore=ignore)
    return target


def test_modules_are_what_the_notebooks_export(copy):
    done = run(sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()", cwd=copy)
    assert done.returncode == 0, done.stderr
    for path in [*MODULES, ROOT / "colab_gpu" / "_modidx.py"]:
        exported = (copy / "colab_gpu" / path.name).read_text(encoding="utf-8")
        assert exported == path.read_text(encoding="utf-8"), f"{path.name} was edited by hand, or its notebook was not exported"


def test_every_module_has_a_notebook():
    written = {re.search(r"default_exp (\w+)", path.read_text(encoding="utf-8"))[1] for path in NOTEBOOKS
               if "default_exp" in path.read_text(encoding="utf-8")}
    assert written == {path.stem for path in MODULES}


def test_notebooks_are_clean(copy):
    before = {path.name: path.read_text(encoding="utf-8") for path in NOTEBOOKS}
    done = run(sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean()", cwd=copy)
    assert done.returncode == 0, done.stderr
    for name, text in before.items():
        assert (copy / "nbs" / name).read_text(encoding="utf-8") == text, f"run nbdev-clean: {name} changes"


def test_readme_is_what_the_index_says():
    done = run(sys.executable, "tools/make_readme.py", "--check")
    assert done.returncode == 0, done.stderr


def test_versions_agree():
    config = configparser.ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini")
    from colab_gpu import __version__

    assert config["DEFAULT"]["version"] == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_ruff():
    done = run(sys.executable, "-m", "ruff", "check", ".")
    assert done.returncode == 0, done.stdout


def test_mypy():
    done = run(sys.executable, "-m", "mypy")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_point_upwards(path):
    mine = LAYERS.index(path.stem)
    for room in rooms_of(path):
        assert LAYERS.index(room) < mine, f"{path.stem} must not import {room}"
        assert (path.stem, room) not in FORBIDDEN, f"{path.stem} must not know {room}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_third_party_names_live_in_one_room(path):
    for name in imports_of(path):
        top = name.split(".")[0]
        assert top in sys.stdlib_module_names or top == "colab_gpu" or path.stem in HOMES.get(top, ()), f"{path.stem} must not import {top}"


@pytest.mark.parametrize("module", ["colab_gpu", "colab_gpu.client", "colab_gpu.server", "colab_gpu.worker", "colab_gpu.images", "colab_gpu.cli"])
def test_import_is_light(module):
    heavy = ["torch", "diffusers", "transformers", "ipywidgets", "IPython", "mcp", "fastcore", "PIL", "numpy"]
    code = f"import sys, {module}; print([n for n in {heavy!r} if n in sys.modules])"
    assert run(sys.executable, "-c", code).stdout.strip() == "[]"


def test_server_does_not_load_requests():
    assert run(sys.executable, "-c", "import sys, colab_gpu.server; print('requests' in sys.modules)").stdout.strip() == "False"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_public_names_are_documented(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    nameless = {"cmd_", "is_", "bearer", "flag_of", "lane"}
    missing = [n.name for n in public if not ast.get_docstring(n) and not any(n.name.startswith(prefix) for prefix in nameless)]
    assert not missing, f"without a docstring: {missing}"


def exported_cells(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.search(r"^#\|\s*export", source, re.M):
            yield source


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_functions_are_short(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    long = [f"{n.name} ({n.end_lineno - n.lineno + 1} lines)" for n in ast.walk(tree)
            if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.end_lineno - n.lineno + 1 > 45]
    assert not long, f"longer than 45 lines: {long}"


def test_outputs_carry_no_machine():
    paths = [*NOTEBOOKS, ROOT / "README.md", ROOT / "CHANGELOG.md"]
    for path in paths:
        text = path.read_text(encoding="utf-8")
        for pattern in (r"/home/(?!me\b)\w+", r"/root/", r"/Users/\w+", r"/tmp/tmp\w+", r"hf_[A-Za-z0-9]{20,}", r"/site-packages/"):
            assert not re.search(pattern, text), f"{path.name} shows {pattern}"
