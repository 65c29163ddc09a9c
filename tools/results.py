"""What predict.py does with photos: asks about them, prints, draws, and writes tables or other tools' labels.

    keypoints.csv                a row for each keypoint
    keypoints.json               the same with boxes; with --format coco, a whole COCO file
    NAME.json                    --format labelme, one for each photo
    CollectedData_CapeLLM.csv    --format deeplabcut; its program turns it to .h5 with convertcsv2h5
"""

import csv
import io
import os
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common import InputError, make_folder, printable, write_json, write_whole
from tools.draw import draw_points, save_picture
from tools.photos import Job, check_box, keep_out, open_photo


class Result(NamedTuple):
    job: Job
    size: tuple  # width and height of the photo
    points: dict  # {name: Found}


def locate_jobs(jobs, args, load):
    """Asks about all Jobs and gives out what args, predict.py's, ask for. load: makes the Locator."""
    if args.out:
        given = [Path(file) for file in (args.boxes, args.keypoints, args.descriptions) if file]
        given = [file for file in given if file.name == "keypoints.json"]
        keep_out(args.out, [*(job.path for job in jobs), *given])
        make_folder(args.out)
    locator, results, taken, n_failed = load(), [], set(), 0
    bar = tqdm(total=len(jobs), disable=len(jobs) == 1, dynamic_ncols=True)
    for start in range(0, len(jobs), args.batch):
        together = jobs[start:start + args.batch]
        batch = open_photos(together, bar, is_only=len(jobs) == 1)
        asked = zip(*((photo, job.category, job.box) for job, photo in batch))
        for (job, photo), points in zip(batch, locator(*map(list, asked)) if batch else []):
            if len(jobs) > 1:
                bar.write(printable(str(job.path)))
            print_points(points, job.box, photo, bar.write)
            if args.out:
                picture = draw_found(photo, job.box, job.category, points, args.threshold)
                save_picture(picture, args.out / name_file(job.path, ".png", taken))
            # without the distributions, 16 kB a keypoint
            points = {name: replace(p, x_distribution=None, y_distribution=None)
                      for name, p in points.items()}
            results.append(Result(job, photo.size, points))
        n_failed += len(together) - len(batch)
        bar.update(len(together))
    bar.close()
    if args.out:
        write_table(args.out / "keypoints.csv", results)
        labels = FORMATS[args.format](args.out, results, args.threshold)
        pictures = f"{len(results)} picture{'s' * (len(results) != 1)}"
        print(f"wrote {args.out}/: {labels}, keypoints.csv and {pictures}")
    if n_failed:
        raise InputError(f"{n_failed} of {len(jobs)} objects were left out, see above")


def open_photos(jobs, bar, is_only):
    """-> [(Job, photo), ...]. What is wrong with one is said, or raised if there is no other."""
    batch = []
    for job in jobs:
        try:
            photo = open_photo(job.path)
            check_box(job.box, photo)
            batch.append((job, photo))
        except InputError as e:
            if is_only:
                raise
            line = str(e).removeprefix(printable(f"{job.path}: "))
            bar.write(f"{printable(str(job.path))}: {line}", file=sys.stderr)
    return batch


def name_file(path, ending, taken):
    """A name for what belongs to a photo that no other photo of the run has."""
    name, n = f"{path.stem}{ending}", 1
    while name in taken:
        n += 1
        name = f"{path.stem}-{n}{ending}"
    taken.add(name)
    return name


def draw_found(photo, box, category, points, threshold=0.5):
    """The picture of what was found, see draw_points()."""
    places = [None if p.x is None else (p.x, p.y) for p in points.values()]
    return draw_points(photo, box or (0, 0, *photo.size), category, places,
                       confidence=[p.confidence for p in points.values()], threshold=threshold)


# ----------------------------------------------------------------------------------------------------- screen


def print_sets(category, sets, trained, args):
    """The texts of a category or, if it is None, all sets: those the checkpoint brings, and the others."""
    if category:
        return print(*(printable(f"{name}: {text}") for name, text in category.keypoints), sep="\n")
    names = {}
    for name, one in sets.items():
        names.setdefault(tuple(one.keypoints), []).append(name)
    own, others = [], []
    for keypoints, called in names.items():
        line = f"{', '.join(called)}: {', '.join(keypoint for keypoint, _ in keypoints)}"
        (own if called[0] in trained["keypoint_sets"] else others).append(printable(line))
    print(f"sets of {args.checkpoint}:", *sorted(own), sep="\n")
    if others:
        print(f"\nmore sets, of {args.descriptions or 'descriptions.json'}:", *sorted(others), sep="\n")


def say_new_words(categories, trained):
    """Says if most words of what is asked are in none of the texts that a model was trained with."""
    def words(texts):
        return dict.fromkeys(word for text in texts for word in re.findall(r"\w+", text.casefold()))
    asked = words(text for one in categories for keypoint in one.keypoints for text in keypoint)
    known = words(text for one in trained["keypoint_sets"].values() for keypoint in one
                  for text in (keypoint["name"], keypoint["description"]))
    new = [word for word in asked if word not in known]
    if 2 * len(new) > len(asked):
        named = ", ".join(new[:4]) + ", ..." * (len(new) > 4)
        print(printable(f"note: most of these keypoints' words were not in the training ({named}): what is "
                        "found may be no more than a guess"), file=sys.stderr)


def print_points(points, box, photo, say=print):
    """A line for each keypoint, and what is odd about them."""
    say(f"{'x':>9}{'y':>9}{'confidence':>12}  keypoint")
    for name, found in points.items():
        if found.x is None:
            say(f"{'no coordinates in the answer':>30}  {printable(name)}")
        else:
            confidence = "unknown" if found.confidence is None else f"{found.confidence:.2f}"
            say(f"{found.x:9.1f}{found.y:9.1f}{confidence:>12}  {printable(name)}")
    places = {name: (found.x, found.y) for name, found in points.items() if found.x is not None}
    outside = [printable(name) for name, (x, y) in places.items()
               if not (0 <= x < photo.width and 0 <= y < photo.height)]
    if outside:
        say(f"outside the photo: {', '.join(outside)}; the square around the box reaches over its edge")
    if len(places) > 2 and max(np.ptp([*places.values()], axis=0)) < 0.02 * found.square[2]:
        say("all points are in one place: the model does not tell these keypoints apart")
    if box and looks_like_corners(box, photo):
        x1, y1, x2, y2 = box
        say("hint: the box reaches far over the edge. A box is x,y,width,height; if these are corners, write "
            f"--box {x1:g},{y1:g},{x2 - x1:g},{y2 - y1:g}")


def looks_like_corners(box, photo):
    """Whether x,y,w,h reaches far over the photo's edge, but would not as x1,y1,x2,y2."""
    x, y, w, h = box
    width, height = photo.size
    reaches_over = x + w > 1.1 * width or y + h > 1.1 * height
    return reaches_over and 0 <= x < w <= width and 0 <= y < h <= height


def round_off(value):
    """For people: a number to 2 digits after the point, a distribution to 6; None as it is."""
    if value is None:
        return None
    return value.round(6).tolist() if isinstance(value, np.ndarray) else round(value, 2)


# ------------------------------------------------------------------------------------------------------ files


def write_rows(path, rows, encoding):
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_whole(path, text.getvalue().encode(encoding, "backslashreplace"))


def number_objects(results):
    """-> for each Result, which object of its photo it is, from 1."""
    seen = Counter()
    for result in results:
        seen[result.job.path] += 1
        yield seen[result.job.path]


def write_table(path, results):
    rows = [("photo", "object", "keypoint", "x", "y", "confidence")]
    for result, number in zip(results, number_objects(results)):
        rows += [(result.job.path, number, name, round_off(p.x), round_off(p.y), round_off(p.confidence))
                 for name, p in result.points.items()]
    write_rows(path, rows, "utf-8-sig")  # whose mark before the text tells Excel that it is UTF-8


def write_plain(out, results, threshold):
    write_json(out / "keypoints.json", [
        {"photo": str(job.path), "box": job.box, "keypoints": [
            {"name": name, "x": round_off(p.x), "y": round_off(p.y), "confidence": round_off(p.confidence)}
            for name, p in points.items()]} for job, size, points in results])
    return "keypoints.json"


def write_coco(out, results, threshold):
    """A whole COCO file. Visibility is 2, 1 below the threshold of confidence, 0 where nothing was found."""
    images, categories, annotations = {}, {}, []
    for number, (job, (width, height), points) in enumerate(results, 1):
        images[job.image_id] = {"id": job.image_id, "file_name": job.name, "width": width, "height": height}
        categories[job.category_id] = {
            "id": job.category_id, "name": job.category.name, "supercategory": "", "keypoints": [*points],
            "skeleton": [[a + 1, b + 1] for a, b in job.category.skeleton]}
        keypoints = []
        for p in points.values():
            is_unsure = p.confidence is not None and p.confidence < threshold
            place = (0, 0, 0) if p.x is None else (p.x, p.y, 1 if is_unsure else 2)
            keypoints += map(round_off, place)
        known = [p.confidence for p in points.values() if p.confidence is not None]
        box = job.box or (0, 0, width, height)
        annotations.append({
            "id": number, "image_id": job.image_id, "category_id": job.category_id, "bbox": box,
            "area": box[2] * box[3], "iscrowd": 0, "segmentation": [], "keypoints": keypoints,
            "num_keypoints": sum(v > 0 for v in keypoints[2::3]),
            "score": round_off(sum(known) / len(known) if known else 1.0)})
    write_json(out / "keypoints.json", {
        "images": [*images.values()], "categories": [*categories.values()], "annotations": annotations})
    return "keypoints.json"


def write_labelme(out, results, threshold):
    """A file for each photo: a point for each keypoint found, and a rectangle. An object is a group."""
    files, taken = {}, set()
    for (job, (width, height), points), number in zip(results, number_objects(results)):
        shapes = [("point", name, [(p.x, p.y)]) for name, p in points.items() if p.x is not None]
        if job.box:
            x, y, w, h = job.box
            shapes.append(("rectangle", job.category.name, [(x, y), (x + w, y + h)]))
        file = files.setdefault(job.path, {
            "version": "5.5.0", "flags": {}, "shapes": [], "imagePath": os.path.relpath(job.path, out),
            "imageData": None, "imageHeight": height, "imageWidth": width})
        file["shapes"] += [
            {"label": label, "points": [[*map(round_off, place)] for place in places], "group_id": number,
             "description": "", "shape_type": kind, "flags": {}} for kind, label, places in shapes]
    for path, file in files.items():
        write_json(out / name_file(path, ".json", taken), file)
    return f"{len(files)} file{'s' * (len(files) != 1)} of labelme"


def write_deeplabcut(out, results, threshold):
    """Columns for each keypoint of each object, rows for photos. One object a photo needs no individuals."""
    numbers = [*number_objects(results)]
    parts = dict.fromkeys(name for result in results for name in result.points)
    columns = [(n, part) for n in range(1, max(numbers, default=1) + 1) for part in parts]
    header = {"scorer": ["CapeLLM" for _ in columns], "individuals": [f"object{n}" for n, _ in columns],
              "bodyparts": [part for _, part in columns]}
    if max(numbers, default=1) == 1:
        del header["individuals"]
    rows = [[name, "", "", *(cell for cell in cells for _ in "xy")] for name, cells in header.items()]
    rows.append(["coords", "", "", *"xy" * len(columns)])
    photos = {}
    for n, (job, _, points) in zip(numbers, results):
        cells = photos.setdefault(job.path, {})
        cells |= {(n, name): (round_off(p.x), round_off(p.y)) for name, p in points.items()}
    for path, cells in photos.items():
        places = [value for column in columns for value in cells.get(column, (None, None))]
        rows.append(["labeled-data", path.absolute().parent.name, path.name, *places])
    write_rows(out / "CollectedData_CapeLLM.csv", rows, "utf-8")
    return "CollectedData_CapeLLM.csv"


FORMATS = {"plain": write_plain, "coco": write_coco, "labelme": write_labelme, "deeplabcut": write_deeplabcut}
