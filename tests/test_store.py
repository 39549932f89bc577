"""Every store keeps the same promises; the one on disk keeps them through failures and `kill -9`."""

import asyncio
import copy
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colab_gpu.errors import InvalidSetting, RequestError, Unavailable
from colab_gpu.jobs import ENDED, Job, new_id
from colab_gpu.store import SCHEMA, SCHEMA_VERSION, MemoryStore, SQLiteStore, Ticket

ROOT = Path(__file__).resolve().parent.parent
LONG_S = 30  # only how long a broken store may hang before its test says so


# ---- the stores under test: a store that joins gets a maker here, and whatever it needs skipped where it is absent

MAKERS = {"memory": lambda folder: MemoryStore(), "sqlite": lambda folder: SQLiteStore(folder / "queue.db")}


@pytest.fixture(params=MAKERS)
def store(request, tmp_path):
    made = MAKERS[request.param](tmp_path)
    yield made
    made.close()


@pytest.fixture
def disk(tmp_path):
    made = SQLiteStore(tmp_path / "queue.db")
    yield made
    made.close()


def a_job(n, **more):
    return Job(new_id(1000 + n), more.pop("tool", "errand"), f'{{"n": {n}}}', enqueued_ms=1000 + n, **more)


def numbers(jobs):
    return [job.payload["n"] for job in jobs]


def put(store, *jobs):
    store.run(lambda tx: [tx.insert(job) for job in jobs])
    return jobs


def change(store, job_id, **values):
    def op(tx):
        job = tx.get(job_id)
        for name, value in values.items():
            setattr(job, name, value)
        tx.update(job)
        return job

    return store.run(op)


def in_thread(work):
    """The outcome of `work()`, run in a thread that is waited for; a store that hangs fails the test instead of stopping it."""
    out = []

    def body():
        try:
            out.append((work(), None))
        except BaseException as e:
            out.append((None, e))

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(LONG_S)
    assert out, "the store did not answer"
    if out[0][1] is not None:
        raise out[0][1]
    return out[0][0]


def story(r):
    """All that a reader can be asked about every job."""
    return {"jobs": r.listing(None, None, 1000, None), "lanes": dict(r.lanes()), "pending": r.pending(), "due": r.next_due_ms(), "counts": r.counts()}


def known(store):
    """What the writer believes without asking, beside what is stored."""
    return store.run(lambda tx: (tx.pending(), dict(tx.lanes()))), store.read(lambda r: (r.pending(), dict(r.lanes())))


# ---- each method


def test_a_job_comes_back_as_it_was(store):
    job = a_job(1, priority="low", requirements=("a", "b"), not_before_ms=9, ready=False, queue_deadline_ms=10, run_timeout_s=1.5, retry_of="old",
                idempotency_key="k", body_digest="d", max_attempts=7, model="m", webhook="http://h/?ü")
    put(store, job)
    assert store.read(lambda r: r.get(job.id)) == job
    assert store.run(lambda tx: tx.by_key("k")) == job and store.run(lambda tx: tx.by_key("no")) is None
    assert store.read(lambda r: r.get("nope")) is None
    changed = change(store, job.id, status="leased", started_ms=5, worker_id="w", worker_instance="i", attempts=1, grants=1, lease_token="t",
                     lease_until_ms=50, lease_s=1.5, lease_request="r", run_deadline_ms=60, cancel_requested=True,
                     artifacts=({"name": "x", "bytes": 3},), error_kind="oom", detail="full — ü \0 \U0001f600")
    assert store.read(lambda r: r.get(job.id)) == changed
    ended = change(store, job.id, status="completed", result_json='{"x": "ü\\u0000"}', ended_ms=9, lease_until_ms=None, result_digest="x",
                   webhook_due_ms=9, webhook_status={"attempts": 1, "lastError": "ü"})
    assert store.read(lambda r: r.get(job.id)) == ended and ended.result == {"x": "ü\0"}


def test_by_lease_request_finds_only_what_is_still_leased(store):
    jobs = put(store, *(a_job(n, priority=p) for n, p in enumerate(["low", "high", "normal"])))
    for job in jobs:
        change(store, job.id, status="leased", lease_request="r", lease_until_ms=5)
    assert {j.id for j in store.run(lambda tx: tx.by_lease_request("r"))} == {j.id for j in jobs}
    change(store, jobs[0].id, status="queued", lease_until_ms=None)
    assert {j.id for j in store.run(lambda tx: tx.by_lease_request("r"))} == {j.id for j in jobs[1:]}
    assert store.run(lambda tx: tx.by_lease_request("other")) == []


def test_a_lease_request_is_used_when_its_lease_has_spoken(store):
    [job] = put(store, a_job(1))
    assert store.run(lambda tx: tx.used("r")) is False
    change(store, job.id, status="leased", lease_request="r", lease_until_ms=5)
    assert store.run(lambda tx: tx.used("r")) is False
    change(store, job.id, status="completed", ended_ms=6, lease_until_ms=None, result_digest="x")
    assert store.run(lambda tx: tx.used("r")) is True and store.run(lambda tx: tx.used("s")) is False


def test_extend_stores_the_deadline_and_nothing_else(store):
    [job] = put(store, a_job(1))
    change(store, job.id, status="leased", lease_until_ms=50)

    def op(tx):
        found = tx.get(job.id)
        found.lease_until_ms, found.detail, found.status = 99, "not stored", "queued"
        tx.extend(found)

    store.run(op)
    stored = store.read(lambda r: r.get(job.id))
    assert (stored.lease_until_ms, stored.detail, stored.status) == (99, None, "leased")


def test_order_is_priority_then_age(store):
    jobs = put(store, *(a_job(n, priority=p) for n, p in enumerate(["low", "normal", "high", "normal", "high"])))
    assert numbers(store.run(lambda tx: tx.heads("errand", 9))) == [2, 4, 1, 3, 0]
    assert numbers(store.run(lambda tx: tx.heads("errand"))) == [2] and store.run(lambda tx: tx.heads("other", 9)) == []
    assert [store.read(lambda r, j=j: r.ahead_of(j)) for j in jobs] == [4, 2, 0, 3, 1]
    assert store.read(lambda r: r.ahead_of(jobs[0], 3)) == 3


def test_ahead_counts_every_lane(store):
    jobs = put(store, a_job(0), a_job(1, tool="draw"), a_job(2, requirements=("big",)), a_job(3, ready=False, not_before_ms=9), a_job(4))
    assert store.read(lambda r: r.ahead_of(jobs[4])) == 3
    assert store.read(lambda r: dict(r.lanes())) == {"errand": 2, "draw": 1, "errand big": 1}


def test_what_is_due(store):
    held, late, taken = put(store, a_job(1, not_before_ms=50, ready=False), a_job(2, queue_deadline_ms=40), a_job(3))
    assert store.read(lambda r: r.next_due_ms()) == 40
    change(store, taken.id, status="leased", lease_until_ms=30)
    assert store.read(lambda r: r.next_due_ms()) == 30
    for ask, job, when in (("due", held, 50), ("overdue", late, 40), ("expired", taken, 30)):
        assert [j.id for j in store.run(lambda tx, ask=ask, when=when: getattr(tx, ask)(when, 9))] == [job.id], ask
        assert store.run(lambda tx, ask=ask, when=when: getattr(tx, ask)(when - 1, 9)) == [], ask
        assert store.run(lambda tx, ask=ask, when=when: getattr(tx, ask)(when, 0)) == [], ask
    assert store.read(lambda r: (r.pending(), dict(r.lanes()))) == (2, {"errand": 1})
    for job in (held, late, taken):
        change(store, job.id, status="canceled", ended_ms=1)
    assert store.read(lambda r: (r.next_due_ms(), r.pending(), dict(r.lanes()))) == (None, 0, {}), "the ended are never due"
    assert store.run(lambda tx: (tx.due(99, 9), tx.overdue(99, 9), tx.expired(99, 9))) == ([], [], [])


def test_listing(store):
    jobs = put(store, *(a_job(n, tool=("draw", "chat")[n % 2]) for n in range(10)))
    for n, status in ((3, "failed"), (4, "completed"), (5, "leased"), (6, "canceled")):
        change(store, jobs[n].id, status=status, ended_ms=None if status == "leased" else 5, lease_until_ms=99)

    def listed(*args):
        return numbers(store.read(lambda r: r.listing(*args)))

    assert listed(None, None, 3, None) == [9, 8, 7] and listed(None, None, 3, jobs[7].id) == [6, 5, 4]
    assert listed(None, "draw", 9, None) == [8, 6, 4, 2, 0] and listed("queued", "chat", 9, None) == [9, 7, 1]
    assert [listed(s, None, 9, None) for s in ("failed", "completed", "leased", "canceled")] == [[3], [4], [5], [6]]
    assert listed(None, None, 9, "no such job") == listed("no such status", None, 9, None) == listed(None, "no such tool", 9, None) == []
    assert store.read(lambda r: r.counts()) == {"queued": 6, "failed": 1, "completed": 1, "leased": 1, "canceled": 1}


def test_the_archive_is_told_once(store):
    jobs = put(store, *(a_job(n) for n in range(5)))
    for job in jobs[1:4]:
        change(store, job.id, status="failed", ended_ms=5)
    assert numbers(store.run(lambda tx: tx.unarchived(9))) == [1, 2, 3] and numbers(store.run(lambda tx: tx.unarchived(2))) == [1, 2]

    def mark_and_fail(tx):
        tx.mark_archived([jobs[3]])
        raise ValueError

    with pytest.raises(ValueError):
        store.run(mark_and_fail)
    store.run(lambda tx: tx.mark_archived([jobs[1], jobs[3]]))
    assert numbers(store.run(lambda tx: tx.unarchived(9))) == [2]
    store.run(lambda tx: tx.mark_archived([]))


def test_a_transaction_sees_its_own_writes(store):
    def op(tx):
        job = a_job(1, idempotency_key="k")
        tx.insert(job)
        seen = [tx.get(job.id).id == job.id, tx.by_key("k").id == job.id, numbers(tx.heads("errand", 9)), tx.pending(), dict(tx.lanes())]
        found = tx.get(job.id)
        found.status, found.lease_until_ms, found.lease_request = "leased", 5, "r"
        tx.update(found)
        return seen, numbers(tx.by_lease_request("r")), numbers(tx.expired(5, 9)), tx.heads("errand", 9), tx.pending(), dict(tx.lanes())

    assert store.run(op) == ([True, True, [1], 1, {"errand": 1}], [1], [1], [], 0, {})


@pytest.mark.parametrize("ready", [True, False])
@pytest.mark.parametrize("status", ["queued", "leased", "canceled"])
def test_a_job_may_be_changed_right_after_it_was_inserted(store, ready, status):
    def op(tx):
        job = a_job(1, ready=ready, not_before_ms=None if ready else 9)
        tx.insert(job)
        job.status = status
        tx.update(job)

    store.run(op)
    believed, stored = known(store)
    assert believed == stored == (int(status == "queued"), {"errand": 1} if ready and status == "queued" else {})


def test_what_was_handed_out_is_a_copy(store):
    [job] = put(store, a_job(1))
    for copied in (store.read(lambda r: r.get(job.id)), store.run(lambda tx: tx.get(job.id)), store.read(lambda r: r.listing(None, None, 1, None))[0]):
        copied.detail = "scribbled"
    assert store.read(lambda r: r.get(job.id)).detail is None


# ---- the transaction


@pytest.mark.parametrize("error", [RuntimeError, RequestError, sqlite3.IntegrityError, RecursionError])
@pytest.mark.parametrize("writes", [True, False])
def test_an_op_that_raises_harms_only_itself(store, error, writes):
    before = put(store, a_job(900), a_job(901))[0]

    def bad(tx):
        if writes:
            tx.insert(a_job(99))
            job = tx.get(before.id)
            job.status, job.lease_until_ms = "leased", 5
            tx.update(job)
        raise error("in the middle")

    tickets = [Ticket() for _ in range(20)]
    with pause(store):
        for n, ticket in enumerate(tickets):
            store.post(bad if n % 5 == 2 else lambda tx, n=n: tx.insert(a_job(n)), ticket)
    for n, ticket in enumerate(tickets):
        if n % 5 == 2:
            with pytest.raises((error, Unavailable), match="in the middle"):
                ticket.wait(LONG_S)
        else:
            ticket.wait(LONG_S)
    believed, stored = known(store)
    assert believed == stored == (18, {"errand": 18})
    assert store.read(lambda r: r.get(before.id)).status == "queued"
    seqs = [job.seq for job in store.read(lambda r: r.listing(None, None, 100, None))]
    assert len(set(seqs)) == 18


@contextmanager
def pause(store):
    """Hold the writer, so that what is posted meanwhile becomes one batch."""
    if isinstance(store, MemoryStore):
        yield
        return
    running, go, ticket = threading.Event(), threading.Event(), Ticket()

    def hold(tx):
        running.set()
        assert go.wait(LONG_S)

    store.post(hold, ticket)
    assert running.wait(LONG_S)
    yield
    go.set()
    ticket.wait(LONG_S)


def test_posted_together_is_committed_together(disk):
    commits = []
    disk._committer.db.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else None)
    tickets = [Ticket() for _ in range(100)]
    with pause(disk):
        for n, ticket in enumerate(tickets):
            disk.post(lambda tx, n=n: tx.insert(a_job(n)), ticket)
    for ticket in tickets:
        ticket.wait(LONG_S)
    assert len(commits) == 2, "one for the op that held the writer, one for the hundred"


def test_changes_are_delivered_in_order_with_their_outcomes(store):
    seen, outcomes_seen = [], []

    def deliver(outcomes, changed):
        seen.extend(numbers(changed))
        outcomes_seen.extend(result for _, result, _ in outcomes)
        for ticket, result, error in outcomes:
            ticket.land(result, error)

    store.deliver = deliver
    tickets = [Ticket() for _ in range(600)]
    for n, ticket in enumerate(tickets):
        store.post(lambda tx, n=n: (tx.insert(a_job(n)), n)[1], ticket)
    for ticket in tickets:
        ticket.wait(LONG_S)
    assert seen == outcomes_seen == list(range(600))


def test_an_outcome_is_delivered_after_its_change_can_be_read(store):
    found = []

    def deliver(outcomes, changed):
        found.extend(store.read(lambda r, job=job: r.get(job.id)) is not None for job in changed)
        for ticket, result, error in outcomes:
            ticket.land(result, error)

    store.deliver = deliver
    for n in range(20):
        put(store, a_job(n))
    assert found == [True] * 20


def test_an_op_that_failed_delivers_no_change(store):
    seen = []

    def deliver(outcomes, changed):
        seen.extend(changed)
        for ticket, result, error in outcomes:
            ticket.land(result, error)

    def bad(tx):
        tx.insert(a_job(1))
        raise ValueError

    store.deliver = deliver
    with pytest.raises(ValueError):
        store.run(bad)
    assert seen == []


def test_a_listener_that_raises_does_not_stop_the_store(store, caplog):
    def deliver(outcomes, changed):
        for ticket, result, error in outcomes:
            ticket.land(result, error)
        raise ZeroDivisionError("a listener's bug")

    store.deliver = deliver
    for n in range(3):
        in_thread(lambda n=n: put(store, a_job(n)))
    assert store.read(lambda r: r.pending()) == 3 and "a listener's bug" in caplog.text


def test_many_threads_post_and_read(store):
    """Each thread keeps two of its own jobs' states opposite in every commit; no transaction of another tears them apart."""
    errors = []

    def work(base):
        pair = put(store, a_job(base), a_job(base + 1))

        def swap(tx):
            one, two = tx.get(pair[0].id), tx.get(pair[1].id)
            assert (one.detail == "x") == (two.detail == "y")
            one.detail, two.detail = ("x", "y") if one.detail != "x" else ("y", "x")
            tx.update(one)
            tx.update(two)

        try:
            for n in range(25):
                store.run(swap)
                store.run(lambda tx, n=n: tx.insert(a_job(base + 2 + n)))
                assert store.read(lambda r: r.get(pair[0].id)).detail == ("x" if n % 2 == 0 else "y")
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(1000 * t,), daemon=True) for t in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    assert not errors and not any(thread.is_alive() for thread in threads)
    jobs = store.read(lambda r: r.listing(None, None, 1000, None))
    assert len(jobs) == 8 * 27 == len({j.seq for j in jobs})
    believed, stored = known(store)
    assert believed == stored


# ---- both tell the same story, whatever is done

VERBS = ["insert", "hold", "lease", "end", "cancel", "requeue", "put off", "due", "extend", "insert and change", "insert, change, fail", "change, fail", "archive", "note webhook"]
STEPS = st.lists(st.lists(st.tuples(st.sampled_from(VERBS), st.integers(0, 11)), min_size=1, max_size=3), max_size=25)


class Failed(Exception):
    pass


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(STEPS, st.booleans())
def test_all_stores_tell_the_same_story(tmp_path_factory, steps, reopen):
    folder = tmp_path_factory.mktemp("s")
    stores = {name: make(folder) for name, make in MAKERS.items()}
    ids = [new_id(n, bytes(10)) for n in range(100)]
    try:
        for now, verbs in enumerate(steps):
            outcomes = [outcome(each, lambda tx, now=now, verbs=verbs: several(tx, ids, now, verbs)) for each in stores.values()]
            assert outcomes.count(outcomes[0]) == len(outcomes)
            expect_the_same(list(stores.values()), ids, now)
        if reopen:
            for name, make in MAKERS.items():
                if name != "memory":
                    stores[name].close()
                    stores[name] = make(folder)
            expect_the_same(list(stores.values()), ids, len(steps))
    finally:
        for each in stores.values():
            each.close()


def outcome(store, op):
    try:
        return store.run(op)
    except Failed:
        return "failed"


def expect_the_same(stores, ids, now):
    stories = [each.read(lambda r: whole_story(r, ids)) for each in stores]
    inside = [each.run(lambda tx: inner_story(tx, ids, now)) for each in stores]
    for other, within in zip(stories, inside, strict=True):
        assert other == stories[0] and within == inside[0]
        assert within["counted"] == (other["pending"], other["lanes"]), "what the writer believes is what is stored"


def whole_story(r, ids):
    jobs = r.listing(None, None, 1000, None)
    return story(r) | {
        "ahead": [r.ahead_of(job, most) for job in jobs for most in (2, 10_000)],
        "lists": [[j.id for j in r.listing(status, tool, limit, before)] for status in (None, "queued", "leased", "completed", "failed", "canceled")
                  for tool in (None, "draw") for limit in (2, 50) for before in (None, ids[3], "none")]}


def inner_story(tx, ids, now):
    "What only a transaction can be asked. Where the order is not promised, sets are compared."
    def some(jobs):
        return sorted(job.id for job in jobs)

    return {"counted": (tx.pending(), dict(tx.lanes())), "heads": [[j.id for j in tx.heads(lane, n)] for lane in ("draw", "chat", "draw big") for n in (1, 9)],
            "late": [some(ask(when, 99)) for ask in (tx.expired, tx.due, tx.overdue) for when in (0, 5, now, 105)],
            "bounded": [len(ask(105, 2)) for ask in (tx.expired, tx.due, tx.overdue)], "unarchived": [j.id for j in tx.unarchived(50)],
            "keys": [job and job.id for job in (tx.by_key(f"k{n}") for n in range(4))], "requests": [(some(tx.by_lease_request(f"r{n}")), tx.used(f"r{n}")) for n in range(3)],
            "got": [tx.get(i) for i in ids[:12]], "lines": [tx.line(lane, n) for lane in ("draw", "chat big") for n in (1, 9)],
            "webhooks": [(tx.webhooks_due(when, most), tx.next_webhook_ms(when)) for when in (0, 5, now, 105) for most in (2, 99)] + [tx.webhooks_pending()]}


def several(tx, ids, now, verbs):
    return [step(tx, ids, now, verb, n) for verb, n in verbs]


def step(tx, ids, now, verb, n):
    jobs = tx.listing(None, None, 1000, None)
    if verb == "hold" or verb.startswith("insert"):
        return insert(tx, ids[len(jobs)], now, verb, n)
    if not jobs:
        return "nothing"
    job = jobs[n % len(jobs)]
    if verb == "archive":
        return tx.mark_archived([job] if job.ended else [])
    if verb == "extend":
        job.lease_until_ms = 50 + now
        return tx.extend(job) if job.status == "leased" else None
    if verb == "note webhook" and job.webhook_due_ms is not None:
        job.webhook_due_ms, job.webhook_status, job.detail = (None if n % 2 else now + n), {"attempts": n}, "not stored"
        return tx.note_webhook(job)
    if job.ended or verb == "note webhook":
        return "ended"
    status = {"lease": "leased", "change, fail": "leased", "end": ("completed", "failed")[n % 2], "cancel": "canceled"}.get(verb, "queued")
    job.status, job.ready = status, verb != "put off"
    job.not_before_ms = 5 + n if verb == "put off" else None
    job.lease_until_ms, job.lease_request = (100 + n, f"r{n % 3}") if status == "leased" else (None, job.lease_request)
    job.ended_ms, job.result_json = (now, '{"n": 1}') if status in ENDED else (None, None)
    job.artifacts = ({"name": f"a{n}"},) if n % 4 == 0 else ()
    job.webhook_due_ms = now if status in ENDED and job.webhook else None
    tx.update(job)
    if verb == "change, fail":
        raise Failed
    return tx.pending()


def insert(tx, job_id, now, verb, n):
    key = f"k{n % 4}" if n % 3 == 0 and tx.by_key(f"k{n % 4}") is None else None
    job = Job(job_id, ("draw", "chat")[n % 2], "{}", ("high", "normal", "low")[n % 3], enqueued_ms=now, ready=verb != "hold",
              not_before_ms=n if verb == "hold" else None, queue_deadline_ms=now + n if n % 5 == 0 else None,
              requirements=("big",) if n % 4 == 2 else (), idempotency_key=key, model=(None, "m")[n % 2], webhook="http://h" if n % 3 == 1 else None)
    tx.insert(job)
    if "change" in verb:
        job.status, job.lease_until_ms, job.detail = ("queued", "leased")[n % 2], 5 if n % 2 else None, "changed"
        tx.update(job)
    if verb.endswith("fail"):
        raise Failed
    return job.seq


# ---- on disk: what outlives the process


def test_reopening_finds_everything(tmp_path):
    store = SQLiteStore(tmp_path / "queue.db")
    jobs = put(store, *(a_job(n, priority=("high", "low")[n % 2], not_before_ms=n if n % 3 == 0 else None, ready=n % 3 != 0) for n in range(20)))
    change(store, jobs[5].id, status="leased", lease_until_ms=9)
    change(store, jobs[7].id, status="completed", ended_ms=9, result_json='"x"')
    before = store.read(story)
    store.close()
    store.close()
    again = SQLiteStore(tmp_path / "queue.db")
    assert again.read(story) == before
    believed, stored = known(again)
    assert believed == stored and believed[0] == 18
    [more] = put(again, a_job(21))
    assert more.seq == 21
    again.close()


def test_closing_finishes_what_was_posted_and_refuses_what_comes_later(disk, tmp_path):
    tickets = [Ticket() for _ in range(600)]
    for n, ticket in enumerate(tickets):
        disk.post(lambda tx, n=n: tx.insert(a_job(n)), ticket)
    disk.close()
    for ticket in tickets:
        ticket.wait(0)
    with pytest.raises(Unavailable, match="closed"):
        disk.run(lambda tx: None)
    with pytest.raises(Unavailable, match="closed"):
        disk.read(lambda r: r.pending())
    again = SQLiteStore(tmp_path / "queue.db")
    assert again.read(lambda r: r.pending()) == 600
    again.close()


def test_nobody_is_left_waiting_when_the_store_closes(tmp_path):
    """Whoever posts while it closes gets an answer or a refusal, and what was answered is stored."""
    for round_ in range(10):
        store, stored, answers, begun = SQLiteStore(tmp_path / f"{round_}.db"), set(), [], threading.Semaphore(0)

        def work(base, store=store, stored=stored, begun=begun):
            for n in range(10_000):
                try:
                    stored.add(put(store, a_job(base + n))[0].id)
                except Unavailable:
                    return True
                begun.release()
            return False

        threads = [threading.Thread(target=lambda base=t * 10_000, work=work, answers=answers: answers.append(work(base)), daemon=True) for t in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            assert begun.acquire(timeout=LONG_S)
        in_thread(store.close)
        for thread in threads:
            thread.join(LONG_S)
        assert answers == [True] * 4, "somebody waits for ever"
        again = SQLiteStore(tmp_path / f"{round_}.db")
        assert stored == {j.id for j in again.read(lambda r: r.listing(None, None, 10**6, None))}
        again.close()


def test_an_op_is_handed_over_inside_the_gate_that_closing_passes(disk):
    """The same without luck: no post is between its look at `_closed` and its hand-over while the store closes."""
    held, post = [], disk._driver.post
    disk._driver.post = lambda op, ticket: (held.append(disk._gate.locked()), post(op, ticket))
    put(disk, a_job(1))
    assert held == [True]
    with disk._gate:
        closing = threading.Thread(target=disk.close, daemon=True)
        closing.start()
        closing.join(0.05)  # a glance: this can only miss a fault, never see one that isn't there
        assert closing.is_alive() and not disk._closed
    closing.join(LONG_S)
    assert disk._closed and not closing.is_alive()


def test_one_owner(tmp_path):
    store = SQLiteStore(tmp_path / "queue.db")
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (tmp_path / "queue.db", tmp_path / "link" / "queue.db"):
        with pytest.raises(InvalidSetting, match="Another server is using") as caught:
            SQLiteStore(path)
        assert caught.value.field == "COLAB_GPU_DATA"
    put(store, a_job(1))
    store.close()
    SQLiteStore(tmp_path / "queue.db").close()


OWNER = """
    import sys
    from colab_gpu.store import SQLiteStore
    store = SQLiteStore(sys.argv[1])
    print("open", flush=True)
    sys.stdin.read()
"""


def child(code, *args, **more):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, args)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                            text=True, stdout=subprocess.PIPE, **more)


def test_a_second_process_is_refused_and_a_killed_one_lets_go(tmp_path):
    owner = child(OWNER, tmp_path / "queue.db", stdin=subprocess.PIPE)
    assert owner.stdout.readline() == "open\n"
    with pytest.raises(InvalidSetting, match="Another server is using"):
        SQLiteStore(tmp_path / "queue.db")
    owner.kill()
    owner.communicate()
    SQLiteStore(tmp_path / "queue.db").close()


WRITER = """
    import sys
    from colab_gpu.errors import ColabGPUError
    from colab_gpu.jobs import Job, new_id
    from colab_gpu.store import SQLiteStore
    import itertools, random, threading
    store, chance = SQLiteStore(sys.argv[1]), random.Random(int(sys.argv[2]))
    slots = threading.Semaphore(64)
    class Say:
        "Prints what was acknowledged, and only that."
        def __init__(self, text): self.text = text
        def land(self, result, error):
            if error is None: print(self.text, flush=True)
            slots.release()
    def insert(job):
        def op(tx): tx.insert(job)
        return op
    def end(job):
        def op(tx):
            found = tx.get(job.id)
            found.status, found.ended_ms, found.result_json = "completed", 5, '"' + job.id + '"'
            tx.update(found)
        return op
    def bad(job):
        def op(tx):
            tx.insert(job)
            raise ColabGPUError("never mind")
        return op
    for n in itertools.count():
        job = Job(new_id(n), "errand", '{"pad": "' + "x" * chance.randrange(3000) + '"}', enqueued_ms=n)
        for verb, op in (("insert", insert(job)), ("end", end(job)))[:chance.randrange(1, 3)]:
            slots.acquire()
            store.post(op, Say(verb + " " + job.id))
        if n % 50 == 7:
            slots.acquire()
            store.post(bad(Job(new_id(n), "bad", "{}")), Say("bad"))
"""


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path):
    chance, acknowledged = random.Random(7), set()
    for run in range(8):
        writer = child(WRITER, tmp_path / "queue.db", run)
        for _ in range(chance.randrange(1, 900)):
            acknowledged.add(writer.stdout.readline().strip())
        writer.send_signal(signal.SIGKILL)
        acknowledged |= set(writer.communicate()[0].split("\n")[:-1])
        store = SQLiteStore(tmp_path / "queue.db")
        jobs = {job.id: job for job in store.read(lambda r: r.listing(None, None, 10**6, None))}
        for line in acknowledged:
            verb, job_id = line.split(" ")
            assert job_id in jobs, f"{line} was acknowledged, and is gone"
            assert verb != "end" or jobs[job_id].result == job_id
        assert not any(job.tool == "bad" for job in jobs.values())
        assert [job for job in jobs.values() if (job.status == "completed") != (job.result_json is not None)] == [], "half a transaction"
        believed, stored = known(store)
        assert believed == stored and believed[0] == sum(job.status == "queued" for job in jobs.values())
        assert store._read_db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        store.close()


# ---- on disk: files that aren't ours


def foreign(path, version):
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE mine (x)")
    db.execute(f"PRAGMA user_version = {version}")
    db.commit()
    db.close()


def filled(path, number=300):
    store = SQLiteStore(path)
    put(store, *(a_job(n) for n in range(number)))
    store.close()


def newer(path):
    filled(path, 1)
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()


def cut(path):
    filled(path)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def scribbled(path):
    filled(path)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:4096] + random.Random(1).randbytes(size - 4096))


BAD_FILES = {"notes": (lambda p: p.write_bytes(b"not a database at all, only notes" * 50), "cannot be used as the job store"),
             "another program's": (lambda p: foreign(p, 0), "a database of another program"),
             "another program's, first version": (lambda p: foreign(p, SCHEMA_VERSION), "a database of another program"),
             "another program's, late version": (lambda p: foreign(p, 999), "a database of another program"),
             "only a version": (lambda p: sqlite3.connect(p).execute("PRAGMA user_version = 7"), "a database of another program"),
             "newer": (newer, "written by a newer colab-gpu: upgrade this one"), "cut": (cut, "cannot be used as the job store"),
             "scribbled": (scribbled, "cannot be used as the job store"), "a folder": (lambda p: p.mkdir(), "cannot be used as the job store"),
             "no place for the lock": (lambda p: p.with_suffix(".lock").mkdir(), "cannot be written")}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_used_gets_one_sentence_and_is_left_alone(tmp_path, name):
    make, words = BAD_FILES[name]
    path = tmp_path / "queue.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    for _ in range(2):  # the second time too: nothing was made, and the lock was let go of
        with pytest.raises(InvalidSetting, match=words) as caught:
            SQLiteStore(path)
        assert caught.value.field == "COLAB_GPU_DATA" and "\n" not in str(caught.value) and str(path.parent) in str(caught.value)
        assert (path.read_bytes() if path.is_file() else None) == before


FIRST_SCHEMA = """
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL, tool TEXT NOT NULL, lane TEXT NOT NULL, rank INTEGER NOT NULL,
    status TEXT NOT NULL DEFAULT 'queued', ready INTEGER NOT NULL DEFAULT 1, enqueued_ms INTEGER NOT NULL,
    started_ms INTEGER, ended_ms INTEGER, worker_id TEXT, attempts INTEGER NOT NULL DEFAULT 0, max_attempts INTEGER NOT NULL,
    not_before_ms INTEGER, queue_deadline_ms INTEGER, run_timeout_s REAL, run_deadline_ms INTEGER, requirements TEXT,
    grants INTEGER NOT NULL DEFAULT 0, lease_token TEXT, lease_until_ms INTEGER, lease_s REAL, lease_request TEXT,
    worker_instance TEXT, cancel_requested INTEGER NOT NULL DEFAULT 0, artifacts TEXT, error_kind TEXT, detail TEXT,
    result_digest TEXT, retry_of TEXT, idempotency_key TEXT, body_digest TEXT, archived INTEGER NOT NULL DEFAULT 0);
CREATE TABLE bodies (seq INTEGER PRIMARY KEY, payload TEXT NOT NULL, result TEXT);
CREATE UNIQUE INDEX jobs_id ON jobs (id);
CREATE INDEX jobs_tool ON jobs (tool, seq);
CREATE INDEX jobs_failed ON jobs (seq) WHERE status = 'failed';
CREATE INDEX jobs_canceled ON jobs (seq) WHERE status = 'canceled';
CREATE INDEX jobs_ready ON jobs (lane, rank, seq) WHERE ready = 1;
CREATE INDEX jobs_held ON jobs (not_before_ms) WHERE ready = 0 AND status = 'queued';
CREATE INDEX jobs_overdue ON jobs (queue_deadline_ms) WHERE queue_deadline_ms IS NOT NULL AND status = 'queued';
CREATE INDEX jobs_leases ON jobs (lease_until_ms) WHERE status = 'leased';
CREATE INDEX jobs_requests ON jobs (lease_request) WHERE lease_request IS NOT NULL;
CREATE UNIQUE INDEX jobs_keys ON jobs (idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_unarchived ON jobs (seq) WHERE archived = 0 AND ended_ms IS NOT NULL;
"""


def test_a_file_of_the_first_version_is_brought_up_to_date(tmp_path):
    path = tmp_path / "queue.db"
    db = sqlite3.connect(path)
    db.executescript(f"{FIRST_SCHEMA} PRAGMA user_version = 1;")
    payloads = ['{"model": "llama3"}', '{"prompt": "x"}', '{"model": 7}', '{"model": "ended"}']
    for n, payload in enumerate(payloads, 1):
        db.execute("INSERT INTO jobs (seq, id, tool, lane, rank, enqueued_ms, max_attempts, status, ready) VALUES (?, ?, 'errand', 'errand', 1, ?, 3, ?, ?)",
                   (n, new_id(n), n, "queued" if n < 4 else "completed", n < 4))
        db.execute("INSERT INTO bodies (seq, payload) VALUES (?, ?)", (n, payload))
    db.commit()
    db.close()
    for _ in range(2):
        store = SQLiteStore(path)
        assert [place.model for place in store.run(lambda tx: tx.line("errand", 9))] == ["llama3", None, None]
        assert [job.payload_json for job in store.read(lambda r: r.listing(None, None, 9, None))] == payloads[::-1]
        assert store.read(lambda r: (r.pending(), r.webhooks_pending())) == (3, 0)
        store.close()
    store = SQLiteStore(path)
    [job] = put(store, a_job(9, webhook="http://h", model="m"))
    assert store.read(lambda r: r.get(job.id)) == job and job.seq == 5
    store.close()
    new, old = sqlite3.connect(":memory:"), sqlite3.connect(path)
    new.executescript(SCHEMA)
    columns = "SELECT name, type FROM pragma_table_info('jobs')"
    assert sorted(new.execute(columns)) == sorted(old.execute(columns))
    assert sorted(new.execute("SELECT name, tbl_name FROM sqlite_master")) == sorted(old.execute("SELECT name, tbl_name FROM sqlite_master"))
    old.close()


@pytest.mark.parametrize("name", ["queue.db", "deep/er/queue.db"])
def test_the_data_folder_is_made_or_refused(tmp_path, name):
    SQLiteStore(tmp_path / "new" / name).close()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InvalidSetting, match="cannot be made"):
        SQLiteStore(tmp_path / "file" / name)


# ---- on disk: a disk that fails


def test_a_full_disk_is_said_and_passes(disk):
    put(disk, a_job(1))
    pages = disk._committer.db.execute("PRAGMA page_count").fetchone()[0]
    disk._committer.db.execute(f"PRAGMA max_page_count = {pages}")
    big = replace(a_job(2), payload_json='{"n": 2, "x": "' + "x" * 200_000 + '"}')
    tickets = [Ticket() for _ in range(5)]
    with pause(disk):
        for n, ticket in enumerate(tickets):
            disk.post(lambda tx, n=n: tx.insert(copy.copy(big)) if n == 2 else change_in(tx, "detail", str(n)), ticket)
    for n, ticket in enumerate(tickets):
        if n == 2:
            with pytest.raises(Unavailable, match=r"cannot write: database or disk is full\. Free some disk space") as caught:
                ticket.wait(LONG_S)
            assert caught.value.retryable and caught.value.code == "storage_unavailable" and caught.value.status == 503
        else:
            ticket.wait(LONG_S)
    assert known(disk)[0] == known(disk)[1] == (1, {"errand": 1})
    disk._committer.db.execute("PRAGMA max_page_count = 1000000")
    put(disk, big)
    assert known(disk)[0] == known(disk)[1] == (2, {"errand": 2})


def change_in(tx, name, value):
    job = tx.heads("errand")[0]
    setattr(job, name, value)
    tx.update(job)


def test_a_disk_that_cannot_be_written_is_said_and_passes(disk):
    put(disk, a_job(1))
    disk._committer.db.execute("PRAGMA query_only = 1")
    for _ in range(3):
        with pytest.raises(Unavailable, match="cannot write: attempt to write a readonly database"):
            in_thread(lambda: put(disk, a_job(2)))
        assert disk.read(lambda r: r.pending()) == 1
    disk._committer.db.execute("PRAGMA query_only = 0")
    in_thread(lambda: put(disk, a_job(2)))
    assert known(disk)[0] == known(disk)[1] == (2, {"errand": 2})


class Broken:
    """A connection on which the statements that start with one of `verbs` fail."""

    def __init__(self, db, verbs):
        self._db, self.verbs = db, verbs

    def execute(self, sql, *args):
        if sql.lstrip().startswith(self.verbs):
            raise sqlite3.OperationalError("disk I/O error")
        return self._db.execute(sql, *args)

    def __getattr__(self, name):
        return getattr(self._db, name)


FAULTS = [("COMMIT",), ("BEGIN",), ("INSERT", "UPDATE"), ("SELECT",), ("COMMIT", "ROLLBACK"), ("COMMIT", "ROLLBACK", "SELECT"), ("",)]


@pytest.mark.parametrize("verbs", FAULTS, ids="+".join)
@pytest.mark.parametrize("where", ["thread", "loop"])
def test_a_disk_that_fails_is_said_and_passes(disk, verbs, where):
    """Whatever statement fails, and for however many ops: each gets its refusal, and the store works once the disk does."""
    put(disk, a_job(1))
    broken = disk._committer.db = Broken(disk._committer.db, ())
    results = []

    def outcomes(post):
        for broken.verbs in (verbs, ()) * 2:
            results.append([post(n) for n in range(3)])

    def insert(n):
        return lambda tx: tx.insert(a_job(n))

    def by_thread(n):
        try:
            return in_thread(lambda: disk.run(insert(n)))
        except Unavailable as e:
            return str(e)

    if where == "thread":
        outcomes(by_thread)
    else:
        with on_loop(disk) as post:
            outcomes(lambda n: post(insert(n)))
    said = "The job store cannot write: disk I/O error."
    assert results[0] == results[2] == [said] * 3 or verbs == ("SELECT",)
    assert results[1] == results[3] == [None] * 3
    believed, stored = known(disk)
    assert believed == stored and stored[0] == 1 + sum(r is None for rs in results for r in rs)


@contextmanager
def on_loop(store):
    """The store attached to a loop that runs in a thread; gives a function that posts an op there and waits for its outcome."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def attach():
        store.attach(loop)

    def post(op):
        ticket = Ticket()
        loop.call_soon_threadsafe(store.post, op, ticket)
        try:
            return ticket.wait(LONG_S)
        except Unavailable as e:
            assert "in time" not in str(e), "the store did not answer"
            return str(e)

    asyncio.run_coroutine_threadsafe(attach(), loop).result(LONG_S)
    try:
        yield post
        asyncio.run_coroutine_threadsafe(store.detach(), loop).result(LONG_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(LONG_S)
        loop.close()


LIMITED = """
    import resource, signal, sys
    from colab_gpu.errors import Unavailable
    from colab_gpu.jobs import Job, new_id
    from colab_gpu.store import SQLiteStore
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = SQLiteStore(sys.argv[1])
    def put(n): store.run(lambda tx: tx.insert(Job(new_id(n), "errand", '"' + "x" * 20_000 + '"')))
    for limit in (400_000, resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        for n in range(100):
            try: put(n)
            except Unavailable as e: print("refused", e, flush=True)
            else: print("stored", flush=True)
    print(store.read(lambda r: r.pending()), store.run(lambda tx: tx.pending()), flush=True)
    store.close()
"""


def test_a_file_that_may_not_grow(tmp_path):
    """A real limit of the operating system, in a process of its own."""
    lines = child(LIMITED, tmp_path / "queue.db").communicate(timeout=LONG_S)[0].splitlines()
    said, counts = lines[:-1], lines[-1].split()
    assert 1 < sum(line == "stored" for line in said[:100]) < 100
    assert {line for line in said[:100] if line != "stored"} <= {
        "refused The job store cannot write: disk I/O error.",
        "refused The job store cannot write: database or disk is full. Free some disk space, then try again."}
    assert said[100:] == ["stored"] * 100 and counts == [str(said.count("stored"))] * 2
    store = SQLiteStore(tmp_path / "queue.db")
    assert store.read(lambda r: r.pending()) == said.count("stored")
    store.close()


# ---- on a loop


def test_run_on_the_loop_is_refused_instead_of_waiting_for_itself(disk):
    async def body():
        disk.attach(asyncio.get_running_loop())
        with pytest.raises(RuntimeError, match="wait on the event loop for itself"):
            disk.run(lambda tx: None)
        await disk.detach()

    in_thread(lambda: asyncio.run(body()))


def test_threads_go_on_while_the_store_changes_hands(disk):
    """Every run is answered, whichever driver is at work."""
    stop, counted, errors = threading.Event(), count(), []

    def work():
        try:
            while not stop.is_set():
                put(disk, a_job(next(counted)))
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()

    async def body():
        for _ in range(60):
            disk.attach(asyncio.get_running_loop())
            for _ in range(3):
                ticket = Landing(asyncio.get_running_loop())
                disk.post(lambda tx: tx.insert(a_job(next(counted))), ticket)
                await asyncio.wait_for(ticket.done, LONG_S)
            await asyncio.wait_for(disk.detach(), LONG_S)
        await asyncio.sleep(0)

    in_thread(lambda: asyncio.run(body()))
    stop.set()
    for thread in threads:
        thread.join(LONG_S)
    assert not errors and not any(thread.is_alive() for thread in threads)
    assert known(disk)[0] == known(disk)[1] and disk.read(lambda r: r.pending()) == next(counted)


class Landing:
    """A ticket that a coroutine awaits."""

    def __init__(self, loop):
        self.done, self._loop = loop.create_future(), loop

    def land(self, result, error):
        self.done.set_result(result) if error is None else self.done.set_exception(error)


def test_on_a_loop_outcomes_come_in_order_and_after_their_commit(disk):
    async def body():
        loop = asyncio.get_running_loop()
        disk.attach(loop)
        seen = []

        def deliver(outcomes, changed):
            for job in changed:
                assert disk._read_db.execute("SELECT 1 FROM jobs WHERE id = ?", (job.id,)).fetchone(), "delivered before it was committed"
            for ticket, result, error in outcomes:
                seen.append(result)
                ticket.land(result, error)

        disk.deliver = deliver
        landings = [Landing(loop) for _ in range(1000)]
        for n, landing in enumerate(landings):
            disk.post((lambda tx, n=n: (tx.insert(a_job(n)), n)[1]) if n % 7 else (lambda tx, n=n: (tx.pending(), n)[1]), landing)
            if n % 90 == 0:
                await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(*(landing.done for landing in landings)), LONG_S)
        assert seen == list(range(1000))
        await disk.detach()

    in_thread(lambda: asyncio.run(body()))


def test_the_jobs_fields_are_all_kept():
    """A field that is added to `Job` must be stored, or the comparison of whole jobs above means little."""
    columns = {row[1] for row in _columns("jobs")} | {row[1] for row in _columns("bodies")}
    renamed = {"priority": "rank", "payload_json": "payload", "result_json": "result"}
    assert {renamed.get(f.name, f.name) for f in fields(Job)} <= columns


def _columns(table):
    db = sqlite3.connect(":memory:")
    db.executescript(SCHEMA)
    return db.execute(f"PRAGMA table_info({table})").fetchall()
