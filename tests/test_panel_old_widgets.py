"""The panel with the widgets that Colab has: its own tests once more, in an environment like Colab's."""

import subprocess
import sys

import pytest

if sys.platform == "win32":
    pytest.skip("environments are linked together, which needs a POSIX system", allow_module_level=True)
for name in ("torch", "jupyter_client", "nbclient"):
    pytest.importorskip(name)

from stages import HERE, ROOT, colab_env, overlay, pip, without_ours


def test_the_panel_on_ipywidgets_7(tmp_path):
    python = overlay(tmp_path / "env", colab_env())
    pip(python, "pytest")
    command = [python, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", HERE / "test_panel.py"]
    environ = {name: value for name, value in without_ours().items() if not name.startswith("PYTEST_")}  # what is said to pytest is said to the outer one
    done = subprocess.run(command, cwd=HERE, env={**environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    said = subprocess.run([python, "-c", "import ipywidgets; print(ipywidgets.__version__)"], capture_output=True, text=True).stdout
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]
    assert said.strip() == "7.7.1"
