"""A bad connection: a TCP proxy that knows enough HTTP/1.1 to break it where it hurts, in a process of its own.

    python -m tests.chaos.proxy HOST:PORT [--port 0] [--seed 1]

It prints its port, then takes orders on its standard input, a JSON object a line, and answers each with a line: its counts, a JSON object.
It ends when its input does. An order sets what it names, for everything that comes after:

delay_s            one way, seconds; a new connection waits a round trip besides, as TCP's handshake would
up_bps, down_bps   bytes a second towards the server and back, shared by all connections; null for no limit
jitter_s           each connection adds up to that many seconds of its own, one way
faults             how often each fault strikes: its name and a share of the requests, 0...1; of the connections for `black_hole`
hole_s             how long a half-open connection stays so before it is reset, seconds
late_s             how late a duplicate may come, seconds
page               true: every request is answered with a dead tunnel's page
reset_all          true: every open connection is reset now

The faults of a request:

drop        reset before the request reaches the server
reset       the request reaches the server whole, then the caller's connection is reset (RST) before it hears the answer
duplicate   the server gets the whole request once more, on a connection of its own, up to `late_s` later
cut         the answer breaks off in its head or its body
page        the answer is a page of ngrok's (ERR_NGROK_3200); the server never hears of the request
deaf        the request stays on its way: nothing is forwarded to the server any more, nothing is closed
mute        the request is served, the answer stays on its way
black_hole  the connection is accepted, and that is all

What strikes which connection comes from the seed and the connection's number alone.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import random
import socket
import struct
import sys
import time
from typing import Any

PAGE = (b"<!DOCTYPE html>\n<html><head><title>ngrok</title></head><body><h1>The endpoint is offline.</h1>"
        b"<p>ERR_NGROK_3200</p></body></html>\n")
PIECE = 4096  # what the connections take turns with on a narrow link
FAULTS = ("drop", "reset", "duplicate", "cut", "page", "deaf", "mute")
KNOBS = {"delay_s": 0.0, "up_bps": None, "down_bps": None, "jitter_s": 0.0, "faults": {}, "hole_s": 5.0, "late_s": 2.0, "page": False}


class Broken(Exception):
    """One side of a connection is gone."""


class Link:
    """One direction of the line that all connections share: when a piece may leave."""

    def __init__(self) -> None:
        self.free_at = 0.0

    async def turn(self, size: int, bps: float | None) -> None:
        """Wait until `size` bytes have been sent at `bps`."""
        if bps is None:
            return
        now = time.monotonic()
        self.free_at = max(now, self.free_at) + size / bps
        await asyncio.sleep(self.free_at - now)


class Side:
    """One end of a connection: reads with look-ahead, and writes in order, each piece as late as it is told."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer, self.ahead, self.over = reader, writer, b"", False
        self.queue: collections.deque[tuple[float, bytes]] = collections.deque()
        self.news, self.empty = asyncio.Event(), asyncio.Event()
        self.empty.set()
        self.pump = asyncio.create_task(self._pump())

    async def peek(self) -> bytes:
        """What has come and was not taken; waits until there is something, blank at the end."""
        if not self.ahead and not self.over:
            try:
                self.ahead = await self.reader.read(65536)
            except (OSError, ValueError):
                self.ahead = b""
            self.over = not self.ahead
        return self.ahead

    async def take(self, most: int = 65536) -> bytes:
        """The next bytes, blank at the end."""
        await self.peek()
        out, self.ahead = self.ahead[:most], self.ahead[most:]
        return out

    async def until(self, mark: bytes, most: int = 1 << 20) -> bytes:
        """Everything up to and with `mark`; raises `Broken` when the end comes first."""
        got = b""
        while mark not in got:
            piece = await self.take()
            if not piece or len(got) > most:
                raise Broken
            got += piece
        cut = got.index(mark) + len(mark)
        self.ahead = got[cut:] + self.ahead
        return got[:cut]

    async def _pump(self) -> None:
        while True:
            while not self.queue:
                self.empty.set()
                self.news.clear()
                await self.news.wait()
            due, data = self.queue[0]
            if (wait := due - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            with contextlib.suppress(OSError, RuntimeError):
                if not self.writer.is_closing():
                    self.writer.write(data)
                    await self.writer.drain()
            self.queue.popleft()

    async def put(self, data: bytes, link: Link, bps: float | None, delay_s: float) -> None:
        """Send `data` over `link`; returns when the last piece has left, before it has arrived."""
        if self.writer.is_closing():
            raise Broken
        for i in range(0, len(data), PIECE):
            piece = data[i:i + PIECE]
            await link.turn(len(piece), bps)
            self.queue.append((time.monotonic() + delay_s, piece))
            self.empty.clear()
            self.news.set()
        if len(self.queue) > 256:
            await self.empty.wait()

    async def arrived(self) -> None:
        """Wait until all that was put has been written."""
        await self.empty.wait()

    def reset(self) -> None:
        """End it with RST: what is under way is lost."""
        self.pump.cancel()
        with contextlib.suppress(OSError, AttributeError):
            self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    def close(self) -> None:
        """End it in good order, as far as it goes."""
        self.pump.cancel()
        with contextlib.suppress(OSError, RuntimeError):
            self.writer.close()


def length_of(head: bytes, is_answer: bool, method: str = "") -> int | str | None:
    """How a message's body ends: its length in bytes, `chunked`, or `None` for the end of the connection."""
    lines = head.decode("latin-1").split("\r\n")
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if is_answer and (method == "HEAD" or lines[0].split(" ")[1][:1] == "1" or lines[0].split(" ")[1] in ("204", "304")):
        return 0
    if "chunked" in fields.get("transfer-encoding", "").lower():
        return "chunked"
    if "content-length" in fields:
        return int(fields["content-length"])
    return None if is_answer else 0


class Proxy:
    """The proxy's knobs, its counts, and who is connected."""

    def __init__(self, target: tuple[str, int], seed: int) -> None:
        self.target, self.seed, self.knobs = target, seed, dict(KNOBS)
        self.up, self.down, self.number = Link(), Link(), 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.open: set[Connection] = set()
        self.tasks: set[asyncio.Task[Any]] = set()

    def order(self, given: dict[str, Any]) -> dict[str, int]:
        """Do what an order says; the counts. Raises `ValueError`."""
        for name, value in given.items():
            if name == "reset_all":
                for connection in list(self.open):
                    connection.reset()
            elif name not in KNOBS:
                raise ValueError(f"There is no knob {name!r}: they are {', '.join(KNOBS)}.")
            elif name == "faults" and set(value) - {*FAULTS, "black_hole"}:
                raise ValueError(f"There is no such fault: they are {', '.join(FAULTS)}, black_hole.")
            else:
                self.knobs[name] = value
        return dict(self.counts)

    def background(self, work: Any) -> None:
        """Run a coroutine that nobody waits for."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its beginning to its end."""
        self.number += 1
        self.counts["connections"] += 1
        connection = Connection(self, self.number, Side(reader, writer))
        self.open.add(connection)
        try:
            await connection.live()
        except (Broken, OSError, ValueError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open.discard(connection)
            connection.end()


class Connection:
    """A caller's connection and, when it gets that far, the one to the server behind it."""

    def __init__(self, proxy: Proxy, number: int, caller: Side) -> None:
        self.proxy, self.caller, self.server = proxy, caller, None
        self.random = random.Random(f"{proxy.seed}:{number}")
        self.own_delay_s, self.is_reset, self.first = self.random.random(), False, True
        self.unlucky = self.random.random()

    def reset(self) -> None:
        """Break it off, on both sides."""
        self.is_reset = True
        self.caller.reset()
        if self.server is not None:
            self.server.reset()

    def end(self) -> None:
        """Hang up on both sides."""
        if not self.is_reset:
            self.caller.close()
        if self.server is not None:
            self.server.close()

    @property
    def delay_s(self) -> float:
        """One way, seconds."""
        return float(self.proxy.knobs["delay_s"]) + self.own_delay_s * float(self.proxy.knobs["jitter_s"])

    async def live(self) -> None:
        """Request after request, until somebody hangs up."""
        if self.unlucky < self.proxy.knobs["faults"].get("black_hole", 0):
            self.proxy.counts["black_hole"] += 1
            return await self.hole()
        while not self.is_reset:
            if not await self.caller.peek():
                return
            if self.first:
                await asyncio.sleep(2 * self.delay_s)  # the handshake
                self.first = False
            if not await self.exchange(self.pick()):
                return

    def pick(self) -> str:
        """What happens to the next request."""
        roll, faults = self.random.random(), self.proxy.knobs["faults"]
        if self.proxy.knobs["page"]:
            return "page"
        for name in FAULTS:
            roll -= faults.get(name, 0)
            if roll < 0:
                return name
        return ""

    async def hole(self) -> None:
        """Keep the connection, move nothing, and reset it in the end."""
        await asyncio.sleep(float(self.proxy.knobs["hole_s"]))
        self.reset()

    async def exchange(self, fault: str) -> bool:
        """One request and its answer; whether the connection can go on."""
        head = await self.caller.until(b"\r\n\r\n")
        self.proxy.counts["requests"] += 1
        if fault:
            self.proxy.counts[fault] += 1
        method = head.split(b" ", 1)[0].decode("latin-1")
        if fault == "drop":
            self.reset()
            return False
        if fault == "page":
            async for _ in self.body(self.caller, length_of(head, False)):
                pass
            return await self.answer_page()
        if self.server is None:
            self.server = Side(*await asyncio.open_connection(*self.proxy.target))
        whole = await self.forward_request(head, fault)
        if fault == "deaf":
            await self.hole()
            return False
        if fault == "duplicate":
            self.proxy.background(self.replay(whole, self.random.random() * float(self.proxy.knobs["late_s"]) * self.random.choice((0, 1))))
        return await self.forward_answer(method, fault)

    async def answer_page(self) -> bool:
        """What ngrok says for a tunnel that is down."""
        head = (b"HTTP/1.1 404 Not Found\r\nContent-Type: text/html\r\nngrok-error-code: ERR_NGROK_3200\r\nContent-Length: %d\r\n"
                b"Connection: close\r\n\r\n" % len(PAGE))
        await self.to_caller(head + PAGE)
        await self.caller.arrived()
        return False

    async def to_caller(self, data: bytes) -> None:
        """Send towards the caller."""
        await self.caller.put(data, self.proxy.down, self.proxy.knobs["down_bps"], self.delay_s)

    async def to_server(self, data: bytes) -> None:
        """Send towards the server."""
        assert self.server is not None
        await self.server.put(data, self.proxy.up, self.proxy.knobs["up_bps"], self.delay_s)

    async def body(self, side: Side, length: int | str | None) -> Any:
        """The pieces of a message's body, as they come."""
        if length == "chunked":
            while True:
                line = await side.until(b"\r\n")
                size = int(line.split(b";")[0], 16)
                yield line
                left = size + 2
                while left:
                    piece = await side.take(left)
                    if not piece:
                        raise Broken
                    left -= len(piece)
                    yield piece
                if size == 0:
                    return
        left = length if isinstance(length, int) else 1 << 62
        while left:
            piece = await side.take(min(left, 65536))
            if not piece:
                if length is None:
                    return
                raise Broken
            left -= len(piece)
            yield piece

    async def forward_request(self, head: bytes, fault: str) -> bytes:
        """Pass a request on; all of it, when it is to be sent again."""
        assert self.server is not None
        pieces, deaf_at = [head], None
        if fault == "deaf":  # it stops somewhere on the way
            length = length_of(head, False)
            deaf_at = self.random.randrange(len(head) + (length if isinstance(length, int) else 0))
        sent = 0
        async def send(piece: bytes) -> None:
            nonlocal sent
            if deaf_at is not None:
                piece = piece[:max(0, deaf_at - sent)]
            sent += len(piece)
            await self.to_server(piece)
        try:
            await send(head)
            async for piece in self.body(self.caller, length_of(head, False)):
                if fault == "duplicate":
                    pieces.append(piece)
                await send(piece)
        except Broken:
            if self.caller.over:
                raise  # else the server has answered already, and hung up
        return b"".join(pieces)

    async def replay(self, request: bytes, late_s: float) -> None:
        """The same request once more, on a connection of its own; nobody hears the answer."""
        await asyncio.sleep(late_s)
        with contextlib.suppress(OSError, ValueError, Broken):
            side = Side(*await asyncio.open_connection(*self.proxy.target))
            try:
                await side.put(request, Link(), None, 0)
                head = await asyncio.wait_for(side.until(b"\r\n\r\n"), 120)
                self.proxy.counts["duplicates answered"] += 1
                async for _ in self.body(side, length_of(head, True)):
                    pass
            finally:
                side.close()

    async def forward_answer(self, method: str, fault: str) -> bool:
        """Pass an answer on, or as much of it as the fault allows; whether the connection can go on."""
        assert self.server is not None
        if fault == "reset" and self.random.random() < 0.5:  # before the server has even thought about it
            await self.server.arrived()
            self.proxy.background(self.listen_on(self.server))
            self.server = None
            self.reset()
            return False
        if not await self.anything_from_server():
            return False
        if fault in ("reset", "mute"):
            if fault == "mute":
                await self.hole()
            self.reset()
            return False
        while True:
            head = await self.server.until(b"\r\n\r\n")
            if not head.split(b" ", 2)[1].startswith(b"1"):
                break
            await self.to_caller(head)  # 100 Continue
        length = length_of(head, True, method)
        if fault == "cut":
            return await self.cut(head, length)
        await self.to_caller(head)
        async for piece in self.body(self.server, length):
            await self.to_caller(piece)
        await self.caller.arrived()
        return length is not None and b"connection: close" not in head.lower()

    async def cut(self, head: bytes, length: int | str | None) -> bool:
        """Part of an answer, then nothing."""
        assert self.server is not None
        most = self.random.randrange(1, len(head) + (length if isinstance(length, int) and length else 1))
        await self.to_caller(head[:most])
        most -= len(head)
        if most > 0:
            async for piece in self.body(self.server, length):
                await self.to_caller(piece[:most])
                most -= len(piece)
                if most <= 0:
                    break
        await self.caller.arrived()
        if self.random.random() < 0.5:
            self.reset()
        return False

    async def listen_on(self, server: Side) -> None:
        """Let the server finish an answer that nobody hears."""
        with contextlib.suppress(asyncio.TimeoutError, OSError):
            await asyncio.wait_for(server.peek(), 60)
        server.close()

    async def anything_from_server(self) -> bool:
        """Wait for the answer's beginning; false when somebody hung up first, and then hang up on the other too."""
        assert self.server is not None
        answer, gone = asyncio.ensure_future(self.server.peek()), asyncio.ensure_future(self.caller.peek())
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and gone.result():  # the next request already: answers come in order
                await answer
            return answer.done() and bool(answer.result())
        finally:
            for each in (answer, gone):
                each.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)  # only one may wait for a stream at a time


async def take_orders(proxy: Proxy) -> None:
    """Until the input ends."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        try:
            answer: dict[str, Any] = proxy.order(json.loads(line))
        except (ValueError, TypeError, AttributeError) as e:
            answer = {"error": str(e)}
        print(json.dumps(answer), flush=True)


async def main() -> None:
    """Listen, print the port, take orders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="HOST:PORT of the server")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    host, _, port = args.target.rpartition(":")
    if not host or not port.isdecimal():
        parser.error(f"the target must be HOST:PORT, such as 127.0.0.1:3001, not {args.target!r}")
    proxy = Proxy((host, int(port)), args.seed)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", args.port, limit=1 << 20)
    print(server.sockets[0].getsockname()[1], flush=True)
    await take_orders(proxy)
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
