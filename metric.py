"""PCK, the metric of MP-100, by two protocols (paper, section 4.1, Table 2).

PCK@t is the share of an instance's visible keypoints that are predicted closer than t times the longer side
of its box, averaged over instances. mPCK is the mean over five thresholds. Letter: K keypoints.
"""

import random
from collections import defaultdict

import numpy as np

from annotations import MAX_ID, by_id
from common import InputError, check, get_field, printable, read_json

THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25)


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
    """Earlier work's 60,000 support-query pairs: in 20 categories each 200 times a support and 15 queries.

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
    return {**means(shares), "objects": len(instances), "keypoints": sum(map(len, predicted)),
            "protocol": protocol, **facts, "per category": per_category}


def print_report(report):
    """Percent with two decimals: a line for each category, then the mean, then how it was made."""
    columns = [*(f"PCK@{t:g}" for t in THRESHOLDS), "mPCK"]
    print(f"\n{'':28}" + "".join(f"{c:>10}" for c in columns))
    for name, row in {**report["per category"], f"{report['objects']} objects": report}.items():
        print(f"{printable(name):28.28}" + "".join(f"{100 * row[c]:10.2f}" for c in columns))
    facts = {k: v for k, v in report.items() if k not in (*columns, "per category")}
    if "malformed" in facts:
        facts["malformed"] = f"{facts['malformed']} of {facts['keypoints']}"
    print("\n" + ", ".join(f"{k}: {v}" for k, v in facts.items()))
    if report.get("malformed") == report["keypoints"]:
        print("not one answer holds coordinates: is this checkpoint trained to the end, with these weights?")
    left_out = report.get("without photo", 0) + report.get("without prediction", 0)
    if left_out:
        print(f"predicted {report['objects']} of {report['objects'] + left_out} objects: others were left "
              "out (--allow-missing) and do not count")


def read_predictions(path, instances, allow_missing):
    """A predictions.json -> points in the order of `instances`, None for one that is not predicted.

    Entries for other annotations are ignored.
    """
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
                             "(--allow-missing leaves it out)")
        if number in points and len(points[number]) != K:
            raise InputError(f"{path}: annotation {number} has {len(points[number])} keypoints predicted, "
                             f"{K} annotated")
    return [points.get(instance.annotation_id) for instance in instances]


def parse_point(point, where):
    """[x, y], or null for no answer -> (x, y) or None."""
    if point is None:
        return None
    x, y = (float(check(v, where, float, -10**12, 10**12)) for v in check(point, where, list, 2, 2))
    return x, y
