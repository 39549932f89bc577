"""After editing notebooks: export them, run them keeping their outputs, clean them, copy the template into the package, write the README.

    python tools/build_notebooks.py [NOTEBOOK ...]     # all of them, or the named ones (every one is exported)

The order matters: notebooks import their siblings from the exported package.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE, SHIPPED = ROOT / "nbs" / "colab_gpu_service_template.ipynb", ROOT / "colab_gpu" / "service_template.ipynb"
RUN = "import sys; from nbdev.test import nbdev_test; nbdev_test(sys.argv[1], save=True, n_workers=0)"


def step(name: str, *code: str) -> None:
    """Run `python -c code…` in the root of the repository, and stop where it fails."""
    print(name, flush=True)
    done = subprocess.run([sys.executable, "-c", *code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if done.returncode:
        sys.exit(f"build_notebooks: {name} failed; what it said is above.")


def main() -> None:
    """Take the notebooks from edited to committable."""
    named = [Path(name).resolve() for name in sys.argv[1:]]
    for path in named:
        if path.suffix != ".ipynb" or not path.is_file():
            sys.exit(f"build_notebooks: {path} is not a notebook.")
    step("export", "from nbdev.doclinks import nbdev_export; nbdev_export()")
    for path in named or sorted((ROOT / "nbs").glob("*.ipynb")):
        step(f"run {path.name}", RUN, str(path))
    step("clean", "from nbdev.clean import nbdev_clean; nbdev_clean()")
    shutil.copyfile(TEMPLATE, SHIPPED)
    step("README.md", "import runpy; runpy.run_path('tools/make_readme.py', run_name='__main__')")


if __name__ == "__main__":
    main()
