"""What an adversary does to a worker: answers that are none, folders that vanish, questions that hang, and all of that while it stops."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT
from processes import TOKEN, Process, Wire, eventually, kept_results, start_reference, start_server
from test_client import canned
from test_worker import DATA, Hold, Paint, Quick, serve, settings, worker_for
from test_worker_survival import Nap

from colab_gpu.client import Client
from colab_gpu.guard import Guard, renewer
from colab_gpu.guard import Hold as Held
from colab_gpu.hearts import Heart
from colab_gpu.outbox import Outbox
from colab_gpu.runs import Grant, Run
from colab_gpu.worker import hand_back_all, put_down, resend, take_on


results = kept_results


def run_of(job_id="7", heartbeat_s=20): return Run(Grant({"id": job_id, "tool": "errand"}, "t", 60, heartbeat_s))


# ---- the outbox


def test_a_worker_that_is_started_again_sends_what_it_kept_before(tmp_path):
    with serve(tmp_path) as server, Wire(server.url) as wire:
        client = Client(server.url, "")
        worker = worker_for(wire.url, Quick(), COLAB_GPU_DATA=str(tmp_path / "work"))
        for _ in range(99): wire.drop("/complete")
        job, _ = client.submit("errand"), worker.start()
        eventually(lambda: any("waits:" in line for line in worker.lines))
        assert worker.stop(timeout_s=0.1) and worker.counts["kept"] == 1
        wire._plans.clear()
        worker.start()
        assert job.wait(30).status == "completed" and worker.stop(5) and not (tmp_path / "work").exists()


def test_an_outbox_that_vanishes_stops_nobody(tmp_path):
    import shutil
    with serve(tmp_path) as server:
        client = Client(server.url, "")
        worker = worker_for(server.url, Quick(), COLAB_GPU_DATA=str(tmp_path / "work")).start()
        assert client.submit("errand").wait(30).status == "completed"
        shutil.rmtree(tmp_path / "work")
        assert client.submit("errand").wait(30).status == "completed"
        eventually(lambda: not worker.runs)
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        assert worker.stop(5) and worker.start().alive and worker.stop(5)


def test_a_part_whose_lock_was_removed_is_found_all_the_same(tmp_path):
    first, second = (Outbox(tmp_path, "http://127.0.0.1:1") for _ in "ab")
    first.keep(run_of("6"), {"status": "completed", "result": 6})
    (first.mine / "lock").unlink()
    first.keep(run_of("7"), {"status": "completed", "result": 7})
    part = first.mine
    first.close()
    (part / "lock").unlink(missing_ok=True)
    assert [body["result"] for _, _, body in second.left()] == [6, 7]


def test_reports_side_by_side_do_not_open_the_lock(tmp_path):
    "The lock is taken by whichever of them is first, once: a second file for the same lock would open it when it goes."
    for n in range(30):
        box, ready = Outbox(tmp_path / str(n), "http://127.0.0.1:1"), threading.Barrier(8)
        def keep(box=box, ready=ready):
            ready.wait()
            box.keep(run_of(), {"status": "completed", "result": {}})
        threads = [threading.Thread(target=keep) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not list(Outbox(tmp_path / str(n), "http://127.0.0.1:1").left())
        box.close()


def test_a_full_disk_keeps_no_half_results(tmp_path):
    code = f"""
import resource, signal
from colab_gpu.outbox import Outbox
from colab_gpu.runs import Grant, Run
run = Run(Grant({{"id": "7", "tool": "paint"}}, "t"))
for n in range(2): run.artifact(f"{{n}}.png", bytes(100_000 * (n + 1)), "image/png")
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
box = Outbox(__import__("pathlib").Path({str(tmp_path)!r}), "http://127.0.0.1:1")
print(box.keep(run, {{"status": "completed", "result": {{}}}}))
print(sorted(p.name for p in box.mine.iterdir()))
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    lines = done.stdout.splitlines()
    assert os.strerror(errno.EFBIG) in lines[0] and lines[1:] == ["None", "['lock']"], done.stdout + done.stderr


def test_a_job_id_leads_nowhere_else(tmp_path):
    box = Outbox(tmp_path / "outbox", "http://127.0.0.1:1")
    kept = box.keep(run_of("../../up/" + "x" * 400), {"status": "completed", "result": {}})
    assert kept.parent == box.mine and [p.name for p in tmp_path.iterdir()] == ["outbox"]
    box.close()


def test_one_result_that_the_server_chokes_on_does_not_block_the_others(tmp_path):
    left = Outbox(tmp_path / "work" / "outbox", url := choking("first"))
    for name in ("first", "second"): left.keep(run_of(name), {"status": "completed", "result": {}})
    left.close()
    worker = worker_for(url, COLAB_GPU_DATA=str(tmp_path / "work"), options={"sleep": lambda s: None})
    resend(worker)
    assert worker.counts["completed"] == 1 and [p.parent.name[:5] for p in results(tmp_path / "work")] == ["first"]


def choking(word):
    "The address of a server that answers 500 to requests whose head has the word, else with an empty object."
    listener = socket.create_server(("127.0.0.1", 0))
    def answer(caller):
        with caller:
            while head := caller.recv(65536):
                bad = word.encode() in head.split(b"\r\n")[0]
                body = json.dumps({"error": "internal", "message": "Look at the log.", "retryable": False} if bad else {}).encode()
                status = b"500 Internal Server Error" if bad else b"200 OK"
                if b"Content-Length" in head and not head.partition(b"\r\n\r\n")[2]: caller.recv(65536)
                caller.sendall(b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))
    def accept():
        while True: threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()
    threading.Thread(target=accept, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_an_idle_worker_stops_though_what_others_left_cannot_be_sent(tmp_path):
    with serve(tmp_path) as server, Wire(server.url) as wire:
        left = Outbox(tmp_path / "work" / "outbox", wire.url)
        left.keep(run_of(), {"status": "completed", "result": {}})
        left.close()
        for _ in range(99): wire.drop("/complete")
        worker = worker_for(wire.url, COLAB_GPU_DATA=str(tmp_path / "work")).start()
        eventually(lambda: any("waits:" in line for line in worker.lines))
        worker.drain()
        assert worker.join(30) and len(results(tmp_path / "work")) == 1


# ---- the loop


def test_a_finished_result_is_on_disk_while_the_question_for_the_next_job_hangs(tmp_path):
    with serve(tmp_path) as server, Wire(server.url) as wire:
        client, hold = Client(server.url, ""), Hold()
        worker = worker_for(wire.url, hold, COLAB_GPU_DATA=str(tmp_path / "work"))
        worker.pace["gate", ""] = 1.0
        ask = worker.asking.call
        worker.asking.call = lambda *args, **options: ask(*args, **{**options, "read_s": 600})
        wire.hold("wait=0")
        for _ in range(99): wire.drop("/complete")
        client.submit("gate")
        worker.start()
        assert wire.held.wait(30)
        hold.go.set()
        eventually(lambda: results(tmp_path / "work"), timeout_s=40)
        assert worker.question, "it still hangs"
        wire._plans.clear()
        wire.let_go()
        assert worker.stop(30)


def test_every_finished_result_is_on_disk_though_none_can_be_sent(tmp_path):
    with serve(tmp_path) as server, Wire(server.url) as wire:
        client, nap = Client(server.url, ""), Nap()
        worker = worker_for(wire.url, nap, COLAB_GPU_DATA=str(tmp_path / "work"), WORKER_AHEAD_SECONDS=0)
        jobs = [client.submit("nap", {"n": n}) for n in range(5)]
        for _ in range(200): wire.drop("/complete")
        worker.start()
        eventually(lambda: len(nap.begun) == 3)
        eventually(lambda: len(results(tmp_path / "work")) == 3)
        assert nap.begun == [0, 1, 2], "while none can be sent, there is no sense in more of them"
        wire._plans.clear()
        assert [job.wait(60).result["n"] for job in jobs] == list(range(5)) and worker.stop(5)


def test_a_worker_without_long_polls_asks_for_no_orders(tmp_path):
    with serve(tmp_path) as server, Wire(server.url) as wire:
        hold = Hold()
        worker = worker_for(wire.url, hold, WORKER_WAIT_SECONDS=0).start()
        Client(server.url, "").submit("gate")
        hold.running.wait(30)
        eventually(lambda: len(wire.heads("wait=0")) > 2 or wire.heads("/heartbeat"))
        asked = len(wire.heads("/orders"))
        hold.go.set()
        assert worker.stop(5) and asked == 0


@pytest.mark.parametrize("job", [None, "errand"])
def test_a_log_that_fails_stops_nothing(tmp_path, job):
    def closed(line): raise RuntimeError("the cell is gone")
    with serve(tmp_path) as server:
        from colab_gpu.worker import Worker
        worker = Worker([Quick()], settings(server.url), log=closed).start()
        if job: assert Client(server.url, "").submit(job).wait(30).status == "completed"
        assert worker.stop(5)


def test_one_lost_job_does_not_keep_the_others_from_being_handed_back(tmp_path):
    with serve(tmp_path) as server:
        client, worker = Client(server.url, ""), worker_for(server.url)
        jobs = [client.submit("errand", {"n": n}) for n in range(3)]
        grants = [Grant.read(worker.asking.call("GET", "/gpu-jobs/next", headers={"X-Protocol": "1"}, params={"worker": "attic"})) for _ in jobs]
        worker.telling.call("POST", f"{grants[0].path}/complete", body={"leaseToken": grants[0].token, "status": "completed", "result": {}})
        hand_back_all(worker, grants)
        assert [job.refresh().status for job in jobs] == ["completed", "queued", "queued"]


def test_a_job_handed_back_over_its_executors_head_is_not_renewed(tmp_path):
    with serve(tmp_path) as server, Wire(server.url) as wire:
        hold = Hold(stubborn=True)
        job = Client(server.url, "").submit("gate")
        worker = worker_for(wire.url, hold).start()
        hold.running.wait(30)
        for _ in range(9): wire.drop("/release")
        assert not worker.stop(timeout_s=0.1)
        assert not worker.pulse.hearts, "the server didn't hear of it, so the lease must be left to end"
        hold.go.set()
        assert worker.join(30) and job.refresh().status in ("leased", "queued", "completed")


def test_an_interrupt_while_results_wait_for_room_loses_none(tmp_path):
    "A loop in the foreground, as in a notebook's cell, whose process lives on after Ctrl-C."
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT / "tests")!r})
from colab_gpu.worker import Worker
from test_worker_survival import Nap
worker = Worker([Nap()], log=lambda line: print(line, flush=True))
try: worker.loop()
except KeyboardInterrupt: print("INTERRUPTED", len(worker.outbox.folder and list(worker.outbox.folder.glob("*/*/result.json"))), flush=True)
time.sleep(600)
"""
    with serve(tmp_path) as server, Wire(server.url) as wire:
        client = Client(server.url, "")
        for n in range(3): client.submit("nap", {"n": n})
        for _ in range(200): wire.drop("/complete")
        with Process("-c", code, STACK_API_BASE=wire.url, STACK_WORKER_TOKEN=TOKEN, COLAB_GPU_DATA=tmp_path / "work", PYTHONPATH=ROOT,
                     WORKER_AHEAD_SECONDS=0) as worker:
            worker.wait_for("waits:", skip=2)
            worker.signal(signal.SIGINT)
            worker.line("INTERRUPTED 3")


def test_stopping_a_loop_in_the_foreground_hangs_up_too(tmp_path):
    with serve(tmp_path) as server, Wire(server.url) as wire:
        worker = worker_for(wire.url, WORKER_WAIT_SECONDS=55)
        thread = threading.Thread(target=worker.loop, daemon=True)
        thread.start()
        eventually(lambda: len(server.app.broker.waiters))
        worker.stop()
        thread.join(40)
        assert not thread.is_alive()


# ---- leases


def test_a_lost_job_is_renewed_no_more_though_its_run_goes_on():
    sent = []
    class Gone:
        def call(self, *_, **__):
            sent.append(1)
            from colab_gpu.errors import LeaseLost
            raise LeaseLost("Job 7 was granted to another worker.")
    heart = Heart(Gone(), run := run_of(), lambda line: None)
    heart.beat()
    run.progress(1, 2)
    assert heart.due() == float("inf") and heart.beat() == float("inf") and len(sent) == 1


@pytest.mark.parametrize("answer", [b"HTP/1.1 what\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{", b"",
                                    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n17"], ids=["garbage", "cut", "nothing", "not an object"])
def test_no_answer_ends_the_guard(answer):
    listener = socket.create_server(("127.0.0.1", 0))
    def serve_one():
        caller, _ = listener.accept()
        with caller: caller.recv(65536); caller.sendall(answer)
    threading.Thread(target=serve_one, daemon=True).start()
    assert renewer(f"http://127.0.0.1:{listener.getsockname()[1]}", "t")(Held("/gpu-jobs/7", "t", 20, 0, 0)) is None
    listener.close()


def test_a_job_that_waits_behind_a_hanging_interpreter_is_not_kept_for_ever():
    told = []
    class Ear:
        def awake(self, lease, left_s): told.append(left_s)
    class Yes:
        def call(self, *_, **__): return {"leaseSeconds": 60}
    run = run_of()
    run.enter("waiting")
    Heart(Yes(), run, lambda line: None, limits={"running": 30}, guard=Ear()).beat()
    assert told == [30]


def test_jobs_that_wait_behind_a_hanging_one_are_handed_back(tmp_path):
    with serve(tmp_path, GPU_HEARTBEAT_LEASE_SECONDS="1") as server:
        client, stuck = Client(server.url, ""), Hold(stubborn=True)
        first, second = client.submit("gate"), client.submit("gate")
        worker = worker_for(server.url, stuck, WORKER_STALL_SECONDS="starting=1", WORKER_AHEAD_SECONDS=0)
        ask = lambda: Grant.read(worker.asking.call("GET", "/gpu-jobs/next", headers={"X-Protocol": "1"}, params={"worker": "attic"}))  # noqa: E731
        worker.next = take_on(worker, [ask(), ask()])
        worker.max_batch = 1
        worker.start()
        stuck.running.wait(30)
        helpful = Hold()
        helpful.go.set()
        other = worker_for(server.url, helpful, WORKER_ID="cellar").start()
        assert {job.wait(30).data["workerId"] for job in (first, second)} == {"cellar"}
        stuck.go.set()
        assert other.stop(5) and worker.stop(5) and worker.counts["completed"] == 0


def test_the_guard_forgets_a_job_that_is_put_down_during_a_beat():
    words = []
    class Ear:
        def awake(self, lease, left_s):
            put_down(worker, [run])  # from another thread, between the beat's look and its word
            words.append("awake")
        def drop(self, lease): words.append("drop")
    class Yes:
        def call(self, *_, **__): return {"leaseSeconds": 60}
    worker, run = worker_for("http://127.0.0.1:9"), run_of()
    worker.guard = Ear()
    Heart(Yes(), run, lambda line: None, guard=worker.guard).beat()
    assert words == ["drop", "awake", "drop"]


def test_the_guard_hears_all_that_was_said_while_a_beat_got_no_answer():
    "A job that was put down meanwhile is not beaten for."
    asked, said, listener = [], threading.Event(), socket.create_server(("127.0.0.1", 0))
    def answer(caller):
        with caller:
            asked.append(caller.recv(65536).split()[1].decode())
            said.wait(60)
    def accept():
        while True: threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()
    threading.Thread(target=accept, daemon=True).start()
    guard = Guard(f"http://127.0.0.1:{listener.getsockname()[1]}", "t")
    guard.awake(run_of("a", heartbeat_s=0).grant, 600)
    eventually(lambda: asked)
    for job in "bc": guard.awake(run_of(job, heartbeat_s=0).grant, 600)
    for job in "abc": guard.drop(run_of(job).grant)
    process = guard._process
    process.stdin.close()
    said.set()
    assert process.wait(60) == 0 and asked == ["/gpu-jobs/a/heartbeat"]


# ---- a prefetched job


@pytest.mark.parametrize("how", ["canceled", "ended"])
def test_a_prefetched_job_that_is_gone_before_its_turn_is_not_run(tmp_path, how):
    with serve(tmp_path, GPU_HEARTBEAT_LEASE_SECONDS="2") as server:
        client, hold, begun = Client(server.url, ""), Hold(), []
        run = hold.run
        hold.run = lambda payload, ctx: (begun.append(ctx.job_id), run(payload, ctx))[1]
        first, second = client.submit("gate"), client.submit("gate")
        worker = worker_for(server.url, hold)
        worker.pace["gate", ""] = 1.0
        worker.start()
        hold.running.wait(30)
        eventually(lambda: len(worker.runs) == 2)
        if how == "canceled": second.cancel()
        else:
            worker.telling.call("POST", f"/gpu-jobs/{second.id}/complete",
                                body={"leaseToken": worker.runs[1].grant.token, "status": "completed", "result": {"by": "hand"}})
        eventually(lambda: worker.runs[1].why == {"canceled": "canceled", "ended": "lost"}[how])
        hold.go.set()
        assert first.wait(30).status == "completed"
        assert second.wait(30).status == ("canceled" if how == "canceled" else "completed")
        assert worker.stop(5) and begun == [first.id] and worker.counts["completed"] == 1 and (how == "canceled" or second.refresh().result == {"by": "hand"})


def test_a_server_killed_as_it_answers_a_look_ahead_costs_no_attempt(tmp_path):
    with start_server(tmp_path / "data") as server, Wire(server.url) as wire:
        client, hold = Client(server.url, ""), Hold()
        first, second = client.submit("gate"), client.submit("gate")
        worker = worker_for(wire.url, hold)
        worker.pace["gate", ""] = 1.0
        wire.lose("wait=0")
        worker.start()
        assert wire.lost.wait(30) and second.refresh().status == "leased"
        server.kill()
        with start_server(tmp_path / "data", server.port) as again:
            hold.go.set()
            client = Client(again.url, "")
            jobs = [client.wait(job.id, 40) for job in (first, second)]
            assert [(job.status, job.data["attempts"]) for job in jobs] == [("completed", 1)] * 2 and worker.stop(5)


def test_two_workers_in_one_process_and_their_shared_outbox(tmp_path):
    with serve(tmp_path) as server:
        client = Client(server.url, "")
        workers = [worker_for(server.url, Paint(), WORKER_ID=name, COLAB_GPU_DATA=str(tmp_path / "work")).start() for name in ("attic", "cellar")]
        for _ in range(3):
            jobs = [client.submit("imagenGenerate", {"prompt": "x"}) for _ in range(6)]
            assert {job.wait(30).status for job in jobs} == {"completed"}
            workers[0].stop(5)
            workers[0].start()
        assert all(worker.stop(5) for worker in workers) and sum(w.counts["completed"] for w in workers) == 18
        assert not (tmp_path / "work").exists() and DATA.name


# ---- who is in between


@pytest.mark.parametrize(("status", "kind", "body"), [(429, "text/plain", b"Too many requests"), (429, "application/json", b'{"message": "rate limit"}'),
                                                      (408, "text/plain", b"Request Timeout")])
def test_a_rate_limit_on_the_way_is_no_refusal(status, kind, body):
    "Of a proxy or a tunnel, not of our server: it passes, and neither ends the worker nor throws a result away."
    url, _ = canned((status, {"Content-Type": kind, "Retry-After": "7"}, body))
    worker = worker_for(url)
    turn = worker.turn()
    assert (turn.did, turn.pause_s) == ("offline", 7)


def test_a_result_outlives_a_rate_limit(tmp_path):
    limited = (429, {"Content-Type": "text/plain"}, b"Too many requests")
    job = json.dumps({"job": {"id": "7", "tool": "errand"}, "lease": {"token": "t", "seconds": 60}}).encode()
    url, _ = canned((200, {"Content-Type": "application/json"}, job), limited, limited, (200, {"Content-Type": "application/json"}, b"{}"))
    worker = worker_for(url, options={"sleep": lambda s: None}, WORKER_GUARD=0, WORKER_WAIT_SECONDS=0)
    assert worker.turn().did == "completed"


def test_an_interrupt_in_the_long_poll_hands_back_what_was_on_its_way(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT / "tests")!r})
from colab_gpu.worker import Worker
from test_worker import Quick
worker = Worker([Quick()], log=lambda line: print(line, flush=True))
try: worker.loop()
except KeyboardInterrupt: print("INTERRUPTED", worker.state, flush=True)
time.sleep(600)
"""
    with serve(tmp_path) as server, Wire(server.url) as wire:
        wire.hold("GET /gpu-jobs/next")
        job = Client(server.url, "").submit("errand")
        with Process("-c", code, STACK_API_BASE=wire.url, STACK_WORKER_TOKEN=TOKEN, COLAB_GPU_DATA=tmp_path / "work", PYTHONPATH=ROOT) as worker:
            assert wire.held.wait(30) and job.refresh().status == "leased"
            worker.signal(signal.SIGINT)
            worker.line("INTERRUPTED stopped")
            assert (job.refresh().status, job.data["attempts"]) == ("queued", 0)
            wire.let_go()


def test_the_references_jobs_are_not_renewed_guarded_or_looked_ahead_for(tmp_path):
    with start_reference() as server:
        client, hold = Client(server.url, ""), Hold()
        first, second = client.submit("gate"), client.submit("gate")
        worker = worker_for(server.url, hold)
        worker.pace["gate", ""] = 0.0
        worker.start()
        hold.running.wait(30)
        assert not worker.pulse.hearts and not worker.guard.alive and worker.ear._thread is None
        time.sleep(0.3)  # time to do wrong
        assert second.refresh().status == "queued"
        hold.go.set()
        assert {first.wait(30).status, second.wait(30).status} == {"completed"} and worker.stop(5)


# ---- other machines


def test_without_locks_what_a_living_worker_keeps_is_never_stranded(tmp_path, monkeypatch):
    "As on Windows, and on some network drives: an old part counts as left, though its worker may live, and go on writing there."
    monkeypatch.setitem(sys.modules, "fcntl", None)
    first, later = Outbox(tmp_path, "http://127.0.0.1:1"), Outbox(tmp_path, "http://127.0.0.1:1", now=lambda: time.time() + 3600)
    first.keep(run_of("6"), {"status": "completed", "result": 6})
    assert not list(Outbox(tmp_path, "http://127.0.0.1:1").left())
    found = []
    def look():
        for folder, _, body in later.left():
            found.append(body["result"])
            later.drop(folder)
    look()
    assert not first.mine.exists() and first.keep(run_of("7"), {"status": "completed", "result": 7})
    look()
    first.close()
    assert found == [6, 7] and not tmp_path.exists()


def test_no_token_is_on_disk_or_in_a_process_list(tmp_path):
    with serve(tmp_path) as server, Wire(server.url) as wire:
        client, hold = Client(server.url, ""), Hold()
        client.submit("gate")
        for _ in range(99): wire.drop("/complete")
        worker = worker_for(wire.url, hold, COLAB_GPU_DATA=str(tmp_path / "work")).start()
        hold.running.wait(30)
        command = Path(f"/proc/{eventually(lambda: worker.guard._process).pid}/cmdline")
        seen = eventually(lambda: b"guard.py" in (text := command.read_bytes()) and text)
        hold.go.set()
        [kept] = eventually(lambda: results(tmp_path / "work"))
        text, mode = kept.read_text(), kept.stat().st_mode & 0o777
        worker.stop(timeout_s=0.1)
    assert TOKEN.encode() not in seen and TOKEN not in text and mode == 0o600
