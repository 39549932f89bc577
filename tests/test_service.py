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
from tunnel_agents import AUTH, StandIn

from colab_gpu import service as room
from colab_gpu.client import Client
from colab_gpu.config import Settings
from colab_gpu.errors import AccessDenied, ColabGPUError, InvalidSetting, MissingToken
from colab_gpu.service import Halt, Service, begin, in_words, open_service, take_over, tried

ROOT = Path(__file__).resolve().parent.parent
QUIET = {"START_OLLAMA": 0, "OLLAMA_URL": "http://127.0.0.1:9", "IMAGEN_MODEL_ID": "demo", "WORKER_GUARD": 0, "WORKER_WAIT_SECONDS": 1, "WORKER_ID": "attic", "IMAGEN_STEPS": 5}
pytestmark = pytest.mark.usefixtures("one_thread")
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
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPU_CLIENT_TOKEN", token)
    exec(compile(service.snippet(), "snippet", "exec"), scope)  # noqa: S102
    assert scope["job"]["status"] == "completed" and (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
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
    assert old.closed and not worker.alive and new.server is server and server.alive and new.executors[0] is executors[0]
    with pytest.raises(InvalidSetting, match="replaced by a newer one"): old.start()
    new.start()
    assert new.server is server and executors[0].models() == ["demo"]
    other = opened("worker", COLAB_GPU_DATA=tmp_path / "data", IMAGEN_STEPS=7)
    take_over(other, new)
    assert not server.alive and other.executors is None, "other settings, other executors"


def test_what_was_typed_outlasts_a_rerun(opened, remote):
    old, new = opened(), opened()
    old.connect(remote.url, TOKEN)
    take_over(new, old)
    assert new.start().startswith(f"attic polls {remote.url}")
    other = opened(STACK_API_BASE="http://127.0.0.1:9")
    take_over(other, new)
    assert other.address == "http://127.0.0.1:9", "what the cell says counts more"


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
    assert answer and "here and not through the queue (no worker runs)" in said
    service.start()
    assert tried(service.try_chat, "Why is the sky blue?")[1].endswith("here and not through the queue (this notebook has no callers' token, GPU_CLIENT_TOKEN)."), "a worker's token is no caller's"
    service.settings = service.settings.but(GPU_CLIENT_TOKEN="caller-token-for-tests")
    assert tried(service.try_chat, "Why is the sky blue?")[1] == "Answered by llama3:8b, through the queue."
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


class Interrupting:
    """A worker's `stop` that is interrupted once."""

    def __init__(self, worker): self.worker, self.stop, self.times = worker, worker.stop, 0

    def __call__(self, *words):
        self.times += 1
        if self.times == 1: raise KeyboardInterrupt
        return self.stop(*words)


def test_an_interrupted_rerun_is_mended_by_the_next(opened, tmp_path, monkeypatch):
    given = {**QUIET, "COLAB_GPU_DATA": tmp_path / "data", "TUNNEL": "none"}
    one = open_service("all in one", {}, **given)
    one.start()
    monkeypatch.setattr(one.worker, "stop", Interrupting(one.worker))
    with pytest.raises(KeyboardInterrupt): open_service("all in one", {}, **given)
    assert one.worker.alive and one in room._NOW
    two = open_service("all in one", {}, **given)
    assert [two] == room._NOW and one.closed and not one.worker.alive and two.server.alive
    assert two.start().endswith("It is not public (TUNNEL=none).") and two.worker.alive
    monkeypatch.setattr(two.worker, "stop", Interrupting(two.worker))
    with pytest.raises(KeyboardInterrupt): two.close()
    assert two.worker.alive
    two.close()
    assert not two.worker.alive and two.server is None


def test_an_interrupted_start_leaves_no_server(opened, tmp_path, monkeypatch):
    service = opened("all in one", COLAB_GPU_DATA=tmp_path / "data", TUNNEL="none")
    started = []

    def interrupted(server, begins):
        started.append(server.process)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(room, "_await_server", interrupted)
        with pytest.raises(KeyboardInterrupt): service.start()
    assert started[0].poll() is not None, "the server that was just started has ended"
    assert service.start().endswith("It is not public (TUNNEL=none).")


def test_a_folder_that_another_server_has(opened, tmp_path):
    one, two = (opened("all in one", COLAB_GPU_DATA=tmp_path / "data", TUNNEL="none") for _ in "12")
    one.start()
    with pytest.raises(ColabGPUError, match="Another server is using"): two.start()
    assert one.server.url in one.server.log.read_text(), "the log of the first is still there"
    one.stop()
    assert two.start().endswith("It is not public (TUNNEL=none).")


def test_a_server_that_dies_is_started_anew(opened, tmp_path):
    service = opened("all in one", COLAB_GPU_DATA=tmp_path / "data", TUNNEL="none")
    service.start()
    token, before = service.client_token(), service.server.url
    os.killpg(service.server.process.pid, signal.SIGKILL)
    eventually(lambda: not service.server.alive, "its death")
    assert service.snapshot()["state"] == "stopped" and "press Start" in service.snapshot()["error"]
    service.start()
    assert service.snapshot()["error"] == "" and service.server.url != before and service.worker.asking.base == service.server.url
    assert Client(service.server.url, token).submit("imagenGenerate", {"prompt": "a red circle"}).wait(120).status == "completed"


def test_a_rerun_sees_what_has_changed(opened, tmp_path, monkeypatch):
    monkeypatch.delenv("POLL_INTERVAL", raising=False)
    given = {**QUIET, "COLAB_GPU_DATA": tmp_path / "data", "TUNNEL": "none"}
    one = open_service("all in one", {"GPU_MAX_PENDING_JOBS": 5}, **given)
    one.start()
    server = one.server
    two = open_service("all in one", {"GPU_MAX_PENDING_JOBS": 7}, **given)
    assert not server.alive and two.server is None and two.settings["GPU_MAX_PENDING_JOBS"] == 7
    with pytest.raises(InvalidSetting, match="POLL_INTERVAL must"): open_service("worker", {"POLL_INTERVAL": "x"}, **QUIET)
    with pytest.raises(InvalidSetting, match="did you mean POLL_INTERVAL"): open_service("worker", {"POLL_INTERVALL": 2}, **QUIET)
    assert open_service("worker", {"POLL_INTERVAL": ""}, **QUIET).settings["POLL_INTERVAL"] == 5
    assert "GPU_MAX_PENDING_JOBS" not in os.environ and "POLL_INTERVAL" not in os.environ


def test_what_is_typed_as_an_address_is_not_repeated(opened):
    service = opened()
    for typed in ("http://me:hunter2@x.example", "hunter2-was-a-token"):
        with pytest.raises(InvalidSetting) as e: service.connect(typed)
        assert "hunter2" not in e.value.message + repr(service.snapshot())


def test_who_draws_is_what_the_settings_say(opened, remote, services, tmp_path):
    pytest.importorskip("mcp")
    url = services("plain").url
    service = opened(STACK_API_BASE=remote.url, STACK_WORKER_TOKEN=TOKEN, WORKER_PROVIDER="mcp", MCP_IMAGEN_URL=url, COLAB_GPU_DATA=tmp_path)
    assert begin(service).endswith("for imagenGenerate.") and service.worker.standby_s is None
    with pytest.raises(InvalidSetting, match="there is nothing to load here"): service.preload("images", "demo")
    assert tried(service.try_picture, "a star") == (None, "An image service draws for this worker: ask it through the queue, with GPU_CLIENT_TOKEN set.")
    assert Client(remote.url, "caller-token-for-tests").submit("imagenGenerate", {"prompt": "a star"}).wait(120).result["provider"] == "plain"
    standby = opened(STACK_API_BASE=remote.url, STACK_WORKER_TOKEN=TOKEN, WORKER_STANDBY_SECONDS=20, COLAB_GPU_DATA=tmp_path)
    standby.start()
    assert standby.worker.standby_s == 20 and standby.try_picture("a star")[0]


def test_a_closed_service_stays_closed(opened, tmp_path):
    service = opened(COLAB_GPU_DATA=tmp_path)
    service.close()
    for verb in (service.start, lambda: service.try_picture("a star"), lambda: service.preload("images", "demo")):
        with pytest.raises(InvalidSetting, match="run the start cell again"): verb()
    assert service.executors is None


def test_a_torch_that_is_being_imported_is_left_alone(monkeypatch):
    from types import ModuleType

    from colab_gpu.gpu import Cuda
    from colab_gpu.pipelines import free_memory

    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    free_memory()
    assert Cuda("a card", "no-such-program").memory() == (None, None)


def test_kaggle_is_not_colab(opened, monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.delenv("COLAB_GPU_DATA", raising=False)
    service = open_service("all in one", {}, **QUIET)
    assert service.where == "kaggle" and not str(service.settings["COLAB_GPU_DATA"]).startswith("colab-gpu-data"), "what lies in the working folder is published"
