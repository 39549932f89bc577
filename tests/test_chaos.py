"""The tester tested: the line breaks as it is told, the soak passes, it fails when the fence is out, and its books see what was tampered with."""

import argparse
import contextlib
import json
import random
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import TOKEN
from processes import eventually, start_reference

from colab_gpu.client import Client, Transport
from colab_gpu.errors import ConnectionFailed, TunnelDown

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.chaos import soak as chaos
from tests.chaos.tools import KINDS, draw, expected

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the tester looks for processes in /proc")
OURS = {"X-Protocol": "1", "X-Worker-Instance": "by-hand"}


def short(*flags):
    "The short form, as continuous integration runs it."
    return subprocess.run([sys.executable, "-m", "tests.chaos.soak", "--short", *flags], cwd=ROOT, text=True, capture_output=True, timeout=600)


def row(text, name): return next(line for line in text.splitlines() if line.startswith(name))


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_is_overwritten():
    done = short()
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("acknowledged jobs lost", "jobs that ended more than once", "results that are wrong", "results of another's lease"):
        assert row(done.stdout, name).endswith("ok")
    for blow in ("worker killed", "worker stopped", "server killed", "zombie", "line"):
        assert re.search(rf"\d+ × {blow}", done.stdout), done.stdout


@pytest.mark.slow
def test_the_soak_fails_when_the_fence_is_taken_out():
    done = short("--without-fence")
    assert done.returncode == 1, done.stdout + done.stderr
    assert row(done.stdout, "results of another's lease").endswith("FAILS"), done.stdout


# ---- what a job must come to


def test_what_is_expected_depends_on_the_payload_alone():
    def draws(number): return [draw(number, n, 3) for n in range(200)]

    one, two = draws(random.Random("x")), draws(random.Random("x"))
    assert one == two and {tool for tool, _ in one} == set(KINDS)
    assert [expected(*job) for job in one] == [expected(*job) for job in two]
    assert len({json.dumps(expected(*job)[1]) for job in one}) == 200


# ---- the books


class ByHand(chaos.Soak):
    "A soak without workers: its jobs are served by hand."

    def __init__(self, folder, jobs=3):
        super().__init__(argparse.Namespace(seed=1, workers=0, jobs=jobs, lease=60, minutes=0, short=True, without_fence=False), folder)
        self.start()
        self.counts, self.link, self.client = {}, Transport(self.direct, chaos.TOKEN), Client(self.direct, "")
        self.ids = [self.submit(self.client, n, "press", {"n": n, "ms": 1, "bytes": 10}) for n in range(jobs)]
        self.owed = 0

    def serve(self, wrong=(), files=True):
        "Run every job as a worker would; those in `wrong` come to something else."
        from tests.chaos.tools import files_of, fingerprint

        while granted := self.link.call("GET", "/gpu-jobs/next", params={"worker": "w"}, headers=OURS):
            job, token = granted["job"], granted["lease"]["token"]
            n = job["payload"]["n"]
            for name, data in files_of(job["payload"]).items():
                data = data if files else b"?"
                self.link.call("PUT", f"/gpu-jobs/{job['id']}/artifacts/{name}", data=data, headers={"X-Lease-Token": token})
            result = {"n": n, "fingerprint": "?" if n in wrong else fingerprint("press", n), "by": "w"}
            self.link.call("POST", f"/gpu-jobs/{job['id']}/complete", body={"leaseToken": token, "status": "completed", "result": result})

    def tamper(self, *statements):
        "Change the stored jobs behind the server's back."
        self.server.kill()
        with contextlib.closing(sqlite3.connect(self.data / "queue.db")) as db, db:
            for statement in statements:
                db.execute(*statement)
        self.start_server()

    def verdict(self):
        "The names of the lines that fail."
        books = chaos.Books(self)
        well = books.read()
        failing = [name for name, *_, ok in books.lines if ok is False]
        assert well == (not failing) and "\n".join(books.show()).count("FAILS") == len(failing)
        return failing


@pytest.fixture
def by_hand(tmp_path):
    made = []
    def make(**options):
        made.append(ByHand(tmp_path / "soak", **options))
        return made[-1]
    yield make
    for each in made:
        each.close()


def test_the_books_of_a_quiet_day_are_in_order(by_hand):
    soak = by_hand()
    soak.serve()
    assert soak.verdict() == []


def test_the_books_see_wrong_results_and_damaged_files(by_hand):
    soak = by_hand()
    soak.serve(wrong=(1,), files=False)
    assert soak.verdict() == ["results that are wrong", "files missing or damaged"]


def test_the_books_see_what_is_missing(by_hand):
    soak = by_hand()
    soak.jobs["01a20d7b-0000-7000-8000-000000000000"] = ("press", {"n": 9})
    soak.owed = 1
    assert soak.verdict() == ["jobs not submitted", "acknowledged jobs lost", "jobs without an end", "jobs not once in the history"]


def test_the_books_see_what_is_there_twice(by_hand):
    soak = by_hand()
    second = soak.client.submit("press", {"n": 2, "ms": 1, "bytes": 10})
    soak.keys["1-2"].add(second.id)
    soak.serve()
    history = soak.data / "logs" / "gpu_job_history.md"
    row = eventually(lambda: [line for line in (history.read_text() if history.exists() else "").splitlines() if soak.ids[0] in line], "its row")
    with history.open("a") as file: file.write(row[0] + "\n")
    assert soak.verdict() == ["keys with more than one job", "jobs that nobody submitted", "jobs not once in the history"]


def test_the_books_see_a_job_that_ended_twice(by_hand):
    soak = by_hand()
    soak.serve()
    again = "UPDATE jobs SET status = ?, ended_ms = ended_ms + 1 WHERE id = ?"
    soak.tamper((again, ("failed", soak.ids[0])), (again, ("completed", soak.ids[0])))
    assert soak.verdict() == ["jobs that ended more than once", "results changed after its end"]


def test_the_books_see_an_overwritten_result_and_whose_it_is(by_hand):
    soak = by_hand()
    soak.serve()
    soak.tamper(("UPDATE bodies SET result = replace(result, '\"w\"', '\"v\"') WHERE seq = (SELECT seq FROM jobs WHERE id = ?)", (soak.ids[2],)))
    assert soak.verdict() == ["results overwritten", "results of another's lease"]


def test_the_books_see_a_cancel_undone(by_hand):
    soak = by_hand(jobs=1)
    soak.serve()
    soak.canceled[soak.ids[0]] = "canceled"
    assert soak.verdict() == ["cancels undone"]


def test_the_books_see_a_watcher_who_heard_otherwise(by_hand):
    soak = by_hand(jobs=2)
    for job_id in soak.ids:
        soak.watchers.append(threading.Thread(target=soak.watch, args=(job_id,), daemon=True))
        soak.watchers[-1].start()
    soak.serve()
    for watcher in soak.watchers: watcher.join(60)
    assert set(soak.watched.values()) == {"completed"}
    soak.watched[soak.ids[1]] = "progress"
    assert soak.verdict() == ["watchers who heard otherwise"]


def test_the_books_see_a_slow_recovery(by_hand):
    soak = by_hand(jobs=1)
    soak.serve()
    soak.args.short = False
    said = "INSERT INTO chaos_log (at, what, id, was, now, worker) VALUES (?, 'state', ?, ?, ?, 'w')"
    i = soak.ids[0]
    soak.tamper((said, (1000, i, "queued", "leased")), (said, (1020, i, "leased", "queued")), (said, (1066, i, "queued", "leased")))
    soak.blows = [(1000.5, "w", "killed")]
    assert soak.verdict() == ["recovery of orphans, p50/p95/max, s"], "65.5 s are more than a lease of 60 s and 5 s"


# ---- the line


class Line:
    "A real server, and the proxy in front of it."

    def __init__(self, folder, url):
        self.direct = Client(url, "")
        self.process = chaos.Child(folder / "proxy.log", "tests.chaos.proxy", url.rpartition("/")[2], "--seed", 3, pipe=True)
        self.port = int(self.process.popen.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"
        self.client, self.link = Client(self.url, ""), Transport(self.url, TOKEN, read_s=30)

    order = chaos.Soak.order
    @property
    def proxy(self): return self.process

    def post(self, n, **headers):
        "Submit once, without trying again."
        return self.link.call("POST", "/gpu-jobs", body={"tool": "errand", "payload": {"n": n}}, headers=headers)
    def heard(self): return [job.payload["n"] for job in self.direct.jobs(limit=200)]


@pytest.fixture
def line(serve, tmp_path):
    made = Line(tmp_path, serve(GPU_HEARTBEAT_LEASE_SECONDS=60).url)
    yield made
    made.process.kill()


def test_a_calm_line_changes_nothing(line):
    job = line.client.submit("errand", {"n": 1})
    lease = line.link.call("GET", "/gpu-jobs/next", params={"worker": "w", "wait": 5}, headers=OURS)["lease"]["token"]
    data = bytes(range(256)) * 4000
    line.link.call("PUT", f"/gpu-jobs/{job.id}/artifacts/a.bin", data=data, headers={"X-Lease-Token": lease})
    line.link.call("PUT", f"/gpu-jobs/{job.id}/artifacts/b.bin", data=iter([data, b"end"]), headers={"X-Lease-Token": lease})
    line.link.call("POST", f"/gpu-jobs/{job.id}/complete", body={"leaseToken": lease, "status": "completed", "result": {}, "artifacts": ["a.bin", "b.bin"]})
    assert line.client.artifact(job.id, "a.bin") == data and line.client.artifact(job.id, "b.bin") == data + b"end"
    assert [event.kind for event in line.client.events(job.id)][-1] == "done", "a chunked stream"
    assert line.link.call("GET", "/gpu-jobs/next", params={"worker": "w"}) is None, "an answer without a body"


def test_a_dropped_request_is_not_heard(line):
    line.order(faults={"drop": 1})
    with pytest.raises(ConnectionFailed):
        line.post(1)
    assert line.heard() == []


def test_a_reset_after_the_request_was_sent_leaves_the_job(line):
    line.order(faults={"reset": 1})
    for n in range(8):  # before the answer and when it comes, by the seed
        with pytest.raises(ConnectionFailed):
            line.post(n)
    eventually(lambda: sorted(line.heard()) == list(range(8)), "every request was served")


def test_a_duplicated_request_arrives_twice(line):
    line.order(faults={"duplicate": 1}, late_s=0.2)
    line.post(1)
    eventually(lambda: line.heard() == [1, 1], "without a key: two jobs")
    line.post(2, **{"Idempotency-Key": "k"})
    eventually(lambda: line.order().get("duplicates answered") == 2)
    assert line.heard().count(2) == 1


def test_a_cut_answer_is_an_error_not_an_answer(line):
    line.order(faults={"cut": 1})
    for n in range(12):
        with pytest.raises(ConnectionFailed):
            line.post(n)
    eventually(lambda: len(line.heard()) == 12)


def test_a_dead_tunnel_answers_with_its_page(line):
    line.order(page=True)
    with pytest.raises(TunnelDown, match="ERR_NGROK_3200"):
        line.post(1)
    line.order(page=False)
    line.post(2)
    assert line.heard() == [2]


@pytest.mark.parametrize("fault, heard", [("black_hole", 0), ("deaf", 0), ("mute", 1)])
def test_half_open_connections(line, fault, heard):
    line.order(faults={fault: 1}, hole_s=1)
    began = time.monotonic()
    with pytest.raises(ConnectionFailed):
        line.post(1)
    assert time.monotonic() - began > 0.9, "it hangs before it is reset"
    line.order(faults={})
    line.post(2)
    assert len(line.heard()) == 1 + heard


def test_a_slow_line_is_slow(line):
    job = line.direct.submit("errand", {"n": 1})
    lease = line.link.call("GET", "/gpu-jobs/next", params={"worker": "w"}, headers=OURS)["lease"]["token"]
    line.order(delay_s=0.075, up_bps=625_000)
    began = time.monotonic()
    line.link.call("GET", "/healthz")
    assert time.monotonic() - began >= 0.15, "a round trip on a connection that was there"
    began = time.monotonic()
    Transport(line.url).call("GET", "/healthz")
    assert time.monotonic() - began >= 0.3, "a handshake before it"
    began = time.monotonic()
    line.link.call("PUT", f"/gpu-jobs/{job.id}/artifacts/a.bin", data=bytes(1_000_000), headers={"X-Lease-Token": lease})
    assert time.monotonic() - began >= 1.6 + 0.15, "a megabyte at 5 Mbit/s"


def test_a_reset_is_one(line):
    line.order(faults={"drop": 1})
    sock = socket.create_connection(("127.0.0.1", line.port))
    sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(ConnectionResetError):
        sock.recv(1)


def test_two_uploads_share_the_line(line):
    line.order(up_bps=500_000)
    job = line.direct.submit("errand", {"n": 1})
    lease = line.link.call("GET", "/gpu-jobs/next", params={"worker": "w"}, headers=OURS)["lease"]["token"]
    def put(name): Transport(line.url, TOKEN).call("PUT", f"/gpu-jobs/{job.id}/artifacts/{name}", data=bytes(250_000), headers={"X-Lease-Token": lease})
    threads, began = [threading.Thread(target=put, args=(name,)) for name in "ab"], time.monotonic()
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert time.monotonic() - began >= 0.95


def test_who_hangs_up_is_hung_up_on(line):
    sock = socket.create_connection(("127.0.0.1", line.port))
    sock.sendall(f"GET /gpu-jobs/next?worker=w&wait=55 HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
    eventually(lambda: any(w["waiting"] for w in line.direct.workers()))
    sock.close()
    eventually(lambda: not any(w["waiting"] for w in line.direct.workers()), "the server sees it, long before the wait is over,", timeout_s=40)


def test_reset_all_breaks_what_is_under_way(line):
    errors = []
    def wait():
        try: line.link.call("GET", "/gpu-jobs/next", params={"worker": "w", "wait": 50})
        except ConnectionFailed as e: errors.append(e)
    thread = threading.Thread(target=wait)
    thread.start()
    eventually(lambda: any(w["waiting"] for w in line.direct.workers()))
    line.order(reset_all=True)
    thread.join(60)
    assert len(errors) == 1 and "broke off" in str(errors[0]), "not timed out: reset"


def test_the_same_seed_strikes_the_same_connections(line, tmp_path):
    def struck(other):
        other.order(faults={"drop": 0.5})
        out = []
        for n in range(20):
            try: Transport(other.url).call("GET", "/healthz"); out.append(0)
            except ConnectionFailed: out.append(1)
        return out
    again = Line(tmp_path, line.direct.transport.base)
    try: assert struck(line) == struck(again) and 0 < sum(struck(again)) < 20
    finally: again.process.kill()


@pytest.mark.parametrize("module, args, say", [("soak", ["--workers", "1"], "--workers must be at least 2"), ("soak", ["--keep", "tests"], "name a folder that isn't"),
                                               ("soak", ["--lease", "nan"], "--lease must be at least 1"), ("proxy", ["3001"], "must be HOST:PORT")])
def test_wrong_arguments_are_named(module, args, say):
    done = subprocess.run([sys.executable, "-m", f"tests.chaos.{module}", *args], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and say in done.stderr and "Traceback" not in done.stderr


def test_wrong_orders_are_named(line):
    for wrong in ({"dely_s": 1}, {"faults": {"fire": 1}}):
        line.process.popen.stdin.write(json.dumps(wrong) + "\n")
        line.process.popen.stdin.flush()
        assert json.loads(line.process.popen.stdout.readline())["error"].startswith("There is no ")


# ---- against the reference's own protocol


def test_a_worker_is_killed_on_the_references_server(tmp_path):
    """No fence, no heartbeats, no artifacts there. What that protocol can promise: a job comes back when its lease has run out, and ends."""
    def worker(name, url):
        return chaos.Child(tmp_path / f"{name}.log", "tests.chaos.worker", STACK_API_BASE=url, STACK_WORKER_TOKEN=TOKEN, WORKER_ID=name,
                           POLL_INTERVAL=0.05, CHAOS_MARKS=tmp_path, COLAB_GPU_DATA=tmp_path / "w")
    with start_reference(GPU_JOB_LEASE_SECONDS=2) as server, contextlib.ExitStack() as stack:
        client, payload = Client(server.url, ""), {"n": 1000, "name": "gate"}
        first = worker("w1", server.url)
        stack.callback(first.kill)
        gate = client.submit("gate", payload)
        eventually(lambda: (tmp_path / "gate.begun").exists(), "the first worker has begun")
        others = [(client.submit(tool, {"n": n, "ms": 20}), tool, n) for n in range(12) for tool in ("mill", "hold")]
        bad = client.submit("wrong", {"n": 77})
        first.kill()
        (tmp_path / "gate.open").touch()
        second = worker("w2", server.url)
        stack.callback(second.kill)
        for job, tool, n in [(gate, "gate", 1000), *others]:
            assert job.wait(120).status == "completed", job.detail
            assert job.result == {**expected(tool, {"n": n})[1], "by": "w2"}
        assert bad.wait(60).detail == expected("wrong", {"n": 77})[1]
        assert gate.data["attempts"] == 2 and all(job.data["attempts"] == 1 for job, *_ in others)


def test_the_idle_benchmark_measures_both_lines(tmp_path):
    out = tmp_path / "out.json"
    done = subprocess.run([sys.executable, "benchmarks/bench_idle.py", "--jobs", "3", "--seconds", "0.1", "--bytes", "20000", "--rtt-ms", "40", "--json", str(out)],
                          cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    got = json.loads(out.read_text())
    assert list(got) == ["loopback", "40 ms, 5 Mbit/s up"] and all(line["jobs"] == 3 and 0 < line["idle_share"] < 1 for line in got.values())
    assert all(f"\n{name}" in done.stdout for name in got)
