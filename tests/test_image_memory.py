"""What the image executor does with memory: less before nothing, models that come and go, and the other tenant of the GPU."""
import contextlib
import io

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import numpy as np
import torch
from card import Scarce
from PIL import Image

from colab_gpu import painting
from colab_gpu.config import Settings
from colab_gpu.errors import ExecutionError, Interrupted, OutOfMemory
from colab_gpu.images import ImageExecutor, Pace
from colab_gpu.jobs import LocalContext
from colab_gpu.models import KNOWN, find_model, image_defaults, known_model
from colab_gpu.pipelines import held_bytes, load_pipeline, tiny_pipeline, weight_bytes

SMALL = {"width": 256, "height": 256, "num_inference_steps": 5}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [tiny_pipeline(folder / name, seed=seed) for seed, name in enumerate(("one", "two", "three"))]


@pytest.fixture
def artist(models):
    return executor(models[0])


def executor(model, **options):
    return ImageExecutor(str(model), settings=Settings(options.pop("settings", {}), environ={}), device="cpu", **options)


def model_of(artist):
    artist.preload()
    return next(iter(artist.shelf.loaded.values()))


def job(seed=7, **more):
    return {"prompt": f"picture {seed}", "seed": seed, **SMALL, **more}, LocalContext()


def image(ctx):
    return np.asarray(Image.open(io.BytesIO(ctx.artifacts["image.png"][0])), int)


# ---- the ladder -----------------------------------------------------------------------------------------------------

def test_first_the_batch_is_halved(artist, monkeypatch):
    model = model_of(artist)
    alone = [artist.run(*(one := job(seed))) and image(one[1]) for seed in range(5)]
    scarce = Scarce(model, monkeypatch, lambda model, n: n <= 2 * 2)  # guidance doubles what the denoiser sees: two pictures fit
    jobs = [job(seed) for seed in range(5)]
    results = artist.run_batch(jobs)
    assert [result["batch_size"] for result in results] == [2, 2, 2, 2, 1]
    for (_, ctx), single in zip(jobs, alone, strict=True):
        assert np.abs(image(ctx) - single).max() <= 1
        assert ctx.steps[-1][0] == ctx.steps[-1][1]
    assert "Memory ran out: 2 at a time instead of 5." in jobs[0][1].logs
    assert artist.batch_size() <= 2 and model.rung == 0
    scarce.calls.clear()
    artist.run_batch([job(seed) for seed in range(4)])
    assert max(scarce.calls) == 4, "what did not fit once is not tried again"


def test_then_it_decodes_in_slices_and_tiles(artist, monkeypatch):
    model = model_of(artist)
    plain = job()
    artist.run(*plain)
    Scarce(model, monkeypatch, lambda model, n: model.pipe.vae.use_tiling and model.pipe.vae.use_slicing, "vae")
    payload, ctx = job()
    result = artist.run(payload, ctx)
    assert ctx.logs == ["Memory ran out: decoding in slices and tiles."] and model.rung == 1
    assert np.abs(image(ctx) - image(plain[1])).max() <= 1 and result["batch_size"] == 1
    again = job()
    artist.run(*again)
    assert not again[1].logs, "it stays so"


def test_then_parts_wait_elsewhere(artist, monkeypatch):
    model = model_of(artist)
    plain = job()
    artist.run(*plain)
    model.device, whole = "cuda", model.pipe.enable_model_cpu_offload
    monkeypatch.setattr(model.pipe, "enable_model_cpu_offload", lambda device: whole(device="cpu"))  # the hooks are real, the card isn't
    scarce = Scarce(model, monkeypatch, lambda model, n: model.offloaded)
    payload, ctx = job()
    artist.run(payload, ctx)
    assert ctx.logs == ["Memory ran out: decoding in slices and tiles.",
                        "Memory ran out: parts of the model wait in the machine's own memory until they compute."]
    assert len(scarce.calls) == 2 + 5 and hasattr(model.pipe.text_encoder, "_hf_hook") and np.abs(image(ctx) - image(plain[1])).max() <= 1
    assert artist.held_bytes() == 0
    with pytest.raises(Interrupted): artist.run(job()[0], _canceled_at(2))
    after = job()
    artist.run(*after)
    assert np.abs(image(after[1]) - image(plain[1])).max() <= 1


def _canceled_at(step):
    ctx = LocalContext()
    ctx.on_progress = lambda done, total: setattr(ctx, "stop", Interrupted("The job was canceled.") if done == step else None)
    return ctx


def test_then_it_says_what_would_fit_and_the_next_job_runs(artist, monkeypatch):
    model = model_of(artist)
    with monkeypatch.context() as patch:
        Scarce(model, patch, lambda model, n: False)
        results = artist.run_batch([job(1, width=512, height=768), job(2, width=512, height=768)])
    for result in results:
        assert isinstance(result, OutOfMemory) and result.kind == "oom"
        assert str(result) == "512×768 pixels with one need more memory than cpu has: ask for 256×384."
    assert artist.run(*job())["model"] == "one"


def test_all_pictures_of_a_job_come_after_a_halving(artist, monkeypatch):
    Scarce(model_of(artist), monkeypatch, lambda model, n: n <= 2 * 2)
    artist.paces[model_of(artist).source.location] = Pace(8)
    payload, ctx = job(num_images=7)
    result = artist.run(payload, ctx)
    assert [picture["seed"] for picture in result["images"]] == list(range(7, 14)) and ctx.steps[-1][0] == ctx.steps[-1][1]


# ---- models that come and go ----------------------------------------------------------------------------------------

def test_two_models_take_turns_under_a_card_that_holds_one(models):
    size = held_bytes(load_pipeline(find_model(str(models[0])), device="cpu"))
    card = 15 * size // 10
    artist = executor(models[0], free=lambda device: card - artist.held_bytes())
    first = artist.draw("x", seed=7, **SMALL).png
    for _ in range(2):
        other = artist.draw({"prompt": "x", "model": str(models[1]), "seed": 7, **SMALL})
        assert artist.models() == ["two"] and artist.held_bytes() <= card and other.png != first
        assert artist.draw("x", seed=7, **SMALL).png == first and artist.models() == ["one"]


def test_what_fits_stays_warm(models):
    size = held_bytes(load_pipeline(find_model(str(models[0])), device="cpu"))
    artist = executor(models[0], free=lambda device: size * 5 // 2 - artist.held_bytes())
    for model in (0, 1, 0, 2): artist.preload(str(models[model]))
    assert artist.models() == ["one", "three"], "the one that was not used for longest went"


def test_when_loading_runs_out_of_memory_the_others_go_first(models, monkeypatch):
    from colab_gpu import images
    artist, whole = executor(models[0], free=lambda device: None), images.load_pipeline
    artist.preload()

    def short(source, **options):
        if artist.models(): raise OutOfMemory("two does not fit into the memory of this machine.")
        return whole(source, **options)
    monkeypatch.setattr(images, "load_pipeline", short)
    artist.preload(str(models[1]))
    assert artist.models() == ["two"]


def test_sizes_are_known_before_a_model_is_loaded(models):
    source = find_model(str(models[0]))
    assert weight_bytes(source, "float32") == pytest.approx(held_bytes(load_pipeline(source, device="cpu")), rel=0.02)
    assert weight_bytes(source, "float16") == weight_bytes(source, "float32") / 2
    assert executor(models[0]).shelf.needs(find_model("black-forest-labs/FLUX.1-dev")) == 64 << 30


class OneAtATime:
    "The smallest arbiter: it remembers who asked for what."

    def __init__(self): self.holders, self.turns = [], []
    def join(self, holder): self.holders.append(holder)

    @contextlib.contextmanager
    def turn(self, family, need_bytes=0, check=lambda: None):
        check()
        self.turns.append((family, need_bytes() if callable(need_bytes) else need_bytes))
        yield


def test_every_drawing_and_loading_waits_for_a_turn(models):
    arbiter = OneAtATime()
    artist = executor(models[0], arbiter=arbiter)
    assert arbiter.holders == [artist] and artist.family == "images"
    artist.draw("x", **SMALL)
    artist.draw("x", **SMALL)
    artist.preload(str(models[1]))
    need = weight_bytes(find_model(str(models[0])), "float32")
    assert arbiter.turns == [("images", need), ("images", 0), ("images", need)]


def test_a_job_canceled_while_it_waits_for_the_gpu_does_not_begin(models):
    class Busy(OneAtATime):
        @contextlib.contextmanager
        def turn(self, family, need_bytes=0, check=lambda: None):
            ctx.stop = Interrupted("The job was canceled.")
            check()
            pytest.fail("It went on waiting.")
            yield
    ctx, artist = LocalContext(), executor(models[0], arbiter=Busy())
    with pytest.raises(Interrupted): artist.run({"prompt": "x"}, ctx)
    assert artist.models() == []


def test_it_leaves_what_is_asked_for_and_comes_back(models):
    artist = executor(models[0])
    before = artist.draw("x", seed=7, **SMALL).png
    artist.preload(str(models[1]))
    held = artist.held_bytes()
    artist.leave(1)
    assert artist.models() == ["two"] and 0 < artist.held_bytes() < held
    artist.leave(1 << 60)
    assert artist.models() == [] and artist.held_bytes() == 0
    assert artist.draw("x", seed=7, **SMALL).png == before


def test_on_a_card_models_wait_in_the_machines_own_memory(models, monkeypatch):
    artist = executor(models[0])
    model = model_of(artist)
    model.device, moved = "cuda", []
    monkeypatch.setattr(model.pipe, "to", lambda where: moved.append(where))
    artist.leave(1 << 60)
    assert (artist.models(), artist.held_bytes(), moved) == (["one"], 0, ["cpu"])
    model.device = "cpu"
    assert artist.shelf.needs(model.source) == model.size > 0
    assert artist.run(*job())["load_ms"] == 0 and moved == ["cpu", "cpu"] and artist.held_bytes() == model.size


def test_a_model_that_is_half_moved_away_is_dropped(models, monkeypatch):
    "Half of it on the card and half not, it could not draw any more, and nobody would load it anew."
    artist = executor(models[0])
    before = artist.draw("x", seed=7, **SMALL).png
    model = model_of(artist)
    model.device = "cuda"

    def to(where):
        model.pipe.unet.to(torch.float64)  # as good as elsewhere
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(model.pipe, "to", to)
    artist.leave(1 << 60)
    assert (artist.models(), artist.held_bytes()) == ([], 0)
    assert artist.draw("x", seed=7, **SMALL).png == before


# ---- known models ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "steps", "guidance", "side", "least"), [
    ("runwayml/stable-diffusion-v1-5", 25, 7.0, 512, 5), ("stabilityai/sdxl-turbo", 4, 0.0, 512, 1), ("SimianLuo/LCM_Dreamshaper_v7", 4, 8.0, 768, 1),
    ("stabilityai/stable-diffusion-3-medium-diffusers", 28, 7.0, 1024, 5), ("black-forest-labs/FLUX.1-schnell", 4, 0.0, 1024, 1),
    ("Tongyi-MAI/Z-Image-Turbo", 8, 0.0, 1024, 1), ("demo", 25, 2.0, 256, 5), ("stabilityai/stable-diffusion-xl-base-1.0", 30, 5.0, 1024, 5)])
def test_known_models_draw_as_their_makers_meant(name, steps, guidance, side, least):
    wanted = image_defaults(Settings(environ={}), known_model(find_model(name)))
    assert (wanted.steps, wanted.guidance_scale, wanted.width, wanted.height, wanted.min_steps) == (steps, guidance, side, side, least)
    assert wanted.max_side >= side and wanted.max_steps == 50


def test_a_request_that_names_nothing_gets_what_the_model_wants(models, monkeypatch):
    from colab_gpu import models as known
    monkeypatch.setitem(known.KNOWN, "demo", KNOWN["stabilityai/sdxl-turbo"])
    monkeypatch.setattr(known, "_demo", lambda: known.ModelSource("demo", str(models[0]), True))
    result = executor("demo").run({"prompt": "x", "width": 256, "height": 256}, LocalContext())
    assert (result["num_inference_steps"], result["guidance_scale"]) == (4, 0.0)
    assert executor("demo").run({"prompt": "x", "num_inference_steps": 1, "width": 256, "height": 256}, LocalContext())["num_inference_steps"] == 1
    told = executor("demo", settings={"IMAGEN_STEPS": 3, "IMAGEN_WIDTH": 264, "IMAGEN_HEIGHT": 256}).run({"prompt": "x"}, LocalContext())
    assert (told["num_inference_steps"], told["width"], told["height"]) == (3, 264, 256), "the owner's settings outrank the table"


# ---- previews -------------------------------------------------------------------------------------------------------

def test_a_tiny_decoder_on_the_disk_makes_the_previews(artist, tmp_path, monkeypatch):
    from diffusers import AutoencoderTiny
    torch.manual_seed(0)
    AutoencoderTiny(encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8), num_encoder_blocks=(1, 1, 1, 1),
                    num_decoder_blocks=(1, 1, 1, 1)).save_pretrained(tmp_path / "taesd")
    def previews():
        ctx = LocalContext(watched=True)
        artist.run(job()[0], ctx)
        assert all(len(data) <= 1 << 16 and max(Image.open(io.BytesIO(data)).size) == 256 for data in ctx.previews)
        return ctx.previews
    linear = previews()
    model_of(artist).sketch = None
    monkeypatch.setitem(painting.TINY_DECODERS, (4, 0.18215), str(tmp_path / "taesd"))
    decoded = previews()
    assert len(decoded) == len(linear) == 4 and decoded != linear


@pytest.mark.parametrize(("channels", "scale", "shift"), [(4, 0.18215, None), (4, 0.13025, None), (16, 1.5305, 0.0609), (16, 0.3611, 0.1159), (4, 1.0, None)])
def test_the_projection_finds_the_colours_of_every_family(channels, scale, shift):
    "With an encoder whose latents are known mixtures of the colours, the fitted projection gives those back."
    class Encoded:
        def __init__(self, mean): self.latent_dist = type("Dist", (), {"mean": mean})()

    class Mixing:
        dtype, device = torch.float32, torch.device("cpu")
        config = type("Config", (), {"latent_channels": channels, "scaling_factor": scale, "shift_factor": shift, "force_upcast": False})()
        mixture = torch.randn(channels, 3, generator=torch.Generator().manual_seed(channels))

        def encode(self, picture):
            small = torch.nn.functional.interpolate(picture, scale_factor=1 / 8, mode="area")
            return Encoded(torch.einsum("cr,brhw->bchw", self.mixture, small))
    pipe = type("Pipe", (), {"vae": Mixing()})()
    picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    latents = (pipe.vae.encode(picture * 2 - 1).latent_dist.mean - (shift or 0)) * scale
    seen = painting.make_sketch(pipe)(latents)
    wanted = torch.nn.functional.interpolate(picture, scale_factor=1 / 8, mode="area")[0]
    assert (seen - wanted).abs().max() < 0.02


def test_packed_latents_are_unpacked(artist):
    model = model_of(artist)
    latents = torch.randn(2, 4, 32, 32)
    packed = latents.reshape(2, 4, 16, 2, 16, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 256, 16)  # as Flux keeps them
    pipe = type("Flux", (), {"vae_scale_factor": 8, "_unpack_latents": staticmethod(
        lambda z, height, width, factor: z.view(z.shape[0], 16, 16, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(z.shape[0], 4, 32, 32))})()
    request = painting.ImagenRequest("x", width=256, height=256)
    assert painting.preview_of(model, pipe, packed, 1, request) == painting.preview_of(model, model.pipe, latents, 1, request)


# ---- loading --------------------------------------------------------------------------------------------------------

def test_compiling_is_a_setting(models, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *args, **kwargs: seen.append(type(self).__name__))
    executor(models[0]).preload()
    assert seen == []
    executor(models[0], settings={"IMAGEN_COMPILE": 1}).preload()
    assert seen == ["UNet2DConditionModel"]


def test_a_single_file_is_for_the_owner_alone(tmp_path, models, monkeypatch):
    from safetensors.torch import save_file
    file = tmp_path / "dreams.safetensors"
    save_file({"lora_up.weight": torch.zeros(2)}, file)
    with pytest.raises(ExecutionError, match=r"dreams is no checkpoint of a whole model .* an adapter \(LoRA\) is named in `loras`"): executor(file).draw("x")
    monkeypatch.chdir(tmp_path)
    for name in (str(file), file.name):
        with pytest.raises(ExecutionError, match="`model` must be a Hub id"): executor(models[0]).run({"prompt": "x", "model": name}, LocalContext())


def test_a_download_tells_how_far_it_is(tmp_path, monkeypatch):
    import threading

    from huggingface_hub import constants

    from colab_gpu.models import ModelSource
    from colab_gpu.pipelines import telling_download
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    blobs, told, heard = tmp_path / "models--me--big" / "blobs", [], threading.Event()
    with telling_download(ModelSource("me/big", "me/big", False), lambda text: (told.append(text), heard.set()), gib=6.6, every_s=0.01):
        blobs.mkdir(parents=True)
        with open(blobs / "abc.incomplete", "wb") as file: file.truncate(3 << 30)  # sparse
        assert heard.wait(60)
    assert told == ["Downloading me/big: 3.00 GiB of about 6.6."]
