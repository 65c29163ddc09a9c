"""decode.py against the plainest decoding: the whole sequence read again for each new token.

The networks are untrained. Formats are made up so that some rows keep to them and others do not.
"""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from chat import AnswerFormat, Chat, spell
from decode import (
    Conversations,
    Prediction,
    answer_in_format,
    answer_plainly,
    answer_questions,
    locate,
    mass_near,
    number_distribution,
    read_coordinates,
    start_conversations,
)
from llama import Llama, LlamaConfig
from model import CapeLLM


class TinyChat(Chat):
    """A Chat over the 512 made-up tokens of the authors' toy network, with `n` choices a coordinate.

    With n = 1 a choice is from 250 tokens, with n = 3 from ten. Every answer in the format is the same point.
    """

    def __init__(self, n):
        self.bos, self.eos, self.newline, self.opening, self.keypoint = 1, 2, [3], [], None
        self.words = AnswerFormat([], [], [2], max_tokens=5)
        more = [[]] * (n - 1)
        self.coordinates = AnswerFormat(
            known=[[10, 11], *more, [12, 11], *more], digits=[*range(100, 350 if n == 1 else 110)],
            ending=[13, 2], max_tokens=4 + 2 * n)

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


# ---------------------------------------------------------------- what locate() must equal, without decode.py


def last_state(model, image, tokens):
    """The hidden state after BOS, a photo and more tokens, the whole sequence read at once."""
    text = model.llama.embed_tokens(torch.tensor(tokens))
    return model.llama(torch.cat((text[:1], image, text[1:]))[None])[0, -1]


def say(model, image, tokens, form):
    """Greedy decoding in the plain way: the whole sequence is read again for each new token."""
    said = []
    while len(said) < form.max_tokens and said[-1:] != form.ending[-1:]:
        said.append(model.llama.lm_head(last_state(model, image, tokens + said)).argmax().item())
    return said


def one_by_one(model, images, questions, chat):
    """The answer to each question, asked alone."""
    return [say(model, image, [chat.bos, *chat.newline, *question], chat.coordinates)
            for image, asked in zip(model.see(images), questions) for question in asked]


def one_after_another(model, image, tokens, asked, chat):
    """The answers to a photo's questions in one conversation, which begins with some tokens."""
    answers = []
    for question in asked:
        said = say(model, image, tokens + question, chat.coordinates)
        tokens = tokens + question + said + (chat.coordinates.ending if said[-1] != chat.eos else [])
        answers.append(said)
    return answers


def describe(model, image, chat):
    """The tokens before a photo's questions: what it shows, in the model's words, and the end token."""
    start = [chat.bos, *chat.newline, *chat.opening]
    what = say(model, image, start, chat.words)
    return [*start, *what] if what[-1] == chat.eos else [*start, *what, chat.eos]


def flat(lists):
    return sum(lists, [])


@pytest.fixture
def folder(shared):
    return shared / "parity" / "llama31"


def untrained(folder, counts, **kwargs):
    """A network, photos of 4 x 4 patches, and counts[p] questions of unequal lengths about photo p."""
    torch.manual_seed(0)
    model = CapeLLM.load(folder / "vit", folder / "llm", image_size=56, **kwargs).eval()
    lengths = iter(torch.randint(1, 12, (sum(counts),)).tolist())
    questions = [[torch.randint(3, 512, (next(lengths),)).tolist() for _ in range(n)] for n in counts]
    return model, torch.randn(len(counts), 3, 56, 56), questions


# ------------------------------------------------------------------------------------------------ all at once


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("counts", [[1], [3, 0, 5], [2, 1, 4, 1, 1, 3, 2, 2], [70]])
@torch.no_grad()
def test_locate_gives_the_tokens_of_plain_greedy_decoding(folder, n, counts):
    model, images, questions = untrained(folder, counts)
    chat = TinyChat(n)
    expected = one_by_one(model, images, questions, chat)
    start = chat.coordinates.known[0][0]
    assert all(said[0] != start for said in expected)  # an untrained network keeps to no format
    for learned in [None, *expected[:3]]:  # but one row keeps to the end to what is learned from it
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


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("n, passes", [(1, 3), (3, 7)])
@torch.no_grad()
def test_answers_in_the_format_take_one_pass_a_digit_and_few_logits(folder, n, passes, constrained):
    model, images, questions = untrained(folder, [4, 3])
    chat = TinyChat(n)
    read, predicted = [], []
    model.llama.norm.register_forward_hook(lambda _, args, __: read.append(args[0].shape[:-1].numel()))
    model.llama.lm_head.register_forward_hook(
        lambda _, args, __: predicted.append(args[0].shape[:-1].numel()))
    if constrained:
        locate(model, images, questions, chat, constrained=True)
    else:
        conversations = start_conversations(model, images, chat)
        conversations.select([0, 0, 0, 0, 1, 1, 1])
        answer_in_format(conversations, flat(questions), chat.coordinates)
    assert len(read) == passes  # the photos, then one a digit of x and y
    if constrained:
        assert sum(read) == 7 * 2 * n and not predicted  # the choices, from the digits' logits alone
    else:  # each token of an answer once, nothing else
        assert sum(read) == sum(predicted) == 7 * chat.coordinates.max_tokens


@torch.no_grad()
def test_constrained_or_not_an_answer_in_the_format_has_the_same_distributions(folder):
    model, images, questions = untrained(folder, [1])
    chat = TinyChat(3)
    chat.learn(one_by_one(model, images, questions, chat)[0])
    free, forced = (locate(model, images, questions, chat, constrained=c)[0][0] for c in (False, True))
    assert free.answer == forced.answer
    np.testing.assert_allclose(free.x_distribution, forced.x_distribution, atol=1e-6)
    np.testing.assert_allclose(free.y_distribution, forced.y_distribution, atol=1e-6)


@torch.no_grad()
def test_constrained_answers_keep_the_format_and_choose_digits(folder):
    model, images, questions = untrained(folder, [2, 3])
    chat = TinyChat(3)
    found = flat(locate(model, images, questions, chat, constrained=True))
    assert len(found) == 5
    assert all(chat.keeps_format(p.answer) for p in found)
    check_what_is_known(found, chat)


@torch.no_grad()
def test_where_no_format_is_known_there_is_nothing_to_constrain(folder):
    model, images, questions = untrained(folder, [2, 3])
    chat = TinyChat(3)
    chat.coordinates = AnswerFormat([], [], [2], max_tokens=6)
    expected = one_by_one(model, images, questions, chat)
    for constrained in False, True:
        found = flat(locate(model, images, questions, chat, constrained=constrained))
        assert found == [Prediction(None, None, said) for said in expected]


@pytest.mark.parametrize("n", [1, 3])
@torch.no_grad()
def test_distributions_are_those_over_the_digits(folder, n):
    model, images, [[question]] = untrained(folder, [1])
    chat = TinyChat(n)
    conversations = start_conversations(model, images, chat)
    [(said, distributions)] = answer_questions(conversations, [question], chat.coordinates, constrained=True)

    known, chosen = chat.split(said)
    assert known == chat.coordinates.known
    tokens, by_hand = [chat.bos, *chat.newline, *question], []
    for before, choice in zip(known, chosen):
        tokens += before
        scores = model.llama.lm_head(last_state(model, model.see(images)[0], tokens))
        scores = scores[chat.coordinates.digits].exp()
        by_hand.append(scores / scores.sum())
        assert choice == chat.coordinates.digits[scores.argmax()]
        tokens.append(choice)
    ours = torch.tensor(np.array(distributions))
    torch.testing.assert_close(ours, torch.stack(by_hand), atol=1e-6, rtol=1e-4)

    [[p]] = locate(model, images, [[question]], chat, constrained=True)
    assert p.answer == said
    x, y = (number_distribution([d.numpy() for d in half]) for half in (by_hand[:n], by_hand[n:]))
    np.testing.assert_allclose(p.x_distribution, x, atol=1e-6)
    np.testing.assert_allclose(p.y_distribution, y, atol=1e-6)


@torch.no_grad()
def test_locate_reads_coordinates_in_the_way_asked_for(folder):
    model, images, questions = untrained(folder, [2])
    chat = TinyChat(1)
    for decode in "median", "mean":
        for p in locate(model, images, questions, chat, decode, constrained=True)[0]:
            for coordinate, distribution in zip(p.point, (p.x_distribution, p.y_distribution)):
                if decode == "median":
                    v = round(1000 * coordinate)
                    assert distribution[:v].sum() < 0.5 <= distribution[:v + 1].sum()
                else:
                    mean = np.average(np.arange(1000), weights=distribution) / 1000
                    assert coordinate == pytest.approx(mean)


@torch.no_grad()
def test_nothing_is_computed_for_padding_nor_in_the_last_layer_for_tokens_nobody_asks_about(folder):
    model, images, questions = untrained(folder, [3, 2])
    first, *_, last = model.llama.layers
    read = {}
    for name, layer in (("q", first.self_attn.q_proj), ("k", first.self_attn.k_proj),
                        ("v", first.self_attn.v_proj), ("o", first.self_attn.o_proj), ("mlp", first.mlp),
                        ("last k", last.self_attn.k_proj), ("last o", last.self_attn.o_proj),
                        ("last mlp", last.mlp), ("norm", model.llama.norm)):
        read[name] = []
        layer.register_forward_hook(
            lambda _, args, __, name=name: read[name].append(args[0].shape[:-1].numel()))
    locate(model, images, questions, TinyChat(1))
    photos = 2 * (1 + 16 + 1)
    up_to_x = sum(len(question) + 2 for question in flat(questions))  # with two known tokens
    up_to_y = 5 * (1 + 2)  # x, and two known tokens
    questions_again = sum(map(len, flat(questions)))  # an untrained network keeps to no format
    for name in "q", "k", "v", "o", "mlp", "last k":
        assert read[name][:4] == [photos, up_to_x, up_to_y, questions_again], name
    for name in "last o", "last mlp", "norm":
        assert read[name][:4] == [0, 5 * 3, 5 * 3, 5], name  # what predicts a known token or a choice


@torch.no_grad()
def test_no_question_is_no_answer(folder):
    model, images, _ = untrained(folder, [0, 0])
    for cumulative in False, True:
        assert locate(model, images, [[], []], TinyChat(1), cumulative=cumulative) == [[], []]


# --------------------------------------------------------------------------------------- longer conversations


@pytest.mark.parametrize("n", [1, 3])
@torch.no_grad()
def test_cumulative_questions_follow_the_models_own_answers(folder, n):
    """Formats learned from answers of different turns: conversations leave them, keep them, come back."""
    model, images, questions = untrained(folder, [3, 0, 5])
    chat = TinyChat(n)
    photos, came_back = model.see(images), False
    start = [chat.bos, *chat.newline]
    expected = [one_after_another(model, image, start, asked, chat)
                for image, asked in zip(photos, questions)]

    for learned in None, expected[0][0], expected[2][0], expected[0][1], expected[2][2]:
        if learned:
            chat.learn(learned)
        found = locate(model, images, questions, chat, cumulative=True)
        assert [[p.answer for p in predictions] for predictions in found] == expected
        check_what_is_known(flat(found), chat)
        for predictions in found:
            kept = [p.x_distribution is not None for p in predictions]
            came_back |= (False, True) in zip(kept, kept[1:])
    assert came_back  # a conversation that had left the format


@pytest.mark.parametrize("cumulative", [False, True])
@torch.no_grad()
def test_what_the_object_is_comes_first_in_the_models_own_words(folder, cumulative):
    """Table 7. A photo's questions all follow one answer; when cumulative, only the first does directly."""
    model, images, questions = untrained(folder, [2, 3])
    chat = TinyChat(3)
    chat.opening = [20, 21, 22]
    read = []
    model.llama.layers[0].mlp.register_forward_hook(lambda _, args, __: read.append(args[0].shape[:-1]))
    found = locate(model, images, questions, chat, cumulative=cumulative)
    assert read[:2] == [(2, 18), (2 * 3,)]  # two photos, then the opening's three tokens for each

    for image, asked, predictions in zip(model.see(images), questions, found, strict=True):
        start = describe(model, image, chat)
        if cumulative:
            expected = one_after_another(model, image, start, asked, chat)
        else:
            expected = [say(model, image, start + question, chat.coordinates) for question in asked]
        assert [p.answer for p in predictions] == expected


@torch.no_grad()
def test_what_the_object_is_is_said_freely_and_at_any_length(folder):
    """Two answers in words of unequal lengths, one of which the end token ends."""
    model, images, questions = untrained(folder, [2, 3])
    chat = TinyChat(3)
    chat.opening = [20, 21, 22]
    start, photos = [chat.bos, *chat.newline, *chat.opening], model.see(images)

    found = flat(locate(model, images, questions, chat, constrained=True))  # constrains coordinates alone
    assert len(found) == 5 and all(chat.keeps_format(p.answer) for p in found)

    first, second = (say(model, image, start, chat.words) for image in photos)
    chat.eos = next(token for token in second if token not in first)  # here the second answer is to end
    chat.words = replace(chat.words, ending=[chat.eos])
    chat.coordinates = replace(chat.coordinates, ending=[13, chat.eos])
    first, second = (say(model, image, start, chat.words) for image in photos)
    assert len(second) < len(first) == 5
    assert second[-1] == chat.eos

    found = locate(model, images, questions, chat)
    for image, asked, predictions in zip(photos, questions, found, strict=True):
        begun = describe(model, image, chat)
        expected = [say(model, image, begun + question, chat.coordinates) for question in asked]
        assert [p.answer for p in predictions] == expected


# ---------------------------------------------------------------------------------------------- Conversations


@torch.no_grad()
def test_a_row_that_leaves_the_format_forgets_what_it_read(folder):
    """Side by side with rows that keep it. All go on as if they had been read plainly."""
    model, images, questions = untrained(folder, [5])
    chat = TinyChat(3)
    expected = one_by_one(model, images, questions, chat)
    chat.learn(expected[2])
    fast, plain = (start_conversations(model, images, chat) for _ in range(2))
    for conversations in fast, plain:
        conversations.select([0] * 5)
    said = answer_questions(fast, questions[0], chat.coordinates)
    assert [tokens for tokens, _ in said] == answer_plainly(plain, questions[0], chat.coordinates) == expected
    kept = [distributions is not None for _, distributions in said]
    assert kept[2] and not all(kept)

    assert fast.real.sum(1).tolist() == plain.real.sum(1).tolist()
    before = 1 + 16 + 1
    read = [before + len(question + tokens[:-1]) for question, tokens in zip(questions[0], expected)]
    assert fast.real.sum(1).tolist() == read  # the last token is not read yet
    assert len(fast.cache) == len(model.llama.layers)
    assert all(k.shape[2] == fast.real.shape[1] - before for k, _ in fast.cache.values())

    blocks = [[*tokens[-1:], *question] for tokens, question in zip(expected, reversed(questions[0]))]
    states = fast.read(blocks)[:, 0]
    torch.testing.assert_close(states, plain.read(blocks)[:, 0], atol=1e-5, rtol=1e-4)
    for question, tokens, block, state in zip(questions[0], expected, blocks, states):
        sequence = [chat.bos, *chat.newline, *question, *tokens[:-1], *block]
        alone = last_state(model, model.see(images)[0], sequence)
        torch.testing.assert_close(state, alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_row_split_in_two_is_two_conversations():
    llama, start, (a, b) = small_llama(), [5, 6, 7], ([8], [9, 10])
    embedded = llama.embed_tokens(torch.tensor([start, [*reversed(start)]]))
    conversations = Conversations(llama, embedded)
    conversations.select([1, 0, 1])
    states = conversations.read([a, b, b])
    assert states.shape == (3, 1, 32)
    for row, (tokens, block) in enumerate([([7, 6, 5], a), (start, b), ([7, 6, 5], b)]):
        alone = llama(llama.embed_tokens(torch.tensor([tokens + block])))[0, -1]
        torch.testing.assert_close(states[row, 0], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_hidden_states_are_of_the_last_tokens_of_blocks_that_are_not_empty():
    llama, start = small_llama(), [5, 6, 7]
    conversations = Conversations(llama, llama.embed_tokens(torch.tensor([start])))
    conversations.select([0, 0, 0])
    blocks = [[8, 9, 10], [], [11, 12]]
    states = conversations.read(blocks, 2)
    assert states.shape == (2, 2, 32)
    for found, block in zip(states, (blocks[0], blocks[2])):
        alone = llama(llama.embed_tokens(torch.tensor([start + block])))[0, -2:]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_what_conversations_begin_with_is_kept_once():
    """However many go on from it: 50 here, which keep their own 2 slots each."""
    llama = small_llama()
    conversations = Conversations(llama, torch.randn(1, 40, 32))
    conversations.select([0] * 50)
    conversations.read([[5, 6]] * 50)
    slot = 4 * 2 * (2 * 8) * 4  # layers; keys and values; two heads of 8; four bytes each
    kept = [sum(tensor.nbytes for layer in cache.values() for tensor in layer)
            for cache in (conversations.beginnings, conversations.cache)]
    assert kept == [40 * slot, 50 * 2 * slot]
    assert conversations.real.shape == (50, 42)


def small_llama(n_layers=4):
    torch.manual_seed(0)
    rope = {"rope_theta": 1e4, "rope_type": "default"}
    return Llama(LlamaConfig(50, 32, 64, n_layers, 4, 2, 8, rope=rope)).eval()


class WatchedCache(dict):
    """A cache that notes how many bytes of keys and values are alive whenever it gets a layer's new ones."""

    def __init__(self, cache):
        self.seen, self.peak = [], 0
        for i, layer in cache.items():
            self[i] = layer

    def __setitem__(self, i, layer):
        self.seen += map(weakref.ref, layer)
        alive = [tensor for ref in self.seen if (tensor := ref()) is not None]
        self.peak = max(self.peak, sum(tensor.nbytes for tensor in alive))
        super().__setitem__(i, layer)


@pytest.mark.parametrize("act", [lambda conversations: conversations.read([[5, 6], [7]]),
                                 lambda conversations: conversations.select([0, 1])], ids=["read", "select"])
@torch.no_grad()
def test_no_more_than_one_layer_of_the_cache_is_held_twice(act):
    llama = small_llama()
    conversations = Conversations(llama, torch.randn(2, 1, 32))
    conversations.read([[5] * 40, [6] * 40])
    conversations.cache = WatchedCache(conversations.cache)
    act(conversations)
    slots = conversations.real[:, 1:].numel()
    a_layer = slots * 2 * (2 * 8) * 4  # keys and values; two heads of 8; four bytes each
    held = sum(tensor.nbytes for layer in conversations.cache.values() for tensor in layer)
    assert held == 4 * a_layer
    assert held < conversations.cache.peak <= held + a_layer


# ------------------------------------------------------------------------------------------------- <KEYPOINT>


@pytest.fixture
def pointing(folder):
    """A network that answers with <KEYPOINT>, its token 512; a Chat for it; two photos, three questions."""
    model, images, _ = untrained(folder, [0, 0], answers="token")
    chat = TinyChat(3)
    chat.keypoint = 512
    tokens = torch.randint(3, 512, (20,)).tolist()
    return model, chat, images, [[tokens[:4], tokens[4:13]], [tokens[13:]]]


@pytest.mark.parametrize("cumulative", [False, True])
@torch.no_grad()
def test_a_point_is_read_off_the_keypoint_token_behind_its_question(pointing, cumulative):
    model, chat, images, questions = pointing
    found = locate(model, images, questions, chat, cumulative=cumulative)
    for image, asked, predictions in zip(model.see(images), questions, found, strict=True):
        tokens = [chat.bos, *chat.newline]
        for question, p in zip(asked, predictions, strict=True):
            expected = model.keypoint_head(last_state(model, image, [*tokens, *question, 512]))
            torch.testing.assert_close(torch.tensor(p.point), expected, atol=1e-5, rtol=0)
            assert p == Prediction(p.point, None, [512, chat.eos], None, None)
            assert isinstance(p.point, tuple) and 0 < min(p.point) and max(p.point) < 1
            tokens += [*question, 512, chat.eos] if cumulative else []


@torch.no_grad()
def test_what_the_object_is_comes_before_keypoint_tokens(pointing):
    model, chat, images, questions = pointing
    chat.opening = [20, 21, 22]
    found = locate(model, images, questions, chat)
    for image, asked, predictions in zip(model.see(images), questions, found, strict=True):
        start = describe(model, image, chat)
        for question, p in zip(asked, predictions, strict=True):
            expected = model.keypoint_head(last_state(model, image, [*start, *question, 512]))
            torch.testing.assert_close(torch.tensor(p.point), expected, atol=1e-5, rtol=0)


def test_points_with_frozen_weights_in_bf16(pointing):
    """As on a GPU, where what trains stays fp32."""
    model, chat, images, [[question, _], _] = pointing
    [[exact], _] = locate(model, images, [[question], []], chat)
    for p in model.parameters():
        p.data = p.data if p.requires_grad else p.data.bfloat16()
    [[rough], _] = locate(model, images, [[question], []], chat)
    assert rough.point == pytest.approx(exact.point, rel=0.05)


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
    said = chat.encode(spell((0.201, 0.5)))[:chat.coordinates.max_tokens]

    greedy, median, mean = (read_coordinates(said, [*x, *y], chat, decode)
                            for decode in ("greedy", "median", "mean"))
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
    said = chat.encode(spell((0.103, 0.103)))[:chat.coordinates.max_tokens]
    assert read_coordinates(said, [*x, *x], chat).point == (0.103, 0.103)
    assert read_coordinates(said, [*x, *x], chat, "median").point == (0.228, 0.228)  # 40 + 29 * 0.35 > 50
    mean = 0.4 * 0.103 + 0.35 * 0.2495 + 0.25 * 0.3495
    assert read_coordinates(said, [*x, *x], chat, "mean").point == pytest.approx((mean, mean))


@pytest.mark.parametrize("chat", ["tiny"], indirect=True)
def test_without_distributions_a_point_is_as_said(chat):
    said = chat.encode(spell((0.199, 0.5)))
    for decode in "greedy", "median", "mean":
        assert read_coordinates(said, None, chat, decode) == Prediction((0.199, 0.5), None, said)
