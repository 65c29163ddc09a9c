"""Photos and boxes as people have them: files of all kinds, folders, patterns, what a detector wrote."""

import io
import math
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from chat import Category
from common import InputError, printable, read_json, reading
from data import to_rgb
from tools.fit import find_photo, list_folders
from tools.formats import read_box, read_name

with suppress(ImportError):  # photos of iPhones, where the package is installed
    import pillow_heif
    pillow_heif.register_heif_opener()

FILMS = ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".wmv", ".mpg", ".mpeg", ".mts", ".3gp"
MAX_PIXELS = 10**6  # no photo is wider, and no box farther away


@dataclass(frozen=True)
class Job:
    """An object in a photo, and its keypoints that are wanted."""

    path: Path
    name: str  # of the photo, for other programs
    box: tuple  # x, y, width, height; None for the whole photo
    category: Category
    image_id: int
    category_id: int = 1


def open_photo(photo):
    """What a Locator takes for a photo -> RGB image, upright: turned as its EXIF data ask."""
    is_path = isinstance(photo, (str, Path))
    if is_path and not os.path.isfile(photo):  # False also for a name that is too long for one
        raise InputError(f"{photo}: no such photo")
    is_heic = is_path and Path(photo).suffix.lower() in (".heic", ".heif")
    advice = "save it as JPEG or PNG" + ", or pip install pillow-heif" * is_heic
    with reading(photo if is_path else "the image", advice):
        if isinstance(photo, (np.ndarray, torch.Tensor)):
            pixels = np.asarray(photo.cpu() if isinstance(photo, torch.Tensor) else photo)
            if pixels.dtype != np.uint8 or 0 in pixels.shape:
                raise InputError(f"an array {pixels.shape} of {pixels.dtype} is not a photo; (h, w, 3) of "
                                 "uint8 is, red first")
            is_turned = pixels.ndim == 3 and pixels.shape[0] == 3 != pixels.shape[2]  # (3, h, w)
            photo = Image.fromarray(pixels.transpose(1, 2, 0) if is_turned else pixels)
        elif not isinstance(photo, Image.Image):
            photo = Image.open(io.BytesIO(photo) if isinstance(photo, bytes) else photo)
        return to_rgb(ImageOps.exif_transpose(photo))


def check_box(box, photo):
    """-> x, y, w, h, those of the whole photo if box is None. A box may reach over the edge."""
    width, height = photo.size
    try:
        x, y, w, h = map(float, (0, 0, width, height) if box is None else box)
    except (TypeError, ValueError):
        raise InputError(f"box {box} is not x, y, width and height, four numbers") from None
    is_sound = 0.01 <= w <= MAX_PIXELS and 0.01 <= h <= MAX_PIXELS
    if not (is_sound and -MAX_PIXELS <= x < width and -MAX_PIXELS <= y < height and x + w > 0 and y + h > 0):
        raise InputError(f"box {x:g},{y:g},{w:g},{h:g}: lies outside the photo, which is {width} x {height} "
                         "pixels, or is empty")
    return x, y, w, h


# ---------------------------------------------------------------------------------- what a command line names


def is_film(args):
    """Whether predict.py was given a film. InputError if there is something else beside it."""
    films = [path for path in args.photos if path.suffix.lower() in FILMS]
    if films and (len(args.photos) > 1 or args.boxes):
        raise InputError(f"{films[0]}: a film; give it alone, at most with --box")
    return bool(films)


def find_jobs(args, category, find_set, trained):
    """What predict.py was given -> Jobs. category: None if each is to be found by its name, with find_set().

    trained: the descriptions of the checkpoint. A single photo and its box are tried.
    """
    if args.boxes and not (len(args.photos) == 1 and args.photos[0].is_dir()):
        raise InputError("--boxes: give the one folder in which its photos are")
    if args.boxes:
        find_set = (lambda _: category) if category else find_set
        jobs = read_boxes(args.boxes, args.photos[0], find_set, trained)
    else:
        photos = find_photos(args.photos, args.out)
        jobs = [Job(photo, name, args.box, category, number)
                for number, (photo, name) in enumerate(zip(photos, name_photos(photos)), 1)]
    if len(jobs) == 1:
        check_box(jobs[0].box, open_photo(jobs[0].path))
    return jobs


def keep_out(out, files):
    """InputError if one of the user's files lies in the folder of results, itself or what it is a link to."""
    for file in (place for file in files for place in (file.absolute(), file.resolve())):
        if file.parent.resolve() == out.resolve():
            raise InputError(f"--out {out}: holds {file.name}, which could be overwritten; name another")


def find_photos(paths, out=None):
    """Photos, patterns and folders -> photos. In folders, pictures that are in `out` or hidden are none."""
    photos = []
    for path in paths:
        matches = [] if os.path.exists(path) else sorted(map(Path, glob(str(path), recursive=True)))
        for match in matches or [path]:
            photos += search(match, out) if os.path.isdir(match) else [match]
    return list(dict.fromkeys(photos))


def search(folder, out):
    """All photos in a folder and in those within. Says what else there is."""
    stubs = "BUFR", "GRIB", "HDF5", "MPEG"  # Pillow knows such a file when it sees it, but cannot decode it
    endings = {ending for ending, kind in Image.registered_extensions().items()
               if kind in Image.OPEN and kind not in stubs}
    entries = [entry for entry in sorted(folder.rglob("*")) if entry.is_file()
               and not any(part.startswith(".") for part in entry.relative_to(folder).parts)
               and not (out and folder.resolve() in out.resolve().parents
                        and out.resolve() in entry.resolve().parents)]
    found = [entry for entry in entries if entry.suffix.lower() in endings]
    if others := [str(entry.relative_to(folder)) for entry in entries if entry not in found]:
        named = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
        print(printable(f"{folder}: left out {named}: not photos of a kind that this program reads"),
              file=sys.stderr)
    if not found:
        raise InputError(f"{folder}: no photo in this folder")
    return found


def name_photos(photos):
    """Names that tell photos apart: their paths below the innermost folder that holds them all."""
    parents = [photo.absolute().parts[:-1] for photo in photos]
    n = next((n for n, parts in enumerate(zip(*parents)) if len(set(parts)) > 1), min(map(len, parents)))
    return [Path(*photo.absolute().parts[n:]).as_posix() for photo in photos]


# ------------------------------------------------------------------------------------------------------ boxes


def read_boxes(path, folder, find_set, trained):
    """A COCO file, or a list of a detector's results -> a Job for each box.

    folder: of the photos. find_set: a category's name -> Category, or InputError. trained: the checkpoint's
    descriptions, whose numbers of categories a list goes by.
    """
    raw, jobs, left_out = read_json(path), [], {}
    with reading(path, "is it a COCO file, or a list of detections, with boxes?"):
        if isinstance(raw, list):
            entries, places = raw, number_photos(folder)
            names = {number: entry["name"] for number, entry in trained["categories"].items()}
        else:
            entries = raw["annotations"]
            names = {str(one["id"]): one["name"] for one in raw.get("categories", [])}
            places = {str(one["id"]): place_photo(one["file_name"], path, folder) for one in raw["images"]}
        kinds = dict.fromkeys(str(entry["category_id"]) for entry in entries)
        sets = {kind: try_set(find_set, names.get(kind, kind)) for kind in kinds}
        for entry in entries:
            number, kind = str(entry["image_id"]), str(entry["category_id"])
            numbers = [math.nan if number is None else float(number) for number in entry.get("bbox") or []]
            box, category = read_box(*numbers) if numbers else None, sets[kind]
            why = ("no box, or a crowd" if box is None or entry.get("iscrowd") else
                   "no photo has their image_id" if number not in places else
                   f"category {category}" if isinstance(category, str) else None)
            if why:
                left_out.setdefault(why, []).append(number)
            else:
                jobs.append(Job(*places[number], box, category, entry["image_id"], entry["category_id"]))
    for why, numbers in left_out.items():
        print(printable(f"{path}: left out {len(numbers)} of {len(entries)} objects, e.g. of image_id "
                        f"{numbers[0]}: {why}"), file=sys.stderr)
    if not jobs:
        raise InputError(f"{path}: no box in it that can be used")
    if entries is raw:
        said = ", ".join(f"{kind} is {names[kind]}" for kind in kinds if kind in names)
        print(printable(f"{path}: names no categories; by the checkpoint's numbers {said}"), file=sys.stderr)
    return jobs


def try_set(find_set, name):
    """-> the Category, named as in the file, or why there is none."""
    try:
        return replace(find_set(name), name=name)
    except InputError as e:
        return str(e)


def place_photo(name, path, folder):
    """A photo's name in a file -> where it is, and the name. Tools put their own folders before it."""
    name = read_name(name)
    return find_photo(name, list_folders(Path(path), folder))[0] or folder / name, name


def number_photos(folder):
    """-> {a detector's image_id: (path, name)}. 139 is 139.jpg or, if no other ends so, 000000000139.jpg."""
    photos, endings = find_photos([folder]), {}
    for photo in photos:
        if match := re.search(r"0*(\d+)$", photo.stem):
            endings.setdefault(match[1], []).append(photo)
    places = {number: of_number[0] for number, of_number in endings.items() if len(of_number) == 1}
    places |= {photo.stem: photo for photo in photos}
    return {number: (photo, photo.relative_to(folder).as_posix()) for number, photo in places.items()}
