"""MP-100 as CapeLLM sees it: instances, crops, groups of keypoints, epochs (paper, sections 3.3 and 4.1).

    data/mp100/annotations/mp100_split{1..5}_{train,val,test}.json  COCO: images, annotations, categories
    data/mp100/images/<file_name>
    descriptions.json                                               names and descriptions of all keypoints

An instance is one annotated animal, garment or thing. The network sees its square crop, and coordinates in
questions and answers are fractions of that crop. Elsewhere points are in pixels of the photo. A point is
always (x, y), x to the right and y down; a size is (width, height). Letters: B conversations, T tokens of
text, K keypoints. `python data.py` draws four crops of one instance.
"""

import math
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from chat import IGNORE, Category, Scene
from common import InputError, check, get_field, read_json

UNREADABLE = Exception  # what pillow raises for a damaged photo: its decoders raise nearly anything
MAX_ID = 2**63 - 1
MAX_PIXELS = 10**6  # no photo is larger, and no point or box farther away


# ----------------------------------------------------------------------------------------------- annotations


@dataclass(frozen=True)
class Instance:
    annotation_id: int
    category_id: int
    photo: str  # file name below the folder of the photos
    box: tuple  # x, y, width, height, clipped to the photo
    keypoints: np.ndarray  # (K, 2)
    visible: np.ndarray  # (K,) bool, whether it is labelled; something may be in front of it


def read_descriptions(path):
    """A file such as descriptions.json -> {category id: Category}. InputError says which entry is wrong."""
    return parse_descriptions(read_json(path), path)


def parse_descriptions(raw, path):
    """The contents of such a file -> {category id: Category}. path: where they are from, for messages."""
    sets, categories = get_field(raw, "keypoint_sets", path, dict, 0), {}
    skeletons = get_field(raw, "skeletons", path, dict, 0) if "skeletons" in raw else {}
    for number, entry in get_field(raw, "categories", path, dict).items():
        if not re.fullmatch("0|-?[1-9][0-9]{,17}", number):
            raise InputError(f"{path}: {number!r} in categories is not an id, a whole number")
        name = get_field(entry, "name", path, str, 1, 1000, f" of category {number}")
        set_name = get_field(entry, "keypoint_set", path, str, of=f" of category {number}")
        keypoints = parse_keypoint_set(sets, set_name, path)
        skeleton = parse_skeleton(skeletons, set_name, len(keypoints), path)
        categories[int(number)] = Category(name, keypoints, skeleton)
    return categories


def parse_keypoint_set(sets, set_name, path):
    """-> [(name, description), ...] of a keypoint set. No two have the same name."""
    keypoints = []
    for k, entry in enumerate(get_field(sets, set_name, path, list, 1, 1000)):
        of = f" of keypoint {k} in {set_name}"
        keypoints.append((get_field(entry, "name", path, str, 1, 1000, of),
                          get_field(entry, "description", path, str, 1, 10000, of)))
    (name, count), = Counter(name for name, _ in keypoints).most_common(1)
    if count > 1:
        raise InputError(f"{path}: {count} keypoints of {set_name} are called {name}; tell them apart")
    return keypoints


def parse_skeleton(skeletons, set_name, n, path):
    """-> [(a, b), ...], the lines between the n keypoints of a set; none if there is no skeleton for it."""
    where, lines = f"{path}: the skeleton of {set_name}", []
    for line in check(skeletons.get(set_name, []), where, list, 0):
        a, b = (check(k, f"{where}: a keypoint's index", int, 0, n - 1)
                for k in check(line, f"{where}: a line", list, 2, 2))
        lines.append((a, b))
    return lines


def read_instances(path, categories):
    """An annotation file -> its Instances, photo by photo. categories: what read_descriptions() gave.

    As in the published code, some annotations are left out: see make_instance(). InputError names the
    annotation that is malformed or does not fit the descriptions.
    """
    raw, annotations = read_json(path), {}
    photos = by_id(raw, "images", "image", path)
    for number, annotation in by_id(raw, "annotations", "annotation", path).items():
        of = f" of annotation {number}"
        image = get_field(annotation, "image_id", wrong(path), int, -MAX_ID, MAX_ID, of)
        annotations.setdefault(image, []).append(annotation)
    n_unlisted = sum(len(annotations[image]) for image in annotations.keys() - photos.keys())
    if n_unlisted and os.environ.get("RANK", "0") == "0":
        print(f"{path}: {n_unlisted} annotations of images that are not listed are left out", file=sys.stderr)
    if "categories" in raw:
        check_categories(by_id(raw, "categories", "category", path).values(), categories, path)
    instances = [make_instance(annotation, photo, categories, path)
                 for number, photo in photos.items() for annotation in annotations.get(number, [])]
    return [instance for instance in instances if instance is not None]


def wrong(path):
    return f"{path}: not an MP-100 annotation file"


def by_id(raw, key, what, path):
    """A list of an annotation file -> {id: entry}. InputError if two have the same id."""
    entries = {}
    for entry in get_field(raw, key, wrong(path), list, 0, 10**7):
        number = get_field(entry, "id", wrong(path), int, -MAX_ID, MAX_ID, f" of an entry of {key}")
        if number in entries:
            raise InputError(f"{path}: {what} {number} is listed twice")
        entries[number] = entry
    return entries


def plain(name):
    """left_eye, "Left eye" and left-eye are the same name."""
    return re.sub(r"[\s_-]+", "", name).casefold()


def check_categories(entries, categories, path):
    """InputError if a category of an annotation file is not the one that has its id in the descriptions.

    MP-100 numbers the keypoints of many categories or calls them otherwise than the descriptions, and those
    of two it does not name at all. But a name that is in both must be at the same place.
    """
    for entry in entries:
        if entry["id"] in categories:
            category = categories[entry["id"]]
            ours = [plain(name) for name, _ in category.keypoints]
            place = f"{path}: category {entry['id']}"
            names = check(entry.get("keypoints", []), f"{place}: keypoints", list, 0)
            theirs = [plain(str(name)) for name in names] or ours
            if plain(name := str(entry.get("name", category.name))) != plain(category.name):
                raise InputError(f"{place} is {name}, but {category.name} in the descriptions")
            if len(theirs) != len(ours):
                raise InputError(f"{place}, {name}, has {len(theirs)} keypoints, but {len(ours)} "
                                 "descriptions")
            for k, (here, there) in enumerate(zip(theirs, ours)):
                if here != there and here in ours:
                    raise InputError(f"{place}, {name}: keypoint {k + 1} is {entry['keypoints'][k]}, but "
                                     f"{category.keypoints[k][0]} in the descriptions")


def make_instance(annotation, photo, categories, path):
    """-> Instance; None for a crowd, if all keypoints are zeros, or if nothing of the box is in the photo."""
    number = annotation["id"]
    where, of, of_image = wrong(path), f" of annotation {number}", f" of image {photo['id']}"
    category_id = get_field(annotation, "category_id", where, int, -MAX_ID, MAX_ID, of)
    x, y, w, h = get_field(annotation, "bbox", where, list, 4, 4, of)
    triples = get_field(annotation, "keypoints", where, list, 0, 3000, of)
    width, height = (get_field(photo, key, where, float, 1, MAX_PIXELS, of_image)
                     for key in ("width", "height"))
    if not all(type(v) in (int, float) and abs(v) <= MAX_PIXELS for v in (x, y, w, h, *triples)):
        raise InputError(f"{path}: annotation {number} has a coordinate that is not a number, "
                         f"or is beyond {MAX_PIXELS:,}")
    if len(triples) % 3 or annotation.get("iscrowd", 0) not in (0, 1):
        raise InputError(f"{where}: annotation {number} has keypoints that are no triples x, y, v, "
                         "or an iscrowd that is not 0 or 1")
    area = get_field(annotation, "area", where, float, -10**12, 10**12, of) if "area" in annotation else 1
    points = np.array(triples, dtype=np.float64).reshape(-1, 3)  # x, y, visibility
    x1, y1 = max(0, x), max(0, y)
    x2 = min(width - 1, x1 + max(0, w - 1))
    y2 = min(height - 1, y1 + max(0, h - 1))
    if area <= 0 or x2 <= x1 or y2 <= y1 or not points.any() or annotation.get("iscrowd"):
        return None
    if category_id not in categories:
        raise InputError(f"{path}: category {category_id} has no descriptions; "
                         "add it to the descriptions file")
    category = categories[category_id]
    if len(points) != len(category.keypoints):
        raise InputError(f"{path}: annotation {number} has {len(points)} keypoints, but {category.name} has "
                         f"{len(category.keypoints)} descriptions")
    file = Path(get_field(photo, "file_name", where, str, 1, 1000, of_image))
    if file.is_absolute() or ".." in file.parts:
        raise InputError(f"{path}: the photo {file} of annotation {number} is not below images/")
    box = (x1, y1, x2 - x1, y2 - y1)
    return Instance(number, category_id, photo["file_name"], box, points[:, :2], points[:, 2] > 0)


def keep_readable(instances, images, categories, allow_missing):
    """-> the instances whose photo is there and has a readable header. The others are refused or left out."""
    readable = {}
    for photo in {instance.photo for instance in instances}:
        try:
            open_photo(Path(images, photo)).close()
            readable[photo] = True
        except UNREADABLE:
            readable[photo] = False
    refuse_missing([o for o in instances if not readable[o.photo]], images, categories, allow_missing)
    if not any(readable.values()):
        raise InputError(f"{images}: none of the photos of {len(instances)} objects is there")
    return [instance for instance in instances if readable[instance.photo]]


def refuse_missing(instances, images, categories, allow_missing):
    """InputError that counts the instances without photo by category, unless allow_missing."""
    if instances and not allow_missing:
        counts = Counter(categories[instance.category_id].name for instance in instances)
        raise InputError(f"{images}: photos of {len(instances)} objects are missing or unreadable "
                         f"({', '.join(f'{name} {n}' for name, n in counts.items())}), e.g. "
                         f"{instances[0].photo}; complete the folder or leave them out with --allow-missing")


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


def open_photo(path):
    """As Image.open(), for regular files alone: one could wait for a pipe for ever."""
    if Path(path).exists() and not Path(path).is_file():
        raise OSError("it is not a regular file")
    return Image.open(path)


def open_reduced(path, side, size):
    """Reads a photo of which `side` pixels will be shown as `size` -> RGB image, and how much it shrank.

    A large photo is read at 1/2, 1/4 or 1/8 (JPEG) and then averaged over whole blocks of pixels. At least
    twice the size wanted is kept, so nothing is lost. EXIF rotation is ignored: MP-100's points were made on
    unrotated pixels.
    """
    try:
        with open_photo(path) as photo:
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
    """How many conversations ask for n keypoints, `rounds` in each. "dynamic": as many as with 4."""
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

    images: the folder of the photos. tokens, labels and points as in Chat.conversation(), behind BOS and
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
        tokens = [self.chat.bos, *self.chat.newline]
        item = {"image": crop.cut(Path(self.images, instance.photo), self.size), "tokens": tokens,
                "labels": [IGNORE] * len(tokens), "conversation": [0] * len(tokens), "points": []}
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
