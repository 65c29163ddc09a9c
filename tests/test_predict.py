"""predict.py: keypoints in words, photos of all forms, and what the command line prints and leaves."""

import csv
import io
import re
import sys
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
from mp100 import KITE
from PIL import Image
from programs import command_line, know_answers, read_results, refused, train_briefly

import decode
import evaluate
import predict
from common import InputError, read_json
from data import Crop
from predict import Locator
from tools.keypoints import find_set, make_category, parse_keypoints

TIP = ["-k", "tip: the upper end"]
SETS = {"eyes": make_category([("left eye", "the one: on the left, of two")]),
        "a: b": make_category([("ear", "above")]), "ears": make_category([("ear", "above the eye")])}
BOX = 10, 15, 55, 49  # as evaluate.py clips that of the annotations
TURN = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A folder with ckpt.pt, barely trained, and data/ with wagons and kites."""
    return train_briefly(tiny, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def kites(folder):
    return Locator(folder / "ckpt.pt", decode="median")


@pytest.fixture
def constrained(kites, monkeypatch):
    """Holds all answers to the format: a barely trained network's are malformed."""
    monkeypatch.setattr(kites, "locate", partial(decode.locate, constrained=True))


@pytest.fixture
def kite_photos(folder):
    return folder / "data" / "images" / "kite"  # 1.jpg, of 110 x 80 pixels, 3.jpg, 5.jpg


@pytest.fixture
def photo(kite_photos):
    return kite_photos / "1.jpg"


@pytest.fixture
def answered(monkeypatch):
    monkeypatch.setattr("tools.results.draw_found", lambda *_: Image.new("RGB", (9, 9)))  # which takes long
    return know_answers(monkeypatch)


def read_table(path):
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.reader(file))


def places(points):
    return [(p.x, p.y, p.confidence) for p in points.values()]


@pytest.mark.parametrize("text, expected", [
    ("nose: the tip", [("nose", "the tip")]),
    ("left eye: beside the nose, nose: the tip", [("left eye", "beside the nose"), ("nose", "the tip")]),
    ("nose:the tip,mouth:below", [("nose", "the tip"), ("mouth", "below")]),
    ("nose: black, shiny, wet, mouth: below", [("nose", "black, shiny, wet"), ("mouth", "below")]),
    ("nose: the tip: black", [("nose", "the tip: black")]),
    ("heart: the red one; horn: the sharp end", [("heart", "the red one"), ("horn", "the sharp end")]),
    ("heart: red, see note: it is; horn: sharp", [("heart", "red, see note: it is"), ("horn", "sharp")]),
    ("heart: the red one\n\nhorn: the end,\n", [("heart", "the red one"), ("horn", "the end,")]),
    ("time 10:30: the knob at half past ten", [("time 10:30", "the knob at half past ten")]),
    ("knob: at 10, 12:30 is opposite", [("knob", "at 10, 12:30 is opposite")]),
    ("\u9f3b: the tip, \u00e9t\u00e9: warm", [("\u9f3b", "the tip"), ("\u00e9t\u00e9", "warm")]),
    ("eyes", [("left eye", "the one: on the left, of two")]), ("Eyes", SETS["eyes"].keypoints),
    ("a: b", [("ear", "above")]), ({"nose": " the tip "}, [("nose", "the tip")]), (KITE, KITE.keypoints)])
def test_keypoints_are_split_where_a_name_begins(text, expected):
    assert parse_keypoints(text, SETS).keypoints == expected


@pytest.mark.parametrize("text, message", [
    ("eye", '"eye": no such set of keypoints; did you mean eyes'), ("zzz", "--list shows those there are"),
    ("nose,left eye: the eye on the left", 'keypoint "nose" has no description: write "name: where it is"'),
    ("nose; left eye: the eye on the left", 'keypoint "nose" has no description: write "name: where it is"'),
    ("eye:, nose: tip", "lacks a name or a description"), (";: ;", "lacks a name or a description"),
    ("eye: left; eye: right", 'two keypoints are named "eye"'), ("nowhere.txt", "nowhere.txt: no such file"),
    (None, 'keypoints are {"name"'), ({}, "no keypoint is asked for"), ({"tip": None}, "None is not a text")])
def test_keypoints_that_are_not_understood(text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse_keypoints(text, SETS)


def test_keypoints_from_files(tmp_path):
    def read(name, content):
        (tmp_path / name).write_text(content, encoding="utf-8")
        return parse_keypoints(str(tmp_path / name), SETS).keypoints
    assert read("k.json", '\ufeff{"nose": "the tip", "eye: left": "above; beside"}') == [
        ("nose", "the tip"), ("eye: left", "above; beside")]
    for name, mark in ("k.txt", ""), ("K.TXT", "\ufeff"):
        assert read(name, f"{mark}nose: the tip, black: shiny\n\neye: above; beside\n") == [
            ("nose", "the tip, black: shiny"), ("eye", "above; beside")]
    for name, content, message in (("k.json", "{}", "no keypoint is asked for"), ("k.json", "{", "cannot be"),
                                   ("k.txt", "nose: the tip\neye\n", 'keypoint "eye" has no description')):
        with pytest.raises(InputError, match=f"^{tmp_path / name}: {message}"):
            read(name, content)


def test_the_checkpoint_knows_its_own_sets_beside_those_of_descriptions_json(kites):
    assert kites.sets["kite"].keypoints == KITE.keypoints
    assert len(kites.sets["person"].keypoints) == 17
    assert kites.sets["horse_body"].keypoints == kites.sets["animal_body"].keypoints
    assert find_set("Person", kites.sets) == kites.sets["person"]
    assert find_set("cat Body", kites.sets).keypoints == kites.sets["animal_body"].keypoints
    for name, meant in (("cat", "did you mean cat_body? Or"), ("human face", "did you mean face? Or"),
                        ("Polar-Bear", "did you mean polar_bear_body? Or"), ("human", "--list shows")):
        with pytest.raises(InputError, match=re.escape(meant)):
            find_set(name, kites.sets)


def test_points_and_distributions_are_those_of_the_evaluation(folder, kites, photo, constrained, tmp_path):
    evaluate.main(command_line(folder / "ckpt.pt", "--workers", 0, "--out", tmp_path, "--constrained",
                               "--decode", "median"))
    [expected] = [p for p in read_results(tmp_path)[1] if p["annotation_id"] == 101]
    points = kites(photo, dict(KITE.keypoints), BOX)
    assert list(points) == ["tip", "tail", "left corner"]
    for p, point, confidence in zip(points.values(), expected["keypoints"], expected["confidence"]):
        assert (p.x, p.y) == pytest.approx(point)
        assert round(p.confidence, 2) == confidence
        assert p.square == (10, 12, 55)  # around the box's middle, as wide as its longer side
        for distribution in p.x_distribution, p.y_distribution:
            assert distribution.shape == (1000,) and distribution.sum() == pytest.approx(1, abs=1e-3)
        middle = (p.x_distribution.cumsum(0) < 0.5).sum() / 1000
        assert p.x == pytest.approx(10 + 55 * middle, abs=55 / 1000 + 1e-6)
        assert len(repr(p)) < 200  # without the distributions


def test_photos_of_all_forms_are_alike(kites, photo, constrained, tmp_path):
    picture = Image.open(photo).convert("RGB")
    picture.save(tmp_path / "photo.png")
    pixels, data = np.array(picture), (tmp_path / "photo.png").read_bytes()
    tensor = torch.from_numpy(pixels)
    expected = places(kites(photo, "kite", BOX))
    for form in (str(photo), picture, pixels, data, io.BytesIO(data), open(photo, "rb"), tensor,
                 tensor.permute(2, 0, 1), pixels.transpose(2, 0, 1)):
        assert places(kites(form, "kite", BOX)) == expected
    assert places(kites(pixels[..., ::-1], "kite", BOX)) != expected  # blue first


def test_photos_in_one_pass_are_answered_as_one_by_one(kites, kite_photos, constrained, monkeypatch):
    """With keypoints and boxes of their own."""
    paths, words = sorted(kite_photos.iterdir()), ["kite", "wagon", {"tip": "the upper end"}]
    boxes = [BOX, None, (0, 0, 30, 40)]
    alone = [places(kites(*one)) for one in zip(paths, words, boxes)]
    passes = []
    monkeypatch.setattr(kites, "locate", lambda model, images, *rest, ask=kites.locate, **how: (
        passes.append(len(images)) or ask(model, images, *rest, **how)))
    together = kites(paths, words, boxes)
    assert [list(points) for points in together] == [
        ["tip", "tail", "left corner"], ["front wheel", "rear wheel", "roof", "shaft", "lamp"], ["tip"]]
    for points, expected in zip(together, alone):
        assert np.allclose(places(points), expected, atol=1e-4)
    assert len(kites(tuple(paths), "kite", np.array([BOX] * 3))) == 3 and passes == [3] * 2
    for slip in (paths, words, boxes[:2]), (paths, words[:2]), ([], "kite"), (paths, "kite", BOX):
        with pytest.raises(InputError):
            kites(*slip)


def test_without_a_box_the_whole_photo_is_looked_at(kites, photo):
    points = kites(photo, "kite")
    assert points["tip"].square == (0, -15, 110)
    assert (points["tip"].x, points["tip"].y) == (None, None)  # malformed
    assert kites(photo, "kite", np.array([1, 2, 30, 40]))["tip"].square == (-4, 2, 40)
    assert kites(photo, "kite", (-5, -5, 200, 200))["tip"].square == (-5, -5, 200)  # over the edge
    assert kites(photo, "kite", (109, 79, 9, 9))["tip"].square == (109, 79, 9)


@pytest.mark.parametrize("orientation", [3, 6, 8, 9])
def test_a_phones_photo_is_turned_upright(kites, constrained, tmp_path, orientation):
    """A photo with an EXIF turn gives the answers of the photo that a viewer shows."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    lying, exif = Image.fromarray(noise), Image.Exif()
    exif[0x0112] = orientation
    lying.save(tmp_path / "phone.png", exif=exif)
    upright = lying.transpose(TURN[orientation]) if orientation in TURN else lying
    box = (5, 10, 50, 40)
    assert places(kites(tmp_path / "phone.png", "kite", box)) == places(kites(upright, "kite", box))


def test_large_photos_are_averaged_as_in_an_evaluation(kites, tmp_path):
    """Pixels of the crop must not depend on who reads the photo: a PNG is read alike by both."""
    noise = np.random.default_rng(0).integers(0, 256, (600, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    crop, pixels = kites.crop(tmp_path / "large.png", (100, 50, 700, 400))
    assert torch.equal(pixels, Crop(450, 250, 700).cut(tmp_path / "large.png", 56))


@pytest.mark.parametrize("box", [
    (110, 0, 9, 9), (0, 80, 9, 9), (-9, 0, 9, 9), (0, -9, 9, 9), (0, 0, 9, 0), (float("nan"), 0, 9, 9),
    (0, 0, float("inf"), 9), (1, 2, 3), 7, ("a", 2, 3, 4)])
def test_boxes_that_are_none(kites, photo, box):
    says = "lies outside the photo, which is 110 x 80 pixels, or is empty|is not x, y, width and height"
    with pytest.raises(InputError, match=says):
        kites(photo, "kite", box)


def test_what_is_no_photo_is_refused(kites, tmp_path):
    for content in b"GIF89a", b"P6 90000 90000 255 ":
        (tmp_path / "photo").write_bytes(content)
        with pytest.raises(InputError, match=f"^{tmp_path}/photo: cannot be read .*save it as JPEG or PNG"):
            kites(tmp_path / "photo", "kite")
        with pytest.raises(InputError, match="^the image: cannot be read"):
            kites(content, "kite")
    with pytest.raises(InputError, match="nowhere.jpg: no such photo"):
        kites("nowhere.jpg", "kite")
    for other in np.zeros((9, 9, 3)), np.zeros((0, 9, 3), np.uint8), torch.zeros(3, 9, 9), 7, None:
        with pytest.raises(InputError, match="is not a photo; .h, w, 3. of uint8 is|cannot be read"):
            kites(other, "kite")
    for shape in (60, 90), (60, 90, 4):
        assert kites(np.zeros(shape, np.uint8), "kite").keys() == {"tip", "tail", "left corner"}


def test_a_locators_arguments(folder, photo, tiny, tmp_path):
    """Misspelt ones and checkpoints that locate nothing are refused; backbones may have moved."""
    for choice in {"decode": "medain"}, {"dtype": "fp16"}:
        [word] = choice.values()
        with pytest.raises(InputError, match=f"^'{word}' is none of "):
            Locator(folder / "ckpt.pt", **choice)
    checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
    for changes, says in (({"pretrain": "direct"}, "--pretrain, which locates nothing"),
                          ({"llm": "gone/llm", "vit": "gone/vit"}, "gone/")):
        torch.save(checkpoint | {"args": checkpoint["args"] | changes}, tmp_path / "ckpt.pt")
        with pytest.raises(InputError, match=says):
            Locator(tmp_path / "ckpt.pt")
    assert Locator(tmp_path / "ckpt.pt", llm=tiny / "llm", vit=tiny / "vit")(photo, "kite")


def test_one_photo_is_printed_and_nothing_is_written_unasked(folder, photo, answered, monkeypatch, capsys,
                                                             tmp_path):
    monkeypatch.chdir(tmp_path)
    argv = [folder / "ckpt.pt", *TIP, photo, "--box", "-1,2,30.5,40", "-k", "tail: below; far, off"]
    predict.main(command_line(*argv))
    assert capsys.readouterr().out.splitlines() == [
        "        x        y  confidence  keypoint",
        "     11.0      8.0        0.90  tip",  # of 110 x 80 pixels
        "     33.0     24.0        0.60  tail"]
    assert not list(tmp_path.iterdir())
    words = [("tip", "the upper end"), ("tail", "below; far, off")]
    assert answered == [([(110, 80)], [words], [(-1, 2, 30.5, 40)])]


def test_folders_within_folders_and_patterns(folder, kite_photos, answered, tmp_path, capsys):
    """Two photos of one name do not overwrite each other's picture, and what was drawn is no photo."""
    other = tmp_path / "more"
    (other / "deep" / "er").mkdir(parents=True)
    (other / ".hidden").mkdir()
    for name in "deep/er/1.png", "z.WEBP", ".hidden/a.png":
        Image.new("RGB", (200, 100)).save(other / name)
    (other / "notes.doc").write_text("no photo")
    (other / "table.h5").write_bytes(b"\x89HDF\r\n\x1a\n no photo, though Pillow knows it")
    out = other / "out"
    for _ in range(2):  # the second time, the folder holds what the first left
        answered.clear()
        predict.main(command_line(folder / "ckpt.pt", f"{kite_photos}/[13].jpg", other, "--keypoints", "kite",
                                  "--out", out, "--batch", 3))
        said = capsys.readouterr()
        assert [len(sizes) for sizes, _, _ in answered] == [3, 1]
    assert sorted(path.name for path in out.iterdir()) == [
        "1-2.png", "1.png", "3.png", "keypoints.csv", "keypoints.json", "z.png"]
    header, *rows = read_table(out / "keypoints.csv")
    assert header == ["photo", "object", "keypoint", "x", "y", "confidence"] and len(rows) == 4 * 3
    assert rows[0] == [str(kite_photos / "1.jpg"), "1", "tip", "11.0", "8.0", "0.9"]
    entries, deep = read_json(out / "keypoints.json"), other / "deep/er/1.png"
    assert [entry["photo"] for entry in entries] == [
        str(path) for path in (kite_photos / "1.jpg", kite_photos / "3.jpg", deep, other / "z.WEBP")]
    assert entries[3]["keypoints"][1] == {"name": "tail", "x": 60.0, "y": 30.0, "confidence": 0.6}
    assert f"wrote {out}/: keypoints.json, keypoints.csv and 4 pictures" in said.out
    assert f"{other}: left out notes.doc, table.h5: not photos of a kind" in said.err


def test_a_broken_photo_among_many_is_left_out_and_said(folder, photo, answered, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(photo.read_bytes()[:300])
    argv = [folder / "ckpt.pt", photo.parent, tmp_path / "broken.jpg", *TIP, "--out", tmp_path / "out"]
    with pytest.raises(InputError, match="1 of 4 objects were left out, see above"):
        predict.main(command_line(*argv, "--batch", 2))
    said = capsys.readouterr().err
    assert f"{tmp_path}/broken.jpg: cannot be read" in said and said.count("broken.jpg: ") == 1
    assert len(read_json(tmp_path / "out/keypoints.json")) == 3


def test_words_that_training_never_had_are_said(folder, photo, answered, capsys):
    predict.main(command_line(folder / "ckpt.pt", photo, "--keypoints", "person"))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("note: most of these keypoints' words were not in the training (nose, ")
    predict.main(command_line(folder / "ckpt.pt", photo, "--keypoints", "kite"))
    assert not capsys.readouterr().err


def test_sets_and_their_texts_are_listed(folder, capsys):
    predict.main(command_line(folder / "ckpt.pt", "--list"))
    said = capsys.readouterr().out.splitlines()
    others = said.index("more sets, of descriptions.json:")
    assert said[0] == f"sets of {folder / 'ckpt.pt'}:" and said.index("kite: tip, tail, left corner") < others
    assert sum("root of tail" in line for line in said) == 1  # though 34 categories have it
    predict.main(command_line(folder / "ckpt.pt", "--list", "--keypoints", "kite"))
    assert capsys.readouterr().out.splitlines() == [f"{name}: {text}" for name, text in KITE.keypoints]


def test_the_page_is_served_where_it_was_asked_for(folder, monkeypatch):
    served = []
    monkeypatch.setitem(sys.modules, "tools.page", Namespace(serve=lambda *how: served.append(how)))
    predict.main(command_line(folder / "ckpt.pt", "--serve", "--port", 81, "--host", "0.0.0.0"))
    assert isinstance(served[0][0], Locator) and served[0][1:] == (81, "0.0.0.0")


@pytest.mark.parametrize("arguments, message", [
    ("PHOTO -k tip:up --box 1,2,3", 'box "1,2,3": write x, y, width, height, four numbers'),
    ("PHOTO -k tip:up --box=nan,0,9,9", "lies outside the photo, which is 110 x 80 pixels"),
    ("PHOTO -k tip:up --out README.md/out", "README.md/out: cannot be made"),
    ("PHOTO -k tip:up --llm nowhere", "nowhere/"), ("PHOTO -k tip:up --batch 0", "--batch"),
    ("PHOTO -k tip:up --keypoints kite", "say what to find"), ("PHOTO", "say what to find"),
    ("PHOTO -k eye", 'keypoint "eye" has no description'), ("PHOTO --keypoints kites", "did you mean kite"),
    ("PHOTO -k tip:up -k tip:down", "two keypoints are named"), ("-k tip:up", "give a photo"),
    ("nowhere.jpg -k tip:up", "nowhere.jpg: no such photo"), ("EMPTY -k tip:up", "no photo in this folder"),
    ("FOLDER --boxes nowhere.json", "nowhere.json: no such"),
    ("FOLDER FOLDER -k tip:up --box=1,1,9,9", "--box is for one"),
    ("FOLDER FOLDER -k tip:up --boxes a.json", "the one folder"),
    ("PHOTO -k tip:up --boxes a.json", "the one folder"),
    ("nowhere -k tip:up --boxes a.json", "the one folder"),
    ("PHOTO -k tip:up --format coco", "--format needs --out"), (300 * "x" + " -k tip:up", "no such photo")])
def test_a_users_slips_are_one_clear_line(folder, photo, tmp_path, arguments, message):
    paths = {"PHOTO": photo, "FOLDER": photo.parent, "EMPTY": tmp_path}
    assert message in refused(predict, [folder / "ckpt.pt", *(paths.get(a, a) for a in arguments.split())])
