"""Seven drawn teapots for README's walk through own data: six to train on, labelled as COCO, and a seventh.

    python -m toyworld.teapots FOLDER

The texts use the few words that the toy's LLM has learned.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common import Parser, make_folder, run, write_json
from toyworld.creatures import COLOURS

TEXTS = {"spout": "the far end of the horn that is green", "lid knob": "the red spot on the tip of the body",
         "handle": "the outer edge of the wing that is yellow", "belly": "the blue spot on the body"}
SIZE = 240


def draw_teapot(rng):
    """-> a picture and the places of the keypoints, in the order of TEXTS."""
    unit, turn = rng.uniform(38, 52), math.radians(rng.uniform(-20, 20))
    side, centre = rng.choice([-1, 1]), rng.uniform(100, 140, 2)
    paper = tuple(rng.integers(200, 240, 3).tolist())
    picture = Image.new("RGB", (2 * SIZE, 2 * SIZE), paper)  # drawn twice as large, for smooth edges
    pen = ImageDraw.Draw(picture)

    def place(x, y):  # of the upright pot, whose body is 1 wide -> pixels
        x, y = side * x, y
        turned = np.array([x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)])
        return tuple((centre + unit * turned).tolist())

    def area(points, colour):
        pen.polygon([tuple(2 * v for v in place(x, y)) for x, y in points], COLOURS[colour], (46, 40, 52))

    def disc(x, y, rx, ry, colour):
        angles = np.linspace(0, 2 * np.pi, 40)
        area(list(zip(x + rx * np.cos(angles), y + ry * np.sin(angles))), colour)

    disc(-1.1, 0, 0.5, 0.55, "yellow")
    area([(0.5, 0.4), (1.0, 0.1), (1.45, -0.6), (1.6, -0.5), (1.2, 0.4), (0.6, 0.8)], "green")
    disc(0, 0.1, 1, 0.8, "pink")
    disc(0, -0.9, 0.2, 0.2, "red")
    disc(0, 0.15, 0.22, 0.22, "blue")
    places = [place(1.52, -0.55), place(0, -0.9), place(-1.6, 0), place(0, 0.15)]
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS), places


def main(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default="teapots", help="where they go")
    folder, rng = parser.parse_args(argv).folder, np.random.default_rng(0)
    make_folder(folder)
    names = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh"]
    images, annotations = [], []
    for number, name in enumerate(names, 1):
        picture, places = draw_teapot(rng)
        picture.save(folder / f"{name}.jpg", quality=95)
        if name != "seventh":
            images.append({"id": number, "file_name": f"{name}.jpg", "width": SIZE, "height": SIZE})
            annotations.append({"id": number, "image_id": number, "category_id": 1,
                                "keypoints": [round(v, 1) for x, y in places for v in (x, y, 2)]})
    write_json(folder / "train.json", {
        "images": images, "annotations": annotations,
        "categories": [{"id": 1, "name": "teapot", "keypoints": list(TEXTS)}]})
    write_json(folder / "texts.json", TEXTS)
    print(f"wrote seven photos, train.json and texts.json into {folder}/")
    print("the seventh's keypoints:", ", ".join(
        f"{name} {x:.0f},{y:.0f}" for name, (x, y) in zip(TEXTS, places)))


if __name__ == "__main__":
    run(main)
