"""Where notebook and panel are tried out: an environment like Colab's, JupyterLab and Voila as processes of their own, and a browser.

Each helper that lacks something skips the test with a sentence that says what to install; in continuous integration it fails instead.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.metadata import distribution
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from processes import eventually

HERE = Path(__file__).parent
ROOT = HERE.parent
OURS = ("GPU_", "STACK_", "WORKER_", "IMAGEN_", "COLAB_", "OLLAMA_", "START_OLLAMA", "MCP_", "NGROK_", "TUNNEL", "HF_", "KAGGLE_", "PYTHONPATH", "JUPYTER")

# What matters of the packages in Colab's image of 2026-08 (googlecolab/backend-info). Its Python is 3.13; here it is the one that runs the
# tests, since PyTorch's CPU build is only at hand for that one. Its torch is 2.11; here it is the tests' own.
COLAB_HAS = ("diffusers==0.39.0", "transformers==5.15.*", "accelerate==1.14.*", "huggingface_hub==1.27.*", "pillow==11.3.*", "peft", "safetensors", "requests", "psutil", "pydantic",
             "ipywidgets==7.7.1", "ipykernel==6.17.1", "ipython==7.34.0")
LINKED = ("torch", "pip")  # taken from the tests' own environment: a gigabyte less to unpack


def lacking(sentence):
    "Skip the test; fail it in continuous integration, where nothing may be lacking."
    if os.environ.get("CI"):
        pytest.fail(sentence)
    pytest.skip(sentence)


def without_ours(environ=None):
    "The environment without anything that would set up colab-gpu, or lead to this checkout."
    return {name: value for name, value in (os.environ if environ is None else environ).items() if not name.startswith(OURS)}


# --- an environment like Colab's


def site(folder):
    "Where the environment in `folder` keeps its packages."
    return folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


def link(package, into):
    "Link an installed package, with its metadata, into another environment of the same Python."
    found = distribution(package)
    for name in {path.parts[0] for path in found.files if path.parts[0] not in ("..", "__pycache__")}:
        source = Path(found.locate_file(name))
        if source.exists() and not (into / name).exists():
            (into / name).symlink_to(source)


def colab_env():
    """The folder of an environment with what Colab has preinstalled. It is kept in .pytest_cache until its packages change.

    Making it takes 45 s on two cores, packages from a mirror nearby.
    """
    key = hashlib.sha256(json.dumps([COLAB_HAS, sys.version, distribution("torch").version, distribution("pip").version, str(ROOT)]).encode()).hexdigest()[:12]
    folder = ROOT / ".pytest_cache" / f"colab-env-{key}"
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / "colab-env.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready").exists():
            for old in folder.parent.glob("colab-env-*"):
                shutil.rmtree(old)
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
            for package in LINKED:
                link(package, site(folder))
            command = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", *COLAB_HAS]
            done = subprocess.run(command, capture_output=True, text=True, env=without_ours())
            if done.returncode:
                lacking(f"an environment like Colab's could not be made: {done.stderr[-2000:]}")
            (folder / "ready").touch()
    return folder


def overlay(folder, *bases):
    "A thin environment over others, whose packages it sees, the first one's first; what is installed into it stays in it. Its Python."
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site(folder) / "bases.pth").write_text("".join(f"{site(base)}\n" for base in bases))
    return folder / "bin" / "python"


def pip(python, *words):
    "`pip install` into an environment."
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words], check=True, env=without_ours())


# --- a notebook, run by a kernel


class Shown(list):
    "What a cell showed: notebook outputs."

    def __str__(self):
        return "".join(self.words(output) for output in self)

    @staticmethod
    def words(output):
        if output["output_type"] == "stream":
            return output["text"]
        if output["output_type"] == "error":
            return "\n".join(output["traceback"]) + "\n"
        return output["data"].get("text/plain", "") + "\n"

    @property
    def halted(self):
        "Whether the cell ended in an error, as a sentence or not."
        return any(output["output_type"] == "error" for output in self)

    @property
    def pictures(self):
        "The pictures it shows, as base64."
        return [data for output in self for kind, data in output.get("data", {}).items() if kind in ("image/png", "image/jpeg")]

    @property
    def widgets(self):
        "The ids of the widgets it shows."
        return [output["data"]["application/vnd.jupyter.widget-view+json"]["model_id"] for output in self
                if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]


def filled(notebook, values):
    "The notebook with other values in its form fields, the lines `NAME = …  #@param …`."
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for name, value in values.items():
        field = re.compile(rf"^({name}\s*=\s*).*?(\s*#\s*@param.*)$", re.M)
        holders = [cell for cell in cells if field.search(cell.source)]
        assert len(holders) == 1, f"{len(holders)} cells have a form field {name}"
        holders[0].source = field.sub(lambda found: f"{found[1]}{value!r}{found[2]}", holders[0].source)  # noqa: B023
    return notebook


class Notebook:
    """A notebook and its kernel, to be used in a `with` block.

    what: a path, or the notebook itself. python: the interpreter of the kernel. folder: where it runs. env: what its environment has besides.
    values: form fields by name. timeout_s: for a cell; a guard against hanging.
    """

    def __init__(self, what, python, folder, env=None, values=None, timeout_s=240):
        text = Path(what).read_text(encoding="utf-8") if isinstance(what, str | os.PathLike) else json.dumps(what)
        self.content = filled(nbformat.reads(text, as_version=4), values or {})
        self.folder, self.python, self.env, self.timeout_s = Path(folder), python, {**without_ours(), **{k: str(v) for k, v in (env or {}).items()}}, timeout_s
        self.cells = [index for index, cell in enumerate(self.content.cells) if cell.cell_type == "code"]
        self.runner, self.kernel = None, None
        self.took = {}  # seconds that each cell took when it ran last, for benchmarks

    def __enter__(self):
        specs = self.folder / "kernels"
        (specs / "stage").mkdir(parents=True, exist_ok=True)
        argv = [str(self.python), "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (specs / "stage" / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "stage", "language": "python"}))
        manager = AsyncKernelManager(kernel_name="stage", kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(specs)], ensure_native_kernel=False))
        self.runner = NotebookClient(self.content, km=manager, timeout=self.timeout_s, allow_errors=True, resources={"metadata": {"path": str(self.folder)}})
        self.kernel = self.runner.setup_kernel(env=self.env, cleanup_kc=True)  # the manager is ours, so is its end
        self.kernel.__enter__()
        return self

    def __exit__(self, *_):
        self.kernel.__exit__(None, None, None)

    def run(self, number, stop_when=None):
        """Run the code cell `number`, counted from 0; what it showed. `stop_when`: a fact to wait for, then Stop is pressed.

        Nothing may look like a traceback.
        """
        index = self.cells[number]
        cell = self.content.cells[index]
        began = time.monotonic()
        if stop_when is not None:
            threading.Thread(target=self._stop, args=(stop_when,), daemon=True).start()
        try:
            self.runner.execute_cell(cell, index)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
            raise AssertionError(f"code cell {number} did not end well: {str(e)[-1500:]}\n{Shown(cell.outputs)}") from None
        finally:
            self.took[number] = time.monotonic() - began
        shown = Shown(cell.outputs)
        for output in shown:
            words = Shown.words(output)
            assert "Traceback" not in words and not (output["output_type"] == "error" and len(output["traceback"]) > 1), f"code cell {number}:\n{words}"
        return shown

    def _stop(self, fact):
        eventually(fact, "what Stop waits for")
        os.kill(self.pid, signal.SIGINT)

    @property
    def pid(self):
        "The kernel's process."
        return self.runner.km.provisioner.process.pid

    def fill(self, **values):
        "Change form fields, as a person does between two runs."
        filled(self.content, values)

    def run_all(self, cells=None):
        "As *Run all* does it: from top to bottom, to the end or to the first cell that ends in an error. What each cell showed."
        shown = []
        for number in range(len(self.cells)) if cells is None else cells:
            shown.append(self.run(number))
            if shown[-1].halted:
                break
        return shown

    def ask(self, code):
        "Run `code` in the kernel, beside the notebook; what it showed."
        self.content.cells.append(nbformat.v4.new_code_cell(code))
        self.cells.append(len(self.content.cells) - 1)
        try:
            return self.run(len(self.cells) - 1)
        finally:
            self.cells.pop()
            self.content.cells.pop()


def far(url):
    "The address `url` of this machine as one that does not look like this machine, which is where a notebook on Colab would look in vain."
    name = socket.gethostname()
    try:
        socket.create_connection((name, int(url.rpartition(":")[2]))).close()
    except OSError:
        name = "0.0.0.0"  # noqa: S104  (to Linux, as a destination, this very machine)
    return f"http://{name}:{url.rpartition(':')[2]}"


def colab_page(folder, **page):
    "Colab's page, as `tests/colab_stand_in` describes it; the environment that a kernel on Colab has."
    file = Path(folder) / "colab.json"
    file.write_text(json.dumps(page))
    return {"COLAB_STAND_IN": str(file), "COLAB_RELEASE_TAG": "release-colab_20260828-060046_RC00", "PYTHONPATH": str(HERE / "colab_stand_in")}


def kaggle_page(folder, **secrets):
    "Kaggle's page, likewise."
    file = Path(folder) / "kaggle.json"
    file.write_text(json.dumps({"secrets": secrets}))
    return {"KAGGLE_STAND_IN": str(file), "KAGGLE_KERNEL_RUN_TYPE": "Interactive", "PYTHONPATH": str(HERE / "kaggle_stand_in")}


# --- JupyterLab and Voila


def jupyter_env(folder):
    "Folders of its own for everything that Jupyter keeps."
    made = {f"JUPYTER_{kind}_DIR": Path(folder) / kind.lower() for kind in ("CONFIG", "DATA", "RUNTIME")}
    for each in made.values():
        each.mkdir(parents=True, exist_ok=True)
    return {**{name: str(value) for name, value in made.items()}, "JUPYTER_PLATFORM_DIRS": "1", "PYTHONPATH": str(ROOT), "HOME": str(folder)}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as door:
        return door.getsockname()[1]


class Lab:
    """JupyterLab on the folder `notebooks`, as a process; `address(name)` shows one notebook alone."""

    def __init__(self, start, folder, notebooks, **env):
        settings = ["--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", "--LabApp.extension_manager=readonly", f"--ServerApp.root_dir={notebooks}"]
        quiet = Path(folder) / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
        quiet.mkdir(parents=True)
        (quiet / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", *settings]
        self.process = start(*command, **{**jupyter_env(folder), "JUPYTER_TOKEN": "lab-token-for-tests", **env})
        self.url = self.process.wait_for(r"(http://127\.0\.0\.1:\d+)/lab")[1]

    def address(self, name):
        return f"{self.url}/doc/tree/{name}?token=lab-token-for-tests&reset"

    @staticmethod
    def run_all(page):
        "Wait for the kernel, and press *Run All Cells* in the menu."
        page.get_by_text("| Idle").wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


class Voila:
    """Voila on one notebook, as a process."""

    def __init__(self, start, folder, notebook, **env):
        command = [sys.executable, "-m", "voila", str(notebook), "--no-browser", f"--port={free_port()}", "--Voila.ip=127.0.0.1"]
        self.process = start(*command, **{**jupyter_env(folder), **env})
        self.process.wait_for(r"is running at")
        self.url = self.process.wait_for(r"^(http://\S+)")[1]

    def address(self, name=""):
        return self.url

    @staticmethod
    def run_all(page):
        "Voila runs the notebook by itself."


# --- a browser


CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage", "--hide-scrollbars", "--force-color-profile=srgb")


def chromium():
    "The browser's program."
    found = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    return found or lacking("these tests need Chromium: apt-get install chromium, or https://www.chromium.org/getting-involved/download-chromium")


class Browser:
    """Chromium with a profile of its own, to be used in a `with` block; `page()` opens another page."""

    def __init__(self, folder, width=1100, height=1400):
        self.program = chromium()
        self.folder, self.size = folder, {"width": width, "height": height}

    def __enter__(self):
        from playwright.sync_api import sync_playwright

        self.playwright = sync_playwright().start()
        try:
            self.context = self.playwright.chromium.launch_persistent_context(str(self.folder), executable_path=self.program, headless=True, args=list(QUIET),
                                                                              viewport=self.size, env={**without_ours(), "HOME": str(self.folder)})
        except BaseException:
            self.playwright.stop()
            raise
        self.context.set_default_timeout(60_000)
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is not None and self.context.pages:  # pytest keeps the folder
                self.context.pages[-1].screenshot(path=Path(self.folder).parent / "failed.png")
            self.context.close()
        finally:
            self.playwright.stop()

    def page(self, address):
        page = self.context.new_page()
        page.goto(address)
        return page


def screenshot(page, name, element=None):
    "Keep a picture of the page, or of an element of it, in the folder SCREENSHOTS, if that is set."
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        time.sleep(0.3)  # fonts and pictures get a moment, for the looks alone
        (element or page).screenshot(path=Path(folder) / f"{name}.png")
