"""What all programs share: errors that a user can fix, processes, JSON. Nothing here is of the paper."""

import argparse
import errno
import json
import os
import signal
import sys
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import active_children
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record


class InputError(Exception):
    """Something the user can fix. The message is one line that says what, where and what to do."""

    def __str__(self):
        # An error in a DataLoader's worker arrives with the worker's traceback before the message.
        return printable(super().__str__().rpartition("InputError: ")[2].strip())


def printable(text):
    """Somebody else's words as they may be printed: on one line, and without power over the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@contextmanager
def reading(path, advice=""):
    """The guard where a stranger's file is opened: what goes wrong inside becomes one line that names it."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # a damaged file can raise nearly anything
        if isinstance(e, FileNotFoundError) and e.filename:
            raise InputError(f"{e.filename}: no such file{advice and '; ' + advice}") from e
        cause = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        cause = cause.partition(" In PyTorch 2.6")[0]  # torch.load()'s advice to trust the file is a bad one
        raise InputError(f"{path}: cannot be read ({cause}){advice and '; ' + advice}") from e


# -------------------------------------------------------------------------------------------------- programs


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """--help with the defaults, but for None, False and 0."""

    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default else action.help


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose --help says the defaults."""

    def __init__(self, **how):
        super().__init__(formatter_class=Help, allow_abbrev=False, **how)

    def error(self, message):
        raise InputError(f"{message.replace('<lambda> ', '')}; see --help")  # a type without a name


def positive(text):
    """The type of an argument that is a whole number above 0."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def natural(text):
    """The type of an argument that is a whole number, 0 or more."""
    if int(text) < 0:
        raise ValueError
    return int(text)


def run(main):
    """Runs a program. What the user can fix is one line on stderr and exit code 2; defects crash loudly."""
    try:
        record(main)(sys.argv[1:])  # under torchrun, leaves the error where torchrun's report finds it
        sys.stdout.flush()  # here, where a broken pipe is caught
    except InputError as e:
        fail(str(e))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # what read our output has ended, as in "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (RuntimeError, OSError) as e:
        if (line := explain(e)) is None:
            raise
        fail(line)
    if dist.is_initialized():
        dist.destroy_process_group()
        # DistributedDataParallel leaves threads of the group behind. One that is still at work when Python
        # ends would abort the process, and torchrun would call the run failed.
        os._exit(0)


def explain(error):
    """An error of torch or of the system that is no defect of the program -> one line, else None."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, torch.OutOfMemoryError):
        return (f"{text.split('. ')[0]}; --checkpoint-activations or a smaller --micro-batch needs less, in "
                "evaluation --batch")
    if text.startswith("DataLoader ") or isinstance(error, ConnectionError):
        return f"lost another process ({text}): killed for want of memory? --workers 0 needs no others"
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text:
        return f"{text}: a disk is full, or /dev/shm, which --workers 0 does without"
    return None


def fail(line):
    """Ends the program. Under torchrun the first process speaks for all; torchrun's report has the others."""
    sys.stdout.flush()
    if is_first():
        print(f"error: {line}", file=sys.stderr, flush=True)
    if dist.is_initialized() or active_children():
        os._exit(2)  # without waiting for the other processes
    sys.exit(2)


# ------------------------------------------------------------------------------------------------- processes


class Process(NamedTuple):
    """This process among all that share the work."""

    rank: int  # its number, from 0
    world: int  # how many there are
    device: torch.device


def start_processes():
    """-> Process. Works under torchrun and alone; on CUDA, MPS and the CPU."""
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape of attention
    if "RANK" not in os.environ:
        return Process(0, 1, torch.device(device))
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    return Process(dist.get_rank(), dist.get_world_size(), torch.device(device))


def is_first():
    """Whether this is the only process or, under torchrun, the first, which speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def say(line):
    """Prints a line once, however many processes there are."""
    if is_first():
        print(line, flush=True)


def loader_options(workers):
    """How our DataLoaders read photos: in `workers` processes or, with 0, in this one."""
    # after so many seconds without an answer a worker counts as stuck
    return {"num_workers": workers, "worker_init_fn": leave_signals, "timeout": 300 if workers else 0}


def leave_signals(_):
    """In a DataLoader's worker: Ctrl-C and SIGTERM often go to all processes; the main one ends us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


# ------------------------------------------------------------------------------------------------------ files


def read_json(path, kind=object):
    """Reads a JSON file whose outermost value is a `kind`, e.g. dict. InputError if it cannot be read."""
    with reading(path):
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))  # some put a mark before it
        if not isinstance(content, kind):
            raise InputError(f"{path}: holds a {type(content).__name__}, not a {kind.__name__}")
        return content


def make_folder(path):
    """Makes a folder and those above it. InputError if that cannot be done."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{path}: cannot be made ({e})") from e


def write_json(path, contents):
    """Writes a JSON file whole or not at all, and the folders above it. InputError if that cannot be done."""
    write_whole(path, json.dumps(contents, indent=1).encode())


def write_whole(path, contents):
    """Writes bytes to a file whole or not at all, as write_json()."""
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    make_folder(path.parent)
    try:
        part.write_bytes(contents)
        os.replace(part, path)
    except OSError as e:
        if part.exists():
            part.unlink()
        raise InputError(f"{path}: cannot be written ({e})") from e
