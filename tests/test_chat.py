"""The chat executors against a daemon in a process of its own: the stand-in, and a real Ollama where one is on the PATH and has a model."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import TOKEN
from processes import eventually, seen

from colab_gpu.chat import ChatExecutor, EmbedExecutor, Guard, Ollama, ollama_client, unload
from colab_gpu.client import Client
from colab_gpu.config import Settings
from colab_gpu.daemon import USUAL_PLACES, Daemon, find_program
from colab_gpu.doctor import look_at_chat
from colab_gpu.errors import ExecutionError, Interrupted, InvalidInput, InvalidPayload, OutOfMemory, Transient
from colab_gpu.jobs import LocalContext

pytest.importorskip("ollama")
HERE = Path(__file__).resolve().parent
posix = pytest.mark.skipif(os.name == "nt", reason="the shim is a POSIX script")


@pytest.fixture
def shim(tmp_path, monkeypatch):
    """An executable named `ollama` first on the PATH: the stand-in."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write_shim(folder / "ollama")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "ollama"


def write_shim(path, body=None):
    path.write_text(body or f'#!/bin/sh\nexec "{sys.executable}" "{HERE / "ollama_daemon.py"}" "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s: return s.getsockname()[1]


def settings(url, data="unused", **more):
    return Settings({"OLLAMA_URL": url, "COLAB_GPU_DATA": data, "START_OLLAMA": "0", **more}, environ={})


def talker(url, **more):
    return ChatExecutor(ollama=Ollama(settings(url, **more), say=lambda line: None))


class Ctx(LocalContext):
    """Remembers, and stops the run when it has heard so many tokens."""
    def __init__(self, stop_after=None, watched=False):
        super().__init__(watched=watched)
        self.stop_after, self.heard, self.phases = stop_after, threading.Event(), []
    def token(self, text, kind=""):
        super().token(text, kind)
        self.heard.set()
        if self.stop_after is not None and len("".join(self.tokens)) >= self.stop_after: self.stop = Interrupted("The job was canceled.")
    def progress(self, step, total, **more):
        super().progress(step, total, **more)
        self.phases.append((more.get("phase"), step))


# --- replies


def test_a_reply_is_what_ollama_replies(stand_in):
    url = stand_in()
    direct = ollama_client(url, local=True)
    ctx = Ctx()
    reply = talker(url).run({"prompt": "a cat sat on a mat", "options": {"temperature": "0.5"}, "stream": False}, ctx)
    own = direct._request(dict, "POST", "/api/generate", json={"model": "llama3:8b", "prompt": "a cat sat on a mat", "stream": False})
    changing = {"created_at", "total_duration", "load_duration", "eval_duration", "eval_count"}
    assert reply.keys() == own.keys() and {k: v for k, v in reply.items() if k not in changing} == {k: v for k, v in own.items() if k not in changing}
    assert "".join(ctx.tokens) == reply["response"] == "a cat sat on a mat" and ctx.tokens[0] == "a"
    assert reply["eval_count"] == 6 and reply["total_duration"] > 0 and reply["context"] == [1, 2, 3]
    typed = direct.generate(**{"model": "llama3:8b", "prompt": "a cat sat on a mat"})  # the package's own reading of the stand-in
    assert typed.response == reply["response"] and typed.done_reason == "stop"


def test_chat_with_tools_thinking_and_images(stand_in):
    url = stand_in(STAND_IN_MODELS="qwen3:4b,llama3:8b")
    tool = {"type": "function", "function": {"name": "weather", "description": "…", "parameters": {
        "type": "object", "additionalProperties": False, "properties": {"place": {"type": "object", "properties": {"city": {"type": "string", "minLength": 1}}}}}}}
    messages = [{"role": "user", "content": "[think] [call] Weather in Paris?", "images": ["data:image/png;base64,aGk="]}]
    ctx = Ctx(watched=True)
    reply = talker(url).run({"model": "qwen3:4b", "messages": messages, "tools": [tool], "think": True, "keep_alive": "5m"}, ctx)
    assert reply["message"]["thinking"] == "Let me see." == "".join(ctx.thoughts) and not ctx.tokens
    assert reply["message"]["tool_calls"] == [{"id": "call_1", "function": {"index": 0, "name": "weather", "arguments": {"city": "Paris"}}}]
    [sent] = [b for b in seen(url)["bodies"] if "messages" in b]
    assert sent["tools"] == [tool], "the nested schema must arrive whole"
    assert sent["messages"][0]["images"] == ["aGk="] and sent["keep_alive"] == "5m" and sent["think"] is True and sent["stream"] is True
    told = [{"role": "assistant", "tool_calls": reply["message"]["tool_calls"]}, {"role": "tool", "tool_name": "weather", "tool_call_id": "call_1", "content": "sunny"}]
    reply = talker(url).run({"model": "qwen3:4b", "messages": messages + told, "tools": [tool]}, Ctx())
    assert reply["message"] == {"role": "assistant", "content": "sunny"}, "nothing empty beside it"


def test_format_logprobs_and_the_other_fields_arrive(stand_in):
    url = stand_in()
    schema = {"type": "object", "properties": {"answer": {"type": "string"}}}
    reply = talker(url).run({"prompt": "say yes", "format": schema, "logprobs": True, "system": "Be brief.", "raw": False, "template": "{{ .Prompt }}",
                             "suffix": "", "context": [1, 2], "options": {"num_predict": 20, "stop": "\n"}}, Ctx())
    assert json.loads(reply["response"]) == {"answer": "yes"} and len(reply["logprobs"]) == 5
    sent = seen(url)["bodies"][-1]
    assert (sent["system"], sent["context"], sent["options"], sent["format"]) == ("Be brief.", [1, 2], {"num_predict": 20, "stop": ["\n"]}, schema)


def test_the_default_model_is_the_first_preloaded(stand_in):
    url = stand_in(STAND_IN_MODELS="tiny,llama3:8b")
    assert talker(url, OLLAMA_PRELOAD_MODELS="tiny,llama3:8b").run({"prompt": "x"}, Ctx())["model"] == "tiny"
    assert talker(url).run({"prompt": "x"}, Ctx())["model"] == "llama3:8b"


def test_embeddings(stand_in):
    url = stand_in(STAND_IN_MODELS="nomic-embed-text")
    embed = EmbedExecutor(ollama=Ollama(settings(url)))
    reply = embed.run({"model": "nomic-embed-text", "input": ["a lighthouse", "a pier"], "dimensions": "4"}, Ctx())
    direct = ollama_client(url, local=True).embed("nomic-embed-text", ["a lighthouse", "a pier"], dimensions=4)
    assert reply["embeddings"] == [list(v) for v in direct.embeddings] and [len(v) for v in reply["embeddings"]] == [4, 4]
    assert reply["prompt_eval_count"] == 4
    with pytest.raises(InvalidInput, match="ollama pull other"): embed.run({"model": "other", "input": "x"}, Ctx())


def test_a_job_cannot_read_the_workers_files(stand_in, tmp_path):
    """The package's own chat call would: `images` with the path of a file sends that file."""
    url, secret = stand_in(), tmp_path / "secret.png"
    secret.write_bytes(b"sesame")
    ollama_client(url, local=True).chat("llama3:8b", [{"role": "user", "content": "x", "images": [str(secret)]}])
    assert seen(url)["bodies"][-1]["messages"][0]["images"] == ["c2VzYW1l"]  # why the executor does not use it
    with pytest.raises(InvalidPayload, match=r"messages\[0\]\.images\[0\]"):
        talker(url).run({"messages": [{"role": "user", "content": "x", "images": [str(secret)]}]}, Ctx())
    flat = tmp_path / "c2VzYW1l"  # a file whose name happens to be base64
    flat.write_bytes(b"sesame")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        talker(url).run({"messages": [{"role": "user", "content": "x", "images": ["c2VzYW1l"]}]}, Ctx())
    assert seen(url)["bodies"][-1]["messages"][0]["images"] == ["c2VzYW1l"]


def test_proxies_of_the_environment_are_passed_by(stand_in, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"): monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert talker(stand_in()).run({"prompt": "hello"}, Ctx())["response"] == "hello"


# --- what goes wrong


@pytest.mark.parametrize(("prompt", "cls", "code", "words"), [
    ("[busy]", Transient, "ollama_busy", "overloaded (server busy"),
    ("[oom]", OutOfMemory, "ollama_memory", "take a smaller model"),
    ("[fail]", Transient, "ollama_failed", "llama runner process has terminated"),
    ("[tokens=9] [error=3]", Transient, "ollama_failed", "CUDA error"),
    ("[tokens=9] [cut=3]", Transient, "ollama_vanished", "vanished in the middle"),
    ("[tokens=9] [die=3]", Transient, "ollama_vanished", "vanished in the middle"),
])
def test_each_mishap_has_its_sentence(stand_in, prompt, cls, code, words):
    with pytest.raises(ExecutionError) as caught: talker(stand_in()).run({"prompt": prompt}, Ctx())
    assert type(caught.value) is cls and caught.value.code == code and words in str(caught.value)


def test_bad_options_and_unknown_models(stand_in):
    chat = talker(stand_in())
    with pytest.raises(InvalidPayload, match=r"options\.temperature"): chat.run({"prompt": "x", "options": {"temperature": "hot"}}, Ctx())
    with pytest.raises(InvalidInput, match="does not support thinking"): chat.run({"prompt": "x", "think": True}, Ctx())
    with pytest.raises(InvalidInput, match="run `ollama pull mistral`, or set OLLAMA_AUTO_PULL=1"): chat.run({"prompt": "x", "model": "mistral"}, Ctx())


def test_bad_options_that_only_ollama_knows(stand_in):
    from colab_gpu.chat import converse
    chat = talker(stand_in())
    with pytest.raises(InvalidInput, match='option "min_p" must be of type float32'):
        converse(chat.ollama, "generate", "llama3:8b", {"prompt": "x", "options": {"min_p": "much"}}, Ctx())


@contextmanager
def web_server(answer=b"<html>A page</html>"):
    class Page(BaseHTTPRequestHandler):
        def log_message(self, *_): pass
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
        do_POST = do_GET
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try: yield f"http://127.0.0.1:{server.server_port}"
        finally: server.shutdown()


@pytest.mark.parametrize("answer", [b"<html>A page</html>", b"[]\n", b'"text"\n', b"{}\n", b""])
def test_something_else_at_the_address(answer):
    with web_server(answer) as url:
        for run in (lambda: talker(url).run({"prompt": "x"}, Ctx()), lambda: EmbedExecutor(ollama=Ollama(settings(url))).run({"model": "m", "input": "x"}, Ctx())):
            with pytest.raises(Transient) as caught: run()
            assert url in str(caught.value) and caught.value.code in ("not_ollama", "ollama_vanished")
        assert talker(url).models() == [] and talker(url).held_bytes() == 0
        with pytest.raises(Transient, match="is not Ollama: set OLLAMA_URL"): Daemon(settings(url)).ensure()


# --- cancel


def test_cancel_before_the_first_token(stand_in):
    """The reader sleeps in `recv`, as while a model loads: the guard wakes it."""
    url, ctx, ended = stand_in(), Ctx(), []
    def run():
        try: talker(url).run({"prompt": "[hold]"}, ctx)
        except ExecutionError as e: ended.append(e)
    thread = threading.Thread(target=run)
    thread.start()
    eventually(lambda: "/api/generate" in seen(url)["requests"])
    ctx.stop = Interrupted("The job was canceled.")
    thread.join(60)
    assert [type(e) for e in ended] == [Interrupted] and str(ended[0]) == "The job was canceled."
    eventually(lambda: seen(url)["stopped"] == 1, "Ollama's stop")


def test_cancel_in_the_middle(stand_in):
    url, ctx = stand_in(), Ctx(stop_after=12)
    with pytest.raises(Interrupted): talker(url).run({"prompt": "[tokens=100000] [rate=500]"}, ctx)
    eventually(lambda: seen(url)["stopped"] == 1, "Ollama's stop")
    assert seen(url)["tokens"] < 1000, "it stopped writing"
    assert len("".join(ctx.tokens)) < 12 + 4 * 50


def test_not_one_token_more_is_taken(stand_in):
    chat, ctx, taken = talker(stand_in()), Ctx(stop_after=1), []
    frames = chat.ollama.frames
    chat.ollama.frames = lambda *args: (taken.append(frame) or frame for frame in frames(*args))
    with pytest.raises(Interrupted): chat.run({"prompt": "[tokens=100000]"}, ctx)
    assert len(taken) == 2 and ctx.tokens == [" 000"]


def test_cancel_while_a_whole_answer_is_waited_for(stand_in):
    """As for embeddings, which come at once or not at all."""
    import httpx
    url, stop = stand_in(), threading.Event()
    def check():
        if stop.is_set(): raise Interrupted("The job was canceled.")
    def order():
        eventually(lambda: "/api/generate" in seen(url)["requests"])
        stop.set()
    with Guard(check) as guard:
        threading.Thread(target=order).start()
        with pytest.raises(httpx.HTTPError) as caught:
            Ollama(settings(url)).ask("POST", "/api/generate", {"model": "llama3:8b", "prompt": "[hold]"}, guard, read_s=30)
    assert guard.cut and not isinstance(caught.value, httpx.TimeoutException)
    eventually(lambda: seen(url)["stopped"] == 1, "Ollama's stop")


def test_a_connection_made_after_the_cancel_is_cut_too():
    class Stream:
        def get_extra_info(self, name): return ours
    ours, theirs = socket.socketpair()
    with ours, theirs:
        guard = Guard()
        guard.cut = True
        guard.trace("connection.connect_tcp.complete", {"return_value": Stream()})
        theirs.settimeout(30)
        assert theirs.recv(1) == b""


# --- models


def test_a_missing_model_is_pulled_when_that_is_allowed(stand_in):
    url, ctx = stand_in(STAND_IN_LIBRARY="mistral"), Ctx()
    reply = talker(url, OLLAMA_AUTO_PULL="1").run({"prompt": "hello", "model": "mistral"}, ctx)
    assert reply["response"] == "hello"
    percents = [step for phase, step in ctx.phases if phase == "pulling mistral"]
    assert percents == sorted(percents) and percents[-1] == 100 and len(percents) > 4 and "Pulling mistral." in ctx.logs
    with pytest.raises(InvalidInput, match="library has no model nonesuch"):
        talker(url, OLLAMA_AUTO_PULL="1").run({"prompt": "hello", "model": "nonesuch"}, Ctx())


def test_pulls_go_one_by_one_and_once(stand_in):
    url, errors = stand_in(STAND_IN_LIBRARY="a,b"), []
    chat = talker(url, OLLAMA_AUTO_PULL="1")
    def run(model):
        try: chat.run({"prompt": "x", "model": model}, Ctx())
        except ExecutionError as e: errors.append(e)
    threads = [threading.Thread(target=run, args=(m,)) for m in ("a", "b", "a:latest", "B")]
    for t in threads: t.start()
    for t in threads: t.join(60)
    state = seen(url)
    assert not errors or all("B" in str(e) for e in errors)
    assert sorted(state["pulls"]) == ["a:latest", "b:latest"] and state["most_pulling"] == 1


def test_a_pull_can_be_canceled(stand_in):
    url, ctx = stand_in(STAND_IN_LIBRARY="slow"), Ctx()
    ctx.on_progress = lambda step, total: setattr(ctx, "stop", Interrupted("The job was canceled."))
    with pytest.raises(Interrupted): talker(url, OLLAMA_AUTO_PULL="1").run({"prompt": "x", "model": "slow"}, ctx)
    eventually(lambda: seen(url)["stopped"] == 1 and seen(url)["pulling"] == 0)


def test_preload(stand_in):
    url, lines = stand_in(STAND_IN_LIBRARY="tiny"), []
    chat = talker(url, OLLAMA_PRELOAD_MODELS="tiny,llama3:8b")
    chat.preload(on_progress=lines.append)
    assert sorted(chat.models()) == ["llama3:8b", "tiny:latest"]
    assert lines[-3:] == ["[ollama] tiny: 100 % pulled", "[ollama] tiny is loaded.", "[ollama] llama3:8b is loaded."]


def test_the_holder_leaves(stand_in):
    url = stand_in(STAND_IN_MODELS="a,b,c")
    chat = talker(url)
    for model in "abc": chat.run({"prompt": "x", "model": model}, Ctx())
    assert chat.held_bytes() == 1_500_000_000 and chat.family == "chat"
    chat.leave(1)
    assert sorted(chat.models()) == ["b:latest", "c:latest"], "the oldest, and no more than asked for"
    chat.leave(10**12)
    assert chat.models() == [] and chat.held_bytes() == 0 and seen(url)["unloads"] == ["a:latest", "b:latest", "c:latest"]
    chat.run({"prompt": "[stuck]", "model": "a"}, Ctx())
    assert unload(chat.ollama, "a:latest", timeout_s=0.1) is False
    chat.run({"prompt": "x", "model": "b"}, Ctx())
    chat.ollama.unload_s = 0.1
    chat.leave(1)
    assert chat.models() == ["a:latest"], "what has not left has freed nothing: the next one is asked"


class Turns:
    """An arbiter that writes down what it is asked."""
    def __init__(self): self.joined, self.turns = [], []
    def join(self, holder): self.joined.append(holder)
    @contextmanager
    def turn(self, family, need_bytes=0, check=lambda: None):
        self.turns.append((family, need_bytes() if callable(need_bytes) else need_bytes))
        yield


def test_turns_on_the_gpu(stand_in):
    url, arbiter = stand_in(STAND_IN_LIBRARY="tiny"), Turns()
    ollama = Ollama(settings(url, OLLAMA_AUTO_PULL="1"), arbiter=arbiter, say=lambda line: None)
    chat, embed = ChatExecutor(ollama=ollama), EmbedExecutor(ollama=ollama)
    for _ in range(2): chat.run({"prompt": "x"}, Ctx())
    embed.run({"model": "tiny", "input": "x"}, Ctx())
    assert arbiter.joined == [ollama] and arbiter.turns == [("chat", 600_000_000), ("chat", 0), ("chat", 600_000_000)]
    assert Ollama(Settings({"OLLAMA_URL": "http://203.0.113.9:11434"}, environ={}), arbiter=arbiter).arbiter is None and len(arbiter.joined) == 1


# --- the daemon's process


@posix
def test_a_daemon_is_started_restarted_and_stopped(shim, tmp_path):
    lines = []
    own = settings(f"http://127.0.0.1:{free_port()}", tmp_path, START_OLLAMA="1")
    chat = ChatExecutor(ollama=Ollama(own, daemon=Daemon(own, say=lines.append)))
    daemon = chat.ollama.daemon
    try:
        assert chat.run({"prompt": "hello"}, Ctx())["response"] == "hello" and daemon.ours and daemon.starts == 1
        assert "ollama serve" in lines[0] and "Listening on" in (tmp_path / "logs" / "ollama.log").read_text()
        with pytest.raises(Transient, match="vanished"): chat.run({"prompt": "[tokens=9] [die=2]"}, Ctx())
        assert daemon.process.wait(30) == 9
        assert chat.run({"prompt": "again"}, Ctx())["response"] == "again" and daemon.starts == 2
        process = daemon.process
    finally: chat.close()
    assert process.poll() is not None and not daemon.alive
    chat.close()


def test_a_daemon_that_runs_is_left_alone(stand_in):
    url = stand_in()
    chat = talker(url, START_OLLAMA="1")
    chat.run({"prompt": "x"}, Ctx())
    chat.ollama.daemon.ensure()
    chat.close()
    assert chat.ollama.daemon.alive and chat.ollama.daemon.starts == 0


@posix
def test_a_daemon_that_ends_at_once_says_why(shim, tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN_CRASH", "could not find a home folder")
    chat = ChatExecutor(settings(f"http://127.0.0.1:{free_port()}", tmp_path, START_OLLAMA="1"))
    with pytest.raises(Transient, match=r"ended at once \(Error: could not find a home folder\): see .*ollama\.log"): chat.run({"prompt": "x"}, Ctx())


@posix
def test_a_daemon_that_never_answers(shim, tmp_path):
    write_shim(shim, "#!/bin/sh\nexec sleep 600\n")
    own = settings(f"http://127.0.0.1:{free_port()}", tmp_path, START_OLLAMA="1")
    daemon = Daemon(own, say=lambda line: None, ready_s=0.3)
    with pytest.raises(Transient, match=r"did not answer at .* within 0\.3 s"): daemon.ensure()
    assert not daemon.ours
    def stop(): raise Interrupted("The job was canceled.")
    daemon = Daemon(own, say=lambda line: None)
    with pytest.raises(Interrupted): daemon.ensure(stop)
    assert daemon.starts == 1 and not daemon.ours, "nothing is left behind"


@posix
def test_the_daemon_sees_no_secrets(shim, tmp_path, monkeypatch):
    write_shim(shim, f'#!/bin/sh\nenv > "{tmp_path}/env"\nexit 1\n')
    monkeypatch.setenv("STACK_WORKER_TOKEN", "sesame-worker")
    monkeypatch.setenv("HF_TOKEN", "sesame-hub")
    with pytest.raises(Transient): Daemon(settings(f"http://127.0.0.1:{free_port()}", tmp_path, START_OLLAMA="1"), say=lambda line: None).ensure()
    inherited = (tmp_path / "env").read_text()
    assert "sesame" not in inherited and "OLLAMA_HOST=127.0.0.1:" in inherited


@posix
@pytest.mark.skipif(not sys.platform.startswith("linux") or find_program("ollama", USUAL_PLACES) is not None, reason="there is an Ollama here")
@pytest.mark.parametrize("wish", ["no", "auto", "yes", "broken"])
def test_it_is_installed_only_when_allowed(tmp_path, monkeypatch, wish):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "chmod", "cat", "cp", "env"): os.symlink(shutil.which(name), tools / name)
    write_shim(tools / "apt-get", '#!/bin/sh\necho "apt-get $@"\n')
    write_shim(tools / "sudo", '#!/bin/sh\nshift\nexec "$@"\n')
    write_shim(tmp_path / "ready")
    write_shim(tools / "curl", "#!/bin/sh\nexit 22\n" if wish == "broken" else
               f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho \'cp "{tmp_path}/ready" "{tools}/ollama"; echo installed\' > "$2"\n')
    monkeypatch.setenv("PATH", str(tools))
    lines = []
    own = settings(f"http://127.0.0.1:{free_port()}", tmp_path / "data", START_OLLAMA="1", OLLAMA_INSTALL="yes" if wish == "broken" else wish)
    daemon = Daemon(own, say=lines.append)
    try:
        if wish in ("no", "auto"):
            with pytest.raises(Transient, match="Ollama is not installed: set OLLAMA_INSTALL=yes, or install it as"): daemon.ensure()
            assert not lines and not (tmp_path / "data").exists()
        elif wish == "broken":
            with pytest.raises(Transient, match=r"could not be installed: `curl .*` ended with 22 .*ollama-install\.log"): daemon.ensure()
        else:
            daemon.ensure()
            assert [line.removeprefix("[ollama] $ ").removeprefix("sudo -n ").split()[0] for line in lines[:4]] == ["apt-get", "apt-get", "curl", "sh"]
            log = (tmp_path / "data" / "logs" / "ollama-install.log").read_text()
            assert "apt-get install -y -qq zstd" in log and "installed" in log and daemon.ours
    finally: daemon.stop()


# --- from the command to the daemon and back


@pytest.fixture
def stack(serve, processes, tmp_path):
    """A server and `colab-gpu worker`, both processes; what the worker is told comes from `env`."""
    server = serve(GPU_HEARTBEAT_LEASE_SECONDS=3)

    def start(*argv, **env):
        worker = processes(sys.executable, "-m", "colab_gpu", "worker", "--tools", "ollamaChat,ollamaEmbed", *argv, STACK_API_BASE=server.url,
                           STACK_WORKER_TOKEN=TOKEN, COLAB_GPU_DATA=tmp_path / "worker", **env)
        worker.wait_for("Worker loop started")
        return worker

    start.server, start.client = server, Client(server.url, "")
    return start


def run_cli(server, *argv, stdin=None, **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GPU_", "STACK_", "OLLAMA_", "START_OLLAMA"))}
    done = subprocess.run([sys.executable, "-m", "colab_gpu", *map(str, argv)], cwd=HERE.parent, text=True, capture_output=True, input=stdin, timeout=120,
                          env={**clean, "STACK_API_BASE": server.url, **env})
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def test_chat_from_the_command_line(stack, stand_in, tmp_path):
    url = stand_in(STAND_IN_LIBRARY="tiny")
    stack(OLLAMA_URL=url, OLLAMA_PRELOAD_MODELS="llama3:8b", OLLAMA_AUTO_PULL="1").wait_for(r"llama3:8b is loaded")
    picture = tmp_path / "dot.png"
    picture.write_bytes(b"hi")
    assert run_cli(stack.server, "chat", "the quick brown fox", "--system", "Be brief.", "--option", "temperature=0.2", "--image", picture) == (0, "the quick brown fox\n", "")
    sent = seen(url)["bodies"][-1]
    assert (sent["system"], sent["options"], sent["images"], sent["model"]) == ("Be brief.", {"temperature": 0.2}, ["aGk="], "llama3:8b")
    code, out, err = run_cli(stack.server, "chat", "-", "--json", "--model", "tiny", stdin="from a pipe")
    assert code == 0 and json.loads(out)["response"] == "from a pipe" and json.loads(out)["eval_count"] == 3 and "tiny:latest" in seen(url)["pulls"]
    code, out, err = run_cli(stack.server, "chat", "x", "--option", "temprature=1")
    assert code == 2 and "did you mean `temperature`" in err
    code, out, err = run_cli(stack.server, "chat", "x", "--model", "nonesuch")
    assert code == 1 and "library has no model nonesuch" in err and not out
    code, out, _ = run_cli(stack.server, "submit", "ollamaEmbed", "model=tiny", 'input=["a","b"]', "--wait", "--json")
    assert code == 0 and len(json.loads(out)["result"]["embeddings"]) == 2


def test_chat_from_the_client(stack, stand_in):
    url = stand_in()
    stack(OLLAMA_URL=url)
    chat = stack.client.chat([{"role": "user", "content": "[tokens=300] [wait=100]"}])
    pieces = [next(iter(chat))]
    seen(url, "/stand-in/go")  # the rest is written only now
    pieces += chat
    assert "".join(pieces) == chat.text == chat.reply["message"]["content"] and chat.reply["eval_count"] == 300
    chat = stack.client.chat("[tokens=100000] [rate=500]")
    next(iter(chat))
    chat.job.cancel()
    assert chat.job.wait(60).status == "canceled"
    eventually(lambda: seen(url)["stopped"] == 1, "Ollama's stop")
    assert seen(url)["tokens"] < 50_000


@posix
def test_an_interrupted_chat_is_canceled(stack, stand_in, processes):
    url = stand_in()
    stack(OLLAMA_URL=url)
    chat = processes(sys.executable, "-m", "colab_gpu", "chat", "[hold]", STACK_API_BASE=stack.server.url)
    eventually(lambda: "/api/generate" in seen(url)["requests"])
    chat.signal(signal.SIGINT)
    assert chat.popen.wait(60) == 130
    eventually(lambda: seen(url)["stopped"] == 1, "Ollama's stop")
    [job] = stack.client.jobs()
    assert job.wait(60).status == "canceled"


@posix
def test_the_worker_starts_the_daemon_and_takes_it_along(stack, shim):
    url = f"http://127.0.0.1:{free_port()}"
    worker = stack(OLLAMA_URL=url, START_OLLAMA="1", PATH=os.environ["PATH"])
    assert run_cli(stack.server, "chat", "hello")[:2] == (0, "hello\n")
    first = seen(url)["pid"]
    job = stack.client.submit("ollamaChat", {"prompt": "[tokens=9] [die=3]"}, maxAttempts=2).wait(60)
    assert job.status == "failed" and "vanished in the middle" in job.detail and job.data["attempts"] == 2, "tried again, by a new daemon"
    assert run_cli(stack.server, "chat", "hello")[:2] == (0, "hello\n")
    last = seen(url)["pid"]
    assert first != last and len([line for line in worker.lines if line and "ollama serve" in line]) == 3
    worker.signal(signal.SIGTERM)
    assert worker.popen.wait(60) == 130
    assert not Daemon(settings(url)).alive


@posix
def test_a_worker_that_is_ended_while_it_preloads_takes_the_daemon_along(serve, processes, shim, tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    worker = processes(sys.executable, "-m", "colab_gpu", "worker", "--tools", "ollamaChat", STACK_API_BASE=serve().url, STACK_WORKER_TOKEN=TOKEN,
                       COLAB_GPU_DATA=tmp_path / "worker", OLLAMA_URL=url, OLLAMA_PRELOAD_MODELS="slow", STAND_IN_LIBRARY="slow", PATH=os.environ["PATH"])
    worker.wait_for(r"slow: 0 % pulled")
    assert Daemon(settings(url)).alive
    worker.signal(signal.SIGTERM)
    assert worker.popen.wait(60) == 143
    assert not Daemon(settings(url)).alive


@posix
def test_two_that_start_a_daemon_at_once_share_it(shim, tmp_path):
    own = settings(f"http://127.0.0.1:{free_port()}", tmp_path, START_OLLAMA="1")
    first, second = (Daemon(own, say=lambda line: None) for _ in "ab")
    try:
        threads = [threading.Thread(target=d.ensure) for d in (first, second)]
        for t in threads: t.start()
        for t in threads: t.join(60)
        assert first.alive and first.ours + second.ours >= 1
    finally: first.stop(); second.stop()


def test_what_the_worker_and_the_doctor_say_without_ollama(serve, tmp_path):
    server = serve()
    bare = {"OLLAMA_URL": f"http://127.0.0.1:{free_port()}", "START_OLLAMA": "0", "COLAB_GPU_DATA": str(tmp_path)}
    code, _, err = run_cli(server, "worker", "--once", "--tools", "ollamaChat", **bare)
    assert code in (1, 2) and ("ollamaChat" in err or "Ollama" in err)
    found = look_at_chat(Settings(bare, environ={}))
    assert (found.what, found.state) == ("chat", "note") and "run `ollama serve`, or set START_OLLAMA=1" in found.detail


def test_the_doctor_finds_ollama(stand_in, shim):
    url = stand_in()
    assert look_at_chat(settings(url))[:2] == ("chat", "ok") and f"Ollama 0.12.6 at {url}" in look_at_chat(settings(url)).detail
    assert look_at_chat(settings(f"http://127.0.0.1:{free_port()}", START_OLLAMA="1")).state == "ok"


# --- a real Ollama, where there is one


@pytest.mark.skipif(shutil.which("ollama") is None, reason="no ollama on the PATH")
def test_a_real_ollama(tmp_path):
    own = Settings({"COLAB_GPU_DATA": str(tmp_path)})
    chat = ChatExecutor(own)
    try:
        chat.ollama.daemon.ensure()
        have = [row["model"] for row in chat.ollama.rows("/api/tags")]
        model = os.environ.get("COLAB_GPU_TEST_CHAT_MODEL") or (have[0] if have else None)
        if model is None: pytest.skip("Ollama has no model here")
        ctx = Ctx()
        reply = chat.run({"model": model, "prompt": "Count to five.", "options": {"num_predict": 16, "temperature": 0}}, ctx)
        assert reply["done"] and "".join(ctx.tokens) == reply["response"] and reply["eval_count"] >= 1
        assert chat.held_bytes() >= 0 and model in chat.models()
        stopping = Ctx(stop_after=1)
        with pytest.raises(Interrupted): chat.run({"model": model, "prompt": "Count to a thousand.", "options": {"num_predict": 2000}}, stopping)
        with pytest.raises(InvalidInput, match="ollama pull no-such-model-here"): chat.run({"model": "no-such-model-here", "prompt": "x"}, Ctx())
        chat.leave(1 << 60)
        assert chat.models() == []
    finally: chat.close()
