"""Images a second: through queue and worker next to a bare Diffusers loop, and in batches next to one by one, in the same run.

    python benchmarks/bench_images.py [--model demo] [--jobs 8] [--rounds 5] [--steps 25] [--size 256] [--batch 4] [--json FILE] [--profile]

single   jobs through a server in a process of its own and a worker's loop here, one a call, from the first submit to the last end,
         over `pipe(...)` in a loop here with the same weights
queue    the same with as many jobs a call as the executor takes by itself
batch    `run_batch` with --batch jobs, over `run` for each

The sides take turns within each round, first one and then the other first, and the medians of the rounds' ratios are shown: what the machine does
besides falls on both; on a busy CPU the ratio of this process's CPU seconds says more than that of the clock. Without a bundled demo model a
tiny one with random weights is drawn with; it is so quick that the queue's part shows.
Nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from colab_gpu.client import Client
from colab_gpu.config import Settings
from colab_gpu.images import ImageExecutor
from colab_gpu.jobs import LocalContext
from colab_gpu.worker import Worker

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "bench"


def timed(side: Callable[[], None]) -> tuple[float, float]:
    """Seconds that `side` takes, by the clock and of this process's CPU time."""
    started, spent = time.perf_counter(), time.process_time()
    side()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - spent


def compare(one: Callable[[], None], other: Callable[[], None], rounds: int) -> tuple[float, float, float, float]:
    """Median seconds of both sides, and the medians over the rounds of other / one, by the clock and by CPU time: how many times as fast `one` is."""
    timed(one), timed(other)
    rows = []
    for n in range(rounds):
        if n % 2:
            b, a = timed(other), timed(one)
        else:
            a, b = timed(one), timed(other)
        rows.append((a[0], b[0], b[0] / a[0], b[1] / a[1]))
    return tuple(statistics.median(column) for column in zip(*rows, strict=True))  # type: ignore[return-value]


def serve(data: str) -> tuple[subprocess.Popen[str], str]:
    """A server in a process of its own, and its address."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GPU_WORKER_TOKEN": TOKEN, "COLAB_GPU_DATA": data, "GPU_CLIENT_TOKEN": TOKEN + "-caller"}
    process = subprocess.Popen([sys.executable, "-m", "colab_gpu", "serve", "--port", "0"], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    return process, process.stdout.readline().split()[-1]


def through_queue(artist: ImageExecutor, payloads: list[dict[str, Any]], url: str, most: int) -> Callable[[], None]:
    """Submits the payloads as jobs and waits for their ends, with a worker's loop running here that takes up to `most` in a call."""
    settings = Settings({"STACK_API_BASE": url, "STACK_WORKER_TOKEN": TOKEN, "WORKER_MAX_BATCH": most}, environ=os.environ)
    worker = Worker([artist], settings, log=None)
    client = Client(url, TOKEN + "-caller")

    def side() -> None:
        worker.start()
        jobs = [client.submit("imagenGenerate", payload) for payload in payloads]
        assert {job.wait(600).status for job in jobs} == {"completed"}

    side.close = lambda: worker.stop(30)  # type: ignore[attr-defined]
    return side


def bare_loop(artist: ImageExecutor, payloads: list[dict[str, Any]]) -> Callable[[], None]:
    """Draws the payloads with nothing but Diffusers."""
    artist.preload()
    pipe = next(iter(artist.shelf.loaded.values())).pipe

    def side() -> None:
        for p in payloads:
            size = {"width": p["width"], "height": p["height"], "num_inference_steps": p["num_inference_steps"]}
            pipe(p["prompt"], guidance_scale=p["guidance_scale"], generator=torch.Generator("cpu").manual_seed(p["seed"]), **size)

    return side


def in_batches(artist: ImageExecutor, payloads: list[dict[str, Any]], size: int) -> Callable[[], None]:
    """Draws the payloads `size` at a time."""
    def side() -> None:
        for n in range(0, len(payloads), size):
            assert all(isinstance(r, dict) for r in artist.run_batch([(p, LocalContext()) for p in payloads[n:n + size]]))

    return side


def main() -> None:
    """Measure, and print a table."""
    ask = argparse.ArgumentParser()
    for name, default in (("jobs", 8), ("rounds", 5), ("steps", 25), ("size", 256), ("batch", 4), ("threads", 0)):
        ask.add_argument(f"--{name}", type=int, default=default)
    ask.add_argument("--model", default="demo")
    ask.add_argument("--device")
    ask.add_argument("--json", type=Path)
    ask.add_argument("--profile", action="store_true", help="say where the queue's side spends its time")
    args = ask.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    artist = ImageExecutor(args.model, device=args.device, settings=Settings({"IMAGEN_MAX_STEPS": 1000}, environ=os.environ))
    payloads = [{"prompt": "a red circle on a blue background", "width": args.size, "height": args.size, "num_inference_steps": args.steps,
                 "guidance_scale": 7.0, "seed": n} for n in range(args.jobs)]
    with tempfile.TemporaryDirectory(prefix="bench-images-", ignore_cleanup_errors=True) as data:
        process, url = serve(data)
        try:
            bare, rows = bare_loop(artist, payloads), {}
            for name, most in (("single", 1), ("queue", 16)):
                queue = through_queue(artist, payloads, url, most)
                rows[name] = compare(queue, bare, args.rounds)
                queue.close()  # type: ignore[attr-defined]
            if args.profile:
                profile = cProfile.Profile()
                profile.runcall(through_queue(artist, payloads, url, 1))
                pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        finally:
            process.terminate()
            process.wait(20)
    rows["batch"] = compare(in_batches(artist, payloads, args.batch), in_batches(artist, payloads, 1), args.rounds)
    model = next(iter(artist.shelf.loaded.values()))
    print(f"{model.source.name} on {model.device}, {args.size}×{args.size}, {args.steps} steps, {args.jobs} jobs a round, {args.rounds} rounds\n")
    print("| | images/s | beside it | ratio | ratio of CPU time |\n|---|---|---|---|---|")
    names = {"single": "queue and worker, one a call / bare loop", "queue": "queue and worker, as it comes / bare loop",
             "batch": f"batches of {args.batch} / one by one"}
    for name, what in names.items():
        mine, other, ratio, cpu = rows[name]
        print(f"| {what} | {args.jobs / mine:.2f} | {args.jobs / other:.2f} | {ratio:.3f} | {cpu:.3f} |")
    if args.json:
        args.json.write_text(json.dumps({"device": model.device, "model": model.source.name, **rows}))


if __name__ == "__main__":
    main()
