"""The house rules: what is committed agrees with itself. What can be read from the repository is read, so that a new room is held to them too."""

import ast
import configparser
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "colab_gpu"
MODULES = sorted(p for p in PACKAGE.glob("*.py") if not p.name.startswith("_"))
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)

# What a room must not import, itself: rooms by name, and names of other people's modules.
MUST_NOT_KNOW = {
    "errors": {"*"}, "config": {"httpd", "server"}, "jobs": {"store", "broker", "sqlite3", "time"}, "store": {"broker", "httpd"},
    "postgres": {"broker", "httpd"}, "broker": {"httpd", "sqlite3", "psycopg"}, "archive": {"broker", "store"},
    "httpd": {"config", "jobs", "store", "broker", "archive"}, "webhooks": {"httpd", "archive", "config", "sqlite3", "psycopg"},
    "bundle": {"httpd", "http", "urllib.request", "server", "client", "worker", "os"}, "server": {"sqlite3", "psycopg"}, "openai_api": {"sqlite3", "psycopg"},
    "ollama_api": {"sqlite3", "psycopg"}, "sdapi": {"sqlite3", "psycopg"}, "gpu": {"jobs"}, "images": {"httpd", "server", "client"},
    "schedulers": {"*"}, "packages": {"config"}, "pictures": {"httpd", "server", "client"}, "models": {"httpd", "server", "client", "torch", "diffusers"},
    "pipelines": {"httpd", "server", "client", "jobs"}, "painting": {"httpd", "server", "client", "config"},
    "guard": {"*"}, "runs": {"httpd", "server"}, "hearts": {"httpd", "server", "outbox"}, "outbox": {"client", "hearts", "httpd", "server"},
    "executors": {"jobs", "httpd", "server", "client", "worker"}, "service": {"httpd", "store", "broker", "server", "torch", "diffusers"},
    "daemon": {"jobs", "httpd", "server"}, "chat": {"httpd", "server"}, "providers": {"httpd", "server"},
    "tools": {"config", "store", "httpd"}, "tunnel": {"jobs"}, "panel": {"httpd", "store", "sqlite3"}, "mcp_server": {"server", "broker", "store"},
    "doctor": {"jobs", "broker", "store", "httpd", "server", "worker"}, "cli": {"broker", "store"},
}
# What a room must not reach at all, through whatever it imports: server and worker meet at the contract alone.
OUT_OF_REACH = {
    "server": {"client", "worker", "images", "chat", "gpu"}, "webhooks": {"server", "client", "worker"}, "bundle": {"server", "client", "worker", "httpd", "store", "broker"}, "worker": {"server", "store", "broker", "httpd"},
    "client": {"server", "store", "broker", "httpd", "worker"}, "images": {"server", "worker"}, "daemon": {"server", "worker"}, "chat": {"server", "worker"},
    "tools": {"server", "worker", "client"}, "providers": {"server", "worker", "images"},
    "tunnel": {"server", "worker", "client", "store", "broker"}, "executors": {"server", "worker", "store", "broker"},
    "service": {"server", "store", "broker", "httpd"},
}
# Third-party names live in one room each (`doctor` looks whether they can be imported).
HOMES = {"torch": {"pipelines", "gpu", "doctor"}, "diffusers": {"pipelines", "doctor"}, "transformers": {"pipelines"}, "accelerate": {"pipelines"},
         "safetensors": {"pipelines"}, "tokenizers": {"pipelines"}, "PIL": {"pictures", "painting"}, "numpy": {"painting"}, "requests": {"client"},
         "google": {"config"}, "kaggle_secrets": {"config"}, "ollama": {"chat"}, "httpx": {"chat"}, "ipywidgets": {"panel"}, "IPython": {"panel"}, "pyngrok": {"tunnel"},
         "psycopg": {"postgres"}, "mcp": {"mcp_server", "providers"}, "httpx2": {"providers"}, "fsspec": {"archive"}}
# What merely importing a room may load; everything else is loaded when it is first used.
LOADS = {"client": {"requests"}, "panel": {"ipywidgets", "IPython"}, "mcp_server": {"mcp"}, "postgres": {"psycopg"}}
LONGEST = 45
# Debts, to be paid off: exported cells that are longer (they may get fewer), public names without a docstring.
LONG_CELLS = {"01_config": 1, "02_jobs": 2, "03_store": 6, "05_broker": 3, "06_archive": 2, "07_httpd": 8, "08_server": 5, "12_client": 4,
              "14_images": 1, "15b_runs": 1, "15c_guard": 1, "15d_hearts": 2, "15e_outbox": 1, "16_worker": 1, "20_cli": 2}
UNDOCUMENTED = {("httpd", "is_json"), ("server", "flag_of")}


def run(*command, cwd=ROOT):
    return subprocess.run(command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, capture_output=True)


def python(code, cwd=ROOT):
    done = run(sys.executable, "-c", code, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@cache
def text_of(path):
    return path.read_text(encoding="utf-8")


def cells_of(path):
    return json.loads(text_of(path))["cells"]


def source_of(cell):
    return "".join(cell["source"])


def module_of(notebook):
    found = [m[1] for cell in cells_of(notebook) if (m := re.search(r"^#\|\s*default_exp\s+(\w+)", source_of(cell), re.M))]
    return found[0] if found else None


LAYERS = [name for name in map(module_of, NOTEBOOKS) if name]  # the notebooks' numbers are the order


def tree_of(path):
    return ast.parse(text_of(path))


@cache
def imports_of(module):
    """Every name that the module imports anywhere, as absolute dotted names."""
    found = set()
    for node in ast.walk(tree_of(PACKAGE / f"{module}.py")):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["colab_gpu" if node.level else "", node.module]))  # nbdev exports relative imports
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "colab_gpu" else {base}
    return found


def rooms_of(module):
    return {name.split(".")[1] for name in imports_of(module) if name.startswith("colab_gpu.")} - {"__version__"}


def tops_of(module):
    return {name.split(".")[0] for name in imports_of(module)} - {"colab_gpu"}


def reach_of(module):
    seen, todo = set(), {module}
    while todo:
        seen |= todo
        todo = {room for each in todo for room in rooms_of(each)} - seen
    return seen - {module}


# --- notebooks, modules, README


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    target = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "settings.ini"):
        shutil.copy(ROOT / name, target)
    for name in ("nbs", "colab_gpu"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "demo_model", ".ipynb_checkpoints"))
    return target


def test_modules_are_what_the_notebooks_export(copy):
    python("from nbdev.doclinks import nbdev_export; nbdev_export()", cwd=copy)
    for path in sorted((copy / "colab_gpu").glob("*.py")):
        assert text_of(path) == text_of(PACKAGE / path.name), f"{path.name} was edited by hand, or its notebook was not exported: make nbs"


def test_every_module_has_a_notebook():
    assert sorted(LAYERS) == [path.stem for path in MODULES]


def test_the_shipped_notebook_is_the_template():
    shipped, template = PACKAGE / "service_template.ipynb", ROOT / "nbs" / "colab_gpu_service_template.ipynb"
    assert shipped.read_bytes() == template.read_bytes(), "colab_gpu/service_template.ipynb is not nbs/colab_gpu_service_template.ipynb: make nbs"
    assert module_of(template) is None and json.loads(text_of(template))["metadata"]["nbdev"] == {"eval": "false"}, "it is not to be exported, nor run"


def test_notebooks_are_clean(copy):
    python("from nbdev.clean import nbdev_clean; nbdev_clean()", cwd=copy)
    for path in NOTEBOOKS:
        assert text_of(copy / "nbs" / path.name) == text_of(path), f"run nbdev-clean: {path.name} changes"


def test_readme_is_what_the_index_says():
    done = run(sys.executable, "tools/make_readme.py", "--check")
    assert done.returncode == 0, done.stderr


def test_readme_has_every_setting():
    from colab_gpu.config import SETTINGS

    assert re.findall(r"^\| `([A-Z][A-Z0-9_]+)` \|", text_of(ROOT / "README.md"), re.M) == list(SETTINGS)


def code_blocks(*languages):
    return re.findall(rf"^[ ]*```(?:{'|'.join(languages)})\n(.*?)^[ ]*```", text_of(ROOT / "README.md"), re.M | re.S)


def commands_in(text):
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and Path(words[0]).name in ("colab-gpu", "mcp-gpu-job"):
            yield words
        elif words[1:3] == ["-m", "colab_gpu"] or words[1:3] == ["-m", "colab_gpu.cli"]:
            yield ["colab-gpu", *words[3:]]


def test_readme_commands_exist():
    from colab_gpu.cli import build_parser, helper_parser
    from colab_gpu.config import Settings

    commands = [words for block in code_blocks("sh") for words in commands_in(block)]
    commands += [words for block in code_blocks("powershell") for words in commands_in(block.replace("\\", "/"))]
    assert len(commands) > 3
    for name, *words in commands:
        try:
            (build_parser() if name == "colab-gpu" else helper_parser(Settings())).parse_args(words)
        except SystemExit as e:
            pytest.fail(f"README.md: {name} {shlex.join(words)}: exit {e.code}")


def test_readme_files_and_targets_exist():
    readme, makefile = text_of(ROOT / "README.md"), text_of(ROOT / "Makefile")
    for target in re.findall(r"\bmake ([a-z]+)\b", "\n".join(code_blocks("sh"))):
        assert re.search(rf"^{target}:", makefile, re.M), f"README.md: there is no make {target}"
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", readme) if "://" not in link]
    for name in [*links, *re.findall(r"\b(?:tools|benchmarks|examples)/[\w./-]+\.\w+", readme)]:
        assert (ROOT / name).exists(), f"README.md: there is no {name}"


def test_readme_examples_compile():
    for block in code_blocks("python"):
        compile(block, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for block in code_blocks("sh"):
        for body in re.findall(r"-d '(\{.*?\})'", block, re.S):
            json.loads(body)


# --- metadata


@pytest.fixture(scope="module")
def metadata():
    """What setup.py hands to setuptools, which needs not be installed."""
    given = {}
    fake = types.ModuleType("setuptools")
    fake.setup, fake.find_packages = lambda **words: given.update(words), lambda **_: ["colab_gpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "setuptools", fake)
        exec(compile(text_of(ROOT / "setup.py"), "setup.py", "exec"), {"__file__": str(ROOT / "setup.py"), "__name__": "__main__"})  # noqa: S102
    return given


def test_versions_agree(metadata):
    from colab_gpu import __version__

    assert metadata["version"] == __version__
    assert f"## [{__version__}]" in text_of(ROOT / "CHANGELOG.md")


def test_extras_agree(metadata):
    config = configparser.ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    extras = {name.removesuffix("_requirements"): value.split() for name, value in config["DEFAULT"].items() if name.endswith("_requirements")}
    assert {name: needs for name, needs in metadata["extras_require"].items() if name != "all"} == extras


def test_a_wheel_of_ours_has_what_setuptools_packs(metadata):
    from colab_gpu.bundle import PACKED

    assert {"*.py", *metadata["package_data"]["colab_gpu"]} == set(PACKED)


def test_commands_can_be_called(metadata):
    for entry in metadata["entry_points"]["console_scripts"]:
        module, _, function = entry.partition("=")[2].partition(":")
        assert callable(getattr(importlib.import_module(module), function)), entry


def test_pins_are_within_the_requirements(metadata):
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)$", text_of(ROOT / "constraints-ci.txt"), re.M)}
    needs = [*metadata["install_requires"], *(need for extra in ("images", "chat", "dev") for need in metadata["extras_require"][extra])]
    for need in map(Requirement, needs):
        assert canonicalize_name(need.name) in pins, f"constraints-ci.txt does not pin {need.name}"
        assert pins[canonicalize_name(need.name)] in need.specifier, f"constraints-ci.txt: {need.name} is outside {need.specifier}"


@pytest.mark.skipif(os.name == "nt", reason="POSIX file modes")
def test_ci_can_be_run():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert run("bash", "-n", ".ci/run").returncode == 0


# --- ruff, mypy


def test_ruff():
    done = run(sys.executable, "-m", "ruff", "check", ".")
    assert done.returncode == 0, done.stdout


def test_mypy():
    done = run(sys.executable, "-m", "mypy")
    assert done.returncode == 0, done.stdout


# --- who may know whom


@each_module
def test_imports_point_upwards(path):
    for room in sorted(rooms_of(path.stem)):
        assert room in LAYERS[:LAYERS.index(path.stem)], f"{path.stem} must not import {room}: it comes later, or is no room"


@each_module
def test_rooms_keep_their_secrets(path):
    rooms, tops = rooms_of(path.stem), tops_of(path.stem)
    banned = MUST_NOT_KNOW.get(path.stem, set())
    assert not (rooms if "*" in banned else (rooms | tops) & banned), f"{path.stem} must not know {(rooms | tops) & banned or rooms}"
    assert not reach_of(path.stem) & OUT_OF_REACH.get(path.stem, set()), f"{path.stem} must not reach {reach_of(path.stem)}"


@each_module
def test_third_party_names_live_in_one_room(path):
    for name in sorted(tops_of(path.stem) - sys.stdlib_module_names):
        assert path.stem in HOMES.get(name, ()), f"{path.stem} must not import {name}"


@pytest.mark.parametrize("module", ["", *LAYERS])
def test_import_is_light(module):
    if not LOADS.get(module, set()) <= installed():
        pytest.skip(f"needs {LOADS[module]}")
    name = f"colab_gpu.{module}".rstrip(".")
    may = {top for room in {module, *(reach_of(module) if module else ())} for top in LOADS.get(room, ())}
    heavy = (set(HOMES) | {"fastcore", "nbdev"}) - may - {"google"}
    loaded = set(json.loads(python(f"import json, sys, {name}; print(json.dumps([*sys.modules]))")))
    assert not loaded & heavy, f"importing {name} loads {sorted(loaded & heavy)}"


@cache
def installed():
    from importlib.util import find_spec

    return {name for name in HOMES if find_spec(name)}


# --- how it reads


@each_module
def test_public_names_are_documented(path):
    public = next(ast.literal_eval(n.value) for n in tree_of(path).body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
    defined = [n for n in tree_of(path).body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and n.name in public]
    missing = {(path.stem, n.name) for n in defined if not ast.get_docstring(n) and not n.name.startswith("cmd_")}
    assert missing == {debt for debt in UNDOCUMENTED if debt[0] == path.stem}, "give it a docstring; or it has one now: take it out of UNDOCUMENTED"


def test_commands_have_help():
    """`cmd_` functions are documented where people look: in the parser."""
    import argparse

    from colab_gpu.cli import build_parser

    [commands] = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    helped = {choice.dest for choice in commands._choices_actions if choice.help}
    functions = {n.name for n in tree_of(PACKAGE / "cli.py").body if isinstance(n, ast.FunctionDef) and n.name.startswith("cmd_")}
    assert {name.removeprefix("cmd_").replace("_", "-") for name in functions} <= helped


@each_module
def test_functions_are_short(path):
    long = [f"{n.name} ({n.end_lineno - n.lineno + 1} lines)" for n in ast.walk(tree_of(path))
            if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.end_lineno - n.lineno + 1 > LONGEST]
    assert not long, f"longer than {LONGEST} lines: {long}"


@each_notebook
def test_exported_cells_are_short(path):
    long = {cell["id"]: n for cell in cells_of(path) if cell["cell_type"] == "code" and re.search(r"^#\|\s*exporti?\b", source_of(cell), re.M)
            and (n := source_of(cell).strip().count("\n") + 1) > LONGEST}
    assert len(long) <= LONG_CELLS.get(path.stem, 0), f"{path.name}: exported cells longer than {LONGEST} lines: {long}"


SECRETS = (r"hf_[A-Za-z0-9]{20,}", r"gh[pousr]_[A-Za-z0-9]{20,}", r"\bsk-[A-Za-z0-9_-]{20,}", r"\bAKIA[A-Z0-9]{16}\b",
           r"-----BEGIN [A-Z ]*PRIVATE KEY", r"\beyJ[\w-]{10,}\.[\w-]{10,}\.", r"Bearer [A-Za-z0-9_\-.]{24,}")
MACHINES = (r"/home/(?!me\b)\w+", r"/root/", r"/Users/\w+", r"[A-Z]:\\+Users", r"/tmp/(?:tmp|pytest)\w+", r"/site-packages/", r"\bat 0x[0-9a-f]{6,}")


def words_in(path):
    """What people read in a file; in a notebook not the pictures."""
    if path.suffix != ".ipynb":
        return text_of(path)
    shown = [source_of(cell) for cell in cells_of(path)]
    for cell in cells_of(path):
        for output in cell.get("outputs", []):
            data = [body for kind, body in output.get("data", {}).items() if not kind.startswith("image/")]
            bodies = [output.get("text", []), output.get("traceback", []), *data]
            shown += ["".join(body) if isinstance(body, list) else str(body) for body in bodies]
    return "\n".join(shown)


@pytest.mark.parametrize("path", [*NOTEBOOKS, *sorted(ROOT.glob("*.md"))], ids=lambda p: p.name)
def test_nothing_private_is_shown(path):
    for pattern in (*SECRETS, *MACHINES):
        assert not (found := re.search(pattern, words_in(path))), f"{path.name} shows {found[0]!r}"


@each_notebook
def test_notebooks_show_no_errors(path):
    failed = [cell["id"] for cell in cells_of(path) if any(output["output_type"] == "error" for output in cell.get("outputs", []))]
    assert not failed, f"{path.name}: these cells were saved with an error: {failed}"
