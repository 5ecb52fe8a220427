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
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.hub import ACCEPTED, GEMMA, LARGE, QWEN, TLDR, Hub, publish_text

ROOT = Path(__file__).resolve().parent.parent
CPU = ["--cpu", "--precision", "fp32", "--iterations", "1"]

# Reads commands, one a line, as JSON: where the output goes, what is added to the environment, and
# sys.argv. Answers with the exit status.
RUNNER = """
import gc, json, multiprocessing, os, runpy, sys
import datasets
import adrpo_grpo_llm

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

    script: str
    sizes: list[str]
    models: dict[str, str]  # by flag
    data: dict[str, str]
    weights: dict[str, set[str]]  # the large files it needs, by repository
    damaged: str  # the model with the branches `unfinished` and `empty`
    cut: str  # a file of it


COMMANDS = {
    "adrpo_grpo_llm": Command(
        script="adrpo_grpo_llm",
        sizes=[
            "--prompts-per-update",
            "2",
            "--group-size",
            "2",
            "--max-completion-length",
            "8",
            "--eval-max-prompts",
            "2",
            "--eval-samples",
            "1",
        ],
        models={"--model-id": QWEN, "--reward-model": GEMMA},
        data={"--dataset": TLDR},
        weights={
            QWEN: {"model.safetensors"},
            GEMMA: {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)},
            TLDR: {f"data/{s}-00000-of-00001.parquet" for s in ("train", "validation", "test")},
        },
        damaged=QWEN,
        cut="model.safetensors",
    ),
}
SCRIPTS = list(COMMANDS)


class Place:
    """A hub, a user's cache (HF_HOME), and two Pythons that run commands: one that may ask the hub
    and one that is told not to (HF_HUB_OFFLINE=1)."""

    def __init__(self, folder: Path, hub: Hub):
        self.folder, self.hub, self.home, self.count = folder, hub, folder / "home", 0
        hub_variables = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
        variables = {name: v for name, v in os.environ.items() if name[:3] != "HF_"}
        variables |= hub_variables | {"HF_HOME": str(self.home), "PYTHONPATH": str(ROOT)}
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": folder}
        self.pythons = {}
        for offline in ("0", "1"):
            environment = variables | {"HF_HUB_OFFLINE": offline}
            python = subprocess.Popen([sys.executable, "-c", RUNNER], env=environment, **options)
            self.pythons[offline] = python

    def run(self, script: str, flags: list, token: str = ACCEPTED, offline: bool = False):
        """Exit status, output, and the run's folder where it made one."""
        self.count += 1
        run_dir, output = self.folder / f"runs/{self.count}", self.folder / f"{self.count}.txt"
        where = ["--output-dir", str(run_dir.parent), "--run-name", run_dir.name]
        argv = [str(ROOT / f"{script}.py"), *CPU, *where, *flags]
        environment = {"HF_TOKEN": token} if token else {}
        python = self.pythons[str(int(offline))]
        self.hub.requests.clear()
        print(json.dumps([str(output), environment, argv]), file=python.stdin, flush=True)
        status = int(python.stdout.readline())
        return status, output.read_text(), run_dir

    def refuses(self, command: Command, flag: str, *flags: str, **options) -> str:
        """The one line that a command ends in, which names the flag, and no run is begun."""
        status, output, run_dir = self.run(command.script, [*command.sizes, *flags], **options)
        last = re.split(r"[\r\n]+", output.strip())[-1]
        assert status == 1 and "Traceback" not in output, output
        assert last.startswith(f"error: {flag} "), output
        assert not run_dir.exists()
        return last

    def works(self, command: Command, **options) -> dict[str, dict[str, int]]:
        """Run the default command to its end; args.json names every commit. Returns the bytes of
        large files that were sent, by repository."""
        status, output, run_dir = self.run(command.script, command.sizes, **options)
        assert status == 0, output
        assert json.loads((run_dir / "summary.json").read_text())["iterations"] == 1
        sources = json.loads((run_dir / "args.json").read_text())["sources"]
        found = sources.values()
        found = [name for value in found for name in ([value] if isinstance(value, str) else value)]
        for spec in (*command.models.values(), *command.data.values()):
            name, _, branch = spec.partition("@")
            commit = self.hub.repositories[name]["branches"][branch or "main"]
            assert f"{name}@{commit}" in found
        sent = {}
        for request in self.hub.requests:
            if request.sent and request.file.endswith(LARGE):
                files = sent.setdefault(request.repository, {})
                files[request.file] = files.get(request.file, 0) + request.sent
        return sent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with Hub() as hub:
        place = Place(folder, hub)
        publish_text(hub, folder / "text")
        yield place
        for python in place.pythons.values():
            python.stdin.close()
            python.wait()


@pytest.mark.parametrize("name", SCRIPTS)
def test_default_command_cold_warm_and_offline(place, name):
    """Cold, it fetches each file that it needs once and no other; then nothing large; then it does
    not ask at all."""
    shutil.rmtree(place.home, ignore_errors=True)
    command = COMMANDS[name]
    sent = place.works(command)
    for repository, files in command.weights.items():
        branch = next(iter(place.hub.repositories[repository]["branches"]))
        there = place.hub.files(repository, branch)
        assert sent.pop(repository) == {file: len(there[file]) for file in files}
    assert not sent
    assert place.works(command) == {}
    assert place.works(command, offline=True, token="") == {}
    assert not place.hub.requests


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_goes_wrong_is_one_line_and_breaks_nothing(place, name):
    shutil.rmtree(place.home, ignore_errors=True)
    command, hub = COMMANDS[name], place.hub
    for flag, spec in (command.models | command.data).items():
        repository = spec.partition("@")[0]
        hub.gated.add(repository)
        for token, code in (("", "401"), ("hf_another", "403")):
            said = place.refuses(command, flag, token=token)
            assert "gated" in said.lower() or "licence" in said or code in said, said
            assert not any(r.sent and r.file.endswith(LARGE) for r in hub.requests)
        hub.gated.discard(repository)
        said = place.refuses(command, flag, flag, f"{repository}@nosuch")
        assert "nosuch" in said.removeprefix(f"error: {flag} {repository}@nosuch"), said
        said = place.refuses(command, flag, flag, f"{repository}@main", offline=True)
    flag = next(flag for flag, model in command.models.items() if model == command.damaged)
    said = place.refuses(command, flag, flag, f"{command.damaged}@unfinished")
    assert "weights are not in its files" in said
    place.refuses(command, flag, flag, f"{command.damaged}@empty")
    hub.cut[command.cut] = "always"
    place.refuses(command, flag)
    hub.cut[command.cut] = "once"  # the library tries again
    sent = place.works(command)
    whole = len(hub.files(command.damaged)[command.cut])
    assert not hub.cut and sent[command.damaged][command.cut] == whole // 2 + whole
    place.refuses(command, flag, flag, f"{command.damaged}@nosuch", offline=True)
