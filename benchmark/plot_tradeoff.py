"""Tables and figures of a sweep over methods, strengths and seeds, from what the runs left behind.

    python benchmark/plot_tradeoff.py RUNS_DIR OUT

reads args.json and summary.json of every run in RUNS_DIR and writes OUT.csv (a row per method,
strength and seed), OUT_mean.csv and OUT.md (means and standard errors over seeds), OUT.png (reward
against diversity) and OUT_distance.png (W2 and Fréchet distance). Diversity is relative to the
run's own base model. The last column compares at equal reward: a setting's diversity minus that of
adrpo at the same reward, adrpo's strengths joined by straight lines, per seed; a setting outside
adrpo's range of rewards has no such figure. Where --tau is not the default its value stands beside
the method's name.
"""

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import toy_mnist_flow as toy

COLOURS = {"adrpo": "tab:red", "orw": "tab:blue", "orw (tau 30)": "tab:cyan"}
COLOURS |= {"dpo": "tab:orange", "raft": "tab:green"}
LABELS = {"adrpo": "ADRPO, by beta0", "orw": "fixed weight (ORW-CFM-W2), by alpha"}
LABELS |= {"dpo": "DPO, by beta", "orw (tau 30)": "the same, tau = 30", "raft": "RAFT"}
FIGURES = ("reward", "judge_reward", "relative_diversity", "classes", "frechet", "w2")


def read_runs(folder: Path) -> list[dict]:
    """One row per method, strength and seed of the finished runs in `folder`."""
    rows = {}
    for path in sorted(folder.glob("*/summary.json")):
        summary = json.loads(path.read_text())
        record = json.loads((path.parent / "args.json").read_text())
        args = record["args"]
        about = {"seed": args["seed"], "commit": (record["git_commit"] or "unknown")[:8]}
        for name, result in {"base": summary["base"], **summary["methods"]}.items():
            method, _, strength = name.partition("-")
            if method == "orw" and args["tau"] != toy.Args.tau:
                method = f"orw (tau {args['tau']:g})"
            row = {"method": method, "strength": float(strength or 0), **about}
            for tag in FIGURES:
                row[tag] = result[tag]
            for digit in range(10):
                row[f"judge_share_{digit}"] = result[f"judge_share_{digit}"]
            rows[method, row["strength"], args["seed"]] = row
    return [rows[key] for key in sorted(rows)]


def at_equal_reward(rows: list[dict]) -> None:
    """Add `versus_adrpo`: relative diversity minus adrpo's at the same reward and seed (nan outside
    its range)."""
    curves = defaultdict(list)
    for row in rows:
        if row["method"] == "adrpo":
            curves[row["seed"]].append((row["reward"], row["relative_diversity"]))
    for row in rows:
        rewards, diversities = zip(*sorted(curves[row["seed"]]), strict=True)
        inside = rewards[0] <= row["reward"] <= rewards[-1]
        other = np.interp(row["reward"], rewards, diversities)
        compared = inside and row["method"] not in ("adrpo", "base")
        row["versus_adrpo"] = row["relative_diversity"] - other if compared else float("nan")


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error of the finite values; nan when there are fewer than two."""
    finite = np.array([value for value in values if np.isfinite(value)])
    if len(finite) < 2:
        return float("nan"), float("nan")
    return finite.mean(), finite.std(ddof=1) / np.sqrt(len(finite))


def write_csv(path: str, rows: list[dict]) -> None:
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        for row in rows:
            short = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(short)


def draw(axis, means: list[dict], x: str, y: str, names: bool) -> None:
    """One line per method with standard errors; the strengths are written on where `names`."""
    for method, colour in COLOURS.items():
        line = sorted((m for m in means if m["method"] == method), key=lambda m: m["strength"])
        xs, ys = [m[x] for m in line], [m[y] for m in line]
        errors = {"xerr": [m[f"{x}_se"] for m in line], "yerr": [m[f"{y}_se"] for m in line]}
        look = {"color": colour, "marker": "*" if method == "adrpo" else "o", "capsize": 2}
        look["markersize"] = 13 if method == "adrpo" else 6
        axis.errorbar(xs, ys, **errors, **look, label=LABELS[method])
        offset = (7, 4) if method in ("adrpo", "dpo") else (-22, -11)
        named = [line[0], line[-1]] if method == "dpo" else line  # its points lie close
        for m in named if names and method != "raft" else []:
            place = {"textcoords": "offset points", "fontsize": 8, "color": colour}
            axis.annotate(f"{m['strength']:g}", (m[x], m[y]), offset, **place)
    axis.grid(alpha=0.25)


def main(runs: Path, out: Path) -> None:
    rows = read_runs(runs)
    at_equal_reward(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(f"{out}.csv", rows)
    groups = defaultdict(list)
    for row in rows:
        groups[row["method"], row["strength"]].append(row)
    columns = (*FIGURES, "versus_adrpo")
    means = []
    for (method, strength), members in sorted(groups.items()):
        mean = {"method": method, "strength": strength, "seeds": len(members)}
        for tag in columns:
            mean[tag], mean[f"{tag}_se"] = mean_and_error([member[tag] for member in members])
        means.append(mean)
    write_csv(f"{out}_mean.csv", means)

    lines = [f"| method | strength | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for mean in means:
        cells = []
        for tag in columns:
            digits = 0 if tag == "frechet" else 1 if tag == "classes" else 3
            text = f"{mean[tag]:.{digits}f} ± {mean[f'{tag}_se']:.{digits}f}"
            cells.append(text if np.isfinite(mean[tag]) else "-")
        lines.append(f"| {mean['method']} | {mean['strength']:g} | {' | '.join(cells)} |")
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    seeds = sorted({row["seed"] for row in rows})
    lines.append(f"\nMean ± standard error over seeds {seeds}, commit {commits}.\n")
    Path(f"{out}.md").write_text("\n".join(lines))
    print("\n".join(lines))

    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.subplots()
    draw(axis, means, "reward", "relative_diversity", names=True)
    axis.set(xlim=(0.7, 1.02), xlabel="reward (probability of an even digit)")
    axis.set(ylabel="diversity, relative to the base model's", ylim=(-0.03, 1.08))
    base = next(mean for mean in means if mean["method"] == "base")
    note = f"base model: reward {base['reward']:.2f}, diversity 1"
    axis.text(0.705, 1.04, f"\u2190 {note}", fontsize=9)
    axis.text(0.72, 0.52, "better: up and right  \u2197", fontsize=12)
    axis.legend(loc="lower left")
    figure.savefig(f"{out}.png", dpi=110)

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    for axis, tag in zip(figure.subplots(1, 2), ("w2", "frechet"), strict=True):
        draw(axis, means, "reward", tag, names=False)
        label = {"w2": "W2 to the base model", "frechet": "Fréchet distance to real even digits"}
        axis.set(yscale="log", xlim=(0.7, 1.02), xlabel="reward", ylabel=label[tag])
    axis.legend(fontsize=8)
    figure.savefig(f"{out}_distance.png", dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
