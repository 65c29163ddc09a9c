"""Fine-tunes CapeLLM on MP-100 (paper, sections 3.3 and 4.2), or on other data in its layout (tools/own.py).

    torchrun --nproc_per_node 4 train.py --split 1      4 GPUs
    python train.py --split 1                           one GPU or a CPU: the same, more slowly
    python train.py --split 1 --check                   looks whether all is there, and trains nothing

The defaults are the paper's. The same command again resumes: after Ctrl-C or SIGTERM where it stopped, after
a crash at the last checkpoint.

An optimizer step takes --batch conversations, cut into micro-batches that the processes share out and
accumulate. Everything random is drawn from (seed, epoch, example) or from (seed, number of the micro-batch),
so a restart or the number of workers changes nothing, and the number of processes only the rounding.
"""

import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import InputError, Parser, loader_options, natural, positive, read_json, run, say, start_processes
from data import (
    TrainingSet,
    annotation_file,
    collate,
    group_keypoints,
    normalize,
    parse_descriptions,
    plan_epoch,
    read_instances,
)
from lora import trainable_state
from model import DTYPES, load_network, load_weights, read_checkpoint

# -------------------------------------------------------------------------------------------------- settings


def number_of_rounds(text):
    """The type of --rounds."""
    return text if text == "dynamic" else positive(text)


def make_parser():
    parser = Parser(description="Fine-tunes CapeLLM. The defaults are the paper's.")
    add = parser.add_argument_group("recipe").add_argument
    add("--epochs", type=positive, default=12, metavar="N", help="passes over the data")
    add("--batch", type=positive, default=128, metavar="N", help="conversations in an optimizer step")
    add("--micro-batch", type=positive, default=1, metavar="N", help="in a forward pass")
    add("--lr", type=float, default=5e-4, metavar="X", help="highest learning rate of AdamW")
    add("--warmup", type=float, default=0.03, metavar="X", help="share of steps in which it rises")
    add("--weight-decay", type=float, default=0.01, metavar="X", help="AdamW's weight decay")
    add("--clip", type=float, default=1.0, metavar="X", help="largest norm of the gradient; 0 is any")
    add("--rounds", type=number_of_rounds, default=4, metavar="N",
        help="keypoints asked in a conversation (Table 4), or dynamic")
    add("--seed", type=natural, default=42, metavar="N", help="of all that is random")
    add = parser.add_argument_group("network").add_argument
    add("--llm", default="weights/Llama-3.1-8B", metavar="DIR", help="the folder of its files")
    add("--vit", default="weights/dinov2-large", metavar="DIR", help="the same of the ViT")
    add("--image-size", type=positive, default=224, metavar="N", help="pixels a side of a crop")
    add("--tune-vit", choices=["frozen", "lora", "full"], default="lora", help="what trains of it: Table 4")
    add("--tune-llm", choices=["frozen", "lora", "full"], default="lora", help="what of the LLM trains")
    add("--instruction", default="description", metavar="NAME", help="Tables 3, 6, 7")
    add("--answer", choices=["text", "token"], default="text", help="Table 8: text, or read off <KEYPOINT>")
    add("--pretrain", choices=["direct", "step"], help="Table 9: train the projection alone")
    add = parser.add_argument_group("data and results").add_argument
    add("--data", default="data/mp100", metavar="DIR", help="MP-100, or what tools/own.py made")
    add("--split", type=positive, default=1, metavar="N", help="of MP-100, 1 to 5")
    add("--descriptions", metavar="JSON", help="default: descriptions.json, that in --data if there is one")
    add("--allow-missing", action="store_true", help="go on without objects whose photo is missing")
    add("--out", metavar="DIR", help="folder of the run, by default runs/splitN or runs/ and --data's name")
    add("--fresh", action="store_true", help="start anew where there is a run, which is overwritten")
    add("--init", metavar="CKPT", help="start from a checkpoint, and with its --llm, --vit and --image-size")
    add("--init-projection", metavar="CKPT", help="likewise, but from its projection alone: Table 9")
    add = parser.add_argument_group("running").add_argument
    add("--check", action="store_true", help="look whether data, weights and disk will do, and end")
    add("--pack", action="store_true", help="all conversations of a photo behind one copy of it: faster, "
        "but --batch then counts photos, and all keypoints of a photo are in one step and crop")
    add("--checkpoint-activations", action="store_true", help="far less memory for half as much work again")
    add("--compile", action="store_true", help="torch.compile every block")
    add("--dtype", choices=DTYPES, help="of frozen weights and computing; by default bf16 on CUDA, else fp32")
    add("--workers", type=natural, default=min(4, os.cpu_count()), metavar="N", help="processes for photos")
    add("--save-every", type=positive, default=100, metavar="N", help="steps between checkpoints")
    add("--validate", type=natural, default=0, metavar="N", help="steps between measurements of "
        "PCK@0.2 on 100 objects of the validation set, the best in best.pt; 0 is never")
    return parser


# arguments that change nothing of what is learned
WITHOUT_EFFECT = {"out", "fresh", "check", "checkpoint_activations", "compile", "workers", "save_every",
                  "validate"}


def parse_arguments(argv):
    parser = make_parser()
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
    own = Path(args.data, "descriptions.json")
    args.descriptions = args.descriptions or str(own if own.exists() else "descriptions.json")
    name = f"split{args.split}" if args.data == parser.get_default("data") else Path(args.data).name
    args.out = args.out or f"runs/{f'pretrain-{args.pretrain}' if args.pretrain else name}"
    if args.fresh and start and Path(start).absolute().parent == Path(args.out).absolute():
        parser.error(f"--fresh would delete {start}, which the run starts from; choose another --out")
    return args


def find_run(args, descriptions):
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
    if changed:
        raise InputError(f"{path} is of a run with {'; '.join(changed)}. Start anew with --fresh or "
                         "another --out")
    return checkpoint


# -------------------------------------------------------------------------------------------------- schedule


def make_optimizer(model, args, device):
    """AdamW without weight decay on biases and norms, as in Hugging Face's trainer, which the authors use."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (others if name.endswith("bias") or "norm" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=args.lr, fused=device.type == "cuda")


def learning_rate(step, steps, args):
    """Linear warm-up, 0 for the first step, then a cosine down to 0: as Hugging Face's trainer."""
    warmup = math.ceil(args.warmup * steps)
    if step < warmup:
        return args.lr * step / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def micro_batches(n, steps, args, rank, world):
    """Cuts an epoch's `steps` (a range) into micro-batches and yields this process's: lists of indices < n.

    Every epoch has the same number of steps, counted before examples without a visible keypoint are dropped.
    Where an epoch runs out of examples it starts over. With 6 examples, --batch 4, --micro-batch 1 and 2
    processes:

        step 0   0 1 2 3   rank 0: [0] [2]   rank 1: [1] [3]
        step 1   4 5 0 1   rank 0: [4] [0]   rank 1: [5] [1]
    """
    for step in steps:
        batch = [i % n for i in range(step * args.batch, (step + 1) * args.batch)]
        parts = [batch[i:i + args.micro_batch] for i in range(0, args.batch, args.micro_batch)]
        yield from parts[rank::world]


def seed_dropout(seed, number):
    """Makes dropout depend on the seed and the micro-batch's number, counted over the run and all processes.

    The number is spread over two ranges of bits, since a CPU's generator looks at only 32 bits of a seed.
    """
    torch.manual_seed(seed + (number << 20) + (number >> 12))


# ------------------------------------------------------------------------------------------------------ loop


def load_batches(instances, categories, chat, args, steps, process):
    """Yields this process's micro-batches of `steps`, a range of the run's, with the epoch of each."""
    group = group_keypoints
    if args.rounds == "dynamic":
        from paper.iccv import group_dynamically as group
    epoch_steps = steps.stop // args.epochs
    for epoch in range(steps.start // epoch_steps, args.epochs):
        examples = plan_epoch(instances, args.seed, epoch, args.rounds, args.pack, group)
        if not examples:
            raise InputError(f"{args.data}: no visible keypoint to train on")
        of_epoch = range(max(0, steps.start - epoch * epoch_steps), epoch_steps)
        loader = DataLoader(
            TrainingSet(examples, categories, chat, Path(args.data, "images"), args.image_size),
            batch_sampler=list(micro_batches(len(examples), of_epoch, args, process.rank, process.world)),
            collate_fn=collate, pin_memory=process.device.type == "cuda", **loader_options(args.workers))
        yield from ((epoch, batch) for batch in loader)


def add_gradients(model, learner, batches, step, args, process):
    """Adds up this process's share of a step's gradients -> the epoch, the mean loss, how many tokens."""
    rank, world, device = process
    loss, n_tokens = torch.zeros((), device=device), 0
    accumulation = args.batch // (args.micro_batch * world)
    for i in range(accumulation):
        epoch, (images, tokens, labels, photo_of) = next(batches)
        images, tokens, photo_of = (
            None if t is None else t.to(device, non_blocking=True) for t in (images, tokens, photo_of))
        seed_dropout(args.seed, (step * accumulation + i) * world + rank)
        is_last = i == accumulation - 1  # only then the processes exchange gradients
        with nullcontext() if is_last or world == 1 else learner.no_sync():
            micro_loss = learner(normalize(images), tokens, labels, photo_of) / accumulation
            micro_loss.backward()
        loss += micro_loss.detach()
        n_tokens += tokens.numel() + len(images) * model.vit.n_patches
    return epoch, loss, n_tokens


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


def fit(args, process, model, optimizer, batches, steps, validation, texts, best):
    """The training loop over `steps`, a range -> how many steps are done, and the signal that ended it or 0.

    texts: the descriptions, which a checkpoint holds beside the arguments and all that trains. best: the best
    PCK@0.2 so far.
    """
    rank, world, device = process
    # all processes have loaded and drawn the same weights
    learner = model if world == 1 else DistributedDataParallel(model, init_sync=False)
    parameters, folder = [p for p in model.parameters() if p.requires_grad], Path(args.out)
    log = open(folder / "log.jsonl", "a", buffering=1) if rank == 0 else None
    model.train()
    with (catch_signals() as caught,
          tqdm(total=steps.stop, initial=steps.start, disable=rank > 0, dynamic_ncols=True) as bar):
        for step in steps:
            began, done = time.perf_counter(), step + 1
            epoch, loss, n_tokens = add_gradients(model, learner, batches, step, args, process)
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip or math.inf).item()
            # all processes agree on the mean loss, and on whether to stop
            sums = torch.stack([loss / world, torch.tensor(float(len(caught)), device=device)])
            if world > 1:
                dist.all_reduce(sums)
            loss, is_stopped = sums.tolist()
            if not math.isfinite(loss + norm):
                raise InputError(f"step {done}: loss {loss:g}, |grad| {norm:g}; the last checkpoint was not "
                                 "touched; start again with a lower --lr")
            lr = learning_rate(step, steps.stop, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

            seconds = time.perf_counter() - began
            line = {"step": done, "epoch": epoch + 1, "loss": loss, "lr": lr, "norm": norm,
                    "seconds": seconds, "tokens_per_second": round(n_tokens * world / seconds)}
            if device.type == "cuda":
                line["gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            bar.set_postfix_str(f"loss {loss:.4f}, {line['tokens_per_second']:,} tokens/s")
            bar.update()
            is_last, is_best = done == steps.stop, False
            if args.validate and (is_last or done % args.validate == 0 and not is_stopped):
                score, n = validation.measure(model)
                line["PCK@0.2"] = score
                if rank == 0:
                    bar.write(f"step {done}: PCK@0.2 {100 * score:.2f} on {n} objects of the validation set")
                best, is_best = max(best, score), score > best
            if rank == 0:
                log.write(json.dumps(line) + "\n")
                is_due = done % args.save_every == 0 or is_last or is_stopped
                for name in ["best.pt"] * is_best + ["ckpt.pt"] * bool(is_due):
                    save(folder / name, args=vars(args), descriptions=texts, model=trainable_state(model),
                         optimizer=optimizer.state_dict(), step=done, best=best)
                if is_due:
                    from tools.curve import draw_curve
                    draw_curve(folder)
            if is_stopped and not is_last:
                return done, caught[0] if caught else signal.SIGTERM
    return steps.stop, 0


# --------------------------------------------------------------------------------------------------- program


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


def load(args, device, checkpoint):
    """-> the network, its Chat and the optimizer: as the checkpoint left them, or fresh."""
    model, chat = load_network(args, device, args.dtype)
    optimizer = make_optimizer(model, args, device)
    if checkpoint:
        load_weights(model, checkpoint, args.out)
        optimizer.load_state_dict(checkpoint["optimizer"])
    elif args.init or args.init_projection:
        start_from(model, args.init or args.init_projection, projection_alone=not args.init)
    model.llama.checkpoint_activations = args.checkpoint_activations
    if args.compile:
        for block in [*model.vit.blocks, *model.llama.layers]:
            block.compile(dynamic=True)
    trained, total = (sum(p.numel() for p in model.parameters() if p.requires_grad or is_all)
                      for is_all in (False, True))
    say(f"{trained:,} of {total:,} parameters train")
    return model, chat, optimizer


def main(argv):
    from tools.check import check_all, check_briefly, keep_readable
    args = parse_arguments(argv)
    if args.check:
        return check_all(args)
    process = start_processes()
    accumulation = args.batch / (args.micro_batch * process.world)
    if accumulation % 1:
        raise InputError(f"--batch {args.batch} is not a multiple of --micro-batch {args.micro_batch} "
                         f"x {process.world} processes")
    if process.device.type == "cpu":
        say(f"no GPU seen: CPU, {args.dtype or 'fp32'}")
    check_briefly(args, process)
    texts = read_json(args.descriptions)
    categories = parse_descriptions(texts, args.descriptions)
    instances = read_instances(annotation_file(args.data, args.split, "train"), categories)
    instances = keep_readable(instances, Path(args.data, "images"), categories, args.allow_missing)
    if not instances:
        raise InputError(f"{args.data}: no object to train on")
    checkpoint = find_run(args, texts)
    rounds = 4 if args.rounds == "dynamic" else args.rounds
    n_examples = sum(1 if args.pack else math.ceil(len(o.keypoints) / rounds) for o in instances)
    steps = range(checkpoint["step"] if checkpoint else 0, args.epochs * math.ceil(n_examples / args.batch))
    if not steps:
        return say(f"finished already, after {steps.start} steps: {args.out}/ckpt.pt; --fresh starts anew")
    say(f"{len(instances)} objects of {len({o.category_id for o in instances})} categories")
    say(f"steps {steps.start} to {steps.stop} in {args.epochs} epochs; batch {args.batch} = micro-batch "
        f"{args.micro_batch} x {process.world} processes x {accumulation:g} accumulated, on {process.device}")

    model, chat, optimizer = load(args, process.device, checkpoint)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    best = checkpoint.get("best", -1) if checkpoint else -1
    if checkpoint:
        checkpoint.clear()  # of a full fine-tuning it is several GB
    elif process.rank == 0:
        for name in "best.pt", "ckpt.pt", "log.jsonl":
            Path(args.out, name).unlink(missing_ok=True)
    validation = None
    if args.validate:
        from evaluate import Validation
        validation = Validation(args, chat, categories, process)
    batches = load_batches(instances, categories, chat, args, steps, process)
    done, number = fit(args, process, model, optimizer, batches, steps, validation, texts, best)
    if number:
        say(f"stopped after step {done} of {steps.stop}; the same command resumes")
        if process.world > 1:
            dist.barrier()  # until the first process has saved: torchrun ends all where one has ended
        sys.exit(128 + number)
    say(f"done: {args.out}/ckpt.pt")


if __name__ == "__main__":
    run(main)
