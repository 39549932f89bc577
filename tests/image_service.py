"""Stand-ins for somebody else's image service, in a process of their own.

    python tests/image_service.py mcp        # an MCP server (the official SDK, streamable HTTP at /mcp) with a tool `generate_image`
    python tests/image_service.py plain      # POST /generate with a JSON body, as the reference's service

It prints its port on the first line. Words in brackets in the prompt steer the answer:

    [fail] an error of the tool      [crash] an exception in it        [hang] nothing, until the caller hangs up
    [wait] waits for GET /stand-in/go [die] the process ends            [huge] a picture of 8 MiB
    [garbage] text and no picture    [torn] something that is no PNG   [link] the address of a picture
    [told] the picture in the structured answer (mcp), as raw bytes (plain)      [bad] refuses the prompt (400, invalid arguments)
    [status=N] the HTTP status N (plain)

Environment: STAND_IN_STATUS answers every call with that HTTP status; STAND_IN_LEGACY=1 knows only the protocols before 2026;
STAND_IN_JSON=1 answers in JSON, not in a stream of events; STAND_IN_NARROW=1 takes a prompt and nothing else; STAND_IN_TOOL is the tool's name; STAND_IN_CLINGS=1 never answers the end of a session. What it has seen is at GET /stand-in.
"""

import base64
import json
import os
import re
import select
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from processes import png

SEEN = {"calls": [], "headers": {}, "canceled": 0}
GO = threading.Event()


def words(prompt):
    return {name: value for name, _, value in (word.partition("=") for word in re.findall(r"\[([\w=]+)\]", prompt))}


def picture(steer, arguments):
    if "torn" in steer: return b"no picture at all"
    side = max(8, min(64, int(arguments.get("width") or 16)))
    return png(side, noise=8 << 20 if "huge" in steer else 0)


def mcp_service():
    from typing import Any

    import anyio
    import uvicorn
    from mcp.server.mcpserver import Context, MCPServer
    from mcp.server.mcpserver.exceptions import ToolError
    from mcp.types import CallToolResult, ImageContent, TextContent
    from starlette.responses import JSONResponse, Response

    service = MCPServer("stand-in", version="3.1")

    async def paint(arguments, ctx):
        SEEN["calls"].append(arguments)
        steer = words(arguments["prompt"])
        if "fail" in steer: raise ToolError("the model is\nnot loaded")
        if "bad" in steer: raise ToolError("1 validation error for generate_imageArguments\nwidth\n  Input should be a multiple of 64")
        if "crash" in steer: raise RuntimeError("a secret of the service")
        if "die" in steer: os._exit(3)
        await ctx.report_progress(1, 4)
        try:
            while "hang" in steer or ("wait" in steer and not GO.is_set()): await anyio.sleep(0.02)
        except BaseException:
            SEEN["canceled"] += 1
            raise
        if "garbage" in steer: return CallToolResult(content=[TextContent(text="a lovely picture")])
        if "link" in steer: return CallToolResult(content=[TextContent(text=json.dumps({"image_url": "http://127.0.0.1/x.png"}))])
        data = base64.b64encode(picture(steer, arguments)).decode()
        if "told" in steer:
            told = {"image_base64": f"data:image/png;base64,{data}", "model": "told", "seed": 5, "device": "attic"}
            return CallToolResult(content=[TextContent(text="see the structured answer")], structured_content=told)
        return CallToolResult(content=[TextContent(text=json.dumps({"model": "stand-in-xl"})), ImageContent(data=data, mime_type="image/png")])

    async def narrow(prompt: str, ctx: Context) -> Any:
        return await paint({"prompt": prompt}, ctx)

    async def wide(prompt: str, ctx: Context, negative_prompt: str | None = None, width: int = 16, height: int = 16, steps: int | None = None,
                   guidance_scale: float | None = None, seed: int | None = None) -> Any:
        given = {"negative_prompt": negative_prompt, "width": width, "height": height, "steps": steps, "guidance_scale": guidance_scale, "seed": seed}
        return await paint({"prompt": prompt, **{k: v for k, v in given.items() if v is not None}}, ctx)

    service.tool(os.environ.get("STAND_IN_TOOL", "generate_image"), structured_output=False)(narrow if os.environ.get("STAND_IN_NARROW") else wide)

    @service.custom_route("/stand-in", ["GET"])
    async def seen(request): return JSONResponse(SEEN)

    @service.custom_route("/stand-in/go", ["GET"])
    async def go(request):
        GO.set()
        return JSONResponse({})

    app = service.streamable_http_app(json_response=bool(os.environ.get("STAND_IN_JSON")))

    async def around(scope, receive, send):
        if scope["type"] == "http" and not scope["path"].startswith("/stand-in"):
            headers = {k.decode(): v.decode() for k, v in scope["headers"]}
            SEEN["headers"].update(headers)
            status = int(os.environ.get("STAND_IN_STATUS", 0))
            if os.environ.get("STAND_IN_LEGACY") and headers.get("mcp-protocol-version", "") >= "2026": status = 400
            if scope["method"] == "DELETE" and os.environ.get("STAND_IN_CLINGS"): await anyio.sleep_forever()
            if status: return await Response("<h1>no</h1>", status, media_type="text/html")(scope, receive, send)
        await app(scope, receive, send)

    sock = socket.create_server(("127.0.0.1", 0))
    print(sock.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(around, log_level="warning")).run(sockets=[sock])


class Plain(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): pass

    def answer(self, status, body, kind="application/json", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items(): self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/stand-in/go": GO.set()
        self.answer(200 if self.path.startswith("/stand-in") else 404, SEEN)

    def gone(self):
        "Whether the caller has hung up."
        return select.select([self.connection], [], [], 0.02)[0] and not self.connection.recv(1, socket.MSG_PEEK)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = int(os.environ.get("STAND_IN_STATUS", 0))
        if status or self.path != "/generate": return self.answer(status or 404, b"<h1>no</h1>", "text/html")
        SEEN["calls"].append(body)
        SEEN["headers"].update(dict(self.headers.items()))
        steer = words(body["prompt"])
        if "die" in steer: os._exit(3)
        while "hang" in steer or ("wait" in steer and not GO.is_set()):
            if self.gone():
                SEEN["canceled"] += 1
                self.close_connection = True
                return
        if "status" in steer: return self.answer(int(steer["status"]), {"error": "so it is"}, Retry_After="7", Location="http://127.0.0.1:9/generate")
        if "fail" in steer or "crash" in steer: return self.answer(500, {"error": "the model is not loaded"})
        if "bad" in steer: return self.answer(400, {"error": "width must be a multiple of 64"})
        if "garbage" in steer: return self.answer(200, {"text": "a lovely picture"})
        if "link" in steer: return self.answer(200, {"image_url": "http://127.0.0.1/x.png"})
        data = picture(steer, body)
        if "told" in steer: return self.answer(200, data, "image/png")
        self.answer(200, {"image_base64": f"data:image/png;base64,{base64.b64encode(data).decode()}", "model": "stand-in-15", "seed": body.get("seed"),
                          "device": "attic"})


def plain_service():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Plain)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__": {"mcp": mcp_service, "plain": plain_service}[sys.argv[1]]()
