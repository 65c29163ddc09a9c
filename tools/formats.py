"""Annotation files of other tools -> Labels, the plain structure that own.py turns into MP-100's layout.

    COCO keypoints JSON    CVAT, Label Studio, Roboflow, COCO Annotator, SLEAP, mmpose, ...
    labelme JSON           a file for each photo: points, and a rectangle or polygon around each object
    DeepLabCut CSV         labeled-data/*/CollectedData_*.csv, also Lightning Pose's
    YOLO-pose              data.yaml, and a .txt for each photo with fractions of its width and height

Files are taken as tools really write them. What is mended or left out goes into Notes.
"""

import csv
import io
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from common import InputError, printable, read_json, reading, say

MAX_PIXELS = 10**5  # no point is farther away
MAX_FRACTION = 10  # nor as a fraction of its photo
FRACTIONS = (1, 1)  # as a photo's size: points are fractions of its width and height
# A key that only such a file has, and what it is then.
OTHERS = {"joints": "MPII's own format", "score": "results of a network", "regions": "VIA's own format",
          "_via_img_metadata": "VIA's own format", "data": "Label Studio's own format"}


@dataclass
class Object:
    category: str
    points: dict  # {name: (x, y, v)} of those labelled; v is 2, or 1 if something is in front of the point
    box: tuple = None  # x, y, width, height


@dataclass
class Photo:
    source: Path  # the file that names it
    name: str  # its path, with / between folders
    size: tuple  # width and height that the file says, None if it does not; FRACTIONS; later the real ones
    objects: list
    path: Path = None  # where it was found
    is_turned: bool = False  # whether its points are on the photo as its EXIF orientation turns it


@dataclass
class Labels:
    path: Path  # the file
    photos: list
    categories: dict  # {name: (names of keypoints, skeleton)}; a skeleton is pairs of indices from 0


class Notes(dict):
    """{what was mended, left out or found odd: [where, ...]}"""

    def add(self, what, where):
        self.setdefault(what, []).append(where)

    def lines(self):
        return [f"{what}: {where[0]}" if len(where) == 1 else f"{what}: {len(where)}, e.g. {where[0]}"
                for what, where in self.items()]


def read_labels(paths, images, category, notes):
    """Annotation files of one subset -> [Labels]. All those of labelme make one.

    images: the folder of the photos, which YOLO's reader needs. category: what an object is where a file
    does not say it.
    """
    labels, shapes = [], []
    for path in paths:
        with reading(path):
            suffix = path.suffix.lower()
            if suffix == ".json":
                raw = read_json(path)
                if isinstance(raw, dict) and "shapes" in raw:
                    shapes.append(read_labelme(path, raw, category, notes))
                else:
                    labels.append(read_coco(path, raw, notes))
            elif suffix == ".csv":
                labels.append(read_deeplabcut(path, category))
            elif suffix in (".yaml", ".yml"):
                labels.append(read_yolo(path, images, notes))
            else:
                raise InputError(f"{path}: none of COCO's or labelme's .json, DeepLabCut's .csv and YOLO's "
                                 "data.yaml; export it as COCO keypoints")
    if shapes:
        categories = {}  # with their keypoints in the order in which they first appear
        for one in (one for photo in shapes for one in photo.objects):
            names, _ = categories.setdefault(one.category, ([], []))
            names += [name for name in one.points if name not in names]
        labels.append(Labels(shapes[0].source, shapes, categories))
    return labels


def plain(name):
    """left_eye, "Left eye" and left-eye are the same name."""
    return re.sub(r"[\s_-]+", "", name).casefold()


def check_names(names, where):
    """InputError if a name is empty or not printable, or if two are the same."""
    for name, count in Counter(map(plain, names)).items():
        if count > 1:
            raise InputError(f"{where}: {count} are called {name}; give each a name of its own")
        if not name or not name.isprintable():
            raise InputError(f"{where}: {name!r} is not a name")


def count_names(n):
    """What keypoints without names are called."""
    return [f"point {k}" for k in range(1, n + 1)]


def read_point(x, y, v=2, most=MAX_PIXELS):
    """-> (x, y, v); None where nothing is labelled, which tools write as v = 0, NaN, null, "", or 0, 0."""
    x, y, v = (math.nan if number in (None, "") else float(number) for number in (x, y, v))
    if not (abs(x) < most and abs(y) < most and v > 0) or x == y == 0:
        return None
    return x, y, 2 if v > 1 else 1


def read_box(x, y, w, h, most=MAX_PIXELS):
    """-> the same; None if it is none: COCO Annotator writes zeros."""
    is_box = all(abs(number) < most for number in (x, y, w, h)) and w > 0 and h > 0
    return (x, y, w, h) if is_box else None


def read_size(width, height):
    """-> (width, height); None if one is absent or 0."""
    size = float(width or 0), float(height or 0)
    return size if min(size) > 0 else None


# ------------------------------------------------------------------------------------------------------ COCO


def read_coco(path, raw, notes):
    if not isinstance(raw, dict):
        raise InputError(f"{path}: not a COCO keypoints file (its outermost value is a {type(raw).__name__})"
                         f"; export it as COCO{guess(raw)}")
    for part in "images", "annotations", "categories":
        if not isinstance(raw.get(part), list):
            raise InputError(f"{path}: has no list of {part}; it is not a COCO keypoints file{guess(raw)}")
    photos = {}
    for image in raw["images"]:
        if str(image["id"]) in photos:
            raise InputError(f"{path}: two images have the id {image['id']}")
        size = read_size(image.get("width"), image.get("height"))
        photos[str(image["id"])] = Photo(path, read_name(image["file_name"]), size, [])
    categories = read_categories(path, raw, notes)
    for annotation in raw["annotations"]:
        photo = photos.get(str(annotation["image_id"]))
        category = categories.get(str(annotation["category_id"]))
        where = f"annotation {annotation.get('id')} of {path.name}"
        if photo is None:
            notes.add("annotations of images that are not listed, left out", where)
        elif annotation.get("iscrowd"):
            notes.add("annotations of a crowd, left out", where)
        elif points := category and read_points(path, annotation, category[1], notes):
            box = [math.nan if number is None else float(number) for number in annotation.get("bbox") or []]
            if len(box) not in (0, 4):
                raise InputError(f"{path}: bbox is not x, y, width, height in {where}")
            photo.objects.append(Object(category[0], points, read_box(*box) if box else None))
        else:
            notes.add("objects without labelled keypoints, left out", where)
    categories = {name: (names, skeleton) for name, names, skeleton in categories.values()}
    return Labels(path, [*photos.values()], categories)


def guess(raw):
    """What a JSON file that is not COCO's may be."""
    first = raw if isinstance(raw, list) else [raw, *raw.values()] if isinstance(raw, dict) else []
    keys = {key for entry in first[:2] if isinstance(entry, dict) for key in entry}
    return next((f"; it looks like {name}" for key, name in OTHERS.items() if key in keys), "")


def read_name(name):
    """A photo's name in a file -> its path. Label Studio writes /data/local-files/?d=folder%5Ca.jpg."""
    name = unquote(name.partition("?d=")[2] or name) if "?d=" in name or "://" in name else name
    return name.replace("\\", "/")


def read_categories(path, raw, notes):
    """-> {id: (name, names of keypoints, skeleton)} of the categories that have keypoints.

    Others are for boxes only, or the root that Roboflow adds, often with the name of a real one.
    """
    counts = {str(one["category_id"]): len(flatten(one["keypoints"])) // 3
              for one in raw["annotations"] if one.get("keypoints")}
    categories = {}
    for entry in raw["categories"]:
        number, name, names = str(entry["id"]), entry["name"], entry.get("keypoints") or []
        if not names and number in counts:
            names = count_names(counts[number])
        if not isinstance(names, list):
            raise InputError(f"{path}: category {name}: its keypoints are not a list of names")
        if names:
            names = [str(keypoint) for keypoint in names]
            check_names(names, f"{path}: category {name}: keypoints")
            skeleton = read_skeleton(entry.get("skeleton") or [], len(names), name, notes)
            categories[number] = name, names, skeleton
    check_names([name for name, *_ in categories.values()], f"{path}: categories")
    if not categories:
        none = "no annotation has any" if raw["annotations"] else "there are no annotations"
        raise InputError(f"{path}: no category names keypoints, and {none}; in CVAT the label must be a "
                         "skeleton")
    return categories


def read_skeleton(lines, n, name, notes):
    """-> pairs of indices from 0. COCO counts from 1, some tools from 0. Lines to nowhere are dropped."""
    try:
        first = 0 if any(0 in line for line in lines) else 1
        pairs = [(int(a) - first, int(b) - first) for a, b in lines]
    except (TypeError, ValueError, OverflowError):
        pairs = [(-1, -1)]
    kept = [pair for pair in pairs if 0 <= min(pair) <= max(pair) < n]
    if len(kept) < len(pairs):
        notes.add("skeletons with lines to keypoints that there are not, drawn without those lines", name)
    return kept


def flatten(values):
    """Numbers, or [x, y, v] for each point -> numbers."""
    return [number for value in values for number in (value if isinstance(value, list) else [value])]


def read_points(path, annotation, names, notes):
    values = flatten(annotation.get("keypoints") or [])
    if values and len(values) != 3 * len(names):
        raise InputError(f"{path}: annotation {annotation.get('id')} has {len(values)} numbers for "
                         f"{len(names)} keypoints; x, y, v for each are wanted")
    points = {name: read_point(*values[3 * k:3 * k + 3]) for k, name in enumerate(names)} if values else {}
    if any(point is None and v for point, v in zip(points.values(), values[2::3])):
        notes.add("annotations with keypoints at 0, 0 or NaN, which count as not labelled",
                  f"annotation {annotation.get('id')} of {path.name}")
    return {name: point for name, point in points.items() if point}


# --------------------------------------------------------------------------------------------------- labelme


def read_labelme(path, raw, category, notes):
    """-> Photo. Shapes with one group_id are an object; a rectangle or polygon is its box and category."""
    groups, objects = {}, []
    for shape in raw["shapes"]:
        groups.setdefault(shape.get("group_id"), []).append(shape)
    for number, shapes in groups.items():
        points = [shape for shape in shapes if shape.get("shape_type") == "point"]
        outlines = [shape for shape in shapes if shape.get("shape_type") in ("rectangle", "polygon")]
        names, where = [str(shape["label"]) for shape in points], f"group {number} of {path.name}"
        if len(set(map(plain, names))) < len(names):
            notes.add("groups with two points of one name, left out (each object needs a group_id)", where)
            continue
        if len({str(shape["label"]) for shape in outlines}) > 1:
            notes.add("groups with outlines of several kinds, left out (each object needs a group_id)", where)
            continue
        box = None
        if len(outlines) == 1:
            xs, ys = zip(*((float(x), float(y)) for x, y in outlines[0]["points"]))
            box = read_box(min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))
        kind = str(outlines[0]["label"]) if outlines else category
        places = {name: read_point(*shape["points"][0]) for name, shape in zip(names, points)}
        if places := {name: place for name, place in places.items() if place}:
            objects.append(Object(kind, places, box))
        else:
            notes.add("objects without labelled keypoints, left out", where)
    size = read_size(raw.get("imageWidth"), raw.get("imageHeight"))
    return Photo(path, read_name(raw["imagePath"]), size, objects)


# ------------------------------------------------------------------------------------------------ DeepLabCut


def read_deeplabcut(path, category):
    """A column's rows of the header are its scorer, individual (if there are several), body part, and x or y.

    Body parts that belong to no individual ("single") are left out if others do.
    """
    text = path.read_text(encoding="utf-8-sig")
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(row)]
    header = {row[0]: row for row in rows[:4]}
    if "coords" not in header or "bodyparts" not in header:
        raise InputError(f"{path}: not a CSV of DeepLabCut's labels (it has no rows bodyparts and coords)")
    coords, parts = header["coords"], header["bodyparts"]
    first = coords.index("x")  # the photo's path takes one column or three
    used = [k for k in range(first, len(coords)) if coords[k]]
    if [coords[k] for k in used] != ["x", "y"] * (len(used) // 2):
        raise InputError(f"{path}: not a CSV of DeepLabCut's labels (columns other than x and y)")
    scorers = sorted({header["scorer"][k] for k in used}) if "scorer" in header else []
    if len(scorers) > 1:
        raise InputError(f"{path}: {len(scorers)} scorers, {' and '.join(scorers)}; keep the columns of one")
    individuals, columns = header.get("individuals", [""] * len(coords)), {}
    for k in used[::2]:
        columns.setdefault(individuals[k], []).append((parts[k], k))
    if len(columns) > 1:
        columns.pop("single", None)
    for columns_of_one in columns.values():
        check_names([part for part, _ in columns_of_one], f"{path}: body parts")
    photos = []
    for row in rows[rows.index(coords) + 1:]:
        cells = [cell.replace(",", ".") for cell in row] + [""] * len(coords)
        found = [{part: point for part, k in of if (point := read_point(*cells[k:k + 2]))}
                 for of in columns.values()]
        photos.append(Photo(path, read_name("/".join(row[:first])), None,
                            [Object(category, points) for points in found if points]))
    names = dict.fromkeys(part for of in columns.values() for part, _ in of)
    return Labels(path, photos, {category: ([*names], [])})


# ------------------------------------------------------------------------------------------------------ YOLO


def read_settings(path):
    """data.yaml -> {key: [word, ...]} of its outermost keys: values of lists, and of {0: ..., 1: ...}."""
    settings, key = {}, None
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        line = re.sub(r"(^|\s)#.*", "", line)
        if match := re.match(r"(\w+)\s*:(.*)", line):
            key, line = match.groups()
            settings[key] = []
        if key:
            for word in re.split("[][{},]", line):
                word = re.sub(r"^(-\s+|\d+\s*:(\s+|$))+", "", word.strip())
                settings[key] += [word.strip("'\"")] if word else []
    return settings


def find_yolo_photos(path):
    """data.yaml -> (subset, folder of photos) for each folder that it names. Says which are not there."""
    settings, folders = read_settings(path), []
    for subset in "train", "val", "test":
        for folder in settings.get(subset, []):
            # Paths are relative to `path`, which is often another machine's; Roboflow's have ../ too many.
            places = [Path(path.parent, *settings.get("path", [])[:1], folder), path.parent / folder,
                      path.parent / folder.lstrip("./")]
            if found := next((place for place in places if place.is_dir()), None):
                folders.append((subset, found))
            elif subset == "train":
                raise InputError(f"{path}: {subset}: {folder} is not a folder of photos that is here; "
                                 "--images says where they are")
            else:
                say(printable(f"{path}: {subset}: {folder} is not a folder of photos that is here; left out"))
    return folders


def read_yolo(path, images, notes):
    """The photos in `images` and their .txt files: class, box, points, all as fractions."""
    settings, labels = read_settings(path), Path(images)
    if "kpt_shape" not in settings or "names" not in settings:
        raise InputError(f"{path}: not YOLO-pose's data.yaml (no kpt_shape, or no names)")
    K, D = map(int, settings["kpt_shape"])
    if "images" in labels.parts:  # .../images/train -> .../labels/train
        n = len(labels.parts) - 1 - labels.parts[::-1].index("images")
        labels = Path(*labels.parts[:n], "labels", *labels.parts[n + 1:])
    names, kinds = settings.get("kpt_names", []), settings["names"]
    if len(names) != K * len(kinds):  # those of each class one after another; or the same for all, or none
        names = (names if len(names) == K else count_names(K)) * len(kinds)
    categories = {kind: (names[i * K:(i + 1) * K], []) for i, kind in enumerate(kinds)}
    texts = {file.relative_to(labels).with_suffix(""): file for file in sorted(labels.rglob("*.txt"))}
    photos = []
    for file in sorted(Path(images).rglob("*")):
        name = file.relative_to(images)
        is_photo = file.suffix.lower() not in (".txt", ".npy", ".json", ".xml")  # caches and others' labels
        if is_photo and (text := texts.pop(name.with_suffix(""), None)):
            with reading(text):
                objects = read_lines(text, categories, K, D, notes)
            photos.append(Photo(path, name.as_posix(), FRACTIONS, objects))
    for text in texts.values():
        notes.add("label files without a photo, left out", text.name)
    return Labels(path, photos, categories)


def read_lines(path, categories, K, D, notes):
    """A photo's .txt -> its Objects. D is 3 if points have a visibility, else 2."""
    objects, kinds = [], dict(enumerate(categories.items()))
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        numbers = [float(number) for number in line.split()]
        if len(numbers) not in (0, 5 + K * D):
            raise InputError(f"{path}: a line has {len(numbers)} numbers; class, box and {K} x {D} for the "
                             f"keypoints, as kpt_shape says, are {5 + K * D}")
        if numbers:
            kind, x, y, w, h, *rest = numbers
            if kind not in kinds:
                raise InputError(f"{path}: class {kind:g}, where data.yaml names {len(kinds)}, from 0 on")
            category, (names, _) = kinds[kind]
            points = {name: read_point(*rest[k * D:k * D + D], most=MAX_FRACTION)
                      for k, name in enumerate(names)}
            if points := {name: point for name, point in points.items() if point}:
                box = read_box(x - w / 2, y - h / 2, w, h, most=MAX_FRACTION)
                objects.append(Object(category, points, box))
            else:
                notes.add("objects without labelled keypoints, left out", f"one in {path.name}")
    return objects
