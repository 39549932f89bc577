"""A receiver of webhooks in a process of its own. The path says how it behaves; every request that came in whole is a line of JSON.

    python tests/webhook_receiver.py [PORT [CERTIFICATE KEY]]
"""

import json
import socketserver
import ssl
import sys
import threading

seen, lock = {}, threading.Lock()


class Receiver(socketserver.StreamRequestHandler):
    def handle(self):
        line = self.rfile.readline(65_536).decode("latin-1").strip()
        if not line:
            return
        headers = {}
        while (text := self.rfile.readline(65_536).decode("latin-1").strip()):
            name, _, value = text.partition(":")
            headers[name.lower()] = value.strip()
        body = self.rfile.read(int(headers.get("content-length", 0)))
        target = line.split(" ")[1]
        with lock:
            count = seen[target] = seen.get(target, 0) + 1
            print(json.dumps({"request": line, "headers": headers, "body": body.decode()}), flush=True)
        try:
            self.answer(target.split("?")[0].strip("/").split("/"), count)
        except OSError:
            pass  # the sender has left

    def answer(self, path, count):
        verb = path[0]
        if verb == "busy" and count <= int(path[1]):
            self.say("HTTP/1.1 503 Busy\r\n\r\n")
        elif verb == "later":
            self.say(f"HTTP/1.1 429 Slow down\r\nRetry-After: {path[1]}\r\n\r\n")
        elif verb == "hang" or (verb == "hang-once" and count == 1):
            self.rfile.read(1)  # until the sender gives up
        elif verb == "drip":
            while True:
                self.say("H")
                threading.Event().wait(0.05)
        elif verb == "redirect":
            self.say("HTTP/1.1 307 Elsewhere\r\nLocation: /followed\r\nContent-Length: 0\r\n\r\n")
        elif verb == "garbage":
            self.say("220 mail.example ESMTP\r\n\r\n")
        elif verb == "huge":
            self.say("HTTP/1.1 200 OK\r\n" + "X: y\r\n" * 1_000_000 + "\r\n")
        elif verb == "empty":
            pass
        elif verb == "gone":
            self.say("HTTP/1.1 410 Gone\r\n\r\n")
        else:
            self.say("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    def say(self, text):
        self.wfile.write(text.encode())
        self.wfile.flush()


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address, daemon_threads, request_queue_size = True, True, 64

    def get_request(self):
        connection, peer = super().get_request()
        if len(sys.argv) > 2:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*sys.argv[2:4])
            connection = context.wrap_socket(connection, server_side=True)
        return connection, peer


if __name__ == "__main__":
    with Server(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0), Receiver) as server:
        print(f"receives at {server.server_address[1]}", flush=True)
        server.serve_forever()
