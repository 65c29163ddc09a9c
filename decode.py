"""Asking CapeLLM: from photos and questions to points (paper, section 3.2).

The textbook way takes the likeliest next token, feeds it back, and so on: nine passes through the decoder,
one for the photo and one for each token. But most tokens of an answer are known in advance. Three passes
suffice for all questions about a photo:

    pass 1   BOS, 256 image tokens, "\\n"            the photo, once; its keys and values are kept
    pass 2   User: where is ... Assistant: [0.       each question, and the start of its answer
             predicts the next token:        123     x, one of a thousand
    pass 3   123,0.                                  what was chosen, and what follows it
             predicts: 456                           y, one of a thousand

(A tokenizer that spells digits one by one needs a pass for each digit.) The known tokens are a guess at what
the model would say. The logits of the same passes tell whether it would, and where it would not the question
is asked again in the textbook way. So the answers are those of the textbook way, token by token.

Each choice is made from a distribution over numbers, which says more than its likeliest one: see
read_coordinates(). Letters: P photos, R rows (one conversation each), T new tokens, S slots of the cache, D
width, V vocabulary. `python decode.py` runs both ways side by side.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from chat import Category, Chat
from data import Crop, normalize
from lora import load_trainable_state
from model import CapeLLM


@dataclass(frozen=True)
class Prediction:
    """Where a keypoint is, as far as the model can tell."""

    point: tuple | None  # (x, y) in fractions of the crop; None if the answer holds no coordinates
    confidence: float | None = None  # the share of the distributions near the point; None if unknown
    answer: list = ()  # the tokens that the model said
    x_distribution: np.ndarray | None = None  # over 0.000 ... 0.999: (1000,); None if unknown
    y_distribution: np.ndarray | None = None


# --------------------------------------------------------------------------------------------- conversations


class Conversations:
    """Conversations under way, one a row: what was read, as keys and values that the next tokens look at.

    What they begin with, a photo, is kept once, however many continue it. Rows read blocks of tokens of
    different lengths, so some slots of the cache hold padding, and nothing ever looks at those:

        beginnings  p p p p p p      beginning_of  0, 0: both rows continue p
        cache       a a a a a  c c   real          1 1 1 1 1 1  1 1 1 1 1  1 1
                    b b - - -  d -                 1 1 1 1 1 1  1 1 0 0 0  1 0
    """

    def __init__(self, llama, x):
        """x (P, T, D): embeddings of P beginnings, a conversation each."""
        self.llama, self.beginnings, self.cache = llama, {}, {}
        llama(x, cache=self.beginnings, wanted=[])  # no hidden states, only keys and values
        self.beginning_of = torch.arange(len(x), device=x.device)  # (R,)
        self.real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)  # (R, S), False for padding

    def select(self, rows):
        """Continues only these rows. A row that is named several times becomes several conversations."""
        rows = torch.tensor(rows, dtype=torch.long, device=self.real.device)
        for i, (k, v) in self.cache.items():  # layer by layer, so that little is held twice
            self.cache[i] = k[rows], v[rows]  # (R, G, slots, d)
        self.beginning_of, self.real = self.beginning_of[rows], self.real[rows]

    def read(self, blocks, n=1):
        """Reads a block of tokens in each row: R lists of any lengths.

        -> hidden states of the last n tokens of every block (R, n, D); no row for an empty block.
        """
        T, device = max(map(len, blocks)), self.real.device
        lengths = torch.tensor([len(block) for block in blocks], device=device)
        new = torch.arange(T, device=device) < lengths[:, None]  # (R, T), False for padding
        positions = self.real.sum(1, keepdim=True) + torch.arange(T, device=device)
        # a query sees what is real in the cache, and its own block up to itself
        cached = self.real[:, None].expand(-1, T, -1)  # (R, T, S)
        within = new[:, None] & new.new_ones(T, T).tril()  # (R, T, T)
        mask = torch.cat((cached, within), dim=2)[:, None]  # (R, 1, T, S + T)
        # all blocks in one list, and the places of the last n tokens of each in it
        x = self.llama.embed_tokens(torch.tensor(sum(blocks, []), device=device))  # (all tokens, D)
        last = lengths.cumsum(0)[lengths > 0, None] + torch.arange(-n, 0, device=device)  # (R, n)
        hidden = self.llama(x, positions, mask, self.cache, prefix=(self.beginnings, self.beginning_of),
                            real=new.nonzero(as_tuple=True), wanted=last)
        self.real = torch.cat((self.real, new), dim=1)
        return hidden

    def forget(self, rows, start):
        """Makes these rows forget what they have read since the cache had `start` slots."""
        self.real[rows, start:] = False


def start_conversations(model, images, chat):
    """The first pass: BOS, image tokens and "\\n", one conversation a photo."""
    start = torch.tensor([[chat.bos, *chat.newline]], device=images.device)
    text = model.llama.embed_tokens(start).expand(len(images), -1, -1)  # (P, 2, D)
    return Conversations(model.llama, torch.cat((text[:, :1], model.see(images), text[:, 1:]), dim=1))


# --------------------------------------------------------------------------------------------------- answers


def answer_plainly(conversations, questions, answer_format):
    """Greedy decoding as in a textbook: read the question, take the likeliest next token, read it, and so on.

    questions: a token list for each row; where it is empty, so is the answer. -> R answers.
    """
    llama, answers, unread = conversations.llama, [[] for _ in questions], questions
    while any(unread):
        rows = [r for r, block in enumerate(unread) if block]
        logits = llama.lm_head(conversations.read(unread)[:, -1])  # (rows, V)
        for r, token in zip(rows, logits.argmax(-1).tolist()):
            answers[r].append(token)
        end, most = answer_format.ending[-1], answer_format.max_tokens
        done = [not a or a[-1] == end or len(a) == most for a in answers]
        unread = [[] if is_done else a[-1:] for is_done, a in zip(done, answers)]
    return answers


def answer_in_format(conversations, questions, answer_format, constrained=False):
    """A pass for each choice, with the tokens known in advance fed along. Every row keeps the format.

    -> R answers; for each, whether greedy decoding agrees, that is, would have said just this; and the
    distributions over answer_format.digits that its choices were made from. constrained: what greedy decoding
    would have said is left open, so nothing is computed but the logits of digits.
    """
    llama, answers, unread = conversations.llama, [[] for _ in questions], questions
    agrees, distributions = torch.ones(len(questions), dtype=torch.bool), [[] for _ in questions]
    digits = torch.tensor(answer_format.digits, device=conversations.real.device)
    for known in answer_format.known:
        # The last positions of a block predict the known tokens and then the choice:
        #   block       ...  "Assistant"  ":"    " ["   "0"   "."
        #   predicts                      " ["   "0"    "."   the choice
        blocks = [block + known for block in unread]
        hidden = conversations.read(blocks, 1 if constrained else len(known) + 1)  # (R, n, D)
        if constrained:
            scores = F.linear(hidden[:, -1], llama.lm_head.weight[digits]).float()  # (R, digits)
        else:
            scores, likeliest = score_tokens(llama, hidden, digits)
        choice = digits[scores.argmax(-1)].tolist()
        said = [known + [digit] for digit in choice]
        if not constrained:
            agrees &= (likeliest.cpu() == torch.tensor(said)).all(1)
        for r, p in enumerate(scores.softmax(-1).cpu().numpy()):
            answers[r] += said[r]
            distributions[r].append(p)
        unread = [[digit] for digit in choice]
    return answers, agrees.tolist(), distributions


def score_tokens(llama, hidden, digits):
    """Hidden states (R, n, D) -> logits of `digits` at the last position, and the likeliest token at each."""
    logits = llama.lm_head(hidden).float()  # (R, n, V), 0.5 MB a position: freed before the next pass
    return logits[:, -1, digits], logits.argmax(-1)  # (R, digits), (R, n)


def answer_questions(conversations, questions, answer_format, constrained=False):
    """Greedy decoding: fast where the model keeps to the format, plain where it does not.

    -> a pair for each row: its answer, and the distributions of its choices, None if it was answered plainly.
    constrained: keep to the format in any case.
    """
    start, R = conversations.real.shape[1], len(questions)
    answers, agrees, distributions = [None] * R, [False] * R, [None] * R
    if answer_format.known:
        answers, agrees, distributions = answer_in_format(
            conversations, questions, answer_format, constrained)
    others = [r for r in range(R) if not agrees[r]]
    if others:
        conversations.forget(others, start)
        asked = [question if r in others else [] for r, question in enumerate(questions)]
        plain = answer_plainly(conversations, asked, answer_format)
        for r in others:
            answers[r], distributions[r] = plain[r], None
    return list(zip(answers, distributions))


@torch.no_grad()
def locate(model, images, questions, chat, decode="greedy", constrained=False, cumulative=False):
    """Asks each photo its questions. images (P, 3, h, w), normalised; questions: for each photo, token lists.

    -> for each photo a list of Predictions, one for each question. decode: see read_coordinates().
    constrained: keep all answers to the format, so that none is malformed. cumulative: ask a photo's
    questions one after another in one conversation, with the model's answers between them, not all at once.
    """
    conversations = start_conversations(model, images, chat)
    photo_of = list(range(len(images)))  # of each conversation
    unread = [[] for _ in images]  # what was said in each but not yet read
    if chat.opening:  # what is in the photo?
        said = answer_questions(conversations, [chat.opening] * len(images), chat.words)
        unread = [chat.words.still_to_read(words) for words, _ in said]
    predictions = [[] for _ in images]
    for turn in take_turns(questions, cumulative):
        rows = [photo_of.index(p) for p, _ in turn]  # the conversation that each question continues
        conversations.select(rows)
        photo_of = [p for p, _ in turn]
        blocks = [unread[r] + question for r, (_, question) in zip(rows, turn)]
        found, unread = answer_turn(model, conversations, blocks, chat, decode, constrained)
        for p, prediction in zip(photo_of, found):
            predictions[p].append(prediction)
    return predictions


def take_turns(questions, cumulative):
    """Which questions are asked together -> turns, each a list of (photo, question).

    For questions p1, p2 and p3 about photo p, and q1 and q2 about q:

        all at once    p1 p2 p3 q1 q2             one turn, five conversations
        cumulative     p1 q1 / p2 q2 / p3         three turns, a conversation for each photo
    """
    if not cumulative:
        turns = [[(p, question) for p, asked in enumerate(questions) for question in asked]]
    else:
        turns = [[(p, asked[n]) for p, asked in enumerate(questions) if n < len(asked)]
                 for n in range(max(map(len, questions), default=0))]
    return filter(None, turns)


def answer_turn(model, conversations, blocks, chat, decode, constrained):
    """Reads a block, up to a question, in each row -> Predictions, and tokens that were said but not read."""
    if chat.keypoint is not None:  # Table 8: the point is read off the hidden state of <KEYPOINT>
        hidden = conversations.read([[*block, chat.keypoint] for block in blocks])[:, -1]  # (R, D)
        points = model.keypoint_head(hidden.float()).tolist()
        return ([Prediction(tuple(point), None, [chat.keypoint, chat.eos]) for point in points],
                [[chat.eos] for _ in blocks])
    said = answer_questions(conversations, blocks, chat.coordinates, constrained)
    return ([read_coordinates(answer, distributions, chat, decode) for answer, distributions in said],
            [chat.coordinates.still_to_read(answer) for answer, _ in said])


# ----------------------------------------------------------------------------------------------- coordinates


DECODINGS = "greedy", "median", "mean"  # what read_coordinates() may take


def read_coordinates(answer, distributions, chat, decode="greedy"):
    """An answer and its choices' distributions -> Prediction.

    decode: "greedy", the paper's way, takes the digits that were chosen; "median" and "mean" are those of
    each coordinate's distribution. It matters most where digits are chosen one by one: a model that wavers
    between 0.199 and 0.201 may choose 0.1 and then, among the digits that follow, anything.
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


if __name__ == "__main__":
    toy = Path(__file__).parent / "assets/toy"
    chat, model = Chat(toy / "llm"), CapeLLM.load(toy / "vit", toy / "llm", image_size=112).eval()
    load_trainable_state(model, torch.load(toy / "ckpt.pt", weights_only=True)["model"])
    image = normalize(Crop(132.5, 108, 125).cut(toy / "creature.jpg", 112)[None])
    asked = ["the knob on the antenna that is purple", "the sharp end of the green horn", "the orange heart"]
    questions = chat.questions(Category("creature", [("first mark", text) for text in asked]))
    passes = []
    model.llama.norm.register_forward_hook(lambda *_: passes.append(1))
    for way, decode in ("plain", answer_plainly), ("in format", answer_questions):
        passes.clear()
        began = time.perf_counter()
        with torch.no_grad():
            conversations = start_conversations(model, image, chat)
            conversations.select([0] * len(questions))
            found = decode(conversations, questions, chat.coordinates)
        seconds = time.perf_counter() - began
        answers = found if decode is answer_plainly else [tokens for tokens, _ in found]
        print(f"{way}: {len(passes)} passes, {seconds:.3f} s, "
              f"{'  '.join(chat.tokenizer.decode(tokens) for tokens in answers)}")
    for text, p in zip(asked, locate(model, image, [questions], chat, decode="median")[0]):
        print(f"{text:40} median ({p.point[0]:.3f}, {p.point[1]:.3f}), confidence {p.confidence:.2f}")
