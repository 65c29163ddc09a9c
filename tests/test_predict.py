"""predict.py: photos, folders and boxes in; lines, pictures and tables out."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mp100 import KITE
from PIL import Image
from programs import command_line, refused, train_briefly
from pycocotools.coco import COCO

import predict
from common import read_json
from locator import Found, Locator

TIP = ["-k", "tip: the upper end"]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A folder with ckpt.pt, barely trained, and data/ with wagons and kites."""
    return train_briefly(tiny, tmp_path_factory.mktemp("run"))


@pytest.fixture
def photos(folder):
    return folder / "data" / "images" / "kite"  # 1.jpg, 3.jpg, 5.jpg


@pytest.fixture
def answered(monkeypatch):
    """Gives the program a Locator whose answers are known: keypoint k is at 0.1 + 0.2 k of the photo."""
    def answer(self, photo, category, box=None):
        places = [(photo.width * (0.1 + 0.2 * k), photo.height * (0.1 + 0.2 * k)) for k in range(9)]
        return {name: Found(*place, 0.9 - 0.3 * k, torch.ones(1000), torch.ones(1000), (0, 0, photo.width))
                for k, ((name, _), place) in enumerate(zip(category.keypoints, places))}
    monkeypatch.setattr(Locator, "__call__", answer)


def rows_of(table):
    """-> [(x, y, confidence, name), ...] of what the program printed."""
    found = re.findall(r"^ *(-?\d+\.\d) +(-?\d+\.\d) +(\S+)  (.+)$", table, re.M)
    return [(float(x), float(y), confidence, name) for x, y, confidence, name in found]


def test_one_photo_is_printed_and_nothing_is_written_unasked(folder, photos, answered, monkeypatch, capsys,
                                                             tmp_path):
    monkeypatch.chdir(tmp_path)
    predict.main(command_line(folder / "ckpt.pt", photos / "1.jpg", *TIP, "-k", "tail: below; far, from it"))
    assert capsys.readouterr().out.splitlines() == [
        "        x        y  confidence  keypoint",
        "     11.0      8.0        0.90  tip",  # of 110 x 80 pixels
        "     33.0     24.0        0.60  tail"]
    assert not list(tmp_path.iterdir())


def test_a_folder_of_photos(folder, photos, answered, tmp_path, capsys):
    """Two photos of one name in two folders do not overwrite each other's picture."""
    other = tmp_path / "more"
    other.mkdir()
    Image.new("RGB", (200, 100)).save(other / "1.png")
    (other / "notes.doc").write_text("no photo")
    predict.main(command_line(folder / "ckpt.pt", photos, other, "--keypoints", "kite", "--out",
                              tmp_path / "out"))
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "1-2.png", "1.png", "3.png", "5.png", "keypoints.csv", "keypoints.json"]
    with open(out / "keypoints.csv", newline="", encoding="utf-8-sig") as file:
        header, *rows = csv.reader(file)
    assert header == ["photo", "object", "keypoint", "x", "y", "confidence"]
    assert len(rows) == 4 * 3
    assert rows[0] == [str(photos / "1.jpg"), "1", "tip", "11.0", "8.0", "0.9"]
    assert rows[-1] == [str(other / "1.png"), "1", "left corner", "100.0", "50.0", "0.3"]
    entries = read_json(out / "keypoints.json")
    assert [entry["photo"] for entry in entries] == [
        *(str(photos / f"{n}.jpg") for n in (1, 3, 5)), str(other / "1.png")]
    assert entries[3]["keypoints"][1] == {"name": "tail", "x": 60.0, "y": 30.0, "confidence": 0.6}
    assert f"wrote {out}/keypoints.json, keypoints.csv and 4 pictures" in (said := capsys.readouterr()).out
    assert f"{other}: left out notes.doc: not photos of a kind" in said.err


def test_a_broken_photo_among_many_is_left_out_and_said(folder, photos, answered, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes((photos / "1.jpg").read_bytes()[:300])
    argv = [folder / "ckpt.pt", photos, tmp_path / "broken.jpg", *TIP, "--out", tmp_path / "out"]
    with pytest.raises(predict.InputError, match="1 of 4 objects were left out, see above"):
        predict.main(command_line(*argv))
    said = capsys.readouterr().err
    assert f"{tmp_path}/broken.jpg: not a readable photo" in said and said.count("broken.jpg: ") == 1
    assert len(read_json(tmp_path / "out/keypoints.json")) == 3


def test_a_spreadsheet_takes_no_name_for_a_formula(tmp_path):
    names = ["=1+2", "@a", "-b", 'c, "d"\ne', "f=g"]
    job = predict.Job(Path("=1.jpg"), None, 1)
    predict.write_tables(tmp_path, [(job, {name: found(-1, 2) for name in names})], "plain")
    with open(tmp_path / "keypoints.csv", newline="", encoding="utf-8-sig") as file:
        rows = list(csv.reader(file))[1:]
    assert [row[2] for row in rows] == ["'=1+2", "'@a", "'-b", *names[3:]]
    assert rows[0] == ["'=1.jpg", "1", "'=1+2", "-1", "2", "0.9"]  # numbers stay numbers
    assert [point["name"] for point in read_json(tmp_path / "keypoints.json")[0]["keypoints"]] == names


def test_the_locator_is_asked_with_box_and_words(folder, photos, monkeypatch):
    asked = []
    monkeypatch.setattr(Locator, "__call__", lambda self, photo, category, box: (
        asked.append((photo.size, category.keypoints, box)) or {}))
    monkeypatch.setattr(predict, "print_points", lambda *_: None)
    predict.main(command_line(folder / "ckpt.pt", photos / "1.jpg", *TIP, "--box", "-1,2,30.5,40"))
    assert asked == [((110, 80), [("tip", "the upper end")], (-1, 2, 30.5, 40))]


# ------------------------------------------------------------------------------------------------------- COCO


def test_boxes_from_a_coco_file_and_results_that_cocos_tools_load(folder, photos, answered, tmp_path, capsys):
    annotations = folder / "data/annotations/mp100_split1_test.json"
    raw = read_json(annotations)
    kites = [annotation for annotation in raw["annotations"] if annotation["category_id"] == 2]
    (tmp_path / "kites.json").write_text(json.dumps(raw | {"annotations": kites + kites[:1]}))
    predict.main(command_line(folder / "ckpt.pt", folder / "data/images", "--boxes", tmp_path / "kites.json",
                              "--keypoints", "kite", "--out", tmp_path / "out", "--format", "coco"))
    truth = COCO(str(annotations))
    results = truth.loadRes(str(tmp_path / "out/keypoints.json"))
    assert len(results.anns) == 4
    [first] = [a for a in results.anns.values() if a["image_id"] == kites[1]["image_id"]]
    width = truth.imgs[first["image_id"]]["width"]
    assert first["category_id"] == 2 and first["score"] == pytest.approx(0.6)
    assert first["keypoints"] == pytest.approx([0.1 * width, 8, 1, 0.3 * width, 24, 1, 0.5 * width, 40, 1])
    with open(tmp_path / "out/keypoints.csv", newline="", encoding="utf-8-sig") as file:
        objects = [(row["photo"].rpartition("/")[2], row["object"]) for row in csv.DictReader(file)]
    assert objects[::3] == [("1.jpg", "1"), ("3.jpg", "1"), ("5.jpg", "1"), ("1.jpg", "2")]
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == ["1-2.png", "1.png", "3.png", "5.png"]


def test_a_keypoint_without_a_point_is_zeros_for_coco():
    found = Found(1.5, 2.5, 0.5, None, None, None)
    job = predict.Job(None, None, 7, 3)
    assert predict.coco_result(job, {"a": found, "b": replace(found, x=None, y=None, confidence=None)}) == {
        "image_id": 7, "category_id": 3, "keypoints": [1.5, 2.5, 1, 0, 0, 0], "score": 0.5}


@pytest.mark.parametrize("contents", [
    {}, {"images": [{"id": 1}], "annotations": []}, {"images": 3, "annotations": []},
    {"images": [], "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4], "category_id": 1}]},
    {"images": [], "annotations": []}])
def test_what_is_no_coco_file_is_refused(folder, photos, tmp_path, contents):
    (tmp_path / "boxes.json").write_text(json.dumps(contents))
    line = refused(predict, [folder / "ckpt.pt", photos, "--boxes", tmp_path / "boxes.json", *TIP])
    assert f"{tmp_path}/boxes.json: " in line


# ------------------------------------------------------------------------------------------------ what is odd


def say_of(points, size=(100, 50)):
    said = []
    predict.print_points(points, Image.new("RGB", size), said.append)
    return said


def found(x, y, confidence=0.9):
    return Found(x, y, confidence, None, None, (0, 0, 100))


def test_points_outside_the_photo_and_points_in_one_place_are_said():
    said = say_of({"a": found(10, 20), "b": found(10, 60), "c": found(-1, 5)})
    assert said[-1] == "outside the photo: b, c; the square around the box reaches over its edge"
    said = say_of({"a": found(10, 20), "b": found(11, 20.5), "c": found(11.5, 19)})
    assert said[-1] == "all points are in one place: the model does not tell these keypoints apart"
    assert len(say_of({"a": found(10, 20), "b": found(11, 20)})) == 3  # of two that may well be
    assert len(say_of({"a": found(10, 20), "b": found(11, 20), "c": found(60, 20)})) == 4


def test_malformed_answers_are_said_to_be_such(folder, photos, capsys):
    predict.main(command_line(folder / "ckpt.pt", photos / "1.jpg", *TIP))
    table = capsys.readouterr().out.splitlines()
    assert table[1] == f"{'no coordinates in the answer':>30}  tip"


def test_confidence_of_pointed_out_keypoints_is_unknown(tiny, tmp_path, capsys):
    train_briefly(tiny, tmp_path, "--answer", "token", "--batch", 8)
    argv = [tmp_path / "ckpt.pt", tmp_path / "data/images/kite/1.jpg", *TIP, "--out", tmp_path / "out"]
    assert "error: --decode median" in refused(predict, [*argv, "--decode", "median"])
    predict.main(command_line(*argv))
    [(x, y, confidence, name)] = rows_of(capsys.readouterr().out)
    assert (confidence, name) == ("unknown", "tip")
    assert (tmp_path / "out/1.png").exists()


@pytest.mark.parametrize("box, hint", [
    ("60,20,100,70", "write --box 60,20,40,50"),  # these may be corners
    ("0,0,110,80", None),  # the whole photo
    ("60,20,55,50", None),  # reaches over the edge a little
    ("60,20,30,50", None),
    ("60,20,140,70", None),  # corners would be outside as well
])
def test_boxes_that_may_be_corners(folder, photos, answered, capsys, box, hint):
    predict.main(command_line(folder / "ckpt.pt", photos / "1.jpg", *TIP, "--box", box))
    said = capsys.readouterr().out
    assert (hint in said) if hint else ("hint" not in said)


# ------------------------------------------------------------------------------------------------------ slips


OUTSIDE = ["0,0,0,9", "500,0,9,9", "nan,0,9,9", "0,0,inf,9", "0,0,9,inf", "-inf,0,9,9"]


@pytest.mark.parametrize("wrong, message", [
    (["--box", "1,2,3"], 'box "1,2,3": write x, y, width, height, four numbers'),
    (["--box", "a,b,c,d"], 'box "a,b,c,d": write x, y, width, height, four numbers'),
    *(([f"--box={box}"], "lies outside the photo, which is 110 x 80 pixels") for box in OUTSIDE),
    (["--out", "README.md/out"], "README.md/out: cannot be made"),
    (["--llm", "nowhere"], "nowhere/"),
    (["--keypoints", "kite"], "say what to find"),
    (["--boxes", "nowhere.json"], "nowhere.json: no such file"),
    (["-k", "eye"], 'keypoint "eye" has no description'),
    (["-k", "tip: again"], 'two keypoints are named "tip"'),
])
def test_a_users_slips_are_one_clear_line(folder, photos, wrong, message):
    folder_or_photo = photos if "--boxes" in wrong else photos / "1.jpg"
    assert message in refused(predict, [folder / "ckpt.pt", folder_or_photo, *TIP, *wrong])


def test_what_is_missing_is_one_clear_line(folder, photos, tmp_path):
    checkpoint = folder / "ckpt.pt"
    assert "nowhere.jpg: no such photo" in refused(predict, [checkpoint, "nowhere.jpg", *TIP])
    assert f"{tmp_path}: no photo in this folder" in refused(predict, [checkpoint, tmp_path, *TIP])
    assert "give a photo" in refused(predict, [checkpoint, *TIP])
    assert "say what to find" in refused(predict, [checkpoint, photos])
    assert "--box is for one photo" in refused(predict, [checkpoint, photos, photos, *TIP, "--box=1,1,9,9"])
    assert "give the one folder" in refused(predict, [checkpoint, photos, photos, *TIP, "--boxes", "a.json"])
    assert "did you mean kite" in refused(predict, [checkpoint, photos, "--keypoints", "kites"])


def test_sets_and_their_texts_are_listed(folder, capsys):
    predict.main(command_line(folder / "ckpt.pt", "--list"))
    said = capsys.readouterr().out.splitlines()
    assert "kite: tip, tail, left corner" in said
    assert any(line.startswith("person: ") for line in said)
    others = said.index("more sets, of descriptions.json:")
    assert said[0] == f"sets of {folder / 'ckpt.pt'}:" and said.index("kite: tip, tail, left corner") < others
    assert said[others + 1].startswith("animal_body, horse_body, dog_body, ")
    assert sum("root of tail" in line for line in said) == 1  # though 34 categories have it
    predict.main(command_line(folder / "ckpt.pt", "--list", "--keypoints", "kite"))
    assert capsys.readouterr().out.splitlines() == [f"{name}: {text}" for name, text in KITE.keypoints]
