"""Webhooks between real processes: our server, a worker, and a receiver that is busy, hangs, redirects, or talks nonsense."""

import asyncio
import base64
import hashlib
import hmac
import http.client
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from ipaddress import ip_network
from pathlib import Path

import pytest

from colab_gpu import broker as rules
from colab_gpu.broker import Broker
from colab_gpu.errors import Unavailable
from colab_gpu.jobs import JobSpec
from colab_gpu.store import MemoryStore
from colab_gpu.webhooks import Webhooks, WebhookPolicy

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "worker-token-for-tests"
SECRET = "a-secret-for-webhooks-in-tests"
HERE = {"GPU_WEBHOOK_SECRET": SECRET, "GPU_WEBHOOK_NETWORKS": "127.0.0.0/8", "GPU_WEBHOOK_RETRY_SECONDS": 0.05, "GPU_WEBHOOK_TIMEOUT_SECONDS": 30}
LONG_S = 60  # only how long something broken may hang before a test says so


def ask(server, method, path, body=None, token=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LONG_S)
    head = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    connection.request(method, path, None if body is None else json.dumps(body), {**head, **{k.replace("_", "-"): v for k, v in headers.items()}})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text) if text[:1] == b"{" else text.decode()


def submit(server, webhook, **body):
    status, answer = ask(server, "POST", "/gpu-jobs", {"tool": "errand", "webhook": webhook, **body})
    assert status == 200, answer
    return answer["job"]["id"]


def ended(server, webhook, **body):
    """A job that was canceled."""
    job_id = submit(server, webhook, **body)
    assert ask(server, "POST", f"/gpu-jobs/{job_id}/cancel")[1]["job"]["status"] == "canceled"
    return job_id


def status_of(server, job_id, *states):
    """The webhook's status, once it is one of `states`."""
    deadline = time.monotonic() + LONG_S
    while True:
        found = ask(server, "GET", f"/gpu-jobs/{job_id}")[1]["job"]["webhookStatus"]
        if not states or found["state"] in states:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


class Receiver:
    def __init__(self, start, port=0, *certificate):
        self._start, self._certificate, self.port = start, certificate, port
        self.start()

    def start(self):
        self.process = self._start(sys.executable, ROOT / "tests" / "webhook_receiver.py", self.port, *self._certificate)
        self.port = int(self.process.wait_for(r"receives at (\d+)")[1])
        self.url = f"{'https' if self._certificate else 'http'}://{'localhost' if self._certificate else '127.0.0.1'}:{self.port}"
        return self

    @property
    def notes(self):
        return [json.loads(line) for line in self.process.lines if line and line.startswith("{")]

    def wait_for(self, count, path=""):
        for n in range(count):
            self.process.wait_for(rf'^{{"request": "POST {path}', LONG_S, skip=n)
        return [note for note in self.notes if re.match(f"POST {path}", note["request"])]


@pytest.fixture
def receiver(processes):
    return Receiver(processes)


def genuine(note):
    """The JSON of a note, after checking its signature by hand, as the standard says."""
    head = note["headers"]
    signed = f"{head['webhook-id']}.{head['webhook-timestamp']}.{note['body']}".encode()
    wanted = base64.b64encode(hmac.new(SECRET.encode(), signed, hashlib.sha256).digest()).decode()
    assert head["webhook-signature"] == f"v1,{wanted}" and int(head["webhook-timestamp"]) > 1_600_000_000
    return json.loads(note["body"])


def counters(server):
    lines = [line.rpartition(" ") for line in ask(server, "GET", "/metrics")[1].splitlines() if "webhooks" in line and line[0] != "#"]
    return {name.removeprefix("colab_gpu_webhooks_"): int(value) for name, _, value in lines}


# ---- what is told


def test_the_end_of_a_job_is_told_with_links_and_a_signature(serve, work, receiver):
    server = serve(**HERE)
    job_id = submit(server, receiver.url + "/done?key=k3y", tool="sleepy", payload={"seconds": 0.1, "size": 3})
    assert status_of(server, job_id) == {"to": receiver.url, "state": "waiting", "attempts": 0, "lastStatus": None, "deliveredAt": None}
    work(server.url)
    [note] = receiver.wait_for(1)
    told, job = genuine(note), status_of(server, job_id, "delivered") and ask(server, "GET", f"/gpu-jobs/{job_id}")[1]["job"]
    assert note["request"] == "POST /done?key=k3y HTTP/1.1" and note["headers"]["host"] == f"127.0.0.1:{receiver.port}"
    assert note["headers"]["webhook-id"] == job_id and note["headers"]["content-type"] == "application/json"
    status = job.pop("webhookStatus")
    assert told["type"] == "job.completed" and told["data"]["job"] == job and job["result"] == {"slept": 0.1, "by": "w1"}
    assert told["data"]["job"]["artifacts"][0]["href"] == f"/gpu-jobs/{job_id}/artifacts/note.txt"
    assert (status["attempts"], status["lastStatus"], status["to"]) == (1, 200, receiver.url) and status["deliveredAt"] >= job["completedAt"]
    assert counters(server) == {'total{event="delivered"}': 1, 'total{event="failed"}': 0, 'total{event="retried"}': 0, "pending": 0}


def test_pictures_are_links(serve, receiver):
    server = serve(**HERE)
    job_id = submit(server, receiver.url, tool="imagenGenerate", payload={"prompt": "x", "init_image": base64.b64encode(b"\x89PNG\r\n\x1a\n small").decode()})
    ask(server, "GET", "/gpu-jobs/next?worker=w", token=TOKEN)
    picture = "data:image/png;base64," + base64.b64encode(b"\x89PNG pretends").decode()
    ask(server, "POST", f"/gpu-jobs/{job_id}/complete", {"status": "completed", "result": {"image_base64": picture, "seed": 7}}, TOKEN)
    [note] = receiver.wait_for(1)
    job = genuine(note)["data"]["job"]
    assert job["result"] == {"seed": 7} and job["artifacts"][0]["name"] == "image.png" and "payload" not in job and "base64" not in note["body"]


def test_every_sort_of_end_is_told(serve, receiver):
    server = serve(**HERE)
    canceled = ended(server, receiver.url + "/canceled")
    failed = submit(server, receiver.url + "/failed")
    lease = ask(server, "GET", "/gpu-jobs/next?worker=w", token=TOKEN, X_Protocol="1")[1]
    assert "webhook" not in json.dumps(lease["job"]["payload"]) and receiver.url + "/" not in json.dumps(lease), "a worker is not told the address"
    ask(server, "POST", f"/gpu-jobs/{failed}/complete", {"status": "error", "detail": "No such luck.", "leaseToken": lease["lease"]["token"]}, TOKEN)
    expired = submit(server, receiver.url + "/expired", queueTimeoutSeconds=0.01)
    told = {genuine(note)["data"]["job"]["id"]: genuine(note) for note in receiver.wait_for(3)}
    assert {job_id: note["type"] for job_id, note in told.items()} == {canceled: "job.canceled", failed: "job.failed", expired: "job.failed"}
    assert told[failed]["data"]["job"]["detail"] == "No such luck." and told[expired]["data"]["job"]["kind"] == "timeout"


def test_a_requeued_job_is_not_told_and_a_retried_one_is_told_again(serve, receiver):
    server = serve(**HERE)
    job_id = submit(server, receiver.url)
    token = ask(server, "GET", "/gpu-jobs/next?worker=w", token=TOKEN, X_Protocol="1")[1]["lease"]["token"]
    ask(server, "POST", f"/gpu-jobs/{job_id}/release", {"leaseToken": token}, TOKEN)
    assert status_of(server, job_id)["state"] == "waiting"
    ask(server, "POST", f"/gpu-jobs/{job_id}/cancel")
    status_of(server, job_id, "delivered")
    again = ask(server, "POST", f"/gpu-jobs/{job_id}/retry")[1]["job"]["id"]
    ask(server, "POST", f"/gpu-jobs/{again}/cancel")
    assert [genuine(note)["data"]["job"]["id"] for note in receiver.wait_for(2)] == [job_id, again]


# ---- receivers that don't do as they should


def test_a_busy_receiver_is_asked_again_with_the_same_note(serve, receiver):
    server = serve(**HERE)
    job_id = ended(server, receiver.url + "/busy/3")
    notes = receiver.wait_for(4)
    status = status_of(server, job_id, "delivered")
    assert (status["attempts"], status["lastStatus"]) == (4, 200) and "lastError" not in status
    assert {note["headers"]["webhook-id"] for note in notes} == {job_id} and len({note["body"] for note in notes}) == 1 and all(map(genuine, notes))
    assert counters(server)['total{event="retried"}'] == 3


def test_attempts_come_to_an_end(serve, receiver):
    server = serve(**HERE, GPU_WEBHOOK_ATTEMPTS=3)
    status = status_of(server, ended(server, receiver.url + "/busy/99"), "failed")
    assert (status["attempts"], status["lastStatus"], status["lastError"]) == (3, 503, "It answered 503. Given up after 3 attempts.")
    assert len(receiver.wait_for(3)) == 3 and counters(server) == {'total{event="delivered"}': 0, 'total{event="failed"}': 1, 'total{event="retried"}': 2, "pending": 0}


def test_retry_after_is_honoured_and_bounded(serve, receiver):
    server = serve(**HERE)
    jobs = [ended(server, f"{receiver.url}/later/{seconds}") for seconds in (3600, 10**9)]
    receiver.wait_for(2)
    status = next(found for _ in iter(int, 1) if (found := status_of(server, jobs[0], "pending"))["attempts"])
    job = ask(server, "GET", f"/gpu-jobs/{jobs[0]}")[1]["job"]
    assert status["nextAttemptAt"] >= job["completedAt"] + 3_600_000 and status["lastStatus"] == 429
    assert status_of(server, jobs[1], "failed")["lastError"] == "It answered 429. Given up after 1 attempt."
    assert counters(server)["pending"] == 1


NONSENSE = {"redirect": (307, "redirects are not followed"), "garbage": (None, "does not speak HTTP"), "huge": (None, "no proper HTTP answer"),
            "empty": (None, "no proper HTTP answer"), "drip": (None, "did not answer within"), "hang": (None, "did not answer within")}


@pytest.mark.parametrize("path", NONSENSE)
def test_nonsense_is_said_in_a_sentence(serve, receiver, path):
    server = serve(**HERE | {"GPU_WEBHOOK_ATTEMPTS": 1, "GPU_WEBHOOK_TIMEOUT_SECONDS": 2 if path in ("drip", "hang") else 30})
    status = status_of(server, ended(server, f"{receiver.url}/{path}"), "failed")
    assert status["lastStatus"] == NONSENSE[path][0] and NONSENSE[path][1] in status["lastError"]
    assert status["deliveredAt"] is None and [note["request"] for note in receiver.wait_for(1)] == [f"POST /{path} HTTP/1.1"]
    assert ask(server, "GET", "/healthz")[0] == 200 and "Traceback" not in "\n".join(map(str, server.process.lines))


def test_a_receiver_that_wants_no_more_gets_no_more(serve, receiver):
    server = serve(**HERE)
    status = status_of(server, ended(server, receiver.url + "/gone"), "failed")
    assert (status["attempts"], status["lastStatus"]) == (1, 410) and len(receiver.wait_for(1)) == 1


def test_one_that_hangs_holds_up_nobody_else(serve, processes, receiver):
    """Twenty notes for a receiver that never answers, and time-outs too long to matter: the others are told meanwhile."""
    server, other = serve(**HERE | {"GPU_WEBHOOK_TIMEOUT_SECONDS": 60}), Receiver(processes)
    stuck = [ended(server, receiver.url + "/hang") for _ in range(20)]
    receiver.wait_for(2)
    told = [ended(server, other.url) for _ in range(12)]
    assert {note["headers"]["webhook-id"] for note in other.wait_for(12)} == set(told)
    assert {status_of(server, job_id)["state"] for job_id in stuck} == {"pending"} and len(receiver.notes) == 2, "two at a time to one receiver"


# ---- nothing is lost


def test_kill_9_before_the_note_arrived(serve, processes):
    """Nobody listens where the note should go; the server is killed; the receiver comes up, then the server."""
    receiver = Receiver(processes)
    receiver.process.kill()
    server = serve(**HERE, GPU_WEBHOOK_ATTEMPTS=100)
    job_id = ended(server, receiver.url + "/done")
    found = next(found for _ in iter(int, 1) if (found := status_of(server, job_id))["attempts"])
    assert found["state"] == "pending" and "cannot be reached" in found["lastError"]
    server.kill()
    receiver.start()
    server.start()
    [note] = receiver.wait_for(1)
    assert genuine(note)["data"]["job"]["id"] == job_id and status_of(server, job_id, "delivered")["attempts"] >= 2


def test_kill_9_while_the_note_is_on_its_way(serve, receiver):
    server = serve(**HERE)
    job_id = ended(server, receiver.url + "/hang-once")
    receiver.wait_for(1)
    server.kill()
    server.start()
    notes = receiver.wait_for(2)
    assert [note["headers"]["webhook-id"] for note in notes] == [job_id, job_id] and notes[0]["body"] == notes[1]["body"]
    assert status_of(server, job_id, "delivered")["attempts"] == 1, "an attempt of which nothing is known does not count"


def test_kills_at_random_lose_no_note(serve, receiver):
    """Sixty jobs end while the server is killed four times; every one is told, each note genuine, whatever came twice being the same."""
    server, chance, jobs = serve(**HERE, GPU_WEBHOOK_ATTEMPTS=100), random.Random(7), []
    for n in range(60):
        jobs.append(ended(server, f"{receiver.url}/{chance.choice(['done', 'busy/1', 'busy/2'])}?n={n}"))
        if n % 15 == 14:
            server.kill()
            server.start()
    for job_id in jobs:
        assert status_of(server, job_id, "delivered")["lastStatus"] == 200
    for n in range(60):
        receiver.wait_for(1, rf"\S*n={n} ")
    bodies = {}
    for note in receiver.notes:
        assert genuine(note)["data"]["job"]["id"] == note["headers"]["webhook-id"]
        bodies.setdefault(note["headers"]["webhook-id"], set()).add(note["body"])
    assert bodies.keys() == set(jobs) and all(len(each) == 1 for each in bodies.values()) and counters(server)["pending"] == 0


def test_a_server_that_lost_its_secret_says_so(serve, processes, tmp_path):
    receiver = Receiver(processes)
    receiver.process.kill()
    job_id = ended(server := serve(**HERE, GPU_WEBHOOK_ATTEMPTS=100), receiver.url)
    server.kill()
    assert "no GPU_WEBHOOK_SECRET any more" in status_of(serve(), job_id, "failed")["lastError"]


# ---- where it may go


def test_what_could_never_be_delivered_is_refused_at_the_submit(serve):
    def refusal(server, url):
        status, answer = ask(server, "POST", "/gpu-jobs", {"tool": "errand", "webhook": url})
        assert (status, answer["error"], answer["field"]) == (400, "invalid_payload", "webhook"), url
        return answer["message"]

    server = serve(GPU_WEBHOOK_SECRET=SECRET)
    for host in ("127.0.0.1", "localhost", "10.0.0.1", "192.168.1.1", "169.254.169.254", "[::1]", "[fd00::1]", "[fe80::1]", "[::ffff:127.0.0.1]",
                 "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "0.0.0.0", "100.64.0.1", "224.0.0.1"):  # noqa: S104
        assert "GPU_WEBHOOK_NETWORKS" in refusal(server, f"http://{host}:8000/x?key=k3y")
        assert "k3y" not in refusal(server, f"http://{host}:8000/x?key=k3y")
    assert "must not carry a user name or password" in refusal(server, "https://me:pw@example.org/")
    for url in ("ftp://example.org/", "example.org", "http://", "http://a b/", "http://h:0/", "http://h\r\nX: y/", 7, ["http://h/"], {"a": 1}):
        refusal(server, url)
    assert ask(server, "POST", "/gpu-jobs", {"tool": "errand", "webhook": ""})[0] == 200
    server.kill()
    assert "GPU_WEBHOOK_SECRET" in refusal(serve(), "https://example.org/")


@pytest.mark.parametrize("host", ["127.1", "2130706433", "0x7f.0.0.1", "017700000001"])
def test_names_are_checked_after_they_were_looked_up(serve, receiver, host):
    """Odd spellings of the loopback address: no literals, so only looking them up shows where they lead."""
    server = serve(GPU_WEBHOOK_SECRET=SECRET)
    status = status_of(server, ended(server, f"http://{host}:{receiver.port}/done"), "failed")
    assert (status["attempts"], status["lastStatus"]) == (1, None) and "not on the public internet" in status["lastError"]
    server.kill()
    server = serve(**HERE)
    status_of(server, ended(server, f"http://{host}:{receiver.port}/allowed"), "delivered")
    assert [note["request"] for note in receiver.wait_for(1)] == ["POST /allowed HTTP/1.1"], "the first was not even connected to"


def test_secrets_reach_neither_the_log_nor_other_callers(serve, receiver):
    server = serve(**HERE, GPU_WEBHOOK_ATTEMPTS=2, GPU_LOG_REQUESTS=1)
    url = receiver.url + "/busy/9/p4th-secret?key=qu3ry-secret#fr4gment"
    job_id = ended(server, url)
    status_of(server, job_id, "failed")
    shown = [ask(server, "GET", path)[1] for path in (f"/gpu-jobs/{job_id}", "/gpu-jobs", "/workers", "/metrics", "/openapi.json")]
    server.process.end()  # so that the history is written, and the log complete
    said = json.dumps(shown) + "\n".join(map(str, server.process.lines)) + (server.data / "logs" / "gpu_job_history.md").read_text()
    for secret in ("p4th-secret", "qu3ry-secret", "fr4gment", SECRET):
        assert secret not in said
    assert f"the webhook of job {job_id} to 127.0.0.1: It answered 503." in said


def test_the_receiver_in_the_readme(serve, processes):
    [block] = [code for code in re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S) if "webhooks import verify" in code]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server, receiver = serve(**HERE, GPU_WEBHOOK_ATTEMPTS=100), processes(sys.executable, "-c", block.replace("8000", str(port)), GPU_WEBHOOK_SECRET=SECRET, PYTHONPATH=ROOT)
    job_id = ended(server, f"http://127.0.0.1:{port}/done")
    receiver.wait_for(f"^job.canceled {job_id}$")
    status_of(server, job_id, "delivered")
    server.kill()
    job_id = ended(server := serve(**HERE | {"GPU_WEBHOOK_SECRET": SECRET[::-1]}, GPU_WEBHOOK_ATTEMPTS=1), f"http://127.0.0.1:{port}/done")
    assert status_of(server, job_id, "failed")["lastStatus"] is None and not any(job_id in str(line) for line in receiver.lines)


def test_a_full_disk_does_not_repeat_the_note(receiver):
    """The store cannot write what became of an attempt: the attempt is written down later, not made again."""
    class Full(MemoryStore):
        posts = 0

        def post(self, op, ticket):
            self.posts += 1
            if 2 < self.posts < 6:  # after the submit and the cancel: what became of the attempt
                return ticket.land(None, Unavailable("The disk is full."))
            return super().post(op, ticket)

    async def main():
        broker = Broker(Full(), on_end=lambda job: hooks.news.set())
        hooks = Webhooks(broker, WebhookPolicy(SECRET, (ip_network("127.0.0.0/8"),)), again_s=0.01)
        broker.bind()
        running = asyncio.create_task(hooks.run_forever())
        job = await broker.acall(rules.submit, JobSpec("errand", webhook=receiver.url))
        await broker.acall(rules.cancel, job.id)
        while broker.get(job.id).webhook_due_ms is not None:
            await asyncio.sleep(0.01)
        running.cancel()
        return broker.store.posts, broker.get(job.id).webhook_status["attempts"]

    assert asyncio.run(asyncio.wait_for(main(), LONG_S)) == (6, 1)
    assert len(receiver.wait_for(1)) == 1


# ---- TLS


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command, to make a certificate")
def test_tls_asks_for_the_names_certificate(serve, processes, tmp_path):
    for name in ("localhost", "elsewhere.example"):
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", tmp_path / f"{name}.key", "-out", tmp_path / f"{name}.crt",
                        "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"], check=True, capture_output=True)
    good, wrong = (Receiver(processes, 0, tmp_path / f"{name}.crt", tmp_path / f"{name}.key") for name in ("localhost", "elsewhere.example"))
    bundle = tmp_path / "trusted.pem"
    bundle.write_text("".join((tmp_path / f"{name}.crt").read_text() for name in ("localhost", "elsewhere.example")))
    networks = {"GPU_WEBHOOK_NETWORKS": "127.0.0.0/8,::1", "GPU_WEBHOOK_ATTEMPTS": 1}
    server = serve(**HERE | networks, SSL_CERT_FILE=bundle)
    status_of(server, ended(server, good.url + "/done"), "delivered")
    assert genuine(good.wait_for(1)[0])["type"] == "job.canceled"
    assert "certificate is not valid" in status_of(server, ended(server, wrong.url + "/done"), "failed")["lastError"]
    server.kill()
    server = serve(**HERE | networks)
    assert "certificate is not valid" in status_of(server, ended(server, good.url + "/again"), "failed")["lastError"]
    assert len(good.notes) == 1 and wrong.notes == []
