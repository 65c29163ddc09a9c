"""checkpoint.py, log.py and common.Stop: a run resumes where it was stopped, and is alone in its folder."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
from mp100 import make_wagons_and_kites
from PIL import Image
from programs import (
    SUBPROCESS,
    command_line,
    free_frames,
    in_two_processes,
    read_checkpoint,
    refused,
    to_train,
)

import common
import train
from checkpoint import lock_folder
from common import InputError, Stop
from log import Log, read_log


@pytest.fixture
def arguments(tiny, tmp_path):
    """arguments("--lr", 1, out="a") -> a command line of 8 steps in 2 epochs that saves each."""
    data = make_wagons_and_kites(tmp_path / "data")

    def make(*more, out="run"):
        return to_train(tiny, data, tmp_path / out, "--rounds", 2, "--epochs", 2, "--save-every", 1, *more)
    return make


def kill_in_step(step, number, monkeypatch):
    """From now on the process gets this signal when it has computed the gradients of this step, from 0."""
    add = train.add_gradients

    def add_and_kill(model, learner, loader, now, *rest):
        result = add(model, learner, loader, now, *rest)
        if now == step:
            os.kill(os.getpid(), number)
        return result
    monkeypatch.setattr(train, "add_gradients", add_and_kill)


def steps_in_log(folder):
    return [line["step"] for line in read_log(folder / "log.jsonl")]


def assert_same_run(folder, other):
    ours, theirs = read_checkpoint(folder), read_checkpoint(other)
    for part in "model", "optimizer", "step":
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
    assert [line["loss"] for line in read_log(folder / "log.jsonl")] == [
        line["loss"] for line in read_log(other / "log.jsonl")]


# ------------------------------------------------------------------------------------------------- stopped


@pytest.mark.parametrize("number, error, code", [(signal.SIGTERM, SystemExit, 143),
                                                 (signal.SIGINT, KeyboardInterrupt, None)])
def test_a_signal_finishes_the_step_and_the_same_command_goes_on(
        arguments, tmp_path, capsys, number, error, code):
    train.main(arguments(out="straight"))
    before = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(error) as stop:
        kill_in_step(2, number, patch)
        train.main(arguments("--save-every", 100))
    free_frames(stop.value)
    assert code is None or stop.value.code == code
    assert signal.getsignal(number) is before
    assert read_checkpoint(tmp_path / "run")["step"] == 3
    assert "stopped after step 3 of 8; to resume: the same command again" in capsys.readouterr().out

    train.main(arguments("--save-every", 100))
    path = tmp_path / "run/ckpt.pt"
    assert f"resumes from step 3: {path}\n" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    assert steps_in_log(tmp_path / "run") == [*range(1, 9)]

    finished = path.read_bytes()
    train.main(arguments())
    train.main(command_line("--resume", path, "--out", tmp_path / "other"))
    assert capsys.readouterr().out.count(f"finished already, after 8 steps: {path}\n") == 2
    assert path.read_bytes() == finished and not (tmp_path / "other").exists()


def test_a_run_stopped_at_a_validation_has_saved_and_validates_all_the_same(arguments, tmp_path, monkeypatch):
    annotations, saved = tmp_path / "data/annotations", []
    shutil.copy(annotations / "mp100_split1_test.json", annotations / "mp100_split1_val.json")
    measure = train.Validation.measure

    def look_and_measure(self, model):
        saved.append(read_checkpoint(tmp_path / "run")["step"])
        return measure(self, model)
    monkeypatch.setattr(train.Validation, "measure", look_and_measure)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        kill_in_step(2, signal.SIGTERM, patch)
        train.main(arguments("--validate", 3))
    free_frames(stop.value)
    train.main(arguments("--validate", 3))
    assert Log(tmp_path / "run", 8).series("objects") == [(3, 6), (6, 6), (8, 6)]
    assert saved == [3, 5, 7]  # only a run that is being stopped saves first


def test_the_second_ctrl_c_acts_at_once():
    with pytest.raises(KeyboardInterrupt), Stop() as stop:
        assert stop.signal == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_two_processes_stop_after_the_same_step_if_one_gets_the_signal(arguments, tmp_path):
    def main(argv):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            if os.environ["RANK"] == "1":
                kill_in_step(2, signal.SIGTERM, patch)
            train.main(argv)
    said = in_two_processes(main, arguments(), tmp_path)
    assert "stopped after step 3 of 8" in said[0] and "stopped" not in said[1]
    assert read_checkpoint(tmp_path / "run")["step"] == 3


def test_a_process_that_hangs_is_not_waited_for_for_ever(arguments, tmp_path):
    def main(argv):
        add = train.add_gradients

        def hang(model, learner, loader, step, *rest):
            if step == 2 and os.environ["RANK"] == "1":
                time.sleep(6)
            return add(model, learner, loader, step, *rest)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError) as error:
            patch.setattr(common, "PATIENCE", timedelta(seconds=3))
            patch.setattr(train, "add_gradients", hang)
            train.main(argv)
        print(common.explain(error.value))  # with the usual patience again
    said = in_two_processes(main, arguments(), tmp_path)
    assert "another process has not answered for 0:10:00" in said[0]
    assert read_checkpoint(tmp_path / "run")["step"] == 2


def test_a_run_that_is_killed_goes_on_to_the_same_end(arguments, tmp_path):
    """tests/kill.py does this as often as one likes, and under torchrun."""
    train.main(arguments("--epochs", 5, out="straight"))
    command = [sys.executable, "train.py", *arguments("--epochs", 5, "--workers", 1)]
    program = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **SUBPROCESS)
    while len(steps_in_log(tmp_path / "run")) < 5 and program.poll() is None:
        time.sleep(0.01)
    program.kill()
    program.communicate()
    assert 4 <= read_checkpoint(tmp_path / "run")["step"] < 20
    (tmp_path / "run/ckpt.part").write_bytes(b"half")
    with open(tmp_path / "run/log.jsonl", "a") as log:
        log.write('{"step": 19, "loss": 1.0}\n{"st')  # as if the log had gone further, and were cut off
    train.main(arguments("--epochs", 5, "--workers", 1))
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    assert not list((tmp_path / "run").glob("*.part"))


def test_arguments_that_change_the_result_are_named_and_others_may_differ(arguments, tmp_path):
    train.main(arguments("--epochs", 1))
    line = refused(train, arguments("--epochs", 1, "--lr", 0.125, "--seed", 1, "--workers", 1))
    assert "--lr 0.125 (the checkpoint: 0.0005), --seed 1 (the checkpoint: 42)." in line
    assert "--workers" not in line and "--fresh" in line and f"--resume {tmp_path}/run/ckpt.pt" in line
    train.main(arguments("--epochs", 1, "--workers", 1, "--log-every", 7, "--compile"))  # finished already
    assert "give only one of them" in refused(train, ["--resume", "a.pt", "--fresh"])


def test_other_data_are_refused_unless_the_checkpoint_is_named(arguments, tmp_path, capsys):
    train.main(arguments("--epochs", 1))
    checkpoint, descriptions = tmp_path / "run/ckpt.pt", tmp_path / "data/descriptions.json"
    annotations = tmp_path / "data/annotations/mp100_split1_train.json"
    for path, old, new in (descriptions, "the roof of", "the top of"), (annotations, "[10, 15, 56, 50]",
                                                                        "[10, 15, 56, 49]"):
        before = path.read_text()
        assert old in before
        path.write_text(before.replace(old, new))
        line = refused(train, arguments("--epochs", 1))
        assert f"{checkpoint}: its run had other objects" in line and f"--resume {checkpoint}" in line
        path.write_text(before)
    train.main(arguments("--epochs", 1))
    descriptions.write_text(descriptions.read_text().replace("the roof of", "the top of"))
    train.main(arguments("--epochs", 1, "--resume", checkpoint))
    assert capsys.readouterr().out.count("finished already") == 2


def test_fresh_starts_anew_but_not_when_torchrun_restarts_it(arguments, tmp_path, monkeypatch, capsys):
    train.main(arguments("--epochs", 1))
    train.main(arguments("--epochs", 1, "--seed", 1, "--fresh"))
    assert read_checkpoint(tmp_path / "run")["args"]["seed"] == 1
    assert steps_in_log(tmp_path / "run") == [1, 2, 3, 4]
    assert "resumes" not in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train.main(arguments("--epochs", 1, "--seed", 1, "--fresh"))
    assert "finished already" in capsys.readouterr().out


def test_fresh_deletes_no_checkpoint_if_the_run_cannot_start(arguments, tmp_path):
    train.main(arguments("--epochs", 1))
    checkpoint, other = tmp_path / "run/ckpt.pt", tmp_path / "other.pt"
    before = checkpoint.read_bytes()
    other.write_bytes(b"none")
    for start, reason in (checkpoint, "--fresh would delete"), (other, "not a checkpoint"):
        assert reason in refused(train, arguments("--fresh", "--init", start))
        assert checkpoint.read_bytes() == before and steps_in_log(tmp_path / "run") == [1, 2, 3, 4]


def test_machines_that_see_different_checkpoints_are_refused(monkeypatch):
    device = torch.device("cpu")
    for other, is_fine in (7, True), (6, False), (0, False):
        monkeypatch.setattr(train.dist, "all_reduce", lambda t: t.add_(torch.tensor([other, other ** 2])))
        if is_fine:
            train.agree_on_step(7, 2, device)
        else:
            with pytest.raises(InputError, match="not all machines see the same checkpoint"):
                train.agree_on_step(7, 2, device)


# ------------------------------------------------------------------------------------------------- the folder


def hold(folder, ready):
    lock = lock_folder(folder)
    ready.set()
    time.sleep(60)
    lock.close()


def test_a_folder_in_use_is_refused_until_the_other_run_ends_even_by_a_kill(arguments, tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    other = context.Process(target=hold, args=(tmp_path / "run", ready))
    other.start()
    assert ready.wait(30)
    line = refused(train, arguments())
    assert f"{tmp_path}/run: in use by another run (process {other.pid} on " in line
    other.kill()
    other.join()
    lock_folder(tmp_path / "run").close()


def test_a_folder_where_an_unfinished_file_goes_is_one_line(arguments, tmp_path):
    (tmp_path / "run/ckpt.part").mkdir(parents=True)
    assert "ckpt.part: is a folder" in refused(train, arguments())


def test_the_log_holds_every_step_and_the_curve_is_drawn(arguments, tmp_path):
    train.main(arguments("--log-every", 5))
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["epoch"]) for line in lines] == [(n, 1 + (n > 4)) for n in range(1, 9)]
    assert all(line["loss"] > 0 < line["norm"] and 0 <= line["waited"] <= 1 for line in lines)
    assert lines[0]["lr"] == 0 and lines[1]["lr"] == 5e-4
    assert all(0 < line["seconds"] < 60 < line["tokens_per_second"] for line in lines)
    with Image.open(tmp_path / "run/curve.png") as curve:
        assert curve.size == (900, 400) and len(curve.convert("RGB").getcolors(10**6)) > 4


def test_a_log_begins_where_the_run_resumes(tmp_path):
    log = Log(tmp_path, 0)
    log.write(step=1, loss=1.5, lr=0.0)
    log.write(step=1, **{"PCK@0.2": 0.5, "objects": 3})
    assert Log(tmp_path, 1).series("PCK@0.2") == [(1, 0.5)] and Log(tmp_path, 0).lines == []
