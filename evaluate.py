"""Evaluates a checkpoint on MP-100 or own data, or scores predictions (paper, section 4.1; Tables 2 to 9).

    python evaluate.py runs/split1/ckpt.pt                  all it needs is in the checkpoint; torchrun works
    python evaluate.py --score predictions.json --split 1   only the metric, without network and photographs
    python evaluate.py CKPT --annotations val.json --images photos          your own data, see coco.py

Beside the checkpoint it leaves report.json, predictions.json and predictions.png. An evaluation that was
stopped resumes where it was. Who calls whom:

    main -> evaluate_checkpoint -> ask_checkpoint          reads data and network, writes results
         -> ask_together -> predict_batch                  shares out batches between processes
         -> predict_within_memory -> predict -> locate     asks: the last is decode.py's

Letters: P photos, K keypoints.
"""

import argparse
import hashlib
import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from annotations import (
    annotation_file,
    keep_readable,
    parse_descriptions,
    read_descriptions,
    read_instances,
    refuse_missing,
)
from arguments import images_folder
from check import describe_shortfall
from checkpoint import load_trained, read_checkpoint
from coco import list_texts, read_coco, read_texts, replace_texts
from common import (
    Help,
    InputError,
    loader_options,
    make_folder,
    natural,
    positive,
    read_json_lines,
    run,
    say,
    start_processes,
    write_json,
)
from data import crop_of, normalize
from decode import DECODINGS, Prediction, locate
from metric import THRESHOLDS, make_report, pck_of_queries, print_report, read_predictions
from model import DTYPES
from tools.draw import draw_sheet

# -------------------------------------------------------------------------------------------- asking a model


def check_decoding(chat, decode, constrained=False):
    """InputError if a model's answers cannot be read in the way that was asked for."""
    chooses_digits = chat.keypoint is None and chat.coordinates.digits
    if not chooses_digits and (constrained or decode != "greedy"):
        option = "--constrained" if constrained else f"--decode {decode}"
        raise InputError(f"{option}: this model does not spell points in digits, one or three at a time; "
                         "leave it out")


def predict(model, chat, crops, pixels, categories, cumulative=False, **how):
    """Asks for all keypoints of P photos -> for each photo a list of Predictions, points in its pixels.

    crops, pixels and categories have one entry for each photo. pixels uint8 (P, 3, size, size): what the
    crops show. how: see decode.locate().
    """
    device = model.projection.weight.device
    questions = [chat.questions(category, cumulative) for category in categories]
    predictions = locate(model, normalize(pixels.to(device)), questions, chat, cumulative=cumulative, **how)
    return [[replace(p, point=p.point and tuple(crop.to_photo(p.point).tolist())) for p in of_photo]
            for crop, of_photo in zip(crops, predictions)]


class Photos(torch.utils.data.Dataset):
    """Instances -> (index, pixels of the crop), which are None if the photo cannot be read.

    images: the folder of the photos. size: of a crop, in pixels.
    """

    def __init__(self, instances, images, size):
        self.instances, self.images, self.size = instances, images, size

    def __len__(self):
        return len(self.instances)

    def __getitem__(self, i):
        try:
            photo = Path(self.images, self.instances[i].photo)
            return i, crop_of(self.instances[i]).cut(photo, self.size)
        except InputError:
            return i, None


def make_batches(instances, n_questions):
    """-> batches, lists of indices, of at most n_questions keypoints. An instance with more is alone.

    The heaviest come first, so that a batch too large for the memory shows at once. Batches depend on nothing
    but the instances, so every number of processes computes the same.
    """
    batches, free = [], 0
    for i in sorted(range(len(instances)), key=lambda i: -len(instances[i].keypoints)):
        K = len(instances[i].keypoints)
        if K > free:
            batches.append([])
            free = n_questions
        batches[-1].append(i)
        free -= K
    return batches


def predict_within_memory(model, chat, crops, pixels, categories, **how):
    """predict(), and where a GPU's memory does not suffice, for half of the photos and then the others."""
    try:
        return predict(model, chat, crops, pixels, categories, **how)
    except torch.OutOfMemoryError:
        if len(crops) == 1:
            raise
    torch.cuda.empty_cache()
    n = len(crops) // 2
    tqdm.write(f"out of memory with {len(crops)} photos at a time: goes on with {n} (--batch says how many)")
    halves = (crops[:n], pixels[:n], categories[:n]), (crops[n:], pixels[n:], categories[n:])
    return [found for half in halves for found in predict_within_memory(model, chat, *half, **how)]


def predict_batch(model, chat, batch, instances, categories, **how):
    """Asks about a batch of what Photos gives -> {index: Predictions}, None for an unreadable photo."""
    results = {i: None for i, _ in batch}
    readable = [(i, crop) for i, crop in batch if crop is not None]
    if readable:
        indices, pixels = zip(*readable)
        found = predict_within_memory(
            model, chat, [crop_of(instances[i]) for i in indices], torch.stack(pixels),
            [categories[instances[i].category_id] for i in indices], **how)
        for i, predictions in zip(indices, found):  # without the distributions, 16 kB a keypoint
            results[i] = [replace(p, x_distribution=None, y_distribution=None) for p in predictions]
    return results


def ask_together(model, chat, photos, categories, batches, process, workers, kept=None, **how):
    """Shares out batches between all processes -> {index: Predictions or None}, the same in each process.

    photos: a Photos. kept: the PartialResults of this process, which are not asked for again.
    """
    results = dict(kept.results) if kept else {}
    own = [[i for i in batch if i not in results] for batch in batches[process.rank::process.world]]
    loader = DataLoader(photos, batch_sampler=[batch for batch in own if batch], collate_fn=list,
                        **loader_options(workers))
    for batch in tqdm(loader, disable=process.rank > 0, dynamic_ncols=True, leave=kept is not None):
        found = predict_batch(model, chat, batch, photos.instances, categories, **how)
        results |= found
        if kept:
            kept.write(found)
    if process.world > 1:
        gathered = [None] * process.world
        dist.all_gather_object(gathered, results)
        results = {i: found for part in gathered for i, found in part.items()}
    return results


class PartialResults:
    """The predictions of an evaluation that is not finished, in partial-KEY-RANK.jsonl with its results.

    A line is {"instance": its index, "found": [[point, confidence, answer], ...]}. key: see fingerprint();
    the file's name has the beginning of it. All processes read what any has written, for there may be more
    or fewer than before.
    """

    def __init__(self, folder, key, rank):
        self.path, self.results = folder / f"partial-{key[:16]}-{rank}.jsonl", {}
        self.all = f"partial-{key[:16]}-*.jsonl"  # of all processes
        for path in sorted(folder.glob(self.all)):
            for line in read_json_lines(path):
                self.take(line)

    def take(self, line):
        try:
            self.results[line["instance"]] = [Prediction(point and tuple(point), confidence, answer)
                                              for point, confidence, answer in line["found"]]
        except (ValueError, TypeError, KeyError):  # a line of something else
            pass

    def write(self, found):
        """Adds what predict_batch() gave, but for unreadable photos."""
        lines = [{"instance": i, "found": [[p.point, p.confidence, p.answer] for p in of_photo]}
                 for i, of_photo in found.items() if of_photo]
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(f"\n{json.dumps(line)}" for line in lines))  # the last may be cut off
        except OSError as e:
            raise InputError(f"{self.path}: cannot be written ({e})") from None

    def remove(self):
        """Removes the files of this evaluation, not those of others that were stopped in the same folder."""
        for path in self.path.parent.glob(self.all):
            path.unlink()


def fingerprint(args, checkpoint, instances, categories, images):
    """A text that stands for all that an evaluation's answers depend on; of photos, size and date.

    The weights are those that were read: a training under way may have written others since.
    """
    weights = hashlib.sha256(repr(checkpoint["args"]).encode())
    for name, weight in checkpoint["model"].items():
        weights.update(name.encode() + weight.flatten().view(torch.uint8).numpy().tobytes())
    photos = {photo: Path(images, photo).stat() for photo in {o.photo for o in instances}}
    asked = [(o.annotation_id, o.box, categories[o.category_id].keypoints, o.photo, photos[o.photo].st_size,
              photos[o.photo].st_mtime_ns) for o in instances]
    how = (args.llm, args.vit, args.dtype, args.constrained, args.cumulative, args.decode)
    return hashlib.sha256(repr((weights.hexdigest(), asked, how)).encode()).hexdigest()


def ask_checkpoint(args, checkpoint, instances, categories, images):
    """Asks a checkpoint's network about all instances, but for those of an evaluation that was stopped.

    -> {index: Predictions or None}, or None on every process but the first; and the PartialResults.
    """
    process = start_processes()
    model, chat = load_trained(checkpoint, process.device, args.llm, args.vit, args.dtype)
    check_decoding(chat, args.decode, args.constrained)
    kept = PartialResults(find_folder(args), fingerprint(args, checkpoint, instances, categories, images),
                          process.rank)
    if kept.results:
        say(f"resumes with {len(kept.results)} of {len(instances)} objects done")
    photos = Photos(instances, images, checkpoint["args"]["image_size"])
    results = ask_together(
        model, chat, photos, categories, make_batches(instances, args.batch), process, args.workers, kept,
        constrained=args.constrained, decode=args.decode, cumulative=args.cumulative)
    return (results if process.rank == 0 else None), kept


class Validation:
    """What train.py --validate measures: PCK@0.2 of the same 100 objects of the validation set."""

    def __init__(self, args, chat, categories, process):
        self.chat, self.categories, self.process, self.workers = chat, categories, process, args.workers
        images = images_folder(args)
        if args.annotations:
            instances, descriptions = read_coco(args.val, images, list_texts(categories), lambda _: None)
            self.categories = parse_descriptions(descriptions, args.val)
        else:
            instances = read_instances(annotation_file(args.data, args.split, "val"), categories)
        instances = random.Random(0).sample(instances, min(100, len(instances)))
        instances = keep_readable(instances, images, self.categories, args.allow_missing)
        self.photos = Photos(instances, images, args.image_size)

    def measure(self, model):
        """-> PCK@0.2 and the number of objects, in every process. Training's random numbers are untouched."""
        model.eval()
        batches = make_batches(self.photos.instances, n_questions=16)
        results = ask_together(model, self.chat, self.photos, self.categories, batches, self.process,
                               self.workers)
        model.train()
        instances, predictions = keep_answered(self.photos.instances, results, self.photos.images)
        shares = pck_of_queries(instances, points_of(predictions))
        return shares.mean(0)[THRESHOLDS.index(0.2)].item(), len(instances)


def keep_answered(instances, results, images):
    """-> the instances whose photo could be read, and their Predictions. results: as ask_together() gives."""
    answered = [i for i in range(len(instances)) if results[i]]
    if not answered:
        raise InputError(f"{images}: no readable photos to evaluate on")
    return [instances[i] for i in answered], [results[i] for i in answered]


def points_of(predictions):
    return [[prediction.point for prediction in of_photo] for of_photo in predictions]


# --------------------------------------------------------------------------------------------------- program


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        usage="%(prog)s CKPT [options, see --help]\n       %(prog)s --score JSON [options]",
        description="Evaluates a checkpoint, or scores predictions.",
        formatter_class=Help, allow_abbrev=False)
    parser.add_argument("checkpoint", nargs="?", metavar="CKPT", help="what train.py wrote")
    parser.add_argument("--score", metavar="JSON", help="score these predictions instead")
    add_data(parser.add_argument_group("data").add_argument)
    add = parser.add_argument_group("asking the checkpoint").add_argument
    add("--decode", choices=DECODINGS, default="greedy",
        help="what to take of each coordinate's distribution")
    add("--constrained", action="store_true", help="hold answers to the format, so that none is malformed")
    add("--cumulative", action="store_true", help="ask a photo's keypoints one after another in one "
        "conversation, in the order of the descriptions, the model's own answers among the questions")
    add("--llm", metavar="DIR", help="where its weights are now, if they were moved since the training")
    add("--vit", metavar="DIR", help="likewise")
    add("--dtype", choices=DTYPES,
        help="of frozen weights and of computing (default: bf16 on CUDA, fp32 elsewhere)")
    add("--batch", type=positive, default=64, help="questions asked at a time: memory against speed")
    add("--workers", type=partial(natural, most=1000), default=2, help="processes that read photos, per GPU")
    add = parser.add_argument_group("results").add_argument
    add("--protocol", choices=["query", "pairs"], default="query",
        help="Table 2: each object once, or support-query pairs")
    add("--out", metavar="DIR",
        help="their folder (default: that of the checkpoint; best/, val/ or train/ in it for those)")
    add("--report", metavar="JSON", help="where the report goes (default: report.json in --out)")
    args = parser.parse_args(argv)
    if bool(args.checkpoint) == bool(args.score):
        parser.error("give either a checkpoint or --score predictions.json")
    if args.score and (args.constrained or args.cumulative or args.decode != "greedy"):
        parser.error("--constrained, --cumulative and --decode say how a checkpoint is asked; "
                     "--score asks nothing")
    return args


def add_data(add):
    add("--data", metavar="DIR", help="MP-100 (default: that of the checkpoint, or data/mp100)")
    add("--split", type=positive, help="of MP-100 (default: that of the checkpoint, or 1)")
    add("--subset", choices=["train", "val", "test"], default="test", help="of the split")
    add("--annotations", metavar="JSON", help="your own data instead, a COCO keypoints file (default: what "
        "the training was given as --val)")
    add("--images", metavar="DIR", help="its photos (default: those of the training)")
    add("--descriptions", metavar="JSON", help="texts that replace those of the same category")
    add("--allow-missing", action="store_true",
        help="go on without objects whose photo or prediction is missing")


def read_data(args, checkpoint, trained):
    """-> instances, {id: Category}, the annotation file, the folder of the photos, facts for the report.

    trained: the arguments of the checkpoint's training, {} without checkpoint.
    """
    if args.annotations or trained.get("annotations") and not (args.data or args.split):
        return read_own_data(args, checkpoint, trained)
    if args.images:
        raise InputError("--images goes with --annotations; MP-100's photos are in images/ of --data")
    root, split = args.data or trained.get("data", "data/mp100"), args.split or trained.get("split", 1)
    annotations = annotation_file(root, split, args.subset)
    if checkpoint:
        categories = parse_descriptions(checkpoint["descriptions"], args.checkpoint)
        categories |= read_descriptions(args.descriptions) if args.descriptions else {}
    else:
        categories = read_descriptions(args.descriptions or "descriptions.json")
    instances = read_instances(annotations, categories)
    return instances, categories, annotations, Path(root, "images"), {"split": split, "subset": args.subset}


def read_own_data(args, checkpoint, trained):
    """The same for a COCO keypoints file, whose categories are looked up by name, not by id."""
    if args.data or args.split or args.subset != "test":
        raise InputError("--data, --split and --subset are MP-100's; leave them out with --annotations")
    annotations, images = args.annotations or trained["val"], args.images or trained.get("images")
    if not annotations:
        raise InputError(f"{args.checkpoint}: was trained on {trained['annotations']} without --val; "
                         "say with --annotations what to evaluate")
    if checkpoint and not images:
        raise InputError(f"{annotations}: where are its photos? Say it with --images")
    texts = read_texts(args.descriptions) if args.descriptions else None
    if checkpoint:
        known = list_texts(parse_descriptions(checkpoint["descriptions"], args.checkpoint))
        texts = replace_texts(known, texts or [])
    instances, descriptions = read_coco(annotations, images, texts)
    categories = parse_descriptions(descriptions, annotations)
    return instances, categories, annotations, images, {"evaluated on": str(annotations)}


def main(argv):
    args = parse_arguments(argv)
    checkpoint = read_checkpoint(args.checkpoint) if args.checkpoint else None
    trained = checkpoint["args"] if checkpoint else {}
    instances, categories, annotations, images, facts = read_data(args, checkpoint, trained)
    if not instances:
        raise InputError(f"{annotations}: no object to evaluate")
    if "split" in facts and (shortfall := describe_shortfall(annotations)):
        say(shortfall)
    facts |= {"cumulative": True} if args.cumulative else {}
    if args.score:
        score(args, instances, categories, annotations, facts)
    else:
        evaluate_checkpoint(args, checkpoint, instances, categories, images, annotations, facts)


def score(args, instances, categories, annotations, facts):
    """Reports on the predictions of a file, without a network."""
    predicted = read_predictions(args.score, instances, args.allow_missing)
    known = [i for i, points in enumerate(predicted) if points is not None]
    if not known:
        raise InputError(f"{args.score}: no prediction for any object of {annotations}")
    if len(known) < len(instances):
        facts["without prediction"] = len(instances) - len(known)
    instances, predicted = [instances[i] for i in known], [predicted[i] for i in known]
    report = make_report(instances, predicted, categories, annotations, args.protocol, **facts)
    print_report(report)
    if args.report:
        write_json(args.report, report)


def find_folder(args):
    """Where the results of a checkpoint go: beside it, but those of best.pt into best/."""
    path = Path(args.checkpoint)
    folder = path.parent / "best" if path.name == "best.pt" else path.parent
    return Path(args.out or (folder if args.subset == "test" else folder / args.subset))


def evaluate_checkpoint(args, checkpoint, instances, categories, images, annotations, facts):
    """Asks a checkpoint's model about all instances, and writes the report, the predictions and a picture."""
    n_annotated = len(instances)
    instances = keep_readable(instances, images, categories, args.allow_missing)
    out = find_folder(args)
    make_folder(out)
    results, kept = ask_checkpoint(args, checkpoint, instances, categories, images)
    if results is None:
        return
    broken = [instance for i, instance in enumerate(instances) if results[i] is None]
    refuse_missing(broken, images, categories, args.allow_missing)
    instances, predictions = keep_answered(instances, results, images)
    predicted = points_of(predictions)
    facts["malformed"] = sum(point is None for points in predicted for point in points)
    facts["without photo"] = n_annotated - len(instances)
    report = make_report(instances, predicted, categories, annotations, args.protocol, **facts)
    print_report(report)
    write_json(args.report or out / "report.json", report)
    confidence = [[prediction.confidence for prediction in of_photo] for of_photo in predictions]
    write_json(out / "predictions.json", [
        {"annotation_id": instance.annotation_id, "keypoints": points,
         "confidence": [c and round(c, 2) for c in of_photo]}
        for instance, points, of_photo in zip(instances, predicted, confidence)])
    draw_sheet(out / "predictions.png", instances, predicted, categories, images, confidence)
    kept.remove()
    print(f"wrote {out}/report.json, predictions.json, predictions.png")


if __name__ == "__main__":
    run(main)
