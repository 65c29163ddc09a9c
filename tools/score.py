"""Around the metric: predictions of any program, read for evaluate.py --score, and confidence intervals."""

import math

import numpy as np

from common import InputError, read_json, reading


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
