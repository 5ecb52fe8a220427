"""Tables and figure of the small-world sweep, from what the runs of benchmark/sd3_mini.sh left
behind.

    python benchmark/sd3_mini_table.py WORLD RUNS OUT

writes OUT.csv (a row per run), OUT.md (means and standard errors over seeds: all settings; the
paper's Table 1 in miniature; every setting against adrpo at equal reward), OUT.png and
OUT_samples.png.

    reward               100 cos of the CLIP model on held-out prompts (what was trained on, on
                         other prompts)
    accepted             share of held-out images with all that was asked for, by the judge (never
                         the reward)
    diversity            mean pairwise 1 - cos of CLIP image features of a prompt's images;
                         relative: over the base's
    accepted diversity   the same among the images of a prompt that the judge accepts (prompts with
                         two or more of them)
    colours, thicknesses exp(entropy) of the judge's labels where the prompt leaves them free: 4 and
                         2 are all of them
    W2                   mean |v - v_ref|^2 on fixed points

"Against adrpo at equal reward": a run's figure minus (W2: divided by) that of adrpo at the same
reward and seed, base and adrpo's strengths joined by straight lines (W2: in its logarithm), without
strengths of adrpo that another one beats in both reward and W2; runs outside that range of rewards
have none.
"""

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image

from benchmark import mini_world_sd3 as world

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"adrpo": "tab:red", "orw": "tab:blue", "raft": "tab:green", "dpo": "tab:orange"}
FIGURES = (
    "reward",
    "accepted",
    "diversity",
    "relative diversity",
    "accepted diversity",
    "colours",
    "thicknesses",
    "W2",
)


def pairwise(features: torch.Tensor) -> float:
    """Mean 1 - cos over the pairs of features [N,D]."""
    similarity = F.normalize(features) @ F.normalize(features).T
    off = ~torch.eye(len(features), dtype=torch.bool)
    return (1 - similarity[off]).mean().item()


def effective_number(labels: torch.Tensor, count: int) -> float:
    """exp(entropy) of labels [N]."""
    share = torch.bincount(labels, minlength=count) / len(labels)
    return torch.special.entr(share).sum().exp().item()


@torch.no_grad()
def look(
    images: torch.Tensor, prompts: list[str], clip: torch.nn.Module, judge: world.Judge
) -> dict[str, float]:
    """What the judge and the CLIP model see in images [P,E,3,32,32] in [0,1] of prompts [P]."""
    shown = world.judge_predictions(judge, images.flatten(0, 1)).unflatten(0, images.shape[:2])
    features = clip.encode_image(images.flatten(0, 1) * 2 - 1).unflatten(0, images.shape[:2])
    asked = torch.tensor([world.asked_for(prompt) for prompt in prompts])
    right = world.fulfilled(asked[:, None], shown).all(-1)  # [P,E]
    pairs = [pairwise(f[r]) for f, r in zip(features, right, strict=True) if r.sum() >= 2]
    free = {1: [], 2: []}
    for attributes, labels in zip(asked, shown, strict=True):
        for kind in free:
            if attributes[kind] == world.FREE[kind]:
                free[kind].append(effective_number(labels[:, kind], world.FREE[kind]))
    found = {"accepted": right.float().mean().item(), "accepted diversity": float(np.mean(pairs))}
    return found | {"colours": float(np.mean(free[1])), "thicknesses": float(np.mean(free[2]))}


def read_runs(runs: Path, folder: Path) -> list[dict]:
    """One row per finished run, and one per seed for the base model."""
    clip = open_clip.create_model(f"local-dir:{folder}/clip").eval()
    judge = world.load_judge(folder / "judge")
    rows = {}
    for path in sorted(runs.glob("*/summary.json")):
        summary, record = (
            json.loads(path.read_text()),
            json.loads((path.parent / "args.json").read_text()),
        )
        args, name = record["args"], path.parent.name.rpartition("-seed")[0]
        prompts = Path(args["eval_prompts"]).read_text().splitlines()[: args["eval_max_prompts"]]
        common = {"seed": args["seed"], "commit": (record["git_commit"] or "unknown")[:8]}
        files = sorted((path.parent / "samples" / "final").glob("*.png"))
        final = torch.tensor(np.stack([np.asarray(Image.open(file)) for file in files])).permute(
            0, 3, 1, 2
        )
        base = torch.load(path.parent / "base.pt", weights_only=True)["images"]
        for method, setting, images, figures in (
            ("base", "", base, summary["base"]),
            (summary["method"], name, final, summary["final"]),
        ):
            if (setting, args["seed"]) in rows:
                continue
            row = {"method": method, "setting": setting, **common, "reward": figures["reward"]}
            row |= look(images.unflatten(0, (len(prompts), -1)) / 255, prompts, clip, judge)
            row |= {
                "diversity": figures["clip_diversity"],
                "relative diversity": figures["clip_diversity_ratio"],
            }
            rows[setting, args["seed"]] = row | {"W2": figures["w2"]}
    return list(rows.values())


def against_adrpo(rows: list[dict]) -> None:
    """Add each run's figures relative to adrpo's at the same reward and seed (nan outside adrpo's
    range)."""
    for row in rows:
        own = [r for r in rows if r["method"] == "adrpo" and r["seed"] == row["seed"]]
        frontier = [
            r for r in own if not any(o["reward"] >= r["reward"] and o["W2"] < r["W2"] for o in own)
        ]
        base = [r for r in rows if r["method"] == "base" and r["seed"] == row["seed"]]
        line = sorted(base + frontier, key=lambda r: r["reward"])
        inside = (
            row["method"] not in ("adrpo", "base")
            and line[0]["reward"] < row["reward"] <= line[-1]["reward"]
        )
        at = [r["reward"] for r in line]
        for name in ("accepted", "relative diversity", "accepted diversity"):
            other = np.interp(row["reward"], at, [r[name] for r in line])
            row[f"{name} - adrpo's"] = row[name] - other if inside else float("nan")
        line = [r for r in line if r["method"] == "adrpo"]  # the base model's W2 is 0
        inside = inside and line[0]["reward"] < row["reward"]
        other = np.exp(
            np.interp(row["reward"], [r["reward"] for r in line], np.log([r["W2"] for r in line]))
        )
        row["W2 / adrpo's"] = row["W2"] / other if inside else float("nan")


def mean_and_error(values: list[float]) -> tuple[float, float, int]:
    """Mean, standard error and number of the finite values."""
    finite = np.array([value for value in values if np.isfinite(value)])
    error = finite.std(ddof=1) / np.sqrt(len(finite)) if len(finite) > 1 else float("nan")
    return (finite.mean() if len(finite) else float("nan")), error, len(finite)


def cell(values: list[float], seeds: int) -> str:
    """Mean ± standard error as text; how many seeds, where it is not all of them."""
    mean, error, count = mean_and_error(values)
    if not count:
        return "-"
    digits = 1 if abs(mean) > 20 else 2 if abs(mean) >= 1.5 else 4 if abs(mean) < 0.1 else 3
    few = "" if count == seeds else f" (n={count})"
    return (
        f"{mean:.{digits}f} ± {error:.{digits}f}{few}" if count > 1 else f"{mean:.{digits}f}{few}"
    )


def table(groups: dict, columns: tuple[str, ...], seeds: int) -> list[str]:
    lines = [f"| setting | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for setting, members in groups.items():
        cells = [cell([member[column] for member in members], seeds) for column in columns]
        lines.append(f"| {setting or 'base'} | {' | '.join(cells)} |")
    return lines


def plot_samples(runs: Path, best: list[str], seed: int, path: Path) -> None:
    """Samples of the base model and of each chosen setting from the same noise: the same prompts,
    one row each."""
    first = runs / f"{best[0]}-seed{seed}"
    args = json.loads((first / "args.json").read_text())["args"]
    prompts = Path(args["eval_prompts"]).read_text().splitlines()[: args["eval_max_prompts"]]
    shown = range(0, len(prompts), 4)[:8]
    figure, axes = plt.subplots(
        len(shown), len(best) + 1, figsize=(3.6 * (len(best) + 1) + 1, 0.52 * len(shown) + 0.4)
    )
    base = torch.load(first / "base.pt", weights_only=True)["images"].unflatten(
        0, (len(prompts), -1)
    )
    for column, name in enumerate(["base model", *best]):
        for row, prompt in enumerate(shown):
            if column == 0:
                images = [image.permute(1, 2, 0).numpy() for image in base[prompt, :8]]
            else:
                folder = runs / f"{name}-seed{seed}" / "samples" / "final"
                images = [
                    np.asarray(Image.open(folder / f"{prompt:04d}_{i:02d}.png")) for i in range(8)
                ]
            axis = axes[row, column]
            axis.imshow(np.concatenate(images, axis=1), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(name, fontsize=10)
            if column == 0:
                axis.set_ylabel(
                    prompts[prompt].removeprefix("a handwritten "),
                    rotation=0,
                    ha="right",
                    va="center",
                )
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def strength(setting: str) -> float:
    try:
        return float(setting.rpartition("-")[2])
    except ValueError:
        return 0.0


def main(folder: Path, runs: Path, out: Path) -> None:
    rows = read_runs(runs, folder)
    against_adrpo(rows)
    order = ["base", *COLOURS]
    rows.sort(
        key=lambda row: (
            order.index(row["method"]),
            strength(row["setting"]),
            row["setting"],
            row["seed"],
        )
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{out}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {
                    key: f"{value:.5g}" if isinstance(value, float) else value
                    for key, value in row.items()
                }
            )

    groups = defaultdict(list)
    for row in rows:
        groups[row["setting"]].append(row)
    seeds = sorted({row["seed"] for row in rows})
    means = {
        key: {f: mean_and_error([r[f] for r in rs]) for f in FIGURES} for key, rs in groups.items()
    }
    text = ["## All settings", "", *table(groups, FIGURES, len(seeds))]
    best = {"": groups[""]}
    for method in COLOURS:
        own = [key for key, members in groups.items() if members[0]["method"] == method]
        if own:
            chosen = max(own, key=lambda key: means[key]["accepted"][0])
            best[chosen] = groups[chosen]
    text += [
        "",
        "## Table 1 in miniature: of each method the setting with the highest accepted share",
        "",
    ]
    text += table(best, ("reward", "diversity", "accepted", "accepted diversity", "W2"), len(seeds))
    versus = tuple(key for key in rows[0] if "adrpo's" in key)
    others = {
        key: members
        for key, members in groups.items()
        if members[0]["method"] not in ("base", "adrpo")
    }
    if others:
        text += ["", "## Against adrpo at equal reward", "", *table(others, versus, len(seeds))]
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    text.append(f"\nMean ± standard error over seeds {seeds}; commit {commits}.\n")
    Path(f"{out}.md").write_text("\n".join(text))
    print("\n".join(text))

    figure, axes = plt.subplots(1, 4, figsize=(20, 4.8))
    for axis, y in zip(
        axes, ("accepted", "relative diversity", "accepted diversity", "W2"), strict=True
    ):
        for method, colour in COLOURS.items():
            own = [key for key, members in groups.items() if members[0]["method"] == method]
            line = [(strength(key), means[key]) for key in own]
            x = [mean["reward"][0] for _, mean in line]
            height = [mean[y][0] for _, mean in line]
            errors = {"xerr": [m["reward"][1] for _, m in line], "yerr": [m[y][1] for _, m in line]}
            axis.errorbar(x, height, **errors, color=colour, marker="o", capsize=2, label=method)
            for (value, _), at in zip(line, zip(x, height, strict=True), strict=True):
                axis.annotate(
                    f"{value:g}", at, textcoords="offset points", xytext=(4, 4), fontsize=7
                )
        base = means[""]
        if y == "W2":
            axis.set_yscale("log")
        else:
            axis.scatter(
                base["reward"][0],
                base[y][0],
                color="black",
                marker="D",
                label="base model",
                zorder=3,
            )
        axis.set(xlabel="held-out reward (100 cos)", ylabel=y)
        axis.grid(alpha=0.25)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(f"{out}.png", dpi=100)
    plt.close(figure)
    plot_samples(runs, [name for name in best if name], seeds[0], Path(f"{out}_samples.png"))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
