"""predict.py: keypoints in one's own words, in any photo."""

import json
import re

import pytest
from mp100 import KITE
from PIL import Image
from programs import command_line, refused, train_briefly

import evaluate
import predict
from checkpoint import read_checkpoint
from evaluate import predict as ask


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    """A folder with ckpt.pt, barely trained, and data/ with wagons and kites."""
    return train_briefly(tiny, tmp_path_factory.mktemp("run"))


@pytest.fixture
def photo(checkpoint):
    return checkpoint / "data" / "images" / "kite" / "1.jpg"  # of 110 x 80 pixels


# -------------------------------------------------------------------------------------------------- keypoints


@pytest.fixture
def descriptions(tmp_path):
    path = tmp_path / "sets.json"
    eyes = [{"name": "left eye", "description": "the one: on the left, of two"}]
    path.write_text(json.dumps({"keypoint_sets": {"eyes": eyes, "a: b": eyes, "ears": []}}))
    return path


@pytest.mark.parametrize("text, expected", [
    ("nose: the tip", [("nose", "the tip")]),
    ("left eye: beside the nose, nose: the tip", [("left eye", "beside the nose"), ("nose", "the tip")]),
    ("nose:the tip,mouth:below", [("nose", "the tip"), ("mouth", "below")]),
    ("nose: black, shiny, wet, mouth: below", [("nose", "black, shiny, wet"), ("mouth", "below")]),
    ("nose: the tip: black", [("nose", "the tip: black")]),
    ("eyes", [("left eye", "the one: on the left, of two")]),
    ("a: b", [("left eye", "the one: on the left, of two")]),
])
def test_keypoints_are_split_where_a_name_begins(descriptions, text, expected):
    assert predict.parse_keypoints(text, descriptions) == expected


def test_an_unknown_keypoint_set_is_answered_with_those_there_are(descriptions, checkpoint, photo):
    argv = [checkpoint / "ckpt.pt", photo, "--keypoints", "eye", "--descriptions", descriptions]
    line = refused(predict, argv)
    assert line.startswith('error: --keypoints "eye": neither "name: description, ')
    assert line.endswith("nor one of a: b, ears, eyes")


# -------------------------------------------------------------------------------------------------------- box


@pytest.mark.parametrize("text, expected", [
    ("10,20,30.5,40", (10, 20, 30.5, 40)),
    (None, (0, 0, 110, 80)),
    ("-5,-5,200,200", (-5, -5, 200, 200)),  # over all edges
    ("109,79,9,9", (109, 79, 9, 9)),
])
def test_boxes(photo, text, expected):
    assert predict.parse_box(text, photo) == expected


@pytest.mark.parametrize("text", ["110,0,9,9", "0,80,9,9", "-9,0,9,9", "0,-9,9,9", "0,0,9,0"])
def test_boxes_that_only_touch_the_photo_are_refused(checkpoint, photo, text):
    line = refused(predict, [checkpoint / "ckpt.pt", photo, "--keypoints", "tip: up", f"--box={text}"])
    assert f"--box {text}: lies outside the photo, which is 110 x 80 pixels, or is empty" in line


# ---------------------------------------------------------------------------------------------------- program


def rows_of(table):
    """-> [(x, y, confidence, name), ...] of what the program printed."""
    found = re.findall(r"^ *(-?\d+\.\d) +(-?\d+\.\d) +(\S+)  (.+)$", table, re.M)
    return [(float(x), float(y), confidence, name) for x, y, confidence, name in found]


def test_points_are_those_of_the_evaluation(checkpoint, photo, tmp_path, capsys, monkeypatch):
    """Median: a barely trained network's greedy answers are malformed. Its annotation's box is the same."""
    out = tmp_path / "evaluated"
    evaluate.main(command_line(checkpoint / "ckpt.pt", "--workers", 0, "--out", out, "--constrained",
                               "--decode", "median"))
    [expected] = [p for p in json.loads((out / "predictions.json").read_text()) if p["annotation_id"] == 101]
    capsys.readouterr()

    constrain(monkeypatch)
    texts = ", ".join(f"{name}: {description}" for name, description in KITE.keypoints)
    predict.main(command_line(checkpoint / "ckpt.pt", photo, "--box", "10,15,55,49", "--keypoints", texts,
                              "--decode", "median", "--out", tmp_path / "kite.png"))
    said = capsys.readouterr().out
    assert said.startswith("        x        y  confidence  keypoint\n")
    assert said.endswith(f"wrote {tmp_path / 'kite.png'}\n")
    rows = rows_of(said)
    assert [name for *_, name in rows] == ["tip", "tail", "left corner"]
    assert [confidence for *_, confidence, _ in rows] == [f"{c:.2f}" for c in expected["confidence"]]
    for (x, y, *_), point in zip(rows, expected["keypoints"]):
        assert (x, y) == pytest.approx(point, abs=0.051)
    with Image.open(tmp_path / "kite.png") as picture:
        assert 1440 < max(picture.size) < 2200


def constrain(monkeypatch):
    """Holds all answers to the format."""
    monkeypatch.setattr(predict, "predict", lambda *args, **how: ask(*args, **how, constrained=True))


def test_without_a_box_the_whole_photo_is_looked_at(checkpoint, photo, tmp_path, monkeypatch, capsys):
    crops = []

    def spy(model, chat, crops_of_photos, *more, **how):
        crops.extend(crops_of_photos)
        return ask(model, chat, crops_of_photos, *more, **how)
    monkeypatch.setattr(predict, "predict", spy)
    monkeypatch.chdir(tmp_path)
    predict.main(command_line(checkpoint / "ckpt.pt", photo, "--keypoints", "tip: the end",
                              "--descriptions", checkpoint / "data" / "descriptions.json"))
    [crop] = crops
    assert (crop.x, crop.y, crop.side, crop.angle) == (55, 40, 110, 0)
    assert (tmp_path / "1.keypoints.png").exists()  # named after the photo, in this folder
    assert "wrote 1.keypoints.png" in capsys.readouterr().out


def test_malformed_answers_are_said_to_be_such(checkpoint, photo, tmp_path, capsys):
    predict.main(command_line(checkpoint / "ckpt.pt", photo, "--keypoints", "tip: the end", "--out",
                              tmp_path / "kite.png"))
    table = capsys.readouterr().out.splitlines()
    assert table[1] == f"{'no coordinates in the answer':>30}  tip"


def test_confidence_of_pointed_out_keypoints_is_unknown(tiny, tmp_path, capsys):
    train_briefly(tiny, tmp_path, "--answer", "token", "--batch", 8)
    argv = [tmp_path / "ckpt.pt", tmp_path / "data/images/kite/1.jpg", "--keypoints", "tip: the upper end",
            "--out", tmp_path / "kite.png"]
    assert "error: --decode median" in refused(predict, [*argv, "--decode", "median"])
    predict.main(command_line(*argv))
    [(x, y, confidence, name)] = rows_of(capsys.readouterr().out)
    assert (confidence, name) == ("unknown", "tip")
    assert (tmp_path / "kite.png").exists()


def test_backbones_may_have_moved_since(checkpoint, photo, tiny, tmp_path, monkeypatch):
    contents = read_checkpoint(checkpoint / "ckpt.pt")
    contents["args"] |= {"llm": "gone/llm", "vit": "gone/vit"}
    monkeypatch.setattr(predict, "read_checkpoint", lambda path: contents)
    argv = [checkpoint / "ckpt.pt", photo, "--keypoints", "tip: the end", "--out", tmp_path / "kite.png"]
    assert "gone/" in refused(predict, argv)
    predict.main(command_line(*argv, "--llm", tiny / "llm", "--vit", tiny / "vit"))
    assert (tmp_path / "kite.png").exists()


# ------------------------------------------------------------------------------------------------------ slips


@pytest.mark.parametrize("content", [b"GIF89a", b"P6 3 x 255 ", b"P6 90000 90000 255 "])
def test_what_is_no_photo_is_refused(checkpoint, tmp_path, content):
    path = tmp_path / "photo"
    path.write_bytes(content)
    line = refused(predict, [checkpoint / "ckpt.pt", path, "--keypoints", "tip: the end"])
    assert f"{path}: not a readable photo" in line


BOXES = ["1,2,3", "a,b,c,d", "0,0,0,9", "500,0,9,9", "nan,0,9,9", "0,0,inf,9", "0,0,9,inf", "-inf,0,9,9"]


@pytest.mark.parametrize("wrong, message", [
    *(([f"--box={box}"], f"--box {box}: ") for box in BOXES),
    (["--keypoints", "eye"], '--keypoints "eye": neither'),
    (["--keypoints", "eye:, nose: tip"], "lacks a name or a description"),
    (["--out", "nowhere/a.png"], "nowhere/a.png: the picture cannot be written"),
    (["--out", "a.picture"], "a.picture: the picture cannot be written"),
    (["--llm", "nowhere"], "nowhere/"),
])
def test_a_users_slips_are_one_clear_line(checkpoint, photo, tmp_path, wrong, message):
    argv = [checkpoint / "ckpt.pt", photo, "--keypoints", "tip: the end", "--out", tmp_path / "a.png"]
    assert message in refused(predict, [*argv, *wrong])


def test_a_missing_photo_is_one_clear_line(checkpoint):
    argv = [checkpoint / "ckpt.pt", "nowhere.jpg", "--keypoints", "tip: the end"]
    assert "nowhere.jpg: not a readable photo" in refused(predict, argv)
