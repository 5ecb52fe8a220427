"""What a step of adrpo_grpo_llm.py costs, against TRL's GRPOTrainer on the same work, and against
its network calls.

    pip install trl==1.16.0
    python benchmark/speed_llm.py        # CPU, one thread, 11.9 M parameters, about ten minutes
    python benchmark/speed_llm.py --gpu  # a GPU, Qwen2-0.5B's shapes with random weights, bf16

Both programs run in this process and take turns, step by step: the script's own `main` in one
thread, `trainer.train()` in another, one waiting while the other works. Same model, prompts, group,
number of tokens (no model here ever ends a completion early), precision and threads;
loss_type "grpo", beta 0.04, one update a rollout, no checkpointing. Seconds:

    TRL        from the beginning to the end of its step: generation, reference, policy, update
    script     charts/seconds_rollout + charts/seconds_update, as the script logs them; neither
               counts the reward
    floor      the script's network calls alone, on ready inputs: reading the prompt, one pass for
               each token, reference, policy forward and backward; no sampling, loss, optimiser or
               bookkeeping

Medians over the steps after the first two; a ratio is only meaningful within one run.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
import trl
import tyro
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    TrainerCallback,
)

import adrpo_grpo_llm as script

GROUP, WARM_UP, WORDS = 8, 2, 4095


@dataclasses.dataclass
class Args:
    gpu: bool = False
    """Qwen2-0.5B's shapes in bf16 on a GPU, instead of a small Qwen3 in float32 on the CPU"""
    lengths: tuple[str, ...] = ("850,100", "256,256", "64,64")
    """tokens of prompt and completion"""
    steps: int = 7
    """steps of each program; the first two do not count"""
    modes: tuple[str, ...] = ("full", "lora")
    """train all weights beside a frozen copy, or a LoRA of rank 16"""
    threads: int = 1
    """CPU threads"""
    output: str | None = None
    """file for the table, as JSON"""


def make_model(folder: Path, gpu: bool) -> None:
    """A model of random weights and a tokenizer of one token a word, whose end-of-sequence token
    the model cannot produce: it lies behind its vocabulary."""
    torch.manual_seed(0)
    common = {"max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": None}
    if gpu:
        config = Qwen2Config(
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            eos_token_id=151936,
            **common,
        )
    else:
        config = Qwen3Config(
            vocab_size=WORDS + 1,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=64,
            tie_word_embeddings=True,
            eos_token_id=WORDS + 1,
            **common,
        )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = (
        {"<pad>": 0} | {f"w{i}": i for i in range(1, WORDS + 1)} | {"<eos>": config.eos_token_id}
    )
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)


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
    return script.synchronized_time(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def floor_seconds(folder: Path, prompt: list[int], completion: int, gpu: bool, lora: bool) -> float:
    """The network calls of one step of the script and nothing else."""
    device, dtype = torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float32
    args = script.Args(
        model_id=str(folder), lora_rank=16 if lora else 0, max_completion_length=completion
    )
    policy = script.load_policy(dataclasses.replace(args, max_prompt_length=len(prompt)), dtype).to(
        device
    )
    tokens = torch.randint(1, WORDS, (1, GROUP, completion), device=device)
    ids, lengths = script.pad([prompt], device)
    positions = torch.arange(ids.shape[1], device=device)[None]
    each = torch.arange(GROUP, device=device)[None]
    start = now()
    # `score` has switched gradients off.
    with torch.autocast(device.type, dtype, enabled=gpu), torch.enable_grad():
        with torch.no_grad():
            shared = script.SharedPrompt(ids.shape[1], GROUP, None, cache={}, room=completion)
            policy(ids, positions, shared, lengths[:, None] - 1)
            for step in range(completion - 1):
                shared.steps = step + 1
                policy(tokens[..., step], (lengths + step)[:, None].expand(1, GROUP), shared, each)
        with script.reference_policy(policy, None if lora else policy):
            script.completion_log_probabilities(policy, [prompt], tokens, 1.0)
        logp, _ = script.completion_log_probabilities(policy, [prompt], tokens, 1.0)
        logp.sum().backward()
    return now() - start


def compare(
    args: Args, folder: Path, prompt_length: int, completion_length: int, mode: str
) -> dict:
    """Medians of one case."""
    generator = torch.Generator().manual_seed(prompt_length)
    rows = torch.randint(1, WORDS, (4 * args.steps, prompt_length), generator=generator).tolist()
    prompts = [" ".join(f"w{i}" for i in row) for row in rows]
    turns, floor, lora = Turns(), [], mode == "lora"

    def trl_reward(completions: list[str], **_) -> list[float]:
        return [float(len(text)) for text in completions]

    def own_reward(asked: list[str], completions: list[str], rows: list[dict]) -> list[float]:
        if len(completions) == GROUP:  # a training step, not the check or the evaluation
            turns.step()
            floor.append(
                floor_seconds(folder, [1] * prompt_length, completion_length, args.gpu, lora)
            )
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
            max_steps=args.steps,
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
            iterations=args.steps,
            eval_every=10**6,
            eval_max_prompts=1,
            eval_samples=1,
            save_every=10**6,
            method="adrpo",
            lora_rank=16 if lora else 0,
        )
        script.plugin_reward = lambda spec: own_reward  # it needs what only this function knows
        script.main(flags)
        thread.join()
        rows = [
            json.loads(line)
            for line in (Path(work) / "own" / "metrics.jsonl").read_text().splitlines()
        ][1:]
    rollout = statistics.median(row["charts/seconds_rollout"] for row in rows[WARM_UP:])
    update = statistics.median(row["charts/seconds_update"] for row in rows[WARM_UP:])
    own = statistics.median(
        row["charts/seconds_rollout"] + row["charts/seconds_update"] for row in rows[WARM_UP:]
    )
    theirs, alone = statistics.median(turns.seconds[WARM_UP:]), statistics.median(floor[WARM_UP:])
    assert all(row["completions/clipped_ratio"] == 1 for row in rows), "a completion ended early"
    case = {"prompt": prompt_length, "completion": completion_length, "group": GROUP, "mode": mode}
    case |= {"trl": theirs, "script": own, "rollout": rollout, "update": update, "floor": alone}
    return case | {
        "trl/script": theirs / own,
        "script/floor": own / alone,
        "peak_gb": rows[-1]["charts/peak_memory_gb"],
    }


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if args.gpu else f"CPU, {args.threads} thread"
    about = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), args.gpu)
        for mode in args.modes:
            for lengths in args.lengths:
                cases.append(compare(args, Path(folder), *map(int, lengths.split(",")), mode))
                print(
                    {
                        key: round(v, 3) if isinstance(v, float) else v
                        for key, v in cases[-1].items()
                    },
                    flush=True,
                )
    print(f"\n{where}, {about}, seconds a step, {args.steps - WARM_UP} steps each")
    for case in cases:
        print(
            "  ".join(
                f"{key} {value:.2f}" if isinstance(value, float) else f"{value}"
                for key, value in case.items()
            )
        )
    if args.output:
        Path(args.output).write_text(
            json.dumps({"where": where, "versions": about, "cases": cases}, indent=2)
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
