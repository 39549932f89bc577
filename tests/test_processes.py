"""From end to end with real processes: what is killed, stopped or restarted loses nothing."""

import base64
import contextlib
import hashlib
import http.client
import json
import random
import signal
import sqlite3
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import TOKEN

from colab_gpu.client import Client, Transport
from colab_gpu.errors import ColabGPUError, ConnectionFailed, LeaseLost, TunnelDown

ROOT = Path(__file__).resolve().parent.parent
OURS = {"X-Protocol": "1", "X-Worker-Instance": "test"}


def lease(link, worker="w", **params):
    return link.call("GET", "/gpu-jobs/next", params={"worker": worker, **params}, headers=OURS)


def test_a_job_from_end_to_end(serve, work):
    server = serve()
    worker, client = work(server.url), Client(server.url, "")
    job = client.submit("sleepy", {"seconds": 0.5})
    kinds = [event.kind for event in client.events(job.id)]
    job.refresh()
    assert job.result == {"slept": 0.5, "by": "w1"} and kinds[-1] == "done" and "progress" in kinds
    assert client.artifact(job.id, "note.txt") == b"slept "
    worker.wait_for(rf"Worker loop started for w1 at {server.url}")
    worker.wait_for(rf"\[worker\] Leased job {job.id} \(sleepy\) at ")
    worker.wait_for(rf"\[worker\] Completed job {job.id}")
    assert server.process.end() == 0
    history = (server.data / "logs" / "gpu_job_history.md").read_text()
    assert history.count(f"| {job.id} | sleepy | completed | w1 |") == 1


def test_server_killed_between_any_two_calls(serve):
    server = serve(GPU_HEARTBEAT_LEASE_SECONDS=600)
    client, link = Client(server.url, ""), Transport(server.url, TOKEN)

    def again():
        server.kill()
        server.start()

    job = client.submit("errand", {"n": 1}, key="once")
    again()
    assert client.submit("errand", {"n": 1}, key="once").id == job.id
    first = lease(link)
    again()
    assert first["job"]["id"] == job.id and client.job(job.id).status == "leased"
    token, path = first["lease"]["token"], f"/gpu-jobs/{job.id}"
    again()
    link.call("POST", path + "/heartbeat", body={"leaseToken": token})
    data = random.Random(3).randbytes(300_000)
    head = {"X-Lease-Token": token, "X-Content-SHA256": hashlib.sha256(data).hexdigest(), "Content-Type": "image/png"}
    link.call("PUT", path + "/artifacts/image.png", data=data, headers=head)
    again()
    done = {"leaseToken": token, "status": "completed", "result": {"seed": 7}, "artifacts": ["image.png"]}
    link.call("POST", path + "/complete", body=done)
    again()
    assert link.call("POST", path + "/complete", body=done)["job"]["status"] == "completed"
    job = client.job(job.id)
    assert job.png == data and job.result["seed"] == 7
    assert job.result["image_base64"] == "data:image/png;base64," + base64.b64encode(data).decode()
    again()
    server.process.end()
    assert (server.data / "logs" / "gpu_job_history.md").read_text().count(job.id) == 1
    assert [p.read_bytes() for p in (server.data / "logs" / "images").iterdir()] == [data]


def test_server_killed_under_load_loses_nothing_acknowledged(serve):
    server, acknowledged, stop = serve(GPU_MAX_PENDING_JOBS=100_000), [], threading.Event()

    def submit(n):
        connection = None
        while not stop.is_set():
            try:
                connection = connection or http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
                connection.request("POST", "/gpu-jobs", json.dumps({"tool": "errand", "payload": {"n": n}}), {"Content-Type": "application/json"})
                acknowledged.append(json.loads(connection.getresponse().read())["job"]["id"])
            except (OSError, http.client.HTTPException, ValueError):
                connection = None
                stop.wait(0.02)

    threads = [threading.Thread(target=submit, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for round_ in range(1, 4):
        while len(acknowledged) < 400 * round_:
            time.sleep(0.01)
        server.kill()
        server.start()
    stop.set()
    for thread in threads:
        thread.join()
    client, stored, before = Client(server.url, ""), set(), None
    while page := client.jobs(limit=200, before=before):
        stored |= {job.id for job in page}
        before = page[-1].id
    assert set(acknowledged) <= stored and len(acknowledged) >= 1200


def test_worker_survives_a_server_restart(serve, work):
    server = serve()
    worker, client = work(server.url), Client(server.url, "")
    job = client.submit("sleepy", {"seconds": 2})
    worker.wait_for("BEGUN")
    server.kill()
    server.start()
    assert job.wait(60).status == "completed" and job.data["attempts"] == 1


def run_out(server):
    "While the server is down, every lease runs out."
    server.kill()
    with contextlib.closing(sqlite3.connect(server.data / "queue.db")) as db, db:
        assert db.execute("UPDATE jobs SET lease_until_ms = 1 WHERE status = 'leased'").rowcount
    server.start()


def test_leases_that_ran_out_while_the_server_was_down_can_be_renewed(serve):
    server = serve()
    client, link = Client(server.url, ""), Transport(server.url, TOKEN)
    job = client.submit("errand")
    token = lease(link, "w1")["lease"]["token"]
    run_out(server)
    assert lease(link, "w2", wait=1) is None, "its worker could not renew it, and has half a lease to do so now"
    link.call("POST", f"/gpu-jobs/{job.id}/heartbeat", body={"leaseToken": token})
    assert client.job(job.id).data["attempts"] == 1


def test_a_lease_that_nobody_renews_ends_after_a_restart_too(serve):
    server = serve(GPU_HEARTBEAT_LEASE_SECONDS=1)
    client, link = Client(server.url, ""), Transport(server.url, TOKEN)
    job = client.submit("errand")
    lease(link, "w1")
    run_out(server)
    assert lease(link, "w2", wait=50)["job"]["id"] == job.id


def test_worker_killed_in_the_middle(serve, work):
    server = serve(GPU_HEARTBEAT_LEASE_SECONDS=2)
    first, client = work(server.url, "w1"), Client(server.url, "")
    job = client.submit("sleepy", {"seconds": 3})
    first.wait_for("BEGUN")
    second = work(server.url, "w2")
    first.kill()
    second.wait_for("BEGUN")
    assert job.wait(60).result == {"slept": 3, "by": "w2"} and job.data["attempts"] == 2


def test_worker_asleep_past_its_lease_is_fenced_off(serve, work):
    server = serve(GPU_HEARTBEAT_LEASE_SECONDS=1)
    first, client = work(server.url, "w1"), Client(server.url, "")
    job = client.submit("sleepy", {"seconds": 2})
    first.wait_for("BEGUN")
    first.signal(signal.SIGSTOP)
    second = work(server.url, "w2")
    second.wait_for("BEGUN")
    first.signal(signal.SIGCONT)
    first.wait_for(rf"(no longer ours|was not taken|Released job {job.id})")
    assert job.wait(60).result["by"] == "w2"
    assert not any(line and f"Completed job {job.id}" in line for line in first.lines)


def test_late_writes_with_an_old_token_are_refused(serve):
    server = serve(GPU_HEARTBEAT_LEASE_SECONDS=1)
    client, link = Client(server.url, ""), Transport(server.url, TOKEN)
    job = client.submit("errand")
    old = lease(link, "w1")["lease"]["token"]
    new = lease(link, "w2", wait=20)["lease"]["token"]
    path = f"/gpu-jobs/{job.id}"
    writes = [lambda t: link.call("POST", path + "/heartbeat", body={"leaseToken": t}),
              lambda t: link.call("PUT", path + "/artifacts/x.txt", data=t.encode(), headers={"X-Lease-Token": t}),
              lambda t: link.call("POST", path + "/release", body={"leaseToken": t}),
              lambda t: link.call("POST", path + "/complete", body={"leaseToken": t, "status": "error", "detail": "late"}),
              lambda t: link.call("POST", path + "/complete", body={"leaseToken": t, "status": "completed", "result": {"who": "old"}})]
    for write in writes:
        with pytest.raises(LeaseLost):
            write(old)
    writes[1](new)
    link.call("POST", path + "/complete", body={"leaseToken": new, "status": "completed", "result": {"who": "new"}, "artifacts": ["x.txt"]})
    assert client.job(job.id).result == {"who": "new"} and client.artifact(job.id, "x.txt") == new.encode()
    with pytest.raises(LeaseLost):
        writes[4](old)


def test_cancel_stops_a_running_worker(serve, work):
    server = serve(GPU_HEARTBEAT_LEASE_SECONDS=3)
    worker, client = work(server.url), Client(server.url, "")
    job = client.submit("sleepy", {"seconds": 600})
    worker.wait_for("BEGUN")
    job.cancel()
    assert job.wait(60).status == "canceled"
    assert client.submit("sleepy", {"seconds": 0.1}).wait(60).status == "completed", "the worker goes on"


def test_waiting_callers_are_answered_when_the_server_stops(serve):
    server = serve()
    client, link = Client(server.url, ""), Transport(server.url, TOKEN)
    job, answers = client.submit("errand", requirements=["nobody"]), []
    threads = [threading.Thread(target=lambda: answers.append(client.transport.call("GET", f"/gpu-jobs/{job.id}", params={"wait": 50}))),
               threading.Thread(target=lambda: answers.append(lease(link, wait=50))),
               threading.Thread(target=lambda: answers.append(client.transport.send("GET", f"/gpu-jobs/{job.id}/events", stream=True).content))]
    for thread in threads:
        thread.start()
    while not any(w["waiting"] for w in client.workers()):
        time.sleep(0.02)
    time.sleep(0.3)
    assert server.process.end() == 0
    for thread in threads:
        thread.join(20)
    assert len(answers) == 3 and None in answers


def test_a_large_artifact_in_constant_memory(serve):
    server = serve()
    client, link = Client(server.url, ""), Transport(server.url, TOKEN)
    psutil = pytest.importorskip("psutil")
    memory = psutil.Process(server.process.popen.pid)
    job = client.submit("errand")
    token = lease(link)["lease"]["token"]
    data = random.Random(1).randbytes(1 << 20) * 64
    before = memory.memory_info().rss
    head = {"X-Lease-Token": token, "X-Content-SHA256": hashlib.sha256(data).hexdigest()}
    link.call("PUT", f"/gpu-jobs/{job.id}/artifacts/big.bin", data=data, headers=head)
    link.call("POST", f"/gpu-jobs/{job.id}/complete", body={"leaseToken": token, "status": "completed", "result": {}, "artifacts": ["big.bin"]})
    assert client.artifact(job.id, "big.bin") == data
    assert memory.memory_info().rss - before < 20 << 20, "64 MiB went through"


def test_our_worker_on_the_references_server(processes, work):
    reference = processes(sys.executable, ROOT / "tests" / "reference_server.py", GPU_WORKER_TOKEN=TOKEN)
    url = "http://127.0.0.1:" + reference.wait_for(r"^(\d+)$")[1]
    worker, client = work(url), Client(url, "")
    good, bad = client.submit("sleepy", {"seconds": 0.2}), client.submit("unknown-tool")
    assert good.wait(60).result == {"slept": 0.2, "by": "w1"}
    assert bad.wait(60).status == "failed" and "no tool unknown-tool" in bad.detail
    worker.wait_for(rf"Job failed {bad.id}")


def test_a_reference_worker_on_our_server(serve):
    server = serve()
    client, link = Client(server.url, ""), Transport(server.url, TOKEN)
    job = client.submit("imagenGenerate", {"prompt": "x", "width": "512"}, priority="high")
    answer = link.call("GET", "/gpu-jobs/next", params={"worker": "colab-worker"})
    assert list(answer) == ["job"] and answer["job"]["status"] == "leased" and answer["job"]["payload"] == {"prompt": "x", "width": "512"}
    assert link.call("GET", "/gpu-jobs/next", params={"worker": "colab-worker"}) is None
    url = "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
    done = link.call("POST", f"/gpu-jobs/{job.id}/complete", body={"status": "completed", "result": {"image_base64": url, "seed": 1}})
    assert done["job"]["status"] == "completed"
    with pytest.raises(ColabGPUError) as caught:
        link.call("POST", f"/gpu-jobs/{job.id}/complete", body={"status": "error", "detail": "again"})
    assert caught.value.code == "job_not_in_progress"
    assert client.job(job.id).result == {"image_base64": url, "seed": 1}


def test_a_wrong_token_ends_the_worker_with_a_sentence(serve, work):
    server = serve()
    worker = work(server.url, STACK_WORKER_TOKEN="wrong-token-value")
    worker.wait_for("refused the token.*GPU_WORKER_TOKEN")
    assert worker.popen.wait(20) == 0
    assert not any("wrong-token-value" in (line or "") for line in worker.lines)


def test_a_tunnels_page_is_not_the_server(processes):
    page = processes(sys.executable, "-c", """
from http.server import *
class H(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404); self.send_header('Content-Type', 'text/html'); self.end_headers(); self.wfile.write(b'<html>ERR_NGROK_3200</html>')
s = HTTPServer(('127.0.0.1', 0), H); print(s.server_port, flush=True); s.serve_forever()""")
    with pytest.raises(TunnelDown, match="ERR_NGROK_3200"):
        Transport("http://127.0.0.1:" + page.wait_for(r"^(\d+)$")[1]).call("GET", "/healthz")


def test_events_go_on_after_the_server_was_killed(serve, work):
    server = serve()
    worker, client = work(server.url), Client(server.url, "")
    job, seen = client.submit("sleepy", {"seconds": 3}), []
    follower = threading.Thread(target=lambda: seen.extend(client.events(job.id)))
    follower.start()
    worker.wait_for("BEGUN")
    server.kill()
    server.start()
    follower.join(60)
    assert seen[-1].kind == "done" and seen[-1].data["status"] == "completed"


def test_two_servers_do_not_share_a_folder(serve, processes):
    server = serve()
    second = processes(sys.executable, "-m", "colab_gpu", "serve", "--port", "0", "--data", server.data, GPU_WORKER_TOKEN=TOKEN)
    assert second.popen.wait(20) == 2
    second.wait_for("Another server is using")


def test_nobody_listens():
    with pytest.raises(ConnectionFailed, match="Nothing listens"):
        Transport("http://127.0.0.1:9").call("GET", "/healthz")
