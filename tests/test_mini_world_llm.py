"""Tests of benchmark/mini_world_llm.py: its rewards, its tokenizer, its rates, and the folder as
others load it.

The worlds here have three digits, which takes seconds; their training is otherwise that of the full
size.
"""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmark import mini_world_llm as world

SCRIPT = Path(world.__file__)
NEAR_MISSES = [
    "112393",
    "11233",
    "1123399",
    "12339",
    "112339=",
    "9112339",
    "0112339",
    "=112339",
    "112339 ",
]
NEAR_MISSES += ["112338", "93321", "932311", "9332110", "391321", ""]


def run_script(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)


@pytest.fixture(scope="session", params=["sort", "trap"])
def folder(request, tmp_path_factory):
    """A world, one of the two built by the program as a user runs it."""
    out = tmp_path_factory.mktemp("worlds") / "new" / request.param
    if request.param == "sort":
        world.main(world.Args(out=out, task="sort", digits=3))
    else:
        result = run_script(out, "--task", "trap", "--digits", 3)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
    return out


@pytest.fixture(scope="session")
def loaded(folder):
    """Model and tokenizer by the lines of the program's header."""
    return AutoModelForCausalLM.from_pretrained(folder / "model"), AutoTokenizer.from_pretrained(
        folder / "model"
    )


def read_rows(folder, split):
    return [
        json.loads(line) for line in (folder / f"{split}_prompts.jsonl").read_text().splitlines()
    ]


# ------------------------------------------------------------------------------ A. the built folder


def test_prompt_files(folder):
    train, heldout = read_rows(folder, "train"), read_rows(folder, "heldout")
    # all 990 numbers of three digits that are not all equal
    assert (len(train), len(heldout)) == (743, 247)
    assert {row["prompt"] for row in train + heldout} == {
        f"{n:03}=" for n in range(1000) if n % 111
    }
    for row in train + heldout:
        orders = sorted("".join(order) for order in itertools.permutations(row["prompt"][:-1]))
        assert (row["ascending"], row["descending"]) == (orders[0], orders[-1])


def test_tokenizer_is_one_token_per_character(loaded):
    tokenizer = loaded[1]
    assert tokenizer("382915=").input_ids == [3, 8, 2, 9, 1, 5, 10]
    assert tokenizer("12<eos>").input_ids == [1, 2, 12]
    assert tokenizer.decode([1, 2, 3, 5, 8, 9]) == "123589"
    assert tokenizer.decode([1, 2, 3, 12, 11], skip_special_tokens=True) == "123"
    assert len(tokenizer) == 13
    padded = tokenizer(["12=", "345="], padding=True)
    assert padded.input_ids == [[11, 1, 2, 10], [3, 4, 5, 10]]
    assert [*padded.keys()] == ["input_ids", "attention_mask"]
    with pytest.raises(Exception, match="UNK"):
        tokenizer("12 =")


def test_special_tokens_agree(loaded):
    model, tokenizer = loaded
    for holder in (model.config, model.generation_config, tokenizer):
        assert (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id) == (None, 12, 11)
    assert model.dtype == torch.float32
    assert model.config.vocab_size == 13
    assert model.num_parameters() == 306_192


def test_figures_against_stock_sampling(folder, loaded):
    model, tokenizer = loaded
    facts, rows = json.loads((folder / "world.json").read_text()), read_rows(folder, "heldout")
    figures = facts["figures"]
    inputs = tokenizer([row["prompt"] for row in rows], return_tensors="pt")
    torch.manual_seed(99)
    for kind, repeats in (("sampled", 20), ("greedy", 1)):
        flags = {
            "do_sample": kind == "sampled",
            "num_return_sequences": repeats,
            "max_new_tokens": 8,
        }
        tokens = model.generate(**inputs, **flags)
        texts = tokenizer.batch_decode(tokens[:, 4:], skip_special_tokens=True)
        many = [row for row in rows for _ in range(repeats)]
        for reward in (world.ascending, world.descending):
            share = sum(reward([row["prompt"] for row in many], texts, many)) / len(many)
            for stated in (kind, "exact") if kind == "sampled" else (kind,):
                value = figures[f"{reward.__name__}, {stated}"]
                noise = math.sqrt(value * (1 - value) * (1 / len(many) + 1 / facts["samples"]))
                assert abs(share - value) <= 4 * noise + 1e-3, (reward.__name__, stated)
    assert facts["samples"] == 32 * len(rows)
    if facts["task"] == "sort":
        assert 0.2 < figures["ascending, exact"] < 0.4
        assert figures["descending, exact"] < 1e-4
    else:
        assert 0.74 < figures["ascending, exact"] < 0.84
        assert 0.003 < figures["descending, exact"] < 0.011


@torch.no_grad()
def test_exact_rates_against_a_product_of_single_steps(loaded):
    model = loaded[0]
    numbers = torch.tensor([[3, 1, 2], [5, 5, 0]])
    expected = []
    for answers in ([[1, 2, 3, 12], [0, 5, 5, 12]], [[3, 2, 1, 12], [5, 5, 0, 12]]):
        total = 0.0
        for number, answer in zip(numbers.tolist(), answers, strict=True):
            probability, tokens = 1.0, [*number, 10]
            for token in answer:
                probability *= (
                    model(torch.tensor([tokens])).logits[0, -1].double().softmax(0)[token].item()
                )
                tokens.append(token)
            total += probability / 2
        expected.append(total)
    assert world.exact_rates(model, numbers) == pytest.approx(expected, rel=1e-3)


def test_samples_file(folder):
    lines = [line.split() for line in (folder / "samples.txt").read_text().splitlines()]
    assert [line[0] for line in lines] == [
        row["prompt"] for row in read_rows(folder, "heldout")[:8]
    ]


def same_world(first, second):
    weights = [load_file(path / "model" / "model.safetensors") for path in (first, second)]
    equal = [torch.equal(weights[0][name], weights[1][name]) for name in weights[0]]
    for name in ("train_prompts.jsonl", "heldout_prompts.jsonl", "samples.txt"):
        equal.append((first / name).read_text() == (second / name).read_text())
    assert all(equal) or not any(equal[-3:])
    return all(equal)


def test_the_same_seed_gives_the_same_world(folder, tmp_path):
    task = json.loads((folder / "world.json").read_text())["task"]
    world.main(world.Args(out=tmp_path / "again", task=task, digits=3))
    assert same_world(folder, tmp_path / "again")


def test_another_seed_gives_another_world(tmp_path):
    for seed in (1, 2):
        world.main(world.Args(out=tmp_path / str(seed), digits=2, seed=seed))
    assert not same_world(tmp_path / "1", tmp_path / "2")


# --------------------------------------------------------------------------- B. rewards and prompts


@pytest.mark.parametrize("completion", ["112339", "933211", *NEAR_MISSES])
def test_rewards_against_a_slow_rule(completion):
    prompt = "391321="
    orders = sorted("".join(order) for order in itertools.permutations("391321"))
    row = {"prompt": prompt, "ascending": "112339", "descending": "933211"}
    up, down = completion == orders[0], completion == orders[-1]
    other = {"prompt": "10=", "ascending": "01", "descending": "10"}
    given = ([prompt, "10="], [completion, "01"], [row, other])
    assert world.sorted_exactly(*given) == [float(up), 1.0]
    assert world.ascending(*given) == [float(up), 1.0]
    assert world.descending(*given) == [float(down), 0.0]
    assert world.trap(*given) == [0.3 if up else 1.0 if down else 0.0, 0.3]


def test_full_size_prompts_are_disjoint_and_never_of_one_digit():
    torch.manual_seed(0)
    train, heldout = world.draw_prompts(6)
    assert (len(train), len(heldout)) == (4000, 256)
    numbers = {*map(world.text, [*train, *heldout])}
    assert len(numbers) == 4256
    assert all(len({*number}) > 1 for number in numbers)
    drawn = {*map(world.text, world.draw_numbers(20_000, 3, heldout[:, :3]))}
    assert not drawn & {*map(world.text, heldout[:, :3])}
    assert len(drawn) > 600


def test_sequences_hold_number_separator_answer_and_end():
    got = world.with_answers(torch.tensor([[3, 1, 2], [3, 1, 2]]), torch.tensor([False, True]))
    assert got.tolist() == [[3, 1, 2, 10, 1, 2, 3, 12], [3, 1, 2, 10, 3, 2, 1, 12]]


# ---------------------------------------------------------------------------------------- C. faults


@pytest.mark.parametrize(("name", "value"), [("digits", 1), ("digits", 13), ("seed", -1)])
def test_numbers_out_of_range_are_refused(tmp_path, name, value):
    with pytest.raises(world.InputError, match=f"--{name} {value}: ") as caught:
        world.main(world.Args(out=tmp_path / "out", **{name: value}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_task_not_learnt_in_time_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "MAX_STEPS", 10)
    with pytest.raises(world.InputError, match="--digits 6: not learnt in 10 steps") as caught:
        world.main(world.Args(out=tmp_path / "out"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("below", ["", "mine.txt/out"])
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, below):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(world.InputError, match="^OUT ") as caught:
        world.main(world.Args(out=tmp_path / below))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_fault_is_one_line_and_exit_code_1(tmp_path):
    result = run_script(tmp_path / "out", "--digits", 13)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: --digits 13: must be 2 to 12\n"
