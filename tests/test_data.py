"""data.py: MP-100's own annotations, crops of drawn photos, epochs, training sequences, bad input."""

import gzip
import itertools
import json
import math
import re
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, runs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
    keep_readable,
    parse_descriptions,
    plan_epoch,
    read_instances,
)

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


def test_the_benchmarks_instances_are_in_the_order_of_its_photos(benchmark):
    for photos, annotations, instances in benchmark:
        place = {photo_id: i for i, photo_id in enumerate(photos)}
        order = [place[annotations[instance.annotation_id]["image_id"]] for instance in instances]
        assert order == sorted(order)


def test_the_benchmarks_instances_are_its_annotations_with_boxes_inside_the_photo(benchmark):
    for photos, annotations, instances in benchmark:
        for instance in instances:
            annotation = annotations[instance.annotation_id]
            photo = photos[annotation["image_id"]]
            points = np.reshape(annotation["keypoints"], (-1, 3))
            x, y, w, h = instance.box
            assert 0 <= x < x + w < photo["width"]
            assert 0 <= y < y + h < photo["height"]
            assert instance.photo == photo["file_name"]
            assert instance.category_id == annotation["category_id"]
            assert (instance.keypoints == points[:, :2]).all()
            assert (instance.visible == (points[:, 2] > 0)).all()


def test_the_benchmarks_quirks(benchmark):
    instances = {instance.annotation_id: instance for split in benchmark for instance in split.instances}
    # its box begins at x = -3.178
    assert instances[7700000001007272].box == pytest.approx((0, 163.2627, 186.4413, 268.5377), abs=1e-4)
    # its box ends below the photo, which is 1229 pixels high
    assert instances[7700000001007187].box == pytest.approx(
        (858.0322, 595.9045, 295.5098, 632.0955), abs=1e-4)
    # its point 6 has coordinates, but v = 0
    assert instances[5100000000040072].visible.tolist() == [k != 6 for k in range(13)]
    # two categories are called face
    sizes = {instance.category_id: len(instance.keypoints) for instance in instances.values()}
    assert (sizes[18], sizes[40]) == (19, 68)


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
    ([10, 20, 30, 40], (10, 20, 29, 39)),
    ([0, 0, 100, 80], (0, 0, 99, 79)),
    ([-5, -7, 30, 40], (0, 0, 29, 39)),
    ([90.5, 70, 30, 40], (90.5, 70, 8.5, 9)),
    ([10.5, -1, 30.25, 900], (10.5, 0, 29.25, 79)),
])
def test_boxes_are_clipped_to_the_photo(tmp_path, bbox, box):
    instance, = read_one(tmp_path, bbox=bbox)
    assert instance.box == box


def test_an_instance_is_all_that_its_annotation_says(tmp_path):
    instance, = read_one(tmp_path, area=None, iscrowd=None)
    assert (instance.annotation_id, instance.category_id, instance.photo) == (5, 2, "plate/1.png")
    assert instance.keypoints.tolist() == [[20, 30]]
    assert instance.visible.tolist() == [True]


@pytest.mark.parametrize("changes", [
    dict(bbox=[99, 20, 30, 40]), dict(bbox=[98, 79, 9, 9]), dict(bbox=[120, 20, 30, 40]),
    dict(bbox=[50, 60, -40, -30]), dict(bbox=[10, 20, 1, 40]), dict(bbox=[10, 20, 30, 0]),
    dict(iscrowd=1), dict(area=0), dict(area=-1), dict(keypoints=[0, 0, 0])], ids=str)
def test_crowds_and_what_is_empty_or_outside_the_photo_are_left_out(tmp_path, changes):
    assert read_one(tmp_path, **changes) == []


@pytest.mark.parametrize("changes, says", [
    (dict(keypoints=[1, 2, 2, 3, 4, 2]), "annotation 5 has 2 keypoints.* plate has 1 description"),
    (dict(category_id=7), "category 7 has no descriptions"),
    *((dict(keypoints=[bad, 30, 1]), "annotation 5 .*numbers") for bad in (math.nan, math.inf, None)),
    *((changes, "cannot be read") for changes in (
        dict(keypoints=[1, 2, 2, 3]), dict(keypoints="1"), dict(bbox=None), dict(bbox=[1, 2, 3]),
        dict(bbox="1234"), dict(image_id=[]), dict(category_id=[2]))),
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
    path = tmp_path / "white.png"
    Image.new("RGB", (600, 400), "white").save(path)
    corner = Crop(0, 0, 40).cut(path, 40)
    assert corner.dtype == torch.uint8
    assert corner[:, 20:, 20:].min() == 255
    assert corner.sum() == 3 * 20 * 20 * 255  # nothing else is bright
    for angle in 0, 0.5, -2:
        whole = Crop(300, 200, 780, angle).cut(path, 64)
        assert (whole / 255).mean().item() == pytest.approx(600 * 400 / 780**2, rel=0.02)


def test_a_huge_box_needs_little_memory(tmp_path, monkeypatch):
    """The square that is cut before it is reduced has less than four times the size, whatever the box."""
    sizes, transform = [], Image.Image.transform

    def transform_and_record(photo, size, *how):
        sizes.append(size[0])
        return transform(photo, size, *how)
    monkeypatch.setattr(Image.Image, "transform", transform_and_record)
    for suffix, side in itertools.product(("png", "jpg"), (127, 128, 1000, 39_000, 10**7)):
        Image.new("RGB", (60, 40), "white").save(path := tmp_path / f"1.{suffix}")
        Crop(30, 20, side).cut(path, 32)
    assert max(sizes) < 4 * 32


def test_a_fine_checkerboard_becomes_grey(tmp_path):
    path = tmp_path / "checkerboard.png"
    Image.fromarray((np.indices((900, 900)).sum(0) % 2 * 255).astype(np.uint8)).save(path)
    for side, angle in (200, 0.0), (200, 0.3), (600, 0.0), (600, 0.3):
        cut = Crop(451, 453, side, angle).cut(path, 64).float()
        assert abs(cut.mean() - 127.5) < 1
        assert cut.std() < 3


def test_what_is_transparent_lies_on_white(tmp_path):
    """In RGBA, in grey with alpha, and in a palette with a transparent colour."""
    photo = np.zeros((40, 60, 4), np.uint8)
    photo[:, :20] = 255, 0, 0, 255
    photo[:, 20:40] = 0, 0, 255, 51  # a fifth of blue, the rest white
    rgba = Image.fromarray(photo)
    grey = Image.merge("LA", (Image.new("L", (60, 40), 100), rgba.getchannel("A")))
    palette = Image.fromarray((np.arange(60) // 20).repeat(40).reshape(60, 40).T.astype(np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    for name, stored, colours, how in [
            ("rgba", rgba, [(255, 0, 0), (204, 204, 255), (255, 255, 255)], {}),
            ("grey", grey, [(100,) * 3, (224,) * 3, (255,) * 3], {}),
            ("palette", palette, [(255, 0, 0), (0, 255, 0), (255, 255, 255)], {"transparency": 2})]:
        stored.save(path := tmp_path / f"{name}.png", **how)
        cut = Crop(30, 20, 60).cut(path, 60)
        for x, colour in zip((10, 30, 50), colours):
            assert cut[:, 30, x].tolist() == pytest.approx(colour, abs=1), (name, x)
        assert cut[:, 5].max() == 0  # outside the photo


def test_photos_of_16_bits_are_scaled(tmp_path):
    steps = np.array([0, 255, 256, 32768, 65535], np.uint16).repeat(20)
    Image.fromarray(np.tile(steps, (100, 1))).save(tmp_path / "1.png")
    assert Image.open(tmp_path / "1.png").mode == "I;16"
    cut = Crop(50, 50, 100).cut(tmp_path / "1.png", 100)
    assert cut[:, 50, 10::20].tolist() == [[0, 0, 0, 127, 255]] * 3


NAMES = ["RGB.png", "L.png", "L.jpg", "P.png", "RGBA.png", "LA.png", "CMYK.jpg", "I;16.png", "RGB.jpg"]


def save_in_mode(path, mode):
    """Saves four patches of colour, to be turned when viewed -> how they look as stored: (80, 120, 3)."""
    colours = np.uint8([[[255, 0, 0], [0, 204, 0]], [[0, 0, 255], [102, 102, 102]]])
    photo = Image.fromarray(colours.repeat(40, axis=0).repeat(60, axis=1))
    if mode in ("L", "LA", "I;16"):
        photo = photo.convert("L")
    if mode == "I;16":
        stored = Image.fromarray(np.asarray(photo) * np.uint16(257))
    else:
        stored = photo.convert(mode)
    turned = Image.Exif()
    turned[0x0112] = 6
    stored.save(path, quality=95, subsampling=0, exif=turned)
    saved = Image.open(path)
    assert saved.mode == mode
    assert saved.getexif()[0x0112] == 6
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


def test_large_photos_are_decoded_small_and_nothing_is_lost(tmp_path, monkeypatch):
    path, decoded = tmp_path / "large.jpg", []
    noise = Image.effect_noise((125, 94), 90).resize((4000, 3000), Image.Resampling.BICUBIC)
    noise.save(path, quality=90)
    full = Image.open(path).convert("RGB")
    load = ImageFile.ImageFile.load

    def load_and_record(photo):
        loaded = load(photo)
        decoded.append(photo.im.size)
        return loaded
    monkeypatch.setattr(ImageFile.ImageFile, "load", load_and_record)
    for side, size in (4000, (500, 375)), (3000, (1000, 750)), (1000, (2000, 1500)), (300, (4000, 3000)):
        cut = Crop(2000, 1500, side).cut(path, 224).permute(1, 2, 0).numpy()
        assert decoded[-1] == size
        half = side // 2
        plain = full.crop([2000 - half, 1500 - half, 2000 + half, 1500 + half])
        plain = plain.resize((224, 224), Image.Resampling.BICUBIC)
        assert np.abs(cut - np.asarray(plain, float)).mean() < 1


@pytest.mark.parametrize("suffix, size, reduced, shrink", [
    ("png", 224, (500, 375), 8),
    ("jpg", 224, (500, 375), 8),
    ("jpg", 32, (72, 54), 8 * 7),  # decoded at 1/8, then averaged over 7 x 7 pixels
    ("png", 1500, (4000, 3000), 1),
])
def test_photos_are_reduced_to_no_less_than_twice_what_is_wanted(tmp_path, suffix, size, reduced, shrink):
    path = tmp_path / f"large.{suffix}"
    Image.new("RGB", (4000, 3000)).save(path)
    photo, times_smaller = data.open_reduced(path, 4000, size)
    assert (photo.size, times_smaller) == (reduced, shrink)
    assert 4000 / shrink >= 2 * size or shrink == 1


@pytest.mark.parametrize("box", [(10, 20, 60, 40), (20, 10, 40, 60)], ids=["wide", "tall"])
def test_a_crop_is_as_large_as_the_longer_side_of_the_box(box):
    instance = Instance(0, 2, "plate.png", box, np.ones((1, 2)), np.ones(1, bool))
    assert crop_of(instance) == Crop(40, 40, 60)
    assert crop_of(instance, scale=1.5, angle=0.2) == Crop(40, 40, 90, 0.2)


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


def test_the_example_of_five_keypoints_in_fours_holds():
    """That of group_keypoints()'s docstring, in form, and whatever is drawn."""
    example = json.loads(re.search(r"\[\[.*?\]\]", data.group_keypoints.__doc__, re.DOTALL)[0])
    drawn = [data.group_keypoints(5, 4, np.random.default_rng(seed)) for seed in range(100)]
    for first, last in example, *drawn:
        left_over, *fillers = last
        assert sorted([*first, left_over]) == [0, 1, 2, 3, 4]
        assert len(fillers) == len({*fillers}) == 3
        assert {*fillers} < {*first}
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
        assert example.groups
        for group in example.groups:
            assert 0 < len({*group}) == len(group) <= 3
        together = sum(example.groups, [])
        where = example.crop.from_photo(example.instance.keypoints[together])
        assert where.min() >= 0 and where.max() < 1
        assert example.instance.visible[together].all()
        asked[example.instance.annotation_id] |= {*together}
    if pack:
        assert len({example.instance.annotation_id for example in examples}) == len(examples)
    else:
        assert {len(example.groups) for example in examples} == {1}
    return asked


@pytest.mark.parametrize("source", ["drawn", "benchmark"])
@pytest.mark.parametrize("pack", [False, True])
def test_an_epoch_asks_every_visible_keypoint_inside_its_crop(request, monkeypatch, source, pack):
    instances = cups(100) if source == "drawn" else request.getfixturevalue("benchmark")[1].instances[::4]
    invisible_or_outside = np.array([[5, 5], [50, 50]])
    nothing_to_ask = Instance(-1, 1, "cup.png", (0, 0, 9, 9), invisible_or_outside, np.array([False, True]))
    instances = [*instances, nothing_to_ask]

    asked = ask_all(instances, pack)
    for instance in instances:
        distance = np.hypot(*(crop_of(instance).from_photo(instance.keypoints) - 0.5).T)
        in_all_crops = instance.visible & (distance < 0.35)  # the smallest has 0.7 of the side
        assert asked[instance.annotation_id] >= {*np.flatnonzero(in_all_crops).tolist()}

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


@pytest.fixture
def photos(tmp_path):
    """A folder with the photo of cups()."""
    Image.effect_noise((120, 100), 90).save(tmp_path / "cup.png")
    return tmp_path


@pytest.mark.parametrize("groups", [[[2, 0]], [[3, 1], [0]]], ids=["one group", "packed"])
def test_training_shows_the_crop_and_asks_where_its_keypoints_are(chat, photos, groups):
    cup, crop = cups(1)[0], Crop(52, 49, 160, 0.4)
    examples = [Example(cup, crop, groups), Example(cup, crop, [[1]])]
    images, tokens, labels, photo_of = collate([*TrainingSet(examples, CATEGORIES, chat, photos, 28)])
    assert photo_of is None if len(groups) == 1 else photo_of.tolist() == [0, 0, 1]
    assert torch.equal(images, crop.cut(photos / "cup.png", 28).expand(2, -1, -1, -1))

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


def test_conversations_draw_numbers_of_their_own(hear):
    """From (seed, epoch, instance, example), and nothing twice."""
    def draw(seed, epoch):
        return [scene.rng.random() for scene in hear(plan_epoch(cups(5), seed, epoch, rounds=1))]

    drawn = draw(0, 0) + draw(0, 1) + draw(1, 0)
    assert draw(0, 0) == drawn[:len(draw(0, 0))]
    assert len({*drawn}) == len(drawn) > 3 * 10
    packed = [scene.rng for scene in hear(plan_epoch(cups(1), 0, 0, rounds=1, pack=True))]
    assert len({*map(id, packed)}) == 1  # the conversations of an example draw one after another


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


@pytest.fixture(scope="module")
def miniature(shared):
    """A miniature of MP-100 with real photos -> its folder, its categories, its instances to train on."""
    root = shared / "mini_mp100"
    categories = read_descriptions(root / "descriptions.json")
    return root, categories, read_instances(root / "annotations/mp100_split1_train.json", categories)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_depend_on_seed_and_epoch_and_nothing_else(miniature, tiny):
    (root, categories, instances), chat = miniature, Chat(tiny / "llm")

    def batches(n_workers):
        dataset = TrainingSet(plan_epoch(instances, 1, 2, 4)[:24], categories, chat, root / "images", 56)
        torch.manual_seed(np.random.randint(1000))  # all that is random elsewhere has no influence
        loader = torch.utils.data.DataLoader(dataset, 4, collate_fn=collate, num_workers=n_workers)
        return [tensor for batch in loader for tensor in batch[:3]]

    first = batches(0)
    assert len(first) == 18
    for again in batches(0), batches(4):
        assert len(again) == 18
        assert all(map(torch.equal, first, again))


def test_what_an_instance_is_asked_depends_on_its_place_the_seed_and_the_epoch(miniature):
    *_, instances = miniature

    def plan(instances, seed, epoch):
        return {(example.instance.annotation_id, repr((example.crop, example.groups)))
                for example in plan_epoch(instances, seed, epoch, rounds=4)}

    every = plan(instances, 1, 2)
    few = plan([instances[-1], *instances[1:20]], 1, 2)  # one instance has another place, many are gone
    assert {annotation_id for annotation_id, _ in few - every} == {instances[-1].annotation_id}
    for other in plan(instances, 2, 2), plan(instances, 1, 3):
        assert len(every & other) < 0.05 * len(every)


# ------------------------------------------------------------------------------------------------- bad input

DAMAGED = [None, b"", b"P6 3 x 255 ", b"P6 90000 90000 255 ", b'{"images": [', b"[]", b"{}", b"7",
           b'{"images": [{}], "annotations": [], "keypoint_sets": {}, "categories": {"1": 1}}']


def spoil(path, content):
    """A file of that content; None: there is no file."""
    if content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize("content", DAMAGED)
def test_missing_and_damaged_photos_are_counted_by_category(tmp_path, content):
    point = np.ones((1, 2)), np.ones(1, bool)
    instances = [Instance(i, 1 + i // 3, f"{i}.png", (0, 0, 9, 9), *point) for i in range(4)]
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "images/0.png")
    for i in 1, 2, 3:
        spoil(tmp_path / f"images/{i}.png", content)
    says = r"photos of 3 of 4 objects are missing or unreadable \(cup 2, plate 1\), e\.g\. 1\.png"
    with pytest.raises(InputError, match=rf"^[^\n]*images: {says}; [^\n]*$"):
        keep_readable(instances, tmp_path / "images", CATEGORIES, allow_missing=False)
    assert keep_readable(instances, tmp_path / "images", CATEGORIES, allow_missing=True) == instances[:1]
    with pytest.raises(InputError, match=r"^[^\n]*images: photos of 3 of 3 objects [^\n]*$"):
        keep_readable(instances[1:], tmp_path / "images", CATEGORIES, allow_missing=True)


def test_what_is_left_out_may_break_off_anywhere(tmp_path):
    """A photo without its last third has a header, which is all that is read where none may be missing."""
    for i in 0, 1:
        Image.effect_noise((90, 90), 90).save(path := tmp_path / f"{i}.jpg")
    path.write_bytes(path.read_bytes()[:-len(path.read_bytes()) // 3])
    point = np.ones((1, 2)), np.ones(1, bool)
    instances = [Instance(i, 2, f"{i}.jpg", (0, 0, 9, 9), *point) for i in range(2)]
    assert keep_readable(instances, tmp_path, CATEGORIES, allow_missing=True) == instances[:1]


@pytest.mark.parametrize("error", [RuntimeError("Failed to decode frame 0"), AttributeError("'NoneType'")])
def test_whatever_a_decoder_raises_the_photo_is_named(tmp_path, monkeypatch, error):
    """AVIF's raises RuntimeError."""
    Image.new("RGB", (9, 9)).save(path := tmp_path / "1.png")

    def load(_):
        raise error
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(InputError, match=f"^{path}: cannot be read .*{error}.*; replace or remove"):
        Crop(4, 4, 8).cut(path, 14)


READERS = {
    "annotations": lambda path: read_instances(path, CATEGORIES),
    "descriptions": read_descriptions,
    "tokenizer": lambda path: Chat(path.parent),
    "photo": lambda path: Crop(4, 4, 8).cut(path, 14),
}


@pytest.mark.parametrize("content", DAMAGED)
@pytest.mark.parametrize("reader", READERS)
def test_missing_and_damaged_files_are_named_in_one_line(tmp_path, reader, content):
    path = tmp_path / "tokenizer.json"
    spoil(path, content)
    with pytest.raises(InputError, match=r"^[^\n]*tokenizer\.json: [^\n]+$"):
        READERS[reader](path)


@pytest.mark.parametrize("entry, says", [
    ({"name": "cup"}, "keypoint_set"),
    ({"name": "cup", "keypoint_set": "bowl"}, "bowl"),
    ({"keypoint_set": "cup"}, "name"),
])
def test_a_description_that_is_incomplete_is_named(tmp_path, entry, says):
    texts = {"keypoint_sets": {"cup": [{"name": "rim", "description": "above"}]}, "categories": {"3": entry}}
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(texts))
    with pytest.raises(InputError, match=rf"^[^\n]*texts\.json: [^\n]*{says}[^\n]*$"):
        read_descriptions(path)


def test_skeletons_are_lines_between_keypoints(tmp_path):
    point = [{"name": name, "description": "there"} for name in ("rim", "foot", "heart")]
    texts = {"keypoint_sets": {"cup": point, "pot": point}, "skeletons": {"cup": [[0, 2], [2, 1]]},
             "categories": {"3": {"name": "a cup", "keypoint_set": "cup"},
                            "0": {"name": "a pot", "keypoint_set": "pot"}}}
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    categories = read_descriptions(tmp_path / "texts.json")
    assert {number: c.skeleton for number, c in categories.items()} == {3: [(0, 2), (2, 1)], 0: []}
