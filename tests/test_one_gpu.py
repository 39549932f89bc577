"""One GPU for both: real Diffusers and a daemon in a process of its own take turns on a card in miniature, on which both do not fit."""

import io
import random
import shutil
import threading
import weakref

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("ollama")

import numpy as np
import torch
from card import Card, Scarce, Watched
from conftest import TOKEN
from PIL import Image
from processes import eventually, seen

from colab_gpu.chat import ChatExecutor, Ollama
from colab_gpu.client import Client
from colab_gpu.config import Settings
from colab_gpu.errors import Interrupted, OutOfMemory
from colab_gpu.images import ImageExecutor, Pace
from colab_gpu.jobs import LocalContext
from colab_gpu.models import find_model
from colab_gpu.pictures import replay_payload
from colab_gpu.pipelines import weight_bytes
from colab_gpu.runs import Run
from colab_gpu.worker import Worker

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
        card.shelf = self.artist.shelf
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
    eventually(lambda: here.card.free_bytes() == here.card.total, "the last memory")
    assert not len(here.card.parts)


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


def canceled_at(step):
    ctx = LocalContext()
    ctx.on_progress = lambda done, total: setattr(ctx, "stop", Interrupted("The job was canceled.") if done == step else None)
    return ctx


def test_what_a_picture_left_behind_does_not_keep_its_model_from_leaving(place):
    "As long as a worker is reporting how a job ended, the exception is there; its frames must not hold the pipeline."
    here, ends = place(15, timeout_s=2), []
    first = here.picture()
    for ctx, more in ((canceled_at(2), {}), (LocalContext(), {"clip_skip": 11})):  # more layers than the model has
        ends += here.artist.run_batch([({"prompt": "x", "seed": 7, **SMALL, **more}, ctx)])
        assert here.answer(model="large") and here.card.images_bytes() == 0 and not here.arbiter.said
        assert (here.picture() == first).all()
    assert [type(end).__name__ for end in ends] == ["Interrupted", "Transient"] and here.card.lowest >= 0


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


# ---- the warm family goes first, for a bounded time -----------------------------------------------------------------

class Line:
    "Two that draw picture after picture, so that one of them is always waiting; each picture takes ten seconds of the arbiter's clock."
    def __init__(self, here, now):
        self.here, self.now, self.drawn, self.while_chat_waited, self.over = here, now, 0, 0, threading.Event()
        self.threads = [threading.Thread(target=self.draw, args=(n,), daemon=True) for n in range(2)]

    def draw(self, n):
        while not self.over.is_set():
            ctx = LocalContext()
            ctx.on_progress = lambda step, total: step == 1 and self.first_step()
            self.here.picture(n, ctx)

    def first_step(self):
        eventually(lambda: self.over.is_set() or "images" in self.families(), "the other's place in the line")
        self.drawn, self.while_chat_waited = self.drawn + 1, self.while_chat_waited + ("chat" in self.families())
        self.now[0] += 10
        if self.while_chat_waited > 20: self.over.set()  # it would never end

    def families(self): return [family for family, _ in list(self.here.arbiter.waiting)]


def test_the_warm_family_is_preferred_only_for_a_bounded_time(place):
    now = [0.0]
    here = place(15, prefer_s=45, clock=lambda: now[0])
    first, line = here.picture(0), Line(here, now)
    for thread in line.threads: thread.start()
    eventually(lambda: line.drawn, "the first picture")
    assert here.answer("hello", model="large") == "hello"
    line.over.set()
    for thread in line.threads: thread.join(60)
    assert line.while_chat_waited == 5, "pictures of ten seconds each, for the warm family may go first for 45"
    assert here.unloads()[:1] == ["large:latest"] and (here.picture(0) == first).all(), "and back"
    assert here.card.lowest >= 0 and not here.arbiter.waiting and here.arbiter.owner is None


# ---- memory that runs out although both seemed to fit ---------------------------------------------------------------

ALONE = "Memory ran out: chat left it."
SLICED = "Memory ran out: decoding in slices and tiles."
AWAY = "Memory ran out: parts of the model wait in the machine's own memory until they compute."


@pytest.fixture
def crowded(place, monkeypatch):
    "A picture was drawn and a small chat model answered: both are there. `scarce(enough, where)` limits the memory; its calls."
    here = place(15)
    here.plain = here.picture()
    here.answer()
    here.model = next(iter(here.artist.shelf.loaded.values()))
    whole = here.model.pipe.enable_model_cpu_offload
    monkeypatch.setattr(here.model.pipe, "enable_model_cpu_offload", lambda device: whole(device="cpu"))  # the hooks are real, the card isn't
    here.scarce = lambda enough, where="unet", patch=monkeypatch: Scarce(here.model, patch, enough, where)
    return here


def batch(here, count=4):
    jobs = [({"prompt": "a red circle on a blue background", "seed": 7 + n, **SMALL}, LocalContext()) for n in range(count)]
    return here.artist.run_batch(jobs), [ctx for _, ctx in jobs]


def pixels(ctx): return np.asarray(Image.open(io.BytesIO(ctx.artifacts["image.png"][0])), int)


def test_first_chat_leaves_and_nothing_else_is_given_up(crowded):
    scarce = crowded.scarce(lambda model, n: crowded.card.chat_bytes() == 0)
    results, contexts = batch(crowded)
    assert [result["batch_size"] for result in results] == [4] * 4 and contexts[0].logs == [ALONE] and len(scarce.calls) == 1 + 5
    assert crowded.unloads() == ["small:latest"] and (crowded.model.rung, crowded.model.fits) == (0, None)
    assert abs(pixels(contexts[0]) - crowded.plain).max() <= 1
    assert crowded.answer() and crowded.chat.models() == ["small:latest"] and crowded.card.loads == ["twin"], "and comes back beside it"


def test_then_each_rung_of_the_ladder_in_turn(crowded):
    "Four pictures at once, beside chat, with memory that suffices for none of it until everything was tried."
    crowded.model.device = "cuda"
    tried = crowded.scarce(lambda model, n: crowded.card.chat_bytes() == 0 and n <= 2 and model.pipe.vae.use_tiling and model.offloaded)
    results, contexts = batch(crowded)
    assert contexts[0].logs == [ALONE, "Memory ran out: 2 at a time instead of 4.", "Memory ran out: 1 at a time instead of 2.", SLICED, AWAY]
    assert tried.calls == [8, 8, 4, 2, 2] + [2] * 5 * 4, "guidance doubles what the denoiser sees"
    assert [result["seed"] for result in results] == [7, 8, 9, 10] and all(ctx.steps[-1][0] == ctx.steps[-1][1] for ctx in contexts)
    assert abs(pixels(contexts[0]) - crowded.plain).max() <= 1 and crowded.artist.held_bytes() == 0
    assert crowded.answer() and crowded.chat.models() == ["small:latest"]
    assert abs(crowded.picture() - crowded.plain).max() <= 1 and crowded.unloads() == ["small:latest"] * 2, "beside chat it would not fit this time either"


def test_the_decoder_is_the_one_that_runs_out(crowded):
    crowded.scarce(lambda model, n: n <= 1 and model.pipe.vae.use_slicing, where="vae")
    _, contexts = batch(crowded, 2)
    assert contexts[0].logs == [ALONE, "Memory ran out: 1 at a time instead of 2.", SLICED] and abs(pixels(contexts[0]) - crowded.plain).max() <= 1


def test_then_it_says_what_would_fit_and_both_go_on(crowded, monkeypatch):
    crowded.model.device = "cuda"
    with monkeypatch.context() as patch:
        crowded.scarce(lambda model, n: False, patch=patch)
        results, contexts = batch(crowded, 2)
        assert [str(result) for result in results] == ["256×256 pixels with twin need more memory than cuda has: take a smaller model."] * 2
        assert all(isinstance(result, OutOfMemory) for result in results) and contexts[0].logs == [ALONE, "Memory ran out: 1 at a time instead of 2.", SLICED, AWAY]
        assert not any(ctx.artifacts for ctx in contexts)
    assert abs(crowded.picture() - crowded.plain).max() <= 1 and crowded.answer() == "the quick brown fox" and crowded.arbiter.owner is None


def test_chat_that_does_not_leave_is_asked_once_and_the_ladder_goes_on(crowded):
    crowded.ollama.unload_s = 0.1
    crowded.answer("[stuck] hello")
    crowded.scarce(lambda model, n: model.pipe.vae.use_tiling)
    ctx = LocalContext()
    assert abs(crowded.picture(ctx=ctx) - crowded.plain).max() <= 1
    assert ctx.logs == [SLICED] and crowded.unloads() == ["small:latest"] and "small:latest was asked to leave the GPU, and has not" in crowded.arbiter.said[0]


def test_loading_that_runs_out_goes_on_without_chat_and_without_its_first_try(place, monkeypatch):
    from colab_gpu import pipelines
    here, whole, kept = place(15), pipelines._arrange, []
    here.answer()

    def arrange(pipe, device, compiled):
        kept.append([weakref.ref(part) for part in (pipe.unet, pipe.vae, pipe.text_encoder)])
        assert not any(ref() for ref in kept[-2]) if len(kept) > 1 else True, "what was loaded so far is still there"
        if here.card.chat_bytes(): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        whole(pipe, device, compiled)
    monkeypatch.setattr(pipelines, "_arrange", arrange)
    here.picture()
    assert len(kept) == 2 and here.unloads() == ["small:latest"]
    here.artist.unload()
    monkeypatch.setattr(here.card, "chat_bytes", lambda: 1)
    with pytest.raises(OutOfMemory, match="twin does not fit into the memory of this machine: take a smaller model"): here.picture()
    assert len(kept) == 3 and here.artist.models() == [] and here.arbiter.owner is None


def test_coming_back_to_the_device_goes_on_without_chat(crowded, monkeypatch):
    crowded.model.away, whole = True, crowded.model.pipe.to

    def to(device):
        if crowded.card.chat_bytes(): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return whole(device)
    monkeypatch.setattr(crowded.model.pipe, "to", to)
    assert (crowded.picture() == crowded.plain).all() and crowded.unloads() == ["small:latest"] and crowded.card.loads == ["twin"]


def test_a_chat_model_that_does_not_fit_after_all_is_tried_without_the_pictures(place):
    here, ctx = place(15), LocalContext()
    first = here.picture()
    assert here.chat.run({"prompt": "hello [oom=1]"}, ctx)["response"] == "hello"
    assert ctx.logs == ["Memory ran out: images left it."] and here.artist.models() == [] and here.card.images_bytes() == 0
    with pytest.raises(OutOfMemory, match="take a smaller model"): here.chat.run({"prompt": "[oom]"}, ctx)
    assert (here.picture() == first).all() and not here.arbiter.said


def test_a_model_whose_parts_wait_elsewhere_is_not_asked_to_leave(crowded):
    crowded.model.device = "cuda"
    crowded.scarce(lambda model, n: model.offloaded)
    crowded.picture()
    crowded.picture(model="demo")
    crowded.artist.leave(1 << 60)
    assert crowded.artist.models() == ["twin"] and crowded.model.offloaded and not crowded.model.away, "nothing of it was there, and the next time would run out again"


# ---- fifty jobs, canceled at random -----------------------------------------------------------------------------------

class Ordered:
    "A job of the fifty: what is asked, when it is to be canceled (`never`, `before` a worker has it, while it is `running`, near its `end`)."
    def __init__(self, n, rand):
        self.n, self.tool, self.cancel, self.states = n, ("imagenGenerate", "ollamaChat")[n % 2], "never", []
        self.watching = False
        if n % 10 < 4: self.cancel = ("before", "running", "end")[n // 10 % 3] if n % 10 < 2 else rand.choice(("before", "running", "end", "never"))
        self.payload = self.picture(rand) if n % 2 == 0 else self.talk(rand)

    def picture(self, rand):
        "Two models; two sizes of job, so that some can share a call and some cannot."
        steps = {"running": 40}.get(self.cancel, rand.choice((5, 5, 6)))
        return {"prompt": f"picture {self.n}: a {rand.choice(('red', 'green', 'blue'))} circle", "seed": 1000 + self.n, "width": 256, "height": 256,
                "num_inference_steps": steps, "guidance_scale": 1.0, **({"scheduler": "euler"} if steps == 6 else {}), **rand.choice(({}, {}, {"model": "demo"}))}

    def talk(self, rand):
        "Two models; one that is to be canceled while it runs never ends by itself."
        self.words = " ".join(rand.choice(("ay", "bee", "cee", "dee")) for _ in range(rand.randrange(2, 9)))
        steer = {"running": "[hold]", "end": "[rate=40]"}.get(self.cancel, "")
        return {"prompt": f"answer {self.n} {self.words} {steer}".strip(), "model": rand.choice(("small", "small", "large"))}

    def follow(self, url, job):
        "Watch, and cancel at the right moment."
        client = Client(url, "")
        for event in client.events(job.id):
            self.watching = True
            if event.kind == "done" or (event.kind == "state" and event.id): self.states.append(event.data["status"] if event.kind == "state" else "done")
            if self.cancel not in ("running", "end"): continue
            step, total = (event.data.get(name) or 0 for name in ("step", "total")) if event.kind == "progress" else (0, 0)
            begun = "[hold]" in self.payload["prompt"] and event.kind == "state" and event.data["status"] == "leased"
            late = event.kind == "token" or (step and event.data["phase"] == "running" and step >= total - 1)
            if begun or late or (self.cancel == "running" and step >= 2): client.cancel(job.id)


@pytest.fixture
def shift(place, serve, tmp_path, monkeypatch):
    "The place with a queue server in a process of its own, and two workers that serve both tools on one arbiter."
    whole, late = Run.progress, []

    def progress(run, step, total, **more):  # however busy the machine is, the cancel of a picture of forty steps comes before its end
        whole(run, step, total, **more)
        if run.grant.job["payload"].get("num_inference_steps") != 40: return
        if step == 20: eventually(lambda: run.why, "the cancel")
        if step > 20: late.append(step)
    monkeypatch.setattr(Run, "progress", progress)
    here, server = place(15, prefer_s=1), serve()
    own = {"STACK_API_BASE": server.url, "STACK_WORKER_TOKEN": TOKEN, "WORKER_WAIT_SECONDS": 2, "POLL_INTERVAL": 0.05, "WORKER_MAX_BATCH": 4,
           "COLAB_GPU_DATA": str(tmp_path / "worker")}
    here.server, here.client = server, Client(server.url, "")
    here.workers = [Worker([here.artist, here.chat], Settings({**own, "WORKER_ID": name}, environ={}), log=None) for name in ("left", "right")]
    for name in (here.artist.model_id, find_model("demo").location): here.artist.paces[name] = Pace(4)
    yield here
    assert not late, "steps that were drawn after the cancel"
    ended = [worker.stop() for worker in here.workers]
    assert all(ended)


def test_fifty_mixed_jobs_with_cancels_at_random(shift, twin):
    rand, client = random.Random(4), shift.client
    orders = [Ordered(n, rand) for n in range(50)]
    rand.shuffle(orders)
    shift.artist.preload()
    shift.scheduler = type(next(iter(shift.artist.shelf.loaded.values())).pipe.scheduler)
    jobs = [client.submit(order.tool, order.payload) for order in orders]
    watchers = [threading.Thread(target=order.follow, args=(shift.server.url, job), daemon=True) for order, job in zip(orders, jobs, strict=True)]
    for thread in watchers: thread.start()
    for order, job in zip(orders, jobs, strict=True):
        if order.cancel == "before": eventually(lambda order=order: order.watching, "its watcher") and client.cancel(job.id)
    for worker in shift.workers: worker.start()
    for job in jobs: job.wait(120)
    for thread in watchers: thread.join(60)
    assert_each_ended_once(shift, orders, jobs)
    assert_clean(shift)
    last = [client.submit("imagenGenerate", {"prompt": "after", "seed": 1, **SMALL}), client.submit("ollamaChat", {"prompt": "after"})]
    assert [job.wait(60).status for job in last] == ["completed"] * 2, "and both are served as before"
    assert_pictures_are_their_own(shift, orders, jobs, twin)


def assert_each_ended_once(here, orders, jobs):
    path = here.server.data / "logs" / "gpu_job_history.md"
    eventually(lambda: all(job.id in path.read_text() for job in jobs), "the history's last row")
    assert [path.read_text().count(f"| {job.id} |") for job in jobs] == [1] * len(jobs)
    for order, job in zip(orders, jobs, strict=True):
        assert order.states[-2:] == [job.status, "done"] and not {"completed", "failed", "canceled", "done"} & set(order.states[:-2]), (order.n, order.states)
        assert job.status in {"never": ["completed"], "end": ["completed", "canceled"]}.get(order.cancel, ["canceled"]), (order.n, order.cancel, job)
        assert job.data["attempts"] == (0 if order.cancel == "before" else 1), (order.n, job.data)
        if order.tool == "ollamaChat" and job.status == "completed": assert job.result["response"] == f"answer {order.n} {order.words}"
    assert {job.status for job in here.client.jobs(limit=200)} == {"completed", "canceled"}


def assert_pictures_are_their_own(here, orders, jobs, twin):
    "What each picture's own file tells is what its job asked, and it is as when drawn alone; what a canceled job left is its own too."
    alone, sizes = ImageExecutor(str(twin), device="cpu", settings=Settings(environ={})), set()
    for order, job in zip(orders, jobs, strict=True):
        for artifact in job.artifacts:
            facts = replay_payload(data := here.client.artifact(job.id, artifact["name"]))
            assert (facts["seed"], facts["prompt"]) == (order.payload["seed"], order.payload["prompt"]) and order.cancel != "before"
        assert bool(job.artifacts) >= (order.tool == "imagenGenerate" and job.status == "completed")
        if order.tool != "imagenGenerate" or job.status != "completed": continue
        sizes.add(job.result["batch_size"])
        single = np.asarray(alone.draw(order.payload).image, int)
        assert np.abs(np.asarray(Image.open(io.BytesIO(data)), int) - single).max() <= 1, (order.n, job.result)
    files = {path.parent.parent.name for path in (here.server.data / "artifacts").rglob("*.*")}
    never = {job.id for order, job in zip(orders, jobs, strict=True) if order.cancel == "before" or order.tool == "ollamaChat"}
    assert max(sizes) > 1 and len(files) > 1 and not files & never


def assert_clean(here):
    "Nothing is under way, nothing was left on the pipelines, and when both leave, the card is empty."
    eventually(lambda: seen(here.card.url)["busy"] == 0 and not any(worker.runs for worker in here.workers), "the end of all runs")
    assert here.arbiter.owner is None and not here.arbiter.waiting and here.card.lowest >= 0 and not here.arbiter.said
    assert {"images", "chat"} == set(here.arbiter.turns) and here.unloads() and len(here.card.loads) > 1, "they did switch"
    for model in here.artist.shelf.loaded.values():
        parts = [part for part in model.pipe.components.values() if hasattr(part, "parameters")]
        assert type(model.pipe.scheduler) is here.scheduler and not any(hasattr(part, "_hf_hook") for part in parts)
        assert (model.rung, model.fits, model.away, model.offloaded) == (0, None, False, False) and "text_model" not in vars(model.pipe.text_encoder)
    assert here.card.images_bytes() == here.artist.held_bytes()
    eventually(lambda: here.card.chat_bytes() == here.chat.held_bytes(), "the memory of the last that left")
    model = parts = None  # the test's own
    here.artist.leave(1 << 60)
    here.chat.leave(1 << 60)
    eventually(lambda: here.card.free_bytes() == here.card.total, "the last memory")
    assert not len(here.card.parts)
