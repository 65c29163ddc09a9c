"""Rubbish: every reader of files either reads rightly or says in one line what is wrong, never a traceback.

Hypothesis spoils good files: it puts other values into them, drops, doubles and swaps entries, and damages
bytes. What a reader accepts is then used, since a reader that lets rubbish pass has only moved the traceback.
The suite tries 100 files a reader. For more, and for a table of how many were accepted:

    RUBBISH=2000 python -m pytest -s tests/test_rubbish.py
"""

import copy
import io
import json
import math
import os
from argparse import ArgumentTypeError
from collections import Counter
from contextlib import redirect_stdout

import pytest
import torch
from checkpoints import LLAMA3
from conftest import ROOT, save_network
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mp100 import make_wagons_and_kites
from PIL import Image
from safetensors.torch import load_file

import train
from chat import Category, Chat, Scene
from checkpoint import load_optimizer, load_trained, read_checkpoint
from common import InputError, between, natural, positive, read_json
from data import (
    Crop,
    crop_of,
    keep_readable,
    parse_descriptions,
    plan_epoch,
    read_descriptions,
    read_instances,
)
from evaluate import find_hits, make_report, print_report, read_predictions
from hiera import Hiera, HieraConfig
from llama import Llama
from lora import trainable_state
from predict import parse_keypoints
from vit import ViT

N = int(os.environ.get("RUBBISH", 100))
rubbish = settings(max_examples=N, deadline=None, database=None, derandomize=N == 100,
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


# ------------------------------------------------------------------------------------------- how files are sp

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
    """Good files to be spoilt: a folder with data/, hiera/, index/ and a barely trained ckpt.pt."""
    folder = tmp_path_factory.mktemp("world")
    make_wagons_and_kites(folder / "data")
    config = dict(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], image_size=[64, 64])
    save_network(folder / "hiera", Hiera(HieraConfig(**config)), {"model_type": "hiera", **config})
    args = train.parse_arguments([
        "--llm", f"{tiny}/llm", "--vit", f"{tiny}/vit", "--image-size", "56", "--data", f"{folder}/data"])
    model = train.load_model(args, torch.device("cpu"))
    optimizer = train.make_optimizer(model, args, torch.device("cpu"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    torch.save({"args": vars(args), "descriptions": read_json(folder / "data/descriptions.json"), "step": 1,
                "model": trainable_state(model), "optimizer": optimizer.state_dict()}, folder / "ckpt.pt")
    return folder


@pytest.fixture(scope="module")
def chat(tiny):
    return Chat(tiny / "llm")


@pytest.fixture(scope="module")
def spoil(tmp_path_factory):
    """spoil(folder, name, contents) -> a copy of a folder by links, but for one file with these bytes."""
    root = tmp_path_factory.mktemp("spoilt")

    def make(folder, name, contents):
        target = root / folder.name
        target.mkdir(exist_ok=True)
        for file in folder.iterdir():
            if not (target / file.name).exists():
                (target / file.name).symlink_to(file)
        (target / name).unlink(missing_ok=True)
        (target / name).write_bytes(contents)
        return target
    return make


# --------------------------------------------------------------------------------------------------- networks


@rubbish
@given(st.data())
def test_a_llamas_config(tiny, spoil, data):
    contents = data.draw(spoilt_json(read_json(tiny / "llm/config.json") | {
        "head_dim": 8, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_theta": 1e4,
        "rope_scaling": LLAMA3 | {"factor": 8.0}}))
    folder = spoil(tiny / "llm", "config.json", contents)

    def use():
        assert Llama.load(folder)(torch.ones(1, 3, 32)).isfinite().all()
    survive("llama config", use)


@rubbish
@given(st.data())
def test_a_vits_config(tiny, spoil, data):
    contents = data.draw(spoilt_json(read_json(tiny / "vit/config.json") | {
        "mlp_ratio": 4, "layer_norm_eps": 1e-6, "patch_size": 14, "use_swiglu_ffn": False,
        "num_register_tokens": 0}))
    folder = spoil(tiny / "vit", "config.json", contents)
    survive("vit config", lambda: ViT.load(folder, 56)(torch.ones(1, 3, 56, 56)))


@rubbish
@given(st.data())
def test_a_hieras_config(world, spoil, data):
    contents = data.draw(spoilt_json(read_json(world / "hiera/config.json") | {
        "mlp_ratio": 4.0, "layer_norm_eps": 1e-6}))
    folder = spoil(world / "hiera", "config.json", contents)
    survive("hiera config", lambda: Hiera.load(folder, 64)(torch.ones(1, 3, 64, 64)))


@rubbish
@given(st.data())
def test_an_index_of_weights(tiny, spoil, data):
    keys = load_file(tiny / "llm/model.safetensors")
    good = {"metadata": {"total_size": 1}, "weight_map": {key: "model.safetensors" for key in [*keys][:3]}}
    folder = spoil(tiny / "llm", "model.safetensors.index.json", data.draw(spoilt_json(good)))
    survive("index.json", lambda: Llama.load(folder))
    (folder / "model.safetensors.index.json").unlink()


@rubbish
@given(st.data())
def test_weights(tiny, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((tiny / "llm/config.json").read_bytes())
    good = (tiny / "llm/model.safetensors").read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")  # of the header, the part that can go wrong
    header = data.draw(damaged(good[:end]))
    (folder / "model.safetensors").write_bytes(header + good[end:] * (len(header) == end))
    survive("weights", lambda: Llama.load(folder))


@rubbish
@given(st.data())
def test_a_tokenizer_and_its_special_tokens(world, tiny, spoil, data):
    good = read_json(ROOT / "assets/toy/llm/tokenizer.json")
    config = {"bos_token_id": 1, "eos_token_id": [2, 1], "vocab_size": 81}
    as_json = spoilt_json(good) if data.draw(st.integers(0, 3)) else st.just(json.dumps(good).encode())
    folder = spoil(ROOT / "assets/toy/llm", "tokenizer.json", data.draw(as_json))
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(data.draw(st.just(config) | spoilt(config))))

    def use():
        chat = Chat(folder)
        ear = ("left ear", "the ear on the left, at the top")
        tokens, _, _ = chat.conversation(Scene(Category("cat", [ear]), [(ear, (0.25, 0.999))]))
        assert max(tokens + chat.newline + [chat.bos]) < read_json(folder / "config.json")["vocab_size"]
        chat.parse(chat.questions(Category("cat", [ear]))[0])
    survive("tokenizer", use)


# ------------------------------------------------------------------------------------------------------- data


@rubbish
@given(st.data())
def test_descriptions(world, chat, tmp_path_factory, data):
    good = read_json(world / "data/descriptions.json") | {"skeletons": {"kite": [[0, 1], [1, 2]]}}
    path = tmp_path_factory.getbasetemp() / "descriptions.json"
    path.write_bytes(data.draw(spoilt_json(good)))

    def use():
        for number, category in read_descriptions(path).items():
            assert isinstance(number, int) and category.name and chat.questions(category)
            assert all(0 <= k < len(category.keypoints) for line in category.skeleton for k in line)
        parse_keypoints("kite", path)
    survive("descriptions", use)


@rubbish
@given(st.data())
def test_annotations(world, tmp_path_factory, data):
    good = read_json(world / "data/annotations/mp100_split1_test.json")
    good = {**good, "images": good["images"][:3], "annotations": good["annotations"][:3]}
    path = tmp_path_factory.getbasetemp() / "annotations.json"
    path.write_bytes(data.draw(spoilt_json(good)))
    categories = read_descriptions(world / "data/descriptions.json")

    def use():
        instances = read_instances(path, categories)
        assert len({instance.annotation_id for instance in instances}) == len(instances)
        plan_epoch(instances, 0, 0, 4)
        for instance in instances:
            crop_of(instance).cut(world / "data/images/kite/1.jpg", 14)
        keep_readable(instances, world / "data", categories, allow_missing=True)
        nothing = [[None] * len(instance.keypoints) for instance in instances]
        with redirect_stdout(io.StringIO()) as said:
            print_report(make_report(instances, nothing, categories, path, "pairs"))
        assert all(line.isprintable() for line in said.getvalue().splitlines())
    survive("annotations", use)


@rubbish
@given(st.data())
def test_predictions(world, tmp_path_factory, data):
    categories = read_descriptions(world / "data/descriptions.json")
    instances = read_instances(world / "data/annotations/mp100_split1_test.json", categories)
    good = [{"annotation_id": o.annotation_id, "keypoints": [[1.5, 2], *[None] * (len(o.keypoints) - 1)]}
            for o in instances]
    path = tmp_path_factory.getbasetemp() / "predictions.json"
    path.write_bytes(data.draw(spoilt_json(good)))

    def use():
        for instance, points in zip(instances, read_predictions(path, instances, True), strict=True):
            assert find_hits(instance, points).shape == (5, len(instance.keypoints))
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


@rubbish
@given(*[st.sampled_from([v for v in ODD if isinstance(v, float)]) | st.floats() | st.floats(-1e5, 1e5)] * 4)
def test_crops(world, x, y, side, angle):
    angle = angle if math.isfinite(angle) else 0
    path = world / "data/images/kite/1.jpg"
    survive("crops", lambda: Crop(x, y, side, angle).cut(path, 14))


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
        checkpoint = read_checkpoint(path)
        parse_descriptions(checkpoint["descriptions"], path)
        args = train.parse_arguments(["--resume", str(path)])
        assert args.out == str(path.parent) and args.batch < 10**7
        model, _ = load_trained(checkpoint, torch.device("cpu"))
        optimizer = train.make_optimizer(model, args, torch.device("cpu"))
        load_optimizer(optimizer, checkpoint["optimizer"], path)
        for parameter in trainable_state(model).values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    survive("checkpoints", use)


@rubbish
@given(st.data())
def test_damaged_checkpoints(world, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "ckpt.pt"
    path.write_bytes(data.draw(damaged((world / "ckpt.pt").read_bytes())))
    survive("damaged ckpt.pt", lambda: read_checkpoint(path))


# ----------------------------------------------------------------------------------------------- command line


@rubbish
@given(st.text(max_size=6) | st.integers().map(str) | st.sampled_from([str(v) for v in ODD]))
def test_numbers_on_the_command_line(text):
    for kind in positive, natural, between(0, 1):
        try:
            assert 0 <= kind(text) <= 10**6
        except ArgumentTypeError:
            pass


@rubbish
@given(st.binary(max_size=30) | damaged(b'\xef\xbb\xbf{"a": [1, "b", NaN], "c": {"a": 1e9}}'))
def test_json(tmp_path_factory, contents):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(contents)
    survive("JSON", lambda: read_json(path))
