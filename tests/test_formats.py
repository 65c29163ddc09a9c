"""own.py with the files of other tools, with files that once failed, and with damaged ones."""

import copy
import json
import math
import random
import re

import numpy as np
import pytest
from mp100 import write_json
from PIL import Image
from programs import command_line, refused
from test_own import convert, instances, layout

from common import InputError, read_json
from tools import own

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
    for photo in contents["images"]:
        photo |= {"width": 96 if photo["id"] == 2 else 80, "height": 80 if photo["id"] == 2 else 96}
    for one in contents["annotations"]:
        one |= {"keypoints": [50, 30, 2] * 3, "bbox": [10, 10, 60, 60]}
    write_json(tmp_path / "labels.json", contents)
    assert len(convert(capsys, tmp_path / "labels.json", "--out", tmp_path / "stored")) == 2
    assert (tmp_path / "stored/images/train/b.jpg").samefile(tmp_path / "b.jpg")  # a link


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
def frames(tmp_path):
    """A project's three frames, of 64 x 48 pixels."""
    folder = tmp_path / "labeled-data/v"
    folder.mkdir(parents=True)
    for n in 1, 2, 3:
        Image.new("RGB", (64, 48)).save(folder / f"img{n}.png")
    return tmp_path


def of_mice(frames, text, images=""):
    (frames / "Collected.csv").write_text(text)
    return command_line(frames / "Collected.csv", "--images", frames / images, "--category", "mouse",
                        "--out", frames / "data")


@pytest.mark.parametrize("text", [ONE, "\ufeff" + ONE.replace("\n", "\r\n"), THREE_COLUMNS, SEMICOLONS])
@pytest.mark.parametrize("images", ["", "labeled-data", "labeled-data/v"])
def test_deeplabcuts_labels(frames, text, images, capsys):
    assert convert(capsys, *of_mice(frames, text, images))[0] == "train: 2 photos, 2 objects (mouse 2)"
    first, last = layout(frames / "data")
    assert first["photo"]["file_name"] == f"train/{'labeled-data/v/img1.png'.removeprefix(images).strip('/')}"
    assert first["points"] == {"snout": (10.5, 20, 2), "tail": (30, 40, 2)}
    assert last["points"] == {"tail": (0, 41.25, 2)}


def test_of_several_animals_each_is_an_object(frames):
    own.main(of_mice(frames, TWO_ANIMALS))
    assert [(one["image_id"], one["points"]) for one in layout(frames / "data")] == [
        (1, {"snout": (1, 2, 2)}), (1, {"snout": (3, 4, 2)}), (2, {"snout": (7, 8, 2)})]


@pytest.mark.parametrize("text, says", [
    ("", "not a CSV of DeepLabCut"), ("{}", "not a CSV"), ("a,b\n1,2\n", "not a CSV"),
    (ONE.replace("10.5", "ten"), "cannot be read .*ten"),
    (ONE.replace("coords,x,y", "coords,y,x"), "not a CSV"),
    (ONE.replace("x,y\n", "x,likelihood\n"), "columns other than x and y"),
    (ONE.replace("tail,tail", "snout,snout"), "2 are called snout"),
    ("\n".join(ONE.split("\n")[:3]), "no labelled object is left"),
])
def test_what_is_not_deeplabcuts_is_one_line(frames, text, says):
    assert re.search(says, refused(own, of_mice(frames, text)))


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
    labels = [write_labelme(tmp_path / "labelme" / name) for name in ("train", "val")]
    assert len(convert(capsys, labels[0].parents[1], "--out", tmp_path / "other")) == 3


# ----------------------------------------------------------------------------------------- files that failed

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


# --------------------------------------------------------------------------------------------- damaged files

ODD = [None, True, 0, -1, 7, 10**400, 0.5, 1e300, math.nan, math.inf, "", "0", "x", "\0", "\ud800", "\x1b[2J",
       "../x", "/etc/passwd", "x" * 5000, [], {}, [[]], [None], [1, 2], ["a"], {"a": 1}]


def spoil(contents, rng):
    """JSON with one to three values changed, dropped or doubled."""
    contents = [copy.deepcopy(contents)]
    for _ in range(rng.randint(1, 3)):
        places, stack = [], [contents]
        while stack:
            container = stack.pop()
            keys = [*(container if isinstance(container, dict) else range(len(container)))]
            places += [(container, key) for key in keys]
            stack += [container[key] for key in keys if isinstance(container[key], (dict, list))]
        container, key = rng.choice(places)
        if rng.random() < 0.2 and container is not contents:
            del container[key]
        elif rng.random() < 0.2 and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            container[key] = copy.deepcopy(rng.choice(ODD))
    return json.dumps(contents[0]).encode()


def damage(contents, rng):
    """Bytes with some changed or a piece taken out, or cut off."""
    contents = bytearray(contents)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(contents))
        contents[place:place + rng.choice([1, 1, 1, 0, 9])] = bytes([rng.choice(b"\xff-91,\n ")])
    return bytes(contents[:len(contents) if rng.random() < 0.8 else rng.randrange(len(contents))])


@pytest.mark.parametrize("write, spoilt", [
    (write_coco, "labels.json"), (write_labelme, "labels.json"),
    (write_dlc, "labeled-data/v/CollectedData_me.csv"), (write_yolo, "data.yaml"),
    (write_yolo, "train/labels/a.txt"), (write_coco, "texts.json")])
def test_damaged_files_never_give_a_traceback(tmp_path, write, spoilt):
    file, rng, outcomes = write(tmp_path / "in"), random.Random(spoilt), []
    write_json(tmp_path / "in/texts.json", {"mouse": dict.fromkeys(SPOTS, "where it is")})
    good = (tmp_path / "in" / spoilt).read_bytes()
    for n in range(200):
        is_json = spoilt.endswith("json") and n % 10
        (tmp_path / "in" / spoilt).write_bytes(spoil(json.loads(good), rng) if is_json else damage(good, rng))
        out = tmp_path / f"data{n}"
        try:
            own.main(command_line(file, "--descriptions", tmp_path / "in/texts.json", "--out", out))
            for one in instances(out):
                assert np.isfinite([*one.box, *one.keypoints.flat]).all()
            outcomes.append(True)
        except InputError as e:
            assert str(e).isprintable() and not out.exists()
            outcomes.append(False)
    assert 0.05 < np.mean(outcomes) < 0.95
