"""tools/bench.py runs, and what it compares is really compared."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tools import bench


@pytest.fixture
def networks():
    """The same network twice, ours and with Transformers' Llama."""
    return bench.make_networks("tiny", "cpu", "fp32")


def test_it_prints_every_contest(capsys, monkeypatch):
    """Each contestant runs once more after the comparison."""
    clock = iter(range(0, 10**6, 50))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    bench.main(["--size", "tiny"])
    lines = capsys.readouterr().out.splitlines()
    ways = [line[2:50].strip() for line in lines if line.startswith("  ")]
    assert sum("seconds" in line for line in lines) == ways.count(bench.OURS) == 3 + 3
    assert ways.count(bench.PUBLISHED) == ways.count(bench.USED_WELL) == ways.count(bench.PEFT) == 3
    assert all(line.split()[-3:] == ["50", "0%", "1.00"] for line in lines if line.startswith("  "))


def test_a_contest_is_run_in_turn_until_patience_ends(capsys, monkeypatch):
    """Ours takes 10, 20, 30 s, the other ever 40: 3 turns and 2, medians 20 and 40."""
    said, clock = [], iter([0, 10, 0, 40, 0, 20, 0, 40, 0, 30])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    bench.contest("title", {bench.OURS: lambda: said.append("a"), "b": lambda: said.append("b")}, patience=60)
    ours, other = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert "".join(said) == "ababa"
    assert ours[1:] == ["20", "100%", "1.00"] and other[1:] == ["40", "0%", "2.00"]


def test_in_bf16_results_may_differ(capsys):
    """As on a GPU. How far they are apart is printed, and ends nothing."""
    networks = bench.make_networks("tiny", "cpu", "bf16")
    bench.training(*networks, 1, 2)
    bench.answering(*networks, 1, 5)
    assert all(float(line.split()[-2]) < 0.5 for line in capsys.readouterr().out.splitlines())
    assert {p.dtype for p in bench.trained(networks[0])} == {torch.float32}
    assert networks[1].llama.dtype == networks[0].llama.norm.weight.dtype == torch.bfloat16


def test_the_published_way_sees_the_photo_again_for_every_token(networks):
    """15 questions at a time: 13 times for the first 15, 13 times for the other two."""
    ways, looks = bench.answering(*networks, 1, 17), []
    networks[1].vit.register_forward_hook(lambda module, args, out: looks.append(len(args[0])))
    ways[bench.PUBLISHED]()
    assert looks == 13 * [15] + 13 * [2]
    looks.clear()
    ways[bench.USED_WELL]()
    ways[bench.OURS]()
    assert looks == [1, 1]


@pytest.mark.parametrize("is_published", [True, False])
def test_another_answer_is_noticed(networks, monkeypatch, is_published):
    """One wrong token in one answer of one contestant, or equal answers to all, which would prove nothing."""
    ours, theirs = networks
    generate = theirs.generate

    def err(images, photo_of, questions, published=False):
        answers = generate(images, photo_of, questions, published)
        answers[-1][-1] += published == is_published
        return answers
    monkeypatch.setattr(theirs, "generate", err)
    with pytest.raises(AssertionError, match=bench.PUBLISHED if is_published else bench.USED_WELL):
        bench.answering(ours, theirs, 2, 5)
    torch.nn.init.zeros_(ours.llama.lm_head.weight)
    with pytest.raises(AssertionError, match="same answer"):
        bench.answering(ours, theirs, 2, 5)


@pytest.mark.parametrize("n", [1, 3])
def test_other_training_is_noticed(networks, monkeypatch, n):
    ours, theirs = networks
    embed = theirs.embed
    bench.training(ours, theirs, 2, n)
    monkeypatch.setattr(theirs, "embed", lambda images, tokens: 1.01 * embed(images, tokens))
    with pytest.raises(AssertionError, match="PEFT"):
        bench.training(ours, theirs, 2, n)


@pytest.mark.parametrize("way", [bench.OURS, bench.PEFT])
def test_a_step_makes_gradients_of_all_that_trains(networks, way):
    """With dropout: they differ from step to step."""
    network = networks[way == bench.PEFT]
    step, gradients = bench.training(*networks, 1, 2)[way], []
    for _ in range(2):
        step()
        gradients.append([p.grad.clone() for p in bench.trained(network)])
    assert len(gradients[0]) == 2 * 2 * 2 + 2 * 2 * 2 + 2 and not any(map(torch.equal, *gradients))
    assert not network.training
