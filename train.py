"""Fine-tunes CapeLLM on MP-100 (paper, sections 3.3 and 4.2), or on other data in its layout (tools/own.py).

    torchrun --nproc_per_node 4 train.py --split 1      4 GPUs
    python train.py --split 1                           one GPU or a CPU: the same, more slowly
    python train.py --split 1 --check                   looks whether all is there, and trains nothing

The defaults are the paper's. The same command again resumes: after Ctrl-C or SIGTERM where it stopped, after
a crash at the last checkpoint.

An optimizer step takes --batch conversations, cut into micro-batches that the processes share out and
accumulate. Everything random is drawn from (seed, epoch, example) or from (seed, number of the micro-batch),
so a restart or the number of workers changes nothing, and the number of processes only the rounding. How a
run is saved, found again and stopped is in tools/run.py.
"""

import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from common import InputError, Parser, loader_options, natural, positive, read_json, run, say, start_processes
from model import DTYPES, load_network, load_weights

# -------------------------------------------------------------------------------------------------- settings


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
    add("--rounds", type=lambda text: text if text == "dynamic" else positive(text), default=4, metavar="N",
        help="questions, each with its answer, in a conversation; or dynamic: Table 4")
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
    add("--out", metavar="DIR", help="of the run, by default runs/splitN or runs/ and --data's name")
    add("--fresh", action="store_true", help="start anew where there is a run, which is overwritten")
    add("--init", metavar="CKPT", help="start from a checkpoint, and with its --llm, --vit and --image-size")
    add("--init-projection", metavar="CKPT", help="start from the projection alone of a checkpoint: Table 9")
    add = parser.add_argument_group("running").add_argument
    add("--check", action="store_true", help="look whether data, weights and disk will do, and end")
    add("--pack", action="store_true", help="all conversations about an object share its photo's keys and "
        "values: faster, but --batch then counts objects, whose keypoints are all in one step and crop")
    add("--checkpoint-activations", action="store_true", help="far less memory for half as much work again")
    add("--dtype", choices=DTYPES, help="of frozen weights and computing; by default bf16 on CUDA, else fp32")
    add("--workers", type=natural, default=min(4, os.cpu_count()), metavar="N", help="processes for photos")
    add("--save-every", type=positive, default=100, metavar="N", help="steps between checkpoints")
    add("--validate", type=natural, default=0, metavar="N", help="steps between PCK@0.2; 0: none")
    return parser


def parse_arguments(argv):
    from tools.run import complete
    return complete(make_parser(), argv)


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


def learning_rate(step, total, args):
    """Linear warm-up, 0 for the first step, then a cosine down to 0: as Hugging Face's trainer."""
    warmup = math.ceil(args.warmup * total)
    if step < warmup:
        return args.lr * step / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


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
    """Makes dropout depend on the seed and the micro-batch's number, over the run and all processes."""
    # spread over two ranges of bits, since a CPU's generator looks at only 32 bits of a seed
    torch.manual_seed(seed + (number << 20) + (number >> 12))


# ------------------------------------------------------------------------------------------------------ loop


def load_batches(instances, categories, chat, args, steps, process):
    """Yields this process's micro-batches of `steps`, a range of the run's, with the epoch of each."""
    make_groups = data.group_keypoints
    if args.rounds == "dynamic":
        from paper.iccv import group_dynamically as make_groups
    epoch_steps = steps.stop // args.epochs
    for epoch in range(steps.start // epoch_steps, args.epochs):
        examples = data.plan_epoch(instances, args.seed, epoch, args.rounds, args.pack, make_groups)
        if not examples:
            raise InputError(f"{args.data}: no visible keypoint to train on")
        of_epoch = range(max(0, steps.start - epoch * epoch_steps), epoch_steps)
        loader = DataLoader(
            data.TrainingSet(examples, categories, chat, Path(args.data, "images"), args.image_size),
            batch_sampler=list(micro_batches(len(examples), of_epoch, args, process.rank, process.world)),
            collate_fn=data.collate, pin_memory=process.device.type == "cuda", **loader_options(args.workers))
        yield from ((epoch, batch) for batch in loader)


def add_gradients(model, learner, batches, step, args, process):
    """Adds up this process's gradients of a step (learner: model, or its DDP) -> epoch, loss, tokens."""
    rank, world, device = process
    loss, n_tokens = torch.zeros((), device=device), 0
    accumulation = args.batch // (args.micro_batch * world)  # no remainder: tools.check saw to that
    for i in range(accumulation):
        epoch, (images, tokens, labels, photo_of) = next(batches)
        images, tokens, photo_of = (
            None if t is None else t.to(device, non_blocking=True) for t in (images, tokens, photo_of))
        seed_dropout(args.seed, (step * accumulation + i) * world + rank)
        is_last = i == accumulation - 1  # only then the processes exchange gradients
        with nullcontext() if is_last or world == 1 else learner.no_sync():
            micro_loss = learner(data.normalize(images), tokens, labels, photo_of) / accumulation
            micro_loss.backward()
        loss += micro_loss.detach()
        n_tokens += tokens.numel() + len(images) * model.vit.n_patches  # padding, too
    return epoch, loss, n_tokens


def fit(args, process, model, optimizer, batches, steps, descriptions, validation=None, best=-1):
    """The training loop over `steps`, a range -> how many steps are done, and the signal that ended it or 0.

    descriptions: the file's contents, which a checkpoint holds beside the arguments and all that trains.
    validation: what measures PCK@0.2, if --validate. best: the best PCK@0.2 so far.
    """
    from tools.run import catch_signals, record
    rank, world, device = process
    # all processes have loaded and drawn the same weights
    learner = model if world == 1 else DistributedDataParallel(model, init_sync=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    with (catch_signals() as caught,  # a list: Ctrl-C or SIGTERM ends the training after the step
          tqdm(total=steps.stop, initial=steps.start, disable=rank > 0, dynamic_ncols=True) as bar):
        for step in steps:
            began, done = time.perf_counter(), step + 1
            epoch, loss, n_tokens = add_gradients(model, learner, batches, step, args, process)
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip or math.inf).item()
            # all processes agree on the mean loss, and on whether to stop
            sums = torch.stack([loss / world, torch.tensor(float(len(caught)), device=device)])
            if world > 1:
                dist.all_reduce(sums)
            loss, n_signals = sums.tolist()
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
            if args.validate and (is_last or done % args.validate == 0 and not n_signals):
                line["PCK@0.2"] = validation.measure(model)
                best, is_best = max(best, line["PCK@0.2"]), line["PCK@0.2"] > best
            if rank == 0:
                is_due = done % args.save_every == 0 or is_last or n_signals
                names = [name for name, wanted in (("best.pt", is_best), ("ckpt.pt", is_due)) if wanted]
                record(args, line, names, model, optimizer, descriptions, best, steps.stop)
            if n_signals and not is_last:
                return done, caught[0] if caught else signal.SIGTERM
    return steps.stop, 0


# --------------------------------------------------------------------------------------------------- program


def load(args, device, checkpoint):
    """-> the network, its Chat and the optimizer: as the checkpoint left them, or fresh."""
    from tools.run import start_from
    model, chat = load_network(args, device, args.dtype)
    optimizer = make_optimizer(model, args, device)
    if checkpoint:
        load_weights(model, checkpoint, args.out)
        optimizer.load_state_dict(checkpoint["optimizer"])
    elif args.init or args.init_projection:
        start_from(model, args.init or args.init_projection, projection_alone=not args.init)
    model.llama.checkpoint_activations = args.checkpoint_activations
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    say(f"{sum(n for n, trains in sizes if trains):,} of {sum(n for n, _ in sizes):,} parameters train")
    return model, chat, optimizer


def main(argv):
    from tools.check import check_all, check_briefly, keep_readable
    from tools.run import Validation, begin, find_run
    args = parse_arguments(argv)
    if args.check:
        return check_all(args)
    process = start_processes()
    check_briefly(args, process)
    descriptions = read_json(args.descriptions)
    categories = data.parse_descriptions(descriptions, args.descriptions)
    instances = data.read_instances(data.annotation_file(args.data, args.split, "train"), categories)
    instances = keep_readable(instances, Path(args.data, "images"), categories, args.allow_missing)
    rounds = 4 if args.rounds == "dynamic" else args.rounds  # dynamic groups are counted as fours
    n_examples = sum(1 if args.pack else math.ceil(len(o.keypoints) / rounds) for o in instances)
    n_steps = args.epochs * math.ceil(n_examples / args.batch)
    checkpoint = find_run(args, descriptions, n_steps)
    steps = range(checkpoint["step"] if checkpoint else 0, n_steps)
    if not steps:
        return say(f"finished already, after {steps.start} steps: {args.out}/ckpt.pt; --fresh starts anew")
    accumulation = args.batch // (args.micro_batch * process.world)
    say(f"{len(instances)} objects of {len({o.category_id for o in instances})} categories")
    say(f"steps {steps.start} to {steps.stop} in {args.epochs} epochs; batch {args.batch} = micro-batch "
        f"{args.micro_batch} x {process.world} processes x {accumulation} accumulated, on {process.device}")

    model, chat, optimizer = load(args, process.device, checkpoint)
    best = checkpoint.get("best", -1) if checkpoint else -1
    validation = Validation(args, chat, categories, process) if args.validate else None
    if process.rank == 0 and not checkpoint:
        begin(args.out)
    del checkpoint  # of a full fine-tuning it is several GB
    batches = load_batches(instances, categories, chat, args, steps, process)
    done, signum = fit(args, process, model, optimizer, batches, steps, descriptions, validation, best)
    if signum:
        say(f"stopped after step {done} of {steps.stop}; the same command resumes")
        if process.world > 1:
            dist.barrier()  # until the first process has saved: torchrun ends all where one has ended
        sys.exit(128 + signum)
    say(f"done: {args.out}/ckpt.pt")


if __name__ == "__main__":
    run(main)
