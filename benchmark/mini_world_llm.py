"""A small language world, trained here: a Qwen3 folder with its tokenizer, prompts, and exactly
checkable rewards.

Everything is real but small (about 300,000 parameters): stock transformers loads and samples it. So
an RL fine-tuning script can be run from end to end, and can improve something, in minutes on one
CPU core without any download.

A prompt is a number and an equals sign, `382915=`; the answer is its digits in order. Two tasks:

    sort    the base model was trained on ascending answers and stopped early: about 30 % of its
            samples are right.
    trap    a local optimum: the base model answers in ascending order about 79 % of the time and in
            descending order about 1 % (--rare), the prompt not saying which; the reward `trap` pays
            0.3 for the first, 1 for the second.

    python benchmark/mini_world_llm.py worlds/sort
    python benchmark/mini_world_llm.py worlds/trap --task trap

What is left in the folder, and how to load it:

    model/                  AutoModelForCausalLM.from_pretrained("worlds/sort/model"), AutoTokenizer
                            the same; one token per character, nothing added in front or behind; an
                            answer ends with <eos>
    train_prompts.jsonl, heldout_prompts.jsonl
                            {"prompt": "382915=", "ascending": "123589", "descending": "985321"};
                            no prompt in both, and none whose digits are all equal: its two answers
                            would be one
    world.json              figures of the base model on the held-out prompts, flags, parameters,
                            steps, seconds
    samples.txt             some prompts with sampled answers, not chosen

The rewards are functions of this file, `function(prompts, completions, rows)` -> one float per
completion, where rows are the lines of the prompts' file: sorted_exactly, trap; ascending and
descending tell which optimum a run sits in.
"""

import dataclasses
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Literal

# Before transformers is imported: nothing here may look online.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import transformers
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = (*"0123456789", "=", "<pad>", "<eos>")  # a digit's token number is the digit
EQUALS, PAD, EOS = 10, 11, 12
MAX_LENGTH = 64

TRAIN_PROMPTS, HELDOUT_PROMPTS, PROBE_PROMPTS = 4000, 256, 512
# The trap's rare answer is measured from 256 x 32 samples: its standard error is 0.1 %.
SAMPLES_PER_PROMPT = 32

BATCH, LEARNING_RATE, MAX_STEPS = 128, 1.5e-3, 4000
# Once the summed rate of both answers has passed CLOSE, training goes on at a lower learning rate
# and is looked at more often: the target would be overshot otherwise. For the trap this is also
# where descending answers become rare.
CLOSE = {"sort": 0.1, "trap": 0.4}
CLOSE_LEARNING_RATE = {"sort": 3e-4, "trap": 5e-4}
INTERVAL, CLOSE_INTERVAL = 10, {"sort": 2, "trap": 5}  # steps between two looks at the rates
# Of ascending answers; training ends at the first look that finds it reached.
RATE = {"sort": 0.29, "trap": 0.78}
# The trap is done when descending answers are this close to the wanted rate, relative to it.
RARE_TOLERANCE = 0.25


class InputError(ValueError):
    """Something the user gave cannot work. Its message is one line that names the flag and the
    remedy."""


@dataclasses.dataclass
class Args:
    out: tyro.conf.Positional[Path]
    """new or empty folder that receives the world"""
    task: Literal["sort", "trap"] = "sort"
    """sort: one right answer, often missed; trap: a common answer that pays little, a rare one that
    pays more"""
    seed: int = 1
    """seed of everything: the same seed gives the same weights on one machine"""
    digits: int = 6
    """digits of a prompt, 2 to 12; more take longer to learn, and of two or three there are few
    prompts"""
    rare: float = 0.01
    """trap: rate of descending answers, 0.002 to 0.2; the rarer, the less often they are found"""


# ------------------------------------------------------------------------------------------ rewards


def ascending(prompts: list[str], completions: list[str], rows: list[dict]) -> list[float]:
    """1 for the prompt's digits in ascending order and nothing else, else 0."""
    return [
        float(completion == row["ascending"])
        for completion, row in zip(completions, rows, strict=True)
    ]


def descending(prompts: list[str], completions: list[str], rows: list[dict]) -> list[float]:
    """1 for the prompt's digits in descending order and nothing else, else 0."""
    return [
        float(completion == row["descending"])
        for completion, row in zip(completions, rows, strict=True)
    ]


def sorted_exactly(prompts: list[str], completions: list[str], rows: list[dict]) -> list[float]:
    """The reward of `sort`: 1 for ascending order, else 0."""
    return ascending(prompts, completions, rows)


def trap(prompts: list[str], completions: list[str], rows: list[dict]) -> list[float]:
    """0.3 for ascending, 1 for descending order, else 0: the common answer pays, the rare one
    more."""
    pairs = zip(
        ascending(prompts, completions, rows), descending(prompts, completions, rows), strict=True
    )
    return [0.3 * up + down for up, down in pairs]


# -------------------------------------------------------------------------------- prompts and model


def draw_numbers(count: int, digits: int, excluded: Tensor) -> Tensor:
    """Up to `count` random numbers as digits [B,D]: those in `excluded` [N,D] or with all digits
    equal are dropped."""
    numbers = torch.randint(10, (count, digits))
    place = 10 ** torch.arange(digits)
    keep = ~torch.isin(numbers @ place, excluded @ place) & (numbers != numbers[:, :1]).any(1)
    return numbers[keep]


def draw_prompts(digits: int) -> tuple[Tensor, Tensor]:
    """Different numbers for the training prompts [N,D] and the held-out ones [M,D], fewer where
    there are not enough: of two digits there are 90, a quarter of which is held out."""
    heldout_count = min(HELDOUT_PROMPTS, (10**digits - 10) // 4)
    count = min(TRAIN_PROMPTS + heldout_count, 10**digits - 10)
    found: dict[tuple[int, ...], None] = {}  # a set that keeps the order of drawing
    while len(found) < count:
        found |= dict.fromkeys(
            map(tuple, draw_numbers(count, digits, torch.empty(0, digits, dtype=int)).tolist())
        )
    numbers = torch.tensor([*found][:count])
    return numbers[heldout_count:], numbers[:heldout_count]


def text(tokens: Tensor) -> str:
    """Digits as text: [D] -> "382915"."""
    return "".join(map(str, tokens.tolist()))


def write_prompts(path: Path, numbers: Tensor) -> None:
    """One line per prompt, with both answers."""
    with path.open("w") as file:
        for number in numbers:
            up = text(number.sort().values)
            file.write(
                json.dumps({"prompt": f"{text(number)}=", "ascending": up, "descending": up[::-1]})
                + "\n"
            )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character. There is no token for unknown ones: a text with any other character
    is an error."""
    tokenizer = Tokenizer(
        models.WordLevel({token: number for number, token in enumerate(VOCABULARY)})
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()  # else decoding puts spaces between the digits
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=MAX_LENGTH,
    )


def build_model() -> Qwen3ForCausalLM:
    """A random model, whose folder says that generate() samples from the model itself: temperature
    1, no cut."""
    special = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        **special,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **special
    )
    return model


# ----------------------------------------------------------------------------------------- training


def with_answers(numbers: Tensor, descending: Tensor) -> Tensor:
    """Whole sequences [B,2D+2] for numbers [B,D]: number, equals sign, answer in the order that
    `descending` [B] (bool) says, end."""
    up = numbers.sort(1).values
    answers = torch.where(descending[:, None], up.flip(1), up)
    return torch.cat([F.pad(numbers, (0, 1), value=EQUALS), F.pad(answers, (0, 1), value=EOS)], 1)


def answer_log_probs(model: Qwen3ForCausalLM, sequences: Tensor) -> Tensor:
    """Log-probability of every token of the answers, end included: sequences [B,2D+2] ->
    [B,D+1]."""
    length = sequences.shape[1] // 2
    logits = model(input_ids=sequences[:, :-1]).logits[:, length - 1 :]
    return logits.log_softmax(-1).gather(2, sequences[:, length:, None])[..., 0]


@torch.no_grad()
def exact_rates(model: Qwen3ForCausalLM, numbers: Tensor) -> tuple[float, float]:
    """The model's probability of the ascending and of the descending answer, mean over numbers
    [B,D].

    It is what the share among samples tends to, without their noise: a rule that stops at 1 % needs
    that."""
    rates = []
    for order in (False, True):
        sequences = with_answers(numbers, torch.full((len(numbers),), order))
        rates.append(answer_log_probs(model, sequences).sum(1).exp().mean().item())
    return rates[0], rates[1]


def train(model: Qwen3ForCausalLM, task: str, heldout: Tensor, rare: float) -> int:
    """Train until the rates on fixed probe prompts are those wanted; returns the number of steps.
    Raises InputError.

    The rules look at exact rates after fixed numbers of steps, never at the clock, so the seed
    decides where training ends. The trap first learns both orders alike; then descending answers
    become rare, and are shown only while their rate is below the wanted one."""
    digits = heldout.shape[1]
    probe = draw_numbers(PROBE_PROMPTS, digits, heldout)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    share = 0.5 if task == "trap" else 0.0  # of descending answers
    interval = INTERVAL
    bar = tqdm(range(1, MAX_STEPS + 1), "train", leave=False, disable=None)
    for step in bar:
        numbers = draw_numbers(BATCH, digits, heldout)
        loss = -answer_log_probs(
            model, with_answers(numbers, torch.rand(len(numbers)) < share)
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % interval:
            continue
        up, down = exact_rates(model, probe)
        bar.set_postfix(ascending=up, descending=down)
        if up + down > CLOSE[task]:
            interval = CLOSE_INTERVAL[task]
            optimizer.param_groups[0]["lr"] = CLOSE_LEARNING_RATE[task]
        if task == "trap" and interval != INTERVAL:
            share = 0.04 + 2 * rare if down < rare else 0.0
        if up > RATE[task] and (task == "sort" or abs(down - rare) < RARE_TOLERANCE * rare):
            return step
    raise InputError(
        f"--digits {digits}: not learnt in {MAX_STEPS} steps (ascending {up:.0%}); take fewer "
        "digits"
    )


# ---------------------------------------------------------------------------------------- measuring


def sample(model: Qwen3ForCausalLM, numbers: Tensor, repeats: int, greedy: bool = False) -> Tensor:
    """Answers of stock generate() to numbers [B,D], `repeats` each -> tokens [B,repeats,D+1]. An
    answer that has not ended by then is wrong anyway."""
    prompts = F.pad(numbers, (0, 1), value=EQUALS).repeat_interleave(repeats, 0)
    tokens = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=prompts.shape[1],
        do_sample=not greedy,
    )
    # generate() stops where all answers have ended.
    missing = 2 * prompts.shape[1] - tokens.shape[1]
    return F.pad(tokens, (0, missing), value=PAD)[:, prompts.shape[1] :].unflatten(0, (-1, repeats))


def measure(model: Qwen3ForCausalLM, numbers: Tensor, repeats: int) -> dict[str, float]:
    """Shares of right answers to numbers [B,D]: exact, among `repeats` samples each, greedy."""
    figures = dict(
        zip(("ascending, exact", "descending, exact"), exact_rates(model, numbers), strict=True)
    )
    for kind in ("sampled", "greedy"):
        answers = sample(model, numbers, 1 if kind == "greedy" else repeats, kind == "greedy")
        for order in (False, True):
            right = with_answers(numbers, torch.full((len(numbers),), order))[
                :, None, numbers.shape[1] + 1 :
            ]
            hits = (answers == right).all(-1).float()
            figures[f"{'descending' if order else 'ascending'}, {kind}"] = hits.mean().item()
    return figures


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
    if not 2 <= args.digits <= 12:
        raise InputError(f"--digits {args.digits}: must be 2 to 12")
    if not 0.002 <= args.rare <= 0.2:
        raise InputError(f"--rare {args.rare}: must be 0.002 to 0.2")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: must not be negative")
    # The network is too small for more, and the sums' order must not depend on the machine.
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    prepare_folder(args.out)
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    train_numbers, heldout = draw_prompts(args.digits)
    write_prompts(args.out / "train_prompts.jsonl", train_numbers)
    write_prompts(args.out / "heldout_prompts.jsonl", heldout)

    model = build_model()
    steps = train(model, args.task, heldout, args.rare)
    model.eval().save_pretrained(args.out / "model")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(args.out / "model")
    trained = time.perf_counter()

    torch.manual_seed(args.seed)
    figures = measure(model, heldout, SAMPLES_PER_PROMPT)
    shown = heldout[:8]
    with (args.out / "samples.txt").open("w") as file:
        for number, answers in zip(shown, sample(model, shown, 4), strict=True):
            file.write(
                f"{text(number)}=  "
                f"{'  '.join(tokenizer.batch_decode(answers, skip_special_tokens=True))}\n"
            )
    facts = {
        "task": args.task,
        "seed": args.seed,
        "digits": args.digits,
        "rare": args.rare,
        "steps": steps,
    }
    facts |= {
        "parameters": model.num_parameters(),
        "train_prompts": len(train_numbers),
        "heldout_prompts": len(heldout),
    }
    facts |= {"samples": len(heldout) * SAMPLES_PER_PROMPT, "figures": figures}
    facts["seconds"] = {"training": trained - started, "measuring": time.perf_counter() - trained}
    facts["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    facts["versions"]["transformers"] = transformers.__version__
    # Last: where it stands, the world is complete.
    (args.out / "world.json").write_text(json.dumps(facts, indent=2))
    for name, value in figures.items():
        print(f"{name:30s} {value:8.4f}")
    print(
        f"{steps} steps, {sum(facts['seconds'].values()):.0f} s in all. Look at "
        f"{args.out / 'samples.txt'}"
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: delete the unfinished folder and start again")
