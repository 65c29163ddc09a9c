"""tools/check.py: what train.py --check finds, in photos, annotations, weights, disk and memory."""

import gzip
import json
import shutil
from argparse import Namespace

import pytest
import torch
from checkpoints import edit_config, edit_weights
from conftest import network_arguments
from mp100 import make_wagons_and_kites
from programs import refused, to_train

import train
from llama import Llama, LlamaConfig
from model import CapeLLM, adapt, load_network
from tools import check
from vit import ViT, ViTConfig


@pytest.fixture
def command(tiny, tmp_path):
    """command(...) -> a command line of train.py. In tmp_path are data/ and weights/."""
    data = make_wagons_and_kites(tmp_path / "data")
    shutil.copytree(tiny, tmp_path / "weights")
    return lambda *more: to_train(tmp_path / "weights", data, tmp_path / "out", *more)


@pytest.fixture
def checked(command, capsys):
    """checked(...) -> whether all is well, and what train.py --check prints."""
    def make(*more):
        code = 0
        try:
            train.main(command("--check", *more))
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr().out
        assert said.endswith("all is well\n") == ("problem: " not in said) == (code == 0) and code in (0, 2)
        return code == 0, said
    return make


def test_all_is_well_and_nothing_is_written(checked, command, tmp_path, capsys, monkeypatch):
    well, said = checked()
    assert well and said.count(": 6 objects of 2 categories") == 2 and "val.json: absent" in said
    assert "\n6 photos, all there and whole" in said and not (tmp_path / "out").exists()
    check.main(command())
    assert capsys.readouterr().out == said  # python -m tools.check
    monkeypatch.setenv("RANK", "1")
    check.main(command())
    assert not capsys.readouterr().out
    monkeypatch.delenv("RANK")
    for wrong, says in ("--batch 6 --micro-batch 4", "not a multiple"), ("--instruction x", "x: no such"):
        well, wrongly = checked(*wrong.split())
        assert not well and says in wrongly
    well, said = checked("--validate", 5)
    assert not well and "val.json: no such file" in said
    test = tmp_path / "data/annotations/mp100_split1_test.json"
    test.unlink()
    well, said = checked()
    assert well and f"{test}: absent, which only evaluate.py needs" in said
    (tmp_path / "data/descriptions.json").rename(texts := tmp_path / "texts.json")  # as MP-100 comes
    well, said = checked("--descriptions", texts)
    assert not well and f"problem: {test}: no such file" in said


# ------------------------------------------------------------------------------------------------------ data


def test_missing_and_truncated_photos_are_counted_and_listed(checked, tmp_path):
    photos = tmp_path / "data/images"
    (photos / "kite/1.jpg").unlink()
    (photos / "wagon/0.jpg").write_bytes((photos / "wagon/0.jpg").read_bytes()[:-600])  # its header is fine
    well, said = checked()
    listed = tmp_path / "out/missing.txt"
    assert not well and f"of 6 photos 1 are missing and 1 are damaged ({listed} lists them)" in said
    assert "objects without photo: wagon 2, kite 2\n" in said  # of train and test
    assert "photos by folder: kite 1, wagon 1\n" in said
    assert listed.read_text() == "kite/1.jpg\nwagon/0.jpg\n"
    well, said = checked("--out", listed)  # which is a file
    assert not well and f"problem: {listed}" in said


@pytest.mark.parametrize("split, lacks", [
    (1, ""), (2, "1,994 of 2,000 objects (sling_dress 99, "),
    (4, "1,811 of 2,000 objects (hand 0, macaque 11; published are 100 of each)")])
def test_what_a_test_file_of_mp100_lacks_is_named(shared, tmp_path, split, lacks):
    path = tmp_path / f"mp100_split{split}_test.json"
    with gzip.open(shared / f"mp100/annotations/{path.name}.gz") as file:
        path.write_bytes(file.read())
    said = check.describe_shortfall(path)
    assert lacks in said and bool(said) == bool(lacks)
    contents = json.loads(path.read_text())
    contents["categories"].pop()
    path.write_text(json.dumps(contents))
    assert "19 of 20 categories" in check.describe_shortfall(path)


def test_a_train_file_of_mp100_has_about_14000_objects_of_70_categories(tmp_path):
    """Other data are not held to its numbers."""
    path = tmp_path / "mp100_split1_train.json"
    known = check.read_json("descriptions.json")["categories"]
    names = [{"id": int(n), "name": category["name"]} for n, category in known.items()][:70]
    for of_each, lacks in (200, ""), (100, "7,000 of about 14,000 objects"), (0, "no object of "):
        annotations = [{"category_id": category["id"]} for category in names] * of_each
        path.write_text(json.dumps({"categories": names, "annotations": annotations}))
        assert lacks in (said := check.describe_shortfall(path)) and bool(said) == bool(lacks)
    data = make_wagons_and_kites(tmp_path)
    assert check.describe_shortfall(data / "annotations/mp100_split1_test.json") == ""


# --------------------------------------------------------------------------------------------------- weights


def rename(name):
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    return lambda folder: (folder / name).unlink()


def make_metas(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    for name in "params.json", "consolidated.00.pth", "tokenizer.model":
        (folder / name).touch()


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def lose_a_shard(folder):
    rename("model-00001.safetensors")(folder)
    files = {"a": "model-00001.safetensors", "b": "absent.safetensors"}
    write("model.safetensors.index.json", json.dumps({"weight_map": files}))(folder)


@pytest.mark.parametrize("spoil, message", [
    (make_metas, "weights/llm: holds Meta's own files"),
    (rename("pytorch_model.bin"), "weights/llm: holds pickles (*.bin, *.pth)"),
    (write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
     "weights/llm/model.safetensors: is a pointer of git-lfs; say `git lfs pull` there"),
    (remove("model.safetensors"), "weights/llm: holds no *.safetensors; REP"),
    (shutil.rmtree, "weights/llm: no such folder; REPRODUCE.md says where the weights are from"),
    (truncate, "model.safetensors: damaged or truncated, "),
    (lose_a_shard, "absent.safetensors: no such file; missing, damaged or truncated; download it again"),
    (edit_weights(**{"norm.weight": None}), 'Missing key(s) in state_dict: "norm.weight"'),
    (edit_config(intermediate_size=80), "is config.json the one of these weights?"),
    (write("tokenizer.json", "{"), "tokenizer.json: cannot be read"),
    (remove("tokenizer.json"), "tokenizer.json: no such file; Transformers")])
def test_weights_that_will_not_do_are_told_before_they_are_loaded(
        checked, command, tmp_path, monkeypatch, spoil, message):
    spoil(tmp_path / "weights/llm")
    well, said = checked()
    assert not well and message in said and said.count("problem: ") == 1
    monkeypatch.setattr(train, "load_network", lambda *_: pytest.fail("loaded"))
    assert message in refused(train, command())


@pytest.mark.parametrize("network, spoil, message", [
    ("llm", edit_weights(**{"norm.weight": torch.ones(33)}), "size mismatch for norm.weight"),
    ("llm", edit_weights(spare=torch.ones(2)), 'Unexpected key(s) in state_dict: "spare"'),
    ("llm", truncate, "not fully covered"), ("llm", lose_a_shard, "absent.safetensors: No such file"),
    ("llm", remove("config.json"), "config.json: no such file"),
    ("llm", edit_config(model_type="gemma"), "model_type gemma is not a Llama"),
    ("llm", edit_config(model_type="mistral", sliding_window=4096), "without sliding window"),
    ("llm", edit_config(rope_parameters=dict(rope_type="yarn")), "rope_type yarn is not supported"),
    ("vit", edit_weights(**{"norm.bias": None}), 'Missing key(s) in state_dict: "norm.bias"'),
    ("vit", edit_config(model_type="vit"), "model_type vit is not dinov2"),
    ("vit", edit_config(patch_size=16), "patch size 16")])
def test_what_is_wrong_with_a_network_that_is_loaded_is_one_line(tiny, tmp_path, network, spoil, message):
    shutil.copytree(tiny, tmp_path / "spoilt")
    spoil(tmp_path / "spoilt" / network)
    with pytest.raises(check.InputError) as error:
        load_network(network_arguments(tmp_path / "spoilt"))
    said = str(error.value)
    assert message in said and str(tmp_path / "spoilt" / network) in said and "\n" not in said


def test_what_is_given_in_place_of_a_folder_of_weights_is_recognised(checked, tmp_path):
    (tmp_path / "consolidated.00.pth").touch()
    said = checked("--llm", tmp_path / "consolidated.00.pth")[1]
    assert "consolidated.00.pth: is the original release's weights; wanted is a folder" in said
    said = checked("--vit", "facebook/dinov2-large")[1]
    assert "hf download facebook/dinov2-large --local-dir weights/dinov2-large" in said


def test_a_tokenizer_of_another_model_is_found(tiny, tmp_path):
    """Its words have numbers that the LLM has not. Special tokens, which text never becomes, may have."""
    path, args = tmp_path / "tokenizer.json", Namespace(llm=tmp_path)
    shutil.copy(tiny / "llm/tokenizer.json", path)
    contents = json.loads(path.read_text())
    n, added = len(contents["model"]["vocab"]), contents["added_tokens"]
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": n, "bos_token_id": 0, "eos_token_id": 1}))
    added.append(added[0] | {"id": n, "content": "<pad>"})
    path.write_text(json.dumps(contents))
    check.check_tokenizer(args)
    added[-1] |= {"content": "wheelbarrow", "special": False}
    path.write_text(json.dumps(contents))
    with pytest.raises(check.InputError, match=f"has a token {n}, but vocab_size in config.json is {n}"):
        check.check_tokenizer(args)


# -------------------------------------------------------------------------------------------- disk and memory


def test_a_full_disk_and_a_folder_without_leave_are_found(checked, command, tmp_path, monkeypatch):
    monkeypatch.setattr(check.shutil, "disk_usage", lambda _: Namespace(free=1000))
    well, said = checked()
    assert not well and "out: a checkpoint takes 0.00 GB, 0.0 GB are free, 0.00 are needed" in said
    assert "are needed" in refused(train, command())
    monkeypatch.setattr(check.os, "access", lambda folder, mode: False)
    assert f"problem: {tmp_path}: cannot be written into; choose another --out" in checked()[1]


def test_memory_and_checkpoints_on_paper_are_those_of_reproduce(tmp_path, monkeypatch):
    """16.7 GB of weights, a checkpoint of 101 MB; see REPRODUCE.md."""
    args = train.parse_arguments(["--out", f"{tmp_path}"])
    with torch.device("meta"):
        encoder, decoder = ViT(ViTConfig()), Llama(LlamaConfig())
        adapt(encoder, "lora", ("q", "v"))
        adapt(decoder, "lora", ("q_proj", "v_proj"))
        model = CapeLLM(encoder, decoder)
    assert "a checkpoint takes 0.10 GB" in check.check_disk(args, check.count(model, True))
    gpu = Namespace(total_memory=24e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    said = check.check_memory(args, model, 8)  # of which each has its own
    assert "frozen weights 16.7, what trains, with gradients and Adam 0.1, activations (a guess) 4." in said
    gpu.total_memory = 16e9
    with pytest.raises(check.InputError, match="the GPU has 16; --checkpoint-activations needs less"):
        check.check_memory(args, model, 1)
    args.checkpoint_activations = True
    with pytest.raises(check.InputError, match="the GPU has 16$"):
        check.check_memory(args, model, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(check.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 1000}.get(name, 96 * 10**6))
    assert "frozen weights 33.3, " in check.check_memory(args, model, 2)  # fp32 on a CPU
    with pytest.raises(check.InputError, match="x 3 processes, this machine has 96 GB; --dtype bf16 "):
        check.check_memory(args, model, 3)
    args.dtype = "bf16"
    with pytest.raises(check.InputError, match="x 9 processes, this machine has 96 GB$"):
        check.check_memory(args, model, 9)


def test_the_embeddings_of_table_8_count(command, monkeypatch):
    sizes = []
    monkeypatch.setattr(check, "check_disk", lambda args, n_trained: sizes.append(n_trained) or "")
    for answer in "text", "token":
        check.check_run(train.parse_arguments(command("--answer", answer)), 1)
    words, D = check.sketch(train.parse_arguments(command()).llm)[0].embed_tokens.weight.shape
    assert sizes[1] - sizes[0] == (words + 1) * D + (D + 1) * D + (D + 1) * 2  # and a head of two layers
