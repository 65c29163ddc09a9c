"""MP-100 with a super-category held out: trained on all others, tested on it, as in earlier work on CAPE.

    python -m tools.holdout data/mp100 --hold-out vehicle --out data/no_vehicle
    python train.py --data data/no_vehicle
    python evaluate.py runs/no_vehicle/ckpt.pt

A category that one of MP-100's splits tests is trained on in others. So all files are put together, each
annotation once. Of what is not held out, every fiftieth photo is for validation and the others for training.
"""

from pathlib import Path

from common import InputError, Parser, read_json, reading, run, write_json
from data import annotation_file
from decode import find

SUPER_CATEGORIES = {  # those that earlier work holds out, as keypoint sets of descriptions.json
    "human_face": ["face_19", "face_68"], "human_body": ["person"], "vehicle": ["vehicle"],
    "furniture": ["bed", "chair", "sofa", "swivelchair", "table"]}


def read_all(data):
    """The files of all splits -> {file name: photo}, {category id: category}, [(file name, annotation), ...].

    Each file may have numbers of its own, so a photo is known by its file name, and an annotation by its
    photo, category, box and keypoints.
    """
    photos, categories, annotations = {}, {}, {}
    paths = [annotation_file(data, n, subset) for n in range(1, 6) for subset in ("train", "val", "test")]
    found = [path for path in paths if path.exists()]
    if not found:
        raise InputError(f"{paths[0]}: no such file, nor one of another split")
    for path in found:
        raw = read_json(path, dict)
        with reading(path, "is it an annotation file of MP-100, or of tools/own.py?"):
            names = {photo["id"]: photo["file_name"] for photo in raw["images"]}
            photos |= {photo["file_name"]: photo for photo in raw["images"]}
            categories |= {category["id"]: category for category in raw["categories"]}
            for a in raw["annotations"]:
                name = names[a["image_id"]]
                annotations[name, a["category_id"], tuple(a["bbox"]), tuple(a["keypoints"])] = name, a
    print(f"{data}: {len(found)} of {len(paths)} annotation files, {len(annotations):,} objects")
    return photos, categories, [*annotations.values()]


def find_held_out(names, path):
    """-> the ids of the categories of super-categories or keypoint sets, by a descriptions.json."""
    raw = read_json(path, dict)
    with reading(path):
        for name in names:
            if name not in {*SUPER_CATEGORIES, *raw["keypoint_sets"]}:
                raise InputError(f"--hold-out {name}: is none of {', '.join(SUPER_CATEGORIES)} and no "
                                 f"keypoint set of {path}")
        sets = {s for name in names for s in SUPER_CATEGORIES.get(name, [name])}
        return {int(c) for c, entry in raw["categories"].items() if entry["keypoint_set"] in sets}


def share_out(annotations, held_out):
    """-> {"train": [(file name, annotation), ...], "val": ..., "test": ...}"""
    others = sorted({name for name, a in annotations if a["category_id"] not in held_out})
    validation, subsets = {*others[::50]}, {"train": [], "val": [], "test": []}
    for name, a in annotations:
        subset = "test" if a["category_id"] in held_out else "val" if name in validation else "train"
        subsets[subset].append((name, a))
    return subsets


def number(annotations, photos, categories):
    """-> the contents of an annotation file, photos and annotations numbered from 1."""
    ids = {name: n for n, name in enumerate(dict.fromkeys(name for name, _ in annotations), 1)}
    return {"images": [{**photos[name], "id": n} for name, n in ids.items()],
            "annotations": [{**a, "id": n, "image_id": ids[name]}
                            for n, (name, a) in enumerate(annotations, 1)],
            "categories": [categories[c] for c in sorted({a["category_id"] for _, a in annotations})]}


def main(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="MP-100's folder")
    parser.add_argument("--hold-out", nargs="+", required=True, metavar="NAME", help="what is tested: "
                        f"{', '.join(SUPER_CATEGORIES)}, or keypoint sets of descriptions.json")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    args = parser.parse_args(argv)
    own = args.data / "descriptions.json"
    held_out = find_held_out(args.hold_out, own if own.exists() else find("descriptions.json"))
    photos, categories, annotations = read_all(args.data)
    subsets = share_out(annotations, held_out)
    if not subsets["train"] or not subsets["test"]:
        raise InputError(f"{args.data}: no object to {'test' if subsets['train'] else 'train'} on")
    try:
        args.out.mkdir(parents=True)  # an older folder could hold the only copy of something
        (args.out / "images").symlink_to((args.data / "images").resolve(), target_is_directory=True)
    except OSError as e:
        raise InputError(f"{args.out}: cannot be made ({e}); choose another --out") from e
    if own.exists():
        write_json(args.out / "descriptions.json", read_json(own))
    for subset, objects in subsets.items():
        path, contents = annotation_file(args.out, 1, subset), number(objects, photos, categories)
        write_json(path, contents | {"held out": args.hold_out})
        print(f"{path}: {len(objects):,} objects of {len(contents['categories'])} categories")


if __name__ == "__main__":
    run(main)
