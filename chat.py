"""CapeLLM's text: what is asked and answered, in words and in tokens (paper, section 3.2, Tables 3, 6 to 9).

    BOS | image tokens | "\\n" | User: where is the {name}?  | [0.123,0.456] EOS | User: where is ...
                                Reference: {description}
                                Assistant:
                                -------- question --------- | ----- answer ---- |

First come the instructions that the paper compares. Each makes the questions and answers of a conversation.
Then comes Chat, which turns them into tokens and reads answers. `python chat.py` prints a conversation.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from common import InputError, get_field, read_json

IGNORE = -100  # the label of a token that is not to be learned


@dataclass(frozen=True)
class Category:
    """A kind of object, and what its keypoints are called and where they are, in words."""

    name: str
    keypoints: list  # of (name, description), in the order of the annotations
    skeleton: list = ()  # pairs of indices of keypoints that a line joins in pictures


@dataclass(frozen=True)
class Scene:
    """What a conversation is about. Points are (x, y) in fractions of the crop, None if unknown."""

    category: Category
    asked: list  # of ((name, description), point)
    hidden: list = ()  # names of the category's keypoints that are not visible in the crop
    rng: np.random.Generator = None  # for the random choices of training; at test time there are none


# ---------------------------------------------------------------------------------------------- instructions
#
# An instruction turns a scene into a list of (question, answer). An answer is a point (x, y) or a word.

WHAT = "User: what is in the photo?\nAssistant:"
OUTLINE = (
    "A conversation about a photo of one object. The user names a keypoint of the object and describes where "
    "it is. The assistant answers with its place, [x,y], as fractions of the photo's width and height.\n")
WORDINGS = [
    "where is the {}?", "can you show me the {}?", "at which point is the {}?", "please locate the {}.",
    "what is the position of the {}?", "find the {} in the photo.", "where do you see the {}?",
    "give the coordinates of the {}."]


def ask_with_description(scene):
    """The paper's own instruction (Figure 2)."""
    return [(f"User: where is the {name}?\nReference: {description}\nAssistant:", point)
            for (name, description), point in scene.asked]


def ask_by_name(scene):
    """Without descriptions (Table 3)."""
    return [(f"User: where is the {name}?\nAssistant:", point) for (name, _), point in scene.asked]


def ask_after_list(scene):
    """The names of all the category's keypoints come first, once a conversation (Table 3)."""
    names = ", ".join(name for name, _ in scene.category.keypoints)
    return with_opening(f"Keypoints: {names}\n", ask_with_description(scene))


def ask_diversely(scene):
    """Training draws one of many wordings for each question, a test uses the first (Table 6)."""
    def wording():
        return WORDINGS[scene.rng.integers(len(WORDINGS)) if scene.rng else 0]
    return [(f"User: {wording().format(name)}\nReference: {description}\nAssistant:", point)
            for (name, description), point in scene.asked]


def ask_after_outline(scene):
    """What the task is comes first, once a conversation (Table 6)."""
    return with_opening(OUTLINE, ask_with_description(scene))


def ask_diversely_after_outline(scene):
    return with_opening(OUTLINE, ask_diversely(scene))


def ask_step_by_step(scene):
    """First what the object is, then where its keypoints are (Table 7, Figure 5).

    In a test the model's own answer to the first question stays in the conversation.
    """
    return [(WHAT, spoken_name(scene.category)), *ask_with_description(scene)]


def pretrain_directly(scene):
    """The other way round: which keypoint is at this point? (Table 9, Figure 6)"""
    return [(f"User: which keypoint is at{spell(point)}?\nAssistant:", name)
            for (name, _), point in scene.asked]


def pretrain_step_by_step(scene):
    """What the object is, whether it shows a keypoint, which of several is at a point (Table 9, Figure 7)."""
    conversation = [(WHAT, spoken_name(scene.category))]
    names = [name for (name, _), _ in scene.asked]
    for (name, _), point in scene.asked:
        absent = scene.hidden and scene.rng.random() < 0.5  # so that the answer is not always yes
        wanted = scene.rng.choice(scene.hidden) if absent else name
        shuffled = ", ".join(scene.rng.permutation(names))
        conversation += [(f"User: is the {wanted} to be seen?\nAssistant:", "no" if absent else "yes"),
                         (f"User: which of {shuffled} is at{spell(point)}?\nAssistant:", name)]
    return conversation


INSTRUCTIONS = {"description": ask_with_description, "name": ask_by_name, "list": ask_after_list,
                "diverse": ask_diversely, "outline": ask_after_outline,
                "diverse-outline": ask_diversely_after_outline, "step": ask_step_by_step}
PRETRAINING = {"direct": pretrain_directly, "step": pretrain_step_by_step}


def with_opening(text, conversation):
    """The same conversation with a text before its first question."""
    (question, answer), *rest = conversation
    return [(text + question, answer), *rest]


def spoken_name(category):
    return category.name.replace("_", " ")


def spell(point):
    """Fractions of the crop -> " [0.123,0.456]", three decimals, at most 0.999."""
    return " [0.{:03d},0.{:03d}]".format(*(min(max(round(1000 * v), 0), 999) for v in point))


# ---------------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class AnswerFormat:
    """What is known of an answer's tokens before it is given.

    Of an answer with coordinates, the model only chooses the digits. Llama-3 has a token for each number of
    three digits, so there are two choices; tokenizers that spell digits one by one make it six.

        " ["  "0"  "."  123  ","  "0"  "."  456  "]"  EOS
        -- known[0] --       -- known[1] --      ending
    """

    known: list  # for each choice, the tokens that stand before it; [] if an answer may be anything
    digits: list  # the tokens that a choice is made from: 000 ... 999, or 0 ... 9
    ending: list  # the tokens after the last choice, the end token last
    max_tokens: int  # where an answer is cut off; coordinates are complete at the last choice

    def still_to_read(self, answer):
        """What a conversation must read before it goes on: the last token chosen, and the answer's ending."""
        return answer[-1:] if answer[-1] == self.ending[-1] else [answer[-1], *self.ending]


class Chat:
    """Conversations as tokens of the LLM's tokenizer.

    Questions and answers are tokenised one by one and joined: in one go, some tokenizers would fuse "]" with
    what follows it.
    answers: "text", or "token" for Table 8's <KEYPOINT>. This new token stands for the whole answer, and the
    point is read off its hidden state.
    """

    def __init__(self, directory, instruction=ask_with_description, answers="text"):
        self.path = path = Path(directory) / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises nothing more specific
            raise InputError(f"{path}: not a readable tokenizer.json ({e}); "
                             "say with --llm where it is") from None
        self.tokenizer.encode_special_tokens = True  # a description that holds "</s>" is text like any other
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        vocab_size = self.read_special_tokens(Path(directory) / "config.json")
        # SentencePiece tokenizers put a space before any text; our pieces bring their own
        self.adds_space = False
        self.adds_space = self.tokenizer.id_to_token(self.encode("a")[0]).startswith("\u2581")
        self.newline = self.encode("\n")
        self.instruction = instruction
        self.opening = self.encode(WHAT) if instruction is ask_step_by_step else []  # asked first of all
        self.keypoint = vocab_size if answers == "token" else None  # the first id the LLM lacks
        self.words = AnswerFormat([], [], [self.eos], max_tokens=16)
        self.coordinates = self.find_coordinate_format()

    def read_special_tokens(self, path):
        """Finds BOS and EOS in config.json -> size of the LLM's vocabulary, which must hold all tokens."""
        config = read_json(path, dict)
        if isinstance(config.get("eos_token_id"), list):  # of several, the first
            config["eos_token_id"] = get_field(config, "eos_token_id", path, list)[0]
        vocab_size = get_field(config, "vocab_size", path, int)
        self.bos, self.eos = (get_field(config, key, path, int, 0, vocab_size - 1)
                              for key in ("bos_token_id", "eos_token_id"))
        added = self.tokenizer.get_added_tokens_decoder()  # text never becomes the special ones among them
        special = {number for number, token in added.items() if token.special}
        largest = max({*self.tokenizer.get_vocab().values()} - special, default=0)
        if largest >= vocab_size:
            raise InputError(f"{self.path}: has a token {largest}, but vocab_size in config.json is "
                             f"{vocab_size}; are they of the same model?")
        return vocab_size

    def encode(self, text):
        text = text.removeprefix(" ") if self.adds_space else text
        try:
            tokens = self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as e:  # the library raises nothing more specific
            raise InputError(f"{self.path}: cannot encode {text[:60]!r} ({e})") from None
        if not tokens:
            raise InputError(f"{self.path}: has no tokens for {text[:60]!r}")
        return tokens

    def find_coordinate_format(self):
        """Reads the format of coordinates off the tokenizer, from " [0.000,0.000]" ... " [0.999,0.999]"."""
        answers = [self.encode(spell((v / 1000, v / 1000))) for v in range(1000)]
        if len({tuple(answer) for answer in answers}) < 1000:
            raise InputError(f"{self.path}: has no tokens for some digits; is it a Llama's tokenizer?")
        # the model chooses where answers differ: in " [" "0" "." "123" "," "0" "." "123" "]" at 3 and 7
        choices = [i for i, column in enumerate(zip(*answers)) if len(set(column)) > 1]
        if len(choices) in (2, 6) and len(set(map(len, answers))) == 1:
            last, n_digits = choices[-1], 1000 if len(choices) == 2 else 10
            digits = [answer[last] for answer in answers[:n_digits]]  # 000 ... 999, or 0 ... 9
            if all({answer[i] for answer in answers} == set(digits) for i in choices):
                starts = [0, *(i + 1 for i in choices)]
                known = [answers[0][start:end] for start, end in zip(starts, choices)]
                return AnswerFormat(known, digits, [*answers[0][last + 1:], self.eos], max_tokens=last + 1)
        # no format holds for all, e.g. because digits are fused in pairs
        return AnswerFormat([], [], [self.eos], max_tokens=max(map(len, answers)))

    def conversation(self, scene):
        """A conversation of training, without BOS and "\\n" -> lists of tokens, labels and points.

        A label is the token itself where it is to be learned, else IGNORE. points holds (x, y) for each
        <KEYPOINT> among the tokens, which has no label.
        """
        tokens, labels, points = [], [], []
        for question, answer in self.instruction(scene):
            question = self.encode(question)
            if isinstance(answer, str):
                answer = learned = self.encode(f" {answer}") + [self.eos]
            elif self.keypoint is None:
                answer = learned = self.encode(spell(answer)) + [self.eos]
            else:
                points.append(answer)
                answer, learned = [self.keypoint, self.eos], [IGNORE, IGNORE]
            tokens += question + answer
            labels += [IGNORE] * len(question) + learned
        return tokens, labels, points

    def questions(self, category, cumulative=False):
        """A test's question about each keypoint of a category: a list of token lists.

        Each begins a conversation of its own, unless cumulative: then they are asked one after another.
        """
        asked = [(keypoint, None) for keypoint in category.keypoints]
        scenes = [Scene(category, asked)] if cumulative else [Scene(category, [one]) for one in asked]
        return [self.encode(question) for scene in scenes
                for question, answer in self.instruction(scene) if answer is None]

    def parse(self, answer):
        """The tokens of an answer up to the last digit -> (x, y), or None if they are no coordinates."""
        match = re.match(r"\s*\[(0\.\d{3}|1\.000),(0\.\d{3}|1\.000)(?!\d)", self.tokenizer.decode(answer))
        return (float(match[1]), float(match[2])) if match else None


if __name__ == "__main__":
    chat = Chat(Path(__file__).parent / "assets/toy/llm")
    knob = ("antenna ball", "the knob on the antenna that is purple")
    tokens, labels, _ = chat.conversation(Scene(Category("creature", [knob]), [(knob, (0.83, 0.402))]))
    print("token  learned  text")
    for token, label in zip(tokens, labels):
        print(f"{token:5}  {'yes' if label != IGNORE else '-':7}  {chat.tokenizer.decode([token])!r}")
    print("known in advance, before each choice:",
          [chat.tokenizer.decode(known) for known in chat.coordinates.known])
