"""What a step of adrpo_grpo_llm.py costs, against TRL's GRPOTrainer on the same work.

    pip install trl==1.16.0
    python benchmark/speed_llm.py          # CPU, one thread, 11.3 M parameters, about ten minutes
    python benchmark/speed_llm.py --gpu    # a GPU, Qwen2-0.5B's shapes with random weights, bf16
    python benchmark/speed_llm.py --count  # kernels and host syncs of a decoded token, 24 layers
    python benchmark/speed_llm.py --gpu --decode  # tokens a second of 64 completions

Both programs run in this process and take turns, step by step: the script's own `main` in one
thread, `trainer.train()` in another, one waiting while the other works. Same model, prompts, group,
precision and threads; loss_type "grpo", beta 0.04, one update a rollout, no checkpointing. Seconds:

    TRL        from the beginning to the end of its step: generation, reference, policy, update
    script     charts/seconds_rollout + charts/seconds_update, as the script logs them; neither
               counts the reward

No completion ends before its limit, except in the cases with a third number: there every token is
the last with the probability that gives this mean length. Medians over the steps after the first
two; a ratio is only meaningful within one run.
"""

import dataclasses
import functools
import json
import math
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
import trl
import tyro
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    TrainerCallback,
)

import adrpo_grpo_llm as script

GROUP, WARM_UP, WORDS = 8, 2, 4095
COMMON = {"max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": None}
SMALL = {"vocab_size": WORDS + 1, "hidden_size": 384, "intermediate_size": 1024, "head_dim": 64}
SMALL |= {"num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 3}
QWEN2_05B = {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864}
QWEN2_05B |= {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
QWEN2_05B |= {"head_dim": 64}


@dataclasses.dataclass
class Args:
    gpu: bool = False
    """Qwen2-0.5B's shapes in bf16 on a GPU, instead of a small Qwen3 in float32 on the CPU"""
    count: bool = False
    """only count what a decoding step launches"""
    decode: bool = False
    """only the tokens a second of a rollout, against `generate` and its continuous batching"""
    lengths: tuple[str, ...] = ("850,100", "256,256", "64,64", "256,256,64")
    """tokens of prompt and completion, and the mean length where completions end by themselves"""
    steps: int = 7
    """steps of each program; the first two do not count"""
    modes: tuple[str, ...] = ("full", "lora")
    """train all weights beside a frozen copy, or a LoRA of rank 16"""
    threads: int = 1
    """CPU threads"""
    output: str | None = None
    """file for the table, as JSON"""


def make_model(folder: Path, gpu: bool, mean_length: int | None = None) -> None:
    """A model of random weights and a tokenizer of one token a word. Its end-of-sequence token has
    the same small probability everywhere, or lies behind the vocabulary: it cannot be produced."""
    torch.manual_seed(0)
    sizes = dict(QWEN2_05B) if gpu else dict(SMALL)
    end = 1 if mean_length else sizes["vocab_size"]
    # (A folder of type qwen2 would be read with a byte-level tokenizer, whatever is in it.)
    config = Qwen3Config(**sizes, **COMMON, eos_token_id=end, tie_word_embeddings=not mean_length)
    model = AutoModelForCausalLM.from_config(config)
    if mean_length:  # channel 0 is the same for all tokens, and read by the end token's row alone
        with torch.no_grad():
            model.get_input_embeddings().weight[:, 0] = 1
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight[0] = 0
                layer.mlp.down_proj.weight[0] = 0
            head = model.get_output_embeddings().weight
            head[:, 0], head[end] = 0, 0
            hidden = model.model(torch.arange(2, 130)[None]).last_hidden_state[0]
            others = (hidden @ head.T).logsumexp(-1).mean()
            head[end, 0] = (others - math.log(mean_length - 1)) / hidden[:, 0].mean()
    model.save_pretrained(folder)
    words = {"<pad>": 0} | {f"w{i}": i for i in range(1, WORDS + 1)} | {"<eos>": end}
    words = {word: number for word, number in words.items() if word == "<eos>" or number != end}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


class Turns(TrainerCallback):
    """Lets TRL do one step when `step` is called, and times it."""

    def __init__(self) -> None:
        self.go, self.done, self.seconds = threading.Semaphore(0), threading.Semaphore(0), []

    def step(self) -> None:
        self.go.release()
        self.done.acquire()

    def on_step_begin(self, *_, **__) -> None:
        self.go.acquire()
        self.start = now()

    def on_step_end(self, *_, **__) -> None:
        self.seconds.append(now() - self.start)
        self.done.release()


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(args: Args, folder: Path, lengths: str, mode: str) -> dict:
    """Medians of one case."""
    prompt_length, completion_length, *mean_length = map(int, lengths.split(","))
    make_model(folder, args.gpu, *mean_length)
    steps = args.steps + 8 * len(mean_length)  # of different lengths
    generator = torch.Generator().manual_seed(prompt_length)
    rows = torch.randint(2, WORDS, (4 * steps, prompt_length), generator=generator).tolist()
    prompts = [" ".join(f"w{i}" for i in row) for row in rows]
    turns, lora = Turns(), mode == "lora"

    def trl_reward(completions: list[str], **_) -> list[float]:
        return [float(len(text)) for text in completions]

    def own_reward(asked: list[str], completions: list[str], rows: list[dict]) -> list[float]:
        if len(completions) == GROUP:  # a training step, not the check or the evaluation
            turns.step()
        return [float(len(text)) for text in completions]

    with tempfile.TemporaryDirectory() as work:
        settings = trl.GRPOConfig(
            output_dir=f"{work}/trl",
            use_cpu=not args.gpu,
            bf16=args.gpu,
            per_device_train_batch_size=GROUP,
            gradient_accumulation_steps=1,
            num_generations=GROUP,
            max_completion_length=completion_length,
            max_steps=steps,
            beta=0.04,
            epsilon=0.2,
            loss_type="grpo",
            temperature=1.0,
            learning_rate=1e-6,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        peft_config = script.LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=trl_reward,
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder),
            peft_config=peft_config if lora else None,
            callbacks=[turns],
        )
        thread = threading.Thread(target=trainer.train, daemon=True)
        thread.start()
        (Path(work) / "prompts.txt").write_text("\n".join(prompts))
        flags = script.Args(
            output_dir=work,
            run_name="own",
            cpu=not args.gpu,
            precision="bf16" if args.gpu else "fp32",
            model_id=str(folder),
            dataset=f"{work}/prompts.txt",
            reward=(f"{__file__}:own_reward",),
            max_prompt_length=prompt_length,
            max_completion_length=completion_length,
            prompts_per_update=1,
            group_size=GROUP,
            iterations=steps,
            eval_every=10**6,
            eval_max_prompts=1,
            eval_samples=1,
            save_every=10**6,
            method="adrpo",
            lora_rank=16 if lora else 0,
        )
        script.load_plugin = lambda spec: own_reward  # it needs what only this function knows
        script.main(flags)
        thread.join()
        lines = (Path(work) / "own" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines][1:]
    steps = [row["charts/seconds_rollout"] + row["charts/seconds_update"] for row in rows[WARM_UP:]]
    rollout = statistics.median(row["charts/seconds_rollout"] for row in rows[WARM_UP:])
    update = statistics.median(row["charts/seconds_update"] for row in rows[WARM_UP:])
    average = statistics.mean if mean_length else statistics.median
    theirs, own = average(turns.seconds[WARM_UP:]), average(steps)
    case = {"lengths": lengths, "group": GROUP, "mode": mode, "trl": theirs, "script": own}
    case |= {"rollout": rollout, "update": update, "trl/script": theirs / own}
    case["mean_length"] = statistics.mean(row["completions/mean_length"] for row in rows)
    return case | {"peak_gb": rows[-1].get("charts/peak_memory_gb")}


class Launches(TorchDispatchMode):
    """Counts the operations that a GPU would launch a kernel for, and those that wait for it."""

    VIEWS = "view reshape expand transpose permute slice select unsqueeze squeeze t detach alias"
    VIEWS += " split chunk unbind as_strided _unsafe_view lift_fresh empty _reshape_alias narrow"
    WAITS = "_local_scalar_dense item is_nonzero equal nonzero"

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.waits = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.kernels += name not in self.VIEWS.split() and name not in self.WAITS.split()
        self.waits += name in self.WAITS.split()
        return function(*args, **(kwargs or {}))


def count_launches(mode: str) -> dict:
    """Kernels and host syncs of one decoding step: the script's rollout, and `generate` as anyone
    would call it, sampling; 24 layers. The difference of two lengths, so prefill drops out."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=24,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        pad_token_id=0, bos_token_id=None, eos_token_id=299,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model = model.bfloat16() if mode != "fp32" else model
    if mode == "lora":
        lora = script.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = script.get_peft_model(model, lora).eval()
    unreadable = torch.zeros(300, dtype=torch.bool)
    policy = script.Policy(model, model, None, [299], unreadable, 0, 1.0, [], None, False, (16, 32))
    ids = torch.randint(1, 299, (2, 16))
    found = {}
    for static in (False, True):
        policy = policy._replace(static={} if static else None)
        counts = defaultdict(list)
        for length in (8, 24):
            policy = policy._replace(lengths=(16, length), static={} if static else None)
            with Launches() as own:
                script.rollout(policy, ids.tolist(), torch.rand(2, 4, length) * 0.01, 8)
            kind = {"cache_implementation": "static"} if static else {}
            options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": True}
            options |= {"eos_token_id": 299, "pad_token_id": 0, "disable_compile": True, **kind}
            with Launches() as stock, torch.no_grad():
                repeated = ids.repeat_interleave(4, 0)
                model.generate(input_ids=repeated, attention_mask=repeated * 0 + 1, **options)
            for name, count in (("script", own), ("generate", stock)):
                counts[name].append((count.kernels, count.waits))
        for name, (short, long) in counts.items():
            kernels, waits = ((b - a) / 16 for a, b in zip(short, long, strict=True))
            found[f"{name}, {'static' if static else 'dynamic'}"] = (kernels, waits)
    return found


@torch.no_grad()
def decode_speed(args: Args, folder: Path) -> dict[str, float]:
    """Tokens a second of 64 completions of 256 tokens (CPU: 32), 8 of each prompt of 256, once the
    first call has compiled what it compiles: the script's rollout with a growing and with a static
    cache, `generate` on repeated prompts as TRL calls it, and continuous batching."""
    make_model(folder, args.gpu)
    device = torch.device("cuda" if args.gpu else "cpu")
    dtype = torch.bfloat16 if args.gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    vocabulary, longest = model.config.vocab_size, 256 if args.gpu else 32
    unreadable = torch.zeros(vocabulary, dtype=torch.bool, device=device)
    lengths = 256, longest
    policy = script.Policy(model, model, None, [], unreadable, 0, 1.0, [], None, False, lengths)
    prompts = torch.randint(2, WORDS, (8, 256))
    uniforms = torch.rand(8, GROUP, longest, device=device)
    repeated = prompts.repeat_interleave(GROUP, 0).to(device)
    options = {"max_new_tokens": longest, "do_sample": True, "pad_token_id": 0, "top_k": 0}
    stock = GenerationConfig(**options, eos_token_id=None)
    flags = script.Args(rollout_batch=64)
    calls = {
        name: functools.partial(script.rollout, each, prompts.tolist(), uniforms, flags)
        for name, each in (("dynamic", policy), ("static", policy._replace(static={}, full=True)))
    }
    calls["generate"] = functools.partial(
        model.generate, repeated, attention_mask=torch.ones_like(repeated), generation_config=stock
    )
    if args.gpu:
        calls["continuous batching"] = functools.partial(
            model.generate_batch, inputs=repeated.tolist(), generation_config=stock
        )
    found = {}
    for name, call in calls.items():
        try:
            call()
            start = now()
            call()
            found[name] = 64 * longest / (now() - start)
        except Exception as error:  # one that does not run says so, the others still count
            found[name] = f"{type(error).__name__}: {error}"[:300]
        print(name, found[name], flush=True)
    return found


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if args.gpu else f"CPU, {args.threads} thread"
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl)}
    record = {"command": sys.argv, "where": where, "versions": versions}
    if args.count:
        record["counts"] = {mode: count_launches(mode) for mode in ("fp32", "bf16", "lora")}
        for mode, counts in record["counts"].items():
            for name, (kernels, waits) in counts.items():
                print(f"{mode}: {name}: {kernels:.0f} kernels, {waits:.1f} host syncs a token")
    elif args.decode:
        with tempfile.TemporaryDirectory() as folder:
            record["tokens a second"] = decode_speed(args, Path(folder))
    else:
        record["steps"], record["cases"] = args.steps - WARM_UP, []
        with tempfile.TemporaryDirectory() as folder:
            for mode in args.modes:
                for lengths in args.lengths:
                    case = compare(args, Path(folder) / lengths, lengths, mode)
                    record["cases"].append(case)
                    print({k: round(v, 3) if isinstance(v, float) else v for k, v in case.items()})
    if args.output:
        Path(args.output).write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
