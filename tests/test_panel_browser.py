"""The panel as people see and press it: in JupyterLab and in Voila, by a browser, over a real service, server and model.

    SCREENSHOTS=docs python -m pytest tests/test_panel_browser.py      # the pictures in the README
"""

import os
import re
import sys

import nbformat
import pytest
from conftest import TOKEN
from processes import eventually, start_server

if sys.platform == "win32":
    pytest.skip("the stages need a POSIX system", allow_module_level=True)
for name in ("torch", "diffusers", "transformers", "ipywidgets"):
    pytest.importorskip(name)

from stages import ROOT, Browser, Lab, Voila, lacking, screenshot

for name in ("jupyterlab", "voila", "playwright"):
    try: __import__(name)
    except ImportError: lacking(f"{name} is missing: pip install 'colab-gpu[dev]'")

from colab_gpu.bundle import TEMPLATE, package_folder
from colab_gpu.client import Client

CALLER = "caller-token-for-tests"
CELLS = """from colab_gpu.panel import show
from colab_gpu.service import open_service

service = open_service()
show(service);"""
PROMPT = "a <b>red</b> house by the sea"
PRETTY = bool(os.environ.get("SCREENSHOTS"))
SIDE = 512 if PRETTY else 384


@pytest.fixture
def remote(tmp_path):
    """A server in a process of its own."""
    with start_server(tmp_path / "server", GPU_CLIENT_TOKEN=CALLER) as process: yield process


@pytest.fixture
def settings(remote, tmp_path):
    """The environment of a kernel whose notebook works for the server."""
    return {"STACK_API_BASE": remote.url, "WORKER_ID": "attic", "IMAGEN_MODEL_ID": "demo", "START_OLLAMA": 0, "OLLAMA_URL": "http://127.0.0.1:9", "WORKER_GUARD": 0,
            "WORKER_WAIT_SECONDS": 1, "COLAB_GPU_DATA": tmp_path / "data", "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT, "PIP_NO_INDEX": 1, **({} if PRETTY else {"IMAGEN_STEPS": 8})}


@pytest.fixture
def folder(tmp_path):
    """The folder of the notebooks."""
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks"


@pytest.fixture(params=["jupyterlab", "voila"])
def stage(request, processes, settings, folder, tmp_path):
    """JupyterLab or Voila, with a notebook that shows the panel; the notebook's file."""
    file = folder / "panel.ipynb"
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELLS)], metadata=spec), file)
    where = tmp_path / "jupyter"
    made = Lab(processes, where, folder, **settings) if request.param == "jupyterlab" else Voila(processes, where, file, **settings)
    made.name, made.file = request.param, file
    return made


def drawn(picture):
    """Whether an image on the page has been drawn."""
    return picture.count() and picture.first.evaluate("image => image.complete && image.naturalWidth > 0")


def test_the_panel_from_connect_to_stop(stage, remote, tmp_path):
    client, wrong = Client(remote.url, CALLER), []
    with Browser(tmp_path / "profile", 1000, 860) as browser:
        page = browser.page(stage.address("panel.ipynb"))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        stage.run_all(page)
        tab = lambda name: page.get_by_role("tab", name=name, exact=True).click()
        press = lambda name: page.locator("button").filter(has_text=re.compile(rf"^\s*{name}\s*$")).locator("visible=true").first.click()
        see = lambda text, whole=True: page.get_by_text(text, exact=whole).first.wait_for()

        see("Stopped")
        token = page.get_by_placeholder("the server's GPU_WORKER_TOKEN")
        token.fill("another-token")
        press("Connect")
        see(f"{remote.url} refused the token: STACK_WORKER_TOKEN must be the server's GPU_WORKER_TOKEN.")
        token.fill(TOKEN)
        press("Connect")
        see(f"Connected to {remote.url}.")
        assert token.input_value() == "" and TOKEN not in page.content()

        tab("Models")
        page.locator(".widget-dropdown select").locator("visible=true").first.select_option("demo")
        press("Preload")
        see("demo is loaded.")

        tab("Jobs")
        press("Start")
        see("Waiting for jobs")
        before = [client.submit("imagenGenerate", {"prompt": prompt, "seed": 7}) for prompt in ("a blue boat at night", "a green hill under a yellow sky") if PRETTY]
        for job in before: assert job.wait(200).status == "completed"
        job = client.submit("imagenGenerate", {"prompt": PROMPT if not PRETTY else "a red house by the sea", "seed": 3, "num_inference_steps": 50, "width": SIDE, "height": SIDE})
        see("At work")
        if not PRETTY: see(PROMPT, whole=False)
        pictures = page.locator("img.widget-image").locator("visible=true")
        at_work = page.locator(".widget-hbox").filter(has=page.locator(".progress")).locator(pictures)
        eventually(lambda: drawn(at_work), "the preview beside the bar", 120)
        if PRETTY: page.get_by_text(re.compile(r"step 4[5-9] of 50")).wait_for()
        screenshot(page, f"panel-{stage.name}")
        assert job.wait(200).status == "completed"
        see("completed")
        see("No job is under way.")
        eventually(lambda: drawn(pictures), "the thumbnail")
        if not PRETTY: see(PROMPT, whole=False)

        press("Drain")
        see("Stopped")
        press("Start")
        see("Waiting for jobs")
        press("Stop")
        see("Stopped")
        assert client.submit("imagenGenerate", {"prompt": "nobody takes it"}).status == "queued"
        if stage.name == "jupyterlab":
            page.keyboard.press("Control+s")
            eventually(lambda: "widget-view" in stage.file.read_text(), "the saved notebook")
            assert TOKEN not in stage.file.read_text()
        assert TOKEN not in page.content() and "Something went wrong" not in page.content() and not wrong


def test_the_notebook_in_jupyterlab(processes, settings, folder, remote, tmp_path):
    (folder / "colab-gpu.ipynb").write_bytes((package_folder() / TEMPLATE).read_bytes())
    lab = Lab(processes, tmp_path / "jupyter", folder, **settings, STACK_WORKER_TOKEN=TOKEN, GPU_CLIENT_TOKEN=CALLER)
    with Browser(tmp_path / "profile", 1000, 1250) as browser:
        page = browser.page(lab.address("colab-gpu.ipynb"))
        lab.run_all(page)
        shown = page.locator(".jp-OutputArea-output")
        shown.get_by_text("It goes on working.").wait_for()
        shown.get_by_text(re.compile(r"^Drawn through the queue by demo in")).wait_for()
        waiting = shown.get_by_text("Waiting for jobs", exact=True)
        waiting.wait_for()
        waiting.scroll_into_view_if_needed()
        screenshot(page, "notebook")
        assert TOKEN not in page.content() and CALLER not in page.content()
    assert Client(remote.url, CALLER).submit("imagenGenerate", {"prompt": "a blue boat"}).wait(200).status == "completed"
