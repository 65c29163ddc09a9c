"""chat.py: questions and answers as tokens of the paper's LLMs (Table 4), and how answers are read.

They are Llama-3's own file, small ones built like Vicuna's and Mistral's, and one that pairs digits. What is
expected is spelled out by hand or asked of the tokenizers library.
"""

from typing import NamedTuple

import numpy as np
import pytest
from conftest import LLAMA3_IDS, ROOT, SPACE, make_chat, sentencepiece
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from chat import IGNORE, Category, Chat, Scene, write_point
from common import InputError, read_json, write_json
from decode import DECODINGS, Prediction, make_prediction

THING = Category("thing", [("left ear", "where it begins, [1, 2], is \u201cleft\u201d."),
                           ("na\u00efve \U0001f600", "two  gaps,\t\u773c ")])


class Kind(NamedTuple):
    bracket: str = f"{SPACE}["  # the token of " ["
    newline: tuple = (SPACE, "<0x0A>")  # those of "\n"
    number: callable = list  # those of "123"
    digits: list = "0123456789"  # what chooses a number; nothing if numbers are cut otherwise
    end: int | list = 2  # in config.json


KINDS = {
    "llama3": Kind("\u0120[", ("\u010a",), lambda n: [n], [f"{n:03d}" for n in range(1000)]),
    "vicuna": Kind(),
    "mistral first": Kind(end=[2, 0]),
    "mistral always": Kind(),
    "pairs": Kind(number=lambda n: [n[:2], n[2]], digits=[]),
}


@pytest.fixture(scope="module", params=KINDS)
def chat(request, tmp_path_factory):
    name, folder = request.param, tmp_path_factory.mktemp("llm")
    if name == "llama3":
        tokenizer = request.getfixturevalue("shared") / "llama3_tokenizer" / "tokenizer.json"
        chat = make_chat(folder, tokenizer.read_text(), **LLAMA3_IDS)
    else:
        chat = make_chat(folder, sentencepiece(name), 1, KINDS[name].end)
    chat.kind = KINDS[name]
    return chat


def ids_of(chat, tokens):
    return [chat.tokenizer.token_to_id(token) for token in tokens]


def spelled_by_hand(chat, x, y):
    """The tokens of an answer, cut where numbers begin and end: " [0.", x, ",0.", y, "]"."""
    kind = chat.kind
    parts = [kind.bracket, "0", "."], kind.number(x), [",", "0", "."], kind.number(y), ["]"]
    return [ids_of(chat, tokens) for tokens in parts]


def spelled(chat, point):
    """The tokens of an answer as Chat makes them, the end token among them."""
    return chat.encode(write_point(point)) + [chat.eos]


def test_pieces_are_the_text_with_no_space_or_special_token_added(chat):
    assert (chat.bos, chat.eos) in [(128000, 128001), (1, 2)]
    assert chat.newline == ids_of(chat, chat.kind.newline)
    for (name, description), question in zip(THING.keypoints, chat.encode_questions(THING), strict=True):
        text = f"User: where is the {name}?\nReference: {description}\nAssistant: [0.123,0.456]"
        *tokens, end = question[len(chat.newline):] + spelled(chat, (0.123, 0.456))
        assert chat.tokenizer.decode(tokens, skip_special_tokens=False) == text
        assert end == chat.eos
        assert chat.tokenizer.encode(text).ids == [chat.bos, *tokens]  # by itself, the tokenizer adds BOS


def test_format_and_digits_are_those_of_the_tokenizer(chat):
    form, kind = chat.coordinates, chat.kind
    assert form.digits == ids_of(chat, kind.digits)
    if kind.digits:
        start, x, middle, y, bracket = spelled_by_hand(chat, "123", "456")
        more = [[]] * (len(x) - 1)  # nothing stands between the digits of a number
        assert form.known == [start, *more, middle, *more]
        assert form.ending == [*bracket, chat.eos]
        assert form.max_tokens == len(start + x + middle + y)
    else:
        assert (form.known, form.ending, form.max_tokens) == ([], [chat.eos], 11)


def test_every_point_is_spelled_in_the_format_and_read_back(chat):
    form, kind = chat.coordinates, chat.kind
    for v in range(1000):
        x, y = f"{v:03d}", f"{(7 * v + 123) % 1000:03d}"  # y takes all values, too
        point = float(f"0.{x}"), float(f"0.{y}")
        *parts, bracket = spelled_by_hand(chat, x, y)
        answer = sum(parts, [])  # up to the last digit
        assert spelled(chat, point) == [*answer, *bracket, chat.eos]
        assert chat.parse(answer) == point
        if form.known:
            choices = [kind.digits.index(token) for token in kind.number(x) + kind.number(y)]
            assert answer == sum(([*known, form.digits[k]] for known, k in zip(form.known, choices)), [])
        if v % 50 == 7:  # a certain answer is read alike in all three ways
            certain = [np.eye(len(form.digits))[k] for k in choices] if form.known else None
            for decoding in DECODINGS:
                prediction = make_prediction(answer, certain, chat, decoding)
                assert prediction.point == pytest.approx(point) and prediction.answer == answer
                assert prediction.confidence == (1 if form.known else None)


def test_numbers_are_rounded_and_kept_within_the_crop(chat):
    for point, numbers in ((0.9996, -0.2), ("999", "000")), ((-1e-9, 7), ("000", "999")), \
                          ((0.4996, 0.0004), ("500", "000")):
        assert spelled(chat, point) == sum(spelled_by_hand(chat, *numbers), []) + [chat.eos]


def test_labels_are_the_answers_with_one_end_token_each(chat):
    asked, tokens, text = [], [chat.bos, *chat.newline], ""
    labels = [IGNORE] * len(tokens)
    numbers = ("250", "000"), ("999", "500"), ("007", "120"), ("314", "159")
    for keypoint, (x, y) in zip(THING.keypoints * 2, numbers):
        asked.append((keypoint, (float(f"0.{x}"), float(f"0.{y}"))))
        question_text = "User: where is the {}?\nReference: {}\nAssistant:".format(*keypoint)
        question = chat.tokenizer.encode(question_text, add_special_tokens=False).ids
        answer = sum(spelled_by_hand(chat, x, y), []) + [chat.eos]
        tokens += question + answer
        labels += [IGNORE] * len(question) + answer
        text += f"{question_text} [0.{x},0.{y}]"
    assert chat.encode_conversation(Scene(THING, asked)) == (tokens, labels)
    in_one_go = chat.tokenizer.encode(text).tokens
    assert "]U" in in_one_go or chat.bos == 128000  # so pieces would fuse; Llama-3 has no such token


def test_malformed_answers_are_none(chat):
    answer = spelled(chat, (0.993, 0.074))
    said = ["0.123,0.456", " [0.123,.456", " [0.123;0.456", " [0.12,0.456", " [0.1234,0.456",
            " [0.123,0.4567", " [1.123,0.456", " [-0.1,0.456", " [nan,0.456", " at [0.123,0.456]", "\n"]
    cut_short = [answer[:n] for n in range(len(sum(spelled_by_hand(chat, "993", "074")[:4], [])))]
    for tokens in [[chat.eos], [10**6], answer[-3::-1], *cut_short, *map(chat.encode, said)]:
        assert chat.parse(tokens) is None, chat.tokenizer.decode(tokens)
        assert make_prediction(tokens, None, chat) == Prediction(None, None, tokens)


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


def test_texts_are_neither_cut_nor_padded_nor_read_as_control_tokens(tmp_path):
    tokenizer = Tokenizer.from_str(sentencepiece("vicuna"))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    chat = make_chat(tmp_path, tokenizer.to_str(), 1, 2)
    assert len(chat.newline) == 2
    [question] = chat.encode_questions(Category("cup", [("rim", "above </s> or <s>")]))
    assert chat.bos not in question and chat.eos not in question
    expected = "User: where is the rim?\nReference: above </s> or <s>\nAssistant:"
    assert chat.tokenizer.decode(question).strip() == expected


@pytest.mark.parametrize("spoil, says", [
    (lambda t, c: t.update(pre_tokenizer=None, normalizer={  # nothing is left of a digit
        "type": "Replace", "pattern": {"Regex": "[0-9]"}, "content": ""}), "has no tokens for some digits"),
    (lambda t, c: t["model"].update(vocab={}, merges=[]), "tokenizer.json"),
    (lambda t, c: c.pop("bos_token_id"), "config.json: cannot be read .*bos_token_id"),
    (lambda t, c: c.update(eos_token_id=[]), "config.json: cannot be read")])
def test_a_tokenizer_that_does_not_fit_is_named(tmp_path, spoil, says):
    toy = ROOT / "assets/toy/llm"
    tokenizer, config = read_json(toy / "tokenizer.json"), read_json(toy / "config.json")
    spoil(tokenizer, config)
    write_json(tmp_path / "tokenizer.json", tokenizer)
    write_json(tmp_path / "config.json", config)
    with pytest.raises(InputError, match=f"^{tmp_path}.*{says}"):
        Chat(tmp_path)
