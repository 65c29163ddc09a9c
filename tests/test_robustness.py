"""A model tested further afield: super-categories held out, other texts, other boxes, the worst keypoints."""

import gzip
import json
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT
from mp100 import CATEGORIES, make_mp100, make_wagons_and_kites
from programs import command_line, refused

import evaluate
import train
from chat import Category
from common import read_json
from data import Instance, annotation_file, crop_of, read_instances
from tools import holdout, score, texts
from toyworld.creatures import draw_toy

# ------------------------------------------------------------------------------------------------ holding out


SUBSETS = "train", "val", "test"


def hold_out(data, out, name):
    """-> the contents of the three annotation files that tools/holdout.py writes."""
    holdout.main(command_line(data, "--hold-out", name, "--out", out))
    return [read_json(annotation_file(out, 1, subset)) for subset in SUBSETS]


def test_a_super_category_is_tested_and_all_others_are_trained_on(shared, tmp_path):
    """With the five real test files, one of them also as another split's train file, as it is in MP-100."""
    counts = Counter()
    (tmp_path / "annotations").mkdir()
    for split in range(1, 6):
        packed = shared / f"mp100/annotations/mp100_split{split}_test.json.gz"
        contents = gzip.decompress(packed.read_bytes())
        for path in annotation_file(tmp_path, split, "test"), annotation_file(tmp_path, 1, "train"):
            path.write_bytes(contents)
        counts.update((a["category_id"], tuple(a["keypoints"])) for a in json.loads(contents)["annotations"])
    train, val, test = hold_out(tmp_path, tmp_path / "new", "vehicle")
    assert {a["category_id"] for a in test["annotations"]} == {32, 38, 51}
    assert {a["category_id"] for a in train["annotations"]} == {c for c, _ in counts} - {32, 38, 51}
    train_photos, val_photos = ({photo["file_name"] for photo in raw["images"]} for raw in (train, val))
    assert not train_photos & val_photos and 48 <= len(train_photos) / len(val_photos) <= 50
    written = Counter((a["category_id"], tuple(a["keypoints"])) for raw in (train, val, test)
                      for a in raw["annotations"])
    assert written == counts  # each once, though the last file was there twice


@pytest.mark.parametrize("name, tested", [
    ("human_face", {"face"}), ("human_body", {"person"}), ("vehicle", {"car", "bus", "suv"}),
    ("furniture", {"bed", "chair", "sofa", "swivelchair", "table"}), ("fly", {"fly"})])
def test_super_categories_are_those_of_earlier_work(name, tested):
    path = ROOT / "descriptions.json"
    names = {int(c): entry["name"] for c, entry in read_json(path)["categories"].items()}
    assert {names[c] for c in holdout.find_held_out([name], path)} == tested


def test_files_that_use_the_same_numbers_for_other_photos(tmp_path, tiny, capsys):
    """Both files count photos from 0 and annotations from 100; what is written can be trained on."""
    data, new = make_mp100(tmp_path / "data", CATEGORIES, {"train": {1: 3}, "test": {2: 4}}), tmp_path / "new"
    hold_out(data, new, "wagon")
    before, after = ({subset: [(o.category_id, o.photo, o.keypoints.tolist()) for o in read_instances(
        annotation_file(folder, 1, subset), CATEGORIES)] for subset in subsets}
        for folder, subsets in [(data, ["train", "test"]), (new, SUBSETS)])
    assert after["test"] == before["train"] and sorted(after["train"] + after["val"]) == before["test"]
    assert len(after["val"]) == 1
    train.main(command_line("--data", new, "--llm", tiny / "llm", "--vit", tiny / "vit", "--out", tmp_path,
                            "--image-size", 56, "--batch", 1, "--micro-batch", 1, "--check"))
    assert "all is well" in capsys.readouterr().out


def test_what_cannot_be_held_out(tmp_path):
    data = make_wagons_and_kites(tmp_path / "data")
    for source, names, error in [
            (data, ["boat"], "--hold-out boat: is none of human_face"), (data, ["kite"], "another --out"),
            (data, ["wagon", "kite"], "no object to train on"), (tmp_path, ["vehicle"], "no such file")]:
        assert error in refused(holdout, [source, "--hold-out", *names, "--out", data])


# ------------------------------------------------------------------------------------------------ other texts

CAT = Category("cat", [
    ("left ear", "the tip above the left eye"), ("tail", "behind everything else"), ("nose", "a tip")])


def test_each_kind_of_text():
    old = CAT.keypoints
    new = {kind: texts.change_texts({7: CAT, 8: CAT}, kind, seed=0) for kind in texts.KINDS}
    changed = {kind: of_kind[7].keypoints for kind, of_kind in new.items()}
    assert changed["names"] == [("left ear", "left ear"), ("tail", "tail"), ("nose", "nose")]
    assert changed["sideless"] == [("ear", "the tip above the eye"), *old[1:]]
    assert [(name, sorted(words.split())) for name, words in changed["shuffled"]] == [
        (name, sorted(words.split())) for name, words in old] and changed["shuffled"] != old
    for k, (name, text) in enumerate(changed["swapped"]):
        assert name == old[k][0] and text in [other for _, other in old if other != old[k][1]]
    typos = [texts.misspell(old, 1, np.random.default_rng(n))[1].split()[1] for n in range(300)]
    right = "everything"
    possible = [right[:i] + right[i + 1] + right[i] + right[i + 2:] for i in range(1, 8)]
    assert {*typos} == {right, *possible} and 0.25 < np.mean([word != right for word in typos]) < 0.4
    assert new["shuffled"][7] != new["shuffled"][8]
    assert all(texts.change_texts({8: CAT}, kind, seed=0)[8] == new[kind][8] for kind in new)


def test_a_scaled_box_scales_the_crop_about_its_centre():
    instance = Instance(0, 0, "", (10, 20, 40, 100), np.zeros((1, 2)), np.ones(1, dtype=bool))
    crop = crop_of(texts.scale_box(instance, 1.5))
    assert (crop.x, crop.y, crop.side) == pytest.approx((30, 70, 150))


def test_what_is_scored_keeps_the_annotated_box(tmp_path, monkeypatch):
    """Answers that are off by 0.22 of the box's longer side would be hits in a box of 1.2 times its size."""
    def answer(asked, categories, images):
        true = read_instances(annotation_file(data, 1, "test"), CATEGORIES)
        sides.append({round(crop_of(o).side / max(t.box[2:]), 3) for o, t in zip(asked, true)})
        return [[(x + 0.22 * max(o.box[2:]), y) for x, y in o.keypoints] for o in true], None
    data, sides = make_wagons_and_kites(tmp_path / "data"), []
    monkeypatch.setattr(evaluate, "load_asker", lambda *_: answer)
    command = [ROOT / "assets/toy/ckpt.pt", "--data", data, "--report", tmp_path / "r", "--box-scale"]
    texts.main(command_line(*command, 1.2, 0.8))
    rows = {name: (report["PCK@0.2"], report["mPCK"]) for name, report in read_json(tmp_path / "r").items()}
    assert sides == [{1.0}, {1.2}, {0.8}]
    assert rows == dict.fromkeys(["as they are", "box x 1.2", "box x 0.8"], (0, pytest.approx(0.2)))
    for wrong in 0, "nan", "inf":
        assert "above 0" in refused(texts, [*command, wrong])
    texts.main(command_line("--box-scale", 1.2, "--decode", "median", *command[:-1]))  # in any order
    assert [*read_json(tmp_path / "r")] == ["as they are", "box x 1.2"]
    assert "--report takes all reports" in refused(texts, [*command[:-1], "--out", tmp_path])


def test_the_toy_needs_its_texts(tmp_path):
    """About new creatures: the first row is what evaluate.py says, and texts of others mislead."""
    draw_toy(tmp_path, seed=99, subsets={"train": (3, 1), "val": (1, 1), "test": (6, 3)})
    asked = [ROOT / "assets/toy/ckpt.pt", "--data", tmp_path / "data", "--descriptions",
             tmp_path / "descriptions.json", "--decode", "median", "--workers", 0, "--report", tmp_path / "r"]
    evaluate.main(command_line(*asked, "--out", tmp_path / "out"))
    expected = read_json(tmp_path / "r")
    texts.main(command_line(*asked, "--texts-as", "names", "swapped"))
    pck = {name: report["PCK@0.2"] for name, report in read_json(tmp_path / "r").items()}
    assert pck["as they are"] == expected["PCK@0.2"] > 0.9
    assert pck["swapped"] < 0.3 < pck["names"] + 0.1 < 0.8


# ---------------------------------------------------------------------------------------- the worst keypoints


def test_the_worst_keypoints():
    """Two cats whose boxes are 100 wide: what is 19 off is found, what is 21 off is not."""
    seen = np.array([[1, 1, 1], [1, 0, 1]], dtype=bool)
    cats = [Instance(n, 3, "", (0, 0, 100, 50), np.zeros((3, 2)), seen[n]) for n in (0, 1)]
    predicted = [[(19, 0), (21, 0), (0, 21)], [(0, 19), (0, 0), None]]
    nose, tail, ear = score.find_worst(cats, predicted, {3: CAT})  # of two at 0, what more objects show
    assert nose == {
        "category": "3 cat", "keypoint": "nose", "description": "a tip", "PCK@0.2": 0, "objects": 2}
    assert [*tail.values()][1::2] == ["tail", 0] and tail["objects"] == 1
    assert [*ear.values()][1::2] == ["left ear", 1] and ear["objects"] == 2
    assert score.find_worst(cats, predicted, {3: CAT}, most=1) == [nose]
