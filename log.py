"""What a training run tells while it runs: log.jsonl and curve.png in its folder.

Nothing here comes from the paper, so a reader may skip this file. log.jsonl has a line of JSON for each step,

    {"step": 7, "epoch": 1, "loss": 1.23, "lr": 0.0005, "norm": 0.8, "tokens_per_second": 5100,
     "gib": 21.5, "seconds": 9.8, "waited": 0.02}

where seconds are the step's own, without planning an epoch, saving and validating, and waited is their share
without data, and for each validation: {"step": 100, "PCK@0.2": 0.61, "objects": 100}.
"""

import io
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from common import InputError, read_json_lines, write_whole

SIZE = WIDTH, HEIGHT = 900, 200  # pixels of a panel
LEFT, RIGHT, TOP, BOTTOM = 80, 20, 34, 24  # its margins
FAINT, STRONG = (170, 195, 225), (30, 80, 160)


def read_log(path):
    """log.jsonl -> its lines as dictionaries."""
    lines = read_json_lines(path) if path.exists() else []
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


class Log:
    """Writes a run's log.jsonl from the step on where the run starts or resumes.

    Lines of later steps, which a run that was killed may have left, are dropped: these steps are done again.
    Without a folder, in all processes but the first, nothing is written.
    """

    def __init__(self, folder, step):
        self.path, self.lines = None, []
        if folder is None:
            return
        self.path = Path(folder, "log.jsonl")
        try:
            self.lines = [line for line in read_log(self.path) if line["step"] <= step]
        except OSError as e:
            raise InputError(f"{self.path}: cannot be read ({e})") from None
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())

    def write(self, **line):
        if self.path is None:
            return
        self.lines.append(line)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as e:
            raise InputError(f"{self.path}: cannot be written ({e}); the checkpoint of an earlier step was "
                             "not touched") from None

    def series(self, key):
        """[(step, value), ...] of the lines that have such a value."""
        return [(line["step"], line[key]) for line in self.lines if key in line]

    def draw(self):
        """Writes curve.png: loss, learning rate and, if there is any, validation over the steps."""
        loss = self.series("loss")
        panels = [("loss, and its mean over 50 steps", [loss, smooth(loss)]),
                  ("learning rate", [self.series("lr")])]
        if scores := self.series("PCK@0.2"):
            percent = [(step, 100 * score) for step, score in scores]  # as reports are printed
            panels.append(("PCK@0.2 of the validation, in %", [percent]))
        sheet = Image.new("RGB", (WIDTH, HEIGHT * len(panels)), "white")
        for i, (title, curves) in enumerate(panels):
            sheet.paste(draw_panel(title, curves, max(step for step, _ in loss)), (0, i * HEIGHT))
        file = io.BytesIO()
        sheet.save(file, "PNG")
        write_whole(self.path.with_name("curve.png"), file.getvalue())


def smooth(points, n=50):
    """Each value replaced by the mean of the last n."""
    windows = [[value for _, value in points[max(0, i - n):i]] for i in range(1, len(points) + 1)]
    return [(step, sum(window) / len(window)) for (step, _), window in zip(points, windows)]


def draw_panel(title, curves, last_step):
    """Curves, lists of (step, value) -> a picture with axes. The last curve is strong, the others faint."""
    panel = Image.new("RGB", SIZE, "white")
    pen, font = ImageDraw.Draw(panel), ImageFont.load_default(size=13)
    values = [value for curve in curves for _, value in curve]
    low, high = min(values), max(values)

    def pixel(point):
        x = LEFT + (WIDTH - LEFT - RIGHT) * point[0] / last_step
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - point[1]) / ((high - low) or 1)
        return x, y

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
