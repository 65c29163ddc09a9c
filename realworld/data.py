"""Lays folders of photographs with keypoints out as MP-100, split by category as splits.json says.

    python -m realworld.data data/keypoint_photos data/real_photos --out data/realworld

Each folder holds images/ and, in annotations.json or annotations/, COCO keypoints. Photos stay where they
are: OUT/images links to them. Training sees each photo twice, as it is and mirrored, where left and right
change places in the names of the keypoints as well. Split 1 is for pre-training. Split 2 differs in that it
has only the first FEW photos of each training category, not mirrored: enough for fine-tuning.
"""

import json
from pathlib import Path

from PIL import Image

from common import Parser, read_json, run
from data import parse_descriptions

HERE = Path(__file__).parent
SPLITS = "train", "val", "test"
FEW = 8
MIRRORED = 10**12  # added to the ids of mirrored photos and annotations


def read_categories():
    """-> {id: Category}, in our words."""
    path = HERE / "descriptions.json"
    return parse_descriptions(read_json(path), path)


def other_side(name):
    """left eye -> right eye, and the other way round."""
    return name.replace("left", "LEFT").replace("right", "left").replace("LEFT", "right")


def swap_sides(names):
    """For each keypoint of a set the index of that on the other side, or its own where there is none."""
    return [names.index(other_side(name)) if other_side(name) in names else k for k, name in enumerate(names)]


def read_folder(folder):
    """-> images, annotations and categories of a folder's COCO files; photos are named FOLDER/FILE."""
    contents = {"images": [], "annotations": [], "categories": []}
    files = [folder / "annotations.json"]
    for file in files if files[0].exists() else sorted((folder / "annotations").glob("*.json")):
        for key, entries in json.loads(file.read_text()).items():
            contents.setdefault(key, []).extend(entries)
    for image in contents["images"]:
        image["file_name"] = f"{folder.name}/{image['file_name']}"
    return contents


def mirror(image, annotation, names):
    """-> the two as they are in the mirrored photo."""
    width = image["width"]
    x, y, w, h = annotation["bbox"]
    points = [annotation["keypoints"][3 * k:3 * k + 3] for k in swap_sides(names)]
    points = [(width - 1 - x if v else x, y, v) for x, y, v in points]
    file = f"mirrored/{image['file_name']}"
    return (image | {"id": image["id"] + MIRRORED, "file_name": file},
            annotation | {"id": annotation["id"] + MIRRORED, "image_id": image["id"] + MIRRORED,
                          "bbox": [width - x - w, y, w, h], "keypoints": sum(points, ())})


def lay_out(folders, out):
    splits = json.loads((HERE / "splits.json").read_text())
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "annotations").mkdir(exist_ok=True)
    of_split = {name: split for split in SPLITS for name in splits[split]}
    contents = {split: {"images": {}, "annotations": [], "categories": []} for split in SPLITS}
    for folder in folders:
        link = out / "images" / folder.name
        if not link.exists():
            link.symlink_to(folder.resolve() / "images")
        source = read_folder(folder)
        images = {image["id"]: image for image in source["images"]}
        categories = {category["id"]: category for category in source["categories"]}
        for category in source["categories"]:
            if category["name"] in of_split:
                contents[of_split[category["name"]]]["categories"].append(category)
        for annotation in source["annotations"]:
            category, image = categories[annotation["category_id"]], images[annotation["image_id"]]
            split = of_split.get(category["name"])
            pairs = [(image, annotation)]
            if split == "train":
                pairs.append(mirror(image, annotation, category["keypoints"]))
                write_mirrored(out / "images", image, pairs[1][0])
            for image, annotation in pairs if split else []:
                contents[split]["images"][image["id"]] = image
                contents[split]["annotations"].append(annotation)
    for split, parts in contents.items():
        write_split(out / f"annotations/mp100_split1_{split}.json", parts, parts["annotations"])
        chosen = first_few(parts) if split == "train" else parts["annotations"]
        write_split(out / f"annotations/mp100_split2_{split}.json", parts, chosen)


def first_few(parts):
    """FEW annotations of each category, none of them mirrored."""
    of_category = {}
    for annotation in parts["annotations"]:
        if not parts["images"][annotation["image_id"]]["file_name"].startswith("mirrored/"):
            of_category.setdefault(annotation["category_id"], []).append(annotation)
    return [annotation for annotations in of_category.values() for annotation in annotations[:FEW]]


def write_split(path, parts, annotations):
    """Writes these annotations, the photos they need, and all categories of the split."""
    needed = {annotation["image_id"] for annotation in annotations}
    images = [image for number, image in parts["images"].items() if number in needed]
    contents = {"images": images, "annotations": annotations, "categories": parts["categories"]}
    path.write_text(json.dumps(contents))
    print(f"{path.name}: {len(parts['categories'])} categories, {len(annotations)} objects, "
          f"{len(images)} photos")


def write_mirrored(images, image, mirrored):
    file = images / mirrored["file_name"]
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(images / image["file_name"]) as photo:
            photo.convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file, quality=95)


def main(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    lay_out(args.folders, args.out)


if __name__ == "__main__":
    run(main)
