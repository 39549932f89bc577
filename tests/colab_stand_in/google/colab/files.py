"""Files to and from the page."""

from . import asked


def download(filename):
    "Offer `filename` to the person at the page."
    asked("files.download", str(filename))


def upload():
    "Ask the person at the page for files: none."
    asked("files.upload")
    return {}
