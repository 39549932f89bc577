"""The soak: many short jobs while workers are killed and stopped, the server is killed, and the line between them is as bad as lines get.

    python -m tests.chaos.soak [--jobs 2000] [--minutes 10] [--seed 1] [--lease 3] [--short] [--without-fence] [--keep FOLDER]

At the end everything is left in peace until the last job has ended, and then the books are read. A line of the table says what was looked
for, what may be and what was found; the exit code is 1 when any line fails.

What happened is read from triggers that the tester puts into the server's database: they write down each change of a job's state in the
transaction that makes it, so nothing is missed and nothing is seen that wasn't durable.

--short judges everything but the recovery time, which is a matter of the machine's load. --without-fence starts the server with its fencing
tokens ignored (see `server.py`): then the table must fail.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from colab_gpu.client import Client
from colab_gpu.errors import ColabGPUError
from tests.chaos.tools import draw, expected

ROOT = Path(__file__).resolve().parent.parent.parent
TOKEN = "token-of-the-soak"
ENDED = ("completed", "failed", "canceled")
NOW = "(julianday('now') - 2440587.5) * 86400.0"
TRIGGERS = f"""
CREATE TABLE chaos_log (n INTEGER PRIMARY KEY, at REAL, what TEXT, id TEXT, was TEXT, now TEXT, worker TEXT, grants INTEGER, digest TEXT);
CREATE TRIGGER chaos_state AFTER UPDATE ON jobs WHEN NEW.status <> OLD.status BEGIN
  INSERT INTO chaos_log (at, what, id, was, now, worker, grants, digest)
  VALUES ({NOW}, 'state', NEW.id, OLD.status, NEW.status, NEW.worker_id, NEW.grants, NEW.result_digest); END;
CREATE TRIGGER chaos_after AFTER UPDATE ON jobs WHEN OLD.ended_ms IS NOT NULL AND (
  NEW.status <> OLD.status OR NEW.ended_ms IS NOT OLD.ended_ms OR NEW.result_digest IS NOT OLD.result_digest OR NEW.grants <> OLD.grants
  OR NEW.artifacts IS NOT OLD.artifacts OR NEW.worker_id IS NOT OLD.worker_id OR NEW.detail IS NOT OLD.detail) BEGIN
  INSERT INTO chaos_log (at, what, id, was, now) VALUES ({NOW}, 'changed after its end', NEW.id, OLD.status, NEW.status); END;
CREATE TRIGGER chaos_result AFTER UPDATE ON bodies WHEN OLD.result IS NOT NULL AND NEW.result IS NOT OLD.result BEGIN
  INSERT INTO chaos_log (at, what, id) SELECT {NOW}, 'overwritten', id FROM jobs WHERE seq = NEW.seq; END;
"""


class Child:
    """A process of the soak, in a session of its own; what it says goes to a file."""

    def __init__(self, path: Path, module: str, *args: Any, pipe: bool = False, **env: Any) -> None:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("GPU_", "STACK_", "WORKER_", "COLAB_GPU_", "CHAOS_"))}
        self.path, self.module = path, module
        with open(path, "a") as out:
            self.began = out.tell()
            self.popen = subprocess.Popen([sys.executable, "-m", module, *map(str, args)], cwd=ROOT, text=True, stderr=out, start_new_session=True,
                                          env={**clean, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), **{k: str(v) for k, v in env.items()}},
                                          stdin=subprocess.PIPE if pipe else subprocess.DEVNULL, stdout=subprocess.PIPE if pipe else out)

    def text(self) -> str:
        """What it has said."""
        with open(self.path, errors="replace") as file:
            file.seek(self.began)
            return file.read()

    def wait_for(self, pattern: str, timeout_s: float = 120) -> re.Match[str]:
        """The first line like `pattern`. The time-out is for a broken program."""
        end = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.text(), re.M)):
            if self.popen.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{self.module} did not say {pattern!r}; its last words:\n{self.text()[-2000:]}")
            time.sleep(0.02)
        return found

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def tree(self) -> list[int]:
        """Its process and all that came of it: its children, and whoever is in its session."""
        parents, members = {}, {self.popen.pid}
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = entry.read_text().rpartition(")")[2].split()
                parents[int(entry.parent.name)] = (int(fields[1]), int(fields[3]))
        for _ in range(8):
            members |= {pid for pid, (parent, session) in parents.items() if parent in members or session == self.popen.pid}
        return sorted(members)

    def signal(self, number: int, whole: bool = True) -> None:
        """Signal it, or only its first process."""
        for pid in self.tree() if whole else [self.popen.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """End it and all that came of it, whatever state they are in."""
        for number in (signal.SIGCONT, signal.SIGKILL):
            self.signal(number)
        self.popen.wait(30)

    def end(self, timeout_s: float = 60) -> None:
        """End it in good order."""
        if self.alive:
            self.popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(timeout_s)
        self.kill()


class Slot:
    """A place for a worker: each one that takes it has a name of its own."""

    def __init__(self, number: int) -> None:
        self.number, self.life, self.child, self.stopped = number, 0, None, False

    @property
    def name(self) -> str:
        return f"w{self.number}-{self.life}"

    @property
    def well(self) -> bool:
        return self.child is not None and self.child.alive and not self.stopped


class Soak:
    """Everything that runs, and what was done to it."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.random = args, folder, random.Random(args.seed)
        self.data, self.logs, self.marks = folder / "data", folder / "logs", folder / "marks"
        for each in (self.logs, self.marks):
            each.mkdir(parents=True)
        self.server: Child | None = None
        self.port, self.lives, self.scenes = 0, 0, 0
        self.slots = [Slot(n + 1) for n in range(args.workers)]
        self.plans: list[tuple[float, int, Callable[[], None]]] = []
        self.blows: list[tuple[float, str, str]] = []  # when, to which worker, what
        self.outages: list[tuple[float, float]] = []  # when there was no server
        self.done: dict[str, int] = {}
        self.jobs: dict[str, tuple[str, dict[str, Any]]] = {}  # the acknowledged ones
        self.keys: dict[str, set[str]] = {}
        self.canceled: dict[str, str] = {}  # what the server said when it was asked to cancel
        self.watched: dict[str, str] = {}  # what those who followed a job heard last
        self.watchers: list[threading.Thread] = []
        self.lock, self.over = threading.Lock(), threading.Event()
        self.owed = args.jobs

    # --- processes

    def start_server(self) -> None:
        """Start the server, on the port it had before."""
        self.lives += 1
        self.server = Child(self.logs / "server.log", "tests.chaos.server", "--port", self.port, GPU_WORKER_TOKEN=TOKEN, COLAB_GPU_DATA=self.data,
                            GPU_HEARTBEAT_LEASE_SECONDS=self.args.lease, GPU_MAX_PENDING_JOBS=1_000_000, GPU_RETRY_SECONDS=0.2,
                            GPU_RETRY_MAX_SECONDS=2, GPU_LOG_REQUESTS=1, CHAOS_WITHOUT_FENCE=int(self.args.without_fence))
        self.port = int(self.server.wait_for(r"serves at http://127\.0\.0\.1:(\d+)")[1])

    def start(self) -> None:
        """Start everything."""
        self.start_server()
        self.server.end()
        with contextlib.closing(sqlite3.connect(self.data / "queue.db")) as db:
            db.executescript(TRIGGERS)
        self.start_server()
        self.direct = f"http://127.0.0.1:{self.port}"
        self.proxy = Child(self.logs / "proxy.log", "tests.chaos.proxy", f"127.0.0.1:{self.port}", "--seed", self.args.seed, pipe=True)
        self.url = f"http://127.0.0.1:{int(self.proxy.popen.stdout.readline())}"
        for slot in self.slots:
            self.start_worker(slot)

    def start_worker(self, slot: Slot) -> None:
        """Put a new worker into its slot. Its data folder is the slot's, so that it finds what its predecessor left."""
        slot.life, slot.stopped = slot.life + 1, False
        slot.child = Child(self.logs / f"{slot.name}.log", "tests.chaos.worker", STACK_API_BASE=self.url, STACK_WORKER_TOKEN=TOKEN,
                           WORKER_ID=slot.name, WORKER_WAIT_SECONDS=2, POLL_INTERVAL=0.2, COLAB_GPU_DATA=self.folder / f"w{slot.number}",
                           CHAOS_SEED=self.args.seed, CHAOS_MARKS=self.marks)

    def order(self, **what: Any) -> dict[str, Any]:
        """Give the proxy an order; its counts."""
        self.proxy.popen.stdin.write(json.dumps(what) + "\n")
        self.proxy.popen.stdin.flush()
        answer: dict[str, Any] = json.loads(self.proxy.popen.stdout.readline())
        assert "error" not in answer, answer
        return answer

    def ask(self, sql: str, *args: Any) -> list[tuple[Any, ...]]:
        """Read the server's database."""
        for tries in range(100):
            try:
                with contextlib.closing(sqlite3.connect(f"file:{self.data / 'queue.db'}?mode=ro", uri=True, timeout=5)) as db:
                    return db.execute(sql, args).fetchall()
            except sqlite3.OperationalError:
                if tries == 99:
                    raise
                time.sleep(0.05)
        raise AssertionError("unreachable")

    def note(self, what: str) -> None:
        """Count an act of the tester, and write it down."""
        kind = what.split(":")[0]
        self.done[kind] = self.done.get(kind, 0) + 1
        with open(self.logs / "acts.log", "a") as file:
            file.write(f"{time.time():.3f} {what}\n")

    # --- the callers

    def submit(self, client: Client, n: int, tool: str, payload: dict[str, Any], **options: Any) -> str:
        """Submit a job until it is acknowledged; its id."""
        key = f"{self.args.seed}-{n}"
        while True:
            try:
                job = client.submit(tool, payload, key=key, maxAttempts=100, **options)
            except ColabGPUError as e:
                if not e.retryable or self.over.is_set():
                    raise
                time.sleep(0.1)
                continue
            with self.lock:
                self.jobs[job.id] = (tool, payload)
                self.keys.setdefault(key, set()).add(job.id)
            return job.id

    def submit_all(self, share: int, of: int) -> None:
        """One caller's part of the jobs, evenly over the time; a few are canceled again, a few are asked for twice."""
        number, client = random.Random(f"{self.args.seed}:{share}"), Client(self.url, "")
        began, span_s = time.monotonic(), self.args.minutes * 60 * 0.85
        for n in range(share, self.args.jobs, of):
            self.over.wait(max(0.0, began + span_s * n / self.args.jobs - time.monotonic()))
            tool, payload = draw(number, n, self.args.lease)
            job_id = self.submit(client, n, tool, payload)
            if number.random() < 0.05:
                self.submit(client, n, tool, payload)
            if number.random() < 0.04:
                self.watchers.append(threading.Thread(target=self.watch, args=(job_id,), daemon=True))
                self.watchers[-1].start()
            if number.random() < 0.03:
                self.over.wait(number.random())
                self.canceled[job_id] = "unheard"  # the answer may be lost, and the job canceled all the same
                with contextlib.suppress(ColabGPUError):
                    self.canceled[job_id] = client.cancel(job_id).status
            with self.lock:
                self.owed -= 1

    def watch(self, job_id: str) -> None:
        """Follow a job to its end, over the same line."""
        self.watched[job_id] = "nothing"
        try:
            for event in Client(self.url, "").events(job_id, outage_s=600):
                self.watched[job_id] = event.data["status"] if event.kind == "done" else event.kind
        except ColabGPUError as e:
            self.watched[job_id] = str(e)

    # --- the blows

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        """Do something when its time has come."""
        heapq.heappush(self.plans, (time.monotonic() + seconds, len(self.blows) + self.random.getrandbits(30), act))

    def run_due(self) -> None:
        """Do what is due."""
        while self.plans and self.plans[0][0] <= time.monotonic():
            heapq.heappop(self.plans)[2]()

    def victim(self) -> Slot | None:
        """A worker to strike; one is always left alone, so that there is somebody to recover."""
        well = [slot for slot in self.slots if slot.well]
        return self.random.choice(well) if len(well) > 1 else None

    def kill_worker(self) -> None:
        """SIGKILL: its process alone, as when memory runs out, or all of it, as when the machine goes."""
        if (slot := self.victim()) is None:
            return
        whole = self.random.random() < 0.5
        slot.child.signal(signal.SIGKILL, whole)
        self.blows.append((time.time(), slot.name, "killed"))
        self.note(f"worker killed: {slot.name}")
        slot.stopped = True  # not well until it has been replaced
        def replace() -> None:
            slot.child.kill()
            self.start_worker(slot)
        self.later(self.random.uniform(0.1, 1.5), replace)

    def stop_worker(self) -> None:
        """SIGSTOP, and SIGCONT before or after its lease has run out."""
        if (slot := self.victim()) is None:
            return
        slot.stopped = True
        slot.child.signal(signal.SIGSTOP)
        self.blows.append((time.time(), slot.name, "stopped"))
        self.note(f"worker stopped: {slot.name}")
        self.later(self.random.uniform(0.1, 2.5) * self.args.lease, lambda: self.go_on(slot))

    def go_on(self, slot: Slot) -> None:
        """SIGCONT."""
        slot.child.signal(signal.SIGCONT)
        slot.stopped = False

    def kill_server(self) -> None:
        """SIGKILL, and start it again on the same data and port; left alone then for as long as a recovery may take."""
        if not self.server.alive or (self.outages and time.time() < self.outages[-1][1] + self.args.lease + 5):
            return
        began = time.time()
        self.server.kill()
        self.note("server killed")
        def restart() -> None:
            self.start_server()
            self.outages.append((began, time.time()))
        self.later(self.random.uniform(0, 1), restart)

    def stir(self, act: str | None = None) -> None:
        """Other weather on the line."""
        number = self.random
        act = act or number.choices(("weather", "calm", "page", "reset_all"), (10, 2, 1, 1))[0]
        self.note(f"line: {act}")
        if act == "reset_all":
            self.order(reset_all=True)
        elif act == "page":
            self.order(page=True)
            self.later(number.uniform(0.5, 3), lambda: self.order(page=False))
        elif act == "calm":
            self.order(faults={}, delay_s=0, jitter_s=0, up_bps=None, down_bps=None)
        else:
            names = ("drop", "reset", "duplicate", "cut", "page", "deaf", "mute", "black_hole")
            shares = {name: round(number.random() ** 2 * (0.02 if name in ("deaf", "mute", "black_hole") else 0.12), 4) for name in names}
            self.order(faults=shares, delay_s=number.choice((0, 0.005, 0.02, 0.075)), jitter_s=number.choice((0, 0.02)),
                       up_bps=number.choice((None, None, 2_000_000, 625_000)), down_bps=number.choice((None, 2_000_000)),
                       hole_s=round(number.uniform(0.5, 1.5) * self.args.lease, 2), late_s=number.choice((0.5, 5)))

    def zombie(self) -> None:
        """A worker is stopped in the middle of a job, the job is granted to another, and the first one comes back and has its say first.

        No clock decides this: the job's gate is opened for the first worker alone, and for the second when the server has heard the first.
        """
        if not self.server.alive:
            return
        self.scenes += 1
        name, n = f"gate-{self.scenes}", self.args.jobs + self.scenes
        job_id = self.submit(Client(self.direct, ""), n, "gate", {"n": n, "name": name}, priority="high")
        mark = self.marks / f"{name}.begun"
        first = self.until(lambda: self.slot_of(mark.read_text().split()[-1]) if mark.exists() and mark.read_text() else None, "a worker to begin")
        if first is None or not first.well:
            return self.marks.joinpath(f"{name}.open").touch()
        first.stopped = True
        first.child.signal(signal.SIGSTOP)
        self.blows.append((time.time(), first.name, "stopped"))
        self.note(f"zombie: {first.name}")
        job = "SELECT status, worker_id FROM jobs WHERE id = ?"
        self.until(lambda: (row := self.ask(job, job_id)[0])[0] in ENDED or (row[0] == "leased" and row[1] != first.name), "another grant")
        said = len(self.server.text())
        self.marks.joinpath(f"{name}.open.{first.name}").touch()
        self.go_on(first)
        self.until(lambda: self.ask(job, job_id)[0][0] in ENDED or not first.child.alive
                   or re.search(rf"/gpu-jobs/{job_id}/(complete|heartbeat) 4\d\d", self.server.text()[said:]), "the first worker to be heard")
        self.marks.joinpath(f"{name}.open").touch()

    def until(self, fact: Callable[[], Any], what: str, timeout_s: float = 120) -> Any:
        """Wait for something, doing what is due meanwhile. The time-out is for a broken program."""
        end = time.monotonic() + timeout_s
        while not (value := fact()):
            self.run_due()
            if time.monotonic() > end:
                self.note(f"waited in vain: {what}")
                return None
            time.sleep(0.02)
        return value

    def slot_of(self, name: str) -> Slot | None:
        """Who has that name now."""
        return next((slot for slot in self.slots if slot.name == name), None)

    # --- the course of it

    def run(self) -> None:
        """All of it, to the point where the books can be read."""
        self.start()
        self.zombie()
        callers = [threading.Thread(target=self.submit_all, args=(share, 4), daemon=True) for share in range(4)]
        for caller in callers:
            caller.start()
        end = time.monotonic() + self.args.minutes * 60
        acts = (self.kill_worker, self.stop_worker, self.kill_server, self.stir, self.zombie)
        first = [lambda: self.stir("weather"), self.kill_worker, self.stop_worker, self.kill_server]  # however short it is
        while time.monotonic() < end:
            (first.pop(0) if first else self.random.choices(acts, (4, 4, 2, 5, 0.7))[0])()
            wake = time.monotonic() + self.random.expovariate(1 / self.args.every)
            while time.monotonic() < min(wake, end):
                self.run_due()
                time.sleep(0.02)
        self.peace(callers)

    def peace(self, callers: list[threading.Thread]) -> None:
        """Mend everything and wait for the last job's end."""
        while self.plans:
            self.run_due()
            time.sleep(0.02)
        self.counts = self.order(faults={}, page=False, delay_s=0, jitter_s=0, up_bps=None, down_bps=None, reset_all=True)
        print(f"The blows are over; {self.left()} jobs are left.", flush=True)
        end = time.monotonic() + self.args.calm
        while (self.left() or any(c.is_alive() for c in [*callers, *self.watchers])) and time.monotonic() < end:
            time.sleep(0.2)
        self.over.set()

    def left(self) -> int:
        """Jobs that have not ended."""
        return int(self.ask("SELECT count(*) FROM jobs WHERE ended_ms IS NULL")[0][0]) + self.owed

    def close(self) -> None:
        """End what is left."""
        self.over.set()
        for slot in self.slots:
            if slot.child is not None:
                slot.child.kill()
        for child in (getattr(self, "proxy", None), self.server):
            if child is not None:
                child.kill()


class Books:
    """What the soak came to: lines of a name, what may be, what was found, and whether that is well."""

    def __init__(self, soak: Soak) -> None:
        self.soak, self.lines = soak, list[tuple[str, str, str, bool | None]]()
        self.examples: list[str] = []
        self.rows = {row[0]: row[1:] for row in soak.ask("SELECT id, status, worker_id, attempts, detail FROM jobs")}
        self.log = soak.ask("SELECT at, what, id, was, now, worker, grants, digest FROM chaos_log ORDER BY n")

    def line(self, name: str, wrong: list[str], of: int) -> None:
        """A line about things of which none may be."""
        self.lines.append((name, "0", f"{len(wrong)} of {of}", not wrong))
        self.examples += [f"{name}: {each}" for each in wrong[:5]]

    def read(self) -> bool:
        """Read them all; whether all is well."""
        jobs = self.soak.jobs
        self.line("jobs not submitted", ["?"] * self.soak.owed, self.soak.args.jobs)
        self.line("acknowledged jobs lost", [j for j in jobs if j not in self.rows], len(jobs))
        self.line("keys with more than one job", [f"{k}: {ids}" for k, ids in self.soak.keys.items() if len(ids) > 1], len(self.soak.keys))
        self.line("jobs that nobody submitted", [j for j in self.rows if j not in jobs], len(self.rows))
        self.line("jobs without an end", [f"{j} is {row[0]} ({row[1]})" for j, row in self.rows.items() if row[0] not in ENDED], len(self.rows))
        ends = [(i, now) for _, what, i, _, now, *_ in self.log if what == "state" and now in ENDED]
        twice = {i for i, _ in ends if sum(1 for j, _ in ends if i == j) > 1} if len(ends) != len({i for i, _ in ends}) else set()
        self.line("jobs that ended more than once", sorted(twice), len(ends))
        for what in ("changed after its end", "overwritten"):
            self.line(f"results {what}", [e[2] for e in self.log if e[1] == what], len(ends))
        self.results()
        self.history()
        self.recovery()
        return all(ok is not False for *_, ok in self.lines)

    def results(self) -> None:
        """Compare every job with what it must have come to, as a caller sees it."""
        client, wrong, others, files, undone = Client(self.soak.direct, ""), [], [], [], []
        fetched = 0
        for job_id, (tool, payload) in self.soak.jobs.items():
            if job_id not in self.rows:
                continue
            job, (status, value, digests) = client.job(job_id), expected(tool, payload)
            if self.soak.canceled.get(job_id) == "canceled" and job.status != "canceled":
                undone.append(f"{job_id} is {job.status}")
            if job.status not in ENDED or (job_id in self.soak.canceled and job.status == "canceled"):
                continue
            got = job.detail if status == "failed" else {k: v for k, v in (job.result or {}).items() if k != "by"}
            if (job.status, got) != (status, value):
                wrong.append(f"{job_id} ({tool}) is {job.status}: {got} ({job.detail})")
            if job.status != "completed":
                continue
            if job.result.get("by") != job.data["workerId"]:
                others.append(f"{job_id} ({tool}) was granted to {job.data['workerId']}, the result is {job.result.get('by')}'s")
            if {a["name"]: a["sha256"] for a in job.artifacts} != digests:
                files.append(f"{job_id}: {job.artifacts}")
            for name in digests:
                fetched += 1
                try:
                    client.artifact(job_id, name)
                except ColabGPUError as e:
                    files.append(f"{job_id}/{name}: {e}")
        self.line("results that are wrong", wrong, len(self.soak.jobs))
        self.line("results of another's lease", others, len(self.soak.jobs))
        self.line("files missing or damaged", files, fetched)
        deaf = [f"{j} is {self.rows[j][0]}, heard: {said}" for j, said in self.soak.watched.items() if j in self.rows and said != self.rows[j][0]]
        self.line("watchers who heard otherwise", deaf, len(self.soak.watched))
        self.line("cancels undone", undone, len(self.soak.canceled))

    def history(self) -> None:
        """Every job is in the history once."""
        for slot in self.soak.slots:
            slot.child.end()
        self.soak.server.end()
        path = self.soak.data / "logs" / "gpu_job_history.md"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        found = re.findall(r"^\| [^|]* \| ([0-9a-f-]{36}) \|", text, re.M)
        odd = [f"{j}: {found.count(j)} lines" for j in self.rows if found.count(j) != 1] if len(found) != len(self.rows) or set(found) != set(self.rows) else []
        self.line("jobs not once in the history", odd, len(self.rows))

    def recovery(self) -> None:
        """How long an orphaned job waited for its next worker."""
        bound, waits, served, others = self.soak.args.lease + 5, list[float](), list[float](), 0
        last: dict[str, tuple[float, str]] = {}  # of each job under way: when and to whom it was granted
        lost: dict[str, float] = {}  # of each orphan: when it became one
        for at, what, job_id, _, now, worker, _, digest in self.log:
            if what != "state":
                continue
            if now == "leased":
                if job_id in lost:
                    since = lost.pop(job_id)
                    waits.append(at - since)
                    served.append(at - since - sum(max(0.0, min(at, b) - max(since, a)) for a, b in self.soak.outages))
                last[job_id] = (at, worker)
            elif now == "queued" and digest is None:  # its lease has run out
                since, holder = last[job_id]
                struck = [when for when, name, _ in self.soak.blows if name == holder and when < at]
                if struck:
                    lost[job_id] = max(since, struck[-1])
                else:
                    others += 1
        def figures(times: list[float]) -> list[str]:
            times = sorted(times)
            return [f"{times[min(len(times) - 1, int(len(times) * q))]:.1f}" for q in (0.5, 0.95, 1)] if times else ["-"] * 3
        worst = figures(waits)
        well = None if self.soak.args.short else bool(waits) and float(worst[1]) <= bound
        self.lines.append(("recovery of orphans, p50/p95/max, s", f"p95 {bound:g}", f"{'/'.join(worst)} of {len(waits)}", well))
        self.lines.append(("  of which there was a server", "", "/".join(figures(served)), None))
        self.lines.append(("leases of living workers that ran out", "", f"{others} of {sum(e[1] == 'state' and e[4] == 'leased' for e in self.log)}", None))

    def show(self) -> Iterator[str]:
        """The table."""
        soak = self.soak
        yield f"{len(soak.jobs)} jobs, {soak.args.minutes:g} min, seed {soak.args.seed}, lease {soak.args.lease:g} s" + \
            (", WITHOUT FENCE" if soak.args.without_fence else "")
        yield "the tester: " + ", ".join(f"{n} × {what}" for what, n in sorted(soak.done.items()))
        yield "the line: " + ", ".join(f"{n} × {what}" for what, n in sorted(soak.counts.items()))
        yield f"attempts a job: {sum(r[2] for r in self.rows.values()) / max(1, len(self.rows)):.2f}"
        yield f"{'':42}{'allowed':>12}{'found':>24}"
        for name, allowed, found, well in self.lines:
            yield f"{name:42}{allowed:>12}{found:>24}  {'' if well is None else 'ok' if well else 'FAILS'}"
        yield from (f"  {each}" for each in self.examples)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Say what can't be, before anything is started."""
    least = {"jobs": 1, "workers": 2, "lease": 1, "minutes": 0.01, "every": 0.05, "calm": 1}
    for name, low in least.items():
        if not getattr(args, name) >= low:
            parser.error(f"--{name} must be at least {low:g}")
    if args.keep is not None and args.keep.exists():
        parser.error(f"--keep {args.keep} is there already: name a folder that isn't")
    if not Path("/proc/self/stat").exists():
        parser.error("the soak needs Linux: it looks for a worker's processes in /proc")


def main() -> int:
    """Run the soak; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--lease", type=float, default=3, help="seconds")
    parser.add_argument("--every", type=float, default=1.5, help="seconds between two blows, on average")
    parser.add_argument("--calm", type=float, default=300, help="longest wait for the last job's end after the blows, seconds")
    parser.add_argument("--short", action="store_true", help="the form for continuous integration: 40 jobs, 6 seconds of blows")
    parser.add_argument("--without-fence", action="store_true", help="take the server's fence out: the table must fail")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep everything in this new folder")
    args = parser.parse_args()
    if args.short:
        args.jobs, args.minutes, args.lease, args.every, args.calm = 40, 0.1, 1.5, 0.8, 120
    check(parser, args)
    folder = args.keep or Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(args, folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending what was started
    try:
        soak.run()
        books = Books(soak)
        well = books.read()
        print("\n".join(books.show()))
        print("All is well." if well else "It fails.")
        return 0 if well else 1
    finally:
        soak.close()
        if args.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
