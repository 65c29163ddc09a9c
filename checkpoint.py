"""What a training run leaves, how it resumes from there, and how a network is made of it.

A checkpoint holds the run's arguments, its descriptions of all keypoints, the trained weights, the
optimizer's state, and how many steps are done. Frozen weights stay where they were published.
"""

import argparse
import os
import platform
from pathlib import Path

import torch

from chat import INSTRUCTIONS, PRETRAINING, Chat
from common import InputError, get_field, say
from lora import load_trainable_state, trainable_state
from model import CapeLLM

MAX_IMAGE_SIZE = 2048  # pixels a side; making such a crop takes up to 268 MB
MAX_SEED = 10**18
CHOICES = {"tune_vit": ("frozen", "lora", "full"), "tune_llm": ("frozen", "lora", "full"),
           "answer": ("text", "token"), "instruction": (*INSTRUCTIONS,), "pretrain": (None, *PRETRAINING)}
# arguments of train.py that change nothing of what is learned
WITHOUT_EFFECT = {"out", "resume", "fresh", "check", "missing_list", "checkpoint_activations", "compile",
                  "workers", "save_every", "log_every", "validate"}
UNFINISHED = ("ckpt.part", "best.part", "log.jsonl.part", "curve.png.part")  # before they get their names


# ------------------------------------------------------------------------------------------------------ files


def read_checkpoint(path):
    """-> what save_checkpoint() wrote, a dictionary. InputError if it is no checkpoint.

    The file may be a stranger's, so nothing in it is run, and what networks are made of is checked.
    """
    checkpoint = read_parts(path)
    args = checkpoint["args"]
    for key in "vit", "llm", "data":
        get_field(args, key, path, str, 1, 1000, " among its arguments")
    for key, low, high in ("image_size", 1, MAX_IMAGE_SIZE), ("seed", 0, MAX_SEED), ("split", 1, 10**6):
        get_field(args, key, path, int, low, high, " among its arguments")
    for key, choices in CHOICES.items():
        if args.get(key, "") not in choices:
            raise InputError(f"{path}: {key} among its arguments is none of {choices}")
    return checkpoint


def read_parts(path):
    """-> the parts of a checkpoint, of whatever run. InputError if there are others, or broken weights."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        parts = ("args", "descriptions", "model", "optimizer")
        if not all(isinstance(checkpoint[key], dict) for key in parts):
            raise TypeError
        checkpoint = {key: checkpoint[key] for key in (*parts, "step")}
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder; the checkpoint in it, ckpt.pt, is wanted") from None
    except Exception as e:  # a damaged file can raise nearly anything
        raise InputError(f"{path}: not a checkpoint of this program, or a damaged one "
                         f"({type(e).__name__})") from None
    get_field(checkpoint, "step", path, int, 0, 10**12)
    for name, tensor in checkpoint["model"].items():
        if not (isinstance(name, str) and is_sound(tensor)):
            raise InputError(f"{path}: its {name!r} is not a tensor of finite numbers; "
                             "the file is damaged, or its training diverged")
    return checkpoint


def is_sound(tensor, shape=None):
    """Whether it is a dense tensor of finite numbers, no larger than its memory, and of that shape."""
    return (isinstance(tensor, torch.Tensor) and shape in (None, tensor.shape)
            and tensor.layout == torch.strided and tensor.device.type == "cpu"
            and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and tensor.nbytes <= tensor.untyped_storage().nbytes() and bool(tensor.isfinite().all()))


def load_optimizer(optimizer, saved, path):
    """Gives AdamW a checkpoint's averages of gradients. Its settings stay those of the run's arguments."""
    own = optimizer.state_dict()["param_groups"]
    shapes = dict(enumerate(p.shape for group in optimizer.param_groups for p in group["params"]))
    groups, state = saved.get("param_groups"), saved.get("state")
    is_alike = isinstance(groups, list) and len(groups) == len(own) and isinstance(state, dict)
    if not (is_alike and all(i in shapes and are_averages(state[i], shapes[i]) for i in state)):
        raise InputError(f"{path}: its optimizer is not of such a run; start anew")
    optimizer.load_state_dict({"state": state, "param_groups": own})


def are_averages(saved, shape):
    """Whether this is what AdamW keeps for a parameter of that shape."""
    if not isinstance(saved, dict) or saved.keys() != {"step", "exp_avg", "exp_avg_sq"}:
        return False
    step, mean, squares = saved["step"], saved["exp_avg"], saved["exp_avg_sq"]
    return (is_sound(step, ()) and is_sound(mean, shape) and is_sound(squares, shape)
            and bool(step >= 0) and bool((squares >= 0).all()))


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
                         "free some space; the same command resumes") from None


def lock_folder(folder):
    """Makes the folder of a run and keeps other runs out -> an open file, whose end is that of the lock.

    The operating system takes the lock back when the process ends, in whatever way. Unfinished files of a run
    that was killed are removed. InputError if the folder is in use or cannot be written into.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a+")
    except OSError as e:
        raise InputError(f"{folder}: cannot be made or written into ({e})") from None
    if not take_lock(lock):
        lock.seek(0)
        raise InputError(f"{folder}: in use by another run (process {lock.read()}); "
                         "wait for its end or choose another --out")
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {platform.node()}")
    lock.flush()
    for path in (folder / name for name in UNFINISHED):
        if path.is_dir() and not path.is_symlink():
            raise InputError(f"{path}: is a folder, where a file goes; move it away")
        path.unlink(missing_ok=True)
    return lock


def take_lock(file):
    """Whether no other process has locked the file. The system takes a lock back when its process ends."""
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which DataLoaders' workers do not inherit
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError):  # Windows, or a disk that knows no locks
        pass
    return True


def find_contradictions(args, trained):
    """What the arguments of a command line (a Namespace) would change of a checkpoint's, in words.

    trained: the checkpoint's, a dictionary. An argument that it does not know does not count.
    """
    return [f"--{name.replace('_', '-')} {value} (the checkpoint: {trained[name]})"
            for name, value in vars(args).items()
            if name not in WITHOUT_EFFECT and trained.get(name, value) != value]


# --------------------------------------------------------------------------------------------------- networks


def load_model(args, device, checkpoint=None):
    """The network of a run's arguments, with the trained weights of its checkpoint if there is one.

    If there is none, weights may be taken from another run's (--init, --init-projection).
    """
    torch.manual_seed(args.seed)  # adapters and projection start alike in all processes
    model = CapeLLM.load(args.vit, args.llm, args.image_size, args.tune_vit, args.tune_llm, args.answer,
                         device, args.dtype)
    start = None if checkpoint else args.init or args.init_projection
    try:
        if checkpoint:
            load_trainable_state(model, checkpoint["model"])
        elif start:
            taken = start_from(model, read_parts(start)["model"], projection_alone=not args.init)
            say(f"{start}: {taken}")
    except ValueError as e:
        raise InputError(f"{start + ': ' if start else ''}{e}: not trained with --vit {args.vit} "
                         f"--llm {args.llm}?") from None
    return model


@torch.no_grad()
def start_from(model, weights, projection_alone):
    """Takes from a checkpoint's weights what trains here too in the same shape -> a line that says what.

    ValueError if the projection is missing or of another width: such weights are of other networks.
    """
    def is_projection(name):
        return name.startswith("projection.")

    projection = {name.removeprefix("projection."): weights[name] for name in filter(is_projection, weights)}
    load_trainable_state(model.projection, projection)
    own = trainable_state(model)
    taken = [name for name in own if name in weights and own[name].shape == weights[name].shape
             and (is_projection(name) or not projection_alone)]
    for name in taken:
        own[name].copy_(weights[name])
    fates = {"taken": taken, "not taken": [name for name in weights if name not in taken],
             "start anew": [name for name in own if name not in taken]}
    return ", ".join(f"{len(names)} tensors {fate} ({names[0]}{', ...' if names[1:] else ''})"
                     for fate, names in fates.items() if names)


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
