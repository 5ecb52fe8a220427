"""ADRPO for text-to-image: fine-tune Stable Diffusion 3 on a reward, each sample with its own
divergence weight.

Adaptive Divergence Regularized Policy Optimization (NeurIPS 2025, arXiv 2510.18053), eq. 6: the
divergence weight of a sample is `beta0 - A`, where A is its advantage over the other samples of its
prompt. In the same file, measured alike: ORW-CFM-W2 (ICLR 2025, arXiv 2502.06061),
RAFT (arXiv 2304.06767) and Diffusion-DPO in its flow-matching form (arXiv 2311.12908). Any Stable
Diffusion 3 checkpoint of diffusers will do: SD3 medium, SD3.5 medium and large, or a small one.

    x_t = (1 - s) x1 + s noise     x1 a sample of the previous policy; diffusers counts time s from
                                   image to noise
    u   = noise - x1               the velocity of that path, and what the transformer predicts
    A   = R(x1, c) - mean of R over the group of the same prompt c
    L   = A |v(x_t) - u|^2 + (beta0 - A) |v(x_t) - v_ref(x_t)|^2     mean over a sample's elements

One iteration: roll out --group-size images for each of --prompts-per-update prompts, score them,
then --updates-per-iteration optimiser steps, each on all of them. The policy is a LoRA; with the
LoRA switched off the same network is the reference, so there is one copy of the model. The previous
policy is the weights at rollout time.

Where this departs from the paper, or the paper is silent:
- A is divided by the batch's standard deviation (--adv-norm global) and clipped to +-k beta0, in
  both terms: so beta0 and k mean the same for every reward. --adv-norm none --adv-clip-k None is
  eq. 6 to the letter.
- Rollouts and evaluation use guidance, the loss compares velocities without it.
- DPO's pairs are drawn from the base model, afresh at each iteration, not from a stored set;
  --dpo-online draws them from the policy. RAFT and DPO repeat their picks, so that every method
  trains on the same number of points.
- What the paper does not publish (learning rate, group, resolution, steps) follows flow_grpo's SD3
  recipe.

    python adrpo_fm_sd3.py --prompts prompts.txt --reward clip
    python adrpo_fm_sd3.py --prompts prompts.txt --rollout-batch 8 --train-batch 2 \\
        --gradient-checkpointing  # small
    torchrun --nproc-per-node 8 adrpo_fm_sd3.py --prompts prompts.txt --reward pickscore clip \\
        --reward-weights 1 0.2
    python adrpo_fm_sd3.py --eval-only --lora runs/NAME/final --eval-prompts prompts.txt

Without a GPU: benchmark/mini_world_sd3.py makes a small trained world on which the same script
learns in minutes. Equations, metrics, results, time and memory: docs/adrpo_fm_sd3.md.
"""

import contextlib
import dataclasses
import errno
import functools
import gc
import importlib.util
import inspect
import json
import math
import os
import platform
import random
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import accelerate
import diffusers
import numpy as np
import open_clip
import peft
import torch
import torch.nn.functional as F
import transformers
import tyro
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from diffusers.training_utils import EMAModel, cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

SCRIPT = "adrpo_fm_sd3"
# With CLIP diversity: the paper's Table 1.
TABLE_METRICS = ("clip", "aesthetic", "blip", "imagereward", "pickscore")
AESTHETIC_URL = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
AESTHETIC_NAME = "sac+logos+ava1-l14-linearMSE.pth"
AESTHETIC_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
KEEP_CHECKPOINTS = 2


class InputError(ValueError):
    """Something the user gave cannot work. Its message is one line that names the flag and the
    remedy."""


def one_line(error: BaseException) -> str:
    """An exception's message on one line, or its type where it has none."""
    return " ".join(str(error).split())[:400] or type(error).__name__


@dataclasses.dataclass
class Args:
    # ----------------------------------------------------------------------------------- experiment
    output_dir: str = "runs"
    """folder that receives one sub-folder per run"""
    run_name: str | None = None
    """name of that sub-folder; default: script, method, seed and time"""
    seed: int = 1
    """seed of everything: LoRA, prompts, rollouts, times and the evaluation's noise"""
    cpu: bool = False
    """stay on the CPU; several processes there: torchrun --nproc-per-node N adrpo_fm_sd3.py
    --cpu"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16: frozen weights and matrix products in bfloat16; trained weights, latents, losses and
    autoencoder stay float32. auto: bf16 on a GPU that has units for it, else fp32"""
    resume: str | None = None
    """run folder to continue exactly from its newest checkpoint, or `latest`; the run's own flags
    are used"""
    eval_only: bool = False
    """no training: draw --eval-images images for each of --eval-prompts with any text-to-image
    pipeline of diffusers and write the row of the paper's Table 1 (JSON, Markdown, images)"""

    # ---------------------------------------------------------------------------------------- model
    model_id: str = "stabilityai/stable-diffusion-3-medium-diffusers"
    """Stable Diffusion 3 checkpoint in diffusers' layout, hub id or folder (gated on the hub:
    accept the licence there, then `hf auth login`); with --eval-only any text-to-image pipeline"""
    lora: str | None = None
    """--eval-only: LoRA folder or file (a run's final/) to load into the pipeline"""
    lora_rank: int = 32
    """rank of the LoRA (flow_grpo)"""
    lora_alpha: int = 64
    """its update is scaled by alpha / rank (flow_grpo)"""
    lora_targets: tuple[str, ...] = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )
    """ends of the names of the linear layers that get a LoRA: by default all attention projections
    (flow_grpo)"""
    full_finetune: bool = False
    """train all weights, in float32, beside a frozen copy as reference; needs a --learning-rate of
    about 1e-5. In bf16 the copy is rounded, so the divergence starts at that rounding instead of at
    0"""
    t5: bool = True
    """--no-t5 leaves SD3's largest text encoder out (9.5 GB in bf16) at some loss of prompt
    following"""
    max_sequence_length: int = 256
    """tokens of the T5 prompt, everywhere (diffusers' default). SD3 attends to the padding: sample
    with the same"""
    resolution: int = 512
    """height and width in pixels"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    compile: bool = False
    """torch.compile the transformer's blocks: minutes of start-up first (what it gains was not
    measured)"""
    vae_slicing: bool = False
    """decode images one by one: less memory"""
    vae_tiling: bool = False
    """decode images in tiles: less memory at high resolution, faint seams"""

    # -------------------------------------------------------------------------------------- prompts
    prompts: str = "shunk031/DrawBench@refs/convert/parquet"
    """training prompts: .txt (one a line), .jsonl (one object a line, other keys go to the reward
    as metadata), or a dataset of the hub, NAME or NAME@REVISION; default: DrawBench, as in the
    paper"""
    prompt_column: str | None = None
    """column of the prompt in .jsonl or dataset; default: the first of prompt, prompts, text,
    caption"""
    prompt_split: str | None = None
    """split of a hub dataset; default: its first"""
    eval_prompts: str | None = None
    """held-out prompts, given like --prompts; default: every tenth of --prompts, which is then not
    trained on"""
    eval_max_prompts: int = 32
    """the first so many of the held-out prompts are evaluated"""

    # -------------------------------------------------------------------------- rewards and metrics
    reward: tuple[str, ...] = ("clip",)
    """any of clip, pickscore, blip, aesthetic, imagereward, path.py:function with
    function(images, prompts, metadata) -> one float per image; images are float [B,3,H,W] in [0,1],
    metadata a list of dicts"""
    reward_weights: tuple[float, ...] | None = None
    """weight of each in the sum that is maximised; default: 1 each. Their scales differ (clip 30,
    aesthetic 5.5, pickscore 21, imagereward 1, blip .5; spread within a prompt is what counts)"""
    eval_metrics: tuple[str, ...] | None = None
    """what evaluations measure beside the rewards, same names; default: nothing more (--eval-only:
    the five of the paper's Table 1). A metric that is not trained on shows whether the reward was
    earned or fooled"""
    clip_model: str = "ViT-L-14"
    """open_clip architecture of `clip` and CLIP diversity, or local-dir:FOLDER with open_clip's
    config and weights"""
    clip_pretrained: str | None = "openai"
    """its weights: a tag of open_clip or a file; unused with local-dir:"""
    pickscore_model: str = "yuvalkirstain/PickScore_v1"
    """hub id or folder of pickscore's CLIP"""
    pickscore_processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """hub id or folder of its tokenizer and image processor"""
    blip_model: str = "Salesforce/blip-itm-large-coco"
    """hub id or folder of blip: cosine of the projected features. Not the checkpoint behind the
    paper's BLIP column"""
    imagereward_model: str = "RE-N-Y/ImageReward"
    """hub id or folder for the package imscore (pip install imscore), only imported when
    imagereward is asked for"""
    aesthetic_weights: str | None = None
    """LAION's sac+logos+ava1-l14-linearMSE.pth; default: downloaded to torch's cache and checked.
    Needs ViT-L-14"""

    # -------------------------------------------------------------------------------------- rollout
    prompts_per_update: int = 8
    """prompts per iteration, over all processes; a multiple of their number. Few make the update
    noisy"""
    group_size: int = 16
    """images per prompt. Their mean reward is the baseline: below 4 it is noise"""
    num_steps: int = 10
    """Euler steps of a rollout (flow_grpo)"""
    guidance_scale: float = 4.5
    """classifier-free guidance of rollouts and evaluation (flow_grpo); 1 = none, at half the
    cost"""
    rollout_batch: int = 16
    """images rolled out, decoded and scored at once, per process; changes memory and speed, not the
    result"""

    # ---------------------------------------------------------------------------------- fine-tuning
    method: Literal["adrpo", "orw", "raft", "dpo"] = "adrpo"
    """orw with --alpha 0 has no divergence term (collapses), else it is ORW-CFM-W2"""
    iterations: int = 300
    """rollouts, each with its updates"""
    updates_per_iteration: int = 2
    """optimiser steps on one rollout, each on all its images with fresh times and noise (flow_grpo:
    2)"""
    timesteps_per_sample: int = 2
    """points (s, noise) per image in each of these steps. More: less noise in the gradient, more
    time"""
    timestep_distribution: Literal["uniform", "logit-normal"] = "uniform"
    """of s: uniform as eq. 6, or sigmoid of a standard normal, as SD3 was trained"""
    share_noise: bool = False
    """one (s, noise) for all images of a prompt: their differences are then due to the images
    alone"""
    train_batch: int = 4
    """points per forward and backward pass, per process; changes memory and speed, not the
    result"""
    learning_rate: float = 3e-4
    """AdamW (flow_grpo's for LoRA); lower it if gradients or W2 run away"""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """after five iterations of warm-up: constant, or a cosine to zero"""
    weight_decay: float = 1e-4
    """AdamW (flow_grpo)"""
    max_grad_norm: float = 1.0
    """gradient norm clip (flow_grpo)"""
    ema_decay: float = 0.0
    """above 0: a moving average of the LoRA, of this decay per update, draws the rollouts, is
    evaluated and saved"""

    # ---------------------------------------------------------------------------------------- adrpo
    beta0: float = 0.25
    """baseline divergence weight (ours, for A in units of its standard deviation). |A|/beta0 is how
    far the target velocity is extrapolated from the reference: the true strength of the method.
    Smaller: more reward, more drift"""
    adv_clip_k: float | None = 4.0
    """clip A to +-k beta0, in both terms; None = no clip. k bounds the extrapolation (ours: 4)"""
    adv_norm: Literal["none", "group", "global"] = "global"
    """divide A by no / the group's / the whole batch's standard deviation before clipping. none
    (eq. 6) needs a beta0 that fits the reward's scale"""

    # ------------------------------------------------------------------------------------ baselines
    tau: float = 1.0
    """orw: weight exp(tau R), of mean 1 in each group; R in units of the batch's standard deviation
    (ours: the same for every reward)"""
    alpha: float = 1.0
    """orw: fixed divergence weight"""
    beta_dpo: float = 100.0
    """dpo: inverse temperature (flow_grpo's SD3 preset). Smaller: further from the base model"""
    dpo_online: bool = False
    """dpo: draw the pairs from the policy instead of the base model"""

    # ---------------------------------------------------------------------- evaluation, checkpoints
    eval_every: int = 20
    """iterations between evaluations on fixed noise"""
    eval_images: int = 4
    """images per held-out prompt; at least 2, for the diversity"""
    eval_steps: int = 28
    """Euler steps in evaluation (SD3's default)"""
    save_every: int = 20
    """iterations between checkpoints"""


# ------------------------------------------------------------------------------------------ rewards
# Each reward is a function (images [B,3,H,W] in [0,1], prompts, metadata) -> B floats, made once
# with its model.


def resize(images: Tensor, size: int, mean: list[float], std: list[float]) -> Tensor:
    """What CLIP's and BLIP's processors do, on tensors: shorter side to `size`, bicubic; centre
    crop; normalise."""
    images = TF.resize(images, [size], TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    return TF.normalize(TF.center_crop(images, [size, size]), list(mean), list(std))


class Clip:
    """An open_clip model: images [B,3,H,W] in [0,1] -> features [B,D], prompts -> unit features
    [B,D]."""

    def __init__(self, name: str, pretrained: str | None, device: torch.device):
        pretrained = None if name.startswith("local-dir:") else pretrained
        quick = bool(
            pretrained and (open_clip.get_pretrained_cfg(name, pretrained) or {}).get("quick_gelu")
        )
        # OpenAI's weights were trained with another GELU than the architecture of the same name
        # has.
        try:
            model = open_clip.create_model(name, pretrained, device=device, force_quick_gelu=quick)
            self.tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:
            remedy = "see open_clip.list_pretrained(), or give local-dir:FOLDER"
            raise InputError(
                f"--clip-model {name} --clip-pretrained {pretrained}: {one_line(error)}; {remedy}"
            ) from error
        self.model, self.device = model.eval().requires_grad_(False), device
        config = open_clip.get_model_preprocess_cfg(model)
        size = config["size"][0] if isinstance(config["size"], (tuple, list)) else config["size"]
        self.preprocess = functools.partial(
            resize, size=size, mean=config["mean"], std=config["std"]
        )

    def image(self, images: Tensor) -> Tensor:
        return self.model.encode_image(self.preprocess(images)).float()

    def text(self, prompts: list[str]) -> Tensor:
        unique = list(dict.fromkeys(prompts))  # a group repeats its prompt: encode it once
        features = self.model.encode_text(
            self.tokenizer(unique).to(self.device), normalize=True
        ).float()
        return features[[unique.index(prompt) for prompt in prompts]]


def clip_reward(clip: Clip) -> Callable:
    """CLIP score: 100 cos(image, prompt)."""
    return lambda images, prompts, metadata: (
        100 * (F.normalize(clip.image(images)) * clip.text(prompts)).sum(1)
    )


def pickscore_reward(model_id: str, processor_id: str, device: torch.device) -> Callable:
    """PickScore (arXiv 2305.01569): temperature * cos, about 20 to 23."""
    model = transformers.CLIPModel.from_pretrained(model_id).float().to(device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(processor_id)
    config = transformers.AutoImageProcessor.from_pretrained(processor_id)

    def pickscore(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        pixels = resize(
            images, model.config.vision_config.image_size, config.image_mean, config.image_std
        )
        tokens = tokenizer(
            prompts, padding=True, truncation=True, max_length=77, return_tensors="pt"
        ).to(device)
        image = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output)
        text = F.normalize(model.get_text_features(**tokens).pooler_output)
        return model.logit_scale.exp() * (image * text).sum(1)

    return pickscore


def blip_reward(model_id: str, device: torch.device) -> Callable:
    """BLIP (arXiv 2201.12086): cosine of the projected image and text features."""
    model = (
        transformers.BlipForImageTextRetrieval.from_pretrained(model_id).float().to(device).eval()
    )
    processor = transformers.AutoProcessor.from_pretrained(model_id)

    def blip(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        size, config = model.config.vision_config.image_size, processor.image_processor
        pixels = TF.normalize(
            TF.resize(images, [size, size], TF.InterpolationMode.BICUBIC, antialias=True).clamp(
                0, 1
            ),
            config.image_mean,
            config.image_std,
        )  # BLIP squeezes to a square, it does not crop
        tokens = processor.tokenizer(
            prompts, padding=True, truncation=True, max_length=35, return_tensors="pt"
        )
        similarity = model(
            input_ids=tokens.input_ids.to(device),
            attention_mask=tokens.attention_mask.to(device),
            pixel_values=pixels,
            use_itm_head=False,
        )[0]  # [B images, B texts]
        return similarity.diagonal()

    return blip


def aesthetic_reward(clip: Clip, path: str | None, device: torch.device) -> Callable:
    """LAION's aesthetic predictor, 1 to 10: linear layers 768-1024-128-64-16-1 on unit CLIP
    ViT-L/14 image features."""
    if path is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / AESTHETIC_NAME
        if not path.is_file():
            socket.setdefaulttimeout(60)
            path.parent.mkdir(parents=True, exist_ok=True)
            url = AESTHETIC_URL + AESTHETIC_NAME.replace("+", "%2B")
            torch.hub.download_url_to_file(url, str(path), hash_prefix=AESTHETIC_SHA256)
    weights = torch.load(path, map_location=device, weights_only=True)
    layers = [(weights[f"layers.{i}.weight"], weights[f"layers.{i}.bias"]) for i in (0, 2, 4, 6, 7)]
    width = clip.image(torch.zeros(1, 3, 8, 8, device=device)).shape[1]
    if width != layers[0][0].shape[1]:
        raise InputError(
            f"--clip-model: aesthetic needs ViT-L-14's 768 features, this model has {width}"
        )

    def aesthetic(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        x = F.normalize(clip.image(images))
        for weight, bias in layers:
            x = F.linear(x, weight, bias)
        return x[:, 0]

    return aesthetic


def imagereward_reward(model_id: str, device: torch.device) -> Callable:
    """ImageReward (arXiv 2304.05977), in imscore's port."""
    try:
        from imscore.imreward.model import ImageReward  # optional dependency
    except ImportError as error:
        raise InputError(
            f"--reward imagereward: {error}; pip install imscore timm, or leave it out"
        ) from error
    tokenizer = transformers.BertTokenizer
    # Gone in transformers 5; imscore 0.0.11 asks for it.
    if not hasattr(tokenizer, "additional_special_tokens_ids"):
        tokenizer.additional_special_tokens_ids = property(
            lambda self: self.convert_tokens_to_ids(["[ENC]"])
        )
    model = ImageReward.from_pretrained(model_id).to(device).eval()
    return lambda images, prompts, metadata: model.score(images, prompts).flatten()


def plugin_reward(spec: str) -> Callable:
    """The function of path.py:function."""
    path, _, name = spec.rpartition(":")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return getattr(module, name)


def reward_name(spec: str) -> str:
    """The tag of a reward: its name, or the plug-in's function."""
    return spec.rpartition(":")[2]


def build_rewards(
    args: Args, clip: Clip, specs: list[str], device: torch.device
) -> dict[str, Callable]:
    """One function per reward or metric, by its tag. Raises InputError, naming the flag, for one
    that cannot be had."""
    builders = {
        "clip": lambda: clip_reward(clip),
        "pickscore": lambda: pickscore_reward(
            args.pickscore_model, args.pickscore_processor, device
        ),
        "blip": lambda: blip_reward(args.blip_model, device),
        "aesthetic": lambda: aesthetic_reward(clip, args.aesthetic_weights, device),
        "imagereward": lambda: imagereward_reward(args.imagereward_model, device),
    }
    rewards, tags = {}, {}
    for spec in specs:
        flag = "--reward" if spec in args.reward and not args.eval_only else "--eval-metrics"
        path = Path(spec.rpartition(":")[0])
        if spec not in builders and not (path.suffix == ".py" and path.is_file()):
            raise InputError(
                f"{flag} {spec}: unknown; give {', '.join(builders)} or path.py:function"
            )
        if tags.setdefault(reward_name(spec), spec) != spec:
            raise InputError(
                f"{flag} {spec}: {tags[reward_name(spec)]} has the same name; rename the function"
            )
        try:
            rewards[reward_name(spec)] = (
                builders[spec]() if spec in builders else plugin_reward(spec)
            )
        except InputError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            source = (
                f"--{spec}-model" if spec in ("pickscore", "blip", "imagereward") else "its file"
            )
            raise InputError(
                f"{flag} {spec}: cannot be loaded ({reason}); check {source}"
            ) from error
    return rewards


@torch.no_grad()
def score(
    name: str, function: Callable, images: Tensor, prompts: list[str], metadata: list[dict]
) -> Tensor:
    """One reward of images [B,3,H,W] -> float32 [B] on their device.

    Raises InputError when it fails, or returns another number of values or one that is not
    finite."""
    flag = "--reward or --eval-metrics"
    try:
        values = function(images, prompts, metadata)
        rewards = torch.as_tensor(values, dtype=torch.float32, device=images.device).detach()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = (
            f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: "
            f"{one_line(error)}"
        )
        raise InputError(f"{flag} {name}: raised {where}") from error
    if rewards.shape != (len(images),):
        raise InputError(
            f"{flag} {name}: returned shape {list(rewards.shape)} for {len(images)} images"
        )
    bad = (~rewards.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise InputError(
            f"{flag} {name}: returned {rewards[bad[0]]} for the prompt {prompts[bad[0]]!r}"
        )
    return rewards


# --------------------------------------------------------------------------------------------- data


def load_rows(
    flag: str, spec: str, column: str | None, split: str | None
) -> tuple[list[str], list[dict]]:
    """Unique prompts of a .txt, a .jsonl or a hub dataset, in their order, and each one's other
    columns.

    Raises InputError for a source that cannot be read, has no such column or no prompt."""
    path = Path(spec)
    try:
        if path.suffix == ".txt":
            rows = [{"prompt": line} for line in path.read_text(encoding="utf-8").splitlines()]
            column = None
        elif path.suffix in (".jsonl", ".json"):
            rows = [
                json.loads(line)
                for line in path.read_text(encoding="utf-8").splitlines()
                if line.strip()
            ]
        else:
            import datasets  # here, because it is slow to import and files do not need it

            name, _, revision = spec.partition("@")
            parts = datasets.load_dataset(name, revision=revision or None)
            rows = list(parts[split or next(iter(parts))])
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("every line must be a JSON object")
        found = list(dict.fromkeys(key for row in rows for key in row))
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(
            f"--{flag} {spec}: cannot be read ({reason}); give a .txt, .jsonl or hub dataset"
        ) from error
    column = column or next(
        (c for c in ("prompt", "prompts", "text", "caption") if c in found), "prompt"
    )
    unique = {}
    for row in rows:
        text = row.get(column)
        if isinstance(text, str) and text.strip():
            unique.setdefault(
                text.strip(), {key: value for key, value in row.items() if key != column}
            )
    if not unique:
        where = (
            f"no text in column {column} (columns: {', '.join(found)}); see --prompt-column"
            if found
            else "empty"
        )
        raise InputError(f"--{flag} {spec}: {where}")
    return list(unique), list(unique.values())


def load_prompts(args: Args) -> tuple[dict[str, dict], dict[str, dict], str]:
    """Training and held-out prompts with their metadata, and a sentence on how they relate. Raises
    InputError."""
    train = dict(
        zip(*load_rows("prompts", args.prompts, args.prompt_column, args.prompt_split), strict=True)
    )
    if args.eval_prompts:
        source = load_rows("eval-prompts", args.eval_prompts, args.prompt_column, args.prompt_split)
        heldout = dict(zip(*source, strict=True))
        common = len(train.keys() & heldout.keys())
        if common:
            note = (
                f"{common} of the {len(heldout)} evaluation prompts are training prompts: that is "
                "not held-out"
            )
        else:
            note = "none of the evaluation prompts is trained on"
    else:
        heldout = dict(list(train.items())[::10])
        train = {prompt: row for prompt, row in train.items() if prompt not in heldout}
        note = f"every tenth of --prompts ({len(heldout)}) is held out for evaluation"
        if not train:
            raise InputError(
                f"--prompts {args.prompts}: one prompt cannot be split; give --eval-prompts"
            )
    return train, dict(list(heldout.items())[: args.eval_max_prompts]), note


def draw_prompts(count: int, per_update: int, iteration: int, seed: int) -> list[int]:
    """Rows of the `per_update` prompts of an iteration: one pass after the other over all `count`,
    shuffled anew."""
    rows = []
    for position in range(iteration * per_update, (iteration + 1) * per_update):
        shuffled = np.random.default_rng([seed, position // count]).permutation(count)
        rows.append(int(shuffled[position % count]))
    return rows


# ------------------------------------------------------------------------------ model and reference


def read_model_index(model_id: str) -> dict:
    """model_index.json of a diffusers pipeline, hub id or folder. Raises InputError."""
    try:
        return DiffusionPipeline.load_config(model_id)
    except Exception as error:
        remedy = (
            f"give a folder, or accept the licence at https://huggingface.co/{model_id} and "
            "`hf auth login`"
        )
        if Path(model_id).is_dir():
            remedy = "it has no readable model_index.json: give the folder of a diffusers pipeline"
        raise InputError(
            f"--model-id {model_id}: cannot be loaded ({one_line(error)}); {remedy}"
        ) from error


def load_pipeline(args: Args, dtype: torch.dtype) -> StableDiffusion3Pipeline:
    """The checkpoint's parts on the CPU, all frozen: transformer and text encoders in `dtype`
    (transformer in float32 for full fine-tuning), autoencoder in float32. Raises InputError."""
    kind = read_model_index(args.model_id)["_class_name"]
    if kind != "StableDiffusion3Pipeline":
        remedy = "fine-tuning needs a StableDiffusion3Pipeline; --eval-only takes any"
        raise InputError(f"--model-id {args.model_id}: is a {kind}; {remedy}")
    dtypes = {
        "default": dtype,
        "vae": torch.float32,
        "transformer": torch.float32 if args.full_finetune else dtype,
    }
    without = {} if args.t5 else {"text_encoder_3": None, "tokenizer_3": None}
    try:
        pipe = StableDiffusion3Pipeline.from_pretrained(args.model_id, dtype=dtypes, **without)
    except Exception as error:
        raise InputError(
            f"--model-id {args.model_id}: cannot be loaded ({one_line(error)})"
        ) from error
    if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        kind = type(pipe.scheduler).__name__
        raise InputError(
            f"--model-id {args.model_id}: has a {kind}, must be FlowMatchEulerDiscreteScheduler"
        )
    step = pipe.vae_scale_factor * pipe.transformer.config.patch_size
    limit = (
        pipe.vae_scale_factor
        * pipe.transformer.config.pos_embed_max_size
        * pipe.transformer.config.patch_size
    )
    if args.resolution % step or not step <= args.resolution <= limit:
        raise InputError(
            f"--resolution {args.resolution}: must be a multiple of {step}, at most {limit}, here"
        )
    for part in (
        pipe.transformer,
        pipe.vae,
        pipe.text_encoder,
        pipe.text_encoder_2,
        pipe.text_encoder_3,
    ):
        if part is not None:
            part.requires_grad_(False).eval()
    return pipe


@torch.no_grad()
def encode_prompts(
    pipe: StableDiffusion3Pipeline,
    prompts: list[str],
    max_sequence_length: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Each prompt once: embeddings [N,L,D] and pooled [N,E], kept on the CPU. Frees the pipeline's
    text encoders."""
    encoders = [
        part
        for part in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
        if part is not None
    ]
    for encoder in encoders:
        encoder.to(device)
    embeds, pooled = [], []
    for start in tqdm(
        range(0, len(prompts), 16), "encode prompts", leave=False, disable=len(prompts) < 64
    ):
        part = prompts[start : start + 16]
        encoded = pipe.encode_prompt(
            part,
            None,
            None,
            device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        embeds.append(encoded[0].cpu())
        pooled.append(encoded[2].cpu())
    pipe.text_encoder = pipe.text_encoder_2 = pipe.text_encoder_3 = None
    del encoders, encoder
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cat(embeds), torch.cat(pooled)


@contextlib.contextmanager
def reference_policy(
    transformer: SD3Transformer2DModel, frozen: nn.Module | None
) -> Iterator[nn.Module]:
    """The reference: the same network with its LoRA switched off, or the frozen copy when all
    weights are trained."""
    if frozen is not None:
        yield frozen
        return
    transformer.disable_adapters()
    try:
        yield transformer
    finally:
        transformer.enable_adapters()


def velocity(
    transformer: nn.Module, x: Tensor, s: Tensor, condition: tuple[Tensor, Tensor]
) -> Tensor:
    """Velocity from image to noise, float32 [B,C,h,w], at latents x [B,C,h,w] and times s [B] in
    [0,1], without guidance; condition: embeddings [B,L,D] and pooled [B,E]."""
    embeds, pooled = condition
    return transformer(
        hidden_states=x,
        timestep=1000 * s,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        return_dict=False,
    )[0].float()


# ------------------------------------------------------------------------------------------ rollout


def sampling_times(
    scheduler: FlowMatchEulerDiscreteScheduler, num_steps: int, tokens: int
) -> Tensor:
    """The stock scheduler's times s from 1 to 0, [num_steps + 1]. `tokens`: image tokens, for
    dynamic shifting."""
    shift = {}
    if scheduler.config.get("use_dynamic_shifting"):
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        shift["mu"] = calculate_shift(tokens, *[scheduler.config[name] for name in names])
    scheduler.set_timesteps(num_steps, **shift)
    return scheduler.sigmas


@torch.no_grad()
def sample(
    transformer: nn.Module,
    noise: Tensor,
    times: Tensor,
    condition: tuple[Tensor, Tensor],
    empty: tuple[Tensor, Tensor],
    guidance_scale: float,
) -> Tensor:
    """Integrate dx/ds = v(x, s) from noise [B,C,h,w] at s = 1 to latents at s = 0, as diffusers'
    Euler scheduler does.

    With guidance both branches run in one forward pass: condition of the prompt ([B,L,D], [B,E])
    and of the empty prompt ([1,L,D], [1,E])."""
    x, guided = noise, guidance_scale > 1
    if guided:
        condition = tuple(
            torch.cat([e.expand_as(c), c]) for e, c in zip(empty, condition, strict=True)
        )
    for s, s_next in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        both = torch.cat([x, x]) if guided else x
        v = velocity(transformer, both, both.new_full((len(both),), s), condition)
        if guided:
            v_empty, v_prompt = v.chunk(2)
            v = v_empty + guidance_scale * (v_prompt - v_empty)
        x = x + (s_next - s) * v
    return x


@torch.no_grad()
def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """Latents [B,C,h,w] -> images [B,3,H,W] in [0,1], all in float32."""
    images = vae.decode(
        latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False
    )[0]
    return (images.float() / 2 + 0.5).clamp(0, 1)


def seed_everything(*numbers: int) -> torch.Generator:
    """Seed every global random state (a plug-in may draw from one) and return a CPU generator, all
    from `numbers`. Each iteration has a stream of its own, the same in every process, so a resumed
    run needs no stored random state."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def draw_points(
    generator: torch.Generator,
    shape: tuple[int, ...],
    distribution: str,
    groups: int,
    repeats: int,
    draws: int,
    group: int,
) -> tuple[Tensor, Tensor]:
    """Times s [n] and noise [n, *shape] of one update's n = groups * repeats * group points, on the
    CPU.

    In a group of `group` images only `draws` (s, noise) are drawn, neighbours share them: 1 = all
    share one, group / 2 = pairs, group = each its own. Order: prompt, repeat, image."""
    count, share = groups * repeats * draws, group // draws
    s = torch.rand(count, generator=generator)
    if distribution == "logit-normal":
        s = torch.randn(count, generator=generator).sigmoid()
    noise = torch.randn(count, *shape, generator=generator)
    return s.repeat_interleave(share), noise.repeat_interleave(share, dim=0)


def flow_matching_point(x1: Tensor, noise: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = (1 - s) x1 + s noise and its velocity u = noise - x1: x1, noise [B,C,h,w], s [B] -> two
    [B,C,h,w]."""
    return torch.lerp(x1, noise, s.view(-1, 1, 1, 1)), noise - x1


# --------------------------------------------------------------------------------------------- loss


def group_advantage(
    rewards: Tensor,
    beta0: float,
    clip_k: float | None = None,
    normalize: Literal["none", "group", "global"] = "none",
) -> Tensor:
    """Advantage of each sample over the others of its prompt (eq. 6: A = R - V, V the mean reward
    of the prompt).

    rewards [P,G] -> A [P,G], detached. `normalize` divides by the standard deviation of the group,
    or of all rewards; `clip_k` then clips to +-clip_k * beta0. Clipped here, once: the loss uses
    the same A in both of its terms."""
    advantage = rewards - rewards.mean(dim=1, keepdim=True)  # [P,G]
    if normalize == "group":
        advantage = advantage / (rewards.std(dim=1, keepdim=True) + 1e-4)
    elif normalize == "global":
        advantage = advantage / (rewards.std() + 1e-4)
    if clip_k is not None:
        advantage = advantage.clamp(-clip_k * beta0, clip_k * beta0)
    return advantage.detach()


def mean_square(difference: Tensor) -> Tensor:
    """Mean over a sample's elements of the squared difference: [B,...] -> [B]."""
    return difference.square().flatten(1).mean(1)


def adrpo_fm_loss(v: Tensor, v_ref: Tensor, u: Tensor, advantage: Tensor, beta0: float) -> Tensor:
    """ADRPO for flow matching (eq. 6): A |v - u|^2 + (beta0 - A) |v - v_ref|^2.

    v, v_ref, u [B,...], advantage [B] -> loss [B]. As a function of v its curvature is
    A + (beta0 - A) = beta0 whatever A is: it equals beta0 |v - v_star|^2 up to a constant, with
    v_star = v_ref + (A / beta0)(u - v_ref), and so is bounded below for bad samples too (ours, see
    the docs)."""
    return advantage * mean_square(v - u) + (beta0 - advantage) * mean_square(v - v_ref)


def orw_weights(rewards: Tensor, tau: float) -> Tensor:
    """ORW-CFM-W2's weights exp(tau R), normalised to mean 1 over each group: rewards [P,G] ->
    [P,G], detached."""
    return (torch.softmax(tau * rewards, dim=1) * rewards.shape[1]).detach()


def orw_fm_loss(v: Tensor, v_ref: Tensor, u: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """ORW-CFM-W2: w |v - u|^2 + alpha |v - v_ref|^2. v, v_ref, u [B,...], weight [B] -> loss
    [B]."""
    return weight * mean_square(v - u) + alpha * mean_square(v - v_ref)


def dpo_fm_loss(
    v_w: Tensor,
    v_w_ref: Tensor,
    u_w: Tensor,
    v_l: Tensor,
    v_l_ref: Tensor,
    u_l: Tensor,
    beta_dpo: float,
) -> Tensor:
    """Diffusion-DPO on the flow-matching errors e = mean |v - u|^2 of winners (w) and losers (l),
    which share noise and t: -log sigmoid(-beta_dpo / 2 [(e_w - e_w_ref) - (e_l - e_l_ref)]). All
    [B,...] -> loss [B]."""
    winner = mean_square(v_w - u_w) - mean_square(v_w_ref - u_w)
    loser = mean_square(v_l - u_l) - mean_square(v_l_ref - u_l)
    return -F.logsigmoid(-beta_dpo / 2 * (winner - loser))


def best_and_worst(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Positions in the flattened batch of each group's best and worst sample: rewards [P,G] -> two
    [P]."""
    offsets = torch.arange(len(rewards), device=rewards.device) * rewards.shape[1]
    return rewards.argmax(1) + offsets, rewards.argmin(1) + offsets


def training_samples(method: str, rewards: Tensor) -> Tensor:
    """Which samples each method trains on: rewards [P,G] -> positions in the flattened batch [P,G].

    adrpo, orw: all; raft: the group's best, repeated; dpo: best, worst, best, worst ... (G
    even)."""
    best, worst = best_and_worst(rewards)
    if method == "raft":
        return best[:, None].expand_as(rewards)
    if method == "dpo":
        return torch.stack([best, worst], dim=1).repeat(1, rewards.shape[1] // 2)
    return torch.arange(rewards.numel(), device=rewards.device).view_as(rewards)


# ----------------------------------------------------------------------------------------- evaluate


def pairwise_diversity(features: Tensor) -> Tensor:
    """Mean over the pairs i != j of one prompt of 1 - cosine(f_i, f_j): features [P,G,D] -> [P]
    (ours; the paper publishes no formula). The sum over all pairs of unit vectors is |sum_i f_i|^2:
    no [G,G] matrix is needed."""
    unit = F.normalize(features.float(), dim=-1)
    count = unit.shape[1]
    pair_sum = unit.sum(dim=1).square().sum(dim=-1) - unit.square().sum(
        dim=(1, 2)
    )  # [P], over ordered pairs i != j
    return 1 - pair_sum / (count * (count - 1))


def pairwise_distance(features: Tensor) -> Tensor:
    """Mean over the pairs of one prompt of |f_i - f_j|, features not normalised: [P,G,D] -> [P]
    (ours: with ViT-L/14 it has the scale of the paper's CLIP diversity, about 5)."""
    return torch.stack([torch.pdist(group).mean() for group in features.float()])


def summarise(
    values: dict[str, Tensor], features: Tensor, images_per_prompt: int
) -> dict[str, tuple[float, float]]:
    """Mean and standard error over prompts of every metric. values: name -> [N], features [N,D],
    prompt by prompt."""
    per_prompt = {name: value.view(-1, images_per_prompt).mean(1) for name, value in values.items()}
    groups = features.view(-1, images_per_prompt, features.shape[1])
    per_prompt |= {
        "clip_diversity": pairwise_diversity(groups),
        "clip_distance": pairwise_distance(groups),
    }
    error = {
        name: (v.std() / len(v) ** 0.5).item() if len(v) > 1 else math.nan
        for name, v in per_prompt.items()
    }
    return {name: (value.mean().item(), error[name]) for name, value in per_prompt.items()}


def my_share(count: int, rank: int, processes: int) -> list[int]:
    """Positions 0..count-1 that this process works on; all processes get equally many, the last
    ones some again, so that the gathered parts, cut to `count`, are in order."""
    size = math.ceil(count / processes)
    return [position % count for position in range(rank * size, (rank + 1) * size)]


@torch.no_grad()
def evaluate(
    draw: Callable[[list[int], Tensor, Tensor], tuple[Tensor, Tensor]],
    gap: Callable[[Tensor, Tensor, list[int]], Tensor],
    rewards: dict[str, Callable],
    clip: Clip,
    fixed: dict,
    accelerator: accelerate.Accelerator,
    batch: int,
) -> tuple[dict[str, tuple[float, float]], Tensor, Tensor]:
    """Every figure of a policy on fixed noise: (mean, standard error over prompts) by name; images
    uint8 [N,3,H,W] and latents [N,C,h,w], prompt by prompt, on the CPU.

    `draw` makes latents and images from rows, noise and times; `gap` is |v - v_ref|^2 [B] at x_t,
    s, rows; `fixed` holds rows, prompts and metadata of the N images, their noise and times,
    images_per_prompt, and, for W2, points x_t and s (made of samples of the base model: none for
    the base model's own evaluation)."""
    mine = my_share(len(fixed["rows"]), accelerator.process_index, accelerator.num_processes)
    results = {name: [] for name in (*rewards, "features", "images", "latents", "w2")}
    for start in tqdm(
        range(0, len(mine), batch), "evaluate", leave=False, disable=not accelerator.is_main_process
    ):
        part = mine[start : start + batch]
        rows, prompts, metadata = [
            [fixed[key][i] for i in part] for key in ("rows", "prompts", "metadata")
        ]
        latents, images = draw(rows, fixed["noise"][part], fixed["times"])
        for name, function in rewards.items():
            results[name].append(score(name, function, images, prompts, metadata))
        results["features"].append(clip.image(images))
        results["images"].append((images * 255).round().byte())
        results["latents"].append(latents)
        if "x_t" in fixed:
            results["w2"].append(gap(fixed["x_t"][part], fixed["s"][part], rows))
        else:
            results["w2"].append(torch.zeros(len(part), device=latents.device))
    whole = {
        name: accelerator.gather(torch.cat(parts))[: len(fixed["rows"])].cpu()
        for name, parts in results.items()
    }
    values = {name: whole[name] for name in (*rewards, "w2")}
    return (
        summarise(values, whole["features"], fixed["images_per_prompt"]),
        whole["images"],
        whole["latents"],
    )


def coefficient_statistics(advantage: Tensor, beta0: float) -> dict[str, float]:
    """The adrpo/* figures of one rollout; extrapolation is |A| / beta0: how far v_star lies from
    v_ref towards u."""
    coefficient, extrapolation = beta0 - advantage, advantage.abs() / beta0
    return {
        "adrpo/coefficient_mean": coefficient.mean().item(),
        "adrpo/coefficient_min": coefficient.min().item(),
        "adrpo/coefficient_max": coefficient.max().item(),
        "adrpo/coefficient_fraction_negative": (coefficient < 0).float().mean().item(),
        "adrpo/extrapolation_mean": extrapolation.mean().item(),
        "adrpo/extrapolation_max": extrapolation.max().item(),
    }


def log(path: Path, writer: SummaryWriter, step: int, record: dict[str, float]) -> None:
    """Append one JSON line to metrics.jsonl, and the same figures to TensorBoard."""
    with path.open("a") as file:
        file.write(json.dumps({"step": step, **record}) + "\n")
    for tag, value in record.items():
        writer.add_scalar(tag, value, step)


def synchronized_time(device: torch.device) -> float:
    """Wall clock in seconds, after the device has finished what it was given."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB: of the GPU, else of this process (nan where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    )


def picture(images: Tensor, images_per_prompt: int) -> Tensor:
    """The first 16 prompts of images uint8 [N,3,H,W] as one sheet [3,H,W] in [0,1]: a row per
    prompt, up to 8 each."""
    rows = images.unflatten(0, (-1, images_per_prompt))[:16, :8]
    return make_grid(rows.flatten(0, 1).float() / 255, nrow=rows.shape[1], padding=2)


def save_images(folder: Path, images: Tensor, images_per_prompt: int) -> None:
    """Every image uint8 [N,3,H,W] as PPPP_II.png: prompt, image."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        save_image(
            image.float() / 255,
            folder / f"{i // images_per_prompt:04d}_{i % images_per_prompt:02d}.png",
        )


# --------------------------------------------------------------------------------------- checkpoint


def save_checkpoint(run_dir: Path, progress: dict, parts: dict) -> None:
    """Write `progress` and the states of `parts` into checkpoints/: temporary name, then rename;
    keeps the newest few. Raises InputError when the folder cannot be written; the earlier
    checkpoints stay."""
    path = run_dir / "checkpoints" / f"{progress['iteration']:06d}.pt"
    try:
        path.parent.mkdir(exist_ok=True)
        torch.save(progress | parts, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"--output-dir: {path} cannot be written ({error}); make room, then --resume"
        ) from error
    for old in sorted(path.parent.glob("*.pt"))[:-KEEP_CHECKPOINTS]:
        old.unlink()


def load_checkpoint(run_dir: Path) -> dict:
    """The newest checkpoint of a run, {} when it has none yet. Raises InputError for a file that
    cannot be read."""
    files = sorted((run_dir / "checkpoints").glob("*.pt"))
    try:
        return torch.load(files[-1], map_location="cpu", weights_only=True) if files else {}
    except Exception as error:
        remedy = "delete it to use the one before"
        raise InputError(
            f"--resume: {files[-1]} cannot be read ({one_line(error)}); {remedy}"
        ) from error


def training_state(
    network: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel | None
) -> dict:
    """What a checkpoint needs of the training, complete on the CPU, whether the weights are whole
    (one process, DDP) or sharded (FSDP). Called by every process."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    model, optimizer_state = get_state_dict(network, optimizer, options=options)
    return {"model": model, "optimizer": optimizer_state, "ema": ema.state_dict() if ema else None}


def restore_training_state(
    network: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel | None, checkpoint: dict
) -> None:
    """The opposite of training_state."""
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
    states = {"model_state_dict": checkpoint["model"], "optim_state_dict": checkpoint["optimizer"]}
    set_state_dict(network, optimizer, **states, options=options)
    if ema:
        ema.load_state_dict(checkpoint["ema"])


def save_final(
    folder: Path, transformer: SD3Transformer2DModel, weights: dict, model_id: str
) -> str:
    """Export what diffusers loads, and return the lines that load it. weights: state dict of the
    trained parameters."""
    lines = f'pipe = StableDiffusion3Pipeline.from_pretrained("{model_id}")'
    if not getattr(transformer, "peft_config", None):
        whole = SD3Transformer2DModel.from_config(transformer.config)
        # A fresh copy, because FSDP's own is in pieces.
        whole.load_state_dict(weights, strict=False)
        whole.save_pretrained(folder / "transformer")
        load = f'SD3Transformer2DModel.from_pretrained("{folder / "transformer"}")'
        names = "SD3Transformer2DModel, StableDiffusion3Pipeline"
        return f"from diffusers import {names}\n{lines}\npipe.transformer = {load}"
    StableDiffusion3Pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer, weights),
        # Without it alpha is lost.
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    return (
        f"from diffusers import StableDiffusion3Pipeline\n{lines}\n"
        f'pipe.load_lora_weights("{folder}")'
    )


# --------------------------------------------------------------------------------------------- main


def check_args(args: Args, processes: int) -> None:
    """Raise InputError for a flag that cannot work."""
    positive = (
        "lora_rank lora_alpha max_sequence_length resolution eval_max_prompts num_steps "
        "rollout_batch"
    )
    positive += (
        " train_batch prompts_per_update iterations updates_per_iteration timesteps_per_sample"
    )
    positive += " learning_rate max_grad_norm beta0 tau beta_dpo eval_every eval_steps save_every"
    rules = [(name, "above 0", getattr(args, name) > 0) for name in positive.split()]
    rules.append(("group_size", "at least 2: the others are the baseline", args.group_size >= 2))
    rules.append(("eval_images", "at least 2, for the diversity", args.eval_images >= 2))
    rules.append(("alpha", "0 or more", args.alpha >= 0))
    rules.append(("weight_decay", "0 or more", args.weight_decay >= 0))
    rules.append(("seed", "0 or more", args.seed >= 0))
    rules.append(("guidance_scale", "1 (no guidance) or more", args.guidance_scale >= 1))
    rules.append(("ema_decay", "at least 0 and below 1", 0 <= args.ema_decay < 1))
    rules.append(("adv_clip_k", "above 0", args.adv_clip_k is None or args.adv_clip_k > 0))
    rules.append(
        (
            "reward",
            "one or more, each once",
            0 < len(args.reward) == len(set(map(reward_name, args.reward))),
        )
    )
    if not args.eval_only:
        divides = args.prompts_per_update % processes == 0
        rules.append(("prompts_per_update", f"a multiple of the {processes} processes", divides))
        rules.append(("lora", "left out: it goes with --eval-only", args.lora is None))
    if args.method == "dpo":
        rules.append(("group_size", "even for dpo", args.group_size % 2 == 0))
        rules.append(
            ("train_batch", "even for dpo: a pair stays together", args.train_batch % 2 == 0)
        )
    if args.full_finetune:
        rules.append(("ema_decay", "0 with --full-finetune", args.ema_decay == 0))
    if args.reward_weights is not None:
        count = len(args.reward)
        rules.append(
            ("reward_weights", f"{count}, one for each --reward", len(args.reward_weights) == count)
        )
        rules.append(("reward_weights", "finite", all(map(math.isfinite, args.reward_weights))))
    for name, rule, holds in rules:
        if not holds:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {rule}")


def find_run(args: Args) -> tuple[Args, Path]:
    """The flags and the folder of the run that --resume names. Raises InputError."""
    folder = Path(args.resume)
    if args.resume == "latest":
        runs = [
            f
            for f in Path(args.output_dir).glob("*/args.json")
            if f'"script": "{SCRIPT}"' in f.read_text()
        ]
        runs = [file for file in runs if '"eval_only": true' not in file.read_text()]
        if not runs:
            raise InputError(
                f"--resume latest: no run of this script in --output-dir {args.output_dir}"
            )
        folder = max(runs, key=lambda file: file.stat().st_mtime_ns).parent
    if not (folder / "args.json").is_file():
        raise InputError(
            f"--resume {args.resume}: {folder} is not a run folder (it has no args.json)"
        )
    try:
        record = json.loads((folder / "args.json").read_text())
        if record["script"] != SCRIPT:
            raise InputError(
                f"--resume {args.resume}: is a run of {record['script']}, not of {SCRIPT}"
            )
        stored = Args(
            **{key: tuple(v) if isinstance(v, list) else v for key, v in record["args"].items()}
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(
            f"--resume {args.resume}: its args.json is not this version's ({reason}); start anew"
        ) from error
    if stored.eval_only:
        raise InputError(
            f"--resume {args.resume}: is an --eval-only run; there is nothing to continue, run it "
            "again"
        )
    for field in dataclasses.fields(Args):
        given, kept, flag = (
            getattr(args, field.name),
            getattr(stored, field.name),
            field.name.replace("_", "-"),
        )
        if field.name not in ("resume", "output_dir") and given not in (field.default, kept):
            raise InputError(
                f"--{flag} {given}: the resumed run has {kept}; leave the flag out or start a new "
                "run"
            )
    return stored, folder


def create_run(args: Args) -> Path:
    """Create the run folder with args.json in it. Raises InputError."""
    what = "eval" if args.eval_only else args.method
    name = args.run_name or f"{SCRIPT}-{what}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(args.output_dir) / name
    git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        commit = (
            subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
        )
    except (OSError, subprocess.SubprocessError):
        commit = None
    versions = {"python": platform.python_version()}
    versions |= {
        m.__name__: m.__version__
        for m in (torch, diffusers, transformers, peft, accelerate, open_clip)
    }
    record = {
        "script": SCRIPT,
        "args": dataclasses.asdict(args),
        "command": sys.argv,
        "versions": versions,
    }
    try:
        folder.mkdir(parents=True)
        for part in ("samples", "final"):
            (folder / part).mkdir()
        (folder / "args.json").write_text(json.dumps(record | {"git_commit": commit}, indent=2))
    except FileExistsError as error:
        raise InputError(
            f"--run-name {folder.name}: {folder} exists; take another name, or --resume {folder}"
        ) from error
    except OSError as error:
        raise InputError(
            f"--output-dir {args.output_dir}: cannot be written ({error}); name another folder"
        ) from error
    return folder


def keep_metrics(path: Path, iteration: int) -> None:
    """Drop from metrics.jsonl what an interrupted run logged after its checkpoint."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [
        line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= iteration
    ]
    path.write_text("".join(kept))


def evaluate_only(args: Args, accelerator: accelerate.Accelerator, dtype: torch.dtype) -> None:
    """--eval-only: any text-to-image pipeline of diffusers, called as its own users call it; one
    row of Table 1."""
    device = accelerator.device
    source = ("eval-prompts", args.eval_prompts) if args.eval_prompts else ("prompts", args.prompts)
    prompts, metadata = load_rows(*source, args.prompt_column, args.prompt_split)
    prompts, metadata = prompts[: args.eval_max_prompts], metadata[: args.eval_max_prompts]
    clip = Clip(args.clip_model, args.clip_pretrained, device)
    metrics = TABLE_METRICS if args.eval_metrics is None else args.eval_metrics
    rewards = build_rewards(args, clip, list(metrics), device)
    kind = read_model_index(args.model_id)["_class_name"]
    try:
        pipe = DiffusionPipeline.from_pretrained(
            args.model_id, dtype={"default": dtype, "vae": torch.float32}
        )
    except Exception as error:
        raise InputError(
            f"--model-id {args.model_id}: cannot be loaded ({one_line(error)})"
        ) from error
    if args.lora:
        try:
            state = pipe.lora_state_dict(args.lora)
            pipe.load_lora_weights(args.lora)
            networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
            fitting = sum(
                ".lora_" in name for network in networks for name, _ in network.named_parameters()
            )
            stored = sum(
                ".lora" in name for name in (state[0] if isinstance(state, tuple) else state)
            )
            if fitting != stored:  # diffusers only warns
                raise ValueError(
                    f"{stored} weights in the file, {fitting} places for them in the model"
                )
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise InputError(
                f"--lora {args.lora}: cannot be loaded into {args.model_id} ({reason})"
            ) from error
    pipe.to(device).set_progress_bar_config(disable=True)
    if hasattr(pipe, "vae"):  # pipelines hand it latents in the transformer's precision
        decode = pipe.vae.decode
        pipe.vae.decode = lambda latents, *rest, **more: decode(latents.float(), *rest, **more)
    accepted = inspect.signature(pipe.__call__).parameters
    options = {
        "height": args.resolution,
        "width": args.resolution,
        "num_inference_steps": args.eval_steps,
    }
    options |= {
        "guidance_scale": args.guidance_scale,
        "max_sequence_length": args.max_sequence_length,
    }
    options = {name: value for name, value in options.items() if name in accepted}
    run_dir = create_run(args) if accelerator.is_main_process else None

    def draw(images: list[int], noise: Tensor, times: None) -> tuple[Tensor, Tensor]:
        """Images number 0, 1, ... of the evaluation, each from a random state of its own."""
        seeds = [int(np.random.SeedSequence([args.seed, i]).generate_state(1)[0]) for i in images]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        asked = [fixed["prompts"][i] for i in images]
        drawn = (
            pipe(asked, generator=generators, output_type="pt", **options)
            .images.float()
            .clamp(0, 1)
            .to(device)
        )
        return torch.zeros(len(drawn), 1, device=device), drawn

    count = len(prompts) * args.eval_images
    fixed = {"rows": list(range(count)), "times": None, "noise": torch.zeros(count, 1)}
    fixed |= {"prompts": [prompts[i // args.eval_images] for i in range(count)]}
    fixed |= {"metadata": [metadata[i // args.eval_images] for i in range(count)]}
    fixed |= {"images_per_prompt": args.eval_images}
    figures, images, _ = evaluate(draw, None, rewards, clip, fixed, accelerator, args.rollout_batch)
    figures.pop("w2")  # there is nothing to compare with
    if not accelerator.is_main_process:
        return
    save_images(run_dir / "samples", images, args.eval_images)
    (run_dir / "samples" / "prompts.txt").write_text(
        "".join(f"{prompt}\n" for prompt in prompts), "utf-8"
    )
    save_image(picture(images, args.eval_images), run_dir / "samples.png")
    about = {"model": args.model_id, "pipeline": kind, "lora": args.lora, "prompts": len(prompts)}
    about |= {"images_per_prompt": args.eval_images, "options": options}
    means = {
        name: {"mean": mean, "standard_error": error} for name, (mean, error) in figures.items()
    }
    (run_dir / "table1.json").write_text(json.dumps(about | {"metrics": means}, indent=2))
    cells = [f"{mean:.4g} ± {error:.2g}" for mean, error in figures.values()]
    label = Path(args.model_id).name + (f" + {args.lora}" if args.lora else "")
    table = [["model", *figures], ["---"] * (len(cells) + 1), [label, *cells]]
    text = "".join(f"| {' | '.join(row)} |\n" for row in table)
    (run_dir / "table1.md").write_text(
        f"{text}\nMean ± standard error over {len(prompts)} prompts.\n"
    )
    print(f"{text}{run_dir / 'table1.md'}, images in {run_dir / 'samples'}")


def main(args: Args) -> None:
    use_bf16 = (
        torch.cuda.is_available()
        and not args.cpu
        and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    resumed = None
    if args.resume:
        args, resumed = find_run(args)
    bf16 = args.precision == "bf16" or (args.precision == "auto" and use_bf16)
    dtype = torch.bfloat16 if bf16 else torch.float32
    accelerator = accelerate.Accelerator(cpu=args.cpu, mixed_precision="bf16" if bf16 else "no")
    device, is_main = accelerator.device, accelerator.is_main_process
    processes, rank = accelerator.num_processes, accelerator.process_index
    check_args(args, processes)
    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    if args.eval_only:
        evaluate_only(args, accelerator, dtype)
        return

    # Prompts and rewards first: they are quick to be wrong. A wrong reward is found on two grey
    # images.
    train, heldout, note = load_prompts(args)
    clip = Clip(args.clip_model, args.clip_pretrained, device)
    rewards = build_rewards(args, clip, [*args.reward, *(args.eval_metrics or ())], device)
    mix = torch.tensor(args.reward_weights or [1.0] * len(args.reward), device=device)
    names = [reward_name(spec) for spec in args.reward]
    grey, two = (
        torch.full((2, 3, args.resolution, args.resolution), 0.5, device=device),
        list(train)[:1] * 2,
    )
    for name, function in rewards.items():
        score(name, function, grey, two, [train[two[0]]] * 2)

    # The model: everything frozen but the LoRA. Only prompts this run will draw are encoded.
    pipe = load_pipeline(args, dtype)
    drawn = [
        draw_prompts(len(train), args.prompts_per_update, i, args.seed)
        for i in range(args.iterations)
    ]
    used = sorted({row for rows in drawn for row in rows})
    texts = [*[list(train)[row] for row in used], *heldout, ""]
    metadata = [*[train[text] for text in texts[: len(used)]], *heldout.values(), {}]
    position = {row: i for i, row in enumerate(used)}
    embeds, pooled = encode_prompts(pipe, texts, args.max_sequence_length, device)

    def condition(rows: list[int]) -> tuple[Tensor, Tensor]:
        return embeds[rows].to(device), pooled[rows].to(device)

    transformer, vae = pipe.transformer, pipe.vae.to(device)
    if args.vae_slicing:
        vae.enable_slicing()
    if args.vae_tiling:
        vae.enable_tiling()
    seed_everything(args.seed)
    frozen = None
    if args.full_finetune:
        frozen = SD3Transformer2DModel.from_config(transformer.config).to(dtype)
        frozen.load_state_dict(transformer.state_dict())
        frozen = accelerator.prepare_model(
            frozen.requires_grad_(False).eval(), evaluation_mode=True
        )
        transformer.requires_grad_(True)
    else:
        targets = list(args.lora_targets)
        config = LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            init_lora_weights="gaussian",
            target_modules=targets,
        )
        try:
            transformer.add_adapter(config)
        except ValueError as error:
            raise InputError(f"--lora-targets {' '.join(targets)}: {one_line(error)}") from error
        cast_training_params(transformer, torch.float32)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        for block in transformer.transformer_blocks:
            block.compile()
    trainable = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate, weight_decay=args.weight_decay)
    network, optimizer = accelerator.prepare(transformer, optimizer)
    # Without gradients no DDP is needed. accelerate has put autocast into the forward of both
    # networks.
    transformer = accelerator.unwrap_model(network)
    trainable = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    ema = EMAModel(trainable, decay=args.ema_decay) if args.ema_decay else None

    @contextlib.contextmanager
    def previous_policy() -> Iterator[nn.Module]:
        """The policy that rolls out and is evaluated: the current weights, or their moving
        average."""
        if ema:
            ema.store(trainable)
            ema.copy_to(trainable)
        try:
            yield transformer
        finally:
            if ema:
                ema.restore(trainable)

    run_dir = resumed or (create_run(args) if is_main else None)
    metrics_path = run_dir / "metrics.jsonl" if run_dir else None
    checkpoint = load_checkpoint(run_dir) if resumed else {}
    first = checkpoint.get("iteration", 0)
    if checkpoint:
        restore_training_state(network, optimizer.optimizer, ema, checkpoint)
    if is_main:
        keep_metrics(metrics_path, first if checkpoint else -1)

    # Shapes and times.
    side = args.resolution // pipe.vae_scale_factor
    shape = (transformer.config.in_channels, side, side)
    tokens = (side // transformer.config.patch_size) ** 2
    times = sampling_times(pipe.scheduler, args.num_steps, tokens)
    empty = condition([len(texts) - 1])
    groups, local_groups, group = (
        args.prompts_per_update,
        args.prompts_per_update // processes,
        args.group_size,
    )
    # Whole groups stay in one process.
    mine = slice(rank * local_groups * group, (rank + 1) * local_groups * group)
    size = sum(parameter.numel() for parameter in trainable)
    accelerator.print(
        f"{run_dir}: {args.method}, {processes} x {device.type}, {'bf16' if bf16 else 'fp32'}, "
        f"{size:,} trained parameters\n{len(train)} training prompts, {len(heldout)} for "
        f"evaluation; {note}; embeddings of {len(texts)} prompts take {embeds.nbytes / 1e9:.2f} "
        f"GB\neach iteration {groups} prompts x {group} images, {args.updates_per_iteration} "
        f"updates of {groups * group * args.timesteps_per_sample} points"
    )
    if group < 4:
        accelerator.print(
            f"warning: --group-size {group}: the mean of so few images is a noisy baseline; 8 or "
            "more"
        )

    def draw(
        network: nn.Module, rows: list[int], noise: Tensor, times: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Latents and images of prompts `rows` from noise [B,C,h,w]."""
        latents = sample(
            network, noise.to(device), times, condition(rows), empty, args.guidance_scale
        )
        return latents, decode(vae, latents)

    def gap(network: nn.Module, x_t: Tensor, s: Tensor, rows: list[int]) -> Tensor:
        """|v - v_ref|^2 [B]."""
        x_t, s, cond = x_t.to(device), s.to(device), condition(rows)
        v = velocity(network, x_t, s, cond)
        with reference_policy(transformer, frozen) as reference:
            return mean_square(v - velocity(reference, x_t, s, cond))

    # Everything an evaluation needs is fixed here, once: the noise, and W2's (x_t, s) from the base
    # model's samples.
    generator = seed_everything(args.seed, 0)
    count = len(heldout) * args.eval_images
    # Rows of the held-out prompts, repeated.
    each = [len(used) + i // args.eval_images for i in range(count)]
    fixed = {
        "rows": each,
        "prompts": [texts[i] for i in each],
        "metadata": [metadata[i] for i in each],
    }
    fixed |= {
        "times": sampling_times(pipe.scheduler, args.eval_steps, tokens),
        "images_per_prompt": args.eval_images,
    }
    fixed["noise"] = torch.randn(count, *shape, generator=generator)
    base_path = run_dir / "base.pt" if run_dir else None
    tools = (rewards, clip, fixed, accelerator, args.rollout_batch)
    if resumed and base_path.is_file():
        base = torch.load(base_path, weights_only=True)
    else:
        with reference_policy(transformer, frozen) as reference:
            figures, images, latents = evaluate(functools.partial(draw, reference), None, *tools)
        base = {
            "metrics": {name: list(pair) for name, pair in figures.items()},
            "images": images,
            "latents": latents,
        }
        if is_main:
            torch.save(base, base_path.with_suffix(".part"))
            base_path.with_suffix(".part").replace(base_path)
    fixed["s"] = (torch.randperm(count, generator=generator) + 0.5) / count
    fixed["x_t"], _ = flow_matching_point(
        base["latents"], torch.randn(count, *shape, generator=generator), fixed["s"]
    )
    base_figures = {name: mean for name, (mean, _) in base["metrics"].items()}

    def totals(figures: dict[str, float]) -> dict[str, float]:
        """The figures of an evaluation, with the weighted reward and the diversities' ratio to the
        base model's."""
        total = sum(
            weight * figures[name] for name, weight in zip(names, mix.tolist(), strict=True)
        )
        ratios = {
            f"{name}_ratio": figures[name] / base_figures[name]
            for name in ("clip_diversity", "clip_distance")
        }
        return {"reward": total, **figures, **ratios}

    metrics = checkpoint.get("metrics") or totals(base_figures)
    writer = SummaryWriter(run_dir, purge_step=first + 1 if checkpoint else 0) if is_main else None
    if is_main and not checkpoint:
        (run_dir / "samples" / "prompts.txt").write_text(
            "".join(f"{prompt}\n" for prompt in heldout), "utf-8"
        )
        sheet = picture(base["images"], args.eval_images)
        save_image(sheet, run_dir / "samples" / "000000.png")
        writer.add_image("samples", sheet, 0)
        log(metrics_path, writer, 0, {f"eval/{name}": value for name, value in metrics.items()})

    bar = tqdm(
        range(first, args.iterations),
        args.method,
        initial=first,
        total=args.iterations,
        disable=not is_main,
    )
    for iteration in bar:
        # 1. Rollout: x1 from the previous policy (eq. 6), and its rewards. Every process draws all
        #    of the noise and takes its own groups of it, so the result does not depend on their
        #    number.
        started = synchronized_time(device)
        generator = seed_everything(args.seed, iteration + 1)
        rows = [position[row] for row in drawn[iteration] for _ in range(group)][mine]
        noise = torch.randn(groups * group, *shape, generator=generator)[mine]
        offline = args.method == "dpo" and not args.dpo_online
        latents, values, seconds_reward = [], [], 0.0
        with reference_policy(transformer, frozen) if offline else previous_policy() as policy:
            for start in range(0, len(rows), args.rollout_batch):
                part = slice(start, start + args.rollout_batch)
                x1, images = draw(policy, rows[part], noise[part], times)
                rolled_out = synchronized_time(device)
                prompts, facts = (
                    [texts[row] for row in rows[part]],
                    [metadata[row] for row in rows[part]],
                )
                values.append(
                    torch.stack(
                        [score(n, rewards[n], images, prompts, facts) for n in names], dim=1
                    )
                )
                latents.append(x1)
                seconds_reward += synchronized_time(device) - rolled_out
        x1 = torch.cat(latents)  # [B/processes,C,h,w]
        every = accelerator.gather(torch.cat(values)).view(
            groups, group, len(names)
        )  # [P,G,R], of all processes
        reward = (every * mix).sum(2)  # [P,G]
        rewarded = synchronized_time(device)

        # 2. What each method makes of the rewards: which samples it trains on, and with which
        #    weight.
        zero_spread = (reward.std(1) < 1e-8).float().mean().item()
        record = {"reward/mean": reward.mean().item(), "reward/std": reward.std().item()}
        record |= {"reward/frac_reward_zero_std": zero_spread}
        record |= {f"reward/{name}": every[..., i].mean().item() for i, name in enumerate(names)}
        own = slice(rank * local_groups, (rank + 1) * local_groups)
        if args.method == "adrpo":
            advantage = group_advantage(reward, args.beta0, args.adv_clip_k, args.adv_norm)  # [P,G]
            record |= coefficient_statistics(advantage, args.beta0)
            weight = advantage[own].flatten()
        elif args.method == "orw":
            weight = orw_weights(reward / (reward.std() + 1e-4), args.tau)[own].flatten()
        chosen = training_samples(args.method, reward[own])  # [P,G] positions in x1
        points = (
            chosen[:, None].expand(-1, args.timesteps_per_sample, -1).flatten()
        )  # [n]: prompt, repeat, image
        needs_reference = args.method in ("adrpo", "dpo") or (
            args.method == "orw" and args.alpha > 0
        )
        draws = 1 if args.share_noise else group // 2 if args.method == "dpo" else group

        # 3. Updates on this rollout, each with fresh times and noise, in micro-batches whose
        #    gradients add up to the gradient of the mean over the whole update.
        decay = (
            (1 + math.cos(math.pi * iteration / args.iterations)) / 2
            if args.lr_schedule == "cosine"
            else 1.0
        )
        for settings in optimizer.param_groups:
            settings["lr"] = args.learning_rate * min(1.0, (iteration + 1) / 5) * decay
        sums = torch.zeros(4, device=device)
        for _ in range(args.updates_per_iteration):
            layout = (groups, args.timesteps_per_sample, draws, group)
            s, noise = draw_points(generator, shape, args.timestep_distribution, *layout)
            mine_points = slice(rank * len(points), (rank + 1) * len(points))
            s, noise = s[mine_points], noise[mine_points]
            optimizer.zero_grad(set_to_none=True)
            update = torch.zeros(3, device=device)
            for start in range(0, len(points), args.train_batch):
                part = slice(start, start + args.train_batch)
                picks, s_t = points[part], s[part].to(device)
                x_t, u = flow_matching_point(x1[picks], noise[part].to(device), s_t)
                cond = condition([rows[i] for i in picks.tolist()])
                synchronise = start + args.train_batch >= len(points)
                if needs_reference:
                    with torch.no_grad(), reference_policy(transformer, frozen) as reference:
                        v_ref = velocity(reference, x_t, s_t, cond)
                with contextlib.nullcontext() if synchronise else accelerator.no_sync(network):
                    v = velocity(network, x_t, s_t, cond)
                    if not needs_reference:
                        v_ref = v.detach()
                    if args.method == "adrpo":
                        losses = adrpo_fm_loss(v, v_ref, u, weight[picks], args.beta0)
                    elif args.method == "orw":
                        losses = orw_fm_loss(v, v_ref, u, weight[picks], args.alpha)
                    elif args.method == "raft":
                        losses = mean_square(v - u)
                    else:  # best and worst alternate; a pair's loss stands for its two points
                        (v_w, v_l), (v_w_ref, v_l_ref), (u_w, u_l) = [
                            (a[0::2], a[1::2]) for a in (v, v_ref, u)
                        ]
                        losses = dpo_fm_loss(
                            v_w, v_w_ref, u_w, v_l, v_l_ref, u_l, args.beta_dpo
                        ).repeat(2)
                    accelerator.backward(losses.sum() / len(points))
                with torch.no_grad():
                    parts = [losses.sum(), mean_square(v - u).sum(), mean_square(v - v_ref).sum()]
                    update += torch.stack(parts) / len(points)
            grad_norm = accelerator.clip_grad_norm_(trainable, args.max_grad_norm)
            if hasattr(grad_norm, "full_tensor"):  # FSDP
                grad_norm = grad_norm.full_tensor()
            update = torch.cat([accelerator.reduce(update, "mean"), grad_norm.to(device).view(1)])
            if not update.isfinite().all():  # before the step: the weights are still good
                state = training_state(network, optimizer.optimizer, ema)
                if is_main:
                    save_checkpoint(run_dir, {"iteration": iteration, "metrics": metrics}, state)
                raise InputError(
                    f"iteration {iteration}: loss {update[0]:.3g}, gradient norm {update[3]:.3g}; "
                    "the weights before this step are saved. Lower --learning-rate or --beta-dpo, "
                    "or raise --beta0 or --alpha"
                )
            optimizer.step()
            if ema:
                ema.step(trainable)
            sums += update
        updated = synchronized_time(device)

        # 4. Log, evaluate, save.
        done, last = iteration + 1, iteration + 1 == args.iterations
        means = (sums / args.updates_per_iteration).tolist()
        record |= {
            "losses/total": means[0],
            "losses/flow_matching": means[1],
            "losses/grad_norm": means[3],
        }
        if needs_reference:
            record["losses/divergence"] = means[2]
        record["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        record["charts/seconds_rollout"] = rewarded - started - seconds_reward
        record["charts/seconds_reward"] = seconds_reward
        record["charts/seconds_update"] = updated - rewarded
        record["charts/peak_memory_gb"] = peak_memory_gb(device)
        if last or done % args.eval_every == 0:
            with previous_policy() as policy:
                tasks = functools.partial(draw, policy), functools.partial(gap, policy)
                figures, images, _ = evaluate(*tasks, *tools)
            metrics = totals({name: mean for name, (mean, _) in figures.items()})
            record |= {f"eval/{name}": value for name, value in metrics.items()}
            if is_main:
                sheet = picture(images, args.eval_images)
                save_image(sheet, run_dir / "samples" / f"{done:06d}.png")
                writer.add_image("samples", sheet, done)
            if is_main and last:
                save_images(run_dir / "samples" / "final", images, args.eval_images)
        if is_main:
            log(metrics_path, writer, done, record)
        figures = {
            "reward": record["reward/mean"],
            "diversity": metrics["clip_diversity"],
            "w2": metrics["w2"],
        }
        bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()})
        if last or done % args.save_every == 0:
            state = training_state(network, optimizer.optimizer, ema)
            if is_main:
                save_checkpoint(run_dir, {"iteration": done, "metrics": metrics}, state)

    # What other tools load, and the whole run in one file.
    with previous_policy():
        weights_now = training_state(network, optimizer.optimizer, None)["model"]
    if is_main:
        writer.close()
        lines = save_final(run_dir / "final", transformer, weights_now, args.model_id)
        summary = {
            "base": totals(base_figures),
            "final": metrics,
            "method": args.method,
            "iterations": args.iterations,
        }
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2))
        print(f"{'':22s}{'base':>10s}{'final':>10s}")
        for name, value in metrics.items():
            print(f"{name:22s}{summary['base'][name]:10.4f}{value:10.4f}")
        print(f"images in {run_dir / 'samples'}. To use the result:\n{lines}")


if __name__ == "__main__":
    process = os.environ.get("RANK", "0")
    try:
        main(tyro.cli(Args, description=__doc__))
        gc.collect()  # gloo aborts at exit where a wrapped model outlives its process group
        accelerate.PartialState().wait_for_everyone()
        accelerate.PartialState().destroy_process_group()
    except InputError as error:
        sys.exit(f"error: {error}" if process == "0" else f"error (process {process}): {error}")
    except torch.OutOfMemoryError as error:
        remedy = (
            "lower --rollout-batch or --train-batch, or add --gradient-checkpointing, "
            "--vae-slicing, --no-t5"
        )
        sys.exit(
            f"error: out of GPU memory ({one_line(error)[:120]}); {remedy}; then --resume latest"
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        sys.exit(
            f"error: --output-dir: cannot be written ({one_line(error)}); make room, then "
            "--resume latest"
        )
    except KeyboardInterrupt:
        sys.exit("interrupted: --resume latest continues from the newest checkpoint")
