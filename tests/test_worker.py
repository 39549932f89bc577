"""The worker in real processes: servers and workers that are killed, stopped, cut off, and come back."""

import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest
from processes import TOKEN, Wire, eventually, png, start_reference, start_server, start_worker_process
from test_client import canned

from colab_gpu.client import Client, Transport
from colab_gpu.config import Settings
from colab_gpu.errors import Transient
from colab_gpu.server import QueueServer
from colab_gpu.hearts import BURST
from colab_gpu.worker import Worker, start_worker, stop_worker


DATA = tempfile.TemporaryDirectory()  # where workers keep results until they are sent


class Quick:
    "Answers at once."
    tool = "errand"
    def run(self, payload, ctx): return {"echo": payload}


class Paint:
    tool = "imagenGenerate"
    def __init__(self, data=None): self.data = data or png()
    def run(self, payload, ctx):
        ctx.artifact("image.png", self.data, "image/png")
        return {"seed": payload.get("seed", 7)}


class Hold:
    "Runs until `go` is set or it is told to stop."
    tool = "gate"
    def __init__(self, stubborn=False): self.running, self.go, self.stubborn = threading.Event(), threading.Event(), stubborn
    def run(self, payload, ctx):
        self.ctx = ctx
        self.running.set()
        while not self.go.wait(0.005):
            if not self.stubborn: ctx.check()
        return {"held": True}


def settings(url, token=TOKEN, **given):
    return Settings({"STACK_API_BASE": url, "STACK_WORKER_TOKEN": token, "WORKER_ID": "attic", "POLL_INTERVAL": 0.05, "COLAB_GPU_DATA": DATA.name, **given}, environ={})


def worker_for(url, *executors, options=None, **given): return Worker(executors or [Quick()], settings(url, **given), log=None, **(options or {}))


def serve(tmp_path, **given): return QueueServer({"GPU_WORKER_TOKEN": TOKEN, "COLAB_GPU_DATA": str(tmp_path / "data"), **given})


@pytest.fixture
def gate(tmp_path):
    "The payload of a `gate` job, and who has begun it so far."
    class Gate:
        payload = {"gate": str(tmp_path / "gate"), "mark": str(tmp_path / "mark")}
        def open(self): (tmp_path / "gate").touch()
        def begun(self): return (tmp_path / "mark").read_text().split() if (tmp_path / "mark").exists() else []
    return Gate()


# ---- against the reference's server


def test_it_serves_the_reference_as_the_reference_does():
    with start_reference() as server:
        client, picture = Client(server.url, ""), png()
        job = client.submit("imagenGenerate", {"prompt": "a dot", "seed": 3})
        worker = worker_for(server.url, Paint(picture))
        assert [worker.turn().did, worker.turn().did] == ["completed", "idle"]
        done = job.refresh()
        assert done.png == picture and done.result["seed"] == 3 and done.data["workerId"] == "attic"
        assert done.result["image_base64"].startswith("data:image/png;base64,")
        eventually(lambda: len(server.lines) >= 6)
        calls = [line.replace(job.id, "ID") for line in server.lines[1:]]
    assert calls == ["POST /gpu-jobs 200", "GET /gpu-jobs/next 200", "POST /gpu-jobs/ID/complete 200", "GET /gpu-jobs/next 204",
                     "GET /gpu-jobs/ID 200"]


def test_the_reference_hears_of_failures_and_of_tools_that_are_missing():
    class Broken:
        tool = "errand"
        def run(self, payload, ctx): raise Transient("The model is gone.")
    with start_reference() as server:
        client = Client(server.url, "")
        jobs = [client.submit("errand"), client.submit("ollamaChat", {"prompt": "hello"})]
        worker = worker_for(server.url, Broken())
        assert [worker.turn().did for _ in jobs] == ["failed", "failed"]
        assert [j.refresh().status for j in jobs] == ["failed", "failed"]
        assert [j.detail for j in jobs] == ["The model is gone.", "This worker has no tool ollamaChat; it has errand."]


def test_it_pauses_between_the_empty_answers_of_the_reference():
    with start_reference() as server: assert worker_for(server.url, POLL_INTERVAL=7).turn().pause_s == 7


def test_a_lease_that_the_reference_took_back_is_not_insisted_on():
    with start_reference(GPU_JOB_LEASE_SECONDS=0.01) as server:
        client, hold = Client(server.url, ""), Hold()
        job = client.submit("gate")
        worker, other = worker_for(server.url, hold), Transport(server.url, TOKEN)
        thread = threading.Thread(target=lambda: turns.append(worker.turn()))
        turns = []
        thread.start()
        hold.running.wait(30)
        assert eventually(lambda: other.call("GET", "/gpu-jobs/next"))["job"]["id"] == job.id
        other.call("POST", f"/gpu-jobs/{job.id}/complete", body={"status": "completed", "result": {"by": "other"}})
        hold.go.set()
        thread.join(30)
        assert turns[0].did == "lost" and job.refresh().result == {"by": "other"}


# ---- asking


def test_a_waiting_worker_gets_a_job_at_once(server, client):
    worker, turns = worker_for(server.url), []
    thread = threading.Thread(target=lambda: turns.append(worker.turn()))
    thread.start()
    eventually(lambda: len(server.app.broker.waiters))
    job = client.submit("errand", {"to": "the mill"})
    thread.join(30)
    assert turns[0].did == "completed" and job.refresh().result == {"echo": {"to": "the mill"}}
    assert worker.asking.requests_made == 1


@pytest.mark.parametrize(("token", "words"), [("", "set STACK_WORKER_TOKEN to the server"), ("wrong-guess", "refused the token")])
@pytest.mark.parametrize("start", [lambda tmp: serve(tmp), lambda tmp: start_reference()], ids=["ours", "reference"])
def test_a_wrong_token_ends_the_loop_with_a_sentence(tmp_path, start, token, words):
    with start(tmp_path) as server:
        worker = worker_for(server.url, token=token).start()
        assert worker.join(30) and worker.state == "stopped" and words in worker.last_error
        assert not token or token not in " ".join(worker.lines)


@pytest.mark.parametrize("start", [lambda tmp: serve(tmp, GPU_WORKER_TOKEN=""), lambda tmp: start_reference("")], ids=["ours", "reference"])
def test_a_server_without_a_worker_token_is_waited_for(tmp_path, start):
    with start(tmp_path) as server: turn = worker_for(server.url).turn()
    assert turn.did == "offline" and "start the server with GPU_WORKER_TOKEN" in turn.detail and turn.pause_s > 0


def test_a_tunnel_without_its_server_is_waited_for_and_told_once():
    page = (404, {"Content-Type": "text/html"}, b"<!DOCTYPE html>The endpoint is offline. ERR_NGROK_3200")
    url, _ = canned(page, page, (204, {}, b""))
    worker = worker_for(url, options={"sleep": lambda s: None})
    turns = [worker.turn() for _ in range(3)]
    assert [t.did for t in turns] == ["offline", "offline", "idle"]
    assert len(worker.lines) == 2 and "the tunnel is offline" in worker.lines[0] and "answers again" in worker.lines[1]


def test_a_grant_whose_answer_is_lost_is_asked_for_again(server, client):
    job = client.submit("errand")
    with Wire(server.url) as wire:
        wire.lose("GET /gpu-jobs/next")
        worker = worker_for(wire.url)
        assert [worker.turn().did, worker.turn().did] == ["offline", "completed"]
    assert job.refresh().data["attempts"] == 1


def test_an_answer_lost_while_stopping_is_handed_back(server, client):
    job = client.submit("errand")
    with Wire(server.url) as wire:
        wire.hold("GET /gpu-jobs/next")
        worker = worker_for(wire.url).start()
        assert wire.held.wait(30) and job.refresh().status == "leased"
        assert worker.stop()
        wire.let_go()
    assert (job.refresh().status, job.data["attempts"]) == ("queued", 0)


# ---- running


def test_heartbeats_renew_a_short_lease(tmp_path):
    with serve(tmp_path, GPU_HEARTBEAT_LEASE_SECONDS=1) as server:
        client, hold = Client(server.url, ""), Hold()
        job, worker = client.submit("gate"), worker_for(server.url, hold).start()
        hold.running.wait(30)
        first = server.app.broker.get(job.id).lease_until_ms
        eventually(lambda: server.app.broker.get(job.id).lease_until_ms > first + 2000, "a lease renewed past two lease times")
        hold.go.set()
        assert job.wait(30).result == {"held": True} and job.data["attempts"] == 1
        worker.stop()


def test_what_a_run_says_reaches_a_watcher_in_order_and_whole(tmp_path):
    class Talk:
        tool = "errand"
        def run(self, payload, ctx):
            eventually(lambda: ctx.progress(0, 300) or ctx.watched, "a watcher")
            for n in range(300):
                ctx.token(f"{n} ")
                ctx.progress(n + 1, 300, preview=png(), preview_type="image/png")
                if n % 100 == 0: time.sleep(0.6)  # over several heartbeats
            ctx.log("That was all.")
            return {}
    with serve(tmp_path) as server:
        client = Client(server.url, "")
        job, worker = client.submit("errand"), worker_for(server.url, Talk()).start()
        began = time.monotonic()
        events, took_s = list(job.events()), time.monotonic() - began
        worker.stop()
    assert "".join(e.data["text"] for e in events if e.kind == "token") == "".join(f"{n} " for n in range(300))
    steps = [e.data["step"] for e in events if e.kind == "progress"]
    assert steps == sorted(steps) and steps[-1] == 300 and len(steps) <= took_s / 0.2 + 3 + BURST
    assert any(e.kind == "preview" and e.data["image_base64"].startswith("data:image/png;base64,") for e in events)
    assert [e.data["text"] for e in events if e.kind == "log"] == ["That was all."] and events[-1].kind == "done"


def test_nobody_watching_costs_few_requests(server, client):
    class Busy:
        tool = "errand"
        def run(self, payload, ctx):
            for step in range(300): ctx.progress(step, 300, preview=None); time.sleep(0.01)
            return {}
    client.submit("errand")
    worker, began = worker_for(server.url, Busy()), time.monotonic()
    assert worker.turn().did == "completed"
    beats = 1 + math.log2((time.monotonic() - began) / 0.5)  # after 0.5, 1, 2 s …
    assert 2 <= worker.telling.requests_made <= beats + 2


def test_a_second_attempt_is_watched_too(tmp_path):
    "The numbers of a later attempt's events must not look like ones that were seen."
    class Twice:
        tool, runs = "errand", 0
        def run(self, payload, ctx):
            self.runs += 1
            eventually(lambda: ctx.progress(self.runs, 10) or ctx.watched, "a watcher")
            ctx.token(f"attempt {self.runs}")
            if self.runs == 1: raise Transient("once more")
            return {}
    with serve(tmp_path, GPU_RETRY_SECONDS=0) as server:
        job, worker = Client(server.url, "").submit("errand"), worker_for(server.url, Twice()).start()
        events = list(job.events())
        worker.stop()
    assert [e.data["text"] for e in events if e.kind == "token"] == ["attempt 1", "attempt 2"]


def test_a_cancel_stops_the_run_and_not_the_worker(tmp_path):
    with serve(tmp_path, GPU_HEARTBEAT_LEASE_SECONDS=1) as server:
        client, hold = Client(server.url, ""), Hold()
        job, worker = client.submit("gate"), worker_for(server.url, hold, Quick()).start()
        hold.running.wait(30)
        job.cancel()
        assert job.wait(30).status == "canceled"
        assert client.submit("errand").wait(30).status == "completed"
        worker.stop()


def test_a_result_that_is_too_large_fails_the_job(tmp_path):
    with serve(tmp_path, GPU_MAX_ARTIFACT_BYTES=2048) as server:
        job = Client(server.url, "").submit("imagenGenerate", {"prompt": "x"})
        worker = worker_for(server.url, Paint(png(noise=2_000_000)))
        assert worker.turn().did == "failed"
        assert job.refresh().status == "failed" and "2_048 bytes at most" in job.detail and job.data["attempts"] == 1


@pytest.mark.parametrize(("value", "words"), [({"x": float("nan")}, "not JSON"), ({"x": {1}}, "not JSON"), ("\ud800", None)])
def test_strange_results_do_not_stop_the_worker(server, client, value, words):
    class Strange:
        tool = "errand"
        def run(self, payload, ctx): return value
    job, worker = client.submit("errand"), worker_for(server.url, Strange())
    assert worker.turn().did in ("completed", "failed") and job.refresh().ended
    if words: assert words in job.detail and job.data["attempts"] == 1
    else: assert job.result == "?"


# ---- the server goes away


def test_a_job_outlives_a_server_that_is_killed(tmp_path, gate):
    with start_server(tmp_path / "data", GPU_HEARTBEAT_LEASE_SECONDS=2) as first:
        client = Client(first.url, "")
        job = client.submit("gate", gate.payload)
        with start_worker_process(first.url) as worker:
            eventually(gate.begun)
            first.kill()
            worker.line("No answer to a heartbeat")
            gate.open()
            worker.line(f"The result of job {job.id} waits")
            with start_server(tmp_path / "data", port=first.port):
                assert job.wait(60).status == "completed" and job.result == {"by": "attic"}
                worker.line(f"Completed job {job.id}")
    assert gate.begun() == ["attic"] and job.data["attempts"] == 1


def test_lost_answers_to_uploads_and_completions_do_no_harm(server, client):
    job = client.submit("imagenGenerate", {"prompt": "x"})
    with Wire(server.url) as wire:
        wire.lose("PUT /gpu-jobs/")
        wire.lose("/complete ")
        worker = worker_for(wire.url, Paint(), options={"sleep": lambda s: None})
        assert worker.turn().did == "completed"
        assert [len(wire.heads(word)) for word in ("PUT /gpu-jobs/", "/complete ")] == [2, 2]
    assert job.refresh().png == png() and len(job.artifacts) == 1


@pytest.mark.parametrize("how", ["lose", "drop"])
def test_a_lost_heartbeat_loses_no_words(tmp_path, how):
    class Talk:
        tool = "errand"
        def run(self, payload, ctx):
            eventually(lambda: ctx.progress(0, 1) or ctx.watched, "a watcher")
            getattr(wire, how)("/heartbeat")
            ctx.token("It was the best of times, ")
            assert wire.lost.wait(60)
            ctx.token("it was the worst of times.")
            return {}
    with serve(tmp_path) as server, Wire(server.url) as wire:
        job, worker = Client(server.url, "").submit("errand"), worker_for(wire.url, Talk()).start()
        text = "".join(e.data["text"] for e in job.events() if e.kind == "token")
        worker.stop()
    assert text == "It was the best of times, it was the worst of times."


# ---- the worker goes away


def test_another_worker_finishes_what_a_killed_one_began(tmp_path, gate):
    with start_server(tmp_path / "data", GPU_HEARTBEAT_LEASE_SECONDS=1) as server:
        job = Client(server.url, "").submit("gate", gate.payload)
        with start_worker_process(server.url, "first") as first, start_worker_process(server.url, "second", tools="paint"):
            eventually(gate.begun)
            first.kill()
            with start_worker_process(server.url, "third"):
                eventually(lambda: gate.begun() == ["first", "third"])
                gate.open()
                assert job.wait(60).result == {"by": "third"} and job.data["attempts"] == 2


@pytest.mark.parametrize("executor", ["gate", "stubborn"])
def test_a_worker_that_slept_past_its_lease_cannot_overwrite(tmp_path, gate, executor):
    with start_server(tmp_path / "data", GPU_HEARTBEAT_LEASE_SECONDS=1) as server:
        job = Client(server.url, "").submit("gate", gate.payload)
        with start_worker_process(server.url, "sleeper", tools=executor) as sleeper:
            eventually(gate.begun)
            sleeper.signal(signal.SIGSTOP)
            with start_worker_process(server.url, "second") as second:
                eventually(lambda: gate.begun() == ["sleeper", "second"])
                if executor == "stubborn":  # it wakes up, and finds itself done, while the other still works
                    second.signal(signal.SIGSTOP)
                    gate.open()
                sleeper.signal(signal.SIGCONT)
                assert "granted to another worker" in sleeper.wait_for(rf"(Job {job.id} is no longer ours|The result of job {job.id} was not taken)").string
                second.signal(signal.SIGCONT)
                gate.open()
                assert job.wait(60).result == {"by": "second"}
                second.line(f"Completed job {job.id}")
            assert not any("Completed" in (line or "") for line in sleeper.lines)


def test_a_worker_that_slept_past_its_lease_goes_on_if_nobody_took_over(tmp_path, gate):
    with start_server(tmp_path / "data", GPU_HEARTBEAT_LEASE_SECONDS=1) as server:
        job = Client(server.url, "").submit("gate", gate.payload)
        with start_worker_process(server.url) as sleeper:
            eventually(gate.begun)
            sleeper.signal(signal.SIGSTOP)
            eventually(lambda: job.refresh().status == "queued", "the end of the lease")
            sleeper.signal(signal.SIGCONT)
            eventually(lambda: job.refresh().status == "leased", "the lease taken up again")
            gate.open()
            assert job.wait(60).status == "completed" and job.data["attempts"] == 1
    assert gate.begun() == ["attic"]


# ---- stopping


def test_stopping_hangs_up_the_long_poll(server):
    worker = worker_for(server.url, WORKER_WAIT_SECONDS=55).start()
    eventually(lambda: len(server.app.broker.waiters))
    assert worker.stop() and worker.state == "stopped"
    eventually(lambda: not len(server.app.broker.waiters), "the waiter's leaving")
    assert not any("broke off" in line for line in worker.lines)


def test_stopping_lets_a_job_finish_within_the_grace(server, client):
    hold = Hold()
    job, worker = client.submit("gate"), worker_for(server.url, hold).start()
    hold.running.wait(30)
    threading.Thread(target=lambda: eventually(worker.draining.is_set) and hold.go.set()).start()
    assert worker.stop(grace_s=60) and job.refresh().status == "completed"


def test_an_executor_that_never_looks_up_is_left_behind(server, client):
    hold = Hold(stubborn=True)
    job, worker = client.submit("gate"), worker_for(server.url, hold).start()
    hold.running.wait(30)
    assert not worker.stop(timeout_s=0.1)
    assert (job.refresh().status, job.data["attempts"]) == ("queued", 0)
    hold.go.set()
    assert worker.join(30) and job.refresh().status == "queued" and worker.counts["completed"] == 0


def test_stopping_does_not_wait_for_a_server_that_stays_away(tmp_path):
    hold = Hold()
    with serve(tmp_path) as server:
        Client(server.url, "").submit("gate")
        worker = worker_for(server.url, hold).start()
        hold.running.wait(30)
    hold.go.set()
    eventually(lambda: any("waits" in line for line in worker.lines))
    assert worker.stop(timeout_s=0.1) and any("stays in" in line for line in worker.lines)


@pytest.mark.parametrize("quiet", ["", "1"], ids=["", "SIGINT ignored"])
def test_interrupts_drain_then_hand_back(tmp_path, gate, quiet):
    with start_server(tmp_path / "data") as server:
        client = Client(server.url, "")
        job = client.submit("gate", gate.payload)
        with start_worker_process(server.url, TEST_IGNORE_SIGINT=quiet) as worker:
            eventually(gate.begun)
            worker.signal(signal.SIGTERM)
            worker.line("Finishing the job under way")
            assert job.refresh().status == "leased"
            worker.signal(signal.SIGTERM)
            assert worker.popen.wait(60) == 0
            worker.line(f"Released job {job.id}")
        assert (job.refresh().status, job.data["attempts"]) == ("queued", 0)


def test_a_third_interrupt_stops_at_once(tmp_path, gate):
    with start_server(tmp_path / "data") as server:
        Client(server.url, "").submit("gate", gate.payload)
        with start_worker_process(server.url, tools="stubborn", TEST_TIMEOUT=3600) as worker:
            eventually(gate.begun)
            worker.signal(signal.SIGINT)
            worker.line("Finishing the job under way")
            code = None
            while code is None:  # the second may come before the first was dealt with
                worker.signal(signal.SIGINT)
                try: code = worker.popen.wait(0.3)
                except subprocess.TimeoutExpired: pass
            assert code in (130, -signal.SIGINT)  # a further one that comes while the process exits; a shell calls both 130


def test_an_interrupt_in_the_foreground_hands_the_job_back(server, client):
    class Interrupted:
        tool = "errand"
        def run(self, payload, ctx): raise KeyboardInterrupt
    job, worker = client.submit("errand"), worker_for(server.url, Interrupted())
    with pytest.raises(KeyboardInterrupt): worker.turn()
    assert (job.refresh().status, job.data["attempts"]) == ("queued", 0)


# ---- the same cell again


def test_running_the_cell_again_leaves_one_loop(server, client):
    first = start_worker([Quick()], settings(server.url), log=None)
    eventually(lambda: len(server.app.broker.waiters))
    second = start_worker([Quick()], settings(server.url), log=None)
    eventually(lambda: len(server.app.broker.waiters) == 1)
    assert not first.alive and second.alive
    with pytest.raises(Exception, match="must be an address"): start_worker([Quick()], settings("attic"))
    assert second.alive and client.submit("errand").wait(30).status == "completed"
    assert stop_worker() and not second.alive and not stop_worker()


def test_a_reloaded_module_finds_the_loop_of_the_old_one(server):
    code = f"""
import sys, threading
from colab_gpu.config import Settings
class Quick:
    tool = "errand"
    def run(self, payload, ctx): return {{}}
def cell():
    from colab_gpu.worker import start_worker
    return start_worker([Quick()], Settings({{"STACK_API_BASE": {server.url!r}, "STACK_WORKER_TOKEN": {TOKEN!r}}}), log=None)
first = cell()
for name in [n for n in sys.modules if n.startswith("colab_gpu")]: del sys.modules[name]
second = cell()
print(type(first) is type(second), first.alive, second.alive)
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env={**os.environ, "PYTHONPATH": os.getcwd()}, timeout=120)
    assert done.stdout.strip() == "False False True", done.stderr


# ---- in all


def test_a_hundred_jobs_over_a_bad_line_are_done_once_each(tmp_path):
    "Three workers, a connection that loses answers of every sort; every job ends completed, with one result."
    chance = random.Random(7)
    with serve(tmp_path) as server, Wire(server.url) as wire:
        client = Client(server.url, "")
        jobs = [client.submit("errand", {"n": n}) for n in range(100)]
        for _ in range(30): wire.lose(chance.choice(["GET /gpu-jobs/next", "/complete "]), after=chance.choice([0, 0, 50]))
        workers = [worker_for(wire.url, WORKER_ID=f"w{n}", options={"sleep": lambda s: time.sleep(0.01)}).start() for n in range(3)]
        for job in jobs: assert job.wait(120).result == {"echo": job.payload}
        for worker in workers: worker.stop(grace_s=60)
        assert sum(w.counts["completed"] for w in workers) == 100 and max(j.refresh().data["attempts"] for j in jobs) == 1
        assert len(wire._plans) == 0, "every planned loss happened"


def test_no_secret_reaches_the_log(server, client):
    class Leaky:
        tool = "errand"
        def run(self, payload, ctx): raise RuntimeError(f"401 for Bearer {TOKEN} at the hub with hf_secret_of_mine")
    job = client.submit("errand", maxAttempts=1)
    out = []
    worker = Worker([Leaky()], settings(server.url, HF_TOKEN="hf_secret_of_mine"), log=out.append)
    worker.turn()
    text = "\n".join(out) + str(worker.snapshot()) + repr(worker) + str(job.refresh().data)
    assert "RuntimeError" in text and "•••" in text and TOKEN not in text and "hf_secret" not in text


def test_the_log_says_what_the_reference_says(server, client):
    job = client.submit("errand")
    worker = worker_for(server.url)
    worker.loop(once=True)
    lines = [line.split(" at ")[0] for line in worker.lines]
    assert lines == ["Worker loop started for attic", f"[worker] Leased job {job.id} (errand)", f"[worker] Completed job {job.id}",
                     "Worker loop stopped."]
