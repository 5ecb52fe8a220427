"""Tables and figure of a sweep over methods, strengths and seeds, from what the runs left behind.

    python benchmark/plot_tradeoff.py RUNS_DIR OUT

reads args.json and summary.json of every run in RUNS_DIR and writes OUT.csv (a row per method, strength and seed),
OUT_mean.csv and OUT.md (means and standard errors over seeds) and OUT.png. Diversity is relative to the run's own base
model. The last column compares at equal reward: a setting's diversity minus that of adrpo at the same reward, adrpo's
strengths joined by straight lines, per seed; a setting outside adrpo's range of rewards has no such figure.
"""

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STRENGTH = {"adrpo": "beta0", "orw": "alpha", "orw-w2": "alpha", "raft": None, "dpo": "beta_dpo"}
COLOURS = {"adrpo": "tab:red", "orw": "tab:gray", "orw-w2": "tab:blue", "raft": "tab:green", "dpo": "tab:orange"}
FIGURES = ("reward", "judge_reward", "diversity", "classes", "frechet", "w2", "relative_diversity")


def read_runs(folder: Path) -> list[dict]:
    """One row per method, strength and seed of the finished runs in `folder`."""
    rows = []
    for path in sorted(folder.glob("*/summary.json")):
        summary, record = json.loads(path.read_text()), json.loads((path.parent / "args.json").read_text())
        args, base = record["args"], summary["base"]
        common = {
            "seed": args["seed"],
            "commit": (record["git_commit"] or "unknown")[:8],
            "base_diversity": base["diversity"],
        }
        base_row = {key: base[key] for key in FIGURES if key in base} | {"relative_diversity": 1.0}
        rows.append({"method": "base", "strength": 0.0, **common, **base_row})
        for method, result in summary["methods"].items():
            strength = 0.0 if method in ("orw", "raft") else args[STRENGTH[method]]
            figures = {key: result[key] for key in FIGURES if key in result}
            figures["relative_diversity"] = result["diversity"] / base["diversity"]
            rows.append({"method": method, "strength": strength, **common, **figures})
    unique = {(row["method"], row["strength"], row["seed"]): row for row in rows}
    return [unique[key] for key in sorted(unique)]


def at_equal_reward(rows: list[dict]) -> None:
    """Add `versus_adrpo`: relative diversity minus adrpo's at the same reward and seed (nan outside its range)."""
    for row in rows:
        adrpo = sorted((r["reward"], r["relative_diversity"]) for r in rows if _is_adrpo(r, row["seed"]))
        rewards, diversities = zip(*adrpo, strict=True)
        inside = rewards[0] <= row["reward"] <= rewards[-1] and row["method"] not in ("adrpo", "base")
        other = np.interp(row["reward"], rewards, diversities)
        row["versus_adrpo"] = row["relative_diversity"] - other if inside else float("nan")


def _is_adrpo(row: dict, seed: int) -> bool:
    return row["method"] == "adrpo" and row["seed"] == seed


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error of the finite values; nan when there are fewer than two."""
    finite = np.array([value for value in values if np.isfinite(value)])
    if len(finite) < 2:
        return float("nan"), float("nan")
    return finite.mean(), finite.std(ddof=1) / np.sqrt(len(finite))


def main(runs: Path, out: Path) -> None:
    rows = read_runs(runs)
    at_equal_reward(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{out}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})

    groups = defaultdict(list)
    for row in rows:
        groups[row["method"], row["strength"]].append(row)
    columns = (*FIGURES, "versus_adrpo")
    means = []
    for (method, strength), members in sorted(groups.items()):
        mean = {"method": method, "strength": strength, "seeds": len(members)}
        for key in columns:
            mean[key], mean[f"{key}_se"] = mean_and_error([member[key] for member in members])
        means.append(mean)
    with Path(f"{out}_mean.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, means[0].keys())
        writer.writeheader()
        for mean in means:
            writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in mean.items()})

    lines = [f"| method | strength | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for mean in means:
        cells = [f"{mean[key]:.3f} ± {mean[f'{key}_se']:.3f}" if np.isfinite(mean[key]) else "-" for key in columns]
        lines.append(f"| {mean['method']} | {mean['strength']:g} | {' | '.join(cells)} |")
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    seeds = sorted({row["seed"] for row in rows})
    lines.append(f"\nMean ± standard error over seeds {seeds}, commit {commits}.\n")
    Path(f"{out}.md").write_text("\n".join(lines))
    print("\n".join(lines))

    figure, axes = plt.subplots(1, 3, figsize=(16, 5))
    panels = (("reward", "relative_diversity"), ("reward", "w2"), ("judge_reward", "frechet"))
    for axis, (x, y) in zip(axes, panels, strict=True):
        for method, colour in COLOURS.items():
            line = sorted((m for m in means if m["method"] == method), key=lambda m: m["strength"])
            xs, ys = [m[x] for m in line], [m[y] for m in line]
            errors = {"xerr": [m[f"{x}_se"] for m in line], "yerr": [m[f"{y}_se"] for m in line]}
            axis.errorbar(xs, ys, **errors, color=colour, marker="o", capsize=2, label=method)
            for m in line if len(line) > 1 else []:
                point = (m[x], m[y])
                axis.annotate(f"{m['strength']:g}", point, textcoords="offset points", xytext=(5, 5), fontsize=7)
        base = next(m for m in means if m["method"] == "base")
        if base[y] > 0:
            axis.axhline(
                base[y], color="black", linestyle=":", linewidth=1, label=f"base (reward {base['reward']:.2f})"
            )
        axis.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "), xlim=(0.7, 1.015))
        axis.grid(alpha=0.25)
    axes[1].set_yscale("log")
    axes[2].set_yscale("log")
    axes[0].legend(loc="lower left")
    figure.tight_layout()
    figure.savefig(f"{out}.png", dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
