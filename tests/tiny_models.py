"""Tiny random checkpoints in the formats the scripts take: made in a second, nothing downloaded,
nothing trained."""

import json
from pathlib import Path

import open_clip
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CLIPTextConfig,
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    GenerationConfig,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
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

from benchmark import mini_world_sd3 as world

# SD3 medium normalises neither queries nor keys; SD3.5 does, and its first blocks have a second
# attention on the image.
SD3_STYLES = {"sd3": {}, "sd3.5": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}}

LM_FAMILIES = ("qwen2", "qwen3", "llama", "mistral")  # of adrpo_grpo_llm.py
# the first tokens; the last two open and close a turn of a chat
PAD, EOS, BOS, UNK, TURN, END = range(6)
MARKS = ("<pad>", "<eos>", "<bos>", "<unk>", "<turn>", "<end>")
WORDS = (
    "user assistant system one two three four five six seven eight nine ten red blue green black "
    "white small big"
)
WORDS += (
    " old new cat dog fox bird fish tree stone river hill road house door sees eats finds likes "
    "keeps makes under"
)
WORDS += " over near behind and or not the a is very a<b &amp; ( ) . , ? !"
CHAT = "{% for m in messages %}<turn> {{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
CHAT += "{% if add_generation_prompt %}<turn> assistant {% endif %}"

AUDIO_FAMILIES = ("qwen2-audio", "omni")  # of adrpo_audio_mmau.py
AUDIO_MARKS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|AUDIO|> <|audio_bos|> <|audio_eos|> <|IMAGE|> "
    "<|vision_bos|>"
)
AUDIO_MARKS = (*AUDIO_MARKS.split(), "<|vision_eos|>", "<|VIDEO|>")  # their ids are 0 to 9
AUDIO_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
AUDIO_TEXT = (
    "Think first, in fewer than 50 words, inside <think> </think>. Give the option you choose "
    "inside <answer> "
)
AUDIO_TEXT += (
    "</answer>. Choose one of the following options: Man, Woman, Child, Robot because first pitch"
)
AUDIO_CHAT = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}\
{% if c['type'] == 'audio' %}\
<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}\
<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make_sd3(folder: Path, style: str = "sd3", layers: int = 2) -> Path:
    """A random StableDiffusion3Pipeline for 32x32 images, every weight non-zero, scale and shift of
    the latents too."""
    torch.manual_seed(0)
    pipe = world.build_pipeline()
    pipe.register_modules(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=8,
            out_channels=8,
            num_layers=layers,
            num_attention_heads=2,
            attention_head_dim=16,
            caption_projection_dim=32,
            joint_attention_dim=128,
            pooled_projection_dim=128,
            pos_embed_max_size=8,
            **SD3_STYLES[style],
        )
    )
    pipe.vae.register_to_config(scaling_factor=1.5, shift_factor=0.1)
    pipe.save_pretrained(folder)
    return folder


FLOW_FAMILIES = ("flux", "chroma", "auraflow", "lumina2", "sana", "qwen-image")  # beside SD3
OTHER_QUESTIONS = ("cogview4", "hidream", "z-image")  # what asks its transformer in another way


def make_flow(folder: Path, family: str) -> Path:
    """A random text-to-image pipeline of another flow-matching family, for 32x32 images."""
    torch.manual_seed(0)
    parts = world.build_pipeline()
    parts.vae.register_to_config(scaling_factor=1.5, shift_factor=0.1)
    t5, t5_tokenizer, channels = parts.text_encoder_3, parts.tokenizer_3, 8
    shared = {"scheduler": parts.scheduler, "vae": parts.vae}
    heads = {"num_attention_heads": 2, "attention_head_dim": 16}
    if family in ("flux", "chroma"):
        sizes = {"patch_size": 1, "in_channels": 4 * channels, "num_layers": 1, **heads}
        sizes |= {"num_single_layers": 1, "joint_attention_dim": 128, "axes_dims_rope": (4, 4, 8)}
    if family == "flux":
        text = CLIPTextModel(CLIPTextConfig(**parts.text_encoder.config.to_dict()))
        pipe = FluxPipeline(
            transformer=FluxTransformer2DModel(
                **sizes, pooled_projection_dim=64, guidance_embeds=True
            ),
            text_encoder=text,
            tokenizer=parts.tokenizer,
            text_encoder_2=t5,
            tokenizer_2=t5_tokenizer,
            **shared,
        )
    elif family == "chroma":
        approximator = {"approximator_hidden_dim": 32, "approximator_layers": 1}
        transformer = ChromaTransformer2DModel(
            **sizes, **approximator, approximator_num_channels=16
        )
        pipe = ChromaPipeline(
            transformer=transformer, text_encoder=t5, tokenizer=t5_tokenizer, **shared
        )
    elif family == "auraflow":
        transformer = AuraFlowTransformer2DModel(
            **heads,
            sample_size=8,
            patch_size=2,
            in_channels=channels,
            out_channels=channels,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            joint_attention_dim=128,
            caption_projection_dim=32,
            pos_embed_max_size=64,
        )
        pipe = AuraFlowPipeline(
            transformer=transformer, text_encoder=t5, tokenizer=t5_tokenizer, **shared
        )
    elif family != "qwen-image":  # a small Gemma reads the prompts
        make_tokenizer(folder / "words", chat=False)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "words", padding_side="right")
        gemma = Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
        text = {"text_encoder": Gemma2Model(gemma), "tokenizer": tokenizer}
    if family == "lumina2":
        transformer = Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=channels,
            hidden_size=32,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(300, 64, 64),
            cap_feat_dim=32,
        )
        pipe = Lumina2Pipeline(transformer=transformer, **text, **shared)
    elif family == "sana":
        blocks = ("ResBlock", "EfficientViTBlock")
        vae = AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        )
        transformer = SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=32,
            sample_size=16,
        )
        pipe = SanaPipeline(transformer=transformer, vae=vae, scheduler=parts.scheduler, **text)
    elif family == "qwen-image":
        make_tokenizer(folder / "words", chat=False)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "words", padding_side="right")
        # Of the template's tokens the pipeline drops 34: marks are tokens of their own here.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
        sizes |= {"intermediate_size": 48, "num_key_value_heads": 2, "rope_parameters": rope}
        vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
        vision |= {"out_hidden_size": 32, "fullatt_block_indexes": [0]}
        text = {"vocab_size": len(tokenizer), "bos_token_id": BOS, "eos_token_id": EOS, **sizes}
        vae = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1] * 4,
            latents_std=[1.5] * 4,
        )
        pipe = QwenImagePipeline(
            scheduler=parts.scheduler,
            vae=vae,
            text_encoder=Qwen2_5_VLForConditionalGeneration(
                Qwen2_5_VLConfig(text_config=text, vision_config=vision)
            ),
            tokenizer=tokenizer,
            transformer=QwenImageTransformer2DModel(
                **heads,
                patch_size=2,
                in_channels=16,
                out_channels=4,
                num_layers=1,
                joint_attention_dim=32,
                axes_dims_rope=(4, 6, 6),
            ),
        )
    pipe.save_pretrained(folder)
    return folder


def make_other_question(folder: Path, family: str) -> Path:
    """A random pipeline that is flow matching but asks its transformer in another way."""
    torch.manual_seed(0)
    parts = world.build_pipeline()
    make_tokenizer(folder / "words", adds_bos=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "words")
    shared = {"scheduler": parts.scheduler, "vae": parts.vae}
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    if family == "cogview4":
        transformer = CogView4Transformer2DModel(
            in_channels=8,
            out_channels=8,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=32,
            time_embed_dim=16,
            condition_dim=8,
            rope_axes_dim=(8, 8),
        )
        glm = GlmModel(GlmConfig(**sizes, head_dim=8, pad_token_id=PAD))
        text = {"text_encoder": glm, "tokenizer": tokenizer}
        # As its own: sigmas are shifted, the times that its transformer is told are not.
        options = {"use_dynamic_shifting": True, "time_shift_type": "linear", "max_shift": 0.75}
        shared["scheduler"] = FlowMatchEulerDiscreteScheduler(base_shift=0.25, **options)
        pipe = CogView4Pipeline(transformer=transformer, **text, **shared)
    elif family == "hidream":
        transformer = HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=8,
            out_channels=8,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[128, 32],
            text_emb_dim=128,
            axes_dims_rope=(4, 6, 6),
            max_resolution=(16, 16),
            llama_layers=[0, 1],
        )
        names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3")
        text = {name: getattr(parts, name) for name in (*names, "tokenizer_3")}
        llama = LlamaForCausalLM(LlamaConfig(**sizes))
        text |= {"text_encoder_4": llama, "tokenizer_4": tokenizer}
        pipe = HiDreamImagePipeline(transformer=transformer, **text, **shared)
    else:
        transformer = ZImageTransformer2DModel(
            in_channels=8,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
            axes_lens=[64, 64, 64],
        )
        text = {"text_encoder": LlamaForCausalLM(LlamaConfig(**sizes)).model}
        pipe = ZImagePipeline(transformer=transformer, tokenizer=tokenizer, **text, **shared)
    pipe.save_pretrained(folder)
    return folder


def make_clip(folder: Path, embed_dim: int = 64) -> Path:
    """A random open_clip model with its tokenizer, for `local-dir:FOLDER`."""
    torch.manual_seed(1)
    tokenizer = world.build_clip_tokenizer()
    config = world.clip_config(tokenizer)
    config["model_cfg"]["embed_dim"] = embed_dim
    folder.mkdir(parents=True)
    save_file(
        open_clip.CLIP(**config["model_cfg"]).state_dict(), folder / "open_clip_model.safetensors"
    )
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    return folder


def load_sd3(folder: Path) -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_tokenizer(
    folder: Path, chat=True, bos=False, adds_bos=False, pad=True, ends=False
) -> None:
    """One token a word, into `folder`. bos: the chat template begins with <bos>; adds_bos: so does
    every text; ends: the chat template ends with <eos>."""
    vocabulary = {token: number for number, token in enumerate((*MARKS, *WORDS.split()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=MARKS[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    special = {
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "additional_special_tokens": ["<turn>", "<end>"],
    }
    special |= {"pad_token": "<pad>"} if pad else {}
    special |= {"bos_token": "<bos>"} if bos else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    if chat:
        fast.chat_template = ("{{ bos_token }}" if bos else "") + CHAT + ("<eos>" if ends else "")
    fast.save_pretrained(folder)


def lm_config(family: str, **changes):
    """Two layers of four heads, large random weights: distributions that are not flat."""
    options = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    options |= {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    }
    options |= {
        "vocab_size": len(MARKS) + len(WORDS.split()),
        "tie_word_embeddings": family.startswith("qwen"),
    }
    options |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    return AutoConfig.for_model(family, **options | changes)


def make_lm(folder: Path, family: str = "qwen3", chat: bool = True, **changes) -> Path:
    """A random language model with its tokenizer; <eos> and <end> are its stop tokens, and likely.
    (For text not qwen2: transformers reads its tokenizers as byte-level ones, whatever is in the
    folder.)"""
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(lm_config(family, **changes))
    with torch.no_grad():
        model.get_output_embeddings().weight[[EOS, END]] *= 1.7
    model.generation_config = GenerationConfig(eos_token_id=[EOS, END], pad_token_id=PAD)
    model.save_pretrained(folder)
    make_tokenizer(folder, chat)
    return folder


def make_reward_lm(folder: Path, num_labels: int = 1, context: int = 128, **tokenizer) -> Path:
    """A random sequence classifier with a tokenizer of its own, which writes one <bos> in front."""
    torch.manual_seed(3)
    config = lm_config("llama", num_labels=num_labels, max_position_embeddings=context)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    make_tokenizer(folder, **{"bos": True, "adds_bos": True} | tokenizer)
    return folder


def make_audio_tokenizer(**options) -> PreTrainedTokenizerFast:
    """Byte-level pairs learnt from AUDIO_TEXT, the placeholders of both families, and the tags as
    one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    sizes = {"vocab_size": 420, "initial_alphabet": alphabet, "special_tokens": list(AUDIO_MARKS)}
    tokenizer.train_from_iterator(
        [AUDIO_TEXT] * 8, trainers.BpeTrainer(show_progress=False, **sizes)
    )
    tokenizer.add_tokens(list(AUDIO_TAGS))
    special = {"eos_token": AUDIO_MARKS[2], "pad_token": AUDIO_MARKS[0], "padding_side": "left"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **options)
    fast.chat_template = AUDIO_CHAT
    return fast


def make_audio_lm(folder: Path, family: str, seconds: int = 4, says: str = "", **text) -> Path:
    """A random Qwen2-Audio, or thinker of Qwen2.5-Omni, that hears clips of at most `seconds`, with
    its processor. <|im_end|> is likely. says: a text without a token twice, which it mostly says;
    what it hears changes little."""
    torch.manual_seed(5)
    names = ("image", "audio", "video", "vision_bos", "vision_eos", "audio_bos", "audio_eos")
    named = {f"{name}_token": f"<|{name if '_' in name else name.upper()}|>" for name in names}
    tokenizer = make_audio_tokenizer(
        **({"extra_special_tokens": named} if family == "omni" else {})
    )
    parts = {"tokenizer": tokenizer, "chat_template": AUDIO_CHAT}
    parts["feature_extractor"] = WhisperFeatureExtractor(feature_size=32, chunk_length=seconds)
    ids = dict(zip(AUDIO_MARKS, range(10), strict=True))
    options = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    options |= {
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "vocab_size": len(tokenizer),
    }
    options |= {"pad_token_id": 0, "eos_token_id": 2} | text
    sound = {
        "num_mel_bins": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
    }
    sound |= {"d_model": 32, "max_source_positions": 50 * seconds}
    index = {"audio_token_index": ids["<|AUDIO|>"], "pad_token_id": 0}
    if family == "omni":
        patches = {"patch_size": 14, "merge_size": 2}
        parts |= {"image_processor": Qwen2VLImageProcessorPil(**patches)}
        processor = Qwen2_5OmniProcessor(**parts, video_processor=Qwen2VLVideoProcessor(**patches))
        index |= {
            "image_token_index": ids["<|IMAGE|>"],
            "video_token_index": ids["<|VIDEO|>"],
            "user_token_id": 5,
        }
        index |= {"audio_start_token_id": 4, "audio_end_token_id": 5, "vision_start_token_id": 7}
        vision = {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 32,
        }
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        config = Qwen2_5OmniThinkerConfig(
            audio_config={"n_window": 100, "output_dim": 32, **sound},
            vision_config={"fullatt_block_indexes": [0], **vision},
            text_config={"rope_parameters": rope, **options},
            **index,
            vision_end_token_id=8,
            eos_token_id=2,
        )
        model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    else:
        processor = Qwen2AudioProcessor(**parts)
        audio, language = (
            {"model_type": "qwen2_audio_encoder", **sound},
            {"model_type": "qwen2", **options},
        )
        model = Qwen2AudioForConditionalGeneration(
            Qwen2AudioConfig(audio_config=audio, text_config=language, **index)
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
        words, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        words *= 5  # as large as the sound's
        head[2] *= 1.5
        if says:
            chain = [tokenizer("\n").input_ids[-1], *tokenizer(says).input_ids, 2]
            for layer in model.model.language_model.layers:
                layer.self_attn.o_proj.weight *= 0.1
                layer.mlp.down_proj.weight *= 0.1
            words[chain] = 0
            for place, (token, following) in enumerate(zip(chain, chain[1:], strict=False)):
                words[token, place], head[following, place] = 1, 2
        else:
            head *= 2
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
