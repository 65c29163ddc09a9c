"""evaluate.py: the metric against the published code and by hand; checkpoints asked, with the same results
however the work is cut up; what is left out is counted, and what is wrong is one line.
"""

import gzip
import json
import random
import re
import shutil
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_chat, sentencepiece
from mp100 import CATEGORIES, make_mp100
from PIL import Image
from programs import SUBPROCESS, command_line, in_two_processes, read_results, refused, train_briefly

import decode
import evaluate
from chat import Chat
from common import InputError, Process, read_json
from data import Instance, parse_descriptions, read_instances
from decode import Prediction
from tools import run, score

PCK = ["PCK@0.05", "PCK@0.1", "PCK@0.15", "PCK@0.2", "PCK@0.25", "mPCK"]


# ---------------------------------------------------------------------------------------------------- metric


@pytest.fixture(scope="module")
def published(shared, tmp_path_factory):
    """(folder with annotations and predictions of split 1's test, what the published code says of them)."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "annotations").mkdir()
    files = {"mp100/annotations/mp100_split1_test.json.gz": "annotations/mp100_split1_test.json",
             "parity/pck_split1_predictions.json.gz": "predictions.json"}
    for source, target in files.items():
        (folder / target).write_bytes(gzip.decompress((shared / source).read_bytes()))
    return folder, json.loads((shared / "parity" / "pck_split1_expected.json").read_text())


@pytest.mark.parametrize("protocol", ["query", "pairs"])
def test_both_protocols_equal_the_published_code(published, protocol, capsys):
    folder, expected = published
    path = folder / "new" / f"{protocol}.json"
    evaluate.main(command_line("--score", folder / "predictions.json", "--data", folder, "--split", 1,
                               "--protocol", protocol, "--report", path))
    report = json.loads(path.read_text())
    metrics = expected["metrics"] if protocol == "query" else expected["pairs"]["metrics"]
    assert {key: report[key] for key in metrics} == pytest.approx(metrics, abs=1e-9, rel=0)
    assert (report["objects"], report["protocol"], report["split"]) == (2000, protocol, 1)
    percent = " +".join(f"{100 * metrics[key]:.2f}" for key in PCK)
    assert re.search(f"2000 objects +{percent}", capsys.readouterr().out)
    for key in PCK:
        low, high = report["interval"][key]
        assert low < report[key] < high < low + 0.015
    if protocol == "query":
        per_category = {name.split()[0]: row["PCK@0.2"] for name, row in report["per category"].items()}
        assert per_category == pytest.approx(expected["PCK@0.2 per category"], abs=1e-9, rel=0)


def test_pairs_are_those_of_earlier_work(published):
    folder, expected = published
    path = folder / "annotations" / "mp100_split1_test.json"
    descriptions = ROOT / "descriptions.json"
    instances = read_instances(path, parse_descriptions(read_json(descriptions), descriptions))
    order = [category["id"] for category in json.loads(path.read_text())["categories"]]
    silence = [[None] * len(instance.keypoints) for instance in instances]
    _, pairs = evaluate.pck_of_pairs(instances, silence, order)
    pairs = [[instances[i].annotation_id for i in pair] for pair in pairs]
    assert len(pairs) == expected["pairs"]["count"]
    assert pairs[:3] == expected["pairs"]["first"] and pairs[-3:] == expected["pairs"]["last"]


def make_instance(keypoints, visible, box=(10, 0, 100, 40), category_id=1):
    keypoints = np.array(keypoints, dtype=float)
    return Instance(0, category_id, "", box, keypoints, np.array(visible, dtype=bool))


def test_pck_by_hand():
    """The box's longer side is 100: thresholds of 5, 10, ... pixels."""
    four = make_instance([(20, 30)] * 4, [1, 1, 1, 0])
    five_away, ten_away, nothing, invisible = (20, 35), (26, 38), None, (20, 30)
    predicted = [five_away, ten_away, nothing, invisible]
    assert evaluate.pck_of_queries([four], [predicted]).tolist() == [[0, 1 / 3, 2 / 3, 2 / 3, 2 / 3]]
    assert evaluate.find_hits(four, [(20, 34.999), None, None, None])[:, 0].all()

    tall = make_instance([(20, 30)], [1], box=(10, 0, 40, 200))
    both = evaluate.pck_of_queries([four, tall], [predicted, [(20, 59)]])
    assert both[1].tolist() == [0, 0, 1, 1, 1]  # 29 away: not within 20, but 30
    each_instance_once = [0, 1 / 6, 5 / 6, 5 / 6, 5 / 6]
    assert both.mean(0).tolist() == pytest.approx(each_instance_once)

    nothing_visible, at_the_origin = make_instance([(20, 30)], [0]), make_instance([(0, 0)], [1])
    assert not evaluate.pck_of_queries([nothing_visible, at_the_origin], [[(20, 30)], [None]]).any()


def test_intervals_are_those_of_the_normal_law_and_of_objects_not_of_pairs():
    """300 objects, of which 80 % score 1: 1.96 standard errors are 4.5 points."""
    scores = np.repeat([0.0, 1], [60, 240])[:, None].repeat(6, 1)
    found = score.find_intervals(scores, np.arange(300))
    assert found == pytest.approx(np.tile([0.8 - 0.045, 0.8 + 0.045], (6, 1)), abs=0.006)
    pairs, queries = np.concatenate([0 * scores, 2 * scores]), np.tile(np.arange(300), 2)  # of the same means
    assert score.find_intervals(pairs, queries) == pytest.approx(found)


# ----------------------------------------------------------------------------------------- checkpoints, asked


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    """A folder with ckpt.pt, barely trained, data/ with 3 wagons of 5 points and 3 kites of 3 by turns."""
    return train_briefly(tiny, tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Says whether predictions.png is drawn, which takes longer than the rest: not unless drawn(True)."""
    draw_sheet = score.draw_sheet

    def choose(is_drawn):
        monkeypatch.setattr(score, "draw_sheet", draw_sheet if is_drawn else lambda *_: None)
    choose(False)
    return choose


@pytest.fixture
def evaluated(checkpoint, tmp_path):
    """evaluated(...) evaluates with these arguments -> (report, predictions)."""
    def make(*more):
        out = tmp_path / "out"
        evaluate.main(command_line(checkpoint / "ckpt.pt", "--workers", 0, "--out", out, *more))
        return read_results(out)
    return make


@pytest.fixture
def data(checkpoint, tmp_path):
    """A copy of the checkpoint's data."""
    return shutil.copytree(checkpoint / "data", tmp_path / "data")


def change(checkpoint, path, **arguments):
    """Writes a checkpoint as if it had been trained with other arguments."""
    contents = torch.load(checkpoint / "ckpt.pt", weights_only=True)
    torch.save({**contents, "args": contents["args"] | arguments}, path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-600])


def points_of(predictions):
    return [point for p in predictions for point in p["keypoints"]]


def test_results_depend_neither_on_batches_nor_on_processes(evaluated, checkpoint, data, tmp_path):
    """To the byte. The shares of two processes are unequal, and a photo is truncated."""
    def contents_of(folder):
        return [(folder / f"{name}.json").read_bytes() for name in ("report", "predictions")]
    truncate(data / "images" / "kite" / "3.jpg")
    options = ["--constrained", "--allow-missing", "--data", data]
    report, _ = evaluated(*options, "--batch", 8)
    expected = contents_of(tmp_path / "out")
    evaluated(*options, "--batch", 1)
    assert contents_of(tmp_path / "out") == expected
    two = ["--workers", 0, "--out", tmp_path / "two", "--batch", 5]
    said = in_two_processes(evaluate.main, [checkpoint / "ckpt.pt", *options, *two], tmp_path)
    assert contents_of(tmp_path / "two") == expected and report["without photo"] == 1
    assert [text.count("\n5 objects") for text in said] == [1, 0]  # only one of the two speaks


def test_report_and_picture_of_a_model_whose_answers_are_half_right(evaluated, data, tmp_path, capsys, drawn):
    """Of a wagon's five points three are right, of a kite's three two. A wrong point of 102 is invisible."""
    path = data / "annotations" / "mp100_split1_test.json"
    contents = json.loads(path.read_text())
    contents["annotations"][0]["bbox"] = [0, 0, 30, 30]  # all others are the same
    path.write_text(json.dumps(contents))
    _, predictions = evaluated("--constrained", "--batch", 5, "--data", data)
    assert [p["annotation_id"] for p in predictions] == [100, 101, 102, 103, 104, 105]
    assert all([len(p[part]) for p in predictions] == [5, 3] * 3 for part in ("keypoints", "confidence"))
    assert all(0 <= x < 29 and 0 <= y < 29 for x, y in points_of(predictions[:1]))
    for x, y in points_of(predictions[1:]):  # the crop is 10 ... 65 x 15 ... 64, made square
        assert 10 <= x < 65 and 12 <= y < 67

    for annotation, p in zip(contents["annotations"], predictions):  # half of them to where it points
        for k, (x, y) in enumerate(p["keypoints"]):
            annotation["keypoints"][3 * k:3 * k + 2] = [x + 100 * (k % 2), y]
    path.write_text(json.dumps(contents))
    drawn(True)
    report, again = evaluated("--constrained", "--data", data)
    assert again == predictions and report["malformed"] == report["without photo"] == 0
    assert (report["objects"], report["split"], report["subset"]) == (6, 1, "test")
    wagon, kite = (3 / 5 + 3 / 4 + 3 / 5) / 3, 2 / 3
    for expected, row in ((wagon + kite) / 2, report), *zip((wagon, kite), report["per category"].values()):
        assert [row[key] for key in PCK] == pytest.approx([expected] * 6)
    assert re.search(r"1 wagon +65.00.*\n2 kite +66.67.*\n6 objects +65.83", capsys.readouterr().out)
    with Image.open(tmp_path / "out" / "predictions.png") as picture:
        assert len(picture.getcolors(10**7)) > 1000

    evaluate.main(command_line("--score", tmp_path / "out" / "predictions.json", "--data", data, "--report",
                               tmp_path / "scored.json"))
    scored = json.loads((tmp_path / "scored.json").read_text())
    assert scored == {key: report[key] for key in report.keys() - {"malformed", "without photo", "decode"}}
    assert report["decode"] == "greedy constrained"


def test_malformed_answers_are_misses_and_counted(evaluated, tmp_path, drawn, capsys):
    """A network that has hardly learned anything gives nothing else, and a warning says so."""
    drawn(True)
    report, predictions = evaluated()
    assert report["malformed"] == points_of(predictions).count(None) == report["keypoints"] == 24
    assert report["mPCK"] == 0 and all({*p["confidence"]} == {None} for p in predictions)
    assert "not one answer holds coordinates" in capsys.readouterr().out
    Image.open(tmp_path / "out" / "predictions.png").close()


def test_each_photo_is_asked_its_categorys_questions_and_has_its_answers(evaluated, tiny, monkeypatch):
    calls, locate = [], decode.locate

    def spy(model, images, questions, chat, **how):
        calls.append((questions, locate(model, images, questions, chat, **how)))
        return calls[-1][1]
    monkeypatch.setattr(evaluate, "locate", spy)
    _, predictions = evaluated("--constrained", "--batch", 11)  # two wagons, a wagon and two kites, a kite
    wagon, kite = (Chat(tiny / "llm").encode_questions(CATEGORIES[c]) for c in (1, 2))
    assert [questions for questions, _ in calls] == [[wagon, wagon], [wagon, kite, kite], [kite]]
    wagons_then_kites = sorted(predictions, key=lambda p: -len(p["keypoints"]))
    confidences = [[p.confidence for p in of_photo] for _, found in calls for of_photo in found]
    written = [p["confidence"] for p in wagons_then_kites]
    assert written == [[round(c, 2) for c in of_photo] for of_photo in confidences] != confidences


def test_a_photo_that_breaks_off_ends_the_program_though_workers_wait(checkpoint, data):
    """One of them would wait for a minute."""
    truncate(data / "images/kite/3.jpg")
    command = [sys.executable, "evaluate.py", checkpoint / "ckpt.pt", "--data", data, "--batch", "1"]
    done = subprocess.run(command, capture_output=True, timeout=45, **SUBPROCESS)
    assert done.returncode == 2 and "kite/3.jpg: cannot be read" in done.stderr.splitlines()[-1]


def test_missing_and_truncated_photos_are_refused_or_left_out(evaluated, checkpoint, data, tmp_path):
    images, out = data / "images", tmp_path / "out"
    argv = [checkpoint / "ckpt.pt", "--data", data, "--out", out, "--workers", "0"]
    truncate(images / "kite" / "3.jpg")
    for name in "wagon/0", "wagon/2", "kite/1":
        (images / f"{name}.jpg").unlink()
    line = refused(evaluate, argv)
    assert all(word in line for word in ("3 of 6 objects", "wagon 2", "kite 1", "--allow-missing"))
    assert not list(out.glob("*"))
    report, predictions = evaluated("--data", data, "--allow-missing")
    assert (report["without photo"], report["objects"]) == (4, 2)
    assert [p["annotation_id"] for p in predictions] == [104, 105]
    (images / "wagon" / "4.jpg").unlink()  # a kite is left
    assert "no pairs" in refused(evaluate, [*argv, "--allow-missing", "--protocol", "pairs"])


def test_a_checkpoint_needs_nothing_where_it_was_trained_but_backbones_which_may_have_moved(
        evaluated, checkpoint, tiny, tmp_path, monkeypatch):
    _, expected = evaluated("--constrained")
    moved, gone = shutil.copytree(tiny, tmp_path / "moved"), tmp_path / "gone"
    change(checkpoint, tmp_path / "ckpt.pt", llm=f"{gone}/llm", vit=f"{gone}/vit", descriptions=f"{gone}")
    argv = [tmp_path / "ckpt.pt", "--constrained", "--workers", 0]
    assert "gone" in refused(evaluate, argv)
    evaluate.main(command_line(*argv, "--llm", moved / "llm", "--vit", moved / "vit"))
    assert read_results(tmp_path)[1] == expected  # beside the checkpoint
    monkeypatch.chdir(tmp_path)  # from where the toy's own backbones, assets/toy/..., are not seen
    model, _, contents = decode.load_trained(ROOT / "assets/toy/ckpt.pt", torch.device("cpu"))
    assert not model.training and contents["args"]["llm"] == "assets/toy/llm"


def test_other_descriptions_replace_those_of_their_categories(evaluated, data, tmp_path, monkeypatch, capsys):
    """Those of --descriptions, or in the folder of --data, as tools/own.py writes it."""
    asked, encode = [], Chat.encode_questions

    def spy(chat, category):
        asked.extend(category.keypoints)
        return encode(chat, category)
    monkeypatch.setattr(Chat, "encode_questions", spy)
    others = [(name, "over there") for name in ("top", "end", "side")]
    texts = tmp_path / "kites.json"
    texts.write_text(json.dumps({
        "keypoint_sets": {"k": [{"name": name, "description": description} for name, description in others]},
        "categories": {"2": {"name": "kite", "keypoint_set": "k"}}}))
    shutil.copy(texts, data / "descriptions.json")
    for option in ["--descriptions", texts], ["--data", data]:
        asked.clear()
        evaluated(*option)
        # once each, not once a photo
        assert sorted(asked) == sorted([*others, *CATEGORIES[1].keypoints])
    assert f"descriptions: {data}/descriptions.json" in capsys.readouterr().out


def test_split_and_subset_are_those_of_the_checkpoint_unless_said(checkpoint, data, tmp_path):
    """Each has a folder of its own, so that no report is overwritten by another's."""
    annotations = data / "annotations"
    contents = json.loads((annotations / "mp100_split1_train.json").read_text())
    contents["annotations"].pop()
    (annotations / "mp100_split2_test.json").write_text(json.dumps(contents))
    change(checkpoint, tmp_path / "ckpt.pt", data=str(data), split=2)
    evaluate.main(command_line(tmp_path / "ckpt.pt", "--workers", 0))
    report, _ = read_results(tmp_path)
    assert (report["split"], report["subset"], report["objects"]) == (2, "test", 5)
    evaluate.main(command_line(tmp_path / "ckpt.pt", "--workers", 0, "--split", 1, "--subset", "train"))
    other, _ = read_results(tmp_path / "train")
    assert (other["split"], other["subset"], other["objects"]) == (1, "train", 6)
    assert read_results(tmp_path)[0] == report


def test_results_go_beside_a_checkpoint_but_not_among_the_files_of_the_repository(tmp_path, monkeypatch):
    def folder(path, subset="test", out=None):
        return str(score.choose_folder(Namespace(checkpoint=path, subset=subset, out=out)))
    elsewhere = tmp_path / "split1"
    assert folder(elsewhere / "ckpt.pt") == str(elsewhere)
    assert folder(elsewhere / "best.pt", "val") == f"{elsewhere}/best/val"
    monkeypatch.chdir(tmp_path)
    assert folder(ROOT / "assets/toy/ckpt.pt") == "runs/toy"
    assert folder(ROOT / "assets/toy/best.pt", "train") == "runs/toy/best/train"
    assert folder(ROOT / "assets/toy/ckpt.pt", "val", "here") == "here"
    assert folder(ROOT / "tests/ckpt.pt") == str(ROOT / "tests")  # as of a run with --out in the repository


# -------------------------------------------------------------------------------------------- what goes wrong


def test_ways_of_asking_that_do_not_fit_are_one_clear_line(tiny, tmp_path):
    train_briefly(tiny, tmp_path, "--answer", "token", "--batch", 8)
    for how in ["--decode", "median"], ["--constrained"]:
        line = refused(evaluate, [tmp_path / "ckpt.pt", *how])
        assert how[0] in line and "does not spell points in digits" in line
    for how in ["--decode", "median"], ["--constrained"], ["--cumulative"], ["--out", "x"]:
        assert "not for --score" in refused(evaluate, ["--score", "p.json", *how])
    chat = make_chat(tmp_path, sentencepiece("lumps"), 1, 2)  # which joins some digits
    decode.check_decoding(chat, "greedy")
    for how in ("mean", False), ("greedy", True):
        with pytest.raises(InputError, match="does not spell points in digits"):
            decode.check_decoding(chat, *how)


def test_what_cannot_be_evaluated_is_one_clear_line(checkpoint, data, tmp_path, monkeypatch):
    """Before a network is loaded."""
    monkeypatch.setattr(evaluate, "load_trained", None)
    good, pretrained, empty = checkpoint / "ckpt.pt", tmp_path / "pretrained.pt", data / "annotations"
    change(checkpoint, pretrained, pretrain="direct")
    (empty / "mp100_split1_test.json").write_text(json.dumps({"images": [], "annotations": []}))
    (tmp_path / "runs/small").mkdir(parents=True)
    (tmp_path / "runs/small/ckpt.pt").touch()
    monkeypatch.chdir(tmp_path)
    for argv, message in [
            ([], "give either a checkpoint or --score"),
            ([good, "--score", "p.json"], "give either a checkpoint or --score"),
            ([pretrained], "--pretrain, which locates nothing"),
            ([good, "--data", data], "mp100_split1_test.json: no object"),
            ([good, "--out", pretrained], f"{pretrained}: cannot be made"),
            (["ckpt.pt"], "ckpt.pt: no such file; there is runs/small/ckpt.pt"),
            (["runs/small/ckpt.pt"], "runs/small/ckpt.pt: cannot be read")]:
        assert message in refused(evaluate, argv)


# ------------------------------------------------------------------------------------------------- validation


def test_validation_is_pck_of_the_same_objects_and_leaves_training_as_it_was(
        checkpoint, tmp_path, monkeypatch):
    """Of a model that takes every keypoint for the middle of the crop."""
    data = make_mp100(tmp_path / "data", CATEGORIES, {"train": {1: 1, 2: 1}, "val": {1: 60, 2: 50}})
    instances = read_instances(data / "annotations" / "mp100_split1_val.json", CATEGORIES)
    contents = torch.load(checkpoint / "ckpt.pt", weights_only=True)
    args = Namespace(**contents["args"] | {"data": str(data), "workers": 0})
    model, asked = torch.nn.Dropout(), []

    def locate(of_model, images, questions, chat):
        assert of_model is model and not model.training
        asked.extend(images.mean((1, 2, 3)).tolist())
        return [[Prediction((0.5, 0.5)) for _ in of_photo] for of_photo in questions]

    def random_states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    monkeypatch.setattr(run, "locate", locate)
    chat, process = Chat(args.llm), Process(0, 1, torch.device("cpu"))
    validation, before = run.Validation(args, chat, CATEGORIES, process), random_states()
    measured = validation.measure(model.train())
    assert random_states() == before and model.training

    middle = (37.5, 39.5)
    distances = [np.hypot(*(o.keypoints - middle).T) for o in validation.instances]
    shares = [(d < 0.2 * max(o.box[2:]))[o.visible].mean() for d, o in zip(distances, validation.instances)]
    assert 0.05 < measured == pytest.approx(np.mean(shares))
    chosen = {o.annotation_id for o in validation.instances}
    assert len(chosen) == 100 and chosen < {o.annotation_id for o in instances}
    first = asked.copy()
    asked.clear()
    assert run.Validation(args, chat, CATEGORIES, process).measure(model) == measured and asked == first


# ---------------------------------------------------------------------------------------- predictions, scored


@pytest.fixture
def scoring(checkpoint, tmp_path):
    """scoring(predictions) -> what scores them: a command line."""
    def make(predictions):
        path = tmp_path / "predictions.json"
        path.write_text(json.dumps(predictions))
        return ["--score", path, "--data", checkpoint / "data", "--report", tmp_path / "report.json"]
    return make


def predict_all(**first):
    """-> predictions of six objects. first: changes to those of the first."""
    good = [{"annotation_id": 100 + i, "keypoints": [[1.0, 2]] * K} for i, K in enumerate([5, 3] * 3)]
    return [good[0] | first, *good[1:]]


def test_objects_without_prediction_and_predictions_of_other_objects_are_counted(scoring, tmp_path):
    others = [{"annotation_id": 9, "keypoints": []}, {"annotation_id": 8, "keypoints": [[1, 2]] * 99}]
    few = [*predict_all()[:1], {"annotation_id": 101, "keypoints": [None, [1, 2], None]}, *others]
    evaluate.main(command_line(*scoring(few), "--allow-missing"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["objects"], report["without prediction"], report["keypoints"]) == (2, 4, 8)
    assert report["predicted but not in the split"] == 2
    assert "no prediction for 6 of 6 objects" in refused(evaluate, [*scoring([]), "--allow-missing"])


@pytest.mark.parametrize("predictions, message", [
    ({"predictions": []}, r"be \[{"), ([[[1, 2]]], r"be \[{"), (predict_all(keypoints=[1, 2] * 5), r"be \[{"),
    (predict_all() + predict_all()[2:3], "annotation 102 is predicted twice"),
    (predict_all(keypoints=[[1, 2]] * 4), "annotation 100 has 4 keypoints predicted, 5 annotated"),
    (predict_all(keypoints=[[1, float("nan")]] * 5), "annotation 100 has a point that is not two numbers"),
    (predict_all(keypoints=[[1, 2, 0.9]] * 5), "annotation 100 has a point that is not two numbers"),
    (predict_all()[:-1], "no prediction for 1 of 6 objects, e.g. annotation 105")],
    ids=["dict", "no ids", "flat", "twice", "too few points", "NaN", "three", "instance missing"])
def test_bad_predictions_are_one_clear_line(scoring, tmp_path, predictions, message):
    line = refused(evaluate, scoring(predictions))
    assert re.search(message, line) and str(tmp_path / "predictions.json") in line
