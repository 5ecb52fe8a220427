"""Tests of toy_mnist_flow.py: its equations, its data, and the program as a user runs it.

Real MNIST is found through the environment variable ADRPO_DATA (folder that holds mnist/);
without it those tests skip.
"""

import contextlib
import dataclasses
import errno
import gzip
import hashlib
import io
import json
import math
import os
import random
import re
import runpy
import socket
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.metrics.pairwise import cosine_distances
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import toy_mnist_flow as toy

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "toy_mnist_flow.py"
DOCS = ROOT / "docs" / "toy_mnist_flow.md"
SHAPES = [(6, 5), (6, 2, 3, 4)]
NAMES = ["orw-0", "orw-0.2", "adrpo-0.1", "raft", "dpo-100"]
EVEN = [0, 2, 4, 6, 8]
TIMING = re.compile(r"charts/(seconds_.*|peak_memory_gb)")
# Enough pre-training that samples differ from each other and the reward model prefers some of them.
TINY = (
    "--dataset digits --device cpu --precision fp32 --classifier-steps 60 --autoencoder-steps 200"
)
TINY += " --flow-steps 250 --iterations 4 --group-size 16 --num-steps 3 --updates-per-rollout 2"
TINY += " --eval-samples 32 --eval-every 2"
TINY = TINY.split()
FIVE = ["--methods", "orw", "adrpo", "raft", "dpo", "--alpha", "0", "0.2"]
HARDLY_TRAINED = ["--classifier-steps", "5", "--autoencoder-steps", "5", "--flow-steps", "5"]


def tiny(*given, base=TINY):
    """The flags of `base` but those that are given, and the given ones: no flag twice."""
    given, kept, skipped = [str(word) for word in given], [], False
    for word in map(str, base):
        if word.startswith("--"):
            skipped = word in given
        kept += [] if skipped else [word]
    return [*kept, *given]


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def per_sample(advantage, like):
    return advantage.reshape(-1, *[1] * (like.dim() - 1))


# -------------------------------------------------------------------------------- A. the ADRPO loss


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beta0", [0.01, 0.05, 1.0, 20.0])
def test_adrpo_is_a_parabola_around_v_star(shape, beta0):
    v, v_ref, u = (numbers(*shape, seed=seed) for seed in range(3))
    advantage = torch.tensor([-2.0, -0.3, 0.0, 0.02, 0.5, 3.0], dtype=torch.float64)
    v_star = v_ref + per_sample(advantage, v) / beta0 * (u - v_ref)
    elements = v[0].numel()
    v.requires_grad_(True)
    (gradient,) = torch.autograd.grad(toy.adrpo_fm_loss(v, v_ref, u, advantage, beta0).sum(), v)
    torch.testing.assert_close(
        gradient, 2 * beta0 * (v.detach() - v_star) / elements, rtol=1e-9, atol=1e-12
    )

    def difference(at):
        distance = (at - v_star).square().flatten(1).sum(1) / elements
        return toy.adrpo_fm_loss(at, v_ref, u, advantage, beta0) - beta0 * distance

    constant = difference(v.detach())
    scale = constant.abs().max().item() + 1
    for seed in (7, 8):
        assert (difference(numbers(*shape, seed=seed) * 5) - constant).abs().max() < 1e-9 * scale


@pytest.mark.parametrize("shape", SHAPES)
def test_adrpo_without_advantage_is_the_fixed_divergence(shape):
    v, v_ref, u = (numbers(*shape, seed=seed) for seed in range(3))
    loss = toy.adrpo_fm_loss(v, v_ref, u, torch.zeros(6, dtype=torch.float64), 0.3)
    expected = 0.3 * np.mean((v - v_ref).numpy().reshape(6, -1) ** 2, axis=1)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-12)


def test_adrpo_with_huge_beta0_keeps_the_reference():
    v_ref, u = numbers(6, 5, seed=1), numbers(6, 5, seed=2)
    advantage = torch.tensor([-1.0, -0.5, 0.0, 0.2, 0.5, 1.0], dtype=torch.float64)
    distances = {}
    for beta0 in (1.0, 1e6):
        v = numbers(6, 5).requires_grad_(True)
        for _ in range(80):  # gradient descent that halves the distance to the minimum
            (gradient,) = torch.autograd.grad(
                toy.adrpo_fm_loss(v, v_ref, u, advantage, beta0).sum(), v
            )
            v = (v - gradient * 5 / (4 * beta0)).detach().requires_grad_(True)
        distances[beta0] = (v - v_ref).abs().max().item()
    assert distances[1e6] < 1e-5 < 0.1 < distances[1.0]


@pytest.mark.parametrize("advantage", [-50.0, -1.0, 2.0])
def test_adrpo_is_bounded_below_with_curvature_beta0(advantage):
    beta0, step = 0.05, 10.0
    v, v_ref, u, direction = (numbers(3, 7, seed=seed) for seed in range(4))
    a = torch.full((3,), advantage, dtype=torch.float64)
    at = [toy.adrpo_fm_loss(v + k * step * direction, v_ref, u, a, beta0) for k in (-1, 0, 1)]
    curvature = (at[0] - 2 * at[1] + at[2]) / (2 * step**2 * direction.square().mean(1))
    torch.testing.assert_close(curvature, torch.full_like(curvature, beta0), rtol=1e-6, atol=0)
    assert (toy.adrpo_fm_loss(v + 1e6 * direction, v_ref, u, a, beta0) > 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_losses_belong_to_their_samples(shape):
    """Permuted samples have permuted losses; a loss is a mean over elements, however many."""
    v, v_ref, u = (numbers(*shape, seed=seed) for seed in range(3))
    a, order = numbers(6, seed=5), torch.tensor([3, 1, 5, 0, 4, 2])
    for loss in (toy.adrpo_fm_loss, toy.orw_fm_loss):
        torch.testing.assert_close(
            loss(v[order], v_ref[order], u[order], a[order], 0.1), loss(v, v_ref, u, a, 0.1)[order]
        )
        zero = torch.zeros_like(v)
        # v - u is 2 and v - v_ref is 1 everywhere.
        value = loss(zero, zero - 1, zero - 2, torch.full((6,), 0.5, dtype=torch.float64), 0.7)
        expected = 0.5 * 4 + (0.7 - 0.5) * 1 if loss is toy.adrpo_fm_loss else 0.5 * 4 + 0.7 * 1
        torch.testing.assert_close(value, torch.full_like(value, expected))


# ------------------------------------------------------------------------ A. advantages and weights


@pytest.mark.parametrize("normalize", ["none", "group", "global", "base"])
@pytest.mark.parametrize("clip_k", [None, 1.5])
@pytest.mark.parametrize("prompts", [1, 4])
def test_group_advantage_against_loops(normalize, clip_k, prompts):
    rewards, beta0, base_std = numbers(prompts, 5, seed=3) + 2, 0.4, 0.8
    values, everything = rewards.numpy(), rewards.numpy().ravel()
    expected = np.zeros_like(values)
    for p in range(prompts):
        for g in range(5):
            a = values[p, g] - sum(values[p]) / 5
            if normalize == "group":
                a /= math.sqrt(sum((r - sum(values[p]) / 5) ** 2 for r in values[p]) / 4)
            if normalize == "global":
                squares = sum((r - everything.mean()) ** 2 for r in everything)
                a /= math.sqrt(squares / (len(everything) - 1))
            if normalize == "base":
                a /= 0.8
            expected[p, g] = a if clip_k is None else min(max(a, -clip_k * beta0), clip_k * beta0)
    result = toy.group_advantage(rewards, beta0, clip_k, normalize, base_std)
    # The tolerance leaves room for a small constant that keeps the division from 0 / 0.
    np.testing.assert_allclose(result.numpy(), expected, atol=2e-3)
    if clip_k is None:
        assert result.sum(1).abs().max() < 1e-12
    else:
        assert result.abs().max() == pytest.approx(clip_k * beta0)


@pytest.mark.parametrize("normalize", ["none", "group", "base"])
@pytest.mark.parametrize("value", [0.1, 0.7, 21.6, -1e-3, 0.0])
@pytest.mark.parametrize("size", [2, 3, 7, 24, 100, 256])
def test_equal_rewards_have_no_advantage_at_all(normalize, value, size):
    """Exactly 0 in float32, where the mean of equal numbers is often not that number."""
    advantage = toy.group_advantage(torch.full((2, size), value), 0.1, None, normalize, 0.5)
    assert advantage.abs().max() == 0


def test_no_gradient_reaches_the_rewards():
    rewards = numbers(2, 4).requires_grad_(True)
    for normalize in ("none", "group", "global"):
        assert not toy.group_advantage(rewards, 0.1, 2.0, normalize).requires_grad
    assert not toy.orw_weights(rewards, 3.0).requires_grad


@pytest.mark.parametrize("tau", [0.0, 1.0, 10.0])
def test_orw_weights_against_numpy(tau):
    rewards = torch.rand(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    raw = np.exp(tau * rewards.numpy())
    weights = toy.orw_weights(rewards, tau).numpy()
    np.testing.assert_allclose(weights, raw / raw.mean(axis=1, keepdims=True), rtol=1e-10)
    if tau == 0:
        np.testing.assert_array_equal(weights, np.ones((3, 6)))


def test_orw_weights_survive_a_large_tau():
    weights = toy.orw_weights(torch.tensor([[0.1, 0.9, 0.5, 0.2]]), 1e5)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 4.0, 0.0, 0.0]]))


@pytest.mark.parametrize("shape", SHAPES)
def test_orw_loss_against_numpy(shape):
    v, v_ref, u = (numbers(*shape, seed=seed) for seed in range(3))
    weight = numbers(6, seed=4).exp()
    to_data = np.array([np.mean((v[i] - u[i]).numpy() ** 2) for i in range(6)])
    to_reference = np.array([np.mean((v[i] - v_ref[i]).numpy() ** 2) for i in range(6)])
    for alpha in (0.0, 0.3):
        expected = weight.numpy() * to_data + alpha * to_reference
        np.testing.assert_allclose(
            toy.orw_fm_loss(v, v_ref, u, weight, alpha).numpy(), expected, rtol=1e-12
        )


def dpo_margins(v_w, v_w_ref, u_w, v_l, v_l_ref, u_l, beta_dpo):
    """Slow reference: what -log sigmoid is taken of, per pair."""

    def error(a, b):
        a, b = a.flatten().tolist(), b.flatten().tolist()
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)

    margins = []
    for i in range(len(v_w)):
        winner, loser = (
            error(v_w[i], u_w[i]) - error(v_w_ref[i], u_w[i]),
            error(v_l[i], u_l[i]) - error(v_l_ref[i], u_l[i]),
        )
        margins.append(-beta_dpo / 2 * (winner - loser))
    return margins


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beta_dpo", [0.5, 4.0])
def test_dpo_loss_against_a_slow_loop(shape, beta_dpo):
    six = [numbers(*shape, seed=seed) for seed in range(6)]
    margins = dpo_margins(*six, beta_dpo)
    loss = toy.dpo_fm_loss(*six, beta_dpo)
    np.testing.assert_allclose(
        loss.numpy(), [-math.log(1 / (1 + math.exp(-m))) for m in margins], rtol=1e-9
    )
    swapped = toy.dpo_fm_loss(*six[3:], *six[:3], beta_dpo)
    np.testing.assert_allclose(
        swapped.numpy(), [-math.log(1 / (1 + math.exp(m))) for m in margins], rtol=1e-9
    )


def test_dpo_loss_of_the_reference_is_log_two():
    v_w, u_w, v_l, u_l = (numbers(6, 5, seed=seed) for seed in range(4))
    loss = toy.dpo_fm_loss(v_w, v_w, u_w, v_l, v_l, u_l, 100.0)
    np.testing.assert_allclose(loss.numpy(), np.full(6, math.log(2)), rtol=1e-12)
    closer = toy.dpo_fm_loss(v_w + 0.1 * (u_w - v_w), v_w, u_w, v_l, v_l, u_l, 100.0)
    assert (closer < math.log(2)).all()  # nearer to the winner's velocity is better


def test_dpo_loss_is_finite_for_wide_margins():
    zero = torch.zeros(1, 4)
    loss = toy.dpo_fm_loss(zero + 10, zero, zero, zero, zero, zero, 1000.0)  # margin -50,000
    torch.testing.assert_close(loss, torch.tensor([50_000.0]))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_best_and_worst_against_a_loop(size):
    rewards = torch.rand(24, generator=torch.Generator().manual_seed(2))
    best, worst = toy.best_and_worst(rewards, size)
    starts = range(0, 24, size)
    assert best.tolist() == [max(range(s, s + size), key=lambda i: rewards[i]) for s in starts]
    assert worst.tolist() == [min(range(s, s + size), key=lambda i: rewards[i]) for s in starts]


# ----------------------------------------------------------------------------------- A. the figures


def slow_diversity(features):
    """Mean of 1 - cosine over all ordered pairs i != j of one prompt."""
    unit = [row / np.sqrt((row * row).sum()) for row in np.asarray(features, dtype=np.float64)]
    pairs = [1 - float(a @ b) for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j]
    return sum(pairs) / len(pairs)


def test_diversity_against_loops_and_sklearn():
    features = numbers(3, 7, 5) + torch.tensor([0.0, 1.0, 5.0]).reshape(3, 1, 1)
    result = toy.pairwise_diversity(features).tolist()
    assert result == pytest.approx([slow_diversity(prompt) for prompt in features], abs=1e-5)
    distances = [cosine_distances(prompt.numpy()) for prompt in features]
    assert result == pytest.approx([d.sum() / (7 * 6) for d in distances], abs=1e-5)


def test_diversity_of_identical_and_of_opposite_features():
    assert toy.pairwise_diversity(torch.ones(2, 9, 4) * 3).abs().max() < 1e-5
    assert toy.pairwise_diversity(
        torch.tensor([[[1.0, 0.0], [-2.0, 0.0]]])
    ).item() == pytest.approx(2)


def test_frechet_distance_against_sqrtm():
    a = numbers(200, 6, seed=1) @ numbers(6, 6, seed=2)
    b = numbers(150, 6, seed=3) @ numbers(6, 6, seed=4) + 1
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    shift = ((a.mean(0) - b.mean(0)) ** 2).sum().item()
    expected = shift + np.trace(cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real)
    assert toy.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert toy.frechet_distance(a, b) == pytest.approx(toy.frechet_distance(b, a), rel=1e-6)


def test_frechet_distance_closed_forms():
    a = numbers(20_000, 3, seed=1) * torch.tensor([1.0, 2.0, 0.5])
    b = numbers(20_000, 3, seed=2) * torch.tensor([1.0, 1.0, 1.5]) + torch.tensor([0.0, 1.0, -2.0])
    assert toy.frechet_distance(a, b) == pytest.approx(
        1 + 4 + (2 - 1) ** 2 + (0.5 - 1.5) ** 2, abs=0.1
    )
    few = numbers(10, 64, seed=3)  # fewer samples than dimensions
    assert abs(toy.frechet_distance(few, few)) < 1e-5
    assert toy.frechet_distance(few, few + 0.5) == pytest.approx(64 * 0.25, abs=1e-5)


# ----------------------------------------------------------------------------- A. flow and sampling


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_sample_against_closed_forms(steps):
    noise, constant = numbers(5, 24), numbers(5, 24, seed=1)
    torch.testing.assert_close(toy.sample(lambda x, t: constant, noise, steps), noise + constant)
    shrunk = toy.sample(lambda x, t: -x, noise, steps)
    torch.testing.assert_close(shrunk, noise * (1 - 1 / steps) ** steps)
    clock = toy.sample(lambda x, t: t[:, None].expand_as(x), torch.zeros(2, 24), steps)
    torch.testing.assert_close(
        clock, torch.full((2, 24), (steps - 1) / (2 * steps))
    )  # sum of k/n * 1/n, k < n


def test_flow_matching_point():
    x1, noise = numbers(3, 24), numbers(3, 24, seed=1)
    t = torch.tensor([0.0, 1.0, 0.25], dtype=torch.float64)
    x_t, u = toy.flow_matching_point(x1, noise, t)
    torch.testing.assert_close(x_t, torch.stack([noise[0], x1[1], 0.75 * noise[2] + 0.25 * x1[2]]))
    torch.testing.assert_close(u, x1 - noise)


def test_update_average():
    torch.manual_seed(0)
    average, model = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    before = {
        name: [p.detach().clone() for p in m.parameters()]
        for name, m in (("average", average), ("model", model))
    }
    toy.update_average(average, model, 0.9)
    for new, old, other in zip(
        average.parameters(), before["average"], before["model"], strict=True
    ):
        torch.testing.assert_close(new.detach(), 0.9 * old + 0.1 * other)
    assert all(
        torch.equal(p, old) for p, old in zip(model.parameters(), before["model"], strict=True)
    )
    toy.update_average(average, model, 0.0)
    for new, other in zip(average.parameters(), before["model"], strict=True):
        torch.testing.assert_close(new.detach(), other)


def test_seed_everything():
    def draws(*seed):
        generator = toy.seed_everything(*seed)
        return [
            random.random(),
            np.random.rand(),
            torch.rand(()).item(),
            torch.rand((), generator=generator).item(),
        ]

    first = draws(1, 2, 3)
    assert first[2] != first[3]  # a plug-in that draws does not draw the rollout's noise
    draws(9)
    assert draws(1, 2, 3) == first
    for other in ((1, 2, 4), (1, 3, 2), (2, 2, 3)):
        assert all(a != b for a, b in zip(draws(*other), first, strict=True))


def test_evaluate_against_numpy():
    """w2 is exactly 0 for the reference, c^2 for a shift by c; the rest follows from the images."""
    generator = toy.seed_everything(5)
    models = toy.build_models(False, torch.device("cpu")).requires_grad_(False)
    for parameter in models["flow"].parameters():  # its output layer starts at zero
        parameter.normal_(0, 0.05)
    noise, base = (torch.randn(20, 24, generator=generator) for _ in range(2))
    real = torch.randn(30, 64, generator=generator)
    eval_set = toy.EvalSet(noise, base, real, EVEN)
    arguments = (models, lambda images: images.mean((1, 2, 3)), eval_set, 3)
    figures, images = toy.evaluate(models["flow"], *arguments)
    assert figures["w2"] == 0
    shifted, _ = toy.evaluate(lambda x, t: models["flow"](x, t) + 0.5, *arguments)
    assert shifted["w2"] == pytest.approx(0.25, rel=1e-5)

    assert images.shape == (20, 1, 28, 28)
    assert figures["reward"] == pytest.approx(images.numpy().mean(), abs=1e-6)
    for name, prefix in (("classifier", ""), ("judge", "judge_")):
        logits, features = (part.numpy() for part in models[name](images))
        counts = np.bincount(logits.argmax(1), minlength=10) / 20
        entropy = -sum(c * math.log(c) for c in counts if c > 0)
        assert figures[f"{prefix}classes"] == pytest.approx(math.exp(entropy), rel=1e-5)
        assert figures[f"{prefix}diversity"] == pytest.approx(slow_diversity(features), abs=1e-4)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert figures["judge_reward"] == pytest.approx(probabilities[:, EVEN].sum(1).mean(), rel=1e-5)
    assert [figures[f"judge_share_{digit}"] for digit in range(10)] == pytest.approx(
        counts.tolist(), abs=1e-6
    )
    cov = [np.cov(f.astype(np.float64), rowvar=False) for f in (features, real.numpy())]
    cross = np.sqrt(
        np.clip(np.linalg.eigvals(cov[0] @ cov[1]).real, 0, None)
    ).sum()  # trace of the matrix root
    shift = ((features.mean(0) - real.numpy().mean(0)) ** 2).sum()
    assert figures["frechet"] == pytest.approx(
        shift + np.trace(cov[0] + cov[1]) - 2 * cross, rel=1e-3
    )


# --------------------------------------------------------------------------------------- B. reading


def idx_bytes(array):
    array = np.asarray(array, dtype=np.uint8)
    return (
        bytes([0, 0, 8, array.ndim])
        + b"".join(n.to_bytes(4, "big") for n in array.shape)
        + array.tobytes()
    )


def pair(count, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 28, 28)), rng.integers(0, 10, count)


def write_pair(folder, part, images, labels, ends=("", "")):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array, end in zip(
        ("images-idx3", "labels-idx1"), (images, labels), ends, strict=True
    ):
        content = array if isinstance(array, bytes) else idx_bytes(array)
        (folder / f"{part}-{name}-ubyte{end}").write_bytes(
            gzip.compress(content) if end else content
        )


@pytest.mark.parametrize("end", ["", ".gz"])
def test_read_idx(tmp_path, end):
    array = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    path = tmp_path / f"file{end}"
    path.write_bytes(gzip.compress(idx_bytes(array)) if end else idx_bytes(array))
    result = toy.read_idx(path)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, array)


@pytest.mark.parametrize("ends", [("", ""), (".gz", ".gz"), ("", ".gz"), (".gz", "")])
def test_read_mnist_joins_train_and_test(tmp_path, ends):
    (images_a, labels_a), (images_b, labels_b) = pair(5, 1), pair(3, 2)
    write_pair(tmp_path, "train", images_a, labels_a, ends)
    write_pair(tmp_path, "t10k", images_b, labels_b, ends[::-1])
    images, labels = toy.read_mnist(tmp_path)
    np.testing.assert_array_equal(images, np.concatenate([images_a, images_b]))
    np.testing.assert_array_equal(labels, np.concatenate([labels_a, labels_b]))


def test_the_test_pair_alone_is_enough(tmp_path):
    images, labels = pair(4, 3)
    write_pair(tmp_path, "t10k", images, labels, (".gz", ".gz"))
    tensor, classes, name = toy.load_data("mnist", str(tmp_path))
    assert (name, tensor.dtype, classes.dtype) == ("mnist", torch.float32, torch.int64)
    np.testing.assert_allclose(tensor[:, 0].numpy(), images / 255, atol=1e-6)
    assert classes.tolist() == labels.tolist()


def test_no_pair_is_none(tmp_path):
    assert toy.read_mnist(tmp_path) is None
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(
        idx_bytes(pair(2, 1)[0])
    )  # images without labels
    assert toy.read_mnist(tmp_path) is None


def test_digits():
    images, labels, name = toy.load_data("digits", "a folder that is not there")
    bunch = load_digits()
    assert (name, images.shape, images.dtype) == ("digits", (1797, 1, 28, 28), torch.float32)
    assert (images.min(), images.max()) == (0, 1)
    assert torch.bincount(labels).tolist() == np.bincount(bunch.target).tolist()
    # Shrunk back to 8x8 they are the originals, up to contrast and blur.
    small = (
        torch.nn.functional.interpolate(images[:, :, 4:24, 4:24], size=8, mode="area")
        .flatten(1)
        .numpy()
    )
    alike = [np.corrcoef(a, b.ravel())[0, 1] for a, b in zip(small, bunch.images, strict=True)]
    assert min(alike) > 0.8


@pytest.fixture(scope="session")
def mnist_dir():
    if "ADRPO_DATA" not in os.environ:
        pytest.skip("ADRPO_DATA is not set: no real MNIST")
    return Path(os.environ["ADRPO_DATA"]) / "mnist"


def test_real_mnist(mnist_dir):
    images, labels, name = toy.load_data("auto", str(mnist_dir))
    assert (name, images.shape) == ("mnist", (10_000, 1, 28, 28))
    # Published label counts of the test set, and its mean brightness.
    assert torch.bincount(labels).tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]
    assert images.mean().item() == pytest.approx(0.1325, abs=5e-4)


IMAGES, LABELS = pair(4, 0)
TOO_LONG = idx_bytes(IMAGES)[:7] + b"\5" + idx_bytes(IMAGES)[8:]  # promises 5 images, holds 4
BAD_PAIRS = {
    "wrong magic": (b"\x89PNG" + idx_bytes(IMAGES)[4:], LABELS),
    "wrong type": (b"\0\0\x0d\3" + idx_bytes(IMAGES)[4:], LABELS),
    "empty file": (b"", LABELS),
    "header alone": (idx_bytes(IMAGES)[:6], LABELS),
    "promises more": (TOO_LONG, LABELS),
    "holds more": (idx_bytes(IMAGES) + b"more", LABELS),
    "different lengths": (IMAGES, LABELS[:3]),
    "not 28x28": (IMAGES[:, :27], LABELS),
    "images are labels": (LABELS, LABELS),
    "label above 9": (IMAGES, [1, 2, 10, 3]),
    "no digits": (IMAGES[:0], LABELS[:0]),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
@pytest.mark.parametrize("dataset", ["mnist", "auto"])
def test_bad_idx_files_are_refused(tmp_path, name, dataset):
    write_pair(tmp_path, "t10k", *BAD_PAIRS[name])
    with pytest.raises(toy.InputError, match="--data-dir"):
        toy.load_data(dataset, str(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip", "empty"])
def test_damaged_gzip_is_refused(tmp_path, damage):
    write_pair(tmp_path, "train", IMAGES, LABELS, (".gz", ".gz"))
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    else:
        content = b"<html>" if damage == "not gzip" else b""
    path.write_bytes(content)
    with pytest.raises(toy.InputError, match="--data-dir"):
        toy.load_data("auto", str(tmp_path))


# ----------------------------------------------------------------------------------- B. downloading


@pytest.fixture
def server(monkeypatch):
    """A web server here. `routes` maps a path to bytes or a function that answers; else 404."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    stop, routes, asked = threading.Event(), {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            answer = routes.get(self.path, routes.get(self.path.rpartition("/")[0] + "/*"))
            if answer is None:
                self.send_error(404)
            elif isinstance(answer, bytes):
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)
            else:
                with contextlib.suppress(OSError):  # the client has gone
                    answer(self, stop)
                self.close_connection = True

        def log_message(self, *arguments):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(
        target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    address = f"http://127.0.0.1:{httpd.server_address[1]}"
    monkeypatch.setattr(toy, "MNIST_URL", f"{address}/")
    timeout = socket.getdefaulttimeout()
    files = {}
    for part, seed in (("train", 1), ("t10k", 2)):
        for kind, array in zip(("images-idx3", "labels-idx1"), pair(3, seed), strict=True):
            files[f"{part}-{kind}-ubyte.gz"] = gzip.compress(idx_bytes(array))
    checksums = {
        name.removesuffix("-ubyte.gz"): hashlib.sha256(content).hexdigest()[:16]
        for name, content in files.items()
    }
    monkeypatch.setattr(toy, "MNIST_SHA256", checksums)
    yield SimpleNamespace(routes=routes, files=files, asked=asked)
    stop.set()
    httpd.shutdown()
    httpd.server_close()
    thread.join()
    socket.setdefaulttimeout(timeout)


def left_in(folder):
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


def babble(handler, stop):
    """Not HTTP at all."""
    handler.wfile.write(b"nonsense\r\n\r\n")


def cut_chunk(handler, stop):
    """A chunked answer that ends inside a chunk."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1000\r\nonly this")


def cut_body(handler, stop):
    """Half of what Content-Length promises."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this")


def test_download(tmp_path, server):
    server.routes |= {f"/{name}": content for name, content in server.files.items()}
    folder = tmp_path / "new" / "mnist"
    images, _, name = toy.load_data("auto", str(folder))
    assert (name, len(images)) == ("mnist", 6)
    assert left_in(folder) == sorted(server.files)
    assert all((folder / name).read_bytes() == content for name, content in server.files.items())
    server.asked.clear()
    toy.load_data("mnist", str(folder))
    assert server.asked == []  # read, not fetched again


@pytest.mark.parametrize("answer", [b"wrong", babble, cut_chunk, cut_body])
def test_a_bad_answer_leaves_nothing_behind(tmp_path, server, answer):
    server.routes |= {f"/{name}": answer for name in server.files}
    with pytest.raises(toy.InputError, match="--dataset"):
        toy.load_data("mnist", str(tmp_path / "mnist"))
    assert left_in(tmp_path / "mnist") == []


def test_auto_falls_back_to_digits(tmp_path, server, capsys):
    images, _, name = toy.load_data("auto", str(tmp_path / "mnist"))
    assert (name, len(images)) == ("digits", 1797)
    assert server.asked  # it did try
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1
    assert "MNIST" in printed[0]


def test_explicit_mnist_does_not_fall_back(tmp_path, server):
    with pytest.raises(toy.InputError, match="--dataset"):
        toy.load_data("mnist", str(tmp_path / "mnist"))


# --------------------------------------------------------------------- C. the program, as it is run


def start_script(*arguments):
    """The script in a process of its own, the environment's one thread included."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def run_script(*arguments):
    process = start_script(*arguments)
    out, err = process.communicate(timeout=300)
    return SimpleNamespace(code=process.returncode, out=out, err=err)


def run_here(*arguments):
    """The same in this process, as __main__: that saves the import of torch."""
    out, err, code, argv = io.StringIO(), io.StringIO(), 0, sys.argv
    sys.argv = [str(SCRIPT), *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(SCRIPT), run_name="__main__")
            except SystemExit as exit_:  # what the interpreter does with it
                code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
                if isinstance(exit_.code, str):
                    print(exit_.code, file=sys.stderr)
            except Exception:
                code = 1
                traceback.print_exc()
    finally:
        sys.argv = argv
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(rows, method=None):
    rows = [row for row in rows if method in (None, row["method"])]
    return [{tag: value for tag, value in row.items() if not TIMING.fullmatch(tag)} for row in rows]


def assert_tensorboard_equals_metrics(folder, methods):
    """Every figure of metrics.jsonl is in TensorBoard's files once, and nothing else is."""
    for method in methods:
        events = EventAccumulator(str(folder / method), size_guidance={"scalars": 0})
        events.Reload()
        found = [
            (tag, e.step, np.float32(e.value))
            for tag in events.Tags()["scalars"]
            for e in events.Scalars(tag)
        ]
        rows = [row for row in metrics_of(folder) if row["method"] == method]
        expected = [
            (t, r["step"], np.float32(r[t])) for r in rows for t in r if t not in ("method", "step")
        ]
        assert sorted(found) == sorted(expected), (
            f"TensorBoard and metrics.jsonl differ for {method}"
        )


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """One run of every method; other tests reuse its networks by --pretrained."""
    where = ("--output-dir", tmp_path_factory.mktemp("runs"), "--run-name", "trained")
    result = run_script(*tiny(*FIVE, *where))
    assert result.code == 0, result.err
    result.folder = next(tmp_path_factory.getbasetemp().glob("runs*/trained"))
    result.summary = json.loads((result.folder / "summary.json").read_text())
    return result


@pytest.fixture
def short(trained, tmp_path):
    """short("--methods", "dpo") runs with the trained networks, in this process; see .folder."""

    def run(*arguments):
        own = ("--output-dir", tmp_path / "runs", "--run-name", "r", "--pretrained", trained.folder)
        words = tiny(*arguments, base=tiny(*own))
        result = run_here(*words)
        result.folder = tmp_path / "runs" / words[words.index("--run-name") + 1]
        return result

    return run


def test_files_of_a_run(trained):
    folder, summary = trained.folder, trained.summary
    record = json.loads((folder / "args.json").read_text())
    assert set(record["args"]) == {field.name for field in dataclasses.fields(toy.Args)}
    assert (record["args"]["group_size"], record["args"]["alpha"]) == (16, [0.0, 0.2])
    assert record["command"][1:3] == ["--dataset", "digits"]
    assert record["versions"]["torch"] == torch.__version__
    assert record["git_commit"] is None or re.fullmatch("[0-9a-f]{40}", record["git_commit"])

    assert list(summary["methods"]) == NAMES
    figures = {"reward", "judge_reward", "diversity", "relative_diversity", "classes", "w2"}
    assert all(figures <= set(result) for result in (summary["base"], *summary["methods"].values()))
    for name in ("base", *NAMES):
        with Image.open(folder / "samples" / f"{name}.png") as image:
            assert image.size == (16 * 56, 2 * 56)  # 32 samples, 16 to a row, each enlarged
        images = np.load(folder / "samples" / f"{name}.npy")
        assert (images.shape, images.dtype) == ((32, 28, 28), np.uint8)
    for name in ("collapse.png", "tradeoff.png"):
        with Image.open(folder / name) as image:
            image.load()
            assert min(image.size) > 200
    base = toy.VelocityNetwork(False).state_dict()
    for name in NAMES:
        weights = load_file(folder / "final" / f"{name}.safetensors")
        assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in base.items()}
    assert not list(folder.rglob("*.part"))
    assert all(name in trained.out for name in NAMES)


def test_json_is_strict(trained):
    """No NaN or Infinity, which other languages' readers refuse."""

    def refuse(constant):
        raise AssertionError(constant)

    for path in (trained.folder / "summary.json", trained.folder / "args.json"):
        assert json.loads(path.read_text(), parse_constant=refuse)
    for line in (trained.folder / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)


def test_tensorboard_and_metrics_have_the_same_figures(trained):
    assert_tensorboard_equals_metrics(trained.folder, NAMES)
    events = EventAccumulator(str(trained.folder / "adrpo-0.1")).Reload()
    assert len(events.Tags()["images"]) == 1


def test_steps_and_evaluations(trained):
    for name in NAMES:
        rows = [row for row in metrics_of(trained.folder) if row["method"] == name]
        assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
        # At the start, early, every second iteration, at the end.
        assert [row["step"] for row in rows if "eval/reward" in row] == [0, 1, 2, 4]
        for tag in trained.summary["base"].keys() - {"relative_diversity"}:
            assert rows[0][f"eval/{tag}"] == trained.summary["base"][tag]


@pytest.mark.skipif(not DOCS.exists(), reason="docs/toy_mnist_flow.md does not exist")
def test_tags_are_the_documented_ones(trained):
    written = {tag for row in metrics_of(trained.folder) for tag in row} - {"method", "step"}
    documented = set()
    for tag in re.findall(
        r"`((?:reward|eval|losses|adrpo|charts)/\w+)`", DOCS.read_text(encoding="utf-8")
    ):
        documented |= (
            {tag[:-1] + str(digit) for digit in range(10)}
            if tag.endswith("judge_share_K")
            else {tag}
        )
    assert written | {"charts/peak_memory_gb"} == documented  # that one on a GPU only


def test_the_documented_loading_lines_work(trained):
    text = DOCS.read_text(encoding="utf-8").split("Load a result:\n\n")[1]
    code = textwrap.dedent(text.split("\n\n")[0]).replace("runs/NAME", str(trained.folder))
    names = {}
    exec(code, names)
    assert names["images"].shape == (64, 1, 28, 28)
    weights = load_file(trained.folder / "final" / "adrpo-0.1.safetensors")
    assert torch.equal(names["models"]["flow"].output.weight, weights["output.weight"])


def test_adrpo_coefficients_agree_with_each_other(trained):
    rows = [row for row in metrics_of(trained.folder) if "adrpo/coefficient_mean" in row]
    assert {row["method"] for row in rows} == {"adrpo-0.1"}
    assert len(rows) == 4
    for row in rows:
        figure = {
            tag.removeprefix("adrpo/"): value
            for tag, value in row.items()
            if tag.startswith("adrpo/")
        }
        (beta0,) = toy.Args.beta0
        assert figure["coefficient_mean"] == pytest.approx(beta0, abs=1e-6)  # A has mean zero
        assert figure["coefficient_min"] < figure["coefficient_mean"] < figure["coefficient_max"]
        farthest = max(beta0 - figure["coefficient_min"], figure["coefficient_max"] - beta0) / beta0
        assert figure["extrapolation_max"] == pytest.approx(farthest, rel=1e-4)
        assert figure["extrapolation_max"] >= figure["extrapolation_mean"] > 0
        assert (figure["coefficient_fraction_negative"] > 0) == (figure["coefficient_min"] < 0)
        # |A| has at most A's standard deviation as its mean.
        base_std = trained.summary["run"]["base_reward_std"]
        assert figure["extrapolation_mean"] <= row["reward/std"] / base_std / beta0


def test_clipped_coefficients_stay_in_range(short):
    result = short("--methods", "adrpo", "--adv-clip-k", "0.5", "--adv-norm", "group")
    assert result.code == 0, result.err
    rows = [row for row in metrics_of(result.folder) if row["step"] > 0]
    (beta0,) = toy.Args.beta0
    for row in rows:
        assert row["adrpo/coefficient_min"] == pytest.approx(0.5 * beta0, rel=1e-4)
        assert row["adrpo/coefficient_max"] == pytest.approx(1.5 * beta0, rel=1e-4)
        assert row["adrpo/extrapolation_max"] == pytest.approx(0.5, rel=1e-4)


def test_base_units_do_not_depend_on_the_reward_scale(short, plugin):
    """With --adv-norm base a reward and a hundred times that reward train the same policy."""
    weights = []
    for function in ("as_tensor", "hundredfold"):
        flags = ("--methods", "adrpo", "--reward", f"{plugin}:{function}", "--run-name", function)
        result = short(*flags)
        assert result.code == 0, result.err
        weights.append(load_file(result.folder / "final" / "adrpo-0.1.safetensors"))
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=0, atol=2e-4)


@pytest.mark.parametrize("flags", ["", "--adv-norm none", "--adv-clip-k 1.5"])
def test_the_gain_that_beta0_asks_for_is_printed(short, flags):
    """Cov(R, A) / beta0: one base spread over beta0, Var(R) / beta0 for eq. 6, less with a clip."""
    result = short("--methods", "adrpo", "--beta0", "0.5", "2", *flags.split())
    assert result.code == 0, result.err
    run = json.loads((result.folder / "summary.json").read_text())["run"]
    mean, std = run["base_reward_mean"], run["base_reward_std"]
    found = re.findall(r"base reward (.*) \+- (.*); beta0 (.*) asks for about (.*)", result.out)
    assert [float(beta0) for *_, beta0, _ in found] == [0.5, 2]
    for *base, beta0, gain in found:
        assert [float(figure) for figure in base] == pytest.approx([mean, std], abs=1e-3)
        full = (std**2 if "none" in flags else std) / float(beta0)
        if "clip" in flags:  # |A| is at most k beta0, and the mean of |R - mean| at most its spread
            assert 0 < float(gain) <= min(full, 1.5 * std)
        else:
            assert float(gain) == pytest.approx(full, rel=0.02, abs=6e-4)  # 127 of 128, 3 digits
    names = sorted(path.name for path in (result.folder / "final").iterdir())
    assert names == ["adrpo-0.5.safetensors", "adrpo-2.safetensors"]


def test_a_constant_reward_does_not_move_the_weights(short, plugin):
    """.1 is no sum of powers of two: its mean in float32 can differ from it."""
    flags = ("--methods", "adrpo", "dpo", "--reward", f"{plugin}:constant")
    refused = short(*flags)
    assert refused.code != 0
    assert "--adv-norm none" in refused.err
    result = short(*flags, "--adv-norm", "none", "--group-size", "24", "--run-name", "none")
    assert result.code == 0, result.err
    base = load_file(result.folder / "pretrained.safetensors")
    for name in ("adrpo-0.1", "dpo-100"):
        for key, value in load_file(result.folder / "final" / f"{name}.safetensors").items():
            assert torch.equal(value, base[f"flow.{key}"]), (name, key)


def test_summary_is_the_last_evaluation(trained):
    rows = metrics_of(trained.folder)
    assert trained.summary["base"]["w2"] == 0
    for method, result in trained.summary["methods"].items():
        last = [row for row in rows if row["method"] == method and "eval/reward" in row][-1]
        assert last["step"] == 4
        evaluated = {
            tag.removeprefix("eval/"): value
            for tag, value in last.items()
            if tag.startswith("eval/")
        }
        assert {tag: result[tag] for tag in evaluated} == evaluated
        assert result["w2"] > 0
        assert sum(result[f"judge_share_{digit}"] for digit in range(10)) == pytest.approx(1)


def test_summary_can_be_recomputed_from_the_saved_samples(trained):
    weights = load_file(trained.folder / "pretrained.safetensors")
    networks = {}
    for name, kind in (("classifier", "reward"), ("judge", "judge")):
        networks[name] = toy.Classifier(kind).requires_grad_(False)
        prefix = f"{name}."
        own = {
            key.removeprefix(prefix): value
            for key, value in weights.items()
            if key.startswith(prefix)
        }
        networks[name].load_state_dict(own)
    results = {"base": trained.summary["base"], **trained.summary["methods"]}
    assert results["base"]["diversity"] > 0.05  # else the comparison below says nothing
    for name, result in results.items():
        images = (
            torch.tensor(np.load(trained.folder / "samples" / f"{name}.npy"))[:, None].float() / 255
        )
        for network, reward, diversity in (
            ("classifier", "reward", "diversity"),
            ("judge", "judge_reward", "judge_diversity"),
        ):
            logits, features = (part.double().numpy() for part in networks[network](images))
            probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            assert result[reward] == pytest.approx(probabilities[:, EVEN].sum(1).mean(), abs=1e-2)
            assert result[diversity] == pytest.approx(slow_diversity(features), abs=1e-2)


def test_same_seed_same_run(tmp_path):
    """Pre-training included, in any order of methods; another seed gives other networks."""
    steps = [*tiny(*HARDLY_TRAINED), "--output-dir", tmp_path, "--run-name"]
    for name, seed, methods in (
        ("a", 1, ("adrpo", "dpo")),
        ("b", 1, ("dpo", "adrpo")),
        ("c", 2, ("raft",)),
    ):
        result = run_here(*steps, name, "--seed", seed, "--methods", *methods)
        assert result.code == 0, result.err
    a, b, c = (load_file(tmp_path / name / "pretrained.safetensors") for name in "abc")
    assert all(torch.equal(value, b[key]) for key, value in a.items())
    assert not any(
        torch.equal(a[key], c[key]) for key in ("classifier.head.weight", "flow.output.weight")
    )
    for name in ("adrpo-0.1", "dpo-100"):
        assert untimed(metrics_of(tmp_path / "a"), name) == untimed(
            metrics_of(tmp_path / "b"), name
        )


def test_pretrained_networks_give_the_same_run(trained, short):
    result = short(*FIVE)
    assert result.code == 0, result.err
    assert untimed(metrics_of(result.folder)) == untimed(metrics_of(trained.folder))


@pytest.mark.parametrize("method, name", [("dpo", "dpo-100"), ("orw", "orw-0.2")])
def test_one_fine_tuning_alone_runs_as_among_five(trained, short, method, name):
    result = short("--methods", method, "--alpha", "0.2")
    assert result.code == 0, result.err
    assert untimed(metrics_of(result.folder)) == untimed(metrics_of(trained.folder), name)
    assert list(json.loads((result.folder / "summary.json").read_text())["methods"]) == [name]


def test_every_strength_of_the_fixed_weight_has_the_same_numbers(short):
    """Common random numbers: the first rollout of two strengths is the same, and adrpo's is not."""
    result = short("--methods", "orw", "adrpo", "--alpha", "0.2", "0.7")
    assert result.code == 0, result.err
    first = {
        row["method"]: row["reward/mean"] for row in metrics_of(result.folder) if row["step"] == 1
    }
    assert first["orw-0.2"] == first["orw-0.7"] != first["adrpo-0.1"]


def test_another_seed_differs(trained, short):
    result = short(
        "--methods",
        "adrpo",
        "--seed",
        "2",
        "--pretrained",
        trained.folder / "pretrained.safetensors",
    )
    assert result.code == 0, result.err
    theirs = [row for row in metrics_of(trained.folder) if row["method"] == "adrpo-0.1"]
    for row, other in zip(metrics_of(result.folder), theirs, strict=True):
        assert all(
            row[tag] != other[tag]
            for tag in ("eval/reward", "reward/mean", "losses/total")
            if tag in row
        )


def test_dpo_online_differs_from_offline(trained, short):
    result = short("--methods", "dpo", "--dpo-online")
    assert result.code == 0, result.err
    assert (
        untimed(metrics_of(result.folder))[1:] != untimed(metrics_of(trained.folder), "dpo-100")[1:]
    )


def test_real_mnist_as_a_user(mnist_dir, tmp_path):
    where = ["--dataset", "mnist", "--data-dir", mnist_dir, "--output-dir", tmp_path]
    result = run_here(*tiny(*HARDLY_TRAINED, *where, "--methods", "adrpo"))
    assert result.code == 0, result.err
    assert "10000 mnist images" in result.out


def test_help_names_every_flag():
    result = run_here("--help")
    assert result.code == 0
    for field in dataclasses.fields(toy.Args):
        assert f"--{field.name.replace('_', '-')}" in result.out


def test_pretrained_of_an_interrupted_run(tmp_path):
    """A run that was killed while fine-tuning leaves base models that --pretrained takes."""
    steps = tiny(*HARDLY_TRAINED, "--output-dir", tmp_path)
    process = start_script(*tiny("--run-name", "killed", "--iterations", "100000", base=steps))
    metrics, deadline = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    assert metrics.exists(), process.communicate()[1]
    process.communicate()
    result = run_here(*steps, "--run-name", "next", "--pretrained", tmp_path / "killed")
    assert result.code == 0, result.err
    a, b = (load_file(tmp_path / name / "pretrained.safetensors") for name in ("killed", "next"))
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_quick_is_a_preset_that_flags_override(tmp_path):
    short = ["--quick", *HARDLY_TRAINED, "--iterations", "1", "--num-steps", "2"]
    result = run_here(*short, "--methods", "adrpo", "--output-dir", tmp_path, "--run-name", "r")
    assert result.code == 0, result.err
    args = json.loads((tmp_path / "r" / "args.json").read_text())["args"]
    assert (args["dataset"], args["flow_steps"], args["iterations"]) == ("digits", 5, 1)
    defaults = json.loads(json.dumps(dataclasses.asdict(toy.Args())))
    differ = {name for name, value in args.items() if value != defaults[name]}
    assert not differ & {"beta0", "alpha", "tau", "learning_rate", "adv_norm"}


# ------------------------------------------------------------------------------- C. plug-in rewards


PLUGIN = """
from __future__ import annotations
import dataclasses
import numpy as np

def check(images, prompts, metadata):
    assert images.shape[1:] == (1, 28, 28) and images.min() >= 0 and images.max() <= 1
    assert len(prompts) == len(metadata) == len(images)
    assert {type(prompt) for prompt in prompts} == {str} and {type(m) for m in metadata} == {dict}
    return images.mean((1, 2, 3))

def as_tensor(*given):
    return check(*given)

def as_list(*given):
    return check(*given).tolist()

def as_array(*given):
    return check(*given).double().cpu().numpy()

def gives_nan(images, prompts, metadata):
    return [0.0] * (len(images) - 1) + [float("nan")]

def too_many(images, prompts, metadata):
    return [0.0] * (len(images) + 1)

def column(images, prompts, metadata):
    return images.mean((2, 3))

def fails(images, prompts, metadata):
    raise KeyError("of its own")

def gives_none(images, prompts, metadata):
    return None

CONSTANT = 3
calls = 0

def constant(images, prompts, metadata):
    return [0.1] * len(images)

def hundredfold(*given):
    return 100 * check(*given)

def in_place(images, prompts, metadata):
    images.mul_(0.5)
    return 2 * images.mean((1, 2, 3))

def leaves(images, prompts, metadata):
    raise SystemExit(0)

def explodes(images, prompts, metadata):
    global calls
    calls += 1
    rewards = images.mean((1, 2, 3))
    if calls > 7:  # the check, twice the base model, two rollouts and evaluations went well
        rewards[::2] = 1e38
    return rewards

@dataclasses.dataclass
class Entry:  # dataclasses look their module up
    value: "float"

def uses_a_dataclass(images, prompts, metadata):
    return [Entry(float(value)).value for value in check(images, prompts, metadata)]

def fails_later(images, prompts, metadata):
    global calls
    calls += 1
    return images.mean((1, 2, 3)) if calls < 5 else None
"""


@pytest.fixture(scope="session")
def plugin(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugin") / "my_reward.py"
    path.write_text(PLUGIN)
    return path


@pytest.mark.parametrize(
    "name", ["as_tensor", "as_list", "as_array", "uses_a_dataclass", "in_place"]
)
def test_plugin_reward(short, plugin, name):
    result = short("--methods", "adrpo", "--reward", f"{plugin}:{name}")
    assert result.code == 0, result.err
    brightness = np.load(result.folder / "samples" / "adrpo-0.1.npy").mean() / 255
    summary = json.loads((result.folder / "summary.json").read_text())["methods"]["adrpo-0.1"]
    assert summary["reward"] == pytest.approx(brightness, abs=2e-3)
    assert summary["judge_reward"] == pytest.approx(
        1, abs=1e-5
    )  # a plug-in asks for all ten digits


def test_digit_reward(short):
    result = short("--methods", "raft", "--reward", "digit:7")
    assert result.code == 0, result.err
    model = toy.Classifier("reward").requires_grad_(False)
    weights = load_file(result.folder / "pretrained.safetensors")
    model.load_state_dict(
        {
            k.removeprefix("classifier."): v
            for k, v in weights.items()
            if k.startswith("classifier.")
        }
    )
    images = torch.tensor(np.load(result.folder / "samples" / "raft.npy"))[:, None].float() / 255
    expected = scipy.special.softmax(model(images)[0].double().numpy(), axis=1)[:, 7].mean()
    summary = json.loads((result.folder / "summary.json").read_text())["methods"]["raft"]
    assert summary["reward"] == pytest.approx(expected, abs=1e-2)


def errors_in(result):
    return [line for line in re.split(r"[\r\n]", result.err) if line.startswith("error:")]


def test_a_loss_that_is_not_finite_stops_the_run(short, plugin):
    result = short("--methods", "adrpo", "--reward", f"{plugin}:explodes", "--eval-every", "4")
    assert result.code != 0
    assert "Traceback" not in result.out + result.err
    (error,) = errors_in(result)
    assert "--learning-rate" in error
    assert metrics_of(result.folder)[-1]["step"] == 2
    assert not list((result.folder / "final").iterdir())


@pytest.mark.parametrize("updates", ["1", "2"])
def test_the_state_after_the_last_step_is_checked(short, updates):
    """With one update the loss before it is finite, and no rollout follows: its samples are not."""
    flags = ("--learning-rate", "3e38", "--iterations", "1", "--updates-per-rollout", updates)
    result = short("--methods", "adrpo", *flags)
    assert result.code != 0
    (error,) = errors_in(result)
    assert "--learning-rate" in error
    assert not list((result.folder / "final").iterdir())
    assert not (result.folder / "summary.json").exists()


def test_a_strength_that_diverges_leaves_the_finished_ones(short):
    result = short("--methods", "adrpo", "orw", "--alpha", "1e38", "--max-grad-norm", "1e38")
    assert result.code != 0
    assert len(errors_in(result)) == 1
    summary = json.loads((result.folder / "summary.json").read_text())
    assert list(summary["methods"]) == ["adrpo-0.1"]


def test_a_plugin_that_leaves_does_not_end_well(short, plugin):
    result = short("--methods", "orw", "--reward", f"{plugin}:leaves")
    assert result.code != 0
    assert "--reward" in result.err


def test_a_plugins_own_error_is_shown(short, plugin):
    """Its traceback is the user's code; values that are wrong are one line."""
    result = short("--methods", "orw", "--reward", f"{plugin}:fails")
    assert result.code != 0
    assert "Traceback" in result.err
    assert "of its own" in result.err
    result = short("--methods", "orw", "--alpha", "0", "--reward", f"{plugin}:column")
    (error,) = errors_in(result)
    assert "--reward" in error


def test_a_full_disk_is_one_line(short, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", full)
    result = short("--methods", "orw")
    assert result.code != 0
    (error,) = errors_in(result)
    assert "--output-dir" in error
    assert "Traceback" not in result.err


# -------------------------------------------------------------------------------------- C. refusals


@pytest.fixture(scope="session")
def bad(trained, plugin, tmp_path_factory):
    """Paths for the refusals below: every input that cannot work."""
    top = tmp_path_factory.mktemp("bad")
    (top / "file").write_text("not a folder")
    (top / "empty").mkdir()
    write_pair(top / "cut", "t10k", IMAGES, LABELS, (".gz", ".gz"))
    images = top / "cut" / "t10k-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:-100])

    (top / "syntax.py").write_text("def reward(:")
    weights = load_file(trained.folder / "pretrained.safetensors")
    info = {"dataset": "digits", "classifier_accuracy": 1.0, "judge_accuracy": 1.0}
    key = sorted(weights)[0]
    header = {"info": json.dumps(info)}
    save_file(weights | {key: torch.zeros(2, 3)}, top / "shape.safetensors", metadata=header)
    fewer = {name: value for name, value in weights.items() if name != key}
    save_file(fewer, top / "fewer.safetensors", metadata=header)
    save_file(
        weights,
        top / "other.safetensors",
        metadata={"info": json.dumps(info | {"dataset": "mnist"})},
    )
    save_file(weights, top / "bare.safetensors")

    (top / "taken" / "r").mkdir(parents=True)
    (top / "taken" / "r" / "metrics.jsonl").write_text("a file of the user's\n")
    return {"top": top, "run": trained.folder, "runs": trained.folder.parent, "plugin": plugin}


# name: (flag that the message must name, command line that follows TINY)
REFUSALS = {
    "repeated method": ("--methods", "--methods adrpo dpo adrpo"),
    "repeated strength": ("--alpha", "--alpha 0.2 0.2000000001"),
    "infinite strength": ("--alpha", "--alpha inf"),
    "flag given twice": ("given twice", "--methods adrpo --methods dpo"),
    "flag given twice in two spellings": ("given twice", "--learning-rate=3 --learning_rate 4"),
    "unknown reward": ("--reward", "--reward odd"),
    "digit above nine": ("--reward", "--reward digit:10"),
    "reward file missing": ("--reward", "--reward {top}/none.py:reward"),
    "reward without function": ("--reward", "--reward {plugin}"),
    "plug-in gives nan": ("--reward", "--reward {plugin}:gives_nan"),
    "plug-in gives too many": ("--reward", "--reward {plugin}:too_many"),
    "plug-in gives a column": ("--reward", "--reward {plugin}:column"),
    "plug-in gives none": ("--reward", "--reward {plugin}:gives_none"),
    "function missing": ("--reward", "--reward {plugin}:none"),
    "mnist cut": ("--data-dir", "--dataset mnist --data-dir {top}/cut"),
    "data folder below a file": ("--data-dir", "--dataset mnist --data-dir {top}/file/mnist"),
    "pretrained empty": ("--pretrained", "--pretrained="),
    "pretrained missing": ("--pretrained", "--pretrained {top}/none"),
    "pretrained folder empty": ("--pretrained", "--pretrained {top}/empty"),
    "pretrained of no such format": ("--pretrained", "--pretrained {top}/file"),
    "pretrained of another shape": ("--pretrained", "--pretrained {top}/shape.safetensors"),
    "pretrained incomplete": ("--pretrained", "--pretrained {top}/fewer.safetensors"),
    "pretrained without header": ("--pretrained", "--pretrained {top}/bare.safetensors"),
    "pretrained on other data": ("--pretrained", "--pretrained {top}/other.safetensors"),
    "output below a file": ("--output-dir", "--output-dir {top}/file/runs"),
    "output is a file": ("--output-dir", "--output-dir {top}/file"),
    "run name taken": ("--run-name", "--output-dir {runs} --run-name trained"),
    "folder of something else": ("--run-name", "--output-dir {top}/taken --run-name r"),
    "group of one": ("--group-size", "--methods adrpo --group-size 1"),
    "group not a multiple": ("--group-size", "--methods raft --group-size 12 --subgroup-size 8"),
    "odd subgroup": ("--subgroup-size", "--group-size 9 --subgroup-size 3"),
    "subgroup of zero": ("--subgroup-size", "--subgroup-size 0"),
    "beta0 of zero": ("--beta0", "--beta0 0"),
    "beta0 not a number": ("--beta0", "--beta0 nan"),
    "alpha below zero": ("--alpha", "--alpha 0 -0.1"),
    "ema of one": ("--ema-decay", "--ema-decay 1"),
    "clip of zero": ("--adv-clip-k", "--adv-clip-k 0"),
    "one evaluation sample": ("--eval-samples", "--eval-samples 1"),
    "no iterations": ("--iterations", "--iterations 0"),
}


def assert_refused(result, flag):
    assert result.code != 0
    assert "Traceback" not in result.out + result.err
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error:")
    assert flag in lines[0]


def refusal_arguments(name, bad, folder):
    arguments = [part.format(**bad) for part in REFUSALS[name][1].split()]
    where = [] if "--output-dir" in arguments else ["--output-dir", folder]
    return tiny(*where, *arguments)


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name, bad, tmp_path):
    result = run_here(*refusal_arguments(name, bad, tmp_path / "out"))
    assert_refused(result, REFUSALS[name][0])
    assert not (tmp_path / "out").exists()  # refused before anything was written or trained


def test_refusal_in_a_process_of_its_own(bad, tmp_path):
    name = "unknown reward"
    assert_refused(run_script(*refusal_arguments(name, bad, tmp_path / "out")), REFUSALS[name][0])


def test_torchrun_is_refused(monkeypatch, tmp_path):
    """It would start unrelated runs."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(run_here(*TINY, "--output-dir", tmp_path / "out"), "torchrun")
    assert not (tmp_path / "out").exists()
