"""A stand-in for the reference's server: part 1 of the contract and nothing else. Its own process; prints its port.

No long poll, no leases with tokens, no artifacts; it ignores what it does not know, and keeps everything in memory.
"""

import json
import os
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

TOKEN = os.environ.get("GPU_WORKER_TOKEN", "")
LEASE_S = float(os.environ.get("GPU_JOB_LEASE_SECONDS", "900"))
JOBS = {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=None):
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        if data:
            self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refused(self):
        if not TOKEN:
            return self.answer(503, {"error": "gpu_worker_api_disabled"}) or True
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not given:
            return self.answer(401, {"error": "missing_worker_token"}) or True
        if given != TOKEN:
            return self.answer(403, {"error": "invalid_worker_token"}) or True
        return False

    def do_GET(self):
        parts = urlsplit(self.path)
        if parts.path == "/gpu-jobs/next":
            if self.refused():
                return None
            now = time.time() * 1000
            for job in JOBS.values():
                if job["status"] == "leased" and now - job["startedAt"] > LEASE_S * 1000:
                    job.update(status="queued", workerId=None)
            waiting = [j for j in JOBS.values() if j["status"] == "queued"]
            if not waiting:
                return self.answer(204)
            job = min(waiting, key=lambda j: (j["priority"] != "high", j["enqueuedAt"]))
            job.update(status="leased", startedAt=now, workerId=parse_qs(parts.query).get("worker", ["worker"])[0], attempts=job["attempts"] + 1)
            return self.answer(200, {"job": job})
        job = JOBS.get(parts.path.rpartition("/")[2])
        return self.answer(200, {"job": job}) if job else self.answer(404, {"error": "job_not_found"})

    def do_POST(self):
        try:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        except ValueError:
            return self.answer(400, {"error": "bad_json"})
        if self.path == "/gpu-jobs":
            if not body.get("tool"):
                return self.answer(400, {"error": "tool_required"})
            job = {"id": str(uuid.uuid4()), "tool": body["tool"], "payload": body.get("payload", {}),
                   "priority": "high" if body.get("priority") == "high" else "normal", "status": "queued", "enqueuedAt": time.time() * 1000,
                   "startedAt": None, "completedAt": None, "workerId": None, "attempts": 0}
            JOBS[job["id"]] = job
            return self.answer(200, {"job": job})
        parts = self.path.split("/")
        if len(parts) == 4 and parts[1] == "gpu-jobs" and parts[3] == "complete":
            if self.refused():
                return None
            job = JOBS.get(parts[2])
            if job is None:
                return self.answer(404, {"error": "job_not_found"})
            if job["status"] != "leased":
                return self.answer(400, {"error": "job_not_in_progress"})
            good = body.get("status") == "completed"
            job.update(status="completed" if good else "failed", completedAt=time.time() * 1000)
            job["result" if good else "detail"] = body.get("result" if good else "detail")
            return self.answer(200, {"job": job})
        return self.answer(404, {"error": "not_found"})


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
