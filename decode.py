"""Asking CapeLLM: from photos and questions to points (paper, section 3.2).

Greedy decoding takes the likeliest next token, feeds it back, and so on. With the photo's keys and values
cached, a question takes nine passes through the decoder: one for the photo, and one for each of the eight
tokens up to the last digit. But most of these are known in advance. Three passes suffice for all questions:

    pass 1   BOS, 256 image tokens, "\\n" User ...   the photo, once, and what all questions begin with
    pass 2   ... is the nose? ... Assistant: [0.     each question, and the start of its answer
             predicts the next token:        123     x, one of a thousand
    pass 3   123,0.                                  what was chosen, and what follows it
             predicts: 456                           y, one of a thousand

(A tokenizer that spells digits one by one needs a pass for each digit. Questions of very different lengths
are asked in groups, each with passes 2 and 3 of its own.) The known tokens are a guess at what the model
would say. The hidden states of the same passes tell whether it would, and where it would not the question is
asked again token by token. So the answers are those of greedy decoding, token by token.

Each choice is made from a distribution over numbers, which says more than its likeliest one: see
make_prediction(). Letters: P photos, B rows (one question each), T tokens of the longest block, n tokens at
its end, D width. `python decode.py` runs this beside decoding without a cache.
"""

import os
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from chat import Category
from common import InputError, reading
from data import Crop, normalize
from llama import Cache
from model import load_network, load_weights, read_checkpoint


@dataclass(frozen=True)
class Prediction:
    """Where a keypoint is, as far as the model can tell."""

    point: tuple | None  # (x, y) in fractions of the crop; None if the answer holds no coordinates
    confidence: float | None = None  # x's share near the point times y's; None if unknown
    answer: list = ()  # the tokens that the model said
    x_distribution: np.ndarray | None = None  # over 0.000 ... 0.999: (1000,); None if unknown
    y_distribution: np.ndarray | None = None


# --------------------------------------------------------------------------------------------------- answers


def feed(llama, cache, blocks, n=1):
    """Each row reads its block, a list of tokens -> hidden states of the last n of them (B, n, D)."""
    lengths, device = torch.tensor([len(block) for block in blocks]), llama.norm.weight.device
    T = max(map(len, blocks))
    tokens = torch.tensor([block + [0] * (T - len(block)) for block in blocks]).to(device)
    is_token = (torch.arange(T) < lengths[:, None]).to(device)
    hidden = llama(llama.embed_tokens(tokens), cache, is_token)  # (B, T, D)
    last = (lengths[:, None] + torch.arange(-n, 0)).to(device)
    return hidden.gather(1, last[..., None].expand(-1, -1, hidden.shape[2]))


def answer_greedily(llama, cache, questions, answer_format):
    """Each row reads its question, takes the likeliest next token, reads it, and so on -> B answers."""
    answers, blocks = [[] for _ in questions], questions
    end, most = answer_format.ending[-1], answer_format.max_tokens
    while True:
        tokens = llama.lm_head(feed(llama, cache, blocks)[:, -1]).argmax(-1).tolist()
        for answer, token in zip(answers, tokens):
            if end not in answer:
                answer.append(token)
        if all(end in answer or len(answer) == most for answer in answers):
            return answers
        blocks = [[token] for token in tokens]  # rows that have ended read on; what they say is ignored


def answer_in_format(llama, cache, questions, answer_format, constrained=False):
    """A pass for each choice, with the tokens known in advance fed along. Every row keeps the format.

    -> B answers; for each, whether greedy decoding agrees, that is, would have said just this; and the
    distributions over answer_format.digits that its choices were made from. constrained: all rows count
    as agreeing, and nothing is checked.
    """
    answers, distributions = [[] for _ in questions], [[] for _ in questions]
    # Token ids[i] spells the number values[i]. ids ascend, so that of equal logits, which are common in bf16,
    # argmax() takes the one that greedy decoding takes.
    ids, values = torch.tensor(answer_format.digits, device=llama.norm.weight.device).sort()
    blocks, read_from = questions, []
    for known in answer_format.known:
        # The last positions of a block predict the known tokens and then the choice:
        #   block       ...  "Assistant"  ":"    " ["   "0"   "."
        #   predicts                      " ["   "0"    "."   the choice
        hidden = feed(llama, cache, [block + known for block in blocks], len(known) + 1)  # (B, n, D)
        scores = F.linear(hidden[:, -1], llama.lm_head.weight[ids])  # (B, 1000), or (B, 10) if one by one
        choices = ids[scores.argmax(-1)].tolist()
        p = torch.empty_like(scores, dtype=torch.float32)
        p[:, values] = scores.float().softmax(-1)  # from 0 upwards
        for answer, choice, of_row, p_row in zip(answers, choices, distributions, p.cpu().numpy()):
            answer += [*known, choice]
            of_row.append(p_row)
        blocks = [[choice] for choice in choices]
        read_from.append(hidden)
    if constrained:
        return answers, [True] * len(answers), distributions
    likeliest = llama.lm_head(torch.cat(read_from, dim=1)).argmax(-1)  # (B, tokens of an answer)
    return answers, [said == answer for said, answer in zip(likeliest.tolist(), answers)], distributions


def answer_questions(llama, photos, photo_of, questions, answer_format, constrained=False):
    """Greedy decoding: fast where the model keeps to the format, token by token where it does not.

    photos: a Cache of what was read of each. photo_of: the row of it that each question goes on from.
    -> a pair for each question: its answer, and the distributions of its choices, None if it has none.
    constrained: keep to the format in any case.
    """
    def fork(rows):
        return photos.fork(torch.tensor([photo_of[r] for r in rows], device=photos.is_token.device))

    found = [(None, None)] * len(questions)
    left = range(len(questions))  # still to be asked token by token
    if answer_format.known:
        answers, agrees, distributions = answer_in_format(
            llama, fork(left), questions, answer_format, constrained)
        found = list(zip(answers, distributions))
        left = [r for r in left if not agrees[r]]
    if left:
        answers = answer_greedily(llama, fork(left), [questions[r] for r in left], answer_format)
        for r, said in zip(left, answers):
            found[r] = said, None
    return found


@torch.no_grad()
def locate(model, images, questions, chat, decode="greedy", constrained=False):
    """Asks each photo its questions. images (P, 3, h, w), normalised; questions: for each photo, token lists.

    -> for each photo a list of Predictions, one for each question. decode: see make_prediction().
    constrained: keep all answers to the format, so that none is malformed.
    """
    # the start that all questions share (commonprefix() takes any lists); one token of each at least is left
    common = os.path.commonprefix([question[:-1] for of_photo in questions for question in of_photo])
    photos = prefill(model, images, [chat.bos, *common])
    rest = [[question[len(common):] for question in of_photo] for of_photo in questions]
    return ask_photos(model, photos, rest, chat, decode, constrained)


def ask_photos(model, photos, questions, chat, decode="greedy", constrained=False):
    """As locate(). photos: a Cache with one row each, left unchanged; questions: what is still to be read."""
    asked = [(p, question) for p, of_photo in enumerate(questions) for question in of_photo]
    found = {}
    for group in group_by_length([len(question) for _, question in asked]):
        photo_of, of_group = zip(*(asked[i] for i in group))
        said = answer_questions(model.llama, photos, photo_of, of_group, chat.coordinates, constrained)
        found |= dict(zip(group, said))
    predictions = [[] for _ in questions]
    for i, (p, _) in enumerate(asked):
        predictions[p].append(make_prediction(*found[i], chat, decode))
    return predictions


def prefill(model, images, start):
    """The first pass: BOS, the image tokens, and the rest of `start`, one row per photo -> Cache."""
    photos = Cache()
    tokens = torch.tensor([start], device=images.device).expand(len(images), -1)
    model.llama(model.embed(images, tokens), photos)
    return photos


def group_by_length(lengths, spread=16):
    """Questions of like length are asked together, so that little is padded -> lists of indices.

    Lengths 61, 45, 66, 47 make [[1, 3], [0, 2]].
    """
    order, groups = sorted(range(len(lengths)), key=lambda i: lengths[i]), []
    for i in order:
        if not groups or lengths[i] - lengths[groups[-1][0]] >= spread:
            groups.append([])
        groups[-1].append(i)
    return groups


# ----------------------------------------------------------------------------------------------- coordinates


DECODINGS = "greedy", "median", "mean"  # what make_prediction() may take


def make_prediction(answer, distributions, chat, decode="greedy"):
    """An answer and its choices' distributions -> Prediction.

    decode: "greedy", the paper's way, takes the digits that were chosen; "median" and "mean" are those of
    each coordinate's distribution. They differ most where digits are chosen one by one: a model that wavers
    between 0.199 and 0.201 and takes 0.1 was hardly ever shown how to go on, and may say anything.
    """
    point = chat.parse(answer)
    if distributions is None:
        return Prediction(point, None, answer)
    n = len(distributions) // 2
    x, y = number_distribution(distributions[:n]), number_distribution(distributions[n:])
    if decode == "median":
        point = tuple((p.cumsum() < 0.5).sum() / 1000 for p in (x, y))
    elif decode == "mean":
        point = tuple(p @ np.arange(1000) / 1000 for p in (x, y))
    return Prediction(point, mass_near(point[0], x) * mass_near(point[1], y), answer, x, y)


def number_distribution(distributions):
    """The distributions of one number's successive digits -> that of the number: (1000,).

    What follows a digit is known only for the likeliest digit. The share of every other digit is spread
    evenly over the numbers that begin with it. If the first digit is 2 at 70 % and 1 at 30 %, and after the 2
    comes a 0 at 90 %, then 63 % go to 0.200 ... 0.209, and each of 0.100 ... 0.199 gets 0.3 %.
    """
    p, mass, start, width = np.zeros(1000), 1.0, 0, 1000
    for digit in distributions:  # (10,) if digits come one by one, (1000,) if the number is one token
        width //= len(digit)
        p[start:start + width * len(digit)] = np.repeat(mass * digit / width, width)
        start, mass = start + width * digit.argmax(), mass * digit.max()
    return p / p.sum()


def mass_near(value, distribution, reach=0.1):
    """How much of a distribution over 0.000 ... 0.999 lies within `reach` of a value."""
    return float(distribution[np.abs(np.arange(1000) / 1000 - value) <= reach + 1e-9].sum())


# ------------------------------------------------------------------------------------------- trained models


def read_trained(path):
    """read_checkpoint() of a model that locates. Where there is no such file, names those in runs/."""
    others = sorted(map(str, Path("runs").glob("*/ckpt.pt")))
    if others and not Path(path).exists():
        raise InputError(f"{path}: no such file; there is {', '.join(others)}")
    checkpoint = read_checkpoint(path)
    with reading(path, "is it a checkpoint of train.py?"):
        if checkpoint["args"]["pretrain"]:
            raise InputError(f"{path}: one of --pretrain, which locates nothing; train from it with --init")
    return checkpoint


def load_trained(path, device, llm=None, vit=None, dtype=None, checkpoint=None):
    """-> the network, ready to be asked, its Chat, and the checkpoint, which may have been read before.

    llm, vit: where the published weights are, if they were moved since. dtype: see load_network().
    """
    checkpoint = checkpoint or read_trained(path)
    with reading(path, "is it a checkpoint of train.py?"):
        args = Namespace(**checkpoint["args"])
        args.llm, args.vit = find(llm or args.llm), find(vit or args.vit)
        model, chat = load_network(args, device, dtype)
    load_weights(model, checkpoint, path)
    return model.eval(), chat, checkpoint


def find(path):
    """A path below the current folder or, for programs that are started elsewhere, beside this file."""
    beside = Path(__file__).parent / path
    return beside if beside.exists() and not Path(path).exists() else path


def check_decoding(chat, decode, constrained=False):
    """InputError if answers cannot be read in the way that was asked for."""
    if (constrained or decode != "greedy") and not chat.coordinates.known:
        raise InputError(f"--{'constrained' if constrained else f'decode {decode}'}: this model does not "
                         "spell points in digits, one or three at a time; leave it out")


if __name__ == "__main__":
    toy = Path(__file__).parent / "assets/toy"
    model, chat, _ = load_trained(toy / "ckpt.pt", "cpu", toy / "llm", toy / "vit")
    # the creature's box is 70,52,125,112
    image = normalize(Crop(70 + 125 / 2, 52 + 112 / 2, 125).cut(toy / "creature.jpg", 112)[None])
    asked = ["the knob on the antenna that is purple", "the sharp end of the green horn", "the orange heart"]
    questions = chat.encode_questions(Category("creature", [("first mark", text) for text in asked]))
    passes, form = [], chat.coordinates
    model.llama.norm.register_forward_hook(lambda *_: passes.append(1))

    def generate():
        return [model.generate(image, [chat.bos, *question], form.ending[-1], form.max_tokens)
                for question in questions]

    for way, run in ("no cache", generate), ("in format", lambda: locate(model, image, [questions], chat)):
        passes.clear()
        began = time.perf_counter()
        found = run()
        seconds = time.perf_counter() - began
        answers = found if way == "no cache" else [prediction.answer for prediction in found[0]]
        print(f"{way}: {len(passes)} passes for {len(questions)} questions, {seconds:.3f} s, "
              f"{'  '.join(chat.tokenizer.decode(tokens) for tokens in answers)}")
    for text, p in zip(asked, locate(model, image, [questions], chat, decode="median")[0]):
        print(f"{text:40} median ({p.point[0]:.3f}, {p.point[1]:.3f}), confidence {p.confidence:.2f}")
