"""Tests of adrpo_grpo_llm.py on tiny random language models: its equations, its two passes and its
rollouts against stock transformers, its loss against TRL's GRPOTrainer, and the program as a user
runs it. No downloads."""

import ast
import contextlib
import copy
import functools
import gc
import html
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import accelerate
import huggingface_hub
import numpy as np
import peft
import pyarrow
import pyarrow.parquet
import pytest
import torch
import tyro
from filelock import FileLock
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CompileConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

import adrpo_grpo_llm as llm
from tests import tiny_models

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "adrpo_grpo_llm.py"
DOCS = ROOT / "docs" / "adrpo_grpo_llm.md"
CPU = torch.device("cpu")
FAMILIES = list(tiny_models.LM_FAMILIES)
READABLE = len(tiny_models.MARKS) + len(tiny_models.WORDS.split())
STOP = [tiny_models.EOS, tiny_models.END]
TIMING = re.compile(r"charts/(seconds_.*|tokens_per_second|peak_memory_gb)")
TINY = """--cpu --precision fp32 --iterations 2 --prompts-per-update 2 --group-size 4
--max-prompt-length 16 --max-completion-length 10 --eval-samples 2 --eval-max-prompts 2
--eval-every 1 --save-every 1 --learning-rate 1e-3 --rollout-batch 8 --train-tokens 512"""
PROMPTS = [
    f"the {who} {verb}"
    for who in ("a<b cat", "blue old fox", "dog")
    for verb in ("sees", "finds a", "eats", "is")
]
REWARD = """
def words(prompts, completions, rows):
    return [len(set(text.split())) + 0.01 * len(text) for text in completions]
def length(prompts, completions, rows):
    return [float(len(text)) for text in completions]
def constant(prompts, completions, rows):
    return [21.6] * len(completions)
def small(prompts, completions, rows):
    return [1e-4 * len(text) for text in completions]
"""


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniforms(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def random_prompts(*lengths, seed=0):
    draw = functools.partial(torch.randint, generator=torch.Generator().manual_seed(seed))
    return [draw(6, 60, (length,)).tolist() for length in lengths]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """family -> the folder of a tiny model of it, with five rows in its head that are no token;
    `world`: one without such rows, whose name is the family's of the program's tests."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(name):
        if name == "reward":
            return tiny_models.make_reward_lm(folder / name)
        if name in ("world", "plain"):
            return tiny_models.make_lm(folder / name, chat=name == "world")
        return tiny_models.make_lm(folder / name, name, vocab_size=READABLE + 5)

    return make


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with prompts.txt and mine.py, the rewards."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "mine.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="session")
def base_flags(models, files):
    flags = f"--model-id {models('world')} --dataset {files}/prompts.txt"
    return [*TINY.split(), *flags.split(), "--reward", f"{files}/mine.py:words"]


@pytest.fixture(scope="session", autouse=True)
def frozen():
    """What is imported is not searched for garbage at the end of each run: half of its time."""
    gc.collect()
    gc.freeze()


def reset_accelerate():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@contextlib.contextmanager
def command_line(*words):
    """sys.argv, and no state of an earlier run in this process."""
    reset_accelerate()
    arguments, sys.argv = sys.argv, [str(SCRIPT), *map(str, words)]
    try:
        yield
    finally:
        sys.argv = arguments


def with_flags(base, *flags):
    """Flags of which the later ones take the place of those in `base`: none is given twice."""
    flags, kept = list(map(str, flags)), []
    given = {flag for flag in flags if flag.startswith("--")}
    for word in map(str, base):
        if word.startswith("--"):
            skip = word in given
        if not skip:
            kept.append(word)
    return [*kept, *flags]


def run_script(*flags):
    """The script with these flags, in this process: (exit message or code, standard output,
    standard error)."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with (
        command_line(*flags),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as exit_:
            code = exit_.code
    return code, out.getvalue(), err.getvalue()


def finish(base, *flags):
    code, out, err = run_script(*with_flags(base, *flags))
    assert code == 0, (code, err[-2000:])
    return out


def refused(base, *flags):
    code, _, err = run_script(*with_flags(base, *flags))
    assert isinstance(code, str), (code, err[-500:])
    assert code.startswith("error: ")
    assert len(code.splitlines()) == 1
    return code


def read_lines(path):
    def never(constant):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=never) for line in path.read_text().splitlines()]


def read_metrics(run, timing=False):
    rows = read_lines(run / "metrics.jsonl")
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
        assert change(weights(one), weights(other), base) < 30 * tolerance  # Adam: noise's sign
    else:
        torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)
    rows, others = read_metrics(one), read_metrics(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, match in zip(rows, others, strict=True):
        assert row == pytest.approx(match, rel=tolerance, abs=tolerance / 10)


# --------------------------------------------------------------------------------- A. the equations


@pytest.mark.parametrize("scale", [True, False])
def test_group_advantage_against_a_loop(scale):
    rewards = numbers(3, 5) * torch.tensor([[1.0], [4.0], [0.1]], dtype=torch.float64)
    rewards.requires_grad_(True)
    got = llm.group_advantage(rewards, scale=scale)
    assert not got.requires_grad
    for row, values in zip(rewards.tolist(), got.tolist(), strict=True):
        spread = np.std(row, ddof=1) + 1e-4 if scale else 1
        assert values == pytest.approx([(one - np.mean(row)) / spread for one in row], abs=1e-12)
    for value in (0.1, 21.6, 1 / 3, 1e6 + 0.1):  # equal rewards: exactly none, however they round
        for size in range(2, 20):
            assert not llm.group_advantage(torch.full((1, size), value), scale=scale).any()


@pytest.mark.parametrize("k", [None, 0.5, 1.0, 2.0])
def test_adaptive_beta_against_a_loop(k):
    values = [-5, -0.06, -0.01, 0, 0.01, 0.03, 0.06, 5]
    advantage = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    got = llm.adaptive_beta(advantage, 0.04, k)
    assert not got.requires_grad
    limit = math.inf if k is None else k * 0.04
    expected = [0.04 - min(max(a, -limit), limit) for a in values]
    assert got.tolist() == pytest.approx(expected, abs=1e-15)
    assert (got.min() >= 0) == (k is not None and k <= 1)
    if k == 1:  # a normalised group saturates it
        advantage = llm.group_advantage(torch.tensor([[1.0, 0, 0, 1], [2.0, 2, 2, 2]])).flatten()
        expected = torch.tensor([0, 0.08, 0.08, 0] + [0.04] * 4)
        torch.testing.assert_close(llm.adaptive_beta(advantage, 0.04), expected)


def test_kl_k3_closed_form_and_unbiased():
    logits, ref = numbers(6), numbers(6, seed=1)
    p, logp, ref_logp = logits.softmax(0), logits.log_softmax(0), ref.log_softmax(0)
    k3 = llm.kl_k3(logp[None], ref_logp[None])[0]
    assert k3.tolist() == pytest.approx([math.exp(d) - d - 1 for d in (ref_logp - logp).tolist()])
    assert (p * k3).sum().item() == pytest.approx((p * (logp - ref_logp)).sum().item())
    assert llm.kl_k3(logp, logp).tolist() == [0] * 6


def test_huge_differences_stay_finite_and_pull_the_right_way():
    logp = torch.tensor([[-1e4, -2.0, -300.0, -27.0]], requires_grad=True)
    ref = torch.tensor([[-1.0, -1e4, -2.0, -2.0]])
    (gradient,) = torch.autograd.grad(llm.kl_k3(logp, ref).sum(), logp)
    # below the reference: a step against the gradient raises it, from a difference of 20 on too
    assert (gradient[0, [0, 2, 3]] < 0).all()
    assert gradient[0, 1] > 0
    one, mask = torch.ones(1), torch.ones(1, 4)
    for sign in (1, -1):
        loss = llm.grpo_loss(logp, ref, ref, sign * one, one, mask, 0.2)
        (gradient,) = torch.autograd.grad(loss, logp)
        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_gradient_at_ratio_one_is_reinforce_plus_kl_and_stops_at_the_mask():
    logp, ref = -numbers(4, 6).abs().requires_grad_(True), -numbers(4, 6, seed=2).abs()
    mask = torch.arange(6) < torch.tensor([6, 1, 4, 3])[:, None]
    advantage, coefficient = torch.tensor([[0.9, -1.2, 0.3, -0.1], [0, 0.08, 0.02, 0.07]]).double()
    loss = llm.grpo_loss(logp, logp.detach(), ref, advantage, coefficient, mask, 0.2)
    (gradient,) = torch.autograd.grad(loss, logp)
    pull = 1 - (ref - logp.detach()).exp()  # derivative of k3
    expected = -advantage[:, None] + coefficient[:, None] * pull
    expected = expected * mask / mask.sum(1, keepdim=True) / 4
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert (gradient[:, 0] != 0).all()  # a completion of one token is its stop token, and learns


@pytest.mark.parametrize("count,per_update", [(7, 3), (4, 4), (3, 8)])
def test_every_pass_draws_every_prompt_once(count, per_update):
    drawn = [row for i in range(21) for row in llm.draw_prompts(count, per_update, i, seed=5)]
    for start in range(0, len(drawn) - count + 1, count):
        assert sorted(drawn[start : start + count]) == list(range(count))


def test_distinct_2_against_a_loop():
    completions = [[1, 2, 3, 1, 2], [5], [1, 2, 9], []]
    pairs = ["12", "23", "31", "12", "12", "29"]
    assert llm.distinct_2(completions) == len(set(pairs)) / len(pairs)
    assert llm.distinct_2([[4], []]) is None


# -------------------------------------------------------------------- B. against stock transformers


def load(folder, precision=torch.float32, **flags):
    """The policy as the script builds it from a folder, and its flags."""
    lengths = {"max_prompt_length": 16, "max_completion_length": 12}
    args = llm.Args(model_id=str(folder), **lengths | {"train_tokens": 40} | flags)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    llm.seed_everything(1)
    source = str(folder), None
    return llm.load_policy(args, source, tokenizer, CPU, precision == torch.bfloat16), args


# Two projections of a family, the first of which moves neither keys nor values.
PROJECTIONS = {"phi3": "o_proj qkv_proj", "bloom": "dense query_key_value", "mpt": "out_proj Wqkv"}
PROJECTIONS |= {"gpt2": "c_proj c_attn", "deepseek_v3": "q_b_proj kv_b_proj"}


def make_policy(models, family, rank=0, **flags):
    """The same, its LoRA not zero, and the rows of its head that are no token likely."""
    targets = tuple(PROJECTIONS.get(family, "q_proj v_proj").split())
    policy, args = load(models(family), lora_rank=rank, lora_targets=targets, **flags)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        head = policy.model.get_output_embeddings().weight
        head[READABLE:] = 1.5 * head[tiny_models.EOS]
    return policy, args


def ordinary(model, prompts, tokens, kept, temperature=1.0):
    """Log-probabilities and entropies [N,C] of completions, each a right-padded row of its own,
    among the tokens that somebody can read."""
    group = len(tokens) // len(prompts)
    places = [len(prompt) for prompt in prompts for _ in range(group)]
    width = max(places) + tokens.shape[1]
    ids, mask = torch.zeros(2, len(tokens), width, dtype=torch.long)
    for i, own in enumerate(kept):
        row = torch.tensor(prompts[i // group] + tokens[i][own].tolist())
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    logits = model(input_ids=ids, attention_mask=mask).logits[..., :READABLE]
    logits = [
        one[at - 1 : at - 1 + tokens.shape[1]] for one, at in zip(logits, places, strict=True)
    ]
    pi = torch.distributions.Categorical(logits=torch.stack(logits) / temperature)
    return pi.log_prob(tokens * kept), pi.entropy()


def gradients(model):
    """By name; a weight that had no part in it: zeros."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}


def relative(one, other):
    """Size of the difference of two models' gradients, relative to the second."""
    assert one.keys() == other.keys()
    difference = sum((one[name] - other[name]).square().sum() for name in one)
    return math.sqrt(difference / sum(value.square().sum() for value in other.values()))


def backward(policy, prompts, tokens, kept, args):
    """Log-probabilities, entropies [N,C] by the script's passes, and the gradients of a weighted
    sum of the first."""
    policy.model.zero_grad()
    batch = llm.Batch(*llm.pad_left(policy, prompts), tokens, kept)
    weight = numbers(*kept.shape, seed=9, dtype=torch.float32) * kept
    logp, entropy = torch.zeros(2, *kept.shape)
    for at, part, own in llm.completion_passes(policy, policy.model, batch, args):
        (part * weight[at]).sum().backward()
        logp[at], entropy[at] = part.detach(), own
    return logp * kept, entropy * kept, gradients(policy.model)


def ordinary_backward(policy, prompts, tokens, kept):
    """The same by ordinary rows of a copy of the stock model."""
    stock = copy.deepcopy(policy.model)
    stock.zero_grad()
    logp, entropy = ordinary(stock, prompts, tokens, kept, policy.temperature)
    weight = numbers(*kept.shape, seed=9, dtype=torch.float32) * kept
    (logp * weight).sum().backward()
    return logp.detach() * kept, entropy.detach() * kept, gradients(stock)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_both_passes_are_ordinary_rows(models, family, rank):
    """Prompts longer and shorter than a window of 8, of one token among them, two prompts and three
    completions at once, so that parts cut groups; and nothing but prompts of one token."""
    policy, args = make_policy(models, family, rank, temperature=0.7)
    for lengths in ((14, 3, 1, 9), (1, 1)):
        prompts = random_prompts(*lengths)
        llm.check_cache(policy, prompts)
        drawn = uniforms(len(lengths), 4, 12)
        tokens, kept, sampled = llm.rollout(policy, prompts, drawn, args)
        assert tokens[kept].max() < READABLE
        assert (kept.sum(1) < 12).any()  # stopped by itself
        logp, entropy, mine = backward(policy, prompts, tokens, kept, args)
        expected, spread, theirs = ordinary_backward(policy, prompts, tokens, kept)
        torch.testing.assert_close(sampled, expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(logp, expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(entropy, spread, rtol=1e-5, atol=5e-5)
        assert not entropy.requires_grad
        assert relative(mine, theirs) < 1e-5
    assert logp.min() < -4  # not flat


@pytest.mark.parametrize("family,rank", [("qwen3", 0), ("qwen3", 4), ("gpt2", 0)])
def test_gradient_checkpointing_changes_nothing_but_memory(models, family, rank):
    """GPT-2 has dropout, which stays off."""
    prompts, results, reads = random_prompts(14, 3, 1), [], []
    for saving in (False, True):
        policy, args = make_policy(models, family, rank, gradient_checkpointing=saving)
        tokens, kept, _ = llm.rollout(policy, prompts, uniforms(3, 4, 12), args)
        (layer,) = (one for name, one in policy.model.named_modules() if name.endswith(".0.mlp"))
        layer.register_forward_pre_hook(lambda *_: reads.append("a part"))
        results.append(backward(policy, prompts, tokens, kept, args))
    assert len(reads) == 2 + 5 + 2 * 5  # of prompts, of completions; of rows, again going back
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=1e-5, atol=2e-5)
    assert relative(results[0][2], results[1][2]) < 1e-5


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2", "gpt2", "deepseek_v3"])
def test_greedy_rollouts_are_those_of_stock_generate(models, family):
    policy, args = make_policy(models, family, rank=4, temperature=0)
    prompts = random_prompts(*range(1, 15), seed=3)
    tokens, kept, _ = llm.rollout(policy, prompts, uniforms(14, 2, 12), args)
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": STOP, "pad_token_id": 0}
    options["suppress_tokens"] = list(range(READABLE, READABLE + 5))
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt] * 2)
        expected = policy.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        for j in range(2):
            own = tokens[2 * i + j][kept[2 * i + j]].tolist()
            assert own == expected[j, len(prompt) :][: len(own)].tolist()
            assert len(own) == 12 or own[-1] in STOP
    assert len(set(kept.sum(1).tolist())) > 1


def slow_completion(model, prompt, chances, temperature):
    """One completion, without a cache: at each step the stock model reads everything again."""
    ids = list(prompt)
    for chance in chances.tolist():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1, :READABLE]
        cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
        ids.append(int((cumulative <= chance).sum()))
        if ids[-1] in STOP:
            break
    return ids[len(prompt) :]


@torch.no_grad()
@pytest.mark.parametrize(
    "family,rank,temperature", [("qwen3", 0, 1.0), ("mistral", 4, 1.4), ("gemma2", 4, 0.8)]
)
def test_sampled_rollouts_against_a_slow_loop(models, family, rank, temperature):
    policy, args = make_policy(models, family, rank, temperature=temperature)
    prompts, chances = random_prompts(7, 1, 14, 9), uniforms(4, 3, 12)
    tokens, kept, logp = llm.rollout(policy, prompts, chances, args)
    for i, row in enumerate(tokens):
        expected = slow_completion(
            policy.model, prompts[i // 3], chances[i // 3, i % 3], temperature
        )
        assert row[kept[i]].tolist() == expected
    assert (kept.sum(1) < 12).any()
    assert (kept.sum(1) == 12).any()  # cut off
    # The same tokens however the batch is cut, padded full, and on either kind of cache.
    others = [(policy, 1), (policy, 7), (policy._replace(full=True), 64)]
    others += [(policy._replace(full=True, static=None), 7), (policy._replace(static=None), 64)]
    for other, batch in others:
        args.rollout_batch = batch
        again, kept_again, logp_again = llm.rollout(other, prompts, chances, args)
        columns = min(tokens.shape[1], again.shape[1])
        assert torch.equal(kept_again[:, :columns], kept[:, :columns])
        assert torch.equal((again * kept_again)[:, :columns], (tokens * kept)[:, :columns])
        torch.testing.assert_close(logp_again[:, :columns], logp[:, :columns], rtol=0, atol=2e-5)


def test_the_compiled_rollout_gives_the_same_tokens_and_compiles_once(models, monkeypatch):
    """What transformers does on a GPU by itself, here with a backend that only traces."""
    compiled = CompileConfig(mode="default", fullgraph=False, backend="eager")
    compiled._compile_all_devices = True
    policy, args = make_policy(models, "qwen3")
    policy = policy._replace(full=True, static={})
    plain = llm.rollout(policy, random_prompts(9, 4, 6), uniforms(3, 2, 6), args)
    made = functools.partial(llm.GenerationConfig, compile_config=compiled)
    monkeypatch.setattr(llm, "GenerationConfig", made)
    frames = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    frames.clear()
    again = llm.rollout(policy, random_prompts(9, 4, 6), uniforms(3, 2, 6), args)
    once = frames["unique_graphs"]
    assert once > 0
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    llm.rollout(policy, random_prompts(5, 12, 1, seed=2), uniforms(3, 2, 6, seed=2), args)
    assert frames["unique_graphs"] == once


@pytest.mark.parametrize("top_p,top_k", [(1.0, 0), (0.7, 0), (0.2, 0), (1.0, 3), (0.7, 4)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chosen_tokens_have_the_right_frequencies(models, temperature, top_p, top_k):
    """On an even grid of uniforms with both ends a token's count is its probability times the
    grid's size, give or take two, and none for what must not be chosen."""
    policy, _ = make_policy(models, "qwen3", temperature=temperature, top_p=top_p, top_k=top_k)
    grid = torch.cat(
        [torch.zeros(1), (torch.arange(4000) + 0.5) / 4000, torch.tensor([1 - 2**-24])]
    )
    for row in numbers(3, READABLE + 5, dtype=torch.float32) * 2:
        row[0] = -math.inf
        choose = llm.ChooseByUniform(grid[:, None], policy)
        tokens = choose(None, row.expand(4002, -1).clone()).argmax(-1)
        p = (row[:READABLE].double() / temperature).softmax(-1)
        torch.testing.assert_close(
            choose.logp[0][:, 0].double(), p.log()[tokens], rtol=0, atol=1e-5
        )
        order = p.argsort(descending=True)[: top_k or None]
        before = p[order].cumsum(-1) - p[order]
        order = order[before < top_p * p[order].sum()]  # the smallest set of at least top_p
        expected = torch.zeros(READABLE + 5, dtype=torch.float64)
        expected[order] = 4000 * p[order] / p[order].sum()
        counts = tokens.bincount(minlength=READABLE + 5)
        assert ((counts - expected).abs() <= 2.1).all()
        assert not counts[expected == 0].any()


# ------------------------------------------------------------------------------ C. against TRL 1.16


@pytest.fixture(scope="module")
def trl_batch(models, tmp_path_factory):
    """A TRL trainer whose policy has left its reference, a batch that it rolled out, and that
    batch's rewards [P,G]."""
    trl = pytest.importorskip("trl")
    import datasets

    rewards = []

    def reward(completions, **_):
        rewards.extend(len(set(text.split())) + 0.1 * len(text) for text in completions)
        return rewards

    reset_accelerate()
    options = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_steps": 1}
    options |= {"loss_type": "grpo", "beta": 0.04, "epsilon": 0.2, "scale_rewards": "group"}
    options |= {"num_iterations": 1, "use_bias_correction_kl": False, "temperature": 1.0}
    options |= {"num_generations": 4, "max_completion_length": 10, "report_to": "none", "seed": 3}
    folder = str(tmp_path_factory.mktemp("trl"))
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(models("world"), dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(models("world")),
        reward_funcs=reward,
        args=trl.GRPOConfig(output_dir=folder, per_device_train_batch_size=8, **options),
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    inputs = [{"prompt": PROMPTS[i]} for i in (0, 5) for _ in range(4)]
    batch = trainer._generate_and_score_completions(inputs)
    return trainer, batch, torch.tensor(rewards).view(2, 4)


def trl_loss(trainer, batch, old, coefficient):
    """TRL's loss and gradients; of several coefficients, one completion at a time."""
    trainer.model.zero_grad()
    inputs = {name: value for name, value in batch.items() if name != "old_per_token_logps"}
    inputs |= {} if old is None else {"old_per_token_logps": old}
    same = len(coefficient.unique()) == 1
    rows = [slice(0, 8)] if same else [slice(i, i + 1) for i in range(8)]
    total = 0.0
    for some in rows:
        trainer.beta = coefficient[some.start].item()
        part = {name: value[some] if value.ndim else value for name, value in inputs.items()}
        share = trainer._compute_loss(trainer.model, part) / len(rows)
        share.backward()
        total += share.item()
    return total, gradients(trainer.model)


@pytest.mark.parametrize("k", [None, 1.0, 2.0], ids=["grpo", "adrpo", "adrpo, k=2"])
@pytest.mark.parametrize("stale", [False, True], ids=["ratio 1", "clipped ratio"])
def test_loss_and_gradients_are_those_of_trl(models, trl_batch, k, stale):
    trainer, batch, rewards = trl_batch
    assert rewards.std(1).min() > 0
    advantage = llm.group_advantage(rewards).flatten()
    torch.testing.assert_close(advantage, batch["advantages"], rtol=1e-5, atol=1e-6)
    coefficient = torch.full((8,), 0.04)
    if k is not None:
        coefficient = llm.adaptive_beta(advantage, 0.04, k)
    pairs = zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    prompts = [ids[kept.bool()].tolist() for ids, kept in pairs][::4]
    tokens, kept = batch["completion_ids"], batch["completion_mask"].bool()
    policy, args = load(models("world"))
    read = llm.Batch(*llm.pad_left(policy, prompts), tokens, kept)
    ref_logp = llm.reference_log_probabilities(policy, read, args)
    expected = batch["ref_per_token_logps"] * kept
    torch.testing.assert_close(ref_logp * kept, expected, rtol=1e-4, atol=2e-5)
    policy.model.load_state_dict(trainer.model.state_dict())
    old, total, outside = None, 0.0, 0
    if stale:
        old = batch["ref_per_token_logps"] + 0.2 * numbers(*tokens.shape, dtype=torch.float32)
    for at, logp, _ in llm.completion_passes(policy, policy.model, read, args):
        before = logp.detach() if old is None else old[at]
        inputs = logp, before, ref_logp[at], advantage[at], coefficient[at], kept[at]
        loss = llm.grpo_loss(*inputs, 0.2) * len(logp) / 8
        loss.backward()
        total += loss.item()
        outside += int((((logp - before).exp() - 1).abs() > 0.2)[kept[at]].sum())
    theirs = trl_loss(trainer, batch, old, coefficient)
    assert total == pytest.approx(theirs[0], rel=1e-4, abs=1e-6)
    assert relative(gradients(policy.model), theirs[1]) < 1e-4
    assert outside > 0.2 * int(kept.sum()) if stale else outside == 0


# ----------------------------------------------------------------- D. the program as a user runs it


KINDS = {
    "adrpo": [],
    "grpo": ["--method", "grpo"],
    "lora": ["--lora-rank", "4", "--learning-rate", "1e-2"],
}


@pytest.fixture(scope="session")
def runs(base_flags, tmp_path_factory):
    """Finished runs: {kind: (folder, standard output)}."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for kind, flags in KINDS.items():
        out = finish(base_flags, "--output-dir", folder, "--run-name", kind, *flags)
        made[kind] = folder / kind, out
    return made


@pytest.fixture(scope="session")
def base(models, base_flags, tmp_path_factory):
    """The weights before training, by kind as in final/."""
    full = load_file(models("world") / "model.safetensors")
    folder = tmp_path_factory.mktemp("base")
    still = ["--learning-rate", "1e-30", "--iterations", "1"]
    finish(base_flags, "--output-dir", folder, "--run-name", "r", "--lora-rank", "4", *still)
    return {"adrpo": full, "grpo": full, "lora": weights(folder / "r")}


@pytest.fixture()
def again(base_flags, tmp_path):
    """Runs with other flags into a folder of its own -> that folder, standard output."""

    def start(*flags, name="r"):
        out = finish(base_flags, "--output-dir", tmp_path, "--run-name", name, *flags)
        return tmp_path / name, out

    return start


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_everything_behind(runs, base, kind):
    run, out = runs[kind]
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    names = {name for name in names if not re.search("tfevents|^final/|^adapters/", name)}
    expected = {"args.json", "metrics.jsonl", "summary.json", ".lock", "checkpoint.pt"}
    expected |= {f"samples/{step:06d}.jsonl" for step in range(3)} | {"checkpoint-previous.pt"}
    assert names == expected
    record = json.loads((run / "args.json").read_text())
    assert record["args"]["group_size"] == 4
    assert {"torch", "transformers", "peft", "accelerate"} < set(record["versions"])
    assert "10 training prompts, 2 for evaluation; every tenth of --dataset (2) is held out" in out
    assert all((weights(run)[key] != base[kind][key]).any() for key in base[kind])
    if kind == "lora":
        last = load_file(run / "adapters/000002/adapter_model.safetensors")
        torch.testing.assert_close(last, weights(run), rtol=0, atol=0)
        assert (run / "adapters/000001").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_and_samples_of_a_run(runs, kind):
    run, _ = runs[kind]
    rows = read_metrics(run, timing=True)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["eval/kl"] == 0
    assert rows[1]["kl"] == rows[1]["losses/divergence"] == rows[1]["clip_ratio/region_mean"] == 0
    assert min(rows[2]["kl"], rows[2]["eval/kl"]) > 0
    for figure in ("max", "mean"):
        assert 0 < rows[1][f"sampling/sampling_logp_difference/{figure}"] < 1e-5
    bounds = [rows[1][f"adrpo/coefficient_{name}"] for name in ("min", "max")]
    assert bounds == pytest.approx([0.04, 0.04] if kind == "grpo" else [0, 0.08])
    assert rows[1]["charts/learning_rate"] == pytest.approx((1e-2 if kind == "lora" else 1e-3) / 5)
    events = EventAccumulator(str(run), size_guidance={"histograms": 0})
    events.Reload()
    tags = set().union(*rows) - {"step"}
    assert set(events.Tags()["scalars"]) == tags
    for tag in tags:
        logged = {event.step: event.value for event in events.Scalars(tag)}
        expected = {row["step"]: row[tag] for row in rows if tag in row}
        assert logged == pytest.approx(expected, rel=1e-5), tag
    drawn = events.Histograms("adrpo/coefficient")
    assert [(one.step, sum(one.histogram_value.bucket)) for one in drawn] == [(1, 8), (2, 8)]
    texts = events.Tensors("completions/text_summary")
    texts = {event.step: event.tensor_proto.string_val[0].decode() for event in texts}
    for step, row in enumerate(rows):
        records = read_lines(run / "samples" / f"{step:06d}.jsonl")
        assert [record["prompt"] for record in records] == [PROMPTS[i] for i in (0, 0, 10, 10)]
        assert html.escape(PROMPTS[0]) in texts[step]
        assert not re.search(r"<(?!/?pre>)", texts[step])
        shown = [f"\n{html.escape(one['completion'])}</pre>" in texts[step] for one in records]
        assert any(shown[:2])
        assert any(shown[2:])
        written = [record["completion"] for record in records]
        expected = [len(set(text.split())) + 0.01 * len(text) for text in written]
        assert [record["reward"] for record in records] == pytest.approx(expected, rel=1e-6)
        sums = {name: sum(one[name] for one in records) for name in [*records[0]][2:]}
        assert row["eval/mean_length"] == sums["tokens"] / 4
        assert row["eval/clipped_ratio"] == sums["cut_off"] / 4
        for name in ("kl", "entropy"):
            assert row[f"eval/{name}"] == pytest.approx(sums[name] / sums["tokens"])
        for name in ("reward", "reward_words"):
            assert row[f"eval/{name}"] == pytest.approx(sums["reward"] / 4)
    summary = json.loads((run / "summary.json").read_text())
    for name, row in (("base", rows[0]), ("final", rows[2])):
        logged = {tag[5:]: value for tag, value in row.items() if tag.startswith("eval/")}
        assert summary[name] == logged


@pytest.mark.parametrize("kind", ["adrpo", "lora"])
def test_kl_is_exactly_zero_before_the_first_step_in_bf16(again, kind):
    """And later rollouts are of the weights of that time, though the sampler is a copy."""
    flags = ["--precision", "bf16", "--lora-rank", 4] if kind == "lora" else ["--precision", "bf16"]
    run, _ = again(*flags, "--learning-rate", 5e-2)
    rows = read_metrics(run)
    assert rows[0]["eval/kl"] == rows[1]["kl"] == rows[1]["clip_ratio/region_mean"] == 0
    assert rows[1]["eval/kl"] > 0
    gaps = [row["sampling/sampling_logp_difference/max"] for row in rows[1:]]
    assert 0 < max(gaps) < llm.SAMPLER_BOUND[torch.bfloat16] / 2
    stored = llm.load_checkpoint(run)["weights"]
    assert all(value.dtype == torch.float32 for value in [*weights(run).values(), *stored.values()])


@pytest.mark.parametrize("kind", ["adrpo", "lora"])
def test_the_result_reloads_in_stock_libraries_with_identical_logits(models, runs, kind):
    run, _ = runs[kind]
    lora = kind == "lora"
    stock = AutoModelForCausalLM.from_pretrained(models("world") if lora else run / "final")
    base = AutoModelForCausalLM.from_pretrained(models("world"))
    stock = peft.PeftModel.from_pretrained(stock, run / "final") if lora else stock
    # the same from the weights in the run's checkpoint, put into a model as the script builds it
    policy, _ = load(models("world"), lora_rank=4 if lora else 0)
    state = llm.load_checkpoint(run)["weights"]
    named = dict(policy.model.named_parameters(remove_duplicate=False))
    assert set(state) == {name for name, one in named.items() if one.requires_grad}
    policy.model.load_state_dict(state, strict=False)
    ids = torch.arange(6, 30)[None]
    assert torch.equal(stock(ids).logits, policy.model(ids).logits)
    if lora:
        assert all("lora_" in name for name in state)
        with policy.model.disable_adapter():
            assert torch.equal(policy.model(ids).logits, base(ids).logits)
    assert (base(ids).logits - stock(ids).logits).abs().max() > 1e-3
    for folder in (run / "final", models("world")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer("the cat <end>").input_ids[-1] == tiny_models.END
    assert stock.generation_config.eos_token_id == STOP


def test_the_models_generation_config_changes_nothing(models, again, runs, tmp_path):
    """A penalty, a temperature and top-k of the model's own (Qwen2's) have no part in rollouts; the
    export says how it was sampled."""
    folder = shutil.copytree(models("world"), tmp_path / "model")
    own = {"repetition_penalty": 1.1, "temperature": 0.7, "top_k": 3, "do_sample": True}
    GenerationConfig(eos_token_id=STOP, pad_token_id=0, **own).save_pretrained(folder)
    run, _ = again("--model-id", folder)
    assert_same_run(runs["adrpo"][0], run)
    run, _ = again("--iterations", 1, "--temperature", 0.9, "--top-p", 0.8, name="warm")
    exported = GenerationConfig.from_pretrained(run / "final")
    assert (exported.do_sample, exported.temperature, exported.top_p) == (True, 0.9, 0.8)
    assert exported.top_k == 0
    assert exported.eos_token_id == STOP


@pytest.mark.parametrize("method,k", [("adrpo", 1.0), ("adrpo", 0.5), ("grpo", None)])
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_an_iteration_is_the_textbook_on_stock_models(models, again, method, k, rank):
    """One iteration of two updates, again: padded sequences, a loop over completions and plain
    AdamW."""
    flags = f"--iterations 1 --updates-per-rollout 2 --learning-rate 5e-2 --method {method}"
    flags += f" --lora-rank {rank} --adv-clip-k {k} --max-grad-norm 0.5 --temperature 0.9"
    run, _ = again(*flags.split())
    policy, args = load(models("world"), lora_rank=rank, temperature=0.9)
    model, reference = copy.deepcopy(policy.model), copy.deepcopy(policy.model)
    tokenizer = AutoTokenizer.from_pretrained(models("world"))
    training = [prompt for i, prompt in enumerate(PROMPTS) if i % 10]
    prompts = [tokenizer(training[row]).input_ids for row in llm.draw_prompts(10, 2, 0, 1)]
    chance = torch.rand(2, 4, 10, generator=llm.seed_everything(1, 1))
    tokens, mask, _ = llm.rollout(policy, prompts, chance, args)
    texts = [
        tokenizer.decode(t[m], skip_special_tokens=True) for t, m in zip(tokens, mask, strict=True)
    ]
    rewards = torch.tensor([len(set(text.split())) + 0.01 * len(text) for text in texts]).view(2, 4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
    ref_logp = ordinary(reference, prompts, tokens, mask, 0.9)[0].detach()
    old, total, norm, figures = None, 0.0, 0.0, []
    for _ in range(2):
        optimizer.zero_grad()
        logp, entropy = ordinary(model, prompts, tokens, mask, 0.9)
        old = logp.detach() if old is None else old
        losses = []
        for i in range(8):
            kept, group = mask[i], rewards[i // 4]
            a = float((group[i % 4] - group.mean()) / (group.std() + 1e-4))
            beta = 0.04 - min(max(a, -k * 0.04), k * 0.04) if method == "adrpo" else 0.04
            ratio, d = (logp - old)[i][kept].exp(), (ref_logp - logp)[i][kept]
            policy_term = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
            losses.append((policy_term + beta * (d.exp() - d - 1)).mean())
            stuck = (ratio > 1.2) if a > 0 else (ratio < 0.8)  # clipped: no gradient
            figures.append(torch.stack([d.exp() - d - 1, entropy[i][kept], stuck]).detach())
        loss = sum(losses) / 8
        loss.backward()
        norm += float(torch.nn.utils.clip_grad_norm_(trained, 0.5)) / 2
        total += loss.item() / 2
        optimizer.step()
    row = read_metrics(run)[1]
    assert row["losses/total"] == pytest.approx(total, rel=1e-3, abs=1e-6)
    assert row["losses/grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert row["reward/mean"] == pytest.approx(rewards.mean().item(), rel=1e-6)
    assert row["completions/mean_length"] == pytest.approx(mask.sum(1).float().mean().item())
    tags = ("kl", "entropy", "clip_ratio/region_mean")
    expected = torch.cat(figures, dim=1).mean(1).tolist()
    assert [row[tag] for tag in tags] == pytest.approx(expected, rel=1e-3)
    assert min(row[tag] for tag in tags) > 0
    states = (weights(run), model.state_dict(), reference.state_dict())
    strip = functools.partial(re.sub, r"^base_model.model.|\.default", "")
    mine, final, start = ({strip(n): value for n, value in state.items()} for state in states)
    assert change(mine, final, start) < 0.01


@pytest.mark.parametrize("kind", ["adrpo", "lora"])
@pytest.mark.parametrize(  # one prompt and one completion a pass, parts of groups, all apart
    "flags", ["--train-tokens 30", "--train-tokens 1", "--rollout-batch 1"]
)
def test_batch_sizes_do_not_change_the_result(again, runs, base, kind, flags):
    run, _ = again(*KINDS[kind], *flags.split())
    assert_same_run(runs[kind][0], run, base[kind], tolerance=1e-3)


FLAGS = "--method grpo,--adv-clip-k None,--beta0 0.5,--updates-per-rollout 2,--temperature 0.7"
FLAGS += ",--top-p 0.5,--top-k 3,--weight-decay 9,--seed 2,--chat,--scale-rewards none"


@pytest.mark.parametrize("flags", FLAGS.split(","))
def test_these_flags_do_change_the_result(again, runs, base, flags):
    run, _ = again(*flags.split(), "--eval-every", 5)
    assert change(weights(runs["adrpo"][0]), weights(run), base["adrpo"]) > 1e-4


def test_rewards_that_are_not_scaled(again, files):
    flags = ["--scale-rewards", "none", "--iterations", 1]
    run, _ = again(*flags, "--reward", f"{files}/mine.py:small", name="small")
    row = read_metrics(run)[1]
    assert 0.03 < row["adrpo/coefficient_min"] < 0.04 < row["adrpo/coefficient_max"] < 0.05
    assert row["adrpo/fraction_saturated"] == 0
    run, _ = again("--reward", f"{files}/mine.py:constant", name="constant")
    for row in read_metrics(run)[1:]:
        assert row["adrpo/coefficient_min"] == row["adrpo/coefficient_max"] == pytest.approx(0.04)
        assert (row["reward/std"], row["reward/frac_reward_zero_std"]) == (0, 1)
        assert row["losses/policy"] == 0


def test_completions_of_one_token_are_strict_json(again):
    """They have no pair of tokens, so no distinct-2: null, never NaN (`read_lines` refuses it)."""
    run, _ = again("--max-completion-length", 1)
    rows = read_metrics(run)
    assert rows[2]["eval/distinct_2"] is None
    assert rows[2]["completions/distinct_2"] is None
    assert read_lines(run / "samples" / "000002.jsonl")
    assert "NaN" not in (run / "summary.json").read_text()


def test_a_reward_model_and_plugins_are_weighted_and_logged(models, files, again):
    flags = ["--reward-model", models("reward"), "--reward-weights", 2, 0.1, -1]
    flags += ["--reward", f"{files}/mine.py:length", f"{files}/mine.py:words"]
    large, _ = again(*flags, name="large")
    small, _ = again(*flags, "--reward-batch", 3, name="small")
    large, small = read_metrics(large), read_metrics(small)
    for row in large[1:]:
        for a, b in (("reward/", "reward/mean"), ("eval/reward_", "eval/reward")):
            expected = 2 * row[f"{a}reward"] + 0.1 * row[f"{a}length"] - row[f"{a}words"]
            assert row[b] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert small[0] == pytest.approx(large[0], rel=1e-5)
    for tag in ("reward/mean", "reward/std", "reward/reward", "losses/grad_norm"):
        assert small[1][tag] == pytest.approx(large[1][tag], rel=1e-4), tag


def test_an_adapter_is_gone_on_from(again, runs):
    """Its evaluation and its KL to the model without it are where the first run ended."""
    first, _ = runs["lora"]
    run, _ = again("--adapter", first / "final", "--no-keep-adapters", "--learning-rate", 1e-2)
    rows, before = read_metrics(run), read_metrics(first)[-1]
    for tag, value in rows[0].items():
        if tag.startswith("eval/"):
            assert value == pytest.approx(before[tag], rel=1e-5), tag
    assert rows[0]["eval/kl"] > 0
    assert change(weights(first), weights(run), weights(run)) > 0
    assert not (run / "adapters").exists()


def test_a_sampler_that_is_another_function_stops_the_run_before_the_step(
    models, base_flags, again, monkeypatch, tmp_path
):
    """A training pass of another temperature, and one whose dropout is on: nothing that the run has
    saved is touched."""
    tiny_models.make_lm(tmp_path / "gpt2", "gpt2")
    run, _ = again("--model-id", tmp_path / "gpt2", "--eval-every", 2)
    (run / "summary.json").unlink()
    (run / "checkpoint.pt").unlink()
    kept = {path: path.read_bytes() for path in (run / "final").iterdir()}
    kept[run / "checkpoint-previous.pt"] = (run / "checkpoint-previous.pt").read_bytes()
    passes, load_policy = llm.completion_passes, llm.load_policy

    def hotter(policy, model, batch, args):
        return passes(policy._replace(temperature=1.3), model, batch, args)

    def dropping(*arguments):
        policy = load_policy(*arguments)
        policy.model.train()
        return policy

    for name, wrong in (("completion_passes", hotter), ("load_policy", dropping)):
        with monkeypatch.context() as patched, command_line("--resume", run):
            patched.setattr(llm, name, wrong)
            with pytest.raises(llm.InputError, match="log-probabilities differ"):
                llm.main(tyro.cli(llm.Args))
        assert [row["step"] for row in read_metrics(run)] == [0, 1]
        assert {path: path.read_bytes() for path in kept} == kept
        assert not (run / "checkpoint.pt").exists()
    finish([], "--resume", run)


# -------------------------------------------------------------------------- kill, resume, processes


# A child that kills itself in the middle of writing its second checkpoint (iteration 4).
DYING = """
import os, runpy, signal, sys, torch
save, saved = torch.save, []
def dying_save(what, file, **rest):
    saved.append(what["iteration"])
    if len(saved) == 2:
        file.write(b"half a checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(what, file, **rest)
torch.save = dying_save
script = sys.argv[1]; sys.argv = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


def test_killed_while_saving_and_resumed_equals_straight(base_flags, again, tmp_path):
    flags = ["--iterations", 4, "--save-every", 2, "--updates-per-rollout", 2]
    straight, _ = again(*flags, name="straight")
    flags = with_flags(base_flags, *flags, "--output-dir", tmp_path, "--run-name", "killed")
    command = [sys.executable, "-c", DYING, str(SCRIPT), *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]
    killed = tmp_path / "killed"
    assert [row["step"] for row in read_metrics(killed)] == [0, 1, 2, 3, 4]
    assert {path.name for path in killed.glob("checkpoint*")} == {
        "checkpoint.pt",
        "checkpoint.part",
    }
    time.sleep(1.1)  # TensorBoard orders its files by the second
    os.utime(killed / "args.json")  # the newest run
    finish([], "--resume", "latest", "--output-dir", tmp_path)
    assert_same_run(straight, killed)
    events = EventAccumulator(str(killed))
    events.Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [1, 2, 3, 4]
    one, other = (llm.load_checkpoint(run)["optimizer"]["state"] for run in (straight, killed))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.fixture(params=["adrpo", "lora"])
def unfinished(runs, tmp_path, request):
    """A run as it is one step before its end: copy, original."""
    run = shutil.copytree(runs[request.param][0], tmp_path / "copy")
    (run / "summary.json").unlink()
    return run, runs[request.param][0]


@pytest.mark.parametrize("newest", [True, False])
def test_a_run_resumes_to_itself(unfinished, newest):
    """From its last checkpoint, and from the one before where the last is gone."""
    run, original = unfinished
    if not newest:
        (run / "checkpoint.pt").unlink()
        time.sleep(1.1)
    finish([], "--resume", run)
    assert_same_run(original, run)
    assert (run / "summary.json").read_text() == (original / "summary.json").read_text()


def test_resume_refuses_what_would_spoil_a_run(runs, models, tmp_path):
    original, _ = runs["adrpo"]
    run = shutil.copytree(original, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "finished" in finish([], "--resume", run)
    for flags in (["--beta0", 0.5], ["--beta0", 0.04], ["--no-chat"], ["--run_name", "other"]):
        assert "--resume" in refused(["--resume", run], *flags)
    assert "--resume" in refused(["--resume", ""])
    assert "--resume" in refused(["--resume", "latest", "--output-dir", tmp_path / "none"])
    assert {path: path.read_bytes() for path in before} == before
    (run / "summary.json").unlink()
    with FileLock(run / ".lock"):
        assert "another process" in refused(["--resume", run])
    state = (run / "checkpoint.pt").read_bytes()
    flipped = bytearray(state)
    flipped[len(state) // 2] ^= 16
    for damaged in (state[:-100], b"", bytes(flipped)):
        (run / "checkpoint.pt").write_bytes(damaged)
        assert "checkpoint-previous.pt" in refused(["--resume", run])
    assert read_metrics(run) == read_metrics(original)
    for path in run.glob("checkpoint*"):
        path.unlink()
    refused(["--resume", run])  # nothing to go on from: starting over would wipe the history
    assert read_metrics(run) == read_metrics(original)


def test_other_prompts_than_when_the_run_began_are_refused(again, files, tmp_path):
    prompts = Path(shutil.copy(files / "prompts.txt", tmp_path / "p.txt"))
    run, _ = again("--dataset", prompts)
    (run / "summary.json").unlink()
    prompts.write_text("\n".join([*PROMPTS[:-1], "the bird sees"]))
    assert "--dataset" in refused(["--resume", run])


def test_a_model_of_the_hub_is_pinned_to_its_commit(again, models, tmp_path, monkeypatch):
    """By a cache as the hub's client writes it: recorded, gone on from after the branch has moved,
    and a revision that is not there is refused."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub, commits = tmp_path / "hub" / "models--org--name", ("a" * 40, "b" * 40)
    shutil.copytree(models("world"), hub / "snapshots" / commits[0])
    (hub / "snapshots" / commits[1]).mkdir()
    shutil.copy(models("world") / "config.json", hub / "snapshots" / commits[1])
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(commits[0])
    run, _ = again("--model-id", "org/name", "--iterations", 1)
    assert (
        json.loads((run / "args.json").read_text())["sources"]["model_id"] == f"org/name@{'a' * 40}"
    )
    final = weights(run)
    (hub / "refs" / "main").write_text(commits[1])
    assert llm.find_model("--model-id", "org/name") == ("org/name", commits[1])
    (run / "summary.json").unlink()
    finish([], "--resume", run)
    torch.testing.assert_close(weights(run), final, rtol=0, atol=0)
    with pytest.raises(llm.InputError, match="--model-id"):
        llm.find_model("--model-id", "org/name@nosuch")


def test_a_flag_given_twice_is_refused(base_flags):
    for flags in (["--seed", "2", "--seed", "3"], ["--train-tokens=9"], ["--train_tokens", "9"]):
        code, _, _ = run_script(*base_flags, *flags)
        assert code.startswith("error: ")


def test_a_diverging_run_stops_and_saves_nothing(again, base_flags, tmp_path):
    flags = ["--output-dir", tmp_path, "--run-name", "rate"]
    for rate in ("1e30", "3e38"):  # a step that is still finite, one that is not
        refused(base_flags, *flags, "--learning-rate", rate)
        steps = [row["step"] for row in read_metrics(tmp_path / "rate")]
        for row in read_lines(tmp_path / "rate" / "metrics.jsonl"):
            assert all(value is None or math.isfinite(value) for value in row.values())
        assert len(steps) < 3
        for path in (tmp_path / "rate").glob("checkpoint*.pt"):
            state = torch.load(path, weights_only=True)["weights"]
            assert all(value.isfinite().all() for value in state.values())
        assert not list((tmp_path / "rate" / "final").iterdir())
        shutil.rmtree(tmp_path / "rate")


# Several command lines one after the other, each with a process group of its own. Before the last
# the first process makes the copy of a run that is resumed.
SEVERAL = """
import json, os, pathlib, runpy, shutil, sys, time
import accelerate
script, *several, (finished, copy) = json.loads(sys.argv[1])
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
for port, flags in several:
    if "--resume" in flags and os.environ["RANK"] == "0":
        shutil.copytree(finished, "part", ignore=lambda *_: ["summary.json", "checkpoint.pt"])
        os.rename("part", copy)
    while "--resume" in flags and not os.path.exists(copy):
        time.sleep(0.05)
    os.environ["MASTER_PORT"], sys.argv = port, [script, *flags]
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    runpy.run_path(script, run_name="__main__")
"""


def run_processes(folder, several, finished, copy):
    """These command lines, each by two processes of torchrun; the last one resumes a copy of a
    finished run from its last checkpoint but one."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in several]
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    (folder / "several.py").write_text(SEVERAL)
    tasks = [str(SCRIPT), *zip(ports, several, strict=True), (str(finished), str(copy))]
    launcher = "import torch.distributed.run as launcher; launcher.main()"
    command = [sys.executable, "-c", launcher, "--standalone", "--nproc-per-node", "2"]
    command += [str(folder / "several.py"), json.dumps(tasks)]
    options = {"cwd": folder, "timeout": 600, "check": False}
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr[-3000:]


def test_two_processes_are_one_with_the_same_batch(again, base_flags, base, tmp_path):
    """All weights, a LoRA, and weights that are split (FSDP): several parts a pass; and FSDP's
    resumed run is the straight one."""
    parts = ["--prompts-per-update", "4", "--train-tokens", "36", "--updates-per-rollout", "2"]
    kinds = {kind: [*KINDS[kind], *parts] for kind in ("adrpo", "lora")}
    ones = {kind: again(*flags, name=kind)[0] for kind, flags in kinds.items()}
    with pytest.raises(llm.InputError, match="--prompts-per-update"):
        llm.check_args(llm.Args(prompts_per_update=5), 2)
    kinds["fsdp"], ones["fsdp"] = [*parts, "--fsdp"], ones["adrpo"]
    folder = ["--output-dir", tmp_path, "--run-name"]
    several = [with_flags(base_flags, *kinds[kind], *folder, f"two {kind}") for kind in kinds]
    straight, copied = tmp_path / "two fsdp", tmp_path / "copy"
    run_processes(tmp_path, [*several, ["--resume", str(copied)]], straight, copied)
    assert_same_run(straight, copied)
    for kind, one in ones.items():
        before = base["lora" if kind == "lora" else "adrpo"]
        assert_same_run(one, tmp_path / f"two {kind}", before, tolerance=1e-4)
        assert len(read_lines(tmp_path / f"two {kind}" / "samples" / "000002.jsonl")) == 4
    ids, loaded = torch.arange(6, 30)[None], AutoModelForCausalLM.from_pretrained
    logits = [loaded(run / "final")(ids).logits for run in (ones["fsdp"], straight)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-2)


# ------------------------------------------------------------------- E. reward models against stock


REWARD_TOKENIZERS = {
    "template and tokenizer write bos": {},
    "only the template writes bos": {"adds_bos": False},
    "no bos": {"bos": False, "adds_bos": False},
    "no template": {"chat": False},
    "no padding token": {"pad": False},
    "no padding token, template ends with eos": {"pad": False, "ends": True},
}


@pytest.mark.parametrize("name", REWARD_TOKENIZERS)
def test_reward_models_are_stock_one_by_one(tmp_path, name):
    folder = tiny_models.make_reward_lm(tmp_path / "rm", **REWARD_TOKENIZERS[name])
    stock = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    own = AutoTokenizer.from_pretrained(folder)
    talk = [{"role": "system", "content": "is very"}, {"role": "user", "content": "a small fish"}]
    prompts = [PROMPTS[0], talk] * 2
    completions, expected = ["cat and dog", "the", "", "one two ( three )"], []
    reward = llm.RewardModel((str(folder), None), 3, CPU, torch.float32)
    for prompt, completion in zip(prompts, completions, strict=True):
        asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        messages = [*asked, {"role": "assistant", "content": completion}]
        if own.chat_template:
            ids = own.apply_chat_template(messages)["input_ids"]
            assert ids.count(tiny_models.BOS) == (own.bos_token is not None)
        else:
            ids = own("\n".join(message["content"] for message in messages)).input_ids
            assert ids.count(tiny_models.BOS) == 1
        with torch.no_grad():
            expected.append(stock(input_ids=torch.tensor([ids])).logits.item())
    with torch.no_grad():
        assert reward(prompts, completions, [{}] * 4).tolist() == pytest.approx(expected, abs=1e-5)
        reward.options["max_length"] = 16  # of a text that is too long the completion stays
        one, other = reward(["the red cat " * 8] * 2, ["likes", "keeps not"], [{}] * 2).tolist()
    assert np.std(expected) > 0.01
    assert abs(one - other) > 1e-3


def rekey(source, target, rename, file="model.safetensors"):
    """A copy of a checkpoint whose weights have other names; None: left out."""
    shutil.copytree(source, target)
    renamed = {rename(name): value for name, value in load_file(target / file).items()}
    renamed.pop(None, None)
    save_file(renamed, target / file, metadata={"format": "pt"})
    return target


def test_a_loras_folder_is_no_model(models, tmp_path):
    """Its base model alone would be another reward, or another policy."""
    model = AutoModelForSequenceClassification.from_pretrained(models("reward"), num_labels=1)
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    with pytest.raises(llm.InputError, match="of a LoRA"):
        llm.find_model("--reward-model", str(tmp_path / "lora"))


def test_a_reward_that_writes_into_its_inputs_changes_nothing_else():
    def writes(prompts, completions, rows):
        for row in rows:
            row["prompt"] = "x"
            row["turns"].append("x")
        completions[:] = prompts[:] = ["x"] * len(rows)
        return [1.0] * len(rows)

    def length(prompts, completions, rows):
        turns = [len(row["turns"]) for row in rows]
        pairs = zip(prompts, completions, turns, strict=True)
        return [float(len(p) + 10 * len(c) + 1000 * n) for p, c, n in pairs]

    rows = [{"prompt": "the cat", "turns": []}, {"prompt": "a", "turns": []}]
    completions = ["sees", ""]
    judges = llm.Judges({"writes": writes, "length": length}, torch.ones(2))
    for _ in range(2):
        assert llm.score(judges, completions, rows).tolist() == [[1, 47], [1, 1]]
    assert rows == [{"prompt": "the cat", "turns": []}, {"prompt": "a", "turns": []}]
    assert completions == ["sees", ""]


def test_whole_modules_of_an_adapter_never_train_in_bfloat16(models, base_flags, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    model = AutoModelForCausalLM.from_pretrained(models("world"))
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    flags = [base_flags, "--adapter", tmp_path / "lora", "--output-dir", tmp_path / "runs"]
    assert "--precision fp32" in refused(*flags, "--precision", "bf16")
    assert not (tmp_path / "runs").exists()
    finish(*flags, "--run-name", "r")


# ------------------------------------------------------------------------------------------ F. data


CAT, DOG = "the\u2028cat\x85", "the dog"  # lines end at line feeds only
LAYOUTS = {
    "bom.txt": f"\ufeff{CAT}\n{DOG}\n",
    "dos.txt": f"{CAT}\r\n\r\n{DOG}\r\n",
    "strings.json": json.dumps([CAT, DOG], ensure_ascii=False),
    "objects.json": json.dumps([{"prompt": CAT}, {"prompt": DOG}]),
    "indented.json": json.dumps([{"question": CAT}, {"question": DOG}], indent=2),
    "lines.json": f'{{"text": "{CAT}"}}\n{{"text": "{DOG}"}}\n',
    "bom.jsonl": f'\ufeff{{"prompt": "{CAT}"}}\n\n{{"prompt": "{DOG}"}}\n',
    "table.csv": f'\ufeffnumber,prompt\r\n1,"{CAT}"\r\n2,{DOG}\r\n',
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_prompts(tmp_path, name):
    (tmp_path / name).write_bytes(LAYOUTS[name].encode())
    rows, note, source = llm.load_rows("dataset", str(tmp_path / name), None, None)
    assert [row["prompt"] for row in rows] == [CAT, DOG]
    assert (note, source) == ("", str(tmp_path / name))


def test_tables_and_configurations(tmp_path):
    """A data set of two configurations, as GSM8K is laid out."""
    folder, listed = tmp_path / "gsm", "---\nconfigs:\n"
    for name in ("main", "socratic"):
        (folder / name).mkdir(parents=True)
        rows = [{"question": "the cat", "kind": name}, {"question": "the dog", "kind": name}]
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folder / name / "train.parquet")
        listed += f"- config_name: {name}\n  data_files: {name}/*.parquet\n"
    (folder / "README.md").write_text(listed + "---\n")
    rows, _, _ = llm.load_rows("dataset", str(folder / "main" / "train.parquet"), None, None)
    assert [row["prompt"] for row in rows] == ["the cat", "the dog"]
    assert rows[0]["kind"] == "main"
    with pytest.raises(llm.InputError, match="CONFIG"):
        llm.load_rows("dataset", str(folder), None, None)
    rows, _, _ = llm.load_rows("dataset", f"{folder}:socratic", None, None)
    assert [row["kind"] for row in rows] == ["socratic"] * 2


def test_rows_that_are_not_used_are_counted(tmp_path):
    user, answer = ({"role": role, "content": "a fish"} for role in ("user", "assistant"))
    rows = [{"messages": [user]}, {"messages": [{**user, "content": "a cat"}, answer]}]
    rows += [{"messages": [user, answer]}, {"messages": []}, {"messages": None}, {"other": 1}]
    rows += [{"messages": [{"role": "user", "content": None}]}, {"messages": [answer]}]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, note, _ = llm.load_rows("dataset", str(path), None, None)
    assert [row["prompt"][-1] for row in found] == [user, {**user, "content": "a cat"}]
    assert "8 rows" in note
    assert "5 without a prompt" in note
    assert "1 with a prompt that was there before" in note
    assert "2 with an answer" in note


def test_chat_messages_and_chat_flag_are_the_stock_template(models, again, tmp_path):
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in messages))
    one, _ = again("--dataset", path, name="messages")
    other, out = again("--chat", name="chat")
    assert_same_run(one, other)
    assert "<end>" in out[out.index("stop tokens") :]
    assert read_lines(one / "samples" / "000000.jsonl")[0]["prompt"] == messages[0]
    tokenizer = AutoTokenizer.from_pretrained(models("world"))
    talk = [{"role": "system", "content": "is very"}, *messages[0]]
    rows = [{"prompt": talk}, {"prompt": PROMPTS[1]}]
    stock = functools.partial(tokenizer.apply_chat_template, add_generation_prompt=True)
    expected = [stock(one)["input_ids"] for one in (talk, messages[1])]
    for chat in (True, False):  # a list among them puts all through the template
        assert [prompt.ids for prompt in llm.encode_prompts(tokenizer, rows, chat)] == expected
    plain = llm.encode_prompts(tokenizer, rows[1:], False)
    assert plain[0].ids == tokenizer(PROMPTS[1]).input_ids
    tokenizer.chat_template += "{% if quiet %}not{% endif %}"
    (quiet,) = llm.encode_prompts(tokenizer, rows[:1], True, '{"quiet": true}')
    assert quiet.ids == [*expected[0], *tokenizer("not").input_ids]


def test_the_token_that_ends_a_turn_stops_a_completion(models):
    """Also where the generation config and the tokenizer name another."""
    policy, _ = load(models("world"))
    policy.model.generation_config.eos_token_id = tiny_models.EOS
    tokenizer = AutoTokenizer.from_pretrained(models("world"))
    assert llm.stop_tokens(policy.model, tokenizer) == STOP
    tokenizer.chat_template = None
    assert llm.stop_tokens(policy.model, tokenizer) == [tiny_models.EOS]
    policy.model.generation_config.eos_token_id = [7, 8]
    assert llm.stop_tokens(policy.model, tokenizer) == [tiny_models.EOS, 7, 8]


def test_rows_reach_the_reward_and_long_prompts_are_left_out(again, tmp_path):
    rows = [{"question": prompt, "number": i} for i, prompt in enumerate(PROMPTS)]
    rows += [{"question": "the " * 17, "number": 12}, {"question": PROMPTS[0], "number": 13}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    (tmp_path / "mine.py").write_text(
        f"PROMPTS = {PROMPTS!r}\n"
        "def number(prompts, completions, rows):\n"
        "    assert [PROMPTS[row['number']] for row in rows] == prompts\n"
        "    return [float(row['number']) for row in rows]\n"
    )
    flags = ["--dataset", tmp_path / "p.jsonl", "--reward", f"{tmp_path}/mine.py:number"]
    run, out = again(*flags)
    assert "10 training prompts, 2 for evaluation" in out
    assert "1 prompts of more than 16 tokens are left out" in out
    assert "1 with a prompt that was there before" in out
    row = read_metrics(run)[1]
    assert row["reward/frac_reward_zero_std"] == 1
    assert row["losses/policy"] == 0


def test_held_out_prompts(models, files, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(models("world"))
    (tmp_path / "other.txt").write_text(f"a white bird\n\n{PROMPTS[3]}\n")
    args = llm.Args(dataset=str(files / "prompts.txt"), eval_dataset=str(tmp_path / "other.txt"))
    train, heldout, note, sources = llm.load_prompts(args, tokenizer)
    assert [prompt.row["prompt"] for prompt in train] == PROMPTS
    assert [prompt.row["prompt"] for prompt in heldout] == ["a white bird", PROMPTS[3]]
    assert "1 of the 2 evaluation prompts are training prompts" in note
    assert set(sources) == {"dataset", "eval_dataset"}


# ------------------------------------------------------------------------------------- G. bad input


@pytest.mark.parametrize("family", tiny_models.LM_OTHER_CACHES)
def test_models_whose_cache_is_not_keys_and_values_are_refused(models, family):
    with pytest.raises(llm.InputError, match="--model-id"):
        policy, _ = load(models(family))
        llm.check_cache(policy, random_prompts(7, 3))


LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LONG = {"rope_scaling": LONG, "original_max_position_embeddings": 16}  # as Phi-3's files have it
DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 4.0}}


@pytest.mark.parametrize("family,rope,most", [("phi3", LONG, 16), ("llama", DYNAMIC, 128)])
def test_positions_that_would_change_cached_keys_are_refused(tmp_path, family, rope, most):
    folder = tiny_models.make_lm(tmp_path / "long", family, **rope)
    load(folder, max_prompt_length=most - 12)
    with pytest.raises(llm.InputError, match="--max-prompt-length"):
        load(folder, max_prompt_length=most - 11)


@pytest.fixture(scope="session")
def bad(models, runs, tmp_path_factory):
    """A folder of things that cannot work."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.txt").write_text("\n\n")
    (folder / "one.txt").write_text("only one")
    (folder / "long.txt").write_text("the " * 30 + "\n" + "a " * 20)
    (folder / "numbers.jsonl").write_text("1\n2\n")
    (folder / "broken.jsonl").write_text('{"prompt": \n')
    (folder / "columns.jsonl").write_text('{"why": "the"}\n')
    chats = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (folder / "mine.py").write_text(
        "def nan(p, c, r):\n    return [float('nan')] * len(c)\n"
        "def short(p, c, r):\n    return [0.0]\n"
        "def mean(p, c, r):\n    return [0.0] * len(c)\n"
        "def words(p, c, r):\n    return [0.0] * len(c)\n"
        "def none(p, c, r):\n    pass\n"
        "def text(p, c, r):\n    return c\n"
    )
    (folder / "folder").mkdir()
    cut = shutil.copytree(models("world"), folder / "cut")
    (cut / "model.safetensors").write_bytes(b"nothing")
    rekey(models("world"), folder / "compiled", lambda name: f"_orig_mod.{name}")
    rekey(models("reward"), folder / "headless", lambda n: None if "score" in n else n)
    tiny_models.make_reward_lm(folder / "two", num_labels=2)
    tiny_models.make_lm(folder / "mamba", "mamba")
    # as the LoRA of another model: half of it is not there
    final = runs["lora"][0] / "final"
    kept = functools.partial(re.sub, r".*layers\.1\..*", "")
    rekey(final, folder / "half", lambda n: kept(n) or None, "adapter_model.safetensors")
    (folder / "lora").symlink_to(final)
    return folder


BAD = """
--model-id {bad}/none | --model-id {bad}/folder | --model-id {bad}/cut |
--model-id {bad}/compiled | --model-id {bad}/lora | --model-id {bad}/lora --lora-rank 4 |
--model-id {bad}/mamba | --model-id {plain} --chat |
--model-id {plain} --dataset {bad}/chat.jsonl | --adapter {bad}/half | --dataset no.txt |
--dataset no/such/dataset | --eval-dataset no.jsonl | --dataset {bad}/empty.txt |
--dataset {bad}/one.txt | --dataset {bad}/numbers.jsonl | --dataset {bad}/broken.jsonl |
--dataset {bad}/columns.jsonl | --dataset {bad}/chat.jsonl --prompt-column text |
--max-prompt-length 16 --dataset {bad}/long.txt | --max-prompt-length 125 |
--reward {bad}/no.py:words | --reward words | --reward {bad}/mine.py:nan |
--reward {bad}/mine.py:short | --reward {bad}/mine.py:mean | --reward {bad}/mine.py:none |
--reward {bad}/mine.py:text | --reward {bad}/mine.py:wrods |
--lora-targets nothing --lora-rank 4 | --lora-rank 4 --adapter {bad}/lora |
--adapter {bad}/folder | --chat-template-kwargs [1] | --chat-template-kwargs {{"a":1}} |
--reward {bad}/mine.py:words {files}/mine.py:words | --reward-model {bad}/headless |
--reward-model {bad}/two | --reward-model {bad}/none | --reward-weights nan |
--reward-weights 1 2 | --group-size 1 | --prompts-per-update 0 | --top-p 0 | --top-p 1.1 |
--top-k -1 | --seed -1 | --temperature 0 | --eval-temperature -1 | --adv-clip-k -1 | --beta0 -0.1 |
--learning-rate nan | --iterations 0 | --fsdp | --resume nowhere
"""


@pytest.mark.parametrize("flags", [one.strip() for one in BAD.split("|")])
def test_bad_flags_get_one_line(models, files, bad, base_flags, tmp_path, flags):
    given = flags.format(bad=bad, plain=models("plain"), files=files).split()
    line = refused(base_flags, "--output-dir", tmp_path / "runs", *given)
    assert given[0] in line
    assert not (tmp_path / "runs").exists()


def test_an_existing_or_unwritable_folder_is_refused(base_flags, runs, tmp_path):
    folder = runs["adrpo"][0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    flags = ["--output-dir", folder.parent, "--run-name", folder.name]
    assert "--run-name" in refused(base_flags, *flags)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    (tmp_path / "file").write_text("")
    assert "--output-dir" in refused(base_flags, "--output-dir", tmp_path / "file")


def test_a_plugins_own_error_is_shown_and_its_exit_is_no_success(base_flags, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import dataclasses\n@dataclasses.dataclass\nclass One:\n    number: 'int' = 1\n"
        "def fails(p, c, r):\n    raise KeyError('answer')\n"
        "def leaves(p, c, r):\n    raise SystemExit(0)\n"
    )
    with pytest.raises(KeyError, match="answer"):
        finish(base_flags, "--reward", f"{tmp_path}/mine.py:fails", "--output-dir", tmp_path)
    with pytest.raises(RuntimeError, match="--reward"):
        finish(base_flags, "--reward", f"{tmp_path}/mine.py:leaves", "--output-dir", tmp_path)


class FullDisk(io.BytesIO):
    def write(self, data):
        raise OSError(28, "No space left on device")


def test_a_full_disk_keeps_the_last_checkpoint(runs, tmp_path, monkeypatch):
    run = shutil.copytree(runs["lora"][0], tmp_path / "run")
    before = (run / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(Path, "open", lambda *_: FullDisk())
    with pytest.raises(OSError, match="No space left"):  # one line at the entry point
        llm.write_safely(run / "checkpoint.pt", llm.load_checkpoint(run))
    monkeypatch.undo()
    assert (run / "checkpoint.pt").read_bytes() == before


# ------------------------------------------------------------------------------------ H. help, docs


def test_help_teaches_every_flag():
    code, out, _ = run_script("--help")
    assert code == 0
    tree = ast.parse(SCRIPT.read_text()).body
    (args,) = (n for n in tree if isinstance(n, ast.ClassDef) and n.name == "Args")
    for field, after in zip(args.body, [*args.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert documented, field.target.id
            assert f"--{field.target.id.replace('_', '-')}" in out


def test_every_logged_tag_is_documented(runs):
    rows = [row for kind in KINDS for row in read_metrics(runs[kind][0], timing=True)]
    written = {re.sub(r"(reward[/_])words$", r"\1NAME", tag) for row in rows for tag in row}
    prefixes = "reward|eval|losses|adrpo|completions|sampling|clip_ratio|charts"
    documented = set(re.findall(rf"`((?:{prefixes})/[A-Za-z0-9_/]+|kl|entropy)`", DOCS.read_text()))
    assert written - {"step"} | {"adrpo/coefficient", "charts/peak_memory_gb"} == documented


def test_every_flag_in_the_docs_exists_and_every_flag_is_there():
    flags = {f"--{name.replace('_', '-')}" for name in llm.Args.__dataclass_fields__}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", DOCS.read_text()))
    others = {"--nproc-per-node", "--help", "--task", "--gpu", "--rare", "--count", "--steps"}
    others |= {"--no-keep-adapters", "--modes"}
    assert named <= flags | others
