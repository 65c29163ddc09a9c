"""Keypoints in a film: frames come and go through ffmpeg, which must be on the PATH.

In its pipes a frame is a PPM picture: the lines "P6", width and height, "255", and then the pixels. In
keypoints.csv frames count from 0. The annotated film has no sound.
"""

import csv
import json
import math
import os
import shutil
import tempfile
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from subprocess import PIPE, Popen
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from common import InputError, make_folder, reading
from tools.draw import PAPER, Mark, draw_marks, make_name, make_palette, write
from tools.photos import check_box, keep_out
from tools.results import round_off


class Film(NamedTuple):
    path: Path
    rate: str  # frames in a second, for example "30000/1001"
    n_frames: int  # about


def open_film(args):
    """The film that predict.py was given -> Film. InputError if anything is wrong with it or with args."""
    [path] = args.photos
    if not path.is_file():
        raise InputError(f"{path}: no such film")
    if missing := [program for program in ("ffmpeg", "ffprobe") if not shutil.which(program)]:
        raise InputError(f"{path}: films need {' and '.join(missing)} on the PATH; install ffmpeg, or give "
                         "the frames as photos")
    if not args.out or args.format != "plain":
        raise InputError(f"{path}: a film needs --out DIR; --format is for photos")
    keep_out(args.out, [path])
    make_folder(args.out)
    wanted = "stream=avg_frame_rate,nb_frames:format=duration"
    with reading(path), start(path, "ffprobe", "-select_streams", "v:0", "-show_entries", wanted,
                              "-of", "json", f"file:{path}", stdout=PIPE) as probe:
        facts = json.loads(probe.stdout.read() or "{}")
    with reading(path, "has it pictures?"):
        [stream] = facts["streams"]
        rate = stream["avg_frame_rate"]
        rate = "25" if rate.startswith("0/") else rate  # some films do not say it
        n_frames = stream.get("nb_frames") or float(facts["format"].get("duration", 0)) * Fraction(rate)
    film = Film(path, rate, int(n_frames))
    for frame in read_frames(film):
        check_box(args.box, frame)
        return film
    raise InputError(f"{path}: no frame in it can be read")


def name_film(out, path):
    return out / f"{path.stem}.mp4"


@contextmanager
def start(path, program, *arguments, **pipes):
    """ffmpeg or ffprobe at work on a film -> the process. If it fails, InputError has its words."""
    command = [program, "-v", "error", *arguments]
    with tempfile.TemporaryFile() as said, Popen(command, stderr=said, **pipes) as process:
        try:
            yield process
        except BrokenPipeError:  # it has ended before us
            pass
        except BaseException:
            process.kill()
            process.communicate()
            raise
        process.communicate()  # closes its input and waits
        if process.returncode:
            said.seek(0)
            lines = said.read().decode(errors="replace").split("\n")
            raise InputError(f"{path}: {program} failed: {next(filter(None, lines), process.returncode)}")


def read_frames(film):
    """Yields all frames as RGB images, upright."""
    with start(film.path, "ffmpeg", "-nostdin", "-i", f"file:{film.path}", "-r", film.rate,
               "-pix_fmt", "rgb24", "-f", "image2pipe", "-c:v", "ppm", "-", stdout=PIPE) as process:
        while process.stdout.readline():
            width, height = map(int, process.stdout.readline().split())
            process.stdout.readline()
            pixels = process.stdout.read(3 * width * height)
            if len(pixels) == 3 * width * height:
                yield Image.frombytes("RGB", (width, height), pixels)


def annotate(film, category, args, locator):
    """Asks about all frames, args.batch at a time. Leaves keypoints.csv and an annotated film in args.out."""
    target, frames, n = name_film(args.out, film.path), read_frames(film), 0
    part = target.with_name(f"{target.stem}.part.mp4")
    writer = start(film.path, "ffmpeg", "-y", "-f", "image2pipe", "-framerate", film.rate, "-c:v", "ppm",
                   "-i", "-", "-pix_fmt", "yuv420p", f"file:{part}", stdin=PIPE)
    try:
        text = open(args.out / "keypoints.csv", "w", newline="", encoding="utf-8-sig")
    except OSError as e:
        raise InputError(f"{args.out}/keypoints.csv: cannot be written ({e})") from e
    bar = tqdm(total=film.n_frames or None, unit=" frames", dynamic_ncols=True)
    try:
        with text, writer as process, bar:
            table = csv.writer(text)
            table.writerow(("frame", "seconds", "keypoint", "x", "y", "confidence"))
            while batch := list(islice(frames, args.batch)):
                for frame, points in zip(batch, locator(batch, category, [args.box] * len(batch))):
                    seconds = round(float(n / Fraction(film.rate)), 3)
                    table.writerows((n, seconds, name, *map(round_off, (p.x, p.y, p.confidence)))
                                    for name, p in points.items())
                    picture = draw_frame(frame, args.box, category, points, args.threshold)
                    picture.save(process.stdin, "PPM")
                    n += 1
                bar.update(len(batch))
        os.replace(part, target)
    finally:
        frames.close()
        part.unlink(missing_ok=True)
    print(f"wrote {target} and {args.out}/keypoints.csv: {n} frames")


def draw_frame(frame, box, category, points, threshold):
    """A frame with its points and, on its right, a key to their colours. The size is that of every frame."""
    size, left, texts, key = max(10, frame.height // 40), frame.width, [], []
    names = [make_name(name, k, size, 15 * size) for k, (name, _) in enumerate(category.keypoints)]
    colours, n_rows = make_palette(names), max(1, int(frame.height / (1.5 * size)))
    for first in range(0, len(names), n_rows):
        for row, k in enumerate(range(first, min(first + n_rows, len(names)))):
            x, y = left + size, (row + 0.5) * 1.5 * size
            key.append(Mark((x, y), None, False, colours[k], []))
            texts.append(write((x + size, y), names[k], size))
        left += 3 * size + max(font.getlength(letters) for _, letters, font, *_ in texts[first:])
    marks = []
    for p, colour in zip(points.values(), colours):
        place = None if p.x is None else tuple(np.clip((p.x, p.y), 0, frame.size).tolist())
        marks.append(Mark(place, None, p.confidence is not None and p.confidence < threshold, colour, []))
    # mp4 wants even numbers of pixels
    canvas = Image.new("RGB", (2 * math.ceil(left / 2), 2 * math.ceil(frame.height / 2)), PAPER)
    canvas.paste(frame)
    x, y, w, h = box or (0, 0, *frame.size)
    corners = [(x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y)] if box else ()
    draw_marks(canvas, (0, 0), marks + key, max(2, max(frame.size) / 180), category.skeleton, (), corners)
    pen = ImageDraw.Draw(canvas)
    for place, letters, font, colour, anchor in texts:
        pen.text(place, letters, colour, font, anchor)
    return canvas
