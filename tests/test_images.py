"""The image executor over real pipelines: tiny ones with random weights, and the bundled demo model where there is one."""
import io
import json
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch
from PIL import Image

from colab_gpu import images
from colab_gpu.config import Settings
from colab_gpu.errors import (ExecutionError, Interrupted, InvalidInput, InvalidPayload, InvalidSetting, OutOfMemory,
                              Transient)
from colab_gpu.images import ImageExecutor
from colab_gpu.jobs import LocalContext
from colab_gpu.models import find_model
from colab_gpu.pipelines import LOAD_ERRORS, load_pipeline, out_of_memory, tiny_pipeline, translated

ROOT = Path(images.__file__).parents[1]
BUNDLED = ROOT / "colab_gpu" / "demo_model"
SMALL = {"width": 256, "height": 256, "num_inference_steps": 5}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session", params=["tiny", pytest.param("demo", marks=pytest.mark.skipif(
    not (BUNDLED / "model_index.json").is_file(), reason="no bundled demo model"))])
def artist(request, tiny):
    return executor(tiny if request.param == "tiny" else "demo")


def executor(model, **options):
    overrides = options.pop("settings", {})
    return ImageExecutor(str(model), settings=Settings(overrides, environ={}), device="cpu", **options)


def stop_at(step):
    "A context whose job is canceled once `step` is reported."
    ctx = LocalContext()
    ctx.on_progress = lambda done, total: setattr(ctx, "stop", Interrupted("The job was canceled.") if done == step else None)
    return ctx


def remade(tiny, folder, change):
    "The pipeline at `tiny` after `change(pipe)`, saved at `folder`."
    pipe = load_pipeline(find_model(str(tiny)), device="cpu")
    change(pipe)
    pipe.save_pretrained(folder)
    return folder


def child(code, *, environ=None, timeout=300):
    "Run `code` in a fresh Python and return the finished process."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environ or {})}
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=timeout, env=env)


# ---- what comes out -------------------------------------------------------------------------------------------------

def test_the_same_seed_gives_the_same_bytes_in_another_executor(artist):
    first = artist.draw("a red lighthouse", seed=7, **SMALL)
    again = executor(artist.model_id).draw("a red lighthouse", seed=7, **SMALL)
    assert first.png == again.png
    assert artist.draw("a red lighthouse", seed=8, **SMALL).image.tobytes() != first.image.tobytes()


def test_a_chosen_seed_is_told_and_draws_the_picture_again(artist):
    one, two = (artist.draw("a red lighthouse", **SMALL) for _ in range(2))
    assert one.meta["seed"] != two.meta["seed"]
    assert 0 <= one.meta["seed"] < 2**32
    assert artist.draw("a red lighthouse", seed=one.meta["seed"], **SMALL).png == one.png


def test_the_largest_seed_that_a_payload_may_have_is_drawn(artist):
    assert artist.draw("x", seed=2**63 - 1, **SMALL).meta["seed"] == 2**63 - 1


@pytest.mark.parametrize("change", [{"prompt": "a blue boat"}, {"negative_prompt": "fog"}, {"guidance_scale": 1},
                                    {"guidance_scale": 14}, {"num_inference_steps": 9}])
def test_every_field_changes_the_picture(artist, change):
    plain = {"prompt": "a red lighthouse", "seed": 7, **SMALL}
    assert artist.draw({**plain, **change}).image.tobytes() != artist.draw(plain).image.tobytes()


def test_numbers_are_clamped_and_strings_count_as_in_the_reference(tiny):
    ctx = LocalContext()
    result = executor(tiny).run({"prompt": "x", "width": "3", "height": "300", "num_inference_steps": "1"}, ctx)
    assert (result["width"], result["height"], result["num_inference_steps"]) == (256, 296, 5)
    assert Image.open(io.BytesIO(ctx.artifacts["image.png"][0])).size == (256, 296)
    assert len([s for s in ctx.steps if s[2] == "running"]) == 5


def test_the_result_has_the_names_of_the_reference_and_is_json(artist):
    ctx = LocalContext()
    result = artist.run({"prompt": "x", "seed": 3, **SMALL}, ctx)
    assert set(result) == {"model", "prompt", "negative_prompt", "guidance_scale", "num_inference_steps", "width", "height",
                           "seed", "duration_ms", "device", "load_ms", "scheduler", "batch_size", "batch_index"}
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert list(ctx.artifacts) == ["image.png"] and ctx.artifacts["image.png"][1] == "image/png"
    assert result["device"] == "cpu" and result["duration_ms"] > 0


def test_settings_give_the_defaults(tiny):
    drawing = executor(tiny, settings={"IMAGEN_WIDTH": 264, "IMAGEN_HEIGHT": 256, "IMAGEN_STEPS": 90, "IMAGEN_MAX_STEPS": 6}).draw("x")
    assert (drawing.image.size, drawing.meta["num_inference_steps"]) == ((264, 256), 6)


def test_png_tells_what_made_it_and_nothing_else(tiny):
    secret = "hf_averysecrettoken"
    prompt, negative = "a lighthouse, 灯台\nat dusk", "fog: thick"
    drawing = executor(tiny, settings={"HF_TOKEN": secret}).draw(prompt, negative_prompt=negative, seed=7, **SMALL)
    text = Image.open(io.BytesIO(drawing.png)).text
    assert text["parameters"] == (f"{prompt}\nNegative prompt: {negative}\nSteps: 5, Sampler: DDIM, CFG scale: 7, Seed: 7, "
                                  "Size: 256x256, Model: tiny, RNG: CPU")
    facts = json.loads(text["colab-gpu"])
    assert (facts["prompt"], facts["negative_prompt"], facts["seed"], facts["model"]) == (prompt, negative, 7, "tiny")
    told = " ".join(text.values()) + json.dumps(drawing.meta) + " ".join(drawing.notes)
    assert secret not in told and str(tiny.parent) not in told and set(text) == {"parameters", "colab-gpu"}


def test_the_callers_random_numbers_stay_as_they_were(tiny, tmp_path):
    torch.manual_seed(2026)
    before = torch.get_rng_state()
    tiny_pipeline(tmp_path / "another")
    executor(tiny).draw("x", seed=7, **SMALL)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_draws_nearly_the_same_picture(tiny, dtype):
    import numpy as np
    artist, ctx = executor(tiny, dtype=dtype), LocalContext(watched=True)
    artist.run({"prompt": "a red lighthouse", "seed": 7, **SMALL}, ctx)
    half = Image.open(io.BytesIO(ctx.artifacts["image.png"][0]))
    full = executor(tiny).draw("a red lighthouse", seed=7, **SMALL).image
    assert ctx.logs[-1] == f"Loaded tiny on cpu in {dtype}." and ctx.previews
    difference = np.abs(np.asarray(half, float) - np.asarray(full, float)).mean()
    assert 0 < difference < 8, difference


# ---- while it runs --------------------------------------------------------------------------------------------------

def test_progress_counts_every_step_and_loading_comes_first(tiny):
    fresh, ctx = executor(tiny), LocalContext()
    fresh.run({"prompt": "x", **SMALL}, ctx)
    assert ctx.steps == [(0, 5, "loading"), *((n, 5, "running") for n in range(1, 6))]
    assert ctx.logs == ["Loading tiny.", "Loaded tiny on cpu in float32."]
    warm = LocalContext()
    assert fresh.run({"prompt": "x", **SMALL}, warm)["load_ms"] == 0
    assert warm.steps == ctx.steps[1:] and not warm.logs


def test_a_scheduler_that_takes_one_step_more_is_counted_as_it_is(tiny, tmp_path):
    from diffusers import PNDMScheduler

    def change(pipe): pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    ctx = LocalContext()
    executor(remade(tiny, tmp_path / "plms", change)).run({"prompt": "x", **SMALL}, ctx)
    assert [s[:2] for s in ctx.steps if s[2] == "running"] == [(n, 6) for n in range(1, 7)]


@pytest.mark.parametrize("step", [1, 3, 5])
def test_cancel_stops_within_a_step_and_the_executor_works_again(tiny, step):
    artist = executor(tiny)
    before = artist.draw("x", seed=7, **SMALL)
    ctx = stop_at(step)
    with pytest.raises(Interrupted): artist.run({"prompt": "x", "seed": 7, **SMALL}, ctx)
    assert ctx.steps[-1][0] == step and not ctx.artifacts
    assert artist.draw("x", seed=7, **SMALL).png == before.png


def test_cancel_while_the_model_loads_draws_nothing(tiny, monkeypatch):
    ctx = stop_at(0)
    monkeypatch.setattr(images, "paint", lambda *args: pytest.fail("It began to draw."))
    with pytest.raises(Interrupted): executor(tiny).run({"prompt": "x", **SMALL}, ctx)
    assert ctx.steps == [(0, 5, "loading")]


def test_a_job_canceled_before_it_begins_loads_nothing(tiny):
    artist = executor(tiny)
    with pytest.raises(Interrupted): artist.run({"prompt": "x"}, LocalContext(stop=Interrupted("The job was canceled.")))
    assert artist.models() == []


def test_offloaded_parts_go_back_when_a_run_is_stopped(tiny):
    artist, freed = executor(tiny), []
    artist.preload()
    pipe = next(iter(artist.shelf.loaded.values())).pipe
    whole = pipe.maybe_free_model_hooks
    pipe.maybe_free_model_hooks = lambda: (freed.append(1), whole())
    with pytest.raises(Interrupted): artist.run({"prompt": "x", **SMALL}, stop_at(2))
    assert freed == [1]


def test_previews_only_for_watchers_and_small(tiny):
    artist, seen, alone = executor(tiny), LocalContext(watched=True), LocalContext()
    payload = {"prompt": "x", "seed": 7, **SMALL, "num_inference_steps": 20}
    assert artist.run(payload, seen) | {"duration_ms": 0, "load_ms": 0} == artist.run(payload, alone) | {"duration_ms": 0, "load_ms": 0}
    assert seen.artifacts == alone.artifacts, "watching changes nothing"
    assert not alone.previews and 4 <= len(seen.previews) <= 10
    for data in seen.previews:
        assert len(data) <= 1 << 16
        image = Image.open(io.BytesIO(data))
        assert image.format == "JPEG" and max(image.size) == 256


def test_runs_take_turns(tiny):
    artist = executor(tiny)
    alone = [artist.draw("x", seed=n, **SMALL).png for n in range(4)]
    steps = []

    def draw(n): return artist.draw("x", seed=n, on_progress=lambda step, total: steps.append((n, step)), **SMALL).png
    with ThreadPoolExecutor(4) as pool: assert list(pool.map(draw, range(4))) == alone
    order = [n for n, step in steps if step == 1]
    assert steps == [(n, step) for n in order for step in range(1, 6)], "no step of one run lies between the steps of another"


def test_models_answers_while_a_picture_is_drawn(tiny):
    artist, told = executor(tiny), []

    def ask(step, total):
        if step: thread = threading.Thread(target=lambda: told.append(artist.models())); thread.start(); thread.join(30)
    artist.draw("x", on_progress=ask, **SMALL)
    assert told == [["tiny"]] * 5


# ---- other families -------------------------------------------------------------------------------------------------

def pixart(tiny, folder):
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel, T5Tokenizer
    tokens = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(97, 123))]
    tokenizer = T5Tokenizer(vocab=[(token, -float(n)) for n, token in enumerate(tokens)], extra_ids=0, model_max_length=64)
    text = T5EncoderModel(T5Config(vocab_size=len(tokens), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    transformer = PixArtTransformer2DModel(
        sample_size=32, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=32, in_channels=4,
        out_channels=8, cross_attention_dim=16, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6)
    PixArtSigmaPipeline(tokenizer=tokenizer, text_encoder=text, transformer=transformer, scheduler=DPMSolverMultistepScheduler(),
                        vae=AutoencoderKL.from_pretrained(tiny / "vae")).save_pretrained(folder)
    return folder


def test_a_pipeline_without_callback_on_step_end_reports_and_stops_too(tiny, tmp_path):
    artist, ctx = executor(pixart(tiny, tmp_path / "pixart")), LocalContext()
    artist.run({"prompt": "a red house", "seed": 7, **SMALL}, ctx)
    assert [s[0] for s in ctx.steps if s[2] == "running"] == [1, 2, 3, 4, 5]
    stopped = stop_at(2)
    with pytest.raises(Interrupted): artist.run({"prompt": "a red house", **SMALL}, stopped)
    assert stopped.steps[-1][0] == 2


def test_a_pipeline_that_calls_nobody_back_still_draws(tiny, monkeypatch):
    artist, ctx = executor(tiny), LocalContext()
    artist.preload()
    kind = type(next(iter(artist.shelf.loaded.values())).pipe)
    whole = kind.__call__

    def mute(self, prompt, height=None, width=None, num_inference_steps=50, generator=None, output_type="pil"):
        return whole(self, prompt, height, width, num_inference_steps, generator=generator, output_type=output_type)
    monkeypatch.setattr(kind, "__call__", mute)
    result = artist.run({"prompt": "x", "negative_prompt": "fog", "seed": 7, **SMALL}, ctx)
    assert not ctx.steps and ctx.artifacts and result["seed"] == 7
    assert ctx.logs == ["This model takes no negative prompt: it was left out."]


def test_what_a_model_will_not_read_is_said(tiny):
    assert "110 tokens" in executor(tiny).draw("a lighthouse, " * 9, **SMALL).notes[0]
    assert executor(tiny).draw("a lighthouse", **SMALL).notes == ()


# ---- refusals -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("payload", "field"), [({}, "prompt"), ({"prompt": " "}, "prompt"), ({"prompt": "x", "width": "wide"}, "width"),
                                                ({"prompt": "x", "seed": -7}, "seed"), ({"prompt": "x", "steps": 5}, "steps")])
def test_bad_payloads_name_their_field_before_anything_is_loaded(tiny, payload, field):
    artist = executor(tiny)
    with pytest.raises(InvalidPayload) as e: artist.run(payload, LocalContext())
    assert e.value.field == field and artist.models() == []


@pytest.mark.parametrize("path", ["/etc", "/no/such/place", "../models", "~", "a model", "me/sd/1"])
def test_a_job_cannot_name_folders_and_cannot_tell_them_apart(tiny, path):
    with pytest.raises(InvalidInput) as e: executor(tiny).run({"prompt": "x", "model": path}, LocalContext())
    assert str(e.value) == f"`model` must be a Hub id, demo, or this worker's own model, not {path!r}." and e.value.field == "model"


def test_a_job_may_name_the_workers_own_model(tiny):
    for name in ("tiny", str(tiny)):
        assert executor(tiny).run({"prompt": "x", "model": name, **SMALL}, LocalContext())["model"] == "tiny"


def test_damaged_and_foreign_folders_are_refused_in_a_sentence(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    damaged = remade(tiny, tmp_path / "damaged", lambda pipe: None)
    (damaged / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model_index.json").write_text('{"_class_name": "AudioLDMPipeline"}')
    for folder in (tmp_path / "empty", damaged, foreign):
        with pytest.raises(InvalidInput) as e: executor(folder).draw("x")
        sentence = str(e.value)
        assert folder.name in sentence and str(tmp_path) not in sentence and "\n" not in sentence and len(sentence) < 320


def test_nan_and_black_are_told_and_do_not_repeat(tiny, tmp_path):
    def ruin(pipe): pipe.vae.decoder.conv_out.weight.data.fill_(float("nan"))
    with pytest.raises(InvalidInput, match="NaN instead of a picture: its weights are damaged"):
        executor(remade(tiny, tmp_path / "nan", ruin)).draw("x", **SMALL)

    def darken(pipe): pipe.vae.decoder.conv_out.weight.data.zero_(); pipe.vae.decoder.conv_out.bias.data.fill_(-2)
    with pytest.raises(InvalidInput, match="a black picture") as e:
        executor(remade(tiny, tmp_path / "black", darken)).draw("x", **SMALL)
    assert e.value.kind == "invalid_input" and not e.value.retryable


def test_the_safety_checker_is_off_unless_asked_for(tiny, tmp_path):
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPVisionConfig
    narrow = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    checker = StableDiffusionSafetyChecker(CLIPConfig(
        text_config=CLIPTextConfig(**narrow).to_dict(), projection_dim=8,
        vision_config=CLIPVisionConfig(**narrow, image_size=32, patch_size=16).to_dict()))
    checker.concept_embeds_weights.data.fill_(-2)  # a threshold that every picture passes: all are flagged
    parts = {name: part for name, part in load_pipeline(find_model(str(tiny)), device="cpu").components.items()
             if name not in ("safety_checker", "feature_extractor", "image_encoder")}
    StableDiffusionPipeline(**parts, safety_checker=checker, feature_extractor=CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})).save_pretrained(tmp_path / "prim")
    assert executor(tmp_path / "prim").draw("x", **SMALL).image
    with pytest.raises(InvalidInput, match="safety checker of prim withheld"):
        executor(tmp_path / "prim", settings={"IMAGEN_SAFETY_CHECKER": 1}).draw("x", **SMALL)


def test_a_device_that_is_not_here_is_a_wrong_setting(tiny):
    artist = ImageExecutor(str(tiny), settings=Settings({"IMAGEN_DEVICE": "cuda:99"}, environ={}))
    with pytest.raises(InvalidSetting, match=r"IMAGEN_DEVICE must be .*cpu on this machine"): artist.draw("x")


def test_what_the_pipeline_itself_refuses_is_final(tiny, monkeypatch):
    artist = executor(tiny)
    artist.preload()
    pipe = next(iter(artist.shelf.loaded.values())).pipe
    monkeypatch.setattr(pipe, "check_inputs", lambda *args: (_ for _ in ()).throw(ValueError("`height` must be divisible by 16\nadvice")))
    with pytest.raises(InvalidInput) as e: artist.draw("x")
    assert str(e.value) == "tiny refuses this request (ValueError: `height` must be divisible by 16)."


# ---- memory ---------------------------------------------------------------------------------------------------------

def test_a_second_model_pushes_out_the_first_and_unload_the_last(tiny, tmp_path):
    second = remade(tiny, tmp_path / "second", lambda pipe: None)
    artist = executor(tiny, keep=1)
    artist.preload()
    first_pipe = weakref.ref(next(iter(artist.shelf.loaded.values())).pipe)
    artist.preload(str(second))
    assert artist.models() == ["second"] and first_pipe() is None
    second_pipe = weakref.ref(next(iter(artist.shelf.loaded.values())).pipe)
    artist.unload()
    assert artist.models() == [] and second_pipe() is None
    assert artist.draw("x", **SMALL).meta["model"] == "tiny"


def test_who_keeps_the_error_keeps_no_tensors():
    held = []

    def fail():
        tensor = torch.zeros(4)
        held.append(weakref.ref(tensor))
        raise RuntimeError("CUDA error")
    kept = None
    try:
        with translated(lambda e: Transient(str(e))): fail()
    except Transient as e: kept = e
    assert kept is not None and held[0]() is None


def test_what_onednn_says_when_memory_runs_out_counts():
    assert out_of_memory(RuntimeError("could not create a primitive"))
    assert not out_of_memory(RuntimeError("could not create a primitive descriptor for a convolution"))


def test_out_of_memory_says_what_would_fit_and_the_next_job_runs(tiny):
    resource = pytest.importorskip("resource")
    assert resource
    done = child(f"""
        import resource
        from colab_gpu.images import ImageExecutor
        from colab_gpu.errors import OutOfMemory
        artist = ImageExecutor({str(tiny)!r}, device="cpu")
        small = artist.draw("x", seed=7, width=256, height=256, num_inference_steps=5)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
        try: artist.draw("x", width=1024, height=1024, num_inference_steps=5)
        except OutOfMemory as e: print(e.kind, e)
        assert artist.draw("x", seed=7, width=256, height=256, num_inference_steps=5).png == small.png
    """)
    assert done.stdout == "oom 1024×1024 pixels with tiny need more memory than cpu has: ask for 512×512.\n", done.stderr


# ---- the process around it ------------------------------------------------------------------------------------------

def test_importing_loads_no_library():
    done = child("import sys, colab_gpu.images as i; i.ImageExecutor('demo'); heavy = {'torch', 'diffusers', 'transformers', 'PIL', 'numpy', "
                 "'huggingface_hub', 'fastcore', 'http.server'}; print(sorted(heavy & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("missing", ["torch", "diffusers", "transformers"])
def test_a_missing_library_names_the_command_that_brings_it(tiny, missing):
    done = child(f"""
        import importlib.abc, sys
        class Missing(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == {missing!r}: raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        sys.meta_path.insert(0, Missing())
        from colab_gpu.images import ImageExecutor
        from colab_gpu.errors import ExecutionError
        try: ImageExecutor({str(tiny)!r}, device="cpu").draw("x")
        except ExecutionError as e: print(e.kind, e)
    """)
    assert done.stdout.startswith("transient ") and 'pip install "colab-gpu[images]"' in done.stdout, done.stdout + done.stderr
    assert missing in done.stdout and done.stdout.count("\n") == 1


def test_drawing_is_quiet(tiny):
    done = child(f"""
        from colab_gpu.images import ImageExecutor
        ImageExecutor({str(tiny)!r}, device="cpu").draw("a lighthouse, " * 20, width=256, height=256)
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_builders_that_race_leave_one_whole_folder(tmp_path):
    code = f"from colab_gpu.pipelines import tiny_pipeline; tiny_pipeline({str(tmp_path / 'shared')!r})"
    with ThreadPoolExecutor(3) as pool: done = list(pool.map(child, [code] * 3))
    assert [d.returncode for d in done] == [0, 0, 0], done
    assert [p.name for p in tmp_path.iterdir()] == ["shared"]
    assert executor(tmp_path / "shared").draw("x", **SMALL).image


# ---- a Hub of our own: the real client against a real server --------------------------------------------------------

HUB = """
import http.server, json, os, sys, threading
seen = []
class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        seen.append(self.headers.get("Authorization"))
        code, error = {"typo": (401, "RepoNotFound"), "gated": (403, "GatedRepo"), "files": (404, "EntryNotFound")}[
            next(word for word in ("typo", "gated", "files") if word in self.path)]
        self.send_response(code); self.send_header("X-Error-Code", error); self.send_header("Content-Length", "0"); self.end_headers()
    do_HEAD = do_GET
    def log_message(self, *args): pass
hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=hub.serve_forever, daemon=True).start()
os.environ.update(HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_HUB_DISABLE_TELEMETRY="1")
from colab_gpu.config import Settings
from colab_gpu.errors import ExecutionError
from colab_gpu.images import ImageExecutor
from colab_gpu.jobs import LocalContext
artist = ImageExecutor("demo", device="cpu", settings=Settings({"HF_TOKEN": "hf_averysecrettoken"}, environ={}))
for model in sys.argv[1:] or ["me/typo", "me/gated", "me/files", "me/a--b"]:
    try: artist.run({"prompt": "x", "model": model}, LocalContext())
    except ExecutionError as e: print(e.kind, e)
print(set(seen), file=sys.stderr)
"""


def test_what_the_hub_refuses_is_said_in_one_sentence(tmp_path):
    token = "hf_averysecrettoken"
    done = child(HUB, environ={"HF_HOME": str(tmp_path), "HF_TOKEN": "", "HF_HUB_OFFLINE": ""})
    assert done.stdout.splitlines() == [
        "invalid_input There is no model me/typo on the Hugging Face Hub: check the spelling, or set HF_TOKEN if it is private.",
        "invalid_input me/gated is a gated model: accept its terms at https://huggingface.co/me/gated, then give the worker a token "
        "of that account as HF_TOKEN.",
        "invalid_input me/files is not a Diffusers model: it lacks a file that a pipeline needs (model_index.json).",
        "invalid_input me/a--b is not a name that the Hugging Face Hub allows: check the spelling."], done.stderr
    assert token not in done.stdout and f"Bearer {token}" in done.stderr, "the Hub gets the token, nobody else"


def test_offline_mode_is_named(tmp_path):
    done = child(HUB.replace("sys.argv[1:] or", "['me/typo'] or"), environ={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert done.stdout == ("transient me/typo has not been downloaded here, and HF_HUB_OFFLINE forbids it: unset it, or download the "
                           "model first.\n"), done.stderr


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_may_be_reached_later(tmp_path):
    done = child("""
        from colab_gpu.images import ImageExecutor
        from colab_gpu.errors import ExecutionError
        try: ImageExecutor("me/model", device="cpu").draw("x")
        except ExecutionError as e: print(e.kind, e)
    """, environ={"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": ""})
    assert done.stdout == "transient The Hugging Face Hub cannot be reached to load me/model: check the network, then try again.\n", done.stderr
    assert done.stderr == ""


def test_errors_are_of_our_tree():
    assert all(issubclass(kind, ExecutionError) for _, kind, _ in LOAD_ERRORS)
    assert OutOfMemory.kind == "oom"
