"""The text of CapeLLM: what is asked and answered, and both as tokens (paper section 3.2; Tables 3, 6, 7, 8 and 9).

    BOS | image tokens | "\\n" | User: where is the {name}?        | [0.123,0.456] EOS | User: where is the ... | [0.7...
                                Reference: {description}
                                Assistant:
                                ---------- question ------------- | ----- answer ---- |

First the instructions that the paper compares, each a function from a scene to the turns of a conversation; then Chat, which
makes tokens of them, and reads answers.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from llama import InputError, read_json

IGNORE = -100  # the label of a token that is not supervised


# ---------------------------------------------------------------------------------------------------------- instructions


@dataclass(frozen=True)
class Scene:
    """What a conversation is about."""

    category: object  # data.Category
    asked: list  # of ((name, description), (x, y)): keypoints and where they are in the crop, None instead of (x, y) in a test
    hidden: list = ()  # names of the category's keypoints that are not to be seen in the crop
    rng: np.random.Generator = None  # what training draws from; without it nothing is drawn


WHAT = "User: what is in the photo?\nAssistant:"
OUTLINE = ("A conversation about a photo of one object. The user names a keypoint of the object and describes where it is. The assistant "
           "answers with its place, [x,y], as fractions of the photo's width and height.\n")
WORDINGS = ["where is the {}?", "can you show me the {}?", "at which point is the {}?", "please locate the {}.",
            "what is the position of the {}?", "find the {} in the photo.", "where do you see the {}?", "give the coordinates of the {}."]


# An instruction returns turns (question, answer), where an answer is a place (x, y) or else the words to say.


def description(scene):
    """The paper's own (Figure 2)."""
    return [(f"User: where is the {name}?\nReference: {text}\nAssistant:", where) for (name, text), where in scene.asked]


def name_alone(scene):
    """Without descriptions (Table 3)."""
    return [(f"User: where is the {name}?\nAssistant:", where) for (name, _), where in scene.asked]


def list_names(scene):
    """First, once a conversation, the names of all keypoints of the category (Table 3)."""
    return opened(f"Keypoints: {', '.join(name for name, _ in scene.category.keypoints)}\n", description(scene))


def diverse(scene):
    """The question in one of many wordings, drawn in training; a test asks with the first (Table 6)."""
    def ask(name):
        return WORDINGS[scene.rng.integers(len(WORDINGS)) if scene.rng else 0].format(name)
    return [(f"User: {ask(name)}\nReference: {text}\nAssistant:", where) for (name, text), where in scene.asked]


def outline(scene):
    """First, once a conversation, what the task is and how the conversation goes (Table 6)."""
    return opened(OUTLINE, description(scene))


def diverse_outline(scene):
    return opened(OUTLINE, diverse(scene))


def step(scene):
    """First what the object is, then where its keypoints are (Table 7, Figure 5). A test goes on from the model's own answer."""
    return [(WHAT, spoken(scene.category)), *description(scene)]


def pretrain_direct(scene):
    """The other way round: which keypoint is here? (Table 9, Figure 6)"""
    return [(f"User: which keypoint is at{spell(*where)}?\nAssistant:", name) for (name, _), where in scene.asked]


def pretrain_step(scene):
    """What the object is, whether it shows a keypoint, and which of several is here (Table 9, Figure 7)."""
    turns, names = [(WHAT, spoken(scene.category))], [name for (name, _), _ in scene.asked]
    for (name, _), where in scene.asked:
        absent = scene.hidden and scene.rng.random() < 0.5  # so that the answer is not always yes
        turns += [(f"User: is the {scene.rng.choice(scene.hidden) if absent else name} to be seen?\nAssistant:", "no" if absent else "yes"),
                  (f"User: which of {', '.join(scene.rng.permutation(names))} is at{spell(*where)}?\nAssistant:", name)]
    return turns


INSTRUCTIONS = {"description": description, "name": name_alone, "list": list_names, "diverse": diverse, "outline": outline,
                "diverse-outline": diverse_outline, "step": step}
PRETRAINING = {"direct": pretrain_direct, "step": pretrain_step}


def opened(text, turns):
    """The same turns with a text before the first question."""
    (question, answer), *rest = turns
    return [(text + question, answer), *rest]


def spoken(category):
    return category.name.replace("_", " ")


def thousandths(x, y):
    """Fractions of the crop -> whole thousandths, clamped to 0 ... 999."""
    return tuple(min(max(round(1000 * v), 0), 999) for v in (x, y))


def spell(x, y):
    """Fractions of the crop -> " [0.123,0.456]"."""
    return " [0.{:03d},0.{:03d}]".format(*thousandths(x, y))


# ---------------------------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Form:
    """What is known of an answer before it is given."""

    template: list  # a token, or None where the model has the choice; nothing but None for words
    digits: list  # the tokens it chooses from there; empty if from all
    closing: list  # what follows, up to the end token

    def draft(self, answer):
        """The tokens sure to follow the beginning of an answer: up to the next choice, none if it has left the template."""
        if any(known not in (None, token) for known, token in zip(self.template, answer)):
            return []
        rest = self.template[len(answer):]
        return rest[:rest.index(None)]

    def unread(self, answer):
        """What a conversation that goes on has yet to read: the token chosen last, and what closes the answer."""
        return self.closing[-1:] if answer[-1] == self.closing[-1] else [answer[-1], *self.closing]


class Chat:
    """Conversations as tokens, with the tokenizer of the LLM at hand.

    Ids are made piece by piece and joined: tokenised in one go, "]" and what follows would fuse into other tokens.
    answers: "text", or "token" for one <KEYPOINT>, new to the vocabulary, whose place a decoder of CapeLLM's reads (Table 8).
    """

    def __init__(self, directory, instruction=description, answers="text"):
        path = Path(directory) / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises nothing more specific
            raise InputError(f"{path}: not a readable tokenizer.json ({e})") from None
        self.tokenizer.encode_special_tokens = True  # a description that holds "</s>" is text like any other
        self.tokenizer.no_truncation()
        config = read_json(Path(directory) / "config.json", dict)
        self.bos, eos = config.get("bos_token_id"), config.get("eos_token_id")
        self.eos = eos[0] if isinstance(eos, list) else eos
        if None in (self.bos, self.eos, config.get("vocab_size")):
            raise InputError(f"{directory}/config.json: bos_token_id, eos_token_id or vocab_size is missing")
        # SentencePiece tokenizers put a space before any text, which is the one our pieces bring along
        self.adds_space = self.tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith("\u2581")
        self.newline = self.encode("\n")
        self.instruction = instruction
        self.opening = self.encode(WHAT) if instruction is step else []  # a test asks it first, and it is answered in words
        self.keypoint = config["vocab_size"] if answers == "token" else None  # <KEYPOINT>, one more than the LLM knows
        self.place = self.form_of_places() if self.keypoint is None else Form([self.keypoint], [], [self.eos])
        self.words = Form([None] * 16, [], [self.eos])

    def form_of_places(self):
        """What all places share up to the last digit. Llama-3 has a token for each three-digit number, so the template is
        " [" "0" "." None "," "0" "." None; others spell digits one by one: None None None."""
        answers = [self.answer(v / 1000, v / 1000)[:-1] for v in range(1000)]
        columns = [set(column) for column in zip(*answers)]
        template = [min(column) if len(column) == 1 else None for column in columns]
        template = template[:len(template) - template[::-1].index(None)]
        n_digits = template.count(None) // 2  # tokens of a coordinate
        digits = [a[len(template) - 1] for a in answers[:1000 if n_digits == 1 else 10]]  # 000 ... 999, or 0 ... 9
        regular = all(column == set(digits) for column, known in zip(columns, template) if known is None)
        if n_digits not in (1, 3) or len(set(map(len, answers))) > 1 or not regular:  # then nothing is known beforehand
            return Form([None] * max(map(len, answers)), [], [self.eos])
        return Form(template, digits, [*answers[0][len(template):], self.eos])

    def encode(self, text):
        return self.tokenizer.encode(text.removeprefix(" ") if self.adds_space else text, add_special_tokens=False).ids

    def conversation(self, scene):
        """A conversation of training -> its ids and labels, two lists of equal length, without BOS and "\n"."""
        ids, labels = [], []
        for question, answer in self.instruction(scene):
            question = self.encode(question)
            if isinstance(answer, str):
                answer = learned = self.encode(f" {answer}") + [self.eos]
            elif self.keypoint is None:
                answer = learned = self.answer(*answer)
            else:  # the label of <KEYPOINT> is its place: its own number for (0, 0), and then on, beyond those of words
                x, y = thousandths(*answer)
                answer, learned = [self.keypoint, self.eos], [self.keypoint + 1000 * x + y, IGNORE]
            ids += question + answer
            labels += [IGNORE] * len(question) + learned
        return ids, labels

    def answer(self, x, y):
        """Fractions of the crop -> the tokens of " [0.123,0.456]" and the end token."""
        return self.encode(spell(x, y)) + [self.eos]

    def questions(self, category, cumulative=False):
        """What a test asks about each keypoint of a category: a list of token lists, each to begin a conversation of its own, or
        to be asked one after another (cumulative)."""
        asked = [(keypoint, None) for keypoint in category.keypoints]
        scenes = [Scene(category, asked)] if cumulative else [Scene(category, [one]) for one in asked]
        return [self.encode(question) for scene in scenes for question, answer in self.instruction(scene) if answer is None]

    def parse(self, ids):
        """The tokens of an answer up to the last digit -> (x, y), or None if they are no coordinates."""
        match = re.match(r"\s*\[(0\.\d{3}|1\.000),(0\.\d{3}|1\.000)(?!\d)", self.tokenizer.decode(ids))
        return (float(match[1]), float(match[2])) if match else None

    def coordinates(self, ids, spread, decode="greedy"):
        """What CapeLLM.locate() says of a question -> ((x, y) or None, confidence: the probability of the digits chosen).

        decode: "greedy", or the "median" or "mean" of each coordinate's distribution over 0.000 ... 0.999. A place that was read
        off <KEYPOINT> is taken as it is, and its confidence is unknown (None).
        """
        if self.keypoint is not None:
            return tuple(spread), None
        point = self.parse(ids)
        free = [token for token, known in zip(ids, self.place.template) if known is None]
        if point is None or not len(free) == len(spread) == self.place.template.count(None) or not set(free) <= set(self.place.digits):
            return point, 0.0
        chosen, n = [self.place.digits.index(token) for token in free], len(free) // 2
        confidence = float(np.prod([p[c] for p, c in zip(spread, chosen)]))
        if decode == "greedy":
            return point, confidence
        x, y = number_distribution(spread[:n], chosen[:n]), number_distribution(spread[n:], chosen[n:])
        if decode == "median":
            return tuple((p.cumsum() < 0.5).sum() / 1000 for p in (x, y)), confidence
        return tuple(p @ np.arange(1000) / 1000 for p in (x, y)), confidence


def number_distribution(spread, chosen):
    """The distributions of successive digits, each given the chosen ones before it -> that of the whole number, (1000,).

    Of what would follow a digit that was not chosen nothing is known; there it is flat.
    """
    p, mass, start, width = np.zeros(1000), 1.0, 0, 1000
    for digit, c in zip(spread, chosen):
        width //= len(digit)
        p[start:start + width * len(digit)] = np.repeat(mass * digit / width, width)
        start, mass = start + width * c, mass * digit[c]
    return p / p.sum()
