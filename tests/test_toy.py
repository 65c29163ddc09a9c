"""The toy world is honest, and the model trained on it (assets/toy/ckpt.pt, as toy.py leaves it) does what
README says.
"""

import json
import subprocess
from argparse import Namespace
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT

import evaluate
import toy
import train
from chat import Category
from common import InputError
from data import Instance, crop_of, normalize, read_instances
from decode import locate
from llama import Llama
from model import load_network, load_weights, read_checkpoint
from toyworld import creatures, pretrain, sheets, variants
from vit import ViT

SHIPPED = ROOT / "assets/toy"
SUBSETS = {"train": (3, 5), "val": (1, 5), "test": (10, 5)}  # few categories, few photos of each
SHORT = ["--epochs", "1", "--batch", "8", "--micro-batch", "8", "--workers", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small toy MP-100, drawn with a seed that trained nothing."""
    folder = tmp_path_factory.mktemp("toy")
    creatures.draw_toy(folder, seed=1234, subsets=SUBSETS)
    return folder


@pytest.fixture(scope="module")
def categories(folder):
    return toy.read_categories(folder)


@pytest.fixture(scope="module")
def unseen(folder, categories):
    """Creatures of categories that nothing was trained on."""
    return read_instances(folder / "data/annotations/mp100_split1_test.json", categories)


@pytest.fixture(scope="module")
def trained():
    """Network and Chat of the shipped checkpoint."""
    checkpoint = read_checkpoint(SHIPPED / "ckpt.pt")
    folders = {"vit": SHIPPED / "vit", "llm": SHIPPED / "llm"}
    model, chat = load_network(Namespace(**checkpoint["args"] | folders))
    load_weights(model, checkpoint, SHIPPED)
    return model.eval(), chat


@pytest.fixture(scope="module")
def found(trained, folder, categories, unseen):
    """Predictions of all keypoints of the unseen creatures, by the median."""
    return ask(trained, folder, unseen, [categories[o.category_id].keypoints for o in unseen])


def ask(trained, folder, instances, texts):
    model, chat = trained
    questions = [chat.encode_questions(Category("creature", keypoints)) for keypoints in texts]
    crops = [crop_of(o).cut(folder / "data/images" / o.photo, sheets.SIZE) for o in instances]
    return locate(model, normalize(torch.stack(crops)), questions, chat, decode="median")


def pck(instances, found):
    """-> PCK@0.05, PCK@0.2"""
    points = [[tuple(crop_of(o).to_photo(p.point)) for p in of_photo]
              for o, of_photo in zip(instances, found)]
    return evaluate.pck_of_queries(instances, points).mean(0)[[0, 3]]


# ------------------------------------------------------------------------------------------------ the worlds


def test_the_same_seed_draws_the_same_world(folder, tmp_path):
    creatures.draw_toy(tmp_path, seed=1234, subsets=SUBSETS)
    files = [file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 3 * 5 + 5 + 10 * 5 + 3 + 1 + 1  # photos, annotations, descriptions, the mark
    for file in files:
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes(), file


def test_data_that_is_no_toys_is_not_replaced(tmp_path):
    (tmp_path / "data/mp100").mkdir(parents=True)
    with pytest.raises(InputError, match="data: not the toy's"):
        toy.main(["--out", str(tmp_path)])
    assert (tmp_path / "data/mp100").exists() and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "run").mkdir()
    for name in "descriptions.json", "ckpt.pt":
        (tmp_path / "run" / name).write_text("precious")
        with pytest.raises(InputError, match=f"run/{name}: not the toy's"):
            toy.main(["--out", str(tmp_path / "run")])
        (tmp_path / "run" / name).rename(tmp_path / name)
    assert (tmp_path / "ckpt.pt").read_text() == "precious"
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/data: cannot be made"):
        toy.main(["--out", str(tmp_path / "file")])


def test_backbones_go_where_they_are_wanted(tmp_path, monkeypatch):
    folders = []
    monkeypatch.setattr(pretrain, "make_backbones", folders.append)
    toy.main(["--pretrain"])
    toy.main(["--pretrain", "--out", str(tmp_path)])
    assert [folder.resolve() for folder in folders] == [SHIPPED, tmp_path]


def test_only_test_categories_have_the_pairs_kept_for_them():
    for subset in "train", "val", "test":
        plans = [creatures.plan_category(np.random.default_rng((7, i)), subset) for i in range(40)]
        kept = [sum(pair in creatures.UNSEEN for pair in plan["limbs"] + plan["marks"]) for plan in plans]
        assert min(kept) >= 2 if subset == "test" else max(kept) == 0


def test_sheets_show_all_pairs_but_those_kept_for_test_categories():
    shown = {point[:2] for i in range(60) for point in sheets.draw_sheet((1, i))[1]}
    assert len(shown) > 60
    assert not shown & set(creatures.UNSEEN)


def test_names_are_ambiguous_and_descriptions_are_not(categories):
    """A description fits one keypoint of its category; names say nothing of colour."""
    for category in categories.values():
        names, descriptions = zip(*category.keypoints)
        assert len(set(descriptions)) == len(descriptions)
        assert not any(colour in name for name in names for colour in creatures.COLOURS)


# --------------------------------------------------------------------------------------- the trained network


def test_the_trained_toy_finds_keypoints_of_unseen_categories(unseen, found):
    strict, loose = pck(unseen, found)
    assert strict > 0.65
    assert loose > 0.85


def test_asked_with_the_next_keypoints_text_it_finds_that_one(trained, folder, categories, unseen):
    texts = [categories[o.category_id].keypoints for o in unseen]
    shifted = ask(trained, folder, unseen, [keypoints[1:] + keypoints[:1] for keypoints in texts])
    assert pck(unseen, shifted)[1] < 0.4
    assert pck(unseen, [of_photo[-1:] + of_photo[:-1] for of_photo in shifted])[1] > 0.85


def test_confidence_is_the_share_of_points_that_are_right(unseen, found):
    """Right is what the confidence is about: within a tenth of the crop's side along x and along y."""
    confidence = np.array([p.confidence for of_photo in found for p in of_photo])
    right = []
    for instance, of_photo in zip(unseen, found):
        crop = crop_of(instance)
        there = np.array([p.point for p in of_photo])
        right += (abs(there - crop.from_photo(instance.keypoints)) <= 0.1).all(axis=1).tolist()
    right = np.array(right)
    assert len(right) > 250 and abs(confidence.mean() - right.mean()) < 0.1
    sure = confidence > np.median(confidence)
    assert right[sure].mean() > right[~sure].mean()


# ---------------------------------------------------------------------------------------------- comparisons


def test_mean_places_by_hand():
    """The mean of all points of a name, as fractions of the crop: here 100 pixels wide, from y = -25 on."""
    texts = [("first mark", "x"), ("second mark", "y"), ("first leg foot", "z")]
    points = np.array([[10.0, 0], [30, 50], [50, 25]])
    instance = Instance(1, 1, "photo", (0, 0, 100, 50), points, np.array([True] * 3))
    means = toy.mean_places([instance], {1: Category("a", texts)})
    assert set(means) == {"mark", "leg foot"}
    assert np.allclose(means["mark"], [0.2, 0.5])
    assert np.allclose(means["leg foot"], [0.5, 0.5])


def test_shuffling_moves_every_text(tmp_path):
    texts = [(f"first mark {i}", str(i)) for i in range(5)]
    creatures.write_descriptions(tmp_path / "descriptions.json", {1: ("a", texts)})
    others = toy.shuffle_texts(tmp_path, seed=0)
    moved = json.loads((tmp_path / "other_text/descriptions.json").read_text())["keypoint_sets"]["001_a"]
    assert sorted(others[1]) == list(range(5))
    assert all(other != k for k, other in enumerate(others[1]))
    assert [text["description"] for text in moved] == [str(other) for other in others[1]]


# ------------------------------------------------------------------------------------------------- the runs


def test_the_toy_leaves_its_files_and_prints_its_table(tmp_path, monkeypatch, capsys):
    small = {"train": (12, 1), "val": (1, 1), "test": (2, 2)}  # 12 have a keypoint of every name
    monkeypatch.setattr(toy, "draw_toy", partial(creatures.draw_toy, subsets=small))
    monkeypatch.setattr(toy, "RECIPE", SHORT)
    toy.main(["--out", str(tmp_path), "--seed", "5"])
    for way in "", "median", "other_text":
        for file in "report.json", "predictions.json", "predictions.png":
            assert (tmp_path / way / file).exists()
    greedy, median = ((tmp_path / way / "predictions.json").read_text() for way in ("", "median"))
    assert greedy != median
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("toy categories"))
    table = {line[:50].strip(): [float(cell) for cell in line[50:].split()]
             for line in lines[start + 1:start + 6]}
    assert len(table) == 5 and all(len(row) == 4 for row in table.values())
    for name, way in ("CapeLLM", ""), ("CapeLLM, median of the distributions", "median"):
        report = json.loads((tmp_path / way / "report.json").read_text())
        keys = "PCK@0.05", "PCK@0.1", "PCK@0.2", "mPCK"
        assert table[name] == [round(100 * report[key], 1) for key in keys]
    assert lines[-1] == f"the picture: {tmp_path}/predictions.png"


@contextmanager
def one_at_a_time(n):
    """In place of a ThreadPool: train.py takes signals, which only the main thread may."""
    yield Namespace(starmap=lambda function, rows, chunksize: [function(*row) for row in rows])


@pytest.fixture
def calls(monkeypatch):
    """Variants run in this process, one at a time -> what they call, (program, arguments) each."""
    called, programs = [], {"train.py": train.main, "evaluate.py": evaluate.main}

    def call(folder, program, *args):
        called.append((program, [str(arg) for arg in args]))
        programs[program](called[-1][1])

    monkeypatch.setattr(variants, "call", call)
    monkeypatch.setattr(variants, "ThreadPool", one_at_a_time)
    return called


@pytest.fixture
def out(tmp_path):
    """A folder for variants, whose world is drawn."""
    small = {"train": (2, 3), "val": (1, 1), "test": (2, 2)}
    creatures.draw_toy(tmp_path / "world-0", 0, small)
    return tmp_path


def compare(out, *compared):
    variants.compare_variants(out, toy.NETWORK + SHORT, compared)
    lines = (out / "table.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def report(folder, key):
    return f"{100 * json.loads((folder / 'report.json').read_text())[key]:.1f}"


def test_variants_are_trained_evaluated_and_go_on_where_they_were_stopped(out, calls, monkeypatch):
    compared = ("dynamic", "--rounds dynamic", 1), ("pretrain-step", "--pretrain step", 1)
    work, keys = variants.call, ("PCK@0.05", "PCK@0.2")

    def stop(folder, program, *args):
        if "--pretrain" in args:
            raise subprocess.CalledProcessError(130, program)
        work(folder, program, *args)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="pretrain-step-0: failed"):
        patch.setattr(variants, "call", stop)
        compare(out, *compared)
    assert [program for program, _ in calls] == ["train.py", *4 * ["evaluate.py"]]
    calls.clear()
    rows = compare(out, *compared)
    assert [program for program, _ in calls] == ["train.py", "train.py", *2 * ["evaluate.py"]]
    before, after = calls[0][1], calls[1][1]
    assert before[before.index("--pretrain") + 1] == "step" and "--pretrain" not in after
    assert after[after.index("--init-projection") + 1] == f"{out}/pretrain-step-0/pretraining/ckpt.pt"
    assert [row[:2] for row in rows[:2]] == [
        ["dynamic", "`--rounds dynamic`"],
        ["dynamic", "`--rounds dynamic`, evaluated with `--cumulative`"]]
    assert rows[0][2:] != rows[1][2:]
    for row, ways in zip(rows, (("greedy", "median"), ("cumulative-greedy", "cumulative-median"))):
        assert row[2:] == [report(out / "dynamic-0" / way, key) for way in ways for key in keys]
        for way in ways:
            facts = json.loads((out / "dynamic-0" / way / "report.json").read_text())
            assert facts["decode"].split() == way.split("-")[::-1]


def test_a_cell_is_the_mean_of_the_seeds_and_its_spread(tmp_path):
    for seed, value in enumerate((0.7, 0.9, 0.8)):
        folder = tmp_path / f"name-{seed}/greedy"
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps({"PCK@0.2": value}))
    assert variants.cell(tmp_path, "name", 3, "greedy", "PCK@0.2") == "80.0 (70.0-90.0)"
    assert variants.cell(tmp_path, "name", 1, "greedy", "PCK@0.2") == "70.0"
    assert variants.cell(tmp_path, "name", 3, "median", "PCK@0.2") == ""


def test_pretraining_leaves_backbones_that_load(tmp_path, monkeypatch):
    """Two steps of it: seeing, then seeing and talking; the same files as those shipped, other weights."""
    for name, value in dict(SHEETS=8, BATCH=4, STEPS=2, LOOK=1).items():
        monkeypatch.setattr(pretrain, name, value)
    pretrain.make_backbones(tmp_path)
    for file in "vit/config.json", "llm/config.json", "llm/tokenizer.json":
        assert (tmp_path / file).read_text() == (SHIPPED / file).read_text()
    for network, part in (ViT, "vit"), (Llama, "llm"):
        made, shipped = (dict(network.load(folder / part).named_parameters())
                         for folder in (tmp_path, SHIPPED))
        assert {name: p.shape for name, p in made.items()} == {name: p.shape for name, p in shipped.items()}
        assert not any(torch.equal(made[name], shipped[name]) for name in made)


def test_the_shipped_toy_is_small():
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 4e6
