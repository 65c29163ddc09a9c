"""A page to try a trained model in the browser: python predict.py CKPT --serve.

page.html holds all of it. This server tells it what there is (/start) and finds keypoints (/locate); it keeps
nothing. It can be asked without the page, too:

    curl --data-binary @photo.jpg "http://127.0.0.1:8000/locate?box=40,60,300,380&keypoints=nose:+the+tip"
"""

import io
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

from PIL import Image

from common import InputError
from predict import parse_box
from tools.keypoints import make_category, parse_keypoint
from tools.photos import open_photo
from tools.results import round_off

HERE = Path(__file__).parent
FILES = {"/": (HERE / "page.html", "text/html; charset=utf-8"),
         "/creature.jpg": (HERE.parent / "assets/toy/creature.jpg", "image/jpeg")}
EXAMPLE = {"photo": "/creature.jpg", "box": "70, 52, 125, 112",
           "keypoints": "knob: the knob on the antenna that is purple\n"
                        "horn tip: the sharp end of the green horn\n"
                        "heart: the orange heart painted on the body"}
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF"]  # what browsers show and Pillow reads by itself
MAX_BYTES, MAX_PIXELS = 25_000_000, 50_000_000  # of a photo
BOX_PIXELS = 1000  # across the box are enough; a JPEG that has more is read at 1/2, 1/4 or 1/8


def serve(locator, port, host=None):
    """Serves the page until Ctrl-C, to this computer only unless there is a host. InputError if it cannot."""
    with Server(locator, port, host) as server:
        if host:
            print(f"--host {host}: whoever reaches that address may use the model, without a password")
        print(f"http://{host or '127.0.0.1'}:{server.server_port}   (open it in a browser; Ctrl-C ends it)",
              flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


class Server(ThreadingHTTPServer):
    """A thread for each request. One photo at a time is decoded and looked at."""

    def __init__(self, locator, port, host=None):
        try:
            super().__init__((host or "127.0.0.1", port), Handler)
        except (OSError, OverflowError) as e:
            where = f"--port {port}" if host is None else f"--host {host} --port {port}"
            raise InputError(f"{where}: cannot be opened ({e}); take another") from None
        self.locator, self.turn, self.is_local = locator, threading.Lock(), host is None
        names = {}  # one for each set of keypoints, though categories share some; the checkpoint's come first
        for name, category in locator.sets.items():
            names.setdefault(tuple(category.keypoints), name)
        sets = {name: "\n".join(f"{keypoint}: {text}" for keypoint, text in keypoints)
                for keypoints, name in names.items()}
        # By the names of a set's keypoints, so that a description may be changed on the page.
        self.skeletons = {tuple(dict(category.keypoints)): category.skeleton
                          for category in locator.sets.values() if category.skeleton}
        # The example is for models that were trained with some of its words: those of the toy.
        words = {parse_keypoint(line)[1] for line in EXAMPLE["keypoints"].splitlines()}
        is_toy = any(text in words for keypoints in names for _, text in keypoints)
        self.start = {"sets": sets, "max_bytes": MAX_BYTES, "example": EXAMPLE if is_toy else None}


class Handler(BaseHTTPRequestHandler):
    """Answers one request, what is wrong with {"error": in words}."""

    timeout = 60  # seconds that the other side may be silent

    def do_GET(self):
        if self.is_foreign():
            self.reply(403, {"error": "only for this computer"})
        elif self.path in FILES:
            file, kind = FILES[self.path]
            self.reply(200, file.read_bytes(), kind)
        elif self.path == "/start":
            self.reply(200, self.server.start)
        else:
            self.reply(404, {"error": f"{self.path}: there is no such page"})

    def do_POST(self):
        path, _, query = self.path.partition("?")
        length = self.headers.get("Content-Length", "")
        if self.is_foreign():
            self.reply(403, {"error": "only for this computer"})
        elif path != "/locate":
            self.reply(404, {"error": f"{path}: there is no such page"})
        elif not length.isdecimal():
            self.reply(411, {"error": "the length of the photo is missing"})
        elif int(length) > MAX_BYTES:
            self.reply(413, {"error": f"the photo is larger than {MAX_BYTES / 1e6:g} MB; make it smaller"})
        else:
            try:
                self.reply(200, self.locate(self.rfile.read(int(length)), parse_qs(query)))
            except InputError as e:
                self.reply(400, {"error": str(e)})
            except ConnectionError:  # the page was left meanwhile
                pass

    def is_foreign(self):
        """Whether the browser was sent here by another name, as a page of another site might do.

        Any port will do, since a tunnel from another computer may have changed it.
        """
        host = self.headers.get("Host", "").partition(":")[0]
        return self.server.is_local and host not in ("127.0.0.1", "localhost")

    def locate(self, data, query):
        """The bytes of a photo and {"keypoints": [lines], "box": ["x,y,w,h"]} -> what the page shows."""
        lines = query.get("keypoints", [""])[0].splitlines()
        category = make_category(parse_keypoint(line) for line in lines if line.strip())
        box = parse_box(query.get("box", [""])[0])
        with self.server.turn:
            photo, size, shrink = read_photo(data, box)
            found = self.server.locator(photo, category, box and tuple(v / shrink for v in box))
        points = [{"name": name, "x": round_off(p.x and p.x * shrink), "y": round_off(p.y and p.y * shrink),
                   "confidence": round_off(p.confidence), "x_distribution": round_off(p.x_distribution),
                   "y_distribution": round_off(p.y_distribution)} for name, p in found.items()]
        [square] = {p.square for p in found.values()}
        return {"width": size[0], "height": size[1], "box": box, "square": [v * shrink for v in square],
                "points": points, "skeleton": self.server.skeletons.get(tuple(dict(category.keypoints)), [])}

    def reply(self, status, contents, kind="application/json"):
        """contents: bytes, or for JSON anything."""
        body = contents if isinstance(contents, bytes) else json.dumps(contents).encode()
        headers = {"Content-Type": kind, "Content-Length": len(body), "Cache-Control": "no-store"}
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:  # the page was left meanwhile
            pass

    def log_message(self, *_):
        pass


def read_photo(data, box):
    """The bytes of a photo -> RGB image, upright; the photo's own size; how many times smaller the image is.

    InputError if they are no photo, if it is too large, or if the box does not lie in it.
    """
    try:
        photo = Image.open(io.BytesIO(data), formats=FORMATS)
        if photo.width * photo.height > MAX_PIXELS:
            raise InputError(f"the photo has {photo.width} x {photo.height} pixels; make it smaller")
        width, height = photo.size
        side = max(1, min(max(photo.size), max(box[2:] if box else photo.size)))
        photo.draft(None, [math.ceil(BOX_PIXELS / side * n) for n in photo.size])
        photo.load()
        shrink = round(width / photo.width)
        upright = open_photo(photo)
    except InputError:
        raise
    except Exception:  # Pillow's decoders raise nearly anything
        raise InputError(f"not a readable photo: none of {', '.join(FORMATS)}, or damaged") from None
    size = (width, height) if upright.size == photo.size else (height, width)
    if box and not (0 < box[2] and 0 < box[3] and all(-w < x < n for x, w, n in zip(box[:2], box[2:], size))):
        raise InputError(f"box {','.join(f'{v:g}' for v in box)}: lies outside the photo, which is "
                         f"{size[0]} x {size[1]} pixels, or is empty")
    return upright, size, shrink
