"""data.py: MP-100's own annotations, crops of drawn photos, epochs, bad input."""

import gzip
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, runs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

import data
from chat import IGNORE, Chat
from data import Category, Crop, Object, TrainingSet, collate, crop_of, plan_epoch, read_descriptions, read_objects
from llama import InputError

quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
CUP = Category("cup", [("rim", "where one drinks."), ("foot", "below (or under) it"), ("left ear", "its handle"), ("heart", "inside")])
CATEGORIES = {1: CUP, 2: Category("plate", [("rim", "all around")])}


@pytest.fixture(scope="module")
def benchmark(shared, tmp_path_factory):
    """Of MP-100's five test files: (photos by id, annotations by id, objects)."""
    categories, path, files = read_descriptions(ROOT / "descriptions.json"), tmp_path_factory.mktemp("mp100") / "test.json", []
    for split in range(1, 6):
        path.write_bytes(gzip.decompress((shared / "mp100" / "annotations" / f"mp100_split{split}_test.json.gz").read_bytes()))
        raw = json.loads(path.read_text())
        files.append(({p["id"]: p for p in raw["images"]}, {a["id"]: a for a in raw["annotations"]}, read_objects(path, categories)))
    return files


def test_benchmark_files_load(benchmark):
    assert [len(objects) for *_, objects in benchmark] == [2000, 1994, 2000, 1811, 1998]
    for photos, annotations, objects in benchmark:
        order = [list(photos).index(annotations[o.id]["image_id"]) for o in objects]
        assert order == sorted(order) and annotations.keys() - {o.id for o in objects} <= {1800000000001530, 1800000000019879}  # negative
        for o in objects:
            a, (x, y, w, h) = annotations[o.id], o.box
            photo, points = photos[a["image_id"]], np.reshape(a["keypoints"], (-1, 3))
            assert 0 <= x < x + w < photo["width"] and 0 <= y < y + h < photo["height"] and o.photo == photo["file_name"]
            assert o.category == a["category_id"] and (o.keypoints == points[:, :2]).all() and (o.visible == (points[:, 2] > 0)).all()
    objects = {o.id: o for *_, split in benchmark for o in split}  # ids of 64 bits
    assert objects[7700000001007272].box == pytest.approx((0, 163.2627, 186.4413, 268.5377), abs=1e-4)  # x from -3.178 on
    assert objects[7700000001007187].box == pytest.approx((858.0322, 595.9045, 295.5098, 632.0955), abs=1e-4)  # the photo is 1229 high
    assert objects[5100000000040072].visible.tolist() == [k != 6 for k in range(13)]  # point 6 has coordinates, but v=0
    assert {o.category: len(o.keypoints) for o in objects.values() if o.category in (18, 40)} == {18: 19, 40: 68}  # both called face


@pytest.mark.parametrize("changes, outcome", [
    *((dict(bbox=bbox), box) for bbox, box in (
        ([10, 20, 30, 40], (10, 20, 29, 39)), ([0, 0, 100, 80], (0, 0, 99, 79)), ([-5, -7, 30, 40], (0, 0, 29, 39)),
        ([90.5, 70, 30, 40], (90.5, 70, 8.5, 9)), ([10.5, -1, 30.25, 900], (10.5, 0, 29.25, 79)), ([99, 20, 30, 40], None),
        ([98, 79, 9, 9], None), ([120, 20, 30, 40], None), ([50, 60, -40, -30], None), ([10, 20, 1, 40], None), ([10, 20, 30, 0], None))),
    (dict(iscrowd=1), None), (dict(area=0), None), (dict(area=-1), None), (dict(keypoints=[0, 0, 0]), None),
    (dict(keypoints=[1, 2, 2, 3, 4, 2]), "annotation 5 has 2 keypoints, but plate has 1 description"), (dict(keypoints=[1, 2, 2, 3]), ""),
    (dict(category_id=7), "category 7 has no descriptions"), (dict(bbox=None), ""), (dict(bbox=[1, 2, 3]), ""), (dict(image_id=[]), ""),
    *((dict(keypoints=[bad, 30, 1]), "annotation 5 .*not a number") for bad in (math.nan, math.inf, None)),
    *((dict(bbox=[bad if i == j else 9 for i in range(4)]), "annotation 5 .*not a num") for bad in (math.nan, math.inf) for j in range(4))])
def test_an_annotation_gives_its_clipped_box_or_nothing_or_an_error_that_names_it(tmp_path, changes, outcome):
    annotation = dict(id=5, image_id=10**15, category_id=2, bbox=[10, 20, 30, 40], area=9, iscrowd=0, keypoints=[20, 30, 1]) | changes
    photo = dict(id=10**15, file_name="plate/1.png", width=100, height=80)
    (tmp_path / "a.json").write_text(json.dumps({"images": [photo], "annotations": [annotation]}))
    if isinstance(outcome, str):
        with pytest.raises(InputError, match=rf"^[^\n]*a\.json: [^\n]*{outcome}[^\n]*$"):
            read_objects(tmp_path / "a.json", CATEGORIES)
    else:
        assert [o.box for o in read_objects(tmp_path / "a.json", CATEGORIES)] == [outcome] * (outcome is not None)


@settings(quick, max_examples=40)
@given(format=st.sampled_from(["png", "jpg"]), size=st.sampled_from([32, 56, 97]), side=st.floats(16, 900),
       angle=st.just(0.0) | st.floats(-math.pi, math.pi), dot=st.tuples(*[st.floats(-0.2, 0.2)] * 4))
def test_a_bright_dot_is_where_from_photo_says_and_to_photo_leads_back(tmp_path_factory, format, size, side, angle, dot):
    """In squares small and large, turned clockwise, reaching outside the photo, read at full and at reduced scale."""
    path, xs, ys = tmp_path_factory.getbasetemp() / f"dot.{format}", np.arange(620) + 0.5, np.arange(450)[:, None] + 0.5  # pixels' centres
    x, y, (dx, dy), sigma = 310 + 620 * dot[0], 225 + 450 * dot[1], dot[2:], min(max(1.5, side / 25), 28)
    light = 255 * np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / (2 * sigma**2))
    Image.fromarray(light.round().astype(np.uint8)).save(path, quality=97)
    crop = Crop(x - dx * side, y - dy * side, side, angle)
    c, s = math.cos(angle), math.sin(angle)  # (c, s) and (-s, c) are the crop's axes in the photo
    expected = 0.5 + dx * c + dy * s, 0.5 - dx * s + dy * c
    assert (*crop.from_photo(np.array([x, y])), *crop.to_photo(expected)) == pytest.approx((*expected, x, y), abs=1e-6)
    seen = (crop.cut(path, size)[0].double() - 60).clamp(min=0)
    found = [(seen.sum(axis) @ (torch.arange(size, dtype=torch.float64) + 0.5) / seen.sum()).item() for axis in (0, 1)]
    assert found == pytest.approx(np.multiply(expected, size), abs=0.15)  # pixels of the crop; PIL's bicubic alone is off by up to 0.1


def test_outside_the_photo_is_black_and_a_fine_checkerboard_becomes_grey(tmp_path):
    Image.new("RGB", (600, 400), "white").save(path := tmp_path / "white.png")
    quarter = Crop(0, 0, 40).cut(path, 40)
    assert quarter.dtype == torch.uint8 and quarter[:, 20:, 20:].min() == 255 and quarter.sum() == 3 * 20 * 20 * 255
    share = [(Crop(300, 200, 780, angle).cut(path, 64) / 255).mean().item() for angle in (0, 0.5, -2)]
    assert share == pytest.approx([600 * 400 / 780**2] * 3, rel=0.02)
    Image.fromarray((np.indices((900, 900)).sum(0) % 2 * 255).astype(np.uint8)).save(path)
    for side, angle in (200, 0.0), (200, 0.3), (600, 0.0), (600, 0.3):
        cut = Crop(451, 453, side, angle).cut(path, 64).float()
        assert abs(cut.mean() - 127.5) < 1 and cut.std() < 3


@pytest.mark.parametrize("name", ["RGB.png", "L.png", "L.jpg", "P.png", "RGBA.png", "LA.png", "CMYK.jpg", "I;16.png", "RGB.jpg"])
def test_photos_of_all_modes_are_read_as_stored_and_truncated_ones_named(tmp_path, name):
    mode, path, tags, crop = name.split(".")[0], tmp_path / name, Image.Exif(), Crop(60, 40, 80)
    photo = Image.fromarray(np.uint8([[[255, 0, 0], [0, 204, 0]], [[0, 0, 255], [102, 102, 102]]]).repeat(40, axis=0).repeat(60, axis=1))
    tags[0x0112] = 6  # EXIF: to be turned for viewing
    photo = photo.convert("L") if mode in ("L", "LA", "I;16") else photo
    stored = Image.fromarray(np.asarray(photo) * np.uint16(257)) if mode == "I;16" else photo.convert(mode)
    stored.save(path, quality=95, subsampling=0, exif=tags)
    assert Image.open(path).mode == mode and Image.open(path).getexif()[0x0112] == 6
    assert np.abs(crop.cut(path, 80).permute(1, 2, 0).numpy() - np.asarray(photo.convert("RGB"), float)[:, 20:100]).mean() < 2
    path.write_bytes(path.read_bytes()[:-path.stat().st_size // 3])
    with pytest.raises(InputError, match=rf"^[^\n]*{name}: [^\n]+$"):
        crop.cut(path, 80)


def test_large_photos_are_decoded_small_and_nothing_is_lost(tmp_path, monkeypatch):
    path, sizes, load, bicubic = tmp_path / "large.jpg", [], ImageFile.ImageFile.load, Image.Resampling.BICUBIC
    Image.effect_noise((125, 94), 90).resize((4000, 3000), bicubic).save(path, quality=90)
    full = Image.open(path).convert("RGB")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda photo: (load(photo), sizes.append(photo.im.size))[0])
    for side, decoded in (4000, (500, 375)), (3000, (1000, 750)), (1000, (2000, 1500)), (300, (4000, 3000)):
        cut = Crop(2000, 1500, side).cut(path, 224).permute(1, 2, 0).numpy()
        plain = full.crop([2000 - side // 2, 1500 - side // 2, 2000 + side // 2, 1500 + side // 2]).resize((224, 224), bicubic)
        assert sizes[-1] == decoded and np.abs(cut - np.asarray(plain, float)).mean() < 1


def cups(n):
    """Objects with four keypoints: near the centre; there too, but hidden in every second; in the largest crops only; near the centre."""
    points = np.random.default_rng(0).uniform(35, 65, (n, 4, 2))
    points[:, 2] = 112, 50
    return [Object(i, 1, "cup.png", (0, 0, 100, 90), points[i], np.array([True, i % 2 == 0, True, True])) for i in range(n)]


@quick
@given(n=st.integers(1, 70), k=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_groups_hold_every_keypoint_and_the_last_is_filled_with_others(n, k, seed):
    groups = data.group_keypoints(n, k, np.random.default_rng(seed))
    assert sorted(sum(groups, [])[:n]) == [*range(n)] and [[len(g), len({*g})] for g in groups] == [[min(n, k)] * 2] * math.ceil(n / k)


def test_dynamic_rounds_ask_every_keypoint_once_in_as_many_conversations_as_four(monkeypatch):
    sizes = []
    for n in range(1, 69):
        groups = data.group_keypoints(n, "dynamic", np.random.default_rng(n))
        assert sorted(sum(groups, [])) == [*range(n)] and all(groups) and len(groups) == math.ceil(n / 4) == data.count_groups(n, "dynamic")
        sizes += map(len, groups)
    assert set(sizes) > {*range(1, 9)} and np.mean(sizes) == pytest.approx(4, abs=0.5)
    assert len({repr(data.group_keypoints(17, "dynamic", np.random.default_rng(seed))) for seed in range(20)}) == 20
    cuts = {tuple(map(len, data.group_keypoints(5, "dynamic", np.random.default_rng(seed)))) for seed in range(50)}
    assert cuts == {(1, 4), (2, 3), (3, 2), (4, 1)}


def test_augmentation_is_as_published_and_none_is_in_a_test():
    crops = [e.crop for e in plan_epoch(cups(4000), 0, 0, rounds=4)]
    scale, angle = np.array([(crop.side / 100, math.degrees(crop.angle)) for crop in crops]).T
    assert {(crop.x, crop.y) for crop in crops} == {(50, 45)} and crop_of(cups(1)[0]) == Crop(50, 45, 100, 0)
    assert (scale.min(), scale.max()) == (0.7, 1.3) and np.abs(angle).max() <= 40
    shares = (scale == 0.7).mean(), (scale == 1.3).mean(), (scale < 1).mean(), (angle != 0).mean()
    assert shares == pytest.approx((0.159, 0.159, 0.5, 0.5), abs=0.03)  # one standard deviation of N(1, 0.3) to either side
    assert angle[angle != 0].std() == pytest.approx(80 / 12**0.5, rel=0.05) and abs(angle.mean()) < 2


@pytest.mark.parametrize("source, pack", [("drawn", False), ("drawn", True), ("benchmark", False), ("benchmark", True)])
def test_an_epoch_asks_every_visible_keypoint_inside_its_crop(request, monkeypatch, source, pack):
    objects = cups(100) if source == "drawn" else request.getfixturevalue("benchmark")[1][2][::4]
    objects.append(Object(-1, 1, "cup.png", (0, 0, 9, 9), np.array([[5, 5], [50, 50]]), np.array([False, True])))  # nothing to ask
    for fixed in False, True:
        monkeypatch.setattr(data, "crop_of", (lambda o, *_: crop_of(o)) if fixed else crop_of)  # one crop for all groups of an object
        asked, examples = {o.id: set() for o in objects}, plan_epoch(objects, 1, 0, 3, pack)
        assert len({e.object.id for e in examples}) == len(examples) if pack else {len(e.groups) for e in examples} == {1}
        for e in examples:
            assert e.groups and all(0 < len(set(g)) == len(g) <= 3 for g in e.groups)
            where = e.crop.from_photo(e.object.keypoints[sum(e.groups, [])])
            assert where.min() >= 0 and where.max() < 1 and e.object.visible[sum(e.groups, [])].all()
            asked[e.object.id] |= set(sum(e.groups, []))
        for o in objects:
            where = crop_of(o).from_photo(o.keypoints)
            inside = ((0 <= where) & (where < 1)).all(1) if fixed else np.hypot(*(where.T - 0.5)) < 0.35  # that is in all crops
            assert asked[o.id] >= (wanted := {*np.flatnonzero(o.visible & inside).tolist()}) and (not fixed or asked[o.id] == wanted)


@pytest.mark.parametrize("groups", [[[2, 0]], [[3, 1], [0]]], ids=["one group", "packed"])
def test_training_sequence_shows_the_crop_and_asks_where_its_keypoints_are(chat, tmp_path, groups):
    (tmp_path / "images").mkdir()
    Image.effect_noise((120, 100), 90).save(tmp_path / "images/cup.png")
    cup, crop, head = cups(1)[0], Crop(52, 49, 160, 0.4), 1 + len(chat.newline)
    items = [*TrainingSet([data.Example(cup, crop, g) for g in (groups, [[1]])], CATEGORIES, chat, tmp_path, 28)]
    images, tokens, labels, numbers = collate(items)
    for item, image, ids, learned, asked in zip(items, images, tokens.tolist(), labels.tolist(), (sum(groups, []), [1])):
        n = len(item["tokens"])
        assert (ids[:n], learned[:n]) == (item["tokens"], item["labels"]) and torch.equal(image, crop.cut(tmp_path / "images/cup.png", 28))
        assert ids[:head] == [chat.bos, *chat.newline] and learned[:head] + learned[n:] == [IGNORE] * (head + len(ids) - n)
        pieces = runs(ids[head:n], learned[head:n])
        assert pieces[::2] == [chat.questions(CUP)[k] for k in asked]
        assert all(np.abs(crop.to_photo(chat.parse(p[:-1])) - cup.keypoints[k]).max() < 0.16 for k, p in zip(asked, pieces[1::2]))
    first = len(sum(runs(items[0]["tokens"][head:], items[0]["labels"][head:])[:4], []))
    assert numbers is None if len(groups) == 1 else numbers[0].tolist() == [0] * head + [1] * first + [2] * (len(tokens[0]) - head - first)


def test_conversations_know_what_is_hidden_and_draw_numbers_of_their_own(monkeypatch):
    """Hidden: not labelled as visible, or outside the crop, asked or not. Drawn: from (seed, epoch, object, group), and nothing twice."""
    heard = []
    monkeypatch.setattr(Crop, "cut", lambda *_: None)
    monkeypatch.setattr(Chat, "conversation", lambda _, scene: heard.append(scene) or ([3], [3]))
    chat = Chat.__new__(Chat)
    chat.bos, chat.newline = 1, [2]

    def scenes(examples):
        heard.clear()
        return [*TrainingSet(examples, CATEGORIES, chat, "", 28)] and heard[:]

    even, odd = scenes([data.Example(o, crop_of(o), [[0, 3]]) for o in cups(2)])
    assert (even.hidden, odd.hidden) == (["left ear"], ["foot", "left ear"])
    epochs = [[s.rng.random() for s in scenes(plan_epoch(cups(5), seed, epoch, 1))] for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert epochs[0] == epochs[3] and len({*sum(epochs[:3], [])}) == sum(map(len, epochs[:3]))
    planned = {np.random.default_rng((seed, epoch, i)).random() for seed, epoch in ((0, 0), (0, 1), (1, 0)) for i in range(6)}
    assert not planned & {*sum(epochs, [])}  # numpy takes (seed, epoch, i, 0) for (seed, epoch, i)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_depend_on_seed_and_epoch_and_nothing_else(shared, tiny):
    root, path, chat = shared / "mini_mp100", shared / "mini_mp100/annotations/mp100_split1_train.json", Chat(tiny / "llm")
    counts = {a["category_id"]: len(a["keypoints"]) // 3 for a in json.loads(path.read_text())["annotations"]}
    categories = {c: Category(f"thing {c}", [(f"point {k}", f"number {k}") for k in range(n)]) for c, n in counts.items()}
    objects = read_objects(path, categories)

    def batches(workers):
        dataset = TrainingSet(plan_epoch(objects, 1, 2, 4)[:24], categories, chat, root, 56)
        torch.manual_seed(np.random.randint(1000))  # all that is random elsewhere has no influence
        return [t for batch in torch.utils.data.DataLoader(dataset, 4, collate_fn=collate, num_workers=workers) for t in batch[:3]]

    first, *others = batches(0), batches(0), batches(4)
    assert all(len(other) == len(first) == 18 and all(map(torch.equal, first, other)) for other in others)
    asked = (objects, 1, 2), ([objects[-1], *objects[1:20]], 1, 2), (objects, 2, 2), (objects, 1, 3)
    every, few, *others = [{(e.object.id, repr((e.crop, e.groups))) for e in plan_epoch(*args, 4)} for args in asked]
    assert {id for id, _ in few - every} == {objects[-1].id} and all(len(every & other) < 0.05 * len(every) for other in others)


@pytest.mark.parametrize("content", [None, b"", b"P6 3 x 255 ", b"P6 90000 90000 255 ", b'{"images": [', b"[]", b"{}", b"7",
                                     b'{"images": [{}], "annotations": [], "keypoint_sets": {}, "categories": {"1": 1}}'])
def test_missing_and_damaged_files_are_named_and_photos_counted_by_category(tmp_path, content):
    objects = [Object(i, 1 + i // 3, f"{i}.png", (0, 0, 9, 9), np.ones((1, 2)), np.ones(1, bool)) for i in range(4)]
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "images/0.png")
    for name in ["tokenizer.json", "images/1.png", "images/2.png", "images/3.png"] * (content is not None):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"^[^\n]*3 objects .*cup 2, plate 1[^\n]*$"):
        data.existing_photos(objects, tmp_path, CATEGORIES, allow_missing=False)
    assert data.existing_photos(objects, tmp_path, CATEGORIES, allow_missing=True) == objects[:1]
    for read in (lambda p: read_objects(p, CATEGORIES), read_descriptions, lambda p: Chat(p.parent), lambda p: Crop(4, 4, 8).cut(p, 14)):
        with pytest.raises(InputError, match=r"^[^\n]*tokenizer\.json: [^\n]+$"):
            read(tmp_path / "tokenizer.json")
