"""The bundled demo model: it loads the ordinary way, answers the prompt, and its tools tell right from wrong."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "colab_gpu" / "demo_model"
sys.path.insert(0, str(ROOT / "tools"))

from demo_captions import describe, elements, vocabulary
from demo_judge import components, judge_shapes, see_scene, see_shapes, shape_of
from demo_scenes import PALETTE, is_held_out, render, sample
from score_demo_model import judge, negative_shares, prompts, tally, visibly_apart

# ---- the generator and the judge, which need no model ----------------------------------------------------------------

def test_one_seed_draws_the_same_pictures_and_captions() -> None:
    def some(seed: int) -> list[tuple[str, bytes]]:
        rng = random.Random(seed)
        out = []
        for _ in range(10):
            picture = json.loads(json.dumps(sample(rng)))
            out.append((describe(picture, rng)[0], render(picture).tobytes()))
        return out

    assert some(3) == some(3)
    assert some(3) != some(4)


def test_prompts_are_the_same_in_every_process() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); from score_demo_model import prompts; print([text for _, text, _ in prompts(60)])"
    said = set()
    for seed in ("1", "2", "3"):
        done = subprocess.run([sys.executable, "-c", code, str(ROOT / "tools")], env={**os.environ, "PYTHONHASHSEED": seed},
                              capture_output=True, text=True, check=True)
        said.add(done.stdout)
    assert len(said) == 1


def test_held_out_combinations_never_reach_training() -> None:
    rng = random.Random(1)
    assert not any(is_held_out(sample(rng)) for _ in range(500))
    assert all(is_held_out(sample(rng, held_out=True)) for _ in range(50))


def test_captions_name_what_they_ask_for() -> None:
    rng = random.Random(2)
    for _ in range(200):
        picture = sample(rng, kind="single")
        text, asked = describe(picture, rng, plain=True)
        assert asked["color"] == picture["shapes"][0]["color"]
        assert asked["shape"] == picture["shapes"][0]["shape"]
        assert asked.get("size", "medium") == picture["shapes"][0]["size"]
        assert asked.get("place", "center") == picture["shapes"][0]["place"]
        assert asked["ground"] == picture["ground"]
        assert len(text.split()) < 36


@pytest.mark.parametrize("size", [(256, 256), (384, 256), (256, 384)])
def test_the_judge_knows_drawn_pictures_from_wrong_ones(size: tuple[int, int]) -> None:
    cases = prompts(40)
    drawn = [render(picture, *size) for picture, _, _ in cases]
    own = tally([judge(p, asked) for p, (_, _, asked) in zip(drawn, cases, strict=True)])
    wrong = tally([judge(p, asked) for p, (_, _, asked) in zip(drawn[10:] + drawn[:10], cases, strict=True)])
    for row in ("color", "ground", "shape", "place", "elements"):
        assert own[row][0] >= 0.95 * own[row][1], row
        assert wrong[row][0] < 0.8 * wrong[row][1], row


def test_the_judge_sees_nothing_in_noise_or_a_flat_ground() -> None:
    flat = np.full((256, 256, 3), PALETTE["blue"], np.uint8)
    assert see_shapes(flat) == {"ground": "blue", "regions": []}
    assert see_scene(flat) <= {"sea"}
    asked = {"color": "red", "shape": "circle", "ground": "blue", "place": "center"}
    assert judge_shapes(flat, asked) == {"ground": True, "color": False, "shape": False, "place": False, "alone": True}
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    assert not judge_shapes(noise, asked)["shape"]


def test_pictures_are_apart_when_a_person_would_say_so() -> None:
    flat = np.full((256, 256, 3), PALETTE["blue"], np.uint8)
    one, other, nudged = flat.copy(), flat.copy(), flat.copy()
    one[100:120, 100:120] = other[112:132, 100:120] = nudged[100:120, 101:121] = PALETTE["red"]
    assert visibly_apart(one, other)
    assert not visibly_apart(one, nudged)
    assert not visibly_apart(one, one)
    assert not visibly_apart(flat, flat)


def test_the_judge_takes_no_house_for_a_boat_and_misses_none() -> None:
    rng = random.Random(9)
    for _ in range(80):
        picture = sample(rng, kind="scene")
        assert ("boat" in see_scene(render(picture))) == ("boat" in elements(picture)), picture


def test_the_judge_has_a_word_for_what_is_no_shape() -> None:
    y, x = np.mgrid[:256, :256]
    for mask in ((abs(y - 128) < 10) & (abs(x - 128) < 88), ((x - 128) / 80) ** 2 + ((y - 128) / 40) ** 2 < 1,
                 ((x - 128) ** 2 + (y - 128) ** 2 < 60 ** 2) & (y < 128)):
        assert shape_of(mask) == "other"


def test_components_are_found_across_rows() -> None:
    mask = np.array([[1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]], bool)
    assert [int(m.sum()) for m in components(mask)] == [5, 1, 1]
    assert components(np.zeros((3, 3), bool)) == []


def test_scene_elements_are_what_was_drawn() -> None:
    rng = random.Random(5)
    for _ in range(20):
        picture = sample(rng, kind="scene")
        # A sun may stand behind a house, and hills count as such where the land is at least a third of the lower half.
        assert (elements(picture) ^ see_scene(render(picture))) <= {"sun", "hills"}


def test_what_is_there_twice_is_noticed() -> None:
    rng = random.Random(6)
    for kind in ("single", "pair", "scene"):
        assert all(judge(render(p), describe(p, rng, plain=True)[1])["alone"] for p in (sample(rng, kind=kind) for _ in range(20)))
    lit = next(p for p in iter(lambda: sample(rng, kind="scene"), None) if p["time"] == "day" and p["light"] and p["house"] and p["land"] == "hills")
    twice = render(lit).copy()
    assert judge(twice, {"elements": {"sun"}}) == {"sun": True, "alone": True}
    twice[:70, :128] = twice[:70, 128:]
    assert judge(twice, {"elements": {"sun"}}) == {"sun": True, "alone": False}
    one = {"kind": "single", "ground": "blue", "shapes": [{"shape": "circle", "color": "red", "at": (0.25, 0.5), "radius": 0.15, "turn": 0.0}]}
    asked = {"color": "red", "shape": "circle", "ground": "blue"}
    pixels = render(one)
    assert judge(pixels, asked)["alone"]
    assert not judge(np.concatenate([pixels[:, :128]] * 2, axis=1), asked)["alone"]


@pytest.mark.parametrize("size", [(256, 256), (384, 256), (256, 384)])
def test_sizes_are_judged_by_the_shorter_side(size: tuple[int, int]) -> None:
    rng = random.Random(4)
    sized = [p for p in (sample(rng, kind="single") for _ in range(200)) if p["shapes"][0]["size"] != "medium"]
    for picture in sized[:40]:
        word = picture["shapes"][0]["size"]
        other = "small" if word == "large" else "large"
        asked = {"color": picture["shapes"][0]["color"], "shape": picture["shapes"][0]["shape"], "ground": picture["ground"]}
        pixels = render(picture, *size)
        assert judge(pixels, asked | {"size": word})["size"]
        assert not judge(pixels, asked | {"size": other})["size"]


# ---- the training ----------------------------------------------------------------------------------------------------

class FlatPool:
    """Pictures of one colour, without an autoencoder."""

    def batch(self, rng: random.Random, count: int, drop: float):
        """Return latents and captions as `train_demo_model.Pool` does."""
        import torch
        return torch.full((count, 4, 16, 16), rng.random()), ["a red circle" if rng.random() > drop else "" for _ in range(count)]


def test_training_resumes_where_it_stopped(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import train_demo_model as train

    args = argparse.Namespace(run=tmp_path, start=None, seed=0, words_steps=1, words_lr=1e-3, steps=10, lr=1e-3, ema=0.9, threads=1)
    tokenizer, device = train.new_tokenizer(tmp_path / "tokenizer"), torch.device("cpu")
    train.train_words(args, tokenizer, device)
    through = train.Painting(args, tokenizer, device)
    through.train_step(FlatPool(), 4)
    through.save()
    resumed = train.Painting(args, tokenizer, device)
    assert resumed.step == 1
    for painting in (through, resumed):
        painting.train_step(FlatPool(), 4)
    for name in ("net", "mean"):
        for one, other in zip(getattr(through, name).parameters(), getattr(resumed, name).parameters(), strict=True):
            assert torch.equal(one, other)


def test_nothing_is_exported_from_an_empty_run(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "train_demo_model.py"), "--run", str(tmp_path / "run"), "--out",
                           str(tmp_path / "out"), "--stage", "export"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "unet.pt, vae.pt, decoder.pt is missing" in done.stderr
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out").exists()


def test_training_goes_on_from_a_finished_model(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import train_demo_model as train

    args = argparse.Namespace(run=tmp_path, start=FOLDER, seed=0, steps=10, lr=1e-3, ema=0.9, threads=1)
    painting = train.Painting(args, train.CLIPTokenizer.from_pretrained(FOLDER / "tokenizer"), torch.device("cpu"))
    finished = train.UNet2DConditionModel.from_pretrained(FOLDER / "unet")
    for one, other in zip(painting.net.unet.parameters(), finished.parameters(), strict=True):
        assert torch.equal(one, other)
    vae = train.finished_vae(FOLDER, torch.device("cpu"))
    pixels = render(sample(random.Random(1)))
    x = train.to_tensor(pixels[None], torch.device("cpu"))
    with torch.no_grad():
        back = vae.decode(vae.encode(x).latent_dist.mean).sample
    assert (back - x).abs().mean() < 0.05


def test_over_strong_latents_still_ask_for_the_true_picture() -> None:
    torch = pytest.importorskip("torch")
    import train_demo_model as train

    scheduler, z = train.new_scheduler(), torch.randn(64, 4, 8, 8)
    x, t, _, v, _ = train.noised(scheduler, z, torch.zeros(64, 4))
    alpha = scheduler.alphas_cumprod[t][:, None, None, None]
    assert torch.allclose(alpha.sqrt() * x - (1 - alpha).sqrt() * v, z, atol=1e-4)


# ---- the model -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pipe():
    """The pipeline, loaded with nothing but the folder's name."""
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    if not (FOLDER / "model_index.json").exists():
        pytest.fail("the demo model is missing from the package")
    pipe = diffusers.AutoPipelineForText2Image.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe, prompt: str, seed: int = 0, **kw) -> np.ndarray:
    """Paint as the product does when nothing else is said."""
    import torch

    from colab_gpu.models import KNOWN

    options = {"num_inference_steps": KNOWN["demo"].steps, "guidance_scale": KNOWN["demo"].guidance_scale, "height": 256, "width": 256, **kw}
    return np.asarray(pipe(prompt, generator=torch.Generator().manual_seed(seed), **options).images[0])


def test_the_folder_is_an_ordinary_small_one(pipe) -> None:
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) <= 8_000_000
    index = json.loads((FOLDER / "model_index.json").read_text("utf-8"))
    assert index["safety_checker"] == [None, None]
    assert index["requires_safety_checker"] is False
    assert pipe.vae_scale_factor == 8
    assert (FOLDER / "README.md").exists()


def test_every_caption_word_is_one_token(pipe) -> None:
    for word in vocabulary():
        assert len(pipe.tokenizer.tokenize(word)) == 1, word
    assert len(pipe.tokenizer.tokenize("qwrtz")) > 1
    assert pipe.tokenizer("Ünïcode 🎈 words").input_ids


RED_CIRCLE = {"color": "red", "shape": "circle", "ground": "blue"}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_paints_the_demo_prompt(pipe, seed: int) -> None:
    seen = judge_shapes(paint(pipe, "a red circle on a blue background", seed), RED_CIRCLE)
    assert all(seen.values()), seen


def test_unknown_words_do_no_harm(pipe) -> None:
    for prompt in ("an utterly splendid red circle on a zyxwv blue background 🎈", "Ünïcode: red circle, blue background, 8k"):
        seen = [judge_shapes(paint(pipe, prompt, s), RED_CIRCLE) for s in range(3)]
        assert sum(s["color"] and s["ground"] for s in seen) >= 2, (prompt, seen)


def test_guidance_of_seven_which_many_clients_send_keeps_the_colours(pipe) -> None:
    seen = [judge_shapes(paint(pipe, "a red circle on a blue background", s, guidance_scale=7.0), RED_CIRCLE) for s in range(3)]
    assert all(s["color"] and s["ground"] for s in seen), seen


def test_one_seed_gives_the_same_bytes_and_two_seeds_differ(pipe) -> None:
    first, again, other = (paint(pipe, "a house by the sea at sunset", s) for s in (1, 1, 2))
    assert first.tobytes() == again.tobytes()
    assert (np.abs(first.astype(int) - other.astype(int)).max(-1) > 30).mean() > 0.01


def test_a_negative_prompt_lowers_its_colour(pipe) -> None:
    def several(texts: list[str], seeds: list[int], negative: str) -> list[np.ndarray]:
        return [paint(pipe, text, s, negative_prompt=negative) for text, s in zip(texts, seeds, strict=True)]

    without, with_it = negative_shares(several, 18)
    assert with_it < without / 2


@pytest.mark.parametrize(("width", "height"), [(384, 256), (256, 384)])
def test_other_sizes_are_sensible(pipe, width: int, height: int) -> None:
    seen = []
    for seed in range(4):
        pixels = paint(pipe, "a red circle on a blue background", seed, width=width, height=height)
        assert pixels.shape == (height, width, 3)
        seen.append(judge_shapes(pixels, RED_CIRCLE | {"place": "center"}))
    assert all(s["color"] and s["ground"] and s["place"] for s in seen), seen
    assert sum(s["shape"] for s in seen) >= 3, seen
