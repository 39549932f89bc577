"""The HTTP parser against h11: what h11 refuses we refuse, and what we accept h11 accepts, and reads the same way."""

import asyncio
import contextlib
import re

import h11
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from colab_gpu.httpd import Connection, HTTPServer, Limits, Response, Route, Router


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self):
        super().__init__()
        self.out, self.closed, self.ended, self.paused = b"", False, False, False

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
        return True

    def write_eof(self):
        self.ended = True

    def get_write_buffer_size(self):
        return 0

    def pause_reading(self):
        self.paused = True

    def resume_reading(self):
        self.paused = False


class Anything(Router):
    """Takes every request and notes what it was; `slow` handlers let the loop go round before they read."""

    def __init__(self, slow):
        super().__init__()
        self.seen, self.slow = [], slow

    def find(self, request):
        async def handler(request):
            for _ in range(self.slow):
                await asyncio.sleep(0)
            body = await request.read()
            self.seen.append((request.method, request.target, dict(request.headers), body))
            return Response(b"{}")

        return Route("*", "*", handler)


LOOP = asyncio.new_event_loop()


def ours(pieces, slow=0):
    """What our server makes of the bytes: the requests it served, the statuses of its answers, and whether it ended the connection."""

    async def main():
        router = Anything(slow)
        server = HTTPServer(router, limits=Limits())
        server.loop, server.closing = asyncio.get_running_loop(), asyncio.Event()
        connection, wire = Connection(server), Wire()
        connection.connection_made(wire)
        rounds = 12 + 12 * slow + sum(map(len, pieces)) // 20 * (4 + slow)
        for piece in pieces:
            for _ in range(rounds):
                if not wire.paused:
                    break
                await asyncio.sleep(0)
            if piece and not wire.closed and not wire.paused:  # asyncio hands over no empty piece
                connection.data_received(piece)
            await asyncio.sleep(0)
        for _ in range(rounds):
            await asyncio.sleep(0)
        connection.connection_lost(None)
        if connection.task is not None:
            with contextlib.suppress(BaseException):
                await asyncio.wait_for(connection.task, 1)
        statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", wire.out)]
        return router.seen, [s for s in statuses if s != 100], wire.closed or wire.ended

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


def check(data):
    mine, statuses, over = ours([data])
    other, refused = theirs(data)
    assert len(mine) <= len(other), "we served a request that h11 did not"
    for (method, target, headers, body), (method_, target_, headers_, body_) in zip(mine, other, strict=False):
        assert (method, target, body) == (method_, target_, body_)
        assert {n: v.lower() if n == "transfer-encoding" else v for n, v in headers.items()} == merged(headers_)
    assert statuses.count(200) == len(mine) and statuses[:len(mine)] == [200] * len(mine), "each was answered, in order"
    if statuses[len(mine):]:
        assert over and len(statuses) == len(mine) + 1 and statuses[-1] >= 400, "a refusal is one answer, and the last"
    elif refused and len(mine) == len(other):
        assert over or waits_for_more(data), "what h11 refuses we refuse, unless it isn't whole yet"


def waits_for_more(data):
    """Whether we may still be waiting where h11 has given up: the last head isn't whole."""
    return ours([data + b"\r\n\r\n"])[2] or ours([data + b"0\r\n\r\n"])[2]


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


@settings(MANY, max_examples=600)
@given(mutated(), st.integers(0, 400), st.integers(0, 3))
@example(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n5\r\nhello\r\n0\r\n\r\n", 61, 3)
@example(b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\n", 48, 0)
def test_where_the_bytes_are_split_does_not_matter(data, at, slow):
    whole = ours([data])
    assert ours([data[:at], data[at:]], slow) == whole
    assert ours([data[i:i + 7] for i in range(0, len(data), 7)], slow) == whole


def test_every_split_of_a_good_request():
    data = b"POST /x?y=1 HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\nGET /y HTTP/1.1\r\nHost: h\r\n\r\n"
    whole = ours([data])
    assert [s[3] for s in whole[0]] == [b"hello", b""]
    for at in range(len(data)):
        assert ours([data[:at], data[at:]]) == whole
    assert ours([bytes([b]) for b in data]) == whole


@pytest.mark.parametrize("cut", [0, 1, 30, 34])
def test_a_body_after_a_long_pipeline(cut):
    """Reading is paused while much waits; it has to go on for a body that isn't here yet."""
    many, last = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n" * 3000, b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 70000\r\n\r\n" + b"x" * 70_000
    cut += last.index(b"xx") - 30
    served, statuses, over = ours([many[:20_000], many[20_000:] + last[:cut], last[cut:]], slow=1)
    assert len(served) == 3001 and served[-1][3] == b"x" * 70_000 and set(statuses) == {200} and not over


TOKEN = st.text("!#$%&'*+-.^_`|~09azAZ", min_size=1, max_size=8)
VALUE = st.text("".join(map(chr, [*range(0x21, 0x7f), *range(0xa1, 0x100)])) + " \t", max_size=12).map(lambda v: v.strip(" \t"))
NAMES = TOKEN.filter(lambda n: n.lower() not in {"host", "content-length", "transfer-encoding", "connection", "expect"})
TARGET = st.text("/abcXYZ019-._~!$&'()*+,;=:@%?", max_size=20).map(lambda t: "/" + t)


@st.composite
def proper(draw):
    """A request that every server must take, and what it says."""
    method, target, fields = draw(TOKEN), draw(TARGET), draw(st.dictionaries(NAMES.map(str.lower), VALUE, max_size=5))
    method = method if method not in ("CONNECT", "OPTIONS") else "POST"
    body, chunked, space = draw(st.binary(max_size=40)), draw(st.booleans()), draw(st.sampled_from(["", " ", "  ", "\t"]))
    sizes = draw(st.lists(st.integers(1, 9), max_size=9)) if chunked else []
    fields["host"] = draw(st.sampled_from(["h", "localhost:3001", "[::1]:80", "gpu.example.org", ""]))
    fields["transfer-encoding" if chunked else "content-length"] = "chunked" if chunked else str(len(body))
    head = f"{method} {target} HTTP/1.1\r\n" + "".join(f"{n.title()}:{space}{v}{space}\r\n" for n, v in fields.items()) + "\r\n"
    sent, left = body, body
    if chunked:
        sent = b""
        for size in [*sizes, 1000]:
            piece, left = left[:size], left[size:]
            sent += b"%x;a=b\r\n%b\r\n" % (len(piece), piece) if piece else b""
        sent += b"0\r\nTrailer: x\r\n\r\n"
    return head.encode("latin-1") + sent, (method, target.encode(), fields, body)


@MANY
@given(st.lists(proper(), min_size=1, max_size=3), st.integers(0, 200))
def test_proper_requests_are_served(many, at):
    data = b"".join(sent for sent, _ in many)
    served, statuses, over = ours([data[:at], data[at:]])
    assert served == [said for _, said in many] and statuses == [200] * len(many) and not over
    assert [(m, t, b) for m, t, _, b in served] == [(m, t, b) for m, t, _, b in theirs(data)[0]]


@pytest.mark.parametrize("data", [
    b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\nHost: h\n\n", b"GET / HTTP/1.1\r\nHost: h\r\nX: a\n\r\n\r\n", b"GET / HTTP/1.1\r\n Host: h\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
])
def test_smuggling_is_refused(data):
    seen, statuses, over = ours([data])
    assert seen == [] and len(statuses) == 1 and statuses[0] >= 400 and over
    assert ours([data, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"]) == (seen, statuses, over), "and nothing after it is served"


def test_a_refusal_leaves_time_to_read_it():
    """Closing at once would reset the connection of a peer that still sends, and the answer with it."""

    async def main():
        server = HTTPServer(Anything(0), limits=Limits())
        server.loop, server.closing = asyncio.get_running_loop(), asyncio.Event()
        connection, wire = Connection(server), Wire()
        connection.connection_made(wire)
        connection.data_received(b"nonsense\r\n")
        assert wire.out.startswith(b"HTTP/1.1 400 ") and wire.ended and not wire.closed
        connection.data_received(b"more nonsense\r\n")
        assert wire.out.count(b"HTTP/1.1 ") == 1 and not connection.eof_received()

    LOOP.run_until_complete(main())
