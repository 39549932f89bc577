"""Processes and wires for the tests of client and worker: servers, a worker, and a connection that fails on purpose."""

import json
import json
import os
import re
import socket
import struct
import sys
import tempfile
import threading
import time
import urllib.request
import zlib
from pathlib import Path

import conftest
from conftest import TOKEN

HERE = Path(__file__).parent
KEPT = tempfile.TemporaryDirectory()  # where workers keep results until they are sent, unless a test says otherwise


def eventually(fact, what="it", timeout_s=60):
    "Wait for `fact()` to be true and return it. The time-out is for a broken program, not a measure of a working one."
    end = time.monotonic() + timeout_s
    while not (value := fact()):
        assert time.monotonic() < end, f"{what} did not come true"
        time.sleep(0.01)
    return value


def seen(url, path="/stand-in"):
    "What the stand-in Ollama at `url` has seen; with another `path`, what it answers there."
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url + path) as answer:
        return json.load(answer)


def png(side=8, colour=(204, 68, 52), noise=0):
    "A PNG without any library; `noise` appends that many random bytes in a chunk of their own."
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = (b"\0" + bytes(colour) * side) * side
    extra = chunk(b"noIs", os.urandom(noise)) if noise else b""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + extra + chunk(b"IEND", b"")


def kept_results(folder):
    "The results that workers keep in the data folder; a part of the outbox that goes away this very moment counts as one."
    try: return list(folder.glob("outbox/*/*/result.json"))
    except FileNotFoundError: return [folder]


class Process(conftest.Process):
    "A Python process that ends with its `with` block."
    def __init__(self, *args, **env): super().__init__([sys.executable, *map(str, args)], {k: str(v) for k, v in env.items()})
    def line(self, word): return self.wait_for(re.escape(word)).string
    def __enter__(self): return self
    def __exit__(self, *_): self.kill()


def start_server(data, port=0, **settings):
    "Our server in a process: its address is `.url`."
    process = Process("-m", "colab_gpu", "serve", "--port", port, COLAB_GPU_DATA=data, GPU_WORKER_TOKEN=TOKEN, **settings)
    process.url = process.wait_for(r"serves at (http://\S+)")[1]
    process.port = int(process.url.rpartition(":")[2])
    return process


def start_reference(token=TOKEN, **settings):
    "The reference's server in a process."
    process = Process(HERE / "reference_server.py", GPU_WORKER_TOKEN=token, **settings)
    process.url = "http://127.0.0.1:" + process.wait_for(r"^(\d+)$")[1]
    return process


def start_worker_process(url, worker_id="attic", tools="gate", **settings):
    "A worker in a process; see `worker_process.py`."
    process = Process(HERE / "worker_process.py", STACK_API_BASE=url, STACK_WORKER_TOKEN=TOKEN, WORKER_ID=worker_id, TEST_TOOLS=tools,
                      **{"PYTHONPATH": HERE.parent, "COLAB_GPU_DATA": KEPT.name, **settings})
    process.line("Worker loop started")
    return process


class ImageService:
    """A stand-in as a process; see `image_service.py`."""

    def __init__(self, kind, **env):
        self.process = Process(HERE / "image_service.py", kind, PYTHONPATH=HERE.parent, **env)
        self.host = "127.0.0.1:" + self.process.wait_for(r"^(\d+)$")[1]
        self.url = f"http://{self.host}/{'mcp' if kind == 'mcp' else 'generate'}"

    def get(self, path="/stand-in"):
        with urllib.request.urlopen(f"http://{self.host}{path}", timeout=30) as answer: return json.load(answer)

    @property
    def seen(self): return self.get()


class Wire:
    """A TCP relay in front of a server that can lose answers.

    `lose(match)` loses the answer to the next request whose head contains `match`: the server has served it, the caller sees the connection
    break. With `after`, that many bytes of the answer come through. `drop(match)` loses the request itself. `hold(match)` keeps the answer back
    until `let_go()`.
    """
    def __init__(self, url):
        self.target = ("127.0.0.1", int(url.rpartition(":")[2]))
        self.requests, self._plans, self._lock = [], [], threading.Lock()
        self.lost, self.held, self.go = threading.Event(), threading.Event(), threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def lose(self, match, after=0): self._plans.append(("lose", match, after)); self.lost.clear()
    def drop(self, match): self._plans.append(("drop", match, 0)); self.lost.clear()
    def hold(self, match): self._plans.append(("hold", match, 0))
    def let_go(self): self.go.set()
    def heads(self, match): return [h for h in self.requests if match in h]
    def __enter__(self): return self
    def __exit__(self, *_): self.listener.close()

    def _accept(self):
        while True:
            try: caller, _ = self.listener.accept()
            except OSError: return
            threading.Thread(target=self._relay, args=(caller,), daemon=True).start()

    def _relay(self, caller):
        server, state = socket.create_connection(self.target), {"plan": None, "sent": 0}
        def upstream():
            try:
                while data := caller.recv(65536):
                    text = data.decode("latin-1")
                    if " HTTP/1.1\r\n" in text:
                        with self._lock:
                            self.requests.append(text)
                            plan = next((p for p in self._plans if p[1] in text), None)
                            if plan: self._plans.remove(plan); state.update(plan=plan, sent=0)
                        if plan and plan[0] == "drop": break
                    server.sendall(data)
            except OSError: pass
            finally: self._shut(server)
        threading.Thread(target=upstream, daemon=True).start()
        try:
            while data := server.recv(65536):
                kind, _, after = state["plan"] or (None, None, 0)
                if kind == "hold": self.held.set(); self.go.wait(60); state["plan"] = None
                if kind == "lose":
                    room = after - state["sent"]
                    if room < len(data):
                        if room > 0: caller.sendall(data[:room])
                        break
                    state["sent"] += len(data)
                caller.sendall(data)
        except OSError: pass
        finally:
            self._shut(caller); self._shut(server)
            if state["plan"] and state["plan"][0] in ("lose", "drop"): self.lost.set()

    @staticmethod
    def _shut(sock):
        for act in (lambda: sock.shutdown(socket.SHUT_RDWR), sock.close):
            try: act()
            except OSError: pass
