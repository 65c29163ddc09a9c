"""tools/own.py: what becomes of other tools' files in MP-100's layout, and what is said of odd ones."""

import json
import math
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from mp100 import write_json
from PIL import Image
from programs import command_line, refused
from test_rubbish import damaged, rubbish, spoilt_json

from common import InputError, read_json
from data import parse_descriptions, read_instances
from tools import own
from toyworld.teapots import main as draw_teapots

NAMES = ["spout", "lid_knob", "Handle"]
TEXTS = {"spout": "The opening away from the handle.", "lid knob": "The knob on top.",
         "handle": "The outermost point away from the spout."}
FULL = {"keypoint_sets": {"pot": [{"name": name, "description": text} for name, text in TEXTS.items()]},
        "categories": {"1": {"name": "Tea-Pot", "keypoint_set": "pot"}}}


def teapots(folder, n=6, name="tea pot"):
    """Photos of noise, 90 x 70 pixels, and the contents of a COCO file that says no more than it must.

    Of the second photo's teapot the last point is not labelled.
    """
    images, annotations = [], []
    for i in range(n):
        photo = folder / f"photos/shelf/{i}.jpg"
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((90, 70), 50).save(photo)
        images.append({"id": f"p{i}", "file_name": f"shelf/{i}.jpg"})
        last = [0, 0, 0] if i == 1 else [50, 40 + i, 1]
        annotations.append({"id": i, "image_id": f"p{i}", "category_id": -7,
                            "keypoints": [20, 30, 2, 36, 22, 2, *last]})
    category = {"id": -7, "name": name, "keypoints": NAMES, "skeleton": [[1, 2], [2, 3]]}
    return {"images": images, "annotations": annotations, "categories": [category]}


def convert(capsys, *arguments):
    """Runs the program -> the lines that it said, but for the warning of texts that are only names."""
    own.main(command_line(*arguments))
    return [line for line in capsys.readouterr().out.splitlines() if "by their names only" not in line]


@pytest.fixture
def make(tmp_path, capsys):
    """make(contents, *more, texts=...) converts a COCO file -> what was said before the counts."""
    def run(contents, *more, texts=None):
        write_json(tmp_path / "own.json", contents)
        if texts is not None:
            write_json(tmp_path / "texts.json", texts)
            more += "--descriptions", tmp_path / "texts.json"
        return convert(capsys, tmp_path / "own.json", "--images", tmp_path / "photos", "--out",
                       tmp_path / "data", *more)[:-2]
    return run


def refuse(folder, contents, *more):
    write_json(folder / "own.json", contents)
    return refused(own, [folder / "own.json", "--images", folder / "photos", "--out", folder / "data", *more])


def layout(out, subset="train"):
    """A subset's annotations -> its objects, with what the file says of their photo and category."""
    contents = read_json(out / f"annotations/mp100_split1_{subset}.json")
    photos, categories = ({o["id"]: o for o in contents[part]} for part in ("images", "categories"))
    for one in contents["annotations"]:
        one["photo"], one["category"] = photos[one["image_id"]], categories[one["category_id"]]
        triples = np.reshape(one["keypoints"], (-1, 3)).tolist()
        keypoints = one["category"]["keypoints"]
        one["points"] = {name: tuple(xyv) for name, xyv in zip(keypoints, triples) if xyv[2]}
        assert len(triples) == len(keypoints) and one["num_keypoints"] == len(one["points"])
        assert one["iscrowd"] == 0 and one["area"] == one["bbox"][2] * one["bbox"][3] > 0
        with Image.open(out / "images" / one["photo"]["file_name"]) as photo:
            assert photo.size == (one["photo"]["width"], one["photo"]["height"])
    return contents["annotations"]


def categories_of(out):
    return parse_descriptions(read_json(out / "descriptions.json"), out / "descriptions.json")


def instances(out):
    """The same through the reader that train.py uses."""
    return read_instances(out / "annotations/mp100_split1_train.json", categories_of(out))


def test_it_ends_with_counts_and_the_command_that_trains(tmp_path, capsys):
    write_json(tmp_path / "own.json", teapots(tmp_path))
    arguments = [tmp_path / "own.json", "--images", tmp_path / "photos", "--out", tmp_path / "a b"]
    own.main(command_line(*arguments, "--subset", "val"))
    warning, counts, last = capsys.readouterr().out.splitlines()
    assert "3 keypoints are described by their names only" in warning and "--descriptions" in warning
    assert counts == "val: 6 photos, 6 objects (tea pot 6)" and "--subset train" in last
    assert convert(capsys, *arguments)[1] == f"train on it: python train.py --data '{tmp_path}/a b'"
    [category] = categories_of(tmp_path / "a b").values()
    assert category.keypoints == [(name, f"the {name} of the tea pot")
                                  for name in ("spout", "lid knob", "Handle")]


def test_what_it_did_not_make_is_not_overwritten(tmp_path, make):
    contents = teapots(tmp_path)
    (tmp_path / "data").mkdir()  # which is fine while empty
    make(contents)
    make(contents)  # and so is a second time
    before = (tmp_path / "data/annotations/mp100_split1_train.json").read_bytes()
    (tmp_path / "data/descriptions.json").write_text('{"keypoint_sets": {}, "categories": {}}')
    assert "not made by this program" in refuse(tmp_path, contents)
    assert (tmp_path / "data/annotations/mp100_split1_train.json").read_bytes() == before


# ------------------------------------------------------------------------------------------------ annotations


def test_what_the_file_lacks_is_made_of_the_points_and_photos(tmp_path, make):
    contents = teapots(tmp_path, 3)
    contents["annotations"][1]["keypoints"] = [0] * 6 + [50, 40, 2]  # a single point
    contents["annotations"][2] |= {"bbox": [0, 0, 0, 0], "area": 0, "num_keypoints": 3}  # as COCO Annotator's
    contents["annotations"][0] |= {"bbox": [20, 22, 30, 18]}  # as CVAT's
    [line] = make(contents)
    assert line.startswith("files whose boxes are the mere extent of the points")
    one, two, three = layout(tmp_path / "data")
    assert one["points"] == {"spout": (20, 30, 2), "lid knob": (36, 22, 2), "Handle": (50, 40, 1)}
    assert one["bbox"] == [16.25, 18.25, 37.5, 25.5]  # 30 x 18 pixels and an eighth of 30 on each side
    assert two["bbox"] == [46.5, 36.5, 7, 7]  # a tenth of the photo's shorter side
    assert three["bbox"] == [16.25, 18.25, 37.5, 27.5]
    assert instances(tmp_path / "data")[0].box == pytest.approx((16.25, 18.25, 36.5, 24.5))


def test_a_file_that_says_everything_is_taken_at_its_word(tmp_path, make):
    contents = teapots(tmp_path, 2)
    contents["categories"].insert(0, {"id": 9, "name": "tea pot"})  # a root without keypoints, as Roboflow's
    for photo, annotation in zip(contents["images"], contents["annotations"]):
        photo |= {"width": 90, "height": 70}
        annotation |= {"bbox": [10, 5, 85, 60], "area": 5.0, "iscrowd": annotation["id"]}
    assert make(contents) == ["annotations of a crowd, left out: annotation 1 of own.json"]
    [one] = instances(tmp_path / "data")
    assert one.box == (10, 5, 79, 59)  # cut at the edge, as MP-100's


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path, make):
    contents = teapots(tmp_path, 9)
    contents["categories"].append({"id": 0, "name": "shelf"})
    contents["annotations"][0] |= {"category_id": 0, "keypoints": []}
    del contents["annotations"][1]["keypoints"]
    contents["annotations"][2]["keypoints"] = [30, 30, 0] * 3
    contents["annotations"][3]["image_id"] = "q"
    contents["annotations"][4]["category_id"] = 3
    contents["annotations"][5]["bbox"] = [90, 0, 10, 10]
    contents["annotations"][8]["bbox"] = contents["annotations"][7]["bbox"] = [5, 5, 60, 60]
    (tmp_path / "photos/shelf/6.jpg").write_bytes((tmp_path / "photos/shelf/8.jpg").read_bytes()[:900])
    (tmp_path / "photos/shelf/7.jpg").unlink()
    said = "\n".join(make(contents))
    for line in ("objects without labelled keypoints, left out: 4, e.g. annotation 0",
                 "annotations of images that are not listed, left out: annotation 3",
                 "photos that are not there, left out (--images says where they are): shelf/7.jpg",
                 "photos that cannot be read, left out: shelf/6.jpg (OSError: image file is truncated",
                 "objects whose box lies outside their photo, left out: one in shelf/5.jpg",
                 "points outside the square around their box, which are not trained on: 3 of 6"):
        assert line in said
    assert [one["photo"]["file_name"] for one in layout(tmp_path / "data")] == ["train/shelf/8.jpg"]


def test_names_and_ids_of_other_kinds(tmp_path, make):
    contents = teapots(tmp_path, 5)
    contents["annotations"][0]["category_id"] = "-7"
    contents["categories"][0] |= {"skeleton": [[0, 1], [2, 1], [1, 5]]}  # which counts from 0
    triples = contents["annotations"][1]["keypoints"]
    contents["annotations"][1]["keypoints"] = [triples[i:i + 3] for i in (0, 3, 6)]
    contents["annotations"][2]["keypoints"][:6] = [None, None, 0, math.nan, math.nan, 2]
    # as Label Studio writes names: with the path on its server, out of its own folder, as an address
    before = ["", "/data/upload/7/", "..\\..\\media\\upload\\", "/data/local-files/?d=",
              "/data/local-files/?d=a%5C"]
    for photo, folders in zip(contents["images"], before):
        photo["file_name"] = folders + photo["file_name"]
    skeleton, line = make(contents)
    assert skeleton.startswith("skeletons with lines to keypoints that there are not")
    assert line == ("annotations with keypoints at 0, 0 or NaN, which count as not labelled: "
                    "annotation 2 of own.json")
    out = layout(tmp_path / "data")
    assert [one["photo"]["file_name"] for one in out] == [f"train/shelf/{i}.jpg" for i in range(5)]
    assert [len(one["points"]) for one in out] == [3, 2, 1, 3, 3]
    assert out[0]["category"]["skeleton"] == [[1, 2], [3, 2]]
    assert read_json(tmp_path / "data/descriptions.json")["skeletons"] == {"tea pot": [[0, 1], [2, 1]]}
    contents["images"][1]["file_name"] = "other/shelf/0.jpg"
    assert "shelf/0.jpg and other/shelf/0.jpg would both be" in refuse(tmp_path, contents)


def test_two_files_whose_photos_have_the_same_name(tmp_path, capsys):
    for name, colour in ("a", "red"), ("b", "blue"):
        write_json(tmp_path / name / "own.json", teapots(tmp_path / name, 1))
        (tmp_path / name / "photos").rename(tmp_path / name / "images")
        Image.new("RGB", (90, 70), colour).save(tmp_path / name / "images/shelf/0.jpg")
    convert(capsys, tmp_path / "a/own.json", tmp_path / "b/own.json", "--out", tmp_path / "data")
    photos = [tmp_path / "data/images" / one["photo"]["file_name"] for one in layout(tmp_path / "data")]
    assert [Image.open(photo).getpixel((5, 5)) for photo in photos] == [(254, 0, 0), (0, 0, 254)]


def test_points_and_boxes_in_another_unit_are_refused_or_said(tmp_path, make):
    def scaled(u, v):
        contents = teapots(tmp_path)
        for one in contents["annotations"]:
            points = np.reshape(one["keypoints"], (3, 3)).tolist()
            one["keypoints"] = [number for x, y, w in points for number in (u * x, v * y, w)]
        return contents
    assert "no coordinate is above 1: fractions" in refuse(tmp_path, scaled(1 / 90, 1 / 70))
    assert "points lie outside their photos, e.g. 200, 300 in shelf/0.jpg" in refuse(tmp_path, scaled(10, 10))
    contents = scaled(1, 1)
    contents["annotations"][2]["keypoints"][0] = 95
    assert make(contents) == ["points outside their photos, which cannot be found: 95, 30 in shelf/2.jpg, "
                              "which is 90 x 70 pixels"]


def change(*place, to):
    """-> a function that changes contents[place[0]][place[1]]..., or deletes it if `to` is ..."""
    def edit(contents):
        *above, last = place
        for key in above:
            contents = contents[key]
        if to is ...:
            del contents[last]
        else:
            contents[last] = to
    return edit


def names(value):
    return change("categories", 0, "keypoints", to=value)


@pytest.mark.parametrize("says, edit", [
    ("has no list of images", change("images", to={})),
    ("cannot be read", change("annotations", 0, "keypoints", 0, to=10**400)),
    ("two images have the id p0", change("images", 1, "id", to="p0")),
    ("categories: 2 are called teapot", lambda contents: contents["categories"].append(
        {"id": 3, "name": "Teapot", "keypoints": ["a"]})),
    ("keypoints: '' is not a name", names(["a", "", "b"])),
    ("points lie outside their boxes", change("annotations", 0, "bbox", to=[0.1, 0.2, 0.5, 0.4])),
    ("keypoints: 2 are called lidknob", names(["lid_knob", "spout", "Lid Knob"])),
    ("annotation 0 has 9 numbers for 4 keypoints", names(["a", "b", "c", "d"])),
    ("bbox is not x, y, width, height in annotation 1", change("annotations", 1, "bbox", to=[1, 2, 3])),
    ("no labelled object is left", change("annotations", to=[])),
    ("in CVAT the label must be a skeleton", lambda contents: contents | {
        "annotations": [], "categories": [{"id": 1, "name": "pot"}]}),
    ("shelf/0.jpg is 90 x 70 pixels, but 180 x 140 in own.json", lambda contents: contents | {
        "images": [photo | {"width": 180, "height": 140} for photo in contents["images"]]}),
    ("it looks like Label Studio's own format", lambda contents: [{"id": 1, "data": {}}])])
def test_a_malformed_file_is_named_in_one_line(tmp_path, says, edit):
    contents = teapots(tmp_path, 2)
    contents = edit(contents) or contents
    assert re.search(rf"own\.json: .*{says}", refuse(tmp_path, contents))


@pytest.mark.parametrize("texts, wrong, says", [
    (None, ["--images", "nowhere"], "nowhere: no such folder"),
    (None, ["pyproject.toml"], "none of COCO's"), (None, ["tests"], "tests: no annotations"),
    (None, ["--images", "assets"], "no labelled object is left; photos that are not there, left out"),
    ({"spout": "a", "knob": "b"}, [], "lid knob, Handle of tea pot are not described in it"),
    ({"tea pot": {**TEXTS, "handle": ""}}, [], "texts.json: handle is not described"),
    ({"jug": TEXTS}, [], "category tea pot is not described"),
    ({"keypoint_sets": {}}, [], "KeyError: 'categories'")])
def test_wrong_arguments_and_descriptions_are_one_line(tmp_path, texts, wrong, says, monkeypatch):
    monkeypatch.chdir(ROOT)
    if texts is not None:
        write_json(tmp_path / "texts.json", texts)
        wrong = [*wrong, "--descriptions", tmp_path / "texts.json"]
    assert says in refuse(tmp_path, teapots(tmp_path, 2), *wrong)
    assert not (tmp_path / "data").exists()


def test_texts_beside_the_annotations_are_none_however_they_are_spelled(tmp_path):
    draw_teapots([f"{tmp_path}/in"])
    (tmp_path / "in/train.json").rename(tmp_path / "in/teapots.json")
    own.main(command_line(tmp_path / "in", "--descriptions", f"{tmp_path}/in/../in/texts.json",
                          "--out", tmp_path / "out"))
    assert len(instances(tmp_path / "out")) == 6


# ----------------------------------------------------------------------------------------------- descriptions


def test_descriptions_are_found_by_name_and_replace_those_given_before(tmp_path, make):
    """In each of the forms that they may have."""
    make(teapots(tmp_path, name="jug"), texts=TEXTS)
    make(teapots(tmp_path), "--subset", "val", texts={"Jug": {"spout": "its lip"}, "tea_pot": TEXTS})
    make(teapots(tmp_path, name="Tea_Pot"), "--subset", "test", texts=FULL)
    jug, pot = categories_of(tmp_path / "data").values()
    assert (jug.name, jug.keypoints[:2]) == ("jug", [("spout", "its lip"), ("lid knob", "The knob on top.")])
    assert (pot.name, pot.keypoints) == ("tea pot", [*TEXTS.items()])
    assert [layout(tmp_path / "data", s)[0]["category_id"] for s in ("train", "val", "test")] == [1, 2, 2]


def test_keypoints_that_are_only_numbered_take_the_names_of_the_texts(tmp_path, make):
    contents = teapots(tmp_path)
    names(["new-point-0", "new-point-1", "new-point-2"])(contents)
    [line] = make(contents, texts=TEXTS)
    assert line == ("keypoints that are only numbered, and are called by their order: "
                    "spout, lid knob, handle, ... of tea pot")
    names([])(contents)
    make(contents, "--subset", "val")
    assert [*layout(tmp_path / "data", "val")[0]["points"]] == [*TEXTS]


def test_a_keypoint_that_comes_later_is_not_labelled_before(tmp_path, make):
    make(teapots(tmp_path))
    contents = teapots(tmp_path)
    names(["Handle", "lid knob", "foot"])(contents)
    [line] = make(contents, "--subset", "val")
    assert line.startswith("files with other keypoints than those before")
    assert layout(tmp_path / "data")[0]["category"]["keypoints"] == ["spout", "lid knob", "Handle", "foot"]
    assert layout(tmp_path / "data")[0]["points"]["spout"] == (20, 30, 2)
    assert layout(tmp_path / "data", "val")[0]["points"]["Handle"] == (20, 30, 2)
    assert len(instances(tmp_path / "data")) == 6


# ---------------------------------------------------------------------------------------- files of many tools

SPOTS = {"nose": (52, 24), "left ear": (80, 33), "tail": (18, 60)}  # on an upright photo of 96 x 80 pixels
COLOURS = {"nose": (255, 0, 0), "left ear": (0, 255, 0), "tail": (0, 0, 255)}
UPRIGHT = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def make_photo(path, orientation=1):
    """A photo with a spot of each colour; as it is stored if EXIF says that viewers turn it."""
    photo, exif = Image.new("RGB", (96, 80), "gray"), Image.Exif()
    for name, (x, y) in SPOTS.items():
        photo.paste(COLOURS[name], (x - 3, y - 3, x + 4, y + 4))
    photo = photo.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else photo
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    photo.save(path, exif=exif, quality=95)


def write_coco(folder, orientation=1, photo="a.jpg"):
    make_photo(folder / photo, orientation)
    triples = [number for point in SPOTS.values() for number in (*point, 2)]
    write_json(folder / "labels.json", {
        "images": [{"id": 1, "file_name": photo, "width": 96, "height": 80}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "keypoints": triples,
                         "bbox": [10, 10, 80, 60]}],
        "categories": [{"id": 1, "name": "mouse", "keypoints": [*SPOTS]}]})
    return folder / "labels.json"


def write_labelme(folder, orientation=1):
    make_photo(folder / "photos/a.jpg", orientation)
    shapes = [{"label": name, "points": [[*point]], "group_id": 4, "shape_type": "point"}
              for name, point in SPOTS.items()]
    shapes.append({"label": "mouse", "points": [[90, 10], [10, 70]], "group_id": 4,
                   "shape_type": "rectangle"})
    write_json(folder / "labels.json", {"shapes": shapes, "imagePath": "..\\photos\\a.jpg", "imageData": None,
                                        "imageWidth": 96, "imageHeight": 80})
    return folder / "labels.json"


def write_yolo(folder, orientation=1):
    make_photo(folder / "train/images/a.jpg", orientation)
    points = " ".join(f"{x / 96} {y / 80} 2" for x, y in SPOTS.values())
    (folder / "train/labels").mkdir()
    (folder / "train/labels/a.txt").write_text(f"1 {50 / 96} 0.5 {80 / 96} 0.75 {points}\n\n")
    (folder / "data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images  # not exported\n\nkpt_shape: [3, 3]\n"
        "flip_idx: [0, 1, 2]\nnc: 2\nnames: ['rat', \"mouse\"]\nkpt_names:\n  0:\n    - nose\n"
        "    - left ear\n    - tail\n"
        "  1: [nose, left ear, tail]\n")
    return folder / "data.yaml"


def write_dlc(folder, orientation=1):
    make_photo(folder / "labeled-data/v/img01.png", orientation)
    rows = [["scorer", *["me"] * 6], ["bodyparts", *(name for name in SPOTS for _ in "xy")],
            ["coords", *"xy" * 3],
            ["labeled-data/v/img01.png", *(number for point in SPOTS.values() for number in point)]]
    path = folder / "labeled-data/v/CollectedData_me.csv"
    path.write_text("\n".join(",".join(map(str, row)) for row in rows))
    return path


@pytest.mark.parametrize("write, orientation", [
    (write, orientation) for write in (write_coco, write_labelme, write_yolo) for orientation in (1, 3, 6, 8)
] + [(write_coco, 0), (write_coco, 9), (write_dlc, 1)])
def test_every_point_is_on_its_spot(tmp_path, capsys, write, orientation):
    file = write(tmp_path / "in", orientation)
    said = convert(capsys, file, "--out", tmp_path / "data", "--category", "mouse")
    [one] = layout(tmp_path / "data")
    assert one["category"]["name"] == "mouse" and [*one["points"]] == [*SPOTS]
    if write != write_dlc:
        assert one["bbox"] == pytest.approx([10, 10, 80, 60])
    if orientation == 3 and write != write_yolo:  # its size is the same either way and proves nothing
        assert said[0].startswith("warning: photos with an EXIF orientation, which is ignored")
        return
    assert {name: xyv[:2] for name, xyv in one["points"].items()} == {
        name: pytest.approx(spot) for name, spot in SPOTS.items()}
    with Image.open(tmp_path / "data/images" / one["photo"]["file_name"]) as photo:
        assert photo.getexif().get(0x0112, 1) not in UPRIGHT
        for name, (x, y, _) in one["points"].items():
            assert np.abs(np.subtract(photo.getpixel((round(x), round(y))), COLOURS[name])).max() < 30


def test_a_photo_upside_down_is_as_the_others_of_its_file(tmp_path, capsys):
    """The size of one turned by a quarter says that points are upright, and so of one turned by half."""
    contents = read_json(write_coco(tmp_path, 6))
    make_photo(tmp_path / "b.jpg", 3)
    contents["images"].append(contents["images"][0] | {"id": 2, "file_name": "b.jpg"})
    contents["annotations"].append(contents["annotations"][0] | {"image_id": 2})
    write_json(tmp_path / "labels.json", contents)
    said = convert(capsys, tmp_path / "labels.json", "--out", tmp_path / "data")
    assert said[0] == "photos copied upright, as their points are: 2, e.g. a.jpg"


ONE = """scorer,me,me,me,me
bodyparts,snout,snout,tail,tail
coords,x,y,x,y
labeled-data/v/img1.png,10.5,20,30,40
labeled-data\\v\\img2.png,,,31,NaN
labeled-data/v/img3.png,,,0,41.25
"""
THREE_COLUMNS = re.sub(r"^(\w+),(me|snout|x)", r"\1,,,\2", ONE, flags=re.M).replace("v/", "v,").replace(
    "labeled-data/", "labeled-data,").replace("labeled-data\\v\\", "labeled-data,v,")
TWO_ANIMALS = """scorer,me,me,me,me,me,me
individuals,a,a,b,b,single,single
bodyparts,snout,snout,snout,snout,door,door
coords,x,y,x,y,x,y
labeled-data/v/img1.png,1,2,3,4,5,6
labeled-data/v/img2.png,,,7,8,5,6
labeled-data/v/img3.png,,,,,5,6
"""
SEMICOLONS = ONE.replace(",", ";").replace(".5", ",5").replace("1.25", "1,25")


@pytest.fixture
def of_mice(tmp_path):
    """of_mice(text) -> a command line for DeepLabCut's labels of three frames, of 64 x 48 pixels."""
    frames = tmp_path / "labeled-data/v"
    frames.mkdir(parents=True)
    for n in 1, 2, 3:
        Image.new("RGB", (64, 48)).save(frames / f"img{n}.png")

    def make(text, images=""):
        (tmp_path / "Collected.csv").write_text(text)
        return command_line(tmp_path / "Collected.csv", "--images", tmp_path / images, "--category", "mouse",
                            "--out", tmp_path / "data")
    return make


@pytest.mark.parametrize("text, images", [
    (ONE, ""), (ONE, "labeled-data"), (ONE, "labeled-data/v"), ("\ufeff" + ONE.replace("\n", "\r\n"), ""),
    (THREE_COLUMNS, ""), (SEMICOLONS, "")])
def test_deeplabcuts_labels(tmp_path, of_mice, text, images, capsys):
    assert convert(capsys, *of_mice(text, images))[0] == "train: 2 photos, 2 objects (mouse 2)"
    first, last = layout(tmp_path / "data")
    assert first["photo"]["file_name"] == f"train/{'labeled-data/v/img1.png'.removeprefix(images).strip('/')}"
    assert first["points"] == {"snout": (10.5, 20, 2), "tail": (30, 40, 2)}
    assert last["points"] == {"tail": (0, 41.25, 2)}


def test_of_several_animals_each_is_an_object(tmp_path, of_mice):
    own.main(of_mice(TWO_ANIMALS))
    assert [(one["image_id"], one["points"]) for one in layout(tmp_path / "data")] == [
        (1, {"snout": (1, 2, 2)}), (1, {"snout": (3, 4, 2)}), (2, {"snout": (7, 8, 2)})]


@pytest.mark.parametrize("text, says", [
    ("", "not a CSV of DeepLabCut"), ("a,b\n1,2\n", "not a CSV"),
    (ONE.replace("10.5", "ten"), "cannot be read .*ten"),
    (ONE.replace("x,y\n", "x,likelihood\n"), "columns other than x and y"),
    (ONE.replace("tail,tail", "snout,snout"), "2 are called snout"),
    (ONE.replace("me,me\n", "you,you\n"), "2 scorers, me and you"),
    ("\n".join(ONE.split("\n")[:3]), "no labelled object is left")])
def test_what_is_not_deeplabcuts_is_one_line(of_mice, text, says):
    assert re.search(says, refused(own, of_mice(text)))


def test_labelmes_groups_are_objects_and_a_name_twice_is_said(tmp_path, capsys):
    raw = read_json(write_labelme(tmp_path / "in"))
    for n, (name, group) in enumerate([("nose", None), ("tail", None), ("nose", 7), ("nose", 7)]):
        raw["shapes"].append({"label": name, "points": [[20 + n, 30]], "group_id": group,
                              "shape_type": "point"})
    write_json(tmp_path / "in/labels.json", raw)
    write_json(tmp_path / "in/more.json", raw | {"shapes": raw["shapes"][:1]})
    said = convert(capsys, *sorted((tmp_path / "in").glob("*.json")), "--out", tmp_path / "data",
                   "--category", "rat")
    assert ("groups with two points of one name, left out (each object needs a group_id): group 7 of "
            "labels.json") in said
    mouse, rat, *_ = layout(tmp_path / "data")
    assert (mouse["category"]["name"], rat["category"]["name"]) == ("mouse", "rat")
    assert rat["points"] == {"nose": (20, 30, 2), "tail": (21, 30, 2)}


def test_yolos_points_without_visibility_and_names(tmp_path, capsys):
    write_yolo(tmp_path)
    points = " ".join(f"{x / 96} {y / 80}" for x, y in [*SPOTS.values()][:2])
    (tmp_path / "train/labels/a.txt").write_text(
        f"0 0.5 0.5 0.9 0.9 {points} 0 0\n0 0.5 0.5 0.9 0.9 0 0 0 0 0 0\n")
    (tmp_path / "data.yaml").write_text("path: /elsewhere\ntrain: train/images\nkpt_shape:\n- 3\n- 2\n"
                                        "names:\n  0: rat\n")
    said = convert(capsys, tmp_path, "--out", tmp_path / "data")
    assert said[0] == "objects without labelled keypoints, left out: one in a.txt"
    [one] = layout(tmp_path / "data")
    assert one["category"]["name"] == "rat" and [*one["points"]] == ["point 1", "point 2"]
    (tmp_path / "train/labels/a.txt").write_text("0 0.5 0.5 0.9 0.9\n")
    assert "a.txt: a line has 5 numbers" in refused(own, [tmp_path, "--out", tmp_path / "x"])


def test_yolos_folders_and_what_lies_in_them(tmp_path, capsys):
    """Two folders of a subset, one that is not there, and caches and other tools' labels beside photos."""
    write_yolo(tmp_path)
    (tmp_path / "train/images/a.jpg").rename(tmp_path / "train/images/a.png")  # after a.npy
    for folder in "images", "labels":
        shutil.copytree(tmp_path / "train" / folder, tmp_path / "more" / folder)
    for name in "a.json", "a.npy", "a.JSON":
        (tmp_path / "train/images" / name).write_text("no photo")
    yaml = (tmp_path / "data.yaml").read_text()
    (tmp_path / "data.yaml").write_text(yaml.replace("../train/images", "[train/images, more/images]"))
    said = convert(capsys, tmp_path, "--out", tmp_path / "data")
    absent = f"{tmp_path}/data.yaml: val: ../valid/images is not a folder of photos that is here; left out"
    assert said[:2] == [absent, "train: 2 photos, 2 objects (mouse 2)"]
    (tmp_path / "train/labels/a.txt").write_text("2" + (tmp_path / "train/labels/a.txt").read_text()[1:])
    assert "a.txt: class 2, where data.yaml names 2" in refused(own, [tmp_path, "--out", tmp_path / "x"])
    (tmp_path / "data.yaml").write_text(yaml.replace("../train/images", "train.txt"))
    assert "--images says where they are" in refused(own, [tmp_path, "--out", tmp_path / "x"])


def test_a_group_of_labelme_with_outlines_of_two_kinds_is_left_out(tmp_path, capsys):
    raw = read_json(write_labelme(tmp_path))
    raw["shapes"].append({"label": "dog", "points": [[50, 10], [90, 70]], "shape_type": "rectangle",
                          "group_id": raw["shapes"][0]["group_id"]})
    write_json(tmp_path / "labels.json", raw)
    line = refused(own, [tmp_path / "labels.json", "--out", tmp_path / "data"])
    assert "groups with outlines of several kinds, left out (each object needs a group_id)" in line


def test_a_photo_that_turns_out_to_be_upright_is_copied_in_place_of_its_link(tmp_path, capsys):
    file = write_coco(tmp_path / "in", 6)
    raw = read_json(file)
    size = {key: raw["images"][0].pop(key) for key in ("width", "height")}
    write_json(file, raw)
    convert(capsys, file, "--out", tmp_path / "data")
    before = (tmp_path / "in/a.jpg").read_bytes()
    raw["images"][0] |= size
    write_json(file, raw)
    convert(capsys, file, "--out", tmp_path / "data")
    [one] = layout(tmp_path / "data")
    with Image.open(tmp_path / "data/images" / one["photo"]["file_name"]) as photo:
        assert photo.size == (size["width"], size["height"]) and photo.getexif().get(0x0112, 1) not in UPRIGHT
    assert (tmp_path / "in/a.jpg").read_bytes() == before


def test_a_folder_with_train_valid_and_test(tmp_path, capsys):
    """As Roboflow makes it: photos of one name in two of them are two photos, and one has no objects."""
    for name, photo in ("train", "a.jpg"), ("valid", "a.jpg"), ("test", "b.jpg"):
        file = write_coco(tmp_path / name, photo=photo)
        contents = read_json(file)
        contents["annotations"] *= name != "test"
        write_json(tmp_path / name / "_annotations.coco.json", contents)
        file.unlink()
    said = convert(capsys, tmp_path, "--out", tmp_path / "data")
    assert said[:3] == ["subsets without a labelled object, not written: test",
                        "train: 1 photos, 1 objects (mouse 1)", "val: 1 photos, 1 objects (mouse 1)"]
    for subset, folder in ("train", "train"), ("val", "valid"):
        [one] = layout(tmp_path / "data", subset)
        assert (tmp_path / "data/images" / one["photo"]["file_name"]).samefile(tmp_path / folder / "a.jpg")


# --------------------------------------------------------------------------------------------- damaged files

@pytest.mark.parametrize("write, name", [
    (write_coco, "labels.json"), (write_labelme, "labels.json"),
    (write_dlc, "labeled-data/v/CollectedData_me.csv"), (write_yolo, "data.yaml"),
    (write_yolo, "train/labels/a.txt"), (write_coco, "texts.json")])
def test_damaged_files_never_give_a_traceback(tmp_path, write, name):
    """They are read rightly or refused in one line, and both happens."""
    file, outcomes = write(tmp_path / "in"), []
    write_json(tmp_path / "in/texts.json", {"mouse": dict.fromkeys(SPOTS, "where it is")})
    good = (tmp_path / "in" / name).read_bytes()

    @rubbish
    @given(spoilt_json(json.loads(good)) if name.endswith("json") else damaged(good))
    def try_one(contents):
        (tmp_path / "in" / name).write_bytes(contents)
        out = tmp_path / f"data{len(outcomes)}"
        try:
            own.main(command_line(file, "--descriptions", tmp_path / "in/texts.json", "--out", out))
            for one in instances(out):
                assert np.isfinite([*one.box, *one.keypoints.flat]).all()
            outcomes.append(True)
        except InputError as e:
            assert str(e).isprintable() and not out.exists()
            outcomes.append(False)
    try_one()
    assert {*outcomes} == {True, False}
