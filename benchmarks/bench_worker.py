"""The worker's figures: what an accelerator waits for between two jobs, and how soon an order reaches a run.

    python benchmarks/bench_worker.py [--jobs 200] [--ms 20] [--batch 4] [--cancels 20] [--json FILE] [--profile]

loop     N queued jobs that each take 20 ms, one by one: the share of the time that the executor was busy, the gap between two jobs
batch    the same jobs, several in a call that takes as long as one
cancel   from a caller's cancel until the run's next `check` raises, and until the caller sees the job ended
watch    from a watcher's coming until the run knows, and from its next word until the watcher has it

A real server in a process of its own, real sockets, the worker and a toy executor here. Nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from colab_gpu.client import Client  # noqa: E402
from colab_gpu.config import Settings  # noqa: E402
from colab_gpu.errors import Interrupted  # noqa: E402
from colab_gpu.worker import Worker  # noqa: E402

TOKEN = "bench"


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The address of a server with a fresh data folder."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=os.environ.get("BENCH_DIR")) as data:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "GPU_WORKER_TOKEN": TOKEN, "COLAB_GPU_DATA": data, "GPU_MAX_PENDING_JOBS": "100000"}
        process = subprocess.Popen([sys.executable, "-m", "colab_gpu", "serve", "--port", "0"], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip().rpartition(" ")[2]
        finally:
            process.terminate()
            process.wait(60)


class Toy:
    """Takes `seconds` for a job, or for a batch of `most`, and remembers when."""

    tool = "imagenGenerate"

    def __init__(self, seconds: float) -> None:
        self.seconds, self.spans = seconds, list[tuple[float, float, int]]()

    def run(self, payload: dict[str, Any], ctx: Any) -> dict[str, Any]:
        self._spend(1)
        return {"seed": payload.get("seed")}

    def _spend(self, jobs: int) -> None:
        began = time.perf_counter()
        while (left := began + self.seconds - time.perf_counter()) > 0:
            time.sleep(left)
        self.spans.append((began, time.perf_counter(), jobs))


class Batched(Toy):
    """The same, several jobs in a call."""

    def __init__(self, seconds: float, most: int) -> None:
        super().__init__(seconds)
        self.most = most

    def batch_size(self) -> int:
        return self.most

    def run_batch(self, jobs: Sequence[tuple[dict[str, Any], Any]]) -> list[dict[str, Any] | Exception]:
        self._spend(len(jobs))
        return [{"seed": payload.get("seed"), "batch_size": len(jobs), "batch_index": i} for i, (payload, _) in enumerate(jobs)]


class Watchful:
    """Runs until it is told to stop, and says when that was; says a word when it is first watched."""

    tool = "gate"

    def __init__(self) -> None:
        self.running, self.stopped_at, self.watched_at = threading.Event(), 0.0, 0.0

    def run(self, payload: dict[str, Any], ctx: Any) -> dict[str, Any]:
        self.watched_at = 0.0
        self.running.set()
        try:
            while True:
                ctx.check()
                if ctx.watched and not self.watched_at:
                    self.watched_at = time.perf_counter()
                    ctx.token("word")
                time.sleep(0.001)
        except Interrupted:
            self.stopped_at = time.perf_counter()
            raise


def worker_at(url: str, *executors: Any) -> Worker:
    """A worker that says nothing."""
    settings = Settings({"STACK_API_BASE": url, "STACK_WORKER_TOKEN": TOKEN, "WORKER_ID": "bench"}, environ={})
    return Worker(executors, settings, log=None)


def figures(values: Sequence[float]) -> str:
    """Median and 95th percentile of seconds, in ms."""
    ranked = sorted(values)
    return f"{statistics.median(ranked) * 1000:.1f} ms (95 %: {ranked[int(len(ranked) * 0.95)] * 1000:.1f})"


def bench_loop(args: argparse.Namespace, toy: Toy) -> dict[str, float]:
    """Busy time over wall time, from the first job's start to the last one's end."""
    with served() as url, Client(url, "") as client:
        jobs = [client.submit(toy.tool, {"prompt": "x", "seed": n}) for n in range(args.jobs)]
        worker, before = worker_at(url, toy), resource.getrusage(resource.RUSAGE_SELF)
        thread = profiled(worker, args) if args.profile else None
        if thread is None:
            worker.start()
        jobs[-1].wait(300)  # waiting for each would compete with the worker for this process's interpreter
        worker.stop(grace_s=10)
        assert worker.counts["completed"] == args.jobs
        after = resource.getrusage(resource.RUSAGE_SELF)
        spans = toy.spans
        busy, wall = sum(b - a for a, b, _ in spans), spans[-1][1] - spans[0][0]
        gaps = [b[0] - a[1] for a, b in itertools.pairwise(spans)]
        return {"busy_share": busy / wall, "jobs_per_s": sum(n for _, _, n in spans) / wall, "gap_ms": statistics.median(gaps) * 1000,
                "gap_p95_ms": sorted(gaps)[int(len(gaps) * 0.95)] * 1000, "calls": len(spans), "requests": worker.snapshot()["requests"],
                "cpu_ms": (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / args.jobs * 1000,
                "switches": (after.ru_nvcsw - before.ru_nvcsw) / args.jobs}


def profiled(worker: Worker, args: argparse.Namespace) -> threading.Thread:
    """The loop under cProfile; what cost most is printed when it ends."""
    import cProfile
    import pstats

    def work() -> None:
        profile = cProfile.Profile()
        with profile:
            for _ in range(args.jobs):
                worker.turn()
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def bench_orders(args: argparse.Namespace) -> dict[str, float]:
    """How soon a run hears of a cancel, and of a watcher."""
    stops, ends, hears, words = [], [], [], []
    with served() as url, Client(url, "") as client:
        gate = Watchful()
        worker = worker_at(url, gate).start()
        for _ in range(args.cancels):
            gate.running.clear()
            job = client.submit(gate.tool)
            gate.running.wait(60)
            time.sleep(1.2)  # past the first heartbeats
            watch = threading.Thread(target=lambda job=job: words.append(first_word(job.events)))
            began = time.perf_counter()
            watch.start()
            while not gate.watched_at:
                time.sleep(0.001)
            hears.append(gate.watched_at - began)
            while len(words) < len(hears):
                time.sleep(0.001)
            words[-1] -= gate.watched_at
            began = time.perf_counter()
            job.cancel()
            assert job.wait(120).status == "canceled"
            ends.append(time.perf_counter() - began)
            stops.append(gate.stopped_at - began)
        worker.stop(grace_s=10)
    print(f"cancel   the run stops after {figures(stops)}, the caller knows after {figures(ends)}")
    print(f"watch    the run knows after {figures(hears)}, its word is there after {figures(words)}")
    return {"stop_ms": statistics.median(stops) * 1000, "end_ms": statistics.median(ends) * 1000, "hear_ms": statistics.median(hears) * 1000,
            "word_ms": statistics.median(words) * 1000}


def first_word(events: Callable[[], Iterator[Any]]) -> float:
    """When the first token came."""
    return next(time.perf_counter() for event in events() if event.kind == "token")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--ms", type=float, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--cancels", type=int, default=20)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--profile", action="store_true", help="only the loop, under cProfile")
    args = parser.parse_args()
    out: dict[str, Any] = {}
    plans: dict[str, Toy] = {"loop": Toy(args.ms / 1000)}
    if args.batch > 1 and not args.profile:
        plans["batch"] = Batched(args.ms / 1000, args.batch)
    for name, toy in plans.items():
        out[name] = got = bench_loop(args, toy)
        print(f"{name:8} busy {got['busy_share']:.1%} of the time, gap {got['gap_ms']:.2f} ms (95 %: {got['gap_p95_ms']:.2f}), "
              f"{got['jobs_per_s']:.1f} jobs/s; a job costs the worker {got['cpu_ms']:.2f} ms, {got['switches']:.1f} changes of context, "
              f"{got['requests'] / args.jobs:.2f} requests")
    if args.cancels and not args.profile:
        out["orders"] = bench_orders(args)
    if args.json:
        Path(args.json).write_text(json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()
