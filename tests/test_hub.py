"""The scripts' default commands against a stand-in for the hub (hub.py): what they download, what
they do without a licence, a connection, a file or a revision.

Each command is a process of its own, forked from a Python that has imported the libraries. Only
sizes are given as flags."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.hub import (
    ACCEPTED,
    CLIP,
    CLIP_CONFIG,
    DRAWBENCH,
    GEMMA,
    LARGE,
    MMAU,
    OMNI,
    QWEN,
    SD3,
    TLDR,
    Hub,
    publish_audio,
    publish_image,
    publish_text,
)

ROOT = Path(__file__).resolve().parent.parent
CPU = ["--cpu", "--precision", "fp32", "--iterations", "1"]

# Reads commands, one a line, as JSON: where the output goes, what is added to the environment, and
# sys.argv. Answers with the exit status.
RUNNER = """
import gc, json, multiprocessing, os, runpy, sys
import datasets, open_clip
import adrpo_audio_mmau, adrpo_fm_sd3, adrpo_grpo_llm

open_clip.add_model_config(sys.argv[1])

def work(output, environment, argv):
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    sys.argv[:] = argv
    runpy.run_path(argv[0], run_name="__main__")

gc.freeze()  # what is imported is shared, not copied
for line in sys.stdin:
    process = multiprocessing.get_context("fork").Process(target=work, args=json.loads(line))
    process.start()
    process.join()
    print(process.exitcode, flush=True)
"""


class Command(NamedTuple):
    """A script's default command, made small."""

    publish: Callable  # what it asks the hub for
    sizes: str
    models: dict[str, str]  # by flag
    data: dict[str, str]
    damaged: str  # the flag of the model with the branches `unfinished` and `empty`
    cut: str  # one of its files


COMMANDS = {
    "adrpo_grpo_llm": Command(
        publish_text,
        "--prompts-per-update 2 --group-size 2 --max-completion-length 8 --eval-max-prompts 2 "
        "--eval-samples 1",
        {"--model-id": QWEN, "--reward-model": GEMMA},
        {"--dataset": TLDR},
        damaged="--model-id",
        cut="model.safetensors",
    ),
    "adrpo_fm_sd3": Command(
        publish_image,
        "--prompts-per-update 2 --group-size 2 --resolution 32 --max-sequence-length 8 "
        "--num-steps 2 --eval-steps 2 --eval-max-prompts 1 --eval-images 2",
        {"--model-id": SD3},
        {"--prompts": f"{DRAWBENCH}@refs/convert/parquet"},
        damaged="--model-id",
        cut="transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    ),
    "adrpo_audio_mmau": Command(
        publish_audio,
        "--train-data adrpo_audio_mmau/avqa.json --audio-dir adrpo_audio_mmau/wavs "
        f"--eval-data {MMAU} --prompts-per-update 2 --group-size 2 --max-completion-length 8 "
        "--eval-max 2",
        {"--model-id": OMNI},
        {"--eval-data": MMAU},
        damaged="--model-id",
        cut="model-00001-of-00002.safetensors",
    ),
}
SCRIPTS = list(COMMANDS)


class Place:
    """A hub, a user's cache (HF_HOME), and two Pythons that run commands: one that may ask the hub
    and one that is told not to (HF_HUB_OFFLINE=1)."""

    def __init__(self, folder: Path, hub: Hub):
        self.folder, self.hub, self.home, self.count = folder, hub, folder / "home", 0
        hub_variables = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
        variables = {name: v for name, v in os.environ.items() if name[:3] != "HF_"}
        variables |= hub_variables | {"HF_HOME": str(self.home), "PYTHONPATH": str(ROOT)}
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": folder}
        self.needed = {name: c.publish(hub, folder / name) for name, c in COMMANDS.items()}
        (folder / "ViT-L-14.json").write_text(json.dumps(CLIP_CONFIG))
        self.pythons = {}
        for offline in ("0", "1"):
            environment = variables | {"HF_HUB_OFFLINE": offline}
            command = [sys.executable, "-c", RUNNER, str(folder)]
            self.pythons[offline] = subprocess.Popen(command, env=environment, **options)

    def run(self, argv: list[str], token: str = ACCEPTED, offline: bool = False):
        """Exit status and output of a script."""
        self.count += 1
        output = self.folder / f"{self.count}.txt"
        python = self.pythons[str(int(offline))]
        self.hub.requests.clear()
        job = [str(output), {"HF_TOKEN": token} if token else {}, argv]
        print(json.dumps(job), file=python.stdin, flush=True)
        status = int(python.stdout.readline())
        return status, output.read_text()

    def argv(self, name: str, *flags: str) -> tuple[list[str], Path]:
        """A script's default command, and the folder of its run."""
        run_dir = self.folder / f"runs/{self.count}"
        where = ["--output-dir", str(run_dir.parent), "--run-name", run_dir.name]
        sizes = COMMANDS[name].sizes.split()
        if flags[0:1] == ("--eval-data",):  # which is no default of the script
            sizes[sizes.index("--eval-data") + 1], flags = flags[1], ()
        return [str(ROOT / f"{name}.py"), *CPU, *where, *sizes, *flags], run_dir

    def refuses(self, name: str, flag: str, *flags: str, **options) -> str:
        """The one line that a command ends in: it names the flag. No run is begun."""
        argv, run_dir = self.argv(name, *flags)
        status, output = self.run(argv, **options)
        last = re.split(r"[\r\n]+", output.strip())[-1]
        assert status == 1 and "Traceback" not in output, output
        assert last.startswith(f"error: {flag} "), output
        assert not run_dir.exists()
        return last

    def works(self, name: str, *flags: str, **options) -> Path:
        """Run the default command to its end; args.json names every commit. Returns its folder."""
        argv, run_dir = self.argv(name, *flags)
        status, output = self.run(argv, **options)
        assert status == 0, output
        assert json.loads((run_dir / "summary.json").read_text())["iterations"] == 1
        sources = json.loads((run_dir / "args.json").read_text())["sources"]
        for repository in self.needed[name]:
            assert self.commit(repository) in json.dumps(sources)
        return run_dir

    def commit(self, repository: str) -> str:
        """Of the branch that a default command asks for: DrawBench's rows, else main."""
        branches = self.hub.repositories[repository]["branches"]
        return branches.get("refs/convert/parquet", branches["main"])

    def sent(self) -> dict[str, dict[str, int]]:
        """Bytes of large files that were sent for the last command, by repository and file."""
        sent = {}
        for request in self.hub.requests:
            if request.sent and request.file.endswith(LARGE):
                files = sent.setdefault(request.repository, {})
                files[request.file] = files.get(request.file, 0) + request.sent
        return sent

    def sizes(self, name: str) -> dict[str, dict[str, int]]:
        """The same of what a script needs, each file once."""
        sizes = {}
        for repository, files in self.needed[name].items():
            contents = self.hub.repositories[repository]["commits"][self.commit(repository)]
            sizes[repository] = {file: len(contents[file]) for file in files}
        return sizes


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with Hub() as hub:
        place = Place(folder, hub)
        yield place
        for python in place.pythons.values():
            python.stdin.close()
            python.wait()


@pytest.fixture(autouse=True)
def cold(place):
    """Every test begins with an empty cache, and a hub without trouble."""
    shutil.rmtree(place.home, ignore_errors=True)
    place.hub.cut.clear()
    place.hub.gated.clear()


@pytest.mark.parametrize("name", SCRIPTS)
def test_default_command_cold_warm_and_offline(place, name):
    """Cold, it fetches each file that it needs once and no other large one; then none; offline it
    does not ask at all."""
    place.works(name)
    assert place.sent() == place.sizes(name)
    place.works(name)
    assert place.sent() == {}
    place.works(name, offline=True, token="")
    assert not place.hub.requests


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_refused_is_refused_before_anything_large(place, name):
    """No licence, with a token and without; no such revision; no such name; no connection. The next
    run works."""
    command, gated = COMMANDS[name], place.hub.gated
    for flag, spec in (command.models | command.data).items():
        repository = spec.partition("@")[0]
        gated.add(repository)
        for token in ("", "hf_of_another_user"):
            assert re.search("gated|licence", place.refuses(name, flag, token=token))
        gated.discard(repository)
        said = place.refuses(name, flag, flag, f"{repository}@nosuch")
        assert "nosuch" in said.removeprefix(f"error: {flag} {repository}@nosuch")
        place.refuses(name, flag, flag, "nobody/nothing")
        place.refuses(name, flag, flag, spec, offline=True)
        assert not place.sent()
    place.works(name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_damaged_repositories_and_cut_downloads_break_nothing(place, name):
    """The next run works, and takes from the cache what is whole; a revision that is not there is
    not replaced by what is in the cache."""
    command, cut = COMMANDS[name], place.hub.cut
    flag = command.damaged
    model = command.models[flag]
    assert "weights are not in its files" in place.refuses(name, flag, flag, f"{model}@unfinished")
    place.refuses(name, flag, flag, f"{model}@empty")
    cut[f"{model}/{command.cut}"] = "always"
    place.refuses(name, flag)
    cut[f"{model}/{command.cut}"] = "once"  # the library tries again
    place.works(name)
    sent, sizes = place.sent()[model], place.sizes(name)[model]
    whole = sizes[command.cut]
    assert not cut and sent.pop(command.cut) == whole // 2 + whole
    assert sent.items() <= sizes.items()
    place.refuses(name, flag, flag, f"{model}@nosuch", offline=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_resume_stays_with_the_commit(place, name):
    """A model whose repository has changed meanwhile."""
    command, hub = COMMANDS[name], place.hub
    run_dir = place.works(name)
    (run_dir / "summary.json").unlink()  # not finished: there is one more iteration to do
    record = json.loads((run_dir / "args.json").read_text())
    record["args"]["iterations"] = 2
    (run_dir / "args.json").write_text(json.dumps(record))
    model = command.models[command.damaged]
    before = hub.repositories[model]["branches"]["main"]
    hub.publish(model, {"config.json": b"{}", "model_index.json": b"{}"})
    try:
        status, output = place.run([str(ROOT / f"{name}.py"), "--resume", str(run_dir)])
    finally:
        hub.repositories[model]["branches"]["main"] = before
    assert status == 0, output
    assert not place.sent()
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]


def test_without_t5_its_files_are_not_fetched(place):
    place.works("adrpo_fm_sd3", "--no-t5")
    expected = place.sizes("adrpo_fm_sd3")
    expected[SD3] = {f: n for f, n in expected[SD3].items() if "text_encoder_3" not in f}
    assert place.sent() == expected


def test_clip_that_cannot_be_fetched_is_named(place):
    place.hub.gated.add(CLIP)
    place.refuses("adrpo_fm_sd3", "--clip-model", token="")
    place.hub.gated.clear()
    place.works("adrpo_fm_sd3")
