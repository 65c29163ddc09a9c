"""The texts and splits of the real photographs, held against the data where they are at hand.

The reader and the judge of claims are those of test_descriptions.py. Here they judge "above", "below" and
"between"; whose left is meant is judged from where the two sides are in the pictures.
"""

import json
import re

import numpy as np
import pytest
from conftest import ROOT
from test_descriptions import holds, read_claims

from chat import Chat
from realworld.data import mirror, other_side, read_categories, read_folder, swap_sides
from realworld.lessons import QUESTION, make_tokenizer

HERE = ROOT / "realworld"
TEXTS = json.loads((HERE / "descriptions.json").read_text())
SPLITS = json.loads((HERE / "splits.json").read_text())
SETS = TEXTS["keypoint_sets"]
SET_OF = {category["name"]: category["keypoint_set"] for category in TEXTS["categories"].values()}
ASKED = [name for split in ("train", "val", "test") for name in SPLITS[split]]


@pytest.fixture(scope="module")
def data(shared):
    """-> {category: (its id, names of its keypoints, points (n, K, 3))}."""
    found = {}
    for folder in "keypoint_photos", "real_photos":
        contents = read_folder(shared / folder)
        points = {}
        for annotation in contents["annotations"]:
            points.setdefault(annotation["category_id"], []).append(annotation["keypoints"])
        for category in contents["categories"]:
            number, names = category["id"], category["keypoints"]
            found[category["name"]] = number, names, np.reshape(points[number], (-1, len(names), 3))
    return found


def names_of(set_name):
    return [keypoint["name"] for keypoint in SETS[set_name]]


def test_no_test_category_is_trained():
    assert len(ASKED) == len({*ASKED, *SPLITS["left_out"]}) - len(SPLITS["left_out"])
    species = {re.sub(r"^cub_\d+_|_body$", "", name) for name in SPLITS["train"]}
    assert not species & {re.sub(r"^cub_\d+_|_body$", "", name) for name in SPLITS["test"] + SPLITS["val"]}
    trained = {SET_OF[name] for name in SPLITS["train"]}
    assert {SET_OF[name] for name in SPLITS["test"]} - trained == {"rat", "butterfly", "car_wheel"}


def test_texts_fit_the_data(data):
    assert sorted([*ASKED, *SPLITS["left_out"]]) == sorted(data)
    for name in ASKED:
        number, theirs, _ = data[name]
        ours = names_of(SET_OF[name])
        assert TEXTS["categories"][str(number)]["name"] == name
        assert len(ours) == len(theirs), name
        for our, their in zip(ours, theirs):  # other words now and then, but never another side
            sides_of = re.compile("left|right(?! angle)").findall
            assert sides_of(our) == sides_of(their), (name, their)


def test_sides_are_where_the_texts_say(data):
    """The picture's left is left in the picture. A face's own left is right, whoever looks at it."""
    for name in ASKED:
        names, points = names_of(SET_OF[name]), data[name][2]
        for k, other in enumerate(swap_sides(names)):
            text = SETS[SET_OF[name]][k]["description"]
            judged = "picture's" in text or SET_OF[name].startswith("face_")
            if judged and "left" in names[k] and other != k:
                seen = (points[:, [k, other], 2] > 0).all(1)
                if seen.any():
                    as_in_picture = np.mean(points[seen, k, 0] < points[seen, other, 0])
                    assert as_in_picture > 0.95 if "picture's" in text else as_in_picture < 0.05, (name, text)


def test_claims_are_true(data):
    """Of a set's claims 85 % of all cases hold, and each one in more than half of its cases.

    Of the athletes many stand on their heads.
    """
    wrong = []
    for set_name, keypoints in SETS.items():
        names, cases = names_of(set_name), []
        for k, keypoint in enumerate(keypoints):
            for claim in read_claims(keypoint["description"], names, k)[0]:
                truth = []
                for points in (data[name][2] for name in ASKED if SET_OF[name] == set_name):
                    points = points[(points[:, [k, *claim.others], 2] > 0).all(1), :, :2]
                    truth += holds(claim, points, np.zeros(2)).tolist()
                cases += truth
                if truth and np.mean(truth) < 0.5:
                    wrong.append(f"{set_name}, {names[k]}, {claim.kind} {[names[n] for n in claim.others]}: "
                                 f"{np.mean(truth):.0%}")
        if cases and np.mean(cases) < (0.65 if set_name == "person_14" else 0.85):
            wrong.append(f"{set_name}: {np.mean(cases):.1%} of {len(cases)}")
    assert not wrong, "\n".join(wrong)


def test_mirroring():
    assert other_side("left eye of the right one") == "right eye of the left one"
    assert swap_sides(["nose", "left eye", "right eye", "right angle"]) == [0, 2, 1, 3]
    image = {"id": 1, "file_name": "a.jpg", "width": 100, "height": 50}
    annotation = {"id": 5, "image_id": 1, "bbox": [10, 5, 30, 20],
                  "keypoints": [12, 6, 2, 39, 20, 2, 0, 0, 0]}
    there, points = mirror(image, annotation, ["left eye", "right eye", "nose"])
    assert list(points["keypoints"]) == [60, 20, 2, 87, 6, 2, 0, 0, 0]  # left eye, right eye, nose
    assert points["bbox"] == [60, 5, 30, 20] and points["image_id"] == there["id"] != 1


def categories_of(split):
    return [category for category in read_categories().values() if category.name in SPLITS[split]]


def test_questions_are_those_of_the_programs(tmp_path):
    """The words of training are tokens of their own, and answers are six digits."""
    tokenizer = make_tokenizer(categories_of("train"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    chat = Chat(tmp_path)
    assert len(chat.coordinates.digits) == 10 and len(chat.coordinates.known) == 6
    for category in categories_of("train"):
        asked = [tokenizer.encode("\n" + QUESTION.format(*keypoint)).ids for keypoint in category.keypoints]
        assert chat.encode_questions(category) == asked
        assert not any(0 in question for question in asked), category.name  # 0 is <unk>
    assert tokenizer.encode(" a wing, a bill.\nAssistant:").tokens == [
        "<unk>", " wing", "<unk>", " bill", "\nAssistant:"]
