"""Finds keypoints of your choice, in your words, in your photos: prints them, draws them, writes tables.

    python predict.py CKPT photo.jpg --box 40,60,300,380 -k "left eye: the eye ..." -k "nose: the tip of ..."
    python predict.py CKPT photos/ --keypoints animal_body --out found/      pictures and tables of a folder
    python predict.py CKPT --list                                            which sets of keypoints it knows
    python predict.py CKPT --serve                                           a page to try it
"""

import argparse
import csv
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from checkpoint import read_checkpoint
from common import Help, InputError, make_folder, printable, read_json, run, write_json
from decode import DECODINGS
from locator import (
    DESCRIPTIONS,
    Locator,
    check_box,
    make_category,
    open_photo,
    parse_box,
    parse_keypoint,
    parse_keypoints,
    read_sets,
    round_off,
)
from model import DTYPES
from tools.draw import draw_points, save_picture


def looks_like_corners(box, photo):
    """Whether x,y,w,h reaches far over the photo's edge, but would not as x1,y1,x2,y2."""
    x, y, w, h = box
    width, height = photo.size
    reaches_over = x + w > 1.1 * width or y + h > 1.1 * height
    return reaches_over and 0 <= x < w <= width and 0 <= y < h <= height


@dataclass(frozen=True)
class Job:
    """An object in a photo, of which keypoints are wanted. box: None for the whole photo."""

    path: Path
    box: tuple
    image_id: int
    category_id: int = 1


def find_jobs(paths, box, boxes):
    """Photos and folders -> Jobs. boxes: a COCO file that says which photos of the one folder, and where."""
    if boxes:
        if len(paths) != 1:
            raise InputError("--boxes: give the one folder in which its photos are")
        return read_boxes(boxes, paths[0])
    photos, endings = [], Image.registered_extensions()
    for path in paths:
        entries = [p for p in sorted(path.iterdir()) if p.name[0] != "."] if path.is_dir() else [path]
        found = [p for p in entries if p.suffix.lower() in endings or p == path]
        if others := [p.name + "/" * p.is_dir() for p in entries if p not in found]:
            named = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
            print(printable(f"{path}: left out {named}: not photos of a kind that this program reads"),
                  file=sys.stderr)
        if not found:
            raise InputError(f"{path}: no photo in this folder")
        photos += found
    return [Job(photo, box, number) for number, photo in enumerate(photos, 1)]


def read_boxes(path, folder):
    """A COCO file -> a Job for each of its annotations that has a box."""
    raw, jobs = read_json(path, dict), []
    try:
        photos = {image["id"]: folder / image["file_name"] for image in raw["images"]}
        for annotation in raw["annotations"]:
            x, y, w, h = map(float, annotation["bbox"])
            number = annotation["image_id"]
            jobs.append(Job(photos[number], (x, y, w, h), number, annotation["category_id"]))
    except KeyError as e:
        raise InputError(f"{path}: not a COCO file with boxes: an entry lacks {e}, or no image has "
                         "that id") from None
    except (TypeError, ValueError) as e:
        raise InputError(f"{path}: not a COCO file with boxes ({type(e).__name__}: {e})") from None
    if not jobs:
        raise InputError(f"{path}: no box in it")
    return jobs


def print_points(points, photo, say=print):
    """A line for each keypoint, and what is odd about them."""
    say(f"{'x':>9}{'y':>9}{'confidence':>12}  keypoint")
    for name, found in points.items():
        if found.x is None:
            say(f"{'no coordinates in the answer':>30}  {printable(name)}")
        else:
            confidence = "unknown" if found.confidence is None else f"{found.confidence:.2f}"
            say(f"{found.x:9.1f}{found.y:9.1f}{confidence:>12}  {printable(name)}")
    places = [(found.x, found.y) for found in points.values() if found.x is not None]
    outside = [name for name, found in points.items() if found.x is not None
               and not (0 <= found.x < photo.width and 0 <= found.y < photo.height)]
    if outside:
        say(f"outside the photo: {', '.join(outside)}; the square around the box reaches over its edge")
    if len(places) > 2 and max(np.ptp(places, axis=0)) < 0.02 * found.square[2]:
        say("all points are in one place: the model does not tell these keypoints apart")


def write_tables(folder, found, form):
    """keypoints.json and keypoints.csv of [(Job, points)], or with form "coco" COCO's keypoint results."""
    rows, objects, contents = [("photo", "object", "keypoint", "x", "y", "confidence")], {}, []
    for job, points in found:
        objects[job.path] = objects.get(job.path, 0) + 1
        named = [{"name": name, **{part: round_off(getattr(p, part)) for part in ("x", "y", "confidence")}}
                 for name, p in points.items()]
        contents.append({"photo": str(job.path), "box": job.box, "keypoints": named})
        rows += [(job.path, objects[job.path], *point.values()) for point in named]
    if form == "coco":
        contents = [coco_result(job, points) for job, points in found]
    write_json(folder / "keypoints.json", contents)
    try:
        # Excel knows UTF-8 by the mark that utf-8-sig puts before it.
        with open(folder / "keypoints.csv", "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows([disarm(cell) for cell in row] for row in rows)
    except OSError as e:
        raise InputError(f"{folder}/keypoints.csv: cannot be written ({e})") from None


def disarm(cell):
    """A cell of a table. An apostrophe before a text keeps a spreadsheet from taking it for a formula."""
    is_formula = isinstance(cell, (str, Path)) and str(cell).startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{cell}" if is_formula else cell


def coco_result(job, points):
    """An entry of COCO's keypoint results. Visibility is 1; a keypoint that was not found is 0, 0, 0."""
    keypoints = [v for p in points.values() for v in ((0, 0, 0) if p.x is None else (p.x, p.y, 1))]
    known = [p.confidence for p in points.values() if p.confidence is not None]
    return {"image_id": job.image_id, "category_id": job.category_id, "keypoints": keypoints,
            "score": sum(known) / len(known) if known else 1.0}


def name_picture(path, taken):
    """A name for the picture of a photo that no other photo of the run has."""
    name, n = f"{path.stem}.png", 1
    while name in taken:
        n += 1
        name = f"{path.stem}-{n}.png"
    taken.add(name)
    return name


# --------------------------------------------------------------------------------------------------- program


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        usage="%(prog)s CKPT PHOTO... -k 'NAME: TEXT' [-k ...] [options, see --help]\n"
        "       %(prog)s CKPT PHOTO... --keypoints SET [options, see --help]\n"
        "       %(prog)s CKPT --list\n       %(prog)s CKPT --serve", allow_abbrev=False,
        description="Finds keypoints in photos.", formatter_class=Help)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="what train.py wrote")
    add("photos", nargs="*", type=Path, metavar="PHOTO", help="photos, or folders of them (not those within)")
    add = parser.add_argument_group("what to find, and where").add_argument
    add("-k", "--keypoint", action="append", default=[], metavar="'NAME: TEXT'",
        help="a keypoint and where it is; may be repeated")
    add("--keypoints", metavar="SET", help='a set of keypoints, see --list; or "name: text; name: text"; or '
        "a file: .json {name: text}, or .txt with one a line")
    add("--descriptions", metavar="JSON", help="a file of more keypoint sets (default: descriptions.json "
        "beside this program)")
    add("--list", action="store_true", help="show the sets of keypoints, or the texts of --keypoints")
    add("--box", type=parse_box, metavar="X,Y,W,H", help="left, top, width and height of the object in "
        "pixels (default: the whole photo)")
    add("--boxes", metavar="JSON", help="photos and boxes from a COCO file, below the folder given")
    add = parser.add_argument_group("results").add_argument
    add("--out", type=Path, metavar="DIR", help="where pictures, keypoints.json and keypoints.csv go; "
        "in the table, an apostrophe stands before a name that a spreadsheet would take for a formula")
    add("--format", choices=["plain", "coco"], default="plain",
        help="of keypoints.json: with names, or COCO's results")
    add = parser.add_argument_group("the model").add_argument
    add("--decode", choices=DECODINGS, default="greedy",
        help="what to take of each coordinate's distribution")
    add("--llm", metavar="DIR", help="where its weights are now, if they were moved since the training")
    add("--vit", metavar="DIR", help="likewise")
    add("--dtype", choices=DTYPES,
        help="of frozen weights and of computing (default: bf16 on CUDA, fp32 elsewhere)")
    add = parser.add_argument_group("the page").add_argument
    add("--serve", action="store_true", help="open a page to try it, for this computer only")
    add("--port", type=int, default=8000, help="of the page")
    if "--box" in argv[:-1]:  # -5,... after it would be taken for an option
        i = argv.index("--box")
        argv = [*argv[:i], "=".join(argv[i:i + 2]), *argv[i + 2:]]
    args = parser.parse_args(argv)
    if not (args.list or args.serve):
        if not args.photos:
            parser.error("give a photo or a folder of photos")
        if bool(args.keypoint) == bool(args.keypoints):
            parser.error('say what to find: -k "name: where it is", or --keypoints SET')
    if args.box and (args.boxes or len(args.photos) > 1):
        parser.error("--box is for one photo; --boxes takes a COCO file for many")
    return args


def print_sets(sets, own, args):
    """The sets that the checkpoint brings, `own`, and then the others, each with all its names."""
    names = {}
    for name, category in sets.items():
        names.setdefault(tuple(category.keypoints), []).append(name)
    lines = {True: [], False: []}
    for keypoints, called in names.items():
        line = f"{', '.join(called)}: {', '.join(keypoint for keypoint, _ in keypoints)}"
        lines[called[0] in own].append(printable(line))
    print(f"sets of {args.checkpoint}:", *sorted(lines[True]), sep="\n")
    if lines[False]:
        print(f"\nmore sets, of {args.descriptions or DESCRIPTIONS.name}:", *sorted(lines[False]), sep="\n")


def main(argv):
    args = parse_arguments(argv)
    descriptions = read_checkpoint(args.checkpoint)["descriptions"]
    sets = read_sets(descriptions, args.checkpoint, args.descriptions)
    if args.list and args.keypoints:
        for name, description in parse_keypoints(args.keypoints, sets).keypoints:
            print(printable(f"{name}: {description}"))
        return
    if args.list:
        return print_sets(sets, descriptions["keypoint_sets"], args)
    how = args.checkpoint, args.decode, args.llm, args.vit, args.descriptions, args.dtype
    if args.serve:
        from tools.page import serve
        return serve(Locator(*how), args.port)
    # All that can be wrong is checked before the network is loaded, which may take minutes.
    if args.keypoint:
        category = make_category(map(parse_keypoint, args.keypoint))
    else:
        category = parse_keypoints(args.keypoints, sets)
    jobs = find_jobs(args.photos, args.box, args.boxes)
    if len(jobs) == 1:
        check_box(jobs[0].box, open_photo(jobs[0].path))
    if args.out:
        make_folder(args.out)
    locator = Locator(*how)
    found, failed = locate_all(locator, jobs, category, args.out)
    if args.out:
        write_tables(args.out, found, args.format)
        pictures = f"{len(found)} picture{'s' * (len(found) != 1)}"
        print(f"wrote {args.out}/keypoints.json, keypoints.csv and {pictures}")
    if failed:
        raise InputError(f"{failed} of {len(jobs)} objects were left out, see above")


def locate_all(locator, jobs, category, out):
    """Asks about all jobs, prints, draws into the folder `out` -> [(Job, points)], and how many failed."""
    found, taken, failed = [], set(), 0
    bar = tqdm(jobs, disable=len(jobs) == 1, dynamic_ncols=True)
    for job in bar:
        try:
            photo = open_photo(job.path)
            points = locator(photo, category, job.box)
        except InputError as e:
            if len(jobs) == 1:
                raise
            failed += 1
            line = str(e).removeprefix(printable(f"{job.path}: "))
            bar.write(f"{printable(str(job.path))}: {line}", file=sys.stderr)
            continue
        if len(jobs) > 1:
            bar.write(printable(str(job.path)))
        print_points(points, photo, bar.write)
        if job.box and looks_like_corners(job.box, photo):
            x1, y1, x2, y2 = job.box
            bar.write("hint: the box reaches far over the edge. A box is x,y,width,height; if these are "
                      f"corners, write --box {x1:g},{y1:g},{x2 - x1:g},{y2 - y1:g}")
        if out:
            save_picture(draw_found(photo, job.box, category, points), out / name_picture(job.path, taken))
        found.append((job, {name: replace(p, x_distribution=None, y_distribution=None)  # 16 kB a keypoint
                            for name, p in points.items()}))
    return found, failed


def draw_found(photo, box, category, points):
    """The picture of what was found, see draw_points()."""
    places = [None if p.x is None else (p.x, p.y) for p in points.values()]
    return draw_points(photo, box or (0, 0, *photo.size), category, places,
                       confidence=[p.confidence for p in points.values()])


if __name__ == "__main__":
    run(main)
