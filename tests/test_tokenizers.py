"""Chat and locate() with the tokenizers of the paper's LLMs (Table 4).

They are Llama-3's own file, small ones built like Vicuna's and Mistral's, and one that pairs digits. What is
expected is spelled out by hand or asked of the tokenizers library.
"""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import LLAMA3_IDS, SPACE, generate_all, make_chat, sentencepiece

from chat import IGNORE, Category, Scene, write_point
from decode import locate
from llama import Llama, LlamaConfig
from model import CapeLLM
from vit import ViT, ViTConfig

THING = Category("thing", [("left ear", "where it begins, [1, 2], is \u201cleft\u201d."),
                           ("na\u00efve \U0001f600", "two  gaps,\t\u773c ")])


class Kind(NamedTuple):
    bracket: str = f"{SPACE}["  # the token of " ["
    newline: tuple = (SPACE, "<0x0A>")  # those of "\n"
    number: callable = list  # those of "123"
    digits: list = "0123456789"  # what chooses a number; nothing if numbers are cut otherwise
    passes: int = 1 + 6  # of the LLM until an answer is complete: the photo, and one a choice
    end: int | list = 2  # in config.json


KINDS = {
    "llama3": Kind("\u0120[", ("\u010a",), lambda n: [n], [f"{n:03d}" for n in range(1000)], 1 + 2),
    "vicuna": Kind(),
    "mistral first": Kind(end=[2]),
    "mistral always": Kind(),
    "pairs": Kind(number=lambda n: [n[:2], n[2]], digits=[], passes=1 + 11),  # one a token
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


def questions_of(chat, category):
    """Tokens of the questions about a category's keypoints, without the "\\n" before them."""
    return [question[len(chat.newline):] for question in chat.encode_questions(category)]


def test_pieces_are_the_text_with_no_space_or_special_token_added(chat):
    assert (chat.bos, chat.eos) in [(128000, 128001), (1, 2)]
    assert chat.newline == ids_of(chat, chat.kind.newline)
    for (name, description), question in zip(THING.keypoints, questions_of(chat, THING), strict=True):
        text = f"User: where is the {name}?\nReference: {description}\nAssistant: [0.123,0.456]"
        *tokens, end = question + spelled(chat, (0.123, 0.456))
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


@pytest.mark.parametrize("chat", [name for name in KINDS if name != "llama3"], indirect=True)
def test_every_point_is_spelled_in_the_format_and_read_back(chat):
    """test_chat.py does so for Llama-3."""
    form = chat.coordinates
    for v in range(1000):
        x, y = f"{v:03d}", f"{(7 * v + 123) % 1000:03d}"  # y takes all values, too
        point = float(f"0.{x}"), float(f"0.{y}")
        *parts, bracket = spelled_by_hand(chat, x, y)
        answer = sum(parts, [])  # up to the last digit
        assert spelled(chat, point) == [*answer, *bracket, chat.eos]
        assert chat.parse(answer) == point
        if form.known:
            choices = [form.digits[int(digit)] for digit in x + y]
            assert answer == sum(([*known, choice] for known, choice in zip(form.known, choices)), [])


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


# --------------------------------------------------------------------------------------------------- locate()


def untrained(chat):
    """A CapeLLM that knows the tokenizer's vocabulary, of a few layers."""
    torch.manual_seed(0)
    rope = {"rope_theta": 1e4, "rope_type": "default"}
    vit = ViT(ViTConfig(32, 2, 2, image_size=56))
    llama = Llama(LlamaConfig(chat.tokenizer.get_vocab_size(), 128, 64, 2, 4, 2, 32, rope=rope))
    return CapeLLM(vit, llama).eval()


def teach(model, chat, images, turns):
    """Makes an untrained network give these answers. turns: (photo, question, answer) each.

    Solves for the lm_head whose logits are 1 for each next token and 0 for the others.
    """
    hidden, said = [], []
    for photo, question, answer in turns:
        tokens = [chat.bos, *question, *answer]
        states = model.llama(model.join(images[[photo]], torch.tensor([tokens])))[0]
        hidden.append(states[-len(answer) - 1:-1])  # which predict the answer
        said += answer
    tokens, which = torch.tensor(said).unique(return_inverse=True)
    weights = torch.linalg.lstsq(torch.cat(hidden).double(), F.one_hot(which).double()).solution.T
    model.llama.lm_head.weight.zero_()[tokens] = weights.float()


def ask_about(chat, *names):
    return chat.encode_questions(Category("thing", [(name, "") for name in names]))


@torch.no_grad()
def test_locate_says_what_the_textbooks_decoder_says(chat):
    model, images = untrained(chat), torch.randn(2, 3, 56, 56)
    questions = [ask_about(chat, "left ear", "nose", "right ear"),
                 ask_about(chat, "left ear", "naked chin", "tip of the tail")]
    answers = [spelled(chat, (0.123, 0.456)),
               spelled(chat, (0.999, 0)),
               chat.encode("The nose") + [chat.eos],  # leaves the format at once
               spelled(chat, (0.507, 0.12)),
               [*ids_of(chat, [chat.kind.bracket]), chat.eos],  # leaves it after a token
               chat.encode(" [0.314;0.159]")]  # leaves it halfway
    points = [(0.123, 0.456), (0.999, 0.0), None, (0.507, 0.12), None, None]

    def predictions():
        return sum(locate(model, images, questions, chat), [])

    assert [p.answer for p in predictions()] == generate_all(model, images, questions, chat)  # says anything

    teach(model, chat, images, [*zip([0, 0, 0, 1, 1, 1], sum(questions, []), answers)])
    expected = [answer[:chat.coordinates.max_tokens] for answer in answers]
    assert generate_all(model, images, questions, chat) == expected
    assert [p.answer for p in predictions()] == expected
    assert [p.point for p in predictions()] == points
    kept_the_format = [bool(chat.kind.digits) and point is not None for point in points]
    assert [p.x_distribution is not None for p in predictions()] == kept_the_format
    assert [p.confidence is not None for p in predictions()] == kept_the_format

    passes = []
    model.llama.norm.register_forward_hook(lambda *_: passes.append(1))
    [[first, _]] = locate(model, images[:1], [questions[0][:2]], chat)
    assert first.point == (0.123, 0.456)
    assert len(passes) == chat.kind.passes
