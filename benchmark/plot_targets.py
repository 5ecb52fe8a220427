"""The picture of ADRPO's targets in docs/toy_mnist_flow.md.

    python benchmark/plot_targets.py OUT.png

Left: v_star = v_ref + (A / beta0)(u - v_ref) lies on the line through v_ref and u. Right: the loss
along that line, evaluated as the script writes it (two terms), has the same curvature for every
advantage."""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from toy_mnist_flow import adrpo_fm_loss

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BETA0 = 0.05
RATIOS = (-2.0, -1.0, 0.0, 0.5, 1.0, 2.0)

v_ref, u = np.array([1.0, 0.4]), np.array([2.0, 1.2])
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6))
colours = plt.get_cmap("coolwarm")((np.array(RATIOS) + 2) / 4)
for ratio, colour in zip(RATIOS, colours, strict=True):
    target = v_ref + ratio * (u - v_ref)
    left.scatter(*target, color=colour, s=90, zorder=3, edgecolor="black", linewidth=0.5)
    left.annotate(
        f"A = {ratio:g} $\\beta_0$",
        target,
        textcoords="offset points",
        xytext=(8, -12),
        fontsize=10,
    )
    position = np.linspace(-3.5, 3.5, 141)
    v = torch.tensor(v_ref + position[:, None] * (u - v_ref))
    reference, path = (torch.tensor(x).expand_as(v) for x in (v_ref, u))
    loss = adrpo_fm_loss(v, reference, path, torch.full((len(v),), ratio * BETA0), BETA0).numpy()
    right.plot(position, loss / BETA0, color=colour, label=f"A = {ratio:g} $\\beta_0$")
    right.scatter(
        position[loss.argmin()],
        loss.min() / BETA0,
        color=colour,
        zorder=3,
        edgecolor="black",
        linewidth=0.5,
    )
left.margins(0.18)
left.axline(v_ref, u, color="gray", linewidth=0.8, zorder=0)
left.annotate("$v_{ref}$", v_ref, textcoords="offset points", xytext=(-26, 10), fontsize=13)
left.annotate("$u$", u, textcoords="offset points", xytext=(-16, 10), fontsize=13)
left.set(
    title="where a sample pulls the velocity: $v^* = v_{ref} + (A/\\beta_0)(u - v_{ref})$",
    aspect="equal",
)
left.set(xlabel="first element of v", ylabel="second element of v")
right.set(
    title="its loss along that line: every curvature is $\\beta_0$", ylabel="loss / $\\beta_0$"
)
right.set(xlabel="position on the line (0 = $v_{ref}$, 1 = $u$)")
right.legend()
figure.tight_layout()
figure.savefig(sys.argv[1], dpi=110)
