"""What an accelerator waits for between two queued jobs: on loopback, and over a slow line.

    python benchmarks/bench_idle.py [--jobs 8] [--seconds 2] [--bytes 1000000] [--rtt-ms 150] [--up-mbit 5] [--down-mbit 50] [--json FILE]

Each job takes 2 s and hands over a file of 1 MB that does not compress. Idle is the time from the end of one run to the start of the next;
the first job's wait and the last one's delivery are not counted. The slow line is `tests/chaos/proxy.py`: half a round trip each way, one
more round trip for a new connection, and a rate in bytes a second that all connections share. It knows no slow start and loses no packets.

A real server, the proxy and this worker are processes of their own. The exit code is 1 with --check when a target is missed:
at most 20 ms on loopback (median), at most 5 % of the time over the slow line.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from colab_gpu.client import Client  # noqa: E402
from colab_gpu.config import Settings  # noqa: E402
from colab_gpu.worker import Worker  # noqa: E402

TOKEN = "bench"


@contextlib.contextmanager
def process(*command: Any, **env: Any) -> Iterator[subprocess.Popen[str]]:
    """A Python process; ended with the block."""
    child = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             env={**os.environ, "PYTHONPATH": str(ROOT), **{k: str(v) for k, v in env.items()}})
    try:
        yield child
    finally:
        child.terminate()
        child.wait(60)


@contextlib.contextmanager
def served(data: Path) -> Iterator[str]:
    """The address of a server."""
    with process("-m", "colab_gpu", "serve", "--port", "0", GPU_WORKER_TOKEN=TOKEN, COLAB_GPU_DATA=data) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip().rpartition(" ")[2]


@contextlib.contextmanager
def slow_line(url: str, **knobs: Any) -> Iterator[str]:
    """The address of a proxy in front of `url`."""
    with process("-m", "tests.chaos.proxy", url.rpartition("/")[2]) as proxy:
        assert proxy.stdin is not None and proxy.stdout is not None
        port = proxy.stdout.readline().strip()
        proxy.stdin.write(json.dumps(knobs) + "\n")
        proxy.stdin.flush()
        assert "error" not in json.loads(proxy.stdout.readline())
        yield f"http://127.0.0.1:{port}"


class Bake:
    """Takes `seconds`, hands over a file of `size` bytes, and remembers when."""

    tool = "bake"

    def __init__(self, seconds: float, size: int) -> None:
        self.seconds, self.data, self.spans = seconds, random.Random(1).randbytes(size), list[tuple[float, float]]()

    def run(self, payload: dict[str, Any], ctx: Any) -> dict[str, Any]:
        began = time.perf_counter()
        while (left := began + self.seconds - time.perf_counter()) > 0:
            ctx.check()
            time.sleep(min(left, 0.1))
        ctx.artifact("cake.bin", self.data, "application/octet-stream")
        self.spans.append((began, time.perf_counter()))
        return {"n": payload["n"]}


def measure(args: argparse.Namespace, url: str, direct: str, data: Path) -> dict[str, float]:
    """Run the jobs; the gaps between them."""
    bake = Bake(args.seconds, args.bytes)
    with Client(direct, "") as client:
        jobs = [client.submit(bake.tool, {"n": n}) for n in range(args.jobs)]
        settings = Settings({"STACK_API_BASE": url, "STACK_WORKER_TOKEN": TOKEN, "WORKER_ID": "bench", "COLAB_GPU_DATA": data}, environ={})
        worker = Worker([bake], settings, log=None).start()
        for job in jobs:
            assert job.wait(300).status == "completed", job.detail
        worker.stop(grace_s=10)
    gaps = [b[0] - a[1] for a, b in itertools.pairwise(bake.spans)]
    wall = bake.spans[-1][0] - bake.spans[0][0]
    return {"gap_ms": statistics.median(gaps) * 1000, "gap_max_ms": max(gaps) * 1000, "idle_share": sum(gaps) / wall, "jobs": len(bake.spans)}


def main() -> int:
    """Measure; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--bytes", type=int, default=1_000_000)
    parser.add_argument("--rtt-ms", type=float, default=150)
    parser.add_argument("--up-mbit", type=float, default=5)
    parser.add_argument("--down-mbit", type=float, default=50)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.jobs < 2:
        parser.error("--jobs must be at least 2: idle is what lies between two jobs")
    out: dict[str, dict[str, float]] = {}
    knobs = {"delay_s": args.rtt_ms / 2000, "up_bps": args.up_mbit * 125_000, "down_bps": args.down_mbit * 125_000}
    name = f"{args.rtt_ms:g} ms, {args.up_mbit:g} Mbit/s up"
    with tempfile.TemporaryDirectory(prefix="bench-", dir=os.environ.get("BENCH_DIR")) as folder:
        data = Path(folder)
        with served(data / "a") as url:
            out["loopback"] = measure(args, url, url, data / "wa")
        with served(data / "b") as url, slow_line(url, **knobs) as slow:
            out[name] = measure(args, slow, url, data / "wb")
    met = {"loopback": out["loopback"]["gap_ms"] <= 20, name: out[name]["idle_share"] <= 0.05}
    targets = {"loopback": "gap <= 20 ms", name: "idle <= 5 %"}
    print(f"{args.jobs} jobs of {args.seconds:g} s with {args.bytes / 1e6:g} MB results\n"
          f"{'':24}{'gap':>12}{'longest':>12}{'idle':>9}   target")
    for line, got in out.items():
        print(f"{line:24}{got['gap_ms']:>9.1f} ms{got['gap_max_ms']:>9.1f} ms{got['idle_share']:>9.1%}   {targets[line]}: "
              f"{'met' if met[line] else 'MISSED'}")
    if args.json:
        Path(args.json).write_text(json.dumps(out, indent=2) + "\n")
    return int(args.check and not all(met.values()))


if __name__ == "__main__":
    sys.exit(main())
