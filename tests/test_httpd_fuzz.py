"""The HTTP parser against h11: what h11 refuses we refuse, and what we accept h11 accepts, and reads the same way."""

import asyncio
import contextlib

import h11
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from colab_gpu.httpd import Connection, HTTPServer, Limits, Response, Route, Router


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self):
        super().__init__()
        self.out, self.closed = b"", False

    def write(self, data):
        self.out += data

    def writelines(self, pieces):
        self.out += b"".join(pieces)

    def close(self):
        self.closed = True

    abort = close

    def is_closing(self):
        return self.closed

    def can_write_eof(self):
        return False

    def get_write_buffer_size(self):
        return 0

    def pause_reading(self):
        pass

    resume_reading = pause_reading


class Anything(Router):
    """Takes every request and notes what it was."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def find(self, request):
        async def handler(request):
            body = await request.read()
            self.seen.append((request.method, request.target, dict(request.headers), body))
            return Response(b"{}")

        return Route("*", "*", handler)


LOOP = asyncio.new_event_loop()


def ours(pieces):
    """What our server makes of the bytes: the requests it served, and the status of its last answer."""

    async def main():
        router = Anything()
        server = HTTPServer(router, limits=Limits())
        server.loop, server.closing = asyncio.get_running_loop(), asyncio.Event()
        connection, wire = Connection(server), Wire()
        connection.connection_made(wire)
        for piece in pieces:
            if not wire.closed:
                connection.data_received(piece)
            await asyncio.sleep(0)
        for _ in range(12):
            await asyncio.sleep(0)
        connection.connection_lost(None)
        if connection.task is not None:
            with contextlib.suppress(BaseException):
                await asyncio.wait_for(connection.task, 1)
        statuses = [int(line.split(b" ")[1]) for line in wire.out.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
        return router.seen, [s for s in statuses if s != 100]

    return LOOP.run_until_complete(main())


def theirs(data):
    """What h11 makes of them: the whole requests, and whether it refused something."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    seen, request, body = [], None, b""
    try:
        connection.receive_data(data)
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                request, body = event, b""
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                seen.append((request.method.decode(), bytes(request.target), request.headers, body))
                connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                connection.send(h11.EndOfMessage())
                if connection.our_state is h11.MUST_CLOSE:
                    return seen, False
                connection.start_next_cycle()
            elif event in (h11.NEED_DATA, h11.PAUSED) or isinstance(event, h11.ConnectionClosed):
                return seen, False
    except h11.RemoteProtocolError:
        return seen, True


def merged(headers):
    out = {}
    for name, value in headers:
        name, value = name.decode(), value.decode("latin-1")
        out[name] = f"{out[name]}, {value}" if name in out else value
    return out


def check(data, pieces=None):
    mine, statuses = ours(pieces or [data])
    other, _ = theirs(data)
    assert len(mine) <= len(other), "we served a request that h11 did not"
    for (method, target, headers, body), (method_, target_, headers_, body_) in zip(mine, other, strict=False):
        assert (method, target, body) == (method_, target_, body_)
        assert headers == merged(headers_)
    return mine, statuses


METHODS = st.sampled_from([b"GET", b"POST", b"PUT", b"BREW", b"get", b"G\xe9T", b"", b"GET ", b"P(ST"])
TARGETS = st.sampled_from([b"/", b"/gpu-jobs?x=1", b"*", b"http://h/x", b"/a b", b"/\x00", b"/%zz", b"", b"/\xff", b"/x#y", b"//h/x"])
VERSIONS = st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.10", b"http/1.1", b"HTTP/1.1 ", b"HTTP/1"])
HEADERS = st.lists(st.sampled_from([
    b"Host: h", b"host: h", b"Host: other", b"Host:", b"Content-Length: 5", b"Content-Length: 0", b"Content-Length: 5, 5", b"Content-Length: +5",
    b"Content-Length: 5_0", b"Content-Length:  5 ", b"Content-Length: 0x5", b"Content-Length: \xb2", b"Content-Length: 99999999999999999999999",
    b"Content-Length : 5", b"Transfer-Encoding: chunked", b"Transfer-Encoding: Chunked", b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: chunked, chunked", b"Transfer-Encoding: \x0bchunked", b"Transfer-Encoding:chunked ", b"Transfer-Encoding: identity",
    b"X: y", b"X:", b"X : y", b" folded", b"\tfolded", b"X: a\x00b", b"X: a\rb", b"X: a\nHost: evil", b": empty", b"X", b"X: \xe9\xff",
    b"X: a\tb", b"X: a\x7fb", b"Connection: close", b"Connection: keep-alive", b"Expect: 100-continue", b"Expect: 200", b"Cookie: a; b",
]), max_size=6)
BODIES = st.sampled_from([
    b"", b"hello", b"hell", b"hello world", b"5\r\nhello\r\n0\r\n\r\n", b"5;x=y\r\nhello\r\n0\r\nA: b\r\n\r\n", b"5\nhello\n0\n\n", b"+5\r\nhello\r\n0\r\n\r\n",
    b"5 \r\nhello\r\n0\r\n\r\n", b" 5\r\nhello\r\n0\r\n\r\n", b"5\r\nhelloX\r\n0\r\n\r\n", b"0x5\r\nhello\r\n0\r\n\r\n", b"5\r\nhello\r\n0\r\n", b"0\r\n\r\n",
    b"00000000000000005\r\nhello\r\n0\r\n\r\n", b"5;\x00\r\nhello\r\n0\r\n\r\n", b"5\r\nhello\r\n0\r\nbad\r\n\r\n", b"-1\r\n\r\n", b"5\r\nhello\r\n\r\n0\r\n\r\n",
])
ENDS = st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b"\r\r\n"])


@st.composite
def requests(draw):
    line = b" ".join([draw(METHODS), draw(TARGETS), draw(VERSIONS)]) if draw(st.booleans()) else b"POST /x HTTP/1.1"
    headers = draw(HEADERS)
    if draw(st.booleans()):
        headers = [b"Host: h", *headers]
    end = draw(ENDS)
    return line + end + b"".join(h + end for h in headers) + end + draw(BODIES)


@st.composite
def mutated(draw):
    data = bytearray(draw(requests()))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        what = draw(st.sampled_from(["insert", "delete", "replace"]))
        byte = draw(st.sampled_from(list(b"\r\n\t :;,\x00\x0b\x7f\xff09afX")))
        if what == "insert":
            data.insert(at, byte)
        elif data:
            if what == "delete":
                del data[at]
            else:
                data[at] = byte
    return bytes(data)


MANY = settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))


@MANY
@given(requests())
@example(b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
@example(b"\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n")
@example(b"GET / HTTP/1.1\r\n\r\n")
def test_built_requests(data):
    check(data)


@MANY
@given(mutated())
def test_mutated_requests(data):
    check(data)


@MANY
@given(st.lists(requests(), min_size=2, max_size=4))
def test_pipelines(many):
    check(b"".join(many))


@settings(MANY, max_examples=300)
@given(mutated(), st.integers(0, 400))
def test_where_the_bytes_are_split_does_not_matter(data, at):
    whole = ours([data])
    assert ours([data[:at], data[at:]]) == whole
    assert ours([data[i:i + 7] for i in range(0, len(data), 7)]) == whole


def test_every_split_of_a_good_request():
    data = b"POST /x?y=1 HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\nGET /y HTTP/1.1\r\nHost: h\r\n\r\n"
    whole = ours([data])
    assert [s[3] for s in whole[0]] == [b"hello", b""]
    for at in range(len(data)):
        assert ours([data[:at], data[at:]]) == whole
    assert ours([bytes([b]) for b in data]) == whole


@pytest.mark.parametrize("data", [
    b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\nHost: h\n\n", b"GET / HTTP/1.1\r\nHost: h\r\nX: a\n\r\n\r\n", b"GET / HTTP/1.1\r\n Host: h\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
])
def test_smuggling_is_refused(data):
    seen, statuses = ours([data])
    assert seen == [] and statuses and statuses[0] >= 400
