"""ADRPO on handwritten digits: why a fixed divergence weight fails, seen in minutes on a CPU.

Adaptive Divergence Regularized Policy Optimization (NeurIPS 2025, arXiv 2510.18053), eq. 6: every sample has its own
divergence weight, `beta0 - A`, where A is its advantage over the other samples of the same prompt. In the same file, on
the same base model: ORW-CFM-W2 (ICLR 2025, arXiv 2502.06061), its unregularised form (the collapse), RAFT (arXiv
2304.06767) and Diffusion-DPO in its flow-matching form (arXiv 2311.12908).

The world has the parts of a large text-to-image model: an autoencoder, a flow-matching network in its latent space, a
reward. The base model draws all ten digits; the reward is the probability that the digit is even. All five even digits
are equally right, so whatever diversity a method loses, it loses for nothing.

    x_t = (1 - t) x0 + t x1,   x0 ~ N(0, I) noise,   x1 a sample of the previous policy,   u = x1 - x0
    A   = R(x1) - mean of R over the group
    L   = A |v(x_t) - u|^2 + (beta0 - A) |v(x_t) - v_ref(x_t)|^2          mean over a sample's elements

Where this departs from the paper, or the paper is silent:
- A is not clipped by default (the paper clips for stability; its range for images is not published): see --adv-clip-k.
- The previous policy, which draws x1, is a short moving average of the trained weights, for every method (ours);
  --ema-decay 0 gives the plain previous policy.
- Flow in the latent space of a small autoencoder, not in pixels: cheap enough for five methods in minutes on a CPU.

    python toy_mnist_flow.py                                                # all five methods
    python toy_mnist_flow.py --methods adrpo orw-w2 --beta0 0.1 --alpha 0.3 --seed 2
    python toy_mnist_flow.py --pretrained runs/NAME --methods adrpo --reward digit:7

About four minutes on two free CPU cores (beside other work set OMP_WAIT_POLICY=PASSIVE), 1.5 GB of memory; a GPU is
used where torch finds one. Data: MNIST from --data-dir or downloaded, else the digits bundled with scikit-learn.
Equations, metrics, results: docs/toy_mnist_flow.md.
"""

import copy
import dataclasses
import functools
import gzip
import hashlib
import http.client
import importlib.util
import json
import math
import platform
import random
import subprocess
import sys
import time
import traceback
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

matplotlib.use("Agg")  # before pyplot: there may be no screen
import matplotlib.pyplot as plt

SCRIPT = "toy_mnist_flow"
METHODS = ("adrpo", "orw", "orw-w2", "raft", "dpo")
COLOURS = {"adrpo": "tab:red", "orw": "tab:gray", "orw-w2": "tab:blue", "raft": "tab:green", "dpo": "tab:orange"}
MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "http://yann.lecun.com/exdb/mnist/",
)
MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
LATENT_SIZE = 24
KEEP_CHECKPOINTS = 2


class InputError(ValueError):
    """Something the user gave cannot work. Its message is one line that names the flag and the remedy."""


def one_line(error: Exception) -> str:
    """An exception's message on one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@dataclasses.dataclass
class Args:
    # ------------------------------------------------------------------------------------------------- experiment
    output_dir: str = "runs"
    """folder that receives one sub-folder per run"""
    run_name: str | None = None
    """name of that sub-folder; default: script, methods, seed and time"""
    seed: int = 1
    """seed of everything: the same seed gives the same metrics on one machine (CPU: bit for bit)"""
    device: str = "auto"
    """auto takes cuda, then mps, then cpu; or name one: cpu, cuda, cuda:1, mps"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 runs the flow network and the autoencoder in bfloat16 (weights, samples and losses stay float32); auto takes
    it where the hardware has units for it (GPUs since Ampere, CPUs with AVX512-BF16 or AMX: about twice as fast)"""
    resume: str | None = None
    """run folder to continue exactly from its newest checkpoint, or `latest`; the run's own flags are used"""
    pretrained: str | None = None
    """run folder (or its pretrained.safetensors) whose base model, reward model and judge to reuse"""

    # ------------------------------------------------------------------------------------------------------- data
    dataset: Literal["auto", "mnist", "digits"] = "auto"
    """auto: MNIST if it can be read or downloaded, else digits (scikit-learn's 1,797 digits enlarged to 28x28)"""
    data_dir: str = "data/mnist"
    """folder with MNIST's IDX files, gzipped or not; the test pair alone is enough; downloads go here"""

    # ------------------------------------------------------------------------------------------------ pre-training
    classifier_steps: int = 500
    """steps of 128 images for the reward model and again for the judge (ours); too few: the reward is noise"""
    autoencoder_steps: int = 1500
    """steps of 128 images (ours); too few: blurred digits whatever the flow does"""
    flow_steps: int = 2500
    """steps of 256 latents for the base model (ours); too few: malformed digits before any fine-tuning"""

    # ------------------------------------------------------------------------------------------------- fine-tuning
    methods: tuple[str, ...] = METHODS
    """any of adrpo, orw, orw-w2, raft, dpo; each starts from the same base model"""
    reward: str = "even"
    """even, digit:K, or path.py:function with function(images, prompts, metadata) -> one float per image;
    images are float [B,1,28,28] in [0,1]"""
    iterations: int = 100
    """rollouts per method (ours); adrpo has its reward after 20 and swings around it, orw collapses until the end"""
    group_size: int = 256
    """samples per rollout; the toy has one prompt, so they are one group. Small groups make the advantage noisy"""
    num_steps: int = 20
    """Euler steps from noise to latent, in rollouts and in evaluation; with 10 the samples' own discretisation error is
    learnt by the policy that trains on them, and diversity falls"""
    updates_per_iteration: int = 8
    """optimiser steps on one rollout, each on all its samples with fresh noise and times (ours)"""
    learning_rate: float = 3e-4
    """AdamW peak learning rate, five iterations of warm-up, then a cosine to 5 % of it (ours)"""
    max_grad_norm: float = 1.0
    """gradient norm clip, as ORW-CFM-W2's code"""
    ema_decay: float = 0.9
    """per update, of the moving average that draws the rollouts and is evaluated (ours); 0 = the trained weights. The
    closer to 1, the later the rollouts follow: adrpo overshoots, orw collapses more slowly"""

    # ------------------------------------------------------------------------------------------------------- adrpo
    beta0: float = 0.05
    """baseline divergence weight (ours, for rewards in [0,1]). Smaller: more reward, less diversity; far smaller:
    targets are extrapolated |A|/beta0 times and training turns noisy"""
    adv_clip_k: float | None = None
    """clip A to +-k beta0, in both terms. Off by default: with a mean-zero A the few bad samples push as hard as the
    many good ones pull; clipping cuts only the push, and reward and diversity both end lower (see the docs)"""
    adv_norm: Literal["none", "group", "global"] = "none"
    """divide A by no / the group's / the batch's standard deviation before clipping (one group here: the same)"""

    # --------------------------------------------------------------------------------------------------- baselines
    tau: float = 30.0
    """orw, orw-w2: weight exp(tau R), normalised to mean 1 (ORW-CFM-W2 shows 10; 30 collapses within this budget)"""
    alpha: float = 0.2
    """orw-w2: fixed divergence weight (ours: comes nearest to adrpo's reward in our sweep; ORW-CFM-W2 recommends 0.3);
    orw is alpha = 0"""
    subgroup_size: int = 8
    """raft, dpo: the rollout is cut into groups of this many; raft keeps the best of each, dpo the best and worst"""
    beta_dpo: float = 100.0
    """dpo: inverse temperature (flow_grpo's SD3 preset). Smaller: further from the base model"""
    dpo_online: bool = False
    """dpo: draw the pairs from the policy at every iteration instead of once from the base model"""

    # -------------------------------------------------------------------------------------- evaluation, checkpoints
    eval_every: int = 20
    """iterations between evaluations on fixed noise"""
    eval_samples: int = 1024
    """samples per evaluation (the Fréchet distance depends on their number: compare only equal ones)"""
    save_every: int = 25
    """iterations between checkpoints"""


# ---------------------------------------------------------------------------------------------------------- rewards


def parse_reward(spec: str) -> tuple[list[int], Callable | None]:
    """The digits --reward asks for (a plug-in: all ten) and the plug-in's function, if any. Raises InputError."""
    if spec == "even":
        return [0, 2, 4, 6, 8], None
    if spec in [f"digit:{digit}" for digit in range(10)]:
        return [int(spec[-1])], None
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise InputError(f"--reward {spec}: unknown; give even, digit:0 to digit:9 or path.py:function")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        return list(range(10)), getattr(module, name)
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"--reward {spec}: its function cannot be imported ({reason}); mend it") from error


def score(spec: str, plugin: Callable | None, classifier: nn.Module, targets: list[int], images: Tensor) -> Tensor:
    """Rewards of images [B,1,28,28] -> float32 [B]: the probability of the target digits, or the plug-in's values.

    Raises InputError when a plug-in fails, or returns another number of values or one that is not finite."""
    if plugin is None:
        return classifier(images)[0].softmax(1)[:, targets].sum(1)
    count = len(images)
    try:
        values = plugin(images, ["a handwritten digit"] * count, [{} for _ in range(count)])
        rewards = torch.as_tensor(values, dtype=torch.float32, device=images.device).detach()
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {one_line(error)}"
        raise InputError(f"--reward {spec}: raised {where}") from error
    if rewards.shape != (count,):
        raise InputError(f"--reward {spec}: returned shape {list(rewards.shape)} for {count} images; one float each")
    bad = (~rewards.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise InputError(f"--reward {spec}: returned {rewards[bad[0]]} for sample {bad[0]} of {count}; must be finite")
    return rewards


# ------------------------------------------------------------------------------------------------------------- data


def read_idx(path: Path) -> np.ndarray:
    """One IDX file of unsigned bytes (format: yann.lecun.com/exdb/mnist), gzipped or not. Raises InputError."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if raw[:3] != b"\0\0\x08":
            raise ValueError("it is not an IDX file of bytes")
        shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise InputError(f"--data-dir {path.parent}: {path.name} cannot be read ({error}); fetch it again") from error


def read_mnist(data_dir: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Every MNIST pair in data_dir: uint8 images [N,28,28] and labels [N]; None when there is no pair."""
    pairs = []
    for part in ("train", "t10k"):
        names = [f"{part}-{kind}-ubyte{end}" for kind in ("images-idx3", "labels-idx1") for end in ("", ".gz")]
        files = [data_dir / name for name in names if (data_dir / name).is_file()]
        if len({file.name.removesuffix(".gz") for file in files}) == 2:
            images, labels = read_idx(files[0]), read_idx(files[-1])
            pair = images.shape[1:] == (28, 28) and labels.shape == images.shape[:1] and labels.size > 0
            if not pair or labels.max() > 9:
                found = f"{list(images.shape)} and {list(labels.shape)}"
                raise InputError(f"--data-dir {data_dir}: the {part} pair is not 28x28 digits with labels ({found})")
            pairs.append((images, labels))
    return (np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])) if pairs else None


def download_mnist(data_dir: Path, timeout: float = 10.0, limit: float = 60.0) -> None:
    """Fetch the four MNIST files: at most `timeout` seconds of silence and `limit` seconds each, MD5 checked, written
    under a temporary name and renamed. Raises InputError when no mirror gives a right file."""
    data_dir.mkdir(parents=True, exist_ok=True)
    for name, md5 in MNIST_MD5.items():
        problems = []
        for mirror in MNIST_MIRRORS:
            try:
                start, data = time.monotonic(), b""
                with urllib.request.urlopen(mirror + name, timeout=timeout) as response:
                    while (chunk := response.read1(1 << 16)) and time.monotonic() - start < limit:
                        data += chunk
                if hashlib.md5(data).hexdigest() != md5:
                    raise OSError("wrong checksum")
            except (OSError, http.client.HTTPException) as error:
                problems.append(f"{mirror}: {getattr(error, 'reason', error)}")
                continue
            (data_dir / f"{name}.part").write_bytes(data)
            (data_dir / f"{name}.part").replace(data_dir / name)
            break
        else:
            remedy = f"put the IDX files into --data-dir {data_dir} or use --dataset digits"
            raise InputError(f"--dataset mnist: {name} cannot be downloaded ({'; '.join(problems)}); {remedy}")


def load_data(dataset: str, data_dir: str) -> tuple[Tensor, Tensor, str]:
    """Images float [N,1,28,28] in [0,1], labels int64 [N] and the name of the data set. Raises InputError."""
    arrays = read_mnist(Path(data_dir)) if dataset != "digits" else None
    if arrays is None and dataset != "digits":
        try:
            download_mnist(Path(data_dir))
            arrays = read_mnist(Path(data_dir))
        except (InputError, OSError) as error:
            if dataset == "mnist":
                reason = (
                    f"--data-dir {data_dir}: cannot be written ({error})" if isinstance(error, OSError) else str(error)
                )
                raise InputError(reason) from error
            print(f"MNIST is not in {data_dir} and cannot be downloaded: using the digits bundled with scikit-learn")
    if arrays is not None:
        return torch.tensor(arrays[0]).float()[:, None] / 255, torch.tensor(arrays[1]).long(), "mnist"
    bunch = load_digits()  # 8x8: enlarged to MNIST's 20x20 inside 28x28, contrast stretched
    large = F.interpolate(torch.tensor(bunch.images).float()[:, None] / 16, size=20, mode="bicubic")
    return F.pad(((large - 0.2) * 1.6).clamp(0, 1), (4, 4, 4, 4)), torch.tensor(bunch.target).long(), "digits"


# ----------------------------------------------------------------------------------------------- model and reference


class Classifier(nn.Module):
    """Digit classifier: images [B,1,28,28] -> logits [B,10] and features [B,64]. Two shapes, so that the judge does not
    share the reward model's weaknesses."""

    def __init__(self, kind: Literal["reward", "judge"]):
        super().__init__()
        if kind == "reward":  # strided 3x3 convolutions
            layers = [nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()]
            layers += [nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU()]
        else:  # pooled 5x5 convolutions
            layers = [nn.Conv2d(1, 16, 5), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.GELU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 64), nn.GELU())
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return self.head(features), features


class Autoencoder(nn.Module):
    """Variational autoencoder, images [B,1,28,28] in [0,1] <-> latents [B,24]. Latents are shifted and scaled to mean 0
    and standard deviation 1, as SD3's pipeline does with `shift_factor` and `scaling_factor`."""

    def __init__(self, bf16: bool, width: int = 512):
        super().__init__()
        encoder = [nn.Flatten(), nn.Linear(784, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        decoder = [nn.Linear(LATENT_SIZE, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 784)]
        self.encoder = nn.Sequential(*encoder, nn.Linear(width, 2 * LATENT_SIZE))
        self.decoder = nn.Sequential(*decoder, nn.Unflatten(1, (1, 28, 28)))
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
    """Velocity v(x_t, t): latents [B,24] and times [B] in [0,1] -> float32 [B,24]. A residual MLP that takes the time
    as scale and shift; its output and residual layers start at zero."""

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
        for parameter in [p for layer in (*self.residuals, self.output) for p in layer.parameters()]:
            nn.init.zeros_(parameter)
        self.bf16 = bf16

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            angles = t[:, None] * self.frequencies
            time_features = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
            h = self.input(x)
            for norm, modulation, hidden, residual in zip(
                self.norms, self.modulations, self.hidden, self.residuals, strict=False
            ):
                scale, shift = modulation(time_features).chunk(2, dim=1)
                h = h + residual(F.silu(hidden(norm(h)) * (1 + scale) + shift))
            return self.output(F.silu(self.norms[-1](h))).float()


def build_models(bf16: bool, device: torch.device) -> nn.ModuleDict:
    """The four networks of the toy world, untrained."""
    models = {"classifier": Classifier("reward"), "judge": Classifier("judge")}
    return nn.ModuleDict(models | {"autoencoder": Autoencoder(bf16), "flow": VelocityNetwork(bf16)}).to(device)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model, in place."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def fit(name: str, model: nn.Module, loss_fn: Callable[[], Tensor], steps: int, learning_rate: float) -> None:
    """Minimise loss_fn() by `steps` AdamW steps on one learning-rate cycle; leaves the weights' moving average."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1, pct_start=0.1)
    average = copy.deepcopy(model)
    bar = tqdm(range(steps), f"train {name}", mininterval=1.0, leave=False)
    for step in bar:
        loss = loss_fn()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        update_average(average, model, min(0.999, (step + 1) / (step + 10)))
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.load_state_dict(average.state_dict())


def pretrain(args: Args, images: Tensor, labels: Tensor, models: nn.ModuleDict, generator: torch.Generator) -> dict:
    """Train reward model, judge, autoencoder and base flow in place. Returns the classifiers' held-out accuracies."""
    classifier, judge, autoencoder, flow = models.values()
    order = torch.randperm(len(images), generator=generator).to(images.device)
    held_out, train = order[: len(order) // 10], order[len(order) // 10 :]

    def pick(pool: Tensor, size: int) -> Tensor:
        return pool[torch.randint(len(pool), (size,), generator=generator).to(pool.device)]

    def classifier_loss(model: Classifier) -> Tensor:
        # Noise of random strength and shifts of up to two pixels: a reward model that only ever saw clean, centred
        # digits is easy to fool, and fine-tuning finds out how.
        index = pick(train, 128)
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        strength = 0.5 * torch.rand(128, 1, 1, 1, generator=generator)
        noise = (strength * torch.randn(128, 1, 28, 28, generator=generator)).to(images.device)
        batch = (torch.roll(images[index], shift, dims=(2, 3)) + noise).clamp(0, 1)
        return F.cross_entropy(model(batch)[0], labels[index])

    def autoencoder_loss() -> Tensor:
        batch = images[pick(order, 128)]
        mean, log_variance = autoencoder.encode(batch)
        noise, _ = noise_and_time(128, generator, images.device)
        logits = autoencoder.decode_logits(mean + (log_variance / 2).exp() * noise)
        reconstruction = F.binary_cross_entropy_with_logits(logits, batch, reduction="none").sum((1, 2, 3))
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return (reconstruction + 0.02 * kl).mean()

    def flow_loss() -> Tensor:
        noise, t = noise_and_time(256, generator, images.device)
        x_t, u = flow_matching_point(latents[pick(order, 256)], noise, t)
        return F.mse_loss(flow(x_t, t), u)

    fit("reward model", classifier, lambda: classifier_loss(classifier), args.classifier_steps, 3e-3)
    fit("judge", judge, lambda: classifier_loss(judge), args.classifier_steps, 3e-3)
    fit("autoencoder", autoencoder, autoencoder_loss, args.autoencoder_steps, 2e-3)
    with torch.no_grad():
        raw = torch.cat([autoencoder.encode(part)[0] for part in images.split(4096)])
        autoencoder.shift.copy_(raw.mean(0))
        autoencoder.scale.copy_(raw.std())
        latents = (raw - autoencoder.shift) / autoencoder.scale
    fit("base flow", flow, flow_loss, args.flow_steps, 1e-3)
    right = {name: models[name](images[held_out])[0].argmax(1) == labels[held_out] for name in ("classifier", "judge")}
    return {f"{name}_accuracy": value.float().mean().item() for name, value in right.items()}


def save_pretrained(path: Path, models: nn.ModuleDict, info: dict) -> None:
    """Write the four networks to one safetensors file with `info` in its header; temporary name, then rename."""
    save_file(models.state_dict(), path.with_suffix(".part"), metadata={"info": json.dumps(info)})
    path.with_suffix(".part").replace(path)


def load_pretrained(spec: str, models: nn.ModuleDict, data_name: str) -> dict:
    """Load what save_pretrained wrote (a file, or a run folder) into `models`; returns its info. Raises InputError."""
    path = Path(spec) / "pretrained.safetensors" if Path(spec).is_dir() else Path(spec)
    try:
        with safe_open(path, "pt") as file:
            info = json.loads((file.metadata() or {}).get("info", "{}"))
            models.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = one_line(error)[-160:]
        remedy = "give a finished run's folder, or leave the flag out to train anew"
        raise InputError(f"--pretrained {spec}: no networks of this script in {path} ({reason}); {remedy}") from error
    if info.get("dataset") != data_name:
        raise InputError(f"--pretrained {spec}: trained on {info.get('dataset')}, but --dataset gives {data_name}")
    return info


# ----------------------------------------------------------------------------------------------------------- rollout


@torch.no_grad()
def sample(velocity: nn.Module, noise: Tensor, num_steps: int) -> Tensor:
    """Integrate dx/dt = v(x, t) from noise [B,D] at t = 0 to latents [B,D] at t = 1 with Euler steps."""
    x = noise
    for step in range(num_steps):
        t = torch.full((len(x),), step / num_steps, device=x.device)
        x = x + velocity(x, t) / num_steps
    return x


def seed_everything(*numbers: int) -> torch.Generator:
    """Seed every global random state (a plug-in may draw from one) and return a generator, all from `numbers`. Each
    iteration has a stream of its own, so a resumed run needs no stored random state."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def noise_and_time(count: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """x0 ~ N(0, I) [count,24] and t ~ U(0, 1) [count] (eq. 6). Drawn on the CPU: the same numbers on every device."""
    noise, t = torch.randn(count, LATENT_SIZE, generator=generator), torch.rand(count, generator=generator)
    return noise.to(device), t.to(device)


def flow_matching_point(x1: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = (1 - t) noise + t x1 and the velocity u = x1 - noise of that path: x1, noise [B,D], t [B] -> two [B,D]."""
    return torch.lerp(noise, x1, t[:, None]), x1 - noise


# -------------------------------------------------------------------------------------------------------------- loss


def group_advantage(
    rewards: Tensor, beta0: float, clip_k: float | None = None, normalize: Literal["none", "group", "global"] = "none"
) -> Tensor:
    """Advantage of each sample over the others of its prompt (eq. 6: A = R - V, V the mean reward of the prompt).

    rewards [P,G] -> A [P,G], detached. `normalize` divides by the standard deviation of the group, or of all rewards;
    `clip_k` then clips to +-clip_k * beta0. Clipped here, once: the loss uses the same A in both of its terms."""
    advantage = rewards - rewards.mean(dim=1, keepdim=True)  # [P,G]
    if normalize == "group":
        advantage = advantage / (rewards.std(dim=1, keepdim=True) + 1e-4)
    elif normalize == "global":
        advantage = advantage / (rewards.std() + 1e-4)
    if clip_k is not None:
        advantage = advantage.clamp(-clip_k * beta0, clip_k * beta0)
    return advantage.detach()


def mean_square(difference: Tensor) -> Tensor:
    """Mean over a sample's elements of the squared difference: [B,...] -> [B]."""
    return difference.square().flatten(1).mean(1)


def adrpo_fm_loss(v: Tensor, v_ref: Tensor, u: Tensor, advantage: Tensor, beta0: float) -> Tensor:
    """ADRPO for flow matching (eq. 6): A |v - u|^2 + (beta0 - A) |v - v_ref|^2.

    v, v_ref, u [B,...], advantage [B] -> loss [B]. As a function of v its curvature is A + (beta0 - A) = beta0 whatever
    A is: it equals beta0 |v - v_star|^2 up to a constant, with v_star = v_ref + (A / beta0)(u - v_ref), and so is
    bounded below for bad samples too (ours, see the docs)."""
    return advantage * mean_square(v - u) + (beta0 - advantage) * mean_square(v - v_ref)


def orw_weights(rewards: Tensor, tau: float) -> Tensor:
    """ORW-CFM-W2's weights exp(tau R), normalised to mean 1 over each group: rewards [P,G] -> [P,G], detached."""
    return (torch.softmax(tau * rewards, dim=1) * rewards.shape[1]).detach()


def orw_fm_loss(v: Tensor, v_ref: Tensor, u: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """ORW-CFM-W2: w |v - u|^2 + alpha |v - v_ref|^2. v, v_ref, u [B,...], weight [B] -> loss [B]."""
    return weight * mean_square(v - u) + alpha * mean_square(v - v_ref)


def dpo_fm_loss(
    v_w: Tensor, v_w_ref: Tensor, u_w: Tensor, v_l: Tensor, v_l_ref: Tensor, u_l: Tensor, beta_dpo: float
) -> Tensor:
    """Diffusion-DPO on the flow-matching errors e = mean |v - u|^2 of winners (w) and losers (l), which share noise and
    t: -log sigmoid(-beta_dpo / 2 [(e_w - e_w_ref) - (e_l - e_l_ref)]). All [B,...] -> loss [B]."""
    winner = mean_square(v_w - u_w) - mean_square(v_w_ref - u_w)
    loser = mean_square(v_l - u_l) - mean_square(v_l_ref - u_l)
    return -F.logsigmoid(-beta_dpo / 2 * (winner - loser))


def best_and_worst(rewards: Tensor, subgroup_size: int) -> tuple[Tensor, Tensor]:
    """Indices of the best and of the worst sample of each subgroup: rewards [G] -> two [G / subgroup_size]."""
    groups = rewards.view(-1, subgroup_size)
    offsets = torch.arange(len(groups), device=rewards.device) * subgroup_size
    return groups.argmax(1) + offsets, groups.argmin(1) + offsets


# ---------------------------------------------------------------------------------------------------------- evaluate


def pairwise_diversity(features: Tensor) -> Tensor:
    """Mean over the pairs i != j of one prompt of 1 - cosine(f_i, f_j): features [P,G,D] -> [P] (ours; the paper
    publishes no formula). The sum over all pairs of unit vectors is |sum_i f_i|^2: no [G,G] matrix is needed."""
    unit = F.normalize(features.float(), dim=-1)
    count = unit.shape[1]
    pair_sum = unit.sum(dim=1).square().sum(dim=-1) - unit.square().sum(dim=(1, 2))  # [P], over ordered pairs i != j
    return 1 - pair_sum / (count * (count - 1))


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to features [N,D] and [M,D] (Heusel et al. 2017; here the judge's)."""
    a, b = features_a.cpu().double(), features_b.cpu().double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


@torch.no_grad()
def evaluate(
    velocity: nn.Module,
    models: nn.ModuleDict,
    rewards_of: Callable[[Tensor], Tensor],
    targets: list[int],
    real_features: Tensor,
    noise: Tensor,
    base_latents: Tensor,
    num_steps: int,
) -> tuple[dict[str, float], Tensor]:
    """Every eval/* figure of a velocity network on fixed noise [N,24]; returns them and the images [N,1,28,28].

    real_features [M,64] are the judge's features of real digits of the target classes; base_latents [N,24] are samples
    of the base model from other noise, from which the fixed points (x_t, t) of the W2 figure are made."""
    images = models["autoencoder"].decode(sample(velocity, noise, num_steps))
    logits, features = models["classifier"](images)
    judge_logits, judge_features = models["judge"](images)
    share = F.one_hot(logits.argmax(1), 10).float().mean(0)  # [10], by the reward model's labels
    judge_share = F.one_hot(judge_logits.argmax(1), 10).float().mean(0)
    t = (torch.arange(len(noise), device=noise.device) + 0.5) / len(noise)
    x_t, _ = flow_matching_point(base_latents, noise, t)
    metrics = {
        "reward": rewards_of(images).mean().item(),
        "judge_reward": judge_logits.softmax(1)[:, targets].sum(1).mean().item(),
        "diversity": pairwise_diversity(features[None]).item(),
        "judge_diversity": pairwise_diversity(judge_features[None]).item(),
        "classes": torch.special.entr(share).sum().exp().item(),
        "judge_classes": torch.special.entr(judge_share).sum().exp().item(),
        "frechet": frechet_distance(judge_features, real_features),
        "w2": mean_square(velocity(x_t, t) - models["flow"](x_t, t)).mean().item(),
    }
    return metrics | {f"judge_share_{digit}": judge_share[digit].item() for digit in range(10)}, images


def coefficient_statistics(advantage: Tensor, beta0: float) -> dict[str, float]:
    """The adrpo/* figures of one rollout; extrapolation is |A| / beta0: how far v_star lies from v_ref towards u."""
    coefficient, extrapolation = beta0 - advantage, advantage.abs() / beta0
    return {
        "adrpo/coefficient_mean": coefficient.mean().item(),
        "adrpo/coefficient_min": coefficient.min().item(),
        "adrpo/coefficient_max": coefficient.max().item(),
        "adrpo/coefficient_fraction_negative": (coefficient < 0).float().mean().item(),
        "adrpo/extrapolation_mean": extrapolation.mean().item(),
        "adrpo/extrapolation_max": extrapolation.max().item(),
    }


def log(path: Path, writer: SummaryWriter, method: str, step: int, record: dict[str, float]) -> None:
    """Append one JSON line to metrics.jsonl, and the same figures to TensorBoard."""
    with path.open("a") as file:
        file.write(json.dumps({"method": method, "step": step, **record}) + "\n")
    for tag, value in record.items():
        writer.add_scalar(tag, value, step)


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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def network_seconds(method: str, args: Args, models: nn.ModuleDict, network: nn.Module) -> float:
    """Seconds of one iteration's network calls alone, in the same shapes: no rewards, losses, optimiser or logging.
    The yardstick of network_share in summary.json."""
    device = next(network.parameters()).device
    x, t = torch.randn(args.group_size, LATENT_SIZE, device=device), torch.rand(args.group_size, device=device)
    start = synchronized_time(device)
    with torch.no_grad():
        if method != "dpo" or args.dpo_online:
            sample(network, x, args.num_steps)
            models["classifier"](models["autoencoder"].decode(x))
        for _ in range(args.updates_per_iteration if method in ("adrpo", "orw-w2", "dpo") else 0):
            models["flow"](x, t)
    for _ in range(args.updates_per_iteration):
        network(x, t).backward(x)
    network.zero_grad(set_to_none=True)
    return synchronized_time(device) - start


def picture(images: Tensor, rows: int, columns: int) -> Tensor:
    """The first rows x columns images [N,1,28,28] as one sheet [3,H,W], enlarged twice."""
    return make_grid(F.interpolate(images[: rows * columns].cpu(), scale_factor=2), columns, padding=0)


def plot_collapse(run_dir: Path, results: dict[str, dict], path: Path) -> None:
    """Samples of base, orw, orw-w2 and adrpo (those that were run) from the same noise, side by side."""
    titles = {"base": "base model", "orw": "orw: no divergence term", "orw-w2": "orw-w2: fixed weight"}
    names = [name for name in (*titles, "adrpo") if name in results]
    figure, axes = plt.subplots(1, len(names), figsize=(3.4 * len(names), 4.2), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        images = torch.tensor(np.load(run_dir / "samples" / f"{name}.npy"))[:, None].float() / 255
        axis.imshow(picture(images, 8, 8).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(titles.get(name, "adrpo: adaptive weight"), color=COLOURS.get(name, "black"))
        result = results[name]
        caption = f"reward {result['reward']:.2f}   diversity {result['diversity']:.2f}"
        axis.set(xlabel=f"{caption}\n{result['classes']:.1f} effective classes", xticks=[], yticks=[])
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_tradeoff(curves: dict[str, list[dict]], path: Path) -> None:
    """Reward against diversity and against W2, and the figures over the iterations. curves: evaluations per method."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.4))
    labels = {"w2": "W2: mean $|v - v_{ref}|^2$", "judge_reward": "reward, by the judge"}
    for method, points in curves.items():
        values = {tag: [p[f"eval/{tag}"] for p in points] for tag in ("reward", "judge_reward", "diversity", "w2")}
        for axis, tag in ((axes[0, 0], "diversity"), (axes[1, 0], "w2")):
            x, y, fade = values["reward"], values[tag], np.linspace(0.15, 0.9, len(points) - 1)
            axis.plot(x, y, color=COLOURS[method], alpha=0.2, linewidth=1)
            axis.scatter(x[1:], y[1:], color=COLOURS[method], alpha=fade, s=36, linewidths=0)
            axis.scatter(x[-1], y[-1], color=COLOURS[method], marker="*", s=260, label=method, zorder=3)
            axis.scatter(x[0], y[0], color="black", marker="D", s=60, zorder=3)  # the base model
            axis.set(xlabel="reward", ylabel=labels.get(tag, tag))
        for axis, tag in zip(axes[:, 1:].flat, ("reward", "diversity", "judge_reward", "w2"), strict=True):
            axis.plot([p["step"] for p in points], values[tag], color=COLOURS[method], marker=".", label=method)
            axis.set(xlabel="iteration", ylabel=labels.get(tag, tag))
    axes[0, 0].scatter([], [], color="black", marker="D", s=60, label="base model")
    axes[0, 0].legend()
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# -------------------------------------------------------------------------------------------------------- checkpoint


def save_checkpoint(run_dir: Path, progress: dict, parts: dict) -> None:
    """Write `progress` and the state of `parts` (modules, optimiser) into checkpoints/: temporary name, then rename;
    keeps the newest few. Raises InputError when the folder cannot be written; the earlier checkpoints stay."""
    path = run_dir / "checkpoints" / f"{progress['method']}-{progress['iteration']:06d}.pt"
    try:
        path.parent.mkdir(exist_ok=True)
        torch.save(progress | {name: part.state_dict() for name, part in parts.items()}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    except (OSError, RuntimeError) as error:
        raise InputError(f"--output-dir: {path} cannot be written ({error}); make room, then --resume") from error
    for old in sorted(path.parent.glob("*.pt"), key=lambda file: file.stat().st_mtime_ns)[:-KEEP_CHECKPOINTS]:
        old.unlink()


def load_checkpoint(run_dir: Path) -> dict:
    """The newest checkpoint of a run, {} when it has none yet. Raises InputError for a file that cannot be read."""
    files = sorted((run_dir / "checkpoints").glob("*.pt"), key=lambda file: file.stat().st_mtime_ns)
    try:
        return torch.load(files[-1], map_location="cpu", weights_only=True) if files else {}
    except Exception as error:
        remedy = "delete it to use the one before"
        raise InputError(f"--resume: {files[-1]} cannot be read ({one_line(error)}); {remedy}") from error


# -------------------------------------------------------------------------------------------------------------- main


def check_args(args: Args) -> None:
    """Raise InputError for a flag that cannot work."""
    unknown = [method for method in args.methods if method not in METHODS]
    if unknown or not args.methods or len(set(args.methods)) < len(args.methods):
        what = f"unknown {' '.join(unknown)}" if unknown else "empty or repeated"
        raise InputError(f"--methods {' '.join(args.methods)}: {what}; choose from {' '.join(METHODS)}, each once")
    positive = "classifier_steps autoencoder_steps flow_steps iterations num_steps updates_per_iteration learning_rate"
    positive += " max_grad_norm beta0 tau beta_dpo eval_every save_every"
    rules = [(name, "above 0", getattr(args, name) > 0) for name in positive.split()]
    rules.append(("group_size", "at least 2", args.group_size >= 2))
    rules.append(("eval_samples", "at least 2", args.eval_samples >= 2))
    rules.append(("alpha", "0 or more", args.alpha >= 0))
    rules.append(("ema_decay", "at least 0 and below 1", 0 <= args.ema_decay < 1))
    rules.append(("adv_clip_k", "above 0", args.adv_clip_k is None or args.adv_clip_k > 0))
    rules.append(("subgroup_size", "even and above 0", args.subgroup_size > 0 and args.subgroup_size % 2 == 0))
    if {"raft", "dpo"} & set(args.methods):
        divides = args.group_size % max(args.subgroup_size, 1) == 0
        rules.append(("group_size", f"a multiple of --subgroup-size {args.subgroup_size} for raft and dpo", divides))
    for name, rule, holds in rules:
        if not holds:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {rule}")


def choose_device(name: str, precision: str) -> tuple[torch.device, bool]:
    """The torch device, and whether to run in bfloat16. Raises InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: cannot be used ({one_line(error)}); try auto or cpu") from error
    units = torch.cpu.get_capabilities()
    native = {"cpu": bool(units.get("avx512_bf16") or units.get("amx_bf16"))}
    if device.type == "cuda":
        native["cuda"] = torch.cuda.is_bf16_supported(including_emulation=False)
    return device, precision == "bf16" or (precision == "auto" and native.get(device.type, False))


def find_run(args: Args) -> tuple[Args, Path]:
    """The flags and the folder of the run that --resume names. Raises InputError."""
    folder = Path(args.resume)
    if args.resume == "latest":
        runs = [f for f in Path(args.output_dir).glob("*/args.json") if f'"script": "{SCRIPT}"' in f.read_text()]
        if not runs:
            raise InputError(f"--resume latest: no run of this script in --output-dir {args.output_dir}")
        folder = max(runs, key=lambda file: file.stat().st_mtime_ns).parent
    if not (folder / "args.json").is_file():
        raise InputError(f"--resume {args.resume}: {folder} is not a run folder (it has no args.json)")
    try:
        record = json.loads((folder / "args.json").read_text())
        if record["script"] != SCRIPT:
            raise InputError(f"--resume {args.resume}: is a run of {record['script']}, not of {SCRIPT}")
        stored = Args(**record["args"] | {"methods": tuple(record["args"]["methods"])})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(
            f"--resume {args.resume}: its args.json is not this version's ({reason}); start anew"
        ) from error
    for field in dataclasses.fields(Args):
        given, kept, flag = getattr(args, field.name), getattr(stored, field.name), field.name.replace("_", "-")
        if field.name not in ("resume", "output_dir") and given not in (field.default, kept):
            raise InputError(f"--{flag} {given}: the resumed run has {kept}; leave the flag out or start a new run")
    return stored, folder


def create_run(args: Args) -> Path:
    """Create the run folder with args.json in it. Raises InputError."""
    name = args.run_name or f"{SCRIPT}-{'+'.join(args.methods)}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(args.output_dir) / name
    git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        commit = None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    record = {"script": SCRIPT, "args": dataclasses.asdict(args), "command": sys.argv, "versions": versions}
    try:
        folder.mkdir(parents=True)
        for name in ("samples", "final"):
            (folder / name).mkdir()
        (folder / "args.json").write_text(json.dumps(record | {"git_commit": commit}, indent=2))
    except FileExistsError as error:
        raise InputError(
            f"--run-name {folder.name}: {folder} exists; take another name, or --resume {folder}"
        ) from error
    except OSError as error:
        raise InputError(f"--output-dir {args.output_dir}: cannot be written ({error}); name another folder") from error
    return folder


def keep_metrics(path: Path, checkpoint: dict) -> None:
    """Drop from metrics.jsonl what an interrupted run logged after its checkpoint."""
    finished, method, iteration = (
        checkpoint.get("results", {}),
        checkpoint.get("method"),
        checkpoint.get("iteration", -1),
    )
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [(line, json.loads(line)) for line in lines if line.endswith("}\n")]
    kept = [s for s, row in rows if row["method"] in finished or (row["method"] == method and row["step"] <= iteration)]
    path.write_text("".join(kept))


def main(args: Args) -> None:
    start_time = time.perf_counter()
    check_args(args)
    args, run_dir = find_run(args) if args.resume else (args, None)
    device, bf16 = choose_device(args.device, args.precision)
    targets, plugin = parse_reward(args.reward)
    images, labels, data_name = load_data(args.dataset, args.data_dir)
    images, labels = images.to(device), labels.to(device)
    if plugin is not None:
        score(args.reward, plugin, None, targets, images[:8])  # a wrong plug-in is found before any training
    generator = seed_everything(args.seed)

    # The frozen parts: reward model, judge, autoencoder, and the base flow, which is also the reference.
    models = build_models(bf16, device)
    own = run_dir / "pretrained.safetensors" if run_dir else None
    source = str(own) if own and own.is_file() else args.pretrained
    info = load_pretrained(source, models, data_name) if source else {"dataset": data_name}
    run_dir = run_dir or create_run(args)
    print(f"{run_dir}: {len(images)} {data_name} images, {device}, {'bf16' if bf16 else 'fp32'}")
    if not source:
        info |= pretrain(args, images, labels, models, generator)
        info["pretrain_seconds"] = time.perf_counter() - start_time
    save_pretrained(run_dir / "pretrained.safetensors", models, info)
    models.requires_grad_(False)
    reference, autoencoder = models["flow"], models["autoencoder"]
    rewards_of = functools.partial(score, args.reward, plugin, models["classifier"], targets)

    # Everything an evaluation needs is fixed here, once: the noise, the (x_t, t) of W2, the real digits' features.
    generator = seed_everything(args.seed, len(METHODS))
    eval_noise, _ = noise_and_time(args.eval_samples, generator, device)
    other_noise, _ = noise_and_time(args.eval_samples, generator, device)
    base_latents = sample(reference, other_noise, args.num_steps)
    real_features = models["judge"](images[torch.isin(labels, torch.tensor(targets, device=device))][:10_000])[1]
    fixed = (models, rewards_of, targets, real_features, eval_noise, base_latents, args.num_steps)
    base, final_images = evaluate(reference, *fixed)
    groups = args.group_size // args.subgroup_size
    print(
        f"reward model and judge are right on {info['classifier_accuracy']:.1%} and {info['judge_accuracy']:.1%} of "
        f"held-out digits; base model: reward {base['reward']:.3f}, diversity {base['diversity']:.3f}\n"
        f"per method {args.iterations} iterations of {args.group_size} samples ({groups} subgroups for raft, dpo) and "
        f"{args.updates_per_iteration} updates"
    )

    def save_samples(name: str, images: Tensor) -> None:
        save_image(picture(images, 8, 16), run_dir / "samples" / f"{name}.png")
        np.save(run_dir / "samples" / f"{name}.npy", (images[:, 0] * 255).round().byte().cpu().numpy())

    save_samples("base", final_images)
    checkpoint = load_checkpoint(run_dir)
    results = checkpoint.get("results", {})
    metrics_path = run_dir / "metrics.jsonl"
    keep_metrics(metrics_path, checkpoint)

    for method in [method for method in args.methods if method not in results]:
        network = copy.deepcopy(reference).requires_grad_(True)
        policy = copy.deepcopy(reference)  # moving average of `network`: the previous policy, and what is evaluated
        optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        parts = {"network": network, "policy": policy, "optimizer": optimizer}
        first, seconds, metrics, network_share = 0, 0.0, base, []
        offline = method == "dpo" and not args.dpo_online
        if offline:
            noise, _ = noise_and_time(8 * args.group_size, seed_everything(args.seed, METHODS.index(method)), device)
            pool = sample(reference, noise, args.num_steps)
            pool_rewards = rewards_of(autoencoder.decode(pool))
        if checkpoint.get("method") == method:
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
            first, seconds = checkpoint["iteration"], checkpoint["seconds"]
            writer = SummaryWriter(run_dir / method, purge_step=first + 1)  # drop what was logged after the checkpoint
        else:
            writer = SummaryWriter(run_dir / method, purge_step=0)
            log(metrics_path, writer, method, 0, {f"eval/{tag}": value for tag, value in base.items()})

        bar = tqdm(range(first, args.iterations), f"{method:7s}", initial=first, total=args.iterations, mininterval=0.5)
        for iteration in bar:
            # 1. Rollout: x1 from the previous policy (eq. 6), and its reward.
            started = synchronized_time(device)
            generator = seed_everything(args.seed, METHODS.index(method), iteration + 1)
            if offline:
                rows = torch.randint(len(pool) // args.subgroup_size, (groups,), generator=generator).to(device)
                latents = pool.view(-1, args.subgroup_size, LATENT_SIZE)[rows].flatten(0, 1)
                rewards = pool_rewards.view(-1, args.subgroup_size)[rows].flatten()
                rolled_out = synchronized_time(device)
            else:
                noise, _ = noise_and_time(args.group_size, generator, device)
                latents = sample(policy, noise, args.num_steps)  # [G,24]
                rolled_out = synchronized_time(device)
                rewards = rewards_of(autoencoder.decode(latents))  # [G]
            rewarded = synchronized_time(device)

            # 2. What each method makes of the rewards. raft and dpo repeat their picks, so that every method trains on
            #    the same number of points.
            record = {"reward/mean": rewards.mean().item(), "reward/std": rewards.std().item()}
            x1 = latents
            if method == "adrpo":
                advantage = group_advantage(rewards[None], args.beta0, args.adv_clip_k, args.adv_norm)[0]  # [G]
                record |= coefficient_statistics(advantage, args.beta0)
            elif method in ("orw", "orw-w2"):
                weight = orw_weights(rewards[None], args.tau)[0]  # [G]
                alpha = args.alpha if method == "orw-w2" else 0.0
            else:
                best, worst = best_and_worst(rewards, args.subgroup_size)
                picks = best if method == "raft" else torch.cat([best, worst])
                x1 = latents[picks.repeat_interleave(args.group_size // len(picks))]  # dpo: winners, then their losers

            # 3. Updates on this rollout, each with fresh noise and times.
            warmup, decay = min(1.0, (iteration + 1) / 5), (1 + math.cos(math.pi * iteration / args.iterations)) / 2
            optimizer.param_groups[0]["lr"] = args.learning_rate * warmup * (0.05 + 0.95 * decay)
            sums = torch.zeros(4, device=device)
            for _ in range(args.updates_per_iteration):
                noise, t = noise_and_time(len(x1), generator, device)
                if method == "dpo":  # a pair shares its noise and time
                    noise, t = noise[: len(x1) // 2].repeat(2, 1), t[: len(x1) // 2].repeat(2)
                x_t, u = flow_matching_point(x1, noise, t)
                v = network(x_t, t)
                with torch.no_grad():  # raft and orw have no divergence term: no reference pass
                    v_ref = v.detach() if method in ("raft", "orw") else reference(x_t, t)
                if method == "adrpo":
                    loss = adrpo_fm_loss(v, v_ref, u, advantage, args.beta0).mean()
                elif method in ("orw", "orw-w2"):
                    loss = orw_fm_loss(v, v_ref, u, weight, alpha).mean()
                elif method == "raft":
                    loss = mean_square(v - u).mean()
                else:
                    (v_w, v_l), (v_w_ref, v_l_ref), (u_w, u_l) = v.chunk(2), v_ref.chunk(2), u.chunk(2)
                    loss = dpo_fm_loss(v_w, v_w_ref, u_w, v_l, v_l_ref, u_l, args.beta_dpo).mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
                if not (loss + grad_norm).isfinite():
                    # Before the step: the weights are still good.
                    progress = {"method": method, "iteration": iteration, "seconds": seconds, "results": results}
                    save_checkpoint(run_dir, progress, parts)
                    raise InputError(
                        f"{method}, iteration {iteration}: loss {loss:.3g}, gradient norm {grad_norm:.3g}; the weights "
                        "before this step are saved. Lower --learning-rate or --beta-dpo, or raise --beta0 or --alpha"
                    )
                optimizer.step()
                update_average(policy, network, args.ema_decay)
                with torch.no_grad():
                    sums += torch.stack([loss, mean_square(v - u).mean(), mean_square(v - v_ref).mean(), grad_norm])
            updated = synchronized_time(device)
            seconds += updated - started

            # 4. Log, evaluate, save.
            done, last = iteration + 1, iteration + 1 == args.iterations
            means = (sums / args.updates_per_iteration).tolist()
            record |= {"losses/total": means[0], "losses/flow_matching": means[1], "losses/grad_norm": means[3]}
            if method not in ("raft", "orw"):
                record["losses/divergence"] = means[2]
            record["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            record["charts/seconds_rollout"] = rolled_out - started
            record["charts/seconds_reward"] = rewarded - rolled_out
            record["charts/seconds_update"] = updated - rewarded
            record["charts/peak_memory_gb"] = peak_memory_gb(device)
            if last or done % args.eval_every == 0:
                metrics, final_images = evaluate(policy, *fixed)
                record |= {f"eval/{tag}": value for tag, value in metrics.items()}
                save_image(picture(final_images, 8, 16), run_dir / "samples" / f"{method}-{done:06d}.png")
                writer.add_image("samples", picture(final_images, 8, 16), done)
                network_share.append(network_seconds(method, args, models, network) / (updated - started))
            log(metrics_path, writer, method, done, record)
            figures = {"reward": record["reward/mean"], "diversity": metrics["diversity"], "w2": metrics["w2"]}
            bar.set_postfix({name: f"{value:.3f}" for name, value in figures.items()})
            if last:
                results[method] = metrics | {"seconds": seconds, "network_share": float(np.median(network_share))}
                save_samples(method, final_images)
                save_file(policy.state_dict(), run_dir / "final" / f"{method}.safetensors")
            if last or done % args.save_every == 0:
                progress = {"method": method, "iteration": done, "seconds": seconds, "results": results}
                save_checkpoint(run_dir, progress, parts)
        writer.close()

    # The whole run in two pictures and one table.
    rows = [json.loads(line) for line in metrics_path.read_text().splitlines()]
    curves = {name: [row for row in rows if row["method"] == name and "eval/reward" in row] for name in results}
    plot_collapse(run_dir, {"base": base, **results}, run_dir / "collapse.png")
    plot_tradeoff(curves, run_dir / "tradeoff.png")
    info |= {"bf16": bf16, "device": str(device), "seconds": time.perf_counter() - start_time}
    (run_dir / "summary.json").write_text(json.dumps({"base": base, "methods": results, "run": info}, indent=2))
    columns = ("reward", "judge_reward", "diversity", "classes", "frechet", "w2", "seconds", "network_share")
    print(f"{'':8s}" + "".join(f"{column:>14s}" for column in columns))
    for name, result in {"base": base, **results}.items():
        print(f"{name:8s}" + "".join(f"{result.get(column, math.nan):14.3f}" for column in columns))
    print(f"{info['seconds']:.0f} s in all. Look at {run_dir / 'collapse.png'} and {run_dir / 'tradeoff.png'}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: --resume latest continues from the newest checkpoint")
