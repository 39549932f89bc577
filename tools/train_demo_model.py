"""Train the bundled demo model, from a procedural generator to a Diffusers folder.

Four stages: ``vae`` (autoencoder), ``words`` (text encoder alone: what does a caption say?), ``unet`` (text encoder and
denoiser, together, on latents of pictures that are drawn as training goes) and ``export``. All that takes long is resumed
from the run folder; ``words``, a minute and a half, begins anew if it was cut off. Everything that is left to chance comes
from ``--seed``.

    python tools/train_demo_model.py --run run --out colab_gpu/demo_model

With ``--start FOLDER`` a new run begins from a finished model in place of chance: its tokenizer and autoencoder stay as they
are, its text encoder and denoiser are trained further.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_captions import describe, vocabulary
from demo_scenes import PALETTE, PLACES, SHAPES, TIMES, render, sample
from demo_scenes import SIZES as SIZE_WORDS

SIZES = ((256, 256), (384, 256), (256, 384))  # width, height in pixels
MAX_TOKENS = 40
WIDTH = 128  # of the text encoder and so of the cross attention


# ---- parts -----------------------------------------------------------------------------------------------------------

def new_vae() -> AutoencoderKL:
    """Return an untrained autoencoder: 8 times smaller on each side, 4 channels, no attention, about 0.8 M parameters."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 24, 48, 64), layers_per_block=1, latent_channels=4, norm_num_groups=1, sample_size=256,
        scaling_factor=1.0, mid_block_add_attention=False)
    for half in (vae.encoder, vae.decoder):
        start_as_identity(half)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    return vae


@torch.no_grad()
def start_as_identity(net: torch.nn.Module, level: float = 16.0) -> None:
    """Let an encoder start as the mean colour of each cell, a decoder as the cells blown up: only edges are left to learn.

    A group norm over the whole picture would wipe out what a flat colour is. So channels 0 and 1 carry a large constant
    (`level` and its negative) past all blocks, for good: they fix the norms' statistics. Channels 2..4 carry the colour and
    5..7 its negative, because silu(x) - silu(-x) = x brings it through the last activation unharmed.
    """
    sign = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    for part in net.modules():
        kind = type(part).__name__
        if kind == "ResnetBlock2D":
            part.conv2.weight *= 0.1
            hold(part.conv1, slice(0, 2), slice(0, 0), slice(0, 2))
            part.conv1.bias[:2] = torch.tensor([level, -level])
            hold(part.conv2, slice(0, 8), slice(0, 0), slice(0, 2))
        carry = {"ResnetBlock2D": "conv_shortcut", "Upsample2D": "conv", "Downsample2D": "conv"}.get(kind)
        if carry and getattr(part, carry) is not None:
            conv = getattr(part, carry)
            hold(conv, slice(0, 8), slice(0, 2), slice(0, 2))
            mean_of_four = kind == "Downsample2D"
            for k in range(8):
                middle = slice(0, 2) if mean_of_four else conv.weight.shape[-1] // 2
                conv.weight[k, k, middle, middle] = 0.25 if mean_of_four else 1.0
        if kind == "GroupNorm":
            part.weight[:] = level * math.sqrt(2 / part.num_channels)
            part.weight[:2] = 0
            part.weight.register_hook(lambda g: torch.cat([g[:2] * 0, g[2:]]))
    hold(net.conv_in, slice(0, 8), slice(0, 0), slice(0, 2))
    net.conv_in.bias[:2] = torch.tensor([level, -level])
    net.conv_out.weight[:3], net.conv_out.bias[:3] = 0, 0
    for k in range(6):
        net.conv_in.weight[2 + k, k % 3, 1, 1] = sign[k]
        net.conv_out.weight[k % 3, 2 + k, 1, 1] = sign[k]


def hold(conv: torch.nn.Conv2d, rows: slice, columns: slice, still: slice) -> None:
    """Set a convolution's output `rows` and input `columns` to zero; outputs `still` and the columns are never trained."""
    conv.weight[rows], conv.bias[rows], conv.weight[:, columns] = 0, 0, 0
    mask = torch.ones_like(conv.weight)
    mask[still], mask[:, columns] = 0, 0
    conv.weight.register_hook(lambda g: g * mask.to(g.device))
    conv.bias.register_hook(lambda g: torch.cat([g[:still.stop] * 0, g[still.stop:]]))


def new_unet() -> UNet2DConditionModel:
    """Return an untrained denoiser of 32x32 latents: thin at 32x32, cross attention at 8x8, the whole picture at 4x4.

    Attention at 16x16 would take a third of the time and the room of the 4x4 level, which learns where things go sooner.
    """
    return UNet2DConditionModel(
        sample_size=32, in_channels=4, out_channels=4, block_out_channels=(32, 64, 80, 80), layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"), mid_block_type="UNetMidBlock2D",
        cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=8, resnet_time_scale_shift="scale_shift",
        time_embedding_dim=160,
        # The pooled words also steer every block through the time embedding: whole-picture facts are learnt at once.
        addition_embed_type="text", addition_embed_type_num_heads=4)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained CLIP text encoder, 3 layers of width 128."""
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS, projection_dim=WIDTH, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


def new_scheduler() -> DDIMScheduler:
    """Return the noise schedule.

    Zero terminal SNR with velocity prediction, because flat grounds need the mean colour right from the first step (Lin et
    al. 2023, arXiv:2305.08891). No clipping: the pipeline switches it off.
    """
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=True, prediction_type="v_prediction", timestep_spacing="trailing",
        rescale_betas_zero_snr=True, steps_offset=1)


def new_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write a CLIP tokenizer into `folder`, unless one is there, in which every caption word is one token, and load it.

    Only the seed of a hash decides the numbers of a dozen rare word endings, so a run must keep the tokenizer that it began with.
    """
    if (folder / "merges.txt").exists():
        return CLIPTokenizer.from_pretrained(folder)
    folder.mkdir(parents=True, exist_ok=True)
    letters = list(pre_tokenizers.ByteLevel.alphabet())
    ends = ["<|startoftext|>", "<|endoftext|>"]
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.train_from_iterator(vocabulary() * 2, trainers.BpeTrainer(
        vocab_size=20000, min_frequency=1, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False))
    merges = [m if isinstance(m, str) else " ".join(m) for m in json.loads(raw.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*sorted(letters), *(c + "</w>" for c in sorted(letters)), *(m.replace(" ", "") for m in merges), *ends])
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "do_lower_case": True,
              "add_prefix_space": False, "bos_token": ends[0], "eos_token": ends[1], "unk_token": ends[1], "pad_token": ends[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    (folder / "special_tokens_map.json").write_text(
        json.dumps({k: config[k] for k in ("bos_token", "eos_token", "unk_token", "pad_token")}, indent=2) + "\n", "utf-8")
    return CLIPTokenizer.from_pretrained(folder)


# ---- shared ----------------------------------------------------------------------------------------------------------

class Progress:
    """A progress bar on a terminal, a plain line now and then otherwise."""

    def __init__(self, name: str, done: int, total: int) -> None:
        self.name, self.start, self.total, self.began, self.told = name, done, total, time.monotonic(), 0.0

    def show(self, done: int, note: str) -> None:
        """Report `done` of the total steps."""
        now = time.monotonic()
        tty = sys.stderr.isatty()
        if now - self.told < (0.5 if tty else 20) and done < self.total:
            return
        self.told = now
        pace = (done - self.start) / max(now - self.began, 1e-9)
        left = (self.total - done) / max(pace, 1e-9)
        bar = "#" * round(20 * done / self.total)
        line = f"{self.name} [{bar:<20}] {done}/{self.total}  {pace:.2f}/s  {left / 60:.1f} min left  {note}"
        print("\r" + line if tty else line, end="" if tty and done < self.total else "\n", file=sys.stderr, flush=True)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that an interrupted write never spoils the last good one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def warm_cosine(step: int, steps: int, warm: int, floor: float = 0.02) -> float:
    """Return the learning rate's factor (0..1): a linear warm-up, then half a cosine down to `floor`."""
    if step < warm:
        return (step + 1) / warm
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min((step - warm) / max(steps - warm, 1), 1.0)))


def draw(rng: random.Random, count: int, size: tuple[int, int]) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Return `count` training pictures and their pixels, uint8 of shape (count, height, width, 3)."""
    pictures = [sample(rng) for _ in range(count)]
    return pictures, np.stack([render(p, *size) for p in pictures])


def to_tensor(pixels: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return pixels as (count, 3, height, width) in -1..1."""
    x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


def autocast(device: torch.device) -> torch.autocast:
    """Return the mixed-precision context: bfloat16, on either device."""
    return torch.autocast(device.type, torch.bfloat16)


# ---- stage 1: the autoencoder ----------------------------------------------------------------------------------------

def vae_batch(rng: random.Random, count: int, crop: int, device: torch.device) -> torch.Tensor:
    """Return `count` square crops; a third of them with channels swapped or inverted, to see more colours than the palette."""
    _, pixels = draw(rng, count, (256, 256))
    out = []
    for image in pixels:
        x, y = rng.randint(0, 256 - crop), rng.randint(0, 256 - crop)
        image = image[y:y + crop, x:x + crop]
        if rng.random() < 0.33:
            image = image[..., rng.sample((0, 1, 2), 3)]
            image = 255 - image if rng.random() < 0.5 else image
        out.append(image)
    return to_tensor(np.stack(out), device)


def vae_loss(vae: AutoencoderKL, x: torch.Tensor, noise: float, settled: bool) -> tuple[torch.Tensor, float]:
    """Return the loss and the plain mean absolute error (0..2); a `settled` encoder gets no gradient.

    The first three latent channels are drawn towards the cell's mean colour, so that latents are smooth, bounded and nearly
    linear in colour, which the denoiser learns fast. Noise on the latent teaches the decoder to forgive small errors.
    """
    with torch.set_grad_enabled(not settled):
        moments = vae.quant_conv(vae.encoder(x)).float()
    mean, logvar = moments.chunk(2, dim=1)
    sigma = noise * torch.rand(len(x), 1, 1, 1, device=x.device)
    y = vae.decoder(vae.post_quant_conv(mean + sigma * torch.randn_like(mean))).float()
    flat = F.l1_loss(y, x)
    edges = F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
    anchor = F.mse_loss(mean[:, :3], F.avg_pool2d(x, 8))
    free = (mean[:, 3:].mean() ** 2 + (mean[:, 3:].var() - 0.3) ** 2)
    return flat + edges + 0.3 * anchor + 0.1 * free + 1e-3 * ((logvar + 5) ** 2).mean(), flat.item()


def train_vae(args: argparse.Namespace, device: torch.device) -> AutoencoderKL:
    """Train the autoencoder, small crops first and whole pictures at the end, and set its latents to mean 0, deviation 1.

    The encoder stays as it is after `encoder_steps`, so that the decoder may be trained further when latents are in use.
    """
    path = args.run / "vae.pt"
    vae = new_vae().to(device, memory_format=torch.channels_last)
    opt = torch.optim.AdamW(vae.parameters(), lr=args.vae_lr, betas=(0.9, 0.99), weight_decay=0.0)
    step = 0
    if path.exists():
        state = torch.load(path, map_location=device)
        vae.load_state_dict(state["vae"]), opt.load_state_dict(state["opt"])
        step = state["step"]
    bar, saved = Progress("vae", step, args.vae_steps), time.monotonic()
    while step < args.vae_steps:
        rng = random.Random(f"{args.seed} vae {step}")
        torch.manual_seed(args.seed + step)
        whole = step > 0.85 * args.vae_steps
        x = vae_batch(rng, args.vae_batch // 3 if whole else args.vae_batch, 256 if whole else 128, device)
        for group in opt.param_groups:
            group["lr"] = args.vae_lr * warm_cosine(step, args.vae_steps, 50)
        with autocast(device):
            loss, error = vae_loss(vae, x, 0.15, step >= args.encoder_steps)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        opt.step()
        step += 1
        bar.show(step, f"loss {loss.item():.4f} error {error:.4f}")
        if time.monotonic() - saved > 120 or step == args.vae_steps:
            save(path, {"vae": vae.state_dict(), "opt": opt.state_dict(), "step": step})
            saved = time.monotonic()
    sharpen(args, vae, device)
    vae.eval().requires_grad_(False)
    whiten(vae, args.seed, device)
    return vae


def finished_vae(folder: Path, device: torch.device) -> AutoencoderKL:
    """Return the autoencoder of a finished model; it is never whitened anew, or its latents would mean something else."""
    vae = new_vae().to(device, memory_format=torch.channels_last)
    vae.load_state_dict(AutoencoderKL.from_pretrained(folder / "vae").state_dict())
    return vae.eval().requires_grad_(False)


def sharpen(args: argparse.Namespace, vae: AutoencoderKL, device: torch.device) -> None:
    """Train the decoder further, on the busiest parts of pictures: corners and small things come out clean only here."""
    path, step = args.run / "decoder.pt", 0
    vae.encoder.requires_grad_(False), vae.quant_conv.requires_grad_(False)
    net = torch.nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    edges = {vae.decoder.conv_in.weight, vae.decoder.conv_out.weight}
    inner = [p for p in net.parameters() if p.ndim > 1 and p not in edges]
    rest = [p for p in net.parameters() if p.ndim == 1 or p in edges]
    opts = [Muon(inner, args.decoder_lr, weight_decay=0.0), torch.optim.AdamW(rest, args.decoder_lr / 2, betas=(0.9, 0.98), weight_decay=0.0)]
    if path.exists():
        state = torch.load(path, map_location=device)
        net.load_state_dict(state["net"])
        for opt, kept in zip(opts, state.get("opts", ()), strict=False):
            opt.load_state_dict(kept)
        step = state["step"]
    bar, saved = Progress("decoder", step, args.decoder_steps), time.monotonic()
    while step < args.decoder_steps:
        torch.manual_seed(args.seed + step)
        x = to_tensor(busy_crops(random.Random(f"{args.seed} decoder {step}"), args.vae_batch, 128), device)
        for opt, rate in zip(opts, (1.0, 0.5), strict=True):
            opt.zero_grad()
            for group in opt.param_groups:
                group["lr"] = args.decoder_lr * rate * warm_cosine(step, args.decoder_steps, 20)
        with autocast(device):
            with torch.no_grad():
                z = vae.quant_conv(vae.encoder(x))[:, :4].float()
            z = z + 0.1 * torch.rand(len(z), 1, 1, 1, device=device) * torch.randn_like(z)
            y = vae.decoder(vae.post_quant_conv(z)).float()
        loss = F.l1_loss(y, x) + F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for opt in opts:
            opt.step()
        step += 1
        bar.show(step, f"loss {loss.item():.4f}")
        if time.monotonic() - saved > 120 or step == args.decoder_steps:
            save(path, {"net": net.state_dict(), "opts": [opt.state_dict() for opt in opts], "step": step})
            saved = time.monotonic()


def busy_crops(rng: random.Random, count: int, side: int) -> np.ndarray:
    """Return `count` square crops, each the one of four with the most edges in it; a quarter with channels swapped."""
    out = []
    for image in draw(rng, count, (256, 256))[1]:
        corners = [(8 * rng.randint(0, (256 - side) // 8), 8 * rng.randint(0, (256 - side) // 8)) for _ in range(4)]
        crops = [image[y:y + side, x:x + side].astype(np.int16) for x, y in corners]
        best = max(crops, key=lambda c: int(np.abs(np.diff(c, axis=0)).sum() + np.abs(np.diff(c, axis=1)).sum()))
        out.append(best[..., rng.sample((0, 1, 2), 3)] if rng.random() < 0.25 else best)
    return np.stack(out).astype(np.uint8)


def encode(vae: AutoencoderKL, pixels: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return the latents' means, float16 on the CPU."""
    with torch.inference_mode(), autocast(device):
        parts = [vae.quant_conv(vae.encoder(to_tensor(p, device)))[:, :4] for p in np.array_split(pixels, -(-len(pixels) // 16))]
    return torch.cat(parts).half().cpu()


def whiten(vae: AutoencoderKL, seed: int, device: torch.device) -> None:
    """Fold each latent channel's mean and deviation into the two 1x1 convolutions beside it, so that `scaling_factor` is 1."""
    z = encode(vae, draw(random.Random(f"{seed} whiten"), 256, (256, 256))[1], device).float().to(device)
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    inner, outer = vae.quant_conv, vae.post_quant_conv
    inner.weight.data[:4] /= std[:, None, None, None]
    inner.bias.data[:4] = (inner.bias.data[:4] - mean) / std
    inner.bias.data[4:] -= 2 * std.log()
    outer.bias.data += (outer.weight.data[:, :, 0, 0] @ mean)
    outer.weight.data *= std[None, :, None, None]


# ---- shared by the two networks -----------------------------------------------------------------------------------------

class Pool:
    """Latents of drawn pictures, kept beside what they show so that each pass words them anew.

    It grows while training goes on: `grow` draws chunk after chunk, each from a seed of its own, and keeps it on disk.
    """

    CHUNK = 256

    def __init__(self, folder: Path, vae: AutoencoderKL, seed: int, device: torch.device, shrink: int = 1) -> None:
        self.folder, self.vae, self.seed, self.device, self.shrink = folder, vae, seed, device, shrink
        self.items: dict[tuple[int, int], list[tuple[dict[str, Any], torch.Tensor]]] = {s: [] for s in SIZES}
        self.chunks = 0
        folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return sum(map(len, self.items.values()))

    def grow(self) -> None:
        """Add one chunk: eight in ten are square, one each wide and tall."""
        size = SIZES[{8: 1, 9: 2}.get(self.chunks % 10, 0)]
        path = self.folder / f"{self.chunks:04d}.pt"
        if path.exists():
            pictures, latents = torch.load(path)
        else:
            small = (size[0] // self.shrink, size[1] // self.shrink)
            pictures, pixels = draw(random.Random(f"{self.seed} pool {self.shrink} {self.chunks}"), self.CHUNK, small)
            latents = encode(self.vae, pixels, self.device)
            save(path, (pictures, latents))
        self.items[size].extend(zip(pictures, latents, strict=True))
        self.chunks += 1

    def batch(self, rng: random.Random, count: int, drop: float) -> tuple[torch.Tensor, list[str]]:
        """Return latents of one size and fresh captions, a share `drop` (0..1) of them empty."""
        size = rng.choices(SIZES, weights=[len(self.items[s]) for s in SIZES])[0]
        count = count if size == SIZES[0] else count * 2 // 3
        chosen = rng.choices(self.items[size], k=count)
        words = ["" if rng.random() < drop else describe(p, rng)[0] for p, _ in chosen]
        return torch.stack([z for _, z in chosen]).float(), words


class Painter(torch.nn.Module):
    """The two networks that are trained together."""

    def __init__(self, tokenizer: CLIPTokenizer, device: torch.device) -> None:
        super().__init__()
        self.text, self.unet = new_text_encoder(tokenizer), new_unet()
        if device.type == "cpu":
            # On a CPU the fused attention's backward pass takes three times as long as the plain one's at these sizes.
            self.unet.set_attn_processor(AttnProcessor())
            self.text.set_attn_implementation("eager")

    def forward(self, x: torch.Tensor, t: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return the predicted velocity."""
        return self.unet(x, t, self.text(ids)[0]).sample


Noised = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def noised(scheduler: DDIMScheduler, z: torch.Tensor, ids: torch.Tensor) -> Noised:
    """Return noisy latents, their times, the words, the velocities to predict and the weight of each cell.

    The weight is min-SNR with gamma 5 (Hang et al. 2023, arXiv:2303.09556). At zero SNR that is zero, yet sampling starts
    there, and there grounds and places are settled, so it never falls below 0.5. Late times (high noise) come oftener for
    the same reason. Cells that differ from the ground weigh more, or the few that hold a shape would hardly count.
    """
    # Stratified times: one in each of len(z) equal spans, which steadies the gradient at no cost.
    spread = (torch.randperm(len(z)) + torch.rand(len(z))) / len(z)
    t = (spread ** 0.75 * 1000).long().clamp(0, 999).to(z.device)
    noise = torch.randn_like(z)
    alpha = scheduler.alphas_cumprod.to(z.device)[t][:, None, None, None]
    # Guidance overshoots in the first steps: it multiplies how far the picture is from the mean one. So some noisy latents
    # show their picture up to 7 times too strong; the answer is the true one all the same, and later steps mend the colours.
    over = 6 * torch.rand(len(z), 1, 1, 1, device=z.device) * (torch.rand(len(z), 1, 1, 1, device=z.device) < 0.4)
    x = alpha.sqrt() * (1 + over * (1 - alpha) ** 4) * z + (1 - alpha).sqrt() * noise
    v = alpha.sqrt() * noise - (1 - alpha).sqrt() * (1 - alpha * over * (1 - alpha) ** 3) * z  # so that sqrt(a) x - sqrt(1-a) v = z
    snr = (alpha / (1 - alpha)).flatten()
    weight = (snr.clamp(max=5.0) / (snr + 1)).clamp(min=0.5)
    ground = z.flatten(2).median(-1).values[:, :, None, None]
    figure = 1 + 3 * ((z - ground).norm(dim=1, keepdim=True) > 0.8).float()
    weight = weight[:, None, None, None] * figure / figure.mean((1, 2, 3), keepdim=True)
    return x.contiguous(memory_format=torch.channels_last), t, ids, v, weight


def backward(net: Painter, part: Noised, total: int) -> float:
    """Add the gradient of a part of a batch of `total` pictures, and return its share of the mean loss."""
    x, t, ids, v, weight = part
    with autocast(x.device):
        out = net(x, t, ids).float()
    loss = (weight * F.mse_loss(out, v, reduction="none")).mean((1, 2, 3)).sum() / total
    loss.backward()
    return loss.item()


# ---- stage 2: the words ----------------------------------------------------------------------------------------------

#: What a caption may say, and the answers there are.
QUESTIONS: dict[str, tuple[Any, ...]] = {
    "kind": ("single", "pair", "scene"), "ground": tuple(PALETTE), "color": tuple(PALETTE), "shape": SHAPES, "place": tuple(PLACES),
    "size": tuple(SIZE_WORDS), "color2": tuple(PALETTE), "shape2": SHAPES, "time": TIMES, "land": ("hills", "sea", "shore"),
    "trees": (0, 1, 2, 3), "house": (False, True), "boat": (False, True), "stars": (False, True), "light": (False, True)}


def facts(p: dict[str, Any]) -> list[int]:
    """Return the index of the right answer to each of `QUESTIONS`, -100 where the question makes no sense."""
    known: dict[str, Any] = {"kind": p["kind"]}
    if p["kind"] == "scene":
        known |= {"time": p["time"], "land": p["land"], "trees": len(p["trees"])}
        known |= {name: p[name] is not None and p[name] != [] for name in ("house", "boat", "stars", "light")}
    else:
        known |= {"ground": p["ground"]}
        for mark, item in zip(("", "2"), p["shapes"], strict=False):
            known |= {name + mark: item[name] for name in ("color", "shape")}
        known |= {"place": p["shapes"][0]["place"], "size": p["shapes"][0]["size"]}
    return [answers.index(known[name]) if name in known else -100 for name, answers in QUESTIONS.items()]


def train_words(args: argparse.Namespace, tokenizer: CLIPTokenizer, device: torch.device) -> None:
    """Teach the text encoder to tell what a caption says, before it guides any drawing, and save it as ``words.pt``.

    Learnt through the denoiser's noisy gradients alone this takes most of the training; here it takes minutes. The answers
    are read from the pooled words by one linear map each, so the denoiser finds them laid out plainly.
    """
    path = args.run / "words.pt"
    if path.exists():
        return
    torch.manual_seed(args.seed)
    net = Painter(tokenizer, device).to(device)
    pool = net.unet.add_embedding
    heads = torch.nn.ModuleDict({k: torch.nn.Linear(pool.proj.out_features, len(v)) for k, v in QUESTIONS.items()}).to(device)
    parts = torch.nn.ModuleList([net.text, pool, heads])
    opt = torch.optim.AdamW(parts.parameters(), lr=args.words_lr, betas=(0.9, 0.98), weight_decay=0.01)
    bar = Progress("words", 0, args.words_steps)
    for step in range(args.words_steps):
        rng = random.Random(f"{args.seed} words {step}")
        pictures = [sample(rng) for _ in range(128)]
        ids = tokens(tokenizer, [describe(p, rng)[0] for p in pictures]).to(device)
        right = torch.tensor([facts(p) for p in pictures], device=device)
        for group in opt.param_groups:
            group["lr"] = args.words_lr * warm_cosine(step, args.words_steps, 50)
        with autocast(device):
            pooled = F.silu(pool(net.text(ids)[0]))
            answers = [heads[name](pooled).float() for name in QUESTIONS]
        loss = torch.stack([F.cross_entropy(a, r) for a, r in zip(answers, right.T, strict=True)]).nansum()
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        opt.step()
        shares = [(a.argmax(-1) == r)[r >= 0].float().mean().item() for a, r in zip(answers, right.T, strict=True)]
        said = " ".join(f"{name} {share:.0%}" for name, share in zip(QUESTIONS, shares, strict=True) if name in "color shape2 place trees")
        bar.show(step + 1, f"loss {loss.item():.3f} {said}")
    save(path, {"text": net.text.state_dict(), "pool": pool.state_dict()})


def tokens(tokenizer: CLIPTokenizer, words: list[str]) -> torch.Tensor:
    """Return captions as token ids of shape (count, MAX_TOKENS)."""
    return tokenizer(words, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt").input_ids


# ---- stage 3: text encoder and denoiser ------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

    Takes matrices and convolutions (as matrices of outputs by the rest). The step is scaled to the size that AdamW's would
    have (Liu et al. 2025, arXiv:2502.16982), so that one learning rate serves both.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take one step."""
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                flat = p.grad.lerp(buffer, group["momentum"]).flatten(1)
                update = orthogonal(flat).view_as(p) * (0.2 * math.sqrt(max(flat.shape)))
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def orthogonal(g: torch.Tensor) -> torch.Tensor:
    """Return the nearest matrix with singular values near 1, by five steps of a quintic Newton-Schulz iteration."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = (x / (x.norm() + 1e-7)).bfloat16()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.T if g.shape[0] > g.shape[1] else x).to(g.dtype)


class Twins:
    """Copies of a network that share its weights, each with gradients of its own, one for each processor core.

    One thread a copy beats many threads inside each small operation, above all when other work keeps the cores busy.
    """

    def __init__(self, net: Painter, count: int) -> None:
        self.nets = [net, *(copy.deepcopy(net) for _ in range(count - 1))]
        for twin in self.nets[1:]:
            for mine, shared in zip(twin.parameters(), net.parameters(), strict=True):
                mine.data = shared.data
        self.threads = ThreadPoolExecutor(count)

    def backward(self, batch: Noised) -> float:
        """Split the batch, gather all gradients in the first copy, and return the mean loss."""
        total, count = len(batch[0]), len(self.nets)
        parts = list(zip(*(tensor.chunk(count) for tensor in batch), strict=True))
        losses = list(self.threads.map(backward, self.nets, parts, [total] * count))
        for twin in self.nets[1:]:
            for first, other in zip(self.nets[0].parameters(), twin.parameters(), strict=True):
                if other.grad is not None:
                    first.grad.add_(other.grad)
                    other.grad = None
        return sum(losses)


class Painting:
    """The training of text encoder and denoiser: the networks, their moving average, the optimizer, and how far it is."""

    def __init__(self, args: argparse.Namespace, tokenizer: CLIPTokenizer, device: torch.device) -> None:
        torch.manual_seed(args.seed)
        self.args, self.tokenizer, self.device, self.path = args, tokenizer, device, args.run / "unet.pt"
        self.net = Painter(tokenizer, device).to(device, memory_format=torch.channels_last)
        if args.start:
            self.net.text.load_state_dict(CLIPTextModel.from_pretrained(args.start / "text_encoder").state_dict())
            self.net.unet.load_state_dict(UNet2DConditionModel.from_pretrained(args.start / "unet").state_dict())
        else:
            words = torch.load(args.run / "words.pt", map_location=device)
            self.net.text.load_state_dict(words["text"]), self.net.unet.add_embedding.load_state_dict(words["pool"])
        self.mean = copy.deepcopy(self.net).requires_grad_(False)
        self.scheduler, self.step = new_scheduler(), 0
        self.opts = self.optimizers()
        if self.path.exists():
            state = torch.load(self.path, map_location=device)
            for name in ("net", "mean"):
                getattr(self, name).load_state_dict(state[name])
            for opt, kept in zip(self.opts, state["opts"], strict=True):
                opt.load_state_dict(kept)
            self.step = state["step"]
        self.twins = Twins(self.net, args.threads if device.type == "cpu" else 1)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return Muon for the denoiser's matrices and AdamW for the rest; what can read already learns more slowly."""
        reading = dict.fromkeys((*self.net.text.parameters(), *self.net.unet.add_embedding.parameters()))  # in order, or no run resumes
        edges = {self.net.unet.conv_in.weight, self.net.unet.conv_out.weight}
        inner = [p for p in self.net.unet.parameters() if p.ndim > 1 and p not in edges and p not in reading]
        rest = [p for p in self.net.unet.parameters() if p not in {*inner} and p not in reading]
        adam = [{"params": rest, "scale": 1.0}, {"params": list(reading), "scale": 0.2}]
        muon = [{"params": inner, "scale": 2.0}]
        return [Muon(muon, self.args.lr), torch.optim.AdamW(adam, self.args.lr, betas=(0.9, 0.98), weight_decay=0.01)]

    def save(self) -> None:
        """Write the checkpoint that a later run resumes from."""
        parts = {name: getattr(self, name).state_dict() for name in ("net", "mean")}
        save(self.path, {**parts, "opts": [opt.state_dict() for opt in self.opts], "step": self.step})

    def train_step(self, pool: Pool, batch: int) -> float:
        """Take one step on fresh captions, and return the loss; what it draws depends on the seed and the step alone."""
        rng = random.Random(f"{self.args.seed} unet {self.step}")
        torch.manual_seed(self.args.seed + self.step)
        z, words = pool.batch(rng, batch, 0.1)
        ids = tokens(self.tokenizer, words)
        for opt in self.opts:
            opt.zero_grad()
            for group in opt.param_groups:
                group["lr"] = self.args.lr * group["scale"] * warm_cosine(self.step, self.args.steps, 100)
        loss = self.twins.backward(noised(self.scheduler, z.to(self.device), ids.to(self.device)))
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for opt in self.opts:
            opt.step()
        self.step += 1
        follow(self.mean, self.net, min(self.args.ema, (1 + self.step) / (20 + self.step)))
        return loss


def train_unet(args: argparse.Namespace, vae: AutoencoderKL, tokenizer: CLIPTokenizer, device: torch.device) -> None:
    """Train the denoiser and the text encoder; save and export every few minutes.

    The first `small_steps` see pictures of half the size, which cost a quarter: words, colours and places are learnt there.
    """
    painting = Painting(args, tokenizer, device)
    torch.set_num_threads(1)
    pools = {n: Pool(args.run / f"pool{n}", vae, args.seed, device, n) for n in (1, 2)}
    bar, saved, exported, noted = Progress("unet", painting.step, args.steps), time.monotonic(), time.monotonic(), 0.0
    while painting.step < args.steps:
        small = painting.step < args.small_steps
        pool, since = pools[2 if small else 1], painting.step - (0 if small else args.small_steps)
        while len(pool) < min(args.pool, args.first_pool + since * args.growth):
            torch.set_num_threads(args.threads)
            pool.grow()
            torch.set_num_threads(1)
        loss = painting.train_step(pool, args.batch * (2 if small else 1))
        noted = loss if not noted else 0.98 * noted + 0.02 * loss
        bar.show(painting.step, f"loss {noted:.4f} pool {len(pool)}{' small' if small else ''}")
        last = painting.step == args.steps
        if last or time.monotonic() - saved > args.save_s:
            painting.save()
            saved = time.monotonic()
        if last or time.monotonic() - exported > args.export_s:
            export(args.out, vae, painting.mean, tokenizer)
            exported = time.monotonic()


def follow(mean: torch.nn.Module, net: torch.nn.Module, keep: float) -> None:
    """Move the averaged weights towards the trained ones; `keep` (0..1) is the share that stays."""
    with torch.no_grad():
        torch._foreach_lerp_(list(mean.parameters()), list(net.parameters()), 1 - keep)


# ---- stage 4: the folder ---------------------------------------------------------------------------------------------

def export(out: Path, vae: AutoencoderKL, net: Painter, tokenizer: CLIPTokenizer) -> None:
    """Write the Diffusers folder in float16, whole or not at all; the model card and other files in it stay."""
    work = out.with_name(out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    pipe = StableDiffusionPipeline(
        vae=copy.deepcopy(vae).half(), text_encoder=copy.deepcopy(net.text).half(),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer.name_or_path),  # afresh: `tokenizer` has kept the padding it was used with
        unet=copy.deepcopy(net.unet).half(), scheduler=new_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)
    pipe.save_pretrained(work, safe_serialization=True)
    # Both forms of the tokenizer, because older releases read the first and newer ones the second.
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(Path(tokenizer.name_or_path) / name, work / "tokenizer" / name)
    if (out / "README.md").exists():
        shutil.copy(out / "README.md", work / "README.md")
    # The weights are stored in float16 but meant to be read as float32 unless the caller says otherwise: transformers 5 would
    # keep the stored type and diffusers would not, and the two halves would not fit.
    config = work / "text_encoder" / "config.json"
    settings = json.loads(config.read_text("utf-8"))
    config.write_text(json.dumps({**settings, "dtype": "float32", "torch_dtype": "float32"}, indent=2) + "\n", "utf-8")
    for path in work.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    shutil.rmtree(out, ignore_errors=True)
    work.replace(out)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=Path, default=Path("run"), help="folder of checkpoints and latents")
    p.add_argument("--out", type=Path, default=Path("colab_gpu/demo_model"), help="Diffusers folder to write")
    p.add_argument("--start", type=Path, help="Diffusers folder of a finished model to train further")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    p.add_argument("--vae-steps", type=int, default=2400)
    p.add_argument("--encoder-steps", type=int, default=480, help="of the autoencoder's steps, how many train the encoder too")
    p.add_argument("--vae-batch", type=int, default=9)
    p.add_argument("--vae-lr", type=float, default=6e-4)
    p.add_argument("--decoder-steps", type=int, default=2000, help="steps of the decoder alone, after the autoencoder's")
    p.add_argument("--decoder-lr", type=float, default=1.5e-3)
    p.add_argument("--words-steps", type=int, default=800)
    p.add_argument("--words-lr", type=float, default=1e-3)
    p.add_argument("--steps", type=int, default=9500)
    p.add_argument("--small-steps", type=int, default=1900, help="of the steps, how many first see pictures of half the size")
    p.add_argument("--batch", type=int, default=32, help="pictures a step; twice as many at half the size")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--ema", type=float, default=0.998)
    p.add_argument("--pool", type=int, default=40000, help="pictures at most in the latent pool")
    p.add_argument("--first-pool", type=int, default=5000, help="pictures before the first step")
    p.add_argument("--growth", type=float, default=1.0, help="pictures added a step; encoding one takes as long as learning from it")
    p.add_argument("--save-s", type=float, default=120, help="seconds between checkpoints")
    p.add_argument("--export-s", type=float, default=300, help="seconds between exports")
    p.add_argument("--weights", choices=("mean", "net"), default="mean",
                   help="what the export stage writes: the moving average, or the weights of the last step")
    p.add_argument("--stage", choices=("vae", "words", "unet", "export"), default="unet", help="stop after this stage; export trains nothing")
    return p.parse_args()


def main() -> None:
    """Run the stages that are still to do."""
    args = arguments()
    if args.stage == "export":
        missing = [name for name in ("unet.pt", *(() if args.start else ("vae.pt", "decoder.pt"))) if not (args.run / name).exists()]
        if missing:
            sys.exit(f"{args.run} holds nothing to export: {', '.join(missing)} is missing. Train first, without --stage export.")
    args.run.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.start and not (args.run / "tokenizer").exists():
        shutil.copytree(args.start / "tokenizer", args.run / "tokenizer")
    tokenizer = new_tokenizer(args.run / "tokenizer")
    if args.stage in ("words", "unet") and not args.start:
        train_words(args, tokenizer, device)
    if args.stage == "words":
        return
    vae = finished_vae(args.start, device) if args.start else train_vae(args, device)
    if args.stage == "unet":
        train_unet(args, vae, tokenizer, device)
    if args.stage == "export":
        net = Painter(tokenizer, torch.device("cpu"))
        net.load_state_dict(torch.load(args.run / "unet.pt", map_location="cpu")[args.weights])
        export(args.out, vae, net, tokenizer)


if __name__ == "__main__":
    main()
