"""Finds keypoints of your choice, in your words, in your photo: prints them and draws them.

    python predict.py runs/split1/ckpt.pt photo.jpg --box 40,60,300,380 --keypoints "left eye: the ..., nose: the tip of ..."
    python predict.py runs/split1/ckpt.pt photo.jpg --keypoints animal_body          a keypoint set of descriptions.json

A keypoint is a name, a colon and a description that says where it is and what is beside it: it is the description that counts.
"""

import argparse
import colorsys
import math
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import UNREADABLE, Category, Crop, normalize
from llama import InputError, read_json
from train import load_chat, load_model, read_checkpoint, run, start_processes


def load_trained(checkpoint, device, llm=None, vit=None):
    """What read_checkpoint() gave -> the network and the Chat that it was trained with. llm, vit: where the weights lie now."""
    trained = argparse.Namespace(**checkpoint["args"])
    if trained.pretrain:
        raise InputError("the checkpoint is one of --pretrain, which locates nothing; train from it with train.py --init")
    trained.llm, trained.vit = llm or trained.llm, vit or trained.vit
    return load_model(trained, device, checkpoint).eval(), load_chat(trained)


def check_decoding(chat, decode, constrained=False):
    """InputError if the answers of a model cannot be read in the way that was asked for."""
    if not chat.place.digits and (constrained or decode != "greedy"):
        raise InputError(f"{'--constrained' if constrained else f'--decode {decode}'}: this model does not spell places in digits, one "
                         "or three at a time; leave it out")


def predict(model, chat, crops, images, categories, constrained=False, decode="greedy", cumulative=False):
    """Asks for all keypoints. images uint8 (P, 3, size, size), the pixels of `crops`; categories: of each photo;
    constrained, cumulative and decode as in CapeLLM.locate() and Chat.coordinates().

    -> for each photo a list of (point, confidence), the point in pixels of its photo or None if the answer was no coordinates.
    """
    device = model.projection.weight.device
    questions = [chat.questions(category, cumulative) for category in categories]
    told = model.locate(normalize(images.to(device)), questions, chat, constrained, cumulative)
    results = []
    for crop, answers in zip(crops, told):
        read = [chat.coordinates(ids, spread, decode) for ids, spread in answers]
        results.append([(point and tuple(crop.to_photo(point).tolist()), confidence) for point, confidence in read])
    return results


def palette(n):
    """n colours that are easy to tell apart on a photo."""
    return [tuple(int(255 * c) for c in colorsys.hsv_to_rgb(i / n, 0.85 if i % 2 else 0.6, 1)) for i in range(n)]


def draw_object(path, crop, names, predicted, true=None, side=360):
    """A tile: the crop with predicted points (dots), the true ones (rings, a line to the dot), and the names beside."""
    font = ImageFont.load_default(size=12)
    photo = Image.fromarray(crop.cut(path, side).permute(1, 2, 0).numpy())
    columns = -(-len(names) // 23)
    tile = Image.new("RGB", (side + 190 * columns, side), "white")
    tile.paste(photo)
    scale = 3  # drawn large and reduced, for smooth edges
    overlay = tile.resize([scale * n for n in tile.size])
    pen = ImageDraw.Draw(overlay)
    for k, colour in enumerate(palette(len(names))):
        def spot(point):
            return tuple(scale * side * crop.from_photo(np.array(point)))
        if true is not None and true[k] is not None:
            x, y = spot(true[k])
            if predicted[k]:
                pen.line([(x, y), spot(predicted[k])], fill=colour, width=4)
            pen.ellipse([x - 17, y - 17, x + 17, y + 17], outline="black", width=10)
            pen.ellipse([x - 15, y - 15, x + 15, y + 15], outline=colour, width=6)
        if predicted[k]:
            x, y = spot(predicted[k])
            pen.ellipse([x - 13, y - 13, x + 13, y + 13], fill=colour, outline="black", width=3)
        x, y = scale * (side + 12 + 190 * (k // 23)), scale * (15 + 15 * (k % 23))
        pen.ellipse([x - 13, y - 13, x + 13, y + 13], fill=colour if predicted[k] else None, outline="black", width=3)
    tile = overlay.resize(tile.size, Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(tile)
    for k, name in enumerate(names):
        pen.text((side + 22 + 190 * (k // 23), 15 + 15 * (k % 23)), name, fill="black", font=font, anchor="lm")
    return tile


def save_picture(picture, path):
    try:
        picture.save(path)
    except (OSError, ValueError) as e:  # ValueError: a name whose ending is no kind of picture
        raise InputError(f"{path}: the picture cannot be written ({e})") from None


def parse_keypoints(text, descriptions):
    """ "left eye: the eye ..., nose: ..." or the name of a keypoint set -> [(name, description), ...]."""
    sets = read_json(descriptions, dict).get("keypoint_sets", {})
    if text in sets:
        return [(p["name"], p["description"]) for p in sets[text]]
    if ":" not in text:
        raise InputError(f'--keypoints "{text}": neither "name: description, name: description" nor one of {", ".join(sorted(sets))}')
    parts = re.split(r",\s*(?=[^,:]+:)", text)  # a comma is a separator only where "name:" follows
    keypoints = [tuple(s.strip() for s in part.split(":", 1)) for part in parts]
    for name, description in keypoints:
        if not name or not description:
            raise InputError(f'--keypoints: "{name}: {description}" lacks a name or a description')
    return keypoints


def parse_box(text, photo):
    """ "x,y,w,h" in pixels -> the four numbers; the whole photo if there is no text. The box may reach over the photo's edge."""
    try:
        with Image.open(photo) as image:
            width, height = image.size
    except UNREADABLE as e:
        raise InputError(f"{photo}: not a readable photo ({e})") from None
    try:
        x, y, w, h = map(float, text.split(",")) if text else (0, 0, width, height)
    except ValueError:
        raise InputError(f"--box {text}: four numbers x,y,w,h are wanted") from None
    if not (0 < w < math.inf and 0 < h < math.inf and x < width and y < height and x + w > 0 and y + h > 0):
        raise InputError(f"--box {text}: lies outside the photo, which is {width} x {height} pixels, or is empty")
    return x, y, w, h


def main(argv):
    parser = argparse.ArgumentParser(description="Finds keypoints in a photo.", allow_abbrev=False)
    parser.add_argument("checkpoint")
    parser.add_argument("photo")
    parser.add_argument("--keypoints", required=True, help='"name: description, name: description", or a set of descriptions.json')
    parser.add_argument("--box", help="x,y,w,h of the object in pixels, --box=-5,... if it begins with a minus; "
                        "default: the whole photo")
    parser.add_argument("--decode", choices=["greedy", "median", "mean"], default="greedy", help="of the distribution of each coordinate")
    parser.add_argument("--descriptions", default="descriptions.json", help="where keypoint sets are looked up")
    parser.add_argument("--llm", help="where its weights lie now, if they were moved since the training")
    parser.add_argument("--vit", help="likewise")
    parser.add_argument("--out", help="the picture; default: PHOTO.keypoints.png in this folder")
    args = parser.parse_args(argv)
    checkpoint = read_checkpoint(args.checkpoint)
    keypoints = parse_keypoints(args.keypoints, args.descriptions)
    x, y, w, h = parse_box(args.box, args.photo)

    *_, device = start_processes()
    model, chat = load_trained(checkpoint, device, args.llm, args.vit)
    check_decoding(chat, args.decode)
    crop = Crop(x + w / 2, y + h / 2, max(w, h))
    image = crop.cut(args.photo, checkpoint["args"]["image_size"])
    [told] = predict(model, chat, [crop], image[None], [Category("object", keypoints)], decode=args.decode)
    print(f"{'x':>9}{'y':>9}{'confidence':>12}  keypoint")
    for (name, _), (point, confidence) in zip(keypoints, told):
        sure = "unknown" if confidence is None else f"{confidence:.2g}"
        print(f"{point[0]:9.1f}{point[1]:9.1f}{sure:>12}  {name}" if point else f"{'no coordinates in the answer':>30}  {name}")
    picture = Path(args.out or f"{Path(args.photo).stem}.keypoints.png")
    save_picture(draw_object(args.photo, crop, [name for name, _ in keypoints], [point for point, _ in told], side=720), picture)
    print(f"wrote {picture}")


if __name__ == "__main__":
    run(main)
