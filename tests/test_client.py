"""The client against real servers in real processes, and against connections that fail on purpose."""

import hashlib
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from processes import TOKEN, Wire, eventually, png, start_reference, start_server

from colab_gpu.client import Client, Transport
from colab_gpu.errors import (AccessDenied, ColabGPUError, ConnectionFailed, InvalidPayload, JobNotFound, MissingToken, NotFound, OutOfMemory,
                              QueueFull, TunnelDown, Unavailable, Unprocessable)
from colab_gpu.server import QueueServer

OURS = {"X-Protocol": "1"}


class Attendant:
    "A worker's calls, one by one."
    def __init__(self, url): self.transport = Transport(url, TOKEN)

    def take(self):
        answer = self.transport.call("GET", "/gpu-jobs/next", params={"wait": 30}, headers=OURS)
        self.path, self.token = f"/gpu-jobs/{answer['job']['id']}", answer["lease"]["token"]
        return self
    def beat(self, *events): return self.transport.call("POST", f"{self.path}/heartbeat", body={"leaseToken": self.token, "events": list(events)})
    def upload(self, name, data, kind="image/png"):
        self.transport.call("PUT", f"{self.path}/artifacts/{name}", data=data, headers={"X-Lease-Token": self.token, "Content-Type": kind})
    def complete(self, result=None, **more):
        body = {"leaseToken": self.token, "status": "completed", "result": result or {}, **more}
        return self.transport.call("POST", f"{self.path}/complete", body=body)


def canned(*answers):
    "A server that gives the answers it was given, in turn (the last for ever): (status, headers, body)."
    class Handler(BaseHTTPRequestHandler):
        seen = []
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers, body = answers[min(len(self.seen), len(answers) - 1)]
            self.seen.append((self.command, self.path, dict(self.headers)))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items(): self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        do_POST = do_GET
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}", Handler.seen


def quick(url, slept=None): return Client(url, "", sleep=(slept if slept is not None else []).append)


# ---- what may be repeated


def test_a_submit_whose_answer_is_lost_makes_one_job(server):
    with Wire(server.url) as wire:
        wire.lose("POST /gpu-jobs ")
        job = quick(wire.url).submit("errand")
        heads = wire.heads("POST /gpu-jobs ")
    keys = {next(line for line in head.split("\r\n") if line.lower().startswith("idempotency-key")) for head in heads}
    assert len(heads) == 2 and len(keys) == 1
    assert [j.id for j in Client(server.url, "").jobs()] == [job.id]


def test_what_is_not_safe_to_repeat_is_not_repeated(server, client):
    job = client.submit("errand").cancel()
    with Wire(server.url) as wire:
        wire.lose("/retry")
        with pytest.raises(ConnectionFailed): quick(wire.url).retry(job.id)
        wire.lose("POST /gpu-jobs ")
        with pytest.raises(ConnectionFailed): quick(wire.url).post("/gpu-jobs", {"tool": "errand"})
        assert len(wire.requests) == 2
    assert len(client.jobs()) == 3


def test_a_full_queue_is_told_at_once(tmp_path):
    with QueueServer({"GPU_WORKER_TOKEN": TOKEN, "COLAB_GPU_DATA": str(tmp_path), "GPU_MAX_PENDING_JOBS": 1}) as server:
        slept = []
        client = quick(server.url, slept)
        client.submit("errand")
        with pytest.raises(QueueFull): client.submit("errand")
        assert slept == []


def test_retry_after_is_believed():
    url, seen = canned((503, {"Retry-After": "7"}, b'{"error": "stopping"}'), (200, {}, b'{"workers": []}'))
    slept = []
    assert quick(url, slept).workers() == [] and slept == [7.0] and len(seen) == 2


def test_it_gives_up_after_some_tries():
    slept = []
    with pytest.raises(ConnectionFailed, match="Nothing listens at"): quick("http://127.0.0.1:9", slept).workers()
    assert len(slept) == 4


# ---- answers from something else


@pytest.mark.parametrize(("answer", "error", "words"), [
    ((404, {"Content-Type": "text/html"}, b"<html>ERR_NGROK_3200"), TunnelDown, "offline"),
    ((502, {"Content-Type": "text/html"}, b"<!DOCTYPE html>ERR_NGROK_8012"), TunnelDown, "nothing answers behind it"),
    ((402, {"Content-Type": "text/plain"}, b"ERR_NGROK_727"), TunnelDown, "used up"),
    ((200, {"Content-Type": "text/html"}, b"<!DOCTYPE html>You are about to visit"), TunnelDown, "web page"),
    ((530, {"Content-Type": "text/html"}, b"<html>Error 1033"), TunnelDown, "Cloudflare"),
    ((502, {"Content-Type": "text/plain"}, b"bad gateway"), Unavailable, "502"),
    ((200, {"Content-Type": "text/plain"}, b"hello"), ConnectionFailed, "JSON"),
    ((200, {}, b"[]"), ConnectionFailed, "queue server"),
    ((301, {"Location": "https://elsewhere.example/x"}, b""), ConnectionFailed, "https://elsewhere.example"),
    ((403, {}, b'{"error": "invalid_client_token"}'), AccessDenied, "403"),
])
def test_what_is_not_a_queue_server_is_recognised(answer, error, words):
    url, _ = canned(answer)
    with pytest.raises(error, match=words): quick(url).job("7")


def test_a_redirect_does_not_take_the_token_along():
    there, seen = canned((200, {}, b"{}"))
    here, _ = canned((302, {"Location": there + "/gpu-jobs/7"}, b""))
    with pytest.raises(ConnectionFailed, match="sends callers on to"): Transport(here, "s3cret").call("GET", "/gpu-jobs/7")
    assert seen == []


def test_no_proxy_stands_before_this_machine(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"): monkeypatch.setenv(name, "http://127.0.0.1:9")
    url, seen = canned((200, {}, b"{}"))
    Transport(url, "s3cret").call("GET", "/x")
    assert seen[0][2]["Authorization"] == "Bearer s3cret"


def test_a_netrc_entry_does_not_replace_the_token(tmp_path, monkeypatch):
    "Servers elsewhere are called with the environment's settings, .netrc among them."
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("colab_gpu.client._is_local", lambda address: False)
    url, seen = canned((200, {}, b"{}"))
    Transport(url, "s3cret").call("GET", "/x")
    assert seen[0][2]["Authorization"] == "Bearer s3cret"


def test_the_token_is_in_one_header_and_nowhere_else(server):
    url, seen = canned((500, {}, b'{"error": "boom"}'))
    texts = []
    for address in (url, "http://127.0.0.1:9", server.url):
        transport = Transport(address, "s3cret-token")
        with pytest.raises(ColabGPUError) as caught: transport.call("GET", "/gpu-jobs/7", params={"wait": 0})
        texts += [repr(transport), repr(caught.value), str(vars(caught.value))]
    assert "s3cret" not in "".join(texts) + seen[0][1]
    assert seen[0][2]["Authorization"] == "Bearer s3cret-token" and seen[0][2]["ngrok-skip-browser-warning"] == "1"


def test_a_server_for_its_own_machine_tells_others(server):
    url, _ = canned((401, {}, b'{"error": "client_token_required", "message": "Send a token."}'))
    with pytest.raises(MissingToken, match="Send a token"): quick(url).jobs()


# ---- files


def test_a_large_picture_comes_back_as_it_was(server, client, tmp_path):
    data = png(noise=3_000_000)
    job = client.submit("imagenGenerate", {"prompt": "noise"})
    attendant = Attendant(server.url).take()
    attendant.upload("image.png", data)
    attendant.complete({"seed": 7}, artifacts=["image.png"])
    assert job.wait(30).png == data and client.job(job.id, inline=False).png == data
    path = client.download(job.id, "image.png", tmp_path / "out.png")
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(data).digest()
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == ["out.png"]


@pytest.mark.parametrize(("answer", "error"), [
    ((200, {"ETag": f'"{"0" * 64}"'}, b"damaged"), Unprocessable), ((200, {"Content-Length": "99"}, b"cut off"), ConnectionFailed)])
def test_a_damaged_file_leaves_nothing_behind(answer, error, tmp_path):
    (tmp_path / "out.png").write_bytes(b"the old one")
    url, _ = canned(answer)
    with pytest.raises(error): quick(url).download("7", "image.png", tmp_path / "out.png")
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"] and (tmp_path / "out.png").read_bytes() == b"the old one"


def test_a_download_that_breaks_off_is_done_again(server, client, tmp_path):
    data = png(noise=300_000)
    job = client.submit("imagenGenerate", {"prompt": "noise"})
    attendant = Attendant(server.url).take()
    attendant.upload("image.png", data)
    attendant.complete(artifacts=["image.png"])
    with Wire(server.url) as wire:
        wire.lose("/artifacts/", after=100_000)
        assert quick(wire.url).download(job.id, "image.png", tmp_path / "out.png").read_bytes() == data
        assert len(wire.heads("/artifacts/")) == 2


# ---- waiting and following


def test_waiting_outlives_a_server_that_is_killed(tmp_path):
    with start_server(tmp_path / "data") as first:
        client = Client(first.url, "")
        job = client.submit("errand")
        ended = []
        waiter = threading.Thread(target=lambda: ended.append(client.wait(job.id, 120)))
        waiter.start()
        first.kill()
        with start_server(tmp_path / "data", port=first.port) as second:
            Attendant(second.url).take().complete({"done": True})
            waiter.join(60)
    assert ended[0].status == "completed" and ended[0].result == {"done": True}


def test_waiting_ends_with_the_time_given(client):
    with pytest.raises(Unavailable, match="still queued") as caught: client.submit("errand").wait(0.05)
    assert caught.value.code == "wait_timeout"
    with pytest.raises(JobNotFound): client.wait("nope")


def test_events_go_on_after_a_broken_connection(server):
    with Wire(server.url) as wire:
        client = quick(wire.url)
        job = client.submit("errand")
        wire.lose("/events", after=1500)
        seen, attendant = [], Attendant(server.url).take()
        def speak():
            for n in range(40): attendant.beat({"seq": n, "type": "token", "text": f"word {n} "})
            attendant.complete()
        speaker = threading.Thread(target=speak)
        for event in client.events(job.id):
            if event.kind == "token": seen.append(event.data["text"])
            if speaker.ident is None: speaker.start()
        speaker.join()
        assert wire.lost.is_set()
        resumed = wire.heads("/events")[1:]
    assert seen == [f"word {n} " for n in range(40)]
    assert resumed and all("Last-Event-ID:" in head for head in resumed)


def test_events_give_up_when_the_server_stays_away():
    clock = iter(range(0, 10_000, 50))
    client = Client("http://127.0.0.1:9", "", clock=lambda: next(clock), sleep=lambda s: None)
    with pytest.raises(ConnectionFailed): list(client.events("7"))


def test_a_failed_job_raises_what_the_worker_reported(server, client):
    job = client.submit("errand", maxAttempts=1)
    attendant = Attendant(server.url).take()
    attendant.transport.call("POST", f"{attendant.path}/complete",
                             body={"leaseToken": attendant.token, "status": "error", "kind": "oom", "detail": "It does not fit."})
    with pytest.raises(OutOfMemory, match="It does not fit"): job.wait(30).check()


# ---- the reference's server


def test_the_client_serves_callers_of_the_reference():
    with start_reference() as server:
        client = quick(server.url)
        job = client.submit("imagenGenerate", {"prompt": "a dot"}, priority="high", maxAttempts=3)
        with pytest.raises(Unavailable, match="still queued"): job.wait(0)
        attendant = Transport(server.url, TOKEN)
        assert attendant.call("GET", "/gpu-jobs/next", params={"worker": "w"})["job"]["id"] == job.id
        kinds = []
        for event in client.events(job.id):
            kinds.append((event.kind, event.data["status"]))
            if event.data["status"] == "leased":
                result = {"image_base64": "data:image/png;base64,iVBORw=="}
                attendant.call("POST", f"/gpu-jobs/{job.id}/complete", body={"status": "completed", "result": result})
        assert kinds == [("state", "leased"), ("state", "completed"), ("done", "completed")]
        assert job.refresh().png == b"\x89PNG"
        with pytest.raises(JobNotFound): client.job("nope")
        with pytest.raises(NotFound, match="no such route"): job.cancel()


# ---- what it costs to import


def test_importing_the_client_loads_nothing_heavy():
    code = "import sys, colab_gpu.client; print([m for m in ('requests', 'urllib3', 'ssl', 'asyncio', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert done.stdout.strip() == "[]"


def test_a_call_that_waits_can_be_hung_up_on(server):
    transport, outcome = Transport(server.url, TOKEN), []
    def wait():
        try: transport.call("GET", "/gpu-jobs/next", params={"wait": 55})
        except ConnectionFailed as e: outcome.append(e)
    thread = threading.Thread(target=wait)
    thread.start()
    eventually(lambda: len(server.app.broker.waiters))
    transport.hang_up()
    thread.join(30)
    assert outcome and not thread.is_alive()
    eventually(lambda: not len(server.app.broker.waiters), "the waiter's leaving")
    assert transport.call("GET", "/healthz")["status"] == "ok"


def test_a_body_that_is_not_json_is_refused_before_it_is_sent():
    with pytest.raises(InvalidPayload, match="cannot be sent as JSON"): quick("http://127.0.0.1:9").submit("errand", {"x": float("nan")})
