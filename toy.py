"""CapeLLM in small: draws a toy MP-100 of friendly creatures, fine-tunes tiny backbones on it, evaluates on categories never seen.

    python toy.py               a few minutes on two CPU cores; leaves runs/toy/ with ckpt.pt, report.json, predictions.png
    python toy.py --pretrain    makes the backbones of assets/toy/ from nothing, in about twenty minutes

Two worlds share eleven kinds of parts in eight colours, and little else. The backbones grew up with *sheets*: loose parts
scattered on paper, and short questions about them. The toy MP-100 holds *creatures*: each category has a body, limbs and marks of
its own, ambiguous names ("second leg foot") and descriptions that settle them ("the far end of the leg that is blue"). One in five
pairs of kind and colour is kept for test categories: whoever finds a blue star here has never seen one, in neither world.
The training and the evaluation are those of train.py and evaluate.py, in their files and folders. Points are complex numbers.
"""

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import time
from multiprocessing import Pool
from pathlib import Path

# Before torch is loaded: beside other work, threads that spin while they wait for each other make training several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import evaluate
import train
from data import crop_of, normalize, read_descriptions, read_objects
from llama import Llama, LlamaConfig
from vit import ViT, ViTConfig

ASSETS = Path(__file__).parent / "assets/toy"
SIZE = 112  # pixels of a crop: 8 x 8 patches

# ------------------------------------------------------------------------------------------------------- parts and colours

COLOURS = {"red": (222, 62, 58), "orange": (245, 146, 40), "yellow": (252, 218, 66), "green": (66, 168, 82),
           "blue": (58, 112, 214), "purple": (142, 78, 186), "pink": (248, 146, 196), "black": (52, 48, 60)}
LIMBS = {"leg": ("foot", "knee"), "horn": ("tip",), "antenna": ("ball",), "wing": ("edge",), "tail": ("end",)}  # and their keypoints
MARKS = ("spot", "square", "star", "ring", "cross", "heart")
PAIRS = [(kind, colour) for kind in (*LIMBS, *MARKS) for colour in COLOURS]
UNSEEN = [PAIRS[i] for i in np.random.default_rng(0).permutation(len(PAIRS))[:16]]  # only in test categories

TURN = np.linspace(0, 2 * np.pi, 32, endpoint=False)
CIRCLE = np.exp(1j * TURN)
DARK, WHITE = (46, 40, 52), (255, 255, 255)


def oval(width, height):
    return width * CIRCLE.real + 1j * height * CIRCLE.imag


def shape(kind, bend):
    """A part in its own frame -> strokes ("line", points, width) and areas ("area", outline), and its keypoints.

    Limbs grow from 0 to about 1 and bend sideways by `bend`; marks are centred on 0 with a radius of about 1.
    """
    side = 1 if bend > 0 else -1
    if kind == "leg":
        knee, foot = 0.5 + 0.5j * bend, 1 + 0.1j * bend
        return [("line", [0, knee, foot], 0.24), ("area", knee + 0.17 * CIRCLE),
                ("area", foot + 0.12j * side + oval(0.15, 0.27))], {"foot": foot, "knee": knee}
    if kind == "horn":
        s = np.linspace(0, 1, 9)
        middle, half = s + 0.4j * bend * s**2, 0.28j * (1 - s) ** 0.8
        return [("area", np.concatenate([middle + half, (middle - half)[::-1]]))], {"tip": 1 + 0.4j * bend}
    if kind == "antenna":
        s, ball = np.linspace(0, 1, 8), 0.9 + 0.5j * bend
        return [("line", 0.9 * s + 0.5j * bend * s**2, 0.12), ("area", ball + 0.23 * CIRCLE)], {"ball": ball}
    if kind == "wing":
        u = (1 - CIRCLE.real) / 2
        return [("area", u + 0.36j * CIRCLE.imag * (0.5 + u) + 0.25j * bend * u**2),
                ("vein", [0.25 + 0.02j * bend, 0.75 + 0.14j * bend], 0.05)], {"edge": 0.94 + 0.22j * bend}
    if kind == "tail":
        s = np.linspace(0, 1, 14)
        return [("line", 0.8 * s + 0.17j * side * np.sin(2 * np.pi * s), 0.17),
                ("area", np.array([0.7 + 0.25j, 1.1, 0.7 - 0.25j]))], {"end": 0.95}
    if kind == "ring":
        return [("line", 0.78 * np.append(CIRCLE, 1), 0.42)], {"centre": 0}
    x, y = 16 * np.sin(TURN) ** 3, 13 * np.cos(TURN) - 5 * np.cos(2 * TURN) - 2 * np.cos(3 * TURN) - np.cos(4 * TURN)
    outline = {"spot": 0.9 * CIRCLE, "square": 0.82 * np.array([1 + 1j, -1 + 1j, -1 - 1j, 1 - 1j]),
               "star": np.where(np.arange(10) % 2, 0.5, 1.2) * np.exp(2j * np.pi * (np.arange(10) - 2.5) / 10),
               "cross": np.concatenate([1j**k * np.array([0.34 - 0.34j, 1.05 - 0.34j, 1.05 + 0.34j]) for k in range(4)]),
               "heart": (x - 1j * (y + 2)) / 14.5}
    return [("area", outline[kind])], {"centre": 0}


def tint(colour, by):
    return tuple(int(c) for c in np.clip(np.array(colour) + by, 0, 255))


class Pen:
    """Draws on a picture, `fine` times larger than it will be, for smooth edges."""

    def __init__(self, size, paper, fine):
        self.fine = fine
        self.image = Image.new("RGB", (size * fine, size * fine), paper)
        self.draw = ImageDraw.Draw(self.image)
        self.place(0, 1)

    def place(self, origin, scale, mirrored=False):
        """From here on 0 is drawn at `origin`, 1 at `origin` + `scale`; what is drawn is kept in `extent`."""
        self.origin, self.scale, self.mirrored, self.extent = origin, scale, mirrored, []

    def pixels(self, z):
        z = np.atleast_1d(np.asarray(z, complex))
        return self.origin + self.scale * (-z.conj() if self.mirrored else z)

    def xy(self, z, margin):
        z = self.pixels(z)
        self.extent += [z + margin * (1 + 1j), z - margin * (1 + 1j)]
        return [(p.real * self.fine, p.imag * self.fine) for p in z]

    def area(self, z, colour, rim=None, width=0):
        xy = self.xy(z, width / 2)
        self.draw.polygon(xy, fill=colour)
        if rim:
            self.draw.line(xy + xy[:2], fill=rim, width=round(width * self.fine), joint="curve")

    def line(self, z, width, colour):
        width *= abs(self.scale)
        xy, w = self.xy(z, width / 2), width * self.fine
        self.draw.line(xy, fill=colour, width=max(1, round(w)), joint="curve")
        for x, y in (xy[0], xy[-1]):  # round ends
            self.draw.ellipse((x - w / 2, y - w / 2, x + w / 2, y + w / 2), fill=colour)

    def part(self, kind, colour, at, along, bend, rim, width):
        """Draws a part with 0 at `at` and 1 at `at + along` -> its keypoints in pixels, {name: point}."""
        strokes, points = shape(kind, bend)
        for what, z, *w in strokes:
            if what == "line" and rim:  # rims of strokes lie below all else, so that joints stay clean
                self.line(at + along * np.asarray(z), w[0] * abs(along) + 2 * width / abs(self.scale), rim)
        for what, z, *w in strokes:
            z = at + along * np.asarray(z)
            if what == "area":
                self.area(z, colour, rim, width)
            else:
                self.line(z, w[0] * abs(along), colour if what == "line" else rim or tint(colour, 40))
        return {name: self.pixels(at + along * z)[0] for name, z in points.items()}

    def picture(self):
        return self.image.reduce(self.fine)


# ------------------------------------------------------------------------------------------------ the world of pre-training

PAPERS = [(250, 246, 236), (238, 240, 244), (226, 214, 190), (244, 232, 214), (206, 216, 220), (228, 236, 222), (240, 226, 232),
          (196, 186, 170)]
SCRAPS = [(222, 200, 168), (190, 204, 212), (196, 210, 184), (206, 190, 212), (232, 206, 188), (214, 214, 206), (150, 160, 172),
          (172, 146, 128)]
WORDS = {"foot": ("foot", "far end"), "knee": ("knee", "bend"), "tip": ("tip", "sharp end"), "ball": ("ball", "knob"),
         "edge": ("edge", "outer end"), "end": ("end", "arrow"), "centre": ("centre", "middle")}


def draw_sheet(seed):
    """-> a picture, uint8 (SIZE, SIZE, 3), of loose parts on a sheet of paper, and its points [(kind, colour, keypoint, where)].

    Limbs also have a middle, without a name, that is never asked for.
    """
    rng = np.random.default_rng(seed)
    paper = PAPERS[rng.integers(len(PAPERS))]
    pen = Pen(SIZE, paper, fine=2)
    if rng.random() < 0.5:  # ruled, or squared
        for y in np.arange(0, SIZE, rng.uniform(7, 14)):
            pen.line([1j * y, SIZE + 1j * y], 0.5, tint(paper, -14))
            if paper[0] < 240:
                pen.line([y, y + 1j * SIZE], 0.5, tint(paper, -14))
    colours = rng.permutation(list(COLOURS))[:rng.integers(3, 6)]  # few, so that a colour alone does not find a part
    parts = [pair for pair in PAIRS if pair[1] in colours and pair not in UNSEEN]
    rng.shuffle(parts)
    placed, points = [], []
    for kind, colour in parts[:rng.integers(5, 11)]:
        r = rng.uniform(12, 21) if kind in LIMBS else rng.uniform(7.5, 11)
        for _ in range(12):  # tries to find a free place
            at = complex(*rng.uniform(0.8 * r, SIZE - 0.8 * r, 2))
            if all(abs(at - other) > 0.85 * (r + s) for other, s, *_ in placed):
                placed.append((at, r, kind, colour))
                break
    for at, r, *_ in placed:
        if rng.random() < 0.35:
            scrap = r * rng.uniform(1, 1.7) * CIRCLE * (1 + 0.1 * np.cos(3 * TURN + rng.uniform(0, 6)))
            pen.area(at + scrap, SCRAPS[rng.integers(len(SCRAPS))])
    for at, r, kind, colour in placed:
        limb = kind in LIMBS
        along = r * np.exp(1j * (rng.uniform(0, 6.28) if limb or rng.random() < 0.5 else rng.normal(0, 0.3)))
        rgb = tint(COLOURS[colour], rng.normal(0, 8, 3))
        rim = tint(rgb, -60) if rng.random() < 0.5 else None
        drawn = pen.part(kind, rgb, at - along * limb, along * (1 + limb), rng.choice([-1, 1]) * rng.uniform(0.15, 0.5), rim, 0.9)
        points += [(kind, colour, name, z / SIZE) for name, z in [*drawn.items(), *[("", at)] * limb]]
    return np.asarray(pen.picture()), points


def phrase(rng, kind, colour, keypoint):
    """One of the ways to speak of a point of a sheet."""
    part = f"{colour} {kind}" if rng.random() < 0.6 else f"{kind} in {colour}"
    if keypoint == "centre" and rng.random() < 0.7:
        return part
    word = WORDS[keypoint][rng.integers(2)]
    return f"{word} of a {part}" if rng.random() < 0.6 else f"{part}, its {word}"


# ------------------------------------------------------------------------------------------------------------ the toy MP-100

SUBSETS = {"train": (70, 30), "val": (10, 10), "test": (20, 25)}  # categories, as many as MP-100's, and photos of each
BODIES = [(236, 208, 172), (178, 206, 222), (188, 214, 176), (206, 190, 226), (240, 196, 176), (222, 220, 210), (150, 166, 188),
          (184, 158, 138)]
SKIES = [(226, 240, 250), (252, 240, 224), (232, 244, 230), (240, 232, 248), (214, 228, 238), (250, 234, 232), (236, 236, 226)]
HOME = {"leg": (np.pi / 2,), "horn": (-np.pi / 2,), "antenna": (-np.pi / 2,), "wing": (0, np.pi), "tail": (0, np.pi)}  # y points down
ORDINALS = ("first", "second", "third", "fourth")
SAYINGS = {"foot": ("the foot of the {c} leg", "the far end of the leg that is {c}", "where the {c} leg meets the ground"),
           "knee": ("the bend in the middle of the {c} leg", "halfway down the leg that is {c}", "the knee of the {c} leg"),
           "tip": ("the sharp end of the {c} horn", "the tip of the horn that is {c}"),
           "ball": ("the ball at the end of the {c} antenna", "the knob on the antenna that is {c}"),
           "edge": ("the outer end of the {c} wing", "the edge of the wing that is {c}, away from the body"),
           "end": ("the arrow at the end of the {c} tail", "the very end of the tail that is {c}"),
           "centre": ("the {k} that is {c}", "the {c} {k} painted on the body", "the middle of the {c} {k}")}


def plan_category(rng, subset):
    """What all creatures of a category have in common. Neither a kind nor a colour alone says which part is meant."""
    while True:
        colours = rng.permutation(list(COLOURS))[:4]

        def choose(kinds, counts):
            return [(str(k), str(c)) for k, n in zip(rng.permutation(kinds), counts) for c in rng.permutation(colours)[:n]]

        limbs = choose(list(LIMBS), [(2, 1), (2, 2), (3, 1)][rng.integers(3)])
        marks = choose(MARKS, [(1, 1), (2, 1)][rng.integers(2)])
        unseen = sum(pair in UNSEEN for pair in limbs + marks)
        if unseen >= 2 if subset == "test" else unseen == 0:
            break
    while True:  # limbs all around the body, rather at home than not, never close together
        angles = [rng.choice(HOME[kind]) + rng.normal(0, 0.9) for kind, _ in limbs]
        if all(math.cos(a - b) < 0.73 for i, a in enumerate(angles) for b in angles[:i]):
            break
    while True:  # marks and face on the body
        face = complex(rng.uniform(-0.3, 0.3), rng.uniform(-0.45, -0.2))
        places = [complex(*rng.uniform(-0.68, 0.68, 2)) for _ in marks]
        if (all(abs(z) < 0.68 and (abs((z - face).real) > 0.6 or abs((z - face).imag) > 0.44) for z in places)
                and all(abs(z - w) > 0.62 for i, z in enumerate(places) for w in places[:i])):
            break
    return dict(limbs=limbs, marks=marks, angles=angles, face=face, places=places, aspect=rng.uniform(0.86, 1.16),
                form=rng.choice(["egg", "box", "bean", "cloud", "gem", "drop"]), fur=BODIES[rng.integers(len(BODIES))],
                lengths=rng.uniform(0.8, 1.1, len(limbs)), size=rng.uniform(0.28, 0.32))


def body(form, aspect):
    z = {"egg": CIRCLE.real * (1 - 0.12 * CIRCLE.imag) + 1j * CIRCLE.imag,
         "box": 0.92 * (np.sign(CIRCLE.real) * abs(CIRCLE.real) ** 0.5 + 1j * np.sign(CIRCLE.imag) * abs(CIRCLE.imag) ** 0.5),
         "bean": CIRCLE + 0.13 * CIRCLE**2, "cloud": np.exp(1j * TURN) * (0.94 + 0.09 * abs(np.sin(3.5 * TURN))),
         "gem": 1.06 * np.exp(2j * np.pi * (np.arange(6) + 0.5) / 6), "drop": CIRCLE * (1 + 0.22 * np.clip(-CIRCLE.imag, 0, 1) ** 3)}[form]
    return z.real * aspect + 1j * z.imag / aspect


def draw_photo(rng, plan):
    """A creature in a new pose, turn, size, light and place -> picture, keypoints, box (x1, y1, x2, y2)."""
    size = int(rng.integers(212, 257))
    sky = tint(SKIES[rng.integers(len(SKIES))], -rng.integers(0, 14))
    pen = Pen(size, sky, fine=2)
    for _ in range(rng.integers(3)):  # hills
        x = np.linspace(0, size, 24)
        hill = x + 1j * (size * rng.uniform(0.55, 0.95) + 8 * np.sin(x / rng.uniform(14, 42) + rng.uniform(0, 6)))
        pen.area(np.concatenate([hill, [size * (1 + 1j), size * 1j]]), tint(sky, -rng.integers(8, 22)))
    for _ in range(rng.integers(2, 8)):  # bubbles
        pen.area(complex(*rng.uniform(0, size, 2)) + rng.uniform(2, 13) * CIRCLE, tint(sky, rng.integers(-16, 14)))

    light = rng.normal(0, 6, 3)
    outline = body(plan["form"], plan["aspect"] * rng.uniform(0.95, 1.05))
    limbs, points = [], []
    for (kind, colour), angle, length in zip(plan["limbs"], plan["angles"], plan["lengths"]):
        out = np.exp(1j * (angle + rng.normal(0, 0.15)))
        root = 0.86 * out * abs(outline[np.argmin(abs(np.angle(outline / out)))])  # just inside the body
        along = out * length * rng.uniform(0.9, 1.1) * np.exp(1j * rng.normal(0, 0.15))
        limbs.append((kind, tint(COLOURS[colour], light + rng.normal(0, 5, 3)), root, along, rng.choice([-1, 1]) * rng.uniform(0.15, 0.5)))
    reach = max(1.1, *(abs(root + along) for _, _, root, along, _ in limbs))
    turn = np.exp(1j * rng.uniform(-0.8, 0.8))
    pen.place(size / 2 * (1 + 1j) + complex(*rng.uniform(-12, 12, 2)), rng.uniform(80, 96) / reach * turn, rng.random() < 0.5)
    for kind, rgb, root, along, bend in limbs:
        points += pen.part(kind, rgb, root, along, bend, tint(rgb, -46), 2).values()
    fur = tint(plan["fur"], light + rng.normal(0, 5, 3))
    pen.area(outline, fur, tint(fur, -52), 2.6)
    pen.area(0.84 * outline + 0.05 - 0.06j, tint(fur, 9))
    for side in (-1, 1):
        eye = plan["face"] + 0.2 * side
        pen.area(eye + oval(0.1, 0.13), DARK)
        pen.area(eye + 0.035 - 0.05j + 0.042 * CIRCLE, WHITE)
        pen.area(plan["face"] + 0.34 * side + 0.16j + oval(0.08, 0.05), tint(fur, -20))  # cheek
    pen.line(plan["face"] + 0.1j + 0.1 * np.exp(1j * np.linspace(0.15, np.pi - 0.15, 9)), 0.045, DARK)  # smile
    for (kind, colour), z in zip(plan["marks"], plan["places"]):
        rgb = tint(COLOURS[colour], light + rng.normal(0, 5, 3))
        along = plan["size"] * np.exp(1j * rng.normal(0, 0.25))
        points += pen.part(kind, rgb, z + complex(*rng.normal(0, 0.03, 2)), along, 0, tint(rgb, -46), 1.6).values()
    drawn = np.concatenate(pen.extent)
    box = drawn.real.min() - 2, drawn.imag.min() - 2, drawn.real.max() + 2, drawn.imag.max() + 2
    return pen.picture(), points, np.clip(box, 0, size)


def write_texts(rng, plan):
    """-> [{"name", "description"}, ...] of a category's keypoints, in the order in which draw_photo() gives them."""
    texts, count = [], {}
    for kind, colour in plan["limbs"] + plan["marks"]:
        part = kind if kind in LIMBS else "mark"
        nth = ORDINALS[count.setdefault(part, 0)]
        count[part] += 1
        for keypoint in LIMBS.get(kind, ("centre",)):
            name = f"{nth} {part} {keypoint}" if kind in LIMBS else f"{nth} mark"
            texts.append({"name": name, "description": str(rng.choice(SAYINGS[keypoint])).format(c=colour, k=kind)})
    return texts


def draw_category(root, seed, id, subset, n_photos):
    """Draws n_photos of a new category -> its entries for the annotation file."""
    rng = np.random.default_rng((seed, id))
    plan = plan_category(rng, subset)
    texts = write_texts(rng, plan)
    name = "".join(rng.choice([*"bdfgklmnprtvz"]) + rng.choice([*"aeiou"]) for _ in range(3))
    folder = f"{id:03d}_{name}"
    (root / "images" / folder).mkdir(parents=True)
    images, annotations = [], []
    for n in range(n_photos):
        picture, points, (x1, y1, x2, y2) = draw_photo(rng, plan)
        number, file = id * 10**14 + n, f"{folder}/{n:03d}.jpg"
        picture.save(root / "images" / file, quality=92)
        images.append({"id": number, "file_name": file, "width": picture.width, "height": picture.height})
        annotations.append({
            "id": number, "image_id": number, "category_id": id, "bbox": np.round([x1, y1, x2 - x1, y2 - y1], 2).tolist(),
            "area": round((x2 - x1) * (y2 - y1), 2), "iscrowd": 0, "num_keypoints": len(points),
            "keypoints": [v for z in points for v in (round(z.real, 2), round(z.imag, 2), 2)]})
    category = {"id": id, "name": name, "supercategory": "toy", "keypoints": [t["name"] for t in texts], "skeleton": []}
    return subset, images, annotations, category, texts


def draw_toy(out, seed):
    """Writes OUT/data in MP-100's files and folders, and OUT/descriptions.json."""
    root = out / "data"
    shutil.rmtree(root, ignore_errors=True)
    subsets = [(subset, n_photos) for subset, (n, n_photos) in SUBSETS.items() for _ in range(n)]
    with Pool(os.cpu_count()) as pool:
        drawn = pool.starmap(draw_category, [(root, seed, id, *s) for id, s in enumerate(subsets, 1)], chunksize=5)
    (root / "annotations").mkdir()
    for subset in SUBSETS:
        _, images, annotations, categories, _ = zip(*(d for d in drawn if d[0] == subset))
        contents = {"images": sum(images, []), "annotations": sum(annotations, []), "categories": categories}
        (root / f"annotations/mp100_split1_{subset}.json").write_text(json.dumps(contents))
    write_descriptions(out / "descriptions.json", {c["id"]: (c["name"], texts) for *_, c, texts in drawn})


def write_descriptions(path, categories):
    path.write_text(json.dumps({
        "keypoint_sets": {f"{id:03d}_{name}": texts for id, (name, texts) in categories.items()},
        "categories": {str(id): {"name": name, "keypoint_set": f"{id:03d}_{name}"} for id, (name, _) in categories.items()}}, indent=1))


# ------------------------------------------------------------------------------------------------- pre-training the backbones

GLUE = ["<unk>", "<s>", "</s>", "\n", "User: where is the", "User: point at the", "User: what is at", "?\nReference:", "\nAssistant:",
        "?\nAssistant:", " [0.", ",0.", "]", ",", *"0123456789"]  # long tokens, as real vocabularies have, make short sequences
ROUNDS, SHEETS, BATCH, STEPS, LOOK = 5, 20000, 32, 4000, 1200  # LOOK of the STEPS train the ViT alone
DIGITS = [0.1, 1, 0.3, 0.1, 0.1, 1, 0.3, 0.1, 0.1, 0.1]  # what the tokens of " [0.123,0.456]</s>" count: the first digits most


def make_tokenizer():
    """Words with the space before them, digits one by one, and GLUE; words it does not know become <unk>."""
    text = " ".join([*COLOURS, *LIMBS, *MARKS, *ORDINALS, "mark of a in its", *sum([*WORDS.values(), *SAYINGS.values()], ())])
    words = sorted({word for word in text.replace(",", "").split() if "{" not in word})
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(GLUE + [f" {w}" for w in words])}, unk_token="<unk>"))
    glue = "|".join("".join(f"\\{c}" if c in "?[].," else c for c in token) for token in sorted(GLUE[3:], key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(glue + r"| ?[^\s\d,?\]]+|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def turn_sheet(sheet, mirrored, quarters):
    """A square sheet can be laid in eight ways."""
    (picture, points), centre = sheet, 0.5 + 0.5j
    picture = np.rot90(picture[::-1] if mirrored else picture, -quarters)
    return picture, [(*what, centre + 1j**quarters * ((z - centre).conjugate() if mirrored else z - centre)) for *what, z in points]


def converse(rng, points, encode):
    """Questions about a sheet and their answers -> tokens, and what each counts in the loss."""
    tokens, weights = [1, *encode("\n")], [0, 0]
    asked = [point for point in points if point[2]]
    for kind, colour, keypoint, z in (asked[i] for i in np.resize(rng.permutation(len(asked)), ROUNDS)):
        place = " [0.{:03d},0.{:03d}]".format(*(min(max(round(1000 * v), 0), 999) for v in (z.real, z.imag)))
        if rng.random() < 0.75:
            question, answer = encode(f"User: point at the {phrase(rng, kind, colour, keypoint)}\nAssistant:"), encode(place)
            weights += [0] * len(question) + DIGITS
        else:
            question = encode(f"User: what is at{place}?\nAssistant:")
            answer = encode(f" {colour} {kind}" + f" {keypoint}" * (keypoint != "centre"))
            weights += [0] * len(question) + [1] * len(answer) + [0.1]
        tokens += question + answer + [2]
    return tokens, weights


def make_batch(rng, sheets, encode):
    """-> images, tokens, weights, and what is to be seen: rows of (patch of the batch, word it shows)."""
    pictures, seen = [], []
    tokens, weights = torch.zeros(len(sheets), 2 + 19 * ROUNDS, dtype=torch.long), torch.zeros(len(sheets), 2 + 19 * ROUNDS)
    for b, sheet in enumerate(sheets):
        picture, points = turn_sheet(sheet, *divmod(rng.integers(8), 4))
        ids, counts = converse(rng, points, encode)
        tokens[b, :len(ids)], weights[b, :len(ids)] = torch.tensor(ids), torch.tensor(counts)
        pictures.append(torch.from_numpy(picture.copy()))
        for *words, z in points:
            patch = 64 * b + 8 * min(int(8 * z.imag), 7) + min(int(8 * z.real), 7)
            seen += [(patch, *encode(f" {word}")) for word in words if word not in ("", "centre")]
    return normalize(torch.stack(pictures).permute(0, 3, 1, 2)), tokens, weights, torch.tensor(seen)


def new_backbones(vocabulary):
    D = 128
    llm = LlamaConfig(vocab_size=vocabulary, hidden_size=D, intermediate_size=344, num_hidden_layers=3, num_attention_heads=4,
                      num_key_value_heads=2, head_dim=32, rope={"rope_theta": 10000.0, "rope_type": "default"})
    model = nn.ModuleDict({
        "vit": ViT(ViTConfig(hidden_size=D, num_hidden_layers=3, num_attention_heads=4, image_size=SIZE)), "llm": Llama(llm),
        "projection": nn.Linear(D, D)})
    nn.init.normal_(model["llm"].embed_tokens.weight, std=0.5)
    with torch.no_grad():  # positions start as sines and cosines of column and row
        row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        waves = torch.stack((column, row)).flatten(1)[..., None] * 10 ** -(torch.arange(D // 4) / (D // 4))  # (2, 64, D/4)
        model["vit"].pos_embed[0, 1:] = torch.cat((waves.sin(), waves.cos()), -1).transpose(0, 1).flatten(1)
    return model


@sdpa_kernel(SDPBackend.MATH)  # on CPUs the way back through the fused kernel is slow in 16 bits
def pretrain():
    """ViT, projection and Llama learn from sheets alone, in 16 bits with Muon; the projection is then thrown away."""
    torch.manual_seed(0)
    with Pool(os.cpu_count()) as pool:
        sheets = list(tqdm(pool.imap(draw_sheet, [(7, i) for i in range(SHEETS)], chunksize=100), "drawing", SHEETS))
    tokenizer = make_tokenizer()
    before_digits = torch.tensor(tokenizer.encode(" [0.,0.").ids)
    model = new_backbones(tokenizer.get_vocab_size())
    see, read, llm = model["vit"], model["projection"], model["llm"]
    master = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}  # fp32
    matrices = {name: p for name, p in master.items() if p.ndim == 2 and ("blocks" in name or "layers" in name)}
    optimizers = [torch.optim.Muon(matrices.values(), weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW([p for name, p in master.items() if name not in matrices], betas=(0.9, 0.99), weight_decay=0.05)]
    model.bfloat16()

    order, right, bar = [], [], tqdm(range(STEPS), "pre-training")
    for step in bar:
        if len(order) < BATCH:
            order = np.random.default_rng((2, step)).permutation(SHEETS).tolist()
        batch = [sheets[order.pop()] for _ in range(BATCH)]
        images, tokens, weights, seen = make_batch(np.random.default_rng((1, step)), batch, lambda text: tokenizer.encode(text).ids)
        image, text = read(see(images.bfloat16())), llm.embed_tokens(tokens)
        # First to see: a patch is to look, to the LLM, like the words for what it shows. This ties words to patches, which takes
        # long by way of questions alone. Then to talk as well.
        patches, words = seen.T
        look = loss = F.cross_entropy((image.flatten(0, 1)[patches] @ llm.embed_tokens.weight.T).float(), words)
        if step >= LOOK:
            hidden, _ = llm(torch.cat((text[:, :1], image, text[:, 1:]), dim=1))
            learned = weights[:, 1:] > 0
            logits, answers = llm.lm_head(hidden[:, 64:-1][learned]).float(), tokens[:, 1:][learned]
            losses = F.cross_entropy(logits, answers, reduction="none")
            loss = (losses * weights[:, 1:][learned]).sum() / weights.sum() + 0.5 * look
            right.append((logits.argmax(-1) == answers)[torch.isin(tokens[:, :-1][learned], before_digits)].float().mean().item())
        loss.backward()

        for name, p in model.named_parameters():
            master[name].grad, p.grad = None if p.grad is None else p.grad.float(), None
        nn.utils.clip_grad_norm_(master.values(), 1)
        left, since = 1 - step / STEPS, step - LOOK * (step >= LOOK)  # warm-up for both, flat, a cosine for the last 40 %
        rate = min(1, (since + 1) / 100) * (1 if left > 0.4 else 0.03 + 0.97 * 0.5 * (1 - math.cos(math.pi * left / 0.4)))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 2e-3 * rate
            optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(master[name])
        if step % 100 == 99:
            bar.write(f"step {step + 1}  look {look:.3f}  loss {loss:.3f}  first digits {np.mean(right[-100:] or 0):.1%} right")
    save_backbones(master, see.config, llm.config, tokenizer)


HUB_NAMES = [(".norm.", ".layernorm."), (".patch_embed.", ".embeddings.patch_embeddings.projection."), (".blocks.", ".encoder.layer."),
             (".pos_embed", ".embeddings.position_embeddings"), (".cls_token", ".embeddings.cls_token"),
             (".attn.q.", ".attention.attention.query."), (".attn.k.", ".attention.attention.key."),
             (".attn.v.", ".attention.attention.value."), (".attn.proj.", ".attention.output.dense."),
             (".ls1.gamma", ".layer_scale1.lambda1"), (".ls2.gamma", ".layer_scale2.lambda1")]


def save_backbones(weights, vit, llm, tokenizer):
    """Writes assets/toy/vit and assets/toy/llm as the hub keeps facebook/dinov2-* and meta-llama/*, in fp16."""
    files = {"vit": {"embeddings.mask_token": torch.zeros(1, vit.hidden_size)}, "llm": {}}
    for name, tensor in weights.items():
        network, name = name.split(".", 1)
        if network == "vit":
            name = f".{name}"
            for ours, theirs in HUB_NAMES:
                name = name.replace(ours, theirs)
            files["vit"][name[1:]] = tensor
        elif network == "llm":
            files["llm"][name if name.startswith("lm_head") else f"model.{name}"] = tensor
    configs = {
        "vit": {"architectures": ["Dinov2Model"], "model_type": "dinov2", **vars(vit), "hidden_act": "gelu", "num_channels": 3,
                "qkv_bias": True, "layerscale_value": 1.0, "torch_dtype": "float16"},
        "llm": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **vars(llm), **llm.rope, "hidden_act": "silu",
                "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048, "torch_dtype": "float16"}}
    for network, tensors in files.items():
        folder = ASSETS / network
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: t.detach().half().contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        config = {k: v for k, v in configs[network].items() if k not in ("rope", "rope_type", "num_register_tokens")}
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer.save(str(ASSETS / "llm/tokenizer.json"))


# ------------------------------------------------------------------------------------------------------------------ the toy run

RECIPE = ["--epochs", "2", "--batch", "16", "--micro-batch", "16", "--lr", "5e-3", "--workers", "1", "--log-every", "50"]


def other_texts(out, seed):
    """Writes OUT/other_text/descriptions.json, where keypoint k has the text of another: others[k]. -> {category: others}."""
    rng, texts, others = np.random.default_rng(seed), read_descriptions(out / "descriptions.json"), {}
    for id, category in texts.items():
        circle = rng.permutation(len(category.keypoints))
        others[id] = np.empty_like(circle)
        others[id][circle] = np.roll(circle, 1)
    (out / "other_text").mkdir(exist_ok=True)
    write_descriptions(out / "other_text/descriptions.json", {id: (c.name, [
        {"name": c.keypoints[k][0], "description": c.keypoints[k][1]} for k in others[id]]) for id, c in texts.items()})
    return others


def mean_places(objects, categories):
    """Where the keypoints of a name are on average, e.g. all leg feet, as fractions of the crop: {name less its ordinal: (x, y)}."""
    places = {}
    for o in objects:
        for (name, _), point in zip(categories[o.category].keypoints, crop_of(o).from_photo(o.keypoints)):
            places.setdefault(name.split(" ", 1)[1], []).append(point)
    return {name: np.mean(points, axis=0) for name, points in places.items()}


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pretrain", action="store_true", help="make the backbones of assets/toy instead")
    parser.add_argument("--seed", type=train.natural, default=0, help="another seed draws another toy MP-100 and trains on it")
    parser.add_argument("--out", type=Path, default=Path("runs/toy"))
    args = parser.parse_args(argv)
    if args.pretrain:
        return pretrain()
    out, began, took = args.out, time.perf_counter(), []

    def lap():
        took.append(time.perf_counter() - began - sum(took))

    draw_toy(out, args.seed)
    lap()
    (out / "ckpt.pt").unlink(missing_ok=True)
    files = ["--data", f"{out}/data", "--descriptions", f"{out}/descriptions.json", "--out", str(out)]
    train.main([*files, "--vit", f"{ASSETS}/vit", "--llm", f"{ASSETS}/llm", "--image-size", str(SIZE), "--seed", str(args.seed), *RECIPE])
    lap()
    # The digits come one by one here, so the likeliest first digit, then the likeliest second ... is a poor guess of the place.
    test = [f"{out}/ckpt.pt", "--batch", "25"]
    evaluate.main([*test, "--decode", "median"])
    others = other_texts(out, args.seed)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluate.main([*test, "--out", f"{out}/greedy"])
        evaluate.main([*test, "--decode", "median", "--out", f"{out}/other_text",
                       "--descriptions", f"{out}/other_text/descriptions.json"])
    lap()

    categories = read_descriptions(out / "descriptions.json")
    objects = {s: read_objects(out / f"data/annotations/mp100_split1_{s}.json", categories) for s in ("train", "test")}
    unseen, means = objects["test"], mean_places(objects["train"], categories)
    rows = {
        "CapeLLM": evaluate.read_predictions(out / "predictions.json", unseen, False),
        "CapeLLM, greedy decoding instead of the median": evaluate.read_predictions(out / "greedy/predictions.json", unseen, False),
        "CapeLLM, asked with another keypoint's text": evaluate.read_predictions(out / "other_text/predictions.json", unseen, False),
        "that other keypoint itself": [o.keypoints[others[o.category]].tolist() for o in unseen],
        "mean place of keypoints of that name": [
            [crop_of(o).to_photo(means[name.split(" ", 1)[1]]).tolist() for name, _ in categories[o.category].keypoints] for o in unseen]}
    print(f"\n{'toy categories never seen, % of keypoints found':50}{'PCK@0.05':>10}{'PCK@0.1':>10}{'PCK@0.2':>10}{'mPCK':>10}")
    for name, predictions in rows.items():
        pck = 100 * evaluate.pck_of_queries(unseen, predictions).mean(0)
        print(f"{name:50}{pck[0]:10.1f}{pck[1]:10.1f}{pck[3]:10.1f}{pck.mean():10.1f}")
    print("\ndrawing {:.0f} s, training {:.0f} s, evaluation {:.0f} s".format(*took))
    print(f"the picture: {out / 'predictions.png'}")


if __name__ == "__main__":
    train.run(main)
