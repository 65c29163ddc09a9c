"""draw.py: points where they are, in colours that can be told apart; names; sheets."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
from mp100 import make_wagons_and_kites
from PIL import Image

import draw
from data import Crop, read_descriptions, read_instances

GRAY = (128, 128, 128)


def test_points_are_drawn_where_they_are_in_their_colours(tmp_path):
    Image.new("RGB", (200, 100), "gray").save(tmp_path / "photo.png")
    right_half = Crop(150, 50, 100)  # so pixel (x, y) is (3.6 (x - 100), 3.6 y) on the tile
    predicted = [(120, 25), None, (150, 90)]
    annotated = [None, (180, 40), (190, 90)]
    tile = draw.draw_instance(tmp_path / "photo.png", right_half, ["a", "b", "c"], predicted, annotated)
    a, b, c = draw.make_palette(3)
    expected = {
        "a's dot": ((72, 90), a),
        "b's ring": ((288 + 4, 144), b),
        "within b's ring": ((288, 144), GRAY),
        "c's dot": ((180, 324), c),
        "c's ring": ((324 + 4, 324), c),
        "the line between": ((252, 324), c),
        "elsewhere": ((30, 200), GRAY),
        "a's dot beside its name": ((372, 15), a),
        "b's empty circle beside its name": ((372, 30), (255, 255, 255)),
    }
    for what, (place, colour) in expected.items():
        assert np.abs(np.array(tile.getpixel(place)) - colour).max() < 40, what
    assert tile.size == (360 + 190, 360)
    assert tile.getpixel((540, 350)) == (255, 255, 255)


def test_68_names_fit_beside_the_photo(tmp_path):
    Image.new("RGB", (100, 100)).save(tmp_path / "photo.png")
    names = [f"point {k}" for k in range(68)]
    tile = np.array(draw.draw_instance(tmp_path / "photo.png", Crop(50, 50, 100), names, [(50, 50)] * 68))
    legend, colours = tile[:, 365:], set(draw.make_palette(68))
    assert len(colours) == 68
    assert colours <= set(map(tuple, legend.reshape(-1, 3).tolist()))  # a dot for each
    for edge in legend[0], legend[-1], legend[:, -1]:  # no name is cut off
        assert (edge == 255).all()
    for k in range(68):  # a name begins behind its dot
        x, y = 17 + 190 * (k // 23), 15 + 15 * (k % 23)
        assert legend[y - 5:y + 6, x:x + 40].min() < 100, k


def test_a_sheet_takes_turns_between_categories(tmp_path, monkeypatch):
    data = make_wagons_and_kites(tmp_path)
    categories = read_descriptions(data / "descriptions.json")
    instances = read_instances(data / "annotations" / "mp100_split1_test.json", categories)
    wagons, kites = instances[0::2], instances[1::2]
    kites[0] = replace(kites[0], box=(0, 0, 20, 30))
    shown = []

    def draw_instance(photo, crop, names, predicted, annotated):
        shown.append(SimpleNamespace(photo=photo, crop=crop, names=names, predicted=predicted,
                                     annotated=annotated))
        return Image.new("RGB", (400, 100), "red")
    monkeypatch.setattr(draw, "draw_instance", draw_instance)

    instances = [*wagons, *kites]
    predicted = [[(i, k) for k in range(len(instance.keypoints))] for i, instance in enumerate(instances)]
    draw.draw_sheet(tmp_path / "sheet.png", instances, predicted, categories, data / "images", n=4)
    expected = [0, 3, 1, 4]  # of instances
    assert [tile.photo for tile in shown] == [data / "images" / instances[i].photo for i in expected]
    assert [tile.crop.side for tile in shown] == [55, 30, 55, 55]
    assert [tile.predicted for tile in shown] == [predicted[i] for i in expected]
    assert [tile.names[0] for tile in shown] == ["front wheel", "tip", "front wheel", "tip"]
    hidden_in_102 = shown[2].annotated
    assert hidden_in_102[1] is None and hidden_in_102[0] == tuple(wagons[1].keypoints[0])

    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (56 + 2 * 140, 16 + 3 * 416, 3)  # three to a row
    red = (sheet == (255, 0, 0)).all(-1)
    assert red.sum() == 4 * 400 * 100  # no tile covers another
    assert red[76:176, 16:416].all() and red[216:316, 16:416].all()
