"""How tests run the programs: as a command line, in two processes, and to a barely trained checkpoint."""

import io
import multiprocessing
import os
import re
import socket
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from mp100 import make_wagons_and_kites

import train
from common import read_json, run

SUBPROCESS = {"cwd": ROOT, "text": True, "env": os.environ | {"OMP_NUM_THREADS": "1"}}


def command_line(*arguments):
    """Paths and numbers as a program gets them."""
    return [str(argument) for argument in arguments]


def refused(program, arguments):
    """Runs a program as the command line would -> its one line of error. The exit code must be 2."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said), pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", command_line("program", *arguments))
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)  # run() may replace it
        run(program.main)
    assert stop.value.code == 2
    free_frames(stop.value)
    lines = re.sub(r"\x1b\[\w", "", said.getvalue()).replace("\r", "\n").splitlines()
    lines = [line for line in lines if line.strip()]
    lines = [line for line in lines if "%|" not in line]  # of the progress bar
    [line] = [line for line in lines if not re.match("usage: |  +", line)]
    assert re.match("error: |program: error: ", line), said.getvalue()
    return line


def free_frames(error):
    """Ends a DataLoader among them, whose workers would hold up the garbage collector for ten seconds."""
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def in_two_processes(main, arguments, folder):
    """Runs a program as torchrun would, but in forks of this process -> what each of the two printed.

    Forks have imported everything already, which is most of what torchrun's processes do in a short test.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context, folder = multiprocessing.get_context("fork"), Path(folder)
    processes = [context.Process(target=work, args=(main, arguments, rank, port, folder), daemon=True)
                 for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    said = [(folder / f"said{rank}.txt").read_text() for rank in (0, 1)]
    assert [process.exitcode for process in processes] == [0, 0], said
    return said


def work(main, arguments, rank, port, folder):
    """One of the two. Its output goes to a file, since pytest's capture does not reach into forks."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open(folder / f"said{rank}.txt", "w") as said, redirect_stdout(said), redirect_stderr(said):
        main(command_line(*arguments))
        dist.destroy_process_group()


def read_checkpoint(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)


def read_results(folder):
    """-> the report and the predictions that evaluate.py left."""
    return read_json(folder / "report.json"), read_json(folder / "predictions.json")


def to_train(tiny, data, out, *more):
    """A command line of train.py: an epoch on data, photo by photo, into out."""
    return command_line(
        "--data", data, "--descriptions", data / "descriptions.json",
        "--llm", tiny / "llm", "--vit", tiny / "vit", "--out", out,
        "--image-size", 56, "--epochs", 1, "--batch", 4, "--workers", 0, *more)


def train_briefly(tiny, folder, *more):
    """Trains an epoch on wagons and kites in folder/data -> folder, with ckpt.pt in it."""
    train.main(to_train(tiny, make_wagons_and_kites(folder / "data"), folder, *more))
    return folder


def know_answers(patch):
    """Gives predict.py a Locator whose answers are known: keypoint k is at 0.1 + 0.2 k of the photo.

    -> a list, for each time that it is asked: the sizes of the photos, their keypoints, and their boxes.
    """
    from predict import Found, Locator
    asked = []

    def answer(self, photos, categories, boxes):
        categories = categories if isinstance(categories, list) else [categories] * len(photos)
        asked.append(([photo.size for photo in photos], [one.keypoints for one in categories], boxes))
        return [{name: Found((0.1 + 0.2 * k) * photo.width, (0.1 + 0.2 * k) * photo.height, 0.9 - 0.3 * k,
                             None, None, (0, 0, photo.width))
                 for k, (name, _) in enumerate(category.keypoints)}
                for photo, category in zip(photos, categories)]
    patch.setattr(Locator, "__call__", answer)
    return asked
