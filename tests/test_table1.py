"""Tests of benchmark/table1.py on a tiny random pipeline."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import adrpo_fm_sd3 as sd3

sys.path.insert(0, str(Path(__file__).parent))
import tiny_models

from benchmark import table1

PROMPTS = ["a red one", "a blue two"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    top = tmp_path_factory.mktemp("table1")
    model = tiny_models.make_sd3(top / "model")
    clip = tiny_models.make_clip(top / "clip")
    (top / "prompts.txt").write_text("\n".join(PROMPTS))
    (top / "plug.py").write_text(
        "def brightness(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"
    )
    pipe = sd3.load_pipeline(str(model), None, torch.float32)
    sd3.add_lora(pipe.transformer, sd3.Args(prompts="-", lora_rank=2, lora_alpha=8))
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    sd3.save_lora(top / "lora", pipe)
    return top, model, clip


def run(parts, out, *lora):
    top, model, clip = parts
    args = table1.Args(
        model_id=(str(model),) * max(len(lora), 1),
        prompts=str(top / "prompts.txt"),
        lora=tuple(lora),
        metrics=(f"{top}/plug.py:brightness",),
        resolution=32,
        num_steps=2,
        images_per_prompt=3,
        clip_model=f"local-dir:{clip}",
        out=str(out),
    )
    table1.main(args)
    return json.loads((out / "table1.json").read_text())["results"]


def test_figures_are_those_of_the_saved_images(parts, tmp_path):
    base, tuned = run(parts, tmp_path, "-", str(parts[0] / "lora"))
    clip = sd3.Clip(f"local-dir:{parts[2]}", None, torch.device("cpu"))
    for index, result in enumerate((base, tuned)):
        scores, distances, brightness = [], [], []
        for number, prompt in enumerate(PROMPTS):
            files = sorted((tmp_path / f"{index:02d}").glob(f"{number:04d}_*.png"))
            assert len(files) == 3
            pixels = np.stack([np.asarray(Image.open(file)) for file in files]) / 255
            images = torch.tensor(pixels).float().permute(0, 3, 1, 2)
            features = clip.image(images)
            unit = features / features.norm(dim=1, keepdim=True)
            scores += (100 * unit @ clip.text([prompt])[0]).tolist()
            pairs = [(features[i] - features[j]).norm().item() for i, j in ((0, 1), (0, 2), (1, 2))]
            distances.append(sum(pairs) / 3)
            brightness += images.mean((1, 2, 3)).tolist()
        # 8 bits a pixel: the saved images are not exactly those that were scored.
        assert result["clip_score"] == pytest.approx(np.mean(scores), abs=0.5)
        assert result["clip_diversity"] == pytest.approx(np.mean(distances), rel=0.1, abs=0.02)
        assert result["brightness"] == pytest.approx(np.mean(brightness), abs=3e-3)
    assert base["brightness"] != tuned["brightness"]
    assert (tmp_path / "table1.md").read_text().count("\n") == 4


def test_same_seed_same_table(parts, tmp_path):
    assert run(parts, tmp_path / "a") == run(parts, tmp_path / "b")


def test_a_lora_that_does_not_fit_is_refused(parts, tmp_path):
    weights = load_file(next((parts[0] / "lora").glob("*.safetensors")))
    foreign = {
        key.replace("transformer_blocks.1", "transformer_blocks.7"): value
        for key, value in weights.items()
    }
    assert foreign.keys() != weights.keys()
    (tmp_path / "lora").mkdir()
    save_file(foreign, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    with pytest.raises((sd3.InputError, ValueError, RuntimeError, KeyError)):
        run(parts, tmp_path / "out", str(tmp_path / "lora"))
    assert not (tmp_path / "out" / "table1.json").exists()
