"""The executor that asks an image service: real services in processes of their own, one that speaks MCP and one that takes POST /generate."""

import base64
import json
import socket
import sys
import threading

import pytest
from conftest import ROOT
from processes import eventually, png

from colab_gpu.config import Settings
from colab_gpu.errors import Interrupted, InvalidInput, InvalidPayload, InvalidSetting, Transient
from colab_gpu.jobs import LocalContext
from colab_gpu.providers import ServiceImages

BOTH = pytest.mark.parametrize("kind", ["mcp", "plain"])
pytest.importorskip("mcp")


def artist(url, **more):
    return ServiceImages(Settings({"MCP_IMAGEN_URL": url, **more}, environ={"STACK_WORKER_TOKEN": "worker-s3cret", "GPU_CLIENT_TOKEN": "client-s3cret",
                                                                             "HF_TOKEN": "hub-s3cret"}), pick_seed=lambda: 77)


def fails(url, prompt, **more):
    "The error that a prompt comes to."
    with pytest.raises(Exception) as caught: artist(url, **more).run({"prompt": prompt}, LocalContext())
    return caught.value


@BOTH
def test_a_picture_in_the_shape_of_ours(services, kind):
    service, ctx = services(kind), LocalContext()
    result = artist(service.url).run({"prompt": "a boat", "width": "256", "num_inference_steps": 30, "guidance_scale": 5, "scheduler": "euler_a"}, ctx)
    data, content_type = ctx.artifacts["image.png"]
    assert data.startswith(b"\x89PNG") and content_type == "image/png" and len(ctx.artifacts) == 1
    duration_ms = result.pop("duration_ms")
    assert isinstance(duration_ms, int) and duration_ms >= 0
    ours = {"prompt": "a boat", "negative_prompt": None, "guidance_scale": 5.0, "num_inference_steps": 30, "width": 64, "height": 64, "seed": 77}
    theirs = {"mcp": {"model": "stand-in-xl", "device": "remote", "served_by": f"stand-in at {service.host}"},
              "plain": {"model": "stand-in-15", "device": "attic", "served_by": f"image service at {service.host}"}}
    assert result == {**ours, **theirs[kind], "provider": kind, "left_out": ["scheduler"]}
    [call] = service.seen["calls"]
    steps = "steps" if kind == "mcp" else "num_inference_steps"
    assert {k: v for k, v in call.items() if k != "height"} == {"prompt": "a boat", "width": 256, steps: 30, "guidance_scale": 5.0, "seed": 77}
    assert any("scheduler" in line for line in ctx.logs)


@BOTH
def test_no_token_of_ours_goes_there(services, kind, monkeypatch, tmp_path):
    service = services(kind)
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password netrc-s3cret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("STACK_WORKER_TOKEN", "worker-s3cret")
    artist(service.url).run({"prompt": "a boat"}, LocalContext())
    headers = {name.lower(): value for name, value in service.seen["headers"].items()}
    assert headers["content-type"] == "application/json", "headers were seen"
    assert "authorization" not in headers and "cookie" not in headers and "s3cret" not in json.dumps(headers)


def test_progress_is_passed_on(services):
    ctx = LocalContext()
    artist(services("mcp").url).run({"prompt": "a boat"}, ctx)
    assert (1, 4, "running") in ctx.steps


@BOTH
def test_several_pictures_are_several_calls(services, kind):
    service, ctx = services(kind), LocalContext()
    result = artist(service.url).run({"prompt": "a boat", "num_images": 3, "seed": 10}, ctx)
    assert [row["seed"] for row in result["images"]] == [10, 11, 12] == [call["seed"] for call in service.seen["calls"]]
    assert list(ctx.artifacts) == ["image.png", "image-2.png", "image-3.png"] == [row["artifact"] for row in result["images"]]


@BOTH
def test_the_picture_may_be_elsewhere_in_the_answer(services, kind):
    ctx = LocalContext()
    result = artist(services(kind).url).run({"prompt": "[told]"}, ctx)
    assert ctx.artifacts["image.png"][0] == png(16) and result["seed"] == (5 if kind == "mcp" else 77)


def test_what_a_service_has_no_parameter_for(services):
    service, ctx = services("mcp", STAND_IN_NARROW=1), LocalContext()
    result = artist(service.url).run({"prompt": "a boat", "seed": 3, "width": 512}, ctx)
    assert service.seen["calls"] == [{"prompt": "a boat"}] and result["left_out"] == ["seed", "width"] and result["seed"] is None
    for more in ({"model": "me/other"}, {"init_image": base64.b64encode(png()).decode()}, {"loras": ["me/x"]}):
        with pytest.raises(Transient, match="no parameter for") as caught: artist(service.url).run({"prompt": "a boat", **more}, ctx)
        assert caught.value.code == "not_offered"
    with pytest.raises(InvalidPayload, match="steps"): artist(service.url).run({"prompt": "a boat", "steps": 3}, ctx)
    assert len(service.seen["calls"]) == 1


@BOTH
@pytest.mark.parametrize(("prompt", "error", "code", "words"), [
    ("[fail]", Transient, "service_failed", "the model is not loaded"), ("[crash]", Transient, "service_failed", ""),
    ("[bad]", InvalidInput, "service_refused", "multiple of 64"), ("[garbage]", Transient, "no_picture", "without a picture"),
    ("[link]", Transient, "no_picture", "follows no links"), ("[torn]", Transient, "no_picture", "no PNG"),
    ("[die]", Transient, "service_down", "broke off"), ("[huge]", Transient, "answer_too_large", "1_048_576 bytes")])
def test_what_goes_wrong_is_a_sentence(services, kind, prompt, error, code, words):
    service = services(kind)
    e = fails(service.url, prompt, MCP_IMAGEN_MAX_BYTES=1 << 20)
    assert type(e) is error and e.code == code and words in e.message, e
    assert service.host in e.message and "\n" not in e.message and "STACK_API_BASE" not in e.message and "a secret of the service" not in e.message


@pytest.mark.parametrize(("kind", "env"), [("mcp", {}), ("mcp", {"STAND_IN_JSON": 1}), ("plain", {})], ids=["mcp", "mcp-json", "plain"])
def test_large_answers(services, kind, env):
    service, ctx = services(kind, **env), LocalContext()
    artist(service.url).run({"prompt": "[huge]"}, ctx)
    assert len(ctx.artifacts["image.png"][0]) > 8 << 20
    assert fails(service.url, "[huge]", MCP_IMAGEN_MAX_BYTES=1 << 20).code == "answer_too_large"


@BOTH
@pytest.mark.parametrize(("status", "error", "code"), [(400, None, ""), (401, Transient, "service_closed"), (403, Transient, "service_closed"), (404, Transient, "no"),
                                                       (429, Transient, "service_busy"), (500, Transient, "service_failed"), (503, Transient, "service_busy")])
def test_http_statuses(services, kind, status, error, code):
    e = fails(services(kind, STAND_IN_STATUS=status).url, "a boat")
    if status == 400: error, code = (Transient, "no_service") if kind == "mcp" else (InvalidInput, "service_refused")
    assert type(e) is error and e.code.startswith(code) and "\n" not in e.message, e


def test_a_plain_service_that_is_busy_or_sends_elsewhere(services):
    service = services("plain")
    e = fails(service.url, "[status=503]")
    assert e.code == "service_busy" and e.retry_after == 7 and "so it is" in e.message
    e = fails(service.url, "[status=307]")
    assert "sends callers elsewhere" in e.message and len(service.seen["calls"]) == 2, "a redirect is not followed"
    assert fails(service.url, "[status=422]").kind == "invalid_input"


@pytest.mark.parametrize("env", [{}, {"STAND_IN_LEGACY": 1}], ids=["2026", "2025"])
@pytest.mark.parametrize("kind", ["mcp", "plain"])
def test_a_cancel_is_heeded_while_it_waits(services, kind, env):
    if kind == "plain" and env: pytest.skip("there is one way")
    service, ctx = services(kind, **env), LocalContext()
    box = []

    def run():
        try: artist(service.url).run({"prompt": "[hang]"}, ctx)
        except Exception as e: box.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    eventually(lambda: service.seen["calls"], "the call")
    ctx.stop = Interrupted("The job was canceled.")
    thread.join(60)
    assert not thread.is_alive() and type(box[0]) is Interrupted, box
    eventually(lambda: service.seen["canceled"] == 1, "the service's notice of the cancel")
    assert not [t for t in threading.enumerate() if t.name == "colab-gpu-provider"]


@BOTH
def test_the_wait_is_bounded(services, kind):
    service = services(kind)
    e = fails(service.url, "[hang]", MCP_IMAGEN_SECONDS=1)
    assert type(e) is Transient and e.code == "service_slow" and "within 1 s" in e.message
    eventually(lambda: service.seen["canceled"] == 1, "the service's notice")


@pytest.mark.parametrize("kind", ["mcp", "generate"])
def test_nobody_is_there(kind):
    with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
    e = fails(f"http://127.0.0.1:{port}/{kind}", "a boat")
    assert e.code == "service_down" and f"Nothing listens at 127.0.0.1:{port}" in e.message and "MCP_IMAGEN_URL" in e.message


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 5\r\n\r\nhello", b"SSH-2.0-OpenSSH\r\n", b"",
                                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n[]",
                                    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 16\r\n\r\ndata: nonsense\n\n"])
@pytest.mark.parametrize("kind", ["mcp", "generate"])
def test_something_else_answers(kind, answer, capfd):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve():
            while True:
                try: caller, _ = listener.accept()
                except OSError: return
                with caller:
                    caller.recv(65536)
                    caller.sendall(answer)
        threading.Thread(target=serve, daemon=True).start()
        e = fails(f"http://127.0.0.1:{listener.getsockname()[1]}/{kind}", "a boat")
        listener.shutdown(socket.SHUT_RDWR)
    assert type(e) is Transient and "\n" not in e.message, e
    assert "Traceback" not in "".join(capfd.readouterr())


def test_what_the_sdk_logs_with_a_traceback_is_not_shown(processes):
    "In a process without pytest's own log handlers."
    answer = "HTTP/1.1 200 OK\\r\\nContent-Type: text/event-stream\\r\\nContent-Length: 32\\r\\n\\r\\nevent: message\\ndata: nonsense\\n\\n\\n"
    code = (f"import socket, threading\nlistener = socket.create_server(('127.0.0.1', 0))\nanswer = '{answer}'.encode()\n"
            "def serve():\n    while True:\n        caller, _ = listener.accept()\n        with caller:\n            caller.recv(65536)\n            caller.sendall(answer)\n"
            "threading.Thread(target=serve, daemon=True).start()\n"
            "from colab_gpu.config import Settings\nfrom colab_gpu.jobs import LocalContext\nfrom colab_gpu.providers import ServiceImages\n"
            "from colab_gpu.errors import ColabGPUError\n"
            "try: ServiceImages(Settings({'MCP_IMAGEN_URL': f'http://127.0.0.1:{listener.getsockname()[1]}/mcp'})).run({'prompt': 'a boat'}, LocalContext())\n"
            "except ColabGPUError as e: print('SAYS', e)\n")
    process = processes(sys.executable, "-c", code, PYTHONPATH=ROOT)
    assert process.popen.wait(60) == 0
    process.wait_for("SAYS")
    assert len([line for line in process.lines if line]) == 1, process.lines


def test_an_address_without_a_path_is_tried(services):
    for kind, service in (("mcp", services("mcp")), ("plain", services("plain"))):
        asked = artist(f"http://{service.host}")
        assert asked.run({"prompt": "a boat"}, LocalContext())["provider"] == kind
        assert [address.kind for address in asked.addresses] == [kind], "and remembered"
    e = fails(f"http://{services('plain', STAND_IN_STATUS=404).host}", "a boat")
    assert e.code == "no_service" and "neither MCP at /mcp nor POST /generate" in e.message


def test_a_server_with_other_tools(services):
    e = fails(services("mcp", STAND_IN_TOOL="paint").url, "a boat")
    assert e.code == "no_tool" and "its tools: paint" in e.message


def test_a_server_of_the_older_protocol(services):
    service = services("mcp", STAND_IN_LEGACY=1)
    assert artist(service.url).run({"prompt": "a boat"}, LocalContext())["served_by"] == f"stand-in at {service.host}"
    assert service.seen["headers"]["mcp-protocol-version"] < "2026"


def test_an_answer_is_not_lost_to_a_server_that_clings_to_the_session(services):
    service = services("mcp", STAND_IN_LEGACY=1, STAND_IN_CLINGS=1)
    assert artist(service.url, MCP_IMAGEN_SECONDS=30).run({"prompt": "a boat"}, LocalContext())["provider"] == "mcp"
    assert not [t for t in threading.enumerate() if t.name == "colab-gpu-provider"]


def test_the_key_in_an_address_is_not_shown(services):
    for path in ("k3y/mcp", "k3y/generate"):
        asked = artist(f"http://{services('plain').host}/{path}")
        assert "k3y" not in repr(asked)
        with pytest.raises(Transient) as caught: asked.run({"prompt": "a boat"}, LocalContext())
        assert "k3y" not in caught.value.message


def test_settings_that_cannot_be():
    with pytest.raises(InvalidSetting, match="MCP_IMAGEN_URL is not set"): ServiceImages(Settings({}, environ={}))
    for url in ("imagen:8000", "http://me:pass@imagen/mcp", "http://imagen/mcp?key=1"):
        with pytest.raises(InvalidSetting, match="MCP_IMAGEN_URL must"): artist(url)


@pytest.mark.parametrize(("path", "words"), [("mcp", "colab-gpu[mcp]"), ("", "colab-gpu[mcp]"), ("generate", "plain")])
def test_without_the_package(services, processes, path, words):
    "In a process where `mcp` cannot be found: a plain service works, for the other there is a sentence."
    service = services("plain" if path == "generate" else "mcp")
    code = ("import importlib.util, sys\nreal = importlib.util.find_spec\nimportlib.util.find_spec = lambda name, *more: None if name == 'mcp' else real(name, *more)\n"
            "from colab_gpu.config import Settings\nfrom colab_gpu.jobs import LocalContext\nfrom colab_gpu.providers import ServiceImages\n"
            "from colab_gpu.errors import ColabGPUError\n"
            f"try: print(ServiceImages(Settings({{'MCP_IMAGEN_URL': 'http://{service.host}/{path}'}})).run({{'prompt': 'a boat'}}, LocalContext())['provider'])\n"
            "except ColabGPUError as e: print(e)\nprint('heavy' if {'mcp', 'httpx2'} & {*sys.modules} else 'light')\n")
    process = processes(sys.executable, "-c", code, PYTHONPATH=ROOT)
    assert process.popen.wait(60) == 0
    process.wait_for(words.replace("[", r"\[").replace("]", r"\]"))
    process.wait_for("light")
