"""What a step of adrpo_audio_mmau.py costs, against the same step done the usual way.

    python benchmark/speed_audio.py --modes lora full          # CPU, one thread, a Qwen2-Audio of
                                                               # 14 M parameters
    python benchmark/speed_audio.py --family omni              # the same with a Qwen2.5-Omni
                                                               # thinker
    python benchmark/speed_audio.py --gpu                      # a GPU, Qwen2.5-Omni-7B's thinker,
                                                               # random weights
    python benchmark/speed_audio.py --lengths 100,8 --steps 3  # does it run? Its figures mean
                                                               # nothing

A step is one question with its clip: 8 completions, reference, policy forward and backward,
optimiser. No completion ends early, so both programs work on the same number of tokens. Seconds:

    usual      stock transformers as in the open GRPO code for audio (R1-AQA, from which Ke-Omni-R
               comes; on TRL): the question and its clip are repeated for each completion, in
               generate() and again in both passes over prompt and completion, and the audio tower
               works on every copy. Stock computes the logits of all positions, of which those of
               the completion are used. Reading and preparing the clip included
    script     charts/seconds_rollout + charts/seconds_update, as the script's own `main` logs:
               reading and preparing the clip included

Neither counts the reward. Model, question, trained weights, precision and threads are the same. On
the CPU the two take turns, step by step, in this process; on a GPU they run one after the
other, so that the peak memory is that of each alone. Medians over the steps after the first two; a
ratio is only meaningful within one run.

The small models' audio towers are as large as they must be for hearing a clip to cost, against
reading its prompt, what it costs in the 7B models: in Qwen2-Audio about a quarter, in Qwen2.5-Omni
a fifth. Qwen2-Audio's tower always works on its whole window, there 30 s, whatever the clip: here
the window is as long as the longest clip of --lengths. At 7B the usual way keeps the activations
of 8 x 950 tokens: where that does not fit, --gradient-checkpointing.
"""

import dataclasses
import gc
import json
import math
import re
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import peft
import soundfile
import torch
import transformers
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoProcessor,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

import adrpo_audio_mmau as script

GROUP, WARM_UP = 8, 2
# 16 kHz, a frame each 10 ms, four frames an audio token: 25 tokens a second.
SAMPLES_PER_TOKEN = 640
MARKS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|AUDIO|> <|audio_bos|> <|audio_eos|> <|IMAGE|> "
    "<|vision_bos|>"
)
MARKS = (*MARKS.split(), "<|vision_eos|>", "<|VIDEO|>")  # their ids are 0 to 9
PAD, AUDIO, AUDIO_START, AUDIO_END, IMAGE, VISION_START, VISION_END, VIDEO = 0, 3, 4, 5, 6, 7, 8, 9
CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% for part in message['content'] %}\
{% if part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>
{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
ROW = {"audio": "clip.wav", "question": "What makes the sound?", "answer": "wind"}
ROW["choices"] = ["wind", "engine", "clock", "siren"]


@dataclasses.dataclass
class Args:
    family: Literal["qwen2_audio", "omni"] = "qwen2_audio"
    """of the small model on the CPU"""
    gpu: bool = False
    """Qwen2.5-Omni-7B's thinker in bf16 on a GPU, instead of a small model in float32 on the CPU"""
    lengths: tuple[str, ...] = ("850,100", "310,100")
    """tokens of prompt and completion; all of the prompt but some 60 tokens is sound, 25 tokens a
    second"""
    steps: int = 7
    """steps of each program; the first two do not count"""
    modes: tuple[Literal["lora", "full"], ...] = ("lora",)
    """train a LoRA of the script's rank, or all of the language model beside a frozen copy (too
    large for --gpu)"""
    gradient_checkpointing: bool = False
    """in all programs"""
    threads: int = 1
    """CPU threads"""
    output: str | None = None
    """file for the table, as JSON"""


# ------------------------------------------------------------------------------------------- models


def make_config(
    family: str, gpu: bool, seconds: int
) -> Qwen2AudioConfig | Qwen2_5OmniThinkerConfig:
    """The shapes: Qwen2.5-Omni-7B's thinker, or a small model that hears clips of at most
    `seconds`."""
    index = {"audio_token_index": AUDIO, "tie_word_embeddings": False}
    text = {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
    }
    text |= {"num_key_value_heads": 3, "vocab_size": 4096, "max_position_embeddings": 2048}
    sound = {
        "d_model": 128,
        "encoder_layers": 4,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 512,
    }
    sound |= {"num_mel_bins": 128, "max_source_positions": 50 * seconds}
    sections = [8, 12, 12]  # of half a head, as in the large model
    if family == "qwen2_audio" and not gpu:
        sound |= {"model_type": "qwen2_audio_encoder", "encoder_layers": 2}
        return Qwen2AudioConfig(
            audio_config=sound, text_config={"model_type": "qwen2", **text}, **index
        )
    if gpu:
        text = {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
        }
        text |= {"num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768}
        sound = {
            "d_model": 1280,
            "encoder_layers": 32,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
        }
        sound |= {"num_mel_bins": 128, "max_source_positions": 1500}
        sections = [16, 24, 24]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    # Nobody looks at anything here: one small layer.
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "fullatt_block_indexes": [0],
    }
    index |= {
        "audio_start_token_id": AUDIO_START,
        "audio_end_token_id": AUDIO_END,
        "image_token_index": IMAGE,
    }
    index |= {
        "video_token_index": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    return Qwen2_5OmniThinkerConfig(
        audio_config={"n_window": 100, "output_dim": text["hidden_size"], **sound},
        vision_config={"out_hidden_size": text["hidden_size"], **vision},
        text_config=text,
        **index,
    )


def make_processor(omni: bool, seconds: int) -> transformers.ProcessorMixin:
    """A processor whose extractor has the real shapes and whose tokenizer knows the prompt's
    words."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 1000, "initial_alphabet": alphabet, "special_tokens": list(MARKS)}
    words = SimpleNamespace(
        apply_chat_template=lambda messages, **_: messages[0]["content"][1]["text"]
    )
    said = [script.build_prompt(words, ROW, script.Args().think_budget), "user\n", "assistant\n"]
    bpe.train_from_iterator(said * 8, trainers.BpeTrainer(show_progress=False, **options))
    names = ("image", "audio", "video", "vision_bos", "vision_eos", "audio_bos", "audio_eos")
    named = {f"{name}_token": f"<|{name if '_' in name else name.upper()}|>" for name in names}
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "padding_side": "left"}
    special |= {"extra_special_tokens": named} if omni else {}
    parts = {
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=bpe, **special),
        "chat_template": CHAT_TEMPLATE,
    }
    parts["feature_extractor"] = WhisperFeatureExtractor(feature_size=128, chunk_length=seconds)
    if not omni:
        return Qwen2AudioProcessor(**parts)
    patches = {"patch_size": 14, "merge_size": 2}
    pictures = {"image_processor": Qwen2VLImageProcessorPil(**patches)}
    return Qwen2_5OmniProcessor(
        **parts, **pictures, video_processor=Qwen2VLVideoProcessor(**patches)
    )


def use_random_weights(device: torch.device) -> None:
    """Let the script make random weights, on the device and the same each time, instead of reading
    them: 15 GB need no disk then. Nor does any completion end: the stop token lies behind the
    vocabulary."""
    for kind in (Qwen2AudioForConditionalGeneration, Qwen2_5OmniThinkerForConditionalGeneration):

        def make(folder: str, dtype: torch.dtype, kind=kind, **_) -> tuple:
            torch.manual_seed(0)
            with device:
                model = kind._from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
            return model, {"missing_keys": [], "mismatched_keys": []}

        setattr(script, kind.__name__, SimpleNamespace(from_pretrained=make))
    script.stop_tokens = lambda model, tokenizer: [vocabulary(model)]


def load(flags: script.Args, device: torch.device) -> script.Policy:
    """The models of a run, as the script's own `main` makes them."""
    processor, source = AutoProcessor.from_pretrained(flags.model_id), (flags.model_id, None)
    return script.load_policy(flags, source, processor, 1, device, flags.precision == "bf16")


def vocabulary(model: torch.nn.Module) -> int:
    return model.get_output_embeddings().weight.shape[0]


def count(flags: script.Args, device: torch.device) -> dict[str, int]:
    """Parameters of the language model with its head, of the audio tower with its projection, and
    the trained ones."""
    model = load(flags, device).model
    total = {"language": 0, "audio": 0, "trained": 0}
    for name, parameter in model.named_parameters():
        part = "language" if "language_model" in name or "lm_head" in name else "audio"
        total["trained"] += parameter.numel() * parameter.requires_grad
        if "lora_" not in name and "visual" not in name:
            total[part] += parameter.numel()
    return total


# ----------------------------------------------------------------------------------------- programs


def now(device: torch.device) -> float:
    """Wall clock in seconds, after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Usual:
    """A step in stock transformers, everything repeated for each completion."""

    def __init__(
        self, flags: script.Args, dtype: torch.dtype, device: torch.device, clip: Path
    ) -> None:
        policy = load(flags, device)  # the same weights
        self.model, self.frozen = policy.model, policy.reference
        self.processor = AutoProcessor.from_pretrained(flags.model_id)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=flags.learning_rate, weight_decay=0.0, fused=True
        )
        self.flags, self.dtype, self.device, self.clip = flags, dtype, device, clip
        never = vocabulary(self.model)  # the stop token: no completion can contain it
        # 0: from all tokens.
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        sampling |= {"num_return_sequences": GROUP}
        longest = flags.max_completion_length
        self.sampling = GenerationConfig(
            max_new_tokens=longest, eos_token_id=never, pad_token_id=PAD, **sampling
        )

    def log_probabilities(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Of the completions' tokens [G,C]. Neither stock model can leave out the logits of the
        prompt."""
        longest = self.flags.max_completion_length
        logits = model(**inputs).logits[:, -longest - 1 : -1].float()
        return (
            logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, -longest:, None]).squeeze(-1)
        )

    def step(self) -> float:
        """Seconds of a step."""
        start, longest = now(self.device), self.flags.max_completion_length
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            text = script.build_prompt(self.processor, ROW, self.flags.think_budget)
            wave = script.load_audio(self.clip, self.flags.max_audio_seconds)
            with torch.autocast("cpu", enabled=False):
                inputs = self.processor(
                    text=text, audio=[wave], sampling_rate=script.SAMPLE_RATE, return_tensors="pt"
                ).to(self.device)
            # TRL switches gradient checkpointing off for this: it does without the cache.
            self.model.eval()
            tokens = self.model.generate(**inputs, generation_config=self.sampling)
            self.model.train()
            assert tokens.shape == (GROUP, inputs["input_ids"].shape[1] + longest), (
                "a completion ended early"
            )
            # A trained model never says that token; in a completion it would ask for more sound.
            tokens[:, -longest:] = tokens[:, -longest:].masked_fill(
                tokens[:, -longest:] == AUDIO, PAD
            )
            rows = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            rows |= {
                key: inputs[key].repeat_interleave(GROUP, 0) for key in inputs if "feature" in key
            }
            mask = torch.ones(GROUP, longest, device=self.device)
            with torch.no_grad():
                if self.frozen is None:
                    with self.model.disable_adapter():
                        reference = self.log_probabilities(self.model, rows)
                else:
                    reference = self.log_probabilities(self.frozen, rows)
            logp = self.log_probabilities(self.model, rows)
            advantage = torch.linspace(-1, 1, GROUP, device=self.device)
            beta = torch.full_like(advantage, self.flags.beta0)
            loss = script.grpo_loss(
                logp, logp.detach(), reference, advantage, beta, mask, self.flags.clip_eps
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.flags.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return now(self.device) - start


def run_script(flags: script.Args, take_turns) -> list[dict]:
    """What the script's own main logs for each step; `take_turns` is called in each, outside of
    what it times."""

    def score(completions: list[str], *_) -> Tensor:
        if len(completions) == GROUP:  # a training step, not the evaluation
            take_turns()
        return (
            torch.linspace(0, 1, len(completions))[:, None].expand(-1, len(script.REWARDS)).clone()
        )

    script.score = score  # the reward is not measured, and needs the words of a trained model
    script.main(flags)
    path = Path(flags.output_dir) / flags.run_name / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()][1:]
    assert all(row["completions/mean_length"] == flags.max_completion_length for row in rows), (
        "one ended early"
    )
    return rows


def clear_gpu() -> None:
    """Give back what the program before has left (modules refer to each other in cycles), and count
    the peak anew."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def measure_alone(program: type, arguments: tuple, steps: int) -> tuple[list[float], float]:
    """A program's seconds, and the peak memory in GB, with nothing else on the GPU."""
    clear_gpu()
    running = program(*arguments)
    seconds = [running.step() for _ in range(steps)]
    return seconds, torch.cuda.max_memory_allocated() / 1e9


# --------------------------------------------------------------------------------------------- main


def compare(
    args: Args, folder: Path, prompt_length: int, completion_length: int, mode: str
) -> dict:
    """Medians of one case."""
    device, dtype = (
        torch.device("cuda" if args.gpu else "cpu"),
        torch.bfloat16 if args.gpu else torch.float32,
    )
    processor = AutoProcessor.from_pretrained(folder)
    text = (
        len(
            processor.tokenizer(
                script.build_prompt(processor, ROW, script.Args().think_budget)
            ).input_ids
        )
        - 1
    )
    sound, window = prompt_length - text, processor.feature_extractor.chunk_length
    if not 0 < sound <= 25 * window:
        sys.exit(
            f"error: --lengths {prompt_length},{completion_length}: the prompt is {text} tokens "
            "without sound"
        )
    with tempfile.TemporaryDirectory() as work:
        clip = Path(work) / ROW["audio"]
        noise = np.random.default_rng(0).normal(0, 0.1, sound * SAMPLES_PER_TOKEN)
        soundfile.write(clip, noise.astype(np.float32), script.SAMPLE_RATE)
        data = Path(work) / "train.json"
        # The first is kept for the evaluation, which is not measured.
        data.write_text(json.dumps([ROW, ROW]))
        flags = script.Args(
            output_dir=work,
            run_name="own",
            cpu=not args.gpu,
            precision="bf16" if args.gpu else "fp32",
            model_id=str(folder),
            train_data=str(data),
            max_audio_seconds=window,
            max_completion_length=completion_length,
            prompts_per_update=1,
            group_size=GROUP,
            iterations=args.steps,
            eval_every=10**6,
            save_every=10**6,
            gradient_checkpointing=args.gradient_checkpointing,
            **({} if mode == "lora" else {"lora_rank": 0}),
        )
        parameters, arguments = count(flags, device), (flags, dtype, device, clip)
        peaks = {}
        if args.gpu:
            usual, peaks["usual"] = measure_alone(Usual, arguments, args.steps)
            clear_gpu()
            rows = run_script(flags, lambda: None)
            peaks["script"] = rows[-1]["charts/peak_memory_gb"]
        else:
            usual, program = [], Usual(*arguments)
            rows = run_script(flags, lambda: usual.append(program.step()))
            peaks["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    parts = ("rollout", "update")
    seconds = {part: [row[f"charts/seconds_{part}"] for row in rows] for part in parts}
    seconds["script"] = [sum(step) for step in zip(*seconds.values(), strict=True)]
    seconds["usual"] = usual
    median = {name: statistics.median(steps[WARM_UP:]) for name, steps in seconds.items()}
    case = {
        "prompt": prompt_length,
        "sound": sound,
        "completion": completion_length,
        "group": GROUP,
        "mode": mode,
    }
    case |= {name: median[name] for name in ("usual", "script", *parts)}
    case["usual/script"] = median["usual"] / median["script"]
    return case | {"peak_gb": peaks, "parameters": parameters}


def main(args: Args) -> None:
    if args.gpu and "full" in args.modes:
        sys.exit(
            "error: --modes full: AdamW of 7 billion float32 weights does not fit on a GPU; use "
            "lora"
        )
    if args.gpu and not torch.cuda.is_available():
        sys.exit("error: --gpu: torch finds none")
    for lengths in args.lengths:
        if not re.fullmatch(r"[1-9]\d*,[1-9]\d*", lengths):
            sys.exit(
                f"error: --lengths {lengths}: must be tokens of prompt and completion, such as "
                "850,100"
            )
    if args.steps <= WARM_UP:
        sys.exit(f"error: --steps {args.steps}: the first {WARM_UP} do not count; give more")
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if args.gpu else "cpu")
    where = torch.cuda.get_device_name() if args.gpu else f"CPU, {args.threads} thread"
    about = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    cases = [tuple(map(int, lengths.split(","))) for lengths in args.lengths]
    omni = args.gpu or args.family == "omni"
    seconds = 300 if args.gpu else math.ceil(max(prompt for prompt, _ in cases) / 25)
    name = "Qwen2.5-Omni-7B's thinker" if args.gpu else f"a small {args.family}"
    found = []
    with tempfile.TemporaryDirectory() as folder:
        make_config(args.family, args.gpu, seconds).save_pretrained(folder)
        make_processor(omni, seconds).save_pretrained(folder)
        use_random_weights(device)
        for mode in args.modes:
            for lengths in cases:
                found.append(compare(args, Path(folder), *lengths, mode))
                print(found[-1], flush=True)
    print(f"\n{where}, {name}, {about}, seconds a step, {args.steps - WARM_UP} steps each")
    for case in found:
        shown = (
            f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}"
            for key, value in case.items()
        )
        print("  ".join(shown))
    if args.output:
        facts = {"where": where, "model": name, "versions": about, "cases": found}
        Path(args.output).write_text(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
