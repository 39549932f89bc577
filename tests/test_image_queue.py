"""One picture, whichever way it is asked for: through server, queue and worker, in a batch, and again from its file."""
import base64
import io
import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import numpy as np
import torch
from PIL import Image

from colab_gpu.cli import main
from colab_gpu.client import Client
from colab_gpu.config import Settings
from colab_gpu.images import ImageExecutor
from colab_gpu.jobs import LocalContext
from colab_gpu.pipelines import tiny_pipeline
from colab_gpu.server import QueueServer
from colab_gpu.worker import Worker

WORKER, CALLER = "a-worker-token-for-tests", "a-caller-token-for-tests"
PAYLOAD = {"prompt": "a red lighthouse", "negative_prompt": "fog", "seed": 7, "width": 256, "height": 264, "num_inference_steps": 6, "guidance_scale": 6.5,
           "scheduler": "euler_a", "clip_skip": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A server, and a worker of it that draws with a tiny model; the client."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = tmp_path_factory.mktemp("queue")
    settings = {"GPU_WORKER_TOKEN": WORKER, "GPU_CLIENT_TOKEN": CALLER, "COLAB_GPU_DATA": str(data / "data")}
    artist = ImageExecutor(str(tiny_pipeline(data / "tiny")), device="cpu", settings=Settings(environ={}))
    with QueueServer(settings) as server:
        own = Settings({"STACK_API_BASE": server.url, "STACK_WORKER_TOKEN": WORKER, "WORKER_WAIT_SECONDS": 1}, environ={})
        worker = Worker([artist], own, log=None).start()
        client = Client(server.url, CALLER)
        client.artist = artist
        yield client
        assert worker.stop()
    torch.set_num_threads(threads)


@pytest.fixture
def command(place, monkeypatch, tmp_path):
    "Runs `colab-gpu` here; the exit code."
    monkeypatch.setenv("STACK_API_BASE", place.transport.base)
    monkeypatch.setenv("GPU_CLIENT_TOKEN", CALLER)
    monkeypatch.chdir(tmp_path)
    return lambda *argv: main([str(word) for word in argv])


def apart(one, other):
    return np.abs(np.asarray(Image.open(io.BytesIO(one)), int) - np.asarray(Image.open(io.BytesIO(other)), int)).max()


def test_queue_batch_and_replay_give_the_same_picture(place, command, tmp_path):
    queued = place.submit("imagenGenerate", PAYLOAD).wait(120).png
    twins = [LocalContext() for _ in range(3)]
    results = place.artist.run_batch([({**PAYLOAD, "seed": seed}, ctx) for seed, ctx in zip((6, 7, 8), twins, strict=True)])
    batched = twins[1].artifacts["image.png"][0]
    assert [result["batch_size"] for result in results] == [3, 3, 3] and apart(queued, batched) <= 1
    (tmp_path / "batched.png").write_bytes(batched)
    assert command("replay", "batched.png", "-o", "again.png") == 0
    again = (tmp_path / "again.png").read_bytes()
    assert apart(again, queued) == 0 and apart(again, batched) <= 1
    assert {name: json.loads(Image.open(io.BytesIO(again)).text["colab-gpu"])[name] for name in PAYLOAD} == PAYLOAD
    assert command("replay", "again.png", "--seed", "8", "-o", "other.png") == 0
    assert apart((tmp_path / "other.png").read_bytes(), twins[2].artifacts["image.png"][0]) <= 1


def test_a_picture_from_a_picture_through_the_queue_and_again(place, command, tmp_path, capsys):
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "start.png")
    start = base64.b64encode((tmp_path / "start.png").read_bytes()).decode()
    first = place.submit("imagenGenerate", {**PAYLOAD, "init_image": start, "strength": 0.6}).wait(120)
    assert first.status == "completed" and (first.result["width"], first.result["height"]) == (256, 264)
    (tmp_path / "first.png").write_bytes(first.png)
    assert command("replay", "first.png") == 2 and "give that with --init-image FILE" in capsys.readouterr().err
    assert command("replay", "first.png", "--init-image", "first.png") == 2 and "is not the file" in capsys.readouterr().err
    assert command("replay", "first.png", "--init-image", "start.png", "-o", "again.png") == 0
    assert apart((tmp_path / "again.png").read_bytes(), first.png) == 0


def test_several_pictures_come_as_artifacts(place):
    done = place.submit("imagenGenerate", {"prompt": "x", "num_images": 2, "num_inference_steps": 5, "width": 256, "height": 256, "output_format": "webp"}).wait(120)
    assert [(a["name"], a["contentType"]) for a in done.artifacts] == [("image.webp", "image/webp"), ("image-2.webp", "image/webp")]
    assert [p["artifact"] for p in done.result["images"]] == ["image.webp", "image-2.webp"]


@pytest.mark.parametrize(("data", "words"), [(b"\xff\xd8\xff\xe0", "only PNG files tell"), (None, "cannot be read")])
def test_files_that_tell_nothing_are_wrong_usage(command, tmp_path, capsys, data, words):
    if data is not None: (tmp_path / "x.png").write_bytes(data)
    assert command("replay", "x.png") == 2 and words in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(tmp_path / "foreign.png")
    assert command("replay", "foreign.png") == 2 and "does not tell what made it" in capsys.readouterr().err


def test_the_server_refuses_what_no_worker_could_do(place):
    from colab_gpu.errors import InvalidPayload
    for bad, field in (({"scheduler": "magic"}, "scheduler"), ({"init_image": "cat.png"}, "init_image"), ({"num_images": 0}, "num_images"), ({"lora": []}, "lora")):
        with pytest.raises(InvalidPayload) as e: place.submit("imagenGenerate", {"prompt": "x", **bad})
        assert e.value.field == field
