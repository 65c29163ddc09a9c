"""--dtype: what is frozen and computed in bf16 or fp32, while what trains stays fp32."""

import json

import pytest
import torch
from checkpoints import save_random
from mp100 import make_wagons_and_kites
from programs import command_line, read_checkpoint, read_results, to_train, train_briefly
from test_hiera import TINY

import decode
import evaluate
import train
from model import load_network
from tools import score


@pytest.fixture
def loaded(monkeypatch):
    """The types of the frozen weights that train.py and evaluate.py load, one network after another."""
    loaded = []

    def load_and_look(*args):
        model, chat = load_network(*args)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        loaded.append({p.dtype for p in model.parameters() if not p.requires_grad})
        return model, chat
    monkeypatch.setattr(score, "draw_sheet", lambda *_: None)  # which takes long
    for program in train, decode:
        monkeypatch.setattr(program, "load_network", load_and_look)
    return loaded


def test_training_in_bf16_leaves_fp32_and_does_not_bind_the_evaluation(tiny, tmp_path, loaded):
    run = read_checkpoint(train_briefly(tiny, tmp_path, "--dtype", "bf16"))
    assert run["args"]["dtype"] == "bf16"
    averages = [average for state in run["optimizer"]["state"].values() for average in state.values()]
    assert {tensor.dtype for tensor in (*run["model"].values(), *averages)} == {torch.float32}
    for dtype in [], ["--dtype", "bf16"], ["--dtype", "fp32"]:
        evaluate.main(command_line(tmp_path / "ckpt.pt", "--workers", 0, *dtype))
    assert loaded == [{torch.bfloat16}, {torch.float32}, {torch.bfloat16}, {torch.float32}]


@pytest.mark.parametrize("flags", [
    "--pack --checkpoint-activations", "--tune-vit full --tune-llm full", "--answer token",
    "--image-size 64"])
def test_variants_train_in_bf16_as_in_fp32_and_are_evaluated(tiny, tmp_path, loaded, flags):
    """The last is with a Hiera."""
    losses, more = {}, flags.split()
    if "64" in flags:
        save_random(tmp_path / "hiera", kind="HieraModel", **TINY)
        more += ["--vit", tmp_path / "hiera"]
    data = make_wagons_and_kites(tmp_path / "data")
    for dtype in "fp32", "bf16":
        train.main(to_train(tiny, data, tmp_path / dtype, "--lr", 1e-3, "--dtype", dtype, *more))
        log = (tmp_path / dtype / "log.jsonl").read_text().splitlines()
        losses[dtype] = [json.loads(line)["loss"] for line in log]
    assert loaded == ([set(), set()] if "full" in flags else [{torch.float32}, {torch.bfloat16}])
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    evaluate.main(command_line(tmp_path / "bf16/ckpt.pt", "--dtype", "bf16", "--workers", 0))
    assert read_results(tmp_path / "bf16")[0]["objects"] == 6
