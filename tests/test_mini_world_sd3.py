"""Tests of benchmark/mini_world_sd3.py: its captions, its tokenizers, its losses, and the folder as
others load it.

The worlds here are hardly trained: what is tested is that all parts are there, load by stock calls
and fit together. Real MNIST is found through the environment variable ADRPO_DATA (folder that holds
mnist/); without it that test skips.
"""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors.torch import load_file

from benchmark import mini_world_sd3 as world

SCRIPT = Path(world.__file__)
TINY = {"vae_steps": 3, "clip_steps": 3, "judge_steps": 3, "flow_steps": 3, "images_per_prompt": 2}
TINY_FLAGS = [
    word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))
]
diffusers_logging.disable_progress_bar()


def run_script(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A world built by the program as a user runs it: (folder, standard output)."""
    out = tmp_path_factory.mktemp("worlds") / "new" / "world"
    result = run_script(out, *TINY_FLAGS)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


@pytest.fixture(scope="session")
def folder(built):
    return built[0]


@pytest.fixture(scope="session")
def facts(folder):
    return json.loads((folder / "world.json").read_text())


@pytest.fixture(scope="session")
def pipe(folder):
    pipe = StableDiffusion3Pipeline.from_pretrained(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def clip(folder):
    """Model, preprocessing and tokenizer by the lines of the program's header."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}/clip")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}/clip")


@pytest.fixture(scope="session")
def painter():
    digits, labels, _ = world.load_data(None)
    return world.Painter(digits, labels)


# ------------------------------------------------------------------------------ A. the built folder


def test_the_table_is_printed(built, facts):
    out, printed = built
    for name, value in facts["figures"].items():
        assert any(
            line.split() == [*name.split(), f"{value:.4f}"] for line in printed.splitlines()
        ), name
    assert str(out / "samples.png") in printed
    assert set(facts["seconds"]) == {
        "autoencoder",
        "CLIP",
        "judge",
        "latents",
        "transformer",
        "samples",
    }
    assert all(np.isfinite(value) for value in facts["figures"].values())


@torch.no_grad()
def test_the_stock_pipeline_draws_at_the_stated_resolution(pipe, facts):
    lengths = {
        "max_sequence_length": facts["max_sequence_length"],
        "num_inference_steps": facts["num_steps"],
    }
    image = pipe(
        "a handwritten bold red seven", guidance_scale=facts["guidance_scale"], **lengths
    ).images[0]
    assert image.size == (facts["resolution"],) * 2
    guided = pipe(
        "a handwritten bold red seven", guidance_scale=2.0, **lengths, output_type="np"
    ).images
    assert guided.shape == (1, 32, 32, 3)
    assert np.isfinite(guided).all()


def test_the_folder_gives_the_figures_that_were_written(folder, pipe, facts):
    rows, _ = world.split_prompts()
    world.seed_stage(facts["seed"], 6)
    images = world.sample(pipe, [world.CAPTIONS[row] for row in rows], TINY["images_per_prompt"])
    judge = world.load_judge(folder / "judge")
    accepted = world.accepted_share(judge, images, world.ATTRIBUTES[rows])
    for name, value in accepted.items():
        assert facts["figures"][f"base samples the judge accepts: {name}"] == pytest.approx(
            value, abs=1e-9
        )


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2", "tokenizer_3"])
def test_every_word_is_one_token(pipe, name):
    tokenizer = getattr(pipe, name)
    empty = len(tokenizer("").input_ids)
    seen = set()
    for word in world.WORDS:
        (token,) = tokenizer.tokenize(word)
        assert len(tokenizer(word).input_ids) == empty + 1
        seen.add(tokenizer.convert_tokens_to_ids(token))
    assert len(seen) == len(world.WORDS)
    assert tokenizer.unk_token_id not in seen
    for caption in world.CAPTIONS:
        assert (
            len(tokenizer(caption).input_ids)
            == empty + len(caption.split())
            <= world.MAX_SEQUENCE_LENGTH
        )
    assert len(tokenizer("a photograph of a cat").input_ids) > empty


@torch.no_grad()
def test_the_text_encoders_tell_all_captions_apart(pipe, facts):
    length = facts["max_sequence_length"]
    embeds, _, pooled, _ = pipe.encode_prompt(
        world.CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    assert embeds.shape == (165, 2 * length, 128)
    assert pooled.shape == (165, 128)
    for features in (embeds.flatten(1), pooled):
        distance = torch.cdist(features, features) + torch.eye(165) * 1e6
        assert distance.min() > 0.01 * features.norm(dim=1).mean()


@torch.no_grad()
def test_latents_are_standardised(pipe, painter):
    latents, attributes = world.encode_latents(pipe.vae, painter, torch.arange(300))
    assert latents.shape == (600, world.LATENT_CHANNELS, world.LATENT_SIZE, world.LATENT_SIZE)
    assert attributes.shape == (600, 3)
    assert abs(latents.mean()) < 0.2
    assert 0.8 < latents.std() < 1.2


@torch.no_grad()
def test_open_clip_scores_images(clip, painter):
    model, preprocess, tokenizer = clip
    images, _ = painter.paint(torch.arange(6))
    pictures = [Image.fromarray(((x + 1) * 127.5).byte().permute(1, 2, 0).numpy()) for x in images]
    inputs = torch.stack([preprocess(picture) for picture in pictures])
    # 8-bit rounding and nothing else
    torch.testing.assert_close(inputs, images, atol=1 / 127, rtol=0)
    tokens = tokenizer(world.CAPTIONS)
    assert tokens.shape == (165, world.MAX_SEQUENCE_LENGTH)
    assert len({tuple(row) for row in tokens.tolist()}) == 165
    features = [
        model.encode_image(inputs, normalize=True),
        model.encode_text(tokens, normalize=True),
    ]
    scores = features[0] @ features[1].T
    assert scores.shape == (6, 165)
    assert scores.abs().max() <= 1 + 1e-5
    assert (scores.std(1) > 1e-4).all()


def test_clip_and_pipeline_tokenizers_agree(clip, pipe):
    padded = pipe.tokenizer(world.CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(clip[2](world.CAPTIONS), padded)


def test_judge_loads(folder, painter):
    judge = world.load_judge(folder / "judge")
    images, _ = painter.paint(torch.arange(20))
    shown = world.judge_predictions(judge, images / 2 + 0.5)
    assert shown.shape == (20, 3)
    assert shown.dtype == torch.int64
    assert (shown >= 0).all()
    assert (shown < torch.tensor(world.FREE)).all()


def test_prompt_files(folder):
    train, heldout = (
        (folder / f"{name}_prompts.txt").read_text().splitlines() for name in ("train", "heldout")
    )
    assert 30 <= len(train) <= 60
    assert len(heldout) >= 20
    assert len({*train, *heldout}) == len(train) + len(heldout)
    assert {*train, *heldout} <= {*world.CAPTIONS}
    rows = [
        json.loads(line) for line in (folder / "prompts_metadata.jsonl").read_text().splitlines()
    ]
    assert [(row["prompt"], row["split"]) for row in rows] == [
        *((prompt, "train") for prompt in train),
        *((prompt, "heldout") for prompt in heldout),
    ]
    for row in rows:
        words = row["prompt"].split()
        given = [
            row["thickness"],
            row["colour"],
            "digit" if row["digit"] is None else world.DIGITS[row["digit"]],
        ]
        assert words == ["a", "handwritten", *[word for word in given if word is not None]]


def test_samples_picture(folder):
    picture = np.asarray(Image.open(folder / "samples.png").convert("RGB"))
    assert min(picture.shape[:2]) > 300
    assert picture.std() > 10


def weights_of(folder):
    return {
        str(path.relative_to(folder)): load_file(path)
        for path in sorted(folder.rglob("*.safetensors"))
    }


@pytest.mark.parametrize("seed", [1, 2])
def test_the_seed_decides_the_weights(folder, tmp_path, seed):
    world.main(world.Args(out=tmp_path / "again", seed=seed, **TINY))
    first, again = weights_of(folder), weights_of(tmp_path / "again")
    assert first.keys() == again.keys()
    assert len(first) == 7  # transformer, autoencoder, three text encoders, CLIP, judge
    for name in first:
        assert first[name].keys() == again[name].keys()
        equal = all(torch.equal(first[name][key], again[name][key]) for key in first[name])
        assert equal == (seed == 1), name
    for name in ("train_prompts.txt", "heldout_prompts.txt", "prompts_metadata.jsonl"):
        assert (folder / name).read_text() == (tmp_path / "again" / name).read_text()


# ------------------------------------------------------------------------------------- B. the parts


def test_captions():
    assert world.CAPTIONS[0] == "a handwritten thin red zero"
    assert world.CAPTIONS[-1] == "a handwritten digit"
    assert len({*world.CAPTIONS}) == 165
    assert torch.equal(world.caption_index(world.ATTRIBUTES), torch.arange(165))
    assert {word for caption in world.CAPTIONS for word in caption.split()} == {*world.WORDS}


def test_drawn_captions_are_true_and_leave_out_what_they_should():
    torch.manual_seed(0)
    attributes = torch.stack([torch.randint(high, (20_000,)) for high in world.FREE], dim=1)
    asked = world.ATTRIBUTES[world.draw_captions(attributes)]
    assert world.fulfilled(asked, attributes).all()
    free = (asked == torch.tensor(world.FREE)).float().mean(0)
    torch.testing.assert_close(free, torch.tensor(world.FREE_SHARE), atol=0.02, rtol=0)


def test_painted_images_show_their_attributes(painter):
    torch.manual_seed(0)
    index = torch.arange(200)
    images, attributes = painter.paint(index)
    assert images.shape == (200, 3, 32, 32)
    assert images.min() >= -1
    assert images.max() <= 1
    assert torch.equal(attributes[:, 0], painter.labels[index])
    palette = torch.tensor([*world.COLOURS.values()])
    hue = (images / 2 + 0.5).amax((2, 3))
    assert torch.equal(
        torch.cdist(hue / hue.amax(1, keepdim=True), palette).argmin(1), attributes[:, 1]
    )
    ink = (images.amax(1) / 2 + 0.5).mean((1, 2)) / painter.digits[index].mean((1, 2, 3))
    assert ((ink > 1.2) == (attributes[:, 2] == 1)).all()
    assert [len(attributes[:, i].unique()) for i in range(3)] == [10, 4, 2]


def test_clip_loss_against_a_loop(clip, painter):
    model = clip[0].double()
    torch.manual_seed(3)
    images, attributes = painter.draw(torch.arange(500), 12)
    tokens = clip[2](world.CAPTIONS)
    torch.manual_seed(4)
    loss = world.clip_loss(model, images.double(), attributes, tokens).item()
    torch.manual_seed(4)
    drawn = world.draw_captions(attributes).tolist()
    with torch.no_grad():
        image_features = model.encode_image(images.double(), normalize=True).numpy()
        text_features = model.encode_text(tokens, normalize=True).numpy()
    logits = min(np.exp(model.logit_scale.item()), 25) * image_features @ text_features.T

    def is_true(caption, image):
        asked, shown = world.ATTRIBUTES[caption].tolist(), attributes[image].tolist()
        return all(a in (s, free) for a, s, free in zip(asked, shown, world.FREE, strict=True))

    total = 0.0
    for i, c in enumerate(drawn):
        captions = [logits[i, k] for k in range(165) if k == c or not is_true(k, i)]
        others = [logits[j, c] for j in range(12) if j == i or not is_true(c, j)]
        total += np.log(np.exp(captions).sum()) + np.log(np.exp(others).sum()) - 2 * logits[i, c]
    model.float()
    assert loss == pytest.approx(total / 24, rel=1e-9)


def test_accepted_share_counts_what_is_asked():
    asked = torch.tensor([[3, *world.FREE[1:]], [3, 1, 2], [world.FREE[0], 1, 0]])
    shown = torch.tensor([[[3, 0, 0], [4, 0, 0]], [[3, 1, 1], [3, 2, 1]], [[9, 1, 0], [9, 1, 1]]])

    def judge(flat):  # the answer is written into the image's first pixels
        answers = ((flat[:, 0, 0, :3] + 1) / 2).round().long()
        return [torch.nn.functional.one_hot(answers[:, i], world.FREE[i]).float() for i in range(3)]

    images = torch.zeros(3, 2, 3, 32, 32)
    images[..., 0, 0, :3] = shown.float()
    shares = world.accepted_share(judge, images, asked)
    assert [*shares.values()] == pytest.approx([5 / 6, 4 / 6, 3 / 6])


def test_a_short_training_teaches_the_judge_colours(painter, tmp_path):
    world.seed_stage(0, 0)
    order = torch.randperm(len(painter.labels))
    judge, accuracy = world.train_judge(painter, order[180:], order[:180], 60, tmp_path / "judge")
    assert accuracy[1] > 0.9
    assert not judge.training
    saved = world.load_judge(tmp_path / "judge").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in judge.state_dict().items())


# ------------------------------------------------------------------------------- C. data and faults


def write_pair(folder, images, labels, end=""):
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        raw = header + array.astype(np.uint8).tobytes()
        (folder / f"t10k-{kind}-ubyte{end}").write_bytes(gzip.compress(raw) if end else raw)


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_files_are_read(tmp_path, end):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (120, 28, 28)), rng.integers(0, 10, 120)
    write_pair(tmp_path, images, labels, end)
    digits, read, name = world.load_data(tmp_path)
    assert name == "mnist"
    assert digits.shape == (120, 1, 32, 32)
    assert torch.equal((digits[:, 0, 2:-2, 2:-2] * 255).round().long(), torch.tensor(images))
    assert torch.equal(read, torch.tensor(labels))


def test_real_mnist():
    data_dir = Path(os.environ.get("ADRPO_DATA", "missing")) / "mnist"
    if not data_dir.is_dir():
        pytest.skip("ADRPO_DATA does not name a folder with mnist/")
    digits, labels, _ = world.load_data(data_dir)
    assert digits.shape == (10_000, 1, 32, 32)
    assert labels.bincount().min() > 800


def damage(name):
    """A function that makes a folder with MNIST files with one fault."""

    def make(folder):
        folder.mkdir()
        write_pair(folder, np.zeros((120, 28, 28)), np.zeros(120), ".gz")
        images, labels = folder / "t10k-images-idx3-ubyte.gz", folder / "t10k-labels-idx1-ubyte.gz"
        if name == "no labels":
            labels.unlink()
        elif name == "cut":
            images.write_bytes(images.read_bytes()[:-20])
        elif name == "not gzip":
            images.write_bytes(b"<html>not found</html>")
        elif name == "not idx":
            images.write_bytes(gzip.compress(b"something else"))
        elif name == "other size":
            write_pair(folder, np.zeros((120, 20, 20)), np.zeros(120), ".gz")
        elif name == "other count":
            write_pair(folder, np.zeros((120, 28, 28)), np.zeros(119), ".gz")
        elif name == "not digits":
            write_pair(folder, np.zeros((120, 28, 28)), np.full(120, 11), ".gz")

    return make


@pytest.mark.parametrize(
    "fault", ["no labels", "cut", "not gzip", "not idx", "other size", "other count", "not digits"]
)
def test_damaged_data_is_refused(tmp_path, fault):
    damage(fault)(tmp_path / "mnist")
    with pytest.raises(world.InputError, match="--data-dir") as caught:
        world.main(world.Args(out=tmp_path / "out", data_dir=tmp_path / "mnist", **TINY))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [*TINY])
def test_counts_below_one_are_refused(tmp_path, name):
    with pytest.raises(world.InputError, match=f"--{name.replace('_', '-')} 0"):
        world.main(world.Args(out=tmp_path / "out", **TINY | {name: 0}))
    assert not (tmp_path / "out").exists()


def test_a_negative_seed_is_refused(tmp_path):
    with pytest.raises(world.InputError, match="--seed -1"):
        world.main(world.Args(out=tmp_path / "out", seed=-1, **TINY))


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(world.InputError, match="not empty"):
        world.main(world.Args(out=tmp_path, **TINY))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("fault", ["data-dir", "out"])
def test_a_fault_is_one_line_and_a_non_zero_exit(tmp_path, fault):
    (tmp_path / "file").write_text("")
    if fault == "data-dir":
        result = run_script(tmp_path / "out", "--data-dir", tmp_path / "nowhere", *TINY_FLAGS)
    else:
        result = run_script(tmp_path / "file" / "out", *TINY_FLAGS)
    assert result.returncode != 0
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert ("--data-dir" if fault == "data-dir" else "OUT") in line


# ----------------------------------------------------- metric and reward for the fine-tuning script


def test_every_caption_is_read_back_into_its_attributes():
    for attributes, text in zip(world.ATTRIBUTES.tolist(), world.CAPTIONS, strict=True):
        assert world.asked_for(text) == attributes


def test_accepted_is_the_judges_verdict(folder, monkeypatch):
    monkeypatch.setenv("MINI_WORLD", str(folder))
    world.world_judge.cache_clear()
    judge = world.load_judge(folder / "judge")
    images = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    shown = world.judge_predictions(judge, images)
    prompts = [world.caption(digit, *world.FREE[1:]) for digit in shown[:, 0].tolist()]
    assert world.accepted(images, prompts, [{}] * 64).tolist() == [1.0] * 64
    wrong = [world.caption((digit + 1) % 10, *world.FREE[1:]) for digit in shown[:, 0].tolist()]
    assert world.accepted(images, wrong, [{}] * 64).tolist() == [0.0] * 64
    exact = [world.caption(*row) for row in shown.tolist()]
    exact[3] = world.caption(shown[3, 0], (shown[3, 1] + 1) % 4, shown[3, 2])  # one wrong colour
    assert world.accepted(images, exact, [{}] * 64).tolist() == [float(i != 3) for i in range(64)]


@torch.no_grad()
def test_digit_probability_leaves_colour_and_thickness_free(folder, clip, monkeypatch):
    monkeypatch.setenv("MINI_WORLD", str(folder))
    world.digit_classifier.cache_clear()
    model, preprocess, tokenizer = clip
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = ["a handwritten bold red seven", "a handwritten green digit"]
    got = world.digit_probability(images, prompts, [{}] * 2)
    texts = model.encode_text(
        tokenizer([world.caption(digit, *world.FREE[1:]) for digit in range(10)]), normalize=True
    )
    expected = (25 * model.encode_image(images * 2 - 1, normalize=True) @ texts.T).softmax(1)
    assert got[0].item() == pytest.approx(expected[0, 7].item(), rel=1e-5)
    assert got[1].item() == 0
    same = world.digit_probability(images[:1], ["a handwritten seven"], [{}])
    assert same.item() == pytest.approx(got[0].item())


def test_without_a_world_the_metric_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setenv("MINI_WORLD", str(tmp_path))
    world.world_judge.cache_clear()
    with pytest.raises(world.InputError, match="MINI_WORLD=.*name the folder of a world"):
        world.accepted(torch.zeros(1, 3, 32, 32), ["a handwritten two"], [{}])
