"""Every picture that the programs make: an instance with its points, and sheets of several."""

import colorsys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common import InputError
from data import crop_of

FINE = 3  # pictures are drawn so many times larger and then reduced, for smooth edges
NAMES_PER_COLUMN = 23  # in a tile of 360 pixels
COLUMN_WIDTH = 190  # pixels


def make_palette(n):
    """n colours that are easy to tell apart on a photo."""
    colours = [colorsys.hsv_to_rgb(i / n, 0.85 if i % 2 else 0.6, 1) for i in range(n)]
    return [tuple(int(255 * c) for c in colour) for colour in colours]


def draw_instance(path, crop, names, predicted, annotated=None, side=360):
    """-> a picture: the crop with predicted points (dots) and annotated ones (rings), their names beside it.

    A line joins the dot and the ring of a point. Points are in pixels of the photo; None where there is none.
    """
    photo = Image.fromarray(crop.cut(path, side).permute(1, 2, 0).numpy())
    tile = Image.new("RGB", (side + COLUMN_WIDTH * -(-len(names) // NAMES_PER_COLUMN), side), "white")
    tile.paste(photo)
    large = tile.resize([FINE * n for n in tile.size])
    pen = ImageDraw.Draw(large)

    def disc(centre, radius, **style):
        x, y = centre
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], **style)

    def pixel(point):
        return tuple(FINE * side * crop.from_photo(np.array(point)))

    columns = [divmod(k, NAMES_PER_COLUMN) for k in range(len(names))]
    places = [(side + 12 + COLUMN_WIDTH * column, 15 + 15 * row) for column, row in columns]
    for k, colour in enumerate(make_palette(len(names))):
        if annotated is not None and annotated[k] is not None:
            if predicted[k]:
                pen.line([pixel(annotated[k]), pixel(predicted[k])], fill=colour, width=4)
            disc(pixel(annotated[k]), 17, outline="black", width=10)
            disc(pixel(annotated[k]), 15, outline=colour, width=6)
        if predicted[k]:
            disc(pixel(predicted[k]), 13, fill=colour, outline="black", width=3)
        fill = colour if predicted[k] else None
        disc([FINE * v for v in places[k]], 13, fill=fill, outline="black", width=3)
    tile = large.resize(tile.size, Image.Resampling.LANCZOS)
    pen, font = ImageDraw.Draw(tile), ImageFont.load_default(size=12)
    for (x, y), name in zip(places, names):
        pen.text((x + 10, y), name, fill="black", font=font, anchor="lm")
    return tile


def draw_sheet(path, instances, predicted, categories, images, n=12):
    """Draws n instances, three to a row: the first of each category, then the second of each, and so on."""
    turns, seen = [], Counter()
    for i, instance in enumerate(instances):
        turns.append((seen[instance.category_id], i))
        seen[instance.category_id] += 1
    tiles = []
    for _, i in sorted(turns)[:n]:
        instance, category = instances[i], categories[instances[i].category_id]
        annotated = [tuple(p) if v else None for p, v in zip(instance.keypoints, instance.visible)]
        names = [name for name, _ in category.keypoints]
        photo = Path(images, instance.photo)
        tiles.append((category.name,
                      draw_instance(photo, crop_of(instance), names, predicted[i], annotated)))
    rows = [tiles[i:i + 3] for i in range(0, len(tiles), 3)]
    width = max(sum(tile.width + 16 for _, tile in row) for row in rows) + 16
    height = 56 + sum(max(tile.height for _, tile in row) + 40 for row in rows)
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    pen.text((16, 14), "dot: predicted    ring: annotated    a long line is a large error", "black", font)
    y = 56
    for row in rows:
        x = 16
        for name, tile in row:
            pen.text((x, y - 4), name, "black", font)
            sheet.paste(tile, (x, y + 20))
            x += tile.width + 16
        y += max(tile.height for _, tile in row) + 40
    save_picture(sheet, path)


def save_picture(picture, path):
    """Writes a picture. InputError if that cannot be done."""
    try:
        picture.save(path)
    except (OSError, ValueError) as e:  # ValueError: a name whose ending is no kind of picture
        raise InputError(f"{path}: the picture cannot be written ({e})") from None
