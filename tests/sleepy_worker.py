"""A worker process with small tools, for the tests that kill it. Says what it does, a line at a time."""

import sys
import time

from colab_gpu.jobs import RunContext
from colab_gpu.worker import Worker


class Sleepy:
    """Sleeps `seconds`, in short steps with a check between them, and says so when it begins."""

    tool = "sleepy"

    def run(self, payload: dict, ctx: RunContext) -> dict:
        print("BEGUN", ctx.job_id, flush=True)
        steps = int(payload.get("seconds", 1) / 0.05)
        for step in range(steps):
            ctx.check()
            ctx.progress(step + 1, steps)
            time.sleep(0.05)
        ctx.artifact("note.txt", b"slept " * int(payload.get("size", 1)), "text/plain")
        return {"slept": payload.get("seconds", 1), "by": sys.argv[1]}


if __name__ == "__main__":
    worker = Worker([Sleepy()], log=lambda text: print(text, flush=True))
    worker.loop()
