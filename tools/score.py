"""Around the metric: texts to ask with, predictions of other programs, the report and its intervals."""

import math
from pathlib import Path

import numpy as np

from common import InputError, make_folder, printable, read_json, reading, say, write_json
from data import parse_descriptions
from decode import find
from evaluate import THRESHOLDS, find_hits, pck_of_pairs, pck_of_queries
from tools.draw import draw_sheet

COLUMNS = [*(f"PCK@{t:g}" for t in THRESHOLDS), "mPCK"]


def choose_texts(args, checkpoint):
    """-> {id: Category}: those of the checkpoint, replaced by those of --descriptions or in --data."""
    known = parse_descriptions(checkpoint["descriptions"], args.checkpoint) if checkpoint else {}
    own = Path(args.data, "descriptions.json") if args.data else None
    path = args.descriptions or (own if own and own.exists() else None)
    if checkpoint and not path:
        return known
    path = path or find("descriptions.json")
    say(f"descriptions: {path}")
    return known | parse_descriptions(read_json(path), path)


def choose_folder(args):
    """Makes the folder of the results: beside the checkpoint, but never among this repository's own files."""
    path, root = Path(args.checkpoint), Path(__file__).resolve().parents[1]
    folder, whole = path.parent, path.resolve().parent
    if whole.is_relative_to(root / "assets"):
        folder = Path("runs", whole.name)
    folder = folder / "best" if path.name == "best.pt" else folder
    folder = Path(args.out or (folder if args.subset == "test" else folder / args.subset))
    make_folder(folder)
    return folder


def read_predictions(path, instances, allow_missing):
    """A predictions.json -> the instances that it has, their points, and facts about the others."""
    points, annotated = {}, {o.annotation_id: len(o.keypoints) for o in instances}
    with reading(path, 'it should be [{"annotation_id": 7, "keypoints": [[x, y], ...]}, ...]'):
        for entry in read_json(path):
            number, of_object = entry["annotation_id"], entry["keypoints"]
            if number in points:
                raise InputError(f"{path}: annotation {number} is predicted twice")
            points[number] = [p if p is None else tuple(map(float, p)) for p in of_object]
            if not all(p is None or len(p) == 2 and math.isfinite(sum(p)) for p in points[number]):
                raise InputError(f"{path}: annotation {number} has a point that is not two numbers")
            if len(of_object) != annotated.get(number, len(of_object)):
                raise InputError(f"{path}: annotation {number} has {len(of_object)} keypoints predicted, "
                                 f"{annotated[number]} annotated")
    known = [o for o in instances if o.annotation_id in points]
    absent, others = annotated.keys() - points, points.keys() - annotated
    if absent and not (known and allow_missing):
        raise InputError(f"{path}: no prediction for {len(absent)} of {len(annotated)} objects, e.g. "
                         f"annotation {min(absent)}; is it of this split? (--allow-missing leaves them out)")
    facts = {"without prediction": len(absent), "predicted but not in the split": len(others)}
    return known, [points[o.annotation_id] for o in known], {name: n for name, n in facts.items() if n}


def find_intervals(shares, objects):
    """The 95 % interval of each column's mean. Bootstrap: the objects are drawn anew 2,000 times.

    shares (rows, 6); objects (rows,): the one that each row is about -> (6, 2).
    """
    N, objects = len(set(objects)), np.unique(objects, return_inverse=True)[1]
    sums = np.zeros((N, 7))  # of each object's rows, and their number
    np.add.at(sums, objects, np.c_[shares, np.ones(len(shares))])
    drawn = np.random.default_rng(0).multinomial(N, np.full(N, 1 / N), size=2000) @ sums  # (2000, 7)
    return np.percentile(drawn[:, :6] / drawn[:, 6:], (2.5, 97.5), axis=0).T


def find_worst(instances, predicted, categories, most=10):
    """The keypoints that are found least often, with the texts that they were asked with.

    PCK@0.2 is here a share of the objects that show the keypoint. Of equals, those that more show come first.
    """
    hits = {}
    for instance, points in zip(instances, predicted):
        close = find_hits(instance, points)[THRESHOLDS.index(0.2)]
        for k in np.flatnonzero(instance.visible).tolist():
            hits.setdefault((instance.category_id, k), []).append(close[k])
    worst = sorted(hits, key=lambda which: (np.mean(hits[which]), -len(hits[which])))[:most]
    return [{"category": f"{c} {categories[c].name}", "keypoint": categories[c].keypoints[k][0],
             "description": categories[c].keypoints[k][1], "PCK@0.2": float(np.mean(hits[c, k])),
             "objects": len(hits[c, k])} for c, k in worst]


def make_report(instances, predicted, categories, annotations, protocol, **facts):
    """predicted[i]: instance i's K points in pixels, None for no answer. -> what report.json holds."""
    shares, queries = pck_of_queries(instances, predicted), np.arange(len(instances))
    if protocol == "pairs":
        order = [category["id"] for category in read_json(annotations)["categories"]]
        shares, pairs = pck_of_pairs(instances, predicted, order)
        if not pairs:
            raise InputError(f"{annotations}: no pairs, since no category has two objects")
        queries = np.array(pairs)[:, 1]
    shares = np.c_[shares, shares.mean(1)]  # (rows, 6)
    category_ids = np.array([instance.category_id for instance in instances])[queries]

    def by_column(values):
        return dict(zip(COLUMNS, values.tolist()))
    per_category = {f"{c} {categories[c].name}": by_column(shares[category_ids == c].mean(0))
                    for c in dict.fromkeys(category_ids.tolist())}
    return {**by_column(shares.mean(0)), "interval": by_column(find_intervals(shares, queries)),
            "objects": len(instances), "keypoints": sum(map(len, predicted)), "protocol": protocol, **facts,
            "worst keypoints": find_worst(instances, predicted, categories), "per category": per_category}


def print_report(report):
    """In percent: a line for each category, the mean and its interval, then how it was made."""
    print(f"\n{'':28}" + "".join(f"{column:>12}" for column in COLUMNS))
    for name, row in {**report["per category"], f"{report['objects']} objects": report}.items():
        print(f"{printable(name):28.28}" + "".join(f"{100 * row[column]:12.2f}" for column in COLUMNS))
    ranges = ((100 * low, 100 * high) for low, high in report["interval"].values())
    print(f"{'95 % interval':28}" + "".join(f"{f'{low:.1f}-{high:.1f}':>12}" for low, high in ranges))
    print("\n" + ", ".join(f"{name}: {value}" for name, value in report.items()
                           if name not in (*COLUMNS, "interval", "worst keypoints", "per category")))
    if report.get("malformed") == report["keypoints"]:
        print("not one answer holds coordinates: is this checkpoint trained to the end, with these weights?")


def write_results(path, out, report, instances, points, confidences, categories, folder):
    """Prints a report and writes it to `path`, by default into the folder `out`, with answers and a picture.

    out: None if only a report is wanted, of what another program predicted.
    """
    print_report(report)
    path = path or (out / "report.json" if out else None)
    if path:
        write_json(path, report)
    if out:
        write_json(out / "predictions.json", [
            {"annotation_id": o.annotation_id, "keypoints": p, "confidence": [v and round(v, 2) for v in c]}
            for o, p, c in zip(instances, points, confidences)])
        draw_sheet(out / "predictions.png", instances, points, categories, folder, confidences)
        print(f"wrote {path}, {out}/predictions.json and {out}/predictions.png")
