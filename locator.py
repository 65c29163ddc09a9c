"""A trained model for programs and people: load it once, ask it about any photo, in any words.

    from locator import Locator
    locator = Locator("runs/split1/ckpt.pt")
    points = locator("photo.jpg", {"nose": "the tip of the snout, below both eyes"}, box=(40, 60, 300, 380))
    points["nose"].x, points["nose"].y, points["nose"].confidence

A keypoint is a name and a description that says where it is and what is beside it. It is the description
that finds the point. A box is x, y, width and height in pixels of the photo as a viewer shows it, upright.
predict.py and page.py are built on this.
"""

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from annotations import MAX_PIXELS, UNREADABLE, parse_descriptions
from chat import Category
from checkpoint import load_trained, read_checkpoint
from common import InputError, read_json, start_processes
from data import Crop, average_blocks, to_rgb
from decode import DECODINGS
from evaluate import check_decoding, predict
from model import DTYPES

DESCRIPTIONS = Path(__file__).parent / "descriptions.json"


@dataclass(frozen=True)
class Found:
    """A keypoint in a photo. x, y and distributions are None where the answer held no coordinates.

    The distributions say how likely x lies in each of 1,000 upright strips of the square around the box, from
    left to right, and y in each of 1,000 level ones, from top to bottom. A model that reads points off
    <KEYPOINT> has none, and no confidence.
    """

    x: float  # pixels of the photo
    y: float
    confidence: float  # 0 to 1: how much of the distributions lies within a tenth of the square around (x, y)
    x_distribution: np.ndarray = field(repr=False)  # (1000,)
    y_distribution: np.ndarray = field(repr=False)
    square: tuple  # left, top, side of the square in pixels of the photo


class Locator:
    """A trained model that is loaded once and finds keypoints in any number of photos.

    checkpoint: what train.py wrote. decode: what to take of each coordinate's distribution, "greedy",
    "median" or "mean". llm, vit: where the published weights are, if they were moved since the training.
    descriptions: a file of more keypoint sets; the checkpoint knows those of its training. dtype: "bf16" or
    "fp32", of the frozen weights and of computing; None for what suits the device.
    InputError if one of them is not what it should be.
    """

    def __init__(self, checkpoint, decode="greedy", llm=None, vit=None, descriptions=None, dtype=None):
        for value, choices in (decode, DECODINGS), (dtype, (None, *DTYPES)):
            if value not in choices:
                raise InputError(f"{value!r} is none of {choices}")
        contents = read_checkpoint(checkpoint)
        self.sets = read_sets(contents["descriptions"], checkpoint, descriptions)
        self.model, self.chat = load_trained(contents, start_processes().device, llm, vit, dtype)
        check_decoding(self.chat, decode)
        self.decode, self.size = decode, contents["args"]["image_size"]

    def __call__(self, photo, keypoints, box=None):
        """-> {name: Found}. InputError for an unreadable photo, unknown keypoints or a box outside it.

        photo: a path, a PIL image, or an array (h, w, 3) of uint8. keypoints: {name: description}, or the
        name of a set. box: x, y, width, height of the object; the whole photo if None.
        """
        photo, category = open_photo(photo), self.find_category(keypoints)
        x, y, w, h = check_box(box, photo)
        crop = Crop(x + w / 2, y + h / 2, max(w, h))
        pixels = crop.cut_from(*average_blocks(photo, 1, crop.side, self.size), self.size)  # (3, size, size)
        [predictions] = predict(self.model, self.chat, [crop], pixels[None], [category], decode=self.decode)
        square = (crop.x - crop.side / 2, crop.y - crop.side / 2, crop.side)
        return {name: Found(*(p.point or (None, None)), p.confidence, p.x_distribution, p.y_distribution,
                            square)
                for (name, _), p in zip(category.keypoints, predictions)}

    def find_category(self, keypoints):
        """{name: description}, a Category, or the name of a set -> Category."""
        if isinstance(keypoints, Category):
            return keypoints
        if isinstance(keypoints, dict):
            return make_category(keypoints.items())
        if not isinstance(keypoints, str):
            raise InputError('keypoints are {"name": "description", ...}, the name of a set, or a Category')
        if keypoints not in self.sets:
            raise InputError(f'"{keypoints}": {suggest(keypoints, self.sets)}')
        return self.sets[keypoints]


def read_sets(descriptions, path, more=None):
    """-> {name: Category}: the keypoint sets and categories of a checkpoint's descriptions, then of a file.

    path: where the descriptions are from. more: the file; descriptions.json beside this program if None.
    """
    sets = {}
    for raw, source in (descriptions, path), (read_json(more or DESCRIPTIONS, dict), more or DESCRIPTIONS):
        for number, category in parse_descriptions(raw, source).items():
            for name in raw["categories"][str(number)]["keypoint_set"], category.name:
                sets.setdefault(name, category)
    return sets


def suggest(name, sets):
    """What to say of a set that is not there."""
    close = difflib.get_close_matches(name, sets)
    known = f"did you mean {' or '.join(close)}? Or" if close else "--list shows those there are; or"
    return f'no such set of keypoints; {known} describe each: "name: where it is and what is beside it"'


def open_photo(photo):
    """A path, a PIL image or an array (h, w, 3) -> RGB image, upright: turned as its EXIF data ask."""
    if isinstance(photo, np.ndarray) and (photo.dtype != np.uint8 or 0 in photo.shape):
        raise InputError(f"an array {photo.shape} of {photo.dtype} is not a photo; (h, w, 3) of uint8 is")
    is_path = not isinstance(photo, (Image.Image, np.ndarray))
    if is_path and not Path(photo).is_file():
        raise InputError(f"{photo}: no such photo")
    try:
        image = Image.open(photo) if is_path else photo
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        return to_rgb(ImageOps.exif_transpose(image))
    except UNREADABLE as e:
        name, advice = (photo, "; save it as JPEG or PNG") if is_path else ("the image", "")
        raise InputError(f"{name}: not a readable photo ({e}){advice}") from None


def parse_box(text):
    """ "x,y,w,h" -> four numbers; "" -> None, the whole photo. InputError for anything else."""
    if not text.strip():
        return None
    try:
        x, y, w, h = map(float, text.split(","))
        return x, y, w, h
    except ValueError:
        raise InputError(f'box "{text}": write x, y, width, height, four numbers') from None


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


def round_off(value):
    """For people: a number to 2 digits after the point, a distribution to 6; None as it is."""
    if value is None:
        return None
    return value.round(6).tolist() if isinstance(value, np.ndarray) else round(value, 2)


# ------------------------------------------------------------------------------------------------- keypoints


def make_category(keypoints):
    """[(name, description), ...] -> Category. InputError if one is empty or two have one name."""
    keypoints = list(keypoints)
    for text in (text for keypoint in keypoints for text in keypoint):
        if not isinstance(text, str):
            raise InputError(f"{text!r} is not a text; a keypoint is a name and a description")
    keypoints = [(name.strip(), description.strip()) for name, description in keypoints]
    for name, description in keypoints:
        if not name or not description:
            raise InputError(f'keypoint "{name}: {description}" lacks a name or a description')
        if [other for other, _ in keypoints].count(name) > 1:
            raise InputError(f'two keypoints are named "{name}"; give each a name of its own')
    if not keypoints:
        raise InputError('no keypoint is asked for; write "name: where it is and what is beside it"')
    return Category("object", keypoints)


def parse_keypoint(text):
    """ "left eye: the eye ..." -> (name, description). The name may hold a colon, if no space follows it."""
    if ":" not in text:
        raise InputError(f'keypoint "{text.strip()}" has no description: write "name: where it is"')
    name, _, description = text.partition(": " if ": " in text else ":")
    return name, description


def parse_keypoints(text, sets):
    """What --keypoints says -> Category: the name of a set, a file, or "name: description; name: ...".

    A file is JSON, {name: description}, or text with a keypoint in each line. Keypoints are separated by
    semicolons or line ends; if there are none, by commas after which "name:" follows.
    """
    if text in sets:
        return sets[text]
    if text.endswith((".json", ".txt")):
        return read_keypoints(Path(text))
    if ":" not in text:
        raise InputError(f'--keypoints "{text}": {suggest(text, sets)}')
    colon = r":\s" if ": " in text else ":"
    parts = re.split(r"[;\n]", text)
    if len(parts) == 1:
        parts = re.split(rf",\s*(?=[^,:]+{colon})", text)
    return make_category(parse_keypoint(part) for part in parts if part.strip())


def read_keypoints(path):
    """A file of keypoints -> Category."""
    if path.suffix == ".json":
        keypoints = read_json(path, dict).items()
        if not all(isinstance(description, str) for _, description in keypoints):
            raise InputError(f'{path}: not {{"name": "description", ...}}')
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as e:
            raise InputError(f"{path}: cannot be read ({e})") from None
        keypoints = (parse_keypoint(line) for line in lines if line.strip())
    try:
        return make_category(keypoints)
    except InputError as e:
        raise InputError(f"{path}: {e}") from None
