"""A stand-in for the reference's server: part 1 of the contract and nothing else, in a process of its own.

It keeps jobs in memory, answers /gpu-jobs/next at once, and ignores headers, query parameters and fields that it doesn't know. It prints its
port on the first line, then one line for each request: the method, the path, the status. Settings are the reference's environment variables;
without GPU_WORKER_TOKEN the worker routes answer 503.
"""

import json
import os
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class Queue:
    def __init__(self, lease_s, most):
        self.jobs, self.waiting, self.lock, self.lease_s, self.most = {}, [], threading.Lock(), lease_s, most

    def add(self, body):
        if not body.get("tool"): return 400, {"error": "tool_required"}
        if len(self.waiting) >= self.most: return 429, {"error": "gpu_queue_full"}
        job = {"id": str(uuid.uuid4()), "tool": body["tool"], "payload": body.get("payload") or {}, "priority": body.get("priority") or "normal",
               "status": "queued", "enqueuedAt": now_ms(), "startedAt": None, "completedAt": None, "workerId": None, "attempts": 0}
        self.jobs[job["id"]] = job
        self.put(job)
        return 200, {"job": job}

    def put(self, job):
        "High goes before normal."
        at = len(self.waiting)
        if job["priority"] == "high": at = sum(j["priority"] == "high" for j in self.waiting)
        self.waiting.insert(at, job)

    def next(self, worker):
        for job in self.jobs.values():
            if job["status"] == "leased" and now_ms() - job["startedAt"] > self.lease_s * 1000:
                job["status"] = "queued"
                self.put(job)
        if not self.waiting: return 204, None
        job = self.waiting.pop(0)
        job.update(status="leased", startedAt=now_ms(), workerId=worker, attempts=job["attempts"] + 1)
        return 200, {"job": job}

    def complete(self, job_id, body):
        job = self.jobs.get(job_id)
        if job is None: return 404, {"error": "job_not_found"}
        if job["status"] != "leased": return 400, {"error": "job_not_in_progress"}
        job["completedAt"] = now_ms()
        if body.get("status") == "error": job.update(status="failed", detail=body.get("detail"))
        else: job.update(status="completed", result=body.get("result"))
        return 200, {"job": job}

    def get(self, job_id):
        job = self.jobs.get(job_id)
        return (200, {"job": job}) if job else (404, {"error": "job_not_found"})


def now_ms(): return int(time.time() * 1000)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    queue, token = None, ""

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        with self.queue.lock: status, answer = self.route(url.path.split("/")[1:], parse_qs(url.query), body)
        print(self.command, url.path, status, flush=True)
        if isinstance(answer, bytes): kind, data = "text/html; charset=utf-8", answer
        else: kind, data = "application/json", b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        if status != 204: self.send_header("Content-Type", kind); self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def route(self, parts, query, body):
        try: body = json.loads(body or b"{}")
        except ValueError: return 400, b"<!DOCTYPE html><pre>SyntaxError</pre>"
        match (self.command, *parts):
            case ("POST", "gpu-jobs"): return self.queue.add(body)
            case ("GET", "gpu-jobs", "next"): return self.refusal() or self.queue.next(query.get("worker", [None])[0])
            case ("POST", "gpu-jobs", job_id, "complete"): return self.refusal() or self.queue.complete(job_id, body)
            case ("GET", "gpu-jobs", job_id): return self.queue.get(job_id)
        # Express says it like this.
        return 404, f"<!DOCTYPE html>\n<html><body><pre>Cannot {self.command} {urlsplit(self.path).path}</pre></body></html>".encode()

    def refusal(self):
        given = self.headers.get("Authorization", "")
        if not self.token: return 503, {"error": "gpu_worker_api_disabled"}
        if not given.startswith("Bearer "): return 401, {"error": "missing_worker_token"}
        return None if given[7:] == self.token else (403, {"error": "invalid_worker_token"})

    def log_message(self, *args): pass


def main():
    Handler.queue = Queue(float(os.environ.get("GPU_JOB_LEASE_SECONDS", "900")), int(os.environ.get("GPU_MAX_PENDING_JOBS", "100")))
    Handler.token = os.environ.get("GPU_WORKER_TOKEN", "")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__": main()
