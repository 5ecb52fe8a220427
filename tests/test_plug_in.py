"""docs/plug_in.md: its code blocks, run as they stand there, against the losses of the scripts; its
claims on AWM and DiffusionNFT; its two traps; and the figures that it prints."""

import math
import re
from pathlib import Path

import accelerate
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import adrpo_fm_sd3 as sd3
import adrpo_grpo_llm as llm
import toy_mnist_flow as toy
from benchmark import plug_in_equal
from tests import tiny_models

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "plug_in.md").read_text()
BLOCKS = dict(re.findall(r"```python\n# block: (\S+)\n(.*?)```", PAGE, re.DOTALL))
PROMPTS = ["the cat sees", "the blue fox", "the old dog", "the cat eats"]
BETA0 = 0.04


def run_block(name, **names):
    """The names that a block of the page leaves behind, given those that it needs."""
    space = {"__name__": name, **names}
    exec(compile(BLOCKS[name], f"docs/plug_in.md, {name}", "exec"), space)
    return space


def reset_accelerate():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def test_every_block_of_code_is_run_here():
    assert BLOCKS.keys() == {"trl", "trl-use", "flow", "flow-loop"}
    assert PAGE.count("```python\n") == len(BLOCKS)


# ------------------------------------------------------------------------------------------ A. TRL


def log_probabilities(model, inputs):
    """Of the completions' tokens, by a plain forward pass: [B,T]."""
    tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    chosen = logits.gather(2, tokens[:, 1:, None])[:, :, 0]
    return chosen[:, -inputs["completion_ids"].shape[1] :]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


class Witness(TrainerCallback):
    """Beside a trainer: at each of its micro-batches the script's loss, whose gradients gather in a
    second model, and at each of its steps both gradients."""

    def __init__(self, trainer, folder, k):
        self.trainer, self.k, self.compute = trainer, k, trainer._compute_loss
        self.reference, self.twin = load(folder), load(folder)
        self.batches, self.losses, self.gradients = [], [], []
        trainer._compute_loss = self.compute_both
        trainer.add_callback(self)

    def compute_both(self, model, inputs):
        theirs = self.compute(model, inputs)
        self.twin.load_state_dict(model.state_dict())
        logp = log_probabilities(self.twin, inputs)
        with torch.no_grad():
            ref_logp = log_probabilities(self.reference, inputs)
        advantage = inputs["advantages"]
        coefficient = llm.adaptive_beta(advantage, BETA0, self.k)
        old, mask = inputs["old_per_token_logps"], inputs["completion_mask"]
        loss = llm.grpo_loss(logp, old, ref_logp, advantage, coefficient, mask, 0.2)
        (loss / self.trainer.args.gradient_accumulation_steps).backward()
        outside = ((logp - old).exp() - 1).abs()[mask.bool()] > 0.2
        self.batches.append((inputs, coefficient, outside.float().mean().item()))
        self.losses.append((theirs.item(), loss.item() / 2))
        return theirs

    def on_pre_optimizer_step(self, *_, model, **__):
        pair = [
            {name: weight.grad.clone() for name, weight in network.named_parameters()}
            for network in (model, self.twin)
        ]
        self.gradients.append(pair)
        self.twin.zero_grad()


@pytest.fixture(scope="module", params=[1.0, 2.0], ids=["k=1", "k=2"])
def trained(request, tmp_path_factory):
    """A run of the page's trainer with its witness, and the rewards of its two rollouts."""
    pytest.importorskip("trl")
    import datasets

    folder = tmp_path_factory.mktemp("plug")
    tiny_models.make_lm(folder / "lm", "qwen3")
    rewards = []

    def reward(completions, **_):  # the last group of a rollout is constant
        values = [len(set(text.split())) + 0.1 * len(text) for text in completions]
        rewards.append(torch.tensor(values[:4] + [3.0] * 4).view(2, 4))
        return rewards[-1].flatten().tolist()

    options = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    options |= {"gradient_checkpointing": False, "disable_tqdm": True, "seed": 3}
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    options |= {"num_generations": 4, "num_iterations": 2, "max_steps": 4}
    options |= {"max_completion_length": 10, "learning_rate": 1e-2, "max_grad_norm": 0.0}
    witness = None

    def build(**arguments):
        nonlocal witness
        trainer = page["ADRPOTrainer"](**arguments)
        witness = Witness(trainer, folder / "lm", request.param)
        return trainer

    page = run_block("trl")
    page["ADRPOTrainer"].adv_clip_k = request.param
    reset_accelerate()
    directory = str(folder / "run")
    assert '"runs/trl"' in BLOCKS["trl-use"]
    use = BLOCKS["trl-use"].replace('"runs/trl"', repr(directory))
    space = page | {
        "ADRPOTrainer": build,
        "model": load(folder / "lm"),
        "reward": reward,
        "options": options,
        "dataset": datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        "more": {"processing_class": AutoTokenizer.from_pretrained(folder / "lm")},
    }
    exec(use, space)
    return space["trainer"], witness, rewards


def test_the_page_trains_with_trl_as_the_script_would(trained):
    trainer, witness, rewards = trained
    assert len(rewards) == 2
    assert len(witness.losses) == 8
    assert len(witness.gradients) == 4
    # Every rollout's advantages are the script's, over its two micro-batches, in both iterations.
    for number, (inputs, coefficient, _) in enumerate(witness.batches):
        if number % 2 == 0:
            got = torch.cat([inputs["advantages"], witness.batches[number + 1][0]["advantages"]])
            expected = llm.group_advantage(rewards[number // 4]).flatten()
            torch.testing.assert_close(got.sort()[0], expected.sort()[0], rtol=1e-4, atol=1e-5)
        assert coefficient[inputs["advantages"] == 0].tolist() == pytest.approx(
            [BETA0] * int((inputs["advantages"] == 0).sum())
        )
    coefficients = torch.cat([coefficient for _, coefficient, _ in witness.batches])
    expected = {1 - witness.k, 1.0, 1 + witness.k}
    assert {round(value / BETA0, 4) for value in coefficients.tolist()} >= expected
    # Second iterations are off-policy, and their clip works.
    assert max(outside for *_, outside in witness.batches) > 0.1
    for theirs, mine in witness.losses:
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    for theirs, mine in witness.gradients:
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-5)
        assert max(gradient.abs().max() for gradient in theirs.values()) > 0.01
    assert trainer.beta == BETA0


def test_without_beta_there_is_no_run(trained):
    """TRL has no reference pass then: a missing key, not an unregularised run."""
    trainer, witness, _ = trained
    inputs = {key: value for key, value in witness.batches[0][0].items() if "ref_" not in key}
    with pytest.raises(KeyError, match="ref_per_token_logps"):
        witness.compute(trainer.model, inputs)
    trainer.beta = BETA0


@pytest.mark.parametrize("kind", ["dapo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("corrected", [True, False], ids=["corrected KL", "plain KL"])
def test_other_losses_of_trl_take_the_coefficient(trained, kind, corrected):
    """TRL's defaults are dapo with the corrected KL, which is multiplied by the ratio."""
    trainer, witness, _ = trained
    trainer.args.use_bias_correction_kl = corrected
    inputs, coefficient, outside = witness.batches[-1]
    assert outside > 0
    trainer.loss_type = kind
    theirs = witness.compute(trainer.model, inputs).item()
    with torch.no_grad():
        logp = log_probabilities(trainer.model, inputs)
        kl = llm.kl_k3(logp, log_probabilities(witness.reference, inputs))
    ratio, mask = (logp - inputs["old_per_token_logps"]).exp(), inputs["completion_mask"]
    total = 0.0
    for i, advantage in enumerate(inputs["advantages"].tolist()):
        for t in range(int(mask[i].sum())):
            now = ratio[i, t].item()
            policy = min(now * advantage, min(max(now, 0.8), 1.2) * advantage)
            divergence = kl[i, t].item() * (now if corrected else 1)
            total += coefficient[i].item() * divergence - policy
    # A whole rollout has twice a micro-batch; a step has two micro-batches.
    tokens = {"dapo": inputs["num_items_in_batch"].item(), "bnpo": 2 * mask.sum().item()}
    expected = total / (tokens | {"dr_grpo": 2 * 4 * 10})[kind]
    assert theirs == pytest.approx(expected, rel=1e-4, abs=1e-6)


# ----------------------------------------------------------------------------- B. the flow's loop


@pytest.mark.parametrize("k", [0.5, 1.0, math.inf])
@pytest.mark.parametrize("script", [toy, sd3], ids=["toy", "sd3"])
def test_the_flow_loss_is_the_scripts(script, k):
    rng = torch.Generator().manual_seed(0)
    v, v_ref, u = (torch.randn(12, 3, 4, 4, generator=rng) for _ in range(3))
    rewards = torch.randn(3, 4, generator=rng)
    rewards[1] = 0.3  # a constant group
    v.requires_grad_(True)
    advantage = script.group_advantage(rewards, 0.5, None if k == math.inf else k).flatten()
    mine = script.adrpo_fm_loss(v, v_ref, u, advantage, 0.5).mean()
    page = run_block("flow")["adrpo_loss"](v, v_ref, u, rewards, 0.5, k)
    assert page.item() == pytest.approx(mine.item(), rel=1e-5, abs=1e-7)
    slopes = [torch.autograd.grad(loss, v)[0] for loss in (page, mine)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-7)
    assert slopes[0][4:8].abs().max() > 1e-3  # the constant group is held to the reference


def gaussian_velocity(x, t):
    """E[x1 - x0 | x_t] for independent x0, x1 ~ N(0, I)."""
    return x * (2 * t - 1) / (t.square() + (1 - t).square())


class Shifted(nn.Module):
    """The Gaussian's velocity and a constant."""

    def __init__(self, size):
        super().__init__()
        self.constant = nn.Parameter(torch.zeros(size))

    def forward(self, x, t):
        return gaussian_velocity(x, t) + self.constant


def euler(model, prompts, steps=40):
    """With each step's velocity at its middle: the Gaussian keeps its variance to 1 %."""
    x = torch.randn(len(prompts), 3)
    for step in range(steps):
        x = x + model(x, torch.full((len(x), 1), (step + 0.5) / steps)) / steps
    return x


def test_the_loop_finds_the_known_answer():
    torch.manual_seed(0)
    reset_accelerate()
    beta0, policy = 2.0, Shifted(3)
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(policy, optimizer)
    path = []

    def loader():
        for _ in range(200):
            path.append(policy.constant.detach().clone())
            yield torch.zeros(2, 1)

    settings = {"group_size": 1024, "updates_per_rollout": 2, "beta0": beta0, "k": math.inf}
    world = {"sample": euler, "reward": lambda x1: x1[:, 0], "reference": gaussian_velocity}
    given = run_block("flow") | settings | world
    given |= {"torch": torch, "model": model, "accelerator": accelerator, "optimizer": optimizer}
    run_block("flow-loop", **given, loader=loader())
    found = torch.stack(path[100:]).mean(0)
    assert found[0].item() == pytest.approx(math.pi / 4 / beta0, abs=0.02)
    assert found[1:].abs().max() < 0.02


# ------------------------------------------------------------------------- C. relatives and traps


@pytest.mark.parametrize("seed", range(3))
def test_awm_is_adrpo_with_the_coefficient_as_its_kl_weight(seed):
    start, nothing = plug_in_equal.compare_awm(True, seed)
    later, clipped = plug_in_equal.compare_awm(False, seed)
    assert nothing == 0
    assert 0.1 < clipped < 0.9
    assert start < 1e-15
    assert later < 1e-15


def test_awm_with_its_own_kl_weight_is_not_adrpo():
    given, beta0 = plug_in_equal.draw(), plug_in_equal.BETA0
    v, v_ref, u = (given[name] for name in ("v", "v_ref", "u"))
    advantage = given["advantage"].clamp(-beta0, beta0)
    ours = plug_in_equal.gradient(toy.adrpo_fm_loss(v, v_ref, u, advantage, beta0), v)
    for weight, size in ((beta0 - advantage, 0), (beta0, 1)):
        theirs = plug_in_equal.awm_loss(v, v.detach(), v_ref, u, advantage, weight)
        difference = (plug_in_equal.gradient(theirs, v) - ours).norm() / ours.norm()
        assert difference < 1e-12 if size == 0 else difference > 0.3


@pytest.mark.parametrize("mix,a_max", [(1.0, 1.0), (1.0, 5.0), (0.1, 5.0), (0.7, 0.2)])
def test_nft_is_s_squared_times_adrpo(mix, a_max):
    slopes, values = plug_in_equal.compare_nft(mix, a_max)
    assert slopes < 1e-14
    assert values < 1e-12


def test_clipping_the_coefficient_only_has_no_minimum():
    beta0, raw = plug_in_equal.BETA0, -0.9
    assert plug_in_equal.curvature(-beta0, 2 * beta0) == pytest.approx(beta0)
    assert plug_in_equal.curvature(raw, 2 * beta0) == pytest.approx(beta0 + raw + beta0)
    assert plug_in_equal.descend(-beta0, 2 * beta0, 100) == pytest.approx(-1, abs=1e-6)
    assert plug_in_equal.descend(raw, 2 * beta0, 100) < -1e9


def test_a_dropped_constant_group_does_not_come_back():
    kept, dropped = plug_in_equal.two_prompts(True), plug_in_equal.two_prompts(False)
    assert kept[1] == pytest.approx(0, abs=1e-3)
    assert dropped[1] == 1
    assert kept[0] == pytest.approx(dropped[0], abs=1e-3)


def test_the_page_shows_what_the_script_prints(capsys):
    plug_in_equal.main()
    printed = capsys.readouterr().out
    (shown,) = re.findall(r"```\n(AWM.*?)```", PAGE, re.DOTALL)
    rounding = re.compile(r"\b\d\.\de-\d\d|\b0\.0e\+00")  # of float64: differs between machines
    assert rounding.sub("~0", shown) == rounding.sub("~0", printed)
