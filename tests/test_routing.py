"""Which worker gets which job, why one waits, draining, and time limits that nobody stretches: by a clock that is told, then over real sockets."""

import asyncio
import http.client
import json
import random
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colab_gpu import broker as rules
from colab_gpu.broker import Ask, At, Broker, Passed, Policy, Roster, lease_within, standing
from colab_gpu.errors import JobEnded, LeaseLost, NotFound, ResultConflict
from colab_gpu.jobs import Job, JobSpec
from colab_gpu.store import MemoryStore, SQLiteStore

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "worker-token-for-tests"
LONG_S = 60  # only how long something broken may hang before a test says so
MAKERS = {"memory": lambda folder: MemoryStore(), "sqlite": lambda folder: SQLiteStore(Path(folder) / "queue.db")}


@pytest.fixture(params=MAKERS)
def store(request, tmp_path):
    made = MAKERS[request.param](tmp_path)
    yield made
    made.close()


class Clock:
    def __init__(self, now=1000.0): self.now = now
    def __call__(self): return self.now


# ---- warm models first


def queue(store, *specs, now_ms=1_000_000):
    policy = Policy(max_pending=10**6)
    return [store.run(lambda tx, spec=spec: rules.submit(tx, At(now_ms, policy), spec)) for spec in specs]


def leases(store, ask, passed, count, now_ms=1_000_000):
    """The next `count` jobs that go to `ask`."""
    return [job for _ in range(count) for job in store.run(lambda tx: rules.lease(tx, At(now_ms, Policy()), ask, None, passed))]


def test_a_warm_job_goes_first_and_nobody_is_passed_over_for_ever(store):
    jobs = queue(store, *(JobSpec("draw", model=model) for model in ["cold"] + ["warm"] * 15 + ["cold"]))
    got = [job.id for job in leases(store, Ask("w", models=frozenset({"warm"})), Passed(), 17)]
    assert got == [job.id for job in jobs[1:9] + jobs[:1] + jobs[9:]], "eight overtake the first, then it is its turn"


def test_a_minute_is_enough_too(store):
    jobs = queue(store, *(JobSpec("draw", model=model) for model in ("cold", "warm", "warm", "warm")))
    ask, passed = Ask("w", models=frozenset({"warm"})), Passed()
    assert [leases(store, ask, passed, 1, at)[0].id for at in (1_000_000, 1_060_000, 1_060_001)] == [jobs[1].id, jobs[2].id, jobs[0].id]


def test_the_look_ahead_is_bounded_and_keeps_to_one_priority(store):
    jobs = queue(store, *[JobSpec("draw", model="cold")] * 16, JobSpec("draw", model="warm"), JobSpec("draw", priority="low", model="warm"))
    warm = Ask("w", models=frozenset({"warm"}))
    assert leases(store, warm, Passed(), 1)[0].id == jobs[0].id, "the warm one is the seventeenth"
    assert leases(store, warm, Passed(), 1)[0].id == jobs[16].id, "now it is the sixteenth"
    for job in leases(store, Ask("any"), None, 14):
        assert job.model == "cold"
    assert leases(store, warm, Passed(), 1)[0].id == jobs[15].id, "a cold job before a warm one of lower priority"
    high, = queue(store, JobSpec("draw", priority="high", model="cold"))
    queue(store, JobSpec("draw", model="warm"))
    assert leases(store, warm, Passed(), 1)[0].id == high.id


def test_the_look_ahead_is_one_for_all_lanes(store):
    jobs = queue(store, *(JobSpec(("draw", "chat")[n % 2], model="cold") for n in range(16)), JobSpec("draw", model="warm"))
    assert leases(store, Ask("w", models=frozenset({"warm"})), Passed(), 1)[0].id == jobs[0].id, "ninth of its lane, seventeenth of all"


def test_lanes_are_looked_at_together(store):
    jobs = queue(store, JobSpec("chat", model="cold"), JobSpec("draw", model="cold"), JobSpec("draw", model="warm", requirements=("big",)), JobSpec("chat", model="warm"))
    ask = Ask("w", models=frozenset({"warm"}), tags=frozenset({"big"}), tools=frozenset({"draw", "chat"}))
    assert [job.id for job in leases(store, ask, Passed(), 4)] == [jobs[n].id for n in (2, 3, 0, 1)]
    assert leases(store, ask, Passed(), 1) == []


def test_a_batch_forms_around_the_warm_job(store):
    def draw(model, prompt): return JobSpec.parse({"tool": "imagenGenerate", "payload": {"prompt": prompt, "model": model}})

    jobs = queue(store, draw("cold", "a"), draw("warm", "b"), draw("cold", "c"), draw("warm", "d"))
    ask = Ask("w", models=frozenset({"warm"}), most=4)
    [first] = [store.run(lambda tx: rules.lease(tx, At(1_000_000, Policy()), ask, None, Passed()))]
    assert [job.id for job in first] == [jobs[1].id, jobs[3].id]


def test_a_standby_and_one_that_says_nothing_take_the_first(store):
    jobs = queue(store, JobSpec("draw", model="cold"), JobSpec("draw", model="warm"), JobSpec("draw", model="warm"), now_ms=0)
    assert leases(store, Ask("w", models=frozenset({"warm"}), standby_s=1), Passed(), 1)[0].id == jobs[0].id
    assert leases(store, Ask("w"), Passed(), 1)[0].id == jobs[1].id


CALLS = st.lists(st.tuples(st.sampled_from(["submit", "submit", "lease", "lease", "pass time"]), st.integers(0, 8)), max_size=80)


@settings(max_examples=150, deadline=None)
@given(CALLS)
def test_whatever_comes_priority_rules_and_passing_is_bounded(calls):
    """Against every order of submits and leases: no grant goes to a job while one of higher priority waits, and none is passed over a ninth time or after a minute."""
    store, passed, now, waiting, overtaken = MemoryStore(), Passed(), 1_000_000, [], {}
    for verb, n in calls:
        if verb == "submit":
            waiting += queue(store, JobSpec(("draw", "chat")[n % 2], model=("a", "b", None)[n % 3], priority=("high", "normal", "low")[n // 3]), now_ms=now)
        elif verb == "pass time":
            now += n * 10_000
        elif (granted := leases(store, Ask("w", models=frozenset({"a" if n % 2 else "b"})), passed, 1, now)):
            [job] = granted
            assert job.rank == min(each.rank for each in waiting)
            for other in waiting:
                if other.rank == job.rank and other.seq < job.seq:
                    times, since = overtaken.get(other.id, (0, now))
                    assert times < 8 and now - since <= 60_000
                    overtaken[other.id] = times + 1, since
            waiting = [each for each in waiting if each.id != job.id]


def test_the_waiting_worker_that_has_the_model_is_woken():
    async def main():
        broker = Broker(MemoryStore())
        broker.bind()
        asks = [Ask("cold"), Ask("other", models=frozenset({"m"})), Ask("warm", models=frozenset({"flux"})), Ask("warm too", models=frozenset({"flux"}))]
        tasks = []
        for n, ask in enumerate(asks, 1):
            tasks.append(asyncio.create_task(lease_within(broker, ask, 600)))
            while len(broker.waiters) < n: await asyncio.sleep(0)
        for _ in range(200): await asyncio.sleep(0)
        order = []
        for model in ("flux", "flux", "flux", None):
            await broker.acall(rules.submit, JobSpec("draw", model=model))
            done, _ = await asyncio.wait([t for t in tasks if t not in order], timeout=LONG_S, return_when=asyncio.FIRST_COMPLETED)
            order += done
        await broker.unbind()
        return [tasks.index(task) for task in order]

    assert asyncio.run(main()) == [2, 3, 0, 1], "the warm ones as long as there are any, then who has waited longest"


@pytest.mark.parametrize("turns", range(6))
def test_who_looks_ahead_leaves_a_job_to_who_sits_idle(turns, tmp_path):
    """However close the question comes to the submit: in the same commit, or when the idle one has been woken and has not looked yet."""
    async def main(broker):
        await broker.acall(rules.submit, JobSpec("errand"))
        busy = Ask("busy", "busy")
        [first] = await lease_within(broker, busy)
        idle = asyncio.create_task(lease_within(broker, Ask("idle", "idle"), 600))
        while len(broker.waiters) < 1: await asyncio.sleep(0)
        await broker.acall(lambda tx, at: None)
        submitted = asyncio.create_task(broker.acall(rules.submit, JobSpec("errand")))
        for _ in range(turns): await asyncio.sleep(0)
        assert await lease_within(broker, busy) == []
        assert [job.id for job in await idle] == [(await submitted).id]
        other = await broker.acall(rules.submit, JobSpec("errand"))
        assert [job.id for job in await lease_within(broker, busy)] == [other.id], "nobody sits idle any more"
        return first

    loop(main, SQLiteStore(tmp_path / "queue.db"))


def test_who_looks_ahead_in_the_moment_of_the_wake_up_leaves_the_job_too(tmp_path):
    async def main(broker):
        await broker.acall(rules.submit, JobSpec("errand"))
        busy, looks, plain = Ask("busy", "busy"), [], broker.waiters.wake
        await lease_within(broker, busy)
        idle = asyncio.create_task(lease_within(broker, Ask("idle", "idle"), 600))
        while len(broker.waiters) < 1: await asyncio.sleep(0)
        await broker.acall(lambda tx, at: None)

        def wake(*args):
            looks.append(asyncio.create_task(lease_within(broker, busy)))  # before the one that is woken has its turn
            return plain(*args)

        broker.waiters.wake = wake
        job = await broker.acall(rules.submit, JobSpec("errand"))
        assert [each.id for each in await idle] == [job.id] and [await look for look in looks] == [[]]

    loop(main, SQLiteStore(tmp_path / "queue.db"))


# ---- why a job waits


def test_why_a_job_waits():
    roster, job = Roster(), Job("1", "draw", "{}", requirements=("big",))
    steps = [(Ask("chatter", tools=frozenset({"chat"})), "No connected worker has the tool draw."),
             (Ask("small", tools=frozenset({"draw"})), "No connected worker has the tags big."),
             (Ask("tired", tags=frozenset({"big"}), paused="3 different jobs failed in a row."),
              "Every connected worker with the tool draw has paused itself: 3 different jobs failed in a row."),
             (Ask("leaving", tags=frozenset({"big"}), session_left_s=99), "The sessions of all connected workers end before a job of draw would, which takes about 100 s."),
             (Ask("fit", tags=frozenset({"big"}), session_left_s=100), None)]
    assert roster.why_waiting(job, 0) == "No worker is connected."
    for ask, why in steps:
        roster.meet(ask, 0)
        assert roster.why_waiting(job, 0, 100) == why
    roster.workers["fit"].draining = roster.workers["leaving"].draining = True
    assert "paused itself" in roster.why_waiting(job, 0, 100)
    roster.workers["tired"].draining = True
    assert roster.why_waiting(job, 0, 100) == "Every connected worker with the tool draw is about to stop."
    assert roster.why_waiting(job, 90_001, 100) == "No worker is connected."


def test_standing_knows_the_tools_pace():
    broker = Broker(MemoryStore())
    job = broker.call(rules.submit, JobSpec("draw"))
    broker.roster.meet(Ask("w", session_left_s=10), broker.now_ms())
    assert "waitingFor" not in standing(broker, job)
    broker.pace["draw"] = 60
    assert "about 60 s" in standing(broker, job)["waitingFor"]


# ---- draining and pausing


def loop(main, store=None):
    async def body():
        broker = Broker(store or MemoryStore())
        broker.bind()
        try: return await asyncio.wait_for(main(broker), LONG_S)
        finally: await broker.unbind()

    return asyncio.run(body())


def test_a_drain_answers_every_wait_and_loses_no_job():
    async def main(broker):
        tasks = [asyncio.create_task(lease_within(broker, ask, 600)) for ask in (Ask("first"), Ask("second"))]
        while len(broker.waiters) < 2: await asyncio.sleep(0)
        for _ in range(100): await asyncio.sleep(0)
        rules.drain(broker, "first")
        job = await broker.acall(rules.submit, JobSpec("errand"))  # while the drained one has not looked up yet
        assert await tasks[0] == [] and [j.id for j in await tasks[1]] == [job.id]
        held = asyncio.create_task(lease_within(broker, Ask("first"), 600))
        for _ in range(100): await asyncio.sleep(0)
        assert not held.done() and len(broker.waiters) == 0, "asked again after it was told, it waits as if there was no work"
        rules.drain(broker, "first", on=False)
        assert await held == []
        with pytest.raises(NotFound, match="GET /workers"): rules.drain(broker, "nobody")

    loop(main)


def test_a_drained_worker_still_gets_the_lease_whose_answer_was_lost():
    async def main(broker):
        job = await broker.acall(rules.submit, JobSpec("errand"))
        ask = Ask("w", "i", request="r1")
        [lost] = await lease_within(broker, ask)
        rules.drain(broker, "i")
        assert [j.lease_token for j in await lease_within(broker, ask, 600)] == [lost.lease_token] and lost.id == job.id

    loop(main)


def test_a_paused_worker_gets_nothing_and_leaves_the_job_to_the_standby():
    async def main(broker):
        job = await broker.acall(rules.submit, JobSpec("errand"))
        paused = Ask("tired", paused="Three different jobs failed.")
        assert await lease_within(broker, paused) == []
        assert "has paused itself: Three different jobs failed." in standing(broker, job)["waitingFor"]
        assert [j.id for j in await lease_within(broker, Ask("spare", standby_s=0))] == [job.id], "a paused worker is no reason to wait"
        await broker.acall(rules.cancel, job.id)
        job = await broker.acall(rules.submit, JobSpec("errand"))
        assert [j.id for j in await lease_within(broker, Ask("tired"))] == [job.id], "it has recovered"

    loop(main)


# ---- time limits, late results, handing back: by a clock that is told


def test_heartbeats_cannot_stretch_the_run_time_out(store):
    broker = Broker(store, Policy(heartbeat_lease_s=10), Clock())
    job = broker.call(rules.submit, JobSpec("errand", run_timeout_s=25))
    [job] = broker.call(rules.lease, Ask("w"))
    for until in (1015, 1020, 1025, 1025, 1025):
        broker.clock.now += 5
        broker.call(rules.extend, job.id, job.lease_token)
        assert broker.get(job.id).lease_until_ms == until * 1000
    broker.call(rules.reap)
    ended = broker.get(job.id)
    assert (ended.status, ended.error_kind) == ("failed", "timeout") and "25" in ended.detail and ended.attempts == 1
    with pytest.raises(JobEnded): broker.call(rules.extend, job.id, job.lease_token)
    with pytest.raises(ResultConflict): broker.call(rules.finish, job.id, job.lease_token, {})


def test_a_heartbeat_after_the_lease_ran_out_cannot_stretch_it_either(store):
    broker = Broker(store, Policy(heartbeat_lease_s=10), Clock())
    broker.call(rules.submit, JobSpec("errand", run_timeout_s=25))
    [job] = broker.call(rules.lease, Ask("w"))
    broker.clock.now += 12
    broker.call(rules.reap)
    assert broker.get(job.id).status == "queued"
    broker.clock.now += 6
    assert broker.call(rules.extend, job.id, job.lease_token).lease_until_ms == 1025_000
    broker.clock.now += 8
    broker.call(rules.reap)
    assert broker.get(job.id).error_kind == "timeout"


def test_a_late_result_is_taken_unless_somebody_else_was_granted_the_job(tmp_path):
    """Also by a server that was started again in between."""
    for stolen in (False, True):
        folder, clock = tmp_path / str(stolen), Clock()
        broker = Broker(SQLiteStore(folder / "queue.db"), Policy(heartbeat_lease_s=10), clock)
        broker.call(rules.submit, JobSpec("errand"))
        [job] = broker.call(rules.lease, Ask("w"))
        clock.now += 11
        broker.call(rules.reap)
        assert broker.get(job.id).status == "queued"
        broker.store.close()
        broker = Broker(SQLiteStore(folder / "queue.db"), Policy(heartbeat_lease_s=10), clock)
        if stolen:
            [other] = broker.call(rules.lease, Ask("other"))
            with pytest.raises(LeaseLost): broker.call(rules.finish, job.id, job.lease_token, {"late": True})
            broker.call(rules.finish, job.id, other.lease_token, {"late": False})
        else:
            broker.call(rules.finish, job.id, job.lease_token, {"late": True})
        assert broker.get(job.id).result == {"late": not stolen} and broker.call(rules.lease, Ask("w")) == []
        broker.store.close()


def test_a_released_job_has_its_attempt_back(store):
    broker = Broker(store, Policy(max_attempts=2), Clock())
    broker.call(rules.submit, JobSpec("errand"))
    for _ in range(5):
        [job] = broker.call(rules.lease, Ask("w"))
        assert job.attempts == 1
        broker.call(rules.release, job.id, job.lease_token)
        broker.call(rules.release, job.id, job.lease_token)  # the answer was lost
        assert broker.get(job.id).attempts == 0


# ---- over sockets, with real processes


def ask(server, method, path, body=None, token=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LONG_S)
    head = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {}), **{k.replace("_", "-"): v for k, v in headers.items()}}
    connection.request(method, path, None if body is None else json.dumps(body), head)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text) if text else None


def next_job(server, query, instance="boot"):
    return ask(server, "GET", f"/gpu-jobs/next?{query}", token=TOKEN, X_Protocol="1", X_Worker_Instance=instance)


def submit(server, **body):
    return ask(server, "POST", "/gpu-jobs", {"tool": "errand", **body})[1]["job"]["id"]


def job_of(server, job_id, *statuses):
    deadline = time.monotonic() + LONG_S
    while True:
        job = ask(server, "GET", f"/gpu-jobs/{job_id}?wait=5")[1]["job"]
        if not statuses or job["status"] in statuses: return job
        assert time.monotonic() < deadline, job


def test_workers_say_what_they_have_and_warm_jobs_go_first(serve):
    server = serve()
    cold, warm, plain = (submit(server, payload=payload) for payload in ({"model": "sdxl"}, {"model": "flux"}, {}))
    say = "worker=attic&tools=errand&models=flux&disk=flux,sdxl,flux&versions=torch=2.13.0,diffusers=0.42.1&accelerator=Tesla+T4&memory=15+GiB&sessionLeft=900"
    assert [next_job(server, say)[1]["job"]["id"] for _ in range(3)] == [warm, cold, plain]
    [worker] = ask(server, "GET", "/workers")[1]["workers"]
    assert {k: worker[k] for k in ("id", "instance", "tools", "models", "disk", "versions", "accelerator", "memory", "sessionLeft", "draining", "paused")} == {
        "id": "attic", "instance": "boot", "tools": ["errand"], "models": ["flux"], "disk": ["flux", "sdxl"], "sessionLeft": 900, "draining": False,
        "versions": {"diffusers": "0.42.1", "torch": "2.13.0"}, "accelerator": "Tesla T4", "memory": "15 GiB", "paused": None}
    assert worker["jobs"] == [warm, cold, plain]
    next_job(server, "worker=attic&tools=errand")
    [worker] = ask(server, "GET", "/workers")[1]["workers"]
    assert worker["models"] == [] and worker["disk"] == ["flux", "sdxl"], "what is no longer warm is not shown; the disk was not spoken of"


def test_what_workers_say_is_bounded(serve):
    server = serve()
    assert next_job(server, "disk=" + ",".join(f"m{n:04}" for n in range(1000)))[0] == 204
    assert next_job(server, "paused=" + "x" * 5000)[0] == 204
    [worker] = ask(server, "GET", "/workers")[1]["workers"]
    assert len(worker["disk"]) == 100 and len(worker["paused"]) == 300
    assert next_job(server, "disk=a%C2%9B31m,b&paused=%C2%9B31mred%E2%80%AE")[0] == 204
    [worker] = ask(server, "GET", "/workers")[1]["workers"]
    assert (worker["disk"], worker["paused"]) == (["a 31m", "b"], "31mred"), "nothing that a terminal would obey"
    for bad in ("versions=torch", "versions==2", "versions=a=" + "1" * 101, "versions=" + ",".join(f"p{n}=1" for n in range(31)), "models=" + "m" * 201):
        status, answer = next_job(server, bad)
        assert (status, answer["error"], answer["field"]) == (400, "invalid_payload", bad.partition("=")[0]), bad


def test_a_pause_is_shown_and_said_by_the_job(serve):
    server = serve()
    job_id = submit(server)
    assert next_job(server, "worker=tired&paused=3+different+jobs+failed+in+a+row.")[0] == 204
    assert ask(server, "GET", "/workers")[1]["workers"][0]["paused"] == "3 different jobs failed in a row."
    assert job_of(server, job_id)["waitingFor"] == "Every connected worker with the tool errand has paused itself: 3 different jobs failed in a row."
    assert next_job(server, "worker=tired")[1]["job"]["id"] == job_id


def test_a_drain_reaches_polls_heartbeats_and_orders(serve):
    server, answers = serve(), {}

    def call(name, *args, **headers):
        answers[name] = ask(server, *args, token=TOKEN, X_Protocol="1", X_Worker_Instance=name, **headers)

    job_id = submit(server)
    token = next_job(server, "worker=busy", "busy")[1]["lease"]["token"]
    waits = {"new": "/gpu-jobs/next?worker=idle&wait=55&drain=1", "old": "/gpu-jobs/next?worker=idle&wait=55", "busy": "/gpu-jobs/orders?worker=busy&wait=55"}
    threads = [threading.Thread(target=call, args=(name, "GET", path)) for name, path in waits.items()]
    for thread in threads: thread.start()
    deadline = time.monotonic() + LONG_S
    while sum(w["waiting"] for w in ask(server, "GET", "/workers")[1]["workers"]) < 2 and time.monotonic() < deadline: time.sleep(0.02)
    status, answer = ask(server, "POST", "/workers/idle/drain", {})
    assert status == 200 and [w["draining"] for w in answer["workers"]] == [True, True], "both instances of that label"
    assert ask(server, "POST", "/workers/busy/drain")[0] == 200
    for thread in threads: thread.join(LONG_S)
    assert answers == {"new": (200, {"drain": True, "jobs": []}), "old": (204, None), "busy": (200, {"jobs": [], "drain": True})}
    beat = ask(server, "POST", f"/gpu-jobs/{job_id}/heartbeat", {"leaseToken": token}, TOKEN)[1]
    assert beat["drain"] is True and ask(server, "POST", f"/gpu-jobs/{job_id}/complete", {"leaseToken": token, "status": "completed"}, TOKEN)[0] == 200
    waiting = submit(server)
    assert job_of(server, waiting)["waitingFor"] == "Every connected worker with the tool errand is about to stop."
    assert next_job(server, "worker=busy&drain=1", "busy") == (200, {"drain": True, "jobs": []})
    assert ask(server, "POST", "/workers/busy/drain", {"drain": False})[1]["workers"][0]["draining"] is False
    assert next_job(server, "worker=busy", "busy")[1]["job"]["id"] == waiting
    assert ask(server, "POST", "/workers/nobody/drain")[1]["error"] == "worker_not_found"
    assert ask(server, "POST", "/workers/busy/drain", {"drain": "yes"})[1]["field"] == "drain"


def test_a_run_time_out_ends_a_run_whose_worker_keeps_its_heart_beating(serve, work):
    server = serve(GPU_HEARTBEAT_LEASE_SECONDS=1)
    work(server.url)
    job_id = submit(server, tool="sleepy", payload={"seconds": 600}, runTimeoutSeconds=3)
    job = job_of(server, job_id, "completed", "failed", "canceled")
    assert (job["status"], job["kind"], job["attempts"]) == ("failed", "timeout", 1) and "runTimeoutSeconds (3)" in job["detail"]
    assert job["completedAt"] >= job["startedAt"] + 3000, "a lease of one second was renewed until then"
    after = submit(server, tool="sleepy", payload={"seconds": 0.1})
    assert job_of(server, after, "completed")["status"] == "completed", "the worker is free again"


def test_a_late_result_after_kill_9(serve):
    server = serve(GPU_HEARTBEAT_LEASE_SECONDS=1)
    job_id = submit(server)
    token = next_job(server, "worker=w")[1]["lease"]["token"]
    deadline = time.monotonic() + LONG_S
    while job_of(server, job_id)["status"] != "queued" and time.monotonic() < deadline: time.sleep(0.05)
    server.kill()
    server.start()
    done = {"leaseToken": token, "status": "completed", "result": {"late": True}}
    assert ask(server, "POST", f"/gpu-jobs/{job_id}/complete", done, TOKEN)[1]["job"]["result"] == {"late": True}
    assert next_job(server, "worker=other", "other")[0] == 204


def test_a_released_job_has_its_attempt_back_over_http(serve):
    server = serve()
    job_id = submit(server, maxAttempts=1)
    for n in range(3):
        granted = next_job(server, f"worker=w{n}", f"i{n}")[1]
        assert granted["job"]["id"] == job_id and granted["job"]["attempts"] == 1
        assert ask(server, "POST", f"/gpu-jobs/{job_id}/release", {"leaseToken": granted["lease"]["token"]}, TOKEN)[1]["job"]["attempts"] == 0


# ---- what leasing costs


def steps_of(store, ask, passed):
    """How many steps SQLite's machine takes for one lease, in hundreds: not a matter of the clock."""
    counted = []
    db = store._committer.db
    db.set_progress_handler(lambda: counted.append(1) and 0, 100)
    try: [job] = store.run(lambda tx: rules.lease(tx, At(2_000_000, Policy()), ask, None, passed))
    finally: db.set_progress_handler(None, 0)
    return len(counted), job


@pytest.mark.parametrize("warm", [False, True])
def test_the_cost_of_a_lease_grows_neither_with_the_queue_nor_with_history(tmp_path, warm):
    chance, costs = random.Random(1), []
    ask = Ask("w", models=frozenset({"m1"}) if warm else frozenset())
    for waiting, ended in ((50, 0), (5000, 0), (5000, 5000)):
        store = SQLiteStore(tmp_path / f"{waiting}-{ended}.db")

        def fill(tx, waiting=waiting, ended=ended):
            for n in range(ended):
                job = Job(f"old-{n}", "draw", "{}", enqueued_ms=n, model=f"m{n % 3}")
                tx.insert(job)
                job.status, job.ready, job.ended_ms = "completed", False, n
                tx.update(job)
            for n in range(waiting):
                tx.insert(Job(f"new-{n}", ("draw", "chat")[n % 2], "{}", chance.choice(["high", "normal", "low"]), enqueued_ms=n, model=f"m{n % 3}"))

        store.run(fill)
        costs.append(max(steps_of(store, ask, Passed())[0] for _ in range(10)))
        store.close()
    assert max(costs) <= 2 * min(costs) + 2, costs
