"""Secrets. The errors have no common base, as in Colab."""

from . import asked, page


class Error(Exception):
    pass


class SecretNotFoundError(Error):
    def __init__(self, key):
        super().__init__(f"Secret {key} does not exist.")


class TimeoutException(Error):
    def __init__(self, key):
        super().__init__(f"Requesting secret {key} timed out. Secrets can only be fetched when running from the Colab UI.")


class NotebookAccessError(Exception):
    def __init__(self, key):
        super().__init__(f"Notebook does not have access to secret {key}")


def get(key):
    "The secret `key`."
    asked("userdata.get", key)
    now = page()
    if now.get("away"):
        raise TimeoutException(key)
    if key in now.get("refused", ()):
        raise NotebookAccessError(key)
    if key not in now.get("secrets", {}):
        raise SecretNotFoundError(key)
    return now["secrets"][key]
