"""A page to try a trained model in the browser: python predict.py CKPT --serve.

page.html holds all of it. This server, for your own computer only, tells it what there is (/start) and finds
keypoints (/locate); it keeps nothing. It can be asked without the page, too:

    curl --data-binary @photo.jpg "http://127.0.0.1:8000/locate?box=40,60,300,380&keypoints=nose:+the+tip"
"""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

from PIL import Image

from annotations import UNREADABLE
from common import InputError
from locator import make_category, open_photo, parse_box, parse_keypoint, round_off

FOLDER = Path(__file__).parent
FILES = {"/": ("page.html", "text/html; charset=utf-8"),
         "/creature.jpg": ("assets/toy/creature.jpg", "image/jpeg")}
EXAMPLE = {"photo": "/creature.jpg", "box": "70, 52, 125, 112",
           "keypoints": "knob: the knob on the antenna that is purple\n"
                        "horn tip: the sharp end of the green horn\n"
                        "heart: the orange heart painted on the body"}
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP"]  # what browsers show and Pillow reads by itself
MAX_BYTES, MAX_PIXELS = 25_000_000, 50_000_000  # of a photo
POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
          "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def serve(locator, port):
    """Serves the page until Ctrl-C. InputError if the port is not free."""
    with Server(locator, port) as server:
        print(f"http://127.0.0.1:{server.server_port}   (open it in a browser; Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


class Server(ThreadingHTTPServer):
    """A thread for each request. They take turns at the network."""

    def __init__(self, locator, port):
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as e:
            raise InputError(f"--port {port}: cannot be opened ({e}); take another") from None
        self.locator, self.turn = locator, threading.Lock()
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
            self.reply(403, {"error": "only for a page of this address"})
        elif self.path in FILES:
            file, kind = FILES[self.path]
            self.reply(200, (FOLDER / file).read_bytes(), kind)
        elif self.path == "/start":
            self.reply(200, self.server.start)
        else:
            self.reply(404, {"error": f"{self.path}: there is no such page"})

    def do_POST(self):
        path, _, query = self.path.partition("?")
        length = self.headers.get("Content-Length", "")
        if self.is_foreign():
            self.reply(403, {"error": "only for a page of this address"})
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

    def is_foreign(self):
        """Whether a page of another site asks, even if its name leads to this computer (DNS rebinding).

        Any port will do, since a tunnel from another computer may have changed it.
        """
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin", f"http://{host}")
        return host.partition(":")[0] not in ("127.0.0.1", "localhost") or origin != f"http://{host}"

    def locate(self, data, query):
        """The bytes of a photo and {"keypoints": [lines], "box": ["x,y,w,h"]} -> what the page shows."""
        lines = query.get("keypoints", [""])[0].splitlines()
        category = make_category(parse_keypoint(line) for line in lines if line.strip())
        box, photo = parse_box(query.get("box", [""])[0]), read_photo(data)
        with self.server.turn:
            found = self.server.locator(photo, category, box)
        parts = ["x", "y", "confidence", "x_distribution", "y_distribution"]
        points = [{"name": name, **{part: round_off(getattr(p, part)) for part in parts}}
                  for name, p in found.items()]
        [square] = {p.square for p in found.values()}
        return {"width": photo.width, "height": photo.height, "box": box, "square": square, "points": points,
                "skeleton": self.server.skeletons.get(tuple(dict(category.keypoints)), [])}

    def reply(self, status, contents, kind="application/json"):
        """contents: bytes, or for JSON anything."""
        body = contents if isinstance(contents, bytes) else json.dumps(contents).encode()
        headers = {"Content-Type": kind, "Content-Length": len(body), "Content-Security-Policy": POLICY,
                   "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
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


def read_photo(data):
    """The bytes of a photo -> RGB image, upright. InputError if they are none, or if it is too large."""
    try:
        photo = Image.open(io.BytesIO(data), formats=FORMATS)
        if photo.width * photo.height <= MAX_PIXELS:
            return open_photo(photo)
    except UNREADABLE:
        raise InputError(f"not a readable photo: none of {', '.join(FORMATS)}, or damaged") from None
    raise InputError(f"the photo has {photo.width} x {photo.height} pixels; make it smaller")
