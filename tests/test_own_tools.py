"""Tools of one's own: the README's example and small files, served by `colab-gpu worker --load` as a process."""

import base64
import io
import re
import sys
from pathlib import Path

import pytest
from conftest import TOKEN
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from colab_gpu.client import Client
from colab_gpu.errors import InvalidInput, InvalidPayload
from colab_gpu.jobs import LocalContext
from colab_gpu.tools import FunctionTool, load_tools, run_tool

ROOT = Path(__file__).resolve().parent.parent
GATED = '''
import os, time
from colab_gpu.tools import tool

@tool("gated")
def gated(mark: str, gate: str, *, ctx):
    open(mark, "w").close()
    step = 0
    while not os.path.exists(gate):
        ctx.check()
        step += 1
        ctx.progress(step, 1_000_000)
        time.sleep(0.01)
    return {"steps": step}
'''


def readme_example():
    "The whole file that the README shows."
    [block] = [b for b in re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S) if '@tool("upscale")' in b]
    return block


def picture(colours, size=(40, 30)):
    from PIL import Image

    image = Image.new("RGB", size, colours[0])
    image.paste(colours[1], (0, 0, size[0] // 2, size[1]))
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


@pytest.fixture
def own_worker(processes, serve, tmp_path):
    """A server, and a function that starts `colab-gpu worker` with these arguments."""
    server = serve()

    def start(*argv, ready=True, **env):
        process = processes(sys.executable, "-m", "colab_gpu", "worker", *argv, STACK_API_BASE=server.url, STACK_WORKER_TOKEN=TOKEN, START_OLLAMA=0,
                            OLLAMA_URL="http://127.0.0.1:9", WORKER_ID="own", WORKER_WAIT_SECONDS=2, PYTHONPATH=ROOT, **env)
        if ready: process.wait_for("Worker loop started")
        return process

    start.client = Client(server.url)
    return start


def written(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_the_example_of_the_readme_is_served_from_a_file(own_worker, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    worker = own_worker("--load", written(tmp_path, "upscale.py", readme_example()), "--tools", "upscale")
    assert worker.wait_for("Worker loop started").string.endswith("(upscale)")
    assert not [line for line in worker.lines if line.startswith("[ollama]")], "what is not served is not looked for"
    image = base64.b64encode(picture(("teal", "orange"))).decode()
    job = own_worker.client.submit("upscale", {"image": f"data:image/png;base64,{image}", "doublings": "2"}).wait()
    assert job.status == "completed" and (job.result["width"], job.result["height"]) == (160, 120), job.data
    assert job.data["workerId"] == "own" and [a["name"] for a in job.data["artifacts"]] == ["image.png"]
    big = Image.open(io.BytesIO(own_worker.client.artifact(job.id, "image.png")))
    assert big.size == (160, 120) and big.getpixel((10, 60)) == (255, 165, 0) and big.getpixel((150, 60)) == (0, 128, 128)
    for payload, words in (({"image": "?"}, "`image` must be bytes in base64"), ({"image": image, "doublings": 9}, "from 1 to 4"), ({}, "`image` is required"),
                           ({"image": base64.b64encode(b"no picture").decode()}, "no picture"), ({"image": image, "doubling": 2}, "did you mean `doublings`")):
        job = own_worker.client.submit("upscale", payload).wait()
        assert (job.status, job.data["kind"], job.data["attempts"]) == ("failed", "invalid_input", 1) and words in job.detail, job.data


def test_the_example_can_be_tried_without_a_server(tmp_path):
    pytest.importorskip("PIL")
    [upscale] = load_tools([str(written(tmp_path, "upscale.py", readme_example()))])
    image = base64.b64encode(picture(("teal", "orange"))).decode()
    run = run_tool(upscale, {"image": image, "doublings": 3})
    assert run.result == {"width": 320, "height": 240} and run.steps == [(1, 3), (2, 3), (3, 3)] and run.artifacts["image.png"][:4] == b"\x89PNG"
    with pytest.raises(Exception, match="canceled"): run_tool(upscale, {"image": image, "doublings": 3}, cancel_at=1)
    with pytest.raises(InvalidInput, match="from 1 to 4"): run_tool(upscale, {"image": image, "doublings": 5})
    with pytest.raises(InvalidPayload, match="whole number"): run_tool(upscale, {"image": image, "doublings": 1.5})


SCALARS = st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=8) | st.sampled_from(
    ["1", " 2.5", "1e999", "-0", "nan", "true", "data:x;base64,AAAA", "AAAA", "\ud800", "0" * 5000])
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)
KINDS = {"whole": int, "fraction": float, "text": str, "switch": bool, "data": bytes, "rows": list, "box": dict}
EMPTY, BOX = [], {}


@settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow])
@example({"whole": "3", "fraction": 1, "text": "a", "switch": "true", "data": "AAAA", "rows": [1], "box": {"a": 1}, "maybe": None})
@example({"fraction": 10**400})
@given(st.dictionaries(st.sampled_from([*KINDS, "maybe", "ctx", "other"]), VALUES, max_size=3))
def test_a_tool_gets_what_it_declared_or_is_not_called(payload):
    "Whatever the payload: each argument has its annotated type, or the caller is told which field is wrong."
    got = {}

    def many(whole: int = 0, fraction: float = 0.0, text: str = "", switch: bool = False, data: bytes = b"", rows: list = EMPTY, box: dict = BOX,
             maybe: int | None = None, *, ctx):
        got.update(locals())

    context = LocalContext()
    try: FunctionTool("many", many).run(payload, context)
    except InvalidPayload as e:
        assert e.field in payload and not got
        return
    assert got.pop("ctx") is context and all(type(got[name]) is kind for name, kind in KINDS.items()) and type(got["maybe"]) in (int, type(None))
    assert got["fraction"] - got["fraction"] == 0, "finite"


def test_a_tool_of_ones_own_is_watched_and_canceled(own_worker, tmp_path):
    own_worker("--load", written(tmp_path, "gated.py", GATED), "--tools", "gated")
    client, mark = own_worker.client, tmp_path / "mark"
    job = client.submit("gated", {"mark": str(mark), "gate": str(tmp_path / "never")})
    for event in client.events(job.id):
        if event.kind == "progress" and event.data["step"] > 1: break
    client.cancel(job.id)
    assert mark.exists() and client.wait(job.id, 60).status == "canceled"
    (tmp_path / "gate").touch()
    assert client.submit("gated", {"mark": str(mark), "gate": str(tmp_path / "gate")}).wait().result["steps"] == 0, "the worker goes on"


def test_beside_and_instead_of_the_built_in_tools(own_worker, tmp_path):
    pytest.importorskip("diffusers")
    text = "from colab_gpu.tools import tool\n@tool('imagenGenerate')\ndef mine(payload): return {'mine': payload['prompt']}\n"
    both = [written(tmp_path, "gated.py", GATED), written(tmp_path, "mine.py", text)]
    worker = own_worker(WORKER_LOAD=",".join(map(str, both)), IMAGEN_DEVICE="cpu")
    assert worker.wait_for("Worker loop started").string.endswith("(gated, imagenGenerate)")
    worker.wait_for("imagenGenerate is your own here, not the built-in one")
    assert own_worker.client.submit("imagenGenerate", {"prompt": "a boat"}).wait().result["mine"] == "a boat"
    worker.kill()
    worker = own_worker("--load", both[0], IMAGEN_DEVICE="cpu")
    assert worker.wait_for("Worker loop started").string.endswith("(gated, imagenGenerate)")


@pytest.mark.parametrize(("text", "words"), [
    ("x = 1\nraise OSError('the disk')\n", "own.py failed in line 2: OSError: the disk"),
    ("def f(:\n", "own.py is not Python: line 1"),
    ("x = 1\n", "own.py registers no tools"),
    ("import no_such_package\n", "own.py needs no_such_package"),
    ("from colab_gpu.tools import tool\n@tool('a')\ndef f(): pass\n@tool('a')\ndef g(): pass\n", "The tool a is registered twice"),
    ("from colab_gpu.tools import tool\n@tool('two words')\ndef f(): pass\n", "one word"),
    (None, "there is no file"),
], ids=["raises", "torn", "empty", "needs", "twice", "name", "absent"])
def test_a_file_that_cannot_be_served_is_a_sentence(own_worker, tmp_path, text, words):
    if text is not None: written(tmp_path, "own.py", text)
    worker = own_worker("--load", tmp_path / "own.py", ready=False)
    assert worker.popen.wait(60) == 2
    lines = [line for line in worker.lines if line]
    assert len(lines) == 1 and lines[0].startswith("colab-gpu: --load: ") and words in lines[0], lines


def test_two_files_with_one_name(own_worker, tmp_path):
    text = "from colab_gpu.tools import tool\n@tool('same')\ndef {}(): return {{}}\n"
    worker = own_worker("--load", written(tmp_path, "a.py", text.format("f")), "--load", written(tmp_path, "b.py", text.format("g")), ready=False)
    assert worker.popen.wait(60) == 2
    worker.wait_for("b.py: The tool same is registered twice, by colab_gpu_loaded_a.f and by colab_gpu_loaded_b.g")
