"""Finds keypoints of your choice, in your words, in your photo: prints them and draws them.

    python predict.py CKPT photo.jpg --box 40,60,300,380 --keypoints "left eye: the eye ..., nose: the ..."
    python predict.py CKPT photo.jpg --keypoints animal_body          a keypoint set of descriptions.json

A keypoint is a name, a colon and a description that says where it is and what is beside it. It is the
description that finds the point.
"""

import argparse
import math
import re
from pathlib import Path

from chat import Category
from checkpoint import load_trained, read_checkpoint
from common import InputError, check, printable, read_json, run, start_processes
from data import UNREADABLE, Crop, open_photo, parse_keypoint_set
from draw import draw_instance, save_picture
from evaluate import check_decoding, predict


def parse_keypoints(text, descriptions):
    """ "left eye: the eye ..., nose: ..." or the name of a keypoint set -> [(name, description), ...]."""
    sets = read_json(descriptions, dict).get("keypoint_sets", {})
    if text in check(sets, f"{descriptions}: keypoint_sets", dict, 0):
        return parse_keypoint_set(sets, text, descriptions)
    if ":" not in text:
        raise InputError(f'--keypoints "{text}": neither "name: description, name: description" nor one of '
                         f'{", ".join(sorted(sets))}')
    parts = re.split(r",\s*(?=[^,:]+:)", text)  # a comma is a separator only where "name:" follows
    keypoints = [tuple(s.strip() for s in part.split(":", 1)) for part in parts]
    for name, description in keypoints:
        if not name or not description:
            raise InputError(f'--keypoints: "{name}: {description}" lacks a name or a description')
    return keypoints


def parse_box(text, photo):
    """ "x,y,w,h" in pixels -> four numbers; without text the whole photo. A box may reach over the edge."""
    try:
        with open_photo(photo) as image:
            width, height = image.size
    except UNREADABLE as e:
        raise InputError(f"{photo}: not a readable photo ({e})") from None
    try:
        x, y, w, h = map(float, text.split(",")) if text else (0, 0, width, height)
    except ValueError:
        raise InputError(f"--box {text}: four numbers x,y,w,h are wanted") from None
    if not (0 < w < math.inf and 0 < h < math.inf and x < width and y < height and x + w > 0 and y + h > 0):
        raise InputError(f"--box {text}: lies outside the photo, which is {width} x {height} pixels, "
                         "or is empty")
    return x, y, w, h


def main(argv):
    parser = argparse.ArgumentParser(description="Finds keypoints in a photo.", allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint")
    add("photo")
    add("--keypoints", required=True,
        help='"name: description, name: description", or a set of descriptions.json')
    add("--box", help="x,y,w,h of the object in pixels, --box=-5,... if it begins with a minus; "
        "default: the whole photo")
    add("--decode", choices=["greedy", "median", "mean"], default="greedy",
        help="what to take of each coordinate's distribution")
    add("--descriptions", default="descriptions.json", help="where keypoint sets are looked up")
    add("--llm", help="where its weights are now, if they were moved since the training")
    add("--vit", help="likewise")
    add("--out", help="the picture; default: PHOTO.keypoints.png in this folder")
    args = parser.parse_args(argv)
    checkpoint = read_checkpoint(args.checkpoint)
    keypoints = parse_keypoints(args.keypoints, args.descriptions)
    x, y, w, h = parse_box(args.box, args.photo)

    *_, device = start_processes()
    model, chat = load_trained(checkpoint, device, args.llm, args.vit)
    check_decoding(chat, args.decode)
    crop = Crop(x + w / 2, y + h / 2, max(w, h))
    image = crop.cut(args.photo, checkpoint["args"]["image_size"])
    category = Category("object", keypoints)
    [predictions] = predict(model, chat, [crop], image[None], [category], decode=args.decode)
    print(f"{'x':>9}{'y':>9}{'confidence':>12}  keypoint")
    for (name, _), found in zip(keypoints, predictions):
        if found.point is None:
            print(f"{'no coordinates in the answer':>30}  {printable(name)}")
        else:
            confidence = "unknown" if found.confidence is None else f"{found.confidence:.2f}"
            print(f"{found.point[0]:9.1f}{found.point[1]:9.1f}{confidence:>12}  {printable(name)}")
    picture = Path(args.out or f"{Path(args.photo).stem}.keypoints.png")
    names, points = [name for name, _ in keypoints], [found.point for found in predictions]
    save_picture(draw_instance(args.photo, crop, names, points, side=720), picture)
    print(f"wrote {picture}")


if __name__ == "__main__":
    run(main)
