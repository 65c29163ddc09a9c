"""What every program needs: errors that a user can fix, types of arguments, processes, JSON.

Nothing here comes from the paper, so a reader may skip this file.
"""

import argparse
import errno
import json
import math
import multiprocessing
import os
import re
import reprlib
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.queues import Queue
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

PATIENCE = timedelta(minutes=10)  # with another process, before it counts as lost
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited",
        "recvBytes", "sendBytes", "failed to recv")  # how gloo and NCCL say so
PATIENCE_WITH_PHOTOS = 300  # seconds that a worker may take to read a micro-batch


class InputError(Exception):
    """Something the user can fix. The message is one line that says what, where and what to do."""

    def __str__(self):
        # An error in a DataLoader's worker arrives with the worker's traceback before the message.
        return printable(super().__str__().rpartition("InputError: ")[2].strip())


def printable(text):
    """Somebody else's words as they may be printed: on one line, and without power over the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@contextmanager
def reading(path):
    """Whatever goes wrong inside is one line about the file. What is wrong with somebody's file has no end."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:
        first = str(e).strip().partition("\n")[0]
        raise InputError(f"{path}: cannot be read ({type(e).__name__}: {first})") from e


# -------------------------------------------------------------------------------------------------- programs


def run(main):
    """Runs a program. What the user can fix is one line on stderr; defects crash with their traceback."""
    if "RANK" in os.environ:  # torchrun: the usage, printed by every process, would bury the error
        argparse.ArgumentParser.error = raise_input_error
    try:
        main(sys.argv[1:])
        sys.stdout.flush()  # here, where a broken pipe is caught
    except InputError as e:
        end_with(str(e))
    except KeyboardInterrupt:
        if is_first():
            print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # what read our output has ended, as in "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as for other programs
    except Exception as e:
        if (line := explain(e)) is None:
            end_workers()
            raise
        end_with(line)
    if dist.is_initialized():
        dist.destroy_process_group()
        # DistributedDataParallel leaves threads of the group behind. On a busy machine one may still be at
        # work. Python would abort the process when it ends, and torchrun would call the run failed.
        os._exit(0)


def raise_input_error(parser, message):
    raise InputError(message)


def explain(error):
    """An error of torch's own that is no defect of the program -> one line, else None."""
    if not isinstance(error, (RuntimeError, OSError, EOFError)):
        return None
    text = str(error)
    first = text.strip().partition("\n")[0]
    if isinstance(error, torch.OutOfMemoryError):
        return f"{first.split('. ')[0]}; less is needed with a smaller --micro-batch, in evaluation --batch"
    # The first two are of a worker that was killed or is silent, the others are of a full /dev/shm.
    if (isinstance(error, (EOFError, ConnectionError)) or text.startswith("DataLoader ")
            or "shared memory" in text or "/torch_" in text):
        return (f"a process that reads photos was lost ({first or type(error).__name__}): killed, for want "
                "of memory or of space in /dev/shm? --workers 0 does without such processes")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{first}: a disk is full, or /dev/shm, which --workers 0 does without"
    if any(words in text for words in ("Timed out", "timed out", "Timeout", "timeout")):
        return f"another process has not answered for {PATIENCE} (hours:minutes:seconds): {first}"
    if any(words in text for words in LOST):
        return f"lost the connection to another process: {first}"
    return None


def end_with(line):
    """Prints one line of error and ends the process with exit code 2.

    Under torchrun one process often fails because of another, or all fail alike. The first process speaks at
    once; the others wait before they do, and torchrun ends them meanwhile. Its report repeats the line.
    """
    if "--workers 0" in line:
        end_workers()
    sys.stdout.flush()
    if not is_first() or line.startswith("lost "):
        time.sleep(10)
    print(f"error: {line}", file=sys.stderr, flush=True)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        message = {"message": f"error: {line}", "extraInfo": {"timestamp": int(time.time())}}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": message}))
    if dist.is_initialized():  # without waiting for the other processes
        os._exit(2)
    sys.exit(2)


def end_workers():
    """Ends those that read photos. They may hang, and would hold up the end of a program that failed."""
    if workers := multiprocessing.active_children():
        reports = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report them, too,
        sys.unraisablehook = lambda *_: None  # and its own half-made iterator
        for worker in workers:
            worker.kill()
            worker.join()
        signal.signal(signal.SIGCHLD, reports or signal.SIG_DFL)


class Stop:
    """`with Stop() as stop` catches the first Ctrl-C or SIGTERM: stop.signal is 0, and then its number.

    The second one acts at once. A job in the background, for which Ctrl-C is ignored, goes on ignoring it.
    """

    def __enter__(self):
        self.signal, self.before = 0, {}
        is_main = threading.current_thread() is threading.main_thread()  # only it gets signals
        for number in (signal.SIGINT, signal.SIGTERM) if is_main else ():
            if (handler := signal.getsignal(number)) != signal.SIG_IGN:
                self.before[number] = handler or signal.SIG_DFL
                signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        self.signal = number
        signal.signal(number, self.before[number])

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def stop_with(number):
    """Ends a program that has done what a caught signal asks for, as the signal would have."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


# -------------------------------------------------------------------------------------------------- arguments


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """--help with the defaults, but for None, False and 0. A value without a metavar is a number, N."""

    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default else action.help

    def _get_default_metavar_for_optional(self, action):
        return "N"


def positive(text, most=10**6):
    """The type of an argument that is a whole number above 0, up to `most`."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return natural(text, most)


def natural(text, most=10**6):
    """The type of an argument that is a whole number, 0 or more, up to `most`."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number, 0 or more")
    if int(text) > most:
        raise argparse.ArgumentTypeError(f"{text} is more than {most:,}")
    return int(text)


def between(low, high):
    """The type of an argument that is a number from low to high, which infinity and NaN are not."""
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low:g} to {high:g}")
        return value
    return parse


# -------------------------------------------------------------------------------------------------- processes


def is_first():
    """Whether this is the only process or, under torchrun, the first, which speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def say(line):
    """Prints a line once, however many processes there are."""
    if is_first():
        print(line)


class Process(NamedTuple):
    """This process among all that share the work."""

    rank: int  # its number, from 0
    world: int  # how many there are
    device: torch.device


def start_processes():
    """-> Process. Works under torchrun and alone; on CUDA, MPS and the CPU."""
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if "RANK" not in os.environ:
        return Process(0, 1, torch.device(device))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE, **find_meeting_place())
    return Process(dist.get_rank(), dist.get_world_size(), torch.device(device))


def find_meeting_place():
    """Options of init_process_group() for processes that torchrun has started again, else none.

    They would find each other's addresses where torchrun keeps them, but also those of the processes before,
    and would now and then wait for these. On several machines, whose counts of restarts may differ, the
    environment variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 does the same.
    """
    env = os.environ
    count = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    if count == "0" or env.get("LOCAL_WORLD_SIZE") != env["WORLD_SIZE"]:
        return {}
    rank, world, port = (int(env[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    store = dist.TCPStore(env["MASTER_ADDR"], port, world, is_master=False, timeout=PATIENCE)
    return {"store": dist.PrefixStore(f"restart {count}", store), "rank": rank, "world_size": world}


def loader_options(workers):
    """How our DataLoaders read photos, in `workers` processes or, with 0, in this one."""
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more processes than there are cores
    return {"num_workers": workers, "worker_init_fn": silence_worker,
            "timeout": PATIENCE_WITH_PHOTOS if workers else 0}


def silence_worker(_):
    """The worker_init_fn of our DataLoaders.

    A worker leaves Ctrl-C and SIGTERM, which often go to all processes, to the main process, so that this can
    finish its step; it ends when the main process tells it to or has ended, and in any case a minute after a
    SIGTERM. It prints no traceback of a broken connection. If what it has read cannot be sent, for example
    since /dev/shm is full, it ends, for otherwise the main process would wait. Errors in reading photos still
    reach the main process: they do not pass through sys.excepthook.
    """
    sys.excepthook = lambda *_: None
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
        Queue._on_queue_feeder_error = staticmethod(lambda error, item: os._exit(1))


# ------------------------------------------------------------------------------------------------------ JSON


def read_json(path, kind=object):
    """Reads a JSON file whose outermost value is a `kind`, e.g. dict. InputError if it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors put a mark before UTF-8
        content = json.loads(text, object_pairs_hook=without_duplicates)
        if not isinstance(content, kind):
            raise ValueError(f"it holds a {type(content).__name__}, not a {kind.__name__}")
        return content
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read as JSON ({e})") from None


def read_json_lines(path):
    """A file with a JSON value in each line -> the values. A line that a kill cut off is left out."""
    values = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values.append(json.loads(line))
        except ValueError:
            pass
    return values


def without_duplicates(pairs):
    """An object's keys and values -> dict. Of two equal keys, json itself would silently keep the last."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        (key, count), = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{key!r} is there {count} times")
    return entries


KINDS = {int: "a whole number from {}", float: "a number from {}", str: "a text of {} characters",
         list: "a list of {}", dict: "an object with {} entries", bool: "true or false"}


def check(value, where, kind, low=1, high=10**6):
    """-> value, if it is of the kind and within the bounds; else an InputError that begins with `where`.

    kind: one of KINDS. float takes whole numbers too, and only bool takes true and false. low, high: of a
    text, a list or an object they bound the length. A text must be fit for UTF-8: JSON can hold half
    characters (lone surrogates), which nothing can print or encode.
    """
    is_fine = isinstance(value, (int, float) if kind is float else kind)
    if is_fine and kind is not bool:
        size = value if kind in (int, float) else len(value)
        is_fine = low <= size <= high and not isinstance(value, bool)
    if not is_fine or kind is str and re.search("[\ud800-\udfff]", value):
        bounds = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        raise InputError(f"{where} is {reprlib.repr(value)}, not {KINDS[kind].format(bounds)}")
    return value


def get_field(record, key, path, kind, low=1, high=10**6, of=""):
    """-> record[key], checked. path and of say where it stands, e.g. "a.json" and " of annotation 5"."""
    if not isinstance(record, dict) or key not in record:
        raise InputError(f"{path}: entry {key!r} is missing{of and f', that{of}'}")
    return check(record[key], f"{path}: {key}{of}", kind, low, high)


def make_folder(path):
    """Makes a folder and those above it. InputError if that cannot be done."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{path}: cannot be made ({e})") from None


def write_json(path, contents):
    """Writes a JSON file whole or not at all, and the folders above it. InputError if that cannot be done."""
    write_whole(path, json.dumps(contents, indent=1).encode())


def write_whole(path, contents):
    """Writes bytes to a file whole or not at all, as write_json()."""
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(contents)
        os.replace(part, path)
    except OSError as e:
        if part.is_file():
            part.unlink()
        raise InputError(f"{path}: cannot be written ({e})") from None
