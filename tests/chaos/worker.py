"""A worker process for the soak: the product's `Worker` with the tools of `tools.py`.

Its settings come from the environment, as a user's do. Besides: CHAOS_SEED, and CHAOS_MARKS, a folder for the `gate` jobs' files: a run that
begins there appends its worker's name to NAME.begun, and waits for the file NAME.open or NAME.open.WORKER.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

from colab_gpu.config import Settings
from colab_gpu.errors import InvalidInput, Transient
from colab_gpu.worker import Worker, run_until_interrupted
from tests.chaos.tools import REFUSAL, files_of, fingerprint

ME = os.environ.get("WORKER_ID", "worker")


def result(tool: str, payload: dict[str, Any]) -> dict[str, Any]:
    """What is expected, and who did it."""
    return {"n": payload["n"], "fingerprint": fingerprint(tool, payload["n"]), "by": ME}


def work(payload: dict[str, Any], ctx: Any) -> None:
    """Take as long as the job says, in steps."""
    steps = max(1, payload["ms"] // 20)
    for step in range(steps):
        ctx.check()
        time.sleep(payload["ms"] / 1000 / steps)
        ctx.progress(step + 1, steps)


class Mill:
    tool = "mill"

    def run(self, payload: dict[str, Any], ctx: Any) -> dict[str, Any]:
        work(payload, ctx)
        ctx.log(f"ground by {ME}")
        return result(self.tool, payload)


class Press:
    tool = "press"

    def run(self, payload: dict[str, Any], ctx: Any) -> dict[str, Any]:
        work(payload, ctx)
        for name, data in files_of(payload).items():
            ctx.artifact(name, data, "application/octet-stream")
        return result(self.tool, payload)


class Moody:
    tool = "moody"

    def __init__(self) -> None:
        self.random = random.Random(f"{os.environ.get('CHAOS_SEED', 1)}:{ME}")

    def run(self, payload: dict[str, Any], ctx: Any) -> dict[str, Any]:
        work(payload, ctx)
        if self.random.random() < 0.3:
            raise Transient("The moon is in the wrong house: try again.")
        return result(self.tool, payload)


class Hold:
    """Keeps the interpreter's lock: adding up a range is one long call in C, which neither lets go of the lock nor looks for signals."""

    tool = "hold"

    def __init__(self) -> None:
        began = time.perf_counter()
        sum(range(300_000))
        self.per_s = 300_000 / (time.perf_counter() - began)

    def run(self, payload: dict[str, Any], ctx: Any) -> dict[str, Any]:
        ctx.check()
        sum(range(int(self.per_s * payload["ms"] / 1000)))
        return result(self.tool, payload)


class Wrong:
    tool = "wrong"

    def run(self, payload: dict[str, Any], ctx: Any) -> dict[str, Any]:
        raise InvalidInput(REFUSAL.format(n=payload["n"]))


class Gate:
    """Never asks whether it should stop: a run that can't know what became of its lease."""

    tool = "gate"

    def run(self, payload: dict[str, Any], ctx: Any) -> dict[str, Any]:
        place = Path(os.environ["CHAOS_MARKS"]) / payload["name"]
        with open(f"{place}.begun", "a") as file:
            file.write(f"{ME}\n")
        while not (os.path.exists(f"{place}.open") or os.path.exists(f"{place}.open.{ME}")):
            time.sleep(0.005)
        return result(self.tool, payload)


def main() -> None:
    """Serve until interrupted."""
    tools = [Mill(), Press(), Moody(), Hold(), Wrong()]
    if os.environ.get("CHAOS_MARKS"):
        tools.append(Gate())  # type: ignore[arg-type]
    run_until_interrupted(Worker(tools, Settings(), log=lambda line: print(line, flush=True)))


if __name__ == "__main__":
    main()
