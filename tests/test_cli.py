"""The commands as people run them: real processes, exit codes, and no traceback for a mistake."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TOKEN

from colab_gpu.client import Client

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cli(serve, tmp_path):
    server = serve()

    def run(*argv, helper=False, stdin=None, **env):
        entry = "from colab_gpu.cli import main, mcp_gpu_job; import sys; sys.exit(%s())" % ("mcp_gpu_job" if helper else "main")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("GPU_", "STACK_", "WORKER_", "IMAGEN_"))}
        done = subprocess.run([sys.executable, "-c", entry, *map(str, argv)], cwd=tmp_path, text=True, capture_output=True, input=stdin, timeout=120,
                              env={**clean, "PYTHONPATH": str(ROOT), "STACK_API_BASE": server.url, **env})
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, done.stderr

    run.server = server
    return run


def test_submit_status_wait_cancel_retry(cli, work):
    work(cli.server.url)
    code, out, _ = cli("submit", "sleepy", "seconds=0.1", "--json")
    job = json.loads(out)
    assert code == 0 and job["status"] in ("queued", "leased")
    code, out, _ = cli("wait", job["id"], "--json")
    assert code == 0 and json.loads(out)["result"]["slept"] == 0.1
    code, out, _ = cli("status", job["id"])
    assert code == 0 and "completed" in out and '"slept": 0.1' in out
    code, out, _ = cli("submit", "nobody-has-this", "--json")
    waiting = json.loads(out)["id"]
    assert "No connected worker has the tool" in cli("status", waiting)[1]
    assert cli("wait", waiting, "--timeout", "0.2")[0] == 1
    assert cli("cancel", waiting)[0] == 0 and cli("wait", waiting)[0] == 1
    code, out, _ = cli("retry", waiting, "--json")
    assert json.loads(out)["retryOf"] == waiting
    code, out, _ = cli("jobs", "--limit", "2")
    assert code == 0 and len(out.splitlines()) == 2
    code, out, _ = cli("events", job["id"], "--json")
    assert [json.loads(line)["event"] for line in out.splitlines()][-1] == "done"
    code, out, _ = cli("submit", "sleepy", "--payload", '{"seconds": 0.05}', "--wait")
    assert code == 0 and '"slept": 0.05' in out


@pytest.mark.parametrize(("argv", "code", "words"), [
    (["status", "no-such-job"], 1, "There is no job"),
    (["submit", "imagenGenerate", "prompt="], 2, "`prompt`"),
    (["submit", "imagenGenerate", "prompt=x", "steps=3"], 2, "`num_inference_steps`"),
    (["submit", "x", "--payload", "{"], 2, "--payload is not JSON"),
    (["submit", "x", "--payload", "[]"], 2, "must be a JSON object"),
    (["submit", "x", "--payload-file", "missing.json"], 2, "cannot be read"),
    (["jobs", "--limit", "500"], 2, "`limit`"), (["jobs", "--status", "lost"], 2, "--status"),
    (["wait", "x", "--timeout", "soon"], 2, "--timeout"), (["frobnicate"], 2, "frobnicate"), ([], 2, "COMMAND"),
    (["imagine", "x", "-o", "no/such/folder.png"], 2, "--output"), (["status", "x", "--server", "nonsense"], 2, "STACK_API_BASE"),
    (["status", "x", "--server", "http://127.0.0.1:9"], 1, "Nothing listens"), (["serve", "--port", "99999"], 2, "COLAB_GPU_PORT"),
    (["serve", "--port", "0", "--data", "/proc/nowhere"], 2, "data folder"), (["serve", "--host", "203.0.113.9", "--port", "0"], 2, "cannot listen"),
    (["serve", "--database", "postgresql://x"], 2, "COLAB_GPU_DATABASE"),
])
def test_mistakes_get_a_sentence(cli, argv, code, words):
    found, out, err = cli(*argv)
    assert (found, words in err) == (code, True), err
    assert len(err.strip().splitlines()[-1]) < 400 and out == ""


def test_a_wrong_setting_is_named(cli):
    for env, words in (({"GPU_MAX_PENDING_JOBS": "many"}, "GPU_MAX_PENDING_JOBS must be a whole number"), ({"GPU_CLIENT_AUTH": "maybe"}, "token, none")):
        code, _, err = cli("serve", "--port", "0", **env)
        assert code == 2 and words in err
    code, out, err = cli("settings", GPU_WORKER_TOKEN="hush-hush", WORKER_ID="attic")
    assert code == 0 and "hush-hush" not in out + err and "attic" in out


def test_the_references_helper(cli, tmp_path):
    code, out, err = cli("-t", "imagenGenerate", "-p", "a lighthouse", "--negative-prompt", "fog", "--steps", "20", "--width", "512", "--height", "640",
                         "--seed", "7", "--guidance", "6.5", helper=True)
    assert code == 0 and err.strip() == f"POST {cli.server.url}/gpu-jobs"
    assert json.loads(out)["job"]["payload"] == {"prompt": "a lighthouse", "negative_prompt": "fog", "num_inference_steps": 20, "width": 512, "height": 640,
                                                 "seed": 7, "guidance_scale": 6.5}
    assert json.loads(cli("why is the sky blue?", "phi3", helper=True)[1])["job"]["payload"] == {"prompt": "why is the sky blue?", "model": "phi3"}
    assert json.loads(cli("hi", helper=True, GPU_JOB_MODEL="m", GPU_JOB_TOOL="ollamaChat")[1])["job"]["payload"] == {"prompt": "hi", "model": "m"}
    (tmp_path / "body.json").write_text('{"tool": "errand", "payload": {"n": 1}, "priority": "high"}')
    assert json.loads(cli("--payload-file", "body.json", helper=True)[1])["job"]["priority"] == "high"
    assert json.loads(cli("--payload-file", "-", helper=True, stdin='{"tool": "errand"}')[1])["job"]["tool"] == "errand"
    code, out, _ = cli("--raw-payload", "{}", helper=True)
    assert code == 1 and json.loads(out)["error"] == "tool_required"
    code, out, err = cli("hi", helper=True, GPU_JOB_ENDPOINT="/nowhere")
    assert code == 1 and f"POST {cli.server.url}/nowhere" in err and json.loads(out)["error"] == "not_found"
    assert cli(helper=True)[0] == 2


def test_help_and_version(cli):
    assert cli("--version")[1].startswith("colab-gpu 0.")
    for command in ("serve", "tunnel", "worker", "submit", "status", "wait", "jobs", "cancel", "retry", "events", "imagine", "replay", "demo", "settings", "doctor"):
        assert cli(command, "--help")[0] == 0


def test_doctor(cli, stand_in, tmp_path):
    "All is well on this machine, but for what it was told wrong; each of those is named, with what mends it."
    ollama = stand_in()
    well = {"STACK_WORKER_TOKEN": TOKEN, "COLAB_GPU_DATA": str(tmp_path / "not" / "yet"), "OLLAMA_URL": ollama}
    code, out, _ = cli("doctor", "--json", **well)
    rows = {row["what"]: row for row in json.loads(out)}
    assert {what: rows[what]["state"] for what in ("server", "STACK_WORKER_TOKEN", "GPU_CLIENT_TOKEN", "data folder")} == dict.fromkeys(
        ("server", "STACK_WORKER_TOKEN", "GPU_CLIENT_TOKEN", "data folder"), "ok")
    assert "GPU_WORKER_TOKEN" in rows and {"accelerator", "model cache", "Python"} <= rows.keys() and not (tmp_path / "not").exists(), "it changes nothing"
    assert (rows["chat"]["state"] == "ok" and f"Ollama 0.12.6 at {ollama}" in rows["chat"]["detail"]) or "colab-gpu[chat]" in rows["chat"]["mend"]
    assert (rows["images"]["state"] == "ok" and "diffusers" in rows["images"]["detail"]) or "colab-gpu[images]" in rows["images"]["mend"]
    assert code == (1 if any(row["state"] == "missing" for row in rows.values()) else 0)
    (tmp_path / "file").touch()
    code, out, err = cli("doctor", STACK_WORKER_TOKEN="not-the-token", COLAB_GPU_DATA=str(tmp_path / "file" / "data"), WORKER_TOOLS="ollamaChat",
                         OLLAMA_URL="http://127.0.0.1:9", START_OLLAMA="0", GPU_MAX_PENDING_JOBS="many")
    wrong = {line.split()[1]: line for line in out.splitlines() if line.startswith("missing")}
    assert code == 1 and "not-the-token" not in out + err and TOKEN not in out + err
    assert "export STACK_WORKER_TOKEN=… (the server's GPU_WORKER_TOKEN)" in wrong["STACK_WORKER_TOKEN"] and "COLAB_GPU_DATA" in wrong["data"]
    assert "must be a whole number" in wrong["GPU_MAX_PENDING_JOBS"] and ("ollama serve" in wrong["chat"] or "pip install" in wrong["chat"])
    assert cli("jobs", "--json")[1].strip() == "[]" and not Client(cli.server.url, "").workers(), "nothing was asked of the queue"
    code, out, _ = cli("doctor", STACK_API_BASE="http://127.0.0.1:9")
    assert code == 1 and "colab-gpu serve, or set STACK_API_BASE" in next(line for line in out.splitlines() if line.startswith("missing  server"))


def test_interrupting_a_wait_is_130(processes, serve):
    server = serve()
    child = processes(sys.executable, "-m", "colab_gpu", "submit", "errand", "--wait", STACK_API_BASE=server.url, PYTHONPATH=ROOT)
    child.wait_for("submitted")
    child.signal(signal.SIGINT)
    assert child.popen.wait(20) == 130
    child.wait_for("The job was canceled")


def test_serve_stops_in_good_order(serve):
    for number in (signal.SIGTERM, signal.SIGINT):
        server = serve()
        server.process.signal(number)
        assert server.process.popen.wait(20) == 0
        assert [line for line in server.process.lines if line] == [f"colab-gpu serves at {server.url}"]


def test_demo_refuses_before_it_starts_anything(cli, tmp_path):
    for words in ((" ",), ("x", "--width", "many"), ("x", "--strength", "2")):
        code, out, err = cli("demo", *words, "-o", tmp_path / "demo.png")
        assert code in (1, 2) and not out and "server at" not in err and "Traceback" not in err, err
    assert not (tmp_path / "demo.png").exists()


def test_demo_and_imagine_draw(cli, processes, tmp_path):
    pytest.importorskip("diffusers")
    from PIL import Image

    code, out, err = cli("demo", "a red circle on a blue background", "--steps", "5", "--seed", "7", "-o", tmp_path / "demo.png")
    assert code == 0 and out == f"picture: {tmp_path / 'demo.png'}\n" and "picture drawn" in err, err
    demo = Image.open(tmp_path / "demo.png")
    assert demo.size == (256, 256) and "Seed: 7" in demo.text["parameters"]
    worker = processes(sys.executable, "-m", "colab_gpu", "worker", "--once", STACK_API_BASE=cli.server.url, STACK_WORKER_TOKEN=TOKEN,
                       IMAGEN_MODEL_ID="demo", PYTHONPATH=ROOT)
    code, out, err = cli("imagine", "a red circle on a blue background", "--steps", "5", "--seed", "7", "--width", "256", "--height", "256", "-o", "x.png")
    assert code == 0 and out == "x.png\n", err
    assert Image.open(tmp_path / "x.png").tobytes() == demo.tobytes(), "one seed, one picture"
    assert worker.popen.wait(60) == 0
    assert TOKEN not in "".join(line or "" for line in worker.lines)


def test_workers_and_drain(cli):
    import http.client

    assert cli("workers") == (0, "no workers\n", "")
    connection = http.client.HTTPConnection("127.0.0.1", cli.server.port)
    connection.request("GET", "/gpu-jobs/next?worker=the+attic&tools=errand&models=flux", headers={"Authorization": f"Bearer {TOKEN}", "X-Protocol": "1"})
    assert connection.getresponse().status == 204
    code, out, _ = cli("workers")
    assert code == 0 and out.split() == ["the", "attic", "idle", "-", "errand;", "warm:", "flux"]
    code, out, _ = cli("drain", "the attic")
    assert code == 0 and "draining" in out and json.loads(cli("workers", "--json")[1])[0]["draining"] is True
    assert json.loads(cli("drain", "the attic", "--off", "--json")[1])[0]["draining"] is False
    code, _, err = cli("drain", "nobody")
    assert code == 1 and "No worker nobody was seen" in err


def test_a_webhook_from_the_command_line(cli):
    code, _, err = cli("submit", "errand", "--webhook", "https://example.org/done")
    assert code == 2 and "GPU_WEBHOOK_SECRET" in err
