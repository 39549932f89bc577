"""What the panel costs the machine that the GPU hangs on, as a share of one core.

    python benchmarks/bench_panel.py [--repaints 300] [--no-kernel] [--check] [--json FILE]

A snapshot is painted again and again, and the process's CPU time taken: once with nothing going on, once with two jobs under way (each repaint a
step, an elapsed time, more words and, every second time, a new preview of about 8 kB), a model being pulled, and a job that ends every tenth repaint
with a picture of 512 × 512 (its thumbnail included). The panel repaints once a second when idle, and twice while something is under way.

Unless --no-kernel is given, it is done in a real kernel too, so that every change is serialised and sent; the page is not there, and costs this
machine nothing. The snapshot itself is a stand-in's and costs nothing. With --check the exit code is 1 when it is above 1 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
MOST = 0.01


def busy_service() -> Any:
    """A service whose every snapshot differs from the last one as a busy one's does."""
    from panel_service import PuppetService, ended, job, model, picture

    service = PuppetService(state="running", requestsPerMonth=20_000, lines=[f"[worker] Completed job {n}" for n in range(120)])
    previews, pictures, n = [picture(k, 160) for k in range(4)], [picture(k, 512) for k in range(12)], 0

    def snapshot() -> dict[str, Any]:
        nonlocal n
        n += 1
        if n % 10 == 0:
            service.now["recent"] = [ended(n, picture=bytes(bytearray(pictures[n // 10 % 12]))), *service.now["recent"]][:12]
            service.now["lines"] = [*service.now["lines"], f"[worker] Completed job {n}"][-300:]
        return {**service.now, "jobs": [job(1, step=n % 20, elapsedSeconds=n / 2, preview=previews[n // 2 % 4]),
                                        job(2, tool="ollamaChat", total=0, words="word " * (n % 80), tokens=n, elapsedSeconds=n / 2)],
                "models": [model("llama3:8b", "chat", percent=n % 100)], "requests": n}

    service.snapshot = snapshot
    return service


def cpu_of(service: Any, repaints: int) -> float:
    """CPU seconds of this process, all threads, for one repaint."""
    from colab_gpu.panel import Panel

    panel = Panel(service)
    for _ in range(30):  # past the making of widgets
        panel.refresh()
    began = time.process_time()
    for _ in range(repaints):
        panel.refresh()
        time.sleep(0.002)  # the thread that sends gets its turn, as it does between two repaints
    time.sleep(0.2)
    spent = (time.process_time() - began) / repaints
    panel.close()
    return spent


def measure(repaints: int) -> dict[str, float]:
    """Share of a core, idle and busy."""
    from panel_service import PuppetService, ended, picture

    idle = PuppetService(state="waiting", recent=[ended(n, picture=picture(n)) for n in range(12)], lines=["line"] * 300)
    return {"idle": cpu_of(idle, repaints) * 1.0, "busy": cpu_of(busy_service(), repaints) * 2.0}


def measure_in_kernel(repaints: int) -> dict[str, float]:
    """The same in a kernel of its own, whose comms are real."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    try:
        code = (f"import sys; sys.path[:0] = [{str(ROOT / 'benchmarks')!r}]\nimport json, bench_panel\n"
                f"print('MEASURED', json.dumps(bench_panel.measure({repaints})))")
        said: list[str] = []
        reply = client.execute_interactive(code, timeout=300, output_hook=lambda m: said.append(m["content"].get("text", "")))
        if reply["content"]["status"] != "ok":
            sys.exit(f"bench_panel: the kernel failed: {reply['content'].get('evalue')}")
        found: dict[str, float] = json.loads("".join(said).partition("MEASURED ")[2])
        return found
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repaints", type=int, default=300)
    parser.add_argument("--no-kernel", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import ipywidgets

    results = {"without a kernel": measure(args.repaints)} | ({} if args.no_kernel else {"in a kernel": measure_in_kernel(args.repaints)})
    print(f"ipywidgets {ipywidgets.__version__}; share of one core")
    for where, shares in results.items():
        print(f"{where:18}", "   ".join(f"{name} {share:.2%}" for name, share in shares.items()))
    if args.json:
        args.json.write_text(json.dumps({"ipywidgets": ipywidgets.__version__, **results}, indent=1) + "\n")
    if args.check and max(share for shares in results.values() for share in shares.values()) > MOST:
        sys.exit(f"bench_panel: more than {MOST:.0%} of a core.")


if __name__ == "__main__":
    main()
