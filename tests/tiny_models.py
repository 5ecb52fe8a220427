"""Tiny random checkpoints in the formats the scripts take: made in a second, nothing downloaded, nothing trained."""

import json
from pathlib import Path

import open_clip
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import save_file

from benchmark import mini_world_sd3 as world

# SD3 medium normalises neither queries nor keys; SD3.5 does, and its first blocks have a second attention on the image.
SD3_STYLES = {"sd3": {}, "sd3.5": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}}


def make_sd3(folder: Path, style: str = "sd3", layers: int = 2) -> Path:
    """A random StableDiffusion3Pipeline for 32x32 images, every weight non-zero, scale and shift of the latents too."""
    torch.manual_seed(0)
    pipe = world.build_pipeline()
    pipe.register_modules(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=8,
            out_channels=8,
            num_layers=layers,
            num_attention_heads=2,
            attention_head_dim=16,
            caption_projection_dim=32,
            joint_attention_dim=128,
            pooled_projection_dim=128,
            pos_embed_max_size=8,
            **SD3_STYLES[style],
        )
    )
    pipe.vae.register_to_config(scaling_factor=1.5, shift_factor=0.1)
    pipe.save_pretrained(folder)
    return folder


def make_clip(folder: Path, embed_dim: int = 64) -> Path:
    """A random open_clip model with its tokenizer, for `local-dir:FOLDER`."""
    torch.manual_seed(1)
    tokenizer = world.build_clip_tokenizer()
    config = world.clip_config(tokenizer)
    config["model_cfg"]["embed_dim"] = embed_dim
    folder.mkdir(parents=True)
    save_file(open_clip.CLIP(**config["model_cfg"]).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    return folder


def load_sd3(folder: Path) -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe
