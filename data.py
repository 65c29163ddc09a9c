"""MP-100 as CapeLLM sees it: annotations, crops, groups of keypoints, epochs (paper, sections 3.3 and 4.1).

    data/mp100/annotations/mp100_split{1..5}_{train,val,test}.json  COCO: images, annotations, categories
    data/mp100/images/<file_name>
    descriptions.json                                               names and descriptions of all keypoints

The files are trusted; tools/check.py looks whether they deserve it, and tools/own.py brings other data into
this layout. An instance is one annotated animal, garment or thing. Its points are in pixels of the photo. A
point is always (x, y), x to the right and y down. The network sees a square crop, and in questions and
answers points are fractions of that crop. Letters: B conversations, T tokens of text, K keypoints, P photos.
`python data.py` shows an epoch of one instance.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from chat import IGNORE, Category, Scene
from common import InputError, read_json, reading

# ----------------------------------------------------------------------------------------------- annotations


@dataclass(frozen=True)
class Instance:
    annotation_id: int
    category_id: int
    photo: str  # file name below images/
    box: tuple  # x, y, width, height: see clip_box()
    keypoints: np.ndarray  # (K, 2) points in pixels of the photo, in the order of Category.keypoints
    visible: np.ndarray  # (K,) bool, whether it is labelled; something may be in front of it


def parse_descriptions(raw, path):
    """The contents of a descriptions.json -> {category id: Category}. path: named in errors."""
    with reading(path, 'see "descriptions.json" for the layout'):
        return {int(number): Category(
                    entry["name"],
                    [(k["name"], k["description"]) for k in raw["keypoint_sets"][entry["keypoint_set"]]],
                    [tuple(line) for line in raw.get("skeletons", {}).get(entry["keypoint_set"], [])])
                for number, entry in raw["categories"].items()}


def annotation_file(data, split, subset):
    """Where MP-100's annotations of a split are. subset: "train", "val" or "test"."""
    return Path(data, "annotations", f"mp100_split{split}_{subset}.json")


def read_instances(path, categories):
    """An annotation file -> its Instances, photo by photo. categories: what parse_descriptions() gave.

    As in the published code, crowds, annotations without keypoints and those whose area or clipped box is
    empty are left out. InputError if an annotation does not fit the descriptions, or nothing is left.
    """
    raw = read_json(path, dict)
    with reading(path, "is it an annotation file of MP-100, or of tools/own.py?"):
        annotations, instances = {}, []
        for annotation in raw["annotations"]:
            annotations.setdefault(annotation["image_id"], []).append(annotation)
        for photo in raw["images"]:
            for a in annotations.get(photo["id"], []):
                points = np.array(a["keypoints"], dtype=np.float64).reshape(-1, 3)
                box = clip_box(a["bbox"], photo["width"], photo["height"])
                if a.get("iscrowd") or a.get("area", 1) <= 0 or min(box[2:]) <= 0 or not points.any():
                    continue
                category = categories.get(a["category_id"], Category(a["category_id"], []))
                if len(points) != len(category.keypoints) or not np.isfinite(points).all():
                    raise InputError(f"{path}: annotation {a['id']} has {len(points)} keypoints (numbers?). "
                                     f"Category {category.name} has {len(category.keypoints)} descriptions; "
                                     "they are in the file of --descriptions")
                instances.append(Instance(a["id"], a["category_id"], Path(photo["file_name"]).as_posix(), box,
                                          points[:, :2], points[:, 2] > 0))
        if not instances:
            raise InputError(f"{path}: no object to use: all are crowds, empty, unlabelled or off the photo")
    return instances


def clip_box(box, width, height):
    """Clips as the published code: w and h lose 1 pixel, and what starts before 0 is shifted in, not cut."""
    x, y, w, h = box
    x1, y1 = max(0, x), max(0, y)
    x2 = min(width - 1, x1 + max(0, w - 1))
    y2 = min(height - 1, y1 + max(0, h - 1))
    return x1, y1, x2 - x1, y2 - y1


# ----------------------------------------------------------------------------------------------------- crops


@dataclass(frozen=True)
class Crop:
    """A square of the photo with its centre at (x, y), turned clockwise by `angle` radians."""

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
        """Reads a photo -> its crop, uint8 (3, size, size), black outside. InputError if it is unreadable."""
        return self.cut_from(*open_reduced(path, self.side, size), size)

    def cut_from(self, photo, shrink, size):
        """The same from an RGB image that is `shrink` times smaller than the photo."""
        if (block := int(self.side / shrink / (2 * size))) > 1:
            photo, shrink = photo.reduce(block), shrink * block  # averaged over blocks of pixels
        n = max(size, round(self.side / shrink))  # cut at the resolution that is left, then reduce
        origin = self.to_photo((0.0, 0.0)) / shrink
        step = self.rotation * (self.side / shrink / n)  # in the photo, for each pixel of the square
        affine = (*step[0], origin[0], *step[1], origin[1])
        square = photo.transform((n, n), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
        square = square.resize((size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def open_reduced(path, side, size):
    """Reads a photo of which `side` pixels will be shown as `size` -> RGB image, and how much it shrank.

    A large JPEG is read at 1/2, 1/4 or 1/8, at least twice the size wanted. EXIF rotation is ignored, since
    MP-100's points were made on unrotated pixels.
    """
    with reading(path, "replace or remove this photo"), Image.open(path) as photo:
        width = photo.width
        photo.draft(None, [math.ceil(2 * size / side * n) for n in photo.size])
        photo.load()
        return to_rgb(photo), round(width / photo.width)


def to_rgb(photo):
    """A photo -> RGB, what is transparent on white, as viewers show it. ValueError for floats or 32 bits."""
    low, high = photo.getextrema() if photo.mode in "FI" else (0, 0)
    if photo.mode == "F" or low < 0 or high >= 2**16:
        raise ValueError("floats or 32 bits a pixel have no known brightness; save it with 8 or 16")
    if photo.mode.startswith("I"):  # 16 bits a pixel: convert() would clip instead of scale
        photo = Image.fromarray((np.asarray(photo) / 257).astype(np.uint8))
    if photo.has_transparency_data:
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo.convert("RGBA"))
    return photo if photo.mode == "RGB" else photo.convert("RGB")  # convert() would copy it


def inside(points):
    """Whether fractions of the crop (..., 2) lie in it."""
    return ((points >= 0) & (points < 1)).all(axis=-1)


def crop_of(instance, scale=1.0, angle=0.0):
    """The square around the instance's box, `scale` times its longer side wide, turned by `angle`."""
    x, y, w, h = instance.box
    return Crop(x + w / 2, y + h / 2, max(w, h) * scale, angle)


def normalize(images):
    """uint8 (B, 3, h, w) -> float32 with ImageNet's mean and standard deviation, on the images' device."""
    mean = torch.tensor([0.485, 0.456, 0.406], device=images.device)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], device=images.device)[:, None, None]
    return (images / 255 - mean) / std


# ---------------------------------------------------------------------------------------------------- epochs


@dataclass(frozen=True)
class Example:
    """What is trained on: a crop of an instance, and the keypoints that conversations ask about."""

    instance: Instance
    crop: Crop
    groups: list  # for each conversation, a list of indices of keypoints
    seed: tuple = ()  # of the random choices made within the conversations


def group_keypoints(n, rounds, rng):
    """Shuffles keypoints 0 ... n-1 and cuts them into groups of `rounds`, one per conversation (section 3.3).

    A short last group is filled with others drawn at random. Five keypoints in fours may give

        [[3, 0, 4, 1], [2, 0, 3, 4]]
    """
    order = rng.permutation(n).tolist()
    *full, last = [order[i:i + rounds] for i in range(0, n, rounds)]
    others = order[:n - len(last)]
    n_missing = min(rounds - len(last), len(others))
    last += rng.choice(others, n_missing, replace=False).tolist()
    return [*full, last]


def plan_epoch(instances, seed, epoch, rounds, pack=False, make_groups=group_keypoints):
    """All Examples of an epoch in the order of training.

    Each is one group of keypoints, or with `pack` all groups of an instance. It has a crop of its own: the
    box's longer side times N(1, 0.3), clipped to 0.7 ... 1.3, and half of the time turned by up to 40 degrees
    either way. Keypoints that are invisible or outside the crop are not asked; an example without any is
    dropped. The order is drawn from (seed, epoch), instance i from (seed, epoch, i), its j-th example's
    conversations from (seed, epoch, i, j). i and j count from 1: numpy ignores a last 0.
    """
    examples = []
    for i, instance in enumerate(instances, 1):
        rng = np.random.default_rng((seed, epoch, i))
        groups = make_groups(len(instance.keypoints), rounds, rng)
        parts = [groups] if pack else [[indices] for indices in groups]  # the conversations of each example
        for j, part in enumerate(parts, 1):
            scale = min(max(rng.normal(1, 0.3), 0.7), 1.3)
            angle = math.radians(rng.uniform(-40, 40)) if rng.random() < 0.5 else 0.0
            crop = crop_of(instance, scale, angle)
            shown = instance.visible & inside(crop.from_photo(instance.keypoints))
            asked = [[k for k in indices if shown[k]] for indices in part]
            if asked := [indices for indices in asked if indices]:
                examples.append(Example(instance, crop, asked, (seed, epoch, i, j)))
    order = np.random.default_rng((seed, epoch)).permutation(len(examples))
    return [examples[i] for i in order]


class TrainingSet(torch.utils.data.Dataset):
    """Examples and the photos' folder -> a crop, uint8 (3, size, size), and conversations: tokens, labels."""

    def __init__(self, examples, categories, chat, folder, size):
        self.examples, self.categories, self.chat = examples, categories, chat
        self.folder, self.size = folder, size

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        example = self.examples[i]
        instance, crop, rng = example.instance, example.crop, np.random.default_rng(example.seed)
        category, points = self.categories[instance.category_id], crop.from_photo(instance.keypoints)
        shown = instance.visible & inside(points)
        invisible = [name for (name, _), is_shown in zip(category.keypoints, shown) if not is_shown]
        scenes = [Scene(category, [(category.keypoints[k], tuple(points[k])) for k in group], invisible, rng)
                  for group in example.groups]
        return (crop.cut(Path(self.folder, instance.photo), self.size),
                [self.chat.encode_conversation(scene) for scene in scenes])


def collate(items):
    """Items of a TrainingSet -> a micro-batch: images, tokens, labels, photo_of.

    images uint8 (P, 3, size, size). tokens and labels (B, T) are padded on the right, where causal attention
    never looks. photo_of (B,) says whose conversation it is; None if P = B.
    """
    conversations = [conversation for _, of_photo in items for conversation in of_photo]
    T = max(len(tokens) for tokens, _ in conversations)
    tokens = torch.tensor([tokens + [0] * (T - len(tokens)) for tokens, _ in conversations])
    labels = torch.tensor([labels + [IGNORE] * (T - len(labels)) for _, labels in conversations])
    photo_of = torch.tensor([p for p, (_, of_photo) in enumerate(items) for _ in of_photo])
    photo_of = None if len(items) == len(tokens) else photo_of
    return torch.stack([image for image, _ in items]), tokens, labels, photo_of


if __name__ == "__main__":
    points = np.array([[176, 98], [139, 65], [189, 165], [113, 148]])  # of assets/toy/creature.jpg
    creature = Instance(0, 0, "creature.jpg", (70, 52, 125, 112), points, np.ones(4, dtype=bool))
    for example in plan_epoch([creature], seed=11, epoch=0, rounds=1):
        crop, [[k]] = example.crop, example.groups
        x, y = crop.from_photo(points[k])
        print(f"a crop {crop.side:.0f} pixels wide, turned by {math.degrees(crop.angle):+.0f} degrees: "
              f"keypoint {k} is at ({x:.3f}, {y:.3f})")
