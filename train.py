"""Fine-tunes CapeLLM on MP-100 (paper, sections 3.3 and 4.2) or your own data. The defaults are the paper's.

    torchrun --nproc_per_node 4 train.py --split 1              4 GPUs
    python train.py --split 1                                   one GPU or a CPU: the same, more slowly
    python train.py --resume runs/split1/ckpt.pt                goes on where a run stopped
    python train.py --annotations train.json --images photos    your own data, see coco.py

An optimizer step takes --batch conversations, cut into micro-batches that the processes share out and
accumulate. Everything random is drawn from (seed, epoch, example) or from (seed, number of the micro-batch),
so a restart or the number of workers changes nothing, and the number of processes only the rounding.
"""

import argparse
import math
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from chat import INSTRUCTIONS, PRETRAINING
from checkpoint import (
    MAX_IMAGE_SIZE,
    MAX_SEED,
    load_chat,
    load_model,
    load_optimizer,
    read_checkpoint,
    save_checkpoint,
)
from coco import read_coco, read_texts
from common import (
    InputError,
    between,
    make_folder,
    natural,
    positive,
    read_json,
    run,
    silence_worker,
    start_processes,
)
from data import (
    TrainingSet,
    collate,
    count_groups,
    keep_readable,
    normalize,
    parse_descriptions,
    plan_epoch,
    read_instances,
)
from lora import trainable_state
from model import DTYPES

# of dense bf16 products, from data sheets
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "A6000": 154.8, "4090": 165.2, "3090": 71}


# ------------------------------------------------------------------------------------------------- arguments


def rounds_type(text):
    return text if text == "dynamic" else positive(text)


def build_parser():
    parser = argparse.ArgumentParser(description="Fine-tunes CapeLLM on MP-100.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("files").add_argument
    add("--data", default="data/mp100", help="MP-100: annotations/ and images/")
    add("--split", type=positive, default=1, help="1 to 5")
    add("--annotations", metavar="JSON", help="your own data instead: a COCO keypoints file, see coco.py")
    add("--images", metavar="DIR", help="the photos of --annotations and --val")
    add("--val", metavar="JSON", help="likewise, what evaluate.py asks about")
    add("--descriptions", metavar="JSON", help="names and descriptions of all keypoints; if not given, "
        "descriptions.json, or for --annotations what their names say")
    add("--llm", default="weights/Llama-3.1-8B", help="config.json, tokenizer.json, *.safetensors")
    add("--vit", default="weights/dinov2-large", help="config.json, model.safetensors")
    add("--out", help="folder of the checkpoint; runs/splitN, runs/pretrain-... or runs/ and the name of "
        "--annotations if not given")
    add("--resume", metavar="CKPT", help="a checkpoint to go on from, with its arguments")
    add("--init", metavar="CKPT", help="a checkpoint to start from, with all that trains here too")
    add("--init-projection", metavar="CKPT", help="likewise, with its projection alone: Table 9")
    add("--allow-missing", action="store_true", help="go on without objects whose photo is missing")
    add = parser.add_argument_group("network").add_argument
    add("--image-size", type=partial(positive, most=MAX_IMAGE_SIZE), default=224, help="pixels a side")
    add("--tune-vit", choices=["frozen", "lora", "full"], default="lora", help="Table 4")
    add("--tune-llm", choices=["frozen", "lora", "full"], default="lora")
    add("--answer", choices=["text", "token"], default="text",
        help="Table 8: coordinates as text, or read off <KEYPOINT>")
    add = parser.add_argument_group("recipe").add_argument
    add("--epochs", type=positive, default=12)
    add("--batch", type=positive, default=128, help="conversations in an optimizer step")
    add("--micro-batch", type=positive, default=1,
        help="conversations in a forward pass: memory against speed")
    add("--lr", type=between(0, 1), default=5e-4)
    add("--warmup", type=between(0, 1), default=0.03, help="share of the steps, then cosine to 0")
    add("--weight-decay", type=between(0, 1), default=0.01)
    add("--clip", type=between(0, 1e6), default=0, help="largest norm of the gradient, 0 for none")
    add("--instruction", choices=INSTRUCTIONS, default="description",
        help="how keypoints are asked: Tables 3, 6, 7")
    add("--rounds", type=rounds_type, default=4,
        help='keypoints asked in a conversation (Table 4), or "dynamic": any number')
    add("--pretrain", choices=PRETRAINING,
        help="Table 9: train the projection alone, to name the keypoint at a point")
    add("--seed", type=partial(natural, most=MAX_SEED), default=42)
    add = parser.add_argument_group("running").add_argument
    add("--pack", action="store_true", help="all groups of a photo in one row: half the work, but --batch "
        "then counts photos, and all keypoints of a photo are in the same step and crop")
    add("--checkpoint-activations", action="store_true",
        help="keep hardly any activations, for half as much work again")
    add("--compile", action="store_true", help="torch.compile every block")
    add("--dtype", choices=DTYPES, help="of frozen weights and of computing; bf16 on CUDA and fp32 elsewhere "
        "if not given")
    add("--workers", type=partial(natural, most=1000), default=4, help="processes that read photos, per GPU")
    add("--save-every", type=positive, default=100, help="steps between checkpoints")
    add("--log-every", type=positive, default=1, help="steps between log lines")
    return parser


def as_if_typed(trained, path):
    """-> the arguments of the checkpoint at `path`. InputError if the command line would not take them.

    The run goes on in the folder that the checkpoint lies in.
    """
    parser = build_parser()
    parser.exit_on_error = False
    options = [f"--{key.replace('_', '-')}" + ("" if trained[key] is True else f"={trained[key]}")
               for key in vars(parser.parse_args([]))
               if trained.get(key) is not None and trained[key] is not False]
    try:
        return {**vars(parser.parse_args(options)), "out": str(Path(path).parent)}
    except argparse.ArgumentError as e:
        raise InputError(f"{path}: {e}; no run has such arguments") from None


def parse_arguments(argv):
    parser = build_parser()
    args = parser.parse_args(argv)
    if sum(map(bool, (args.resume, args.init, args.init_projection))) > 1:
        parser.error("--resume goes on from a checkpoint, --init and --init-projection start from one: "
                     "give only one of them")
    if args.resume:  # the run's own arguments, but for what the command line says
        parser.set_defaults(**as_if_typed(read_checkpoint(args.resume)["args"], args.resume))
        args = parser.parse_args(argv)
    if bool(args.annotations) != bool(args.images) or args.val and not args.annotations:
        parser.error("--annotations train.json, --images DIR and, if you like, --val val.json go together")
    if args.annotations and any(getattr(args, x) != parser.get_default(x) for x in ("data", "split")):
        parser.error("--data and --split are MP-100's: leave them out with --annotations")
    if not args.annotations:
        args.descriptions = args.descriptions or "descriptions.json"
    if args.pretrain:
        tunes_more = "full" in (args.tune_vit, args.tune_llm)
        if (args.instruction, args.answer) != ("description", "text") or tunes_more:
            parser.error("--pretrain has its own instruction and trains the projection alone: "
                         "leave out --instruction, --answer, --tune-*")
        args.tune_vit = args.tune_llm = "frozen"
    data = Path(args.annotations).stem if args.annotations else f"split{args.split}"
    args.out = args.out or (f"runs/pretrain-{args.pretrain}" if args.pretrain else f"runs/{data}")
    return args


# ------------------------------------------------------------------------------------------------------ data


def images_folder(args):
    return args.images if args.annotations else Path(args.data, "images")


def read_data(args, say):
    """-> instances with a photo, {id: Category}, and the descriptions as a checkpoint keeps them."""
    if args.annotations:
        texts = read_texts(args.descriptions) if args.descriptions else None
        instances, descriptions = read_coco(args.annotations, args.images, texts, say)
        if texts is None:
            say('warning: no --descriptions, so each keypoint has "the NAME of the CATEGORY"; words matter '
                '(Table 3): give it texts.json, {"NAME": "where it is and what is beside it", ...}')
        if args.val:  # its categories may be others
            _, of_val = read_coco(args.val, args.images, texts, say)
            descriptions = {part: of_val[part] | own for part, own in descriptions.items()}
        categories = parse_descriptions(descriptions, args.annotations)
    else:
        descriptions = read_json(args.descriptions)
        categories = parse_descriptions(descriptions, args.descriptions)
        annotations = Path(args.data, "annotations", f"mp100_split{args.split}_train.json")
        instances = read_instances(annotations, categories)
    instances = keep_readable(instances, images_folder(args), categories, args.allow_missing)
    return instances, categories, descriptions


# -------------------------------------------------------------------------------------------------- schedule


def make_optimizer(model, args, device):
    """AdamW without weight decay on biases and norms, as Hugging Face's trainer, which the authors use."""
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

    All epochs have as many steps. Where one runs out of examples it goes on from its start. With 6 examples,
    --batch 4, --micro-batch 1 and 2 processes:

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


# -------------------------------------------------------------------------------------------------- training


def load_batches(instances, categories, chat, args, first_step, epoch_steps, rank, world, device):
    """For each step of the run from first_step on, yields its epoch and an iterator over micro-batches.

    The iterator gives this process's micro-batches of the whole epoch; a step takes the next few.
    """
    for epoch in range(first_step // epoch_steps, args.epochs):
        examples = plan_epoch(instances, args.seed, epoch, args.rounds, args.pack)
        if not examples:
            data = args.annotations or f"{args.data}: split {args.split}"
            raise InputError(f"{data} has no visible keypoint to train on")
        steps = range(max(0, first_step - epoch * epoch_steps), epoch_steps)
        loader = iter(DataLoader(
            TrainingSet(examples, categories, chat, images_folder(args), args.image_size), collate_fn=collate,
            batch_sampler=list(micro_batches(len(examples), steps, args, rank, world)),
            num_workers=args.workers, worker_init_fn=silence_worker, pin_memory=device.type == "cuda"))
        for _ in steps:
            yield epoch, loader


def fit(model, optimizer, batches, first_step, steps, args, save, rank, world, device):
    """The training loop. batches: what load_batches() yields. save(steps done) writes a checkpoint."""
    learner = model
    if world > 1:
        learner = DistributedDataParallel(model, init_sync=False, broadcast_buffers=False)
    accumulation = args.batch // (args.micro_batch * world)
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    with tqdm(total=steps, initial=first_step, disable=rank > 0, dynamic_ncols=True) as bar:
        for step, (epoch, loader) in enumerate(batches, first_step):
            began, n_tokens, loss = time.perf_counter(), 0, torch.zeros((), device=device)
            for i in range(accumulation):
                images, tokens, *rest = (None if t is None else t.to(device, non_blocking=True)
                                         for t in next(loader))
                seed_dropout(args.seed, (step * accumulation + i) * world + rank)
                is_last = i == accumulation - 1  # only then the processes exchange gradients
                with nullcontext() if is_last or world == 1 else learner.no_sync():
                    micro_loss = learner(normalize(images), tokens, *rest) / accumulation
                    micro_loss.backward()
                loss += micro_loss.detach()
                n_tokens += tokens.numel() + len(tokens) * model.vit.n_patches
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip or math.inf)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, args)
            optimizer.step()
            optimizer.zero_grad()

            if world > 1:
                dist.all_reduce(loss)
            loss = loss.item() / world  # waits for the GPU, so that the clock below is right
            seconds, done = time.perf_counter() - began, step + 1
            if not (math.isfinite(loss) and norm.isfinite()):
                raise InputError(f"step {done}: loss {loss:g}, |grad| {norm:g}; the checkpoint of an earlier "
                                 "step was not touched; start again with a lower --lr or with --clip 1")
            bar.update()
            if rank == 0 and (done % args.log_every == 0 or done == steps):
                bar.write(f"step {done:5d}  epoch {epoch + 1:2d}  loss {loss:.4f}  "
                          f"lr {group['lr']:.2e}  |grad| {norm.item():.3f}  "
                          f"{n_tokens * world / seconds:,.0f} tokens/s"
                          f"{memory_and_mfu(model, n_tokens / seconds, device)}")
            if rank == 0 and (done % args.save_every == 0 or done == steps):
                save(done)


def describe_parameters(model, say):
    """Says how many parameters of each part train."""
    parts = {"vit": model.vit, "projection": model.projection, "llm": model.llama,
             "head": model.keypoint_head}
    for name, part in parts.items():
        if part is not None:
            trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
            total = sum(p.numel() for p in part.parameters())
            say(f"{name:10} {trained:>13,} of {total:>13,} parameters train")


def memory_and_mfu(model, tokens_per_second, device):
    """Peak memory; on a GPU also MFU, the share of its peak FLOP/s that is spent on necessary work.

    That is two passes over the LLM's weights, forward and backward to the inputs, since frozen weights get no
    gradient.
    """
    if device.type != "cuda":
        try:
            import resource
        except ImportError:  # Windows
            return ""
        unit = 1 if sys.platform == "darwin" else 1024  # bytes on a Mac, KiB on Linux
        return f"  {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"
    text = f"  {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    for card, peak in PEAK_TFLOPS.items():
        if card in torch.cuda.get_device_name(device):
            weights = sum(p.numel() for p in model.llama.layers.parameters())
            text += f"  MFU {4 * weights * tokens_per_second / peak / 1e12:.0%}"
    return text


# --------------------------------------------------------------------------------------------------- program


def main(argv):
    args = parse_arguments(argv)
    rank, world, device = start_processes()
    say = print if rank == 0 else lambda *_: None
    checkpoint = read_checkpoint(args.resume) if args.resume else None
    path = Path(args.out, "ckpt.pt")
    if path.exists() and not (checkpoint and path.samefile(args.resume)):
        raise InputError(f"{path} exists: go on from it with --resume {path}, or choose another --out")
    if args.batch % (args.micro_batch * world):
        raise InputError(f"--batch {args.batch} is not a multiple of --micro-batch {args.micro_batch} "
                         f"x {world} processes")

    # ---- data
    chat = load_chat(args)
    instances, categories, descriptions = read_data(args, say)
    n_examples = sum(1 if args.pack else count_groups(len(o.keypoints), args.rounds) for o in instances)
    epoch_steps = math.ceil(n_examples / args.batch)

    # ---- network
    model = load_model(args, device, checkpoint, say)
    optimizer, step = make_optimizer(model, args, device), 0
    if checkpoint:
        load_optimizer(optimizer, checkpoint["optimizer"], args.resume)
        step = checkpoint["step"]
    model.llama.checkpoint_activations = args.checkpoint_activations
    if args.compile:
        for block in [*model.vit.blocks, *model.llama.layers]:
            block.compile(dynamic=True)

    # ---- training
    say(f"{len(instances)} objects of {len({o.category_id for o in instances})} categories, "
        f"{args.epochs * epoch_steps} steps in {args.epochs} epochs")
    say(f"batch {args.batch} = micro-batch {args.micro_batch} x {world} processes "
        f"x {args.batch // (args.micro_batch * world)} accumulated, on {device}")
    describe_parameters(model, say)
    make_folder(path.parent)

    def save(step):
        save_checkpoint(path, args=vars(args), descriptions=descriptions, model=trainable_state(model),
                        optimizer=optimizer.state_dict(), step=step)

    batches = load_batches(instances, categories, chat, args, step, epoch_steps, rank, world, device)
    fit(model, optimizer, batches, step, args.epochs * epoch_steps, args, save, rank, world, device)
    say(f"done: {path}")


if __name__ == "__main__":
    run(main)
