"""What a training run leaves, and how a network is made of it.

A checkpoint holds the run's arguments, its descriptions of all keypoints, the trained weights, the
optimizer's state, and how many steps are done. Frozen weights stay where they were published.
"""

import argparse
import os

import torch

from chat import INSTRUCTIONS, PRETRAINING, Chat
from common import InputError
from lora import load_trainable_state
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


def load_model(args, device, checkpoint=None):
    """The network of a run's arguments, with the trained weights of its checkpoint if there is one."""
    torch.manual_seed(args.seed)  # adapters and projection start alike in all processes
    model = CapeLLM.load(args.vit, args.llm, args.image_size, args.tune_vit, args.tune_llm, args.answer,
                         device, args.dtype)
    try:
        if checkpoint:
            load_trainable_state(model, checkpoint["model"])
        elif args.init:
            weights = read_checkpoint(args.init)["model"]
            projection = {name: weights[f"projection.{name}"] for name in ("weight", "bias")
                          if f"projection.{name}" in weights}
            load_trainable_state(model.projection, projection)
    except ValueError as e:
        init = f"--init {args.init}: " if args.init and not checkpoint else ""
        raise InputError(f"{init}{e}: not trained with --vit {args.vit} --llm {args.llm}?") from None
    return model


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
    trained.llm, trained.vit, trained.dtype = llm or trained.llm, vit or trained.vit, dtype
    return load_model(trained, device, checkpoint).eval(), load_chat(trained)
