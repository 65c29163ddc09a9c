"""data.py: MP-100's own annotations, crops of drawn photos, epochs that depend on nothing but seed and epoch,
training sequences, and bad files told in one line.
"""

import gzip
import itertools
import json
import math
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, runs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mp100 import CATEGORIES as TWO_KINDS
from mp100 import make_wagons_and_kites
from PIL import Image, ImageFile

import data
from chat import IGNORE, Category, Chat
from common import InputError, read_json
from data import (
    Crop,
    Example,
    Instance,
    TrainingSet,
    collate,
    crop_of,
    parse_descriptions,
    plan_epoch,
    read_instances,
)
from tools.check import keep_readable

quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))

CUP = Category("cup", [("rim", "where one drinks."), ("foot", "below (or under) it"),
                       ("left ear", "its handle"), ("heart", "inside")])
PLATE = Category("plate", [("rim", "all around")])
CATEGORIES = {1: CUP, 2: PLATE}


def read_descriptions(path):
    return parse_descriptions(read_json(path, dict), path)


def cups(n):
    """Instances with the keypoints of CUP, in boxes of 100 x 90 pixels.

    Keypoints 0, 1 and 3 are near the centre, but 1 is invisible in every second instance. Keypoint 2 lies in
    the largest crops only.
    """
    points = np.random.default_rng(0).uniform(35, 65, (n, 4, 2))
    points[:, 2] = 112, 50
    return [Instance(i, 1, "cup.png", (0, 0, 100, 90), points[i], np.array([True, i % 2 == 0, True, True]))
            for i in range(n)]


# ----------------------------------------------------------------------------------------------- annotations

Split = namedtuple("Split", "photos annotations instances")  # photos and annotations as in the file, by id


@pytest.fixture(scope="module")
def benchmark(shared, tmp_path_factory):
    """MP-100's five test files: a list of Splits."""
    categories = read_descriptions(ROOT / "descriptions.json")
    path, splits = tmp_path_factory.mktemp("mp100") / "test.json", []
    for number in range(1, 6):
        packed = shared / f"mp100/annotations/mp100_split{number}_test.json.gz"
        path.write_bytes(gzip.decompress(packed.read_bytes()))
        raw = json.loads(path.read_text())
        splits.append(Split({photo["id"]: photo for photo in raw["images"]},
                            {annotation["id"]: annotation for annotation in raw["annotations"]},
                            read_instances(path, categories)))
    return splits


def test_the_benchmarks_files_give_as_many_instances_as_published(benchmark):
    assert [len(split.instances) for split in benchmark] == [2000, 1994, 2000, 1811, 1998]
    negative_boxes = {1800000000001530, 1800000000019879}
    for split in benchmark:
        kept = {instance.annotation_id for instance in split.instances}
        assert split.annotations.keys() - kept <= negative_boxes


def test_the_benchmarks_instances_are_its_annotations_photo_by_photo_with_boxes_inside(benchmark):
    for photos, annotations, instances in benchmark:
        place = {photo_id: i for i, photo_id in enumerate(photos)}
        order = [place[annotations[instance.annotation_id]["image_id"]] for instance in instances]
        assert order == sorted(order)
        for instance in instances:
            annotation = annotations[instance.annotation_id]
            photo = photos[annotation["image_id"]]
            points = np.reshape(annotation["keypoints"], (-1, 3))
            x, y, w, h = instance.box
            assert 0 <= x < x + w < photo["width"] and 0 <= y < y + h < photo["height"]
            assert instance.photo == photo["file_name"]
            assert instance.category_id == annotation["category_id"]
            assert (instance.keypoints == points[:, :2]).all()
            assert (instance.visible == (points[:, 2] > 0)).all()


def read_one(folder, file_name="plate/1.png", **changes):
    """What read_instances() makes of a file with one annotation, a plate on a photo of 100 x 80 pixels.

    A change to None of "area" or "iscrowd" leaves that field out.
    """
    annotation = dict(id=5, image_id=10**15, category_id=2, bbox=[10, 20, 30, 40], area=9, iscrowd=0,
                      keypoints=[20, 30, 1]) | changes
    for key in "area", "iscrowd":
        if annotation[key] is None:
            del annotation[key]
    photo = dict(id=10**15, file_name=file_name, width=100, height=80)
    (folder / "a.json").write_text(json.dumps({"images": [photo], "annotations": [annotation]}))
    return read_instances(folder / "a.json", CATEGORIES)


@pytest.mark.parametrize("bbox, box", [
    ([10, 20, 30, 40], (10, 20, 29, 39)), ([0, 0, 100, 80], (0, 0, 99, 79)),
    ([-5, -7, 30, 40], (0, 0, 29, 39)), ([10.5, -1, 30.25, 900], (10.5, 0, 29.25, 79))])
def test_an_instance_is_what_its_annotation_says_its_box_clipped(tmp_path, bbox, box):
    instance, = read_one(tmp_path, bbox=bbox, area=None, iscrowd=None)
    assert instance.box == box
    assert (instance.annotation_id, instance.category_id, instance.photo) == (5, 2, "plate/1.png")
    assert (instance.keypoints.tolist(), instance.visible.tolist()) == ([[20, 30]], [True])


@pytest.mark.parametrize("changes", [
    dict(bbox=[99, 20, 30, 40]), dict(bbox=[98, 79, 9, 9]), dict(bbox=[120, 20, 30, 40]),
    dict(bbox=[50, 60, -40, -30]), dict(bbox=[10, 20, 1, 40]), dict(bbox=[10, 20, 30, 0]),
    dict(iscrowd=1), dict(area=0), dict(area=-1), dict(keypoints=[0, 0, 0])], ids=str)
def test_crowds_and_what_is_empty_or_outside_the_photo_are_left_out(tmp_path, changes):
    """Here nothing is left, which is refused."""
    with pytest.raises(InputError, match="a.json: no object"):
        read_one(tmp_path, **changes)


@pytest.mark.parametrize("changes, says", [
    (dict(keypoints=[1, 2, 2, 3, 4, 2]), "annotation 5 has 2 keypoints.* plate has 1 description"),
    (dict(category_id=7), "Category 7 has 0 descriptions"),
    *((dict(keypoints=[bad, 30, 1]), "annotation 5 .*numbers") for bad in (math.nan, math.inf, None)),
    *((changes, "cannot be read") for changes in (
        dict(keypoints="1"), dict(bbox=[1, 2, 3]), dict(file_name=None))),
], ids=str)
def test_an_annotation_that_does_not_fit_is_named_in_one_line(tmp_path, changes, says):
    with pytest.raises(InputError, match=rf"^[^\n]*a\.json: [^\n]*{says}[^\n]*$"):
        read_one(tmp_path, **changes)


# ----------------------------------------------------------------------------------------------------- crops


def draw_dot(path, x, y, sigma):
    """Saves a black photo of 620 x 450 pixels with a blurred bright dot at (x, y)."""
    xs, ys = np.arange(620) + 0.5, np.arange(450)[:, None] + 0.5  # the pixels' centres
    light = 255 * np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / (2 * sigma**2))
    Image.fromarray(light.round().astype(np.uint8)).save(path, quality=97)


def find_dot(image):
    """The centre of what is bright in an image (3, size, size), in pixels."""
    light = (image[0].double() - 60).clamp(min=0)
    centres = torch.arange(len(light), dtype=torch.float64) + 0.5
    return [(light.sum(axis) @ centres / light.sum()).item() for axis in (0, 1)]


@settings(quick, max_examples=40)
@given(suffix=st.sampled_from(["png", "jpg"]), size=st.sampled_from([32, 56, 97]), side=st.floats(16, 900),
       angle=st.just(0.0) | st.floats(-math.pi, math.pi),
       in_photo=st.tuples(*[st.floats(-0.2, 0.2)] * 2), in_crop=st.tuples(*[st.floats(-0.2, 0.2)] * 2))
def test_a_bright_dot_is_where_from_photo_says_and_to_photo_leads_back(
        tmp_path_factory, suffix, size, side, angle, in_photo, in_crop):
    """In squares small and large, turned clockwise, reaching outside the photo, at full and reduced scale.

    in_photo and in_crop say how far the dot is from their centres, in fractions of their sizes.
    """
    path = tmp_path_factory.getbasetemp() / f"dot.{suffix}"
    x, y = 310 + 620 * in_photo[0], 225 + 450 * in_photo[1]
    draw_dot(path, x, y, sigma=min(max(1.5, side / 25), 28))
    dx, dy = in_crop
    crop = Crop(x - dx * side, y - dy * side, side, angle)

    c, s = math.cos(angle), math.sin(angle)  # (c, s) and (-s, c) are the crop's axes in the photo
    expected = 0.5 + dx * c + dy * s, 0.5 - dx * s + dy * c
    assert crop.from_photo(np.array([x, y])) == pytest.approx(expected, abs=1e-6)
    assert crop.to_photo(expected) == pytest.approx((x, y), abs=1e-6)
    found = find_dot(crop.cut(path, size))
    # in pixels of the crop; PIL's bicubic alone is off by up to 0.1
    assert found == pytest.approx(np.multiply(expected, size), abs=0.15)


def test_outside_the_photo_is_black(tmp_path):
    Image.new("RGB", (600, 400), "white").save(path := tmp_path / "white.png")
    corner = Crop(0, 0, 40).cut(path, 40)
    assert corner.dtype == torch.uint8 and corner[:, 20:, 20:].min() == 255
    assert corner.sum() == 3 * 20 * 20 * 255  # nothing else is bright


def test_a_fine_checkerboard_becomes_grey(tmp_path):
    path = tmp_path / "checkerboard.png"
    Image.fromarray((np.indices((900, 900)).sum(0) % 2 * 255).astype(np.uint8)).save(path)
    for side, angle in (200, 0.0), (200, 0.3), (600, 0.0), (600, 0.3):
        cut = Crop(451, 453, side, angle).cut(path, 64).float()
        assert abs(cut.mean() - 127.5) < 1
        assert cut.std() < 3


def test_what_is_transparent_lies_on_white():
    palette = Image.new("P", (1, 1), 2)
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.info["transparency"] = 2
    a_fifth = Image.new("RGBA", (1, 1), (0, 0, 255, 51)), Image.new("LA", (1, 1), (100, 51))
    for photo, colour in zip((*a_fifth, palette), ((204, 204, 255), (224,) * 3, (255,) * 3)):
        assert data.to_rgb(photo).getpixel((0, 0)) == colour


NAMES = ["RGB.png", "L.png", "L.jpg", "P.png", "RGBA.png", "LA.png", "CMYK.jpg", "I;16.png", "RGB.jpg"]


def save_in_mode(path, mode):
    """Saves four patches of colour, to be turned when viewed -> how they look as stored: (80, 120, 3)."""
    colours = np.uint8([[[255, 0, 0], [0, 204, 0]], [[0, 0, 255], [102, 102, 102]]])
    photo = Image.fromarray(colours.repeat(40, axis=0).repeat(60, axis=1))
    photo = photo.convert("L") if mode in ("L", "LA", "I;16") else photo
    stored = Image.fromarray(np.asarray(photo) * np.uint16(257)) if mode == "I;16" else photo.convert(mode)
    turned = Image.Exif()
    turned[0x0112] = 6
    stored.save(path, quality=95, subsampling=0, exif=turned)
    saved = Image.open(path)
    assert saved.mode == mode and saved.getexif()[0x0112] == 6
    return np.asarray(photo.convert("RGB"), float)


@pytest.mark.parametrize("name", NAMES)
def test_photos_of_all_modes_are_read_as_stored_and_truncated_ones_named(tmp_path, name):
    path, crop = tmp_path / name, Crop(60, 40, 80)
    looks = save_in_mode(path, mode=name.split(".")[0])
    cut = crop.cut(path, 80).permute(1, 2, 0).numpy()
    assert np.abs(cut - looks[:, 20:100]).mean() < 2
    content = path.read_bytes()
    path.write_bytes(content[:-len(content) // 3])
    with pytest.raises(InputError, match=rf"^[^\n]*{name}: [^\n]+$"):
        crop.cut(path, 80)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder with a photo of 2400 x 1440 pixels as 1.jpg and 1.png."""
    folder = tmp_path_factory.mktemp("large")
    noise = Image.effect_noise((75, 45), 90).resize((2400, 1440), Image.Resampling.BICUBIC)
    noise.save(folder / "1.jpg", quality=90)
    noise.save(folder / "1.png", compress_level=1)
    return folder


@pytest.mark.parametrize("suffix, side, size, decoded", [
    ("jpg", 2400, 150, 8), ("jpg", 1200, 150, 4), ("jpg", 160, 150, 1), ("jpg", 2400, 25, 8),
    ("png", 2400, 150, 1)])
def test_large_photos_are_read_small_and_nothing_is_lost(
        large, monkeypatch, suffix, side, size, decoded):
    """At no less than twice the size wanted: a JPEG is decoded at a fraction, then blocks are averaged."""
    path, widths, load = large / f"1.{suffix}", [], ImageFile.ImageFile.load

    def load_and_record(photo):
        loaded = load(photo)
        widths.append(photo.im.size[0])
        return loaded
    full = Image.open(path).convert("RGB")
    monkeypatch.setattr(ImageFile.ImageFile, "load", load_and_record)
    cut = Crop(1200, 720, side).cut(path, size).permute(1, 2, 0).numpy()
    assert widths[0] == 2400 // decoded
    assert side / decoded >= min(side, 2 * size)
    plain = full.crop([1200 - side // 2, 720 - side // 2, 1200 + side // 2, 720 + side // 2])
    plain = plain.resize((size, size), Image.Resampling.BICUBIC)
    assert np.abs(cut - np.asarray(plain, float)).mean() < 2


def test_a_crop_holds_its_left_and_upper_edge_and_not_the_others():
    points = np.array([[0, 0], [0.999, 0.999], [1, 0.5], [0.5, 1], [-0.001, 0.5], [0.5, -0.001]])
    assert data.inside(points).tolist() == [True, True, False, False, False, False]


def test_photos_are_normalised_with_imagenets_mean_and_deviation():
    photos = torch.tensor([0, 128, 255], dtype=torch.uint8)[None, :, None, None]  # red, green, blue
    want = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert data.normalize(photos).flatten().tolist() == pytest.approx(want)


# ---------------------------------------------------------------------------------------------------- epochs


@quick
@given(n=st.integers(1, 70), rounds=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_groups_hold_every_keypoint_and_the_last_is_filled_with_others(n, rounds, seed):
    groups = data.group_keypoints(n, rounds, np.random.default_rng(seed))
    assert len(groups) == math.ceil(n / rounds)
    assert sorted(sum(groups, [])[:n]) == [*range(n)]  # what is left over comes first in the last group
    for group in groups:
        assert len(group) == len({*group}) == min(n, rounds)


def test_groups_and_fillers_are_drawn_at_random():
    drawn = [data.group_keypoints(5, 4, np.random.default_rng(seed)) for seed in range(100)]
    assert {last[0] for _, last in drawn} == {k for _, last in drawn for k in last[1:]} == {*range(5)}
    assert len({repr(groups) for groups in drawn}) > 90  # of 5! * 4! = 2,880


def test_augmentation_is_as_published_and_none_is_in_a_test():
    assert crop_of(cups(1)[0]) == Crop(50, 45, 100, 0)  # in a test
    crops = [example.crop for example in plan_epoch(cups(4000), 0, 0, rounds=4)]
    scale = np.array([crop.side for crop in crops]) / 100
    angle = np.degrees([crop.angle for crop in crops])
    assert {(crop.x, crop.y) for crop in crops} == {(50, 45)}
    assert (scale.min(), scale.max()) == (0.7, 1.3)
    assert np.abs(angle).max() <= 40
    # one standard deviation of N(1, 0.3) to either side is clipped to 0.7 and 1.3
    clipped = (scale == 0.7).mean(), (scale == 1.3).mean()
    assert clipped == pytest.approx((0.159, 0.159), abs=0.03)
    assert ((scale < 1).mean(), (angle != 0).mean()) == pytest.approx((0.5, 0.5), abs=0.03)
    assert angle[angle != 0].std() == pytest.approx(80 / 12**0.5, rel=0.05)  # uniform from -40 to 40
    assert abs(angle.mean()) < 2


def ask_all(instances, pack):
    """Checks an epoch's Examples -> {annotation id: the keypoints asked}."""
    asked = {instance.annotation_id: set() for instance in instances}
    examples = plan_epoch(instances, 1, 0, 3, pack)
    for example in examples:
        assert all(0 < len({*group}) == len(group) <= 3 for group in example.groups)
        together = sum(example.groups, [])
        where = example.crop.from_photo(example.instance.keypoints[together])
        assert where.min() >= 0 and where.max() < 1
        assert example.instance.visible[together].all()
        asked[example.instance.annotation_id] |= {*together}
    if pack:
        assert len({example.instance.annotation_id for example in examples}) == len(examples)
    assert pack or {len(example.groups) for example in examples} == {1}
    return asked


@pytest.mark.parametrize("pack", [False, True])
def test_an_epoch_asks_every_visible_keypoint_inside_its_crop(monkeypatch, pack):
    invisible_or_outside = np.array([[5, 5], [50, 50]])
    nothing_to_ask = Instance(-1, 1, "cup.png", (0, 0, 9, 9), invisible_or_outside, np.array([False, True]))
    instances = [*cups(100), nothing_to_ask]
    ask_all(instances, pack)
    # with one crop for all groups of an instance it is known exactly what is asked
    monkeypatch.setattr(data, "crop_of", lambda instance, *_: crop_of(instance))
    asked = ask_all(instances, pack)
    for instance in instances:
        where = crop_of(instance).from_photo(instance.keypoints)
        inside = ((0 <= where) & (where < 1)).all(1)
        assert asked[instance.annotation_id] == {*np.flatnonzero(instance.visible & inside).tolist()}


@pytest.mark.parametrize("pack", [False, True])
def test_an_epochs_examples_are_shuffled_anew_each_time(pack):
    orders = []
    for seed, epoch in (0, 0), (0, 1), (1, 0):
        examples = plan_epoch(cups(400), seed, epoch, rounds=4, pack=pack)
        orders.append([example.instance.annotation_id for example in examples])
        assert len({*orders[-1]}) == 400
    for order in orders:
        assert abs(np.corrcoef(order, range(400))[0, 1]) < 0.2
    for one, other in itertools.combinations(orders, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.2


# ----------------------------------------------------------------------------------------- training sequences


@pytest.mark.parametrize("groups", [[[2, 0]], [[3, 1], [0]]], ids=["one group", "packed"])
def test_training_shows_the_crop_and_asks_where_its_keypoints_are(chat, tmp_path, groups):
    Image.effect_noise((120, 100), 90).save(tmp_path / "cup.png")
    cup, crop = cups(1)[0], Crop(52, 49, 160, 0.4)
    examples = [Example(cup, crop, groups), Example(cup, crop, [[1]])]
    images, tokens, labels, photo_of = collate([*TrainingSet(examples, CATEGORIES, chat, tmp_path, 28)])
    assert photo_of is None if len(groups) == 1 else photo_of.tolist() == [0, 0, 1]
    assert torch.equal(images, crop.cut(tmp_path / "cup.png", 28).expand(2, -1, -1, -1))

    asked, width = [*groups, [1]], 0
    for row, group in zip(zip(tokens.tolist(), labels.tolist(), strict=True), asked, strict=True):
        end = max(i for i, label in enumerate(row[1]) if label != IGNORE) + 1
        assert [*map(set, (row[0][end:], row[1][end:]))] in ([{0}, {IGNORE}], [set(), set()])  # padding
        width = max(width, end)
        (start, *questions), answers = (runs(*(part[:end] for part in row))[i::2] for i in (0, 1))
        where = chat.encode_questions(CUP)
        assert start == [chat.bos, *where[group[0]]]
        assert [chat.newline + question for question in questions] == [where[k] for k in group[1:]]
        for k, answer in zip(group, answers, strict=True):
            assert answer[-1] == chat.coordinates.ending[-1]  # so that no padding is learned
            answered = crop.to_photo(chat.parse(answer[:-1]))
            assert np.abs(answered - cup.keypoints[k]).max() < 0.16  # a thousandth of the crop's side
    assert width == tokens.shape[1] == labels.shape[1]


@pytest.fixture
def hear(monkeypatch):
    """-> a function that gives the Scenes that Examples of cups() make. Nothing is read or tokenised."""
    monkeypatch.setattr(Crop, "cut", lambda *_: None)
    listener = SimpleNamespace(encode_conversation=lambda scene: scene)

    def hear(examples):
        items = TrainingSet(examples, CATEGORIES, listener, "", 28)
        return [scene for _, scenes in items for scene in scenes]
    return hear


def test_conversations_know_what_is_invisible(hear):
    """Not labelled as visible, or outside the crop, asked or not."""
    even, odd = hear([Example(cup, crop_of(cup), [[0, 3]]) for cup in cups(2)])
    assert even.invisible == ["left ear"]
    assert odd.invisible == ["foot", "left ear"]
    assert even.category is CUP
    assert [name for (name, _), _ in even.asked] == ["rim", "heart"]


def test_no_two_streams_of_random_numbers_coincide(hear, monkeypatch):
    """The orders of epochs, the plans of instances and the conversations all draw different numbers.

    It is easy to get wrong: numpy makes the same numbers from (seed, epoch, 0) as from (seed, epoch).
    """
    make, seeds = np.random.default_rng, []
    assert make((7, 3, 0)).random() == make((7, 3)).random()

    def make_and_record(seed):
        seeds.append(seed)
        return make(seed)
    instances = cups(5)
    monkeypatch.setattr(np.random, "default_rng", make_and_record)
    for seed, epoch in itertools.product(range(3), range(3)):
        hear(plan_epoch(instances, seed, epoch, rounds=1))
    n_conversations = len(seeds) - 9 * (1 + len(instances))
    assert n_conversations > 9 * 2 * len(instances)
    streams = {make(seed).bytes(16) for seed in seeds}
    assert len(streams) == len(seeds)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_depend_on_seed_and_epoch_and_nothing_else(tiny, tmp_path):
    folder, chat = make_wagons_and_kites(tmp_path), Chat(tiny / "llm")
    instances = read_instances(folder / "annotations/mp100_split1_train.json", TWO_KINDS)

    def batches(n_workers):
        dataset = TrainingSet(plan_epoch(instances, 1, 2, 2), TWO_KINDS, chat, folder / "images", 56)
        torch.manual_seed(np.random.randint(1000))  # all that is random elsewhere has no influence
        loader = torch.utils.data.DataLoader(dataset, 4, collate_fn=collate, num_workers=n_workers)
        return [tensor for batch in loader for tensor in batch[:3]]

    first = batches(0)
    for again in batches(0), batches(3):
        assert len(again) == len(first) == 12
        assert all(map(torch.equal, first, again))


# ------------------------------------------------------------------------------------------------- bad input


def test_missing_and_damaged_photos_are_counted_by_category_or_left_out(tmp_path):
    """By their headers or, where they may be left out, to the last pixel: they may break off anywhere."""
    for i in range(5):
        Image.effect_noise((90, 90), 90).save(path := tmp_path / f"{i}.jpg")
    path.write_bytes(path.read_bytes()[:-len(path.read_bytes()) // 3])
    (tmp_path / "1.jpg").unlink()
    (tmp_path / "2.jpg").write_bytes(b"")
    (tmp_path / "3.jpg").write_bytes(b"P6 90000 90000 255 ")
    point = np.ones((1, 2)), np.ones(1, bool)
    instances = [Instance(i, 1 + i // 3, f"{i}.jpg", (0, 0, 9, 9), *point) for i in range(5)]
    says = r"photos of 3 of 5 objects are missing or unreadable \(cup 2, plate 1\), e\.g\. 1\.jpg"
    with pytest.raises(InputError, match=rf"^{tmp_path}: {says}; [^\n]*$"):
        keep_readable(instances, tmp_path, CATEGORIES, allow_missing=False)
    assert keep_readable(instances, tmp_path, CATEGORIES, allow_missing=True) == instances[:1]
    with pytest.raises(InputError, match="photos of 4 of 4 objects"):
        keep_readable(instances[1:], tmp_path, CATEGORIES, allow_missing=True)
