"""Chat through queue and worker, next to the same daemon asked directly: each figure as a table row, and all of them as JSON.

    python benchmarks/bench_chat.py [--json FILE] [--only NAME ...] [--url http://localhost:11434 --model llama3:8b]

rate      tokens a second from submit to reply, over those from the `ollama` client straight from the daemon, in turns (to reach: 0.97 or more);
          at the pace of a small model on a GPU, and as fast as the daemon's stand-in can write
first     how much later the first token comes than straight from the daemon (to reach: 30 ms or less)
memory    100,000 tokens in one answer, again and again: what worker and server grow by
cancel    from the order to the stop of the daemon's writing: inside the worker (to reach: 100 ms or less), and from the caller's cancel

Without --url the daemon is the tests' stand-in, so that what is measured is the way there and back. Nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from colab_gpu.chat import ChatExecutor, Ollama, ollama_client  # noqa: E402
from colab_gpu.client import Client  # noqa: E402
from colab_gpu.config import Settings  # noqa: E402
from colab_gpu.errors import Interrupted  # noqa: E402
from colab_gpu.jobs import LocalContext  # noqa: E402

TOKEN = "bench"


@contextlib.contextmanager
def child(word: str, *command: str, **env: str):
    """A process, once it has said a line with `word`; and that line."""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **env})
    try:
        line = next((line for line in process.stdout if word in line), "")
        assert line, f"{command} did not say {word}"
        threading.Thread(target=lambda: [None for _ in process.stdout], daemon=True).start()
        yield process, line.strip()
    finally:
        process.terminate()
        process.wait(20)


class Setup:
    """A daemon, a server and a worker, each a process; and both ways to the daemon."""

    def __init__(self, args: argparse.Namespace, stack: contextlib.ExitStack) -> None:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-chat-"))
        self.stand_in = args.url is None
        self.daemon = args.url or "http://" + stack.enter_context(
            child("Listening on", "tests/ollama_daemon.py", "serve", OLLAMA_HOST="127.0.0.1:0"))[1].split()[2]
        self.model = args.model
        self.server, line = stack.enter_context(child("serves at", "-m", "colab_gpu", "serve", "--port", "0", GPU_WORKER_TOKEN=TOKEN,
                                                      COLAB_GPU_DATA=folder))
        self.url = line.split()[-1]
        self.worker, _ = stack.enter_context(child(
            "loop started", "-m", "colab_gpu", "worker", "--tools", "ollamaChat", STACK_API_BASE=self.url, STACK_WORKER_TOKEN=TOKEN,
            COLAB_GPU_DATA=folder, OLLAMA_URL=self.daemon, START_OLLAMA="0"))
        self.client, self.direct = Client(self.url, ""), ollama_client(self.daemon, local=True)

    def prompt(self, tokens: int, rate: int = 0) -> str:
        if self.stand_in: return f"[tokens={tokens}]" + (f" [rate={rate}]" if rate else "")
        return f"Count from 1 to {tokens}."

    def options(self, tokens: int) -> dict: return {} if self.stand_in else {"num_predict": tokens, "temperature": 0, "seed": 7}

    def straight(self, tokens: int, rate: int = 0) -> tuple[float, float, int]:
        """Seconds to the first token and to the end, and how many tokens."""
        began, first, last = time.perf_counter(), None, None
        for last in self.direct.generate(self.model, self.prompt(tokens, rate), stream=True, options=self.options(tokens)):  # noqa: B007
            first = first or time.perf_counter() - began
        return first, time.perf_counter() - began, last.eval_count

    def queued(self, tokens: int, rate: int = 0) -> tuple[float, float, int]:
        """The same through queue and worker."""
        began, first = time.perf_counter(), None
        chat = self.client.chat(self.prompt(tokens, rate), model=self.model, options=self.options(tokens))
        for _ in chat: first = first or time.perf_counter() - began
        return first, time.perf_counter() - began, chat.reply["eval_count"]

    def seen(self) -> dict:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{self.daemon}/stand-in") as answer: return json.load(answer)


def in_turns(setup: Setup, repeats: int, *what: int) -> tuple[list, list]:
    """Both ways, `repeats` times, the first now this one, now that."""
    straight, queued = [], []
    for n in range(repeats):
        for way in (0, 1) if n % 2 else (1, 0):
            (queued if way else straight).append((setup.queued if way else setup.straight)(*what))
    return straight, queued


def bench_rate(setup: Setup) -> dict:
    rows = {}
    for name, tokens, rate, repeats in (("150 tokens/s", 900, 150, 3), ("as fast as it can", 20_000, 0, 5)):
        if rate and not setup.stand_in: continue
        setup.queued(50)
        straight, queued = in_turns(setup, repeats, tokens if setup.stand_in else 300, rate)
        a, b = (statistics.median(count / took for _, took, count in each) for each in (straight, queued))
        rows[name] = {"straight": round(a, 1), "queued": round(b, 1), "ratio": round(b / a, 3)}
    return rows


def bench_first(setup: Setup) -> dict:
    setup.queued(20)
    straight, queued = in_turns(setup, 15, 100, 100)
    a, b = ([first * 1000 for first, _, _ in each] for each in (straight, queued))
    return {"straight_ms": round(statistics.median(a), 1), "queued_ms": round(statistics.median(b), 1),
            "added_ms": round(statistics.median(b) - statistics.median(a), 1), "added_best_ms": round(min(b) - min(a), 1)}


def bench_memory(setup: Setup) -> dict:
    def mb(process: subprocess.Popen) -> float: return psutil.Process(process.pid).memory_info().rss / 1e6
    setup.queued(1000)
    rows = [("at rest", round(mb(setup.worker), 1), round(mb(setup.server), 1))]
    for n in range(4):
        _, took, count = setup.queued(100_000)
        rows.append((f"after {(n + 1) * count:,} tokens ({took:.1f} s)", round(mb(setup.worker), 1), round(mb(setup.server), 1)))
    return {"rows_worker_server_mb": rows, "worker_growth_after_the_first_mb": round(rows[-1][1] - rows[1][1], 1),
            "server_growth_after_the_first_mb": round(rows[-1][2] - rows[1][2], 1)}


class _Told(LocalContext):
    """Cancels itself when the first token has come, and notes when."""
    def __init__(self) -> None:
        super().__init__()
        self.at = 0.0
    def token(self, text: str, kind: str = "") -> None:
        if self.stop is None: threading.Timer(0.05, self.order).start()
    def order(self) -> None:
        self.at, self.stop = time.monotonic(), Interrupted("The job was canceled.")


def bench_cancel(setup: Setup) -> dict:
    if not setup.stand_in: return {"skipped": "only the stand-in says when it stopped"}
    chat = ChatExecutor(ollama=Ollama(Settings({"OLLAMA_URL": setup.daemon, "START_OLLAMA": "0"}), say=lambda line: None))
    inside, outside, returned = [], [], []
    for n in range(12):
        before = setup.seen()["stopped"]
        ctx = _Told()
        # Now while tokens come, now while none is due for a long time.
        prompt = "[tokens=100000] [rate=200]" if n % 2 else "[tokens=9] [wait=1]"
        with contextlib.suppress(Interrupted): chat.run({"prompt": prompt, "model": setup.model}, ctx)
        returned.append((time.monotonic() - ctx.at) * 1000)
        inside.append((_stopped(setup, before) - ctx.at) * 1000)
    for _ in range(8):
        before = setup.seen()["stopped"]
        talk = setup.client.chat("[tokens=100000] [rate=200]", model=setup.model)
        next(iter(talk))
        at = time.monotonic()
        talk.job.cancel()
        outside.append((_stopped(setup, before) - at) * 1000)
        talk.job.wait(60)
    return {"order_to_return_ms": _spread(returned), "order_to_daemon_stop_ms": _spread(inside), "caller_to_daemon_stop_ms": _spread(outside)}


def _stopped(setup: Setup, before: int) -> float:
    while (seen := setup.seen())["stopped"] == before: time.sleep(0.005)
    return seen["stopped_at"]


def _spread(values: list[float]) -> dict: return {"median": round(statistics.median(values), 1), "worst": round(max(values), 1)}


BENCHES = {"rate": bench_rate, "first": bench_first, "memory": bench_memory, "cancel": bench_cancel}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--url", help="a real Ollama's address")
    parser.add_argument("--model", default="llama3:8b")
    args, figures = parser.parse_args(), {}
    for name in args.only:
        with contextlib.ExitStack() as stack:
            figures[name] = BENCHES[name](Setup(args, stack))
        print(f"{name:8} {json.dumps(figures[name])}", flush=True)
    if args.json: Path(args.json).write_text(json.dumps(figures, indent=2))


if __name__ == "__main__": main()
