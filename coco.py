"""Your own data: a folder of photos and a COCO keypoints file, as CVAT and other tools write it.

    python train.py --annotations train.json --images photos --val val.json --descriptions texts.json
    python evaluate.py runs/train/ckpt.pt                              asks about the photos of val.json

What MP-100 prescribes may be absent: boxes are made from the points, sizes are read from the photos, and
categories go by their names, whatever their ids. texts.json says where each keypoint is. It is laid out as
descriptions.json, or short:

    {"spout": "The opening at ...", "lid knob": "The knob on ..."}               the same for all categories
    {"teapot": {"spout": "The opening at ...", ...}, "jug": {...}}               for each category

DeepLabCut's labels become such a file, from one CSV or those of several videos:

    python coco.py labeled-data/*/CollectedData_me.csv --images . --category mouse --out train.json
"""

import argparse
import csv
import math
from collections import Counter
from pathlib import Path, PureWindowsPath

from annotations import MAX_PIXELS, UNREADABLE, make_instance, open_image, parse_descriptions, plain
from common import InputError, read_json, run, say, write_json

ORIENTATION = 0x0112  # the EXIF entry that says how a viewer turns a photo; 1 is not at all


# ------------------------------------------------------------------------------------------------ annotations


def read_coco(path, images, texts=None, say=say):
    """A COCO keypoints file -> its Instances, and descriptions as descriptions.json holds them.

    images: the folder of the photos; None if they are not there and the file says their sizes. texts: what
    read_texts() gave; without it each description is made of the name. say() tells what is left out and what
    looks wrong. InputError names what is wrong.
    """
    raw = read_json(path, dict)
    photos = index_by_id(raw, "images", path, id=(int, str), file_name=str)
    categories = read_categories(raw, path)
    annotations = index_by_id(raw, "annotations", path, id=int, image_id=(int, str), category_id=int)
    for annotation in annotations.values():
        check_annotation(annotation, photos, categories, path)
    labelled = [annotation for annotation in annotations.values() if labelled_points(annotation)]
    shown = {annotation["image_id"]: photos[annotation["image_id"]] for annotation in labelled}
    complete_photos(shown.values(), images, path, say)

    descriptions = describe(categories, texts, path)
    parsed = parse_descriptions(descriptions, path)
    instances = []
    for annotation in labelled:
        photo = photos[annotation["image_id"]]
        annotation = annotation | {"area": 1, "bbox": [*find_box(annotation, photo)]}
        instances.append(make_instance(annotation, photo, parsed, path))
    instances = [instance for instance in instances if instance is not None]
    if left := len(annotations) - len(instances):
        say(f"{path}: {left} of {len(annotations)} annotations left out: without labelled keypoints, "
            "of a crowd, or with a box outside the photo")
    if not instances:
        raise InputError(f"{path}: no annotation has a labelled keypoint")
    return instances, descriptions


def index_by_id(raw, part, path, **kinds):
    """A part of the file, a list of objects -> {id: object}. kinds: the types of fields it must have."""
    if not isinstance(raw.get(part), list):
        raise InputError(f"{path}: has no list of {part}; it is not a COCO keypoints file")
    entries = {}
    for n, entry in enumerate(raw[part]):
        for field, kind in kinds.items():
            value = entry.get(field) if isinstance(entry, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool) or value == "":
                raise InputError(f"{path}: {part}[{n}] has no {field}, or one of the wrong type")
        if entry["id"] in entries:
            raise InputError(f"{path}: two {part} have the id {entry['id']}")
        entries[entry["id"]] = entry
    return entries


def read_categories(raw, path):
    """-> {id: category}, with "keypoints", which may be empty, and "skeleton", pairs of indices from 0."""
    categories = index_by_id(raw, "categories", path, id=int, name=str)
    refuse_twice([category["name"] for category in categories.values()], f"{path}: categories")
    for category in categories.values():
        place, names = f"{path}: category {category['name']}", category.get("keypoints") or []
        if not isinstance(names, list) or not all(isinstance(name, str) and plain(name) for name in names):
            raise InputError(f"{place}: its keypoints are not a list of names")
        refuse_twice(names, f"{place}: keypoints")
        try:
            lines = [(a, b) for a, b in names and category.get("skeleton") or []]
            first = 0 if any(0 in line for line in lines) else 1  # COCO counts from 1, some tools from 0
            lines = [[range(len(names)).index(k - first) for k in line] for line in lines]
        except (TypeError, ValueError):
            raise InputError(f"{place}: its skeleton is not a list of pairs of numbers from 1 to "
                             f"{len(names)}") from None
        category |= {"keypoints": names, "skeleton": lines}
    return categories


def refuse_twice(names, place):
    for name, n in Counter(map(plain, names)).items():
        if n > 1:
            raise InputError(f"{place}: {n} are called {name}; give each a name of its own")


def check_annotation(annotation, photos, categories, path):
    """InputError if its photo or category is unknown, or if its numbers are not as many as needed."""
    place, category_id = f"{path}: annotation {annotation['id']}", annotation["category_id"]
    for part, number, known in (("images", annotation["image_id"], photos),
                                ("categories", category_id, categories)):
        if number not in known:
            raise InputError(f"{place}: {part} has no id {number}")
    for field in "keypoints", "bbox":
        numbers = annotation[field] = annotation.get(field) or []
        if not (isinstance(numbers, list)
                and all(type(number) in (int, float) and abs(number) <= MAX_PIXELS for number in numbers)):
            raise InputError(f"{place}: {field} is not a list of numbers")
    values, K = annotation["keypoints"], len(categories[category_id]["keypoints"])
    if values and not K:
        raise InputError(f"{place} has keypoints, but its category {categories[category_id]['name']} does "
                         'not name them; add "keypoints": ["name", ...] to the category')
    if values and len(values) != 3 * K:
        raise InputError(f"{place} has {len(values)} numbers for {K} keypoints; x, y, v for each are wanted")
    if len(annotation["bbox"]) not in (0, 4):
        raise InputError(f"{place}: bbox is not x, y, width, height")


def labelled_points(annotation):
    values = annotation["keypoints"]
    return [(x, y) for x, y, v in zip(values[::3], values[1::3], values[2::3]) if v > 0]


def find_box(annotation, photo):
    """The annotation's box; if it has none, that of its labelled points and an eighth of its size around."""
    x, y, w, h = annotation["bbox"] or (0, 0, 0, 0)
    if w > 0 and h > 0:  # COCO Annotator writes zeros
        return x, y, w, h
    xs, ys = zip(*labelled_points(annotation))
    size = max(max(xs) - min(xs), max(ys) - min(ys))
    margin = max(1, size / 8) if size else min(photo["width"], photo["height"]) / 20  # a single point
    x, y = max(0, min(xs) - margin), max(0, min(ys) - margin)
    return x, y, max(xs) + margin - x, max(ys) + margin - y


def complete_photos(photos, images, path, say):
    """Puts file names in order, fills in sizes that the file lacks, and warns of photos that viewers turn."""
    turned, called = [], {}
    for photo in photos:
        given = name = photo["file_name"].replace("\\", "/")
        if images is not None:  # Label Studio writes images/a.jpg, /data/upload/1/a.jpg, ../../media/a.jpg
            name = find_photo(name.split("/"), images) or name
        photo["file_name"] = name
        if called.setdefault(name, given) != given:
            raise InputError(f"{path}: {called[name]} and {given} would both be the photo {name} of "
                             f"{images}; keep the folders that tell them apart")
        if PureWindowsPath(name).anchor:
            raise InputError(f"{path}: the photo {name} is not relative to the folder --images")
        size, is_turned = (None, False) if images is None else read_header(Path(images, name))
        if is_turned:
            turned.append(name)
        for k, field in enumerate(("width", "height")):
            if not photo.get(field):
                if images is None:
                    raise InputError(f"{path}: {name} has no {field}; say with --images where the photo is")
                photo[field] = size[k] if size else MAX_PIXELS  # keep_readable() will not find it either
            if type(photo[field]) not in (int, float) or not 1 <= photo[field] <= MAX_PIXELS:
                raise InputError(f"{path}: the {field} of {name} is not a number of pixels")
    if turned:
        say(f"warning: {len(turned)} photos have an EXIF orientation, e.g. {turned[0]}; it is ignored, so "
            "their points must have been made on the unturned pixels")


def read_header(path):
    """-> a photo's size as stored, and whether viewers turn it; None, False if it cannot be read."""
    try:
        with open_image(path) as photo:
            return photo.size, "exif" in photo.info and photo.getexif().get(ORIENTATION, 1) != 1
    except UNREADABLE:
        return None, False


# ----------------------------------------------------------------------------------------------- descriptions


def read_texts(path):
    """The file of --descriptions -> [(category's name, or None for any, {keypoint: description}), ...]."""
    raw = read_json(path, dict)
    if "keypoint_sets" in raw:
        return list_texts(parse_descriptions(raw, path))
    parts = list(raw.items()) if all(isinstance(text, dict) for text in raw.values()) else [(None, raw)]
    for _, texts in parts:
        for name, text in texts.items():
            if not isinstance(text, str) or not text.strip():
                raise InputError(f'{path}: {name} is not described; {{"name": "description"}} is wanted, '
                                 'or {"category": {"name": "description"}}')
    return parts


def list_texts(categories):
    """{id: Category} -> what read_texts() gives."""
    return [(category.name, dict(category.keypoints)) for category in categories.values()]


def replace_texts(texts, others):
    """-> others, and of texts those of the categories that others do not describe."""
    return others + [(name, described) for name, described in texts
                     if not any(of is None or plain(of) == plain(name) for of, _ in others)]


def describe(categories, texts, path):
    """-> the descriptions of a file's categories, as descriptions.json holds them."""
    sets, entries, skeletons = {}, {}, {}
    for number, category in categories.items():
        if category["keypoints"]:
            name = category["name"]
            sets[name] = [{"name": keypoint, "description": text}
                          for keypoint, text in find_texts(category, texts, path)]
            entries[str(number)] = {"name": name, "keypoint_set": name}
            skeletons[name] = category["skeleton"]
    return {"keypoint_sets": sets, "categories": entries, "skeletons": skeletons}


def find_texts(category, texts, path):
    """-> [(name, description), ...] for a category's keypoints: those of the first entry that has them all.

    Without texts they are made of the names.
    """
    names, kind = [name.replace("_", " ") for name in category["keypoints"]], category["name"]
    if texts is None:
        return [(name, f"the {name} of the {kind.replace('_', ' ')}") for name in names]
    missing = None
    for of, described in texts:
        if of is None or plain(of) == plain(kind):
            known = {plain(name): (name, text) for name, text in described.items()}
            missing = [name for name in names if plain(name) not in known]
            if not missing:
                return [known[plain(name)] for name in names]
    if missing is None:
        raise InputError(f"{path}: category {kind} is not in the descriptions; give some with --descriptions")
    raise InputError(f"{path}: {', '.join(missing)} of {kind} {'are' if missing[1:] else 'is'} not in its "
                     "descriptions; call them alike, or give others with --descriptions")


# ------------------------------------------------------------------------------------------------- DeepLabCut


def convert(paths, images, category):
    """DeepLabCut's CSVs of labels -> the contents of a COCO keypoints file."""
    photos, annotations, names = [], [], None
    for path in paths:
        for parts, individuals in read_labels(path):
            if not (file := find_photo(parts, images)):
                raise InputError(f"{path}: the photo {'/'.join(parts)} is not in --images {images}")
            photos.append({"id": len(photos) + 1, "file_name": file})
            for points in individuals:
                names = names or list(points)
                if list(points) != names:
                    raise InputError(f"{path}: its body parts are {', '.join(points)}, but those before are "
                                     f"{', '.join(names)}; one file holds one list of them")
                if any(points.values()):
                    triples = [(*point, 2) if point else (0, 0, 0) for point in points.values()]
                    annotations.append({"id": len(annotations) + 1, "image_id": len(photos), "category_id": 1,
                                        "keypoints": sum(triples, ())})
    if not annotations:
        raise InputError(f"{paths[-1]}: no labels")
    return {"images": photos, "annotations": annotations,
            "categories": [{"id": 1, "name": category, "keypoints": names}]}


def read_labels(path):
    """Yields for each photo its path, in parts, and for each individual {body part: (x, y), or () if hidden}.

    A column's rows of the header are its scorer, individual (if there are several), body part, and x or y.
    Body parts that belong to no individual ("single") are left out.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if any(row)]
        header = {row[0]: row for row in rows[:4]}
        coords, parts = header["coords"], header["bodyparts"]
        first = coords.index("x")  # the photo's path takes one column or three
        if coords[first:] != ["x", "y"] * ((len(coords) - first) // 2):
            raise ValueError("columns other than x and y")
        individuals, columns = header.get("individuals", [""] * len(coords)), {}
        for k in range(first, len(coords), 2):
            columns.setdefault(individuals[k], {})[parts[k]] = k
        if len(columns) > 1:
            columns.pop("single", None)
        for row in rows[rows.index(coords) + 1:]:
            yield ("/".join(row[:first]).replace("\\", "/").split("/"),
                   [{part: read_point(row[k:k + 2]) for part, k in of.items()} for of in columns.values()])
    except (OSError, KeyError, IndexError, ValueError, csv.Error) as e:
        raise InputError(f"{path}: not a CSV of DeepLabCut's labels ({type(e).__name__}: {e})") from None


def read_point(cells):
    x, y = (float(cell or "nan") for cell in cells)
    return () if math.isnan(x + y) else (x, y)


def find_photo(parts, images):
    """labeled-data/video/img1.png -> that, video/img1.png or img1.png: what is in the folder, or None."""
    for n in range(len(parts)):
        if ".." not in parts[n:] and Path(images, *parts[n:]).is_file():
            return "/".join(parts[n:]).lstrip("/")
    return None


def main(argv):
    parser = argparse.ArgumentParser(description="Makes a COCO keypoints file of DeepLabCut's labels.",
                                     allow_abbrev=False)
    add = parser.add_argument
    add("labels", nargs="+", help="CollectedData_....csv, one or several")
    add("--images", required=True, help="the project's folder, or that of the photos")
    add("--category", required=True, help="what the animal is called")
    add("--out", required=True, help="the file to write")
    args = parser.parse_args(argv)
    contents = convert(args.labels, args.images, args.category)
    write_json(args.out, contents)
    [category] = contents["categories"]
    print(f"wrote {args.out}: {len(contents['images'])} photos, {len(contents['annotations'])} annotations "
          f"of {', '.join(category['keypoints'])}")


if __name__ == "__main__":
    run(main)
