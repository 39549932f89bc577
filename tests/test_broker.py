"""The rules against a simple model, on every store: no job in two hands, none lost, no illegal move. Then those who wait."""

import asyncio
import json
import random
import sqlite3
import tempfile
import threading
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from colab_gpu import broker as rules
from colab_gpu.broker import Ask, Broker, Policy, ended_within, heartbeat, lease_within, reap_forever, standing, watch
from colab_gpu.errors import (ColabGPUError, Conflict, IdempotencyConflict, InvalidPayload, JobEnded, JobNotFound, JobNotInProgress, LeaseLost, QueueFull,
                              ResultConflict, Unavailable, Unprocessable)
from colab_gpu.jobs import ENDED, PRIORITIES, JobSpec
from colab_gpu.store import MemoryStore, SQLiteStore

MAKERS = {"memory": lambda folder: MemoryStore(), "sqlite": lambda folder: SQLiteStore(Path(folder) / "queue.db")}
LONG_S = 30  # only how long something broken may hang before a test says so
POLICY = Policy(lease_s=100, heartbeat_lease_s=10, max_pending=12, max_attempts=2, retry_s=4, retry_max_s=8)


# ---- the model: what we believe of each job, and what each verb should do to it


@dataclass
class Belief:
    """One job as it should be. `said` is what its lease has said, if it has spoken."""

    id: str
    tool: str
    payload: str
    priority: str
    tags: frozenset
    number: int
    enqueued: int
    max_attempts: int
    run_timeout: float | None
    overdue: int | None
    not_before: int | None
    ready: bool
    retry_of: str | None = None
    status: str = "queued"
    attempts: int = 0
    grants: int = 0
    token: str | None = None
    until: int | None = None
    lease_s: float = 0
    run_deadline: int | None = None
    request: tuple | None = None
    said: object = None
    cancel: bool = False
    result: object = None
    kind: str | None = None
    artifacts: frozenset = field(default_factory=frozenset)

    @property
    def ended(self): return self.status in ENDED
    @property
    def order(self): return (PRIORITIES[self.priority], self.number)
    @property
    def lane(self): return (self.tool, self.tags)


def claim(b, token):
    if not b.grants or (token is None and b.ended):
        raise JobNotInProgress
    if token != b.token:
        raise LeaseLost


def live_claim(b, token):
    claim(b, token)
    if b.ended:
        raise JobEnded
    if b.said is not None:
        raise LeaseLost


def end(b, status):
    b.status, b.ready, b.until = status, False, None


def put_back(b, said, now=None, wait_ms=0):
    "`wait_ms` is the shortest the back-off may be; the exact time is taken over from the code afterwards."
    b.status, b.said, b.until, b.ready = "queued", said, None, not wait_ms
    b.not_before = now + wait_ms if wait_ms else None


def renew(b, now):
    b.until = now + round(b.lease_s * 1000)
    if b.run_deadline is not None:
        b.until = min(b.until, b.run_deadline)


def said_before(b, words):
    if b.said == words:
        return True
    if b.ended or b.said is not None:
        raise ResultConflict
    return False


def finish(b, now, token, value, names):
    claim(b, token)
    words = ("completed", value, names)
    if said_before(b, words):
        return
    if not names <= b.artifacts:
        raise Unprocessable
    end(b, "completed")
    b.said, b.result, b.kind = words, value, None


def fail(b, now, token, detail, kind, retryable):
    claim(b, token)
    words = ("error", detail, kind, retryable)
    if said_before(b, words):
        return
    b.kind = kind
    again = kind in ("transient", "interrupted") if retryable is None else retryable
    if b.cancel and b.status == "leased":
        end(b, "canceled")
    elif again and b.attempts < b.max_attempts:
        put_back(b, words, now, round(min(POLICY.retry_max_s, POLICY.retry_s * 2 ** (b.attempts - 1)) * 500))
    else:
        end(b, "failed")
    b.said = words


def extend(b, now, token):
    live_claim(b, token)
    renew(b, now)
    if b.status == "queued":
        b.status, b.ready, b.kind = "leased", False, None


def hand_back(b):
    b.attempts -= 1
    if b.cancel and b.status == "leased":
        end(b, "canceled")
        b.said = "released"
    else:
        put_back(b, "released")


def release(b, now, token):
    claim(b, token)
    if b.said != "released":
        live_claim(b, token)
        hand_back(b)


def add_artifact(b, now, token, name, grant):
    live_claim(b, token)
    if grant != b.grants:
        raise LeaseLost
    b.artifacts |= {name}


def cancel(b, now):
    if b.ended or b.cancel:
        return
    b.cancel = True
    if b.status == "queued":
        end(b, "canceled")


def reap(b, now):
    if b.status == "leased" and b.until <= now:
        timed_out = b.run_deadline is not None and now >= b.run_deadline
        if b.cancel:
            return end(b, "canceled")
        b.kind = "timeout" if timed_out else "interrupted"
        return end(b, "failed") if timed_out or b.attempts >= b.max_attempts else put_back(b, None)
    if b.status == "queued" and b.overdue is not None and b.overdue <= now:
        b.kind = "timeout"
        return end(b, "failed")
    if b.status == "queued" and not b.ready and b.not_before <= now:
        b.ready = True
    return None


def choose(beliefs, ask, now):
    "The jobs a worker should get, in order: the first by priority and age, and its batch; `None` for an echo."
    request = None if ask.request is None else (ask.worker, ask.instance, ask.request)
    known = [b for b in beliefs if request is not None and b.request == request]
    held = [b for b in known if b.status == "leased"]
    if held:
        return held, True
    if any(b.said is not None for b in known):
        return None, False
    able = [b for b in beliefs if b.status == "queued" and b.ready and (ask.tools is None or b.tool in ask.tools) and b.tags <= ask.tags]
    if ask.standby_s is not None:
        able = [b for b in able if now - (b.not_before or b.enqueued) >= ask.standby_s * 1000]
    able.sort(key=lambda b: b.order)
    if not able or able[0].tool != "imagenGenerate":
        return able[:1], False
    first = able[0]

    def shape(b):
        payload = json.loads(b.payload)
        return {k: v for k, v in payload.items() if k not in ("prompt", "seed")}

    return [b for b in able if (b.lane, b.priority, shape(b)) == (first.lane, first.priority, shape(first))][:ask.most], False


# ---- random verbs at random times, in the code and in the model


PAYLOADS = ['{"prompt": "a", "width": 256}', '{"prompt": "b", "width": 256, "seed": 1}', '{"prompt": "c", "width": 512}']
SPECS = st.builds(JobSpec, tool=st.sampled_from(["imagenGenerate", "imagenGenerate", "chat"]), payload_json=st.sampled_from(PAYLOADS),
                  priority=st.sampled_from(["high", "normal", "normal", "low"]), max_attempts=st.sampled_from([None, None, 1, 3]),
                  queue_timeout_s=st.sampled_from([None, None, None, 7]), run_timeout_s=st.sampled_from([None, None, None, 15]),
                  requirements=st.sampled_from([(), (), ("big",)]))
ASKS = st.builds(Ask, worker=st.sampled_from(["a", "b", "a/b"]), instance=st.sampled_from([None, "i", "b/i"]), request=st.sampled_from([None, None, "r", "s"]),
                 tools=st.sampled_from([None, None, frozenset({"imagenGenerate"}), frozenset({"chat"})]), tags=st.sampled_from([frozenset(), frozenset({"big"})]),
                 fenced=st.sampled_from([True, True, True, False]), most=st.sampled_from([1, 1, 3]), standby_s=st.sampled_from([None, None, None, 5]))
SEEN = Counter()  # what happened, so that a machine that does nothing is noticed


class Rules(RuleBasedStateMachine):
    make_store = staticmethod(MemoryStore)

    @initialize()
    def begin(self):
        self.now, self.store, self.model, self.keys = 1_000_000, self.make_store(), {}, {}
        self.broker = Broker(self.store, POLICY, clock=lambda: self.now / 1000)
        self.tokens, self.first_end, self.snapshots = {}, {}, []

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()

    def granted(self):
        return [b for b in self.model.values() if b.grants]

    def some_job(self, data):
        "Mostly one that is leased; else one whose worker is late, one that was leased once, or any."
        leased = [b for b in self.model.values() if b.status == "leased"]
        late = [b for b in self.granted() if b.status == "queued" and b.said is None]
        choices = [leased, leased, leased, late, late, [b for b in self.granted() if not b.ended], self.granted(), list(self.model.values())]
        return data.draw(st.sampled_from(data.draw(st.sampled_from([c for c in choices if c]))), label="job")

    def some_token(self, data, b):
        "Mostly the right one; else an old one, somebody else's, none, or nonsense."
        others = [t for tokens in self.tokens.values() for t in tokens]
        wrong = st.sampled_from([None, "nonsense", *self.tokens.get(b.id, ()), *others[-2:]])
        return data.draw(wrong, label="token") if data.draw(st.sampled_from([False, False, False, True])) else b.token

    def both(self, b, verb, *args, code=None):
        """Let code and model do the same to the job `b`; they agree on what happens, or on who is refused.

        args: what both take. code: what the code takes, where that differs.
        """
        after, expected = replace(b), None
        try:
            verb(after, self.now, *args)
        except ColabGPUError as e:
            expected = type(e)
        before = self.broker.get(b.id)
        SEEN[verb.__name__, expected.__name__ if expected else f"{b.status} > {after.status}"] += 1
        try:
            job = self.broker.call(getattr(rules, verb.__name__), b.id, *(args if code is None else code))
        except ColabGPUError as e:
            assert type(e) is expected, f"{verb.__name__} on {b}: {e!r}, expected {expected}"
            assert self.broker.get(b.id) == before, "a refused write left a trace"
            return
        assert expected is None, f"{verb.__name__} on {b} went through, expected {expected}"
        if after.status == "queued" and not after.ready and after.not_before != b.not_before:
            assert after.not_before <= job.not_before_ms <= self.now + 2 * (after.not_before - self.now), "back-off with equal jitter"
            after.not_before = job.not_before_ms
        self.model[b.id] = after
        self.agree(after, job)

    @rule(specs=st.lists(SPECS, min_size=2, max_size=4))
    def submit_several(self, specs):
        for spec in specs:
            self.submit_one(spec, None, None)

    @rule(spec=SPECS, delay=st.sampled_from([None, None, 0, 5]), key=st.sampled_from([None, "k1", "k2"]))
    def submit(self, spec, delay, key):
        self.submit_one(spec, delay, key)

    def submit_one(self, spec, delay, key):
        spec = replace(spec, not_before_ms=None if delay is None else self.now + 1000 * delay)
        body, full = repr(replace(spec, not_before_ms=delay)), sum(b.status == "queued" for b in self.model.values()) >= POLICY.max_pending
        try:
            job = self.broker.call(rules.submit, spec, key, body)
        except QueueFull:
            assert full and key not in self.keys
        except IdempotencyConflict:
            assert self.keys[key][1] != body
        else:
            if key in self.keys:
                assert self.keys[key] == (job.id, body)
                return self.agree(self.model[job.id], job)
            assert not full and job.id not in self.model
            if key is not None:
                self.keys[key] = (job.id, body)
            self.enter(job, spec)
        return None

    def enter(self, job, spec):
        start = spec.not_before_ms
        overdue = None if spec.queue_timeout_s is None else max(self.now, start or 0) + round(spec.queue_timeout_s * 1000)
        self.model[job.id] = Belief(job.id, spec.tool, spec.payload_json, spec.priority, frozenset(spec.requirements), len(self.model), self.now,
                                    spec.max_attempts or POLICY.max_attempts, spec.run_timeout_s, overdue, start, start is None or start <= self.now,
                                    spec.retry_of)
        self.agree(self.model[job.id], job)

    @precondition(lambda self: self.model)
    @rule(fenced=st.sampled_from([True, True, False]))
    def lease_all(self, fenced):
        "What a busy evening looks like: everything that is ready is taken."
        while self.lease_one(Ask("able", tags=frozenset({"big"}), fenced=fenced, most=3)):
            pass

    @precondition(lambda self: self.model)
    @rule(ask=ASKS)
    def lease(self, ask):
        self.lease_one(ask)

    @precondition(lambda self: any(b.status == "leased" and b.request for b in self.model.values()))
    @rule(data=st.data(), tools=st.sampled_from([None, frozenset({"chat"})]))
    def ask_again(self, data, tools):
        worker, instance, request = data.draw(st.sampled_from([b.request for b in self.model.values() if b.status == "leased" and b.request]))
        self.lease_one(Ask(worker, instance, tools, request=request))

    @precondition(lambda self: any(b.said is not None and b.request for b in self.model.values()))
    @rule(data=st.data())
    def echo(self, data):
        worker, instance, request = data.draw(st.sampled_from([b.request for b in self.model.values() if b.said is not None and b.request]))
        self.lease_one(Ask(worker, instance, request=request))

    def lease_one(self, ask):
        wanted, again = choose(list(self.model.values()), ask, self.now)
        jobs = self.broker.call(rules.lease, ask)
        if wanted is None:
            SEEN["lease", "echo"] += 1
            assert jobs is None, "its grant has been used"
            return 0
        SEEN["lease", f"{len(jobs)}{' again' if again else ''}{' standby' if ask.standby_s else ''}"] += 1
        if again:
            assert {j.id for j in jobs} == {b.id for b in wanted}, "asked again, the same answer"
            for job in jobs:
                self.agree(self.model[job.id], job)
            return 0
        assert [j.id for j in jobs] == [b.id for b in wanted], "by priority, then age; with what can share the batch"
        for job, b in zip(jobs, wanted, strict=True):
            assert (job.lease_token is not None) == ask.fenced
            assert job.lease_token is None or all(job.lease_token not in tokens for tokens in self.tokens.values()), "each grant has a new token"
            if job.lease_token is not None:
                self.tokens.setdefault(b.id, []).append(job.lease_token)
            b.status, b.ready, b.not_before, b.said, b.artifacts = "leased", False, None, None, frozenset()
            b.attempts, b.grants, b.token = b.attempts + 1, b.grants + 1, job.lease_token
            b.request = None if ask.request is None else (ask.worker, ask.instance, ask.request)
            b.lease_s = POLICY.heartbeat_lease_s if ask.fenced else POLICY.lease_s
            b.run_deadline = None if b.run_timeout is None else self.now + round(b.run_timeout * 1000)
            renew(b, self.now)
            self.agree(b, job)
            self.snapshots.append(job)
        return len(jobs)

    @precondition(lambda self: any(b.grants for b in self.model.values()))
    @rule(data=st.data(), value=st.integers(0, 1), names=st.sampled_from([frozenset(), frozenset(), frozenset({"x"}), frozenset({"x", "y"})]))
    def finish(self, data, value, names):
        b = self.some_job(data)
        token = self.some_token(data, b)
        self.both(b, finish, token, value, names)

    @precondition(lambda self: any(b.grants for b in self.model.values()))
    @rule(data=st.data(), detail=st.sampled_from(["broken", "bent"]), kind=st.sampled_from([None, "transient", "transient", "oom", "interrupted"]),
          retryable=st.sampled_from([None, None, True, False]))
    def fail(self, data, detail, kind, retryable):
        b = self.some_job(data)
        self.both(b, fail, self.some_token(data, b), detail, kind, retryable)

    @precondition(lambda self: any(b.grants for b in self.model.values()))
    @rule(data=st.data())
    def extend(self, data):
        b = self.some_job(data)
        self.both(b, extend, self.some_token(data, b))

    @precondition(lambda self: any(b.grants for b in self.model.values()))
    @rule(data=st.data())
    def release(self, data):
        b = self.some_job(data)
        self.both(b, release, self.some_token(data, b))

    @precondition(lambda self: any(b.grants for b in self.model.values()))
    @rule(data=st.data(), name=st.sampled_from(["x", "y"]), behind=st.sampled_from([0, 0, 0, 1]))
    def add_artifact(self, data, name, behind):
        b = self.some_job(data)
        token, grant = self.some_token(data, b), b.grants - behind
        meta = {"name": name, "contentType": "text/plain", "bytes": 1, "sha256": "0", "grant": grant}
        self.both(b, add_artifact, token, name, grant, code=(token, meta))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def cancel(self, data):
        self.both(self.some_job(data), cancel)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def retry(self, data):
        b = self.some_job(data)
        full = sum(b.status == "queued" for b in self.model.values()) >= POLICY.max_pending
        try:
            job = self.broker.call(rules.retry, b.id)
        except QueueFull:
            assert full
        except Conflict:
            assert b.status not in ("failed", "canceled")
        else:
            assert b.status in ("failed", "canceled") and not full and job.id not in self.model
            self.enter(job, JobSpec(b.tool, b.payload, b.priority, b.max_attempts, None, b.run_timeout, None, tuple(b.tags), retry_of=b.id))

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def undo_a_grant(self, data):
        "What happens to a grant whose worker went away before it heard of it, at once or late."
        granted = data.draw(st.sampled_from(self.snapshots[-3:]))
        self.store.run(lambda tx: rules._ungrant(tx, rules.At(self.now, POLICY), granted))
        b = self.model[granted.id]
        if b.status == "leased" and b.grants == granted.grants:
            b.request = None
            hand_back(b)

    @rule(seconds=st.sampled_from([0, 1, 3, 6, 11, 101]))
    def time_passes(self, seconds):
        self.now += seconds * 1000

    @rule(seconds=st.sampled_from([0, 4, 11]))
    def reap(self, seconds):
        self.now += seconds * 1000
        for _ in range(3):  # a lease that ran out puts back a job whose queue time-out may have passed meanwhile: that is the next turn's
            self.broker.call(rules.reap)
            for b in self.model.values():
                was = b.status
                reap(b, self.now)
                if was != b.status:
                    SEEN["reap", f"{was} > {b.status}"] += 1
        due = self.broker.read(lambda r: r.next_due_ms())
        assert due is None or due > self.now, "nothing is due any more"

    # what must always hold

    def agree(self, b, job):
        got = (job.status, job.ready, job.attempts, job.grants, job.lease_token, job.lease_until_ms, job.not_before_ms, job.cancel_requested, job.result,
               job.error_kind, {a["name"] for a in job.artifacts}, job.retry_of, job.seq)
        want = (b.status, b.ready, b.attempts, b.grants, b.token, b.until, b.not_before, b.cancel, b.result, b.kind, b.artifacts, b.retry_of, b.number + 1)
        assert got == want

    @invariant()
    def the_store_is_what_the_model_says(self):
        lanes = {}
        for b in getattr(self, "model", {}).values():
            job = self.broker.get(b.id)
            self.agree(b, job)
            if b.status == "queued" and b.ready:
                lanes[job.lane] = lanes.get(job.lane, 0) + 1
        if hasattr(self, "model"):
            counts = sum(b.status == "queued" for b in self.model.values()), lanes
            assert self.store.read(lambda r: (r.pending(), dict(r.lanes()))) == counts == self.store.run(lambda tx: (tx.pending(), dict(tx.lanes())))

    @invariant()
    def none_is_lost(self):
        for job_id in getattr(self, "model", ()):
            job = self.broker.get(job_id)
            assert 0 <= job.attempts <= job.max_attempts and job.attempts <= job.grants
            if job.status == "queued":
                assert not job.cancel_requested and (job.ready or job.not_before_ms is not None), "a queued job that nothing will ever wake"
            elif job.status == "leased":
                assert job.lease_until_ms is not None and not job.ready
            else:
                assert job.ended_ms is not None and job.lease_until_ms is None and not job.ready

    @invariant()
    def none_is_in_two_hands(self):
        for job_id, tokens in getattr(self, "tokens", {}).items():
            good = [t for t in tokens if self.speaks(job_id, t)]
            assert good == [] or good == [tokens[-1]], "only the last grant's token may speak"

    def speaks(self, job_id, token):
        try:
            self.broker.call(rules.check_claim, job_id, token)
        except ColabGPUError:
            return False
        return True

    @invariant()
    def what_ended_stays_ended(self):
        for job_id in getattr(self, "model", ()):
            job = self.broker.get(job_id)
            if job.ended:
                assert self.first_end.setdefault(job_id, job) == job, "the first result stays"
            else:
                assert job_id not in self.first_end


@pytest.mark.parametrize(("name", "examples"), [("memory", 100), ("sqlite", 40)])
def test_the_rules_do_what_the_model_says(name, examples):
    folders = []

    class Machine(Rules):
        def make_store(self):
            folders.append(tempfile.TemporaryDirectory())
            return MAKERS[name](folders[-1].name)

    run_state_machine_as_test(Machine, settings=settings(
        max_examples=examples, stateful_step_count=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)))
    for folder in folders:
        folder.cleanup()
    wanted = {("finish", "leased > completed"), ("fail", "leased > queued"), ("release", "leased > queued"), ("reap", "leased > queued"), ("finish", "ResultConflict"),
              ("extend", "leased > leased"), ("cancel", "queued > canceled"), ("lease", "1"), ("lease", "echo"), ("extend", "JobEnded")}
    assert wanted <= SEEN.keys(), "the machine hardly did anything"


# ---- rules that the machine does not reach


@pytest.fixture(params=MAKERS)
def store(request, tmp_path):
    made = MAKERS[request.param](tmp_path)
    yield made
    made.close()


def test_what_is_not_there_is_not_found(store):
    broker = Broker(store)
    for verb, args in ((rules.finish, ("t", {})), (rules.fail, ("t", "x")), (rules.extend, ("t",)), (rules.release, ("t",)), (rules.cancel, ()),
                       (rules.retry, ()), (rules.check_claim, ("t",)), (rules.add_artifact, ("t", {"name": "x", "grant": 0}))):
        with pytest.raises(JobNotFound):
            broker.call(verb, "no such job", *args)


class Clock:
    """Seconds that pass when told."""

    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


@pytest.mark.parametrize("result", [float("nan"), {"x": [float("inf")]}])
def test_a_result_that_is_not_plain_json_is_refused_and_the_job_goes_on(store, result):
    broker = Broker(store)
    broker.call(rules.submit, JobSpec("errand"))
    [job] = broker.call(rules.lease, Ask("w"))
    with pytest.raises(InvalidPayload, match="`result` must be plain JSON") as caught:
        broker.call(rules.finish, job.id, job.lease_token, result)
    assert caught.value.field == "result"
    assert broker.get(job.id) == job
    assert broker.call(rules.finish, job.id, job.lease_token, {"text": "ü \U0001f600"}).status == "completed"
    assert broker.get(job.id).result == {"text": "ü \U0001f600"}


def test_a_kind_of_error_that_we_do_not_know_is_refused(store):
    broker = Broker(store)
    broker.call(rules.submit, JobSpec("errand"))
    [job] = broker.call(rules.lease, Ask("w"))
    for kind in ("boredom", "", ["oom"], {"a": 1}, 7):
        with pytest.raises(InvalidPayload, match="`kind` must be one of"):
            broker.call(rules.fail, job.id, job.lease_token, "x", kind)


def test_sixty_four_artifacts_and_no_more(store):
    broker = Broker(store)
    broker.call(rules.submit, JobSpec("errand"))
    [job] = broker.call(rules.lease, Ask("w"))
    meta = {"contentType": "text/plain", "bytes": 1, "sha256": "0", "grant": 1}
    for n in [*range(64), 0, 1]:
        job = broker.call(rules.add_artifact, job.id, job.lease_token, {"name": str(n), **meta})
    assert len(job.artifacts) == 64
    with pytest.raises(InvalidPayload, match="64 artifacts"):
        broker.call(rules.add_artifact, job.id, job.lease_token, {"name": "one more", **meta})
    assert broker.get(job.id) == job


def test_reaping_is_bounded_and_goes_on(store):
    clock = Clock()
    broker = Broker(store, Policy(max_pending=1000), clock)
    for _ in range(25):
        broker.call(rules.submit, JobSpec("errand", queue_timeout_s=1))
    clock.now += 2
    assert [broker.call(rules.reap, 10) for _ in range(4)] == [10, 10, 5, 0]
    assert broker.read(lambda r: r.counts()) == {"failed": 25}


def test_two_workers_whose_names_run_together_do_not_share_a_lease(store):
    broker = Broker(store)
    broker.call(rules.submit, JobSpec("errand"))
    assert broker.call(rules.lease, Ask("a", "b/c", request="r"))
    assert broker.call(rules.lease, Ask("a/b", "c", request="r")) == [] == broker.call(rules.lease, Ask("a", "b", request="c/r"))
    assert broker.call(rules.lease, Ask("a", None, request="r")) == [] == broker.call(rules.lease, Ask("a", "None", request="r"))


def test_an_echo_of_a_used_question_takes_no_job(store):
    broker, ask, again = Broker(store), Ask("a", "i", request="r"), Ask("a", "i", request="s")
    first, second = (broker.call(rules.submit, JobSpec("errand")) for _ in "ab")
    [job] = broker.call(rules.lease, ask)
    broker.call(rules.finish, job.id, job.lease_token, {})
    assert broker.call(rules.lease, ask) is None and broker.get(second.id).attempts == 0
    assert [j.id for j in broker.call(rules.lease, again)] == [second.id] != [first.id]


def test_a_question_whose_grant_ran_out_unheard_is_no_echo(store):
    clock = Clock()
    broker, ask = Broker(store, clock=clock), Ask("a", "i", request="r")
    job = broker.call(rules.submit, JobSpec("errand"))
    broker.call(rules.lease, ask)
    clock.now += 61
    broker.call(rules.reap)
    assert [j.id for j in broker.call(rules.lease, ask)] == [job.id] and broker.get(job.id).attempts == 2


def test_a_question_whose_grant_was_taken_back_unheard_is_no_echo(store):
    broker, ask = Broker(store), Ask("a", "i", request="r")
    job = broker.call(rules.submit, JobSpec("errand"))
    granted = broker.call(rules.lease, ask)
    rules._give_back(broker, granted)
    assert [j.id for j in broker.call(rules.lease, ask)] == [job.id] and broker.get(job.id).attempts == 1


def test_a_standby_finds_the_old_job_behind_the_new_one(store):
    clock = Clock()
    broker = Broker(store, clock=clock)
    old = broker.call(rules.submit, JobSpec("errand", priority="low"))
    clock.now += 30
    broker.call(rules.submit, JobSpec("errand", priority="high"))
    assert [j.id for j in broker.call(rules.lease, Ask("spare", standby_s=20))] == [old.id]


# ---- those who wait: on a loop, without looking at a clock


def live(store, main, clock=None, **policy):
    """Run `main(broker)` on a loop."""
    async def body():
        broker = Broker(store, Policy(max_pending=100_000, **policy), **({"clock": clock} if clock else {}))
        broker.bind()
        calls, plain = Counter(), broker.acall

        async def counted(rule, *args, **options):
            calls["made", rule] += 1
            calls["open"] += 1
            try:
                return await plain(rule, *args, **options)
            finally:
                calls["open"] -= 1

        broker.acall, broker.calls = counted, calls
        try:
            return await asyncio.wait_for(main(broker), 2 * LONG_S)
        finally:
            await broker.unbind()

    return asyncio.run(body())


async def settle(broker):
    """Return once nothing moves: every rule has been answered, and nobody has anything to do."""
    quiet = 0
    while quiet < 30:
        busy = broker.calls["open"] or getattr(getattr(broker.store, "_driver", None), "busy", False)
        quiet = 0 if busy else quiet + 1
        await asyncio.sleep(0.0005 if busy else 0)


async def waiting(broker, *asks, wait_s=600):
    """Workers that have looked, found nothing, and wait, in this order."""
    tasks = []
    for ask in asks:
        tasks.append(asyncio.create_task(lease_within(broker, ask, wait_s)))
        await settle(broker)
    assert len(broker.waiters) == len(tasks)
    return tasks


async def gone(*tasks):
    for task in tasks:
        task.cancel()
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_two_hundred_workers_and_two_hundred_jobs(store):
    async def main(broker):
        tasks = [asyncio.create_task(lease_within(broker, Ask(f"w{i}", f"i{i}"), 600)) for i in range(200)]
        await settle(broker)
        made = await asyncio.gather(*(broker.acall(rules.submit, JobSpec("errand")) for _ in range(200)))
        got = [job.id for jobs in await asyncio.gather(*tasks) for job in jobs]
        assert sorted(got) == sorted(job.id for job in made), "each job in exactly one hand"
        assert len(broker.waiters) == 0 and broker.waiters._buckets == {}
        assert all(len(w.jobs) == 1 and not w.waiting for w in broker.roster.workers.values())

    live(store, main)


def test_workers_that_come_while_jobs_come(store):
    """No waiting is arranged: whoever is first, all are served exactly once."""
    async def main(broker):
        chance, made, tasks = random.Random(3), [], []
        for _ in range(400):
            if len(tasks) < 200 and (len(made) >= 200 or chance.random() < 0.5):
                tasks.append(asyncio.create_task(lease_within(broker, Ask(f"w{len(tasks)}"), 600)))
            else:
                made.append(asyncio.create_task(broker.acall(rules.submit, JobSpec("errand"))))
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
        got = [job.id for jobs in await asyncio.gather(*tasks) for job in jobs]
        assert sorted(got) == sorted(job.id for job in await asyncio.gather(*made))

    live(store, main)


def test_one_job_wakes_one_worker_the_one_that_waited_longest(store):
    async def main(broker):
        tasks = await waiting(broker, *(Ask(f"w{i}", f"i{i}") for i in range(20)))
        asked = broker.calls["made", rules.lease]
        for turn in range(3):
            await broker.acall(rules.submit, JobSpec("errand"))
            await settle(broker)
            assert [task.done() for task in tasks] == [True] * (turn + 1) + [False] * (19 - turn)
            assert broker.calls["made", rules.lease] == asked + turn + 1, "only the one that was woken asked again"
        await gone(*tasks)

    live(store, main)


def test_no_wake_up_is_lost_between_looking_and_waiting(store):
    async def main(broker):
        for n in range(120):
            lease = asyncio.create_task(lease_within(broker, Ask("w", "i"), 600))
            for _ in range(n % 12):
                await asyncio.sleep(0)
            submit = asyncio.create_task(broker.acall(rules.submit, JobSpec("errand")))
            [job] = await lease
            assert job.id == (await submit).id

    live(store, main)


def test_a_woken_worker_that_is_canceled_passes_the_job_on(store):
    async def main(broker):
        first, second = await waiting(broker, Ask("first"), Ask("second"))
        job = await broker.acall(rules.submit, JobSpec("errand"))
        assert len(broker.waiters) == 1 and not first.done(), "the first has been woken, and has not looked yet"
        first.cancel()
        await settle(broker)
        assert second.done() and [j.id for j in second.result()] == [job.id] and first.cancelled()

    live(store, main)


def test_a_woken_worker_that_should_drain_passes_the_job_on(store):
    async def main(broker):
        first, second = await waiting(broker, Ask("first"), Ask("second"))
        job = await broker.acall(rules.submit, JobSpec("errand"))
        broker.roster.workers["first"].draining = True
        await settle(broker)
        assert first.result() == [] and [j.id for j in second.result()] == [job.id]

    live(store, main)


def test_a_woken_worker_that_meets_a_full_disk_passes_the_job_on(store):
    async def main(broker):
        plain, refused = broker.acall, []
        first, second = await waiting(broker, Ask("first"), Ask("second"))

        async def full_once(rule, *args, **options):
            if rule is rules.lease and not refused:
                refused.append(args)
                raise Unavailable("The disk is full.")
            return await plain(rule, *args, **options)

        broker.acall = full_once
        job = await plain(rules.submit, JobSpec("errand"))
        await settle(broker)
        assert isinstance(first.exception(), Unavailable) and [j.id for j in second.result()] == [job.id]

    live(store, main)


def test_a_worker_that_took_another_job_passes_its_wake_up_on(store):
    """Woken for a picture, it finds a chat of higher priority; the picture must not lie there while a painter waits."""
    async def main(broker):
        both, painter = await waiting(broker, Ask("both"), Ask("painter", tools=frozenset({"draw"})))
        draw, chat = await asyncio.gather(broker.acall(rules.submit, JobSpec("draw")), broker.acall(rules.submit, JobSpec("chat", priority="high")))
        await settle(broker)
        assert [j.id for j in both.result()] == [chat.id] and painter.done() and [j.id for j in painter.result()] == [draw.id]

    live(store, main)


def test_a_job_that_outlasts_a_session_goes_to_a_longer_one(store):
    async def main(broker):
        broker.pace["errand"] = 100
        short, shorter, long, plain = tasks = await waiting(broker, *(Ask(f"w{n}", session_left_s=s) for n, s in enumerate((10, 5, 1000, None))))
        await broker.acall(rules.submit, JobSpec("errand"))
        await settle(broker)
        assert [t.done() for t in tasks] == [False, False, True, False] and long.result()
        await broker.acall(rules.submit, JobSpec("errand"))
        await settle(broker)
        assert [t.done() for t in tasks] == [False, False, True, True] and plain.result()
        await broker.acall(rules.submit, JobSpec("quick"))
        await settle(broker)
        assert short.result()[0].tool == "quick" and not shorter.done()
        await gone(shorter)

    live(store, main)


LANES = [("draw", ()), ("chat", ()), ("draw", ("big",)), ("slow", ())]
ABLE = [Ask("x"), Ask("x", tools=frozenset({"draw"})), Ask("x", tools=frozenset({"chat", "slow"})), Ask("x", tags=frozenset({"big"})),
        Ask("x", tools=frozenset({"draw"}), tags=frozenset({"big"}), most=4), Ask("x", session_left_s=10)]
LIVES = st.lists(st.tuples(st.sampled_from(["wait", "wait", "submit", "submit", "submit", "cancel worker", "cancel worker", "drain", "give back", "cancel job"]),
                           st.integers(0, 11), st.integers(0, 4)), max_size=40)


@pytest.mark.parametrize("name", MAKERS)
def test_whatever_happens_no_worker_sleeps_beside_a_job_it_could_take(name, tmp_path_factory):
    """Random arrivals, departures and interleavings; when all is quiet, nobody who waits could take anything that is ready."""
    @settings(max_examples=60 if name == "memory" else 30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(LIVES)
    def check(steps):
        store = MAKERS[name](tmp_path_factory.mktemp("s"))
        live(store, lambda broker: quiet_in_the_end(broker, steps))
        store.close()

    check()


async def quiet_in_the_end(broker, steps):
    broker.pace["slow"] = 100
    tasks, granted = {}, []
    for at, (verb, n, ticks) in enumerate(steps):
        tool, tags = LANES[n % len(LANES)]
        if verb == "wait":
            ask = replace(ABLE[n % len(ABLE)], worker=f"w{at}", instance=f"i{at}")
            tasks[ask] = asyncio.create_task(lease_within(broker, ask, 600))
        elif verb == "submit":
            asyncio.create_task(broker.acall(rules.submit, JobSpec(tool, "{}", ("normal", "high")[n % 2], requirements=tags)))  # noqa: RUF006
        elif verb == "cancel worker" and tasks:
            list(tasks.values())[n % len(tasks)].cancel()
        elif verb == "drain" and tasks and n < 3:
            ask = list(tasks)[n % len(tasks)]
            if ask.instance in broker.roster.workers:
                broker.roster.workers[ask.instance].draining = True
        elif verb == "give back":
            granted = [j for t in tasks.values() if t.done() and not t.cancelled() for j in t.result() if broker.get(j.id).status == "leased"]
            if granted:
                asyncio.create_task(broker.acall(rules.release, granted[n % len(granted)].id, granted[n % len(granted)].lease_token))  # noqa: RUF006
        elif verb == "cancel job":
            jobs = broker.read(lambda r: r.listing(None, None, 1, None))
            if jobs:
                asyncio.create_task(broker.acall(rules.cancel, jobs[0].id))  # noqa: RUF006
        for _ in range(ticks):
            await asyncio.sleep(0)
    await settle(broker)
    asleep = [ask for ask, task in tasks.items() if not task.done() and not broker.roster.workers[ask.instance].draining]
    for name in broker.read(lambda r: dict(r.lanes())):
        able = [ask for ask in asleep if ask.serves(name) and not (name == "slow" and ask.session_left_s == 10)]
        assert not able, f"a job of {name!r} is ready, and {able[0]} sleeps"
    held = Counter(j.id for t in tasks.values() if t.done() and not t.cancelled() for j in t.result())
    for job in broker.read(lambda r: r.listing("leased", None, 1000, None)):
        assert held[job.id], "a job is leased to somebody who went away"
    assert len(broker.waiters) == sum(not t.done() for t in tasks.values())
    await gone(*tasks.values())
    assert len(broker.waiters) == 0 and all(w.waiting == 0 for w in broker.roster.workers.values())


def test_a_worker_that_went_away_gives_its_grant_back(store):
    """However far the grant had come when the worker went."""
    async def main(broker):
        for ticks in range(40):
            job = await broker.acall(rules.submit, JobSpec("errand"))
            lease = asyncio.create_task(lease_within(broker, Ask("gone"), 600))
            for _ in range(ticks):
                await asyncio.sleep(0)
            lease.cancel()
            [outcome] = await asyncio.gather(lease, return_exceptions=True)
            if isinstance(outcome, list):  # it had its answer before it was canceled
                await broker.acall(rules.release, job.id, outcome[0].lease_token)
            [again] = await lease_within(broker, Ask("here"), 600)
            assert again.id == job.id and again.attempts == 1, "the attempt of the one that went away is not spent"
            await broker.acall(rules.finish, job.id, again.lease_token, {})

    live(store, main)


def test_a_grant_that_landed_is_undone_if_its_worker_was_canceled_in_that_very_moment(store):
    async def main(broker):
        job, tasks = await broker.acall(rules.submit, JobSpec("errand")), []

        async def just_before():
            await broker.acall(lambda tx, at: None)  # posted first: it lands first, in the same delivery
            tasks[1].cancel()

        tasks += [asyncio.create_task(just_before()), asyncio.create_task(lease_within(broker, Ask("gone")))]
        outcome = (await asyncio.gather(*tasks, return_exceptions=True))[1]
        await settle(broker)
        if isinstance(outcome, asyncio.CancelledError):
            assert (broker.get(job.id).status, broker.get(job.id).attempts) == ("queued", 0)
        else:
            assert isinstance(broker.store, MemoryStore), "in memory the answer is there before anybody can be canceled"

    live(store, main)


def test_a_grant_that_is_undone_does_not_undo_a_cancel(tmp_path):
    async def main(broker):
        job = await broker.acall(rules.submit, JobSpec("errand"))
        lease = asyncio.create_task(lease_within(broker, Ask("gone")))
        cancel = asyncio.create_task(broker.acall(rules.cancel, job.id))
        await asyncio.sleep(0)
        lease.cancel()
        await asyncio.gather(lease, cancel, return_exceptions=True)
        await settle(broker)
        assert lease.cancelled() and broker.get(job.id).status == "canceled"

    store = MAKERS["sqlite"](tmp_path)
    live(store, main)
    store.close()


def test_workers_of_other_tools_are_left_alone_and_closing_answers_everybody(store):
    async def main(broker):
        chat, draw = await waiting(broker, Ask("c", tools=frozenset({"chat"})), Ask("d", tools=frozenset({"draw"})))
        job = await broker.acall(rules.submit, JobSpec("draw"))
        assert (await draw)[0].tool == "draw" and not chat.done()
        seen = []

        async def follow():
            seen.extend([kind async for _, kind, _ in watch(broker, job.id)])

        ending, follower = asyncio.create_task(ended_within(broker, job.id, 600)), asyncio.create_task(follow())
        await settle(broker)
        broker.close_waiting()
        await asyncio.gather(follower, ending)
        assert await chat == [] and ending.result().status == "leased" and seen == ["state"]
        assert await lease_within(broker, Ask("late"), 600) == [], "who comes while the server closes is answered at once"
        assert (await ended_within(broker, job.id, 600)).status == "leased"
        assert broker._enders == {} and len(broker.waiters) == 0

    live(store, main)


def test_who_waits_too_long_is_answered(store):
    """The clock is ours, and far beyond every deadline: that is found out after the first look."""
    clock = Clock()

    async def main(broker):
        plain = broker.acall

        async def slow(*args, **options):
            clock.now += 100
            return await plain(*args, **options)

        broker.acall = slow
        assert await lease_within(broker, Ask("w"), 50) == [] == await lease_within(broker, Ask("w"), 0)
        job = await plain(rules.submit, JobSpec("errand"))
        assert (await ended_within(broker, job.id, 0)).status == "queued" == (await ended_within(broker, job.id, 0.001)).status
        assert len(broker.waiters) == 0 and broker._enders == {}

    live(store, main, clock)


def test_a_standby_takes_what_waited_only_where_no_regular_worker_is(store):
    clock = Clock()

    async def main(broker):
        spare = Ask("spare", standby_s=20)
        await broker.acall(rules.submit, JobSpec("errand"))
        assert await lease_within(broker, spare) == []
        clock.now += 19.9
        assert await lease_within(broker, spare) == []
        regular = replace(Ask("regular"), tools=frozenset({"errand"}))
        broker.roster.meet(regular, broker.now_ms())
        clock.now += 19.9
        assert await lease_within(broker, spare) == [], "the regular worker was here just now"
        broker.roster.workers["regular"].draining = True
        [job] = await lease_within(broker, spare)
        assert job.tool == "errand"
        await broker.acall(rules.release, job.id, job.lease_token)
        broker.roster.workers["regular"].draining = False
        assert await lease_within(broker, spare) == []
        clock.now += 0.2
        assert len(await lease_within(broker, spare)) == 1, "it was not here for as long as a standby waits"

    live(store, main, clock)


def test_how_long_a_regular_worker_is_waited_for(store):
    clock = Clock()

    async def main(broker):
        await broker.acall(rules.submit, JobSpec("errand"))
        clock.now += 1000
        broker.roster.meet(Ask("regular"), broker.now_ms())
        clock.now += 14.9
        assert await lease_within(broker, Ask("hasty", standby_s=0)) == [], "one that asks every five seconds counts, however hasty the standby"
        clock.now += 0.2
        assert await lease_within(broker, Ask("patient", standby_s=20)) == []
        clock.now += 74.8
        assert await lease_within(broker, Ask("very patient", standby_s=900)) == []
        clock.now += 0.2
        assert len(await lease_within(broker, Ask("very patient", standby_s=900))) == 1

    live(store, main, clock)

    live(store, main, clock)


def test_a_job_from_a_thread_wakes_a_worker_on_the_loop(store):
    async def main(broker):
        [task] = await waiting(broker, Ask("w"))
        job = await asyncio.to_thread(broker.call, rules.submit, JobSpec("errand"))
        assert [j.id for j in await task] == [job.id]

    live(store, main)


# ---- the end of a job


def test_ended_within_tells_everybody_and_forgets_them(store):
    async def main(broker):
        job = await broker.acall(rules.submit, JobSpec("errand"))
        tasks = [asyncio.create_task(ended_within(broker, job.id, 600)) for _ in range(50)]
        await settle(broker)
        await gone(*tasks[:10])
        assert not any(task.done() for task in tasks[10:]) and len(broker._enders[job.id]) == 40
        await broker.acall(rules.cancel, job.id)
        assert {(await task).status for task in tasks[10:]} == {"canceled"} and broker._enders == {}
        assert (await ended_within(broker, job.id, 600)).status == "canceled"
        with pytest.raises(JobNotFound):
            await ended_within(broker, "no such job", 600)
        assert broker._enders == {}

    live(store, main)


def test_the_end_is_never_missed_between_looking_and_waiting(store):
    async def main(broker):
        for n in range(60):
            job = await broker.acall(rules.submit, JobSpec("errand"))
            cancel = asyncio.create_task(broker.acall(rules.cancel, job.id))
            for _ in range(n % 10):
                await asyncio.sleep(0)
            assert (await ended_within(broker, job.id, 600)).status == "canceled"
            await cancel

    live(store, main)


def test_a_listener_that_raises_harms_nobody(store, caplog):
    async def main(broker):
        broker.on_end = lambda job: 1 / 0
        jobs = await asyncio.gather(*(broker.acall(rules.submit, JobSpec("errand")) for _ in range(3)))
        tasks = [asyncio.create_task(ended_within(broker, job.id, 600)) for job in jobs]
        await asyncio.gather(*(broker.acall(rules.cancel, job.id) for job in jobs))
        assert {(await task).status for task in tasks} == {"canceled"} and broker.stats["canceled"] == 3

    live(store, main)
    assert caplog.text.count("on_end failed") == 3


def test_the_reaper_outlives_a_full_disk(store, caplog):
    clock = Clock()

    async def main(broker):
        job = await broker.acall(rules.submit, JobSpec("errand", queue_timeout_s=1))
        plain, turns = broker.acall, []

        async def full_twice(rule, *args, **options):
            turns.append(rule)
            if len(turns) < 3:
                raise Unavailable("The disk is full.")
            return await plain(rule, *args, **options)

        broker.acall = full_twice
        clock.now += 2
        reaper = asyncio.create_task(reap_forever(broker, 0))
        ended = await ended_within(broker, job.id, 600)
        assert ended.status == "failed" and not reaper.done()
        await gone(reaper)

    live(store, main, clock)
    assert "The disk is full." in caplog.text


# ---- what happens during a run


async def a_run(broker, ask=Ask("w", "w")):
    await broker.acall(rules.submit, JobSpec("errand"))
    [job] = await lease_within(broker, ask)
    return job


async def say(broker, job, *seqs, kind="token"):
    return await heartbeat(broker, job.id, job.lease_token, [{"seq": n, "type": kind, "n": n} for n in seqs])


async def told(broker, job, after=None, kinds=("token", "gap", "done")):
    """What a watcher is told until the end, as numbers and kinds."""
    return [json.loads(data).get("n", kind) async for _, kind, data in watch(broker, job.id, after) if kind in kinds]


def test_a_run_as_its_watchers_see_it(store):
    async def main(broker):
        job = await a_run(broker)
        watchers = [asyncio.create_task(told(broker, job, kinds=("state", "token", "gap", "done"))) for _ in range(3)]
        await settle(broker)
        assert (await say(broker, job, 1, 2)).watchers == 3
        assert (await say(broker, job, 2, 3)).cancel_requested is False
        await broker.acall(rules.cancel, job.id)
        assert (await say(broker, job)).cancel_requested is True
        await broker.acall(rules.finish, job.id, job.lease_token, {})
        for watcher in watchers:
            assert await watcher == ["state", 1, 2, 3, "state", "state", "done"], "a repeated event is shown once"
        assert broker.channels[job.id].watchers == set()
        with pytest.raises(JobEnded):
            await say(broker, job, 9)
        assert await told(broker, job) == [1, 2, 3, "done"]

    live(store, main)


def test_what_is_said_while_a_watcher_is_slow_reaches_it(store):
    async def main(broker):
        job = await a_run(broker)
        await say(broker, job, 0)
        seen = []
        async for _, kind, data in watch(broker, job.id):
            if kind in ("token", "gap"):
                seen.append(json.loads(data).get("n", kind))
                if len(seen) < 6:
                    await say(broker, job, len(seen))  # the watcher is between two events here
                if len(seen) == 6:
                    await say(broker, job, 6, 7)
                    await broker.acall(rules.finish, job.id, job.lease_token, {})
        assert seen == list(range(8))

    live(store, main)


@pytest.mark.parametrize("name", MAKERS)
def test_every_watcher_gets_every_word_in_order(name, tmp_path_factory):
    """Random bursts, pauses, reconnections; each watcher hears all of it once."""
    @settings(max_examples=40 if name == "memory" else 15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=12), st.lists(st.integers(1, 9), max_size=6), st.integers(0, 6))
    def check(bursts, breaks, pause):
        async def main(broker):
            job, number = await a_run(broker), 0
            watchers = [asyncio.create_task(faithful(broker, job, breaks, pause * slow)) for slow in (0, 1)]
            for size, ticks in bursts:
                await say(broker, job, *range(number, number + size))
                number += size
                for _ in range(ticks):
                    await asyncio.sleep(0)
            await broker.acall(rules.finish, job.id, job.lease_token, {})
            for watcher in watchers:
                assert await watcher == list(range(number))

        store = MAKERS[name](tmp_path_factory.mktemp("s"))
        live(store, main)
        store.close()

    check()


async def faithful(broker, job, breaks, pause):
    "A watcher that loses its connection after as many events as `breaks` says, and comes back with the last id."
    seen, last, breaks, done = [], None, list(breaks), False
    while not done:
        left, stream = breaks.pop() if breaks else 10**9, watch(broker, job.id, last)
        async for event_id, kind, data in stream:
            assert kind != "gap", "nothing was forgotten"
            last, left, done = event_id or last, left - 1, kind == "done"
            if kind == "token":
                seen.append(json.loads(data)["n"])
            for _ in range(pause):
                await asyncio.sleep(0)
            if not left:
                break
        await stream.aclose()
    return seen


def test_going_on_from_each_event(store):
    async def main(broker):
        job = await a_run(broker)
        await say(broker, job, *range(5))
        await broker.acall(rules.finish, job.id, job.lease_token, {})
        ids = [(event_id, kind) async for event_id, kind, _ in watch(broker, job.id) if event_id]
        assert [kind for _, kind in ids] == ["token"] * 5 + ["state", "done"] and ids[-1][0] == ids[-2][0]
        for n in range(5):
            assert await told(broker, job, ids[n][0]) == [*range(n + 1, 5), "done"]
        for other in ("another-boot-3", f"{broker.boot}-", f"{broker.boot}-x", f"{broker.boot}-{'9' * 5000}", f"{broker.boot}-999", "-", "3", "\0"):
            assert await told(broker, job, other) == ["gap", *range(5), "done"], other

    live(store, main)


def test_after_a_restart_the_lease_goes_on_and_old_event_ids_get_a_gap(tmp_path):
    before = []

    async def first(broker):
        job = await a_run(broker)
        stream = watch(broker, job.id)
        await say(broker, job, 1)
        before.extend([job, [await anext(stream) for _ in range(2)][1][0]])
        await stream.aclose()

    async def second(broker):
        job, last = before
        assert not broker.channels and last.partition("-")[0] != broker.boot
        await say(broker, job, 2)
        follower = asyncio.create_task(told(broker, job, last))
        await settle(broker)
        await broker.acall(rules.finish, job.id, job.lease_token, {})
        assert await follower == ["gap", 2, "done"]

    for main in (first, second):
        store = MAKERS["sqlite"](tmp_path)
        live(store, main)
        store.close()


def test_the_next_worker_is_heard_though_it_counts_from_the_start(store):
    async def main(broker):
        job = await a_run(broker)
        await say(broker, job, 5, 6)
        await broker.acall(rules.release, job.id, job.lease_token)
        with pytest.raises(LeaseLost):
            await say(broker, job, 7)
        [again] = await lease_within(broker, Ask("v", "v"))
        await say(broker, again, 1, 2)
        await broker.acall(rules.finish, job.id, again.lease_token, {})
        assert await told(broker, job) == [5, 6, 1, 2, "done"]

    live(store, main)


def test_only_the_newest_preview_is_kept_and_that_is_no_gap(store):
    async def main(broker):
        job = await a_run(broker)
        stream = watch(broker, job.id)
        assert (await anext(stream))[1] == "state"
        await say(broker, job, 1)
        first = (await anext(stream))[0]
        await say(broker, job, 2, 3, 4, kind="preview")
        await say(broker, job, 5)
        assert [json.loads((await anext(stream))[2])["n"] for _ in range(2)] == [4, 5]
        await stream.aclose()
        await broker.acall(rules.finish, job.id, job.lease_token, {})
        assert await told(broker, job, first, ("preview", "token", "gap")) == [4, 5]

    live(store, main)


@pytest.mark.parametrize("events", ["all fine", [{"type": "progress"}], [{"seq": 1, "type": "joke"}], [{"seq": True, "type": "log"}], [7], [{"seq": 0.5, "type": "log"}],
                                    [{"seq": n, "type": "log"} for n in range(1001)], [{"seq": 1, "type": "log", "x": float("inf")}], {"seq": 1}])
def test_events_that_cannot_be_read_are_refused_as_a_whole(store, events):
    async def main(broker):
        job = await a_run(broker)
        good = [{"seq": 0, "type": "token", "n": 0}] if isinstance(events, list) else None
        with pytest.raises(InvalidPayload) as caught:
            await heartbeat(broker, job.id, job.lease_token, (good + events) if good else events)
        assert caught.value.field == "events" and not broker.channels and broker.get(job.id) == job

    live(store, main)


def test_half_a_character_does_not_stop_a_stream(store):
    async def main(broker):
        job = await a_run(broker)
        await heartbeat(broker, job.id, job.lease_token, [{"seq": 1, "type": "token", "text": "a\ud83d"}, {"seq": 2, "type": "token", "text": "ü"}])
        await broker.acall(rules.finish, job.id, job.lease_token, {})
        events = [data async for _, kind, data in watch(broker, job.id) if kind == "token"]
        assert [json.loads(data.encode())["text"] for data in events] == ["a?", "ü"]

    live(store, main)


def test_an_idle_watcher_is_pinged(store):
    async def main(broker):
        job = await a_run(broker)
        stream = watch(broker, job.id, idle_s=0)
        assert [(await anext(stream))[:2] for _ in range(3)] == [(None, "state"), (None, "ping"), (None, "ping")]
        await stream.aclose()
        assert broker.channels[job.id].watchers == set()

    live(store, main)


# ---- bounded memory


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["token", "preview", "log"]), st.integers(0, 400)), max_size=80))
def test_a_channel_is_bounded_and_honest_about_what_it_forgot(sent):
    channel, all_of_it = rules.Channel(most=10, most_bytes=1000), []
    for kind, size in sent:
        all_of_it.append(channel.publish(kind, {"x": "y" * size}))
        assert len(channel.events) <= 10 and (sum(len(e.data) for e in channel.events) <= 1000 or len(channel.events) == 1)
        assert channel._bytes == sum(len(e.data) for e in channel.events) and sum(e.kind == "preview" for e in channel.events) <= 1
    for number in range(len(sent) + 1):
        found, gap = channel.since(number)
        newest = max((e.number for e in all_of_it if e.kind == "preview"), default=0)
        missing = [e for e in all_of_it if e.number > number and e not in found and (e.kind != "preview" or e.number == newest)]
        assert not missing or gap, "something was forgotten, and nothing said so"
        assert found == [e for e in all_of_it if e in found], "in order"
        assert not (gap and number == len(sent))


def test_a_slow_watcher_of_a_talkative_run_is_told_of_the_gap(store):
    async def main(broker):
        job = await a_run(broker)
        stream = watch(broker, job.id)
        assert (await anext(stream))[1] == "state"
        await say(broker, job, 0)
        assert json.loads((await anext(stream))[2])["n"] == 0
        for burst in range(5):
            await say(broker, job, *range(1000 * burst + 1, 1000 * burst + 1001))
        await broker.acall(rules.finish, job.id, job.lease_token, {})
        rest = [(kind, json.loads(data).get("n")) async for _, kind, data in stream]
        assert rest[0][0] == "gap" and [n for kind, n in rest if kind == "token"] == list(range(3002, 5001)) and rest[-1][0] == "done"
        assert len(broker.channels[job.id].events) == 2000

    live(store, main)


def test_channels_go_a_minute_after_the_end_and_not_before(store):
    clock = Clock()

    async def main(broker):
        job = await a_run(broker)
        stream = watch(broker, job.id)
        await anext(stream)
        await say(broker, job, 1, 2)
        last = (await anext(stream))[0]
        await stream.aclose()
        clock.now += 9
        await say(broker, job)
        for _ in range(20):  # nobody watches, for minutes, but the run goes on
            clock.now += 9
            await say(broker, job)
            rules._sweep(broker, clock.now)
        await say(broker, job, 3)
        await broker.acall(rules.finish, job.id, job.lease_token, {})
        assert await told(broker, job, last) == [2, 3, "done"]
        clock.now += 60
        rules._sweep(broker, clock.now)
        assert job.id in broker.channels
        clock.now += 1
        rules._sweep(broker, clock.now)
        assert broker.channels == {}
        assert await told(broker, job, last) == ["gap", "done"], "and its numbers are not mistaken for another channel's"

    live(store, main, clock)


def test_channels_of_ended_jobs_do_not_pile_up(store):
    async def main(broker):
        job = await a_run(broker)
        await broker.acall(rules.finish, job.id, job.lease_token, {})
        for n in range(10_000):
            broker.channels[f"old {n}"] = rules.Channel()
            broker.channels[f"old {n}"].idle_since = 0
        assert await told(broker, job) == ["done"] and list(broker.channels) == [job.id]

    live(store, main)


def test_the_roster_is_bounded():
    roster = rules.Roster()
    for n in range(2500):
        roster.meet(Ask(f"w{n}"), n * 1000)
    assert len(roster.workers) <= 1001
    roster.meet(Ask("later"), 10_000_000)
    assert list(roster.workers) == ["later"]


def test_a_worker_has_the_jobs_it_has(store):
    """Also when a heartbeat and the end share a commit."""
    async def main(broker):
        job = await a_run(broker)
        worker = broker.roster.workers["w"]
        assert list(worker.jobs) == [job.id]
        await asyncio.gather(say(broker, job, 1), broker.acall(rules.finish, job.id, job.lease_token, {}), return_exceptions=True)
        assert worker.jobs == {} and not worker.live(broker.now_ms() + 91_000)
        job = await a_run(broker)
        await broker.acall(rules.release, job.id, job.lease_token)
        assert worker.jobs == {}

    live(store, main)


def test_where_a_job_stands(store):
    async def main(broker):
        jobs = [await broker.acall(rules.submit, JobSpec("errand", priority=p)) for p in ("normal", "low", "high")]
        assert [standing(broker, j)["position"] for j in jobs] == [2, 3, 1]
        assert standing(broker, jobs[0])["waitingFor"] == "No worker is connected."
        broker.roster.meet(Ask("w"), broker.now_ms())
        broker.pace["errand"] = 10
        assert [standing(broker, j)["etaSeconds"] for j in jobs] == [20, 30, 10]
        [first] = await lease_within(broker, Ask("w"))
        assert first.id == jobs[2].id and standing(broker, first) == {}
        assert standing(broker, broker.get(jobs[0].id))["position"] == 1

    live(store, main)


# ---- the writer and those who wait share one machine


def test_a_commit_that_fails_wakes_nobody_and_the_next_one_does(tmp_path):
    store = MAKERS["sqlite"](tmp_path)

    class Broken:
        def __init__(self, db):
            self._db, self.bad = db, False

        def execute(self, sql, *args):
            if self.bad and sql == "COMMIT":
                raise sqlite3.OperationalError("disk I/O error")
            return self._db.execute(sql, *args)

        def __getattr__(self, name):
            return getattr(self._db, name)

    async def main(broker):
        [task] = await waiting(broker, Ask("w"))
        broken = store._committer.db = Broken(store._committer.db)
        broken.bad = True
        outcomes = await asyncio.gather(*(broker.acall(rules.submit, JobSpec("errand")) for _ in range(5)), return_exceptions=True)
        assert all(isinstance(e, Unavailable) for e in outcomes)
        await settle(broker)
        assert not task.done() and len(broker.waiters) == 1 and broker.read(lambda r: r.pending()) == 0
        broken.bad = False
        job = await broker.acall(rules.submit, JobSpec("errand"))
        assert [j.id for j in await task] == [job.id]

    live(store, main)
    store.close()


def test_threads_and_loop_together(store):
    """Callers in threads, workers on the loop: all is done exactly once."""
    async def main(broker):
        done, made, lock = Counter(), [], threading.Lock()

        async def worker(n):
            while jobs := await lease_within(broker, Ask(f"w{n}", most=1), 600):
                for job in jobs:
                    done[job.id] += 1
                    await broker.acall(rules.finish, job.id, job.lease_token, {})

        def caller():
            for _ in range(20):
                job = broker.call(rules.submit, JobSpec("errand"))
                with lock:
                    made.append(job.id)

        workers = [asyncio.create_task(worker(n)) for n in range(8)]
        await asyncio.gather(*(asyncio.to_thread(caller) for _ in range(4)))
        while broker.read(lambda r: r.counts()) != {"completed": 80}:
            await settle(broker)
        await settle(broker)
        assert sorted(done) == sorted(made) and set(done.values()) == {1}
        broker.close_waiting()
        await asyncio.gather(*workers)

    live(store, main)
