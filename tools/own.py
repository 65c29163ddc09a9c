"""Your own data: annotation files of other tools and their photos -> a folder in MP-100's layout.

    python -m tools.own FILE [FILE ...] [--images DIR] [--descriptions texts.json] --out data/teapots
    python -m tools.own VAL_FILE --subset val --out data/teapots      adds another subset
    python -m tools.own FOLDER --out data/teapots                     that holds train/ valid/ test/
    python train.py --data data/teapots

formats.py lists the files that can be read. texts.json says where each keypoint is. It is laid out as
descriptions.json, or short:

    {"spout": "The opening at ...", "lid knob": "The knob on ..."}               the same for all categories
    {"teapot": {"spout": "The opening at ...", ...}, "jug": {...}}               for each category

What is written:

    annotations/mp100_split1_SUBSET.json   as MP-100's own; a skeleton counts from 1. All ids are new.
    images/SUBSET/...                      links to the photos, or upright copies where the points are upright
    descriptions.json                      as the project's own; a skeleton counts from 0. Category ids are
                                           given by name, and all subsets share them.
"""

import os
import re
import shlex
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from common import InputError, Parser, printable, read_json, reading, run, say, write_json
from tools.fit import fit
from tools.formats import Notes, check_names, find_yolo_photos, plain, read_labels, read_settings

SUBSETS = {"train": ("train",), "val": ("valid", "val", "validation"), "test": ("test",)}
MADE_BY = "tools/own.py"  # marks what we wrote, and so may write again


@dataclass
class Kind:
    """A category, joined from all files and subsets."""

    id: int
    name: str
    keypoints: list  # names
    skeleton: list  # pairs of indices from 0
    texts: dict  # {plain name: (name, description)}


def main(argv):
    args, notes = parse_arguments(argv), Notes()
    if args.images and not args.images.is_dir():
        raise InputError(f"{args.images}: no such folder")
    texts = args.descriptions and read_texts(args.descriptions)
    described = [category for category, _ in texts or [] if category]
    category = args.category or (described[0] if len(described) == 1 else "object")
    kinds, subsets, owners = read_kinds(args.out), {}, {}
    for subset, files, images in find_files(args):
        for labels in read_labels(files, images, category, notes):
            with reading(labels.path):
                name_keypoints(labels, texts, kinds, notes)
                photos = fit(labels, images, notes)
                add_categories(kinds, labels, photos, notes)
            for photo in photos:
                if (owner := owners.setdefault(photo.path, photo.source)) != photo.source:
                    notes.add("photos that two files label", f"{photo.path} in {owner} and {photo.source}")
            subsets.setdefault(subset, []).extend(photos)
    if not any(subsets.values()):
        raise InputError("; ".join([f"{args.files[0]}: no labelled object is left", *notes.lines()]))
    for subset in [subset for subset, photos in subsets.items() if not photos]:
        notes.add("subsets without a labelled object, not written", subset)
        del subsets[subset]
    n_named = sum(describe(kind, texts, args.descriptions) for kind in kinds.values())

    write_descriptions(args.out, kinds)
    for subset in SUBSETS:
        path = annotation_file(args.out, subset)
        if subset in subsets:
            write_subset(args.out, subset, subsets[subset], kinds)
        elif path.exists():
            update_subset(path, kinds)
    report(args.out, subsets, kinds, notes, n_named)


def parse_arguments(argv):
    parser = Parser(prog="python -m tools.own",
                    description="Brings other tools' annotations into MP-100's layout.")
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="COCO keypoints or labelme .json, DeepLabCut "
        ".csv, YOLO data.yaml; or a folder that holds train/, valid/ and test/ with photos and annotations")
    add("--images", type=Path, metavar="DIR", help="photos; without it they are looked for beside the files")
    add("--descriptions", type=Path, metavar="JSON", help="where each keypoint is, in words")
    add("--subset", choices=[*SUBSETS], default="train", help="what the files are for")
    add("--category", metavar="NAME", help="what the objects are where a file, as DeepLabCut's, does not "
        'say it; without it the only category of --descriptions, or "object"')
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to make, or to add a subset to")
    return parser.parse_intermixed_args(argv)


def report(out, subsets, kinds, notes, n_named):
    for line in notes.lines():
        say(printable(line))
    if n_named:
        say(f'warning: {n_named} keypoints are described by their names only, as "the NAME of the CATEGORY"; '
            "what finds a keypoint is its description: write some, and give them with --descriptions")
    for subset, photos in subsets.items():
        counts = Counter(kinds[plain(one.category)].name for photo in photos for one in photo.objects)
        objects = ", ".join(f"{name} {n}" for name, n in counts.most_common(9)) + ", ..." * (len(counts) > 9)
        say(printable(f"{subset}: {len(photos)} photos, {sum(counts.values())} objects ({objects})"))
    if annotation_file(out, "train").exists():
        say(f"train on it: python train.py --data {shlex.quote(str(out))}")
    else:
        say("now add what to train on, with --subset train")


# ----------------------------------------------------------------------------------------------------- files


def find_files(args):
    """What the command line names -> [(subset, annotation files, folder of their photos or None), ...]."""
    groups = {}
    for path in args.files:
        if not path.exists():
            raise InputError(f"{path}: no such file")
        with reading(path):
            found = find_in_folder(path, args) if path.is_dir() else [(args.subset, path)]
            for subset, file in found:
                is_yolo = file.suffix.lower() in (".yaml", ".yml") and not args.images
                for of, images in find_yolo_photos(file) if is_yolo else [(subset, args.images)]:
                    groups.setdefault((of, images), []).append(file)
    return [(subset, files, images) for (subset, images), files in groups.items()]


def find_in_folder(folder, args):
    """-> [(subset, annotation file), ...]: data.yaml, or what is named after a subset, or all there is."""
    yamls = [file for file in sorted(folder.glob("*.y*ml")) if "names" in read_settings(file)]
    if yamls:
        return [(args.subset, yamls[0])]
    found, files = [], list_annotations(folder, args) + list_annotations(folder / "annotations", args)
    for subset, spellings in SUBSETS.items():
        inside = [file for spelling in spellings for file in list_annotations(folder / spelling, args)]
        pattern = rf"(?<![a-z])({'|'.join(spellings)})(?![a-z])"
        found += [(subset, file)
                  for file in inside or [file for file in files if re.search(pattern, file.stem.lower())]]
    files = files or sorted(folder.glob("labeled-data/*/CollectedData*.csv"))  # a project of DeepLabCut
    found = found or [(args.subset, file) for file in files]
    if not found:
        raise InputError(f"{folder}: no annotations (.json, .csv, data.yaml) are in it, or in its train/, "
                         "valid/ or test/")
    return found


def list_annotations(folder, args):
    return sorted(file for file in folder.glob("*")
                  if file.suffix.lower() in (".json", ".csv")
                  and not (args.descriptions and file.resolve() == args.descriptions.resolve()))


# --------------------------------------------------------------------------------- categories and their texts


def read_texts(path):
    """The file of --descriptions -> [(category's name, or None for any, {keypoint: description}), ...]."""
    raw = read_json(path, dict)
    with reading(path):
        if "keypoint_sets" in raw:
            parts = [(one["name"], dict(list_keypoints(raw, one))) for one in raw["categories"].values()]
        elif all(isinstance(text, dict) for text in raw.values()):
            parts = [*raw.items()]
        else:
            parts = [(None, raw)]
        for _, texts in parts:
            check_names(texts, path)
            for name, text in texts.items():
                if not isinstance(text, str) or not text.strip():
                    raise InputError(f'{path}: {name} is not described; {{"name": "description"}} is wanted, '
                                     'or {"category": {"name": "description"}}')
    return parts


def list_keypoints(raw, entry):
    """-> [(name, description), ...] of a category's entry in a descriptions.json."""
    return [(one["name"], one["description"]) for one in raw["keypoint_sets"][entry["keypoint_set"]]]


def read_kinds(out):
    """-> {plain name: Kind} of the categories that a folder already holds. InputError if it is not ours."""
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return {}
    path, kinds = out / "descriptions.json", {}
    raw = read_json(path, dict) if path.exists() else {}
    if raw.get("made by") != MADE_BY:
        raise InputError(f"{out}: is not empty, and not made by this program; --out takes a new folder")
    with reading(path):
        for number, entry in raw["categories"].items():
            keypoints, name = list_keypoints(raw, entry), entry["name"]
            texts = {plain(keypoint[0]): keypoint for keypoint in keypoints}
            kinds[plain(name)] = Kind(int(number), name, [name for name, _ in keypoints],
                                      raw["skeletons"][entry["keypoint_set"]], texts)
    return kinds


def name_keypoints(labels, texts, kinds, notes):
    """Where a file only numbers its keypoints, they get the names that are known, if these are as many."""
    known = [*(texts or []), *((kind.name, kind.keypoints) for kind in kinds.values())]
    for category, (names, skeleton) in labels.categories.items():
        lists = [[*keypoints] for of, keypoints in known if of is None or plain(of) == plain(category)]
        if not are_numbered(names) or any({*map(plain, names)} <= {*map(plain, one)} for one in lists):
            continue
        new = next((one for one in lists if len(one) == len(names)), names)
        new_names = dict(zip(names, new))
        labels.categories[category] = new, skeleton
        for one in (one for photo in labels.photos for one in photo.objects if one.category == category):
            one.points = {new_names[name]: point for name, point in one.points.items()}
        notes.add("keypoints that are only numbered, and are called by their order",
                  f"{', '.join(new[:3])}, ... of {category}")


def are_numbered(names):
    """Whether keypoints have no words of their own: 1, 2, 3, or new-point-0, new-point-1, ..."""
    bare = {re.sub(r"\d+", "", name) for name in names}
    return len(bare) == 1 and not bare & {*names}


def add_categories(kinds, labels, photos, notes):
    """Joins the categories of Labels to the Kinds by their names, and their keypoints likewise."""
    used = {one.category for photo in photos for one in photo.objects}
    for category, (names, skeleton) in labels.categories.items():
        if category not in used:
            continue
        number = max((kind.id for kind in kinds.values()), default=0) + 1
        kind = kinds.setdefault(plain(category), Kind(number, category, [], [], {}))
        known = [plain(name) for name in kind.keypoints]
        if known and {*map(plain, names)} != {*known}:
            notes.add("files with other keypoints than those before; what one lacks is not labelled in it",
                      labels.path.name)
        for name in names:
            if plain(name) not in known:
                known.append(plain(name))
                kind.keypoints.append(name)
        check_names([category], f"{labels.path}: categories")
        check_names(kind.keypoints, f"{labels.path}: keypoints of {category}")
        kind.skeleton = kind.skeleton or [[known.index(plain(names[k])) for k in line] for line in skeleton]


def describe(kind, texts, path):
    """Gives a Kind its texts: those of --descriptions, else those it has, else its names.

    -> how many keypoints have no text but their names. texts: what read_texts() gave for path; None without.
    """
    parts = [part for of, part in texts or [] if of is None or plain(of) == plain(kind.name)]
    for described in reversed(parts):
        kind.texts |= {plain(name): (name, text) for name, text in described.items()}
    missing = [name.replace("_", " ") for name in kind.keypoints if plain(name) not in kind.texts]
    if missing and texts:
        what = f"{', '.join(missing)} of {kind.name}" if parts else f"category {kind.name}"
        raise InputError(f"{path}: {what} {'are' if parts and missing[1:] else 'is'} not described in it; "
                         "call them alike")
    for name in missing:
        kind.texts[plain(name)] = name, f"the {name} of the {kind.name.replace('_', ' ')}"
    return len(missing)


# --------------------------------------------------------------------------------------------------- writing


def annotation_file(out, subset):
    return out / f"annotations/mp100_split1_{subset}.json"


def write_subset(out, subset, photos, kinds):
    """Writes a subset's annotations and photos."""
    images, annotations, files = [], [], {}
    for photo in photos:
        w, h = photo.size
        images.append({"id": len(images) + 1, "file_name": place_photo(photo, out / "images", subset, files),
                       "width": w, "height": h})
        for one in photo.objects:
            kind, points = kinds[plain(one.category)], {plain(name): xyv for name, xyv in one.points.items()}
            triples = [number for name in kind.keypoints for number in points.get(plain(name), (0, 0, 0))]
            annotations.append({"id": len(annotations) + 1, "image_id": len(images), "category_id": kind.id,
                                "keypoints": triples, "num_keypoints": len(points), "bbox": [*one.box],
                                "area": one.box[2] * one.box[3], "iscrowd": 0})
    write_json(annotation_file(out, subset), {"images": images, "annotations": annotations,
                                              "categories": list_categories(kinds)})


def update_subset(path, kinds):
    """Adds the keypoints that a category has got since, unlabelled, to a subset written earlier."""
    with reading(path):
        contents, numbers = read_json(path), {kind.id: 3 * len(kind.keypoints) for kind in kinds.values()}
        for annotation in contents["annotations"]:
            triples = annotation["keypoints"]
            triples += [0] * (numbers[annotation["category_id"]] - len(triples))
    write_json(path, contents | {"categories": list_categories(kinds)})


def list_categories(kinds):
    return [{"id": kind.id, "name": kind.name, "skeleton": [[a + 1, b + 1] for a, b in kind.skeleton],
             "keypoints": [kind.texts[plain(name)][0] for name in kind.keypoints]} for kind in kinds.values()]


def write_descriptions(out, kinds):
    sets, categories, skeletons = {}, {}, {}
    for kind in kinds.values():
        keypoints = [kind.texts[plain(name)] for name in kind.keypoints]
        sets[kind.name] = [{"name": name, "description": text} for name, text in keypoints]
        categories[str(kind.id)] = {"name": kind.name, "keypoint_set": kind.name}
        skeletons[kind.name] = kind.skeleton
    write_json(out / "descriptions.json", {"made by": MADE_BY, "keypoint_sets": sets,
                                           "categories": categories, "skeletons": skeletons})


def place_photo(photo, folder, subset, files):
    """Links a photo into a folder, or copies it upright -> its file name there. files: {file name: photo}."""
    name, what, n = Path(subset, photo.name), (photo.path, photo.is_turned), 1
    if photo.is_turned:
        name = name.with_suffix(".jpg" if name.suffix.lower() in (".jpg", ".jpeg") else ".png")
    stem = name.stem
    while files.setdefault(name.as_posix(), what) != what:  # a photo of another folder has this name
        n += 1
        name = name.with_stem(f"{stem}_{n}")
    target = folder / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if photo.is_turned:
            if photo.path.absolute() == target.absolute():
                raise InputError(f"{target}: would be replaced by an upright copy; choose another --out")
            with Image.open(photo.path) as image:
                upright = ImageOps.exif_transpose(image)
            target.unlink(missing_ok=True)  # it may be a link to the photo
            upright.save(target, quality=95)
        elif not (target.exists() and target.samefile(photo.path)):
            target.unlink(missing_ok=True)
            link(photo.path, target)
    except OSError as e:
        raise InputError(f"{target}: cannot be written ({e})") from None
    return name.as_posix()


def link(path, target):
    """Gives a photo another name; where the disk takes no links, a copy."""
    for make in os.link, os.symlink:
        try:
            return make(path, target)
        except OSError:
            pass
    shutil.copyfile(path, target)


if __name__ == "__main__":
    run(main)
