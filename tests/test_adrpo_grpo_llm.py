"""Tests of adrpo_grpo_llm.py on tiny random language models: its equations, its two passes and its
rollouts against stock transformers, its loss against TRL's GRPOTrainer, and the program as a user
runs it. No downloads."""

import ast
import contextlib
import copy
import html
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

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import accelerate
import numpy as np
import peft
import pyarrow
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import adrpo_grpo_llm as llm
from tests import tiny_models

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "adrpo_grpo_llm.py"
DOCS = ROOT / "docs" / "adrpo_grpo_llm.md"
FAMILIES = list(tiny_models.LM_FAMILIES)
STOP = [tiny_models.EOS, tiny_models.END]
TIMING = re.compile(r"charts/(seconds_.*|tokens_per_second|peak_memory_gb)")
TINY = (
    "--cpu --precision fp32 --iterations 2 --prompts-per-update 2 --group-size 4 "
    "--max-prompt-length 16"
)
TINY += (
    " --max-completion-length 10 --eval-samples 2 --eval-max-prompts 2 --eval-every 1 "
    "--save-every 1"
)
TINY += " --learning-rate 1e-3 --rollout-batch 8 --train-tokens 512"
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
"""


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniforms(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of the tiny models: one a family, `plain` without a chat template, `reward`."""
    folder = tmp_path_factory.mktemp("models")
    made = {family: tiny_models.make_lm(folder / family, family) for family in FAMILIES}
    made["plain"] = tiny_models.make_lm(folder / "plain", chat=False)
    return made | {"reward": tiny_models.make_reward_lm(folder / "reward")}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with prompts.txt and mine.py, the rewards."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "mine.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="session")
def base_flags(models, files):
    flags = [
        "--model-id",
        models["qwen3"],
        "--dataset",
        files / "prompts.txt",
        "--reward",
        f"{files}/mine.py:words",
    ]
    return [*TINY.split(), *map(str, flags)]


def reset_accelerate():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def later_wins(flags):
    """A command line in which each flag is given once: tests change what others have set. (The
    script refuses a flag given twice.)"""
    given, name = {}, None
    for word in map(str, flags):
        if word.startswith("--"):
            name = word.replace("--no-", "--")
            given.pop(name, None)
            given[name] = [word]
        else:
            given[name].append(word)
    return [word for words in given.values() for word in words]


def run_script(*flags):
    """The script with these flags, in this process: (exit message or code, standard output,
    standard error)."""
    reset_accelerate()
    arguments, code = sys.argv, 0
    sys.argv = [str(SCRIPT), *later_wins(flags)]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as exit_:
        code = exit_.code
    finally:
        sys.argv = arguments
    return code, out.getvalue(), err.getvalue()


def finish(*flags):
    code, out, err = run_script(*flags)
    assert code == 0, (code, err[-2000:])
    return out


def refused(*flags):
    code, _, err = run_script(*flags)
    assert isinstance(code, str), (code, err[-500:])
    assert code.startswith("error: ")
    assert len(code.splitlines()) == 1
    return code


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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
        assert change(weights(one), weights(other), base) < tolerance
    else:
        torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)
    rows, others = read_metrics(one), read_metrics(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, match in zip(rows, others, strict=True):
        assert row == pytest.approx(match, rel=tolerance, abs=tolerance / 100, nan_ok=True)


# --------------------------------------------------------------------------------- A. the equations


def test_group_advantage_against_a_loop():
    rewards = numbers(3, 5) * torch.tensor([[1.0], [4.0], [0.1]], dtype=torch.float64)
    rewards.requires_grad_(True)
    got = llm.group_advantage(rewards)
    assert not got.requires_grad
    for row, values in zip(rewards.tolist(), got.tolist(), strict=True):
        expected = [(value - np.mean(row)) / (np.std(row, ddof=1) + 1e-4) for value in row]
        assert values == pytest.approx(expected, abs=1e-12)
    undivided = llm.group_advantage(rewards, scale=False)
    torch.testing.assert_close(undivided, (rewards - rewards.mean(1, keepdim=True)).detach())


@pytest.mark.parametrize("reward", [0.1, 0.3, 21.6, -7.7])
@pytest.mark.parametrize("group", [2, 3, 7, 8, 61])
def test_equal_rewards_have_no_advantage_whatever_their_rounding(reward, group):
    assert (llm.group_advantage(torch.full((1, group), reward)) == 0).all()


@pytest.mark.parametrize("k", [None, 0.5, 1.0, 2.0])
def test_adaptive_beta_against_a_loop(k):
    advantage = torch.tensor(
        [-5, -0.06, -0.01, 0, 0.01, 0.03, 0.06, 5], dtype=torch.float64, requires_grad=True
    )
    got = llm.adaptive_beta(advantage, 0.04, k)
    assert not got.requires_grad
    limit = math.inf if k is None else k * 0.04
    assert got.tolist() == pytest.approx(
        [0.04 - min(max(a, -limit), limit) for a in advantage.tolist()], abs=1e-15
    )
    assert (got.min() >= 0) == (k is not None and k <= 1)
    if k == 1:
        assert got[[0, 3, -1]].tolist() == pytest.approx([0.08, 0.04, 0], abs=1e-15)


def test_a_normalised_group_saturates_the_coefficient():
    rewards = torch.tensor([[1.0, 0, 0, 1, 1, 0], [2.0, 2, 2, 2, 2, 2]])
    got = llm.adaptive_beta(llm.group_advantage(rewards).flatten(), 0.04)
    torch.testing.assert_close(got, torch.tensor([0, 0.08, 0.08, 0, 0, 0.08] + [0.04] * 6))


def test_kl_k3_closed_form_and_unbiased():
    logits, ref = numbers(6), numbers(6, seed=1)
    p, logp, ref_logp = logits.softmax(0), logits.log_softmax(0), ref.log_softmax(0)
    k3 = llm.kl_k3(logp[None], ref_logp[None])[0]
    assert k3.tolist() == pytest.approx([math.exp(d) - d - 1 for d in (ref_logp - logp).tolist()])
    assert (k3 >= 0).all()
    assert (p * k3).sum().item() == pytest.approx((p * (logp - ref_logp)).sum().item())
    assert llm.kl_k3(logp, logp).tolist() == [0] * 6


def test_huge_differences_stay_finite():
    logp = torch.tensor([[-1e4, -2.0, -300.0]], requires_grad=True)
    other = torch.tensor([[-1.0, -1e4, -2.0]])
    one, mask = torch.ones(1), torch.ones(1, 3)
    for sign in (1, -1):
        loss = llm.grpo_loss(logp, other, other, sign * one, one, mask, 0.2)
        (gradient,) = torch.autograd.grad(loss, logp)
        assert loss.isfinite()
        assert gradient.isfinite().all()
    assert gradient[0, 1] > 0  # KL still pulls back what is far above the reference
    far = torch.linspace(-60, 0, 61)[None].requires_grad_(True)
    (gradient,) = torch.autograd.grad(llm.kl_k3(far, torch.zeros(1, 61)).sum(), far)
    assert (gradient[0, :-1] < 0).all()  # and lifts what is far below it, beyond 20 nats too


def loss_inputs():
    logp, old, ref = (-numbers(4, 6, seed=seed).abs() for seed in range(3))
    mask = torch.arange(6) < torch.tensor([6, 1, 4, 3])[:, None]
    return (
        logp,
        old,
        ref,
        torch.tensor([0.9, -1.2, 0.3, -0.1]).double(),
        torch.tensor([0, 0.08, 0.02, 0.07]),
        mask,
    )


def test_grpo_loss_against_a_slow_loop():
    logp, old, ref, advantage, coefficient, mask = loss_inputs()
    total = 0.0
    for i in range(4):
        terms = []
        for t in range(int(mask[i].sum())):
            ratio, d = math.exp(logp[i, t] - old[i, t]), float(ref[i, t] - logp[i, t])
            clipped = min(max(ratio, 0.8), 1.2)
            policy = min(ratio * float(advantage[i]), clipped * float(advantage[i]))
            terms.append(-policy + float(coefficient[i]) * (math.exp(d) - d - 1))
        total += sum(terms) / len(terms) / 4
    got = llm.grpo_loss(logp, old, ref, advantage, coefficient, mask, 0.2).item()
    assert got == pytest.approx(total, rel=1e-6)


def test_gradient_at_ratio_one_is_reinforce_plus_kl_and_stops_at_the_mask():
    logp, _, ref, advantage, coefficient, mask = loss_inputs()
    logp.requires_grad_(True)
    loss = llm.grpo_loss(logp, logp.detach(), ref, advantage, coefficient.double(), mask, 0.2)
    (gradient,) = torch.autograd.grad(loss, logp)
    pull = 1 - (ref - logp.detach()).exp()  # derivative of k3
    expected = (
        (-advantage[:, None] + coefficient.double()[:, None] * pull)
        * mask
        / mask.sum(1, keepdim=True)
        / 4
    )
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


CPU = torch.device("cpu")


def policy_of(model, temperature=1.0, warpers=(), stop=STOP, lengths=(48, 16), readable=None):
    """A stock model as the script's policy."""
    unreadable = torch.zeros(model.config.get_text_config().vocab_size, dtype=torch.bool)
    if readable is not None:
        unreadable[readable:] = True
    model.generation_config = GenerationConfig(pad_token_id=0)
    plain = (type(layer) is llm.DynamicLayer for layer in DynamicCache(config=model.config).layers)
    static = {} if all(plain) else None
    choice = stop, unreadable, 0, temperature, list(warpers)
    return llm.Policy(model, model, None, *choice, static, False, lengths)


@pytest.mark.parametrize(
    "top_p,top_k", [(1.0, 0), (0.7, 0), (0.2, 0), (1.0, 3), (1.0, 99), (0.7, 4)]
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chosen_tokens_have_the_frequencies_of_the_stock_warpers(temperature, top_p, top_k):
    """On an even grid of uniforms a token's count is its probability times the grid's size, give or
    take one; the log-probabilities kept are those before top-k and top-p."""
    logits = numbers(12, dtype=torch.float32) * 1.5
    logits[11] = 9.0  # most likely by far, but no token of the tokenizer
    readable, grid = logits[:11] / temperature, (torch.arange(4000) + 0.5) / 4000
    warpers = [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warped = readable[None]
    for warper in warpers:
        warped = warper(None, warped)
    unreadable = torch.arange(12) == 11
    lengths = (1, 1)
    policy = llm.Policy(*[None] * 3, [], unreadable, 0, temperature, warpers, None, False, lengths)
    choose = llm.ChooseByUniform(grid[:, None], policy)
    left = choose(torch.zeros(4000, 1), logits.expand(4000, -1))
    tokens = left.argmax(-1)
    assert (left.isfinite().sum(1) == 1).all()
    counts = tokens.bincount(minlength=12)[:11]
    assert ((counts - 4000 * warped.softmax(-1)).abs() <= 1.01).all()
    expected = readable.log_softmax(-1)[tokens]
    torch.testing.assert_close(choose.logp[0][:, 0], expected, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------- B. against stock transformers


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SMALL |= {"max_position_embeddings": 256, "initializer_range": 0.3, "pad_token_id": 0}
SMALL |= {"bos_token_id": 1, "eos_token_id": 2}
MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
MLA |= {"v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
MLA |= {"moe_intermediate_size": 16, "topk_group": 1, "first_k_dense_replace": 1}
MLA |= {"num_key_value_heads": 4, "head_dim": 4}
ATTENTIONS = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 8},  # caps on its logits
    "gemma3_text": {"sliding_window": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},  # sinks
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "deepseek_v3": MLA,  # keys and values of another size
    "diffllama": {},
    "cohere": {},
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0},
    "olmo2": {},
    "phi3": {},
    "bloom": {"n_layer": 3, "n_head": 4},  # ALiBi
    "gpt2": {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 256},  # dropout
}


def family_model(family, seed=0):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **SMALL | ATTENTIONS[family])
    return AutoModelForCausalLM.from_config(config).eval()


def make_policy(folder, *, rank=0, **options):
    """The policy as the script builds it, its LoRA not zero."""
    lengths = {"max_prompt_length": 16, "max_completion_length": 16}
    args = llm.Args(model_id=str(folder), lora_rank=rank, **lengths, **options)
    torch.manual_seed(4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = llm.load_policy(args, (str(folder), None), tokenizer, CPU, False)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


def ragged(lengths=(7, 3, 5), group=4, size=6, seed=0):
    """Prompts of these lengths, completions [B*G,C] and their mask, of 1 to C tokens."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(6, 60, (length,), generator=generator).tolist() for length in lengths]
    ends = torch.randint(1, size + 1, (len(lengths) * group,), generator=generator)
    ends[0], ends[-1] = size, 1
    mask = torch.arange(size) < ends[:, None]
    return prompts, torch.randint(6, 60, mask.shape, generator=generator) * mask, mask


def plain(model, prompts, completions, temperature):
    """Log-probabilities and entropies of completions [B*G,C], each a sequence of its own, read
    alone by the stock model: no padding, no cache."""
    group, found = len(completions) // len(prompts), []
    for i, completion in enumerate(completions):
        prompt = prompts[i // group]
        ids = torch.tensor([prompt + completion.tolist()])
        found.append(model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1])
    pi = torch.distributions.Categorical(logits=torch.stack(found).float() / temperature)
    return pi.log_prob(completions), pi.entropy()


def weighted(logp, mask):
    return (logp * mask * numbers(*mask.shape, seed=9, dtype=torch.float32)).sum()


def gradients(module):
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def two_passes(policy, prompts, completions, mask, train_tokens, model=None):
    """Log-probabilities and entropies [N,C] by the script's passes, with their gradients taken."""
    batch = llm.Batch(*llm.pad_left(policy, prompts), completions, mask)
    args = llm.Args(train_tokens=train_tokens)
    logp, entropy = (torch.zeros(mask.shape) for _ in range(2))
    weights = numbers(*mask.shape, seed=9, dtype=torch.float32)
    for at, part, spread in llm.completion_passes(policy, model or policy.model, batch, args):
        (part * mask[at] * weights[at]).sum().backward()
        logp[at], entropy[at] = part.detach(), spread
    return logp, entropy


@pytest.mark.parametrize("family", ATTENTIONS)
def test_two_passes_are_ordinary_rows_and_the_sampler_is_the_trainer(family):
    """Prompts longer than a window, of different length, one of a single token; all together, and
    some completions of some prompts at a time."""
    model = family_model(family)
    policy = policy_of(model, temperature=0.7, lengths=(24, 6), readable=60)
    prompts, completions, mask = ragged((24, 3, 13, 1))
    expected, spread = plain(model, prompts, completions, 0.7)
    readable = policy._replace(unreadable=torch.zeros(64, dtype=torch.bool))
    weighted(expected, mask).backward()
    theirs = {name: grad.clone() for name, grad in gradients(model).items()}
    for train_tokens in (1000, 50):  # everything at once; two prompts, eight completions
        model.zero_grad()
        logp, entropy = two_passes(readable, prompts, completions, mask, train_tokens)
        torch.testing.assert_close(logp[mask], expected[mask], rtol=1e-5, atol=5e-5)
        torch.testing.assert_close(entropy[mask], spread[mask], rtol=1e-4, atol=5e-5)
        mine = gradients(model)
        assert mine.keys() == theirs.keys()
        difference = sum((mine[n] - theirs[n]).square().sum() for n in theirs).sqrt()
        assert difference < 2e-5 * sum(grad.square().sum() for grad in theirs.values()).sqrt()
    args = llm.Args(rollout_batch=8)
    tokens, kept, sampled = llm.rollout(policy, prompts, uniforms(4, 4, 6), args)
    trained, _ = two_passes(policy, prompts, tokens, kept, 1000)
    torch.testing.assert_close(sampled[kept], trained[kept], rtol=1e-5, atol=5e-5)
    assert (tokens[kept] < 60).all()


@pytest.mark.parametrize("rank,targets", [(4, ("all-linear",)), (4, ("q_proj", "v_proj"))])
@pytest.mark.parametrize("train_tokens", [1, 36, 1000])
def test_two_passes_with_a_lora(models, rank, targets, train_tokens):
    policy = make_policy(models["qwen3"], rank=rank, lora_targets=targets)
    prompts, completions, mask = ragged()
    expected, _ = plain(policy.model, prompts, completions, 1.0)
    weighted(expected, mask).backward()
    theirs = {name: grad.clone() for name, grad in gradients(policy.model).items()}
    policy.model.zero_grad()
    logp, entropy = two_passes(policy, prompts, completions, mask, train_tokens)
    torch.testing.assert_close(logp[mask], expected[mask], rtol=1e-5, atol=2e-5)
    assert not entropy.requires_grad
    assert theirs.keys() == gradients(policy.model).keys()
    assert all("lora_" in name and (grad != 0).any() for name, grad in theirs.items())
    torch.testing.assert_close(gradients(policy.model), theirs, rtol=1e-3, atol=1e-4)
    batch = llm.Batch(*llm.pad_left(policy, prompts), completions, mask)
    args = llm.Args(train_tokens=train_tokens)
    reference = llm.reference_log_probabilities(policy, batch, args)
    base = AutoModelForCausalLM.from_pretrained(models["qwen3"]).eval()
    expected, _ = plain(base, prompts, completions, 1.0)
    torch.testing.assert_close(reference[mask], expected[mask], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
@pytest.mark.parametrize("static", [False, True], ids=["growing cache", "static cache"])
def test_greedy_rollouts_are_those_of_stock_generate(family, static):
    """On prompts of different length; whatever the model's own generation config says."""
    if static and family == "gemma2":
        pytest.skip("a sliding layer has no static cache here")
    model = family_model(family) if family == "gemma2" else None
    if model is None:
        torch.manual_seed(2)
        config = AutoConfig.for_model(family, **SMALL)
        model = AutoModelForCausalLM.from_config(config).eval()
    stop = list(range(6, 20))
    policy = policy_of(model, temperature=0.0, stop=stop)._replace(static={} if static else None)
    prompts, _, _ = ragged(tuple(range(1, 13)), seed=3)
    tokens, mask, _ = llm.rollout(policy, prompts, uniforms(12, 2, 12), llm.Args(rollout_batch=7))
    tokens, mask, lengths = tokens.view(12, 2, -1), mask.view(12, 2, -1), set()
    for i, prompt in enumerate(prompts):
        options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": stop}
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        for j in range(2):
            assert tokens[i, j][mask[i, j]].tolist() == out[0, len(prompt) :].tolist()
        lengths.add(len(out[0]) - len(prompt))
    assert len(lengths) > 1


def slow_completion(model, prompt, numbers_, temperature):
    """One completion, without a cache: at each step the stock model reads everything again."""
    ids = list(prompt)
    for number in numbers_.tolist():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
        ids.append(int((cumulative <= number).sum()))
        if ids[-1] in STOP:
            break
    return ids[len(prompt) :]


@torch.no_grad()
@pytest.mark.parametrize("family,rank,temperature", [("qwen3", 0, 1.0), ("mistral", 4, 1.4)])
def test_sampled_rollouts_against_a_slow_loop(models, family, rank, temperature):
    policy = make_policy(models[family], rank=rank, temperature=temperature)
    (prompts, _, _), chance = ragged((7, 3, 5, 9)), uniforms(4, 6, 12)
    whole = llm.rollout(policy, prompts, chance, llm.Args(rollout_batch=24))
    tokens, mask = (part.view(4, 6, -1) for part in whole[:2])
    for i, prompt in enumerate(prompts):
        for j in range(6):
            slow = slow_completion(policy.model, prompt, chance[i, j], temperature)
            assert tokens[i, j][mask[i, j]].tolist() == slow
    assert (mask.sum(2) < 12).any()
    assert (mask.sum(2) == 12).any()  # cut off
    for batch in (1, 12):
        for part, other in zip(
            llm.rollout(policy, prompts, chance, llm.Args(rollout_batch=batch)), whole, strict=True
        ):
            torch.testing.assert_close(part * whole[1], other * whole[1], rtol=1e-4, atol=1e-5)


def test_a_models_own_generation_config_changes_nothing(models, tmp_path):
    shutil.copytree(models["qwen3"], tmp_path / "lm")
    own = {"repetition_penalty": 1.3, "temperature": 0.5, "top_k": 3, "do_sample": True}
    GenerationConfig(eos_token_id=STOP, no_repeat_ngram_size=2, **own).save_pretrained(
        tmp_path / "lm"
    )
    (prompts, _, _), chance = ragged(), uniforms(3, 4, 12)
    results = []
    for folder in (models["qwen3"], tmp_path / "lm"):
        policy = make_policy(folder)
        results.append(llm.rollout(policy, prompts, chance, llm.Args()))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_compiled_step_draws_the_same_tokens_and_compiles_once(models, monkeypatch):
    """As on a GPU: one static cache, prompts and batches padded full. (transformers compiles there
    by itself.)"""
    policy = make_policy(models["qwen2"])
    expected = llm.rollout(policy, ragged()[0], uniforms(3, 4, 6), llm.Args(rollout_batch=8))

    def compiling(**settings):
        config = GenerationConfig(**settings)
        config.compile_config = CompileConfig(mode="default", fullgraph=False)
        config.compile_config._compile_all_devices = True
        return config

    monkeypatch.setattr(llm, "GenerationConfig", compiling)
    policy = policy._replace(static={}, full=True, lengths=(16, 6))
    torch._dynamo.reset()
    counts = []
    for _ in range(2):
        got = llm.rollout(policy, ragged()[0], uniforms(3, 4, 6), llm.Args(rollout_batch=8))
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[2], expected[2], rtol=1e-4, atol=1e-4)
    assert counts[0] > 0
    assert counts[1] == counts[0]
    assert len(policy.static) == 1


def test_models_that_cannot_be_read_once_are_refused(tmp_path):
    """Their cache is not keys and values of the prompt: some sample right and would train wrong."""
    refused_ones = {
        "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
        "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
        "qwen3_next": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "mamba": {"state_size": 4},
    }
    tried = 0
    for family, options in refused_ones.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **SMALL | options)
        model = AutoModelForCausalLM.from_config(config).eval()
        nobody = torch.zeros(64, dtype=torch.bool)
        policy = llm.Policy(model, model, None, STOP, nobody, 0, 1.0, [], None, False, (8, 8))
        tried += 1
        with pytest.raises(llm.InputError, match="--model-id: its cache is not"):
            llm.check_cache(policy, [[5, 6, 7], [8]])
    assert tried == len(refused_ones)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = AutoConfig.for_model("llama", **SMALL | {"rope_parameters": rope})
    args = llm.Args(max_prompt_length=200, max_completion_length=56)
    llm.check_lengths(config, args)
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    options = {"rope_parameters": rope, "original_max_position_embeddings": 100}
    config = AutoConfig.for_model("phi3", **SMALL | options)
    with pytest.raises(llm.InputError, match="--max-prompt-length, --max-completion-length"):
        llm.check_lengths(config, args)
    with pytest.raises(llm.InputError, match="more than the model's 256"):
        llm.check_lengths(
            family_model("llama").config, llm.Args(max_prompt_length=201, max_completion_length=56)
        )


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
        "num_iterations": 1,
    }
    options |= {
        "use_bias_correction_kl": False,
        "temperature": 1.0,
        "num_generations": 4,
        "max_completion_length": 10,
    }
    options |= {
        "per_device_train_batch_size": 8,
        "output_dir": str(tmp_path_factory.mktemp("trl")),
        "seed": 3,
    }
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(models["qwen3"], dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(models["qwen3"]),
        reward_funcs=reward,
        args=trl.GRPOConfig(**options),
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    batch = trainer._generate_and_score_completions(
        [{"prompt": PROMPTS[i]} for i in (0, 5) for _ in range(4)]
    )
    return trainer, batch, torch.tensor(rewards).view(2, 4)


def both_losses(models, trl_batch, old=None, k=None):
    """(TRL's loss, its gradients), (this script's loss, its gradients), share of clipped tokens. k:
    with ADRPO's coefficient, TRL's loss being taken one completion at a time, each with its own
    beta."""
    trainer, batch, rewards = trl_batch
    prompts = [
        ids[kept.bool()].tolist()
        for ids, kept in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    ]
    tokens, mask = batch["completion_ids"], batch["completion_mask"]
    advantage = llm.group_advantage(rewards)
    torch.testing.assert_close(advantage.flatten(), batch["advantages"], rtol=1e-5, atol=1e-6)
    coefficient = torch.full((8,), 0.04)
    if k is not None:
        coefficient = llm.adaptive_beta(advantage.flatten(), 0.04, k)

    policy = make_policy(models["qwen3"])
    policy.model.load_state_dict(trainer.model.state_dict())
    whole = llm.Batch(*llm.pad_left(policy, prompts[::4]), tokens, mask.bool())
    ref_logp = llm.reference_log_probabilities(policy, whole, llm.Args())
    torch.testing.assert_close(
        ref_logp * mask, batch["ref_per_token_logps"] * mask, rtol=1e-4, atol=2e-5
    )
    for _, logp, _ in llm.completion_passes(policy, policy.model, whole, llm.Args()):
        before = logp.detach() if old is None else old
        inputs = logp, before, ref_logp, advantage.flatten(), coefficient, mask
        loss = llm.grpo_loss(*inputs, 0.2)
        loss.backward()  # and the prompt's, when the loop goes on

    trainer.model.zero_grad()
    inputs = {name: value for name, value in batch.items() if name != "old_per_token_logps"}
    inputs |= {} if old is None else {"old_per_token_logps": old}
    total = 0.0
    parts = (
        [(slice(0, 8), 0.04)]
        if k is None
        else [(slice(i, i + 1), coefficient[i].item()) for i in range(8)]
    )
    for rows, beta in parts:
        trainer.beta = beta
        part = {name: value[rows] if value.ndim else value for name, value in inputs.items()}
        share = trainer._compute_loss(trainer.model, part) * (1 if k is None else 1 / 8)
        share.backward()
        total += share.item()
    ratio = (logp.detach() - before).exp()
    outside = ((ratio - 1).abs() > 0.2)[mask.bool()].float().mean().item()
    return (total, gradients(trainer.model)), (loss.item(), gradients(policy.model)), outside


@pytest.mark.parametrize("k", [None, 1.0, 2.0], ids=["grpo", "adrpo", "adrpo, k=2"])
@pytest.mark.parametrize("stale", [False, True], ids=["ratio 1", "clipped ratio"])
def test_loss_and_gradients_are_those_of_trl(models, trl_batch, k, stale):
    trainer, batch, rewards = trl_batch
    assert rewards.std(1).min() > 0
    old = None
    if stale:
        noise = numbers(*batch["completion_ids"].shape, dtype=torch.float32)
        old = batch["ref_per_token_logps"] + 0.2 * noise
    theirs, mine, outside = both_losses(models, trl_batch, old, k)
    assert outside > 0.2 if stale else outside == 0
    assert mine[0] == pytest.approx(theirs[0], rel=1e-4, abs=1e-6)
    assert mine[1].keys() == theirs[1].keys()
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-3, atol=2e-5)
    assert max(gradient.abs().max() for gradient in mine[1].values()) > 0.01


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
        out = finish(*base_flags, "--output-dir", folder, "--run-name", kind, *flags)
        made[kind] = folder / kind, out
    return made


@pytest.fixture(scope="session")
def base(models, base_flags, tmp_path_factory):
    """The weights before training: {kind: as in final/}, for full fine-tuning and a LoRA."""
    made = {"full": load_file(models["qwen3"] / "model.safetensors")}
    folder = tmp_path_factory.mktemp("base")
    still = ["--learning-rate", "1e-30", "--iterations", "1"]
    finish(*base_flags, "--output-dir", folder, "--run-name", "r", *KINDS["lora"], *still)
    return made | {"lora": weights(folder / "r")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_everything_behind(runs, base, kind):
    run, out = runs[kind]
    names = {
        str(path.relative_to(run))
        for path in run.rglob("*")
        if path.is_file() and "tfevents" not in path.name
    }
    expected = {
        "args.json",
        "metrics.jsonl",
        "summary.json",
        "checkpoint.pt",
        "checkpoint-previous.pt",
    }
    if kind == "lora":
        expected |= {f"adapters/00000{i}/adapter_model.safetensors" for i in (1, 2)}
    expected |= {f"samples/{step:06d}.jsonl" for step in range(3)} | {"final/tokenizer.json"}
    expected |= {"final/adapter_config.json" if kind == "lora" else "final/generation_config.json"}
    names = {name for name in names if not name.startswith(("final/", "adapters/", ".lock"))} | (
        names & expected
    )
    assert expected == names
    record = json.loads((run / "args.json").read_text())
    assert record["args"]["group_size"] == 4
    assert {"torch", "transformers", "peft", "accelerate"} < set(record["versions"])
    assert "10 training prompts, 2 for evaluation; every tenth of --dataset (2) is held out" in out
    assert str(run / "final") in out
    name = "lora" if kind == "lora" else "full"
    assert all((weights(run)[key] != base[name][key]).any() for key in base[name])


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_and_samples_of_a_run(runs, kind):
    run, _ = runs[kind]
    rows = read_metrics(run, timing=True)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["eval/kl"] == 0
    assert rows[1]["kl"] == rows[1]["losses/divergence"] == rows[1]["clip_ratio/region_mean"] == 0
    assert rows[2]["kl"] > 0
    assert rows[2]["eval/kl"] > 0
    assert rows[1]["sampling/sampling_logp_difference/mean"] < 1e-5
    expected = 0.04 if kind == "grpo" else 0.08
    assert rows[1]["adrpo/coefficient_max"] == pytest.approx(expected)
    assert rows[1]["adrpo/coefficient_min"] == pytest.approx(0.04 if kind == "grpo" else 0)
    assert rows[1]["charts/learning_rate"] == pytest.approx((1e-2 if kind == "lora" else 1e-3) / 5)
    events = EventAccumulator(str(run), size_guidance={"histograms": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) == set().union(*rows) - {"step"}
    for tag in set().union(*rows) - {"step"}:
        logged = {event.step: event.value for event in events.Scalars(tag)}
        assert logged == pytest.approx(
            {row["step"]: row[tag] for row in rows if tag in row}, rel=1e-5
        ), tag
    assert [event.step for event in events.Histograms("adrpo/coefficient")] == [1, 2]
    assert sum(events.Histograms("adrpo/coefficient")[0].histogram_value.bucket) == 8
    tensors = {
        event.step: event.tensor_proto for event in events.Tensors("completions/text_summary")
    }
    texts = {step: tensor.string_val[0].decode() for step, tensor in tensors.items()}
    assert all(html.escape(PROMPTS[0]) in text for text in texts.values())
    assert set(texts) == {0, 1, 2}
    for step in range(3):
        records = read_lines(run / "samples" / f"{step:06d}.jsonl")
        assert [record["prompt"] for record in records] == [PROMPTS[i] for i in (0, 0, 10, 10)]
        shown = [
            f"\n{html.escape(record['completion'])}</pre>" in texts[step] for record in records
        ]
        assert any(shown[:2])
        assert any(shown[2:])
        assert not re.search(r"<(?!/?pre>)", texts[step])
        tokens = sum(record["tokens"] for record in records)
        row = next(row for row in rows if row["step"] == step)
        assert row["eval/kl"] == pytest.approx(sum(record["kl"] for record in records) / tokens)
        assert row["eval/entropy"] == pytest.approx(
            sum(record["entropy"] for record in records) / tokens
        )
        assert row["eval/reward"] == pytest.approx(
            np.mean([record["reward"] for record in records])
        )
        assert row["eval/reward"] == row["eval/reward_words"]
        assert row["eval/mean_length"] == tokens / 4
        expected = [
            len(set(text.split())) + 0.01 * len(text)
            for text in (record["completion"] for record in records)
        ]
        assert [record["reward"] for record in records] == pytest.approx(expected, rel=1e-6)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["final"] == {
        name[5:]: value for name, value in rows[2].items() if name.startswith("eval/")
    }
    assert summary["base"] == {
        name[5:]: value for name, value in rows[0].items() if name.startswith("eval/")
    }


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_kl_is_exactly_zero_before_the_first_step_in_bf16(base_flags, tmp_path, lora):
    flags = ["--precision", "bf16", "--iterations", "1", *(KINDS["lora"] if lora else [])]
    finish(*base_flags, *flags, "--output-dir", tmp_path, "--run-name", "r")
    rows = read_metrics(tmp_path / "r")
    assert rows[0]["eval/kl"] == rows[1]["kl"] == rows[1]["clip_ratio/region_mean"] == 0
    assert rows[1]["eval/kl"] > 0
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "r").values())
    state = llm.load_checkpoint(tmp_path / "r")["weights"]
    assert all(value.dtype == torch.float32 for value in state.values())
    assert rows[1]["sampling/sampling_logp_difference/max"] < llm.SAMPLER_BOUND[torch.bfloat16]


@pytest.mark.parametrize("kind", ["adrpo", "lora"])
def test_the_result_reloads_in_stock_libraries_with_identical_logits(models, runs, kind):
    run, _ = runs[kind]
    stock = AutoModelForCausalLM.from_pretrained(
        models["qwen3"] if kind == "lora" else run / "final"
    )
    if kind == "lora":
        stock = peft.PeftModel.from_pretrained(stock, run / "final")
    # the same from the weights in the run's checkpoint, put into a model as the script builds it
    policy = make_policy(models["qwen3"], rank=4 if kind == "lora" else 0)
    state = llm.load_checkpoint(run)["weights"]
    missing, unexpected = policy.model.load_state_dict(state, strict=False)
    assert not unexpected
    named = policy.model.named_parameters(remove_duplicate=False)
    assert set(missing) <= {name for name, p in named if not p.requires_grad}
    ids = torch.arange(6, 30)[None]
    assert torch.equal(stock(ids).logits, policy.model.eval()(ids).logits)
    if kind == "lora":
        assert all("lora_" in name for name in state)
        with policy.model.disable_adapter():
            before = policy.model(ids).logits
        base = AutoModelForCausalLM.from_pretrained(models["qwen3"])
        assert torch.equal(before, base(ids).logits)
        assert (before - stock(ids).logits).abs().max() > 1e-3
        assert all((state[name] != 0).any() for name in state if "lora_B" in name)
    tokenizers = [
        AutoTokenizer.from_pretrained(folder) for folder in (run / "final", models["qwen3"])
    ]
    assert tokenizers[0]("the red cat").input_ids == tokenizers[1]("the red cat").input_ids
    exported = GenerationConfig.from_pretrained(run / "final") if kind == "adrpo" else None
    if exported:  # it says how it was sampled
        assert exported.eos_token_id == STOP
        assert (exported.do_sample, exported.temperature, exported.top_k) == (True, 1.0, 0)


@pytest.mark.parametrize("method,k", [("adrpo", 1.0), ("adrpo", 0.5), ("grpo", None)])
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_an_iteration_is_the_textbook_on_stock_models(
    models, base_flags, tmp_path, method, k, rank
):
    """One iteration of two updates, again: padded sequences, a loop over completions and plain
    AdamW."""
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
        "--lora-rank",
        rank,
        "--adv-clip-k",
        k,
        "--max-grad-norm",
        "0.5",
        "--temperature",
        "0.9",
    ]
    finish(*base_flags, *flags, "--output-dir", tmp_path, "--run-name", "r")

    args = llm.Args(
        model_id=str(models["qwen3"]),
        lora_rank=rank,
        max_prompt_length=16,
        max_completion_length=10,
        temperature=0.9,
    )
    llm.seed_everything(1)
    tokenizer = AutoTokenizer.from_pretrained(models["qwen3"])
    policy = llm.load_policy(args, (str(models["qwen3"]), None), tokenizer, CPU, False)
    model, reference = (copy.deepcopy(policy.model) for _ in range(2))
    training = [p for i, p in enumerate(PROMPTS) if i % 10]
    chosen = [training[row] for row in llm.draw_prompts(10, 2, 0, 1)]
    prompts = [tokenizer(prompt).input_ids for prompt in chosen]
    chance = torch.rand(2, 4, 10, generator=llm.seed_everything(1, 1))
    tokens, mask, _ = llm.rollout(policy, prompts, chance, args)
    texts = [
        tokenizer.decode(one[kept], skip_special_tokens=True)
        for one, kept in zip(tokens, mask, strict=True)
    ]
    rewards = torch.tensor([len(set(text.split())) + 0.01 * len(text) for text in texts]).view(2, 4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, old, total, norm = (
        torch.optim.AdamW(trained, lr=1e-2, weight_decay=0),
        None,
        0.0,
        0.0,
    )
    ref_logp = plain(reference, prompts, tokens, 0.9)[0].detach()
    figures = []
    for _ in range(2):
        optimizer.zero_grad()
        logp, entropy = plain(model, prompts, tokens, 0.9)
        old = logp.detach() if old is None else old
        losses = []
        for p in range(2):
            for g in range(4):
                i = 4 * p + g
                kept = mask[i]
                a = float((rewards[p, g] - rewards[p].mean()) / (rewards[p].std() + 1e-4))
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
    row = read_metrics(tmp_path / "r")[1]
    assert row["losses/total"] == pytest.approx(total, rel=1e-3, abs=1e-6)
    assert row["losses/grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert row["reward/mean"] == pytest.approx(rewards.mean().item(), rel=1e-6)
    assert row["completions/mean_length"] == pytest.approx(mask.sum(1).float().mean().item())
    tags = ("kl", "entropy", "clip_ratio/region_mean")
    assert [row[tag] for tag in tags] == pytest.approx(
        torch.cat(figures, dim=1).mean(1).tolist(), rel=1e-3
    )
    assert min(row[tag] for tag in tags) > 0
    mine, final, start = (
        {re.sub(r"^base_model.model.|\.default", "", name): value for name, value in state.items()}
        for state in (weights(tmp_path / "r"), model.state_dict(), reference.state_dict())
    )
    assert change(mine, final, start) < 0.01


@pytest.mark.parametrize("kind", ["adrpo", "lora"])
@pytest.mark.parametrize(  # a group in two unequal parts, one completion a pass, one prompt at once
    "flags",
    ["--train-tokens 36", "--train-tokens 1 --rollout-batch 1", "--gradient-checkpointing"],
)
def test_batch_sizes_and_memory_savers_do_not_change_the_result(
    base_flags, runs, base, tmp_path, kind, flags
):
    finish(*base_flags, *KINDS[kind], "--output-dir", tmp_path, "--run-name", "r", *flags.split())
    before = base["lora" if kind == "lora" else "full"]
    assert_same_run(runs[kind][0], tmp_path / "r", before, tolerance=1e-2)


FLAGS = [
    "--method grpo",
    "--adv-clip-k None",
    "--beta0 0.5",
    "--updates-per-rollout 2",
    "--temperature 0.7",
]
FLAGS += [
    "--top-p 0.5",
    "--top-k 3",
    "--scale-rewards none",
    "--weight-decay 0.1",
    "--seed 2",
    "--chat",
]


@pytest.mark.parametrize("flags", FLAGS)
def test_these_flags_do_change_the_result(base_flags, runs, base, tmp_path, flags):
    finish(
        *base_flags,
        "--output-dir",
        tmp_path,
        "--run-name",
        "r",
        *flags.split(),
        "--eval-every",
        "5",
    )
    assert change(weights(runs["adrpo"][0]), weights(tmp_path / "r"), base["full"]) > 1e-4


def test_greedy_evaluation_and_a_warning_for_small_groups(base_flags, tmp_path):
    flags = ["--eval-temperature", "0", "--iterations", "1", "--group-size", "2"]
    out = finish(*base_flags, *flags, "--output-dir", tmp_path, "--run-name", "r")
    assert "warning: --group-size" in out
    for step in range(2):
        texts = [
            record["completion"]
            for record in read_lines(tmp_path / "r" / "samples" / f"{step:06d}.jsonl")
        ]
        assert texts[0] == texts[1]
        assert texts[2] == texts[3]
    rows = read_metrics(tmp_path / "r")
    numbers_ = [v for row in rows for tag, v in row.items() if "distinct_2" not in tag]
    assert all(map(math.isfinite, numbers_))


def test_a_reward_model_and_plugins_are_weighted_and_logged(models, files, base_flags, tmp_path):
    flags = [
        "--reward-model",
        models["reward"],
        "--reward",
        f"{files}/mine.py:length",
        f"{files}/mine.py:words",
    ]
    flags += ["--reward-weights", "2", "0.1", "-1", "--output-dir", tmp_path]
    finish(*base_flags, *flags, "--run-name", "large")
    finish(*base_flags, *flags, "--run-name", "small", "--reward-batch", "3")
    for row in read_metrics(tmp_path / "large")[1:]:
        for a, b in (("reward/", "reward/mean"), ("eval/reward_", "eval/reward")):
            expected = 2 * row[f"{a}reward"] + 0.1 * row[f"{a}length"] - row[f"{a}words"]
            assert row[b] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    large, small = read_metrics(tmp_path / "large"), read_metrics(tmp_path / "small")
    assert small[0] == pytest.approx(large[0], rel=1e-5)
    for tag in ("reward/mean", "reward/std", "reward/reward", "losses/grad_norm"):
        assert small[1][tag] == pytest.approx(large[1][tag], rel=1e-4), tag


def test_a_reward_model_alone(models, base_flags, tmp_path):
    at = base_flags.index("--reward")
    flags = [
        *base_flags[:at],
        *base_flags[at + 2 :],
        "--reward-model",
        models["reward"],
        "--iterations",
        "1",
    ]
    finish(*flags, "--output-dir", tmp_path, "--run-name", "r")
    row = read_metrics(tmp_path / "r")[1]
    assert row["reward/mean"] == pytest.approx(row["reward/reward"])
    assert row["reward/std"] > 0
    reward = llm.RewardModel((str(models["reward"]), None), 16, CPU, torch.float32)
    reward = torch.no_grad()(reward)
    records = read_lines(tmp_path / "r" / "samples" / "000001.jsonl")
    expected = reward([r["prompt"] for r in records], [r["completion"] for r in records], records)
    assert [r["reward"] for r in records] == pytest.approx(expected.tolist(), abs=1e-5)


def test_rows_reach_the_reward_and_long_prompts_are_left_out(base_flags, tmp_path):
    rows = [{"question": prompt, "number": i} for i, prompt in enumerate(PROMPTS)]
    rows += [
        {"question": "the " * 17, "number": 12},
        {"question": PROMPTS[0], "number": 13},
        {"other": "x"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    (tmp_path / "mine.py").write_text(
        f"PROMPTS = {PROMPTS!r}\n"
        "def number(prompts, completions, rows):\n"
        "    assert [PROMPTS[row['number']] for row in rows] == prompts\n"
        "    return [float(row['number']) for row in rows]\n"
    )
    flags = [
        "--dataset",
        tmp_path / "p.jsonl",
        "--reward",
        f"{tmp_path}/mine.py:number",
        "--output-dir",
        tmp_path,
    ]
    out = finish(*base_flags, *flags, "--run-name", "r")
    assert "10 training prompts, 2 for evaluation" in out
    assert "1 prompts of more than 16 tokens are left out" in out
    row = read_metrics(tmp_path / "r")[1]
    assert row["reward/frac_reward_zero_std"] == 1
    assert row["adrpo/coefficient_min"] == pytest.approx(0.04)
    assert row["losses/policy"] == pytest.approx(0, abs=1e-7)


def test_chat_messages_and_chat_flag_are_the_stock_template(models, base_flags, tmp_path):
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"messages": one}) + "\n" for one in messages)
    )
    finish(
        *base_flags,
        "--dataset",
        tmp_path / "p.jsonl",
        "--output-dir",
        tmp_path,
        "--run-name",
        "messages",
    )
    finish(*base_flags, "--chat", "--output-dir", tmp_path, "--run-name", "chat")
    assert_same_run(tmp_path / "messages", tmp_path / "chat")
    assert (
        read_lines(tmp_path / "messages" / "samples" / "000000.jsonl")[0]["prompt"] == messages[0]
    )
    tokenizer = AutoTokenizer.from_pretrained(models["qwen3"])
    rows = [
        {"prompt": [{"role": "system", "content": "is very"}, *messages[0]]},
        {"prompt": PROMPTS[1]},
    ]
    stock = [rows[0]["prompt"], messages[1]]
    expected = [
        tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"] for one in stock
    ]
    assert [prompt.ids for prompt in llm.encode_prompts(tokenizer, rows, True)] == expected
    alone = llm.encode_prompts(tokenizer, rows[1:], False)
    assert alone[0].ids == tokenizer(PROMPTS[1]).input_ids
    (bare,) = llm.encode_prompts(tokenizer, rows[:1], False, '{"add_generation_prompt": false}')
    assert bare.ids == tokenizer.apply_chat_template(stock[0])["input_ids"]


def test_held_out_prompts(models, files, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(models["qwen3"])
    (tmp_path / "other.txt").write_text(f"a white bird\n\n{PROMPTS[3]}\n")
    args = llm.Args(dataset=str(files / "prompts.txt"), eval_dataset=str(tmp_path / "other.txt"))
    train, heldout, note, sources = llm.load_prompts(args, tokenizer)
    assert [prompt.row["prompt"] for prompt in train] == PROMPTS
    assert [prompt.row["prompt"] for prompt in heldout] == ["a white bird", PROMPTS[3]]
    assert "1 of the 2 evaluation prompts are training prompts" in note
    assert set(sources) == {"dataset", "eval_dataset"}


# -------------------------------------------------------------------------- kill, resume, processes


# A child that kills itself in the middle of writing its second checkpoint (iteration 4).
DYING = """
import os, runpy, signal, sys, torch
save = torch.save
def dying_save(what, file):
    if what["iteration"] == 4:
        file.write(b"half a checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(what, file)
torch.save = dying_save
script = sys.argv[1]; sys.argv = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


def test_killed_while_saving_and_resumed_equals_straight(base_flags, tmp_path):
    longer = ["--iterations", "4", "--save-every", "2", "--updates-per-rollout", "2"]
    flags = [*base_flags, "--output-dir", str(tmp_path), *longer]
    finish(*flags, "--run-name", "straight")
    words = later_wins([*flags, "--run-name", "killed"])
    command = [sys.executable, "-c", DYING, str(SCRIPT), *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]
    killed = tmp_path / "killed"
    assert [row["step"] for row in read_metrics(killed)] == [0, 1, 2, 3, 4]
    assert (killed / "checkpoint.part").read_bytes() == b"half a checkpoint"
    time.sleep(1.1)  # TensorBoard orders its files by the second
    os.utime(killed / "args.json")  # the newest run
    finish("--resume", "latest", "--output-dir", tmp_path)
    assert_same_run(tmp_path / "straight", killed)
    events = EventAccumulator(str(killed))
    events.Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [1, 2, 3, 4]
    one, other = (llm.load_checkpoint(run)["optimizer"] for run in (tmp_path / "straight", killed))
    torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["adrpo", "lora"])
def test_a_run_resumes_to_itself_and_a_finished_one_says_so(runs, tmp_path, kind):
    copied = tmp_path / "copy"
    shutil.copytree(runs[kind][0], copied)
    assert "is finished" in finish("--resume", copied)
    assert_same_run(runs[kind][0], copied)
    (copied / "checkpoint.pt").unlink()  # goes on from the one before, after the first iteration
    (copied / "summary.json").unlink()
    finish("--resume", copied)
    assert_same_run(runs[kind][0], copied)
    assert json.loads((copied / "summary.json").read_text())["final"]


def test_resume_refuses_what_would_be_another_run(models, base_flags, runs, tmp_path):
    run, _ = runs["adrpo"]
    assert "--beta0" in refused("--resume", run, "--beta0", "0.04")
    assert "no checkpoint" in refused("--resume", "latest", "--output-dir", tmp_path)
    assert "no checkpoint" in refused("--resume", "")
    copied = tmp_path / "copy"
    shutil.copytree(run, copied)
    (copied / "summary.json").unlink()
    lock = llm.lock_run(copied)
    assert "another process is writing" in refused("--resume", copied)
    lock.release()
    data = bytearray((copied / "checkpoint.pt").read_bytes())
    data[len(data) // 2] ^= 1  # one bit
    (copied / "checkpoint.pt").write_bytes(data)
    before = (copied / "metrics.jsonl").read_bytes()
    assert "checkpoint.pt cannot be read" in refused("--resume", copied)
    assert (copied / "metrics.jsonl").read_bytes() == before
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    flags = [*base_flags, "--dataset", tmp_path / "p.txt", "--output-dir", tmp_path]
    finish(*flags, "--run-name", "r", "--save-every", "1")
    (tmp_path / "r/summary.json").unlink()
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS[::-1]))
    assert "other prompts than when the run began" in refused("--resume", tmp_path / "r")


def run_processes(count, flags):
    launcher = "import torch.distributed.run as launcher; launcher.main()"
    command = [sys.executable, "-c", launcher, "--standalone", "--nproc-per-node", str(count)]
    command += [str(SCRIPT), *later_wins(flags)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("kind", ["adrpo", "fsdp", "lora"])
def test_two_processes_are_one_with_the_same_batch(base_flags, base, tmp_path, kind):
    """And with all weights split over them (FSDP2), with several parts of a group."""
    flags = [*base_flags, *KINDS.get(kind, []), "--output-dir", tmp_path]
    flags += ["--prompts-per-update", "4", "--train-tokens", "36", "--updates-per-rollout", "2"]
    finish(*flags, "--run-name", "one")
    split = ["--fsdp"] if kind == "fsdp" else []
    run_processes(2, [*flags, *split, "--run-name", "two"])
    before = base["lora" if kind == "lora" else "full"]
    assert_same_run(tmp_path / "one", tmp_path / "two", before, tolerance=1e-2)
    assert len(read_lines(tmp_path / "two" / "samples" / "000002.jsonl")) == 4
    if kind == "fsdp":  # what it saved, one process goes on from
        AutoModelForCausalLM.from_pretrained(tmp_path / "two/final")
        state = llm.load_checkpoint(tmp_path / "two")
        one = llm.load_checkpoint(tmp_path / "one")
        torch.testing.assert_close(state["weights"], one["weights"], rtol=1e-2, atol=1e-4)


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
    prompts = [
        PROMPTS[0],
        [{"role": "system", "content": "is very"}, {"role": "user", "content": "a small fish"}],
    ]
    completions, expected = ["cat and dog", "the", "", "one two ( three )"], []
    reward = torch.no_grad()(llm.RewardModel((str(folder), None), 3, CPU, torch.float32))
    got = reward([prompts[0], prompts[1], *prompts], completions, [{}] * 4)
    for prompt, completion in zip(prompts * 2, completions, strict=True):
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
    assert got.tolist() == pytest.approx(expected, abs=1e-5)
    assert np.std(expected) > 0.01


def test_a_text_longer_than_the_reward_models_context_keeps_its_completion(tmp_path):
    folder = tiny_models.make_reward_lm(tmp_path / "rm", context=16)
    reward = torch.no_grad()(llm.RewardModel((str(folder), None), 3, CPU, torch.float32))
    one, other = reward(["the red cat " * 8] * 2, ["likes", "keeps not"], [{}] * 2).tolist()
    assert abs(one - other) > 1e-3


# ----------------------------------------------------------------------- F. what comes in, verified


def rekeyed(folder, out, rename):
    """A copy of a checkpoint whose tensors have other names; those renamed to None are gone."""
    shutil.copytree(folder, out)
    state = load_file(out / "model.safetensors")
    renamed = {rename(name): tensor for name, tensor in state.items() if rename(name)}
    save_file(renamed, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_weights_that_are_not_there_are_refused(models, base_flags, tmp_path):
    wrapped = rekeyed(models["llama"], tmp_path / "wrapped", lambda name: f"_orig_mod.{name}")
    assert "weights are not in its files" in refused(*base_flags, "--model-id", wrapped)
    cut = rekeyed(
        models["llama"], tmp_path / "cut", lambda n: n if "layers.1.mlp.up" not in n else ""
    )
    line = refused(*base_flags, "--model-id", cut, "--output-dir", tmp_path / "runs")
    assert "model.layers.1.mlp.up_proj.weight" in line
    headless = rekeyed(
        models["reward"], tmp_path / "rm", lambda n: n if n != "score.weight" else ""
    )
    line = refused(*base_flags, "--reward-model", headless)
    assert line.startswith(f"error: --reward-model {headless}")
    assert "score.weight" in line
    assert not (tmp_path / "runs").exists()


def test_a_reward_adapter_that_brings_its_head_is_right(models, tmp_path):
    """A LoRA of a sequence classifier on a base without a head: the head is in the adapter."""
    torch.manual_seed(0)
    kind = AutoModelForSequenceClassification
    classifier = kind.from_pretrained(models["llama"], num_labels=1)
    lora = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"])
    lora = peft.get_peft_model(classifier, lora).eval()
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    lora.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(models["llama"]).save_pretrained(tmp_path / "rm")
    ids = torch.tensor([[5, 9, 12]])
    got = llm.load_verified(kind, "--reward-model", (str(tmp_path / "rm"), None), num_labels=1)
    torch.testing.assert_close(got.eval()(ids).logits, lora(ids).logits)


def test_going_on_from_an_adapter(models, base_flags, runs, tmp_path):
    folder = runs["lora"][0] / "final"
    finish(*base_flags, "--adapter", folder, "--output-dir", tmp_path, "--run-name", "r")
    first, last = read_metrics(tmp_path / "r")[0], read_metrics(runs["lora"][0])[-1]
    for tag in ("eval/reward", "eval/kl", "eval/entropy"):  # the reference is the base model
        assert first[tag] == pytest.approx(last[tag], rel=1e-5)
    assert first["eval/kl"] > 0
    line = refused(*base_flags, "--model-id", folder)
    assert "is a LoRA" in line and "--adapter" in line
    state = load_file(folder / "adapter_model.safetensors")
    for name, change_ in (
        ("less", lambda s: s.pop(next(iter(s)))),
        ("more", lambda s: s.update(x=torch.ones(1))),
    ):
        shutil.copytree(folder, tmp_path / name)
        other = dict(state)
        change_(other)
        save_file(other, tmp_path / name / "adapter_model.safetensors", metadata={"format": "pt"})
        assert "does not fit the model" in refused(*base_flags, "--adapter", tmp_path / name)
    save_file({}, tmp_path / "less" / "adapter_model.safetensors", metadata={"format": "pt"})
    assert "does not fit the model" in refused(*base_flags, "--adapter", tmp_path / "less")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sampler_that_is_not_the_trainer_stops_before_the_step(
    base_flags, tmp_path, monkeypatch, precision
):
    """Here positions are off by some in the training pass alone."""
    flags = [*base_flags, "--output-dir", tmp_path, "--run-name", "r", "--precision", precision]
    source = SCRIPT.read_text()
    broken = tmp_path / "broken.py"
    assert source.count("mask.sum(-1, keepdim=True) + torch.arange") == 1
    broken.write_text(
        source.replace(
            "mask.sum(-1, keepdim=True) + torch.arange",
            "mask.sum(-1, keepdim=True) + 9 + torch.arange",
        )
    )
    monkeypatch.setitem(globals(), "SCRIPT", broken)
    line = refused(*flags)
    assert "nats a token between rollout and training" in line
    assert [row["step"] for row in read_metrics(tmp_path / "r")] == [0]
    assert not list((tmp_path / "r").glob("checkpoint*"))


@pytest.mark.parametrize("rate,updates", [("1e30", 1), ("3e38", 1), ("1e30", 2)])
def test_a_bad_step_overwrites_nothing(base_flags, tmp_path, rate, updates):
    flags = ["--learning-rate", rate, "--updates-per-rollout", updates, "--output-dir", tmp_path]
    flags += ["--iterations", "9", "--run-name", "r"]
    line = refused(*base_flags, *flags)
    assert "lower --learning-rate" in line
    for path in (tmp_path / "r").glob("checkpoint*.pt"):
        state = torch.load(path, weights_only=True)
        assert all(value.isfinite().all() for value in state["weights"].values())
    assert not list((tmp_path / "r/final").iterdir())


def test_every_container_gives_the_same_prompts(tmp_path):
    """A byte order mark is no part of a prompt; lines end at \\n and \\r\\n, nowhere else."""
    prompts = ["the red cat", "a\u2028b \x0b c", "the dog"]
    objects = [{"prompt": prompt, "n": i} for i, prompt in enumerate(prompts)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in objects)
    texts = {
        "bom.txt": "\ufeff" + "\n".join(prompts),
        "dos.txt": "\r\n".join(prompts) + "\r\n\r\n",
        "rows.jsonl": lines,
        "bom.jsonl": "\ufeff" + lines,
        "lines.json": lines,
        "strings.json": json.dumps(prompts),
        "objects.json": json.dumps(objects, indent=2),
        "rows.csv": "prompt,n\n" + "\n".join(f'"{p}",{i}' for i, p in enumerate(prompts)),
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    pq.write_table(pyarrow.Table.from_pylist(objects), tmp_path / "rows.parquet")
    for name in [*texts, "rows.parquet"]:
        rows, note, source = llm.load_rows("dataset", str(tmp_path / name), None, None)
        assert [row["prompt"] for row in rows] == prompts, name
        assert note == ""
        assert source == str(tmp_path / name)


def test_what_is_not_used_is_counted(tmp_path):
    user, answer = {"role": "user", "content": "the dog"}, {"role": "assistant", "content": "fish"}
    rows = [{"messages": [user, answer]}, {"messages": [user, answer, user, answer, answer]}]
    rows += [{"messages": [user]}, {"messages": None}, {"messages": [answer]}, {"other": 1}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, note, _ = llm.load_rows("dataset", str(tmp_path / "p.jsonl"), None, None)
    assert [row["prompt"] for row in found] == [[user], [user, answer, user]]
    assert "6 rows" in note
    assert "3 without a prompt" in note
    assert "1 with a prompt that was there before" in note


def test_data_sets_with_configurations(tmp_path):
    for name in ("main", "other"):
        (tmp_path / "d" / name).mkdir(parents=True)
        rows = [{"question": f"{name} {i}"} for i in range(2)]
        pq.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d" / name / "train.parquet")
    text = "".join(f"- config_name: {n}\n  data_files: {n}/*.parquet\n" for n in ("main", "other"))
    (tmp_path / "d" / "README.md").write_text(f"---\nconfigs:\n{text}---\n")
    rows, _, _ = llm.load_rows("dataset", f"{tmp_path}/d:other", None, "train")
    assert [row["prompt"] for row in rows] == ["other 0", "other 1"]
    with pytest.raises(llm.InputError, match="NAME:CONFIGURATION"):
        llm.load_rows("dataset", f"{tmp_path}/d", None, None)


def test_the_token_that_ends_a_turn_ends_a_completion(models, tmp_path):
    shutil.copytree(models["qwen3"], tmp_path / "lm")
    GenerationConfig(eos_token_id=tiny_models.EOS).save_pretrained(tmp_path / "lm")
    assert make_policy(tmp_path / "lm").stop == [tiny_models.EOS, tiny_models.END]


def test_json_has_no_nan(base_flags, tmp_path):
    flags = ["--max-completion-length", "1", "--output-dir", tmp_path, "--run-name", "r"]
    finish(*base_flags, *flags)
    for path in [*(tmp_path / "r").glob("*.json*"), *(tmp_path / "r/samples").iterdir()]:
        assert "NaN" not in path.read_text()
    assert read_metrics(tmp_path / "r")[1]["completions/distinct_2"] is None


class FullDisk(io.BytesIO):
    def write(self, data):
        raise OSError(28, "No space left on device")


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(runs, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(runs["lora"][0], run)
    before = (run / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(Path, "open", lambda *_: FullDisk())
    with pytest.raises(OSError, match="No space left on device"):  # one line at the entry point
        llm.write_safely(run / "checkpoint.pt", llm.load_checkpoint(run))
    monkeypatch.undo()
    assert (run / "checkpoint.pt").read_bytes() == before


@pytest.fixture(scope="session")
def bad(models, tmp_path_factory):
    """A folder of things that cannot work."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.txt").write_text("\n\n")
    (folder / "one.txt").write_text("only one")
    (folder / "long.txt").write_text("the " * 30 + "\n" + "a " * 20)
    (folder / "broken.jsonl").write_text('{"prompt": \n')
    (folder / "columns.jsonl").write_text('{"why": "the"}\n')
    chat = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    (folder / "mine.py").write_text(
        "def nan(p, c, r):\n    return [float('nan')] * len(c)\n"
        "def short(p, c, r):\n    return [0.0]\n"
        "def mean(p, c, r):\n    return [0.0] * len(c)\n"
        "def words(p, c, r):\n    return [0.0] * len(c)\n"
    )
    (folder / "folder").mkdir()
    tiny_models.make_reward_lm(folder / "two", num_labels=2)
    return folder


BAD = [
    ("--model-id {bad}/none", "--model-id {bad}/none"),
    ("--model-id {bad}/folder", "--model-id"),
    ("--model-id {plain} --chat", "no chat template"),
    ("--model-id {plain} --dataset {bad}/chat.jsonl", "no chat template"),
    ("--dataset no.txt", "--dataset no.txt: cannot be read"),
    ("--dataset no/such/dataset", "--dataset no/such/dataset: cannot be read"),
    ("--dataset {bad}/empty.txt", "--dataset"),
    ("--dataset {bad}/one.txt", "give --eval-dataset"),
    ("--dataset {bad}/broken.jsonl", "JSONDecodeError"),
    ("--dataset {bad}/columns.jsonl", "--prompt-column"),
    ("--dataset {bad}/long.txt", "--max-prompt-length"),
    ("--max-prompt-length 125", "--max-prompt-length"),
    ("--reward {bad}/no.py:words", "--reward {bad}/no.py:words"),
    ("--reward {bad}/mine.py:nan", "--reward nan"),
    ("--reward {bad}/mine.py:short", "--reward short"),
    ("--reward {bad}/mine.py:mean", "--reward"),
    ("--reward {bad}/mine.py:words {files}/mine.py:words", "--reward"),
    ("--reward-model {bad}/two", "--reward-model {bad}/two: has 2 logits"),
    ("--reward-weights 1 2", "--reward-weights"),
    ("--reward-weights nan", "--reward-weights"),
    ("--group-size 1", "--group-size"),
    ("--top-p 1.1", "--top-p"),
    ("--temperature 0", "--temperature"),
    ("--learning-rate nan", "--learning-rate"),
    ("--fsdp", "--fsdp"),
]


@pytest.mark.parametrize("flags,message", BAD, ids=[flags for flags, _ in BAD])
def test_everyones_mistakes_get_one_line(models, files, bad, base_flags, tmp_path, flags, message):
    places = {"bad": bad, "plain": models["plain"], "files": files}
    line = refused(*base_flags, "--output-dir", tmp_path / "runs", *flags.format(**places).split())
    assert message.format(**places) in line
    assert not (tmp_path / "runs").exists()


def test_a_plugins_own_traceback_is_shown_and_it_cannot_end_the_run(files, base_flags, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import sys\ndef raises(p, c, r):\n    raise KeyError('answer')\n"
        "def leaves(p, c, r):\n    sys.exit(0)\n"
    )
    with pytest.raises(KeyError, match="answer"):
        run_script(*base_flags, "--reward", f"{tmp_path}/mine.py:raises")
    with pytest.raises(RuntimeError, match="--reward"):
        run_script(*base_flags, "--reward", f"{tmp_path}/mine.py:leaves")


def test_a_flag_given_twice_and_an_existing_folder_are_refused(base_flags, runs, monkeypatch):
    folder = runs["adrpo"][0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    line = refused(*base_flags, "--output-dir", folder.parent, "--run-name", folder.name)
    assert "--run-name" in line
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    monkeypatch.setitem(globals(), "later_wins", lambda flags: list(map(str, flags)))
    assert "given twice" in refused(*base_flags, "--reward", "x.py:y")
    assert "given twice" in refused("--train-tokens", "1", "--train_tokens", "2")
    llm.check_args(llm.Args(prompts_per_update=6), 1)
    with pytest.raises(llm.InputError, match="--prompts-per-update"):
        llm.check_args(llm.Args(prompts_per_update=5), 2)


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
    for words in ("baseline", "KL coefficient"):
        assert words in out


def test_every_logged_tag_is_documented(runs):
    rows = [row for kind in KINDS for row in read_metrics(runs[kind][0], timing=True)]
    written = {
        re.sub(r"(reward[/_])(words|length)$", r"\1NAME", tag) for row in rows for tag in row
    } - {"step"}
    prefixes = "reward|eval|losses|adrpo|completions|sampling|clip_ratio|charts"
    documented = set(re.findall(rf"`((?:{prefixes})/[A-Za-z0-9_/]+|kl|entropy)`", DOCS.read_text()))
    # One is a histogram, one a GPU's.
    assert written | {"adrpo/coefficient", "charts/peak_memory_gb"} == documented


def test_every_flag_in_the_docs_exists():
    flags = {f"--{name.replace('_', '-')}" for name in llm.Args.__dataclass_fields__}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", DOCS.read_text()))
    named |= set(re.findall(r"--[a-z][a-z0-9_-]*_[a-z0-9_-]+", DOCS.read_text()))
    others = {"--nproc-per-node", "--help", "--task", "--gpu", "--rare", "--count"}
    others |= {"--no-keep-adapters", "--steps", "--modes"}
    assert named <= flags | others
