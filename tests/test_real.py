"""Real pretrained backbones, SmolLM2-135M and a DINOv2 ViT-S/14: against Transformers, and in all programs.

CAPELLM_REAL names a folder with their llm/ and vit/, as .ci/run makes it; without it these tests are skipped.
"""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from programs import command_line, read_results

import evaluate
import predict
import train
from chat import Chat
from data import Crop, normalize
from llama import Llama
from model import read_checkpoint
from vit import ViT

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def real():
    if "CAPELLM_REAL" not in os.environ:
        pytest.skip("no real backbones: CAPELLM_REAL names no folder with llm/ and vit/")
    return Path(os.environ["CAPELLM_REAL"])


@torch.no_grad()
def test_llama_equals_transformers(real):
    text = "Where is the left eye? Beside the nose and below the left ear, at [0.417,0.283]."
    tokens = torch.tensor([Chat(real / "llm").encode(text)])
    theirs = transformers.LlamaForCausalLM.from_pretrained(real / "llm", dtype=torch.float32)
    want = theirs(tokens, output_hidden_states=True)
    llama = Llama.load(real / "llm")
    hidden = llama(llama.embed_tokens(tokens))
    torch.testing.assert_close(hidden, want.hidden_states[-1], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(llama.lm_head(hidden), want.logits, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_vit_equals_transformers_on_a_photo(real, shared):
    photo = shared / "mini_mp100/images/animalpose_cat/ca110.jpeg"
    image = normalize(Crop(250, 190, 380).cut(photo, 112)[None])
    ours, theirs = ViT.load(real / "vit", 518), transformers.Dinov2Model.from_pretrained(real / "vit")
    assert torch.equal(ours.pos_embed, theirs.embeddings.position_embeddings)
    ours.resize_positions(112)
    theirs.embeddings.position_embeddings = ours.pos_embed  # theirs would be resized otherwise
    want = theirs(image).last_hidden_state[:, 1:]
    torch.testing.assert_close(ours(image), want, atol=1e-3, rtol=1e-4)


@pytest.fixture(scope="module")
def data(shared, tmp_path_factory):
    """Three photographs of mini_mp100: two of a mouse to train on, one of another that reaches to test."""
    folder, source = tmp_path_factory.mktemp("data"), shared / "mini_mp100"
    (folder / "images").symlink_to(source / "images")
    (folder / "annotations").mkdir()
    for subset, category in ("train", 101), ("test", 102):
        name = f"annotations/mp100_split1_{subset}.json"
        contents = json.loads((source / name).read_text())
        mice = [a for a in contents["annotations"] if a["category_id"] == category]
        n = 2 if subset == "train" else 1
        (folder / name).write_text(json.dumps(contents | {"annotations": mice[:n]}))
    return folder


def test_trains_evaluates_and_predicts_on_photographs(real, data, shared, tmp_path, capsys):
    descriptions = shared / "mini_mp100/descriptions.json"
    train.main(command_line(
        "--data", data, "--descriptions", descriptions, "--llm", real / "llm", "--vit", real / "vit",
        "--image-size", 56, "--pack", "--epochs", 3, "--batch", 2, "--lr", 2e-3, "--warmup", 0,
        "--workers", 0, "--out", tmp_path))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and losses[-1] < 0.9 * losses[0], losses
    weights = read_checkpoint(tmp_path / "ckpt.pt")["model"]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in weights.values())

    evaluate.main(command_line(tmp_path / "ckpt.pt", "--constrained", "--workers", 0))
    report, predictions = read_results(tmp_path)
    assert report["malformed"] == 0
    assert [len(p["keypoints"]) for p in predictions] == [5]

    photo = shared / "mini_mp100/images/animalpose_cat/ca110.jpeg"
    predict.main(command_line(
        tmp_path / "ckpt.pt", photo, "--keypoints", "nose: the tip of the snout, below both eyes",
        "--out", tmp_path / "found"))
    assert "nose" in capsys.readouterr().out and (tmp_path / "found/ca110.png").exists()


def test_the_model_of_photographs_finds_points_of_a_face_by_words(real):
    """As README asks it; the places were marked by hand."""
    locator = predict.Locator(ROOT / "assets/real/ckpt.pt", "median", vit=real / "vit")
    found = locator(ROOT / "assets/real/astronaut.jpg", {
        "nose": "the tip of the nose, above the mouth",
        "left eye": "the middle of the eye on the person's own left side",
        "right mouth corner": "the corner of the mouth on the person's own right side, below the nose"},
        box=(172, 72, 102, 92))
    for name, place in ("nose", (224, 125)), ("left eye", (248, 101)), ("right mouth corner", (205, 143)):
        assert math.dist((found[name].x, found[name].y), place) < 10, name
