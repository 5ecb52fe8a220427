"""ADRPO for language models: GRPO whose KL coefficient adapts to each completion.

Adaptive Divergence Regularized Policy Optimization (NeurIPS 2025, arXiv 2510.18053), eq. 7: a
completion's KL to the reference model has the weight `beta0 - A`, where A is its advantage over the
other completions of its prompt, clipped to +-k beta0. Good completions may leave the reference, bad
ones are held to it. `--method grpo` is the same file with the coefficient held at beta0 (GRPO,
arXiv 2402.03300).

    A  = (R - group mean) / (group std + 1e-4)
    L  = mean over completions of the mean over their tokens of
         -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)  +  (beta0 - clip(A, -k beta0, k beta0)) KL
    KL = exp(ref - pol) - (ref - pol) - 1             per token, of the log-probabilities (k3)

Both passes are the stock model's, and read a prompt once for its whole group: for the rollout a
prompt's keys and values are written --group-size times, and transformers' `generate` goes on from
them; in training, pass 1 reads the prompts and keeps their keys and values with their gradient, and
pass 2 reads the completions on top of them. In every iteration the sampler's log-probabilities are
compared with the training pass's: where the two are not one function the run stops.

Where this departs from the paper, or the paper is silent:
- Group normalisation puts |A| near 1, far above beta0 = 0.04: the coefficient saturates to 0
  (A > 0), 2 beta0 (A < 0) or beta0 (no spread). That is the paper's recommended setting; adrpo/*
  and its histogram show it. --scale-rewards none leaves the division out.
- The raw A weights the policy term, the clipped one the coefficient only. The old policy's
  log-probabilities are those of the first training pass: the ratio starts at exactly 1.
- Data, learning rate, group and lengths are not published: the defaults are TRL's of early 2025,
  whose example names the same model and reward model.

    python adrpo_grpo_llm.py  # Qwen2-0.5B-Instruct, TL;DR, RM-Gemma-2B
    python adrpo_grpo_llm.py --dataset rows.jsonl --reward my_reward.py:function --lora-rank 16 \\
        --learning-rate 1e-5
    torchrun --nproc-per-node 8 adrpo_grpo_llm.py --fsdp --prompts-per-update 32

Without a GPU: benchmark/mini_world_llm.py makes a small trained world on which the same script
learns in a minute. Equations, metrics, results, time and memory: docs/adrpo_grpo_llm.md.
"""

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
import subprocess
import sys
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import accelerate
import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers
import tyro
from accelerate.utils import gather_object
from filelock import FileLock
from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StaticCache,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

SCRIPT = "adrpo_grpo_llm"
TAKEN_TAGS = {"mean", "std", "frac_reward_zero_std"}  # reward/* tags that are no reward's name
# Mean difference of a completion's log-probabilities between sampler and training pass, in nats:
# rounding stays below, another function is off by whole nats.
SAMPLER_BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.1}


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
    """seed of everything: LoRA, order of the prompts, rollouts, evaluation"""
    cpu: bool = False
    """stay on the CPU; several processes there: torchrun --nproc-per-node N SCRIPT --cpu"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """of matrix products; what is trained stays float32; auto: bf16 on a GPU that has it"""
    resume: str | None = None
    """run folder to continue exactly from its last checkpoint, or `latest`, with its own flags"""

    # ------------------------------------------------------------------------------------ model
    model_id: str = "Qwen/Qwen2-0.5B-Instruct"
    """policy and reference: a folder, or NAME[@REVISION] of the hub (the paper's; or Qwen3 0.6B)"""
    lora_rank: int = 0
    """0 trains all weights beside a frozen copy as reference; above 0 a LoRA of this rank, switched
    off for the reference: less memory, and a --learning-rate of about 1e-5 to 1e-4"""
    lora_alpha: int = 32
    """the LoRA's update is scaled by alpha / rank"""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """ends of the names of the layers that get a LoRA; all-linear: all but the output head"""
    adapter: str | None = None
    """folder of a LoRA to go on from (an earlier run's final/); the reference is without it"""
    gradient_checkpointing: bool = False
    """less memory, more time; a prompt is then read once for each completion: no cache with it"""
    fsdp: bool = False
    """with torchrun: all weights, reference and optimiser split over the processes (FSDP2)"""

    # ------------------------------------------------------------------------------------- data
    dataset: str = "trl-lib/tldr"
    """training prompts: .txt, .jsonl, .json, .csv, .parquet (the row goes to the reward), or of the
    hub NAME[:CONFIGURATION][@REVISION]"""
    prompt_column: str | None = None
    """text or chat messages; default: the first of prompt, question, text, messages"""
    dataset_split: str | None = None
    """split of a hub data set, of --eval-dataset too; default: its first"""
    chat: bool = False
    """wrap plain text prompts in the model's chat template, as lists of messages always are"""
    chat_template_kwargs: str = "{}"
    """JSON for the chat template, such as '{"enable_thinking": false}' (Qwen3)"""
    eval_dataset: str | None = None
    """held-out prompts, given like --dataset; default: every tenth of those, not trained on"""
    eval_max_prompts: int = 64
    """the first so many of the held-out prompts are evaluated"""
    max_prompt_length: int = 512
    """tokens; longer prompts are left out, and counted (TRL 0.15: 512)"""

    # ---------------------------------------------------------------------------------- rewards
    reward_model: tuple[str, ...] | None = None
    """classifiers with one logit, which read prompt and completion in their own chat template;
    default: weqweasdas/RM-Gemma-2B where no --reward is given (the paper's)"""
    reward: tuple[str, ...] = ()
    """FILE.py:function, function(prompts, completions, rows) -> one float per completion"""
    reward_weights: tuple[float, ...] | None = None
    """weight of each, reward models first, in the sum that is maximised; default: 1 each"""
    reward_batch: int = 16
    """completions a reward model reads at once; changes memory and speed, not the result"""

    # ---------------------------------------------------------------------------------- rollout
    prompts_per_update: int = 8
    """prompts per iteration, over all processes, of whose number it is a multiple (TRL 0.15: 8)"""
    group_size: int = 8
    """completions per prompt (TRL 0.15: 8). Their mean reward is the baseline: below 4 it is
    noise"""
    max_completion_length: int = 256
    """tokens after which a completion is cut off (TRL 0.15: 256); see completions/clipped_ratio"""
    temperature: float = 1.0
    """of the policy, in rollouts and in training alike (TRL 0.15: 0.9)"""
    top_p: float = 1.0
    """below 1: sample from the likeliest tokens of this probability. The loss ignores it, so it
    makes training slightly off-policy"""
    top_k: int = 0
    """above 0: sample from the so many likeliest tokens; like --top-p"""
    rollout_batch: int = 64
    """completions rolled out at once, per process, at least one group; changes memory and speed,
    not the result"""

    # ------------------------------------------------------------------------------ fine-tuning
    method: Literal["adrpo", "grpo"] = "adrpo"
    """grpo holds the coefficient at beta0"""
    iterations: int = 500
    """rollouts, each with its updates"""
    updates_per_rollout: int = 1
    """optimiser steps on one rollout, each on all of it; above 1 the clipped ratio matters"""
    beta0: float = 0.04
    """KL coefficient of a completion with A = 0 (the paper: 0.04). Larger: closer to the
    reference"""
    adv_clip_k: float | None = 1.0
    """adrpo: clip A to +-k beta0 in the coefficient (the paper: 1; 0.5 and 2 are its ablation).
    Above 1 the best are pushed away from the reference; None = no clip"""
    scale_rewards: Literal["group", "none"] = "group"
    """divide A by the group's standard deviation, or by nothing (Dr. GRPO, arXiv 2503.20783)"""
    clip_eps: float = 0.2
    """clip the ratio to 1 +- this"""
    learning_rate: float = 1e-6
    """AdamW, after five iterations of warm-up (TRL 0.15); higher for a LoRA or a small model"""
    weight_decay: float = 0.0
    """AdamW"""
    max_grad_norm: float = 1.0
    """gradient norm clip"""
    train_tokens: int = 512
    """tokens of prompts, and of completions, in one pass, at their greatest lengths (512 fits
    Qwen2-0.5B and RM-Gemma-2B into 24 GB); changes memory and speed, not the result"""

    # ------------------------------------------------------------------ evaluation, checkpoints
    eval_every: int = 20
    """iterations between evaluations, always with the same random numbers"""
    eval_samples: int = 4
    """completions per held-out prompt"""
    eval_temperature: float | None = None
    """default: --temperature; 0 = greedy (then --eval-samples 1 will do)"""
    save_every: int = 20
    """iterations between checkpoints: the trained weights, and twice as much for the optimiser"""
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
    unreadable: Tensor  # [V], True for the head's rows that are no token of the tokenizer
    pad: int
    temperature: float
    warpers: list[LogitsProcessor]  # top-k and top-p, of the sampler alone
    static: dict[tuple, StaticCache] | None  # caches by shape; None: some layers cannot have one
    full: bool  # prompts and batches padded full, so that `generate` is compiled once (GPU)
    lengths: tuple[int, int]  # most tokens of a prompt, of a completion


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


def pad_left(policy: Policy, prompts: list[list[int]], longest: int = 0) -> tuple[Tensor, Tensor]:
    """Token lists -> ids and mask [B,P], left-padded to the longest, or to `longest`."""
    longest = max(longest, *map(len, prompts))
    ids = [[policy.pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return tuple(torch.tensor([ids, mask], device=policy.unreadable.device))


def read_prompts(model: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, DynamicCache]:
    """Left-padded ids, mask [B,P] -> the logits after the prompt [B,1,V], and its keys and values.
    The cache is made without the model's configuration: that of a sliding window would drop what
    rows of different length still need."""
    cache = DynamicCache()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    out = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits, cache


@torch.no_grad()
def complete(policy: Policy, prompts: list[list[int]], uniforms: Tensor) -> tuple:
    """`rollout` for prompts that fit into one batch."""
    model, group = policy.sampler, uniforms.shape[1]
    ids, mask = pad_left(policy, prompts, policy.lengths[0] * policy.full)
    cache = None
    if ids.shape[1] > 1:  # `generate` reads the last token; where that is all, it starts anew
        _, cache = read_prompts(model, ids[:, :-1], mask[:, :-1])
        cache.batch_repeat_interleave(group)
    if cache is not None and policy.static is not None:  # does not grow by copies, is compiled
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
    out = model.generate(
        input_ids=ids.repeat_interleave(group, 0),
        attention_mask=mask.repeat_interleave(group, 0),
        past_key_values=cache,
        generation_config=settings,
        logits_processor=[choose],
        synced_gpus=isinstance(model, FSDPModule),
    )
    tokens = out[:, ids.shape[1] :]
    ended = torch.isin(tokens, torch.tensor(policy.stop, device=tokens.device))
    kept = ended.cumsum(1) - ended.long() == 0
    return tokens, kept, torch.cat(choose.logp, 1) * kept


def rollout(policy: Policy, prompts: list[list[int]], uniforms: Tensor, args: Args) -> list[Tensor]:
    """G completions for each of B prompts from uniforms [B,G,T] (T: most tokens): tokens, mask (1
    up to and with the stop token) and log-probabilities, [B*G,C] each. A prompt is read once for
    its group."""
    count, group, _ = uniforms.shape
    at_once = max(1, args.rollout_batch // group)
    parts = []
    for start in range(0, count, at_once):
        rows = [*range(start, min(start + at_once, count))]
        wanted = len(rows) * group
        if policy.full:
            rows += rows[:1] * (at_once - len(rows))
        part = complete(policy, [prompts[row] for row in rows], uniforms[rows])
        parts.append([value[:wanted] for value in part])
    columns = max(tokens.shape[1] for tokens, _, _ in parts)
    padded = [[F.pad(value, (0, columns - value.shape[1])) for value in part] for part in parts]
    return [torch.cat(values) for values in zip(*padded, strict=True)]


# ----------------------------------------------------------------------------------- training pass
class Batch(NamedTuple):
    """A rollout as the training pass reads it: G completions of each of B prompts, in a row."""

    ids: Tensor  # [B,P], left-padded
    mask: Tensor  # [B,P]
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


def read_ordinary_rows(model, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """The same of rows prompt + completion, for gradient checkpointing, which has no cache: ids,
    mask [n,P], tokens [n,C] -> logits [n,C,V]."""
    layers = [part for part in model.modules() if hasattr(part, "gradient_checkpointing")]
    for layer in layers:  # a layer asks its own flag; the dropout inside it stays off
        layer.training = True
    seen = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    inputs = {"input_ids": torch.cat([ids, tokens], dim=1), "attention_mask": seen}
    inputs["position_ids"] = (seen.cumsum(-1) - 1).clamp(min=0)
    logits = model(**inputs, use_cache=False, logits_to_keep=tokens.shape[1] + 1).logits[:, :-1]
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
    group = len(batch.tokens) // len(batch.ids)
    # Of the greatest lengths, so that all processes have as many passes (FSDP).
    prompts_at_once, rows_at_once = (max(1, args.train_tokens // most) for most in policy.lengths)
    # Weights that are trained in float32, for products in bfloat16.
    mixed = {"dtype": torch.bfloat16, "enabled": policy.sampler is not policy.model}
    for start in range(0, len(batch.ids), prompts_at_once):
        ids, mask = (part[start : start + prompts_at_once] for part in (batch.ids, batch.mask))
        made = []
        if not args.gradient_checkpointing:
            with torch.autocast(ids.device.type, **mixed):
                first, cache = read_prompts(model, ids, mask)
            made = [first, *(part for layer in cache.layers for part in (layer.keys, layer.values))]
        leaves = [part.detach().requires_grad_(part.requires_grad) for part in made]
        end = (start + len(ids)) * group
        for row in range(start * group, end, rows_at_once):
            at = slice(row, min(row + rows_at_once, end))
            width = int(batch.kept[at].sum(1).max())
            tokens = batch.tokens[at, :width]
            own = torch.arange(at.start, at.stop, device=ids.device) // group - start  # [n]
            with torch.autocast(ids.device.type, **mixed):
                if args.gradient_checkpointing:
                    logits = read_ordinary_rows(model, ids[own], mask[own], tokens)
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
def distinct_2(completions: list[list[int]]) -> float | None:
    """Share of different pairs of neighbouring tokens among all in a group's completions
    (distinct-2, arXiv 1510.03055, over a group); None where there is none."""
    pairs = [pair for tokens in completions for pair in zip(tokens[:-1], tokens[1:], strict=True)]
    return len(set(pairs)) / len(pairs) if pairs else None


def mean_of(values: list) -> float | None:
    """Mean of those that are not None, None where there is none."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


@torch.no_grad()
def evaluate(policy: Policy, judges: "Judges", heldout: list, tokenizer, accelerator, args):
    """Every eval/* figure of the policy on the held-out prompts, always with the same random
    numbers, and a record a completion, prompt by prompt."""
    count, group = len(heldout), args.eval_samples
    share = math.ceil(count / accelerator.num_processes)  # the last processes do some once more
    mine = [(accelerator.process_index * share + i) % count for i in range(share)]
    prompts = [heldout[i].ids for i in mine]
    rows = [heldout[i].row for i in mine for _ in range(group)]
    rng = seed_everything(args.seed, 0)
    uniforms = torch.rand(count, group, args.max_completion_length, generator=rng)[mine]
    sampler = policy
    if args.eval_temperature is not None:
        sampler = policy._replace(temperature=args.eval_temperature)
    tokens, kept, _ = rollout(sampler, prompts, uniforms.to(accelerator.device), args)
    batch = Batch(*pad_left(policy, prompts), tokens, kept)
    ref_logp = reference_log_probabilities(policy, batch, args)  # [N,C]
    kl, entropy = torch.zeros_like(ref_logp), torch.zeros_like(ref_logp)
    for at, logp, own in completion_passes(policy, policy.model, batch, args):
        kl[at], entropy[at] = kl_k3(logp, ref_logp[at]), own
    kl, entropy = (kl * kept).sum(1), (entropy * kept).sum(1)  # of all tokens of a completion
    completions = [one[mask].tolist() for one, mask in zip(tokens, kept, strict=True)]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    values = score(judges, texts, rows)  # [N,R]
    records = []
    for i, completion in enumerate(completions):
        record = {"prompt": rows[i]["prompt"], "completion": texts[i]}
        record["reward"] = (values[i] @ judges.weights).item()
        for name, value in zip(judges.rewards, values[i].tolist(), strict=True):
            record[f"reward_{name}"] = value
        record["distinct_2"] = distinct_2(completions[i - i % group : i - i % group + group])
        record |= {"tokens": len(completion), "cut_off": completion[-1] not in policy.stop}
        record |= {"kl": kl[i].item(), "entropy": entropy[i].item()}
        records.append(record)
    records = gather_object(records)[: count * group]
    figures = {name: mean_of([record[name] for record in records]) for name in [*records[0]][2:]}
    length = figures["mean_length"] = figures.pop("tokens")
    figures |= {"kl": figures["kl"] / length, "entropy": figures["entropy"] / length}
    figures["clipped_ratio"] = figures.pop("cut_off")
    return figures, records


def save_samples(run_dir: Path, writer: SummaryWriter, step: int, records: list[dict]) -> None:
    """An evaluation's completions as samples/NNNNNN.jsonl; one of each of the first prompts to
    TensorBoard."""
    lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records]
    (run_dir / f"samples/{step:06d}.jsonl").write_text("".join(lines), encoding="utf-8")
    first = list({json.dumps(record["prompt"]): record for record in records}.values())[:8]
    shown = [f"{r['prompt']}\n--- reward {r['reward']:.4g}\n{r['completion']}" for r in first]
    text = "".join(f"<pre>{html.escape(one)}</pre>" for one in shown)
    writer.add_text("completions", text, step)


# ----------------------------------------------------------------------------------------- rewards
class Judges(NamedTuple):
    """Functions (prompts, completions, rows) -> [B] by tag, and their weights [R] in the sum."""

    rewards: dict[str, Callable]
    weights: Tensor


class RewardModel:
    """The logit of a sequence classifier for prompt and completion, written in its own chat
    template as RM-Gemma's card does (TRL joins plain prompts and completions without one)."""

    def __init__(self, source: tuple[str, str | None], batch: int, device, dtype):
        kind, flag = AutoModelForSequenceClassification, "--reward-model"
        self.model = load_verified(kind, flag, source, dtype=dtype).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(source[0], revision=source[1])
        self.batch = batch
        config = self.model.config.get_text_config()
        if config.num_labels != 1:
            remedy = "has to have 1; for another kind write a --reward FILE.py:function"
            raise InputError(f"{flag} {source[0]}: has {config.num_labels} logits, {remedy}")
        if self.tokenizer.pad_token is None:  # not a token that a text may end with
            bos, unk = self.tokenizer.bos_token, self.tokenizer.unk_token
            self.tokenizer.pad_token = bos or unk or self.tokenizer.eos_token
        config.pad_token_id = self.tokenizer.pad_token_id  # before which the logit is taken
        self.tokenizer.truncation_side = "left"  # of a text that is too long the completion stays
        limit = getattr(config, "max_position_embeddings", None) or 2048
        limit = min(limit, self.tokenizer.model_max_length)
        self.options = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
        self.options |= {"truncation": True, "max_length": limit}
        self.options["add_special_tokens"] = not self.tokenizer.chat_template  # which writes them

    def text(self, prompt: str | list[dict], completion: str) -> str:
        messages = [*as_messages(prompt), {"role": "assistant", "content": completion}]
        if not self.tokenizer.chat_template:
            return "\n".join(message["content"] for message in messages)
        roles = [message["role"] for message in messages]
        with naming("--reward-model", f"its chat template refuses {roles}"):
            return self.tokenizer.apply_chat_template(messages, tokenize=False)

    def __call__(self, prompts: list, completions: list[str], rows: list[dict]) -> Tensor:
        texts = list(map(self.text, prompts, completions))
        values = dict.fromkeys(texts)  # once each: rounding would tell equal completions apart
        unique = list(values)
        for start in range(0, len(unique), self.batch):
            some = unique[start : start + self.batch]
            inputs = self.tokenizer(some, **self.options).to(self.model.device)
            values |= zip(some, self.model(**inputs).logits[:, 0].tolist(), strict=True)
        return torch.tensor([values[text] for text in texts])


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


def build_judges(args: Args, models: list[tuple], prompts: list, device, dtype) -> Judges:
    """Rewards and their weights, tried on a prompt of each kind: a wrong plug-in, and a template
    that refuses system messages, are found at once."""
    names = [Path(name).name for name, _ in models]
    names += [spec.rpartition(":")[2] for spec in args.reward]
    if len(names) > len({*names} - TAKEN_TAGS):
        raise InputError(f"--reward, --reward-model: the names {names} collide; rename one")
    functions = [RewardModel(source, args.reward_batch, device, dtype) for source in models]
    functions += [load_plugin(spec) for spec in args.reward]
    weights = torch.tensor(args.reward_weights or [1.0] * len(functions))
    judges = Judges(dict(zip(names, functions, strict=True)), weights)
    kinds = {tuple(m["role"] for m in as_messages(p.row["prompt"])): p.row for p in prompts}
    score(judges, ["", "a completion"] * len(kinds), [row for row in kinds.values() for _ in "12"])
    return judges


@torch.no_grad()
def score(judges: Judges, completions: list[str], rows: list[dict]) -> Tensor:
    """All rewards of B completions -> float32 [B,R] on the CPU. Raises InputError where one returns
    another number of values, or one that is not finite."""
    columns = []
    for name, function in judges.rewards.items():
        own = copy.deepcopy(rows)  # a function may write into what it gets
        values = function([row["prompt"] for row in own], list(completions), own)
        with naming(f"--reward {name}", f"it must give {len(rows)} finite floats"):
            values = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
            if values.shape != (len(rows),) or not values.isfinite().all():
                bad = (~values.isfinite()).sum()
                raise ValueError(f"it gave shape {list(values.shape)}, {bad} not finite")
        columns.append(values)
    return torch.stack(columns, dim=1)


# -------------------------------------------------------------------------------------------- data
def as_messages(prompt: str | list[dict]) -> list[dict]:
    """A prompt as chat messages."""
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def read_source(spec: str, split: str | None) -> tuple[list, str]:
    """The rows of a file, or of NAME[:CONFIGURATION][@REVISION], and the source with its commit."""
    path = Path(spec)
    if path.suffix == ".parquet":
        import pyarrow.parquet  # comes with datasets

        return pyarrow.parquet.read_table(path).to_pylist(), spec
    if path.suffix in (".txt", ".jsonl", ".json", ".csv"):
        text = path.read_bytes().decode("utf-8-sig")  # without the mark that some editors write
        if path.suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline=""))), spec
        if path.suffix == ".json" and text.lstrip().startswith("["):
            return json.loads(text), spec
        lines = [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
        return lines if path.suffix == ".txt" else [json.loads(line) for line in lines], spec

    import datasets  # here, because it is slow to import and files do not need it

    name, _, revision = spec.partition("@")
    name, _, configuration = name.partition(":")
    parts = datasets.load_dataset(name, configuration or None, revision=revision or None)
    rows = parts[split or next(iter(parts))]
    if path.exists() or not rows.cache_files:
        return list(rows), spec
    # The folder of its cache that the library has read is named after the commit.
    commit = Path(rows.cache_files[0]["filename"]).parent.name
    return list(rows), f"{spec.partition('@')[0]}@{commit}"


def usable_prompt(prompt) -> str | list[dict] | None:
    """A prompt; of chat messages without the assistant's last turns, which are the answer. None
    for what is neither text nor messages, or empty."""
    if isinstance(prompt, str):
        return prompt if prompt.strip() else None
    if not isinstance(prompt, list) or not all(isinstance(turn, dict) for turn in prompt):
        return None
    while prompt and prompt[-1].get("role") == "assistant":
        prompt = prompt[:-1]
    parts = [turn.get(key) for turn in prompt for key in ("role", "content")]
    return prompt if prompt and all(isinstance(part, str) for part in parts) else None


def load_rows(flag: str, spec: str, column: str | None, split: str | None):
    """Rows with different prompts in their order, the prompt (text or chat messages) under
    "prompt"; which rows are not used; the source with its commit. Raises InputError."""
    kinds = f"give .txt, .jsonl, .json, .csv, .parquet, or --{flag} NAME:CONFIGURATION@REVISION"
    with naming(f"--{flag} {spec}", kinds):
        rows, source = read_source(spec, split)
        rows = [{"prompt": row} if isinstance(row, str) else dict(row) for row in rows]
    found = list(dict.fromkeys(key for row in rows for key in row))
    known = [name for name in ("prompt", "question", "text", "messages") if name in found]
    column = column or next(iter(known), "prompt")
    counts, unique = Counter(), {}
    for row in rows:
        prompt = usable_prompt(row.get(column))
        key = json.dumps(prompt)
        counts["without a prompt"] += prompt is None
        counts["with a prompt that was there before"] += key in unique
        counts["with an answer, left out"] += prompt not in (None, row.get(column))
        if prompt is not None:
            unique.setdefault(key, row | {"prompt": prompt})
    if not unique:
        columns = f"no prompt in column {column} (columns: {', '.join(map(str, found))})"
        raise InputError(f"--{flag} {spec}: {columns}; see --prompt-column")
    unused = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return list(unique.values()), f"--{flag}: {len(rows)} rows, {unused}" * bool(unused), source


class Prompt(NamedTuple):
    """A row of the data set, its prompt under "prompt", and that prompt's token ids."""

    row: dict
    ids: list[int]


def encode_prompts(tokenizer, rows: list[dict], chat: bool, options: str = "{}") -> list[Prompt]:
    """Tokens of each row's prompt: plain text as it is; with `chat`, or where one is a list of
    messages, all through the chat template with these options (JSON), ready for the assistant's
    turn. Raises InputError for a tokenizer without one."""
    with naming(f"--chat-template-kwargs {options}", "give a JSON object"):
        template = {"add_generation_prompt": True, "tokenize": False} | json.loads(options)
    templated = chat or any(isinstance(row["prompt"], list) for row in rows)
    if options != "{}" and not templated:
        raise InputError("--chat-template-kwargs: plain prompts go through no template; add --chat")
    prompts, remedy = [], "give a model with a chat template, or plain prompts without --chat"
    for start in tqdm(range(0, len(rows), 1000), "tokenise", disable=len(rows) < 10_000):
        texts = [row["prompt"] for row in rows[start : start + 1000]]
        if templated:
            texts = list(map(as_messages, texts))
            with naming("--model-id", remedy):
                texts = tokenizer.apply_chat_template(texts, **template)
        # The template writes the special tokens itself.
        ids = tokenizer(texts, add_special_tokens=not templated).input_ids
        prompts += map(Prompt, rows[start : start + 1000], ids)
    return prompts


def load_prompts(args: Args, tokenizer) -> tuple[list[Prompt], list[Prompt], str, dict[str, str]]:
    """Training and held-out prompts of at most --max-prompt-length tokens, a note on them, and
    their sources. Raises InputError."""
    options = args.prompt_column, args.dataset_split
    train, unused, source = load_rows("dataset", args.dataset, *options)
    sources, notes = {"dataset": source}, [unused]
    if args.eval_dataset:
        heldout, unused, source = load_rows("eval-dataset", args.eval_dataset, *options)
        sources["eval_dataset"] = source
        known = {json.dumps(row["prompt"]) for row in train}
        common = sum(json.dumps(row["prompt"]) in known for row in heldout)
        note = f"{common} of the {len(heldout)} evaluation prompts are training prompts"
        notes += [note + ": that is not held-out" if common else note, unused]
    else:
        heldout, train = train[::10], [row for i, row in enumerate(train) if i % 10]
        notes.append(f"every tenth of --dataset ({len(heldout)}) is held out for evaluation")
        if not train:
            remedy = "one prompt cannot be split; give --eval-dataset"
            raise InputError(f"--dataset {args.dataset}: {remedy}")
    prompts = encode_prompts(tokenizer, [*train, *heldout], args.chat, args.chat_template_kwargs)
    kept = []
    for rows in (prompts[: len(train)], prompts[len(train) :]):
        kept.append([one for one in rows if 0 < len(one.ids) <= args.max_prompt_length])
        longer = f"{len(rows) - len(kept[-1])} prompts of more than {args.max_prompt_length} tokens"
        if not kept[-1]:
            raise InputError(f"--max-prompt-length: {longer}, and no other")
        notes.append(f"{longer} are left out" * (len(kept[-1]) < len(rows)))
    note = "; ".join(filter(None, notes))
    return kept[0], kept[1][: args.eval_max_prompts], note, sources


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


def check_lengths(config, args: Args) -> None:
    """Raise InputError where prompt and completion may be longer than the model can read."""
    needed = args.max_prompt_length + args.max_completion_length
    limit = getattr(config, "max_position_embeddings", None) or needed
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(part for part in ropes.values() if isinstance(part, dict))):
        if rope.get("rope_type") in ("dynamic", "longrope"):  # changes keys that are cached
            limit = min(limit, rope.get("original_max_position_embeddings") or limit)
    if limit < needed:
        what = f"together {needed}, more than the model's {limit}; lower one of them"
        raise InputError(f"--max-prompt-length, --max-completion-length: {what}")


def load_policy(args: Args, source: tuple, tokenizer, device, bf16: bool) -> Policy:
    """Model, sampler and reference on the device. All weights are trained in float32; below a LoRA
    in float32 the frozen ones have the precision of the run. Raises InputError."""
    lora = args.lora_rank > 0 or args.adapter is not None
    dtype = torch.bfloat16 if bf16 and lora else torch.float32
    model = load_verified(AutoModelForCausalLM, "--model-id", source, dtype=dtype).to(device)
    config = model.config.get_text_config()
    check_lengths(config, args)
    stop = stop_tokens(model, tokenizer)
    # Qwen2 has 151,936 rows in its head, and 151,646 tokens.
    unreadable = torch.ones(model.get_output_embeddings().weight.shape[0], dtype=torch.bool)
    readable = [token for token in tokenizer.get_vocab().values() if token < len(unreadable)]
    unreadable[readable] = False
    pad = stop[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model.generation_config = GenerationConfig(pad_token_id=pad)  # no penalties of the model's own
    if args.adapter:
        model = load_adapter(model, args.adapter)
    elif lora:
        targets = "all-linear" if args.lora_targets == ("all-linear",) else list(args.lora_targets)
        options = {"lora_alpha": args.lora_alpha, "target_modules": targets}
        lora_config = LoraConfig(r=args.lora_rank, task_type="CAUSAL_LM", **options)
        with naming(f"--lora-targets {targets}", "name layers that are there, or all-linear"):
            model = get_peft_model(model, lora_config)
    if any(p.requires_grad and p.dtype != torch.float32 for p in model.parameters()):
        what = "its whole modules would train in bfloat16; add --precision fp32"
        raise InputError(f"--adapter {args.adapter}: {what}")
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for layer in model.modules():  # in training mode then, and some drop out themselves (OPT)
            if isinstance(getattr(layer, "dropout", None), float):
                layer.dropout = 0.0
        model.enable_input_require_grads()  # else a LoRA behind a frozen embedding gets no gradient
    model.eval()  # with dropout rollout, old policy and reference would be other functions
    reference = None if lora else copy.deepcopy(model).requires_grad_(False)
    sampler = model
    if args.fsdp:
        shard(model, bf16)
        shard(reference, bf16)
    elif bf16 and not lora:
        sampler = copy.deepcopy(model).to(torch.bfloat16).requires_grad_(False)
    warpers = [TopKLogitsWarper(args.top_k)] if args.top_k else []
    warpers += [TopPLogitsWarper(args.top_p)] if args.top_p < 1 else []
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    static = {} if plain and not args.fsdp else None
    full = device.type == "cuda" and static is not None
    lengths = args.max_prompt_length, args.max_completion_length
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


@torch.no_grad()
def check_cache(policy: Policy, prompts: list[list[int]]) -> None:
    """Raise InputError for a model whose cache is not the prompt's keys and values in each layer:
    completions cannot be read on top of it."""
    config = policy.model.config.get_text_config()
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    lengths = []
    if not kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
        _, cache = read_prompts(policy.sampler, *pad_left(policy, prompts))
        lengths = [layer.get_seq_length() for layer in cache.layers]
    if lengths != [max(map(len, prompts))] * config.num_hidden_layers:
        what = f"its cache is not keys and values of all tokens ({kinds}, {lengths})"
        raise InputError(f"--model-id: {what}; give a model of plain or sliding attention")


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


def finish(run_dir: Path, summary: dict, base: str, lora: bool) -> None:
    """The whole run in one file and as a table, and how to load the result."""
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False))
    for name, value in summary["final"].items():
        print(f"{name:22s}{summary['base'][name] or 0:10.4f} -> {value or 0:.4f}")
    kind = "AutoPeftModelForCausalLM" if lora else "AutoModelForCausalLM"
    print(f"Completions in {run_dir}/samples. To use the result{f', a LoRA of {base}' * lora}:")
    print(f"from {'peft' if lora else 'transformers'} import {kind}")
    print(f'model = {kind}.from_pretrained("{run_dir / "final"}")')


# -------------------------------------------------------------------------------------------- main
def check_args(args: Args, processes: int) -> None:
    """Raise InputError for flags that cannot work."""
    may_be_zero = {"seed", "lora_rank", "top_k", "beta0", "weight_decay", "eval_temperature"}
    for name, value in vars(args).items():
        values = value if isinstance(value, tuple) else (value,)
        numbers = [number for number in values if type(number) in (int, float)]
        lowest = -math.inf if name == "reward_weights" else 0 if name in may_be_zero else 1e-30
        if not all(math.isfinite(number) and number >= lowest for number in numbers):
            raise InputError(f"--{name.replace('_', '-')} {value}: is out of its range")
    rewards = len(args.reward_model or ()) + len(args.reward) or 1
    if args.reward_weights is not None and len(args.reward_weights) != rewards:
        raise InputError("--reward-weights: must be as many as --reward-model and --reward name")
    if args.group_size < 2 or args.top_p > 1:
        raise InputError("--group-size: 2 or more, the others are the baseline; --top-p: up to 1")
    if args.prompts_per_update % processes:
        raise InputError(f"--prompts-per-update: must be a multiple of {processes} processes")
    if args.adapter and args.lora_rank:
        raise InputError("--lora-rank: --adapter has a rank of its own; leave one of them out")
    if args.fsdp and (args.lora_rank or args.adapter or processes == 1):
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
    specs = args.reward_model
    if specs is None:
        specs = () if args.reward else ("weqweasdas/RM-Gemma-2B",)
    reward_models = [find_model("--reward-model", spec) for spec in specs]
    tokenizer = AutoTokenizer.from_pretrained(source[0], revision=source[1])
    train, heldout, note, sources = load_prompts(args, tokenizer)
    sources["model_id"] = "@".join(filter(None, source))
    sources["reward_model"] = tuple("@".join(filter(None, one)) for one in reward_models)
    prompts_sha256 = hashlib.sha256(repr((train, heldout)).encode()).hexdigest()
    if resumed and prompts_sha256 != stored["prompts_sha256"]:
        raise InputError(f"--dataset {args.dataset}: other prompts than when the run began")
    judges = build_judges(args, reward_models, [*train, *heldout], device, dtype)

    seed_everything(args.seed)
    policy = load_policy(args, source, tokenizer, device, dtype == torch.bfloat16)
    check_cache(policy, [train[0].ids, heldout[0].ids])
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    options = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(trained, **options)

    if not resumed:
        run_dir = create_run(args, sources, prompts_sha256) if is_main else None
    lock = lock_run(run_dir) if is_main else None
    groups, group = args.prompts_per_update, args.group_size
    # Whole groups stay in one process.
    my_groups = slice(rank * groups // processes, (rank + 1) * groups // processes)
    accelerator.print(
        f"{run_dir}: {args.method}, {processes} x {device.type}, {dtype}, "
        f"{sum(parameter.numel() for parameter in trained):,} trained parameters\n"
        f"{len(train)} training prompts, {len(heldout)} for evaluation; {note}\n"
        f"each iteration {groups} prompts x {group} completions of at most "
        f"{args.max_completion_length} tokens, {args.updates_per_rollout} updates; stop tokens "
        f"{tokenizer.convert_ids_to_tokens(policy.stop)}"
        + "\nwarning: --group-size: the mean of so few completions is a noisy baseline"
        * (group < 4)
    )

    first = 0
    if resumed:
        checkpoint = load_checkpoint(run_dir)
        first, base, metrics = (checkpoint[name] for name in ("iteration", "base", "metrics"))
        restore(run_dir if is_main else None, checkpoint, policy.model, optimizer)
        renew_sampler(policy)
    else:
        base, records = evaluate(policy, judges, heldout, tokenizer, accelerator, args)
        metrics = base
    writer = SummaryWriter(run_dir, purge_step=first + 1 if first else 0) if is_main else None
    if is_main and not resumed:
        log(run_dir, writer, 0, {f"eval/{name}": value for name, value in metrics.items()})
        save_samples(run_dir, writer, 0, records)

    bar = tqdm(range(first + 1, args.iterations + 1), args.method, disable=not is_main)
    for iteration in bar:
        # ---- 1. rollout: completions of the policy, and their rewards. Every process draws all
        # random numbers and takes those of its groups: the result does not depend on their number.
        started = time.perf_counter()
        rng = seed_everything(args.seed, iteration)
        drawn = draw_prompts(len(train), groups, iteration - 1, args.seed)[my_groups]
        prompts = [train[row].ids for row in drawn]
        rows = [train[row].row for row in drawn for _ in range(group)]
        uniforms = torch.rand(groups, group, args.max_completion_length, generator=rng)[my_groups]
        tokens, kept, sampled_logp = rollout(policy, prompts, uniforms.to(device), args)  # [N,C]
        completions = [one[mask].tolist() for one, mask in zip(tokens, kept, strict=True)]
        rolled_out = time.perf_counter()
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        values = accelerator.gather(score(judges, texts, rows).to(device)).cpu()
        values = values.unflatten(0, (groups, group))  # [P,G,R], of all processes
        reward = values @ judges.weights  # [P,G]
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
        batch = Batch(*pad_left(policy, prompts), tokens, kept)
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
        for i, name in enumerate(judges.rewards):
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
        distinct = [distinct_2(completions[i : i + group]) for i in range(0, len(tokens), group)]
        record["completions/distinct_2"] = mean_of(gather_object(distinct))
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
            metrics, records = evaluate(policy, judges, heldout, tokenizer, accelerator, args)
            record |= {f"eval/{name}": value for name, value in metrics.items()}
        if is_main:
            log(run_dir, writer, iteration, record)
            writer.add_histogram("adrpo/coefficient", coefficient, iteration)
        if is_main and evaluated:
            save_samples(run_dir, writer, iteration, records)
            if args.keep_adapters and policy.reference is None:
                policy.model.save_pretrained(run_dir / f"adapters/{iteration:06d}")
        bar.set_postfix(reward=record["reward/mean"], kl=record["kl"], entropy=record["entropy"])
        if last or iteration % args.save_every == 0:
            state = training_state(policy.model, optimizer)
            if is_main:
                state |= {"iteration": iteration, "metrics": metrics, "base": base}
                state["metrics_bytes"] = (run_dir / "metrics.jsonl").stat().st_size
                write_safely(run_dir / "checkpoint.pt", state)

    weights = training_state(policy.model, optimizer)["weights"]
    if is_main:
        writer.close()
        save_model(run_dir / "final", policy, weights, args)
        tokenizer.save_pretrained(run_dir / "final")
        summary = {"base": base, "final": metrics, "iterations": args.iterations}
        finish(run_dir, summary | {"method": args.method}, source[0], policy.reference is None)
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
        smaller = "lower --train-tokens or --rollout-batch, or add --lora-rank 16"
        sys.exit(f"error: out of memory ({str(error)[:120]}); {smaller}, --gradient-checkpointing")
    except OSError as error:
        if "No space" not in str(error) and "Read-only" not in str(error):
            raise
        sys.exit(f"error: --output-dir {args.output_dir}: {error}; make room, then --resume latest")
    except SystemExit as error:
        raise RuntimeError(f"--reward {args.reward}: the plug-in ended the program") from error
    except KeyboardInterrupt:
        sys.exit("interrupted; --resume latest goes on from the last checkpoint, if there is one")
