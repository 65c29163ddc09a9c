"""Rubbish: a reader of files reads rightly or says in one line what is wrong, and never ends in a traceback.

Hypothesis spoils good files: it puts other values into them, drops, doubles and swaps entries, and damages
bytes. What a reader accepts is then used, since a reader that lets rubbish pass has only moved the traceback.
The suite tries 15 files a reader. For more, and for a table of how many were accepted:

    RUBBISH=2000 python -m pytest -n 0 -s tests/test_rubbish.py
"""

import copy
import io
import json
import math
import os
import re
import shutil
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

N = int(os.environ.get("RUBBISH", 15))
rubbish = settings(max_examples=N, deadline=None, database=None, derandomize=N == 15,
                   suppress_health_check=list(HealthCheck))
TRIED = Counter()  # (reader, what became of a file)


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    print(f"\n{'reader':44}{'files':>8}{'accepted':>10}{'refused':>9}{'tracebacks':>12}")
    for reader in dict.fromkeys(reader for reader, _ in TRIED):
        accepted, refused, failed = (TRIED[reader, end] for end in ("accepted", "refused", "failed"))
        print(f"{reader:44}{accepted + refused + failed:8}{accepted:10}{refused:9}{failed:12}")


def survive(reader, path, contents, use, *args):
    """use(*args) reads a file of these contents and uses what it holds; or there is one printable line."""
    good, end = path.read_bytes() if path.exists() else None, "failed"
    path.unlink(missing_ok=True)  # something may still look into the one that was there
    path.write_bytes(contents)
    try:
        use(*args)
        end = "accepted"
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) > 10
        end = "refused"
    finally:
        TRIED[reader, end] += 1
        path.unlink()
        if good is not None:
            path.write_bytes(good)


# --------------------------------------------------------------------------------------- how files are spoilt

ODD = [None, True, False, 0, 1, -1, 2, 3, 7, 1000, 2**31, 2**63, 10**40, 10**400, -10**400, 0.5, -0.0,
       1e-320, 1e300, -1e300, math.nan, math.inf, -math.inf, "", "0", "1", "-1", "x", "nan", "\0", "\ud800",
       "a\udfffb", "\x1b[2J\x07", "two\nlines", "\u202eabc", "../x", "/etc/passwd", "x" * 5000, [], {}, [[]],
       [None], [1, 2], [1, 2, 3, 4], ["a"], {"a": 1}, {"name": "a"}]
values = st.one_of(st.sampled_from(ODD), st.integers(), st.floats(), st.text(max_size=8),
                   st.lists(st.integers(-3, 300), max_size=5))


def find_places(contents):
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


# ---------------------------------------------------------------------------------- good files, and their use

MORE = {  # what published config.json hold beside those of our tiny networks
    "llm": dict(head_dim=8, rms_norm_eps=1e-5, tie_word_embeddings=False, rope_theta=1e4, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192)),
    "vit": dict(mlp_ratio=4, layer_norm_eps=1e-6, patch_size=14, use_swiglu_ffn=False, num_register_tokens=0)}


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """Good files: llm/ and vit/, data/, predictions.json, and a checkpoint ckpt.pt of untrained networks."""
    folder = tmp_path_factory.mktemp("world")
    make_wagons_and_kites(folder / "data")

    def write(file, contents):
        (folder / file).write_text(json.dumps(contents))
    for network, more in MORE.items():
        shutil.copytree(tiny / network, folder / network)
        write(f"{network}/config.json", read_json(tiny / network / "config.json") | more)
    shutil.copy(ROOT / "assets/toy/llm/tokenizer.json", folder / "llm")
    weights = dict.fromkeys(load_file(folder / "llm/model.safetensors"), "model.safetensors")
    write("llm/model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": weights})
    texts = read_json(folder / "data/descriptions.json") | {"skeletons": {"kite": [[0, 1], [1, 2]]}}
    write("data/descriptions.json", texts)
    write("predictions.json", [{"annotation_id": 100 + i, "keypoints": [[1.5, 2], *[None] * (K - 1)]}
                               for i, K in enumerate([5, 3] * 3)])
    args = network_arguments(folder)
    torch.save({"args": vars(args) | {"llm": str(args.llm), "vit": str(args.vit)}, "step": 1, "optimizer": {},
                "descriptions": texts, "model": trainable_state(load_network(args)[0])}, folder / "ckpt.pt")
    return folder


def use_networks(world):
    model, _ = load_network(network_arguments(world))
    tokens = torch.tensor([[0, 5, 6]])
    model(torch.zeros(1, 3, 56, 56), tokens, tokens)


def use_tokenizer(world):
    chat, ear = Chat(world / "llm"), ("left ear", "the ear on the left, at the top")
    tokens, _ = chat.encode_conversation(Scene(Category("cat", [ear]), [(ear, (0.25, 0.999))]))
    chat.encode_questions(Category("cat", [ear]))
    chat.parse(tokens)


def use_descriptions(world):
    path = world / "data/descriptions.json"
    categories = parse_descriptions(read_json(path, dict), path)
    for category in categories.values():
        Chat(world / "llm").encode_questions(category)
    return categories


def use_annotations(world):
    categories = use_descriptions(world)
    instances = read_instances(world / ANNOTATIONS, categories)
    plan_epoch(instances, 0, 0, 4)
    for instance in instances:
        crop_of(instance).cut(world / "data/images/kite/1.jpg", 14)
    keep_readable(instances, world / "data/images", categories, allow_missing=True)
    return instances


def use_predictions(world):
    known, points, _ = read_predictions(world / "predictions.json", use_annotations(world), True)
    for instance, of_object in zip(known, points, strict=True):
        assert find_hits(instance, of_object).shape == (5, len(instance.keypoints))


def use_checkpoint(world):
    _, _, checkpoint = load_trained(world / "ckpt.pt", torch.device("cpu"))
    parse_descriptions(checkpoint["descriptions"], world / "ckpt.pt")


ANNOTATIONS = "data/annotations/mp100_split1_test.json"
JSON = {"llm/config.json": use_networks, "vit/config.json": use_networks,
        "llm/model.safetensors.index.json": use_networks, "llm/tokenizer.json": use_tokenizer,
        "data/descriptions.json": use_descriptions, ANNOTATIONS: use_annotations,
        "predictions.json": use_predictions}


def test_good_files_are_accepted(world):
    for use in dict.fromkeys([*JSON.values(), use_checkpoint]):
        use(world)


@pytest.mark.parametrize("file", JSON)
@rubbish
@given(st.data())
def test_spoilt_json(world, file, data):
    contents = data.draw(spoilt_json(read_json(world / file)))
    assume(not re.search(rb'"num_hidden_layers": \d{4}', contents))  # so many would be made, one by one
    survive(file, world / file, contents, JSON[file], world)


@pytest.mark.parametrize("network", MORE)
@rubbish
@given(st.data())
def test_damaged_weights(world, network, data):
    path = world / network / "model.safetensors"
    good = path.read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")  # of the header, the part that can go wrong
    header = data.draw(damaged(good[:end]))
    survive(f"{network} weights", path, header + good[end:] * (len(header) == end), use_networks, world)


@rubbish
@given(st.data())
def test_spoilt_checkpoints(world, data):
    good = torch.load(world / "ckpt.pt", weights_only=True)
    tensors = st.sampled_from([torch.tensor(math.nan), torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64),
                               torch.zeros(1).expand(10**12), torch.eye(2).to_sparse()])
    part = data.draw(st.sampled_from([*good]))
    contents = good | {part: data.draw(spoilt(good[part]))}
    if data.draw(st.booleans()):
        container, key = data.draw(st.sampled_from([*find_places(contents)]))
        container[key] = data.draw(tensors)
    torch.save(contents, file := io.BytesIO())
    survive("ckpt.pt", world / "ckpt.pt", file.getvalue(), use_checkpoint, world)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@rubbish
@given(st.data())
def test_damaged_checkpoints(world, data):
    path = world / "ckpt.pt"
    survive("damaged ckpt.pt", path, data.draw(damaged(path.read_bytes())), read_checkpoint, path)


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
def test_damaged_photos(world, contents, side):
    survive("photos", world / "photo", contents, Crop(20, 15, side).cut, world / "photo", 14)
