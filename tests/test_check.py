"""check.py: what train.py --check finds, in photos, annotations, weights, disk and memory."""

import gzip
import json
import shutil

import check
import pytest
import torch
from mp100 import make_wagons_and_kites
from programs import refused, to_train

import train
from llama import LlamaConfig
from vit import ViTConfig

WELL = "all is well"


@pytest.fixture
def checked(tiny, tmp_path, capsys):
    """checked(...) -> exit code and what train.py --check prints. In tmp_path are data/ and weights/."""
    data = make_wagons_and_kites(tmp_path / "data")
    shutil.copytree(tiny, tmp_path / "weights")

    def make(*more):
        code = 0
        try:
            train.main(to_train(tmp_path / "weights", data, tmp_path / "out", "--check", *more))
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().out
    return make


def test_all_is_well_and_nothing_is_written(checked, tmp_path):
    code, said = checked()
    assert code == 0 and said.endswith(f"{WELL}\n") and "problem" not in said
    assert said.count(": 6 objects of 2 categories") == 2 and "val.json: absent" in said
    assert "12 photos" not in said and "6 photos, all there and whole" in said
    assert not (tmp_path / "out").exists()
    code, said = checked("--validate", 5)
    assert code == 2 and "val.json: no such file" in said


def test_missing_and_truncated_photos_are_counted_and_listed(checked, tmp_path):
    photos = tmp_path / "data/images"
    (photos / "kite/1.jpg").unlink()
    (photos / "wagon/0.jpg").write_bytes((photos / "wagon/0.jpg").read_bytes()[:-600])  # its header is fine
    code, said = checked("--missing-list", tmp_path / "missing.txt")
    assert code == 2 and WELL not in said
    assert "of 6 photos 1 are missing and 1 are damaged (listed in" in said
    assert "objects without photo: wagon 2, kite 2" in said or "kite 2, wagon 2" in said  # train and test
    assert (tmp_path / "missing.txt").read_text() == "kite/1.jpg\nwagon/0.jpg\n"


def test_weights_that_are_not_whole_are_found_before_they_are_loaded(checked, tmp_path, tiny, monkeypatch):
    path = tmp_path / "weights/llm/model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])
    code, said = checked()
    assert code == 2 and f"{path}: damaged or truncated, {size - 10:,} bytes and not {size:,}" in said
    monkeypatch.setattr(train, "load_model", lambda *_: pytest.fail("loaded"))
    line = refused(train, to_train(tmp_path / "weights", tmp_path / "data", tmp_path / "out"))
    assert f"{path}: damaged or truncated" in line

    path.rename(path.with_name("model-00001.safetensors"))
    files = {"a": "model-00001.safetensors", "b": "absent.safetensors"}
    index = {"metadata": {"total_size": 10}, "weight_map": files}
    (path.parent / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "absent.safetensors: missing, damaged" in checked()[1]
    (path.parent / "tokenizer.json").write_text("{")
    code, said = checked()
    assert code == 2 and "tokenizer.json: not a readable tokenizer.json" in said


def test_weights_of_another_config_are_found_by_their_names_and_shapes(checked, tmp_path):
    for folder, key, value in ("llm", "intermediate_size", 80), ("vit", "num_hidden_layers", 3):
        path = tmp_path / "weights" / folder / "config.json"
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | {key: value}))
        code, said = checked()
        assert code == 2 and said.count("problem: ") == 1
        assert ("config.json asks for (32, 80)" if folder == "llm" else "tensors are missing") in said
        path.write_text(before)
    assert "image size 60 is not a multiple" in checked("--image-size", 60)[1]


def test_a_tokenizer_of_another_vocabulary_is_found(checked, tmp_path):
    path = tmp_path / "weights/llm/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 1000}))
    code, said = checked()
    assert code == 2 and "vocab_size in config.json is 1000" in said


def test_a_full_disk_is_found(checked, monkeypatch):
    monkeypatch.setattr(check.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    code, said = checked()
    assert code == 2 and "out: a checkpoint takes 0.00 GB, 0.0 GB are free, 0.00 are needed" in said


def test_folders_that_cannot_be_written_into_are_found(checked, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    line = refused(train, to_train(tmp_path / "weights", tmp_path / "data", tmp_path / "out", "--check",
                                   "--missing-list", tmp_path / "file/missing.txt"))
    assert "file/missing.txt: cannot be written" in line
    monkeypatch.setattr(check.os, "access", lambda folder, mode: False)
    code, said = checked()
    assert code == 2 and f"problem: {tmp_path}: cannot be written into" in said


def test_memory_and_checkpoints_on_paper_are_those_of_reproduce(tmp_path, monkeypatch, capsys):
    """16.7 GB of weights, a checkpoint of 101 MB; see REPRODUCE.md."""
    (tmp_path / "vit").mkdir()
    (tmp_path / "llm").mkdir()
    args = train.parse_arguments(
        ["--vit", f"{tmp_path}/vit", "--llm", f"{tmp_path}/llm", "--out", f"{tmp_path}"])
    monkeypatch.setattr(check, "read_json", lambda *_: {})
    monkeypatch.setattr(check, "read_vit_config", lambda _: ViTConfig())
    monkeypatch.setattr(check, "read_llama_config", lambda _: LlamaConfig())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = type("Card", (), {"total_memory": 16e9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert "the GPU has 16 GB" in check.check_memory(args)[0]
    said = capsys.readouterr().out
    assert "frozen weights 16.7, what trains, with gradients and Adam 0.1, activations (a guess) 4." in said
    assert "a checkpoint takes 0.10 GB" in check.describe_disk(args)[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for args.dtype, frozen in ("bf16", 16.7), ("fp32", 33.3), (None, 33.3):  # on a CPU
        assert check.check_memory(args) == []
        assert f"frozen weights {frozen}, " in capsys.readouterr().out


@pytest.mark.parametrize("split, lacks", [
    (1, ""), (2, "1,994 of 2,000 objects (sling_dress 99, "),
    (4, "1,811 of 2,000 objects (hand 0, macaque 11; published are 100 of each)")])
def test_what_a_file_of_mp100_lacks_is_named(shared, tmp_path, split, lacks):
    path = tmp_path / f"mp100_split{split}_test.json"
    with gzip.open(shared / f"mp100/annotations/{path.name}.gz") as file:
        path.write_bytes(file.read())
    said = check.describe_shortfall(path)
    assert lacks in said and bool(said) == bool(lacks)
    contents = json.loads(path.read_text())
    contents["categories"].pop()
    path.write_text(json.dumps(contents))
    assert "19 of 20 categories" in check.describe_shortfall(path)


def test_other_data_are_not_held_to_mp100s_numbers(tmp_path):
    data = make_wagons_and_kites(tmp_path)
    assert check.describe_shortfall(data / "annotations/mp100_split1_test.json") == ""
