"""Tables and figures of the audio sweep, from what the runs of benchmark/audio_mini.sh left behind.

    python benchmark/audio_mini_table.py WORLDS RUNS OUT

writes OUT.csv (a row per model, think budget and way of answering), OUT.md (the layouts of the
ADRPO paper's Tables 2 and 3: accuracy per task; then rewards and figures of training; differences
paired over the base models) and OUT.png (accuracy against reasoning tokens: CESAR's scaling curve;
training curves).

    accuracy      by MMAU's rule, percent of the world's held-out questions, at a think budget of 50
                  words where none is named; greedy, or one sample of each question
    rambling      share of completions with a sentence that says nothing about the clip; "right,
                  rambling" and "right, else" are the shares of right answers among these and among
                  the others
    entropy, KL   of the policy while it is trained, nats a token, mean of the last ten iterations
"""

import csv
import json
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from adrpo_audio_mmau import REWARDS, block, mmau_match
from benchmark.mini_world_audio import RAMBLINGS
from benchmark.mmau_scaling import scaling

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SETTINGS = {
    "base": "base model",
    "grpo": "grpo",
    "adrpo": "adrpo, 1x",
    "adrpo-k0.5": "adrpo, 0.5x",
    "adrpo-k2": "adrpo, 2x",
    "grpo-cesar": "grpo, CESAR's rewards",
    "adrpo-cesar": "adrpo, CESAR's rewards",
}
PAIRS = [
    ("adrpo", "grpo"),
    ("adrpo-k0.5", "adrpo"),
    ("adrpo-k2", "adrpo"),
    ("grpo-cesar", "grpo"),
    ("adrpo-cesar", "adrpo"),
    ("adrpo-cesar", "grpo-cesar"),
]
COLUMNS = ("total", "sound", "music", "speech")
BUDGET = 50
WAYS = ("greedy", "sampled")
COLOURS = dict(
    zip(
        SETTINGS,
        ("black", "tab:blue", "tab:red", "tab:orange", "tab:purple", "tab:cyan", "tab:pink"),
        strict=True,
    )
)


def read_evaluation(folder: Path) -> dict:
    """Figures of one model under one think budget; under "right" which questions it answered right,
    by id."""
    facts = json.loads((folder / "summary.json").read_text())
    said = json.loads((folder / "samples" / "predictions.json").read_text())
    scores = facts["scores"]
    found = {"total": scores["total"]["total"]["accuracy"]}
    found |= {task: score["accuracy"] for task, score in scores["task"].items()}
    found |= {"low": scores["total"]["total"]["low"], "high": scores["total"]["total"]["high"]}
    found |= {name: facts["final"][name] for name in (*REWARDS[1:], "reasoning_tokens")}
    thoughts = [block(row["completion"], "think") for row in said]
    rambles = np.array([any(sentence in thought for sentence in RAMBLINGS) for thought in thoughts])
    found["rambling"] = float(rambles.mean())
    found["right"] = {
        row["id"]: mmau_match(row["answer"], row["model_output"], row["choices"]) for row in said
    }
    right = np.array([*found["right"].values()])
    for name, these in (("right, rambling", rambles), ("right, else", ~rambles)):
        found[name] = float(right[these].mean()) if these.any() else math.nan
    return found


def read_all(runs: Path) -> tuple[dict, dict, list[str], list[int]]:
    """Evaluations by (setting, seed, way, budget); training rows by (setting, seed); commits;
    budgets."""
    evaluations, training, commits, budgets = {}, {}, set(), set()
    for file in sorted(runs.glob("*/done")):
        name = file.parent.name
        for arguments in file.parent.glob("**/args.json"):  # of a greedy one a run for each budget
            record = json.loads(arguments.read_text())
            commits.add(record["git_commit"][:8])
            if name.endswith(WAYS):
                setting, seed, way = name.rsplit("-", 2)
                budget = record["args"]["think_budget"]
                budgets.add(budget)
                found = read_evaluation(arguments.parent)
                evaluations[setting, int(seed), way, budget] = found
        if not name.endswith(WAYS):
            setting, seed = name.rsplit("-", 1)
            rows = [
                json.loads(line)
                for line in (file.parent / "metrics.jsonl").read_text().splitlines()
            ]
            training[setting, int(seed)] = [row for row in rows if "reward/mean" in row]
    return evaluations, training, sorted(commits), sorted(budgets)


def written(values: list[float], digits: int = 1) -> str:
    """mean ± standard error over the base models."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{np.mean(values):.{digits}f} ± {error:.{digits}f}"


def table(rows: list[list[str]]) -> str:
    """Markdown; the first row is the head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def of_setting(evaluations: dict, setting: str, way: str, budget: int = BUDGET) -> dict[int, dict]:
    """Evaluations of a setting by seed."""
    return {
        key[1]: found
        for key, found in evaluations.items()
        if (key[0], *key[2:]) == (setting, way, budget)
    }


def accuracy_table(evaluations: dict, way: str, settings: list[str]) -> str:
    """Accuracy per task, mean ± standard error over the base models, and the range of the single
    runs' totals."""
    rows = [
        [way, "runs", *COLUMNS[1:], "total", "totals of the runs, with Wilson's 95 % intervals"]
    ]
    for setting in settings:
        found = of_setting(evaluations, setting, way)
        if found:
            cells = [
                written([one[name] for one in found.values()]) for name in (*COLUMNS[1:], "total")
            ]
            single = ", ".join(
                f"{one['total']:.1f} ({one['low']:.1f} to {one['high']:.1f})"
                for one in found.values()
            )
            rows.append([SETTINGS[setting], str(len(found)), *cells, single])
    return table(rows)


def process_table(evaluations: dict, training: dict, way: str) -> str:
    """Rewards, lengths and rambling of the answers; entropy and KL of the last ten iterations of
    training."""
    names = (*REWARDS[1:], "reasoning_tokens", "rambling")
    # Greedily hardly anything rambles.
    names += ("right, rambling", "right, else") if way == "sampled" else ()
    rows = [[way, *[name.replace("_", " ") for name in names], "entropy", "KL"]]
    for setting, title in SETTINGS.items():
        found = of_setting(evaluations, setting, way)
        if not found:
            continue
        digits = {"reasoning_tokens": 1}
        cells = [
            written([one[name] for one in found.values()], digits.get(name, 3)) for name in names
        ]
        curves = [rows_ for (name, _), rows_ in training.items() if name == setting]
        for tag in ("entropy", "kl"):
            ends = [np.mean([row[tag] for row in curve[-10:]]) for curve in curves]
            cells.append(written(ends, 3) if ends else "-")
        rows.append([title, *cells])
    return table(rows)


def mcnemar(one: dict[int, dict], other: dict[int, dict]) -> tuple[int, int, float]:
    """Questions of all base models that only the one, or only the other got right, and the exact
    test's p."""
    pairs = [
        (found["right"][id_], other[seed]["right"][id_])
        for seed, found in one.items()
        for id_ in found["right"]
    ]
    won, lost = (sum(pair == wanted for pair in pairs) for wanted in ((True, False), (False, True)))
    return won, lost, stats.binomtest(won, won + lost).pvalue if won + lost else math.nan


def difference_table(evaluations: dict) -> str:
    """Differences on the same base model and questions."""
    names = ("total", "reasoning_tokens", "rambling", "keywords")
    head = [
        "",
        "difference",
        "pairs",
        "accuracy",
        "p",
        "questions won, lost",
        "p (McNemar)",
        *names[1:],
    ]
    rows = [[cell.replace("_", " ") for cell in head]]
    for way in WAYS:
        for one_name, other_name in PAIRS:
            one, other = (of_setting(evaluations, name, way) for name in (one_name, other_name))
            seeds = sorted(one.keys() & other.keys())
            if not seeds:
                continue
            differences = {
                name: [one[seed][name] - other[seed][name] for seed in seeds] for name in names
            }
            p = stats.ttest_1samp(differences["total"], 0).pvalue if len(seeds) > 1 else math.nan
            won, lost, p_questions = mcnemar({seed: one[seed] for seed in seeds}, other)
            cells = [
                written(differences["total"]),
                f"{p:.2g}",
                f"{won}, {lost}",
                f"{p_questions:.2g}",
            ]
            cells += [
                written(differences[name], 1 if name == "reasoning_tokens" else 3)
                for name in names[1:]
            ]
            rows.append(
                [way, f"{SETTINGS[one_name]} - {SETTINGS[other_name]}", str(len(seeds)), *cells]
            )
    return table(rows)


def scaling_points(evaluations: dict, setting: str, budgets: list[int]) -> list[list[dict]]:
    """For each base model its points, greedy, as `scaling` reads them."""
    by_budget = [of_setting(evaluations, setting, "greedy", budget) for budget in budgets]
    curves = []
    for seed in by_budget[0]:
        named = [(budget, found[seed]) for budget, found in zip(budgets, by_budget, strict=True)]
        curves.append(
            [
                {"budget": b, "tokens": one["reasoning_tokens"], "accuracy": one["total"]}
                for b, one in named
            ]
        )
    return curves


def scaling_table(evaluations: dict, budgets: list[int]) -> str:
    """Accuracy at each think budget, and both slopes, in points of accuracy per reasoning token."""
    rows = [["greedy", *[f"{budget} words" for budget in budgets], "slope, pinned", "slope"]]
    for setting, title in SETTINGS.items():
        curves = scaling_points(evaluations, setting, budgets)
        if curves:
            cells = []
            for points in zip(*curves, strict=True):
                accuracy, tokens = (
                    np.mean([point[name] for point in points]) for name in ("accuracy", "tokens")
                )
                cells.append(f"{accuracy:.1f} ({tokens:.0f} tokens)")
            fits = [scaling(points) for points in curves]
            for name in ("slope_pinned", "slope"):
                cells.append(written([fit[name] or math.nan for fit in fits], 3))
            rows.append([title, *cells])
    return table(rows)


def draw(evaluations: dict, training: dict, budgets: list[int], path: Path) -> None:
    """The scaling curve, greedy; accuracy, entropy, KL, keywords and length of the rollouts while
    training."""
    figure, axes = plt.subplots(2, 3, figsize=(16, 9))
    for setting, title in SETTINGS.items():
        curves = scaling_points(evaluations, setting, budgets)
        if curves:
            x, y = (
                [[point[name] for point in points] for points in curves]
                for name in ("tokens", "accuracy")
            )
            order = np.argsort(np.mean(x, axis=0))
            error = (
                np.std(y, axis=0, ddof=1) / math.sqrt(len(y))
                if len(y) > 1
                else np.zeros(len(budgets))
            )
            values = np.mean(x, axis=0)[order], np.mean(y, axis=0)[order], error[order]
            axes[0, 0].errorbar(
                *values, marker="o", ms=4, capsize=2, color=COLOURS[setting], label=title
            )
    title = f"greedy, think budgets of {', '.join(map(str, budgets))} words"
    axes[0, 0].set(title=title, xlabel="reasoning tokens used", ylabel="accuracy, %")
    axes[0, 0].legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.12))
    panels = {
        "reward/accuracy": "accuracy of the rollouts",
        "entropy": "entropy, nats a token",
        "kl": "KL to the base model, nats a token",
        "reward/keywords": "keywords reward",
        "completions/mean_length": "tokens of a completion",
    }
    for axis, (tag, title) in zip(axes.flat[1:], panels.items(), strict=True):
        for setting in SETTINGS:
            curves = [
                [row[tag] for row in rows]
                for (name, _), rows in training.items()
                if name == setting
            ]
            if curves:
                mean = np.mean(curves, axis=0)
                smooth = np.convolve(mean, np.ones(5) / 5, mode="valid")  # five iterations
                axis.plot(np.arange(5, len(mean) + 1), smooth, color=COLOURS[setting])
        axis.set(title=title, xlabel="iteration")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main(worlds: Path, runs: Path, out: Path) -> None:
    evaluations, training, commits, budgets = read_all(runs)
    if not evaluations:
        sys.exit(f"error: {runs}: no finished evaluation of benchmark/audio_mini.sh in it")
    figures = [*COLUMNS, "low", "high", *REWARDS[1:], "reasoning_tokens", "rambling"]
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(
            file, ("setting", "seed", "way", "budget", *figures), extrasaction="ignore"
        )
        writer.writeheader()
        for (setting, seed, way, budget), found in sorted(evaluations.items()):
            writer.writerow(
                {"setting": setting, "seed": seed, "way": way, "budget": budget} | found
            )
    seeds = sorted({key[1] for key in evaluations})
    built = {
        seed: json.loads((worlds / f"audio{seed}" / "world.json").read_text()) for seed in seeds
    }
    count = sum(facts["heldout_questions"] for facts in built.values())
    text = "## Accuracy per task, percent (layout of the ADRPO paper's Table 2)\n\n"
    methods = ["base", "grpo", "adrpo", "grpo-cesar", "adrpo-cesar"]
    text += "\n".join(accuracy_table(evaluations, way, methods) for way in WAYS)
    text += "\n## Clip range of the advantage (layout of its Table 3)\n\n"
    text += "\n".join(
        accuracy_table(evaluations, way, ["adrpo-k0.5", "adrpo", "adrpo-k2"]) for way in WAYS
    )
    text += f"\n## Differences on the same base model\n\n{difference_table(evaluations)}"
    text += "\n## Rewards of the process, and the policy\n\n"
    text += "\n".join(process_table(evaluations, training, way) for way in WAYS)
    text += f"\n## Think budgets\n\n{scaling_table(evaluations, budgets)}"
    text += (
        f"\nMean ± standard error over the base models of seeds {', '.join(map(str, seeds))}, one "
        "run each; "
    )
    text += (
        f"{count} held-out questions in all. p: paired t-test over base models, and McNemar's "
        "exact test over the "
    )
    text += (
        "questions, which does not know that runs differ; not corrected for the number of "
        "comparisons. "
    )
    text += f"{len(training)} runs, commit {', '.join(commits)}.\n"
    out.with_suffix(".md").write_text(text)
    print(text)
    draw(evaluations, training, budgets, out.with_suffix(".png"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
