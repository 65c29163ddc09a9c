"""The curves of a training run, drawn from its log.jsonl: loss, learning rate and validation over the steps.

    python -m tools.curve runs/split1        writes runs/split1/curve.png, as train.py does when it saves
"""

import io
import json
import math
from pathlib import Path
from statistics import fmean

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common import InputError, Parser, run, write_whole

SIZE = WIDTH, HEIGHT = 900, 200  # pixels of a panel
LEFT, RIGHT, TOP, BOTTOM = 80, 20, 34, 24  # its margins
FAINT, STRONG = (170, 195, 225), (30, 80, 160)


def read_curve(path, key):
    """[(step, value), ...] of the lines of log.jsonl that have such a value. The last of a step counts."""
    values = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(line)
            if math.isfinite(line[key]):
                values[line["step"]] = line[key]
        except (ValueError, TypeError, KeyError):  # cut off by a kill, or a line of another kind
            pass
    return sorted(values.items())


def smooth(points, n=50):
    """Each value replaced by the mean of the last n."""
    values = [value for _, value in points]
    return [(step, fmean(values[max(0, i - n):i])) for i, (step, _) in enumerate(points, 1)]


def draw_panel(title, curves, last_step):
    """Curves, lists of (step, value) -> a picture with axes. The last curve is strong, the others faint."""
    panel = Image.new("RGB", SIZE, "white")
    pen, font = ImageDraw.Draw(panel), ImageFont.load_default(size=13)
    values = [value for curve in curves for _, value in curve]
    low, high = min(values), max(values)

    def pixel(point):
        return (LEFT + (WIDTH - LEFT - RIGHT) * point[0] / last_step,
                TOP + (HEIGHT - TOP - BOTTOM) * (high - point[1]) / ((high - low) or 1))

    pen.rectangle([LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM], outline="lightgrey")
    pen.text((LEFT, TOP - 8), f"{title}: {curves[-1][-1][1]:.4g}", "black", font, anchor="ls")
    for value in {low, high}:
        pen.text((LEFT - 8, pixel((0, value))[1]), f"{value:.3g}", "black", font, anchor="rm")
    for step, anchor in (0, "lt"), (last_step, "rt"):
        pen.text((pixel((step, low))[0], HEIGHT - BOTTOM + 6), f"step {step}", "black", font, anchor=anchor)
    for curve in curves:
        colour = STRONG if curve is curves[-1] else FAINT
        pen.line([pixel(point) for point in curve], fill=colour, width=2)
        if len(curve) < 30:
            for x, y in map(pixel, curve):
                pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
    return panel


def draw_curve(folder):
    """Writes curve.png into a run's folder."""
    path = Path(folder, "log.jsonl")
    if not path.is_file() or not (loss := read_curve(path, "loss")):
        raise InputError(f"{path}: no step of a training in it")
    panels = [draw_panel(title, curves, max(1, loss[-1][0])) for title, curves in (
        ("loss, and its mean over 50 steps", [loss, smooth(loss)]),
        ("learning rate", [read_curve(path, "lr")]),
        ("PCK@0.2 of the validation, in %", [[(step, 100 * v) for step, v in read_curve(path, "PCK@0.2")]])
    ) if curves[-1]]
    png = io.BytesIO()
    Image.fromarray(np.vstack(panels)).save(png, "PNG")
    write_whole(path.with_name("curve.png"), png.getvalue())


def main(argv):
    parser = Parser(description="Draws a run's curves.")
    parser.add_argument("folder", help="of the run, with its log.jsonl")
    draw_curve(parser.parse_args(argv).folder)


if __name__ == "__main__":
    run(main)
