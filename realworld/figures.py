"""What came of it: the curve of pre-training, and the best and worst answers about test photos.

    python -m realworld.figures runs/realworld/seed0 runs/realworld/seed0/tuned --data data/realworld

The first folder is pretrain.py's, the second that of train.py and evaluate.py. Into the second go
pretraining.png, and best.png and worst.png, which show photographs that may not be passed on: a ring is where
a keypoint is, the dot at the end of its line where the model says it is.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common import Parser, run
from data import annotation_file, crop_of, read_instances
from evaluate import pck_of_queries
from realworld.data import read_categories
from tools.score import read_predictions

SIDE = 240  # pixels of a photo in the pictures
INK, PALE, BLUE, RED = (40, 40, 48), (228, 228, 234), (46, 92, 184), (206, 52, 52)


def draw_curve(log, path):
    """The loss of talking and the share of first digits that are right, over the steps of pre-training."""
    lines = [line for line in map(json.loads, log.read_text().splitlines()) if line["talk"]]
    width, height, left, top = 640, 320, 50, 20
    picture = Image.new("RGB", (width + 2 * left, height + 3 * top), "white")
    pen = ImageDraw.Draw(picture)
    steps = np.array([line["step"] for line in lines])
    for tenth in range(0, 11, 2):
        y = top + height * (1 - tenth / 10)
        pen.line((left, y, left + width, y), PALE)
        pen.text((left - 8, y), f"{10 * tenth}%", BLUE, anchor="rm")
        pen.text((left + width + 8, y), f"{0.3 * tenth:.1f}", RED, anchor="lm")
    for key, most, colour, text in [("first_digits", 1, BLUE, "first digits right, training photos"),
                                    ("talk", 3, RED, "loss of the answers")]:
        x = left + width * (steps - steps[0]) / max(1, steps[-1] - steps[0])
        y = top + height * (1 - np.array([line[key] for line in lines]) / most)
        pen.line([*zip(x.tolist(), y.tolist())], colour, 3)
        i = len(x) // 4 if key == "talk" else 3 * len(x) // 4
        pen.text((x[i], y[i] - 12), text, colour, anchor="mb")
    pen.text((left, top + height + 10), f"step {steps[0]}", INK)
    pen.text((left + width, top + height + 10), f"step {steps[-1]}, {lines[-1]['seconds'] / 60:.0f} minutes",
             INK, anchor="ra")
    picture.save(path)


def draw_answers(instance, points, images):
    crop = crop_of(instance, 1.2)
    picture = Image.fromarray(crop.cut(images / instance.photo, SIDE).permute(1, 2, 0).numpy())
    pen = ImageDraw.Draw(picture)
    for true, found, shown in zip(instance.keypoints, points, instance.visible):
        if shown and found:
            (x, y), (u, v) = SIDE * crop.from_photo(np.array([true, found]))
            pen.line((x, y, u, v), "white")
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), outline="yellow", width=2)
            pen.ellipse((u - 2, v - 2, u + 2, v + 2), fill="red")
    return picture


def draw_best_and_worst(tuned, data, n=5):
    """Of each category at most one photo among the best, and one among the worst."""
    categories = read_categories()
    instances = read_instances(annotation_file(data, 1, "test"), categories)
    instances, predicted, _ = read_predictions(tuned / "predictions.json", instances, allow_missing=False)
    scores = pck_of_queries(instances, predicted).mean(1)
    order = [i for i in np.argsort(-scores, kind="stable") if instances[i].visible.sum() > 1]
    for name, chosen in ("best", order), ("worst", order[::-1]):
        first = {instances[i].category_id: i for i in reversed(chosen)}  # the foremost of each category
        first = [i for i in chosen if first[instances[i].category_id] == i][:n]
        sheet = Image.new("RGB", (n * SIDE, SIDE + 20), "white")
        for k, i in enumerate(first):
            category = categories[instances[i].category_id]
            sheet.paste(draw_answers(instances[i], predicted[i], data / "images"), (k * SIDE, 20))
            ImageDraw.Draw(sheet).text((k * SIDE + 4, 4), f"{category.name[:26]} {scores[i]:.0%}", INK)
        sheet.save(tuned / f"{name}.png")


def main(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("pretrained", type=Path)
    parser.add_argument("tuned", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args(argv)
    draw_curve(args.pretrained / "log.jsonl", args.tuned / "pretraining.png")
    draw_best_and_worst(args.tuned, args.data)


if __name__ == "__main__":
    run(main)
