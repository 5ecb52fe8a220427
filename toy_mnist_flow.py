"""ADRPO on handwritten digits: why a fixed divergence weight fails, seen in minutes on a CPU.

Adaptive Divergence Regularized Policy Optimization (NeurIPS 2025, arXiv 2510.18053), eq. 6: every
sample has its own divergence weight, `beta0 - A`, where A is its advantage over the other samples
of its prompt. Beside it, on the same base model: fixed weights (ORW-CFM-W2, arXiv 2502.06061; 0
collapses), RAFT (arXiv 2304.06767) and Diffusion-DPO for flow matching (arXiv 2311.12908).

The world has the parts of a large text-to-image model: an autoencoder, a flow-matching network in
its latent space, a reward. The base model draws all ten digits; the reward is the probability that
the digit is even. All five even digits are equally right: diversity lost is lost for nothing.

    x_t = (1 - t) x0 + t x1,   x0 ~ N(0, I) noise,   x1 a sample of the policy,   u = x1 - x0
    A   = R(x1) - mean of R over the group
    L   = A |v(x_t) - u|^2 + (beta0 - A) |v(x_t) - v_ref(x_t)|^2      mean over a sample's elements

Ours, where we depart from the paper or it is silent: A is divided by the spread of the base model's
rewards, so that one beta0 suits every reward (--adv-norm none: eq. 6), and not clipped by default;
the policy that draws x1 is a moving average of the trained weights (--ema-decay 0: the plain one);
the fixed weight's tau is 300, where its authors show 10 (see --tau).

    python toy_mnist_flow.py                                      # the demo, minutes on a CPU
    python toy_mnist_flow.py --quick                              # a minute: does it run here?
    python toy_mnist_flow.py --pretrained runs/NAME --methods adrpo --beta0 0.05 0.2

Needs 2 GB of memory; takes a GPU where there is one. Equations, results: docs/toy_mnist_flow.md.
"""

import copy
import dataclasses
import gzip
import importlib.util
import json
import math
import os
import random
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from matplotlib.image import imsave
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "toy_mnist_flow"
LATENT_SIZE = 24
# A random stream for each fine-tuning; every alpha above 0 has the same numbers.
STREAMS = {"adrpo": 0, "orw-0": 1, "orw": 2, "raft": 3, "dpo": 4, "evaluation": 5}
COLOURS = {"adrpo": "tab:red", "orw": "tab:blue", "raft": "tab:green", "dpo": "tab:orange"}
ADAM = {"betas": (0.9, 0.99), "fused": True}
DIVERGED = "lower --learning-rate or --beta-dpo, or raise --beta0 or --alpha"
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_SHA256 = {"train-images-idx3": "440fcabf73cc546f", "train-labels-idx1": "3552534a0a558bbe"}
MNIST_SHA256 |= {"t10k-images-idx3": "8d422c7b0a1c1c79", "t10k-labels-idx1": "f7ae60f92e00ec6d"}


class InputError(ValueError):
    """What the user gave cannot work: one line that names the flag and the remedy."""


@dataclasses.dataclass
class Args:
    # ------------------------------------------------------------------------------- experiment
    output_dir: str = "runs"
    """folder that receives one sub-folder per run"""
    run_name: str | None = None
    """name of that sub-folder; default: script, methods, seed and time"""
    seed: int = 1
    """seed of everything: the same seed gives the same metrics on one machine (CPU: bit for bit)"""
    device: str = "auto"
    """auto takes the accelerator that torch finds, else the CPU; or cpu, cuda, cuda:1, mps"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: flow and autoencoder compute in bfloat16; auto: where the hardware has units for it"""
    pretrained: str | None = None
    """earlier run, finished or not, whose base model, reward model, judge and autoencoder to use"""
    quick: bool = False
    """does it run? a minute on one core: scikit-learn's digits, too short to compare methods; flags
    given beside it win"""

    # ------------------------------------------------------------------------ data, pre-training
    dataset: Literal["auto", "mnist", "digits"] = "auto"
    """auto: MNIST if it can be read or downloaded, else digits (scikit-learn's 1,797, enlarged)"""
    data_dir: str = "data/mnist"
    """MNIST's IDX files, gzipped or not; the test pair alone is enough; downloads go here"""
    classifier_steps: int = 500
    """steps of 128 images for the reward model and again for the judge; too few: a noisy reward"""
    autoencoder_steps: int = 1500
    """steps of 128 images; too few: blurred digits whatever the flow does"""
    flow_steps: int = 2500
    """steps of 256 latents for the base model; too few: malformed digits before any fine-tuning"""

    # ---------------------------------------------------------------- fine-tuning and evaluation
    methods: tuple[Literal["adrpo", "orw", "raft", "dpo"], ...] = ("orw", "adrpo", "dpo")
    """each starts from the same base model, once for each of its strengths"""
    reward: str = "even"
    """even, digit:K, or FILE.py:function, function(images [B,1,28,28], prompts, metadata) -> [B]"""
    iterations: int = 90
    """rollouts per fine-tuning (ours); adrpo has its reward after 20, orw falls until the end"""
    group_size: int = 256
    """samples per rollout, one group (the toy has one prompt). Small: noisy advantages"""
    num_steps: int = 20
    """Euler steps of a sample; with 10 their discretisation error is learnt and diversity falls"""
    eval_every: int = 30
    """iterations between evaluations on fixed noise; before it, also after 1, 2, 4, 8, ..."""
    eval_samples: int = 1024
    """samples per evaluation (the Fréchet distance depends on it: compare only equal ones)"""
    updates_per_rollout: int = 8
    """optimiser steps on one rollout, each on all its samples with fresh noise and times (ours)"""
    learning_rate: float = 3e-4
    """AdamW's peak: five iterations of warm-up, then a cosine to 5 % of it (ours)"""
    max_grad_norm: float = 1.0
    """gradient norm clip, as ORW-CFM-W2's code"""
    ema_decay: float = 0.9
    """of the moving average that draws the rollouts (ours). Near 1 they come late: overshooting"""

    # ------------------------------------------------------------------------ adrpo and baselines
    beta0: tuple[float, ...] = (0.1,)
    """adrpo: baseline divergence weight. The mean reward rises by about 1/beta0 base spreads, or
    until it saturates: .1 for a reward that does (even), 1 for one that does not (ours)"""
    adv_clip_k: float | None = None
    """adrpo: clip A to +-k beta0, in both terms; at the start k below 1/beta0 clips most samples"""
    adv_norm: Literal["base", "none", "group", "global"] = "base"
    """adrpo: divide A by the spread of the base model's rewards, by nothing (eq. 6), by the group's
    (global: here the same)"""
    alpha: tuple[float, ...] = (0.0, 0.2, 1.0)
    """orw: fixed divergence weight; 0 collapses, above it is ORW-CFM-W2. The authors' alpha is ours
    times the mean of exp(tau R), which the weights are divided by here and which grows with R"""
    tau: float = 300.0
    """orw: weight exp(tau R) (the authors show 10; with 30 it collapses to a blur, not a digit)"""
    subgroup_size: int = 8
    """raft keeps the best of each so many samples, dpo the best and the worst"""
    beta_dpo: tuple[float, ...] = (100.0,)
    """dpo: inverse temperature (flow_grpo's SD3 preset). Smaller: further from the base model"""
    dpo_online: bool = False
    """dpo: draw the pairs from the policy at every iteration instead of once from the base model"""


# -------------------------------------------------------------------------------------- the method
def group_advantage(rewards, beta0, clip_k=None, normalize="none", base_std=None) -> Tensor:
    """Advantage of each sample over its prompt's others (eq. 6: A = R - V, V the prompt's mean).

    rewards [P,G] -> A [P,G], detached. `normalize` "group", "global" or "base" divides by the
    standard deviation of the group, of all rewards, or of the base model's rewards, `base_std`;
    `clip_k` then clips to +-clip_k * beta0, once: the loss has the same A in both of its terms."""
    # Relative to the first reward, so that a group of equal rewards gives exactly 0.
    relative = rewards - rewards[:, :1]  # [P,G]
    spreads = {"none": 1.0, "base": base_std, "global": rewards.std() + 1e-4}
    spreads["group"] = relative.std(dim=1, keepdim=True) + 1e-4  # [P,1]
    advantage = (relative - relative.mean(dim=1, keepdim=True)) / spreads[normalize]
    if clip_k is not None:
        advantage = advantage.clamp(-clip_k * beta0, clip_k * beta0)
    return advantage.detach()


def adrpo_statistics(advantage: Tensor, beta0: float) -> dict[str, float]:
    """The adrpo/* figures of a rollout; extrapolation: how far v_star lies from v_ref towards u."""
    coefficient, extrapolation = beta0 - advantage, advantage.abs() / beta0
    figures = {"coefficient_min": coefficient.min(), "coefficient_max": coefficient.max()}
    figures |= {"coefficient_mean": coefficient.mean(), "extrapolation_mean": extrapolation.mean()}
    figures["coefficient_fraction_negative"] = (coefficient < 0).float().mean()
    figures["extrapolation_max"] = extrapolation.max()
    return {f"adrpo/{tag}": value.item() for tag, value in figures.items()}


def orw_weights(rewards: Tensor, tau: float) -> Tensor:
    """ORW-CFM-W2's weights exp(tau R), here with mean 1 in each group: [P,G] -> [P,G], detached."""
    return (torch.softmax(tau * rewards, dim=1) * rewards.shape[1]).detach()


def best_and_worst(rewards: Tensor, subgroup_size: int) -> tuple[Tensor, Tensor]:
    """Indices of each subgroup's best and worst sample: rewards [G] -> two [G / subgroup_size]."""
    groups = rewards.view(-1, subgroup_size)
    offsets = torch.arange(len(groups), device=rewards.device) * subgroup_size
    return groups.argmax(1) + offsets, groups.argmin(1) + offsets


def mean_square(difference: Tensor) -> Tensor:
    """Mean over a sample's elements of the squared difference: [B,...] -> [B]."""
    return difference.square().flatten(1).mean(1)


def adrpo_fm_loss(v: Tensor, v_ref: Tensor, u: Tensor, advantage: Tensor, beta0: float) -> Tensor:
    """ADRPO for flow matching (eq. 6): A |v - u|^2 + (beta0 - A) |v - v_ref|^2.

    v, v_ref, u [B,...], advantage [B] -> loss [B]. As a function of v its curvature is
    A + (beta0 - A) = beta0 whatever A is: it equals beta0 |v - v_star|^2 up to a constant, with
    v_star = v_ref + (A / beta0)(u - v_ref), and is bounded below for bad samples too (ours)."""
    return advantage * mean_square(v - u) + (beta0 - advantage) * mean_square(v - v_ref)


def orw_fm_loss(v: Tensor, v_ref: Tensor, u: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """ORW-CFM-W2: w |v - u|^2 + alpha |v - v_ref|^2. v, v_ref, u [B,...], weight [B] -> [B]."""
    return weight * mean_square(v - u) + alpha * mean_square(v - v_ref)


def dpo_fm_loss(v_w, v_w_ref, u_w, v_l, v_l_ref, u_l, beta_dpo: float) -> Tensor:
    """Diffusion-DPO on the flow-matching errors e = mean |v - u|^2 of winners (w) and losers (l),
    which share noise and t: -log sigmoid(-beta_dpo / 2 [(e_w - e_w_ref) - (e_l - e_l_ref)]).
    Six tensors [B,...] -> loss [B]."""
    winner = mean_square(v_w - u_w) - mean_square(v_w_ref - u_w)
    loser = mean_square(v_l - u_l) - mean_square(v_l_ref - u_l)
    return -F.logsigmoid(-beta_dpo / 2 * (winner - loser))


# ----------------------------------------------------------------------------------------- rollout
def seed_everything(*numbers: int) -> torch.Generator:
    """A generator from `numbers`, and every global random state, which a plug-in may use, from
    other words of the same seed sequence."""
    own, others = map(int, np.random.SeedSequence(numbers).generate_state(2))
    random.seed(others)
    np.random.seed(others)
    torch.manual_seed(others)
    return torch.Generator().manual_seed(own)


def noise_and_time(count: int, rng: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """x0 ~ N(0, I) [count,24] and t ~ U(0, 1) [count], drawn on the CPU: the same everywhere."""
    noise, t = torch.randn(count, LATENT_SIZE, generator=rng), torch.rand(count, generator=rng)
    return noise.to(device), t.to(device)


def flow_matching_point(x1: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = (1 - t) noise + t x1 and its velocity u = x1 - noise: [B,D], [B,D], t [B] -> [B,D]."""
    return torch.lerp(noise, x1, t[:, None]), x1 - noise


@torch.no_grad()
def sample(velocity: nn.Module, noise: Tensor, num_steps: int) -> Tensor:
    """Integrate dx/dt = v(x, t) from noise [B,D] at t = 0 to latents [B,D] at t = 1, Euler steps.
    Raises InputError when the latents are not finite: the policy has diverged."""
    x = noise
    for step in range(num_steps):
        t = torch.full((len(x),), step / num_steps, device=x.device)
        x = x + velocity(x, t) / num_steps
    if not x.isfinite().all():
        raise InputError(f"the policy's samples are not finite numbers: {DIVERGED}")
    return x


# -------------------------------------------------------------------------------------- evaluation
class EvalSet(NamedTuple):
    """What every evaluation of a run shares, drawn once."""

    noise: Tensor  # [N,24]: the samples' noise
    base_latents: Tensor  # [N,24]: the base model's samples from other noise, where W2 is measured
    real_features: Tensor  # [M,64]: the judge's features of real digits of the wanted classes
    targets: list[int]  # the wanted classes


def pairwise_diversity(features: Tensor) -> Tensor:
    """Mean over the pairs i != j of one prompt of 1 - cosine(f_i, f_j): [P,G,D] -> [P] (ours; the
    paper publishes no formula). The sum over all pairs of unit vectors is |sum_i f_i|^2."""
    unit = F.normalize(features.float(), dim=-1)
    count = unit.shape[1]
    pair_sum = unit.sum(dim=1).square().sum(dim=-1) - unit.square().sum(dim=(1, 2))  # i != j
    return 1 - pair_sum / (count * (count - 1))


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to [N,D] and [M,D] (Heusel et al. 2017)."""
    a, b = features_a.cpu().double(), features_b.cpu().double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + (cov_a + cov_b).trace() - 2 * cross).item()


@torch.no_grad()
def evaluate(velocity, models, reward, eval_set: EvalSet, num_steps: int) -> tuple[dict, Tensor]:
    """Every eval/* figure of a velocity network, and its images [N,1,28,28] on the fixed noise."""
    noise = eval_set.noise
    images = models["autoencoder"].decode(sample(velocity, noise, num_steps))
    logits, features = models["classifier"](images)
    judge_logits, judge_features = models["judge"](images)
    share = F.one_hot(logits.argmax(1), 10).float().mean(0)  # [10], by the reward model's labels
    judge_share = F.one_hot(judge_logits.argmax(1), 10).float().mean(0)
    # W2, what ORW-CFM-W2's bound is made of: the velocities' distance at fixed points and times.
    t = (torch.arange(len(noise), device=noise.device) + 0.5) / len(noise)
    x_t, _ = flow_matching_point(eval_set.base_latents, noise, t)
    figures = {
        "reward": reward(images).mean().item(),
        "judge_reward": judge_logits.softmax(1)[:, eval_set.targets].sum(1).mean().item(),
        "diversity": pairwise_diversity(features[None]).item(),
        "judge_diversity": pairwise_diversity(judge_features[None]).item(),
        "classes": torch.special.entr(share).sum().exp().item(),
        "judge_classes": torch.special.entr(judge_share).sum().exp().item(),
        "frechet": frechet_distance(judge_features, eval_set.real_features),
        "w2": mean_square(velocity(x_t, t) - models["flow"](x_t, t)).mean().item(),
    }
    figures |= {f"judge_share_{digit}": judge_share[digit].item() for digit in range(10)}
    return figures, images


def sheet(images: Tensor, rows: int, columns: int) -> np.ndarray:
    """The first rows x columns images [N,1,28,28] on one sheet, enlarged twice: uint8 [H,W]."""
    images = F.interpolate(images[: rows * columns].cpu(), scale_factor=2)[:, 0]
    images = F.pad(images, (0, 0, 0, 0, 0, -len(images) % columns))
    grid = images.view(-1, columns, 56, 56).transpose(1, 2).reshape(-1, columns * 56)
    return (grid * 255).round().byte().numpy()


def save_samples(run_dir: Path, name: str, images: Tensor) -> None:
    """128 images as a picture, and all of them as uint8 [N,28,28]."""
    imsave(run_dir / f"samples/{name}.png", sheet(images, 8, 16), cmap="gray", vmin=0, vmax=255)
    pixels = (images[:, 0] * 255).round().byte().cpu().numpy()
    np.save(run_dir / f"samples/{name}.npy", pixels)


def plot_collapse(run_dir: Path, results: dict[str, dict]) -> None:
    """collapse.png: samples of base model, orw and adrpo from the same noise, side by side."""
    names = [name for name in results if name.startswith(("base", "orw", "adrpo"))]
    figure = Figure(figsize=(3.2 * len(names), 4.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        images = torch.tensor(np.load(run_dir / f"samples/{name}.npy"))[:, None] / 255
        axis.imshow(sheet(images, 8, 8), cmap="gray", vmin=0, vmax=255)
        reward, kept = results[name]["reward"], results[name]["relative_diversity"]
        axis.set(xlabel=f"reward {reward:.2f}   diversity {kept:.0%}", xticks=[], yticks=[])
        titles = {"base": "base model", "orw": "fixed weight ", "adrpo": "ADRPO, beta0 = "}
        method, _, strength = name.partition("-")
        axis.set_title(titles[method] + strength, color=COLOURS.get(method, "black"))
    figure.savefig(run_dir / "collapse.png", dpi=110)


def plot_tradeoff(run_dir: Path) -> None:
    """tradeoff.png: reward against diversity, from the base model along every evaluation."""
    curves = defaultdict(list)
    for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()):
        if "eval/reward" in row:
            curves[row["method"]].append((row["eval/reward"], row["eval/diversity"]))
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axis = figure.subplots()
    fixed = []  # where the fixed weights end
    for name, curve in curves.items():
        method, _, strength = name.partition("-")
        reward, diversity = np.array(curve).T
        kept = diversity / diversity[0]  # the first is the base model's
        axis.plot(reward, kept, color=COLOURS[method], alpha=0.35, linewidth=1, marker=".")
        end = (reward[-1], kept[-1])
        fixed += [end] * (method == "orw")
        shape = {"marker": "*", "s": 380} if method == "adrpo" else {"marker": "o", "s": 70}
        axis.scatter(*end, color=COLOURS[method], edgecolor="white", zorder=4, **shape)
        # Labels left, above or below on the right: fixed weight, adrpo and dpo come close.
        offset = {"orw": (-52, -13), "adrpo": (10, 9)}.get(method, (8, -13))
        label = f"fixed {strength}" if method == "orw" else name.replace("-", " ")
        axis.annotate(label, end, offset, textcoords="offset points", color=COLOURS[method])
    axis.plot(*np.array(sorted(fixed)).reshape(-1, 2).T, color=COLOURS["orw"], linestyle="--")
    axis.scatter(reward[0], 1, color="black", marker="D", s=70, zorder=4)
    axis.annotate("base model", (reward[0], 1), (0, 10), textcoords="offset points")
    axis.text(0.03, 0.03, "better: up and right  \u2197", transform=axis.transAxes, fontsize=13)
    axis.margins(0.12)
    axis.set(xlabel="reward", ylabel="diversity, relative to the base model's")
    figure.savefig(run_dir / "tradeoff.png", dpi=110)


# ----------------------------------------------------------------------------------------- rewards
def make_reward(spec: str, classifier: nn.Module) -> tuple[list[int], Callable[[Tensor], Tensor]]:
    """The digits that --reward wants (a plug-in: all ten) and the reward, images [B,1,28,28] ->
    float32 [B]: the probability of those digits, or the plug-in's values. Raises InputError."""
    targets = {"even": [0, 2, 4, 6, 8]} | {f"digit:{digit}": [digit] for digit in range(10)}
    if spec in targets:
        wanted = targets[spec]
        return wanted, lambda images: classifier(images)[0].softmax(1)[:, wanted].sum(1)
    path, _, name = spec.rpartition(":")
    if not (path.endswith(".py") and Path(path).is_file()):
        raise InputError(f"--reward {spec}: give even, digit:0 to digit:9 or FILE.py:function")
    module_spec = importlib.util.spec_from_file_location("reward_plugin", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.path.append(str(Path(path).parent))
    sys.modules["reward_plugin"] = module  # where dataclasses and pickle look it up
    module_spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"--reward {spec}: {path} has no function {name!r}")

    def plugin_reward(images: Tensor) -> Tensor:
        prompts = ["a handwritten digit"] * len(images)
        values = function(images.clone(), prompts, [{} for _ in images])
        try:
            rewards = torch.as_tensor(values, dtype=torch.float32, device=images.device).detach()
        except (TypeError, ValueError) as error:
            raise InputError(f"--reward {spec}: must return floats ({error})") from error
        if rewards.shape != images.shape[:1] or not rewards.isfinite().all():
            bad = f"shape {list(rewards.shape)}, {(~rewards.isfinite()).sum()} not finite"
            raise InputError(f"--reward {spec}: must return {len(images)} finite floats ({bad})")
        return rewards

    return list(range(10)), plugin_reward


# -------------------------------------------------------------------------------------------- data
def read_idx(path: Path) -> np.ndarray:
    """One IDX file of bytes, gzipped or not. Raises ValueError or the reader's own error."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path.name} is not an IDX file of bytes")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def read_mnist(data_dir: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Every MNIST pair in data_dir: uint8 images [N,28,28] and labels [N]; None without a pair.
    Raises ValueError or the reader's own error for a damaged one."""
    pairs = []
    for part in ("train", "t10k"):
        names = [f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"]
        paths = [data_dir / (name + end) for name in names for end in ("", ".gz")]
        paths = [path for path in paths if path.is_file()]
        if len({path.name.removesuffix(".gz") for path in paths}) == 2:
            images, labels = read_idx(paths[0]), read_idx(paths[-1])
            if images.shape != (*labels.shape, 28, 28) or labels.max() > 9:
                raise ValueError(f"{part}: not digits and labels: {images.shape}, {labels.shape}")
            pairs.append((images, labels))
    return tuple(np.concatenate(arrays) for arrays in zip(*pairs, strict=True)) or None


def download_mnist(data_dir: Path) -> None:
    """Fetch MNIST; a file gets its name when its SHA-256 is right. Raises the library's error."""
    socket.setdefaulttimeout(10)  # seconds of silence
    data_dir.mkdir(parents=True, exist_ok=True)
    for name, sha256 in MNIST_SHA256.items():
        file = f"{name}-ubyte.gz"
        torch.hub.download_url_to_file(MNIST_URL + file, str(data_dir / file), sha256)


def load_data(dataset: str, data_dir: str) -> tuple[Tensor, Tensor, str]:
    """Images float [N,1,28,28] in [0,1], labels int64 [N], name of the data set; or InputError."""
    folder = Path(data_dir)
    if dataset != "digits":
        try:
            if read_mnist(folder) is None:
                download_mnist(folder)
            images, labels = map(torch.tensor, read_mnist(folder))
            return images.float()[:, None] / 255, labels.long(), "mnist"
        except Exception as error:
            problem = f"--data-dir {data_dir}: MNIST cannot be read or downloaded ({error})"
            damaged = any(folder.glob("*-ubyte*"))  # not passed over
            if damaged or dataset == "mnist":
                raise InputError(f"{problem}; or use --dataset digits") from error
            print(f"{problem}: using scikit-learn's digits")
    from sklearn.datasets import load_digits  # seconds of import, for this case only

    digits = load_digits()  # 8x8: enlarged to MNIST's 20x20 inside 28x28, contrast stretched
    images = torch.tensor(digits.images).float()[:, None] / 16
    images = F.interpolate(images, size=20, mode="bicubic")
    images = F.pad(((images - 0.2) * 1.6).clamp(0, 1), (4, 4, 4, 4))
    return images, torch.tensor(digits.target).long(), "digits"


# --------------------------------------------------------------------------- models and reference
class Classifier(nn.Module):
    """Digit classifier: images [B,1,28,28] -> logits [B,10] and features [B,64]."""

    def __init__(self, kind: Literal["reward", "judge"]):
        super().__init__()
        if kind == "reward":  # strided 3x3 convolutions
            layers = [nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()]
            layers += [nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU()]
        else:  # pooled 5x5 convolutions: the judge does not share the reward model's weaknesses
            layers = [nn.Conv2d(1, 16, 5), nn.GELU(), nn.MaxPool2d(2)]
            layers += [nn.Conv2d(16, 32, 5), nn.GELU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 64), nn.GELU())
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return self.head(features), features


class Autoencoder(nn.Module):
    """Variational autoencoder, images [B,1,28,28] in [0,1] <-> latents [B,24], shifted to mean 0
    and scaled to about unit size, as SD3's pipeline does with its VAE's."""

    def __init__(self, bf16: bool, width: int = 512):
        super().__init__()
        encoder = [nn.Flatten(), nn.Linear(784, width), nn.SiLU(), nn.Linear(width, width)]
        decoder = [nn.Linear(LATENT_SIZE, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        decoder += [nn.Linear(width, 784), nn.Unflatten(1, (1, 28, 28))]
        self.encoder = nn.Sequential(*encoder, nn.SiLU(), nn.Linear(width, 2 * LATENT_SIZE))
        self.decoder = nn.Sequential(*decoder)
        self.register_buffer("shift", torch.zeros(LATENT_SIZE))
        self.register_buffer("scale", torch.ones(()))
        self.bf16 = bf16

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [B,24] of the posterior, before shift and scale."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            return self.encoder(images).float().chunk(2, dim=1)

    def decode_logits(self, raw_latents: Tensor) -> Tensor:
        """Logits of the pixels [B,1,28,28] from latents [B,24] before shift and scale."""
        with torch.autocast(raw_latents.device.type, torch.bfloat16, enabled=self.bf16):
            return self.decoder(raw_latents).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B,24] as the flow sees them -> images [B,1,28,28] in [0,1]."""
        return self.decode_logits(latents * self.scale + self.shift).sigmoid()


class VelocityNetwork(nn.Module):
    """Velocity v(x_t, t): latents [B,24] and times [B] in [0,1] -> float32 [B,24]. A residual MLP
    that takes the time as scale and shift; its output and residual layers start at zero."""

    def __init__(self, bf16: bool, width: int = 384, depth: int = 3):
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(math.log(200), 0, 32)))
        self.time = nn.Sequential(nn.Linear(64, 128), nn.SiLU())
        self.input = nn.Linear(LATENT_SIZE, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth + 1))
        self.modulations = nn.ModuleList(nn.Linear(128, 2 * width) for _ in range(depth))
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.residuals = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.output = nn.Linear(width, LATENT_SIZE)
        for parameter in (*self.residuals.parameters(), *self.output.parameters()):
            nn.init.zeros_(parameter)
        self.bf16 = bf16

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            angles = t[:, None] * self.frequencies
            time_features = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
            h = self.input(x)
            for i, residual in enumerate(self.residuals):
                scale, shift = self.modulations[i](time_features).chunk(2, dim=1)
                h = h + residual(F.silu(self.hidden[i](self.norms[i](h)) * (1 + scale) + shift))
            return self.output(F.silu(self.norms[-1](h))).float()


def build_models(bf16: bool, device: torch.device) -> nn.ModuleDict:
    """The four networks of the toy world, untrained."""
    models = {"classifier": Classifier("reward"), "judge": Classifier("judge")}
    models |= {"autoencoder": Autoencoder(bf16), "flow": VelocityNetwork(bf16)}
    return nn.ModuleDict(models).to(device)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model, in place."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def fit(name: str, model: nn.Module, loss_fn: Callable, steps: int, learning_rate: float) -> None:
    """Minimise loss_fn() in one learning-rate cycle; leaves the moving average of the weights."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4, **ADAM)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps + 1, pct_start=0.1)
    average = copy.deepcopy(model)
    bar = tqdm(range(steps), f"train {name}", mininterval=1.0)
    for step in bar:
        loss = loss_fn()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        cycle.step()
        update_average(average, model, min(0.999, (step + 1) / (step + 10)))
        if step % 50 == 0:
            bar.set_postfix(loss=loss.item())
    model.load_state_dict(average.state_dict())


def pretrain(args: Args, images: Tensor, labels: Tensor, models: nn.ModuleDict, rng) -> dict:
    """Train the four networks in place, random numbers from `rng`; returns held-out accuracies."""
    classifier, judge, autoencoder, flow = models.values()
    order = torch.randperm(len(images), generator=rng).to(images.device)
    held_out, train = order[: len(order) // 10], order[len(order) // 10 :]

    def pick(pool: Tensor, size: int) -> Tensor:
        return pool[torch.randint(len(pool), (size,), generator=rng).to(pool.device)]

    def classifier_loss(model: Classifier) -> Tensor:
        # A reward model that only ever saw clean, centred digits is easy to fool.
        index = pick(train, 128)
        shift = torch.randint(-2, 3, (2,), generator=rng).tolist()
        strength = 0.5 * torch.rand(128, 1, 1, 1, generator=rng)
        noise = (strength * torch.randn(128, 1, 28, 28, generator=rng)).to(images.device)
        batch = (torch.roll(images[index], shift, dims=(2, 3)) + noise).clamp(0, 1)
        return F.cross_entropy(model(batch)[0], labels[index])

    def autoencoder_loss() -> Tensor:
        batch = images[pick(order, 128)]
        mean, log_variance = autoencoder.encode(batch)
        noise, _ = noise_and_time(128, rng, images.device)
        logits = autoencoder.decode_logits(mean + (log_variance / 2).exp() * noise)
        pixels = F.binary_cross_entropy_with_logits(logits, batch, reduction="none").sum((1, 2, 3))
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return (pixels + 0.02 * kl).mean()

    def flow_loss() -> Tensor:
        noise, t = noise_and_time(256, rng, images.device)
        x_t, u = flow_matching_point(latents[pick(order, 256)], noise, t)
        return F.mse_loss(flow(x_t, t), u)

    def accuracy(model: Classifier) -> float:
        return (model(images[held_out])[0].argmax(1) == labels[held_out]).float().mean().item()

    fit("reward", classifier, lambda: classifier_loss(classifier), args.classifier_steps, 3e-3)
    fit("judge", judge, lambda: classifier_loss(judge), args.classifier_steps, 3e-3)
    fit("autoencoder", autoencoder, autoencoder_loss, args.autoencoder_steps, 2e-3)
    with torch.no_grad():
        raw = torch.cat([autoencoder.encode(part)[0] for part in images.split(4096)])
    autoencoder.shift, autoencoder.scale = raw.mean(0), raw.std()
    latents = (raw - autoencoder.shift) / autoencoder.scale
    fit("base flow", flow, flow_loss, args.flow_steps, 1e-3)
    return {"classifier_accuracy": accuracy(classifier), "judge_accuracy": accuracy(judge)}


def load_pretrained(spec: str, models: nn.ModuleDict, dataset: str | None = None) -> dict:
    """Load a run's networks (its folder or the file) and return their header; refuses, by
    InputError, what does not fit them or was trained on another data set than `dataset`."""
    path = Path(spec) / "pretrained.safetensors" if Path(spec).is_dir() else Path(spec)
    try:
        models.load_state_dict(load_file(path))
        with safe_open(path, "pt") as file:
            info = json.loads(file.metadata()["info"])
    except Exception as error:
        raise InputError(f"--pretrained {spec}: no networks of this script ({error})") from error
    if dataset not in (None, info["dataset"]):
        raise InputError(f"--pretrained {spec}: is of --dataset {info['dataset']}, not {dataset}")
    return info


# --------------------------------------------------------------------------------------- run files
def create_run(args: Args) -> Path:
    """Create the run's folder with args.json in it. Raises InputError where it cannot."""
    name = f"{SCRIPT}-{'+'.join(args.methods)}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(args.output_dir) / (args.run_name or name)
    git = f'git -C "{Path(__file__).resolve().parent}" rev-parse HEAD'
    failed, commit = subprocess.getstatusoutput(git)
    record = {"script": SCRIPT, "args": dataclasses.asdict(args), "command": sys.argv}
    versions = {"python": sys.version, "torch": torch.__version__}
    record |= {"git_commit": None if failed else commit, "versions": versions}
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--output-dir, --run-name: cannot create {folder} ({error})") from error
    for part in ("samples", "final"):
        (folder / part).mkdir()
    (folder / "args.json").write_text(json.dumps(record, indent=2))
    return folder


def log(run_dir: Path, writer: SummaryWriter, name: str, step: int, record: dict) -> None:
    """Append one line of strict JSON to metrics.jsonl, and the same figures to TensorBoard."""
    row = {"method": name, "step": step, **record}
    with (run_dir / "metrics.jsonl").open("a") as file:
        print(json.dumps(row, allow_nan=False), file=file)
    for tag, value in record.items():
        writer.add_scalar(tag, value, step)


# -------------------------------------------------------------------------------------------- main
def check_args(args: Args) -> None:
    """Raise InputError for flags that cannot work."""
    for flag, given in vars(args).items():
        values = given if isinstance(given, tuple) else (given,)
        numbers = [value for value in values if type(value) in (int, float)]
        lowest = 0 if flag in ("seed", "alpha", "tau", "ema_decay") else 1e-30
        names = {f"{value:g}" if type(value) is float else value for value in values}
        distinct = len(names) == len(values) > 0
        if not (distinct and all(lowest <= number < math.inf for number in numbers)):
            flag = f"--{flag.replace('_', '-')} {' '.join(map(str, values))}"
            raise InputError(f"{flag}: must be positive; of several values, each once")
    if min(args.group_size, args.eval_samples) < 2:
        raise InputError("--group-size, --eval-samples: at least 2")
    uneven = args.subgroup_size % 2 or args.group_size % args.subgroup_size
    if uneven and {"raft", "dpo"} & set(args.methods):
        raise InputError("--subgroup-size: must be even and divide --group-size, for raft and dpo")
    if args.ema_decay >= 1:
        raise InputError("--ema-decay: below 1")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("torchrun: its processes would be unrelated runs; use python")


def choose_device(name: str, precision: str) -> tuple[torch.device, bool]:
    """The torch device, and whether to compute in bfloat16."""
    found = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.device(found if name == "auto" else name)
    units = torch.cpu.get_capabilities()
    native = bool(units.get("avx512_bf16") or units.get("amx_bf16"))
    if device.type != "cpu":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return device, precision == "bf16" or (precision == "auto" and native)


def main(args: Args) -> None:
    start_time = time.perf_counter()
    check_args(args)
    device, bf16 = choose_device(args.device, args.precision)
    images, labels, dataset = load_data(args.dataset, args.data_dir)
    images, labels = images.to(device), labels.to(device)

    # The frozen parts: reward model, judge, autoencoder, and the base flow, the reference.
    generator = seed_everything(args.seed)
    torch.manual_seed(generator.initial_seed())  # of the networks' first weights
    models = build_models(bf16, device)
    reference, autoencoder = models["flow"], models["autoencoder"]
    targets, reward = make_reward(args.reward, models["classifier"])
    reward(images[:8])  # a wrong plug-in is found before any training
    info = {} if args.pretrained is None else load_pretrained(args.pretrained, models, dataset)
    run_dir = create_run(args)
    print(f"{run_dir}: {len(images)} {dataset} images, {device}, {'bf16' if bf16 else 'fp32'}")
    if not info:
        info = {"dataset": dataset} | pretrain(args, images, labels, models, generator)
    save_file(models.state_dict(), run_dir / "pretrained.safetensors", {"info": json.dumps(info)})
    models.requires_grad_(False)

    # What every evaluation shares, and the base model's own figures.
    generator = seed_everything(args.seed, STREAMS["evaluation"])
    eval_noise, _ = noise_and_time(args.eval_samples, generator, device)
    other_noise, _ = noise_and_time(args.eval_samples, generator, device)
    base_latents = sample(reference, other_noise, args.num_steps)
    wanted = torch.isin(labels, torch.tensor(targets, device=device))
    real_features = models["judge"](images[wanted][:10_000])[1]
    eval_set = EvalSet(eval_noise, base_latents, real_features, targets)
    base, final_images = evaluate(reference, models, reward, eval_set, args.num_steps)
    save_samples(run_dir, "base", final_images)

    # One rollout of the base model: the unit of adrpo's advantage, and the pairs of offline dpo.
    generator = seed_everything(args.seed, STREAMS["dpo"])
    noise, _ = noise_and_time(8 * args.group_size, generator, device)
    base_rollout = sample(reference, noise, args.num_steps)  # [8G,24]
    base_rewards = reward(autoencoder.decode(base_rollout))
    base_mean, base_std = base_rewards.mean().item(), base_rewards.std().item()
    info |= {"base_reward_mean": base_mean, "base_reward_std": base_std, "bf16": bf16}
    scale = (args.adv_clip_k, args.adv_norm, base_std)
    if "adrpo" in args.methods:
        if args.adv_norm == "base" and base_std <= 1e-6 * base_rewards.abs().max():
            raise InputError("--reward: the base model's are all equal; --adv-norm none goes on")
        for beta0 in args.beta0:  # to first order the optimum is Cov(R, A) / beta0 above the base
            advantage = group_advantage(base_rewards[None], beta0, *scale)[0]
            gain = ((base_rewards - base_mean) * advantage).mean().item() / beta0
            start = f"base reward {base_mean:.3f} +- {base_std:.3f}"
            print(f"{start}; beta0 {beta0:g} asks for about {gain:+.3f}")

    summary = {"base": base | {"relative_diversity": 1.0}, "methods": {}, "run": info}
    strengths = {"adrpo": args.beta0, "orw": args.alpha, "raft": (None,), "dpo": args.beta_dpo}
    for method, strength in [(name, value) for name in args.methods for value in strengths[name]]:
        name = method if strength is None else f"{method}-{strength:g}"
        network = copy.deepcopy(reference).requires_grad_(True)
        policy = copy.deepcopy(reference)  # average of `network`: draws the rollouts, is evaluated
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.0, **ADAM)
        writer = SummaryWriter(run_dir / name)
        log(run_dir, writer, name, 0, {f"eval/{tag}": value for tag, value in base.items()})
        offline = method == "dpo" and not args.dpo_online
        regularised = method in ("adrpo", "dpo") or (method == "orw" and strength > 0)

        bar = tqdm(range(1, args.iterations + 1), f"{name:9s}", mininterval=0.5)
        for iteration in bar:
            # ---- 1. rollout: x1 from the policy (eq. 6), and its reward
            started = time.perf_counter()
            generator = seed_everything(args.seed, STREAMS.get(name, STREAMS[method]), iteration)
            if offline:  # whole subgroups of the base model's rollout, which is eight long
                subgroups = torch.arange(len(base_rollout)).view(-1, args.subgroup_size)
                drawn = torch.randint(len(subgroups), (len(subgroups) // 8,), generator=generator)
                rows = subgroups[drawn].flatten()
                x1 = base_rollout[rows]
            else:
                noise, _ = noise_and_time(args.group_size, generator, device)
                x1 = sample(policy, noise, args.num_steps)  # [G,24]
            rolled_out = time.perf_counter()
            rewards = base_rewards[rows] if offline else reward(autoencoder.decode(x1))  # [G]
            record = {"reward/mean": rewards.mean().item(), "reward/std": rewards.std().item()}
            rewarded = time.perf_counter()  # each part ends with a value read from the device

            # ---- 2. advantages, weights or picks (repeated: every method has as many points)
            if method == "adrpo":
                advantage = group_advantage(rewards[None], strength, *scale)[0]  # [G]
                record |= adrpo_statistics(advantage, strength)
            elif method == "orw":
                weight = orw_weights(rewards[None], args.tau)[0]  # [G]
            elif method == "raft":
                best, _ = best_and_worst(rewards, args.subgroup_size)
                x1 = x1[best.repeat_interleave(args.subgroup_size)]
            else:  # all winners, then their losers
                pairs = torch.cat(best_and_worst(rewards, args.subgroup_size))
                pairs = pairs.repeat_interleave(args.subgroup_size // 2)
                x1, (won, lost) = x1[pairs], rewards[pairs].chunk(2)

            # ---- 3. updates on this rollout, each with fresh noise and times
            warmup = min(1.0, iteration / 5)
            decay = 0.05 + 0.95 * (1 + math.cos(math.pi * (iteration - 1) / args.iterations)) / 2
            optimizer.param_groups[0]["lr"] = args.learning_rate * warmup * decay
            totals = defaultdict(float)
            for _ in range(args.updates_per_rollout):
                noise, t = noise_and_time(len(x1), generator, device)
                if method == "dpo":  # a pair shares its noise and time
                    noise, t = noise.chunk(2)[0].repeat(2, 1), t.chunk(2)[0].repeat(2)
                x_t, u = flow_matching_point(x1, noise, t)
                v = network(x_t, t)
                with torch.no_grad():  # without a divergence term no reference pass
                    v_ref = reference(x_t, t) if regularised else v.detach()
                if method == "adrpo":
                    loss = adrpo_fm_loss(v, v_ref, u, advantage, strength).mean()
                elif method == "orw":
                    loss = orw_fm_loss(v, v_ref, u, weight, strength).mean()
                elif method == "raft":
                    loss = mean_square(v - u).mean()
                else:
                    winners, losers = torch.stack([v, v_ref, u]).chunk(2, dim=1)
                    pair_loss = dpo_fm_loss(*winners, *losers, strength)
                    loss = (pair_loss * (won > lost)).mean()  # equal rewards prefer nothing
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
                if not (loss + grad_norm).isfinite():
                    raise InputError(f"{name}, iteration {iteration}: loss {loss:.3g}; {DIVERGED}")
                optimizer.step()
                update_average(policy, network, args.ema_decay)
                with torch.no_grad():
                    totals["losses/total"] += loss
                    totals["losses/grad_norm"] += grad_norm
                    totals["losses/flow_matching"] += mean_square(v - u).mean()
                    if regularised:
                        totals["losses/divergence"] += mean_square(v - v_ref).mean()
            for tag, total in totals.items():
                record[tag] = total.item() / args.updates_per_rollout
            updated = time.perf_counter()

            # ---- 4. log, evaluate
            record["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            record["charts/seconds_rollout"] = rolled_out - started
            record["charts/seconds_reward"] = rewarded - rolled_out
            record["charts/seconds_update"] = updated - rewarded
            if device.type == "cuda":
                record["charts/peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
            early = iteration < args.eval_every and iteration.bit_count() == 1  # 1, 2, 4, 8, ...
            if early or iteration % args.eval_every == 0 or iteration == args.iterations:
                metrics, final_images = evaluate(policy, models, reward, eval_set, args.num_steps)
                record |= {f"eval/{tag}": value for tag, value in metrics.items()}
                picture = sheet(final_images, 8, 16)
                file = f"samples/{name}-{iteration:06d}.png"
                imsave(run_dir / file, picture, cmap="gray", vmin=0, vmax=255)
                writer.add_image("samples", picture, iteration, dataformats="HW")
            log(run_dir, writer, name, iteration, record)
            shown = metrics["reward"] if offline else record["reward/mean"]
            kept = metrics["diversity"] / base["diversity"]
            bar.set_postfix(reward=shown, diversity=kept, w2=metrics["w2"])

        save_samples(run_dir, name, final_images)
        save_file(policy.state_dict(), run_dir / f"final/{name}.safetensors")
        writer.close()
        summary["methods"][name] = metrics | {"relative_diversity": kept}
        info["seconds"] = time.perf_counter() - start_time
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False))

    # The whole run in two pictures and one table.
    results = {"base": summary["base"], **summary["methods"]}
    plot_collapse(run_dir, results)
    plot_tradeoff(run_dir)
    columns = ("reward", "judge_reward", "relative_diversity", "classes", "frechet", "w2")
    print(" " * 10 + "".join(f"{column:>20s}" for column in columns))
    for name, result in results.items():
        print(f"{name:10s}" + "".join(f"{result[column]:20.3f}" for column in columns))
    print(f"{info['seconds']:.0f} s in all. Look at {run_dir}/collapse.png and tradeoff.png")


if __name__ == "__main__":
    flags = [word.partition("=")[0].replace("_", "-") for word in sys.argv if word[:2] == "--"]
    if len(set(flags)) < len(flags):
        sys.exit("error: a flag is given twice; give all its values after one")
    short = {"classifier_steps": 150, "autoencoder_steps": 300, "flow_steps": 300, "iterations": 15}
    short |= {"group_size": 128, "eval_samples": 256}
    short["dataset"] = "auto" if "--data-dir" in flags else "digits"
    preset = Args(quick=True, **short) if "--quick" in flags else Args()
    args = tyro.cli(Args, default=preset, description=__doc__.partition("\n")[0])
    try:
        main(args)
    except InputError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")  # one line
    except (OSError, SafetensorError) as error:
        if "No space" not in str(error) and "Read-only" not in str(error):
            raise
        sys.exit(f"error: --output-dir {args.output_dir}: {error}; make room or name another")
    except SystemExit as error:
        raise RuntimeError(f"--reward {args.reward}: the plug-in ended the program") from error
    except KeyboardInterrupt:
        sys.exit("interrupted; --pretrained RUN takes its base models, once they are trained")
