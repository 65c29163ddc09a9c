"""What the small Llama learns from: questions about photos that DINOv2 has looked at (features.py).

Batches are of cached patches (B, 64, 384). Only photos and words of the training categories get here.
"""

import json

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from chat import write_point
from data import annotation_file

PATCHES, QUESTIONS = 8, 4  # patches a side; questions about a photo
QUESTION = "User: where is the {}?\nReference: {}\nAssistant:"
# What the tokens of " [0.123,0.456]" and of the end count in the loss: the first digits most.
ANSWER_WEIGHTS = [0.1, 1, 0.3, 0.1, 0.1, 1, 0.3, 0.1, 0.1, 0.1]
FIRST_DIGITS = [1, 5]  # places of the answer
UNK, BOS, EOS = 0, 1, 2
GLUE = ["<unk>", "<s>", "</s>", "\n", "User: where is the", "?\nReference:", "\nAssistant:",
        " [0.", ",0.", "]", *"0123456789"]
SILENT = {" the", " of", " and", " from", " in", " point"}  # words that no patch shows

# ------------------------------------------------------------------------------------------------------ text


def make_tokenizer(categories):
    """Words with the space before them, digits one by one, and GLUE. Commas and full stops are not heard.

    Words of no training category become <unk>.
    """
    texts = [text for category in categories for keypoint in category.keypoints for text in keypoint]
    words = sorted({word.strip(",.") for text in texts for word in text.split()})
    vocabulary = {token: i for i, token in enumerate(GLUE + [f" {word}" for word in words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    glue = "|".join("".join(f"\\{c}" if c in "?[].," else c for c in token)
                    for token in sorted(GLUE[3:], key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[,.](?=\s)"), "removed"),
        pre_tokenizers.Split(Regex(glue + r"| ?[^\s\d,?\]]+|."), "isolated")])
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


class Texts:
    """The tokens of each keypoint's question, and of the words of its name that a patch may show."""

    def __init__(self, categories, tokenizer):
        self.encode = lambda text: tokenizer.encode(text).ids
        silent = {i for word in SILENT for i in self.encode(word)}
        self.questions = {number: [self.encode(QUESTION.format(*keypoint)) for keypoint in category.keypoints]
                          for number, category in categories.items()}
        self.names = {number: [[i for i in self.encode(f" {name}") if i not in silent]
                               for name, _ in category.keypoints] for number, category in categories.items()}


# ----------------------------------------------------------------------------------------------------- photos


class Photos:
    """Cached patches, drawn by category: one with n photos n**0.7 times as often as one with a photo."""

    def __init__(self, features, split, data):
        files = sorted(features.glob(f"{split}*.pt"))
        parts = [torch.load(file, weights_only=False) for file in files]
        self.patches = torch.cat([part["patches"] for part in parts])
        sample = self.patches[:4000].float().flatten(0, 1)
        self.mean, self.std = sample.mean(0), sample.std(0)
        self.points = sum((part["points"] for part in parts), [])
        annotations = json.loads(annotation_file(data, 1, split).read_text())["annotations"]
        annotations = {annotation["id"]: annotation for annotation in annotations}
        rows = [annotations[number] for part in parts for number in part["annotation"]]
        self.category = [row["category_id"] for row in rows]
        self.asked = []  # keypoints that are visible and in the crop
        for row, points in zip(rows, self.points):
            visible = np.array(row["keypoints"][2::3]) > 0
            self.asked.append(np.flatnonzero(visible & ((points >= 0) & (points < 1)).all(1)))
        of_category = {}
        for i, number in enumerate(self.category):
            if len(self.asked[i]):
                of_category.setdefault(number, []).append(i)
        self.categories = list(of_category.values())
        weights = np.array([len(rows) ** 0.7 for rows in self.categories])
        self.shares = weights / weights.sum()

    def draw(self, rng, n):
        chosen = rng.choice(len(self.categories), n, p=self.shares)
        return [int(rng.choice(self.categories[c])) for c in chosen]


def make_batch(rng, photos, texts, chosen):
    """-> patches (P, 64, 384); photo_of (B,); tokens, what they count, which are first digits (B, T); seen.

    B questions about P photos, each alone behind its photo, as it is asked in a test: whoever has heard where
    one wing is need not look for the other. `seen` is rows of (patch of the batch, word it shows). One word
    in 30 is not understood, so that a sentence with a word that is new to the model can be read.
    """
    photo_of, said, counts, firsts, seen = [], [], [], [], []
    for p, i in enumerate(chosen):
        number, points = photos.category[i], photos.points[i]
        for k in rng.permutation(photos.asked[i])[:QUESTIONS]:
            x, y = (float(v) for v in points[k])
            question = [UNK if rng.random() < 0.03 else token for token in texts.questions[number][k]]
            answer = [*texts.encode(write_point((x, y))), EOS]
            photo_of.append(p)
            said.append(torch.tensor([*texts.encode("\n"), *question, *answer]))
            counts.append(torch.tensor([0] * (1 + len(question)) + ANSWER_WEIGHTS))
            firsts.append(torch.tensor([False] * (1 + len(question)) +
                                       [place in FIRST_DIGITS for place in range(len(answer))]))
            patch = (p * PATCHES + int(PATCHES * y)) * PATCHES + int(PATCHES * x)
            seen += [(patch, word) for word in texts.names[number][k]]
    tokens, weights, first = (nn.utils.rnn.pad_sequence(rows, batch_first=True)
                              for rows in (said, counts, firsts))
    patches = (photos.patches[chosen].float() - photos.mean) / photos.std
    return patches, torch.tensor(photo_of), tokens, weights, first, torch.tensor(seen)
