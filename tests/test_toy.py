"""The toy world is honest, and the model trained on it (assets/toy/ckpt.pt, as `python toy.py` leaves it) does what README says."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT

import toy
from data import Category, Object, crop_of, normalize, read_descriptions, read_objects
from evaluate import pck_of_queries
from llama import Llama
from predict import predict
from train import load_chat, load_model, parse_arguments, read_checkpoint
from vit import ViT


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small toy MP-100: 3 categories to train on, 6 to test on, 5 photos each; drawn with a seed that trained nothing."""
    folder, patch = tmp_path_factory.mktemp("toy"), pytest.MonkeyPatch()
    patch.setattr(toy, "SUBSETS", {"train": (3, 5), "val": (1, 5), "test": (6, 5)})
    toy.draw_toy(folder, seed=1234)
    patch.undo()
    categories = read_descriptions(folder / "descriptions.json")
    return folder, categories, {s: read_objects(folder / f"data/annotations/mp100_split1_{s}.json", categories) for s in toy.SUBSETS}


@pytest.fixture(scope="module")
def trained():
    checkpoint = read_checkpoint(ROOT / "assets/toy/ckpt.pt")
    args = parse_arguments(["--vit", str(ROOT / "assets/toy/vit"), "--llm", str(ROOT / "assets/toy/llm"), "--image-size", str(toy.SIZE)])
    return load_model(args, torch.device("cpu"), checkpoint).eval(), load_chat(args)


def ask(trained, folder, objects, texts, **how):
    categories = [Category("creature", keypoints) for keypoints in texts]
    crops = [crop_of(o) for o in objects]
    images = torch.stack([c.cut(folder / "data/images" / o.photo, toy.SIZE) for c, o in zip(crops, objects)])
    return [[point for point, _ in told] for told in predict(*trained, crops, images, categories, **how)]


def test_the_same_seed_draws_the_same_world(world, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "SUBSETS", {"train": (3, 5), "val": (1, 5), "test": (6, 5)})
    toy.draw_toy(tmp_path, seed=1234)
    for file in (f for f in world[0].rglob("*") if f.is_file()):
        assert (tmp_path / file.relative_to(world[0])).read_bytes() == file.read_bytes(), file


def test_test_categories_have_parts_no_training_has_seen():
    """In neither world: the plans of the toy MP-100, and the sheets of pre-training."""
    plans = {subset: [toy.plan_category(np.random.default_rng((7, i)), subset) for i in range(40)] for subset in ("train", "val", "test")}
    for subset in "train", "val":
        assert not any(pair in toy.UNSEEN for p in plans[subset] for pair in p["limbs"] + p["marks"])
    assert all(sum(pair in toy.UNSEEN for pair in p["limbs"] + p["marks"]) >= 2 for p in plans["test"])
    shown = {point[:2] for i in range(60) for point in toy.draw_sheet((1, i))[1]}
    assert len(shown) > 60 and not shown & set(toy.UNSEEN)


def test_names_are_ambiguous_and_descriptions_are_not(world):
    """In a photo each description fits one point; the names of a category say nothing of colour or shape."""
    _, categories, _ = world
    for category in categories.values():
        descriptions = [d for _, d in category.keypoints]
        assert len(set(descriptions)) == len(descriptions)
        assert not any(colour in name for name, _ in category.keypoints for colour in toy.COLOURS)


def test_the_trained_toy_finds_keypoints_of_unseen_categories_by_their_text(world, trained):
    folder, categories, objects = world
    texts = [categories[o.category].keypoints for o in objects["test"]]
    right = ask(trained, folder, objects["test"], texts, decode="median")
    pck = pck_of_queries(objects["test"], right).mean(0)
    assert pck[0] > 0.65 and pck[3] > 0.85, pck
    # asked with the text of the next keypoint, it finds that one
    shifted = ask(trained, folder, objects["test"], [t[1:] + t[:1] for t in texts], decode="median")
    assert pck_of_queries(objects["test"], shifted).mean(0)[3] < 0.4
    back = [points[-1:] + points[:-1] for points in shifted]
    assert pck_of_queries(objects["test"], back).mean(0)[3] > 0.85


@torch.no_grad()
def test_the_trained_toy_keeps_to_the_template(world, trained):
    """No draft is struck: one pass for the photos and one for each of the six digits; forcing the format changes nothing."""
    folder, categories, objects = world
    model, chat = trained
    some = objects["test"][:8]
    images = normalize(torch.stack([crop_of(o).cut(folder / "data/images" / o.photo, toy.SIZE) for o in some]))
    questions = [chat.questions(categories[o.category]) for o in some]
    passes = []
    hook = model.llama.norm.register_forward_hook(lambda *_: passes.append(1))
    free = model.locate(images, questions, chat)
    hook.remove()
    assert len(passes) == 7
    forced = model.locate(images, questions, chat, constrained=True)
    assert [[ids for ids, _ in told] for told in free] == [[ids for ids, _ in told] for told in forced]


def test_baselines_by_hand():
    """other_texts() gives each keypoint another's text; the mean place of a name is the mean of its points as fractions of the crop."""
    categories = {1: Category("a", [("first mark", "x"), ("second mark", "y"), ("first leg foot", "z")])}
    o = Object(1, 1, "p", (0, 0, 100, 50), np.array([[10.0, 0], [30, 50], [50, 25]]), np.array([True] * 3))
    means = toy.mean_places([o], categories)
    assert set(means) == {"mark", "leg foot"}
    assert np.allclose(means["mark"], [0.2, 0.5]) and np.allclose(means["leg foot"], [0.5, 0.5])


def test_other_texts_moves_every_text(tmp_path):
    texts = [{"name": f"first mark {i}", "description": str(i)} for i in range(5)]
    toy.write_descriptions(tmp_path / "descriptions.json", {1: ("a", texts)})
    others = toy.other_texts(tmp_path, seed=0)
    moved = json.loads((tmp_path / "other_text/descriptions.json").read_text())["keypoint_sets"]["001_a"]
    assert sorted(others[1]) == list(range(5)) and all(k != i for i, k in enumerate(others[1]))
    assert [t["description"] for t in moved] == [str(k) for k in others[1]]


def test_pretraining_leaves_backbones_that_load(tmp_path, monkeypatch):
    """Four steps of it: seeing, then seeing and talking; the same files as those shipped, with other weights."""
    for name, value in dict(ASSETS=tmp_path, SHEETS=40, STEPS=4, LOOK=2).items():
        monkeypatch.setattr(toy, name, value)
    toy.pretrain()
    shipped = ROOT / "assets/toy"
    for file in "vit/config.json", "llm/config.json", "llm/tokenizer.json":
        assert (tmp_path / file).read_text() == (shipped / file).read_text()
    for network, part in (ViT, "vit"), (Llama, "llm"):
        made, old = network.load(tmp_path / part), network.load(shipped / part)
        assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in old.named_parameters()}
    assert sum(f.stat().st_size for f in shipped.rglob("*") if f.is_file()) < 4e6
