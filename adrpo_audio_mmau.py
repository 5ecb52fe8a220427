"""ADRPO for audio reasoning: GRPO with adaptive KL weights, CESAR's process rewards, MMAU.

Adaptive Divergence Regularized Policy Optimization (NeurIPS 2025, arXiv 2510.18053), eq. 7, on
questions about sound with several choices: every completion has its own weight of the KL to the
reference model, `beta0 - A`, where A is its advantage over the other completions of its question,
clipped to +-k beta0. `--method grpo` holds the weight at beta0 (GRPO, arXiv 2402.03300). Rewards:
the outcome pair (right answer, right format), CESAR's process rewards (ICLR 2026, arXiv
2510.20867) and your own. For Qwen2.5-Omni (its thinker) and Qwen2-Audio.

    A  = (R - group mean) / (group std + 1e-4)
    L  = mean over completions of the mean over their tokens of
         -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)  +  (beta0 - clip(A, -k beta0, k beta0)) KL
    KL = exp(ref - pol) - (ref - pol) - 1             per token, of the log-probabilities (k3)
    R  = w1 accuracy + w2 format + w3 consistency + w4 keywords + w5 overthinking

All passes are the stock model's, and read a question with its clip once for its whole group: for
the rollout its keys and values are written --group-size times, and transformers' `generate` goes on
from them with text; in training, pass 1 reads the questions and keeps their keys and values with
their gradient, and pass 2 reads the completions on top of them. In every iteration the sampler's
log-probabilities are compared with the training pass's: where the two are not one function the run
stops.

Ours, where we depart from the papers or they are silent: learning rate, steps and prompt of ADRPO's
audio run are not published: group, lengths and prompt are those of the open recipe for the same
model and data (Ke-Omni-R), the LoRA a published one for one GPU; CESAR's keyword lists are not
published in full (ours stand at the top of this file, each part capped at 1); evaluation is greedy,
and a missing prediction is wrong.

    python adrpo_audio_mmau.py --train-data avqa.json --audio-dir wavs \\
        --eval-data gamma-lab-umd/MMAU-test-mini
    python adrpo_audio_mmau.py --train-data avqa.json --audio-dir wavs \\
        --reward-weights 5 1 1 1 1  # CESAR
    python adrpo_audio_mmau.py --eval-only --adapter runs/NAME/final --eval-data mmau.json
    torchrun --nproc-per-node 8 adrpo_audio_mmau.py --train-data avqa.json --audio-dir wavs

Without a GPU: benchmark/mini_world_audio.py makes a small trained model and questions about
synthetic sounds, on which this file learns in minutes. Equations, rewards, metrics, results, time
and memory: docs/adrpo_audio_mmau.md.
"""

import ast
import contextlib
import copy
import csv
import dataclasses
import gc
import hashlib
import html
import importlib.util
import io
import json
import math
import os
import random
import re
import string
import subprocess
import sys
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import accelerate
import numpy as np
import peft
import soundfile
import soxr
import torch
import torch.nn.functional as F
import transformers
import tyro
from accelerate.utils import gather_object
from filelock import FileLock
from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoProcessor,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioForConditionalGeneration,
    StaticCache,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

SCRIPT = "adrpo_audio_mmau"
SAMPLE_RATE = 16000
REWARDS = ("accuracy", "format", "consistency", "keywords", "overthinking")
TASKS = ("sound", "music", "speech")  # of MMAU
TAKEN_TAGS = {"mean", "std", "frac_reward_zero_std", "tokens", "reasoning_tokens", *REWARDS}
TAKEN_TAGS |= {"accuracy_untagged", *[f"accuracy_{task}" for task in TASKS]}
PROJECTIONS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
# Mean difference of a completion's log-probabilities between sampler and training pass, in nats:
# rounding stays below, another function is off by whole nats.
SAMPLER_BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.1}
LETTER = re.compile(r"\(([A-Z])\)\s*(?=\S)|([A-Z])[.)]\s+(?=\S)")  # before a choice: (A) or A.

# CESAR's keyword reward, our lists: a part is the number of different entries found over the number
# that makes it 1.
PATTERN_WORDS = """
    first second third then next finally compare compared unlike whereas rather eliminate option
"""
LOGIC_WORDS = """
    because therefore since so thus hence if implies suggests indicates evidence consistent
"""
DOMAIN_WORDS = """
    frequency pitch tempo rhythm beat timbre harmonic harmonics melody chord key scale interval
    bass treble octave loudness amplitude volume noise echo reverberation spectrum duration pause
    silence onset voice speaker accent intonation prosody stress vowel consonant formant syllable
    engine rain wind water bird animal machine footsteps
"""
FULL_MARKS = 3  # different entries of a list that make its part 1
# Words that carry no concept, left out of the consistency reward's sets.
STOP_WORDS = """
    a an the is are was were be been it its this that these those of in on at to from by for with
    and or not no as i you he she they we my your his her their our me him them us do does did
    have has had can could would should will may might must what which who whom how why when where
    there here then than so if about into over
"""


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
    """seed of everything: LoRA, order of the questions, rollouts"""
    cpu: bool = False
    """stay on the CPU; several processes there: torchrun --nproc-per-node N SCRIPT --cpu"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """of matrix products; what is trained stays float32; auto: bf16 on a GPU that has it"""
    resume: str | None = None
    """run folder to continue exactly from its last checkpoint, or `latest`, with its own flags"""
    eval_only: bool = False
    """no training: answer --eval-data and write predictions and scores"""

    # ------------------------------------------------------------------------------------ model
    model_id: str = "Qwen/Qwen2.5-Omni-7B"
    """Qwen2.5-Omni (its thinker) or Qwen2-Audio: a folder, or NAME[@REVISION] of the hub; also the
    reference"""
    lora_rank: int = 8
    """rank of the LoRA on the language model (the published one-GPU preset: 8). 0 trains all of the
    language model's layers and head beside a frozen copy; audio tower and embeddings stay frozen"""
    lora_alpha: int = 32
    """the LoRA's update is scaled by alpha / rank (the same preset: 32)"""
    adapter: str | None = None
    """folder of a LoRA to evaluate or go on from (a run's final/); the reference is without it"""
    gradient_checkpointing: bool = False
    """less memory, more time; a question and its clip are then read once for each completion"""
    fsdp: bool = False
    """with torchrun: all weights, reference and optimiser split over the processes (FSDP2)"""

    # ------------------------------------------------------------------------------------- data
    train_data: str | None = None
    """rows {audio, question, choices, answer}, AVQA's own or MMAU's: .json, .jsonl, .csv, .parquet,
    a folder, or of the hub NAME[:CONFIGURATION][@REVISION]; clips beside it or in it"""
    audio_dir: str | None = None
    """folder the clips of --train-data are relative to; default: that of the file"""
    train_split: str | None = None
    """split of a data set; default: its only one"""
    eval_data: str | None = None
    """evaluated on, given like --train-data; default: every tenth of those, not trained on"""
    eval_audio_dir: str | None = None
    """folder the clips of --eval-data are relative to; default: that of the file"""
    eval_split: str | None = None
    """split of a data set; default: its only one, or its only test split"""
    eval_max: int | None = None
    """only the first so many of them"""
    train_on_eval: bool = False
    """train on data that is, or overlaps with, an evaluation split: refused without this"""
    max_audio_seconds: float = 30.0
    """longer clips are cut, and counted; the model's own window is a limit too"""
    think_budget: int = 50
    """words the prompt allows for <think> (Ke-Omni-R: 50); 0 asks for a direct answer"""

    # ---------------------------------------------------------------------------------- rewards
    reward_weights: tuple[float, ...] = (1.0, 1.0, 0.0, 0.0, 0.0)
    """of accuracy, format, consistency, keywords, overthinking (CESAR: 5 1 1 1 1), and then of each
    --reward, default 1"""
    reward: tuple[str, ...] = ()
    """beside these: FILE.py:function, function(prompts, completions, rows) -> floats"""

    # ---------------------------------------------------------------------------------- rollout
    prompts_per_update: int = 8
    """questions per iteration, over all processes; a multiple of these. Few: noisy updates"""
    group_size: int = 8
    """completions per question (Ke-Omni-R, CESAR: 8). Their mean is the baseline: below 4, noise"""
    max_completion_length: int = 256
    """tokens after which a completion is cut off; the overthinking reward's maximum (CESAR: 256)"""
    temperature: float = 1.0
    """of the policy, in rollouts and in training alike (Ke-Omni-R: 1)"""
    top_p: float = 1.0
    """below 1: sample from the likeliest tokens of this probability. The loss ignores it, so it
    makes training slightly off-policy"""
    top_k: int = 0
    """above 0: sample from the so many likeliest tokens; like --top-p"""
    rollout_batch: int = 64
    """completions rolled out at once, per process; changes memory and speed, not the result"""

    # ------------------------------------------------------------------------------ fine-tuning
    method: Literal["adrpo", "grpo"] = "adrpo"
    """grpo holds the coefficient at beta0"""
    iterations: int = 1000
    """rollouts, each with its updates"""
    updates_per_rollout: int = 1
    """optimiser steps on one rollout, each on all of it; above 1 the clipped ratio matters"""
    beta0: float = 0.04
    """KL coefficient where A = 0 (the paper: 0.04). Larger: closer to the reference"""
    adv_clip_k: float | None = 1.0
    """adrpo: clip A to +-k beta0 in the coefficient (the paper: 1; its Table 3: .5, 2), or None"""
    scale_rewards: Literal["group", "none"] = "group"
    """divide A by the group's standard deviation, or by nothing (Dr. GRPO, arXiv 2503.20783)"""
    clip_eps: float = 0.2
    """clip the ratio to 1 +- this"""
    learning_rate: float = 5e-6
    """AdamW, after five iterations of warm-up (the published one-GPU preset for a LoRA); about 1e-6
    for all weights"""
    weight_decay: float = 0.0
    """AdamW"""
    max_grad_norm: float = 1.0
    """gradient norm clip"""
    train_tokens: int = 1024
    """tokens of prompts, and of completions, in one pass, at their greatest lengths (1024 fits the
    7B thinker with a LoRA into 48 GB); changes memory and speed, not the result"""

    # ---------------------------------------------------------------- evaluation, checkpoints
    eval_every: int = 100
    """iterations between evaluations"""
    eval_temperature: float = 0.0
    """0 = greedy"""
    eval_batch: int = 16
    """questions answered at once, per process; changes memory and speed, not the result"""
    save_every: int = 50
    """iterations between checkpoints"""
    keep_adapters: bool = True
    """keep the LoRA of each evaluation in adapters/: the best is often an earlier one"""


# -------------------------------------------------------------------------------------- the method
def group_advantage(rewards: Tensor, eps: float = 1e-4, scale: bool = True) -> Tensor:
    """A = (R - mean) / (std + eps) over the group of a prompt (GRPO); without `scale` not divided
    (Dr. GRPO). rewards [P,G] -> [P,G], detached. Equal rewards give exactly 0."""
    relative = rewards - rewards[:, :1]
    advantage = relative - relative.mean(dim=1, keepdim=True)
    if scale:
        advantage = advantage / (relative.std(dim=1, keepdim=True) + eps)
    return advantage.detach()


def adaptive_beta(advantage: Tensor, beta0: float, clip_k: float | None = 1.0) -> Tensor:
    """ADRPO's KL coefficient beta0 - clip(A, +-k beta0) (eq. 7): advantage [B] -> [B], detached;
    clip_k None: no clip. With k <= 1 it is never negative."""
    if clip_k is not None:
        advantage = advantage.clamp(-clip_k * beta0, clip_k * beta0)
    return (beta0 - advantage).detach()


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(pi || ref) of each token, estimated at the sampled one: exp(d) - d - 1 with
    d = ref_logp - logp (k3 of Schulman 2020), never negative. [B,T], [B,T] -> [B,T]. Beyond d = 20
    the exponential goes on as its tangent (ours): it would overflow."""
    difference = ref_logp - logp
    limited = difference.clamp(max=20)
    return limited.exp() * (1 + difference - limited) - difference - 1


def grpo_loss(logp, old_logp, ref_logp, advantage, coefficient, mask, clip_eps: float) -> Tensor:
    """Mean over completions of the mean over their tokens of
    -min(ratio A, clip(ratio, 1 +- eps) A) + coefficient * KL (GRPO, eq. 3; ADRPO, eq. 7). logp,
    old_logp, ref_logp, mask [B,T], advantage, coefficient [B] -> scalar."""
    ratio = (logp - old_logp).clamp(-20, 20).exp()
    advantage, coefficient = advantage[:, None], coefficient[:, None]
    policy = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantage)
    per_token = policy + coefficient * kl_k3(logp, ref_logp)
    return ((per_token * mask).sum(1) / mask.sum(1)).mean()


def adrpo_statistics(coefficient: Tensor, advantage: Tensor, limit: float) -> dict[str, float]:
    """The adrpo/* figures of one rollout. fraction_saturated: share of completions whose A is cut
    to +-limit."""
    return {
        "adrpo/coefficient_mean": coefficient.mean().item(),
        "adrpo/coefficient_min": coefficient.min().item(),
        "adrpo/coefficient_max": coefficient.max().item(),
        "adrpo/coefficient_fraction_negative": (coefficient < 0).float().mean().item(),
        "adrpo/fraction_saturated": (advantage.abs() > limit).float().mean().item(),
    }


# ----------------------------------------------------------------------------------------- rollout
class Policy(NamedTuple):
    """The models of a run, and how they choose a token."""

    model: nn.Module  # what is trained
    sampler: nn.Module  # what is rolled out: the same, or its copy in bfloat16
    reference: nn.Module | None  # a frozen copy; None: the model with its LoRA switched off
    stop: list[int]  # token ids that end a completion
    unreadable: Tensor  # [V], True for the head's rows that are no token of text
    pad: int
    temperature: float
    warpers: list[LogitsProcessor]  # top-k and top-p, of the sampler alone
    static: dict[tuple, StaticCache] | None  # caches by shape; None: some layers cannot have one
    full: bool  # prompts and batches padded full, so that `generate` is compiled once (GPU)
    lengths: tuple[int, int]  # most tokens of a prompt with its clip, of a completion


def seed_everything(*numbers: int) -> torch.Generator:
    """Seed every global random state (plug-ins may use one); return a generator: from `numbers`."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def draw_prompts(count: int, per_update: int, iteration: int, seed: int) -> list[int]:
    """Rows of an iteration's prompts: one pass after the other over all, each shuffled anew."""
    first = iteration * per_update
    passes = range(first // count, (first + per_update - 1) // count + 1)
    orders = [np.random.default_rng([seed, number]).permutation(count) for number in passes]
    start = first - passes[0] * count
    return np.concatenate(orders)[start : start + per_update].tolist()


def scaled_logits(logits: Tensor, policy: Policy) -> Tensor:
    """The policy's logits [..., V] in float32: over its temperature, and none for tokens that
    nobody can read (Qwen2 has 151,936 rows in the head, and 151,646 tokens)."""
    logits = logits.float() / (policy.temperature or 1.0)
    return logits.masked_fill_(policy.unreadable, torch.finfo(torch.float32).min)


class ChooseByUniform(LogitsProcessor):
    """Chooses each token of `generate` by the inverse cumulative function at a uniform number drawn
    beforehand, [N,T]: the result depends neither on how the batch is cut nor on the number of
    processes. Keeps the tokens' log-probabilities (before top-k and top-p), never the logits."""

    def __init__(self, uniforms: Tensor, policy: Policy):
        self.uniforms, self.policy, self.logp = uniforms, policy, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = warped = scaled_logits(scores, self.policy)
        for warper in self.policy.warpers:
            warped = warper(input_ids, warped)
        cumulative = warped.softmax(-1).cumsum(-1)
        uniform = self.uniforms[:, len(self.logp), None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, uniform, right=True).clamp(max=logits.shape[1] - 1)
        if self.policy.temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        self.logp.append(logits.log_softmax(-1).gather(1, token))
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def encode(processor, texts: list[str], waves: list[np.ndarray]) -> dict[str, Tensor]:
    """What the model reads of B prompts and their clips: input_ids, attention_mask [B,P],
    left-padded, and features of the sound [B,...]. Raises InputError where nothing is heard."""
    audio = {"sampling_rate": SAMPLE_RATE}
    if isinstance(processor, Qwen2_5OmniProcessor):
        # It would compute the spectrogram of 300 s of padding too, for nothing: the model drops it.
        # With some silence behind the clip the rest is the same to the bit.
        extractor, longest = processor.feature_extractor, max(map(len, waves))
        room = ((longest + extractor.n_fft) // extractor.hop_length + 1) * extractor.hop_length
        audio["max_length"] = min(room, extractor.n_samples)
    options = {"text_kwargs": {"padding": True, "padding_side": "left"}, "audio_kwargs": audio}
    with naming("--model-id", "its processor gives no audio features"):
        inputs = dict(processor(text=texts, audio=waves, return_tensors="pt", **options))
    token = processor.tokenizer.convert_tokens_to_ids(processor.audio_token)
    if "input_features" not in inputs or not (inputs["input_ids"] == token).any():
        raise InputError("--model-id: its processor gives no audio features: nothing is heard")
    return inputs


def hear(policy: Policy, processor, questions: list["Question"], args: Args) -> dict[str, Tensor]:
    """`encode` of some questions and their clips, on the device."""
    texts = [build_prompt(processor, question.row, args.think_budget) for question in questions]
    waves = [load_audio(question.clip, args.max_audio_seconds) for question in questions]
    inputs, device = encode(processor, texts, waves), policy.unreadable.device
    return {name: value.to(device) for name, value in inputs.items()}


def take(inputs: dict[str, Tensor], rows) -> dict[str, Tensor]:
    """Some rows of what `encode` gives."""
    return {name: value[rows] for name, value in inputs.items()}


@contextlib.contextmanager
def last_logits(model: nn.Module, count: int) -> Iterator[None]:
    """Here the head reads the last `count` places only: audio models have no logits_to_keep."""
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][:, -count:],))
    try:
        yield
    finally:
        hook.remove()


def read_prompts(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, DynamicCache]:
    """What `encode` gives -> the logits after the prompt [B,1,V], and its keys and values. The
    cache is made without the model's configuration: that of a sliding window would drop what rows
    of different length still need."""
    cache = DynamicCache()
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with last_logits(model, 1):
        out = model(**inputs, position_ids=positions, past_key_values=cache, use_cache=True)
    return out.logits, cache


@torch.no_grad()
def complete(policy: Policy, inputs: dict[str, Tensor], uniforms: Tensor) -> tuple:
    """`rollout` for prompts that fit into one batch."""
    model, group = policy.sampler, uniforms.shape[1]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    spare = max(0, policy.lengths[0] - ids.shape[1]) * policy.full
    ids, mask = F.pad(ids, (spare, 0), value=policy.pad), F.pad(mask, (spare, 0))
    # `generate` reads the last token itself, and no clip.
    before = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1]}
    _, cache = read_prompts(model, inputs | before)
    cache.batch_repeat_interleave(group)
    if policy.static is not None:  # does not grow by copies, is compiled
        layers, shape = cache.layers, (len(ids) * group, ids.shape[1] + uniforms.shape[2])
        if shape not in policy.static and len(policy.static) == 2:  # rollout's and evaluation's
            policy.static.clear()
        new = StaticCache(model.config, max_cache_len=shape[1])
        cache = policy.static.setdefault(shape, new)
        cache.reset()
        while layers:  # freed one by one
            layer = layers.pop()
            cache.update(layer.keys, layer.values, len(layers))
    choose = ChooseByUniform(uniforms.flatten(0, 1), policy)
    settings = GenerationConfig(  # the likeliest token of what `choose` leaves: its choice
        max_new_tokens=uniforms.shape[2], do_sample=False, eos_token_id=policy.stop
    )
    mask = mask.repeat_interleave(group, 0)
    out = model.generate(
        input_ids=ids.repeat_interleave(group, 0),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        generation_config=settings,
        logits_processor=[choose],
        synced_gpus=isinstance(model, FSDPModule),
    )
    tokens = out[:, ids.shape[1] :]
    ended = torch.isin(tokens, torch.tensor(policy.stop, device=tokens.device))
    kept = ended.cumsum(1) - ended.long() == 0
    return tokens, kept, torch.cat(choose.logp, 1) * kept


def rollout(policy: Policy, inputs: dict, uniforms: Tensor, at_once: int) -> list[Tensor]:
    """G completions for each of B prompts, `at_once` prompts in a batch, from uniforms [B,G,T] (T:
    most tokens): tokens, mask (1 up to and with the stop token) and log-probabilities, [B*G,C]
    each. A prompt and its clip are read once for their group."""
    count, group, _ = uniforms.shape
    parts = []
    for start in range(0, count, at_once):
        rows = [*range(start, min(start + at_once, count))]
        wanted = len(rows) * group
        if policy.full:
            rows += rows[:1] * (at_once - len(rows))
        part = complete(policy, take(inputs, rows), uniforms[rows])
        parts.append([value[:wanted] for value in part])
    columns = max(tokens.shape[1] for tokens, _, _ in parts)
    padded = [[F.pad(value, (0, columns - value.shape[1])) for value in part] for part in parts]
    return [torch.cat(values) for values in zip(*padded, strict=True)]


# ----------------------------------------------------------------------------------- training pass
class Batch(NamedTuple):
    """A rollout as the training pass reads it: G completions of each of B prompts, in a row."""

    inputs: dict[str, Tensor]  # what `encode` gives, [B,...]
    tokens: Tensor  # [B*G,C]
    kept: Tensor  # [B*G,C], True up to and with the stop token


def read_completions(model, first: Tensor, cache: list[Tensor], mask: Tensor, tokens: Tensor):
    """Logits [n,C,V] of completions [n,C] whose prompts' last logits [n,1,V], keys and values
    [n,...] (layer by layer) and mask [n,P] are given."""
    own = DynamicCache()
    for number in range(len(cache) // 2):
        own.update(cache[2 * number], cache[2 * number + 1], number)
    positions = mask.sum(-1, keepdim=True) + torch.arange(tokens.shape[1], device=tokens.device)
    seen = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    inputs = {"input_ids": tokens, "attention_mask": seen, "position_ids": positions}
    rest = model(**inputs, past_key_values=own, use_cache=True).logits
    return torch.cat([first, rest[:, :-1]], dim=1)


def read_ordinary_rows(model, inputs: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The same of rows prompt + completion, for gradient checkpointing, which has no cache: inputs
    [n,...], tokens [n,C] -> logits [n,C,V]."""
    layers = [part for part in model.modules() if getattr(part, "gradient_checkpointing", False)]
    for layer in layers:  # a layer asks its own flag; the dropout inside it stays off
        layer.training = True
    ids = torch.cat([inputs["input_ids"], tokens], dim=1)
    seen = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], dim=1)
    rows = {"input_ids": ids, "attention_mask": seen}
    rows["position_ids"] = (seen.cumsum(-1) - 1).clamp(min=0)
    with last_logits(model, tokens.shape[1] + 1):
        logits = model(**inputs | rows, use_cache=False).logits[:, :-1]
    model.eval()
    return logits


def token_log_probabilities(logits: Tensor, tokens: Tensor, policy: Policy):
    """log pi(token), and the entropy of pi in nats (without gradient): logits [n,C,V], tokens [n,C]
    -> two float32 [n,C]."""
    logits = scaled_logits(logits, policy)
    normaliser = logits.logsumexp(-1)
    logp = logits.gather(-1, tokens[..., None]).squeeze(-1) - normaliser
    with torch.no_grad():  # row by row, for [n,C,V] is large
        expected = [(row.softmax(-1) * row).sum(-1) for row in logits]
    return logp, normaliser.detach() - torch.stack(expected)


def completion_passes(policy: Policy, model: nn.Module, batch: Batch, args: Args) -> Iterator:
    """Log-probabilities and entropies [n,C] of some completions after another, behind the slice of
    them. A prompt is read once for all its completions: they get its keys and values as leaves, at
    which the caller's own backward pass ends, to be taken before it asks for the next; one backward
    pass through the prompts takes on what has come together there (ours)."""
    count = len(batch.inputs["input_ids"])
    group = len(batch.tokens) // count
    # Of the greatest lengths, so that all processes have as many passes (FSDP).
    prompts_at_once, rows_at_once = (max(1, args.train_tokens // most) for most in policy.lengths)
    # Weights that are trained in float32, for products in bfloat16.
    mixed = {"dtype": torch.bfloat16, "enabled": policy.sampler is not policy.model}
    for start in range(0, count, prompts_at_once):
        inputs = take(batch.inputs, slice(start, start + prompts_at_once))
        mask, made = inputs["attention_mask"], []
        if not args.gradient_checkpointing:
            with torch.autocast(mask.device.type, **mixed):
                first, cache = read_prompts(model, inputs)
            made = [first, *(part for layer in cache.layers for part in (layer.keys, layer.values))]
        leaves = [part.detach().requires_grad_(part.requires_grad) for part in made]
        end = (start + len(mask)) * group
        for row in range(start * group, end, rows_at_once):
            at = slice(row, min(row + rows_at_once, end))
            width = int(batch.kept[at].sum(1).max())
            tokens = batch.tokens[at, :width]
            own = torch.arange(at.start, at.stop, device=mask.device) // group - start  # [n]
            with torch.autocast(mask.device.type, **mixed):
                if args.gradient_checkpointing:
                    logits = read_ordinary_rows(model, take(inputs, own), tokens)
                else:
                    first, *cache = [leaf[own] for leaf in leaves]
                    logits = read_completions(model, first, cache, mask[own], tokens)
            values = token_log_probabilities(logits, tokens, policy)
            yield at, *(F.pad(value, (0, batch.tokens.shape[1] - width)) for value in values)
        pairs = [(part, leaf.grad) for part, leaf in zip(made, leaves, strict=True)]
        pairs = [(part, gradient) for part, gradient in pairs if gradient is not None]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))


@torch.no_grad()
def reference_log_probabilities(policy: Policy, batch: Batch, args: Args) -> Tensor:
    """Log-probabilities [B*G,C] of the frozen copy, or of the model without its LoRA."""
    if policy.reference is None:
        policy.model.disable_adapter_layers()
    passes = completion_passes(policy, policy.reference or policy.model, batch, args)
    logp = torch.cat([part for _, part, _ in passes])
    if policy.reference is None:
        policy.model.enable_adapter_layers()
    return logp


# -------------------------------------------------------------------------------------- evaluation
def my_share(count: int, rank: int, processes: int) -> list[int]:
    """Positions 0..count-1 that this process works on; all processes get equally many, the last
    ones some again, so that the gathered parts, cut to `count`, are in order."""
    size = math.ceil(count / processes)
    return [position % count for position in range(rank * size, (rank + 1) * size)]


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927); rounding keeps it around the share."""
    share, spread = right / count, z**2 / count
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return min(max(low, 0.0), share), max(min(high, 1.0), share)


def mmau_scores(rows: list[dict], predictions: dict[str, str]) -> dict[str, dict[str, dict]]:
    """Accuracy in percent with its interval, by MMAU's rule: total, per task, difficulty and
    sub-category. rows: all that were asked for; a row whose id has no prediction is wrong."""
    groups = {key: defaultdict(list) for key in ("total", "task", "difficulty", "sub-category")}
    for row in rows:
        right = mmau_match(row["answer"], predictions.get(row["id"], ""), row["choices"])
        for key, found in groups.items():
            name = "total" if key == "total" else row.get(key)
            if name is not None:
                found[str(name)].append(right)
    scores = {key: {} for key in groups}
    for key, found in groups.items():
        for name, rights in found.items():
            right, count = sum(rights), len(rights)
            low, high = wilson(right, count)
            figures = {"accuracy": 100 * right / count, "low": 100 * low, "high": 100 * high}
            scores[key][name] = figures | {"right": right, "count": count}
    return scores


@torch.no_grad()
def evaluate(policy: Policy, processor, data: "Data", plugins: dict, accelerator, args: Args):
    """Every eval/* figure of the policy; MMAU's scores; all rows that were asked for, those whose
    clips cannot be used too, with the model's words. A question has its own random numbers,
    whatever stands beside it."""
    names, tokenizer = (*REWARDS, *plugins), processor.tokenizer
    sampler = policy._replace(temperature=args.eval_temperature)
    mine = my_share(len(data.heldout), accelerator.process_index, accelerator.num_processes)
    records = []
    starts = range(0, len(mine), args.eval_batch)
    for start in tqdm(starts, "evaluate", leave=False, disable=not accelerator.is_main_process):
        questions = [data.heldout[i] for i in mine[start : start + args.eval_batch]]
        uniforms = torch.zeros(len(questions), 1, args.max_completion_length)
        for uniform, question in zip(uniforms, questions, strict=True):
            number = int(hashlib.sha1(question.row["id"].encode()).hexdigest()[:8], 16)
            uniform.uniform_(generator=seed_everything(args.seed, 0, number))
        inputs = hear(policy, processor, questions, args)
        uniforms = uniforms.to(accelerator.device)
        tokens, kept, _ = rollout(sampler, inputs, uniforms, args.eval_batch)
        completions = [one[mask].tolist() for one, mask in zip(tokens, kept, strict=True)]
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        rows = [question.row for question in questions]
        values = score(texts, list(map(len, completions)), rows, plugins, args)
        for text, completion, row, value in zip(texts, completions, rows, values, strict=True):
            thought = tokenizer(block(text, "think"), add_special_tokens=False).input_ids
            record = {"id": row["id"], "completion": text, "tokens": len(completion)}
            record |= dict(zip(names, value.tolist(), strict=True))
            records.append(record | {"reasoning_tokens": len(thought)})
    records = gather_object(records)[: len(data.heldout)]
    words_of = {record["id"]: record["completion"] for record in records}
    answers = {name: block(text, "answer") for name, text in words_of.items()}
    scores = mmau_scores(data.asked, answers)
    untagged = {name: answer_or_all(text) for name, text in words_of.items()}
    figures = {"accuracy": scores["total"]["total"]["accuracy"]}
    figures["accuracy_untagged"] = mmau_scores(data.asked, untagged)["total"]["total"]["accuracy"]
    for task in TASKS:
        if task in scores["task"]:
            figures[f"accuracy_{task}"] = scores["task"][task]["accuracy"]
    for name in (*names[1:], "tokens", "reasoning_tokens"):
        figures[name] = sum(record[name] for record in records) / len(records)
    # The official script reads `model_output`, its README says `model_prediction`; a row without
    # would not be counted.
    said = []
    for row in data.asked:
        given, text = answers.get(row["id"], ""), words_of.get(row["id"])
        said.append(row | {"model_output": given, "model_prediction": given, "completion": text})
    return figures, scores, said


def score_table(scores: dict) -> str:
    """MMAU's scores as a Markdown table."""
    lines = ["| | accuracy | 95 % interval | right | of |", "|---|---|---|---|---|"]
    for key, groups in scores.items():
        for name, s in sorted(groups.items()):
            label = name if key == "total" else f"{key}: {name}"
            interval = f"{s['low']:.1f} to {s['high']:.1f}"
            cells = (label, f"{s['accuracy']:.2f}", interval, s["right"], s["count"])
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------- rewards
def words(text: str) -> list[str]:
    """Lower-case words: runs of letters, digits and underscores, as MMAU's official rule splits."""
    return re.findall(r"\b\w+\b", text.lower())


def concepts(text: str) -> set[str]:
    """Its different words without STOP_WORDS."""
    return {*words(text)} - {*words(STOP_WORDS)}


def block(text: str, tag: str) -> str:
    """What stands inside the last complete <tag> ... </tag>, without tags; "" where there is none.
    The last: a model may quote the tags while it thinks. A block that is not closed has not been
    given."""
    found = re.findall(rf"<{tag}>((?:(?!<{tag}>).)*?)</{tag}>", text, re.DOTALL)
    return re.sub(r"</?(think|answer)>", " ", found[-1]).strip() if found else ""


def answer_or_all(text: str) -> str:
    """What stands inside the last <answer> block; the whole text where there is none, as Ke-Omni-R
    and R1-AQA score."""
    given = -1 < text.find("<answer>") < text.rfind("</answer>")
    return block(text, "answer") if given else text


def mmau_match(answer: str, prediction: str, choices: list[str]) -> bool:
    """MMAU's official rule: all words of the answer are in the prediction, and no word that only
    wrong choices have."""
    expected, given = set(words(answer)), set(words(prediction))
    wrong = {
        word for choice in choices if choice.lower() != answer.lower() for word in words(choice)
    } - expected
    return bool(given) and expected <= given and not given & wrong


def reward_accuracy(completion: str, row: dict) -> float:
    """1 if the text inside <answer> is right by MMAU's rule (CESAR: outcome)."""
    return float(mmau_match(row["answer"], block(completion, "answer"), row["choices"]))


def reward_format(completion: str, think: bool) -> float:
    """1 if the completion is one <think> block (none without thinking), one <answer> block, and
    nothing else."""
    inside = r"((?!</?(?:think|answer)>).)+"
    thinking = rf"<think>{inside}</think>\s*" if think else ""
    return float(
        re.fullmatch(rf"\s*{thinking}<answer>{inside}</answer>\s*", completion, re.DOTALL)
        is not None
    )


def overlap(one: set[str], other: set[str]) -> float:
    """|one and other| / max(|one|, |other|) (CESAR's Sim), 0 where both are empty."""
    return len(one & other) / max(len(one), len(other), 1)


def reward_consistency(completion: str, row: dict) -> float:
    """Overlap of the reasoning's concepts with the answer's, plus with the question's and choices'
    (CESAR): 0 to 2."""
    reasoning = concepts(block(completion, "think"))
    question = concepts(" ".join([row["question"], *row["choices"]]))
    return overlap(reasoning, concepts(block(completion, "answer"))) + overlap(reasoning, question)


def reward_keywords(completion: str) -> float:
    """Patterns + logic + domain terms in the reasoning, each 0 to 1: different entries of its list
    over FULL_MARKS, at most 1 (CESAR's three parts; lists and cap ours): 0 to 3."""
    reasoning = set(words(block(completion, "think")))
    lists = (PATTERN_WORDS, LOGIC_WORDS, DOMAIN_WORDS)
    return sum(min(1.0, len(reasoning & {*words(entries)}) / FULL_MARKS) for entries in lists)


def reward_overthinking(tokens: int, longest: int) -> float:
    """1 - tokens / longest (CESAR): 0 to 1, more for a shorter completion."""
    return 1 - tokens / longest


@torch.no_grad()
def score(completions: list[str], tokens: list[int], rows: list[dict], plugins: dict, args: Args):
    """All rewards of B completions of so many tokens, REWARDS and then the plug-ins -> float32
    [B,R] on the CPU. Raises InputError where a plug-in's are not B finite numbers."""
    pairs = list(zip(completions, rows, strict=True))
    columns = [
        [reward_accuracy(text, row) for text, row in pairs],
        [reward_format(text, args.think_budget > 0) for text in completions],
        [reward_consistency(text, row) for text, row in pairs],
        [reward_keywords(text) for text in completions],
        [reward_overthinking(count, args.max_completion_length) for count in tokens],
    ]
    columns = [torch.tensor(column) for column in columns]
    for name, function in plugins.items():
        prompts = [question_text(row, args.think_budget) for row in rows]
        # A function may write into what it gets.
        values = function(prompts, list(completions), copy.deepcopy(rows))
        with naming(f"--reward {name}", f"it must give {len(rows)} finite floats"):
            values = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
            if values.shape != (len(rows),) or not values.isfinite().all():
                bad = (~values.isfinite()).sum()
                raise ValueError(f"it gave shape {list(values.shape)}, {bad} not finite")
        columns.append(values)
    return torch.stack(columns, dim=1)


def load_plugin(spec: str) -> Callable:
    """The function of FILE.py:function. Its own errors are shown as they are."""
    path, _, name = spec.rpartition(":")
    if not (path.endswith(".py") and Path(path).is_file()):
        raise InputError(f"--reward {spec}: give FILE.py:function of an existing file")
    module_name = f"reward_plugin_{Path(path).stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # where dataclasses and pickle look it up
    module_spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise InputError(f"--reward {spec}: {path} has no function {name}")
    return getattr(module, name)


def load_plugins(specs: tuple[str, ...]) -> dict[str, Callable]:
    """The functions of --reward by their tags. Raises InputError where two tags are one."""
    names = [spec.rpartition(":")[2] for spec in specs]
    if len(names) > len({*names} - TAKEN_TAGS):
        raise InputError(f"--reward: the names {names} collide with a tag; rename one")
    return dict(zip(names, map(load_plugin, specs), strict=True))


# -------------------------------------------------------------------------------------------- data
@dataclasses.dataclass(frozen=True)
class StoredClip:
    """A clip inside a data set. Its bytes stay in the memory-mapped file until they are wanted."""

    name: str
    cells: Any  # a datasets.Dataset with the columns bytes and path
    number: int

    def __str__(self) -> str:
        return self.name

    def __deepcopy__(self, _) -> "StoredClip":
        return self  # a place in a file


class Question(NamedTuple):
    """A row of the data and its clip."""

    row: dict  # id, audio, question, choices, answer, and what else its source has
    clip: Path | StoredClip


@dataclasses.dataclass
class Data:
    """The questions of a run, and what reading them found out."""

    train: list[Question] = dataclasses.field(default_factory=list)
    heldout: list[Question] = dataclasses.field(default_factory=list)
    # The rows of heldout, with those whose clips cannot be used.
    asked: list[dict] = dataclasses.field(default_factory=list)
    sources: dict[str, str] = dataclasses.field(default_factory=dict)  # by flag, with the commit
    # Rows and clips that cannot be used, and why.
    skipped: list[dict] = dataclasses.field(default_factory=list)
    longer: int = 0  # clips that are cut to what the model hears
    cancelling: int = 0  # clips whose channels cancel in their mean


def read_table(spec: str, split: str | None, test: bool) -> tuple[list[dict], str]:
    """The rows of a .parquet file, a folder or NAME[:CONFIGURATION][@REVISION], their clips under
    `audio`, and the source with its commit. test: a test split is what is wanted."""
    import datasets  # here, because it is slow to import and other files do not need it

    local = Path(spec).exists()
    if Path(spec).suffix == ".parquet":
        parts = {"": datasets.Dataset.from_parquet(spec)}
    else:
        name, _, revision = (spec, "", "") if local else spec.partition("@")
        name, _, configuration = (name, "", "") if local else name.partition(":")
        parts = datasets.load_dataset(name, configuration or None, revision=revision or None)
    usual = [part for part in parts if len(parts) == 1 or (test and "test" in part)]
    split = usual[0] if split is None and len(usual) == 1 else split
    if split not in parts:
        raise ValueError(f"its splits are {', '.join(parts)}: name one of them, not {split}")
    table = parts[split]
    sounds = []
    for column, feature in table.features.items():
        stored = isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()
        sounds += [column] if stored or isinstance(feature, datasets.Audio) else []
    rows = [dict(row) for row in table.remove_columns(sounds)]
    if sounds:
        cells = table.select_columns(sounds[:1])
        cells = cells.cast_column(sounds[0], datasets.Audio(decode=False)).flatten()
        cells = cells.rename_columns({f"{sounds[0]}.{end}": end for end in ("bytes", "path")})
        for number, path in enumerate(cells["path"]):
            clip_name = path or f"{Path(spec).name}:{split}:{number}"
            rows[number]["audio"] = StoredClip(clip_name, cells, number)
    for row in rows:
        row["dataset_split"] = split or None
    if local or not table.cache_files:
        return rows, spec
    # The folder of its cache that the library has read is named after the commit.
    commit = Path(table.cache_files[0]["filename"]).parent.name
    return rows, f"{spec.partition('@')[0]}@{commit}"


def read_rows(spec: str, split: str | None, test: bool) -> tuple[list[dict], str]:
    """The rows of a file or a data set, and the source with its commit."""
    path = Path(spec)
    if path.suffix not in (".json", ".jsonl", ".csv"):
        return read_table(spec, split, test)
    text = path.read_bytes().decode("utf-8-sig")  # without the mark that some editors write
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline=""))), spec
    if text.lstrip().startswith("["):
        return json.loads(text), spec
    return [json.loads(line) for line in text.split("\n") if line.strip()], spec


def choice_meant(answer: object, choices: list[str], position: bool) -> str:
    """The choice that an answer means: its words, but for case, a letter before them and a full
    stop; else its letter, else its position from 0; `position` first where the data write that.
    Raises ValueError where it is none of them."""

    def plain(text: str) -> str:
        return text.strip().rstrip(".").lower()

    text = str(answer).strip()
    letter = re.fullmatch(r"\(?([A-Z])\)?[.:]?", text)
    number = re.fullmatch(r"(\d+)(\.0)?", text)
    place = int(number[1]) if number else len(choices)
    found = [choice for choice in choices if choice.strip() == text]
    for meant in (text, text[LETTER.match(text).end() :] if LETTER.match(text) else ""):
        found += [choice for choice in choices if plain(choice) == plain(meant) != ""]
    found += choices[ord(letter[1]) - ord("A") :][:1] if letter else []
    found = choices[place:][:1] + found if position else found + choices[place:][:1]
    if not found:
        raise ValueError(f"the answer {answer!r} is not among the choices")
    return found[0]


def normalise(row: dict) -> dict:
    """A row of ours, AVQA's or MMAU's as ours, the same whatever file it was in; other columns
    stay. Raises ValueError or TypeError where it cannot be used."""
    clip = row["audio"] if isinstance(row.get("audio"), StoredClip) else None
    extra = row.get("other_attributes") or {}  # the hub's MMAU: most of its columns
    extra = json.loads(extra) if isinstance(extra, str) else extra
    row = extra | {key: value for key, value in row.items() if value not in (None, "")}
    row.pop("other_attributes", None)
    # As strict JSON has it, which predictions are written in: no dates, null for nan.
    row = json.loads(json.dumps(row, default=str), parse_constant=lambda name: None)
    audio = clip or row.get("audio_path") or row.get("audio") or row.get("audio_id")
    if not audio and "video_name" in row:  # AVQA: the clip is a video's sound
        audio = f"{row['video_name']}.wav"
    question = row.get("question") or row.get("question_text") or row.get("instruction")
    choices = row.get("choices") or row.get("multi_choice")
    choices = ast.literal_eval(choices) if isinstance(choices, str) else choices  # a .csv's
    parts = {"audio": audio, "question": question, "choices": choices, "answer": row.get("answer")}
    missing = [name for name, part in parts.items() if part in (None, "", [])]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    if not isinstance(audio, (str, StoredClip)) or not isinstance(choices, list):
        raise ValueError("audio must be a name, choices a list")
    question, choices = str(question), [str(choice) for choice in choices]
    avqa = "multi_choice" in row
    parts["question"] = question.replace("video", "audio") if avqa else question
    # Letters before the choices would count as words of the answer in MMAU's rule.
    letters = [LETTER.match(choice) for choice in choices]
    names = [letter and (letter[1] or letter[2]) for letter in letters]
    if names == list(string.ascii_uppercase[: len(names)]):
        choices = [choice[letter.end() :] for choice, letter in zip(choices, letters, strict=True)]
    parts["choices"], parts["answer"] = choices, choice_meant(parts["answer"], choices, avqa)
    return row | parts


def check_questions(flag: str, spec: str, rows: list[dict], data: Data | None = None) -> list[dict]:
    """The rows that can be used, as ours, with an id; the others go to `data.skipped`. Raises
    InputError where none can."""
    data, questions, reason = data or Data(), {}, "it is empty"
    for number, row in enumerate(rows):
        try:
            question = {"id": number} | normalise(row)
            question["id"] = str(question["id"])
            if question["id"] in questions:
                raise ValueError(f"its id {question['id']} is there twice")
            questions[question["id"]] = question
        except (ValueError, TypeError, AttributeError, SyntaxError) as error:
            reason = f"row {number}: {error}"
            data.skipped.append({"flag": f"--{flag}", "row": number, "reason": str(error)})
    if not questions:
        what = f"none of its {len(rows)} rows can be used ({reason})"
        raise InputError(f"--{flag} {spec}: {what}; a row is audio, question, choices, answer")
    return list(questions.values())


def read_questions(
    flag: str, spec: str, split: str | None = None, data: Data | None = None
) -> list[dict]:
    """Rows {id, audio, question, choices, answer, ...} of --train-data or --eval-data. Raises
    InputError for what cannot be read, and as check_questions."""
    data = data or Data()
    kinds = "give .json, .jsonl, .csv, .parquet, a folder, or NAME[:CONFIGURATION][@REVISION] of "
    kinds += f"the hub, and --{flag.replace('data', 'split')}"
    with naming(f"--{flag} {spec}", kinds):
        rows, data.sources[flag.replace("-", "_")] = read_rows(spec, split, flag == "eval-data")
    return check_questions(flag, spec, rows, data)


def opened(clip: Path | StoredClip) -> Path | io.BytesIO:
    """What soundfile reads a clip from."""
    if not isinstance(clip, StoredClip):
        return clip
    cell = clip.cells[clip.number]
    return Path(cell["path"] or "") if cell["bytes"] is None else io.BytesIO(cell["bytes"])


def read_samples(file: soundfile.SoundFile, seconds: float) -> tuple[np.ndarray, bool]:
    """The first `seconds` of an open file as one channel, float32 [N] at its own rate: the mean of
    its channels; the loudest where they cancel in the mean (and whether they do)."""
    samples = file.read(int(seconds * file.samplerate) + 1, dtype="float32", always_2d=True)
    wave, power = samples.mean(axis=1), np.square(samples).mean(axis=0)  # [N], [channels]
    if np.square(wave).mean() < 0.01 * power.max():
        return samples[:, power.argmax()], True
    return wave, False


def load_audio(clip: Path | StoredClip, seconds: float) -> np.ndarray:
    """The first `seconds` of a clip: one channel, 16 kHz, float32 [N]."""
    with soundfile.SoundFile(opened(clip)) as file:
        wave, _ = read_samples(file, seconds)
        if file.samplerate != SAMPLE_RATE:
            wave = soxr.resample(wave, file.samplerate, SAMPLE_RATE)
    return wave[: int(seconds * SAMPLE_RATE)]


def judge_clip(clip: Path | StoredClip, seconds: float) -> tuple[str | None, bool, bool]:
    """Why a clip cannot be used (None: it can), by its end and by the samples that the model would
    hear; whether it is longer than those; whether its channels cancel."""
    try:
        with soundfile.SoundFile(opened(clip)) as file:
            frames, rate = file.frames, file.samplerate
            if frames < 0.1 * rate:
                return f"{frames} samples: shorter than 0.1 s", False, False
            declared = re.search(r"^data : (\d+) \(should be \d+\)", file.extra_info, re.MULTILINE)
            cut = declared and int(declared[1]) < 2**31 - 2**16  # above: a stream of unknown length
            file.seek(frames - 1)
            if cut or len(file.read(1)) != 1:
                return "cut: shorter than its header says", False, False
            file.seek(0)
            wave, cancelling = read_samples(file, seconds)
    except Exception as error:  # each format has its own
        return f"cannot be read ({type(error).__name__}: {error})", False, False
    if not np.isfinite(wave).all():
        return "samples that are no finite numbers", False, False
    if np.abs(wave).max() < 1e-4:  # three steps of 16 bits
        return "silent", False, False
    return None, frames > seconds * rate, cancelling


def find_clips(
    flag: str,
    spec: str,
    folder: str | None,
    rows: list[dict],
    data: Data | None = None,
    seconds: float = 30.0,
) -> list[Question]:
    """The questions whose clips can be used; the others go to `data.skipped`. Raises InputError
    where none can."""
    data, root, clips = data or Data(), Path(folder or Path(spec).parent), []
    for row in rows:
        audio = row["audio"]
        stored = isinstance(audio, StoredClip)
        places = [audio] if stored else [root / audio, root / Path(audio).name]
        clips.append(next((place for place in places if stored or place.is_file()), None))
    different = [clip for clip in dict.fromkeys(clips) if clip is not None]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        judged = pool.map(partial(judge_clip, seconds=seconds), different)
        few = len(different) < 64
        bar = tqdm(judged, "listen", total=len(different), leave=False, disable=few)
        verdicts = dict(zip(different, bar, strict=True)) | {None: ("not found", False, False)}
    questions = []
    for row, clip in zip(rows, clips, strict=True):
        problem = verdicts[clip][0]
        if problem:
            entry = {"flag": f"--{flag}", "id": row["id"], "clip": str(clip or root / row["audio"])}
            data.skipped.append(entry | {"reason": problem})
        else:
            questions.append(Question(row, clip))
    if not questions:
        what = f"none of its {len(rows)} clips can be used ({entry['clip']}: {problem})"
        raise InputError(f"--{flag} {spec}: {what}; see --{flag.replace('data', 'audio-dir')}")
    data.longer += sum(longer for _, longer, _ in verdicts.values())
    data.cancelling += sum(cancelling for _, _, cancelling in verdicts.values())
    return questions


def load_questions(args: Args) -> Data:
    """Training and evaluation questions. Raises InputError, also for training on an evaluation
    split."""
    data, train = Data(), []
    place = eval_place = ("train-data", args.train_data, args.audio_dir)
    if not args.eval_only:
        train = read_questions("train-data", args.train_data, args.train_split, data)
    if args.eval_data:
        eval_place = ("eval-data", args.eval_data, args.eval_audio_dir)
        data.asked = read_questions("eval-data", args.eval_data, args.eval_split, data)
    seen = {(Path(str(row["audio"])).name, row["question"]) for row in data.asked}
    splits = [f"{row.get('split')} {row.get('dataset_split')}" for row in train]
    tests = sum("test" in split for split in splits)
    common = sum((Path(str(row["audio"])).name, row["question"]) in seen for row in train)
    if (tests or common) and not args.train_on_eval:
        what = f"{tests} rows of a test split, {common} questions that are in --eval-data too"
        raise InputError(f"--train-data has {what}; if that is meant, add --train-on-eval")
    if not args.eval_data:
        data.asked, train = train[::10], [row for i, row in enumerate(train) if i % 10]
        if not train:
            raise InputError("--train-data: one question cannot be split; give --eval-data")
    data.asked = data.asked[: args.eval_max]
    data.train = find_clips(*place, train, data, args.max_audio_seconds) if train else []
    data.heldout = find_clips(*eval_place, data.asked, data, args.max_audio_seconds)
    return data


def describe(data: Data, args: Args) -> str:
    """What the questions are, what is not used, how the clips are heard, and an iteration."""
    note = f"{len(data.train)} training questions, {len(data.heldout)} for evaluation"
    note += "" if args.eval_data else " (every tenth)"
    note += f"; {data.longer} clips are cut to {args.max_audio_seconds:g} s"
    if data.cancelling:
        note += f"; channels of {data.cancelling} clips cancel: their loudest one is heard"
    if data.skipped:
        clips = sum("clip" in entry for entry in data.skipped)
        rows = len(data.skipped) - clips
        note += f"; {rows} rows and {clips} clips cannot be used: skipped.json"
    if args.group_size < 4:
        note += "\nwarning: --group-size: the mean of so few completions is a noisy baseline"
    note += f"\neach iteration {args.prompts_per_update} questions x {args.group_size} completions"
    note += f" of at most {args.max_completion_length} tokens, {args.updates_per_rollout} updates"
    return note


def question_text(row: dict, think_budget: int) -> str:
    """What the model is asked about a clip; the same in training and evaluation."""
    text = f"{row['question']} Choose one of the following options: {', '.join(row['choices'])}.\n"
    if think_budget:
        text += f"Think first, in fewer than {think_budget} words, inside <think> </think>. "
    return text + "Give the option you choose inside <answer> </answer>."


def build_prompt(processor: transformers.ProcessorMixin, row: dict, think_budget: int) -> str:
    """The text of a question for the model, by its chat template, with one place for the clip."""
    content = [{"type": "audio", "audio": "clip"}]
    content.append({"type": "text", "text": question_text(row, think_budget)})
    options = {"add_generation_prompt": True, "tokenize": False}
    return processor.apply_chat_template([{"role": "user", "content": content}], **options)


# --------------------------------------------------------------------------- models and reference
def find_model(flag: str, spec: str) -> tuple[str, str | None]:
    """Name and commit of NAME[@REVISION] of the hub, by its smallest file: a missing licence is
    found before gigabytes are fetched. A folder has no commit. Raises InputError."""
    name, _, revision = spec.partition("@")
    if (Path(spec) / "config.json").is_file():
        return spec, None
    remedy = "give a folder with a config.json (of a LoRA: its base model, and --adapter) or a "
    remedy += "NAME[@REVISION] of the hub; where it is gated, log in, with its licence accepted at "
    with naming(f"{flag} {spec}", f"{remedy}https://huggingface.co/{name}"):
        path = hf_hub_download(name, "config.json", revision=revision or None)
    return name, Path(path).parent.name


def model_class(name: str, revision: str | None) -> type:
    """The class of transformers that the model is of. Raises InputError for another."""
    thinker = Qwen2_5OmniThinkerForConditionalGeneration
    kinds = {"qwen2_audio": Qwen2AudioForConditionalGeneration, "qwen2_5_omni": thinker}
    kinds["qwen2_5_omni_thinker"] = thinker
    kind = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False).model_type
    if kind not in kinds:
        raise InputError(f"--model-id {name}: a {kind}; must be Qwen2.5-Omni or Qwen2-Audio")
    return kinds[kind]


def load_verified(kind, flag: str, source: tuple[str, str | None], **options) -> nn.Module:
    """kind.from_pretrained. Raises InputError where the library reports weights that are not in
    the files: they would be random."""
    name, revision = source
    options |= {"revision": revision, "output_loading_info": True, "trust_remote_code": False}
    with naming(f"{flag} {name}", "give what transformers can load without code of its own"):
        model, report = kind.from_pretrained(name, **options)
    missing = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if missing:
        lost = f"{len(missing)} weights are not in its files, such as {missing[0]}"
        raise InputError(f"{flag} {name}: {lost}")
    return model


def load_adapter(model: nn.Module, folder: str) -> nn.Module:
    """The model with a trainable LoRA from a folder. Raises InputError where it does not fit
    exactly."""
    with naming(f"--adapter {folder}", "give the folder of a LoRA, such as a run's final"):
        config = PeftConfig.from_pretrained(folder)
        weights = peft.load_peft_weights(folder, device="cpu")
    config.inference_mode = False
    model = get_peft_model(model, config)
    found = {name: part.shape for name, part in weights.items()}
    expected = {name: part.shape for name, part in peft.get_peft_model_state_dict(model).items()}
    if wrong := sorted(expected.items() ^ found.items()):
        raise InputError(f"--adapter {folder}: does not fit the model, such as {wrong[0]}")
    peft.set_peft_model_state_dict(model, weights)
    return model


def language_model(model: nn.Module) -> nn.Module:
    """The language model without its head, below a LoRA too."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    return model.model.language_model


def longest_prompt(processor, data: "Data", args: Args) -> int:
    """Tokens of the longest question with the longest clip that may come."""
    questions = [*data.train, *data.heldout]
    texts = [build_prompt(processor, question.row, args.think_budget) for question in questions]
    lengths = [len(ids) for ids in processor.tokenizer(texts).input_ids]
    silence = np.zeros(int(args.max_audio_seconds * SAMPLE_RATE), dtype=np.float32)
    longest = texts[lengths.index(max(lengths))]
    return encode(processor, [longest], [silence])["input_ids"].shape[1]


def load_policy(args: Args, source: tuple, processor, longest: int, device, bf16: bool) -> Policy:
    """Model, sampler and reference on the device, for prompts of at most `longest` tokens. Trained
    are a LoRA of the language model, or (in float32) all of its layers and its head. Raises
    InputError."""
    lora = args.adapter is not None or args.lora_rank > 0
    dtype = torch.bfloat16 if bf16 and (lora or args.eval_only) else torch.float32
    kind = model_class(*source)
    model = load_verified(kind, "--model-id", source, dtype=dtype).to(device)
    stop = stop_tokens(model, processor.tokenizer)
    # Nor can the places of sounds, images and videos be read.
    readable = {*processor.tokenizer.get_vocab().values()} - {*placeholders(processor)} | {*stop}
    unreadable = torch.ones(model.get_output_embeddings().weight.shape[0], dtype=torch.bool)
    unreadable[[token for token in readable if token < len(unreadable)]] = False
    pad = stop[0] if processor.tokenizer.pad_token_id is None else processor.tokenizer.pad_token_id
    model.generation_config = GenerationConfig(pad_token_id=pad)  # no penalties of the model's own
    model.requires_grad_(False)
    if args.adapter:
        model = load_adapter(model, args.adapter)
    elif lora and not args.eval_only:
        targets = rf".*language_model\.layers\.\d+\..*\.({PROJECTIONS})"
        options = {"lora_alpha": args.lora_alpha, "target_modules": targets}
        model = get_peft_model(model, LoraConfig(r=args.lora_rank, **options))
    elif not args.eval_only:
        decoder, head = language_model(model), model.get_output_embeddings()
        decoder.requires_grad_(True)
        head.requires_grad_(True)
        decoder.embed_tokens.requires_grad_(False)  # and with it a head that is tied to it
    if any(p.requires_grad and p.dtype != torch.float32 for p in model.parameters()):
        what = "its whole modules would train in bfloat16; add --precision fp32"
        raise InputError(f"--adapter {args.adapter}: {what}")
    if args.gradient_checkpointing:
        options = {"use_reentrant": False}
        language_model(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()  # else a LoRA behind frozen embeddings gets no gradient
    model.eval()  # with dropout rollout, old policy and reference would be other functions
    sampler, reference = model, None
    if not lora and not args.eval_only:
        reference = copy.deepcopy(model).requires_grad_(False)
    if args.fsdp:
        shard(model, bf16)
        shard(reference, bf16)
    elif bf16 and reference is not None:
        sampler = copy.deepcopy(model).to(torch.bfloat16).requires_grad_(False)
    warpers = [TopKLogitsWarper(args.top_k)] if args.top_k else []
    warpers += [TopPLogitsWarper(args.top_p)] if args.top_p < 1 else []
    config = model.config.get_text_config()
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    static = {} if plain and not args.fsdp else None
    full = device.type == "cuda" and static is not None
    lengths = longest, args.max_completion_length
    tokens = stop, unreadable.to(device), pad, args.temperature, warpers
    return Policy(model, sampler, reference, *tokens, static, full, lengths)


def shard(network: nn.Module, bf16: bool) -> None:
    """Split a network over the processes (FSDP2), layer by layer, from the inside out."""
    options = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if bf16 else {}
    options = {"mp_policy": MixedPrecisionPolicy(**options), "reshard_after_forward": True}
    for part in reversed([*network.modules()]):
        if type(part).__name__ in (network._no_split_modules or ()):
            fully_shard(part, **options)
    fully_shard(network, **options)


def renew_sampler(policy: Policy) -> None:
    """Copy the trained weights into the sampler, where it is a copy."""
    if policy.sampler is not policy.model:
        pairs = zip(policy.sampler.parameters(), policy.model.parameters(), strict=True)
        with torch.no_grad():
            for copied, trained in pairs:
                copied.copy_(trained)


def stop_tokens(model: nn.Module, tokenizer) -> list[int]:
    """Ids that end a completion: those of the generation config, the tokenizer's, and the token
    that ends the assistant's turn in the chat template. Raises InputError where there is none."""
    ids = model.generation_config.eos_token_id
    ids = {*ids} if isinstance(ids, list) else {ids}
    ids.add(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a-turn"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        _, written, rest = text.rpartition("a-turn")
        after = tokenizer(rest * bool(written), add_special_tokens=False).input_ids[:1]
        ids |= {*after} & {*tokenizer.all_special_ids}
    if not ids - {None}:
        raise InputError("--model-id: no end-of-sequence token in tokenizer or generation config")
    return sorted(ids - {None})


def placeholders(processor) -> list[int]:
    """Ids that stand for sounds, images and videos."""
    kinds = ("audio", "image", "video", "audio_bos", "audio_eos", "vision_bos", "vision_eos")
    tokens = {getattr(processor, f"{kind}_token", None) for kind in kinds}
    vocabulary = processor.tokenizer.get_vocab()
    return sorted(vocabulary[token] for token in tokens & {*vocabulary})


# --------------------------------------------------------------------------------------- run files
def create_run(args: Args, sources: dict, prompts_sha256: str) -> Path:
    """Create the run's folder with args.json in it. Raises InputError where it cannot."""
    name = f"{SCRIPT}-{args.method}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(args.output_dir) / (args.run_name or name)
    git = f'git -C "{Path(__file__).resolve().parent}" rev-parse HEAD'
    failed, commit = subprocess.getstatusoutput(git)
    record = {"script": SCRIPT, "args": dataclasses.asdict(args), "command": sys.argv}
    libraries = (torch, transformers, peft, accelerate)
    versions = {"python": sys.version} | {lib.__name__: lib.__version__ for lib in libraries}
    record |= {"git_commit": None if failed else commit, "versions": versions}
    record |= {"sources": sources, "prompts_sha256": prompts_sha256}
    with naming("--output-dir, --run-name", "give a folder that can be written, and a new name"):
        (folder / "samples").mkdir(parents=True)
        (folder / "final").mkdir()
    (folder / "args.json").write_text(json.dumps(record, indent=2, allow_nan=False))
    return folder


def find_run(args: Args) -> tuple[Args, Path, dict]:
    """The flags, the folder and args.json of the run that --resume names. Raises InputError."""
    folder = Path(args.resume)
    if args.resume == "latest":
        runs = Path(args.output_dir).glob("*/args.json")
        runs = [file for file in runs if f'"script": "{SCRIPT}"' in file.read_text()]
        runs.sort(key=lambda file: file.stat().st_mtime_ns)
        folder = runs[-1].parent if runs else folder
    if not args.resume or not any(folder.glob("checkpoint*.pt")):
        raise InputError(f"--resume {args.resume}: no checkpoint in {folder}; start a new run")
    given = {word.partition("=")[0].replace("_", "-") for word in sys.argv if word[:2] == "--"}
    if given - {"--resume", "--output-dir"}:
        what = f"{folder} goes on with its own flags; leave out {sorted(given - {'--resume'})}"
        raise InputError(f"--resume: {what}")
    record = json.loads((folder / "args.json").read_text())
    if record["script"] != SCRIPT:
        raise InputError(f"--resume {args.resume}: is a run of {record['script']}")
    kept = record["args"] | record["sources"]  # the very commits
    kept = {name: tuple(v) if isinstance(v, list) else v for name, v in kept.items()}
    return Args(**kept), folder, record


def lock_run(run_dir: Path) -> FileLock:
    """Hold the run until this process ends. Raises InputError where another writes it."""
    lock = FileLock(run_dir / ".lock")
    with naming(f"--resume {run_dir}", "another process is writing this run"):
        lock.acquire(blocking=False)
    return lock


def log(run_dir: Path, writer: SummaryWriter, step: int, record: dict) -> None:
    """Append one line of strict JSON to metrics.jsonl, and the same figures to TensorBoard. Raises
    InputError for a figure that is not finite: nothing of such a step is saved."""
    with naming(f"iteration {step}", "lower --learning-rate, or raise --beta0"):
        line = json.dumps({"step": step, **record}, allow_nan=False)
    with (run_dir / "metrics.jsonl").open("a") as file:
        print(line, file=file, flush=True)
        os.fsync(file.fileno())  # a checkpoint counts on it
    for tag, value in record.items():
        if value is not None:
            writer.add_scalar(tag, value, step)


def write_safely(path: Path, state: dict) -> None:
    """torch.save under another name, flushed to the disk, then renamed: never half a file."""
    with path.with_suffix(".part").open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's own, for what the disk said
            raise error.__context__ or error from None
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


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """The trained weights and the optimiser, whole and on the CPU, split (FSDP) or not. Called by
    every process. Raises InputError for weights that are not finite."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, state = get_state_dict(model, optimizer, options=options)
    named = dict(model.named_parameters(remove_duplicate=False))  # a tied head has two names
    weights = {name: tensor for name, tensor in weights.items() if named[name].requires_grad}
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise InputError("--learning-rate: weights that are not finite; lower it")
    return {"weights": weights, "optimizer": state}


def restore(run_dir: Path | None, checkpoint: dict, model: nn.Module, optimizer) -> None:
    """Go back to a checkpoint; the main process, which has run_dir, drops what was logged since."""
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
    state = {"optim_state_dict": checkpoint["optimizer"], "options": options}
    set_state_dict(model, optimizer, model_state_dict=checkpoint["weights"], **state)
    if run_dir is not None:
        path = run_dir / "metrics.jsonl"
        os.truncate(path, min(path.stat().st_size, checkpoint["metrics_bytes"]))


def save_model(folder: Path, policy: Policy, weights: dict[str, Tensor], args: Args) -> None:
    """What transformers or PEFT loads; its generation config says how it was sampled."""
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
    sampling |= {"top_k": args.top_k, "eos_token_id": policy.stop, "pad_token_id": policy.pad}
    policy.model.generation_config = GenerationConfig(**sampling)
    policy.model.save_pretrained(folder, state_dict=weights)


def save_completions(path: Path, writer: SummaryWriter | None, step: int, said: list[dict]) -> None:
    """An evaluation's rows with the model's words: all as a JSON list, the first few to
    TensorBoard."""
    text = json.dumps(said, ensure_ascii=False, indent=1, allow_nan=False, default=str)
    path.write_text(text, encoding="utf-8")
    if writer is not None:
        shown = ""
        for row in said[:8]:
            text = f"{row['question']}\n{row['choices']} {row['answer']}\n{row['completion']}"
            shown += f"<pre>{html.escape(text)}</pre>"
        writer.add_text("completions", shown, step)


def measured_on(data: Data, sources: dict, args: Args) -> dict:
    """What a summary says of the model and the questions that its figures are of."""
    about = {"sources": sources, "adapter": args.adapter, "think_budget": args.think_budget}
    about |= {"questions": len(data.asked), "skipped": len(data.skipped)}
    if args.eval_data and Path(args.eval_data).is_file():  # MMAU has several versions
        about["eval_data_sha256"] = hashlib.sha256(Path(args.eval_data).read_bytes()).hexdigest()
    return about


def finish(run_dir: Path, summary: dict) -> None:
    """The whole run in one file and as tables."""
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False))
    (run_dir / "mmau.md").write_text(score_table(summary["scores"]))
    for name, value in summary["final"].items():
        before = f"{summary['base'][name]:10.4f} ->" if "base" in summary else ""
        print(f"{name:22s}{before}{value:10.4f}")
    print(score_table({key: summary["scores"][key] for key in ("total", "task")}))
    print(f"Completions in {run_dir}/samples, scores in {run_dir}/mmau.md.")


def print_loading_lines(folder: Path, model: nn.Module, source: tuple, dtype: torch.dtype) -> None:
    """How to load the result."""
    lora = isinstance(model, PeftModel)
    kind = type(model.get_base_model() if lora else model).__name__
    base = f'"{source[0]}", revision={source[1]!r}' if lora else f'"{folder}"'
    print(f"To use the result:\nimport torch\nfrom transformers import {kind}")
    print(f"model = {kind}.from_pretrained({base}, dtype={dtype})")
    if lora:
        print("from peft import PeftModel")
        print(f'model = PeftModel.from_pretrained(model, "{folder}")')


# -------------------------------------------------------------------------------------------- main
def check_args(args: Args, processes: int) -> None:
    """Raise InputError for flags that cannot work."""
    may_be_zero = {"seed", "lora_rank", "top_k", "beta0", "weight_decay", "eval_temperature"}
    may_be_zero.add("think_budget")
    for name, value in vars(args).items():
        values = value if isinstance(value, tuple) else (value,)
        numbers = [number for number in values if type(number) in (int, float)]
        lowest = -math.inf if name == "reward_weights" else 0 if name in may_be_zero else 1e-30
        if not all(math.isfinite(number) and number >= lowest for number in numbers):
            raise InputError(f"--{name.replace('_', '-')} {value}: is out of its range")
    if len(args.reward_weights) not in (len(REWARDS), len(REWARDS) + len(args.reward)):
        raise InputError(f"--reward-weights: of {', '.join(REWARDS)}, and of each --reward or none")
    if args.group_size < 2 or args.top_p > 1:
        raise InputError("--group-size: 2 or more, the others are the baseline; --top-p: up to 1")
    if args.max_audio_seconds < 0.1:
        raise InputError("--max-audio-seconds: at least 0.1")
    if (args.eval_data if args.eval_only else args.train_data) is None:
        raise InputError("--train-data must be given; or --eval-only and --eval-data")
    if args.prompts_per_update % processes:
        raise InputError(f"--prompts-per-update: must be a multiple of {processes} processes")
    if args.fsdp and (args.lora_rank or args.adapter or args.eval_only or processes == 1):
        raise InputError("--fsdp: for all weights (no LoRA) over several processes of torchrun")
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
        args, run_dir, stored = find_run(args)
    accelerator = accelerate.Accelerator(cpu=args.cpu)
    device, is_main = accelerator.device, accelerator.is_main_process
    processes, rank = accelerator.num_processes, accelerator.process_index
    check_args(args, processes)
    if resumed and (run_dir / "summary.json").exists():
        accelerator.print(f"{run_dir} is finished: nothing is left to do")
        return
    dtype = choose_dtype(args.precision, device)

    # What is small and may be refused comes before what is large.
    source = find_model("--model-id", args.model_id)
    model_class(*source)
    processor = AutoProcessor.from_pretrained(source[0], revision=source[1])
    tokenizer = processor.tokenizer
    window = getattr(processor.feature_extractor, "chunk_length", math.inf)  # of the model, seconds
    args = dataclasses.replace(args, max_audio_seconds=min(args.max_audio_seconds, window))
    data = load_questions(args)
    sources = {"model_id": "@".join(filter(None, source))} | data.sources
    rows = [[question.row for question in part] for part in (data.train, data.heldout)]
    prompts_sha256 = hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()
    if resumed and prompts_sha256 != stored["prompts_sha256"]:
        raise InputError("--train-data, --eval-data: other questions than when the run began")
    plugins = load_plugins(args.reward)
    reward_weights = [*args.reward_weights, *[1.0] * len(plugins)][: len(REWARDS) + len(plugins)]
    score(["a", "b"], [1, 1], [data.heldout[0].row] * 2, plugins, args)
    longest = longest_prompt(processor, data, args)

    seed_everything(args.seed)
    policy = load_policy(args, source, processor, longest, device, dtype == torch.bfloat16)
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]

    if not resumed:
        run_dir = create_run(args, sources, prompts_sha256) if is_main else None
    lock = lock_run(run_dir) if is_main else None
    if is_main and data.skipped:
        (run_dir / "skipped.json").write_text(json.dumps(data.skipped, indent=1, allow_nan=False))
    groups, group = args.prompts_per_update, args.group_size
    # Whole groups stay in one process.
    my_groups = slice(rank * groups // processes, (rank + 1) * groups // processes)
    accelerator.print(
        f"{run_dir}: {args.method}, {processes} x {device.type}, {dtype}, "
        f"{sum(parameter.numel() for parameter in trained):,} trained parameters\n"
        f"{describe(data, args)}; stop tokens {tokenizer.convert_ids_to_tokens(policy.stop)}"
    )
    about = measured_on(data, sources, args)
    evaluation = processor, data, plugins, accelerator, args
    if args.eval_only:
        metrics, scores, said = evaluate(policy, *evaluation)
        if is_main:
            save_completions(run_dir / "samples/predictions.json", None, 0, said)
            finish(run_dir, {"final": metrics} | about | {"scores": scores})
        return

    options = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(trained, **options)
    first = 0
    if resumed:
        checkpoint = load_checkpoint(run_dir)
        first, base, metrics = (checkpoint[name] for name in ("iteration", "base", "metrics"))
        scores = checkpoint["scores"]
        restore(run_dir if is_main else None, checkpoint, policy.model, optimizer)
        renew_sampler(policy)
    else:
        base, scores, said = evaluate(policy, *evaluation)
        metrics = base
    writer = SummaryWriter(run_dir, purge_step=first + 1 if first else 0) if is_main else None
    if is_main and not resumed:
        log(run_dir, writer, 0, {f"eval/{name}": value for name, value in metrics.items()})
        save_completions(run_dir / "samples/000000.json", writer, 0, said)

    bar = tqdm(range(first + 1, args.iterations + 1), args.method, disable=not is_main)
    for iteration in bar:
        # ---- 1. rollout: completions of the policy, and their rewards. Every process draws all
        # random numbers and takes those of its groups: the result does not depend on their number.
        started = time.perf_counter()
        rng = seed_everything(args.seed, iteration)
        drawn = draw_prompts(len(data.train), groups, iteration - 1, args.seed)[my_groups]
        inputs = hear(policy, processor, [data.train[row] for row in drawn], args)
        rows = [data.train[row].row for row in drawn for _ in range(group)]
        uniforms = torch.rand(groups, group, args.max_completion_length, generator=rng)[my_groups]
        at_once = max(1, args.rollout_batch // group)
        tokens, kept, sampled_logp = rollout(policy, inputs, uniforms.to(device), at_once)  # [N,C]
        completions = [one[mask].tolist() for one, mask in zip(tokens, kept, strict=True)]
        rolled_out = time.perf_counter()
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        values = score(texts, list(map(len, completions)), rows, plugins, args)
        values = accelerator.gather(values.to(device)).cpu()
        values = values.unflatten(0, (groups, group))  # [P,G,R], of all processes
        reward = values @ torch.tensor(reward_weights)  # [P,G]
        rewarded = time.perf_counter()

        # ---- 2. advantage, and each completion's KL coefficient (eq. 7)
        advantage = group_advantage(reward, scale=args.scale_rewards == "group")  # [P,G]
        coefficient = torch.full_like(advantage, args.beta0)
        if args.method == "adrpo":
            coefficient = adaptive_beta(advantage, args.beta0, args.adv_clip_k)
        my_advantage = advantage[my_groups].flatten().to(device)  # [N]
        my_coefficient = coefficient[my_groups].flatten().to(device)

        # ---- 3. updates on this rollout, in parts whose gradients add up to the gradient of the
        # mean over all completions
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(1.0, iteration / 5)
        batch = Batch(inputs, tokens, kept)
        ref_logp = reference_log_probabilities(policy, batch, args)  # [N,C]
        old_logp = torch.zeros_like(ref_logp)
        totals = defaultdict(float)
        for update in range(args.updates_per_rollout):
            optimizer.zero_grad(set_to_none=True)
            gap = torch.zeros(len(tokens), device=device)  # [N], sampler against this pass
            for at, logp, entropy in completion_passes(policy, policy.model, batch, args):
                mask = kept[at]
                if update == 0:
                    old_logp[at] = logp.detach()
                    off = ((sampled_logp[at] - logp.detach()).abs() * mask).sum(1)
                    totals["sampling/sampling_logp_difference/mean"] += off.sum()
                    gap[at] = off / mask.sum(1).clamp(min=8)
                weight, beta = my_advantage[at], my_coefficient[at]
                share = len(weight) / len(tokens)
                inputs = logp, old_logp[at], ref_logp[at], weight
                loss = share * grpo_loss(*inputs, beta, mask, args.clip_eps)
                loss.backward()
                with torch.no_grad():
                    policy_loss = grpo_loss(*inputs, torch.zeros_like(beta), mask, args.clip_eps)
                    totals["losses/total"] += loss.detach()
                    totals["losses/policy"] += share * policy_loss
                    ratio, better = (logp - old_logp[at]).exp(), weight[:, None] > 0
                    above, below = ratio > 1 + args.clip_eps, ratio < 1 - args.clip_eps
                    clipped = torch.where(better, above, below) & (weight[:, None] != 0)
                    totals["clip_ratio/region_mean"] += (clipped * mask).sum()
                    totals["kl"] += (kl_k3(logp, ref_logp[at]) * mask).sum()
                    totals["entropy"] += (entropy * mask).sum()
            if update == 0:
                largest_gap = accelerator.gather(gap).max().item()
                if not largest_gap <= SAMPLER_BOUND[dtype]:
                    what = f"a completion's log-probabilities differ by {largest_gap:.2g} nats"
                    raise InputError(f"--model-id: {what} a token between rollout and training")
            if processes > 1 and not args.fsdp:  # with FSDP the backward pass has done it
                for parameter in trained:
                    if parameter.grad is not None:
                        parameter.grad = accelerator.reduce(parameter.grad, "mean")
            grad_norm = nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
            grad_norm = grad_norm.full_tensor() if args.fsdp else grad_norm
            totals["losses/grad_norm"] += grad_norm
            optimizer.step()
        renew_sampler(policy)
        updated = time.perf_counter()

        # ---- 4. log, evaluate, save
        record = {"reward/mean": reward.mean().item(), "reward/std": reward.std(1).mean().item()}
        constant = (reward == reward[:, :1]).all(dim=1).float().mean().item()
        record["reward/frac_reward_zero_std"] = constant
        for i, name in enumerate((*REWARDS, *plugins)):
            record[f"reward/{name}"] = values[..., i].mean().item()
        lengths = accelerator.gather(kept.sum(1))
        for tag, total in totals.items():
            total = accelerator.reduce(total, "mean").item()
            per_token = lengths.sum().item() / processes
            updates = 1 if tag.startswith("sampling") else args.updates_per_rollout
            record[tag] = total / updates / (1 if tag.startswith("losses") else per_token)
        record["losses/divergence"] = record["losses/total"] - record["losses/policy"]
        record["sampling/sampling_logp_difference/max"] = largest_gap
        limit = math.inf if args.adv_clip_k is None else args.adv_clip_k * args.beta0
        record |= adrpo_statistics(coefficient, advantage, limit)
        record["completions/mean_length"] = lengths.float().mean().item()
        ended = gather_object([float(one[-1] in policy.stop) for one in completions])
        record["completions/clipped_ratio"] = 1 - sum(ended) / len(ended)
        record["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        record["charts/seconds_rollout"] = rolled_out - started
        record["charts/seconds_reward"] = rewarded - rolled_out
        record["charts/seconds_update"] = updated - rewarded
        record["charts/tokens_per_second"] = lengths.sum().item() / (updated - started)
        if device.type == "cuda":
            record["charts/peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        last = iteration == args.iterations
        evaluated = last or iteration % args.eval_every == 0
        if evaluated:
            metrics, scores, said = evaluate(policy, *evaluation)
            record |= {f"eval/{name}": value for name, value in metrics.items()}
        if is_main:
            log(run_dir, writer, iteration, record)
            writer.add_histogram("adrpo/coefficient", coefficient, iteration)
        if is_main and evaluated:
            save_completions(run_dir / f"samples/{iteration:06d}.json", writer, iteration, said)
            if args.keep_adapters and policy.reference is None:
                policy.model.save_pretrained(run_dir / f"adapters/{iteration:06d}")
        bar.set_postfix(accuracy=record["reward/accuracy"], kl=record["kl"])
        if last or iteration % args.save_every == 0:
            state = training_state(policy.model, optimizer)
            if is_main:
                state |= {
                    "iteration": iteration,
                    "metrics": metrics,
                    "base": base,
                    "scores": scores,
                }
                state["metrics_bytes"] = (run_dir / "metrics.jsonl").stat().st_size
                write_safely(run_dir / "checkpoint.pt", state)

    options = {"full_state_dict": True, "cpu_offload": True}  # of all weights the frozen ones too
    options["ignore_frozen_params"] = policy.reference is None
    weights = get_model_state_dict(policy.model, options=StateDictOptions(**options))
    if is_main:
        writer.close()
        save_model(run_dir / "final", policy, weights, args)
        processor.save_pretrained(run_dir / "final")
        summary = {"base": base, "final": metrics, "iterations": args.iterations}
        finish(run_dir, summary | {"method": args.method} | about | {"scores": scores})
        print_loading_lines(run_dir / "final", policy.model, source, dtype)
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
        smaller = "lower --train-tokens, --rollout-batch or --eval-batch"
        smaller += ", or add --gradient-checkpointing"
        sys.exit(f"error: out of memory ({str(error)[:120]}); {smaller}; then --resume latest")
    except OSError as error:
        if "No space" not in str(error) and "Read-only" not in str(error):
            raise
        sys.exit(f"error: --output-dir {args.output_dir}: {error}; make room, then --resume latest")
    except SystemExit as error:
        raise RuntimeError(f"--reward {args.reward}: the plug-in ended the program") from error
    except KeyboardInterrupt:
        sys.exit("interrupted; --resume latest goes on from the last checkpoint, if there is one")
