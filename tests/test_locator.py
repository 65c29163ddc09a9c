"""locator.py: a checkpoint asked from Python, and keypoints in one's own words."""

import json

import numpy as np
import pytest
import torch
from mp100 import KITE
from PIL import Image
from programs import command_line, read_results, train_briefly

import evaluate
import locator as module
from checkpoint import read_checkpoint
from common import InputError, read_json
from locator import Locator, make_category, open_photo, parse_keypoints, read_sets

SETS = {"eyes": make_category([("left eye", "the one: on the left, of two")]),
        "a: b": make_category([("ear", "above")]), "ears": make_category([("ear", "above the eye")])}


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A folder with ckpt.pt, barely trained, and data/ with wagons and kites."""
    return train_briefly(tiny, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def kites(folder):
    return Locator(folder / "ckpt.pt", decode="median")


@pytest.fixture
def constrained(monkeypatch):
    """Holds all answers to the format: a barely trained network's are malformed."""
    ask = evaluate.predict
    monkeypatch.setattr(module, "predict", lambda *args, **how: ask(*args, **how, constrained=True))


@pytest.fixture
def photo(folder):
    return folder / "data" / "images" / "kite" / "1.jpg"  # of 110 x 80 pixels


# -------------------------------------------------------------------------------------------------- keypoints


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
    ("eyes", [("left eye", "the one: on the left, of two")]),
    ("a: b", [("ear", "above")]),
])
def test_keypoints_are_split_where_a_name_begins(text, expected):
    assert parse_keypoints(text, SETS).keypoints == expected


@pytest.mark.parametrize("text, message", [
    ("eye", '"eye": no such set of keypoints; did you mean'),
    ("zzz", '"zzz": no such set of keypoints; --list shows those there are; or describe each: "name: '),
    ("nose,left eye: the eye on the left", 'keypoint "nose" has no description: write "name: where it is"'),
    ("nose; left eye: the eye on the left", 'keypoint "nose" has no description: write "name: where it is"'),
    ("eye:, nose: tip", "lacks a name or a description"),
    (": the tip", "lacks a name or a description"),
    ("eye: left; eye: right", 'two keypoints are named "eye"'),
    (";: ;", "lacks a name or a description"),
    ("nowhere.json", "nowhere.json: no such file"),
    ("nowhere.txt", "nowhere.txt: cannot be read"),
])
def test_keypoints_that_are_not_understood(text, message):
    with pytest.raises(InputError) as error:
        parse_keypoints(text, SETS)
    assert message in str(error.value)


def test_a_misspelt_set_is_answered_with_the_closest():
    with pytest.raises(InputError, match="did you mean eyes"):
        parse_keypoints("eyess", SETS)


def test_keypoints_from_files(tmp_path):
    (tmp_path / "k.json").write_text(json.dumps({"nose": "the tip", "eye: left": "above; beside"}))
    (tmp_path / "k.txt").write_text("nose: the tip, black: shiny\n\neye: above; beside\n")
    assert parse_keypoints(str(tmp_path / "k.json"), SETS).keypoints == [
        ("nose", "the tip"), ("eye: left", "above; beside")]
    assert parse_keypoints(str(tmp_path / "k.txt"), SETS).keypoints == [
        ("nose", "the tip, black: shiny"), ("eye", "above; beside")]
    (tmp_path / "k.json").write_text(json.dumps({"nose": 3}))
    with pytest.raises(InputError, match='not {"name": "description"'):
        parse_keypoints(str(tmp_path / "k.json"), SETS)
    for name, content, message in (("k.json", "{}", "no keypoint is asked for"),
                                   ("k.txt", "nose: the tip\neye\n", 'keypoint "eye" has no description')):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=f"^{tmp_path / name}: {message}"):
            parse_keypoints(str(tmp_path / name), SETS)


def test_the_checkpoint_knows_its_own_sets_beside_those_of_descriptions_json(kites):
    assert kites.sets["kite"].keypoints == KITE.keypoints
    assert len(kites.sets["person"].keypoints) == 17


def test_a_category_is_another_name_of_its_set():
    sets = read_sets(read_json(module.DESCRIPTIONS), "itself")
    assert sets["horse_body"].keypoints == sets["animal_body"].keypoints


# ---------------------------------------------------------------------------------------------------- answers


def test_points_and_distributions_are_those_of_the_evaluation(folder, kites, photo, constrained, tmp_path):
    """Its annotation has the same box, 10, 15, 55, 49."""
    evaluate.main(command_line(folder / "ckpt.pt", "--workers", 0, "--out", tmp_path, "--constrained",
                               "--decode", "median"))
    [expected] = [p for p in read_results(tmp_path)[1] if p["annotation_id"] == 101]
    points = kites(photo, dict(KITE.keypoints), (10, 15, 55, 49))
    assert list(points) == ["tip", "tail", "left corner"]
    for found, point, confidence in zip(points.values(), expected["keypoints"], expected["confidence"]):
        assert (found.x, found.y) == pytest.approx(point)
        assert round(found.confidence, 2) == confidence
        assert found.square == (10, 12, 55)  # around the box's middle, as wide as its longer side
        for distribution in found.x_distribution, found.y_distribution:
            assert distribution.shape == (1000,) and distribution.sum() == pytest.approx(1, abs=1e-3)
        middle = (found.x_distribution.cumsum(0) < 0.5).sum() / 1000
        assert found.x == pytest.approx(10 + 55 * middle, abs=55 / 1000 + 1e-6)


def test_paths_pictures_and_arrays_are_alike_and_a_set_may_be_named(kites, photo, constrained):
    with Image.open(photo) as picture:
        picture.load()
    answers = [kites(form, keypoints, (10, 15, 55, 49)) for form, keypoints in (
        (photo, "kite"), (str(photo), "kite"), (picture, dict(KITE.keypoints)), (np.asarray(picture), KITE))]
    for other in answers[1:]:
        for name, found in answers[0].items():
            assert (found.x, found.y, found.confidence) == (
                other[name].x, other[name].y, other[name].confidence)


def test_without_a_box_the_whole_photo_is_looked_at(kites, photo):
    assert kites(photo, "kite")["tip"].square == (0, -15, 110)  # of 110 x 80 pixels


def test_a_malformed_answer_has_no_point(kites, photo):
    found = kites(photo, "kite")["tip"]
    assert (found.x, found.y) == (None, None)


@pytest.mark.parametrize("orientation, turn", [
    (3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270), (8, Image.Transpose.ROTATE_90)])
def test_a_phones_photo_is_turned_upright(kites, constrained, tmp_path, orientation, turn):
    """A photo with an EXIF turn gives the answers of the photo that a viewer shows."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    lying, exif = Image.fromarray(noise), Image.Exif()
    exif[0x0112] = orientation
    lying.save(tmp_path / "phone.png", exif=exif)
    upright = lying.transpose(turn)
    assert np.array_equal(open_photo(tmp_path / "phone.png"), upright)
    box = (5, 10, 50, 40)
    turned, plain = kites(tmp_path / "phone.png", "kite", box), kites(upright, "kite", box)
    assert [(p.x, p.y) for p in turned.values()] == [(p.x, p.y) for p in plain.values()]


@pytest.mark.parametrize("shape", [(60, 90), (60, 90, 4)])
def test_grey_and_transparent_photos(kites, shape):
    assert kites(np.zeros(shape, np.uint8), "kite").keys() == {"tip", "tail", "left corner"}


def test_large_photos_are_averaged_as_in_an_evaluation(kites, monkeypatch, tmp_path):
    """Pixels of the crop must not depend on who reads the photo: a PNG is read alike by both."""
    noise = np.random.default_rng(0).integers(0, 256, (600, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    seen = []
    monkeypatch.setattr(module, "predict", lambda model, chat, crops, images, categories, **how: (
        seen.append((crops[0], images)) or evaluate.predict(model, chat, crops, images, categories, **how)))
    kites(tmp_path / "large.png", "kite", (100, 50, 700, 400))
    [(crop, images)] = seen
    assert torch.equal(images[0], crop.cut(tmp_path / "large.png", 56))


# ------------------------------------------------------------------------------------------------------ slips


@pytest.mark.parametrize("box", [
    (110, 0, 9, 9), (0, 80, 9, 9), (-9, 0, 9, 9), (0, -9, 9, 9), (0, 0, 9, 0), (0, 0, 0, 9), (500, 0, 9, 9),
    (float("nan"), 0, 9, 9), (0, 0, float("inf"), 9), (-float("inf"), 0, 9, 9)])
def test_boxes_that_only_touch_the_photo_are_refused(kites, photo, box):
    with pytest.raises(InputError, match="lies outside the photo, which is 110 x 80 pixels, or is empty"):
        kites(photo, "kite", box)


@pytest.mark.parametrize("keypoints, box, says", [
    ("kite", (1, 2, 3), "box (1, 2, 3) is not x, y, width and height, four numbers"),
    ("kite", ("a", 2, 3, 4), "is not x, y, width and height"), ("kite", 7, "box 7 is not x, y, width and"),
    (["tip"], None, "keypoints are {"), (None, None, "keypoints are {"),
    ({"tip": None}, None, "None is not a text"), ({3: "the end"}, None, "3 is not a text")])
def test_arguments_of_another_kind_are_one_line(kites, photo, keypoints, box, says):
    with pytest.raises(InputError) as error:
        kites(photo, keypoints, box)
    assert says in str(error.value)


def test_arrays_may_be_boxes_and_only_uint8_a_photo(kites, photo):
    assert kites(photo, "kite", np.array([1, 2, 30, 40]))["tip"].square == (-4, 2, 40)
    for array in np.zeros((9, 9, 3)), np.zeros((0, 9, 3), np.uint8):
        with pytest.raises(InputError, match="is not a photo; .h, w, 3. of uint8 is"):
            kites(array, "kite")


def test_boxes_may_reach_over_the_edge(kites, photo):
    assert kites(photo, "kite", (-5, -5, 200, 200))["tip"].square == (-5, -5, 200)
    assert kites(photo, "kite", (109, 79, 9, 9))["tip"].square == (109, 79, 9)


@pytest.mark.parametrize("content", [b"GIF89a", b"P6 3 x 255 ", b"P6 90000 90000 255 "])
def test_what_is_no_photo_is_refused(kites, tmp_path, content):
    (tmp_path / "photo").write_bytes(content)
    with pytest.raises(InputError, match=f"{tmp_path}/photo: not a readable photo"):
        kites(tmp_path / "photo", "kite")
    with pytest.raises(InputError, match="nowhere.jpg: no such photo"):
        kites("nowhere.jpg", "kite")


def test_backbones_may_have_moved_or_be_beside_the_program(folder, photo, tiny, tmp_path, monkeypatch):
    checkpoint = read_checkpoint(folder / "ckpt.pt")
    checkpoint["args"] |= {"llm": "gone/llm", "vit": "gone/vit"}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match="gone/"):
        Locator(tmp_path / "ckpt.pt")
    assert Locator(tmp_path / "ckpt.pt", llm=tiny / "llm", vit=tiny / "vit")(photo, "kite")
    monkeypatch.chdir(tmp_path)  # from where the toy's own backbones, assets/toy/..., are not seen
    assert Locator(module.DESCRIPTIONS.parent / "assets/toy/ckpt.pt")(photo, {"tip": "the sharp end"})


def test_what_is_found_can_be_printed_without_its_distributions(kites, photo):
    assert len(repr(kites(photo, "kite")["tip"])) < 200


def test_misspelt_choices_are_refused(folder):
    for choice in {"decode": "medain"}, {"dtype": "fp16"}:
        [word] = choice.values()
        with pytest.raises(InputError, match=f"^'{word}' is none of "):
            Locator(folder / "ckpt.pt", **choice)


def test_a_checkpoint_of_pretraining_is_refused(tiny, tmp_path):
    train_briefly(tiny, tmp_path, "--pretrain", "direct", "--batch", 8)
    with pytest.raises(InputError, match="--pretrain, which locates nothing"):
        Locator(tmp_path / "ckpt.pt")
