"""Tables and figures of the text sweep, from what the runs of benchmark/llm_mini.sh left behind.

    python benchmark/llm_mini_table.py WORLDS RUNS OUT

writes OUT.csv (a row per run), OUT.md (means and standard errors over base models and seeds; adrpo
against grpo, paired), OUT.png (reward against entropy, reward and entropy over the iterations: the
layout of the paper's Fig. 4) and OUT_coefficient.png (the coefficients of one run of each k).
Figures are of the last evaluation, on held-out prompts.

    reward       sort: share of right answers; trap: 0.3 for ascending, 1 for descending answers
    escaped      trap: share of runs with more descending than ascending answers in the end
    iterations   trap: until the first evaluation that finds it escaped; not escaped counts as one
                 evaluation later
    KL, entropy  nats a token, KL to the base model (k3); distinct-2: different pairs of tokens
                 among a prompt's answers
"""

import csv
import itertools
import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAME = re.compile(
    r"(?P<task>sort|trap)(?P<base>\d+)-(?P<setting>(adrpo|grpo)-.*)-seed(?P<seed>\d+)"
)
FIGURES = ("reward", "escaped", "iterations", "kl", "entropy", "distinct_2")
TITLES = {"kl": "KL", "distinct_2": "distinct-2"}


def read_run(folder: Path) -> dict:
    """The figures of one finished run, and its curves under "curves"."""
    match = NAME.fullmatch(folder.name).groupdict()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "eval/reward" in row]
    run = {key: match[key] for key in ("task", "base", "setting", "seed")}
    run |= {
        name: evaluations[-1][f"eval/{name}"] for name in ("reward", "kl", "entropy", "distinct_2")
    }
    if match["task"] == "trap":
        found = [
            row["step"]
            for row in evaluations
            if row["eval/reward_descending"] > row["eval/reward_ascending"]
        ]
        run["escaped"] = float(
            evaluations[-1]["eval/reward_descending"] > evaluations[-1]["eval/reward_ascending"]
        )
        late = 2 * evaluations[-1]["step"] - evaluations[-2]["step"]
        run["iterations"] = float(found[0] if found else late)
    run["curves"] = {
        name: [row[f"eval/{name}"] for row in evaluations] for name in ("reward", "entropy")
    }
    run["steps"] = [row["step"] for row in evaluations]
    return run


def order(setting: str) -> tuple:
    """grpo first, by beta0, then by k."""
    method, beta0, clip = (setting.split("-") + ["k1"])[:3]
    return method == "adrpo", float(beta0), float(clip[1:])


def written(values: list[float]) -> str:
    """mean ± standard error."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return (
        f"{np.mean(values):.3f} ± {error:.3f}"
        if max(values) < 10
        else f"{np.mean(values):.0f} ± {error:.0f}"
    )


def table(rows: list[list[str]]) -> str:
    """Markdown; the first row is the head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def settings_table(runs: list[dict], worlds: Path) -> str:
    """Means over the runs of each setting, per task."""
    text = ""
    for task, of_task in itertools.groupby(
        sorted(runs, key=lambda run: run["task"]), key=lambda run: run["task"]
    ):
        of_task = list(of_task)
        figures = [name for name in FIGURES if name in of_task[0]]
        base = {
            run["base"]: json.loads((worlds / f"{task}{run['base']}" / "world.json").read_text())
            for run in of_task
        }
        rows = [["setting", "runs", *[TITLES.get(name, name) for name in figures]]]
        for setting in sorted({run["setting"] for run in of_task}, key=order):
            some = [run for run in of_task if run["setting"] == setting]
            cells = [written([run[name] for run in some]) for name in figures]
            rows.append([setting, str(len(some)), *cells])
        rates = [
            f"{number}: ascending {facts['figures']['ascending, sampled']:.3f}, descending "
            f"{facts['figures']['descending, sampled']:.4f}"
            for number, facts in sorted(base.items())
        ]
        start = np.mean([run["curves"]["reward"][0] for run in of_task])
        text += (
            f"## {task}\n\nBase models ({'; '.join(rates)}); reward before training {start:.3f}.\n"
            f"\n{table(rows)}\n"
        )
    return text


def paired(runs: list[dict], task: str, one: str, other: str) -> list[str]:
    """one - other over the base models and seeds that both have: differences, paired t-test, who
    wins, escapes."""
    found = {(run["setting"], run["base"], run["seed"]): run for run in runs if run["task"] == task}
    keys = sorted(
        {key[1:] for key in found if key[0] == one} & {key[1:] for key in found if key[0] == other}
    )
    pairs = [(found[one, *key], found[other, *key]) for key in keys]
    cells = [task, f"{one} - {other}", str(len(pairs))]
    for name in ("reward", "kl", "entropy", "iterations"):
        if name not in pairs[0][0]:
            cells.append("-")
            continue
        difference = [a[name] - b[name] for a, b in pairs]
        p = stats.ttest_1samp(difference, 0).pvalue if np.std(difference) > 0 else math.nan
        cells.append(f"{written(difference)} (p {p:.2g})")
    won = sum(a["reward"] > b["reward"] for a, b in pairs)
    cells.append(f"{won} of {len(pairs)}")
    if "escaped" in pairs[0][0]:
        counts = [sum(pair[i]["escaped"] for pair in pairs) for i in (0, 1)]
        p = stats.fisher_exact([[count, len(pairs) - count] for count in counts]).pvalue
        cells.append(f"{counts[0]:.0f} / {counts[1]:.0f} (p {p:.2g})")
    else:
        cells.append("-")
    return cells


def curves(runs: list[dict], path: Path) -> None:
    """Reward against entropy, reward and entropy over the iterations; mean and standard error; a
    row per task."""
    tasks = sorted({run["task"] for run in runs})
    shown = [
        "grpo-0",
        "grpo-0.04",
        "grpo-0.08",
        "grpo-0.3",
        "adrpo-0.04",
        "adrpo-0.04-k2",
        "adrpo-0.3",
    ]
    names = ("grey", "tab:blue", "navy", "tab:cyan", "tab:red", "tab:purple", "tab:orange")
    colours = dict(zip(shown, names, strict=True))
    figure, axes = plt.subplots(len(tasks), 3, figsize=(15, 4.2 * len(tasks)), squeeze=False)
    for row, task in enumerate(tasks):
        for setting in shown:
            some = [run for run in runs if run["task"] == task and run["setting"] == setting]
            if not some:
                continue
            values = {
                name: np.array([run["curves"][name] for run in some])
                for name in ("reward", "entropy")
            }
            style = {"color": colours[setting], "label": setting}
            axes[row, 0].plot(
                values["entropy"].mean(0), values["reward"].mean(0), marker="o", ms=3, **style
            )
            for column, name in ((1, "reward"), (2, "entropy")):
                mean, error = (
                    values[name].mean(0),
                    values[name].std(0, ddof=1) / math.sqrt(len(some)),
                )
                axes[row, column].plot(some[0]["steps"], mean, **style)
                axes[row, column].fill_between(
                    some[0]["steps"],
                    mean - error,
                    mean + error,
                    color=colours[setting],
                    alpha=0.15,
                    lw=0,
                )
        names = [
            ("entropy, nats a token", "reward"),
            ("iteration", "reward"),
            ("iteration", "entropy, nats a token"),
        ]
        for axis, (x, y) in zip(axes[row], names, strict=True):
            axis.set(xlabel=x, ylabel=y, title=f"{task}: held-out {y.split(',')[0]}")
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def coefficients(runs: Path, path: Path) -> None:
    """What the KL coefficient of the completions was in one run of the trap for each k, from its
    TensorBoard events."""
    settings = [
        ("grpo-0.04", "grpo"),
        *[(f"adrpo-0.04{k}", f"adrpo, k = {k[2:] or 1}") for k in ("-k0.5", "", "-k2")],
    ]
    figure, axes = plt.subplots(1, len(settings), figsize=(14, 3), sharey=True)
    edges = np.linspace(-0.06, 0.14, 41)
    for axis, (setting, title) in zip(axes, settings, strict=True):
        events = EventAccumulator(str(runs / f"trap4-{setting}-seed1"), {HISTOGRAMS: 0}).Reload()
        counts = np.zeros(len(edges) - 1)
        for event in events.Histograms("adrpo/coefficient"):
            value = event.histogram_value
            # A bucket's upper end.
            middles = [min(max(limit, value.min), value.max) for limit in value.bucket_limit]
            counts += np.histogram(middles, edges, weights=value.bucket)[0]
        axis.bar(edges[:-1], counts / counts.sum(), np.diff(edges), align="edge", color="tab:red")
        axis.set(title=f"{title}, beta0 = 0.04", xlabel="KL coefficient of a completion")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of completions")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(worlds: Path, folder: Path, out: Path) -> None:
    finished = sorted(
        file.parent for file in folder.glob("*/summary.json") if NAME.fullmatch(file.parent.name)
    )
    runs = [read_run(path) for path in finished]
    commits = {json.loads((path / "args.json").read_text())["git_commit"][:8] for path in finished}
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(
            file, ("task", "base", "setting", "seed", *FIGURES), extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows(runs)
    text = settings_table(runs, worlds)
    by_task = defaultdict(set)
    for run in runs:
        by_task[run["task"]].add(run["setting"])
    head = [
        "task",
        "difference",
        "pairs",
        "reward",
        "KL",
        "entropy",
        "iterations",
        "higher reward",
        "escaped",
    ]
    rows = [head]
    for task, settings in sorted(by_task.items()):
        for setting in sorted(settings, key=order):
            method, beta0, *_ = setting.split("-")
            # The same beta0, and twice: with k = 1 that is the coefficient of adrpo's worse
            # completions.
            for other in (f"grpo-{beta0}", f"grpo-{2 * float(beta0):g}"):
                if method == "adrpo" and other in settings:
                    rows.append(paired(runs, task, setting, other))
    text += f"## adrpo against grpo, same base model and seed\n\n{table(rows)}\n"
    text += (
        "Mean ± standard error over base models and seeds; p of a paired t-test, of Fisher's "
        "exact test for escapes, "
    )
    text += (
        f"not corrected for the number of comparisons. {len(runs)} runs, commit "
        f"{', '.join(sorted(commits))}.\n"
    )
    out.with_suffix(".md").write_text(text)
    print(text)
    curves(runs, out.with_suffix(".png"))
    coefficients(folder, out.with_name(f"{out.name}_coefficient.png"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
