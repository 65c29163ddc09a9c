"""What can be had without words: two guesses at the test's keypoints, scored as evaluate.py scores answers.

    python -m realworld.baselines --data data/realworld --vit facebook/dinov2-small --out runs/realworld

mean place: a keypoint is where those of its name are on average in the training photos, in fractions of the
crop; where all keypoints are on average if none has its name. nearest patch: one photo of the same category,
drawn at random, shows where its keypoints are; the patch most like that one, by DINOv2's features, is the
guess. Words alone must do without that photo. Writes OUT/baselines.json.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import Parser, run
from data import annotation_file, crop_of, read_instances
from realworld.data import read_categories
from realworld.features import look
from tools.score import make_report, print_report
from vit import ViT


def mean_places(instances, categories):
    """-> {name: (x, y)} in fractions of the crop, "" for all keypoints together."""
    places = {}
    for instance in instances:
        points = crop_of(instance).from_photo(instance.keypoints)
        names = [name for name, _ in categories[instance.category_id].keypoints]
        for name, point, is_shown in zip(names, points, instance.visible):
            for key in [name, ""] if is_shown else []:
                places.setdefault(key, []).append(point)
    return {name: np.mean(points, axis=0) for name, points in places.items()}


def guess_means(instances, categories, means):
    for instance in instances:
        names = [name for name, _ in categories[instance.category_id].keypoints]
        guess = [means[name if name in means else ""] for name in names]
        yield [tuple(point) for point in crop_of(instance).to_photo(guess)]


def guess_by_patches(instances, vit, images, seed):
    """For keypoints that the support photo does not show, the middle of the crop."""
    crops = [(instance, crop_of(instance)) for instance in instances]
    patches = F.normalize(look(vit, images, crops, "looking")["patches"].float(), dim=-1)  # (n, P * P, D)
    P = round(patches.shape[1] ** 0.5)
    rng, members = np.random.default_rng(seed), {}
    for i, instance in enumerate(instances):
        members.setdefault(instance.category_id, []).append(i)
    for i, (instance, crop) in enumerate(crops):
        support = int(rng.choice([j for j in members[instance.category_id] if j != i]))
        points = crops[support][1].from_photo(instances[support].keypoints)
        column, row = np.clip((P * points).astype(int), 0, P - 1).T
        likeness = patches[support][row * P + column] @ patches[i].T  # (K, P * P)
        best = likeness.argmax(-1).numpy()
        guess = (np.stack((best % P, best // P), -1) + 0.5) / P
        guess[~instances[support].visible] = 0.5
        yield [tuple(point) for point in crop.to_photo(guess)]


def main(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vit", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    categories = read_categories()
    train, test = (annotation_file(args.data, 1, split) for split in ("train", "test"))
    instances, reports, images = read_instances(test, categories), {}, args.data / "images"
    trained = [o for o in read_instances(train, categories) if not o.photo.startswith("mirrored/")]
    means = mean_places(trained, categories)
    guesses = {"mean place": guess_means(instances, categories, means)}
    for size in 112, 224:  # pixels a side of a crop; the model sees 112
        vit = ViT.load(args.vit, size).eval()
        guesses[f"nearest patch, {size} px"] = guess_by_patches(instances, vit, images, seed=0)
    for name, predicted in guesses.items():
        reports[name] = make_report(instances, list(predicted), categories, test, "query")
        print(name)
        print_report(reports[name])
    (args.out / "baselines.json").write_text(json.dumps(reports, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(main)
