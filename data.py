"""MP-100 as CapeLLM sees it: objects, crops, groups of keypoints, epochs (paper section 3.3).

    data/mp100/annotations/mp100_split{1..5}_{train,val,test}.json      COCO style: images, annotations, categories
    data/mp100/images/<file_name>
    descriptions.json                                                   name and description of every keypoint

An object is one annotated animal, garment or thing. Its square crop is what the network sees; coordinates in questions and
answers are fractions of that crop, x to the right, y down. Points are always (x, y), sizes (width, height), in pixels of the photo.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from chat import IGNORE, Scene
from llama import InputError, read_json

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what pillow raises for photos it cannot read


# ----------------------------------------------------------------------------------------------------------- annotations


@dataclass(frozen=True)
class Category:
    name: str
    keypoints: list  # of (name, description), in the order of the annotations


@dataclass(frozen=True)
class Object:
    id: int  # of the annotation
    category: int
    photo: str  # file name below images/
    box: tuple  # x, y, width, height, clipped to the photo
    keypoints: np.ndarray  # (K, 2)
    visible: np.ndarray  # (K,) bool, hidden but labelled points count as visible


def read_descriptions(path):
    """descriptions.json -> {category id: Category}. InputError says which entry is wrong."""
    raw, categories = read_json(path), {}
    try:
        for id, entry in raw["categories"].items():
            points = raw["keypoint_sets"][entry["keypoint_set"]]
            categories[int(id)] = Category(entry["name"], [(p["name"], p["description"]) for p in points])
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise InputError(f"{path}: entry {e} is missing or not as README's \"Your own data\" shows") from None
    return categories


def read_objects(path, categories):
    """An annotation file -> its objects, photo by photo. categories as from read_descriptions().

    Left out, as in the published code: crowds, objects without area or keypoints, and those whose clipped box is empty.
    """
    raw = read_json(path)
    try:
        annotations = {}
        for a in raw["annotations"]:
            annotations.setdefault(a["image_id"], []).append(a)
        objects = []
        for photo in raw["images"]:
            for a in annotations.get(photo["id"], []):
                x, y, w, h = a["bbox"]
                points = np.array(a["keypoints"], dtype=np.float64).reshape(-1, 3)
                if not (np.isfinite(points).all() and math.isfinite(x + y + w + h)):
                    raise InputError(f"{path}: annotation {a['id']} has a coordinate that is not a number")
                x1, y1 = max(0, x), max(0, y)
                x2 = min(photo["width"] - 1, x1 + max(0, w - 1))
                y2 = min(photo["height"] - 1, y1 + max(0, h - 1))
                if a.get("iscrowd") or a.get("area", 1) <= 0 or x2 <= x1 or y2 <= y1 or not points.any():
                    continue
                if a["category_id"] not in categories:
                    raise InputError(f"{path}: category {a['category_id']} has no descriptions; add it to the descriptions file")
                if len(points) != (K := len(categories[a["category_id"]].keypoints)):
                    raise InputError(f"{path}: annotation {a['id']} has {len(points)} keypoints, but "
                                     f"{categories[a['category_id']].name} has {K} descriptions")
                objects.append(Object(a["id"], a["category_id"], photo["file_name"], (x1, y1, x2 - x1, y2 - y1),
                                      points[:, :2], points[:, 2] > 0))
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise InputError(f"{path}: not an MP-100 annotation file ({type(e).__name__}: {e})") from None
    return objects


def existing_photos(objects, root, categories, allow_missing):
    """The objects whose photo is there and has a readable header. InputError lists the others by category, unless allowed, and
    says if none is left."""
    readable = {}
    for photo in {o.photo for o in objects}:
        try:
            Image.open(Path(root, "images", photo)).close()
            readable[photo] = True
        except UNREADABLE:
            readable[photo] = False
    report_missing([o for o in objects if not readable[o.photo]], root, categories, allow_missing)
    if not any(readable.values()):
        raise InputError(f"{root}/images: none of the photos of {len(objects)} objects is there")
    return [o for o in objects if readable[o.photo]]


def report_missing(objects, root, categories, allow_missing):
    if objects and not allow_missing:
        counts = Counter(categories[o.category].name for o in objects)
        raise InputError(f"{root}/images: photos of {len(objects)} objects are missing or unreadable "
                         f"({', '.join(f'{name} {n}' for name, n in counts.items())}), e.g. {objects[0].photo}; "
                         "complete the folder or leave them out with --allow-missing")


# ----------------------------------------------------------------------------------------------------------------- crops


@dataclass(frozen=True)
class Crop:
    """A square of the photo, turned by `angle` (radians, clockwise on the screen) about its centre."""

    x: float
    y: float
    side: float
    angle: float = 0.0

    @property
    def rotation(self):
        c, s = math.cos(self.angle), math.sin(self.angle)
        return np.array([[c, -s], [s, c]])

    def from_photo(self, points):
        """Pixels of the photo (..., 2) -> fractions of the crop (..., 2)."""
        return (points - (self.x, self.y)) @ self.rotation / self.side + 0.5

    def to_photo(self, points):
        """The inverse of from_photo()."""
        return (np.asarray(points) - 0.5) * self.side @ self.rotation.T + (self.x, self.y)

    def cut(self, path, size):
        """Reads a photo -> its crop, uint8 (3, size, size), black outside the photo. InputError if it cannot be read.

        Large photos are first read at 1/2, 1/4 or 1/8 (JPEG) or averaged over whole blocks (others), always to at least twice
        the size wanted, so nothing is lost. EXIF rotation is ignored: MP-100's points were made on unrotated pixels.
        """
        try:
            with Image.open(path) as photo:
                width = photo.width
                photo.draft(None, [math.ceil(2 * size / self.side * n) for n in photo.size])
                photo.load()
                shrink = round(width / photo.width)
                if photo.mode.startswith("I"):  # 16 bits a pixel: PIL would clip instead of scale
                    photo = Image.fromarray((np.asarray(photo) / 257).astype(np.uint8))
                if photo.mode != "RGB":  # else it would be copied
                    photo = photo.convert("RGB")
        except UNREADABLE as e:
            raise InputError(f"{path}: not a readable photo ({e})") from None
        if (blocks := int(self.side / shrink / (2 * size))) > 1:
            photo, shrink = photo.reduce(blocks), shrink * blocks
        n = max(size, round(self.side / shrink))  # first about one pixel per pixel, then down with antialiasing
        origin = self.to_photo((0.0, 0.0)) / shrink
        step = self.rotation * (self.side / shrink / n)
        affine = (*step[0], origin[0], *step[1], origin[1])
        square = photo.transform((n, n), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
        square = square.resize((size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def inside(points):
    """Whether fractions of the crop (..., 2) lie in it."""
    return ((points >= 0) & (points < 1)).all(axis=-1)


def crop_of(object, scale=1.0, angle=0.0):
    """The square around the object's box whose side is the box's longer side."""
    x, y, w, h = object.box
    return Crop(x + w / 2, y + h / 2, max(w, h) * scale, angle)


def normalize(images):
    """uint8 (B, 3, h, w) -> float32 with ImageNet's mean and standard deviation, on the images' device."""
    mean = torch.tensor([0.485, 0.456, 0.406], device=images.device)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], device=images.device)[:, None, None]
    return (images / 255 - mean) / std


# -------------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Example:
    """What is trained on: an object, its crop, and groups of keypoints (indices), each asked in a conversation of its own."""

    object: Object
    crop: Crop
    groups: list
    seed: tuple = ()  # of what its conversations draw; numpy takes (1, 2, 0) for (1, 2), so none ends in 0


def count_groups(n, k):
    return math.ceil(n / (4 if k == "dynamic" else k))


def group_keypoints(n, k, rng):
    """Shuffles 0..n-1 and cuts into groups of k; a short last group is filled with others drawn at random (section 3.3).

    k "dynamic", as in the paper's ICCV version: as many groups as with 4, cut at random places, so of any number of rounds.
    """
    order = rng.permutation(n).tolist()
    if k == "dynamic":
        cuts = sorted(rng.choice(range(1, n), count_groups(n, k) - 1, replace=False)) if n > 1 else []
        return [order[a:b] for a, b in zip([0, *cuts], [*cuts, n])]
    *full, last = [order[i:i + k] for i in range(0, n, k)]
    others = order[:n - len(last)]
    last += rng.choice(others, min(k - len(last), len(others)), replace=False).tolist() if others else []
    return [*full, last]


def plan_epoch(objects, seed, epoch, rounds, pack=False):
    """All examples of an epoch in the order of training, drawn from (seed, epoch, object) alone, objects counted from 1 and 0 the order.

    Each is one group of keypoints, or with `pack` all groups of an object, and has its own augmentation: side x N(1, 0.3) within
    0.7 ... 1.3, turned by up to 40 degrees half of the time. Keypoints that are hidden or fall outside the crop are not asked; an
    example with none left is dropped.
    """
    examples = []
    for i, o in enumerate(objects):
        rng = np.random.default_rng((seed, epoch, 1 + i))
        groups = group_keypoints(len(o.keypoints), rounds, rng)
        for number, together in enumerate([groups] if pack else [[group] for group in groups]):
            scale = min(max(rng.normal(1, 0.3), 0.7), 1.3)
            angle = math.radians(rng.uniform(-40, 40)) if rng.random() < 0.5 else 0.0
            crop = crop_of(o, scale, angle)
            shown = o.visible & inside(crop.from_photo(o.keypoints))
            asked = [[k for k in group if shown[k]] for group in together]
            if any(asked):
                examples.append(Example(o, crop, [group for group in asked if group], (seed, epoch, 1 + i, 1 + number)))
    order = np.random.default_rng((seed, epoch, 0)).permutation(len(examples))
    return [examples[i] for i in order]


class TrainingSet(torch.utils.data.Dataset):
    """Examples -> {"image": uint8 (3, size, size), "tokens", "labels", "groups": lists of equal length}.

    groups tells the conversation of each token, from 1; 0 for BOS and "\n", which all share.
    """

    def __init__(self, examples, categories, chat, root, size):
        self.examples, self.categories, self.chat, self.root, self.size = examples, categories, chat, root, size

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        e = self.examples[i]
        rng = np.random.default_rng(e.seed)
        category, where = self.categories[e.object.category], e.crop.from_photo(e.object.keypoints)
        shown = e.object.visible & inside(where)
        hidden = [name for (name, _), seen in zip(category.keypoints, shown) if not seen]
        tokens = [self.chat.bos, *self.chat.newline]
        labels, groups = [IGNORE] * len(tokens), [0] * len(tokens)
        for number, group in enumerate(e.groups, 1):
            scene = Scene(category, [(category.keypoints[k], where[k]) for k in group], hidden, rng)
            ids, learned = self.chat.conversation(scene)
            tokens, labels, groups = tokens + ids, labels + learned, groups + [number] * len(ids)
        image = e.crop.cut(Path(self.root, "images", e.object.photo), self.size)
        return {"image": image, "tokens": tokens, "labels": labels, "groups": groups}


def collate(examples):
    """A micro-batch -> images uint8 (B, 3, size, size); tokens, labels and groups (B, T), groups None if none is packed.

    Padded on the right, where the causal attention of real tokens never looks.
    """
    T = max(len(e["tokens"]) for e in examples)

    def pad(key, filler):
        return torch.tensor([e[key] + [filler] * (T - len(e[key])) for e in examples])

    packed = any(max(e["groups"]) > 1 for e in examples)
    images = torch.stack([e["image"] for e in examples])
    return images, pad("tokens", 0), pad("labels", IGNORE), pad("groups", 0) if packed else None
