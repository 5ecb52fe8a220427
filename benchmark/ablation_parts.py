"""Which of ADRPO's two parts does the work: functions of a script replaced, then its `main` called.

    python benchmark/ablation_parts.py toy RUNS --data-dir data/mnist
    python benchmark/ablation_parts.py images RUNS --world worlds/digits
    python benchmark/ablation_parts.py text RUNS --world worlds
    python benchmark/ablation_parts.py orw RUNS --data-dir data/mnist
    python benchmark/ablation_parts.py table RUNS --out benchmark/results/ablation_parts

One process, one run after the other; finished runs are skipped. Everything below was fixed before
the first run.

ADRPO for flow matching, A |v - u|^2 + (beta0 - A) |v - v_ref|^2, differs from reward weighting with
a fixed divergence weight (ORW-CFM-W2), w |v - u|^2 + beta0 |v - v_ref|^2, w = exp(tau R) of mean 1,
in two parts: what weights the samples, and what weights the divergence. So four corners:

    adrpo            A and beta0 - A
    fixed            A and beta0: the divergence weight does not adapt
    weighted         w and beta0 - A: the samples are weighted as in ORW-CFM-W2
    orw              w and beta0 (the script's own orw, alpha = beta0)
    positive         as adrpo, A cut to max(A, 0): bad samples are not learnt from

Only adrpo and orw have a minimum whatever the rewards. As a function of v the curvature of `fixed`
is A + beta0 and that of `weighted` w + beta0 - A: negative for bad samples in the first, for some
good ones in the second, and then the loss has no lower bound. This is a limit of these two forms.
They are kept defined by clipping A to +-0.9 beta0 (settings *-clip), adrpo with them: at equal
beta0 the corners then differ in one part only. The clip costs something itself (adrpo against
adrpo-clip). The toy runs both without it as well (fixed-raw, weighted-raw): what comes of it, with
the gradient's norm clipped at 1, is a finding, not a method. adrpo and fixed with the same A have
the same gradient at v = v_ref and part only where v has left it.

`toy`: 45 iterations (half of the default: adrpo has its reward after 20), otherwise the defaults;
strengths as listed in TOY. Added after the first seeds: adrpo-more, the ends of adrpo's line,
without which the others lay outside; and, since fixed-raw was better than adrpo, both over 180
iterations (*-long), to see whether it stays bounded. Base models of the seeds 1 to 3, trained
here. `images`: 25 iterations (half of the sweep's), 8 images a held-out prompt instead of 16,
otherwise benchmark/sd3_mini.sh's flags; seeds 1 to 3. Its fixed-raw (A clipped at +-1) was added
after the others had been seen.

`orw`: two claims of ORW-CFM-W2, in the toy, without a divergence term (alpha = 0), the default 90
iterations, base models of `toy` (run that first): tau = 0, 0.01, 10 (theirs) and 300 (the
script's); and at the last two the same offline, every rollout drawn from the base model (`sample`
replaced).

`text`: the paper's coefficient beta0 - clip(A, +-beta0) saturates, since group-normalised
advantages are of size 1: it is 0 or 2 beta0. Here beside it the graded beta0 (1 - clip(A, +-1)), of
the same range and mean, and grpo's beta0. The trap of benchmark/mini_world_llm.py and the flags of
benchmark/llm_mini.sh, an evaluation every 50 iterations; base models of the seeds 21, 22, 23 at
--rare 0.015 (never used before; 11 and 12 were, in pilots), five seeds each. The questions, paired
over base models and seeds: is the final held-out reward of graded higher than adrpo's at beta0 =
0.04? Then the same at 0.3, where adrpo had been worse than grpo. And entropy, KL and escapes beside
it. Bases are the inner loop, seeds the outer one: a sweep that is cut short is cut in seeds.
"""

import contextlib
import csv
import dataclasses
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import torch
import tyro
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts are imported where they are used: one at a time
CLIP = 0.9  # of beta0; below 1 both curvatures stay positive
TEXT_SEEDS, TEXT_BASES = (1, 2, 3, 4, 5), (21, 22, 23)


@dataclasses.dataclass
class Args:
    what: tyro.conf.Positional[Literal["toy", "images", "text", "orw", "table"]]
    """which runs; table: figures of all that are finished"""
    runs: tyro.conf.Positional[Path]
    """folder of the runs, the same for all"""
    data_dir: str = "data/mnist"
    """toy: MNIST's IDX files"""
    world: Path = Path("worlds")
    """images: folder of mini_world_sd3.py; text: folder that has, or receives, the base models"""
    seeds: tuple[int, ...] | None = None
    """default: 1 2 3; text: 1 to 5"""
    beta0: tuple[float, ...] = (0.04, 0.3)
    """text: the coefficients, one after the other"""
    iterations: int | None = None
    """default: toy 45, images 25, text 250, orw 90"""
    out: Path = Path("benchmark/results/ablation_parts")
    """table: its files, without an ending"""


# ------------------------------------------------------------------------- the replaced functions
def fixed_loss(script) -> Callable:
    """A |v - u|^2 + beta0 |v - v_ref|^2 in place of adrpo_fm_loss."""

    def adrpo_fm_loss(v, v_ref, u, advantage, beta0):
        return script.orw_fm_loss(v, v_ref, u, advantage, beta0)

    return adrpo_fm_loss


def weighted_loss(script) -> Callable:
    """w |v - u|^2 + (beta0 - A) |v - v_ref|^2; its `advantage` is A + i w, see `with_weights`."""

    def adrpo_fm_loss(v, v_ref, u, advantage, beta0):
        return script.orw_fm_loss(v, v_ref, u, advantage.imag, beta0 - advantage.real)

    return adrpo_fm_loss


def with_weights(script, tau: float) -> dict[str, Callable]:
    """group_advantage that hands A + i w to the loss, w ORW-CFM-W2's weights of the same rewards:
    so both travel through `main` as one number a sample."""
    group_advantage, statistics = script.group_advantage, script.adrpo_statistics
    in_spreads = script.SCRIPT == "adrpo_fm_sd3"  # its orw has tau in units of the batch's spread

    def both(rewards, *options):
        unit = rewards.std() + 1e-4 if in_spreads else 1.0
        return torch.complex(
            group_advantage(rewards, *options), script.orw_weights(rewards / unit, tau)
        )

    def statistics_of_real(advantage, beta0):
        return statistics(advantage.real, beta0)

    return {"group_advantage": both, "adrpo_statistics": statistics_of_real}


def positive_advantage(script) -> Callable:
    """group_advantage with negative advantages cut to zero."""
    group_advantage = script.group_advantage

    def cut(rewards, *options) -> Tensor:
        return group_advantage(rewards, *options).clamp(min=0)

    return cut


def graded_beta(advantage: Tensor, beta0: float, clip_k: float | None = 1.0) -> Tensor:
    """beta0 (1 - clip(A, +-1)) in place of adaptive_beta: 0 to 2 beta0, in between for |A| < 1."""
    return (beta0 * (1 - advantage.clamp(-1, 1))).detach()


def offline_sample(script) -> Callable:
    """sample whose rollouts come from the base model, which is the first that `main` samples;
    evaluations, told by their number of samples, stay those of the policy."""
    sample, base = script.sample, []

    def sample_offline(velocity, noise, num_steps):
        base.append(velocity)
        rollout = len(noise) == script.Args.group_size
        return sample(base[0] if rollout else velocity, noise, num_steps)

    return sample_offline


def replacements(script, kind: str, tau: float) -> dict[str, Callable]:
    """The functions of `script` that a kind of run replaces, by name."""
    if kind == "fixed":
        return {"adrpo_fm_loss": fixed_loss(script)}
    if kind == "weighted":
        return {"adrpo_fm_loss": weighted_loss(script), **with_weights(script, tau)}
    if kind == "positive":
        return {"group_advantage": positive_advantage(script)}
    if kind == "offline":
        return {"sample": offline_sample(script)}
    return {"adaptive_beta": graded_beta} if kind == "graded" else {}


def run(script, args, kind: str, tau: float = 1.0) -> None:
    """One run of a script with a kind's replacements, unless it is finished."""
    folder = Path(args.output_dir) / args.run_name
    if (folder / "summary.json").exists():
        return
    if folder.exists():  # a rest of an interrupted call
        folder.rename(folder.with_name(f"{folder.name}.broken{time.time():.0f}"))
    started, used = time.perf_counter(), time.process_time()
    print(f"--- {args.run_name}", flush=True)
    try:
        with contextlib.ExitStack() as replaced:
            for name, function in replacements(script, kind, tau).items():
                replaced.enter_context(mock.patch.object(script, name, function))
            script.main(args)
    except script.InputError as error:  # the *-raw settings may diverge
        print(f"{args.run_name}: {error}", flush=True)
        (folder / "diverged.txt").write_text(str(error))
        return
    cost = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - used}
    (folder / "cost.json").write_text(json.dumps(cost))


# --------------------------------------------------------------------------------------- the runs
# Setting: kind, then flags. LINE: adrpo as it is, for comparisons at equal reward.
TOY = {
    "adrpo": ("", {"beta0": (0.05, 0.1, 0.3)}),
    "adrpo-more": ("", {"beta0": (0.02, 1.0)}),
    "adrpo-clip": ("", {"beta0": (0.1, 0.3), "adv_clip_k": CLIP}),
    "fixed-clip": ("fixed", {"beta0": (0.1, 0.3), "adv_clip_k": CLIP}),
    "weighted-clip": ("weighted", {"beta0": (0.1, 0.3), "adv_clip_k": CLIP}),
    "orw": ("", {"methods": ("orw",), "alpha": (0.1, 0.3)}),
    "positive": ("positive", {"beta0": (0.1, 0.3)}),
    "fixed-raw": ("fixed", {"beta0": (0.1,)}),
    "weighted-raw": ("weighted", {"beta0": (0.1,)}),
    "adrpo-long": ("", {"beta0": (0.1,), "iterations": 180}),
    "fixed-raw-long": ("fixed", {"beta0": (0.1,), "iterations": 180}),
}
IMAGES = {
    "adrpo-0.1": ("", {"beta0": 0.1, "adv_clip_k": 10.0}),
    "adrpo-0.25": ("", {"beta0": 0.25, "adv_clip_k": 4.0}),
    "adrpo-0.5": ("", {"beta0": 0.5, "adv_clip_k": 2.0}),
    "adrpo-clip-0.3": ("", {"beta0": 0.3, "adv_clip_k": CLIP}),
    "fixed-clip-0.3": ("fixed", {"beta0": 0.3, "adv_clip_k": CLIP}),
    "weighted-clip-0.3": ("weighted", {"beta0": 0.3, "adv_clip_k": CLIP}),
    "orw-0.3": ("", {"method": "orw", "alpha": 0.3}),
    "positive-0.1": ("positive", {"beta0": 0.1, "adv_clip_k": 10.0}),
    "fixed-raw-0.1": ("fixed", {"beta0": 0.1, "adv_clip_k": 10.0}),
    "fixed-raw-0.25": ("fixed", {"beta0": 0.25, "adv_clip_k": 4.0}),
}
LINE = ("base", "adrpo-more-0.02", "adrpo-more-1")
LINE += tuple(f"adrpo-{beta0}" for beta0 in (0.05, 0.1, 0.25, 0.3, 0.5))
TAUS = (0.0, 0.01, 10.0, 300.0)
IMAGES_TAU = 3.0  # the sweep's


def run_toy(args: Args) -> None:
    """All settings of the toy; a seed's first run trains the base models for the others."""
    import toy_mnist_flow as toy

    for seed in args.seeds or (1, 2, 3):
        base = args.runs / f"adrpo--seed{seed}"
        for setting, (kind, flags) in TOY.items():
            options = {"methods": ("adrpo",)}
            options |= {"output_dir": str(args.runs), "run_name": f"{setting}--seed{seed}"}
            options |= {"seed": seed, "dataset": "mnist", "data_dir": args.data_dir}
            options |= {"iterations": args.iterations or 45, "eval_every": 45} | flags
            if setting != "adrpo":
                options["pretrained"] = str(base)
            run(toy, toy.Args(**options), kind, toy.Args.tau)


def run_orw(args: Args) -> None:
    """Reward weighting without a divergence term: tau, online and offline."""
    import toy_mnist_flow as toy

    for seed in args.seeds or (1, 2, 3):
        for kind, tau in [("online", tau) for tau in TAUS] + [("offline", tau) for tau in TAUS[2:]]:
            options = {"methods": ("orw",), "alpha": (0.0,), "tau": tau, "eval_every": 90}
            options |= {"output_dir": str(args.runs), "run_name": f"{kind}-{tau:g}--seed{seed}"}
            options |= {"seed": seed, "dataset": "mnist", "data_dir": args.data_dir}
            options |= {"iterations": args.iterations or 90}
            options["pretrained"] = str(args.runs / f"adrpo--seed{seed}")
            run(toy, toy.Args(**options), kind)


def run_images(args: Args) -> None:
    """All settings of the small image world."""
    os.environ["MINI_WORLD"] = str(args.world)
    import adrpo_fm_sd3 as images

    world = args.world
    common = {"cpu": True, "precision": "fp32", "model_id": f"{world}/model"}
    common |= {"clip_model": f"local-dir:{world}/clip", "prompts": f"{world}/train_prompts.txt"}
    common |= {"eval_prompts": f"{world}/heldout_prompts.txt", "max_sequence_length": 8}
    common |= {"resolution": 32, "guidance_scale": 1.0, "num_steps": 10, "eval_steps": 10}
    common |= {"eval_images": 8, "eval_max_prompts": 31, "prompts_per_update": 12}
    common |= {"eval_metrics": (f"{ROOT}/benchmark/mini_world_sd3.py:accepted",)}
    common |= {"group_size": 8, "rollout_batch": 96, "train_batch": 96, "lora_rank": 16}
    common |= {"lora_alpha": 16, "timesteps_per_sample": 1, "learning_rate": 1e-3}
    common |= {"iterations": args.iterations or 25, "eval_every": 1000, "save_every": 1000}
    common |= {"tau": IMAGES_TAU, "output_dir": str(args.runs)}
    for seed in args.seeds or (1, 2, 3):
        for setting, (kind, flags) in IMAGES.items():
            options = common | {"seed": seed, "run_name": f"images-{setting}--seed{seed}"} | flags
            run(images, images.Args(**options), kind, IMAGES_TAU)


def run_text(args: Args) -> None:
    """grpo, adrpo and the graded coefficient on the trap."""
    import adrpo_grpo_llm as text
    from benchmark import mini_world_llm as world

    for base in TEXT_BASES:
        folder = args.world / f"trap{base}"
        if not (folder / "world.json").exists():
            world.main(world.Args(folder, task="trap", rare=0.015, seed=base))
    plug_in = f"{ROOT}/benchmark/mini_world_llm.py"
    common = {"cpu": True, "precision": "fp32", "output_dir": str(args.runs)}
    common |= {"max_prompt_length": 8, "max_completion_length": 8, "group_size": 8}
    common |= {"rollout_batch": 512, "eval_max_prompts": 128, "eval_samples": 4}
    common |= {"save_every": 1000, "learning_rate": 1e-4, "prompts_per_update": 12}
    common |= {"iterations": args.iterations or 250, "eval_every": 50}
    common["reward"] = tuple(f"{plug_in}:{name}" for name in ("trap", "ascending", "descending"))
    common["reward_weights"] = (1.0, 0.0, 0.0)
    for beta0 in args.beta0:
        for seed in args.seeds or TEXT_SEEDS:
            for base in TEXT_BASES:
                folder = args.world / f"trap{base}"
                prompts = {"model_id": f"{folder}/model"}
                prompts["dataset"] = f"{folder}/train_prompts.jsonl"
                prompts["eval_dataset"] = f"{folder}/heldout_prompts.jsonl"
                for kind in ("adrpo", "graded", "grpo"):
                    options = common | prompts | {"beta0": beta0, "seed": seed}
                    options["method"] = "grpo" if kind == "grpo" else "adrpo"
                    options["run_name"] = f"text-{kind}-{beta0:g}-trap{base}--seed{seed}"
                    run(text, text.Args(**options), kind)


# ------------------------------------------------------------------------------------- the tables
def mean_and_error(values) -> str:
    """mean ± standard error of the finite values, and how many where it is not all."""
    values = np.array(values, dtype=float)
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "-"
    few = "" if len(finite) == len(values) else f" (n={len(finite)})"
    text = f"{finite.mean():.3f}"
    if len(finite) > 1:
        text += f" ± {finite.std(ddof=1) / math.sqrt(len(finite)):.3f}"
    return text + few


def markdown(rows: list[list]) -> list[str]:
    """Lines of a table; the first row is the head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def flow_rows(runs: Path, part: str) -> list[dict]:
    """A row per fine-tuning and seed of the toy or the images, and one per base model."""
    rows = {}
    for path in sorted(runs.glob("*--seed*/summary.json")):
        name, _, seed = path.parent.name.rpartition("--seed")
        kind = name.split("-")[0]
        found_in = {"text": "text", "images": "images", "online": "orw", "offline": "orw"}
        if found_in.get(kind, "toy") != part:
            continue
        summary = json.loads(path.read_text())
        if part == "images":
            judge, relative = "accepted", "clip_diversity_ratio"
            results = {name.removeprefix("images-"): summary["final"]}
        elif part == "orw":
            judge, relative = "judge_reward", "relative_diversity"
            results = {name: summary["methods"]["orw-0"]}
        else:
            judge, relative = "judge_reward", "relative_diversity"
            results = summary["methods"]
            strengths = [result.rpartition("-")[2] for result in results]
            results = {f"{name}-{s}": r for s, r in zip(strengths, results.values(), strict=True)}
        for setting, found in {"base": summary["base"], **results}.items():
            row = {"part": part, "setting": setting, "seed": int(seed)}
            row |= {"reward": found["reward"], "judge": found[judge]}
            row |= {"relative diversity": found[relative], "W2": found["w2"]}
            if part != "images":
                row |= {"classes": found["classes"], "Fréchet": found["frechet"]}
            rows[setting, seed] = row
    of_orw = [f"{kind}-{tau:g}" for kind in ("online", "offline") for tau in TAUS]
    order = ["base", *{"toy": TOY, "images": IMAGES, "orw": of_orw}[part]]

    def rank(row: dict) -> tuple:
        names = [name for name in order if row["setting"].startswith(name)]
        return order.index(max(names, key=len)), row["setting"], row["seed"]

    return sorted(rows.values(), key=rank)


def at_equal_reward(rows: list[dict]) -> None:
    """Add each row's diversity minus that of adrpo at the same reward and seed (base model and
    adrpo's strengths joined by straight lines), and its W2 over adrpo's (joined in the logarithm);
    nan outside adrpo's range."""
    for row in rows:
        own = [r for r in rows if r["seed"] == row["seed"] and r["setting"] in LINE]
        own.sort(key=lambda r: r["reward"])
        at = [r["reward"] for r in own]
        inside = len(own) > 2 and row not in own and at[0] < row["reward"] <= at[-1]
        other = np.interp(row["reward"], at, [r["relative diversity"] for r in own])
        row["diversity - adrpo's"] = row["relative diversity"] - other if inside else math.nan
        tuned = [r for r in own if r["setting"] != "base"]  # the base model's W2 is 0
        at = [r["reward"] for r in tuned]
        inside = inside and at[0] < row["reward"]
        if inside:
            other = np.exp(np.interp(row["reward"], at, [math.log(r["W2"]) for r in tuned]))
        row["W2 / adrpo's"] = row["W2"] / other if inside else math.nan


def text_rows(runs: Path) -> list[dict]:
    """A row per run of the trap."""
    rows = []
    for path in sorted(runs.glob("text-*--seed*/summary.json")):
        _, kind, beta0, base, seed = path.parent.name.replace("--", "-").split("-")
        found = json.loads(path.read_text())["final"]
        row = {"part": "text", "setting": f"{kind}-{beta0}", "base": base, "seed": int(seed[4:])}
        row |= {name: found[name] for name in ("reward", "kl", "entropy", "distinct_2")}
        row["escaped"] = float(found["reward_descending"] > found["reward_ascending"])
        rows.append(row)
    return rows


def paired(rows: list[dict], one: str, other: str, figures: list[str]) -> list[str]:
    """One line: one - other over the seeds (and base models) that both have, with the p of a
    paired t-test."""
    from scipy import stats

    keys = {(row["setting"], row.get("base"), row["seed"]): row for row in rows}
    both = [key[1:] for key in keys if key[0] == one and (other, *key[1:]) in keys]
    cells = [f"{one} - {other}", str(len(both))]
    for name in figures:
        values = [keys[one, *key][name] - keys[other, *key][name] for key in both]
        cells.append(mean_and_error(values))
        if len(values) > 1 and np.std(values) > 0:
            cells[-1] += f" (p {stats.ttest_1samp(values, 0).pvalue:.2g})"
    return cells


def machine() -> str:
    """Cores and processor, as the system names it."""
    names = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{os.cpu_count()} cores, {names[0].partition(': ')[2]}, torch {torch.__version__}"


def write_table(args: Args) -> None:
    """OUT.csv, a row per fine-tuning; OUT.md, means, standard errors and paired differences."""
    out, everything, text = args.out, [], ["# Which of ADRPO's two parts does the work", ""]
    parts = {part: flow_rows(args.runs, part) for part in ("toy", "images", "orw")}
    differences = {"toy": [], "images": [], "orw": []}
    differences["images"] = [(f"fixed-raw-{b}", f"adrpo-{b}") for b in ("0.1", "0.25")]
    differences["toy"] += [("fixed-raw-0.1", "adrpo-0.1"), ("fixed-raw-long-0.1", "adrpo-long-0.1")]
    differences["orw"] = [(f"online-{tau:g}", f"offline-{tau:g}") for tau in TAUS[2:]]
    for beta0 in ("0.1", "0.3"):
        for part in ("toy", "images"):
            corners = [f"{name}-clip-{beta0}" for name in ("adrpo", "fixed", "weighted")]
            adrpo, fixed, weighted = corners
            differences[part] += [(adrpo, fixed), (adrpo, weighted), (fixed, f"orw-{beta0}")]
            differences[part] += [(weighted, f"orw-{beta0}"), (f"adrpo-{beta0}", adrpo)]
            differences[part] += [(f"adrpo-{beta0}", f"positive-{beta0}")]
    for part, rows in parts.items():
        if not rows:
            continue
        if part != "orw":
            at_equal_reward(rows)
        everything += rows
        figures = [key for key in rows[0] if key not in ("part", "setting", "seed")]
        groups = defaultdict(list)
        for row in rows:
            groups[row["setting"]].append(row)
        lines = [["setting", "seeds", *figures]]
        for setting, some in groups.items():
            cells = [mean_and_error([row[name] for row in some]) for name in figures]
            lines.append([setting, len(some), *cells])
        text += [f"## {part}", "", *markdown(lines), ""]
        names = [name for name in figures if "adrpo's" not in name]
        lines = [["difference, same seed", "pairs", *names]]
        known = [pair for pair in differences[part] if set(pair) <= groups.keys()]
        lines += [paired(rows, one, other, names) for one, other in known]
        text += [*markdown(lines), ""]
    rows = text_rows(args.runs)
    if rows:
        everything += rows
        figures = ["reward", "escaped", "kl", "entropy", "distinct_2"]
        lines = [["setting", "runs", *figures]]
        settings = list(dict.fromkeys(row["setting"] for row in rows))
        for setting in settings:
            some = [row for row in rows if row["setting"] == setting]
            lines.append(
                [setting, len(some), *[mean_and_error([row[n] for row in some]) for n in figures]]
            )
        text += ["## text: the trap, three base models", "", *markdown(lines), ""]
        lines = [["difference, same base model and seed", "pairs", *figures]]
        for beta0 in ("0.04", "0.3"):
            for one, other in (("graded", "adrpo"), ("graded", "grpo"), ("adrpo", "grpo")):
                if {f"{one}-{beta0}", f"{other}-{beta0}"} <= {*settings}:
                    lines.append(paired(rows, f"{one}-{beta0}", f"{other}-{beta0}", figures))
        text += [*markdown(lines), ""]
    finished = [path.with_name("args.json") for path in args.runs.glob("*--seed*/summary.json")]
    records = [json.loads(path.read_text()) for path in finished]
    commits = sorted({(record["git_commit"] or "unknown")[:8] for record in records})
    diverged = sorted(path.parent.name for path in args.runs.glob("*--seed*/diverged.txt"))
    costs = [json.loads(path.read_text()) for path in args.runs.glob("*--seed*/cost.json")]
    text += [
        f"Commands: `python benchmark/ablation_parts.py toy|images|text|table {args.runs}` (flags "
        f"in its head). Commit {', '.join(commits)}. Machine: {machine()}, one thread, one process "
        "beside other work; toy in the machine's `--precision auto`, the rest in float32. Mean ± "
        "standard error over seeds (text: over base models and seeds); p: paired t-test, not "
        "corrected for the number of comparisons. *judge*: toy, the second classifier's reward; "
        "images, the accepted share. *classes*: effective number of digits. The last two columns: "
        "against adrpo as it is at equal reward (its strengths joined by lines, per seed). "
        f"Diverged: {', '.join(diverged) or 'none'}. {len(costs)} runs, "
        f"{sum(cost['cpu'] for cost in costs) / 60:.0f} minutes of processor time.",
        "",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n".join(text))
    columns = list(dict.fromkeys(key for row in everything for key in row))
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(everything)
    print("\n".join(text))


def main(args: Args) -> None:
    torch.set_num_threads(1)
    parts = {"toy": run_toy, "images": run_images, "text": run_text, "orw": run_orw}
    (parts | {"table": write_table})[args.what](args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.partition("\n")[0]))
