"""A standby end to end: a real server, regular workers that die, standby workers that ask an image service or do it themselves."""

import json
import signal
import sys

import pytest
from conftest import ROOT, TOKEN
from processes import Wire, eventually, start_server, start_worker_process

from colab_gpu.client import Client
from colab_gpu.config import Settings

pytest.importorskip("mcp")


@pytest.fixture
def standby(processes):
    """Starts `colab-gpu worker` as a standby."""

    def start(url, *argv, name="spare", seconds=1, ready=True, **env):
        process = processes(sys.executable, "-m", "colab_gpu", "worker", "--id", name, *(["--standby", seconds] if seconds is not None else []), *argv,
                            STACK_API_BASE=url, STACK_WORKER_TOKEN=TOKEN, WORKER_WAIT_SECONDS=2, START_OLLAMA=0,
                            **{"OLLAMA_URL": "http://127.0.0.1:9", "PYTHONPATH": ROOT, **env})
        if ready: process.wait_for("Worker loop started")
        return process

    return start


@pytest.fixture
def server(tmp_path):
    with start_server(tmp_path / "data", GPU_HEARTBEAT_LEASE_SECONDS=3, GPU_RETRY_SECONDS=0) as server:
        server.client = Client(server.url, settings=Settings({}, environ={}))
        yield server


def canvas_job(server, folder, name):
    "A job that the regular worker holds until a file exists, and the image service simply draws."
    return server.client.submit("imagenGenerate", {"prompt": str(folder / f"{name}-mark"), "negative_prompt": str(folder / f"{name}-gate")})


def asked(wire): return len(wire.heads("GET /gpu-jobs/next"))


def test_a_standby_takes_what_a_killed_worker_left(server, standby, services, tmp_path):
    service, client = services("mcp"), server.client
    regular = start_worker_process(server.url, "regular", "canvas", WORKER_WAIT_SECONDS=2)
    held = canvas_job(server, tmp_path, "held")
    eventually((tmp_path / "held-mark").exists, "the regular worker's run")
    waits = canvas_job(server, tmp_path, "waits")
    with Wire(server.url) as one, Wire(server.url) as two:
        spares = [standby(wire.url, name=name, MCP_IMAGEN_URL=service.url) for wire, name in ((one, "spare-1"), (two, "spare-2"))]
        for wire in (one, two): eventually(lambda wire=wire: asked(wire) >= 4, "three empty polls of two seconds")
        assert client.job(waits.id).status == "queued" and client.job(held.id).data["workerId"] == "regular" and service.seen["calls"] == []
        regular.popen.send_signal(signal.SIGKILL)
        regular.popen.wait(20)
        ended = {name: client.wait(job.id, 120) for name, job in (("held", held), ("waits", waits))}
        for name, job in ended.items():
            assert job.status == "completed" and job.data["workerId"] in ("spare-1", "spare-2"), job.data
            assert job.result["provider"] == "mcp" and job.result["served_by"] == f"stand-in at {service.host}"
            assert job.result["prompt"] == str(tmp_path / f"{name}-mark") and client.artifact(job.id, "image.png")[:4] == b"\x89PNG"
        assert sorted(call["prompt"] for call in service.seen["calls"]) == sorted(job.result["prompt"] for job in ended.values()), "one winner each"
        assert client.job(held.id).data["attempts"] == 2
        with start_worker_process(server.url, "regular-2", "canvas", WORKER_WAIT_SECONDS=2):
            later = canvas_job(server, tmp_path, "later")
            (tmp_path / "later-gate").touch()
            assert client.wait(later.id, 60).data["workerId"] == "regular-2", "a regular worker is back"
        assert len(service.seen["calls"]) == 2
        for spare in spares:
            assert TOKEN not in "".join(line or "" for line in spare.lines)
            assert spare.end() in (0, 130, 143)


def test_a_job_that_no_regular_worker_can_do(server, standby, services, tmp_path):
    "The regular worker lives, but has another tool; the image service is a plain one."
    service = services("plain")
    with start_worker_process(server.url, "regular", "gate", WORKER_WAIT_SECONDS=2):
        standby(server.url, seconds=0, MCP_IMAGEN_URL=service.url)
        job = server.client.submit("imagenGenerate", {"prompt": "a boat", "seed": 5}).wait()
        assert job.status == "completed" and job.data["workerId"] == "spare"
        assert (job.result["provider"], job.result["served_by"], job.result["seed"]) == ("plain", f"image service at {service.host}", 5)
        data = server.client.submit("gate", {"mark": str(tmp_path / "mark"), "gate": str(ROOT)}).wait().data
        assert data["workerId"] == "regular"


def test_how_jobs_fail_at_a_service(server, standby, services):
    service, client = services("mcp"), server.client
    spare = standby(server.url, seconds=0, MCP_IMAGEN_URL=service.url)
    job = client.submit("imagenGenerate", {"prompt": "[bad]"}).wait()
    assert (job.status, job.data["kind"], job.data["attempts"]) == ("failed", "invalid_input", 1) and "multiple of 64" in job.detail, job.data
    job = client.submit("imagenGenerate", {"prompt": "[fail]"}, maxAttempts=2).wait()
    assert (job.status, job.data["kind"], job.data["attempts"]) == ("failed", "transient", 2) and "the model is not loaded" in job.detail, job.data
    job = client.submit("imagenGenerate", {"prompt": "[hang]"})
    eventually(lambda: len(service.seen["calls"]) == 4, "the call")
    client.cancel(job.id)
    assert client.wait(job.id, 60).status == "canceled"
    eventually(lambda: service.seen["canceled"] == 1, "the service's notice of it")
    assert client.submit("imagenGenerate", {"prompt": "a boat"}).wait().status == "completed", "the standby goes on"
    assert not [line for line in spare.lines if line and "Traceback" in line]


def test_a_standby_draws_by_itself(server, standby):
    pytest.importorskip("diffusers")
    standby(server.url, "--provider", "local", seconds=0, IMAGEN_MODEL_ID="demo", IMAGEN_DEVICE="cpu", MCP_IMAGEN_URL="http://127.0.0.1:9/mcp", OMP_NUM_THREADS=1)
    payload = {"prompt": "a red circle on a blue background", "num_inference_steps": 5, "seed": 7, "width": 256, "height": 256}
    job = server.client.submit("imagenGenerate", payload).wait()
    assert job.status == "completed" and job.data["workerId"] == "spare"
    assert (job.result["provider"], job.result["served_by"], job.result["model"], job.result["seed"]) == ("local", "spare", "demo", 7)


def test_a_tool_of_ones_own_on_a_standby(server, standby, tmp_path):
    (tmp_path / "own.py").write_text("from colab_gpu.tools import tool\n@tool('reverse')\ndef reverse(text: str): return {'text': text[::-1]}\n")
    standby(server.url, "--load", tmp_path / "own.py", "--tools", "reverse", seconds=0)
    result = server.client.submit("reverse", {"text": "abc"}).wait().result
    assert result == {"text": "cba", "provider": "local", "served_by": "spare"}


def test_a_standby_chats_with_its_ollama(server, standby, services, processes):
    pytest.importorskip("ollama")
    service = services("plain")
    daemon = processes(sys.executable, ROOT / "tests" / "ollama_daemon.py", "serve", OLLAMA_HOST="127.0.0.1:0", STAND_IN_MODELS="llama3:8b")
    url = "http://" + daemon.wait_for(r"Listening on (\S+)")[1]
    standby(server.url, seconds=0, MCP_IMAGEN_URL=service.url, OLLAMA_URL=url)
    job = server.client.submit("ollamaChat", {"prompt": "good morning"}).wait()
    assert job.status == "completed" and job.result["response"].strip() == "good morning" and job.result["served_by"] == "spare", job.data
    assert server.client.submit("imagenGenerate", {"prompt": "a boat"}).wait().result["provider"] == "plain"


@pytest.mark.parametrize(("argv", "env", "words"), [
    (["--standby", "soon"], {}, "WORKER_STANDBY_SECONDS must be a number"), (["--standby", "-1"], {}, "must be a number from 0"),
    (["--provider", "mcp"], {}, "MCP_IMAGEN_URL is not set"), ([], {"WORKER_PROVIDER": "clouds"}, "WORKER_PROVIDER must be one of auto, mcp, local"),
    (["--standby", "20"], {"MCP_IMAGEN_URL": "imagen:8000"}, "MCP_IMAGEN_URL must be an address")])
def test_settings_that_cannot_be(standby, argv, env, words):
    process = standby("http://127.0.0.1:9", *argv, seconds=None, ready=False, **env)
    assert process.popen.wait(60) == 2
    lines = [line for line in process.lines if line]
    assert len(lines) == 1 and words in lines[0], lines


def test_doctor_looks_at_the_service(processes, services):
    service = services("plain")
    process = processes(sys.executable, "-m", "colab_gpu", "doctor", "--json", MCP_IMAGEN_URL=service.url, STACK_API_BASE="http://127.0.0.1:9",
                        OLLAMA_URL="http://127.0.0.1:9", PYTHONPATH=ROOT)
    process.popen.wait(60)
    rows = json.loads("\n".join(line for line in process.lines if line is not None))
    assert [row["detail"] for row in rows if row["what"] == "image service"] == [f"{service.host} is asked by a standby (colab-gpu worker --standby 20)"]
