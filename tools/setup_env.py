"""Make a virtual environment with everything a command of this repository needs.

    python tools/setup_env.py images          # what `make demo` needs
    python tools/setup_env.py images dev      # what `make test` needs

Standard library only. It prints one line a step, and the installer's output only when a step fails. A second run with nothing
changed does nothing. On a Linux machine without an NVIDIA GPU it takes a CPU build of PyTorch: the ordinary one brings
gigabytes of CUDA that such a machine cannot use.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"  # PyTorch's own, see https://pytorch.org/get-started/locally
CONSTRAINTS = ROOT / "constraints-ci.txt"


def python_of(folder: Path) -> Path:
    """The interpreter of the environment in `folder`."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def stamp_of(extras: list[str], constrained: bool) -> str:
    """A digest of everything the environment depends on."""
    parts = [sys.version, *sorted(extras), str(constrained)]
    parts += [(ROOT / name).read_text(encoding="utf-8") for name in ("settings.ini", "setup.py", "constraints-ci.txt")]
    return hashlib.sha256("\n".join([*parts, str(ROOT)]).encode()).hexdigest()


def needs_cpu_build() -> bool:
    """Whether this is a Linux machine without an NVIDIA GPU."""
    return platform.system() == "Linux" and not Path("/dev/nvidia0").exists() and shutil.which("nvidia-smi") is None


def pip(python: Path, *args: str, quick: bool = False) -> subprocess.CompletedProcess[str]:
    """Run pip quietly; `quick` gives up at once when an index cannot be reached."""
    patience = ["--retries", "0", "--timeout", "10"] if quick else []
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *patience, *args]
    return subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def must(step: str, done: subprocess.CompletedProcess[str]) -> None:
    """End with the installer's own words when a step failed."""
    if done.returncode:
        sys.exit(f"{done.stdout}\nsetup_env: {step} failed; the installer's words are above.")


def install_torch(python: Path, constrained: bool) -> None:
    """Install PyTorch before anything else asks for it."""
    if not needs_cpu_build():
        return  # the ordinary build comes with the `images` extra
    pin = ["-c", str(CONSTRAINTS)]
    if not constrained and pip(python, "--index-url", CPU_WHEELS, "torch", quick=True).returncode == 0:
        return
    # Continuous integration, or a machine that cannot reach PyTorch's index: the pinned version, from wherever pip looks.
    must("installing torch", pip(python, *pin, "torch"))


def main() -> None:
    """Make or refresh the environment."""
    if sys.version_info < OLDEST:
        sys.exit(f"colab-gpu needs Python {OLDEST[0]}.{OLDEST[1]} or newer; this is {platform.python_version()}.")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extras", nargs="*", help="extras of the package: images, dev, …")
    parser.add_argument("--venv", default=str(ROOT / ".venv"), help="folder of the environment (.venv)")
    args = parser.parse_args()
    folder, constrained = Path(args.venv), bool(os.environ.get("CI"))
    marker, python = folder / ".colab-gpu-stamp", python_of(folder)
    old = marker.read_text().split("\n") if marker.exists() and python.exists() else ["", ""]
    extras = sorted({*args.extras, *filter(None, old[1].split(","))})  # `make demo` after `make test` takes nothing away
    stamp = stamp_of(extras, constrained)
    if old[0] == stamp:
        return
    print(f"setup_env: making {folder} for {', '.join(extras) or 'the core'} (a few minutes the first time)", flush=True)
    if not python.exists():
        venv.create(folder, with_pip=True)
    if "images" in extras:
        install_torch(python, constrained)
    target = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    must("installing colab-gpu", pip(python, *(["-c", str(CONSTRAINTS)] if constrained else []), "-e", target))
    marker.write_text(f"{stamp}\n{','.join(extras)}")
    print("setup_env: ready", flush=True)


if __name__ == "__main__":
    main()
