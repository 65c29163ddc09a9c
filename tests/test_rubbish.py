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
from programs import refused, to_train
from safetensors.torch import load_file

import evaluate
import train
from annotations import keep_readable, parse_descriptions, read_descriptions, read_instances
from chat import Category, Chat, Scene
from checkpoint import load_optimizer, load_trained, read_checkpoint
from common import InputError, between, natural, positive, read_json
from data import Crop, crop_of, plan_epoch
from hiera import Hiera, HieraConfig
from llama import Llama
from locator import parse_keypoints, read_sets
from lora import trainable_state
from metric import find_hits, make_report, print_report, read_predictions
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
    except SystemExit as stop:  # a checkpoint's arguments that the command line would not take either
        assert stop.code == 2
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
        parse_keypoints("kite", read_sets(read_json(path), path, path))
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
            assert points is None or find_hits(instance, points).shape == (5, len(instance.keypoints))
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


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
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


@pytest.mark.parametrize("option, value", [
    ("--seed", 10**19), ("--seed", "9" * 5000), ("--workers", 10**12), ("--image-size", 140_000),
    ("--epochs", 10**9), ("--batch", 10**8), ("--micro-batch", 10**8), ("--rounds", 10**8)])
def test_absurd_arguments_are_one_line(option, value):
    assert f"argument {option}: " in refused(train, [option, value])


# ---------------------------------------------------------------------------------- strangers, one at a time


def change(world, folder, **changes):
    """A checkpoint whose parts are others, or in whose arguments some are."""
    contents = torch.load(world / "ckpt.pt", weights_only=True)
    contents |= {key: changes.pop(key) for key in [*changes] if key in contents}
    contents["args"] |= changes
    torch.save(contents, folder / "ckpt.pt")
    return folder / "ckpt.pt"


@pytest.mark.parametrize("changes, says", [
    (dict(image_size=1_400_000), "image_size among its arguments is 1400000"), (dict(seed=10**19), "seed"),
    (dict(llm=7), "llm among its arguments is 7"), (dict(pretrain="all"), "pretrain among its arguments"),
    (dict(instruction=[]), "instruction among its arguments"), (dict(step="x"), "step is 'x'"),
    (dict(step=-1), "step is -1"), (dict(model={"norm.bias": None}), "'norm.bias' is not a tensor"),
    (dict(model={"a": torch.tensor([math.nan])}), "'a' is not a tensor of finite numbers"),
    (dict(model={"a": torch.zeros(1).expand(10**12)}), "'a' is not a tensor")], ids=str)
def test_a_strangers_checkpoint_is_checked_before_it_is_used(world, tmp_path, changes, says):
    path = change(world, tmp_path, **changes)
    for program, argv in (evaluate, [path]), (train, ["--resume", path]):
        line = refused(program, argv)
        assert str(path) in line and says in line


def test_an_initial_projection_is_checked_before_it_is_used(world, tiny, tmp_path):
    data, path = world / "data", change(world, tmp_path, model={"projection.bias": torch.tensor([math.inf])})
    line = refused(train, to_train(tiny, data, tmp_path / "run", "--init", path))
    assert f"{path}: its 'projection.bias' is not a tensor of finite numbers" in line


@pytest.mark.parametrize("changes, says", [
    (dict(batch=0), "argument --batch: 0 is not"), (dict(batch="x"), "argument --batch: x is not"),
    (dict(workers=10**12), "argument --workers"), (dict(lr=math.nan), "argument --lr: nan is not"),
    (dict(epochs=[3]), "argument --epochs"), (dict(pack=1), "argument --pack"), (dict(clip=True), "--clip")],
    ids=str)
def test_a_run_goes_on_with_arguments_that_could_have_been_typed(world, tmp_path, changes, says):
    path = change(world, tmp_path, **changes)
    line = refused(train, ["--resume", path])
    assert str(path) in line and says in line


def test_a_run_goes_on_in_the_folder_of_its_checkpoint(world, tmp_path):
    """A stranger's file does not say where to write."""
    path = change(world, tmp_path, out=str(tmp_path / "elsewhere"), seed=0, workers=0)
    args = train.parse_arguments(["--resume", str(path)])
    assert (args.out, args.seed, args.workers) == (str(tmp_path), 0, 0)
    assert train.parse_arguments(["--resume", str(path), "--out", "b"]).out == "b"
    stored = torch.load(world / "ckpt.pt", weights_only=True)["args"]
    assert {**vars(args), "resume": None} == {**stored, "out": str(tmp_path), "seed": 0, "workers": 0}


def spoil_optimizer(key, value):
    """-> a function that puts a value into an optimizer's state of its first parameter."""
    def spoil(optimizer):
        optimizer["state"][0][key] = value
    return spoil


@pytest.mark.parametrize("spoil", [
    spoil_optimizer("exp_avg", None), spoil_optimizer("exp_avg", torch.zeros(3)), spoil_optimizer("step", -1),
    spoil_optimizer("step", torch.tensor(math.nan)), spoil_optimizer("max_exp_avg_sq", torch.zeros(3)),
    lambda optimizer: optimizer["state"][0]["exp_avg_sq"].neg_(), lambda optimizer: optimizer.pop("state"),
    lambda optimizer: optimizer["state"].update({10**6: {}}), lambda optimizer: optimizer["state"][1].clear(),
    lambda optimizer: optimizer.update(state=[])])
def test_a_malformed_optimizer_is_refused(world, tmp_path, spoil):
    args = train.parse_arguments(["--resume", str(world / "ckpt.pt")])
    saved = read_checkpoint(world / "ckpt.pt")
    optimizer = train.make_optimizer(train.load_model(args, torch.device("cpu")), args, torch.device("cpu"))
    saved["optimizer"]["param_groups"][0]["weight_decay"] = "heavy"  # what counts are the run's arguments
    load_optimizer(optimizer, saved["optimizer"], "ckpt.pt")
    assert optimizer.param_groups[0]["weight_decay"] == args.weight_decay
    spoil(saved["optimizer"])
    with pytest.raises(InputError, match="^ckpt.pt: its optimizer is not of such a run; start anew$"):
        load_optimizer(optimizer, saved["optimizer"], "ckpt.pt")


TOKENIZERS = {
    "larger than the vocabulary": (
        lambda t, c: c.update(vocab_size=80), "has a token 80, but vocab_size in config.json is 80"),
    "nothing for unknown letters": (lambda t, c: t.update(pre_tokenizer=None, normalizer={
        "type": "Replace", "pattern": {"Regex": "[0-9]"}, "content": ""}), "has no tokens for some digits"),
    "no words": (lambda t, c: t["model"].update(vocab={}, merges=[]), "tokenizer.json"),
    "BOS outside": (lambda t, c: c.update(bos_token_id=81), "bos_token_id is 81, not a whole number from 0"),
    "EOS of no kind": (lambda t, c: c.update(eos_token_id=[]), r"eos_token_id is \[\], not a list"),
    "no size": (lambda t, c: c.pop("vocab_size"), "entry .vocab_size. is missing"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_does_not_fit_is_named(tmp_path, case):
    spoil, says = TOKENIZERS[case]
    toy = ROOT / "assets/toy/llm"
    tokenizer, config = read_json(toy / "tokenizer.json"), read_json(toy / "config.json")
    spoil(tokenizer, config)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=says) as error:
        Chat(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_padding_of_a_tokenizer_is_switched_off(tmp_path):
    toy = ROOT / "assets/toy/llm"
    tokenizer = read_json(toy / "tokenizer.json") | {"padding": {
        "strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "<unk>"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "config.json").write_bytes((toy / "config.json").read_bytes())
    assert Chat(tmp_path).newline == Chat(toy).newline


def test_names_from_files_are_printed_without_control_characters(world, tmp_path, capsys):
    kite, wagon = "k\x1b[2Jite", "wag\non"
    texts = json.dumps(read_json(world / "data/descriptions.json"))
    texts = json.loads(texts.replace('"name": "kite"', json.dumps({"name": kite})[1:-1])
                       .replace('"name": "wagon"', json.dumps({"name": wagon})[1:-1]))
    categories = parse_descriptions(texts, "")
    raw = read_json(world / "data/annotations/mp100_split1_test.json")
    path = tmp_path / "a.json"
    path.write_text(json.dumps(raw | {"categories": []}))
    instances = read_instances(path, categories)
    nothing = [[None] * len(o.keypoints) for o in instances]
    print_report(make_report(instances, nothing, categories, path, "query"))
    said = capsys.readouterr().out
    assert r"2 k\x1b[2Jite  " in said and r"1 wag\non  " in said and "\x1b" not in said


@pytest.mark.parametrize("categories", [None, {}, [{"name": "kite"}], [{"id": "2"}], [{"id": 2}, {"id": 2}]])
def test_pairs_need_categories_with_ids(world, tmp_path, categories):
    raw = read_json(world / "data/annotations/mp100_split1_test.json") | {"categories": categories}
    if categories is None:
        del raw["categories"]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(raw))
    kinds = read_descriptions(world / "data/descriptions.json")
    with pytest.raises(InputError, match=f"^{path}: .*categor"):
        instances = read_instances(path, kinds)
        make_report(instances, [[None] * len(o.keypoints) for o in instances], kinds, path, "pairs")
