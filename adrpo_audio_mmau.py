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

A clip is read, resampled and encoded once for its question, and the question with it is read once
for its whole group of completions: in the rollout, the reference and the training pass.

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
from typing import Any, Literal, NamedTuple, TextIO

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
from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoProcessor,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

SCRIPT = "adrpo_audio_mmau"
SAMPLE_RATE = 16000
REWARDS = ("accuracy", "format", "consistency", "keywords", "overthinking")
TASKS = ("sound", "music", "speech")  # of MMAU
TAKEN_TAGS = {"mean", "std", "frac_reward_zero_std", "tokens", "reasoning_tokens", *REWARDS}
TAKEN_TAGS |= {"accuracy_untagged", *[f"accuracy_{task}" for task in TASKS]}
PROJECTIONS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
# Elements of float32 logits alive in the training pass: 268 MB, whatever the vocabulary.
LOGITS_AT_ONCE = 2**26
DIVERGED = "lower --learning-rate, or raise --beta0"
NO_SPREAD = (
    "warning: for ten iterations more than 80 % of the groups had one reward for all their "
    "completions: nothing to learn from; use a finer reward, easier or harder questions, or a "
    "larger --group-size"
)
LETTER = re.compile(r"\(([A-Z])\)\s*(?=\S)|([A-Z])[.)]\s+(?=\S)")  # before a choice: (A) or A.

# CESAR's keyword reward, our lists: a part is the number of different entries found over the number
# that makes it 1.
# fmt: off
PATTERN_WORDS = [
    "first", "second", "third", "then", "next", "finally", "compare", "compared", "unlike",
    "whereas", "rather", "eliminate", "option",
]
LOGIC_WORDS = [
    "because", "therefore", "since", "so", "thus", "hence", "if", "implies", "suggests",
    "indicates", "evidence", "consistent",
]
DOMAIN_WORDS = [
    "frequency", "pitch", "tempo", "rhythm", "beat", "timbre", "harmonic", "harmonics", "melody",
    "chord", "key", "scale", "interval", "bass", "treble", "octave", "loudness", "amplitude",
    "volume", "noise", "echo", "reverberation", "spectrum", "duration", "pause", "silence", "onset",
    "voice", "speaker", "accent", "intonation", "prosody", "stress", "vowel", "consonant",
    "formant", "syllable", "engine", "rain", "wind", "water", "bird", "animal", "machine",
    "footsteps",
]
FULL_MARKS = 3  # different entries of a list that make its part 1
# Words that carry no concept, left out of the consistency reward's sets.
STOP_WORDS = {
    "a", "an", "the", "is", "are", "was", "were", "be", "been", "it", "its", "this", "that",
    "these", "those", "of", "in", "on", "at", "to", "from", "by", "for", "with", "and", "or", "not",
    "no", "as", "i", "you", "he", "she", "they", "we", "my", "your", "his", "her", "their", "our",
    "me", "him", "them", "us", "do", "does", "did", "have", "has", "had", "can", "could", "would",
    "should", "will", "may", "might", "must", "what", "which", "who", "whom", "how", "why", "when",
    "where", "there", "here", "then", "than", "so", "if", "about", "into", "over",
}
# fmt: on


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
    """seed of everything: LoRA, order of the questions, rollouts"""
    cpu: bool = False
    """stay on the CPU; several processes there: torchrun --nproc-per-node N SCRIPT --cpu"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """of the frozen weights and matrix products; trained weights, log-probabilities and losses are
    float32; auto: bf16 on a GPU that has it"""
    resume: str | None = None
    """run folder to continue exactly from its last checkpoint, or `latest`, with its own flags"""
    eval_only: bool = False
    """no training: answer --eval-data and write predictions and scores"""

    # ------------------------------------------------------------------------------------ model
    model_id: str = "Qwen/Qwen2.5-Omni-7B"
    """Qwen2.5-Omni (its thinker) or Qwen2-Audio: a folder, or NAME[@REVISION] of the hub; also the
    reference"""
    adapter: str | None = None
    """--eval-only: folder of a LoRA (a run's final/) on top of the model"""
    lora_rank: int = 8
    """rank of the LoRA on the language model (the published one-GPU preset: 8). 0 trains all of the
    language model's layers and head beside a frozen copy; audio tower and embeddings stay frozen"""
    lora_alpha: int = 32
    """its update is scaled by alpha / rank (the same preset: 32)"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""

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
    rollout_batch: int = 64
    """completions sampled at once, per process; changes memory and speed, not the result"""

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
    """divide A by the group's std (GRPO: nearly every A is beyond the clip then), or not"""
    clip_eps: float = 0.2
    """clip the ratio to 1 +- this"""
    learning_rate: float = 5e-6
    """AdamW (the published one-GPU preset for a LoRA); about 1e-6 for all weights"""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """after five iterations of warm-up: constant, or a cosine to zero"""
    weight_decay: float = 0.0
    """AdamW"""
    max_grad_norm: float = 1.0
    """gradient norm clip"""
    train_tokens: int = 4096
    """tokens per pass, padding included, per process; changes memory and speed, not the result"""

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
def group_advantage(rewards: Tensor, scale: str = "group", eps: float = 1e-4) -> Tensor:
    """A = (R - mean) / (std + eps) over the group of a prompt (GRPO); scale "none" does not divide
    (Dr. GRPO). rewards [P,G] -> [P,G], detached."""
    # Relative to the first reward, so that a group of equal rewards gives exactly 0.
    relative = rewards - rewards[:, :1]
    spread = relative.std(dim=1, keepdim=True) + eps if scale == "group" else 1.0
    return ((relative - relative.mean(dim=1, keepdim=True)) / spread).detach()


def adaptive_beta(advantage: Tensor, beta0: float, clip_k: float | None = 1.0) -> Tensor:
    """ADRPO's KL coefficient beta0 - clip(A, +-k beta0) (eq. 7): advantage [B] -> [B], detached;
    clip_k None: no clip. With k <= 1 it is never negative."""
    if clip_k is not None:
        advantage = advantage.clamp(-clip_k * beta0, clip_k * beta0)
    return (beta0 - advantage).detach()


def adrpo_statistics(coefficient: Tensor, advantage: Tensor, limit: float) -> dict[str, float]:
    """The adrpo/* figures of a rollout; saturated: share of completions whose A is cut to
    +-limit."""
    figures = {"coefficient_mean": coefficient.mean(), "coefficient_min": coefficient.min()}
    figures["coefficient_max"] = coefficient.max()
    figures["coefficient_fraction_negative"] = (coefficient < 0).float().mean()
    figures["fraction_saturated"] = (advantage.abs() > limit).float().mean()
    return {f"adrpo/{tag}": value.item() for tag, value in figures.items()}


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(pi || ref) of each token, estimated at the sampled one: exp(d) - d - 1 with
    d = ref_logp - logp (k3 of Schulman 2020), never negative. [B,T], [B,T] -> [B,T]. d is limited
    to 20 in the exponential: it would overflow."""
    difference = ref_logp - logp
    return difference.clamp(max=20).exp() - difference - 1


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


def clipped_tokens(logp: Tensor, old_logp: Tensor, advantage: Tensor, clip_eps: float) -> Tensor:
    """Which tokens have no gradient of the policy term, since their ratio is clipped: [B,T], [B,T],
    advantage [B] -> [B,T]."""
    ratio, better = (logp - old_logp).exp(), advantage[:, None] > 0
    clipped = torch.where(better, ratio > 1 + clip_eps, ratio < 1 - clip_eps)
    return clipped & (advantage[:, None] != 0)


# ----------------------------------------------------------------------------------------- rollout
def seed_everything(*numbers: int) -> torch.Generator:
    """Seed every global random state (plug-ins may use one); return a generator: from `numbers`."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def draw_prompts(prompts: list, per_update: int, iterations: int, seed: int) -> list[list]:
    """The prompts of each iteration: one pass after the other over all, each shuffled anew."""
    drawn = []
    while len(drawn) < per_update * iterations:
        order = np.random.default_rng([seed, len(drawn) // len(prompts)]).permutation(len(prompts))
        drawn += [prompts[row] for row in order]
    return [drawn[i * per_update : (i + 1) * per_update] for i in range(iterations)]


@dataclasses.dataclass
class SharedPrompt:
    """What attention must know of rows [prompt | completion 1 | ... | completion G], each part
    right-padded. transformers hands it through to every layer."""

    prompt_length: int
    """P, tokens of the longest prompt of the batch"""
    group: int
    """G, completions per row"""
    padding: Tensor | None
    """[B,P], True where a prompt is padding; None where there is none"""
    mask: Tensor | None = None
    """training: [B*G or 1, 1, C, P+C], True where a completion's token (C) sees its prompt and
    itself (P+C)"""
    cache: dict[int, list[Tensor]] | None = None
    """rollout: by layer, keys and values of the prompts [B,k,P,d] and of the completions
    [B,k,G,T,d]"""
    room: int = 0
    """rollout: T, most tokens of a completion"""
    steps: int = 0
    """rollout: completion tokens in the cache, with the newest"""

    def select(self, groups: Tensor, slots: Tensor) -> None:
        """Keep only these groups [B'] and of each only these completions [B',G']."""
        self.group, groups_of = slots.shape[1], groups[:, None]
        self.padding = None if self.padding is None else self.padding[groups]
        for layer, (keys, values, own_keys, own_values) in self.cache.items():
            own = [
                t.transpose(1, 2)[groups_of, slots].transpose(1, 2).contiguous()
                for t in (own_keys, own_values)
            ]
            self.cache[layer] = [keys[groups], values[groups], *own]


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Attention of query [B,h,S,d] on key, value [B,k,S',d] (h a multiple of k) -> [B,h,S,d]; no
    mask: causal."""
    # There torch's fast kernels take a mask, or grouped heads, but not both.
    if query.is_cuda and mask is not None:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    options = {"scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, **options
    )


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    shared: SharedPrompt,
    scaling: float | None = None,
    **options,
) -> tuple[Tensor, None]:
    """Attention inside shared-prompt rows, called by transformers: query [B,h,S,d], key, value
    [B,k,S,d] -> [B,S,h,d].

    Equal to attention on G separate sequences prompt + completion, without computing the prompt G
    times (ours). The rows are a rollout's prompts (S = P), a rollout's newest tokens (S = G), or
    all of it, in training (S = P + G C)."""
    length, group = shared.prompt_length, shared.group
    if shared.cache is not None and shared.steps == 0:
        room = (*key.shape[:2], group, shared.room, key.shape[3])
        key, value = key.to(value.dtype).contiguous(), value.contiguous()
        shared.cache[module.layer_idx] = [key, value, value.new_empty(room), value.new_empty(room)]
        return attend(query, key, value, None, scaling).transpose(1, 2), None

    if shared.cache is not None:
        # One new token for each completion. The group's queries read the prompt's keys together,
        # each reads its own.
        prompt_key, prompt_value, own_key, own_value = shared.cache[module.layer_idx]
        steps, (rows, heads, _, size) = shared.steps, query.shape
        own_key[:, :, :, steps - 1], own_value[:, :, :, steps - 1] = key, value
        scaling = size**-0.5 if scaling is None else scaling
        query = query.view(rows, key.shape[1], -1, group, size).transpose(2, 3)  # [B,k,G,h/k,d]
        together = query.flatten(2, 3) @ prompt_key.mT * scaling  # [B,k,G*h/k,P]
        if shared.padding is not None:
            together = together.masked_fill(shared.padding[:, None, None], -math.inf)
        alone = query @ own_key[:, :, :, :steps].mT * scaling  # [B,k,G,h/k,t]
        logits = torch.cat([together.view(*alone.shape[:-1], length), alone], dim=-1)
        weights = logits.softmax(-1, dtype=torch.float32).to(value.dtype)
        out = (weights[..., :length].flatten(2, 3) @ prompt_value).view_as(query)
        out = out + weights[..., length:] @ own_value[:, :, :, :steps]
        return out.permute(0, 2, 1, 3, 4).reshape(rows, group, heads, size), None

    # Two blocks: the prompt on itself, and each completion on the prompt and itself.
    def completions(x: Tensor) -> Tensor:  # [B,h,P+G*C,d] -> [B*G,h,C,d]
        return x[:, :, length:].unflatten(2, (group, -1)).transpose(1, 2).flatten(0, 1)

    def prompt_and_completion(x: Tensor) -> Tensor:  # -> [B*G,h,P+C,d]
        prompt = x[:, None, :, :length].expand(-1, group, -1, -1, -1).flatten(0, 1)
        return torch.cat([prompt, completions(x)], dim=2)

    prompt = attend(query[:, :, :length], key[:, :, :length], value[:, :, :length], None, scaling)
    keys, values = prompt_and_completion(key), prompt_and_completion(value)
    own = attend(completions(query), keys, values, shared.mask, scaling)
    own = own.unflatten(0, (-1, group)).transpose(1, 2).flatten(2, 3)  # [B,h,G*C,d]
    return torch.cat([prompt, own], dim=2).transpose(1, 2), None


AttentionInterface.register("shared_prompt", shared_prompt_attention)


def pad(prompts: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as embeddings [L,D] -> [B,P,D], right-padded, and lengths [B]."""
    embeds = pad_sequence([prompt.to(device) for prompt in prompts], batch_first=True)
    return embeds, torch.tensor([len(prompt) for prompt in prompts], device=device)


def padding_of(lengths: Tensor, longest: int) -> Tensor | None:
    """True where a position [B,longest] is padding; None where none is."""
    padding = torch.arange(longest, device=lengths.device) >= lengths[:, None]
    return padding if padding.any() else None


def pack(prompts: list[Tensor], completions: Tensor) -> tuple[Tensor, Tensor, Tensor, SharedPrompt]:
    """Shared-prompt rows of the training pass: prompts of B rows as embeddings, completions [B,G,C]
    (right-padded) -> prompts [B,P,D], positions [B,P+G*C], the places [B,G*C] whose outputs predict
    the completions' tokens, layout."""
    (rows, group, size), device = completions.shape, completions.device
    embeds, lengths = pad(prompts, device)
    longest = embeds.shape[1]
    token = torch.arange(size, device=device)
    after = (lengths[:, None] + token).repeat(1, group)  # positions of the completions
    positions = torch.cat([torch.arange(longest, device=device).expand(rows, -1), after], dim=1)
    places = (longest + torch.arange(group * size, device=device) - 1).repeat(rows, 1)
    # The first token of each is predicted by the prompt's last.
    places[:, ::size] = lengths[:, None] - 1
    padding = padding_of(lengths, longest)
    own = (token[:, None] >= token).expand(1 if padding is None else rows, size, size)
    seen = torch.ones(1, longest, dtype=torch.bool, device=device) if padding is None else ~padding
    mask = torch.cat([seen[:, None].expand(-1, size, -1), own], dim=2)  # [1 or B,C,P+C]
    if padding is not None:
        mask = mask.repeat_interleave(group, dim=0)
    return embeds, positions, places, SharedPrompt(longest, group, padding, mask[:, None])


def token_log_probabilities(
    head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """log pi(target) and the entropy of pi in nats (without gradient): hidden [N,D], targets [N] ->
    two float32 [N]."""
    logits = head(hidden).float() / temperature
    normaliser = logits.logsumexp(-1)
    with torch.no_grad():
        entropy = normaliser - ((logits - normaliser[:, None]).exp() * logits).sum(-1)
    return logits.gather(-1, targets[:, None]).squeeze(-1) - normaliser, entropy


def base_model(model: nn.Module) -> nn.Module:
    """The model of transformers, without PEFT's wrapping (the LoRA stays in)."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def language_model(model: nn.Module) -> nn.Module:
    """The decoder of Qwen2-Audio or of Qwen2.5-Omni's thinker, without head."""
    return base_model(model).model.language_model


class Policy(nn.Module):
    """The language model reading shared-prompt rows. All its work passes through `forward`, which
    accelerate wraps (autocast, DDP, FSDP). Tokens that stand for audio, images and video are not in
    its distribution: nothing could be put in their places."""

    def __init__(self, model: nn.Module, banned: list[int]):
        super().__init__()
        self.model = model
        self.register_buffer("banned", torch.tensor(banned, dtype=torch.long), persistent=False)

    def forward(
        self,
        prompts: Tensor | None = None,
        ids: Tensor | None = None,
        positions: Tensor | None = None,
        shared: SharedPrompt | None = None,
        places: Tensor | None = None,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        audio_inputs: dict[str, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rows of prompts [B,P,D] (or none) and tokens [B,S-P], positions [B,S], places [B,N] ->
        the logits at these places, float32 [B,N,V]; with targets [B,N] their log-probabilities and
        entropies, two float32 [B,N]. Of the processor's audio_inputs alone: what the language model
        reads, [B,L,D]."""
        if audio_inputs is not None:
            return self.embed(audio_inputs)
        decoder = language_model(self.model)
        embeds = decoder.embed_tokens(ids)
        if prompts is not None:
            embeds = torch.cat([prompts.to(embeds.dtype), embeds], dim=1)
        out = decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False, shared=shared)
        hidden = out.last_hidden_state
        hidden = hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.shape[2]))  # [B,N,D]
        if targets is None:
            return self.head(hidden)
        hidden, flat = hidden.flatten(0, 1), targets.flatten()
        size = max(1, LOGITS_AT_ONCE // self.model.get_output_embeddings().weight.shape[0])
        if len(flat) <= size:
            parts = [token_log_probabilities(self.head, hidden, flat, temperature)]
        else:  # only one piece's logits are alive at a time; the backward pass computes them again
            pieces = zip(hidden.split(size), flat.split(size), strict=True)
            parts = [
                recompute(token_log_probabilities, self.head, *p, temperature, use_reentrant=False)
                for p in pieces
            ]
        return tuple(torch.cat(part).view_as(targets) for part in zip(*parts, strict=True))

    def embed(self, audio_inputs: dict[str, Tensor]) -> Tensor:
        """What stock transformers feeds the language model for the processor's output, [B,L,D]: the
        identity stands in for the language model. (An exception would leave FSDP half-way, with
        weights gathered.)"""
        base = base_model(self.model)
        decoder = language_model(self.model)
        decoder.forward = lambda inputs_embeds, **_: BaseModelOutputWithPast(
            last_hidden_state=inputs_embeds
        )
        try:
            return base.model(**audio_inputs).last_hidden_state
        finally:
            del decoder.forward

    def head(self, hidden: Tensor) -> Tensor:
        """Logits, float32 [...,V], of hidden states [...,D]; banned tokens are out of reach."""
        logits = self.model.get_output_embeddings()(hidden).float()
        return logits.index_fill(-1, self.banned, -1e9)  # finite: the entropy multiplies it by 0


def completion_log_probabilities(
    policy: nn.Module, prompts: list[Tensor], completions: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (nats) of completions [B,G,C], two float32 [B,G,C], one row
    for each prompt."""
    embeds, positions, places, shared = pack(prompts, completions)
    ids = completions.flatten(1)
    logp, entropy = policy(embeds, ids, positions, shared, places, ids, temperature)
    return logp.view(completions.shape), entropy.view(completions.shape)


@torch.no_grad()
def embed_question(
    policy: nn.Module,
    processor: transformers.ProcessorMixin,
    text: str,
    wave: np.ndarray,
    device: torch.device,
) -> Tensor:
    """What stock transformers feeds the language model for a question and its clip: embeddings
    [L,D], the audio tower's output in the places of the audio tokens. Raises InputError where the
    processor makes nothing of the clip."""
    options = {"sampling_rate": SAMPLE_RATE, "return_tensors": "pt"}
    if isinstance(processor, Qwen2_5OmniProcessor):
        # It would compute the spectrogram of 300 s of padding too, for nothing: the model drops it.
        # With some silence behind the clip the rest is the same to the bit.
        extractor = processor.feature_extractor
        room = ((len(wave) + extractor.n_fft) // extractor.hop_length + 1) * extractor.hop_length
        options["audio_kwargs"] = {"max_length": min(room, extractor.n_samples)}
    try:
        # The spectrogram is float32 whatever the model is.
        with torch.autocast("cpu", enabled=False):
            inputs = processor(text=text, audio=[wave], **options).to(device)
    except ValueError as error:
        raise InputError(f"--model-id: its processor gives no audio features ({error})") from error
    token = processor.tokenizer.convert_tokens_to_ids(processor.audio_token)
    if "input_features" not in inputs or not (inputs["input_ids"] == token).any():
        raise InputError("--model-id: its processor gives no audio features: nothing is heard")
    return policy(audio_inputs=dict(inputs))[0]


@contextlib.contextmanager
def reference_policy(policy: Policy, frozen: nn.Module | None) -> Iterator[nn.Module]:
    """The reference: the same network with its LoRA switched off, or the frozen copy when all
    weights are trained."""
    with (
        contextlib.nullcontext() if frozen is not None else policy.model.disable_adapter(),
        torch.no_grad(),
    ):
        yield policy if frozen is None else frozen


def choose_tokens(probabilities: Tensor, uniforms: Tensor, top_p: float, top_k: int) -> Tensor:
    """One token for each distribution, by its inverse cumulative function at a given uniform
    number: probabilities [..., V], uniforms [...] -> [...]. Given numbers, not a generator's state:
    the result does not depend on how the batch is cut, or on the number of processes."""
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


@torch.no_grad()
def rollout(
    policy: nn.Module,
    prompts: list[Tensor],
    uniforms: Tensor,
    stop: list[int],
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    everyone_done: Callable[[bool], bool] = bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """G completions for each of B prompts, from uniforms [B,G,T] (T: most tokens): ids [B,G,C],
    mask [B,G,C] (1 up to and with the stop token) and log-probabilities [B,G,C], at this
    temperature, before top-p and top-k.

    The prompts are read once. Finished completions leave the batch, when there are enough of them
    to pay for moving the others. `everyone_done` makes processes that must stay in step go on until
    the last is done."""
    (rows, group, longest), device, stop = (
        uniforms.shape,
        uniforms.device,
        torch.tensor(stop, device=uniforms.device),
    )
    embeds, lengths = pad(prompts, device)
    shared = SharedPrompt(
        embeds.shape[1], group, padding_of(lengths, embeds.shape[1]), cache={}, room=longest
    )
    positions = torch.arange(embeds.shape[1], device=device).expand(rows, -1)
    nothing = torch.zeros(rows, 0, dtype=torch.long, device=device)
    logits = policy(embeds, nothing, positions, shared, lengths[:, None] - 1).expand(-1, group, -1)
    tokens = torch.zeros(rows, group, longest, dtype=torch.long, device=device)
    logp = torch.zeros(rows, group, longest, device=device)
    length = torch.full((rows, group), longest, device=device)
    done = torch.zeros(rows, group, dtype=torch.bool, device=device)
    # Which rows and completions are in the batch: [B'], [B',G'].
    groups = torch.arange(rows, device=device)
    slots = torch.arange(group, device=device).expand(rows, -1)
    for step in range(longest):
        at = groups[:, None], slots
        probabilities = (logits / (temperature or 1)).softmax(-1)
        if temperature == 0:
            token = probabilities.argmax(-1)
        else:
            token = choose_tokens(probabilities, uniforms[..., step][at], top_p, top_k)
        chosen = probabilities.gather(-1, token[..., None]).squeeze(-1).log()
        tokens[..., step][at] = token.masked_fill(done[at], 0)
        logp[..., step][at] = chosen.masked_fill(done[at], 0)
        ended = torch.isin(token, stop) & ~done[at]
        length[at] = torch.where(ended, step + 1, length[at])
        done[at] = done[at] | ended
        if step + 1 == longest or everyone_done(bool(done.all())):
            break
        left = int((~done).sum(1).max())  # completions still wanted, of the group that wants most
        still = (~done[groups]).any(1)
        if left and int(still.sum()) * left <= 0.75 * slots.numel():
            kept = done[at].long().argsort(dim=1, stable=True)[still, :left]  # unfinished first
            shared.select(still.nonzero().flatten(), kept)
            token, groups, slots = (
                token[still].gather(1, kept),
                groups[still],
                slots[still].gather(1, kept),
            )
        shared.steps = step + 1
        positions = (lengths[groups] + step)[:, None].expand_as(slots)
        logits = policy(
            None,
            token,
            positions,
            shared,
            torch.arange(slots.shape[1], device=device).expand_as(slots),
        )
    size = int(length.max())
    mask = torch.arange(size, device=device) < length[..., None]
    return tokens[..., :size], mask, logp[..., :size]


def micro_batches(
    rows: int, group: int, prompt: int, completion: int, budget: int
) -> list[tuple[slice, slice]]:
    """Cuts of `rows` groups into passes of at most `budget` tokens (at least one completion):
    (rows, completions) of each. prompt, completion: tokens of the longest. Whole groups where they
    fit, else one prompt with some of its completions."""
    together = budget // (prompt + group * completion)
    if together:
        return [(slice(i, i + together), slice(0, group)) for i in range(0, rows, together)]
    part = max(1, (budget - prompt) // completion)
    return [
        (slice(i, i + 1), slice(j, j + part)) for i in range(rows) for j in range(0, group, part)
    ]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; else the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Listener(NamedTuple):
    """The policy, and what it needs to hear a question and to answer it."""

    policy: nn.Module
    processor: transformers.ProcessorMixin
    stop: list[int]  # tokens that end a completion
    seconds: float  # of a clip that it hears
    accelerator: accelerate.Accelerator


def everyone_done(accelerator: accelerate.Accelerator, done: bool) -> bool:
    """Under FSDP every process must take part in every forward pass."""
    if accelerator.distributed_type != accelerate.DistributedType.FSDP:
        return done
    finished = torch.tensor(float(done), device=accelerator.device)
    return bool(accelerator.reduce(finished, "mean") == 1)


def embed(listener: Listener, questions: list["Question"], think_budget: int) -> list[Tensor]:
    """Each question with its clip, once: what the language model reads, [L,D]."""
    policy, processor, accelerator = listener.policy, listener.processor, listener.accelerator
    texts = [build_prompt(processor, question.row, think_budget) for question in questions]
    waves = [load_audio(question.clip, listener.seconds) for question in questions]
    with accelerator.autocast():
        return [
            embed_question(policy, processor, text, wave, accelerator.device)
            for text, wave in zip(texts, waves, strict=True)
        ]


def draw(
    listener: Listener, prompts: list[Tensor], uniforms: Tensor, temperature: float, at_once: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Completions of some prompts, `at_once` prompts at once, from uniforms [B,G,T]: ids, mask and
    log-probabilities [B,G,C]."""
    done = partial(everyone_done, listener.accelerator)
    parts = []
    # Around the whole rollout: weights are converted to bf16 once, not at every token.
    with listener.accelerator.autocast():
        for start in range(0, len(prompts), at_once):
            part = slice(start, start + at_once)
            numbers = uniforms[part].to(listener.accelerator.device)
            options = {"stop": listener.stop, "temperature": temperature, "everyone_done": done}
            parts.append(rollout(listener.policy, prompts[part], numbers, **options))
    longest = max(tokens.shape[2] for tokens, _, _ in parts)
    padded = [[F.pad(one, (0, longest - one.shape[2])) for one in part] for part in parts]
    tokens, mask, logp = (torch.cat(column) for column in zip(*padded, strict=True))
    return tokens, mask, logp


def read_out(
    processor: transformers.ProcessorMixin, tokens: Tensor, mask: Tensor
) -> tuple[list[str], list[int]]:
    """Completions [B,G,C] one after the other: texts, and lengths in tokens, each B*G long."""
    pairs = zip(tokens.flatten(0, 1), mask.flatten(0, 1), strict=True)
    ids = [one[kept].tolist() for one, kept in pairs]
    texts = [processor.tokenizer.decode(one, skip_special_tokens=True) for one in ids]
    return texts, [len(one) for one in ids]


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


def answer(
    listener: Listener, questions: list["Question"], args: Args
) -> tuple[list[str], list[int]]:
    """The policy's answers to some questions, and their lengths in tokens. A question has its own
    random numbers, whatever stands beside it."""
    uniforms = []
    for question in questions:
        number = int(hashlib.sha1(question.row["id"].encode()).hexdigest()[:8], 16)
        generator = seed_everything(args.seed, 0, number)
        uniforms.append(torch.rand(1, args.max_completion_length, generator=generator))
    prompts = embed(listener, questions, args.think_budget)
    drawn = draw(listener, prompts, torch.stack(uniforms), args.eval_temperature, len(prompts))
    return read_out(listener.processor, *drawn[:2])


@torch.no_grad()
def evaluate(
    listener: Listener, data: "Data", plugins: dict[str, Callable], args: Args
) -> tuple[dict[str, float], dict, list[dict]]:
    """Every eval/* figure of the policy; MMAU's scores; all rows that were asked for, those whose
    clips cannot be used too, with the model's words."""
    accelerator, tokenizer = listener.accelerator, listener.processor.tokenizer
    names = (*REWARDS, *plugins)
    mine = my_share(len(data.heldout), accelerator.process_index, accelerator.num_processes)
    records = []
    starts = range(0, len(mine), args.eval_batch)
    for start in tqdm(starts, "evaluate", leave=False, disable=not accelerator.is_main_process):
        questions = [data.heldout[i] for i in mine[start : start + args.eval_batch]]
        texts, counts = answer(listener, questions, args)
        rows = [question.row for question in questions]
        values = score(texts, counts, rows, args.think_budget, args.max_completion_length, plugins)
        for i, row in enumerate(rows):
            thought = tokenizer(block(texts[i], "think"), add_special_tokens=False).input_ids
            record = {"id": row["id"], "completion": texts[i], "tokens": counts[i]}
            record |= dict(zip(names, values[i].tolist(), strict=True))
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
    return set(words(text)) - STOP_WORDS


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
    return sum(min(1.0, len(reasoning & set(entries)) / FULL_MARKS) for entries in lists)


def reward_overthinking(tokens: int, longest: int) -> float:
    """1 - tokens / longest (CESAR): 0 to 1, more for a shorter completion."""
    return 1 - tokens / longest


def score(
    completions: list[str],
    tokens: list[int],
    rows: list[dict],
    think_budget: int,
    longest: int,
    plugins: dict[str, Callable] | None = None,
) -> Tensor:
    """All rewards of B completions of so many tokens, REWARDS and then the plug-ins -> float32
    [B,R] on the CPU. Raises InputError where a plug-in's are not B finite numbers."""
    pairs = list(zip(completions, rows, strict=True))
    columns = [
        [reward_accuracy(text, row) for text, row in pairs],
        [reward_format(text, think_budget > 0) for text in completions],
        [reward_consistency(text, row) for text, row in pairs],
        [reward_keywords(text) for text in completions],
        [reward_overthinking(count, longest) for count in tokens],
    ]
    columns = [torch.tensor(column) for column in columns]
    for name, function in (plugins or {}).items():
        prompts = [question_text(row, think_budget) for row in rows]
        values = function(prompts, list(completions), [dict(row) for row in rows])
        rewards = torch.as_tensor(values, dtype=torch.float32, device="cpu").detach()
        if rewards.shape != (len(completions),) or not rewards.isfinite().all():
            bad = f"shape {list(rewards.shape)}, {(~rewards.isfinite()).sum()} not finite"
            raise InputError(f"--reward {name}: must give {len(rows)} finite floats ({bad})")
        columns.append(rewards)
    return torch.stack(columns, dim=1)


def load_plugins(flag: str, specs: tuple[str, ...], taken: set[str]) -> dict[str, Callable]:
    """The function of each FILE.py:function by its tag. Raises InputError for what is none, and for
    a tag of `taken`, to which the tags are added."""
    functions = {}
    for spec in specs:
        path, _, name = spec.rpartition(":")
        if name in taken:
            raise InputError(f"{flag} {spec}: the tag {name} is taken; rename the function")
        if not (path.endswith(".py") and Path(path).is_file()):
            raise InputError(f"{flag} {spec}: give FILE.py:function")
        taken.add(name)
        module_name = f"reward_plugin_{Path(path).stem}"
        module_spec = importlib.util.spec_from_file_location(module_name, path)
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_name] = module  # where dataclasses and pickle look it up
        module_spec.loader.exec_module(module)
        functions[name] = getattr(module, name)
    return functions


# -------------------------------------------------------------------------------------------- data
@dataclasses.dataclass(frozen=True)
class StoredClip:
    """A clip inside a data set. Its bytes stay in the memory-mapped file until they are wanted."""

    name: str
    cells: Any  # a datasets.Dataset with the columns bytes and path
    number: int

    def __str__(self) -> str:
        return self.name


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
    data, questions, seen = data or Data(), [], set()
    for number, row in enumerate(rows):
        try:
            question = {"id": number} | normalise(row)
            question["id"] = str(question["id"])
            if question["id"] in seen:
                raise ValueError(f"its id {question['id']} is there twice")
        except (ValueError, TypeError, AttributeError, SyntaxError) as error:
            data.skipped.append({"flag": f"--{flag}", "row": number, "reason": str(error)})
            continue
        seen.add(question["id"])
        questions.append(question)
    if not questions:
        reason = f"row 0: {data.skipped[-len(rows)]['reason']}" if rows else "it is empty"
        what = f"none of its {len(rows)} rows can be used ({reason})"
        raise InputError(f"--{flag} {spec}: {what}; a row is audio, question, choices, answer")
    return questions


def read_questions(
    flag: str, spec: str, split: str | None = None, data: Data | None = None
) -> list[dict]:
    """Rows {id, audio, question, choices, answer, ...} of --train-data or --eval-data. Raises
    InputError for what cannot be read, and as check_questions."""
    data = data or Data()
    try:
        rows, data.sources[flag.replace("-", "_")] = read_rows(spec, split, flag == "eval-data")
    except Exception as error:
        reason = f"{type(error).__name__}: {error.__cause__ or error}"
        kinds = "a .json, .jsonl, .csv or .parquet file, a folder, or of the hub "
        kinds += f"NAME[:CONFIGURATION][@REVISION], and --{flag.replace('data', 'split')}"
        raise InputError(f"--{flag} {spec}: cannot be read ({reason}); give {kinds}") from error
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


def load_questions(args: Args, seconds: float) -> Data:
    """Training and evaluation questions, of whose clips the model hears so many seconds. Raises
    InputError, also for training on an evaluation split."""
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
    data.train = find_clips(*place, train, data, seconds) if train else []
    data.heldout = find_clips(*eval_place, data.asked, data, seconds)
    return data


def describe(data: Data, args: Args, seconds: float) -> str:
    """What the questions are, what is not used, and how the clips are heard."""
    note = f"{len(data.train)} training questions, {len(data.heldout)} for evaluation"
    note += "" if args.eval_data else " (every tenth)"
    note += f"; {data.longer} clips are cut to {seconds:g} s"
    if data.cancelling:
        note += f"; channels of {data.cancelling} clips cancel: their loudest one is heard"
    if data.skipped:
        clips = sum("clip" in entry for entry in data.skipped)
        rows = len(data.skipped) - clips
        note += f"; {rows} rows and {clips} clips cannot be used: skipped.json"
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
def find_model(spec: str) -> tuple[str, str | None]:
    """Name and commit of NAME[@REVISION] of the hub, by its smallest file: a missing licence is
    found before gigabytes are fetched. A folder has no commit. Raises InputError."""
    name, _, revision = spec.partition("@")
    if (Path(spec) / "config.json").is_file():
        return spec, None
    try:
        path = hf_hub_download(name, "config.json", revision=revision or None)
    except Exception as error:
        remedy = f"give a folder, or accept the licence at https://huggingface.co/{name} and log in"
        reason = f"no config.json ({type(error).__name__}: {error})"
        raise InputError(f"--model-id {spec}: {reason}; {remedy}") from error
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


def load_model(name: str, revision: str | None, args: Args, dtype: torch.dtype) -> nn.Module:
    """Qwen2-Audio or Qwen2.5-Omni's thinker, its language model reading shared-prompt rows; trained
    weights in float32, the others in `dtype`. Raises InputError where a loader reports weights that
    its files do not have."""
    options = {"revision": revision, "dtype": dtype, "output_loading_info": True}
    try:
        model, report = model_class(name, revision).from_pretrained(name, **options)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(f"--model-id {name}: cannot be loaded ({error})") from error
    missing = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if missing:
        lost = f"{len(missing)} weights are not in its files, such as {missing[0]}"
        raise InputError(f"--model-id {name}: {lost}")
    if args.adapter:
        model = load_adapter(model, args.adapter)
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # rollout, old policy and reference must be the same function
    if not args.eval_only and args.lora_rank:
        targets = rf".*language_model\.layers\.\d+\..*\.({PROJECTIONS})"
        size = {"r": args.lora_rank, "lora_alpha": args.lora_alpha}
        model = get_peft_model(model, LoraConfig(**size, target_modules=targets))
    elif not args.eval_only:
        parts = [language_model(model).layers, language_model(model).norm]
        if model.get_output_embeddings().weight is not language_model(model).embed_tokens.weight:
            parts.append(model.get_output_embeddings())
        for part in parts:
            part.float().requires_grad_(True)
    if args.gradient_checkpointing:
        options = {"use_reentrant": False}
        language_model(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()  # else a LoRA behind frozen embeddings gets no gradient
    language_model(model).set_attn_implementation("shared_prompt")
    model.train()  # checkpointing works in training mode only; there is no dropout left
    base_model(model).model.audio_tower.eval()
    return model


def load_adapter(model: nn.Module, folder: str) -> nn.Module:
    """The model with the LoRA of a folder. Raises InputError where the two do not fit."""
    try:
        stored = load_peft_weights(folder, device="cpu")
        model = PeftModel.from_pretrained(model, folder)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"--adapter {folder}: cannot be loaded ({reason})") from error
    different = stored.keys() ^ get_peft_model_state_dict(model).keys()
    if different:
        what = f"{len(different)} weights are not the model's or not its own"
        raise InputError(f"--adapter {folder}: {what}, such as {sorted(different)[0]}")
    return model


def special_tokens(
    model: nn.Module, processor: transformers.ProcessorMixin
) -> tuple[list[int], list[int]]:
    """Ids that end a completion (generation config's and tokenizer's), and ids that stand for
    audio, images, video."""
    tokenizer, ends = processor.tokenizer, getattr(model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    stop = sorted({i for i in (*ends, tokenizer.eos_token_id) if i is not None})
    names = ("audio", "image", "video", "audio_bos", "audio_eos", "vision_bos", "vision_eos")
    tokens = [getattr(processor, f"{name}_token", None) for name in names]
    ids = {
        tokenizer.convert_tokens_to_ids(token) for token in tokens if token in tokenizer.get_vocab()
    }
    return stop, sorted(ids - set(stop))


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
    try:
        damaged = zipfile.ZipFile(path).testzip()  # the check sums, which torch.load does not ask
        if damaged:
            raise ValueError(f"wrong check sum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        remedy = "delete it to go on from checkpoint-previous.pt"
        raise InputError(f"--resume: {path} cannot be read ({error}); {remedy}") from error


def save_checkpoint(run_dir: Path, progress: dict, state: dict) -> None:
    """The trained weights, the optimiser and the position, with the length of metrics.jsonl."""
    state = progress | state | {"metrics_bytes": (run_dir / "metrics.jsonl").stat().st_size}
    write_safely(run_dir / "checkpoint.pt", state)


def training_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """What a checkpoint needs of the training, complete on the CPU, whether the weights are whole
    (one process, DDP) or sharded (FSDP). Called by every process."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    model, optimizer_state = get_state_dict(network, optimizer, options=options)
    # torch leaves frozen weights out under one name only; a tied output head has two.
    frozen = {
        name for name, p in network.named_parameters(remove_duplicate=False) if not p.requires_grad
    }
    model = {
        name: tensor for name, tensor in model.items() if not {name, f"module.{name}"} & frozen
    }
    return {"model": model, "optimizer": optimizer_state}


def restore(
    run_dir: Path | None, checkpoint: dict, network: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Go back to a checkpoint; the main process, which has run_dir, drops what was logged since."""
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
    states = {"model_state_dict": checkpoint["model"], "optim_state_dict": checkpoint["optimizer"]}
    set_state_dict(network, optimizer, **states, options=options)
    if run_dir is not None:
        path = run_dir / "metrics.jsonl"
        os.truncate(path, min(path.stat().st_size, checkpoint["metrics_bytes"]))


def save_weights(folder: Path, model: nn.Module, weights: dict[str, Tensor]) -> None:
    """What PEFT or transformers loads, of the trained weights of Policy(model), whole."""
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    if not isinstance(model, PeftModel):
        weights = dict(model.state_dict()) | weights
    model.save_pretrained(folder, state_dict=weights)


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


def finish(run_dir: Path, summary: dict) -> None:
    """The whole run in one file and as tables."""
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False))
    (run_dir / "mmau.md").write_text(score_table(summary["scores"]))
    for name, value in summary["final"].items():
        before = f"{summary['base'][name]:10.4f} ->" if "base" in summary else ""
        print(f"{name:22s}{before}{value:10.4f}")
    print(score_table({key: summary["scores"][key] for key in ("total", "task")}))
    print(f"Completions in {run_dir}/samples, scores in {run_dir}/mmau.md.")


def print_loading_lines(
    folder: Path, model: nn.Module, name: str, revision: str | None, dtype: torch.dtype
) -> None:
    """How to load the result."""
    kind = type(base_model(model)).__name__
    print(f"To use the result:\nimport torch\nfrom transformers import {kind}")
    if isinstance(model, PeftModel):
        print("from peft import PeftModel")
        print(f'model = {kind}.from_pretrained("{name}", revision={revision!r}, dtype={dtype})')
        print(f'model = PeftModel.from_pretrained(model, "{folder}")')
    else:
        print(f'model = {kind}.from_pretrained("{folder}", dtype={dtype})')


# -------------------------------------------------------------------------------------------- main
def check_args(args: Args, processes: int) -> None:
    """Raise InputError for flags that cannot work."""
    for name, value in vars(args).items():
        values = value if isinstance(value, tuple) else (value,)
        zero = ("seed", "lora_rank", "beta0", "weight_decay", "eval_temperature", "think_budget")
        lowest = 0 if name in zero else 1e-30
        lowest = -math.inf if name == "reward_weights" else lowest
        numbers = [number for number in values if type(number) in (int, float)]
        if not all(math.isfinite(number) and number >= lowest for number in numbers):
            flag = f"--{name.replace('_', '-')} {' '.join(map(str, values))}"
            raise InputError(f"{flag}: must be {'finite' if lowest < 0 else 'positive'}")
    if args.group_size < 2:
        raise InputError("--group-size: at least 2, the others are the baseline")
    if args.max_audio_seconds < 0.1:
        raise InputError("--max-audio-seconds: at least 0.1")
    if args.prompts_per_update % processes:
        raise InputError(f"--prompts-per-update: must be a multiple of {processes} processes")
    if len(args.reward_weights) not in (len(REWARDS), len(REWARDS) + len(args.reward)):
        raise InputError(f"--reward-weights: of {', '.join(REWARDS)}, and of each --reward or none")
    if (args.eval_data if args.eval_only else args.train_data) is None:
        raise InputError("--train-data must be given; or --eval-only and --eval-data")
    if args.adapter and not args.eval_only:
        raise InputError("--adapter: goes with --eval-only; training starts at the model")
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
    on_gpu = torch.cuda.is_available() and not args.cpu
    dtype = choose_dtype(args.precision, torch.device("cuda" if on_gpu else "cpu"))
    mixed_precision = "bf16" if dtype == torch.bfloat16 else "no"
    accelerator = accelerate.Accelerator(cpu=args.cpu, mixed_precision=mixed_precision)
    device, is_main = accelerator.device, accelerator.is_main_process
    processes, rank = accelerator.num_processes, accelerator.process_index
    check_args(args, processes)
    if resumed and (run_dir / "summary.json").exists():
        accelerator.print(f"{run_dir} is finished: nothing is left to do")
        return

    # What is small and may be refused comes before what is large.
    model_name, commit = find_model(args.model_id)
    model_class(model_name, commit)
    options = {"revision": commit, "trust_remote_code": False}
    processor = AutoProcessor.from_pretrained(model_name, **options)
    window = getattr(processor.feature_extractor, "chunk_length", math.inf)  # of the model, seconds
    seconds = min(args.max_audio_seconds, window)
    data = load_questions(args, seconds)
    sources = {"model_id": model_name if commit is None else f"{model_name}@{commit}"}
    sources |= data.sources
    rows = [[question.row for question in part] for part in (data.train, data.heldout)]
    prompts_sha256 = hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()
    if resumed and prompts_sha256 != stored["prompts_sha256"]:
        raise InputError("--train-data, --eval-data: other questions than when the run began")
    plugins = load_plugins("--reward", args.reward, set(TAKEN_TAGS))
    names = (*REWARDS, *plugins)
    unweighted = len(names) - len(args.reward_weights)
    reward_weights = torch.tensor([*args.reward_weights, *[1.0] * unweighted])  # [R]
    example = [data.heldout[0].row] * 2
    score(["a", "b"], [1, 1], example, args.think_budget, args.max_completion_length, plugins)

    # Policy and reference.
    seed_everything(args.seed)
    model = load_model(model_name, commit, args, dtype)
    stop, banned = special_tokens(model, processor)
    if not stop:
        raise InputError("--model-id: no end-of-sequence token in tokenizer or generation config")
    policy, frozen, trainable = Policy(model, banned), None, []
    if args.eval_only:
        policy = accelerator.prepare_model(policy, evaluation_mode=True)
    else:
        if not args.lora_rank:  # one audio tower is enough
            shared = {id(p): p for p in policy.parameters() if not p.requires_grad}
            frozen = copy.deepcopy(policy, shared).requires_grad_(False)
            frozen = accelerator.prepare_model(frozen, evaluation_mode=True)
        trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        options = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "fused": True}
        optimizer = torch.optim.AdamW(trainable, **options)
        network, optimizer = accelerator.prepare(policy, optimizer)
        # Without gradients no DDP is needed. accelerate has put autocast into both forwards.
        policy = accelerator.unwrap_model(network)
        trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    listener = Listener(policy, processor, stop, seconds, accelerator)

    if not resumed:
        run_dir = create_run(args, sources, prompts_sha256) if is_main else None
    lock = lock_run(run_dir) if is_main else None  # held until the process ends
    if is_main and data.skipped:
        text = json.dumps(data.skipped, indent=1, allow_nan=False)
        (run_dir / "skipped.json").write_text(text)
    groups, group = args.prompts_per_update, args.group_size
    accelerator.print(
        f"{run_dir}: {args.method}, {processes} x {device.type}, {dtype}, "
        f"{sum(parameter.numel() for parameter in trainable):,} trained parameters\n"
        f"{describe(data, args, seconds)}\n"
        f"a completion ends with {processor.tokenizer.convert_ids_to_tokens(stop)}; "
        f"each iteration {groups} questions x {group} completions of at most "
        f"{args.max_completion_length} tokens, {args.updates_per_rollout} updates"
        + "\nwarning: --group-size: the mean of so few completions is a noisy baseline"
        * (group < 4)
    )
    about = {"sources": sources, "adapter": args.adapter, "think_budget": args.think_budget}
    about |= {"questions": len(data.asked), "skipped": len(data.skipped)}
    if args.eval_data and Path(args.eval_data).is_file():  # MMAU has several versions
        about["eval_data_sha256"] = hashlib.sha256(Path(args.eval_data).read_bytes()).hexdigest()
    if args.eval_only:
        metrics, scores, said = evaluate(listener, data, plugins, args)
        if is_main:
            save_completions(run_dir / "samples/predictions.json", None, 0, said)
            finish(run_dir, {"final": metrics} | about | {"scores": scores})
        return

    # The base model's own figures, or where the run was.
    if resumed:
        checkpoint = load_checkpoint(run_dir)
        restore(run_dir if is_main else None, checkpoint, network, optimizer.optimizer)
        first, base, metrics = (checkpoint[key] for key in ("iteration", "base", "metrics"))
        scores = checkpoint["scores"]
    else:
        first, (metrics, scores, said) = 0, evaluate(listener, data, plugins, args)
        base = metrics
    writer = SummaryWriter(run_dir, purge_step=first + 1 if first else 0) if is_main else None
    if is_main and not resumed:
        save_completions(run_dir / "samples/000000.json", writer, 0, said)
        log(run_dir, writer, 0, {f"eval/{name}": value for name, value in metrics.items()})

    # Whole groups stay in one process.
    mine = slice(rank * groups // processes, (rank + 1) * groups // processes)
    local_groups = groups // processes
    schedule = draw_prompts(data.train, groups, args.iterations, args.seed)
    without_spread = 0
    bar = tqdm(range(first + 1, args.iterations + 1), args.method, disable=not is_main)
    for iteration in bar:
        # ---- 1. rollout: the policy's completions, and their rewards. Every process draws all
        # random numbers and takes its own groups' of them: the result does not depend on their
        # number.
        started = time.perf_counter()
        rng = seed_everything(args.seed, iteration)
        asked = schedule[iteration - 1][mine]
        prompts = embed(listener, asked, args.think_budget)
        encoded = time.perf_counter()
        uniforms = torch.rand(groups, group, args.max_completion_length, generator=rng)[mine]
        at_once = max(1, args.rollout_batch // group)
        tokens, mask, sampled_logp = draw(listener, prompts, uniforms, args.temperature, at_once)
        texts, counts = read_out(processor, tokens, mask)  # of [P/processes,G,C]
        rolled_out = time.perf_counter()
        rows = [question.row for question in asked for _ in range(group)]
        limits = args.think_budget, args.max_completion_length
        values = score(texts, counts, rows, *limits, plugins).to(device)
        values = accelerator.gather(values).view(groups, group, -1).cpu()  # [P,G,R], of all
        reward = values @ reward_weights  # [P,G]
        record = {"reward/mean": reward.mean().item(), "reward/std": reward.std(1).mean().item()}
        constant = (reward == reward[:, :1]).all(dim=1).float().mean().item()
        record["reward/frac_reward_zero_std"] = constant
        for i, name in enumerate(names):
            record[f"reward/{name}"] = values[..., i].mean().item()
        lengths = accelerator.gather(mask.sum(2).flatten()).float()  # [P*G]
        ended = (torch.isin(tokens, torch.tensor(stop, device=device)) & mask).any(dim=2)
        record["completions/mean_length"] = lengths.mean().item()
        record["completions/clipped_ratio"] = 1 - accelerator.gather(ended.float()).mean().item()
        rewarded = time.perf_counter()

        # ---- 2. advantage, and each completion's KL coefficient (eq. 7)
        advantage = group_advantage(reward, args.scale_rewards)  # [P,G]
        coefficient = torch.full_like(advantage, args.beta0)
        if args.method == "adrpo":
            coefficient = adaptive_beta(advantage, args.beta0, args.adv_clip_k)
        limit = math.inf if args.adv_clip_k is None else args.adv_clip_k * args.beta0
        record |= adrpo_statistics(coefficient, advantage, limit)
        my_advantage, my_coefficient = advantage[mine].to(device), coefficient[mine].to(device)

        # ---- 3. updates on this rollout, in passes whose gradients add up to that of the mean over
        # all completions
        decay = (1 + math.cos(math.pi * (iteration - 1) / args.iterations)) / 2
        decay = decay if args.lr_schedule == "cosine" else 1.0
        for settings in optimizer.param_groups:
            settings["lr"] = args.learning_rate * min(1.0, iteration / 5) * decay
        sizes = torch.tensor([max(map(len, prompts)), tokens.shape[2]], device=device)
        # As many passes in every process.
        sizes = accelerator.gather(sizes).view(-1, 2).amax(0).tolist()
        passes = micro_batches(local_groups, group, *sizes, args.train_tokens)
        old_logps, ref_logps = {}, {}
        losses, token_sums = defaultdict(float), defaultdict(float)
        for _ in range(args.updates_per_rollout):
            optimizer.zero_grad(set_to_none=True)
            for number, (part, columns) in enumerate(passes):
                kept = mask[part, columns]
                kept = kept[..., : int(kept.sum(2).max())]
                size = kept.shape[2]
                completions = tokens[part, columns, :size]
                question = (prompts[part], completions, args.temperature)
                if number not in ref_logps:
                    with reference_policy(policy, frozen) as reference:
                        ref_logps[number] = completion_log_probabilities(reference, *question)[0]
                last_pass = number + 1 == len(passes)
                with contextlib.nullcontext() if last_pass else accelerator.no_sync(network):
                    logp, entropy = completion_log_probabilities(network, *question)
                    old_logp = old_logps.setdefault(number, logp.detach())
                    ref_logp, sampled = ref_logps[number], sampled_logp[part, columns, :size]
                    logp, old_logp, ref_logp, sampled, entropy, kept = (
                        tensor.flatten(0, 1)
                        for tensor in (logp, old_logp, ref_logp, sampled, entropy, kept)
                    )  # [b,C]
                    a = my_advantage[part, columns].flatten()  # [b]
                    c = my_coefficient[part, columns].flatten()
                    share = len(a) / (local_groups * group)
                    loss = share * grpo_loss(logp, old_logp, ref_logp, a, c, kept, args.clip_eps)
                    accelerator.backward(loss)
                with torch.no_grad():
                    none = torch.zeros_like(c)
                    policy_loss = grpo_loss(logp, old_logp, ref_logp, a, none, kept, args.clip_eps)
                    losses["losses/total"] += loss.detach()
                    losses["losses/policy"] += share * policy_loss
                    clipped = clipped_tokens(logp, old_logp, a, args.clip_eps)
                    token_sums["kl"] += (kl_k3(logp, ref_logp) * kept).sum()
                    token_sums["entropy"] += (entropy * kept).sum()
                    token_sums["clip_ratio/region_mean"] += (clipped * kept).sum()
                    difference = (old_logp - sampled).abs() * kept
                    token_sums["sampling/sampling_logp_difference/mean"] += difference.sum()
                    token_sums["tokens"] += kept.sum()
            grad_norm = accelerator.clip_grad_norm_(trainable, args.max_grad_norm)
            if hasattr(grad_norm, "full_tensor"):  # FSDP
                grad_norm = grad_norm.full_tensor()
            losses["losses/grad_norm"] += grad_norm.to(device)
            loss = accelerator.reduce(losses["losses/total"], "mean")
            if not (loss + grad_norm.to(device)).isfinite():  # before the step
                raise InputError(f"iteration {iteration}: loss {loss:.3g}; {DIVERGED}")
            optimizer.step()
        if not all(local(parameter).isfinite().all() for parameter in trainable):
            raise InputError(f"iteration {iteration}: weights are no finite numbers; {DIVERGED}")
        token_sums = {tag: accelerator.reduce(s, "mean") for tag, s in token_sums.items()}
        count = token_sums.pop("tokens")
        for tag, total in losses.items():
            record[tag] = accelerator.reduce(total, "mean").item() / args.updates_per_rollout
        record["losses/divergence"] = record["losses/total"] - record["losses/policy"]
        record |= {tag: (total / count).item() for tag, total in token_sums.items()}
        updated = time.perf_counter()

        # ---- 4. log, evaluate, save
        record["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        record["charts/seconds_audio"] = encoded - started
        record["charts/seconds_rollout"] = rolled_out - encoded
        record["charts/seconds_reward"] = rewarded - rolled_out
        record["charts/seconds_update"] = updated - rewarded
        record["charts/tokens_per_second"] = lengths.sum().item() / (updated - started)
        if device.type == "cuda":
            record["charts/peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        last = iteration == args.iterations
        evaluates = last or iteration % args.eval_every == 0
        saves = last or iteration % args.save_every == 0
        if evaluates:
            metrics, scores, said = evaluate(listener, data, plugins, args)
            record |= {f"eval/{name}": value for name, value in metrics.items()}
        if evaluates or saves:  # every process takes part
            state = training_state(network, optimizer.optimizer)
        if is_main:
            log(run_dir, writer, iteration, record)
            writer.add_histogram("adrpo/coefficient", coefficient, iteration)
        if is_main and evaluates:
            save_completions(run_dir / f"samples/{iteration:06d}.json", writer, iteration, said)
            if args.keep_adapters and args.lora_rank:
                folder = run_dir / f"adapters/{iteration:06d}"
                save_weights(folder, policy.model, state["model"])
        if is_main and saves:
            progress = {"iteration": iteration, "base": base, "metrics": metrics, "scores": scores}
            save_checkpoint(run_dir, progress, state)
        bar.set_postfix(accuracy=record["reward/accuracy"], kl=record["kl"])
        without_spread = without_spread + 1 if constant > 0.8 else 0
        if without_spread == 10 and is_main:
            tqdm.write(NO_SPREAD)

    weights = training_state(network, optimizer.optimizer)["model"]
    if is_main:
        writer.close()
        processor.save_pretrained(run_dir / "final")
        save_weights(run_dir / "final", policy.model, weights)
        summary = {"base": base, "final": metrics, "iterations": args.iterations}
        finish(run_dir, summary | {"method": args.method} | about | {"scores": scores})
        print_loading_lines(run_dir / "final", policy.model, model_name, commit, dtype)
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
