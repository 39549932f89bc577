"""A stand-in for `cloudflared`, in a process of its own: `cloudflared tunnel --no-autoupdate --url http://127.0.0.1:PORT`.

Its log goes to standard error as the real one's does: the request for a quick tunnel, the box with the address, a line for each connection.
The address is a free port of this machine that forwards to the server. STAND_IN_FOLDER/orders steers it, a word a line:

    busy        429 from the service     refused     the service cannot be reached     unregistered    no connection to the network
    broken      a flag it does not know  die         it ends (read while it runs)
"""

import os
import sys
import time

os.environ.setdefault("STAND_IN_FOLDER", ".")

import ngrok_agent  # noqa: E402


def log(level, text):
    print(f"2026-11-24T10:00:00Z {level} {text}", file=sys.stderr, flush=True)


def main():
    now = ngrok_agent.orders()
    if "broken" in now:
        print("Incorrect Usage: flag provided but not defined: -no-autoupdate", file=sys.stderr)
        sys.exit(1)
    log("INF", "Thank you for trying Cloudflare Tunnel. Doing so, without a Cloudflare account, is a quick way to experiment and try it out.")
    log("INF", "Requesting new quick Tunnel on trycloudflare.com...")
    if "busy" in now:
        log("ERR", 'Error unmarshaling QuickTunnel response: error code: 1015 error="invalid character \'e\'" status_code="429 Too Many Requests"')
        sys.exit(1)
    if "refused" in now:
        print('failed to request quick Tunnel: Post "https://api.trycloudflare.com/tunnel": dial tcp: lookup api.trycloudflare.com: no such host', file=sys.stderr)
        sys.exit(1)
    upstream = sys.argv[sys.argv.index("--url") + 1]
    url = ngrok_agent.serve(type("Edge", (ngrok_agent.Public,), {"upstream": upstream}))
    bar = "-" * 92
    for line in (f"+{bar}+", f"|  {'Your quick Tunnel has been created! Visit it at (it may take some time to be reachable):':<90}|", f"|  {url:<90}|", f"+{bar}+"):
        log("INF", line)
    if "unregistered" not in now:
        log("INF", "Registered tunnel connection connIndex=0 event=0 ip=198.51.100.7 location=ams01 protocol=quic")
    while "die" not in ngrok_agent.orders():
        time.sleep(0.02)
    log("ERR", "the tunnel has been told to end")
    sys.exit(1)


if __name__ == "__main__":
    ngrok_agent.SEEN = ngrok_agent.Seen()
    main()
