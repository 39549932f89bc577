"""The server's figures, each as a table row, and all of them as JSON.

    python benchmarks/bench_server.py [--json FILE] [--only NAME ...] [--jobs 1000000]

submits   durable submits a second at 16 connections (wrk), next to a bare asyncio.Protocol in the same run, and their ratio
cycles    submit + lease + complete cycles a second, with 1,000 … N jobs stored
leases    CPU of a lease as the queue grows, to a worker that takes the first job and to one that has a model loaded
wakeup    from a submit to a long-polling worker having the job, with 100 workers waiting
polls     5,000 waiting long polls: memory each, and submits meanwhile
start     resident memory when idle, time to ready, time to import the client
artifact  a 20 MB artifact up and down: growth of the server's memory

Absolute figures depend on the machine and its disk; the ratio to the bare protocol less so. Nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "bench"
BODY = json.dumps({"tool": "imagenGenerate", "payload": {"prompt": "a red circle on a blue background", "width": 512, "height": 512}})

BARE = """
import asyncio
REPLY = b"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: 330\\r\\n\\r\\n" + b"x" * 330
class Bare(asyncio.Protocol):
    def connection_made(self, transport): self.transport = transport
    def data_received(self, data): self.transport.write(REPLY)
async def main():
    server = await asyncio.get_running_loop().create_server(Bare, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""


@contextlib.contextmanager
def child(*command: str, **env: str):
    """A process whose first line is awaited."""
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **env}, text=True, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def server(**env: str):
    """A server with a fresh data folder: its process and its port."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=os.environ.get("BENCH_DIR")) as data:
        settings = {"GPU_WORKER_TOKEN": TOKEN, "COLAB_GPU_DATA": data, "GPU_MAX_PENDING_JOBS": "100000000", **env}
        with child(sys.executable, "-m", "colab_gpu", "serve", "--port", "0", **settings) as (process, line):
            yield process, int(line.rpartition(":")[2])


def wrk(port: int, seconds: int, script: Path) -> dict[str, float]:
    """Run wrk at 16 connections; requests a second and latencies in ms."""
    out = subprocess.run(["wrk", "-t1", "-c16", f"-d{seconds}s", "--latency", "-s", str(script), f"http://127.0.0.1:{port}/gpu-jobs"], text=True,
                         capture_output=True, check=True).stdout
    scale = {"us": 0.001, "ms": 1.0, "s": 1000.0}
    found = {p: float(m[1]) * scale[m[2]] for p in ("50%", "99%") if (m := re.search(rf"{p}\s+([\d.]+)(us|ms|s)", out))}
    errors = re.search(r"Non-2xx or 3xx responses: (\d+)", out)
    return {"per_s": float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1]), "p50_ms": found["50%"], "p99_ms": found["99%"],  # type: ignore[index]
            "refused": float(errors[1]) if errors else 0}


def bench_submits(args: argparse.Namespace) -> dict[str, float]:
    """Durable submits against a bare protocol, in turns."""
    if shutil.which("wrk") is None:
        print("submits: wrk is not installed (Debian: apt-get install wrk)")
        return {}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "post.lua")
        script.write_text(f"wrk.method='POST'\nwrk.body='{BODY}'\nwrk.headers['Content-Type']='application/json'\n")
        rounds = []
        with child(sys.executable, "-c", BARE) as (_, port), server() as (_, ours):
            wrk(ours, 2, script)
            for _ in range(args.rounds):
                rounds.append((wrk(int(port), args.seconds, script), wrk(ours, args.seconds, script)))
    best = max(rounds, key=lambda pair: pair[1]["per_s"])
    return {"durable submits/s (median)": statistics.median(o["per_s"] for _, o in rounds), "durable submits/s (best)": best[1]["per_s"],
            "p50 ms": best[1]["p50_ms"], "p99 ms": best[1]["p99_ms"], "refused": sum(o["refused"] for _, o in rounds),
            "bare protocol/s (median)": statistics.median(b["per_s"] for b, _ in rounds),
            "ratio (median of pairs)": statistics.median(o["per_s"] / b["per_s"] for b, o in rounds)}


def call(connection: http.client.HTTPConnection, method: str, path: str, body: object = None, **headers: str) -> object:
    """One request on a kept connection; its JSON."""
    data = json.dumps(body) if body is not None else None
    connection.request(method, path, data, {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}", **headers})
    text = connection.getresponse().read()
    return json.loads(text) if text else None


OURS = {"X-Protocol": "1", "X-Worker-Instance": "bench"}


def bench_cycles(args: argparse.Namespace) -> dict[str, float]:
    """Cycles a second on the store and broker alone, as the history grows, and over HTTP at the end."""
    from colab_gpu import broker as rules
    from colab_gpu.broker import Ask, Broker, Policy
    from colab_gpu.jobs import Job, JobSpec, new_id
    from colab_gpu.store import SQLiteStore

    out: dict[str, float] = {}
    sizes = [n for n in (1_000, 10_000, 100_000, 1_000_000) if n <= args.jobs]
    with tempfile.TemporaryDirectory(prefix="bench-", dir=os.environ.get("BENCH_DIR")) as data:
        store = SQLiteStore(Path(data, "queue.db"))
        broker = Broker(store, Policy(max_pending=10**8))
        stored = 0

        def grow(tx: object, count: int) -> None:
            for _ in range(count):
                job = Job(new_id(broker.now_ms()), "imagenGenerate", '{"prompt": "x"}', enqueued_ms=broker.now_ms())
                tx.insert(job)  # type: ignore[attr-defined]
                job.status, job.ready, job.ended_ms, job.result_json = "completed", False, 1, '{"seed": 1}'
                tx.update(job)  # type: ignore[attr-defined]
                tx.mark_archived([job])  # type: ignore[attr-defined]

        def one_round(cycles: int) -> tuple[float, float]:
            spec, ask = JobSpec("imagenGenerate", '{"prompt": "x"}'), Ask("bench")
            started, cpu = time.perf_counter(), time.process_time()
            for _ in range(cycles):
                broker.call(rules.submit, spec)
                [job] = broker.call(rules.lease, ask)
                broker.call(rules.finish, job.id, job.lease_token, {"seed": 1})
            return cycles / (time.perf_counter() - started), (time.process_time() - cpu) / cycles * 1e6

        one_round(200)
        for size in sizes:
            while stored < size:
                store.run(lambda tx: grow(tx, min(2000, size - stored)))  # noqa: B023
                stored += 2000
            rounds = [one_round(150) for _ in range(9)]
            out[f"cycles/s at {size:,} stored"] = statistics.median(per_s for per_s, _ in rounds)
            out[f"CPU us a cycle at {size:,} stored"] = statistics.median(cpu for _, cpu in rounds)
        first, last = f"at {sizes[0]:,} stored", f"at {sizes[-1]:,} stored"
        out["cycles/s, last / first"] = out[f"cycles/s {last}"] / out[f"cycles/s {first}"]
        out["CPU, last / first"] = out[f"CPU us a cycle {last}"] / out[f"CPU us a cycle {first}"]
        store.close()
    return out


def bench_leases(args: argparse.Namespace) -> dict[str, float]:
    """CPU of a lease and its release, with 100 … N jobs waiting; three models in turns, of which the second worker has one loaded."""
    from colab_gpu import broker as rules
    from colab_gpu.broker import Ask, Broker, Policy
    from colab_gpu.jobs import JobSpec
    from colab_gpu.store import SQLiteStore

    sizes = [n for n in (100, 10_000, 100_000) if n <= max(100, args.jobs)]
    asks = {"plain": Ask("bench"), "warm": Ask("bench", models=frozenset({"m1"}))}
    with tempfile.TemporaryDirectory(prefix="bench-", dir=os.environ.get("BENCH_DIR")) as data:
        brokers = {size: Broker(SQLiteStore(Path(data, f"{size}.db")), Policy(max_pending=10**8)) for size in sizes}
        for size, broker in brokers.items():
            for start in range(0, size, 2000):
                specs = [JobSpec("imagenGenerate", '{"prompt": "x"}', model=f"m{n % 3}") for n in range(start, min(size, start + 2000))]
                broker.call(lambda tx, at: [rules.submit(tx, at, spec) for spec in specs])  # noqa: B023
        rounds: dict[tuple[str, int], list[float]] = {(who, size): [] for who in asks for size in sizes}
        for _ in range(15):  # in turns, so that whatever else the machine does meets all of them
            for (who, size), took in rounds.items():
                broker, cpu = brokers[size], time.process_time()
                for _ in range(40):
                    [job] = broker.call(rules.lease, asks[who], None, broker.passed)
                    broker.call(rules.release, job.id, job.lease_token)
                took.append((time.process_time() - cpu) / 40 * 1e6)
        for broker in brokers.values():
            broker.store.close()
    out = {f"CPU us {who}, {size:,} waiting": statistics.median(took) for (who, size), took in rounds.items()}
    for who in asks:
        out[f"{who}, last / first"] = statistics.median(b / a for a, b in zip(rounds[who, sizes[0]], rounds[who, sizes[-1]], strict=True))
    return out


def bench_wakeup(args: argparse.Namespace) -> dict[str, float]:
    """From before the submit to after the worker has the job, with 100 workers waiting on their own connections."""

    async def main(port: int) -> list[float]:
        got: asyncio.Queue[tuple[str, float]] = asyncio.Queue()
        ready = asyncio.Semaphore(0)

        async def worker(n: int) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = f"Host: h\r\nAuthorization: Bearer {TOKEN}\r\nX-Protocol: 1\r\nX-Worker-Instance: i{n}\r\n".encode()
            while True:
                writer.write(b"GET /gpu-jobs/next?wait=50&worker=w%d HTTP/1.1\r\n%b\r\n" % (n, head))
                ready.release()
                text = await read_answer(reader)
                at = time.perf_counter()
                answer = json.loads(text)
                got.put_nowait((answer["job"]["id"], at))
                body = json.dumps({"leaseToken": answer["lease"]["token"], "status": "completed", "result": {}}).encode()
                path = f"/gpu-jobs/{answer['job']['id']}/complete".encode()
                writer.write(b"POST %b HTTP/1.1\r\n%bContent-Length: %d\r\n\r\n%b" % (path, head, len(body), body))
                await read_answer(reader)

        workers = [asyncio.create_task(worker(n)) for n in range(100)]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(100):
            await ready.acquire()
        await asyncio.sleep(0.5)
        took = []
        for _ in range(args.wakeups):
            started = time.perf_counter()
            writer.write(f"POST /gpu-jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(BODY)}\r\n\r\n{BODY}".encode())
            await read_answer(reader)
            _, at = await got.get()
            took.append((at - started) * 1000)
            await ready.acquire()
            await asyncio.sleep(0.002)
        for task in workers:
            task.cancel()
        return took

    with server() as (_, port):
        took = sorted(asyncio.run(main(port)))
    return {"median ms": statistics.median(took), "p99 ms": took[int(len(took) * 0.99)], "worst ms": took[-1]}


async def read_answer(reader: asyncio.StreamReader) -> bytes:
    """The body of one answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    found = re.search(rb"Content-Length: (\d+)", head)
    return await reader.readexactly(int(found[1])) if found else b""


def bench_polls(args: argparse.Namespace) -> dict[str, float]:
    """Hold many long polls; memory each, and the latency of submits for another tool meanwhile."""
    count = args.polls
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, count * 2 + 200)), hard))

    async def main(process: subprocess.Popen[str], port: int) -> dict[str, float]:
        memory, before = psutil.Process(process.pid), psutil.Process(process.pid).memory_info().rss
        writers = []
        for n in range(count):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"GET /gpu-jobs/next?wait=55&tools=nothing&worker=w{n} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {TOKEN}\r\n"
                         f"X-Protocol: 1\r\nX-Worker-Instance: instance-{n}\r\n\r\n".encode())
            writers.append(writer)
        await asyncio.sleep(2)
        held = memory.memory_info().rss
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        took = []
        for _ in range(1000):
            started = time.perf_counter()
            writer.write(f"POST /gpu-jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(BODY)}\r\n\r\n{BODY}".encode())
            await read_answer(reader)
            took.append((time.perf_counter() - started) * 1000)
        writer.write(f"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())  # noqa: F541
        waiting = re.search(rb"colab_gpu_workers_waiting (\d+)", await read_answer(reader))
        return {"waiting": float(waiting[1] if waiting else 0), "KB each": (held - before) / count / 1024,
                "submit p50 ms": statistics.median(took), "submit p99 ms": sorted(took)[990]}

    with server() as (process, port):
        return asyncio.run(main(process, port))


def bench_start(args: argparse.Namespace) -> dict[str, float]:
    """Memory when idle, time to ready, time to import the client."""
    ready, rss = [], 0.0
    for _ in range(5):
        started = time.perf_counter()
        with server() as (process, _):
            ready.append(time.perf_counter() - started)
            time.sleep(1)
            rss = max(rss, psutil.Process(process.pid).memory_info().rss / 2**20)
    imports = []
    for _ in range(7):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import colab_gpu.client"], cwd=ROOT, check=True)
        imports.append(time.perf_counter() - started)
    return {"idle MB": rss, "ready s (median)": statistics.median(ready), "import colab_gpu.client s (median)": statistics.median(imports)}


def bench_artifact(args: argparse.Namespace) -> dict[str, float]:
    """20 MB up and down, three times; how much the server's memory grew."""
    data = random.Random(1).randbytes(20 << 20)
    with server() as (process, port):
        memory, link = psutil.Process(process.pid), http.client.HTTPConnection("127.0.0.1", port)
        before, peak, took = memory.memory_info().rss, 0, []
        for _ in range(3):
            call(link, "POST", "/gpu-jobs", {"tool": "errand"})
            granted = call(link, "GET", "/gpu-jobs/next?worker=w", **OURS)
            path, token = f"/gpu-jobs/{granted['job']['id']}", granted["lease"]["token"]  # type: ignore[index]
            started = time.perf_counter()
            link.request("PUT", path + "/artifacts/x.bin", data, {"Authorization": f"Bearer {TOKEN}", "X-Lease-Token": token})
            assert link.getresponse().read()
            took.append(time.perf_counter() - started)
            call(link, "POST", path + "/complete", {"leaseToken": token, "status": "completed", "result": {}, "artifacts": ["x.bin"]})
            link.request("GET", path + "/artifacts/x.bin")
            assert link.getresponse().read() == data
            peak = max(peak, memory.memory_info().rss)
        return {"growth MB": (peak - before) / 2**20, "upload s (median, with fsync)": statistics.median(took)}


BENCHES = {"submits": bench_submits, "cycles": bench_cycles, "leases": bench_leases, "wakeup": bench_wakeup, "polls": bench_polls,
           "start": bench_start, "artifact": bench_artifact}


def main() -> None:
    """Run the benchmarks and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "server.json")
    parser.add_argument("--only", nargs="*", choices=list(BENCHES), default=list(BENCHES))
    parser.add_argument("--jobs", type=int, default=1_000_000, help="most stored jobs for `cycles`")
    parser.add_argument("--polls", type=int, default=5000)
    parser.add_argument("--wakeups", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=4)
    args = parser.parse_args()
    results = {}
    for name in args.only:
        results[name] = BENCHES[name](args)
        print(f"\n{name}")
        for what, value in results[name].items():
            print(f"  {what:40} {value:14,.3f}" if value < 100 else f"  {what:40} {value:14,.0f}", flush=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(results, indent=2))
    print(f"\n{args.json}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
