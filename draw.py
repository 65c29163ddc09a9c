"""Every picture that the programs make: an object with its keypoints, and a sheet of several.

A point is in pixels of the photo, a place in pixels of what is shown of it; None where there is none. A text
is (place, letters, font, colour, anchor), a leader, the line from a mark to its text, (place, end, colour).
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common import InputError
from data import open_reduced
from labels import (
    choose_font,
    find_fonts,
    fit,
    make_palette,
    place_column,
    place_columns,
    place_numbers,
    spell_name,
    wrap,
)

INK, GRAY, PAPER = (40, 40, 48), (110, 110, 118), (255, 255, 255)
UNSURE = 0.5  # a point of less confidence is drawn hollow
MOST_LEADERS = 24  # more keypoints get numbers and a key
FINE = 2  # marks are drawn so many times larger and then reduced, for smooth edges


@dataclass(frozen=True)
class Mark:
    """What is drawn of a keypoint."""

    predicted: tuple  # place
    annotated: tuple  # place
    unsure: bool
    colour: tuple
    label: list = ()  # of lines (letters, colour), the first the keypoint's name

    @property
    def place(self):
        return self.predicted or self.annotated


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


def write(place, letters, size, colour=INK, anchor="lm"):
    """-> a text of `size` pixels, in a font that has its letters."""
    font, letters = choose_font(letters, size)
    return place, letters, font, colour, anchor


def draw_marks(canvas, shift, marks, radius, skeleton, leaders, box):
    """All have an edge that is light and dark. A line joins what is predicted and annotated."""
    layer = Image.new("RGBA", [FINE * n for n in canvas.size])
    pen, r = ImageDraw.Draw(layer), FINE * radius

    def line(places, colour, width, edge=(*INK, 170)):
        places = [tuple(FINE * np.add(place, shift)) for place in places]
        pen.line(places, edge, round((width + 0.45) * r), joint="curve")
        pen.line(places, colour, round(width * r), joint="curve")

    def ring(place, size, colour, width):
        x, y = FINE * np.add(place, shift)
        for edge, shade in ((0.34, PAPER), (0.18, INK), (0, colour)):
            out = r * (size + edge)
            pen.ellipse((x - out, y - out, x + out, y + out), shade if width == size else None, shade,
                        round(r * (width + 2 * edge)))

    if box:
        line(box, PAPER, 0.15)
    for place, end, colour in leaders:
        line((place, end), INK, 0.15, (*PAPER, 190))
        ring(end, 0.6, colour, 0.6)
    for a, b in skeleton:
        ends = [mark for mark in (marks[a], marks[b]) if mark.predicted]
        if len(ends) == 2:
            middle = np.add(ends[0].predicted, ends[1].predicted) / 2
            line((ends[0].predicted, ends[1].predicted), INK, 0.6)
            for mark in ends:
                line((mark.predicted, middle), mark.colour, 0.5, mark.colour)
    for mark in marks:
        if mark.annotated and mark.predicted:
            line((mark.annotated, mark.predicted), mark.colour, 0.25)
        if mark.annotated:
            ring(mark.annotated, 1.6, mark.colour, 0.35)
    for mark in marks:
        if mark.predicted:
            ring(mark.predicted, 1, PAPER if mark.unsure else mark.colour, 1)
        if mark.predicted and mark.unsure:
            ring(mark.predicted, 1, mark.colour, 0.4)
    layer = layer.reduce(FINE)
    canvas.paste(layer, mask=layer)


def assemble(picture, marks, texts, radius, skeleton=(), leaders=(), box=()):
    """A picture with its marks and texts, which may lie beside it -> all of it, on paper with a margin."""
    extent = [(0, 0, *picture.size)]
    for (x, y), letters, font, _, anchor in texts:
        width, height = font.getlength(letters), 0.6 * font.size
        x -= width * "lmr".index(anchor[0]) / 2
        extent.append((x, y - height, x + width, y + height))
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


def show_object(photo, box, labels, predicted, annotated, confidence, room, whole_from=0.5):
    """What is shown of a photo, at most `room` (width, height) -> picture, marks, corners of the box."""
    points = [p for p in (*predicted, *annotated) if p is not None]
    view = choose_view(photo.size, box, points, whole_from)
    x, y, w, h = *view[:2], view[2] - view[0], view[3] - view[1]
    scale = min(room[0] / w, room[1] / h)
    size = max(1, round(w * scale)), max(1, round(h * scale))
    picture = photo.resize(size, Image.Resampling.LANCZOS, box=view)

    def place(point):
        return None if point is None else tuple(np.clip(scale * np.subtract(point, (x, y)), 0, size).tolist())
    unsure = [c is not None and c < UNSURE for c in confidence]
    colours = make_palette([name for (name, _), *_ in labels])
    marks = map(Mark, map(place, predicted), map(place, annotated), unsure, colours, labels)
    x1, y1, x2, y2 = box[0], box[1], box[0] + box[2], box[1] + box[3]
    return picture, list(marks), [place(c) for c in ((x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1))]


def write_labels(marks, ends, size):
    """Labels at the ends of leaders, on the left if x < 0 -> texts, leaders."""
    texts, leaders = [], []
    for mark, (x, y) in zip(marks, ends):
        leaders.append((mark.place, (x, y), mark.colour))
        side, anchor = (-1, "rm") if x < 0 else (1, "lm")
        for i, (letters, colour) in enumerate(mark.label):
            row = y + 1.2 * size * (i - (len(mark.label) - 1) / 2)
            texts.append(write((x + side * 0.6 * size, row), letters, size, colour, anchor))
    return texts, leaders


def write_numbers(marks, radius, picture_size, size):
    """Numbers at the marks, and columns that say whose they are -> texts, leaders without length."""
    shown, font = [k for k, mark in enumerate(marks) if mark.place], find_fonts(round(0.75 * size))[0]
    sizes = [(font.getlength(str(k + 1)) + 4, 0.75 * size) for k in shown]
    centres = place_numbers([marks[k].place for k in shown], sizes, radius)
    texts = [(centre, str(k + 1), font, INK, "mm") for k, centre in zip(shown, centres)]
    leaders, x, n_rows = [], picture_size[0] + size, max(12, int(picture_size[1] / (1.25 * size)))
    for first in range(0, len(marks), n_rows):
        rows = [((n + 0.5) * 1.25 * size, mark) for n, mark in enumerate(marks[first:first + n_rows])]
        names = [write((x + 2.2 * size, y), mark.label[0][0], size) for y, mark in rows]
        texts += names + [write((x + 0.6 * size, y), str(first + n + 1), size)
                          for n, (y, _) in enumerate(rows)]
        leaders += [((x, y), (x, y), mark.colour) for y, mark in rows]
        x += 3.7 * size + max(font.getlength(letters) for _, letters, font, *_ in names)
    return texts, leaders


def make_legend(marks, x, y, size):
    """-> marks and texts of a legend, one line that begins at x, y; none if all is predicted and sure."""
    kinds = [("predicted", True, False, False)]
    if any(mark.annotated for mark in marks):
        kinds.append(("annotated", False, True, False))
    if any(mark.predicted and mark.unsure for mark in marks):
        kinds.append((f"unsure: confidence below {UNSURE:g}", True, False, True))
    samples, texts = [], []
    for letters, predicted, annotated, unsure in kinds if len(kinds) > 1 else ():
        samples.append(Mark((x, y) if predicted else None, (x, y) if annotated else None, unsure, GRAY))
        texts.append(write((x + size, y), letters, size, GRAY))
        x += 3 * size + texts[-1][2].getlength(letters)
    return samples, texts


def draw_points(photo, box, category, predicted, annotated=None, confidence=None, size=1440):
    """An object and its keypoints -> a picture, in which the longer side of what is shown is `size` pixels.

    box: x, y, w, h. predicted, annotated: for each keypoint (x, y) or None. confidence: for each 0 to 1 or
    None. choose_view() says what is shown; a point outside the photo is drawn at its edge.
    """
    K, letters = len(category.keypoints), max(12, size // 50)
    names = [spell_name(name, k, letters, 0.3 * size) for k, (name, _) in enumerate(category.keypoints)]
    outside = [p is not None and not (0 <= p[0] <= photo.width and 0 <= p[1] <= photo.height)
               for p in predicted]
    labels = [[(f"{name} (outside)" if out else name, INK)] for name, out in zip(names, outside)]
    picture, marks, corners = show_object(photo, box, labels, predicted, annotated or [None] * K,
                                          confidence or [None] * K, (size, size))
    (width, height), radius = picture.size, size / (130 if K <= MOST_LEADERS else 200)
    if K > MOST_LEADERS:
        texts, leaders = write_numbers(marks, radius, picture.size, letters)
    else:
        shown = [mark for mark in marks if mark.place]
        places = [mark.place for mark in shown]
        texts, leaders = write_labels(
            shown, place_columns(places, -letters, width + letters, 1.3 * letters, height), letters)
    bottom = max([height, *(y for (_, y), *_ in texts)]) + 1.5 * letters
    samples, legend = make_legend(marks, letters, bottom, letters)
    missing = ", ".join(name for name, mark in zip(names, marks) if not mark.predicted)
    if missing:
        row = bottom + (1.5 * letters if legend else 0)
        missing = fit(f"no answer: {missing}", letters, max(width, 30 * letters))
        legend.append(write((0.5 * letters, row), missing, letters, GRAY))
    return assemble(picture, marks + samples, texts + legend, radius, category.skeleton, leaders, corners)


# ---------------------------------------------------------------------------------------------------- sheets


def draw_tile(photo, box, category, predicted, annotated, confidence, height=360, letters=14):
    """An object below its category's name, beside it what was asked for if that fits -> picture, marks."""
    width, title = 0.75 * height, letters + 2
    few = len(category.keypoints) * 2.9 * letters <= height  # two lines for each would fit
    labels = [[(spell_name(name, k, letters, width), INK),
               *((line, GRAY) for line in (wrap(text, letters, width) if few else ()))]
              for k, (name, text) in enumerate(category.keypoints)]
    picture, marks, _ = show_object(photo, box, labels, predicted, annotated, confidence,
                                    (2 * height, height), whole_from=math.inf)
    texts, leaders = [write((0, -1.2 * letters), fit(category.name, title, picture.width), title)], []
    gap = letters * (1.2 * max(map(len, labels)) + 0.5)
    if few and gap * len(marks) <= picture.height:
        shown = [mark for mark in marks if mark.place]
        ends = place_column([mark.place for mark in shown], picture.width + letters, gap, picture.height)
        asked, leaders = write_labels(shown, ends, letters)
        texts += asked
    return assemble(picture, marks, texts, height / 75, category.skeleton, leaders), marks


def draw_sheet(path, instances, predicted, categories, images, confidence=None, n=12, width=1900):
    """Draws n instances, in rows: the first of each category, then the second of each, and so on.

    predicted, confidence: for each instance as in draw_points(). Rows are about `width` pixels wide.
    """
    turns, seen, tiles, marks = [], Counter(), [], []
    for i, instance in enumerate(instances):
        turns.append((seen[instance.category_id], i))
        seen[instance.category_id] += 1
    for _, i in sorted(turns)[:n]:
        instance, K = instances[i], len(predicted[i])
        photo, shrink = open_reduced(Path(images, instance.photo), max(instance.box[2:]), 360)
        annotated = [tuple(p / shrink) if v else None for p, v in zip(instance.keypoints, instance.visible)]
        tile, of_tile = draw_tile(
            photo, [v / shrink for v in instance.box], categories[instance.category_id],
            [p and tuple(np.array(p) / shrink) for p in predicted[i]], annotated,
            confidence[i] if confidence else [None] * K)
        tiles.append(tile)
        marks += of_tile
    legend = assemble(Image.new("RGB", (1, 1), PAPER), *make_legend(marks, 7, 7, 14), radius=5)
    save_picture(pack(tiles, legend, width), path)


def pack(tiles, legend, width):
    """Tiles in rows of about equal width, below a legend."""
    starts = np.cumsum([0, *(tile.width for tile in tiles)])  # were all in one row
    n_rows = max(1, round(starts[-1] / width))
    rows = [[] for _ in range(n_rows)]
    for tile, middle in zip(tiles, (starts[:-1] + starts[1:]) / 2):
        rows[int(n_rows * middle / starts[-1])].append(tile)
    rows = [[legend]] + [row for row in rows if row]
    heights = [max(tile.height for tile in row) for row in rows]
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
