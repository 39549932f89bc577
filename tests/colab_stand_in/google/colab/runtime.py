"""The machine itself."""

from . import asked


def unassign():
    "Give the machine back."
    asked("runtime.unassign")
