"""ADRPO for language models: GRPO whose KL coefficient adapts to each completion.

Adaptive Divergence Regularized Policy Optimization (NeurIPS 2025, arXiv 2510.18053), eq. 7: a
completion's KL to the reference model has the weight `beta0 - A`, where A is its advantage over the
other completions of its prompt, clipped to +-k beta0. Good completions may leave the reference, bad
ones are held to it. `--method grpo` is the same file with the coefficient held at beta0 (GRPO,
arXiv 2402.03300). For decoders of transformers: Qwen2, Qwen3, Llama, Mistral, ...

    A  = (R - group mean) / (group std + 1e-4)
    L  = mean over completions of the mean over their tokens of
         -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)  +  (beta0 - clip(A, -k beta0, k beta0)) KL
    KL = exp(ref - pol) - (ref - pol) - 1             per token, of the log-probabilities (k3)

One iteration: roll out --group-size completions for each of --prompts-per-update prompts, score
them, one optimiser step on all of them (--updates-per-rollout for more). Everywhere a prompt is
computed once for its whole group: a row is

    [ prompt | completion 1 | completion 2 | ... | completion G ]

with positions that restart after the prompt, and attention lets each completion see the prompt and
itself (`shared_prompt_attention`). The rollout keeps one copy of the prompt's keys and values per
group; the training pass and the reference read each prompt once. This is exact, and makes the file
fast where prompts are long.

Where this departs from the paper, or the paper is silent:
- Group normalisation puts |A| near 1, far above beta0 = 0.04: the coefficient saturates to 0
  (A > 0), 2 beta0 (A < 0) or beta0 (no spread). That is the paper's recommended setting; adrpo/*
  and its histogram show it.
- The raw A weights the policy term, the clipped one the coefficient only.
- The old policy's log-probabilities are those of the first training pass, so the ratio starts at
  exactly 1; the sampler's own are only compared with them (sampling/sampling_logp_difference).
- Data, learning rate, group and lengths are not published: the defaults are TRL's of early 2025,
  whose example names the same model and reward model.

    python adrpo_grpo_llm.py  # Qwen2-0.5B-Instruct, TL;DR, RM-Gemma-2B
    python adrpo_grpo_llm.py --dataset rows.jsonl --reward my_reward.py:function --lora-rank 16 \\
        --learning-rate 1e-5
    torchrun --nproc-per-node 8 adrpo_grpo_llm.py --prompts-per-update 32 --gradient-checkpointing
    python adrpo_grpo_llm.py --resume latest

Without a GPU: benchmark/mini_world_llm.py makes a small trained world on which the same script
learns in a minute. Equations, metrics, results, time and memory: docs/adrpo_grpo_llm.md.
"""

import contextlib
import copy
import dataclasses
import errno
import gc
import html
import importlib.util
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
import traceback
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
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

SCRIPT = "adrpo_grpo_llm"
# Elements of float32 logits alive in the training pass: 268 MB, whatever the vocabulary.
LOGITS_AT_ONCE = 2**26
TEXTS = ("prompt", "completion")  # the columns of an evaluation's records that are not figures
BAR = {
    "reward": "reward/mean",
    "kl": "kl",
    "entropy": "entropy",
    "length": "completions/mean_length",
}
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
    """seed of everything: LoRA, order of the prompts, rollouts, evaluation"""
    cpu: bool = False
    """stay on the CPU; several processes there: torchrun --nproc-per-node N adrpo_grpo_llm.py
    --cpu"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16: matrix products in bfloat16; trained weights, log-probabilities and losses stay
    float32. auto: bf16 on a GPU that has units for it, else fp32"""
    resume: str | None = None
    """run folder to continue exactly from its newest checkpoint, or `latest`; the run's own flags
    are used"""

    # ---------------------------------------------------------------------------------------- model
    model_id: str = "Qwen/Qwen2-0.5B-Instruct"
    """causal language model of transformers, hub id or folder (the paper: Qwen2 0.5B and Qwen3
    0.6B). It is also the reference"""
    lora_rank: int = 0
    """0 trains all weights beside a frozen copy as reference; above 0 a LoRA of this rank, switched
    off for the reference: less memory, and a --learning-rate of about 1e-5 to 1e-4"""
    lora_alpha: int = 32
    """the LoRA's update is scaled by alpha / rank"""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """ends of the names of the layers that get a LoRA; all-linear: all linear layers but the output
    head"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    compile: bool = False
    """torch.compile the layers for the training passes; rollouts stay eager. Minutes of start-up
    first"""

    # ----------------------------------------------------------------------------------------- data
    dataset: str = "trl-lib/tldr"
    """training prompts: .txt (one a line), .jsonl (one object a line, the row goes to the reward),
    or a dataset of the hub, NAME or NAME@REVISION"""
    prompt_column: str | None = None
    """column of the prompt in .jsonl or dataset, text or a list of chat messages; default: the
    first of prompt, question, text, messages"""
    dataset_split: str | None = None
    """split of a hub dataset; default: its first"""
    chat: bool = False
    """wrap plain text prompts in the model's chat template, as one user message; lists of messages
    always are"""
    eval_dataset: str | None = None
    """held-out prompts, given like --dataset; default: every tenth of --dataset, which is then not
    trained on"""
    eval_max_prompts: int = 64
    """the first so many of the held-out prompts are evaluated"""
    max_prompt_length: int = 512
    """tokens; longer prompts are left out, and counted (TRL 0.15: 512)"""

    # -------------------------------------------------------------------------------------- rewards
    reward_model: tuple[str, ...] | None = None
    """sequence classifiers with a single logit, hub ids or folders, each fed with the chat template
    of its own tokenizer; default: weqweasdas/RM-Gemma-2B where no --reward is given (the
    paper's)"""
    reward: tuple[str, ...] = ()
    """path.py:function, function(prompts, completions, rows) -> one float per completion; rows are
    the dataset's"""
    reward_weights: tuple[float, ...] | None = None
    """weight of each, reward models first, in the sum that is maximised; default: 1 each"""
    reward_batch: int = 16
    """completions a reward model reads at once; changes memory and speed, not the result"""

    # -------------------------------------------------------------------------------------- rollout
    prompts_per_update: int = 8
    """prompts per iteration, over all processes; a multiple of their number. Few make the update
    noisy (TRL 0.15: 8)"""
    group_size: int = 8
    """completions per prompt (TRL 0.15: 8). Their mean reward is the baseline: below 4 it is
    noise"""
    max_completion_length: int = 256
    """tokens after which a completion is cut off (TRL 0.15: 256); watch
    completions/clipped_ratio"""
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

    # ---------------------------------------------------------------------------------- fine-tuning
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
    Above 1 the coefficient of the best becomes negative and pushes them away from the reference;
    None = no clip"""
    clip_eps: float = 0.2
    """clip the ratio to 1 +- this"""
    learning_rate: float = 1e-6
    """AdamW (TRL 0.15, for all weights); higher for a LoRA or a small model"""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """after five iterations of warm-up: constant, or a cosine to zero"""
    weight_decay: float = 0.0
    """AdamW"""
    max_grad_norm: float = 1.0
    """gradient norm clip"""
    train_tokens: int = 8192
    """tokens per forward and backward pass, padding included, per process: whole groups, or part of
    one, each with its prompt once; changes memory and speed, not the result"""

    # ---------------------------------------------------------------------- evaluation, checkpoints
    eval_every: int = 20
    """iterations between evaluations, always with the same random numbers"""
    eval_samples: int = 4
    """completions per held-out prompt"""
    eval_temperature: float | None = None
    """default: --temperature; 0 = greedy (then --eval-samples 1 will do)"""
    save_every: int = 20
    """iterations between checkpoints; one holds the trained weights and twice as much for the
    optimiser"""


# ------------------------------------------------------------------------------------------ rewards
# Each reward is a function (prompts, completions, rows) -> B floats, made once; prompts as the
# dataset has them.


def as_messages(prompt: str | list[dict]) -> list[dict]:
    """A prompt as chat messages."""
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def model_reward(model_id: str, batch: int, device: torch.device, dtype: torch.dtype) -> Callable:
    """The single logit of a sequence classifier for prompt and completion, written with its own
    chat template (or one after the other where it has none), as RM-Gemma's card does. Raises
    InputError."""
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    model = (
        AutoModelForSequenceClassification.from_pretrained(model_id, dtype=dtype).to(device).eval()
    )
    if model.config.num_labels != 1:
        raise InputError(
            f"--reward-model {model_id}: has {model.config.num_labels} logits, must have 1; for "
            "another kind of classifier write a --reward path.py:function"
        )
    if tokenizer.pad_token is None:
        # Not the token a text may end with: transformers takes the logit of the last token that is
        # not padding.
        tokenizer.pad_token = tokenizer.bos_token or tokenizer.unk_token or tokenizer.eos_token
    config = model.config.get_text_config()
    # By which transformers finds the last token, whose logit counts.
    config.pad_token_id = tokenizer.pad_token_id
    limit = getattr(config, "max_position_embeddings", None) or 2048
    tokenizer.truncation_side = "left"  # of a text that is too long the completion stays

    def text(prompt: str | list[dict], completion: str) -> str:
        messages = [*as_messages(prompt), {"role": "assistant", "content": completion}]
        if not tokenizer.chat_template:
            return "\n".join(message["content"] for message in messages)
        return tokenizer.apply_chat_template(messages, tokenize=False)

    @torch.no_grad()
    def reward(prompts: list, completions: list[str], rows: list[dict]) -> Tensor:
        texts, logits = list(map(text, prompts, completions)), []
        # Else a batch's rounding makes advantages out of equal completions.
        unique = list(dict.fromkeys(texts))
        options = {
            "padding": True,
            "padding_side": "right",
            "truncation": True,
            "max_length": limit,
        }
        options["add_special_tokens"] = not tokenizer.chat_template  # a template writes them itself
        for start in range(0, len(unique), batch):
            inputs = tokenizer(unique[start : start + batch], return_tensors="pt", **options).to(
                device
            )
            logits += model(**inputs).logits[:, 0].tolist()
        values = dict(zip(unique, logits, strict=True))
        return torch.tensor([values[one] for one in texts])

    return reward


def plugin_reward(spec: str) -> Callable:
    """The function of path.py:function."""
    path, _, name = spec.rpartition(":")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return getattr(module, name)


def build_rewards(args: Args, device: torch.device, dtype: torch.dtype) -> dict[str, Callable]:
    """One function per reward, by its tag. Raises InputError, naming the flag, for one that cannot
    be had."""
    models = args.reward_model
    if models is None:
        models = () if args.reward else ("weqweasdas/RM-Gemma-2B",)
    specs = [("--reward-model", spec) for spec in models] + [
        ("--reward", spec) for spec in args.reward
    ]
    rewards = {}
    for flag, spec in specs:
        path = Path(spec.rpartition(":")[0])
        if flag == "--reward" and not (path.suffix == ".py" and path.is_file()):
            raise InputError(f"--reward {spec}: must be path.py:function of an existing file")
        try:
            made = (
                plugin_reward(spec)
                if flag == "--reward"
                else model_reward(spec, args.reward_batch, device, dtype)
            )
        except InputError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            remedy = (
                "check the file"
                if flag == "--reward"
                else "give a folder, or log in with `hf auth login`"
            )
            raise InputError(f"{flag} {spec}: cannot be loaded ({reason}); {remedy}") from error
        name = spec.rpartition(":")[2] if flag == "--reward" else Path(spec).name
        if name in rewards:
            raise InputError(
                f"{flag} {spec}: there is another reward of the name {name}; rename one"
            )
        rewards[name] = made
    if not rewards:
        raise InputError(
            "--reward-model: there is no reward; name one, or give --reward path.py:function"
        )
    return rewards


@torch.no_grad()
def score(
    rewards: dict[str, Callable], prompts: list, completions: list[str], rows: list[dict]
) -> Tensor:
    """All rewards of B completions -> float32 [B,R] on the CPU.

    Raises InputError when one fails, or returns another number of values or one that is not
    finite."""
    columns = []
    for name, function in rewards.items():
        try:
            values = (
                torch.as_tensor(function(prompts, completions, rows), dtype=torch.float32)
                .detach()
                .cpu()
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = (
                f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: "
                f"{one_line(error)}"
            )
            raise InputError(f"--reward {name}: raised {where}") from error
        if values.shape != (len(completions),):
            raise InputError(
                f"--reward {name}: returned shape {list(values.shape)} for {len(completions)} "
                "completions"
            )
        bad = (~values.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise InputError(
                f"--reward {name}: returned {values[bad[0]]} for the completion "
                f"{completions[bad[0]]!r}"
            )
        columns.append(values)
    return torch.stack(columns, dim=1)


# --------------------------------------------------------------------------------------------- data


def load_rows(flag: str, spec: str, column: str | None, split: str | None) -> list[dict]:
    """Rows of a .txt, a .jsonl or a hub dataset with different prompts, in their order, the prompt
    (text or chat messages) under "prompt". Raises InputError for a source that cannot be read, has
    no such column or no prompt."""
    path = Path(spec)
    try:
        if path.suffix == ".txt":
            rows, column = (
                [{"prompt": line} for line in path.read_text(encoding="utf-8").splitlines()],
                None,
            )
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
        (c for c in ("prompt", "question", "text", "messages") if c in found), "prompt"
    )
    unique = {}
    for row in rows:
        prompt = row.get(column)
        if isinstance(prompt, list):
            usable = prompt and all(isinstance(m, dict) and {"role"} <= m.keys() for m in prompt)
            usable = usable and all(isinstance(m.get("content"), str) for m in prompt)
        else:
            usable = isinstance(prompt, str) and prompt.strip()
        if usable:
            unique.setdefault(json.dumps(prompt), row | {"prompt": prompt})
    if not unique:
        where = (
            f"no prompt in column {column} (columns: {', '.join(found)}); see --prompt-column"
            if found
            else "empty"
        )
        raise InputError(f"--{flag} {spec}: {where}")
    return list(unique.values())


class Prompt(NamedTuple):
    """A row of the dataset, its prompt under "prompt", and that prompt's token ids."""

    row: dict
    ids: list[int]


def encode_prompts(
    tokenizer: transformers.PreTrainedTokenizerBase, rows: list[dict], chat: bool
) -> list[Prompt]:
    """Tokens of each row's prompt: plain text as it is, messages (and with `chat` everything)
    through the chat template, ready for the assistant's turn. Raises InputError for a tokenizer
    without one, or for a prompt that it refuses."""
    prompts = []
    for row in rows:
        wrap = chat or isinstance(row["prompt"], list)
        if wrap and not tokenizer.chat_template:
            remedy = "give an instruct model, or plain text prompts without --chat"
            raise InputError(
                f"--model-id {tokenizer.name_or_path}: its tokenizer has no chat template; {remedy}"
            )
        text = row["prompt"]
        try:
            if wrap:
                text = tokenizer.apply_chat_template(
                    as_messages(text), add_generation_prompt=True, tokenize=False
                )
            prompts.append(Prompt(row, tokenizer(text, add_special_tokens=not wrap).input_ids))
        except Exception as error:
            # A template that wants other roles, a tokenizer without such characters.
            shown = one_line(ValueError(row["prompt"]))[:80]
            raise InputError(
                f"--dataset: the prompt {shown!r} cannot be tokenised ({one_line(error)})"
            ) from error
    return prompts


def load_prompts(
    args: Args, tokenizer: transformers.PreTrainedTokenizerBase
) -> tuple[list[Prompt], list[Prompt], str]:
    """Training and held-out prompts, and a sentence on how they relate. Prompts of more than
    --max-prompt-length tokens are left out. Raises InputError."""
    train = load_rows("dataset", args.dataset, args.prompt_column, args.dataset_split)
    if args.eval_dataset:
        heldout = load_rows(
            "eval-dataset", args.eval_dataset, args.prompt_column, args.dataset_split
        )
        known = {json.dumps(row["prompt"]) for row in train}
        common = sum(json.dumps(row["prompt"]) in known for row in heldout)
        note = f"{common} of the {len(heldout)} evaluation prompts are training prompts"
    else:
        heldout, train = train[::10], [row for i, row in enumerate(train) if i % 10]
        note = f"every tenth of --dataset ({len(heldout)}) is held out for evaluation"
        if not train:
            raise InputError(
                f"--dataset {args.dataset}: one prompt cannot be split; give --eval-dataset"
            )
    kept, limit = [], args.max_prompt_length
    for rows in (train, heldout):
        prompts = encode_prompts(tokenizer, rows, args.chat)
        kept.append([prompt for prompt in prompts if 0 < len(prompt.ids) <= limit])
        if not kept[-1]:
            shortest = min(len(prompt.ids) for prompt in prompts)
            raise InputError(
                f"--max-prompt-length {limit}: the shortest prompt has {shortest} tokens"
            )
        if len(kept[-1]) < len(rows):
            note += (
                f"; {len(rows) - len(kept[-1])} prompts of more than {limit} tokens are left out"
            )
    return kept[0], kept[1][: args.eval_max_prompts], note


def draw_prompts(count: int, per_update: int, iteration: int, seed: int) -> list[int]:
    """Rows of the `per_update` prompts of an iteration: one pass after the other over all `count`,
    shuffled anew."""
    rows = []
    for position in range(iteration * per_update, (iteration + 1) * per_update):
        shuffled = np.random.default_rng([seed, position // count]).permutation(count)
        rows.append(int(shuffled[position % count]))
    return rows


# ------------------------------------------------------------------------------- shared-prompt rows


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


def pad(sequences: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists -> ids [B,P], right-padded, and lengths [B]."""
    ids = pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True)
    return ids.to(device), torch.tensor([len(sequence) for sequence in sequences], device=device)


def padding_of(lengths: Tensor, longest: int) -> Tensor | None:
    """True where a position [B,longest] is padding; None where none is."""
    padding = torch.arange(longest, device=lengths.device) >= lengths[:, None]
    return padding if padding.any() else None


def pack(
    prompts: list[list[int]], completions: Tensor
) -> tuple[Tensor, Tensor, Tensor, SharedPrompt]:
    """Shared-prompt rows of the training pass: prompts of B rows, completions [B,G,C]
    (right-padded) -> ids [B,P+G*C], positions [B,P+G*C], the places [B,G*C] whose outputs predict
    the completions' tokens, and the layout."""
    (rows, group, size), device = completions.shape, completions.device
    ids, lengths = pad(prompts, device)
    longest = ids.shape[1]
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
    shared = SharedPrompt(longest, group, padding, mask[:, None])
    return torch.cat([ids, completions.flatten(1)], dim=1), positions, places, shared


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


def decoder(model: nn.Module) -> nn.Module:
    """A causal language model without its head, and without PEFT's wrapping (the LoRA stays in)."""
    return (model.get_base_model() if isinstance(model, peft.PeftModel) else model).base_model


class Policy(nn.Module):
    """A causal language model that reads shared-prompt rows. All its work passes through `forward`,
    which accelerate wraps (autocast, DDP, FSDP)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        shared: SharedPrompt,
        places: Tensor,
        targets: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """ids, positions [B,S], places [B,N] -> the logits at these places, float32 [B,N,V]; with
        targets [B,N] their log-probabilities and entropies, two float32 [B,N], without a float32
        [B,N,V] tensor."""
        out = decoder(self.model)(
            input_ids=ids, position_ids=positions, use_cache=False, shared=shared
        )
        hidden, head = out.last_hidden_state, self.model.get_output_embeddings()
        hidden = hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.shape[2]))  # [B,N,D]
        if targets is None:
            return head(hidden).float()
        hidden, flat = hidden.flatten(0, 1), targets.flatten()
        size = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        if len(flat) <= size:
            parts = [token_log_probabilities(head, hidden, flat, temperature)]
        else:  # only one piece's logits are alive at a time; the backward pass computes them again
            pieces = zip(hidden.split(size), flat.split(size), strict=True)
            parts = [
                recompute(token_log_probabilities, head, *p, temperature, use_reentrant=False)
                for p in pieces
            ]
        return tuple(torch.cat(part).view_as(targets) for part in zip(*parts, strict=True))


def completion_log_probabilities(
    policy: nn.Module, prompts: list[list[int]], completions: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (nats) of completions [B,G,C], two float32 [B,G,C], one row
    for each prompt."""
    ids, positions, places, shared = pack(prompts, completions)
    logp, entropy = policy(ids, positions, shared, places, completions.flatten(1), temperature)
    return logp.view(completions.shape), entropy.view(completions.shape)


# ------------------------------------------------------------------------------ model and reference


def load_policy(args: Args, dtype: torch.dtype) -> Policy:
    """The model in float32 (with a LoRA: frozen weights in `dtype`, the LoRA in float32), reading
    shared-prompt rows. Raises InputError for one that cannot be had, or whose attention is
    another."""
    source = args.model_id
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype if args.lora_rank else torch.float32
        )
    except Exception as error:
        remedy = (
            "give a folder with a causal language model, or log in with `hf auth login` if it is "
            "gated"
        )
        raise InputError(
            f"--model-id {source}: cannot be loaded ({one_line(error)}); {remedy}"
        ) from error
    config, needed = (
        model.config.get_text_config(),
        args.max_prompt_length + args.max_completion_length,
    )
    limits = {"context": getattr(config, "max_position_embeddings", None)}
    if "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        limits["sliding window"] = getattr(config, "sliding_window", None)
    for name, size in limits.items():
        if size is not None and size < needed:
            raise InputError(
                f"--max-prompt-length {args.max_prompt_length} + "
                f"--max-completion-length {args.max_completion_length}: more than the model's "
                f"{name} of {size} tokens; lower one of them"
            )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # rollout, old policy and reference must be the same function
        for name, value in vars(module).items():
            # Where dropout is a function, not a module.
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    check_attention(model, source)
    if args.lora_rank:
        targets = (
            args.lora_targets[0]
            if args.lora_targets == ("all-linear",)
            else list(args.lora_targets)
        )
        lora = LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        try:
            model = get_peft_model(model, lora)
        except ValueError as error:
            raise InputError(
                f"--lora-targets {' '.join(args.lora_targets)}: {one_line(error)}"
            ) from error
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()  # else a LoRA behind a frozen embedding gets no gradient
    # Checkpointing works in training mode only; there is no dropout left.
    return Policy(model.train())


@torch.no_grad()
def check_attention(model: nn.Module, source: str) -> None:
    """Raise InputError unless shared-prompt rows give the model's own log-probabilities, on a few
    tokens. Leaves the model reading shared-prompt rows."""
    generator, vocabulary = (
        torch.Generator().manual_seed(0),
        model.config.get_text_config().vocab_size,
    )
    prompts = [torch.randint(vocabulary, (length,), generator=generator) for length in (5, 3)]
    completions = torch.randint(vocabulary, (2, 2, 4), generator=generator)
    expected = torch.zeros(2, 2, 4)
    try:
        for row, group in enumerate(completions):
            for column, completion in enumerate(group):
                logits = model(torch.cat([prompts[row], completion])[None]).logits[
                    0, len(prompts[row]) - 1 : -1
                ]
                expected[row, column] = (
                    logits.float().log_softmax(-1).gather(1, completion[:, None]).squeeze(1)
                )
        model.set_attn_implementation("shared_prompt")
        got, _ = completion_log_probabilities(
            Policy(model), [p.tolist() for p in prompts], completions, 1.0
        )
        error = (got - expected).abs().mean().item()
        # Another attention is off by several nats.
        right = error < (1e-3 if model.dtype == torch.float32 else 0.2)
        reason = "" if right else f"log-probabilities differ by {error:.2g} nats"
    except Exception as failure:
        reason = f"{type(failure).__name__}: {one_line(failure)}"
    if reason:
        remedy = (
            "it works with decoders of plain softmax attention, such as Qwen2, Qwen3, Llama, "
            "Mistral"
        )
        raise InputError(
            f"--model-id {source}: cannot share a prompt among completions ({reason}); {remedy}"
        )


@contextlib.contextmanager
def reference_policy(policy: Policy, frozen: nn.Module | None) -> Iterator[nn.Module]:
    """The reference: the same network with its LoRA switched off, or the frozen copy when all
    weights are trained."""
    with (
        contextlib.nullcontext() if frozen is not None else policy.model.disable_adapter(),
        torch.no_grad(),
    ):
        yield policy if frozen is None else frozen


def stop_tokens(model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a completion: those of the generation config and the tokenizer's."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})


# ------------------------------------------------------------------------------------------ rollout


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
    prompts: list[list[int]],
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
    ids, lengths = pad(prompts, device)
    shared = SharedPrompt(
        ids.shape[1], group, padding_of(lengths, ids.shape[1]), cache={}, room=longest
    )
    positions = torch.arange(ids.shape[1], device=device).expand(rows, -1)
    logits = policy(ids, positions, shared, lengths[:, None] - 1).expand(-1, group, -1)
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
            token, positions, shared, torch.arange(slots.shape[1], device=device).expand_as(slots)
        )
    size = int(length.max())
    mask = torch.arange(size, device=device) < length[..., None]
    return tokens[..., :size], mask, logp[..., :size]


def seed_everything(*numbers: int) -> torch.Generator:
    """Seed every global random state (a plug-in may draw from one) and return a CPU generator, all
    from `numbers`. Each iteration has a stream of its own, the same in every process, so a resumed
    run needs no stored random state."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------------- loss


def group_advantage(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """A = (R - mean) / (std + eps) over the group of a prompt (GRPO): rewards [P,G] -> [P,G],
    detached."""
    mean, std = rewards.mean(dim=1, keepdim=True), rewards.std(dim=1, keepdim=True)
    return ((rewards - mean) / (std + eps)).detach()


def adaptive_beta(advantage: Tensor, beta0: float, clip_k: float | None = 1.0) -> Tensor:
    """ADRPO's KL coefficient beta0 - clip(A, +-k beta0) (eq. 7): advantage [B] -> [B], detached;
    clip_k None: no clip. With k <= 1 it is never negative."""
    if clip_k is not None:
        advantage = advantage.clamp(-clip_k * beta0, clip_k * beta0)
    return (beta0 - advantage).detach()


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


# ----------------------------------------------------------------------------------------- evaluate


def distinct_2(completions: list[list[int]]) -> float:
    """Share of different pairs of neighbouring tokens among all in a group's completions
    (distinct-2, arXiv 1510.03055, over a group); nan where there is none."""
    pairs = [pair for tokens in completions for pair in zip(tokens[:-1], tokens[1:], strict=True)]
    return len(set(pairs)) / len(pairs) if pairs else math.nan


def nanmean(values: list[float]) -> float:
    """Mean of those that are numbers, nan where none is."""
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def my_share(count: int, rank: int, processes: int) -> list[int]:
    """Positions 0..count-1 that this process works on; all processes get equally many, the last
    ones some again, so that the gathered parts, cut to `count`, are in order."""
    size = math.ceil(count / processes)
    return [position % count for position in range(rank * size, (rank + 1) * size)]


def flatten(
    prompts: list[Prompt], tokens: Tensor, mask: Tensor, decode: Callable
) -> tuple[list, list, list, list]:
    """Completions [B,G,C] of B prompts, one after the other: prompts, texts, rows, token ids, each
    B*G long."""
    ids = [
        one[kept].tolist()
        for one, kept in zip(tokens.flatten(0, 1), mask.flatten(0, 1), strict=True)
    ]
    rows = [prompt.row for prompt in prompts for _ in range(tokens.shape[1])]
    return [row["prompt"] for row in rows], [decode(one) for one in ids], rows, ids


@torch.no_grad()
def evaluate(
    draw: Callable[[list[Prompt], Tensor, float], tuple[Tensor, Tensor, Tensor]],
    measure: Callable[[list[Prompt], Tensor], tuple[Tensor, Tensor]],
    rewards: dict[str, Callable],
    decode: Callable[[list[int]], str],
    fixed: dict,
    accelerator: accelerate.Accelerator,
    batch: int,
) -> tuple[dict[str, float], list[dict]]:
    """Every figure of a policy on the held-out prompts, and one record a completion, prompt by
    prompt.

    `draw` is the rollout for some prompts from uniforms [B,G,T]; `measure` gives the KL (k3) and
    the entropy of each token [B,G,C]; `fixed` holds prompts, uniforms [N,G,T], temperature, stop
    tokens and the rewards' weights; `batch` prompts at once."""
    mine = my_share(len(fixed["prompts"]), accelerator.process_index, accelerator.num_processes)
    group, records = fixed["uniforms"].shape[1], []
    for start in tqdm(
        range(0, len(mine), batch), "evaluate", leave=False, disable=not accelerator.is_main_process
    ):
        part = mine[start : start + batch]
        prompts = [fixed["prompts"][i] for i in part]
        tokens, mask, _ = draw(prompts, fixed["uniforms"][part], fixed["temperature"])
        kl, entropy = [
            (value * mask).sum(2).flatten().tolist() for value in measure(prompts, tokens)
        ]
        asked, texts, rows, ids = flatten(prompts, tokens, mask, decode)
        values = score(rewards, asked, texts, rows)
        for i, (total, each) in enumerate(
            zip((values @ fixed["mix"]).tolist(), values.tolist(), strict=True)
        ):
            record = {"prompt": asked[i], "completion": texts[i], "reward": total}
            record |= {f"reward_{name}": value for name, value in zip(rewards, each, strict=True)}
            record |= {"tokens": len(ids[i]), "cut_off": ids[i][-1] not in fixed["stop"]}
            record |= {"kl": kl[i], "entropy": entropy[i]}  # sums over its tokens
            record["distinct_2"] = distinct_2(ids[i - i % group : i - i % group + group])
            records.append(record)
    records = gather_object(records)[: len(fixed["prompts"]) * group]
    columns = {
        name: [float(record[name]) for record in records]
        for name in records[0]
        if name not in TEXTS
    }
    tokens = sum(columns.pop("tokens"))
    figures = {name: sum(columns.pop(name)) / tokens for name in ("kl", "entropy")}
    figures |= {
        "mean_length": tokens / len(records),
        "clipped_ratio": nanmean(columns.pop("cut_off")),
    }
    return {name: nanmean(column) for name, column in columns.items()} | figures, records


def coefficient_statistics(
    coefficient: Tensor, advantage: Tensor, limit: float
) -> dict[str, float]:
    """The adrpo/* figures of one rollout. fraction_saturated: share of completions whose A is cut
    to +-limit."""
    return {
        "adrpo/coefficient_mean": coefficient.mean().item(),
        "adrpo/coefficient_min": coefficient.min().item(),
        "adrpo/coefficient_max": coefficient.max().item(),
        "adrpo/coefficient_fraction_negative": (coefficient < 0).float().mean().item(),
        "adrpo/fraction_saturated": (advantage.abs() > limit).float().mean().item(),
    }


def log(path: Path, writer: SummaryWriter, step: int, record: dict[str, float]) -> None:
    """Append one JSON line to metrics.jsonl, and the same figures to TensorBoard."""
    with path.open("a") as file:
        file.write(json.dumps({"step": step, **record}) + "\n")
    for tag, value in record.items():
        writer.add_scalar(tag, value, step)


def write_completions(folder: Path, writer: SummaryWriter, step: int, records: list[dict]) -> None:
    """An evaluation's completions: all as samples/NNNNNN.jsonl, one of each of the first prompts to
    TensorBoard."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (folder / f"{step:06d}.jsonl").write_text("".join(lines), encoding="utf-8")
    first = list({json.dumps(record["prompt"]): record for record in records}.values())[:8]
    shown = [f"{r['prompt']}\n--- reward {r['reward']:.4g}\n{r['completion']}" for r in first]
    writer.add_text(
        "completions", "".join(f"<pre>{html.escape(text)}</pre>" for text in shown), step
    )


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


def restore_training_state(
    network: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: dict
) -> None:
    """The opposite of training_state."""
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
    states = {"model_state_dict": checkpoint["model"], "optim_state_dict": checkpoint["optimizer"]}
    set_state_dict(network, optimizer, **states, options=options)


def save_final(folder: Path, model: nn.Module, weights: dict[str, Tensor], model_id: str) -> str:
    """Export what transformers or PEFT loads, and return the lines that load it. weights: the
    trained ones of Policy(model), whole."""
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    model.save_pretrained(folder, state_dict=weights)
    if isinstance(model, peft.PeftModel):
        base = f'AutoModelForCausalLM.from_pretrained("{model_id}")'
        imports = "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM"
        return f'{imports}\nmodel = PeftModel.from_pretrained({base}, "{folder}")'
    return (
        "from transformers import AutoModelForCausalLM\n"
        f'model = AutoModelForCausalLM.from_pretrained("{folder}")'
    )


# --------------------------------------------------------------------------------------------- main


def check_args(args: Args, processes: int) -> None:
    """Raise InputError for a flag that cannot work."""
    positive = (
        "lora_alpha eval_max_prompts max_prompt_length reward_batch prompts_per_update "
        "max_completion_length"
    )
    positive += (
        " temperature rollout_batch iterations updates_per_rollout clip_eps learning_rate "
        "max_grad_norm"
    )
    positive += " train_tokens eval_every eval_samples save_every"
    rules = [(name, "above 0", getattr(args, name) > 0) for name in positive.split()]
    rules += [
        (name, "0 or more", getattr(args, name) >= 0)
        for name in ("seed", "lora_rank", "top_k", "beta0")
    ]
    rules.append(("weight_decay", "0 or more", args.weight_decay >= 0))
    rules.append(("eval_temperature", "0 (greedy) or more", (args.eval_temperature or 0) >= 0))
    rules.append(("top_p", "above 0 and at most 1", 0 < args.top_p <= 1))
    rules.append(("group_size", "at least 2: the others are the baseline", args.group_size >= 2))
    rules.append(("adv_clip_k", "above 0", args.adv_clip_k is None or args.adv_clip_k > 0))
    divides = args.prompts_per_update % processes == 0
    rules.append(("prompts_per_update", f"a multiple of the {processes} processes", divides))
    if args.reward_weights is not None:
        count = len(args.reward_model or ()) + len(args.reward) or 1
        holds = len(args.reward_weights) == count
        rules.append(
            ("reward_weights", f"{count}, one for each --reward-model and --reward", holds)
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
    name = (
        args.run_name or f"{SCRIPT}-{args.method}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    )
    folder = Path(args.output_dir) / name
    git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        commit = (
            subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
        )
    except (OSError, subprocess.SubprocessError):
        commit = None
    versions = {"python": platform.python_version()}
    versions |= {m.__name__: m.__version__ for m in (torch, transformers, peft, accelerate)}
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
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()

    # Prompts and rewards first: they are quick to be wrong.
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model_id)
    except Exception as error:
        remedy = (
            "give a folder with model and tokenizer, or log in with `hf auth login` if it is gated"
        )
        raise InputError(
            f"--model-id {args.model_id}: cannot be loaded ({one_line(error)}); {remedy}"
        ) from error
    train, heldout, note = load_prompts(args, tokenizer)
    rewards = build_rewards(args, device, dtype)
    mix = torch.tensor(args.reward_weights or [1.0] * len(rewards))
    if len(mix) != len(rewards):
        raise InputError(
            f"--reward-weights {args.reward_weights}: must be {len(rewards)}, one for each reward"
        )
    score(rewards, [train[0].row["prompt"]] * 2, ["", "a completion"], [train[0].row] * 2)

    # Policy and reference.
    seed_everything(args.seed)
    policy = load_policy(args, dtype)
    stop = stop_tokens(policy.model, tokenizer)
    if not stop:
        raise InputError(
            f"--model-id {args.model_id}: has no end-of-sequence token in tokenizer or generation "
            "config"
        )
    frozen = None
    if not args.lora_rank:
        frozen = accelerator.prepare_model(
            copy.deepcopy(policy).requires_grad_(False), evaluation_mode=True
        )
    if args.compile:
        for layer in decoder(policy.model).layers:
            layer.compile(dynamic=True)
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
    )
    network, optimizer = accelerator.prepare(policy, optimizer)
    # Without gradients no DDP is needed. accelerate has put autocast into the forward of both
    # networks.
    policy = accelerator.unwrap_model(network)
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]

    run_dir = resumed or (create_run(args) if is_main else None)
    metrics_path = run_dir / "metrics.jsonl" if run_dir else None
    checkpoint = load_checkpoint(run_dir) if resumed else {}
    first = checkpoint.get("iteration", 0)
    if checkpoint:
        restore_training_state(network, optimizer.optimizer, checkpoint)
    if is_main:
        keep_metrics(metrics_path, first if checkpoint else -1)

    groups, local_groups, group = (
        args.prompts_per_update,
        args.prompts_per_update // processes,
        args.group_size,
    )
    own = slice(rank * local_groups, (rank + 1) * local_groups)  # whole groups stay in one process
    size = sum(parameter.numel() for parameter in trainable)
    accelerator.print(
        f"{run_dir}: {args.method}, {processes} x {device.type}, {'bf16' if bf16 else 'fp32'}, "
        f"{size:,} trained parameters\n{len(train)} training prompts, {len(heldout)} for "
        f"evaluation; {note}\neach iteration {groups} prompts x {group} completions of at most "
        f"{args.max_completion_length} tokens, {args.updates_per_rollout} updates; stop tokens "
        f"{tokenizer.convert_ids_to_tokens(stop)}"
    )
    if group < 4:
        accelerator.print(
            f"warning: --group-size {group}: the mean of so few is a noisy baseline; 8 or more"
        )

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    def everyone_done(done: bool) -> bool:
        """Under FSDP every process must take part in every forward pass."""
        if accelerator.distributed_type != accelerate.DistributedType.FSDP:
            return done
        return bool(
            accelerator.reduce(torch.tensor(float(done), device=device), "sum") == processes
        )

    def draw(
        prompts: list[Prompt], uniforms: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Completions of some prompts: ids, mask and log-probabilities, [B,G,C]."""
        settings = (stop, temperature, args.top_p, args.top_k, everyone_done)
        # One autocast around the whole rollout: weights are converted to bf16 once, not at every
        # token.
        with torch.compiler.set_stance("force_eager"), accelerator.autocast():
            return rollout(
                policy, [prompt.ids for prompt in prompts], uniforms.to(device), *settings
            )

    def measure(prompts: list[Prompt], tokens: Tensor) -> tuple[Tensor, Tensor]:
        """KL to the reference and entropy of each token, [B,G,C]."""
        ids = [prompt.ids for prompt in prompts]
        with reference_policy(policy, frozen) as reference:
            ref_logp, _ = completion_log_probabilities(reference, ids, tokens, args.temperature)
        logp, entropy = completion_log_probabilities(policy, ids, tokens, args.temperature)
        return kl_k3(logp, ref_logp), entropy

    # Everything random in an evaluation is fixed here, once.
    generator = seed_everything(args.seed, 0)
    temperature = args.temperature if args.eval_temperature is None else args.eval_temperature
    fixed = {"prompts": heldout, "mix": mix, "stop": stop, "temperature": temperature}
    fixed["uniforms"] = torch.rand(
        len(heldout), args.eval_samples, args.max_completion_length, generator=generator
    )
    at_once = max(1, args.rollout_batch // args.eval_samples)
    tools = (draw, measure, rewards, decode, fixed, accelerator, at_once)
    if checkpoint:
        base, metrics = checkpoint["base"], checkpoint["metrics"]
    else:
        base, records = evaluate(*tools)
        metrics = base
    writer = SummaryWriter(run_dir, purge_step=first + 1 if checkpoint else 0) if is_main else None
    if is_main and not checkpoint:
        write_completions(run_dir / "samples", writer, 0, records)
        log(metrics_path, writer, 0, {f"eval/{name}": value for name, value in metrics.items()})

    without_spread = 0
    bar = tqdm(
        range(first, args.iterations),
        args.method,
        initial=first,
        total=args.iterations,
        disable=not is_main,
    )
    for iteration in bar:
        # 1. Rollout: the previous policy's completions, and their rewards. Every process draws all
        #    random numbers and takes those of its own groups, so the result does not depend on the
        #    number of processes.
        started = synchronized_time(device)
        generator = seed_everything(args.seed, iteration + 1)
        prompts = [
            train[row] for row in draw_prompts(len(train), groups, iteration, args.seed)[own]
        ]
        uniforms = torch.rand(groups, group, args.max_completion_length, generator=generator)[own]
        at_once = max(1, args.rollout_batch // group)
        cuts = [slice(start, start + at_once) for start in range(0, local_groups, at_once)]
        drawn = [draw(prompts[cut], uniforms[cut], args.temperature) for cut in cuts]
        longest = max(tokens.shape[2] for tokens, _, _ in drawn)
        padded = [[F.pad(part, (0, longest - part.shape[2])) for part in parts] for parts in drawn]
        tokens, mask, sampled_logp = (
            torch.cat(parts) for parts in zip(*padded, strict=True)
        )  # [P/processes,G,C]
        rolled_out = synchronized_time(device)
        asked, texts, rows, ids = flatten(prompts, tokens, mask, decode)
        values = score(rewards, asked, texts, rows).to(device)
        every = (
            accelerator.gather(values).view(groups, group, len(rewards)).cpu()
        )  # [P,G,R], of all processes
        reward = every @ mix  # [P,G]
        rewarded = synchronized_time(device)

        # 2. Advantage, and each completion's KL coefficient (eq. 7).
        advantage = group_advantage(reward)  # [P,G]
        coefficient = torch.full_like(advantage, args.beta0)
        if args.method == "adrpo":
            coefficient = adaptive_beta(advantage.flatten(), args.beta0, args.adv_clip_k).view_as(
                advantage
            )
        weights = advantage[own].to(device), coefficient[own].to(device)

        # 3. Updates on this rollout, in passes whose gradients add up to that of the mean over all
        #    completions.
        decay = (
            (1 + math.cos(math.pi * iteration / args.iterations)) / 2
            if args.lr_schedule == "cosine"
            else 1.0
        )
        for settings in optimizer.param_groups:
            settings["lr"] = args.learning_rate * min(1.0, (iteration + 1) / 5) * decay
        sizes = torch.tensor([max(len(prompt.ids) for prompt in prompts), longest], device=device)
        # As many passes in every process.
        sizes = accelerator.gather(sizes).view(-1, 2).amax(0).tolist()
        passes = micro_batches(local_groups, group, *sizes, args.train_tokens)
        old_logp, ref_logp, sums = {}, {}, torch.zeros(8, device=device)
        for _ in range(args.updates_per_rollout):
            optimizer.zero_grad(set_to_none=True)
            update = torch.zeros(7, device=device)
            for number, (part, columns) in enumerate(passes):
                kept = mask[part, columns]
                kept = kept[..., : int(kept.sum(2).max())]
                completions = tokens[part, columns, : kept.shape[2]]
                ids_part = [prompt.ids for prompt in prompts[part]]
                if number not in ref_logp:
                    with reference_policy(policy, frozen) as reference:
                        ref_logp[number], _ = completion_log_probabilities(
                            reference, ids_part, completions, args.temperature
                        )
                last = number + 1 == len(passes)
                with contextlib.nullcontext() if last else accelerator.no_sync(network):
                    logp, entropy = completion_log_probabilities(
                        network, ids_part, completions, args.temperature
                    )
                    old_logp.setdefault(number, logp.detach())
                    flat = [
                        t.flatten(0, 1) for t in (logp, old_logp[number], ref_logp[number], kept)
                    ]
                    a, c = [weight[part, columns].flatten() for weight in weights]
                    share = len(a) / (local_groups * group)
                    loss = grpo_loss(*flat[:3], a, c, flat[3], args.clip_eps) * share
                    accelerator.backward(loss)
                with torch.no_grad():
                    policy_loss = (
                        grpo_loss(*flat[:3], a, torch.zeros_like(c), flat[3], args.clip_eps) * share
                    )
                    ratio, better = (flat[0] - flat[1]).exp(), a[:, None] > 0
                    clipped = torch.where(
                        better, ratio > 1 + args.clip_eps, ratio < 1 - args.clip_eps
                    )
                    off = (
                        flat[1] - sampled_logp[part, columns, : kept.shape[2]].flatten(0, 1)
                    ).abs()
                    per_token = [
                        kl_k3(flat[0], flat[2]),
                        entropy.flatten(0, 1),
                        clipped & (a[:, None] != 0),
                        off,
                    ]
                    totals = [(value * flat[3]).sum() for value in per_token]
                    update += torch.stack([loss.detach(), policy_loss, *totals, flat[3].sum()])
            grad_norm = accelerator.clip_grad_norm_(trainable, args.max_grad_norm)
            if hasattr(grad_norm, "full_tensor"):  # FSDP
                grad_norm = grad_norm.full_tensor()
            update = torch.cat([accelerator.reduce(update, "mean"), grad_norm.to(device).view(1)])
            if not update.isfinite().all():  # before the step: the weights are still good
                state = training_state(network, optimizer.optimizer)
                if is_main:
                    save_checkpoint(
                        run_dir, {"iteration": iteration, "metrics": metrics, "base": base}, state
                    )
                raise InputError(
                    f"iteration {iteration}: loss {update[0]:.3g}, gradient norm {update[7]:.3g}; "
                    "the weights before this step are saved. Lower --learning-rate, or raise "
                    "--beta0"
                )
            optimizer.step()
            sums += update
        updated = synchronized_time(device)

        # 4. Log, evaluate, save.
        done, last = iteration + 1, iteration + 1 == args.iterations
        lengths = accelerator.gather(mask.sum(2).flatten())
        ended = torch.tensor([float(one[-1] in stop) for one in ids], device=device)
        seconds = synchronized_time(device) - started
        zero_spread = (reward.std(1) < 1e-8).float().mean().item()
        record = {"reward/mean": reward.mean().item(), "reward/std": reward.std(1).mean().item()}
        record |= {"reward/frac_reward_zero_std": zero_spread}
        record |= {f"reward/{name}": every[..., i].mean().item() for i, name in enumerate(rewards)}
        record |= {"losses/total": (sums[0] / args.updates_per_rollout).item()}
        record |= {"losses/policy": (sums[1] / args.updates_per_rollout).item()}
        record |= {"losses/divergence": record["losses/total"] - record["losses/policy"]}
        record |= {"losses/grad_norm": (sums[7] / args.updates_per_rollout).item()}
        tags = ("kl", "entropy", "clip_ratio/region_mean", "sampling/sampling_logp_difference/mean")
        record |= dict(zip(tags, (sums[2:6] / sums[6]).tolist(), strict=True))
        limit = math.inf if args.adv_clip_k is None else args.adv_clip_k * args.beta0
        record |= coefficient_statistics(coefficient, advantage, limit)
        groups_ids = [ids[i : i + group] for i in range(0, len(ids), group)]
        record["completions/distinct_2"] = nanmean(
            gather_object([distinct_2(one) for one in groups_ids])
        )
        record["completions/mean_length"] = lengths.float().mean().item()
        record["completions/clipped_ratio"] = 1 - accelerator.gather(ended).mean().item()
        record["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        record["charts/seconds_rollout"] = rolled_out - started
        record["charts/seconds_reward"] = rewarded - rolled_out
        record["charts/seconds_update"] = updated - rewarded
        record["charts/tokens_per_second"] = lengths.sum().item() / seconds
        record["charts/peak_memory_gb"] = peak_memory_gb(device)
        if last or done % args.eval_every == 0:
            metrics, records = evaluate(*tools)
            record |= {f"eval/{name}": value for name, value in metrics.items()}
            if is_main:
                write_completions(run_dir / "samples", writer, done, records)
        if is_main:
            log(metrics_path, writer, done, record)
            writer.add_histogram("adrpo/coefficient", coefficient, done)
        bar.set_postfix({name: f"{record[tag]:.4g}" for name, tag in BAR.items()})
        without_spread = without_spread + 1 if zero_spread > 0.8 else 0
        if without_spread == 10 and is_main:
            tqdm.write(
                "warning: for ten iterations more than 80 % of the groups had one reward for all "
                "their completions: nothing to learn from; use a finer reward, easier or harder "
                "prompts, or a larger --group-size"
            )
        if last or done % args.save_every == 0:
            state = training_state(network, optimizer.optimizer)
            if is_main:
                save_checkpoint(
                    run_dir, {"iteration": done, "metrics": metrics, "base": base}, state
                )

    # What other tools load, and the whole run in one file.
    weights_now = training_state(network, optimizer.optimizer)["model"]
    if is_main:
        writer.close()
        tokenizer.save_pretrained(run_dir / "final")
        lines = save_final(run_dir / "final", policy.model, weights_now, args.model_id)
        summary = {
            "base": base,
            "final": metrics,
            "method": args.method,
            "iterations": args.iterations,
        }
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2))
        print(f"{'':22s}{'base':>10s}{'final':>10s}")
        for name, value in metrics.items():
            print(f"{name:22s}{base[name]:10.4f}{value:10.4f}")
        print(f"completions in {run_dir / 'samples'}. To use the result:\n{lines}")


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
            "lower --train-tokens or --rollout-batch, or add --gradient-checkpointing, "
            "--lora-rank 16"
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
