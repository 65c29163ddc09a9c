"""Conversations of any length: what the paper's conference version adds (ICCV 2025), and Table 7.

In training, `--rounds dynamic` puts any number of questions into a conversation. In a test, `--cumulative`
asks for a photo's keypoints one after another in one conversation, in which the model sees its earlier
answers. Table 7 (`--instruction step`) asks first of all what is in the photo.
"""

import math

import torch

from chat import AnswerFormat, Scene
from decode import answer, ask_photos, read, read_photos
from paper import keypoint_token
from paper.instructions import WHAT, ask_step_by_step

LONGEST_NAME = 16  # tokens of an answer to what is in the photo; every name in descriptions.json has fewer


def group_dynamically(n, rounds, rng):
    """Shuffles keypoints 0 ... n-1 and cuts them at random places into as many groups as fours would make.

    So groups have any size. It stands in for data.group_keypoints() and needs no `rounds`.
    """
    order = rng.permutation(n).tolist()
    cuts = sorted(rng.choice(range(1, n), math.ceil(n / 4) - 1, replace=False)) if n > 1 else []
    return [order[a:b] for a, b in zip([0, *cuts], [*cuts, n])]


def encode_in_turns(chat, category):
    """As chat.encode_questions(), but all questions are of one conversation.

    It matters where a text comes before the first question only, such as the list of names (Table 3).
    """
    scene = Scene(category, [(keypoint, None) for keypoint in category.keypoints])
    return [chat.newline + chat.encode(question) for question, answer in chat.instruction(scene)
            if answer is None]


@torch.no_grad()
def locate_in_turns(model, images, questions, chat, decode="greedy", constrained=False, cumulative=False):
    """As decode.locate(), but if the model was trained to say what is in the photo, it does so first.

    cumulative: a photo's questions are asked one after another, not all at once behind the same beginning.
    """
    points = isinstance(chat, keypoint_token.KeypointChat)
    ask = keypoint_token.ask_photos if points else ask_photos
    conversations = read_photos(model, images, [chat.bos, *chat.newline])  # one row a photo
    if chat.instruction is ask_step_by_step:
        words = AnswerFormat([], [], [chat.eos], LONGEST_NAME)
        opening = [chat.encode(WHAT)] * len(images)
        said = answer(model.llama, conversations, range(len(images)), opening, words)
        go_on(model.llama, conversations, opening, [tokens for tokens, _ in said], words)
    # "\n" stands once, where a conversation begins, as in training
    questions = [[question[len(chat.newline):] for question in of_photo] for of_photo in questions]
    if not cumulative:
        return ask(model, conversations, questions, chat, decode, constrained)
    predictions = [[] for _ in questions]
    for n in range(max(map(len, questions), default=0)):
        turn = [of_photo[n:n + 1] for of_photo in questions]  # one question a photo, or none
        for of_photo, found in zip(predictions, ask(model, conversations, turn, chat, decode, constrained)):
            of_photo += found
        asked = [of_photo[0] if of_photo else [] for of_photo in turn]
        answers = [of_photo[-1].answer if of_photo else [] for of_photo in predictions]
        go_on(model.llama, conversations, asked, answers, chat.coordinates)
    return predictions


def go_on(llama, conversations, questions, answers, answer_format):
    """Each row reads its question, what the model said, and the rest of the answer's format up to its end.

    A row whose questions have come to an end reads anything, which nobody looks at.
    """
    end = answer_format.ending[-1]
    read(llama, conversations, [
        [*question, *answer, *([] if answer[-1:] == [end] else answer_format.ending)]
        for question, answer in zip(questions, answers)])
