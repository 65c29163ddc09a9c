"""What a training run leaves, how it goes on from there, and how a network is made of it.

A checkpoint holds the run's arguments, its descriptions of all keypoints, the trained weights, the
optimizer's state, and how many steps are done. Frozen weights stay where they were published.
"""

import argparse
import os
import platform

import torch

from chat import INSTRUCTIONS, PRETRAINING, Chat
from common import InputError
from lora import load_trainable_state
from model import CapeLLM

# arguments of train.py that change nothing of what is learned
WITHOUT_EFFECT = {"out", "resume", "fresh", "check", "missing_list", "checkpoint_activations", "compile",
                  "workers", "save_every", "log_every", "validate"}
UNFINISHED = ("ckpt.part", "best.part", "log.jsonl.part", "curve.png.part")  # before they get their names


# ------------------------------------------------------------------------------------------------------ files


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
                         "free some space; the same command goes on") from None


def lock_folder(folder, fresh=False):
    """Makes the folder of a run and keeps other runs out -> an open file, whose end is that of the lock.

    The operating system takes the lock back when the process ends, in whatever way. Unfinished files of a run
    that was killed are removed, and with `fresh` its checkpoints. InputError if the folder is in use or
    cannot be written into.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a+")
        for part in (folder / name for name in UNFINISHED):
            if part.is_dir() and not part.is_symlink():
                raise InputError(f"{part}: is a folder, where an unfinished file goes; move it away")
    except OSError as e:
        raise InputError(f"{folder}: cannot be made or written into ({e})") from None
    try:
        import fcntl
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which DataLoaders' workers do not inherit
    except ImportError:  # Windows
        pass
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        raise InputError(f"{folder}: in use by another run (process {lock.read()}); "
                         "wait for its end or choose another --out") from None
    except OSError:  # a disk that knows no locks
        pass
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {platform.node()}")
    lock.flush()
    for name in UNFINISHED + (("ckpt.pt", "best.pt") if fresh else ()):
        (folder / name).unlink(missing_ok=True)
    return lock


def find_contradictions(args, trained):
    """What the arguments of a command line (a Namespace) would change of a checkpoint's, in words.

    trained: the checkpoint's, a dictionary. An argument that it does not know does not count.
    """
    return [f"--{name.replace('_', '-')} {value} (the checkpoint: {trained[name]})"
            for name, value in vars(args).items()
            if name not in WITHOUT_EFFECT and trained.get(name, value) != value]


# --------------------------------------------------------------------------------------------------- networks


def load_model(args, device, checkpoint=None):
    """The network of a run's arguments, with the trained weights of its checkpoint if there is one."""
    torch.manual_seed(args.seed)  # adapters and projection start alike in all processes
    model = CapeLLM.load(args.vit, args.llm, args.image_size, args.tune_vit, args.tune_llm, args.answer,
                         device)
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


def load_trained(checkpoint, device, llm=None, vit=None):
    """What read_checkpoint() gave -> its network and Chat. llm, vit: where the weights are now, if moved."""
    trained = argparse.Namespace(**checkpoint["args"])
    if trained.pretrain:
        raise InputError("the checkpoint is one of --pretrain, which locates nothing; "
                         "train from it with train.py --init")
    if broken := [name for name, t in checkpoint["model"].items() if not t.isfinite().all()]:
        raise InputError(f"the checkpoint's {broken[0]} holds what is no number, as {len(broken)} of its "
                         f"{len(checkpoint['model'])} tensors: its training diverged; use an earlier one")
    trained.llm, trained.vit = llm or trained.llm, vit or trained.vit
    return load_model(trained, device, checkpoint).eval(), load_chat(trained)
