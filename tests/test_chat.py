"""chat.py: conversations with four kinds of tokenizers, their answers, and the paper's instructions."""

import numpy as np
import pytest
from conftest import ROOT, make_chat, runs, sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from annotations import read_descriptions
from chat import IGNORE, INSTRUCTIONS, OUTLINE, PRETRAINING, WORDINGS, Category, Chat, Scene, spell
from decode import Prediction, read_coordinates

CUP = Category("tea_cup", [("rim", "where one drinks."), ("foot", "below (or under) it"),
                           ("left ear", "its handle"), ("heart", "inside")])

quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
texts = st.text(st.characters(codec="utf-8", exclude_characters="\u2581"), min_size=1, max_size=30)
points = st.tuples(st.floats(-1, 2), st.floats(-1, 2))
rounds = st.lists(st.tuples(st.tuples(texts, texts), points), min_size=1, max_size=5)


def spelled(chat, point):
    """The tokens of an answer, the end token among them."""
    return chat.encode(spell(point)) + [chat.eos]


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
        tokens, labels, _ = chat.conversation(scene)
        assert runs(tokens, labels) == [where_foot, v_w, where_ear, w_v]
    assert (chat.bos, chat.newline) == (128000, tokens_of("\u010a"))
    assert chat.coordinates.known == [tokens_of("\u0120[", "0", "."), tokens_of(",", "0", ".")]


@quick
@given(rounds)
def test_only_answers_are_supervised_and_no_piece_touches_the_next(chat, rounds):
    tokens, labels, keypoints = chat.conversation(Scene(CUP, rounds))
    alone = [chat.conversation(Scene(CUP, [one])) for one in rounds]
    assert tokens == sum((tokens for tokens, _, _ in alone), [])
    assert labels == sum((labels for _, labels, _ in alone), [])
    assert keypoints == []  # that is of <KEYPOINT>

    pieces = runs(tokens, labels)
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
    texts = ["a\n", *(spell((v / 1000, v / 1000)) for v in range(1000))]
    words = dict.fromkeys(word for text in texts for word, _ in pieces.pre_tokenize_str(text))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = pieces
    chat = make_chat(tmp_path, tokenizer.to_str(), 0, 0)
    assert len(chat.coordinates.known) == choices
    assert len(chat.coordinates.digits) == {2: 1000, 6: 10, 0: 0}[choices]


def check_reading(chat, answer, distributions, point):
    """A certain answer is read alike in all three ways; without distributions its point alone is known."""
    for decode in "greedy", "median", "mean":
        prediction = read_coordinates(answer, distributions, chat, decode)
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
    [question] = chat.questions(Category("cup", [("rim", "above </s> or <s>")]))
    assert chat.bos not in question and chat.eos not in question
    expected = "User: where is the rim?\nReference: above </s> or <s>\nAssistant:"
    assert text_of(chat, question) == expected


def test_what_is_left_to_read_of_an_answer(chat):
    """The last token chosen, and what ends an answer; or the end token alone where the answer has it."""
    answer, form = spelled(chat, (0.123, 0.456)), chat.coordinates
    if chat.choices:
        whole = answer[:form.max_tokens]
        assert whole[:-1] + form.still_to_read(whole) == answer
    assert form.still_to_read([*answer[:2], chat.eos]) == [chat.eos]
    assert chat.words.still_to_read([5, chat.eos]) == [chat.eos]
    assert chat.words.still_to_read([5, 6]) == [6, chat.eos]
    assert chat.words.known == []


# ----------------------------------------------------------------------------------------------- instructions

RIM, EAR = CUP.keypoints[0], CUP.keypoints[2]
ASKED = [(RIM, (0.1, 0.25)), (EAR, (0.5, 0.9996))]
AT_RIM, AT_EAR = "[0.100,0.250]", "[0.500,0.999]"
WHERE_RIM = "User: where is the rim?\nReference: where one drinks.\nAssistant:"
WHERE_EAR = "User: where is the left ear?\nReference: its handle\nAssistant:"
NAMES = "Keypoints: rim, foot, left ear, heart\n"

PLAIN = [(WHERE_RIM, AT_RIM), (WHERE_EAR, AT_EAR)]
OUTLINED = [(OUTLINE + WHERE_RIM, AT_RIM), (WHERE_EAR, AT_EAR)]
TURNS = {  # questions and answers of a conversation about ASKED
    "description": PLAIN,
    "diverse": PLAIN,  # until something is drawn
    "name": [("User: where is the rim?\nAssistant:", AT_RIM),
             ("User: where is the left ear?\nAssistant:", AT_EAR)],
    "list": [(NAMES + WHERE_RIM, AT_RIM), (WHERE_EAR, AT_EAR)],
    "outline": OUTLINED,
    "diverse-outline": OUTLINED,
    "step": [("User: what is in the photo?\nAssistant:", "tea cup"), *PLAIN],
    "pretrain direct": [("User: which keypoint is at [0.100,0.250]?\nAssistant:", "rim"),
                        ("User: which keypoint is at [0.500,0.999]?\nAssistant:", "left ear")]}
ALL = INSTRUCTIONS | {f"pretrain {name}": instruction for name, instruction in PRETRAINING.items()}


def turns(chat, scene):
    """A conversation read back: [(question, answer), ...]. The end token ends answers and is nowhere else."""
    tokens, labels, _ = chat.conversation(scene)
    pieces = runs(tokens, labels)
    questions, answers = pieces[::2], pieces[1::2]
    assert all(chat.eos not in question for question in questions)
    assert all(answer.index(chat.eos) == len(answer) - 1 for answer in answers)
    return [(text_of(chat, question), text_of(chat, answer))
            for question, answer in zip(questions, answers, strict=True)]


def test_the_papers_instructions_are_known():
    assert {*ALL} == {*TURNS, "pretrain step"}


@pytest.mark.parametrize("instruction", TURNS)
def test_an_instruction_says_what_the_paper_compares(chat, instruction):
    said = turns(Chat(chat.folder, ALL[instruction]), Scene(CUP, ASKED))
    assert said == [(question.strip(), answer) for question, answer in TURNS[instruction]]


def test_what_the_object_is_follows_after_a_space(chat):
    tokens, *_ = Chat(chat.folder, INSTRUCTIONS["step"]).conversation(Scene(CUP, ASKED[:1]))
    what = tokens[:tokens.index(chat.eos)]
    assert chat.tokenizer.decode(what) == "User: what is in the photo?\nAssistant: tea cup"


@pytest.mark.parametrize("chat", ["llama3", "tiny"], indirect=True)
def test_the_longest_name_of_a_category_can_be_said(chat):
    categories = read_descriptions(ROOT / "descriptions.json").values()
    names = [category.name.replace("_", " ") for category in categories]
    said = [chat.encode(f" {name}") + [chat.eos] for name in names]
    assert max(map(len, said)) <= chat.words.max_tokens


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_a_test_asks_as_training_does(chat, instruction):
    """One keypoint at a time, or one after another; what the object is stands apart and is asked first."""
    chat = Chat(chat.folder, INSTRUCTIONS[instruction])
    asked = [(keypoint, (0.1, 0.2)) for keypoint in CUP.keypoints]

    def questions_of_training(asked):
        tokens, labels, _ = chat.conversation(Scene(CUP, asked))
        return runs(tokens, labels)[::2]

    opening = "User: what is in the photo?\nAssistant:" if instruction == "step" else ""
    assert text_of(chat, chat.opening) == opening
    first = [chat.opening] if instruction == "step" else []
    for one, question in zip(asked, chat.questions(CUP), strict=True):
        assert questions_of_training([one]) == [*first, question]
    assert questions_of_training(asked) == [*first, *chat.questions(CUP, cumulative=True)]


@pytest.mark.parametrize("instruction, opening", [("diverse", ""), ("diverse-outline", OUTLINE)])
def test_wordings_are_drawn_in_training(chat, instruction, opening):
    chat, drawn = Chat(chat.folder, INSTRUCTIONS[instruction]), set()

    def wording_of(question, name, description):
        asked, *reference = question.split("\n")
        assert reference == [f"Reference: {description}", "Assistant:"]
        return {f"User: {wording.format(name)}": wording for wording in WORDINGS}[asked]

    for seed in range(60):
        said, again = (turns(chat, Scene(CUP, ASKED, rng=np.random.default_rng(seed))) for _ in range(2))
        assert said == again
        (about_rim, _), (about_ear, _) = said
        assert about_rim.startswith(opening)
        drawn.add((wording_of(about_rim.removeprefix(opening), *RIM), wording_of(about_ear, *EAR)))
    assert {wording for pair in drawn for wording in pair} == {*WORDINGS}
    assert any(first != second for first, second in drawn)  # each question draws its own


def test_pretraining_step_by_step(chat):
    """What the object is; whether it shows a keypoint; which of those asked is at a point. Answers fit."""
    chat, seen, says_no = Chat(chat.folder, PRETRAINING["step"]), set(), []
    for seed in range(40):
        hidden = ["foot", "heart"] if seed % 2 else []
        what, *rest = turns(chat, Scene(CUP, ASKED, hidden, np.random.default_rng(seed)))
        assert what == ("User: what is in the photo?\nAssistant:", "tea cup")
        assert len(rest) == 4
        for keypoint, at, exists, which in ("rim", AT_RIM, *rest[:2]), ("left ear", AT_EAR, *rest[2:]):
            question, answer = exists
            name = question.removeprefix("User: is the ").removesuffix(" to be seen?\nAssistant:")
            assert (name, answer) in [(keypoint, "yes"), *((absent, "no") for absent in hidden)]
            assert which in [(f"User: which of {names} is at {at}?\nAssistant:", keypoint)
                             for names in ("rim, left ear", "left ear, rim")]
            seen |= {(name, answer), which}
            if hidden:
                says_no.append(answer == "no")
    assert 0.35 < np.mean(says_no) < 0.65  # where a keypoint is hidden, one is asked for half of the time
    assert len(seen) == 4 + 4  # two shown and two hidden keypoints; two points, their names in either order


# ------------------------------------------------------------------------------------------------- <KEYPOINT>


@pytest.mark.parametrize("instruction", ["description", "step"])
def test_keypoint_token_stands_for_a_point_and_has_no_label(chat, instruction):
    in_text, chat = (Chat(chat.folder, INSTRUCTIONS[instruction], answers) for answers in ("text", "token"))
    tokens, labels, points = chat.conversation(Scene(CUP, ASKED))
    text_tokens, text_labels, _ = in_text.conversation(Scene(CUP, ASKED))
    pieces = runs(text_tokens, text_labels)
    what, said = (pieces[0], pieces[1]) if instruction == "step" else ([], [])
    where_rim, _, where_ear, _ = pieces[-4:]

    answer = [128256, chat.eos]
    assert tokens == [*what, *said, *where_rim, *answer, *where_ear, *answer]
    assert labels == [IGNORE] * len(what) + said + [IGNORE] * (len(tokens) - len(what) - len(said))
    assert points == [(0.1, 0.25), (0.5, 0.9996)]  # not rounded
    assert chat.questions(CUP) == in_text.questions(CUP)
    assert chat.coordinates.still_to_read(answer) == [chat.eos]
