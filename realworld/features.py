"""Caches what DINOv2 sees of each photo, so that pre-training need not look again.

    python -m realworld.features --data data/realworld --vit facebook/dinov2-small --out runs/realworld

Of the training photos these are crops as train.py makes them, other ones in each epoch; of the others the
crops of a test. OUT/{train0,train1,val}.pt hold the patches (n, 64, 384) in 16 bits, and for each
the annotation's id and the places of its keypoints in the crop. What is there already is not made again.
"""

from pathlib import Path

import torch
from tqdm import tqdm

from common import Parser, run
from data import annotation_file, crop_of, normalize, plan_epoch, read_instances
from realworld.data import read_categories
from vit import ViT

SIZE = 112  # pixels a side, which makes 8 x 8 patches
BATCH = 32
SEED = 7


@torch.no_grad()
def look(vit, images, crops, bar):
    """[(instance, crop), ...] -> {"patches": (n, 64, 384), "annotation": ids, "points": [(K, 2), ...]}.

    The size of the crops is that which the ViT was loaded for.
    """
    patches, size = [], vit.config.patch_size * round((vit.pos_embed.shape[1] - 1) ** 0.5)
    for start in tqdm(range(0, len(crops), BATCH), bar):
        squares = [crop.cut(images / instance.photo, size) for instance, crop in crops[start:start + BATCH]]
        patches.append(vit(normalize(torch.stack(squares))).half())
    return {"patches": torch.cat(patches), "annotation": [instance.annotation_id for instance, _ in crops],
            "points": [crop.from_photo(instance.keypoints) for instance, crop in crops]}


def main(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vit", required=True)
    parser.add_argument("--out", type=Path, default="runs/realworld")
    args = parser.parse_args(argv)
    categories = read_categories()
    vit = ViT.load(args.vit, SIZE).eval()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in "val", "train0", "train1":
        split, file = name.rstrip("0123456789"), args.out / f"{name}.pt"
        if file.exists():
            continue
        instances = read_instances(annotation_file(args.data, 1, split), categories)
        crops = [(instance, crop_of(instance)) for instance in instances]
        if split == "train":
            epoch = plan_epoch(instances, SEED, int(name.removeprefix("train")), 4, pack=True)
            crops = [(example.instance, example.crop) for example in epoch]
        torch.save(look(vit, args.data / "images", crops, name), part := file.with_suffix(".part"))
        part.replace(file)


if __name__ == "__main__":
    run(main)
