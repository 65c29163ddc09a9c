"""Fine-tunes CapeLLM on MP-100 (paper, sections 3.3 and 4.2) or your own data. The defaults are the paper's.

    torchrun --nproc_per_node 4 train.py --split 1              4 GPUs
    python train.py --split 1                                   one GPU or a CPU: the same, more slowly
    python train.py --annotations train.json --images photos    your own data, see coco.py
    python train.py --split 1 --check                           looks whether all is there, and trains nothing

The same command again resumes where it stopped, by Ctrl-C, SIGTERM or a crash.

An optimizer step takes --batch conversations, cut into micro-batches that the processes share out and
accumulate. Everything random is drawn from (seed, epoch, example) or from (seed, number of the micro-batch),
so a restart or the number of workers changes nothing, and the number of processes only the rounding.
"""

import hashlib
import math
import signal
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from annotations import annotation_file, keep_readable, parse_descriptions, read_instances
from arguments import images_folder, parse_arguments
from check import check_all, check_briefly
from checkpoint import load_chat, load_model, load_optimizer, lock_folder, read_checkpoint, save_checkpoint
from coco import read_coco, read_texts
from common import InputError, Process, Stop, loader_options, read_json, run, say, start_processes, stop_with
from data import TrainingSet, collate, count_groups, normalize, plan_epoch
from evaluate import Validation
from log import Log
from lora import trainable_state
from model import CapeLLM

# ------------------------------------------------------------------------------------------------------ data


def read_data(args):
    """-> instances with a photo, {id: Category}, and the descriptions as a checkpoint keeps them."""
    if args.annotations:
        texts = read_texts(args.descriptions) if args.descriptions else None
        instances, descriptions = read_coco(args.annotations, args.images, texts)
        if texts is None:
            say('warning: no --descriptions, so each keypoint has "the NAME of the CATEGORY"; words matter '
                '(Table 3): give it texts.json, {"NAME": "where it is and what is beside it", ...}')
        if args.val:  # its categories may be others
            _, of_val = read_coco(args.val, args.images, texts)
            descriptions = {part: of_val[part] | own for part, own in descriptions.items()}
        categories = parse_descriptions(descriptions, args.annotations)
    else:
        descriptions = read_json(args.descriptions)
        categories = parse_descriptions(descriptions, args.descriptions)
        instances = read_instances(annotation_file(args.data, args.split, "train"), categories)
    instances = keep_readable(instances, images_folder(args), categories, args.allow_missing)
    return instances, categories, descriptions


def refuse_other_data(checkpoint, instances, descriptions, args, argv):
    """Notes in args what data these are. InputError if a run would silently continue with others.

    With --resume on the command line it may. The run of a checkpoint without such a note may, too.
    """
    seen = [(o.annotation_id, o.category_id, o.photo, o.box, o.keypoints.tolist(), o.visible.tolist())
            for o in instances]
    args.data_digest = hashlib.sha256(repr((seen, descriptions)).encode()).hexdigest()
    trained = checkpoint["args"].get("data_digest", args.data_digest) if checkpoint else args.data_digest
    if trained != args.data_digest and not any(word.startswith("--resume") for word in argv):
        raise InputError(f"{args.resume}: its run had other objects, photos or descriptions than there are "
                         f"now. To go on with these, say --resume {args.resume}; to start anew, --fresh or "
                         "another --out")


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
        batch = indices_of(step, n, args.batch)
        parts = [batch[i:i + args.micro_batch] for i in range(0, args.batch, args.micro_batch)]
        yield from parts[rank::world]


def indices_of(step, n, batch):
    """The examples < n of an epoch's step."""
    return [i % n for i in range(step * batch, (step + 1) * batch)]


def seed_dropout(seed, number):
    """Makes dropout depend on the seed and the micro-batch's number, counted over the run and all processes.

    The number is spread over two ranges of bits, since a CPU's generator looks at only 32 bits of a seed.
    """
    torch.manual_seed(seed + (number << 20) + (number >> 12))


# -------------------------------------------------------------------------------------------------- training


def load_batches(instances, categories, chat, args, steps, process):
    """For each of `steps` (a range) of the run, yields its epoch, micro-batches and examples.

    The micro-batches are an iterator over this process's of the whole epoch, of which a step takes the next
    few. The examples are those of the step, of all processes.
    """
    epoch_steps = steps.stop // args.epochs
    for epoch in range(steps.start // epoch_steps, args.epochs):
        examples = plan_epoch(instances, args.seed, epoch, args.rounds, args.pack)
        if not examples:
            data = args.annotations or f"{args.data}: split {args.split}"
            raise InputError(f"{data} has no visible keypoint to train on")
        of_epoch = range(max(0, steps.start - epoch * epoch_steps), epoch_steps)
        loader = iter(DataLoader(
            TrainingSet(examples, categories, chat, images_folder(args), args.image_size), collate_fn=collate,
            batch_sampler=list(micro_batches(len(examples), of_epoch, args, process.rank, process.world)),
            pin_memory=process.device.type == "cuda", **loader_options(args.workers)))
        for step in of_epoch:
            yield epoch, loader, [examples[i] for i in indices_of(step, len(examples), args.batch)]


def add_gradients(model, learner, loader, step, args, process):
    """Adds up this process's share of a step's gradients -> its mean loss, tokens, seconds without data."""
    rank, world, device = process
    loss, n_tokens, waited = torch.zeros((), device=device), 0, 0.0
    accumulation = args.batch // (args.micro_batch * world)
    for i in range(accumulation):
        asked = time.perf_counter()
        batch = next(loader)
        waited += time.perf_counter() - asked
        images, tokens, *rest = (None if t is None else t.to(device, non_blocking=True) for t in batch)
        seed_dropout(args.seed, (step * accumulation + i) * world + rank)
        is_last = i == accumulation - 1  # only then the processes exchange gradients
        with nullcontext() if is_last or world == 1 else learner.no_sync():
            micro_loss = learner(normalize(images), tokens, *rest) / accumulation
            micro_loss.backward()
        loss += micro_loss.detach()
        n_tokens += tokens.numel() + len(tokens) * model.vit.n_patches
    return loss, n_tokens, waited


@dataclass(frozen=True)
class Training:
    """The parts of a training run, and what it leaves while it runs."""

    args: Namespace
    process: Process
    model: CapeLLM
    optimizer: torch.optim.Optimizer
    descriptions: dict  # the contents of a descriptions.json
    validation: Validation | None
    log: Log

    def save(self, step, name="ckpt.pt"):
        """Writes a checkpoint and the curve, for the first process."""
        save_checkpoint(Path(self.args.out, name), args=vars(self.args), descriptions=self.descriptions,
                        model=trainable_state(self.model), optimizer=self.optimizer.state_dict(), step=step)
        from tools.curve import draw_curve
        draw_curve(self.args.out)

    def validate(self, step):
        """Measures the network, in all processes together, and saves it if it is the best so far."""
        score, n = self.validation.measure(self.model)
        best = max((score for _, score in self.log.series("PCK@0.2")), default=-1)
        self.log.write(step=step, **{"PCK@0.2": score, "objects": n})
        if self.process.rank == 0:
            tqdm.write(f"step {step:5d}  PCK@0.2 {100 * score:.2f} on {n} objects of the validation set")
            if score > best:
                self.save(step, "best.pt")


def fit(training, batches, steps):
    """The training loop over `steps`, a range -> how many steps are done, and the signal that ended it or 0.

    batches: what load_batches() yields.
    """
    args, model, optimizer = training.args, training.model, training.optimizer
    rank, world, device = training.process
    learner = model
    if world > 1:
        learner = DistributedDataParallel(model, init_sync=False, forward_sync_buffers=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    with (Stop() as stop,
          tqdm(total=steps.stop, initial=steps.start, disable=rank > 0, dynamic_ncols=True) as bar):
        for step, (epoch, loader, examples) in enumerate(batches, steps.start):
            began, done = time.perf_counter(), step + 1
            loss, n_tokens, waited = add_gradients(model, learner, loader, step, args, training.process)
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip or math.inf)
            lr = learning_rate(step, steps.stop, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

            loss, is_stopped = agree_on_loss(loss, stop.signal, world)
            norm, seconds = norm.item(), time.perf_counter() - began  # the GPU has finished by now
            if not (math.isfinite(loss) and math.isfinite(norm)):
                refuse_step(done, loss, norm, examples, training.log)
            training.log.write(
                step=done, epoch=epoch + 1, loss=loss, lr=lr, norm=norm,
                tokens_per_second=round(n_tokens * world / seconds), gib=peak_memory(device),
                seconds=round(seconds, 3), waited=round(waited / seconds, 3))
            bar.update()
            if rank == 0 and is_due(done, args.log_every, steps):
                bar.write(f"step {done:5d}  epoch {epoch + 1:2d}  loss {loss:.4f}  lr {lr:.2e}  "
                          f"|grad| {norm:.3f}  {n_tokens * world / seconds:,.0f} tokens/s"
                          f"{memory_and_mfu(model, n_tokens / seconds, device)}"
                          f"{f'  waited {waited / seconds:.0%}' if waited > 0.05 * seconds else ''}")
            if rank == 0 and is_stopped:  # before the validation, for which there may be no time
                training.save(done)
            if is_due(done, args.validate, steps):
                training.validate(done)
            if rank == 0 and not is_stopped and is_due(done, args.save_every, steps):
                training.save(done)
            if is_stopped and done < steps.stop:
                return done, stop.signal or signal.SIGTERM
    return steps.stop, 0


def is_due(done, every, steps):
    """Whether to do now what is done every so many steps, never if that is 0, and at the end."""
    return every and (done % every == 0 or done == steps.stop)


def agree_on_loss(loss, signal_number, world):
    """Each process's loss and signal -> the mean loss, and whether any was told to stop."""
    sums = torch.stack([loss / world, torch.tensor(float(bool(signal_number)), device=loss.device)])
    if world > 1:
        dist.all_reduce(sums)
    loss, stopped = sums.tolist()
    return loss, stopped > 0


# --------------------------------------------------------------------------------------------------- program


def load_network(args, checkpoint, device):
    """-> the network and its optimizer, fresh or as the checkpoint left them."""
    model = load_model(args, device, checkpoint)
    optimizer = make_optimizer(model, args, device)
    if checkpoint:
        load_optimizer(optimizer, checkpoint["optimizer"], args.resume)
    model.llama.checkpoint_activations = args.checkpoint_activations
    if args.compile:
        for block in [*model.vit.blocks, *model.llama.layers]:
            block.compile(dynamic=True)
    return model, optimizer


def main(argv):
    args = parse_arguments(argv)
    if args.check:
        return check_all(args)
    process = start_processes()
    checkpoint = read_checkpoint(args.resume) if args.resume else None
    path = Path(args.out, "ckpt.pt")
    if path.exists() and not (args.fresh or checkpoint and path.samefile(args.resume)):
        raise InputError(f"{path} exists: resume from it with --resume {path}, or choose another --out")
    if args.batch % (args.micro_batch * process.world):
        raise InputError(f"--batch {args.batch} is not a multiple of --micro-batch {args.micro_batch} "
                         f"x {process.world} processes")

    chat, data = load_chat(args), read_data(args)
    instances, _, descriptions = data
    refuse_other_data(checkpoint, instances, descriptions, args, argv)
    n_examples = sum(1 if args.pack else count_groups(len(o.keypoints), args.rounds) for o in instances)
    steps = range(checkpoint["step"] if checkpoint else 0, args.epochs * math.ceil(n_examples / args.batch))
    agree_on_step(steps.start, process.world, process.device)
    if not steps:
        return say(f"finished already, after {steps.start} steps: {args.resume}")
    train(args, process, chat, data, checkpoint, steps)


def train(args, process, chat, data, checkpoint, steps):
    """Trains for `steps`, a range, in a folder that no other run is using. data: what read_data() gave."""
    instances, categories, descriptions = data
    validation = Validation(args, chat, categories, process) if args.validate else None
    folder = Path(args.out)
    lock = lock_folder(folder) if process.rank == 0 else None  # held until this function ends
    check_briefly(args)
    model, optimizer = load_network(args, checkpoint, process.device)
    if checkpoint:
        checkpoint.clear()  # of a full fine-tuning it is several GB
    if lock and args.fresh:  # as late as here, where all that could be refused has been
        for name in "ckpt.pt", "best.pt":
            (folder / name).unlink(missing_ok=True)
    log = Log(folder if lock else None, steps.start)
    say(f"{len(instances)} objects of {len({o.category_id for o in instances})} categories, "
        f"{steps.stop} steps in {args.epochs} epochs")
    say(f"batch {args.batch} = micro-batch {args.micro_batch} x {process.world} processes "
        f"x {args.batch // (args.micro_batch * process.world)} accumulated, on {process.device}")
    describe_parameters(model)
    if steps.start:
        say(f"resumes from step {steps.start}: {args.resume}")

    batches = load_batches(instances, categories, chat, args, steps, process)
    training = Training(args, process, model, optimizer, descriptions, validation, log)
    done, signal_number = fit(training, batches, steps)
    path = folder / "ckpt.pt"
    if signal_number:
        is_same = not args.fresh and args.resume in (None, str(path))
        say(f"stopped after step {done} of {steps.stop}; to resume: "
            f"{'the same command again' if is_same else f'--resume {path}'}")
        if process.world > 1:
            dist.barrier()  # until the first process has saved: torchrun ends all where one has ended
        stop_with(signal_number)
    say(f"done: {path}")


# -------------------------------------------------------------------------------------- checks and measures


def agree_on_step(step, world, device):
    """InputError if the processes, on several machines, do not all resume from the same step."""
    if world > 1:
        moments = torch.tensor([step, step ** 2], dtype=torch.float64, device=device)
        dist.all_reduce(moments)
        total, squares = moments.tolist()
        if total ** 2 != world * squares:  # they are equal where the variance is 0
            raise InputError("not all machines see the same checkpoint: --out must be on a disk they share")


def refuse_step(done, loss, norm, examples, log):
    """Ends a run whose loss or gradient is no number. The log lists all of the step's examples."""
    shown = list(dict.fromkeys(f"{e.instance.annotation_id} ({e.instance.photo})" for e in examples))
    log.write(step=done, error=f"loss {loss:g}, |grad| {norm:g}", annotations=shown)
    more = f" and {len(shown) - 3} more in log.jsonl" if len(shown) > 3 else ""
    raise InputError(f"step {done}: loss {loss:g}, |grad| {norm:g}, at annotations "
                     f"{', '.join(shown[:3])}{more}; the checkpoint of an earlier step was not touched; "
                     "start again with a lower --lr or with --clip 1")


def describe_parameters(model):
    """Says how many parameters of each part train."""
    parts = {"vit": model.vit, "projection": model.projection, "llm": model.llama,
             "head": model.keypoint_head}
    for name, part in parts.items():
        if part is not None:
            trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
            total = sum(p.numel() for p in part.parameters())
            say(f"{name:10} {trained:>13,} of {total:>13,} parameters train")


# TFLOP/s of dense bf16 products, from data sheets
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "A6000": 154.8, "4090": 165.2, "3090": 71}


def peak_memory(device):
    """In GiB: of the GPU, or else of this process. None where it cannot be asked for."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on a Mac, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def memory_and_mfu(model, tokens_per_second, device):
    """Peak memory; on a GPU also MFU, the share of its peak FLOP/s that is spent on necessary work.

    That is two passes over the LLM's weights, forward and backward to the inputs, since frozen weights get no
    gradient.
    """
    memory = peak_memory(device)
    text = "" if memory is None else f"  {memory:.1f} GiB"
    if device.type == "cuda":
        for card, peak in PEAK_TFLOPS.items():
            if card in torch.cuda.get_device_name(device):
                weights = sum(p.numel() for p in model.llama.layers.parameters())
                text += f"  MFU {4 * weights * tokens_per_second / peak / 1e12:.0%}"
    return text


if __name__ == "__main__":
    run(main)
