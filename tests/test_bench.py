"""bench.py runs, and what it compares is really compared."""

import json
import shutil
from functools import partial
from pathlib import Path

import bench
import pytest
import torch
from checkpoints import edit_config

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    bench.save_random_weights("tiny", folder, "cpu")
    return folder


@pytest.fixture
def networks(folder):
    """The same network twice, ours and Transformers'."""
    model = bench.load(folder, "cpu", "fp32")
    return model, bench.Twin(folder, model)


def compare(runners):
    bench.check_answers({way: run() for way, run in runners.items()}, exact=True)


def rows_of(capsys, monkeypatch, folder, size):
    """Runs bench.py, each contestant once -> the rows it wrote. It must have printed the same."""
    def once(runners, repeats=1):
        return dict.fromkeys(runners, [1.0])

    monkeypatch.setattr(bench, "race", once)
    bench.main(["--size", size, "--json", str(folder / "rows.json")])
    ways = [line[2:44].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    rows = json.loads((folder / "rows.json").read_text())
    assert [row["way"] for row in rows] == ways
    return rows


def test_it_prints_every_contest_and_writes_it_down(capsys, monkeypatch, tmp_path):
    rows = rows_of(capsys, monkeypatch, tmp_path, "tiny")
    ways = [row["way"] for row in rows]
    assert ways.count(bench.OURS) == 2 + 3  # loading, training, answering
    assert ways.count(bench.PEFT) == 2 and ways.count(bench.CHECKPOINTED) == 1
    assert ways.count(bench.PLAIN) == ways.count(bench.PUBLISHED) == ways.count(bench.USED_WELL) == 3
    assert all(0 <= row["gib"] < 1 for row in rows)
    assert all((row["floor"] > 0) == (row["unit"] != "GB") for row in rows)


def test_the_big_size_has_micro_batches_and_more_photos(capsys, monkeypatch, tmp_path):
    """With the shape of the tiny one."""
    monkeypatch.setitem(bench.SIZES, "8b", bench.SIZES["tiny"])
    titles = {row["title"] for row in rows_of(capsys, monkeypatch, tmp_path, "8b")}
    assert {f"training step, {B} x 309 positions" for B in (1, 2, 4)} <= titles
    assert "answering, 17 keypoints, 8 photos at a time" in titles and len(titles) == 1 + 3 + 4


def test_real_backbones_answer_real_questions(capsys, monkeypatch, tmp_path, tiny):
    """Their tokenizer spells digits one by one, and the answers are equal to those of Transformers."""
    bench.save_random_weights("tiny", tmp_path, "cpu")
    shutil.copy(tiny / "llm/tokenizer.json", tmp_path / "llm")
    edit_config(bos_token_id=0, eos_token_id=1)(tmp_path / "llm")
    monkeypatch.setenv("CAPELLM_REAL", str(tmp_path))
    ways = [row["way"] for row in rows_of(capsys, monkeypatch, tmp_path, "real")]
    assert ways.count(bench.USED_WELL) >= 3 and ways.count(bench.OURS) >= 5


def test_noisy_rows_are_repeated_once_and_marked(capsys, monkeypatch):
    times = [{"a": [1.0, 3.0], bench.OURS: [1.0, 1.1, 1.2], "b": [1.0, 2.0]}, {"a": [1.0]}, {"b": [1.0, 1.5]}]
    monkeypatch.setattr(bench, "race", lambda runners: times.pop(0))
    runners = dict.fromkeys(["a", bench.OURS, "b"], lambda: None)
    bench.contest([], 1e9, "title", runners, lambda _: None, "photos")
    _, a, ours, b = capsys.readouterr().out.strip().splitlines()
    assert not times and "once" in a and "18% " in ours and "40%!" in b


@pytest.mark.skipif(torch.cuda.is_available() or not Path("/proc/self/status").exists(),
                    reason="memory of a GPU, or of no Linux")
def test_memory_is_what_a_run_needs_at_most():
    """A tensor of 256 MiB and then one of 128, beside one that was there before."""
    before = torch.ones(2**25)
    done, gib = bench.peak_memory(lambda: [torch.ones(n * 2**20).sum().item() for n in (64, 32)])
    assert done == [64 * 2**20, 32 * 2**20] and 0.23 < gib < 0.3 and len(before) == 2**25


def test_the_floor_counts_the_products_of_ours(capsys, monkeypatch):
    """Two products of 100 x 100 matrices are 4 million operations: 4 ms at 1 GFLOP/s, of 10 ms."""
    a = torch.ones(100, 100)
    monkeypatch.setattr(bench, "race", lambda runners: dict.fromkeys(runners, [0.01]))
    rows = []
    bench.contest(rows, 1e9, "title", {bench.OURS: lambda: a @ a @ a}, lambda _: None, "photos")
    assert rows[0]["floor"] == pytest.approx(0.004) and " 40%" in capsys.readouterr().out


def test_contestants_agree(networks):
    compare(bench.answering(*networks, bench.CHAT, 2, 16))
    bench.check_training(*networks, bench.training(*networks, 2)[1], exact=True)


def test_contestants_agree_where_the_position_table_is_resized(monkeypatch, tmp_path):
    """DINOv2's is for 518 pixels. Transformers would fit it to 224 by another factor than the original."""
    vit, llama = bench.SIZES["tiny"]
    monkeypatch.setitem(bench.SIZES, "tiny", (vit | dict(image_size=518), llama))
    bench.save_random_weights("tiny", tmp_path, "cpu")
    model = bench.load(tmp_path, "cpu", "fp32")
    twin, photos = bench.Twin(tmp_path, model), bench.make_photos(1, model)
    assert photos.shape[-1] == 224
    torch.testing.assert_close(twin.see(photos), model.see(photos), atol=1e-4, rtol=0)


def test_the_plain_loop_takes_a_pass_a_token(networks):
    """Ours: one for the photo, two for the answers. The plain loop: these, and one for each of 8 tokens."""
    passes = []
    networks[0].llama.norm.register_forward_hook(lambda *_: passes.append(1))
    runners = bench.answering(*networks, bench.CHAT, 1, 4)
    for way, expected in (bench.OURS, 3), (bench.PLAIN, 3 + 8):
        passes.clear()
        runners[way]()
        assert len(passes) == expected


def test_the_published_way_sees_the_photo_again_for_every_token(networks):
    """15 questions at a time: 13 times for the first 15, 13 times for the other two."""
    looks = []
    networks[1].vit.register_forward_hook(lambda module, args, out: looks.append(len(args[0])))
    runners = bench.answering(*networks, bench.CHAT, 1, 17)
    runners[bench.PUBLISHED]()
    assert looks == 13 * [15] + 13 * [2]
    looks.clear()
    runners[bench.USED_WELL]()
    assert looks == [1]


@pytest.mark.parametrize("way", [bench.PUBLISHED, bench.USED_WELL])
def test_another_answer_is_noticed(networks, way):
    """One wrong token in one answer of one contestant."""
    runners = bench.answering(*networks, bench.CHAT, 1, 4)
    tokens = runners[way]()
    tokens[-1][-1] += 1
    with pytest.raises(AssertionError, match=f"{way}: .* of the tokens are equal"):
        compare(runners | {way: lambda: tokens})


def test_equal_answers_to_all_questions_are_noticed(networks):
    """Contestants that agree would prove nothing."""
    runners = bench.answering(*networks, bench.CHAT, 1, 8)
    with pytest.raises(AssertionError, match="same answer"):
        compare(dict.fromkeys(runners, lambda: [runners[bench.OURS]()[0]] * 8))
    bench.check_answers(dict.fromkeys(runners, [[1, 2]] * 8), exact=True, is_real=True)


def test_an_answer_that_keeps_to_the_format_is_noticed(networks, monkeypatch):
    """Ours "if no answer kept to the format" would be faster than it says."""
    monkeypatch.setattr(bench, "locate", partial(bench.locate, constrained=True))
    with pytest.raises(AssertionError, match="kept to"):
        bench.answering(*networks, bench.CHAT, 1, 4)[bench.PLAIN]()


def test_other_training_is_noticed(networks, monkeypatch):
    model, twin = networks
    see = twin.see
    monkeypatch.setattr(twin, "see", lambda images: 1.05 * see(images))
    with pytest.raises(AssertionError, match="losses|gradients"):
        bench.check_training(model, twin, bench.training(model, twin, 1)[1], exact=True)
