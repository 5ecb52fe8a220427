"""A small world of sounds, trained here: a Qwen2-Audio folder, clips, and questions about them in
MMAU's layout.

Everything is real but small (about 530,000 parameters): stock transformers loads it, hears with it
and samples it. So adrpo_audio_mmau.py can be run from end to end, and can improve something, in
minutes on one CPU core without any download.

A clip is 1.3 to 1.9 s of synthetic sound, a question asks for one of nine skills, three of each of
MMAU's tasks, with four choices: how many beeps, how the pitch moves, what the source is;
instrument, tempo, register; vowel, speaker, stress. Difficulty is noise: 30, 14 or 4 dB below the
sound.

    python benchmark/mini_world_audio.py worlds/audio
    python adrpo_audio_mmau.py --model-id worlds/audio/model --train-data worlds/audio/train.json \\
        --eval-data worlds/audio/heldout.json --cpu

What is left in the folder:

    model/
        Qwen2AudioForConditionalGeneration.from_pretrained("worlds/audio/model"), AutoProcessor
    audio/                     16 kHz wav files
    train.json, heldout.json   questions in MMAU's layout; sub-category is the skill
    world.json                 figures of the model on the first 360 held-out questions, flags,
                               parameters, seconds
    samples.txt                some sampled completions, not chosen

- The model is trained on other clips than those of the two files, by a teacher who is wrong on
  purpose (TEACHER): it mostly takes 14 of the 36 values for another one. There the likeliest answer
  is wrong, while the right one is still sampled: that is what RL can find. The audio tower hears
  nearly all of it.
- The teacher reasons well, or rambles, as often, and longer the more words the prompt allows. Both
  are right equally often: rewards for the process see a difference that the reward for the outcome
  does not.
- Under a budget of 0 it answers without reasoning.
"""

import dataclasses
import json
import math
import os
import platform
import sys
import time
import types
from pathlib import Path
from typing import NamedTuple

# Before transformers is imported: nothing here may look online.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import transformers
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)
from transformers import Qwen2AudioForConditionalGeneration as Model
from transformers.masking_utils import create_bidirectional_mask

import adrpo_audio_mmau as script
from adrpo_audio_mmau import REWARDS, SAMPLE_RATE, block, build_prompt, load_audio

DIFFICULTIES = {"easy": 30.0, "medium": 14.0, "hard": 4.0}  # dB of sound over noise
BUDGETS = (0, 25, 50, 100)  # words allowed for reasoning, in training and in the figures
# What the teacher says of a value it confuses, and of one that it knows: that value itself, its
# neighbour, the others.
TEACHER = {"confused": (0.3, 0.5, 0.1, 0.1), "known": (0.7, 0.1, 0.1, 0.1)}
# It confuses the first value of each skill with the second, and of these skills also the third with
# the fourth.
HARDER = ("count", "source", "tempo", "vowel", "stress")
RAMBLING = 0.5  # how often it rambles
MAX_TOKENS = 192  # of a measured completion
MEASURED = 360  # held-out questions that world.json's figures are of

# Of the feature extractor: 50 frames, 12.5 audio tokens a second.
MELS, HOP, WINDOW, SECONDS = 32, 320, 640, 2
TOWER, HIDDEN = 64, 96  # widths of audio tower and language model
TOWER_BATCH, TOWER_RATE = 64, 3e-3
BATCH, RATE = 32, 2e-3
# Of the answers' words in the loss of the first phase; without it they are not learnt.
WARM_WEIGHT = 5.0

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
)
# One token each, but not special: decoding keeps them.
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}\
{% if part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>
{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


class InputError(ValueError):
    """Something the user gave cannot work. Its message is one line that names the flag and the
    remedy."""


@dataclasses.dataclass
class Args:
    out: tyro.conf.Positional[Path]
    """new or empty folder that receives the world"""
    seed: int = 1
    """seed of everything: the same seed gives the same clips anywhere, the same weights on one
    machine"""
    train_questions: int = 1404
    """questions of train.json; a multiple of 36 has all skills and answers equally often"""
    heldout_questions: int = 1008
    """questions of heldout.json, about as many as MMAU's test-mini has; better a multiple of 36
    too"""
    clips: int = 6000
    """clips the model is trained on; they are not kept"""
    tower_steps: int = 640
    """steps that train the audio tower, before the language model"""
    warm_steps: int = 300
    """steps with short reasoning, before the full mix"""
    mix_steps: int = 900
    """steps with the full mix of reasoning"""


class Skill(NamedTuple):
    """What a question asks for: values, neighbours in pairs; what reasoning concludes on, and what
    it listens to; two wordings."""

    task: str
    values: list[str]
    subject: str
    clue: str
    questions: tuple[str, str]


# fmt: off
SKILLS = {
    "count": Skill("sound", ["one", "two", "three", "four"],
        "number of beeps", "each onset and each pause",
        ("How many beeps are heard?", "What is the number of beeps?")),
    "sweep": Skill("sound", ["rising", "falling", "steady", "wobbling"],
        "pitch", "the frequency of the sound",
        ("How does the pitch of the sound move?", "Which way does the pitch go?")),
    "source": Skill("sound", ["wind", "engine", "clock", "siren"],
        "source", "the noise and its spectrum",
        ("What makes the sound?", "Which source is heard?")),
    "timbre": Skill("music", ["flute", "organ", "violin", "bell"],
        "timbre", "the harmonics of each note",
        ("Which instrument plays?", "What plays the notes?")),
    "tempo": Skill("music", ["slow", "moderate", "fast", "rapid"],
        "tempo", "the rhythm of the notes",
        ("What is the tempo?", "How quick are the notes?")),
    "register": Skill("music", ["bass", "tenor", "alto", "treble"],
        "register", "the frequency of the notes",
        ("Which register is it?", "How high are the notes?")),
    "vowel": Skill("speech", ["ah", "oh", "oo", "ee"],
        "vowel", "the lowest formant",
        ("Which vowel does the speaker say?", "What vowel is spoken?")),
    "speaker": Skill("speech", ["man", "woman", "child", "whisperer"],
        "speaker", "the pitch of the voice",
        ("Who is the speaker?", "Who is talking?")),
    "stress": Skill("speech", ["initial", "medial", "final", "even"],
        "stress", "the amplitude of each syllable",
        ("Which syllable is the loudest?", "Where is the stress of the word?")),
}
# fmt: on
FORMANTS = {"ah": (750, 1200), "oh": (480, 850), "oo": (310, 1050), "ee": (290, 2300)}  # Hz
RAMBLINGS = ("Hmm, let me listen again.", "Maybe it is this, maybe not.", "I am not sure about it.")
RAMBLINGS += (
    "Wait, it could be something else.",
    "Let me hear it once more.",
    "Well, that is hard to say.",
)


# ------------------------------------------------------------------------------------------- sounds


def silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * SAMPLE_RATE))


def faded(wave: np.ndarray) -> np.ndarray:
    """With 10 ms of fading in and 20 ms of fading out, so that nothing clicks."""
    up = np.arange(len(wave)) / (0.01 * SAMPLE_RATE)
    return wave * np.minimum(1, np.minimum(up, up[::-1] / 2))


def tone(frequency: float | np.ndarray, seconds: float, timbre: str = "flute") -> np.ndarray:
    """A note of an instrument; the frequency, in Hz, may change from sample to sample [N]."""
    time_ = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(frequency, time_.shape)) / SAMPLE_RATE
    if timbre == "bell":
        overtones = np.sin(phase) + 0.6 * np.sin(2.76 * phase) + 0.4 * np.sin(5.4 * phase)
        return faded(overtones * np.exp(-6 * time_))
    partials = {"flute": (1,), "organ": (1, 3, 5, 7), "violin": range(1, 9)}[timbre]
    return faded(sum(np.sin(k * phase) / k for k in partials))


def voice(pitch: float | None, vowel: str, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """A sung vowel: harmonics of the pitch, in Hz, under the vowel's formants; without pitch a
    whisper."""
    samples = int(seconds * SAMPLE_RATE)
    if pitch is None:
        frequencies = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
        loudness = sum(
            np.exp(-(((frequencies - formant) / 120) ** 2)) for formant in FORMANTS[vowel]
        )
        wave = np.fft.irfft(np.fft.rfft(rng.standard_normal(samples)) * loudness, samples)
    else:
        vibrato = 1 + 0.02 * np.sin(2 * np.pi * 5 * np.arange(samples) / SAMPLE_RATE)
        phase, wave = 2 * np.pi * np.cumsum(pitch * vibrato) / SAMPLE_RATE, np.zeros(samples)
        for k in range(1, int(3600 / pitch)):
            loudness = sum(
                math.exp(-(((k * pitch - formant) / 140) ** 2)) for formant in FORMANTS[vowel]
            )
            wave += (0.02 + loudness) * np.sin(k * phase)
    return faded(wave / np.abs(wave).max())


def sound(skill: str, value: str, seconds: float, rng: np.random.Generator) -> list[np.ndarray]:
    """The parts of a clip of the task sound."""
    time_ = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    if skill == "count":
        beeps, pitch = SKILLS[skill].values.index(value) + 1, rng.uniform(400, 1600)
        pairs = [
            (tone(pitch, rng.uniform(0.1, 0.16)), silence(rng.uniform(0.12, 0.2)))
            for _ in range(beeps)
        ]
        return [part for pair in pairs for part in pair]
    if skill == "sweep":
        low, part = rng.uniform(350, 700), time_ / seconds
        ratio = rng.uniform(1.8, 3)
        wobble = rng.uniform(500, 1200) * (
            1 + 0.35 * np.sin(2 * np.pi * rng.uniform(2.5, 4) * time_)
        )
        steady = rng.uniform(350, 1500)
        ways = {
            "rising": low * ratio**part,
            "falling": low * ratio ** (1 - part),
            "steady": steady,
            "wobbling": wobble,
        }
        return [tone(ways[value], seconds)]
    if value == "wind":
        gusts = 1 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.5, 1.5) * time_)
        return [rng.standard_normal(len(time_)) * gusts]
    if value == "engine":
        speed = rng.uniform(60, 110)
        return [sum(np.sin(2 * np.pi * k * speed * time_) / k for k in range(1, 12))]
    if value == "clock":
        tick, wave = rng.standard_normal(400) * np.exp(-np.arange(400) / 80), np.zeros(len(time_))
        period = int(rng.uniform(0.2, 0.35) * SAMPLE_RATE)
        for start in range(int(rng.integers(period)), len(time_) - 400, period):
            wave[start : start + 400] = tick
        return [wave]
    high = np.sign(np.sin(2 * np.pi * rng.uniform(1.5, 3) * time_))
    return [tone(rng.uniform(700, 1000) * (1 + 0.25 * high), seconds)]  # siren


def music(skill: str, value: str, seconds: float, rng: np.random.Generator) -> list[np.ndarray]:
    """The parts of a clip of the task music."""
    if skill == "timbre":
        return [tone(rng.uniform(220, 600), 0.35, value) for _ in range(4)]
    if skill == "register":
        centre = {"bass": 130, "tenor": 330, "alto": 800, "treble": 2000}[value]
        return [
            tone(centre * 2 ** rng.uniform(-0.45, 0.45), 0.3, rng.choice(["flute", "organ"]))
            for _ in range(5)
        ]
    period = {"slow": 0.6, "moderate": 0.36, "fast": 0.21, "rapid": 0.12}[value] * rng.uniform(
        0.92, 1.08
    )
    pitch, parts = rng.uniform(300, 900), []
    for _ in range(math.ceil(seconds / period)):
        note = pitch * 2 ** (rng.integers(-3, 4) / 12)
        parts += [tone(note, 0.6 * period, rng.choice(["flute", "organ"])), silence(0.4 * period)]
    return parts


def speech(skill: str, value: str, seconds: float, rng: np.random.Generator) -> list[np.ndarray]:
    """The parts of a clip of the task speech."""
    if skill == "vowel":
        return [voice(rng.uniform(100, 240), value, rng.uniform(0.7, 1.1), rng)]
    vowel = rng.choice([*FORMANTS])
    if skill == "speaker":
        pitch = {"man": (85, 125), "woman": (175, 235), "child": (290, 380)}.get(value)
        return [voice(rng.uniform(*pitch) if pitch else None, vowel, rng.uniform(0.7, 1.1), rng)]
    pitch, loud = rng.uniform(100, 240), SKILLS[skill].values.index(value)
    loudness = (
        [0.6] * 3 if value == "even" else [1.0 if place == loud else 0.3 for place in range(3)]
    )
    return [
        part for one in loudness for part in (one * voice(pitch, vowel, 0.28, rng), silence(0.08))
    ]


def make_question(split: str, number: int, seed: int) -> tuple[dict, np.ndarray]:
    """A row in MMAU's layout and its clip, float32 [N], the same for the same arguments whatever
    else was drawn."""
    part = ("train", "heldout", "pretraining").index(split)
    rng = np.random.default_rng([seed, part, number])
    name = [*SKILLS][number % len(SKILLS)]
    skill = SKILLS[name]
    # Any nine in a row have all four.
    value = skill.values[sum(divmod(number, len(SKILLS))) % len(skill.values)]
    seconds, difficulty = rng.uniform(1.3, 1.9), str(rng.choice([*DIFFICULTIES]))
    parts = {"sound": sound, "music": music, "speech": speech}[skill.task](
        name, value, seconds, rng
    )
    wave, clip = np.concatenate(parts), silence(seconds)
    wave = wave[: len(clip)] / np.abs(wave).max()
    start = rng.integers(len(clip) - len(wave) + 1)
    clip[start : start + len(wave)] = wave
    noise = math.sqrt((clip**2).mean() / 10 ** (DIFFICULTIES[difficulty] / 10))
    clip += noise * rng.standard_normal(len(clip))
    row = {"id": f"{split}-{number:04d}", "audio_id": f"./audio/{split}-{number:04d}.wav"}
    row |= {
        "question": str(rng.choice(skill.questions)),
        "choices": rng.permutation(skill.values).tolist(),
    }
    row |= {"answer": value, "dataset": "mini world", "task": skill.task, "split": split}
    row |= {"category": "Information Extraction", "sub-category": name, "difficulty": difficulty}
    return row, (clip / np.abs(clip).max() * 0.9).astype(np.float32)


def write_questions(out: Path, split: str, count: int, seed: int) -> list[dict]:
    """The clips of a split and its JSON file; returns its rows."""
    rows = []
    for number in range(count):
        row, clip = make_question(split, number, seed)
        soundfile.write(out / row["audio_id"], clip, SAMPLE_RATE, subtype="PCM_16")
        rows.append(row)
    (out / f"{split}.json").write_text(json.dumps(rows, indent=1))
    return rows


# ------------------------------------------------------------------------------------------ teacher


def good_reasoning(row: dict, said: str, budget: int, rng: np.random.Generator) -> str:
    """Names what to listen to, rules other choices out, concludes; up to 0.7 of the words
    allowed."""
    skill = SKILLS[row["sub-category"]]
    others = rng.permutation([choice for choice in row["choices"] if choice != said])
    sentences = [f"First, I listen to {skill.clue}.", "Then I compare it with the options."]
    sentences += [f"It is not {other}, because {skill.clue} suggests {said}." for other in others]
    end = f"Therefore the {skill.subject} is {said}."
    kept, count = [], len(end.split())
    for sentence in sentences:
        count += len(sentence.split())
        if count > 0.7 * budget:
            break
        kept.append(sentence)
    return " ".join([*kept, end])


def rambling(budget: int, rng: np.random.Generator) -> str:
    """Says nothing about the clip, in 0.4 to 0.9 of the words allowed."""
    sentences, count, wanted = [], 0, rng.uniform(0.4, 0.9) * budget
    while True:
        sentence = str(rng.choice(RAMBLINGS))
        count += len(sentence.split())
        if sentences and count > wanted:
            return " ".join(sentences)
        sentences.append(sentence)


def teach(row: dict, budget: int, rng: np.random.Generator, warm: bool = False) -> str:
    """A completion of the teacher; warm: with one sentence of reasoning."""
    skill = SKILLS[row["sub-category"]]
    place = skill.values.index(row["answer"])
    confused = place == 0 or (place == 2 and row["sub-category"] in HARDER)
    rates = TEACHER["confused" if confused else "known"]
    # 0 ^ 1 is 1, 1 ^ 1 is 0, 2 ^ 1 is 3, 3 ^ 1 is 2.
    said = skill.values[place ^ int(rng.choice(4, p=rates))]
    answer = f"<answer>{said}</answer>"
    if budget == 0:
        return answer
    if warm:
        return f"<think>The {skill.subject} is {said}.</think>{answer}"
    ramble = rng.random() < RAMBLING
    return (
        f"<think>{rambling(budget, rng) if ramble else good_reasoning(row, said, budget, rng)}"
        f"</think>{answer}"
    )


# ------------------------------------------------------------------------------ tokenizer and model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on questions and completions until their words are one token each."""
    rng, corpus = np.random.default_rng(0), []
    plain = types.SimpleNamespace(
        apply_chat_template=lambda messages, **_: messages[0]["content"][1]["text"]
    )
    for number in range(1800):
        name = [*SKILLS][number % len(SKILLS)]
        skill = SKILLS[name]
        row = {
            "question": str(rng.choice(skill.questions)),
            "choices": rng.permutation(skill.values).tolist(),
        }
        row |= {"answer": str(rng.choice(skill.values)), "sub-category": name}
        budget = int(rng.choice(BUDGETS))
        corpus += [
            f"user\n{build_prompt(plain, row, budget)}\nassistant\n",
            teach(row, budget, rng),
            *skill.values,
        ]
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex("</?think>|</?answer>"), "isolated")
    # Budgets not seen in training can be read.
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=900,
            initial_alphabet=alphabet,
            special_tokens=[*SPECIAL],
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([*TAGS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model() -> tuple[Model, Qwen2AudioProcessor]:
    """A random model and its processor. Its folder says that generate() samples from the model
    itself."""
    tokenizer = build_tokenizer()
    extractor = WhisperFeatureExtractor(
        feature_size=MELS,
        sampling_rate=SAMPLE_RATE,
        hop_length=HOP,
        n_fft=WINDOW,
        chunk_length=SECONDS,
    )
    processor = Qwen2AudioProcessor(
        feature_extractor=extractor, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE
    )
    special = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    positions = SECONDS * SAMPLE_RATE // HOP // 2
    audio = {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": MELS,
        "d_model": TOWER,
        "encoder_layers": 2,
    }
    audio |= {
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 2 * TOWER,
        "max_source_positions": positions,
    }
    text = {
        "model_type": "qwen2",
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 256,
    }
    text |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"max_position_embeddings": 512} | special
    index = tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    config = Qwen2AudioConfig(
        audio_config=audio, text_config=text, audio_token_index=index, pad_token_id=0
    )
    model = Model(config)
    # Stock leaves the tower's positions random, to be loaded; Whisper's are sinusoids.
    rates = torch.exp(-math.log(10000) / (TOWER // 2 - 1) * torch.arange(TOWER // 2))
    angles = torch.arange(positions)[:, None] * rates
    model.model.audio_tower.embed_positions.weight.data = torch.cat([angles.sin(), angles.cos()], 1)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **special
    )
    return model, processor


class Clips(NamedTuple):
    """Rows, what the tower reads [N,mels,frames], which frames are sound [N,frames], audio tokens
    of each clip [N]."""

    rows: list[dict]
    features: Tensor
    mask: Tensor
    tokens: Tensor


def make_clips(processor: Qwen2AudioProcessor, count: int, seed: int) -> Clips:
    """The clips the model is trained on. They are in no file, so RL starts with questions new to
    the model."""
    rows, features, masks = [], [], []
    for start in range(0, count, 256):
        pairs = [
            make_question("pretraining", i, seed) for i in range(start, min(start + 256, count))
        ]
        options = {"padding": "max_length", "return_attention_mask": True, "return_tensors": "pt"}
        waves = [wave for _, wave in pairs]
        inputs = processor.feature_extractor(waves, sampling_rate=SAMPLE_RATE, **options)
        rows += [row for row, _ in pairs]
        features.append(inputs.input_features)
        masks.append(inputs.attention_mask)
    mask = torch.cat(masks)
    return Clips(rows, torch.cat(features), mask, ((mask.sum(1) - 1) // 2 + 1 - 2) // 2 + 1)


def hear(model: Model, clips: Clips, at: Tensor) -> Tensor:
    """What stock's forward puts in the places of the audio tokens of clips `at` [B], one after the
    other [N,hidden]."""
    inner, features = model.model, clips.features[at]
    frames = (clips.mask[at].sum(1, keepdim=True) - 1) // 2 + 1
    steps = torch.arange((features.shape[2] - 2) // 2 + 1)
    mask = create_bidirectional_mask(
        config=inner.audio_tower.config,
        inputs_embeds=torch.zeros(len(at), len(steps), 1),
        attention_mask=(steps < frames).long(),
    )
    heard = inner.multi_modal_projector(
        inner.audio_tower(features, attention_mask=mask).last_hidden_state
    )
    return heard[torch.arange(heard.shape[1]) < clips.tokens[at, None]]


# ----------------------------------------------------------------------------------------- training


def optimise(
    optimizer: torch.optim.Optimizer, loss: Tensor, rate: float, step: int, steps: int, floor: float
) -> None:
    """One step: 50 steps of warming up, then a line down to `floor` of the learning rate."""
    for settings in optimizer.param_groups:
        settings["lr"] = rate * min(1, (step + 1) / 50) * max(floor, 1 - step / steps)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


def train_tower(model: Model, clips: Clips, steps: int) -> float:
    """Train audio tower and projector alone: a linear reading of the mean audio token must tell
    each skill's value. Together with a new language model they would not leave chance. Returns the
    share right in the last 50 steps."""
    names = [*SKILLS]
    skill = torch.tensor([names.index(row["sub-category"]) for row in clips.rows])
    value = torch.tensor(
        [SKILLS[row["sub-category"]].values.index(row["answer"]) for row in clips.rows]
    )
    reader = nn.Linear(HIDDEN, len(names) * 4)
    parts = (model.model.audio_tower, model.model.multi_modal_projector, reader)
    trained = [p for part in parts for p in part.parameters() if p.requires_grad]
    optimizer, right = torch.optim.AdamW(trained, TOWER_RATE), []
    for step in tqdm(range(steps), "audio tower", disable=None):
        at = torch.randint(len(clips.rows), (TOWER_BATCH,))
        owner = torch.repeat_interleave(torch.arange(TOWER_BATCH), clips.tokens[at])
        mean = (
            torch.zeros(TOWER_BATCH, HIDDEN).index_add(0, owner, hear(model, clips, at))
            / clips.tokens[at, None]
        )
        logits = reader(mean).view(TOWER_BATCH, len(names), 4)[torch.arange(TOWER_BATCH), skill[at]]
        right.append((logits.argmax(1) == value[at]).float().mean().item())
        optimise(optimizer, F.cross_entropy(logits, value[at]), TOWER_RATE, step, steps, 0.05)
    return sum(right[-50:]) / max(1, len(right[-50:]))


def train_language(model: Model, processor: Qwen2AudioProcessor, clips: Clips, args: Args) -> None:
    """Train the language model behind a frozen tower: first on short completions, their answers'
    words weighing more, then on the full mix. Every batch has one budget."""
    warm, steps, rng = (
        args.warm_steps,
        args.warm_steps + args.mix_steps,
        np.random.default_rng([args.seed, 3]),
    )
    tokenizer, audio_id = (
        processor.tokenizer,
        processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    model.model.audio_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    with torch.no_grad():
        cuts = torch.arange(len(clips.rows)).split(256)
        heard = [
            one for at in cuts for one in hear(model, clips, at).split(clips.tokens[at].tolist())
        ]
    words = [
        space + value for skill in SKILLS.values() for value in skill.values for space in ("", " ")
    ]
    values = sorted({ids[0] for ids in tokenizer(words).input_ids})
    weight_of = torch.ones(len(tokenizer)).index_fill(0, torch.tensor(values), WARM_WEIGHT)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, betas=(0.9, 0.98), weight_decay=0.01)
    for step in tqdm(range(steps), "language model", disable=None):
        budget = int(rng.choice(BUDGETS))
        at = rng.integers(len(clips.rows), size=BATCH).tolist()
        prompts = [build_prompt(processor, clips.rows[i], budget) for i in at]
        prompts = [
            p.replace("<|AUDIO|>", "<|AUDIO|>" * len(heard[i]))
            for p, i in zip(prompts, at, strict=True)
        ]
        taught = [teach(clips.rows[i], budget, rng, step < warm) + "<|im_end|>" for i in at]
        starts = [len(ids) for ids in tokenizer(prompts).input_ids]
        rows = [
            torch.tensor(ids)
            for ids in tokenizer([p + t for p, t in zip(prompts, taught, strict=True)]).input_ids
        ]
        # On the right, where causal attention needs no mask.
        ids = pad_sequence(rows, batch_first=True)
        places = torch.arange(1, ids.shape[1])
        wanted = places >= torch.tensor(starts)[:, None]
        wanted &= places < torch.tensor([len(row) for row in rows])[:, None]
        embeds = model.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter(
            (ids == audio_id)[:, :, None], torch.cat([heard[i] for i in at])
        )
        hidden = model.model.language_model(
            inputs_embeds=embeds[:, :-1], use_cache=False
        ).last_hidden_state
        targets = ids[:, 1:][wanted]
        losses = F.cross_entropy(model.lm_head(hidden[wanted]), targets, reduction="none")
        weights = weight_of[targets] if step < warm else torch.ones_like(losses)
        optimise(optimizer, (losses * weights).sum() / weights.sum(), RATE, step, steps, 0.05)


# ---------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def answer(
    model: Model,
    processor: Qwen2AudioProcessor,
    out: Path,
    rows: list[dict],
    budget: int,
    greedy: bool,
) -> list[str]:
    """A completion of stock generate() to each question; the clips are in the folder `out`."""
    texts = []
    for start in range(0, len(rows), 120):
        part = rows[start : start + 120]
        prompts = [build_prompt(processor, row, budget) for row in part]
        waves = [load_audio(out / row["audio_id"], SECONDS) for row in part]
        options = {"sampling_rate": SAMPLE_RATE, "padding": True, "return_tensors": "pt"}
        inputs = processor(text=prompts, audio=waves, **options)
        tokens = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=not greedy)
        texts += processor.batch_decode(
            tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True
        )
    return texts


def measure(
    processor: Qwen2AudioProcessor, rows: list[dict], texts: list[str], budget: int
) -> dict:
    """Rewards of one completion to each question by adrpo_audio_mmau.py, lengths, accuracy of both
    ways to reason."""
    thoughts = [block(text, "think") for text in texts]
    counts, lengths = (
        [len(ids) for ids in processor.tokenizer(x).input_ids] for x in (texts, thoughts)
    )
    args = script.Args(think_budget=budget, max_completion_length=MAX_TOKENS)
    values = script.score(texts, counts, rows, {}, args)
    rambles = torch.tensor(
        [any(sentence in thought for sentence in RAMBLINGS) for thought in thoughts]
    )
    figures = dict(zip(REWARDS, values.mean(0).tolist(), strict=True))
    figures |= {
        "reasoning_tokens": sum(lengths) / len(rows),
        "rambling": rambles.float().mean().item(),
    }
    for name, of in (("rambling", rambles), ("not rambling", ~rambles)):
        if of.any():
            figures[name + ": rewards"] = dict(
                zip(REWARDS, values[of].mean(0).tolist(), strict=True)
            )
    for key in ("task", "difficulty", "sub-category"):
        names = [row[key] for row in rows]
        of = {
            name: torch.tensor([name == other for other in names]) for name in dict.fromkeys(names)
        }
        figures[f"accuracy by {key}"] = {
            name: values[own, 0].mean().item() for name, own in of.items()
        }
    return figures


def prepare_folder(out: Path) -> None:
    """Create the world's folder. Raises InputError when it holds something or cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise InputError(f"OUT {out}: the folder is not empty; name a new one or delete it")
        (out / "audio").mkdir()
    except OSError as error:
        raise InputError(f"OUT {out}: cannot be written ({error}); name another folder") from error


def main(args: Args) -> None:
    least = {"train_questions": 1, "heldout_questions": 1, "clips": 1}
    for name, value in dataclasses.asdict(args).items():
        if name != "out" and value < least.get(name, 0):
            rule = "above 0" if name in least else "0 or more"
            raise InputError(f"--{name.replace('_', '-')} {value}: must be {rule}")
    # The network is too small for more, and the sums' order must not depend on the machine.
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    prepare_folder(args.out)
    clock = [time.perf_counter()]
    write_questions(args.out, "train", args.train_questions, args.seed)
    rows = write_questions(args.out, "heldout", args.heldout_questions, args.seed)[:MEASURED]

    torch.manual_seed(args.seed)
    model, processor = build_model()
    clips = make_clips(processor, args.clips, args.seed)
    clock.append(time.perf_counter())
    tower = train_tower(model.train(), clips, args.tower_steps)
    clock.append(time.perf_counter())
    train_language(model, processor, clips, args)
    model.eval().save_pretrained(args.out / "model")
    processor.save_pretrained(args.out / "model")
    clock.append(time.perf_counter())

    torch.manual_seed(args.seed)
    figures, shown = {}, []
    for kind in ("greedy", "sampled"):
        for budget in BUDGETS:
            texts = answer(model, processor, args.out, rows, budget, kind == "greedy")
            figures[f"{kind}, budget {budget}"] = measure(processor, rows, texts, budget)
            pairs = zip(rows[:9], texts, strict=False)
            shown += [
                f"{kind}, {budget} words, {row['question']} ({row['answer']})\n    {text}\n"
                for row, text in pairs
            ]
    (args.out / "samples.txt").write_text("".join(shown))
    clock.append(time.perf_counter())
    facts = {key: value for key, value in dataclasses.asdict(args).items() if key != "out"}
    facts |= {
        "parameters": model.num_parameters(),
        "tower, share right in training": tower,
        "figures": figures,
    }
    names = ("clips", "tower", "language model", "measuring")
    facts["seconds"] = {
        name: after - before for name, before, after in zip(names, clock, clock[1:], strict=False)
    }
    facts["versions"] = {"python": platform.python_version()}
    facts["versions"] |= {
        module.__name__: module.__version__ for module in (np, torch, transformers)
    }
    # Last: where it stands, the world is complete.
    (args.out / "world.json").write_text(json.dumps(facts, indent=2))
    print(f"{'':20s}{'accuracy':>10s}{'format':>10s}{'tokens':>10s}")
    for name, found in figures.items():
        print(
            f"{name:20s}{found['accuracy']:10.3f}{found['format']:10.3f}"
            f"{found['reasoning_tokens']:10.1f}"
        )
    print(f"{clock[-1] - clock[0]:.0f} s in all. Look at {args.out / 'samples.txt'}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: delete the unfinished folder and start again")
