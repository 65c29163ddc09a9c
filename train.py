"""Fine-tunes CapeLLM on a split of MP-100 (paper, sections 3.3 and 4.2). The defaults are the paper's.

    torchrun --nproc_per_node 4 train.py --split 1              4 GPUs
    python train.py --split 1                                   one GPU, or a CPU: the same result, later
    python train.py --resume runs/split1/ckpt.pt                goes on where a run stopped

An optimizer step takes --batch conversations, cut into micro-batches that the processes share out and accumulate. All that is
random is drawn from (seed, epoch, example) or (seed, step, micro-batch), so neither the number of processes or workers nor a
restart changes the result.
"""

import argparse
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from chat import INSTRUCTIONS, PRETRAINING, Chat
from data import TrainingSet, collate, count_groups, existing_photos, normalize, plan_epoch, read_descriptions, read_objects
from llama import InputError
from lora import load_trainable_state, trainable_state
from model import CapeLLM

PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "A6000": 154.8, "4090": 165.2, "3090": 71}  # dense bf16, data sheets


def positive(text):
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def natural(text):
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number, 0 or more")
    return int(text)


def rounds(text):
    return text if text == "dynamic" else positive(text)


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description="Fine-tunes CapeLLM on MP-100.", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     allow_abbrev=False)
    files = parser.add_argument_group("files")
    files.add_argument("--data", default="data/mp100", help="MP-100: annotations/ and images/")
    files.add_argument("--split", type=int, default=1, help="1 to 5")
    files.add_argument("--descriptions", default="descriptions.json", help="names and descriptions of all keypoints")
    files.add_argument("--llm", default="weights/Llama-3.1-8B", help="config.json, tokenizer.json, *.safetensors")
    files.add_argument("--vit", default="weights/dinov2-large", help="config.json, model.safetensors")
    files.add_argument("--out", help="folder of the checkpoint; runs/splitN or runs/pretrain-... if not given")
    files.add_argument("--resume", metavar="CKPT", help="a checkpoint to go on from, with its arguments")
    files.add_argument("--init", metavar="CKPT", help="a checkpoint whose projection to start from, such as one of --pretrain")
    files.add_argument("--allow-missing", action="store_true", help="go on without objects whose photo is missing")
    network = parser.add_argument_group("network")
    network.add_argument("--image-size", type=positive, default=224, help="pixels a side")
    network.add_argument("--tune-vit", choices=["frozen", "lora", "full"], default="lora", help="Table 4")
    network.add_argument("--tune-llm", choices=["frozen", "lora", "full"], default="lora")
    network.add_argument("--answer", choices=["text", "token"], default="text", help="Table 8: coordinates as text, or read off <KEYPOINT>")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=positive, default=12)
    recipe.add_argument("--batch", type=positive, default=128, help="conversations in an optimizer step")
    recipe.add_argument("--micro-batch", type=positive, default=1, help="conversations in a forward pass: memory against speed")
    recipe.add_argument("--lr", type=float, default=5e-4)
    recipe.add_argument("--warmup", type=float, default=0.03, help="share of the steps, then cosine to 0")
    recipe.add_argument("--weight-decay", type=float, default=0.01)
    recipe.add_argument("--clip", type=float, default=0, help="largest norm of the gradient, 0 for none")
    recipe.add_argument("--instruction", choices=INSTRUCTIONS, default="description", help="what is said of keypoints: Tables 3, 6, 7")
    recipe.add_argument("--rounds", type=rounds, default=4, help='keypoints asked in a conversation (Table 4), or "dynamic": any number')
    recipe.add_argument("--pretrain", choices=PRETRAINING, help="Table 9: trains the projection alone, to name the keypoint at a place")
    recipe.add_argument("--seed", type=natural, default=42)
    running = parser.add_argument_group("running")
    running.add_argument("--pack", action="store_true", help="all groups of a photo in one row: half the work, but --batch then counts "
                         "photos, and all keypoints of a photo are in the same step and crop")
    running.add_argument("--checkpoint-activations", action="store_true", help="keeps hardly any activations, for half as much work again")
    running.add_argument("--compile", action="store_true", help="torch.compile every block")
    running.add_argument("--workers", type=int, default=4, help="processes that read photos, per GPU")
    running.add_argument("--save-every", type=positive, default=100, help="steps between checkpoints")
    running.add_argument("--log-every", type=positive, default=1, help="steps between log lines")
    args = parser.parse_args(argv)
    if args.resume and args.init:
        parser.error("--resume goes on from a checkpoint, --init starts from one: give only one of them")
    if args.resume:  # the run's own arguments, but for what the command line says
        parser.set_defaults(**read_checkpoint(args.resume)["args"])
        args = parser.parse_args(argv)
    if args.pretrain:
        if (args.instruction, args.answer) != ("description", "text") or "full" in (args.tune_vit, args.tune_llm):
            parser.error("--pretrain has its own instruction and trains the projection alone: leave out --instruction, --answer, --tune-*")
        args.tune_vit = args.tune_llm = "frozen"
    args.out = args.out or (f"runs/pretrain-{args.pretrain}" if args.pretrain else f"runs/split{args.split}")
    return args


def start_processes():
    """-> rank, number of processes, device. Works under torchrun and alone; on CUDA, MPS and the CPU."""
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if "RANK" not in os.environ:
        return 0, 1, torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size(), torch.device(device)


def run(main):
    """Runs a program. What the user can mend is one line on stderr and exit code 2; defects crash with their traceback."""
    try:
        main(sys.argv[1:])
    except InputError as e:  # from a DataLoader worker it comes with a traceback in front
        print(f"error: {str(e).strip().splitlines()[-1].removeprefix('llama.InputError: ')}", file=sys.stderr)
        os._exit(2) if dist.is_initialized() else sys.exit(2)  # without waiting for the other processes
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


def quiet_worker(_):
    """For a DataLoader's workers: one that is talked to while Ctrl-C comes prints no traceback of the broken connection. Errors in
    reading photos do not pass here; they are sent to the main process."""
    sys.excepthook = lambda *_: None


def read_checkpoint(path):
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(checkpoint[key], dict) for key in ("args", "model", "optimizer")):
            raise TypeError
        return {key: checkpoint[key] for key in ("args", "model", "optimizer", "step")}
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except Exception as e:  # a damaged file can raise nearly anything
        raise InputError(f"{path}: not a checkpoint of this program, or a damaged one ({type(e).__name__})") from None


def save_checkpoint(path, **contents):
    """Atomic: until the new file is whole the old one stays."""
    part = path.with_suffix(".part")
    try:
        torch.save(contents, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # torch's writer says RuntimeError for a full disk
        part.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({str(e).splitlines()[0]}); free some space and --resume") from None


def load_model(args, device, checkpoint=None):
    """The network of a run's arguments, with the trained weights of its checkpoint if there is one."""
    torch.manual_seed(args.seed)  # the adapters and the projection start alike in all processes
    model = CapeLLM.load(args.vit, args.llm, args.image_size, args.tune_vit, args.tune_llm, args.answer, device)
    try:
        if checkpoint:
            load_trainable_state(model, checkpoint["model"])
        elif args.init:
            weights = read_checkpoint(args.init)["model"]
            load_trainable_state(model.projection, {name: weights[f"projection.{name}"] for name in ("weight", "bias")
                                                    if f"projection.{name}" in weights})
    except ValueError as e:
        init = f"--init {args.init}: " if args.init and not checkpoint else ""
        raise InputError(f"{init}{e}: not trained with --vit {args.vit} --llm {args.llm}?") from None
    return model


def load_chat(args):
    return Chat(args.llm, PRETRAINING[args.pretrain] if args.pretrain else INSTRUCTIONS[args.instruction], args.answer)


def make_optimizer(model, args, device):
    """AdamW, without weight decay on biases and norms: as Hugging Face's trainer, with which the published code trains."""
    groups = {True: [], False: []}  # whether it decays
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[not (name.endswith("bias") or "norm" in name)].append(p)
    groups = [{"params": params, "weight_decay": args.weight_decay if decays else 0} for decays, params in groups.items() if params]
    return torch.optim.AdamW(groups, lr=args.lr, fused=device.type == "cuda")


def learning_rate(step, steps, args):
    """Linear warm-up from 0, which the first step takes, then a cosine down to zero: as Hugging Face's trainer."""
    warmup = math.ceil(args.warmup * steps)
    if step < warmup:
        return args.lr * step / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def micro_batches(n, steps, args, rank, world):
    """The share of this process in an epoch's steps (a range): lists of indices below n. What is short is filled from the start."""
    for step in steps:
        batch = [i % n for i in range(step * args.batch, (step + 1) * args.batch)]
        yield from [batch[i:i + args.micro_batch] for i in range(0, args.batch, args.micro_batch)][rank::world]


def main(argv):
    args = parse_arguments(argv)
    rank, world, device = start_processes()
    say = print if rank == 0 else lambda *_: None
    checkpoint = read_checkpoint(args.resume) if args.resume else None
    path = Path(args.out, "ckpt.pt")
    if path.exists() and not (checkpoint and path.samefile(args.resume)):
        raise InputError(f"{path} exists: go on from it with --resume {path}, or choose another --out")
    if args.batch % (args.micro_batch * world):
        raise InputError(f"--batch {args.batch} is not a multiple of --micro-batch {args.micro_batch} x {world} processes")
    accumulation = args.batch // (args.micro_batch * world)

    # ---- data
    chat, categories = load_chat(args), read_descriptions(args.descriptions)
    objects = read_objects(Path(args.data, "annotations", f"mp100_split{args.split}_train.json"), categories)
    objects = existing_photos(objects, args.data, categories, args.allow_missing)
    n_examples = len(objects) if args.pack else sum(count_groups(len(o.keypoints), args.rounds) for o in objects)
    epoch_steps = math.ceil(n_examples / args.batch)
    steps = args.epochs * epoch_steps

    # ---- network
    model = load_model(args, device, checkpoint)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, args, device)
    step = 0
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = checkpoint["step"]
    model.llama.checkpoint_activations = args.checkpoint_activations
    if args.compile:
        for block in [*model.vit.blocks, *model.llama.layers]:
            block.compile(dynamic=True)
    learner = DistributedDataParallel(model, init_sync=False, broadcast_buffers=False) if world > 1 else model
    say(f"{len(objects)} objects of {len({o.category for o in objects})} categories, {steps} steps in {args.epochs} epochs")
    say(f"batch {args.batch} = micro-batch {args.micro_batch} x {world} processes x {accumulation} accumulated, on {device}")
    for name, part in ("vit", model.vit), ("projection", model.projection), ("llm", model.llama), ("decoder", model.decoder):
        if part is None:
            continue
        trained, total = (sum(p.numel() for p in part.parameters() if p.requires_grad or not only) for only in (True, False))
        say(f"{name:10} {trained:>13,} of {total:>13,} parameters train")

    # ---- training
    model.train()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{path.parent}: cannot be made ({e})") from None
    with tqdm(total=steps, initial=step, disable=rank > 0, dynamic_ncols=True) as bar:
        for epoch in range(step // epoch_steps, args.epochs):
            examples = plan_epoch(objects, args.seed, epoch, args.rounds, args.pack)
            if not examples:
                raise InputError(f"{args.data}: split {args.split} has no visible keypoint to train on")
            ahead = range(step - epoch * epoch_steps, epoch_steps)  # all of the epoch's steps, but for those before a restart
            loader = iter(DataLoader(TrainingSet(examples, categories, chat, args.data, args.image_size), collate_fn=collate,
                                     batch_sampler=list(micro_batches(len(examples), ahead, args, rank, world)),
                                     num_workers=args.workers, worker_init_fn=quiet_worker, pin_memory=device.type == "cuda"))
            for _ in ahead:
                began, n_tokens, loss = time.perf_counter(), 0, torch.zeros((), device=device)
                for i in range(accumulation):
                    images, tokens, labels, groups = (t if t is None else t.to(device, non_blocking=True) for t in next(loader))
                    number = (step * accumulation + i) * world + rank  # of the micro-batch, in the whole run
                    torch.manual_seed(args.seed + (number << 20) + (number >> 12))  # dropout; a CPU looks at 32 bits of a seed
                    with learner.no_sync() if world > 1 and i < accumulation - 1 else nullcontext():
                        micro_loss = learner(normalize(images), tokens, labels, groups) / accumulation
                        micro_loss.backward()
                    loss += micro_loss.detach()
                    n_tokens += tokens.numel() + len(tokens) * model.vit.n_patches
                norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip or math.inf)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps, args)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                if world > 1:
                    dist.all_reduce(loss)
                    loss /= world
                seconds = time.perf_counter() - began
                bar.update()
                if rank == 0 and (step % args.log_every == 0 or step == steps):
                    bar.write(f"step {step:5d}  epoch {epoch + 1:2d}  loss {loss.item():.4f}  lr {group['lr']:.2e}  "
                              f"|grad| {norm.item():.3f}  {n_tokens * world / seconds:,.0f} tokens/s"
                              f"{memory_and_mfu(model, n_tokens / seconds, device)}")
                if rank == 0 and (step % args.save_every == 0 or step == steps):
                    save_checkpoint(path, args=vars(args), model=trainable_state(model), optimizer=optimizer.state_dict(), step=step,
                                    epoch=epoch)
    say(f"done: {path}")


def memory_and_mfu(model, tokens_per_second, device):
    """Peak memory, and the share of the GPU's peak that goes into the two products with each weight that LoRA cannot avoid:
    forward, and back to the inputs."""
    if device.type != "cuda":
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return f"  {peak / 2**30:.1f} GiB"
    text = f"  {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    for card, peak in PEAK_TFLOPS.items():
        if card in torch.cuda.get_device_name(device):
            weights = sum(p.numel() for p in model.llama.layers.parameters())
            text += f"  MFU {4 * weights * tokens_per_second / peak / 1e12:.0%}"
    return text


if __name__ == "__main__":
    run(main)
