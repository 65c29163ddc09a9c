"""train.py: the same result however the work is cut up, stopped and resumed; what trains, what is written and
what is refused."""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from mp100 import make_wagons_and_kites
from programs import (
    SUBPROCESS,
    command_line,
    free_frames,
    in_two_processes,
    read_checkpoint,
    read_results,
    refused,
    silent_workers,
    to_train,
)

import common
import evaluate
import train
from chat import INSTRUCTIONS, PRETRAINING
from common import Process
from model import CapeLLM

PROJECTION = {"projection.weight", "projection.bias"}
ADAPTED = [*(f"vit.blocks.{i}.attn.{x}" for i in (0, 1) for x in "qv"),
           *(f"llama.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qv")]
LORA = {f"{layer}.lora_{matrix}" for layer in ADAPTED for matrix in "AB"}
FROZEN = ["--tune-vit", "frozen", "--tune-llm", "frozen"]
CPU = torch.device("cpu")


@pytest.fixture
def arguments(tiny, tmp_path):
    """arguments("--lr", 1, out="a") -> a command line. 15 examples an epoch: 4 steps, the last filled up."""
    data = make_wagons_and_kites(tmp_path / "data")

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


@pytest.fixture
def without_picture(monkeypatch):
    """To draw predictions.png takes more time than all else in a small evaluation."""
    monkeypatch.setattr(evaluate, "draw_sheet", lambda *_: None)


def stop_at(step, monkeypatch):
    """From now on training is interrupted when it has written the checkpoint of this step."""
    save = train.save_checkpoint

    def save_and_stop(path, **contents):
        save(path, **contents)
        if contents["step"] == step:
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_checkpoint", save_and_stop)


def train_until(step, arguments):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt) as stop:
        stop_at(step, patch)
        train.main(arguments)
    free_frames(stop.value)


def spy_on(module, name, monkeypatch):
    """-> a list to which every call of module.name adds its positional arguments."""
    calls, function = [], getattr(module, name)

    def call(*args, **options):
        calls.append(args)
        return function(*args, **options)
    monkeypatch.setattr(module, name, call)
    return calls


def losses_and_norms(log):
    """Of a run of 8 steps. The norm of the gradient tells of a wrong mean, which AdamW would not mind."""
    found = re.findall(r"^step .* loss (\S+) .* \|grad\| (\S+) ", log, re.M)
    assert len(found) == 8
    return np.array(found, dtype=float)


def assert_equal(a, b, atol=0.0):
    """Bit by bit, unless atol says otherwise."""
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# ----------------------------------------------------------------------------- the same, however it is cut up


def test_two_processes_give_the_parameters_and_losses_of_one(arguments, trained, tmp_path, capsys):
    """2 processes x 2 accumulated = 1 x 4, with dropout and clipped gradients, started by torchrun itself."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "train.py", *arguments("--clip", 0.05, out="two")]
    done = subprocess.run(command, capture_output=True, **SUBPROCESS)
    assert done.returncode == 0, done.stderr
    assert "batch 4 = micro-batch 1 x 2 processes x 2 accumulated, on cpu" in done.stdout
    two = read_checkpoint(tmp_path / "two")
    log_of_two = losses_and_norms(done.stdout)  # eight lines: one of the two speaks

    one = trained("--clip", 0.05, out="one")
    log_of_one = losses_and_norms(capsys.readouterr().out)
    assert log_of_two == pytest.approx(log_of_one, abs=2e-3)
    assert_equal(one["model"], two["model"], atol=1e-6)
    moved = [t.abs().max() for name, t in one["model"].items() if name.endswith("lora_B")]  # from zero
    assert min(moved) > 1e-3


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
    monkeypatch.setattr(train.dist, "all_reduce", lambda loss: None)
    trained("--batch", 6, "--epochs", 1)
    assert events == 3 * ["quiet", "forward", "quiet", "forward", "forward"]


@pytest.mark.parametrize("workers, stops", [(0, (1, 3, 4, 7)), (2, (2, 4))])  # an epoch has 4 steps
def test_a_run_stopped_at_any_step_and_resumed_is_bit_identical(arguments, trained, tmp_path, workers, stops):
    straight = trained(out="straight")
    for step in stops:
        folder = tmp_path / f"stopped{step}"
        train_until(step, arguments("--save-every", 1, "--workers", workers, out=folder.name))
        assert read_checkpoint(folder)["step"] == step

        train.main(command_line("--resume", folder / "ckpt.pt"))  # the other arguments are in the checkpoint
        resumed = read_checkpoint(folder)
        assert resumed["step"] == 8
        assert len(resumed["optimizer"]["state"]) == len(straight["model"])
        for part in "model", "optimizer":
            assert_equal(resumed[part], straight[part])


def test_the_size_of_micro_batches_changes_nothing(trained, capsys):
    """Nothing of the gradients. Dropout, here without an adapter to act on, is drawn by micro-batch."""
    weights, logs = [], []
    for n in 4, 2, 1:
        weights.append(trained("--micro-batch", n, *FROZEN, out=f"micro{n}")["model"])
        logs.append(losses_and_norms(capsys.readouterr().out))
    for i in 1, 2:
        assert_equal(weights[i], weights[0], atol=1e-5)
        assert logs[i] == pytest.approx(logs[0], abs=2e-3)


def test_each_micro_batch_has_its_own_dropout(trained, monkeypatch):
    item = {"image": torch.zeros(3, 56, 56, dtype=torch.uint8), "tokens": [0, 1], "labels": [-100, 1],
            "conversation": [0, 0], "points": []}
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


def test_compiled_blocks_train_to_the_same_weights(trained, monkeypatch):
    """Traced as --compile does, forward and backward, but run as traced: making kernels takes a minute."""
    compiled = []

    def compile_block(block, **options):
        compiled.append(type(block).__module__)
        block._compiled_call_impl = torch.compile(
            block._call_impl, backend="aot_eager", fullgraph=True, **options)

    plain = trained("--epochs", 1, out="plain")
    monkeypatch.setattr(torch.nn.Module, "compile", compile_block)
    traced = trained("--compile", "--epochs", 1, out="compiled")
    assert_equal(traced["model"], plain["model"], atol=1e-5)
    assert compiled == ["vit", "vit", "llama", "llama"]


def test_checkpointed_activations_train_to_the_same_weights(trained, monkeypatch):
    plain = trained("--epochs", 1, out="plain")
    recomputed, load = [], train.load_model

    def load_and_count(*args):
        model = load(*args)
        for layer in model.llama.layers:
            layer.register_forward_pre_hook(lambda *_: recomputed.append(1))
        return model

    monkeypatch.setattr(train, "load_model", load_and_count)
    frugal = trained("--checkpoint-activations", "--epochs", 1, out="frugal")
    assert_equal(frugal["model"], plain["model"], atol=1e-6)
    assert len(recomputed) == 2 * (4 * 4 * 2)  # every layer twice in each micro-batch: 4 steps x 4 x 2 layers


def test_validation_changes_nothing_and_says_the_same_in_two_processes(arguments, trained, tmp_path, capsys):
    data = tmp_path / "data"
    val = data / "annotations/mp100_split1_val.json"
    shutil.copy(data / "annotations/mp100_split1_test.json", val)
    plain = trained("--lr", 0.01, out="plain")
    watched = trained("--lr", 0.01, "--validate", 3, out="watched")
    for part in "model", "optimizer":
        assert_equal(watched[part], plain[part])
    scores = scores_of(tmp_path / "watched")
    assert [(step, n) for step, _, n in scores] == [(3, 6), (6, 6), (8, 6)]
    best = max(score for _, score, _ in scores)
    kept = torch.load(tmp_path / "watched/best.pt", weights_only=True)["step"]
    assert kept == next(step for step, score, _ in scores if score == best)
    assert not (tmp_path / "plain/best.pt").exists()

    said = in_two_processes(train.main, arguments("--lr", 0.01, "--validate", 3, out="two"), tmp_path)
    assert said[0].count("PCK@0.2") == 3 and "PCK" not in said[1]
    assert scores_of(tmp_path / "two") == scores
    assert "locates nothing" in refused(train, arguments("--pretrain", "direct", "--validate", 3))
    assert "goes with --check" in refused(train, arguments("--missing-list", "missing.txt"))


def scores_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["PCK@0.2"], line["objects"]) for line in lines if "PCK@0.2" in line]


# ------------------------------------------------------------------------------------------------- the recipe


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    args = Namespace(lr=2.0, warmup=0.03)  # 2.97 -> 3 steps of warm-up, 96 of cosine
    rates = [train.learning_rate(step, 99, args) for step in range(100)]
    assert rates[:4] == pytest.approx([0, 2 / 3, 4 / 3, 2])
    quarters = [rates[3 + 24 * i] for i in (1, 2, 3, 4)]
    assert quarters == pytest.approx([1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0])


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_rate_and_decay_are_those_of_the_published_trainer(tiny, tmp_path, tune):
    """Hugging Face's: its rate at each step, and the parameters that it lets decay."""
    args = Namespace(lr=5e-4, warmup=0.03, weight_decay=0.01)
    model = CapeLLM.load(tiny / "vit", tiny / "llm", 56, tune, tune)
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


@pytest.mark.parametrize("clip", [0, 0.05])
def test_the_norm_of_gradients_is_clipped(trained, monkeypatch, capsys, clip):
    """The log tells the norm before that. 0, the default, clips nothing."""
    norms, step = [], torch.optim.AdamW.step

    def measure_and_step(optimizer):
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())
        return step(optimizer)
    monkeypatch.setattr(torch.optim.AdamW, "step", measure_and_step)
    trained("--clip", clip)
    before = losses_and_norms(capsys.readouterr().out)[:, 1]
    assert min(before) > 0.06
    assert norms == pytest.approx([clip] * 8 if clip else before, abs=6e-4)  # of three decimals in the log


def test_dropout_acts_in_training_and_not_in_evaluation(trained, tmp_path, monkeypatch, without_picture):
    trained_on, asked = spy_on(CapeLLM, "forward", monkeypatch), spy_on(evaluate, "locate", monkeypatch)
    trained("--epochs", 1)
    evaluate.main(command_line(tmp_path / "run" / "ckpt.pt"))
    assert all(model.training for model, *_ in trained_on)
    assert not any(model.training for model, *_ in asked)


def test_log_tells_the_arithmetic_then_every_step(trained, tiny, capsys):
    trained("--lr", 0.25, "--warmup", 0.25)
    log = capsys.readouterr().out
    before, *_ = log.split("\nstep ")
    assert before.startswith("6 objects of 2 categories, 8 steps in 2 epochs\n"
                             "batch 4 = micro-batch 1 x 1 processes x 4 accumulated, on ")
    numbers = dict(re.findall(r"^(\w+) +([\d,]+) of +[\d,]+ parameters", before, re.M))
    layers, rank, width = 2, 8, 32
    square = rank * width + width * rank  # an adapter of a matrix of 32 x 32
    value = rank * width + 16 * rank  # the LLM has two heads of 8 for its values
    assert numbers == {"vit": f"{layers * 2 * square:,}", "projection": f"{width * width + width:,}",
                       "llm": f"{layers * (square + value):,}"}

    line = (r"^step +(\d+)  epoch +(\d)  loss (\S+)  lr (\S+)  .*? [\d,]+ tokens/s  [\d.]+ GiB"
            r"(?:  waited \d+%)?$")
    logged = re.findall(line, log, re.M)
    steps_and_epochs = [(int(step), int(epoch)) for step, epoch, *_ in logged]
    assert steps_and_epochs == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2), (7, 2), (8, 2)]
    rates = [float(rate) for *_, rate in logged]
    cosine = [0.125 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert rates == pytest.approx([0, 0.125, *cosine], rel=0.01)
    vocabulary = json.loads((tiny / "llm" / "config.json").read_text())["vocab_size"]
    first_loss = float(logged[0][2])
    assert first_loss == pytest.approx(math.log(vocabulary), abs=1)


@pytest.mark.parametrize("how, steps", [
    (["--rounds", 2], 4),  # 3 groups of each wagon, 2 of each kite: 15 examples
    (["--rounds", 5], 2),  # 1 of each
    (["--rounds", "dynamic"], 3),  # as many as fours: 2 of each wagon, 1 of each kite
    (["--pack"], 2),  # the groups of a photo together
], ids=str)
def test_the_length_of_an_epoch(trained, capsys, how, steps):
    checkpoint = trained(*how)
    assert f"6 objects of 2 categories, {2 * steps} steps in 2 epochs" in capsys.readouterr().out
    assert checkpoint["step"] == 2 * steps


def test_loss_falls(trained, capsys):
    trained("--epochs", 8, "--lr", 0.01, "--tune-llm", "full")
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert len(losses) == 32
    assert max(losses[-4:]) < 0.5 * losses[0]


def test_memory_is_told_where_it_can_be_asked_for(monkeypatch):
    def told():
        return train.memory_and_mfu(None, 1.0, CPU)
    assert re.fullmatch(r"  \d+\.\d GiB", told())

    peak = 3 * 2**29  # bytes
    for platform, unit in ("linux", 1024), ("darwin", 1):
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(resource, "getrusage", lambda _: Namespace(ru_maxrss=peak // unit))
        assert told() == "  1.5 GiB"
    monkeypatch.setitem(sys.modules, "resource", None)  # importing it fails, as on Windows
    assert told() == ""


def test_memory_and_mfu_on_a_gpu(monkeypatch):
    """4 FLOPs for each weight and token: 4 x 2 x 10^9 x 49,450 is 40 % of an H100's 989 x 10^12."""
    weights = Namespace(parameters=lambda: [torch.empty(2 * 10**9, device="meta")])
    model = Namespace(llama=Namespace(layers=weights))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert train.memory_and_mfu(model, 49_450, torch.device("cuda")) == "  1.5 GiB  MFU 40%"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card of next year")
    assert train.memory_and_mfu(model, 49_450, torch.device("cuda")) == "  1.5 GiB"


TUNED = [("lora", "lora"), ("frozen", "frozen"), ("full", "lora"), ("lora", "full")]


@pytest.mark.parametrize("vit, llm", TUNED)
def test_trains_and_saves_what_it_says_and_leaves_the_rest_untouched(
        trained, tiny, tmp_path, monkeypatch, vit, llm):
    models, load = [], train.load_model
    monkeypatch.setattr(train, "load_model", lambda *args: models.append(load(*args)) or models[0])
    checkpoint = trained("--tune-vit", vit, "--tune-llm", llm, "--epochs", 1)
    own = dict(models[0].named_parameters())
    published = dict(CapeLLM.load(tiny / "vit", tiny / "llm", 56, "frozen", "frozen").named_parameters())

    names = {"lora": LORA, "full": published.keys() - PROJECTION, "frozen": set()}
    expected = {name for name in names[vit] if name.startswith("vit")}
    expected |= {name for name in names[llm] if name.startswith("llama")}
    expected |= PROJECTION
    assert checkpoint.keys() == {"args", "model", "optimizer", "step", "descriptions"}
    assert checkpoint["args"]["tune_vit"] == vit
    assert checkpoint["step"] == 4
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
    assert report["objects"] == 40
    assert report["malformed"] == report["without photo"] == 0
    assert len(report["per category"]) == 6


# ------------------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize("wrong, message", [
    (["--micro-batch", 3], "--batch 4 is not a multiple of --micro-batch 3 x 1"),
    (["--llm", "nowhere"], "nowhere/tokenizer.json"),
    (["--vit", "nowhere"], "nowhere/config.json"),
    (["--split", 6], "mp100_split6_train.json: no such file; say with --data"),
    (["--init", "tests"], "tests: a folder; the checkpoint in it, ckpt.pt, is wanted"),
    (["--split", 0], "0 is not a whole number"),
    (["--lr", "nan"], "nan is not a number from 0 to 1"), (["--lr=-1"], "-1 is not a number from 0 to 1"),
    (["--warmup", 5], "5 is not a number from 0 to 1"), (["--weight-decay=-1"], "-1 is not a number"),
    (["--clip", "inf"], "inf is not a number from 0 to 1e+06"),
    (["--resume", "nowhere.pt"], "nowhere.pt: no such checkpoint"),
    (["--image-size", 57], "57 is not a multiple"),
    (["--descriptions", "nowhere.json"], "nowhere.json: no such file"),
    (["--out", ROOT / "train.py" / "x"], "train.py/x"),
    (["--epoch", 3], "--epoch"),
    (["--rounds", "many"], "--rounds"),
    (["--instruction", "long"], "--instruction"),
    (["--pretrain", "direct", "--instruction", "name"], "leave out --instruction"),
    (["--pretrain", "step", "--answer", "token"], "leave out --instruction, --answer"),
    (["--pretrain", "direct", "--tune-vit", "full"], "--tune-*"),
    (["--pretrain", "step", "--tune-llm", "full"], "--tune-*"),
    (["--init", "nowhere.pt"], "nowhere.pt: no such checkpoint"),
    (["--seed", -1], "--seed"),
    (["--workers", -1], "--workers"),
    (["--resume", "a.pt", "--init", "b.pt"], "give only one of them"),
    *(([option, 0], option) for option in (
        "--batch", "--micro-batch", "--rounds", "--save-every", "--log-every")),
])
def test_wrong_arguments_are_one_line(arguments, wrong, message):
    assert message in refused(train, arguments(*wrong))


def test_a_run_without_visible_keypoints_is_refused(arguments, tmp_path):
    path = tmp_path / "data" / "annotations" / "mp100_split1_train.json"
    contents = json.loads(path.read_text())
    for annotation in contents["annotations"]:
        annotation["keypoints"][2::3] = [0] * (len(annotation["keypoints"]) // 3)
    path.write_text(json.dumps(contents))
    assert "split 1 has no visible keypoint to train on" in refused(train, arguments())


def test_the_folder_of_a_run_is_named_after_what_it_does():
    assert train.parse_arguments([]).out == "runs/split1"
    assert train.parse_arguments(["--split", "3"]).out == "runs/split3"
    assert train.parse_arguments(["--pretrain", "step"]).out == "runs/pretrain-step"


# --------------------------------------------------------------------------------------- the paper's variants


def joined(tokens):
    return f" {' '.join(map(str, tokens))} "


VARIANTS = [*(["--instruction", name] for name in INSTRUCTIONS), ["--answer", "token"],
            ["--answer", "token", "--instruction", "step"], ["--rounds", "dynamic"],
            ["--pack", "--instruction", "step"]]


@pytest.mark.parametrize("how", VARIANTS, ids=" ".join)
def test_every_variant_trains_and_then_asks_in_the_way_it_was_trained(
        trained, tmp_path, monkeypatch, without_picture, how):
    """Training's conversations, on their way into the network, hold the questions that evaluation asks."""
    trained_on = spy_on(CapeLLM, "forward", monkeypatch)
    epochs = 4 if "list" in how or "outline" in how else 1  # each question must once be the first
    trained(*how, "--epochs", epochs)
    conversations = [joined(row) for _, _, tokens, *_ in trained_on for row in tokens.tolist()]
    labels = [row for _, _, _, labels, *_ in trained_on for row in labels.tolist()]
    for *_, points, conversation in trained_on:
        assert (points is not None) == ("token" in how)
        assert (conversation is not None) == ("--pack" in how)
    asked = spy_on(evaluate, "locate", monkeypatch)
    checkpoint = tmp_path / "run" / "ckpt.pt"
    evaluate.main(command_line(checkpoint))
    chat = asked[0][3]

    questions = [question for _, _, of_photos, _ in asked for of_photo in of_photos for question in of_photo]
    assert len(questions) == 24
    known = [any(joined(question) in said for said in conversations) for question in questions]
    assert all(known) or "diverse" in how or "diverse-outline" in how
    assert bool(chat.opening) == ("step" in how)
    assert all(joined(chat.opening).strip() in conversation for conversation in conversations)
    sizes = {row.count(chat.eos) for row in labels}  # of conversations, in answers
    assert "dynamic" not in how or sizes - {1, 2}

    report, predictions = read_results(tmp_path / "run")
    assert report["objects"] == 6
    if "token" in how:
        assert report["malformed"] == 0
        assert all(p["confidence"] == [None] * len(p["keypoints"]) for p in predictions)
    else:
        evaluate.main(command_line(checkpoint, "--constrained"))
        _, predictions = read_results(tmp_path / "run")
        assert all(0 <= confidence <= 1 for p in predictions for confidence in p["confidence"])


def test_hiera_is_recognised_trained_and_evaluated(trained, tmp_path, without_picture):
    """Table 4. Four blocks of 2 x 2 mask units: four image tokens."""
    size = dict(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], image_size=[64, 64])
    transformers.HieraModel(transformers.HieraConfig(**size)).save_pretrained(tmp_path / "hiera")
    weights = trained("--vit", tmp_path / "hiera", "--image-size", 64, "--epochs", 1)["model"]
    adapters = {f"vit.blocks.{i}.attn.{x}.lora_{matrix}" for i in range(4) for x in "qv" for matrix in "AB"}
    assert {name for name in weights if name.startswith("vit")} == adapters
    assert all(weights[name].any() for name in adapters)
    assert weights["projection.weight"].shape == (32, 64)
    evaluate.main(command_line(tmp_path / "run" / "ckpt.pt"))
    report, _ = read_results(tmp_path / "run")
    assert report["objects"] == 6


@pytest.mark.parametrize("way", PRETRAINING)
def test_pretraining_trains_the_projection_alone_and_init_goes_on_from_it(arguments, trained, tmp_path, way):
    """Table 9."""
    fresh = train.load_model(train.parse_arguments(arguments()), "cpu").state_dict()
    before = trained("--pretrain", way, "--epochs", 1, out="before")
    path = tmp_path / "before" / "ckpt.pt"
    assert before["model"].keys() == PROJECTION
    assert before["args"]["tune_llm"] == before["args"]["tune_vit"] == "frozen"
    assert not torch.equal(before["model"]["projection.weight"], fresh["projection.weight"])
    assert train.load_chat(Namespace(**before["args"])).instruction is PRETRAINING[way]
    assert "--init" in refused(evaluate, [path])

    started = train.load_model(train.parse_arguments(arguments("--init", path)), "cpu").state_dict()
    assert started.keys() == fresh.keys()
    for name, value in started.items():
        expected = before["model"].get(name, fresh[name])  # adapters start as ever
        assert torch.equal(value, expected), name
    after = trained("--init", path, "--epochs", 1, out="after")
    assert after["model"].keys() >= LORA


def test_a_projection_of_another_width_is_refused(arguments, tmp_path):
    weights = {"projection.weight": torch.zeros(9, 9), "projection.bias": torch.zeros(9)}
    torch.save({"args": {}, "descriptions": {}, "model": weights, "optimizer": {}, "step": 1},
               tmp_path / "wide.pt")
    line = refused(train, arguments("--init", tmp_path / "wide.pt"))
    assert "wide.pt: weight is (9, 9) in the checkpoint, (32, 32) here" in line


def test_a_resumed_run_does_not_start_from_init_again(arguments, trained, tmp_path):
    trained("--pretrain", "direct", "--epochs", 1, out="first")
    first = tmp_path / "first" / "ckpt.pt"
    straight = trained("--init", first, out="straight")
    train_until(3, arguments("--init", first, "--save-every", 1))
    first.unlink()
    train.main(command_line("--resume", tmp_path / "run" / "ckpt.pt"))
    assert_equal(read_checkpoint(tmp_path / "run")["model"], straight["model"])


# ------------------------------------------------------------------------------------------- files gone wrong


def test_missing_and_truncated_photos_are_listed_or_left_out(arguments, trained, tmp_path, capsys):
    photos = tmp_path / "data" / "images"
    for name in "wagon/0", "wagon/2", "kite/1":
        (photos / f"{name}.jpg").unlink()
    line = refused(train, arguments())
    for word in "3 objects", "wagon 2", "kite 1", "--allow-missing":
        assert word in line
    trained("--allow-missing", "--epochs", 1)
    assert "3 objects of 2 categories" in capsys.readouterr().out

    truncated = photos / "wagon" / "4.jpg"
    truncated.write_bytes(truncated.read_bytes()[:-600])
    trained("--allow-missing", "--epochs", 1, out="broken")
    assert "2 objects of 1 categories" in capsys.readouterr().out
    shutil.rmtree(photos)
    line = refused(train, arguments("--allow-missing", out="none"))
    assert "none of the photos of 6 objects" in line


def test_a_photo_that_breaks_off_stops_a_training_that_may_not_do_without(arguments, tmp_path):
    truncated = tmp_path / "data/images/wagon/4.jpg"
    truncated.write_bytes(truncated.read_bytes()[:-600])
    for workers in 0, 2:
        line = refused(train, arguments("--workers", workers))
        assert f"{truncated}: not a readable photo" in line


def test_checkpoints_are_not_overwritten_nor_mixed_up(arguments, trained, shared, tmp_path):
    path = tmp_path / "run" / "ckpt.pt"
    trained("--epochs", 1)
    good = path.read_bytes()
    line = refused(train, arguments())
    assert str(path) in line and "--resume" in line
    trained("--epochs", 1, out="other")
    other = tmp_path / "other" / "ckpt.pt"
    assert str(path) in refused(train, ["--resume", other, "--epochs", 2, "--out", path.parent])
    three_layers_not_two = shared / "parity" / "llama31" / "vit"
    line = refused(train, ["--resume", path, "--epochs", 2, "--vit", three_layers_not_two])
    assert "lacks 4 trained tensors" in line and "llama31/vit" in line
    assert path.read_bytes() == good


def test_damaged_checkpoints_are_refused_and_left_alone(trained, tmp_path):
    path = tmp_path / "run" / "ckpt.pt"
    trained("--epochs", 1)
    good = path.read_bytes()
    torch.save({"step": 3}, tmp_path / "incomplete.pt")
    incomplete = (tmp_path / "incomplete.pt").read_bytes()
    for bad in good[:-1000], good[:1000], b"", b"text", incomplete:
        path.write_bytes(bad)
        for program, argv in (train, ["--resume", path]), (evaluate, [path]):
            assert f"{path}: not a checkpoint of this program" in refused(program, argv)
        assert path.read_bytes() == bad


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
    assert "step 3: loss" in line and "--lr" in line and len(losses) == 12
    *_, last = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert last["step"] == 3 and re.search(r"(nan|inf)", last["error"])
    assert 1 <= len(last["annotations"]) <= 4 and last["annotations"][0] in line
    assert re.fullmatch(r"10\d \((wagon|kite)/\d.jpg\)", last["annotations"][0])
    checkpoint = read_checkpoint(tmp_path / "run")
    assert checkpoint["step"] == 2 and all(t.isfinite().all() for t in checkpoint["model"].values())


def test_a_link_in_place_of_the_unfinished_checkpoint_is_not_followed(trained, tmp_path):
    (tmp_path / "precious").write_text("thesis")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/ckpt.part").symlink_to(tmp_path / "precious")
    trained("--epochs", 1)
    assert (tmp_path / "precious").read_text() == "thesis"


def test_a_checkpoint_with_another_optimizer_is_not_resumed(arguments, trained, tmp_path):
    checkpoint = trained("--epochs", 1)
    checkpoint["optimizer"]["param_groups"].pop()
    torch.save(checkpoint, path := tmp_path / "run/ckpt.pt")
    assert f"{path}: its optimizer is not of such a run" in refused(train, ["--resume", path, "--epochs", 2])


def test_workers_do_not_print_the_traceback_of_a_broken_connection(trained, tmp_path):
    """Which they would if Ctrl-C came while they send a photo."""
    with silent_workers(train.TrainingSet, tmp_path):
        trained("--workers", 1, "--epochs", 1)


def test_a_step_that_waits_for_photos_says_so(trained, monkeypatch, capsys):
    collate = train.collate
    monkeypatch.setattr(train, "collate", lambda items: time.sleep(0.2) or collate(items))
    trained("--epochs", 1, "--workers", 0)
    shares = re.findall(r"waited (\d+)%", capsys.readouterr().out)
    assert shares and all(50 < int(share) <= 100 for share in shares)  # a step of the tiny network is faster


class Unsendable:
    def __reduce__(self):
        raise RuntimeError("unable to write to file </torch_7_1>: No space left on device (28)")


@pytest.mark.parametrize("how", ["killed", "full"])
def test_a_worker_that_is_lost_is_one_line_that_names_the_way_out(arguments, monkeypatch, how):
    """It kills itself, or cannot send what it has read, since /dev/shm is full."""
    fail = {"killed": lambda _: os.kill(os.getpid(), signal.SIGKILL), "full": lambda _: Unsendable()}
    monkeypatch.setattr(train, "collate", fail[how])
    monkeypatch.setattr(common, "PATIENCE_WITH_PHOTOS", 20)
    line = refused(train, arguments("--workers", 1))
    assert "a process that reads photos was lost" in line and "--workers 0" in line
    assert "timed out" not in line  # noticed at once


def test_ctrl_c_leaves_the_last_checkpoint_whole(arguments, tmp_path):
    """As from a terminal, which sends the signal to the program and its workers."""
    command = [sys.executable, "train.py", *arguments("--epochs", 500, "--save-every", 1, "--workers", 1)]
    program = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **SUBPROCESS, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # jobs in the background ignore it
    while not (tmp_path / "run" / "ckpt.pt").exists() and program.poll() is None:
        time.sleep(0.05)
    os.killpg(program.pid, signal.SIGINT)
    _, said = program.communicate(timeout=300)
    assert program.returncode == 130
    assert re.search("^stopped$", said, re.M) and "Traceback" not in said, said
    assert read_checkpoint(tmp_path / "run")["step"] >= 1
