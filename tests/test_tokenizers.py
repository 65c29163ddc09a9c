"""Chat with the tokenizers of the paper's LLMs (Table 4): Llama-3's own file, small ones built as Vicuna's and Mistral's, and one that
pairs digits. What is expected is spelled out by hand or asked of the tokenizers library."""

import json
from itertools import accumulate, takewhile
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from test_model import one_by_one
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from chat import IGNORE, Chat, Scene
from data import Category
from llama import Llama, LlamaConfig
from model import CapeLLM
from vit import ViT, ViTConfig

S = "\u2581"  # SentencePiece's letter for a space
THING = Category("thing", [("left ear", "where it begins, [1, 2], is \u201cleft\u201d."), ("na\u00efve \U0001f600", "two  gaps,\t\u773c ")])


class Kind(NamedTuple):
    bracket: str = f"{S}["  # the token of " ["
    newline: tuple = (S, "<0x0A>")  # those of "\n"
    number: callable = list  # those of "123"
    digits: list = "0123456789"  # what chooses a number, nothing if numbers are cut otherwise
    passes: int = 1 + 6  # of the LLM until an answer is complete: the photo, then what its template does not know
    end: int | list = 2  # in config.json


KINDS = {
    "llama3": Kind("\u0120[", ("\u010a",), lambda n: [n], [f"{n:03d}" for n in range(1000)], 1 + 2, [128001, 128008, 128009]),
    "vicuna": Kind(),
    "mistral first": Kind(end=[2]),
    "mistral always": Kind(),
    "pairs": Kind(number=lambda n: [n[:2], n[2]], digits=[], passes=1 + 11),
}


def sentencepiece(name):
    """A tokenizer.json as that of Vicuna (Llama-2) or Mistral: byte pairs over whole texts, whose spaces are letters, and bytes for
    what the vocabulary lacks. Tokens such as "]U" join what the pieces of a conversation keep apart."""
    mistral, special = name.startswith("mistral"), ["<unk>", "<s>", "</s>"]
    if mistral:
        special += ["[INST]", "[/INST]", *(f"[control_{n}]" for n in range(8, 774))]
    words = ["]U", "],", ":[", *(S + word for word in "[ User where is the left ear begins".split()), "User", "Reference", "Assistant"]
    if name == "pairs":
        words += [f"{n:02d}" for n in range(100)]
    merges = list(dict.fromkeys(pair for word in words for pair in zip(accumulate(word), word[1:])))  # a word letter by letter
    tokens = [*special, *(f"<0x{b:02X}>" for b in range(256)), S, *map(chr, range(33, 127)), *map("".join, merges)]
    ids = {token: id for id, token in enumerate(dict.fromkeys(tokens))}
    t = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if mistral:
        t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=name.split()[1], split=False)
    else:
        t.normalizer = normalizers.Sequence([normalizers.Prepend(S), normalizers.Replace(" ", S)])
    if name == "pairs":
        t.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d{1,2}"), "isolated")
    t.decoder = decoders.Sequence([decoders.Replace(S, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    t.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    t.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return t.to_str()


@pytest.fixture(scope="module", params=KINDS)
def chat(request, tmp_path_factory):
    name, kind, folder = request.param, KINDS[request.param], tmp_path_factory.mktemp("llm")
    llama3 = request.getfixturevalue("shared") / "llama3_tokenizer/tokenizer.json" if name == "llama3" else None
    (folder / "tokenizer.json").write_text(llama3.read_text() if llama3 else sentencepiece(name))
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 128000 if llama3 else 1, "eos_token_id": kind.end,
                                                    "vocab_size": 128256}))
    chat = Chat(folder)
    chat.kind = kind
    return chat


def ids_of(chat, tokens):
    return [chat.tokenizer.token_to_id(token) for token in tokens]


def spelled(chat, x, y):
    """The tokens of an answer by hand, cut where numbers begin and end: " [0.", x, ",0.", y, "]"."""
    kind = chat.kind
    return [ids_of(chat, tokens) for tokens in ([kind.bracket, "0", "."], kind.number(x), [",", "0", "."], kind.number(y), ["]"])]


def template_of(chat):
    start, x, middle, y, _ = spelled(chat, "123", "456")
    return [*start, *[None] * len(x), *middle, *[None] * len(y)] if chat.kind.digits else [None] * 11


def test_pieces_are_the_text_with_no_space_or_special_token_added(chat):
    assert (chat.bos, chat.eos) in [(128000, 128001), (1, 2)] and chat.newline == ids_of(chat, chat.kind.newline)
    for (name, description), question in zip(THING.keypoints, chat.questions(THING), strict=True):
        text = f"User: where is the {name}?\nReference: {description}\nAssistant: [0.123,0.456]"
        *ids, end = question + chat.answer(0.123, 0.456)
        assert chat.tokenizer.decode(ids, skip_special_tokens=False) == text and end == chat.eos
        assert chat.tokenizer.encode(text).ids == [chat.bos, *ids]  # left to itself, the tokenizer adds BOS


def test_template_and_digits_are_those_of_the_tokenizer(chat):
    assert chat.place.template == template_of(chat) and chat.place.digits == ids_of(chat, chat.kind.digits)
    assert chat.place.closing == [*ids_of(chat, "]" if chat.kind.digits else ""), chat.eos]  # what follows the template


@pytest.mark.parametrize("chat", [name for name in KINDS if name != "llama3"], indirect=True)  # test_chat.py has that one
def test_every_place_is_spelled_drafted_and_read_back(chat):
    template = template_of(chat)
    for v in range(1000):
        x, y = f"{v:03d}", f"{(7 * v + 123) % 1000:03d}"  # y takes all values, too
        point, (*parts, bracket) = (float(f"0.{x}"), float(f"0.{y}")), spelled(chat, x, y)
        answer = sum(parts, [])  # up to the last digit
        assert chat.answer(*point) == [*answer, *bracket, chat.eos] and chat.parse(answer) == point
        for n in range(len(answer)):
            assert chat.place.draft(answer[:n]) == [*takewhile(lambda token: token is not None, template[n:])]
    for n in [n for n, token in enumerate(template[:-1]) if token]:  # what has left the template is not drafted
        assert chat.place.draft([*answer[:n], chat.bos]) == chat.place.draft([*answer[:n], chat.bos, *answer[n + 1:-1]]) == []
    for point, numbers in ((0.9996, -0.2), ("999", "000")), ((-1e-9, 7), ("000", "999")), ((0.4996, 0.0004), ("500", "000")):
        assert chat.answer(*point) == sum(spelled(chat, *numbers), []) + [chat.eos]


def test_labels_are_the_answers_with_one_end_token_each(chat):
    rounds, ids, labels, text = [], [], [], ""
    for keypoint, x, y in zip(THING.keypoints * 2, ("250", "999", "007", "314"), ("000", "500", "120", "159")):
        asked = "User: where is the {}?\nReference: {}\nAssistant:".format(*keypoint)
        question, answer = chat.tokenizer.encode(asked, add_special_tokens=False).ids, sum(spelled(chat, x, y), []) + [chat.eos]
        ids, labels = ids + question + answer, labels + [IGNORE] * len(question) + answer
        text += f"{asked} [0.{x},0.{y}]"
        rounds.append((keypoint, (float(f"0.{x}"), float(f"0.{y}"))))
    assert chat.conversation(Scene(THING, rounds)) == (ids, labels)
    assert chat.eos > 2 or "]U" in chat.tokenizer.encode(text).tokens  # in one go the pieces would fuse


def teach(model, chat, images, questions, answers):
    """Makes an untrained network say these answers: solves for the lm_head whose logits are 1 for each next token and 0 for others."""
    hidden, said, answers = [], sum(answers, []), iter(answers)
    for image, asked in zip(model.see(images), questions):
        for question in asked:
            answer = next(answers)
            text = model.llama.embed_tokens(torch.tensor([chat.bos, *chat.newline, *question, *answer]))
            hidden.append(model.llama(torch.cat((text[:1], image, text[1:]))[None])[0][0, -1 - len(answer):-1])
    tokens, which = torch.tensor(said).unique(return_inverse=True)
    rows = torch.linalg.lstsq(torch.cat(hidden).double(), F.one_hot(which).double()).solution.T
    model.llama.lm_head.weight.zero_()[tokens] = rows.float()


@torch.no_grad()
def test_locate_gives_the_tokens_of_plain_greedy_decoding(chat):
    torch.manual_seed(0)
    llama = Llama(LlamaConfig(chat.tokenizer.get_vocab_size(), 128, 64, 2, 4, 2, 32, rope={"rope_theta": 1e4, "rope_type": "default"}))
    model, images = CapeLLM(ViT(ViTConfig(32, 2, 2, image_size=56)), llama).eval(), torch.randn(2, 3, 56, 56)
    names = ["left ear", "nose", "right ear"], ["left ear", "naked chin", "tip of the tail"]
    questions = [chat.questions(Category("thing", [(name, "") for name in asked])) for asked in names]
    answers = [chat.answer(0.123, 0.456), chat.answer(0.999, 0), chat.encode("The nose") + [chat.eos], chat.answer(0.507, 0.12),
               [*ids_of(chat, [chat.kind.bracket]), chat.eos], chat.encode(" [0.314;0.159]")]  # three leave the template: at once, later
    for said in None, answers:  # an untrained network says anything
        if said:
            teach(model, chat, images, questions, said)
        expected = one_by_one(model, images, questions, chat)
        assert not said or expected == [answer[:len(chat.place.template)] for answer in said]
        assert [ids for told in model.locate(images, questions, chat) for ids, _ in told] == expected
    passes = []
    model.llama.norm.register_forward_hook(lambda *_: passes.append(1))
    [[(ids, _), _]] = model.locate(images[:1], [questions[0][:2]], chat)
    assert chat.parse(ids) == (0.123, 0.456) and len(passes) == chat.kind.passes
