"""Rubbish: a reader of files reads rightly or says in one line what is wrong, and never ends in a traceback.

Hypothesis spoils good files: it puts other values into them, drops, doubles and swaps entries, and damages
bytes. What a reader accepts is then used, since a reader that lets rubbish pass has only moved the traceback.
The suite tries 25 files a reader. For more, and for a table of how many were accepted:

    RUBBISH=2000 python -m pytest -s tests/test_rubbish.py
"""

import copy
import io
import json
import math
import os
import re
from collections import Counter

import pytest
import torch
from conftest import ROOT, network_arguments
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mp100 import make_wagons_and_kites
from PIL import Image
from safetensors.torch import load_file

from chat import Category, Chat, Scene
from common import InputError, read_json
from data import Crop, crop_of, parse_descriptions, plan_epoch, read_instances
from decode import load_trained
from evaluate import find_hits
from lora import trainable_state
from model import load_network, read_checkpoint
from tools.check import keep_readable
from tools.score import read_predictions

N = int(os.environ.get("RUBBISH", 25))
rubbish = settings(max_examples=N, deadline=None, database=None, derandomize=N == 25,
                   suppress_health_check=list(HealthCheck))
TRIED = Counter()  # (reader, what became of a file)


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    print(f"\n{'reader':16}{'files':>8}{'accepted':>10}{'refused':>9}{'tracebacks':>12}")
    for reader in dict.fromkeys(reader for reader, _ in TRIED):
        accepted, refused, failed = (TRIED[reader, end] for end in ("accepted", "refused", "failed"))
        print(f"{reader:16}{accepted + refused + failed:8}{accepted:10}{refused:9}{failed:12}")


def survive(reader, use):
    """use() reads a file and uses what it holds; or there is one printable line."""
    end = "failed"
    try:
        use()
        end = "accepted"
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) > 10
        end = "refused"
    finally:
        TRIED[reader, end] += 1


# --------------------------------------------------------------------------------------- how files are spoilt

ODD = [None, True, False, 0, 1, -1, 2, 3, 7, 1000, 2**31, 2**63, 10**40, 10**400, -10**400, 0.5, -0.0,
       1e-320, 1e300, -1e300, math.nan, math.inf, -math.inf, "", "0", "1", "-1", "x", "nan", "\0", "\ud800",
       "a\udfffb", "\x1b[2J\x07", "two\nlines", "\u202eabc", "../x", "/etc/passwd", "x" * 5000, [], {}, [[]],
       [None], [1, 2], [1, 2, 3, 4], ["a"], {"a": 1}, {"name": "a"}]
values = st.one_of(st.sampled_from(ODD), st.integers(), st.floats(), st.text(max_size=8),
                   st.lists(st.integers(-3, 300), max_size=5))


def find_places(contents, found=()):
    """-> (container, key) of every value within lists and dictionaries."""
    items = contents.items() if isinstance(contents, dict) else enumerate(contents)
    for key, value in items:
        yield contents, key
        if isinstance(value, (dict, list)) and len(value):
            yield from find_places(value)


@st.composite
def spoilt(draw, good):
    """A copy of dictionaries and lists with one to three entries changed, dropped, doubled or swapped."""
    contents = {"": copy.deepcopy(good)}
    for _ in range(draw(st.integers(1, 3))):
        places = [*find_places(contents)]
        container, key = draw(st.sampled_from(places))
        way = draw(st.sampled_from(["change", "change", "change", "drop", "double", "swap"]))
        if way == "drop" and container is not contents:
            del container[key]
        elif way == "double" and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        elif way == "swap":
            other, place = draw(st.sampled_from(places))
            container[key] = copy.deepcopy(other[place])
        else:
            container[key] = copy.deepcopy(draw(values))
    return contents[""]


@st.composite
def damaged(draw, good):
    """The bytes of a file with some of them changed, or cut off."""
    contents = bytearray(good)
    for _ in range(draw(st.integers(0, 8))):
        contents[draw(st.integers(0, len(contents) - 1))] = draw(st.integers(0, 255))
    return bytes(contents[:draw(st.just(len(contents)) | st.integers(0, len(contents)))])


def spoilt_json(good):
    """Files of bytes, most of them JSON."""
    as_json = spoilt(good).map(lambda contents: json.dumps(contents).encode())
    return st.integers(0, 9).flatmap(lambda n: as_json if n else damaged(json.dumps(good).encode()))


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """Good files to be spoilt: llm/ and vit/, data/, and a checkpoint ckpt.pt of untrained networks."""
    folder = tmp_path_factory.mktemp("world")
    make_wagons_and_kites(folder / "data")
    for network in "llm", "vit":
        (folder / network).symlink_to(tiny / network)
    args = network_arguments(folder)
    model, _ = load_network(args)
    torch.save({"args": vars(args) | {"llm": str(args.llm), "vit": str(args.vit)}, "step": 1, "optimizer": {},
                "descriptions": read_json(folder / "data/descriptions.json"),
                "model": trainable_state(model)}, folder / "ckpt.pt")
    load_trained(folder / "ckpt.pt", "cpu")
    return folder


@pytest.fixture(scope="module")
def spoil(world, tmp_path_factory):
    """spoil(name, contents) -> a copy of the world by links, but for one file below it with these bytes."""
    root = tmp_path_factory.mktemp("spoilt")

    def make(name, contents):
        for file in world.glob("*/*"):
            target = root / file.relative_to(world)
            target.parent.mkdir(exist_ok=True)
            target.unlink(missing_ok=True)
            target.symlink_to(file)
        (root / name).unlink(missing_ok=True)
        (root / name).write_bytes(contents)
        return root
    return make


# --------------------------------------------------------------------------------------------------- networks


def load_and_use(folder):
    """Loads networks and reads a photo and a few tokens."""
    model, _ = load_network(network_arguments(folder))
    tokens = torch.tensor([[0, 5, 6]])
    model(torch.zeros(1, 3, 56, 56), tokens, tokens)


CONFIGS = {
    "llm": dict(head_dim=8, rms_norm_eps=1e-5, tie_word_embeddings=False, rope_theta=1e4, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192)),
    "vit": dict(mlp_ratio=4, layer_norm_eps=1e-6, patch_size=14, use_swiglu_ffn=False, num_register_tokens=0)}


@pytest.mark.parametrize("network", CONFIGS)
@rubbish
@given(st.data())
def test_a_networks_config(world, spoil, network, data):
    good = read_json(world / network / "config.json") | CONFIGS[network]
    contents = data.draw(spoilt_json(good))
    assume(not re.search(rb'"num_hidden_layers": \d{4}', contents))  # so many would be made, one by one
    folder = spoil(f"{network}/config.json", contents)
    survive(f"{network} config", lambda: load_and_use(folder))


@rubbish
@given(st.data())
def test_an_index_of_weights(world, spoil, data):
    keys = load_file(world / "llm/model.safetensors")
    good = {"metadata": {"total_size": 1}, "weight_map": {key: "model.safetensors" for key in [*keys][:3]}}
    folder = spoil("llm/model.safetensors.index.json", data.draw(spoilt_json(good)))
    survive("index.json", lambda: load_and_use(folder))
    (folder / "llm/model.safetensors.index.json").unlink()


@pytest.mark.parametrize("network", CONFIGS)
@rubbish
@given(st.data())
def test_weights(world, spoil, network, data):
    good = (world / network / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")  # of the header, the part that can go wrong
    header = data.draw(damaged(good[:end]))
    folder = spoil(f"{network}/model.safetensors", header + good[end:] * (len(header) == end))
    survive(f"{network} weights", lambda: load_and_use(folder))


@rubbish
@given(st.data())
def test_a_tokenizer(spoil, data):
    good = read_json(ROOT / "assets/toy/llm/tokenizer.json")
    folder = spoil("llm/tokenizer.json", data.draw(spoilt_json(good)))

    def use():
        chat, ear = Chat(folder / "llm"), ("left ear", "the ear on the left, at the top")
        tokens, _ = chat.encode_conversation(Scene(Category("cat", [ear]), [(ear, (0.25, 0.999))]))
        chat.encode_questions(Category("cat", [ear]))
        chat.parse(tokens)
    survive("tokenizer", use)


# ------------------------------------------------------------------------------------------------------- data


@rubbish
@given(st.data())
def test_descriptions(world, tmp_path_factory, data):
    good = read_json(world / "data/descriptions.json") | {"skeletons": {"kite": [[0, 1], [1, 2]]}}
    path, chat = tmp_path_factory.getbasetemp() / "descriptions.json", Chat(world / "llm")
    path.write_bytes(data.draw(spoilt_json(good)))

    def use():
        for number, category in parse_descriptions(read_json(path, dict), path).items():
            assert isinstance(number, int)
            chat.encode_questions(category)
    survive("descriptions", use)


@rubbish
@given(st.data())
def test_annotations(world, tmp_path_factory, data):
    good = read_json(world / "data/annotations/mp100_split1_test.json")
    good = {**good, "images": good["images"][:3], "annotations": good["annotations"][:3]}
    path = tmp_path_factory.getbasetemp() / "annotations.json"
    path.write_bytes(data.draw(spoilt_json(good)))
    descriptions = world / "data/descriptions.json"
    categories = parse_descriptions(read_json(descriptions), descriptions)

    def use():
        instances = read_instances(path, categories)
        plan_epoch(instances, 0, 0, 4)
        for instance in instances:
            crop_of(instance).cut(world / "data/images/kite/1.jpg", 14)
        keep_readable(instances, world / "data/images", categories, allow_missing=True)
    survive("annotations", use)


@rubbish
@given(st.data())
def test_predictions(world, tmp_path_factory, data):
    descriptions = world / "data/descriptions.json"
    categories = parse_descriptions(read_json(descriptions), descriptions)
    instances = read_instances(world / "data/annotations/mp100_split1_test.json", categories)
    good = [{"annotation_id": o.annotation_id, "keypoints": [[1.5, 2], *[None] * (len(o.keypoints) - 1)]}
            for o in instances]
    path = tmp_path_factory.getbasetemp() / "predictions.json"
    path.write_bytes(data.draw(spoilt_json(good)))

    def use():
        known, points, _ = read_predictions(path, instances, True)
        for instance, of_object in zip(known, points, strict=True):
            assert find_hits(instance, of_object).shape == (5, len(instance.keypoints))
    survive("predictions", use)


GOOD_PHOTOS = []
for kind in "JPEG", "PNG", "GIF", "BMP", "WEBP", "AVIF", "TIFF", "PPM", "TGA", "ICO", "JPEG2000", "SPIDER":
    try:
        Image.effect_noise((40, 30), 90).convert("L" if kind == "SPIDER" else "RGB").save(
            file := io.BytesIO(), kind)
        GOOD_PHOTOS.append(file.getvalue())
    except (KeyError, OSError):  # pillow was built without it
        pass


@rubbish
@given(st.sampled_from(GOOD_PHOTOS).flatmap(damaged), st.sampled_from([4, 30, 500]))
def test_photos(tmp_path_factory, contents, side):
    path = tmp_path_factory.getbasetemp() / "photo"
    path.write_bytes(contents)
    survive("photos", lambda: Crop(20, 15, side).cut(path, 14))


# ------------------------------------------------------------------------------------------------ checkpoints


@rubbish
@given(st.data())
def test_checkpoints(world, tmp_path_factory, data):
    good = torch.load(world / "ckpt.pt", weights_only=True)
    tensors = st.sampled_from([torch.tensor(math.nan), torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64),
                               torch.zeros(1).expand(10**12), torch.eye(2).to_sparse()])
    part = data.draw(st.sampled_from([*good]))
    contents = good | {part: data.draw(spoilt(good[part]))}
    if data.draw(st.booleans()):
        container, key = data.draw(st.sampled_from([*find_places(contents)]))
        container[key] = data.draw(tensors)
    path = tmp_path_factory.getbasetemp() / "ckpt.pt"
    torch.save(contents, path)

    def use():
        _, _, checkpoint = load_trained(path, torch.device("cpu"))
        parse_descriptions(checkpoint["descriptions"], path)
    survive("checkpoints", use)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@rubbish
@given(st.data())
def test_damaged_checkpoints(world, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "ckpt.pt"
    path.write_bytes(data.draw(damaged((world / "ckpt.pt").read_bytes())))
    survive("damaged ckpt.pt", lambda: read_checkpoint(path))


@rubbish
@given(st.binary(max_size=30) | damaged(b'\xef\xbb\xbf{"a": [1, "b", NaN], "c": {"a": 1e9}}'))
def test_json(tmp_path_factory, contents):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(contents)
    survive("JSON", lambda: read_json(path))
