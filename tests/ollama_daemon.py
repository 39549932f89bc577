"""A stand-in for the Ollama daemon: its HTTP API, in a process of its own.

    python tests/ollama_daemon.py serve          # listens on OLLAMA_HOST, as `ollama serve` does

Frames, errors, `ps`, `pull` and unloading follow Ollama's `api/types.go` and `server/routes.go`. A prompt (or the last message) is
answered with its own words; words in brackets steer the answer:

    [tokens=N] N tokens instead      [rate=R] R tokens a second        [hold] nothing, until the caller hangs up
    [busy] 503                       [error=N] an error frame after N tokens     [cut=N] the connection ends there
    [die=N] the process ends there   [oom] 500, as when a model doesn't fit ([oom=N]: so many times)      [fail] 500
    [wait=N] waits after N tokens, until somebody asks for GET /stand-in/go
    [think] thinks first             [call] calls the first tool                 [stuck] never unloads

What it has seen is at `GET /stand-in`. Models are those named in STAND_IN_MODELS (comma list); it can pull those in STAND_IN_LIBRARY.
STAND_IN_SIZES (comma list of name=bytes) says how large they are, where half a gigabyte will not do.
"""

import hashlib
import json
import math
import os
import re
import select
import socket
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SIZE = 500_000_000
NUMBERS = ("temperature", "top_p", "min_p", "repeat_penalty")


def full(name):
    return (name if ":" in name else f"{name}:latest").lower()


class State:
    """What the daemon has and has done; one lock for all of it."""

    def __init__(self):
        def names(variable, default=""): return {full(n) for n in os.environ.get(variable, default).split(",") if n}
        self.models, self.library = names("STAND_IN_MODELS", "llama3:8b"), names("STAND_IN_LIBRARY")
        self.sizes = {full(n): int(size) for n, _, size in (row.partition("=") for row in os.environ.get("STAND_IN_SIZES", "").split(",") if row)}
        self.asked, self.memory = {}, {}
        self.loaded, self.stuck, self.lock, self.go = {}, set(), threading.Lock(), threading.Event()
        self.seen = {"requests": [], "tokens": 0, "stopped": 0, "stopped_at": 0.0, "busy": 0, "pulls": [], "pulling": 0, "most_pulling": 0, "unloads": [], "bodies": []}

    def lacking(self, text, times):
        """Whether this prompt came at most so many times."""
        with self.lock: self.asked[text] = self.asked.get(text, 0) + 1
        return self.asked[text] <= times

    def count(self, name, by=1):
        with self.lock:
            self.seen[name] += by


STATE = State()


def now():
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


class Gone(Exception):
    """The caller has hung up."""


class Handler(BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", 0
    disable_nagle_algorithm = True

    def log_message(self, *_): pass

    def do_HEAD(self): self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path == "/": return self.answer(200, b"Ollama is running", "text/plain; charset=utf-8")
        if path == "/api/version": return self.json({"version": "0.12.6"})
        if path == "/api/tags": return self.json({"models": [model_row(n) for n in sorted(STATE.models)]})
        if path == "/api/ps":
            with STATE.lock:
                rows = [{**model_row(n), "expires_at": until, "size_vram": STATE.sizes.get(n, SIZE), "context_length": 4096} for n, until in STATE.loaded.items()]
            return self.json({"models": rows})
        if path == "/stand-in/go":
            STATE.go.set()
            return self.json({})
        if path == "/stand-in": return self.json({**STATE.seen, "loaded": list(STATE.loaded), "memory": sum(size for [size] in list(STATE.memory.values())), "pid": os.getpid()})
        return self.answer(404, b"404 page not found", "text/plain")

    def do_POST(self):
        self.framed = False
        try: body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        except ValueError as e: return self.json({"error": f"invalid character: {e}"}, 400)
        with STATE.lock:
            STATE.seen["requests"].append(self.path)
            STATE.seen["bodies"].append(body)
            del STATE.seen["bodies"][:-20]
        act = {"/api/generate": self.generate, "/api/chat": self.generate, "/api/embed": self.embed, "/api/pull": self.pull}.get(self.path)
        if act is None: return self.answer(404, b"404 page not found", "text/plain")
        STATE.count("busy")
        try: act(body)
        except (Gone, BrokenPipeError, ConnectionResetError):
            STATE.seen["stopped_at"] = time.monotonic()
            STATE.count("stopped")
            self.close_connection = True
        finally: STATE.count("busy", -1)

    # --- how answers are framed

    def answer(self, status, data, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(data)

    def json(self, value, status=200):
        self.answer(status, json.dumps(value, separators=(",", ":")).encode(), "application/json; charset=utf-8")

    def frame(self, value):
        data = json.dumps(value, separators=(",", ":")).encode() + b"\n"
        head = b""
        if not self.framed:
            self.framed = True
            self.send_response(200)
            self.send_header("Content-Type", "application/x-ndjson")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
        self.wfile.write(head + b"%x\r\n%s\r\n" % (len(data), data))

    def end_frames(self): self.wfile.write(b"0\r\n\r\n")

    def pause(self, seconds):
        """Wait; raises `Gone` as soon as the caller hangs up."""
        readable, _, _ = select.select([self.connection], [], [], seconds)
        if readable and not self.connection.recv(1, socket.MSG_PEEK): raise Gone

    # --- the calls

    def find(self, body):
        name = full(body.get("model") or "")
        if name in STATE.models: return name
        self.json({"error": f"model '{body.get('model')}' not found"}, 404)
        return None

    def generate(self, body):
        began, chat = time.perf_counter_ns(), self.path == "/api/chat"
        name = self.find(body)
        if name is None: return None
        for option, value in (body.get("options") or {}).items():
            if option in NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
                return self.json({"error": f'option "{option}" must be of type float32'}, 400)
        messages = body.get("messages") or []
        text = (messages[-1].get("content") or "" if messages else "") if chat else body.get("prompt") or ""
        steer = dict(re.findall(r"\[(\w+)(?:=(\d+))?\]", text))
        if "busy" in steer: return self.json({"error": "server busy, please try again.  maximum pending requests exceeded"}, 503)
        if "oom" in steer and (not steer["oom"] or STATE.lacking(text, int(steer["oom"]))): return self.json({"error": "model requires more system memory (9.1 GiB) than is available (3.2 GiB)"}, 500)
        if "fail" in steer: return self.json({"error": "llama runner process has terminated: exit status 2"}, 500)
        if body.get("think") and "think" not in steer and name.startswith("llama3"):
            return self.json({"error": f'"{name}" does not support thinking'}, 400)
        if not text and not messages: return self.load_or_unload(body, name, chat)
        if "stuck" in steer: STATE.stuck.add(name)
        load_ns = 0 if name in STATE.loaded else 3_000_000
        self.load(name, body)
        if "hold" in steer:
            while True: self.pause(60)
        return self.write(body, name, chat, steer, text, began, load_ns)

    def load(self, name, body):
        with STATE.lock:
            STATE.loaded[name] = (datetime.now(UTC) + timedelta(minutes=5)).isoformat().replace("+00:00", "Z")
            STATE.memory[name] = [STATE.sizes.get(name, SIZE)]

    def end_runner(self, name):
        """It is off the list first, and its memory comes back only then."""
        with STATE.lock:
            STATE.loaded.pop(name, None)
            held = STATE.memory.get(name)
        threading.Timer(0.2, lambda: STATE.memory.pop(name, None) if STATE.memory.get(name) is held else None).start()

    def load_or_unload(self, body, name, chat):
        unload = body.get("keep_alive") in (0, "0", "0s")
        if unload:
            STATE.seen["unloads"].append(name)
            if name not in STATE.stuck: threading.Timer(0.05, self.end_runner, (name,)).start()  # as there: it answers before the runner has ended
        else: self.load(name, body)
        return self.json({"model": body["model"], "created_at": now(), **({"message": {"role": "assistant", "content": ""}} if chat else {"response": ""}),
                          "done": True, "done_reason": "unload" if unload else "load"})

    def write(self, body, name, chat, steer, text, began, load_ns):
        def made(piece, field="content", **more):
            head = {"model": body["model"], "created_at": now()}
            if not chat: return {**head, "response": piece if field == "content" else "", **({"thinking": piece} if field == "thinking" else {}), "done": False, **more}
            message = {"role": "assistant", "content": piece if field == "content" else "", **({"thinking": piece} if field == "thinking" else {})}
            return {**head, "message": message, "done": False, **more}
        words = re.findall(r"\s*\S+", re.sub(r"\s*\[\w+(?:=\d+)?\]", "", text)) or ["Hello"]
        pieces = [f" {n % 1000:03d}" for n in range(int(steer["tokens"]))] if "tokens" in steer else words
        pieces, reason = (pieces[:n], "length") if 0 <= (n := (body.get("options") or {}).get("num_predict", -1)) < len(pieces) else (pieces, "stop")
        if isinstance(body.get("format"), dict): pieces = ["{", '"answer"', ": ", json.dumps(words[-1].strip()), "}"]
        frames = [made(piece, "thinking") for piece in ("Let", " me", " see.")] if "think" in steer else []
        if "call" in steer and body.get("tools"):
            call = made("")
            call["message"]["tool_calls"] = [{"id": "call_1", "function": {"index": 0, "name": body["tools"][0]["function"]["name"], "arguments": {"city": "Paris"}}}]
            frames, pieces = [*frames, call], []
        extra = (lambda p: {"logprobs": [{"token": p, "logprob": -0.5}]}) if body.get("logprobs") else lambda p: {}
        gap = 1 / int(steer["rate"]) if "rate" in steer else 0
        due = time.monotonic()
        if not body.get("stream", True): pieces = ["".join(pieces)]
        for n, frame in enumerate(f for part in (frames, (made(p, **extra(p)) for p in pieces)) for f in part):
            for word, act in (("die", lambda: os._exit(9)), ("cut", self.cut), ("error", lambda: self.fail_in_stream())):
                if steer.get(word) == str(n): return act()
            while steer.get("wait") == str(n) and not STATE.go.is_set(): self.pause(0.05)
            if gap:
                due += gap
                self.pause(max(0.0, due - time.monotonic()))
            elif n % 64 == 0: self.pause(0)
            if body.get("stream", True): self.frame(frame)
            STATE.count("tokens")
        took = time.perf_counter_ns() - began
        last = {**made("" if body.get("stream", True) else "".join(pieces)), "done": True, "done_reason": reason, **({} if chat else {"context": [1, 2, 3]}),
                "total_duration": took, "load_duration": load_ns, "prompt_eval_count": len(words), "prompt_eval_duration": 1_000_000,
                "eval_count": len(pieces), "eval_duration": took}
        if not body.get("stream", True): return self.json(last)
        self.frame(last)
        return self.end_frames()

    def cut(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def fail_in_stream(self):
        self.frame({"error": "an error was encountered while running the model: CUDA error"})
        self.end_frames()

    def embed(self, body):
        name = self.find(body)
        if name is None: return None
        texts = [body["input"]] if isinstance(body.get("input"), str) else body.get("input") or []
        self.load(name, body)
        return self.json({"model": body["model"], "embeddings": [vector(t, body.get("dimensions") or 8) for t in texts],
                          "total_duration": 14_143_917, "load_duration": 1_019_500, "prompt_eval_count": sum(len(t.split()) for t in texts)})

    def pull(self, body):
        name = full(body.get("model") or body.get("name") or "")
        with STATE.lock:
            STATE.seen["pulls"].append(name)
            STATE.seen["pulling"] += 1
            STATE.seen["most_pulling"] = max(STATE.seen["most_pulling"], STATE.seen["pulling"])
        try:
            self.frame({"status": "pulling manifest"})
            if name not in STATE.library: self.frame({"error": "pull model manifest: file does not exist"})
            else:
                for layer, total in (("6a0746a1ec1a", 4_000_000), ("4fa551d4f938", 1_000_000)):
                    digest = "sha256:" + layer.ljust(64, "0")
                    for part in range(5):
                        self.frame({"status": f"pulling {layer}", "digest": digest, "total": total, **({"completed": total * part // 4} if part else {})})
                        self.pause(1 if name.startswith("slow") else 0.005)
                for status in ("verifying sha256 digest", "writing manifest", "success"): self.frame({"status": status})
                with STATE.lock: STATE.models.add(name)
            self.end_frames()
        finally: STATE.count("pulling", -1)


def model_row(name):
    family = name.partition(":")[0]
    details = {"parent_model": "", "format": "gguf", "family": family, "families": [family], "parameter_size": "8.0B", "quantization_level": "Q4_0"}
    return {"name": name, "model": name, "modified_at": "2026-11-01T12:00:00Z", "size": STATE.sizes.get(name, SIZE), "digest": hashlib.sha256(name.encode()).hexdigest(), "details": details}


def vector(text, dimensions):
    raw = [hashlib.sha256(f"{n}{text}".encode()).digest()[0] - 127.5 for n in range(dimensions)]
    length = math.sqrt(sum(x * x for x in raw))
    return [x / length for x in raw]


def main():
    if sys.argv[1:2] != ["serve"]: sys.exit("Usage: ollama serve")
    crash = os.environ.get("STAND_IN_CRASH")
    if crash: sys.exit(f"Error: {crash}")
    host, _, port = os.environ.get("OLLAMA_HOST", "127.0.0.1:11434").rpartition(":")
    try: server = ThreadingHTTPServer((host or "127.0.0.1", int(port)), Handler)
    except OSError: sys.exit(f"Error: listen tcp {host}:{port}: bind: address already in use")
    server.daemon_threads = True
    print(f"Listening on {host}:{server.server_address[1]} (version 0.12.6)", flush=True)
    server.serve_forever(poll_interval=0.1)


if __name__ == "__main__": main()
