"""CapeLLM's text: what is asked and answered, in words and in tokens (paper, section 3.2).

    BOS | image tokens | "\\n" | User: where is the {name}?  | [0.123,0.456] EOS | User: where is ...
                                Reference: {description}
                                Assistant:
                                -------- question --------- | ----- answer ---- |

Here is the paper's own instruction; paper/instructions.py has those that it is compared with.
`python chat.py` prints a conversation.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from common import InputError, reading

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
    invisible: list = ()  # names of the keypoints that are not to be seen in the crop; for Table 9
    rng: np.random.Generator = None  # for the random choices of Tables 6 and 9 in training; None in a test


def ask_with_description(scene):
    """The paper's own instruction (Figure 2): a scene -> a list of (question, answer).

    An instruction is such a function. An answer is a point (x, y), None in a test, or a word.
    """
    return [(f"User: where is the {name}?\nReference: {description}\nAssistant:", point)
            for (name, description), point in scene.asked]


def write_point(point):
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
    max_tokens: int  # an answer is cut off here: after the last digit, before `ending`, if a format is known


class Chat:
    """Conversations as tokens of the LLM: DIR/tokenizer.json and, for BOS and EOS, DIR/config.json.

    Questions and answers are tokenised one by one and joined: in one go, some tokenizers would fuse "]" with
    what follows it. InputError if a file cannot be read.
    """

    def __init__(self, directory, instruction=ask_with_description):
        self.path, self.instruction = Path(directory, "tokenizer.json"), instruction
        with reading(self.path, "say with --llm where the LLM is"):
            self.tokenizer = Tokenizer.from_file(str(self.path))
            self.tokenizer.encode_special_tokens = True  # "</s>" in a description is text like any other
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
            # SentencePiece tokenizers put a space before any text; our pieces bring their own
            first = self.tokenizer.encode("a", add_special_tokens=False).tokens[:1]
            self.adds_space = first != [] and first[0].startswith("\u2581")
        with reading(Path(directory, "config.json")):
            config = json.loads(Path(directory, "config.json").read_text())
            self.bos, eos = config["bos_token_id"], config["eos_token_id"]
            self.eos = eos[0] if isinstance(eos, list) else eos  # of several, the first
        self.newline = self.encode("\n")
        self.coordinates = self.find_coordinate_format()

    def encode(self, text):
        with reading(self.path):
            text = text.removeprefix(" ") if self.adds_space else text
            tokens = self.tokenizer.encode(text, add_special_tokens=False).ids
        if not tokens:
            raise InputError(f"{self.path}: has no tokens for {text[:60]!r}")
        return tokens

    def find_coordinate_format(self):
        """Reads the format of coordinates off the tokenizer, from " [0.000,0.000]" ... " [0.999,0.999]"."""
        answers = [self.encode(write_point((v / 1000, v / 1000))) for v in range(1000)]
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

    def encode_answer(self, answer):
        """A point or a word -> its tokens, EOS included, and their labels: the same but in Table 8."""
        text = f" {answer}" if isinstance(answer, str) else write_point(answer)
        tokens = self.encode(text) + [self.eos]
        return tokens, tokens

    def encode_conversation(self, scene):
        """A conversation of training: BOS, "\\n", questions and answers -> two lists, tokens and labels.

        A label is the token itself where it is to be learned, else IGNORE. The photo goes after BOS.
        """
        tokens = [self.bos, *self.newline]
        labels = [IGNORE] * len(tokens)
        for text, answer in self.instruction(scene):
            question, (said, learned) = self.encode(text), self.encode_answer(answer)
            tokens += question + said
            labels += [IGNORE] * len(question) + learned
        return tokens, labels

    def encode_questions(self, category):
        """A test's question about each keypoint of a category, after "\\n": a list of token lists.

        Each is asked alone. Where an instruction asks more than one thing (Table 7), it is the last.
        """
        scenes = [Scene(category, [(keypoint, None)]) for keypoint in category.keypoints]
        return [self.newline + self.encode(self.instruction(scene)[-1][0]) for scene in scenes]

    def parse(self, answer):
        """The tokens of an answer up to the last digit -> (x, y), or None if they are no coordinates."""
        match = re.match(r"\s*\[(0\.\d{3}|1\.000),(0\.\d{3}|1\.000)(?!\d)", self.tokenizer.decode(answer))
        return (float(match[1]), float(match[2])) if match else None


if __name__ == "__main__":
    chat = Chat(Path(__file__).parent / "assets/toy/llm")
    knob = ("antenna ball", "the knob on the antenna that is purple")
    tokens, labels = chat.encode_conversation(Scene(Category("creature", [knob]), [(knob, (0.83, 0.402))]))
    print("token  learned  text")
    for token, label in zip(tokens, labels):
        print(f"{token:5}  {'yes' if label != IGNORE else '-':7}  {chat.tokenizer.decode([token])!r}")
    print("known in advance, before each choice:",
          [chat.tokenizer.decode(known) for known in chat.coordinates.known])
