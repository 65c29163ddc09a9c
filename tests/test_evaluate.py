"""evaluate.py: the metric against the published code and by hand; checkpoints evaluated end to end; bad input; the picture."""

import gzip
import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_train import PROGRAM, draw_mp100, refused

import evaluate
import predict
import train
from chat import INSTRUCTIONS, Chat
from data import Category, Crop, Object, read_descriptions, read_objects
from model import CapeLLM
from predict import draw_object, palette

PCK = ["PCK@0.05", "PCK@0.1", "PCK@0.15", "PCK@0.2", "PCK@0.25"]


@pytest.fixture(scope="module")
def published(shared, tmp_path_factory):
    """(a folder with the annotations and predictions of split 1's test, what the published code says of them)."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "annotations").mkdir()
    for source, target in (("mp100/annotations/mp100_split1_test.json.gz", "annotations/mp100_split1_test.json"),
                           ("parity/pck_split1_predictions.json.gz", "predictions.json")):
        (folder / target).write_bytes(gzip.decompress((shared / source).read_bytes()))
    return folder, json.loads((shared / "parity" / "pck_split1_expected.json").read_text())


def test_both_protocols_equal_the_published_code(published):
    folder, expected = published
    started = [subprocess.Popen([sys.executable, "evaluate.py", "--score", folder / "predictions.json", "--data", folder, "--split", "1",
                                 "--protocol", protocol, "--report", folder / "new" / f"{protocol}.json"],
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **PROGRAM) for protocol in ("query", "pairs")]
    said = [p.communicate()[0] for p in started]
    assert [p.returncode for p in started] == [0, 0], said
    for protocol, block, text in zip(("query", "pairs"), (expected, expected["pairs"]), said):
        report = json.loads((folder / "new" / f"{protocol}.json").read_text())
        assert {k: report[k] for k in block["metrics"]} == pytest.approx(block["metrics"], abs=1e-9, rel=0)
        assert (report["objects"], report["protocol"], report["split"]) == (2000, protocol, 1)
        percent = [f"{100 * block['metrics'][k]:.2f}" for k in (*PCK, "mPCK")]
        assert re.search(r"2000 objects +" + " +".join(percent), text)
        if protocol == "query":
            found = {name.split()[0]: row["PCK@0.2"] for name, row in report["per category"].items()}
            assert found == pytest.approx(expected["PCK@0.2 per category"], abs=1e-9, rel=0)
            assert report["mPCK"] == pytest.approx(np.mean([report[k] for k in PCK]))


def test_pairs_are_those_of_earlier_work(published):
    folder, expected = published
    path = folder / "annotations" / "mp100_split1_test.json"
    objects = read_objects(path, read_descriptions(ROOT / "descriptions.json"))
    order = [c["id"] for c in json.loads(path.read_text())["categories"]]
    _, pairs = evaluate.pck_of_pairs(objects, [[None] * len(o.keypoints) for o in objects], order)
    assert len(pairs) == expected["pairs"]["count"]
    for ours, theirs in (pairs[:3], expected["pairs"]["first"]), (pairs[-3:], expected["pairs"]["last"]):
        assert [[objects[s].id, objects[q].id] for s, q in ours] == theirs


def an_object(keypoints, visible, box=(10, 0, 100, 40), category=1, id=0):
    return Object(id, category, "", box, np.array(keypoints, dtype=float), np.array(visible, dtype=bool))


def test_pck_by_hand():
    """The box's longer side is 100: thresholds of 5, 10, ... pixels."""
    four = an_object([(20, 30)] * 4, [1, 1, 1, 0])
    told = [(20, 35), (26, 38), None, (20, 30)]  # 5 away, 10 away, a miss, an invisible one; nearer than, not as near as
    assert evaluate.pck_of_queries([four], [told]).tolist() == [[0, 1 / 3, 2 / 3, 2 / 3, 2 / 3]]
    assert evaluate.hits(four, [(20, 34.999), None, None, None])[:, 0].all()
    tall = an_object([(20, 30)], [1], box=(10, 0, 40, 200))
    one = evaluate.pck_of_queries([four, tall], [told, [(20, 59)]])
    assert one[1].tolist() == [0, 0, 1, 1, 1]  # 29 away: not within 20, but 30
    assert one.mean(0).tolist() == pytest.approx([0, 1 / 6, 5 / 6, 5 / 6, 5 / 6])  # each object counts once, not each keypoint
    nothing, origin = an_object([(20, 30)], [0]), an_object([(0, 0)], [1])
    assert not evaluate.pck_of_queries([nothing, origin], [[(20, 30)], [None]]).any()


def test_boxes_are_clipped_and_points_hidden_but_labelled_count(tmp_path):
    annotation = {"id": 7, "image_id": 1, "category_id": 1, "bbox": [-50, 10, 151, 41], "area": 1,
                  "keypoints": [20, 30, 1, 20, 30, 2, 20, 30, 0]}
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "a", "width": 81, "height": 60}], "annotations": [annotation]}))
    [o] = read_objects(path, {1: Category("thing", [("point", "")] * 3)})
    assert o.box == (0, 10, 80, 40)  # from pixel 0 to pixel 80, the last
    miss_by_4 = evaluate.pck_of_queries([o], [[(24, 30), (24, 30), None]])
    assert miss_by_4.tolist() == [[0, 1, 1, 1, 1]]  # 0.05 x 80 is 4, and 4 is not below


def test_pairs_count_what_support_and_query_share():
    a, b, c = an_object([(20, 30)] * 3, [1, 1, 0]), an_object([(20, 30)] * 3, [0, 1, 1]), an_object([(20, 30)] * 3, [0, 0, 1])
    right, wrong = (20, 30), None
    shares, pairs = evaluate.pck_of_pairs([a, b, c], [[right, wrong, right], [wrong, right, wrong], [right, right, right]], [1, 2])
    by_hand = {(0, 1): 1, (1, 0): 0, (0, 2): 0, (2, 0): 0, (1, 2): 1, (2, 1): 0}  # a and c have no point in common
    assert len(pairs) == 400 and set(pairs) == by_hand.keys()
    assert all((share == by_hand[pair]).all() for share, pair in zip(shares, pairs))


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    """A folder with ckpt.pt, barely trained, and data/, with 6 objects: 3 wagons of 5 points, 3 kites of 3."""
    folder = tmp_path_factory.mktemp("run")
    data = draw_mp100(folder / "data")
    train.main(list(map(str, ["--data", data, "--descriptions", data / "descriptions.json", "--llm", tiny / "llm", "--vit", tiny / "vit",
                              "--out", folder, "--image-size", 56, "--epochs", 1, "--batch", 4, "--workers", 0])))
    return folder


@pytest.fixture
def evaluated(checkpoint, tmp_path):
    """evaluated(...) evaluates with these arguments: (report, predictions)."""
    def make(*more):
        evaluate.main([str(checkpoint / "ckpt.pt"), "--workers", "0", "--out", str(tmp_path / "out"), *map(str, more)])
        return [json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("report", "predictions")]
    return make


def test_report_predictions_and_picture_of_a_model_whose_answers_are_half_right(evaluated, checkpoint, tmp_path, capsys):
    """The annotations are moved to where the model points, every other one 100 pixels beside; object 102 has one of these hidden."""
    _, predictions = evaluated("--constrained")
    assert [(p["annotation_id"], len(p["keypoints"]), len(p["confidence"])) for p in predictions] == [
        (100 + i, n, n) for i, n in enumerate([5, 3] * 3)]
    for x, y in sum((p["keypoints"] for p in predictions), []):  # the crop is 10 ... 65 x 15 ... 64, made square
        assert 10 <= x < 65 and 12 <= y < 67
    data = shutil.copytree(checkpoint / "data", tmp_path / "data")
    truth = json.loads((path := data / "annotations" / "mp100_split1_test.json").read_text())
    for annotation, told in zip(truth["annotations"], predictions):
        for k, (x, y) in enumerate(told["keypoints"]):
            annotation["keypoints"][3 * k:3 * k + 2] = [x + 100 * (k % 2), y]
    path.write_text(json.dumps(truth))
    for protocol in "pairs", "query":
        argv = ["--data", data, "--protocol", protocol]
        report, again = evaluated("--constrained", *argv)
        assert again == predictions and report["malformed"] == report["without photo"] == 0
        assert (report["objects"], report["split"], report["protocol"]) == (6, 1, protocol)
        assert report["per category"]["2 kite"]["mPCK"] == pytest.approx(2 / 3)
        evaluate.main(list(map(str, ["--score", tmp_path / "out" / "predictions.json", "--report", tmp_path / "scored.json",
                                     "--descriptions", data / "descriptions.json", *argv])))
        scored = json.loads((tmp_path / "scored.json").read_text())
        assert {**report, **scored} == report and scored.keys() == report.keys() - {"malformed", "without photo"}
    wagon, kite = (3 / 5 + 3 / 4 + 3 / 5) / 3, 2 / 3
    for row, expected in (report, (wagon + kite) / 2), (report["per category"]["1 wagon"], wagon), (report["per category"]["2 kite"], kite):
        assert [row[k] for k in (*PCK, "mPCK")] == pytest.approx([expected] * 6)
    assert re.search(r"1 wagon +65.00.*\n2 kite +66.67.*\n6 objects +65.83", capsys.readouterr().out)
    with Image.open(tmp_path / "out" / "predictions.png") as picture:
        assert picture.size == (16 + 3 * (360 + 190 + 16), 56 + 2 * 400) and len(picture.getcolors(10**6)) > 1000


def test_malformed_answers_are_misses_and_counted(evaluated, tmp_path):
    """A network says such that has hardly learned anything."""
    report, predictions = evaluated()
    assert report["malformed"] == sum(point is None for p in predictions for point in p["keypoints"]) > 0
    assert report["mPCK"] == 0 or report["malformed"] < 24
    Image.open(tmp_path / "out" / "predictions.png").close()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-600])


def test_two_processes_give_the_report_and_predictions_of_one(evaluated, checkpoint, tmp_path):
    """With more than one batch a process, unequal shares, and a truncated photo."""
    data = shutil.copytree(checkpoint / "data", tmp_path / "data")
    truncate(data / "images" / "kite" / "3.jpg")
    options = ["--constrained", "--batch", "2", "--allow-missing", "--data", str(data)]
    one = evaluated(*options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "evaluate.py"]
    done = subprocess.run([*command, checkpoint / "ckpt.pt", "--workers", "0", "--out", tmp_path / "two", *options],
                          capture_output=True, **PROGRAM)
    assert done.returncode == 0, done.stderr
    two = [json.loads((tmp_path / "two" / f"{name}.json").read_text()) for name in ("report", "predictions")]
    assert two == one and two[0]["without photo"] == 1 and done.stdout.count("\n5 objects") == 1


def test_missing_and_truncated_photos_are_listed_or_left_out(evaluated, checkpoint, tmp_path):
    data = shutil.copytree(checkpoint / "data", tmp_path / "data")
    truncate(data / "images" / "kite" / "3.jpg")
    argv = [checkpoint / "ckpt.pt", "--data", data, "--out", tmp_path / "out", "--workers", "0"]
    line = refused(evaluate, argv)
    assert all(word in line for word in ("1 objects", "(kite 1)", "kite/3.jpg", "--allow-missing"))
    for name in "wagon/0", "wagon/2", "kite/1":
        (data / "images" / f"{name}.jpg").unlink()
    line = refused(evaluate, argv)
    assert all(word in line for word in ("3 objects", "wagon 2", "kite 1", "--allow-missing"))
    assert not (tmp_path / "out").exists()
    report, predictions = evaluated("--data", data, "--allow-missing")
    assert (report["without photo"], report["objects"], [p["annotation_id"] for p in predictions]) == (4, 2, [104, 105])
    (data / "images" / "wagon" / "4.jpg").unlink()
    assert "no pairs" in refused(evaluate, [*argv, "--allow-missing", "--protocol", "pairs"])  # a kite is left
    shutil.rmtree(data / "images")
    assert "none of the photos" in refused(evaluate, [*argv, "--allow-missing"])


def test_backbones_may_have_moved_since(evaluated, checkpoint, tiny, tmp_path):
    _, expected = evaluated("--constrained")
    moved = shutil.copytree(tiny, tmp_path / "moved")
    contents = torch.load(checkpoint / "ckpt.pt", weights_only=True)
    contents["args"] |= {"llm": str(tmp_path / "gone" / "llm"), "vit": str(tmp_path / "gone" / "vit")}
    torch.save(contents, tmp_path / "ckpt.pt")
    argv = [str(tmp_path / "ckpt.pt"), "--constrained", "--workers", "0"]
    assert "gone" in refused(evaluate, argv)
    evaluate.main([*argv, "--llm", str(moved / "llm"), "--vit", str(moved / "vit")])
    assert json.loads((tmp_path / "predictions.json").read_text()) == expected


def test_other_descriptions_replace_those_of_their_categories(evaluated, tmp_path, monkeypatch):
    asked = []

    def questions(chat, category, cumulative, ask=Chat.questions):
        asked.extend(category.keypoints)
        return ask(chat, category, cumulative)
    monkeypatch.setattr(Chat, "questions", questions)
    overlay = tmp_path / "kites.json"
    overlay.write_text(json.dumps({"keypoint_sets": {"k": [{"name": n, "description": "over there"} for n in ("top", "end", "side")]},
                                   "categories": {"2": {"name": "kite", "keypoint_set": "k"}}}))
    evaluated("--descriptions", overlay)
    assert len(asked) == 24 and set(asked) == {
        ("top", "over there"), ("end", "over there"), ("side", "over there"),
        *((n, f"the {n} of a wagon") for n in ("front wheel", "rear wheel", "roof", "shaft", "lamp"))}


def test_descriptions_of_a_checkpoint_may_be_gone_if_others_are_given(checkpoint, tmp_path):
    contents = torch.load(checkpoint / "ckpt.pt", weights_only=True)
    texts, contents["args"]["descriptions"] = contents["args"]["descriptions"], str(tmp_path / "gone.json")
    torch.save(contents, tmp_path / "ckpt.pt")
    argv = [str(tmp_path / "ckpt.pt"), "--workers", "0"]
    assert "gone.json: no such file" in refused(evaluate, argv)
    evaluate.main([*argv, "--descriptions", texts])
    assert json.loads((tmp_path / "report.json").read_text())["objects"] == 6


def test_cumulative_asks_in_the_order_of_the_descriptions_and_says_so(evaluated, monkeypatch):
    held = []

    def locate(self, images, questions, chat, constrained, cumulative, locate=CapeLLM.locate):
        told = locate(self, images, questions, chat, constrained, cumulative)
        held.extend(([*map(tuple, asked)], cumulative) for asked in questions)
        return told
    monkeypatch.setattr(CapeLLM, "locate", locate)
    (apart, one), (together, two) = evaluated("--constrained"), evaluated("--constrained", "--cumulative")
    assert (together["cumulative"], "cumulative" in apart) == (True, False) and held[:6] == [(asked, False) for asked, _ in held[6:]]
    assert all(cumulative for _, cumulative in held[6:]) and sorted(len(asked) for asked, _ in held[6:]) == [3] * 3 + [5] * 3
    assert [p["keypoints"][0] for p in one] == [p["keypoints"][0] for p in two]  # nothing comes before the first
    assert [p["keypoints"][1:] for p in one] != [p["keypoints"][1:] for p in two]


def test_ways_of_asking_that_do_not_fit_are_one_clear_line(checkpoint, tiny, tmp_path, capsys):
    path, data = tmp_path / "ckpt.pt", checkpoint / "data"
    train.main(list(map(str, ["--data", data, "--descriptions", data / "descriptions.json", "--llm", tiny / "llm", "--vit", tiny / "vit",
                              "--out", tmp_path, "--image-size", 56, "--epochs", 1, "--batch", 8, "--workers", 0, "--answer", "token"])))
    for how in ["--decode", "median"], ["--constrained"]:
        assert all(word in refused(evaluate, [path, *how]) for word in (how[0], "does not spell places in digits"))
        assert "--score asks nothing" in refused(evaluate, ["--score", "p.json", *how])
    assert "--score asks nothing" in refused(evaluate, ["--score", "p.json", "--cumulative"])
    argv = [path, data / "images/kite/1.jpg", "--keypoints", "tip: the upper end", "--out", tmp_path / "kite.png"]
    assert "error: --decode median" in refused(predict, [*argv, "--decode", "median"])
    predict.main(list(map(str, argv)))
    assert re.search(r"\d+\.\d +\d+\.\d +unknown  tip\n", capsys.readouterr().out) and (tmp_path / "kite.png").exists()


@pytest.mark.parametrize("spoil, message", [
    (lambda p: {"predictions": p}, "not \\[{"),
    (lambda p: [p[0]["keypoints"], *p[1:]], "not \\[{"),
    (lambda p: [{**p[0], "keypoints": sum(p[0]["keypoints"], [])}, *p[1:]], "not \\[{"),
    (lambda p: [*p, p[2]], "annotation 102 is predicted twice"),
    (lambda p: [{**p[0], "keypoints": p[0]["keypoints"][:4]}, *p[1:]], "annotation 100 has 4 keypoints predicted, 5 annotated"),
    (lambda p: [{**p[0], "keypoints": [[1, float("nan")]] + p[0]["keypoints"][1:]}, *p[1:]], "annotation 100 .* not a number"),
    (lambda p: p[:-1], "no prediction for annotation 105"),
], ids=["dict", "no ids", "flat", "twice", "too few points", "NaN", "object missing"])
def test_bad_predictions_are_one_clear_line(checkpoint, tmp_path, spoil, message):
    data, path = checkpoint / "data", tmp_path / "predictions.json"
    good = [{"annotation_id": 100 + i, "keypoints": [[1.0, 2]] * n} for i, n in enumerate([5, 3] * 3)]
    argv = ["--score", path, "--data", data, "--descriptions", data / "descriptions.json"]
    path.write_text(json.dumps(spoil(good)))
    assert re.search(message, line := refused(evaluate, argv)) and str(path) in line


def test_predictions_may_be_null_of_other_splits_and_by_permission_absent(checkpoint, tmp_path):
    data, path = checkpoint / "data", tmp_path / "predictions.json"
    objects = read_objects(data / "annotations" / "mp100_split1_test.json", read_descriptions(data / "descriptions.json"))
    path.write_text(json.dumps([{"annotation_id": 101, "keypoints": [None, [1, 2], None]}, {"annotation_id": 9, "keypoints": []}]))
    assert evaluate.read_predictions(path, objects, allow_missing=True)[:2] == [[None] * 5, [None, (1, 2), None]]


@pytest.mark.parametrize("photo, more, message", [
    ("nowhere.jpg", [], "nowhere.jpg: not a readable photo"),
    *((content, [], "not a readable photo") for content in (b"GIF89a", b"P6 3 x 255 ", b"P6 90000 90000 255 ")),
    *((None, [f"--box={box}"], f"--box {box}: ") for box in (
        "1,2,3", "a,b,c,d", "0,0,0,9", "500,0,9,9", "nan,0,9,9", "0,0,inf,inf", "-inf,0,9,9")),
    (None, ["--keypoints", "eye"], '--keypoints "eye": neither'),
    (None, ["--keypoints", "eye:, nose: tip"], "lacks a name or a description"),
    (None, ["--out", "nowhere/a.png"], "nowhere/a.png: the picture cannot be written"), (None, ["--llm", "nowhere"], "nowhere/"),
])
def test_a_users_slips_in_predict_are_one_clear_line(checkpoint, tmp_path, photo, more, message):
    path = checkpoint / "data/images/kite/1.jpg" if photo is None else tmp_path / "photo" if isinstance(photo, bytes) else photo
    if isinstance(photo, bytes):
        path.write_bytes(photo)
    assert message in refused(predict, [checkpoint / "ckpt.pt", path, "--keypoints", "tip: the end", "--out", tmp_path / "a.png", *more])


def test_points_are_drawn_where_they_are_in_their_colours(tmp_path):
    Image.new("RGB", (200, 100), "gray").save(tmp_path / "photo.png")
    crop = Crop(150, 50, 100)  # the right half of the photo, so pixel (x, y) is (3.6 (x - 100), 3.6 y) on the tile
    tile = draw_object(tmp_path / "photo.png", crop, ["a", "b", "c"], [(120, 25), None, (150, 90)], [None, (180, 40), (190, 90)])
    a, b, c = palette(3)
    near = {"a's dot": ((72, 90), a), "b's ring": ((288 + 4, 144), b), "within b's ring": ((288, 144), (128, 128, 128)),
            "c's dot": ((180, 324), c), "c's ring": ((324 + 4, 324), c), "between": ((252, 324), c), "elsewhere": ((30, 200), (128,) * 3)}
    for what, (place, colour) in near.items():
        assert np.abs(np.array(tile.getpixel(place)) - colour).max() < 40, what
    assert tile.size == (360 + 190, 360) and tile.getpixel((540, 350)) == (255, 255, 255)


def test_68_names_fit_beside_the_photo(tmp_path):
    Image.new("RGB", (100, 100)).save(tmp_path / "photo.png")
    tile = np.array(draw_object(tmp_path / "photo.png", Crop(50, 50, 100), [f"point {k}" for k in range(68)], [(50, 50)] * 68))
    colours, legend = set(palette(68)), tile[:, 365:]
    assert len(colours) == 68 and colours <= set(map(tuple, legend.reshape(-1, 3).tolist()))  # a dot for each
    assert (legend[[0, -1]] == 255).all() and (legend[:, -1] == 255).all()  # no name is cut off


def test_what_opens_a_conversation_is_said_once_when_cumulative(tiny):
    chat, kite, asked = Chat(tiny / "llm", INSTRUCTIONS["outline"]), Category("kite", [("tip", "up"), ("tail", "down")]), []
    model = Namespace(projection=torch.nn.Linear(1, 1), locate=lambda images, questions, *_: asked.append(questions[0]) or [[]])
    for cumulative in False, True:
        predict.predict(model, chat, [Crop(1, 1, 1)], torch.zeros(1, 3, 4, 4, dtype=torch.uint8), [kite], cumulative=cumulative)
    assert asked == [chat.questions(kite), chat.questions(kite, cumulative=True)] and len(asked[0][1]) > len(asked[1][1])
