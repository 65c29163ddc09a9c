"""MP-100's annotations and their descriptions, read and checked (paper, section 4.1).

    data/mp100/annotations/mp100_split{1..5}_{train,val,test}.json  COCO: images, annotations, categories
    data/mp100/images/<file_name>
    descriptions.json                                               names and descriptions of all keypoints

An instance is one annotated animal, garment or thing. Points are in pixels of the photo. A point is always
(x, y), x to the right and y down. Most of this file says what is wrong with a file that somebody else made;
a reader who trusts theirs only needs Instance.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from chat import Category
from common import InputError, check, get_field, is_first, read_json

UNREADABLE = Exception  # what pillow raises for a damaged photo: its decoders raise nearly anything
MAX_ID = 2**63 - 1
MAX_PIXELS = 10**6  # no photo is larger, and no point or box farther away


@dataclass(frozen=True)
class Instance:
    annotation_id: int
    category_id: int
    photo: str  # file name below the folder of the photos
    box: tuple  # x, y, width, height, clipped to the photo
    keypoints: np.ndarray  # (K, 2)
    visible: np.ndarray  # (K,) bool, whether it is labelled; something may be in front of it


def read_descriptions(path):
    """A file such as descriptions.json -> {category id: Category}. InputError says which entry is wrong."""
    return parse_descriptions(read_json(path), path)


def parse_descriptions(raw, path):
    """The contents of such a file -> {category id: Category}. path: where they are from, for messages."""
    sets, categories = get_field(raw, "keypoint_sets", path, dict, 0), {}
    skeletons = get_field(raw, "skeletons", path, dict, 0) if "skeletons" in raw else {}
    for number, entry in get_field(raw, "categories", path, dict).items():
        if not re.fullmatch("0|-?[1-9][0-9]{,17}", number):
            raise InputError(f"{path}: {number!r} in categories is not an id, a whole number")
        name = get_field(entry, "name", path, str, 1, 1000, f" of category {number}")
        set_name = get_field(entry, "keypoint_set", path, str, of=f" of category {number}")
        keypoints = parse_keypoint_set(sets, set_name, path)
        skeleton = parse_skeleton(skeletons, set_name, len(keypoints), path)
        categories[int(number)] = Category(name, keypoints, skeleton)
    return categories


def parse_keypoint_set(sets, set_name, path):
    """-> [(name, description), ...] of a keypoint set. No two have the same name."""
    keypoints = []
    for k, entry in enumerate(get_field(sets, set_name, path, list, 1, 1000)):
        of = f" of keypoint {k} in {set_name}"
        keypoints.append((get_field(entry, "name", path, str, 1, 1000, of),
                          get_field(entry, "description", path, str, 1, 10000, of)))
    (name, count), = Counter(name for name, _ in keypoints).most_common(1)
    if count > 1:
        raise InputError(f"{path}: {count} keypoints of {set_name} are called {name}; tell them apart")
    return keypoints


def parse_skeleton(skeletons, set_name, n, path):
    """-> [(a, b), ...], the lines between the n keypoints of a set; none if there is no skeleton for it."""
    where, lines = f"{path}: the skeleton of {set_name}", []
    for line in check(skeletons.get(set_name, []), where, list, 0):
        a, b = (check(k, f"{where}: a keypoint's index", int, 0, n - 1)
                for k in check(line, f"{where}: a line", list, 2, 2))
        lines.append((a, b))
    return lines


def annotation_file(data, split, subset):
    """Where MP-100's annotations of a split are. subset: "train", "val" or "test"."""
    return Path(data, "annotations", f"mp100_split{split}_{subset}.json")


def read_instances(path, categories):
    """An annotation file -> its Instances, photo by photo. categories: what read_descriptions() gave.

    As in the published code, some annotations are left out: see make_instance(). InputError names the
    annotation that is malformed or does not fit the descriptions.
    """
    if not Path(path).exists():
        raise InputError(f"{path}: no such file; say with --data where MP-100 is")
    raw, annotations = read_json(path), {}
    photos = by_id(raw, "images", "image", path)
    for number, annotation in by_id(raw, "annotations", "annotation", path).items():
        of = f" of annotation {number}"
        image = get_field(annotation, "image_id", wrong(path), int, -MAX_ID, MAX_ID, of)
        annotations.setdefault(image, []).append(annotation)
    n_unlisted = sum(len(annotations[image]) for image in annotations.keys() - photos.keys())
    if n_unlisted and is_first():
        print(f"{path}: {n_unlisted} annotations of images that are not listed are left out", file=sys.stderr)
    if "categories" in raw:
        check_categories(by_id(raw, "categories", "category", path).values(), categories, path)
    instances = [make_instance(annotation, photo, categories, path)
                 for number, photo in photos.items() for annotation in annotations.get(number, [])]
    return [instance for instance in instances if instance is not None]


def wrong(path):
    return f"{path}: not an MP-100 annotation file"


def by_id(raw, key, what, path):
    """A list of an annotation file -> {id: entry}. InputError if two have the same id."""
    entries = {}
    for entry in get_field(raw, key, wrong(path), list, 0, 10**7):
        number = get_field(entry, "id", wrong(path), int, -MAX_ID, MAX_ID, f" of an entry of {key}")
        if number in entries:
            raise InputError(f"{path}: {what} {number} is listed twice")
        entries[number] = entry
    return entries


def plain(name):
    """left_eye, "Left eye" and left-eye are the same name."""
    return re.sub(r"[\s_-]+", "", name).casefold()


def check_categories(entries, categories, path):
    """InputError if a category of an annotation file is not the one that has its id in the descriptions.

    MP-100 numbers the keypoints of many categories or calls them otherwise than the descriptions, and those
    of two it does not name at all. But a name that is in both must be at the same place.
    """
    for entry in entries:
        if entry["id"] in categories:
            check_category(entry, categories[entry["id"]], path)


def check_category(entry, category, path):
    place, name = f"{path}: category {entry['id']}", str(entry.get("name", category.name))
    named = check(entry.get("keypoints", []), f"{place}: keypoints", list, 0)
    ours = [plain(keypoint) for keypoint, _ in category.keypoints]
    theirs = [plain(str(keypoint)) for keypoint in named] or ours
    if plain(name) != plain(category.name):
        raise InputError(f"{place} is {name}, but {category.name} in the descriptions")
    if len(theirs) != len(ours):
        raise InputError(f"{place}, {name}, has {len(theirs)} keypoints, but {len(ours)} descriptions")
    for k, (their, our) in enumerate(zip(theirs, ours)):
        if their != our and their in ours:
            raise InputError(f"{place}, {name}: keypoint {k + 1} is {named[k]}, but "
                             f"{category.keypoints[k][0]} in the descriptions")


def make_instance(annotation, photo, categories, path):
    """-> Instance; None for a crowd, if all keypoints are zeros, or if nothing of the box is in the photo."""
    number, of = annotation["id"], f" of annotation {annotation['id']}"
    category_id = get_field(annotation, "category_id", wrong(path), int, -MAX_ID, MAX_ID, of)
    box, points, area = parse_numbers(annotation, photo, path)
    *_, w, h = box
    if area <= 0 or w <= 0 or h <= 0 or not points.any() or annotation.get("iscrowd"):
        return None
    if category_id not in categories:
        raise InputError(f"{path}: category {category_id} has no descriptions; "
                         "add it to the file of --descriptions")
    category = categories[category_id]
    if len(points) != len(category.keypoints):
        raise InputError(f"{path}: annotation {number} has {len(points)} keypoints, but {category.name} has "
                         f"{len(category.keypoints)} descriptions")
    file = Path(get_field(photo, "file_name", wrong(path), str, 1, 1000, f" of image {photo['id']}"))
    if file.is_absolute() or ".." in file.parts:
        raise InputError(f"{path}: the photo {file} of annotation {number} is not below images/")
    return Instance(number, category_id, photo["file_name"], box, points[:, :2], points[:, 2] > 0)


def parse_numbers(annotation, photo, path):
    """-> the box, clipped to the photo; the points (K, 3), x, y and visibility; the area, 1 if not given."""
    number, where, of = annotation["id"], wrong(path), f" of annotation {annotation['id']}"
    box = get_field(annotation, "bbox", where, list, 4, 4, of)
    triples = get_field(annotation, "keypoints", where, list, 0, 3000, of)
    width, height = (get_field(photo, key, where, float, 1, MAX_PIXELS, f" of image {photo['id']}")
                     for key in ("width", "height"))
    if not all(type(v) in (int, float) and abs(v) <= MAX_PIXELS for v in (*box, *triples)):
        raise InputError(f"{path}: annotation {number} has a coordinate that is not a number, "
                         f"or is beyond {MAX_PIXELS:,}")
    if len(triples) % 3 or annotation.get("iscrowd", 0) not in (0, 1):
        raise InputError(f"{where}: annotation {number} has keypoints that are no triples x, y, v, "
                         "or an iscrowd that is not 0 or 1")
    area = get_field(annotation, "area", where, float, -10**12, 10**12, of) if "area" in annotation else 1
    points = np.array(triples, dtype=np.float64).reshape(-1, 3)
    return clip_box(box, width, height), points, area


def clip_box(box, width, height):
    """The part of a box in a photo, counted in pixels as in the published code; w or h <= 0 if none is."""
    x, y, w, h = box
    x1, y1 = max(0, x), max(0, y)
    x2 = min(width - 1, x1 + max(0, w - 1))
    y2 = min(height - 1, y1 + max(0, h - 1))
    return x1, y1, x2 - x1, y2 - y1


def keep_readable(instances, images, categories, allow_missing):
    """-> the instances whose photo is there and has a readable header. The others are refused or left out.

    With allow_missing, photos are read to their end, since one that breaks off would stop a training later.
    """
    photos = {instance.photo for instance in instances}
    readable = {photo: is_readable(Path(images, photo), to_its_end=allow_missing) for photo in photos}
    refuse_missing([o for o in instances if not readable[o.photo]], images, categories, allow_missing)
    if not any(readable.values()):
        raise InputError(f"{images}: none of the photos of {len(instances)} objects is there")
    return [instance for instance in instances if readable[instance.photo]]


def refuse_missing(instances, images, categories, allow_missing):
    """InputError that counts the instances without photo by category, unless allow_missing."""
    if instances and not allow_missing:
        counts = Counter(categories[instance.category_id].name for instance in instances)
        raise InputError(f"{images}: photos of {len(instances)} objects are missing or unreadable "
                         f"({', '.join(f'{name} {n}' for name, n in counts.items())}), e.g. "
                         f"{instances[0].photo}; complete the folder or leave them out with --allow-missing")


def is_readable(path, to_its_end):
    """Whether a photo has a readable header or, to_its_end, can be decoded to its last pixel."""
    try:
        with open_image(path) as image:
            if to_its_end:
                image.draft(None, (1, 1))  # a JPEG is read at an eighth of its size, which is fast
                image.load()
        return True
    except UNREADABLE:
        return False


def open_image(path):
    """Image.open() for regular files only: one could wait for a pipe for ever."""
    if Path(path).exists() and not Path(path).is_file():
        raise OSError("it is not a regular file")
    return Image.open(path)
