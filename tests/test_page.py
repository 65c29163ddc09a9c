"""page.py and page.html: what the server answers and refuses, and the page in a real browser.

    python tests/test_page.py      makes README's picture of the page, assets/figures/page.png
"""

import http.client
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlencode

import numpy as np
import pytest
from browser import CHROMIUM, open_browser
from conftest import ROOT
from PIL import Image

import page as page_module
import predict
from chat import Category
from common import InputError, run
from locator import Locator, open_photo

CHECKPOINT, CREATURE = ROOT / "assets/toy/ckpt.pt", ROOT / "assets/toy/creature.jpg"
BOX = (70, 52, 125, 112)
WORDS = {"knob": "the knob on the antenna that is purple", "horn tip": "the sharp end of the green horn",
         "heart": "the orange heart painted on the body"}
LINES = "\n".join(f"{name}: {text}" for name, text in WORDS.items())


@contextmanager
def serving(locator):
    """-> the port of a server in a thread."""
    with page_module.Server(locator, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture(scope="module")
def locator():
    return Locator(CHECKPOINT, decode="median")


@pytest.fixture(scope="module")
def port(locator):
    with serving(locator) as port:
        yield port


def ask(port, method, path, body=None, **headers):
    """-> status and what was answered, JSON or bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host="Host" in headers)
    if body is not None:
        headers.setdefault("Content-Length", len(body))
    for name, value in headers.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    is_json = response.headers["Content-Type"] == "application/json"
    return response.status, json.loads(content) if is_json else content


def locate(port, photo, words=LINES, box=None):
    query = {"keypoints": words} | ({} if box is None else {"box": box})
    return ask(port, "POST", f"/locate?{urlencode(query)}", photo)


def encode(photo, form="PNG", **options):
    file = io.BytesIO()
    photo.save(file, form, **options)
    return file.getvalue()


# --------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("box", [BOX, None])
def test_points_are_the_locators(locator, port, box):
    expected = locator(CREATURE, WORDS, box)
    status, answer = locate(port, CREATURE.read_bytes(), box=box and ",".join(map(str, box)))
    assert status == 200 and (answer["width"], answer["height"]) == (247, 247)
    assert answer["box"] == (box and list(box))
    assert [point["name"] for point in answer["points"]] == list(WORDS)
    for point, found in zip(answer["points"], expected.values()):
        assert tuple(answer["square"]) == found.square
        assert (point["x"], point["y"]) == pytest.approx((found.x, found.y), abs=0.0051)
        assert point["confidence"] == pytest.approx(found.confidence, abs=0.0051)
        assert point["x_distribution"] == pytest.approx(found.x_distribution, abs=1e-6)
        assert point["y_distribution"] == pytest.approx(found.y_distribution, abs=1e-6)


def test_a_point_without_coordinates_is_answered_too():
    nothing = SimpleNamespace(x=None, y=None, confidence=None, x_distribution=None, y_distribution=None,
                              square=(0, 0, 9))
    with serving(stub(lambda photo, category, box: {"a": nothing})) as port:
        status, answer = locate(port, encode(Image.new("RGB", (9, 9))), "a: b")
    parts = ["x", "y", "confidence", "x_distribution", "y_distribution"]
    assert status == 200 and answer["points"] == [{"name": "a"} | dict.fromkeys(parts)]


def test_keypoints_that_are_named_as_those_of_a_set_get_its_skeleton():
    point = SimpleNamespace(x=1.0, y=2.0, confidence=None, x_distribution=None, y_distribution=None,
                            square=(0, 0, 9))
    sets = {"pet": Category("pet", [("nose", "the tip"), ("tail", "the end")], [(0, 1)])}
    answers = stub(lambda photo, category, box: dict.fromkeys(dict(category.keypoints), point), sets)
    with serving(answers) as port:
        photo = encode(Image.new("RGB", (9, 9)))
        assert locate(port, photo, "nose: the very tip\ntail: the end")[1]["skeleton"] == [[0, 1]]
        assert locate(port, photo, "tail: the end\nnose: the tip")[1]["skeleton"] == []


def stub(find, sets={}):
    """What stands in for a Locator of a model that is not the toy's."""
    class Stub:
        def __call__(self, *question):
            return find(*question)
    Stub.sets = sets
    return Stub()


def test_a_turned_photo_is_upright(port):
    photo, exif = Image.new("RGB", (40, 20)), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    _, answer = locate(port, encode(photo, "JPEG", exif=exif))
    assert (answer["width"], answer["height"]) == (20, 40)


@pytest.mark.parametrize("form", page_module.FORMATS)
def test_every_format_is_read(port, form):
    status, answer = locate(port, encode(Image.new("RGB", (40, 20)), form))
    assert status == 200 and (answer["width"], answer["height"]) == (40, 20)


def test_the_longest_question_of_a_set_fits_into_an_address(port):
    _, start = ask(port, "GET", "/start")
    status, answer = locate(port, CREATURE.read_bytes(), max(start["sets"].values(), key=len))
    assert status == 200 and len(answer["points"]) == 68


def test_questions_take_turns():
    asked, at_once = [], []

    def find(photo, category, box):
        asked.append(category)
        time.sleep(0.02)
        at_once.append(len(asked))
        asked.pop()
        return {"a": SimpleNamespace(x=1.0, y=2.0, confidence=1.0, x_distribution=None, y_distribution=None,
                                     square=(0, 0, 9))}
    photo = encode(Image.new("RGB", (9, 9)))
    with serving(stub(find)) as port:
        threads = [threading.Thread(target=locate, args=(port, photo, "a: b")) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert at_once == [1] * 5


def test_the_start_tells_sets_once_and_an_example_if_the_model_is_the_toys(locator, port):
    cat, dog = (Category(name, [("nose", "the tip"), ("tail", "the end")]) for name in ("cat", "dog"))
    bird = Category("bird", [("beak", "the bill"), ("first mark", "the heart")])
    sets = {"pets": cat, "cat": cat, "dog": dog, "Bird": bird}
    with serving(stub(None, sets)) as other:
        assert list(ask(other, "GET", "/start")[1]["sets"]) == ["pets", "Bird"]  # in the checkpoint's order
        assert ask(other, "GET", "/start") == (200, {
            "sets": {"Bird": "beak: the bill\nfirst mark: the heart", "pets": "nose: the tip\ntail: the end"},
            "max_bytes": page_module.MAX_BYTES, "example": None})
    _, start = ask(port, "GET", "/start")
    example = start["example"]
    assert example["keypoints"] == LINES and example["box"] == ", ".join(map(str, BOX))
    assert ask(port, "GET", example["photo"]) == (200, CREATURE.read_bytes())
    assert start["sets"]["animal_body"].startswith("left eye: ")


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("box, words, message", [
    ("1,2,3", LINES, 'box "1,2,3": write x, y, width, height'),
    ("a,b,c,d", LINES, "four numbers"),
    ("nan,0,9,9", LINES, "lies outside the photo, which is 247 x 247 pixels"),
    ("400,0,9,9", LINES, "lies outside the photo"),
    ("", "nose", 'keypoint "nose" has no description: write "name: where it is"'),
    ("", "nose:", "lacks a name or a description"),
    ("", "a: b\na: c", 'two keypoints are named "a"'),
    ("", " \n", 'no keypoint is asked for; write "name: where it is'),
    ("", "/etc/names.txt", "has no description"),  # no file is read
])
def test_slips_are_answered_in_words(port, box, words, message):
    status, answer = locate(port, CREATURE.read_bytes(), words, box)
    assert status == 400 and message in answer["error"]


BROKEN = [b"", b"no photo", CREATURE.read_bytes()[:3000], b"P6 2 2 255 " + bytes(12),
          b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]  # which Pillow would hand to another program


@pytest.mark.parametrize("photo", BROKEN)
def test_what_is_no_photo_is_refused(port, photo):
    status, answer = locate(port, photo)
    assert status == 400 and answer["error"].startswith("not a readable photo: none of JPEG, PNG")


def test_a_photo_of_too_many_pixels_is_refused(port):
    status, answer = locate(port, encode(Image.new("1", (10_000, 5_001))))
    assert status == 400 and "the photo has 10000 x 5001 pixels; make it smaller" in answer["error"]


def test_the_length_of_an_upload_must_be_known_and_small(port):
    for length in None, "-1", "many":
        assert ask(port, "POST", "/locate", **{"Content-Length": length})[0] == 411
    status, answer = ask(port, "POST", "/locate", **{"Content-Length": "25000001"})
    assert status == 413 and "larger than 25 MB" in answer["error"]


def test_other_addresses_are_unknown(port):
    for method, path in ("GET", "/page.py"), ("GET", "/../README.md"), ("GET", "/locate"), ("POST", "/"):
        status, answer = ask(port, method, path, b"" if method == "POST" else None)
        assert status == 404 and "no such page" in answer["error"]


@pytest.mark.parametrize("method, path", [("GET", "/"), ("GET", "/start"), ("POST", "/locate")])
@pytest.mark.parametrize("host, origin, is_refused", [
    ("127.0.0.1:{}", None, False),
    ("localhost:{}", "http://localhost:{}", False),
    ("localhost:9", "http://localhost:9", False),  # through a tunnel
    ("evil.example:{}", None, True),  # a name that leads to this computer
    ("127.0.0.1.evil.example", None, True),
    (None, None, True),
    ("127.0.0.1:{}", "http://evil.example", True),
    ("127.0.0.1:{}", "http://127.0.0.1:9", True),
    ("127.0.0.1:{}", "null", True),
])
def test_pages_of_other_sites_are_refused(port, method, path, host, origin, is_refused):
    headers = {"Host": host and host.format(port), "Origin": origin and origin.format(port)}
    status, _ = ask(port, method, path, b"" if method == "POST" else None, **headers)
    assert (status == 403) == is_refused


# --------------------------------------------------------------------------------------------------- program


@pytest.mark.parametrize("taken", [True, False])
def test_a_port_that_cannot_be_opened_is_one_line(locator, port, taken):
    number = port if taken else 70_000
    with pytest.raises(InputError, match=f"^--port {number}: cannot be opened .*; take another$"):
        page_module.serve(locator, number)


def test_the_program_serves_until_it_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["predict.py", str(CHECKPOINT), "--serve", "--port", "0"])
    process = multiprocessing.get_context("fork").Process(target=run_quietly, args=(tmp_path / "said",))
    process.start()
    while not (said := (tmp_path / "said").exists() and (tmp_path / "said").read_text()):
        assert process.is_alive()
        time.sleep(0.02)
    status, content = ask(int(re.match(r"http://127\.0\.0\.1:(\d+) ", said)[1]), "GET", "/")
    assert status == 200 and content == (ROOT / "page.html").read_bytes()
    os.kill(process.pid, signal.SIGINT)  # Ctrl-C
    process.join(timeout=20)
    assert process.exitcode == 0 and (tmp_path / "said").read_text() == said


def run_quietly(path):
    with open(path, "w") as said, redirect_stdout(said), redirect_stderr(said):
        run(predict.main)


# --------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser, port):
    """The page as one finds it. It must not complain on the console, but of answers that are errors."""
    browser.look()
    browser.open(f"http://127.0.0.1:{port}/")
    browser.wait("!$('example').hidden")
    browser.complaints.clear()
    yield browser
    browser.evaluate("0")
    assert [c for c in browser.complaints if c.get("entry", {}).get("source") != "network"] == []


def show(page, photo):
    page.choose("#file", photo)
    page.wait("photo !== null")


def place_of(page, x, y):
    """Where on the screen a pixel of the photo is shown."""
    return page.evaluate(f"""(() => {{
        const {{left, top, width}} = canvas.getBoundingClientRect(), scale = width / photo.image.naturalWidth;
        return [left + {x} * scale, top + {y} * scale]; }})()""")


def colour_at(page, x, y):
    """Of the picture at a pixel of the photo."""
    return np.array(page.evaluate(f"""(() => {{
        const pixel = new OffscreenCanvas(1, 1).getContext("2d");
        const scale = canvas.width / photo.image.naturalWidth;
        pixel.drawImage(canvas, -Math.floor({x} * scale), -Math.floor({y} * scale));
        return [...pixel.getImageData(0, 0, 1, 1).data]; }})()"""))[:3]


def type_words(page, words):
    page.evaluate("$('words').focus()")
    page.send("Input.insertText", text=words)


@pytest.mark.parametrize("pointer", ["mouse", "finger"])
def test_a_photo_in_a_box_dragged_points_out(page, locator, pointer):
    show(page, CREATURE)
    (x1, y1), (x2, y2) = place_of(page, 195, 164), place_of(page, 70, 52)  # from corner to corner, backwards
    if pointer == "mouse":
        page.mouse(("Pressed", x1, y1), ("Moved", (x1 + x2) / 2, y1 - 9), ("Moved", x2, y2),
                   ("Released", x2, y2))
    else:
        for kind, *place in ("Start", x1, y1), ("Move", x2, y2 + 50), ("Move", x2, y2), ("End",):
            page.send("Input.dispatchTouchEvent", type=f"touch{kind}",
                      touchPoints=[dict(zip("xy", place))] if place else [])
    box = json.loads(f"[{page.evaluate('$(`box`).value')}]")
    assert box == pytest.approx(BOX, abs=1)
    darkened = 0.55 * np.array(Image.open(CREATURE).getpixel((20, 20)))
    assert np.abs(colour_at(page, 20, 20) - darkened).max() < 15
    type_words(page, LINES)
    for kind in "keyDown", "keyUp":
        page.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", modifiers=2,
                  windowsVirtualKeyCode=13)
    page.wait("found !== null")
    rows = page.evaluate("[...$('list').children].map((row) => row.innerText.split('\\n'))")
    expected = locator(CREATURE, WORDS, box)
    for (name, place, confidence), (expected_name, p) in zip(rows, expected.items(), strict=True):
        assert (name, confidence) == (expected_name, f"{p.confidence:.2f}")
        assert json.loads(f"[{place}]") == pytest.approx([p.x, p.y], abs=0.51)
    for k, p in enumerate(expected.values()):  # dots where the points are, in the colour of the list
        dot = page.evaluate(f"getComputedStyle($('list').children[{k}].querySelector('i')).backgroundColor")
        assert np.abs(colour_at(page, p.x, p.y) - [int(v) for v in re.findall(r"\d+", dot)[:3]]).max() < 12


def test_the_example_and_the_heat_of_a_point(page, locator):
    page.evaluate("$('example').click()")
    page.wait("found !== null")
    points = locator(CREATURE, WORDS, BOX)
    assert page.evaluate("found.points.map((point) => [point.x, point.y])") == [
        [round(p.x, 2), round(p.y, 2)] for p in points.values()]
    tip, corner = points["horn tip"], (20, 20)
    beside = tip.x - 4, tip.y + 4  # not under the dot
    before = colour_at(page, *beside), colour_at(page, *corner)
    page.mouse(("Moved", *place_of(page, tip.x + 1, tip.y)))
    assert page.evaluate("hovered") == 1 and "expects the horn tip" in page.evaluate("$('hint').innerText")
    after = colour_at(page, *beside), colour_at(page, *corner)
    assert after[1].mean() < 0.6 * before[1].mean()  # dark where it is not
    red, green, blue = after[0]
    assert red > 200 and red > green > blue  # warm where it is
    page.mouse(("Moved", 1, 1))
    assert (colour_at(page, *corner) == before[1]).all()
    place = place_of(page, tip.x, tip.y)
    page.mouse(("Moved", *place), ("Pressed", *place), ("Released", *place), ("Moved", 1, 1))
    assert page.evaluate("pinned") == 1  # a click keeps it
    assert page.evaluate("$('list').children[1].firstChild.ariaPressed") == "true"
    page.evaluate("$('list').children[0].firstChild.focus()")  # the keyboard leads there, too
    assert "expects the knob" in page.evaluate("$('hint').innerText")


def test_a_skeleton_joins_the_points_that_have_coordinates(page):
    """A made-up answer: 0 and 1 are level and joined in their colours; 2 is nowhere."""
    page.evaluate("$('example').click()")
    page.wait("found !== null")
    before = colour_at(page, 120, 20)
    page.evaluate("found.points.forEach((p, k) => { [p.x, p.y] = [[20, 20], [220, 20], [null, null]][k]; });"
                  "found.skeleton = [[0, 1], [1, 2]]; update()")
    left, right = colour_at(page, 100, 20), colour_at(page, 140, 20)
    assert left[0] > left[1] + 50 and right[1] > right[0] + 50  # red, as point 0, then green, as point 1
    page.evaluate("found.skeleton = []; update()")
    assert (colour_at(page, 120, 20) == before).all()


def test_the_curves_are_the_distributions(page):
    """A made-up answer: x is for sure in the middle, y in two places, one of them half as likely."""
    page.evaluate("$('example').click()")
    page.wait("found !== null")
    page.evaluate("""
        const x = Array(1000).fill(0), y = Array(1000).fill(0);
        x[500] = 1; y[200] = 2 / 3; y[800] = 1 / 3;
        Object.assign(found.points[0], {x_distribution: x, y_distribution: y});
        found.square = [40, 40, 160];
        const lines = [], curve = drawCurve;
        drawCurve = (distribution, place) => lines.push([place(0.2, 1), place(0.5, 0)]);
        hover(0);
        drawCurve = curve;""")
    scale = page.evaluate("canvas.clientWidth / photo.image.naturalWidth")
    x, y = (np.array(line) / scale for line in page.evaluate("lines"))
    assert x == pytest.approx(np.array([(72, 200 - 25.6), (120, 200)]))  # along the square's lower edge
    assert y == pytest.approx(np.array([(200 - 25.6, 72), (200, 120)]))  # along its right one
    peaks = [colour_at(page, 120.6, 40 + 160 * t) for t in (0.2, 0.8, 0.5)]
    assert peaks[0].sum() > peaks[1].sum() > peaks[2].sum() + 60


def test_unsure_points_are_hollow(page):
    page.evaluate("$('example').click()")
    page.wait("found !== null")
    x, y, filled = page.evaluate("[found.points[0].x, found.points[0].y, $('unsure').hidden]")
    before = colour_at(page, x, y)
    page.evaluate("found.points[0].confidence = 0.49; found.points[2].x = null; showList()")
    photo = np.array(Image.open(CREATURE).getpixel((int(x), int(y))))
    assert np.abs(colour_at(page, x, y) - photo).max() < 40 < np.abs(before - photo).max()
    said = page.evaluate("$('found').innerText")
    assert filled and "2 of 3 found, 1 unsure" in said and "Hollow" in said and "no coordinates" in said


def test_the_download_is_what_predict_writes(page, locator, tmp_path):
    page.evaluate("$('example').click()")
    page.wait("found !== null")
    downloaded = page.evaluate("""
        const blobs = [];
        URL.createObjectURL = (blob) => { blobs.push(blob); return "data:,"; };
        HTMLAnchorElement.prototype.click = () => {};
        $("save").click();
        blobs[0].text()""")
    job = predict.Job(Path(CREATURE.name), BOX, 1)
    predict.write_tables(tmp_path, [(job, locator(CREATURE, WORDS, BOX))], "plain")
    assert json.loads(downloaded) == json.loads((tmp_path / "keypoints.json").read_text())


@pytest.mark.parametrize("event", ['DragEvent("drop", {dataTransfer: data,',
                                   'ClipboardEvent("paste", {clipboardData: data,'])
def test_a_photo_may_be_dropped_or_pasted(page, event):
    page.evaluate(f"""(async () => {{
        const data = new DataTransfer(), creature = await (await fetch("/creature.jpg")).blob();
        data.items.add(new File([creature], "mine.jpg"));
        $("words").dispatchEvent(new {event} bubbles: true, cancelable: true}})); }})()""")
    assert page.wait("photo && photo.name") == "mine.jpg" and not page.evaluate("$('shown').hidden")


@pytest.mark.parametrize("name, box, words, message", [
    ("broken.jpg", "", LINES, "broken.jpg is not a photo that this browser can show."),
    ("large.jpg", "", LINES, "large.jpg is larger than 25 MB; make it smaller."),
    ("cut.jpg", "", LINES, "not a readable photo"),  # which the browser shows in part
    ("creature.jpg", "300, 0, 9, 9", LINES, "lies outside the photo, which is 247 x 247 pixels"),
    ("creature.jpg", "1, 2", LINES, "four numbers"),
    ("creature.jpg", "", "nose", 'keypoint "nose" has no description'),
    ("creature.jpg", "", "", "Say what to find"),
    (None, "", LINES, "Choose a photo first."),
])
def test_slips_are_said_on_the_page(page, tmp_path, name, box, words, message):
    contents = {"broken.jpg": BROKEN[1], "large.jpg": bytes(25_000_001), "cut.jpg": BROKEN[2]}
    if name:
        (tmp_path / name).write_bytes(contents.get(name, CREATURE.read_bytes()))
        page.choose("#file", tmp_path / name)
        page.wait("photo !== null || !$('error').hidden")
    if not page.evaluate("$('error').innerText"):
        page.evaluate(f"$('box').value = {json.dumps(box)}; $('words').value = {json.dumps(words)}")
        page.evaluate("$('find').click()")
    assert message in page.wait("!$('error').hidden && $('error').innerText")
    assert page.evaluate("$('found').hidden && !$('find').disabled")


def test_a_program_that_has_ended_is_said_on_the_page(browser, locator):
    with serving(locator) as port:
        browser.open(f"http://127.0.0.1:{port}/")
        browser.wait("!$('example').hidden")
        show(browser, CREATURE)
    browser.evaluate("$('words').value = 'nose: the tip'; $('find').click()")
    assert "The program gave no answer." in browser.wait("!$('error').hidden && $('error').innerText")


def test_a_turned_photo_is_shown_as_the_locator_sees_it(page, tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10, :20] = 250, 0, 0
    pixels[10:, 20:] = 0, 0, 250
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=95, subsampling=0)
    show(page, tmp_path / "turned.jpg")
    seen = open_photo(tmp_path / "turned.jpg")
    size = page.evaluate("[photo.image.naturalWidth, photo.image.naturalHeight]")
    assert size == list(seen.size) == [20, 40]
    for x, y in (5, 10), (15, 10), (5, 30), (15, 30):
        assert np.abs(colour_at(page, x, y) - seen.getpixel((x, y))).max() < 12


def test_a_set_fills_the_words_but_not_over_ones_own(page):
    page.evaluate("let asked = 0; confirm = () => { asked++; return false; }")
    choose = "$('sets').value = {}; $('sets').onchange(); $('words').value"
    assert page.evaluate(choose.format("'animal_body'")).startswith("left eye: ")
    face = page.evaluate(choose.format("'animal_face'"))
    assert len(face.splitlines()) == 9 and page.evaluate("asked") == 0
    type_words(page, "\nown: words")
    assert page.evaluate(choose.format("'animal_body'")) == face + "\nown: words"
    assert page.evaluate("asked") == 1


@pytest.mark.parametrize("how", [{}, {"dark": True}, {"width": 360, "height": 740, "touch": True}])
def test_it_fits_and_every_control_has_a_name(page, how):
    page.look(**how)
    page.evaluate("$('example').click()")
    page.wait("found !== null")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    nodes = page.send("Accessibility.getFullAXTree")["nodes"]
    controls = [node["name"]["value"] for node in nodes
                if node.get("role", {}).get("value") in ("button", "textbox", "combobox", "image")]
    assert len(controls) > 9 and all(controls)
    ink, card = (sum(map(int, re.findall(r"\d+", page.evaluate(f"getComputedStyle({element}).{part}"))[:3]))
                 for element, part in (("document.body", "color"), ("$('stage')", "backgroundColor")))
    assert (ink > card) == how.get("dark", False)


# ---------------------------------------------------------------------------------------------------- figure


def make_figure(path):
    with (tempfile.TemporaryDirectory() as profile, serving(Locator(CHECKPOINT, "median")) as port,
          open_browser(profile) as page):
        page.look(height=860)
        page.open(f"http://127.0.0.1:{port}/")
        page.wait("!$('example').hidden")
        page.evaluate("$('example').click()")
        page.wait("found !== null")
        page.evaluate("pin(0)")
        page.photograph(path)
    Image.open(path).convert("RGB").save(path, optimize=True)


if __name__ == "__main__":
    make_figure(ROOT / "assets/figures/page.png")
