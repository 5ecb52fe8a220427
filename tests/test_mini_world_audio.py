"""Tests of benchmark/mini_world_audio.py: its sounds by other means than made them, its teacher,
the folder as others load it.

The model here has taken a handful of steps: it loads and answers, but knows nothing.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

import adrpo_audio_mmau as script
from benchmark import mini_world_audio as world

RATE = 16000
SMALL = {
    "train_questions": 72,
    "heldout_questions": 36,
    "clips": 72,
    "tower_steps": 4,
    "warm_steps": 2,
    "mix_steps": 2,
}


def run_script(*arguments):
    command = [sys.executable, world.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A world built by the program as a user runs it."""
    out = tmp_path_factory.mktemp("worlds") / "new" / "audio"
    result = run_script(
        out, *[x for name, n in SMALL.items() for x in (f"--{name.replace('_', '-')}", n)]
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return out


def easy(skill, value, count=6):
    """Clips of a value with little noise."""
    found, number = [], [*world.SKILLS].index(skill)
    while len(found) < count:
        row, clip = world.make_question("heldout", number, 5)
        if row["answer"] == value and row["difficulty"] == "easy":
            found.append(clip)
        number += len(world.SKILLS)
    return found


def envelope(clip, seconds=0.02):
    """Loudness of each piece of the clip."""
    size = int(seconds * RATE)
    return np.sqrt((clip[: len(clip) // size * size].reshape(-1, size) ** 2).mean(1))


def runs(loud):
    """How often something loud begins."""
    return int((np.diff(np.r_[False, loud].astype(int)) == 1).sum())


def peak(clip):
    """The loudest frequency, in Hz."""
    spectrum = np.abs(np.fft.rfft(clip * np.hanning(len(clip))))
    return spectrum.argmax() / len(clip) * RATE


# ------------------------------------------------------------------------------------------- sounds


@pytest.mark.parametrize("beeps", [1, 2, 3, 4])
def test_beeps_by_their_envelope(beeps):
    for clip in easy("count", ("one", "two", "three", "four")[beeps - 1]):
        assert runs(envelope(clip) > 0.3 * envelope(clip).max()) == beeps


def test_pitch_by_its_spectrum():
    tracks = {v: [] for v in world.SKILLS["sweep"].values}
    for value, found in tracks.items():
        found += [
            np.array([peak(part) for part in np.array_split(clip, 24)][1:-1])
            for clip in easy("sweep", value)
        ]
    assert all(
        track[-1] > 1.5 * track[0] and (np.diff(track) >= 0).mean() > 0.9
        for track in tracks["rising"]
    )
    assert all(
        track[0] > 1.5 * track[-1] and (np.diff(track) <= 0).mean() > 0.9
        for track in tracks["falling"]
    )
    assert all(track.max() < 1.1 * track.min() for track in tracks["steady"])
    assert all(
        runs(track > np.median(track)) >= 3 and track.max() > 1.4 * track.min()
        for track in tracks["wobbling"]
    )


def test_onsets_tell_the_tempo():
    for value, low, high in (
        ("slow", 1, 2.4),
        ("moderate", 2, 3.8),
        ("fast", 4, 6.3),
        ("rapid", 6.5, 10.5),
    ):
        for clip in easy("tempo", value):
            loud = envelope(clip, 0.01)
            assert low <= runs(loud > 0.25 * loud.max()) / (len(clip) / RATE) <= high, value


def test_registers_are_octaves_apart():
    octaves = [
        np.mean([peak(clip) for clip in easy("register", v)])
        for v in world.SKILLS["register"].values
    ]
    assert np.all(np.log2(octaves) > np.log2([85, 220, 540, 1400]))
    assert np.all(np.log2(octaves) < np.log2([190, 480, 1150, 2900]))


def test_pitch_of_speakers_by_autocorrelation():
    pitches = {}
    for value in world.SKILLS["speaker"].values:
        for clip in easy("speaker", value):
            middle = clip[len(clip) // 2 - 2000 : len(clip) // 2 + 2000]
            lags = np.correlate(middle, middle, "full")[len(middle) - 1 :] / (middle**2).sum()
            best = lags[35:220].argmax() + 35
            first = next(lag for lag in range(35, 220) if lags[lag] > 0.85 * lags[best])
            pitches.setdefault(value, []).append((RATE / first, lags[best]))
    # The median: a loud formant makes this simple estimate miss by an octave now and then.
    middle = {value: np.median([pitch for pitch, _ in found]) for value, found in pitches.items()}
    assert 80 < middle["man"] < 130 < 170 < middle["woman"] < 245 < 280 < middle["child"] < 400
    periodic = {value: np.mean([height for _, height in found]) for value, found in pitches.items()}
    assert min(periodic, key=periodic.get) == "whisperer"


def test_stress_is_the_loudest_syllable():
    for place, value in enumerate(world.SKILLS["stress"].values):
        for clip in easy("stress", value):
            loud = envelope(clip)
            start = int((loud > 0.1 * loud.max()).argmax())
            syllables = [loud[start + begin : start + begin + 12].mean() for begin in (1, 19, 37)]
            share = max(syllables) / np.median(syllables)
            assert (
                share < 1.2
                if value == "even"
                else (share > 2 and int(np.argmax(syllables)) == place)
            )


@pytest.mark.parametrize(("difficulty", "decibels"), [("easy", 30), ("medium", 14), ("hard", 4)])
def test_noise_is_as_loud_as_the_difficulty_says(difficulty, decibels):
    """A steady tone: what is outside its spectral peak is noise."""
    found, number = [], 1
    while len(found) < 5:
        row, clip = world.make_question("heldout", number, 6)
        if (row["answer"], row["difficulty"]) == ("steady", difficulty):
            power = np.abs(np.fft.rfft(clip * np.hanning(len(clip)))) ** 2
            tone = slice(power.argmax() - 60, power.argmax() + 61)
            found.append(10 * np.log10(power[tone].sum() / np.delete(power, np.r_[tone]).sum()))
        number += 9
    assert np.mean(found) == pytest.approx(decibels, abs=1.0)


# ------------------------------------------------------------------------------------------ teacher


def test_the_teacher():
    rng = np.random.default_rng(0)
    rows = [world.make_question("train", number, 3)[0] for number in range(72)] * 30
    lengths, right, process = {}, {True: [], False: []}, {True: [], False: []}
    for budget in (0, 25, 50, 100):
        for row in rows:
            text = world.teach(row, budget, rng)
            thought = script.block(text, "think")
            assert script.reward_format(text, budget > 0) == 1
            assert script.block(text, "answer") in row["choices"]
            assert len(thought.split()) <= budget
            lengths.setdefault(budget, []).append(len(thought.split()))
            if budget:
                rambles = "Therefore" not in thought
                said = {*script.words(thought)} & {*row["choices"]}
                assert not said if rambles else script.block(text, "answer") in said
                right[rambles].append(script.reward_accuracy(text, row))
                process[rambles].append(
                    (script.reward_consistency(text, row), script.reward_keywords(text))
                )
    means = [np.mean(lengths[budget]) for budget in (0, 25, 50, 100)]
    assert means[0] == 0
    assert np.all(np.diff(means) > 8)
    assert np.mean(right[True]) == pytest.approx(np.mean(right[False]), abs=0.035)
    assert np.all(np.mean(process[False], 0) > np.mean(process[True], 0) + 0.1)


def test_the_teacher_is_mostly_wrong_on_14_of_the_36_values():
    rng, wrong = np.random.default_rng(0), 0
    for number in range(36):
        row = world.make_question("train", number, 3)[0]
        said = [script.block(world.teach(row, 0, rng), "answer") for _ in range(300)]
        share = {choice: said.count(choice) / 300 for choice in row["choices"]}
        likeliest = max(share, key=share.get)
        assert share[row["answer"]] == pytest.approx(
            0.7 if likeliest == row["answer"] else 0.3, abs=0.1
        )
        wrong += likeliest != row["answer"]
    assert wrong == 14


# ------------------------------------------------------------------------------------------- folder


def test_files_are_what_the_script_reads(folder):
    rows = {
        split: script.read_questions(
            "train-data", str(folder / f"{split}.json"), None, script.Data()
        )
        for split in ("train", "heldout")
    }
    assert {split: len(found) for split, found in rows.items()} == {"train": 72, "heldout": 36}
    every = rows["train"] + rows["heldout"]
    assert len({row["id"] for row in every}) == len({row["audio"] for row in every}) == 108
    assert len(list((folder / "audio").iterdir())) == 108
    clips = set()
    for row in every:
        info = soundfile.info(folder / row["audio"])
        assert (info.samplerate, info.channels, info.subtype) == (RATE, 1, "PCM_16")
        assert 1.29 < info.duration < 1.91
        clip = soundfile.read(folder / row["audio"])[0]
        assert 0.8 < np.abs(clip).max() < 1
        clips.add(clip.tobytes())
        assert (len(row["choices"]), len({*row["choices"]})) == (4, 4)
        assert row["task"] in script.TASKS
        assert row["difficulty"] in ("easy", "medium", "hard")
        assert "test" not in row["split"]
        assert {"dataset", "category", "sub-category", "audio_id"} <= row.keys()
    assert len(clips) == 108  # no clip is in both files
    answers = {(row["sub-category"], row["answer"]) for row in rows["heldout"]}
    assert len(answers) == 36  # every value of every skill
    args = script.Args(
        train_data=str(folder / "train.json"), eval_data=str(folder / "heldout.json")
    )
    data = script.load_questions(args)
    assert [len(data.train), len(data.heldout), data.skipped] == [72, 36, []]


def test_the_folder_loads_in_stock_transformers(folder):
    model = Qwen2AudioForConditionalGeneration.from_pretrained(folder / "model")
    processor = AutoProcessor.from_pretrained(folder / "model")
    tokenizer, facts = processor.tokenizer, json.loads((folder / "world.json").read_text())
    assert facts["parameters"] == model.num_parameters()
    assert facts | SMALL | {"seed": 1} == facts
    assert [len(tokenizer(tag).input_ids) for tag in world.TAGS] == [1, 1, 1, 1]
    for text in (
        "<think>The pitch is rising.</think><answer>rising</answer>",
        "Ünknown 250 words\n",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    stop, banned = script.stop_tokens(model, tokenizer), script.placeholders(processor)
    assert (tokenizer.convert_ids_to_tokens(stop), len(banned)) == (["<|im_end|>"], 3)
    row = json.loads((folder / "heldout.json").read_text())[0]
    wave = script.load_audio(folder / row["audio_id"], 2)
    text = script.build_prompt(processor, row, 50)
    inputs = processor(text=text, audio=[wave], sampling_rate=RATE, return_tensors="pt")
    count = int((inputs.input_ids == tokenizer.convert_tokens_to_ids("<|AUDIO|>")).sum())
    assert 16 <= count <= 24
    tokens = model.generate(**inputs, max_new_tokens=5)
    assert tokens.shape[1] <= inputs.input_ids.shape[1] + 5
    # Training heard what stock's forward gives its language model.
    clips = world.Clips(
        [row], inputs.input_features, inputs.feature_attention_mask, torch.tensor([count])
    )
    given = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, args, named: given.append(named["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    heard = given[0][inputs.input_ids == tokenizer.convert_tokens_to_ids("<|AUDIO|>")]
    torch.testing.assert_close(world.hear(model, clips, torch.tensor([0])), heard)


def test_the_same_seed_gives_the_same_world(folder, tmp_path):
    world.main(world.Args(out=tmp_path / "again", **SMALL))
    for path in sorted(folder.rglob("*.*")):
        again = tmp_path / "again" / path.relative_to(folder)
        if path.suffix == ".safetensors":
            one, other = load_file(path), load_file(again)
            assert all(torch.equal(one[name], other[name]) for name in one)
        elif path.name != "world.json":
            assert path.read_bytes() == again.read_bytes(), path
    assert (
        world.make_question("train", 0, 1)[0]["id"] == world.make_question("train", 0, 2)[0]["id"]
    )
    assert not np.array_equal(
        *[world.make_question("train", 0, seed)[1][:20000] for seed in (1, 2)]
    )


# ------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("name", "value"), [("seed", -1), ("mix_steps", -1), ("train_questions", 0), ("clips", 0)]
)
def test_numbers_out_of_range_are_refused(tmp_path, name, value):
    with pytest.raises(
        world.InputError, match=f"^--{name.replace('_', '-')} {value}: must "
    ) as caught:
        world.main(world.Args(out=tmp_path / "out", **{name: value}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", ["", "mine.txt/out"])
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, below):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(world.InputError, match="^OUT ") as caught:
        world.main(world.Args(out=tmp_path / below))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_fault_is_one_line_and_exit_code_1(tmp_path):
    result = run_script(tmp_path / "out", "--seed", -1)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: --seed -1: must be 0 or more\n"
