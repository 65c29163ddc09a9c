"""Around the training loop: its arguments, its folder, its end by a signal, what is measured on the way.

    runs/split1/ckpt.pt      arguments, descriptions, all that trains, the optimizer's state
    runs/split1/best.pt      likewise, when --validate measured the best PCK@0.2
    runs/split1/log.jsonl    a line for each optimizer step
    runs/split1/curve.png
"""

import json
import math
import os
import random
import signal
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from common import InputError, is_first, make_folder, say
from data import annotation_file, read_instances
from decode import locate
from evaluate import THRESHOLDS, Photos, ask, pck_of_queries
from lora import trainable_state
from model import read_checkpoint
from paper import choose_locate
from tools.check import keep_readable
from tools.curve import draw_curve

# arguments that change nothing of what is learned
WITHOUT_EFFECT = {"out", "fresh", "check", "checkpoint_activations", "workers", "save_every", "validate"}


def complete(parser, argv):
    """train.py's arguments, those filled in that follow from others."""
    args = parser.parse_args(argv)
    start = args.init or args.init_projection
    if args.init:
        trained = read_checkpoint(args.init)["args"]
        parser.set_defaults(**{key: trained[key] for key in ("llm", "vit", "image_size")})
        args = parser.parse_args(argv)  # again, so that flags still win
    if args.pretrain:
        if args.validate or args.answer == "token":
            parser.error("--pretrain locates nothing: leave out --validate and --answer")
        args.tune_vit = args.tune_llm = "frozen"
    for name, most in ("lr", math.inf), ("warmup", 1), ("weight_decay", math.inf), ("clip", math.inf):
        if not 0 <= getattr(args, name) <= most or math.isinf(getattr(args, name)):
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give a number from 0 to {most}")
    own = Path(args.data, "descriptions.json")
    args.descriptions = args.descriptions or str(own if own.exists() else "descriptions.json")
    data, mp100 = map(os.path.abspath, (args.data, parser.get_default("data")))
    split = f"split{args.split}"
    name = split if data == mp100 else os.path.basename(data) + f"-{split}" * (args.split > 1)
    args.out = args.out or f"runs/{f'pretrain-{args.pretrain}' if args.pretrain else name}"
    starts = args.fresh or not Path(args.out, "ckpt.pt").exists()
    if starts and start and Path(start).absolute().parent == Path(args.out).absolute():
        parser.error(f"this would delete {start}, which the run starts from; choose another --out")
    if args.init and args.init_projection:
        parser.error("give --init or --init-projection, not both")
    if args.seed >= 2**32:
        parser.error(f"--seed {args.seed}: give a number below 2**32")
    return args


def find_run(args, descriptions, n_steps):
    """-> the checkpoint that the run resumes from, None to start. InputError if it is of another run."""
    path = Path(args.out, "ckpt.pt")
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # by torchrun, with the same --fresh
    if not path.exists() or args.fresh and not restarted:
        return None
    checkpoint = read_checkpoint(path)
    old = checkpoint["args"]
    changed = [f"--{key.replace('_', '-')} {old[key]}, not {value}" for key, value in vars(args).items()
               if key not in WITHOUT_EFFECT and old.get(key, value) != value]
    changed += ["other descriptions"] if checkpoint["descriptions"] != descriptions else []
    if not changed and (old_steps := checkpoint.get("n_steps", n_steps)) != n_steps:
        changed = [f"{old_steps} steps, not {n_steps}, on other data"]
    if changed and args.fresh:
        raise InputError(f"{path}: the first attempt with --fresh failed before it began; give the command "
                         "again")
    if changed:
        raise InputError(f"{path} is of a run with {'; '.join(changed)}. Start anew with --fresh or "
                         "another --out")
    return checkpoint


def begin(folder):
    """Makes the folder of a run that starts, and deletes what another run has left there."""
    make_folder(folder)
    for name in "best.pt", "ckpt.pt", "log.jsonl":
        Path(folder, name).unlink(missing_ok=True)


def start_from(model, path, projection_alone):
    """Takes from another run's checkpoint all weights that train here too in the same shape."""
    weights, own = read_checkpoint(path)["model"], trainable_state(model)
    taken = {name: weight for name, weight in weights.items()
             if name in own and own[name].shape == weight.shape
             and (name.startswith("projection.") or not projection_alone)}
    if "projection.weight" not in taken:
        raise InputError(f"{path}: its projection is of networks of other widths than --vit and --llm")
    model.load_state_dict(taken, strict=False)
    say(f"{path}: {len(taken)} of {len(own)} trained tensors start from there")


def record(args, line, names, model, optimizer, descriptions, best, n_steps):
    """Adds a step's line to log.jsonl, and writes checkpoints of these names."""
    with open(Path(args.out, "log.jsonl"), "a") as log:
        log.write(json.dumps(line) + "\n")
    for name in names:
        save(Path(args.out, name), args=vars(args), model=trainable_state(model),
             optimizer=optimizer.state_dict(), step=line["step"], n_steps=n_steps, best=best,
             descriptions=descriptions)
    if names:
        draw_curve(args.out)


def save(path, **contents):
    """Writes a new checkpoint beside the old one and then renames it, so that a whole one is there always."""
    part = path.with_suffix(".part")
    try:
        torch.save(contents, part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())  # on the disk before it takes the old one's name
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # torch's writer says RuntimeError for a full disk
        part.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({e}); free some space; the same command resumes") from e


@contextmanager
def catch_signals():
    """A list to which Ctrl-C or SIGTERM adds its number. The same signal again ends the program."""
    before, caught = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}, []

    def note(number, _):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as of a job in the background
            signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Validation:
    """What train.py --validate measures: PCK@0.2 of the same 100 objects of the validation set."""

    def __init__(self, args, chat, categories, process):
        instances = read_instances(annotation_file(args.data, args.split, "val"), categories)
        folder = Path(args.data, "images")
        instances = random.Random(0).sample(instances, min(100, len(instances)))
        self.instances = keep_readable(instances, folder, categories, args.allow_missing)
        questions = {c: chat.encode_questions(categories[c]) for c in {o.category_id for o in instances}}
        self.ask = partial(ask, chat=chat, photos=Photos(self.instances, folder, args.image_size), batch=16,
                           questions=questions, process=process, workers=args.workers,
                           locate=choose_locate(args, locate))

    def measure(self, model):
        """-> PCK@0.2, in every process."""
        points, _ = self.ask(model.eval())
        model.train()
        score = pck_of_queries(self.instances, points)[:, THRESHOLDS.index(0.2)].mean().item()
        if is_first():
            tqdm.write(f"PCK@0.2 {100 * score:.2f} on {len(points)} objects of the validation set")
        return score
