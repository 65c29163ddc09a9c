"""tools/bench.py runs, and what it compares is really compared."""

import pytest
import torch

from tools import bench

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture
def networks():
    """The same network twice, ours and Transformers'."""
    model = bench.random_network("tiny", "cpu", "fp32")
    return model, bench.Twin(model)


@pytest.mark.parametrize("size, contests", [("tiny", 2 + 3), ("8b", 3 + 4)])
def test_it_prints_every_contest(capsys, monkeypatch, size, contests):
    """The largest with the shape of the tiny one; each contestant runs once."""
    monkeypatch.setitem(bench.SIZES, "8b", bench.SIZES["tiny"])
    monkeypatch.setattr(bench, "race", lambda runners: dict.fromkeys(runners, [1.0, 1.0, 3.0]))
    bench.main(["--size", size])
    lines = capsys.readouterr().out.splitlines()
    ways = [line[2:50].strip() for line in lines if line.startswith("  ")]
    assert sum("seconds" in line for line in lines) == ways.count(bench.OURS) == contests
    assert ways.count(bench.PUBLISHED) == ways.count(bench.USED_WELL) == contests - ways.count(bench.PEFT)
    assert all(" 200% " in line and " 1.00 " in line for line in lines if line.startswith("  "))


def test_a_race_is_run_in_turn_until_patience_ends():
    said, clock = [], iter(range(0, 1000, 10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.time, "perf_counter", lambda: next(clock))
        times = bench.race({"a": lambda: said.append("a"), "b": lambda: said.append("b")}, patience=25)
    assert times == {"a": [10] * 3, "b": [10] * 3} and "".join(said) == "ababab"


@pytest.mark.parametrize("needed, flop", [(False, 2e6), (True, 4e6)])
def test_the_products_with_weights_are_counted(needed, flop):
    """100 rows with weights of 100 x 100, twice if a gradient flows back."""
    layer, x = torch.nn.Linear(100, 100).requires_grad_(False), torch.ones(100, 100, requires_grad=needed)
    for _ in range(2):  # nothing is left of the first count
        assert bench.count_products(layer, lambda: layer(x)) == flop


def test_the_published_way_sees_the_photo_again_for_every_token(networks):
    """15 questions at a time: 13 times for the first 15, 13 times for the other two."""
    runners, looks = bench.answering(*networks, True, 1, 17), []
    networks[1].vit.register_forward_hook(lambda module, args, out: looks.append(len(args[0])))
    runners[bench.PUBLISHED]()
    assert looks == 13 * [15] + 13 * [2]
    looks.clear()
    runners[bench.USED_WELL]()
    assert looks == [1]


@pytest.mark.parametrize("is_published", [True, False])
def test_another_answer_is_noticed(networks, monkeypatch, is_published):
    """One wrong token in one answer of one contestant, or equal answers to all, which would prove nothing."""
    model, twin = networks
    generate = twin.generate

    def err(photos, photo_of, questions, published=False):
        answers = generate(photos, photo_of, questions, published)
        answers[-1][-1] += published == is_published
        return answers
    monkeypatch.setattr(twin, "generate", err)
    way = bench.PUBLISHED if is_published else bench.USED_WELL
    with pytest.raises(AssertionError, match=f"{way}: .* of the tokens are equal"):
        bench.answering(model, twin, True, 2, 5)
    torch.nn.init.zeros_(model.llama.lm_head.weight)
    with pytest.raises(AssertionError, match="same answer"):
        bench.answering(model, twin, True, 2, 5)


@pytest.mark.parametrize("n", [1, 3])
def test_other_training_is_noticed(networks, monkeypatch, n):
    model, twin = networks
    see = twin.see
    bench.training(model, twin, True, 2, n)
    monkeypatch.setattr(twin, "see", lambda images: 1.05 * see(images))
    with pytest.raises(AssertionError, match="losses|gradients"):
        bench.training(model, twin, True, 2, n)


@pytest.mark.parametrize("way", [bench.OURS, bench.PEFT])
def test_a_step_trains(networks, way):
    step, before = bench.training(*networks, True, 1, 2)[way], [p.clone() for p in bench.trained(networks[0])]
    step()
    assert not any(map(torch.equal, before, bench.trained(networks[0])))
