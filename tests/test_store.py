"""Both stores keep the same promises; the one on disk keeps them through failures and `kill -9`."""

import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colab_gpu.errors import InvalidSetting, Unavailable
from colab_gpu.jobs import Job, new_id
from colab_gpu.store import MemoryStore, SQLiteStore, Ticket

ROOT = Path(__file__).resolve().parent.parent


def a_job(n, **fields):
    return Job(new_id(1000 + n), fields.pop("tool", "errand"), f'{{"n": {n}}}', enqueued_ms=1000 + n, **fields)


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path):
    made = MemoryStore() if request.param == "memory" else SQLiteStore(tmp_path / "queue.db")
    yield made
    made.close()


def test_a_job_comes_back_as_it_was(store):
    job = a_job(1, priority="low", requirements=("a", "b"), not_before_ms=9, ready=False, queue_deadline_ms=10, run_timeout_s=1.5, retry_of="old",
                idempotency_key="k", body_digest="d", max_attempts=7)
    store.run(lambda tx: tx.insert(job))
    assert store.read(lambda r: r.get(job.id)) == job
    assert store.run(lambda tx: tx.by_key("k")) == job and store.run(lambda tx: tx.by_key("no")) is None

    def change(tx):
        found = tx.get(job.id)
        found.status, found.started_ms, found.worker_id, found.worker_instance, found.attempts, found.grants = "leased", 5, "w", "i", 1, 1
        found.lease_token, found.lease_until_ms, found.lease_s, found.lease_request, found.run_deadline_ms = "t", 50, 1.5, "r", 60
        found.cancel_requested, found.artifacts, found.error_kind, found.detail = True, ({"name": "x", "bytes": 3},), "oom", "full — ü"
        tx.update(found)
        return found

    changed = store.run(change)
    assert store.read(lambda r: r.get(job.id)) == changed
    assert store.run(lambda tx: tx.by_lease_request("r")) == [changed] == store.run(lambda tx: tx.expired(50, 9))
    assert store.run(lambda tx: tx.expired(49, 9)) == []
    store.run(lambda tx: tx.extend(Job(**{**_fields(changed), "lease_until_ms": 99})))
    assert store.read(lambda r: r.get(job.id)).lease_until_ms == 99


def _fields(job):
    return {name: getattr(job, name) for name in Job.__dataclass_fields__}


def test_order_is_priority_then_age(store):
    jobs = [a_job(n, priority=p) for n, p in enumerate(["low", "normal", "high", "normal", "high"])]
    store.run(lambda tx: [tx.insert(j) for j in jobs])
    assert [j.payload["n"] for j in store.run(lambda tx: tx.heads("errand", 9))] == [2, 4, 1, 3, 0]
    assert [store.read(lambda r, j=j: r.ahead_of(j)) for j in jobs] == [4, 2, 0, 3, 1]


def test_what_is_due(store):
    held, late = a_job(1, not_before_ms=50, ready=False), a_job(2, queue_deadline_ms=40)
    store.run(lambda tx: [tx.insert(j) for j in (held, late)])
    assert store.read(lambda r: r.next_due_ms()) == 40
    assert [j.id for j in store.run(lambda tx: tx.due(50, 9))] == [held.id] and store.run(lambda tx: tx.due(49, 9)) == []
    assert [j.id for j in store.run(lambda tx: tx.overdue(40, 9))] == [late.id] and store.run(lambda tx: tx.overdue(39, 9)) == []
    assert store.read(lambda r: (r.pending(), dict(r.lanes()))) == (2, {"errand": 1})


def test_listing(store):
    jobs = [a_job(n, tool=("draw", "chat")[n % 2]) for n in range(10)]
    store.run(lambda tx: [tx.insert(j) for j in jobs])

    def end(tx):
        for n, status in ((3, "failed"), (4, "completed"), (5, "leased"), (6, "canceled")):
            job = tx.get(jobs[n].id)
            job.status, job.ready, job.ended_ms, job.lease_until_ms = status, False, None if status == "leased" else 5, 99
            tx.update(job)

    store.run(end)

    def numbers(*args):
        return [j.payload["n"] for j in store.read(lambda r: r.listing(*args))]

    assert numbers(None, None, 3, None) == [9, 8, 7] and numbers(None, None, 3, jobs[7].id) == [6, 5, 4]
    assert numbers(None, "draw", 9, None) == [8, 6, 4, 2, 0] and numbers("queued", "chat", 9, None) == [9, 7, 1]
    assert [numbers(s, None, 9, None) for s in ("failed", "completed", "leased", "canceled")] == [[3], [4], [5], [6]]
    assert store.read(lambda r: r.counts()) == {"queued": 6, "failed": 1, "completed": 1, "leased": 1, "canceled": 1}
    assert [j.payload["n"] for j in store.run(lambda tx: tx.unarchived(9))] == [3, 4, 6]
    store.run(lambda tx: tx.mark_archived([jobs[3], jobs[6]]))
    assert [j.payload["n"] for j in store.run(lambda tx: tx.unarchived(9))] == [4]


def test_an_op_that_raises_after_writing_harms_only_itself(store):
    def bad(tx):
        tx.insert(a_job(99))
        raise RuntimeError("after writing")

    tickets = [Ticket() for _ in range(20)]
    for n, ticket in enumerate(tickets):
        store.post(bad if n % 5 == 2 else lambda tx, n=n: tx.insert(a_job(n)), ticket)
    for n, ticket in enumerate(tickets):
        if n % 5 == 2:
            with pytest.raises(RuntimeError, match="after writing"):
                ticket.wait(10)
        else:
            ticket.wait(10)
    assert store.read(lambda r: r.pending()) == 16 == store.run(lambda tx: tx.pending())


def test_changes_are_delivered_in_order_with_their_outcomes(store):
    seen = []

    def deliver(outcomes, changed):
        seen.extend(job.payload["n"] for job in changed)
        for ticket, result, error in outcomes:
            ticket.land(result, error)

    store.deliver = deliver
    tickets = [Ticket() for _ in range(50)]
    for n, ticket in enumerate(tickets):
        store.post(lambda tx, n=n: tx.insert(a_job(n)), ticket)
    for ticket in tickets:
        ticket.wait(10)
    assert seen == list(range(50))


def test_many_threads(store):
    def work(base):
        for n in range(50):
            store.run(lambda tx, n=n: tx.insert(a_job(base + n)))

    threads = [threading.Thread(target=work, args=(1000 * t,)) for t in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    jobs = store.read(lambda r: r.listing(None, None, 1000, None))
    assert len(jobs) == 400 == len({j.seq for j in jobs})


STEPS = st.lists(st.tuples(st.sampled_from(["insert", "hold", "lease", "end", "requeue", "extend", "fail after writing", "archive"]), st.integers(0, 9)),
                 max_size=30)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(STEPS)
def test_both_stores_tell_the_same_story(tmp_path_factory, steps):
    disk = SQLiteStore(tmp_path_factory.mktemp("s") / "queue.db")
    stores = [MemoryStore(), disk]
    ids = [new_id(n) for n in range(len(steps))]
    try:
        for at, (verb, n) in enumerate(steps):
            for each in stores:
                try:
                    each.run(lambda tx, at=at, verb=verb, n=n: step(tx, ids, at, verb, n))
                except ValueError:
                    pass
            stories = [each.read(story) for each in stores]
            assert stories[0] == stories[1]
            counted = disk.run(lambda tx: (tx.pending(), dict(tx.lanes())))
            assert counted == (stories[1]["pending"], stories[1]["lanes"]), "the counts in memory are the counts on disk"
    finally:
        disk.close()


def step(tx, ids, at, verb, n):
    job = tx.get(ids[n]) if n < at else None
    if verb in ("insert", "hold", "fail after writing"):
        tx.insert(Job(ids[at], ("draw", "chat")[n % 2], "{}", ("high", "normal", "low")[n % 3], enqueued_ms=at, ready=verb != "hold",
                      not_before_ms=n if verb == "hold" else None))
        if verb == "fail after writing":
            raise ValueError
    elif job is not None and verb == "archive":
        tx.mark_archived([job])
    elif job is not None:
        if verb == "extend":
            job.lease_until_ms = at
            return tx.extend(job) if job.status == "leased" else None
        job.status = {"lease": "leased", "end": "completed", "requeue": "queued"}[verb]
        job.ready = verb == "requeue" and n % 2 == 0
        job.not_before_ms = 5 if verb == "requeue" and n % 2 else None
        job.lease_until_ms = 100 + n if verb == "lease" else None
        job.ended_ms, job.result_json = (at, '{"n": 1}') if verb == "end" else (None, job.result_json)
        tx.update(job)
    return None


def story(r):
    return {"jobs": r.listing(None, None, 100, None), "lanes": dict(r.lanes()), "pending": r.pending(), "due": r.next_due_ms(), "counts": r.counts()}


# ---- on disk only


def test_reopening_finds_everything(tmp_path):
    store = SQLiteStore(tmp_path / "queue.db")
    jobs = [a_job(n, priority=("high", "low")[n % 2]) for n in range(20)]
    store.run(lambda tx: [tx.insert(j) for j in jobs])
    before = store.read(story)
    store.close()
    store.close()
    again = SQLiteStore(tmp_path / "queue.db")
    assert again.read(story) == before and again.run(lambda tx: tx.pending()) == 20
    more = a_job(21)
    again.run(lambda tx: tx.insert(more))
    assert more.seq == 21
    again.close()


def test_one_owner(tmp_path):
    store = SQLiteStore(tmp_path / "queue.db")
    with pytest.raises(InvalidSetting, match="Another server is using"):
        SQLiteStore(tmp_path / "queue.db")
    store.close()


@pytest.mark.parametrize(("content", "words"), [(b"not a database at all, only notes" * 50, "cannot be used"), (None, "another program"), ("newer", "newer colab-gpu")])
def test_a_foreign_file_is_left_alone(tmp_path, content, words):
    path = tmp_path / "queue.db"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        db = sqlite3.connect(path)
        db.execute("PRAGMA user_version = 999" if content else "CREATE TABLE mine (x)")
        db.commit()
        db.close()
    before = path.read_bytes()
    with pytest.raises(InvalidSetting, match=words):
        SQLiteStore(path)
    assert path.read_bytes()[100:] == before[100:]


def test_a_full_disk_is_said_and_passes(tmp_path):
    store = SQLiteStore(tmp_path / "queue.db")
    store.run(lambda tx: tx.insert(a_job(1)))
    pages = store._committer.db.execute("PRAGMA page_count").fetchone()[0]
    store._committer.db.execute(f"PRAGMA max_page_count = {pages}")
    big = a_job(2)
    big.payload_json = '"' + "x" * 200_000 + '"'
    with pytest.raises(Unavailable, match="full") as caught:
        store.run(lambda tx: tx.insert(big))
    assert caught.value.retryable and caught.value.code == "storage_unavailable"
    assert store.read(lambda r: r.pending()) == 1
    store._committer.db.execute("PRAGMA max_page_count = 1000000")
    store.run(lambda tx: tx.insert(big))
    assert store.read(lambda r: r.pending()) == 2 == store.run(lambda tx: tx.pending())
    store.close()


WRITER = """
    import sys
    from colab_gpu.jobs import Job, new_id
    from colab_gpu.store import SQLiteStore
    store = SQLiteStore(sys.argv[1])
    class Say:
        def __init__(self, id): self.id = id
        def land(self, result, error): print(self.id, flush=True)
    import time
    while True:
        for _ in range(50):
            job = Job(new_id(int(time.time() * 1000)), "errand", "{}", enqueued_ms=1)
            store.post(lambda tx, job=job: tx.insert(job), Say(job.id))
        time.sleep(0.001)
"""


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path):
    chance, acknowledged = random.Random(7), set()
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path / "queue.db")], cwd=ROOT, text=True,
                                 stdout=subprocess.PIPE)
        for _ in range(chance.randrange(20, 1500)):
            acknowledged.add(child.stdout.readline().strip())
        child.send_signal(signal.SIGKILL)
        rest = child.communicate()[0].split("\n")
        acknowledged |= {line for line in rest[:-1] if line}
        store = SQLiteStore(tmp_path / "queue.db")
        stored = {job.id for job in store.read(lambda r: r.listing(None, None, 10**6, None))}
        assert acknowledged <= stored
        assert store.run(lambda tx: tx.pending()) == len(stored)
        store.close()
