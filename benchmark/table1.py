"""The six metrics of the paper's Table 1, of flow-matching pipelines of diffusers as they are.

    python benchmark/table1.py --prompts prompts.txt --model-id BASE BASE --lora - runs/NAME/final

One row a model: CLIP score and CLIP diversity (pairs of images of one prompt), and the plug-ins of
benchmark/image_rewards.py or your own. Writes OUT/table1.json, OUT/table1.md and the images. The
images are the pipeline's own, one prompt at a time, from the same noise for every model of one
shape; every network is loaded with its library's own report, a LoRA must fit tensor by tensor."""

import dataclasses
import json
import sys
from pathlib import Path

import torch
import tyro
from peft import get_peft_model_state_dict
from safetensors import safe_open
from torchvision.utils import save_image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import adrpo_fm_sd3 as sd3

PLUGINS = ("aesthetic", "blip", "imagereward", "pickscore")


@dataclasses.dataclass
class Args:
    model_id: tuple[str, ...]
    """pipelines: folders, or NAME[@REVISION] of the hub"""
    prompts: str
    """file or data set of prompts, as --prompts of adrpo_fm_sd3.py"""
    lora: tuple[str, ...] = ()
    """a folder with a LoRA for each model, - for none"""
    metrics: tuple[str, ...] = tuple(f"benchmark/image_rewards.py:{name}" for name in PLUGINS)
    """plug-ins beside the CLIP score"""
    max_prompts: int = 200
    """the first so many prompts (DrawBench has 200)"""
    images_per_prompt: int = 4
    """images of each prompt, at least 2: diversity is measured over their pairs (ours)"""
    resolution: int = 512
    """pixels of the images' sides"""
    num_steps: int = 28
    """sampling steps"""
    guidance_scale: float = 4.5
    """classifier-free guidance, or the scale that the transformer is told"""
    t5: bool = True
    """--no-t5 leaves SD3's third text encoder out"""
    clip_model: str = "ViT-L-14"
    """open_clip architecture, or local-dir:FOLDER"""
    clip_pretrained: str | None = "openai"
    """its weights"""
    seed: int = 1
    """of the noise"""
    out: str = "runs/table1"
    """folder of the results"""


def load(model_id: str, lora: str, args: Args, device: torch.device):
    """The verified pipeline on the device. Raises InputError where a LoRA does not fit it."""
    name, commit = sd3.find_model(model_id)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    leave_out = () if args.t5 else ("text_encoder_3", "tokenizer_3")
    pipe = sd3.load_pipeline(name, commit, dtype, leave_out)
    if lora != "-":
        pipe.load_lora_weights(lora, adapter_name="default")
        with safe_open(next(Path(lora).glob("*.safetensors")), "pt") as file:
            stored = len(file.keys())
        applied = len(get_peft_model_state_dict(pipe.transformer))
        if applied != stored:
            raise sd3.InputError(f"--lora {lora}: {applied} of its {stored} tensors fit {name}")
    return pipe.to(device), commit


@torch.no_grad()
def measure(pipe, prompts: dict, clip: sd3.Clip, plugins: dict, args: Args, folder: Path) -> dict:
    """Mean of every metric over all images, CLIP diversity over the prompts."""
    values = {"clip_score": [], "clip_diversity": []} | {name: [] for name in plugins}
    for index, (prompt, row) in enumerate(tqdm(prompts.items(), folder.name)):
        generators = [
            torch.Generator().manual_seed(args.seed * 1_000_003 + index * 1009 + image)
            for image in range(args.images_per_prompt)
        ]
        images = pipe(
            prompt=prompt,
            num_images_per_prompt=args.images_per_prompt,
            num_inference_steps=args.num_steps,
            guidance_scale=args.guidance_scale,
            height=args.resolution,
            width=args.resolution,
            generator=generators,
            output_type="pt",
        ).images.float()
        texts, rows = [prompt] * len(images), [row] * len(images)
        values["clip_score"] += clip.score(images, texts, rows).tolist()
        values["clip_diversity"] += sd3.pairwise_distance(clip.image(images)[None]).tolist()
        for name, function in plugins.items():
            values[name] += sd3.score(name, function, images, texts, rows).tolist()
        for image in range(len(images)):
            save_image(images[image], folder / f"{index:04d}_{image:02d}.png")
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


def main(args: Args) -> None:
    if args.images_per_prompt < 2 or len(args.lora) not in (0, len(args.model_id)):
        raise sd3.InputError("--images-per-prompt: at least 2; --lora: one a model, - for none")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts, rows, note, source = sd3.load_rows("prompts", args.prompts, None, None)
    prompts = dict(list(zip(texts, rows, strict=True))[: args.max_prompts])
    plugins = {spec.rpartition(":")[2]: sd3.load_plugin(spec) for spec in args.metrics}
    clip = sd3.Clip(args.clip_model, args.clip_pretrained, device)
    results = []
    for model_id, lora in zip(args.model_id, args.lora or ["-"] * len(args.model_id), strict=True):
        pipe, commit = load(model_id, lora, args, device)
        pipe.set_progress_bar_config(disable=True)
        folder = Path(args.out) / f"{len(results):02d}"
        folder.mkdir(parents=True, exist_ok=True)
        figures = measure(pipe, prompts, clip, plugins, args, folder)
        results.append({"model": model_id, "commit": commit, "lora": lora, **figures})
        del pipe
    columns = [
        "model",
        "lora",
        *[key for key in results[0] if key not in ("model", "lora", "commit")],
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for result in results:
        cells = [v if isinstance(v, str) else f"{v:.3f}" for v in map(result.get, columns)]
        lines.append(f"| {' | '.join(cells)} |")
    about = {"args": dataclasses.asdict(args), "prompts": source, "unused": note}
    record = json.dumps(about | {"results": results}, indent=2, allow_nan=False)
    (Path(args.out) / "table1.json").write_text(record)
    (Path(args.out) / "table1.md").write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except sd3.InputError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
