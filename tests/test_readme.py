"""Every command of README and REPRODUCE runs as written, and prints what they say it prints.

The folder is laid out as they say, with tiny weights, made-up photos and a few creatures. The two commands
that install packages, and the toy itself, are run by .ci/run.
"""

import importlib
import re
import runpy
import shlex
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT
from mp100 import make_mp100
from PIL import Image

from common import read_json
from data import parse_descriptions
from decode import load_trained
from toyworld import figures
from toyworld.creatures import draw_toy

ROOMS = "paper", "tools", "toyworld", "realworld"
TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", "REPRODUCE.md")}
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")
# What a test shortens: the loops over splits train one split, whose results stand for the others.
SHORTER = [("for s in 2 3 4 5; do", "for s in 2; do"),
           ("for s in 1 2 3 4 5; do python eval", "for s in 1 2; do python eval"),
           ("train.py --split", "train.py --epochs 1 --split"),
           ("train.py --data data/no", "train.py --epochs 1 --data data/no"),
           ("--texts-as sideless typo shuffled names swapped --box-scale 0.8 1.2", "--texts-as names")]
SHELL = r"""say() { printf '%s\037' "$@"; printf '\036'; }
python() { say "$@"; }
torchrun() { while [[ "$1" != *.py ]]; do shift; done; say "$@"; }
"""


def commands_of(text):
    """[(command, the output that is printed below its block or None), ...] of a text's ```bash blocks."""
    found = []
    for block, output in re.findall(r"```bash\n(.*?)```(?:\n\s*```\n(.*?)```)?", text, re.S):
        lines = [line.strip() for line in block.strip().splitlines()]
        found += [(line, None) for line in lines[:-1]] + [(lines[-1], output or None)]
    install = "pip install -r requirements.txt && "
    found = [(command.removeprefix(install), output) for command, output in found]
    # run by .ci/run, test_bench.py and test_realworld.py
    elsewhere = "pip ", "python toy.py", "python -m tools.bench", "hf ", "python predict.py assets/real"
    return [(command, output) for command, output in found if not command.startswith(elsewhere)]


def assert_alike(said, expected):
    """The same lines. Numbers may differ by 2 %, since other machines round otherwise; times may be any."""
    said, expected = ([line.rstrip() for line in text.strip("\n").splitlines()] for text in (said, expected))
    assert [NUMBER.sub("0", line) for line in said] == [NUMBER.sub("0", line) for line in expected]
    for ours, theirs in zip(said, expected):
        ours, theirs = (re.sub(r"[\d.]+ s\b", "", line).replace(",", "") for line in (ours, theirs))
        numbers = [[float(n) for n in NUMBER.findall(line)] for line in (ours, theirs)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=0.02), (ours, theirs)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """What a reader has who follows README and REPRODUCE, in small."""
    folder = tmp_path_factory.mktemp("reader")
    for item in [*ROOT.glob("*.py"), *(ROOT / name for name in ("assets", "descriptions.json", *ROOMS))]:
        (folder / item.name).symlink_to(item)
    shutil.copytree(tiny / "llm", folder / "weights/Llama-3.1-8B")
    shutil.copytree(tiny / "vit", folder / "weights/dinov2-large")
    (folder / "weights/SmolLM2-135M-Instruct").symlink_to(folder / "weights/Llama-3.1-8B")
    (folder / "weights/dinov2-small").symlink_to(folder / "weights/dinov2-large")
    texts = ROOT / "descriptions.json"
    make_mp100(folder / "data/mp100", parse_descriptions(read_json(texts), texts), splits=range(1, 6),
               instances={"train": {1: 2, 98: 2}, "test": {2: 2, 84: 2}}, is_visible=lambda i, k: k < 2)
    noise = np.random.default_rng(1).integers(0, 256, (330, 350, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "photo.jpg")
    draw_toy(folder / "runs/toy", 0, {"train": (3, 4), "val": (1, 2), "test": (2, 3)})
    toy = torch.load(ROOT / "assets/toy/ckpt.pt", weights_only=True)
    toy["descriptions"] = read_json(folder / "runs/toy/descriptions.json")  # of fewer creatures
    torch.save(toy, folder / "runs/toy/ckpt.pt")
    return folder


def run_command(command, folder, monkeypatch, capsys):
    """Runs a command as a reader would, in their folder -> what it printed.

    A shell takes it apart. The programs that it would start are run here, in one process, which saves time;
    that torchrun starts several is the matter of test_train.py.
    """
    for long, short in SHORTER:
        command = command.replace(long, short)
    calls = subprocess.run(["bash", "-c", SHELL + command], capture_output=True, text=True, check=True).stdout
    monkeypatch.chdir(folder)
    capsys.readouterr()
    for call in calls.split("\x1e")[:-1]:
        program, *argv = call.split("\x1f")[:-1]
        if program == "-c":
            exec(argv[0], {})
        else:
            program, argv = (argv[0], argv[1:]) if program == "-m" else (program.removesuffix(".py"), argv)
            importlib.import_module(program).main(argv)
    return capsys.readouterr().out


def test_the_papers_result_is_reproduced_by_the_commands(folder, monkeypatch, capsys):
    commands = commands_of(TEXTS["REPRODUCE.md"])
    assert len(commands) == 14
    for command, output in commands:
        said = run_command(command, folder, monkeypatch, capsys)
        if output:
            assert_alike(said, output)
        if command.startswith("for s in 2"):
            for split in 3, 4, 5:
                shutil.copytree(folder / "runs/split2", folder / f"runs/split{split}")
        if command.startswith("for s in 1"):
            for split in 3, 4, 5:
                shutil.copy(folder / "runs/split2/pairs.json", folder / f"runs/split{split}")
        if command.startswith("python -c"):  # Table 2: pairs and query, five splits and their mean
            rows = [list(map(float, line.split())) for line in said.splitlines()]
            assert [len(row) for row in rows] == [6, 6]
            assert all(abs(sum(row[:5]) / 5 - row[5]) < 0.02 for row in rows)
    for file in "ckpt.pt", "report.json", "predictions.json", "predictions.png":
        assert (folder / "runs/split1" / file).exists()


def test_readmes_commands_run_and_print_what_it_says(folder, monkeypatch, capsys):
    """After the other test, since README asks a checkpoint that REPRODUCE's commands train."""
    commands = commands_of(TEXTS["README.md"])
    again = {command for command, _ in commands_of(TEXTS["REPRODUCE.md"])}
    outputs = 0
    for command, output in commands:
        if command not in again and "--serve" not in command:
            said = run_command(command, folder, monkeypatch, capsys)
            if output:
                assert_alike(said, output)
                outputs += 1
    assert len(commands) == 13 and outputs == 1
    for file in "ckpt.pt", "report.json", "predictions.json", "predictions.png":
        assert (folder / "runs/name" / file).exists()
    for file in "found/creature.png", "runs/teapots/ckpt.pt":
        assert (folder / file).exists()


def test_readmes_python_runs(folder, monkeypatch, capsys):
    [block] = re.findall(r"```python\n(.*?)```", TEXTS["README.md"], re.S)
    said = run_command(f"python -c {shlex.quote(block)}", folder, monkeypatch, capsys)
    x, y, confidence = map(float, said.split())
    assert (x, y) == pytest.approx((110.1, 150.8), abs=1.5)  # as predict.py prints it
    assert 0.9 < confidence <= 1


@pytest.mark.parametrize("name, shown", [
    ("lora", "B = 0: the output is the same"), ("llama", "read in two parts with a cache, the same: True"),
    ("vit", "patch tokens (1, 64, 128)"), ("chat", "    8  -        '\\nAssistant:'"),
    ("data", "162 pixels wide, turned by -16 degrees: keypoint 2"),
    ("decode", "the orange heart                         median (0.320, 0.846)")])
def test_each_file_up_to_decode_runs_by_itself(name, shown, capsys):
    runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    assert shown in capsys.readouterr().out


def test_commands_that_install_are_those_of_ci():
    ci = (ROOT / ".ci/run").read_text()
    installs = re.findall(r"^pip .*(?:toy\.py|pytest)$", "\n".join(TEXTS.values()), re.M)
    assert len(installs) == 2 and all(command in ci for command in installs)


def test_readme_names_every_module_and_its_length():
    lengths = dict(re.findall(r"^(\w+\.py) +(\d+)  ", TEXTS["README.md"], re.M))
    assert lengths == {path.name: str(len(path.read_text().splitlines())) for path in ROOT.glob("*.py")}
    assert all(f"{room}/" in TEXTS["README.md"] for room in ROOMS)


def test_readmes_figures_are_there():
    for text in TEXTS.values():
        for figure in re.findall(r"\]\((assets/[^)]+)\)", text):
            assert (ROOT / figure).exists()


def test_the_figures_are_drawn_by_the_code_that_they_explain():
    toy = ROOT / "assets/toy"
    model, chat, _ = load_trained(toy / "ckpt.pt", "cpu", toy / "llm", toy / "vit")
    for name, drawn in [("words", figures.draw_words(model, chat)), ("sequence", figures.draw_sequence(chat)),
                        ("distribution", figures.draw_distribution(model, chat)),
                        ("crop", figures.draw_crop()), ("attention", figures.draw_attention(model, chat))]:
        shown = Image.open(ROOT / f"assets/figures/{name}.png").convert("RGB")
        difference = np.abs(np.subtract(shown, drawn, dtype=float)).mean()  # colours are rounded
        assert shown.size == drawn.size and difference < 3, (name, difference)
