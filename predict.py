"""A trained model for people and programs: it finds keypoints of your choice, in your words, in your photos.

    python predict.py CKPT photo.jpg --box 40,60,300,380 -k "left eye: the eye ..." -k "nose: the tip of ..."
    python predict.py CKPT photos/ --keypoints animal_body --out found    (or film.mp4) pictures and a table
    python predict.py CKPT --list         which sets of keypoints it knows; --serve opens a page to try it

    from predict import Locator
    locator = Locator("runs/split1/ckpt.pt")
    points = locator("photo.jpg", {"nose": "the tip of the snout, below both eyes"}, box=(40, 60, 300, 380))
    points["nose"].x, points["nose"].y, points["nose"].confidence

A keypoint is a name and a description. A box is x, y, width and height in pixels of the upright photo.
"""

from argparse import Namespace
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common import InputError, Parser, positive, run, start_processes
from data import Crop, normalize
from decode import DECODINGS, check_decoding, load_trained, locate, read_trained
from model import DTYPES


@dataclass(frozen=True)
class Found:
    """A keypoint in a photo. x and y are None where the answer held no coordinates.

    The distributions say how likely x lies in each of 1,000 vertical strips of the square around the box,
    from left to right, and y in each of 1,000 horizontal ones, from top to bottom. They and the confidence
    are None where an answer was not in the usual format, and always for a model of <KEYPOINT>.
    """

    x: float | None  # pixels of the photo
    y: float | None
    confidence: float | None  # 0 to 1: the share of the distributions within a tenth of the square
    x_distribution: np.ndarray | None = field(repr=False)  # (1000,)
    y_distribution: np.ndarray | None = field(repr=False)
    square: tuple  # left, top, side of the square in pixels of the photo


class Locator:
    """A trained model that is loaded once and finds keypoints in any number of photos.

    checkpoint: what train.py wrote. decode: what to take of each coordinate's distribution, "greedy",
    "median" or "mean". llm, vit: where the published weights are, if they were moved since the training.
    descriptions: a file of more keypoint sets, in place of descriptions.json; the checkpoint knows those of
    its training. dtype: "bf16" or "fp32", of frozen weights and computing; None: bf16 on CUDA, else fp32.
    """

    def __init__(self, checkpoint, decode="greedy", llm=None, vit=None, descriptions=None, dtype=None):
        for value, choices in (decode, DECODINGS), (dtype, (None, *DTYPES)):
            if value not in choices:
                raise InputError(f"{value!r} is none of {choices}")
        self.model, self.chat, trained = load_trained(checkpoint, start_processes().device, llm, vit, dtype)
        args = Namespace(**trained["args"])
        check_decoding(self.chat, decode)
        from paper import choose_locate
        from tools.keypoints import read_sets
        self.locate, self.decode, self.size = choose_locate(args, locate), decode, args.image_size
        self.sets = read_sets(trained["descriptions"], checkpoint, descriptions)

    def __call__(self, photo, keypoints, box=None):
        """-> {name: Found}. For a list of photos, a list of these: they are asked about together.

        photo: a path, a PIL image, the bytes of a file, an open file, or RGB pixels of uint8, an array or a
        tensor (h, w, 3) or (3, h, w). keypoints: {name: description}, the name of a set, or what else
        tools/keypoints.py reads. box: x, y, width, height, or None for the whole photo. A list of photos
        takes a list of boxes, and may take a list of keypoints.
        InputError for an unreadable photo, unknown keypoints or a box outside the photo.
        """
        if not isinstance(photo, (list, tuple)):
            return self([photo], [keypoints], [box])[0]
        from tools.keypoints import parse_keypoints
        n = len(photo)
        keypoints = keypoints if isinstance(keypoints, list) else [keypoints] * n
        boxes = list(box) if isinstance(box, (list, tuple, np.ndarray)) else [box] * n
        if not n == len(keypoints) == len(boxes) > 0:
            raise InputError(f"{n} photos, {len(boxes)} boxes and {len(keypoints)} times keypoints: for each "
                             "photo one is wanted")
        categories = [parse_keypoints(one, self.sets) for one in keypoints]
        crops, pixels = zip(*map(self.crop, photo, boxes))
        images = normalize(torch.stack(pixels).to(self.model.projection.weight.device))  # (n, 3, size, size)
        questions = [self.chat.encode_questions(category) for category in categories]
        predictions = self.locate(self.model, images, questions, self.chat, decode=self.decode)
        return [{name: make_found(p, crop) for (name, _), p in zip(category.keypoints, of_photo)}
                for category, crop, of_photo in zip(categories, crops, predictions)]

    def crop(self, photo, box):
        """The square around a box -> Crop, and its pixels, uint8 (3, size, size)."""
        from tools.photos import check_box, open_photo
        photo = open_photo(photo)
        x, y, w, h = check_box(box, photo)
        crop = Crop(x + w / 2, y + h / 2, max(w, h))
        return crop, crop.cut_from(photo, 1, self.size)


def make_found(p, crop):
    """A Prediction -> Found."""
    x, y = crop.to_photo(p.point).tolist() if p.point else (None, None)
    square = crop.x - crop.side / 2, crop.y - crop.side / 2, crop.side
    return Found(x, y, p.confidence, p.x_distribution, p.y_distribution, square)


# --------------------------------------------------------------------------------------------------- program


def parse_box(text):
    """ "x,y,w,h" -> four numbers; "" -> None, the whole photo. InputError for anything else."""
    if not text.strip():
        return None
    try:
        x, y, w, h = map(float, text.split(","))
        return x, y, w, h
    except ValueError:
        raise InputError(f'box "{text}": write x, y, width, height, four numbers') from None


def parse_arguments(argv):
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="what train.py wrote")
    add("photos", nargs="*", type=Path, metavar="PHOTO", help="photos, patterns such as 'photos/*.jpg', "
        "folders and all that is in them, or one film")
    add("-k", "--keypoint", action="append", default=[], metavar="'NAME: TEXT'", help="a keypoint and where "
        "it is; may be repeated")
    add("--keypoints", metavar="SET", help='a set of keypoints, see --list; or "name: text; name: text"; or '
        "a file: .json {name: text}, or .txt with one a line")
    add("--descriptions", metavar="JSON", help="replaces descriptions.json beside this program: more sets")
    add("--list", action="store_true", help="show the sets of keypoints, or the texts of --keypoints")
    add("--box", type=parse_box, metavar="X,Y,W,H", help="left, top, width and height of the object in "
        "pixels, instead of the whole photo; in a film, the same for every frame: the object must stay there")
    add("--boxes", metavar="JSON", help="photos in the folder given and their boxes, from a COCO file or a "
        "list of detections; without --keypoints, a category's are those of the set of its name")
    add("--out", type=Path, metavar="DIR", help="where pictures and tables go")
    add("--format", choices=["plain", "coco", "labelme", "deeplabcut"], default="plain", help="beside "
        "keypoints.csv: keypoints.json, plain or as a whole COCO file, or labels for these two programs")
    add("--threshold", type=float, default=0.5, help="points of less confidence are hollow in pictures, and "
        "have visibility 1 in COCO files")
    add("--batch", type=positive, default=8, help="photos or frames that are asked about together")
    add("--decode", choices=DECODINGS, default="greedy", help="what to take of a coordinate's distribution")
    add("--llm", metavar="DIR", help="where its weights are now, if they were moved since the training")
    add("--vit", metavar="DIR", help="likewise")
    add("--dtype", choices=DTYPES, help="of frozen weights and computing; by default bf16 on CUDA, else fp32")
    add("--serve", action="store_true", help="open a page to try it")
    add("--port", type=int, default=8000, help="of the page")
    add("--host", metavar="ADDRESS", help="open the page, without a password, to all that reach this address "
        "of the computer, 0.0.0.0 for any; by default it is for this computer only")
    if "--box" in argv[:-1]:  # -5,... after it would be taken for an option
        i = argv.index("--box")
        argv = [*argv[:i], "=".join(argv[i:i + 2]), *argv[i + 2:]]
    args = parser.parse_intermixed_args(argv)
    if not (args.list or args.serve):
        if not args.photos:
            parser.error("give a photo or a folder of photos")
        if args.keypoint and args.keypoints or not (args.keypoint or args.keypoints or args.boxes):
            parser.error('say what to find: -k "name: where it is", or --keypoints SET')
    if args.format != "plain" and not args.out:
        parser.error("--format needs --out DIR, where its files go")
    if args.box and (args.boxes or len(args.photos) > 1):
        parser.error("--box is for one photo; --boxes takes a COCO file for many")
    return args


def main(argv):
    from tools.keypoints import find_set, make_category, parse_keypoint, parse_keypoints, read_sets
    args = parse_arguments(argv)
    trained = read_trained(args.checkpoint)["descriptions"]
    sets, category = read_sets(trained, args.checkpoint, args.descriptions), None
    if args.keypoint:
        category = make_category(map(parse_keypoint, args.keypoint))
    elif args.keypoints:
        category = parse_keypoints(args.keypoints, sets)
    if args.list:
        from tools.results import print_sets
        return print_sets(category, sets, trained, args)
    load = partial(Locator, args.checkpoint, args.decode, args.llm, args.vit, args.descriptions, args.dtype)
    if args.serve:
        from tools.page import serve
        return serve(load(), args.port, args.host)
    # What can be wrong with photos is found before the network is loaded, which may take minutes.
    from tools.photos import find_jobs, is_film
    from tools.results import locate_jobs, say_new_words
    if is_film(args):
        from tools.video import annotate, open_film
        film = open_film(args)
        say_new_words([category], trained)
        return annotate(film, category, args, load())
    jobs = find_jobs(args, category, lambda name: find_set(name, sets), trained)
    say_new_words([job.category for job in jobs], trained)
    locate_jobs(jobs, args, load)


if __name__ == "__main__":
    run(main)
