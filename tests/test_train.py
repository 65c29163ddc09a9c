"""train.py: the same result however the work is cut up, stopped and resumed; what trains, what is written and
what is refused.

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
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from mp100 import make_wagons_and_kites
from PIL import Image
from programs import (
    SUBPROCESS,
    command_line,
    free_frames,
    in_two_processes,
    read_checkpoint,
    read_results,
    refused,
    to_train,
)

import evaluate
import train
from common import Process, read_json
from data import annotation_file, collate, normalize, parse_descriptions, plan_epoch, read_instances
from model import CapeLLM, load_network

PROJECTION = {"projection.weight", "projection.bias"}
ADAPTED = [*(f"vit.blocks.{i}.attn.{x}" for i in (0, 1) for x in "qv"),
           *(f"llama.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qv")]
LORA = {f"{layer}.lora_{matrix}" for layer in ADAPTED for matrix in "AB"}
FROZEN = ["--tune-vit", "frozen", "--tune-llm", "frozen"]
CPU = torch.device("cpu")


@pytest.fixture
def arguments(tiny, tmp_path):
    """arguments("--lr", 1, out="a") -> a command line."""
    data = make_wagons_and_kites(tmp_path / "data")
    annotations = data / "annotations"
    shutil.copy(annotations / "mp100_split1_test.json", annotations / "mp100_split1_val.json")

    def make(*more, out="run"):
        return to_train(tiny, data, tmp_path / out, "--rounds", 2, "--epochs", 2, *more)
    return make


@pytest.fixture
def trained(arguments, tmp_path):
    """trained(...) trains with these arguments -> the checkpoint."""
    def make(*more, out="run"):
        train.main(arguments(*more, out=out))
        return read_checkpoint(tmp_path / out)
    return make


def train_until(step, arguments):
    """Trains, and is interrupted when the checkpoint of this step is written."""
    save = train.save

    def save_and_stop(path, **contents):
        save(path, **contents)
        if contents["step"] == step:
            raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt) as stop:
        patch.setattr(train, "save", save_and_stop)
        train.main(arguments)
    free_frames(stop.value)


def train_until_signal(step, number, arguments):
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
    """What the log says of each of 8 steps."""
    lines = read_log(folder)
    assert [line["step"] for line in lines] == [*range(1, 9)]
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
    assert done.stdout.count("on 6 objects of the validation set") == 3  # one of the two speaks
    one, two = trained(*options, out="one"), read_checkpoint(tmp_path / "two")
    for key in "loss", "norm":  # the norm tells of a wrong mean, which AdamW would not mind
        assert column(tmp_path / "two", key) == pytest.approx(column(tmp_path / "one", key), abs=1e-4)
    assert_equal(one["model"], two["model"], atol=1e-6)
    moved = [t.abs().max() for name, t in one["model"].items() if name.endswith("lora_B")]  # from zero
    assert min(moved) > 1e-3
    assert scores_of(tmp_path / "two") == scores_of(tmp_path / "one")


def test_gradients_are_exchanged_once_a_step(trained, monkeypatch):
    """Seen by the first of two processes; the other one is feigned."""
    events = []

    def no_sync():
        events.append("quiet")
        return nullcontext()

    def learner(model, **options):
        model.no_sync = no_sync
        model.register_forward_hook(lambda *_: events.append("forward"))
        return model

    monkeypatch.setattr(train, "start_processes", lambda: Process(0, 2, CPU))
    monkeypatch.setattr(train, "DistributedDataParallel", learner)
    monkeypatch.setattr(train.dist, "all_reduce", lambda sums: None)
    trained("--batch", 6, "--epochs", 1)
    assert events == 3 * ["quiet", "forward", "quiet", "forward", "forward"]


def test_packed_conversations_have_the_gradients_of_the_same_one_by_one(arguments):
    args = train.parse_arguments(arguments("--tune-vit", "full", "--tune-llm", "full"))
    model, chat = load_network(args)
    categories = parse_descriptions(read_json(args.descriptions), args.descriptions)
    instances = read_instances(annotation_file(args.data, 1, "train"), categories)

    def find_gradients(examples):
        items = train.TrainingSet(examples, categories, chat, Path(args.data, "images"), 56)
        images, *texts = collate([items[i] for i in range(len(items))])
        loss = model(normalize(images), *texts)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])

    packed = plan_epoch(instances, seed=0, epoch=0, rounds=2, pack=True)
    alone = [replace(example, groups=[group]) for example in packed for group in example.groups]
    assert len(packed) == 6 and len(alone) > 12
    together, apart = find_gradients(packed), [find_gradients([example]) for example in alone]
    assert_equal(together, torch.stack(apart).mean(0), atol=1e-5)
    assert together.norm() > 0.1


def test_the_size_of_micro_batches_changes_nothing(trained, tmp_path):
    """Nothing of the gradients. Dropout, here without an adapter to act on, is drawn by micro-batch."""
    weights = [trained("--micro-batch", n, *FROZEN, out=f"micro{n}")["model"] for n in (4, 1)]
    assert_equal(weights[1], weights[0], atol=1e-5)
    for key in "loss", "norm":
        assert column(tmp_path / "micro1", key) == pytest.approx(column(tmp_path / "micro4", key), abs=1e-4)


def test_each_micro_batch_has_its_own_dropout(trained, monkeypatch):
    item = torch.zeros(3, 56, 56, dtype=torch.uint8), [([0, 1], [-100, 1])]
    monkeypatch.setattr(train.TrainingSet, "__getitem__", lambda self, i: item)  # to be fast, as the next one
    monkeypatch.setattr(CapeLLM, "forward", lambda self, *batch: self.projection.weight.sum())
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    trained("--batch", 2100)
    of_network, *of_dropout = seeds
    assert len(of_dropout) == 4200
    assert len({seed % 2**32 for seed in of_dropout}) == 4200  # the CPU's generator takes 32 bits


def test_the_last_batch_is_filled_and_processes_share_it_out():
    args = Namespace(batch=4, micro_batch=1)
    alone = list(train.micro_batches(6, range(2), args, 0, 1))
    assert alone == [[0], [1], [2], [3], [4], [5], [0], [1]]
    second_of_two = list(train.micro_batches(6, range(2), args, 1, 2))
    assert second_of_two == [[1], [3], [5], [1]]
    restarted_after_a_step = list(train.micro_batches(6, range(1, 2), args, 0, 2))
    assert restarted_after_a_step == [[4], [0]]
    larger_than_an_epoch = list(train.micro_batches(3, range(1), Namespace(batch=8, micro_batch=4), 0, 1))
    assert larger_than_an_epoch == [[0, 1, 2, 0], [1, 2, 0, 1]]


def test_compiled_blocks_and_checkpointed_activations_train_to_the_same_weights(trained, monkeypatch):
    """Traced as --compile does, forward and backward, but run as traced: making kernels takes a minute."""
    compiled, recomputed, load = [], [], train.load_network

    def compile_block(block, **options):
        compiled.append(type(block).__module__)
        block._compiled_call_impl = torch.compile(
            block._call_impl, backend="aot_eager", fullgraph=True, **options)

    def load_and_count(*args):
        model, chat = load(*args)
        for layer in model.llama.layers:
            layer.register_forward_pre_hook(lambda *_: recomputed.append(1))
        return model, chat

    plain = trained("--epochs", 1, out="plain")
    monkeypatch.setattr(torch.nn.Module, "compile", compile_block)
    traced = trained("--compile", "--epochs", 1, out="compiled")
    assert_equal(traced["model"], plain["model"], atol=1e-5)
    assert compiled == ["vit", "vit", "llama", "llama"]
    monkeypatch.setattr(train, "load_network", load_and_count)
    frugal = trained("--checkpoint-activations", "--epochs", 1, out="frugal")
    assert_equal(frugal["model"], plain["model"], atol=1e-6)
    assert len(recomputed) == 2 * (4 * 4 * 2)  # every layer twice in each micro-batch: 4 steps x 4 x 2 layers


# ------------------------------------------------------------------------------------------------- validation


def test_validation_changes_nothing(arguments, trained, tmp_path):
    plain, watched = trained(out="plain"), trained("--validate", 3, out="watched")
    for part in "model", "optimizer":
        assert_equal(watched[part], plain[part])
    assert [*scores_of(tmp_path / "watched")] == [3, 6, 8] and not (tmp_path / "plain/best.pt").exists()
    assert "locates nothing" in refused(train, arguments("--pretrain", "direct", "--validate", 3))


def scores_of(folder):
    return {line["step"]: line["PCK@0.2"] for line in read_log(folder) if "PCK@0.2" in line}


def test_the_best_is_kept_also_of_a_run_that_was_stopped(arguments, tmp_path, monkeypatch):
    """Scores are feigned. A run that is asked to end does not begin a validation."""
    scores, options = iter([0.5, 0.7, 0.6, 0.7]), ["--validate", 2, "--save-every", 100]
    monkeypatch.setattr(evaluate.Validation, "measure", lambda self, model: (next(scores), 6))
    assert train_until_signal(5, signal.SIGTERM, arguments(*options)) == 143
    train.main(arguments(*options))
    assert scores_of(tmp_path / "run") == {2: 0.5, 4: 0.7, 6: 0.6, 8: 0.7}
    assert torch.load(tmp_path / "run/best.pt")["step"] == 4
    assert train_until_signal(2, signal.SIGTERM, arguments(*options, out="other")) == 143
    assert scores_of(tmp_path / "other") == {} and read_checkpoint(tmp_path / "other")["step"] == 2


# ---------------------------------------------------------------------------------------- stopped and resumed


@pytest.mark.parametrize("workers, stops", [(0, (1, 4, 7)), (2, (2,))])  # an epoch has 4 steps
def test_a_run_stopped_at_any_step_and_resumed_is_bit_identical(arguments, trained, tmp_path, workers, stops):
    trained(out="straight")
    for step in stops:
        command = arguments("--save-every", 1, "--workers", workers, out=f"stopped{step}")
        train_until(step, command)
        assert read_checkpoint(tmp_path / f"stopped{step}")["step"] == step
        train.main(command)
        assert_same_run(tmp_path / f"stopped{step}", tmp_path / "straight")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_the_same_command_goes_on(arguments, tmp_path, capsys, number):
    train.main(arguments(out="straight"))
    before = signal.getsignal(number)
    assert train_until_signal(3, number, arguments()) == 128 + number
    assert signal.getsignal(number) is before
    assert read_checkpoint(tmp_path / "run")["step"] == 3
    assert "stopped after step 3 of 8; the same command resumes" in capsys.readouterr().out
    train.main(arguments())
    assert "steps 3 to 8 in 2 epochs" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", tmp_path / "straight")

    finished = (tmp_path / "run/ckpt.pt").read_bytes()
    train.main(arguments())
    assert f"finished already, after 8 steps: {tmp_path}/run/ckpt.pt" in capsys.readouterr().out
    assert (tmp_path / "run/ckpt.pt").read_bytes() == finished and len(column(tmp_path / "run", "loss")) == 8


def test_the_second_ctrl_c_acts_at_once():
    def press_twice():
        with train.catch_signals() as caught:
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
            assert train_until_signal(3, signal.SIGINT, argv) == 130
        else:
            with pytest.raises(SystemExit):
                train.main(argv)
    said = in_two_processes(main, arguments(), tmp_path)
    assert "stopped after step 3 of 8" in said[0] and "stopped" not in said[1]
    assert read_checkpoint(tmp_path / "run")["step"] == 3


def start_and_wait(arguments, folder, steps, **how):
    """-> train.py as a process of its own that has trained for so many steps."""
    program = subprocess.Popen([sys.executable, "train.py", *arguments], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, **SUBPROCESS, **how)
    log = folder / "log.jsonl"
    while program.poll() is None and not (log.exists() and log.read_text().count("\n") >= steps):
        time.sleep(0.01)
    return program


def test_a_run_that_is_killed_goes_on_to_the_same_end(arguments, tmp_path):
    """tests/kill.py does this as often as one likes, and under torchrun."""
    options = ["--workers", 1, "--save-every", 1]
    train.main(arguments(*options, out="straight"))
    program = start_and_wait(arguments(*options), tmp_path / "run", 3)
    program.kill()
    program.communicate()
    assert 2 <= read_checkpoint(tmp_path / "run")["step"] < 8
    (tmp_path / "run/ckpt.part").write_bytes(b"half")
    train.main(arguments(*options))
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    assert not list((tmp_path / "run").glob("*.part"))


def test_ctrl_c_ends_the_program_and_its_workers_quietly(arguments, tmp_path):
    """As from a terminal, which sends the signal to the program and its workers."""
    program = start_and_wait(
        arguments("--epochs", 500, "--workers", 1), tmp_path / "run", 2, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # jobs in the background ignore it
    os.killpg(program.pid, signal.SIGINT)
    said, errors = program.communicate(timeout=300)
    assert program.returncode == 130 and "Traceback" not in errors, errors
    steps = read_checkpoint(tmp_path / "run")["step"]
    assert f"stopped after step {steps} of 2000; the same command resumes\n" in said
    assert steps == len(read_log(tmp_path / "run"))


def test_other_arguments_or_descriptions_are_refused_by_name_and_nothing_is_touched(arguments, tmp_path):
    train.main(arguments("--epochs", 1))
    path, descriptions = tmp_path / "run/ckpt.pt", tmp_path / "data/descriptions.json"
    good = path.read_bytes()
    line = refused(train, arguments("--epochs", 1, "--lr", 0.125, "--seed", 1, "--workers", 1))
    assert f"{path} is of a run with --lr 0.0005, not 0.125; --seed 42, not 1. Start anew with --f" in line
    train.main(arguments("--epochs", 1, "--workers", 1, "--save-every", 7, "--compile"))  # finished already
    descriptions.write_text(descriptions.read_text().replace("the roof of", "the top of"))
    assert f"{path} is of a run with other descriptions. Start" in refused(train, arguments("--epochs", 1))
    assert path.read_bytes() == good


def test_fresh_starts_anew_but_not_when_torchrun_restarts_it(
        arguments, trained, tmp_path, monkeypatch, capsys):
    trained("--epochs", 1, "--validate", 4)
    assert trained("--epochs", 2, "--seed", 1, "--fresh")["args"]["seed"] == 1
    assert len(column(tmp_path / "run", "loss")) == 8 and not (tmp_path / "run/best.pt").exists()
    assert "finished already" not in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train.main(arguments("--epochs", 2, "--seed", 1, "--fresh"))
    assert "finished already" in capsys.readouterr().out


def test_fresh_deletes_no_checkpoint_if_the_run_cannot_start(arguments, tmp_path):
    train.main(arguments("--epochs", 1))
    checkpoint, other = tmp_path / "run/ckpt.pt", tmp_path / "other.pt"
    before = checkpoint.read_bytes()
    other.write_bytes(b"none")
    for start, reason in (checkpoint, "--fresh would delete"), (other, "is it a checkpoint of train.py?"):
        assert reason in refused(train, arguments("--fresh", "--init", start))
        assert checkpoint.read_bytes() == before and len(read_log(tmp_path / "run")) == 4


def test_damaged_checkpoints_are_refused_and_left_alone(arguments, trained, tmp_path):
    path = tmp_path / "run" / "ckpt.pt"
    trained("--epochs", 1)
    good = path.read_bytes()
    torch.save({"step": 3}, tmp_path / "incomplete.pt")
    for bad in good[:-1000], good[:1000], b"", b"text", (tmp_path / "incomplete.pt").read_bytes():
        path.write_bytes(bad)
        for program, argv in (train, arguments("--epochs", 1)), (evaluate, [path]):
            assert re.search(f"{path}: cannot be read .*is it a checkpoint", refused(program, argv))
        assert path.read_bytes() == bad


# ------------------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_rate_and_decay_are_those_of_the_published_trainer(arguments, tmp_path, tune):
    """Hugging Face's: its rate at each step, and the parameters that it lets decay."""
    transformers = pytest.importorskip("transformers")
    args = train.parse_arguments(arguments("--tune-vit", tune, "--tune-llm", tune))
    model, _ = load_network(args)
    theirs = transformers.Trainer(model, transformers.TrainingArguments(
        tmp_path, learning_rate=5e-4, warmup_steps=0.03, weight_decay=0.01, lr_scheduler_type="cosine",
        use_cpu=True, report_to="none"))
    theirs.create_optimizer()
    scheduler = theirs.create_scheduler(99)
    for step in range(99):
        assert train.learning_rate(step, 99, args) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        scheduler.optimizer.step()
        scheduler.step()

    def decaying(optimizer):
        return {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    ours = train.make_optimizer(model, args, CPU)
    # It does not know the class of our RMSNorm, and would let it decay. LayerScale is no norm to it, either.
    unknown = {id(p) for name, p in model.llama.named_parameters() if "norm" in name}
    assert decaying(ours) == decaying(theirs.optimizer) - unknown
    assert len(decaying(ours)) > 10


@pytest.mark.parametrize("options, clip", [([], 1.0), (["--clip", 0.05], 0.05), (["--clip", "inf"], 10.0)])
def test_the_norm_of_gradients_is_clipped(trained, tmp_path, monkeypatch, options, clip):
    """To 1 by default. Losses are 20-fold here, so that the norm is above it. The log tells it unclipped."""
    norms, step, forward = [], torch.optim.AdamW.step, CapeLLM.forward

    def measure_and_step(optimizer):
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())
        return step(optimizer)
    monkeypatch.setattr(torch.optim.AdamW, "step", measure_and_step)
    monkeypatch.setattr(CapeLLM, "forward", lambda *batch: 20 * forward(*batch))
    trained(*options)
    before = column(tmp_path / "run", "norm")
    assert 1.1 < min(before) and max(before) < 10  # inf clips nothing, as 10
    assert norms == pytest.approx(np.minimum(before, clip), abs=1e-5)


def test_dropout_acts_in_training_and_not_in_validation(trained, monkeypatch):
    modes, see = [], CapeLLM.see
    monkeypatch.setattr(CapeLLM, "see", lambda self, images: modes.append(
        (self.training, torch.is_grad_enabled())) or see(self, images))
    trained("--validate", 3)
    assert (modes.count((True, True)), modes.count((False, False)), len(modes)) == (32, 6, 38)


def test_it_says_the_arithmetic_and_logs_every_step(trained, tiny, tmp_path, capsys):
    trained("--lr", 0.25, "--warmup", 0.25)
    said, lines = capsys.readouterr().out, read_log(tmp_path / "run")
    layers, rank, width = 2, 8, 32
    square = rank * width + width * rank  # an adapter of a matrix of 32 x 32
    value = rank * width + 16 * rank  # the LLM has two heads of 8 for its values
    n = layers * (3 * square + value) + width * width + width
    assert "6 objects of 2 categories\nsteps 0 to 8 in 2 epochs; batch 4 = micro-batch 1 x 1 processes x 4 " \
        "accumulated, on " in said and re.search(rf"^{n:,} of [\d,]+ parameters train$", said, re.M)
    assert [(line["step"], line["epoch"]) for line in lines] == [(n, 1 + (n > 4)) for n in range(1, 9)]
    cosine = [0.125 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert column(tmp_path / "run", "lr") == pytest.approx([0, 0.125, *cosine])
    assert all(0 < line["seconds"] < 60 < line["tokens_per_second"] for line in lines)
    vocabulary = read_json(tiny / "llm" / "config.json")["vocab_size"]
    assert lines[0]["loss"] == pytest.approx(math.log(vocabulary), abs=1)
    with Image.open(tmp_path / "run/curve.png") as curve:
        assert len(curve.convert("RGB").getcolors(10**6)) > 4


@pytest.mark.parametrize("how, steps", [
    (["--rounds", 2], 4),  # 3 groups of each wagon, 2 of each kite: 15 examples
    (["--rounds", 5], 2),  # 1 of each
    (["--rounds", "dynamic"], 3),  # as many as fours: 2 of each wagon, 1 of each kite
    (["--pack"], 2),  # the groups of a photo together
], ids=str)
def test_the_length_of_an_epoch(trained, how, steps):
    assert trained(*how)["step"] == 2 * steps


def test_loss_falls(trained, tmp_path):
    trained("--epochs", 8, "--lr", 0.01, "--tune-llm", "full")
    losses = [line["loss"] for line in read_log(tmp_path / "run")]
    assert len(losses) == 32 and max(losses[-4:]) < 0.5 * losses[0]


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
    assert checkpoint.keys() == {"args", "model", "optimizer", "step", "descriptions", "best"}
    assert checkpoint["args"]["tune_vit"] == vit and checkpoint["step"] == 4
    assert_equal(checkpoint["model"], {name: own[name].detach() for name in expected})
    assert all(own[name].any() for name in expected if name.endswith("lora_B"))
    for name in published.keys() - PROJECTION:
        name_in_adapter = re.sub(r"(\w+)$", r"base.\1", name)  # which keeps the layer as its base
        is_untouched = torch.equal(own.get(name, own.get(name_in_adapter)), published[name])
        assert is_untouched == (name not in expected), name

    size = (tmp_path / "run" / "ckpt.pt").stat().st_size  # weights and Adam's two moments, nothing hidden
    n_weights = sum(t.numel() for t in checkpoint["model"].values())
    assert size < 3 * 4 * n_weights + 2000 * len(expected) + 10000


def test_real_photographs_train_and_evaluate_end_to_end(shared, tiny, tmp_path):
    train_until(2, to_train(tiny, shared / "mini_mp100", tmp_path, "--batch", 16, "--micro-batch", 8,
                            "--save-every", 2, "--workers", 2))  # the whole epoch takes a minute
    evaluate.main(command_line(tmp_path / "ckpt.pt", "--constrained"))
    report, _ = read_results(tmp_path)
    assert report["objects"] == 40 and report["malformed"] == report["without photo"] == 0
    assert len(report["per category"]) == 6


# ----------------------------------------------------------------------------------------- from another run


def test_init_brings_its_networks_and_all_that_trains_and_is_not_started_from_again(
        arguments, trained, tmp_path):
    trained("--epochs", 1, out="first")
    path = tmp_path / "first/ckpt.pt"
    assert train.parse_arguments(command_line("--init", path, "--llm", "b")).llm == "b"
    words = arguments("--init", path, "--save-every", 1)
    given = train.parse_arguments(words)
    for name in "--llm", "--vit", "--image-size":
        del words[words.index(name):words.index(name) + 2]
    assert train.parse_arguments(words) == given
    train.main([*words, "--out", str(tmp_path / "straight")])
    train_until(3, words)
    train.main(words)
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_init_starts_from_all_that_trains_and_init_projection_from_one_layer(arguments, trained, tmp_path):
    weights, path = trained("--epochs", 1)["model"], tmp_path / "run/ckpt.pt"
    for option, taken in ("--init", PROJECTION | LORA), ("--init-projection", PROJECTION):
        started = train.load(train.parse_arguments(arguments(option, path)), CPU, None)[0]
        own = dict(started.named_parameters())
        assert {name for name in weights if torch.equal(own[name], weights[name])} == taken
    wide = {"projection.weight": torch.zeros(9, 9), "projection.bias": torch.zeros(9)}
    torch.save(torch.load(path) | {"model": wide}, path)
    for option in "--init", "--init-projection":
        line = refused(train, arguments(option, path, out="other"))
        assert f"{path}: its projection is of networks of other widths" in line


# -------------------------------------------------------------------------------------------- what goes wrong


WRONG = [
    ("--micro-batch 3", "--batch 4 is not a multiple of --micro-batch 3 x 1"),
    ("--llm nowhere", "nowhere: no such folder"), ("--vit nowhere", "nowhere: no such folder"),
    ("--split 6", "mp100_split6_train.json: no such file"), ("--init nowhere.pt", "nowhere.pt: no such file"),
    ("--init tests", "tests: cannot be read"), ("--descriptions nowhere.json", "nowhere.json: no such file"),
    ("--image-size 57", "57 is not a multiple"), (f"--out {ROOT}/train.py/x", "train.py: cannot be written"),
    ("--instruction long", "long: no such instruction; there are description, name"),
    ("--pretrain direct --instruction name", "leave out --instruction"),
    ("--pretrain step --answer token", "leave out --validate and --answer"),
    ("--epoch 3", "--epoch"), ("--rounds many", "--rounds"), ("--rounds 0", "--rounds"),
    ("--seed -1", "--seed"), ("--workers -1", "--workers"), *((f"{option} 0", option) for option in (
        "--batch", "--micro-batch", "--save-every", "--epochs", "--split"))]


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
    assert "no object to train on" in refused(train, arguments())


def test_the_folder_of_a_run_is_named_after_what_it_does():
    for said, folder in (("", "split1"), ("--split 3", "split3"), ("--data data/teapots", "teapots"),
                         ("--pretrain step", "pretrain-step")):
        assert train.parse_arguments(said.split()).out == f"runs/{folder}"


def test_missing_and_truncated_photos_stop_a_run_or_are_left_out(arguments, trained, tmp_path, capsys):
    photos = tmp_path / "data" / "images"
    truncated = photos / "wagon" / "4.jpg"
    whole = truncated.read_bytes()
    truncated.write_bytes(whole[:-600])
    for workers in 0, 2:
        assert f"{truncated}: cannot be read" in refused(train, arguments("--workers", workers))
    truncated.write_bytes(whole)
    for name in "wagon/0", "wagon/2", "kite/1":
        (photos / f"{name}.jpg").unlink()
    line = refused(train, arguments())
    assert all(word in line for word in ("3 of 6 objects", "wagon 2", "kite 1", "--allow-missing"))
    trained("--allow-missing", "--epochs", 1, out="missing")
    assert "3 objects of 2 categories" in capsys.readouterr().out
    truncated.write_bytes(whole[:-600])
    trained("--allow-missing", "--epochs", 1, out="broken")
    assert "2 objects of 1 categories" in capsys.readouterr().out
    shutil.rmtree(photos)
    assert "photos of 6 of 6 objects" in refused(train, arguments("--allow-missing", out="none"))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"),
                                   RuntimeError("PytorchStreamWriter failed writing file")])
def test_a_full_disk_leaves_the_last_checkpoint_whole(arguments, tmp_path, monkeypatch, error):
    save = torch.save

    def fill_up(contents, path):
        if contents["step"] < 3:
            return save(contents, path)
        path.write_bytes(b"half")
        raise error
    monkeypatch.setattr(torch, "save", fill_up)
    line = refused(train, arguments("--save-every", 1))
    assert error.args[-1] in line and str(tmp_path / "run" / "ckpt.pt") in line
    assert read_checkpoint(tmp_path / "run")["step"] == 2
    assert not list((tmp_path / "run").glob("*.part"))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_before_it_is_saved(arguments, tmp_path, monkeypatch, what):
    losses, forward = [], CapeLLM.forward

    def break_in_the_third_step(self, *batch):
        losses.append(forward(self, *batch))
        if len(losses) == 9 and what == "loss":  # 4 micro-batches a step
            return losses[-1] * math.nan
        if len(losses) == 9:
            losses[-1].register_hook(lambda gradient: gradient * math.inf)
        return losses[-1]
    monkeypatch.setattr(CapeLLM, "forward", break_in_the_third_step)
    line = refused(train, arguments("--save-every", 1))
    assert re.search("step 3: loss .*(nan|inf).* lower --lr", line) and len(losses) == 12
    checkpoint = read_checkpoint(tmp_path / "run")
    assert checkpoint["step"] == 2 and all(t.isfinite().all() for t in checkpoint["model"].values())


class Unsendable:
    def __reduce__(self):
        raise RuntimeError("unable to write to file </torch_7_1>: No space left on device (28)")


@pytest.mark.parametrize("how", ["killed", "full"])
def test_a_worker_that_is_lost_is_one_line_that_names_the_way_out(arguments, monkeypatch, how):
    """It kills itself, or cannot send what it has read, since /dev/shm is full."""
    fail = {"killed": lambda _: os.kill(os.getpid(), signal.SIGKILL), "full": lambda _: Unsendable()}
    options = train.loader_options(1) | {"timeout": 5 if how == "full" else 300}
    monkeypatch.setattr(train, "collate", fail[how])
    monkeypatch.setattr(train, "loader_options", lambda workers: options)
    line = refused(train, arguments("--workers", 1))
    assert "lost another process" in line and "--workers 0" in line
    assert ("timed out" in line) == (how == "full")  # a death is noticed at once
