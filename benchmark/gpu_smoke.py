"""Do the four scripts do on this GPU what they do on a CPU? Tiny random checkpoints, two
iterations each, once with `--cpu --precision fp32` and once on the GPU in bfloat16; the evaluations
of the base model, which see the same random numbers, are set side by side.

    python benchmark/gpu_smoke.py OUT.json          # a minute or two
    python benchmark/gpu_smoke.py OUT.json --cpu    # both on the CPU: does this program run?

Sampled tokens and images differ where rounding moves a threshold; figures should be close, no more.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import soundfile
import torch
import tyro

from tests import tiny_models

ROOT = Path(__file__).resolve().parent.parent
REWARDS = """
def dark(images, prompts, metadata):
    return 1 - images.mean((1, 2, 3))
def words(prompts, completions, rows):
    return [float(len(set(text.split()))) for text in completions]
"""
TEXT = "--max-prompt-length 16 --max-completion-length 10 --prompts-per-update 2 --group-size 4"
TEXT += " --eval-samples 4 --learning-rate 1e-3 --iterations 2 --eval-every 1"
IMAGE = "--resolution 32 --max-sequence-length 8 --lora-rank 4 --prompts-per-update 2"
IMAGE += " --group-size 4 --num-steps 2 --eval-steps 4 --iterations 2 --eval-every 1"
AUDIO = "--max-completion-length 12 --prompts-per-update 2 --group-size 4 --lora-rank 4"
AUDIO += " --iterations 2 --eval-every 1"
TOY = "--quick --dataset digits --methods adrpo"


@dataclasses.dataclass
class Args:
    output: tyro.conf.Positional[str]
    """file for the figures, as JSON"""
    cpu: bool = False
    """the second run on the CPU too"""


def make_inputs(folder: Path) -> dict[str, list[str]]:
    """Tiny checkpoints and data, and each script's flags."""
    (folder / "rewards.py").write_text(REWARDS)
    prompts = [f"the {who} {verb}" for who in ("cat", "dog", "fox") for verb in ("sees", "eats")]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    tiny_models.make_lm(folder / "lm")
    tiny_models.make_sd3(folder / "sd3")
    tiny_models.make_clip(folder / "clip")
    tiny_models.make_audio_lm(folder / "omni", "omni")
    rows = []
    for i in range(8):
        wave = 0.3 * np.sin(np.arange(8000) * (0.02 + 0.01 * i))
        soundfile.write(folder / f"{i}.wav", wave, 16000)
        row = {"audio": str(folder / f"{i}.wav"), "question": f"Who speaks {i}?"}
        rows.append(row | {"choices": ["Man", "Woman"], "answer": ["Man", "Woman"][i % 2]})
    for name, part in (("train", rows[:4]), ("heldout", rows[4:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data = ["--prompts", f"{folder}/prompts.txt", "--reward", f"{folder}/rewards.py:dark"]
    clip = ["--clip-model", f"local-dir:{folder}/clip"]
    text = ["--dataset", f"{folder}/prompts.txt", "--reward", f"{folder}/rewards.py:words"]
    audio = ["--train-data", f"{folder}/train.jsonl", "--eval-data", f"{folder}/heldout.jsonl"]
    return {
        "adrpo_grpo_llm": ["--model-id", f"{folder}/lm", *text, *TEXT.split()],
        "adrpo_fm_sd3": ["--model-id", f"{folder}/sd3", *data, *clip, *IMAGE.split()],
        "adrpo_audio_mmau": ["--model-id", f"{folder}/omni", *audio, *AUDIO.split()],
        "toy_mnist_flow": TOY.split(),
    }


def run(script: str, flags: list[str], folder: Path, name: str) -> dict[str, float] | str:
    """The first evaluation of a run, and seconds a rollout; or the last line of what went wrong."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *flags]
    command += ["--output-dir", str(folder), "--run-name", name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    if script == "toy_mnist_flow":
        return json.loads((folder / name / "summary.json").read_text())
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    return first | {tag: last[tag] for tag in last if tag.startswith(("charts", "losses", "samp"))}


def main(args: Args) -> None:
    card = "CPU" if args.cpu else torch.cuda.get_device_name()
    record = {"card": card, "torch": torch.__version__, "scripts": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for script, flags in make_inputs(folder).items():
            cpu = [] if script == "toy_mnist_flow" else ["--cpu"]
            cpu = ["--device", "cpu"] if script == "toy_mnist_flow" else cpu
            found = {
                "cpu": run(script, [*flags, *cpu, "--precision", "fp32"], folder, f"{script}c")
            }
            second = cpu if args.cpu else []
            here = run(script, [*flags, *second, "--precision", "bf16"], folder, f"{script}g")
            record["scripts"][script] = found | {"gpu": here}
            for tag, value in found["cpu"].items() if isinstance(found["cpu"], dict) else ():
                if tag.startswith("eval/") and isinstance(here, dict):
                    print(f"{script} {tag}: {value} | {here.get(tag)}", flush=True)
            print(script, found["cpu"] if isinstance(found["cpu"], str) else "ok", flush=True)
            print(script, here if isinstance(here, str) else "ok", flush=True)
            Path(args.output).write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.partition("\n")[0]))
