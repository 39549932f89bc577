"""How long it takes from *Run all* to the worker's first poll, cell by cell, in an environment like Colab's.

    python benchmarks/bench_notebook.py [--runs 3]

The environment has what Colab's image has, and the package besides, so that nothing is downloaded; `single file` is the notebook that carries
the package. The kernel is up before the clock starts, as it is when somebody presses Run all.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import TOKEN  # noqa: E402
from processes import eventually, start_server  # noqa: E402
from stages import Notebook, colab_env, overlay, pip  # noqa: E402

from colab_gpu import bundle  # noqa: E402
from colab_gpu.client import Client  # noqa: E402

WORDS = ("terms", "settings", "machine", "package", "install", "start")


def once(what: object, folder: Path, number: int) -> tuple[float, dict[str, float]]:
    """Seconds to the first poll, and those of each cell."""
    with start_server(folder / f"server{number}") as server:
        python = overlay(folder / f"env{number}", folder / "packages", colab_env())
        home = folder / f"home{number}"
        home.mkdir()
        env = {"HOME": home, "STACK_WORKER_TOKEN": TOKEN, "START_OLLAMA": 0, "OLLAMA_URL": "http://127.0.0.1:9", "COLAB_GPU_DATA": home / "data"}
        with Notebook(what, python, home, env, {"STACK_API_BASE": server.url, "PRELOAD_MODELS": False}) as notebook:
            began = time.perf_counter()
            notebook.run_all(range(len(WORDS)))
            eventually(lambda: Client(server.url, "").workers(), "the first poll")
            return time.perf_counter() - began, dict(zip(WORDS, notebook.took.values(), strict=True))


def main() -> None:
    """Run, and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        name, wheel = bundle.build_wheel()
        (folder / name).write_bytes(wheel)
        pip(overlay(folder / "packages", colab_env()), folder / name, "ollama", "pyngrok")
        for kind, what in (("template", bundle.package_folder() / bundle.TEMPLATE), ("single file", bundle.notebook())):
            found = [once(what, folder, int(f"{n}{len(kind)}")) for n in range(runs)]
            cells = ", ".join(f"{word} {statistics.median(took[word] for _, took in found):.1f}" for word in WORDS)
            print(f"{kind:<12} first poll after {statistics.median(total for total, _ in found):5.1f} s (median of {runs})   {cells}", flush=True)


if __name__ == "__main__":
    main()
