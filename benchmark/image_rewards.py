"""The metrics of the paper's Table 1 that are no CLIP score, as reward plug-ins.

    python adrpo_fm_sd3.py --reward benchmark/image_rewards.py:pickscore
    python adrpo_fm_sd3.py --eval-metrics benchmark/image_rewards.py:aesthetic

Each is a function (images [B,3,H,W] in [0,1], prompts, metadata) -> float32 [B]; its model is
loaded at the first call, on the images' device, and refused where its files lack weights. Other
models than the defaults are named by environment variables, NAME[@REVISION] or a folder:

    PICKSCORE_MODEL      yuvalkirstain/PickScore_v1
    PICKSCORE_PROCESSOR  laion/CLIP-ViT-H-14-laion2B-s32B-b79K  its tokenizer and image processor
    BLIP_MODEL           Salesforce/blip-itm-large-coco         not the one of the paper's column
    IMAGEREWARD_MODEL    RE-N-Y/ImageReward                     needs: pip install imscore timm
    AESTHETIC_WEIGHTS    LAION's sac+logos+ava1-l14-linearMSE.pth; default: a checked download
    AESTHETIC_CLIP       ViT-L-14:openai                        open_clip architecture:weights
"""

import functools
import hashlib
import os
import socket
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

DEFAULTS = {
    "PICKSCORE_MODEL": "yuvalkirstain/PickScore_v1",
    "PICKSCORE_PROCESSOR": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "BLIP_MODEL": "Salesforce/blip-itm-large-coco",
    "IMAGEREWARD_MODEL": "RE-N-Y/ImageReward",
    "AESTHETIC_CLIP": "ViT-L-14:openai",
}
AESTHETIC_URL = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
AESTHETIC_NAME = "sac+logos+ava1-l14-linearMSE.pth"
AESTHETIC_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"


SOURCES = {}  # what was loaded, with its commit: adrpo_fm_sd3.py records it in args.json


def setting(variable: str) -> tuple[str, str | None]:
    """Name and revision of the model that an environment variable, or its default, names."""
    name, _, revision = os.environ.get(variable, DEFAULTS[variable]).partition("@")
    return name, revision or None


def load_verified(kind: type, variable: str, device: torch.device) -> nn.Module:
    """A transformers model in float32. Raises ValueError where its files lack weights of it."""
    name, revision = setting(variable)
    model, report = kind.from_pretrained(name, revision=revision, output_loading_info=True)
    SOURCES[variable] = f"{name}@{getattr(model.config, '_commit_hash', None) or 'folder'}"
    missing = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if missing:
        lost = f"{len(missing)} weights are not in its files, such as {missing[0]}"
        raise ValueError(f"{variable}={name}: {lost}")
    return model.float().to(device).eval().requires_grad_(False)


def resize(images: Tensor, size: int, mean: list[float], std: list[float]) -> Tensor:
    """CLIP's processor on tensors: shorter side to `size`, bicubic; centre crop; normalise."""
    images = TF.resize(images, [size], TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    return TF.normalize(TF.center_crop(images, [size, size]), list(mean), list(std))


@functools.cache
def load_pickscore(device: torch.device):
    name, revision = setting("PICKSCORE_PROCESSOR")
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=revision)
    processor = transformers.AutoImageProcessor.from_pretrained(name, revision=revision)
    return load_verified(transformers.CLIPModel, "PICKSCORE_MODEL", device), tokenizer, processor


def pickscore(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """PickScore (arXiv 2305.01569): temperature * cos, about 20 to 23."""
    model, tokenizer, processor = load_pickscore(images.device)
    size = model.config.vision_config.image_size
    pixels = resize(images, size, processor.image_mean, processor.image_std)
    options = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}
    tokens = tokenizer(prompts, **options).to(images.device)
    image = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output)
    text = F.normalize(model.get_text_features(**tokens).pooler_output)
    return model.logit_scale.exp() * (image * text).sum(1)


@functools.cache
def load_blip(device: torch.device):
    name, revision = setting("BLIP_MODEL")
    processor = transformers.AutoProcessor.from_pretrained(name, revision=revision)
    model = load_verified(transformers.BlipForImageTextRetrieval, "BLIP_MODEL", device)
    return model, processor.tokenizer, processor.image_processor


def blip(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """BLIP (arXiv 2201.12086): cosine of the projected image and text features."""
    model, tokenizer, processor = load_blip(images.device)
    size = model.config.vision_config.image_size
    # BLIP squeezes to a square, it does not crop.
    square = TF.resize(images, [size, size], TF.InterpolationMode.BICUBIC, antialias=True)
    pixels = TF.normalize(square.clamp(0, 1), processor.image_mean, processor.image_std)
    options = {"padding": True, "truncation": True, "max_length": 35, "return_tensors": "pt"}
    tokens = tokenizer(prompts, **options).to(images.device)
    texts = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    similarity = model(**texts, pixel_values=pixels, use_itm_head=False)[0]  # [B images, B texts]
    return similarity.diagonal()


@functools.cache
def load_aesthetic(device: torch.device):
    path = os.environ.get("AESTHETIC_WEIGHTS")
    if path is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / AESTHETIC_NAME
        if not path.is_file():
            socket.setdefaulttimeout(60)
            path.parent.mkdir(parents=True, exist_ok=True)
            url = AESTHETIC_URL + AESTHETIC_NAME.replace("+", "%2B")
            torch.hub.download_url_to_file(url, str(path), hash_prefix=AESTHETIC_SHA256)
    sizes = (768, 1024, 128, 64, 16, 1)
    head = nn.ModuleDict()
    for i, (width, out) in zip((0, 2, 4, 6, 7), zip(sizes, sizes[1:], strict=False), strict=True):
        head[str(i)] = nn.Linear(width, out)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    SOURCES["AESTHETIC_WEIGHTS"] = f"{Path(path).name}@sha256:{sha256}"
    head.load_state_dict({key.removeprefix("layers."): value for key, value in weights.items()})
    spec = os.environ.get("AESTHETIC_CLIP", DEFAULTS["AESTHETIC_CLIP"])
    name, pretrained = spec.rsplit(":", 1)
    if name == "local-dir":
        name, pretrained = spec, None
    known = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else None
    quick = bool((known or {}).get("quick_gelu"))  # OpenAI's weights were trained with that GELU
    options = {"force_quick_gelu": quick, "require_pretrained": True}
    clip = open_clip.create_model(name, pretrained, **options)
    SOURCES["AESTHETIC_CLIP"] = spec
    if quick:  # the folder of the file in the hub's cache is named by the commit
        SOURCES["AESTHETIC_CLIP"] += f"@{Path(open_clip.download_pretrained(known)).parent.name}"
    clip, head = clip.to(device).eval().requires_grad_(False), head.to(device)
    config = open_clip.get_model_preprocess_cfg(clip)
    size = config["size"][-1] if isinstance(config["size"], (tuple, list)) else config["size"]
    return clip, size, config, head.requires_grad_(False)


def aesthetic(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """LAION's aesthetic predictor, 1 to 10: linear layers on unit CLIP ViT-L/14 features."""
    clip, size, config, head = load_aesthetic(images.device)
    pixels = resize(images, size, config["mean"], config["std"])
    x = F.normalize(clip.encode_image(pixels).float())
    for layer in head.values():
        x = layer(x)
    return x[:, 0]


@functools.cache
def load_imagereward(device: torch.device):
    from huggingface_hub import hf_hub_download
    from imscore.imreward.model import ImageReward  # optional: pip install imscore timm
    from safetensors.torch import load_model

    # Gone in transformers 5; imscore 0.0.11 asks for it.
    tokenizer = transformers.BertTokenizer
    if not hasattr(tokenizer, "additional_special_tokens_ids"):
        tokenizer.additional_special_tokens_ids = property(
            lambda self: self.convert_tokens_to_ids(["[ENC]"])
        )
    name, revision = setting("IMAGEREWARD_MODEL")
    file = Path(name) / "model.safetensors"
    if not file.is_file():
        file = Path(hf_hub_download(name, "model.safetensors", revision=revision))
    SOURCES["IMAGEREWARD_MODEL"] = f"{name}@{file.parent.name}"
    model = ImageReward()
    # Strictly: the package's own loader passes over missing weights.
    load_model(model, file, strict=True)
    return model.to(device).eval().requires_grad_(False)


def imagereward(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """ImageReward (arXiv 2304.05977), in imscore's port."""
    return load_imagereward(images.device).score(images, prompts).flatten()
