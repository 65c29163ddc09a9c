"""What train.py can be told, and what it makes of it. The defaults are the paper's.

A reader may skip this file: `python train.py --help` prints it.
"""

import argparse
import os
from functools import partial
from pathlib import Path

from chat import INSTRUCTIONS, PRETRAINING
from checkpoint import MAX_IMAGE_SIZE, MAX_SEED, find_contradictions, read_checkpoint
from common import Help, InputError, between, natural, positive
from model import DTYPES


def rounds_type(text):
    return text if text == "dynamic" else positive(text)


def build_parser():
    parser = argparse.ArgumentParser(
        usage="%(prog)s --split N [options, see --help]\n"
        "       %(prog)s --annotations JSON --images DIR [options]",
        description="Fine-tunes CapeLLM on MP-100 or on your own data. The defaults are the paper's.",
        formatter_class=Help, allow_abbrev=False)
    add_files(parser.add_argument_group)
    add = parser.add_argument_group("network").add_argument
    add("--image-size", type=partial(positive, most=MAX_IMAGE_SIZE), default=224,
        help="pixels a side of a crop")
    add("--tune-vit", choices=["frozen", "lora", "full"], default="lora",
        help="what is trained of the visual encoder: Table 4")
    add("--tune-llm", choices=["frozen", "lora", "full"], default="lora", help="likewise, of the LLM")
    add("--answer", choices=["text", "token"], default="text",
        help="Table 8: coordinates as text, or read off <KEYPOINT>")
    add = parser.add_argument_group("recipe").add_argument
    add("--epochs", type=positive, default=12, help="passes over the data")
    add("--batch", type=positive, default=128, help="conversations in an optimizer step")
    add("--micro-batch", type=positive, default=1,
        help="conversations in a forward pass: memory against speed")
    add("--lr", type=between(0, 1), default=5e-4, help="the highest learning rate")
    add("--warmup", type=between(0, 1), default=0.03,
        help="share of the steps in which it rises; then cosine to 0")
    add("--weight-decay", type=between(0, 1), default=0.01, help="of AdamW")
    add("--clip", type=between(0, 1e6), default=0, help="largest norm of the gradient (default: any)")
    add("--instruction", choices=INSTRUCTIONS, default="description",
        help="how keypoints are asked: Tables 3, 6, 7")
    add("--rounds", type=rounds_type, default=4,
        help='keypoints asked in a conversation (Table 4), or "dynamic": any number')
    add("--pretrain", choices=PRETRAINING,
        help="Table 9: train only the projection, to name the keypoint at a point")
    add("--seed", type=partial(natural, most=MAX_SEED), default=42, help="of all that is random")
    add_running(parser.add_argument_group("running").add_argument)
    return parser


def add_files(add_group):
    add = add_group("data").add_argument
    add("--data", default="data/mp100", metavar="DIR", help="MP-100, its annotations/ and images/")
    add("--split", type=positive, default=1, help="of MP-100, 1 to 5")
    add("--annotations", metavar="JSON", help="your own data instead: a COCO keypoints file, see coco.py")
    add("--images", metavar="DIR", help="the photos of --annotations and --val")
    add("--val", metavar="JSON", help="a file like --annotations, for --validate and evaluate.py")
    add("--descriptions", metavar="JSON", help="names and descriptions of all keypoints (default: "
        "descriptions.json, or for --annotations what their names say)")
    add("--allow-missing", action="store_true", help="go on without objects whose photo is missing")
    add = add_group("weights and checkpoints").add_argument
    add("--llm", default="weights/Llama-3.1-8B", metavar="DIR",
        help="config.json, tokenizer.json, *.safetensors")
    add("--vit", default="weights/dinov2-large", metavar="DIR", help="config.json, model.safetensors")
    add("--out", metavar="DIR", help="folder of the checkpoint (default: runs/splitN, runs/pretrain-..., or "
        "runs/ and the name of --annotations)")
    add("--resume", metavar="CKPT", default="auto", help="a checkpoint to resume from, with its arguments "
        'but for those given here; "auto": ckpt.pt in --out if it is there')
    add("--fresh", action="store_true", help="start anew in a folder that holds a run, which is overwritten")
    add("--init", metavar="CKPT", help="a checkpoint to start from, with all that trains here too")
    add("--init-projection", metavar="CKPT", help="likewise, but only its projection: Table 9")


def add_running(add):
    """The arguments that say how a training runs, not what is learned, but for --pack."""
    add("--check", action="store_true", help="look whether data, weights, disk and memory will do, and end")
    add("--missing-list", metavar="FILE", help="where --check lists the photos that are missing")
    add("--pack", action="store_true", help="all groups of a photo in one row: half the work, but --batch "
        "then counts photos, and all keypoints of a photo are in the same step and crop")
    add("--checkpoint-activations", action="store_true",
        help="keep hardly any activations, for half as much work again")
    add("--compile", action="store_true", help="torch.compile every block")
    add("--dtype", choices=DTYPES,
        help="of frozen weights and of computing (default: bf16 on CUDA, fp32 elsewhere)")
    add("--workers", type=partial(natural, most=1000), default=4, help="processes that read photos, per GPU")
    add("--save-every", type=positive, default=100, help="steps between checkpoints")
    add("--log-every", type=positive, default=1, help="steps between lines on the screen; log.jsonl has all")
    add("--validate", type=natural, default=0, help="steps between measurements of PCK@0.2 on "
        "100 objects of the validation set, the best in best.pt (default: none)")


def as_if_typed(trained, path):
    """-> the arguments of the checkpoint at `path`. InputError if the command line would not take them.

    The run resumes in the folder that the checkpoint lies in.
    """
    parser = build_parser()
    parser.exit_on_error = False
    options = [f"--{key.replace('_', '-')}" + ("" if trained[key] is True else f"={trained[key]}")
               for key in vars(parser.parse_args([])) if key not in ("resume", "fresh", "check")
               and trained.get(key) is not None and trained[key] is not False]
    try:
        return {**vars(parser.parse_args(options)), "out": str(Path(path).parent)}
    except argparse.ArgumentError as e:
        raise InputError(f"{path}: {e}; no run has such arguments") from None


def refuse_contradictions(parser, args):
    """Ends the program if arguments do not go together."""
    if bool(args.annotations) != bool(args.images) or args.val and not args.annotations:
        parser.error("--annotations train.json, --images DIR and, if you like, --val val.json go together")
    if args.annotations and any(getattr(args, x) != parser.get_default(x) for x in ("data", "split")):
        parser.error("--data and --split are MP-100's: leave them out with --annotations")
    tunes_more = "full" in (args.tune_vit, args.tune_llm)
    if args.pretrain and ((args.instruction, args.answer) != ("description", "text") or tunes_more):
        parser.error("--pretrain has its own instruction and trains only the projection: "
                     "leave out --instruction, --answer, --tune-*")
    if args.pretrain and args.validate:
        parser.error("--validate: a network of --pretrain locates nothing that could be measured")
    if args.missing_list and not args.check:
        parser.error("--missing-list goes with --check")
    if args.validate and args.annotations and not args.val:
        parser.error("--validate needs --val, a file of other photos")


def parse_arguments(argv):
    """args.resume becomes the path of the checkpoint to resume from, or None."""
    parser = build_parser()
    args = parser.parse_args(argv)
    is_given = args.resume != "auto"
    starts = bool(args.init) + bool(args.init_projection)
    if is_given and (args.fresh or starts) or starts > 1:
        parser.error("--resume continues from a checkpoint, --init and --init-projection start from one, "
                     "--fresh starts anew: give only one of them")
    if is_given:  # the run's own arguments, but for what the command line says
        parser.set_defaults(**as_if_typed(read_checkpoint(args.resume)["args"], args.resume))
        args = parser.parse_args(argv)
    refuse_contradictions(parser, args)
    if args.pretrain:
        args.tune_vit = args.tune_llm = "frozen"
    if not args.annotations:
        args.descriptions = args.descriptions or "descriptions.json"
    data = Path(args.annotations).stem if args.annotations else f"split{args.split}"
    args.out = args.out or (f"runs/pretrain-{args.pretrain}" if args.pretrain else f"runs/{data}")

    start = args.init or args.init_projection
    if args.fresh and start and Path(start).absolute().parent == Path(args.out).absolute():
        parser.error(f"--fresh would delete {start}, which the run starts from; choose another --out")
    path = Path(args.out, "ckpt.pt")
    restarted_by_torchrun = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if path.exists() and (restarted_by_torchrun or not (is_given or args.fresh)):
        args.resume, args.fresh = str(path), False
        if changes := find_contradictions(args, read_checkpoint(path)["args"]):
            raise InputError(f"{path} is of a run with other arguments: {', '.join(changes)}. To go on with "
                             f"them, say --resume {path}; to start anew, --fresh or another --out")
    elif not is_given:
        args.resume = None
    return args


def images_folder(args):
    """Where the photos are."""
    return args.images if args.annotations else Path(args.data, "images")
