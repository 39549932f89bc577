"""Make a virtual environment with everything a command of this repository needs.

    python tools/setup_env.py images          # what `make demo` needs
    python tools/setup_env.py images chat dev      # what `make test` needs

Standard library only. It prints one line a step, and the installer's output only when a step fails. A second run with nothing
changed does nothing. On a Linux machine without an NVIDIA GPU it takes a CPU build of PyTorch: the ordinary one brings
gigabytes of CUDA that such a machine cannot use.

Versions come from constraints-ci.txt, the ones this repository was tested with, so that both commands still work when a
dependency has moved on. Where those cannot be installed (a newer Python, another platform), the newest that fit are taken.
"""

# No `from __future__ import annotations` and no newer syntax: Python 3.6 must get as far as the check below, and its sentence.
import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys

OLDEST = (3, 11)
if sys.version_info < OLDEST:
    sys.exit(f"colab-gpu needs Python {OLDEST[0]}.{OLDEST[1]} or newer; this is {platform.python_version()}.")

import urllib.request  # noqa: E402
import venv  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"  # PyTorch's own, see https://pytorch.org/get-started/locally
CONSTRAINTS = ROOT / "constraints-ci.txt"
INPUTS = ("settings.ini", "setup.py", "pyproject.toml", "constraints-ci.txt", "tools/setup_env.py")
PROBE_S = 5.0
VERSION_LINE = "version = {}.{}.{}\n".format(*sys.version_info[:3])  # as `venv` writes it


def python_of(folder: Path) -> Path:
    """The interpreter of the environment in `folder`."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def stamp_of(extras: list[str]) -> dict[str, Any]:
    """What an environment with `extras` depends on; equal stamps mean nothing to do."""
    digest = hashlib.sha256()
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes() + b"\0")
    return {"inputs": digest.hexdigest(), "python": sys.version, "root": str(ROOT), "extras": sorted(extras)}


def read_stamp(marker: Path) -> dict[str, Any]:
    """The stamp in the file `marker`; empty when there is none that can be read."""
    try:
        stamp = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def needs_cpu_build() -> bool:
    """Whether this is a Linux machine without an NVIDIA GPU."""
    return platform.system() == "Linux" and not Path("/dev/nvidia0").exists() and shutil.which("nvidia-smi") is None


def reachable(url: str, timeout_s: float = PROBE_S) -> bool:
    """Whether `url` answers within `timeout_s` seconds. One try: pip would try for minutes."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s):  # noqa: S310  (our constant, https)
            return True
    except (OSError, ValueError):
        return False


def environment() -> dict[str, str]:
    """The environment for pip, without what would send packages elsewhere or drown its errors."""
    return {**os.environ, "PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}


def pip(python: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run `pip install` without a word; its output is in the answer."""
    command = [str(python), "-m", "pip", "install", "--quiet", *args]
    return subprocess.run(command, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def say(text: str) -> None:
    """One line a step."""
    print("setup_env: " + text, flush=True)


def install(python: Path, step: str, *args: str) -> None:
    """Install with the tested versions, else with the newest that fit. Exits with pip's own words when neither works."""
    say(step)
    first = pip(python, "-c", str(CONSTRAINTS), *args)
    if first.returncode == 0:
        return
    say("the tested versions cannot be installed here; trying the newest that fit")
    second = pip(python, *args)
    if second.returncode:
        sys.exit(f"{first.stdout}\n{second.stdout}\nsetup_env: {step} failed; pip's words are above.")


def install_torch(python: Path) -> None:
    """Install the CPU build of PyTorch, before anything else asks for the ordinary one."""
    # In continuous integration the pin alone decides, from wherever pip looks: one index less that can be down.
    if not os.environ.get("CI"):
        if reachable(CPU_WHEELS + "/torch/"):
            say("installing torch (CPU build)")
            build = ("--no-deps", "--index-url", CPU_WHEELS, "torch")  # what it depends on comes with the rest: that index has few versions
            if pip(python, "-c", str(CONSTRAINTS), *build).returncode == 0 or pip(python, *build).returncode == 0:
                return
        say("no CPU build from " + CPU_WHEELS + "; taking torch from the ordinary index")
    install(python, "installing torch", "torch")


def runs_here(folder: Path) -> bool:
    """Whether the environment in `folder` belongs to this very Python and has a pip that runs."""
    config, python = folder / "pyvenv.cfg", python_of(folder)
    if not config.exists() or not python.exists() or VERSION_LINE not in config.read_text(encoding="utf-8"):
        return False
    return subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode == 0


def make_venv(folder: Path, marker: Path, moved: bool) -> None:
    """Make the environment; make it anew when what is there is ours and cannot be used (`moved`: its scripts name another place)."""
    if runs_here(folder) and not moved:
        return
    if Path(sys.prefix).resolve() == folder.resolve():
        sys.exit(f"setup_env: {folder} must be made anew, and this Python runs from it: leave it (deactivate) and try again.")
    if marker.exists():
        shutil.rmtree(folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        sys.exit(f"setup_env: {folder} was not made by this script and cannot be used: remove it, or name another folder with --venv.")
    say(f"making {folder.name} with Python {platform.python_version()}")
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text("{}", encoding="utf-8")
    try:
        venv.create(folder, with_pip=True)
    except (subprocess.CalledProcessError, ImportError):
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        sys.exit(f"setup_env: this Python cannot make a virtual environment with pip. On Debian and Ubuntu: sudo apt install {package}")


def setup(folder: Path, wanted: list[str]) -> None:
    """Make or refresh the environment in `folder` with the extras in `wanted`."""
    marker = folder / ".colab-gpu-stamp"
    old = read_stamp(marker) if python_of(folder).exists() else {}
    extras = sorted({*wanted, *old.get("extras", [])})  # `make demo` after `make test` takes nothing away
    new = stamp_of(extras)
    if old == new:
        return
    make_venv(folder, marker, moved=old.get("root", new["root"]) != new["root"])
    marker.write_text("{}", encoding="utf-8")  # an installation that is cut short must not look finished
    python, names = python_of(folder), ",".join(extras)
    if needs_cpu_build() and {"images", "all"} & set(extras):
        install_torch(python)
    install(python, f"installing colab-gpu[{names}] (minutes the first time)" if names else "installing colab-gpu",
            "-e", f"{ROOT}[{names}]" if names else str(ROOT))
    marker.write_text(json.dumps(new), encoding="utf-8")
    say("ready")


def extra(text: str) -> str:
    """An extra that setup.py offers."""
    known = [*re.findall(r"^(\w+)_requirements\s*=", (ROOT / "settings.ini").read_text(encoding="utf-8"), re.M), "all"]
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}")
    return text


def main() -> None:
    """Read the arguments, and turn what goes wrong into a sentence."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extras", nargs="*", type=extra, help="extras of the package: images, dev, ...")
    parser.add_argument("--venv", default=str(ROOT / ".venv"), metavar="DIR", help="folder of the environment (.venv)")
    args = parser.parse_args()
    try:
        setup(Path(args.venv), args.extras)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as e:
        sys.exit(f"setup_env: {e.strerror or e}{f': {e.filename}' if e.filename else ''}")


if __name__ == "__main__":
    main()
