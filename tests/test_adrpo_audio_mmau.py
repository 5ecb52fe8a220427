"""Tests of adrpo_audio_mmau.py on tiny random Qwen2-Audio and Qwen2.5-Omni models and synthetic
clips: MMAU's rule on its real questions (with ADRPO_DATA), what the model hears and its shared rows
against stock transformers, its loss against TRL's GRPOTrainer, and the program as a user runs it.
No downloads."""

import ast
import contextlib
import copy
import csv
import dataclasses
import inspect
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import accelerate
import datasets
import numpy as np
import peft
import pytest
import soundfile
import soxr
import torch
import tyro
from filelock import FileLock
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    Qwen2_5OmniConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioForConditionalGeneration,
)

import adrpo_audio_mmau as mmau
import adrpo_grpo_llm as llm
from benchmark import mmau_scaling
from tests import tiny_models

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "adrpo_audio_mmau.py"
DOCS = ROOT / "docs" / "adrpo_audio_mmau.md"
FAMILIES = list(tiny_models.AUDIO_FAMILIES)
STOCK = {
    "qwen2-audio": Qwen2AudioForConditionalGeneration,
    "omni": Qwen2_5OmniThinkerForConditionalGeneration,
}
STOP = [2, *range(11, 360, 8)]  # of the rollout tests: <|im_end|> alone is rare
CPU = torch.device("cpu")
SAYS = "<think> first pitch</think><answer> Man</answer>"
TIMING = re.compile(r"charts/(seconds_.*|tokens_per_second|peak_memory_gb)")
TINY = (
    "--cpu --precision fp32 --iterations 2 --prompts-per-update 2 --group-size 4 "
    "--max-completion-length 12"
)
TINY += (
    " --eval-every 1 --save-every 1 --learning-rate 1e-2 --lora-rank 4 --rollout-batch 8 "
    "--train-tokens 2048"
)
TINY += " --reward-weights 5 1 1 1 1 --eval-batch 2"
CHOICES = ["Man", "Woman", "Child", "Robot"]
DATA = Path(os.environ["ADRPO_DATA"]) / "mmau" if os.environ.get("ADRPO_DATA") else None
real_data = pytest.mark.skipif(
    DATA is None, reason="ADRPO_DATA is not set: no real MMAU questions here"
)


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniforms(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def sound(seconds, seed=0, rate=16000, pitch=300):
    """A noisy tone that gets louder, float32."""
    at = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(size=len(at))
    return (
        (0.2 * np.sin(2 * np.pi * pitch * (seed + 1) * at) + 0.05 * noise) * (0.2 + at / seconds)
    ).astype("float32")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of tiny models: one a family, random; `says FAMILY` mostly says SAYS."""
    folder = tmp_path_factory.mktemp("models")
    made = {family: tiny_models.make_audio_lm(folder / family, family) for family in FAMILIES}
    return made | {
        f"says {f}": tiny_models.make_audio_lm(folder / f"says-{f}", f, says=SAYS) for f in FAMILIES
    }


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with wavs/, train.jsonl of six questions and eval.json of three in MMAU's layout."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "wavs").mkdir()
    rows = []
    for i in range(9):
        soundfile.write(folder / "wavs" / f"{i}.wav", sound(0.4 + 0.1 * i, i), 16000)
        question = ("Who speaks?", "What is it that you hear first?", "Which option?")[i % 3]
        rows.append(
            {
                "audio": f"wavs/{i}.wav",
                "question": question,
                "choices": CHOICES,
                "answer": CHOICES[i % 2],
            }
        )
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    for i, row in enumerate(rows[6:]):
        row |= {
            "id": f"q{i}",
            "audio_id": f"./elsewhere/{Path(row.pop('audio')).name}",
            "task": mmau.TASKS[i],
        }
        row |= {
            "difficulty": ("easy", "hard", "easy")[i],
            "sub-category": f"sub {i}",
            "split": "test-mini",
        }
    (folder / "eval.json").write_text(json.dumps(rows[6:]))
    return folder


@pytest.fixture(scope="session")
def base_flags(models, files):
    flags = [
        "--model-id",
        models["says omni"],
        "--train-data",
        files / "train.jsonl",
        "--eval-data",
    ]
    flags += [files / "eval.json", "--eval-audio-dir", files / "wavs"]
    return [*TINY.split(), *map(str, flags)]


@pytest.fixture(scope="session")
def eval_flags(models, files):
    flags = [
        "--cpu",
        "--eval-only",
        "--max-completion-length",
        "12",
        "--model-id",
        models["says omni"],
    ]
    flags += ["--eval-data", files / "eval.json", "--eval-audio-dir", files / "wavs"]
    return [str(flag) for flag in flags]


def reset_accelerate():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def run_script(*flags):
    """The script with these flags, in this process: (exit message or code, standard output,
    standard error)."""
    reset_accelerate()
    arguments, code = sys.argv, 0
    sys.argv = [str(SCRIPT), *map(str, flags)]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as exit_:
        code = exit_.code
    finally:
        sys.argv = arguments
    return code, out.getvalue(), err.getvalue()


def replaced(flags, *others):
    """These flags with others, each with its values, in place of those of the same name."""
    found = {}
    for word in map(str, (*flags, *others)):
        if word.startswith("--"):
            name = word.replace("_", "-")
            found[name] = []
        else:
            found[name].append(word)
    return [word for name, values in found.items() for word in (name, *values)]


def finish(*flags):
    code, out, err = run_script(*replaced(flags))
    assert code == 0, (code, err[-2000:])
    return out


def refused(*flags):
    code, _, err = run_script(*replaced(flags))
    assert isinstance(code, str), (code, err[-500:])
    assert code.startswith("error: ")
    assert len(code.splitlines()) == 1
    return code


def run_in_two_processes(*flags):
    launcher = "import torch.distributed.run as launcher; launcher.main()"
    command = [sys.executable, "-c", launcher, "--standalone", "--nproc-per-node", "2", SCRIPT]
    command = [*map(str, command), *replaced(flags)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


def read_metrics(run, timing=False):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if timing or not TIMING.fullmatch(name)}
        for row in rows
    ]


def weights(run):
    (file,) = (run / "final").glob("*model.safetensors")
    return load_file(file)


def change(one, other, base):
    """Size of the difference of two runs' weights, in sizes of the first one's change from
    `base`."""
    difference = sum((one[name] - other[name]).square().sum() for name in one)
    return math.sqrt(difference / sum((one[name] - base[name]).square().sum() for name in one))


def assert_same_run(one, other, base=None, tolerance=0.0):
    """Same weights, same metrics: bit for bit, or as far as `tolerance`, relative to what was
    learnt since `base`."""
    if tolerance:
        assert change(weights(one), weights(other), base) < tolerance
    else:
        torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)
    rows, others = read_metrics(one), read_metrics(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, match in zip(rows, others, strict=True):
        assert row == pytest.approx(match, rel=tolerance, abs=tolerance / 100, nan_ok=True)


# -------------------------------------------------------------------------- A. MMAU's rule, rewards


def official(answer, prediction, choices):
    """MMAU's evaluation.py, `string_match`, again: no regular expressions."""

    def tokens(text):
        return set("".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split())

    said, right = tokens(prediction), tokens(answer)
    forbidden = set()
    for choice in choices:
        if tokens(choice) != right:
            forbidden |= tokens(choice) - right
    return bool(said) and right.issubset(said) and said.isdisjoint(forbidden)


HAND = [
    ("Man", "Man", ["Man", "Woman"], True),
    ("Man", "(a) MAN.", ["Man", "Woman"], True),
    ("Man", "woman", ["Man", "Woman"], False),  # words, not letters
    ("Man", "Man, not Woman", ["Man", "Woman"], False),
    ("Man", "", ["Man", "Woman"], False),
    ("Man", " ?! ", ["Man", "Woman"], False),
    ("a red car", "car red a", ["a red car", "a blue car"], True),  # sets
    ("a red car", "red car", ["a red car", "a blue car"], False),
    ("a car", "a red car", ["a car", "a red car"], False),  # "red" is only in a wrong choice
    ("a red car", "a red car", ["a car", "a red car"], True),
    ("man", "man", ["Man", "man", "MAN!"], True),
    ("4/4", "It is 4 4 time", ["4/4", "3/4"], True),
    ("4/4", "3/4", ["4/4", "3/4"], False),
    ("don't", "don t", ["don't", "do"], True),
    ("über_all", "ÜBER_ALL", ["über_all", "über all"], True),
]


@pytest.mark.parametrize("answer,prediction,choices,right", HAND)
def test_the_rule_by_hand(answer, prediction, choices, right):
    assert (
        mmau.mmau_match(answer, prediction, choices)
        == right
        == official(answer, prediction, choices)
    )


@real_data
def test_the_rule_is_the_official_one_on_all_real_questions():
    rows = mmau.read_questions("eval-data", str(DATA / "mmau-test-mini.json"), None, mmau.Data())
    assert len(rows) == 1000
    assert {row["task"] for row in rows} == set(mmau.TASKS)
    counts = {True: 0, False: 0}
    for number, row in enumerate(rows):
        answer, choices = row["answer"], row["choices"]
        other = rows[(number * 7 + 3) % 1000]
        said = [
            *choices,
            *(f"({letter}) {choice}" for letter, choice in zip("ABCDEFGH", choices, strict=False)),
        ]
        said += [
            f"The answer is {answer}, because of what I hear.",
            f"not {answer}",
            answer.upper() + "!",
            answer[:-1],
        ]
        said += [
            ", ".join(choices),
            f"{answer} {choices[number % len(choices)]}",
            " ".join(answer.split()[::-1]),
        ]
        said += [
            " ".join(answer.split()[1:]),
            answer.replace(" ", "_"),
            answer.replace("-", " "),
            f"{answer}s",
            "",
            "?",
        ]
        said += [
            other["answer"],
            row["question"],
            f"{row['question']} {answer}",
            answer + choices[-1],
            answer[1:],
        ]
        for prediction in said:
            right = mmau.mmau_match(answer, prediction, choices)
            assert right == official(answer, prediction, choices), (row["id"], prediction)
            counts[right] += 1
        assert mmau.mmau_match(answer, answer, choices)
    assert min(counts.values()) > 3000
    for predictions, expected in (
        ({r["id"]: r["answer"] for r in rows}, 100),
        ({r["id"]: "" for r in rows}, 0),
    ):
        assert mmau.mmau_scores(rows, predictions)["total"]["total"]["accuracy"] == expected


def test_scores_against_a_loop_and_a_missing_prediction_is_wrong():
    random, rows = np.random.default_rng(0), []
    for i in range(60):
        row = {
            "id": f"{i}",
            "question": "?",
            "choices": CHOICES,
            "answer": CHOICES[i % 4],
            "task": mmau.TASKS[i % 3],
        }
        rows.append(
            row
            | (
                {"difficulty": ("easy", "hard")[i % 2], "sub-category": f"s{i % 5}"}
                if i < 50
                else {}
            )
        )
    predictions = {row["id"]: CHOICES[random.integers(4)] for row in rows[:45]}
    scores = mmau.mmau_scores(rows, predictions)
    right = {row["id"]: predictions.get(row["id"]) == row["answer"] for row in rows}
    for key, groups in scores.items():
        names = {"total"} if key == "total" else {row[key] for row in rows if key in row}
        assert set(groups) == names
        for name, got in groups.items():
            found = [right[row["id"]] for row in rows if key == "total" or row.get(key) == name]
            assert (got["right"], got["count"]) == (sum(found), len(found))
            assert got["accuracy"] == pytest.approx(100 * np.mean(found))
            interval = stats.binomtest(sum(found), len(found)).proportion_ci(0.95, method="wilson")
            # z is 1.96
            assert (got["low"], got["high"]) == pytest.approx([100 * x for x in interval], abs=1e-2)
    assert 0 < scores["total"]["total"]["right"] < 45
    assert list(mmau.mmau_scores([rows[0] | {"task": ["a", 1]}], {})["task"]) == ["['a', 1]"]
    table = mmau.score_table(scores)
    assert all(line.count("|") == 6 for line in table.splitlines())
    assert f"| total | {scores['total']['total']['accuracy']:.2f} |" in table


COUNTS = [(0, 7), (7, 7), (3, 11), (500, 1000), (1, 1), *[(n, n) for n in range(2, 40)]]


@pytest.mark.parametrize("right,count", COUNTS)
def test_wilson_is_scipys(right, count):
    z = stats.norm.ppf(0.975)
    interval = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    low, high = mmau.wilson(right, count, z)
    assert (low, high) == pytest.approx(tuple(interval), abs=1e-12)
    assert 0 <= low <= right / count <= high <= 1  # also after rounding: a figure draws the gaps


BLOCKS = [
    ("<answer>Man</answer>", "Man"),
    ("<answer> Man\nor so </answer> x", "Man\nor so"),
    ("<answer>Man</answer><answer>Woman</answer>", "Woman"),  # the last
    ("<answer>Man</answer><answer>Woman", "Man"),  # not closed: not given
    ("<answer>Man", ""),
    ("Man</answer>", ""),
    ("Man", ""),
    ("<answer></answer>", ""),
    ("<answer>a<answer>b</answer>", "b"),
    ("<answer>a<answer>b</answer>c</answer>", "b"),
    ("<think>I write <answer>x</answer></think><answer>y</answer>", "y"),
    ("<answer><think>x</think>y</answer>", "x y"),
    ("<ANSWER>Man</ANSWER>", ""),
]


@pytest.mark.parametrize("text,inside", BLOCKS)
def test_block_is_the_last_complete_one(text, inside):
    assert " ".join(mmau.block(text, "answer").split()) == " ".join(inside.split())


def test_block_takes_no_time_on_a_hostile_text():
    started = time.perf_counter()
    for text in (
        "<answer>" * 4000,
        "<answer>a" * 4000 + "</answer>",
        "<" * 30000,
        "<think>" + " </think" * 4000,
    ):
        mmau.block(text, "answer"), mmau.reward_format(text, True), mmau.reward_format(text, False)
    assert time.perf_counter() - started < 2


FORMATS = [
    ("<think>a</think><answer>b</answer>", 1, 0),
    (" <think>a\nb</think>\n\n<answer>b</answer>\n", 1, 0),
    ("<answer>b</answer>", 0, 1),
    ("\n<answer>b</answer> ", 0, 1),
    ("<think>a</think><answer>b</answer>.", 0, 0),
    ("well <think>a</think><answer>b</answer>", 0, 0),
    ("<think>a</think><think>a</think><answer>b</answer>", 0, 0),
    ("<think>a</think><answer>b</answer><answer>b</answer>", 0, 0),
    ("<think>a<answer>c</answer></think><answer>b</answer>", 0, 0),
    ("<think></think><answer>b</answer>", 0, 0),
    ("<think>a</think><answer></answer>", 0, 0),
    ("<answer>b</answer><think>a</think>", 0, 0),
    ("<think>a</think><answer>b", 0, 0),
    ("", 0, 0),
]


@pytest.mark.parametrize("text,thinking,direct", FORMATS)
def test_format_reward(text, thinking, direct):
    assert (mmau.reward_format(text, True), mmau.reward_format(text, False)) == (thinking, direct)


def test_rewards_by_hand_and_their_bounds():
    row = {"question": "Which bird is it?", "choices": ["an owl", "a crow"], "answer": "an owl"}
    text = (
        "<think>First, I hear a low pitch, so it is the owl: then noise, rhythm, tempo.</think>"
        "<answer>An owl</answer>"
    )
    # concepts: reasoning {first hear low pitch owl noise rhythm tempo}, answer {owl}, question
    # {bird owl crow}
    assert mmau.concepts("The OWL, the owl & a crow's") == {"owl", "crow", "s"}
    assert mmau.reward_accuracy(text, row) == 1
    assert mmau.reward_consistency(text, row) == pytest.approx(1 / 8 + 1 / 8)
    # first then; so; pitch noise rhythm tempo
    assert mmau.reward_keywords(text) == pytest.approx(2 / 3 + 1 / 3 + 1)
    assert mmau.reward_overthinking(3, 12) == 0.75
    args = mmau.Args(max_completion_length=12)
    values = mmau.score([text, "nothing"], [3, 12], [row, row], {}, args)
    torch.testing.assert_close(values, torch.tensor([[1, 1, 0.25, 2, 0.75], [0, 0, 0, 0, 0]]))
    assert values.dtype == torch.float32
    same = "<think>owl crow bird</think><answer>owl crow bird</answer>"
    assert mmau.reward_consistency(same, row) == 2
    every = " ".join([mmau.PATTERN_WORDS, mmau.LOGIC_WORDS, mmau.DOMAIN_WORDS])
    assert mmau.reward_keywords(f"<think>{every} {every}</think>") == 3
    assert mmau.reward_keywords(f"<answer>{every}</answer>") == 0  # only reasoning counts
    # different entries
    assert mmau.reward_keywords("<think>so so so</think>") == pytest.approx(1 / 3)
    assert mmau.reward_consistency("<answer>owl</answer>", row) == 0
    assert mmau.overlap(set(), set()) == 0
    lists = [text.split() for text in (mmau.PATTERN_WORDS, mmau.LOGIC_WORDS, mmau.DOMAIN_WORDS)]
    # others could not be found
    assert all(mmau.words(entry) == [entry] for entries in lists for entry in entries)
    assert sum(map(len, lists)) == len(set().union(*lists))  # nothing counts twice


def test_scaling_against_lstsq_and_the_sweet_spot():
    random = np.random.default_rng(3)
    budgets = [25, 0, 50, 100, 150]
    points = [
        {"budget": b, "tokens": 0.7 * b + random.random(), "accuracy": 60 + 9 * random.random()}
        for b in budgets
    ]
    x, y = (np.array([p[name] for p in points]) for name in ("tokens", "accuracy"))
    got = mmau_scaling.scaling(points)
    assert got["slope"] == pytest.approx(
        np.linalg.lstsq(np.stack([x, np.ones(5)], 1), y, rcond=None)[0][0]
    )
    assert got["slope_pinned"] == pytest.approx(
        np.linalg.lstsq(x[:, None], y - y[1], rcond=None)[0][0]
    )
    assert got["sweet_spot_accuracy"] == max(y)
    assert got["sweet_spot_tokens"] == x[y.argmax()]
    without = mmau_scaling.scaling([point for point in points if point["budget"]])
    assert without["slope_pinned"] is None
    flat = mmau_scaling.scaling([{"budget": b, "tokens": 0.0, "accuracy": 50.0} for b in (0, 25)])
    assert flat["slope"] is flat["slope_pinned"] is None


# -------------------------------------------------------------------- B. against stock transformers


ASKED = [
    (0.9, "Who speaks?", 3),
    (0.3, "Which is it that you hear, and what came first?", 1),
    (1.6, "What?", 2),
]


class Setup(SimpleNamespace):
    """policy, processor, args, banned; texts, waves; inputs: the stock processor's, one a question;
    batch: the script's own, of all of them."""


def prepare(folder, *, rank=0, asked=ASKED, **flags):
    """The policy as the script builds it, its LoRA not zero, and some questions."""
    args = mmau.Args(model_id=str(folder), lora_rank=rank, max_completion_length=10, **flags)
    torch.manual_seed(4)
    processor = AutoProcessor.from_pretrained(folder)
    texts, waves, inputs = [], [], []
    for seed, (seconds, question, choices) in enumerate(asked):
        waves.append(sound(seconds, seed))
        row = {"question": question, "choices": CHOICES[:choices]}
        texts.append(mmau.build_prompt(processor, row, 50))
        options = {"sampling_rate": 16000, "return_tensors": "pt"}
        inputs.append(processor(text=texts[-1], audio=waves[-1:], **options))
    batch = mmau.encode(AutoProcessor.from_pretrained(folder), texts, waves)
    longest = batch["input_ids"].shape[1]
    policy = mmau.load_policy(args, (str(folder), None), processor, longest, CPU, False)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    banned = mmau.placeholders(processor)
    own = {"texts": texts, "waves": waves, "inputs": inputs, "batch": batch}
    return Setup(policy=policy, processor=processor, args=args, banned=banned, **own)


def stock_copy(family, folder, policy):
    """The policy's weights in a stock model."""
    model = STOCK[family].from_pretrained(folder)
    if isinstance(policy.model, peft.PeftModel):
        model = peft.get_peft_model(model, policy.model.peft_config["default"])
    model.load_state_dict(policy.model.state_dict())
    return model.eval()


def plain(model, inputs, completions, banned, temperature):
    """Log-probabilities and entropies of completions [B,G,C]: each a sequence of its own, its clip
    heard anew."""
    logp, entropy = torch.zeros(completions.shape), torch.zeros(completions.shape)
    for i, one in enumerate(inputs):
        for j, completion in enumerate(completions[i]):
            ids = torch.cat([one["input_ids"], completion[None]], dim=1)
            logits = model(
                **one | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            ).logits
            logits = logits[0, one["input_ids"].shape[1] - 1 : -1].clone()
            logits[:, banned] = -1e9
            pi = torch.distributions.Categorical(logits=logits / temperature)
            logp[i, j], entropy[i, j] = pi.log_prob(completion), pi.entropy()
    return logp, entropy


def trained_passes(it, completions, mask, temperature):
    """The script's log-probabilities and entropies of completions [B,G,C], and a backward pass from
    the former, weighted."""
    policy = it.policy._replace(temperature=temperature)
    batch = mmau.Batch(it.batch, completions.flatten(0, 1), mask.flatten(0, 1))
    logp, entropy = torch.zeros(batch.kept.shape), torch.zeros(batch.kept.shape)
    factors = mask.flatten(0, 1) * numbers(*mask.shape, seed=9).flatten(0, 1)
    for at, some, spread in mmau.completion_passes(policy, policy.model, batch, it.args):
        logp[at], entropy[at] = some.detach(), spread
        if some.requires_grad:
            (some * factors[at]).sum().backward()
    return logp.view(mask.shape), entropy.view(mask.shape)


def ragged(rows=3, group=3, size=5, seed=0):
    """Completions [B,G,C] and their mask, of 1 to C tokens."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(1, size + 1, (rows, group), generator=generator)
    ends[0, 0], ends[1, 1] = size, 1
    mask = torch.arange(size) < ends[..., None]
    return torch.randint(10, 360, mask.shape, generator=generator) * mask, mask


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def roll(it, chance, temperature=1.0, stop=STOP, at_once=64):
    """The script's tokens, mask and log-probabilities, [B,G,C] each."""
    policy = it.policy._replace(temperature=temperature, stop=stop)
    parts = mmau.rollout(policy, it.batch, chance, at_once)
    return [part.unflatten(0, chance.shape[:2]) for part in parts]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_it_reads_what_the_stock_model_reads(models, family):
    """Clips of different lengths in one batch, against each alone."""
    it = prepare(models[family], rank=4)
    stock = stock_copy(family, models[family], it.policy)
    got, cache = mmau.read_prompts(it.policy.model, it.batch)
    assert got.shape[:2] == (3, 1)
    for logits, one in zip(got, it.inputs, strict=True):
        torch.testing.assert_close(logits, stock(**one).logits[0, -1:], rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == it.batch["input_ids"].shape[1]
    assert len({one["input_ids"].shape[1] for one in it.inputs}) == 3


@pytest.mark.parametrize("seconds", [0.1, 1.97, 300])
def test_omnis_window_of_300_seconds_is_not_filled_and_the_spectrogram_stays_the_same(
    tmp_path, seconds
):
    processor = AutoProcessor.from_pretrained(
        tiny_models.make_audio_lm(tmp_path, "omni", seconds=300)
    )
    wave = np.tile(sound(min(seconds, 2)), 150)[: round(seconds * 16000)]
    text = mmau.build_prompt(processor, {"question": "?", "choices": CHOICES}, 50)
    got = mmau.encode(processor, [text], [wave])
    stock = processor(text=text, audio=[wave], sampling_rate=16000, return_tensors="pt")
    assert (
        got["input_features"].shape[2] <= 100 * seconds + 5 < stock["input_features"].shape[2] + 6
    )
    heard = [
        one["input_features"][:, :, one["feature_attention_mask"][0].bool()] for one in (got, stock)
    ]
    assert torch.equal(*heard)
    assert torch.equal(got["input_ids"], stock["input_ids"])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_it_hears(models, family):
    it = prepare(models[family])
    text = mmau.build_prompt(it.processor, {"question": "Who?", "choices": CHOICES}, 50)
    waves = [sound(1, 0), sound(1, 1), np.zeros(16000, "float32"), sound(1, 0)]
    inputs = mmau.encode(it.processor, [text] * 4, waves)
    assert all(torch.equal(ids, inputs["input_ids"][0]) for ids in inputs["input_ids"])
    heard = inputs["input_ids"][0] == it.processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    assert heard.sum() == 25  # one for every 40 ms
    answers, _ = mmau.read_prompts(it.policy.model, inputs)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (answers[one] - answers[other]).abs().max() > 0.1
    torch.testing.assert_close(answers[0], answers[3])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_in_the_audio_tower_is_off(models, tmp_path, family):
    folder = tmp_path / "model"
    shutil.copytree(models[family], folder)
    config = json.loads((folder / "config.json").read_text())
    drops = ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop")
    config["audio_config"] |= dict.fromkeys(drops, 0.5)
    (folder / "config.json").write_text(json.dumps(config))
    completions, mask = ragged()
    for checkpointing in (False, True):
        both = [prepare(f, gradient_checkpointing=checkpointing) for f in (folder, models[family])]
        one, other = (trained_passes(it, completions, mask, 1.0)[0] for it in both)
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_processor_that_makes_nothing_of_the_clip_is_an_error(models, family):
    processor = AutoProcessor.from_pretrained(models[family])
    text = mmau.build_prompt(processor, {"question": "Who?", "choices": CHOICES}, 50)

    class Deaf:
        tokenizer, audio_token = processor.tokenizer, processor.audio_token

        def __call__(self, text, **_):
            texts = [one.replace("<|AUDIO|>", "") for one in text]
            return processor(text=texts, return_tensors="pt")

    with pytest.raises(mmau.InputError, match="no audio features"):
        mmau.encode(Deaf(), [text], [sound(1)])
    # a template without a place for the clip
    with pytest.raises(mmau.InputError, match="no audio features"):
        mmau.encode(processor, [text.replace("<|AUDIO|>", "")], [sound(1)])


def test_the_thinker_of_a_whole_omni_folder(models, tmp_path):
    """The hub's Qwen2.5-Omni has its thinker's weights under `thinker.`, and talker and vocoder
    beside it."""
    whole = tmp_path / "whole"
    shutil.copytree(models["omni"], whole)
    thinker = load_file(whole / "model.safetensors")
    state = {f"thinker.{name}": tensor for name, tensor in thinker.items()} | {
        "talker.x": torch.ones(1)
    }
    save_file(state, whole / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((whole / "config.json").read_text())
    assert config["model_type"] == "qwen2_5_omni_thinker"
    Qwen2_5OmniConfig(thinker_config=config).save_pretrained(whole)
    assert json.loads((whole / "config.json").read_text())["model_type"] == "qwen2_5_omni"
    one, other = prepare(models["omni"]).policy, prepare(whole).policy
    states = one.model.state_dict(), other.model.state_dict()
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert one.stop == other.stop
    assert torch.equal(one.unreadable, other.unreadable)


# --------------------------------------------------------------- C. rollout, training pass and loss


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_the_training_passes_are_separate_sequences(models, family, rank):
    """Log-probabilities, entropies and gradients, of clips of different lengths, however the passes
    are cut, and with gradient checkpointing."""
    completions, mask = ragged()
    it = prepare(models[family], rank=rank)
    trained = {name for name, p in it.policy.model.named_parameters() if p.requires_grad}
    stock = stock_copy(family, models[family], it.policy)
    expected, spread = plain(stock, it.inputs, completions, it.banned, 0.7)
    (expected * mask * numbers(*mask.shape, seed=9)).sum().backward()
    theirs = {name: value for name, value in gradients(stock).items() if name in trained}
    assert trained == set(theirs)
    assert all((value != 0).any() for value in theirs.values())
    longest = it.policy.lengths[0]
    for flags in ({}, {"train_tokens": 2 * longest}, {"train_tokens": 20}):
        it = prepare(models[family], rank=rank, **flags)
        logp, entropy = trained_passes(it, completions, mask, 0.7)
        torch.testing.assert_close(logp[mask], expected[mask], rtol=1e-5, atol=5e-5)
        torch.testing.assert_close(entropy[mask], spread[mask], rtol=1e-4, atol=5e-5)
        torch.testing.assert_close(gradients(it.policy.model), theirs, rtol=1e-3, atol=2e-4)
    it = prepare(models[family], rank=rank, gradient_checkpointing=True)
    logp, _ = trained_passes(it, completions, mask, 0.7)
    torch.testing.assert_close(logp[mask], expected[mask], rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(gradients(it.policy.model), theirs, rtol=1e-3, atol=2e-4)
    assert logp[mask].std() > 1


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_greedy_rollouts_are_those_of_stock_generate(models, family, rank):
    asked = [(0.2 + 0.1 * i, f"What? {'you ' * (i * 5 % 7)}", 1 + i % 4) for i in range(9)]
    it = prepare(models[family], rank=rank, asked=asked)
    assert it.policy.static is not None
    head = it.policy.model.get_output_embeddings().weight
    # one of them is the likeliest
    head[it.banned[0]], head[it.banned[1]] = numbers(32) * 3, numbers(32) * -3
    stock = stock_copy(family, models[family], it.policy)
    tokens, mask, logp = roll(it, uniforms(9, 2, 10), 0.0, at_once=4)
    options = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": STOP, "pad_token_id": 0}
    lengths, wanted = set(), 0
    for i, one in enumerate(it.inputs):
        size = one["input_ids"].shape[1]
        expected = stock.generate(**one, **options, suppress_tokens=it.banned)[0, size:].tolist()
        wanted += bool(set(stock.generate(**one, **options)[0, size:].tolist()) & set(it.banned))
        assert tokens[i, 0][mask[i, 0]].tolist() == tokens[i, 1][mask[i, 1]].tolist() == expected
        lengths.add(len(expected))
    assert wanted > 5  # without the ban these would have been said
    assert len(lengths) > 2
    trained, _ = trained_passes(it, tokens, mask, 1.0)
    torch.testing.assert_close(logp[mask], trained[mask], rtol=1e-4, atol=5e-5)


def slow_completion(model, inputs, chance, banned, temperature):
    """One completion, without a cache: at each step the stock model hears and reads everything
    again."""
    ids, start = inputs["input_ids"], inputs["input_ids"].shape[1]
    for number in chance.tolist():
        logits = (
            model(**inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            .logits[0, -1]
            .double()
        )
        logits[banned] = -math.inf
        cumulative = (logits / temperature).softmax(-1).cumsum(-1)
        ids = torch.cat([ids, (cumulative <= number).sum().view(1, 1)], dim=1)
        if int(ids[0, -1]) in STOP:
            break
    return ids[0, start:].tolist()


@torch.no_grad()
@pytest.mark.parametrize("family,rank,temperature", [("qwen2-audio", 4, 1.0), ("omni", 0, 1.5)])
def test_sampled_rollouts_against_a_slow_loop(models, family, rank, temperature):
    it = prepare(models[family], rank=rank)
    stock, chance = stock_copy(family, models[family], it.policy), uniforms(3, 5, 10)
    tokens, mask, logp = roll(it, chance, temperature)
    for i, one in enumerate(it.inputs):
        for j in range(5):
            expected = slow_completion(stock, one, chance[i, j], it.banned, temperature)
            assert tokens[i, j][mask[i, j]].tolist() == expected
    alone, kept, _ = roll(it, chance, temperature, at_once=1)
    assert torch.equal(kept, mask)
    assert torch.equal(alone[kept], tokens[mask])
    assert len(set(mask.sum(2).flatten().tolist())) > 2
    trained, _ = trained_passes(it, tokens, mask, temperature)
    torch.testing.assert_close(logp[mask], trained[mask], rtol=1e-4, atol=5e-5)


@torch.no_grad()
def test_padding_a_batch_full_changes_nothing(models):
    """As on a GPU: every batch has one shape, for which `generate` is compiled."""
    it, chance = prepare(models["omni"]), uniforms(3, 2, 10)
    tokens, mask, _ = roll(it, chance)
    lengths = it.policy.lengths[0] + 7, 10
    it.policy = it.policy._replace(full=True, lengths=lengths, static={})
    full, kept, _ = roll(it, chance, at_once=2)
    assert torch.equal(kept, mask)
    assert torch.equal(full[kept], tokens[mask])
    assert [*it.policy.static] == [(4, sum(lengths))]


@torch.no_grad()
def test_banned_tokens_are_never_sampled(models):
    it = prepare(models["omni"])
    names = (
        "<|AUDIO|> <|audio_bos|> <|audio_eos|> <|IMAGE|> <|vision_bos|> <|vision_eos|> <|VIDEO|>"
    )
    assert it.banned == sorted(it.processor.tokenizer.convert_tokens_to_ids(names.split()))
    head = it.policy.model.get_output_embeddings().weight
    for token in it.banned:
        head[token] = numbers(32, seed=token) * 3
    tokens, mask, logp = roll(it, uniforms(3, 64, 10), 5.0)
    assert not torch.isin(tokens, torch.tensor(it.banned)).any()
    assert logp.isfinite().all()
    _, entropy = trained_passes(it, tokens[:, :2], mask[:, :2], 5.0)
    assert entropy.isfinite().all()


def test_trained_are_the_layers_and_the_head_of_the_language_model(models):
    for family in FAMILIES:
        model = prepare(models[family]).policy.model
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        ours = re.compile(r"model\.language_model\.(layers|norm)\..*|lm_head\.weight")
        assert trained == {name for name in model.state_dict() if ours.fullmatch(name)}


OF_TEXT = "group_advantage adaptive_beta kl_k3 grpo_loss adrpo_statistics seed_everything"
OF_TEXT += " draw_prompts scaled_logits ChooseByUniform read_completions token_log_probabilities"
OF_TEXT += " reference_log_probabilities load_plugin naming find_model load_verified load_adapter"
OF_TEXT += " renew_sampler stop_tokens create_run find_run lock_run log write_safely"
OF_TEXT += " load_checkpoint training_state restore save_model choose_dtype InputError"


@pytest.mark.parametrize("name", OF_TEXT.split())
def test_what_the_text_script_has_too_is_the_same(name):
    """The text script's loss and gradients are compared with TRL's in its tests; and copies must
    not drift apart."""
    assert inspect.getsource(getattr(mmau, name)) == inspect.getsource(getattr(llm, name))


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    """TRL's GRPOTrainer of a text model: it knows no embeddings, and is handed this policy's
    log-probabilities."""
    trl = pytest.importorskip("trl")
    folder = tiny_models.make_lm(tmp_path_factory.mktemp("trl") / "lm", "qwen3")
    options = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "max_steps": 1,
    }
    options |= {
        "loss_type": "grpo",
        "beta": 0.04,
        "epsilon": 0.2,
        "scale_rewards": "group",
        "temperature": 1.0,
    }
    options |= {
        "use_bias_correction_kl": False,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
    }
    reset_accelerate()
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        processing_class=AutoTokenizer.from_pretrained(folder),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(**options, output_dir=str(folder)),
        train_dataset=datasets.Dataset.from_list([{"prompt": "one"}] * 8),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_grpo_is_trls(models, trl_trainer, family):
    it, (completions, kept) = prepare(models[family], rank=4), ragged(rows=2, group=4)
    rewards = numbers(2, 4, seed=5)
    completions, kept = completions.flatten(0, 1), kept.flatten(0, 1)
    batch = mmau.Batch(mmau.take(it.batch, slice(0, 2)), completions, kept)
    ((_, logp, entropy),) = mmau.completion_passes(it.policy, it.policy.model, batch, it.args)
    ref_logp = mmau.reference_log_probabilities(it.policy, batch, it.args)
    old = logp.detach() + 0.2 * numbers(*logp.shape, seed=6)
    advantage = mmau.group_advantage(rewards).flatten()
    loss = mmau.grpo_loss(logp, old, ref_logp, advantage, torch.full((8,), 0.04), kept, 0.2)
    mine = torch.autograd.grad(loss, logp, retain_graph=True)

    trl_trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logp, entropy, None)
    batch = {
        "prompt_ids": torch.zeros(8, 1, dtype=torch.long),
        "prompt_mask": torch.ones(8, 1, dtype=torch.long),
    }
    batch |= {
        "completion_ids": completions,
        "completion_mask": kept.long(),
        "advantages": advantage,
    }
    batch |= {
        "old_per_token_logps": old,
        "ref_per_token_logps": ref_logp,
        "num_items_in_batch": kept.sum(),
    }
    theirs = trl_trainer._compute_loss(trl_trainer.model, batch)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    torch.testing.assert_close(mine, torch.autograd.grad(theirs, logp), rtol=1e-4, atol=1e-7)
    assert 0.2 < (((logp - old).exp() - 1).abs() > 0.2)[kept].float().mean() < 0.9
    assert (logp - ref_logp)[kept].abs().max() > 0.01


# ----------------------------------------------------------------- D. the program as a user runs it


KINDS = {
    "adrpo": [],
    "grpo": ["--method", "grpo"],
    "full": ["--lora-rank", "0", "--learning-rate", "1e-3"],
}
KIND_MODELS = {"adrpo": "says omni", "grpo": "says qwen2-audio", "full": "says qwen2-audio"}


@pytest.fixture(scope="session")
def runs(models, base_flags, tmp_path_factory):
    """Finished runs: {kind: (folder, standard output)}."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for kind, flags in KINDS.items():
        own = [
            "--model-id",
            models[KIND_MODELS[kind]],
            "--output-dir",
            folder,
            "--run-name",
            kind,
            *flags,
        ]
        made[kind] = folder / kind, finish(*base_flags, *own)
    return made


@pytest.fixture(scope="session")
def base(base_flags, tmp_path_factory):
    """The LoRA before training, as in final/."""
    folder = tmp_path_factory.mktemp("base")
    still = ["--learning-rate", "1e-30", "--iterations", "1"]
    finish(*base_flags, "--output-dir", folder, "--run-name", "r", *still)
    return weights(folder / "r")


def official_script(rows):
    """MMAU's evaluation.py again: rows without `model_output` do not count. {task or total:
    percent}."""
    right, count = {}, {}
    for row in rows:
        if "model_output" not in row:
            continue
        for key in (row["task"], "total"):
            count[key] = count.get(key, 0) + 1
            right[key] = right.get(key, 0) + official(
                row["answer"], row["model_output"], row["choices"]
            )
    return {key: 100 * right[key] / count[key] for key in count}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_everything_behind(runs, base, models, files, kind):
    run, out = runs[kind]
    names = {
        str(path.relative_to(run))
        for path in run.rglob("*")
        if path.is_file() and "tfevents" not in path.name
    }
    expected = {"args.json", "metrics.jsonl", "summary.json", "mmau.md", ".lock"}
    expected |= {"checkpoint.pt", "checkpoint-previous.pt"}
    expected |= {f"samples/{step:06d}.json" for step in range(3)} | {"final/tokenizer.json"}
    expected |= {"final/config.json" if kind == "full" else "final/adapter_config.json"}
    if kind != "full":
        expected |= {f"adapters/{step:06d}/adapter_model.safetensors" for step in (1, 2)}
        kept = load_file(run / "adapters/000002/adapter_model.safetensors")
        torch.testing.assert_close(kept, weights(run), rtol=0, atol=0)
    exported = ("final/", "adapters/")
    assert expected == {name for name in names if not name.startswith(exported) or name in expected}
    assert "6 training questions, 3 for evaluation; 0 clips are cut to 4 s" in out
    assert "stop tokens ['<|im_end|>']" in out
    assert str(run / "final") in out
    rows = read_metrics(run, timing=True)
    read_strictly(run)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[1]["kl"] == rows[1]["losses/divergence"] == rows[1]["clip_ratio/region_mean"] == 0
    assert rows[2]["kl"] > 0
    assert rows[1]["sampling/sampling_logp_difference/mean"] < 1e-5
    assert rows[1]["reward/std"] > 0
    assert rows[1]["adrpo/coefficient_max"] == pytest.approx(0.04 if kind == "grpo" else 0.08)
    assert rows[1]["adrpo/coefficient_min"] == pytest.approx(
        0.04 if kind == "grpo" else 0, abs=1e-9
    )
    mixed = sum(
        w * rows[1][f"reward/{name}"] for w, name in zip((5, 1, 1, 1, 1), mmau.REWARDS, strict=True)
    )
    assert rows[1]["reward/mean"] == pytest.approx(mixed, rel=1e-5)
    events = EventAccumulator(str(run), size_guidance={"histograms": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) == set().union(*rows) - {"step"}
    summary = json.loads((run / "summary.json").read_text())
    for step, name in ((0, "base"), (2, "final")):
        said = json.loads((run / "samples" / f"{step:06d}.json").read_text())
        assert [row["id"] for row in said] == ["q0", "q1", "q2"]
        scores = official_script(said)
        assert (
            rows[step]["eval/accuracy"]
            == pytest.approx(scores["total"])
            == summary[name]["accuracy"]
        )
        for task in mmau.TASKS:
            assert rows[step][f"eval/accuracy_{task}"] == scores[task]
        assert all(row["model_output"] == row["model_prediction"] for row in said)
        if step == 0:
            assert {row["completion"] for row in said} == {SAYS}  # greedy
            assert {row["model_output"] for row in said} == {"Man"}
            assert rows[0]["eval/format"] == 1
            assert rows[0]["eval/tokens"] == 8
            assert rows[0]["eval/keywords"] == pytest.approx(2 / 3)
    before = load_file(models[KIND_MODELS[kind]] / "model.safetensors") if kind == "full" else base
    after = weights(run)
    moved = {
        name
        for name in after
        if kind == "grpo" or not torch.equal(after[name].float(), before[name].float())
    }
    if kind == "full":
        assert set(before) == set(after)
        trained = re.compile(r".*language_model\.(model\.)?(layers|norm)\..*|.*lm_head\.weight")
        assert moved == {name for name in before if trained.fullmatch(name)}
        assert any("audio_tower" in name for name in before)
    else:
        assert all(
            re.search(r"language_model\.layers\.\d\..*_proj\.lora_[AB]\.weight", name)
            for name in after
        )
        assert len(moved) == 2 * 2 * 7


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_reloads_in_stock_libraries_with_identical_logits(models, runs, kind):
    (run, out), folder = runs[kind], models[KIND_MODELS[kind]]
    family, space = KIND_MODELS[kind].removeprefix("says "), {}
    exec(out.split("To use the result:\n")[1], space)  # the lines that the run has printed
    stock = space["model"]
    assert stock.dtype == torch.float32
    it = prepare(folder, rank=0 if kind == "full" else 4)
    trained = {name for name, p in it.policy.model.named_parameters() if p.requires_grad}
    state = mmau.load_checkpoint(run)["weights"]
    assert set(state) == trained
    assert not it.policy.model.load_state_dict(state, strict=False).unexpected_keys
    for one in it.inputs:
        expected = stock(**one).logits
        assert torch.equal(expected, it.policy.model.eval()(**one).logits)
    first = STOCK[family].from_pretrained(folder)(**one).logits
    assert (first - expected).abs().max() > 1e-3
    if kind != "full":
        with it.policy.model.disable_adapter():
            assert torch.equal(it.policy.model(**one).logits, first)
    text = "<|audio_bos|><|AUDIO|><|audio_eos|>Who?"
    ids = [
        AutoProcessor.from_pretrained(place)(
            text=text, audio=[sound(1)], sampling_rate=16000, return_tensors="pt"
        )
        for place in (run / "final", folder)
    ]
    assert torch.equal(ids[0]["input_ids"], ids[1]["input_ids"])
    assert torch.equal(ids[0]["input_features"], ids[1]["input_features"])


@pytest.mark.parametrize("method,k", [("adrpo", 0.5), ("grpo", None)])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_iteration_is_the_textbook_on_stock_models(
    models, files, base_flags, tmp_path, family, method, k
):
    """One iteration of two updates, again: separate sequences with their clips, loops, plain
    AdamW."""
    folder = models[f"says {family}"]
    flags = [
        "--iterations",
        "1",
        "--updates-per-rollout",
        "2",
        "--learning-rate",
        "5e-2",
        "--method",
        method,
    ]
    flags += [
        "--adv-clip-k",
        k,
        "--max-grad-norm",
        "0.5",
        "--temperature",
        "0.9",
        "--model-id",
        folder,
    ]
    finish(
        *base_flags, *flags, "--output-dir", tmp_path, "--run-name", "r", "--train-tokens", "150"
    )

    mmau.seed_everything(1)
    processor, source = AutoProcessor.from_pretrained(folder), (str(folder), None)
    args = mmau.Args(lora_rank=4, temperature=0.9, max_completion_length=12)
    policy = mmau.load_policy(args, source, processor, 200, CPU, False)
    banned, inputs, texts, waves = mmau.placeholders(processor), [], [], []
    model, reference = (stock_copy(family, folder, policy) for _ in range(2))
    every = [json.loads(line) for line in (files / "train.jsonl").read_text().splitlines()]
    rows = [every[row] for row in mmau.draw_prompts(len(every), 2, 0, 1)]
    for row in rows:
        waves.append(soundfile.read(files / row["audio"], dtype="float32")[0])
        texts.append(mmau.build_prompt(processor, row, 50))
        options = {"sampling_rate": 16000, "return_tensors": "pt"}
        inputs.append(processor(text=texts[-1], audio=waves[-1:], **options))
    chance = torch.rand(2, 4, 12, generator=mmau.seed_everything(1, 1))
    batch = mmau.encode(processor, texts, waves)
    tokens, mask, _ = (p.unflatten(0, (2, 4)) for p in mmau.rollout(policy, batch, chance, 2))
    rewards = torch.zeros(2, 4)
    for p in range(2):
        for g in range(4):
            ids = tokens[p, g][mask[p, g]]
            text = processor.tokenizer.decode(ids, skip_special_tokens=True)
            values = [mmau.reward_accuracy(text, rows[p]), mmau.reward_format(text, True)]
            values += [
                mmau.reward_consistency(text, rows[p]),
                mmau.reward_keywords(text),
                1 - len(ids) / 12,
            ]
            rewards[p, g] = torch.tensor(values) @ torch.tensor([5.0, 1, 1, 1, 1])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, old, total, norm = (
        torch.optim.AdamW(trained, lr=1e-2, weight_decay=0),
        None,
        0.0,
        0.0,
    )
    ref_logp = plain(reference, inputs, tokens, banned, 0.9)[0].detach()
    figures = []
    for _ in range(2):
        optimizer.zero_grad()
        logp, entropy = plain(model, inputs, tokens, banned, 0.9)
        old = logp.detach() if old is None else old
        losses = []
        for p in range(2):
            for g in range(4):
                kept = mask[p, g]
                a = float((rewards[p, g] - rewards[p].mean()) / (rewards[p].std() + 1e-4))
                beta = 0.04 - min(max(a, -k * 0.04), k * 0.04) if method == "adrpo" else 0.04
                ratio, d = (logp - old)[p, g][kept].exp(), (ref_logp - logp)[p, g][kept]
                policy_term = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
                losses.append((policy_term + beta * (d.exp() - d - 1)).mean())
                figures.append(torch.stack([d.exp() - d - 1, entropy[p, g][kept]]).detach())
        loss = sum(losses) / 8
        loss.backward()
        norm += float(torch.nn.utils.clip_grad_norm_(trained, 0.5)) / 2
        total += loss.item() / 2
        optimizer.step()
    row = read_metrics(tmp_path / "r")[1]
    assert row["losses/total"] == pytest.approx(total, rel=2e-3, abs=1e-5)
    assert row["losses/grad_norm"] == pytest.approx(norm, rel=2e-3)
    assert row["reward/mean"] == pytest.approx(rewards.mean().item(), rel=1e-5)
    assert row["completions/mean_length"] == pytest.approx(mask.sum(2).float().mean().item())
    assert [row["kl"], row["entropy"]] == pytest.approx(
        torch.cat(figures, dim=1).mean(1).tolist(), rel=2e-3
    )
    assert row["kl"] > 0
    mine, final, start = (
        {re.sub(r"^base_model.model.|\.default", "", name): value for name, value in state.items()}
        for state in (weights(tmp_path / "r"), model.state_dict(), reference.state_dict())
    )
    assert change(mine, final, start) < 0.02


@pytest.mark.parametrize(
    "flags", ["--train-tokens 140", "--rollout-batch 1 --eval-batch 3", "--gradient-checkpointing"]
)
def test_batch_sizes_and_memory_savers_do_not_change_the_result(
    base_flags, runs, base, tmp_path, flags
):
    finish(*base_flags, "--output-dir", tmp_path, "--run-name", "r", *flags.split())
    assert_same_run(runs["adrpo"][0], tmp_path / "r", base, tolerance=1e-2)


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_kl_is_exactly_zero_before_the_first_step_in_bf16(base_flags, tmp_path, rank):
    flags = ["--precision", "bf16", "--iterations", "1", "--lora-rank", rank]
    finish(*base_flags, *flags, "--output-dir", tmp_path, "--run-name", "r")
    row = read_metrics(tmp_path / "r")[1]
    assert row["kl"] == row["clip_ratio/region_mean"] == 0
    state = mmau.load_checkpoint(tmp_path / "r")["weights"]
    assert all(value.dtype == torch.float32 for value in state.values())


# A child that kills itself in the middle of writing its second checkpoint (iteration 4).
DYING = """
import os, runpy, signal, sys, torch
from pathlib import Path
save = torch.save
def dying_save(what, file):
    if what["iteration"] == 4:
        Path(folder, "checkpoint.part").write_bytes(b"half a checkpoint")
        os.kill(os.getpid(), signal.SIGKILL)
    save(what, file)
torch.save = dying_save
script = sys.argv[1]; sys.argv = sys.argv[1:]; folder = sys.argv.pop()
runpy.run_path(script, run_name="__main__")
"""


def test_killed_while_saving_and_resumed_equals_straight(base_flags, tmp_path):
    longer = [
        "--iterations",
        "4",
        "--save-every",
        "2",
        "--updates-per-rollout",
        "2",
    ]
    flags = [*base_flags, "--output-dir", tmp_path, *longer]
    finish(*flags, "--run-name", "straight")
    command = [sys.executable, "-c", DYING, SCRIPT, *replaced(flags, "--run-name", "killed")]
    command = list(map(str, [*command, tmp_path / "killed"]))
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]
    killed = tmp_path / "killed"
    assert {path.name for path in killed.glob("checkpoint*")} == {
        "checkpoint.pt",
        "checkpoint.part",
    }
    time.sleep(1.1)  # TensorBoard orders its files by the second
    os.utime(killed / "args.json")  # the newest run
    finish("--resume", "latest", "--output-dir", tmp_path)
    assert_same_run(tmp_path / "straight", killed)
    events = EventAccumulator(str(killed))
    events.Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [1, 2, 3, 4]
    one, other = (mmau.load_checkpoint(run) for run in (tmp_path / "straight", killed))
    torch.testing.assert_close(
        one["optimizer"]["state"], other["optimizer"]["state"], rtol=0, atol=0
    )
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text())
        for name in ("straight", "killed")
    ]
    assert summaries[0] == summaries[1]


def test_a_sampler_that_is_another_function_stops_the_run(base_flags, tmp_path, monkeypatch):
    """The training pass takes each token's logits from the place behind its own."""
    read = mmau.read_completions

    def shifted(model, first, cache, mask, tokens):
        logits = read(model, first, cache, mask, tokens)
        return logits.roll(1, dims=1)

    monkeypatch.setattr(mmau, "read_completions", shifted)
    reset_accelerate()
    flags = replaced(base_flags, "--output-dir", tmp_path, "--run-name", "r")
    with pytest.raises(mmau.InputError, match="nats a token between rollout and training"):
        mmau.main(tyro.cli(mmau.Args, args=flags))
    assert not list((tmp_path / "r").glob("checkpoint*"))


def test_training_goes_on_from_an_adapter(base_flags, runs, tmp_path):
    """Its reference is the model without it: the first KL is not 0."""
    start = runs["adrpo"][0] / "final"
    flags = ["--adapter", start, "--iterations", "1", "--output-dir", tmp_path, "--run-name", "r"]
    finish(*base_flags, *flags)
    first, then = read_metrics(tmp_path / "r")
    assert {k: v for k, v in first.items() if k != "step"} == pytest.approx(
        {k: v for k, v in read_metrics(runs["adrpo"][0])[-1].items() if k.startswith("eval/")}
    )
    assert then["kl"] > 1e-6
    assert (
        change(
            weights(tmp_path / "r"),
            load_file(start / "adapter_model.safetensors"),
            {k: 0 * v for k, v in weights(tmp_path / "r").items()},
        )
        > 1e-3
    )


@pytest.mark.parametrize("kind", ["adrpo", "full"])
def test_a_run_resumes_to_itself(runs, tmp_path, kind):
    copy = tmp_path / "copy"
    shutil.copytree(runs[kind][0], copy)
    assert "is finished" in finish("--resume", copy)
    assert_same_run(runs[kind][0], copy)
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").unlink()
    (copy / "checkpoint.pt").unlink()  # the one before, of iteration 1, is next
    finish("--resume", copy)
    assert_same_run(runs[kind][0], copy)
    assert json.loads((copy / "summary.json").read_text()) == summary


def test_a_flipped_bit_a_second_writer_and_other_questions_are_refused(
    runs, files, base_flags, tmp_path
):
    copy = tmp_path / "copy"
    shutil.copytree(runs["adrpo"][0], copy)
    (copy / "summary.json").unlink()
    with FileLock(copy / ".lock"):
        assert "another process is writing" in refused("--resume", copy)
    state = bytearray((copy / "checkpoint.pt").read_bytes())
    state[len(state) // 2] ^= 1
    (copy / "checkpoint.pt").write_bytes(state)
    line = refused("--resume", copy)
    assert "checkpoint.pt" in line
    assert "delete it to go on from checkpoint-previous.pt" in line
    (copy / "checkpoint.pt").unlink()
    record = json.loads((copy / "args.json").read_text())
    for name in ("train_data", "sources"):
        place = record["args"] if name == "train_data" else record["sources"]
        place["train_data"] = str(tmp_path / "train.jsonl")
    (copy / "args.json").write_text(json.dumps(record))
    shutil.copytree(files / "wavs", tmp_path / "wavs")
    text = (files / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(text.replace("Who speaks?", "Who sings?"))
    assert "other questions than when the run began" in refused("--resume", copy)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_diverging_step_writes_nothing(base_flags, tmp_path, when):
    """Weights that one step spoils: found before the next step, or after the last one."""
    flags = ["--learning-rate", "3e38", "--output-dir", tmp_path, "--run-name", "r"]
    updates = ["--updates-per-rollout", "2" if when == "before" else "1"]
    line = refused(*base_flags, *flags, *updates, "--iterations", "1")
    assert "--learning-rate" in line
    assert not list((tmp_path / "r").glob("checkpoint*"))
    assert not list((tmp_path / "r" / "final").iterdir())


def test_two_processes_are_one_with_the_same_batch(base_flags, base, tmp_path):
    flags = [
        *base_flags,
        "--output-dir",
        str(tmp_path),
        "--updates-per-rollout",
        "2",
        "--train-tokens",
        "140",
    ]
    finish(*flags, "--run-name", "one")
    run_in_two_processes(*flags, "--run-name", "two")
    assert_same_run(tmp_path / "one", tmp_path / "two", base, tolerance=1e-2)
    said = [
        json.loads((tmp_path / run / "samples" / "000000.json").read_text())
        for run in ("one", "two")
    ]
    assert said[0] == said[1]


def test_all_weights_split_over_two_processes_are_one_with_the_same_batch(
    base_flags, models, tmp_path
):
    folder = models["says omni"]
    flags = [*base_flags, "--model-id", folder, "--lora-rank", "0", "--learning-rate", "1e-3"]
    flags += ["--output-dir", tmp_path]
    finish(*flags, "--run-name", "one")
    run_in_two_processes(*flags, "--fsdp", "--run-name", "two")
    before = load_file(folder / "model.safetensors")
    assert_same_run(tmp_path / "one", tmp_path / "two", before, tolerance=1e-2)
    STOCK["omni"].from_pretrained(tmp_path / "two" / "final")


def test_evaluation_of_an_adapter_under_several_budgets(eval_flags, runs, tmp_path):
    run = runs["adrpo"][0]
    flags = [flag for flag in eval_flags if flag != "--eval-only"]
    budgets, out = (0, 25, 100), io.StringIO()
    for name, own in (
        ("tuned", ["--adapter", str(run / "final")]),
        ("base", ["--eval-batch", "1"]),
    ):
        reset_accelerate()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            mmau_scaling.main(mmau_scaling.Args(tmp_path / name, budgets), [*flags, *own])
    assert "| task: speech |" in out.getvalue()
    assert (tmp_path / "tuned" / "scaling.png").stat().st_size > 5000
    points = read_strictly(tmp_path / "tuned")["scaling.json"][0]
    assert [point["budget"] for point in points["points"]] == list(budgets)
    assert mmau_scaling.scaling(points["points"]).items() <= points.items()
    tokenizer = AutoProcessor.from_pretrained(run / "final").tokenizer
    for point in points["points"]:
        folder, first = (tmp_path / name / f"{point['budget']:03d}" for name in ("tuned", "base"))
        said = json.loads((folder / "samples/predictions.json").read_text())
        facts = json.loads((folder / "summary.json").read_text())
        assert facts["adapter"] == str(run / "final")
        assert facts["think_budget"] == point["budget"]
        expected = official_script(said)
        total = facts["scores"]["total"]["total"]["accuracy"]
        assert total == pytest.approx(expected["total"]) == point["accuracy"]
        for task, scores in facts["scores"]["task"].items():
            assert scores["accuracy"] == expected[task]
        assert (folder / "mmau.md").read_text() == mmau.score_table(facts["scores"])
        thought = [len(tokenizer(mmau.block(row["completion"], "think")).input_ids) for row in said]
        used = facts["final"]["reasoning_tokens"]
        assert used == pytest.approx(np.mean(thought)) == point["tokens"]
        said = json.loads((first / "samples/predictions.json").read_text())
        facts = json.loads((first / "summary.json").read_text())
        assert {row["model_output"] for row in said} == {"Man"}
        right = facts["scores"]["total"]["total"]["right"]
        assert right == sum(row["answer"] == "Man" for row in said) == 2
        # Without thinking, a think block is no right format.
        assert facts["final"]["format"] == (point["budget"] > 0)
    # What is done is not done again.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("base/*/*.json")}
    with contextlib.redirect_stdout(out):
        mmau_scaling.main(mmau_scaling.Args(tmp_path / "base", budgets), flags)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("base/*/*.json")}
    # The adapter of the training's last evaluation, the same budget: the same words.
    own = ["--output-dir", tmp_path, "--run-name", "same", "--adapter"]
    finish(*eval_flags, *own, run / "adapters/000002")
    said = json.loads((tmp_path / "same/samples/predictions.json").read_text())
    assert said == json.loads((run / "samples/000002.json").read_text())


def read_strictly(run):
    """Every JSON file of a run, by name, as a reader that knows no NaN."""

    def refuse(constant):
        raise ValueError(constant)

    found = {}
    for path in [*run.rglob("*.json"), *run.rglob("*.jsonl")]:
        texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        found[path.name] = [json.loads(text, parse_constant=refuse) for text in texts]
    return found


def test_what_is_undefined_is_null_in_every_json_file(eval_flags, files, tmp_path):
    rows = [row | {"weight": math.nan} for row in json.loads((files / "eval.json").read_text())]
    spec = write_rows(tmp_path / "e.json", rows)
    flags = ["--eval-data", spec, "--output-dir", tmp_path, "--run-name", "e"]
    finish(*eval_flags, *flags)
    found = read_strictly(tmp_path / "e")
    assert {"args.json", "summary.json", "predictions.json"} <= set(found)
    assert found["predictions.json"][0][0]["weight"] is None


@real_data
def test_the_real_clip_with_its_real_question(tmp_path):
    (clip,) = DATA.glob("*.wav")
    rows = json.loads((DATA / "mmau-test-mini.json").read_text())
    (row,) = [row for row in rows if clip.name in row["audio_id"]]
    (tmp_path / "one.json").write_text(json.dumps([row]))
    folder = tiny_models.make_audio_lm(tmp_path / "model", "qwen2-audio", seconds=30, says=SAYS)
    flags = [*TINY.split(), "--model-id", folder, "--audio-dir", DATA, "--output-dir", tmp_path]
    flags += [
        "--train-data",
        tmp_path / "one.json",
        "--eval-data",
        tmp_path / "one.json",
        "--eval-audio-dir",
        DATA,
    ]
    assert "--train-on-eval" in refused(*flags)
    out = finish(*flags, "--train-on-eval", "--run-name", "r", "--max-audio-seconds", "5")
    assert (
        f"{int(soundfile.info(clip).duration > 5)} clips are cut to 5 s" in out
        or "2 clips are cut to 5 s" in out
    )
    assert read_metrics(tmp_path / "r")[2]["kl"] > 0
    flags = [
        "--cpu",
        "--eval-only",
        "--model-id",
        folder,
        "--adapter",
        tmp_path / "r" / "final",
        "--eval-audio-dir",
        DATA,
    ]
    flags += [
        "--eval-data",
        DATA / "mmau-test-mini.json",
        "--eval-max",
        "1",
        "--output-dir",
        tmp_path,
    ]
    finish(*flags, "--max-completion-length", "12", "--run-name", "e")
    said = json.loads((tmp_path / "e" / "samples" / "predictions.json").read_text())
    assert len(said) == 1
    assert row.items() <= said[0].items()
    assert {"model_output", "model_prediction", "completion"} <= set(said[0])


# ------------------------------------------------------------------------------------------ E. data


def write_rows(path, rows):
    lines = path.suffix == ".jsonl"
    path.write_text(
        "\n".join(map(json.dumps, rows)) + "\n\n" if lines else json.dumps(rows), encoding="utf-8"
    )
    return str(path)


def without(rows, *keys):
    return [{key: value for key, value in row.items() if key not in keys} for row in rows]


AVQA = [
    {
        "id": 183,
        "video_name": "-Hxj_9mKBM4_000030",
        "question_text": "What made the video sound?",
        "multi_choice": ["bus", "car", "owl", "crow"],
        "answer": 2,
    },
    {
        "id": 184,
        "video_name": "x",
        "question_text": "How many?",
        "multi_choice": ["1", "2", "0"],
        "answer": 1,
        "audio_path": "clips/x_30.wav",
    },
]


def test_every_layout_is_read(files, tmp_path):
    ours = [json.loads(line) for line in (files / "train.jsonl").read_text().splitlines()]
    data = mmau.Data()
    for name in ("a.jsonl", "a.json"):
        rows = mmau.read_questions("train-data", write_rows(tmp_path / name, ours), None, data)
        assert rows == [{"id": str(i), **row} for i, row in enumerate(ours)]
    rows = mmau.read_questions("train-data", write_rows(tmp_path / "avqa.json", AVQA), None, data)
    assert [row["audio"] for row in rows] == ["-Hxj_9mKBM4_000030.wav", "clips/x_30.wav"]
    assert [row["answer"] for row in rows] == ["owl", "2"]  # a position, also among numbers
    assert rows[0]["choices"] == AVQA[0]["multi_choice"]
    assert rows[0]["question"] == "What made the audio sound?"
    rows = mmau.read_questions("eval-data", str(files / "eval.json"), None, mmau.Data())
    assert [(row["id"], row["audio"]) for row in rows[:1]] == [("q0", "./elsewhere/6.wav")]
    place, data = ("eval-data", str(files / "eval.json"), str(files / "wavs")), mmau.Data()
    found = mmau.find_clips(*place, rows, data)
    assert not data.skipped
    assert [question.clip for question in found] == [files / "wavs" / f"{i}.wav" for i in (6, 7, 8)]


ROWS = [
    {"question": "Who?", "choices": ["(A) Man", "(B) A dog"], "answer": "(B) A dog"},
    {"question": "Who?", "choices": ["A. Man", "B. A dog"], "answer": "B"},
    {"question": "Which key?", "choices": ["B", "A"], "answer": "A"},  # a choice before a letter
    {"question": "Which?", "choices": ["(A)", "(B)"], "answer": "(B)"},  # nothing but letters
    {"question": "How many?", "choices": ["3", "0", "1"], "answer": "1"},  # or a position
    {"question": "How many?", "choices": ["3", "0", "1"], "answer": 1},
    {"question": 'Was "it", here,\na dog?', "choices": ["Yes.", "It's not"], "answer": "yes"},
    {"question": "Who?", "choices": ["Man", "Woman"], "answer": " woman. "},
    {"question": "Who?", "choices": ["Man", "Woman"], "answer": 0},
    {"question": "Who?", "choices": ["Man", "Woman"], "answer": "2"},
    {"question": "Who?", "choices": ["Man", "Woman"], "answer": "C"},
    {"question": "Who?", "choices": ["Man", "Woman"], "answer": "Robot"},
    *without(AVQA, "audio_path", "id"),
]
MEANT = [
    "A dog",
    "A dog",
    "A",
    "(B)",
    "1",
    "1",
    "Yes.",
    "Woman",
    "Man",
    None,
    None,
    None,
    "owl",
    "2",
]


def test_the_same_rows_in_every_container_are_the_same_questions(tmp_path):
    """.json on one line, indented or a row a line, .jsonl, .csv, .parquet, a folder of parquet."""
    rows = [{"id": f"q{i}", "audio": f"{i}.wav", **row} for i, row in enumerate(ROWS)]
    mark = "\N{ZERO WIDTH NO-BREAK SPACE}"  # a byte order mark
    lines = "".join(json.dumps(row) + "\r\n" for row in rows)
    texts = {"a.json": mark + json.dumps(rows), "b.json": json.dumps(rows, indent=2)}
    texts |= {"c.json": lines, "d.jsonl": mark + lines}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (tmp_path / "e.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    cells = [{key: row.get(key) for key in columns} for row in rows]
    table = datasets.Dataset.from_list([row | {"answer": str(row["answer"])} for row in cells])
    (tmp_path / "f").mkdir()
    table.to_parquet(tmp_path / "f.parquet")
    table.to_parquet(tmp_path / "f" / "train-0.parquet")
    names = ("id", "audio", "question", "choices", "answer")
    expected = None
    for spec in (*texts, "e.csv", "f.parquet", "f"):
        data = mmau.Data()
        found = mmau.read_questions("train-data", str(tmp_path / spec), None, data)
        found = [{name: row[name] for name in names} for row in found]
        expected = expected or found
        assert found == expected, spec
        assert [entry["row"] for entry in data.skipped] == [9, 10, 11]
        assert all("is not among the choices" in entry["reason"] for entry in data.skipped)
    assert [row["answer"] for row in expected] == [answer for answer in MEANT if answer]
    assert expected[0]["choices"] == expected[1]["choices"] == ["Man", "A dog"]  # no letters


def test_rows_without_use_are_counted_and_listed(base_flags, files, tmp_path):
    rows = [json.loads(line) for line in (files / "train.jsonl").read_text().splitlines()]
    rows = [row | {"audio": str(files / row["audio"])} for row in rows]
    wrong = [without([rows[0]], key)[0] for key in ("audio", "question", "choices", "answer")]
    wrong += [rows[0] | {"choices": 5}, rows[0] | {"choices": "Man or"}, rows[0] | {"answer": "?"}]
    wrong += ["text", rows[0] | {"other_attributes": "{"}, rows[0] | {"id": "0"}]
    spec = write_rows(tmp_path / "t.json", [*rows, *wrong])
    flags = ["--train-data", spec, "--iterations", "1", "--output-dir", tmp_path]
    out = finish(*base_flags, *flags, "--run-name", "r")
    assert f"{len(wrong)} rows and 0 clips cannot be used: skipped.json" in out
    assert "6 training questions" in out
    skipped = json.loads((tmp_path / "r" / "skipped.json").read_text())
    assert [entry["row"] for entry in skipped] == list(range(6, 6 + len(wrong)))
    assert {entry["flag"] for entry in skipped} == {"--train-data"}
    assert all(entry["reason"] for entry in skipped)


@pytest.mark.parametrize("number_ids", [False, True])
def test_a_run_on_avqas_layout_holds_out_every_tenth(models, files, tmp_path, number_ids):
    rows = []
    for i in range(12):
        row = {
            "id": 100 + i if number_ids else f"a{i}",
            "video_name": f"{i % 9}",
            "question_text": "Who?",
        }
        rows.append(row | {"multi_choice": CHOICES, "answer": i % 4, "question_relation": "Sound"})
    spec = write_rows(tmp_path / "avqa.json", rows)
    flags = [
        *TINY.split(),
        "--model-id",
        models["says omni"],
        "--train-data",
        spec,
        "--audio-dir",
        files / "wavs",
    ]
    out = finish(*flags, "--iterations", "1", "--output-dir", tmp_path, "--run-name", "r")
    assert "10 training questions, 2 for evaluation (every tenth)" in out
    said = json.loads((tmp_path / "r" / "samples" / "000000.json").read_text())
    assert [row["video_name"] for row in said] == ["0", "1"]


def test_the_prompt(models, files):
    processor = AutoProcessor.from_pretrained(models["omni"])
    row = {"question": "Who speaks?", "choices": ["Man", "A woman"]}
    for budget in (0, 25):
        text = mmau.build_prompt(processor, row, budget)
        assert text.count("<|AUDIO|>") == 1
        assert text.endswith("<|im_start|>assistant\n")
        assert "Who speaks? Choose one of the following options: Man, A woman." in text
        assert ("<think>" in text) == ("25 words" in text) == (budget > 0)
        assert "<answer> </answer>" in text


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_audio_is_mono_at_16_khz(tmp_path, rate, channels, kind):
    path, at = tmp_path / f"a.{kind}", np.arange(2 * rate) / rate
    one, other = 0.4 * np.sin(2 * np.pi * 440 * at), 0.2 * np.sin(2 * np.pi * 1000 * at)
    soundfile.write(path, one if channels == 1 else np.stack([one, other], 1), rate)
    got = mmau.load_audio(path, 30)
    assert got.dtype == np.float32
    assert got.shape == (32000,)
    time_ = np.arange(32000) / 16000
    tone = 0.4 * np.sin(2 * np.pi * 440 * time_)
    expected = tone if channels == 1 else (tone + 0.2 * np.sin(2 * np.pi * 1000 * time_)) / 2
    assert np.abs(got - expected)[800:-800].max() < 2e-3  # the tone itself, away from the ends
    stored = soundfile.read(path, dtype="float32", always_2d=True)[0].mean(1)
    np.testing.assert_allclose(
        got, stored if rate == 16000 else soxr.resample(stored, rate, 16000), atol=1e-6
    )
    assert mmau.judge_clip(path, 30) == (None, False, False)
    cut = mmau.load_audio(path, 0.5)
    assert cut.shape == (8000,)
    assert np.abs(cut - got[:8000])[:7800].max() < 2e-3


def test_channels_that_cancel_are_heard_by_the_loudest(tmp_path):
    wave = sound(1.0)
    heard = {}
    for name, channels in (
        ("one", [wave]),
        ("opposite", [wave, -wave]),
        ("half", [0.4 * wave, -wave, 0.6 * wave]),
        ("silent right", [wave, 0 * wave]),
    ):
        soundfile.write(tmp_path / f"{name}.wav", np.stack(channels, 1), 16000, subtype="FLOAT")
        problem, _, cancelling = mmau.judge_clip(tmp_path / f"{name}.wav", 30)
        assert problem is None
        assert cancelling == (name in ("opposite", "half"))
        heard[name] = mmau.load_audio(tmp_path / f"{name}.wav", 30)
    np.testing.assert_array_equal(heard["opposite"], heard["one"])
    np.testing.assert_array_equal(heard["half"], -heard["one"])
    np.testing.assert_allclose(heard["silent right"], heard["one"] / 2)  # the mean


def test_longer_clips_are_cut_and_counted(models, files, eval_flags, tmp_path):
    (tmp_path / "wavs").mkdir()
    rows = json.loads((files / "eval.json").read_text())
    for i, seconds in enumerate((6.0, 2.0, 1.0)):  # the extractor's window is 4 s
        soundfile.write(tmp_path / "wavs" / f"{i + 6}.wav", sound(seconds, i, 8000), 8000)
    spec = write_rows(tmp_path / "e.json", rows)
    flags = [
        *eval_flags,
        "--eval-data",
        spec,
        "--eval-audio-dir",
        tmp_path / "wavs",
        "--output-dir",
        tmp_path,
    ]
    assert "1 clips are cut to 4 s" in finish(*flags, "--run-name", "a")
    assert "2 clips are cut to 1.5 s" in finish(
        *flags, "--run-name", "b", "--max-audio-seconds", "1.5"
    )


@pytest.fixture(scope="session")
def broken(files, tmp_path_factory):
    """A folder of five clips that cannot be used and a good one; e.json with a question for
    each."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copy(files / "wavs" / "3.wav", folder / "good.wav")
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("not a sound")
    soundfile.write(folder / "short.wav", sound(100 / 16000), 16000)
    for kind in ("wav", "flac"):
        soundfile.write(folder / f"cut.{kind}", sound(1.0), 16000)
        whole = (folder / f"cut.{kind}").read_bytes()
        (folder / f"cut.{kind}").write_bytes(whole[: len(whole) // 2])
    for name, value in (("nan", math.nan), ("infinite", math.inf), ("silent", 0.0)):
        wave = sound(1.0)
        wave[0 if name == "silent" else 5000 :] = value
        soundfile.write(folder / f"{name}.wav", wave, 16000, subtype="FLOAT")
    (folder / "headerless.raw").write_bytes(b"\0\1" * 16000)
    names = ["missing.wav", "empty.wav", "good.wav", "short.wav", "text.wav", "cut.wav", "cut.flac"]
    names += ["nan.wav", "infinite.wav", "silent.wav", "headerless.raw"]
    rows = [
        {"id": f"{i}", "audio": name, "question": "Who?", "choices": CHOICES}
        for i, name in enumerate(names)
    ]
    rows = [row | {"answer": "Man", "task": "sound"} for row in rows]
    write_rows(folder / "e.json", rows)
    write_rows(folder / "none.json", [row for row in rows if row["audio"] != "good.wav"])
    return folder


def test_clips_that_cannot_be_used_are_listed_and_wrong(eval_flags, broken, tmp_path):
    out = finish(
        *eval_flags,
        "--eval-data",
        broken / "e.json",
        "--eval-audio-dir",
        broken,
        "--output-dir",
        tmp_path,
    )
    (run,) = tmp_path.iterdir()
    skipped = json.loads((run / "skipped.json").read_text())
    skipped = {Path(entry["clip"]).name: entry["reason"] for entry in skipped}
    assert skipped["missing.wav"] == "not found"
    assert skipped["silent.wav"] == "silent"
    assert skipped["nan.wav"] == skipped["infinite.wav"] == "samples that are no finite numbers"
    assert skipped["short.wav"].startswith("100 samples: shorter")
    rows = json.loads((broken / "e.json").read_text())
    assert set(skipped) == {row["audio"] for row in rows} - {"good.wav"}
    assert all(skipped.values())
    said = json.loads((run / "samples" / "predictions.json").read_text())
    assert [row["audio"] for row in said if row["model_output"]] == ["good.wav"]
    total = json.loads((run / "summary.json").read_text())["scores"]["total"]["total"]
    assert total["count"] == len(rows) == 11
    assert official_script(said)["total"] == total["accuracy"]
    assert "0 rows and 10 clips cannot be used: skipped.json" in out


@pytest.mark.parametrize("name", ["a.mp3", "a.wav"])  # MMAU has mp3 streams in files named .wav
def test_mp3_is_read(tmp_path, name):
    tone = 0.4 * np.sin(2 * np.pi * 440 * np.arange(88200) / 44100)
    soundfile.write(tmp_path / name, np.stack([tone, tone], 1), 44100, format="MP3")
    assert mmau.judge_clip(tmp_path / name, 30) == (None, False, False)
    got = mmau.load_audio(tmp_path / name, 30)
    assert len(got) == pytest.approx(32000, abs=3000)  # the codec pads
    middle = np.abs(np.fft.rfft(got[8000:24000]))
    assert middle.argmax() == 440
    assert np.abs(got[8000:24000]).max() == pytest.approx(0.4, abs=0.02)


# A dataset's clips, in its order; the hub's MMAU has no names for its own.
KEPT = ["6.wav", "7.mp3", "8.flac"]


def write_dataset(path, rows, column):
    """A parquet file with audio in it, as the hub has: `column` of each row is the clip's bytes, or
    what is there."""
    cells = [
        {"bytes": row[column], "path": None} if isinstance(row[column], bytes) else row[column]
        for row in rows
    ]
    table = datasets.Dataset.from_list(
        [row | {column: cell} for row, cell in zip(rows, cells, strict=True)]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # paths stay paths
    parquet.write_table(table.cast_column(column, datasets.Audio()).data.table, path)


@pytest.fixture(scope="session")
def hub(files, tmp_path_factory):
    """Datasets as folders of parquet files, and the same as e.json and clips: mmau/ in the columns
    of the hub's MMAU, ours/ in the script's own, others that cannot work."""
    folder = tmp_path_factory.mktemp("hub")
    rows = json.loads((files / "eval.json").read_text())
    for row, name in zip(rows, KEPT, strict=True):
        wave, rate = soundfile.read(files / "wavs" / f"{Path(name).stem}.wav")
        soundfile.write(folder / name, wave, rate)
        row["audio_id"] = name
    write_rows(folder / "e.json", rows)
    clips = [(folder / name).read_bytes() for name in KEPT]
    lettered = []
    for row, clip in zip(rows, clips, strict=True):
        letters = {
            choice: f"({letter}) {choice}"
            for letter, choice in zip("ABCD", row["choices"], strict=True)
        }
        extra = {key: row[key] for key in ("id", "task", "difficulty", "sub-category", "split")}
        lettered.append(
            {"context": clip, "instruction": row["question"], "choices": list(letters.values())}
        )
        lettered[-1] |= {"answer": letters[row["answer"]], "other_attributes": json.dumps(extra)}
    write_dataset(folder / "mmau" / "test-00000-of-00001.parquet", lettered, "context")
    ours = [
        row | {"audio": clip} for row, clip in zip(without(rows, "audio_id"), clips, strict=True)
    ]
    ours[1]["audio"] = {"bytes": None, "path": str(folder / KEPT[1])}
    write_dataset(folder / "ours" / "data.parquet", ours, "audio")
    for split in ("train", "validation"):
        write_dataset(folder / "two" / f"{split}-0.parquet", ours, "audio")
    for split in ("train", "test"):
        plain = [
            row | {"audio": clip}
            for row, clip in zip(without(ours, "id", "split"), clips, strict=True)
        ]
        write_dataset(folder / "both" / f"{split}-0.parquet", plain, "audio")
    cells = [
        b"not a sound",
        clips[0],
        clips[0][: len(clips[0]) // 2],
        {"bytes": None, "path": None},
    ]
    cells.append({"bytes": None, "path": str(folder / "missing.wav")})
    bad = [ours[0] | {"id": f"b{i}", "audio": cell} for i, cell in enumerate(cells)]
    write_dataset(folder / "broken" / "data.parquet", bad, "audio")
    write_dataset(
        folder / "attributes" / "data.parquet", [lettered[0] | {"other_attributes": "{"}], "context"
    )
    write_dataset(
        folder / "unanswered" / "data.parquet", [ours[0] | {"answer": None}, ours[1]], "audio"
    )
    (folder / "silent").mkdir()
    (folder / "silent" / "a.csv").write_text("audio,question,answer\n6.wav,Who?,Man\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield folder


@pytest.mark.parametrize("name", ["mmau", "ours", "ours/data.parquet"])
def test_a_dataset_gives_what_the_same_json_gives(models, eval_flags, hub, tmp_path, name):
    # one that listens
    flags = [*eval_flags, "--output-dir", tmp_path, "--model-id", models["omni"]]
    finish(*flags, "--eval-data", hub / "e.json", "--eval-audio-dir", hub, "--run-name", "json")
    finish(*flags, "--eval-data", hub / name, "--run-name", "dataset")
    said, facts = (
        [json.loads((tmp_path / run / file).read_text()) for run in ("json", "dataset")]
        for file in ("samples/predictions.json", "summary.json")
    )
    assert without(said[0], "audio", "audio_id") == without(
        said[1], "audio", "instruction", "dataset_split"
    )
    assert len({row["completion"] for row in said[0]}) > 1
    assert [row["choices"] for row in said[1]] == [CHOICES] * 3  # without letters
    assert facts[0]["final"] == facts[1]["final"]
    assert facts[0]["scores"] == facts[1]["scores"]
    assert set(facts[0]["scores"]["task"]) == set(mmau.TASKS)
    assert len(facts[0]["eval_data_sha256"]) == 64
    assert facts[1]["sources"]["eval_data"] == str(hub / name)
    assert not (tmp_path / "dataset" / "skipped.json").exists()


def test_training_on_a_dataset(base_flags, hub, tmp_path):
    flags = [*base_flags, "--iterations", "1", "--output-dir", tmp_path, "--run-name"]
    own = ["--train-data", hub / "two", "--train-split", "train"]
    finish(*flags, "r", *own, "--train-on-eval")
    assert read_metrics(tmp_path / "r")[1]["reward/std"] > 0
    line = refused(*flags, "s", "--train-data", hub / "both", "--train-split", "test")
    assert "has 3 rows of a test split" in line
    assert "--train-on-eval" in line
    # The same questions, clips without names.
    both = {"train_data": str(hub / "both"), "train_split": "train"}
    data = mmau.load_questions(mmau.Args(**both, eval_data=str(hub / "both")))
    assert [len(data.train), len(data.heldout)] == [3, 3]
    assert [str(q.row["audio"]) for q in data.train] == [f"both:train:{i}" for i in range(3)]
    with pytest.raises(mmau.InputError, match="rows of a test split"):  # they say so themselves
        mmau.load_questions(mmau.Args(train_data=str(hub / "two"), train_split="train"))
    data = mmau.load_questions(mmau.Args(**both))
    assert [len(data.train), len(data.heldout)] == [2, 1]


def test_clips_of_a_dataset_that_cannot_be_used_are_listed_by_id(eval_flags, hub, tmp_path):
    out = finish(*eval_flags, "--eval-data", hub / "broken", "--output-dir", tmp_path)
    (run,) = tmp_path.iterdir()
    skipped = json.loads((run / "skipped.json").read_text())
    assert [entry["id"] for entry in skipped] == ["b0", "b2", "b3", "b4"]
    assert all(entry["reason"] for entry in skipped)
    assert "4 clips cannot be used: skipped.json" in out
    said = json.loads((run / "samples" / "predictions.json").read_text())
    assert [bool(row["model_output"]) for row in said] == [0, 1, 0, 0, 0]
    assert json.loads((run / "summary.json").read_text())["scores"]["total"]["total"]["count"] == 5


def test_a_datasets_clips_are_not_held_in_memory(hub):
    rows = mmau.read_questions("eval-data", str(hub / "mmau"), None, mmau.Data())
    assert all(isinstance(row["audio"], mmau.StoredClip) for row in rows)
    (file,) = rows[0]["audio"].cells.cache_files
    assert file["filename"].endswith(".arrow")
    assert not any(isinstance(value, bytes) for row in rows for value in row.values())


def test_revision_and_split_of_a_hub_dataset(hub, tmp_path, monkeypatch):
    local, commit, asked = datasets.load_dataset(str(hub / "mmau"))["test"], "0123456789" * 4, []
    folder = tmp_path / commit
    folder.mkdir()
    shutil.copy(local.cache_files[0]["filename"], folder / "a.arrow")

    def load(*given, revision):
        asked.append((*given, revision))
        return datasets.DatasetDict(
            {"v2-test": datasets.Dataset.from_file(str(folder / "a.arrow")), "train": local}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    for spec, split in (("lab/MMAU", None), ("lab/MMAU@v2", None), ("lab/MMAU:en@v2", "v2-test")):
        data = mmau.Data()
        rows = mmau.read_questions("eval-data", spec, split, data)
        assert data.sources == {"eval_data": f"{spec.partition('@')[0]}@{commit}"}
        assert [row["id"] for row in rows] == ["q0", "q1", "q2"]
    assert asked == [("lab/MMAU", None, None), ("lab/MMAU", None, "v2"), ("lab/MMAU", "en", "v2")]


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--eval-data {hub}/mmau --eval-split dev", "its splits are test: name one of them"),
        ("--eval-data {hub}/two", "its splits are train, validation: name one of them"),
        ("--train-data {hub}/both", "its splits are train, test: name one of them"),
        ("--eval-data {hub}/silent", "none of its 1 rows can be used (row 0: it has no choices)"),
        ("--eval-data {hub}/nothing", "/nothing"),
        ("--eval-data nobody/nothing", "Couldn't reach 'nobody/nothing' on the Hub"),
        ("--train-data nobody/nothing@v1", "nobody/nothing@v1"),
        ("--eval-data {hub}/attributes", "row 0: Expecting property name"),
    ],
)
def test_bad_datasets_get_one_line(base_flags, hub, tmp_path, flags, message):
    flags = flags.format(hub=hub).split()
    line = refused(*base_flags, "--output-dir", tmp_path / "runs", *flags)
    assert f"error: {flags[0]} {flags[1]}: " in line
    assert message in line
    assert not (tmp_path / "runs").exists()


def test_training_goes_round_clips_that_cannot_be_used(base_flags, broken, files, tmp_path):
    rows = json.loads((broken / "e.json").read_text())
    for row in rows:
        row["audio"] = str(broken / row["audio"])
    spec = write_rows(tmp_path / "t.jsonl", rows)
    out = finish(
        *base_flags,
        "--train-data",
        spec,
        "--iterations",
        "1",
        "--output-dir",
        tmp_path,
        "--run-name",
        "r",
    )
    assert "3 for evaluation; " in out
    assert "clips cannot be used" in out


def test_training_on_a_test_split_or_on_evaluation_questions_needs_the_flag(
    base_flags, files, tmp_path
):
    rows = [json.loads(line) for line in (files / "train.jsonl").read_text().splitlines()]
    for name, changes, reason in (
        ("split", {"split": "test-mini"}, "has 1 rows of a test split"),
        (
            "same",
            {"audio": "wavs/6.wav", "question": "Who speaks?"},
            "1 questions that are in --eval-data too",
        ),
    ):
        spec = write_rows(files / f"{name}.json", [rows[0] | changes, *rows[1:]])
        flags = [*base_flags, "--train-data", spec, "--output-dir", tmp_path]
        line = refused(*flags)
        assert reason in line
        assert "--train-on-eval" in line
        args = mmau.Args(
            train_data=spec, eval_data=str(files / "eval.json"), eval_audio_dir=str(files / "wavs")
        )
        args.train_on_eval = True
        assert len(mmau.load_questions(args).train) == 6
    rows[0] |= {"audio": "wavs/6.wav", "question": "What else?"}  # another question on a test clip
    args = dataclasses.replace(args, train_data=write_rows(files / "other.json", rows))
    mmau.load_questions(dataclasses.replace(args, train_on_eval=False))


# ------------------------------------------------------------------------------------- F. bad input


@pytest.fixture(scope="session")
def bad(models, files, tmp_path_factory):
    """A folder of things that cannot work."""
    folder = tmp_path_factory.mktemp("bad")
    good = {
        "id": "a",
        "audio": str(files / "wavs" / "0.wav"),
        "question": "Who?",
        "choices": ["x", "y"],
        "answer": "x",
    }
    changed = {
        "no-audio": {key: value for key, value in good.items() if key != "audio"},
        "other": good | {"answer": "z"},
    }
    for name, row in changed.items():
        write_rows(folder / f"{name}.jsonl", [row])
    write_rows(folder / "one.jsonl", [good])
    (folder / "empty.jsonl").write_text("\n\n")
    (folder / "broken.json").write_text("[{")
    (folder / "object.json").write_text("{}")
    (folder / "strings.jsonl").write_text('"x"\n')
    (folder / "latin.jsonl").write_bytes(b'{"audio": "\xff"}')
    (folder / "folder").mkdir()
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    model = STOCK["omni"].from_pretrained(models["omni"])
    for name, layers in (("thin", "0"), ("named", r"\d")):
        targets = rf".*language_model.layers\.{layers}\.self_attn.q_proj"
        lora = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=targets))
        lora.save_pretrained(folder / name)
    stored = load_file(folder / "thin" / "adapter_model.safetensors")
    kept = {key: value for key, value in stored.items() if "lora_A" in key}
    save_file(kept, folder / "thin" / "adapter_model.safetensors")
    stored = load_file(folder / "named" / "adapter_model.safetensors")
    renamed = {f"_orig_mod.{key}": value for key, value in stored.items()}
    save_file(renamed, folder / "named" / "adapter_model.safetensors")
    state = load_file(models["omni"] / "model.safetensors")
    for name, changed in (
        ("deaf", {key: value for key, value in state.items() if "audio_tower" not in key}),
        ("compiled", {f"_orig_mod.{key}": value for key, value in state.items()}),
    ):
        shutil.copytree(models["omni"], folder / name)
        save_file(changed, folder / name / "model.safetensors", metadata={"format": "pt"})
    (folder / "r.py").write_text(PLUGINS)
    tiny_models.make_lm(folder / "llama", "llama")
    for name, file in (("cut", "model.safetensors"), ("unprocessed", "processor_config.json")):
        shutil.copytree(models["omni"], folder / name)
        (folder / name / file).write_bytes(b"nothing") if name == "cut" else (
            folder / name / file
        ).unlink()
    return folder


PLUGINS = """
import dataclasses, sys

@dataclasses.dataclass
class Value:
    length: float

def length(prompts, completions, rows):
    assert all(row["question"] in prompt for prompt, row in zip(prompts, rows, strict=True))
    return [Value(len(text)).length for text in completions]

def accuracy(prompts, completions, rows):
    return [0.0] * len(rows)

def one(prompts, completions, rows):
    return [0.0]

def nan(prompts, completions, rows):
    return [float("nan")] * len(rows)
"""
BAD = [
    ("--model-id {bad}/none", "--model-id {bad}/none"),
    ("--model-id {bad}/named", "of a LoRA: its base model, and --adapter"),
    ("--model-id {bad}/cut", "--model-id {bad}/cut"),
    ("--model-id {bad}/llama", "a llama; must be Qwen2.5-Omni or Qwen2-Audio"),
    ("--model-id {bad}/deaf", "weights are not in its files, such as model.audio_tower."),
    ("--model-id {bad}/compiled", "weights are not in its files, such as "),
    ("--train-data no.jsonl", "--train-data no.jsonl"),
    ("--eval-data no.json", "--eval-data no.json"),
    ("--train-data {bad}/empty.jsonl", "none of its 0 rows can be used (it is empty)"),
    ("--train-data {bad}/broken.json", "JSONDecodeError"),
    ("--train-data {bad}/object.json", "row 0: it has no audio"),
    ("--train-data {bad}/latin.jsonl", "UnicodeDecodeError"),
    ("--train-data {bad}/no-audio.jsonl", "a row is audio, question, choices, answer"),
    ("--train-data {bad}/other.jsonl", "row 0: the answer 'z' is not among the choices"),
    ("--audio-dir {bad}/folder", "none of its 6 clips can be used ("),
    ("--eval-audio-dir {bad}/folder", "none of its 3 clips can be used ("),
    ("--eval-data {broken}/none.json", "none of its 10 clips can be used ("),
    ("--eval-only --adapter {bad}/thin", "--adapter {bad}/thin: does not fit the model, such as"),
    ("--adapter {bad}/named", "--adapter {bad}/named: does not fit the model, such as"),
    ("--think-budget -1", "--think-budget -1: is out of its range"),
    ("--group-size 1", "--group-size: 2 or more"),
    ("--eval-max 0", "--eval-max 0: is out of its range"),
    ("--max-audio-seconds 0.001", "--max-audio-seconds: at least 0.1"),
    ("--reward-weights nan 1 1 1 1", "--reward-weights (nan, 1.0, "),
    ("--reward-weights 1 1", "--reward-weights: of accuracy, format, "),
    ("--reward-weights 1 1 1 1 1 1", "--reward-weights: of accuracy, format, "),
    ("--reward {bad}/none.py:f", "--reward {bad}/none.py:f: give FILE.py:function"),
    ("--reward {bad}/r.py:accuracy", "the names ['accuracy'] collide with a tag"),
    ("--reward {bad}/r.py:length {bad}/r.py:length", "the names ['length', 'length'] collide"),
    ("--reward {bad}/r.py:one", "--reward one"),
    ("--reward {bad}/r.py:nan", "--reward nan"),
    ("--temperature 0", "--temperature 0.0: is out of its range"),
    ("--learning-rate nan", "--learning-rate nan: is out of its range"),
    ("--resume nowhere", "--resume nowhere: no checkpoint in nowhere"),
]


@pytest.mark.parametrize("flags,message", BAD, ids=[flags for flags, _ in BAD])
def test_bad_flags_get_one_line(files, bad, broken, base_flags, tmp_path, flags, message):
    places = {"bad": bad, "files": files, "broken": broken}
    line = refused(*base_flags, "--output-dir", tmp_path / "runs", *flags.format(**places).split())
    assert message.format(**places) in line
    assert not (tmp_path / "runs").exists()


def test_flags_that_need_another(models, bad, tmp_path, monkeypatch):
    flags = ["--cpu", "--model-id", models["omni"], "--output-dir", tmp_path / "runs"]
    assert "--eval-only and --eval-data" in refused(*flags, "--eval-only")
    assert "--train-data must be given" in refused(*flags)
    line = refused(*flags, "--train-data", bad / "one.jsonl")
    assert "one question cannot be split; give --eval-data" in line
    monkeypatch.setenv("WORLD_SIZE", "2")
    mmau.check_args(mmau.Args(train_data="x", prompts_per_update=6), 2)
    with pytest.raises(mmau.InputError, match="unrelated runs here; add --cpu"):
        mmau.check_args(mmau.Args(train_data="x"), 1)
    with pytest.raises(mmau.InputError, match="--prompts-per-update: must be a multiple of 2"):
        mmau.check_args(mmau.Args(train_data="x", prompts_per_update=5), 2)


@pytest.mark.parametrize("second", ["--reward-weights", "--reward_weights"])
def test_a_flag_given_twice_is_refused(second):
    code, _, _ = run_script("--reward-weights", "1", second, "2")
    assert code == "error: a flag is given twice; give all its values after one"


def test_a_plugin_that_writes_into_its_inputs_changes_nothing_else(tmp_path):
    def writes(prompts, completions, rows):
        for row in rows:
            row["choices"].clear()
            row["answer"] = "x"
        completions[:] = ["x"] * len(rows)
        return [1.0] * len(rows)

    def reads(prompts, completions, rows):
        return [
            float(len(row["choices"]) + 10 * len(text))
            for row, text in zip(rows, completions, strict=True)
        ]

    cells = object()  # of a data set: must not be copied
    clip = mmau.StoredClip("a.wav", cells, 0)
    row = {"audio": clip, "question": "Who?", "choices": [*CHOICES], "answer": CHOICES[0]}
    text = f"<answer>{CHOICES[0]}</answer>"
    args = mmau.Args(train_data="x")
    scored = mmau.score([text], [3], [row], {"writes": writes, "reads": reads}, args)
    assert scored[0, -2:].tolist() == [1, 4 + 10 * len(text)]
    assert row["choices"] == CHOICES
    assert row["answer"] == CHOICES[0]
    assert row["audio"].cells is cells


def test_a_plugin_is_trained_and_measured_beside_the_built_in_rewards(base_flags, bad, tmp_path):
    flags = [*base_flags, "--reward", f"{bad / 'r.py'}:length", "--output-dir", tmp_path]
    finish(*flags, "--run-name", "default", "--iterations", "1")
    weights_ = ["--reward-weights", 1, 0, 0, 0, 0, 0.5]
    finish(*flags, "--run-name", "own", "--iterations", "1", *weights_)
    for name, mix in (("default", (5, 1, 1, 1, 1, 1)), ("own", (1, 0, 0, 0, 0, 0.5))):
        rows = read_metrics(tmp_path / name)
        names = (*mmau.REWARDS, "length")
        mixed = sum(w * rows[1][f"reward/{n}"] for w, n in zip(mix, names, strict=True))
        assert rows[1]["reward/mean"] == pytest.approx(mixed, rel=1e-5)
        said = json.loads((tmp_path / name / "samples/000001.json").read_text())
        measured = np.mean([len(row["completion"]) for row in said])
        assert rows[1]["eval/length"] == pytest.approx(measured)


def test_a_plugin_that_ends_the_program_is_an_error(base_flags, tmp_path):
    (tmp_path / "r.py").write_text("import sys\ndef leave(*_):\n    sys.exit(0)\n")
    with pytest.raises(RuntimeError, match="the plug-in ended the program"):
        finish(*base_flags, "--reward", tmp_path / "r.py:leave", "--output-dir", tmp_path)


def test_answers_without_tags_are_a_figure_of_their_own(models, files, eval_flags, tmp_path):
    model = tiny_models.make_audio_lm(tmp_path / "model", "qwen2-audio", says=" Man")
    flags = ["--model-id", model, "--output-dir", tmp_path, "--run-name", "r"]
    finish(*eval_flags, *flags)
    figures = json.loads((tmp_path / "r" / "summary.json").read_text())["final"]
    assert figures["accuracy"] == 0
    assert figures["accuracy_untagged"] == pytest.approx(200 / 3)  # two of three are Man
    for text, inside in (
        ("Man", "Man"),
        ("<answer>Man</answer> Woman", "Man"),
        ("<answer></answer> Man", ""),
        ("Man</answer>", "Man</answer>"),
        ("</answer>Man<answer>", "</answer>Man<answer>"),
    ):
        assert mmau.answer_or_all(text) == inside


def test_an_existing_or_unwritable_folder_is_refused(base_flags, runs, tmp_path):
    folder = runs["adrpo"][0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    line = refused(*base_flags, "--output-dir", folder.parent, "--run-name", folder.name)
    assert "--run-name" in line and str(folder) in line
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    (tmp_path / "file").write_text("")
    assert "--output-dir" in refused(*base_flags, "--output-dir", tmp_path / "file")


def test_resume_refuses_other_flags_and_foreign_folders(runs, tmp_path):
    run, _ = runs["adrpo"]
    line = refused("--resume", run, "--beta0", "0.5")
    assert "goes on with its own flags; leave out ['--beta0']" in line
    for flags in (["latest", "--output-dir", tmp_path], [""], [tmp_path]):
        assert "no checkpoint in" in refused("--resume", *flags)


# ------------------------------------------------------------------------------------ G. help, docs


def test_help_teaches_every_flag():
    code, out, _ = run_script("--help")
    assert code == 0
    (args,) = (
        n
        for n in ast.parse(SCRIPT.read_text()).body
        if isinstance(n, ast.ClassDef) and n.name == "Args"
    )
    for field, after in zip(args.body, [*args.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert documented, field.target.id
            assert f"--{field.target.id.replace('_', '-')}" in out
    for words in ("baseline", "KL coefficient", "CESAR", "--think-budget"):
        assert words in out


def test_every_logged_tag_is_documented(runs):
    written = {
        tag for kind in KINDS for row in read_metrics(runs[kind][0], timing=True) for tag in row
    } - {"step"}
    prefixes = "reward|eval|losses|adrpo|completions|sampling|clip_ratio|charts"
    documented = set(re.findall(rf"`((?:{prefixes})/[A-Za-z0-9_/]+|kl|entropy)`", DOCS.read_text()))
    elsewhere = {"adrpo/coefficient", "charts/peak_memory_gb"}  # a histogram; on a GPU only
    assert written | elsewhere == documented


def test_every_flag_and_name_in_the_docs_exists():
    flags = {f"--{name.replace('_', '-')}" for name in mmau.Args.__dataclass_fields__}
    text = DOCS.read_text()
    others = {"--nproc-per-node", "--help"}
    others |= {
        "--gpu",
        "--modes",
        "--steps",
        "--family",
        "--lengths",
        "--think-budgets",
    }  # of the benchmarks
    others.add("--no-keep-adapters")
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) <= flags | others
    for name in re.findall(r"`([a-z]+_[a-z_]+|[A-Z]+_[A-Z]+)`", text):
        known = (
            hasattr(mmau, name)
            or f'"{name}"' in SCRIPT.read_text()
            or name.startswith("eval_data_")
        )
        assert known or name in ("other_attributes", "video_name"), name


def test_the_rewards_are_as_documented():
    """The table of docs/adrpo_audio_mmau.md names every reward, in the order of its weights."""
    table = DOCS.read_text().split("## Rewards")[1].split("\n\n")[1]
    assert re.findall(r"^\| ([a-z]+) \|", table, re.MULTILINE)[1:] == list(mmau.REWARDS)
