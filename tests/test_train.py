"""train.py: the same result however the work is cut up, stopped and resumed; what trains, what is written, what is refused."""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import nullcontext, redirect_stderr

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from transformers import HieraConfig, HieraModel

import evaluate
import train
from chat import INSTRUCTIONS
from model import CapeLLM

SETS = {"wagon": ["front wheel", "rear wheel", "roof", "shaft", "lamp"], "kite": ["tip", "tail", "left corner"]}
LORA = {f"{layer}.lora_{m}" for i in (0, 1) for x in "qv" for m in "AB"
        for layer in (f"vit.blocks.{i}.attn.{x}", f"llama.layers.{i}.self_attn.{x}_proj")}
PROGRAM = dict(cwd=ROOT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # how subprocesses are started


def draw_mp100(folder):
    """A miniature MP-100 of noise: objects 100 to 105 are wagons and kites by turns, 5 and 3 points, the same in train and test."""
    rng, images, annotations = np.random.default_rng(0), [], []
    for i in range(6):
        category, names = list(SETS.items())[i % 2]
        path, (width, height) = folder / "images" / category / f"{i}.jpg", (120 - 10 * i, 80)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 12 - i, 3), dtype=np.uint8)).resize((width, height)).save(path)
        points = [[*rng.uniform(20, 60, 2).round(1), 2] if (i, k) != (2, 1) else [0, 0, 0] for k in range(len(names))]
        images.append({"id": i, "file_name": f"{category}/{i}.jpg", "width": width, "height": height})
        annotations.append({"id": 100 + i, "image_id": i, "category_id": 1 + i % 2, "bbox": [10, 15, 56, 50], "keypoints": sum(points, [])})
    contents = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "wagon"}, {"id": 2, "name": "kite"}]}
    sets = {s: [{"name": n, "description": f"the {n} of a {s}"} for n in names] for s, names in SETS.items()}
    categories = {str(i): {"name": s, "keypoint_set": s} for i, s in enumerate(SETS, 1)}
    (folder / "annotations").mkdir()
    for subset in "train", "test":
        (folder / "annotations" / f"mp100_split1_{subset}.json").write_text(json.dumps(contents))
    (folder / "descriptions.json").write_text(json.dumps({"keypoint_sets": sets, "categories": categories}))
    return folder


@pytest.fixture
def arguments(tiny, tmp_path):
    """arguments("--lr", 1, out="a") -> a command line: 15 examples an epoch, so 4 steps, the last of them filled with one."""
    data = draw_mp100(tmp_path / "data")
    files = ["--data", data, "--descriptions", data / "descriptions.json", "--llm", tiny / "llm", "--vit", tiny / "vit", "--workers", 0]
    recipe = ["--image-size", 56, "--rounds", 2, "--epochs", 2, "--batch", 4]
    return lambda *more, out="run": list(map(str, [*files, *recipe, "--out", tmp_path / out, *more]))


@pytest.fixture
def trained(arguments, tmp_path):
    """trained(...) trains with these arguments and gives the checkpoint."""
    return lambda *more, out="run": train.main(arguments(*more, out=out)) or read(tmp_path / out)


def read(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)


def refused(program, argv):
    """Runs a program as the command line would, sees exit code 2 and one line of error, and gives that line."""
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["program", *map(str, argv)])
        train.run(program.main)
    lines = re.sub(r"\x1b\[\w", "", err.getvalue()).replace("\r", "\n").splitlines()  # the progress bar's own are not counted
    [line] = [line for line in lines if line.strip() and "%|" not in line and not re.match("usage: |  +", line)]
    assert stop.value.code == 2 and re.match("error: |program: error: ", line), err.getvalue()
    return line


def stop_at(step, monkeypatch):
    """From now on training is interrupted when it has written the checkpoint of this step."""
    def save_and_stop(path, save=train.save_checkpoint, **contents):
        save(path, **contents)
        if contents["step"] == step:
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_checkpoint", save_and_stop)


def losses_and_norms(log):
    """Of a run of 8 steps. The norm of the gradient tells of a wrong mean, which AdamW would not mind."""
    assert len(found := re.findall(r"^step .* loss (\S+) .* \|grad\| (\S+) ", log, re.M)) == 8
    return np.array(found, dtype=float)


def test_two_processes_give_the_parameters_and_losses_of_one(arguments, trained, tmp_path, capsys):
    """2 processes x 2 accumulated = 1 x 4, with dropout."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    done = subprocess.run(command + arguments("--clip", 0.05, out="two"), capture_output=True, **PROGRAM)
    assert done.returncode == 0, done.stderr
    assert "batch 4 = micro-batch 1 x 2 processes x 2 accumulated, on cpu" in done.stdout
    one, two = trained("--clip", 0.05, out="one"), read(tmp_path / "two")
    assert losses_and_norms(done.stdout) == pytest.approx(losses_and_norms(capsys.readouterr().out), abs=2e-3)  # one of the two speaks
    torch.testing.assert_close(one["model"], two["model"], rtol=0, atol=1e-6)
    assert min(t.abs().max() for name, t in one["model"].items() if name.endswith("lora_B")) > 1e-3  # it was zero


def test_gradients_are_exchanged_once_a_step(trained, monkeypatch):
    """Seen by the first of two processes; the other one is feigned."""
    events = []

    def learner(model, **options):
        model.no_sync = lambda: events.append("quiet") or nullcontext()
        model.register_forward_hook(lambda *_: events.append("forward"))
        return model
    monkeypatch.setattr(train, "start_processes", lambda: (0, 2, torch.device("cpu")))
    monkeypatch.setattr(train, "DistributedDataParallel", learner)
    monkeypatch.setattr(train.dist, "all_reduce", lambda loss: None)
    trained("--batch", 6, "--epochs", 1)
    assert events == 3 * ["quiet", "forward", "quiet", "forward", "forward"]


@pytest.mark.parametrize("workers, stops", [(0, (1, 3, 4, 7)), (2, (2, 4))])
def test_a_run_stopped_at_any_step_and_resumed_is_bit_identical(arguments, trained, tmp_path, workers, stops):
    straight = trained(out="straight")
    for step in stops:  # an epoch has 4 steps
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at(step, patch)
            train.main(arguments("--save-every", 1, "--workers", workers, out=f"stopped{step}"))
        assert read(folder := tmp_path / f"stopped{step}")["step"] == step
        train.main(["--resume", str(folder / "ckpt.pt")])  # the other arguments are in the checkpoint
        resumed = read(folder)
        assert (resumed["step"], resumed["epoch"]) == (8, 1) and len(resumed["optimizer"]["state"]) == len(straight["model"])
        torch.testing.assert_close((resumed["model"], resumed["optimizer"]), (straight["model"], straight["optimizer"]), rtol=0, atol=0)


def test_the_size_of_micro_batches_changes_nothing(trained, capsys):
    """Of the gradients; dropout, here without an adapter to act on, is drawn by micro-batch."""
    runs = [(trained("--micro-batch", n, "--tune-vit", "frozen", "--tune-llm", "frozen", out=f"micro{n}")["model"],
             losses_and_norms(capsys.readouterr().out)) for n in (4, 2, 1)]
    for weights, log in runs[1:]:
        torch.testing.assert_close(weights, runs[0][0], rtol=0, atol=1e-5)
        assert log == pytest.approx(runs[0][1], abs=2e-3)


def test_each_micro_batch_has_its_own_dropout(trained, monkeypatch):
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    monkeypatch.setattr(CapeLLM, "forward", lambda self, *batch: self.projection.weight.sum())  # to be fast
    monkeypatch.setattr(train.TrainingSet, "__getitem__", lambda self, i: {
        "image": torch.zeros(3, 56, 56, dtype=torch.uint8), "tokens": [0, 1], "labels": [-100, 1], "groups": [0, 0]})
    trained("--batch", 2100)
    assert len(seeds) == 1 + 4200 and len({seed % 2**32 for seed in seeds[1:]}) == 4200  # the CPU's generator takes 32 bits


def test_the_last_batch_is_filled_and_processes_share_it_out():
    args = Namespace(batch=4, micro_batch=1)
    assert list(train.micro_batches(6, range(2), args, 0, 1)) == [[i] for i in (0, 1, 2, 3, 4, 5, 0, 1)]
    assert list(train.micro_batches(6, range(2), args, 1, 2)) == [[1], [3], [5], [1]]
    assert list(train.micro_batches(6, range(1, 2), args, 0, 2)) == [[4], [0]]  # after a restart behind the first step
    assert list(train.micro_batches(3, range(1), Namespace(batch=8, micro_batch=4), 0, 1)) == [[0, 1, 2, 0], [1, 2, 0, 1]]


def test_compiled_blocks_train_to_the_same_weights(trained, monkeypatch):
    """Traced, forward and backward, as --compile does it; but run as traced, since to make kernels of it takes a minute."""
    plain, compiled = trained("--epochs", 1, out="plain"), []

    def compile(block, **options):
        compiled.append(type(block).__module__)
        block._compiled_call_impl = torch.compile(block._call_impl, backend="aot_eager", fullgraph=True, **options)
    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    torch.testing.assert_close(trained("--compile", "--epochs", 1, out="compiled")["model"], plain["model"], rtol=0, atol=1e-5)
    assert compiled == ["vit"] * 2 + ["llama"] * 2


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    rates = [train.learning_rate(step, 99, Namespace(lr=2.0, warmup=0.03)) for step in range(100)]  # 2.97 -> 3 of warm-up, 96 of cosine
    assert rates[:4] == pytest.approx([0, 2 / 3, 4 / 3, 2])
    assert [rates[3 + 24 * i] for i in (1, 2, 3, 4)] == pytest.approx([1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0])


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_rate_and_decay_are_those_of_the_published_trainer(tiny, tmp_path, tune):
    """Hugging Face's: its rate at each step, and the parameters that it lets decay. LayerScale's are no norms to it, either."""
    import transformers
    args = Namespace(lr=5e-4, warmup=0.03, weight_decay=0.01)
    model = CapeLLM.load(tiny / "vit", tiny / "llm", 56, tune, tune)
    theirs = transformers.Trainer(model, transformers.TrainingArguments(
        tmp_path, learning_rate=5e-4, warmup_steps=0.03, weight_decay=0.01, lr_scheduler_type="cosine", use_cpu=True, report_to="none"))
    scheduler = theirs.create_optimizer() and theirs.create_scheduler(99)
    for step in range(99):
        assert train.learning_rate(step, 99, args) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        scheduler.optimizer.step(), scheduler.step()

    def decaying(optimizer):
        return {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    ours = train.make_optimizer(model, args, torch.device("cpu"))
    norms = {id(p) for name, p in model.llama.named_parameters() if "norm" in name}  # of a class that it does not know
    assert decaying(ours) == decaying(theirs.optimizer) - norms and len(decaying(ours)) > 10


def test_log_tells_the_arithmetic_then_every_step(trained, tiny, capsys):
    trained("--lr", 0.25, "--warmup", 0.25)
    log = capsys.readouterr().out
    assert log.startswith("6 objects of 2 categories, 8 steps in 2 epochs\nbatch 4 = micro-batch 1 x 1 processes x 4 accumulated, on ")
    # rank 8: (8 x 32 + 32 x 8) twice in two layers; v of the LLM has two heads of 8: 8 x 32 + 16 x 8; 32 x 32 + 32
    numbers = dict(re.findall(r"^(\w+) +([\d,]+) of +[\d,]+ parameters", log.split("\nstep ")[0], re.M))
    assert numbers == {"vit": "2,048", "projection": "1,056", "llm": "1,792"}
    logged = re.findall(r"^step +(\d+)  epoch +(\d)  loss (\S+)  lr (\S+)  .*? [\d,]+ tokens/s  [\d.]+ GiB", log, re.M)
    assert [(int(step), int(epoch)) for step, epoch, *_ in logged] == [(i, 1 + (i > 4)) for i in range(1, 9)]
    cosine = [0.125 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert [float(lr) for *_, lr in logged] == pytest.approx([0, 0.125, *cosine], rel=0.01)
    vocabulary = json.loads((tiny / "llm" / "config.json").read_text())["vocab_size"]
    assert float(logged[0][2]) == pytest.approx(math.log(vocabulary), abs=1)


def test_loss_falls(trained, capsys):
    trained("--epochs", 8, "--lr", 0.01, "--tune-llm", "full")
    losses = [float(x) for x in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert len(losses) == 32 and max(losses[-4:]) < 0.5 * losses[0]


@pytest.mark.parametrize("vit, llm", [("lora", "lora"), ("frozen", "frozen"), ("full", "lora"), ("lora", "full")])
def test_trains_and_saves_what_it_says_and_leaves_the_rest_untouched(trained, tiny, tmp_path, monkeypatch, vit, llm):
    models, load = [], train.load_model
    monkeypatch.setattr(train, "load_model", lambda *args: models.append(load(*args)) or models[0])
    checkpoint = trained("--tune-vit", vit, "--tune-llm", llm, "--epochs", 1)
    published = dict(CapeLLM.load(tiny / "vit", tiny / "llm", 56, "frozen", "frozen").named_parameters())
    names = {"lora": LORA, "full": published, "frozen": []}
    expected = {n for part, tune in (("vit", vit), ("llama", llm)) for n in names[tune] if n.startswith(part)}
    expected |= {"projection.weight", "projection.bias"}
    own = dict(models[0].named_parameters())
    torch.testing.assert_close(checkpoint["model"], {name: own[name].detach() for name in expected}, rtol=0, atol=0)
    size = (tmp_path / "run" / "ckpt.pt").stat().st_size  # weights and Adam's two moments, nothing hidden behind them
    assert size < 3 * 4 * sum(t.numel() for t in checkpoint["model"].values()) + 2000 * len(expected) + 10000
    assert checkpoint.keys() == {"args", "model", "optimizer", "step", "epoch"} and checkpoint["args"]["tune_vit"] == vit
    assert (checkpoint["step"], checkpoint["epoch"]) == (4, 0) and all(own[n].any() for n in expected if n.endswith("lora_B"))
    for name in published.keys() - {"projection.weight", "projection.bias"}:
        now = own.get(name, own.get(re.sub(r"(\w+)$", r"base.\1", name)))  # an adapter keeps the layer as its base
        assert torch.equal(now, published[name]) == (name not in expected), name


def test_real_photographs_train_and_evaluate_end_to_end(shared, tiny, tmp_path, monkeypatch):
    stop_at(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):  # the whole epoch takes a minute
        train.main(list(map(str, [
            "--data", shared / "mini_mp100", "--descriptions", ROOT / "descriptions.json", "--llm", tiny / "llm", "--vit", tiny / "vit",
            "--out", tmp_path, "--image-size", 56, "--batch", 16, "--micro-batch", 8, "--save-every", 2, "--workers", 2])))
    evaluate.main([str(tmp_path / "ckpt.pt"), "--constrained"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["objects"] == 40 and report["malformed"] == report["without photo"] == 0 and len(report["per category"]) == 6


@pytest.mark.parametrize("wrong, message", [
    (["--micro-batch", 3], "--batch 4 is not a multiple of --micro-batch 3 x 1"), (["--llm", "nowhere"], "nowhere/tokenizer.json"),
    (["--vit", "nowhere"], "nowhere/config.json"), (["--split", 6], "mp100_split6_train.json: no such file"),
    (["--resume", "nowhere.pt"], "nowhere.pt: no such checkpoint"), (["--image-size", 57], "57 is not a multiple"),
    (["--descriptions", "nowhere.json"], "nowhere.json: no such file"), (["--out", ROOT / "train.py" / "x"], "train.py/x"),
    (["--epoch", 3], "--epoch"), (["--rounds", "many"], "--rounds"), (["--instruction", "long"], "--instruction"),
    (["--pretrain", "direct", "--instruction", "name"], "leave out --instruction"),
    (["--pretrain", "step", "--answer", "token"], "leave out --instruction, --answer"),
    (["--pretrain", "direct", "--tune-vit", "full"], "--tune-*"), (["--pretrain", "step", "--tune-llm", "full"], "--tune-*"),
    (["--init", "nowhere.pt"], "nowhere.pt: no such checkpoint"), (["--seed", -1], "--seed"),
    (["--resume", "a.pt", "--init", "b.pt"], "give only one of them"),
    *(([f"--{n}", 0], f"--{n}") for n in ("batch", "micro-batch", "rounds", "save-every", "log-every")),
])
def test_wrong_arguments_are_one_line(arguments, wrong, message):
    assert message in refused(train, arguments(*wrong))


# ----------------------------------------------------------------------------------------------- the paper's variants


@pytest.mark.parametrize("how", [["--instruction", i] for i in INSTRUCTIONS] + [
    ["--answer", "token"], ["--answer", "token", "--instruction", "step"], ["--rounds", "dynamic"], ["--pack", "--instruction", "step"]],
    ids=" ".join)
def test_every_variant_trains_and_then_asks_in_the_way_it_was_trained(trained, tmp_path, monkeypatch, how):
    """The conversations of training, seen on their way into the network, hold the very questions that the evaluation asks."""
    trained_on, asked = [], []
    forward, locate = CapeLLM.forward, CapeLLM.locate
    monkeypatch.setattr(CapeLLM, "forward", lambda self, *batch: trained_on.append(batch) or forward(self, *batch))
    monkeypatch.setattr(CapeLLM, "locate", lambda self, images, questions, chat, *rest: asked.append((questions, chat)) or locate(
        self, images, questions, chat, *rest))
    trained(*how, "--epochs", 1)
    evaluate.main([str(tmp_path / "run" / "ckpt.pt")])
    lines = [" ".join(map(str, row)) for _, tokens, *_ in trained_on for row in tokens.tolist()]
    chat = asked[0][1]
    for question in sum(sum((questions for questions, _ in asked), []), []):
        within = any(" ".join(map(str, question)) in line for line in lines)
        assert within or "diverse" in chat.instruction.__name__
    assert all(" ".join(map(str, chat.opening)) in line for line in lines) and bool(chat.opening) == ("step" in how)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["objects"] == 6 and ("token" not in how or report["malformed"] == 0)
    told = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert all((confidence is None) == ("token" in how) for p in told for confidence in p["confidence"])
    rounds = {sum(label == chat.eos for label in row) for _, _, labels, _ in trained_on for row in labels.tolist()}
    assert "dynamic" not in how or rounds - {1, 2}


def test_hiera_is_recognised_trained_and_evaluated(trained, tmp_path):
    """Table 4. Four blocks of 2 x 2 mask units: four image tokens."""
    size = dict(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], image_size=[64, 64])
    HieraModel(HieraConfig(**size)).save_pretrained(tmp_path / "hiera")
    checkpoint = trained("--vit", tmp_path / "hiera", "--image-size", 64, "--epochs", 1)
    adapters = {f"vit.blocks.{i}.attn.{x}.lora_{m}" for i in range(4) for x in "qv" for m in "AB"}
    assert {name for name in checkpoint["model"] if name.startswith("vit")} == adapters
    assert all(checkpoint["model"][name].any() for name in adapters) and checkpoint["model"]["projection.weight"].shape == (32, 64)
    evaluate.main([str(tmp_path / "run" / "ckpt.pt")])
    assert json.loads((tmp_path / "run" / "report.json").read_text())["objects"] == 6


def test_pretraining_trains_the_projection_alone_and_init_goes_on_from_it(arguments, trained, tmp_path):
    """Table 9."""
    fresh = train.load_model(train.parse_arguments(arguments()), "cpu").state_dict()
    for way in train.PRETRAINING:
        before = trained("--pretrain", way, out=way)
        assert before["model"].keys() == {"projection.weight", "projection.bias"} and before["args"]["tune_llm"] == "frozen"
        assert not torch.equal(before["model"]["projection.weight"], fresh["projection.weight"])
        path = tmp_path / way / "ckpt.pt"
        assert train.load_chat(Namespace(**before["args"])).instruction is train.PRETRAINING[way]
        started = train.load_model(train.parse_arguments(arguments("--init", path)), "cpu").state_dict()
        for name, value in started.items():
            assert torch.equal(value, before["model"].get(name, fresh[name])), name  # adapters start as ever
        assert "--init" in refused(evaluate, [path])
        assert trained("--init", path, "--epochs", 1, out=f"after {way}")["model"].keys() >= LORA
    wide = {"args": {}, "model": {"projection.weight": torch.zeros(9, 9), "projection.bias": torch.zeros(9)}, "optimizer": {}, "step": 1}
    torch.save(wide, tmp_path / "wide.pt")
    line = refused(train, arguments("--init", tmp_path / "wide.pt", out="w"))
    assert "wide.pt: weight is (9, 9) in the checkpoint, (32, 32) here" in line


def test_a_resumed_run_does_not_start_from_init_again(arguments, trained, tmp_path):
    trained("--pretrain", "direct", out="first")
    straight = trained("--init", tmp_path / "first" / "ckpt.pt", out="straight")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(3, patch)
        train.main(arguments("--init", tmp_path / "first" / "ckpt.pt", "--save-every", 1))
    (tmp_path / "first" / "ckpt.pt").unlink()
    train.main(["--resume", str(tmp_path / "run" / "ckpt.pt")])
    torch.testing.assert_close(read(tmp_path / "run")["model"], straight["model"], rtol=0, atol=0)


def test_missing_and_truncated_photos_are_listed_or_left_out(arguments, trained, tmp_path, capsys):
    photos = tmp_path / "data" / "images"
    for name in "wagon/0", "wagon/2", "kite/1":
        (photos / f"{name}.jpg").unlink()
    line = refused(train, arguments())
    assert all(word in line for word in ("3 objects", "wagon 2", "kite 1", "--allow-missing"))
    trained("--allow-missing", "--epochs", 1)
    assert "3 objects of 2 categories" in capsys.readouterr().out
    (photos / "wagon" / "4.jpg").write_bytes((photos / "wagon" / "4.jpg").read_bytes()[:-600])
    for workers in 0, 2:
        line = refused(train, arguments("--allow-missing", "--workers", workers, out="broken"))
        assert f"{photos}/wagon/4.jpg: not a readable photo" in line
    shutil.rmtree(photos)
    assert "none of the photos of 6 objects" in refused(train, arguments("--allow-missing", out="none"))


def test_checkpoints_are_not_overwritten_nor_mixed_up(arguments, trained, shared, tmp_path):
    trained("--epochs", 1)
    path, good = tmp_path / "run" / "ckpt.pt", (tmp_path / "run" / "ckpt.pt").read_bytes()
    assert str(path) in (line := refused(train, arguments())) and "--resume" in line
    trained("--epochs", 1, out="other")
    assert str(path) in refused(train, ["--resume", tmp_path / "other" / "ckpt.pt", "--epochs", 2, "--out", tmp_path / "run"])
    line = refused(train, ["--resume", path, "--vit", shared / "parity" / "llama31" / "vit"])  # of three layers, not two
    assert "lacks 4 trained tensors" in line and "llama31/vit" in line and path.read_bytes() == good
    torch.save({"step": 3}, tmp_path / "other.pt")
    for bad in good[:-1000], good[:1000], b"", b"text", (tmp_path / "other.pt").read_bytes():
        path.write_bytes(bad)
        for program, argv in (train, ["--resume", path]), (evaluate, [path]):
            assert f"{path}: not a checkpoint of this program" in refused(program, argv)
        assert path.read_bytes() == bad


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")])
def test_a_full_disk_leaves_the_last_checkpoint_whole(arguments, tmp_path, monkeypatch, error):
    def fill_up(contents, path, save=torch.save):
        if contents["step"] < 3:
            return save(contents, path)
        path.write_bytes(b"half")
        raise error
    monkeypatch.setattr(torch, "save", fill_up)
    assert error.args[-1] in (line := refused(train, arguments("--save-every", 1))) and str(tmp_path / "run" / "ckpt.pt") in line
    assert read(tmp_path / "run")["step"] == 2 and len(list((tmp_path / "run").iterdir())) == 1


def test_ctrl_c_leaves_the_last_checkpoint_whole(arguments, tmp_path):
    command = [sys.executable, "train.py", *arguments("--epochs", 500, "--save-every", 1, "--workers", 1)]
    program = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **PROGRAM,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # jobs in the background ignore it
    while not (tmp_path / "run" / "ckpt.pt").exists() and program.poll() is None:
        time.sleep(0.05)
    program.send_signal(signal.SIGINT)
    said = program.communicate(timeout=300)[1]
    assert program.returncode == 130 and re.search("^stopped$", said, re.M) and "Traceback" not in said, said
    assert read(tmp_path / "run")["step"] >= 1
