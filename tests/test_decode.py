"""decode.py: locate() says what the textbook's decoder says, and reads distributions off the same passes.

The networks are untrained or the toy's. Formats are made up so that some rows keep to them and others do not.
"""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, generate_all, load_parity, network_arguments

import decode
from chat import AnswerFormat, Category, write_point
from data import Crop, normalize
from decode import (
    DECODINGS,
    Prediction,
    answer_greedily,
    group_by_length,
    locate,
    mass_near,
    number_distribution,
    read_coordinates,
)
from model import DTYPES, load_network, load_weights, read_checkpoint

TOY = ROOT / "assets/toy"


class MadeUpChat:
    """What locate() asks of a Chat, over 512 tokens: with `n` choices a coordinate.

    With n = 1 a choice is from 250 tokens, with n = 3 from ten; their ids are in no order. All answers in the
    format are the same point.
    """

    def __init__(self, n):
        self.bos = 1
        more, digits = [[]] * (n - 1), [*range(100, 350 if n == 1 else 110)]
        random.Random(0).shuffle(digits)
        self.coordinates = AnswerFormat([[10, 11], *more, [12, 11], *more], digits, [13, 2], 4 + 2 * n)

    def learn(self, answer):
        """Makes the format that of this answer: the tokens known in it and the digits chosen."""
        assert len(answer) == self.coordinates.max_tokens
        known, chosen = self.split(answer)
        others = [token for token in range(20, 512) if token not in chosen]
        digits = [*dict.fromkeys(chosen), *others][:len(self.coordinates.digits)]
        self.coordinates = replace(self.coordinates, known=known, digits=digits)

    def split(self, answer):
        """An answer in the format -> the tokens before each choice, and the choices."""
        rest = iter(answer)
        parts = [([next(rest) for _ in known], next(rest)) for known in self.coordinates.known]
        return [known for known, _ in parts], [choice for _, choice in parts]

    def keeps_format(self, answer):
        """Whether an answer is in the format from its first token to its last choice."""
        if len(answer) != self.coordinates.max_tokens or not self.coordinates.known:
            return False
        known, chosen = self.split(answer)
        return known == self.coordinates.known and {*chosen} <= {*self.coordinates.digits}

    def parse(self, answer):
        return (0.25, 0.75) if self.keeps_format(answer) else None


def flat(lists):
    return sum(lists, [])


def untrained(shared, counts):
    """A network, photos of 4 x 4 patches, and counts[p] questions of unequal lengths about photo p."""
    model = load_parity(shared, image_size=56)
    lengths = iter(torch.randint(1, 40, (sum(counts),)).tolist())
    questions = [[torch.randint(3, 512, (next(lengths),)).tolist() for _ in range(n)] for n in counts]
    return model, torch.randn(len(counts), 3, 56, 56), questions


def load_toy(dtype="fp32"):
    """The trained toy, its Chat, a photo, and questions about it that have unequal lengths."""
    checkpoint = read_checkpoint(TOY / "ckpt.pt")
    model, chat = load_network(network_arguments(TOY, image_size=112), "cpu", dtype)
    load_weights(model.eval(), checkpoint, TOY / "ckpt.pt")
    asked = ["the knob on the antenna that is purple", "the sharp end of the green horn", "the orange heart"]
    questions = chat.encode_questions(Category("creature", [("first mark", text) for text in asked]))
    return model, chat, normalize(Crop(132.5, 108, 125).cut(TOY / "creature.jpg", 112)[None]), questions


@pytest.fixture
def fallen_back(monkeypatch):
    """A list that gets the number of questions whenever some are asked again in the textbook way."""
    numbers, ask = [], answer_greedily

    def ask_and_count(llama, cache, questions, answer_format):
        numbers.append(len(questions))
        return ask(llama, cache, questions, answer_format)
    monkeypatch.setattr(decode, "answer_greedily", ask_and_count)
    return numbers


# ------------------------------------------------------------------------------------------ the same tokens


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("counts", [[1], [3, 0, 4], [2, 1, 1, 3, 1], [9]])
@torch.no_grad()
def test_locate_says_what_the_textbooks_decoder_says(shared, n, counts):
    model, images, questions = untrained(shared, counts)
    chat = MadeUpChat(n)
    expected = generate_all(model, images, questions, chat)
    start = chat.coordinates.known[0][0]
    assert all(said[0] != start for said in expected)  # an untrained network keeps to no format
    for learned in [None, *expected[:2]]:  # but one row keeps to the end to what is learned from it
        if learned:
            chat.learn(learned)
        found = locate(model, images, questions, chat)
        assert [len(predictions) for predictions in found] == counts
        assert [p.answer for p in flat(found)] == expected
        check_what_is_known(flat(found), chat)
        assert not learned or any(p.x_distribution is not None for p in flat(found))


def check_what_is_known(predictions, chat):
    """Of an answer in the format there are distributions, of others not."""
    for p in predictions:
        if chat.keeps_format(p.answer):
            assert p.point == (0.25, 0.75) and 0 < p.confidence <= 1
            assert p.x_distribution.shape == p.y_distribution.shape == (1000,)
            assert p.x_distribution.sum() == pytest.approx(1) and p.y_distribution.sum() == pytest.approx(1)
        else:
            assert p == Prediction(None, None, p.answer, None, None)


QUESTIONS = {
    "no common beginning": [[[5, 6, 7], [8, 6, 7]], [[9]]],
    "equal": [[[5, 6, 7]] * 3, [[5, 6, 7]]],
    "equal, of one token": [[[5], [5]], [[5]]],
    "one begins another": [[[5, 6], [5, 6, 7, 8]], [[5, 6, 7]]],
    "one": [[], [[5, 6, 7]]],
    "none": [[], []],
}


@pytest.mark.parametrize("case", QUESTIONS)
@torch.no_grad()
def test_questions_may_begin_alike_or_not(shared, case):
    model, images, _ = untrained(shared, [0, 0])
    chat, questions = MadeUpChat(3), QUESTIONS[case]
    expected = generate_all(model, images, questions, chat)
    for learned in [None, *expected[:1]]:
        if learned:
            chat.learn(learned)
        found = locate(model, images, questions, chat)
        assert [len(predictions) for predictions in found] == [*map(len, questions)]
        assert [p.answer for p in flat(found)] == expected


@torch.no_grad()
def test_an_answer_that_ends_early_ends_with_the_end_token(shared):
    """Beside others that go on. The end token is one that some answer has."""
    model, images, questions = untrained(shared, [6])
    chat = MadeUpChat(3)
    first = generate_all(model, images, questions, chat)[0]
    chat.coordinates = replace(chat.coordinates, known=[], ending=[first[4]])
    expected = generate_all(model, images, questions, chat)
    assert len({*map(len, expected)}) > 1
    assert [p.answer for p in locate(model, images, questions, chat)[0]] == expected


@torch.no_grad()
def test_the_trained_toy_says_what_the_textbooks_decoder_says(fallen_back):
    model, chat, image, questions = load_toy()
    [found] = locate(model, image, [questions], chat)
    assert [p.answer for p in found] == generate_all(model, image, [questions], chat)
    assert all(p.point and p.confidence > 0.2 for p in found) and not fallen_back


@torch.no_grad()
def test_bf16_finds_the_same_points():
    points = {}
    for dtype in DTYPES:
        model, chat, image, questions = load_toy(dtype)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {DTYPES[dtype]}
        [found] = locate(model, image, [questions], chat, decode="median")
        points[dtype] = torch.tensor([p.point for p in found])
    assert not torch.equal(points["bf16"], points["fp32"])
    assert (points["bf16"] - points["fp32"]).abs().max() < 0.02


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_of_equal_logits_the_lowest_id_is_said_and_nothing_is_asked_again(shared, fallen_back, dtype, seed):
    """Ties are frequent in bf16. Here 25 digits are equally likely; their ids are in no order."""
    model, images, questions = untrained(shared, [5])
    questions, chat = [[[*question, 9] for question in questions[0]]], MadeUpChat(1)
    chat.coordinates = replace(chat.coordinates, known=[[10, 11], [12, 14]])
    numbers = np.random.default_rng(seed).permutation(250)
    likely_x, likely_y = numbers[:25], numbers[25:50]  # the numbers, not their tokens
    answer_by_last_token(model.llama.to(dtype), chat.coordinates, likely_x, likely_y)

    digits = np.array(chat.coordinates.digits)
    said = [10, 11, digits[likely_x].min(), 12, 14, digits[likely_y].min()]
    assert generate_all(model, images, questions, chat) == [said] * 5
    for constrained in False, True:
        for p in locate(model, images, questions, chat, constrained=constrained)[0]:
            assert p.answer == said
            for distribution, likely in (p.x_distribution, likely_x), (p.y_distribution, likely_y):
                found = distribution.reshape(250, 4).sum(1)  # 250 numbers share 0.000 ... 0.999
                assert {*np.flatnonzero(found > 0.02)} == {*likely}
    assert not fallen_back


@torch.no_grad()
def answer_by_last_token(llama, form, likely_x, likely_y):
    """Changes a network so that after 9 it says 10, after that 11, then x, 12, 14, y.

    x and y are any of the likely numbers, whose logits are equal. The other numbers' are a little lower.
    """
    digits = torch.tensor(form.digits)
    head, embeddings = llama.lm_head.weight.zero_(), llama.embed_tokens.weight
    steps = [([9], [10]), ([10], [11]), ([11], digits), (digits, [12]), ([12], [14]), ([14], digits)]
    for i, (tokens, following) in enumerate(steps):
        embeddings[tokens, i] += 50  # outweighs all that the layers add
        head[following, i] += 4
    for i, likely in (2, likely_x), (5, likely_y):
        head[digits[likely], i] += 1
# ---------------------------------------------------------------------------------- passes and distributions


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("n, passes", [(1, 3), (3, 7)])
@torch.no_grad()
def test_answers_in_the_format_take_a_pass_for_each_choice_and_few_logits(
        shared, monkeypatch, n, passes, constrained):
    """An untrained network keeps to no format, so that here nothing is asked again."""
    model, images, questions = untrained(shared, [4, 3])
    monkeypatch.setattr(decode, "answer_greedily", lambda *args: [[]] * 7)
    monkeypatch.setattr(decode, "group_by_length", lambda lengths: [[*range(len(lengths))]])
    chat, read, logits = MadeUpChat(n), [], []
    model.llama.norm.register_forward_hook(lambda _, args, __: read.append(args[0].shape[:2]))
    model.llama.lm_head.register_forward_hook(lambda _, args, __: logits.append(args[0].shape[:-1].numel()))
    locate(model, images, questions, chat, constrained=constrained)
    longest = max(map(len, flat(questions)))
    lengths = [longest + 2, *[1] * (n - 1), 3, *[1] * (n - 1)]
    assert read == [(2, 17), *((7, T) for T in lengths)] and len(read) == passes
    # each token of an answer once, nothing else; the choices alone need the logits of digits alone
    assert logits == ([] if constrained else [7 * chat.coordinates.max_tokens])


@torch.no_grad()
def test_constrained_answers_keep_the_format_and_choose_digits(shared):
    model, images, questions = untrained(shared, [2, 3])
    chat = MadeUpChat(3)
    found = flat(locate(model, images, questions, chat, constrained=True))
    assert len(found) == 5 and all(chat.keeps_format(p.answer) for p in found)
    check_what_is_known(found, chat)


@torch.no_grad()
def test_constrained_or_not_an_answer_in_the_format_has_the_same_distributions(shared):
    model, images, questions = untrained(shared, [1])
    chat = MadeUpChat(3)
    chat.learn(generate_all(model, images, questions, chat)[0])
    free, forced = (locate(model, images, questions, chat, constrained=c)[0][0] for c in (False, True))
    assert free.answer == forced.answer
    np.testing.assert_allclose(free.x_distribution, forced.x_distribution, atol=1e-6)
    np.testing.assert_allclose(free.y_distribution, forced.y_distribution, atol=1e-6)


@torch.no_grad()
def test_where_no_format_is_known_there_is_nothing_to_constrain(shared):
    model, images, questions = untrained(shared, [2, 3])
    chat = MadeUpChat(3)
    chat.coordinates = AnswerFormat([], [], [2], max_tokens=6)
    expected = generate_all(model, images, questions, chat)
    for constrained in False, True:
        found = flat(locate(model, images, questions, chat, constrained=constrained))
        assert found == [Prediction(None, None, said) for said in expected]


@pytest.mark.parametrize("n", [1, 3])
@torch.no_grad()
def test_distributions_are_those_over_the_digits(shared, n):
    """In the order of numbers, not of ids. By hand, from the whole sequence read at once."""
    model, images, [[question]] = untrained(shared, [1])
    chat = MadeUpChat(n)
    [[p]] = locate(model, images, [[question]], chat, constrained=True)
    known, chosen = chat.split(p.answer)
    assert known == chat.coordinates.known
    tokens, by_hand = [chat.bos, *question], []
    for before, choice in zip(known, chosen):
        tokens += before
        hidden = model.llama(model.join(images, torch.tensor([tokens])))[0, -1]
        scores = model.llama.lm_head(hidden)[chat.coordinates.digits].exp()
        by_hand.append((scores / scores.sum()).numpy())
        assert choice == chat.coordinates.digits[scores.argmax()]
        tokens.append(choice)
    for ours, theirs in (p.x_distribution, by_hand[:n]), (p.y_distribution, by_hand[n:]):
        np.testing.assert_allclose(ours, number_distribution(theirs), atol=1e-6)


@torch.no_grad()
def test_locate_reads_coordinates_in_the_way_asked_for(shared):
    model, images, questions = untrained(shared, [2])
    for decoding in "median", "mean":
        for p in locate(model, images, questions, MadeUpChat(1), decoding, constrained=True)[0]:
            for coordinate, distribution in zip(p.point, (p.x_distribution, p.y_distribution)):
                if decoding == "median":
                    v = round(1000 * coordinate)
                    assert distribution[:v].sum() < 0.5 <= distribution[:v + 1].sum()
                else:
                    mean = np.average(np.arange(1000), weights=distribution) / 1000
                    assert coordinate == pytest.approx(mean)


def test_questions_of_like_length_are_asked_together():
    assert group_by_length([61, 45, 66, 47]) == [[1, 3], [0, 2]]  # the example of its docstring
    lengths = np.random.default_rng(0).integers(1, 300, 200).tolist()
    groups = group_by_length(lengths, 16)
    assert sorted(flat(groups)) == [*range(200)]
    spans = [(min(lengths[i] for i in group), max(lengths[i] for i in group)) for group in groups]
    assert all(most - least < 16 for least, most in spans)
    assert all(after - before >= 16 for (before, _), (after, _) in zip(spans, spans[1:]))
    assert group_by_length([]) == []


# ------------------------------------------------------------------------------------------------ coordinates


def digit(**likely):
    """A distribution over the ten digits, e.g. digit(_2=0.7, _1=0.3)."""
    return np.array([likely.get(f"_{d}", 0.0) for d in range(10)])


def test_number_distribution_of_three_digits_by_hand():
    p = number_distribution([digit(_2=0.7, _1=0.3), digit(_0=0.9, _1=0.1), digit(_5=0.6, _0=0.4)])
    expected = np.zeros(1000)
    expected[100:200] = 0.3 / 100  # what follows a 1 is unknown
    expected[210:220] = 0.7 * 0.1 / 10  # and what follows 21
    expected[205] = 0.7 * 0.9 * 0.6
    expected[200] = 0.7 * 0.9 * 0.4
    np.testing.assert_allclose(p, expected, atol=1e-12)
    assert p[200:210].sum() == pytest.approx(0.63)


def test_number_distribution_of_one_token_is_its_own():
    choice = np.random.default_rng(0).dirichlet(np.ones(1000))
    np.testing.assert_allclose(number_distribution([choice]), choice)


def test_number_distribution_sums_to_one_in_spite_of_rounding():
    choices = np.random.default_rng(0).dirichlet(np.ones(10), 3).astype(np.float16)
    assert number_distribution([*choices]).sum() == pytest.approx(1, abs=1e-12)


def test_mass_near_by_hand():
    p = np.zeros(1000)
    p[[199, 201, 300, 399, 401]] = 0.1, 0.2, 0.3, 0.15, 0.25
    assert mass_near(0.3, p) == pytest.approx(0.2 + 0.3 + 0.15)
    assert mass_near(0.3, p, reach=0.05) == pytest.approx(0.3)
    assert mass_near(0.3005, p, reach=0.2) == pytest.approx(1)
    assert mass_near(0.0, p) == 0
    assert isinstance(mass_near(0.3, p), float)


def certain(number):
    return [digit(**{f"_{d}": 1.0}) for d in number]


@pytest.mark.parametrize("chat", ["tiny"], indirect=True)
def test_a_point_in_doubt_between_0_199_and_0_201(chat):
    x = [digit(_2=0.55, _1=0.45), digit(_0=1), digit(_1=1)]  # 0.201: 55 %; 0.100 ... 0.199: 0.45 % each
    y = [digit(_5=0.8, _7=0.2), *certain("00")]  # 0.500: 80 %; 0.700 ... 0.799: 0.2 % each
    said = chat.encode(write_point((0.201, 0.5)))[:chat.coordinates.max_tokens]

    greedy, median, mean = (read_coordinates(said, [*x, *y], chat, decoding) for decoding in DECODINGS)
    assert greedy.point == median.point == (0.201, 0.5)
    assert mean.point == pytest.approx((0.55 * 0.201 + 0.45 * 0.1495, 0.8 * 0.5 + 0.2 * 0.7495))
    assert greedy.confidence == median.confidence == pytest.approx((0.55 + 99 * 0.0045) * 0.8)  # not 0.100
    assert mean.confidence == pytest.approx(1 * 0.8)
    for p in greedy, median, mean:
        assert p.answer == said
        np.testing.assert_allclose(p.x_distribution, number_distribution(x))
        np.testing.assert_allclose(p.y_distribution, number_distribution(y))


@pytest.mark.parametrize("chat", ["tiny"], indirect=True)
def test_the_median_may_lie_where_no_digit_was_chosen(chat):
    x = [digit(_1=0.4, _2=0.35, _3=0.25), *certain("03")]  # 0.103: 40 %; 0.200 ... 0.299: 0.35 % each
    said = chat.encode(write_point((0.103, 0.103)))[:chat.coordinates.max_tokens]
    assert read_coordinates(said, [*x, *x], chat).point == (0.103, 0.103)
    assert read_coordinates(said, [*x, *x], chat, "median").point == (0.228, 0.228)  # 40 + 29 * 0.35 > 50
    mean = 0.4 * 0.103 + 0.35 * 0.2495 + 0.25 * 0.3495
    assert read_coordinates(said, [*x, *x], chat, "mean").point == pytest.approx((mean, mean))


@pytest.mark.parametrize("chat", ["tiny"], indirect=True)
def test_without_distributions_a_point_is_as_said(chat):
    said = chat.encode(write_point((0.199, 0.5)))
    for decoding in DECODINGS:
        assert read_coordinates(said, None, chat, decoding) == Prediction((0.199, 0.5), None, said)
