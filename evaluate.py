"""Evaluates a checkpoint on MP-100, or scores predictions from anywhere (paper, section 4.1; Tables 2 to 9).

    python evaluate.py runs/split1/ckpt.pt                      all it needs is in the checkpoint; under torchrun the GPUs share the photos
    python evaluate.py --score predictions.json --split 1       the metric alone: neither network nor photographs

PCK@t is the share of an object's visible keypoints that are predicted closer than t times the longer side of its box, averaged over
objects; mPCK is the mean over five thresholds. Beside the checkpoint it leaves report.json, predictions.json and predictions.png.
"""

import argparse
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import crop_of, existing_photos, read_descriptions, read_objects, report_missing
from llama import InputError, read_json
from predict import check_decoding, draw_object, load_trained, predict, save_picture
from train import positive, quiet_worker, read_checkpoint, run, start_processes

THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25)


# ---------------------------------------------------------------------------------------------------------------- metric


def hits(object, prediction):
    """Which keypoints are predicted close enough: bool (5 thresholds, K). A prediction is (x, y) in pixels, or None for a miss."""
    prediction = np.array([p or (np.inf, np.inf) for p in prediction], dtype=np.float64)
    distance = np.linalg.norm(prediction - object.keypoints, axis=1)
    return distance < np.array(THRESHOLDS)[:, None] * max(object.box[2:])


def pck_of_queries(objects, predictions):
    """Every object once. -> (objects, 5) shares of visible keypoints hit; an object without any visible scores 0."""
    return np.array([hits(o, p)[:, o.visible].sum(1) / max(1, o.visible.sum()) for o, p in zip(objects, predictions)])


def pck_of_pairs(objects, predictions, category_order):
    """60,000 support-query pairs as sampled by earlier work: 200 times a support and 15 queries of each category.

    Counted are keypoints visible in both; a pair without any scores 0. CapeLLM's answer does not depend on the support.
    -> (pairs, 5) shares, and the (support, query) indices of the pairs.
    """
    members = defaultdict(list)
    for i, o in enumerate(objects):
        members[o.category].append(i)
    sampler, pairs = random.Random(1), []
    for category in category_order:
        for _ in range(200 if members[category] else 0):
            support, *queries = sampler.sample(members[category], min(16, len(members[category])))
            pairs += [(support, query) for query in queries]
    hit = [hits(o, p) for o, p in zip(objects, predictions)]
    both = [objects[s].visible & objects[q].visible for s, q in pairs]
    return np.array([hit[q][:, b].sum(1) / max(1, b.sum()) for (_, q), b in zip(pairs, both)]), pairs


def make_report(objects, predictions, categories, annotations, protocol, **facts):
    """predictions[i] belongs to objects[i]: K entries, (x, y) in pixels of the photo or None. -> what report.json holds."""
    shares, of = pck_of_queries(objects, predictions), np.array([o.category for o in objects])
    if protocol == "pairs":
        shares, pairs = pck_of_pairs(objects, predictions, [c["id"] for c in read_json(annotations).get("categories", [])])
        if not pairs:
            raise InputError(f"{annotations}: no pairs, since no category has two objects")
        of = of[[query for _, query in pairs]]

    def means(rows):
        return {f"PCK@{t:g}": v for t, v in zip(THRESHOLDS, rows.mean(0).tolist())} | {"mPCK": rows.mean(0).mean().item()}

    per_category = {f"{c} {categories[c].name}": means(shares[of == c]) for c in dict.fromkeys(of.tolist())}
    return {**means(shares), "objects": len(objects), "protocol": protocol, **facts, "per category": per_category}


def print_report(report):
    """Percent with two decimals: a line for each category, and the mean."""
    columns = [*(f"PCK@{t:g}" for t in THRESHOLDS), "mPCK"]
    print(f"\n{'':28}" + "".join(f"{c:>10}" for c in columns))
    for name, row in {**report["per category"], f"{report['objects']} objects": report}.items():
        print(f"{name:28.28}" + "".join(f"{100 * row[c]:10.2f}" for c in columns))
    print("\n" + ", ".join(f"{k}: {v}" for k, v in report.items() if k not in (*columns, "per category")))


def read_predictions(path, objects, allow_missing):
    """A predictions.json -> predictions in the order of `objects`. Entries for other annotations are passed over."""
    raw, predictions = read_json(path), {}
    try:
        for entry in raw:
            if entry["annotation_id"] in predictions:
                raise InputError(f"{path}: annotation {entry['annotation_id']} is predicted twice")
            predictions[entry["annotation_id"]] = [p and (float(p[0]), float(p[1])) for p in entry["keypoints"]]
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as e:
        raise InputError(f'{path}: not [{{"annotation_id": 7, "keypoints": [[x, y], ...]}}, ...] ({type(e).__name__}: {e})') from None
    for o in objects:
        if o.id not in predictions and not allow_missing:
            raise InputError(f"{path}: no prediction for annotation {o.id}; is it of this split? (--allow-missing counts misses)")
        points = predictions.setdefault(o.id, [None] * len(o.keypoints))
        if len(points) != len(o.keypoints):
            raise InputError(f"{path}: annotation {o.id} has {len(points)} keypoints predicted, {len(o.keypoints)} annotated")
        if not np.isfinite([p for p in points if p]).all():
            raise InputError(f"{path}: annotation {o.id} has a coordinate that is not a number; null stands for no answer")
    return [predictions[o.id] for o in objects]


# ------------------------------------------------------------------------------------------------------------- prediction


class Photos(torch.utils.data.Dataset):
    """Objects -> (index, crop), the crop None if the photo cannot be read."""

    def __init__(self, objects, root, size):
        self.objects, self.root, self.size = objects, root, size

    def __len__(self):
        return len(self.objects)

    def __getitem__(self, i):
        o = self.objects[i]
        try:
            return i, crop_of(o).cut(Path(self.root, "images", o.photo), self.size)
        except InputError:
            return i, None


def predict_objects(model, chat, objects, categories, batches, **how):
    """-> {index of object: [(point, confidence), ...]}, None for a photo that cannot be read. how: see predict()."""
    results = {}
    for batch in batches:
        results.update({i: None for i, image in batch if image is None})
        batch = [(i, image) for i, image in batch if image is not None]
        if batch:
            indices, images = zip(*batch)
            told = predict(model, chat, [crop_of(objects[i]) for i in indices], torch.stack(images),
                           [categories[objects[i].category] for i in indices], **how)
            results.update(zip(indices, told))
    return results


def run_checkpoint(args, checkpoint, objects, categories, root):
    """Asks the checkpoint's model, on all processes -> {index of object: [(point, confidence), ...]}; on all but the first None."""
    rank, world, device = start_processes()
    model, chat = load_trained(checkpoint, device, args.llm, args.vit)
    check_decoding(chat, args.decode, args.constrained)
    # Photos with as many keypoints share a batch, so that processes get equal shares; which share one depends on nothing else.
    order = sorted(range(len(objects)), key=lambda i: len(objects[i].keypoints))
    batches = [order[i:i + args.batch] for i in range(0, len(order), args.batch)][rank::world]
    photos = Photos(objects, root, checkpoint["args"]["image_size"])
    loader = DataLoader(photos, batch_sampler=batches, collate_fn=list, num_workers=args.workers, worker_init_fn=quiet_worker)
    results = predict_objects(model, chat, objects, categories, tqdm(loader, disable=rank > 0, dynamic_ncols=True),
                              constrained=args.constrained, decode=args.decode, cumulative=args.cumulative)
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, results)
        results = {i: told for part in gathered for i, told in part.items()}
    return results if rank == 0 else None


# ---------------------------------------------------------------------------------------------------------------- picture


def contact_sheet(path, objects, predictions, categories, root, n=12):
    """Draws n objects, taking turns between the categories, three to a row."""
    turns, seen = [], Counter()
    for i, o in enumerate(objects):
        turns.append((seen[o.category], i))
        seen[o.category] += 1
    tiles = []
    for _, i in sorted(turns)[:n]:
        o, category = objects[i], categories[objects[i].category]
        true = [tuple(p) if v else None for p, v in zip(o.keypoints, o.visible)]
        names = [name for name, _ in category.keypoints]
        tiles.append((category.name, draw_object(Path(root, "images", o.photo), crop_of(o), names, predictions[i], true)))
    rows = [tiles[i:i + 3] for i in range(0, len(tiles), 3)]
    width = max(sum(tile.width + 16 for _, tile in row) for row in rows) + 16
    sheet = Image.new("RGB", (width, 56 + sum(max(tile.height for _, tile in row) + 40 for row in rows)), "white")
    pen, title = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    pen.text((16, 14), "dot: predicted    ring: annotated    a long line is a large error", fill="black", font=title)
    y = 56
    for row in rows:
        x = 16
        for name, tile in row:
            pen.text((x, y - 4), name, fill="black", font=title)
            sheet.paste(tile, (x, y + 20))
            x += tile.width + 16
        y += max(tile.height for _, tile in row) + 40
    save_picture(sheet, path)


# ----------------------------------------------------------------------------------------------------------------- program


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description="Evaluates a checkpoint, or scores predictions.", allow_abbrev=False)
    parser.add_argument("checkpoint", nargs="?", help="what train.py wrote")
    parser.add_argument("--score", metavar="JSON", help="score these predictions instead")
    parser.add_argument("--data", help="MP-100; default: that of the checkpoint, or data/mp100")
    parser.add_argument("--split", type=int, help="default: that of the checkpoint, or 1")
    parser.add_argument("--subset", choices=["train", "val", "test"], default="test")
    parser.add_argument("--descriptions", help="texts that replace those of the same category")
    parser.add_argument("--llm", help="where its weights lie now, if they were moved since")
    parser.add_argument("--vit", help="likewise")
    parser.add_argument("--protocol", choices=["query", "pairs"], default="query", help="Table 2: each object once, or support-query pairs")
    parser.add_argument("--constrained", action="store_true", help="force the format of answers, so that none is malformed")
    parser.add_argument("--cumulative", action="store_true", help="ask a photo's keypoints one after another in one conversation, in the "
                        "order of the descriptions, the model's own answers among the questions")
    parser.add_argument("--decode", choices=["greedy", "median", "mean"], default="greedy", help="of the distribution of each coordinate")
    parser.add_argument("--allow-missing", action="store_true", help="go on without objects whose photo or prediction is missing")
    parser.add_argument("--batch", type=positive, default=8, help="photos asked at a time")
    parser.add_argument("--workers", type=int, default=2, help="processes that read photos, per GPU")
    parser.add_argument("--out", help="folder of the results; default: that of the checkpoint")
    parser.add_argument("--report", metavar="JSON", help="where the report goes; default: report.json in --out")
    args = parser.parse_args(argv)
    if bool(args.checkpoint) == bool(args.score):
        parser.error("give either a checkpoint or --score predictions.json")
    if args.score and (args.constrained or args.cumulative or args.decode != "greedy"):
        parser.error("--constrained, --cumulative and --decode say how a checkpoint is asked; --score asks nothing")
    return args


def main(argv):
    args = parse_arguments(argv)
    checkpoint = read_checkpoint(args.checkpoint) if args.checkpoint else {"args": {}}
    trained = argparse.Namespace(**checkpoint["args"])
    root = args.data or getattr(trained, "data", "data/mp100")
    split = args.split or getattr(trained, "split", 1)
    annotations = Path(root, "annotations", f"mp100_split{split}_{args.subset}.json")
    # The checkpoint's own texts; --descriptions replaces those of the same categories, and all of them if the file is gone.
    own = Path(getattr(trained, "descriptions", "descriptions.json"))
    categories = read_descriptions(own) if own.exists() or not args.descriptions else {}
    if args.descriptions:
        categories |= read_descriptions(args.descriptions)
    objects = read_objects(annotations, categories)
    if not objects:
        raise InputError(f"{annotations}: no object to evaluate")
    facts = {"split": split, "subset": args.subset, **({"cumulative": True} if args.cumulative else {})}

    if args.score:
        predictions = read_predictions(args.score, objects, args.allow_missing)
        report = make_report(objects, predictions, categories, annotations, args.protocol, **facts)
        print_report(report)
        if args.report:
            write_json(args.report, report)
        return

    n_annotated = len(objects)
    objects = existing_photos(objects, root, categories, args.allow_missing)
    results = run_checkpoint(args, checkpoint, objects, categories, root)
    if results is None:
        return
    report_missing([o for i, o in enumerate(objects) if results[i] is None], root, categories, args.allow_missing)
    read = [i for i in range(len(objects)) if results[i]]
    if not read:
        raise InputError(f"{root}/images: no readable photos to evaluate on")
    objects, results = [objects[i] for i in read], [results[i] for i in read]
    predictions = [[point for point, _ in told] for told in results]
    malformed = sum(point is None for points in predictions for point in points)
    report = make_report(objects, predictions, categories, annotations, args.protocol, **facts, malformed=malformed,
                         **{"without photo": n_annotated - len(objects)})
    print_report(report)
    out = Path(args.out or Path(args.checkpoint).parent)
    write_json(args.report or out / "report.json", report)
    write_json(out / "predictions.json", [
        {"annotation_id": o.id, "keypoints": points, "confidence": [confidence and round(confidence, 4) for _, confidence in told]}
        for o, points, told in zip(objects, predictions, results)])
    contact_sheet(out / "predictions.png", objects, predictions, categories, root)
    print(f"wrote {out}/report.json, predictions.json, predictions.png")


def write_json(path, contents):
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(contents, indent=1), encoding="utf-8")
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e})") from None


if __name__ == "__main__":
    run(main)
