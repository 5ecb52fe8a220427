"""A small text-to-image world, trained here: a Stable Diffusion 3 folder, a CLIP model as reward, a
judge, prompts.

Everything is real but small: the pipeline loads with stock diffusers and draws what the prompt asks
for, most of the time; the CLIP model loads with stock open_clip. So a fine-tuning script can be run
from end to end, and can improve something, in minutes on one CPU core without any download.

The images are 32x32 coloured handwritten digits; the captions
are `a handwritten [thin|bold] [colour] [digit word]`, where every attribute may be left out (the
digit's place is then taken by the word `digit`). What a caption leaves out is free: four colours,
two thicknesses, many handwritings. That is the diversity a fine-tuning method can lose.

    python benchmark/mini_world_sd3.py worlds/digits --data-dir data/mnist
    python benchmark/mini_world_sd3.py worlds/digits  # scikit-learn's digits: no data needed

What is left in the folder, and how to load it:

    model/                  pipe = StableDiffusion3Pipeline.from_pretrained("worlds/digits/model")
                            pipe("a handwritten bold red seven",
                                 num_inference_steps=world["num_steps"], guidance_scale=1.0,
                                 max_sequence_length=world["max_sequence_length"])
    clip/
        model, preprocess = open_clip.create_model_from_pretrained("local-dir:worlds/digits/clip")
        tokenizer = open_clip.get_tokenizer("local-dir:worlds/digits/clip")
        model.eval().encode_image(preprocess(picture)[None], normalize=True)
        model.encode_text(tokenizer([prompt]), normalize=True)
        (for images [B,3,32,32] in [0,1], `images * 2 - 1` is all that preprocess does)
    judge/                  load_judge("worlds/digits/judge"), judge_predictions(judge, images), of
                            this file
    world.json              num_steps, resolution, max_sequence_length, guidance_scale; flags;
                            figures; seconds
    train_prompts.txt, heldout_prompts.txt
                            one prompt a line, no combination of attributes in both
    prompts_metadata.jsonl  prompt, split, digit, colour, thickness (null: free) of every prompt in
                            the two
    samples.png             samples of the base model, not chosen

- Use `max_sequence_length` of world.json everywhere. SD3 attends to the padding of its T5 prompt:
  with the pipeline's default of 256 the network sees what it was never trained on, and 280 tokens
  per image instead of 32.
- The CLIP model is the reward. The judge is another network, trained apart, to tell whether the
  reward was earned or fooled: never use it as reward.
- The text encoders are random and frozen: with one token per word, what they give still tells the
  words apart, and the transformer learns to read it.
- The model is made to be sampled without guidance (guidance_scale 1). It has seen empty prompts
  too, so that guidance is possible.
"""

import copy
import dataclasses
import functools
import gzip
import itertools
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

# Before transformers is imported: nothing here may look online.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import tyro
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

matplotlib.use("Agg")  # before pyplot: there may be no screen
import matplotlib.pyplot as plt

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (1.0, 0.15, 0.15),
    "green": (0.15, 1.0, 0.15),
    "blue": (0.2, 0.35, 1.0),
    "yellow": (1.0, 0.9, 0.1),
}
THICKNESSES = ("thin", "bold")
WORDS = ("a", "handwritten", *THICKNESSES, *COLOURS, *DIGITS, "digit")

# An image's or caption's attributes are three numbers: digit, colour, thickness. The last value of
# each means "free".
FREE = (len(DIGITS), len(COLOURS), len(THICKNESSES))
FREE_SHARE = (0.1, 0.35, 0.6)  # how often a training caption leaves the attribute out

RESOLUTION = 32
MAX_SEQUENCE_LENGTH = 8  # the longest caption has five words, and CLIP adds a token at each end
NUM_STEPS = 10
LATENT_CHANNELS = 8
LATENT_SIZE = 8


class InputError(ValueError):
    """Something the user gave cannot work. Its message is one line that names the flag and the
    remedy."""


@dataclasses.dataclass
class Args:
    out: tyro.conf.Positional[Path]
    """new or empty folder that receives the world"""
    data_dir: Path | None = None
    """folder with MNIST's two test files (t10k-*-ubyte, gzipped or not); default: scikit-learn's
    1,797 digits, enlarged, which are fewer and coarser"""
    seed: int = 1
    """seed of everything: the same seed gives the same weights on one machine"""
    vae_steps: int = 550
    """steps of 32 images for the autoencoder; too few: blurred digits whatever the flow does,
    colours mixed up"""
    clip_steps: int = 600
    """steps of 64 pairs for the CLIP model; too few: the reward is noise"""
    judge_steps: int = 800
    """steps of 128 images for the judge; too few: it refuses good samples"""
    flow_steps: int | None = None
    """steps of 64 latents for the transformer; default: 1200 on MNIST, 550 on scikit-learn's
    digits, which are learnt sooner. Too few: malformed digits; many more leave nothing to
    improve"""
    images_per_prompt: int = 16
    """base samples per training prompt for the share that the judge accepts"""


# ----------------------------------------------------------------------------------------- captions


def caption(digit: int, colour: int, thickness: int) -> str:
    """The caption of one combination of attributes, the value in FREE meaning that the attribute is
    left out."""
    words = (
        "a",
        "handwritten",
        (*THICKNESSES, "")[thickness],
        (*COLOURS, "")[colour],
        (*DIGITS, "digit")[digit],
    )
    return " ".join(word for word in words if word)


# All 11 x 5 x 3 captions; row i of ATTRIBUTES [165,3] holds the attributes of CAPTIONS[i].
ATTRIBUTES = torch.tensor(list(itertools.product(*[range(free + 1) for free in FREE])))
CAPTIONS = [caption(*row) for row in ATTRIBUTES.tolist()]


def caption_index(attributes: Tensor) -> Tensor:
    """Row in CAPTIONS of attributes [B,3] -> [B]."""
    return attributes @ torch.tensor([(FREE[1] + 1) * (FREE[2] + 1), FREE[2] + 1, 1])


def draw_captions(attributes: Tensor) -> Tensor:
    """A random true caption for each image: attributes [B,3] -> rows in CAPTIONS [B]."""
    free = torch.rand(attributes.shape) < torch.tensor(FREE_SHARE)
    return caption_index(torch.where(free, torch.tensor(FREE), attributes))


def fulfilled(asked: Tensor, shown: Tensor) -> Tensor:
    """Which of the asked attributes [...,3] the shown ones [...,3] have; a free one is fulfilled by
    anything."""
    return (asked == shown) | (asked == torch.tensor(FREE))


def split_prompts() -> tuple[list[int], list[int]]:
    """Rows in CAPTIONS of the training and of the held-out prompts: no combination of attributes is
    in both.

    Every digit alone is a training prompt; one colour and one thickness of each digit are held out,
    and so are all the captions with three attributes (one per digit is listed, in its held-out
    colour)."""
    colour, thickness = len(COLOURS), len(THICKNESSES)
    train = [(digit, *FREE[1:]) for digit in range(10)]
    heldout = []
    for digit in range(10):
        for c in range(colour):
            (heldout if c == digit % colour else train).append((digit, c, FREE[2]))
        for t in range(thickness):
            (heldout if t == digit % thickness else train).append((digit, FREE[1], t))
        heldout.append((digit, digit % colour, digit % thickness))
    train += [(FREE[0], c, FREE[2]) for c in range(colour - 1)]
    heldout.append((FREE[0], colour - 1, FREE[2]))
    return caption_index(torch.tensor(train)).tolist(), caption_index(
        torch.tensor(heldout)
    ).tolist()


def write_prompts(out: Path) -> None:
    """train_prompts.txt, heldout_prompts.txt and prompts_metadata.jsonl."""
    names = ([*range(10), None], [*COLOURS, None], [*THICKNESSES, None])
    rows = []
    for split, indices in zip(("train", "heldout"), split_prompts(), strict=True):
        (out / f"{split}_prompts.txt").write_text("".join(f"{CAPTIONS[i]}\n" for i in indices))
        for i in indices:
            values = [
                name[value] for name, value in zip(names, ATTRIBUTES[i].tolist(), strict=True)
            ]
            metadata = dict(zip(("digit", "colour", "thickness"), values, strict=True))
            rows.append({"prompt": CAPTIONS[i], "split": split} | metadata)
    (out / "prompts_metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


# --------------------------------------------------------------------------------------------- data


def read_idx(data_dir: Path, name: str) -> np.ndarray:
    """One IDX file of unsigned bytes, gzipped or not, as an array. Raises InputError."""
    files = [data_dir / name, data_dir / f"{name}.gz"]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise InputError(
            f"--data-dir {data_dir}: no {name} or {name}.gz in it; leave the flag out to use other "
            "digits"
        )
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if raw[:3] != b"\0\0\x08":
            raise ValueError("it is not an IDX file of bytes")
        shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise InputError(
            f"--data-dir {data_dir}: {path.name} cannot be read ({error}); fetch it again"
        ) from error


def load_data(data_dir: Path | None) -> tuple[Tensor, Tensor, str]:
    """Digits float [N,1,32,32] in [0,1], labels int64 [N] and the name of the data set. Raises
    InputError."""
    if data_dir is None:
        # 8x8: enlarged to the 20x20 a digit takes in MNIST, contrast stretched.
        bunch = load_digits()
        large = F.interpolate(
            torch.tensor(bunch.images).float()[:, None] / 16, size=20, mode="bicubic"
        )
        return (
            F.pad(((large - 0.2) * 1.6).clamp(0, 1), (6, 6, 6, 6)),
            torch.tensor(bunch.target).long(),
            "digits",
        )
    images, labels = (
        read_idx(data_dir, "t10k-images-idx3-ubyte"),
        read_idx(data_dir, "t10k-labels-idx1-ubyte"),
    )
    right = images.shape[1:] == (28, 28) and labels.shape == images.shape[:1] and len(labels) >= 100
    if not right or labels.max() > 9:
        found = f"{list(images.shape)} and {list(labels.shape)}"
        raise InputError(
            f"--data-dir {data_dir}: not 28x28 digits with labels ({found}); fetch the files again"
        )
    digits = torch.tensor(images).float()[:, None] / 255
    return F.pad(digits, (2, 2, 2, 2)), torch.tensor(labels).long(), "mnist"


class Painter:
    """Draws the world's images: white digits in a random colour and thickness, on black."""

    def __init__(self, digits: Tensor, labels: Tensor):
        self.digits, self.labels = digits, labels
        self.bold = F.max_pool2d(digits, 3, stride=1, padding=1)
        self.palette = torch.tensor(list(COLOURS.values()))

    def paint(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Digits number `index` [B] -> images float [B,3,32,32] in [-1,1] and their attributes
        int64 [B,3]."""
        colour = torch.randint(len(COLOURS), index.shape)
        thickness = torch.randint(len(THICKNESSES), index.shape)
        strokes = torch.where(
            thickness.view(-1, 1, 1, 1) == 1, self.bold[index], self.digits[index]
        )  # [B,1,32,32]
        images = strokes * self.palette[colour].view(-1, 3, 1, 1) * 2 - 1
        return images, torch.stack([self.labels[index], colour, thickness], dim=1)

    def draw(self, pool: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """`count` random digits of `pool` [N], painted."""
        return self.paint(pool[torch.randint(len(pool), (count,))])


def disturb(images: Tensor, strength: float) -> Tensor:
    """Noise of random strength, up to `strength`, on images [B,3,32,32]: a reward model or a judge
    that only ever saw clean digits is at a loss before a generated one."""
    return images + strength * torch.rand(len(images), 1, 1, 1) * torch.randn(images.shape)


# ------------------------------------------------------------------------------------------- models


def merge_word(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one word: its pieces after all merges of `ranks`, lowest rank first."""
    pieces = [*word[:-1], f"{word[-1]}</w>"]
    while pairs := [pair for pair in itertools.pairwise(pieces) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        at = next(i for i, pair in enumerate(itertools.pairwise(pieces)) if pair == best)
        pieces[at : at + 2] = ["".join(best)]
    return pieces


def build_clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer for which every word of the captions is one token; any other text falls
    apart into bytes.

    Merges are added word by word, each only where the merges so far leave the word in pieces: a
    later merge ranks lower than all earlier ones, so it cannot break a word that is already
    whole."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens, ranks = [*alphabet, *[f"{letter}</w>" for letter in alphabet]], {}
    for word in WORDS:
        while len(pieces := merge_word(word, ranks)) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            tokens.append(pieces[0] + pieces[1])
    # The end token comes last: CLIP's text towers read the feature at the highest token number.
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=list(ranks), model_max_length=MAX_SEQUENCE_LENGTH)


def build_t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer with one token per word of the captions, and one for all other words."""
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -9.0),
        *[(f"▁{word}", -5.0) for word in WORDS],
    ]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=MAX_SEQUENCE_LENGTH)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """A random CLIP text encoder, with larger embeddings than CLIP starts with: nobody trains
    these, so the words have to differ from the outset."""
    config = CLIPTextConfig(
        hidden_size=64,
        intermediate_size=128,
        projection_dim=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_SEQUENCE_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModelWithProjection(config)
    for name, parameter in model.named_parameters():
        if "embedding" in name:
            nn.init.normal_(parameter, std=0.5 if "token" in name else 0.25)
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def build_pipeline() -> StableDiffusion3Pipeline:
    """All parts of a Stable Diffusion 3 pipeline, small and untrained."""
    clip_tokenizer, t5_tokenizer = build_clip_tokenizer(), build_t5_tokenizer()
    t5_config = T5Config(
        vocab_size=len(t5_tokenizer),
        d_model=128,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=t5_tokenizer.pad_token_id,
        eos_token_id=t5_tokenizer.eos_token_id,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=LATENT_CHANNELS,
        sample_size=RESOLUTION,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    # Residual branches that start at zero, and a posterior that starts narrow (log-variance -5): in
    # so few steps there is no time to first unlearn random branches and noise.
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        vae.encoder.conv_out.weight[LATENT_CHANNELS:] *= 0.1
        vae.encoder.conv_out.bias[LATENT_CHANNELS:] = -5.0
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        num_attention_heads=3,
        attention_head_dim=32,
        caption_projection_dim=96,
        # T5's width; the two CLIP encoders' features side by side are as wide.
        joint_attention_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=LATENT_SIZE,
        qk_norm="rms_norm",
    )
    # Every block starts as the identity, the output at zero.
    for name, parameter in transformer.named_parameters():
        if "norm1" in name or "norm_out" in name or name.startswith("proj_out"):
            nn.init.zeros_(parameter)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=build_text_encoder(clip_tokenizer),
        tokenizer=clip_tokenizer,
        text_encoder_2=build_text_encoder(clip_tokenizer),
        tokenizer_2=clip_tokenizer,
        text_encoder_3=T5EncoderModel(t5_config),
        tokenizer_3=t5_tokenizer,
    )
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3, vae, transformer):
        part.eval()
    return pipe


def clip_config(tokenizer: CLIPTokenizer) -> dict:
    """open_clip_config.json of the CLIP model."""
    text = {
        "context_length": MAX_SEQUENCE_LENGTH,
        "vocab_size": len(tokenizer),
        "width": 64,
        "heads": 4,
        "layers": 2,
    }
    # For a local folder open_clip reads the tokenizer's files beside this one; the name only has to
    # be there.
    text["hf_tokenizer_name"] = "mini-world"
    vision = {"image_size": RESOLUTION, "patch_size": 8, "width": 64, "head_width": 16, "layers": 3}
    # Images in [-1,1], as the autoencoder's.
    normalisation = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    model = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}
    return {"model_cfg": model, "preprocess_cfg": normalisation}


class Judge(nn.Module):
    """Classifier of digit, colour and thickness: images [B,3,32,32] in [-1,1] -> logits [B,10],
    [B,4], [B,2]. Convolutions, where the CLIP model is a transformer: so that the two do not share
    their weaknesses."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()]
        layers += [
            nn.Conv2d(32, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
        ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(64, sum(FREE))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.head(self.features(images)).split(FREE, dim=1)


def load_judge(folder: str | Path) -> Judge:
    """The judge of OUT/judge."""
    judge = Judge()
    judge.load_state_dict(load_file(Path(folder) / "judge.safetensors"))
    return judge.eval()


@torch.no_grad()
def judge_predictions(judge: Judge, images: Tensor) -> Tensor:
    """Digit (0-9), colour (position in COLOURS) and thickness (0 thin, 1 bold) of images
    [B,3,32,32] in [0,1]: int64 [B,3]."""
    return torch.stack([logits.argmax(1) for logits in judge(images * 2 - 1)], dim=1)


@functools.cache
def world_judge() -> Judge:
    """The judge of the world that the environment variable MINI_WORLD names. Raises InputError."""
    folder = Path(os.environ.get("MINI_WORLD", "")) / "judge"
    if not (folder / "judge.safetensors").is_file():
        raise InputError(
            f"MINI_WORLD={os.environ.get('MINI_WORLD', '')}: no judge in it; name the folder of a "
            "world"
        )
    return load_judge(folder)


def asked_for(prompt: str) -> list[int]:
    """Digit, colour and thickness a caption asks for, the value in FREE where it does not say: "a
    handwritten red two" -> [2, 0, 2]."""
    values = []
    for names, free in zip((DIGITS, tuple(COLOURS), THICKNESSES), FREE, strict=True):
        values.append(next((i for i, name in enumerate(names) if name in prompt.split()), free))
    return values


def accepted(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """A metric for the fine-tuning script, never a reward: 1 where the judge of MINI_WORLD sees
    what the prompt asks for, else 0. images [B,3,32,32] in [0,1] -> [B]."""
    shown = judge_predictions(world_judge(), images.float().cpu())
    return fulfilled(torch.tensor([asked_for(prompt) for prompt in prompts]), shown).all(1).float()


@functools.cache
def digit_classifier() -> tuple[nn.Module, Tensor]:
    """The CLIP model of MINI_WORLD and its unit text features of the ten digits' captions
    [10,64]."""
    name = f"local-dir:{os.environ.get('MINI_WORLD', '')}/clip"
    model = open_clip.create_model(name).eval()
    tokens = open_clip.get_tokenizer(name)([caption(digit, *FREE[1:]) for digit in range(10)])
    with torch.no_grad():
        return model, model.encode_text(tokens, normalize=True)


def digit_probability(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """A reward that leaves everything but the digit free: the CLIP model's probability of the
    prompt's digit among the ten. A prompt without a digit gets 0. images [B,3,32,32] in [0,1] ->
    [B]."""
    model, texts = digit_classifier()
    logits = (
        25 * model.encode_image(images.float().cpu() * 2 - 1, normalize=True) @ texts.T
    )  # [B,10]
    digits = torch.tensor([asked_for(prompt)[0] for prompt in prompts])
    chosen = logits.softmax(1).gather(1, digits.clamp(max=9)[:, None])[:, 0]
    return torch.where(digits < 10, chosen, 0.0)


# ----------------------------------------------------------------------------------------- training


def seed_stage(seed: int, stage: int) -> None:
    """Seed torch for one stage: each has its own numbers, whatever the number of steps of the
    others."""
    torch.manual_seed(int(np.random.SeedSequence([seed, stage]).generate_state(1)[0]))


def fit(
    name: str, model: nn.Module, loss_fn: Callable[[], Tensor], steps: int, learning_rate: float
) -> None:
    """Minimise loss_fn() by `steps` AdamW steps on one learning-rate cycle; leaves the weights'
    moving average."""
    optimizer = torch.optim.AdamW(
        model.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=1e-4, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps + 1, pct_start=0.1
    )
    average = copy.deepcopy(model)
    bar = tqdm(range(steps), f"train {name}", mininterval=1.0, leave=False)
    for step in bar:
        loss = loss_fn()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            decay = min(0.99, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.load_state_dict(average.state_dict())
    model.requires_grad_(False).eval()


def train_vae(
    vae: AutoencoderKL, painter: Painter, train: Tensor, heldout: Tensor, steps: int
) -> float:
    """Train the autoencoder, then set shift and scale so that latents have mean 0 and standard
    deviation 1. Returns the mean squared error on held-out images in [-1,1]."""

    def loss_fn() -> Tensor:
        images, _ = painter.draw(train, 32)
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.sample()).sample - images
        return error.abs().mean() + error.square().mean() + 1e-6 * posterior.kl().mean()

    fit("autoencoder", vae, loss_fn, steps, 3e-3)
    images, _ = painter.draw(heldout, 500)
    with torch.no_grad():
        raw = vae.encode(images).latent_dist.mean
        error = (vae.decode(raw).sample - images).square().mean().item()
    vae.register_to_config(shift_factor=raw.mean().item(), scaling_factor=1 / raw.std().item())
    return error


def clip_loss(model: nn.Module, images: Tensor, attributes: Tensor, tokens: Tensor) -> Tensor:
    """Contrastive loss of images [B,3,32,32], attributes [B,3], against all captions' tokens
    [165,8] -> scalar.

    Many captions are true of one image, and one caption of many images. Of those only the drawn
    pair counts as a match; the other true ones are left out, for to push them away would be
    wrong."""
    drawn = draw_captions(attributes)  # [B]
    true = fulfilled(ATTRIBUTES, attributes[:, None]).all(-1)  # [B,165]
    scale = model.logit_scale.clamp(max=math.log(25)).exp()  # keeps the similarities graded
    logits = (
        scale
        * model.encode_image(images, normalize=True)
        @ model.encode_text(tokens, normalize=True).T
    )  # [B,165]
    pair = torch.arange(len(images))
    other = true.clone()
    other[pair, drawn] = False
    to_text = F.cross_entropy(logits.masked_fill(other, -math.inf), drawn)
    other = true[:, drawn].T.clone()  # [B captions, B images]
    other[pair, pair] = False
    to_image = F.cross_entropy(logits[:, drawn].T.masked_fill(other, -math.inf), pair)
    return (to_text + to_image) / 2


def train_clip(
    tokenizer: CLIPTokenizer,
    painter: Painter,
    train: Tensor,
    heldout: Tensor,
    steps: int,
    folder: Path,
) -> dict[str, float]:
    """Train the CLIP model and write its folder. Returns held-out accuracies of digit, and of digit
    and colour."""
    config = clip_config(tokenizer)
    model = open_clip.CLIP(**config["model_cfg"])
    # Few words, few steps: start with words that differ.
    nn.init.normal_(model.token_embedding.weight, std=0.5)
    tokens = tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids  # [165,8]

    def loss_fn() -> Tensor:
        images, attributes = painter.draw(train, 64)
        # Little noise and no shifts: with the judge's, this small transformer hardly learns the
        # digits in these steps.
        return clip_loss(model, disturb(images, 0.1), attributes, tokens)

    fit("CLIP", model, loss_fn, steps, 2e-3)
    images, attributes = painter.paint(heldout)
    with torch.no_grad():
        similarity = (
            model.encode_image(images, normalize=True) @ model.encode_text(tokens, normalize=True).T
        )  # [N,165]
    choices = {"digit": [(digit, *FREE[1:]) for digit in range(10)]}
    choices["digit and colour"] = [
        (*pair, FREE[2]) for pair in itertools.product(range(10), range(len(COLOURS)))
    ]
    accuracy = {}
    for name, asked in choices.items():
        asked = torch.tensor(asked)
        guess = asked[similarity[:, caption_index(asked)].argmax(1)]  # [N,3]
        accuracy[name] = fulfilled(guess, attributes).all(1).float().mean().item()
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    tokenizer.save_pretrained(folder)
    return accuracy


def train_judge(
    painter: Painter, train: Tensor, heldout: Tensor, steps: int, folder: Path
) -> tuple[Judge, list[float]]:
    """Train the judge and write its folder. Returns it with its held-out accuracies of digit,
    colour, thickness."""
    judge = Judge()

    def loss_fn() -> Tensor:
        images, attributes = painter.draw(train, 128)
        shifted = torch.roll(images, torch.randint(-2, 3, (2,)).tolist(), dims=(2, 3))
        heads = zip(judge(disturb(shifted, 0.3)), attributes.T, strict=True)
        return sum(F.cross_entropy(logits, target) for logits, target in heads)

    fit("judge", judge, loss_fn, steps, 3e-3)
    images, attributes = painter.paint(heldout)
    right = judge_predictions(judge, images / 2 + 0.5) == attributes  # [N,3]
    folder.mkdir()
    save_file(judge.state_dict(), folder / "judge.safetensors")
    return judge, right.float().mean(0).tolist()


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, painter: Painter, train: Tensor) -> tuple[Tensor, Tensor]:
    """Every training digit painted twice: latents [2N,8,8,8] as the transformer sees them,
    attributes [2N,3]."""
    latents, attributes = [], []
    for index in train.repeat(2).split(500):
        images, shown = painter.paint(index)
        raw = vae.encode(images).latent_dist.mean
        latents.append((raw - vae.config.shift_factor) * vae.config.scaling_factor)
        attributes.append(shown)
    return torch.cat(latents), torch.cat(attributes)


def train_transformer(
    pipe: StableDiffusion3Pipeline, latents: Tensor, attributes: Tensor, steps: int
) -> None:
    """Flow matching in diffusers' convention: x_t = (1 - s) x1 + s noise, the velocity's target is
    noise - x1, and the timestep is 1000 s. One caption in ten is empty."""
    with torch.no_grad():
        prompt_embeds, _, pooled_embeds, _ = pipe.encode_prompt(
            [*CAPTIONS, ""],
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
        )  # [166,16,128] and [166,128]
    empty, count = torch.tensor(len(CAPTIONS)), 64

    def loss_fn() -> Tensor:
        index = torch.randint(len(latents), (count,))
        x1, noise = latents[index], torch.randn(count, *latents.shape[1:])
        row = torch.where(torch.rand(count) < 0.1, empty, draw_captions(attributes[index]))
        # Half of the times uniform, half near the middle, where there is most to learn.
        s = torch.cat([torch.rand(count // 2), torch.randn(count - count // 2).sigmoid()])
        velocity = pipe.transformer(
            hidden_states=torch.lerp(x1, noise, s.view(-1, 1, 1, 1)),
            timestep=1000 * s,
            encoder_hidden_states=prompt_embeds[row],
            pooled_projections=pooled_embeds[row],
            return_dict=False,
        )[0]
        return F.mse_loss(velocity, noise - x1)

    fit("transformer", pipe.transformer, loss_fn, steps, 1.5e-3)


# --------------------------------------------------------------------------------------- evaluation


def sample(pipe: StableDiffusion3Pipeline, prompts: list[str], images_per_prompt: int) -> Tensor:
    """Images [P,G,3,32,32] in [0,1] by the stock pipeline, without guidance."""
    images = []
    for start in range(0, len(prompts), 8):
        images.append(
            pipe(
                prompts[start : start + 8],
                num_images_per_prompt=images_per_prompt,
                num_inference_steps=NUM_STEPS,
                guidance_scale=1.0,
                max_sequence_length=MAX_SEQUENCE_LENGTH,
                output_type="pt",
            ).images
        )
    return torch.cat(images).unflatten(0, (len(prompts), images_per_prompt))


def accepted_share(judge: Judge, images: Tensor, asked: Tensor) -> dict[str, float]:
    """Share of images [P,G,3,32,32] with what their prompts [P,3] ask for, by the judge: the digit,
    then digit and colour, then all three."""
    shown = judge_predictions(judge, images.flatten(0, 1)).unflatten(0, images.shape[:2])  # [P,G,3]
    right = fulfilled(asked[:, None], shown)
    names = ("digit", "digit and colour", "all asked for")
    return {name: right[..., : i + 1].all(-1).float().mean().item() for i, name in enumerate(names)}


def plot_samples(images: Tensor, prompts: list[str], path: Path) -> None:
    """Images [P,G,3,32,32] as a picture: one row per prompt, the prompt on its left."""
    figure, axes = plt.subplots(
        len(prompts), 1, figsize=(9, 0.72 * len(prompts)), layout="constrained"
    )
    for axis, row, prompt in zip(axes, images, prompts, strict=True):
        axis.imshow(torch.cat(list(row), dim=2).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylabel(prompt, rotation=0, ha="right", va="center", fontsize=10)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def prepare_folder(out: Path) -> None:
    """Create the world's folder. Raises InputError when it holds something or cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise InputError(f"OUT {out}: the folder is not empty; name a new one or delete it")
        (out / "world.json").touch()
        (out / "world.json").unlink()
    except OSError as error:
        raise InputError(f"OUT {out}: cannot be written ({error}); name another folder") from error


def main(args: Args) -> None:
    counts = ("vae_steps", "clip_steps", "judge_steps", "flow_steps", "images_per_prompt")
    if args.flow_steps is None:
        args = dataclasses.replace(args, flow_steps=550 if args.data_dir is None else 1200)
    for name in counts:
        if getattr(args, name) < 1:
            raise InputError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1"
            )
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: must not be negative")
    # The networks are too small for more, and the sums' order must not depend on the machine.
    torch.set_num_threads(1)
    digits, labels, data_name = load_data(args.data_dir)
    prepare_folder(args.out)
    seconds, started = {}, time.perf_counter()

    def end_stage(name: str) -> None:
        seconds[name] = time.perf_counter() - started - sum(seconds.values())
        print(f"{name}: {seconds[name]:.0f} s", flush=True)

    seed_stage(args.seed, 0)
    order = torch.randperm(len(digits))
    heldout, train = order[: len(order) // 10], order[len(order) // 10 :]
    painter = Painter(digits, labels)
    write_prompts(args.out)
    pipe = build_pipeline()

    seed_stage(args.seed, 1)
    vae_error = train_vae(pipe.vae, painter, train, heldout, args.vae_steps)
    end_stage("autoencoder")
    seed_stage(args.seed, 2)
    clip_accuracy = train_clip(
        pipe.tokenizer, painter, train, heldout, args.clip_steps, args.out / "clip"
    )
    end_stage("CLIP")
    seed_stage(args.seed, 3)
    judge, judge_accuracy = train_judge(
        painter, train, heldout, args.judge_steps, args.out / "judge"
    )
    end_stage("judge")
    seed_stage(args.seed, 4)
    latents, attributes = encode_latents(pipe.vae, painter, train)
    end_stage("latents")
    seed_stage(args.seed, 5)
    train_transformer(pipe, latents, attributes, args.flow_steps)
    pipe.save_pretrained(args.out / "model")
    end_stage("transformer")
    seed_stage(args.seed, 6)
    rows, _ = split_prompts()
    prompts = [CAPTIONS[row] for row in rows]
    images = sample(pipe, prompts, args.images_per_prompt)
    accepted = accepted_share(judge, images, ATTRIBUTES[rows])
    shown = list(range(0, len(rows), 3))
    plot_samples(images[shown, :12], [prompts[i] for i in shown], args.out / "samples.png")
    end_stage("samples")

    figures = {"autoencoder: held-out mean squared error ([-1,1])": vae_error}
    figures |= {f"CLIP: held-out accuracy, {name}": value for name, value in clip_accuracy.items()}
    for name, value in zip(("digit", "colour", "thickness"), judge_accuracy, strict=True):
        figures[f"judge: held-out accuracy, {name}"] = value
    figures |= {
        f"base samples the judge accepts: {name}": value for name, value in accepted.items()
    }
    facts = {
        "num_steps": NUM_STEPS,
        "resolution": RESOLUTION,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
    }
    facts |= {"guidance_scale": 1.0, "dataset": data_name, "seed": args.seed}
    facts |= {name: getattr(args, name) for name in counts} | {
        "figures": figures,
        "seconds": seconds,
    }
    # Last: where it stands, the world is complete.
    (args.out / "world.json").write_text(json.dumps(facts, indent=2))
    for name, value in figures.items():
        print(f"{name:60s} {value:8.4f}")
    print(f"{sum(seconds.values()):.0f} s in all. Look at {args.out / 'samples.png'}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: delete the unfinished folder and start again")
