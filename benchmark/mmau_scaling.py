"""Accuracy of an audio model against the reasoning that it is allowed: CESAR's scaling curve.

    python benchmark/mmau_scaling.py runs/curve --think-budgets 0 25 50 100 150 200 250 \\
        --adapter runs/NAME/final --eval-data mmau-test-mini.json

evaluates adrpo_audio_mmau.py --eval-only once for each budget of words, in OUT/BBB, with the flags
of that script (the sweep goes on where it was interrupted), and writes

    OUT/scaling.json   the points; the sweet spot; the slope in points of accuracy per reasoning
                       token twice: with the intercept pinned at the direct answer's accuracy
                       (CESAR's fit), and by ordinary least squares
    OUT/scaling.png    accuracy with its 95 % interval against the mean number of reasoning tokens
    OUT/scaling.md     the table
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import adrpo_audio_mmau as script


@dataclasses.dataclass
class Args:
    out: tyro.conf.Positional[Path]
    """folder that receives a run for each budget, and the curve"""
    think_budgets: tuple[int, ...] = (0, 25, 50, 75, 100, 125, 150, 175, 200, 225, 250)
    """words allowed for reasoning (CESAR's); 0 asks for a direct answer"""


def read_point(folder: Path, budget: int) -> dict:
    """Budget, reasoning tokens used, accuracy and its interval of a finished evaluation."""
    summary = json.loads((folder / "summary.json").read_text())
    tokens = summary["final"]["reasoning_tokens"]
    return {"budget": budget, "tokens": tokens, **summary["scores"]["total"]["total"]}


def scaling(points: list[dict]) -> dict[str, float | None]:
    """Test-time scaling of points {budget, tokens, accuracy}: the sweet spot, and both slopes in
    points of accuracy per reasoning token; None where the points give none."""
    x = np.array([point["tokens"] for point in points], dtype=float)
    y = np.array([point["accuracy"] for point in points], dtype=float)
    best = points[int(y.argmax())]
    result = {"sweet_spot_tokens": best["tokens"], "sweet_spot_accuracy": best["accuracy"]}
    direct = [point["accuracy"] for point in points if point["budget"] == 0]
    pinned = direct and (x**2).sum() > 0
    result["slope_pinned"] = float((x * (y - direct[0])).sum() / (x**2).sum()) if pinned else None
    result["slope"] = float(np.polyfit(x, y, 1)[0]) if np.ptp(x) > 0 else None
    return result


def written(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def draw(points: list[dict], fit: dict, path: Path) -> None:
    """Accuracy with its interval against the reasoning tokens used, budgets as labels."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    x, y = [point["tokens"] for point in points], [point["accuracy"] for point in points]
    below = [point["accuracy"] - point["low"] for point in points]
    above = [point["high"] - point["accuracy"] for point in points]
    axis.errorbar(x, y, (below, above), fmt="o", capsize=3)
    for point in points:
        axis.annotate(f" {point['budget']}", (point["tokens"], point["accuracy"]), fontsize=8)
    best = fit["sweet_spot_tokens"], fit["sweet_spot_accuracy"]
    axis.plot(*best, "*", ms=14, color="tab:red", label="sweet spot")
    slopes = f"slope {written(fit['slope'])}, pinned at the direct answer "
    axis.set(title=slopes + written(fit["slope_pinned"]), ylabel="accuracy, %")
    axis.set(xlabel="reasoning tokens used (labels: words allowed)")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def table(points: list[dict], fit: dict) -> str:
    """The points in Markdown."""
    lines = ["| words allowed | reasoning tokens | accuracy | 95 % interval |", "|---|---|---|---|"]
    for point in points:
        interval = f"{point['low']:.1f} to {point['high']:.1f}"
        cells = f"{point['budget']} | {point['tokens']:.1f} | {point['accuracy']:.2f} | {interval}"
        lines.append(f"| {cells} |")
    slopes = f"Slope {written(fit['slope'])}, pinned {written(fit['slope_pinned'])} points a token."
    return "\n".join([*lines, "", slopes, ""])


def main(args: Args, flags: list[str]) -> None:
    """Evaluate each budget that is not done; then the curve. flags: of the script."""
    points = []
    for budget in args.think_budgets:
        own = ["--eval-only", "--think-budget", str(budget)]
        own += ["--output-dir", str(args.out), "--run-name", f"{budget:03d}"]
        folder = args.out / f"{budget:03d}"
        if not (folder / "summary.json").exists():
            script.main(tyro.cli(script.Args, args=[*flags, *own]))
        if os.environ.get("RANK", "0") == "0":
            points.append(read_point(folder, budget))
    if len(points) > 1:
        fit = scaling(points)
        text = json.dumps({"points": points} | fit, indent=2, allow_nan=False)
        (args.out / "scaling.json").write_text(text)
        (args.out / "scaling.md").write_text(table(points, fit))
        draw(points, fit, args.out / "scaling.png")
        print(table(points, fit))


if __name__ == "__main__":
    args, flags = tyro.cli(Args, description=__doc__.partition("\n")[0], return_unknown_args=True)
    try:
        main(args, flags)
    except script.InputError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
