"""chat.py: conversations with four kinds of tokenizers, their answers, and the paper's instructions."""

import numpy as np
import pytest
from conftest import runs, sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from chat import IGNORE, INSTRUCTIONS, OUTLINE, PRETRAINING, WORDINGS, Chat, Scene
from data import Category

quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
texts = st.text(st.characters(codec="utf-8", exclude_characters="\u2581"), min_size=1, max_size=30)
CUP = Category("tea_cup", [("rim", "where one drinks."), ("foot", "below (or under) it"), ("left ear", "its handle"), ("heart", "inside")])


@pytest.mark.parametrize("chat", ["llama3"], indirect=True)
def test_llama3_sequence_is_the_published_one(chat):
    id, points = chat.tokenizer.token_to_id, CUP.keypoints[1:3]
    asked = [chat.tokenizer.encode(f"User: where is the {n}?\nReference: {t}\nAssistant:", add_special_tokens=False).ids for n, t in points]
    for v, w in zip(range(1000), range(999, -1, -1)):
        told = [[*(id(t) for t in ("\u0120[", "0", ".", f"{a:03}", ",", "0", ".", f"{b:03}", "]")), 128001] for a, b in ((v, w), (w, v))]
        rounds = zip(points, [(v / 1000, w / 1000), (w / 1000, v / 1000)])
        assert runs(*chat.conversation(Scene(CUP, rounds))) == [asked[0], told[0], asked[1], told[1]]
    assert (chat.bos, chat.newline) == (128000, [id("\u010a")]) and chat.place.template == [*told[0][:3], None, *told[0][4:7], None]


@quick
@given(rounds=st.lists(st.tuples(st.tuples(texts, texts), st.tuples(*[st.floats(-1, 2)] * 2)), min_size=1, max_size=5))
def test_only_answers_are_supervised_and_no_piece_touches_the_next(chat, rounds):
    ids, labels = chat.conversation(Scene(CUP, rounds))
    pieces, alone = runs(ids, labels), [chat.conversation(Scene(CUP, [r])) for r in rounds]
    assert len(pieces) == 2 * len(rounds) and (ids, labels) == (sum((a for a, _ in alone), []), sum((b for _, b in alone), []))
    for ((name, text), point), question, answer in zip(rounds, pieces[::2], pieces[1::2]):
        assert chat.tokenizer.decode(question).split() == f"User: where is the {name}?\nReference: {text}\nAssistant:".split()
        assert len("".join(map(chat.tokenizer.id_to_token, answer[:-1]))) == len(" [0.123,0.456]") and chat.eos not in answer[:-1]
        assert np.abs(np.subtract(chat.parse(answer), np.clip(point, 0, 0.999))).max() < 0.0005 + 1e-9


def test_every_answer_is_drafted_and_read_back_and_malformed_ones_are_none(chat):
    assert chat.answer(1.0, -0.0) == chat.answer(0.9996, -0.2) == chat.answer(np.float64(1.7), -0.0004) == chat.answer(0.999, 0.0)
    for v in range(1000):
        point = v / 1000, (7 * v + 123) % 1000 / 1000
        whole, said, spread = (answer := chat.answer(*point))[:-2], [], []  # whole: up to the last digit
        assert chat.parse(whole) == chat.parse(answer) == point and answer[-1] in (1, 128001)
        while chat.choices and len(said) < len(whole):
            said += chat.place.draft(said)
            spread.append(np.array([token == whole[len(said)] for token in chat.place.digits], float))
            said.append(whole[len(said)])
            assert said == whole[:len(said)] and spread[-1].sum() == 1
        assert len(spread) == chat.choices and len(said) == len(chat.place.template) * (chat.choices > 0)
        for decode in ("greedy", "median", "mean") if v % 50 == 7 else ():
            assert chat.coordinates(whole, spread, decode) == (pytest.approx(point), chat.choices > 0)
    whole = chat.answer(0.987, 0.654)[:len(chat.place.template)]
    assert chat.choices or chat.place.draft([]) == [] and chat.coordinates(whole, np.ones((len(whole), 0)), "median")[1] == 0
    assert chat.place.draft(chat.encode("nose")) == chat.place.draft([whole[0], chat.eos]) == []
    said = ("0.123,0.456", " [.123,.456", " [0.123;0.456", " [0.12,0.456", " [0.1234,0.456", " [0.123,0.4567", " [1.123,0.456",
            " [-0.1,0.456", " [nan,0.456", "The nose", "\n")
    for ids in [[chat.eos], [10**6], answer[-3::-1], *(answer[:n] for n in range(len(answer) - 2)), *map(chat.encode, said)]:
        assert chat.parse(ids) is None, chat.tokenizer.decode(ids)


def test_texts_are_neither_cut_nor_read_as_control_tokens(tmp_path):
    tokenizer = Tokenizer.from_str(sentencepiece())
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.enable_truncation(8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": 1, "vocab_size": 400}')
    chat = Chat(tmp_path)
    [question] = chat.questions(Category("cup", [("rim", "above </s> or <s>")]))
    assert chat.eos not in question and text(chat, question) == "User: where is the rim?\nReference: above </s> or <s>\nAssistant:"


# ---------------------------------------------------------------------------------------------------------- instructions

RIM, EAR = ((CUP.keypoints[0], (0.1, 0.25)), " [0.100,0.250]"), ((CUP.keypoints[2], (0.5, 0.9996)), " [0.500,0.999]")
PLAIN = [("User: where is the rim?\nReference: where one drinks.\nAssistant:", RIM[1]),
         ("User: where is the left ear?\nReference: its handle\nAssistant:", EAR[1])]
NAMES = "Keypoints: rim, foot, left ear, heart\n"
TURNS = {  # of a conversation about RIM and EAR
    "description": PLAIN, "diverse": PLAIN,  # until something is drawn
    "name": [("User: where is the rim?\nAssistant:", RIM[1]), ("User: where is the left ear?\nAssistant:", EAR[1])],
    "list": [(NAMES + PLAIN[0][0], RIM[1]), PLAIN[1]],
    "outline": [(OUTLINE + PLAIN[0][0], RIM[1]), PLAIN[1]], "diverse-outline": [(OUTLINE + PLAIN[0][0], RIM[1]), PLAIN[1]],
    "step": [("User: what is in the photo?\nAssistant:", " tea cup"), *PLAIN],
    "pretrain direct": [("User: which keypoint is at [0.100,0.250]?\nAssistant:", " rim"),
                        ("User: which keypoint is at [0.500,0.999]?\nAssistant:", " left ear")]}
ALL = INSTRUCTIONS | {f"pretrain {way}": instruction for way, instruction in PRETRAINING.items()}


def text(chat, ids):
    """What a tokenizer wrote, without the end token; a SentencePiece one loses the space before a piece."""
    return chat.tokenizer.decode([id for id in ids if id != chat.eos]).strip()


def turns(chat, scene):
    """A conversation read back: [(question, answer), ...]. All that is supervised ends with the end token, and nothing else does."""
    pieces = runs(*chat.conversation(scene))
    assert all((ids[-1] == chat.eos) == bool(i % 2) and chat.eos not in ids[:-1] for i, ids in enumerate(pieces))
    return [(text(chat, q), text(chat, a)) for q, a in zip(pieces[::2], pieces[1::2], strict=True)]


def stripped(turns):
    return [(question.strip(), answer.strip()) for question, answer in turns]


def test_the_papers_instructions_are_known():
    assert {*ALL} == {*TURNS, "pretrain step"}


@pytest.mark.parametrize("instruction", TURNS)
def test_an_instruction_says_what_the_paper_compares(chat, instruction):
    assert turns(Chat(chat.folder, ALL[instruction]), Scene(CUP, [RIM[0], EAR[0]])) == stripped(TURNS[instruction])


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_a_test_asks_as_training_does(chat, instruction):
    """One keypoint at a time, or one after another in one conversation; what the object is stands apart and is asked first."""
    chat = Chat(chat.folder, ALL[instruction])
    where = [(keypoint, (0.1, 0.2)) for keypoint in CUP.keypoints]

    def asked(scene):
        return runs(*chat.conversation(scene))[::2]
    first = [chat.opening] if instruction == "step" else []
    assert text(chat, chat.opening) == ("User: what is in the photo?\nAssistant:" if first else "")
    assert [[*first, q] for q in chat.questions(CUP)] == [asked(Scene(CUP, [one])) for one in where]
    assert [*first, *chat.questions(CUP, cumulative=True)] == asked(Scene(CUP, where))


@pytest.mark.parametrize("instruction, opening", [("diverse", ""), ("diverse-outline", OUTLINE)])
def test_wordings_are_drawn_in_training(chat, instruction, opening):
    chat, seen = Chat(chat.folder, ALL[instruction]), set()
    for seed in range(60):
        scene = [Scene(CUP, [RIM[0], EAR[0]], rng=np.random.default_rng(seed)) for _ in range(2)]
        (first, _), (second, _) = said = turns(chat, scene[0])
        assert said == turns(chat, scene[1])  # the same again
        lines = first.removeprefix(opening).split("\n"), second.split("\n")
        assert [line[1:] for line in lines] == [[f"Reference: {t}", "Assistant:"] for t in ("where one drinks.", "its handle")]
        wordings = [{f"User: {w.format(name)}": w for w in WORDINGS}[line[0]] for name, line in zip(("rim", "left ear"), lines)]
        seen.add(tuple(wordings))
    assert {w for pair in seen for w in pair} == {*WORDINGS} and any(a != b for a, b in seen)


def test_pretraining_step_by_step(chat):
    """Category, whether a keypoint is to be seen, which of those asked it is that lies here: names and answers fit each other."""
    chat, seen, absent = Chat(chat.folder, PRETRAINING["step"]), set(), []
    for seed in range(40):
        hidden = ["foot", "heart"] if seed % 2 else []
        what, *rest = turns(chat, Scene(CUP, [RIM[0], EAR[0]], hidden, np.random.default_rng(seed)))
        assert what == ("User: what is in the photo?\nAssistant:", "tea cup") and len(rest) == 4
        for (exists, answer), (which, name), own, place in zip(rest[::2], rest[1::2], ("rim", "left ear"), (RIM[1], EAR[1])):
            named = exists.removeprefix("User: is the ").removesuffix(" to be seen?\nAssistant:")
            assert (named, answer) in ({(own, "yes")} | {(h, "no") for h in hidden})
            assert which in [f"User: which of {a}, {b} is at{place}?\nAssistant:" for a, b in (("rim", "left ear"), ("left ear", "rim"))]
            assert name == own
            seen |= {(named, answer), which}
            absent += [answer == "no"] * (hidden != [])
    assert 0.35 < np.mean(absent) < 0.65  # where a keypoint is hidden it is asked for half of the time
    assert len(seen) == 4 + 4  # two existing and two hidden keypoints; two places, their names in either order


@pytest.mark.parametrize("instruction", ["description", "step"])
def test_keypoint_token_stands_for_a_place_and_its_label_tells_it(chat, instruction):
    spelled, chat = Chat(chat.folder, ALL[instruction]), Chat(chat.folder, ALL[instruction], "token")
    ids, labels = chat.conversation(Scene(CUP, [RIM[0], EAR[0]]))
    pieces = runs(*spelled.conversation(Scene(CUP, [RIM[0], EAR[0]])))
    word = pieces[:2] if instruction == "step" else []
    questions = pieces[::2][len(word) // 2:]
    assert ids == [*sum(word, []), *questions[0], 128256, chat.eos, *questions[1], 128256, chat.eos]
    supervised = {i: label for i, label in enumerate(labels) if label != IGNORE}
    spoken = {len(word[0]) + i: id for i, id in enumerate(word[1])} if word else {}
    first = len(sum(word, [])) + len(questions[0])
    assert supervised == {**spoken, first: 128256 + 100250, first + 2 + len(questions[1]): 128256 + 500999}
    assert chat.questions(CUP) == spelled.questions(CUP)
    assert chat.coordinates([128256, chat.eos], [0.25, 0.75]) == ((0.25, 0.75), None)
    assert chat.place.unread([128256, chat.eos]) == [chat.eos]


def test_what_is_left_to_read_of_an_answer(chat):
    """The last digit, and what closes an answer; or the end token alone where the answer has it already."""
    answer = chat.answer(0.123, 0.456)
    if chat.choices:
        assert answer[:len(chat.place.template) - 1] + chat.place.unread(answer[:len(chat.place.template)]) == answer
    assert chat.place.unread([*answer[:2], chat.eos]) == chat.words.unread([5, chat.eos]) == [chat.eos]
    assert chat.words.unread([5, 6]) == [6, chat.eos] and chat.words.draft([]) == chat.words.draft([5]) == []
