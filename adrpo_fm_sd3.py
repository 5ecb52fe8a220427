"""ADRPO for text-to-image: a flow-matching pipeline, a reward, adaptive divergence weights.

Adaptive Divergence Regularized Policy Optimization (NeurIPS 2025, arXiv 2510.18053), eq. 6: every
sample has its own divergence weight, `beta0 - A`, where A is its advantage over the other samples
of its prompt. Beside it, measured alike: ORW-CFM-W2 (arXiv 2502.06061), RAFT (arXiv 2304.06767)
and Diffusion-DPO for flow matching (arXiv 2311.12908).

The stock pipeline of diffusers samples and decodes. The script watches which question it asks its
transformer, proves at the start of a run that it is flow matching, and asks the same question at
the training points: Stable Diffusion 3 is the default, others are tuned by the same lines. The
policy is a LoRA; with the LoRA switched off the same network is the reference.

    x_t = (1 - s) x1 + s noise     x1 a sample of the policy; diffusers counts s from image to noise
    u   = noise - x1               the velocity of that path, and what the transformer predicts
    A   = R(x1, c) - mean of R over the group of the same prompt c
    L   = A |v(x_t) - u|^2 + (beta0 - A) |v(x_t) - v_ref(x_t)|^2      mean over a sample's elements

Ours, where we depart from the paper or it is silent: A is divided by the batch's standard deviation
and clipped to +-k beta0 in both terms (--adv-norm none --adv-clip-k None: eq. 6); rollouts use
guidance, the loss does not; DPO's pairs are drawn afresh from the base model at each iteration;
what the paper does not publish (learning rate, group, resolution, steps) is flow_grpo's recipe.

    python adrpo_fm_sd3.py --prompts prompts.txt --reward clip
    python adrpo_fm_sd3.py --prompts prompts.txt --rollout-batch 8 --train-batch 2 \\
        --gradient-checkpointing
    torchrun --nproc-per-node 8 adrpo_fm_sd3.py --prompts prompts.txt

Without a GPU: benchmark/mini_world_sd3.py makes a small trained world on which the same script
learns in minutes. Equations, metrics, results, time and memory: docs/adrpo_fm_sd3.md.
"""

import contextlib
import copy
import dataclasses
import functools
import gc
import hashlib
import importlib.util
import inspect
import io
import json
import math
import os
import random
import subprocess
import sys
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import accelerate
import diffusers
import numpy as np
import open_clip
import peft
import torch
import torch.nn.functional as F
import transformers
import tyro
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from filelock import FileLock
from huggingface_hub import hf_hub_download, is_offline_mode
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

SCRIPT = "adrpo_fm_sd3"
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
PROJECTIONS += ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TAKEN_TAGS = {"mean", "std", "frac_reward_zero_std", "reward", "w2"}
TAKEN_TAGS |= {"latents", "images", "features", "clip_diversity", "clip_distance"}
TAKEN_TAGS |= {"clip_diversity_ratio", "clip_distance_ratio"}
DIVERGED = "lower --learning-rate or --beta-dpo, or raise --beta0 or --alpha"


class InputError(ValueError):
    """What the user gave cannot work: one line that names the flag and the remedy."""


@contextlib.contextmanager
def naming(flag: str, remedy: str) -> Iterator[None]:
    """What a library raises in here becomes one line with the flag and the remedy."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error.__cause__ or error}"
        raise InputError(f"{flag}: {reason}; {remedy}") from error


@dataclasses.dataclass
class Args:
    # ------------------------------------------------------------------------------- experiment
    output_dir: str = "runs"
    """folder that receives one sub-folder per run"""
    run_name: str | None = None
    """name of that sub-folder; default: script, method, seed and time"""
    seed: int = 1
    """seed of everything: LoRA, prompts, rollouts, times and the evaluation's noise"""
    cpu: bool = False
    """stay on the CPU; several processes there: torchrun --nproc-per-node N SCRIPT --cpu"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """of transformer and text encoders, the rest is float32; auto: bf16 on a GPU that has it"""
    resume: str | None = None
    """run folder to continue exactly from its last checkpoint, or `latest`, with its own flags"""

    # ------------------------------------------------------------------------------------ model
    model_id: str = "stabilityai/stable-diffusion-3-medium-diffusers"
    """flow-matching pipeline of diffusers: a folder, or NAME[@REVISION] of the hub (this: gated)"""
    lora_rank: int = 32
    """rank of the LoRA (flow_grpo)"""
    lora_alpha: int = 64
    """its update is scaled by alpha / rank (flow_grpo)"""
    lora_targets: tuple[str, ...] = PROJECTIONS
    """ends of the linear layers' names; default: those of the attention that the model has"""
    t5: bool = True
    """--no-t5 leaves SD3's largest text encoder out (9.5 GB in bf16), for less prompt following"""
    max_sequence_length: int | None = None
    """tokens of a prompt; default: the pipeline's. SD3 attends to padding: sample with as many"""
    resolution: int = 512
    """height and width in pixels"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    compile: bool = False
    """torch.compile the transformer's blocks: minutes of start-up first"""

    # ---------------------------------------------------------------------------------- prompts
    prompts: str = "shunk031/DrawBench@refs/convert/parquet"
    """.txt, .jsonl, .json, .csv, .parquet (other columns: the reward's metadata), or of the hub
    NAME[:CONFIGURATION][@REVISION]; default: DrawBench, the paper's"""
    prompt_column: str | None = None
    """column of the prompt; default: the first of prompt, prompts, text, caption"""
    prompt_split: str | None = None
    """split of a hub data set; default: its first"""
    eval_prompts: str | None = None
    """held-out prompts, given like --prompts; default: every tenth of those, not trained on"""
    eval_max_prompts: int = 32
    """the first so many of the held-out prompts are evaluated"""

    # --------------------------------------------------------------------- rewards and metrics
    reward: tuple[str, ...] = ("clip",)
    """clip, or FILE.py:function, function(images [B,3,H,W] in [0,1], prompts, metadata) -> [B]"""
    reward_weights: tuple[float, ...] | None = None
    """weight of each in the sum that is maximised; default: 1 each"""
    eval_metrics: tuple[str, ...] = ()
    """measured beside the rewards, named alike: shows whether the reward was earned or fooled"""
    clip_model: str = "ViT-L-14"
    """open_clip architecture of `clip` and CLIP diversity, or local-dir:FOLDER"""
    clip_pretrained: str | None = "openai"
    """its weights: a tag of open_clip, or a file (OpenAI's: --clip-model ViT-L-14-quickgelu)"""

    # ---------------------------------------------------------------------------------- rollout
    prompts_per_update: int = 8
    """prompts per iteration, over all processes; a multiple of their number. Few: noisy updates"""
    group_size: int = 16
    """images per prompt. Their mean reward is the baseline: below 4 it is noise"""
    num_steps: int = 10
    """steps of a rollout (flow_grpo)"""
    guidance_scale: float = 4.5
    """of rollouts and evaluation (flow_grpo); 1 = none, at half the cost. FLUX.1-dev is told it"""
    rollout_batch: int = 16
    """images sampled and scored at once, per process; changes memory and speed, not the result"""

    # ------------------------------------------------------------------------------ fine-tuning
    method: Literal["adrpo", "orw", "raft", "dpo"] = "adrpo"
    """orw with --alpha 0 has no divergence term (collapses), else it is ORW-CFM-W2"""
    iterations: int = 300
    """rollouts, each with its updates"""
    updates_per_rollout: int = 2
    """optimiser steps on one rollout, each on all its images with fresh times and noise"""
    timesteps_per_sample: int = 2
    """points (s, noise) per image in each of these steps. More: less noise in the gradient"""
    timestep_distribution: Literal["uniform", "logit-normal"] = "uniform"
    """of s: uniform as eq. 6, or sigmoid of a standard normal (median .5), as SD3 was trained"""
    timestep_shift: float = 1.0
    """s -> shift s / (1 + (shift - 1) s); 3 is SD3's sampler, the median then .75 (flow_grpo's)"""
    share_noise: bool = False
    """one (s, noise) for all images of a prompt: their differences are then the images' alone"""
    train_batch: int = 4
    """points per forward and backward pass and process; changes memory and speed, not the result"""
    learning_rate: float = 3e-4
    """AdamW's after five iterations of warm-up (flow_grpo's for LoRA); lower it if W2 runs away"""
    weight_decay: float = 1e-4
    """AdamW (flow_grpo)"""
    max_grad_norm: float = 1.0
    """gradient norm clip (flow_grpo)"""

    # ---------------------------------------------------------------------- adrpo and baselines
    beta0: float = 0.25
    """adrpo: baseline divergence weight (ours, for A in units of its spread); |A| / beta0: how far
    targets are extrapolated from the reference. Smaller: more reward, more drift"""
    adv_clip_k: float | None = 4.0
    """adrpo: clip A to +-k beta0, in both terms; None = no clip. k bounds the extrapolation"""
    adv_norm: Literal["base", "none", "group", "global"] = "global"
    """adrpo: divide A by the spread of the base model's rewards, by nothing (eq. 6: beta0 must fit
    the reward's scale), the group's spread or the whole batch's"""
    tau: float = 1.0
    """orw: weight exp(tau R), of mean 1 in each group; R in units of the batch's spread (ours)"""
    alpha: float = 1.0
    """orw: fixed divergence weight; the authors' is ours times the mean of exp(tau R)"""
    beta_dpo: float = 100.0
    """dpo: inverse temperature (flow_grpo's SD3 preset). Smaller: further from the base model"""
    dpo_online: bool = False
    """dpo: draw the pairs from the policy instead of the base model"""

    # ------------------------------------------------------------------ evaluation, checkpoints
    eval_every: int = 20
    """iterations between evaluations on fixed noise"""
    eval_images: int = 4
    """images per held-out prompt; at least 2, for the diversity"""
    eval_steps: int = 28
    """steps in evaluation (SD3's default)"""
    save_every: int = 20
    """iterations between checkpoints"""
    keep_adapters: bool = True
    """keep the LoRA of each evaluation in adapters/: the best is often an earlier one"""


# -------------------------------------------------------------------------------------- the method
def group_advantage(rewards, beta0, clip_k=None, normalize="none", base_std=None) -> Tensor:
    """Advantage of each sample over its prompt's others (eq. 6: A = R - V, V the prompt's mean).

    rewards [P,G] -> A [P,G], detached. `normalize` "group", "global" or "base" divides by the
    standard deviation of the group, of all rewards, or of the base model's rewards, `base_std`;
    `clip_k` then clips to +-clip_k * beta0, once: the loss has the same A in both of its terms."""
    # Relative to the first reward, so that a group of equal rewards gives exactly 0.
    relative = rewards - rewards[:, :1]  # [P,G]
    spreads = {"none": 1.0, "base": base_std, "global": rewards.std() + 1e-4}
    spreads["group"] = relative.std(dim=1, keepdim=True) + 1e-4  # [P,1]
    advantage = (relative - relative.mean(dim=1, keepdim=True)) / spreads[normalize]
    if clip_k is not None:
        advantage = advantage.clamp(-clip_k * beta0, clip_k * beta0)
    return advantage.detach()


def adrpo_statistics(advantage: Tensor, beta0: float) -> dict[str, float]:
    """The adrpo/* figures of a rollout; extrapolation: how far v_star lies from v_ref towards u."""
    coefficient, extrapolation = beta0 - advantage, advantage.abs() / beta0
    figures = {"coefficient_min": coefficient.min(), "coefficient_max": coefficient.max()}
    figures |= {"coefficient_mean": coefficient.mean(), "extrapolation_mean": extrapolation.mean()}
    figures["coefficient_fraction_negative"] = (coefficient < 0).float().mean()
    figures["extrapolation_max"] = extrapolation.max()
    return {f"adrpo/{tag}": value.item() for tag, value in figures.items()}


def orw_weights(rewards: Tensor, tau: float) -> Tensor:
    """ORW-CFM-W2's weights exp(tau R), here with mean 1 in each group: [P,G] -> [P,G], detached."""
    return (torch.softmax(tau * rewards, dim=1) * rewards.shape[1]).detach()


def training_samples(method: str, rewards: Tensor) -> Tensor:
    """Which samples each method trains on: rewards [P,G] -> positions in the flattened batch [P,G].
    adrpo, orw: all; raft: the group's best, repeated; dpo: best, worst, best, worst ... (G even)"""
    offsets = torch.arange(len(rewards), device=rewards.device) * rewards.shape[1]
    best, worst = rewards.argmax(1) + offsets, rewards.argmin(1) + offsets  # [P]
    if method == "raft":
        return best[:, None].expand_as(rewards)
    if method == "dpo":
        return torch.stack([best, worst], dim=1).repeat(1, rewards.shape[1] // 2)
    return torch.arange(rewards.numel(), device=rewards.device).view_as(rewards)


def mean_square(difference: Tensor) -> Tensor:
    """Mean over a sample's elements of the squared difference: [B,...] -> [B]."""
    return difference.square().flatten(1).mean(1)


def adrpo_fm_loss(v: Tensor, v_ref: Tensor, u: Tensor, advantage: Tensor, beta0: float) -> Tensor:
    """ADRPO for flow matching (eq. 6): A |v - u|^2 + (beta0 - A) |v - v_ref|^2.

    v, v_ref, u [B,...], advantage [B] -> loss [B]. As a function of v its curvature is
    A + (beta0 - A) = beta0 whatever A is: it equals beta0 |v - v_star|^2 up to a constant, with
    v_star = v_ref + (A / beta0)(u - v_ref), and is bounded below for bad samples too (ours)."""
    return advantage * mean_square(v - u) + (beta0 - advantage) * mean_square(v - v_ref)


def orw_fm_loss(v: Tensor, v_ref: Tensor, u: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """ORW-CFM-W2: w |v - u|^2 + alpha |v - v_ref|^2. v, v_ref, u [B,...], weight [B] -> [B]."""
    return weight * mean_square(v - u) + alpha * mean_square(v - v_ref)


def dpo_fm_loss(v_w, v_w_ref, u_w, v_l, v_l_ref, u_l, beta_dpo: float) -> Tensor:
    """Diffusion-DPO on the flow-matching errors e = mean |v - u|^2 of winners (w) and losers (l),
    which share noise and t: -log sigmoid(-beta_dpo / 2 [(e_w - e_w_ref) - (e_l - e_l_ref)]).
    Six tensors [B,...] -> loss [B]."""
    winner = mean_square(v_w - u_w) - mean_square(v_w_ref - u_w)
    loser = mean_square(v_l - u_l) - mean_square(v_l_ref - u_l)
    return -F.logsigmoid(-beta_dpo / 2 * (winner - loser))


# ----------------------------------------------------------------------------------------- rollout
def seed_everything(*numbers: int) -> torch.Generator:
    """A generator from `numbers`, and every global random state, which a plug-in may use, from
    other words of the same seed sequence."""
    own, others = map(int, np.random.SeedSequence(numbers).generate_state(2))
    random.seed(others)
    np.random.seed(others)
    torch.manual_seed(others)
    return torch.Generator().manual_seed(own)


def draw_prompts(prompts: list[str], per_update: int, iterations: int, seed: int) -> list:
    """The prompts of each iteration: one pass after the other over all, each shuffled anew."""
    drawn = []
    while len(drawn) < per_update * iterations:
        order = np.random.default_rng([seed, len(drawn) // len(prompts)]).permutation(len(prompts))
        drawn += [prompts[row] for row in order]
    return [drawn[i * per_update : (i + 1) * per_update] for i in range(iterations)]


def draw_points(rng: torch.Generator, shape: tuple, args: Args, draws: int) -> tuple:
    """Times s [n] and noise [n,...] of an update's points, on the CPU, in the order prompt, repeat,
    image. Of a group's G points `draws` are drawn, neighbours share: 1 = all, G / 2 = pairs."""
    count = args.prompts_per_update * args.timesteps_per_sample * draws
    s = torch.rand(count, generator=rng)
    if args.timestep_distribution == "logit-normal":
        s = torch.randn(count, generator=rng).sigmoid()
    s = args.timestep_shift * s / (1 + (args.timestep_shift - 1) * s)
    noise = torch.randn(count, *shape, generator=rng)
    share = args.group_size // draws
    return s.repeat_interleave(share), noise.repeat_interleave(share, dim=0)


def flow_matching_point(x1: Tensor, noise: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = (1 - s) x1 + s noise and its velocity u = noise - x1: [B,...], [B,...], s [B]."""
    return torch.lerp(x1, noise, s.view(-1, *[1] * (x1.dim() - 1))), noise - x1


class PromptMemory:
    """Stands for a pipeline's encode_prompt: encodes each text once and remembers it (CPU)."""

    def __init__(self, pipe: DiffusionPipeline, guided: bool):
        self.pipe, self.encode, self.guided = pipe, pipe.encode_prompt, guided
        self.signature = inspect.signature(pipe.encode_prompt)
        self.known = {}  # text and arguments -> what encode_prompt returned
        self.shapes = {}  # text -> the shapes of that
        pipe.encode_prompt = self

    @torch.no_grad()
    def __call__(self, *args, **kwargs) -> tuple[Tensor | None, ...]:
        given = dict(self.signature.bind(*args, **kwargs).arguments)
        prompts, device = given.pop("prompt"), given.pop("device", None) or self.pipe.device
        if "do_classifier_free_guidance" in self.signature.parameters:
            given["do_classifier_free_guidance"] = self.guided  # serves calls without it as well
        answers = []
        for text in [prompts] if isinstance(prompts, str) else prompts:
            key = repr((text, sorted(given.items())))
            if key not in self.known:
                results = self.encode(prompt=text, device=device, **given)
                tensors = all(part is None or isinstance(part, Tensor) for part in results)
                need(self.pipe, tensors, "it encodes prompts as lists")
                results = [part if part is None else part.cpu() for part in results]
                # What all prompts share, such as the empty prompt's embedding, is kept once.
                for i, old in enumerate(next(iter(self.known.values()), [])):
                    if old is not None and results[i] is not None and torch.equal(old, results[i]):
                        results[i] = old
                self.known[key] = results
                self.shapes[text] = [part.shape for part in results if part is not None]
            answers.append(self.known[key])
        joined = []
        for parts in zip(*answers, strict=True):  # a row a prompt, or one tensor for all
            part = parts[0] if parts[0] is None or len(parts[0]) > 1 else torch.cat(parts)
            joined.append(part if part is None else part.to(device))
        return tuple(joined)


class Flow(NamedTuple):
    """A flow-matching pipeline: how it is called, and what `prove` found out about it."""

    pipe: DiffusionPipeline  # its transformer is the policy, without the LoRA the reference
    memory: PromptMemory
    options: dict  # arguments of every call: size, text length
    guidance_scale: float
    shape: tuple[int, ...] = ()  # of one sample's latents
    sign: float = 1.0  # of the transformer's answer against dx/ds
    offset: float = 0.0  # the transformer's time is offset + slope * s
    slope: float = 1.0
    time_dtype: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32  # of the points that the transformer is asked about
    noise_dtype: torch.dtype = torch.float32  # of the latents between the steps


def call(flow: Flow, prompts: list[str], guided: bool, num_steps: int, **more):
    """The pipeline's own call for these prompts, with classifier-free guidance or without."""
    # A scale that the transformer is told is no such guidance: it is always given.
    told = getattr(flow.pipe.transformer.config, "guidance_embeds", False)
    scale = flow.guidance_scale if guided or told else 1.0
    options = flow.options | {"num_inference_steps": num_steps, "guidance_scale": scale}
    if "true_cfg_scale" in inspect.signature(flow.pipe.__call__).parameters and not told:
        options["true_cfg_scale"] = options.pop("guidance_scale")
        options["negative_prompt"] = [""] * len(prompts) if scale > 1 else None
    return flow.pipe(prompt=prompts, **options, **more)


class AtTheDoor(Exception):
    """Leaves a pipeline's call where it asks its transformer."""


@contextlib.contextmanager
def watch(pipe: DiffusionPipeline, leave: bool = False) -> Iterator[tuple[list, list]]:
    """What a call asks the transformer, as keyword arguments, and the steps of its scheduler, as
    (v, sigma, x). leave: the call ends at the transformer's door."""
    transformer, scheduler, step = pipe.transformer, pipe.scheduler, pipe.scheduler.step
    forward, asked, stepped = inspect.signature(transformer.forward), [], []

    def see_question(transformer: nn.Module, args: tuple, kwargs: dict) -> None:
        question = dict(forward.bind(*args, **kwargs).arguments)
        asked.append(question | question.pop("kwargs", {}))
        if leave:
            raise AtTheDoor

    def see_step(v: Tensor, timestep: Tensor, x: Tensor, *args, **kwargs):
        stepped.append((v.float(), float(scheduler.sigmas[scheduler.step_index or 0]), x))
        return step(v, timestep, x, *args, **kwargs)

    hook = transformer.register_forward_pre_hook(see_question, with_kwargs=True)
    scheduler.step = see_step
    try:
        yield asked, stepped
    except AtTheDoor:
        pass
    finally:
        hook.remove()
        del scheduler.step


def ask(flow: Flow, prompts: list[str]) -> dict:
    """What the pipeline asks its transformer about these prompts, without guidance: arguments."""
    with watch(flow.pipe, leave=True) as (asked, _):
        call(flow, prompts, guided=False, num_steps=1, output_type="latent")
    return asked[0]


def velocity(flow: Flow, question: dict, x: Tensor, s: Tensor) -> Tensor:
    """Velocity from image to noise, float32 [B,...], at points x [B,...] and times s [B]."""
    asked_time = (flow.offset + flow.slope * s).to(flow.time_dtype)
    point = {"hidden_states": x.to(flow.dtype), "timestep": asked_time, "return_dict": False}
    return flow.sign * flow.pipe.transformer(**question | point)[0].float()


@torch.no_grad()
def reference_velocity(flow: Flow, question: dict, x: Tensor, s: Tensor) -> Tensor:
    """The same of the model without its LoRA."""
    flow.pipe.transformer.disable_adapters()
    v_ref = velocity(flow, question, x, s)
    flow.pipe.transformer.enable_adapters()
    return v_ref


def batches(flow: Flow, prompts: list[str], size: int) -> Iterator[slice]:
    """Cut a list of prompts into parts of at most `size` whose conditions have one shape."""
    shapes = [flow.memory.shapes[prompt] for prompt in prompts]
    start = 0
    for stop in range(1, len(prompts) + 1):
        if stop == len(prompts) or stop - start == size or shapes[stop] != shapes[start]:
            yield slice(start, stop)
            start = stop


@torch.no_grad()
def sample(flow: Flow, prompts: list[str], noise: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """The pipeline's own samples from noise [B,...]: latents x1 [B,...] and images [B,3,H,W] in
    [0,1], float32. Raises InputError when they are not finite: the policy has diverged."""
    kept = {}

    def keep_latents(pipe: DiffusionPipeline, step: int, timestep: Tensor, state: dict) -> dict:
        kept.update(state)
        last = step == num_steps - 1  # the autoencoder decodes in its own precision
        return {"latents": state["latents"].to(pipe.vae.dtype)} if last else {}

    noise = noise.to(flow.pipe.device, flow.noise_dtype)
    options = {"latents": noise, "callback_on_step_end": keep_latents, "output_type": "pt"}
    images = call(flow, prompts, True, num_steps, **options).images.float()
    latents = kept["latents"].float()
    if not (latents.isfinite().all() and images.isfinite().all()):
        raise InputError(f"the policy's samples are not finite numbers: {DIVERGED}")
    return latents, images


@torch.no_grad()
def sample_and_score(flow: Flow, functions: dict, prompts: list, rows: list, noise, steps, batch):
    """`latents` of prompts [B] with metadata `rows`, from noise [B,...], and by name what
    `functions` give for their images; and the seconds of these functions."""
    found, seconds = defaultdict(list), 0.0
    for part in batches(flow, prompts, batch):
        latents, images = sample(flow, prompts[part], noise[part], steps)
        found["latents"].append(latents)
        started = time.perf_counter()  # each part ends with a value read from the device
        for name, function in functions.items():
            found[name].append(function(images, prompts[part], rows[part]))
        seconds += time.perf_counter() - started
    return {name: torch.cat(parts) for name, parts in found.items()}, seconds


@torch.no_grad()
def rollout(flow: Flow, judges, prompts: list, rows: dict, mine: slice, rng, accelerator, args):
    """A group of samples of each of these prompts [P], metadata in `rows`: x1 [B,...] of the groups
    `mine`, this process's, the rewards [P,G,R] of all, and their seconds."""
    # Every process draws all of the noise: the result does not depend on their number.
    noise = torch.randn(len(prompts), args.group_size, *flow.shape, generator=rng)[mine]
    prompts = [prompt for prompt in prompts[mine] for _ in range(args.group_size)]
    functions = {name: judges.functions[name] for name in judges.weights}
    options = noise.flatten(0, 1), args.num_steps, args.rollout_batch
    own_rows = [rows[prompt] for prompt in prompts]
    found, seconds = sample_and_score(flow, functions, prompts, own_rows, *options)
    values = accelerator.gather(torch.stack([found[name] for name in functions], dim=1))
    return found["latents"], values.unflatten(0, (-1, args.group_size)), seconds


def measure_spread(reward: Tensor, args: Args) -> tuple[float, str]:
    """Spread of the base model's rewards [P,G] within a prompt, what beta0 asks for; InputError."""
    mean, std = reward.mean().item(), reward.var(dim=1).mean().sqrt().item()
    if args.adv_norm == "base" and std <= 1e-6 * abs(mean):
        raise InputError("--reward: the base model's are all equal; --adv-norm none goes on")
    # To first order the optimum's mean reward is Cov(R, A) / beta0 above the base model's.
    gain = (std**2 if args.adv_norm == "none" else std) / args.beta0
    spread = f"base reward {mean:.3f} +- {std:.3f} within a prompt"
    return std, f"{spread}; beta0 {args.beta0:g} asks for {gain:+.3f}"


# -------------------------------------------------------------------------------------- evaluation
class EvalSet(NamedTuple):
    """What every evaluation of a run shares, drawn once."""

    prompts: list[str]  # [N], each held-out prompt --eval-images times
    rows: list[dict]  # [N], their metadata
    noise: Tensor  # [N,...]
    x_t: Tensor  # [N,...], the points of W2, made of samples of the base model
    s: Tensor  # [N]
    base: dict[str, float]  # the base model's figures


def pairwise_diversity(features: Tensor) -> Tensor:
    """Mean over the pairs i != j of one prompt of 1 - cosine(f_i, f_j): [P,G,D] -> [P] (ours; the
    paper publishes no formula). The sum over all pairs of unit vectors is |sum_i f_i|^2."""
    unit = F.normalize(features.float(), dim=-1)
    count = unit.shape[1]
    pair_sum = unit.sum(dim=1).square().sum(dim=-1) - unit.square().sum(dim=(1, 2))  # i != j
    return 1 - pair_sum / (count * (count - 1))


def pairwise_distance(features: Tensor) -> Tensor:
    """Mean over the pairs of one prompt of |f_i - f_j|, features not normalised: [P,G,D] -> [P]
    (ours: with ViT-L/14 it has the scale of the paper's CLIP diversity, about 5)."""
    return torch.stack([torch.pdist(group).mean() for group in features.float()])


@torch.no_grad()
def evaluate(flow: Flow, judges: "Judges", eval_set: EvalSet, accelerator, args: Args):
    """Every eval/* figure of the policy; its images uint8 [N,3,H,W] and latents [N,...], CPU."""
    count = len(eval_set.prompts)
    share = math.ceil(count / accelerator.num_processes)  # the last processes do some once more
    mine = [(accelerator.process_index * share + i) % count for i in range(share)]
    prompts, rows = [eval_set.prompts[i] for i in mine], [eval_set.rows[i] for i in mine]
    noise, x_t, s = (part[mine] for part in (eval_set.noise, eval_set.x_t, eval_set.s))
    functions = judges.functions | {"features": lambda images, *_: judges.clip.image(images)}
    functions["images"] = lambda images, *_: (images * 255).round().byte()
    options = rows, noise, args.eval_steps, args.rollout_batch
    found, _ = sample_and_score(flow, functions, prompts, *options)
    w2 = []  # ORW-CFM-W2's bound: the velocities' distance at fixed points and times
    for part in batches(flow, prompts, args.rollout_batch):
        question = ask(flow, prompts[part])
        point = x_t[part].to(accelerator.device), s[part].to(accelerator.device)
        v, v_ref = velocity(flow, question, *point), reference_velocity(flow, question, *point)
        w2.append(mean_square(v - v_ref))
    found["w2"] = torch.cat(w2)
    whole = {name: accelerator.gather(part)[:count] for name, part in found.items()}
    features = whole["features"].unflatten(0, (-1, args.eval_images))  # [P,G,D]
    figures = {name: whole[name].mean().item() for name in (*judges.functions, "w2")}
    figures["reward"] = sum(weight * figures[name] for name, weight in judges.weights.items())
    figures["clip_diversity"] = pairwise_diversity(features).mean().item()
    figures["clip_distance"] = pairwise_distance(features).mean().item()
    for name in ("clip_diversity", "clip_distance"):
        base = eval_set.base.get(name, figures[name])
        figures[f"{name}_ratio"] = figures[name] / base if base else None  # equal base images
    return figures, whole["images"].cpu(), whole["latents"].cpu()


def save_samples(run_dir: Path, writer: SummaryWriter, step: int, images: Tensor, args) -> None:
    """16 prompts, a row each, of images uint8 [N,3,H,W] on a sheet; at the end every image."""
    rows = images.unflatten(0, (-1, args.eval_images))[:16, :8]
    sheet = make_grid(rows.flatten(0, 1).float() / 255, nrow=rows.shape[1], padding=2)
    save_image(sheet, run_dir / f"samples/{step:06d}.png")
    writer.add_image("samples", sheet, step)
    (run_dir / "samples/final").mkdir(exist_ok=True)
    for i, image in enumerate(images if step == args.iterations else ()):
        name = f"{i // args.eval_images:04d}_{i % args.eval_images:02d}.png"
        save_image(image.float() / 255, run_dir / "samples/final" / name)


# ----------------------------------------------------------------------------------------- rewards
class Clip:
    """An open_clip model: images [B,3,H,W] in [0,1] -> features [B,D], prompts -> unit [B,D]."""

    def __init__(self, name: str, pretrained: str | None, device: torch.device):
        pretrained = None if name.startswith("local-dir:") else pretrained
        # OpenAI's weights were trained with another GELU than the architecture of that name has.
        known = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
        options = {"force_quick_gelu": bool(known.get("quick_gelu")), "device": device}
        with naming(f"--clip-model {name}, --clip-pretrained {pretrained}", "see open_clip's list"):
            model = open_clip.create_model(name, pretrained, require_pretrained=True, **options)
        self.source = name if pretrained is None else f"{name}:{pretrained}"
        if known.get("hf_hub"):  # the folder of the file in the hub's cache is named by the commit
            self.source += f"@{Path(open_clip.download_pretrained(known)).parent.name}"
        self.model, self.device = model.eval().requires_grad_(False), device
        self.tokenizer = open_clip.get_tokenizer(name)
        config = open_clip.get_model_preprocess_cfg(model)
        self.size, self.mean, self.std = (config[key] for key in ("size", "mean", "std"))

    def image(self, images: Tensor) -> Tensor:
        """open_clip's own preprocessing, on tensors: shorter side to its size, bicubic; centre."""
        side = self.size[-1] if isinstance(self.size, (tuple, list)) else self.size
        images = TF.resize(images, [side], TF.InterpolationMode.BICUBIC, antialias=True)
        images = TF.center_crop(images.clamp(0, 1), [side, side])
        pixels = TF.normalize(images, list(self.mean), list(self.std))
        return self.model.encode_image(pixels).float()

    def text(self, prompts: list[str]) -> Tensor:
        unique = list(dict.fromkeys(prompts))  # a group repeats its prompt: encode it once
        tokens = self.tokenizer(unique).to(self.device)
        features = self.model.encode_text(tokens, normalize=True).float()
        return features[[unique.index(prompt) for prompt in prompts]]

    def score(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        """The reward `clip`: 100 cos(image, prompt)."""
        return 100 * (F.normalize(self.image(images)) * self.text(prompts)).sum(1)


def load_plugin(spec: str) -> Callable:
    """The function that FILE.py:function names. Raises InputError where there is no such file."""
    path, _, name = spec.rpartition(":")
    if not (path.endswith(".py") and Path(path).is_file()):
        raise InputError(f"--reward, --eval-metrics {spec}: give clip or FILE.py:function")
    module_name = f"reward_plugin_{Path(path).stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.path.append(str(Path(path).parent))
    sys.modules[module_name] = module  # where dataclasses and pickle look it up
    module_spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise InputError(f"--reward, --eval-metrics {spec}: {path} has no function {name}")
    return getattr(module, name)


@torch.no_grad()
def score(name: str, function: Callable, images: Tensor, prompts: list, rows: list) -> Tensor:
    """One reward of images [B,3,H,W] -> float32 [B]. Raises InputError when it gives others."""
    # A function may write into what it gets.
    values = function(images.clone(), list(prompts), copy.deepcopy(rows))
    with naming(f"--reward {name}", f"it must give {len(images)} finite floats"):
        rewards = torch.as_tensor(values, dtype=torch.float32, device=images.device).detach()
        if rewards.shape != images.shape[:1] or not rewards.isfinite().all():
            bad = (~rewards.isfinite()).sum()
            raise ValueError(f"it gave shape {list(rewards.shape)}, {bad} not finite")
    return rewards


class Judges(NamedTuple):
    """What scores the images of a run."""

    functions: dict[str, Callable]  # by tag: (images, prompts, metadata) -> [B]
    weights: dict[str, float]  # of those that are trained on, in their sum
    clip: Clip
    sources: dict[str, str]  # their models with their revisions, as far as they say


def build_judges(args: Args, train: dict[str, dict], device: torch.device) -> Judges:
    """Rewards and metrics, tried on two grey images. Raises InputError where two have one tag."""
    plugins = {}
    for spec in (*args.reward, *[spec for spec in args.eval_metrics if spec not in args.reward]):
        name = spec.rpartition(":")[2]
        if name in TAKEN_TAGS | plugins.keys():
            raise InputError(f"--reward, --eval-metrics {spec}: the tag {name} is taken; rename it")
        plugins[name] = None if spec == "clip" else load_plugin(spec)
    clip = Clip(args.clip_model, args.clip_pretrained, device)
    functions, sources = {}, {"clip": clip.source}
    grey = torch.full((2, 3, args.resolution, args.resolution), 0.5, device=device)
    prompt, row = next(iter(train.items()))
    for name, plugin in plugins.items():
        functions[name] = functools.partial(score, name, plugin or clip.score)
        functions[name](grey, [prompt] * 2, [row] * 2)
        if plugin:
            sources |= getattr(sys.modules[plugin.__module__], "SOURCES", {})
    weights = dict(zip(plugins, args.reward_weights or [1.0] * len(args.reward), strict=False))
    return Judges(functions, weights, clip, sources)


# -------------------------------------------------------------------------------------------- data
def read_rows(spec: str, split: str | None) -> tuple[list, str]:
    """The rows of a file, or of NAME[:CONFIGURATION][@REVISION], and the source with its commit."""
    path = Path(spec)
    if path.suffix in (".txt", ".jsonl", ".json"):
        text = path.read_bytes().decode("utf-8-sig")  # without the mark that some editors write
        if path.suffix == ".json" and text.lstrip().startswith("["):
            return json.loads(text), spec
        lines = [line for line in text.split("\n") if line.strip()]
        return lines if path.suffix == ".txt" else [json.loads(line) for line in lines], spec

    import datasets  # here, because it is slow to import and these files do not need it

    if path.suffix in (".csv", ".parquet"):
        return list(datasets.load_dataset(path.suffix[1:], data_files=spec)["train"]), spec
    name, _, revision = spec.partition("@")
    name, _, configuration = name.partition(":")
    parts = datasets.load_dataset(name, configuration or None, revision=revision or None)
    rows = parts[split or next(iter(parts))]
    if path.exists() or not rows.cache_files:
        return list(rows), spec
    # The folder of its cache that the library has read is named after the commit.
    commit = Path(rows.cache_files[0]["filename"]).parent.name
    return list(rows), f"{spec.partition('@')[0]}@{commit}"


def load_rows(flag: str, spec: str, column: str | None, split: str | None):
    """Unique prompts in their order, each one's other columns, a note on rows that are not used,
    the source with its commit. Raises InputError where there is no prompt."""
    kinds = f"give .txt, .jsonl, .json, .csv, .parquet, or --{flag} NAME:CONFIGURATION@REVISION"
    with naming(f"--{flag} {spec}", kinds):
        rows, source = read_rows(spec, split)
        rows = [{"prompt": row} if isinstance(row, str) else dict(row) for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    known = [name for name in ("prompt", "prompts", "text", "caption") if name in columns]
    column = column or next(iter(known), "prompt")
    texts = [row.pop(column, None) for row in rows]
    texts = [text.strip() if isinstance(text, str) else "" for text in texts]
    unique, empty = {}, texts.count("")
    for text, row in zip(texts, rows, strict=True):
        unique.setdefault(text, row)  # of a repeated prompt the first row counts
    unique.pop("", None)
    if not unique:
        what = f"no text in column {column} (columns: {', '.join(columns)})"
        raise InputError(f"--{flag} {spec}: {what}; see --prompt-column")
    repeated = len(rows) - empty - len(unique)
    note = f"--{flag}: of {len(rows)} rows {empty} without a prompt, {repeated} repeated: not used"
    return list(unique), list(unique.values()), note if empty + repeated else "", source


def load_prompts(args: Args) -> tuple[dict[str, dict], dict[str, dict], str, dict[str, str]]:
    """Training and held-out prompts with their metadata, a note on them, and their sources."""
    options = args.prompt_column, args.prompt_split
    prompts, rows, note, source = load_rows("prompts", args.prompts, *options)
    train, sources, notes = dict(zip(prompts, rows, strict=True)), {"prompts": source}, [note]
    if args.eval_prompts:
        prompts, rows, note, source = load_rows("eval-prompts", args.eval_prompts, *options)
        heldout, sources["eval_prompts"] = dict(zip(prompts, rows, strict=True)), source
        notes.append(note)
    else:
        heldout = dict(list(train.items())[::10])
        train = {prompt: row for prompt, row in train.items() if prompt not in heldout} or train
        notes.append(f"every tenth of --prompts ({len(heldout)}) is held out for evaluation")
    common = len(train.keys() & heldout.keys())
    note = f"{common} of the {len(heldout)} evaluation prompts are trained on"
    notes.append(note + ": that is not held-out" * (common > 0))
    heldout = dict(list(heldout.items())[: args.eval_max_prompts])
    sources["prompts_sha256"] = hashlib.sha256(repr((train, heldout)).encode()).hexdigest()
    return train, heldout, "; ".join(filter(None, notes)), sources


# --------------------------------------------------------------------------- models and reference
def need(pipe: DiffusionPipeline, holds: bool, why: str) -> None:
    """Raise InputError, naming the pipeline, unless this holds."""
    if not holds:
        raise InputError(f"--model-id: a {type(pipe).__name__} cannot be tuned: {why}")


def find_model(spec: str) -> tuple[str, str | None]:
    """Name and commit of NAME[@REVISION] of the hub, by its smallest file; or InputError."""
    name, _, revision = spec.partition("@")
    if (Path(spec) / "model_index.json").is_file():
        return spec, None
    remedy = "give a folder with a model_index.json or a NAME[@REVISION] of the hub; where it is "
    remedy += f"gated, log in, with its licence accepted at https://huggingface.co/{name}"
    with naming(f"--model-id {spec}", remedy):
        path = hf_hub_download(name, "model_index.json", revision=revision or None)
    return name, Path(path).parent.name


def load_pipeline(
    name: str, revision: str | None, dtype: torch.dtype, leave_out: tuple[str, ...] = ()
) -> DiffusionPipeline:
    """The pipeline on the CPU, frozen, in `dtype` but the autoencoder. Raises InputError where a
    network's own loader reports weights that its files do not have."""
    parts = dict.fromkeys(leave_out)
    for part, source in DiffusionPipeline.load_config(name, revision=revision).items():
        library, kind = source if isinstance(source, list) else (None, None)
        kind = getattr(sys.modules.get(library), str(kind), None)
        if part in leave_out or not (inspect.isclass(kind) and issubclass(kind, nn.Module)):
            continue
        options = {"subfolder": part, "revision": revision, "output_loading_info": True}
        options["dtype"] = torch.float32 if part == "vae" else dtype
        options["local_files_only"] = is_offline_mode()  # else diffusers asks about shards
        with naming(f"--model-id {name}/{part}", "give a pipeline that diffusers can load"):
            network, report = kind.from_pretrained(name, **options)
        # Of shards diffusers reports what the index promises; what the files lack stays empty.
        empty = {key for key, weight in network.named_parameters() if weight.is_meta}
        missing = sorted({*map(str, [*report["missing_keys"], *report["mismatched_keys"]]), *empty})
        if missing:
            lost = f"{len(missing)} weights are not in its files, such as {missing[0]}"
            raise InputError(f"--model-id {name}: {part}: {lost}")
        parts[part] = network.requires_grad_(False).eval()
    options = {"revision": revision, "dtype": dtype, "trust_remote_code": False}
    pipe = DiffusionPipeline.from_pretrained(name, **options, **parts)
    networks = {part for part, value in pipe.components.items() if isinstance(value, nn.Module)}
    what = f"needs transformer and vae, of diffusers and transformers only: {networks}"
    need(pipe, {"transformer", "vae"} <= networks <= parts.keys(), what)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_flow(pipe: DiffusionPipeline, args: Args, prompts: list[str], device) -> Flow:
    """The pipeline on the device, every prompt encoded, the text encoders freed; or InputError."""
    names = inspect.signature(pipe.__call__).parameters
    options = {"height": args.resolution, "width": args.resolution}
    if args.max_sequence_length is not None:
        options["max_sequence_length"] = args.max_sequence_length
    if "use_resolution_binning" in names:  # would draw at another resolution than asked for
        options["use_resolution_binning"] = False
    unknown = {*options, "latents", "callback_on_step_end", "guidance_scale"} - names.keys()
    need(pipe, not unknown, f"it does not take {unknown}")
    flow = Flow(pipe, PromptMemory(pipe, args.guidance_scale > 1), options, args.guidance_scale)
    parts = {part: value for part, value in pipe.components.items() if isinstance(value, nn.Module)}
    encoders = parts.keys() - {"transformer", "vae"}
    for part in encoders:
        parts[part].to(device)
    for prompt in tqdm(prompts, "encode prompts", leave=False, disable=len(prompts) < 64):
        ask(flow, [prompt])
    pipe.register_modules(**dict.fromkeys(encoders))
    del parts
    gc.collect()
    torch.cuda.empty_cache()
    pipe.transformer.to(device)
    pipe.vae.to(device)
    if args.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    return flow


@torch.no_grad()
def prove(flow: Flow, prompt: str) -> tuple[Flow, float]:
    """How the pipeline asks its transformer, proven at each step of a call of four: its velocity is
    that of our question, sigma falls to 0, time is linear in it, the first step is Euler's. Returns
    the flow and the largest error, in units of the noise. Raises InputError: no flow matching."""
    pipe, scheduler, prompts = flow.pipe, flow.pipe.scheduler, [prompt, prompt]
    question = ask(flow, prompts)
    usual = {"hidden_states", "timestep"} <= question.keys()
    need(pipe, usual, f"its transformer is asked for {sorted(question)}")
    need(pipe, hasattr(scheduler, "sigmas"), "its scheduler has no sigmas")
    with watch(pipe) as (asked, stepped):
        call(flow, prompts, guided=False, num_steps=4, output_type="latent")
    once = len(asked) == len(stepped) == 4
    need(pipe, once, f"it asks its transformer {len(asked)} times in 4 steps")
    sigmas = [sigma for _, sigma, _ in stepped] + [float(scheduler.sigmas[-1])]
    falls = sigmas[0] <= 1.001 and sigmas[-1] == 0 and sigmas == sorted({*sigmas}, reverse=True)
    need(pipe, falls, f"its sigmas {sigmas} do not fall from 1 to 0: no flow matching")
    times = [float(each["timestep"].flatten()[0]) for each in asked]
    gaps = {}
    for offset, slope in ((0, 1), (0, 1000), (1, -1), (1000, -1000)):
        pairs = zip(sigmas, times, strict=False)
        gaps[offset, slope] = max(abs(offset + slope * s - t) / abs(slope) for s, t in pairs)
    offset, slope = min(gaps, key=gaps.get)
    linear = gaps[offset, slope] <= 5e-3
    need(pipe, linear, f"its time {times} is no linear function of sigma {sigmas}")
    x, time_dtype = question["hidden_states"], question["timestep"].dtype
    answers, moved = [], []
    for own, (_, _, point) in zip(asked, stepped, strict=True):
        own = {name: own[name] for name in ("hidden_states", "timestep")} | {"return_dict": False}
        answers.append(pipe.transformer(**question | own)[0].float())
        moved.append(own["hidden_states"].float() - point.to(x.dtype).float())
    answers, velocities = torch.stack(answers), torch.stack([v for v, _, _ in stepped])
    # Of an untrained transformer, which answers 0, the sign is that of its time.
    signs = (math.copysign(1, slope), -math.copysign(1, slope))
    errors = {sign: (sign * answers - velocities).abs().max() for sign in signs}
    sign = min(errors, key=errors.get)

    (v, s, x_0), (_, s_next, x_1) = stepped[:2]
    size = x_0.float().abs().max()  # of the noise
    step_error = ((x_0.float() + (s_next - s) * v - x_1.float()).abs().max() / size).item()
    error = (torch.stack([errors[sign], torch.stack(moved).abs().max()]).max() / size).item()
    follows = error <= 1e-3 and step_error <= 1e-2  # false for NaN
    what = f"its velocity is off by {error:.1g}, its first step by {step_error:.1g}"
    need(pipe, follows, f"it does not follow its transformer's velocity: {what}")
    found = {"shape": tuple(x.shape[1:]), "sign": sign, "offset": offset, "slope": slope}
    found["time_dtype"] = time_dtype if time_dtype.is_floating_point else torch.float32
    return flow._replace(**found, dtype=x.dtype, noise_dtype=x_0.dtype), error


def add_lora(transformer: nn.Module, args: Args) -> list[nn.Parameter]:
    """A LoRA in float32 on a frozen transformer, of random A and zero B; its parameters."""
    options = {"target_modules": list(args.lora_targets), "lora_alpha": args.lora_alpha}
    config = peft.LoraConfig(r=args.lora_rank, init_lora_weights="gaussian", **options)
    transformer.add_adapter(config)
    cast_training_params(transformer, torch.float32)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


# --------------------------------------------------------------------------------------- run files
def create_run(args: Args, sources: dict[str, str]) -> Path:
    """Create the run's folder with args.json in it. Raises InputError where it cannot."""
    name = f"{SCRIPT}-{args.method}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(args.output_dir) / (args.run_name or name)
    git = f'git -C "{Path(__file__).resolve().parent}" rev-parse HEAD'
    failed, commit = subprocess.getstatusoutput(git)
    record = {"script": SCRIPT, "args": dataclasses.asdict(args), "command": sys.argv}
    libraries = (torch, diffusers, transformers, peft, accelerate, open_clip)
    versions = {"python": sys.version} | {lib.__name__: lib.__version__ for lib in libraries}
    record |= {"git_commit": None if failed else commit, "versions": versions, "sources": sources}
    with naming("--output-dir, --run-name", "give a folder that can be written, and a new name"):
        (folder / "samples").mkdir(parents=True)
        (folder / "final").mkdir()
    (folder / "args.json").write_text(json.dumps(record, indent=2))
    return folder


def find_run(args: Args) -> tuple[Args, Path, dict[str, str]]:
    """Flags (pinned to commits), folder and sources of the run that --resume names; InputError."""
    folder = Path(args.resume)
    if args.resume == "latest":
        files = Path(args.output_dir).glob("*/args.json")
        files = [file for file in files if json.loads(file.read_text())["script"] == SCRIPT]
        folder = max(files, key=os.path.getmtime, default=folder / "args.json").parent
    if not args.resume or not any(folder.glob("checkpoint*.pt")):
        raise InputError(f"--resume {args.resume}: no checkpoint in {folder}; start a new run")
    record = json.loads((folder / "args.json").read_text())
    flags = {k: tuple(v) if isinstance(v, list) else v for k, v in record["args"].items()}
    stored = Args(**flags)
    given = vars(tyro.cli(Args, default=stored))  # the command line on top of the run's flags
    for name in flags.keys() - {"resume", "output_dir"}:
        if given[name] != flags[name]:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag}: the resumed run has {flags[name]}; leave it out")
    pinned = {name: source for name, source in record["sources"].items() if name in flags}
    return dataclasses.replace(stored, **pinned), folder, record["sources"]


def lock_run(run_dir: Path) -> FileLock:
    """Hold the run until this process ends. Raises InputError where another writes it."""
    lock = FileLock(run_dir / ".lock")
    with naming(f"--resume {run_dir}", "another process is writing this run"):
        lock.acquire(blocking=False)
    return lock


def log(run_dir: Path, writer: SummaryWriter, step: int, record: dict) -> None:
    """Append one line of strict JSON to metrics.jsonl, and the same figures to TensorBoard."""
    row = {"step": step, **record}
    with (run_dir / "metrics.jsonl").open("a") as file:
        print(json.dumps(row, allow_nan=False), file=file, flush=True)
        os.fsync(file.fileno())  # a checkpoint counts on it
    for tag, value in record.items():
        if value is not None:
            writer.add_scalar(tag, value, step)


def write_safely(path: Path, state: dict) -> None:
    """torch.save under another name, flushed to the disk, then renamed: never half a file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with path.with_suffix(".part").open("wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        path.replace(path.with_stem(f"{path.stem}-previous"))
    path.with_suffix(".part").replace(path)


def load_checkpoint(run_dir: Path) -> dict:
    """The state in the newest checkpoint. Raises InputError for a damaged file."""
    path = run_dir / "checkpoint.pt"
    path = path if path.exists() else run_dir / "checkpoint-previous.pt"
    with naming(f"--resume: {path}", "delete it to go on from checkpoint-previous.pt"):
        damaged = zipfile.ZipFile(path).testzip()  # the check sums, which torch.load does not ask
        if damaged:
            raise ValueError(f"wrong check sum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)


def save_lora(folder: Path, pipe: DiffusionPipeline) -> None:
    """The LoRA as any pipeline of this kind loads it. Without the metadata its alpha is lost."""
    weights = peft.get_peft_model_state_dict(pipe.transformer)
    metadata = pipe.transformer.peft_config["default"].to_dict()
    layers = {"transformer_lora_layers": weights, "transformer_lora_adapter_metadata": metadata}
    pipe.save_lora_weights(folder, **layers)


def finish(run_dir: Path, summary: dict, model: tuple[str, str | None, torch.dtype]) -> None:
    """The whole run in one file and as a table, and how to load the result."""
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False))
    for name, value in summary["final"].items():
        print(f"{name:22s}{summary['base'][name] or 0:10.4f} -> {value or 0:.4f}")
    name, revision, dtype = model
    print(f"Images in {run_dir}/samples. To use the result:")
    print("import torch\nfrom diffusers import DiffusionPipeline")
    options = f"revision={revision!r}, dtype={dtype}"
    print(f'pipe = DiffusionPipeline.from_pretrained("{name}", {options})')
    print(f'pipe.load_lora_weights("{run_dir / "final"}")')


# -------------------------------------------------------------------------------------------- main
def check_args(args: Args, processes: int) -> None:
    """Raise InputError for flags that cannot work."""
    lowest = {"seed": 0, "alpha": 0, "weight_decay": 0, "reward_weights": -1e30}
    for flag, given in vars(args).items():
        values = given if isinstance(given, tuple) else (given,)
        numbers = [value for value in values if type(value) in (int, float)]
        if not all(lowest.get(flag, 1e-30) <= number < math.inf for number in numbers):
            flag = f"--{flag.replace('_', '-')} {' '.join(map(str, values))}"
            raise InputError(f"{flag}: must be a finite number, and positive (a weight: any)")
    if min(args.group_size, args.eval_images) < 2:
        raise InputError("--group-size, --eval-images: at least 2, the others are the baseline")
    if args.method == "dpo" and (args.group_size % 2 or args.train_batch % 2):
        raise InputError("--group-size, --train-batch: must be even for dpo, of pairs")
    if args.prompts_per_update % processes:
        raise InputError(f"--prompts-per-update: must be a multiple of {processes} processes")
    if not args.reward or len(args.reward_weights or args.reward) != len(args.reward):
        raise InputError("--reward-weights: must be as many as --reward names, one or more")
    if int(os.environ.get("WORLD_SIZE", "1")) != processes:
        raise InputError("torchrun: its processes would be unrelated runs here; add --cpu")


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """bfloat16 where it is asked for, or where a GPU has units for it."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = precision == "bf16" or (precision == "auto" and native)
    return torch.bfloat16 if bf16 else torch.float32


def main(args: Args) -> None:
    resumed = args.resume is not None
    if resumed:
        args, run_dir, recorded = find_run(args)
    accelerator = accelerate.Accelerator(cpu=args.cpu)
    device, is_main = accelerator.device, accelerator.is_main_process
    processes, rank = accelerator.num_processes, accelerator.process_index
    check_args(args, processes)
    if resumed and (run_dir / "summary.json").exists():
        accelerator.print(f"{run_dir} is finished: nothing is left to do")
        return
    dtype = choose_dtype(args.precision, device)

    # What is small and may be refused comes before what is large.
    model_name, commit = find_model(args.model_id)
    train, heldout, note, sources = load_prompts(args)
    judges = build_judges(args, train, device)
    sources |= {"model_id": f"{model_name}@{commit}" if commit else model_name, **judges.sources}
    if resumed and sources != recorded:
        changed = [name for name in sources | recorded if sources.get(name) != recorded.get(name)]
        raise InputError(f"--resume: {', '.join(changed)}: not what the run began with")

    # The pipeline, with the prompts that this run will draw, proven; its LoRA.
    leave_out = () if args.t5 else ("text_encoder_3", "tokenizer_3")
    pipe = load_pipeline(model_name, commit, dtype, leave_out)
    schedule = draw_prompts(list(train), args.prompts_per_update, args.iterations, args.seed)
    drawn = [prompt for prompts in schedule for prompt in prompts]
    flow = open_flow(pipe, args, list(dict.fromkeys([*drawn, *heldout, ""])), device)
    flow, error = prove(flow, drawn[0])
    transformer = pipe.transformer
    rng = seed_everything(args.seed)
    torch.manual_seed(rng.initial_seed())  # of the LoRA's first weights
    lora = add_lora(transformer, args)
    optimizer = torch.optim.AdamW(lora, lr=args.learning_rate, weight_decay=args.weight_decay)
    if args.compile:
        transformer.compile_repeated_blocks()

    if not resumed:
        run_dir = create_run(args, sources) if is_main else None
    lock = lock_run(run_dir) if is_main else None  # held until the process ends
    groups, group = args.prompts_per_update, args.group_size
    # Whole groups stay in one process.
    my_groups = slice(rank * groups // processes, (rank + 1) * groups // processes)
    accelerator.print(
        f"{run_dir}: {args.method}, {processes} x {device.type}, {dtype}, "
        f"{sum(parameter.numel() for parameter in lora):,} trained parameters\n"
        f"{type(pipe).__name__}: its transformer's time is {flow.offset} {flow.slope:+} s, sign "
        f"{flow.sign:+.0f}, velocity equal to {error:.0e}\n{len(train)} training prompts, "
        f"{len(heldout)} for evaluation; {note}\neach iteration {groups} prompts x {group} images, "
        f"{args.updates_per_rollout} updates, {args.timesteps_per_sample} points an image in each"
    )
    if group < 4:
        accelerator.print("warning: --group-size: the mean of so few images is a noisy baseline")

    # What every evaluation shares, and the base model's own figures: the LoRA is still zero.
    rng = seed_everything(args.seed, 0)
    prompts = [prompt for prompt in heldout for _ in range(args.eval_images)]
    noise = torch.randn(len(prompts), *flow.shape, generator=rng)
    rows = [heldout[prompt] for prompt in prompts]
    eval_set = EvalSet(prompts, rows, noise, noise, torch.ones(len(prompts)), {})
    if resumed:
        base = torch.load(run_dir / "base.pt", weights_only=True)
    else:
        metrics, images, latents = evaluate(flow, judges, eval_set, accelerator, args)
        base = {"metrics": metrics, "latents": latents, "reward_std": None, "spread": ""}
    s = (torch.randperm(len(prompts), generator=rng) + 0.5) / len(prompts)
    x_t, _ = flow_matching_point(base["latents"], torch.randn(noise.shape, generator=rng), s)
    eval_set = eval_set._replace(x_t=x_t, s=s, base=base["metrics"])

    weights = torch.tensor(list(judges.weights.values()), device=device)  # [R]
    if not resumed and args.method == "adrpo" and args.adv_norm in ("base", "none"):
        # One rollout of the base model: the unit of adrpo's advantage.
        rng = seed_everything(args.seed, 0, 1)
        options = (my_groups, rng, accelerator, args)
        _, values, _ = rollout(flow, judges, schedule[0], train, *options)
        base["reward_std"], base["spread"] = measure_spread((values * weights).sum(2), args)
    accelerator.print(base["spread"])

    first, metrics = 0, base["metrics"]
    if resumed:
        checkpoint = load_checkpoint(run_dir)
        first, metrics = checkpoint["iteration"], checkpoint["metrics"]
        for parameter, value in zip(lora, checkpoint["lora"], strict=True):
            parameter.data.copy_(value)
        optimizer.load_state_dict(checkpoint["optimizer"])
        if is_main:  # drops what was logged since
            os.truncate(run_dir / "metrics.jsonl", checkpoint["metrics_bytes"])
    writer = SummaryWriter(run_dir, purge_step=first + 1 if first else 0) if is_main else None
    if is_main and not resumed:
        write_safely(run_dir / "base.pt", base)
        (run_dir / "samples/prompts.txt").write_text("\n".join([*heldout, ""]), "utf-8")
        save_samples(run_dir, writer, 0, images, args)
        log(run_dir, writer, 0, {f"eval/{name}": value for name, value in metrics.items()})

    offline = args.method == "dpo" and not args.dpo_online
    regularised = args.method in ("adrpo", "dpo") or (args.method == "orw" and args.alpha > 0)
    bar = tqdm(range(first + 1, args.iterations + 1), args.method, disable=not is_main)
    for iteration in bar:
        # ---- 1. rollout: x1 from the policy (eq. 6), and its reward
        started = time.perf_counter()
        rng = seed_everything(args.seed, iteration)
        prompts = schedule[iteration - 1]
        if offline:  # pairs of the base model
            transformer.disable_adapters()
        options = (my_groups, rng, accelerator, args)
        x1, values, seconds_reward = rollout(flow, judges, prompts, train, *options)
        if offline:
            transformer.enable_adapters()
        record = {}
        for i, name in enumerate(judges.weights):
            record[f"reward/{name}"] = values[..., i].mean().item()
        reward = (values * weights).sum(2)  # [P,G]
        record |= {"reward/mean": reward.mean().item(), "reward/std": reward.std().item()}
        constant = (reward == reward[:, :1]).all(dim=1)  # [P]
        record["reward/frac_reward_zero_std"] = constant.float().mean().item()
        rewarded = time.perf_counter()

        # ---- 2. advantages, weights or picks (repeated: every method has as many points)
        if args.method == "adrpo":
            spread = (args.adv_clip_k, args.adv_norm, base["reward_std"])
            advantage = group_advantage(reward, args.beta0, *spread)  # [P,G]
            record |= adrpo_statistics(advantage, args.beta0)
            weight = advantage[my_groups].flatten()
        elif args.method == "orw":
            weight = orw_weights(reward / (reward.std() + 1e-4), args.tau)[my_groups].flatten()
        chosen = training_samples(args.method, reward[my_groups])[:, None]  # [P,1,G] of x1
        points = chosen.expand(-1, args.timesteps_per_sample, -1).flatten()  # [n]
        my_points = slice(rank * len(points), (rank + 1) * len(points))
        point_prompts = [prompts[my_groups][i // group] for i in points.tolist()]
        draws = 1 if args.share_noise else group // 2 if args.method == "dpo" else group

        # ---- 3. updates on this rollout, each with fresh noise and times, in parts whose
        # gradients add up to the gradient of the mean over the whole update
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(1.0, iteration / 5)
        totals = defaultdict(float)
        for _ in range(args.updates_per_rollout):
            s, noise = draw_points(rng, flow.shape, args, draws)
            s, noise = s[my_points].to(device), noise[my_points]
            optimizer.zero_grad(set_to_none=True)
            for part in batches(flow, point_prompts, args.train_batch):
                picks = points[part]
                x_t, u = flow_matching_point(x1[picks], noise[part].to(device), s[part])
                question = ask(flow, point_prompts[part])
                v_ref = u  # without a divergence term no reference pass
                if regularised:
                    v_ref = reference_velocity(flow, question, x_t, s[part])
                v = velocity(flow, question, x_t, s[part])
                if args.method == "adrpo":
                    losses = adrpo_fm_loss(v, v_ref, u, weight[picks], args.beta0)  # [b]
                elif args.method == "orw":
                    losses = orw_fm_loss(v, v_ref, u, weight[picks], args.alpha)
                elif args.method == "raft":
                    losses = mean_square(v - u)
                else:  # best and worst alternate; a pair's loss stands for its two points
                    winners, losers = torch.stack([v, v_ref, u]).unflatten(1, (-1, 2)).unbind(2)
                    losses = dpo_fm_loss(*winners, *losers, args.beta_dpo).repeat(2)
                (losses.sum() / len(points)).backward()
                with torch.no_grad():
                    totals["losses/total"] += losses.sum() / len(points)
                    totals["losses/flow_matching"] += mean_square(v - u).sum() / len(points)
                    if regularised:
                        totals["losses/divergence"] += mean_square(v - v_ref).sum() / len(points)
            gradients = [p.grad for p in lora if p.grad is not None]
            if processes > 1:  # one all-reduce for all gradients
                flat = accelerator.reduce(torch.cat([grad.flatten() for grad in gradients]), "mean")
                sizes = [grad.numel() for grad in gradients]
                for grad, mean in zip(gradients, flat.split(sizes), strict=True):
                    grad.copy_(mean.view_as(grad))
            grad_norm = nn.utils.clip_grad_norm_(lora, args.max_grad_norm)
            totals["losses/grad_norm"] += grad_norm
            loss = accelerator.reduce(totals["losses/total"], "mean")
            if not (loss + grad_norm).isfinite():
                raise InputError(f"iteration {iteration}: loss {loss:.3g}; {DIVERGED}")
            optimizer.step()
        if not all(parameter.isfinite().all() for parameter in lora):
            raise InputError(f"iteration {iteration}: weights are no finite numbers; {DIVERGED}")
        for tag, total in totals.items():
            record[tag] = accelerator.reduce(total, "mean").item() / args.updates_per_rollout
        updated = time.perf_counter()

        # ---- 4. log, evaluate, save
        record["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        record["charts/seconds_rollout"] = rewarded - started - seconds_reward
        record["charts/seconds_reward"] = seconds_reward
        record["charts/seconds_update"] = updated - rewarded
        if device.type == "cuda":
            record["charts/peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        last = iteration == args.iterations
        if last or iteration % args.eval_every == 0:
            metrics, images, _ = evaluate(flow, judges, eval_set, accelerator, args)
            record |= {f"eval/{name}": value for name, value in metrics.items()}
            if is_main:
                save_samples(run_dir, writer, iteration, images, args)
            if is_main and args.keep_adapters:
                save_lora(run_dir / f"adapters/{iteration:06d}", pipe)
        if is_main:
            log(run_dir, writer, iteration, record)
        bar.set_postfix(reward=record["reward/mean"], w2=metrics["w2"])
        if is_main and (last or iteration % args.save_every == 0):
            state = {"iteration": iteration, "metrics": metrics, "lora": [p.detach() for p in lora]}
            state["optimizer"] = optimizer.state_dict()
            state["metrics_bytes"] = (run_dir / "metrics.jsonl").stat().st_size
            write_safely(run_dir / "checkpoint.pt", state)

    if is_main:
        writer.close()
        save_lora(run_dir / "final", pipe)
        summary = {"base": base["metrics"], "final": metrics, "iterations": args.iterations}
        finish(run_dir, summary | {"method": args.method}, (model_name, commit, dtype))
    del lock


if __name__ == "__main__":
    flags = [word.partition("=")[0].replace("_", "-") for word in sys.argv if word[:2] == "--"]
    if len(set(flags)) < len(flags):
        sys.exit("error: a flag is given twice; give all its values after one")
    process = f" (process {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
    args = tyro.cli(Args, description=__doc__.partition("\n")[0])
    try:
        main(args)
        gc.collect()  # gloo aborts at exit where tensors outlive its process group
        accelerate.PartialState().wait_for_everyone()
        accelerate.PartialState().destroy_process_group()
    except InputError as error:
        sys.exit(f"error{process}: {' '.join(str(error).split())}")  # one line
    except torch.OutOfMemoryError as error:
        smaller = "lower --rollout-batch or --train-batch, or add --gradient-checkpointing"
        sys.exit(f"error: out of memory ({str(error)[:120]}); {smaller}, --no-t5")
    except OSError as error:
        if "No space" not in str(error) and "Read-only" not in str(error):
            raise
        sys.exit(f"error: --output-dir {args.output_dir}: {error}; make room, then --resume latest")
    except SystemExit as error:
        raise RuntimeError(f"--reward {args.reward}: the plug-in ended the program") from error
    except KeyboardInterrupt:
        sys.exit("interrupted; --resume latest goes on from the last checkpoint, if there is one")
