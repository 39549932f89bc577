"""Google Drive, if the person at the page lets it in."""

import os

from . import asked, page


def mount(mountpoint, force_remount=False, timeout_ms=120000, readonly=False):
    "Ask the page for leave, and mount the Drive."
    asked("drive.mount", mountpoint)
    if page().get("drive") != "works":
        raise ValueError("mount failed: the person at the page declined")
    os.makedirs(os.path.join(mountpoint, "MyDrive"), exist_ok=True)


def flush_and_unmount(timeout_ms=24 * 60 * 60 * 1000):
    "Let go of the Drive."
    asked("drive.flush_and_unmount")
