"""benchmark/memory.py against what a process really holds, and against numbers known otherwise."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmark import memory

ROOT = Path(__file__).resolve().parent.parent


def test_the_count_is_a_real_peak_within_15_percent():
    """Forward and backward pass of a small transformer, the peak of a process of its own."""
    command = [sys.executable, str(ROOT / "benchmark/memory.py"), "real"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    real = float(done.stdout)
    assert real > 0.5
    assert memory.counted_peak() == pytest.approx(real, rel=0.15)


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
