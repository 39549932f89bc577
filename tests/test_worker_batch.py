"""Batches, and orders, in real processes and over real sockets: what happens to one job of a batch never happens to another."""

import random
import threading

import pytest
from conftest import TOKEN
from processes import Wire, eventually, png, start_reference, start_server, start_worker_process
from test_worker import Quick, serve, worker_for

from colab_gpu.cli import build_parser
from colab_gpu.client import Client, Transport
from colab_gpu.errors import Interrupted, InvalidPayload, InvalidSetting, MissingToken, OutOfMemory
from colab_gpu.runs import Grant
from colab_gpu.worker import serve as serve_grants


class Canvas:
    """Paints up to `most` pictures in a call, all of them until `go` is set. A job with seed 13 fails; one that should stop is painted no further.

    `stubborn`: it asks nobody whether it should stop. `quiet`: it says nothing, so that there is nothing to send. Keeps what it was handed in `calls`.
    """
    tool = "imagenGenerate"

    def __init__(self, most=4, stubborn=False, held=True, quiet=False):
        self.most, self.stubborn, self.quiet, self.calls = most, stubborn, quiet, []
        self.running, self.go, self.contexts = threading.Event(), threading.Event(), {}
        if not held: self.go.set()

    def batch_size(self): return self.most
    def run(self, payload, ctx): return self._paint([(payload, ctx)])[0]
    def run_batch(self, jobs): return self._paint(jobs)

    def _paint(self, jobs):
        self.calls.append([payload["seed"] for payload, _ in jobs])
        ends = {}
        self.contexts = {payload["seed"]: ctx for payload, ctx in jobs}
        self.running.set()
        while True:
            for payload, ctx in jobs:
                seed = payload["seed"]
                if seed in ends: continue
                if not self.quiet: ctx.progress(1, 2, preview=b"preview of %d" % seed if ctx.watched else None)
                if seed == 13: ends[seed] = OutOfMemory("Thirteen does not fit.")
                elif not self.stubborn:
                    try: ctx.check()
                    except Interrupted as e: ends[seed] = e
            if len(ends) == len(jobs) or self.go.wait(0.005): break
        for payload, ctx in jobs:
            if payload["seed"] in ends: continue
            ctx.artifact("image.png", png(colour=(payload["seed"], 0, 0)), "image/png")
            ends[payload["seed"]] = {"seed": payload["seed"]}
        return [ends[payload["seed"]] for payload, _ in jobs]


def submit(client, *seeds, **fields): return {n: client.submit("imagenGenerate", {"prompt": f"dot {n}", "seed": n}, **fields) for n in seeds}
def states(jobs): return {n: job.refresh().status for n, job in jobs.items()}
def after(worker, word): return [line for line in worker.lines if word in line]


# ---- one call, several jobs


def test_one_is_canceled_one_fails_one_is_lost_one_completes(tmp_path):
    "Four jobs in one call, in a process of the server's own; each ends its own way, and each is told of in the log."
    with start_server(tmp_path / "data", GPU_HEARTBEAT_LEASE_SECONDS=1) as server, Client(server.url, "") as client:
        jobs, canvas, turns = submit(client, 1, 2, 13, 4, maxAttempts=1), Canvas(), []
        worker = worker_for(server.url, canvas)
        thread = threading.Thread(target=lambda: turns.append(worker.turn()), daemon=True)
        thread.start()
        canvas.running.wait(60)
        assert canvas.calls == [[1, 2, 13, 4]] and [j["id"] for j in worker.snapshot()["jobs"]] == [job.id for job in jobs.values()]
        jobs[2].cancel()
        assert jobs[2].wait(60).status == "canceled" and not canvas.go.is_set(), "reported before the others are done"
        # Somebody takes the fourth away: released with its own token, then granted to another.
        other = Transport(server.url, TOKEN)
        token = worker.runs[3].grant.token
        other.call("POST", f"/gpu-jobs/{jobs[4].id}/release", body={"leaseToken": token})
        taken = other.call("GET", "/gpu-jobs/next", params={"worker": "other"}, headers={"X-Protocol": "1"})
        assert taken["job"]["id"] == jobs[4].id
        eventually(lambda: worker.runs[3].why == "lost", "the loss of the fourth job")
        assert [run.why for run in worker.runs] == [None, "canceled", None, "lost"]
        canvas.go.set()
        thread.join(60)
        assert [t.did for t in turns[0].jobs] == ["completed", "failed", "failed", "lost"] and turns[0].did == "failed"
        assert states(jobs) == {1: "completed", 2: "canceled", 13: "failed", 4: "leased"} and jobs[4].data["workerId"] == "other"
        assert jobs[13].detail == "Thirteen does not fit." and jobs[13].data["kind"] == "oom"
        assert jobs[1].result["batch_size"] == 4 and jobs[1].result["batch_index"] == 0 and jobs[1].png == png(colour=(1, 0, 0))
        assert worker.counts == {"completed": 1, "failed": 2, "released": 0, "lost": 1, "kept": 0} and worker.snapshot()["jobs"] == []
        lines = [line.partition(" at ")[0] for line in worker.lines]
        assert lines[:4] == [f"[worker] Leased job {job.id} (imagenGenerate)" for job in jobs.values()]
        assert f"[worker] Completed job {jobs[1].id}" in lines and f"[worker] Job failed {jobs[13].id}: Thirteen does not fit." in lines
        assert f"[worker] Job failed {jobs[2].id}: The job was canceled." in lines


def test_each_job_has_its_own_previews_and_files(server, client):
    canvas, jobs = Canvas(), submit(client, 1, 2, 3)
    seen = {n: [] for n in jobs}
    def follow(n):
        for event in jobs[n].events(): seen[n].append(event)
    threads = [threading.Thread(target=follow, args=(n,), daemon=True) for n in (1, 3)]
    for thread in threads: thread.start()
    eventually(lambda: len([c for c in server.app.broker.channels.values() if c.watchers]) == 2, "two watchers")
    worker = worker_for(server.url, canvas).start()
    for n in (1, 3): eventually(lambda n=n: any(e.kind == "preview" for e in seen[n]), "a preview")
    assert [canvas.contexts[n].watched for n in jobs] == [True, False, True]
    canvas.go.set()
    for thread in threads: thread.join(60)
    for n, job in jobs.items(): assert job.wait(60).png == png(colour=(n, 0, 0))
    worker.stop(grace_s=60)
    for n in (1, 3):
        previews = {e.data["image_base64"] for e in seen[n] if e.kind == "preview"}
        assert len(previews) == 1 and seen[n][-1].kind == "done" and seen[n][-1].data["id"] == jobs[n].id
    assert [jobs[n].result["batch_index"] for n in jobs] == [0, 1, 2]


@pytest.mark.parametrize(("most", "limit", "calls"), [(4, 16, [[1, 2, 3, 4], [5]]), (16, 2, [[1, 2], [3, 4], [5]]), (4, 1, [[n] for n in range(1, 6)])])
def test_the_executor_and_the_setting_limit_a_batch(server, client, most, limit, calls):
    jobs, canvas = submit(client, 1, 2, 3, 4, 5), Canvas(most, held=False)
    worker = worker_for(server.url, canvas, Quick(), WORKER_MAX_BATCH=limit)
    for _ in calls: assert worker.turn().did == "completed"
    assert canvas.calls == calls and set(states(jobs).values()) == {"completed"}
    assert ("batch_size" in jobs[1].result) == (len(calls[0]) > 1)


def test_the_command_line_limits_a_batch():
    assert build_parser().parse_args(["worker", "--max-batch", "3"]).max_batch == 3
    with pytest.raises(InvalidSetting, match="WORKER_MAX_BATCH"): worker_for("http://127.0.0.1:9", Canvas(), WORKER_MAX_BATCH=17)


def test_what_run_batch_raises_is_each_jobs_failure(server, client):
    class Broken(Canvas):
        def run_batch(self, jobs): raise RuntimeError("cuDNN has gone fishing")
    jobs = submit(client, 1, 2, 3, maxAttempts=1)
    worker = worker_for(server.url, Broken())
    assert [t.did for t in worker.turn().jobs] == ["failed"] * 3
    assert {job.refresh().detail for job in jobs.values()} == {"imagenGenerate failed on the worker: RuntimeError: cuDNN has gone fishing"}
    assert len(after(worker, "Traceback")) == 1, "one traceback for one error"


def test_too_few_results_are_said_so(server, client):
    class Short(Canvas):
        def run_batch(self, jobs): return super().run_batch(jobs)[:-1]
    jobs, worker = submit(client, 1, 2), worker_for(server.url, Short(held=False))
    worker.turn()
    assert all("ran 2 jobs in one call and returned 1 results" in job.refresh().detail and job.status == "failed" for job in jobs.values())


def test_a_failed_report_does_not_touch_the_others(tmp_path):
    "The second picture is too large for the server, the third one is none, which the worker finds out too late to say more than that."
    class Odd(Canvas):
        def run_batch(self, jobs):
            results = super().run_batch(jobs)
            jobs[1][1].artifact("image.png", png(noise=2_000_000), "image/png")
            jobs[2][1].artifacts = {"image.png": ("text", "image/png")}
            return results
    with serve(tmp_path, GPU_MAX_ARTIFACT_BYTES=4096) as server:
        jobs, worker = submit(Client(server.url, ""), 1, 2, 3), worker_for(server.url, Odd(held=False))
        turn = worker.turn()
        assert [t.did for t in turn.jobs] == ["completed", "failed", "failed"] and turn.pause_s > 0
        assert states(jobs) == {1: "completed", 2: "failed", 3: "leased"} and "4_096 bytes at most" in jobs[2].detail


def test_an_executor_without_batches_runs_leases_one_by_one_and_keeps_them(tmp_path):
    "A server may grant more than was asked for; no lease runs out while its job waits for its turn."
    class Single:
        tool = "imagenGenerate"
        def __init__(self): self.seeds = []
        def run(self, payload, ctx):
            self.seeds.append(payload["seed"])
            leases.append([server.app.broker.get(job.id).attempts for job in jobs.values()])
            first = server.app.broker.get(jobs[3].id).lease_until_ms
            if payload["seed"] == 1: eventually(lambda: server.app.broker.get(jobs[3].id).lease_until_ms > first + 1500, "a lease renewed while it waits")
            return {}
    leases = []
    with serve(tmp_path, GPU_HEARTBEAT_LEASE_SECONDS=1) as server:
        jobs, single = submit(Client(server.url, ""), 1, 2, 3), Single()
        worker = worker_for(server.url, single)
        head = {"X-Protocol": "1", "X-Worker-Instance": worker.instance}
        turn = serve_grants(worker, Grant.read_all(worker.asking.call("GET", "/gpu-jobs/next", params={"max": 3}, headers=head)))
        assert [t.did for t in turn.jobs] == ["completed"] * 3 and single.seeds == [1, 2, 3] and leases == [[1, 1, 1]] * 3


def test_a_batch_whose_answer_is_lost_is_had_again(server, client):
    jobs, canvas = submit(client, 1, 2, 3), Canvas(held=False)
    with Wire(server.url) as wire:
        wire.lose("GET /gpu-jobs/next")
        worker = worker_for(wire.url, canvas)
        assert worker.turn().did == "offline"
        canvas.most = 1  # meanwhile it takes fewer: all that was granted is run all the same
        assert worker.turn().did == "completed"
    assert canvas.calls == [[1], [2], [3]] and {job.refresh().data["attempts"] for job in jobs.values()} == {1}


def test_once_means_one_job(server, client):
    jobs, canvas = submit(client, 1, 2), Canvas(held=False)
    assert worker_for(server.url, canvas).loop(once=True).did == "completed"
    assert states(jobs) == {1: "completed", 2: "queued"}


# ---- the worker goes away


def test_a_killed_worker_costs_its_batch_nothing_but_time(tmp_path):
    with start_server(tmp_path / "data", GPU_HEARTBEAT_LEASE_SECONDS=1) as server, Client(server.url, "") as client:
        gate, mark = tmp_path / "gate", tmp_path / "mark"
        jobs = [client.submit("imagenGenerate", {"prompt": str(mark), "negative_prompt": str(gate), "seed": n}) for n in range(4)]
        with start_worker_process(server.url, "first", tools="canvas") as first:
            eventually(lambda: mark.exists() and mark.read_text() == "first 4\n", "four jobs in one call")
            first.kill()
            with start_worker_process(server.url, "second", tools="canvas"):
                for job in jobs: eventually(lambda job=job: job.refresh().data["attempts"] == 2, "another attempt")
                gate.touch()
                for job in jobs: assert job.wait(60).status == "completed" and job.data["workerId"] == "second"
        assert sum(int(line.split()[1]) for line in mark.read_text().splitlines()) == 8, "all four ran twice"


@pytest.mark.parametrize("stubborn", [False, True])
def test_stopping_in_a_batch_hands_all_of_it_back(server, client, stubborn):
    canvas, jobs = Canvas(stubborn=stubborn), submit(client, 1, 2, 3, 4)
    worker = worker_for(server.url, canvas).start()
    canvas.running.wait(60)
    assert worker.stop(timeout_s=0.1 if stubborn else 60) is not stubborn
    assert states(jobs) == dict.fromkeys(jobs, "queued") and {job.data["attempts"] for job in jobs.values()} == {0}
    assert len(after(worker, "Released job")) == 4 and worker.counts["released"] == 4
    canvas.go.set()
    assert worker.join(60) and set(states(jobs).values()) == {"queued"} and worker.counts["completed"] == 0


def test_draining_finishes_the_call_and_hands_back_what_has_not_begun(server, client):
    canvas, jobs = Canvas(), submit(client, 1, 2, 3, 4)
    canvas.batch_size = iter([4, 2]).__next__  # it asks for four, then finds that it takes two
    worker = worker_for(server.url, canvas)
    thread = threading.Thread(target=worker.turn, daemon=True)
    thread.start()
    canvas.running.wait(60)
    worker.drain()
    canvas.go.set()
    thread.join(60)
    assert canvas.calls == [[1, 2]] and states(jobs) == {1: "completed", 2: "completed", 3: "queued", 4: "queued"}
    assert {jobs[n].data["attempts"] for n in (3, 4)} == {0} and worker.counts == {"completed": 2, "failed": 0, "released": 2, "lost": 0, "kept": 0}


def test_an_interrupt_in_the_foreground_hands_the_batch_back(server, client):
    class Interrupt(Canvas):
        def run_batch(self, jobs): raise KeyboardInterrupt
    jobs, worker = submit(client, 1, 2, 3), worker_for(server.url, Interrupt())
    with pytest.raises(KeyboardInterrupt): worker.turn()
    assert set(states(jobs).values()) == {"queued"} and {job.data["attempts"] for job in jobs.values()} == {0} and worker.runs == ()


# ---- the reference's server


def test_the_reference_is_asked_for_one_job_at_a_time_and_for_no_orders():
    with start_reference() as server:
        jobs, canvas = submit(Client(server.url, ""), 1, 2), Canvas(held=False)
        worker = worker_for(server.url, canvas)
        assert [worker.turn().did for _ in range(3)] == ["completed", "completed", "idle"]
        assert canvas.calls == [[1], [2]] and set(states(jobs).values()) == {"completed"} and "batch_size" not in jobs[1].result
        assert worker.ear.transport.requests_made == 0 and not any("orders" in (line or "") for line in server.lines)


# ---- orders


def test_a_cancel_reaches_a_run_without_a_heartbeat(tmp_path):
    "The lease's heartbeats are twenty seconds apart and none has been sent; the run hears of its cancel all the same."
    with start_server(tmp_path / "data") as server, Client(server.url, "") as client:
        jobs, canvas = submit(client, 1, 2), Canvas(quiet=True)
        worker = worker_for(server.url, canvas).start()
        canvas.running.wait(60)
        heart = worker.pulse.hearts[1]
        jobs[2].cancel()
        eventually(lambda: canvas.contexts[2].why == "canceled", "the order")
        assert heart.last == heart.began or heart.last - heart.began >= 20, "no heartbeat brought it, unless this took twenty seconds"
        assert jobs[2].wait(60).status == "canceled" and jobs[1].refresh().status == "leased"
        canvas.go.set()
        assert jobs[1].wait(60).status == "completed"
        worker.stop(grace_s=60)


@pytest.mark.parametrize("order", ["cancel", "watch"])
def test_an_order_whose_answer_is_lost_is_given_again(server, client, order):
    with Wire(server.url) as wire:
        canvas, [job] = Canvas(quiet=True), submit(client, 1).values()
        worker = worker_for(wire.url, canvas).start()
        wire.lose("GET /gpu-jobs/orders")
        canvas.running.wait(60)
        eventually(lambda: server.app.broker.roster.workers[worker.instance].ears, "an open ear")
        if order == "cancel": job.cancel()
        else: threading.Thread(target=lambda: list(job.events()), daemon=True).start()
        ctx = canvas.contexts[1]
        eventually(lambda: ctx.why == "canceled" if order == "cancel" else ctx.watched, "the order")
        assert wire.lost.is_set() and len(wire.heads("GET /gpu-jobs/orders")) >= 2
        canvas.go.set()
        worker.stop(grace_s=60)


def test_one_request_waits_for_the_orders_to_many_jobs(server, client):
    "Jobs that come and go leave the held request alone."
    jobs = [client.submit("errand") for _ in range(30)]
    worker = worker_for(server.url).start()
    for job in jobs: assert job.wait(60).status == "completed"
    assert worker.ear.transport.requests_made == 1
    worker.stop()


def test_a_server_that_gives_no_orders_is_asked_once(server, client):
    server.app.router._literal.pop("/gpu-jobs/orders")  # as a server of ours from before there were any
    jobs, canvas = submit(client, 1), Canvas(held=False)
    worker = worker_for(server.url, canvas).start()
    assert jobs[1].wait(60).status == "completed"
    eventually(lambda: worker.ear.deaf, "deafness")
    assert client.submit("imagenGenerate", {"prompt": "x", "seed": 2}).wait(60).status == "completed"
    worker.stop()
    assert worker.ear.transport.requests_made == 1 and not after(worker, "Traceback")


def test_a_busy_worker_is_known_again_after_the_server_was_restarted(tmp_path):
    with start_server(tmp_path / "data", GPU_HEARTBEAT_LEASE_SECONDS=2) as first:
        client = Client(first.url, "")
        jobs, canvas = submit(client, 1), Canvas()
        worker = worker_for(first.url, canvas).start()
        canvas.running.wait(60)
        first.kill()
        with start_server(tmp_path / "data", port=first.port, GPU_HEARTBEAT_LEASE_SECONDS=60):
            link = Transport(first.url)
            def known(): return [w for w in link.call("GET", "/workers")["workers"] if w["instance"] == worker.instance and w["jobs"]]
            [seen] = eventually(lambda: known(), "the worker and its job")
            assert seen["tools"] == ["imagenGenerate"] and seen["live"]
            jobs[1].cancel()
            assert jobs[1].wait(60).status == "canceled"
            worker.stop()


def test_orders_are_for_the_worker_that_has_the_job(server, client):
    def ask(instance, **query): return link.call("GET", "/gpu-jobs/orders", params=query, headers={"X-Protocol": "1", "X-Worker-Instance": instance})
    job, link = client.submit("errand"), Transport(server.url, TOKEN)
    lease = link.call("GET", "/gpu-jobs/next", headers={"X-Protocol": "1", "X-Worker-Instance": "one"})["lease"]
    assert lease["watchers"] == 0 and ask("one") is None
    job.cancel()
    assert ask("one") == {"jobs": [{"id": job.id, "cancelRequested": True, "watchers": 0}], "drain": False}
    assert ask("two") is None and ask("one", canceled=job.id) is None
    server.app.broker.roster.workers["one"].draining = True
    assert ask("one", canceled=job.id) == {"jobs": [], "drain": True} and ask("one", canceled=job.id, draining=1) is None
    link.call("POST", f"/gpu-jobs/{job.id}/release", body={"leaseToken": lease["token"]})
    assert ask("one", draining=1) is None and job.refresh().status == "canceled"
    for params, refused in (({"wait": 99}, InvalidPayload), ({"canceled": "x" * 999}, InvalidPayload)):
        with pytest.raises(refused): ask("one", **params)
    with pytest.raises(MissingToken): Transport(server.url).call("GET", "/gpu-jobs/orders")
    shown = link.call("GET", "/openapi.json")["paths"]["/gpu-jobs/orders"]["get"]
    assert shown["security"] == [{"workerToken": []}] and {"wait", "canceled", "watched"} <= {p["name"] for p in shown["parameters"]}


def test_a_lease_says_how_many_watch_already(server, client):
    job, link = client.submit("errand"), Transport(server.url, TOKEN)
    threading.Thread(target=lambda: list(job.events()), daemon=True).start()
    eventually(lambda: any(c.watchers for c in server.app.broker.channels.values()), "a watcher")
    grant = Grant.read(link.call("GET", "/gpu-jobs/next", headers={"X-Protocol": "1"}))
    assert grant.watchers == 1
    link.call("POST", f"{grant.path}/complete", body={"leaseToken": grant.token, "status": "completed", "result": {}})


def test_a_server_that_stops_answers_who_waits_for_orders(server):
    answers, link = [], Transport(server.url, TOKEN)
    def ask(): answers.append(link.call("GET", "/gpu-jobs/orders", params={"worker": "w", "wait": 50}))
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    eventually(lambda: "w" in server.app.broker.roster.workers and server.app.broker.roster.workers["w"].ears, "an open ear")
    server.stop()
    thread.join(60)
    assert answers == [None], "an empty answer, not a broken connection"


def test_stopping_hangs_up_the_ear(server, client):
    worker = worker_for(server.url).start()
    client.submit("errand").wait(60)
    eventually(lambda: server.app.broker.roster.workers[worker.instance].ears, "an open ear")
    assert worker.stop()
    eventually(lambda: not server.app.broker.roster.workers[worker.instance].ears, "a closed ear")
    eventually(lambda: worker.ear._thread is None, "the end of its thread")


# ---- in all


def test_forty_pictures_over_a_bad_line_with_cancels_at_random(tmp_path):
    "Two workers in batches of four; answers of every sort are lost. Each job ends once: canceled only if somebody asked for that."
    class Sketch(Canvas):
        def _paint(self, jobs):
            ends = []
            for payload, ctx in jobs:
                try:
                    for step in range(5): ctx.check(); ctx.progress(step, 5); pause.wait(0.002)
                    ctx.artifact("image.png", png(), "image/png")
                    ends.append({"seed": payload["seed"]})
                except Interrupted as e: ends.append(e)
            return ends
    chance, pause = random.Random(7), threading.Event()
    with serve(tmp_path) as server, Wire(server.url) as wire:
        client = Client(server.url, "")
        jobs = submit(client, *range(40))
        lost = ["GET /gpu-jobs/next", "/complete ", "PUT /gpu-jobs/", "GET /gpu-jobs/orders"]
        for _ in range(20): wire.lose(chance.choice(lost[:3]), after=chance.choice([0, 0, 50]))
        workers = [worker_for(wire.url, Sketch(), WORKER_ID=f"w{n}", options={"sleep": lambda s: pause.wait(0.01)}).start() for n in range(2)]
        canceled = chance.sample(sorted(jobs), 10)
        for n in canceled:
            wire.lose(lost[3])
            jobs[n].cancel()
        for n, job in jobs.items():
            job.wait(60)
            assert job.status == "completed" or (job.status == "canceled" and n in canceled), (n, job, job.detail)
            if job.status == "completed": assert job.png == png() and job.result["seed"] == n and job.data["attempts"] == 1
        for worker in workers: assert worker.stop(grace_s=60)
        done = sum(job.status == "completed" for job in jobs.values())
        assert done >= 30 and sum(w.counts["completed"] for w in workers) == done and not any(after(w, "Traceback") for w in workers)


# ---- the accelerator's news


def test_info_may_be_a_function(server, client):
    free = iter(range(1000, 0, -1))
    worker = worker_for(server.url, options={"info": lambda: {"accelerator": "Tesla T4", "memory": next(free)}})
    for _ in range(2):
        client.submit("errand")
        worker.turn()
    [seen] = Transport(server.url).call("GET", "/workers")["workers"]
    assert (seen["accelerator"], seen["memory"]) == ("Tesla T4", "999")
