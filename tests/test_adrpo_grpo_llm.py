"""Tests of adrpo_grpo_llm.py on tiny random language models: its equations, its shared-prompt rows
and rollouts against stock transformers, its loss against TRL's GRPOTrainer, and the program as a
user runs it. No downloads."""

import ast
import contextlib
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
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import adrpo_grpo_llm as llm
from benchmark import mini_world_llm
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
    assert llm.group_advantage(torch.full((1, 4), 3.0)).tolist() == [[0, 0, 0, 0]]


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


@pytest.mark.parametrize("budget", [1, 25, 40, 47, 100, 235, 10_000])
def test_passes_cover_everything_once_within_the_budget(budget):
    rows, group, prompt, completion = 5, 6, 11, 6
    seen = np.zeros((rows, group), int)
    for part, columns in llm.micro_batches(rows, group, prompt, completion, budget):
        seen[part, columns] += 1
        size = seen[part, columns].shape
        assert size[0] * (prompt + size[1] * completion) <= budget or size == (1, 1)
        assert size[1] == group or size[0] == 1
    assert (seen == 1).all()


def test_distinct_2_against_a_loop():
    completions = [[1, 2, 3, 1, 2], [5], [1, 2, 9], []]
    pairs = ["12", "23", "31", "12", "12", "29"]
    assert llm.distinct_2(completions) == len(set(pairs)) / len(pairs)
    assert math.isnan(llm.distinct_2([[4], []]))


@pytest.mark.parametrize("count,processes", [(8, 2), (7, 2), (5, 4), (1, 3)])
def test_shares_cover_everything_in_order(count, processes):
    shares = [llm.my_share(count, rank, processes) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert [i for share in shares for i in share][:count] == list(range(count))


@pytest.mark.parametrize(
    "top_p,top_k", [(1.0, 0), (0.7, 0), (0.2, 0), (1.0, 3), (1.0, 99), (0.7, 4)]
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chosen_tokens_have_the_frequencies_of_the_stock_warpers(temperature, top_p, top_k):
    """On an even grid of uniforms a token's count is its probability times the grid's size, give or
    take one."""
    logits, grid = numbers(3, 12, dtype=torch.float32) * 1.5, (torch.arange(4000) + 0.5) / 4000
    warped = logits / temperature
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    probabilities = (logits / temperature).softmax(-1)[:, None].expand(-1, 4000, -1)
    tokens = llm.choose_tokens(probabilities, grid.expand(3, -1), top_p, top_k)
    counts = torch.stack([row.bincount(minlength=12) for row in tokens])
    assert ((counts - 4000 * warped.softmax(-1)).abs() <= 1.01).all()


def test_choosing_at_the_ends_and_the_likeliest():
    logits = numbers(5, 12, dtype=torch.float32)
    assert torch.equal(
        llm.choose_tokens(logits.softmax(-1), torch.rand(5), 0.5, 1), logits.argmax(-1)
    )
    logits[:, 0] = logits[:, -1] = -math.inf
    for number in (0.0, 1 - 2**-24):
        tokens = llm.choose_tokens(logits.softmax(-1), torch.full((5,), number), 1.0, 0)
        assert ((tokens > 0) & (tokens < 11)).all()


# -------------------------------------------------------------------- B. against stock transformers


def make_policy(folder, *, rank=0, checkpointing=False):
    """The policy as the script builds it, its LoRA not zero."""
    lengths = {"max_prompt_length": 16, "max_completion_length": 16}
    args = llm.Args(
        model_id=str(folder), lora_rank=rank, gradient_checkpointing=checkpointing, **lengths
    )
    torch.manual_seed(4)
    policy = llm.load_policy(args, torch.float32)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


def stock_copy(folder, policy, attention="sdpa"):
    """The policy's weights in a stock model that knows nothing of shared prompts."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    if isinstance(policy.model, peft.PeftModel):
        model = peft.get_peft_model(model, policy.model.peft_config["default"])
    model.load_state_dict(policy.model.state_dict())
    assert model.config._attn_implementation == attention
    return model


def plain(model, prompts, completions, temperature):
    """Log-probabilities and entropies of completions [B,G,C], each a sequence of its own,
    right-padded."""
    rows, group, size = completions.shape
    places = [len(prompt) for prompt in prompts for _ in range(group)]
    ids = [
        torch.tensor(prompts[i] + completions[i, j].tolist())
        for i in range(rows)
        for j in range(group)
    ]
    mask = [torch.ones(len(one), dtype=torch.long) for one in ids]
    ids, mask = (torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (ids, mask))
    logits = model(input_ids=ids, attention_mask=mask).logits
    logits = torch.stack(
        [one[at - 1 : at - 1 + size] for one, at in zip(logits, places, strict=True)]
    )
    pi = torch.distributions.Categorical(logits=logits.view(rows, group, size, -1) / temperature)
    return pi.log_prob(completions), pi.entropy()


def ragged(lengths=(7, 3, 5), group=4, size=6, seed=0):
    """Prompts of these lengths, completions [B,G,C] and their mask, of 1 to C tokens."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(6, 60, (length,), generator=generator).tolist() for length in lengths]
    ends = torch.randint(1, size + 1, (len(lengths), group), generator=generator)
    ends[0, 0], mask = size, torch.arange(size) < ends[..., None]
    ends[1, 1] = 1
    return prompts, torch.randint(6, 60, mask.shape, generator=generator) * mask, mask


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def weighted(logp, mask):
    return (logp * mask * numbers(*mask.shape, seed=9, dtype=torch.float32)).sum()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_shared_prompt_rows_are_separate_sequences(models, family, rank):
    policy = make_policy(models[family], rank=rank)
    for lengths in ((7, 3, 5), (4, 4)):  # with and without padding
        prompts, completions, mask = ragged(lengths)
        policy.zero_grad()
        logp, entropy = llm.completion_log_probabilities(policy, prompts, completions, 0.7)
        weighted(logp, mask).backward()
        for attention in ("sdpa", "eager"):
            stock = stock_copy(models[family], policy, attention)
            expected, spread = plain(stock, prompts, completions, 0.7)
            torch.testing.assert_close(logp[mask], expected[mask], rtol=1e-5, atol=2e-5)
            torch.testing.assert_close(entropy[mask], spread[mask], rtol=1e-4, atol=2e-5)
            weighted(expected, mask).backward()
            mine, theirs = gradients(policy.model), gradients(stock)
            assert mine.keys() == theirs.keys()
            assert all((theirs[name] != 0).any() for name in theirs)
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    assert not entropy.requires_grad
    assert logp[mask].min() < -4  # not flat: log 64 is 4.2


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("saver", ["gradient checkpointing", "logits in pieces"])
def test_memory_savers_change_nothing(models, monkeypatch, rank, saver):
    prompts, completions, mask = ragged()
    results, calls, piece = [], [], llm.recompute
    monkeypatch.setattr(
        llm, "recompute", lambda *a, **options: calls.append(1) or piece(*a, **options)
    )
    for saving in (False, True):
        policy = make_policy(
            models["qwen3"], rank=rank, checkpointing=saving and "checkpointing" in saver
        )
        calls.clear()
        monkeypatch.setattr(llm, "LOGITS_AT_ONCE", 1000 if saving and "logits" in saver else 2**26)
        logp, entropy = llm.completion_log_probabilities(policy, prompts, completions, 1.3)
        weighted(logp, mask).backward()
        results.append((logp, entropy, gradients(policy)))
        assert len(calls) == (5 if saving and "logits" in saver else 0)  # 72 places, 15 at once
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_model_with_dropout_is_one_function_or_refused(tmp_path, family):
    """GPT-2 has modules that drop out, OPT calls the function. Both have learned positions."""
    folder = tiny_models.make_lm(tmp_path / family, family, tie_word_embeddings=False)
    prompts, completions, mask = ragged()
    try:
        policy = make_policy(folder)
    except llm.InputError:
        return
    logp, _ = llm.completion_log_probabilities(policy, prompts, completions, 1.0)
    expected, _ = plain(stock_copy(folder, policy), prompts, completions, 1.0)
    torch.testing.assert_close(logp[mask], expected[mask], rtol=1e-5, atol=2e-5)


@pytest.fixture()
def selections(monkeypatch):
    """Sizes of the batch (groups, completions) after each time that finished completions left
    it."""
    made, select = [], llm.SharedPrompt.select

    def recorded(self, groups, slots):
        made.append(tuple(slots.shape))
        return select(self, groups, slots)

    monkeypatch.setattr(llm.SharedPrompt, "select", recorded)
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_greedy_rollouts_are_those_of_stock_generate(models, selections, family, rank):
    policy = make_policy(models[family], rank=rank)
    stock = stock_copy(models[family], policy).eval()
    prompts, _, _ = ragged(tuple(range(2, 14)), seed=3)
    tokens, mask, logp = llm.rollout(policy, prompts, uniforms(12, 2, 12), STOP, 0)
    lengths = set()
    for i, prompt in enumerate(prompts):
        options = {
            "do_sample": False,
            "max_new_tokens": 12,
            "eos_token_id": STOP,
            "pad_token_id": 0,
        }
        ids = torch.tensor([prompt])
        expected = stock.generate(ids, attention_mask=torch.ones_like(ids), **options)[
            0, len(prompt) :
        ].tolist()
        for j in range(2):
            assert tokens[i, j][mask[i, j]].tolist() == expected
        lengths.add(len(expected))
    assert len(lengths) > 1
    assert selections
    trained, _ = llm.completion_log_probabilities(policy, prompts, tokens, 1.0)
    torch.testing.assert_close(logp[mask], trained[mask], rtol=1e-4, atol=2e-5)


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
@pytest.mark.parametrize(
    "family,rank,temperature", [("qwen3", 0, 1.0), ("mistral", 4, 1.4), ("qwen2", 4, 0.8)]
)
def test_sampled_rollouts_against_a_slow_loop(models, selections, family, rank, temperature):
    policy = make_policy(models[family], rank=rank)
    stock = stock_copy(models[family], policy)
    (prompts, _, _), chance = ragged((7, 3, 5, 9)), uniforms(4, 6, 12)
    tokens, mask, logp = llm.rollout(policy, prompts, chance, STOP, temperature)
    for i, prompt in enumerate(prompts):
        for j in range(6):
            assert tokens[i, j][mask[i, j]].tolist() == slow_completion(
                stock, prompt, chance[i, j], temperature
            )
    ends = tokens.gather(2, mask.sum(2, keepdim=True) - 1).squeeze(2)
    assert (torch.isin(ends, torch.tensor(STOP)) | (mask.sum(2) == 12)).all()
    assert (mask.sum(2) < 12).any()
    assert (mask.sum(2) == 12).any()  # cut off
    assert (tokens[~mask] == 0).all()
    assert len(selections) > 1
    assert selections[-1][0] < 4 or selections[-1][1] < 6
    trained, _ = llm.completion_log_probabilities(policy, prompts, tokens, temperature)
    torch.testing.assert_close(logp[mask], trained[mask], rtol=1e-4, atol=2e-5)
    # a prompt on its own; and nobody leaves the batch
    for i, prompt in enumerate(prompts):
        one, kept, _ = llm.rollout(policy, [prompt], chance[i : i + 1], STOP, temperature)
        assert torch.equal(kept[0], mask[i, :, : kept.shape[2]])
        assert torch.equal(one[0], tokens[i, :, : one.shape[2]])
    selections.clear()
    together = llm.rollout(policy, prompts, chance, [], temperature)[0][..., : tokens.shape[2]]
    assert not selections
    assert torch.equal(together * mask, tokens)


def test_a_rollout_goes_on_until_every_process_is_done(models):
    policy, (prompts, _, _) = make_policy(models["qwen3"]), ragged()
    steps, chance, every = [], uniforms(3, 2, 12), list(range(64))
    drawn = llm.rollout(policy, prompts, chance, every, 1.0)
    hold = {"everyone_done": lambda done: steps.append(done) or len(steps) == 5}
    waited = llm.rollout(policy, prompts, chance, every, 1.0, **hold)
    assert steps == [True] * 5
    assert drawn[0].shape == (3, 2, 1)
    assert all(torch.equal(one, other) for one, other in zip(drawn, waited, strict=True))


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
    tokens, mask = (batch[name].view(2, 4, -1) for name in ("completion_ids", "completion_mask"))
    advantage = llm.group_advantage(rewards)
    torch.testing.assert_close(advantage.flatten(), batch["advantages"], rtol=1e-5, atol=1e-6)
    coefficient = torch.full((8,), 0.04)
    if k is not None:
        coefficient = llm.adaptive_beta(advantage.flatten(), 0.04, k)

    policy, frozen = make_policy(models["qwen3"]), make_policy(models["qwen3"])
    policy.model.load_state_dict(trainer.model.state_dict())
    with llm.reference_policy(policy, frozen) as reference:
        ref_logp, _ = llm.completion_log_probabilities(reference, prompts[::4], tokens, 1.0)
    logp, _ = llm.completion_log_probabilities(policy, prompts[::4], tokens, 1.0)
    flat = [part.flatten(0, 1) for part in (logp, ref_logp, mask)]
    torch.testing.assert_close(
        flat[1] * flat[2], batch["ref_per_token_logps"] * flat[2], rtol=1e-4, atol=2e-5
    )
    before = flat[0].detach() if old is None else old
    loss = llm.grpo_loss(flat[0], before, flat[1], advantage.flatten(), coefficient, flat[2], 0.2)
    loss.backward()

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
    ratio = (flat[0].detach() - before).exp()
    outside = ((ratio - 1).abs() > 0.2)[flat[2].bool()].float().mean().item()
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
        "checkpoints/000001.pt",
        "checkpoints/000002.pt",
    }
    expected |= {f"samples/{step:06d}.jsonl" for step in range(3)} | {"final/tokenizer.json"}
    expected |= {"final/adapter_config.json" if kind == "lora" else "final/generation_config.json"}
    assert expected == {name for name in names if not name.startswith("final/") or name in expected}
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
    state = llm.load_checkpoint(tmp_path / "r")
    assert all(value.dtype == torch.float32 for value in state["model"].values())


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
    state = llm.load_checkpoint(run)["model"]
    missing, unexpected = policy.load_state_dict(state, strict=False)
    assert not unexpected
    frozen = {
        name for name, p in policy.named_parameters(remove_duplicate=False) if not p.requires_grad
    }
    assert set(missing) <= frozen
    policy.model.set_attn_implementation("sdpa")
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
    assert stock.generation_config.eos_token_id == STOP


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
    )
    llm.seed_everything(1)
    policy = llm.load_policy(args, torch.float32)
    model, reference = (stock_copy(models["qwen3"], policy) for _ in range(2))
    tokenizer, training = (
        AutoTokenizer.from_pretrained(models["qwen3"]),
        [p for i, p in enumerate(PROMPTS) if i % 10],
    )
    chosen = [training[row] for row in llm.draw_prompts(10, 2, 0, 1)]
    prompts = [tokenizer(prompt).input_ids for prompt in chosen]
    chance = torch.rand(2, 4, 10, generator=llm.seed_everything(1, 1))
    tokens, mask, _ = llm.rollout(policy, prompts, chance, STOP, 0.9)
    ids = [tokens[p, g][mask[p, g]] for p in range(2) for g in range(4)]
    texts = [tokenizer.decode(one, skip_special_tokens=True) for one in ids]
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
                kept = mask[p, g]
                a = float((rewards[p, g] - rewards[p].mean()) / (rewards[p].std() + 1e-4))
                beta = 0.04 - min(max(a, -k * 0.04), k * 0.04) if method == "adrpo" else 0.04
                ratio, d = (logp - old)[p, g][kept].exp(), (ref_logp - logp)[p, g][kept]
                policy_term = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
                losses.append((policy_term + beta * (d.exp() - d - 1)).mean())
                stuck = (ratio > 1.2) if a > 0 else (ratio < 0.8)  # clipped: no gradient
                figures.append(torch.stack([d.exp() - d - 1, entropy[p, g][kept], stuck]).detach())
        loss = sum(losses) / 8
        loss.backward()
        norm += float(torch.nn.utils.clip_grad_norm_(trained, 0.5)) / 2
        total += loss.item() / 2
        optimizer.step()
    row = read_metrics(tmp_path / "r")[1]
    assert row["losses/total"] == pytest.approx(total, rel=1e-3, abs=1e-6)
    assert row["losses/grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert row["reward/mean"] == pytest.approx(rewards.mean().item(), rel=1e-6)
    assert row["completions/mean_length"] == pytest.approx(mask.sum(2).float().mean().item())
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
    ["--train-tokens 36", "--train-tokens 1", "--rollout-batch 1", "--gradient-checkpointing"],
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
    "--lr-schedule cosine",
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
    assert "warning: --group-size 2" in out
    for step in range(2):
        texts = [
            record["completion"]
            for record in read_lines(tmp_path / "r" / "samples" / f"{step:06d}.jsonl")
        ]
        assert texts[0] == texts[1]
        assert texts[2] == texts[3]
    rows = read_metrics(tmp_path / "r")
    assert all(
        math.isfinite(value)
        for row in rows
        for tag, value in row.items()
        if "distinct_2" not in tag
    )


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
    reward = llm.model_reward(str(models["reward"]), 16, torch.device("cpu"), torch.float32)
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
    assert llm.encode_prompts(tokenizer, rows, False)[1].ids == tokenizer(PROMPTS[1]).input_ids


def test_held_out_prompts(models, files, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(models["qwen3"])
    (tmp_path / "other.txt").write_text(f"a white bird\n\n{PROMPTS[3]}\n")
    args = llm.Args(dataset=str(files / "prompts.txt"), eval_dataset=str(tmp_path / "other.txt"))
    train, heldout, note = llm.load_prompts(args, tokenizer)
    assert [prompt.row["prompt"] for prompt in train] == PROMPTS
    assert [prompt.row["prompt"] for prompt in heldout] == ["a white bird", PROMPTS[3]]
    assert note == "1 of the 2 evaluation prompts are training prompts"


# -------------------------------------------------------------------------- kill, resume, processes


# A child that kills itself in the middle of writing its second checkpoint (iteration 4).
DYING = """
import os, runpy, signal, sys, torch
save = torch.save
def dying_save(what, path, **rest):
    if str(path).endswith("000004.part"):
        open(path, "wb").write(b"half a checkpoint")
        os.kill(os.getpid(), signal.SIGKILL)
    save(what, path, **rest)
torch.save = dying_save
script = sys.argv[1]; sys.argv = sys.argv[1:]
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
        "--lr-schedule",
        "cosine",
    ]
    flags = [*base_flags, "--output-dir", tmp_path, *longer]
    finish(*flags, "--run-name", "straight")
    command = [sys.executable, "-c", DYING, str(SCRIPT), *map(str, flags), "--run-name", "killed"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]
    killed = tmp_path / "killed"
    assert [row["step"] for row in read_metrics(killed)] == [0, 1, 2, 3, 4]
    assert {path.name for path in (killed / "checkpoints").iterdir()} == {
        "000002.pt",
        "000004.part",
    }
    time.sleep(1.1)  # TensorBoard orders its files by the second
    os.utime(killed / "args.json")  # the newest run
    finish("--resume", "latest", "--output-dir", tmp_path)
    assert_same_run(tmp_path / "straight", killed)
    events = EventAccumulator(str(killed))
    events.Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [1, 2, 3, 4]
    one, other = (llm.load_checkpoint(run) for run in (tmp_path / "straight", killed))
    torch.testing.assert_close(
        one["optimizer"]["state"], other["optimizer"]["state"], rtol=0, atol=0
    )
    assert sorted(path.name for path in (killed / "samples").iterdir()) == [
        f"{step:06d}.jsonl" for step in range(5)
    ]


def test_a_run_killed_before_its_first_checkpoint_starts_anew(base_flags, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["adrpo"][0], run)
    for part in ("checkpoints", "final", "summary.json"):
        shutil.rmtree(run / part) if (run / part).is_dir() else (run / part).unlink()
    (run / "final").mkdir()
    time.sleep(1.1)
    finish("--resume", run)
    assert_same_run(runs["adrpo"][0], run)


@pytest.mark.parametrize("kind", ["adrpo", "lora"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_run_resumes_to_itself(runs, tmp_path, kind, finished):
    copy = tmp_path / "copy"
    shutil.copytree(runs[kind][0], copy)
    if not finished:
        (copy / "checkpoints" / "000002.pt").unlink()
    summary = json.loads((copy / "summary.json").read_text())
    time.sleep(1.1)
    finish("--resume", copy)
    assert_same_run(runs[kind][0], copy)
    assert json.loads((copy / "summary.json").read_text()) == summary


def run_processes(count, flags, script=SCRIPT):
    launcher = "import torch.distributed.run as launcher; launcher.main()"
    command = [
        sys.executable,
        "-c",
        launcher,
        "--standalone",
        "--nproc-per-node",
        str(count),
        str(script),
        *flags,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize("kind", ["adrpo", "lora"])
def test_two_processes_are_one_with_the_same_batch(base_flags, base, tmp_path, kind):
    flags = [*base_flags, *KINDS[kind], "--output-dir", str(tmp_path), "--prompts-per-update", "4"]
    flags += ["--train-tokens", "36", "--updates-per-rollout", "2"]  # a group in two passes
    finish(*flags, "--run-name", "one")
    result = run_processes(2, [*flags, "--run-name", "two"])
    assert result.returncode == 0, result.stderr[-3000:]
    before = base["lora" if kind == "lora" else "full"]
    assert_same_run(tmp_path / "one", tmp_path / "two", before, tolerance=1e-2)
    assert len(read_lines(tmp_path / "two" / "samples" / "000002.jsonl")) == 4


def test_prompts_that_processes_cannot_share_equally_are_refused():
    llm.check_args(llm.Args(prompts_per_update=6), 2)
    with pytest.raises(
        llm.InputError, match="--prompts-per-update 5: must be a multiple of the 2 processes"
    ):
        llm.check_args(llm.Args(prompts_per_update=5), 2)


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
    stock, own = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    prompts = [
        PROMPTS[0],
        [{"role": "system", "content": "is very"}, {"role": "user", "content": "a small fish"}],
    ]
    completions, expected = ["cat and dog", "the", "", "one two ( three )"], []
    reward = llm.model_reward(str(folder), 3, torch.device("cpu"), torch.float32)
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
    reward = llm.model_reward(str(folder), 3, torch.device("cpu"), torch.float32)
    one, other = reward(["the red cat " * 8] * 2, ["likes", "keeps not"], [{}] * 2).tolist()
    assert abs(one - other) > 1e-3


# ------------------------------------------------------------------------------------- F. bad input


@pytest.fixture(scope="session")
def bad(models, tmp_path_factory):
    """A folder of things that cannot work."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.txt").write_text("\n\n")
    (folder / "one.txt").write_text("only one")
    (folder / "long.txt").write_text("the " * 30 + "\n" + "a " * 20)
    (folder / "lines.jsonl").write_text('"the red cat"\n')
    (folder / "null.jsonl").write_text('{"prompt": [{"role": "user", "content": null}]}\n')
    (folder / "broken.jsonl").write_text('{"prompt": \n')
    (folder / "columns.jsonl").write_text('{"why": "the"}\n')
    (folder / "chat.jsonl").write_text(
        "".join(
            json.dumps({"prompt": [{"role": "user", "content": prompt}]}) + "\n"
            for prompt in PROMPTS
        )
    )
    (folder / "mine.py").write_text(
        "def raising(p, c, r):\n    raise KeyError('answer')\n"
        "def nan(p, c, r):\n    return [float('nan')] * len(c)\n"
        "def inf(p, c, r):\n    return [1e39] * len(c)\n"
        "def short(p, c, r):\n    return [0.0]\n"
        "def words(p, c, r):\n    return [0.0] * len(c)\n"
        "def none(p, c, r):\n    return None\n"
    )
    (folder / "syntax.py").write_text("def words(\n")
    (folder / "folder").mkdir()
    shutil.copytree(models["qwen3"], folder / "cut")
    (folder / "cut" / "model.safetensors").write_bytes(b"nothing")
    tiny_models.make_reward_lm(folder / "two", num_labels=2)
    tiny_models.make_lm(folder / "window", "mistral", sliding_window=16)
    for family in ("gemma2", "bloom", "mamba"):
        sizes = {"n_layer": 2, "n_head": 4} if family == "bloom" else {}
        tiny_models.make_lm(folder / family, family, **sizes)
    return folder


BAD = [
    ("--model-id {bad}/none", "--model-id {bad}/none: cannot be loaded"),
    ("--model-id {bad}/folder", "--model-id {bad}/folder: cannot be loaded"),
    ("--model-id {bad}/cut", "--model-id {bad}/cut: cannot be loaded"),
    ("--model-id {plain} --chat", "--model-id {plain}: its tokenizer has no chat template"),
    (
        "--model-id {plain} --dataset {bad}/chat.jsonl",
        "--model-id {plain}: its tokenizer has no chat template",
    ),
    ("--model-id {bad}/window", "more than the model's sliding window of 16 tokens"),
    ("--model-id {bad}/gemma2", "--model-id {bad}/gemma2: cannot"),
    ("--model-id {bad}/bloom", "--model-id {bad}/bloom: cannot"),
    ("--model-id {bad}/mamba", "--model-id {bad}/mamba: cannot"),
    ("--dataset no.txt", "--dataset no.txt: cannot be read"),
    ("--dataset no/such/dataset", "--dataset no/such/dataset: cannot be read"),
    ("--eval-dataset no.jsonl", "--eval-dataset no.jsonl: cannot be read"),
    ("--dataset {bad}/empty.txt", "empty"),
    ("--dataset {bad}/one.txt", "one prompt cannot be split; give --eval-dataset"),
    ("--dataset {bad}/lines.jsonl", "every line must be a JSON object"),
    ("--dataset {bad}/broken.jsonl", "cannot be read (JSONDecodeError"),
    (
        "--dataset {bad}/columns.jsonl",
        "no prompt in column prompt (columns: why); see --prompt-column",
    ),
    (
        "--dataset {bad}/chat.jsonl --prompt-column text",
        "no prompt in column text (columns: prompt)",
    ),
    ("--dataset {bad}/long.txt", "--max-prompt-length 16: the shortest prompt has 20 tokens"),
    ("--max-prompt-length 125", "more than the model's context of 128 tokens; lower one of them"),
    (
        "--reward {bad}/no.py:words",
        "--reward {bad}/no.py:words: must be path.py:function of an existing file",
    ),
    ("--reward words", "--reward words: must be path.py:function of an existing file"),
    (
        "--reward {bad}/mine.py:other",
        "--reward {bad}/mine.py:other: cannot be loaded (AttributeError",
    ),
    (
        "--reward {bad}/syntax.py:words",
        "--reward {bad}/syntax.py:words: cannot be loaded (SyntaxError",
    ),
    ("--reward {bad}/mine.py:raising", "--reward raising: raised KeyError at mine.py:2: 'answer'"),
    ("--reward {bad}/mine.py:none", "--reward none: raised"),
    ("--reward {bad}/mine.py:nan", "--reward nan: returned nan for the completion ''"),
    ("--reward {bad}/mine.py:inf", "--reward inf: returned inf for the completion ''"),
    ("--reward {bad}/mine.py:short", "--reward short: returned shape [1] for 2 completions"),
    (
        "--reward {bad}/mine.py:words {files}/mine.py:words",
        "there is another reward of the name words; rename one",
    ),
    ("--reward-model {bad}/two", "--reward-model {bad}/two: has 2 logits, must have 1"),
    ("--reward-model {bad}/none", "--reward-model {bad}/none: cannot be loaded"),
    ("--reward-weights nan", "--reward-weights (nan,): must be finite"),
    ("--dataset {bad}/null.jsonl", "--dataset {bad}/null.jsonl: no prompt in column prompt"),
    ("--reward-weights 1 2", "--reward-weights (1.0, 2.0): must be 1, one for each"),
    ("--group-size 1", "--group-size 1: must be at least 2"),
    ("--prompts-per-update 0", "--prompts-per-update 0: must be above 0"),
    ("--top-p 0", "--top-p 0.0: must be above 0 and at most 1"),
    ("--top-p 1.1", "--top-p 1.1: must be above 0 and at most 1"),
    ("--top-k -1", "--top-k -1: must be 0 or more"),
    ("--seed -1", "--seed -1: must be 0 or more"),
    ("--temperature 0", "--temperature 0.0: must be above 0"),
    ("--eval-temperature -1", "--eval-temperature -1.0: must be 0 (greedy) or more"),
    ("--adv-clip-k -1", "--adv-clip-k -1.0: must be above 0"),
    ("--beta0 -0.1", "--beta0 -0.1: must be 0 or more"),
    ("--learning-rate nan", "--learning-rate nan: must be above 0"),
    ("--iterations 0", "--iterations 0: must be above 0"),
    ("--lora-rank 4 --lora-targets attention.q", "--lora-targets attention.q: "),
    ("--resume nowhere", "--resume nowhere: nowhere is not a run folder"),
]


@pytest.mark.parametrize("flags,message", BAD, ids=[flags for flags, _ in BAD])
def test_bad_flags_get_one_line(models, files, bad, base_flags, tmp_path, flags, message):
    places = {"bad": bad, "plain": models["plain"], "files": files}
    line = refused(*base_flags, "--output-dir", tmp_path / "runs", *flags.format(**places).split())
    assert message.format(**places) in line
    assert not (tmp_path / "runs").exists()


def test_a_prompt_that_the_tokenizer_refuses_is_named():
    digits_only = mini_world_llm.build_tokenizer()
    with pytest.raises(llm.InputError, match="the prompt '12ab=' cannot be tokenised"):
        llm.encode_prompts(digits_only, [{"prompt": "12ab="}], chat=False)


def test_an_existing_or_unwritable_folder_is_refused(base_flags, runs, tmp_path):
    folder = runs["adrpo"][0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    line = refused(*base_flags, "--output-dir", folder.parent, "--run-name", folder.name)
    assert f"--run-name {folder.name}: {folder} exists" in line
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    (tmp_path / "file").write_text("")
    line = refused(*base_flags, "--output-dir", tmp_path / "file")
    assert f"--output-dir {tmp_path / 'file'}: cannot be written" in line


def test_resume_refuses_other_flags_and_foreign_or_damaged_folders(runs, tmp_path):
    run, _ = runs["adrpo"]
    assert "--beta0 0.5: the resumed run has 0.04" in refused("--resume", run, "--beta0", "0.5")
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "args.json").write_text('{"script": "toy_mnist_flow", "args": {}}')
    assert "is a run of toy_mnist_flow, not of adrpo_grpo_llm" in refused(
        "--resume", tmp_path / "toy"
    )
    assert "no run of this script" in refused("--resume", "latest", "--output-dir", tmp_path)
    for text in ("{", "[]", '{"script": "adrpo_grpo_llm", "args": {"none": 1}}'):
        (tmp_path / "toy" / "args.json").write_text(text)
        assert "its args.json is not this version's" in refused("--resume", tmp_path / "toy")
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    (damaged / "checkpoints" / "000002.pt").write_bytes(b"nothing")
    assert "000002.pt cannot be read" in refused("--resume", damaged)
    assert read_metrics(damaged) == read_metrics(run)


def test_a_full_disk_keeps_the_earlier_checkpoints(runs, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(runs["adrpo"][0], run)
    monkeypatch.setattr(
        torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(
        llm.InputError,
        match="--output-dir: .*000003.pt cannot be written .*No space left.*--resume",
    ):
        llm.save_checkpoint(run, {"iteration": 3}, {})
    assert llm.load_checkpoint(run)["iteration"] == 2


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for iteration in (1, 2, 10):
        llm.save_checkpoint(tmp_path, {"iteration": iteration}, {"model": {"w": torch.ones(1)}})
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "000002.pt",
        "000010.pt",
    }


def test_a_non_finite_loss_saves_the_last_good_weights(base_flags, tmp_path):
    flags = [
        "--learning-rate",
        "1e30",
        "--eval-every",
        "9",
        "--save-every",
        "9",
        "--output-dir",
        tmp_path,
    ]
    line = refused(*base_flags, *flags, "--run-name", "rate")
    assert "iteration 1: loss" in line
    assert "the weights before this step are saved. Lower --learning-rate" in line
    checkpoint = llm.load_checkpoint(tmp_path / "rate")
    assert checkpoint["iteration"] == 1
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    finite = checkpoint["model"]["model.model.norm.weight"]
    assert finite.abs().max() > 1e20  # one step of that size was finite


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
    for words in ("baseline", "KL coefficient", "benchmark/mini_world_llm.py"):
        assert words in out


def test_every_logged_tag_is_documented(runs):
    rows = [row for kind in KINDS for row in read_metrics(runs[kind][0], timing=True)]
    written = {
        re.sub(r"(reward[/_])(words|length)$", r"\1NAME", tag) for row in rows for tag in row
    } - {"step"}
    prefixes = "reward|eval|losses|adrpo|completions|sampling|clip_ratio|charts"
    documented = set(re.findall(rf"`((?:{prefixes})/[A-Za-z0-9_/]+|kl|entropy)`", DOCS.read_text()))
    assert written | {"adrpo/coefficient"} == documented  # that is a histogram


def test_every_flag_in_the_docs_exists():
    flags = {f"--{name.replace('_', '-')}" for name in llm.Args.__dataclass_fields__}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", DOCS.read_text()))
    others = {
        "--nproc-per-node",
        "--use-fsdp",
        "--fsdp-version",
        "--num-processes",
        "--help",
        "--task",
        "--gpu",
        "--rare",
    }
    assert named <= flags | others
