"""The rules against a simple model, on both stores: no job in two hands, none lost, no illegal move."""

import asyncio
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from colab_gpu import broker as rules
from colab_gpu.broker import Ask, Broker, Policy, ended_within, heartbeat, lease_within, watch
from colab_gpu.errors import ColabGPUError, IdempotencyConflict, JobEnded, JobNotInProgress, LeaseLost, QueueFull, ResultConflict
from colab_gpu.jobs import ENDED, JobSpec
from colab_gpu.store import MemoryStore, SQLiteStore

TOOLS = ("draw", "chat")
POLICY = Policy(lease_s=100, heartbeat_lease_s=10, max_pending=4, max_attempts=2, retry_s=4, retry_max_s=8)


class Model:
    """What we believe about one job, kept apart from the code under test."""

    def __init__(self, job):
        self.id, self.tool, self.rank = job.id, job.tool, job.rank
        self.status, self.token, self.result, self.holder = "queued", None, None, None
        self.grants = 0
        self.spoken = False


class Rules(RuleBasedStateMachine):
    """Random verbs at random times; `make_store` is set by the tests below."""

    make_store = staticmethod(MemoryStore)

    @initialize()
    def begin(self):
        self.now, self.store, self.jobs, self.old_tokens, self.keys = 1_000_000, self.make_store(), {}, [], {}
        self.broker = Broker(self.store, POLICY, clock=lambda: self.now / 1000)

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()

    def call(self, name, *args):
        return self.broker.call(name, *args)

    def pick(self, data, *statuses):
        found = [m for m in self.jobs.values() if not statuses or m.status in statuses]
        return data.draw(st.sampled_from(found)) if found else None

    # The commonest life comes up most often, so that forty steps reach deep into it: submit, lease, and time running out.
    @rule(tool=st.sampled_from(TOOLS))
    def submit_plainly(self, tool):
        self.submit(tool, "normal", None, None, (), None)

    @rule(worker=st.sampled_from(["a", "b"]))
    def lease_anything(self, worker):
        self.lease(None, frozenset({"big"}), True, worker, 1)

    @rule()
    def a_lease_runs_out(self):
        self.time_passes(11)

    @rule(tool=st.sampled_from(TOOLS), priority=st.sampled_from(["high", "normal", "low"]), delay=st.sampled_from([None, None, 5]),
          wait=st.sampled_from([None, None, 7]), tags=st.sampled_from([(), (), ("big",)]), key=st.sampled_from([None, None, "k1", "k2"]))
    def submit(self, tool, priority, delay, wait, tags, key):
        start = None if delay is None else self.now + delay * 1000
        spec = JobSpec(tool, "{}", priority, None, wait, None, start, tags)
        full = sum(m.status == "queued" for m in self.jobs.values()) >= POLICY.max_pending
        content = json.dumps([tool, priority, delay, wait, tags])
        try:
            job = self.call(rules.submit, spec, key, content)
        except QueueFull:
            assert full and key not in self.keys
            return
        except IdempotencyConflict:
            assert self.keys[key][1] != content
            return
        if key in self.keys:
            assert self.keys[key] == (job.id, content)
            return
        assert not full and job.id not in self.jobs
        if key:
            self.keys[key] = (job.id, content)
        self.jobs[job.id] = Model(job)

    @rule(tools=st.sampled_from([None, frozenset({"draw"}), frozenset({"chat"})]), tags=st.sampled_from([frozenset(), frozenset({"big"})]),
          fenced=st.booleans(), worker=st.sampled_from(["a", "b", "c"]), most=st.sampled_from([1, 3]))
    def lease(self, tools, tags, fenced, worker, most):
        before = {i: self.broker.get(i) for i in self.jobs}
        ask = Ask(worker, tools=tools, tags=tags, fenced=fenced, most=most)
        jobs = self.call(rules.lease, ask)
        able = [j for j in before.values() if j.status == "queued" and j.ready and (tools is None or j.tool in tools) and set(j.requirements) <= tags]
        assert bool(jobs) == bool(able)
        assert len(jobs) <= most
        if jobs:
            assert jobs[0].id == min(able, key=lambda j: (j.rank, j.seq)).id, "the first by priority and age"
        for job in jobs:
            model = self.jobs[job.id]
            assert model.status == "queued" and job.status == "leased"
            assert (job.lease_token is not None) == fenced
            if model.token is not None:
                self.old_tokens.append((job.id, model.token))
            assert all(job.lease_token != token for _, token in self.old_tokens) or job.lease_token is None
            model.status, model.token, model.spoken, model.grants = "leased", job.lease_token, False, model.grants + 1
            assert job.grants == model.grants and job.attempts <= job.max_attempts

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), value=st.integers(0, 1))
    def finish(self, data, value):
        model = self.pick(data)
        was = model.status
        try:
            job = self.call(rules.finish, model.id, model.token, {"value": value})
        except JobNotInProgress:
            assert not model.grants or (model.token is None and was in ENDED)
        except ResultConflict:
            assert model.spoken and (model.result != ("completed", value))
        else:
            assert job.status == "completed" or (model.spoken and model.result == ("completed", value))
            if was in ("queued", "leased") and not model.spoken:
                assert job.result == {"value": value}
                model.status, model.result, model.spoken = "completed", ("completed", value), True

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), kind=st.sampled_from([None, "transient", "invalid_input", "oom", "interrupted"]))
    def fail(self, data, kind):
        model = self.pick(data)
        try:
            job = self.call(rules.fail, model.id, model.token, "broken", kind)
        except JobNotInProgress:
            assert not model.grants or (model.token is None and model.status in ENDED)
        except ResultConflict:
            assert model.spoken and model.result != ("error", kind)
        else:
            if model.spoken:
                assert model.result == ("error", kind)
            else:
                model.status, model.result, model.spoken = job.status, ("error", kind), True
                assert job.status in ("failed", "queued", "canceled")
                if job.status == "queued":
                    assert kind in ("transient", "interrupted") and job.attempts < job.max_attempts and not job.ready

    @precondition(lambda self: self.old_tokens)
    @rule(data=st.data(), verb=st.sampled_from(["finish", "fail", "extend", "release", "artifact"]))
    def write_with_an_old_token(self, data, verb):
        job_id, token = data.draw(st.sampled_from(self.old_tokens))
        before = self.broker.get(job_id)
        meta = {"name": "x", "contentType": "text/plain", "bytes": 1, "sha256": "0", "grant": before.grants}
        calls = {"finish": (rules.finish, job_id, token, {"stale": True}), "fail": (rules.fail, job_id, token, "stale", "transient"),
                 "extend": (rules.extend, job_id, token), "release": (rules.release, job_id, token), "artifact": (rules.add_artifact, job_id, token, meta)}
        with pytest.raises(LeaseLost):
            self.call(*calls[verb])
        assert self.broker.get(job_id) == before, "a fenced-off write left a trace"

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def extend(self, data):
        model = self.pick(data, "leased", "queued")
        if model is None or not model.grants:
            return
        try:
            job = self.call(rules.extend, model.id, model.token)
        except LeaseLost:
            assert model.spoken
        else:
            assert not model.spoken and job.status == "leased" and job.lease_until_ms > self.now
            model.status = "leased"

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def release(self, data):
        model = self.pick(data, "leased")
        if model is None:
            return
        before = self.broker.get(model.id)
        job = self.call(rules.release, model.id, model.token)
        assert job.attempts == before.attempts - 1 and job.status in ("queued", "canceled")
        model.status, model.spoken, model.result = job.status, True, ("released",)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data):
        model = self.pick(data)
        job = self.call(rules.cancel, model.id)
        if model.status == "queued":
            assert job.status == "canceled"
            if not model.spoken:
                model.spoken, model.result = True, ("canceled",)
        elif model.status == "leased":
            assert job.status == "leased" and job.cancel_requested
        else:
            assert job.status == model.status
        model.status = job.status

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def retry(self, data):
        model = self.pick(data, "failed", "canceled", "completed")
        if model is None:
            return
        try:
            job = self.call(rules.retry, model.id)
        except ColabGPUError as e:
            assert model.status == "completed" or isinstance(e, QueueFull)
        else:
            assert job.retry_of == model.id and job.id not in self.jobs
            self.jobs[job.id] = Model(job)

    @rule(seconds=st.sampled_from([0, 1, 3, 11, 101]))
    def time_passes(self, seconds):
        self.now += seconds * 1000
        before = {i: self.broker.get(i) for i in self.jobs}
        self.call(rules.reap)
        for job_id, old in before.items():
            job, model = self.broker.get(job_id), self.jobs[job_id]
            if old.status == "leased" and old.lease_until_ms <= self.now:
                assert job.status in ("queued", "failed", "canceled"), "a lease outlived its time"
                assert job.status != "queued" or job.attempts < job.max_attempts
            elif old.status == "queued" and old.queue_deadline_ms is not None and old.queue_deadline_ms <= self.now:
                assert job.status == "failed"
            else:
                assert job.status == old.status
            if job.status == "queued" and job.not_before_ms is not None and job.not_before_ms <= self.now:
                assert job.ready, "a held job whose time has come is ready"
            if job.status in ENDED and old.status not in ENDED and not model.spoken:
                model.spoken, model.result = True, ("expired",)
            model.status = job.status

    @invariant()
    def nothing_is_lost(self):
        if not hasattr(self, "jobs"):
            return
        queued, lanes = 0, {}
        for job_id, model in self.jobs.items():
            job = self.broker.get(job_id)
            assert job.status == model.status
            assert 0 <= job.attempts <= job.max_attempts
            if job.status == "leased":
                assert job.lease_until_ms is not None and not job.ready
            if job.status == "queued":
                queued += 1
                assert job.ready or job.not_before_ms is not None, "a queued job that nothing will ever wake"
                if job.ready:
                    lanes[job.lane] = lanes.get(job.lane, 0) + 1
            if job.ended:
                assert job.ended_ms is not None and not job.ready
                if model.result and model.result[0] == "completed":
                    assert job.result == {"value": model.result[1]}, "the first result stays"
        assert self.store.read(lambda r: (r.pending(), dict(r.lanes()))) == (queued, lanes)
        assert self.store.run(lambda tx: (tx.pending(), dict(tx.lanes()))) == (queued, lanes)


CHECK = settings(max_examples=200, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))


def test_rules_in_memory():
    run_state_machine_as_test(Rules, settings=CHECK)


def test_rules_in_sqlite():
    folders = []

    class InSQLite(Rules):
        def make_store(self):
            folders.append(tempfile.TemporaryDirectory())
            return SQLiteStore(Path(folders[-1].name) / "queue.db")

    run_state_machine_as_test(InSQLite, settings=settings(CHECK, max_examples=40))
    for folder in folders:
        folder.cleanup()


# ---- those who wait


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path):
    made = MemoryStore() if request.param == "memory" else SQLiteStore(tmp_path / "queue.db")
    yield made
    made.close()


def live(store, main, **policy):
    async def body():
        broker = Broker(store, Policy(max_pending=100_000, **policy))
        broker.bind()
        try:
            return await asyncio.wait_for(main(broker), 60)
        finally:
            await broker.unbind()

    return asyncio.run(body())


def test_two_hundred_workers_and_two_hundred_jobs(store):
    async def main(broker):
        waiting = [asyncio.create_task(lease_within(broker, Ask(f"w{i}", f"i{i}"), 30)) for i in range(200)]
        while len(broker.waiters) < 200:
            await asyncio.sleep(0)
        made = await asyncio.gather(*(broker.acall(rules.submit, JobSpec("errand")) for _ in range(200)))
        got = [job.id for jobs in await asyncio.gather(*waiting) for job in jobs]
        assert sorted(got) == sorted(job.id for job in made), "each job in exactly one hand"

    live(store, main)


def test_one_job_wakes_one_worker(store):
    async def main(broker):
        asked = 0
        plain = broker.acall

        async def counting(rule, *args, **options):
            nonlocal asked
            asked += rule is rules.lease
            return await plain(rule, *args, **options)

        broker.acall = counting
        waiting = [asyncio.create_task(lease_within(broker, Ask(f"w{i}", f"i{i}"), 30)) for i in range(20)]
        while asked < 20 or len(broker.waiters) < 20:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        await broker.acall(rules.submit, JobSpec("errand"))
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(0.05)
        assert len(done) == 1 and asked == 21, "only the one that was woken asked again"
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    live(store, main)


def test_a_wake_up_that_is_not_needed_is_passed_on():
    async def main(broker):
        plain, hold = broker.acall, asyncio.Event()

        async def slow_for_a(rule, *args, **options):
            result = await plain(rule, *args, **options)
            if rule is rules.lease and args[0].worker == "a":
                await hold.wait()
            return result

        broker.acall = slow_for_a
        first = await plain(rules.submit, JobSpec("errand"))
        a = asyncio.create_task(lease_within(broker, Ask("a", "a"), 30))
        while first.id not in broker.roster.workers.get("a", rules.WorkerSeen("", None, Ask(""))).jobs:
            await asyncio.sleep(0)
        b = asyncio.create_task(lease_within(broker, Ask("b", "b"), 3600))
        while len(broker.waiters) < 2:
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        second = await plain(rules.submit, JobSpec("errand"))  # wakes a, which has waited longest, and has a job already
        hold.set()
        assert (await a)[0].id == first.id and (await b)[0].id == second.id

    live(MemoryStore(), main)


def test_no_wake_up_is_lost_between_looking_and_waiting(store):
    async def main(broker):
        for _ in range(200):
            lease = asyncio.create_task(lease_within(broker, Ask("w", "i"), 30))
            submit = asyncio.create_task(broker.acall(rules.submit, JobSpec("errand")))
            [job] = await lease
            assert job.id == (await submit).id

    live(store, main)


def test_a_worker_that_went_away_gives_its_grant_back(store):
    async def main(broker):
        for turns in range(60):
            lease = asyncio.create_task(lease_within(broker, Ask("gone", "gone"), 30))
            while not len(broker.waiters):
                await asyncio.sleep(0)
            await broker.acall(rules.submit, JobSpec("errand"))
            for _ in range(turns % 6):  # leave at every moment between being woken and having the job
                await asyncio.sleep(0 if turns < 30 else 0.0001)
            if lease.done():
                for job in lease.result():
                    await broker.acall(rules.release, job.id, job.lease_token)
            lease.cancel()
            await asyncio.gather(lease, return_exceptions=True)
            [job] = await lease_within(broker, Ask("here", "here"), 30)
            assert job.attempts == 1, "the attempt of the one that went away is not spent"
            await broker.acall(rules.finish, job.id, job.lease_token, {})

    live(store, main)


def test_workers_of_other_tools_are_left_alone(store):
    async def main(broker):
        chat = asyncio.create_task(lease_within(broker, Ask("c", "c", tools=frozenset({"chat"})), 30))
        draw = asyncio.create_task(lease_within(broker, Ask("d", "d", tools=frozenset({"draw"})), 30))
        while len(broker.waiters) < 2:
            await asyncio.sleep(0)
        await broker.acall(rules.submit, JobSpec("draw"))
        assert (await draw)[0].tool == "draw" and not chat.done()
        broker.close_waiting()
        assert await chat == [], "waiting workers are answered when the server stops"

    live(store, main)


def test_waiting_for_the_end_and_watching(store):
    async def main(broker):
        job = await broker.acall(rules.submit, JobSpec("draw"))
        [granted] = await lease_within(broker, Ask("w", "w"))
        seen = []

        async def follow(after=None):
            async for event_id, kind, data in watch(broker, job.id, after):
                seen.append((event_id, kind, json.loads(data)))

        follower = asyncio.create_task(follow())
        ends = [asyncio.create_task(ended_within(broker, job.id, 30)) for _ in range(5)]
        while job.id not in broker.channels or not broker.channels[job.id].watchers:
            await asyncio.sleep(0)
        for step in (1, 2, 3):
            beat = await heartbeat(broker, job.id, granted.lease_token, [{"seq": step, "type": "progress", "step": step, "total": 3}])
            assert beat.watchers == 1
        await heartbeat(broker, job.id, granted.lease_token, [{"seq": 2, "type": "progress", "step": 2, "total": 3}])
        await broker.acall(rules.finish, job.id, granted.lease_token, {})
        assert {(await end).status for end in ends} == {"completed"}
        await follower
        assert [data["step"] for _, kind, data in seen if kind == "progress"] == [1, 2, 3], "a repeated event is shown once"
        assert seen[-1][1] == "done" and not broker.channels[job.id].watchers
        middle = next(i for i, kind, data in seen if kind == "progress" and data["step"] == 2)
        seen.clear()
        await follow(middle)
        assert [data["step"] for _, kind, data in seen if kind == "progress"] == [3]
        seen.clear()
        await follow("another-boot-7")
        assert seen[0][1] == "gap"
        with pytest.raises(JobEnded):
            await heartbeat(broker, job.id, granted.lease_token)

    live(store, main)


def test_a_channel_is_bounded():
    channel = rules.Channel(most=100, most_bytes=10_000)
    for n in range(5000):
        channel.publish("token", {"text": "x" * 50})
        channel.publish("preview", {"image_base64": "y" * 900})
    assert len(channel.events) <= 100 and sum(len(e.data) for e in channel.events) <= 10_000
    assert sum(e.kind == "preview" for e in channel.events) == 1
    assert channel.since(1)[1] and not channel.since(channel.last_number - 1)[1]
