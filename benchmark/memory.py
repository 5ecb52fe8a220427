"""What a step at full size holds in memory, by part, counted with fake tensors: nothing is computed
and nothing is allocated, so it runs on any machine.

    python benchmark/memory.py sd3 --output benchmark/results/memory_sd3
    python benchmark/memory.py llm --output benchmark/results/memory_llm
    python benchmark/memory.py audio --output benchmark/results/memory_audio
    python benchmark/memory.py check    # the same count beside a real peak, on the CPU, small

Each part is the scripts' own work with their defaults: the storages that live at once between two
operations, as torch would hold them (its own workspaces and the allocator's fragments not counted:
add 1 to 2 GB on a GPU). Random weights of the published shapes; 1 GB is 1e9 bytes.
"""

import contextlib
import dataclasses
import json
import os
import platform
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import open_clip
import peft.tuners.tuners_utils
import torch
import transformers
import tyro
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import adrpo_fm_sd3 as sd3
import adrpo_grpo_llm as llm

GB = 1e9
CARDS = (16, 24, 40, 48, 80)
RESERVE = 1.5  # GB of a card that the count does not see
BF16 = torch.bfloat16
SD3_MEDIUM = {"sample_size": 128, "num_layers": 24, "num_attention_heads": 24}
SD3_MEDIUM |= {"attention_head_dim": 64, "joint_attention_dim": 4096, "in_channels": 16}
SD3_MEDIUM |= {"caption_projection_dim": 1536, "pooled_projection_dim": 2048}
SD3_MEDIUM |= {"patch_size": 2, "out_channels": 16, "pos_embed_max_size": 192}
FLUX_DEV = {"patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38}
FLUX_DEV |= {"attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096}
FLUX_DEV |= {"pooled_projection_dim": 768, "guidance_embeds": True}
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "use_quant_conv": False}
VAE |= {"up_block_types": ("UpDecoderBlock2D",) * 4, "use_post_quant_conv": False}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768}
CLIP_L |= {"num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280}
CLIP_G |= {"num_hidden_layers": 32, "num_attention_heads": 20}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
T5_XXL |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
QWEN2_05B = {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864}
QWEN2_05B |= {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
QWEN2_05B |= {"tie_word_embeddings": True, "pad_token_id": 0, "max_position_embeddings": 32768}
# RM-Gemma-2B, the text script's default reward model
GEMMA_2B = {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18}
GEMMA_2B |= {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256}
GEMMA_2B |= {"vocab_size": 256000, "num_labels": 1, "pad_token_id": 0}
# The language models of Qwen2.5-Omni's thinkers (7B: transformers' defaults) and Qwen2-Audio
OMNI_3B = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36}
OMNI_3B |= {"num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936}
QWEN2_AUDIO = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
QWEN2_AUDIO |= {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 156032}
OMNI_VISION = {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16}
CLIP_FRAMES = 3000  # of 30 s, which become 750 tokens
QUESTION = 850  # tokens of a question with such a clip
AUDIO_PASSES = ((1024, False), (4096, False), (4096, True))  # and with checkpointing


class Live(TorchDispatchMode):
    """Bytes of the storages made inside that are alive, and the most there were at once. A program
    that asks a fake tensor for its value, which it has not, is told True, or `number`: `generate`
    then finds so many tokens in its cache, and ends after one more, whose step is every step's."""

    def __init__(self, number: int = 1) -> None:
        super().__init__()
        self.number = number
        self.now = self.peak = 0
        self.known = set()

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def ignore(self, *modules: nn.Module) -> None:
        """Weights made before: they are counted by themselves."""
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self.known.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and is_fake(args[0]):
            return args[0].dtype == torch.bool or self.number
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known:
                    self.known.add(key)
                    self.now += size
                    weakref.finalize(storage, self.forget, key, size)
        self.peak = max(self.peak, self.now)
        return out


def peak_of(modules: list[nn.Module], call: Callable, *args, number=1, **options) -> float:
    """GB that a call holds at most beside the weights of these modules."""
    live = Live(number)
    live.ignore(*modules)
    with live:
        call(*args, **options)
    return live.peak / GB


def weights_of(*modules: nn.Module) -> float:
    """GB of weights and buffers; a tied one counts once."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values()) / GB


@contextlib.contextmanager
def fake_models() -> Iterator[None]:
    """Fake tensors, and a `.to` that lets modules be: they are made as they shall be."""
    move = "_move_adapter_to_device_of_base_layer"
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(nn.Module, "to", lambda module, *_, **__: module),
        mock.patch.object(peft.tuners.tuners_utils.BaseTunerLayer, move, lambda *_, **__: None),
    ):
        yield


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def lora_of(transformer: nn.Module, args: sd3.Args) -> list[nn.Parameter]:
    """The script's LoRA, in float32."""
    transformer.requires_grad_(False)
    with default_dtype(torch.float32):
        sd3.add_lora(transformer, args)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def question(name: str, rows: int, pixels: int) -> dict:
    """What the pipeline asks its transformer, for so many images."""
    if name == "SD3 medium":
        return {
            "hidden_states": torch.empty(rows, 16, pixels // 8, pixels // 8, dtype=BF16),
            "encoder_hidden_states": torch.empty(rows, 77 + 256, 4096, dtype=BF16),
            "pooled_projections": torch.empty(rows, 2048, dtype=BF16),
            "timestep": torch.empty(rows, dtype=BF16),
        }
    tokens = (pixels // 16) ** 2
    return {
        "hidden_states": torch.empty(rows, tokens, 64, dtype=BF16),
        "encoder_hidden_states": torch.empty(rows, 512, 4096, dtype=BF16),
        "pooled_projections": torch.empty(rows, 768, dtype=BF16),
        "timestep": torch.empty(rows, dtype=BF16),
        "guidance": torch.empty(rows, dtype=BF16),
        "img_ids": torch.zeros(tokens, 3, dtype=BF16),
        "txt_ids": torch.zeros(512, 3, dtype=BF16),
    }


def train_step(transformer: nn.Module, asked: dict) -> None:
    """One part of an update: reference, policy, backward pass."""
    transformer.disable_adapters()
    with torch.no_grad():
        v_ref = transformer(**asked, return_dict=False)[0].float()
    transformer.enable_adapters()
    v = transformer(**asked, return_dict=False)[0].float()
    (v - v_ref).square().mean().backward()


def image_rows(name: str, args: sd3.Args) -> list[dict]:
    """A row for each resolution, with and without checkpointing, for one model."""
    kind, sizes = SD3Transformer2DModel, SD3_MEDIUM
    if name != "SD3 medium":
        kind, sizes = FluxTransformer2DModel, FLUX_DEV
    rows = []
    for pixels in (512, 1024):
        for checkpointing in (False, True):
            with fake_models():
                with default_dtype(BF16):
                    transformer = kind(**sizes)
                    clips = [CLIP_L, CLIP_G] if name == "SD3 medium" else [CLIP_L]
                    encoders = [CLIPTextModelWithProjection(CLIPTextConfig(**c)) for c in clips]
                    t5 = T5EncoderModel(T5Config(**T5_XXL))
                base = weights_of(transformer)
                lora = lora_of(transformer, args)
                trained = sum(parameter.numel() for parameter in lora) * 4 / GB
                vae = AutoencoderKL(**VAE)
                clip = open_clip.create_model(args.clip_model)
                if checkpointing:
                    transformer.enable_gradient_checkpointing()
                # SD3 is guided by a second row for the empty prompt, FLUX is told its guidance.
                sampled = args.rollout_batch * (2 if name == "SD3 medium" else 1)
                asked = question(name, sampled, pixels)
                with torch.no_grad():
                    rollout = peak_of([transformer], transformer, **asked)
                    latents = torch.empty(args.rollout_batch, 16, pixels // 8, pixels // 8)
                    decoding = peak_of([vae], vae.decode, latents)
                    pictures = torch.empty(args.rollout_batch, 3, 224, 224)
                    scoring = peak_of([clip], clip.encode_image, pictures)
                    tokens = torch.zeros(1, 256, dtype=torch.long)
                    encoding = peak_of([t5], t5, tokens)
                asked = question(name, args.train_batch, pixels)
                training = peak_of([transformer], train_step, transformer, asked)
                held = base + 3 * trained + weights_of(vae, clip)  # LoRA and two of the optimiser
                row = {"model": name, "pixels": pixels, "checkpointing": checkpointing}
                row |= {"transformer": base, "LoRA": trained, "optimiser": 2 * trained}
                row |= {"autoencoder": weights_of(vae), "CLIP": weights_of(clip)}
                row["text encoders"] = weights_of(t5, *encoders)
                phases = {"encoding": row["text encoders"] + encoding + weights_of(clip)}
                phases |= {"rollout": held + rollout, "decoding": held + decoding}
                phases |= {"scoring": held + scoring, "training": held + training}
                rows.append(row | {f"while {phase}": value for phase, value in phases.items()})
    return rows


class Whole:
    """In place of a mask: every completion has its full length. (Fake tensors have no values.)"""

    def __init__(self, columns: int):
        self.columns = columns

    def __getitem__(self, _):
        return self

    def sum(self, _):
        return self

    def max(self) -> int:
        return self.columns


def text_step(script, policy: NamedTuple, batch: NamedTuple, args) -> None:
    """One update: the policy with its loss, backward passes. (The reference's pass keeps nothing
    for a backward pass: it is smaller.)"""
    ref_logp = torch.empty(batch.tokens.shape)
    advantage = torch.empty(len(batch.tokens))
    mask = torch.ones(batch.tokens.shape)
    for at, logp, _ in script.completion_passes(policy, policy.model, batch, args):
        inputs = logp, logp.detach(), ref_logp[at], advantage[at], advantage[at], mask[at]
        script.grpo_loss(*inputs, args.clip_eps).backward()


def build_qwen2(dtype: torch.dtype) -> nn.Module:
    with default_dtype(dtype):
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**QWEN2_05B)).eval()


def score_texts(model: nn.Module, rows: int, tokens: int) -> None:
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    model(input_ids=ids, attention_mask=torch.ones_like(ids))


def text_rows() -> list[dict]:
    """Qwen2-0.5B in bfloat16 with the default reward model, all weights and a LoRA, by
    --train-tokens."""
    rows = []
    for lora in (False, True):
        with fake_models():
            model = build_qwen2(BF16 if lora else torch.float32)
            base = weights_of(model)
            # Beside all weights: the frozen reference, and the copy that is rolled out.
            reference = None if lora else build_qwen2(torch.float32)
            sampler = model if lora else build_qwen2(BF16)
            copies = 0.0 if lora else weights_of(reference, sampler)
            with default_dtype(BF16):
                reward_model = transformers.GemmaForSequenceClassification(
                    transformers.GemmaConfig(**GEMMA_2B)
                ).eval()
            if lora:
                model.requires_grad_(False)
                options = {"lora_alpha": 32, "target_modules": "all-linear"}
                options["task_type"] = "CAUSAL_LM"
                model = llm.get_peft_model(model, llm.LoraConfig(r=16, **options)).eval()
                sampler = model
            networks = [net for net in (model, reference, sampler, reward_model) if net is not None]
            size = sum(p.numel() for p in model.parameters() if p.requires_grad)
            args = llm.Args()
            lengths = args.max_prompt_length, args.max_completion_length
            unreadable = torch.zeros(QWEN2_05B["vocab_size"], dtype=torch.bool)
            choice = [0], unreadable, 0, 1.0, [], {}, True, lengths  # a static cache, as on a GPU
            policy = llm.Policy(model, sampler, reference, *choice)
            held = weights_of(*networks) + size * 8 / GB  # and two moments
            gradients = size * 4 / GB  # stay until the next update; training makes them itself
            prompts = [[1] * lengths[0]] * (args.rollout_batch // args.group_size)
            uniforms = torch.empty(len(prompts), args.group_size, lengths[1])
            wanted = policy, prompts, uniforms, args
            rolling = peak_of(networks, llm.rollout, *wanted, number=lengths[0] - 1)
            cache = sum(
                weight.untyped_storage().nbytes()  # kept from iteration to iteration
                for static in policy.static.values()
                for layer in static.layers
                for weight in (layer.keys, layer.values)
            )
            with torch.no_grad():
                texts = reward_model, args.reward_batch, sum(lengths)
                scoring = peak_of(networks, score_texts, *texts)
            for train_tokens in (256, 512, 1024, 2048, 4096):
                args = llm.Args(train_tokens=train_tokens)
                model.zero_grad()
                # Two rounds of prompts: in the second the gradients are there from the beginning.
                count, group = 2 * max(1, train_tokens // lengths[0]), args.group_size
                ids = torch.zeros(count, lengths[0], dtype=torch.long)
                tokens = torch.zeros(count * group, lengths[1], dtype=torch.long)
                batch = llm.Batch(ids, torch.ones_like(ids), tokens, Whole(lengths[1]))
                training = peak_of(networks, text_step, llm, policy, batch, args)
                row = {"trained": "LoRA, rank 16" if lora else "all weights"}
                row |= {"--train-tokens": train_tokens, "weights": base, "copies": copies}
                row |= {"optimiser": size * 8 / GB, "reward model": weights_of(reward_model)}
                row |= {"while rolling out": held + gradients + rolling}
                row |= {"while scoring": held + gradients + cache / GB + scoring}
                rows.append(row | {"while training": held + cache / GB + training})
    return rows


def build_audio(name: str) -> nn.Module:
    """A thinker of Qwen2.5-Omni, with the tower for pictures that it is loaded with, or
    Qwen2-Audio; in bfloat16."""
    with default_dtype(BF16):
        if name == "Qwen2-Audio-7B":
            text = {"model_type": "qwen2", "tie_word_embeddings": False, **QWEN2_AUDIO}
            config = transformers.Qwen2AudioConfig(text_config=text)
            return transformers.Qwen2AudioForConditionalGeneration(config).eval()
        text = OMNI_3B if "3B" in name else {}
        width = text.get("hidden_size", 3584)
        parts = {"text_config": text, "audio_config": {"output_dim": width}}
        parts["vision_config"] = OMNI_VISION | {"out_hidden_size": width}
        config = transformers.Qwen2_5OmniThinkerConfig(**parts)
        return transformers.Qwen2_5OmniThinkerForConditionalGeneration(config).eval()


def audio_rows() -> list[dict]:
    """The audio models in bfloat16 with the script's LoRA, by --train-tokens. A question is read as
    text of the same length; what the frozen audio tower makes of the clips on the way is counted by
    itself (it keeps nothing for a backward pass)."""
    import adrpo_audio_mmau as audio

    rows = []
    for name in ("Qwen2.5-Omni-7B", "Qwen2.5-Omni-3B", "Qwen2-Audio-7B"):
        args = audio.Args()
        lengths = QUESTION, args.max_completion_length
        with fake_models():
            model = build_audio(name).requires_grad_(False)
            base = weights_of(model)
            vocabulary = model.get_output_embeddings().weight.shape[0]
            targets = rf".*language_model\.layers\.\d+\..*\.({audio.PROJECTIONS})"
            options = {"lora_alpha": args.lora_alpha, "target_modules": targets}
            model = audio.get_peft_model(model, audio.LoraConfig(r=args.lora_rank, **options))
            model.eval()
            size = sum(p.numel() for p in model.parameters() if p.requires_grad)
            with default_dtype(BF16):
                kind = transformers.models.qwen2_audio.modeling_qwen2_audio.Qwen2AudioEncoder
                tower = kind(transformers.Qwen2AudioConfig().audio_config).eval()
            choice = [0], torch.zeros(vocabulary, dtype=torch.bool), 0, 1.0, [], {}, True, lengths
            policy = audio.Policy(model, model, None, *choice)
            held = weights_of(model) + size * 8 / GB
            questions = args.rollout_batch // args.group_size
            ids = torch.zeros(questions, QUESTION, dtype=torch.long)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            uniforms = torch.empty(questions, args.group_size, lengths[1])
            wanted = policy, inputs, uniforms, questions
            rolling = peak_of([model], audio.rollout, *wanted, number=QUESTION - 1)
            with torch.no_grad():
                clips = torch.empty(questions, 128, CLIP_FRAMES, dtype=BF16)
                hearing = peak_of([tower], tower, clips)
            layers = [layer for cache in policy.static.values() for layer in cache.layers]
            cache = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in layers)
            for train_tokens, checkpointing in AUDIO_PASSES:
                options = {"train_tokens": train_tokens, "gradient_checkpointing": checkpointing}
                args = audio.Args(**options)
                if checkpointing:
                    decoder, options = audio.language_model(model), {"use_reentrant": False}
                    decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
                    model.enable_input_require_grads()
                model.zero_grad()
                ids = torch.zeros(max(1, train_tokens // QUESTION), QUESTION, dtype=torch.long)
                tokens = torch.zeros(len(ids) * args.group_size, lengths[1], dtype=torch.long)
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                batch = audio.Batch(inputs, tokens, Whole(lengths[1]))
                training = peak_of([model], text_step, audio, policy, batch, args)
                row = {"model": name, "--train-tokens": train_tokens}
                row |= {"checkpointing": checkpointing, "weights": base, "LoRA": size * 4 / GB}
                row |= {"optimiser": size * 8 / GB, "cache": cache / GB}
                row |= {"while hearing": held + cache / GB + hearing}
                row |= {"while rolling out": held + size * 4 / GB + rolling}
                rows.append(row | {"while training": held + cache / GB + training})
    return rows


def small_transformer() -> nn.Module:
    sizes = SD3_MEDIUM | {"num_layers": 3, "num_attention_heads": 8, "caption_projection_dim": 512}
    sizes |= {"joint_attention_dim": 256, "pooled_projection_dim": 64, "sample_size": 64}
    return SD3Transformer2DModel(**sizes)


def small_step(transformer: nn.Module, side: int = 64) -> None:
    asked = {"hidden_states": torch.zeros(4, 16, side, side), "timestep": torch.zeros(4)}
    asked |= {"encoder_hidden_states": torch.zeros(4, 333, 256)}
    asked |= {"pooled_projections": torch.zeros(4, 64)}
    transformer(**asked, return_dict=False)[0].square().mean().backward()


def resident_peak() -> float:
    """GB: the most this process has held since the mark was set back (Linux)."""
    (line,) = [
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    ]
    return int(line.split()[1]) * 1024 / GB


def real_peak() -> float:
    """GB that the small step adds to this process's peak; for a process of its own."""
    transformer = small_transformer()
    small_step(transformer, side=8)  # what is loaded at the first use is not the step's
    transformer.zero_grad()
    Path("/proc/self/clear_refs").write_text("5")  # else it has its parent's peak
    before = resident_peak()
    small_step(transformer)
    return resident_peak() - before


def measured_peak() -> float:
    """`real_peak` of a new process, whose allocator gives every large block back when it is freed
    (glibc keeps them, 10 to 15 % of this step)."""
    keep = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command, options = [sys.executable, __file__, "real"], {"capture_output": True, "text": True}
    return float(subprocess.run(command, check=True, env=os.environ | keep, **options).stdout)


def counted_peak() -> float:
    """The same, counted."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        transformer = small_transformer()
        return peak_of([transformer], small_step, transformer)


def fits(row: dict) -> str:
    """The smallest card that holds the largest phase."""
    largest = max(value for name, value in row.items() if name.startswith("while"))
    return next((f"{card} GB" for card in CARDS if largest + RESERVE <= card), "none of these")


@dataclasses.dataclass
class Args:
    what: tyro.conf.Positional[Literal["sd3", "llm", "audio", "check", "real"]]
    """whose step; check: the count beside a real peak (real: that peak alone)"""
    output: str | None = None
    """the table as OUTPUT.md and OUTPUT.json"""


def main(args: Args) -> None:
    if args.what == "real":
        print(real_peak())
        return
    if args.what == "check":
        real = measured_peak()
        print(f"counted {counted_peak():.3f} GB, real {real:.3f} GB")
        return
    if args.what == "sd3":
        flags = sd3.Args()
        rows = [row for name in ("SD3 medium", "FLUX.1-dev") for row in image_rows(name, flags)]
    else:
        rows = text_rows() if args.what == "llm" else audio_rows()
    rows = [row | {"fits": fits(row)} for row in rows]
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        cells = [
            f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()
        ]
        lines.append("| " + " | ".join(cells) + " |")
    print("\n".join(lines))
    if args.output:
        git = f'git -C "{Path(__file__).resolve().parent}" rev-parse --short HEAD'
        commit = subprocess.getoutput(git)
        versions = f"commit {commit}, torch {torch.__version__}, {platform.machine()}"
        note = f"GB of 1e9 bytes, counted with fake tensors ({versions}); nothing was run."
        command = f"`python benchmark/memory.py {args.what}`: {note}"
        Path(f"{args.output}.md").write_text("\n".join([command, "", *lines, ""]))
        Path(f"{args.output}.json").write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.partition("\n\n")[0]))
