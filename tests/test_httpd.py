"""The HTTP server over real sockets: bodies both ways, time-outs, limits, and how it ends."""

import asyncio
import contextlib
import json
import socket
import struct
import threading
import time

import pytest

from colab_gpu.httpd import (ChunkParser, HTTPError, Limits, Response, Router, StreamResponse, file_response, json_response,
                             parse_fields, serve_in_thread)


HUGE = 20 << 20


def post(path, body, extra=""):
    return f"POST {path} HTTP/1.1\r\nHost: h\r\n{extra}Content-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.fixture
def server(tmp_path):
    router, events = Router(), {"canceled": threading.Event(), "closed": threading.Event(), "began": threading.Event(), "go": threading.Event()}
    (tmp_path / "file.bin").write_bytes(bytes(range(256)) * 8)

    async def echo(request):
        return Response(await request.read(1 << 20), content_type="application/octet-stream")

    async def whole(request):
        return Response(await request.read())

    async def count(request):
        total = 0
        async for piece in request.stream():
            assert len(piece) <= 1 << 18
            total += len(piece)
        return json_response({"bytes": total})

    async def wait(request):
        events["began"].set()
        try:
            await asyncio.wait_for(request.closing.wait(), 60)
        except asyncio.CancelledError:
            events["canceled"].set()
            raise
        return json_response({"closing": True})

    async def endless(request):
        async def pieces():
            try:
                while True:
                    yield b"x" * 65536
            finally:
                events["closed"].set()

        return StreamResponse(pieces())

    async def three(request):
        async def pieces():
            for word in (b"one", b"", b"two"):
                yield word

        return StreamResponse(pieces(), content_type="text/plain")

    def broken(request):
        raise RuntimeError("secret detail")

    async def quiet(request):
        async def pieces():
            try:
                yield b"first"
                events["began"].set()
                await asyncio.Event().wait()
            finally:
                events["closed"].set()

        return StreamResponse(pieces())

    async def stubborn(request):
        events["began"].set()
        try:
            await asyncio.to_thread(events["go"].wait, 60)
        finally:
            events["closed"].set()
        return json_response({"went": "on"})

    async def split(request):
        return Response(headers=[("X", "a\r\nb")])

    router.add("GET", "/quiet", quiet)
    router.add("GET", "/stubborn", stubborn)
    router.add("GET", "/nothing", lambda request: None)
    router.add("GET", "/split", split)
    router.add("GET", "/query", lambda request: json_response(request.query))
    router.add("GET", "/big", lambda request: Response(b"x" * 65_000))
    router.add("GET", "/huge", lambda request: Response(b"x" * HUGE))
    router.add("POST", "/whole", whole)
    router.add("POST", "/echo", echo)
    router.add("POST", "/count", count)
    router.add("GET", "/wait", wait, waits=True)
    router.add("GET", "/endless", endless, waits=True)
    router.add("GET", "/three", three)
    router.add("POST", "/broken", broken)
    router.add("GET", "/file", lambda request: file_response(request, tmp_path / "file.bin", "image/png", '"tag"'))
    router.add("POST", "/ignore", lambda request: json_response({"read": False}))
    limits = Limits(header_s=0.5, body_idle_s=1, keep_alive_s=3, write_idle_s=1, grace_s=5, body_bytes=100_000)
    http, thread = serve_in_thread(router, limits=limits)
    http.events, http.thread = events, thread
    yield http
    events["go"].set()
    thread.stop()


class Peer:
    """A client with nothing between the test and the socket."""

    def __init__(self, server):
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        self.buffer = b""

    def send(self, data):
        self.socket.sendall(data)
        return self

    def until(self, mark):
        while mark not in self.buffer:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError(self.buffer)
            self.buffer += data
        found, _, self.buffer = self.buffer.partition(mark)
        return found

    def answer(self, bodiless=False):
        """Status, headers and body of the next answer, which has no body if it is to a HEAD."""
        head = self.until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:])}
        if bodiless:
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self.until(b"\r\n"), 16):
                body += self.exactly(size)
                self.exactly(2)
            self.exactly(2)
        else:
            body = self.exactly(int(headers.get("content-length", 0)))
        return int(head[0].split(" ")[1]), headers, body

    def exactly(self, size):
        while len(self.buffer) < size:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError
            self.buffer += data
        found, self.buffer = self.buffer[:size], self.buffer[size:]
        return found

    def ended(self):
        """Whether the server has closed; waits for it."""
        while True:
            try:
                if not self.socket.recv(65536):
                    return True
            except ConnectionResetError:
                return True


def test_keep_alive_and_pipelining(server):
    peer = Peer(server).send(post("/echo", b"one") + post("/count", b"two!") + post("/echo", b"three"))
    assert [peer.answer()[2] for _ in range(3)] == [b"one", b'{"bytes":4}', b"three"]
    assert peer.send(post("/echo", b"later")).answer()[2] == b"later"


def test_expect_continue(server):
    peer = Peer(server).send(b"POST /echo HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    assert peer.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue"
    assert peer.send(b"hello").answer()[2] == b"hello"


def test_expect_is_not_answered_when_the_body_is_not_wanted(server):
    peer = Peer(server).send(b"POST /ignore HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    status, headers, _ = peer.answer()
    assert status == 200 and headers["connection"] == "close" and peer.ended()
    peer = Peer(server).send(b"POST /nowhere HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    assert peer.answer()[0] == 404 and peer.ended()


def test_an_unread_body_is_skipped_or_ends_the_connection(server):
    peer = Peer(server).send(post("/ignore", b"x" * 5000))
    assert peer.answer()[0] == 200
    assert peer.send(post("/echo", b"still here")).answer()[2] == b"still here"
    peer = Peer(server).send(b"POST /ignore HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999\r\n\r\n" + b"x" * 1000)
    status, headers, _ = peer.answer()
    assert status == 200 and headers["connection"] == "close" and peer.ended()


def test_a_body_that_is_too_large(server):
    peer = Peer(server).send(b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999\r\n\r\n")
    status, _, body = peer.answer()
    assert status == 413 and json.loads(body)["error"] == "payload_too_large"
    peer = Peer(server).send(b"POST /echo HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
    with contextlib.suppress(OSError):
        for _ in range(20):
            peer.send(b"20000\r\n" + b"x" * 0x20000 + b"\r\n")
    with contextlib.suppress(EOFError, ConnectionResetError):
        assert peer.answer()[0] == 413


def test_the_limit_of_a_body_is_the_servers(server):
    assert Peer(server).send(post("/whole", b"x" * 100_000)).answer()[0] == 200
    assert Peer(server).send(post("/whole", b"x" * 100_001)).answer()[0] == 413


def test_chunked_both_ways(server):
    peer = Peer(server).send(b"POST /echo HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
    for piece in (b"5;x=y\r\nhe", b"llo\r", b"\n3\r\n, y\r\n", b"0\r\nTrailer: x\r\n\r\n"):
        peer.send(piece)
    assert peer.answer()[2] == b"hello, y"
    status, headers, body = peer.send(b"GET /three HTTP/1.1\r\nHost: h\r\n\r\n").answer()
    assert (status, headers["transfer-encoding"], body) == (200, "chunked", b"onetwo")


def test_http_1_0_gets_no_chunks(server):
    peer = Peer(server).send(b"GET /three HTTP/1.0\r\n\r\n")
    head = peer.until(b"\r\n\r\n").lower()
    assert b"transfer-encoding" not in head and b"content-length" not in head
    with pytest.raises(EOFError) as caught:
        peer.until(b"never")
    assert caught.value.args[0] == b"onetwo"


def test_a_broken_chunk_in_the_middle(server):
    peer = Peer(server).send(b"POST /echo HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n")
    assert peer.answer()[0] == 400 and peer.ended()


def test_head_is_get_without_a_body(server):
    peer = Peer(server).send(b"HEAD /file HTTP/1.1\r\nHost: h\r\n\r\nHEAD /three HTTP/1.1\r\nHost: h\r\n\r\n")
    assert b"content-length: 2048" in peer.until(b"\r\n\r\n").lower()
    assert b"200 ok" in peer.until(b"\r\n\r\n").lower()
    assert peer.send(post("/echo", b"next")).answer()[2] == b"next"


@pytest.mark.parametrize(("ask", "status", "body", "shown"), [
    ("bytes=0-3", 206, bytes([0, 1, 2, 3]), "bytes 0-3/2048"), ("bytes=2044-", 206, bytes([252, 253, 254, 255]), "bytes 2044-2047/2048"),
    ("bytes=-2", 206, bytes([254, 255]), "bytes 2046-2047/2048"), ("bytes=0-99999", 206, bytes(range(256)) * 8, "bytes 0-2047/2048"),
    ("bytes=5-2", 416, None, None), ("bytes=9999-", 416, None, None), ("bytes=0-1,5-6", 200, bytes(range(256)) * 8, None),
    ("lines=1-2", 200, bytes(range(256)) * 8, None), ("bytes=-", 200, bytes(range(256)) * 8, None)])
def test_ranges(server, ask, status, body, shown):
    found, headers, data = Peer(server).send(f"GET /file HTTP/1.1\r\nHost: h\r\nRange: {ask}\r\n\r\n".encode()).answer()
    assert found == status and (body is None or data == body) and (shown is None or headers["content-range"] == shown)


def test_ranges_are_for_get_and_the_size_is_told(server):
    status, headers, _ = Peer(server).send(b"HEAD /file HTTP/1.1\r\nHost: h\r\nRange: bytes=0-3\r\n\r\n").answer(bodiless=True)
    assert (status, headers["content-length"]) == (200, "2048")
    status, headers, _ = Peer(server).send(b"GET /file HTTP/1.1\r\nHost: h\r\nRange: bytes=9999-\r\n\r\n").answer()
    assert (status, headers["content-range"]) == (416, "bytes */2048")


def test_conditional(server):
    peer = Peer(server).send(b'GET /file HTTP/1.1\r\nHost: h\r\nIf-None-Match: "other", W/"tag"\r\n\r\n')
    status, headers, body = peer.answer()
    assert (status, body) == (304, b"") and "content-length" not in headers and headers["etag"] == '"tag"'
    peer.send(b'GET /file HTTP/1.1\r\nHost: h\r\nRange: bytes=0-1\r\nIf-Range: "old"\r\n\r\n')
    assert peer.answer()[0] == 200


@pytest.mark.parametrize("ask", [post("/broken", b""), b"GET /nothing HTTP/1.1\r\nHost: h\r\n\r\n", b"GET /split HTTP/1.1\r\nHost: h\r\n\r\n"])
def test_an_unexpected_error_tells_nothing(server, ask, caplog):
    peer = Peer(server).send(ask)
    status, _, body = peer.answer()
    assert status == 500 and b"secret" not in body and json.loads(body)["error"] == "internal_error"
    assert caplog.records[-1].name == "colab_gpu.httpd" and caplog.records[-1].exc_info
    assert peer.send(post("/echo", b"next")).answer()[2] == b"next", "the connection is none the worse for it"


@pytest.mark.parametrize(("ask", "status", "said"), [
    (b"GET * HTTP/1.1\r\nHost: h\r\n\r\n", 400, "slash"), (b"CONNECT h:443 HTTP/1.1\r\nHost: h\r\n\r\n", 400, "slash"),
    (b"CONNECT /x HTTP/1.1\r\nHost: h\r\n\r\n", 501, "CONNECT"), (b"GET http://evil/three HTTP/1.1\r\nHost: h\r\n\r\n", 400, "differ"),
    (b"GET /three HTTP/1.1\r\nHost: a b\r\n\r\n", 400, "Host"), (b"DELETE /three HTTP/1.1\r\nHost: h\r\n\r\n", 405, "takes GET"),
    (b"GET /nowhere HTTP/1.1\r\nHost: h\r\n\r\n", 404, "/nowhere"), (b"GET /query?a=1&a=2 HTTP/1.1\r\nHost: h\r\n\r\n", 400, "`a`"),
    (b"GET /query?" + b"&".join(b"a%d" % i for i in range(101)) + b" HTTP/1.1\r\nHost: h\r\n\r\n", 400, "100"),
    (b"GET /query?a=%zz HTTP/1.1\r\nHost: h\r\n\r\n", 400, "percent"), (b"GET /a#b HTTP/1.1\r\nHost: h\r\n\r\n", 400, "fragment"),
    (b"GET / HTTP/2.0\r\nHost: h\r\n\r\n", 505, "HTTP/1.1"), (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "HTTP/1.1"),
    (b"GET / HTTP/1.1\r\nHost: h\r\nExpect: x\r\n\r\n", 417, "100-continue"), (b"GET / HTTP/1.1\r\nHost: h\n\n", 400, "header line"),
    (b"GET / HTTP/1.1\r\nHost: h\r\n" + b"a: b\r\n" * 100 + b"\r\n", 431, "100")])
def test_refusals_say_why(server, ask, status, said):
    found, headers, body = Peer(server).send(ask).answer()
    assert found == status and said in json.loads(body)["message"] and (found != 405 or headers["allow"] == "GET")


def test_an_upgrade_is_not_taken_up(server):
    ask = b"GET /three HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert Peer(server).send(ask).answer()[::2] == (200, b"onetwo")


def test_a_waiting_handler_is_canceled_when_its_caller_leaves(server):
    peer = Peer(server).send(b"GET /wait HTTP/1.1\r\nHost: h\r\n\r\n")
    assert server.events["began"].wait(20)
    peer.socket.close()
    assert server.events["canceled"].wait(20)


def test_a_stream_is_closed_when_its_caller_leaves(server):
    peer = Peer(server).send(b"GET /endless HTTP/1.1\r\nHost: h\r\n\r\n")
    peer.until(b"xxxx")
    peer.socket.close()
    assert server.events["closed"].wait(20)


def test_a_quiet_stream_is_closed_when_its_caller_leaves(server):
    peer = Peer(server).send(b"GET /quiet HTTP/1.1\r\nHost: h\r\n\r\n")
    peer.until(b"first")
    assert server.events["began"].wait(20)
    peer.socket.close()
    assert server.events["closed"].wait(20), "though it had nothing to send"


def test_requests_before_the_end_of_the_peers_side_are_answered(server):
    peer = Peer(server).send(post("/echo", b"one") + post("/ignore", b"") + post("/echo", b"three") + post("/count", b"!"))
    peer.socket.shutdown(socket.SHUT_WR)
    assert [peer.answer()[2] for _ in range(4)] == [b"one", b'{"read":false}', b"three", b'{"bytes":1}']
    assert peer.ended()


def test_the_end_of_the_peers_side_ends_a_kept_connection():
    router = Router()
    router.add("POST", "/echo", lambda request: Response(request.body.at_once()))
    server, thread = serve_in_thread(router, limits=Limits(keep_alive_s=3600))
    peer = Peer(server).send(post("/echo", b"one"))
    peer.socket.shutdown(socket.SHUT_WR)
    assert peer.answer()[2] == b"one" and peer.ended()
    thread.stop()


def test_who_takes_no_answers_gets_no_more(server):
    """A small request for a large answer, again and again, must not fill the memory."""
    peer, asked = Peer(server), 0
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    peer.socket.settimeout(0.5)
    ask = b"GET /big HTTP/1.1\r\nHost: h\r\n\r\n" * 1000
    with contextlib.suppress(TimeoutError):
        for _ in range(2000):
            asked += peer.socket.send(ask)
    [connection] = server.connections
    assert connection.transport.get_write_buffer_size() < 1 << 20 and len(connection._buffer) < 1 << 20
    assert asked < 2000 * len(ask), "the sender was made to wait"


def test_a_stalled_pipeline_goes_on(server):
    peer, asked = Peer(server), 300
    peer.send(b"GET /big HTTP/1.1\r\nHost: h\r\n\r\n" * asked)
    assert sum(len(peer.answer()[2]) for _ in range(asked)) == asked * 65_000


def test_a_peer_that_takes_nothing_is_cut_off(server):
    peer = Peer(server)
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.send(b"GET /endless HTTP/1.1\r\nHost: h\r\n\r\n")
    assert server.events["closed"].wait(30), "its stream was ended"


def test_slow_heads_and_bodies_are_ended(server):
    head = Peer(server).send(b"GET / HTTP/1.1\r\nHost:")
    assert head.answer()[0] == 408 and head.ended()
    body = Peer(server).send(b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhe")
    assert body.answer()[0] == 408 and body.ended()
    assert Peer(server).ended(), "an idle connection is closed in time"


def test_a_trickling_head_is_ended():
    """A byte now and then buys no time."""
    server, thread = serve_in_thread(Router(), limits=Limits(header_s=2))
    peer, got = Peer(server).send(b"GET / HTTP/1.1\r\nHost: h\r\nX:"), b""
    peer.socket.settimeout(0.1)
    for _ in range(300):
        with contextlib.suppress(TimeoutError):
            got = peer.socket.recv(65536)
            break
        with contextlib.suppress(OSError):
            peer.send(b"y")
    assert b" 408 " in got
    thread.stop()


def growth(work, sizes):
    """How much more CPU time the last size takes than the first."""
    def took(size):
        started = time.process_time()
        work(size)
        return time.process_time() - started

    return min(took(sizes[-1]) for _ in range(3)) / min(took(sizes[0]) for _ in range(3))


def test_hostile_bytes_cost_no_more_than_their_length():
    def chunks(size):
        assert len(ChunkParser().feed(b"1\r\nx\r\n" * size)) == size

    def spaces(size):
        with pytest.raises(HTTPError):
            parse_fields(b"Host: h\r\nX:" + b" " * size + b"\x00\r\n", 1)

    assert growth(chunks, (20_000, 160_000)) < 30, "eight times as much, not sixty-four"
    assert growth(spaces, (20_000_000, 160_000_000)) < 30


def test_upload_waits_for_a_slow_reader():
    router, go, state = Router(), threading.Event(), {}

    async def slow(request):
        while not go.is_set():
            await asyncio.sleep(0.01)
        state["held"] = request.body.held
        return json_response({"bytes": sum([len(p) async for p in request.stream()])})

    router.add("POST", "/slow", slow)
    server, thread = serve_in_thread(router)
    size, sent = 30 << 20, []
    peer = Peer(server)

    def send():
        peer.send(f"POST /slow HTTP/1.1\r\nHost: h\r\nContent-Length: {size}\r\n\r\n".encode())
        for _ in range(30):
            peer.send(bytes(1 << 20))
            sent.append(1)

    sender = threading.Thread(target=send)
    sender.start()
    before = -1
    while before != len(sent):
        before = len(sent)
        time.sleep(0.3)
    assert len(sent) < 30, "the sender was made to wait"
    go.set()
    assert json.loads(peer.answer()[2]) == {"bytes": size}
    sender.join()
    assert state["held"] < 1 << 20
    thread.stop()


def test_closing_sends_what_is_on_its_way(server):
    peer = Peer(server).send(b"GET /huge HTTP/1.1\r\nHost: h\r\n\r\n")
    peer.until(b"\r\n\r\n")
    stopper = threading.Thread(target=server.thread.stop)
    stopper.start()
    while not server.closing.is_set():
        time.sleep(0.01)
    assert len(peer.exactly(HUGE)) == HUGE and peer.ended()
    stopper.join()


def test_closing_waits_for_a_handler_whose_caller_left(server):
    peer = Peer(server).send(b"GET /stubborn HTTP/1.1\r\nHost: h\r\n\r\n")
    assert server.events["began"].wait(20)
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.socket.close()
    while server.connections:
        time.sleep(0.01)
    assert not server.events["closed"].is_set(), "its work is not thrown away"
    stopper = threading.Thread(target=server.thread.stop)
    stopper.start()
    while not server.closing.is_set():
        time.sleep(0.01)
    assert stopper.is_alive()
    server.events["go"].set()
    stopper.join()
    assert server.events["closed"].is_set() and not server.orphans


def test_closing_ends_waiting_requests_in_good_order(server):
    waiting = Peer(server).send(b"GET /wait HTTP/1.1\r\nHost: h\r\n\r\n")
    idle = Peer(server)
    assert server.events["began"].wait(20)
    server.thread.stop()
    status, headers, body = waiting.answer()
    assert (status, headers["connection"], body) == (200, "close", b'{"closing":true}') and waiting.ended() and idle.ended()
    with pytest.raises(OSError):
        Peer(server)
