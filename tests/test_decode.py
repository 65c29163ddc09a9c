"""decode.py: locate() says what the textbook's decoder says, and reads distributions off the same passes.

Networks are untrained. Formats are made up so that some rows keep to them and others do not.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import MadeUpChat, generate_all, load_parity

import decode
from chat import write_point
from decode import DECODINGS, Prediction, answer_greedily, locate, make_prediction, number_distribution


def flat(lists):
    return sum(lists, [])


def untrained(shared, counts):
    """A network, photos of 4 x 4 patches, and counts[p] questions of unequal lengths about photo p."""
    model = load_parity(shared, image_size=56)
    lengths = iter(torch.randint(1, 40, (sum(counts),)).tolist())
    questions = [[torch.randint(3, 512, (next(lengths),)).tolist() for _ in range(n)] for n in counts]
    return model, torch.randn(len(counts), 3, 56, 56), questions


@pytest.fixture
def fallen_back(monkeypatch):
    """A list that gets the number of questions whenever some are asked again in the textbook way."""
    numbers, ask = [], answer_greedily

    def ask_and_count(llama, cache, questions, answer_format):
        numbers.append(len(questions))
        return ask(llama, cache, questions, answer_format)
    monkeypatch.setattr(decode, "answer_greedily", ask_and_count)
    return numbers

QUESTIONS = {
    "of any length": [2, 0, 2],  # so many about each photo
    "no common beginning": [[[5, 6, 7], [8, 6, 7]], [[9]]],
    "equal": [[[5, 6, 7]] * 3, [[5, 6, 7]]],
    "equal, of one token": [[[5], [5]], [[5]]],
    "one begins another": [[[5, 6], [5, 6, 7, 8]], [[5, 6, 7]]],
    "one": [[], [[5, 6, 7]]],
    "none": [[], []],
}


@pytest.mark.parametrize("case, n", [("of any length", 1), *((case, 3) for case in QUESTIONS)])
@torch.no_grad()
def test_locate_says_what_the_textbooks_decoder_says(shared, case, n):
    is_random = case == "of any length"
    model, images, questions = untrained(shared, QUESTIONS[case] if is_random else [0, 0])
    questions, chat = questions if is_random else QUESTIONS[case], MadeUpChat(n)
    expected = generate_all(model, images, questions, chat)
    for learned in [None, *expected[:1]]:  # one row keeps to the end to what is learned from it
        if learned:
            chat.learn(learned)
        found = locate(model, images, questions, chat)
        assert [*map(len, found)] == [*map(len, questions)]
        assert [p.answer for p in flat(found)] == expected
        check_what_is_known(flat(found), chat)
        assert any(p.x_distribution is not None for p in flat(found)) == bool(learned)


def check_what_is_known(predictions, chat):
    """Of an answer in the format there are distributions, of others not."""
    for p in predictions:
        if chat.parse(p.answer):
            assert p.point == (0.25, 0.75) and 0 < p.confidence <= 1
            assert p.x_distribution.shape == p.y_distribution.shape == (1000,)
            assert p.x_distribution.sum() == pytest.approx(1) and p.y_distribution.sum() == pytest.approx(1)
        else:
            assert p == Prediction(None, None, p.answer, None, None)


@torch.no_grad()
def test_without_a_format_an_answer_ends_with_the_end_token(shared):
    """Beside others that go on. The end token is one that some answer has. There is nothing to constrain."""
    model, images, questions = untrained(shared, [1, 3])
    chat = MadeUpChat(3)
    first = generate_all(model, images, questions, chat)[0]
    chat.coordinates = replace(chat.coordinates, known=[], ending=[first[4]])
    expected = generate_all(model, images, questions, chat)
    assert len({*map(len, expected)}) > 1
    for constrained in False, True:
        found = flat(locate(model, images, questions, chat, constrained=constrained))
        assert found == [Prediction(None, None, said) for said in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_of_equal_logits_the_lowest_id_is_said_and_nothing_is_asked_again(shared, fallen_back, dtype):
    """Ties are frequent in bf16. Here 25 digits are equally likely; their ids are in no order."""
    model, images, questions = untrained(shared, [5])
    questions, chat = [[[*question, 9] for question in questions[0]]], MadeUpChat(1)
    chat.coordinates = replace(chat.coordinates, known=[[10, 11], [12, 14]])
    numbers = np.random.default_rng(0).permutation(250)
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


@pytest.mark.parametrize("n", [1, 3])
@torch.no_grad()
def test_distributions_are_those_over_the_digits(shared, n):
    """In the order of numbers, not of ids. By hand, from the whole sequence read at once.

    Constrained, every answer has them; unconstrained the first question's, in whose format it answers.
    """
    model, images, questions = untrained(shared, [2, 1])
    chat = MadeUpChat(n)
    forced = locate(model, images, questions, chat, constrained=True)
    for image, asked, of_photo in zip(images, questions, forced):
        for question, p in zip(asked, of_photo, strict=True):
            check_by_hand(model, image, question, chat, p)
    chat.learn(generate_all(model, images, questions, chat)[0])
    check_by_hand(model, images[0], questions[0][0], chat, locate(model, images, questions, chat)[0][0])


def check_by_hand(model, image, question, chat, p):
    known, chosen = chat.split(p.answer)
    assert known == chat.coordinates.known
    tokens, by_hand = [chat.bos, *question], []
    for before, choice in zip(known, chosen):
        tokens += before
        hidden = model.llama(model.embed(image[None], torch.tensor([tokens])))[0, -1]
        scores = model.llama.lm_head(hidden)[chat.coordinates.digits].exp()
        by_hand.append((scores / scores.sum()).numpy())
        assert choice == chat.coordinates.digits[scores.argmax()]
        tokens.append(choice)
    n = len(chosen) // 2
    for ours, theirs in (p.x_distribution, by_hand[:n]), (p.y_distribution, by_hand[n:]):
        np.testing.assert_allclose(ours, number_distribution(theirs), atol=1e-6)


@torch.no_grad()
def test_locate_reads_coordinates_in_the_way_asked_for(shared):
    model, images, questions = untrained(shared, [2])
    for decoding, point_of in (("median", lambda p: (p.cumsum() < 0.5).sum() / 1000),
                               ("mean", lambda p: np.average(np.arange(1000), weights=p) / 1000)):
        for p in locate(model, images, questions, MadeUpChat(1), decoding, constrained=True)[0]:
            assert p.point == pytest.approx((point_of(p.x_distribution), point_of(p.y_distribution)))


def test_questions_of_like_length_are_asked_together():
    assert decode.group_by_length([61, 45, 66, 47]) == [[1, 3], [0, 2]]  # the example of its docstring
    lengths = np.random.default_rng(0).integers(1, 300, 200).tolist()
    groups = decode.group_by_length(lengths, 16)
    assert sorted(flat(groups)) == [*range(200)]
    assert all(max(lengths[i] for i in group) - min(lengths[i] for i in group) < 16 for group in groups)
    assert decode.group_by_length([]) == []


def digit(**likely):
    """A distribution over the ten digits, e.g. digit(_2=0.7, _1=0.3)."""
    return np.array([likely.get(f"_{d}", 0.0) for d in range(10)])


def certain(number):
    return [digit(**{f"_{d}": 1.0}) for d in number]


def test_number_distribution_by_hand():
    p = number_distribution([digit(_2=0.7, _1=0.3), digit(_0=0.9, _1=0.1), digit(_5=0.6, _0=0.4)])
    expected = np.zeros(1000)
    expected[100:200] = 0.3 / 100  # what follows a 1 is unknown
    expected[210:220] = 0.7 * 0.1 / 10  # and what follows 21
    expected[205] = 0.7 * 0.9 * 0.6
    expected[200] = 0.7 * 0.9 * 0.4
    np.testing.assert_allclose(p, expected, atol=1e-12)
    of_one_token = np.random.default_rng(0).dirichlet(np.ones(1000))
    np.testing.assert_allclose(number_distribution([of_one_token]), of_one_token)
    rounded = np.random.default_rng(0).dirichlet(np.ones(10), 3).astype(np.float16)
    assert number_distribution([*rounded]).sum() == pytest.approx(1, abs=1e-12)


def test_mass_near_by_hand():
    p = np.zeros(1000)
    p[[199, 201, 300, 399, 401]] = 0.1, 0.2, 0.3, 0.15, 0.25
    assert decode.mass_near(0.3, p) == pytest.approx(0.2 + 0.3 + 0.15)
    assert decode.mass_near(0.3, p, reach=0.05) == pytest.approx(0.3)
    assert decode.mass_near(0.0, p) == 0


@pytest.mark.parametrize("chat", ["tiny"], indirect=True)
def test_a_point_in_doubt_between_0_199_and_0_201(chat):
    x = [digit(_2=0.55, _1=0.45), digit(_0=1), digit(_1=1)]  # 0.201: 55 %; 0.100 ... 0.199: 0.45 % each
    y = [digit(_5=0.8, _7=0.2), *certain("00")]  # 0.500: 80 %; 0.700 ... 0.799: 0.2 % each
    said = chat.encode(write_point((0.201, 0.5)))[:chat.coordinates.max_tokens]

    greedy, median, mean = (make_prediction(said, [*x, *y], chat, decoding) for decoding in DECODINGS)
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
    assert make_prediction(said, [*x, *x], chat).point == (0.103, 0.103)
    assert make_prediction(said, [*x, *x], chat, "median").point == (0.228, 0.228)  # 40 + 29 * 0.35 > 50
