"""A worker that survives its runtime: a busy interpreter, a hanging run, a crash between a result and its report, the end of a session."""

import os
import threading
import time
from pathlib import Path

import pytest
from processes import Wire, eventually, kept_results, start_server, start_worker_process
from test_worker import DATA, Hold, Paint, Quick, serve, worker_for

from colab_gpu.client import Client
from colab_gpu.errors import OutOfMemory
from colab_gpu.hearts import Heart
from colab_gpu.outbox import Outbox
from colab_gpu.runs import Grant, Run
from colab_gpu.worker import LAST_S, REST_S


class Nap:
    "Sleeps as long as it is told, in small steps."
    tool = "nap"
    def __init__(self): self.begun = []
    def run(self, payload, ctx):
        self.begun.append(payload.get("n"))
        end = time.monotonic() + payload.get("seconds", 0)
        while time.monotonic() < end: ctx.check(); time.sleep(0.01)
        return {"n": payload.get("n")}


class Broken:
    tool = "nap"
    def __init__(self): self.mended = False
    def run(self, payload, ctx):
        if self.mended: return {}
        raise OutOfMemory("No room.")


# ---- a busy interpreter


@pytest.mark.parametrize("guard", ["1", "0"], ids=["guarded", "unguarded"])
def test_an_executor_that_holds_the_interpreter_keeps_its_lease(tmp_path, guard):
    with start_server(tmp_path / "data", GPU_HEARTBEAT_LEASE_SECONDS=1) as server:
        client = Client(server.url, "")
        with start_worker_process(server.url, tools="grip", WORKER_GUARD=guard) as first:
            job = client.submit("grip", {"seconds": 4})
            first.line("Leased job")
            with start_worker_process(server.url, "cellar", tools="grip"):
                job.wait(60)
        # The unguarded one shows that the lease would have been lost: the other worker was granted the job too.
        assert (job.status, job.data["attempts"], job.data["workerId"]) == (
            ("completed", 1, "attic") if guard == "1" else ("completed", 2, "cellar"))


def test_the_guard_ends_with_its_worker(tmp_path, gate_job):
    with start_server(tmp_path / "data", GPU_HEARTBEAT_LEASE_SECONDS=1) as server:
        client, payload = Client(server.url, ""), gate_job
        with start_worker_process(server.url) as first:
            job = client.submit("gate", payload)
            eventually(lambda: os.path.exists(payload["mark"]))
            [guard] = eventually(lambda: children(first.popen.pid))
            first.kill()
            eventually(lambda: not os.path.exists(f"/proc/{guard}") or not children_of_name(guard), "the guard's end")
        with start_worker_process(server.url, "cellar"):
            open(payload["gate"], "w").close()
            assert job.wait(60).data["workerId"] == "cellar"


def children(pid):
    "The processes that any thread of one has started."
    return [int(n) for file in Path(f"/proc/{pid}/task").glob("*/children") for n in file.read_text().split()]


def children_of_name(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as file: return "guard.py" in file.read()
    except OSError: return False


@pytest.fixture
def gate_job(tmp_path): return {"gate": str(tmp_path / "gate"), "mark": str(tmp_path / "mark")}


# ---- a hanging run


def test_a_run_that_stands_still_loses_its_lease(tmp_path):
    with serve(tmp_path, GPU_HEARTBEAT_LEASE_SECONDS="1") as server:
        client = Client(server.url, "")
        stuck, job = Hold(stubborn=True), client.submit("gate")
        first = worker_for(server.url, stuck, WORKER_STALL_SECONDS="starting=1").start()
        stuck.running.wait(30)
        eventually(lambda: any("stood still for 1 s (starting)" in line for line in first.lines))
        helpful = Hold()
        helpful.go.set()
        second = worker_for(server.url, helpful, WORKER_ID="cellar").start()
        assert job.wait(30).data["workerId"] == "cellar"
        stuck.go.set()
        assert second.stop(5) and first.stop(5)
        assert job.refresh().data["workerId"] == "cellar" and first.counts["completed"] == 0


def test_getting_on_keeps_the_lease():
    at = [0.0]
    class Yes:
        def call(self, *_, **__): return {"leaseSeconds": 60}
    heart = Heart(Yes(), run := Run(Grant({"id": "7", "tool": "nap"}, "t", 60, 20)), lambda line: None, clock=lambda: at[0], limits={"running": 30})
    for step in range(20):
        at[0] += 20
        run.progress(step, 20)
        heart.beat()
    assert run.why is None
    at[0] += 20; heart.beat(); at[0] += 20; heart.beat()
    assert run.why == "lost" and "stood still" in run.reason


# ---- a result that outlives its worker


def test_a_finished_result_outlives_server_and_worker(tmp_path, gate_job):
    with start_server(tmp_path / "data") as server:
        job = Client(server.url, "").submit("gate", gate_job)
        with start_worker_process(server.url, COLAB_GPU_DATA=tmp_path / "work") as first:
            eventually(lambda: os.path.exists(gate_job["mark"]))
            server.kill()
            open(gate_job["gate"], "w").close()
            first.line("waits:")
            first.kill()
    assert len(kept_results(tmp_path / "work")) == 1
    with start_server(tmp_path / "data", server.port) as server, \
         start_worker_process(server.url, "cellar", tools="paint", COLAB_GPU_DATA=tmp_path / "work") as second:
        done = Client(server.url, "").job(job.id).wait(60)
        second.line("left by an earlier worker")
        assert (done.status, done.result, done.data["attempts"]) == ("completed", {"by": "attic"}, 1)
        eventually(lambda: not kept_results(tmp_path / "work"))
    with open(gate_job["mark"]) as file: assert file.read().split() == ["attic"]


def test_a_picture_in_the_outbox_arrives_whole(tmp_path):
    picture = os.urandom(300_000)
    with serve(tmp_path) as server:
        client = Client(server.url, "")
        job = client.submit("imagenGenerate", {"prompt": "x"})
        with Wire(server.url) as wire:
            first = worker_for(wire.url, Paint(picture), COLAB_GPU_DATA=str(tmp_path / "work"))
            for _ in range(9): wire.drop("PUT ")
            thread = threading.Thread(target=first.turn, daemon=True)
            first.pause = lambda *_: first.giving_up.set()
            thread.start()
            thread.join(30)
            assert first.counts["kept"] == 1 and not thread.is_alive()
            first.outbox.close()
            wire._plans.clear()
            second = worker_for(wire.url, Quick(), COLAB_GPU_DATA=str(tmp_path / "work")).start()
            assert job.wait(30).status == "completed" and job.png == picture and second.stop(5)
        assert not (tmp_path / "work").exists()


def test_a_result_that_is_not_wanted_any_more_overwrites_nothing(tmp_path):
    with serve(tmp_path) as server:
        client = Client(server.url, "")
        job = client.submit("imagenGenerate", {"prompt": "x", "seed": 1})
        assert worker_for(server.url, Paint()).turn().did == "completed"
        left = Outbox(tmp_path / "work" / "outbox", server.url)
        left.keep(Run(Grant({"id": job.id, "tool": "imagenGenerate"}, "an old token")), {"status": "completed", "result": {"seed": 666}})
        left.close()
        worker = worker_for(server.url, Paint(), COLAB_GPU_DATA=str(tmp_path / "work")).start()
        eventually(lambda: any("not wanted any more" in line for line in worker.lines))
        assert worker.stop(5) and job.refresh().result["seed"] == 1 and not (tmp_path / "work").exists()


def test_nothing_is_left_behind_on_disk(tmp_path):
    with serve(tmp_path) as server:
        client = Client(server.url, "")
        worker = worker_for(server.url, Paint(), COLAB_GPU_DATA=str(tmp_path / "work")).start()
        assert {client.submit("imagenGenerate", {"prompt": "x"}).wait(30).status for _ in range(3)} == {"completed"}
        assert worker.stop(5) and not (tmp_path / "work").exists()


# ---- one ahead, one behind


def amid(hold, url, usual_s):
    "A worker in the middle of a `gate` job, which took `usual_s` seconds the last time."
    worker = worker_for(url, hold)
    worker.pace["gate", ""] = usual_s
    worker.start()
    hold.running.wait(30)
    return worker


def test_the_next_job_is_leased_while_one_runs_that_ends_soon(tmp_path):
    with serve(tmp_path) as server:
        client, hold = Client(server.url, ""), Hold()
        first, second = client.submit("gate"), client.submit("gate")
        worker = amid(hold, server.url, 1.0)
        eventually(lambda: second.refresh().status == "leased")
        eventually(lambda: [job["phase"] for job in worker.snapshot()["jobs"]] == ["starting", "waiting"])
        hold.go.set()
        assert {first.wait(30).status, second.wait(30).status} == {"completed"} and worker.stop(5)


def test_a_job_is_not_kept_waiting_behind_one_that_takes_long(tmp_path):
    with serve(tmp_path) as server:
        client, hold = Client(server.url, ""), Hold()
        client.submit("gate")
        second = client.submit("gate")
        worker = amid(hold, server.url, 3600.0)
        quick = Hold()
        quick.go.set()
        other = worker_for(server.url, quick, WORKER_ID="cellar").start()
        assert second.wait(30).data["workerId"] == "cellar"
        hold.go.set()
        assert worker.stop(5) and other.stop(5)


def test_who_is_idle_gets_the_job_before_who_looks_ahead(tmp_path):
    with serve(tmp_path) as server, Wire(server.url) as wire:
        client, hold = Client(server.url, ""), Hold()
        client.submit("gate")
        busy = amid(hold, wire.url, 1.0)
        eventually(lambda: len(wire.heads("wait=0")) >= 1, "a look ahead")
        quick = Hold()
        quick.go.set()
        idle = worker_for(server.url, quick, WORKER_ID="cellar").start()
        looks, jobs = len(wire.heads("wait=0")), []
        for _ in range(5):
            eventually(lambda: any(w["id"] == "cellar" and w["waiting"] for w in client.workers()))
            jobs.append(client.submit("gate").wait(30))
        eventually(lambda: len(wire.heads("wait=0")) > looks, "another look ahead")
        assert {job.data["workerId"] for job in jobs} == {"cellar"}
        hold.go.set()
        assert busy.stop(5) and idle.stop(5)


def test_what_was_leased_ahead_is_handed_back_when_the_worker_drains(tmp_path):
    with serve(tmp_path) as server:
        client, hold = Client(server.url, ""), Hold()
        client.submit("gate")
        second = client.submit("gate")
        worker = amid(hold, server.url, 1.0)
        eventually(lambda: second.refresh().status == "leased")
        worker.drain()
        hold.go.set()
        assert worker.join(30) and (second.refresh().status, second.data["attempts"]) == ("queued", 0)


def test_results_that_cannot_be_sent_stop_the_calls_and_are_all_kept(tmp_path):
    with serve(tmp_path) as server, Wire(server.url) as wire:
        client, nap = Client(server.url, ""), Nap()
        worker = worker_for(wire.url, nap, COLAB_GPU_DATA=str(tmp_path / "work"))
        jobs = [client.submit("nap", {"n": n}) for n in range(6)]
        for _ in range(40): wire.drop("/complete")
        worker.start()
        eventually(lambda: len(nap.begun) >= 3 and len(kept_results(tmp_path / "work")) >= 2)
        wire._plans.clear()
        assert [job.wait(60).result["n"] for job in jobs] == list(range(6)) and nap.begun == list(range(6)) and worker.stop(5)


# ---- what the worker makes of itself


def test_three_failed_jobs_in_a_row_and_it_rests(tmp_path):
    with serve(tmp_path, GPU_MAX_ATTEMPTS="1") as server:
        client, broken, rests = Client(server.url, ""), Broken(), []
        worker = worker_for(server.url, broken)
        def pause(seconds, until):
            if seconds >= REST_S:
                rests.append(seconds)
                broken.mended = len(rests) == 2
            else: until.wait(min(seconds, 0.05))
        worker.pause = pause
        jobs = [client.submit("nap", {"n": n}) for n in range(6)]
        worker.start()
        ended = [job.wait(30).status for job in jobs]
        assert worker.stop(5) and ended[:3] == ["failed"] * 3 and ended[-1] == "completed" and rests == [REST_S, 2 * REST_S]
        assert any("failed in a row, the last with: No room. Resting for 60 s" in line for line in worker.lines)


def test_jobs_asked_for_wrongly_cost_no_rest(tmp_path):
    with serve(tmp_path) as server:
        client, worker = Client(server.url, ""), worker_for(server.url, Quick(), Refuses())
        worker.pause = lambda seconds, until: until.wait(min(seconds, 0.05))
        worker.start()
        assert {client.submit("picky", {"n": n}).wait(30).status for n in range(5)} == {"failed"}
        assert worker.stop(5) and not worker.streak.failed


class Refuses:
    tool = "picky"
    def run(self, payload, ctx):
        from colab_gpu.errors import InvalidInput
        raise InvalidInput("Not like that.")


def test_near_the_end_of_its_session_it_takes_nothing_more_and_hands_back(tmp_path):
    at = [0.0]
    with serve(tmp_path, GPU_HEARTBEAT_LEASE_SECONDS="1") as server:
        client, hold = Client(server.url, ""), Hold()
        job, later = client.submit("gate"), client.submit("gate")
        worker = worker_for(server.url, hold, options={"session_end": 1000.0, "clock": lambda: at[0] + time.monotonic() % 1e-3})
        worker.pulse.clock = time.monotonic
        worker.start()
        hold.running.wait(30)
        at[0] = 1000 - 2 * LAST_S
        worker.pulse.bell.set()
        eventually(worker.draining.is_set)
        assert not worker.ended.is_set() and worker.runs[0].why is None
        at[0] = 1000 - LAST_S / 2
        worker.pulse.bell.set()
        assert worker.join(30)
        assert (job.refresh().status, job.data["attempts"], later.refresh().status) == ("queued", 0, "queued")


def test_the_session_comes_from_a_setting():
    worker = worker_for("http://127.0.0.1:9", WORKER_SESSION_SECONDS=100, options={"clock": lambda: 7.0})
    assert worker.session_end == 107 and worker_for("http://127.0.0.1:9").session_end is None and DATA.name


def test_what_it_has_and_why_it_rests_is_shown_by_the_server(tmp_path):
    class Painter(Broken):
        def models(self): return ["warm-one"]
        def on_disk(self): return ["warm-one", "cold-one"]
    with serve(tmp_path, GPU_MAX_ATTEMPTS="1") as server:
        client, shown = Client(server.url, ""), []
        worker = worker_for(server.url, Painter(), options={"info": {"accelerator": "Tesla T4", "versions": "torch=2.13.0"}})
        def pause(seconds, until):
            if seconds >= REST_S: shown.append(client.workers()[0]); worker.drain()
        worker.pause = pause
        jobs = [client.submit("nap", {"n": n}) for n in range(3)]
        worker.start()
        assert worker.join(30) and {job.wait(30).status for job in jobs} == {"failed"}
    assert shown[0]["models"] == ["warm-one"] and shown[0]["disk"] == ["cold-one", "warm-one"] and shown[0]["versions"] == {"torch": "2.13.0"}
    assert shown[0]["paused"] == "No room."


def test_an_idle_worker_hears_that_it_should_drain(tmp_path):
    with serve(tmp_path) as server:
        client = Client(server.url, "")
        worker = worker_for(server.url, Quick()).start()
        eventually(lambda: any(w["waiting"] for w in client.workers()))
        client.transport.call("POST", "/workers/attic/drain")
        assert worker.join(30) and any("asks this worker to stop" in line for line in worker.lines)
