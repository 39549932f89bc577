"""What the image executor does beyond one text and one picture: batches, other schedulers, pictures to start from, adapters, files."""
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

from colab_gpu.config import Settings
from colab_gpu.errors import ExecutionError, Interrupted, InvalidInput, InvalidPayload
from colab_gpu.images import ImageExecutor
from colab_gpu.jobs import ImagenRequest, LocalContext
from colab_gpu.pictures import replay_payload
from colab_gpu.schedulers import SCHEDULERS

SMALL = {"width": 256, "height": 256, "num_inference_steps": 5}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def artist(tiny):
    return executor(tiny)


def executor(model, **options):
    return ImageExecutor(str(model), settings=Settings(options.pop("settings", {}), environ={}), device="cpu", **options)


def job(prompt="a red lighthouse", ctx=None, **more):
    return {"prompt": prompt, "seed": 7, **SMALL, **more}, ctx or LocalContext()


def canceled_at(step, **options):
    ctx = LocalContext(**options)
    ctx.on_progress = lambda done, total: setattr(ctx, "stop", Interrupted("The job was canceled.") if done == step else None)
    return ctx


def pixels(ctx, name="image.png"):
    return np.asarray(Image.open(io.BytesIO(ctx.artifacts[name][0])), int)


def apart(one, other):
    return np.abs(np.asarray(one, int) - np.asarray(other, int)).max()


def as_url(image, format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return f"data:image/{format.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def calls_of(artist, monkeypatch):
    "How many pictures each call of the pipeline was for."
    sizes = []
    artist.preload()
    kind = type(next(iter(artist.shelf.loaded.values())).pipe)
    whole = kind.__call__

    def counted(self, *args, **kwargs):
        sizes.append(len(kwargs["prompt"]) if isinstance(kwargs["prompt"], list) else 1)
        return whole(self, *args, **kwargs)
    counted.__signature__ = __import__("inspect").signature(whole)
    monkeypatch.setattr(kind, "__call__", counted)
    return sizes


# ---- batches --------------------------------------------------------------------------------------------------------

def test_jobs_leased_together_share_a_call_and_look_as_alone(artist, monkeypatch):
    sizes = calls_of(artist, monkeypatch)
    jobs = [job(prompt, seed=seed, negative_prompt="fog") for prompt, seed in (("a red lighthouse", 7), ("a blue boat", 8), ("a hill", 9))]
    results = artist.run_batch(jobs)
    assert sizes == [3]
    for n, ((payload, ctx), result) in enumerate(zip(jobs, results, strict=True)):
        alone = LocalContext()
        single = artist.run(payload, alone)
        assert apart(pixels(ctx), pixels(alone)) <= 1
        assert (result["batch_size"], result["batch_index"]) == (3, n) and (single["batch_size"], single["batch_index"]) == (1, 0)
        facts = json.loads(Image.open(io.BytesIO(ctx.artifacts["image.png"][0])).text["colab-gpu"])
        assert (facts["batch_size"], facts["batch_index"], facts["seed"], facts["prompt"]) == (3, n, payload["seed"], payload["prompt"])
        assert ctx.steps[-5:] == [(step, 5, "running") for step in range(1, 6)]


def test_a_canceled_job_of_a_batch_ends_alone(artist):
    stays, goes = LocalContext(watched=True), canceled_at(2)
    kept, gone = artist.run_batch([job(ctx=stays), job("a boat", goes, seed=8)])
    assert isinstance(gone, Interrupted) and goes.steps[-1][0] == 2 and not goes.artifacts
    assert stays.steps[-1][0] == 5 and kept["seed"] == 7
    alone = LocalContext()
    artist.run(job()[0], alone)
    assert apart(pixels(stays), pixels(alone)) <= 1


def test_when_all_of_a_batch_are_canceled_it_stops_at_once(artist, monkeypatch):
    artist.preload()
    unet, steps = next(iter(artist.shelf.loaded.values())).pipe.unet, []
    whole = unet.forward
    monkeypatch.setattr(unet, "forward", lambda *args, **kwargs: (steps.append(1), whole(*args, **kwargs))[1])
    first, last = canceled_at(2), canceled_at(3)
    results = artist.run_batch([job(ctx=first), job("a boat", last)])
    assert all(isinstance(result, Interrupted) for result in results)
    assert (first.steps[-1][0], last.steps[-1][0]) == (2, 3)
    assert len(steps) == 4, "told at the end of the third step, the last job is asked at the end of the fourth; no further step is made"


def test_a_job_that_was_canceled_before_it_began_does_not_hold_up_the_others(artist, monkeypatch):
    sizes = calls_of(artist, monkeypatch)
    gone = LocalContext(stop=Interrupted("The job was canceled."))
    results = artist.run_batch([job(ctx=gone), job("a boat")])
    assert isinstance(results[0], Interrupted) and results[1]["prompt"] == "a boat" and sizes == [1] and not gone.steps


def test_a_bad_job_of_a_batch_fails_alone(artist):
    results = artist.run_batch([job(prompt=" "), job(), job(model="/etc"), job(init_image="data:image/png;base64,iVBORw0KGgo=")])
    assert [type(result) for result in results] == [InvalidPayload, dict, InvalidInput, InvalidInput]


def test_what_the_pipeline_refuses_of_a_batch_fails_alone(artist, monkeypatch):
    artist.preload()
    pipe = next(iter(artist.shelf.loaded.values())).pipe
    whole = pipe.encode_prompt

    def picky(prompt, *args, **kwargs):
        if "forbidden" in str(prompt): raise ValueError("this prompt cannot be encoded")
        return whole(prompt, *args, **kwargs)
    monkeypatch.setattr(pipe, "encode_prompt", picky, raising=False)
    results = artist.run_batch([job(), job("forbidden"), job("a boat")])
    assert [type(result) for result in results] == [dict, InvalidInput, dict]
    assert "this prompt cannot be encoded" in str(results[1])


def test_jobs_of_other_shapes_are_drawn_too(artist, monkeypatch):
    sizes = calls_of(artist, monkeypatch)
    results = artist.run_batch([job(), job(width=264), job("a boat"), job(num_inference_steps=6)])
    assert [result["width"] for result in results] == [256, 264, 256, 256] and sizes == [2, 1, 1]


def test_each_watched_job_of_a_batch_sees_its_own_picture(artist):
    one, other, unseen = LocalContext(watched=True), LocalContext(watched=True), LocalContext()
    artist.run_batch([job(ctx=one), job("a boat", other, seed=8), job("a hill", unseen)])
    assert len(one.previews) == len(other.previews) == 4 and not unseen.previews
    assert one.previews[-1] != other.previews[-1]


def test_several_pictures_of_one_job_are_seeded_in_a_row(artist):
    ctx = LocalContext()
    result = artist.run(job(num_images=3)[0], ctx)
    assert list(ctx.artifacts) == ["image.png", "image-2.png", "image-3.png"]
    assert [(picture["artifact"], picture["seed"]) for picture in result["images"]] == [("image.png", 7), ("image-2.png", 8), ("image-3.png", 9)]
    assert result["seed"] == 7
    alone = LocalContext()
    artist.run(job(seed=9)[0], alone)
    assert apart(pixels(ctx, "image-3.png"), pixels(alone)) <= 1
    drawn = artist.draw("a red lighthouse", seed=7, num_images=2, **SMALL)
    assert [d.meta["seed"] for d in (drawn, *drawn.siblings)] == [7, 8]


def test_pictures_that_take_several_calls_are_counted_through(tiny, monkeypatch):
    artist, ctx = executor(tiny), LocalContext()
    sizes = calls_of(artist, monkeypatch)
    next(iter(artist.shelf.loaded.values())).fits = 2 * 256 * 256
    artist.run(job(num_images=5)[0], ctx)
    assert sizes == [1] * 5, "a CPU begins with one at a time"
    assert [step[:2] for step in ctx.steps] == [(n, 25) for n in range(1, 26)]


def test_fifty_jobs_with_cancels_at_random(artist):
    import random
    dice, seen = random.Random(4), []
    todo = [job(f"picture {n}", canceled_at(dice.randrange(1, 9)), seed=n, num_inference_steps=5, width=dice.choice((256, 256, 264))) for n in range(50)]
    while todo:
        some, todo = todo[:8], todo[8:]
        seen += zip(some, artist.run_batch(some), strict=True)
    assert len(seen) == 50 and len({type(result) for _, result in seen}) == 2
    for (payload, ctx), result in seen:
        if isinstance(result, dict): assert ctx.artifacts and result["prompt"] == payload["prompt"] and ctx.steps[-1][0] == 5
        else: assert isinstance(result, Interrupted) and not ctx.artifacts and ctx.steps[-1][0] <= 5
    before = artist.run(job()[0], LocalContext())
    assert before["batch_size"] == 1


# ---- the payload ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def plain(artist):
    return artist.draw(job()[0])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_draws_and_is_gone_afterwards(artist, plain, name):
    own = next(iter(artist.shelf.loaded.values())).pipe.scheduler
    drawn = artist.draw(job(scheduler=name)[0])
    assert next(iter(artist.shelf.loaded.values())).pipe.scheduler is own
    assert drawn.meta["scheduler"] == name and f"Sampler: {SCHEDULERS[name].label}," in Image.open(io.BytesIO(drawn.png)).text["parameters"]
    if name != "ddim": assert drawn.image.tobytes() != plain.image.tobytes()


def test_after_all_these_schedulers_the_own_one_draws_as_before(artist, plain):
    assert artist.draw(job()[0]).image.tobytes() == plain.image.tobytes()


def test_the_own_scheduler_is_back_after_a_cancel(artist):
    artist.preload()
    own = next(iter(artist.shelf.loaded.values())).pipe.scheduler
    with pytest.raises(Interrupted): artist.run(job(scheduler="euler")[0], canceled_at(2))
    assert next(iter(artist.shelf.loaded.values())).pipe.scheduler is own


def test_clip_skip_changes_the_picture(artist):
    assert artist.draw(job(clip_skip=1)[0]).image.tobytes() != artist.draw(job()[0]).image.tobytes()


@pytest.mark.parametrize(("format", "kind"), [("jpeg", "JPEG"), ("jpg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_files_are_of_the_kind_that_was_asked_for(artist, format, kind):
    ctx = LocalContext()
    artist.run(job(output_format=format, quality=60)[0], ctx)
    [(name, (data, content_type))] = ctx.artifacts.items()
    assert (name, content_type, Image.open(io.BytesIO(data)).format) == (f"image.{kind.lower()}", f"image/{kind.lower()}", kind)


def test_the_interval_of_previews(artist):
    def seen(**more):
        ctx = LocalContext(watched=True)
        artist.run(job(num_inference_steps=20, **more)[0], ctx)
        return len(ctx.previews)
    assert (seen(preview_interval=0), seen(preview_interval=5), seen(preview_interval=1)) == (0, 3, 19)


def test_from_a_picture(artist):
    start = artist.draw(job()[0]).image
    barely, much = (artist.draw(job("a boat", seed=8, init_image=as_url(start), strength=strength)[0]) for strength in (0.01, 1))
    def distance(drawn): return np.abs(np.asarray(drawn.image, int) - np.asarray(start, int)).mean()
    assert distance(barely) < distance(much)
    assert barely.meta["strength"] == pytest.approx(0.2, abs=1e-3), "one step at least"
    assert artist.draw(job("a boat", seed=8, init_image=as_url(start), strength=1)[0]).image.tobytes() == much.image.tobytes()


def test_a_picture_to_start_from_brings_its_size(artist):
    start, ctx = Image.linear_gradient("L").resize((400, 300)), LocalContext()
    payload = {"prompt": "x", "num_inference_steps": 5, "init_image": as_url(start, "JPEG")}
    assert [artist.run({**payload, **more}, ctx)[side] for more in ({}, {"width": 256}) for side in ("width", "height")] == [400, 304, 256, 304]


def test_what_a_mask_keeps_is_kept_to_the_last_bit(artist):
    rng = np.random.default_rng(3)
    start = Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8))  # no decoder would give this noise back
    mask = Image.new("L", (256, 256))
    mask.paste(255, (64, 64, 192, 192))
    ctx = LocalContext()
    artist.run(job("a boat", init_image=as_url(start), mask_image=as_url(mask))[0], ctx)
    kept, drawn = np.asarray(mask) == 0, pixels(ctx)
    assert (drawn[kept] == np.asarray(start)[kept]).all()
    assert (drawn[~kept] != np.asarray(start)[~kept]).mean() > 0.5


@pytest.mark.parametrize(("field", "value", "sentence"), [
    ("init_image", "data:image/png;base64,iVBORw0KGgo=", "is damaged, or no picture"), ("scheduler", "magic", "There is no scheduler"),
    ("mask_image", as_url(Image.new("L", (8, 8))), "needs an `init_image`"), ("num_images", 9, "from 1 to 8"),
    ("loras", [{"id": "/etc/x"}], "must be a Hub id"), ("output_format", "gif", "png, jpeg or webp"), ("strength", 0.5, "needs an `init_image`"),
    ("num_image", 2, "did you mean `num_images`")])
def test_what_cannot_be_is_named(artist, field, value, sentence):
    with pytest.raises((InvalidPayload, ExecutionError), match=sentence) as e: artist.run(job(**{field: value})[0], LocalContext())
    assert e.value.field == field and "\n" not in str(e.value)


def test_a_family_that_cannot_start_from_a_picture_says_so(artist, monkeypatch):
    import diffusers
    monkeypatch.setattr(diffusers.AutoPipelineForImage2Image, "from_pipe", classmethod(lambda cls, pipe: (_ for _ in ()).throw(ValueError("no such"))))
    with pytest.raises(InvalidInput, match="tiny cannot start from a picture: leave `init_image` out, or take another model."):
        artist.draw(job(init_image=as_url(Image.new("RGB", (256, 256))))[0])


@pytest.mark.parametrize("size", [1, 3])
def test_the_same_picture_again_from_its_file(artist, size):
    jobs = [job(f"picture {n}", seed=n, scheduler="dpm++ 2m karras", clip_skip=1, negative_prompt="fog", guidance_scale=6.5) for n in range(size)]
    artist.run_batch(jobs)
    for _, ctx in jobs:
        again = artist.draw(replay_payload(ctx.artifacts["image.png"][0]))
        assert apart(again.image, pixels(ctx)) <= 1


def test_a_picture_from_a_picture_again(artist):
    start = base64.b64decode(as_url(Image.linear_gradient("L").convert("RGB")).partition(",")[2])
    drawn = artist.draw(job(init_image=base64.b64encode(start).decode(), strength=0.6)[0])
    assert artist.draw(replay_payload(drawn.png, {"init_image": start})).image.tobytes() == drawn.image.tobytes()
    with pytest.raises(InvalidPayload, match="was drawn from another one: give that with --init-image FILE"): replay_payload(drawn.png)


# ---- adapters -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def styles(tiny, tmp_path_factory):
    "A folder with two adapters for the tiny pipeline, made by the library that makes real ones."
    peft = pytest.importorskip("peft")
    from diffusers import AutoPipelineForText2Image, StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict
    folder = tmp_path_factory.mktemp("styles")
    for seed, name in enumerate(("bold", "thin")):
        unet = AutoPipelineForText2Image.from_pretrained(tiny).unet
        torch.manual_seed(seed)
        unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet), weight_name=f"{name}.safetensors")
    return folder


def test_adapters_bend_a_job_and_are_gone_after_it(tiny, styles):
    artist = executor(tiny, settings={"IMAGEN_LORA_FOLDER": str(styles)})
    plain = artist.draw(job()[0])
    def drawn(*loras): return artist.draw(job(loras=[{"id": name, "weight": weight} for name, weight in loras])[0]).image
    bold, weak, both, none = drawn(("bold", 1)), drawn(("bold", 0.2)), drawn(("bold", 1), ("thin", 1)), drawn(("bold", 0))
    assert apart(bold, plain.image) > apart(weak, plain.image) > 0 and apart(both, bold) > 0 and apart(none, plain.image) <= 1
    assert artist.draw(job()[0]).image.tobytes() == plain.image.tobytes()
    assert json.loads(Image.open(io.BytesIO(artist.draw(job(loras=["bold"])[0]).png)).text["colab-gpu"])["loras"] == [{"id": "bold", "weight": 1.0}]


def test_adapters_are_gone_after_a_cancel_too(tiny, styles):
    artist = executor(tiny, settings={"IMAGEN_LORA_FOLDER": str(styles)})
    plain = artist.draw(job()[0])
    with pytest.raises(Interrupted): artist.run(job(loras=["bold"])[0], canceled_at(2))
    assert artist.draw(job()[0]).image.tobytes() == plain.image.tobytes()


def test_an_adapter_that_does_not_fit_is_refused_in_a_sentence(tiny, styles, tmp_path):
    from safetensors.torch import save_file
    save_file({"nothing": torch.zeros(2)}, tmp_path / "odd.safetensors")
    artist = executor(tiny, settings={"IMAGEN_LORA_FOLDER": str(tmp_path)})
    plain = artist.draw(job()[0])
    with pytest.raises(ExecutionError) as e: artist.run(job(loras=["odd"])[0], LocalContext())
    assert "odd" in str(e.value) and str(tmp_path) not in str(e.value) and "\n" not in str(e.value)
    assert artist.draw(job()[0]).image.tobytes() == plain.image.tobytes()


def test_settings_and_defaults_of_the_request_stay_the_references():
    assert ImagenRequest.parse({"prompt": "x"}) == ImagenRequest("x")
