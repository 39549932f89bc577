"""A checkpoint in one file, as Civitai and ComfyUI keep them, draws what the folder it was made from draws."""
import re
import shutil

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch
from safetensors.torch import save_file

from colab_gpu.config import Settings
from colab_gpu.errors import InvalidInput
from colab_gpu.images import ImageExecutor
from colab_gpu.jobs import LocalContext
from colab_gpu.models import find_model
from colab_gpu.pipelines import file_family, load_pipeline, tiny_pipeline, weight_bytes

RES = (("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
       ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection"))


def original_unet(state, per=1):
    n = per + 1
    rules = [(r"^time_embedding\.linear_1", "time_embed.0"), (r"^time_embedding\.linear_2", "time_embed.2"), (r"^conv_in", "input_blocks.0.0"),
             (r"^conv_norm_out", "out.0"), (r"^conv_out", "out.2"),
             (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"), (r"^mid_block\.attentions\.0", "middle_block.1"),
             (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{n * (int(m[1]) + 1)}.0.op"),
             (r"^down_blocks\.(\d)\.(resnets|attentions)\.(\d)", lambda m: f"input_blocks.{n * int(m[1]) + int(m[3]) + 1}.{int(m[2] == 'attentions')}"),
             (r"^up_blocks\.(\d)\.upsamplers\.0\.conv", lambda m: f"output_blocks.{n * int(m[1]) + per}.{2 if int(m[1]) == 0 else 1}.conv"),
             (r"^up_blocks\.(\d)\.(resnets|attentions)\.(\d)", lambda m: f"output_blocks.{n * int(m[1]) + int(m[3])}.{int(m[2] == 'attentions')}")]
    return {f"model.diffusion_model.{renamed(key, rules, RES)}": value for key, value in state.items()}


def original_vae(state, levels=4):
    rules = [(r"\.conv_norm_out", ".norm_out"), (r"\.mid_block\.attentions\.0", ".mid.attn_1"),
             (r"\.mid_block\.resnets\.(\d)", lambda m: f".mid.block_{int(m[1]) + 1}"), (r"\.down_blocks\.(\d)\.downsamplers\.0", r".down.\1.downsample"),
             (r"\.down_blocks\.(\d)\.resnets\.", r".down.\1.block."),
             (r"\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f".up.{levels - 1 - int(m[1])}.upsample"),
             (r"\.up_blocks\.(\d)\.resnets\.", lambda m: f".up.{levels - 1 - int(m[1])}.block."),
             (r"attn_1\.group_norm", "attn_1.norm"), (r"attn_1\.to_([qkv])", r"attn_1.\1"), (r"attn_1\.to_out\.0", "attn_1.proj_out")]
    out = {}
    for key, value in state.items():
        name = renamed(key, rules, (("conv_shortcut", "nin_shortcut"),))
        out[f"first_stage_model.{name}"] = value[..., None, None] if "attn_1" in name and value.ndim == 2 else value
    return out


def renamed(key, rules, parts):
    for pattern, to in rules: key = re.sub(pattern, to, key)
    if "transformer_blocks" not in key:
        for ours, theirs in parts: key = key.replace(f".{ours}.", f".{theirs}.")
    return key


def single_file(pipe, path):
    text = {f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}": value for key, value in pipe.text_encoder.state_dict().items()}
    weights = {**original_unet(pipe.unet.state_dict()), **original_vae(pipe.vae.state_dict()), **text}
    save_file({key: value.contiguous().clone() for key, value in weights.items()}, path)


@pytest.fixture(scope="module")
def dreams(tmp_path_factory):
    "A single file, and beside it the folder with its tokenizer and configuration, so that no network is needed."
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("dreams")
    tiny = tiny_pipeline(folder / "dreams.v1")
    single_file(load_pipeline(find_model(str(tiny)), device="cpu"), folder / "dreams.v1.safetensors")
    return folder / "dreams.v1.safetensors", tiny


def test_one_file_draws_what_the_folder_draws(dreams):
    file, folder = dreams
    one, other = (ImageExecutor(str(where), device="cpu", settings=Settings(environ={})) for where in (file, folder))
    payload = {"prompt": "a red lighthouse", "seed": 7, "width": 256, "height": 256, "num_inference_steps": 5}
    assert one.draw(payload).image.tobytes() == other.draw(payload).image.tobytes()
    assert one.models() == ["dreams.v1"] and one.run(payload, LocalContext())["model"] == "dreams.v1"
    assert weight_bytes(find_model(str(file)), "float32") == pytest.approx(one.held_bytes(), rel=0.02)


def test_the_names_of_the_weights_tell_the_family(dreams, tmp_path):
    assert file_family(find_model(str(dreams[0]))) == "StableDiffusionPipeline"
    for name, family in (("conditioner.embedders.0.x", "StableDiffusionXLPipeline"), ("model.diffusion_model.joint_blocks.0.x", "StableDiffusion3Pipeline"),
                         ("model.diffusion_model.double_blocks.0.x", "FluxPipeline")):
        save_file({name: torch.zeros(1)}, tmp_path / "some.safetensors")
        assert file_family(find_model(str(tmp_path / "some.safetensors"))) == family


def test_half_a_file_is_refused_in_a_sentence(dreams, tmp_path):
    half = tmp_path / "half.safetensors"
    half.write_bytes(dreams[0].read_bytes()[:200_000])
    shutil.copytree(dreams[1], tmp_path / "half")
    with pytest.raises(InvalidInput) as e: ImageExecutor(str(half), device="cpu", settings=Settings(environ={})).draw("x")
    assert "half" in str(e.value) and str(tmp_path) not in str(e.value) and "\n" not in str(e.value)
