"""Pictures of objects with their keypoints: one object in full, or a sheet of several.

A point is in pixels of the photo, a place in pixels of what is shown of it; None where there is none. A dot
shows a predicted point, a ring an annotated one. A leader is the line from a mark to its label: (place, end,
colour). A text is (place, letters, font, colour, anchor).
"""

import colorsys
import math
import re
import textwrap
from collections import defaultdict
from functools import cache
from itertools import chain, combinations, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common import InputError
from data import open_reduced

INK, GRAY, PAPER = (40, 40, 48), (110, 110, 118), (255, 255, 255)
HUES = {"left": (0.88, 1.17), "right": (0.48, 0.78), "middle": (0.23, 0.42), "any": (0, 1)}
MOST_LEADERS = 24  # more keypoints get numbers and a key
FINE = 2  # marks are drawn so many times larger and then reduced, for smooth edges


class Mark(NamedTuple):
    """A keypoint in the picture."""

    predicted: tuple  # place of the dot
    annotated: tuple  # place of the ring
    hollow: bool  # whether the prediction is unsure
    colour: tuple
    label: list  # lines of text, the first is the keypoint's name

    @property
    def place(self):
        return self.predicted or self.annotated


def make_palette(names):
    """A colour for each name: warm for left, cold for right, else green; all hues if most have no side."""
    sides = [(*re.findall(r"\b(left|right)\b", name.lower()), "middle")[0] for name in names]
    if not {"left", "right"} <= {*sides} or 2 * sides.count("middle") > len(names):
        sides = ["any"] * len(names)
    colours = []
    for k, side in enumerate(sides):
        low, high = HUES[side]
        hue = (low + (high - low) * sides[:k].count(side) / sides.count(side)) % 1
        colours.append(tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.9 if k % 2 else 0.65, 1)))
    return colours


@cache
def load_fonts(size):
    """Pillow's own font, which has no accents, and one that has them, if the system has it."""
    try:
        return [ImageFont.load_default(size), ImageFont.truetype("DejaVuSans.ttf", size)]
    except OSError:
        return [ImageFont.load_default(size)]


@cache
def has_letter(font, letter):
    """A font draws the same box for all letters that it lacks."""
    is_box = letter.isprintable() and bytes(font.getmask(letter)) == bytes(font.getmask("\U0010fffd"))
    return letter.isprintable() and not is_box


def choose_font(text, size):
    """-> the font that has most of its letters, and the text with "?" for those it lacks."""
    font = max(load_fonts(size), key=lambda font: sum(has_letter(font, c) for c in text))
    return font, "".join(c if has_letter(font, c) else "?" for c in text)


def write(place, letters, size, colour=INK, anchor="lm"):
    """-> a text of `size` pixels, of which the anchor is at the place: "l"eft, "m"iddle or "r"ight."""
    font, letters = choose_font(letters, size)
    return place, letters, font, colour, anchor


def wrap(text, size, width):
    """Lines of a text that are about `width` pixels wide. A letter is about half as wide as high."""
    return textwrap.wrap(" ".join(text.split()), max(1, int(2 * width / size))) or [""]


def make_name(name, k, size, width):
    """Keypoint k's name on one line of about `width` pixels; "keypoint 3" if no font has its letters."""
    name = choose_font(" ".join(name.split()), size)[1]
    first, *more = wrap(name if name.strip("? ") else f"keypoint {k + 1}", size, width)
    return first + "…" * bool(more)


def place_column(places, x, gap, height):
    """Where leaders end that do not cross -> for each place (x, y), the y at least `gap` apart.

    Ends are between 0 and height and as high as their places if there is room, else they reach over both ends
    alike. They are swapped while leaders get shorter, which undoes every crossing.
    """
    order = sorted(range(len(places)), key=lambda k: places[k][1])
    steps = gap * np.arange(len(places))
    slack = np.array([places[k][1] for k in order]) - steps
    # nowhere falling, and as near to slack: halfway between its highest so far and its lowest to come
    rows = (np.maximum.accumulate(slack) + np.minimum.accumulate(slack[::-1])[::-1]) / 2
    room = height - gap * len(places)
    rows = steps + np.clip(rows, gap / 2 + min(room / 2, 0), gap / 2 + max(room, room / 2))
    ends = {k: (x, row) for k, row in zip(order, rows.tolist())}
    swapped = True
    while swapped:
        swapped = False
        for a, b in combinations(range(len(places)), 2):
            straight = math.dist(places[a], ends[a]) + math.dist(places[b], ends[b])
            if math.dist(places[a], ends[b]) + math.dist(places[b], ends[a]) < straight - 1e-9:
                ends[a], ends[b], swapped = ends[b], ends[a], True
    return [ends[k] for k in range(len(places))]


def place_columns(places, xs, gap, height):
    """As place_column(), in several columns: the leftmost places in the first."""
    order, ends = np.argsort([x for x, _ in places], kind="stable"), {}
    for x, column in zip(xs, np.array_split(order, len(xs))):
        ends |= zip(column, place_column([places[k] for k in column], x, gap, height))
    return [ends[k] for k in range(len(places))]


def place_numbers(places, size):
    """Centres of numbers of this size beside their marks, as clear of each other and of marks as can be."""
    taken, angles = np.reshape(places, (-1, 2)), np.arange(48) * math.pi / 8  # three times around
    ways = np.stack((np.cos(angles), np.sin(angles)), 1)
    offsets = size * ways / abs(ways).max(1, keepdims=True) * np.repeat((1, 1.5, 2), 16)[:, None]
    for place in places:
        tried = place + offsets  # (48, 2), the nearest first
        room = (abs(tried[:, None] - taken) / size).max(-1).min(1)  # below 1 something is covered
        taken = np.concatenate((taken, [tried[room.clip(0, 0.999).argmax()]]))
    return taken[len(places):].tolist()


def choose_view(photo_size, box, points, whole_from=0.5):
    """The part of a photo that is shown -> x1, y1, x2, y2.

    The whole photo if the box's longer side is at least `whole_from` of the photo's. Else the box and all
    points, with a margin of a fifth of that side or more, so that 180 pixels are seen if the photo has them.
    """
    x, y, w, h = box
    if max(w, h) >= whole_from * max(photo_size):
        return 0, 0, *photo_size
    margin = max(0.2 * max(w, h), 90 - max(w, h) / 2)
    shown = np.clip([(x, y), (x + w, y + h), *points], 0, photo_size)
    low, high = np.maximum(shown.min(0) - margin, 0), np.minimum(shown.max(0) + margin, photo_size)
    return *map(math.floor, low), *map(math.ceil, high)


def show_object(photo, box, labels, predicted, annotated, confidence, room, threshold=0.5, whole_from=0.5):
    """What is shown of a photo, at most `room` (width, height) -> picture, marks, corners of the box."""
    x1, y1, x2, y2 = choose_view(photo.size, box, [p for p in (*predicted, *annotated) if p], whole_from)
    scale = min(room[0] / (x2 - x1), room[1] / (y2 - y1))
    size = max(1, round(scale * (x2 - x1))), max(1, round(scale * (y2 - y1)))

    def place(point):
        return point and tuple(np.clip(scale * np.subtract(point, (x1, y1)), 0, size).tolist())
    hollow = [p is not None and c is not None and c < threshold for p, c in zip(predicted, confidence)]
    colours = make_palette([name for name, *_ in labels])
    marks = list(map(Mark, map(place, predicted), map(place, annotated), hollow, colours, labels))
    picture = photo.resize(size, Image.Resampling.LANCZOS, box=(x1, y1, x2, y2))
    x, y, w, h = box
    return picture, marks, [place(p) for p in ((x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y))]


def draw_marks(canvas, shift, marks, radius, skeleton, leaders, box):
    """Every mark has a light and a dark edge. A line joins what is predicted and annotated."""
    layer = Image.new("RGBA", [FINE * n for n in canvas.size])
    pen, r = ImageDraw.Draw(layer), FINE * radius

    def line(places, colour, width, edge=(*INK, 170)):
        places = [tuple(FINE * np.add(place, shift)) for place in places]
        pen.line(places, edge, round((width + 0.45) * r), joint="curve")
        pen.line(places, colour, round(width * r), joint="curve")

    def ring(place, size, colour, width, fill=None):
        x, y = FINE * np.add(place, shift)
        for edge, shade in ((0.34, PAPER), (0.18, INK), (0, colour)):
            out = r * (size + edge)
            pen.ellipse((x - out, y - out, x + out, y + out), fill, shade, round(r * (width + 2 * edge)))

    if box:
        line(box, PAPER, 0.15)
    for place, end, colour in leaders:
        line((place, end), INK, 0.15, (*PAPER, 190))
        ring(end, 0.6, colour, 0.6, colour)
    for a, b in skeleton:
        start, end = marks[a].predicted, marks[b].predicted
        if start and end:
            line((start, end), INK, 0.6)
            for place, colour in (start, marks[a].colour), (end, marks[b].colour):
                line((place, np.add(start, end) / 2), colour, 0.5, colour)
    for mark in marks:
        if mark.annotated and mark.predicted:
            line((mark.annotated, mark.predicted), mark.colour, 0.25)
        if mark.annotated:
            ring(mark.annotated, 1.6, mark.colour, 0.35)
    for mark in marks:
        if mark.predicted:
            width, fill = (0.4, PAPER) if mark.hollow else (1, mark.colour)
            ring(mark.predicted, 1, mark.colour, width, fill)
    layer = layer.reduce(FINE)
    canvas.paste(layer, mask=layer)


def assemble(picture, marks, texts, radius, skeleton=(), leaders=(), box=()):
    """A picture with its marks and texts, which may lie beside it -> all of it, on paper with a margin."""
    pen, extent = ImageDraw.Draw(picture), [(0, 0, *picture.size)]
    extent += [pen.textbbox(place, letters, font, anchor) for place, letters, font, _, anchor in texts]
    low, high = np.min(extent, 0)[:2] - 2 * radius, np.max(extent, 0)[2:] + 2 * radius
    shift = tuple(np.ceil(-low).astype(int).tolist())
    canvas = Image.new("RGB", [math.ceil(n) for n in high + shift], PAPER)
    canvas.paste(picture, shift)
    draw_marks(canvas, shift, marks, radius, skeleton, leaders, box)
    pen = ImageDraw.Draw(canvas)
    for place, letters, font, colour, anchor in texts:
        pen.text(tuple(np.add(place, shift).tolist()), letters, colour, font, anchor,
                 stroke_width=2 if anchor == "mm" else 0, stroke_fill=PAPER)
    return canvas


def write_labels(marks, picture_size, size, gap, columns):
    """Labels beside the picture, in one column or two, at the ends of leaders -> texts, leaders."""
    marks, texts = [mark for mark in marks if mark.place], []
    places, right, height = [mark.place for mark in marks], picture_size[0] + size, picture_size[1]
    ends = place_columns(places, (right,) if columns == 1 else (-size, right), gap, height)
    for mark, (x, y) in zip(marks, ends):
        side, anchor = (-1, "rm") if x < 0 else (1, "lm")
        for i, line in enumerate(mark.label):
            row = y + 1.2 * size * (i - (len(mark.label) - 1) / 2)
            texts.append(write((x + side * 0.6 * size, row), line, size, GRAY if i else INK, anchor))
    return texts, [(mark.place, end, mark.colour) for mark, end in zip(marks, ends)]


def write_numbers(marks, picture_size, size):
    """Numbers at the marks, and a key in columns beside the picture -> texts, leaders without length."""
    shown = {k: mark.place for k, mark in enumerate(marks, 1) if mark.place}
    centres = place_numbers([*shown.values()], (size, 0.75 * size))
    texts = [write(centre, str(k), round(0.75 * size), anchor="mm") for k, centre in zip(shown, centres)]
    x, n_rows = picture_size[0] + size, max(12, int(picture_size[1] / (1.25 * size)))
    names, leaders = [write((0, 0), mark.label[0], size) for mark in marks], []
    width = 3.7 * size + max(font.getlength(name) for _, name, font, *_ in names)  # of a column
    for k, (mark, (_, *name)) in enumerate(zip(marks, names)):
        left, y = x + k // n_rows * width, (k % n_rows + 0.5) * 1.25 * size
        leaders.append(((left, y), (left, y), mark.colour))
        texts += [write((left + 0.6 * size, y), str(k + 1), size), ((left + 2.2 * size, y), *name)]
    return texts, leaders


def draw_points(photo, box, category, predicted, annotated=None, confidence=None, size=1440, threshold=0.5):
    """An object and its keypoints -> a picture, in which the longer side of what is shown is `size` pixels.

    box: x, y, w, h. predicted, annotated: for each keypoint (x, y) or None. confidence: for each 0 to 1 or
    None; below the threshold a point is hollow. A point outside the photo is drawn at its edge.
    """
    K, letters = len(category.keypoints), max(12, size // 50)
    names = [make_name(name, k, letters, 0.3 * size) for k, (name, _) in enumerate(category.keypoints)]
    labels = [[name if p is None or 0 <= p[0] <= photo.width and 0 <= p[1] <= photo.height else
               f"{name} (outside)"] for name, p in zip(names, predicted)]
    picture, marks, corners = show_object(photo, box, labels, predicted, annotated or [None] * K,
                                          confidence or [None] * K, (size, size), threshold)
    if K > MOST_LEADERS:
        texts, leaders = write_numbers(marks, picture.size, letters)
    else:
        texts, leaders = write_labels(marks, picture.size, letters, 1.3 * letters, columns=2)
    notes = ["dot: predicted, ring: annotated"] * any(mark.annotated for mark in marks)
    notes += [f"hollow: confidence below {threshold:g}"] * any(mark.hollow for mark in marks)
    if missing := [name for name, mark in zip(names, marks) if not mark.predicted]:
        notes.append(make_name(f"no answer: {', '.join(missing)}", 0, letters, max(size / 2, picture.width)))
    bottom = max([picture.height, *(y for (_, y), *_ in texts)])
    texts += [write((0, bottom + 1.5 * n * letters), note, letters, GRAY) for n, note in enumerate(notes, 1)]
    radius = size / (200 if K > MOST_LEADERS else 130)
    return assemble(picture, marks, texts, radius, category.skeleton, leaders, corners)


def draw_tile(photo, box, category, predicted, annotated, confidence, height=360, letters=14):
    """An object below its category's name, beside it what was asked for if that fits."""
    labels = [[make_name(name, k, letters, 0.75 * height), *wrap(text, letters, 0.75 * height)]
              for k, (name, text) in enumerate(category.keypoints)]
    picture, marks, _ = show_object(photo, box, labels, predicted, annotated, confidence,
                                    (2 * height, height), whole_from=math.inf)
    texts, leaders, gap = [], [], letters * (1.2 * max(map(len, labels)) + 0.5)
    if gap * len(marks) <= picture.height:
        texts, leaders = write_labels(marks, picture.size, letters, gap, columns=1)
    texts.append(write((0, -1.2 * letters), wrap(category.name, letters, picture.width)[0], letters + 2))
    return assemble(picture, marks, texts, height / 75, category.skeleton, leaders)


def draw_sheet(path, instances, predicted, categories, images, confidence=None, n=12, width=1900):
    """Draws n instances, in rows: the first of each category, then the second of each, and so on.

    predicted, confidence: for each instance as in draw_points(). Rows are about `width` pixels wide.
    """
    members, tiles = defaultdict(list), []
    for i, instance in enumerate(instances):
        members[instance.category_id].append(i)
    turns = chain.from_iterable(zip_longest(*members.values()))
    for i in [i for i in turns if i is not None][:n]:
        instance = instances[i]
        photo, _ = open_reduced(Path(images, instance.photo), 1, 1)  # at its full size
        annotated = [tuple(p) if v else None for p, v in zip(instance.keypoints.tolist(), instance.visible)]
        tiles.append(draw_tile(photo, instance.box, categories[instance.category_id], predicted[i], annotated,
                               confidence[i] if confidence else [None] * len(annotated)))
    legend = "dot: predicted, ring: annotated" + ", hollow: confidence below 0.5" * bool(confidence)
    save_picture(assemble(arrange(tiles, width), [], [write((8, -14), legend, 14, GRAY)], radius=4), path)


def arrange(tiles, width):
    """Tiles in rows of about equal width -> picture."""
    starts = np.cumsum([0, *(tile.width for tile in tiles)])  # if all were in one row
    rows = [[] for _ in range(max(1, round(starts[-1] / width)))]
    for tile, middle in zip(tiles, (starts[:-1] + starts[1:]) / 2):
        rows[int(len(rows) * middle / starts[-1])].append(tile)
    heights = [max([0, *(tile.height for tile in row)]) for row in rows]
    sheet = Image.new("RGB", (max(sum(tile.width for tile in row) for row in rows), sum(heights)), PAPER)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            sheet.paste(tile, (sum(left.width for left in row[:j]), sum(heights[:i])))
    return sheet


def save_picture(picture, path):
    """Writes a picture. InputError if that cannot be done."""
    try:
        picture.save(path)
    except (OSError, ValueError) as e:  # ValueError: a name whose ending is no kind of picture
        raise InputError(f"{path}: the picture cannot be written ({e})") from None
