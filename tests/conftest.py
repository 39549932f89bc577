"""What the tests share: real servers and workers, as processes of their own."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import settings

# In continuous integration the same examples each time; at home new ones, which may find something new.
settings.register_profile("repeatable", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("repeatable")

# A shell's background jobs ignore interrupts, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "worker-token-for-tests"


class Process:
    """A child process whose lines are collected, and waited for."""

    def __init__(self, command, env):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("GPU_", "STACK_", "WORKER_", "IMAGEN_", "COLAB_GPU_", "OLLAMA_", "START_OLLAMA", "MCP_"))}
        self.popen = subprocess.Popen(command, cwd=ROOT, env={**clean, "PYTHONUNBUFFERED": "1", **env}, text=True, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT)
        self.lines, self._news = [], threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.popen.stdout:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self.lines.append(None)
            self._news.notify_all()

    def wait_for(self, pattern, timeout_s=60, skip=0):
        """The first line that matches `pattern`, leaving out the first `skip` that do."""
        deadline = time.monotonic() + timeout_s
        with self._news:
            while True:
                found = [m for line in self.lines if line is not None and (m := re.search(pattern, line))]
                if len(found) > skip:
                    return found[skip]
                assert None not in self.lines and time.monotonic() < deadline, f"no line like {pattern!r} in {self.lines[-20:]}"
                self._news.wait(0.5)

    def signal(self, number):
        self.popen.send_signal(number)

    def kill(self):
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGCONT)
            self.popen.kill()
        self.popen.wait(20)

    def end(self, timeout_s=30):
        """Stop with SIGTERM; the exit code."""
        if self.popen.poll() is None:
            self.popen.terminate()
        return self.popen.wait(timeout_s)


@pytest.fixture
def processes():
    """Starts processes, and ends whatever of them is left."""
    started = []

    def start(*command, **env):
        started.append(Process([str(c) for c in command], {k: str(v) for k, v in env.items()}))
        return started[-1]

    yield start
    for process in reversed(started):
        process.kill()


class Server:
    """`colab-gpu serve` as a process, on a port that stays the same when it is started again."""

    def __init__(self, start, data, **env):
        self._start, self._env, self.port = start, {"GPU_WORKER_TOKEN": TOKEN, "COLAB_GPU_DATA": data, **env}, 0
        self.data = Path(data)
        self.start()

    def start(self):
        self.process = self._start(sys.executable, "-m", "colab_gpu", "serve", "--port", self.port, **self._env)
        self.url = self.process.wait_for(r"serves at (http://\S+)")[1]
        self.port = int(self.url.rpartition(":")[2])
        return self

    def kill(self):
        self.process.kill()


@pytest.fixture
def serve(processes, tmp_path):
    """Starts servers."""
    return lambda **env: Server(processes, tmp_path / "data", **env)


@pytest.fixture
def work(processes):
    """Starts worker processes."""

    def start(url, name="w1", **env):
        settings = {"STACK_API_BASE": url, "STACK_WORKER_TOKEN": TOKEN, "WORKER_ID": name, "WORKER_WAIT_SECONDS": 2, "POLL_INTERVAL": 0.2, **env}
        return processes(sys.executable, ROOT / "tests" / "sleepy_worker.py", name, PYTHONPATH=ROOT, **settings)

    return start


@pytest.fixture
def server(tmp_path):
    """A server in this process, on a free port."""
    from colab_gpu.server import QueueServer

    with QueueServer({"GPU_WORKER_TOKEN": TOKEN, "COLAB_GPU_DATA": str(tmp_path / "data")}) as server:
        yield server


@pytest.fixture
def client(server):
    """A client of `server`."""
    from colab_gpu.client import Client

    with Client(server.url, "") as client:
        yield client


@pytest.fixture
def services():
    """Starts stand-ins for an image service (`mcp` or `plain`), and ends them."""
    from processes import ImageService

    started = []

    def start(kind, **env):
        started.append(ImageService(kind, **env))
        return started[-1]

    yield start
    for service in started: service.process.kill()


@pytest.fixture
def stand_in(processes):
    """Starts a stand-in for the Ollama daemon; its address."""

    def start(**env):
        process = processes(sys.executable, ROOT / "tests" / "ollama_daemon.py", "serve", **{"OLLAMA_HOST": "127.0.0.1:0", **env})
        return "http://" + process.wait_for(r"Listening on (\S+)")[1]

    return start


@pytest.fixture(scope="session")
def one_thread():
    "Pictures this small gain nothing from a second thread, and on a busy machine two that wait for each other cost tenfold."
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "A pipeline with random weights."
    from colab_gpu.pipelines import tiny_pipeline

    return tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny")
