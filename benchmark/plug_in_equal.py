"""How close ADRPO's flow-matching loss is to AWM's and DiffusionNFT's, in numbers: random tensors,
gradients by autograd, and the two ways of getting ADRPO wrong. Seconds on a CPU.

    python benchmark/plug_in_equal.py

The derivations are in docs/plug_in.md. Both losses are written here from their formulas, in
float64. Time s has the noise at 1 (as in adrpo_fm_sd3.py, and their t): x_s = (1 - s) x1 + s noise,
u = noise - x1.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from toy_mnist_flow import adrpo_fm_loss, group_advantage, mean_square

BETA0 = 0.3


def awm_loss(
    v: Tensor, v_old: Tensor, v_ref: Tensor, u: Tensor, advantage, kl_weight, clip_eps: float = 0.2
) -> Tensor:
    """AWM (arXiv 2509.25050), uniform weighting: -mean|v - u|^2 stands for the log-probability in
    PPO's clipped ratio, beside kl_weight mean|v - v_ref|^2. v, v_old, v_ref, u [B,...], advantage
    [B], kl_weight a number, or [B] -> loss [B]."""
    ratio = torch.exp(mean_square(v_old - u) - mean_square(v - u))
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    policy = -torch.minimum(advantage * ratio, advantage * clipped)
    return policy + kl_weight * mean_square(v - v_ref)


def nft_loss(
    v: Tensor, v_old: Tensor, x1: Tensor, noise: Tensor, s: Tensor, r: Tensor, mix: float, a_max
) -> Tensor:
    """DiffusionNFT (arXiv 2509.16117) without self-normalisation, scaled as in its authors' code by
    a_max / mix: the clean samples that the two mixtures of v and v_old predict against x1, weighted
    by r and 1 - r. v, v_old, x1, noise [B,...], s, r [B] -> loss [B]."""
    s = s.view(-1, *[1] * (v.dim() - 1))
    x_s = (1 - s) * x1 + s * noise
    positive = x_s - s * ((1 - mix) * v_old + mix * v)
    negative = x_s - s * ((1 + mix) * v_old - mix * v)
    loss = r * mean_square(positive - x1) + (1 - r) * mean_square(negative - x1)
    return a_max / mix * loss


def gradient(loss: Tensor, v: Tensor) -> Tensor:
    """Of the sum over samples: loss [B], v [B,...] -> [B,...]."""
    return torch.autograd.grad(loss.sum(), v)[0]


def draw(seed: int = 0, count: int = 64) -> dict[str, Tensor]:
    """Random velocities, samples, times and advantages, in float64; v needs a gradient."""
    rng = torch.Generator().manual_seed(seed)
    names = ("v", "v_old", "v_ref", "x1", "noise")
    drawn = {
        name: torch.randn(count, 4, 8, 8, generator=rng, dtype=torch.float64) for name in names
    }
    drawn["u"] = drawn["noise"] - drawn["x1"]
    drawn["s"] = torch.rand(count, generator=rng, dtype=torch.float64)
    drawn["advantage"] = torch.randn(count, generator=rng, dtype=torch.float64)
    drawn["v"].requires_grad_(True)
    return drawn


def compare_awm(at_start: bool, seed: int = 0) -> tuple[float, float]:
    """AWM with the KL weight beta0 - A against the closed form of ADRPO's gradient, whose first
    term is multiplied by AWM's ratio, or by 0 where that is clipped: (largest difference of an
    element, share of clipped samples). At the start v is v_old: the ratio is 1, and that is
    ADRPO's gradient itself."""
    given = draw(seed)
    v, v_old, v_ref, u = (given[name] for name in ("v", "v_old", "v_ref", "u"))
    v_old = v.detach() if at_start else v_old
    advantage = given["advantage"].clamp(-BETA0, BETA0)
    theirs = gradient(awm_loss(v, v_old, v_ref, u, advantage, BETA0 - advantage), v)
    v = v.detach()
    ratio = torch.exp(mean_square(v_old - u) - mean_square(v - u))
    clipped = torch.where(advantage > 0, ratio > 1.2, ratio < 0.8)
    first, second = torch.where(clipped, 0.0, ratio) * advantage, BETA0 - advantage
    first, second = (weight.view(-1, 1, 1, 1) for weight in (first, second))
    expected = 2 / v[0].numel() * (first * (v - u) + second * (v - v_ref))
    return (theirs - expected).abs().max().item(), clipped.double().mean().item()


def compare_nft(mix: float, a_max: float, seed: int = 0) -> tuple[float, float]:
    """Largest difference between DiffusionNFT's loss and s^2 times ADRPO's with v_ref = v_old,
    beta0 = mix a_max, A clipped to +-a_max: of a gradient's element; of the values, from which the
    constant s^2 (a_max / mix - A) mean|u - v_old|^2 is taken."""
    given = draw(seed)
    v, v_old, u, s = (given[name] for name in ("v", "v_old", "u", "s"))
    advantage = given["advantage"].clamp(-a_max, a_max)
    r = (advantage / a_max + 1) / 2
    theirs = nft_loss(v, v_old, given["x1"], given["noise"], s, r, mix, a_max)
    ours = s.square() * adrpo_fm_loss(v, v_old, u, advantage, mix * a_max)
    constant = s.square() * (a_max / mix - advantage) * mean_square(u - v_old)
    values = (theirs - ours - constant).abs().max().item()
    return (gradient(theirs, v) - gradient(ours, v)).abs().max().item(), values


def curvature(advantage: float, coefficient: float) -> float:
    """Second derivative in v, halved, of advantage |v - u|^2 + coefficient |v - v_ref|^2 in one
    dimension, by autograd."""
    v = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = advantage * (v - 1).square() + coefficient * (v + 1).square()
    (slope,) = torch.autograd.grad(loss, v, create_graph=True)
    return torch.autograd.grad(slope, v)[0].item() / 2


def descend(advantage: float, coefficient: float, steps: int, rate: float = 0.5) -> float:
    """Where gradient descent leaves v after `steps` from v_ref = 0, with u = 1."""
    v = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        loss = advantage * (v - 1).square() + coefficient * v.square()
        v = (v - rate * torch.autograd.grad(loss, v)[0]).detach().requires_grad_(True)
    return v.item()


def two_prompts(keep_constant: bool, steps: int = 100, rate: float = 1.0) -> list[float]:
    """Gradient descent on two prompts, each with one v for its group of 8 and with v_ref = 0: both
    start 1 away from v_ref, and all samples of the second have the same reward. Distances to v_ref
    at the end, with the second group's samples (A = 0) in the batch or dropped from it."""
    rng = torch.Generator().manual_seed(0)
    u = torch.randn(2, 8, 1, generator=rng, dtype=torch.float64)
    rewards = torch.stack([u[0, :, 0] / 2, torch.full((8,), 0.7, dtype=torch.float64)])
    advantage = group_advantage(rewards, BETA0, clip_k=1.0).flatten()
    rows = torch.ones_like(advantage, dtype=bool) if keep_constant else advantage != 0
    v = torch.ones(2, 1, 1, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        each = v.expand(2, 8, 1).reshape(16, 1)
        loss = adrpo_fm_loss(each, torch.zeros_like(each), u.view(16, 1), advantage, BETA0)
        v = (v - rate * torch.autograd.grad(loss[rows].mean(), v)[0]).detach().requires_grad_(True)
    return v.flatten().tolist()


def main() -> None:
    print("AWM with the KL weight beta0 - A: largest difference of a gradient's element")
    print(f"  at the sampling policy, to ADRPO's: {compare_awm(True)[0]:.1e}")
    difference, clipped = compare_awm(False)
    print(f"  elsewhere, with the ratio as a factor, {clipped:.0%} clipped: {difference:.1e}")
    print("DiffusionNFT without self-normalisation against s^2 times ADRPO")
    for mix, a_max in ((1.0, 5.0), (0.1, 5.0)):
        slopes, values = compare_nft(mix, a_max)
        print(
            f"  mixture {mix}, A clipped to +-{a_max} (beta0 {mix * a_max}, k {1 / mix:.0f}): "
            f"gradients {slopes:.1e}, values {values:.1e}"
        )
    print(f"One sample, beta0 {BETA0}, k = 1, u - v_ref = 1: gradient descent on v from v_ref")
    print("      A  clipped in   curvature  v - v_ref after 10, 50, 100 steps")
    for raw in (0.9, -0.9):
        clipped = max(-BETA0, min(BETA0, raw))
        for where, first in (("both", clipped), ("coefficient", raw)):
            bend = curvature(first, BETA0 - clipped)
            path = [descend(first, BETA0 - clipped, steps) for steps in (10, 50, 100)]
            print(f"  {raw:5.1f}  {where:11s}  {bend:8.2f} ", *(f"{v:9.3g}" for v in path))
    print("Two prompts, v - v_ref 1 at the start, after 100 steps; the second's rewards are equal")
    for name, keep in (("kept", True), ("dropped", False)):
        print(f"  constant group {name:7s}: {', '.join(f'{v:.3f}' for v in two_prompts(keep))}")


if __name__ == "__main__":
    main()
