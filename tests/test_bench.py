"""tools/bench.py runs, and what it compares is really compared."""

import json
from pathlib import Path

import pytest
import torch

from tools import bench

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture
def networks():
    """The same network twice, ours and Transformers'."""
    model = bench.with_adapters(bench.random_network("tiny", "cpu", "fp32"))
    return model, bench.Twin(model)


def compare(runners):
    bench.check_answers({way: run() for way, run in runners.items()}, exact=True)


def rows_of(capsys, monkeypatch, folder, size):
    """Runs the benchmark, each contestant once -> the rows it wrote. It must have printed the same."""
    monkeypatch.setattr(bench, "race", lambda runners, repeats=1: dict.fromkeys(runners, [1.0]))
    bench.main(["--size", size, "--json", str(folder / "rows.json")])
    ways = [line[2:44].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    rows = json.loads((folder / "rows.json").read_text())
    assert [row["way"] for row in rows] == ways
    return rows


def test_it_prints_every_contest_and_writes_it_down(capsys, monkeypatch, tmp_path):
    rows = rows_of(capsys, monkeypatch, tmp_path, "tiny")
    ways = [row["way"] for row in rows]
    assert ways.count(bench.OURS) == 2 + 3  # training, answering
    assert ways.count(bench.PEFT) == 2 and ways.count(bench.CHECKPOINTED) == 1
    assert ways.count(bench.PUBLISHED) == ways.count(bench.USED_WELL) == 3
    assert all(0 <= row["gib"] < 1 and row["floor"] > 0 for row in rows)


def test_the_big_size_has_micro_batches_and_more_photos(capsys, monkeypatch, tmp_path):
    """With the shape of the tiny one."""
    monkeypatch.setitem(bench.SIZES, "8b", bench.SIZES["tiny"])
    titles = {row["title"] for row in rows_of(capsys, monkeypatch, tmp_path, "8b")}
    assert {"training step, 1 photo", "training step, 2 photos", "training step, 4 photos",
            "training step, 1 photo x 4 conversations"} <= titles
    assert "answering, 17 keypoints, 8 photos at a time" in titles and len(titles) == 4 + 4


def test_real_backbones_answer_real_questions(capsys, monkeypatch, tmp_path, tiny):
    """Digits are spelled one by one, positions are resized; the answers are equal to Transformers'."""
    monkeypatch.setenv("CAPELLM_REAL", str(tiny))
    ways = [row["way"] for row in rows_of(capsys, monkeypatch, tmp_path, "real")]
    assert ways.count(bench.USED_WELL) >= 3 and ways.count(bench.OURS) >= 5


def test_noisy_rows_are_repeated_once_and_marked(capsys, monkeypatch, networks):
    times = [{"a": [1.0, 3.0], bench.OURS: [1.0, 1.1, 1.2], "b": [1.0, 2.0]}, {"a": [1.0]}, {"b": [1.0, 1.5]}]
    monkeypatch.setattr(bench, "race", lambda runners: times.pop(0))
    runners = dict.fromkeys(["a", bench.OURS, "b"], lambda: None)
    bench.contest([], networks[0], 1e9, "title", runners, lambda _: None, "photos")
    _, a, ours, b = capsys.readouterr().out.strip().splitlines()
    assert not times and "once" in a and "18% " in ours and "40%!" in b


@pytest.mark.skipif(torch.cuda.is_available() or not Path("/proc/self/status").exists(),
                    reason="memory of a GPU, or of no Linux")
def test_memory_is_what_a_run_needs_at_most():
    """A tensor of 256 MiB and then one of 128, beside one that was there before."""
    before = torch.ones(2**25)
    done, gib = bench.peak_memory(lambda: [torch.ones(n * 2**20).sum().item() for n in (64, 32)])
    assert done == [64 * 2**20, 32 * 2**20] and 0.23 < gib < 0.3 and len(before) == 2**25


@pytest.mark.parametrize("needed, ms", [(False, 2), (True, 4)])
def test_the_floor_counts_the_products_of_ours(capsys, monkeypatch, needed, ms):
    """100 rows with weights of 100 x 100: 2 ms at 1 GFLOP/s, twice if a gradient flows back, of 10 ms."""
    layer, x = torch.nn.Linear(100, 100).requires_grad_(False), torch.ones(100, 100, requires_grad=needed)
    monkeypatch.setattr(bench, "race", lambda runners: dict.fromkeys(runners, [0.01]))
    rows = []
    bench.contest(rows, layer, 1e9, "title", {bench.OURS: lambda: layer(x)}, lambda _: None, "photos")
    assert rows[0]["floor"] == pytest.approx(ms / 1000) and f" {10 * ms}%" in capsys.readouterr().out


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
    """One wrong token in one answer of one contestant, or equal answers to all, which would prove nothing."""
    runners = bench.answering(*networks, bench.CHAT, 2, 5)
    compare(runners)
    tokens = runners[way]()
    with pytest.raises(AssertionError, match="same answer"):
        compare(dict.fromkeys(runners, lambda: tokens[:1] * 10))
    tokens[-1][-1] += 1
    with pytest.raises(AssertionError, match=f"{way}: .* of the tokens are equal"):
        compare(runners | {way: lambda: tokens})


@pytest.mark.parametrize("n", [1, 3])
def test_other_training_is_noticed(networks, monkeypatch, n):
    model, twin = networks
    batch, see = bench.training(model, twin, 2, n)[1], twin.see
    bench.check_training(model, twin, batch, exact=True)
    monkeypatch.setattr(twin, "see", lambda images: 1.05 * see(images))
    with pytest.raises(AssertionError, match="losses|gradients"):
        bench.check_training(model, twin, batch, exact=True)
