"""CapeLLM in miniature: draws a toy MP-100, fine-tunes tiny backbones, evaluates on categories never seen.

    python toy.py               minutes on a CPU; leaves runs/toy/ with ckpt.pt, report.json, predictions.png
    python toy.py --variants    the paper's variants in miniature, in an hour and a half; can be stopped
    python toy.py --pretrain    makes the backbones of assets/toy from scratch, in 23 minutes on one core

Training and evaluation are those of train.py and evaluate.py, in their files and folders. Two worlds share
kinds of parts and colours, and little else. The backbones were trained on sheets, loose parts on paper; the
toy MP-100 holds creatures. Every test category has parts that neither world has shown before. See toyworld/.
"""

import contextlib
import io
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import evaluate
import train
from common import InputError, Parser, natural, read_json, run
from data import annotation_file, crop_of, parse_descriptions, read_instances
from tools.score import read_predictions
from toyworld.creatures import draw_toy, write_descriptions

# relative to where the program runs, so that checkpoints find the backbones after the folder was moved
ASSETS = Path(os.path.relpath(Path(__file__).parent / "assets/toy"))
NETWORK = ["--vit", f"{ASSETS}/vit", "--llm", f"{ASSETS}/llm", "--image-size", "112"]  # 8 x 8 patches
RECIPE = ["--epochs", "3", "--warmup", "0.1", "--batch", "16", "--micro-batch", "16", "--lr", "5e-3",
          "--workers", "1", "--clip", "0"]  # clipped from the first step, it stays on its first plateau


# ----------------------------------------------------------------------------------------------- comparisons


def shuffle_texts(out, seed):
    """Writes OUT/other_text/descriptions.json, where keypoint k has another's description, others[k].

    -> {category id: others}.
    """
    rng, others, shuffled = np.random.default_rng(seed), {}, {}
    for number, category in read_categories(out).items():
        circle = rng.permutation(len(category.keypoints))
        others[number] = np.empty_like(circle)
        others[number][circle] = np.roll(circle, 1)
        names, texts = zip(*category.keypoints)
        shuffled[number] = category.name, [(name, texts[k]) for name, k in zip(names, others[number])]
    (out / "other_text").mkdir(exist_ok=True)
    write_descriptions(out / "other_text/descriptions.json", shuffled)
    return others


def read_categories(out):
    path = out / "descriptions.json"
    return parse_descriptions(read_json(path), path)


def without_ordinal(name):
    return name.split(" ", 1)[1]


def mean_places(instances, categories):
    """Where keypoints of a name are on average: {name less its ordinal: (x, y) in fractions of the crop}."""
    places = {}
    for instance in instances:
        points = crop_of(instance).from_photo(instance.keypoints)
        for (name, _), point in zip(categories[instance.category_id].keypoints, points):
            places.setdefault(without_ordinal(name), []).append(point)
    return {name: np.mean(points, axis=0) for name, points in places.items()}


def print_table(out, others):
    categories = read_categories(out)
    seen, unseen = (read_instances(annotation_file(out / "data", 1, subset), categories)
                    for subset in ("train", "test"))
    means = mean_places(seen, categories)

    def guess(instance):
        places = [means[without_ordinal(name)] for name, _ in categories[instance.category_id].keypoints]
        return crop_of(instance).to_photo(places).tolist()

    def score_on_others(instance):
        order = others[instance.category_id]
        return replace(instance, keypoints=instance.keypoints[order], visible=instance.visible[order])

    def read(folder):
        _, points, _ = read_predictions(folder / "predictions.json", unseen, allow_missing=False)
        return points

    misled = read(out / "other_text")
    rows = {
        "CapeLLM": (unseen, read(out)),
        "CapeLLM, median of the distributions": (unseen, read(out / "median")),
        "asked with another keypoint's description": (unseen, misled),
        "the same answers, scored on that other keypoint": ([score_on_others(o) for o in unseen], misled),
        "mean place of keypoints of that name": (unseen, [guess(o) for o in unseen])}
    print(f"\n{'toy categories never seen, % of keypoints found':50}"
          f"{'PCK@0.05':>10}{'PCK@0.1':>10}{'PCK@0.2':>10}{'mPCK':>10}")
    for name, (instances, points) in rows.items():
        pck = dict(zip(evaluate.THRESHOLDS, 100 * evaluate.pck_of_queries(instances, points).mean(0)))
        shown = pck[0.05], pck[0.1], pck[0.2], sum(pck.values()) / len(pck)
        print(f"{name:50}{''.join(f'{x:10.1f}' for x in shown)}")


# ----------------------------------------------------------------------------------------------- program


def main(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretrain", action="store_true", help="make the backbones of assets/toy instead")
    parser.add_argument("--variants", action="store_true", help="compare the paper's variants instead")
    parser.add_argument("--seed", type=natural, default=0,
                        help="another seed draws another toy MP-100 and trains on it")
    parser.add_argument("--out", type=Path, help="by default runs/toy, runs/variants or assets/toy")
    args = parser.parse_args(argv)
    # Two threads are hardly faster on networks so small, and with one every machine adds in the same order.
    torch.set_num_threads(1)
    if args.pretrain:
        from toyworld.pretrain import make_backbones
        return make_backbones(args.out or ASSETS)
    if args.variants:
        from toyworld.variants import compare_variants
        return compare_variants(args.out or Path("runs/variants"), NETWORK + RECIPE)

    out, times = args.out or Path("runs/toy"), [time.perf_counter()]
    if not (out / "data/toy").exists():
        for name in "data", "descriptions.json", "ckpt.pt":
            if (out / name).exists():
                raise InputError(f"{out}/{name}: not the toy's, and would be replaced; choose another --out")
    draw_toy(out, args.seed)
    times.append(time.perf_counter())
    (out / "ckpt.pt").unlink(missing_ok=True)
    train.main(["--data", f"{out}/data", "--descriptions", f"{out}/descriptions.json", "--out", str(out),
                "--seed", str(args.seed), *NETWORK, *RECIPE])
    times.append(time.perf_counter())
    checkpoint, others = f"{out}/ckpt.pt", shuffle_texts(out, args.seed)
    evaluate.main([checkpoint])
    with contextlib.redirect_stdout(io.StringIO()):
        evaluate.main([checkpoint, "--decode", "median", "--out", f"{out}/median"])
        evaluate.main([checkpoint, "--decode", "median", "--out", f"{out}/other_text",
                       "--descriptions", f"{out}/other_text/descriptions.json"])
    times.append(time.perf_counter())
    print_table(out, others)
    print("\ndrawing {:.0f} s, training {:.0f} s, evaluation {:.0f} s".format(*np.diff(times)))
    print(f"the picture: {out}/predictions.png")


if __name__ == "__main__":
    run(main)
