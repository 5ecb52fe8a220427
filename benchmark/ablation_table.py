"""Mean and standard error over seeds of runs named SETTING--seedN.

python benchmark/ablation_table.py RUNS_DIR OUT.md

`gain` is the rise of the mean reward over the base model's, in standard deviations of the base
model's rewards.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

FIGURES = ("reward", "judge_reward", "gain", "relative_diversity", "classes", "frechet", "w2")


def main(runs: Path, out: Path) -> None:
    groups, commits = defaultdict(list), set()
    for path in sorted(runs.glob("*--seed*/summary.json")):
        summary = json.loads(path.read_text())
        record = json.loads((path.parent / "args.json").read_text())
        commits.add((record["git_commit"] or "unknown")[:8])
        base_mean, spread = summary["base"]["reward"], summary["run"]["base_reward_std"]
        for name, result in summary["methods"].items():
            result["gain"] = (result["reward"] - base_mean) / spread
            setting = path.parent.name.split("--")[0]
            groups[setting, name].append([result[figure] for figure in FIGURES])
    columns = " | ".join(FIGURES)
    lines = [f"| setting | method | seeds | {columns} |", "|---" * (len(FIGURES) + 3) + "|"]
    for (setting, method), rows in groups.items():
        values = np.array(rows)
        cells = [f"{mean:.3f}" for mean in values.mean(axis=0)]
        if len(values) > 1:
            errors = values.std(axis=0, ddof=1) / np.sqrt(len(values))
            cells = [f"{cell} ± {error:.3f}" for cell, error in zip(cells, errors, strict=True)]
        lines.append(f"| {setting} | {method} | {len(values)} | {' | '.join(cells)} |")
    lines.append(f"\nMean ± standard error over seeds, commit {', '.join(sorted(commits))}.\n")
    out.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
