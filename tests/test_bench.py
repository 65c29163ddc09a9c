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


def test_it_prints_every_contest_and_writes_it_down(capsys, monkeypatch, tmp_path):
    def once(runners, repeats=1):
        for run in runners.values():
            run()
        return dict.fromkeys(runners, [1.0])

    monkeypatch.setattr(bench, "race", once)
    monkeypatch.setattr(bench, "peak_memory", lambda run, *job: (1.0, 0.5))
    bench.main(["--size", "tiny", "--json", str(tmp_path / "rows.json")])
    ways = [line[2:44].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["way"] for row in rows] == ways and rows[0]["memory"] == [1.0, 0.5]
    assert ways.count(bench.OURS) == 1 + 3 + 2  # training, answering, cropping
    assert ways.count(bench.PEFT) == 1
    assert ways.count(bench.PLAIN) == ways.count(bench.PUBLISHED) == ways.count(bench.USED_WELL) == 3


def test_noisy_rows_are_marked(capsys):
    bench.print_rows("title", "photos", {bench.OURS: [1.0, 1.1, 1.2], bench.PEFT: [1.0, 1.1, 1.4]}, 1)
    _, ours, noisy = capsys.readouterr().out.strip().splitlines()
    assert "18% " in ours and "36%!" in noisy


def test_contestants_agree(model):
    bench.answers_table(model, "tiny", [(2, 16)], exact=True, timed=False)
    bench.training_table(model, "tiny", [2], exact=True, timed=False)


def test_the_plain_loop_takes_a_pass_a_token(model):
    """Ours: one for the photo, two for the answers. The plain loop: these, and one for each of 8 tokens."""
    passes = []
    model.llama.norm.register_forward_hook(lambda *_: passes.append(1))
    runners, _ = bench.answering(model, 1, 4)
    for way, expected in (bench.OURS, 3), (bench.PLAIN, 3 + 8):
        passes.clear()
        runners[way]()
        assert len(passes) == expected


def test_the_published_way_sees_the_photo_again_for_every_token(model):
    """15 questions at a time: 13 times for the first 15, 13 times for the other two."""
    looks = []
    bench.Twin(model).vit.register_forward_hook(lambda module, args, out: looks.append(len(args[0])))
    runners, _ = bench.answering(model, 1, 17)
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
        bench.answers_table(model, "tiny", [(1, 4)], exact=True, timed=False)


def test_answers_out_of_the_format_are_noticed(model):
    model.llama.lm_head.weight.data[5] *= -1  # "." no longer follows "0"
    with pytest.raises(AssertionError, match="format"):
        bench.answers_table(model, "tiny", [(1, 4)], exact=True, timed=False)


def test_other_training_is_noticed(model, monkeypatch):
    twin = bench.Twin(model)
    see = twin.see
    monkeypatch.setattr(twin, "see", lambda images: 1.05 * see(images))
    with pytest.raises(AssertionError, match="losses|gradients"):
        bench.training_table(model, "tiny", [1], exact=True, timed=False)


def test_peak_memory_is_that_of_a_process_of_its_own():
    peak, before = bench.peak_memory(None, "tiny", "training", bench.OURS, 1)
    assert 0.05 < before < peak < 4
