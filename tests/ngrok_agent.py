"""A stand-in for ngrok's agent, in a process of its own: its log lines, its API, and a real way through to the server.

    ngrok start --none --log stdout --config FILE        # as pyngrok starts it

It reads the token from FILE and nowhere else, and opens what `POST /api/endpoints` asks for on a free port of this machine, which stands
for the public address. What it was asked, and by which arguments and environment, is in STAND_IN_FOLDER/seen.json. STAND_IN_FOLDER/orders
steers it, a word a line, read when it starts and while it runs:

    error=N     the session is refused with ERR_NGROK_N, as the edge does       open=N    POST /api/endpoints fails with ERR_NGROK_N
    silent      not a word, and no end                                          mute      the API accepts and never answers
    quit        it ends at once with a sentence                                 page=N    the public address shows ngrok's page ERR_NGROK_N
    drop        the API no longer lists the tunnel                              deaf      the public address hangs up

Messages follow https://ngrok.com/docs/errors; the wrong token is repeated in them, as the real one does.
"""

import http.client
import json
import os
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(os.environ["STAND_IN_FOLDER"])
WORDS = {"105": "The authtoken you specified does not look like a proper ngrok authtoken.", "107": "The authtoken you specified is properly formed, but it is invalid.",
         "108": "Your account is limited to 1 simultaneous ngrok agent sessions.", "334": "The endpoint is already online.",
         "727": "Your account has exceeded its HTTP requests limit for the month."}
MARKS = ("host", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "connection")


def orders():
    try:
        return dict((line.split("=") + [""])[:2] for line in (FOLDER / "orders").read_text().split())
    except OSError:
        return {}


def log(level, message, **fields):
    pairs = " ".join(f'{k}="{v}"' for k, v in fields.items())
    print(f't=2026-11-24T10:00:00+0000 lvl={level} msg="{message}" {pairs}', flush=True)


class Seen:
    """What has come in, in a file that a test reads."""

    def __init__(self):
        self.lock, self.facts = threading.Lock(), {"argv": sys.argv, "environ": dict(os.environ), "pid": os.getpid(), "opened": [], "public": []}
        self.write()

    def add(self, name, value):
        with self.lock:
            self.facts[name].append(value)
            self.write()

    def write(self):
        beside = FOLDER / f"seen.{os.getpid()}.part"
        beside.write_text(json.dumps(self.facts))
        beside.replace(FOLDER / "seen.json")


class Public(BaseHTTPRequestHandler):
    """The edge: it forwards to the server, with the headers that ngrok adds."""

    protocol_version, upstream = "HTTP/1.1", ""

    def log_message(self, *_):
        pass

    def answer(self):
        SEEN.add("public", [self.command, self.path, dict(self.headers)])
        body, now = self.rfile.read(int(self.headers.get("Content-Length") or 0)), orders()
        if "deaf" in now:
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if "page" in now:
            return self.page(404, now["page"])
        if "ngrok-skip-browser-warning" not in self.headers and "Mozilla" in self.headers.get("User-Agent", ""):
            return self.page(200, "6024")
        host, _, port = self.upstream.removeprefix("http://").partition(":")
        ahead = http.client.HTTPConnection(host, int(port))
        kept = {k: v for k, v in self.headers.items() if k.lower() not in MARKS}
        try:
            ahead.request(self.command, self.path, body or None, {**kept, "Host": "stand-in.ngrok-free.app", "X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https"})
            came = ahead.getresponse()
            self.say(came.status, came.read(), came.getheader("Content-Type") or "text/plain")
        except OSError:
            self.page(502, "8012")
        finally:
            ahead.close()

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def page(self, status, number):
        self.say(status, f"<!DOCTYPE html><html><body>ERR_NGROK_{number}</body></html>".encode(), "text/html")

    def say(self, status, body, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Api(Public):
    """The agent's own interface on loopback."""

    endpoints = {}

    def answer(self):
        asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"null")
        while "mute" in orders() and self.command == "POST":
            time.sleep(0.05)
        if self.path != "/api/endpoints":
            return self.say(404, b"{}", "application/json")
        if self.command == "POST":
            return self.open(asked)
        count = {"http": {"count": len(SEEN.facts["public"]), "rate1": 0}, "conns": {"count": 1}}
        listed = [] if "drop" in orders() else [{**each, "metrics": count} for each in self.endpoints.values()]
        self.say(200, json.dumps({"endpoints": listed, "uri": "/api/endpoints"}).encode(), "application/json")

    do_GET = do_POST = answer

    def open(self, asked):
        SEEN.add("opened", asked)
        number = orders().get("open")
        if number:
            details = {"err": f"failed to start endpoint: {WORDS.get(number, 'No.')}\r\n\r\nERR_NGROK_{number}\r\n"}
            return self.say(502, json.dumps({"error_code": 103, "status_code": 502, "msg": "failed to start endpoint", "details": details}).encode(), "application/json")
        edge = serve(type("Edge", (Public,), {"upstream": asked["upstream"]["url"]}))
        made = {"name": asked["name"], "url": edge, "uri": f"/api/endpoints/{asked['name']}", "upstream": asked["upstream"]}
        self.endpoints[asked["name"]] = made
        log("info", "started tunnel", obj="tunnels", name=asked["name"], url=edge)
        self.say(201, json.dumps(made).encode(), "application/json")


def serve(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


def main():
    now = orders()
    token = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())["agent"]["authtoken"]
    if "silent" in now:
        threading.Event().wait()
    if "quit" in now:
        print(f"ERROR: this ngrok has had a bad day with {token}", file=sys.stderr, flush=True)
        sys.exit(1)
    log("info", "no configuration paths supplied")
    log("info", "starting web service", obj="web", addr=serve(Api).removeprefix("http://"), allow_hosts="[]")
    if number := now.get("error"):
        log("eror", "failed to auth", obj="tunnels.session", err=f"authentication failed: {WORDS.get(number, 'No.')} Your authtoken: {token} ERR_NGROK_{number}")
        print(f"ERROR:  authentication failed: {WORDS.get(number, 'No.')}\nERROR:  Your authtoken: {token}\nERROR:  ERR_NGROK_{number}", file=sys.stderr, flush=True)
        sys.exit(1)
    log("info", "client session established", obj="csess")
    log("info", "tunnel session started", obj="tunnels.session")
    while "die" not in orders():
        time.sleep(0.02)
    log("eror", "session closed, it was asked to", obj="tunnels.session")
    sys.exit(1)


if __name__ == "__main__":
    SEEN = Seen()
    main()
