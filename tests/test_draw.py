"""tools/draw.py: marks where the points are, names that are readable and apart, sheets."""

import colorsys
import math
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mp100 import make_wagons_and_kites
from PIL import Image

from annotations import read_descriptions, read_instances
from chat import Category
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


# --------------------------------------------------------------------------------------------------- objects


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


def test_a_point_is_hollow_below_the_threshold(monkeypatch):
    seen, assemble = [], draw.assemble
    monkeypatch.setattr(draw, "assemble", lambda *args: seen.append(args) or assemble(*args))
    for threshold, hollow in (0.5, [True, False, False, False]), (0.75, [True, True, False, False]):
        draw.draw_points(PHOTO, BOX, category("a", "b", "c", "d"), [(30, 20), (80, 30), (90, 60), None],
                         confidence=[0.49, 0.5, None, 0.1], size=400, threshold=threshold)
        _, marks, texts, *_ = seen.pop()
        assert [mark.hollow for mark in marks] == hollow
        assert [letters for _, letters, *_ in texts][-2:] == [
            f"hollow: confidence below {threshold:g}", "no answer: d"]
    draw.draw_points(PHOTO, BOX, category("a"), [(30, 20)], confidence=[0.9], size=400)
    assert [letters for _, letters, *_ in seen.pop()[2]] == ["a"]


@pytest.mark.parametrize("shade", [0, 60, 200, 255])
def test_marks_stand_out_from_any_photo(shade):
    photo = Image.new("RGB", (200, 100), (shade,) * 3)
    picture = np.array(draw.draw_points(photo, BOX, category("a"), [(60, 50)], [(120, 50)], size=800))
    inside = picture[50:350, -700:-100].reshape(-1, 3).astype(int)  # the photo without its edges
    for mark in (slice(None, 300), slice(300, None)):  # the dot and the ring
        contrast = np.abs(inside.reshape(300, 600, 3)[:, mark] - shade).sum(-1).max()
        assert contrast > 300


def test_the_photos_longer_side_has_the_size_asked_for():
    for photo in (PHOTO, PHOTO.rotate(90, expand=True), PHOTO.resize((2000, 1500))):
        for size in (300, 640):
            box = (20, 20, photo.width - 40, photo.height - 40)
            picture = np.array(draw.draw_points(photo, box, category("a"), [(40, 40)], size=size))
            rows, columns = np.argwhere(np.abs(picture.astype(int) - 128).max(-1) < 3).T
            assert max(np.ptp(rows), np.ptp(columns)) + 1 == size


def test_the_same_picture_twice():
    pictures = [draw.draw_points(PHOTO, BOX, category("a", "b"), [(30, 60), (80, 20)], [None, (90, 20)],
                                 [0.9, 0.1]) for _ in range(2)]
    assert pictures[0].tobytes() == pictures[1].tobytes()


@pytest.mark.parametrize("box, points, view", [
    ((100, 100, 300, 500), [], (0, 0, 1000, 800)),  # half of the photo's longer side
    ((100, 300, 400, 200), [], (20, 220, 580, 580)),  # less: a fifth of 400 around it
    ((0, 700, 400, 100), [], (0, 620, 480, 800)),  # as far as the photo goes
    ((100, 300, 400, 200), [(700, 900)], (20, 220, 780, 800)),  # and every point of the photo
    ((500, 400, 10, 10), [], (415, 315, 595, 495)),  # a tiny object: 180 pixels, then no larger
])
def test_the_whole_photo_is_shown_or_what_is_around_the_object(box, points, view):
    shown = draw.choose_view((1000, 800), box, points)
    assert shown == view


def test_points_outside_are_at_the_edge_and_say_so(monkeypatch):
    seen, assemble = [], draw.assemble
    monkeypatch.setattr(draw, "assemble", lambda *args: seen.append(args) or assemble(*args))
    draw.draw_points(PHOTO, (-10, -10, 150, 80), category("in", "left", "far"),
                     [(0, 50), (-5, 50), (900, 900)], size=400)
    [(_, marks, texts, *_)] = seen
    assert [mark.predicted for mark in marks] == [(0, 100), (0, 100), (400, 200)]
    assert [text[1] for text in texts] == ["in", "left (outside)", "far (outside)"]


@pytest.mark.parametrize("n", [0, 1, 2, 24, 25, 68])
def test_every_name_is_drawn_once_and_none_overlap(n, monkeypatch):
    seen, assemble = [], draw.assemble
    monkeypatch.setattr(draw, "assemble", lambda *args: seen.append(args) or assemble(*args))
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


@settings(max_examples=12, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=4), st.booleans())
def test_no_name_makes_it_fail(names, sure):
    points = [(10 + 20 * k, 40) for k in range(len(names))]
    draw.draw_points(PHOTO, BOX, category(*names), points, confidence=[0.9 * sure] * len(names), size=120)


# --------------------------------------------------------------------------------------------------- letters


def test_names_are_readable():
    def spell(name):
        return draw.make_name(name, 4, 20, 300)
    assert spell("left\n eye") == "left eye"
    assert [spell(name) for name in ("", " ", "\ud800", "\U0010fff0")] == ["keypoint 5"] * 4
    assert draw.choose_font("a\U0010fff0b", 20)[1] == "a?b"
    for long in spell("word " * 50), spell("nnn" * 50):
        assert long.endswith("…") and 220 < draw.choose_font(long, 20)[0].getlength(long) < 360
    assert draw.wrap("one two three", 20, draw.choose_font("one two", 20)[0].getlength("one two")) == [
        "one two", "three"]


def test_a_system_font_is_taken_for_letters_that_pillows_own_lacks(monkeypatch):
    own, other = SimpleNamespace(letters="abc"), SimpleNamespace(letters="abé")
    monkeypatch.setattr(draw, "load_fonts", lambda size: [own, other])
    monkeypatch.setattr(draw, "has_letter", lambda font, letter: letter in font.letters)
    for text, expected in {"ab": (own, "ab"), "é": (other, "é"), "bé": (other, "bé"), "cé": (own, "c?"),
                           "abé鼻": (other, "abé?")}.items():
        assert draw.choose_font(text, 12) == expected


def test_left_is_warm_and_right_is_cold():
    parts = "eye", "hip", "knee", "foot"
    names = ["nose", *(f"{side} {part}" for part in parts for side in ("left", "right"))]
    palette = draw.make_palette(names)
    assert len({*palette}) == 9
    for name, rgb in zip(names, palette):
        hue = colorsys.rgb_to_hsv(*rgb)[0]
        assert ("left" in name) == (hue > 0.85 or hue < 0.2), name
        assert ("right" in name) == (0.45 < hue < 0.8), name
    many = draw.make_palette(["beak", "tail", "crown", "back", "left eye", "right eye"])  # few have a side
    assert np.allclose(np.diff([colorsys.rgb_to_hsv(*rgb)[0] for rgb in many]), 1 / 6, atol=0.01)


# ---------------------------------------------------------------------------------------------------- places


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
    for x in (-20, 1020):
        rows = [y for u, y in ends if u == x]
        assert len(rows) <= max(3, math.ceil(0.6 * len(places)))
        if len(rows) * 40 <= 700:
            assert all(20 - 1e-6 <= y <= 680 + 1e-6 for y in rows)
        elif rows:  # as far above as below
            assert min(rows) + max(rows) == pytest.approx(700)


def test_labels_are_as_high_as_their_points_if_there_is_room():
    places = [(100, 300), (200, 100), (900, 600)]
    assert draw.place_columns(places, (-20, 1020), 40, 700) == [(-20, 300), (-20, 100), (1020, 600)]
    assert draw.place_column([(100, 300), (100, 310)], 500, 40, 700) == [(500, 285), (500, 325)]
    crowd = draw.place_column([(100, y) for y in range(5)], 500, 40, 100)
    assert crowd == [(500, -30), (500, 10), (500, 50), (500, 90), (500, 130)]


def test_numbers_are_beside_their_points_and_apart():
    places = [(100 + 25 * (k % 9), 100 + 40 * (k // 9)) for k in range(68)]
    centres = draw.place_numbers(places, (22, 16))
    for k, ((x, y), (u, v)) in enumerate(zip(places, centres)):
        assert math.hypot(x - u, y - v) < 50
        for i, (p, q) in enumerate(centres):
            assert i == k or abs(p - u) >= 22 - 1e-6 or abs(q - v) >= 16 - 1e-6
        assert all(abs(p - u) >= 18 - 1e-6 or abs(q - v) >= 15 - 1e-6 for p, q in places)


# ---------------------------------------------------------------------------------------------------- sheets


def test_a_sheet_takes_turns_between_categories(tmp_path, monkeypatch):
    data = make_wagons_and_kites(tmp_path)
    categories = read_descriptions(data / "descriptions.json")
    instances = read_instances(data / "annotations" / "mp100_split1_test.json", categories)
    wagons, kites = instances[0::2], instances[1::2]
    kites[0] = replace(kites[0], box=(0, 0, 20, 30))
    shown = []

    def draw_tile(photo, box, category, predicted, annotated, confidence):
        shown.append(SimpleNamespace(box=box, category=category, predicted=predicted, annotated=annotated,
                                     confidence=confidence))
        return Image.new("RGB", (400, 100), "red")
    monkeypatch.setattr(draw, "draw_tile", draw_tile)

    instances = [*wagons, *kites]
    predicted = [[(i, k) for k in range(len(instance.keypoints))] for i, instance in enumerate(instances)]
    confidence = [[0.1 * i] * len(points) for i, points in enumerate(predicted)]
    draw.draw_sheet(tmp_path / "sheet.png", instances, predicted, categories, data / "images", confidence,
                    n=4, width=800)
    expected = [0, 3, 1, 4]  # of instances
    assert [tile.box for tile in shown] == [instances[i].box for i in expected]
    assert [tile.predicted for tile in shown] == [predicted[i] for i in expected]
    assert [tile.confidence for tile in shown] == [confidence[i] for i in expected]
    assert [tile.category.name for tile in shown] == ["wagon", "kite", "wagon", "kite"]
    hidden_in_102 = shown[2].annotated
    assert hidden_in_102[1] is None and hidden_in_102[0] == tuple(wagons[1].keypoints[0])

    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    red = (sheet == (255, 0, 0)).all(-1)
    assert red.sum() == 4 * 400 * 100  # no tile covers another
    assert red.sum(1).max() == 800 > sheet.shape[1] - 40  # two to a row


@pytest.mark.parametrize("length, is_shown", [(5, True), (80, False)])
def test_a_tile_shows_what_was_asked_if_it_fits(length, is_shown, monkeypatch):
    seen, assemble = [], draw.assemble
    monkeypatch.setattr(draw, "assemble", lambda *args: seen.append(args) or assemble(*args))
    asked = Category("ear thing", [(f"tip {k}", "word " * length) for k in range(4)])
    points = [(40 + 10 * k, 40) for k in range(4)]
    tile = draw.draw_tile(PHOTO, BOX, asked, points, points, [0.2] * 4)
    assert (tile.width > 2 * 360 + 60) == is_shown
    [(_, marks, texts, *_)] = seen
    assert [mark.hollow for mark in marks] == [True] * 4
    assert [letters for _, letters, *_ in texts].count("tip 2") == is_shown
    background = (np.array(tile) == 255).all(-1).mean()
    assert background < 0.5


def test_a_sheet_is_not_mostly_paper(tmp_path, shared):
    data = shared / "mini_mp100"
    categories = read_descriptions(data / "descriptions.json")
    instances = read_instances(data / "annotations/mp100_split1_test.json", categories)
    points = [[tuple(p) for p in instance.keypoints.tolist()] for instance in instances]
    draw.draw_sheet(tmp_path / "sheet.png", instances, points, categories, data / "images", n=8)
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    assert (sheet == 255).all(-1).mean() < 0.4
