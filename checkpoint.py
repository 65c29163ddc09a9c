"""What a training run leaves, and how a network is made of it.

A checkpoint holds the run's arguments, its descriptions of all keypoints, the trained weights, the
optimizer's state, and how many steps are done. Frozen weights stay where they were published.
"""

import argparse
import os
from pathlib import Path

import torch

from chat import INSTRUCTIONS, PRETRAINING, Chat
from common import InputError
from lora import load_trainable_state, trainable_state
from model import CapeLLM


def read_checkpoint(path):
    """-> what save_checkpoint() wrote, a dictionary. InputError if it is no checkpoint."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        parts = ("args", "descriptions", "model", "optimizer")
        if not all(isinstance(checkpoint[key], dict) for key in parts):
            raise TypeError
        return {key: checkpoint[key] for key in (*parts, "step")}
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except Exception as e:  # a damaged file can raise nearly anything
        raise InputError(f"{path}: not a checkpoint of this program, or a damaged one "
                         f"({type(e).__name__})") from None


def save_checkpoint(path, **contents):
    """Writes a new file and then renames it, so that there is a whole checkpoint at any moment."""
    part = path.with_suffix(".part")
    try:
        part.unlink(missing_ok=True)  # it may be a link, which must not be followed
        torch.save(contents, part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())  # on the disk before it takes the old one's name
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # torch's writer says RuntimeError for a full disk
        if part.is_file():
            part.unlink()
        raise InputError(f"{path}: cannot be written ({str(e).splitlines()[0]}); "
                         "free some space and --resume") from None


def load_model(args, device, checkpoint=None, say=print):
    """The network of a run's arguments, with the trained weights of its checkpoint if there is one.

    If there is none, weights may be taken from another run's (--init, --init-projection); say() tells which.
    """
    torch.manual_seed(args.seed)  # adapters and projection start alike in all processes
    model = CapeLLM.load(args.vit, args.llm, args.image_size, args.tune_vit, args.tune_llm, args.answer,
                         device, args.dtype)
    start = None if checkpoint else args.init or args.init_projection
    try:
        if checkpoint:
            load_trainable_state(model, checkpoint["model"])
        elif start:
            say(f"{start}: {start_from(model, read_checkpoint(start)['model'], not args.init)}")
    except ValueError as e:
        raise InputError(f"{start + ': ' if start else ''}{e}: not trained with --vit {args.vit} "
                         f"--llm {args.llm}?") from None
    return model


@torch.no_grad()
def start_from(model, weights, projection_alone):
    """Takes from a checkpoint's weights what trains here too in the same shape -> a line that says what.

    ValueError if the projection is missing or of another width: such weights are of other networks.
    """
    load_trainable_state(model.projection, {name.removeprefix("projection."): weight for name, weight
                                            in weights.items() if name.startswith("projection.")})
    own = trainable_state(model)
    taken = [name for name in own if name in weights and own[name].shape == weights[name].shape
             and (name.startswith("projection.") or not projection_alone)]
    for name in taken:
        own[name].copy_(weights[name])
    left, new = ([name for name in names if name not in taken] for names in (weights, own))
    return ", ".join(f"{len(names)} tensors {what} ({names[0]}{', ...' if names[1:] else ''})"
                     for what, names in (("taken", taken), ("not taken", left), ("start anew", new)) if names)


def load_chat(args):
    instruction = PRETRAINING[args.pretrain] if args.pretrain else INSTRUCTIONS[args.instruction]
    return Chat(args.llm, instruction, args.answer)


def load_trained(checkpoint, device, llm=None, vit=None, dtype=None):
    """What read_checkpoint() gave -> its network and Chat. llm, vit: where the weights are now, if moved.

    dtype: see CapeLLM.load(); that of the training does not matter.
    """
    trained = argparse.Namespace(**checkpoint["args"])
    if trained.pretrain:
        raise InputError("the checkpoint is one of --pretrain, which locates nothing; "
                         "train from it with train.py --init")
    trained.llm, trained.vit = find_weights(llm or trained.llm), find_weights(vit or trained.vit)
    trained.dtype = dtype
    return load_model(trained, device, checkpoint).eval(), load_chat(trained)


def find_weights(folder):
    """A folder below the current one or, for programs that are called from elsewhere, beside this file."""
    beside = Path(__file__).parent / folder
    return folder if not beside.exists() or Path(folder).exists() else str(beside)
