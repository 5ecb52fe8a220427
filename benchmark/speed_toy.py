"""Where the time of one update of toy_mnist_flow.py goes, in milliseconds.

    python benchmark/speed_toy.py

Each part alone on 256 samples, best of five rounds; then float32 beside bfloat16, and
torch.compile."""

import copy
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # a first run compiles from nothing
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import toy_mnist_flow as toy


def milliseconds(call: Callable[[], object], rounds: int = 5, calls: int = 20) -> float:
    """Best mean of `rounds` rounds of `calls` calls."""
    call()
    means = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        means.append((time.perf_counter() - start) / calls * 1e3)
    return min(means)


def passes(network: Callable) -> tuple[Callable[[], object], Callable[[], object]]:
    """A forward pass without gradients, and a forward and backward pass."""
    return torch.no_grad()(lambda: network(x, t)), lambda: network(x, t).backward(x)


device = torch.device("cpu")
x, t = toy.noise_and_time(256, torch.Generator().manual_seed(0), device)
print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, 256 samples, milliseconds")
for bf16 in (False, True):
    flow = toy.build_models(bf16, device)["flow"]
    forward, backward = passes(flow)
    forward_time, backward_time = milliseconds(forward), milliseconds(backward)
    name = "bf16" if bf16 else "fp32"
    print(f"{name}: velocity {forward_time:.2f}, with backward {backward_time:.2f}")
average, optimizer = copy.deepcopy(flow), torch.optim.AdamW(flow.parameters(), 1e-9, fused=True)
clip = milliseconds(lambda: torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0))
step, mean = (
    milliseconds(optimizer.step),
    milliseconds(lambda: toy.update_average(average, flow, 0.9)),
)
v, one = torch.randn(256, 24, requires_grad=True), torch.ones(256)
loss = milliseconds(lambda: toy.adrpo_fm_loss(v, x, x + 1, one, 0.05).mean().backward())
rest = clip + step + mean + loss
network = forward_time + backward_time  # reference and policy
print(f"beside the network: clip {clip:.2f}, AdamW {step:.2f}, average {mean:.2f}, loss {loss:.2f}")
print(f"network calls' share of an update: {network / (network + rest):.2f}")
start = time.perf_counter()
forward, backward = passes(torch.compile(flow))
forward(), backward()
print(f"torch.compile (bf16): {time.perf_counter() - start:.0f} s to compile", end="")
print(f", then velocity {milliseconds(forward):.2f}, with backward {milliseconds(backward):.2f}")
