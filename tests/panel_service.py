"""A service on strings, for the panel's tests and benchmark: what a snapshot looks like, and verbs that remember what they were told."""

import io
import threading

from colab_gpu.errors import AccessDenied, ColabGPUError


def picture(n=0, side=256, format="PNG"):
    from PIL import Image

    file = io.BytesIO()
    Image.linear_gradient("L").rotate(30 * n).resize((side, side)).convert("RGB").save(file, format)
    return file.getvalue()


def job(n=0, **given):
    return {"id": f"job-{n}", "tool": "imagenGenerate", "phase": "running", "step": 3, "total": 20, "preview": None, "words": "", "tokens": 0,
            "title": f"picture {n}", "elapsedSeconds": 1.5, **given}


def ended(n=0, **given):
    return {"id": f"job-{n}", "tool": "imagenGenerate", "status": "completed", "title": f"picture {n}", "seconds": 2.0, "picture": None, "words": "",
            "detail": "", **given}


def model(name="demo", family="images", **given):
    return {"family": family, "name": name, "state": "loading", "percent": None, "says": "Waiting for its turn.", "needs_bytes": 4 << 30, **given}


class PuppetService:
    """Change `now`, and the next snapshot has it. `told`: the verbs that were called. `gate`: verbs wait for it, if there is one."""

    def __init__(self, mode="worker", **given):
        self.told, self.gate, self.broken = [], None, None
        public = None if mode == "worker" else {"state": "open", "url": "https://name.ngrok-free.app", "kind": "ngrok", "error": None}
        self.now = {
            "mode": mode, "state": "stopped", "server": {"url": "https://queue.example", "token": True, "says": ""}, "public": public,
            "gpu": {"accelerator": "Tesla T4", "total_bytes": 15 << 30, "free_bytes": 9 << 30, "holders": {"images": 4 << 30, "chat": 0}, "turn": None},
            "choices": {"images": ["demo", "stabilityai/sdxl-turbo"], "chat": ["llama3:8b", "qwen3:4b"]}, "models": [], "jobs": [], "recent": [],
            "counts": {}, "requests": 0, "requestsPerMonth": None, "error": "", "lines": [], **given}

    def tell(self, *what):
        self.told.append((*what, threading.current_thread() is threading.main_thread()))
        if self.gate is not None:
            self.gate.wait(30)
        if self.broken is not None:
            raise self.broken
        return f"Done: {what[0]}."

    def snapshot(self):
        if isinstance(self.now, Exception):
            raise self.now
        return dict(self.now)

    def connect(self, address="", token=""):
        said = self.tell("connect", address, token)
        if token == "wrong":
            raise AccessDenied("The server refused the token.")
        return said

    def preload(self, family, name):
        self.tell("preload", family, name)

    def start(self):
        return self.tell("start")

    def drain(self):
        return self.tell("drain")

    def stop(self):
        return self.tell("stop")

    def use_ngrok_token(self, token):
        return self.tell("ngrok", token)

    def client_token(self):
        self.tell("client_token")
        return "the-callers-token"

    def snippet(self):
        if self.now["server"]["url"] == "":
            raise ColabGPUError("There is no address yet.")
        return "print('<hello>')"
