"""The notebook that people open, run as they run it: by a kernel in an environment like Colab's, which lacks this package."""

import base64
import json
import os
import shutil
import socket
import sys
import threading

import psutil
import pytest
from conftest import TOKEN
from processes import eventually, start_server

if sys.platform == "win32":
    pytest.skip("environments are linked together, which needs a POSIX system", allow_module_level=True)
for name in ("torch", "diffusers", "transformers", "nbclient", "ipywidgets", "pyngrok"):
    pytest.importorskip(name)

from stages import Notebook, colab_env, colab_page, far, kaggle_page, overlay, pip
from tunnel_agents import AUTH, StandIn

from colab_gpu import bundle
from colab_gpu.client import Client

CALLER = "caller-token-for-tests"
TERMS, SETTINGS, MACHINE, PACKAGE, INSTALL, START, TRY, STOP = range(8)  # the notebook's code cells
TICKED = {"I_HAVE_READ_THE_TERMS_AND_MAY_DO_THIS_HERE": True}
TEMPLATE = bundle.package_folder() / bundle.TEMPLATE
SECRETS = (TOKEN, AUTH, CALLER)
# No Ollama here, and nobody to install one; a notebook on a machine of one's own finds its settings in the environment.
# Small pictures gain nothing from a second thread, and on a busy machine two that wait for each other cost tenfold.
SMALL = {"IMAGEN_STEPS": 5, "IMAGEN_WIDTH": 256, "IMAGEN_HEIGHT": 256, "OMP_NUM_THREADS": 1}
PLAIN = {**SMALL, "START_OLLAMA": 0, "OLLAMA_URL": "http://127.0.0.1:9", "WORKER_GUARD": 0, "POLL_INTERVAL": 0.2, "WORKER_WAIT_SECONDS": 1}
NO_INDEX = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}


@pytest.fixture(scope="module")
def base():
    """An environment with what Colab has."""
    return colab_env()


@pytest.fixture(scope="module")
def with_package(base, tmp_path_factory):
    """An environment that has this package besides, from its wheel."""
    folder = tmp_path_factory.mktemp("with-package")
    name, wheel = bundle.build_wheel()
    (folder / name).write_bytes(wheel)
    pip(overlay(folder / "env", base), "--no-deps", "--no-index", folder / name)
    return folder / "env"


@pytest.fixture(scope="module")
def single_file(tmp_path_factory):
    """The single-file notebook, as `colab-gpu notebook` writes it."""
    path = tmp_path_factory.mktemp("notebook") / "colab-gpu.ipynb"
    path.write_bytes(bundle.notebook_json())
    return path


@pytest.fixture
def opened(base, with_package, tmp_path):
    """Opens notebooks, each on a machine of its own, and ends their kernels. `what`: the template, on a machine that has the package, if not said."""
    kernels = []

    def open_one(values=None, what=None, **env):
        folder = tmp_path / f"machine{len(kernels)}"
        folder.mkdir()
        python = overlay(folder / "env", base) if what else overlay(folder / "env", with_package, base)
        home = {"HOME": folder, "COLAB_GPU_DATA": folder / "data"}
        kernels.append(Notebook(what or TEMPLATE, python, folder, {**PLAIN, **home, **env}, values).__enter__())
        return kernels[-1]

    yield open_one
    for kernel in kernels:
        pid = kernel.pid
        kernel.__exit__()
        assert not psutil.pid_exists(pid), "its kernel has ended"


@pytest.fixture
def remote(tmp_path):
    """A server elsewhere, in a process of its own."""
    with start_server(tmp_path / "server", GPU_CLIENT_TOKEN=CALLER) as process: yield process


def live(server):
    """The ids of the workers that the server hears of."""
    return {row["id"] for row in Client(server.url, CALLER).workers() if row["live"]}


def draw(url, prompt):
    """A job's end, asked for from outside."""
    return Client(url, CALLER).submit("imagenGenerate", {"prompt": prompt, "seed": 3}).wait(200)


def loops(notebook):
    """How many workers poll in the notebook's kernel."""
    return int(str(notebook.ask("import threading; print(sum(t.name.startswith('worker-') for t in threading.enumerate()))")))


def children_of(pid):
    """The processes that a process has started, and theirs."""
    return psutil.Process(pid).children(recursive=True)


def running(family):
    """Those that still run."""
    return [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_one_file_installs_itself_connects_draws_and_stops(opened, single_file, remote):
    notebook = opened({"STACK_API_BASE": remote.url, "WORKER_ID": "attic"}, single_file, STACK_WORKER_TOKEN=TOKEN, GPU_CLIENT_TOKEN=CALLER)
    shown = notebook.run_all()
    assert len(shown) == 8 and not any(cell.halted for cell in shown), shown[-1]
    assert "This is not Colab" in str(shown[TERMS])
    assert "diffusers 0.39.0" in str(shown[MACHINE]) and "ipywidgets 7.7.1" in str(shown[MACHINE])
    assert ("No GPU here: the demo model draws without one" in str(shown[MACHINE])) == (shutil.which("nvidia-smi") is None)
    assert "from this notebook" in str(shown[INSTALL]) and "ollama" in str(shown[INSTALL])
    assert f"attic polls {remote.url} for imagenGenerate" in str(shown[START]) and shown[START].widgets
    assert base64.b64decode(shown[TRY].pictures[0]).startswith(b"\x89PNG") and "Drawn through the queue by demo" in str(shown[TRY])
    job = draw(remote.url, "a red circle on a blue ground")
    assert job.status == "completed" and job.data["workerId"] == "attic" and job.png.startswith(b"\x89PNG")
    # Run all once more, in the same kernel: nothing is installed again, and there is one worker, not two.
    again = notebook.run_all()
    assert len(again) == 8 and not any(cell.halted for cell in again) and "added" not in str(again[INSTALL])
    assert loops(notebook) == 1 and live(remote) == {"attic"} and draw(remote.url, "a blue square").status == "completed"
    notebook.fill(STOP_NOW=True)
    assert "Stopped" in str(notebook.run(STOP))
    assert Client(remote.url, CALLER).submit("imagenGenerate", {"prompt": "later"}).status == "queued"
    assert loops(notebook) == 0
    assert not any(secret in json.dumps(notebook.content) for secret in SECRETS)


def test_all_in_one_on_colab_with_its_secrets(opened, tmp_path):
    agents = StandIn(tmp_path)
    page = colab_page(tmp_path, secrets={"NGROK_AUTHTOKEN": AUTH, "GPU_CLIENT_TOKEN": CALLER})
    notebook = opened({"MODE": "all in one"}, **page, NGROK_PATH=agents.bin / "ngrok", STAND_IN_FOLDER=agents.folder, TUNNEL_START_SECONDS=200)
    first = notebook.run_all()
    assert len(first) == 1 and first[0].halted and "tick its box" in str(first[0]), "nothing starts before the terms are acknowledged"
    notebook.fill(**TICKED)
    shown = notebook.run_all()
    assert len(shown) == 8 and not any(cell.halted for cell in shown), shown[-1]
    assert "pyngrok" in str(shown[INSTALL])
    url = str(shown[START]).rpartition("Public at ")[2].split()[0].rstrip(".")
    assert shown[TRY].pictures and draw(url, "a house by the sea").status == "completed"
    family = children_of(notebook.pid)
    assert any("serve" in process.cmdline() for process in family)
    assert not any(secret in word for process in family for word in process.cmdline() for secret in SECRETS)
    notebook.fill(STOP_NOW=True)
    assert "Stopped" in str(notebook.run(STOP))
    eventually(lambda: not running(family), "the end of server and tunnel")
    assert not any(secret in json.dumps(notebook.content) for secret in SECRETS)


def test_a_worker_on_colab_and_what_goes_wrong_there(opened, remote, tmp_path):
    page = colab_page(tmp_path, secrets={}, refused=["STACK_WORKER_TOKEN"])
    (tmp_path / "colab.json").write_text(json.dumps({"away": True}))
    notebook = opened({"STACK_API_BASE": remote.url, "IMAGEN_MODEL_ID": "demo", "MODELS_ON_DRIVE": True, "PRELOAD_MODELS": False, **TICKED}, **page, **NO_INDEX)

    def start(page=None, **values):
        if page is not None: (tmp_path / "colab.json").write_text(json.dumps(page))
        notebook.fill(**values)
        notebook.run(SETTINGS)
        return str(notebook.run(START))

    assert [cell.halted for cell in notebook.run_all(range(INSTALL + 1))] == [False] * 5
    said = start()
    assert "this Colab machine itself" in said and "Google Drive was not mounted (mount failed: the person at the page declined)" in said
    away = far(remote.url)
    assert "No worker's token yet" in start(STACK_API_BASE=away, MODELS_ON_DRIVE=False), "nobody at the page"
    assert "No worker's token yet" in start({"secrets": {"STACK_WORKER_TOKEN": TOKEN}, "refused": ["STACK_WORKER_TOKEN"]}), "the notebook may not read it"
    assert "No worker's token yet" in start({"secrets": {}}), "there is none"
    assert "refused the token" in start({"secrets": {"STACK_WORKER_TOKEN": "another-token"}})
    assert "must be an address such as" in start({"secrets": {"STACK_WORKER_TOKEN": TOKEN}}, STACK_API_BASE="my server")
    assert "does not answer yet" in start(STACK_API_BASE="http://nobody.invalid")
    assert "polls" in start(STACK_API_BASE=away) and live(remote) == {"colab-worker"}
    assert draw(remote.url, "it works at last").status == "completed"
    assert not any(secret in json.dumps(notebook.content) for secret in SECRETS)


def test_on_kaggle_without_internet(opened, single_file, remote, tmp_path):
    page = kaggle_page(tmp_path, STACK_WORKER_TOKEN=TOKEN)
    shown = opened({}, TEMPLATE, **page, **NO_INDEX).run_all()
    assert len(shown) == INSTALL + 1 and shown[-1].halted and "colab-gpu could not be installed: " in str(shown[-1])
    shown = opened({"STACK_API_BASE": far(remote.url)}, single_file, **page, **NO_INDEX).run_all()
    assert len(shown) == 8 and not any(cell.halted for cell in shown)
    assert "from this notebook" in str(shown[INSTALL]) and "ollama" in str(shown[INSTALL]) and "reaches the internet" in str(shown[INSTALL])
    assert "polls" in str(shown[START]) and live(remote) == {"colab-worker"}
    assert shown[TRY].pictures and "here and not through the queue" in str(shown[TRY]), "a worker's token is no caller's"


class Deaf:
    """A server that takes connections and never answers."""

    def __init__(self):
        self.door, self.taken = socket.create_server(("127.0.0.1", 0)), []
        self.url = f"http://127.0.0.1:{self.door.getsockname()[1]}"
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self):
        while True:
            try: self.taken.append(self.door.accept()[0])
            except OSError: return

    def __enter__(self): return self

    def __exit__(self, *_):
        for each in (self.door, *self.taken): each.close()


def test_a_fresh_kernel_and_cells_that_are_stopped(opened, remote):
    with Deaf() as deaf:
        known = {"STACK_WORKER_TOKEN": TOKEN, "GPU_CLIENT_TOKEN": CALLER}
        notebook = opened({"STACK_API_BASE": deaf.url, "PRELOAD_MODELS": False}, **known, **{**NO_INDEX, "PIP_INDEX_URL": deaf.url})
        for number in (INSTALL, START, TRY):
            shown = notebook.run(number)
            assert shown.halted and "run all cells from the top" in str(shown)
        assert "Nothing was started" in str(notebook.run(STOP))
        notebook.run_all(range(INSTALL))
        shown = notebook.run(INSTALL, stop_when=lambda: deaf.taken)
        assert shown.halted and "Stopped. Run this cell again to go on." in str(shown)
        assert not running(children_of(notebook.pid)), "pip is stopped with it"
        notebook.ask(f"import os; os.environ['PIP_INDEX_URL'] = {NO_INDEX['PIP_INDEX_URL']!r}")
        assert "what was here" in str(notebook.run(INSTALL))
        deaf.taken.clear()
        shown = notebook.run(START, stop_when=lambda: deaf.taken)
        assert shown.halted and "Stopped. Run this cell again to go on." in str(shown)
    notebook.fill(STACK_API_BASE=remote.url)
    notebook.run(SETTINGS)
    assert "polls" in str(notebook.run(START))
    shown = notebook.run(TRY, stop_when=lambda: Client(remote.url, CALLER).jobs())
    assert not shown.pictures and "Stopped. Run this cell again to go on." in str(shown)
    shown = notebook.run(TRY)
    assert shown.pictures and "Drawn through the queue" in str(shown)
