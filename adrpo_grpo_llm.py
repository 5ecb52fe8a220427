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

One iteration: roll out --group-size completions for each of --prompts-per-update prompts, score
them, one optimiser step on all of them (--updates-per-rollout for more). Both passes are the stock
model's, and read a prompt once for its whole group:

    rollout     a prompt's keys and values are written --group-size times, and transformers'
                `generate` goes on from them
    training    pass 1 reads the prompts and keeps their keys and values with their gradient, pass 2
                reads the completions on top of them, some at a time

In every iteration the sampler's log-probabilities are compared with the training pass's: a model
for which the two are not one function stops before the step.

Where this departs from the paper, or the paper is silent:
- Group normalisation puts |A| near 1, far above beta0 = 0.04: the coefficient saturates to 0
  (A > 0), 2 beta0 (A < 0) or beta0 (no spread). That is the paper's recommended setting; adrpo/*
  and its histogram show it. --scale-rewards none leaves the division out.
- The raw A weights the policy term, the clipped one the coefficient only.
- The old policy's log-probabilities are those of the first training pass, so the ratio starts at
  exactly 1; the sampler's own are only compared with them (sampling/sampling_logp_difference).
- Data, learning rate, group and lengths are not published: the defaults are TRL's of early 2025,
  whose example names the same model and reward model.

    python adrpo_grpo_llm.py  # Qwen2-0.5B-Instruct, TL;DR, RM-Gemma-2B
    python adrpo_grpo_llm.py --dataset rows.jsonl --reward my_reward.py:function --lora-rank 16 \\
        --learning-rate 1e-5
    torchrun --nproc-per-node 8 adrpo_grpo_llm.py --fsdp --prompts-per-update 32

Without a GPU: benchmark/mini_world_llm.py makes a small trained world on which the same script
learns in a minute. Equations, metrics, results, time and memory: docs/adrpo_grpo_llm.md.
"""

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
from typing import Literal, NamedTuple, TextIO

import accelerate
import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers
import tyro
from accelerate.utils import gather_object
from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.utils import load_peft_weights, set_peft_model_state_dict
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
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

SCRIPT = "adrpo_grpo_llm"
TAKEN_TAGS = {"mean", "std", "frac_reward_zero_std"}  # reward/* tags that are no reward's name
DIVERGED = "lower --learning-rate, or raise --beta0"
# Mean difference of a completion's log-probabilities between sampler and training pass, in nats:
# rounding stays below, another function is off by whole nats.
SAMPLER_BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.1}


class InputError(ValueError):
    """What the user gave cannot work: one line that names the flag and the remedy."""


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
    """of rollouts and matrix products; trained weights, log-probabilities and losses stay float32;
    auto: bf16 on a GPU that has it"""
    resume: str | None = None
    """run folder to continue exactly from its last checkpoint, or `latest`, with its own flags"""

    # ------------------------------------------------------------------------------------ model
    model_id: str = "Qwen/Qwen2-0.5B-Instruct"
    """causal language model of transformers: a folder, or NAME[@REVISION] of the hub (the paper:
    Qwen2 0.5B and Qwen3 0.6B). It is also the reference"""
    lora_rank: int = 0
    """0 trains all weights beside a frozen copy as reference; above 0 a LoRA of this rank, switched
    off for the reference: less memory, and a --learning-rate of about 1e-5 to 1e-4"""
    lora_alpha: int = 32
    """the LoRA's update is scaled by alpha / rank"""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """ends of the names of the layers that get a LoRA; all-linear: all but the output head"""
    adapter: str | None = None
    """folder with a LoRA of --model-id to go on from, such as an earlier run's final/; the
    reference is the model without it"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time. Also reads a prompt once
    for each completion, since transformers has no cache then"""
    fsdp: bool = False
    """with torchrun: all weights, reference and optimiser split over the processes (FSDP2)"""

    # ------------------------------------------------------------------------------------- data
    dataset: str = "trl-lib/tldr"
    """training prompts: .txt, .jsonl, .json, .csv, .parquet (the row goes to the reward), or of the
    hub NAME[:CONFIGURATION][@REVISION]"""
    prompt_column: str | None = None
    """column of the prompt, text or a list of chat messages; default: the first of prompt,
    question, text, messages"""
    dataset_split: str | None = None
    """split of a hub data set; default: its first"""
    chat: bool = False
    """wrap plain text prompts in the model's chat template; lists of messages always are"""
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
    """sequence classifiers with one logit, folders or NAME[@REVISION], which read prompt and
    completion in their own chat template; default: weqweasdas/RM-Gemma-2B where no --reward is
    given (the paper's)"""
    reward: tuple[str, ...] = ()
    """FILE.py:function, function(prompts, completions, rows) -> one float per completion"""
    reward_weights: tuple[float, ...] | None = None
    """weight of each, reward models first, in the sum that is maximised; default: 1 each"""
    reward_batch: int = 16
    """completions a reward model reads at once; changes memory and speed, not the result"""

    # ---------------------------------------------------------------------------------- rollout
    prompts_per_update: int = 8
    """prompts per iteration, over all processes; a multiple of their number. Few: noisy updates
    (TRL 0.15: 8)"""
    group_size: int = 8
    """completions per prompt (TRL 0.15: 8). Their mean reward is the baseline: below 4 it is
    noise"""
    max_completion_length: int = 256
    """tokens after which a completion is cut off (TRL 0.15: 256); see completions/clipped_ratio"""
    temperature: float = 1.0
    """of the policy, in rollouts and in training alike (TRL 0.15: 0.9)"""
    top_p: float = 1.0
    """below 1: sample from the smallest set of tokens with this probability. The loss ignores it,
    so it makes training slightly off-policy"""
    top_k: int = 0
    """above 0: sample from the so many likeliest tokens; like --top-p"""
    rollout_batch: int = 64
    """completions rolled out at once, per process (at least one group); changes memory and speed,
    not the result"""

    # ------------------------------------------------------------------------------ fine-tuning
    method: Literal["adrpo", "grpo"] = "adrpo"
    """grpo holds the coefficient at beta0"""
    iterations: int = 500
    """rollouts, each with its updates"""
    updates_per_rollout: int = 1
    """optimiser steps on one rollout, each on all of it; above 1 the clipped ratio matters"""
    beta0: float = 0.04
    """KL coefficient of a completion with A = 0 (the paper and early TRL: 0.04). Larger: closer to
    the reference"""
    adv_clip_k: float | None = 1.0
    """adrpo: clip A to +-k beta0 in the coefficient (the paper: 1; 0.5 and 2 are its ablation).
    Above 1 the best are pushed away from the reference; None = no clip"""
    scale_rewards: Literal["group", "none"] = "group"
    """divide A by the group's standard deviation, or by nothing (Dr. GRPO, arXiv 2503.20783)"""
    clip_eps: float = 0.2
    """clip the ratio to 1 +- this"""
    learning_rate: float = 1e-6
    """AdamW, after five iterations of warm-up (TRL 0.15, for all weights); higher for a LoRA or a
    small model"""
    weight_decay: float = 0.0
    """AdamW"""
    max_grad_norm: float = 1.0
    """gradient norm clip"""
    train_tokens: int = 2048
    """tokens of prompts, and tokens of completions, in one pass, padding included, per process;
    changes memory and speed, not the result"""

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


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor,
    advantage: Tensor,
    coefficient: Tensor,
    mask: Tensor,
    clip_eps: float,
) -> Tensor:
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
    top_p: float
    top_k: int
    static: dict[int, StaticCache] | None  # by rows: caches that a GPU's graphs were recorded with


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


def choose_tokens(probabilities: Tensor, uniforms: Tensor, top_p: float, top_k: int) -> Tensor:
    """One token for each distribution, by its inverse cumulative function at a given uniform
    number: probabilities [..., V], uniforms [...] -> [...]."""
    order = None
    if top_p < 1 or top_k > 0:  # first top-k, then top-p of what is left, as transformers does
        probabilities, order = probabilities.sort(-1, descending=True)
        if top_k > 0:
            probabilities[..., top_k:] = 0
            probabilities /= probabilities.sum(-1, keepdim=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities * (before < top_p)
    cumulative = probabilities.cumsum(-1)
    tokens = torch.searchsorted(cumulative, uniforms[..., None] * cumulative[..., -1:], right=True)
    tokens = tokens.clamp(max=probabilities.shape[-1] - 1)
    return (tokens if order is None else order.gather(-1, tokens)).squeeze(-1)


class ChooseByUniform(LogitsProcessor):
    """Chooses each token of `generate` by a uniform number drawn beforehand, [N,T]: the result
    depends neither on how the batch is cut nor on the number of processes. Keeps the tokens'
    log-probabilities (before top-p and top-k), never the logits."""

    def __init__(self, uniforms: Tensor, policy: Policy):
        self.uniforms, self.policy, self.logp = uniforms, policy, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        policy, logp = self.policy, scaled_logits(scores, self.policy).log_softmax(-1)
        if policy.temperature == 0:
            token = logp.argmax(-1)
        else:
            uniforms = self.uniforms[:, len(self.logp)]
            token = choose_tokens(logp.exp(), uniforms, policy.top_p, policy.top_k)
        self.logp.append(logp.gather(1, token[:, None]))
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


def pad_left(
    prompts: list[list[int]], pad: int, device: torch.device, longest: int = 0
) -> tuple[Tensor, Tensor]:
    """Token lists -> ids and mask [B,P], left-padded to the longest, or to `longest`."""
    longest = max(longest, *map(len, prompts), 1)
    ids = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


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
def roll_out_batch(
    policy: Policy, prompts: list[list[int]], uniforms: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`roll_out` for prompts that fit into one batch, padded to `longest` tokens."""
    model, group, device = policy.sampler, uniforms.shape[1], uniforms.device
    ids, mask = pad_left(prompts, policy.pad, device, longest)
    cache = None
    if ids.shape[1] > 1:  # `generate` reads the last token; where that is all, it starts anew
        _, cache = read_prompts(model, ids[:, :-1], mask[:, :-1])
        cache.batch_repeat_interleave(group)
    if cache and policy.static is not None:
        dynamic, rows, length = cache, len(ids) * group, ids.shape[1] + uniforms.shape[2]
        if rows not in policy.static:
            policy.static[rows] = StaticCache(model.config, max_cache_len=length)
        cache = policy.static[rows]
        cache.reset()
        for number, layer in enumerate(dynamic.layers):
            cache.update(layer.keys, layer.values, number)
    choose = ChooseByUniform(uniforms.flatten(0, 1), policy)
    settings = GenerationConfig(
        max_new_tokens=uniforms.shape[2],
        do_sample=False,  # of what `choose` leaves
        eos_token_id=policy.stop,
        pad_token_id=policy.pad,
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
    ended = torch.isin(tokens, torch.tensor(policy.stop, device=device))
    kept = ended.cumsum(1) - ended.long() == 0  # up to and with the stop token
    return tokens, kept, torch.cat(choose.logp, 1) * kept


def roll_out(
    policy: Policy, prompts: list[list[int]], uniforms: Tensor, batch: int, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """G completions for each of B prompts from uniforms [B,G,T] (T: most tokens), about `batch` at
    a time: tokens, mask (1 up to and with the stop token) and log-probabilities, [B*G,C] each. A
    prompt is read once for its group. longest: tokens that prompts are padded to, where a GPU's
    graphs need one shape for all; 0: as few as possible."""
    group = uniforms.shape[1]
    at_once = max(1, batch // group)
    parts = []
    for start in range(0, len(prompts), at_once):
        rows = [*range(start, min(start + at_once, len(prompts)))]
        count = len(rows) * group
        if longest:  # the last batch is as full as the others
            rows += rows[:1] * (at_once - len(rows))
        part = roll_out_batch(policy, [prompts[row] for row in rows], uniforms[rows], longest)
        parts.append([value[:count] for value in part])
    columns = max(tokens.shape[1] for tokens, _, _ in parts)
    padded = [[F.pad(value, (0, columns - value.shape[1])) for value in part] for part in parts]
    tokens, kept, logp = (torch.cat(values) for values in zip(*padded, strict=True))
    return tokens, kept, logp


# ----------------------------------------------------------------------------------- training pass
class Batch(NamedTuple):
    """A rollout as the training pass reads it: B prompts, G completions of each one after another.
    Sizes are the same in all processes, for passes that must be as many."""

    ids: Tensor  # [B,P], left-padded
    mask: Tensor  # [B,P]
    tokens: Tensor  # [B*G,C]
    kept: Tensor  # [B*G,C], True up to and with the stop token


def read_completions(
    model: nn.Module, first: Tensor, cache: list[Tensor], mask: Tensor, tokens: Tensor
) -> Tensor:
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


def read_rows(model: nn.Module, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """The same from ordinary rows prompt + completion, for gradient checkpointing: ids, mask [n,P],
    tokens [n,C] -> logits [n,C,V]."""
    seen = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    rows = {"input_ids": torch.cat([ids, tokens], dim=1), "attention_mask": seen}
    keep = tokens.shape[1] + 1
    out = model(**rows, position_ids=positions, use_cache=False, logits_to_keep=keep)
    return out.logits[:, :-1]


def token_log_probabilities(
    logits: Tensor, tokens: Tensor, policy: Policy
) -> tuple[Tensor, Tensor]:
    """log pi(token), and the entropy of pi in nats (without gradient): logits [n,C,V], tokens [n,C]
    -> two float32 [n,C]."""
    logits = scaled_logits(logits, policy)
    normaliser = logits.logsumexp(-1)
    logp = logits.gather(-1, tokens[..., None]).squeeze(-1) - normaliser
    with torch.no_grad():  # row by row, for its [C,V] are large
        expected = [(row.softmax(-1) * row).sum(-1) for row in logits]
    return logp, normaliser.detach() - torch.stack(expected)


def completion_passes(
    policy: Policy, model: nn.Module, batch: Batch, train_tokens: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Log-probabilities and entropies [n,C] of some completions after another, and which they are.

    A prompt is read once for all its completions. Its keys and values are handed to them as
    leaves: the caller's own backward pass, before it asks for the next ones, ends there, and one
    backward pass through the prompts takes on what has come together (ours)."""
    group = len(batch.tokens) // len(batch.ids)
    prompts_at_once = max(1, train_tokens // batch.ids.shape[1])
    rows_at_once = max(1, train_tokens // batch.tokens.shape[1])
    checkpointed = [part for part in model.modules() if getattr(part, "gradient_checkpointing", 0)]
    autocast = policy.sampler is not policy.model  # float32 weights, matrix products in bfloat16
    device = batch.ids.device.type
    for start in range(0, len(batch.ids), prompts_at_once):
        some = slice(start, start + prompts_at_once)
        ids, mask = batch.ids[some], batch.mask[some]
        if not checkpointed:
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                first, cache = read_prompts(model, ids, mask)
            made = [first, *(part for layer in cache.layers for part in (layer.keys, layer.values))]
            leaves = [part.detach().requires_grad_(part.requires_grad) for part in made]
        end = (start + len(ids)) * group
        for row in range(start * group, end, rows_at_once):
            at = slice(row, min(row + rows_at_once, end))
            width = int(batch.kept[at].sum(1).max())
            tokens = batch.tokens[at, :width]
            prompt = torch.arange(at.start, at.stop, device=ids.device) // group - start  # [n]
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                if checkpointed:
                    for layer in checkpointed:  # which looks at its own flag; the dropout inside
                        layer.training = True  # stays off
                    logits = read_rows(model, ids[prompt], mask[prompt], tokens)
                else:
                    first, *cache = [leaf[prompt] for leaf in leaves]
                    logits = read_completions(model, first, cache, mask[prompt], tokens)
            values = token_log_probabilities(logits, tokens, policy)
            del logits
            logp, entropy = (F.pad(v, (0, batch.tokens.shape[1] - width)) for v in values)
            yield at, logp, entropy
            for layer in checkpointed:
                layer.training = False
        if not checkpointed:
            pairs = [(m, leaf.grad) for m, leaf in zip(made, leaves, strict=True)]
            pairs = [(m, grad) for m, grad in pairs if grad is not None]
            if pairs:
                torch.autograd.backward(*map(list, zip(*pairs, strict=True)))


@torch.no_grad()
def reference_log_probabilities(policy: Policy, batch: Batch, train_tokens: int) -> Tensor:
    """Log-probabilities [B*G,C] under the reference: the frozen copy, or the model without its
    LoRA."""
    if policy.reference is None:
        policy.model.disable_adapter_layers()
    model = policy.model if policy.reference is None else policy.reference
    parts = [logp for _, logp, _ in completion_passes(policy, model, batch, train_tokens)]
    if policy.reference is None:
        policy.model.enable_adapter_layers()
    return torch.cat(parts)


def make_batch(
    policy: Policy, prompts: list[list[int]], tokens: Tensor, kept: Tensor, accelerator
) -> Batch:
    """A rollout for the training pass, with sizes that are the same in all processes."""
    sizes = torch.tensor([max(map(len, prompts)), tokens.shape[1]], device=tokens.device)
    longest, columns = accelerator.gather(sizes).view(-1, 2).amax(0).tolist()
    ids, mask = pad_left(prompts, policy.pad, tokens.device, longest)
    missing = (0, columns - tokens.shape[1])
    return Batch(ids, mask, F.pad(tokens, missing), F.pad(kept, missing))


# -------------------------------------------------------------------------------------- evaluation
def distinct_2(completions: list[list[int]]) -> float | None:
    """Share of different pairs of neighbouring tokens among all in a group's completions
    (distinct-2, arXiv 1510.03055, over a group); None where there is none."""
    pairs = [pair for tokens in completions for pair in zip(tokens[:-1], tokens[1:], strict=True)]
    return len(set(pairs)) / len(pairs) if pairs else None


def mean_of(values: list) -> float | None:
    """Mean of those that are numbers, None where there is none."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


class EvalSet(NamedTuple):
    """What every evaluation of a run shares, drawn once."""

    prompts: list["Prompt"]  # [N]
    uniforms: Tensor  # [N,G,T]
    temperature: float


@torch.no_grad()
def evaluate(policy: Policy, judges: "Judges", eval_set: EvalSet, tokenizer, accelerator, args):
    """Every eval/* figure of the policy on the held-out prompts, and a record a completion, prompt
    by prompt."""
    count, group = len(eval_set.prompts), args.eval_samples
    share = math.ceil(count / accelerator.num_processes)  # the last processes do some once more
    mine = [(accelerator.process_index * share + i) % count for i in range(share)]
    prompts = [eval_set.prompts[i] for i in mine]
    ids, rows = [prompt.ids for prompt in prompts], [prompt.row for prompt in prompts]
    sampling = policy._replace(temperature=eval_set.temperature)
    longest = args.max_prompt_length if policy.static is not None else 0
    uniforms = eval_set.uniforms[mine].to(accelerator.device)
    tokens, kept, _ = roll_out(sampling, ids, uniforms, args.rollout_batch, longest)
    batch = make_batch(policy, ids, tokens, kept, accelerator)
    passes = [*completion_passes(policy, policy.model, batch, args.train_tokens)]
    logp, entropy = (torch.cat([part[i] for part in passes]) for i in (1, 2))
    kl = kl_k3(logp, reference_log_probabilities(policy, batch, args.train_tokens))
    kl_sums, entropy_sums = (kl * batch.kept).sum(1).tolist(), (entropy * batch.kept).sum(1)
    entropy_sums = entropy_sums.tolist()
    completions = [one[mask].tolist() for one, mask in zip(tokens, kept, strict=True)]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    rows = [row for row in rows for _ in range(group)]
    values = score_all(judges, texts, rows)  # [B*G,R]
    records = []
    for i, completion in enumerate(completions):
        record = {"prompt": rows[i]["prompt"], "completion": texts[i]}
        record["reward"] = (values[i] @ judges.weights).item()
        for name, value in zip(judges.rewards, values[i].tolist(), strict=True):
            record[f"reward_{name}"] = value
        record |= {"tokens": len(completion), "cut_off": completion[-1] not in policy.stop}
        record |= {"kl": kl_sums[i], "entropy": entropy_sums[i]}  # sums over its tokens
        record["distinct_2"] = distinct_2(completions[i - i % group : i - i % group + group])
        records.append(record)
    records = gather_object(records)[: count * group]
    length = sum(record["tokens"] for record in records)
    figures = {"reward": mean_of([record["reward"] for record in records])}
    for name in judges.rewards:
        figures[f"reward_{name}"] = mean_of([record[f"reward_{name}"] for record in records])
    figures["distinct_2"] = mean_of([record["distinct_2"] for record in records])
    figures["kl"] = sum(record["kl"] for record in records) / length
    figures["entropy"] = sum(record["entropy"] for record in records) / length
    figures["mean_length"] = length / len(records)
    figures["clipped_ratio"] = mean_of([float(record["cut_off"]) for record in records])
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
        name, revision = source
        self.tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        kind = AutoModelForSequenceClassification
        model = load_verified(kind, "--reward-model", source, dtype=dtype)
        self.model, self.batch, self.device = model.to(device).eval(), batch, device
        if model.config.num_labels != 1:
            remedy = "for another kind of classifier write a --reward FILE.py:function"
            labels = f"has {model.config.num_labels} logits, must have 1"
            raise InputError(f"--reward-model {name}: {labels}; {remedy}")
        if self.tokenizer.pad_token is None:  # not a token that a text may end with
            bos, unk = self.tokenizer.bos_token, self.tokenizer.unk_token
            self.tokenizer.pad_token = bos or unk or self.tokenizer.eos_token
        config = model.config.get_text_config()
        config.pad_token_id = self.tokenizer.pad_token_id  # the last token before it is read
        self.limit = getattr(config, "max_position_embeddings", None) or 2048
        self.tokenizer.truncation_side = "left"  # of a text that is too long the completion stays

    def text(self, prompt: str | list[dict], completion: str) -> str:
        messages = [*as_messages(prompt), {"role": "assistant", "content": completion}]
        if not self.tokenizer.chat_template:
            return "\n".join(message["content"] for message in messages)
        return self.tokenizer.apply_chat_template(messages, tokenize=False)

    def __call__(self, prompts: list, completions: list[str], rows: list[dict]) -> Tensor:
        texts = list(map(self.text, prompts, completions))
        unique = list(dict.fromkeys(texts))  # else rounding makes advantages of equal completions
        options = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
        options |= {"truncation": True, "max_length": self.limit}
        options["add_special_tokens"] = not self.tokenizer.chat_template  # a template writes them
        logits = []
        for start in range(0, len(unique), self.batch):
            inputs = self.tokenizer(unique[start : start + self.batch], **options).to(self.device)
            logits += self.model(**inputs).logits[:, 0].tolist()
        values = dict(zip(unique, logits, strict=True))
        return torch.tensor([values[text] for text in texts])


def load_plugin(flag: str, spec: str) -> Callable:
    """The function of FILE.py:function. Its own errors are shown as they are."""
    path, _, name = spec.rpartition(":")
    if not (path.endswith(".py") and Path(path).is_file()):
        raise InputError(f"{flag} {spec}: give FILE.py:function of an existing file")
    module_name = f"reward_plugin_{Path(path).stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # where dataclasses and pickle look it up
    module_spec.loader.exec_module(module)
    return getattr(module, name)


def build_judges(args: Args, sources: list, train: list["Prompt"], device, dtype) -> Judges:
    """Rewards and their weights, tried on a prompt of each kind: a wrong plug-in, and a template
    that refuses system messages, are found at once."""
    rewards = {}
    for flag, spec in [("--reward-model", s) for s in sources] + [
        ("--reward", s) for s in args.reward
    ]:
        name = spec.rpartition(":")[2] if flag == "--reward" else Path(spec[0]).name
        if name in {*rewards, *TAKEN_TAGS}:
            raise InputError(f"{flag} {spec}: the tag {name} is taken; rename it")
        if flag == "--reward":
            rewards[name] = load_plugin(flag, spec)
        else:
            rewards[name] = RewardModel(spec, args.reward_batch, device, dtype)
    weights = torch.tensor(args.reward_weights or [1.0] * len(rewards))
    kinds = {tuple(m["role"] for m in as_messages(p.row["prompt"])): p.row for p in train}
    rows = [row for row in kinds.values() for _ in range(2)]
    judges = Judges(rewards, weights)
    score_all(judges, ["", "a completion"] * len(kinds), rows)
    return judges


@torch.no_grad()
def score_all(judges: Judges, completions: list[str], rows: list[dict]) -> Tensor:
    """All rewards of B completions -> float32 [B,R] on the CPU. Raises InputError where one returns
    another number of values, or one that is not finite."""
    columns = []
    for name, function in judges.rewards.items():
        values = function([row["prompt"] for row in rows], completions, rows)
        values = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
        if values.shape != (len(rows),) or not values.isfinite().all():
            bad = f"shape {list(values.shape)}, {(~values.isfinite()).sum()} not finite"
            raise InputError(f"--reward {name}: must give {len(rows)} finite floats ({bad})")
        columns.append(values)
    return torch.stack(columns, dim=1)


# -------------------------------------------------------------------------------------------- data
def as_messages(prompt: str | list[dict]) -> list[dict]:
    """A prompt as chat messages."""
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def read_rows_of(spec: str, split: str | None) -> tuple[list, str]:
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
        lines = [line for line in text.split("\n") if line.strip()]
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
    """A prompt without white space at its ends; chat messages without the assistant's last turns,
    which are the answer. None where nothing is left."""
    if isinstance(prompt, str):
        return prompt.strip("\r\n") if prompt.strip() else None
    if not isinstance(prompt, list):
        return None
    if not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in prompt):
        return None
    while prompt and prompt[-1].get("role") == "assistant":
        prompt = prompt[:-1]
    return prompt if prompt and all("role" in message for message in prompt) else None


def load_rows(flag: str, spec: str, column: str | None, split: str | None):
    """Rows with different prompts in their order, the prompt (text or chat messages) under
    "prompt"; which rows are not used; the source with its commit. Raises InputError."""
    try:
        rows, source = read_rows_of(spec, split)
        rows = [{"prompt": row} if isinstance(row, str) else dict(row) for row in rows]
    except Exception as error:
        reason = f"{type(error).__name__}: {error.__cause__ or error}"
        kinds = "a .txt, .jsonl, .json, .csv or .parquet file, or NAME[:CONFIGURATION][@REVISION]"
        raise InputError(f"--{flag} {spec}: cannot be read ({reason}); give {kinds}") from error
    found = list(dict.fromkeys(key for row in rows for key in row))
    known = [name for name in ("prompt", "question", "text", "messages") if name in found]
    column = column or next(iter(known), "prompt")
    counts, unique = Counter(), {}
    for row in rows:
        prompt = usable_prompt(row.get(column))
        key = json.dumps(prompt)
        counts["without a prompt"] += prompt is None
        counts["with a prompt that was there before"] += key in unique
        if prompt is not None and prompt != row[column] and isinstance(prompt, list):
            counts["with an answer of the assistant, which is left out"] += 1
        if prompt is not None:
            unique.setdefault(key, row | {"prompt": prompt})
    if not unique:
        columns = f"no prompt in column {column} (columns: {', '.join(map(str, found))})"
        raise InputError(f"--{flag} {spec}: {columns}; see --prompt-column")
    unused = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    note = f"--{flag}: of {len(rows)} rows {unused}" if unused else ""
    return list(unique.values()), note, source


class Prompt(NamedTuple):
    """A row of the data set, its prompt under "prompt", and that prompt's token ids."""

    row: dict
    ids: list[int]


def encode_prompts(tokenizer, rows: list[dict], chat: bool, options: str = "{}") -> list[Prompt]:
    """Tokens of each row's prompt: plain text as it is, messages (and with `chat` everything)
    through the chat template with these options (JSON), ready for the assistant's turn. Raises
    InputError for a tokenizer without one."""
    texts = []
    for row in rows:
        text = row["prompt"]
        if chat or isinstance(text, list):
            if not tokenizer.chat_template:
                remedy = "give an instruct model, or plain text prompts without --chat"
                raise InputError(f"--model-id: its tokenizer has no chat template; {remedy}")
            template = {"add_generation_prompt": True, "tokenize": False} | json.loads(options)
            text = tokenizer.apply_chat_template(as_messages(text), **template)
        texts.append(text)
    # A template writes the special tokens itself.
    kinds = [chat or isinstance(row["prompt"], list) for row in rows]
    prompts = []
    for start in tqdm(range(0, len(rows), 1000), "tokenise", disable=len(rows) < 10_000):
        for templated in set(kinds[start : start + 1000]):
            end = min(start + 1000, len(rows))
            some = [i for i in range(start, end) if kinds[i] == templated]
            options = {"add_special_tokens": not templated}
            ids = tokenizer([texts[i] for i in some], **options).input_ids
            prompts += zip(some, ids, strict=True)
    return [Prompt(rows[i], ids) for i, ids in sorted(prompts)]


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
    kept = []
    for rows in (train, heldout):
        prompts = encode_prompts(tokenizer, rows, args.chat, args.chat_template_kwargs)
        fitting = [prompt for prompt in prompts if 0 < len(prompt.ids) <= args.max_prompt_length]
        if not fitting:
            shortest = min(len(prompt.ids) for prompt in prompts)
            raise InputError(f"--max-prompt-length: the shortest prompt has {shortest} tokens")
        if len(fitting) < len(rows):
            longer = f"{len(rows) - len(fitting)} prompts of more than {args.max_prompt_length}"
            notes.append(f"{longer} tokens are left out")
        kept.append(fitting)
    note = "; ".join(filter(None, notes))
    return kept[0], kept[1][: args.eval_max_prompts], note, sources


# --------------------------------------------------------------------------- models and reference
def find_model(flag: str, spec: str) -> tuple[str, str | None]:
    """Name and commit of NAME[@REVISION] of the hub, by its smallest file: a missing licence is
    found before gigabytes are fetched. A folder has no commit. Raises InputError."""
    name, _, revision = spec.partition("@")
    if Path(spec).is_dir():
        if flag == "--model-id" and (Path(spec) / "adapter_config.json").is_file():
            remedy = "give its base model as --model-id and this folder as --adapter"
            raise InputError(f"{flag} {spec}: is a LoRA, not a model; {remedy}")
        return spec, None
    try:
        path = hf_hub_download(name, "config.json", revision=revision or None)
    except Exception as error:
        remedy = f"give a folder, or accept the licence at https://huggingface.co/{name} and log in"
        reason = f"no config.json ({type(error).__name__}: {error})"
        raise InputError(f"{flag} {spec}: {reason}; {remedy}") from error
    return name, Path(path).parent.name


def refuse_missing(flag: str, name: str, missing: list[str]) -> None:
    """Raise InputError for weights that are not in a checkpoint: they would be random."""
    if missing:
        lost = f"{len(missing)} weights are not in its files, such as {sorted(missing)[0]}"
        raise InputError(f"{flag} {name}: {lost}")


def load_verified(kind, flag: str, source: tuple[str, str | None], **options) -> nn.Module:
    """kind.from_pretrained with nothing left to chance: weights that the library reports as missing
    are refused, but for a head that a LoRA brings. Raises InputError."""
    name, revision = source
    adapter = (Path(name) / "adapter_config.json").is_file()
    base = PeftConfig.from_pretrained(name).base_model_name_or_path if adapter else name
    options |= {"revision": revision, "output_loading_info": True, "trust_remote_code": False}
    try:
        model, report = kind.from_pretrained(base, **options)
    except Exception as error:
        reason = f"{type(error).__name__}: {error.__cause__ or error}"
        raise InputError(f"{flag} {name}: cannot be loaded ({reason})") from error
    missing = [str(key) for key in (*report["missing_keys"], *report["mismatched_keys"])]
    if adapter:
        model = load_adapter(model, flag, name)
        heads = tuple(model.peft_config["default"].modules_to_save or ())
        missing = [key for key in missing if not key.startswith(heads)]
    refuse_missing(flag, name, missing)
    return model


def load_adapter(model: nn.Module, flag: str, folder: str) -> nn.Module:
    """The model with a trainable LoRA from a folder, all of it applied. Raises InputError."""
    try:
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = False
        model = get_peft_model(model, config)
        report = set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{flag} {folder}: the LoRA cannot be loaded ({reason})") from error
    ours = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    refuse_missing(flag, folder, [key for key in report.missing_keys if key in ours])
    if report.unexpected_keys:
        raise InputError(f"{flag} {folder}: does not fit the model: {report.unexpected_keys[0]}")
    return model


def load_policy(
    args: Args, source: tuple[str, str | None], tokenizer, device, bf16: bool
) -> Policy:
    """Model, sampler and reference on the device. All weights are trained in float32; below a LoRA
    in float32 the frozen ones have the precision of the run. Raises InputError."""
    lora = args.lora_rank or args.adapter
    dtype = torch.bfloat16 if bf16 and lora else torch.float32
    model = load_verified(AutoModelForCausalLM, "--model-id", source, dtype=dtype).to(device)
    config, vocabulary = model.config.get_text_config(), model.get_output_embeddings().weight
    needed = args.max_prompt_length + args.max_completion_length
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and limit < needed:
        what = f"more than the model's context of {limit} tokens; lower one of them"
        raise InputError(f"--max-prompt-length, --max-completion-length: {needed}, {what}")
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or limit
    if rope.get("rope_type") in ("dynamic", "longrope") and original < needed:
        what = f"{rope['rope_type']} rope changes beyond {original} tokens, of which a cache knows"
        raise InputError(f"--max-prompt-length, --max-completion-length: {needed}: {what} nothing")
    stop = stop_tokens(model, tokenizer)
    readable = torch.tensor(sorted(tokenizer.get_vocab().values()))
    unreadable = torch.ones(len(vocabulary), dtype=torch.bool)
    unreadable[readable[readable < len(vocabulary)]] = False
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop[0]
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=pad)  # and no more
    reference = None
    if args.adapter:
        model = load_adapter(model, "--adapter", args.adapter)
    elif args.lora_rank:
        targets = args.lora_targets[0] if len(args.lora_targets) == 1 else list(args.lora_targets)
        targets = targets if targets == "all-linear" else list(args.lora_targets)
        options = {"lora_alpha": args.lora_alpha, "target_modules": targets}
        model = get_peft_model(model, LoraConfig(args.lora_rank, task_type="CAUSAL_LM", **options))
    else:
        reference = copy.deepcopy(model).requires_grad_(False).eval()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()  # else a LoRA behind a frozen embedding gets no gradient
    sampler = model.eval()  # dropout would make rollout, old policy and reference other functions
    if args.fsdp:
        for network in (model, reference):
            shard(network, bf16)
    elif bf16 and not lora:
        sampler = copy.deepcopy(model).to(torch.bfloat16).requires_grad_(False)
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    static = {} if device.type == "cuda" and plain and not args.fsdp else None
    return Policy(
        model, sampler, reference, stop, unreadable.to(device), pad,
        args.temperature, args.top_p, args.top_k, static,
    )  # fmt: skip


def shard(network: nn.Module, bf16: bool) -> None:
    """Split a network over the processes (FSDP2), layer by layer."""
    options = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if bf16 else {}
    policy = MixedPrecisionPolicy(**options)
    for part in network.modules():
        if type(part).__name__ in (network._no_split_modules or ()):
            fully_shard(part, mp_policy=policy)
    fully_shard(network, mp_policy=policy)


def renew_sampler(policy: Policy) -> None:
    """Copy the trained weights into the sampler, where it is a copy."""
    if policy.sampler is not policy.model:
        pairs = zip(policy.sampler.parameters(), policy.model.parameters(), strict=True)
        with torch.no_grad():
            for copied, trained in pairs:
                copied.copy_(trained)


def check_cache(policy: Policy, model_id: str, prompts: list[list[int]], device) -> None:
    """Raise InputError for a model whose cache is not the keys and values of the prompt, one of
    each in every layer: its completions cannot be read on top of a prompt that is read once."""
    config = policy.model.config.get_text_config()
    expected = [type(layer) for layer in DynamicCache(config=config).layers]
    ids, mask = pad_left(prompts, policy.pad, device)
    with torch.no_grad():
        _, cache = read_prompts(policy.sampler, ids, mask)
    lengths = [layer.get_seq_length() for layer in cache.layers]
    other = set(expected) - {DynamicLayer, DynamicSlidingWindowLayer}
    if other or lengths != [ids.shape[1]] * config.num_hidden_layers:
        kinds = ", ".join(sorted(kind.__name__ for kind in other)) or f"lengths {lengths}"
        what = f"its cache is not a prompt's keys and values ({kinds})"
        raise InputError(f"--model-id {model_id}: {what}; give a model of plain attention")


def stop_tokens(model: nn.Module, tokenizer) -> list[int]:
    """Ids that end a completion: those of the generation config, the tokenizer's, and the token
    that ends the assistant's turn in the chat template. Raises InputError where there is none."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = [*ids] if isinstance(ids, list) else [ids]
    ids.append(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a-turn"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("a-turn")[2]
        after = tokenizer(text, add_special_tokens=False).input_ids[:1]
        ids += [token for token in after if token in tokenizer.all_special_ids]
    stop = sorted({token for token in ids if token is not None})
    if not stop:
        raise InputError("--model-id: no end-of-sequence token in tokenizer or generation config")
    return stop


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
    try:
        (folder / "samples").mkdir(parents=True)
        (folder / "final").mkdir()
    except OSError as error:
        raise InputError(f"--output-dir, --run-name: cannot create {folder} ({error})") from error
    (folder / "args.json").write_text(json.dumps(record, indent=2, allow_nan=False))
    return folder


def find_run(args: Args) -> tuple[Args, Path, dict]:
    """The flags, the folder and args.json of the run that --resume names. Raises InputError."""
    folder = Path(args.resume)
    if args.resume == "latest":
        runs = Path(args.output_dir).glob("*/args.json")
        runs = [file for file in runs if f'"script": "{SCRIPT}"' in file.read_text()]
        folder = max(
            runs, key=lambda file: file.stat().st_mtime_ns, default=folder / "args.json"
        ).parent
    if not args.resume or not any(folder.glob("checkpoint*.pt")):
        raise InputError(f"--resume {args.resume}: no checkpoint in {folder}; start a new run")
    record = json.loads((folder / "args.json").read_text())
    kept = {k: tuple(v) if isinstance(v, list) else v for k, v in record["args"].items()}
    stored = Args(**kept)
    words = {word.partition("=")[0].replace("_", "-").replace("--no-", "--") for word in sys.argv}
    for field in dataclasses.fields(Args):
        name, value, kept = field.name, getattr(args, field.name), getattr(stored, field.name)
        given = f"--{name.replace('_', '-')}" in words or value != field.default
        if given and value != kept and name not in ("resume", "output_dir"):
            raise InputError(
                f"--{name.replace('_', '-')}: the resumed run has {kept}; leave it out"
            )
    return dataclasses.replace(stored, **record["sources"]), folder, record


def lock_run(run_dir: Path) -> TextIO | None:
    """A lock that lives as long as the returned file. Raises InputError where another process has
    it: two would write one run."""
    if os.name == "nt":
        return None
    import fcntl  # not on Windows

    file = (run_dir / "args.json").open()
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"--resume: another process is writing {run_dir}") from error
    return file


def log(run_dir: Path, writer: SummaryWriter, step: int, record: dict) -> None:
    """Append one line of strict JSON to metrics.jsonl, and the same figures to TensorBoard."""
    with (run_dir / "metrics.jsonl").open("a") as file:
        print(json.dumps({"step": step, **record}, allow_nan=False), file=file, flush=True)
        os.fsync(file.fileno())  # a checkpoint counts on it
    for tag, value in record.items():
        if value is not None:
            writer.add_scalar(tag, value, step)


def write_safely(path: Path, state: dict) -> None:
    """torch.save under another name, flushed to the disk, then renamed: never half a file."""
    with path.with_suffix(".part").open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        path.replace(path.with_stem(f"{path.stem}-previous"))
    path.with_suffix(".part").replace(path)


def load_checkpoint(run_dir: Path) -> dict:
    """The state in the newest checkpoint. Raises InputError for a damaged file."""
    path = run_dir / "checkpoint.pt"
    path = path if path.exists() else run_dir / "checkpoint-previous.pt"
    try:
        damaged = zipfile.ZipFile(path).testzip()  # the check sums, which torch.load does not ask
        if damaged:
            raise ValueError(f"wrong check sum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        remedy = "delete it to go on from checkpoint-previous.pt"
        raise InputError(f"--resume: {path} cannot be read ({error}); {remedy}") from error


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """The trained weights and the optimiser, whole and on the CPU, split (FSDP) or not. Called by
    every process."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, state = get_state_dict(model, optimizer, options=options)
    trained = {
        name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    weights = {name: tensor for name, tensor in weights.items() if name in trained}
    return {"weights": weights, "optimizer": state}


def restore(run_dir: Path | None, checkpoint: dict, model: nn.Module, optimizer) -> None:
    """Go back to a checkpoint; the main process, which has run_dir, drops what was logged since."""
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
    states = {
        "model_state_dict": checkpoint["weights"],
        "optim_state_dict": checkpoint["optimizer"],
    }
    set_state_dict(model, optimizer, **states, options=options)
    if run_dir is not None:
        path = run_dir / "metrics.jsonl"
        os.truncate(path, min(path.stat().st_size, checkpoint["metrics_bytes"]))


def save_model(folder: Path, policy: Policy, weights: dict[str, Tensor]) -> None:
    """What transformers or PEFT loads; its generation config says how it was sampled."""
    sampling = {"do_sample": True, "temperature": policy.temperature, "top_p": policy.top_p}
    sampling |= {"top_k": policy.top_k, "eos_token_id": policy.stop, "pad_token_id": policy.pad}
    model = policy.model
    neutral, model.generation_config = model.generation_config, GenerationConfig(**sampling)
    model.save_pretrained(folder, state_dict=weights)
    model.generation_config = neutral


def finish(run_dir: Path, summary: dict, source: tuple[str, str | None], lora: bool) -> None:
    """The whole run in one file and as a table, and how to load the result."""
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False))
    for name, value in summary["final"].items():
        print(f"{name:22s}{summary['base'][name] or 0:10.4f} -> {value or 0:.4f}")
    name, revision = source
    print(f"Completions in {run_dir}/samples. To use the result:")
    print("from transformers import AutoModelForCausalLM")
    if lora:
        print("from peft import PeftModel")
        options = f'"{name}", revision={revision!r}'
        print(f"base = AutoModelForCausalLM.from_pretrained({options})")
        print(f'model = PeftModel.from_pretrained(base, "{run_dir / "final"}")')
    else:
        print(f'model = AutoModelForCausalLM.from_pretrained("{run_dir / "final"}")')


# -------------------------------------------------------------------------------------------- main
def check_args(args: Args, processes: int) -> None:
    """Raise InputError for flags that cannot work."""
    may_be_zero = {"seed", "lora_rank", "top_k", "beta0", "weight_decay", "eval_temperature"}
    for name, value in vars(args).items():
        values = value if isinstance(value, tuple) else (value,)
        lowest = 0 if name in may_be_zero else 1e-30
        lowest = -math.inf if name == "reward_weights" else lowest
        numbers = [number for number in values if type(number) in (int, float)]
        if not all(math.isfinite(number) and number >= lowest for number in numbers):
            flag = f"--{name.replace('_', '-')} {' '.join(map(str, values))}"
            raise InputError(f"{flag}: must be {'finite' if lowest < 0 else 'positive'}")
    rewards = len(args.reward_model or ()) + len(args.reward)
    if args.reward_weights is not None and len(args.reward_weights) != rewards:
        raise InputError("--reward-weights: must be as many as --reward-model and --reward name")
    if args.group_size < 2 or args.top_p > 1:
        raise InputError(
            "--group-size, --top-p: at least 2, the others are the baseline; at most 1"
        )
    if args.prompts_per_update % processes:
        raise InputError(f"--prompts-per-update: must be a multiple of {processes} processes")
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
    judges = build_judges(args, reward_models, train, device, dtype)

    seed_everything(args.seed)
    policy = load_policy(args, source, tokenizer, device, dtype == torch.bfloat16)
    check_cache(policy, args.model_id, [train[0].ids, heldout[0].ids], device)
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    options = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(trained, **options)

    if not resumed:
        run_dir = create_run(args, sources, prompts_sha256) if is_main else None
    lock = lock_run(run_dir) if is_main else None  # held until the process ends
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

    # What every evaluation shares, and the base model's own figures.
    rng = seed_everything(args.seed, 0)
    shape = len(heldout), args.eval_samples, args.max_completion_length
    temperature = args.temperature if args.eval_temperature is None else args.eval_temperature
    eval_set = EvalSet(heldout, torch.rand(shape, generator=rng), temperature)
    first = 0
    if resumed:
        checkpoint = load_checkpoint(run_dir)
        first, base, metrics = (checkpoint[name] for name in ("iteration", "base", "metrics"))
        restore(run_dir if is_main else None, checkpoint, policy.model, optimizer)
        renew_sampler(policy)
    else:
        base, records = evaluate(policy, judges, eval_set, tokenizer, accelerator, args)
        metrics = base
    writer = SummaryWriter(run_dir, purge_step=first + 1 if first else 0) if is_main else None
    if is_main and not resumed:
        save_samples(run_dir, writer, 0, records)
        log(run_dir, writer, 0, {f"eval/{name}": value for name, value in metrics.items()})

    without_spread = 0
    longest = args.max_prompt_length if policy.static is not None else 0
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
        rollout = roll_out(policy, prompts, uniforms.to(device), args.rollout_batch, longest)
        tokens, kept, sampled_logp = rollout  # [N,C], N = this process's completions
        completions = [one[mask].tolist() for one, mask in zip(tokens, kept, strict=True)]
        rolled_out = time.perf_counter()
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        values = accelerator.gather(score_all(judges, texts, rows).to(device)).cpu()
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
        batch = make_batch(policy, prompts, tokens, kept, accelerator)
        sampled_logp = F.pad(sampled_logp, (0, batch.tokens.shape[1] - sampled_logp.shape[1]))
        ref_logp = reference_log_probabilities(policy, batch, args.train_tokens)  # [N,C]
        old_logp = torch.zeros_like(ref_logp)
        totals = defaultdict(float)
        for update in range(args.updates_per_rollout):
            optimizer.zero_grad(set_to_none=True)
            gap = torch.zeros(len(tokens), device=device)  # [N], sampler against this pass
            for at, logp, entropy in completion_passes(
                policy, policy.model, batch, args.train_tokens
            ):
                mask = batch.kept[at]
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
            loss = accelerator.reduce(totals["losses/total"], "mean")
            if not (loss + grad_norm).isfinite():
                raise InputError(f"iteration {iteration}: loss {loss:.3g}; {DIVERGED}")
            optimizer.step()
        finite = torch.tensor([float(all(p.isfinite().all() for p in trained))], device=device)
        if accelerator.gather(finite).min() < 1:
            raise InputError(f"iteration {iteration}: weights are no finite numbers; {DIVERGED}")
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
            metrics, records = evaluate(policy, judges, eval_set, tokenizer, accelerator, args)
            record |= {f"eval/{name}": value for name, value in metrics.items()}
        if is_main and evaluated:
            save_samples(run_dir, writer, iteration, records)
            if args.keep_adapters and policy.reference is None:
                policy.model.save_pretrained(run_dir / f"adapters/{iteration:06d}")
        if is_main:
            log(run_dir, writer, iteration, record)
            writer.add_histogram("adrpo/coefficient", coefficient, iteration)
        bar.set_postfix(reward=record["reward/mean"], kl=record["kl"], entropy=record["entropy"])
        without_spread = without_spread + 1 if constant > 0.8 else 0
        if without_spread == 10 and is_main:
            tqdm.write("warning: for ten iterations most groups had one reward for all completions")
        if last or iteration % args.save_every == 0:
            state = training_state(policy.model, optimizer)
            if is_main:
                state |= {"iteration": iteration, "metrics": metrics, "base": base}
                state["metrics_bytes"] = (run_dir / "metrics.jsonl").stat().st_size
                write_safely(run_dir / "checkpoint.pt", state)

    weights = training_state(policy.model, optimizer)["weights"]
    if is_main:
        writer.close()
        save_model(run_dir / "final", policy, weights)
        tokenizer.save_pretrained(run_dir / "final")
        summary = {"base": base, "final": metrics, "iterations": args.iterations}
        lora = policy.reference is None
        finish(run_dir, summary | {"method": args.method}, source, lora)
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
