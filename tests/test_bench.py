"""bench.py runs, and what it compares is really compared."""

import json

import pytest
import torch

import bench

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture
def model():
    return bench.build("tiny", "cpu", torch.float32)


def compare(model, P, K):
    bench.check_answers({way: run() for way, run in bench.answering(model, P, K).items()}, exact=True)


def rows_of(capsys, monkeypatch, folder, size):
    """Runs bench.py, each contestant once -> the rows it wrote. It must have printed the same."""
    def once(runners, repeats=1):
        return dict.fromkeys(runners, [1.0])

    monkeypatch.setattr(bench, "race", once)
    bench.main(["--size", size, "--json", str(folder / "rows.json")])
    ways = [line[2:44].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    rows = json.loads((folder / "rows.json").read_text())["rows"]
    assert [row["way"] for row in rows] == ways
    return rows


def test_it_prints_every_contest_and_writes_it_down(capsys, monkeypatch, tmp_path):
    rows = rows_of(capsys, monkeypatch, tmp_path, "tiny")
    ways = [row["way"] for row in rows]
    assert ways.count(bench.OURS) == 1 + 3  # training, answering
    assert ways.count(bench.PEFT) == ways.count(bench.CHECKPOINTED) == 1
    assert ways.count(bench.PLAIN) == ways.count(bench.PUBLISHED) == ways.count(bench.USED_WELL) == 3
    assert all(0.05 < before <= peak < 4 for peak, before in (row["memory"] for row in rows))


def test_the_big_size_has_micro_batches_and_more_photos(capsys, monkeypatch, tmp_path):
    """With the shape of the tiny one, and without loading."""
    monkeypatch.setitem(bench.SIZES, "8b", bench.SIZES["tiny"])
    monkeypatch.setattr(bench, "loading_table", lambda *_: None)
    titles = {row["title"] for row in rows_of(capsys, monkeypatch, tmp_path, "8b")}
    assert {f"training step, {B} x 309 positions" for B in (1, 2, 4)} <= titles
    assert "answering, 17 keypoints, 8 photos at a time" in titles and len(titles) == 3 + 4


def test_real_backbones_answer_real_questions(capsys, monkeypatch, tmp_path, tiny):
    """Their tokenizer spells digits one by one, and the answers are equal to those of Transformers."""
    monkeypatch.setenv("CAPELLM_REAL", str(tiny))
    monkeypatch.setattr(bench, "loading_table", lambda *_: None)
    ways = [row["way"] for row in rows_of(capsys, monkeypatch, tmp_path, "real")]
    assert ways.count(bench.USED_WELL) >= 3 and ways.count(bench.OURS) >= 4


def test_noisy_rows_are_repeated_once_and_marked(capsys, monkeypatch):
    times = [{"a": [1.0, 3.0], bench.OURS: [1.0, 1.1, 1.2], "b": [1.0, 2.0]}, {"a": [1.0]}, {"b": [1.0, 1.5]}]
    monkeypatch.setattr(bench, "race", lambda runners: times.pop(0))
    bench.contest("title", dict.fromkeys(["a", bench.OURS, "b"], lambda: None), lambda _: None, "photos")
    _, a, ours, b = capsys.readouterr().out.strip().splitlines()
    assert not times and "once" in a and "18% " in ours and "40%!" in b


def test_contestants_agree(model):
    compare(model, 2, 16)
    bench.check_training(model, bench.training(model, 2)[1], exact=True)


def test_the_plain_loop_takes_a_pass_a_token(model):
    """Ours: one for the photo, two for the answers. The plain loop: these, and one for each of 8 tokens."""
    passes = []
    model.llama.norm.register_forward_hook(lambda *_: passes.append(1))
    runners = bench.answering(model, 1, 4)
    for way, expected in (bench.OURS, 3), (bench.PLAIN, 3 + 8):
        passes.clear()
        runners[way]()
        assert len(passes) == expected


def test_the_published_way_sees_the_photo_again_for_every_token(model):
    """15 questions at a time: 13 times for the first 15, 13 times for the other two."""
    looks = []
    bench.Twin(model).vit.register_forward_hook(lambda module, args, out: looks.append(len(args[0])))
    runners = bench.answering(model, 1, 17)
    runners[bench.PUBLISHED]()
    assert looks == 13 * [15] + 13 * [2]
    looks.clear()
    runners[bench.USED_WELL]()
    assert looks == [1]


@pytest.mark.parametrize("way", [bench.PLAIN, bench.PUBLISHED, bench.USED_WELL])
def test_another_answer_is_noticed(model, monkeypatch, way):
    """One wrong token in one answer of one contestant."""
    answer = bench.answer

    def wrong(asked, *args):
        tokens = answer(asked, *args)
        tokens[-1][-1] += asked == way
        return tokens

    monkeypatch.setattr(bench, "answer", wrong)
    with pytest.raises(AssertionError, match=f"{way}: .* of the tokens are equal"):
        compare(model, 1, 4)


def test_answers_out_of_the_format_are_noticed(model):
    model.llama.lm_head.weight.data[5] *= -1  # "." no longer follows "0"
    with pytest.raises(AssertionError, match="format"):
        compare(model, 1, 4)


def test_other_training_is_noticed(model, monkeypatch):
    twin = bench.Twin(model)
    see = twin.see
    monkeypatch.setattr(twin, "see", lambda images: 1.05 * see(images))
    with pytest.raises(AssertionError, match="losses|gradients"):
        bench.check_training(model, bench.training(model, 1)[1], exact=True)
