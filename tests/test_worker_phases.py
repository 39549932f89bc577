"""A worker that is killed in each phase of a job, and what it costs to wait: the requests of an idle worker, the pauses that servers ask for."""

import pytest
from processes import Wire, eventually, kept_results, start_server, start_worker_process
from test_client import canned
from test_worker import Quick, serve, worker_for

from colab_gpu.client import Client
from colab_gpu.errors import ConnectionFailed, Unavailable
from colab_gpu.worker import pause_after


@pytest.mark.parametrize("how", ["kill", "SIGTERM"])
@pytest.mark.parametrize("phase", ["pulling a-model", "loading", "running"])
def test_interrupted_in_any_phase_the_job_goes_to_another(tmp_path, phase, how):
    payload = {"gate": str(tmp_path / "gate"), "mark": str(tmp_path / "mark"), "phase": phase}
    with start_server(tmp_path / "data", GPU_HEARTBEAT_LEASE_SECONDS=2) as server:
        client = Client(server.url, "")
        with start_worker_process(server.url) as first:
            job = client.submit("gate", payload)
            eventually(lambda: any(e.kind == "progress" and e.data.get("phase") == phase for e in newest(job)))
            if how == "kill":
                first.kill()
            else:
                first.popen.terminate()
                first.line("Finishing the job under way")
                first.popen.terminate()  # the first lets the job finish, the second hands it back
                first.popen.wait(60)
        with start_worker_process(server.url, "cellar"):
            eventually(lambda: len((tmp_path / "mark").read_text().split()) == 2, "the second run")
            (tmp_path / "gate").touch()
            done = job.wait(60)
    assert (done.status, done.result, done.data["attempts"]) == ("completed", {"by": "cellar"}, 2 if how == "kill" else 1)


def newest(job):
    "The first few events of a job that is under way."
    for n, event in enumerate(job.events()):
        yield event
        if n > 20: return


@pytest.mark.parametrize("step", ["PUT ", "/complete"])
def test_killed_while_it_sends_the_result_is_sent_by_the_next(tmp_path, step):
    with start_server(tmp_path / "data", GPU_HEARTBEAT_LEASE_SECONDS=2) as server, Wire(server.url) as wire:
        job = Client(server.url, "").submit("imagenGenerate", {"prompt": "x"})
        wire.hold(step)
        with start_worker_process(wire.url, tools="paint", COLAB_GPU_DATA=tmp_path / "work") as first:
            assert wire.held.wait(60)
            first.kill()
        wire.let_go()
        with start_worker_process(wire.url, "cellar", tools="paint", COLAB_GPU_DATA=tmp_path / "work"):
            done = job.wait(60)
            eventually(lambda: not kept_results(tmp_path / "work"), "the outbox to be empty")
    assert (done.status, done.data["attempts"], done.png[:4]) == ("completed", 1, b"\x89PNG")


def test_an_idle_worker_sends_nothing_but_its_long_polls(tmp_path):
    with serve(tmp_path) as server, Wire(server.url) as wire:
        worker = worker_for(wire.url, Quick(), WORKER_WAIT_SECONDS=0.5).start()
        eventually(lambda: len(wire.requests) >= 6)
        assert worker.stop(5)
    # One request a wait: 72 an hour at the 50 s that is the default.
    assert all(r.startswith("GET /gpu-jobs/next?") and "wait=0.5" in r for r in wire.requests[:6])
    assert worker_for("http://127.0.0.1:9").wait_s == 50


def test_it_waits_as_long_as_the_server_says_and_else_ever_longer():
    busy = Unavailable("Too many requests.")
    busy.retry_after = 120.0
    assert pause_after(busy, 1) == 120
    pauses = [[pause_after(ConnectionFailed("Nobody there."), tries) for _ in range(50)] for tries in (1, 2, 5, 50)]
    for low, high, seen in zip((0.5, 1, 8, 15), (1, 2, 16, 30), pauses, strict=True): assert low <= min(seen) < max(seen) <= high


def test_a_server_that_speaks_no_protocol_of_ours_ends_the_loop_with_a_sentence():
    body = b'{"error": "invalid_payload", "message": "This server speaks worker protocol 2: use a newer worker.", "retryable": false}'
    url, _ = canned((400, {"Content-Type": "application/json"}, body))
    worker = worker_for(url).start()
    assert worker.join(30) and worker.last_error.startswith("This server speaks worker protocol 2")
