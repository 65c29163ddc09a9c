"""Instances as CapeLLM sees them: crops, groups of keypoints, epochs (paper, section 3.3).

The network sees the square crop of an instance, and coordinates in questions and answers are fractions of
that crop. Elsewhere points are in pixels of the photo. A point is always (x, y), x to the right and y down; a
size is (width, height). Letters: B conversations, T tokens of text, K keypoints. `python data.py` draws four
crops of one instance.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from annotations import MAX_PIXELS, UNREADABLE, Instance, open_image
from chat import IGNORE, Scene
from common import InputError

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
        if not (1e-6 <= self.side <= 10 * MAX_PIXELS and max(abs(self.x), abs(self.y)) <= 10 * MAX_PIXELS):
            raise InputError(f"{path}: no crop of {self.side:g} pixels a side can be cut at ({self.x:g}, "
                             f"{self.y:g}); is the box right?")
        return self.cut_from(*open_reduced(path, self.side, size), size)

    def cut_from(self, photo, shrink, size):
        """The same from an RGB image that is `shrink` times smaller than the photo."""
        n = max(size, round(self.side / shrink))  # cut at full resolution, then reduce with antialiasing
        origin = self.to_photo((0.0, 0.0)) / shrink
        step = self.rotation * (self.side / shrink / n)  # in the photo, for each pixel of the square
        affine = (*step[0], origin[0], *step[1], origin[1])
        square = photo.transform((n, n), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
        square = square.resize((size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def open_reduced(path, side, size):
    """Reads a photo of which `side` pixels will be shown as `size` -> RGB image, and how much it shrank.

    A large photo is read at 1/2, 1/4 or 1/8 (JPEG) and then averaged over whole blocks of pixels. At least
    twice the size wanted is kept, so nothing visible is lost. EXIF rotation is ignored: MP-100's points were
    made on unrotated pixels.
    """
    try:
        with open_image(path) as photo:
            width = photo.width
            photo.draft(None, [math.ceil(2 * size / side * n) for n in photo.size])
            photo.load()
            shrink = round(width / photo.width)
            photo = to_rgb(photo)
    except UNREADABLE as e:
        raise InputError(f"{path}: not a readable photo ({e}); replace or remove it") from None
    return average_blocks(photo, shrink, side, size)


def to_rgb(photo):
    if photo.mode.startswith("I"):  # 16 bits a pixel: convert() would clip instead of scale
        photo = Image.fromarray((np.asarray(photo) / 257).astype(np.uint8))
    return photo if photo.mode == "RGB" else photo.convert("RGB")  # which would copy it


def average_blocks(photo, shrink, side, size):
    """An RGB image that shrank already -> the same averaged over blocks of pixels, and how much it shrank."""
    block = int(side / shrink / (2 * size))
    return (photo.reduce(block), shrink * block) if block > 1 else (photo, shrink)


def inside(points):
    """Whether fractions of the crop (..., 2) lie in it."""
    return ((points >= 0) & (points < 1)).all(axis=-1)


def crop_of(instance, scale=1.0, angle=0.0):
    """The square around the instance's box whose side is the box's longer side."""
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


def count_groups(n, rounds):
    """How many conversations it takes to ask for n keypoints, `rounds` in each; "dynamic" is as 4."""
    return math.ceil(n / (4 if rounds == "dynamic" else rounds))


def group_keypoints(n, rounds, rng):
    """Shuffles keypoints 0 ... n-1 and cuts them into groups of `rounds` (section 3.3).

    A short last group is filled with others drawn at random. Five keypoints in fours may give

        [[3, 0, 4, 1], [2, 0, 3, 4]]

    "dynamic", of the paper's ICCV version, cuts at random places instead, so groups have any size.
    """
    order = rng.permutation(n).tolist()
    if rounds == "dynamic":
        cuts = sorted(rng.choice(range(1, n), count_groups(n, rounds) - 1, replace=False)) if n > 1 else []
        return [order[a:b] for a, b in zip([0, *cuts], [*cuts, n])]
    *full, last = [order[i:i + rounds] for i in range(0, n, rounds)]
    others = order[:n - len(last)]
    n_missing = min(rounds - len(last), len(others))
    last += rng.choice(others, n_missing, replace=False).tolist() if others else []
    return [*full, last]


def plan_epoch(instances, seed, epoch, rounds, pack=False):
    """All Examples of an epoch in the order of training.

    Each is one group of keypoints, or with `pack` all groups of an instance. It has a crop of its own: the
    box's longer side times N(1, 0.3), clipped to 0.7 ... 1.3. Half of the crops are turned, by up to 40
    degrees either way. Keypoints that are hidden or outside the crop are not asked; an example with none left
    is dropped.

    Everything is drawn from the seed and the epoch: the order from (seed, epoch), instance i from
    (seed, epoch, i), its j-th example's conversations from (seed, epoch, i, j). i and j count from 1, since
    numpy makes the same numbers from (seed, epoch, 0) as from (seed, epoch).
    """
    examples = []
    for i, instance in enumerate(instances, 1):
        rng = np.random.default_rng((seed, epoch, i))
        groups = group_keypoints(len(instance.keypoints), rounds, rng)
        for j, together in enumerate([groups] if pack else [[group] for group in groups], 1):
            scale = min(max(rng.normal(1, 0.3), 0.7), 1.3)
            angle = math.radians(rng.uniform(-40, 40)) if rng.random() < 0.5 else 0.0
            crop = crop_of(instance, scale, angle)
            shown = instance.visible & inside(crop.from_photo(instance.keypoints))
            asked = [[k for k in group if shown[k]] for group in together]
            if any(asked):
                asked = [group for group in asked if group]
                examples.append(Example(instance, crop, asked, (seed, epoch, i, j)))
    order = np.random.default_rng((seed, epoch)).permutation(len(examples))
    return [examples[i] for i in order]


class TrainingSet(torch.utils.data.Dataset):
    """Examples -> {"image": uint8 (3, size, size), "tokens", "labels", "points", "conversation": lists}.

    images: the folder of the photos. tokens, labels and points as in Chat.conversation(), after BOS and
    "\\n". conversation is the number of the conversation that a token belongs to, from 1, or 0 for BOS and
    "\\n", which all of them share.
    """

    def __init__(self, examples, categories, chat, images, size):
        self.examples, self.categories, self.chat = examples, categories, chat
        self.images, self.size = images, size

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        example = self.examples[i]
        instance, crop, rng = example.instance, example.crop, np.random.default_rng(example.seed)
        category, points = self.categories[instance.category_id], crop.from_photo(instance.keypoints)
        shown = instance.visible & inside(points)
        hidden = [name for (name, _), is_shown in zip(category.keypoints, shown) if not is_shown]
        start = [self.chat.bos, *self.chat.newline]
        item = {"image": crop.cut(Path(self.images, instance.photo), self.size), "tokens": start,
                "labels": [IGNORE] * len(start), "conversation": [0] * len(start), "points": []}
        for number, group in enumerate(example.groups, 1):
            asked = [(category.keypoints[k], tuple(points[k])) for k in group]
            tokens, labels, keypoints = self.chat.conversation(Scene(category, asked, hidden, rng))
            item["tokens"] += tokens
            item["labels"] += labels
            item["conversation"] += [number] * len(tokens)
            item["points"] += keypoints
        return item


def collate(items):
    """Items of a TrainingSet -> a micro-batch: images, tokens, labels, points, conversation.

    images uint8 (B, 3, size, size). tokens, labels and conversation (B, T) are padded on the right, where the
    causal attention of real tokens never looks. points (n, 2) for n <KEYPOINT>s, None if answers are text;
    conversation is None if no row holds several.
    """
    T = max(len(item["tokens"]) for item in items)

    def pad(key, filler):
        return torch.tensor([item[key] + [filler] * (T - len(item[key])) for item in items])

    images = torch.stack([item["image"] for item in items])
    points = [point for item in items for point in item["points"]]
    is_packed = any(max(item["conversation"]) > 1 for item in items)
    return (images, pad("tokens", 0), pad("labels", IGNORE), torch.tensor(points).float() if points else None,
            pad("conversation", 0) if is_packed else None)


if __name__ == "__main__":
    photo = Path(__file__).parent / "assets/toy/creature.jpg"
    points = np.array([[176, 98], [139, 65], [189, 165], [113, 148]])  # two balls, a tip, a heart
    creature = Instance(0, 0, photo.name, (70, 52, 125, 112), points, np.ones(4, dtype=bool))
    sheet = Image.new("RGB", (4 * 224, 224))
    for n, example in enumerate(plan_epoch([creature], seed=11, epoch=0, rounds=1)):
        tile = Image.fromarray(example.crop.cut(photo, 224).permute(1, 2, 0).numpy())
        for x, y in 224 * example.crop.from_photo(points):
            ImageDraw.Draw(tile).ellipse((x - 4, y - 4, x + 4, y + 4), "yellow", "black")
        sheet.paste(tile, (224 * n, 0))
        print(f"crop {n}: {example.crop.side:.0f} pixels wide, turned by "
              f"{math.degrees(example.crop.angle):+.0f} degrees, asks for keypoint {example.groups[0][0]}")
    Path("runs").mkdir(exist_ok=True)
    sheet.save("runs/crops.png")
    print("runs/crops.png shows them")
