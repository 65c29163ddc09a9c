"""The toy MP-100: drawn creatures, in MP-100's files and folders.

Each category has a body, limbs and marks of its own, ambiguous names ("second leg foot") and descriptions
that settle them ("the far end of the leg that is blue"). Parts, colours and Pen are shared with sheets.py.
"""

import json
import math
import os
import shutil
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common import make_folder
from data import Instance

# -------------------------------------------------------------------------------------- parts and colours

COLOURS = {"red": (222, 62, 58), "orange": (245, 146, 40), "yellow": (252, 218, 66), "green": (66, 168, 82),
           "blue": (58, 112, 214), "purple": (142, 78, 186), "pink": (248, 146, 196), "black": (52, 48, 60)}
LIMBS = {  # and their keypoints
    "leg": ("foot", "knee"), "horn": ("tip",), "antenna": ("ball",), "wing": ("edge",), "tail": ("end",)}
MARKS = ("spot", "square", "star", "ring", "cross", "heart")
PAIRS = [(kind, colour) for kind in (*LIMBS, *MARKS) for colour in COLOURS]
# Nearly one pair in five is kept for test categories. Who finds a purple leg has never seen one, in neither
# world.
UNSEEN = [PAIRS[i] for i in np.random.default_rng(0).permutation(len(PAIRS))[:16]]

TURN = np.linspace(0, 2 * np.pi, 32, endpoint=False)
CIRCLE = np.exp(1j * TURN)
DARK, WHITE = (46, 40, 52), (255, 255, 255)


def oval(width, height):
    return width * CIRCLE.real + 1j * height * CIRCLE.imag


def tint(colour, by):
    return tuple(int(c) for c in np.clip(np.array(colour) + by, 0, 255))


def limb_shape(kind, bend):
    """A limb grows from 0 to about 1 and bends sideways by `bend`. Returns what shape() does."""
    side = 1 if bend > 0 else -1
    if kind == "leg":
        knee, foot = 0.5 + 0.5j * bend, 1 + 0.1j * bend
        return [("line", [0, knee, foot], 0.24), ("area", knee + 0.17 * CIRCLE),
                ("area", foot + 0.12j * side + oval(0.15, 0.27))], {"foot": foot, "knee": knee}
    if kind == "horn":
        s = np.linspace(0, 1, 9)
        middle, half = s + 0.4j * bend * s**2, 0.28j * (1 - s) ** 0.8
        outline = np.concatenate([middle + half, (middle - half)[::-1]])
        return [("area", outline)], {"tip": 1 + 0.4j * bend}
    if kind == "antenna":
        s, ball = np.linspace(0, 1, 8), 0.9 + 0.5j * bend
        return [("line", 0.9 * s + 0.5j * bend * s**2, 0.12), ("area", ball + 0.23 * CIRCLE)], {"ball": ball}
    if kind == "wing":
        u = (1 - CIRCLE.real) / 2
        return [("area", u + 0.36j * CIRCLE.imag * (0.5 + u) + 0.25j * bend * u**2),
                ("vein", [0.25 + 0.02j * bend, 0.75 + 0.14j * bend], 0.05)], {"edge": 0.94 + 0.22j * bend}
    s = np.linspace(0, 1, 14)  # a tail
    return [("line", 0.8 * s + 0.17j * side * np.sin(2 * np.pi * s), 0.17),
            ("area", np.array([0.7 + 0.25j, 1.1, 0.7 - 0.25j]))], {"end": 0.95}


def mark_outline(kind):
    """A mark is centred on 0, with a radius of about 1."""
    if kind == "spot":
        return 0.9 * CIRCLE
    if kind == "square":
        return 0.82 * np.array([1 + 1j, -1 + 1j, -1 - 1j, 1 - 1j])
    if kind == "star":
        corner = np.arange(10)
        return np.where(corner % 2, 0.5, 1.2) * np.exp(2j * np.pi * (corner - 2.5) / 10)
    if kind == "cross":
        arm = np.array([0.34 - 0.34j, 1.05 - 0.34j, 1.05 + 0.34j])
        return np.concatenate([1j**k * arm for k in range(4)])
    x = 16 * np.sin(TURN) ** 3  # a heart
    y = 13 * np.cos(TURN) - 5 * np.cos(2 * TURN) - 2 * np.cos(3 * TURN) - np.cos(4 * TURN)
    return (x - 1j * (y + 2)) / 14.5


def shape(kind, bend):
    """A part in its own frame -> what to draw, and its keypoints by name.

    To draw are strokes ("line", points, width) or ("vein", points, width), and areas ("area", outline).
    """
    if kind in LIMBS:
        return limb_shape(kind, bend)
    if kind == "ring":
        return [("line", 0.78 * np.append(CIRCLE, 1), 0.42)], {"centre": 0}
    return [("area", mark_outline(kind))], {"centre": 0}


class Pen:
    """Draws on a picture that is `fine` times larger than it will be, for smooth edges."""

    def __init__(self, size, paper, fine=2):
        self.fine = fine
        self.image = Image.new("RGB", (size * fine, size * fine), paper)
        self.draw = ImageDraw.Draw(self.image)
        self.place(0, 1)

    def place(self, origin, scale, mirrored=False):
        """From here on 0 is drawn at `origin`, and 1 at `origin` + `scale`. `extent` keeps what is drawn."""
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
        """Draws a part with 0 at `at` and 1 at `at` + `along` -> its keypoints in pixels, {name: point}.

        width: of the rim, in pixels.
        """
        pieces, keypoints = shape(kind, bend)
        for what, z, *w in pieces:
            if what == "line" and rim:  # rims of strokes lie below all else, so that joints stay clean
                self.line(at + along * np.asarray(z), w[0] * abs(along) + 2 * width / abs(self.scale), rim)
        for what, z, *w in pieces:
            z = at + along * np.asarray(z)
            if what == "area":
                self.area(z, colour, rim, width)
            else:
                self.line(z, w[0] * abs(along), colour if what == "line" else rim or tint(colour, 40))
        return {name: self.pixels(at + along * z)[0] for name, z in keypoints.items()}

    def picture(self):
        return self.image.reduce(self.fine)


# ---------------------------------------------------------------------------------------------- categories

BODIES = [(236, 208, 172), (178, 206, 222), (188, 214, 176), (206, 190, 226), (240, 196, 176),
          (222, 220, 210), (150, 166, 188), (184, 158, 138)]
FORMS = ["egg", "box", "bean", "cloud", "gem", "drop"]
HOME = {  # where on the body limbs like to grow
    "leg": (np.pi / 2,), "horn": (-np.pi / 2,), "antenna": (-np.pi / 2,), "wing": (0, np.pi),
    "tail": (0, np.pi)}
ORDINALS = ("first", "second", "third", "fourth")
SAYINGS = {
    "foot": ("the foot of the {c} leg", "the far end of the leg that is {c}",
             "where the {c} leg meets the ground"),
    "knee": ("the bend in the middle of the {c} leg", "halfway down the leg that is {c}",
             "the knee of the {c} leg"),
    "tip": ("the sharp end of the {c} horn", "the tip of the horn that is {c}"),
    "ball": ("the ball at the end of the {c} antenna", "the knob on the antenna that is {c}"),
    "edge": ("the outer end of the {c} wing", "the edge of the wing that is {c}, away from the body"),
    "end": ("the arrow at the end of the {c} tail", "the very end of the tail that is {c}"),
    "centre": ("the {k} that is {c}", "the {c} {k} painted on the body", "the middle of the {c} {k}")}


def choose_parts(rng, subset):
    """-> limbs and marks, (kind, colour) each. A kind alone, or a colour alone, often fits several."""
    while True:
        colours = rng.permutation(list(COLOURS))[:4]

        def choose(kinds, counts):
            return [(str(kind), str(colour)) for kind, n in zip(rng.permutation(kinds), counts)
                    for colour in rng.permutation(colours)[:n]]

        limbs = choose(list(LIMBS), [(2, 1), (2, 2), (3, 1)][rng.integers(3)])
        marks = choose(MARKS, [(1, 1), (2, 1)][rng.integers(2)])
        unseen = sum(pair in UNSEEN for pair in limbs + marks)
        if unseen >= 2 if subset == "test" else unseen == 0:
            return limbs, marks


def choose_places(rng, marks):
    """-> the middle of the face, and of each mark; apart from each other, and on the body."""
    while True:
        face = complex(rng.uniform(-0.3, 0.3), rng.uniform(-0.45, -0.2))
        places = [complex(*rng.uniform(-0.68, 0.68, 2)) for _ in marks]
        beside_face = all(abs((z - face).real) > 0.6 or abs((z - face).imag) > 0.44 for z in places)
        apart = all(abs(z - w) > 0.62 for i, z in enumerate(places) for w in places[:i])
        if beside_face and apart and all(abs(z) < 0.68 for z in places):
            return face, places


def plan_category(rng, subset):
    """What all creatures of a category have in common."""
    limbs, marks = choose_parts(rng, subset)
    while True:  # limbs all around the body, most near their home, never close together
        angles = [rng.choice(HOME[kind]) + rng.normal(0, 0.9) for kind, _ in limbs]
        if all(math.cos(a - b) < 0.73 for i, a in enumerate(angles) for b in angles[:i]):
            break
    face, places = choose_places(rng, marks)
    return dict(limbs=limbs, marks=marks, angles=angles, face=face, places=places,
                aspect=rng.uniform(0.86, 1.16), form=rng.choice(FORMS),
                fur=BODIES[rng.integers(len(BODIES))], lengths=rng.uniform(0.8, 1.1, len(limbs)),
                size=rng.uniform(0.28, 0.32))


def write_texts(rng, plan):
    """-> (name, description) of a category's keypoints, in the order in which draw_photo() gives them."""
    texts, count = [], {}
    for kind, colour in plan["limbs"] + plan["marks"]:
        part = kind if kind in LIMBS else "mark"
        nth = ORDINALS[count.setdefault(part, 0)]
        count[part] += 1
        for keypoint in LIMBS.get(kind, ("centre",)):
            name = f"{nth} {part} {keypoint}" if kind in LIMBS else f"{nth} mark"
            texts.append((name, str(rng.choice(SAYINGS[keypoint])).format(c=colour, k=kind)))
    return texts


# -------------------------------------------------------------------------------------------------- photos

SKIES = [(226, 240, 250), (252, 240, 224), (232, 244, 230), (240, 232, 248), (214, 228, 238),
         (250, 234, 232), (236, 236, 226)]


def body_outline(form, aspect):
    c, s = CIRCLE.real, CIRCLE.imag
    if form == "egg":
        z = c * (1 - 0.12 * s) + 1j * s
    elif form == "box":
        z = 0.92 * (np.sign(c) * abs(c) ** 0.5 + 1j * np.sign(s) * abs(s) ** 0.5)
    elif form == "bean":
        z = CIRCLE + 0.13 * CIRCLE**2
    elif form == "cloud":
        z = CIRCLE * (0.94 + 0.09 * abs(np.sin(3.5 * TURN)))
    elif form == "gem":
        z = 1.06 * np.exp(2j * np.pi * (np.arange(6) + 0.5) / 6)
    else:  # a drop
        z = CIRCLE * (1 + 0.22 * np.clip(-s, 0, 1) ** 3)
    return z.real * aspect + 1j * z.imag / aspect


def draw_background(rng, pen, size, sky):
    for _ in range(rng.integers(3)):  # hills
        x = np.linspace(0, size, 24)
        height = size * rng.uniform(0.55, 0.95)
        hill = x + 1j * (height + 8 * np.sin(x / rng.uniform(14, 42) + rng.uniform(0, 6)))
        pen.area(np.concatenate([hill, [size * (1 + 1j), size * 1j]]), tint(sky, -rng.integers(8, 22)))
    for _ in range(rng.integers(2, 8)):  # bubbles
        bubble = complex(*rng.uniform(0, size, 2)) + rng.uniform(2, 13) * CIRCLE
        pen.area(bubble, tint(sky, rng.integers(-16, 14)))


def pose_limbs(rng, plan, outline, light):
    """-> (kind, colour, root, vector from there to the end, bend) of each limb."""
    limbs = []
    for (kind, colour), angle, length in zip(plan["limbs"], plan["angles"], plan["lengths"]):
        out = np.exp(1j * (angle + rng.normal(0, 0.15)))
        root = 0.86 * out * abs(outline[np.argmin(abs(np.angle(outline / out)))])  # just inside the body
        along = out * length * rng.uniform(0.9, 1.1) * np.exp(1j * rng.normal(0, 0.15))
        rgb = tint(COLOURS[colour], light + rng.normal(0, 5, 3))
        limbs.append((kind, rgb, root, along, rng.choice([-1, 1]) * rng.uniform(0.15, 0.5)))
    return limbs


def draw_face(pen, face, fur):
    for side in (-1, 1):
        eye = face + 0.2 * side
        pen.area(eye + oval(0.1, 0.13), DARK)
        pen.area(eye + 0.035 - 0.05j + 0.042 * CIRCLE, WHITE)
        pen.area(face + 0.34 * side + 0.16j + oval(0.08, 0.05), tint(fur, -20))  # cheek
    smile = 0.1j + 0.1 * np.exp(1j * np.linspace(0.15, np.pi - 0.15, 9))
    pen.line(face + smile, 0.045, DARK)


def draw_photo(rng, plan):
    """A creature in a new pose, turn, size, light and place -> picture, keypoints, box (x1, y1, x2, y2)."""
    size = int(rng.integers(212, 257))
    sky = tint(SKIES[rng.integers(len(SKIES))], -rng.integers(0, 14))
    pen = Pen(size, sky)
    draw_background(rng, pen, size, sky)

    light = rng.normal(0, 6, 3)
    outline = body_outline(plan["form"], plan["aspect"] * rng.uniform(0.95, 1.05))
    limbs, points = pose_limbs(rng, plan, outline, light), []
    reach = max(1.1, *(abs(root + along) for _, _, root, along, _ in limbs))
    turn = np.exp(1j * rng.uniform(-0.8, 0.8))
    middle = size / 2 * (1 + 1j) + complex(*rng.uniform(-12, 12, 2))
    pen.place(middle, rng.uniform(80, 96) / reach * turn, mirrored=rng.random() < 0.5)
    for kind, rgb, root, along, bend in limbs:
        points += pen.part(kind, rgb, root, along, bend, tint(rgb, -46), 2).values()
    fur = tint(plan["fur"], light + rng.normal(0, 5, 3))
    pen.area(outline, fur, tint(fur, -52), 2.6)
    pen.area(0.84 * outline + 0.05 - 0.06j, tint(fur, 9))
    draw_face(pen, plan["face"], fur)
    for (kind, colour), z in zip(plan["marks"], plan["places"]):
        rgb = tint(COLOURS[colour], light + rng.normal(0, 5, 3))
        along = plan["size"] * np.exp(1j * rng.normal(0, 0.25))
        at = z + complex(*rng.normal(0, 0.03, 2))
        points += pen.part(kind, rgb, at, along, 0, tint(rgb, -46), 1.6).values()
    drawn = np.concatenate(pen.extent)
    box = drawn.real.min() - 2, drawn.imag.min() - 2, drawn.real.max() + 2, drawn.imag.max() + 2
    return pen.picture(), points, np.clip(box, 0, size)


def draw_example(seed, path):
    """Draws a creature of a test category -> path, Instance, (name, description) of its keypoints."""
    rng = np.random.default_rng(seed)
    plan = plan_category(rng, "test")
    texts = write_texts(rng, plan)
    picture, points, (x1, y1, x2, y2) = draw_photo(rng, plan)
    picture.save(path)
    xy = np.array([(z.real, z.imag) for z in points])
    box = tuple(float(v) for v in (x1, y1, x2 - x1, y2 - y1))
    return path, Instance(seed, 0, Path(path).name, box, xy, np.ones(len(xy), dtype=bool)), texts


# ------------------------------------------------------------------------------------------------ the files

# (categories, photos of each); MP-100 has 70, 10 and 20 categories, too
SUBSETS = {"train": (70, 30), "val": (10, 10), "test": (20, 25)}


def draw_category(root, seed, number, subset, n_photos):
    """Draws n_photos of a new category -> its entries for the annotation file, and its texts."""
    rng = np.random.default_rng((seed, number))
    plan = plan_category(rng, subset)
    texts = write_texts(rng, plan)
    name = "".join(rng.choice([*"bdfgklmnprtvz"]) + rng.choice([*"aeiou"]) for _ in range(3))
    folder = f"{number:03d}_{name}"
    (root / "images" / folder).mkdir(parents=True)
    images, annotations = [], []
    for n in range(n_photos):
        picture, points, (x1, y1, x2, y2) = draw_photo(rng, plan)
        photo_id, file = number * 10**14 + n, f"{folder}/{n:03d}.jpg"  # as long as MP-100's
        picture.save(root / "images" / file, quality=92)
        images.append(
            {"id": photo_id, "file_name": file, "width": picture.width, "height": picture.height})
        annotations.append({
            "id": photo_id, "image_id": photo_id, "category_id": number,
            "bbox": np.round([x1, y1, x2 - x1, y2 - y1], 2).tolist(),
            "area": round((x2 - x1) * (y2 - y1), 2), "iscrowd": 0, "num_keypoints": len(points),
            "keypoints": [v for z in points for v in (round(z.real, 2), round(z.imag, 2), 2)]})
    keypoints = [keypoint for keypoint, _ in texts]
    category = {"id": number, "name": name, "supercategory": "toy", "keypoints": keypoints, "skeleton": []}
    return subset, images, annotations, category, texts


def draw_toy(out, seed, subsets=SUBSETS):
    """Writes OUT/data in MP-100's files and folders, and OUT/descriptions.json."""
    root = out / "data"
    shutil.rmtree(root, ignore_errors=True)
    make_folder(root)
    (root / "toy").touch()  # marks the folder as one that may be replaced
    kinds = [(subset, n_photos) for subset, (n, n_photos) in subsets.items() for _ in range(n)]
    with Pool(os.cpu_count()) as pool:
        jobs = [(root, seed, number, *kind) for number, kind in enumerate(kinds, 1)]
        drawn = pool.starmap(draw_category, jobs, chunksize=5)
    (root / "annotations").mkdir()
    for subset in subsets:
        _, images, annotations, categories, _ = zip(*(d for d in drawn if d[0] == subset))
        contents = {"images": sum(images, []), "annotations": sum(annotations, []), "categories": categories}
        (root / f"annotations/mp100_split1_{subset}.json").write_text(json.dumps(contents))
    write_descriptions(out / "descriptions.json",
                       {category["id"]: (category["name"], texts) for *_, category, texts in drawn})


def write_descriptions(path, categories):
    """categories: {category id: (name, (name, description) of its keypoints)}."""
    sets, entries = {}, {}
    for number, (name, texts) in categories.items():
        set_name = f"{number:03d}_{name}"
        sets[set_name] = [{"name": keypoint, "description": description} for keypoint, description in texts]
        entries[str(number)] = {"name": name, "keypoint_set": set_name}
    path.write_text(json.dumps({"keypoint_sets": sets, "categories": entries}, indent=1))
