"""--dtype: what is frozen and computed in bf16 or fp32, while what trains stays fp32."""

import pytest
import torch
from checkpoints import save_random
from conftest import ROOT
from mp100 import make_wagons_and_kites
from programs import command_line, read_checkpoint, read_results, to_train, train_briefly
from test_hiera import TINY

import checkpoint
import evaluate
import train
from chat import Category
from data import Crop
from evaluate import predict
from model import DTYPES, CapeLLM

TOY = ROOT / "assets/toy"
ASKED = ["the knob on the antenna that is purple", "the sharp end of the green horn", "the orange heart"]


def dtypes(model):
    """-> types of frozen and of trained parameters."""
    return tuple({p.dtype for p in model.parameters() if p.requires_grad is trains}
                 for trains in (False, True))


def test_bf16_finds_the_same_points():
    crop, category = Crop(132.5, 108, 125), Category("creature", [("first mark", text) for text in ASKED])
    image, points = crop.cut(TOY / "creature.jpg", 112), {}
    for dtype in "fp32", "bf16":
        trained = checkpoint.read_checkpoint(TOY / "ckpt.pt")
        model, chat = checkpoint.load_trained(trained, "cpu", TOY / "llm", TOY / "vit", dtype)
        [found] = predict(model, chat, [crop], image[None], [category], decode="median")
        points[dtype] = torch.tensor([p.point for p in found])
        assert dtypes(model) == ({DTYPES[dtype]}, {torch.float32})
    assert not torch.equal(points["bf16"], points["fp32"])
    assert (points["bf16"] - points["fp32"]).abs().max() < 0.02 * crop.side


@pytest.fixture
def loaded(monkeypatch):
    """The types of the frozen weights that train.py and evaluate.py load, one network after another."""
    loaded, load = [], CapeLLM.load

    def load_and_look(*args):
        model = load(*args)
        frozen, trained = dtypes(model)
        assert trained == {torch.float32}
        loaded.append(frozen)
        return model
    monkeypatch.setattr(CapeLLM, "load", load_and_look)
    return loaded


def test_training_in_bf16_leaves_fp32_and_does_not_bind_the_evaluation(tiny, tmp_path, loaded):
    run = read_checkpoint(train_briefly(tiny, tmp_path, "--dtype", "bf16"))
    assert run["args"]["dtype"] == "bf16"
    averages = [average for state in run["optimizer"]["state"].values() for average in state.values()]
    assert {tensor.dtype for tensor in (*run["model"].values(), *averages)} == {torch.float32}
    for dtype in [], ["--dtype", "bf16"], ["--dtype", "fp32"]:
        evaluate.main(command_line(tmp_path / "ckpt.pt", "--workers", 0, *dtype))
    assert loaded == [{torch.bfloat16}, {torch.float32}, {torch.bfloat16}, {torch.float32}]


VARIANTS = {
    "paper": [],
    "packed, recomputed": ["--pack", "--checkpoint-activations"],
    "full ViT": ["--tune-vit", "full"],
    "full LLM": ["--tune-llm", "full"],
    "frozen": ["--tune-vit", "frozen", "--tune-llm", "frozen"],
    "keypoint token": ["--answer", "token"],
    "step by step": ["--instruction", "step"],
    "pretraining": ["--pretrain", "step"],
    "hiera": ["--image-size", 64],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_in_bf16_as_in_fp32_and_is_evaluated(tiny, tmp_path, capsys, loaded, variant):
    flags, losses = list(VARIANTS[variant]), {}
    if variant == "hiera":
        save_random(tmp_path / "hiera", kind="HieraModel", **TINY)
        flags += ["--vit", tmp_path / "hiera"]
    data = make_wagons_and_kites(tmp_path / "data")
    for dtype in "fp32", "bf16":
        train.main(to_train(tiny, data, tmp_path / dtype, "--lr", 1e-3, "--dtype", dtype, *flags))
        said = capsys.readouterr().out.splitlines()
        losses[dtype] = [float(line.split("loss")[1].split()[0]) for line in said if "loss" in line]
    assert loaded == [{torch.float32}, {torch.bfloat16}]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    if "--pretrain" not in flags:
        evaluate.main(command_line(tmp_path / "bf16/ckpt.pt", "--dtype", "bf16", "--workers", 0))
        report, _ = read_results(tmp_path / "bf16")
        assert report["objects"] == 6
