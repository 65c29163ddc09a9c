"""coco.py: own data in COCO's layout and of DeepLabCut, and a training that starts from another's weights."""

import copy
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from mp100 import write_json
from PIL import Image
from programs import command_line, read_checkpoint, read_results, refused, train_briefly

import coco
import evaluate
import train
from annotations import parse_descriptions, read_descriptions
from coco import read_coco
from common import InputError, read_json
from data import crop_of

NAMES = ["spout", "lid_knob", "Handle"]
TEXTS = {"spout": "The opening away from the handle.", "lid knob": "The knob on top.",
         "handle": "The outermost point away from the spout."}
FULL = {"keypoint_sets": {"pot": [{"name": name, "description": text} for name, text in TEXTS.items()]},
        "categories": {"1": {"name": "Tea-Pot", "keypoint_set": "pot"}}}


def teapots(folder, n=6, category_id=-7, name="tea pot"):
    """Photos of noise, 90 x 70 pixels, and the contents of a COCO file that says no more than it must.

    Of the second photo's teapot the last point is hidden.
    """
    images, annotations = [], []
    for i in range(n):
        photo = folder / f"photos/shelf/{i}.jpg"
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((90, 70), 50).save(photo)
        images.append({"id": f"p{i}", "file_name": f"shelf/{i}.jpg"})
        hidden = [0, 0, 0] if i == 1 else [50, 40 + i, 1]
        annotations.append({"id": i, "image_id": f"p{i}", "category_id": category_id,
                            "keypoints": [20, 30, 2, 36, 22, 2, *hidden]})
    category = {"id": category_id, "name": name, "keypoints": NAMES, "skeleton": [[1, 2], [2, 3]]}
    return {"images": images, "annotations": annotations, "categories": [category]}


def read(folder, contents, texts=None, heard=None):
    write_json(folder / "own.json", contents)
    say = [].append if heard is None else heard.append
    return read_coco(folder / "own.json", folder / "photos", texts, say)


def to_train(tiny, folder, *more):
    return command_line("--annotations", folder / "own.json", "--images", folder / "photos",
                        "--llm", tiny / "llm", "--vit", tiny / "vit", "--out", folder / "run", "--image-size",
                        56, "--epochs", 1, "--batch", 3, "--workers", 0, *more)


# ---------------------------------------------------------------------------------------------- both programs


def test_six_photos_train_and_the_checkpoint_knows_how_to_be_evaluated(tiny, tmp_path, capsys):
    write_json(tmp_path / "own.json", teapots(tmp_path))
    of_val = teapots(tmp_path, 2, category_id=5, name="Tea_Pot")
    of_val["categories"].append({"id": 6, "name": "jug", "keypoints": NAMES})
    of_val["annotations"][1]["category_id"] = 6
    write_json(tmp_path / "val.json", of_val)
    write_json(tmp_path / "texts.json", TEXTS)
    train.main(to_train(tiny, tmp_path, "--val", tmp_path / "val.json",
                        "--descriptions", tmp_path / "texts.json"))
    said = capsys.readouterr().out
    assert "6 objects of 1 categories, 2 steps in 1 epochs" in said
    assert "warning" not in said and "left out" not in said
    descriptions = read_checkpoint(tmp_path / "run")["descriptions"]
    category = parse_descriptions(descriptions, "")[-7]
    assert category.name == "tea pot" and category.skeleton == [(0, 1), (1, 2)]
    assert category.keypoints == [*TEXTS.items()]

    (tmp_path / "texts.json").unlink()
    evaluate.main(command_line(tmp_path / "run/ckpt.pt", "--constrained", "--workers", 0))
    report, predictions = read_results(tmp_path / "run")
    assert report["objects"] == 2 and [*report["per category"]] == ["5 Tea_Pot", "6 jug"]
    assert report["evaluated on"] == str(tmp_path / "val.json")
    assert [len(p["keypoints"]) for p in predictions] == [3, 3]
    assert (tmp_path / "run/predictions.png").exists()

    evaluate.main(command_line("--score", tmp_path / "run/predictions.json",
                               "--annotations", tmp_path / "val.json", "--report", tmp_path / "again.json",
                               "--images", tmp_path / "photos"))
    assert read_json(tmp_path / "again.json")["mPCK"] == report["mPCK"]
    evaluate.main(command_line(tmp_path / "run/ckpt.pt", "--annotations", tmp_path / "own.json",
                               "--constrained", "--workers", 0, "--protocol", "pairs",
                               "--out", tmp_path / "six"))
    assert read_results(tmp_path / "six")[0]["objects"] == 6


def test_without_descriptions_they_are_made_of_the_names_and_a_line_warns(tiny, tmp_path, capsys):
    write_json(tmp_path / "own.json", teapots(tmp_path))
    train.main(to_train(tiny, tmp_path))
    [line] = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "--descriptions" in line and "Table 3" in line
    checkpoint = read_checkpoint(tmp_path / "run")
    assert parse_descriptions(checkpoint["descriptions"], "")[-7].keypoints == [
        (name, f"the {name} of the tea pot") for name in ("spout", "lid knob", "Handle")]
    resumed = train.parse_arguments(["--resume", str(tmp_path / "run/ckpt.pt")])
    del checkpoint["args"]["data_digest"]  # is made when the data are read
    assert vars(resumed) == checkpoint["args"] | {"resume": resumed.resume}

    assert "say with --annotations what to evaluate" in refused(evaluate, [tmp_path / "run/ckpt.pt"])
    write_json(tmp_path / "jug.json", teapots(tmp_path, name="jug"))
    jugs = [tmp_path / "run/ckpt.pt", "--annotations", tmp_path / "jug.json"]
    assert "category jug is not in the descriptions" in refused(evaluate, jugs)


@pytest.mark.parametrize("wrong, says", [
    (["--split", 2], "leave them out with --annotations"), (["--data", "x"], "leave them out"),
    (["--images", ""], "go together"), (["--descriptions", "nowhere.json"], "nowhere.json: no such file"),
    (["--val", "nowhere.json"], "nowhere.json: no such file"),
    (["--images", "nowhere"], "nowhere: photos of 6 objects are missing or unreadable (tea pot 6)"),
])
def test_wrong_arguments_of_a_training_are_one_line(tiny, tmp_path, wrong, says):
    write_json(tmp_path / "own.json", teapots(tmp_path))
    assert says in refused(train, to_train(tiny, tmp_path, *wrong))


def test_wrong_arguments_of_an_evaluation_are_one_line(tiny, tmp_path):
    trained = train_briefly(tiny, tmp_path) / "ckpt.pt"
    write_json(tmp_path / "own.json", teapots(tmp_path))
    own = [trained, "--annotations", tmp_path / "own.json"]
    assert "where are its photos?" in refused(evaluate, own)
    for more in (["--split", 1], ["--subset", "val"], ["--data", "x"]):
        assert "leave them out with --annotations" in refused(evaluate, [*own, *more])
    assert "--images goes with --annotations" in refused(evaluate, [trained, "--images", "x"])
    assert "--val" in refused(train, ["--val", "x.json"])
    assert train.parse_arguments(["--annotations", "a/mice.json", "--images", "x"]).out == "runs/mice"


# ------------------------------------------------------------------------------------------------ annotations


def test_what_the_file_lacks_is_made_of_the_points_and_photos(tmp_path):
    contents = teapots(tmp_path, 3)
    contents["annotations"][1]["keypoints"] = [0] * 6 + [50, 40, 2]  # a single point
    contents["annotations"][2] |= {"bbox": [0, 0, 0, 0], "area": 0, "num_keypoints": 3}  # as COCO Annotator's
    (one, two, three), _ = read(tmp_path, contents)
    assert one.photo == "shelf/0.jpg" and one.category_id == -7
    assert one.keypoints.tolist() == [[20, 30], [36, 22], [50, 40]] and one.visible.all()
    # 30 x 18 pixels and an eighth of 30 on each side; as everywhere, the box ends at its last pixel
    assert one.box == pytest.approx((16.25, 18.25, 36.5, 24.5))
    assert crop_of(two).from_photo(np.array([50, 40])) == pytest.approx([0.5, 0.5], abs=0.1)
    assert two.box[2:] == (6, 6)  # a tenth of the photo's shorter side
    assert three.box == pytest.approx((16.25, 18.25, 36.5, 26.5))


def test_a_file_that_says_everything_is_taken_at_its_word(tmp_path):
    contents = teapots(tmp_path, 2)
    for photo, annotation in zip(contents["images"], contents["annotations"]):
        photo |= {"width": 60, "height": 50}
        annotation |= {"bbox": [10, 5, 80, 30], "area": 5.0, "iscrowd": annotation["id"]}
    heard = []
    [one], _ = read(tmp_path, contents, heard=heard)  # the other is a crowd
    assert one.box == (10, 5, 49, 29)  # cut at the edge, as MP-100's
    assert heard == [f"{tmp_path}/own.json: 1 of 2 annotations left out: without labelled keypoints, of a "
                     "crowd, or with a box outside the photo"]


def test_what_has_no_keypoints_is_left_out_and_counted(tmp_path):
    contents, heard = teapots(tmp_path), []
    contents["categories"].append({"id": 0, "name": "shelf"})
    contents["annotations"][0] |= {"category_id": 0, "keypoints": []}
    del contents["annotations"][1]["keypoints"]
    contents["annotations"][2]["keypoints"] = [30, 30, 0] * 3
    instances, descriptions = read(tmp_path, contents, heard=heard)
    assert [instance.annotation_id for instance in instances] == [3, 4, 5]
    assert len(heard) == 1 and "3 of 6 annotations left out" in heard[0]
    assert [*descriptions["categories"]] == ["-7"]


def test_a_skeleton_may_count_from_0(tmp_path):
    contents = teapots(tmp_path, 1)
    contents["categories"][0]["skeleton"] = [[0, 1], [2, 1]]
    assert read(tmp_path, contents)[1]["skeletons"] == {"tea pot": [[0, 1], [2, 1]]}


def test_photos_that_viewers_turn_are_counted(tmp_path):
    contents, heard, turned = teapots(tmp_path), [], Image.Exif()
    for i, (orientation, suffix) in enumerate([(1, "jpg"), (6, "jpg"), (3, "png"), (8, "webp")]):
        turned[0x0112] = orientation
        contents["images"][i]["file_name"] = name = f"shelf/{i}.{suffix}"
        Image.new("RGB", (90, 70)).save(tmp_path / "photos" / name, exif=turned)
    instances, _ = read(tmp_path, contents, heard=heard)
    assert len(instances) == 6
    [line] = heard
    assert line.startswith("warning: 3 photos have an EXIF orientation, e.g. shelf/1.jpg")


def test_a_path_of_windows_is_one_of_ours(tmp_path):
    contents = teapots(tmp_path, 1)
    contents["images"][0]["file_name"] = "shelf\\0.jpg"
    [one], _ = read(tmp_path, contents)
    assert one.photo == "shelf/0.jpg" and one.box[2] == pytest.approx(36.5)  # so it was found


def test_folders_of_the_annotation_tool_that_are_not_here_are_left_out_of_a_photos_name(tmp_path):
    """As Label Studio writes names: below images/, with the path on its server, or out of its own folder."""
    contents = teapots(tmp_path, 3)
    before = ["images/", "/data/upload/7/", "..\\..\\media\\upload\\"]
    for photo, folders in zip(contents["images"], before):
        photo["file_name"] = folders + photo["file_name"]
    instances, _ = read(tmp_path, contents)
    assert [instance.photo for instance in instances] == ["shelf/0.jpg", "shelf/1.jpg", "shelf/2.jpg"]
    contents = teapots(tmp_path, 2)
    contents["images"][1]["file_name"] = "other/shelf/0.jpg"
    with pytest.raises(InputError, match="shelf/0.jpg and other/shelf/0.jpg would both be"):
        read(tmp_path, contents)


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
    r"has no list of annotations": [change("annotations", to=...)],
    r"has no list of categories": [change("categories", to="x")],
    r"images\[0\] has no file_name": [
        change("images", 0, "file_name", to=value) for value in (..., "", 3, None)],
    r"images\[1\] has no id": [change("images", 1, to=value) for value in (None, 4, [], {})],
    "two images have the id p0": [change("images", 1, "id", to="p0")],
    "two annotations have the id 0": [change("annotations", 1, "id", to=0)],
    r"categories\[0\] has no id": [change("categories", 0, "id", to=value) for value in (True, "1", ...)],
    r"categories\[0\] has no name": [change("categories", 0, "name", to=[])],
    "categories: 2 are called teapot": [
        lambda contents: contents["categories"].append({"id": 3, "name": "Teapot"})],
    "keypoints are not a list of names": [
        names(value) for value in ("abc", 3, ["a", "b", 1], ["a", "", "b"])],
    "keypoints: 2 are called lidknob": [names(["lid_knob", "spout", "Lid Knob"])],
    "annotation 0 has keypoints, but its category tea pot does not name them": [names([]), names(...)],
    "annotation 0 has 9 numbers for 4 keypoints": [names(["a", "b", "c", "d"])],
    "annotation 1 has 8 numbers for 3": [change("annotations", 1, "keypoints", 8, to=...)],
    "annotation 0: keypoints is not a list of numbers": [
        change("annotations", 0, "keypoints", to=value) for value in (
            "x", {"a": 1}, [None] * 9, ["1"] * 9, [[1, 2, 3]] * 9, [float("nan")] * 9, [10**400] * 9)],
    "annotation 1: bbox is not a list of numbers": [change("annotations", 1, "bbox", to=[1, 2, None, 4])],
    "annotation 1: bbox is not x, y, width, height": [change("annotations", 1, "bbox", to=[1, 2, 3])],
    "annotation 2: categories has no id 3": [change("annotations", 2, "category_id", to=3)],
    "annotation 2: images has no id q": [change("annotations", 2, "image_id", to="q")],
    "skeleton is not a list of pairs of numbers from 1 to 3": [
        change("categories", 0, "skeleton", to=value) for value in (
            [[1, 4]], [[1]], [1], 5, [["a", "b"]], [[1, -1]], [{}])],
    "is not relative to the folder --images": [
        change("images", 0, "file_name", to=name) for name in (
            "/etc/1.png", "C:\\photos\\1.png", "\\\\server\\photos\\1.png", "\\1.png")],
    r"\.\./1\.png .*is not below": [change("images", 0, "file_name", to="../1.png")],
    "the width of shelf/0.jpg is not a number": [change("images", 0, "width", to="90")],
    "no annotation has a labelled keypoint": [change("annotations", to=[])],
}


@pytest.mark.parametrize("says, edit", [(says, edit) for says, edits in WRONG.items() for edit in edits])
def test_a_malformed_file_is_named_in_one_line(tmp_path, says, edit):
    contents = teapots(tmp_path)
    edit(contents)
    with pytest.raises(InputError, match=rf"^[^\n]*own\.json: [^\n]*{says}[^\n]*$"):
        read(tmp_path, contents)


def places(value, *above):
    """The path to every value in JSON, as change() takes it."""
    inner = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    return [above, *(place for key, below in inner for place in places(below, *above, key))][not above:]


def test_whatever_is_wrong_with_a_value_is_one_line_or_does_not_matter(tmp_path):
    whole = teapots(tmp_path, 2)
    whole["images"][0] |= {"width": 90, "height": 70}
    whole["annotations"][0] |= {"bbox": [9, 9, 50, 40], "iscrowd": 0}
    outcomes = []
    for place in places(whole):
        for wrong in (..., None, [], {}, "x", -1, 0, True, 10**400, float("nan"), [[]]):
            contents = copy.deepcopy(whole)
            change(*place, to=wrong)(contents)
            try:
                instances, descriptions = read(tmp_path, contents)
                parse_descriptions(descriptions, "")
                assert all(np.isfinite([*o.box, *o.keypoints.flat]).all() for o in instances)
                outcomes.append(True)
            except InputError as e:
                assert len(str(e).splitlines()) == 1
                outcomes.append(False)
    assert 0.1 < np.mean(outcomes) < 0.4  # most of it matters


# ----------------------------------------------------------------------------------------------- descriptions


@pytest.mark.parametrize("texts", [TEXTS, {"jug": {"spout": "its lip"}, "tea_pot": TEXTS}, FULL], ids=len)
def test_descriptions_are_found_by_name(tmp_path, texts):
    write_json(tmp_path / "texts.json", texts)
    instances, descriptions = read(tmp_path, teapots(tmp_path), coco.read_texts(tmp_path / "texts.json"))
    assert parse_descriptions(descriptions, "")[-7].keypoints == [*TEXTS.items()]
    assert len(instances) == 6


@pytest.mark.parametrize("texts, says", [
    ({"spout": "a", "knob": "b"}, "lid knob, Handle of tea pot are not in its descriptions"),
    ({"tea pot": {**TEXTS, "handle": ""}}, "texts.json: handle is not described"),
    ({"spout": 3}, "spout is not described"), ({"tea pot": TEXTS, "spout": "a"}, "tea pot is not described"),
    ({"jug": TEXTS}, "category tea pot is not in the descriptions"),
    ({"keypoint_sets": {}}, "entry 'categories' is missing"), ([], "not a dict"),
])
def test_descriptions_that_do_not_fit_are_one_line(tiny, tmp_path, texts, says):
    write_json(tmp_path / "own.json", teapots(tmp_path))
    write_json(tmp_path / "texts.json", texts)
    line = refused(train, to_train(tiny, tmp_path, "--descriptions", tmp_path / "texts.json"))
    assert says in line


def test_descriptions_given_later_replace_those_of_the_checkpoint():
    trained = [("cup", {"rim": "1"}), ("pot", {"lid": "2"})]
    assert coco.replace_texts(trained, [("Pot", {"lid": "3"})]) == [("Pot", {"lid": "3"}), trained[0]]
    assert coco.replace_texts(trained, [(None, {"lid": "3"})]) == [(None, {"lid": "3"})]
    assert coco.replace_texts(trained, []) == trained


def test_cocos_persons_get_the_descriptions_of_persons_whatever_their_id(shared, tmp_path):
    """By their names: id 2, which the persons have here, is the horse's in descriptions.json."""
    contents = read_json(shared / "mini_mp100/annotations/mp100_split1_train.json")
    contents["categories"] = [c | {"id": 2} for c in contents["categories"] if c["name"] == "person"]
    contents["annotations"] = [o | {"category_id": 2} for o in contents["annotations"]
                               if o["category_id"] == 72]
    write_json(tmp_path / "own.json", contents)
    texts = coco.list_texts(described := read_descriptions(ROOT / "descriptions.json"))
    instances, found = read_coco(tmp_path / "own.json", shared / "mini_mp100/images", texts)
    assert parse_descriptions(found, "")[2].keypoints == described[72].keypoints
    assert len(instances) == 8
    assert len(parse_descriptions(found, "")[2].skeleton) == 19


# ------------------------------------------------------------------------------------------------- DeepLabCut

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


@pytest.fixture
def frames(tmp_path):
    """A project's three frames, of 64 x 48 pixels."""
    folder = tmp_path / "labeled-data/v"
    folder.mkdir(parents=True)
    for n in 1, 2, 3:
        Image.new("RGB", (64, 48)).save(folder / f"img{n}.png")
    return tmp_path


def to_convert(frames, text, images=""):
    (frames / "Collected.csv").write_text(text)
    return command_line(frames / "Collected.csv", "--images", frames / images, "--category", "mouse",
                        "--out", frames / "mice.json")


@pytest.mark.parametrize("text", [ONE, "\ufeff" + ONE.replace("\n", "\r\n"), THREE_COLUMNS])
@pytest.mark.parametrize("images", ["", "labeled-data", "labeled-data/v"])
def test_deeplabcuts_labels_become_a_coco_file(frames, text, images, capsys):
    coco.main(to_convert(frames, text, images))
    assert "3 photos, 2 annotations of snout, tail" in capsys.readouterr().out
    instances, descriptions = read_coco(frames / "mice.json", frames / images)
    first = "labeled-data/v/img1.png".removeprefix(images).strip("/")
    assert [o.photo for o in instances] == [first, first.replace("1", "3")]
    assert [o.keypoints.tolist() for o in instances] == [[[10.5, 20], [30, 40]], [[0, 0], [0, 41.25]]]
    assert [o.visible.tolist() for o in instances] == [[True, True], [False, True]]
    assert descriptions["categories"] == {"1": {"name": "mouse", "keypoint_set": "mouse"}}


def test_of_several_animals_each_is_an_annotation(frames):
    coco.main(to_convert(frames, TWO_ANIMALS))
    contents = read_json(frames / "mice.json")
    assert [(o["image_id"], o["keypoints"]) for o in contents["annotations"]] == [
        (1, [1, 2, 2]), (1, [3, 4, 2]), (2, [7, 8, 2])]
    assert [category["keypoints"] for category in contents["categories"]] == [["snout"]]
    assert len(contents["images"]) == 3


@pytest.mark.parametrize("text, says", [
    ("", "not a CSV of DeepLabCut's labels"), ("{}", "not a CSV"), ("a,b\n1,2\n", "not a CSV"),
    (ONE.replace("10.5", "ten"), "not a CSV .*ten"), (ONE.replace("coords,x,y", "coords,y,x"), "not a CSV"),
    (ONE.replace("x,y\n", "x,likelihood\n"), "columns other than x and y"),
    (ONE.replace("img3", "img4"), "the photo labeled-data/v/img4.png is not in --images"),
    (TWO_ANIMALS.replace("snout,snout,door", "tail,tail,door"), "body parts"),
    ("\n".join(ONE.split("\n")[:3]), "no labels"),
])
def test_what_is_not_deeplabcuts_is_one_line(frames, text, says):
    assert re.search(says, refused(coco, to_convert(frames, text)))


def test_a_csv_that_is_not_there_is_one_line(frames):
    wrong = ["nowhere.csv", "--images", frames, "--category", "mouse", "--out", frames / "mice.json"]
    assert "nowhere.csv: " in refused(coco, wrong)


# ----------------------------------------------------------------------------------- starting from a training


def test_init_takes_all_that_trains_here_too_and_says_so(tiny, tmp_path, capsys):
    first = train_briefly(tiny, tmp_path / "first")
    trained, own = read_checkpoint(first)["model"], tmp_path / "own"
    write_json(own / "own.json", teapots(own))

    def start(*more):
        arguments = to_train(tiny, own, *more)
        capsys.readouterr()
        model = train.load_model(train.parse_arguments(arguments), "cpu")
        return model.state_dict(), capsys.readouterr().out

    fresh, said = start()
    assert said == ""
    everything, said = start("--init", first / "ckpt.pt")
    assert all(torch.equal(everything[name], fresh[name]) == (name not in trained) for name in fresh)
    assert all(torch.equal(everything[name], trained[name]) for name in trained)
    assert said.count("\n") == 1 and f"{len(trained)} tensors taken (" in said
    assert "not taken" not in said and "start anew" not in said

    alone, said = start("--init-projection", first / "ckpt.pt")
    for name, value in alone.items():
        assert torch.equal(value, (trained if name.startswith("projection") else fresh)[name])
    assert f"2 tensors taken (projection.weight, ...), {len(trained) - 2} tensors not taken (" in said

    n_vit = sum(name.startswith("vit") for name in trained)
    frozen, said = start("--init", first / "ckpt.pt", "--tune-vit", "frozen")
    assert f"{len(trained) - n_vit} tensors taken" in said and f"{n_vit} tensors not taken (vit." in said
    assert all(torch.equal(frozen[name], trained[name]) for name in trained if not name.startswith("vit"))
    _, said = start("--init", first / "ckpt.pt", "--tune-vit", "full")
    assert "start anew (vit." in said

    checkpoint = read_checkpoint(first)
    name = next(name for name in trained if name.endswith("lora_A"))
    checkpoint["model"][name] = checkpoint["model"][name][:4]  # of half the rank
    torch.save(checkpoint, tmp_path / "other.pt")
    thin, said = start("--init", tmp_path / "other.pt")
    assert torch.equal(thin[name], fresh[name])
    assert f"1 tensors not taken ({name}), 1 tensors start anew ({name})" in said

    both = to_train(tiny, own, "--init", first / "ckpt.pt", "--init-projection", first / "ckpt.pt")
    assert "give only one of them" in refused(train, both)


@pytest.mark.parametrize("option", ["--init", "--init-projection"])
@pytest.mark.parametrize("weights, says", [
    ({}, "lacks 2 trained tensors"),
    ({"projection.weight": torch.zeros(9, 9), "projection.bias": torch.zeros(9)}, r"weight is \(9, 9\)"),
])
def test_weights_of_other_networks_are_refused(tiny, tmp_path, option, weights, says):
    write_json(tmp_path / "own.json", teapots(tmp_path))
    torch.save({"args": {}, "descriptions": {}, "model": weights, "optimizer": {}, "step": 1},
               tmp_path / "wide.pt")
    line = refused(train, to_train(tiny, tmp_path, option, tmp_path / "wide.pt"))
    assert re.search(rf"wide\.pt: .*{says}", line)
