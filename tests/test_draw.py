"""tools/draw.py: marks where the points are, names that are readable and apart, sheets."""

import colorsys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mp100 import make_wagons_and_kites
from PIL import Image

from chat import Category
from common import read_json
from data import parse_descriptions, read_instances
from tools import draw

GRAY, WHITE = (128, 128, 128), (255, 255, 255)
PHOTO, BOX = Image.new("RGB", (200, 100), GRAY), (20, 10, 110, 60)
PLACES = st.lists(st.tuples(st.floats(0, 1000), st.floats(0, 700)), max_size=30)


def category(*names, skeleton=()):
    return Category("thing", [(name, f"where the {name} is") for name in names], list(skeleton))


def colours_of(picture, places, size=800, photo=PHOTO):
    """Colours at points of the photo. It begins where the picture's first gray pixel is."""
    pixels = np.array(picture)
    y, x = np.argwhere((pixels == GRAY).all(-1)).min(0)
    return [pixels[y + round(v * size / max(photo.size)), x + round(u * size / max(photo.size))].tolist()
            for u, v in places]


def assert_close(found, expected, what=""):
    assert np.abs(np.subtract(found, expected)).max() < 60, (what, found, expected)


def test_marks_are_where_the_points_are_in_their_colours():
    predicted, annotated = [(30, 20), None, (150, 90), (120, 20)], [None, (80, 30), (190, 70), None]
    picture = draw.draw_points(PHOTO, BOX, category("a", "b", "c", "d", skeleton=[(0, 3), (1, 2)]), predicted,
                               annotated, [0.9, None, 0.5, 0.3], size=800)
    a, b, c, d = draw.make_palette("abcd")
    radius = 200 / 130  # of a dot, in pixels of the photo; a ring is 1.6 times larger
    expected = {
        "a's dot": ((30, 20), a),
        "b's ring": ((80, 30 + 1.4 * radius), b),
        "within b's ring": ((80, 30), GRAY),
        "c's dot, as sure as needs be": ((150, 90), c),
        "c's ring": ((190, 70 + 1.4 * radius), c),
        "the line between": ((170, 80), c),
        "d's dot is hollow": ((120, 20), WHITE),
        "and has its colour": ((120, 20 + 0.8 * radius), d),
        "the skeleton's half at a": ((50, 20), a),
        "the skeleton's half at d": ((100, 20), d),
        "no skeleton to b, which is not predicted": ((115, 60), GRAY),
        "elsewhere": ((10, 90), GRAY),
    }
    for (what, (_, colour)), found in zip(expected.items(), colours_of(
            picture, [place for place, _ in expected.values()])):
        assert_close(found, colour, what)


@pytest.mark.parametrize("box, points, view", [
    ((100, 100, 300, 500), [], (0, 0, 1000, 800)),  # half of the photo's longer side
    ((100, 300, 400, 200), [], (20, 220, 580, 580)),  # less: a fifth of 400 around it
    ((0, 700, 400, 100), [], (0, 620, 480, 800)),  # as far as the photo goes
    ((100, 300, 400, 200), [(700, 900)], (20, 220, 780, 800)),  # and every point of the photo
    ((500, 400, 10, 10), [], (415, 315, 595, 495)),  # a tiny object: 180 pixels, then no larger
])
def test_the_whole_photo_is_shown_or_what_is_around_the_object(box, points, view):
    assert draw.choose_view((1000, 800), box, points) == view


@pytest.fixture
def seen(monkeypatch):
    """A list that gets what each picture is assembled of."""
    seen, assemble = [], draw.assemble
    monkeypatch.setattr(draw, "assemble", lambda *args: seen.append(args) or assemble(*args))
    return seen


def test_points_outside_are_at_the_edge_and_say_so(seen):
    draw.draw_points(PHOTO, (-10, -10, 150, 80), category("in", "left", "far"),
                     [(0, 50), (-5, 50), (900, 900)], size=400)
    [(_, marks, texts, *_)] = seen
    assert [mark.predicted for mark in marks] == [(0, 100), (0, 100), (400, 200)]
    assert [text[1] for text in texts] == ["in", "left (outside)", "far (outside)"]


@pytest.mark.parametrize("n", [0, 2, 24, 68])
def test_every_name_is_drawn_once_and_none_overlap(n, seen):
    rng = np.random.default_rng(n)
    points = [tuple(p) for p in (rng.uniform(0, (200, 100), (n, 2))).tolist()]
    names = [*(f"point {k}" for k in range(n)), "absent"]
    picture = draw.draw_points(PHOTO, BOX, category(*names), [*points, None])
    [(_, marks, texts, *_)] = seen
    drawn = [letters for _, letters, *_ in texts]
    assert all(drawn.count(f"point {k}") == 1 for k in range(n))
    assert drawn[-1] == "no answer: absent"
    assert len({mark.colour for mark in marks[:n]}) == n
    boxes = [np.add(font.getbbox(letters, anchor=anchor), (*place, *place))
             for place, letters, font, _, anchor in texts if letters.startswith("point")]
    for (x1, y1, x2, y2), (u1, v1, u2, v2) in combinations(boxes, 2):
        assert x2 <= u1 or u2 <= x1 or y2 <= v1 or v2 <= y1
    edges = np.array(picture)[[0, -1]], np.array(picture)[:, [0, -1]]
    assert all((edge == 255).all() for edge in edges)  # nothing is cut off


def test_names_are_readable():
    def spell(name):
        return draw.make_name(name, 4, 20, 300)
    assert spell("left\n eye") == "left eye"
    assert [spell(name) for name in ("", " ", "\ud800", "\U0010fff0")] == ["keypoint 5"] * 4
    assert draw.choose_font("a\U0010fff0b", 20)[1] == "a?b"
    assert spell("word " * 50).endswith("\u2026")


def test_left_is_warm_and_right_is_cold():
    names = ["nose", *(f"{side} {part}" for part in ("eye", "hip", "knee") for side in ("left", "right"))]
    palette = draw.make_palette(names)
    assert len({*palette}) == len(names)
    for name, rgb in zip(names, palette):
        hue = colorsys.rgb_to_hsv(*rgb)[0]
        assert ("left" in name) == (hue > 0.85 or hue < 0.2), name
        assert ("right" in name) == (0.45 < hue < 0.8), name


def cross(a, b, c, d):
    """Whether the lines from a to b and from c to d cross between their ends."""
    def side(p, q, r):
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])
    s, t, u, v = side(a, b, c), side(a, b, d), side(c, d, a), side(c, d, b)
    return min(abs(n) for n in (s, t, u, v)) > 1e-3 and (s > 0) != (t > 0) and (u > 0) != (v > 0)


@settings(max_examples=60, deadline=None)
@given(PLACES)
def test_leaders_do_not_cross_and_labels_do_not_overlap(places):
    ends = draw.place_columns(places, (-20, 1020), 40, 700)
    assert len(ends) == len(places) and {x for x, _ in ends} <= {-20, 1020}
    for (p, e), (q, f) in combinations(zip(places, ends), 2):
        assert e[0] != f[0] or abs(e[1] - f[1]) >= 40 - 1e-6
        assert not cross(p, e, q, f)


def test_a_sheet_takes_turns_between_categories(tmp_path, monkeypatch):
    data = make_wagons_and_kites(tmp_path)
    categories = parse_descriptions(read_json(data / "descriptions.json"), "descriptions.json")
    instances = read_instances(data / "annotations" / "mp100_split1_test.json", categories)
    wagons, kites, shown = instances[0::2], instances[1::2], []

    def draw_tile(photo, *tile):
        shown.append(tile)
        return Image.new("RGB", (400, 100), "red")
    monkeypatch.setattr(draw, "draw_tile", draw_tile)
    instances = [*wagons, *kites]
    predicted = [[(i, k) for k in range(len(instance.keypoints))] for i, instance in enumerate(instances)]
    confidence = [[0.1 * i] * len(points) for i, points in enumerate(predicted)]
    draw.draw_sheet(tmp_path / "sheet.png", instances, predicted, categories, data / "images", confidence,
                    n=4, width=800)
    for i, (box, category, points, annotated, confidences) in zip([0, 3, 1, 4], shown, strict=True):
        instance = instances[i]
        assert (box, category) == (instance.box, categories[instance.category_id])
        assert (points, confidences) == (predicted[i], confidence[i])
        assert annotated[0] == tuple(instance.keypoints[0])
    assert shown[2][3][1] is None  # hidden in annotation 102
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    red = (sheet == (255, 0, 0)).all(-1)
    assert red.sum() == 4 * 400 * 100  # no tile covers another
    assert red.sum(1).max() == 800 > sheet.shape[1] - 40  # two to a row
