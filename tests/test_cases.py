"""Files of other people that once failed: tools/own.py reads them rightly, or says what is wrong."""

import re

import pytest
from conftest import ROOT
from mp100 import write_json
from programs import refused
from test_own import categories_of, convert, instances, layout

from common import read_json
from data import parse_descriptions
from tools import own

CASES = {  # case: (file, what is said, whether it is refused)
    "a-list-is-json": ("tasks.json", "tasks.json: not a COCO keypoints file (its outermost value is a list); "
                       "export it as COCO; it looks like Label Studio's own format", True),
    "boxes-other-rules": ("train.json", "train: 1 photos, 2 objects", False),
    "cvat-points-without-skeleton": (
        "train.json", "train.json: no category names keypoints, and there are no annotations; in CVAT the "
        "label must be a skeleton", True),
    "exif-upright-annotations": ("upright.json", "photos copied upright, as their points are: phone.jpg",
                                 False),
    "local-files-of-label-studio": ("train.json", "train: 1 photos, 1 objects", False),
    "nan-where-unlabelled": ("train.json", "train: 1 photos, 1 objects", False),
    "roboflow-root-of-same-name": ("train.json", "train: 1 photos, 1 objects", False),
    "size-differs": ("train.json", "creature.jpg is 247 x 247 pixels, but 494 x 494 in train.json; its "
                     "points do not fit", True),
    "skeleton-of-17-for-14": ("train.json", "skeletons with lines to keypoints that there are not", False),
    "tight-box": ("train.json", "files whose boxes are the mere extent of the points", False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_failed(shared, tmp_path, capsys, case):
    (name, says, is_refused), folder = CASES[case], shared / "cases" / case
    arguments = [folder / name, "--images", folder / "photos", "--descriptions", folder / "texts.json",
                 "--out", tmp_path / "data"]
    if is_refused:
        assert says in refused(own, arguments)
        return
    assert says in "\n".join(convert(capsys, *arguments))
    for one in layout(tmp_path / "data"):
        points = {"knob": (174, 101, 2), "horn tip": (188, 164, 2), "heart": (110, 151, 2)}
        if case == "nan-where-unlabelled":
            points.pop("horn tip")
        assert one["points"] == points
    if case == "tight-box":
        assert one["bbox"] == [100.25, 91.25, 97.5, 82.5]
    if case == "exif-upright-annotations":
        assert (one["photo"]["width"], one["photo"]["height"]) == (320, 247)
    if case == "skeleton-of-17-for-14":
        assert one["category"]["skeleton"] == [[2, 1]]


def test_two_folders_whose_photos_are_called_alike(shared, tmp_path, capsys):
    folder = shared / "cases/two-folders-same-names"
    convert(capsys, folder, "--descriptions", folder / "texts.json", "--out", tmp_path / "data")
    convert(capsys, folder / "val2017.json", "--subset", "test", "--out", tmp_path / "data")
    for subset, name in ("train", "train2017"), ("val", "val2017"), ("test", "val2017"):
        [one] = layout(tmp_path / "data", subset)
        photo = tmp_path / "data/images" / one["photo"]["file_name"]
        assert photo.read_bytes() == (folder / name / "frame_000000.jpg").read_bytes()
        assert one["points"]["horn tip"] == (188, 164 if subset == "train" else 82, 2)


@pytest.mark.parametrize("name, says, n, points", [
    ("vid2_order", "train: 6 photos", 6, ["nose", "tail"]),
    ("vid2_other", "files with other keypoints than those before", 6, ["nose", "ear"]),
    ("missing_frame", "photos that are not there.*img777.png", 4, ["nose", "tail"]),
    ("two_scorers", None, 0, None),
])
def test_projects_of_deeplabcut(shared, tmp_path, capsys, name, says, n, points):
    folder = shared / "cases/dlc-projects"
    arguments = [folder / "single3.csv", folder / f"{name}.csv", "--images", folder, "--category", "mouse",
                 "--out", tmp_path / "data"]
    if says is None:
        assert "2 scorers, me and you" in refused(own, arguments)
        return
    assert re.search(says, "\n".join(convert(capsys, *arguments)))
    objects = layout(tmp_path / "data")
    assert len(objects) == n and [*objects[-1]["points"]] == points
    assert objects[-1]["points"]["nose"] == objects[n - 4 if n == 4 else 2]["points"]["nose"]


def test_cocos_persons_get_the_descriptions_of_persons_whatever_their_id(shared, tmp_path, capsys):
    """By their names: id 2, which the persons have here, is the horse's in descriptions.json."""
    contents = read_json(shared / "mini_mp100/annotations/mp100_split1_train.json")
    contents["categories"] = [c | {"id": 2} for c in contents["categories"] if c["name"] == "person"]
    contents["annotations"] = [o | {"category_id": 2} for o in contents["annotations"]
                               if o["category_id"] == 72]
    write_json(tmp_path / "own.json", contents)
    convert(capsys, tmp_path / "own.json", "--images", shared / "mini_mp100/images", "--descriptions",
            ROOT / "descriptions.json", "--out", tmp_path / "data")
    [category], ours = categories_of(tmp_path / "data").values(), ROOT / "descriptions.json"
    assert category.keypoints == parse_descriptions(read_json(ours), ours)[72].keypoints
    assert len(category.skeleton) == 19 and len(instances(tmp_path / "data")) == 8
