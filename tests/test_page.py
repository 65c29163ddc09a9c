"""tools/page.py and page.html: what the server answers and refuses, and the page in a real browser."""

import http.client
import io
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from urllib.parse import urlencode

import numpy as np
import pytest
from browser import CHROMIUM, open_browser
from conftest import ROOT
from PIL import Image

from chat import Category
from common import InputError
from locator import Locator, open_photo, round_off
from tools import page as page_module

CREATURE = ROOT / "assets/toy/creature.jpg"
JPEG, BOX = CREATURE.read_bytes(), (70, 52, 125, 112)
WORDS = {"knob": "the knob on the antenna that is purple", "horn tip": "the sharp end of the green horn",
         "heart": "the orange heart painted on the body"}
LINES = "\n".join(f"{name}: {text}" for name, text in WORDS.items())
PARTS = ["x", "y", "confidence", "x_distribution", "y_distribution"]
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


def test_skeletons_and_points_without_coordinates():
    pet = Category("pet", [("nose", "the tip"), ("tail", "the end")], [(0, 1)])
    with serving(Stub({"pet": pet}, x=None, y=None)) as port:
        _, answer = locate(port, encode(SMALL), "nose: the very tip\ntail: the end")
        assert answer["points"][1] == {"name": "tail"} | dict.fromkeys(PARTS)
        assert answer["skeleton"] == [[0, 1]]
        assert locate(port, encode(SMALL), "tail: the end\nnose: the tip")[1]["skeleton"] == []


@pytest.mark.parametrize("form, options, size", [
    *((form, {}, (40, 20)) for form in page_module.FORMATS), ("JPEG", {"exif": TURNED}, (20, 40))])
def test_every_format_is_read_and_turned_upright(port, form, options, size):
    status, answer = locate(port, encode(SMALL, form, **options))
    assert status == 200 and (answer["width"], answer["height"]) == size


def test_a_large_photo_is_read_reduced_and_answered_in_its_own_pixels():
    stub, photo = Stub(), encode(Image.new("CMYK", (8000, 6000)), "JPEG", exif=TURNED)
    with serving(stub) as port:
        answers = [locate(port, photo, "a: b", box)[1] for box in ("", "0,800,3000,4000", "800,0,400,160")]
        outside = locate(port, photo, "a: b", "7000,0,3000,3000")[1]["error"]
    assert stub.asked == [((750, 1000), None), ((1500, 2000), (0, 200, 750, 1000)),
                          ((6000, 8000), (800, 0, 400, 160))]
    assert [(a["points"][0]["x"], a["points"][0]["y"], a["square"][2], a["width"], a["height"])
            for a in answers] == [(8, 16, 72, 6000, 8000), (4, 8, 36, 6000, 8000), (1, 2, 9, 6000, 8000)]
    assert outside == "box 7000,0,3000,3000: lies outside the photo, which is 6000 x 8000 pixels, or is empty"


def test_photos_take_turns(monkeypatch):
    inside, at_once, stub, read_photo = [], [], Stub(), page_module.read_photo

    def read_slowly(*args):
        inside.append(1)
        time.sleep(0.02)
        at_once.append(len(inside))
        return read_photo(*args)
    monkeypatch.setattr(page_module, "read_photo", read_slowly)
    stub.asked = SimpleNamespace(append=lambda _: (time.sleep(0.02), inside.pop()))
    with serving(stub) as port, ThreadPoolExecutor(5) as pool:
        assert [*pool.map(lambda _: locate(port, encode(SMALL), "a: b")[0], range(5))] == [200] * 5
    assert at_once == [1] * 5


def test_the_start_tells_sets_once_and_an_example_if_the_model_is_the_toys(port):
    cat, bird = Category("cat", [("tail", "the end")]), Category("bird", [("first mark", "the heart")])
    with serving(Stub({"pets": cat, "cat": cat, "Bird": bird})) as other:
        assert ask(other, "GET", "/start")[1] == {
            "sets": {"pets": "tail: the end", "Bird": "first mark: the heart"}, "example": None,
            "max_bytes": page_module.MAX_BYTES}
    _, start = ask(port, "GET", "/start")
    assert start["example"]["keypoints"] == LINES and start["example"]["box"] == ", ".join(map(str, BOX))
    assert ask(port, "GET", start["example"]["photo"]) == (200, JPEG)
    status, answer = locate(port, JPEG, max(start["sets"].values(), key=len))
    assert status == 200 and len(answer["points"]) == 68  # the longest question fits into an address


@pytest.mark.parametrize("photo, box, words, message", [
    (JPEG, "1,2,3", LINES, 'box "1,2,3": write x, y, width, height'),
    (JPEG, "nan,0,9,9", LINES, "lies outside the photo, which is 247 x 247 pixels"),
    (JPEG, "0,0,inf,nan", LINES, "box 0,0,inf,nan: lies outside the photo"),
    (JPEG, "", "a: b\na: c", 'two keypoints are named "a"'),
    (JPEG, "", " \n", 'no keypoint is asked for; write "name: where it is'),
    (JPEG, "", "/etc/names.txt", "has no description"),  # no file is read
    (JPEG[:3000], "", LINES, "not a readable photo: none of JPEG, PNG"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "", LINES, "not a readable"),  # for Ghostscript
    (encode(Image.new("1", (10_000, 5_001))), "", LINES, "has 10000 x 5001 pixels; make it smaller"),
])
def test_slips_are_answered_in_words(port, photo, box, words, message):
    status, answer = locate(port, photo, words, box)
    assert status == 400 and message in answer["error"]


def test_other_addresses_and_uploads_that_are_large_or_of_unknown_length_are_refused(port):
    for method, path in ("GET", "/page.py"), ("GET", "/../README.md"), ("GET", "/locate"), ("POST", "/"):
        assert ask(port, method, path)[0] == 404
    for length in None, "-1", "many":
        assert ask(port, "POST", "/locate", **{"Content-Length": length})[0] == 411
    assert ask(port, "POST", "/locate", **{"Content-Length": "25000001"})[0] == 413


@pytest.mark.parametrize("host, is_refused", [
    ("127.0.0.1:9", False), ("localhost", False), ("evil.example", True), ("127.0.0.1.evil.example", True),
    (None, True)])
def test_another_name_than_this_computers_is_refused(port, host, is_refused):
    for method, path in ("GET", "/"), ("GET", "/start"), ("POST", "/locate"):
        assert (ask(port, method, path, Host=host)[0] == 403) == is_refused


@pytest.mark.parametrize("host", [None, "0.0.0.0"])
def test_it_serves_this_computer_only_unless_told(monkeypatch, capsys, host):
    def serve_forever(server):
        assert server.server_address[0] == (host or "127.0.0.1")
        threading.Thread(target=lambda: [server.handle_request() for _ in range(2)], daemon=True).start()
        assert ask(server.server_port, "GET", "/")[1] == (ROOT / "tools/page.html").read_bytes()
        assert ask(server.server_port, "GET", "/", Host="my-computer")[0] == (200 if host else 403)
        raise KeyboardInterrupt
    monkeypatch.setattr(page_module.Server, "serve_forever", serve_forever)
    page_module.serve(Stub(), 0, host)
    assert ("whoever reaches that address" in capsys.readouterr().out) == bool(host)
    with pytest.raises(InputError, match=r"--port 70000: cannot be opened .*; take another$"):
        page_module.serve(Stub(), 70_000, host)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser, port):
    """The page as one finds it. It must not complain."""
    browser.send("Page.navigate", url=f"http://127.0.0.1:{port}/")
    browser.wait("document.readyState === 'complete' && photo === null && !$('example').hidden")
    yield browser
    browser.evaluate("0")
    assert browser.complaints == []


def choose(page, path):
    root = page.send("DOM.getDocument")["root"]["nodeId"]
    field = page.send("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    page.send("DOM.setFileInputFiles", nodeId=field, files=[str(path)])
    page.wait("photo !== null || !$('error').hidden")


def place_of(page, x, y):
    """Where on the screen a pixel of the photo is shown."""
    left, top, scale = page.evaluate("(({left, top, width}) => [left, top, width / photo.image.naturalWidth])"
                                     "(canvas.getBoundingClientRect())")
    return left + x * scale, top + y * scale


def colour_at(page, x, y):
    """Of the picture at a pixel of the photo."""
    scale = page.evaluate("canvas.width / photo.image.naturalWidth")
    pixel = f"pen.getImageData({int(x * scale)}, {int(y * scale)}, 1, 1).data"
    return np.array(page.evaluate(f"[...{pixel}]"))[:3]


def test_a_photo_in_a_box_dragged_points_and_a_picture_out(page, locator):
    choose(page, CREATURE)
    (x1, y1), (x2, y2) = place_of(page, 195, 164), place_of(page, 70, 52)  # from corner to corner, backwards
    page.mouse(("Pressed", x1, y1), ("Moved", (x1 + x2) / 2, y1 - 9), ("Moved", x2, y2), ("Released", x2, y2))
    box = json.loads(f"[{page.evaluate('$(`box`).value')}]")
    assert box == pytest.approx(BOX, abs=1)
    page.evaluate(f"$('words').value = {json.dumps(LINES)}; $('find').click()")
    page.wait("found !== null")
    expected = locator(CREATURE, WORDS, box)
    for k, (name, p) in enumerate(expected.items()):
        said, place, confidence = page.evaluate(f"$('list').children[{k}].innerText").split("\n")
        assert (said, confidence) == (name, f"{p.confidence:.2f}")
        assert json.loads(f"[{place}]") == pytest.approx([p.x, p.y], abs=0.51)
        dot = page.evaluate(f"getComputedStyle($('list').children[{k}].querySelector('i')).backgroundColor")
        assert np.abs(colour_at(page, p.x, p.y) - [int(v) for v in re.findall(r"\d+", dot)[:3]]).max() < 12
    keypoints, png = page.evaluate("""(async () => {
        const files = {}, blobs = [];
        URL.createObjectURL = (blob) => { blobs.push(blob); return "data:,"; };
        HTMLAnchorElement.prototype.click = function () { files[this.download] = blobs.pop(); };
        $("save").click(); $("picture").click();
        while (!files["creature-keypoints.png"]) await new Promise((done) => setTimeout(done, 20));
        return [await files["keypoints.json"].text(),
                [...new Uint8Array(await files["creature-keypoints.png"].arrayBuffer())]]; })()""")
    assert json.loads(keypoints) == [{"photo": "creature.jpg", "box": box, "keypoints": [
        {"name": name, **{part: round_off(getattr(p, part)) for part in PARTS[:3]}}
        for name, p in expected.items()]}]  # as predict.py writes it
    picture = Image.open(io.BytesIO(bytes(png)))
    for p in expected.values():
        place = int(p.x * picture.width / 247), int(p.y * picture.width / 247)
        assert np.abs(colour_at(page, p.x, p.y) - picture.getpixel(place)[:3]).max() < 12


def test_heat_skeletons_and_hollow_points(page, locator):
    page.evaluate("$('example').click()")
    page.wait("found !== null")
    tip, before = locator(CREATURE, WORDS, BOX)["horn tip"], colour_at(page, 20, 30)
    page.mouse(("Moved", *place_of(page, tip.x + 1, tip.y)))
    assert "expects the horn tip" in page.evaluate("$('hint').innerText")
    red, green, blue = colour_at(page, tip.x - 4, tip.y + 4)  # not under the dot
    assert red > 200 and red > green > blue  # warm where it is
    assert colour_at(page, 20, 30).mean() < 0.6 * before.mean()  # dark where it is not
    page.mouse(("Moved", 1, 1))
    page.evaluate("found.points.forEach((p, k) => { [p.x, p.y] = [[20, 20], [220, 20], [null, null]][k]; });"
                  "found.points[1].confidence = 0.49; found.skeleton = [[0, 1], [1, 2]]; showList()")
    left, right = colour_at(page, 100, 20), colour_at(page, 140, 20)
    assert left[0] > left[1] + 50 and right[1] > right[0] + 50  # red, as point 0, then green, as point 1
    said = page.evaluate("$('found').innerText")
    assert "2 of 3 found, 1 unsure" in said and "Hollow" in said and "no coordinates" in said


@pytest.mark.parametrize("photo, words, message", [
    (b"no photo", LINES, "mine.jpg is not a photo that this browser can show."),
    (bytes(25_000_001), LINES, "mine.jpg is larger than 25 MB; make it smaller."),
    (JPEG, "nose", 'keypoint "nose" has no description'),
])
def test_slips_are_said_on_the_page(page, tmp_path, photo, words, message):
    (tmp_path / "mine.jpg").write_bytes(photo)
    choose(page, tmp_path / "mine.jpg")
    page.evaluate(f"if (photo) {{ $('words').value = {json.dumps(words)}; $('find').click(); }}")
    assert message in page.wait("!$('error').hidden && $('error').innerText")


def test_a_turned_avif_that_is_dropped_is_shown_as_it_is_looked_at(page):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10, :20], pixels[10:, 20:] = (250, 0, 0), (0, 0, 250)
    avif = encode(Image.fromarray(pixels), "AVIF", exif=TURNED, quality=95, subsampling="4:4:4")
    page.evaluate(f"""(() => {{ const data = new DataTransfer();
        data.items.add(new File([new Uint8Array({[*avif]})], "mine.avif"));
        $("words").dispatchEvent(new DragEvent("drop", {{dataTransfer: data, bubbles: true}})); }})()""")
    page.wait("photo !== null")
    seen = open_photo(Image.open(io.BytesIO(avif)))
    assert page.evaluate("[photo.image.naturalWidth, photo.image.naturalHeight]") == [*seen.size] == [20, 40]
    for x, y in (5, 10), (15, 10), (5, 30), (15, 30):
        assert np.abs(colour_at(page, x, y) - seen.getpixel((x, y))).max() < 12


def test_a_set_fills_the_words_but_not_over_ones_own_and_every_control_has_a_name(page):
    fill = "confirm = () => false; $('sets').value = 'animal_face'; $('sets').onchange(); $('words').value"
    assert len(page.evaluate(fill).splitlines()) == 9
    page.evaluate("$('words').value = 'own: words'")
    assert page.evaluate(fill) == "own: words"
    controls = [node["name"]["value"] for node in page.send("Accessibility.getFullAXTree")["nodes"]
                if node.get("role", {}).get("value") in ("button", "textbox", "combobox", "image")]
    assert len(controls) > 4 and all(controls)
