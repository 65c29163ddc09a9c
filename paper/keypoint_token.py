"""Table 8: a new token <KEYPOINT> stands for a point in place of text.

    User: where is the {name}?  | <KEYPOINT> EOS | User: where is ...
    Reference: {description}
    Assistant:
    -------- question --------- | --- answer --- |

The vocabulary grows by one, so all input embeddings train. A head of two layers reads the point off the
token's last hidden state. The loss of a point is its distance along x and along y, averaged. Words are
learned as ever. In a test <KEYPOINT> is not generated but put behind the question. Letters: R rows, D width.
"""

from pathlib import Path

import torch
from torch import nn

from chat import IGNORE, AnswerFormat, Chat, ask_with_description
from common import read_json, reading
from decode import Prediction, feed
from model import CapeLLM

UNITS = 10**9  # a coordinate as a whole number, finer than fp32 is


class KeypointChat(Chat):
    """A Chat whose answers are <KEYPOINT>. The label of a point is a number below IGNORE."""

    def __init__(self, directory, instruction=ask_with_description):
        super().__init__(directory, instruction)
        path = Path(directory, "config.json")
        with reading(path):
            self.keypoint = read_json(path, dict)["vocab_size"]  # the first id that the LLM lacks

    def find_coordinate_format(self):
        """A point is not spelled, so there are no digits to choose."""
        return AnswerFormat([], [], [self.eos], max_tokens=1)

    def encode_answer(self, answer):
        """A point or a word -> its tokens and their labels.

        What a label says is read off the hidden state one position before. So a point, which is read off that
        of <KEYPOINT>, is the label of EOS.
        """
        if isinstance(answer, str):
            return super().encode_answer(answer)
        return [self.keypoint, self.eos], [IGNORE, write_label(answer)]


def write_label(point):
    """Fractions of the crop (x, y), both below 1 -> a whole number below IGNORE."""
    x, y = (int(v * UNITS) for v in point)
    return IGNORE - 1 - (x * UNITS + y)


def read_labels(labels):
    """The inverse of write_label(): (R,) -> points (R, 2)."""
    numbers = IGNORE - 1 - labels
    return torch.stack((numbers // UNITS, numbers % UNITS), dim=-1).float() / UNITS


class KeypointLLM(CapeLLM):
    def __init__(self, vit, llama):
        super().__init__(vit, llama)
        D, words = llama.config.hidden_size, llama.embed_tokens.weight.detach().float()
        words = torch.cat((words, words.mean(0, keepdim=True)))
        llama.embed_tokens = nn.Embedding.from_pretrained(words, freeze=False)
        self.keypoint_head = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, 2), nn.Sigmoid())

    def losses(self, hidden, targets):
        """As CapeLLM's, where a target may also be the label of a point."""
        of_words = super().losses(hidden, targets.clamp(min=0))
        distances = (self.keypoint_head(hidden.float()) - read_labels(targets)).abs().mean(-1)
        return torch.where(targets < IGNORE, distances, of_words)


def ask_photos(model, photos, questions, chat, decode="greedy", constrained=False):
    """As decode.ask_photos(). A point that is not spelled has no digits to decode or to constrain."""
    predictions = [[] for _ in questions]
    asked = [(p, [*question, chat.keypoint]) for p, of_photo in enumerate(questions) for question in of_photo]
    if asked:
        photo_of, blocks = zip(*asked)
        rows = torch.tensor(photo_of, device=photos.is_token.device)
        hidden = feed(model.llama, photos.fork(rows), blocks)[:, -1]  # (R, D)
        for p, point in zip(photo_of, model.keypoint_head(hidden.float()).tolist()):
            predictions[p].append(Prediction(tuple(point), None, [chat.keypoint, chat.eos]))
    return predictions
