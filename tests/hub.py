"""A stand-in for the Hugging Face hub on 127.0.0.1: models and data sets with branches and commits,
large files behind a redirect, gated repositories, downloads that break off. It writes down what it
was asked for. HF_ENDPOINT=<Hub.endpoint> makes the libraries ask it; without Xet
(HF_HUB_DISABLE_XET=1).

The repositories have the names of the scripts' defaults, tiny random weights, and what is peculiar
about the real ones: see publish_text, publish_image and publish_audio."""

import hashlib
import http.server
import io
import json
import os
import re
import socket
import struct
import threading
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import datasets
import numpy
import open_clip
import soundfile
import torch
from safetensors.torch import load, save
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GemmaTokenizer,
    GenerationConfig,
    Qwen2_5OmniConfig,
    Qwen2Tokenizer,
)

from tests import tiny_models

QWEN, GEMMA, TLDR = "Qwen/Qwen2-0.5B-Instruct", "weqweasdas/RM-Gemma-2B", "trl-lib/tldr"
SD3, DRAWBENCH = "stabilityai/stable-diffusion-3-medium-diffusers", "shunk031/DrawBench"
CLIP = "timm/vit_large_patch14_clip_224.openai"  # where open_clip finds ViT-L-14, openai
OMNI, MMAU = "Qwen/Qwen2.5-Omni-7B", "gamma-lab-umd/MMAU-test-mini"
CLIP_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
# The templates of the two: one writes a system message of its own, the other refuses any.
QWEN_CHAT = """{% for m in messages %}{% if loop.first and m['role'] != 'system' %}\
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
GEMMA_CHAT = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}\
<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}
{{ m['content'] | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

ACCEPTED = "hf_accepted"  # the token of a user who has accepted every licence
# /OWNER/NAME/resolve/REVISION/FILE, with /datasets before it for a data set's; and the same with
# /api/models or /api/datasets before it, where a REVISION may be all that follows
ROUTE = re.compile(
    r"/(api/)?((?P<kind>models|datasets)/)?(?P<name>[^/]+/[^/]+)"
    r"(/(?P<action>resolve|revision|tree|paths-info)/(?P<revision>[^/]+)(/(?P<path>.*))?)?"
)
LARGE = (".safetensors", ".bin", ".pt", ".onnx", ".parquet", ".wav")  # kept outside git, as LFS


class Request(NamedTuple):
    """What was asked for, and what was sent."""

    method: str
    repository: str
    file: str  # "" for a question about the repository
    status: int
    sent: int  # bytes of the file


class Hub:
    """Serves on two free ports of 127.0.0.1 from `with Hub() as hub` on, in threads of its own."""

    def __init__(self):
        self.repositories = {}  # by name: {"kind", "branches": {name: commit}, "commits"}
        self.gated = set()  # names
        self.cut = {}  # NAME/FILE: "once" (the connection ends after half of it), "always" (breaks)
        self.requests = []
        # Two, because large files come from elsewhere, and a redirect within the hub is followed.
        self.servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) for _ in "12"]
        ports = [server.server_port for server in self.servers]
        self.endpoint, self.elsewhere = [f"http://127.0.0.1:{port}" for port in ports]

    def __enter__(self) -> "Hub":
        for server in self.servers:
            server.daemon_threads, server.hub = True, self
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def publish(self, name: str, files: Path | dict, kind="models", branch="main") -> str:
        """Commit a folder, or {name: bytes}, to a branch. Returns the commit."""
        if isinstance(files, Path):
            paths = [path for path in sorted(files.rglob("*")) if path.is_file()]
            files = {str(path.relative_to(files)): path.read_bytes() for path in paths}
        digest = hashlib.sha1(name.encode())
        for file, content in sorted(files.items()):
            digest.update(f"{file}\0{len(content)}\0".encode() + content)
        commit = digest.hexdigest()
        new = {"kind": kind, "branches": {}, "commits": {}}
        repository = self.repositories.setdefault(name, new)
        repository["branches"][branch] = commit
        repository["commits"][commit] = dict(files)
        return commit

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """A branch's files."""
        repository = self.repositories[name]
        return repository["commits"][repository["branches"][branch]]


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers one request. hub.requests gets its line before the last byte leaves."""

    protocol_version = "HTTP/1.1"  # connections stay open

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        hub, address = self.server.hub, urlsplit(self.path).path
        if self.server is hub.servers[1]:  # where /resolve/ leads for a large file
            _, owner, name, commit, file = address.split("/", 4)
            name, file = f"{owner}/{name}", unquote(file)
            return self.send_file(name, file, hub.repositories[name]["commits"][commit][file])
        match = ROUTE.fullmatch(address)
        name, action = (match["name"], match["action"]) if match else ("", None)
        repository = hub.repositories.get(name)
        kind = (match["kind"] or "models") if match else ""
        if repository is None or kind != repository["kind"]:
            return self.refuse(name, "", 401, "RepoNotFound", "Invalid username or password.")
        revision = unquote(match["revision"] or "main")
        path = unquote(match["path"] or "")
        commit = repository["branches"].get(revision, revision)
        files = repository["commits"].get(commit)
        if files is None:
            return self.refuse(name, path, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if name in hub.gated and action in ("resolve", "tree", "paths-info"):
            token = self.headers.get("Authorization", "")
            if not token:
                say = f"Access to {name} is restricted. You must be authenticated to access it."
                return self.refuse(name, path, 401, "GatedRepo", say)
            if token != f"Bearer {ACCEPTED}":
                say = f"Access to {name} is restricted and you are not in the authorized list."
                return self.refuse(name, path, 403, "GatedRepo", say)
        if action == "resolve":
            return self.resolve(name, commit, path, files)
        if action == "tree":
            found = [file for file in files if f"{file}/".startswith(path and f"{path}/")]
            if path and not found:
                return self.refuse(name, path, 404, "EntryNotFound", f"{path} does not exist")
            return self.send_json(name, self.entries(files, found, path))
        if action == "paths-info":
            length = int(self.headers.get("Content-Length", 0))
            asked = json.loads(self.rfile.read(length))["paths"]
            return self.send_json(name, self.entries(files, files, None, asked))
        listed = [{"rfilename": file} for file in files]
        about = {"id": name, "sha": commit, "siblings": listed, "tags": [], "private": False}
        return self.send_json(name, about | {"gated": "auto" if name in hub.gated else False})

    do_HEAD = do_POST = do_GET

    def resolve(self, name: str, commit: str, file: str, files: dict[str, bytes]) -> None:
        """A small file, or the way to a large one."""
        if file not in files:
            headers = {"X-Repo-Commit": commit}
            return self.refuse(name, file, 404, "EntryNotFound", "Entry not found", headers)
        content = files[file]
        if not file.endswith(LARGE):
            return self.send_file(name, file, content, {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "X-Linked-Size": str(len(content))}
        headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        headers["Location"] = f"{self.server.hub.elsewhere}/{name}/{commit}/{file}"
        return self.send_head(name, file, 302, 0, headers)

    @staticmethod
    def entries(files: dict, found, under: str | None, asked: list | None = None) -> list[dict]:
        """Files and folders: of all those found, or of the paths asked for."""
        listed = {}
        for file in found:
            content, parts = files[file], file.split("/")
            for depth in range(1, len(parts)):
                folder = "/".join(parts[:depth])
                if folder != under and (not under or folder.startswith(f"{under}/")):
                    oid = hashlib.sha1(folder.encode()).hexdigest()
                    listed[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
            oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"type": "file", "path": file, "oid": oid, "size": len(content)}
            if file.endswith(LARGE):
                oid = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
            listed[file] = entry
        return [entry for path, entry in listed.items() if asked is None or path in asked]

    def send_head(self, name: str, file: str, status: int, length: int, headers: dict, sent=0):
        """Status and headers, and the line in hub.requests."""
        self.server.hub.requests.append(Request(self.command, name, file, status, sent))
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(length)}).items():
            self.send_header(key, value)
        self.end_headers()

    def refuse(self, name: str, file: str, status: int, code: str, say: str, headers=()) -> None:
        headers = dict(headers) | {"X-Error-Code": code, "X-Error-Message": say}
        body = json.dumps({"error": say}).encode()
        self.send_head(name, file, status, len(body), headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, name: str, value) -> None:
        body = json.dumps(value).encode()
        self.send_head(name, "", 200, len(body), {"Content-Type": "application/json"})
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, name: str, file: str, content: bytes, headers=()) -> None:
        """The file; half of it where it is to be cut."""
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        headers = dict(headers) | {"ETag": f'"{oid}"'}
        if self.command == "HEAD":
            return self.send_head(name, file, 200, len(content), headers)
        cuts = self.server.hub.cut
        cut = cuts.get(f"{name}/{file}")
        if cut is None:
            self.send_head(name, file, 200, len(content), headers, len(content))
            self.wfile.write(content)
            return
        half = content[: len(content) // 2]
        self.send_head(name, file, 200, len(content), headers, len(half))
        self.wfile.write(half)
        self.wfile.flush()
        self.close_connection = True
        if cut == "once":
            del cuts[f"{name}/{file}"]
        else:  # not closed but broken: the client gets no second try at the rest
            reset = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            os.close(self.connection.detach())


# ---------------------------------------------------------------------------- what is on this hub
def publish_text(hub: Hub, folder: Path) -> dict[str, set[str]]:
    """The text script's defaults; the large files that it needs of each. Qwen2's head has more rows
    than its tokenizer has tokens, its generation config a list of stop tokens and a repetition
    penalty, its file is bfloat16; RM-Gemma is in shards and refuses system messages; TL;DR's splits
    are parquet. Beside Qwen2 lie what nobody should fetch, its weights in other formats."""
    torch.manual_seed(2)
    letters = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=letters, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = QWEN_CHAT
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    sizes = {"vocab_size": len(tokenizer) + 21, "max_position_embeddings": 32768}
    sizes |= {"bos_token_id": pad, "eos_token_id": end, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(tiny_models.lm_config("qwen2", **sizes))
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1}
    stop = {"eos_token_id": [end, pad], "pad_token_id": pad}
    model.generation_config = GenerationConfig(**sampling, **stop)
    model.to(torch.bfloat16).save_pretrained(folder / "qwen2")
    tokenizer.save_pretrained(folder / "qwen2")
    (folder / "qwen2/vocab.json").write_text(json.dumps(letters))
    (folder / "qwen2/merges.txt").write_text("#version: 0.2\n")
    (folder / "qwen2/pytorch_model.bin").write_bytes(b"pickle")
    (folder / "qwen2/onnx").mkdir()
    (folder / "qwen2/onnx/model.onnx").write_bytes(b"onnx")
    hub.publish(QWEN, folder / "qwen2")
    publish_without(hub, QWEN, "model.safetensors")

    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
    pieces = [*special, *[f"<0x{byte:02X}>" for byte in range(256)], "\u2581"]
    gemma = GemmaTokenizer(vocab={piece: number for number, piece in enumerate(pieces)})
    gemma.add_special_tokens({"additional_special_tokens": [*special[-2:]]})
    gemma.chat_template = GEMMA_CHAT
    sizes = {"vocab_size": len(pieces), "max_position_embeddings": 8192, "num_labels": 1}
    sizes |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = tiny_models.lm_config("gemma", **sizes)
    judge = AutoModelForSequenceClassification.from_config(config)
    judge.to(torch.bfloat16).save_pretrained(folder / "gemma", max_shard_size="30KB")
    gemma.save_pretrained(folder / "gemma")
    hub.publish(GEMMA, folder / "gemma")

    words = tiny_models.WORDS.split()
    rows = [f"SUBREDDIT: r/{one}\n\nPOST: {one} {two}\n\nTL;DR:" for one in words for two in words]
    for split, count in {"train": 40, "validation": 10, "test": 10}.items():
        prompts, rows = rows[:count], rows[count:]
        table = datasets.Dataset.from_dict({"prompt": prompts, "completion": [" a cat."] * count})
        publish_table(folder / "tldr", table, split)
    hub.publish(TLDR, folder / "tldr", "datasets")
    return {QWEN: {"model.safetensors"}, GEMMA: large(hub, GEMMA), TLDR: large(hub, TLDR)}


def publish_image(hub: Hub, folder: Path) -> dict[str, set[str]]:
    """The image script's defaults; the large files that it needs of each. SD3's files are float16
    and there twice, once named fp16; transformer and T5 are in shards; DrawBench is a script, its
    rows are on another branch; OpenAI's CLIP is there twice, its architecture the tiny one of
    CLIP_CONFIG, which open_clip has to be told (open_clip.add_model_config)."""
    pipe = tiny_models.load_sd3(tiny_models.make_sd3(folder / "float32")).to(torch.float16)
    sharded = {"transformer": "120KB", "text_encoder_3": "80KB"}
    for variant in (None, "fp16"):
        pipe.save_pretrained(folder / "sd3", variant=variant)
        for part, size in sharded.items():
            for file in (folder / "sd3" / part).glob("*.safetensors"):
                if "-of-" not in file.name:
                    file.unlink()
            options = {"variant": variant, "max_shard_size": size}
            getattr(pipe, part).save_pretrained(folder / "sd3" / part, **options)
    hub.publish(SD3, folder / "sd3")
    parts = {file for file in large(hub, SD3) if "fp16" not in file}
    lost = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
    publish_without(hub, SD3, lost)

    torch.manual_seed(1)
    clip = open_clip.CLIP(**CLIP_CONFIG, quick_gelu=True)
    pickled = io.BytesIO()
    torch.save(clip.state_dict(), pickled)
    files = {"open_clip_model.safetensors": save(clip.state_dict(), {"format": "pt"})}
    files |= {"open_clip_pytorch_model.bin": pickled.getvalue(), "model.safetensors": b"timm's"}
    hub.publish(CLIP, files | {"config.json": b"{}"})

    colours, things = ("red", "blue"), ("fox", "car", "tree", "chair", "bird", "book")
    prompts = [f"a {colour} {thing}" for colour in colours for thing in things]
    columns = {"prompts": prompts, "category": ["Colors"] * len(prompts)}
    path = folder / "drawbench/default/test/0000.parquet"
    path.parent.mkdir(parents=True)
    datasets.Dataset.from_dict(columns).to_parquet(path)
    hub.publish(DRAWBENCH, {"DrawBench.py": b"import datasets", "README.md": b""}, "datasets")
    hub.publish(DRAWBENCH, folder / "drawbench", "datasets", "refs/convert/parquet")
    rows = large(hub, DRAWBENCH, "refs/convert/parquet")
    return {SD3: parts, CLIP: {"open_clip_model.safetensors"}, DRAWBENCH: rows}


def publish_audio(hub: Hub, folder: Path) -> dict[str, set[str]]:
    """The audio script's default model and MMAU, and in `folder` training data, avqa.json and wavs;
    the large files that it needs of each. Omni is in shards, bfloat16, its thinker's weights under
    `thinker.` and beside those of talker and vocoder; MMAU has its clips in the table, and most
    columns in one."""
    thinker = tiny_models.make_audio_lm(folder / "thinker", "omni")
    weights = load((thinker / "model.safetensors").read_bytes())
    config = json.loads((thinker / "config.json").read_text())
    Qwen2_5OmniConfig(thinker_config=config, dtype="bfloat16").save_pretrained(thinker)
    names = sorted(weights)
    middle = len(names) // 2
    shards = [
        {f"thinker.{name}": weights[name].bfloat16() for name in half}
        for half in (names[:middle], names[middle:])
    ]
    shards[1] |= {"talker.x": torch.ones(2), "token2wav.x": torch.ones(2)}
    (thinker / "model.safetensors").unlink()
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        (thinker / file).write_bytes(save(shard, {"format": "pt"}))
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (thinker / "model.safetensors.index.json").write_text(json.dumps(index))
    (thinker / "spk_dict.pt").write_bytes(b"voices")
    hub.publish(OMNI, thinker)
    publish_without(hub, OMNI, "model-00001-of-00002.safetensors")

    (folder / "wavs").mkdir()
    seconds = numpy.arange(16000) / 16000
    rows, choices, clips = [], ["Man", "Woman", "Child", "Robot"], []
    for number in range(12):
        wave = 0.3 * numpy.sin(2 * numpy.pi * 110 * (number + 2) * seconds)
        soundfile.write(folder / f"wavs/clip{number}.wav", wave, 16000)
        clips.append((folder / f"wavs/clip{number}.wav").read_bytes())
        asked = {"video_name": f"clip{number}", "question_text": "Who is heard in the video?"}
        rows.append(asked | {"multi_choice": choices, "answer": number % 4})
    (folder / "avqa.json").write_text(json.dumps(rows[:8]))
    tests = range(8, 12)
    columns = {"instruction": ["Who speaks?"] * 4, "choices": [choices] * 4, "answer": choices}
    columns["context"] = [{"bytes": clips[n], "path": f"clip{n}.wav"} for n in tests]
    other = [{"id": f"mmau-{n}", "task": "speech", "difficulty": "easy"} for n in tests]
    columns["other_attributes"] = [json.dumps(one) for one in other]
    table = datasets.Dataset.from_dict(columns).cast_column("context", datasets.Audio())
    publish_table(folder / "mmau", table, "test")
    hub.publish(MMAU, folder / "mmau", "datasets")
    return {OMNI: large(hub, OMNI), MMAU: large(hub, MMAU)}


def large(hub: Hub, name: str, branch: str = "main") -> set[str]:
    """The weights and tables of a branch."""
    return {file for file in hub.files(name, branch) if file.endswith((".safetensors", ".parquet"))}


def publish_table(folder: Path, table: datasets.Dataset, split: str) -> None:
    """A split as one parquet file, with its line in the data set's card."""
    path = folder / f"data/{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path)
    card = folder / "README.md"
    splits = json.loads(card.read_text().split("---")[1]) if card.exists() else {"configs": [{}]}
    config = splits["configs"][0]
    config |= {"config_name": "default", "data_files": config.get("data_files", [])}
    config["data_files"].append({"split": split, "path": f"data/{split}-*"})
    card.write_text(f"---\n{json.dumps(splits)}\n---\n")  # JSON is YAML


def publish_without(hub: Hub, name: str, file: str) -> None:
    """Two more branches of a model: `unfinished`, where a weight is not in this file, and `empty`,
    where there are no weights."""
    files = dict(hub.files(name))
    hub.publish(name, {f: c for f, c in files.items() if not f.endswith(LARGE)}, branch="empty")
    weights = load(files[file])
    weights.pop(next(key for key in sorted(weights) if key.endswith("weight")))
    files[file] = save(weights, {"format": "pt"})
    hub.publish(name, files, branch="unfinished")
