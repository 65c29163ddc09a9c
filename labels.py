"""The names of a picture's marks: their colours, letters that are readable, and places that leave room.

A mark is a point in a picture, a leader the line from there to its label. Places are (x, y) in pixels.
"""

import colorsys
import math
import re
from collections import Counter
from functools import cache
from itertools import combinations

import numpy as np
from PIL import ImageFont

HUES = {"left": (0.88, 1.17), "right": (0.48, 0.78), "middle": (0.23, 0.42), "any": (0, 1)}
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "arial.ttf",
         "Arial Unicode.ttf", "msgothic.ttc", "seguiemj.ttf")  # asked for letters that Pillow's font lacks


# --------------------------------------------------------------------------------------- colours and letters


def make_palette(names):
    """A colour for each name: warm for left, cold for right, else green; all hues if most have no side."""
    found = [re.findall(r"\b(left|right)\b", name.lower()) for name in names]
    sides = [words[0] if words else "middle" for words in found]
    if not {"left", "right"} <= {*sides} or 2 * sides.count("middle") > len(names):
        sides = ["any"] * len(names)
    colours, seen = [], Counter()
    for k, side in enumerate(sides):
        low, high = HUES[side]
        hue = (low + (high - low) * seen[side] / sides.count(side)) % 1
        colours.append(tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.9 if k % 2 else 0.65, 1)))
        seen[side] += 1
    return colours


@cache
def find_fonts(size):
    """Pillow's own font, and those of FONTS that the system has."""
    fonts = [ImageFont.load_default(size)]
    for file in FONTS:
        try:
            fonts.append(ImageFont.truetype(file, size))
        except OSError:
            pass
    return fonts


@cache
def has_letter(font, letter):
    """A font draws the same box for all letters that it lacks."""
    def look(c):
        mask = font.getmask(c)
        return mask.size, bytes(mask)
    return letter == " " or letter.isprintable() and look(letter) != look("\U0010fffd")


def choose_font(text, size):
    """-> the first of the fonts that have most of its letters, and the text with "?" for those it lacks."""
    font = max(find_fonts(size), key=lambda font: sum(has_letter(font, c) for c in text))
    return font, "".join(c if has_letter(font, c) else "?" for c in text)


def fit(text, size, width):
    """The text, or as much of its beginning as is at most `width` pixels wide with an ellipsis."""
    font, text = choose_font(text, size)
    cuts = [text, *(text[:n].rstrip() + "…" for n in range(len(text), 0, -1))]
    return next((cut for cut in cuts if font.getlength(cut) <= width), "…")


def wrap(text, size, width):
    """Lines of a text that are at most `width` pixels wide."""
    (font, text), lines = choose_font(text, size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [fit(line, size, width) for line in lines]


def spell_name(name, k, size, width):
    """Keypoint k's name on one line that fits; "keypoint 3" if no font has any of its letters."""
    name = " ".join(name.split())
    return fit(name if choose_font(name, size)[1].strip("? ") else f"keypoint {k + 1}", size, width)


# --------------------------------------------------------------------------------------------------- places


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


def place_columns(places, left, right, gap, height):
    """As place_column(), in one of two columns: the nearer, but not more than 60 percent in either."""
    order, n = sorted(range(len(places)), key=lambda k: places[k][0]), len(places)
    most = min(n, max(3, math.ceil(0.6 * n)))
    n_left = min(max(sum(2 * x < left + right for x, _ in places), n - most), most)
    ends = [None] * n
    for x, members in ((left, order[:n_left]), (right, order[n_left:])):
        if members:
            for k, end in zip(members, place_column([places[k] for k in members], x, gap, height)):
                ends[k] = end
    return ends


def place_numbers(places, sizes, radius):
    """Centres of numbers beside their marks, as clear of each other and of all marks as can be."""
    places, sizes, centres = np.reshape(places, (-1, 2)), np.reshape(sizes, (-1, 2)) / 2, []
    low, high = places - radius, places + radius  # corners of what is taken
    turns = np.tile(np.arange(16) * math.pi / 8, 3)
    ways, far = np.stack((np.cos(turns), np.sin(turns)), 1), np.repeat((1.2, 2, 3), 16)[:, None]
    for place, half in zip(places, sizes):
        around = place + ways * (radius * far + half)
        overlap = np.minimum(high, (around + half)[:, None]) - np.maximum(low, (around - half)[:, None])
        best = around[overlap.clip(0).prod(-1).sum(1).argmin()]
        low, high = np.concatenate((low, [best - half])), np.concatenate((high, [best + half]))
        centres.append(tuple(best.tolist()))
    return centres
