"""The service behind notebook and panel, with real servers and agents as processes."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import TOKEN
from processes import eventually, start_server
from test_tunnel import AUTH, StandIn

from colab_gpu import service as room
from colab_gpu.client import Client
from colab_gpu.config import Settings
from colab_gpu.errors import AccessDenied, ColabGPUError, InvalidSetting, MissingToken
from colab_gpu.service import Halt, Service, begin, in_words, open_service, take_over, tried

ROOT = Path(__file__).resolve().parent.parent
QUIET = {"START_OLLAMA": 0, "OLLAMA_URL": "http://127.0.0.1:9", "IMAGEN_MODEL_ID": "demo", "WORKER_GUARD": 0, "WORKER_WAIT_SECONDS": 1, "WORKER_ID": "attic"}
THREADS = ("worker-", "colab-gpu", "tunnel-")


@pytest.fixture
def opened():
    """Makes services, and closes them."""
    made = []

    def make(mode="worker", *, where="here", environ=None, **given):
        made.append(Service(Settings({**QUIET, **given}, environ=environ or {}), mode=mode, say=None, where=where))
        return made[-1]

    yield make
    for each in made: each.close()
    while room._NOW: room._NOW.pop().close()


@pytest.fixture
def remote(tmp_path):
    """A server in a process of its own that wants tokens from everybody."""
    with start_server(tmp_path / "server", GPU_CLIENT_TOKEN="caller-token-for-tests") as process: yield process


def of_ours():
    return [t.name for t in threading.enumerate() if t.name.startswith(THREADS)]


def test_a_worker_from_start_to_close(opened, remote, tmp_path):
    service = opened(STACK_API_BASE=remote.url, STACK_WORKER_TOKEN=TOKEN, COLAB_GPU_DATA=tmp_path / "here")
    assert service.connect() == f"Connected to {remote.url}."
    assert begin(service, preload=True).startswith(f"attic polls {remote.url} for imagenGenerate.")
    row = eventually(lambda: next((m for m in service.snapshot()["models"] if m["state"] != "loading"), None), "the preload's end")
    assert (row["name"], row["state"], row["percent"], row["says"]) == ("demo", "ready", 100, "demo is loaded.")
    caller = Client(remote.url, "caller-token-for-tests")
    job = caller.submit("imagenGenerate", {"prompt": "a red circle\non a blue ground"}).wait(120)
    assert job.status == "completed"
    recent = eventually(lambda: service.snapshot()["recent"], "the job in the list")
    assert recent[0]["title"] == "a red circle on a blue ground" and recent[0]["status"] == "completed" and recent[0]["picture"] == job.png
    assert service.start() == f"attic works for {remote.url} already."
    assert service.drain() == "No more jobs are taken." and service.worker.join(30)
    assert service.snapshot()["state"] == "stopped"
    service.start()
    assert service.executors[0].models() == ["demo"], "a stop does not unload"
    service.close()
    assert service.executors is None and service.snapshot()["state"] == "stopped"
    eventually(lambda: not of_ours(), "the end of every thread")


def test_tokens_that_are_missing_or_wrong(opened, remote):
    service = opened(STACK_API_BASE=remote.url)
    with pytest.raises(MissingToken, match="a secret called STACK_WORKER_TOKEN"): service.start()
    assert begin(service).startswith("Not started: No worker's token yet")
    with pytest.raises(AccessDenied, match="refused the token"): service.connect(token="quite-the-wrong-one")
    snapshot = service.snapshot()
    assert "refused the token" in snapshot["error"] and "quite-the-wrong-one" not in repr(snapshot) and snapshot["state"] == "stopped"
    assert service.connect(token=f" {TOKEN}\n") == f"Connected to {remote.url}." and service.snapshot()["error"] == ""
    service.start()
    assert TOKEN not in repr(service.snapshot())


def test_addresses_that_are_wrong(opened, remote):
    service = opened(STACK_WORKER_TOKEN=TOKEN, STACK_API_BASE="http://127.0.0.1:9")
    assert "does not answer yet" in service.start() and service.worker.alive
    eventually(lambda: service.snapshot()["state"] == "offline", "an offline worker")
    assert service.snapshot()["error"]
    for address in ("nonsense", "ftp://x.example", "http://user:pass@x.example"):
        with pytest.raises(InvalidSetting, match="STACK_API_BASE must"): service.connect(address)
    assert service.connect(remote.url) == f"Connected to {remote.url}."
    eventually(lambda: service.snapshot()["state"] == "waiting", "the worker at the other address")
    assert service.snapshot()["server"]["url"] == remote.url and service.snapshot()["error"] == ""


@pytest.mark.parametrize("where", ["colab", "kaggle"])
def test_this_machine_is_not_yours(opened, where):
    service = opened(STACK_WORKER_TOKEN=TOKEN, where=where)
    assert begin(service).startswith(f"Not started: http://127.0.0.1:3001 is this {where.title()} machine itself, not yours")


def test_all_in_one(opened, tmp_path, monkeypatch):
    agents = StandIn(tmp_path)
    monkeypatch.setenv("STAND_IN_FOLDER", str(agents.folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    service = opened("all in one", COLAB_GPU_DATA=tmp_path / "data", TUNNEL="ngrok", NGROK_PATH=agents.bin / "ngrok", TUNNEL_START_SECONDS=300)
    said = service.start()
    assert re.match(r"The server runs here, at http://127.0.0.1:\d+. It is not public: ngrok needs a token", said), said
    assert service.snapshot()["public"] is None and "ngrok needs a token" in service.snapshot()["error"]
    with pytest.raises(InvalidSetting, match="nothing to connect to"): service.connect("http://elsewhere.example")
    said = service.use_ngrok_token(AUTH)
    url = service.snapshot()["public"]["url"]
    assert said == f"Public at {url}." and service.snapshot()["error"] == ""
    token = service.client_token()
    assert len(token) > 30 and token not in service.snippet() and url in service.snippet() and token not in repr(service.snapshot())
    with pytest.raises(ColabGPUError): Client(url, "").jobs()
    job = Client(url, token).submit("imagenGenerate", {"prompt": "a red circle"}).wait(120)
    assert job.status == "completed" and job.png.startswith(b"\x89PNG")
    scope = {"os": os}
    monkeypatch.setenv("GPU_CLIENT_TOKEN", token)
    exec(compile(service.snippet(), "snippet", "exec"), scope)  # noqa: S102
    assert scope["job"]["status"] == "completed"
    png, said = service.try_picture("a blue square")
    assert png.startswith(b"\x89PNG") and said.startswith("Drawn through the queue by demo in")
    process = service.server.process.pid
    arguments = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True).stdout
    assert "colab_gpu serve" in arguments and not any(secret in arguments for secret in (token, AUTH, service.server.tokens["GPU_WORKER_TOKEN"]))
    assert service.stop() == "Stopped; the models stay loaded."
    eventually(lambda: not Path(f"/proc/{process}").exists(), "the server's end")
    again = service.start()
    assert again.startswith("Public at ") and service.client_token() == token, "the tokens stay"


def test_a_rerun_takes_over(opened, tmp_path):
    old = opened("all in one", COLAB_GPU_DATA=tmp_path / "data", TUNNEL="none")
    assert old.start().endswith("It is not public (TUNNEL=none).")
    old.preload("images", "demo")
    eventually(lambda: old.snapshot()["models"][0]["state"] == "ready", "the model")
    server, executors, worker = old.server, old.executors, old.worker
    new = opened("all in one", COLAB_GPU_DATA=tmp_path / "data", TUNNEL="none")
    take_over(new, old)
    assert old.closed and not worker.alive and new.server is server and server.alive and new.executors is executors
    with pytest.raises(InvalidSetting, match="replaced by a newer one"): old.start()
    new.start()
    assert new.server is server and executors[0].models() == ["demo"]
    other = opened("worker", COLAB_GPU_DATA=tmp_path / "data", IMAGEN_STEPS=7)
    take_over(other, new)
    assert not server.alive and other.executors is None, "other settings, other executors"


def test_a_kernel_that_dies_takes_its_server_along(tmp_path):
    code = f"""
import time
from colab_gpu.config import Settings
from colab_gpu.service import Service
service = Service(Settings({{**{QUIET!r}, "TUNNEL": "none", "COLAB_GPU_DATA": {str(tmp_path)!r}}}), mode="all in one", say=None)
service.start()
print(service.server.process.pid, flush=True)
time.sleep(600)
"""
    kernel = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    server = int(kernel.stdout.readline())
    assert Path(f"/proc/{server}").exists()
    kernel.send_signal(signal.SIGKILL)
    kernel.wait()
    eventually(lambda: not Path(f"/proc/{server}").exists(), "the server's end")


def test_chat_models_are_pulled_and_loaded(opened, stand_in, remote):
    pytest.importorskip("ollama")
    url = stand_in()
    service = opened(OLLAMA_URL=url, STACK_API_BASE=remote.url, STACK_WORKER_TOKEN=TOKEN, OLLAMA_PRELOAD_MODELS="llama3:8b")
    service.preload("chat", "llama3:8b")
    row = eventually(lambda: next((m for m in service.snapshot()["models"] if m["family"] == "chat" and m["state"] != "loading"), None), "the preload's end")
    assert row["state"] == "ready", row
    answer, said = tried(service.try_chat, "Why is the sky blue?")
    assert answer and said == "Answered by llama3:8b, here and not through the queue."
    service.preload("chat", "no/such:model")
    row = eventually(lambda: next((m for m in service.snapshot()["models"] if m["name"] == "no/such:model" and m["state"] == "failed"), None), "its failure")
    assert "no/such:model" in row["says"], row
    eventually(lambda: "llama3:8b" in service.snapshot()["choices"]["chat"], "the choices")


def test_secrets_overrides_and_blanks(opened, tmp_path, monkeypatch):
    for name in ("STACK_WORKER_TOKEN", "HF_TOKEN", "NGROK_AUTHTOKEN", "IMAGEN_STEPS", "WORKER_ID", "IMAGEN_MODEL_ID"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(room, "colab_secrets", lambda names: {name: "from-a-secret" for name in names if name == "STACK_WORKER_TOKEN"})
    service = open_service("worker", {"IMAGEN_STEPS": 9, "WORKER_ID": ""}, WORKER_ID="kiosk", IMAGEN_MODEL_ID="", STACK_API_BASE="")
    assert (service.settings["STACK_WORKER_TOKEN"], service.settings["IMAGEN_STEPS"], service.settings["WORKER_ID"]) == ("from-a-secret", 9, "kiosk")
    assert os.environ["IMAGEN_STEPS"] == "9" and "STACK_WORKER_TOKEN" not in os.environ
    if service.arbiter.device.kind == "cpu": assert service.settings["IMAGEN_MODEL_ID"] == "demo"
    monkeypatch.delenv("IMAGEN_STEPS")
    with pytest.raises(InvalidSetting, match="IMAGEN_STEPS must be"): open_service("worker", {"IMAGEN_STEPS": "many"})


def test_a_cell_ends_with_a_sentence():
    for error, sentence in ((InvalidSetting("Too wrong."), "Too wrong."), (KeyboardInterrupt(), "Stopped. Run this cell again to go on."),
                            (PermissionError(13, "Permission denied", "/x"), "Permission denied: /x. Run this cell again when that is mended.")):
        with pytest.raises(Halt) as e, in_words(): raise error
        assert e.value._render_traceback_() == [sentence]
    with pytest.raises(ZeroDivisionError), in_words(): _ = 1 / 0
