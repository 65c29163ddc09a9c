"""paper/: instructions as the paper shows them, turns against generate(), <KEYPOINT> by hand, whole runs."""

import copy
import math
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, MadeUpChat, network_arguments, runs
from mp100 import CATEGORIES, make_wagons_and_kites
from programs import command_line, read_checkpoint, read_results, refused, to_train

import decode
import evaluate
import paper
import train
from chat import IGNORE, Category, Scene, ask_with_description
from common import InputError, read_json
from data import parse_descriptions
from decode import Prediction
from model import CapeLLM, load_network
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
tiny_chat = pytest.mark.parametrize("chat", ["tiny"], indirect=True)


def load_tiny(tiny, **options):
    """An untrained network that sees photos of 56 pixels, 4 x 4 patches, and its Chat."""
    model, chat = load_network(network_arguments(tiny, **options))
    return model.eval(), chat


# ----------------------------------------------------------------------------------------------- instructions

RIM, EAR = CUP.keypoints[0], CUP.keypoints[2]
ASKED = [(RIM, (0.1, 0.25)), (EAR, (0.5, 0.9996))]
AT_RIM, AT_EAR = " [0.100,0.250]", " [0.500,0.999]"
WHERE_RIM = "User: where is the rim?\nReference: where one drinks.\nAssistant:"
WHERE_EAR = "User: where is the left ear?\nReference: its handle\nAssistant:"
WHAT = "User: what is in the photo?\nAssistant:"
NAMES = "Keypoints: rim, foot, left ear, heart\n"
OF_AUTHORS = ("User: Where is the {} of this object in this image? Please provide its coordinates.\n"
              "Reference: {}\nAssistant:")

PLAIN = [(WHERE_RIM, AT_RIM), (WHERE_EAR, AT_EAR)]
OUTLINED = [(OUTLINE + WHERE_RIM, AT_RIM), (WHERE_EAR, AT_EAR)]
TURNS = {  # questions and answers of a conversation about ASKED
    "description": PLAIN,
    "diverse": PLAIN,  # until something is drawn
    "name": [("User: where is the rim?\nAssistant:", AT_RIM),
             ("User: where is the left ear?\nAssistant:", AT_EAR)],
    "list": [(NAMES + WHERE_RIM, AT_RIM), (WHERE_EAR, AT_EAR)],
    "authors": [(OF_AUTHORS.format(*RIM), AT_RIM), (OF_AUTHORS.format(*EAR), AT_EAR)],
    "outline": OUTLINED,
    "diverse-outline": OUTLINED,
    "step": [(WHAT, " tea cup"), *PLAIN],
    "pretrain direct": [("User: which keypoint is at [0.100,0.250]?\nAssistant:", " rim"),
                        ("User: which keypoint is at [0.500,0.999]?\nAssistant:", " left ear")]}
ALL = INSTRUCTIONS | {f"pretrain {name}": instruction for name, instruction in PRETRAINING.items()}


def instruct(chat, name):
    chat = copy.copy(chat)
    chat.instruction = ALL[name]
    return chat


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
    return [(chat.tokenizer.decode(question), chat.tokenizer.decode(answer[:-1]))
            for question, answer in zip(questions, answers, strict=True)]


def test_the_papers_instructions_are_found_by_their_names():
    assert {*ALL} == {*TURNS, "pretrain step"}
    assert all(find_instruction(name) is instruction for name, instruction in INSTRUCTIONS.items())
    assert all(find_instruction("description", name) is PRETRAINING[name] for name in PRETRAINING)
    for name, pretrain, says in (("long", None, "long: .*name, list"), ("step", "direct", "leave out")):
        with pytest.raises(InputError, match=says):
            find_instruction(name, pretrain)


@pytest.mark.parametrize("chat", ["llama3", "tiny"], indirect=True)
@pytest.mark.parametrize("instruction", TURNS)
def test_an_instruction_says_what_the_paper_compares(chat, instruction):
    assert turns(instruct(chat, instruction), Scene(CUP, ASKED)) == TURNS[instruction]


@pytest.mark.parametrize("chat", ["llama3", "tiny"], indirect=True)
def test_the_longest_name_of_a_category_can_be_said(chat):
    categories = parse_descriptions(read_json(ROOT / "descriptions.json"), "descriptions.json").values()
    said = [chat.encode_answer(category.name.replace("_", " "))[0] for category in categories]
    assert max(map(len, said)) <= LONGEST_NAME


@tiny_chat
@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_a_test_asks_as_training_does(chat, instruction):
    """One keypoint at a time, or one after another; what the object is stands apart and is asked first."""
    chat = instruct(chat, instruction)
    asked = [(keypoint, (0.1, 0.2)) for keypoint in CUP.keypoints]
    first = [chat.encode(WHAT)] if instruction == "step" else []

    def questions_of_training(asked):
        return [chat.newline + question for question in pieces_of(chat, Scene(CUP, asked))[::2][len(first):]]

    for one, question in zip(asked, chat.encode_questions(CUP), strict=True):
        assert questions_of_training([one]) == [question]
    assert questions_of_training(asked) == encode_in_turns(chat, CUP)
    has_text_before = instruction in ("list", "outline", "diverse-outline")
    assert (encode_in_turns(chat, CUP) == chat.encode_questions(CUP)) == (not has_text_before)


@tiny_chat
def test_wordings_are_drawn_in_training(chat):
    """For each question anew, and by the scene's own numbers."""
    chat, drawn = instruct(chat, "diverse-outline"), set()
    wordings = {f"User: {wording.format('rim')}": wording for wording in WORDINGS} | {
        f"User: {wording.format('left ear')}": wording for wording in WORDINGS}
    for seed in range(60):
        said, again = (turns(chat, Scene(CUP, ASKED, rng=np.random.default_rng(seed))) for _ in range(2))
        assert said == again
        (about_rim, _), (about_ear, _) = said
        assert about_rim.startswith(OUTLINE) and about_rim.endswith(WHERE_RIM.partition("?")[2])
        drawn.add(tuple(wordings[question.removeprefix(OUTLINE).split("\n")[0]]
                        for question in (about_rim, about_ear)))
    assert {wording for pair in drawn for wording in pair} == {*WORDINGS}
    assert any(first != second for first, second in drawn)


@tiny_chat
def test_pretraining_step_by_step(chat):
    """What the object is; whether it shows a keypoint; which of those asked is at a point. Answers fit."""
    chat, seen, says_no = instruct(chat, "pretrain step"), set(), []
    for seed in range(40):
        invisible = ["foot", "heart"] if seed % 2 else []
        what, *rest = turns(chat, Scene(CUP, ASKED, invisible, np.random.default_rng(seed)))
        assert what == (WHAT, " tea cup")
        assert len(rest) == 4
        for keypoint, at, exists, which in ("rim", AT_RIM, *rest[:2]), ("left ear", AT_EAR, *rest[2:]):
            question, answer = exists
            name = question.removeprefix("User: is the ").removesuffix(" to be seen?\nAssistant:")
            assert (name, answer) in [(keypoint, " yes"), *((absent, " no") for absent in invisible)]
            assert which in [(f"User: which of {names} is at{at}?\nAssistant:", f" {keypoint}")
                             for names in ("rim, left ear", "left ear, rim")]
            seen |= {(name, answer), which}
            if invisible:
                says_no.append(answer == " no")
    assert 0.35 < np.mean(says_no) < 0.65  # where a keypoint is invisible, one is asked for half of the time
    assert len(seen) == 4 + 4  # two visible and two invisible keypoints; two points, names in either order


# --------------------------------------------------------------------------------------------- dynamic groups


def test_dynamic_rounds_ask_every_keypoint_once_in_as_many_conversations_as_four():
    """Cut anywhere."""
    for n in range(1, 69):
        groups = group_dynamically(n, "dynamic", np.random.default_rng(n))
        assert sorted(sum(groups, [])) == [*range(n)]
        assert len(groups) == math.ceil(n / 4) and all(groups)
    drawn = [group_dynamically(5, "dynamic", np.random.default_rng(seed)) for seed in range(50)]
    assert {tuple(map(len, groups)) for groups in drawn} == {(1, 4), (2, 3), (3, 2), (4, 1)}
    assert len({tuple(sum(groups, [])) for groups in drawn}) > 20  # and shuffled


# ------------------------------------------------------------------------------------------------------ turns


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


def converse(model, images, questions, chat, cumulative):
    """The answers of the textbook's decoder to each photo's questions, in one conversation or in many."""
    answers, form = [[] for _ in questions], chat.coordinates
    for image, asked, of_photo in zip(images, questions, answers):
        tokens = begin(model, image, chat)
        for question in asked:
            question = tokens + question[len(chat.newline):]
            of_photo.append(model.generate(image[None], question, form.ending[-1], form.max_tokens))
            tokens = question + close(of_photo[-1], form.ending) if cumulative else tokens
    return answers


def made_up(tiny, counts):
    """A network, photos, and counts[p] questions of unequal lengths about photo p."""
    model, _ = load_tiny(tiny)
    lengths = iter(torch.randint(1, 12, (sum(counts),)).tolist())
    questions = [[[3, *torch.randint(4, 2000, (next(lengths),)).tolist()] for _ in range(n)] for n in counts]
    return model, torch.randn(len(counts), 3, 56, 56), questions


def answers_of(found):
    return [[p.answer for p in of_photo] for of_photo in found]


@pytest.mark.parametrize("n, instruction", [(1, ask_step_by_step), (3, ask_with_description)])
def test_cumulative_questions_follow_the_models_own_answers(tiny, n, instruction):
    """Formats learned from answers of different turns: conversations leave them, keep them, come back."""
    model, images, questions = made_up(tiny, [3, 0, 5])
    chat, came_back = MadeUpChat(n, instruction), False
    expected = converse(model, images, questions, chat, True)
    assert len({*map(tuple, sum(expected, []))}) > 4
    for learned in None, expected[0][0], expected[2][0], expected[0][1], expected[2][2]:
        if learned:
            chat.learn(learned)
        found = locate_in_turns(model, images, questions, chat, cumulative=True)
        assert answers_of(found) == expected
        for of_photo in found:
            kept = [p.x_distribution is not None for p in of_photo]
            assert kept == [p.point is not None for p in of_photo]
            came_back |= (False, True) in zip(kept, kept[1:])
    assert came_back  # a conversation that had left the format


def test_what_the_object_is_comes_first_and_is_said_freely_and_once_a_photo(tiny):
    """Table 7. Two answers in words of unequal lengths, one of which the end token ends."""
    model, images, questions = made_up(tiny, [2, 3])
    chat, read = MadeUpChat(3, ask_step_by_step), []
    hook = model.llama.norm.register_forward_hook(lambda _, args, __: read.append((*args[0].shape[:2],)))
    found = locate_in_turns(model, images, questions, chat, constrained=True)
    hook.remove()
    assert read[:2] == [(2, 1 + 16 + 1), (2, 3)]  # two photos, then the opening's three tokens for each
    assert [rows for rows, _ in read[2:]].count(5) == sum(rows == 5 for rows, _ in read[-6:]) == 6
    assert [p.point for p in sum(found, [])] == [(0.25, 0.75)] * 5  # coordinates alone are constrained

    start = [chat.bos, *chat.newline, *chat.encode(WHAT)]
    first, second = (model.generate(image[None], start, chat.eos, LONGEST_NAME) for image in images)
    chat.eos = next(token for token in second if token not in first)  # here the second answer is to end
    chat.coordinates = replace(chat.coordinates, ending=[13, chat.eos])
    first, second = (model.generate(image[None], start, chat.eos, LONGEST_NAME) for image in images)
    assert len(second) < len(first) == LONGEST_NAME and second[-1] == chat.eos
    for cumulative in False, True:
        found = locate_in_turns(model, images, questions, chat, cumulative=cumulative)
        assert answers_of(found) == converse(model, images, questions, chat, cumulative)


# ------------------------------------------------------------------------------------------------- <KEYPOINT>


@tiny_chat
@pytest.mark.parametrize("instruction", ["description", "step"])
def test_keypoint_token_stands_for_a_point(chat, instruction):
    """The point is the label of the end token, which is read off the hidden state of <KEYPOINT>."""
    in_text, chat = instruct(chat, instruction), KeypointChat(chat.folder, INSTRUCTIONS[instruction])
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
    assert len(new) == KEYPOINT + 1 and new.dtype == torch.float32


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


@pytest.mark.parametrize("cumulative", [False, True])
@pytest.mark.parametrize("instruction", ["description", "step"])
@torch.no_grad()
def test_a_point_is_read_off_the_keypoint_token_behind_its_question(tiny, instruction, cumulative):
    """Of Table 8's second row, too, where the model's own words come first."""
    model, chat = load_tiny(tiny, answer="token", instruction=instruction)
    assert chat.keypoint == KEYPOINT
    images, one = torch.randn(2, 3, 56, 56), Category("plate", CUP.keypoints[:1])
    questions = [chat.encode_questions(category) for category in (CUP, one)]
    found = locate_in_turns(model, images, questions, chat, cumulative=cumulative)
    for image, asked, predictions in zip(images, questions, found, strict=True):
        tokens = begin(model, image, chat)
        for question, p in zip(asked, predictions, strict=True):
            question = [*question[len(chat.newline):], KEYPOINT]
            expected = model.keypoint_head(last_state(model, image, tokens + question))
            torch.testing.assert_close(torch.tensor(p.point), expected, atol=1e-5, rtol=0)
            assert p == Prediction(p.point, None, [KEYPOINT, chat.eos], None, None)
            tokens = [*tokens, *question, chat.eos] if cumulative else tokens


# ------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def arguments(tiny, tmp_path, monkeypatch):
    """arguments("--lr", 1, out="a") -> a command line. 15 examples an epoch: 4 steps, the last filled up."""
    data = make_wagons_and_kites(tmp_path / "data")
    monkeypatch.setattr("tools.draw.draw_sheet", lambda *_: None)  # it takes more time than all else

    def make(*more, out="run"):
        return to_train(tiny, data, tmp_path / out, "--rounds", 2, "--epochs", 1, *more)
    return make


def joined(tokens):
    return f" {' '.join(map(str, tokens))} "


@pytest.mark.parametrize("instruction, answer, cumulative", [
    ("description", "text", False), ("list", "text", True), ("step", "text", False),
    ("description", "token", False), ("description", "token", True)])
def test_who_asks(instruction, answer, cumulative):
    way = paper.choose_locate(Namespace(instruction=instruction, answer=answer), decode.locate, cumulative)
    if (instruction, answer, cumulative) == ("description", "text", False):
        assert way is decode.locate
    else:
        assert way.func is locate_in_turns and way.keywords == {"cumulative": cumulative}


# test_dtype.py trains and evaluates more, Hiera (Table 4) among them
VARIANTS = [how.split() for how in (
    "--instruction list", "--instruction diverse-outline", "--answer token --instruction step",
    "--rounds dynamic", "--pack --instruction step")]


@pytest.mark.parametrize("how", VARIANTS, ids=" ".join)
def test_every_variant_trains_and_then_asks_in_the_way_it_was_trained(arguments, tmp_path, monkeypatch, how):
    """Training's conversations, on their way into the network, hold the questions that evaluation asks."""
    trained_on, asked, forward, choose = [], [], CapeLLM.forward, paper.choose_locate
    monkeypatch.setattr(CapeLLM, "forward",
                        lambda model, *batch: trained_on.append(batch) or forward(model, *batch))

    def spy_on_asking(*how):
        locate = choose(*how)
        return lambda *args, **options: asked.append((locate, *args)) or locate(*args, **options)
    monkeypatch.setattr(paper, "choose_locate", spy_on_asking)
    train.main(arguments(*how, "--epochs", 4 if "list" in how else 1))  # each must once be the first question
    conversations = [joined(row) for _, tokens, *_ in trained_on for row in tokens.tolist()]
    labels = [row for _, _, labels, _ in trained_on for row in labels.tolist()]
    assert any(label < IGNORE for row in labels for label in row) == ("token" in how)
    assert all((photo_of is not None) == ("--pack" in how) for *_, photo_of in trained_on)
    evaluate.main(command_line(tmp_path / "run" / "ckpt.pt"))
    locate, chat = asked[0][0], asked[0][4]
    questions = [question[len(chat.newline):] for _, _, _, of_photos, _ in asked
                 for of_photo in of_photos for question in of_photo]
    assert len(questions) == 24
    known = [any(joined(question) in said for said in conversations) for question in questions]
    assert all(known) or "diverse-outline" in how
    assert getattr(locate, "func", locate) is (locate_in_turns if "step" in how else decode.locate)
    opening = joined(chat.encode(WHAT))
    assert all((opening in conversation) == ("step" in how) for conversation in conversations)
    sizes = {sum(label != IGNORE for label in row) for row in labels}
    assert "dynamic" not in how or len(sizes) > 2  # of conversations; by twos there are one or two questions

    report, predictions = read_results(tmp_path / "run")
    assert report["objects"] == 6
    if "list" in how:  # its text stands before the first question of a conversation
        asked.clear()
        evaluate.main(command_line(tmp_path / "run/ckpt.pt", "--cumulative"))
        in_turns = [encode_in_turns(chat, category) for category in CATEGORIES.values()]
        assert asked and all(of_photo in in_turns for *_, of_photos, _ in asked for of_photo in of_photos)
        assert asked[0][0].keywords["cumulative"]
        assert read_results(tmp_path / "run")[0]["decode"] == "greedy cumulative"
    if "token" in how:
        assert report["malformed"] == 0
        assert all(p["confidence"] == [None] * len(p["keypoints"]) for p in predictions)
        for option in ["--constrained"], ["--decode", "median"]:
            assert "does not spell points" in refused(evaluate, [tmp_path / "run/ckpt.pt", *option])


@pytest.mark.parametrize("way", PRETRAINING)
def test_pretraining_trains_the_projection_alone_and_a_run_goes_on_from_it(arguments, tmp_path, way):
    """Table 9."""
    fresh = dict(load_network(train.parse_arguments(arguments()))[0].named_parameters())
    train.main(arguments("--pretrain", way, out="before"))
    path, before = tmp_path / "before" / "ckpt.pt", read_checkpoint(tmp_path / "before")
    assert load_network(Namespace(**before["args"]))[1].instruction is PRETRAINING[way]
    assert before["model"].keys() == {"projection.weight", "projection.bias"}
    assert before["args"]["tune_llm"] == before["args"]["tune_vit"] == "frozen"
    assert not torch.equal(before["model"]["projection.weight"], fresh["projection.weight"])
    assert "--init" in refused(evaluate, [path])

    train.main(arguments("--init-projection", path, "--lr", 0, out="after"))
    after = read_checkpoint(tmp_path / "after")["model"]
    assert len(after) == 2 + 2 * 2 * 4  # and adapters
    for name, value in after.items():
        assert torch.equal(value, before["model"].get(name, fresh[name])), name  # adapters start as ever
