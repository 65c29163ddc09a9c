"""Evaluates a checkpoint on MP-100 or own data, or scores predictions (paper, section 4.1; Tables 2 to 9).

    python evaluate.py runs/split1/ckpt.pt                  all it needs is in the checkpoint; torchrun works
    python evaluate.py --score predictions.json --split 1   the metric alone, without network and photographs
    python evaluate.py CKPT --annotations val.json --images photos          your own data, see coco.py

PCK@t is the share of an instance's visible keypoints that are predicted closer than t times the longer side
of its box, averaged over instances. mPCK is the mean over five thresholds. Beside the checkpoint it leaves
report.json, predictions.json and predictions.png. Letters: P photos, K keypoints.
"""

import argparse
import random
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoint import load_trained, read_checkpoint
from coco import list_texts, read_coco, read_texts, replace_texts
from common import (
    InputError,
    check,
    get_field,
    natural,
    positive,
    printable,
    read_json,
    run,
    silence_worker,
    start_processes,
    write_json,
)
from data import (
    MAX_ID,
    by_id,
    crop_of,
    keep_readable,
    normalize,
    parse_descriptions,
    read_descriptions,
    read_instances,
    refuse_missing,
)
from decode import locate
from draw import draw_sheet
from model import DTYPES

THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25)


# ---------------------------------------------------------------------------------------------------- metric


def find_hits(instance, points):
    """Which keypoints are predicted close enough: bool (5 thresholds, K).

    points: for each keypoint (x, y) in pixels of the photo, or None, which is a miss.
    """
    points = np.array([point or (np.inf, np.inf) for point in points], dtype=np.float64)
    distance = np.linalg.norm(points - instance.keypoints, axis=1)
    return distance < np.array(THRESHOLDS)[:, None] * max(instance.box[2:])


def pck_of_queries(instances, predicted):
    """Every instance once. -> (instances, 5): shares of visible keypoints hit, 0 where none is visible."""
    return np.array([find_hits(o, points)[:, o.visible].sum(1) / max(1, o.visible.sum())
                     for o, points in zip(instances, predicted)])


def pck_of_pairs(instances, predicted, category_order):
    """Earlier work's 60,000 support-query pairs: 200 times one support and 15 queries of each category.

    Only keypoints visible in both count; a pair that shares none scores 0. CapeLLM's answers do not depend on
    the support. -> (pairs, 5): shares of keypoints hit, and the pairs, (support, query) indices of instances.
    """
    members = defaultdict(list)
    for i, instance in enumerate(instances):
        members[instance.category_id].append(i)
    sampler, pairs = random.Random(1), []
    for category_id in category_order:
        of_category = members[category_id]
        for _ in range(200 if of_category else 0):
            support, *queries = sampler.sample(of_category, min(16, len(of_category)))
            pairs += [(support, query) for query in queries]
    hits = [find_hits(o, points) for o, points in zip(instances, predicted)]
    both = [instances[support].visible & instances[query].visible for support, query in pairs]
    shares = [hits[query][:, seen].sum(1) / max(1, seen.sum()) for (_, query), seen in zip(pairs, both)]
    return np.array(shares), pairs


def make_report(instances, predicted, categories, annotations, protocol, **facts):
    """predicted[i]: instance i's K points in pixels, None for no answer. -> what report.json holds."""
    shares = pck_of_queries(instances, predicted)
    category_ids = np.array([instance.category_id for instance in instances])
    if protocol == "pairs":
        order = by_id(read_json(annotations), "categories", "category", annotations)
        shares, pairs = pck_of_pairs(instances, predicted, order)
        if not pairs:
            raise InputError(f"{annotations}: no pairs, since no category has two objects")
        category_ids = category_ids[[query for _, query in pairs]]

    def means(rows):
        pck = {f"PCK@{t:g}": share for t, share in zip(THRESHOLDS, rows.mean(0).tolist())}
        return {**pck, "mPCK": rows.mean(0).mean().item()}

    per_category = {f"{c} {categories[c].name}": means(shares[category_ids == c])
                    for c in dict.fromkeys(category_ids.tolist())}
    return {**means(shares), "objects": len(instances), "protocol": protocol, **facts,
            "per category": per_category}


def print_report(report):
    """Percent with two decimals: a line for each category, then the mean."""
    columns = [*(f"PCK@{t:g}" for t in THRESHOLDS), "mPCK"]
    print(f"\n{'':28}" + "".join(f"{c:>10}" for c in columns))
    for name, row in {**report["per category"], f"{report['objects']} objects": report}.items():
        print(f"{printable(name):28.28}" + "".join(f"{100 * row[c]:10.2f}" for c in columns))
    print("\n" + ", ".join(f"{k}: {v}" for k, v in report.items() if k not in (*columns, "per category")))


def read_predictions(path, instances, allow_missing):
    """A predictions.json -> points in the order of `instances`. Entries for other annotations are ignored."""
    wrong, points = f'{path}: not [{{"annotation_id": 7, "keypoints": [[x, y], ...]}}, ...]', {}
    for entry in check(read_json(path), f"{wrong}: it", list, 0, 10**7):
        number = get_field(entry, "annotation_id", wrong, int, -MAX_ID, MAX_ID)
        if number in points:
            raise InputError(f"{path}: annotation {number} is predicted twice")
        points[number] = [parse_point(point, f"{wrong}: annotation {number} has a point that")
                          for point in get_field(entry, "keypoints", wrong, list, 0, 1000)]
    for instance in instances:
        number, K = instance.annotation_id, len(instance.keypoints)
        if number not in points and not allow_missing:
            raise InputError(f"{path}: no prediction for annotation {number}; is it of this split? "
                             "(--allow-missing counts misses)")
        found = points.setdefault(number, [None] * K)
        if len(found) != K:
            raise InputError(f"{path}: annotation {number} has {len(found)} keypoints predicted, "
                             f"{K} annotated")
    return [points[instance.annotation_id] for instance in instances]


def parse_point(point, where):
    """[x, y], or null for no answer -> (x, y) or None."""
    if point is None:
        return None
    x, y = (float(check(v, where, float, -10**12, 10**12)) for v in check(point, where, list, 2, 2))
    return x, y


# -------------------------------------------------------------------------------------------- asking a model


def check_decoding(chat, decode, constrained=False):
    """InputError if a model's answers cannot be read in the way that was asked for."""
    chooses_digits = chat.keypoint is None and chat.coordinates.digits
    if not chooses_digits and (constrained or decode != "greedy"):
        option = "--constrained" if constrained else f"--decode {decode}"
        raise InputError(f"{option}: this model does not spell points in digits, one or three at a time; "
                         "leave it out")


def predict(model, chat, crops, images, categories, cumulative=False, **how):
    """Asks for all keypoints of photos. images uint8 (P, 3, size, size), the pixels of `crops`.

    crops, images and categories have one entry for each photo. -> for each photo a list of Predictions, with
    points in pixels of the photo. how: see decode.locate().
    """
    device = model.projection.weight.device
    questions = [chat.questions(category, cumulative) for category in categories]
    predictions = locate(model, normalize(images.to(device)), questions, chat, cumulative=cumulative, **how)
    return [[replace(p, point=p.point and tuple(crop.to_photo(p.point).tolist())) for p in of_photo]
            for crop, of_photo in zip(crops, predictions)]


class Photos(torch.utils.data.Dataset):
    """Instances -> (index, image of the crop), the image None if the photo cannot be read."""

    def __init__(self, instances, folder, size):
        self.instances, self.folder, self.size = instances, folder, size

    def __len__(self):
        return len(self.instances)

    def __getitem__(self, i):
        try:
            photo = Path(self.folder, self.instances[i].photo)
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


def predict_instances(model, chat, instances, categories, batches, **how):
    """Asks about batches of (index, image) -> {index: list of Predictions}, None for an unreadable photo."""
    results = {}
    for batch in batches:
        results.update({i: None for i, image in batch if image is None})
        batch = [(i, image) for i, image in batch if image is not None]
        if batch:
            indices, images = zip(*batch)
            found = predict(model, chat, [crop_of(instances[i]) for i in indices], torch.stack(images),
                            [categories[instances[i].category_id] for i in indices], **how)
            for i, predictions in zip(indices, found):  # without the distributions, 16 kB a keypoint
                results[i] = [replace(prediction, x=None, y=None) for prediction in predictions]
    return results


def ask_checkpoint(args, checkpoint, instances, categories, images):
    """Shares out the photos between all processes -> what predict_instances() gives.

    On every process but the first, None.
    """
    rank, world, device = start_processes()
    model, chat = load_trained(checkpoint, device, args.llm, args.vit, args.dtype)
    check_decoding(chat, args.decode, args.constrained)
    loader = DataLoader(Photos(instances, images, checkpoint["args"]["image_size"]), collate_fn=list,
                        batch_sampler=make_batches(instances, args.batch)[rank::world],
                        num_workers=args.workers, worker_init_fn=silence_worker)
    results = predict_instances(
        model, chat, instances, categories, tqdm(loader, disable=rank > 0, dynamic_ncols=True),
        constrained=args.constrained, decode=args.decode, cumulative=args.cumulative)
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, results)
        results = {i: found for part in gathered for i, found in part.items()}
    return results if rank == 0 else None


# --------------------------------------------------------------------------------------------------- program


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description="Evaluates a checkpoint, or scores predictions.",
                                     allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", nargs="?", help="what train.py wrote")
    add("--score", metavar="JSON", help="score these predictions instead")
    add("--data", help="MP-100; default: that of the checkpoint, or data/mp100")
    add("--split", type=positive, help="default: that of the checkpoint, or 1")
    add("--annotations", metavar="JSON", help="your own data instead, a COCO keypoints file; default: what "
        "the training was given as --val")
    add("--images", metavar="DIR", help="its photos; default: those of the training")
    add("--subset", choices=["train", "val", "test"], default="test")
    add("--descriptions", help="texts that replace those of the same category")
    add("--llm", help="where its weights are now, if they were moved since")
    add("--vit", help="likewise")
    add("--dtype", choices=DTYPES,
        help="of frozen weights and of computing; default: bf16 on CUDA, fp32 elsewhere")
    add("--protocol", choices=["query", "pairs"], default="query",
        help="Table 2: each object once, or support-query pairs")
    add("--constrained", action="store_true", help="hold answers to the format, so that none is malformed")
    add("--cumulative", action="store_true", help="ask a photo's keypoints one after another in one "
        "conversation, in the order of the descriptions, the model's own answers among the questions")
    add("--decode", choices=["greedy", "median", "mean"], default="greedy",
        help="what to take of each coordinate's distribution")
    add("--allow-missing", action="store_true",
        help="go on without objects whose photo or prediction is missing")
    add("--batch", type=positive, default=64, help="questions asked at a time: memory against speed")
    add("--workers", type=partial(natural, most=1000), default=2, help="processes that read photos, per GPU")
    add("--out", help="folder of the results; default: that of the checkpoint, with val/ or train/ for those")
    add("--report", metavar="JSON", help="where the report goes; default: report.json in --out")
    args = parser.parse_args(argv)
    if bool(args.checkpoint) == bool(args.score):
        parser.error("give either a checkpoint or --score predictions.json")
    if args.score and (args.constrained or args.cumulative or args.decode != "greedy"):
        parser.error("--constrained, --cumulative and --decode say how a checkpoint is asked; "
                     "--score asks nothing")
    return args


def read_data(args, checkpoint, trained):
    """-> instances, {id: Category}, the annotation file, the folder of the photos, facts for the report.

    trained: the arguments of the checkpoint's training, {} without checkpoint.
    """
    if args.annotations or trained.get("annotations") and not (args.data or args.split):
        return read_own_data(args, checkpoint, trained)
    if args.images:
        raise InputError("--images goes with --annotations; MP-100's photos are in images/ of --data")
    root, split = args.data or trained.get("data", "data/mp100"), args.split or trained.get("split", 1)
    annotations = Path(root, "annotations", f"mp100_split{split}_{args.subset}.json")
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
    rank, *_ = start_processes()
    say = print if rank == 0 else lambda *_: None
    instances, descriptions = read_coco(annotations, images, texts, say)
    categories = parse_descriptions(descriptions, annotations)
    return instances, categories, annotations, images, {"evaluated on": str(annotations)}


def main(argv):
    args = parse_arguments(argv)
    checkpoint = read_checkpoint(args.checkpoint) if args.checkpoint else None
    trained = checkpoint["args"] if checkpoint else {}
    instances, categories, annotations, images, facts = read_data(args, checkpoint, trained)
    if not instances:
        raise InputError(f"{annotations}: no object to evaluate")
    facts |= {"cumulative": True} if args.cumulative else {}
    if args.score:
        predicted = read_predictions(args.score, instances, args.allow_missing)
        report = make_report(instances, predicted, categories, annotations, args.protocol, **facts)
        print_report(report)
        if args.report:
            write_json(args.report, report)
    else:
        evaluate_checkpoint(args, checkpoint, instances, categories, images, annotations, facts)


def evaluate_checkpoint(args, checkpoint, instances, categories, images, annotations, facts):
    """Asks a checkpoint's model about all instances, and writes the report, the predictions and a picture."""
    n_annotated = len(instances)
    instances = keep_readable(instances, images, categories, args.allow_missing)
    results = ask_checkpoint(args, checkpoint, instances, categories, images)
    if results is None:
        return
    broken = [instance for i, instance in enumerate(instances) if results[i] is None]
    refuse_missing(broken, images, categories, args.allow_missing)
    read = [i for i in range(len(instances)) if results[i]]
    if not read:
        raise InputError(f"{images}: no readable photos to evaluate on")
    instances, predictions = [instances[i] for i in read], [results[i] for i in read]
    predicted = [[prediction.point for prediction in of_photo] for of_photo in predictions]
    facts["malformed"] = sum(point is None for points in predicted for point in points)
    facts["without photo"] = n_annotated - len(instances)
    report = make_report(instances, predicted, categories, annotations, args.protocol, **facts)
    print_report(report)
    folder = Path(args.checkpoint).parent
    out = Path(args.out or (folder if args.subset == "test" else folder / args.subset))
    write_json(args.report or out / "report.json", report)
    write_json(out / "predictions.json", [
        {"annotation_id": instance.annotation_id, "keypoints": points,
         "confidence": [p.confidence and round(p.confidence, 2) for p in of_photo]}
        for instance, points, of_photo in zip(instances, predicted, predictions)])
    confidence = [[prediction.confidence for prediction in of_photo] for of_photo in predictions]
    draw_sheet(out / "predictions.png", instances, predicted, categories, images, confidence)
    print(f"wrote {out}/report.json, predictions.json, predictions.png")


if __name__ == "__main__":
    run(main)
