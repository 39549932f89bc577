"""Stand-ins for ngrok's and Cloudflare's agents: programs in a folder, which start `ngrok_agent.py` and `cloudflared_agent.py`."""

import json
import os
import sys
from pathlib import Path

from colab_gpu.config import Settings
from colab_gpu.tunnel import open_tunnel

ROOT = Path(__file__).resolve().parent.parent
AUTH, CALLER = "2stand_in_ngrok_token_4Xy", "caller-token-for-tests"
OURS = ("NGROK_AUTHTOKEN", "NGROK_DOMAIN", "NGROK_PATH", "TUNNEL", "TUNNEL_START_SECONDS", "TUNNEL_CHECK_SECONDS", "TUNNEL_PROBE_SECONDS")


class StandIn:
    """Both agents, as programs in a folder, and what the test tells them."""

    def __init__(self, folder):
        self.folder, self.bin = folder / "stand-in", folder / "bin"
        self.folder.mkdir()
        self.bin.mkdir()
        for name in ("ngrok", "cloudflared"):
            program = self.bin / name
            program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/{name}_agent.py "$@"\n')
            program.chmod(0o755)
        self.env = {"NGROK_AUTHTOKEN": AUTH, "NGROK_PATH": self.bin / "ngrok", "STAND_IN_FOLDER": self.folder, "TUNNEL_CHECK_SECONDS": 0.1, "TUNNEL_START_SECONDS": 300,
                    "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ROOT, "GPU_CLIENT_TOKEN": CALLER}
        self.lines, self.addresses, self.open_ones = [], [], []

    def order(self, *words):
        """What the agents do from now on; nothing special when empty."""
        beside = self.folder / "orders.part"
        beside.write_text("\n".join(words))
        beside.replace(self.folder / "orders")

    @property
    def seen(self):
        return json.loads((self.folder / "seen.json").read_text())

    @property
    def started(self):
        return (self.folder / "seen.json").exists()

    def settings(self, **more):
        return Settings({k: v for k, v in {**self.env, "TUNNEL": "ngrok", **more}.items() if k in OURS}, environ={})

    def tunnel(self, port, **more):
        self.open_ones.append(open_tunnel(port, self.settings(**more), say=self.lines.append, on_address=self.addresses.append))
        return self.open_ones[-1]
