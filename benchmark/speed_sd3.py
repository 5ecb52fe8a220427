"""What an iteration of adrpo_fm_sd3.py costs, against its network calls alone and against the usual
way of doing it.

    python benchmark/speed_sd3.py small WORLD  # a folder of benchmark/mini_world_sd3.py, one
                                                # thread, CPU
    python benchmark/speed_sd3.py full FOLDER  # SD3 medium's shapes, random weights, 512 px,
                                                # bf16, a GPU

`small` prints, from one process:
  script        seconds of an iteration, as the script itself logs them
  alone         the network calls that it cannot do without, in the same batches, and nothing else:
                transformer in the rollout, reference and policy in the update, backward pass,
                autoencoder, CLIP
  usual way     the same rollout and update as pipelines of this kind are often written: one
                pipeline call per prompt, which encodes its text, with the empty prompt in a second
                forward pass, images through 8-bit pictures, a second copy of the model as
                reference, one prompt's group after the other
Ratios are only meaningful within one run. Both comparisons are repeated and the medians taken.

`full` writes a checkpoint of random weights into FOLDER (5 GB) unless it is there, runs the script
on it and prints seconds per image rolled out, per training point, and the peak memory that the
script logs.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torchvision.transforms.functional import pil_to_tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import adrpo_fm_sd3 as sd3
from benchmark import mini_world_sd3 as world

PROMPTS, GROUP, STEPS, UPDATES, LENGTH = 12, 8, 10, 2, 8
TARGETS = list(sd3.PROJECTIONS)


def script_seconds(args: sd3.Args, skip: int) -> dict[str, float]:
    """Median seconds of an iteration's phases over a run of the script, without its first `skip`
    iterations."""
    sd3.main(args)
    path = Path(args.output_dir) / args.run_name / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()][1 + skip :]
    keys = [key for key in rows[0] if key.startswith("charts/seconds") or key.endswith("memory_gb")]
    return {
        key.removeprefix("charts/"): statistics.median(row[key] for row in rows) for key in keys
    }


def velocity(transformer, x, s, condition) -> torch.Tensor:
    """Velocity from image to noise [B,C,h,w] at latents x and times s [B], without guidance."""
    embeds, pooled = condition
    question = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
    return transformer(hidden_states=x, timestep=1000 * s, return_dict=False, **question)[0]


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def small(folder: Path) -> None:
    torch.set_num_threads(1)
    prompts = (folder / "train_prompts.txt").read_text().splitlines()[:PROMPTS]
    pipe = StableDiffusion3Pipeline.from_pretrained(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    clip = sd3.Clip(f"local-dir:{folder}/clip", None, torch.device("cpu"))
    reward = clip.score
    reference = SD3Transformer2DModel.from_pretrained(
        folder / "model" / "transformer"
    ).requires_grad_(False)
    transformer = pipe.transformer.requires_grad_(False)
    for network in (transformer, reference):
        network.add_adapter(sd3.peft.LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS))
    # The same calls as the script's: a LoRA that is switched off is not free.
    reference.disable_adapters()
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3)
    count = PROMPTS * GROUP
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=LENGTH
        )
    condition = embeds.repeat_interleave(GROUP, 0), pooled.repeat_interleave(GROUP, 0)

    def alone(guidance: float) -> None:
        x, s = torch.randn(count, 8, 8, 8), torch.rand(count)
        twice = 2 if guidance > 1 else 1
        with torch.no_grad():
            for _ in range(STEPS):
                repeated = (
                    x.repeat(twice, 1, 1, 1),
                    s.repeat(twice),
                    tuple(c.repeat(twice, *[1] * (c.dim() - 1)) for c in condition),
                )
                velocity(transformer, *repeated)
            clip.model.encode_image(pipe.vae.decode(x).sample)
        for _ in range(UPDATES):
            with torch.no_grad():
                velocity(reference, x, s, condition)
            v = velocity(transformer, x, s, condition)
            v.backward(x)
            optimizer.zero_grad(set_to_none=True)

    def usual_way(guidance: float) -> None:
        latents, rewards, conditions = [], [], []
        with torch.no_grad():
            for prompt in prompts:
                own = pipe.encode_prompt(
                    prompt, None, None, num_images_per_prompt=GROUP, max_sequence_length=LENGTH
                )
                x = torch.randn(GROUP, 8, 8, 8)
                pipe.scheduler.set_timesteps(STEPS)
                for t in pipe.scheduler.timesteps:
                    s = t.expand(GROUP) / 1000
                    v = velocity(transformer, x, s, (own[0], own[2]))
                    if guidance > 1:
                        empty = velocity(transformer, x, s, (own[1], own[3]))
                        v = empty + guidance * (v - empty)
                    x = pipe.scheduler.step(v, t, x, return_dict=False)[0]
                raw = pipe.vae.decode(
                    x / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
                ).sample
                pictures = pipe.image_processor.postprocess(raw, output_type="pil")
                images = torch.stack([pil_to_tensor(picture) / 255 for picture in pictures])
                latents.append(x)
                conditions.append((own[0], own[2]))
                rewards.append(reward(images, [prompt] * GROUP, None))
        advantage = sd3.group_advantage(torch.stack(rewards), 0.25, 4.0, "global")
        for _ in range(UPDATES):
            optimizer.zero_grad()
            for own, x1, a in zip(conditions, latents, advantage, strict=True):
                s = torch.rand(GROUP)
                x_t, u = sd3.flow_matching_point(x1, torch.randn_like(x1), s)
                with torch.no_grad():
                    v_ref = velocity(reference, x_t, s, own)
                v = velocity(transformer, x_t, s, own)
                (sd3.adrpo_fm_loss(v, v_ref, u, a, 0.25).mean() / PROMPTS).backward()
            optimizer.step()

    for guidance in (1.0, 2.0):
        scripts, alones, usuals = [], [], []
        for _ in range(3):  # interleaved, so that a change of the machine's speed meets all of them
            with tempfile.TemporaryDirectory() as runs:
                args = sd3.Args(
                    output_dir=runs,
                    run_name="r",
                    cpu=True,
                    precision="fp32",
                    model_id=str(folder / "model"),
                    clip_model=f"local-dir:{folder}/clip",
                    prompts=str(folder / "train_prompts.txt"),
                    eval_prompts=str(folder / "heldout_prompts.txt"),
                    eval_max_prompts=2,
                    max_sequence_length=LENGTH,
                    resolution=32,
                    guidance_scale=guidance,
                    num_steps=STEPS,
                    eval_steps=2,
                    prompts_per_update=PROMPTS,
                    group_size=GROUP,
                    rollout_batch=count,
                    train_batch=count,
                    timesteps_per_sample=1,
                    updates_per_rollout=UPDATES,
                    lora_rank=16,
                    lora_alpha=16,
                    iterations=8,
                    eval_every=100,
                    save_every=100,
                )
                phases = script_seconds(args, skip=2)
            scripts.append(sum(value for key, value in phases.items() if key.startswith("seconds")))
            # Called at once.
            alones += [timed(lambda: alone(guidance)) for _ in range(5)]  # noqa: B023
            usuals += [timed(lambda: usual_way(guidance)) for _ in range(3)]  # noqa: B023
        script, least, usual = (statistics.median(values) for values in (scripts, alones, usuals))
        print(
            f"guidance {guidance:g}: script {script:.3f} s, network calls alone {least:.3f} s, "
            f"usual {usual:.3f} s; script / alone = {script / least:.2f}, usual way / script = "
            f"{usual / script:.2f}",
            flush=True,
        )


def make_full_size(folder: Path, layers: int = 24) -> None:
    """SD3 medium's transformer and autoencoder with random weights; text encoders of the right
    widths, one layer."""
    tokenizer, t5_tokenizer = world.build_clip_tokenizer(), world.build_t5_tokenizer()
    tokenizer.model_max_length = 77

    def text_encoder(width: int) -> CLIPTextModelWithProjection:
        config = CLIPTextConfig(
            hidden_size=width,
            projection_dim=width,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return CLIPTextModelWithProjection(config)

    t5 = T5Config(
        vocab_size=len(t5_tokenizer), d_model=4096, d_ff=64, d_kv=8, num_heads=4, num_layers=1
    )
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=128,
            num_layers=layers,
            num_attention_heads=24,
            attention_head_dim=64,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=192,
        ).bfloat16(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        ),
        text_encoder=text_encoder(768),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder(1280),
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel(t5),
        tokenizer_3=t5_tokenizer,
    )
    pipe.save_pretrained(folder / "model")
    world.write_prompts(folder)


def full(folder: Path, layers: int = 24, resolution: int = 512, cpu: bool = False) -> None:
    if not (folder / "model").is_dir():
        make_full_size(folder, layers)
    (folder / "reward.py").write_text(
        "def brightness(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"
    )
    # CLIP diversity needs a model; its cost is not what is measured.
    tokenizer = world.build_clip_tokenizer()
    if not (folder / "clip").is_dir():
        world.train_clip(tokenizer, *tiny_painter(), 1, folder / "clip")
    name = "cpu" if cpu else torch.cuda.get_device_name()
    for label, options in {
        "group of 16, train batch 8": {"train_batch": 8},
        "the same, gradient checkpointing": {"train_batch": 8, "gradient_checkpointing": True},
        "24 GB flags": {"train_batch": 2, "rollout_batch": 8, "gradient_checkpointing": True},
    }.items():
        with tempfile.TemporaryDirectory() as runs:
            shared = {
                "model_id": str(folder / "model"),
                "clip_model": f"local-dir:{folder}/clip",
                "cpu": cpu,
            }
            shared |= {
                "output_dir": runs,
                "run_name": "r",
                "precision": "bf16",
                "resolution": resolution,
            }
            shared |= {
                "prompts": str(folder / "train_prompts.txt"),
                "reward": (f"{folder}/reward.py:brightness",),
            }
            shared |= {
                "prompts_per_update": 1,
                "group_size": 16,
                "iterations": 4,
                "eval_every": 100,
                "eval_images": 2,
            }
            args = sd3.Args(
                **shared | {"eval_max_prompts": 1, "eval_steps": 2, "save_every": 100} | options
            )
            if not cpu:
                torch.cuda.reset_peak_memory_stats()
            phases = script_seconds(args, skip=1)
        images, points = (
            args.group_size,
            args.group_size * args.timesteps_per_sample * args.updates_per_rollout,
        )
        print(
            f"{name}, {resolution} px, guidance {args.guidance_scale}, {args.num_steps} steps, "
            f"{label}: {phases['seconds_rollout'] / images:.3f} s per image, "
            f"{phases['seconds_update'] / points:.3f} s per training point, peak "
            f"{phases.get('peak_memory_gb', float('nan')):.1f} GB",
            flush=True,
        )


def tiny_painter() -> tuple[world.Painter, torch.Tensor, torch.Tensor]:
    digits, labels, _ = world.load_data(None)
    return world.Painter(digits, labels), torch.arange(100), torch.arange(100)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("small", "full"):
        sys.exit(__doc__)
    {"small": small, "full": full}[sys.argv[1]](Path(sys.argv[2]))
