"""train.py and tools/run.py: the same result however the work is cut up, stopped and resumed; the published
recipe; what trains, what is written and what is refused.

Most tests train for 8 steps on wagons and kites: 15 conversations an epoch, 4 a step, the last filled up.
"""

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from mp100 import make_wagons_and_kites
from PIL import Image
from programs import SUBPROCESS, free_frames, in_two_processes, read_checkpoint, refused, to_train

import data
import evaluate
import tools.run
import train
from common import read_json
from model import CapeLLM, load_network

PROJECTION = {"projection.weight", "projection.bias"}
ADAPTED = [*(f"vit.blocks.{i}.attn.{x}" for i in (0, 1) for x in "qv"),
           *(f"llama.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qv")]
LORA = {f"{layer}.lora_{matrix}" for layer in ADAPTED for matrix in "AB"}
FROZEN = ["--tune-vit", "frozen", "--tune-llm", "frozen"]
CPU = torch.device("cpu")


def make_arguments(tiny, folder):
    """-> arguments("--lr", 1, out="a"), which makes a command line. The data are in folder/data."""
    made = make_wagons_and_kites(folder / "data")
    annotations = made / "annotations"
    shutil.copy(annotations / "mp100_split1_test.json", annotations / "mp100_split1_val.json")
    return lambda *more, out="run": to_train(tiny, made, folder / out, "--rounds", 2, "--epochs", 2, *more)


@pytest.fixture
def arguments(tiny, tmp_path):
    return make_arguments(tiny, tmp_path)


@pytest.fixture
def trained(arguments, tmp_path):
    """trained(...) trains with these arguments -> the checkpoint."""
    def make(*more, out="run"):
        train.main(arguments(*more, out=out))
        return read_checkpoint(tmp_path / out)
    return make


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    train.main(make_arguments(tiny, folder)())
    return folder / "run"


def train_until(step, number, arguments):
    """Trains, and gets a signal when the gradients of a step, from 1, are computed -> the exit code."""
    add = train.add_gradients

    def add_and_kill(model, learner, batches, now, *rest):
        result = add(model, learner, batches, now, *rest)
        if now + 1 == step:
            os.kill(os.getpid(), number)
        return result
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train, "add_gradients", add_and_kill)
        train.main(arguments)
    free_frames(stop.value)
    return stop.value.code


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def column(folder, key):
    """What the log says of each step."""
    lines = read_log(folder)
    assert [line["step"] for line in lines] == [*range(1, len(lines) + 1)]
    return np.array([line[key] for line in lines])


def assert_equal(a, b, atol=0.0):
    """Bit by bit, unless atol says otherwise."""
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def assert_same_run(folder, other):
    ours, theirs = read_checkpoint(folder), read_checkpoint(other)
    for part in "model", "optimizer", "step", "best":
        assert_equal(ours[part], theirs[part])
    assert len(ours["optimizer"]["state"]) == len(ours["model"])
    losses = [{line["step"]: line["loss"] for line in read_log(run)} for run in (folder, other)]
    assert losses[0] == losses[1]  # of a step that was repeated, the last line counts


# ----------------------------------------------------------------------------- the same, however it is cut up


def test_two_processes_give_the_parameters_and_losses_of_one(arguments, trained, tmp_path):
    """2 processes x 2 accumulated = 1 x 4, with dropout and clipped gradients, started by torchrun itself."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--clip", 0.05, "--validate", 3]
    command = [*torchrun, "train.py", *arguments(*options, out="two")]
    done = subprocess.run(command, capture_output=True, **SUBPROCESS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("batch 4 = micro-batch 1 x 2 processes x 2 accumulated, on cpu") == 1
    one, two = trained(*options, out="one"), read_checkpoint(tmp_path / "two")
    for key in "loss", "norm":  # the norm tells of a wrong mean, which AdamW would not mind
        assert column(tmp_path / "two", key) == pytest.approx(column(tmp_path / "one", key), abs=1e-4)
    assert_equal(one["model"], two["model"], atol=1e-6)
    moved = [t.abs().max() for name, t in one["model"].items() if name.endswith("lora_B")]  # from zero
    assert min(moved) > 1e-3
    assert scores_of(tmp_path / "two") == scores_of(tmp_path / "one")


def test_the_size_of_micro_batches_changes_nothing(trained, tmp_path):
    """Nothing of the gradients. Dropout, here without an adapter to act on, is drawn by micro-batch."""
    weights = [trained("--micro-batch", n, *FROZEN, out=f"micro{n}")["model"] for n in (4, 1)]
    assert_equal(weights[1], weights[0], atol=1e-5)
    for key in "loss", "norm":
        assert column(tmp_path / "micro1", key) == pytest.approx(column(tmp_path / "micro4", key), abs=1e-4)


def test_each_micro_batch_has_its_own_dropout():
    drawn, numbers = set(), [*range(100), *range(2**12, 2**12 + 100)]  # where 32 bits of a seed overflow
    for number in numbers:
        train.seed_dropout(42, number)
        drawn.add(torch.rand(()).item())
    assert len(drawn) == len(numbers)


def test_the_last_batch_is_filled_and_processes_share_it_out():
    def cut(n, steps, rank, world, batch=4, micro_batch=1):
        return [*train.micro_batches(n, steps, Namespace(batch=batch, micro_batch=micro_batch), rank, world)]
    assert cut(6, range(2), 0, 1) == [[0], [1], [2], [3], [4], [5], [0], [1]]
    assert cut(6, range(2), 1, 2) == [[1], [3], [5], [1]]  # the second of two processes
    assert cut(6, range(1, 2), 0, 2) == [[4], [0]]  # restarted after a step
    assert cut(3, range(1), 0, 1, batch=8, micro_batch=4) == [[0, 1, 2, 0], [1, 2, 0, 1]]


def test_checkpointed_activations_train_to_the_same_weights(straight, trained):
    again = trained("--checkpoint-activations")["model"]
    assert_equal(again, read_checkpoint(straight)["model"], atol=1e-5)


# ------------------------------------------------------------------------------------------------- validation


def scores_of(folder):
    return {line["step"]: line["PCK@0.2"] for line in read_log(folder) if "PCK@0.2" in line}


def test_validation_changes_nothing(straight, trained, tmp_path):
    trained("--validate", 3)
    ours, theirs = read_checkpoint(tmp_path / "run"), read_checkpoint(straight)
    for part in "model", "optimizer":
        assert_equal(ours[part], theirs[part])
    assert [*scores_of(tmp_path / "run")] == [3, 6, 8] and not (straight / "best.pt").exists()


def test_the_best_is_kept_also_of_a_run_that_was_stopped(arguments, tmp_path, monkeypatch):
    """Scores are feigned. A run that is asked to end does not begin a validation."""
    scores, options = iter([0.5, 0.7, 0.6, 0.7]), ["--validate", 2, "--save-every", 100]
    monkeypatch.setattr(tools.run.Validation, "measure", lambda self, model: next(scores))
    assert train_until(4, signal.SIGTERM, arguments(*options)) == 143
    assert scores_of(tmp_path / "run") == {2: 0.5} and read_checkpoint(tmp_path / "run")["step"] == 4
    train.main(arguments(*options))
    assert scores_of(tmp_path / "run") == {2: 0.5, 6: 0.7, 8: 0.6}
    assert torch.load(tmp_path / "run/best.pt")["step"] == 6


# ---------------------------------------------------------------------------------------- stopped and resumed


@pytest.mark.parametrize("workers, step, number", [  # an epoch has 4 steps
    (0, 1, signal.SIGTERM), (0, 4, signal.SIGINT), (2, 6, signal.SIGTERM)])
def test_a_signal_finishes_the_step_and_the_same_command_goes_on_bit_by_bit(
        arguments, straight, tmp_path, capsys, workers, step, number):
    before, command = signal.getsignal(number), arguments("--workers", workers)
    assert train_until(step, number, command) == 128 + number
    assert signal.getsignal(number) is before and read_checkpoint(tmp_path / "run")["step"] == step
    assert f"stopped after step {step} of 8; the same command resumes" in capsys.readouterr().out
    train.main(command)
    assert f"steps {step} to 8 in 2 epochs" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", straight)
    finished = (tmp_path / "run/ckpt.pt").read_bytes()
    train.main(command)
    assert f"finished already, after 8 steps: {tmp_path}/run/ckpt.pt" in capsys.readouterr().out
    assert (tmp_path / "run/ckpt.pt").read_bytes() == finished and len(read_log(tmp_path / "run")) == 8


def test_the_second_ctrl_c_acts_at_once():
    def press_twice():
        with tools.run.catch_signals() as caught:
            os.kill(os.getpid(), signal.SIGINT)
            if caught == [signal.SIGINT]:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
    process = multiprocessing.get_context("fork").Process(target=press_twice)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGINT


def test_two_processes_stop_after_the_same_step_if_one_gets_the_signal(arguments, tmp_path):
    def main(argv):
        if os.environ["RANK"] == "1":
            assert train_until(3, signal.SIGINT, argv) == 130
        else:
            with pytest.raises(SystemExit):
                train.main(argv)
    said = in_two_processes(main, arguments(), tmp_path)
    assert "stopped after step 3 of 8" in said[0] and "stopped" not in said[1]
    assert read_checkpoint(tmp_path / "run")["step"] == 3


def start_and_wait(arguments, folder, steps, **how):
    """-> train.py as a process of its own that has trained up to this step."""
    program = subprocess.Popen([sys.executable, "train.py", *arguments], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, **SUBPROCESS, **how)
    log = folder / "log.jsonl"
    while program.poll() is None and not (log.exists() and log.read_text().count("\n") >= steps):
        time.sleep(0.01)
    return program


def test_a_program_stopped_by_ctrl_c_and_then_killed_goes_on_to_the_same_end(arguments, tmp_path):
    """tests/kill.py kills as often as one likes, and under torchrun."""
    options, run = ["--workers", 1, "--save-every", 1, "--epochs", 3], tmp_path / "run"
    train.main(arguments(*options, out="straight"))
    program = start_and_wait(arguments(*options), run, 2, start_new_session=True,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    os.killpg(program.pid, signal.SIGINT)  # as from a terminal, which sends it to the workers, too
    said, errors = program.communicate(timeout=300)
    assert program.returncode == 130 and "Traceback" not in errors, errors
    step = read_checkpoint(run)["step"]
    assert f"stopped after step {step} of 12; the same command resumes\n" in said
    program = start_and_wait(arguments(*options), run, step + 2)
    program.kill()
    program.communicate()
    assert step < read_checkpoint(run)["step"] < 12
    (run / "ckpt.part").write_bytes(b"half")
    train.main(arguments(*options))
    assert_same_run(run, tmp_path / "straight")
    assert not list(run.glob("*.part"))


def test_other_arguments_descriptions_or_damage_are_refused_and_nothing_is_touched(
        arguments, tmp_path, capsys):
    train.main(arguments("--epochs", 1))
    path, descriptions = tmp_path / "run/ckpt.pt", tmp_path / "data/descriptions.json"
    good = path.read_bytes()
    line = refused(train, arguments("--epochs", 1, "--lr", 0.125, "--seed", 1, "--workers", 1))
    assert f"{path} is of a run with --lr 0.0005, not 0.125; --seed 42, not 1. Start anew with --f" in line
    train.main(arguments("--epochs", 1, "--workers", 1, "--save-every", 7))
    assert "finished already" in capsys.readouterr().out  # these change nothing of what is learned
    descriptions.write_text(descriptions.read_text().replace("the roof of", "the top of"))
    assert f"{path} is of a run with other descriptions. Start" in refused(train, arguments("--epochs", 1))
    assert path.read_bytes() == good
    descriptions.write_text(descriptions.read_text().replace("the top of", "the roof of"))
    annotations = tmp_path / "data/annotations/mp100_split1_train.json"
    contents = json.loads(annotations.read_text())
    one = next(one for one in contents["annotations"] if one["category_id"] == 1)
    contents["annotations"] += [one | {"id": 1000 + n} for n in range(4)]
    annotations.write_text(json.dumps(contents))
    assert re.search(f"{path} is of a run with 4 steps, not 7, on other data", refused(
        train, arguments("--epochs", 1)))
    assert path.read_bytes() == good
    for bad in good[:-1000], b"", b"text":
        path.write_bytes(bad)
        for program, argv in (train, arguments("--epochs", 1)), (evaluate, [path]):
            assert re.search(f"{path}: cannot be read .*is it a checkpoint", refused(program, argv))
        assert path.read_bytes() == bad


def test_fresh_starts_anew_but_not_when_torchrun_restarts_it_nor_if_the_run_cannot_start(
        arguments, trained, tmp_path, monkeypatch, capsys):
    run, other = tmp_path / "run", tmp_path / "other.pt"
    trained("--epochs", 1, "--validate", 4)
    before = (run / "ckpt.pt").read_bytes()
    other.write_bytes(b"none")
    for start, reason in (run / "ckpt.pt", "would delete"), (other, "is it a checkpoint"):
        assert reason in refused(train, arguments("--fresh", "--init", start))
        assert (run / "ckpt.pt").read_bytes() == before and len(read_log(run)) == 4
    (tmp_path / "data/annotations/mp100_split1_val.json").unlink()
    assert "val.json: no such file" in refused(train, arguments("--fresh", "--validate", 4))
    assert (run / "ckpt.pt").read_bytes() == before
    (run / "ckpt.pt").rename(tmp_path / "kept.pt")
    assert "would delete" in refused(train, arguments("--init", run / "best.pt"))
    (tmp_path / "kept.pt").rename(run / "ckpt.pt")
    assert trained("--seed", 1, "--fresh")["args"]["seed"] == 1
    assert len(column(run, "loss")) == 8 and not (run / "best.pt").exists()
    assert "finished already" not in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train.main(arguments("--seed", 1, "--fresh"))
    assert "finished already" in capsys.readouterr().out
    assert "failed before it began" in refused(train, arguments("--seed", 2, "--fresh"))


# ------------------------------------------------------------------------------------------------- the recipe


def test_rate_and_decay_are_those_of_the_published_trainer(arguments, tmp_path):
    """Hugging Face's: its rate at each step, and the parameters that it lets decay."""
    transformers = pytest.importorskip("transformers")

    def decaying(optimizer):
        return {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for tune in "lora", "full":
        args = train.parse_arguments(arguments("--tune-vit", tune, "--tune-llm", tune))
        model, _ = load_network(args)
        theirs = transformers.Trainer(model, transformers.TrainingArguments(
            tmp_path, learning_rate=5e-4, warmup_steps=0.03, weight_decay=0.01, lr_scheduler_type="cosine",
            use_cpu=True, report_to="none"))
        theirs.create_optimizer()
        ours = train.make_optimizer(model, args, CPU)
        # It does not know the class of our RMSNorm, and would let it decay. LayerScale is no norm to it.
        unknown = {id(p) for name, p in model.llama.named_parameters() if "norm" in name}
        assert decaying(ours) == decaying(theirs.optimizer) - unknown and len(decaying(ours)) > 10
    scheduler = theirs.create_scheduler(99)
    for step in range(99):
        assert train.learning_rate(step, 99, args) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        scheduler.optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("options, clip", [([], 1.0), (["--clip", 0], math.inf)])
def test_the_norm_of_gradients_is_clipped(trained, tmp_path, monkeypatch, options, clip):
    """To 1 by default. Losses are 20-fold here, so that the norm is above it. The log tells it unclipped."""
    norms, step, forward = [], torch.optim.AdamW.step, CapeLLM.forward

    def measure_and_step(optimizer):
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())
        return step(optimizer)
    monkeypatch.setattr(torch.optim.AdamW, "step", measure_and_step)
    monkeypatch.setattr(CapeLLM, "forward", lambda *batch: 20 * forward(*batch))
    trained("--epochs", 1, *options)
    before = column(tmp_path / "run", "norm")
    assert 1.1 < min(before)
    assert norms == pytest.approx(np.minimum(before, clip), abs=1e-5)


def test_it_says_the_arithmetic_and_logs_every_step(trained, tiny, tmp_path, capsys):
    trained("--lr", 0.25, "--warmup", 0.25)
    said, lines = capsys.readouterr().out, read_log(tmp_path / "run")
    assert "6 objects of 2 categories\nsteps 0 to 8 in 2 epochs; batch 4 = micro-batch 1 x 1 processes x 4 " \
        "accumulated, on " in said and re.search(r"^[\d,]+ of [\d,]+ parameters train$", said, re.M)
    assert [(line["step"], line["epoch"]) for line in lines] == [(n, 1 + (n > 4)) for n in range(1, 9)]
    cosine = [0.125 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert column(tmp_path / "run", "lr") == pytest.approx([0, 0.125, *cosine])
    assert all(0 < line["seconds"] < 60 < line["tokens_per_second"] for line in lines)
    vocabulary = read_json(tiny / "llm" / "config.json")["vocab_size"]
    assert lines[0]["loss"] == pytest.approx(math.log(vocabulary), abs=1)
    Image.open(tmp_path / "run/curve.png").close()


@pytest.mark.parametrize("how, steps", [
    (["--rounds", 5], 2),  # 1 group of each: 6 examples; with --rounds 2 it is 4, see above
    (["--rounds", "dynamic"], 3),  # as many as fours: 2 of each wagon, 1 of each kite
    (["--pack"], 2),  # the groups of a photo together
], ids=str)
def test_the_length_of_an_epoch(trained, how, steps):
    assert trained(*how, "--epochs", 1)["step"] == steps


def test_loss_falls(trained, tmp_path):
    trained("--epochs", 4, "--lr", 0.02, "--tune-llm", "full", "--micro-batch", 4)
    losses = column(tmp_path / "run", "loss")
    assert len(losses) == 16 and max(losses[-4:]) < 0.5 * losses[0]


@pytest.mark.parametrize("vit, llm", [("lora", "lora"), ("full", "frozen"), ("frozen", "full")])
def test_trains_and_saves_what_it_says_and_leaves_the_rest_untouched(
        arguments, trained, tmp_path, monkeypatch, vit, llm):
    models, load = [], train.load_network
    monkeypatch.setattr(train, "load_network", lambda *args: models.append(load(*args)) or models[0])
    checkpoint = trained("--tune-vit", vit, "--tune-llm", llm, "--epochs", 1)
    own = dict(models[0][0].named_parameters())
    published = dict(load(train.parse_arguments(arguments(*FROZEN)))[0].named_parameters())
    names = {"lora": LORA, "full": published.keys() - PROJECTION, "frozen": set()}
    expected = {name for name in names[vit] if name.startswith("vit")} | PROJECTION
    expected |= {name for name in names[llm] if name.startswith("llama")}
    assert_equal(checkpoint["model"], {name: own[name].detach() for name in expected})
    assert all(own[name].any() for name in expected if name.endswith("lora_B"))
    for name in published.keys() - PROJECTION:
        name_in_adapter = re.sub(r"(\w+)$", r"base.\1", name)  # which keeps the layer as its base
        is_untouched = torch.equal(own.get(name, own.get(name_in_adapter)), published[name])
        assert is_untouched == (name not in expected), name


def test_init_starts_from_all_that_trains_and_its_networks_and_init_projection_from_one_layer(
        arguments, straight, tmp_path):
    path = straight / "ckpt.pt"
    contents, words = read_checkpoint(straight), arguments("--init", path)
    for option, taken in ("--init", PROJECTION | LORA), ("--init-projection", PROJECTION):
        started = train.load(train.parse_arguments(arguments(option, path)), CPU, None)[0]
        own = dict(started.named_parameters())
        assert {name for name, t in contents["model"].items() if torch.equal(own[name], t)} == taken
    given = train.parse_arguments(words)
    for name in "--llm", "--vit", "--image-size":
        del words[words.index(name):words.index(name) + 2]
    assert train.parse_arguments(words) == given
    assert train.parse_arguments([*words, "--llm", "b"]).llm == "b"
    train.main([*words, "--out", str(tmp_path / "straight")])
    train_until(3, signal.SIGTERM, words)
    train.main(words)  # which does not start from there again
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    wide = {"projection.weight": torch.zeros(9, 9), "projection.bias": torch.zeros(9)}
    torch.save(contents | {"model": wide}, path := tmp_path / "wide.pt")
    for option in "--init", "--init-projection":
        line = refused(train, arguments(option, path, out="other"))
        assert f"{path}: its projection is of networks of other" in line


# -------------------------------------------------------------------------------------------- what goes wrong


WRONG = [
    ("--micro-batch 3", "--batch 4 is not a multiple of --micro-batch 3 x 1"),
    ("--llm nowhere", "nowhere: no such folder"), ("--split 6", "mp100_split6_train.json: no such file"),
    ("--init nowhere.pt", "nowhere.pt: no such file"), ("--init tests", "tests: cannot be read"),
    ("--descriptions nowhere.json", "nowhere.json: no such file"),
    ("--image-size 57", "57 is not a multiple of the ViT's patches, 14"), (f"--seed {2**32}", "below 2**32"),
    ("--init a.pt --init-projection b.pt", "a.pt: no such file"),
    (f"--init {ROOT}/assets/toy/ckpt.pt --init-projection b.pt", "not both"),
    (f"--out {ROOT}/train.py/x", "train.py: cannot be written"),
    ("--instruction long", "long: no such instruction; there are description, name"),
    ("--pretrain direct --instruction name", "leave out --instruction"),
    ("--pretrain direct --validate 3", "locates nothing"), ("--epoch 3", "--epoch"),
    ("--rounds many", "--rounds: invalid value: 'many'"), ("--seed -1", "--seed"), ("--batch 0", "--batch"),
    ("--clip -1", "--clip -1.0: give a number from 0 to inf"), ("--lr nan", "--lr nan: give"),
    ("--lr inf", "--lr inf: give"), ("--warmup 500", "--warmup 500.0: give a number from 0 to 1"),
    ("--weight-decay -1", "--weight-decay -1.0: give")]


@pytest.mark.parametrize("data, split, out", [
    ("data/mp100", 1, "split1"), ("data/mp100/", 3, "split3"), ("elsewhere/mp100", 1, "mp100"),
    ("elsewhere/mp100", 3, "mp100-split3"), ("data/teapots/.", 1, "teapots"), ("data/a/..", 2, "data-split2")
])
def test_each_data_and_split_has_a_run_of_its_own(data, split, out):
    assert train.parse_arguments(["--data", data, "--split", str(split)]).out == f"runs/{out}"


@pytest.mark.parametrize("wrong, message", WRONG)
def test_wrong_arguments_are_one_line(arguments, wrong, message):
    assert message in refused(train, arguments(*wrong.split()))


def test_a_run_without_visible_keypoints_or_objects_is_refused(arguments, tmp_path):
    path = tmp_path / "data" / "annotations" / "mp100_split1_train.json"
    contents = json.loads(path.read_text())
    for annotation in contents["annotations"]:
        annotation["keypoints"][2::3] = [0] * (len(annotation["keypoints"]) // 3)
    path.write_text(json.dumps(contents))
    assert "no visible keypoint to train on" in refused(train, arguments())
    path.write_text(json.dumps(contents | {"annotations": []}))
    assert "no object" in refused(train, arguments())


def test_missing_photos_stop_a_run_or_are_left_out(arguments, trained, tmp_path, capsys):
    for name in "wagon/0", "kite/1":
        (tmp_path / f"data/images/{name}.jpg").unlink()
    assert "2 of 6 objects" in refused(train, arguments())
    trained("--allow-missing", "--epochs", 1)
    assert "4 objects of 2 categories" in capsys.readouterr().out


def test_a_full_disk_leaves_the_last_checkpoint_whole(arguments, tmp_path, monkeypatch):
    save = torch.save

    def fill_up(contents, path):
        if contents["step"] < 3:
            return save(contents, path)
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")
    monkeypatch.setattr(torch, "save", fill_up)
    line = refused(train, arguments("--save-every", 1))
    assert "failed writing file" in line and str(tmp_path / "run" / "ckpt.pt") in line
    assert read_checkpoint(tmp_path / "run")["step"] == 2
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_gradient_that_is_no_number_stops_before_it_is_saved(arguments, tmp_path, monkeypatch):
    losses, forward = [], CapeLLM.forward

    def break_in_the_third_step(self, *batch):
        losses.append(forward(self, *batch))
        if len(losses) == 9:  # 4 micro-batches a step
            losses[-1].register_hook(lambda gradient: gradient * math.inf)
        return losses[-1]
    monkeypatch.setattr(CapeLLM, "forward", break_in_the_third_step)
    line = refused(train, arguments("--save-every", 1))
    assert re.search("step 3: loss .*(nan|inf).* lower --lr", line) and len(losses) == 12
    checkpoint = read_checkpoint(tmp_path / "run")
    assert checkpoint["step"] == 2 and all(t.isfinite().all() for t in checkpoint["model"].values())


def test_a_worker_that_is_killed_is_one_line_that_names_the_way_out(arguments, monkeypatch):
    monkeypatch.setattr(data, "collate", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    line = refused(train, arguments("--workers", 1))
    assert "lost another process" in line and "--workers 0" in line
