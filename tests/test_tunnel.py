"""The tunnel, with agents that are processes of their own: a real server behind, real requests through the public address, every known failure."""

import json
import logging
import os
import signal
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import TOKEN
from processes import eventually

pytest.importorskip("pyngrok")
if not Path("/proc/self/environ").exists():
    pytest.skip("looks into the agents' arguments and environment in /proc", allow_module_level=True)

from tunnel_agents import AUTH, CALLER, StandIn

from colab_gpu.client import Client
from colab_gpu.errors import InvalidSetting, TunnelDown, TunnelFailed
from colab_gpu.tunnel import open_tunnel, probe


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    made = StandIn(tmp_path)
    monkeypatch.setenv("STAND_IN_FOLDER", str(made.folder))
    monkeypatch.setenv("PATH", made.env["PATH"])
    monkeypatch.setenv("NGROK_AUTHTOKEN", AUTH)  # where people have it, and where pyngrok looks for it
    monkeypatch.setenv("GPU_CLIENT_TOKEN", CALLER)
    yield made
    for tunnel in made.open_ones:
        tunnel.close()


@pytest.fixture
def server(serve):
    return serve(GPU_CLIENT_TOKEN=CALLER)


def get(url, token=None, **headers):
    """Status and JSON of a GET."""
    request = urllib.request.Request(url, headers={**({"Authorization": f"Bearer {token}"} if token else {}), **headers})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as e:
        with e:
            return e.code, json.loads(e.read() or b"null")


def is_gone(pid):
    """Whether no process of that number runs; one that has ended and was not yet waited for counts as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def family(pid):
    """Arguments and environment of every process of the agent's session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == os.getsid(pid):
                found.append("\n".join((folder / name).read_bytes().decode("utf-8", "replace") for name in ("cmdline", "environ")))
        except OSError:  # it has ended meanwhile
            continue
    return found


# --- open, used, closed


@pytest.mark.parametrize("kind", ["ngrok", "cloudflared"])
def test_requests_through_the_public_address_reach_the_server(stand_in, server, kind):
    with stand_in.tunnel(server.port, TUNNEL=kind) as tunnel:
        assert (tunnel.kind, tunnel.state) == (kind, "open") and tunnel.url != server.url
        assert get(f"{tunnel.url}/gpu-jobs", CALLER)[1]["jobs"] == []
        assert get(f"{tunnel.url}/gpu-jobs")[1]["error"] == "client_token_required"
        assert get(f"{tunnel.url}/gpu-jobs/next?worker=w")[1]["error"] == "missing_worker_token"
        assert get(f"{tunnel.url}/gpu-jobs/next?worker=w", CALLER)[1]["error"] == "invalid_worker_token"
        shown = tunnel.snapshot()
        assert json.loads(json.dumps(shown)) == shown and shown["url"] == tunnel.url and shown["error"] is None
        assert not {AUTH, CALLER, TOKEN} & set(shown.values()) and AUTH not in repr(tunnel)
        pid = stand_in.seen["pid"]
        assert not is_gone(pid)
    assert tunnel.state == "closed" and tunnel.wait(0) and is_gone(pid)
    with pytest.raises(OSError):
        get(f"{tunnel.url}/healthz")


def test_caller_and_worker_meet_through_the_tunnel(stand_in, server, work):
    tunnel = stand_in.tunnel(server.port)
    worker = work(tunnel.url)
    client = Client(tunnel.url, CALLER)
    job = client.wait(client.submit("sleepy", {"seconds": 0}).id, 60)
    assert job.status == "completed" and job.data["workerId"] == "w1"
    assert worker.popen.poll() is None


def test_a_down_tunnel_is_told_to_the_client_as_one(stand_in, server):
    tunnel = stand_in.tunnel(server.port)
    stand_in.order("page=3200")
    with pytest.raises(TunnelDown, match="the tunnel is offline"):
        Client(tunnel.url, CALLER).jobs()


def test_the_domain_and_the_server_are_what_ngrok_is_asked_for(stand_in, server):
    stand_in.tunnel(server.url, NGROK_DOMAIN="https://name.ngrok-free.app/")
    [asked] = stand_in.seen["opened"]
    assert asked["url"] == "https://name.ngrok-free.app" and asked["upstream"] == {"url": server.url}


def test_two_tunnels_of_one_process_do_not_meet(stand_in, server):
    one, other = stand_in.tunnel(server.port), stand_in.tunnel(server.port)
    one.close()
    assert get(f"{other.url}/healthz")[0] == 200 and other.agent.ailment() is None


def test_the_public_address_is_asked_rarely(stand_in, server):
    tunnel = stand_in.tunnel(server.port, TUNNEL_CHECK_SECONDS=0.05)
    looked = threading.Event()
    look, count = tunnel.agent.ailment, []

    def counted():
        count.append(1)
        if len(count) == 20:
            looked.set()
        return look()

    tunnel.agent.ailment = counted
    assert looked.wait(60) and tunnel.probes == 1 and tunnel.snapshot()["requests"] == 1
    [(method, path, headers)] = stand_in.seen["public"]
    assert (method, path) == ("GET", "/healthz") and "ngrok-skip-browser-warning" in {k.lower() for k in headers} and "Authorization" not in headers


# --- secrets


def test_the_token_is_in_no_arguments_environment_log_or_message(stand_in, server, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    tunnel = stand_in.tunnel(server.port)
    seen = stand_in.seen
    assert len(family(seen["pid"])) > 1, "the agent, and the loop that minds it"
    for said in [*family(seen["pid"]), json.dumps([seen["argv"], seen["environ"]])]:
        assert AUTH not in said and CALLER not in said
    config = Path(seen["argv"][seen["argv"].index("--config") + 1])
    assert config.stat().st_mode & 0o777 == 0o600 and config.parent.stat().st_mode & 0o777 == 0o700 and AUTH in config.read_text()
    tunnel.close()
    assert not config.parent.exists()
    stand_in.order("error=105")  # ngrok repeats the token, on its log and on standard error
    with pytest.raises(TunnelFailed) as caught:
        stand_in.tunnel(server.port)
    assert "Your authtoken: ***" in caplog.text, "pyngrok's records are kept, without the token"
    shown = "".join([caplog.text, *capfd.readouterr(), str(caught.value), *stand_in.lines])
    assert AUTH not in shown and CALLER not in shown


def test_cloudflared_inherits_no_secret(stand_in, server, monkeypatch):
    monkeypatch.setenv("TUNNEL_TOKEN", "somebody-elses-named-tunnel")
    stand_in.tunnel(server.port, TUNNEL="cloudflared")
    assert len(family(stand_in.seen["pid"])) > 1
    for said in family(stand_in.seen["pid"]):
        assert not any(secret in said for secret in (AUTH, CALLER, "somebody-elses-named-tunnel"))


# --- what goes wrong at the start


@pytest.mark.parametrize(("order", "code", "retryable", "words"), [
    ("error=105", "ngrok_105", False, "not an ngrok token; copy yours"),
    ("error=107", "ngrok_107", False, "revoked; copy a new one"),
    ("error=108", "ngrok_108", False, "stop the other one"),
    ("open=334", "ngrok_334", False, "in use by another tunnel; stop that one"),
    ("error=727", "ngrok_727", False, "this month's requests are used up"),
    ("page=727", "ngrok_727", False, "this month's requests are used up"),
    ("open=734", "ngrok_734", True, "wait a minute"),
    ("error=9999", "ngrok_9999", True, "errors/err_ngrok_9999"),
    ("quit", "ngrok_ended", True, "this ngrok has had a bad day"),
])
def test_what_ngrok_refuses_is_said_in_words(stand_in, server, order, code, retryable, words):
    stand_in.order(order)
    with pytest.raises(TunnelFailed) as caught:
        stand_in.tunnel(server.port)
    assert (caught.value.code, caught.value.retryable) == (code, retryable) and words in caught.value.message and AUTH not in caught.value.message
    assert is_gone(stand_in.seen["pid"])


@pytest.mark.parametrize(("order", "kind"), [("silent", "ngrok"), ("mute", "ngrok"), ("unregistered", "cloudflared")])
def test_an_agent_that_hangs_is_ended(stand_in, server, order, kind):
    stand_in.order(order)
    with pytest.raises(TunnelFailed, match="did not open the tunnel within 3 s") as caught:
        stand_in.tunnel(server.port, TUNNEL=kind, TUNNEL_START_SECONDS=3)
    assert caught.value.code == "tunnel_timeout" and caught.value.retryable
    assert not stand_in.started or is_gone(stand_in.seen["pid"])


@pytest.mark.parametrize(("order", "code", "words"), [
    ("busy", "cloudflared_busy", "wait some minutes"), ("refused", "cloudflared_refused", "api.trycloudflare.com"),
    ("broken", "cloudflared_ended", "flag provided but not defined"),
])
def test_what_cloudflared_refuses_is_said_in_words(stand_in, server, order, code, words):
    stand_in.order(order)
    with pytest.raises(TunnelFailed, match=words) as caught:
        stand_in.tunnel(server.port, TUNNEL="cloudflared")
    assert caught.value.code == code and caught.value.retryable


def test_a_program_that_cannot_be_had(stand_in, server, tmp_path, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # no network for the download
    monkeypatch.setenv("PYNGROK_NGROK_PATH", str(tmp_path / "nowhere" / "ngrok"))
    with pytest.raises(TunnelFailed, match=r"could not be downloaded \(<urlopen error .*let this machine reach bin.ngrok.com, or .* set NGROK_PATH") as caught:
        stand_in.tunnel(server.port, NGROK_PATH="")
    assert caught.value.code == "ngrok_missing" and caught.value.retryable
    with pytest.raises(InvalidSetting, match="NGROK_PATH: there is no program at"):
        stand_in.tunnel(server.port, NGROK_PATH=tmp_path / "nowhere")
    useless = tmp_path / "useless"
    useless.write_text("not a program")
    useless.chmod(0o755)
    with pytest.raises(TunnelFailed, match="ngrok did not start"):
        stand_in.tunnel(server.port, NGROK_PATH=useless)


def test_closing_does_not_wait_for_an_opening(stand_in, server):
    stand_in.order("silent")
    stop, raised = threading.Event(), []

    def opening():
        try:
            open_tunnel(server.port, stand_in.settings(TUNNEL_START_SECONDS=600), say=stand_in.lines.append, stop=stop)
        except TunnelFailed as e:
            raised.append(e)

    thread = threading.Thread(target=opening)
    thread.start()
    eventually(lambda: stand_in.started, "the agent's start")
    stop.set()
    thread.join(60)
    assert [e.code for e in raised] == ["tunnel_closed"] and is_gone(stand_in.seen["pid"])


# --- nothing unprotected


@pytest.mark.parametrize(("env", "words"), [
    ({}, "GPU_CLIENT_TOKEN"), ({"GPU_CLIENT_TOKEN": CALLER, "GPU_CLIENT_AUTH": "none"}, "GPU_CLIENT_TOKEN"),
    ({"GPU_CLIENT_TOKEN": CALLER, "GPU_WORKER_TOKEN": ""}, "GPU_WORKER_TOKEN"),
])
def test_a_server_that_asks_for_no_token_is_not_made_public(stand_in, serve, env, words):
    server = serve(**env)
    with pytest.raises(TunnelFailed, match=f"{words}.*not made public") as caught:
        stand_in.tunnel(server.port)
    assert caught.value.code == "unprotected" and not caught.value.retryable and not stand_in.started


def test_what_is_not_our_server_is_not_made_public(stand_in, server, processes):
    other = processes(sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "0")
    port = int(other.wait_for(r"port (\d+)")[1])
    with pytest.raises(TunnelFailed, match="not a colab-gpu server"):
        stand_in.tunnel(port)
    server.kill()
    with pytest.raises(TunnelFailed, match="Nothing answers .* start the server") as caught:
        stand_in.tunnel(server.port)
    assert caught.value.retryable and not stand_in.started


def test_a_server_that_loses_its_token_is_hidden_at_once(stand_in, server):
    tunnel = stand_in.tunnel(server.port)
    pid = stand_in.seen["pid"]
    server.process.end()
    server._env.pop("GPU_CLIENT_TOKEN")
    server.start()
    assert tunnel.wait(60) and (tunnel.state, tunnel.error.code) == ("failed", "unprotected")
    assert is_gone(pid) and any("The tunnel is closed." in line for line in stand_in.lines)


# --- a tunnel that dies


@pytest.mark.parametrize("kind", ["ngrok", "cloudflared"])
def test_a_tunnel_whose_agent_dies_is_opened_again(stand_in, server, kind):
    tunnel = stand_in.tunnel(server.port, TUNNEL=kind)
    before = tunnel.url
    os.kill(stand_in.seen["pid"], signal.SIGKILL)
    eventually(lambda: tunnel.opened == 2 and tunnel.state == "open" and len(stand_in.lines) == 2, "the second opening")
    assert tunnel.url != before and stand_in.addresses == [tunnel.url]
    assert "down, and is opened again" in stand_in.lines[0] and stand_in.lines[1] == f"The tunnel is open again: {tunnel.url}"
    assert get(f"{tunnel.url}/gpu-jobs", CALLER)[0] == 200


def test_a_tunnel_that_ngrok_has_dropped_is_opened_again(stand_in, server):
    tunnel = stand_in.tunnel(server.port)
    stand_in.order("drop")
    eventually(lambda: stand_in.lines, "the loss")
    stand_in.order()
    eventually(lambda: tunnel.opened >= 2 and tunnel.state == "open" and tunnel.agent.ailment() is None, "the second opening")
    assert "ngrok has dropped the tunnel" in stand_in.lines[0]


def test_an_account_that_refuses_later_ends_the_tunnel(stand_in, server):
    tunnel = stand_in.tunnel(server.port)
    stand_in.order("error=107")
    os.kill(stand_in.seen["pid"], signal.SIGKILL)
    assert tunnel.wait(60) and tunnel.state == "failed" and tunnel.error.code == "ngrok_107"
    assert [line[:18] for line in stand_in.lines] == ["The tunnel is down", "The tunnel is clos"]


def test_a_lost_session_that_still_counts_is_waited_for(stand_in, server):
    tunnel = stand_in.tunnel(server.port)
    first = stand_in.seen["pid"]
    stand_in.order("error=108")  # the edge has not noticed yet that the first agent is gone
    os.kill(first, signal.SIGKILL)
    eventually(lambda: tunnel.error and tunnel.error.code == "ngrok_108", "the refusal")
    stand_in.order()
    eventually(lambda: tunnel.opened == 2, "the second opening")
    assert len(stand_in.lines) == 2, "once down, once open"


@pytest.mark.parametrize(("order", "code"), [("page=3200", "offline"), ("deaf", "cannot be reached")])
def test_an_address_that_leads_nowhere_is_opened_again(stand_in, server, order, code):
    tunnel = stand_in.tunnel(server.port, TUNNEL_PROBE_SECONDS=0.1)
    eventually(lambda: tunnel.probes > 1, "a second look")
    stand_in.order(order)
    eventually(lambda: stand_in.lines, "the loss")
    stand_in.order()
    eventually(lambda: tunnel.opened >= 2 and tunnel.state == "open", "the second opening")
    assert code in stand_in.lines[0]


def test_a_month_that_is_used_up_ends_the_tunnel(stand_in, server):
    tunnel = stand_in.tunnel(server.port, TUNNEL_PROBE_SECONDS=0.1)
    stand_in.order("page=727")
    assert tunnel.wait(60) and tunnel.error.code == "ngrok_727" and is_gone(stand_in.seen["pid"])
    assert len(stand_in.lines) == 1 and "this month's requests are used up" in stand_in.lines[0]


def test_a_server_that_is_away_is_waited_for_and_told_once(stand_in, server):
    tunnel = stand_in.tunnel(server.port, TUNNEL_PROBE_SECONDS=0.1)
    server.kill()
    eventually(lambda: stand_in.lines, "the word about it")
    probes = tunnel.probes
    eventually(lambda: tunnel.probes > probes + 3, "more looks")
    server.start()
    eventually(lambda: len(stand_in.lines) == 2, "the good news")
    assert "nothing answers behind it" in stand_in.lines[0] and stand_in.lines[1] == f"The server answers at {tunnel.url}."
    assert (tunnel.opened, tunnel.state) == (1, "open")


def test_a_callback_that_fails_does_not_end_the_watch(stand_in, server):
    def broken(url):
        raise RuntimeError("the panel is gone")

    tunnel = stand_in.tunnel(server.port)
    tunnel.on_address = broken
    for number in (2, 3):
        os.kill(stand_in.seen["pid"], signal.SIGKILL)
        eventually(lambda number=number: tunnel.opened == number and tunnel.state == "open" and tunnel.agent.ailment() is None, "the opening")
    assert any("RuntimeError: the panel is gone" in line for line in stand_in.lines)


def test_a_web_page_is_told_from_the_server(stand_in, server):
    tunnel = stand_in.tunnel(server.port)
    probe(tunnel.url)
    stand_in.order("page=8012")
    with pytest.raises(TunnelFailed, match="nothing answers behind it"):
        probe(tunnel.url)


# --- the commands


@pytest.fixture
def command(processes, stand_in, tmp_path):
    def start(*words, **env):
        return processes(sys.executable, "-m", "colab_gpu", *words, **{**stand_in.env, "GPU_WORKER_TOKEN": TOKEN, "COLAB_GPU_DATA": tmp_path / "data", **env})

    return start


def said(process):
    """All that a process that has ended has said."""
    eventually(lambda: None in process.lines, "the end of its output")
    return "\n".join(line for line in process.lines if line is not None)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_tunnel_stays_until_it_is_told_to_end(stand_in, server, command, number, code):
    process = command("tunnel", "--port", server.port)
    url = process.wait_for(r"^(http://\S+)$")[1]
    assert get(f"{url}/gpu-jobs", CALLER)[0] == 200
    pid = stand_in.seen["pid"]
    process.signal(number)
    assert process.popen.wait(60) == code and is_gone(pid)
    assert said(process) == url


@pytest.mark.parametrize("kind", ["ngrok", "cloudflared"])
def test_no_agent_outlives_us(stand_in, server, command, kind):
    process = command("tunnel", "--kind", kind, "--port", server.port)
    process.wait_for(r"^http://\S+$")
    seen = stand_in.seen
    process.kill()
    eventually(lambda: is_gone(seen["pid"]), "the agent's end")
    if kind == "ngrok":
        eventually(lambda: not Path(seen["argv"][seen["argv"].index("--config") + 1]).parent.exists(), "the end of the file with the token")


def test_closing_from_a_callback(stand_in, server):
    tunnel = stand_in.tunnel(server.port)
    tunnel.on_address = lambda url: tunnel.close()
    os.kill(stand_in.seen["pid"], signal.SIGKILL)
    assert tunnel.wait(60) and tunnel.state == "closed"
    eventually(lambda: is_gone(stand_in.seen["pid"]), "the agent's end")


def test_tunnel_ends_with_1_when_it_is_lost_for_good(stand_in, server, command):
    process = command("tunnel", "--kind", "ngrok", "--port", server.port)
    process.wait_for(r"^http://\S+$")
    stand_in.order("error=105")
    os.kill(stand_in.seen["pid"], signal.SIGKILL)
    assert process.popen.wait(60) == 1
    assert "not an ngrok token" in said(process) and AUTH not in said(process)


@pytest.mark.parametrize(("words", "env", "code", "sentence"), [
    (["--kind", "ngrok"], {"NGROK_AUTHTOKEN": ""}, 2, "ngrok needs a token"),
    ([], {"NGROK_AUTHTOKEN": "", "PATH": "/nowhere"}, 2, "No tunnel can be opened: set NGROK_AUTHTOKEN"),
    (["--kind", "cloudflared"], {"PATH": "/nowhere"}, 2, "cloudflared is not on the PATH: install"),
    (["--domain", "no domain"], {}, 2, "NGROK_DOMAIN must be a host name"), (["--port", "0"], {}, 2, "its port (1 to 65535)"),
    (["--port", "1"], {}, 1, "Nothing answers at http://127.0.0.1:1: start the server"), ([], {"TUNNEL": "none"}, 2, "TUNNEL=none asks for no tunnel"),
])
def test_tunnel_says_what_is_wrong(stand_in, server, command, words, env, code, sentence):
    process = command("tunnel", *(["--port", server.port] if "--port" not in words else []), *words, **env)
    assert process.popen.wait(60) == code
    assert sentence in said(process) and "Traceback" not in said(process) and AUTH not in said(process) and not stand_in.started


def test_serve_and_tunnel_together(stand_in, command, tmp_path):
    process = command("serve", "--tunnel", "--port", "0", GPU_CLIENT_TOKEN="", GPU_WORKER_TOKEN="")
    url = process.wait_for(r"^colab-gpu is public at (http://\S+)$")[1]
    path = tmp_path / "data" / "tokens.env"
    tokens = dict(line.split("=", 1) for line in path.read_text().splitlines())
    assert path.stat().st_mode & 0o777 == 0o600 and set(tokens) == {"GPU_CLIENT_TOKEN", "GPU_WORKER_TOKEN"}
    process.wait_for(rf"GPU_CLIENT_TOKEN .* are in {path}")
    assert get(f"{url}/gpu-jobs")[0] == 401 and get(f"{url}/gpu-jobs", tokens["GPU_CLIENT_TOKEN"])[0] == 200
    pid = stand_in.seen["pid"]
    facts = [*family(pid), Path(f"/proc/{process.popen.pid}/cmdline").read_text()]
    assert not any(token in fact for token in [*tokens.values(), AUTH] for fact in facts)
    assert process.end() == 0 and is_gone(pid)
    assert not any(token in said(process) for token in tokens.values())
    again = command("serve", "--tunnel", "--port", "0", GPU_CLIENT_TOKEN="", GPU_WORKER_TOKEN="")
    url = again.wait_for(r"^colab-gpu is public at (http://\S+)$")[1]
    assert get(f"{url}/gpu-jobs", tokens["GPU_CLIENT_TOKEN"])[0] == 200, "a restart keeps the tokens"
    again.signal(signal.SIGINT)
    assert again.popen.wait(60) == 0


def test_serve_ends_when_its_tunnel_cannot_be_opened(stand_in, command):
    stand_in.order("error=108")
    process = command("serve", "--tunnel", "--port", "0")
    process.wait_for("serves at")
    assert process.popen.wait(60) == 1
    assert "stop the other one" in said(process) and "public at" not in said(process) and "Traceback" not in said(process)


@pytest.mark.parametrize(("kind", "order"), [("ngrok", "silent"), ("cloudflared", "unregistered")])
def test_serve_stopped_while_its_tunnel_opens(stand_in, command, kind, order):
    stand_in.order(order)
    process = command("serve", "--tunnel", "--port", "0", TUNNEL=kind, TUNNEL_START_SECONDS=600)
    eventually(lambda: stand_in.started, "the agent's start")
    assert process.end(60) == 0 and is_gone(stand_in.seen["pid"])


def test_serve_does_not_open_to_everyone(stand_in, command):
    process = command("serve", "--tunnel", "--port", "0", GPU_CLIENT_AUTH="none")
    assert process.popen.wait(60) == 2 and "whole internet" in said(process) and not stand_in.started
