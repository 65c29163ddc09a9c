"""What predict.py leaves: tables, other tools' labels, films; and boxes that other tools found."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from mp100 import make_wagons_and_kites
from PIL import Image
from programs import command_line, know_answers, refused
from pycocotools.coco import COCO

import decode
import predict
from chat import Category
from common import InputError, read_json
from data import parse_descriptions, read_instances
from predict import Found
from tools import own
from tools.photos import Job, name_photos
from tools.results import FORMATS, Result, draw_found, print_points, write_table

TOY = ROOT / "assets/toy/ckpt.pt"
TIP = ["-k", "tip: the sharp end"]


@pytest.fixture
def answered(monkeypatch):
    monkeypatch.setattr("tools.results.draw_found", lambda *_: Image.new("RGB", (9, 9)))  # which takes long
    return know_answers(monkeypatch)


@pytest.fixture
def data(tmp_path):
    """Wagons and kites, in MP-100's layout. Kites are images/kite/1.jpg (110 x 80), 3.jpg and 5.jpg."""
    return make_wagons_and_kites(tmp_path / "data")


def found(x, y, confidence=0.9):
    return Found(x, y, confidence, None, None, (0, 0, 100))


def make_result(path, points, box=None, category="kite", number=1, size=(100, 50)):
    names = [(name, f"the {name}") for name in points]
    job = Job(Path(path), Path(path).name, box, Category(category, names, [(0, 1)]), number)
    return Result(job, size, points)


def say_of(points, size=(100, 50), box=None):
    said = []
    print_points(points, box, Image.new("RGB", size), said.append)
    return said


def test_points_outside_the_photo_and_points_in_one_place_are_said():
    said = say_of({"a": found(10, 20), "b": found(10, 60), "c": found(-1, 5)})
    assert said[-1] == "outside the photo: b, c; the square around the box reaches over its edge"
    said = say_of({"a": found(10, 20), "b": found(11, 20.5), "c": found(11.5, 19)})
    assert said[-1] == "all points are in one place: the model does not tell these keypoints apart"
    assert len(say_of({"a": found(10, 20), "b": found(11, 20)})) == 3  # of two that may well be
    assert say_of({"a": found(None, None, None), "b": found(1, 2, None)})[1:] == [
        f"{'no coordinates in the answer':>30}  a", "      1.0      2.0     unknown  b"]


def test_a_box_that_may_be_corners_gets_a_hint():
    def hint_for(*box):
        return say_of({"tip": found(1, 2)}, (110, 80), box)[2:]
    assert "write --box 60,20,40,50" in hint_for(60, 20, 100, 70)[0]
    for box in (0, 0, 110, 80), (60, 20, 55, 50), (60, 20, 30, 50), (60, 20, 140, 70):
        assert hint_for(*box) == []  # all; a little over the edge; within; where corners were outside as well


@pytest.mark.parametrize("confidence, threshold, hollow", [(0.4, 0.5, True), (0.4, 0.3, False),
                                                           (None, 0.5, False)])
def test_points_below_the_threshold_are_hollow(confidence, threshold, hollow):
    """The middle of a hollow dot is white. The photo is black."""
    points, category = {"tip": found(50, 50, confidence)}, Category("kite", [("tip", "the tip")])
    picture = np.array(draw_found(Image.new("RGB", (100, 100)), None, category, points, threshold))
    inside = np.argwhere((picture == 0).all(-1))
    y, x = (inside.min(0) + inside.max(0)) // 2
    assert (picture[y, x].tolist() == [255, 255, 255]) == hollow


def test_the_table_keeps_names_and_numbers(tmp_path):
    names = ["=1+2", "@a", "-b", 'c, "d"\ne', "f=g", "\u00e9\u9f3b"]
    write_table(tmp_path / "t.csv", [make_result("=1.jpg", {name: found(-1, 2.345) for name in names})])
    with open(tmp_path / "t.csv", newline="", encoding="utf-8-sig") as file:
        rows = list(csv.reader(file))[1:]
    assert [row[2] for row in rows] == names
    assert rows[0] == ["=1.jpg", "1", "=1+2", "-1", "2.35", "0.9"]


@pytest.mark.parametrize("form, file", [
    ("coco", "keypoints.json"), ("labelme", "a.json"), ("deeplabcut", "CollectedData_CapeLLM.csv")])
def test_labels_come_back_from_the_files_of_other_tools(tmp_path, form, file):
    """Two objects in a photo, of one of which a keypoint was not found; read by tools/own.py."""
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    objects = [({"tip": found(20, 10), "tail": found(30.25, 40)}, (5, 5, 40, 40)),
               ({"tip": found(70, 25), "tail": found(None, None)}, (50, 10, 30.5, 35))]
    (tmp_path / "out").mkdir()
    FORMATS[form](tmp_path / "out", [make_result(tmp_path / "a.png", *one) for one in objects], 0.5)
    own.main(command_line(tmp_path / "out" / file, "--images", tmp_path, "--category", "kite",
                          "--out", tmp_path / "data"))
    categories = parse_descriptions(read_json(tmp_path / "data/descriptions.json"), "")
    one, other = read_instances(tmp_path / "data/annotations/mp100_split1_train.json", categories)
    assert [name for name, _ in categories[one.category_id].keypoints] == ["tip", "tail"]
    assert categories[one.category_id].name == "kite"
    assert one.keypoints.tolist() == [[20, 10], [30.25, 40]] and other.keypoints[0].tolist() == [70, 25]
    assert (one.visible.tolist(), other.visible.tolist()) == ([True, True], [True, False])
    if form != "deeplabcut":  # which knows no boxes
        assert (one.box, other.box) == ((5, 5, 39, 39), (50, 10, 29.5, 34))


def test_deeplabcut_has_one_row_less_for_one_object(tmp_path):
    photos = [make_result(tmp_path / f"walk/{n}.png", {"tip": found(n, 10), "tail": found(None, None)})
              for n in (1, 2)]
    FORMATS["deeplabcut"](tmp_path, photos, 0.5)
    assert (tmp_path / "CollectedData_CapeLLM.csv").read_text().split() == [
        "scorer,,,CapeLLM,CapeLLM,CapeLLM,CapeLLM", "bodyparts,,,tip,tip,tail,tail", "coords,,,x,y,x,y",
        "labeled-data,walk,1.png,1,10,,", "labeled-data,walk,2.png,2,10,,"]


def test_photos_of_one_name_have_names_of_their_own():
    assert name_photos([Path("cats/a/1.png"), Path("cats/b/c/1.png")]) == ["a/1.png", "b/c/1.png"]
    assert name_photos([Path("cats/a/1.png")]) == ["1.png"]


def test_a_coco_file_says_what_is_unsure(tmp_path):
    points = {"a": found(1.5, 2.5, 0.5), "b": found(3, 4, 0.3), "c": found(None, None, None),
              "d": found(5, 6, None)}
    FORMATS["coco"](tmp_path, [make_result("x/a.png", points)], 0.4)
    raw = read_json(tmp_path / "keypoints.json")
    assert raw["images"] == [{"id": 1, "file_name": "a.png", "width": 100, "height": 50}]
    [category], [annotation] = raw["categories"], raw["annotations"]
    assert (category["keypoints"], category["skeleton"]) == (["a", "b", "c", "d"], [[1, 2]])
    assert annotation["keypoints"] == [1.5, 2.5, 2, 3, 4, 1, 0, 0, 0, 5, 6, 2]
    assert (annotation["num_keypoints"], annotation["score"]) == (3, 0.4)
    assert (annotation["bbox"], annotation["area"]) == ([0, 0, 100, 50], 5000)


def test_boxes_from_a_coco_file_and_results_that_cocos_tools_load(data, answered, tmp_path):
    """Each category finds its own set of keypoints, in a file of more descriptions."""
    annotations = data / "annotations/mp100_split1_test.json"
    raw = read_json(annotations)
    [again] = [one for one in raw["annotations"] if one["image_id"] == 1]
    raw["images"][2]["file_name"] = "..\\..\\media\\" + raw["images"][2]["file_name"]  # of another tool
    (tmp_path / "boxes.json").write_text(json.dumps(raw | {"annotations": raw["annotations"] + [again]}))
    argv = [TOY, data / "images", "--boxes", tmp_path / "boxes.json", "--descriptions",
            data / "descriptions.json"]
    predict.main(command_line(*argv, "--out", tmp_path / "out", "--format", "coco"))
    truth, written = COCO(str(annotations)), COCO(str(tmp_path / "out/keypoints.json"))
    loaded = truth.loadRes(list(written.anns.values()))
    assert len(loaded.anns) == 7 and {a["category_id"] for a in loaded.anns.values()} == {1, 2}
    assert written.imgs.pop(2)["file_name"].startswith("../../media/")
    assert written.imgs == {number: truth.imgs[number] for number in written.imgs}
    assert [written.cats[c]["name"] for c in (1, 2)] == ["wagon", "kite"]
    first = next(a for a in loaded.anns.values() if a["image_id"] == 1)
    assert first["score"] == pytest.approx(0.6) and first["bbox"] == again["bbox"]
    assert first["keypoints"] == pytest.approx([11, 8, 2, 33, 24, 2, 55, 40, 1])
    assert {"1-2.png", "1.png"} < {path.name for path in (tmp_path / "out").iterdir()}
    answered.clear()
    predict.main(command_line(*argv, *TIP))  # the same keypoints for all
    assert {tuple(one) for _, keypoints, _ in answered for one in keypoints} == {(("tip", "the sharp end"),)}


def test_photos_and_their_labels_are_not_overwritten(answered, tmp_path, monkeypatch):
    Image.new("RGB", (110, 80)).save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    monkeypatch.chdir(tmp_path)
    for out in tmp_path, ".":
        line = refused(predict, [TOY, tmp_path / "a.png", *TIP, "--out", out, "--format", "labelme"])
        assert "holds a.png, which could be overwritten" in line
    (tmp_path / "links").mkdir()
    (tmp_path / "links/b.png").symlink_to(tmp_path / "a.png")
    assert "holds a.png" in refused(predict, [TOY, tmp_path / "links/b.png", *TIP, "--out", tmp_path])
    (tmp_path / "words").mkdir()
    (tmp_path / "words/keypoints.json").write_text('{"tip": "the sharp end"}')
    words = ["--keypoints", "words/keypoints.json", "--out"]
    assert "holds keypoints.json" in refused(predict, [TOY, tmp_path / "a.png", *words, "words"])
    predict.main(command_line(TOY, tmp_path / "a.png", *words, "elsewhere"))
    assert (tmp_path / "a.png").read_bytes() == before and (tmp_path / "elsewhere/a.png").exists()
    assert len([*(tmp_path / "words").iterdir()]) == 1


def test_a_detectors_list_goes_by_the_numbers_of_photos(tmp_path, answered, capsys):
    for name in "12.png", "COCO_val_000000000139.png", "7.png", "b_7.png", "a_5.png", "b_5.png":
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    (tmp_path / "found.json").write_text(json.dumps([
        {"image_id": 139, "category_id": 1, "bbox": [1, 2, 30, 20], "score": 0.9},
        {"image_id": "7", "category_id": 2, "bbox": [3, 4, 10, 20], "score": 0.8},
        {"image_id": 12, "category_id": 1, "bbox": [5.5, 6, 7, 8], "score": 0.3},
        {"image_id": 12, "category_id": 1, "bbox": [0, 0, 0, 0]},
        {"image_id": 12, "category_id": 900, "bbox": [1, 1, 9, 9]},
        {"image_id": 8, "category_id": 1, "bbox": [5, 6, 7, 8], "score": 0.3},
        {"image_id": 5, "category_id": 1, "bbox": [5, 6, 7, 8], "score": 0.3}]))
    predict.main(command_line(TOY, tmp_path, "--boxes", tmp_path / "found.json", "--out", tmp_path / "out"))
    assert answered[0][2] == [(1, 2, 30, 20), (3, 4, 10, 20), (5.5, 6, 7, 8)]
    trained = decode.read_trained(TOY)["descriptions"]
    sets = [trained["keypoint_sets"][trained["categories"][n]["keypoint_set"]] for n in "121"]
    assert answered[0][1] == [[tuple(keypoint.values()) for keypoint in one] for one in sets]
    said = capsys.readouterr().err
    assert "left out 2 of 7 objects, e.g. of image_id 8: no photo has their image_id" in said
    assert "left out 1 of 7 objects, e.g. of image_id 12: no box" in said
    assert 'left out 1 of 7 objects, e.g. of image_id 12: category "900": no such set of keypoints' in said
    assert "by the checkpoint's numbers 1 is tetaga, 2 is votade" in said


@pytest.mark.parametrize("contents", [
    {}, {"images": [{"id": 1}], "annotations": []}, "boxes", {"images": [], "annotations": []},
    {"images": [], "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4], "category_id": 1}]},
    [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3]}]])
def test_what_has_no_boxes_is_refused(data, tmp_path, contents):
    (tmp_path / "boxes.json").write_text(json.dumps(contents))
    with pytest.raises(InputError, match=f"^{tmp_path}/boxes.json: "):
        predict.main(command_line(TOY, data / "images", "--boxes", tmp_path / "boxes.json", *TIP))


FAKE = """#!{python} -SE
import sys
if "ffprobe" in sys.argv[0]:
    print('{{"streams": [{{"avg_frame_rate": "10/1", "nb_frames": "5"}}], "format": {{}}}}')
elif sys.argv[-1] == "-":
    film = open(sys.argv[sys.argv.index("-i") + 1].removeprefix("file:"), "rb").read()
    if not film.startswith(b"P6"):
        sys.exit("moov atom not found")
    sys.stdout.buffer.write(film)
else:
    open(sys.argv[-1].removeprefix("file:"), "wb").write(sys.stdin.buffer.read())
"""


@pytest.fixture
def ffmpeg(tmp_path, monkeypatch):
    """Programs in the place of ffmpeg and ffprobe, for which a film is a sequence of PPM pictures."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in "ffmpeg", "ffprobe":
        (folder / name).write_text(FAKE.format(python=sys.executable))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def write_film(path, n=5, size=(60, 41)):
    """Frame i is i everywhere."""
    with open(path, "wb") as file:
        for i in range(n):
            Image.new("RGB", size, (i, i, i)).save(file, "PPM")
    return path


def read_film(path):
    """-> its frames, arrays."""
    data, frames = path.read_bytes(), []
    while data:
        _, size, _, data = data.split(b"\n", 3)
        width, height = map(int, size.split())
        frames.append(np.frombuffer(data[:3 * width * height], np.uint8).reshape(height, width, 3))
        data = data[3 * width * height:]
    return frames


def test_a_film_comes_back_with_its_points(ffmpeg, answered, tmp_path, capsys):
    film = write_film(tmp_path / "walk.mp4")
    predict.main(command_line(TOY, film, *TIP, "-k", "knob: the purple knob", "--out", tmp_path / "out",
                              "--batch", 3, "--box", "5,5,50,30"))
    box, words = (5, 5, 50, 30), [("tip", "the sharp end"), ("knob", "the purple knob")]
    assert answered == [([(60, 41)] * n, [words] * n, [box] * n) for n in (3, 2)]
    with open(tmp_path / "out/keypoints.csv", newline="", encoding="utf-8-sig") as file:
        header, *rows = csv.reader(file)
    assert header == ["frame", "seconds", "keypoint", "x", "y", "confidence"]
    assert [row[:3] for row in rows] == [
        [str(i), str(i / 10), name] for i in range(5) for name in ("tip", "knob")]
    assert rows[1][3:] == ["18.0", "12.3", "0.6"]
    frames = read_film(tmp_path / "out/walk.mp4")
    assert len(frames) == 5 and len({frame.shape for frame in frames}) == 1
    assert frames[0].shape[0] % 2 == frames[0].shape[1] % 2 == 0  # as mp4 wants
    for i, frame in enumerate(frames):
        assert (frame[36:41, :60] == i).all()  # below the box the frame is as it was
        colours = {tuple(frame[y, x]) for x, y in ((6, 4), (18, 12))}
        assert len(colours - {(i, i, i)}) == 2  # each dot has its own
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["keypoints.csv", "walk.mp4"]
    assert "5 frames" in capsys.readouterr().out


def test_films_that_cannot_be_read_are_one_line(ffmpeg, tmp_path, monkeypatch):
    film, out = write_film(tmp_path / "walk.mp4"), ["--out", tmp_path / "out"]
    for says, more in (("give it alone", [film, *out]), ("needs --out", []),
                       ("lies outside the photo, which is 60 x 41", [*out, "--box", "90,0,9,9"]),
                       ("holds walk.mp4, which could", ["--out", tmp_path])):
        assert says in refused(predict, [TOY, film, *TIP, *more])
    (tmp_path / "taken/keypoints.csv").mkdir(parents=True)
    line = refused(predict, [TOY, film, *TIP, "--out", tmp_path / "taken"])
    assert "taken/keypoints.csv: cannot be written" in line
    (tmp_path / "broken.mp4").write_bytes(b"no film")
    line = refused(predict, [TOY, tmp_path / "broken.mp4", *TIP, *out])
    assert line == f"error: {tmp_path}/broken.mp4: ffmpeg failed: moov atom not found"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "walk.mp4: films need ffmpeg and ffprobe on the PATH" in refused(predict, [TOY, film, *TIP, *out])
