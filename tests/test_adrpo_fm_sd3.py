"""Tests of adrpo_fm_sd3.py on tiny random checkpoints of two shapes (SD3 and SD3.5): its equations,
its pieces against stock diffusers, and the program as a user runs it. No downloads.

LAION's aesthetic head is found through the environment variable ADRPO_DATA; without it that test
skips.
"""

import contextlib
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import accelerate
import numpy as np
import open_clip
import pyarrow.parquet
import pytest
import scipy.spatial.distance
import torch
import torch.nn.functional as F
import transformers
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file, save_model
from sklearn.metrics.pairwise import cosine_distances
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.transforms.functional import to_pil_image

import adrpo_fm_sd3 as sd3
from benchmark import image_rewards, table1
from benchmark import mini_world_sd3 as world
from tests import tiny_models

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "adrpo_fm_sd3.py"
DOCS = ROOT / "docs" / "adrpo_fm_sd3.md"
STYLES = list(tiny_models.SD3_STYLES)
METHODS = ["adrpo", "orw", "raft", "dpo"]
TIMING = re.compile(r"charts/(seconds_.*|peak_memory_gb)")
TINY = (
    "--cpu --precision fp32 --resolution 32 --max-sequence-length 8 --lora-rank 4 --lora-alpha 8 "
    "--iterations 2"
)
TINY += (
    " --prompts-per-update 2 --group-size 4 --num-steps 2 --eval-steps 2 --eval-images 2 "
    "--eval-every 1"
)
TINY += " --save-every 1 --rollout-batch 8 --train-batch 16 --guidance-scale 2 --learning-rate 1e-2"
PROMPTS = [
    f"a handwritten {colour} {digit}" for digit in world.DIGITS[:6] for colour in ("red", "blue")
]


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of the tiny checkpoints: `sd3`, `sd3.5`, `clip`."""
    folder = tmp_path_factory.mktemp("models")
    made = {style: tiny_models.make_sd3(folder / style, style) for style in STYLES}
    return made | {"clip": tiny_models.make_clip(folder / "clip")}


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """Folders of tiny checkpoints of other families."""
    folder = tmp_path_factory.mktemp("families")
    return {name: tiny_models.make_flow(folder / name, name) for name in tiny_models.FLOW_FAMILIES}


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture(scope="session")
def base_flags(models, prompts):
    return [*TINY.split(), "--clip-model", f"local-dir:{models['clip']}", "--prompts", str(prompts)]


def reset_accelerate():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def merged(flags):
    """These flags, each once: the script refuses one that is given twice; here the last counts."""
    given = {}
    for word in map(str, flags):
        if word.startswith("--"):
            given[name := word] = []
        else:
            given[name].append(word)
    return [word for name, values in given.items() for word in (name, *values)]


def run_script(*flags):
    """The script with these flags, in this process: (exit message or code, standard output,
    standard error)."""
    reset_accelerate()
    arguments, code = sys.argv, 0
    sys.argv = [str(SCRIPT), *merged(flags)]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as exit_:
        code = exit_.code
    finally:
        sys.argv = arguments
    return code, out.getvalue(), err.getvalue()


def read_metrics(run, timing=False):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if timing or not TIMING.fullmatch(k)} for row in rows]


def finish(*flags):
    code, out, err = run_script(*flags)
    assert code == 0, (code, err[-2000:])
    return out


@pytest.fixture(scope="session")
def runs(models, base_flags, tmp_path_factory):
    """A finished run of adrpo for each style: {style: (folder, standard output)}."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for style in STYLES:
        out = finish(
            *base_flags, "--model-id", models[style], "--output-dir", folder, "--run-name", style
        )
        made[style] = folder / style, out
    return made


def assert_same_run(one, other, rtol=0.0, atol=0.0):
    """Same weights, same metrics."""
    name = "final/pytorch_lora_weights.safetensors"
    torch.testing.assert_close(load_file(one / name), load_file(other / name), rtol=rtol, atol=atol)
    rows, others = read_metrics(one), read_metrics(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, match in zip(rows, others, strict=True):
        assert row == pytest.approx(match, rel=max(rtol, 1e-12), abs=max(atol, 1e-12), nan_ok=True)


# --------------------------------------------------------------------------------- A. the equations


@pytest.mark.parametrize("beta0", [0.05, 1.0])
def test_adrpo_is_a_parabola_around_v_star(beta0):
    v, v_ref, u = (numbers(5, 3, 4, 4, seed=seed) for seed in range(3))
    advantage = torch.tensor([-2.0, -0.3, 0.0, 0.5, 3.0], dtype=torch.float64)
    v_star = v_ref + advantage.view(-1, 1, 1, 1) / beta0 * (u - v_ref)
    v.requires_grad_(True)
    (gradient,) = torch.autograd.grad(sd3.adrpo_fm_loss(v, v_ref, u, advantage, beta0).sum(), v)
    torch.testing.assert_close(
        gradient, 2 * beta0 * (v.detach() - v_star) / v[0].numel(), rtol=1e-9, atol=1e-12
    )


def test_losses_against_slow_loops():
    v, v_ref, u = (numbers(4, 2, 3, 3, seed=seed) for seed in range(3))
    w = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    for i in range(4):
        fm = float(np.mean((v[i] - u[i]).numpy() ** 2))
        div = float(np.mean((v[i] - v_ref[i]).numpy() ** 2))
        assert sd3.adrpo_fm_loss(v, v_ref, u, w, 0.3)[i].item() == pytest.approx(
            w[i] * fm + (0.3 - w[i]) * div
        )
        assert sd3.orw_fm_loss(v, v_ref, u, w, 0.7)[i].item() == pytest.approx(
            w[i] * fm + 0.7 * div
        )
    pair = sd3.dpo_fm_loss(v[:2], v_ref[:2], u[:2], v[2:], v_ref[2:], u[2:], 5.0)
    for i in range(2):
        gain = [
            float(((v[j] - u[j]) ** 2).mean() - ((v_ref[j] - u[j]) ** 2).mean()) for j in (i, i + 2)
        ]  # winner, loser
        assert pair[i].item() == pytest.approx(math.log(1 + math.exp(2.5 * (gain[0] - gain[1]))))


@pytest.mark.parametrize("normalize", ["none", "group", "global", "base"])
@pytest.mark.parametrize("clip_k", [None, 0.5, 2.0])
def test_group_advantage_against_a_loop(normalize, clip_k):
    rewards, beta0 = numbers(3, 5) * torch.tensor([[1.0], [4.0], [0.1]], dtype=torch.float64), 0.4
    got = sd3.group_advantage(rewards, beta0, clip_k, normalize, 0.7)
    for p, row in enumerate(rewards.tolist()):
        scale = {
            "none": 1.0,
            "group": np.std(row, ddof=1) + 1e-4,
            "global": rewards.std().item() + 1e-4,
            "base": 0.7,
        }[normalize]
        for g, value in enumerate(row):
            expected = (value - sum(row) / 5) / scale
            if clip_k is not None:
                expected = min(max(expected, -clip_k * beta0), clip_k * beta0)
            assert got[p, g].item() == pytest.approx(expected, abs=1e-12)


def test_constant_groups_are_kept():
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
    assert sd3.group_advantage(rewards, 0.25, 4.0, "global")[0].tolist() == [0, 0, 0]
    assert sd3.group_advantage(rewards[:1], 0.25, 4.0, "group").isfinite().all()
    for value in (0.1, 21.6, 1e3 / 3):  # no binary fractions: their mean over a group is rounded
        equal = torch.full((2, 7), value)
        for normalize in ("none", "group", "global"):
            assert sd3.group_advantage(equal, 0.25, None, normalize).abs().max() == 0


def test_orw_weights_have_mean_one_per_group_and_are_ratios_of_exponentials():
    rewards = numbers(3, 6)
    weights = sd3.orw_weights(rewards, 2.0)
    torch.testing.assert_close(weights.mean(1), torch.ones(3, dtype=torch.float64))
    expected = math.exp(2 * (rewards[1, 2] - rewards[1, 4]))
    assert (weights[1, 2] / weights[1, 4]).item() == pytest.approx(expected)


def test_training_samples():
    rewards = torch.tensor([[1.0, 3.0, 2.0, 0.0], [5.0, 4.0, 7.0, 6.0]])
    assert sd3.training_samples("adrpo", rewards).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert sd3.training_samples("raft", rewards).tolist() == [[1] * 4, [6] * 4]
    assert sd3.training_samples("dpo", rewards).tolist() == [[1, 3, 1, 3], [6, 5, 6, 5]]


@pytest.mark.parametrize("draws", [1, 3, 6])
def test_points_are_shared_as_asked(draws):
    args = sd3.Args(prompts_per_update=5, timesteps_per_sample=2, group_size=6)
    s, noise = sd3.draw_points(torch.Generator().manual_seed(3), (2, 4, 4), args, draws)
    assert s.shape == (60,)
    assert noise.shape == (60, 2, 4, 4)
    assert ((s >= 0) & (s <= 1)).all()
    s, noise = s.view(5, 2, 6), noise.view(5, 2, 6, -1)
    assert s.unique().numel() == 5 * 2 * draws
    for first in range(0, 6, 6 // draws):  # neighbours share, as pairs or as the whole group
        part = slice(first, first + 6 // draws)
        assert (s[:, :, part] == s[:, :, part][:, :, :1]).all()
        assert (noise[:, :, part] == noise[:, :, part][:, :, :1]).all()


def test_logit_normal_and_shifted_times():
    options = {"prompts_per_update": 4000, "timesteps_per_sample": 1, "group_size": 2}
    args = sd3.Args(**options, timestep_distribution="logit-normal")
    s, _ = sd3.draw_points(torch.Generator().manual_seed(0), (1,), args, 1)
    assert abs(torch.logit(s).mean()) < 0.05
    assert abs(torch.logit(s).std() - 1) < 0.05
    args.timestep_shift = 3.0
    shifted, _ = sd3.draw_points(torch.Generator().manual_seed(0), (1,), args, 1)
    torch.testing.assert_close(shifted, 3 * s / (1 + 2 * s))
    assert abs(shifted.median() - 0.75) < 0.02


def test_flow_matching_point_is_the_path_and_its_derivative():
    x1, noise, s = (
        numbers(3, 2, 4, 4),
        numbers(3, 2, 4, 4, seed=1),
        torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64),
    )
    x_t, u = sd3.flow_matching_point(x1, noise, s)
    torch.testing.assert_close(x_t[0], x1[0])
    torch.testing.assert_close(x_t[2], noise[2])
    later, _ = sd3.flow_matching_point(x1, noise, s + 1e-6)
    torch.testing.assert_close((later - x_t) / 1e-6, u, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count,per_update", [(7, 3), (4, 4), (3, 8)])
def test_every_pass_draws_every_prompt_once(count, per_update):
    prompts = [f"prompt {i}" for i in range(count)]
    schedule = sd3.draw_prompts(prompts, per_update, 21, seed=5)
    assert {len(drawn) for drawn in schedule} == {per_update}
    drawn = [prompt for part in schedule for prompt in part]
    for start in range(0, len(drawn) - count + 1, count):
        assert sorted(drawn[start : start + count]) == prompts
    assert sd3.draw_prompts(prompts, per_update, 4, seed=5) == schedule[:4]


def test_diversities_against_scipy_and_sklearn():
    features = numbers(3, 6, 10)
    off_diagonal = ~np.eye(6, dtype=bool)
    for p, group in enumerate(features.numpy()):
        expected = cosine_distances(group)[off_diagonal].mean()
        assert sd3.pairwise_diversity(features)[p].item() == pytest.approx(expected, abs=1e-6)
        expected = scipy.spatial.distance.pdist(group).mean()
        assert sd3.pairwise_distance(features)[p].item() == pytest.approx(expected, rel=1e-6)


# ----------------------------------------------------------------------- B. against stock diffusers


def open_flow(folder, guidance=1.0, dtype=torch.float32, **options):
    """The pipeline of a folder as the script opens and proves it: (flow, error of the proof)."""
    args = sd3.Args(resolution=32, max_sequence_length=16, guidance_scale=guidance, **options)
    pipe = sd3.load_pipeline(str(folder), None, dtype)
    return sd3.prove(sd3.open_flow(pipe, args, [*PROMPTS[:4], ""], torch.device("cpu")), PROMPTS[0])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_a_rollout_is_what_the_stock_pipeline_draws(models, style, guidance):
    noise = numbers(4, 8, 8, 8, dtype=torch.float32)
    stock = tiny_models.load_sd3(models[style])
    settings = {"num_inference_steps": 4, "guidance_scale": guidance, "max_sequence_length": 16}
    latents = stock(PROMPTS[:4], latents=noise.clone(), output_type="latent", **settings).images
    images = stock(PROMPTS[:4], latents=noise.clone(), output_type="pt", **settings).images
    flow, error = open_flow(models[style], guidance)
    assert (error, flow.offset, flow.slope, flow.sign) == (0, 0, 1000, 1)
    sd3.add_lora(flow.pipe.transformer, sd3.Args(lora_rank=4))
    for name, parameter in flow.pipe.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tuned, _ = sd3.sample(flow, PROMPTS[:4], noise, 4)
    flow.pipe.transformer.disable_adapters()
    mine, my_images = sd3.sample(flow, PROMPTS[:4], noise, 4)
    flow.pipe.transformer.enable_adapters()
    torch.testing.assert_close(mine, latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(my_images, images, rtol=1e-4, atol=1e-4)
    assert (tuned - latents).abs().max() > 0.01
    again, _ = sd3.sample(flow, PROMPTS[:4], noise, 4)
    torch.testing.assert_close(again, tuned, rtol=0, atol=0)


def test_prompts_are_encoded_once_and_the_encoders_freed(models):
    stock = tiny_models.load_sd3(models["sd3"])
    with torch.no_grad():
        expected = stock.encode_prompt(PROMPTS[1], None, None, max_sequence_length=16)
    flow, _ = open_flow(models["sd3"], guidance=2.0)
    pipe = flow.pipe
    assert pipe.text_encoder is pipe.text_encoder_2 is pipe.text_encoder_3 is None
    question = sd3.ask(flow, [PROMPTS[0], PROMPTS[1], PROMPTS[1]])
    assert len(question["encoder_hidden_states"]) == 3
    assert not question["encoder_hidden_states"].requires_grad
    torch.testing.assert_close(question["encoder_hidden_states"][1:2], expected[0])
    torch.testing.assert_close(question["pooled_projections"][2:], expected[2])
    # the empty prompt of guidance is kept once
    negatives = {id(results[1]) for results in flow.memory.known.values()}
    assert len(negatives) == 1


def test_parts_of_a_batch_have_conditions_of_one_shape():
    flow = types.SimpleNamespace(memory=types.SimpleNamespace(shapes={"a": 1, "b": 1, "c": 2}))
    cut = [(part.start, part.stop) for part in sd3.batches(flow, list("aabbbccab"), 4)]
    assert cut == [(0, 4), (4, 5), (5, 7), (7, 9)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", tiny_models.FLOW_FAMILIES)
def test_other_families_are_tuned(models, base_flags, families, tmp_path, family, precision):
    flags = ["--model-id", families[family], "--precision", precision, "--output-dir", tmp_path]
    flags += ["--run-name", "r", "--updates-per-rollout", "1"]
    out = finish(*base_flags, "--max-sequence-length", "16", *flags)
    rows = read_metrics(tmp_path / "r")
    assert rows[1]["losses/divergence"] == 0 < rows[2]["losses/divergence"]
    assert rows[0]["eval/w2"] == 0 < rows[2]["eval/w2"]
    sign = {"lumina2": "time is 1 -1 s, sign -1"}.get(family, "sign +1")
    assert sign in out
    assert "velocity equal to 0e+00" in out


@pytest.mark.parametrize("family", tiny_models.OTHER_QUESTIONS)
def test_what_asks_in_another_way_is_refused(base_flags, tmp_path, family):
    """CogView4's time is not linear, HiDream and Z-Image hand over lists: their own classes."""
    folder = tiny_models.make_other_question(tmp_path / "model", family)
    flags = ["--output-dir", tmp_path / "runs"]
    line = refused(*base_flags, "--model-id", folder, *flags)
    why = {
        "cogview4": "is no linear function of sigma",
        "hidream": "its transformer is asked for ['attention_kwargs', 'encoder_hidden_states",
        "z-image": "it encodes prompts as lists",
    }
    assert "cannot be tuned: " in line
    assert why[family] in line


def prepared(folder, **changes):
    """A pipeline whose scheduler is changed, not yet proven."""
    args = sd3.Args(resolution=32, max_sequence_length=16, guidance_scale=1.0)
    pipe = sd3.load_pipeline(str(folder), None, torch.float32)
    flow = sd3.open_flow(pipe, args, PROMPTS[:2], torch.device("cpu"))
    if changes:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    return flow


def test_what_is_no_flow_matching_is_refused(models, monkeypatch):
    flow = prepared(models["sd3"], stochastic_sampling=True)  # draws noise at every step
    with pytest.raises(sd3.InputError, match="first step by"):
        sd3.prove(flow, PROMPTS[0])
    flow = prepared(models["sd3"], invert_sigmas=True)
    with pytest.raises(sd3.InputError, match="do not fall from 1 to 0: no flow matching"):
        sd3.prove(flow, PROMPTS[0])
    flow = prepared(models["sd3"])  # noise levels above 1, as epsilon- and v-models have them
    flow.pipe.scheduler = EulerDiscreteScheduler()
    with pytest.raises(sd3.InputError, match="no flow matching"):
        sd3.prove(flow, PROMPTS[0])
    flow.pipe.scheduler = DDIMScheduler()
    with pytest.raises(sd3.InputError, match="its scheduler has no sigmas"):
        sd3.prove(flow, PROMPTS[0])


def test_a_time_that_is_not_linear_is_refused(models):
    flow = prepared(models["sd3"])
    call = flow.pipe.scheduler.set_timesteps

    def bent(*args, **kwargs):
        call(*args, **kwargs)
        flow.pipe.scheduler.timesteps = flow.pipe.scheduler.timesteps.square() / 1000

    flow.pipe.scheduler.set_timesteps = bent
    with pytest.raises(sd3.InputError, match="no linear function of sigma"):
        sd3.prove(flow, PROMPTS[0])


@pytest.mark.parametrize("family", ["sd3", "lumina2"])
def test_an_untrained_base_passes_with_the_right_sign(models, families, family):
    flow = prepared((models | families)[family])
    transformer = flow.pipe.transformer
    last = transformer.proj_out if family == "sd3" else transformer.norm_out.linear_2
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    flow, error = sd3.prove(flow, PROMPTS[0])
    assert (error, flow.sign) == (0, {"sd3": 1, "lumina2": -1}[family])
    torch.nn.init.constant_(last.bias, math.nan)
    with pytest.raises(sd3.InputError, match="does not follow its transformer's velocity"):
        sd3.prove(flow, PROMPTS[0])


@pytest.mark.parametrize("style", STYLES)
def test_reference_is_exactly_the_policy_before_training(models, style):
    flow, _ = open_flow(models[style])
    transformer = flow.pipe.transformer
    x, s = numbers(3, 8, 8, 8, dtype=torch.float32), torch.tensor([0.1, 0.5, 0.9])
    question = sd3.ask(flow, PROMPTS[:3])
    plain = sd3.velocity(flow, question, x, s).detach()
    lora = sd3.add_lora(transformer, sd3.Args(lora_rank=4))
    policy = sd3.velocity(flow, question, x, s)
    transformer.disable_adapters()
    reference = sd3.velocity(flow, question, x, s)
    transformer.enable_adapters()
    assert torch.equal(policy, reference)
    assert torch.equal(plain, reference)
    policy = sd3.velocity(flow, question, x, s)
    policy.square().mean().backward()  # and the LoRA still trains after the reference was asked
    names = {name for name, p in transformer.named_parameters() if p.grad is not None}
    trained = {
        n for n, p in transformer.named_parameters() if n in names and p.grad.abs().sum() > 0
    }
    assert trained
    assert all("lora_B" in name for name in trained)
    assert all(parameter.dtype == torch.float32 for parameter in lora)


def test_all_attention_projections_get_a_lora(models, families):
    for folder, layers in (
        (models["sd3.5"], (".attn.", ".attn2.")),
        (families["sana"], (".attn1.", ".attn2.")),
    ):
        transformer = sd3.load_pipeline(str(folder), None, torch.float32).transformer
        linear = {n for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
        sd3.add_lora(transformer, sd3.Args(lora_rank=4))
        tuned = {n for n, _ in transformer.named_parameters() if ".lora_A" in n}
        names = {name.rpartition(".lora_A")[0] for name in tuned}
        assert names == {name for name in linear if any(part in name for part in layers)}


# --------------------------------------------------------------------------------------- C. rewards


@pytest.fixture(scope="session")
def clip(models):
    return sd3.Clip(f"local-dir:{models['clip']}", "openai", torch.device("cpu"))


@pytest.fixture(scope="session")
def images():
    """Smooth pictures: on noise, 8-bit and float resizing differ."""
    coarse = torch.rand(4, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (48, 40), mode="bilinear")


def as_pil(images):
    return [to_pil_image(image) for image in images]


@torch.no_grad()
def test_clip_reward_is_open_clips_own(models, clip, images):
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{models['clip']}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{models['clip']}")
    # without and with resizing
    for pictures, tolerance in ((F.interpolate(images, (32, 32)), 1e-3), (images, 0.1)):
        pixels = torch.stack([preprocess(image) for image in as_pil(pictures)])
        image, text = model.eval().encode_image(pixels), model.encode_text(tokenizer(PROMPTS[:4]))
        expected = 100 * F.cosine_similarity(image, text)
        exact = (pictures * 255).floor() / 255  # as to_pil_image does
        got = sd3.score("clip", clip.score, exact, PROMPTS[:4], [{}] * 4)
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)  # PIL resizes in 8 bits
    assert got.std() > 0.1


def clip_processor(folder, size=32):
    world.build_clip_tokenizer().save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size).save_pretrained(
        folder
    )


@torch.no_grad()
def test_pickscore_is_its_cards_formula(tmp_path, images, monkeypatch):
    torch.manual_seed(0)
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    tokenizer = world.build_clip_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = transformers.CLIPTextConfig(
        **small, vocab_size=len(tokenizer), max_position_embeddings=8, **ends
    )
    vision = transformers.CLIPVisionConfig(**small, image_size=32, patch_size=8)
    config = transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "model")
    clip_processor(tmp_path / "processor")
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "processor")
    inputs = processor(text=PROMPTS[:4], images=as_pil(images), padding=True, return_tensors="pt")
    expected = model(**inputs).logits_per_image.diagonal()
    monkeypatch.setenv("PICKSCORE_MODEL", str(tmp_path / "model"))
    monkeypatch.setenv("PICKSCORE_PROCESSOR", str(tmp_path / "processor"))
    image_rewards.load_pickscore.cache_clear()
    function = image_rewards.pickscore
    got = sd3.score("pickscore", function, images, PROMPTS[:4], [{}] * 4)
    torch.testing.assert_close(got, expected, rtol=0.01, atol=0.02)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    renamed = {f"module.{name}": value for name, value in weights.items()}
    save_file(renamed, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    image_rewards.load_pickscore.cache_clear()
    with pytest.raises(ValueError, match="PICKSCORE_MODEL=.* weights are not in its files"):
        image_rewards.pickscore(images, PROMPTS[:4], [{}] * 4)


@torch.no_grad()
def test_blip_is_the_cosine_of_the_itc_features(tmp_path, images, monkeypatch):
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *world.WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {
        **small,
        "vocab_size": len(words),
        "encoder_hidden_size": 32,
        "max_position_embeddings": 40,
    }
    vision = {**small, "image_size": 32, "patch_size": 8}
    config = transformers.BlipConfig(
        text_config=text, vision_config=vision, image_text_hidden_size=16
    )
    model = transformers.BlipForImageTextRetrieval(config).eval()
    model.save_pretrained(tmp_path / "blip")
    image_processor = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    processor = transformers.BlipProcessor(image_processor, tokenizer)
    processor.save_pretrained(tmp_path / "blip")
    monkeypatch.setenv("BLIP_MODEL", str(tmp_path / "blip"))
    image_rewards.load_blip.cache_clear()
    function = image_rewards.blip
    got = sd3.score("blip", function, images, PROMPTS[:4], [{}] * 4)
    for i, picture in enumerate(as_pil(images)):  # one by one, by the stock processor
        inputs = processor(images=picture, text=PROMPTS[i], return_tensors="pt")
        vision_features = model.vision_proj(model.vision_model(inputs.pixel_values)[0][:, 0])
        states = model.text_encoder(inputs.input_ids, attention_mask=inputs.attention_mask)[0]
        expected = F.cosine_similarity(vision_features, model.text_proj(states[:, 0]))
        assert got[i].item() == pytest.approx(expected.item(), abs=0.01)


@torch.no_grad()
def test_aesthetic_is_laions_head_on_unit_clip_features(tmp_path, images, monkeypatch):
    data = os.environ.get("ADRPO_DATA")
    path = Path(data or "") / image_rewards.AESTHETIC_NAME
    if not data or not path.is_file():
        pytest.skip("LAION's aesthetic head is not in ADRPO_DATA")
    name = f"local-dir:{tiny_models.make_clip(tmp_path / 'wide', 768)}"
    wide = sd3.Clip(name, None, torch.device("cpu"))
    monkeypatch.setenv("AESTHETIC_CLIP", name)
    monkeypatch.setenv("AESTHETIC_WEIGHTS", str(path))
    image_rewards.load_aesthetic.cache_clear()
    head = torch.nn.Sequential(
        torch.nn.Linear(768, 1024),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(1024, 128),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(128, 64),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(64, 16),
        torch.nn.Linear(16, 1),
    ).eval()
    state = torch.load(path, map_location="cpu", weights_only=True)
    head.load_state_dict({key.removeprefix("layers."): value for key, value in state.items()})
    got = sd3.score("aesthetic", image_rewards.aesthetic, images, PROMPTS[:4], [{}] * 4)
    torch.testing.assert_close(
        got, head(F.normalize(wide.image(images)))[:, 0], rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_imagereward_is_loaded_strictly(monkeypatch, tmp_path, images):
    """imscore's own network with random weights: it builds and scores under this version of
    transformers, and a file that lacks a weight is refused."""
    package = pytest.importorskip("imscore.imreward.model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *world.WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    make = transformers.BertTokenizer
    monkeypatch.setattr(make, "from_pretrained", lambda name: make(str(tmp_path / "vocab.txt")))
    property_ = property(lambda self: self.convert_tokens_to_ids(["[ENC]"]))
    monkeypatch.setattr(make, "additional_special_tokens_ids", property_, raising=False)
    torch.manual_seed(0)
    model = package.ImageReward().eval()
    save_model(model, tmp_path / "model.safetensors")
    expected = model.score(images[:2], PROMPTS[:2]).flatten()
    next(model.parameters()).zero_()
    monkeypatch.setattr(package, "ImageReward", lambda: model)  # it takes seconds to build
    monkeypatch.setenv("IMAGEREWARD_MODEL", str(tmp_path))
    image_rewards.load_imagereward.cache_clear()
    function = image_rewards.imagereward
    scores = sd3.score("imagereward", function, images[:2], PROMPTS[:2], [{}] * 2)
    torch.testing.assert_close(scores, expected)
    assert scores[0] != scores[1]
    weights = load_file(tmp_path / "model.safetensors")
    del weights[next(iter(weights))]
    save_file(weights, tmp_path / "model.safetensors")
    image_rewards.load_imagereward.cache_clear()
    with pytest.raises(RuntimeError, match="Missing key"):
        image_rewards.imagereward(images[:2], PROMPTS[:2], [{}] * 2)


@pytest.mark.parametrize("values", [[1.0], [1.0, math.nan, 0, 0]])
def test_a_wrong_reward_is_named(images, values):
    with pytest.raises(sd3.InputError, match="--reward mine: .*must give 4 finite floats"):
        sd3.score("mine", lambda *_: values, images, PROMPTS[:4], [{}] * 4)


@pytest.mark.parametrize("make", [list, np.asarray, lambda v: torch.tensor(v, dtype=torch.float64)])
def test_rewards_may_be_list_array_or_tensor(images, make):
    got = sd3.score("mine", lambda *_: make([1.0, 2.0, 3.0, 4.0]), images, PROMPTS[:4], [{}] * 4)
    assert got.dtype == torch.float32
    assert got.tolist() == [1, 2, 3, 4]


# --------------------------------------------------------------------------------------- D. prompts


def read(path, column=None):
    return sd3.load_rows("prompts", str(path), column, None)


def test_text_prompts_are_unique_and_keep_their_order(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffb\n\n a \r\nb\nc\u2028d\n".encode())
    texts, metadata, unused, source = read(tmp_path / "p.txt")
    assert (texts, metadata) == (["b", "a", "c\u2028d"], [{}] * 3)  # no byte order mark
    assert unused == "--prompts: of 4 rows 0 without a prompt, 1 repeated: not used"
    assert source == str(tmp_path / "p.txt")


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "list.json", "p.parquet", "p.csv"])
def test_tables_bring_their_metadata_and_say_what_is_not_used(tmp_path, name):
    rows = [{"caption": "x", "digit": 3}, {"caption": "", "digit": 1}, {"caption": "y", "digit": 5}]
    rows.append({"caption": "x", "digit": 4})
    if name == "list.json":
        (tmp_path / name).write_text(json.dumps(rows, indent=2))
    elif name == "p.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    elif name == "p.csv":
        lines = [f"{row['caption']},{row['digit']}" for row in rows]
        (tmp_path / name).write_text("\n".join(["caption,digit", *lines]))
    else:
        (tmp_path / name).write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows))
    texts, metadata, unused, _ = read(tmp_path / name)
    assert (texts, metadata) == (["x", "y"], [{"digit": 3}, {"digit": 5}])
    assert unused == "--prompts: of 4 rows 1 without a prompt, 1 repeated: not used"


def test_a_json_list_of_strings_is_read(tmp_path):
    (tmp_path / "p.json").write_text('["a red cat", "a blue dog"]')
    assert read(tmp_path / "p.json")[0] == ["a red cat", "a blue dog"]


def test_a_dataset_folder_is_read_by_the_datasets_library(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.csv").write_text("Prompts,n\nred,1\nblue,2\n")
    texts, metadata, _, source = read(tmp_path / "data", "Prompts")
    assert (texts, metadata) == (["red", "blue"], [{"n": 1}, {"n": 2}])
    assert source == str(tmp_path / "data")


def test_a_configuration_of_a_dataset_can_be_named(tmp_path):
    for name in ("main", "other"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "train.csv").write_text(f"prompt\n{name}\n")
    configurations = "".join(
        f"- config_name: {name}\n  data_files: {name}/*.csv\n" for name in ("main", "other")
    )
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{configurations}---\n")
    assert read(f"{tmp_path / 'set'}:other")[0] == ["other"]
    with pytest.raises(sd3.InputError, match=r"main.*NAME:CONFIGURATION"):
        read(tmp_path / "set")


def test_every_tenth_prompt_is_held_out_and_not_trained_on(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {i}" for i in range(25)))
    train, heldout, note, _ = sd3.load_prompts(sd3.Args(prompts=str(tmp_path / "p.txt")))
    assert list(heldout) == ["prompt 0", "prompt 10", "prompt 20"]
    assert len(train) == 22
    assert not train.keys() & heldout.keys()
    assert "every tenth" in note


def test_real_prompt_files():
    folder = Path(os.environ.get("ADRPO_DATA", "")) / "prompts"
    if not os.environ.get("ADRPO_DATA") or not folder.is_dir():
        pytest.skip("no prompts in ADRPO_DATA")
    train, heldout, *_ = sd3.load_prompts(sd3.Args(prompts=str(folder / "drawbench.txt")))
    assert (len(train), len(heldout)) == (180, 20)
    other = sd3.Args(
        prompts=str(folder / "drawbench.txt"), eval_prompts=str(folder / "pickscore_test.txt")
    )
    train, heldout, note, _ = sd3.load_prompts(other)
    assert (len(train), len(heldout)) == (200, 32)
    assert "0 of the" in note and "not held-out" not in note


def test_evaluating_on_training_prompts_is_said(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("only one")  # nothing to hold out: trained and evaluated on
    train, heldout, note, _ = sd3.load_prompts(sd3.Args(prompts=str(path)))
    assert list(train) == list(heldout) == ["only one"]
    assert "1 of the 1 evaluation prompts are trained on: that is not held-out" in note
    path.write_text("one\ntwo\nthree")
    _, _, note, _ = sd3.load_prompts(sd3.Args(prompts=str(path), eval_prompts=str(path)))
    assert note == "3 of the 3 evaluation prompts are trained on: that is not held-out"
    (tmp_path / "other.txt").write_text("four")
    _, _, note, _ = sd3.load_prompts(
        sd3.Args(prompts=str(path), eval_prompts=str(tmp_path / "other.txt"))
    )
    assert "0 of the" in note and "not held-out" not in note


# ----------------------------------------------------------------- E. the program as a user runs it


@pytest.mark.parametrize("style", STYLES)
def test_a_run_leaves_everything_behind(runs, style):
    run, out = runs[style]
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    expected = {
        "args.json",
        "metrics.jsonl",
        "summary.json",
        "base.pt",
        "final/pytorch_lora_weights.safetensors",
    }
    expected |= {f"samples/{step:06d}.png" for step in range(3)} | {"samples/prompts.txt"}
    expected |= {f"samples/final/{p:04d}_{i:02d}.png" for p in range(2) for i in range(2)}
    expected |= {".lock", "checkpoint.pt", "checkpoint-previous.pt"}
    expected |= {f"adapters/{step:06d}/pytorch_lora_weights.safetensors" for step in (1, 2)}
    assert {name for name in names if "tfevents" not in name} == expected
    record = json.loads((run / "args.json").read_text())
    assert record["args"]["lora_rank"] == 4
    assert {"torch", "diffusers", "transformers", "peft", "accelerate", "open_clip"} < set(
        record["versions"]
    )
    assert "held out" in out
    assert f'pipe.load_lora_weights("{run / "final"}")' in out
    name = "pytorch_lora_weights.safetensors"
    final, kept = load_file(run / "final" / name), load_file(run / "adapters" / "000002" / name)
    assert all(torch.equal(final[key], kept[key]) for key in final | kept)
    # no more than the trained weights, twice more in the optimiser
    weights = sum(value.numel() * 4 for value in final.values())
    assert (run / "checkpoint.pt").stat().st_size < 3 * weights + 300 * len(final) * 3 + 20_000
    assert Image.open(run / "samples" / "final" / "0001_01.png").size == (32, 32)


@pytest.mark.parametrize("style", STYLES)
def test_metrics_of_a_run(runs, style):
    run, _ = runs[style]
    rows = read_metrics(run, timing=True)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["eval/w2"] == 0
    assert rows[0]["eval/clip_diversity_ratio"] == 1
    assert rows[1]["adrpo/coefficient_mean"] == pytest.approx(0.25, abs=0.2)
    assert rows[2]["eval/w2"] > 0
    assert rows[2]["losses/divergence"] > 0
    events = EventAccumulator(str(run))
    events.Reload()
    for tag in set().union(*rows) - {"step"}:
        logged = {event.step: event.value for event in events.Scalars(tag)}
        assert logged == pytest.approx(
            {row["step"]: row[tag] for row in rows if tag in row}, rel=1e-5
        ), tag
    assert [image.step for image in events.Images("samples")] == [0, 1, 2]
    assert (run / "samples" / "prompts.txt").read_text().splitlines() == [PROMPTS[0], PROMPTS[10]]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["final"]["reward"] == rows[2]["eval/reward"]
    assert summary["base"]["reward"] == rows[0]["eval/reward"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_divergence_is_exactly_zero_before_the_first_step(models, base_flags, tmp_path, precision):
    flags = [
        "--updates-per-rollout",
        "1",
        "--iterations",
        "1",
        "--output-dir",
        tmp_path,
        "--run-name",
        "r",
    ]
    finish(*base_flags, "--model-id", models["sd3.5"], *flags, "--precision", precision)
    rows = read_metrics(tmp_path / "r")
    assert rows[1]["losses/divergence"] == 0
    assert rows[1]["eval/w2"] > 0


@pytest.mark.parametrize("style", STYLES)
def test_the_lora_loads_in_the_stock_pipeline_with_identical_output(models, runs, style):
    run, _ = runs[style]
    noise = numbers(2, 8, 8, 8, dtype=torch.float32)
    settings = {
        "num_inference_steps": 3,
        "guidance_scale": 2.0,
        "max_sequence_length": 8,
        "output_type": "latent",
    }
    stock = tiny_models.load_sd3(models[style])
    untuned = stock(PROMPTS[:2], latents=noise.clone(), **settings).images
    stock.load_lora_weights(run / "final")
    tuned = stock(PROMPTS[:2], latents=noise.clone(), **settings).images
    # the same from the weights in the run's checkpoint, put into a model as the script builds it
    memory = tiny_models.load_sd3(models[style])
    memory.transformer.requires_grad_(False)
    lora = sd3.add_lora(memory.transformer, sd3.Args(lora_rank=4, lora_alpha=8))
    weights = sd3.load_checkpoint(run)["lora"]
    for parameter, value in zip(lora, weights, strict=True):
        parameter.data.copy_(value)
    expected = memory(PROMPTS[:2], latents=noise.clone(), **settings).images
    torch.testing.assert_close(tuned, expected, rtol=0, atol=0)
    assert (tuned - untuned).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_printed_lines_load_the_result_on_half_precision_files(
    models, families, base_flags, tmp_path, family
):
    """SD3's files are fp16: the lines must say the dtype. Run as printed."""
    folder = tmp_path / "half"
    half = {"default": torch.float16}
    DiffusionPipeline.from_pretrained((models | families)[family], dtype=half).save_pretrained(
        folder
    )
    flags = ["--max-sequence-length", "16", "--output-dir", tmp_path, "--run-name", "r"]
    out = finish(*base_flags, "--model-id", folder, *flags)
    lines = out[out.index("import torch\n") :]
    space = {}
    exec(lines, space)
    pipe, shape = space["pipe"], (2, 8, 8, 8) if family == "sd3" else (2, 16, 32)
    noise = numbers(*shape, dtype=torch.float32)
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "max_sequence_length": 16}
    settings |= {"height": 32, "width": 32, "output_type": "latent"}
    tuned = pipe(PROMPTS[:2], latents=noise.clone(), **settings).images
    pipe.unload_lora_weights()
    untuned = pipe(PROMPTS[:2], latents=noise.clone(), **settings).images
    assert (tuned - untuned).abs().max() > 1e-4
    options = {"guidance": 2.0}
    flow, _ = open_flow(folder, **options)
    lora = sd3.add_lora(flow.pipe.transformer, sd3.Args(lora_rank=4, lora_alpha=8))
    for parameter, value in zip(lora, sd3.load_checkpoint(tmp_path / "r")["lora"], strict=True):
        parameter.data.copy_(value)
    mine, _ = sd3.sample(flow, PROMPTS[:2], noise, 2)
    torch.testing.assert_close(mine, tuned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_batch_sizes_do_not_change_the_result(models, base_flags, tmp_path, method):
    """1 x 16 = 16 x 1 points of training, 1 x 8 = 3 + 3 + 2 images of rollout and evaluation."""
    flags = [*base_flags, "--model-id", models["sd3"], "--method", method, "--output-dir", tmp_path]
    flags += ["--beta-dpo", "5", "--learning-rate", "1e-3"]
    finish(*flags, "--run-name", "whole")
    finish(
        *flags,
        "--run-name",
        "parts",
        "--train-batch",
        "2" if method == "dpo" else "1",
        "--rollout-batch",
        "3",
    )
    assert_same_run(tmp_path / "whole", tmp_path / "parts", rtol=2e-3, atol=2e-4)
    w2 = [read_metrics(tmp_path / name)[-1]["eval/w2"] for name in ("whole", "parts")]
    assert min(w2) > 0


@pytest.mark.parametrize(
    "change",
    [
        ["--gradient-checkpointing"],
    ],
)
def test_memory_savers_do_not_change_the_result(models, base_flags, runs, tmp_path, change):
    finish(
        *base_flags,
        "--model-id",
        models["sd3.5"],
        "--output-dir",
        tmp_path,
        "--run-name",
        "r",
        *change,
    )
    assert_same_run(runs["sd3.5"][0], tmp_path / "r", rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        ["--share-noise"],
        ["--timesteps-per-sample", "1"],
        ["--timestep-distribution", "logit-normal"],
        ["--timestep-shift", "3"],
        ["--adv-norm", "none"],
        ["--adv-norm", "base"],
        ["--adv-clip-k", "0.1"],
        ["--method", "orw", "--alpha", "0"],
        ["--method", "dpo", "--dpo-online"],
        ["--seed", "2"],
    ],
)
def test_these_flags_do_change_the_result(models, base_flags, runs, tmp_path, change):
    finish(
        *base_flags,
        "--model-id",
        models["sd3"],
        "--output-dir",
        tmp_path,
        "--run-name",
        "r",
        *change,
    )
    name = "final/pytorch_lora_weights.safetensors"
    one, other = load_file(runs["sd3"][0] / name), load_file(tmp_path / "r" / name)
    assert max((one[key] - other[key]).abs().max() for key in one) > 1e-5


def test_two_runs_are_the_same_run(models, base_flags, runs, tmp_path):
    finish(
        *base_flags, "--model-id", models["sd3"], "--output-dir", tmp_path, "--run-name", "again"
    )
    assert_same_run(runs["sd3"][0], tmp_path / "again")


def test_advantage_in_units_of_the_base_models_spread(models, base_flags, runs, tmp_path):
    """base_std is measured once, said, stored, and the same after a resume."""
    flags = ["--adv-norm", "base", "--output-dir", tmp_path, "--run-name", "r"]
    out = finish(*base_flags, "--model-id", models["sd3"], *flags)
    base = torch.load(tmp_path / "r" / "base.pt", weights_only=True)
    assert base["reward_std"] > 0
    assert f"+- {base['reward_std']:.3f} within a prompt; beta0 0.25 asks for" in out
    (tmp_path / "same.py").write_text(
        "def same(images, prompts, rows):\n    return [0.1] * len(images)\n"
    )
    flags += ["--run-name", "same", "--reward", f"{tmp_path}/same.py:same"]
    line = refused(*base_flags, "--model-id", models["sd3"], *flags)
    assert "the base model's are all equal; --adv-norm none goes on" in line


def test_the_models_of_clip_and_plugins_are_recorded(models, base_flags, tmp_path, monkeypatch):
    """A changed one is refused on resume."""
    plugin = "SOURCES = {'MINE': 'some/model@%s'}\ndef mine(images, prompts, rows):\n"
    plugin += "    return images.mean((1, 2, 3))\n"
    (tmp_path / "mine.py").write_text(plugin % "a")
    flags = ["--reward", f"{tmp_path}/mine.py:mine", "--iterations", "1", "--output-dir", tmp_path]
    finish(*base_flags, "--model-id", models["sd3"], *flags, "--run-name", "r")
    sources = json.loads((tmp_path / "r" / "args.json").read_text())["sources"]
    assert sources["MINE"] == "some/model@a"
    (tmp_path / "r" / "summary.json").unlink()
    (tmp_path / "mine.py").write_text(plugin % "b")
    assert "--resume: MINE: not what the run began with" in refused("--resume", tmp_path / "r")
    # a tag of open_clip: the commit is the folder of its file in the hub's cache
    file = tmp_path / "snapshots" / ("c" * 40) / "open_clip_model.safetensors"
    model = open_clip.create_model(f"local-dir:{models['clip']}")
    options = {}

    def create_model(name, pretrained, **given):
        options.update(given)
        return model

    monkeypatch.setattr(open_clip, "create_model", create_model)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda known: str(file))
    clip = sd3.Clip("ViT-L-14", "openai", torch.device("cpu"))
    assert clip.source == f"ViT-L-14:openai@{'c' * 40}"
    assert options["force_quick_gelu"]


def test_several_rewards_are_weighted_and_logged(models, base_flags, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def bright(images, prompts, metadata):\n    return images.mean(dim=(1, 2, 3))\n"
        "def dark(images, prompts, metadata):\n    return 1 - images.mean(dim=(1, 2, 3))\n"
    )
    rewards = ["--reward", "clip", f"{tmp_path}/mine.py:bright", "--reward-weights", "0.5", "10"]
    flags = [
        *rewards,
        "--eval-metrics",
        f"{tmp_path}/mine.py:dark",
        "--output-dir",
        tmp_path,
        "--run-name",
        "r",
    ]
    finish(*base_flags, "--model-id", models["sd3"], *flags)
    for row in read_metrics(tmp_path / "r")[1:]:
        assert row["reward/mean"] == pytest.approx(
            0.5 * row["reward/clip"] + 10 * row["reward/bright"], rel=1e-5
        )
        assert row["eval/reward"] == pytest.approx(
            0.5 * row["eval/clip"] + 10 * row["eval/bright"], rel=1e-5
        )
        assert row["eval/dark"] == pytest.approx(1 - row["eval/bright"], abs=1e-5)
        assert "reward/dark" not in row


def test_metadata_reaches_the_reward(models, base_flags, tmp_path):
    rows = [{"prompt": prompt, "number": i} for i, prompt in enumerate(PROMPTS)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(
        f"PROMPTS = {PROMPTS!r}\n"
        "def number(images, prompts, metadata):\n"
        "    assert [PROMPTS[row['number']] for row in metadata] == prompts\n"
        "    return [float(row['number']) for row in metadata]\n"
    )
    flags = [
        "--prompts",
        tmp_path / "p.jsonl",
        "--reward",
        f"{tmp_path}/mine.py:number",
        "--output-dir",
        tmp_path,
    ]
    finish(*base_flags, "--model-id", models["sd3"], *flags, "--run-name", "r")
    rows = read_metrics(tmp_path / "r")
    assert rows[1]["reward/frac_reward_zero_std"] == 1  # the reward is the same for a whole group
    assert rows[1]["adrpo/extrapolation_max"] == 0


# ----------------------------------------------------------------------- F. kill, resume, processes


def subprocess_flags(base_flags, model, folder, *more):
    return merged([*base_flags, "--model-id", model, "--output-dir", folder, *more])


def test_killed_while_saving_and_resumed_equals_straight(models, base_flags, tmp_path):
    longer = ["--iterations", "4", "--save-every", "2", "--adv-norm", "base"]
    flags = [*base_flags, "--model-id", models["sd3"], "--output-dir", tmp_path, *longer]
    finish(*flags, "--run-name", "straight")
    # A child that kills itself in the middle of writing its second checkpoint (iteration 4).
    program = (
        "import os, runpy, signal, sys\n"
        "sync, calls = os.fsync, []\n"
        "def dying_sync(file):\n"
        "    name = os.readlink(f'/proc/self/fd/{file}')\n"
        "    if name.endswith('checkpoint.part') and (calls.append(name) or len(calls) == 2):\n"
        "        os.ftruncate(file, 1000)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    sync(file)\n"
        "os.fsync = dying_sync\n"
        "script = sys.argv[1]; sys.argv = sys.argv[1:]\n"
        "runpy.run_path(script, run_name='__main__')\n"
    )
    command = [sys.executable, "-c", program, str(SCRIPT)]
    command += subprocess_flags(
        base_flags, models["sd3"], tmp_path, *longer, "--run-name", "killed"
    )
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]
    assert [row["step"] for row in read_metrics(tmp_path / "killed")] == [0, 1, 2, 3, 4]
    files = {path.name for path in (tmp_path / "killed").glob("checkpoint*")}
    assert files == {"checkpoint.pt", "checkpoint.part"}
    time.sleep(1.1)  # TensorBoard orders its files by the second
    finish("--resume", tmp_path / "killed")
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    events = EventAccumulator(str(tmp_path / "killed"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [1, 2, 3, 4]


def test_a_finished_run_resumes_to_itself(models, base_flags, runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs["sd3"][0], copy)
    before = load_file(copy / "final" / "pytorch_lora_weights.safetensors")
    summary = json.loads((copy / "summary.json").read_text())
    out = finish("--resume", "latest", "--output-dir", tmp_path)
    assert "is finished: nothing is left to do" in out
    (copy / "summary.json").unlink()  # killed after its last checkpoint: it is finished then
    time.sleep(1.1)
    finish("--resume", "latest", "--output-dir", tmp_path)
    after = load_file(copy / "final" / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert json.loads((copy / "summary.json").read_text()) == summary
    assert read_metrics(copy) == read_metrics(runs["sd3"][0])


def run_processes(count, flags, script=SCRIPT):
    launcher = "import torch.distributed.run as launcher; launcher.main()"
    command = [
        sys.executable,
        "-c",
        launcher,
        "--standalone",
        "--nproc-per-node",
        str(count),
        str(script),
        *flags,
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("method", ["adrpo", "dpo"])
def test_two_processes_are_one_with_the_same_batch(models, base_flags, tmp_path, method):
    more = ["--method", method, "--learning-rate", "1e-3", "--eval-images", "3"]
    more += ["--eval-max-prompts", "1"]  # 3 images: 2 each, one of them twice
    finish(
        *base_flags,
        "--model-id",
        models["sd3"],
        "--output-dir",
        tmp_path,
        "--run-name",
        "one",
        *more,
    )
    flags = subprocess_flags(
        base_flags, models["sd3"], tmp_path, "--run-name", "two", "--train-batch", "4", *more
    )
    run_processes(2, flags)
    assert_same_run(tmp_path / "one", tmp_path / "two", rtol=2e-3, atol=2e-4)


# ------------------------------------------------------------------------------------- H. bad input


def refused(*flags):
    code, _, err = run_script(*flags)
    assert isinstance(code, str), (code, err[-500:])
    assert code.startswith("error: ")
    assert len(code.splitlines()) == 1
    return code


BAD = [
    (["--group-size", "1"], "--group-size, --eval-images: at least 2"),
    (["--beta0", "0"], "--beta0 0.0: must be a finite number, and positive"),
    (["--adv-clip-k", "-1"], "--adv-clip-k -1.0: must be a finite number, and positive"),
    (["--method", "dpo", "--group-size", "5"], "must be even for dpo"),
    (["--reward", "clip", "clip"], "clip: the tag clip is taken"),
    (["--reward-weights", "1", "2"], "--reward-weights: must be as many as --reward names"),
    (["--reward-weights", "nan"], "--reward-weights nan: must be a finite number"),
    (["--reward", "beauty"], "beauty: give clip or FILE.py:function"),
    (["--eval-metrics", "beauty"], "--eval-metrics beauty: give clip or FILE.py:function"),
    (["--prompts", "no.txt"], "--prompts no.txt"),
    (["--prompts", "no/such/dataset"], "--prompts no/such/dataset"),
    (["--eval-prompts", "no.jsonl"], "--eval-prompts no.jsonl"),
    (["--model-id", "no/such-model"], "--model-id no/such-model"),
    (["--resume", "nowhere"], "--resume nowhere: no checkpoint in nowhere"),
    (["--resume="], "--resume : no checkpoint"),
]


@pytest.mark.parametrize("flags,message", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_flags_get_one_line(models, base_flags, tmp_path, monkeypatch, flags, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = [] if "--model-id" in flags else ["--model-id", models["sd3"]]
    assert message in refused(*base_flags, *model, "--output-dir", tmp_path / "runs", *flags)
    assert not list((tmp_path / "runs").glob("*/metrics.jsonl"))


def test_a_flag_given_twice_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--reward", "clip", "--reward", "mine.py:f"])
    with pytest.raises(SystemExit, match="error: a flag is given twice"):
        runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.parametrize("name", ["clip", "w2", "mean", "clip_diversity", "reward"])
def test_a_plugin_cannot_take_another_tag(models, base_flags, tmp_path, name):
    (tmp_path / "one.py").write_text(f"def {name}(images, prompts, rows):\n    return images\n")
    flags = ["--reward", "clip", "--eval-metrics", f"{tmp_path}/one.py:{name}"]
    line = refused(*base_flags, "--model-id", models["sd3"], *flags)
    assert f"--eval-metrics {tmp_path}/one.py:{name}: the tag {name} is taken" in line


def test_a_plugin_that_ends_the_program_is_an_error(models, base_flags, tmp_path):
    (tmp_path / "one.py").write_text("import sys\nsys.exit(0)\n")
    flags = ["--reward", f"{tmp_path}/one.py:f"]
    with pytest.raises(RuntimeError, match="the plug-in ended the program"):
        run_script(*base_flags, "--model-id", models["sd3"], *flags)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_3"])
def test_weights_that_are_not_there_are_refused(models, base_flags, tmp_path, part):
    shutil.copytree(models["sd3"], tmp_path / "model")
    (file,) = (tmp_path / "model" / part).glob("*.safetensors")
    weights = load_file(file)
    if part == "text_encoder_3":  # one weight lacks
        del weights[sorted(weights)[0]]
    else:  # all have another name, as saved from a compiled model
        weights = {f"_orig_mod.{name}": value for name, value in weights.items()}
    save_file(weights, file, {"format": "pt"})
    line = refused(*base_flags, "--model-id", tmp_path / "model")
    assert part in line
    assert "not in its files" in line or "diffusers can load" in line


def test_a_revision_is_recorded_by_its_commit_and_used_again(
    models, base_flags, tmp_path, monkeypatch
):
    """A stand-in of the hub's cache, offline: main is one commit, then another."""
    commits, cache = ("a" * 40, "b" * 40), tmp_path / "hub" / "models--some--model"
    for commit in commits:
        shutil.copytree(models["sd3"], cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commits[0])
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    def script(*flags):
        command = [sys.executable, str(SCRIPT), *merged(flags)]
        options = {"capture_output": True, "text": True, "timeout": 300, "check": False}
        return subprocess.run(command, env=environment, **options)

    flags = [*base_flags, "--model-id", "some/model", "--output-dir", tmp_path, "--run-name", "r"]
    result = script(*flags, "--iterations", "1")
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"revision='{commits[0]}'" in result.stdout
    record = json.loads((tmp_path / "r" / "args.json").read_text())
    assert record["args"]["model_id"] == "some/model"
    assert record["sources"]["model_id"] == f"some/model@{commits[0]}"
    assert record["sources"]["clip"] == f"local-dir:{models['clip']}"
    (cache / "refs" / "main").write_text(commits[1])
    (tmp_path / "r" / "summary.json").unlink()
    shutil.rmtree(cache / "snapshots" / commits[1])  # the resumed run does not look there
    result = script("--resume", tmp_path / "r")
    assert result.returncode == 0, result.stderr[-2000:]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert sd3.find_model(f"some/model@{commits[0]}") == ("some/model", commits[0])
    with pytest.raises(sd3.InputError, match="--model-id some/model@nosuch"):
        sd3.find_model("some/model@nosuch")


def test_empty_and_columnless_prompts(models, base_flags, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "--prompts" in (
        line := refused(
            *base_flags, "--model-id", models["sd3"], "--prompts", tmp_path / "empty.txt"
        )
    )
    assert line.endswith("see --prompt-column")
    (tmp_path / "p.jsonl").write_text('{"question": "why"}\n')
    line = refused(*base_flags, "--model-id", models["sd3"], "--prompts", tmp_path / "p.jsonl")
    assert "no text in column prompt (columns: question); see --prompt-column" in line


def test_an_existing_or_unwritable_folder_is_refused(models, base_flags, runs, tmp_path):
    folder = runs["sd3"][0]
    before = sorted(folder.rglob("*"))
    flags = [*base_flags, "--model-id", models["sd3"], "--output-dir"]
    line = refused(*flags, folder.parent, "--run-name", folder.name)
    assert "--run-name" in line and str(folder) in line
    assert sorted(folder.rglob("*")) == before
    (tmp_path / "file").write_text("")
    assert "--output-dir, --run-name" in refused(*flags, tmp_path / "file")


def test_resume_refuses_other_flags_other_prompts_and_damage(base_flags, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["sd3"][0], run)
    (run / "summary.json").unlink()
    line = refused("--resume", run, "--beta0", "0.5")
    assert "--beta0: the resumed run has 0.25; leave it out" in line
    line = refused("--resume", run, "--num-steps", "10")  # the default, but not this run's
    assert "--num-steps: the resumed run has 2; leave it out" in line
    line = refused("--resume", "latest", "--output-dir", tmp_path / "none")
    assert "--resume latest: no checkpoint" in line
    record = json.loads((run / "args.json").read_text())
    (tmp_path / "fewer.txt").write_text("\n".join(PROMPTS[:5]))
    changed = record | {"sources": record["sources"] | {"prompts": str(tmp_path / "fewer.txt")}}
    (run / "args.json").write_text(json.dumps(changed))
    assert "prompts_sha256: not what the run began with" in refused("--resume", run)
    (run / "args.json").write_text(json.dumps(record))
    with FileLock(run / ".lock"):  # as a process that is writing the run
        assert "another process is writing" in refused("--resume", run)
    metrics, good = (run / "metrics.jsonl").read_bytes(), (run / "checkpoint.pt").read_bytes()
    weights = [value.numpy().tobytes() for value in sd3.load_checkpoint(run)["lora"]]
    for place in (good.index(weights[0]) + 7, good.index(weights[-1]) + 50):  # one bit
        bad = bytearray(good)
        bad[place] ^= 1
        (run / "checkpoint.pt").write_bytes(bad)
        line = refused("--resume", run)
        assert "checkpoint.pt" in line
        assert "delete it to go on from checkpoint-previous.pt" in line
    assert (run / "metrics.jsonl").read_bytes() == metrics
    (run / "checkpoint.pt").unlink()
    time.sleep(1.1)
    finish("--resume", run)
    assert_same_run(runs["sd3"][0], run)


def test_a_disk_that_fills_up_during_the_run_is_one_line_and_the_run_resumes(
    models, base_flags, tmp_path, monkeypatch
):
    open_, writes = Path.open, []

    def full(path, mode="r", *rest, **more):
        if path.name == "checkpoint.part":
            writes.append(path)
            if len(writes) == 3:
                raise OSError(28, "No space left on device")
        return open_(path, mode, *rest, **more)

    flags = [
        *base_flags,
        "--model-id",
        models["sd3"],
        "--output-dir",
        tmp_path,
        "--iterations",
        "3",
    ]
    finish(*flags, "--run-name", "straight")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        assert "No space left on device; make room" in refused(*flags, "--run-name", "full")
    time.sleep(1.1)
    finish("--resume", tmp_path / "full")
    assert_same_run(tmp_path / "straight", tmp_path / "full")


def test_a_non_finite_loss_stops_before_the_step(models, base_flags, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def huge(images, prompts, metadata):\n"
        "    return [3e38 * (-1) ** i for i in range(len(images))]\n"
    )
    flags = ["--reward", f"{tmp_path}/mine.py:huge", "--adv-norm", "none", "--adv-clip-k", "None"]
    line = refused(
        *base_flags,
        "--model-id",
        models["sd3"],
        *flags,
        "--output-dir",
        tmp_path,
        "--run-name",
        "r",
    )
    assert "iteration 1: loss" in line
    assert not (tmp_path / "r" / "checkpoint.pt").exists()


def test_the_state_after_the_last_step_is_checked(models, base_flags, tmp_path):
    flags = ["--learning-rate", "1e30", "--iterations", "1", "--updates-per-rollout", "1"]
    flags += ["--output-dir", tmp_path, "--run-name", "r"]
    line = refused(*base_flags, "--model-id", models["sd3"], *flags)
    assert "not finite numbers" in line or "no finite numbers" in line
    assert not list((tmp_path / "r" / "final").iterdir())
    assert not (tmp_path / "r" / "checkpoint.pt").exists()


def test_a_small_group_is_warned_about(models, base_flags, tmp_path):
    flags = ["--group-size", "2", "--iterations", "1", "--output-dir", tmp_path]
    assert "warning: --group-size" in finish(*base_flags, "--model-id", models["sd3"], *flags)


def test_help_teaches():
    code, out, _ = run_script("--help")
    assert code == 0
    for words in (
        "--beta0",
        "--adv-clip-k",
        "baseline divergence weight",
    ):
        assert words in out


# ------------------------------------------------------------------------------------------ I. docs


def test_every_logged_tag_is_documented(runs, models, base_flags, tmp_path):
    finish(
        *base_flags,
        "--model-id",
        models["sd3"],
        "--method",
        "orw",
        "--output-dir",
        tmp_path,
        "--run-name",
        "orw",
    )
    rows = read_metrics(runs["sd3"][0], timing=True) + read_metrics(tmp_path / "orw", timing=True)
    written = set().union(*rows) - {"step"}
    documented = set(
        re.findall(r"`((?:reward|eval|losses|adrpo|charts)/[a-z0-9_]+)`", DOCS.read_text())
    )
    assert written | {"charts/peak_memory_gb"} == documented  # that one on a GPU only


def test_every_flag_in_the_docs_exists():
    fields = [*sd3.Args.__dataclass_fields__, *table1.Args.__dataclass_fields__]
    flags = {f"--{name.replace('_', '-')}" for name in fields}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", DOCS.read_text()))
    others = {
        "--nproc-per-node",
        "--no-t5",
        "--no-keep-adapters",
        "--data-dir",
        "--help",
    }
    assert named <= flags | others


def test_a_plugin_that_writes_into_its_inputs_changes_nothing_else():
    def writes(images, prompts, metadata):
        images.zero_()
        prompts.clear()
        metadata[0].clear()
        return [1.0, 2.0]

    images, prompts, rows = torch.rand(2, 3, 4, 4), ["a", "b"], [{"n": 1}, {"n": 2}]
    kept = images.clone()
    assert sd3.score("writes", writes, images, prompts, rows).tolist() == [1, 2]
    assert torch.equal(images, kept)
    assert (prompts, rows) == (["a", "b"], [{"n": 1}, {"n": 2}])
    for wrong in (lambda *_: None, lambda *_: ["x", "y"]):
        with pytest.raises(sd3.InputError, match="--reward w"):
            sd3.score("w", wrong, images, prompts, rows)
