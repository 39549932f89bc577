"""The routes over HTTP: who may call, odd bodies and queries, streams. Nothing anyone sends makes a 500."""

import http.client
import json
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colab_gpu.server import QueueServer
from colab_gpu.store import MemoryStore

WORKER, CALLER = "worker-token", "caller-token"


def start(tmp_path, **settings_):
    given_ = {"GPU_WORKER_TOKEN": WORKER, "COLAB_GPU_DATA": tmp_path, "GPU_MAX_PENDING_JOBS": 100_000, **settings_}
    return QueueServer(given_, store=MemoryStore()).start()


@pytest.fixture
def server(tmp_path):
    with start(tmp_path) as made:
        yield made


def ask(server, method, path, body=None, token=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=30)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    head = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    head.update({k.replace("_", "-"): v for k, v in headers.items()})
    connection.request(method, path, data, head)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    parsed = json.loads(text) if text and "json" in answer.headers.get("Content-Type", "") and "ndjson" not in answer.headers["Content-Type"] else text
    return answer.status, parsed, answer.headers


def submit(server, **body):
    return ask(server, "POST", "/gpu-jobs", {"tool": "errand", **body})[1]["job"]


def test_doors(tmp_path):
    worker_routes = [("GET", "/gpu-jobs/next"), ("POST", "/gpu-jobs/x/heartbeat"), ("POST", "/gpu-jobs/x/complete"), ("POST", "/gpu-jobs/x/release"),
                     ("PUT", "/gpu-jobs/x/artifacts/a.txt")]
    caller_routes = [("POST", "/gpu-jobs"), ("GET", "/gpu-jobs"), ("GET", "/gpu-jobs/x"), ("POST", "/gpu-jobs/x/cancel"), ("DELETE", "/gpu-jobs/x"),
                     ("POST", "/gpu-jobs/x/retry"), ("GET", "/gpu-jobs/x/events"), ("GET", "/gpu-jobs/x/artifacts/a"), ("GET", "/workers"),
                     ("POST", "/workers/x/drain"), ("GET", "/metrics"), ("POST", "/generate-image-queued"), ("POST", "/generate-image-stream")]
    with start(tmp_path / "a", GPU_CLIENT_TOKEN=CALLER) as server:
        for method, path in worker_routes:
            codes = [ask(server, method, path, {}, token)[1]["error"] for token in (None, "wrong", CALLER)]
            assert codes == ["missing_worker_token", "invalid_worker_token", "invalid_worker_token"], path
            assert ask(server, method, path, {}, WORKER)[0] not in (401, 403), path
        for method, path in caller_routes:
            codes = [ask(server, method, path, {}, token)[1]["error"] for token in (None, "wrong", WORKER)]
            assert codes == ["client_token_required", "invalid_client_token", "invalid_client_token"], path
            assert ask(server, method, path, {}, CALLER)[0] not in (401, 403), path
        assert {ask(server, "GET", path)[0] for path in ("/healthz", "/readyz", "/openapi.json", "/")} == {200}
    with start(tmp_path / "b", GPU_WORKER_TOKEN="") as server:
        assert {ask(server, m, p, {}, "x")[1]["error"] for m, p in worker_routes} == {"gpu_worker_api_disabled"}
        assert ask(server, "POST", "/generate-image-queued", {"prompt": "x"})[1]["error"] == "gpu_worker_unavailable"
        for name in ("X-Forwarded-For", "Forwarded", "CF-Connecting-IP"):
            assert ask(server, "GET", "/gpu-jobs", **{name: "1.2.3.4"})[:2][1]["error"] == "client_token_required"
        assert ask(server, "GET", "/gpu-jobs", Host="evil.example")[0] == 401
    with start(tmp_path / "c", GPU_CLIENT_AUTH="none") as server:
        assert ask(server, "GET", "/gpu-jobs", Host="anything", X_Forwarded_For="1.2.3.4")[0] == 200


def test_browsers(tmp_path):
    with start(tmp_path, GPU_CORS_ORIGINS="https://app.example") as server:
        assert ask(server, "POST", "/gpu-jobs", {"tool": "x"}, Origin="https://evil.example")[1]["error"] == "origin_not_allowed"
        status, _, headers = ask(server, "POST", "/gpu-jobs", {"tool": "x"}, Origin="https://app.example")
        assert status == 200 and headers["Access-Control-Allow-Origin"] == "https://app.example"
        status, _, headers = ask(server, "OPTIONS", "/gpu-jobs", Origin="https://app.example", Access_Control_Request_Method="POST")
        assert status == 204 and "POST" in headers["Access-Control-Allow-Methods"] and headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert ask(server, "OPTIONS", "/gpu-jobs", Origin="https://evil.example")[0] == 403
        form = ask(server, "POST", "/gpu-jobs", b'{"tool": "x"}', Content_Type="text/plain", Sec_Fetch_Site="same-origin")
        assert form[0] == 415 and form[1]["error"] == "unsupported_media_type"
        assert ask(server, "POST", "/gpu-jobs", b'{"tool": "x"}', Content_Type="text/plain")[0] == 200, "a program may be careless"


def test_idempotency_and_limits(tmp_path):
    with start(tmp_path, GPU_MAX_PENDING_JOBS=2) as server:
        first = ask(server, "POST", "/gpu-jobs", {"tool": "x", "payload": {"a": 1, "b": 2}}, Idempotency_Key="k")
        again = ask(server, "POST", "/gpu-jobs", {"payload": {"b": 2, "a": 1}, "tool": "x"}, Idempotency_Key="k")
        assert first[0] == again[0] == 200 and first[1]["job"]["id"] == again[1]["job"]["id"]
        assert ask(server, "POST", "/gpu-jobs", {"tool": "y"}, Idempotency_Key="k")[1]["error"] == "idempotency_conflict"
        submit(server)
        status, body, headers = ask(server, "POST", "/gpu-jobs", {"tool": "x"})
        assert (status, body["error"], body["retryable"]) == (429, "gpu_queue_full", True) and int(headers["Retry-After"]) > 0
        assert ask(server, "POST", "/gpu-jobs", {"payload": {"b": 2, "a": 1}, "tool": "x"}, Idempotency_Key="k")[0] == 200


def test_requirements_decide_who_gets_it(server):
    made = submit(server, requirements=["big"])
    assert ask(server, "GET", "/gpu-jobs/next?worker=a&tools=errand", token=WORKER)[0] == 204
    shown = ask(server, "GET", f"/gpu-jobs/{made['id']}")[1]["job"]
    assert shown["waitingFor"] == "No connected worker has the tags big." and shown["position"] == 1
    assert ask(server, "GET", "/gpu-jobs/next?worker=b&tools=errand&tags=big,cuda", token=WORKER)[1]["job"]["id"] == made["id"]


def test_batches(server):
    for n in range(5):
        ask(server, "POST", "/gpu-jobs", {"tool": "imagenGenerate", "payload": {"prompt": str(n), "width": 512 if n != 2 else 256}})
    answer = ask(server, "GET", "/gpu-jobs/next?max=3", token=WORKER, X_Protocol="1")[1]
    assert [g["job"]["payload"]["prompt"] for g in answer["jobs"]] == ["0", "1", "3"] and answer["job"] == answer["jobs"][0]["job"]
    assert len({g["lease"]["token"] for g in answer["jobs"]}) == 3


def test_a_lost_lease_answer_is_given_again(server):
    submit(server)
    submit(server)
    head = {"X_Protocol": "1", "X_Worker_Instance": "i", "Lease_Request_Id": "r1"}
    one, two = (ask(server, "GET", "/gpu-jobs/next?worker=a", token=WORKER, **head)[1] for _ in range(2))
    assert one == two
    assert ask(server, "GET", "/gpu-jobs/next?worker=a", token=WORKER, **{**head, "Lease_Request_Id": "r2"})[1]["job"]["id"] != one["job"]["id"]


def test_standby_takes_only_what_has_waited(server):
    submit(server)
    assert ask(server, "GET", "/gpu-jobs/next?standby=60&worker=s", token=WORKER)[0] == 204
    assert ask(server, "GET", "/gpu-jobs/next?standby=0&worker=s", token=WORKER)[0] == 200


def test_etag_and_listing(server):
    ids = [submit(server)["id"] for _ in range(5)]
    _, _, headers = ask(server, "GET", f"/gpu-jobs/{ids[0]}")
    assert ask(server, "GET", f"/gpu-jobs/{ids[0]}", If_None_Match=headers["ETag"])[0] == 304
    ask(server, "DELETE", f"/gpu-jobs/{ids[0]}")
    assert ask(server, "GET", f"/gpu-jobs/{ids[0]}", If_None_Match=headers["ETag"])[0] == 200
    page = ask(server, "GET", "/gpu-jobs?limit=2")[1]
    assert [j["id"] for j in page["jobs"]] == ids[:2:-1] and page["before"] == ids[3]
    rest = ask(server, "GET", f"/gpu-jobs?limit=3&before={page['before']}")[1]
    assert [j["id"] for j in rest["jobs"]] == ids[2::-1] and rest["before"] is None


def test_the_image_stream_of_the_reference(server):
    lines = []

    def follow():
        connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=30)
        connection.request("POST", "/generate-image-stream", json.dumps({"prompt": "x"}), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        while line := answer.readline():
            lines.append(json.loads(line))

    follower = threading.Thread(target=follow)
    follower.start()
    answer = ask(server, "GET", "/gpu-jobs/next?wait=20", token=WORKER, X_Protocol="1")[1]
    path, token = f"/gpu-jobs/{answer['job']['id']}", answer["lease"]["token"]
    while not any(line["type"] == "status" for line in lines):
        time.sleep(0.01)
    events = [{"seq": 1, "type": "preview", "image_base64": "data:image/jpeg;base64,AA=="}, {"seq": 2, "type": "progress", "step": 1, "total": 2}]
    assert ask(server, "POST", path + "/heartbeat", {"leaseToken": token, "events": events}, WORKER)[1]["watchers"] == 1
    done = {"leaseToken": token, "status": "completed", "result": {"image_base64": "data:image/png;base64,iVBORw==", "seed": 7}}
    assert ask(server, "POST", path + "/complete", done, WORKER)[0] == 200
    follower.join(20)
    assert {"type": "progress", "step": 1, "total_steps": 2, "image_base64": "data:image/jpeg;base64,AA=="} in lines
    assert lines[-1]["type"] == "complete" and lines[-1]["seed"] == 7 and lines[-1]["image_base64"].endswith("iVBORw==")


def test_the_image_stream_is_canceled_when_its_caller_leaves(server):
    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=30)
    connection.request("POST", "/generate-image-stream", json.dumps({"prompt": "x"}), {"Content-Type": "application/json"})
    job_id = json.loads(connection.getresponse().readline())["job_id"]
    connection.close()
    connection.sock = None
    assert ask(server, "GET", f"/gpu-jobs/{job_id}?wait=30")[1]["job"]["status"] in ("canceled", "queued")
    for _ in range(300):
        if ask(server, "GET", f"/gpu-jobs/{job_id}")[1]["job"]["status"] == "canceled":
            return
        time.sleep(0.05)
    pytest.fail("the job of the broken stream was not canceled")


def test_artifacts_are_served_harmlessly(server):
    submit(server)
    answer = ask(server, "GET", "/gpu-jobs/next", token=WORKER, X_Protocol="1")[1]
    path, token = f"/gpu-jobs/{answer['job']['id']}", answer["lease"]["token"]
    put = {"X_Lease_Token": token, "Content_Type": "text/html"}
    assert ask(server, "PUT", path + "/artifacts/page.html", b"<script>", WORKER, **put)[0] == 200
    for bad in ("..%2Fx", ".hidden", "a%2Fb", "%00", "con.txt", "x" * 200):
        assert ask(server, "PUT", f"{path}/artifacts/{bad}", b"x", WORKER, **put)[0] in (400, 404), bad
    assert ask(server, "POST", path + "/complete", {"leaseToken": token, "status": "completed", "artifacts": ["nope"]}, WORKER)[1]["error"] == "artifact_missing"
    ask(server, "POST", path + "/complete", {"leaseToken": token, "status": "completed", "artifacts": ["page.html"]}, WORKER)
    status, body, headers = ask(server, "GET", path + "/artifacts/page.html")
    assert (status, body) == (200, b"<script>") and headers["Content-Type"] == "application/octet-stream"
    assert headers["Content-Disposition"].startswith("attachment") and headers["X-Content-Type-Options"] == "nosniff"
    assert ask(server, "PUT", path + "/artifacts/late.txt", b"x", WORKER, **put)[1]["error"] == "job_ended"


def test_half_characters_harm_nobody(server):
    submit(server)
    answer = ask(server, "GET", "/gpu-jobs/next", token=WORKER, X_Protocol="1", X_Worker_Instance="i")[1]
    path, token = f"/gpu-jobs/{answer['job']['id']}", answer["lease"]["token"]
    events = [{"seq": 1, "type": "token", "text": "\ud83d"}]
    assert ask(server, "POST", path + "/heartbeat", {"leaseToken": token, "events": events, "accelerator": "\udc00"}, WORKER)[0] == 200
    assert ask(server, "POST", path + "/complete", {"leaseToken": token, "status": "completed", "result": {"text": "a\ud83d"}}, WORKER)[0] == 200
    assert ask(server, "GET", path)[1]["job"]["result"] == {"text": "a?"}
    assert ask(server, "GET", "/workers")[0] == 200 and b'"text":"?"' in ask(server, "GET", path + "/events")[1]


def test_a_second_attempt_is_heard(server):
    submit(server)
    for text in ("first", "second"):
        answer = ask(server, "GET", "/gpu-jobs/next", token=WORKER, X_Protocol="1")[1]
        path, token = f"/gpu-jobs/{answer['job']['id']}", answer["lease"]["token"]
        ask(server, "POST", path + "/heartbeat", {"leaseToken": token, "events": [{"seq": 1, "type": "log", "text": text}]}, WORKER)
        ask(server, "POST", path + "/release", {"leaseToken": token}, WORKER)
    ask(server, "DELETE", path)
    assert ask(server, "GET", path + "/events")[1].count(b"event: log") == 2


def test_openapi_names_every_route(server):
    described = ask(server, "GET", "/openapi.json")[1]["paths"]
    assert {(m.upper(), p) for p, methods in described.items() for m in methods} == {(r.method, r.pattern) for r in server._thread and server.app.router.routes}


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda x: st.lists(x, max_size=3) | st.dictionaries(
    st.text(max_size=5), x, max_size=3), max_leaves=6)
FIELDS = st.sampled_from(["tool", "payload", "priority", "maxAttempts", "queueTimeoutSeconds", "runTimeoutSeconds", "notBefore", "requirements", "webhook",
                          "leaseToken", "drain", "status", "result", "detail", "kind", "retryable", "artifacts", "events", "prompt", "width", "seed", "image_base64"])
SENSIBLE = st.sampled_from(["imagenGenerate", "ollamaChat", "errand", "completed", "error", "high", "data:image/png;base64,aGk=", {"prompt": "x"}, [], ["a"],
                            {"image_base64": "data:image/png;base64,!"}, 1, -1, 10**30, 1e308, [{"seq": 1, "type": "progress"}], "transient", "http://10.0.0.1/", "https://example.org"])
BODIES = JSON | st.dictionaries(FIELDS, JSON | SENSIBLE, max_size=5)
QUERIES = st.dictionaries(st.sampled_from(["wait", "inline", "limit", "before", "status", "tool", "worker", "tools", "tags", "max", "standby", "sessionLeft",
                                           "models", "disk", "versions", "paused", "drain"]), st.sampled_from(["0", "-1", "nan", "x", "", "1e9", "%00", "%ff", "é", "1,2,,", "a" * 300, "leased"]), max_size=3)


def test_nothing_makes_a_500(tmp_path):
    with start(tmp_path) as server:
        leased = []

        def path_of(pattern):
            if not leased:
                made = submit(server)
                grant = ask(server, "GET", "/gpu-jobs/next?tools=errand", token=WORKER, X_Protocol="1")
                leased.append(grant[1]["job"]["id"] if grant[0] == 200 else made["id"])
            return pattern.replace("{id}", leased[0]).replace("{name}", "a.txt")

        routes = [(r.method, r.pattern) for r in server.app.router.routes if "stream" not in r.pattern and "events" not in r.pattern]

        @settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.sampled_from(routes), BODIES, QUERIES, st.sampled_from([None, "{", "[" * 2000, "\xff"]))
        def fuzz(route, body, query, raw):
            method, pattern = route
            text = "&".join(f"{k}={v}" for k, v in query.items()).encode("ascii", "ignore").decode()
            data = raw.encode("latin-1") if raw else json.dumps(body).encode()
            status, answer, _ = ask(server, method, path_of(pattern) + ("?" + text if text else ""), data, WORKER)
            assert status < 500, (status, answer)
            if status >= 400:
                assert set(answer) >= {"error", "message", "retryable"} and answer["message"].endswith((".", "…"))

        fuzz()
