"""evaluate.py: the metric against the published code and by hand; checkpoints asked; bad input."""

import gzip
import json
import random
import re
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_chat, sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from mp100 import CATEGORIES, make_mp100
from PIL import Image
from programs import command_line, in_two_processes, read_results, refused, train_briefly

import evaluate
from chat import Category, Chat
from common import Process, read_json
from data import Instance, parse_descriptions, read_instances
from decode import Prediction

PCK = ["PCK@0.05", "PCK@0.1", "PCK@0.15", "PCK@0.2", "PCK@0.25"]


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
    percent = [f"{100 * metrics[key]:.2f}" for key in (*PCK, "mPCK")]
    said = capsys.readouterr().out
    assert re.search(r"2000 objects +" + " +".join(percent), said)
    for key in (*PCK, "mPCK"):
        low, high = report["interval"][key]
        assert low < report[key] < high < low + 0.015
        assert f"{100 * low:.1f}-{100 * high:.1f}" in said.splitlines()[-3]
    if protocol == "query":
        per_category = {name.split()[0]: row["PCK@0.2"] for name, row in report["per category"].items()}
        assert per_category == pytest.approx(expected["PCK@0.2 per category"], abs=1e-9, rel=0)
        assert report["mPCK"] == pytest.approx(np.mean([report[key] for key in PCK]))


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
    assert pairs[:3] == expected["pairs"]["first"]
    assert pairs[-3:] == expected["pairs"]["last"]


def make_instance(keypoints, visible, box=(10, 0, 100, 40), category_id=1):
    keypoints = np.array(keypoints, dtype=float)
    return Instance(0, category_id, "", box, keypoints, np.array(visible, dtype=bool))


def test_pck_by_hand():
    """The box's longer side is 100: thresholds of 5, 10, ... pixels."""
    four = make_instance([(20, 30)] * 4, [1, 1, 1, 0])
    five_away, ten_away, nothing, invisible = (20, 35), (26, 38), None, (20, 30)
    predicted = [five_away, ten_away, nothing, invisible]
    assert evaluate.pck_of_queries([four], [predicted]).tolist() == [[0, 1 / 3, 2 / 3, 2 / 3, 2 / 3]]
    nearer_than_five = [(20, 34.999), None, None, None]
    assert evaluate.find_hits(four, nearer_than_five)[:, 0].all()

    tall = make_instance([(20, 30)], [1], box=(10, 0, 40, 200))
    both = evaluate.pck_of_queries([four, tall], [predicted, [(20, 59)]])
    assert both[1].tolist() == [0, 0, 1, 1, 1]  # 29 away: not within 20, but 30
    each_instance_once = [0, 1 / 6, 5 / 6, 5 / 6, 5 / 6]
    assert both.mean(0).tolist() == pytest.approx(each_instance_once)

    nothing_visible, at_the_origin = make_instance([(20, 30)], [0]), make_instance([(0, 0)], [1])
    assert not evaluate.pck_of_queries([nothing_visible, at_the_origin], [[(20, 30)], [None]]).any()


def test_boxes_are_clipped_and_points_covered_but_labelled_count(tmp_path):
    covered, shown, unlabelled = [20, 30, 1], [20, 30, 2], [20, 30, 0]
    annotation = {"id": 7, "image_id": 1, "category_id": 1, "bbox": [-50, 10, 151, 41], "area": 1,
                  "keypoints": covered + shown + unlabelled}
    photo = {"id": 1, "file_name": "a", "width": 81, "height": 60}
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": [photo], "annotations": [annotation]}))
    [instance] = read_instances(path, {1: Category("thing", [("point", "")] * 3)})
    assert instance.box == (0, 10, 80, 40)  # from pixel 0 to pixel 80, the last
    four_away = evaluate.pck_of_queries([instance], [[(24, 30), (24, 30), None]])
    assert four_away.tolist() == [[0, 1, 1, 1, 1]]  # 0.05 x 80 is 4, and 4 is not below


def test_pairs_count_what_support_and_query_share():
    a = make_instance([(20, 30)] * 3, [1, 1, 0])
    b = make_instance([(20, 30)] * 3, [0, 1, 1])
    c = make_instance([(20, 30)] * 3, [0, 0, 1])
    right, wrong = (20, 30), None
    predicted = [[right, wrong, right], [wrong, right, wrong], [right, right, right]]
    shares, pairs = evaluate.pck_of_pairs([a, b, c], predicted, [1, 2])
    nothing_shared = {(0, 2): 0, (2, 0): 0}
    by_hand = {(0, 1): 1, (1, 0): 0, (1, 2): 1, (2, 1): 0} | nothing_shared
    assert len(pairs) == 400  # 200 times both others
    assert set(pairs) == by_hand.keys()
    for share, pair in zip(shares, pairs):
        assert (share == by_hand[pair]).all()


def test_intervals_are_those_of_the_normal_law_and_of_objects_not_of_pairs():
    """300 objects, of which 80 % score 1: 1.96 standard errors are 4.5 points."""
    scores = np.repeat([0.0, 1], [60, 240])[:, None].repeat(6, 1)
    found = evaluate.find_intervals(scores, np.arange(300))
    assert found.shape == (6, 2)
    assert found == pytest.approx(np.tile([0.8 - 0.045, 0.8 + 0.045], (6, 1)), abs=0.006)
    ten_times, objects = scores.repeat(10, 0), np.arange(300).repeat(10)
    assert evaluate.find_intervals(ten_times, objects) == pytest.approx(found)
    never_a_query = evaluate.find_intervals(scores, np.arange(300) * 2)
    assert never_a_query == pytest.approx(found)


# --------------------------------------------------------------------------------------------------- batches


def instances_of(counts):
    """Instances with so many keypoints."""
    return [make_instance([(1, 1)] * K, [1] * K) for K in counts]


def test_batches_by_hand():
    assert evaluate.make_batches(instances_of([5, 3, 5, 3, 3]), 8) == [[0], [2, 1], [3, 4]]
    assert evaluate.make_batches(instances_of([3, 20, 2]), 5) == [[1], [0, 2]]  # 20 alone are more than 5
    assert evaluate.make_batches([], 5) == []


@given(counts=st.lists(st.integers(1, 68), max_size=40), most=st.integers(1, 200))
def test_batches_hold_every_instance_once_and_at_most_so_many_keypoints(counts, most):
    batches = evaluate.make_batches(instances_of(counts), most)
    assert sorted(i for batch in batches for i in batch) == list(range(len(counts)))
    for batch in batches:
        assert len(batch) == 1 or 1 < sum(counts[i] for i in batch) <= most
    in_order = [counts[i] for batch in batches for i in batch]
    assert in_order == sorted(counts, reverse=True)  # the heaviest first
    for batch, following in zip(batches, batches[1:]):  # none is closed too early
        assert sum(counts[i] for i in [*batch, following[0]]) > most


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_results_depend_neither_on_batches_nor_on_processes(evaluated, checkpoint, tmp_path, batch):
    """To the byte. The shares of two processes are unequal, and a photo is truncated."""
    data = shutil.copytree(checkpoint / "data", tmp_path / "data")
    truncate(data / "images" / "kite" / "3.jpg")
    options = ["--constrained", "--allow-missing", "--data", data]
    report, _ = evaluated(*options, "--batch", 8)
    assert report["without photo"] == 1
    expected = contents_of(tmp_path / "out")

    evaluated(*options, "--batch", batch)
    assert contents_of(tmp_path / "out") == expected
    two = ["--workers", 0, "--out", tmp_path / "two", "--batch", batch]
    said = in_two_processes(evaluate.main, [checkpoint / "ckpt.pt", *options, *two], tmp_path)
    assert contents_of(tmp_path / "two") == expected
    assert [text.count("\n5 objects") for text in said] == [1, 0]  # only one of the two speaks


def contents_of(folder):
    return [(folder / f"{name}.json").read_bytes() for name in ("report", "predictions")]


# ----------------------------------------------------------------------------------------- checkpoints, asked


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    """A folder with ckpt.pt, barely trained, data/ with 3 wagons of 5 points and 3 kites of 3 by turns."""
    return train_briefly(tiny, tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Says whether predictions.png is drawn, which takes longer than the rest: not unless drawn(True)."""
    from tools import draw
    draw_sheet = draw.draw_sheet

    def choose(is_drawn):
        monkeypatch.setattr(draw, "draw_sheet", draw_sheet if is_drawn else lambda *_: None)
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


def change(checkpoint, path, **arguments):
    """Writes a checkpoint as if it had been trained with other arguments."""
    contents = torch.load(checkpoint / "ckpt.pt", weights_only=True)
    torch.save({**contents, "args": contents["args"] | arguments}, path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-600])


def points_of(predictions):
    return [point for p in predictions for point in p["keypoints"]]


def spy_on_locate(monkeypatch):
    """-> a list of what locate() is asked and answers, (questions, predictions), one for each call."""
    calls, locate = [], evaluate.locate

    def spy(model, images, questions, chat, **how):
        calls.append((questions, locate(model, images, questions, chat, **how)))
        return calls[-1][1]
    monkeypatch.setattr(evaluate, "locate", spy)
    return calls


def test_predictions_are_of_every_instance_in_the_order_of_the_file(evaluated):
    _, predictions = evaluated("--constrained", "--batch", 5)
    assert [p["annotation_id"] for p in predictions] == [100, 101, 102, 103, 104, 105]
    for part in "keypoints", "confidence":
        assert [len(p[part]) for p in predictions] == [5, 3] * 3
    for x, y in points_of(predictions):  # the crop is 10 ... 65 x 15 ... 64, made square
        assert 10 <= x < 65 and 12 <= y < 67


def move_annotations(data, predictions):
    """To where the model points, every other one 100 pixels beside it."""
    path = data / "annotations" / "mp100_split1_test.json"
    contents = json.loads(path.read_text())
    for annotation, p in zip(contents["annotations"], predictions):
        for k, (x, y) in enumerate(p["keypoints"]):
            annotation["keypoints"][3 * k:3 * k + 2] = [x + 100 * (k % 2), y]
    path.write_text(json.dumps(contents))


@pytest.mark.parametrize("protocol", ["pairs", "query"])
def test_report_and_picture_of_a_model_whose_answers_are_half_right(
        evaluated, checkpoint, tmp_path, capsys, drawn, protocol):
    """Of a wagon's five points three are right, of a kite's three two. A wrong point of 102 is invisible."""
    data = shutil.copytree(checkpoint / "data", tmp_path / "data")
    _, predictions = evaluated("--constrained")
    move_annotations(data, predictions)
    drawn(True)
    options = ["--data", data, "--protocol", protocol]
    report, again = evaluated("--constrained", *options)
    assert again == predictions
    assert report["malformed"] == report["without photo"] == 0
    assert (report["objects"], report["split"], report["protocol"]) == (6, 1, protocol)
    assert report["subset"] == "test"
    assert report["per category"]["2 kite"]["mPCK"] == pytest.approx(2 / 3)
    if protocol == "query":
        wagon, kite = (3 / 5 + 3 / 4 + 3 / 5) / 3, 2 / 3
        rows = {(wagon + kite) / 2: report, **{wagon: report["per category"]["1 wagon"]},
                kite: report["per category"]["2 kite"]}
        for expected, row in rows.items():
            assert [row[key] for key in (*PCK, "mPCK")] == pytest.approx([expected] * 6)
        table = r"1 wagon +65.00.*\n2 kite +66.67.*\n6 objects +65.83"
        assert re.search(table, capsys.readouterr().out)
    with Image.open(tmp_path / "out" / "predictions.png") as picture:
        assert 1500 < picture.width < 2500 and 700 < picture.height < 1300
        assert len(picture.getcolors(10**7)) > 1000

    evaluate.main(command_line("--score", tmp_path / "out" / "predictions.json", *options, "--report",
                               tmp_path / "scored.json", "--descriptions", data / "descriptions.json"))
    scored = json.loads((tmp_path / "scored.json").read_text())
    assert scored == {key: report[key] for key in report.keys() - {"malformed", "without photo"}}


def test_malformed_answers_are_misses_and_counted(evaluated, tmp_path, drawn, capsys):
    """A network that has hardly learned anything gives nothing else, and a warning says so."""
    drawn(True)
    report, predictions = evaluated()
    assert report["malformed"] == points_of(predictions).count(None) == report["keypoints"] == 24
    assert report["mPCK"] == 0
    said = capsys.readouterr().out
    assert "malformed: 24" in said and "not one answer holds coordinates" in said
    Image.open(tmp_path / "out" / "predictions.png").close()


def test_confidences_are_those_of_the_answers_with_two_digits(evaluated, monkeypatch):
    """They are unknown where an answer left the format, as all answers of this network do by themselves."""
    calls = spy_on_locate(monkeypatch)
    _, predictions = evaluated("--constrained")
    wagons_then_kites = sorted(predictions, key=lambda p: -len(p["keypoints"]))
    confidences = [[p.confidence for p in of_photo] for _, found in calls for of_photo in found]
    written = [p["confidence"] for p in wagons_then_kites]
    assert written == [[round(c, 2) for c in of_photo] for of_photo in confidences]
    assert written != confidences

    _, predictions = evaluated()
    assert all(p["confidence"] == [None] * len(p["keypoints"]) for p in predictions)


def test_the_mean_and_median_of_distributions_can_be_taken(evaluated):
    """A network that has hardly learned anything is in doubt, so all three are apart."""
    ways = ["greedy", "median", "mean"]
    greedy, median, mean = (points_of(evaluated("--constrained", "--decode", way)[1]) for way in ways)
    for points in zip(greedy, median, mean):
        assert len(set(map(tuple, points))) == 3


def test_missing_and_truncated_photos_are_listed_or_left_out(evaluated, checkpoint, tmp_path):
    data = shutil.copytree(checkpoint / "data", tmp_path / "data")
    truncate(data / "images" / "kite" / "3.jpg")
    argv = [checkpoint / "ckpt.pt", "--data", data, "--out", tmp_path / "out", "--workers", "0"]
    assert "kite/3.jpg" in refused(evaluate, argv)
    for name in "wagon/0", "wagon/2", "kite/1":
        (data / "images" / f"{name}.jpg").unlink()
    line = refused(evaluate, argv)
    for word in "3 of 6 objects", "wagon 2", "kite 1", "--allow-missing":
        assert word in line
    assert not list((tmp_path / "out").glob("*"))

    report, predictions = evaluated("--data", data, "--allow-missing")
    assert (report["without photo"], report["objects"]) == (4, 2)
    assert [p["annotation_id"] for p in predictions] == [104, 105]

    (data / "images" / "wagon" / "4.jpg").unlink()  # a kite is left
    assert "no pairs" in refused(evaluate, [*argv, "--allow-missing", "--protocol", "pairs"])
    truncate(data / "images" / "kite" / "5.jpg")
    assert "6 of 6 objects" in refused(evaluate, [*argv, "--allow-missing"])
    shutil.rmtree(data / "images")
    assert "6 of 6 objects" in refused(evaluate, [*argv, "--allow-missing"])


def test_backbones_may_have_moved_since_or_be_beside_the_program(
        evaluated, checkpoint, tiny, tmp_path, monkeypatch):
    _, expected = evaluated("--constrained")
    moved, gone = shutil.copytree(tiny, tmp_path / "moved"), tmp_path / "gone"
    change(checkpoint, tmp_path / "ckpt.pt", llm=str(gone / "llm"), vit=str(gone / "vit"))
    argv = [tmp_path / "ckpt.pt", "--constrained", "--workers", 0]
    assert "gone" in refused(evaluate, argv)
    evaluate.main(command_line(*argv, "--llm", moved / "llm", "--vit", moved / "vit"))
    _, predictions = read_results(tmp_path)  # beside the checkpoint
    assert predictions == expected
    monkeypatch.chdir(tmp_path)  # from where the toy's own backbones, assets/toy/..., are not seen
    model, chat, contents = evaluate.load_trained(ROOT / "assets/toy/ckpt.pt", torch.device("cpu"))
    assert not model.training and chat.coordinates.known and contents["args"]["llm"] == "assets/toy/llm"


def test_other_descriptions_replace_those_of_their_categories(evaluated, checkpoint, tmp_path, monkeypatch):
    """Each category's questions are made once, not once a photo."""
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
    evaluated("--descriptions", texts)
    wagons = [(name, f"the {name} of a wagon")
              for name in ("front wheel", "rear wheel", "roof", "shaft", "lamp")]
    assert sorted(asked) == sorted([*others, *wagons])

    data = shutil.copytree(checkpoint / "data", tmp_path / "data")
    shutil.copy(texts, data / "descriptions.json")  # likewise where --data is told, as tools/own.py writes it
    asked.clear()
    evaluated("--data", data)
    assert sorted(asked) == sorted([*others, *wagons])


def test_a_checkpoint_holds_its_descriptions(checkpoint, tmp_path):
    change(checkpoint, tmp_path / "ckpt.pt", descriptions=str(tmp_path / "gone.json"))
    evaluate.main(command_line(tmp_path / "ckpt.pt", "--workers", 0))
    report, _ = read_results(tmp_path)
    assert report["objects"] == 6


def test_cumulative_asks_in_one_conversation_and_says_so(evaluated, tiny, monkeypatch):
    from paper import iccv
    asked, locate = [], iccv.locate_in_turns

    def spy(model, images, questions, chat, cumulative, **how):
        asked.append((cumulative, questions))
        return locate(model, images, questions, chat, cumulative=cumulative, **how)
    monkeypatch.setattr(iccv, "locate_in_turns", spy)
    report_apart, apart = evaluated("--constrained", "--decode", "mean")
    assert not asked
    report_together, together = evaluated("--constrained", "--decode", "mean", "--cumulative")
    wagon, kite = (iccv.encode_in_turns(Chat(tiny / "llm"), CATEGORIES[c]) for c in (1, 2))
    assert asked == [(True, [wagon] * 3 + [kite] * 3)]
    assert report_together["cumulative"] is True
    assert "cumulative" not in report_apart

    shifts = [np.abs(np.subtract(p["keypoints"], q["keypoints"])) for p, q in zip(apart, together)]
    assert max(shift[0].max() for shift in shifts) < 1e-3  # nothing comes before the first
    assert min(shift[1:].max() for shift in shifts) > 1e-2


def test_questions_are_those_of_the_chat(evaluated, tiny, monkeypatch):
    calls = spy_on_locate(monkeypatch)
    evaluated("--batch", 11)  # two wagons, a wagon and two kites, a kite
    wagon, kite = (Chat(tiny / "llm").encode_questions(CATEGORIES[c]) for c in (1, 2))
    assert [questions for questions, _ in calls] == [[wagon, wagon], [wagon, kite, kite], [kite]]


def test_ways_of_asking_that_do_not_fit_are_one_clear_line(tiny, tmp_path):
    train_briefly(tiny, tmp_path, "--answer", "token", "--batch", 8)
    for how in ["--decode", "median"], ["--constrained"]:
        line = refused(evaluate, [tmp_path / "ckpt.pt", *how])
        assert how[0] in line and "does not spell points in digits" in line
    for how in ["--decode", "median"], ["--constrained"], ["--cumulative"]:
        assert "--score asks nothing" in refused(evaluate, ["--score", "p.json", *how])


def test_a_tokenizer_that_joins_some_digits_leaves_only_greedy_decoding(tmp_path):
    chat = make_chat(tmp_path, sentencepiece("lumps"), 1, 2)
    evaluate.check_decoding(chat, "greedy")
    for how in ("mean", False), ("greedy", True):
        with pytest.raises(evaluate.InputError, match="does not spell points in digits"):
            evaluate.check_decoding(chat, *how)


def test_a_checkpoint_of_pretraining_is_refused(checkpoint, tmp_path):
    change(checkpoint, tmp_path / "ckpt.pt", pretrain="direct")
    assert "--pretrain, which locates nothing" in refused(evaluate, [tmp_path / "ckpt.pt"])


def test_split_and_subset_are_those_of_the_checkpoint_unless_said(evaluated, checkpoint, tmp_path):
    data = shutil.copytree(checkpoint / "data", tmp_path / "data")
    contents = json.loads((data / "annotations" / "mp100_split1_train.json").read_text())
    contents["annotations"].pop()
    (data / "annotations" / "mp100_split2_test.json").write_text(json.dumps(contents))
    change(checkpoint, tmp_path / "ckpt.pt", data=str(data), split=2)
    argv = [tmp_path / "ckpt.pt", "--workers", 0]

    evaluate.main(command_line(*argv))
    report, _ = read_results(tmp_path)
    assert (report["split"], report["subset"], report["objects"]) == (2, "test", 5)
    evaluate.main(command_line(*argv, "--split", 1, "--subset", "train", "--report", tmp_path / "there.json"))
    report = json.loads((tmp_path / "there.json").read_text())
    assert (report["split"], report["subset"], report["objects"]) == (1, "train", 6)

    test_report = (tmp_path / "report.json").read_bytes()
    evaluate.main(command_line(*argv, "--split", 1, "--subset", "train"))
    assert read_results(tmp_path / "train")[0]["subset"] == "train"
    shutil.copy(tmp_path / "ckpt.pt", tmp_path / "best.pt")
    evaluate.main(command_line(tmp_path / "best.pt", *argv[1:], "--constrained"))
    assert read_results(tmp_path / "best")[0]["subset"] == "test"
    assert (tmp_path / "report.json").read_bytes() == test_report


def test_results_go_beside_a_checkpoint_but_not_among_the_files_of_the_repository(monkeypatch):
    def folder(path, subset="test", out=None):
        return str(evaluate.find_folder(Namespace(checkpoint=path, subset=subset, out=out)))
    monkeypatch.chdir(ROOT)
    assert folder("runs/split1/ckpt.pt") == folder("./runs/split1/ckpt.pt") == "runs/split1"
    assert folder("/elsewhere/split1/best.pt", "val") == "/elsewhere/split1/best/val"
    assert folder("assets/toy/ckpt.pt") == folder(f"{ROOT}/assets/toy/ckpt.pt") == "runs/toy"
    assert folder("assets/toy/best.pt", "train") == "runs/toy/best/train"
    assert folder("assets/toy/ckpt.pt", "val", "here") == "here"
    monkeypatch.chdir(ROOT / "assets/toy")
    assert folder("ckpt.pt") == "runs/toy"


def test_a_checkpoint_that_is_elsewhere_is_pointed_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "ckpt.pt: no such file" in refused(evaluate, ["ckpt.pt"])
    for name in "split1", "small":
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "ckpt.pt").touch()
    line = refused(evaluate, ["ckpt.pt"])
    assert "ckpt.pt: no such file; there is runs/small/ckpt.pt, runs/split1/ckpt.pt" in line
    assert "runs/small/ckpt.pt: cannot be read" in refused(evaluate, ["runs/small/ckpt.pt"])


def test_a_checkpoint_or_predictions_are_wanted_but_not_both(checkpoint):
    for argv in [], [checkpoint / "ckpt.pt", "--score", "p.json"]:
        assert "give either a checkpoint or --score" in refused(evaluate, argv)


def test_a_file_without_instances_is_refused(checkpoint, tmp_path):
    data = shutil.copytree(checkpoint / "data", tmp_path / "data")
    path = data / "annotations" / "mp100_split1_test.json"
    path.write_text(json.dumps({"images": [], "annotations": []}))
    assert f"{path}: no object to evaluate" in refused(evaluate, [checkpoint / "ckpt.pt", "--data", data])


def test_a_folder_that_cannot_be_made_is_told_before_the_network_is_loaded(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_trained", None)
    (tmp_path / "file").touch()
    line = refused(evaluate, [checkpoint / "ckpt.pt", "--out", tmp_path / "file"])
    assert f"{tmp_path / 'file'}: cannot be made" in line


def test_a_batch_that_is_too_large_for_the_memory_is_one_line(checkpoint, tmp_path, monkeypatch):
    def locate(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    monkeypatch.setattr(evaluate, "locate", locate)
    line = refused(evaluate, [checkpoint / "ckpt.pt", "--out", tmp_path / "none", "--workers", 0])
    assert "CUDA out of memory" in line and "--batch" in line


def test_what_a_file_lacks_of_mp100_is_said(evaluated, monkeypatch, capsys):
    from tools import check
    monkeypatch.setattr(check, "describe_shortfall", lambda path: f"{path.name}: holds only a few")
    evaluated()
    assert "mp100_split1_test.json: holds only a few\n" in capsys.readouterr().out


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
    monkeypatch.setattr(evaluate, "locate", locate)
    chat, process = Chat(args.llm), Process(0, 1, torch.device("cpu"))
    validation = evaluate.Validation(args, chat, CATEGORIES, process)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    score, n = validation.measure(model.train())
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert n == 100 and model.training

    middle = (37.5, 39.5)
    distances = [np.hypot(*(o.keypoints - middle).T) for o in validation.instances]
    shares = [(d < 0.2 * max(o.box[2:]))[o.visible].mean() for d, o in zip(distances, validation.instances)]
    assert 0.05 < score == pytest.approx(np.mean(shares))
    chosen = {o.annotation_id for o in validation.instances}
    assert len(chosen) == 100 and chosen < {o.annotation_id for o in instances}
    first = asked.copy()
    asked.clear()
    assert evaluate.Validation(args, chat, CATEGORIES, process).measure(model) == (score, n)
    assert asked == first


# ---------------------------------------------------------------------------------------- predictions, scored


@pytest.fixture
def scoring(checkpoint, tmp_path):
    """scoring(predictions) -> what scores them: a command line."""
    def make(predictions):
        path = tmp_path / "predictions.json"
        path.write_text(json.dumps(predictions))
        return ["--score", path, "--data", checkpoint / "data"]
    return make


def predict_all():
    return [{"annotation_id": 100 + i, "keypoints": [[1.0, 2]] * K} for i, K in enumerate([5, 3] * 3)]


def test_objects_without_prediction_are_left_out_by_permission_and_counted(scoring, tmp_path, capsys):
    report = tmp_path / "report.json"
    evaluate.main(command_line(*scoring(predict_all()[:2]), "--allow-missing", "--report", report))
    assert "without prediction: 4" in capsys.readouterr().out
    written = json.loads(report.read_text())
    assert (written["objects"], written["without prediction"], written["keypoints"]) == (2, 4, 8)
    assert "no prediction for 6 of 6 objects" in refused(evaluate, [*scoring([]), "--allow-missing"])


def test_predictions_of_other_objects_are_counted(scoring, tmp_path, capsys):
    others = [{"annotation_id": 9, "keypoints": []}, {"annotation_id": 8, "keypoints": [[1, 2]] * 99}]
    evaluate.main(command_line(*scoring(predict_all() + others), "--report", tmp_path / "report.json"))
    assert "predicted but not in the split: 2" in capsys.readouterr().out
    written = json.loads((tmp_path / "report.json").read_text())
    assert (written["objects"], written["predicted but not in the split"]) == (6, 2)


def replace_point(predictions, point):
    """The first instance's first point."""
    first, *others = predictions
    return [{**first, "keypoints": [point, *first["keypoints"][1:]]}, *others]


@pytest.mark.parametrize("spoil, message", [
    (lambda good: {"predictions": good}, r"be \[{"),
    (lambda good: [good[0]["keypoints"], *good[1:]], r"be \[{"),
    (lambda good: [{**good[0], "keypoints": sum(good[0]["keypoints"], [])}, *good[1:]], r"be \[{"),
    (lambda good: replace_point(good, [10**400, 1]), r"be \[{"),
    (lambda good: [*good, good[2]], "annotation 102 is predicted twice"),
    (lambda good: [{**good[0], "keypoints": good[0]["keypoints"][:4]}, *good[1:]],
     "annotation 100 has 4 keypoints predicted, 5 annotated"),
    (lambda good: replace_point(good, [1, float("nan")]), "annotation 100 has a point that is not two num"),
    (lambda good: replace_point(good, [1, 2, 0.9]), "annotation 100 has a point that is not two numbers"),
    (lambda good: good[:-1], "no prediction for 1 of 6 objects, e.g. annotation 105"),
], ids=["dict", "no ids", "flat", "huge", "twice", "too few points", "NaN", "three", "instance missing"])
def test_bad_predictions_are_one_clear_line(scoring, tmp_path, spoil, message):
    line = refused(evaluate, scoring(spoil(predict_all())))
    assert re.search(message, line)
    assert str(tmp_path / "predictions.json") in line


def test_predictions_may_be_null_and_by_permission_absent(checkpoint, tmp_path):
    data, path = checkpoint / "data", tmp_path / "predictions.json"
    instances = read_instances(data / "annotations" / "mp100_split1_test.json", CATEGORIES)
    path.write_text(json.dumps([{"annotation_id": 101, "keypoints": [None, [1, 2], None]},
                                {"annotation_id": 9, "keypoints": []}]))
    known, points, facts = evaluate.read_predictions(path, instances, allow_missing=True)
    assert ([o.annotation_id for o in known], points) == ([101], [[None, (1, 2), None]])
    assert facts == {"without prediction": 5, "predicted but not in the split": 1}
