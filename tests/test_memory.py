"""benchmark/memory.py against what a process really holds, and against numbers known otherwise."""

import contextlib

import pytest
import torch
import transformers
from torch import nn

from benchmark import memory


def test_the_count_is_near_a_real_peak():
    """Forward and backward pass of a small transformer, the peak of a process of its own."""
    real = memory.measured_peak()
    assert real > 0.5
    assert memory.counted_peak() == pytest.approx(real, rel=0.05)


def test_live_counts_what_lives_at_once():
    kilobyte = torch.zeros(256)

    def work():
        one = kilobyte + 1
        two = one + 1
        del one
        three = two.view(2, 128) + 1  # a view is no storage of its own
        return three

    assert memory.peak_of([], work) * memory.GB == 2048


def test_weights_count_once_when_tied():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10))
    model[1].weight = model[0].weight
    assert memory.weights_of(model) * memory.GB == pytest.approx(4 * 110)
    assert memory.fits({"while training": 22.0}) == "24 GB"
    assert memory.fits({"while training": 23.0, "while rollout": 1.0}) == "40 GB"


def test_the_models_have_the_published_numbers_of_weights():
    with memory.fake_models(), memory.default_dtype(memory.BF16):
        text = memory.build_qwen2(memory.BF16)
        reward_model = transformers.GemmaForSequenceClassification(
            transformers.GemmaConfig(**memory.GEMMA_2B)
        )
    assert memory.weights_of(text) == pytest.approx(2 * 0.494032768, rel=1e-4)
    assert memory.weights_of(reward_model) == pytest.approx(2 * (2.506172416 + 2048e-9), rel=1e-4)


@pytest.mark.parametrize("mixed", (False, True))
def test_fake_text_step_counts_what_a_real_one_does(mixed):
    """Two passes with the loss, the same tracker on tensors with values and without (which keep a
    mask of ones, as prompts of different length do)."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 300}
    config = transformers.Qwen2Config(num_attention_heads=4, num_key_value_heads=2, **sizes)
    args = memory.llm.Args(train_tokens=32)
    peaks = []
    for context in (contextlib.nullcontext(), memory.fake_models()):
        with context:
            model = transformers.Qwen2ForCausalLM(config).eval()
            sampler = nn.Linear(1, 1) if mixed else model
            choice = [0], torch.zeros(300, dtype=torch.bool), 0, 1.0, [], {}, True, (16, 8)
            policy = memory.llm.Policy(model, sampler, None, *choice)
            ids, tokens = torch.ones(4, 16).long(), torch.ones(16, 8).long()
            batch = memory.llm.Batch(ids, torch.ones_like(ids), tokens, memory.Whole(8))
            step = memory.text_step, memory.llm, policy, batch, args
            peaks.append(memory.peak_of([model], *step) * memory.GB)
    assert peaks[0] > 4e5
    assert peaks[1] == pytest.approx(peaks[0], rel=0.05)
