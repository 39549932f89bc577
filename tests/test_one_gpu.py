"""One GPU for both: real Diffusers and a daemon in a process of its own take turns on a card in miniature, on which both do not fit."""

import io
import shutil
import threading

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("ollama")

import numpy as np
from card import Card, Watched
from PIL import Image
from processes import eventually, seen

from colab_gpu.chat import ChatExecutor, Ollama
from colab_gpu.config import Settings
from colab_gpu.images import ImageExecutor
from colab_gpu.jobs import LocalContext
from colab_gpu.models import find_model
from colab_gpu.pipelines import weight_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"width": 256, "height": 256, "num_inference_steps": 5, "guidance_scale": 3.0}
SIZE = weight_bytes(find_model("demo"), "float32")  # what "10 GB of 15" is here


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    "The demo model's files, as a model of another name."
    return shutil.copytree(find_model("demo").location, tmp_path_factory.mktemp("models") / "twin")


class Place:
    "Both executors, their arbiter, and the card."
    def __init__(self, card, model, **options):
        self.card, self.arbiter = card, Watched(card, **options)
        self.artist = ImageExecutor(str(model), device="cpu", settings=Settings(environ={}), arbiter=self.arbiter, free=lambda device: card.free_bytes())
        own = Settings({"OLLAMA_URL": card.url, "START_OLLAMA": "0", "OLLAMA_PRELOAD_MODELS": "small"}, environ={})
        self.ollama = Ollama(own, arbiter=self.arbiter, say=self.arbiter.said.append)
        self.chat = ChatExecutor(ollama=self.ollama)

    def picture(self, seed=7, ctx=None, **more):
        "The pixels that a job gives."
        ctx = ctx or LocalContext()
        self.result = self.artist.run({"prompt": "a red circle on a blue background", "seed": seed, **SMALL, **more}, ctx)
        return np.asarray(Image.open(io.BytesIO(ctx.artifacts["image.png"][0])), int)

    def answer(self, prompt="the quick brown fox", **more):
        "The text that a job gives."
        return self.chat.run({"prompt": prompt, **more}, LocalContext())["response"]

    def unloads(self): return seen(self.card.url)["unloads"]


@pytest.fixture
def place(stand_in, twin, monkeypatch):
    "A card of so many tenths of a model, and a daemon whose models `small` and `large` are 2 and 6 tenths."
    def start(tenths, **options):
        url = stand_in(STAND_IN_MODELS="small,large", STAND_IN_SIZES=f"small={SIZE * 2 // 10},large={SIZE * 6 // 10}")
        return Place(Card(SIZE * tenths // 10, url).watch(monkeypatch), twin, **options)
    return start


# ---- switching ------------------------------------------------------------------------------------------------------

def test_two_image_models_switch_back_and_forth(place):
    here = place(15)
    first = here.picture(), here.picture(model="demo", seed=8)
    after = here.card.free_bytes()
    for _ in range(2):
        assert (here.picture() == first[0]).all() and here.artist.models() == ["twin"] and here.card.images_bytes() == here.artist.held_bytes()
        assert (here.picture(model="demo", seed=8) == first[1]).all() and here.artist.models() == ["demo"] and here.card.free_bytes() == after
    assert here.card.loads == ["twin", "demo"] * 3 and here.card.lowest >= 0
    here.artist.unload()
    assert here.card.free_bytes() == here.card.total and not len(here.card.parts)


def test_pictures_and_chat_switch_back_and_forth(place):
    here = place(15)
    first, free = here.picture(), here.card.free_bytes()
    for n in range(1, 4):
        assert here.answer(model="large") == "the quick brown fox"
        assert here.artist.models() == [] and here.card.images_bytes() == 0 and here.chat.models() == ["large:latest"]
        assert (here.picture() == first).all() and here.result["load_ms"] > 0
        assert here.chat.models() == [] and here.unloads() == ["large:latest"] * n and here.card.free_bytes() == free
    assert here.card.loads == ["twin"] * 4 and here.card.lowest >= 0 and not here.arbiter.said
    here.artist.leave(1 << 60)
    assert here.card.free_bytes() == here.card.total and not len(here.card.parts) and here.arbiter.owner is None


def test_where_both_fit_nobody_is_sent_away(place):
    here = place(15)
    first = here.picture()
    for _ in range(3):
        assert here.answer(model="small") and (here.picture() == first).all()
    assert here.card.loads == ["twin"] and not here.unloads() and here.chat.models() == ["small:latest"] and here.result["load_ms"] == 0
    assert here.answer(model="large") and here.artist.models() == [] and here.unloads() == [], "only who must go goes"


# ---- what was true when they queued is not true when their turn comes -----------------------------------------------

def test_a_model_that_was_sent_away_while_its_job_waited_gets_room_again(place):
    here, pictures = place(15), []
    first = here.picture()
    waiting = threading.Thread(target=lambda: pictures.append(here.picture()))
    with here.arbiter.turn("chat"):
        waiting.start()  # its model is there
        eventually(lambda: here.arbiter.waiting, "the picture's place in the line")
        here.answer(model="large")
        assert here.artist.models() == []
    waiting.join(60)
    assert (pictures[0] == first).all() and here.unloads() == ["large:latest"] and here.card.lowest >= 0


def test_chat_that_was_sent_away_while_its_job_waited_gets_room_again(place):
    here, answers = place(15), []
    here.answer(model="large")
    waiting = threading.Thread(target=lambda: answers.append(here.answer(model="large")))
    with here.arbiter.turn("images"):
        waiting.start()  # its model is there
        eventually(lambda: here.arbiter.waiting, "the answer's place in the line")
        here.picture()
        assert here.chat.models() == []
    waiting.join(60)
    assert answers == ["the quick brown fox"] and here.artist.models() == [] and here.card.lowest >= 0
