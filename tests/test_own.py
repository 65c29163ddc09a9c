"""own.py with COCO keypoints files: what becomes of them in MP-100's layout, and what is said."""

import math
import re

import numpy as np
import pytest
from conftest import ROOT
from mp100 import write_json
from PIL import Image
from programs import command_line, read_checkpoint, refused, to_train

import train
from common import read_json
from data import parse_descriptions, read_instances
from tools import own

NAMES = ["spout", "lid_knob", "Handle"]
TEXTS = {"spout": "The opening away from the handle.", "lid knob": "The knob on top.",
         "handle": "The outermost point away from the spout."}
FULL = {"keypoint_sets": {"pot": [{"name": name, "description": text} for name, text in TEXTS.items()]},
        "categories": {"1": {"name": "Tea-Pot", "keypoint_set": "pot"}}}


def teapots(folder, n=6, category_id=-7, name="tea pot"):
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
        annotations.append({"id": i, "image_id": f"p{i}", "category_id": category_id,
                            "keypoints": [20, 30, 2, 36, 22, 2, *last]})
    category = {"id": category_id, "name": name, "keypoints": NAMES, "skeleton": [[1, 2], [2, 3]]}
    return {"images": images, "annotations": annotations, "categories": [category]}


def convert(capsys, *arguments):
    """Runs the program -> the lines that it said, but for the warning of texts that are only names."""
    own.main(command_line(*arguments))
    return [line for line in capsys.readouterr().out.splitlines() if "by their names only" not in line]


@pytest.fixture
def make(tmp_path, capsys):
    """make(contents, *more) converts a COCO file -> what was said before the counts."""
    def run(contents, *more):
        write_json(tmp_path / "own.json", contents)
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


def read_descriptions(path):
    return parse_descriptions(read_json(path), path)


def instances(out, subset="train"):
    """The same through the reader that train.py uses."""
    file = out / f"annotations/mp100_split1_{subset}.json"
    return read_instances(file, read_descriptions(out / "descriptions.json"))


# ---------------------------------------------------------------------------------------------- the programs


def test_six_photos_train_and_the_checkpoint_knows_their_texts(tiny, tmp_path, make):
    contents = teapots(tmp_path)
    write_json(tmp_path / "texts.json", TEXTS)
    assert make(contents, "--descriptions", tmp_path / "texts.json") == []
    of_val = teapots(tmp_path, 2, category_id=5, name="Tea_Pot")
    of_val["categories"].append({"id": 6, "name": "jug", "keypoints": NAMES})
    of_val["annotations"][1]["category_id"] = 6
    make(of_val, "--subset", "val", "--descriptions", tmp_path / "texts.json")
    out = tmp_path / "data"
    assert [one["category"]["name"] for one in layout(out, "val")] == ["tea pot", "jug"]

    train.main(to_train(tiny, out, tmp_path / "run"))
    descriptions = read_checkpoint(tmp_path / "run")["descriptions"]
    assert descriptions["skeletons"]["tea pot"] == [[0, 1], [1, 2]]
    assert [(o["name"], o["description"]) for o in descriptions["keypoint_sets"]["jug"]] == [*TEXTS.items()]


def test_it_ends_with_counts_and_the_command_that_trains(tmp_path, capsys):
    write_json(tmp_path / "own.json", teapots(tmp_path))
    arguments = command_line(tmp_path / "own.json", "--images", tmp_path / "photos",
                             "--out", tmp_path / "a b")
    own.main([*arguments, "--subset", "val"])
    warning, counts, last = capsys.readouterr().out.splitlines()
    assert "3 keypoints are described by their names only" in warning and "--descriptions" in warning
    assert counts == "val: 6 photos, 6 objects (tea pot 6)" and "--subset train" in last
    assert convert(capsys, *arguments)[1] == f"train on it: python train.py --data '{tmp_path}/a b'"
    [category] = read_descriptions(tmp_path / "a b/descriptions.json").values()
    assert category.keypoints == [(name, f"the {name} of the tea pot")
                                  for name in ("spout", "lid knob", "Handle")]


def test_what_it_did_not_make_is_not_overwritten(tmp_path, make):
    contents = teapots(tmp_path)
    (tmp_path / "data").mkdir()  # which is fine while empty
    make(contents)
    make(contents)  # and so is a second time
    assert len(layout(tmp_path / "data")) == 6
    (tmp_path / "data/descriptions.json").write_text('{"keypoint_sets": {}, "categories": {}}')
    before = (tmp_path / "data/annotations/mp100_split1_train.json").read_bytes()
    assert "not made by this program" in refuse(tmp_path, contents)
    assert (tmp_path / "data/annotations/mp100_split1_train.json").read_bytes() == before


@pytest.mark.parametrize("wrong, says", [
    (["--images", "nowhere"], "nowhere: no such folder"), (["nowhere.json"], "nowhere.json: no such file"),
    (["--descriptions", "nowhere.json"], "nowhere.json: no such file"),
    (["pyproject.toml"], "none of COCO's"), (["tests"], "tests: no annotations"),
    (["--images", "assets"], "no labelled object is left; photos that are not there, left out (--images"),
])
def test_wrong_arguments_are_one_line(tmp_path, wrong, says, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert says in refuse(tmp_path, teapots(tmp_path), *wrong)
    assert not (tmp_path / "data").exists()


# ------------------------------------------------------------------------------------------------ annotations


def test_what_the_file_lacks_is_made_of_the_points_and_photos(tmp_path, make):
    contents = teapots(tmp_path, 3)
    contents["annotations"][1]["keypoints"] = [0] * 6 + [50, 40, 2]  # a single point
    contents["annotations"][2] |= {"bbox": [0, 0, 0, 0], "area": 0, "num_keypoints": 3}  # as COCO Annotator's
    make(contents)
    one, two, three = layout(tmp_path / "data")
    assert one["points"] == {"spout": (20, 30, 2), "lid knob": (36, 22, 2), "Handle": (50, 40, 1)}
    assert one["bbox"] == [16.25, 18.25, 37.5, 25.5]  # 30 x 18 pixels and an eighth of 30 on each side
    assert two["bbox"] == [46.5, 36.5, 7, 7]  # a tenth of the photo's shorter side
    assert three["bbox"] == [16.25, 18.25, 37.5, 27.5]
    assert instances(tmp_path / "data")[0].box == pytest.approx((16.25, 18.25, 36.5, 24.5))


def test_a_file_that_says_everything_is_taken_at_its_word(tmp_path, make):
    contents = teapots(tmp_path, 2)
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
    assert "objects without labelled keypoints, left out: 4, e.g. annotation 0" in said
    assert "annotations of images that are not listed, left out: annotation 3" in said
    assert "photos that are not there, left out (--images says where they are): shelf/7.jpg" in said
    assert "photos that cannot be read, left out: shelf/6.jpg (OSError: image file is truncated" in said
    assert "objects whose box lies outside their photo, left out: one in shelf/5.jpg" in said
    assert "points outside the square around their box, which are not trained on: 3 of 6" in said
    assert [one["photo"]["file_name"] for one in layout(tmp_path / "data")] == ["train/shelf/8.jpg"]


def test_names_and_ids_of_other_kinds(tmp_path, make):
    contents = teapots(tmp_path, 5)
    contents["annotations"][0]["category_id"] = "-7"
    contents["categories"][0] |= {"skeleton": [[0, 1], [2, 1]]}  # which counts from 0
    triples = contents["annotations"][1]["keypoints"]
    contents["annotations"][1]["keypoints"] = [triples[i:i + 3] for i in (0, 3, 6)]
    contents["annotations"][2]["keypoints"][:6] = [None, None, 0, math.nan, math.nan, 2]
    # as Label Studio writes names: with the path on its server, out of its own folder, as an address
    before = ["", "/data/upload/7/", "..\\..\\media\\upload\\", "/data/local-files/?d=",
              "/data/local-files/?d=a%5C"]
    for photo, folders in zip(contents["images"], before):
        photo["file_name"] = folders + photo["file_name"]
    (line,) = make(contents)
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


# What most of a file does wrong -> what is said.
CONFUSED = {
    "no coordinate is above 1: fractions": lambda x, y: (x / 90, y / 70),
    "points lie outside their photos, e.g. 200, 300 in shelf/0.jpg, which is 90 x 70":
        lambda x, y: (10 * x, 10 * y),
}


@pytest.mark.parametrize("says, change", CONFUSED.items())
def test_points_in_another_unit_are_refused(tmp_path, says, change):
    contents = teapots(tmp_path)
    for one in contents["annotations"]:
        points = np.reshape(one["keypoints"], (3, 3)).tolist()
        one["keypoints"] = [number for x, y, v in points for number in (*change(x, y), v)]
    assert says in refuse(tmp_path, contents)


def test_boxes_in_another_unit_are_refused_and_a_few_points_outside_are_said(tmp_path, make):
    contents = teapots(tmp_path)
    for one in contents["annotations"]:
        one["bbox"] = [0.1, 0.2, 0.5, 0.4]
    assert "points lie outside their boxes" in refuse(tmp_path, contents)
    contents = teapots(tmp_path)
    contents["annotations"][2]["keypoints"][0] = 95
    assert make(contents) == ["points outside their photos, which cannot be found: 95, 30 in shelf/2.jpg, "
                              "which is 90 x 70 pixels"]


def test_points_that_may_be_percent_are_said(tmp_path, make):
    contents = teapots(tmp_path, 4)
    for i in range(4):
        Image.new("L", (400, 300)).save(tmp_path / f"photos/shelf/{i}.jpg")
    assert make(contents) == ["warning: no coordinate is above 100; percent? Pixels are wanted: own.json"]
    contents["annotations"][0]["keypoints"][0] = 101
    assert make(contents) == []


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


WRONG = {
    "has no list of images": [change("images", to=value) for value in (..., {}, None, 7)],
    "has no list of annotations": [change("annotations", to=...)],
    "has no list of categories": [change("categories", to="x")],
    "KeyError: 'file_name'": [change("images", 0, "file_name", to=...)],
    "cannot be read": [
        change("images", 0, "file_name", to=3), change("images", 1, to=None),
        change("categories", 0, "name", to=[]), change("annotations", 0, "keypoints", 0, to=10**400),
        change("annotations", 0, "keypoints", to="x" * 9), change("images", 0, "width", to="x")],
    "two images have the id p0": [change("images", 1, "id", to="p0")],
    "categories: 2 are called teapot": [
        lambda contents: contents["categories"].append({"id": 3, "name": "Teapot", "keypoints": ["a"]})],
    "keypoints are not a list of names": [names(value) for value in ("abc", 3)],
    "keypoints: '' is not a name": [names(["a", "", "b"])],
    "keypoints: 2 are called lidknob": [names(["lid_knob", "spout", "Lid Knob"])],
    "annotation 0 has 9 numbers for 4 keypoints": [names(["a", "b", "c", "d"])],
    "annotation 1 has 8 numbers for 3": [change("annotations", 1, "keypoints", 8, to=...)],
    "bbox is not x, y, width, height in annotation 1": [change("annotations", 1, "bbox", to=[1, 2, 3])],
    "no labelled object is left": [change("annotations", to=[])],
}


@pytest.mark.parametrize("says, edit", [(says, edit) for says, edits in WRONG.items() for edit in edits])
def test_a_malformed_file_is_named_in_one_line(tmp_path, says, edit):
    contents = teapots(tmp_path)
    edit(contents)
    assert re.search(rf"own\.json: .*{says}", refuse(tmp_path, contents))


@pytest.mark.parametrize("skeleton", [[[1, 4], [2, 1]], [[1]], [1], 5, [["a", "b"]], [[1, -1]], [{}]])
def test_a_skeleton_that_does_not_fit_is_decoration(tmp_path, make, skeleton):
    contents = teapots(tmp_path, 1)
    contents["categories"][0]["skeleton"] = skeleton
    (line,) = make(contents)
    assert line.startswith("skeletons with lines to keypoints that there are not")
    kept = [[1, 0]] if [2, 1] in np.atleast_1d(skeleton).tolist() else []
    assert read_json(tmp_path / "data/descriptions.json")["skeletons"] == {"tea pot": kept}


# ----------------------------------------------------------------------------------------------- descriptions


@pytest.mark.parametrize("texts", [TEXTS, {"jug": {"spout": "its lip"}, "tea_pot": TEXTS}, FULL], ids=len)
def test_descriptions_are_found_by_name(tmp_path, make, texts):
    write_json(tmp_path / "texts.json", texts)
    make(teapots(tmp_path), "--descriptions", tmp_path / "texts.json")
    [category] = read_descriptions(tmp_path / "data/descriptions.json").values()
    assert category.keypoints == [*TEXTS.items()]
    assert len(instances(tmp_path / "data")) == 6


@pytest.mark.parametrize("texts, says", [
    ({"spout": "a", "knob": "b"}, "lid knob, Handle of tea pot are not described in it"),
    ({"tea pot": {**TEXTS, "handle": ""}}, "texts.json: handle is not described"),
    ({"spout": 3}, "spout is not described"), ({"tea pot": TEXTS, "spout": "a"}, "tea pot is not described"),
    ({"jug": TEXTS}, "category tea pot is not described"), ({"keypoint_sets": {}}, "KeyError: 'categories'"),
    ([], "not a dict"),
])
def test_descriptions_that_do_not_fit_are_one_line(tmp_path, texts, says):
    write_json(tmp_path / "texts.json", texts)
    assert says in refuse(tmp_path, teapots(tmp_path), "--descriptions", tmp_path / "texts.json")
    assert not (tmp_path / "data").exists()


def test_descriptions_given_later_replace_those_before_and_others_stay(tmp_path, make):
    write_json(tmp_path / "texts.json", TEXTS)
    write_json(tmp_path / "new.json", {"jug": TEXTS | {"spout": "its lip"}})
    make(teapots(tmp_path, name="jug"), "--descriptions", tmp_path / "texts.json")
    make(teapots(tmp_path), "--subset", "val", "--descriptions", tmp_path / "texts.json")
    make(teapots(tmp_path, name="Jug"), "--subset", "test", "--descriptions", tmp_path / "new.json")
    jug, pot = read_descriptions(tmp_path / "data/descriptions.json").values()
    assert (jug.name, jug.keypoints[0]) == ("jug", ("spout", "its lip"))
    assert pot.keypoints == [*TEXTS.items()]
    assert [layout(tmp_path / "data", s)[0]["category_id"] for s in ("train", "val", "test")] == [1, 2, 1]


@pytest.mark.parametrize("given, shown", [([], "point 1"), (["1", "2", "3"], "1"),
                                          (["new-point-0", "new-point-1", "new-point-2"], "new-point-0")])
def test_keypoints_that_are_only_numbered_take_the_names_of_the_texts(tmp_path, make, given, shown):
    contents = teapots(tmp_path)
    names(given)(contents)
    write_json(tmp_path / "texts.json", TEXTS)
    (line,) = make(contents, "--descriptions", tmp_path / "texts.json")
    assert line == ("keypoints that are only numbered, and are called by their order: "
                    "spout, lid knob, handle, ... of tea pot")
    make(contents, "--subset", "val")
    assert [*layout(tmp_path / "data", "val")[0]["points"]] == [*TEXTS]
    (tmp_path / "data").rename(tmp_path / "first")
    make(contents)
    assert [*layout(tmp_path / "data")[0]["points"]][0] == shown


def test_a_keypoint_that_comes_later_is_not_labelled_before(tmp_path, make):
    make(teapots(tmp_path))
    contents = teapots(tmp_path)
    names(["Handle", "lid knob", "foot"])(contents)
    (line,) = make(contents, "--subset", "val")
    assert line.startswith("files with other keypoints than those before")
    assert layout(tmp_path / "data")[0]["category"]["keypoints"] == ["spout", "lid knob", "Handle", "foot"]
    assert layout(tmp_path / "data")[0]["points"]["spout"] == (20, 30, 2)
    assert layout(tmp_path / "data", "val")[0]["points"]["Handle"] == (20, 30, 2)
    assert len(instances(tmp_path / "data")) == 6


def test_cocos_persons_get_the_descriptions_of_persons_whatever_their_id(shared, tmp_path, capsys):
    """By their names: id 2, which the persons have here, is the horse's in descriptions.json."""
    contents = read_json(shared / "mini_mp100/annotations/mp100_split1_train.json")
    contents["categories"] = [c | {"id": 2} for c in contents["categories"] if c["name"] == "person"]
    contents["annotations"] = [o | {"category_id": 2} for o in contents["annotations"]
                               if o["category_id"] == 72]
    write_json(tmp_path / "own.json", contents)
    convert(capsys, tmp_path / "own.json", "--images", shared / "mini_mp100/images", "--descriptions",
            ROOT / "descriptions.json", "--out", tmp_path / "data")
    [category] = read_descriptions(tmp_path / "data/descriptions.json").values()
    assert category.keypoints == read_descriptions(ROOT / "descriptions.json")[72].keypoints
    assert len(category.skeleton) == 19 and len(instances(tmp_path / "data")) == 8
