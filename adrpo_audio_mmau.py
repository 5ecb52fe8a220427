"""ADRPO for audio reasoning: GRPO with the adaptive KL coefficient, CESAR's process rewards, and
the MMAU evaluation.

Adaptive Divergence Regularized Policy Optimization (NeurIPS 2025, arXiv 2510.18053), eq. 7, on
audio questions with several choices: a completion's KL to the reference model has the
weight `beta0 - A`, A its advantage over the other completions of its question, clipped to +-k
beta0. `--method grpo` holds it at beta0 (GRPO, arXiv 2402.03300). The rewards are the outcome
pair (right answer, right format) and CESAR's (ICLR 2026, arXiv 2510.20867): consistency, keywords,
overthinking. For Qwen2.5-Omni (its thinker) and Qwen2-Audio.

    A  = (R - group mean) / (group std + 1e-4)
    L  = mean over completions of the mean over their tokens of
         -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)  +  (beta0 - clip(A, -k beta0, k beta0)) KL
    KL = exp(ref - pol) - (ref - pol) - 1             per token, of the log-probabilities (k3)
    R  = w1 accuracy + w2 format + w3 consistency + w4 keywords + w5 overthinking

One iteration: read, resample and encode --prompts-per-update clips, roll out --group-size
completions for each question, score them, one optimiser step on all of them. A clip goes through
the frozen audio tower once; a question, clip included, is one row for its whole group in the
rollout, the reference and the training pass:

    [ audio and question | completion 1 | completion 2 | ... | completion G ]

Where this departs from the papers, or they are silent:
- Learning rate, steps and prompts of ADRPO's audio run are not published: group, lengths and prompt
  follow the open recipe for the same model and data (Ke-Omni-R), the LoRA a published one for one
  GPU. KL and std as in both.
- CESAR's lists of keywords are not published in full: ours stand at the top of this file, each part
  capped at 1.
- Evaluation is greedy; a missing prediction is wrong; the answer is the text inside the last
  <answer> block.

    python adrpo_audio_mmau.py --train-data avqa.json --audio-dir wavs \\
        --eval-data gamma-lab-umd/MMAU-test-mini
    python adrpo_audio_mmau.py --train-data avqa.json --audio-dir wavs \\
        --reward-weights 5 1 1 1 1  # CESAR
    torchrun --nproc-per-node 8 adrpo_audio_mmau.py --train-data avqa.json --audio-dir wavs \\
        --gradient-checkpointing
    python adrpo_audio_mmau.py --eval-only --adapter runs/NAME/final --eval-data mmau.json \\
        --think-budgets 0 50 100

Without a GPU: benchmark/mini_world_audio.py makes a small trained model and questions about
synthetic sounds, on which this file learns in minutes. Equations, rewards, metrics, results and
limits: docs/adrpo_audio_mmau.md
"""

import contextlib
import copy
import dataclasses
import errno
import gc
import hashlib
import html
import io
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import accelerate
import matplotlib
import numpy as np
import peft
import soundfile
import soxr
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
    AutoConfig,
    AutoProcessor,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SCRIPT = "adrpo_audio_mmau"
SAMPLE_RATE = 16000
# The order of --reward-weights.
REWARDS = ("accuracy", "format", "consistency", "keywords", "overthinking")
TASKS = ("sound", "music", "speech")  # of MMAU
# Elements of float32 logits alive in the training pass: 268 MB, whatever the vocabulary.
LOGITS_AT_ONCE = 2**26
BAR = {
    "accuracy": "reward/accuracy",
    "kl": "kl",
    "entropy": "entropy",
    "length": "completions/mean_length",
}
KEEP_CHECKPOINTS = 2
LETTER = r"^\([A-Z]\)\s*"  # before a choice: (A)

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
    """seed of everything: LoRA, order of the questions, rollouts"""
    cpu: bool = False
    """stay on the CPU; several processes there: torchrun --nproc-per-node N adrpo_audio_mmau.py
    --cpu"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16: matrix products in bfloat16; trained weights, log-probabilities and losses stay
    float32. auto: bf16 on a GPU that has units for it, else fp32"""
    resume: str | None = None
    """run folder to continue exactly from its newest checkpoint, or `latest`; the run's own flags
    are used"""
    eval_only: bool = False
    """no training: answer --eval-data, once for each of --think-budgets, and write predictions,
    scores and curve"""

    # ---------------------------------------------------------------------------------------- model
    model_id: str = "Qwen/Qwen2.5-Omni-7B"
    """Qwen2.5-Omni (its thinker is loaded) or Qwen2-Audio, hub id or folder. It is also the
    reference"""
    adapter: str | None = None
    """--eval-only: folder of a LoRA (a run's final/) on top of the model"""
    lora_rank: int = 8
    """rank of the LoRA on the language model, switched off for the reference (the published one-GPU
    preset: 8). 0 trains all of the language model's layers and head beside a frozen copy; audio
    tower and embeddings stay frozen"""
    lora_alpha: int = 32
    """the LoRA's update is scaled by alpha / rank (the same preset: 32)"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""

    # ----------------------------------------------------------------------------------------- data
    train_data: str | None = None
    """questions to train on: .jsonl, a row {audio, question, choices, answer} a line, or a .json
    list of such rows, of AVQA's own rows, or of MMAU's; or a dataset NAME[@REVISION][:SPLIT] with
    audio in it, of the hub or in a folder"""
    audio_dir: str | None = None
    """folder the clips of --train-data are relative to; default: that of the file"""
    eval_data: str | None = None
    """questions to evaluate on: MMAU's JSON as published, gamma-lab-umd/MMAU-test-mini (the hub's,
    clips included), or as --train-data; default: every tenth of --train-data, which is then not
    trained on"""
    eval_audio_dir: str | None = None
    """folder the clips of --eval-data are relative to; default: that of the file"""
    eval_max: int | None = None
    """only the first so many of them"""
    train_on_eval: bool = False
    """train on data that is, or overlaps with, an evaluation split: refused without this"""
    max_audio_seconds: float = 30.0
    """longer clips are cut, and counted; the model's own window is a limit too"""

    # --------------------------------------------------------------------------------------- prompt
    think_budget: int = 50
    """words the prompt allows for <think> (Ke-Omni-R: 50); 0 asks for a direct answer"""
    think_budgets: tuple[int, ...] | None = None
    """--eval-only: evaluate each of these and draw accuracy against the reasoning used (CESAR: 0 25
    50 ... 250)"""

    # -------------------------------------------------------------------------------------- rewards
    reward_weights: tuple[float, float, float, float, float] = (1.0, 1.0, 0.0, 0.0, 0.0)
    """weights of accuracy, format, consistency, keywords, overthinking; 5 1 1 1 1 is CESAR"""

    # -------------------------------------------------------------------------------------- rollout
    prompts_per_update: int = 8
    """questions per iteration, over all processes; a multiple of their number. Few make the update
    noisy"""
    group_size: int = 8
    """completions per question (Ke-Omni-R, CESAR: 8). Their mean reward is the baseline: below 4 it
    is noise"""
    max_completion_length: int = 256
    """tokens after which a completion is cut off; also the overthinking reward's maximum (CESAR:
    256)"""
    temperature: float = 1.0
    """of the policy, in rollouts and in training alike (Ke-Omni-R: 1)"""
    rollout_batch: int = 64
    """completions rolled out at once, per process (at least one group); changes memory and speed,
    not the result"""

    # ---------------------------------------------------------------------------------- fine-tuning
    method: Literal["adrpo", "grpo"] = "adrpo"
    """grpo holds the coefficient at beta0"""
    iterations: int = 1000
    """rollouts, each with its updates"""
    updates_per_rollout: int = 1
    """optimiser steps on one rollout, each on all of it; above 1 the clipped ratio matters"""
    beta0: float = 0.04
    """KL coefficient of a completion with A = 0 (the paper: 0.04). Larger: closer to the
    reference"""
    adv_clip_k: float | None = 1.0
    """adrpo: clip A to +-k beta0 in the coefficient (the paper: 1; 0.5 and 2 are its Table 3);
    None = no clip"""
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
    """tokens per forward and backward pass, padding included, per process: whole groups, or part of
    one, each with its question once; changes memory and speed, not the result"""

    # ---------------------------------------------------------------------- evaluation, checkpoints
    eval_every: int = 100
    """iterations between evaluations"""
    eval_temperature: float = 0.0
    """0 = greedy"""
    eval_batch: int = 16
    """questions answered at once in an evaluation, per process; changes memory and speed, not the
    result"""
    save_every: int = 50
    """iterations between checkpoints"""


# ------------------------------------------------------------------------------ answers and rewards


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
    completions: list[str], tokens: list[int], rows: list[dict], think: bool, longest: int
) -> Tensor:
    """All rewards of B completions, in the order of REWARDS -> float32 [B,5] on the CPU."""
    table = [
        [
            reward_accuracy(text, row),
            reward_format(text, think),
            reward_consistency(text, row),
            reward_keywords(text),
            reward_overthinking(count, longest),
        ]
        for text, count, row in zip(completions, tokens, rows, strict=True)
    ]
    return torch.tensor(table)


# --------------------------------------------------------------------------------------------- data


def read_questions(flag: str, spec: str) -> list[dict]:
    """Rows {id, audio, question, choices, answer, ...} of a .jsonl or .json file in our, AVQA's or
    MMAU's layout.

    Raises InputError for a file that cannot be read, and as check_questions."""
    try:
        text = Path(spec).read_text(encoding="utf-8")
        rows = (
            json.loads(text)
            if Path(spec).suffix == ".json"
            else [json.loads(x) for x in text.splitlines() if x.strip()]
        )
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("must be a list of JSON objects")
    except (OSError, ValueError) as error:
        raise InputError(
            f"--{flag} {spec}: cannot be read ({one_line(error)}); give a .json or .jsonl file"
        ) from error
    return check_questions(flag, spec, rows)


def check_questions(flag: str, spec: str, rows: list[dict]) -> list[dict]:
    """Rows in our, AVQA's or MMAU's layout in ours, in their order. Raises InputError for a row
    without a key, an answer that is not among the choices, or an id that is there twice."""
    if not rows:
        raise InputError(f"--{flag} {spec}: empty")
    questions, seen = [], set()
    for number, row in enumerate(rows):
        if "multi_choice" in row:  # AVQA's own: the answer is a position, the clip a video's sound
            try:
                text = row["question_text"].replace("video", "audio")
                row = row | {
                    "question": text,
                    "choices": row["multi_choice"],
                    "audio": f"{row['video_name']}.wav",
                }
                row["answer"] = row["choices"][row["answer"]]
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                raise InputError(
                    f"--{flag} {spec}: row {number} is not AVQA's ({type(error).__name__} {error})"
                ) from error
        row = {"id": number, "audio": row.get("audio_id")} | row
        row["id"] = str(row["id"])
        missing = [key for key in ("audio", "question", "choices", "answer") if not row.get(key)]
        if missing:
            raise InputError(
                f"--{flag} {spec}: row {number} has no {missing[0]}; a row is audio, question, "
                "choices, answer"
            )
        texts = (row["audio"], row["question"], *row["choices"])
        if not isinstance(row["choices"], list) or not all(isinstance(text, str) for text in texts):
            raise InputError(
                f"--{flag} {spec}: row {number}: audio, question and each of the choices must be "
                "text"
            )
        if row["answer"] not in row["choices"]:
            raise InputError(
                f"--{flag} {spec}: row {number}: the answer {row['answer']!r} is not among the "
                "choices"
            )
        if row["id"] in seen:
            raise InputError(f"--{flag} {spec}: the id {row['id']} is there twice")
        seen.add(row["id"])
        questions.append(row)
    return questions


class StoredClip(NamedTuple):
    """A clip inside a dataset. Its bytes stay in the memory-mapped file until they are wanted."""

    cells: Any  # a datasets.Dataset with bytes and path
    number: int


def read_dataset(
    flag: str, spec: str
) -> tuple[list[dict], dict[str, StoredClip], dict[str, str | None]]:
    """Rows of a dataset NAME[@REVISION][:SPLIT] in our or the hub's MMAU layout, their clips by id,
    and what identifies its version. Raises InputError for one that cannot be loaded or has no
    audio, and as check_questions."""
    import datasets  # here, because it is slow to import and files do not need it

    name, _, split = (
        (spec, "", "") if Path(spec).exists() or ":" not in spec else spec.rpartition(":")
    )
    repository, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
    try:
        parts = datasets.load_dataset(repository, revision=revision or None)
    except Exception as error:
        # The outer one may only say that there was an error.
        reason = one_line(error.__cause__ or error)
        remedy = "give a .json or .jsonl file, a hub dataset, or a folder of parquet files"
        raise InputError(f"--{flag} {spec}: cannot be loaded ({reason}); {remedy}") from error
    usual = [part for part in parts if len(parts) == 1 or (flag == "eval-data" and "test" in part)]
    if split not in parts and (split or len(usual) != 1):
        reason = f"has no split {split}" if split else "has several splits"
        raise InputError(f"--{flag} {spec}: {reason}; name one, {name}:SPLIT ({', '.join(parts)})")
    split = split or usual[0]
    table = parts[split]
    sounds = [
        column for column, feature in table.features.items() if isinstance(feature, datasets.Audio)
    ]
    if not sounds:
        reason = f"no column of its split {split} is audio ({', '.join(table.column_names)})"
        raise InputError(
            f"--{flag} {spec}: {reason}; give one with the clips in it, or a .json file beside them"
        )
    cells = (
        table.select_columns(sounds[:1])
        .cast_column(sounds[0], datasets.Audio(decode=False))
        .flatten()
    )
    cells = cells.rename_columns({f"{sounds[0]}.{part}": part for part in ("bytes", "path")})
    rows = []
    try:
        for row, path in zip(table.remove_columns(sounds), cells["path"], strict=True):
            # The hub's MMAU has `instruction`, all but the answer in one text, and letters before
            # the choices. The published JSON has none, and MMAU's rule would count the A of
            # "(A) Man" as a word of the answer.
            extra = row.pop("other_attributes", None) or {}
            extra = json.loads(extra) if isinstance(extra, str) else extra
            row = {"question": row.get("instruction")} | extra | row
            row = {key: value for key, value in row.items() if value is not None}
            if all(re.match(LETTER, str(choice)) for choice in row.get("choices") or [""]):
                row["choices"] = [re.sub(LETTER, "", choice) for choice in row["choices"]]
                row["answer"] = re.sub(LETTER, "", row.get("answer", ""))
            if "test" in split and "test" not in str(row.get("split")):
                row["split"] = split
            row["audio"] = path or f"{Path(repository).name}:{split}:{len(rows)}"
            rows.append(json.loads(json.dumps(row, default=str)))  # predictions are written as JSON
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"--{flag} {spec}: row {len(rows)} cannot be read ({one_line(error)})"
        ) from error
    rows = check_questions(flag, spec, rows)
    commit = re.search(
        r"/([0-9a-f]{40})/", " ".join(file["filename"] for file in table.cache_files)
    )
    version = {"split": split, "fingerprint": table._fingerprint, "revision": commit and commit[1]}
    return rows, {row["id"]: StoredClip(cells, number) for number, row in enumerate(rows)}, version


def opened(clip: Path | StoredClip) -> Path | io.BytesIO:
    """What soundfile reads a clip from."""
    if not isinstance(clip, StoredClip):
        return clip
    cell = clip.cells[clip.number]
    return Path(cell["path"] or "") if cell["bytes"] is None else io.BytesIO(cell["bytes"])


def clip_problem(clip: Path | StoredClip) -> str | None:
    """Why a clip cannot be used; None if its header, length and end are right."""
    try:
        with soundfile.SoundFile(opened(clip)) as file:
            if file.frames < 0.1 * file.samplerate:
                return f"{file.frames} samples: shorter than 0.1 s"
            declared = re.search(r"^data : (\d+) \(should be \d+\)", file.extra_info, re.MULTILINE)
            file.seek(file.frames - 1)
            cut = declared and int(declared[1]) < 2**31 - 2**16  # above: a stream of unknown length
            if len(file.read(1)) != 1 or cut:
                return "truncated"
    except (OSError, RuntimeError) as error:
        return one_line(error)
    return None


def load_audio(clip: Path | StoredClip, seconds: float) -> np.ndarray:
    """The first `seconds` of a clip: mono, 16 kHz, float32 [N]."""
    with soundfile.SoundFile(opened(clip)) as file:
        wave = file.read(int(seconds * file.samplerate) + 1, dtype="float32", always_2d=True).mean(
            axis=1
        )
        if file.samplerate != SAMPLE_RATE:
            wave = soxr.resample(wave, file.samplerate, SAMPLE_RATE)
    return wave[: int(seconds * SAMPLE_RATE)]


class Question(NamedTuple):
    """A row of the data and its clip."""

    row: dict
    clip: Path | StoredClip


def find_clips(
    flag: str, spec: str, folder: str | None, rows: list[dict], stored: dict[str, StoredClip]
) -> tuple[list[Question], dict[str, str]]:
    """The questions whose clips can be used, and why the others' cannot, by file, or by id where
    the clips are stored in a dataset. Raises InputError if none can."""
    root = Path(folder) if folder else Path(spec).parent
    problems, questions = {}, []
    for row in rows:
        if stored:
            name, clip = f"{spec}: {row['id']}", stored[row["id"]]
            problem = clip_problem(clip)
        else:
            clip = next(
                (p for p in (root / row["audio"], root / Path(row["audio"]).name) if p.is_file()),
                root / row["audio"],
            )
            name, problem = str(clip), clip_problem(clip) if clip.is_file() else "not found"
        if problem:
            problems[name] = problem
        else:
            questions.append(Question(row, clip))
    if not questions:
        name, problem = next(iter(problems.items()))
        raise InputError(
            f"--{flag} {spec}: none of its {len(problems)} clips can be used ({name}: {problem})"
        )
    return questions, problems


def load_questions(
    args: Args,
) -> tuple[list[Question], list[Question], list[dict], dict[str, str], dict, str]:
    """Training and evaluation questions, all evaluation rows (with those whose clips cannot be
    used), the clips that were skipped and why, what identifies the version of --eval-data (MMAU has
    several), and a sentence on all that. Raises InputError, also for training on an evaluation
    split."""
    sources = {
        "train-data": (args.train_data, args.audio_dir),
        "eval-data": (args.eval_data, args.eval_audio_dir),
    }
    rows, stored, version = {}, {}, {}
    for flag, (spec, _) in sources.items():
        rows[flag], stored[flag], version[flag] = [], {}, {}
        if spec and (Path(spec).is_file() or Path(spec).suffix in (".json", ".jsonl")):
            rows[flag] = read_questions(flag, spec)
            version[flag] = {"sha256": hashlib.sha256(Path(spec).read_bytes()).hexdigest()}
        elif spec:
            rows[flag], stored[flag], version[flag] = read_dataset(flag, spec)
    if not args.eval_only and not args.train_on_eval:
        tests = sum("test" in str(row.get("split", "")) for row in rows["train-data"])
        asked = {(Path(row["audio"]).name, row["question"]) for row in rows["eval-data"]}
        common = sum(
            (Path(row["audio"]).name, row["question"]) in asked for row in rows["train-data"]
        )
        if tests or common:
            what = (
                f"{tests} rows of a test split"
                if tests
                else f"{common} questions that are in --eval-data too"
            )
            raise InputError(
                f"--train-data {args.train_data}: has {what}; if that is meant, add --train-on-eval"
            )
    if not args.eval_data:
        rows["eval-data"] = rows["train-data"][::10]
        rows["train-data"] = [row for i, row in enumerate(rows["train-data"]) if i % 10]
        sources["eval-data"], stored["eval-data"] = sources["train-data"], stored["train-data"]
    rows["eval-data"] = rows["eval-data"][: args.eval_max]
    unknown = [row["task"] for row in rows["eval-data"] if row.get("task", TASKS[0]) not in TASKS]
    if unknown:
        source = (
            f"--eval-data {args.eval_data}" if args.eval_data else f"--train-data {args.train_data}"
        )
        raise InputError(f"{source}: the task {unknown[0]!r} is none of {', '.join(TASKS)}")
    found, skipped = {}, {}
    for flag, (spec, folder) in sources.items():
        found[flag], problems = (
            find_clips(flag, spec, folder, rows[flag], stored[flag]) if rows[flag] else ([], {})
        )
        skipped |= problems
    if not args.eval_only and not found["train-data"]:
        raise InputError(
            f"--train-data {args.train_data}: one question cannot be split; give --eval-data"
        )
    note = (
        f"{len(found['train-data'])} training questions, {len(found['eval-data'])} for evaluation"
    )
    note += "" if args.eval_data else " (every tenth)"
    note += f"; {len(skipped)} clips cannot be used: skipped.json" if skipped else ""
    version = {f"eval_data_{name}": value for name, value in version["eval-data"].items()}
    return found["train-data"], found["eval-data"], rows["eval-data"], skipped, version, note


def build_prompt(processor: transformers.ProcessorMixin, row: dict, think_budget: int) -> str:
    """The text of a question for the model, with one place for the clip; the same in training and
    evaluation."""
    text = f"{row['question']} Choose one of the following options: {', '.join(row['choices'])}.\n"
    if think_budget:
        text += f"Think first, in fewer than {think_budget} words, inside <think> </think>. "
    text += "Give the option you choose inside <answer> </answer>."
    content = [{"type": "audio", "audio": "clip"}, {"type": "text", "text": text}]
    options = {"add_generation_prompt": True, "tokenize": False}
    return processor.apply_chat_template([{"role": "user", "content": content}], **options)


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


def language_model(model: nn.Module) -> nn.Module:
    """The decoder of Qwen2-Audio or of Qwen2.5-Omni's thinker, without head and PEFT's wrapping
    (the LoRA stays in)."""
    return (
        model.get_base_model() if isinstance(model, peft.PeftModel) else model
    ).model.language_model


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
        base = self.model.get_base_model() if isinstance(self.model, peft.PeftModel) else self.model
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


# ------------------------------------------------------------------------------ model and reference


def load_model(args: Args, dtype: torch.dtype) -> tuple[nn.Module, transformers.ProcessorMixin]:
    """Qwen2-Audio or Qwen2.5-Omni's thinker and its processor, its language model reading
    shared-prompt rows; trained weights in float32, the others in `dtype`. Raises InputError."""
    kinds = {
        "qwen2_audio": Qwen2AudioForConditionalGeneration,
        "qwen2_5_omni": Qwen2_5OmniThinkerForConditionalGeneration,
        "qwen2_5_omni_thinker": Qwen2_5OmniThinkerForConditionalGeneration,
    }
    try:
        kind = AutoConfig.from_pretrained(args.model_id).model_type
        if kind not in kinds:
            raise InputError(
                f"--model-id {args.model_id}: is a {kind}; must be Qwen2.5-Omni or Qwen2-Audio"
            )
        model = kinds[kind].from_pretrained(args.model_id, dtype=dtype)
        processor = AutoProcessor.from_pretrained(args.model_id)
    except InputError:
        raise
    except Exception as error:
        remedy = (
            "give a folder with model and processor, or log in with `hf auth login` if it is gated"
        )
        raise InputError(
            f"--model-id {args.model_id}: cannot be loaded ({one_line(error)}); {remedy}"
        ) from error
    if args.adapter:
        try:
            model = peft.PeftModel.from_pretrained(model, args.adapter)
        except Exception as error:
            raise InputError(
                f"--adapter {args.adapter}: cannot be loaded ({one_line(error)})"
            ) from error
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # rollout, old policy and reference must be the same function
    if not args.eval_only and args.lora_rank:
        targets = (
            r".*language_model\.layers\.\d+\..*\."
            r"(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        )
        model = get_peft_model(
            model, LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=targets)
        )
    elif not args.eval_only:
        parts = [language_model(model).layers, language_model(model).norm]
        if model.get_output_embeddings().weight is not language_model(model).embed_tokens.weight:
            parts.append(model.get_output_embeddings())
        for part in parts:
            part.float().requires_grad_(True)
    if args.gradient_checkpointing:
        language_model(model).gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        model.enable_input_require_grads()  # else a LoRA behind frozen embeddings gets no gradient
    language_model(model).set_attn_implementation("shared_prompt")
    model.train()
    (
        model.get_base_model() if isinstance(model, peft.PeftModel) else model
    ).model.audio_tower.eval()
    return model, processor  # checkpointing works in training mode only; there is no dropout left


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
        raise InputError(
            f"--model-id: its processor returns no audio features ({one_line(error)})"
        ) from error
    token = processor.tokenizer.convert_tokens_to_ids(processor.audio_token)
    if "input_features" not in inputs or not (inputs["input_ids"] == token).any():
        raise InputError(
            "--model-id: its processor returns no audio features; the model would hear nothing"
        )
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


def my_share(count: int, rank: int, processes: int) -> list[int]:
    """Positions 0..count-1 that this process works on; all processes get equally many, the last
    ones some again, so that the gathered parts, cut to `count`, are in order."""
    size = math.ceil(count / processes)
    return [position % count for position in range(rank * size, (rank + 1) * size)]


def flatten(
    tokens: Tensor, mask: Tensor, decode: Callable
) -> tuple[list[str], list[int], list[list[int]]]:
    """Completions [B,G,C] one after the other: texts, lengths in tokens, token ids, each B*G
    long."""
    ids = [
        one[kept].tolist()
        for one, kept in zip(tokens.flatten(0, 1), mask.flatten(0, 1), strict=True)
    ]
    return [decode(one) for one in ids], [len(one) for one in ids], ids


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927); nan for none."""
    if not count:
        return math.nan, math.nan
    share, spread = right / count, z**2 / count
    middle, half = (
        share + spread / 2,
        z * math.sqrt(share * (1 - share) / count + spread / (4 * count)),
    )
    return (middle - half) / (1 + spread), (middle + half) / (1 + spread)


def mmau_scores(rows: list[dict], predictions: dict[str, str]) -> dict[str, dict[str, dict]]:
    """Accuracy in percent with its interval, by MMAU's rule: total, per task, difficulty and
    sub-category. rows: all that were asked for; a row whose id has no prediction is wrong."""
    right = {
        row["id"]: mmau_match(row["answer"], predictions.get(row["id"], ""), row["choices"])
        for row in rows
    }
    scores = {}
    for key in ("total", "task", "difficulty", "sub-category"):
        groups = {}
        for row in rows:
            groups.setdefault("total" if key == "total" else row.get(key), []).append(
                right[row["id"]]
            )
        scores[key] = {}
        for name, found in groups.items():
            low, high = wilson(sum(found), len(found))
            figures = {
                "accuracy": 100 * sum(found) / len(found),
                "low": 100 * low,
                "high": 100 * high,
            }
            if name is not None:
                scores[key][name] = figures | {"right": sum(found), "count": len(found)}
    return scores


@torch.no_grad()
def evaluate(
    answer: Callable[[list[Question], int], tuple[list[str], list[int]]],
    questions: list[Question],
    rows: list[dict],
    think_budget: int,
    longest: int,
    reasoning_tokens: Callable[[str], int],
    accelerator: accelerate.Accelerator,
    batch: int,
) -> tuple[dict[str, float], dict, list[dict]]:
    """Every figure of a policy on the evaluation questions; MMAU's scores; the rows with the
    model's words.

    `answer` gives texts and token counts for some questions under a think budget; `rows` are all
    that were asked for, with those whose clips cannot be used; `batch` questions at once."""
    mine = my_share(len(questions), accelerator.process_index, accelerator.num_processes)
    records = []
    for start in tqdm(
        range(0, len(mine), batch), "evaluate", leave=False, disable=not accelerator.is_main_process
    ):
        part = [questions[i] for i in mine[start : start + batch]]
        texts, tokens = answer(part, think_budget)
        values = score(
            texts, tokens, [question.row for question in part], think_budget > 0, longest
        ).tolist()
        for question, text, count, rewards in zip(part, texts, tokens, values, strict=True):
            record = {"id": question.row["id"], "completion": text, "tokens": count}
            record["reasoning_tokens"] = reasoning_tokens(block(text, "think"))
            records.append(record | dict(zip(REWARDS, rewards, strict=True)))
    records = gather_object(records)[: len(questions)]
    found = {record["id"]: record for record in records}
    answers = {name: block(record["completion"], "answer") for name, record in found.items()}
    scores = mmau_scores(rows, answers)
    figures = {"accuracy": scores["total"]["total"]["accuracy"]}
    figures |= {
        f"accuracy_{task}": scores["task"][task]["accuracy"]
        for task in TASKS
        if task in scores["task"]
    }
    for name in (*REWARDS[1:], "tokens", "reasoning_tokens"):
        figures[name] = sum(record[name] for record in records) / len(records)
    # The official script reads `model_output`, its README says `model_prediction`; a row without
    # would not be counted.
    said = [
        {
            "model_output": answers.get(row["id"], ""),
            "completion": found.get(row["id"], {}).get("completion"),
        }
        for row in rows
    ]
    said = [
        row | text | {"model_prediction": text["model_output"]}
        for row, text in zip(rows, said, strict=True)
    ]
    return figures, scores, said


def score_table(scores: dict) -> str:
    """MMAU's scores as a Markdown table."""
    lines = ["| | accuracy | 95 % interval | right | of |", "|---|---|---|---|---|"]
    for key, groups in scores.items():
        for name, s in sorted(groups.items()):
            label = name if key == "total" else f"{key}: {name}"
            lines.append(
                f"| {label} | {s['accuracy']:.2f} | {s['low']:.1f} to {s['high']:.1f} | "
                f"{s['right']} | {s['count']} |"
            )
    return "\n".join(lines) + "\n"


def scaling(points: list[dict]) -> dict[str, float]:
    """Test-time scaling of points {budget, tokens, accuracy}: slopes in points of accuracy per
    reasoning token, with the intercept pinned at the direct answer's accuracy (CESAR's fit) and by
    ordinary least squares; the sweet spot."""
    x, y = (
        np.array([point[name] for point in points], dtype=float) for name in ("tokens", "accuracy")
    )
    best = points[int(y.argmax())]
    result = {
        "sweet_spot_tokens": best["tokens"],
        "sweet_spot_accuracy": best["accuracy"],
        "slope_pinned": math.nan,
    }
    direct = [point["accuracy"] for point in points if point["budget"] == 0]
    if direct and (x**2).sum() > 0:
        result["slope_pinned"] = float((x * (y - direct[0])).sum() / (x**2).sum())
    result["slope"] = float(np.polyfit(x, y, 1)[0]) if np.ptp(x) > 0 else math.nan
    return result


def draw_scaling(points: list[dict], fit: dict, path: Path) -> None:
    """Accuracy with its interval against the mean number of reasoning tokens used, budgets as
    labels."""
    figure, axis = plt.subplots(figsize=(7, 4.5))
    x, y = [point["tokens"] for point in points], [point["accuracy"] for point in points]
    errors = [
        [p["accuracy"] - p["low"] for p in points],
        [p["high"] - p["accuracy"] for p in points],
    ]
    axis.errorbar(x, y, errors, fmt="o", capsize=3)
    for point in points:
        axis.annotate(f" {point['budget']}", (point["tokens"], point["accuracy"]), fontsize=8)
    axis.plot(
        fit["sweet_spot_tokens"],
        fit["sweet_spot_accuracy"],
        "*",
        ms=14,
        color="tab:red",
        label="sweet spot",
    )
    slopes = f"slope {fit['slope']:.3f}, pinned at the direct answer {fit['slope_pinned']:.3f}"
    axis.set(
        xlabel="reasoning tokens used (labels: words allowed)", ylabel="accuracy, %", title=slopes
    )
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


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


def to_json(value: object, **options) -> str:
    """JSON with null for nan and infinity, which strict readers refuse."""

    def finite(part: object) -> object:
        if isinstance(part, dict):
            return {key: finite(inner) for key, inner in part.items()}
        if isinstance(part, (list, tuple)):
            return [finite(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), **options)


def log(path: Path, writer: SummaryWriter, step: int, record: dict[str, float]) -> None:
    """Append one JSON line to metrics.jsonl, and the same figures to TensorBoard."""
    with path.open("a") as file:
        file.write(to_json({"step": step, **record}) + "\n")
    for tag, value in record.items():
        writer.add_scalar(tag, value, step)


def write_completions(path: Path, writer: SummaryWriter, step: int, said: list[dict]) -> None:
    """An evaluation's rows with the model's words: all as a JSON list, the first few to
    TensorBoard."""
    path.write_text(to_json(said, ensure_ascii=False, indent=1), encoding="utf-8")
    shown = [
        f"{row['question']}\n{row['choices']} {row['answer']}\n{row['completion']}"
        for row in said[:8]
    ]
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
    """Export what PEFT or transformers loads, and return the lines that load it. weights: the
    trained ones of Policy(model), whole."""
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    kind = type(model.get_base_model() if isinstance(model, peft.PeftModel) else model).__name__
    if isinstance(model, peft.PeftModel):
        model.save_pretrained(folder, state_dict=weights)
        imports = f"from peft import PeftModel\nfrom transformers import {kind}"
        return (
            f"{imports}\n"
            f'model = PeftModel.from_pretrained({kind}.from_pretrained("{model_id}"), "{folder}")'
        )
    model.save_pretrained(folder, state_dict=dict(model.state_dict()) | weights)
    return f'from transformers import {kind}\nmodel = {kind}.from_pretrained("{folder}")'


# --------------------------------------------------------------------------------------------- main


def check_args(args: Args, processes: int) -> None:
    """Raise InputError for a flag that cannot work."""
    positive = (
        "lora_alpha max_audio_seconds prompts_per_update max_completion_length temperature "
        "rollout_batch"
    )
    positive += (
        " iterations updates_per_rollout clip_eps learning_rate max_grad_norm train_tokens "
        "eval_every eval_batch"
    )
    positive += " save_every"
    rules = [(name, "above 0", getattr(args, name) > 0) for name in positive.split()]
    notbelow = "seed lora_rank beta0 weight_decay eval_temperature think_budget"
    rules += [(name, "0 or more", getattr(args, name) >= 0) for name in notbelow.split()]
    rules.append(("group_size", "at least 2: the others are the baseline", args.group_size >= 2))
    rules.append(("max_audio_seconds", "at least 0.1", args.max_audio_seconds >= 0.1))
    rules.append(("reward_weights", "finite", all(map(math.isfinite, args.reward_weights))))
    rules.append(("adv_clip_k", "above 0", args.adv_clip_k is None or args.adv_clip_k > 0))
    rules.append(("eval_max", "above 0", args.eval_max is None or args.eval_max > 0))
    rules.append(
        ("think_budgets", "0 or more", all(budget >= 0 for budget in args.think_budgets or ()))
    )
    if args.eval_only:
        rules.append(("eval_data", "given with --eval-only", args.eval_data is not None))
    else:
        divides = args.prompts_per_update % processes == 0
        rules.append(("prompts_per_update", f"a multiple of the {processes} processes", divides))
        rules.append(("train_data", "given, or --eval-only", args.train_data is not None))
        rules.append(("adapter", "left out: it goes with --eval-only", args.adapter is None))
        rules.append(
            ("think_budgets", "left out: it goes with --eval-only", args.think_budgets is None)
        )
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

    # Questions and clips first: they are quick to be wrong.
    train, heldout, wanted, skipped, version, note = load_questions(args)

    # Policy and reference.
    seed_everything(args.seed)
    model, processor = load_model(args, dtype)
    seconds = min(
        args.max_audio_seconds, getattr(processor.feature_extractor, "chunk_length", math.inf)
    )
    lengths = [
        soundfile.info(opened(clip)).duration
        for clip in {question.clip for question in (*train, *heldout)}
    ]
    note += f"; {sum(length > seconds for length in lengths)} clips are cut to {seconds:g} s"
    stop, banned = special_tokens(model, processor)
    if not stop:
        raise InputError(
            f"--model-id {args.model_id}: has no end-of-sequence token in tokenizer or generation "
            "config"
        )
    policy, frozen, optimizer = Policy(model, banned), None, None
    if args.eval_only:
        policy = network = accelerator.prepare_model(policy, evaluation_mode=True)
    else:
        if not args.lora_rank:
            # One audio tower is enough.
            shared = {id(p): p for p in policy.parameters() if not p.requires_grad}
            frozen = accelerator.prepare_model(
                copy.deepcopy(policy, shared).requires_grad_(False), evaluation_mode=True
            )
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
    if is_main and skipped:
        (run_dir / "skipped.json").write_text(json.dumps(skipped, indent=1))
    accelerator.print(
        f"{run_dir}: {note}; stop tokens {processor.tokenizer.convert_ids_to_tokens(stop)}"
    )

    def decode(ids: list[int]) -> str:
        return processor.tokenizer.decode(ids, skip_special_tokens=True)

    def reasoning_tokens(text: str) -> int:
        return len(processor.tokenizer(text, add_special_tokens=False).input_ids)

    def everyone_done(done: bool) -> bool:
        """Under FSDP every process must take part in every forward pass."""
        if accelerator.distributed_type != accelerate.DistributedType.FSDP:
            return done
        return bool(
            accelerator.reduce(torch.tensor(float(done), device=device), "sum") == processes
        )

    def embed(questions: list[Question], think_budget: int) -> list[Tensor]:
        """Each question and its clip, once: what the language model reads, [L,D]."""
        texts = [build_prompt(processor, question.row, think_budget) for question in questions]
        waves = [load_audio(question.clip, seconds) for question in questions]
        with accelerator.autocast():
            pairs = zip(texts, waves, strict=True)
            return [embed_question(policy, processor, text, wave, device) for text, wave in pairs]

    def draw(
        prompts: list[Tensor], uniforms: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Completions of some prompts: ids, mask and log-probabilities, [B,G,C]."""
        # Around the whole rollout: weights are converted to bf16 once, not at every token.
        with accelerator.autocast():
            return rollout(
                policy, prompts, uniforms.to(device), stop, temperature, everyone_done=everyone_done
            )

    def answer(questions: list[Question], think_budget: int) -> tuple[list[str], list[int]]:
        """The policy's answers to some questions, and their lengths in tokens."""
        seeds = [
            seed_everything(
                args.seed, 0, int(hashlib.sha1(q.row["id"].encode()).hexdigest()[:8], 16)
            )
            for q in questions
        ]
        uniforms = torch.stack(
            [torch.rand(1, args.max_completion_length, generator=generator) for generator in seeds]
        )
        tokens, mask, _ = draw(embed(questions, think_budget), uniforms, args.eval_temperature)
        texts, counts = flatten(tokens, mask, decode)[:2]
        return texts, counts

    def test(think_budget: int) -> tuple[dict[str, float], dict, list[dict]]:
        longest = args.max_completion_length
        return evaluate(
            answer,
            heldout,
            wanted,
            think_budget,
            longest,
            reasoning_tokens,
            accelerator,
            args.eval_batch,
        )

    about = {
        "model": args.model_id,
        "adapter": args.adapter,
        "questions": len(wanted),
        "skipped": len(skipped),
    }
    about |= version
    if args.eval_only:
        points = []
        for budget in args.think_budgets or (args.think_budget,):
            figures, scores, said = test(budget)
            points.append(
                {
                    "budget": budget,
                    "tokens": figures["reasoning_tokens"],
                    **scores["total"]["total"],
                }
            )
            if is_main:
                (run_dir / "samples" / f"predictions-{budget:03d}.json").write_text(
                    to_json(said, indent=1)
                )
                facts = about | {"think_budget": budget, "figures": figures, "scores": scores}
                (run_dir / f"mmau-{budget:03d}.json").write_text(to_json(facts, indent=2))
                (run_dir / f"mmau-{budget:03d}.md").write_text(score_table(scores))
                print(
                    f"\nthink budget {budget} words, {figures['reasoning_tokens']:.1f} reasoning "
                    "tokens used"
                )
                print(score_table({key: scores[key] for key in ("total", "task")}))
        if is_main and len(points) > 1:
            fit = scaling(points)
            (run_dir / "scaling.json").write_text(
                to_json(about | {"points": points} | fit, indent=2)
            )
            draw_scaling(points, fit, run_dir / "scaling.png")
            print(", ".join(f"{name} {value:.4g}" for name, value in fit.items()))
        accelerator.print(f"results in {run_dir}")
        return

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
        f"{args.method}, {processes} x {device.type}, {'bf16' if bf16 else 'fp32'}, {size:,} "
        f"trained parameters\neach iteration {groups} questions x {group} completions of at most "
        f"{args.max_completion_length} tokens, {args.updates_per_rollout} updates"
    )
    if group < 4:
        accelerator.print(
            f"warning: --group-size {group}: the mean of so few is a noisy baseline; 8 or more"
        )

    mix = torch.tensor(args.reward_weights)
    if checkpoint:
        base, metrics, scores = checkpoint["base"], checkpoint["metrics"], checkpoint["scores"]
    else:
        base, scores, said = test(args.think_budget)
        metrics = base
    writer = SummaryWriter(run_dir, purge_step=first + 1 if checkpoint else 0) if is_main else None
    if is_main and not checkpoint:
        write_completions(run_dir / "samples" / "000000.json", writer, 0, said)
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
        # 1. Rollout: the previous policy's completions, and their rewards. A clip is read and
        #    encoded once. Every process draws all random numbers and takes those of its own groups,
        #    so the result does not depend on the number of processes.
        started = synchronized_time(device)
        generator = seed_everything(args.seed, iteration + 1)
        asked = [train[row] for row in draw_prompts(len(train), groups, iteration, args.seed)[own]]
        prompts = embed(asked, args.think_budget)
        encoded = synchronized_time(device)
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
        texts, counts, ids = flatten(tokens, mask, decode)
        rows = [question.row for question in asked for _ in range(group)]
        values = score(texts, counts, rows, args.think_budget > 0, args.max_completion_length).to(
            device
        )
        every = (
            accelerator.gather(values).view(groups, group, len(REWARDS)).cpu()
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
        sizes = torch.tensor([max(len(prompt) for prompt in prompts), longest], device=device)
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
                if number not in ref_logp:
                    with reference_policy(policy, frozen) as reference:
                        ref_logp[number], _ = completion_log_probabilities(
                            reference, prompts[part], completions, args.temperature
                        )
                last = number + 1 == len(passes)
                with contextlib.nullcontext() if last else accelerator.no_sync(network):
                    logp, entropy = completion_log_probabilities(
                        network, prompts[part], completions, args.temperature
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
                progress = {
                    "iteration": iteration,
                    "metrics": metrics,
                    "base": base,
                    "scores": scores,
                }
                if is_main:
                    save_checkpoint(run_dir, progress, state)
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
        took = synchronized_time(device) - started
        zero_spread = (reward.std(1) < 1e-8).float().mean().item()
        record = {"reward/mean": reward.mean().item(), "reward/std": reward.std(1).mean().item()}
        record |= {"reward/frac_reward_zero_std": zero_spread}
        record |= {f"reward/{name}": every[..., i].mean().item() for i, name in enumerate(REWARDS)}
        record |= {"losses/total": (sums[0] / args.updates_per_rollout).item()}
        record |= {"losses/policy": (sums[1] / args.updates_per_rollout).item()}
        record |= {"losses/divergence": record["losses/total"] - record["losses/policy"]}
        record |= {"losses/grad_norm": (sums[7] / args.updates_per_rollout).item()}
        tags = ("kl", "entropy", "clip_ratio/region_mean", "sampling/sampling_logp_difference/mean")
        record |= dict(zip(tags, (sums[2:6] / sums[6]).tolist(), strict=True))
        limit = math.inf if args.adv_clip_k is None else args.adv_clip_k * args.beta0
        record |= coefficient_statistics(coefficient, advantage, limit)
        record["completions/mean_length"] = lengths.float().mean().item()
        record["completions/clipped_ratio"] = 1 - accelerator.gather(ended).mean().item()
        record["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        record["charts/seconds_audio"] = encoded - started
        record["charts/seconds_rollout"] = rolled_out - encoded
        record["charts/seconds_reward"] = rewarded - rolled_out
        record["charts/seconds_update"] = updated - rewarded
        record["charts/tokens_per_second"] = lengths.sum().item() / took
        record["charts/peak_memory_gb"] = peak_memory_gb(device)
        if last or done % args.eval_every == 0:
            metrics, scores, said = test(args.think_budget)
            record |= {f"eval/{name}": value for name, value in metrics.items()}
            if is_main:
                write_completions(run_dir / "samples" / f"{done:06d}.json", writer, done, said)
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
                progress = {"iteration": done, "metrics": metrics, "base": base, "scores": scores}
                save_checkpoint(run_dir, progress, state)

    # What other tools load, and the whole run in one file.
    weights_now = training_state(network, optimizer.optimizer)["model"]
    if is_main:
        writer.close()
        processor.save_pretrained(run_dir / "final")
        lines = save_final(run_dir / "final", policy.model, weights_now, args.model_id)
        summary = {
            "base": base,
            "final": metrics,
            "method": args.method,
            "iterations": args.iterations,
        }
        summary |= about | {"scores": scores}
        (run_dir / "summary.json").write_text(to_json(summary, indent=2))
        print(f"{'':22s}{'base':>10s}{'final':>10s}")
        for name, value in metrics.items():
            print(f"{name:22s}{base[name]:10.4f}{value:10.4f}")
        print(score_table({key: scores[key] for key in ("total", "task")}))
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
            "lower --train-tokens, --rollout-batch or --eval-batch, or add --gradient-checkpointing"
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
