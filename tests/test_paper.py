"""paper/: instructions as the paper shows them, turns against generate(), <KEYPOINT> by hand, whole runs."""

import math
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, runs
from hypothesis import given
from hypothesis import strategies as st
from mp100 import make_wagons_and_kites
from PIL import Image
from programs import command_line, read_checkpoint, read_results, refused, to_train

import decode
import evaluate
import train
from chat import IGNORE, AnswerFormat, Category, Chat, Scene, ask_with_description
from common import InputError, read_json
from data import Crop, Example, Instance, TrainingSet, collate, parse_descriptions
from decode import Prediction
from model import CapeLLM, load_network
from paper import keypoint_token
from paper.iccv import LONGEST_NAME, encode_in_turns, group_dynamically, locate_in_turns
from paper.instructions import (
    INSTRUCTIONS,
    OUTLINE,
    PRETRAINING,
    WORDINGS,
    ask_step_by_step,
    find_instruction,
)
from paper.keypoint_token import KeypointChat, read_labels, write_label

CUP = Category("tea_cup", [("rim", "where one drinks."), ("foot", "below (or under) it"),
                           ("left ear", "its handle"), ("heart", "inside")])


def load_tiny(tiny, **options):
    """An untrained network that sees photos of 56 pixels, 4 x 4 patches, and its Chat."""
    args = dict(vit=tiny / "vit", llm=tiny / "llm", image_size=56, seed=0, tune_vit="lora", tune_llm="lora",
                answer="text", instruction="description", pretrain=None)
    model, chat = load_network(Namespace(**args | options))
    return model.eval(), chat


# ----------------------------------------------------------------------------------------------- instructions

RIM, EAR = CUP.keypoints[0], CUP.keypoints[2]
ASKED = [(RIM, (0.1, 0.25)), (EAR, (0.5, 0.9996))]
AT_RIM, AT_EAR = "[0.100,0.250]", "[0.500,0.999]"
WHERE_RIM = "User: where is the rim?\nReference: where one drinks.\nAssistant:"
WHERE_EAR = "User: where is the left ear?\nReference: its handle\nAssistant:"
WHAT = "User: what is in the photo?\nAssistant:"
NAMES = "Keypoints: rim, foot, left ear, heart\n"

PLAIN = [(WHERE_RIM, AT_RIM), (WHERE_EAR, AT_EAR)]
OUTLINED = [(OUTLINE + WHERE_RIM, AT_RIM), (WHERE_EAR, AT_EAR)]
TURNS = {  # questions and answers of a conversation about ASKED
    "description": PLAIN,
    "diverse": PLAIN,  # until something is drawn
    "name": [("User: where is the rim?\nAssistant:", AT_RIM),
             ("User: where is the left ear?\nAssistant:", AT_EAR)],
    "list": [(NAMES + WHERE_RIM, AT_RIM), (WHERE_EAR, AT_EAR)],
    "authors": [(f"User: Where is the {name} of this object in this image? Please provide its coordinates.\n"
                 f"Reference: {text}\nAssistant:", point)
                for name, text, point in (("rim", "where one drinks.", AT_RIM),
                                          ("left ear", "its handle", AT_EAR))],
    "outline": OUTLINED,
    "diverse-outline": OUTLINED,
    "step": [(WHAT, "tea cup"), *PLAIN],
    "pretrain direct": [("User: which keypoint is at [0.100,0.250]?\nAssistant:", "rim"),
                        ("User: which keypoint is at [0.500,0.999]?\nAssistant:", "left ear")]}
ALL = INSTRUCTIONS | {f"pretrain {name}": instruction for name, instruction in PRETRAINING.items()}


def pieces_of(chat, scene):
    """A conversation after BOS and "\\n", cut into questions and answers: token lists in turn."""
    tokens, labels = chat.encode_conversation(scene)
    head = [chat.bos, *chat.newline]
    assert tokens[:len(head)] == head and labels[:len(head)] == [IGNORE] * len(head)
    return runs(tokens[len(head):], labels[len(head):])


def turns(chat, scene):
    """A conversation read back: [(question, answer), ...]. The end token ends answers and is nowhere else."""
    pieces = pieces_of(chat, scene)
    questions, answers = pieces[::2], pieces[1::2]
    assert all(chat.eos not in question for question in questions)
    assert all(answer.index(chat.eos) == len(answer) - 1 for answer in answers)

    def text_of(tokens):  # a SentencePiece tokenizer loses the space before a piece
        return chat.tokenizer.decode([token for token in tokens if token != chat.eos]).strip()
    return [(text_of(question), text_of(answer)) for question, answer in zip(questions, answers, strict=True)]


def test_the_papers_instructions_are_found_by_their_names():
    assert {*ALL} == {*TURNS, "pretrain step"}
    assert [*INSTRUCTIONS][0] == "description" and INSTRUCTIONS["description"] is ask_with_description
    assert all(find_instruction(name) is instruction for name, instruction in INSTRUCTIONS.items())
    assert find_instruction("step") is ask_step_by_step
    for name, instruction in PRETRAINING.items():
        assert find_instruction("description", name) is instruction
    for name, pretrain, says in (
            ("long", None, "long: .*description, name, list"), ("", None, "no such"),
            ("description", "long", "long: .*direct, step"), ("step", "direct", "leave out")):
        with pytest.raises(InputError, match=f"^[^\n]*{says}[^\n]*$"):
            find_instruction(name, pretrain)


@pytest.mark.parametrize("instruction", TURNS)
def test_an_instruction_says_what_the_paper_compares(chat, instruction):
    said = turns(Chat(chat.folder, ALL[instruction]), Scene(CUP, ASKED))
    assert said == [(question.strip(), answer) for question, answer in TURNS[instruction]]


def test_what_the_object_is_follows_after_a_space(chat):
    question, answer, *_ = pieces_of(Chat(chat.folder, ask_step_by_step), Scene(CUP, ASKED[:1]))
    assert chat.tokenizer.decode(question + answer[:-1]) == f"{WHAT} tea cup"


@pytest.mark.parametrize("chat", ["llama3", "tiny"], indirect=True)
def test_the_longest_name_of_a_category_can_be_said(chat):
    categories = parse_descriptions(read_json(ROOT / "descriptions.json"), "descriptions.json").values()
    said = [chat.encode_answer(category.name.replace("_", " "))[0] for category in categories]
    assert max(map(len, said)) <= LONGEST_NAME


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_a_test_asks_as_training_does(chat, instruction):
    """One keypoint at a time, or one after another; what the object is stands apart and is asked first."""
    chat = Chat(chat.folder, INSTRUCTIONS[instruction])
    asked = [(keypoint, (0.1, 0.2)) for keypoint in CUP.keypoints]
    first = [chat.encode(WHAT)] if instruction == "step" else []

    def questions_of_training(asked):
        return [chat.newline + question for question in pieces_of(chat, Scene(CUP, asked))[::2][len(first):]]

    assert [pieces_of(chat, Scene(CUP, [one]))[0] for one in asked if first] == first * len(asked)
    for one, question in zip(asked, chat.encode_questions(CUP), strict=True):
        assert questions_of_training([one]) == [question]
    assert questions_of_training(asked) == encode_in_turns(chat, CUP)
    has_text_before = instruction in ("list", "outline", "diverse-outline")
    assert (encode_in_turns(chat, CUP) == chat.encode_questions(CUP)) == (not has_text_before)


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
        invisible = ["foot", "heart"] if seed % 2 else []
        what, *rest = turns(chat, Scene(CUP, ASKED, invisible, np.random.default_rng(seed)))
        assert what == (WHAT, "tea cup")
        assert len(rest) == 4
        for keypoint, at, exists, which in ("rim", AT_RIM, *rest[:2]), ("left ear", AT_EAR, *rest[2:]):
            question, answer = exists
            name = question.removeprefix("User: is the ").removesuffix(" to be seen?\nAssistant:")
            assert (name, answer) in [(keypoint, "yes"), *((absent, "no") for absent in invisible)]
            assert which in [(f"User: which of {names} is at {at}?\nAssistant:", keypoint)
                             for names in ("rim, left ear", "left ear, rim")]
            seen |= {(name, answer), which}
            if invisible:
                says_no.append(answer == "no")
    assert 0.35 < np.mean(says_no) < 0.65  # where a keypoint is invisible, one is asked for half of the time
    assert len(seen) == 4 + 4  # two visible and two invisible keypoints; two points, names in either order


# --------------------------------------------------------------------------------------------- dynamic groups


def test_dynamic_rounds_ask_every_keypoint_once_in_as_many_conversations_as_four():
    sizes = []
    for n in range(1, 69):
        groups = group_dynamically(n, "dynamic", np.random.default_rng(n))
        assert sorted(sum(groups, [])) == [*range(n)]
        assert len(groups) == math.ceil(n / 4)
        assert all(groups)
        sizes += map(len, groups)
    assert set(sizes) > {*range(1, 9)}
    assert np.mean(sizes) == pytest.approx(4, abs=0.5)


def test_dynamic_rounds_are_cut_anywhere():
    drawn = [group_dynamically(17, "dynamic", np.random.default_rng(seed)) for seed in range(20)]
    assert len({repr(groups) for groups in drawn}) == 20
    drawn = [group_dynamically(5, "dynamic", np.random.default_rng(seed)) for seed in range(50)]
    assert {tuple(map(len, groups)) for groups in drawn} == {(1, 4), (2, 3), (3, 2), (4, 1)}


# ------------------------------------------------------------------------------------------------------ turns


class MadeUpChat(Chat):
    """A Chat of token numbers without texts, whose format is made up, with `n` choices a coordinate.

    Formats that an untrained network keeps to are learned from its own answers. Every answer in the format is
    the same point.
    """

    def __init__(self, n, instruction=ask_with_description):
        self.bos, self.eos, self.newline, self.instruction = 0, 1, [3], instruction
        more = [[]] * (n - 1)
        self.coordinates = AnswerFormat(
            known=[[10, 11], *more, [12, 11], *more], digits=[*range(100, 350 if n == 1 else 110)],
            ending=[13, self.eos], max_tokens=4 + 2 * n)

    def encode(self, text):
        assert text == WHAT
        return [20, 21, 22]

    def learn(self, answer):
        """Makes the format that of this answer: the tokens known in it and the digits chosen."""
        known, chosen = self.split(answer)
        others = [token for token in range(20, 512) if token not in chosen]
        digits = [*dict.fromkeys(chosen), *others][:len(self.coordinates.digits)]
        self.coordinates = replace(self.coordinates, known=known, digits=digits)

    def split(self, answer):
        """An answer as long as the format -> the tokens before each choice, and the choices."""
        rest = iter(answer)
        parts = [([next(rest) for _ in known], next(rest)) for known in self.coordinates.known]
        return [known for known, _ in parts], [choice for _, choice in parts]

    def parse(self, answer):
        if len(answer) != self.coordinates.max_tokens:
            return None
        known, chosen = self.split(answer)
        is_kept = known == self.coordinates.known and {*chosen} <= {*self.coordinates.digits}
        return (0.25, 0.75) if is_kept else None


def close(answer, ending):
    """An answer with its end: what the conversation goes on from."""
    return answer if answer[-1] == ending[-1] else [*answer, *ending]


def begin(model, image, chat):
    """The tokens before a photo's first question; with `step`, what it shows in the model's own words."""
    start = [chat.bos, *chat.newline]
    if chat.instruction is not ask_step_by_step:
        return start
    start += chat.encode(WHAT)
    return start + close(model.generate(image[None], start, chat.eos, LONGEST_NAME), [chat.eos])


def converse(model, image, questions, chat, cumulative):
    """The answers of the textbook's decoder to a photo's questions, in one conversation or in many."""
    tokens, answers, form = begin(model, image, chat), [], chat.coordinates
    for question in questions:
        asked = tokens + question[len(chat.newline):]
        answers.append(model.generate(image[None], asked, form.ending[-1], form.max_tokens))
        tokens = asked + close(answers[-1], form.ending) if cumulative else tokens
    return answers


def made_up(tiny, counts):
    """A network, photos, and counts[p] questions of unequal lengths about photo p."""
    model, _ = load_tiny(tiny)
    lengths = iter(torch.randint(1, 12, (sum(counts),)).tolist())
    questions = [[[3, *torch.randint(4, 2000, (next(lengths),)).tolist()] for _ in range(n)] for n in counts]
    return model, torch.randn(len(counts), 3, 56, 56), questions


def flat(lists):
    return sum(lists, [])


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("instruction", [ask_with_description, ask_step_by_step], ids=["plain", "step"])
def test_cumulative_questions_follow_the_models_own_answers(tiny, n, instruction):
    """Formats learned from answers of different turns: conversations leave them, keep them, come back."""
    model, images, questions = made_up(tiny, [3, 0, 5])
    chat, came_back = MadeUpChat(n, instruction), False
    expected = [converse(model, image, asked, chat, True) for image, asked in zip(images, questions)]
    assert len({*map(tuple, flat(expected))}) > 4
    for learned in None, expected[0][0], expected[2][0], expected[0][1], expected[2][2]:
        if learned:
            chat.learn(learned)
        found = locate_in_turns(model, images, questions, chat, cumulative=True)
        assert [[p.answer for p in of_photo] for of_photo in found] == expected
        for of_photo in found:
            kept = [p.x_distribution is not None for p in of_photo]
            assert kept == [p.point is not None for p in of_photo]
            came_back |= (False, True) in zip(kept, kept[1:])
    assert came_back  # a conversation that had left the format


def test_what_the_object_is_comes_first_and_is_said_once_a_photo(tiny):
    """Table 7. A photo's questions all follow one answer, which is read once."""
    model, images, questions = made_up(tiny, [2, 3])
    chat, read = MadeUpChat(3, ask_step_by_step), []
    model.llama.norm.register_forward_hook(lambda _, args, __: read.append((*args[0].shape[:2],)))
    found = locate_in_turns(model, images, questions, chat)
    assert read[:2] == [(2, 1 + 16 + 1), (2, 3)]  # two photos, then the opening's three tokens for each
    n_said = sum(1 for rows, length in read[2:LONGEST_NAME + 1] if (rows, length) == (2, 1))
    assert read[2 + n_said][0] == 2 and read[3 + n_said][0] == 5  # what was said, the questions
    expected = [converse(model, image, asked, chat, False) for image, asked in zip(images, questions)]
    assert [[p.answer for p in of_photo] for of_photo in found] == expected


def test_what_the_object_is_is_said_freely_and_at_any_length(tiny):
    """Two answers in words of unequal lengths, one of which the end token ends."""
    model, images, questions = made_up(tiny, [2, 3])
    chat = MadeUpChat(3, ask_step_by_step)
    found = flat(locate_in_turns(model, images, questions, chat, constrained=True))
    assert [p.point for p in found] == [(0.25, 0.75)] * 5  # coordinates are constrained, and they alone

    start = [chat.bos, *chat.newline, *chat.encode(WHAT)]
    first, second = (model.generate(image[None], start, chat.eos, LONGEST_NAME) for image in images)
    chat.eos = next(token for token in second if token not in first)  # here the second answer is to end
    chat.coordinates = replace(chat.coordinates, ending=[13, chat.eos])
    first, second = (model.generate(image[None], start, chat.eos, LONGEST_NAME) for image in images)
    assert len(second) < len(first) == LONGEST_NAME and second[-1] == chat.eos
    for cumulative in False, True:
        found = locate_in_turns(model, images, questions, chat, cumulative=cumulative)
        assert [[p.answer for p in of_photo] for of_photo in found] == [
            converse(model, image, asked, chat, cumulative) for image, asked in zip(images, questions)]


def test_no_question_is_no_answer(tiny):
    model, images, _ = made_up(tiny, [0, 0])
    for cumulative in False, True:
        for instruction in ask_with_description, ask_step_by_step:
            chat = MadeUpChat(1, instruction)
            assert locate_in_turns(model, images, [[], []], chat, cumulative=cumulative) == [[], []]


@pytest.mark.parametrize("instruction", ["description", "list", "step"])
def test_a_trained_network_in_turns(instruction):
    """That of assets/toy keeps to the format. It has never been asked what is in the photo."""
    toy = ROOT / "assets/toy"
    model, chat = load_tiny(toy, instruction=instruction, image_size=112)
    model.load_state_dict(torch.load(toy / "ckpt.pt", weights_only=True)["model"], strict=False)
    creature = Category("creature", [("first mark", "the orange heart"),
                                     ("first mark", "the sharp end of the green horn")])
    photo = Crop(132.5, 108, 125).cut(toy / "creature.jpg", 112) / 255
    images = torch.stack([photo, photo.flip(2)])
    for cumulative, encode in (False, Chat.encode_questions), (True, encode_in_turns):
        questions = encode(chat, creature)
        found = locate_in_turns(model, images, [questions] * 2, chat, cumulative=cumulative)
        assert [[p.answer for p in of_photo] for of_photo in found] == [
            converse(model, image, questions, chat, cumulative) for image in images]
        assert all(p.confidence is not None for p in flat(found))


# ------------------------------------------------------------------------------------------------- <KEYPOINT>


@given(st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2))
def test_a_point_goes_into_a_label_and_comes_out_of_it(point):
    label = write_label(point)
    assert label < IGNORE
    found = read_labels(torch.tensor([label]))
    assert found.dtype == torch.float32
    assert found[0].tolist() == pytest.approx(point, abs=1.3e-7)  # two roundings to fp32


@pytest.mark.parametrize("instruction", ["description", "step"])
def test_keypoint_token_stands_for_a_point(chat, instruction):
    """The point is the label of the end token, which is read off the hidden state of <KEYPOINT>."""
    in_text, chat = (kind(chat.folder, INSTRUCTIONS[instruction]) for kind in (Chat, KeypointChat))
    tokens, labels = chat.encode_conversation(Scene(CUP, ASKED))
    pieces = pieces_of(in_text, Scene(CUP, ASKED))
    what, said = (pieces[0], pieces[1]) if instruction == "step" else ([], [])
    where_rim, _, where_ear, _ = pieces[-4:]

    head = [chat.bos, *chat.newline, *what]
    answer = [128256, chat.eos]  # the first token that config.json's vocab_size leaves free
    assert tokens == [*head, *said, *where_rim, *answer, *where_ear, *answer]
    points = [label for label in labels if label < IGNORE]
    expected = [pytest.approx(point, abs=2e-7) for _, point in ASKED]
    assert read_labels(torch.tensor(points)).tolist() == expected
    before_rim, before_ear = ([IGNORE] * (len(where) + 1) for where in (where_rim, where_ear))
    assert labels == [*[IGNORE] * len(head), *said, *before_rim, points[0], *before_ear, points[1]]
    assert chat.encode_questions(CUP) == in_text.encode_questions(CUP)
    assert not chat.coordinates.known and not chat.coordinates.digits


def test_points_go_through_a_batch(tiny, tmp_path):
    Image.effect_noise((120, 100), 90).save(tmp_path / "cup.png")
    cups = [Instance(i, 1, "cup.png", (0, 0, 100, 90), np.random.default_rng(i).uniform(35, 65, (4, 2)),
                     np.ones(4, dtype=bool)) for i in range(2)]
    chat, crop = KeypointChat(tiny / "llm"), Crop(52, 49, 160, 0.4)
    examples = [Example(cups[0], crop, [[3, 1], [0]]), Example(cups[1], crop, [[2]])]
    _, tokens, labels, photo_of = collate([*TrainingSet(examples, {1: CUP}, chat, tmp_path, 28)])
    assert photo_of.tolist() == [0, 0, 1]
    is_point = labels < IGNORE
    assert is_point.sum(1).tolist() == [2, 1, 1]
    assert (tokens[is_point] == chat.eos).all() and (labels[~is_point] == IGNORE).all()
    assert torch.equal(tokens[:, :-1][is_point[:, 1:]], torch.full((4,), chat.keypoint))
    points = np.concatenate([cups[0].keypoints[[3, 1, 0]], cups[1].keypoints[[2]]])
    assert crop.to_photo(read_labels(labels[is_point])) == pytest.approx(points, abs=1e-4)


KEYPOINT = 2000  # the first token that the tiny network does not know


def set_points(tokens, labels, places):
    """Puts <KEYPOINT> at {(row, column): point} of a batch, and the point's label after it."""
    for (row, t), point in places.items():
        tokens[row, t] = KEYPOINT
        labels[row, t + 1] = write_label(point)


@pytest.fixture
def pointing(tiny):
    """A network that answers with <KEYPOINT>, two photos, tokens without <KEYPOINT>, and labels of none."""
    model, _ = load_tiny(tiny, answer="token")
    tokens = torch.randint(3, KEYPOINT, (2, 20))
    return model, torch.randn(2, 3, 56, 56), tokens, torch.full_like(tokens, IGNORE)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_keypoint_token_is_new_and_embeddings_and_head_train(pointing, tiny):
    model, usual = pointing[0], load_tiny(tiny)[0]
    head = {f"keypoint_head.{layer}.{p}" for layer in (0, 2) for p in ("weight", "bias")}
    assert trained(model).keys() == trained(usual).keys() | head | {"llama.embed_tokens.weight"}
    new, old = model.llama.embed_tokens.weight, usual.llama.embed_tokens.weight
    assert torch.equal(new[:KEYPOINT], old)
    assert torch.allclose(new[KEYPOINT], old.mean(0))
    assert len(new) == KEYPOINT + 1
    assert new.dtype == torch.float32
    assert torch.equal(model.llama.lm_head.weight, usual.llama.lm_head.weight)
    assert torch.equal(model.projection.weight, usual.projection.weight)  # starts as ever


def last_state(model, image, tokens):
    """The hidden state after BOS, a photo and more tokens, the whole sequence read at once."""
    return model.llama(model.embed(image[None], torch.tensor([tokens])))[0, -1]


def test_loss_of_a_keypoint_token_is_its_distance_and_of_words_the_usual(pointing):
    """Row 0: two points and two words; row 1: a word. By hand, each from a sequence of its own."""
    model, images, tokens, labels = pointing
    set_points(tokens, labels, {(0, 7): (0.12345, 0.456), (0, 15): (0, 0)})
    labels[0, 3:5], labels[1, 19] = tokens[0, 3:5], tokens[1, 19]

    def word(row, t):
        logits = model.llama.lm_head(last_state(model, images[row], tokens[row, :t].tolist()))
        return -logits.log_softmax(-1)[tokens[row, t]]

    def distance(t, *point):
        state = last_state(model, images[0], tokens[0, :t + 1].tolist())
        return (model.keypoint_head(state) - torch.tensor(point)).abs().mean()
    row_0 = (word(0, 3) + word(0, 4) + distance(7, 0.12345, 0.456) + distance(15, 0, 0)) / 4
    expected = (row_0 + word(1, 19)) / 2

    loss = model(images, tokens, labels)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    loss.backward()
    assert model.llama.embed_tokens.weight.grad[KEYPOINT].any()
    assert all(p.grad.any() for p in model.keypoint_head.parameters())


def test_points_are_not_rounded(pointing):
    model, images, tokens, labels = pointing

    def loss(x):
        set_points(tokens, labels, {(0, 9): (x, 0.5), (1, 9): (0.5, 0.5)})
        return model(images, tokens, labels).item()
    # of four coordinates one moves by 0.0004
    assert abs(loss(0.1234) - loss(0.1230)) == pytest.approx(0.0004 / 4, rel=0.01)


def test_points_of_packed_conversations_weigh_as_those_of_separate_ones(pointing):
    """The first has a point and three words, the second two points."""
    model, images, tokens, labels = pointing
    set_points(tokens, labels, {(0, 8): (0.1, 0.2), (1, 12): (0.8, 0.3), (1, 17): (0.5, 0.9)})
    labels[0, 3:6] = tokens[0, 3:6]
    tokens[1, :2] = tokens[0, :2]  # BOS and "\n"
    apart = sum(model(images[:1], tokens[[row]], labels[[row]]) for row in (0, 1)) / 2
    packed = model(images[:1], tokens, labels, torch.tensor([0, 0]))
    torch.testing.assert_close(packed, apart, atol=1e-6, rtol=0)


def to_bf16(model):
    """As on a GPU, where what trains stays fp32."""
    for p in model.parameters():
        p.data = p.data if p.requires_grad else p.data.bfloat16()


def test_keypoint_token_with_frozen_weights_in_bf16(pointing):
    model, images, tokens, labels = pointing
    chat = Namespace(bos=0, eos=1, keypoint=KEYPOINT)
    set_points(tokens, labels, {(0, 9): (0.25, 0.75), (1, 9): (0.25, 0.75)})

    def results():
        [[found], _] = keypoint_token.locate(model, images, [[tokens[0, :9].tolist()], []], chat)
        return model(images, tokens, labels), found.point
    loss, point = results()
    to_bf16(model)
    rough, rough_point = results()
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(loss.item(), rel=0.05)
    assert rough_point == pytest.approx(point, rel=0.05)


@pytest.mark.parametrize("instruction, cumulative", [
    ("description", None), ("description", False), ("description", True), ("step", False), ("step", True)])
@torch.no_grad()
def test_a_point_is_read_off_the_keypoint_token_behind_its_question(tiny, instruction, cumulative):
    """Of Table 8's second row, too, where the model's own words come first."""
    model, chat = load_tiny(tiny, answer="token", instruction=instruction)
    assert chat.keypoint == KEYPOINT
    images, one = torch.randn(2, 3, 56, 56), Category("plate", CUP.keypoints[:1])
    questions = [chat.encode_questions(category) for category in (CUP, one)]
    if cumulative is None:
        found = keypoint_token.locate(model, images, questions, chat)
    else:
        found = locate_in_turns(model, images, questions, chat, cumulative=cumulative)
    for image, asked, predictions in zip(images, questions, found, strict=True):
        tokens = begin(model, image, chat)
        for question, p in zip(asked, predictions, strict=True):
            question = [*question[len(chat.newline):], KEYPOINT]
            expected = model.keypoint_head(last_state(model, image, tokens + question))
            torch.testing.assert_close(torch.tensor(p.point), expected, atol=1e-5, rtol=0)
            assert p == Prediction(p.point, None, [KEYPOINT, chat.eos], None, None)
            assert isinstance(p.point, tuple) and 0 < min(p.point) and max(p.point) < 1
            tokens = [*tokens, *question, chat.eos] if cumulative else tokens


def test_no_question_has_no_keypoint_token(pointing):
    model, images, *_ = pointing
    assert keypoint_token.locate(model, images, [[], []], Namespace(bos=0)) == [[], []]


# ------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def arguments(tiny, tmp_path):
    """arguments("--lr", 1, out="a") -> a command line. 15 examples an epoch: 4 steps, the last filled up."""
    data = make_wagons_and_kites(tmp_path / "data")

    def make(*more, out="run"):
        return to_train(tiny, data, tmp_path / out, "--rounds", 2, "--epochs", 1, *more)
    return make


def joined(tokens):
    return f" {' '.join(map(str, tokens))} "


VARIANTS = [*(["--instruction", name] for name in INSTRUCTIONS), ["--answer", "token"],
            ["--answer", "token", "--instruction", "step"], ["--rounds", "dynamic"],
            ["--pack", "--instruction", "step"]]


@pytest.mark.parametrize("how", VARIANTS, ids=" ".join)
def test_every_variant_trains_and_then_asks_in_the_way_it_was_trained(arguments, tmp_path, monkeypatch, how):
    """Training's conversations, on their way into the network, hold the questions that evaluation asks."""
    trained_on, chosen, asked = [], [], []
    forward, choose = CapeLLM.forward, evaluate.choose_locate

    def spy_on_training(model, *batch):
        trained_on.append(batch)
        return forward(model, *batch)

    def spy_on_asking(trained, cumulative):
        chosen.append(choose(trained, cumulative))

        def locate(*args, **options):
            asked.append(args)
            return chosen[-1](*args, **options)
        return locate
    monkeypatch.setattr(CapeLLM, "forward", spy_on_training)
    monkeypatch.setattr(evaluate, "choose_locate", spy_on_asking)
    monkeypatch.setattr("tools.draw.draw_sheet", lambda *_: None)  # it takes more time than all else
    epochs = 4 if "list" in how or "outline" in how else 1  # each question must once be the first
    train.main(arguments(*how, "--epochs", epochs))
    conversations = [joined(row) for _, tokens, *_ in trained_on for row in tokens.tolist()]
    labels = [row for _, _, labels, _ in trained_on for row in labels.tolist()]
    assert any(label < IGNORE for row in labels for label in row) == ("token" in how)
    assert all((photo_of is not None) == ("--pack" in how) for *_, photo_of in trained_on)
    evaluate.main(command_line(tmp_path / "run" / "ckpt.pt"))
    chat = asked[0][3]

    questions = [question[len(chat.newline):] for _, _, of_photos, _ in asked
                 for of_photo in of_photos for question in of_photo]
    assert len(questions) == 24
    known = [any(joined(question) in said for said in conversations) for question in questions]
    assert all(known) or "diverse" in how or "diverse-outline" in how
    asks = locate_in_turns if "step" in how else keypoint_token.locate if "token" in how else decode.locate
    assert getattr(chosen[0], "func", chosen[0]) is asks
    opening = joined(chat.encode(WHAT))
    assert all((opening in conversation) == ("step" in how) for conversation in conversations)
    sizes = {sum(label != IGNORE for label in row) for row in labels}
    assert "dynamic" not in how or len(sizes) > 2  # of conversations; by twos there are one or two questions

    report, predictions = read_results(tmp_path / "run")
    assert report["objects"] == 6
    if "token" in how:
        assert report["malformed"] == 0
        assert all(p["confidence"] == [None] * len(p["keypoints"]) for p in predictions)
        for option in ["--constrained"], ["--decode", "median"]:
            assert "does not spell points" in refused(evaluate, [tmp_path / "run/ckpt.pt", *option])
    else:
        evaluate.main(command_line(tmp_path / "run" / "ckpt.pt", "--constrained"))
        _, predictions = read_results(tmp_path / "run")
        assert all(0 <= confidence <= 1 for p in predictions for confidence in p["confidence"])


def test_hiera_is_recognised_checked_trained_and_evaluated(arguments, tmp_path, monkeypatch):
    """Table 4. Four blocks of 2 x 2 mask units: four image tokens."""
    size = dict(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], image_size=[64, 64])
    transformers.HieraModel(transformers.HieraConfig(**size)).save_pretrained(tmp_path / "hiera")
    run = arguments("--vit", tmp_path / "hiera", "--image-size", 64)
    train.main([*run, "--check"])
    monkeypatch.setattr("tools.draw.draw_sheet", lambda *_: None)
    train.main(run)
    weights = read_checkpoint(tmp_path / "run")["model"]
    adapters = {f"vit.blocks.{i}.attn.{x}.lora_{matrix}" for i in range(4) for x in "qv" for matrix in "AB"}
    assert {name for name in weights if name.startswith("vit")} == adapters
    assert all(weights[name].any() for name in adapters)
    assert weights["projection.weight"].shape == (32, 64)
    evaluate.main(command_line(tmp_path / "run" / "ckpt.pt"))
    report, _ = read_results(tmp_path / "run")
    assert report["objects"] == 6


@pytest.mark.parametrize("way", PRETRAINING)
def test_pretraining_trains_the_projection_alone_and_a_run_goes_on_from_it(arguments, tmp_path, way):
    """Table 9."""
    fresh = dict(load_network(train.parse_arguments(arguments()))[0].named_parameters())
    train.main(arguments("--pretrain", way, out="before"))
    path, before = tmp_path / "before" / "ckpt.pt", read_checkpoint(tmp_path / "before")
    assert before["model"].keys() == {"projection.weight", "projection.bias"}
    assert before["args"]["tune_llm"] == before["args"]["tune_vit"] == "frozen"
    assert not torch.equal(before["model"]["projection.weight"], fresh["projection.weight"])
    assert load_network(Namespace(**before["args"]))[1].instruction is PRETRAINING[way]
    assert "--init" in refused(evaluate, [path])

    args = train.parse_arguments(arguments("--init-projection", path, out="after"))
    model, *_ = train.load(args, torch.device("cpu"), None)
    started = dict(model.named_parameters())
    assert started.keys() == fresh.keys()
    for name, value in started.items():
        assert torch.equal(value, before["model"].get(name, fresh[name])), name  # adapters start as ever
    train.main(arguments("--init-projection", path, out="after"))
    after = read_checkpoint(tmp_path / "after")["model"]
    assert after.keys() == trained(model).keys() and len(after) == 2 + 2 * 2 * 4  # and adapters
