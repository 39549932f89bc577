"""A worker in a process of its own, with executors that tests steer through files.

`gate` appends the worker's id to the file `mark` when a run begins, then takes steps until the file `gate` exists. `stubborn` does the same
and never looks up. `paint` returns a picture, `canvas` takes four jobs in one call,
`grip` holds the interpreter's lock.
"""
import os, signal, sys, time
from pathlib import Path

from colab_gpu.worker import Worker, run_until_interrupted

sys.path.insert(0, str(Path(__file__).parent))
from processes import png


class Gate:
    tool, stubborn = "gate", False

    def run(self, payload, ctx):
        with open(payload["mark"], "a") as file: file.write(os.environ["WORKER_ID"] + "\n")
        step = 0
        while not os.path.exists(payload["gate"]):
            if not self.stubborn: ctx.check()
            step += 1
            ctx.progress(step, 1_000_000, phase=payload.get("phase", "running"))
            time.sleep(0.01)
        return {"by": os.environ["WORKER_ID"]}


class Stubborn(Gate):
    "Serves the jobs of `gate`, but never asks whether it should stop."
    stubborn = True


class Paint:
    tool = "imagenGenerate"

    def run(self, payload, ctx):
        ctx.progress(1, 1)
        ctx.artifact("image.png", png(), "image/png")
        return {"model": "plain", "prompt": payload["prompt"], "seed": 7}


class Grip:
    "Holds the interpreter's lock for so many seconds, in one call after the other into C, the way a library does that never lets go."
    tool = "grip"
    def run(self, payload, ctx):
        sys.setswitchinterval(1000)
        try:
            end = time.monotonic() + payload["seconds"]
            while time.monotonic() < end: sum(range(1_000_000))
        finally: sys.setswitchinterval(0.005)
        return {"by": os.environ["WORKER_ID"]}


class Canvas:
    "Four at a time: writes its name and how many there are to the file named by the prompt, waits for the file named by the negative prompt."
    tool = "imagenGenerate"

    def batch_size(self): return 4
    def run(self, payload, ctx): return self.run_batch([(payload, ctx)])[0]
    def run_batch(self, jobs):
        first = jobs[0][0]
        with open(first["prompt"], "a") as file: file.write(f"{os.environ['WORKER_ID']} {len(jobs)}\n")
        while not os.path.exists(first["negative_prompt"]):
            for _, ctx in jobs: ctx.check()
            time.sleep(0.01)
        return [{"by": os.environ["WORKER_ID"]} for _ in jobs]


def main():
    if os.environ.get("TEST_IGNORE_SIGINT"): signal.signal(signal.SIGINT, signal.SIG_IGN)
    executors = {"gate": Gate, "stubborn": Stubborn, "paint": Paint, "canvas": Canvas, "grip": Grip}
    worker = Worker([executors[name]() for name in os.environ["TEST_TOOLS"].split(",")])
    try: run_until_interrupted(worker, timeout_s=float(os.environ.get("TEST_TIMEOUT", 30)))
    except KeyboardInterrupt: sys.exit(130)


if __name__ == "__main__": main()
