"""tools/page.py and page.html: what the server answers and refuses, and the page in a real browser."""

import http.client
import io
import json
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from html import unescape
from types import SimpleNamespace
from urllib.parse import urlencode

import pytest
from conftest import ROOT
from PIL import Image

from chat import Category
from common import InputError
from predict import Locator
from tools import page as page_module
from tools.results import round_off

CREATURE = ROOT / "assets/toy/creature.jpg"
JPEG, BOX = CREATURE.read_bytes(), (70, 52, 125, 112)
WORDS = {"knob": "the knob on the antenna that is purple", "horn tip": "the sharp end of the green horn",
         "heart": "the orange heart painted on the body"}
LINES = "\n".join(f"{name}: {text}" for name, text in WORDS.items())
PARTS = ["x", "y", "confidence", "x_distribution", "y_distribution"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SMALL, TURNED = Image.new("RGB", (40, 20)), Image.Exif()
TURNED[0x0112] = 6  # to be turned by 90 degrees


@contextmanager
def serving(locator):
    """-> the port of a server in a thread."""
    with page_module.Server(locator, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture(scope="module")
def locator():
    return Locator(ROOT / "assets/toy/ckpt.pt", decode="median")


@pytest.fixture(scope="module")
def port(locator):
    with serving(locator) as port:
        yield port


class Stub:
    """Stands in for a Locator: the same point for all keypoints."""

    def __init__(self, sets={}, **point):
        self.sets, self.asked = sets, []
        self.point = dict.fromkeys(PARTS) | {"x": 1.0, "y": 2.0, "square": (0, 0, 9)} | point

    def __call__(self, photo, category, box):
        self.asked.append((photo.size, box))
        return dict.fromkeys(dict(category.keypoints), SimpleNamespace(**self.point))


def ask(port, method, path, body=b"", **headers):
    """-> status and what was answered, JSON or bytes. A header that is None is not sent."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in ({"Content-Length": str(len(body))} | headers).items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    response = connection.getresponse()
    content = response.read()
    return response.status, json.loads(content) if content.startswith(b"{") else content


def locate(port, photo, words=LINES, box=""):
    return ask(port, "POST", f"/locate?{urlencode({'keypoints': words, 'box': box})}", photo)


def encode(photo, form="PNG", **options):
    file = io.BytesIO()
    photo.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("box", [BOX, None])
def test_points_are_the_locators(locator, port, box):
    status, answer = locate(port, JPEG, box=",".join(map(str, box or ())))
    assert status == 200 and (answer["width"], answer["height"], answer["box"]) == (247, 247, box and [*box])
    for point, (name, found) in zip(answer["points"], locator(CREATURE, WORDS, box).items(), strict=True):
        assert point["name"] == name and tuple(answer["square"]) == found.square
        for part in PARTS:
            assert point[part] == pytest.approx(getattr(found, part), abs=1e-6 if "_" in part else 0.0051)


def test_a_large_photo_is_read_reduced_and_answered_in_its_own_pixels():
    stub, photo = Stub(), encode(Image.new("CMYK", (4000, 3000)), "JPEG", exif=TURNED)
    with serving(stub) as port:
        answers = [locate(port, photo, "a: b", box)[1] for box in ("", "0,800,1500,2000", "800,0,400,160")]
        assert "3000 x 4000 pixels" in locate(port, photo, "a: b", "3500,0,300,300")[1]["error"]
    assert stub.asked == [((750, 1000), None), ((1500, 2000), (0, 400, 750, 1000)),
                          ((3000, 4000), (800, 0, 400, 160))]
    assert [(a["points"][0]["x"], a["points"][0]["y"], a["square"][2], a["width"], a["height"])
            for a in answers] == [(4, 8, 36, 3000, 4000), (2, 4, 18, 3000, 4000), (1, 2, 9, 3000, 4000)]


def test_the_start_tells_sets_once_and_an_example_if_the_model_is_the_toys(port):
    """Sets have skeletons, and points may lack coordinates."""
    cat, bird = Category("cat", [("tail", "the end")]), Category("bird", [("a", "b"), ("c", "d")], [(0, 1)])
    with serving(Stub({"pets": cat, "cat": cat, "Bird": bird}, x=None, y=None)) as other:
        assert ask(other, "GET", "/start")[1] == {
            "sets": {"pets": "tail: the end", "Bird": "a: b\nc: d"}, "example": None,
            "max_bytes": page_module.MAX_BYTES}
        answer = locate(other, encode(SMALL), "a: my words\nc: d")[1]
        assert answer["points"][1] == {"name": "c"} | dict.fromkeys(PARTS) and answer["skeleton"] == [[0, 1]]
    _, start = ask(port, "GET", "/start")
    assert start["example"]["keypoints"] == LINES
    assert ask(port, "GET", start["example"]["photo"]) == (200, JPEG)
    longest = max(start["sets"].values(), key=len)
    assert len(locate(port, JPEG, longest)[1]["points"]) == 68  # it fits into an address


@pytest.mark.parametrize("photo, box, words, message", [
    (JPEG, "1,2,3", LINES, 'box "1,2,3": write x, y, width, height'),
    (JPEG, "nan,0,9,9", LINES, "lies outside the photo, which is 247 x 247 pixels"),
    (JPEG, "", " \n", "no keypoint is asked for"),
    (JPEG, "", "/etc/names.txt", "has no description"),  # no file is read
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "", LINES, "not a readable"),  # for Ghostscript
    (encode(Image.new("1", (10_000, 5_001))), "", LINES, "has 10000 x 5001 pixels; make it smaller")])
def test_slips_are_answered_in_words(port, photo, box, words, message):
    status, answer = locate(port, photo, words, box)
    assert status == 400 and message in answer["error"]


def test_other_addresses_names_and_uploads_that_are_large_or_of_unknown_length_are_refused(port):
    for method, path in ("GET", "/page.py"), ("GET", "/../README.md"), ("POST", "/"):
        assert ask(port, method, path)[0] == 404
    for length, status in (None, 411), ("-1", 411), ("many", 411), ("25000001", 413):
        assert ask(port, "POST", "/locate", **{"Content-Length": length})[0] == status
    for host, is_refused in (("127.0.0.1:9", False), ("localhost", False), ("evil.example", True),
                             ("127.0.0.1.evil.example", True), (None, True)):
        for method, path in ("GET", "/"), ("GET", "/start"), ("POST", "/locate"):
            assert (ask(port, method, path, Host=host)[0] == 403) == is_refused


def test_a_page_that_is_closed_during_an_upload_is_no_defect(port, monkeypatch):
    ended, defects = threading.Event(), []
    server, close = page_module.ThreadingHTTPServer, page_module.ThreadingHTTPServer.shutdown_request
    monkeypatch.setattr(server, "handle_error", lambda *_: defects.append(sys.exc_info()))
    monkeypatch.setattr(server, "shutdown_request", lambda *request: (close(*request), ended.set()))
    with socket.create_connection(("127.0.0.1", port)) as left:
        left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
        left.sendall(b"POST /locate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n\r\n12")
        time.sleep(0.2)  # the server waits for the rest
    assert ended.wait(10) and not defects


@pytest.mark.parametrize("host", [None, "0.0.0.0"])
def test_it_serves_this_computer_only_unless_told(monkeypatch, capsys, host):
    def serve_forever(server):
        assert server.server_address[0] == (host or "127.0.0.1")
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert ask(server.server_port, "GET", "/", Host="my-computer")[0] == (200 if host else 403)
        raise KeyboardInterrupt
    monkeypatch.setattr(page_module.Server, "serve_forever", serve_forever)
    page_module.serve(Stub(), 0, host)
    assert ("whoever reaches that address" in capsys.readouterr().out) == bool(host)
    with pytest.raises(InputError, match=r"--port 70000: cannot be opened .*; take another$"):
        page_module.serve(Stub(), 70_000, host)


DRIVER = """<script>(async () => {
  const seen = {errors: []}, wait = async (what) => {
    for (let n = 0; !what() && n < 1000; n++) await new Promise((done) => setTimeout(done, 20)); };
  const colour = (x, y) => [...pen.getImageData(x * canvas.width / 247, y * canvas.width / 247, 1, 1).data];
  const mouse = (what, x, y) => {
    const {left, top, width} = canvas.getBoundingClientRect(), place = (n) => n * width / 247;
    canvas.dispatchEvent(new PointerEvent(what, {clientX: left + place(x), clientY: top + place(y)})); };
  const drop = async (parts, name) => {
    const data = new DataTransfer();
    data.items.add(new File(parts, name));
    photo = null;
    document.dispatchEvent(new DragEvent("drop", {dataTransfer: data, cancelable: true}));
    await wait(() => photo || !$("error").hidden);
    seen.errors.push($("error").textContent); };
  window.onerror = (message) => seen.errors.push(message);
  canvas.setPointerCapture = () => {};  // which knows real mice only
  download = (blob) => { seen.saved = blob; };
  await wait(() => !$("example").hidden);
  await drop(["no photo"], "mine.jpg");
  await drop([new Uint8Array(25_000_001)], "mine.jpg");
  await drop([await (await fetch("/creature.jpg")).blob()], "creature.jpg");
  mouse("pointerdown", 70, 164);  // from the lower left corner to the upper right
  mouse("pointermove", 120, 100);
  mouse("pointermove", 195, 52);
  mouse("pointerup", 195, 52);
  $("words").value = "nose";
  $("find").click();
  await wait(() => !$("error").hidden);
  seen.errors.push($("error").textContent);
  $("words").value = WORDS;
  $("find").click();
  await wait(() => found);
  seen.list = [...$("list").children].map((item) => item.innerText.split("\\n"));
  seen.dots = found.points.map((point) => colour(point.x, point.y));
  seen.colours = [...$("list").querySelectorAll("i")].map((dot) => getComputedStyle(dot).backgroundColor);
  $("save").click();
  seen.saved = JSON.parse(await seen.saved.text());
  mouse("pointermove", found.points[1].x + 1, found.points[1].y);
  seen.heat = [colour(found.points[1].x - 6, found.points[1].y + 6), colour(20, 30)];
  document.body.textContent = "RESULT" + JSON.stringify(seen) + "RESULT";
})()</script>"""


def test_the_page_in_a_browser(locator, monkeypatch, tmp_path):
    """Photos that are dropped, a box that is dragged, slips, points found, their heat, and a file saved."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    html = (ROOT / "tools/page.html").read_text()
    (tmp_path / "page.html").write_text(html + DRIVER.replace("WORDS", json.dumps(LINES)))
    monkeypatch.setitem(page_module.FILES, "/", (tmp_path / "page.html", "text/html; charset=utf-8"))
    with serving(locator) as port:
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                   f"--user-data-dir={tmp_path}", "--window-size=1200,900", "--virtual-time-budget=60000",
                   "--dump-dom", f"http://127.0.0.1:{port}/"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=100).stdout
    seen = json.loads(unescape(shown.split("RESULT")[1]))
    not_a_photo, too_large, none, no_description = seen["errors"]
    assert "mine.jpg is not a photo" in not_a_photo and "mine.jpg is larger than 25 MB" in too_large
    assert none == "" and 'keypoint "nose" has no description' in no_description
    expected = locator(CREATURE, WORDS, BOX)
    assert seen["saved"] == [{"photo": "creature.jpg", "box": [*BOX], "keypoints": [
        {"name": name, **{part: round_off(getattr(p, part)) for part in PARTS[:3]}}
        for name, p in expected.items()]}]  # as predict.py writes it
    for (name, place, confidence), p in zip(seen["list"], expected.values(), strict=True):
        assert name in WORDS and confidence == f"{p.confidence:.2f}"
        assert json.loads(f"[{place}]") == pytest.approx([p.x, p.y], abs=0.51)
    assert [f"rgb({red}, {green}, {blue})" for red, green, blue, _ in seen["dots"]] == seen["colours"]
    (red, green, blue, _), (*elsewhere, _) = seen["heat"]
    assert red > 200 and red > green > blue and max(elsewhere) < 120  # warm where it is, dark where it is not
