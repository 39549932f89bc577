"""A stand-in for the package `google.colab`, as a Colab runtime has it: what notebooks call, with its errors and its limits.

The JSON file named by COLAB_STAND_IN says how the page behaves, and is read at each call:

    secrets     the notebook's secrets by name          refused   names of secrets that the notebook may not read
    away        nobody is at the page: secrets time out       drive     `works` or `declined`

What was asked is appended to the file beside it, COLAB_STAND_IN with `.asked` at the end, a JSON line a call.
"""

import json
import os
import threading


def page():
    "How the page behaves now."
    with open(os.environ["COLAB_STAND_IN"], encoding="utf-8") as file:
        return json.load(file)


def asked(what, *words):
    "Keep what was asked. As in Colab, questions to the page go through the main thread's input, and get lost elsewhere."
    with open(os.environ["COLAB_STAND_IN"] + ".asked", "a", encoding="utf-8") as file:
        file.write(json.dumps([what, *words]) + "\n")
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(f"google.colab.{what} was called outside of the main thread")


from . import drive, files, output, runtime, userdata  # noqa: E402

__all__ = ["drive", "files", "output", "runtime", "userdata"]
