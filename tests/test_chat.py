"""chat.py: conversations with four kinds of tokenizers, and their answers."""

import numpy as np
import pytest
from conftest import ROOT, make_chat, runs, sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from chat import IGNORE, Category, Chat, Scene, ask_with_description, write_point
from common import InputError, read_json, write_json
from decode import DECODINGS, Prediction, read_coordinates

CUP = Category("tea_cup", [("rim", "where one drinks."), ("foot", "below (or under) it"),
                           ("left ear", "its handle"), ("heart", "inside")])

quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
texts = st.text(st.characters(codec="utf-8", exclude_characters="\u2581"), min_size=1, max_size=30)
points = st.tuples(st.floats(-1, 2), st.floats(-1, 2))
rounds = st.lists(st.tuples(st.tuples(texts, texts), points), min_size=1, max_size=5)


def spelled(chat, point):
    """The tokens of an answer, the end token among them."""
    return chat.encode(write_point(point)) + [chat.eos]


def text_of(chat, tokens):
    """What a tokenizer wrote, without the end token; a SentencePiece one loses the space before a piece."""
    return chat.tokenizer.decode([token for token in tokens if token != chat.eos]).strip()


# ---------------------------------------------------------------------------------- conversations and answers


@pytest.mark.parametrize("chat", ["llama3"], indirect=True)
def test_llama3_sequence_is_the_published_one(chat):
    def tokens_of(*texts):
        return [chat.tokenizer.token_to_id(text) for text in texts]

    foot, ear = CUP.keypoints[1:3]
    where_foot, where_ear = (
        chat.tokenizer.encode(f"User: where is the {name}?\nReference: {description}\nAssistant:",
                              add_special_tokens=False).ids for name, description in (foot, ear))
    for v in range(1000):
        w = 999 - v
        v_w = tokens_of("\u0120[", "0", ".", f"{v:03}", ",", "0", ".", f"{w:03}", "]") + [128001]
        w_v = tokens_of("\u0120[", "0", ".", f"{w:03}", ",", "0", ".", f"{v:03}", "]") + [128001]
        scene = Scene(CUP, [(foot, (v / 1000, w / 1000)), (ear, (w / 1000, v / 1000))])
        start = [128000, *tokens_of("\u010a")]
        assert runs(*chat.encode_conversation(scene)) == [start + where_foot, v_w, where_ear, w_v]
    assert (chat.bos, chat.newline) == (128000, tokens_of("\u010a"))
    assert chat.coordinates.known == [tokens_of("\u0120[", "0", "."), tokens_of(",", "0", ".")]


@quick
@given(rounds)
def test_only_answers_are_supervised_and_no_piece_touches_the_next(chat, rounds):
    start = [chat.bos, *chat.newline]
    tokens, labels = chat.encode_conversation(Scene(CUP, rounds))
    alone = [chat.encode_conversation(Scene(CUP, [one])) for one in rounds]
    assert tokens == start + sum((tokens[len(start):] for tokens, _ in alone), [])
    assert labels == [IGNORE] * len(start) + sum((labels[len(start):] for _, labels in alone), [])

    pieces = runs(tokens[len(start):], labels[len(start):])
    assert len(pieces) == 2 * len(rounds)
    for ((name, description), point), question, answer in zip(rounds, pieces[::2], pieces[1::2]):
        words = f"User: where is the {name}?\nReference: {description}\nAssistant:".split()
        assert chat.tokenizer.decode(question).split() == words
        *spoken, end = answer
        assert end == chat.eos and chat.eos not in spoken
        assert len("".join(map(chat.tokenizer.id_to_token, spoken))) == len(" [0.123,0.456]")
        off = np.subtract(chat.parse(answer), np.clip(point, 0, 0.999))
        assert np.abs(off).max() < 0.0005 + 1e-9


def test_points_outside_the_crop_are_spelled_as_its_edge(chat):
    edge = spelled(chat, (0.999, 0.0))
    for point in (1.0, -0.0), (0.9996, -0.2), (np.float64(1.7), -0.0004):
        assert spelled(chat, point) == edge


def test_the_format_holds_for_every_answer_and_every_answer_is_read_back(chat):
    form = chat.coordinates
    assert len(form.known) == chat.choices
    for v in range(1000):
        point = v / 1000, (7 * v + 123) % 1000 / 1000
        answer = spelled(chat, point)
        whole = answer[:-2]  # up to the last digit
        assert chat.parse(whole) == chat.parse(answer) == point
        assert answer[-1] == chat.eos
        assert len(whole) <= form.max_tokens  # fewer where digits are joined

        rest, distributions = iter(whole), []
        for known in form.known:
            assert [next(rest) for _ in known] == known
            choice = next(rest)
            certain = np.array([digit == choice for digit in form.digits], float)
            assert certain.sum() == 1
            distributions.append(certain)
        assert not chat.choices or [*rest] == []  # an answer is complete with its last choice
        if v % 50 == 7:
            check_reading(chat, whole, distributions or None, point)


@pytest.mark.parametrize("pattern, choices", [
    (r"\d{3}|.|\n", 2), (r".|\n", 6), (r"\d{2}|.|\n", 0), (r"\d{3}\]?|.|\n", 0), (r"\d\]?|.|\n", 0)],
    ids=["three digits", "single digits", "pairs", "y joins its bracket", "the last digit joins its bracket"])
def test_a_format_holds_where_all_choices_are_from_the_same_tokens(tmp_path, pattern, choices):
    pieces = pre_tokenizers.Split(Regex(pattern), "isolated")
    texts = ["a\n", *(write_point((v / 1000, v / 1000)) for v in range(1000))]
    words = dict.fromkeys(word for text in texts for word, _ in pieces.pre_tokenize_str(text))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = pieces
    chat = make_chat(tmp_path, tokenizer.to_str(), 0, 0)
    assert len(chat.coordinates.known) == choices
    assert len(chat.coordinates.digits) == {2: 1000, 6: 10, 0: 0}[choices]


def check_reading(chat, answer, distributions, point):
    """A certain answer is read alike in all three ways; without distributions its point alone is known."""
    for decoding in DECODINGS:
        prediction = read_coordinates(answer, distributions, chat, decoding)
        assert prediction.point == pytest.approx(point) and prediction.answer == answer
        assert prediction.confidence == (None if distributions is None else 1)


def test_malformed_answers_are_none(chat):
    answer = spelled(chat, (0.993, 0.074))
    said = ["0.123,0.456", " [0.123,.456", " [.123,0.456", " [0.123;0.456", " [0.12,0.456", " [0.1234,0.456",
            " [0.123,0.4567", " [1.123,0.456", " [-0.1,0.456", " [nan,0.456", " at [0.123,0.456]",
            "The nose", "\n"]
    cut_short = [answer[:n] for n in range(len(answer) - 2)]
    for tokens in [[chat.eos], [10**6], answer[-3::-1], *cut_short, *map(chat.encode, said)]:
        assert chat.parse(tokens) is None, chat.tokenizer.decode(tokens)
        assert read_coordinates(tokens, None, chat) == Prediction(None, None, tokens)


def test_texts_are_neither_cut_nor_read_as_control_tokens(tmp_path):
    tokenizer = Tokenizer.from_str(sentencepiece("vicuna"))
    tokenizer.enable_truncation(8)
    chat = make_chat(tmp_path, tokenizer.to_str(), 1, 2)
    assert tokenizer.token_to_id("</s>") == chat.eos
    [question] = chat.encode_questions(Category("cup", [("rim", "above </s> or <s>")]))
    assert chat.bos not in question and chat.eos not in question
    expected = "User: where is the rim?\nReference: above </s> or <s>\nAssistant:"
    assert text_of(chat, question) == expected


def test_a_test_asks_as_training_does(chat):
    """One keypoint in each conversation, after the same beginning."""
    questions = chat.encode_questions(CUP)
    for keypoint, question in zip(CUP.keypoints, questions, strict=True):
        tokens, labels = chat.encode_conversation(Scene(CUP, [(keypoint, (0.1, 0.2))]))
        assert runs(tokens, labels) == [[chat.bos, *question], spelled(chat, (0.1, 0.2))]


def test_an_instruction_asks_and_answers_what_it_likes(chat):
    """In words, too. In a test the last question of a conversation is asked."""
    def ask_twice(scene):
        return [("User: what is it?\nAssistant:", scene.category.name), *ask_with_description(scene)]
    twice = Chat(chat.folder, ask_twice)
    one = [(CUP.keypoints[0], (0.1, 0.25))]
    start = len(chat.newline) + 1
    tokens, labels = (part[start:] for part in twice.encode_conversation(Scene(CUP, one)))
    what, name, where, point = runs(tokens, labels)
    assert text_of(chat, what) == "User: what is it?\nAssistant:"
    assert chat.tokenizer.decode(what + name[:-1]).endswith(": tea_cup") and name[-1] == chat.eos
    plain = runs(*(part[start:] for part in chat.encode_conversation(Scene(CUP, one))))
    assert [where, point] == plain
    assert twice.encode_questions(CUP) == chat.encode_questions(CUP)


TOKENIZERS = {
    "nothing for digits": (lambda t, c: t.update(pre_tokenizer=None, normalizer={
        "type": "Replace", "pattern": {"Regex": "[0-9]"}, "content": ""}), "has no tokens for some digits"),
    "no words": (lambda t, c: t["model"].update(vocab={}, merges=[]), "tokenizer.json"),
    "no BOS": (lambda t, c: c.pop("bos_token_id"), "config.json: cannot be read .*bos_token_id"),
    "EOS of no kind": (lambda t, c: c.update(eos_token_id=[]), "config.json: cannot be read"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_does_not_fit_is_named(tmp_path, case):
    spoil, says = TOKENIZERS[case]
    toy = ROOT / "assets/toy/llm"
    tokenizer, config = read_json(toy / "tokenizer.json"), read_json(toy / "config.json")
    spoil(tokenizer, config)
    write_json(tmp_path / "tokenizer.json", tokenizer)
    write_json(tmp_path / "config.json", config)
    with pytest.raises(InputError, match=says) as error:
        Chat(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_padding_of_a_tokenizer_is_switched_off(tmp_path):
    toy = ROOT / "assets/toy/llm"
    tokenizer = read_json(toy / "tokenizer.json") | {"padding": {
        "strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "<unk>"}}
    write_json(tmp_path / "tokenizer.json", tokenizer)
    write_json(tmp_path / "config.json", read_json(toy / "config.json"))
    assert Chat(tmp_path).newline == Chat(toy).newline
