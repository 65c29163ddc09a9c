"""common.py: errors that arrive in one line, JSON, arguments, and the strict loader of published weights."""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import LLAMA, LLAMA3, VIT, edit_config, edit_weights, save_random
from conftest import ROOT

import common
import evaluate
import predict
import train
from common import (
    InputError,
    between,
    check,
    get_field,
    natural,
    positive,
    printable,
    read_json,
    run,
    silence_worker,
    start_processes,
    write_json,
)
from data import Crop
from llama import Llama
from vit import ViT
from weights import load_weights

# -------------------------------------------------------------------------------------------------- programs


class Photos(torch.utils.data.Dataset):
    """The same photo, as often as one likes."""

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 2

    def __getitem__(self, _):
        return Crop(4, 4, 8).cut(self.path, 14)


def test_an_input_error_of_a_loaders_worker_arrives_as_its_one_line(tmp_path):
    path, messages = tmp_path / "absent.png", []
    for n_workers in 0, 1:
        batches = torch.utils.data.DataLoader(
            Photos(path), num_workers=n_workers, worker_init_fn=silence_worker)
        with pytest.raises(InputError) as error:
            next(iter(batches))
        messages.append(str(error.value))
    here, from_worker = messages
    assert from_worker == here
    assert here.startswith(f"{path}: not a readable photo (") and "\n" not in here


def start(monkeypatch, main):
    """Runs a program as if it had been called with the arguments a and b."""
    monkeypatch.setattr(sys, "argv", ["program.py", "a", "b"])
    run(main)


class Exit(BaseException):
    """Stands for the end of the process."""


def raise_exit(code):
    raise Exit(code)


def raising(error):
    def main(argv):
        raise error
    return main


def test_a_program_gets_its_arguments_and_ends_its_process_group(monkeypatch, capsys):
    seen = []
    start(monkeypatch, seen.append)
    assert seen == [["a", "b"]]
    monkeypatch.setattr(common.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(common.dist, "destroy_process_group", lambda: seen.append("destroyed"))
    monkeypatch.setattr(os, "_exit", raise_exit)
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed))
    with pytest.raises(Exit) as exit_code:
        start(monkeypatch, lambda argv: print("done") or seen.append(argv))
    assert seen[1:] == [["a", "b"], "destroyed"]
    assert exit_code.value.args == (0,) and printed.getvalue() == b"done\n"
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_has_ended_is_no_defect(monkeypatch, capsys):
    """As in "| head": what is still to be printed at the end finds nobody."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    with pytest.raises(SystemExit) as end:
        start(monkeypatch, lambda argv: print("done"))
    assert end.value.code == 141 and capsys.readouterr() == ("", "")


def test_what_the_user_can_mend_is_one_line_and_defects_crash(monkeypatch, capsys):
    for error, code, said in [(InputError("a.json: no such file"), 2, "error: a.json: no such file\n"),
                              (KeyboardInterrupt(), 130, "stopped\n")]:
        with pytest.raises(SystemExit) as end:
            start(monkeypatch, raising(error))
        assert end.value.code == code
        assert capsys.readouterr() == ("", said)
    with pytest.raises(ZeroDivisionError):
        start(monkeypatch, raising(ZeroDivisionError()))


def test_one_of_several_processes_ends_at_once_and_what_it_printed_is_kept(monkeypatch, capsys):
    """sys.exit() would wait for the others, which wait for this one."""
    def main(argv):
        print("step 5")
        raise InputError("a.json: no such file")
    printed = io.BytesIO()
    monkeypatch.setattr(common.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", raise_exit)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed))
    with pytest.raises(Exit) as exit_code:
        start(monkeypatch, main)
    assert exit_code.value.args == (2,)
    assert printed.getvalue() == b"step 5\n"
    assert capsys.readouterr().err == "error: a.json: no such file\n"


@pytest.mark.parametrize("error, line", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "--micro-batch"),
    (RuntimeError("DataLoader timed out after 300 seconds"), "--workers 0"),
    (OSError(28, "No space left on device"), "/dev/shm, which --workers 0 does without"),
    (EOFError(), "a process that reads photos was lost (EOFError)"),  # its socket, when it has been killed
    (ConnectionRefusedError(111, "Connection refused"), "a process that reads photos was lost"),
    (RuntimeError("[gloo/pair.cc:1] Connection closed by peer [127.0.0.1]:1"), "lost the connection"),
    (RuntimeError("Timed out waiting 1800000ms for recv operation"), "has not answered for 0:10:00"),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None), (OSError(2, "No such file"), None)])
def test_errors_of_torch_that_are_no_defects_are_explained(error, line):
    said = common.explain(error)
    assert said is None if line is None else line in said and "\n" not in said


def test_under_torchrun_the_first_process_speaks_and_the_report_repeats_it(monkeypatch, capsys, tmp_path):
    """The other processes wait first, so that torchrun may end them. Wrong arguments are as short."""
    waited = []
    monkeypatch.setattr(common.time, "sleep", waited.append)
    parser = argparse.ArgumentParser
    monkeypatch.setattr(parser, "error", parser.error)  # so that it is put back
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    for rank, waits in ("0", []), ("1", [10]):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            start(monkeypatch, lambda argv: parser().parse_args(argv))
        assert end.value.code == 2 and waited == waits
        assert capsys.readouterr().err == "error: unrecognized arguments: a b\n"
    written = json.loads((tmp_path / "error.json").read_text())["message"]
    assert written["message"] == "error: unrecognized arguments: a b"
    assert written["extraInfo"]["timestamp"] > 1e9


@pytest.mark.parametrize("text, is_natural, is_positive", [
    ("0", True, False), ("00", True, False), ("1", True, True), ("12", True, True), ("-1", False, False),
    ("1.5", False, False), ("1e3", False, False), ("", False, False), (" 1", False, False),
    ("ten", False, False), ("\u00b2", False, False)])
def test_arguments_are_whole_numbers(text, is_natural, is_positive):
    for kind, is_fine, says in (natural, is_natural, "0 or more"), (positive, is_positive, "above 0"):
        if is_fine:
            assert kind(text) == int(text)
        else:
            with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is not a whole number,? {says}$"):
                kind(text)


def test_absurd_numbers_are_refused():
    for kind in natural, positive:
        assert kind("1000000") == 10**6 and kind("7", most=7) == 7
        for text, most in ("1000001", 10**6), ("8", 7), ("9" * 1000, 10**18):
            with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is more than {most:,}$"):
                kind(text, most)


@pytest.mark.parametrize("program", [train, evaluate, predict], ids=lambda program: program.__name__)
@pytest.mark.parametrize("columns", [80, 120])
def test_help_explains_every_option_and_tells_no_default_that_is_none(program, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and max(map(len, lines)) < columns
    assert not any(default in "".join(lines) for default in ("None", "False", "default: 0)", "[]"))
    for line, after in zip(lines, lines[1:]):
        if line.startswith("  -"):  # an option, with an explanation behind it or below
            assert "  " in line[2:] or after.startswith(24 * " ")
    assert "(default: " in "".join(lines)


def test_a_process_alone_is_the_first_of_one(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    rank, world, device = start_processes()
    assert (rank, world) == (0, 1)
    assert isinstance(device, torch.device)


def test_a_silenced_worker_prints_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # so that it is put back
    silence_worker(0)
    sys.excepthook(OSError, OSError("broken connection"), None)
    assert capsys.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------------ JSON


def test_json_is_read_as_it_was_written_into_a_new_folder(tmp_path):
    contents = {"names": ["Öhr", "ear"], "points": [[0.5, None]]}
    path = tmp_path / "a/b/c.json"
    write_json(path, contents)
    assert read_json(path) == read_json(str(path), dict) == contents


@pytest.mark.parametrize("content, kind, says", [
    (None, dict, "no such file"),
    (b"", dict, r"cannot be read as JSON \(.+\)"),
    (b'{"a": ', object, r"cannot be read as JSON \(.+\)"),
    (b'{"a": "\xff"}', object, r"cannot be read as JSON \(.+\)"),
    (b"[" * 100_000, object, r"cannot be read as JSON \(maximum recursion depth .+\)"),
    (b"[1]", dict, r"cannot be read as JSON \(it holds a list, not a dict\)"),
    (b"{}", list, r"cannot be read as JSON \(it holds a dict, not a list\)"),
    (b'{"a": 1, "b": {"c": 1, "d": 2, "c": 1}}', dict, r"cannot be read as JSON \('c' is there 2 times\)"),
    ('{"a": 1}'.encode("utf-16"), dict, r"cannot be read as JSON \(.+\)"),
    (b"[1" + b"0" * 5000 + b"]", list, r"cannot be read as JSON \(.+\)"),
])
def test_json_that_cannot_be_read_is_named(tmp_path, content, kind, says):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^{path}: {says}$"):
        read_json(path, kind)


def test_a_mark_before_utf_8_is_no_error(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\x96hr"}')
    assert read_json(tmp_path / "a.json") == {"a": "\u00d6hr"}


@pytest.mark.parametrize("value, kind, bounds", [
    (1, int, ()), (10**6, int, ()), (0, int, (0, 5)), (3, float, ()), (2.5, float, (0, 3)), ("a", str, ()),
    ("\u00d6hr \U0001f431", str, (5, 5)),
    (True, bool, ()), ([1], list, ()), ([], list, (0,)), ({"a": 1}, dict, ())])
def test_a_value_of_the_right_kind_and_size_is_handed_on(value, kind, bounds):
    assert check(value, "a.json: n", kind, *bounds) is value


@pytest.mark.parametrize("value, kind, bounds, says", [
    (0, int, (), "0, not a whole number from 1 to 1,000,000"), (10**400, int, (), "a whole number"),
    (True, int, (), "True, not a whole number"), (1.0, int, (), "1.0, not a whole"),
    ("1", int, (), "'1', not a whole"),
    (float("nan"), float, (0, 1), "nan, not a number from 0 to 1"), (float("inf"), float, (), "inf, not a"),
    (10**400, float, (), "a number"), (False, float, (0, 1), "False, not a number"), ("", str, (), "''"),
    ("a\ud800", str, (), r"'a\ud800', not a text of 1 to 1,000,000 characters"), (None, str, (), "None"),
    ("a" * 11, str, (1, 10), "of 1 to 10 characters"), (1, bool, (), "1, not true or false"),
    ([1, 2, 3], list, (4, 4), "[1, 2, 3], not a list of 4"), ([], dict, (0,), "[], not an object"),
])
def test_a_value_of_another_kind_or_size_is_named(value, kind, bounds, says):
    with pytest.raises(InputError) as error:
        check(value, "a.json: n", kind, *bounds)
    assert str(error.value).startswith("a.json: n is ") and says in str(error.value)


def test_a_missing_field_is_named():
    assert get_field({"id": 7}, "id", "a.json", int) == 7
    for record in {}, [], None, 7:
        with pytest.raises(InputError, match="^a.json: entry 'id' is missing, that of image 3$"):
            get_field(record, "id", "a.json", int, of=" of image 3")
    with pytest.raises(InputError, match="^a.json: id of image 3 is 'x', not a whole number from 0 to 5$"):
        get_field({"id": "x"}, "id", "a.json", int, 0, 5, " of image 3")


def test_names_have_no_power_over_the_terminal():
    name = "\x1b[2J\x07 left\near \u202e\ud800 \u00d6hr \u8033"
    assert printable(name) == r"\x1b[2J\x07 left\near \u202e\ud800 " + "\u00d6hr \u8033"
    assert str(InputError(f"a.json: {name}")) == f"a.json: {printable(name)}"
    assert printable(printable(name)) == printable(name)


def test_a_full_disk_leaves_the_json_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_json(path, {"PCK": 1})

    def fill_up(part, contents):
        part.write_text(contents[:3].decode())
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", fill_up)
    with pytest.raises(InputError, match="report.json: cannot be written .*No space left"):
        write_json(path, {"PCK": 2})
    assert read_json(path) == {"PCK": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text, is_fine", [
    ("0", True), ("5e-4", True), ("1", True), ("1.1", False), ("-0.1", False), ("nan", False), ("inf", False),
    ("", False), ("much", False)])
def test_arguments_are_numbers_within_bounds(text, is_fine):
    if is_fine:
        assert between(0, 1)(text) == float(text)
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a number from 0 to 1"):
            between(0, 1)(text)


def test_json_that_cannot_be_read_or_written_for_a_folder_in_its_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in tmp_path, tmp_path / "file/a.json":
        with pytest.raises(InputError, match=rf"^{path}: cannot be written \([^\n]+\)$"):
            write_json(path, {})
    with pytest.raises(InputError, match=rf"^{tmp_path}: cannot be read as JSON \([^\n]+\)$"):
        read_json(tmp_path)


# --------------------------------------------------------------------------------------------------- weights


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    return lambda folder: (folder / name).unlink()


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def spoilt_fields(*fields):
    """Cases in which a field of config.json holds what it cannot."""
    return {f"{key} is {value!r:.9}": (edit_config(**{key: value}), ["config.json", key])
            for key, value in fields}


INDEX = "model.safetensors.index.json"
FIRST, LAST = "model-00001-of-00006.safetensors", "model-00006-of-00006.safetensors"
KEY = "model.layers.0.self_attn.k_proj.weight"  # in the first file
TWIN = "model.layers.1.self_attn.k_proj.weight"  # in the fourth
BROKEN_LLAMA = {  # what is done to the folder, and what the message must say
    "missing tensor": (
        edit_weights(FIRST, **{KEY: None}), [f"{INDEX}: 1 tensors", KEY.removeprefix("model.")]),
    "extra tensor": (edit_weights(FIRST, spare=torch.ones(2)), [FIRST, "spare"]),
    "tensor twice": (edit_weights(FIRST, **{TWIN: torch.ones(32, 64)}), ["model-00004-of", TWIN]),
    "wrong shape": (edit_weights(FIRST, **{KEY: torch.ones(32, 48)}), [FIRST, KEY, "(32, 48)", "(32, 64)"]),
    "truncated shard": (truncate(LAST), [LAST, "truncated"]),
    "index names an absent shard": (remove(LAST), [LAST, "missing"]),
    "absent index": (remove(INDEX), [INDEX, "neither model.safetensors"]),
    "index without a map": (write(INDEX, "{}"), [INDEX, "weight_map"]),
    **{f"index with {name!r}": (write(INDEX, json.dumps({"weight_map": {"a": name}})), [INDEX, "weight_map"])
       for name in ("../model.safetensors", "/etc/passwd", "a/b.safetensors", "\ud800.safetensors", 7)},
    "index that is no object": (write(INDEX, "[]"), [INDEX, "not a dict"]),
    "absent config": (remove("config.json"), ["config.json", "no such file"]),
    "broken config": (write("config.json", '{"model_type": '), ["config.json", "JSON"]),
    "config that is no object": (write("config.json", "[1]"), ["config.json"]),
    "config without sizes": (write("config.json", '{"model_type": "llama"}'), ["config.json", "hidden_size"]),
    "other network": (edit_config(model_type="gemma"), ["config.json", "gemma"]),
    **spoilt_fields(
        ("hidden_size", "64"), ("vocab_size", 10**40), ("vocab_size", True), ("num_hidden_layers", 10**6),
        ("num_attention_heads", 0), ("head_dim", 1.5), ("rms_norm_eps", float("inf")),
        ("rope_scaling", "yarn"), ("tie_word_embeddings", "no")),
    "heads that cannot share": (edit_config(num_key_value_heads=3), ["config.json", "4 heads", "3 key"]),
    "heads of odd width": (edit_config(head_dim=15), ["config.json", "width 15 is not even"]),
    "rope of no theta": (
        edit_config(rope_parameters=dict(LLAMA3, factor=8, rope_theta=0)), ["rope_theta is 0"]),
    "sliding window": (
        edit_config(model_type="mistral", sliding_window=4096), ["config.json", "sliding window"]),
    "other rope": (edit_config(rope_parameters=dict(rope_type="yarn")), ["config.json", "yarn"]),
    "llama3 rope without factor": (edit_config(rope_parameters=LLAMA3), ["config.json", "factor"]),
}
BROKEN_VIT = {
    "missing tensor": (
        edit_weights(**{"layernorm.bias": None}), ["model.safetensors: 1 tensors", "norm.bias"]),
    "other network": (edit_config(model_type="vit"), ["config.json", "'vit'"]),
    **spoilt_fields(
        ("hidden_size", "48"), ("hidden_size", 10**40), ("hidden_size", [48]), ("num_hidden_layers", -1),
        ("num_hidden_layers", 10**6), ("num_attention_heads", 0), ("num_attention_heads", 5),
        ("mlp_ratio", None), ("layer_norm_eps", float("nan")), ("image_size", 13), ("patch_size", 0),
        ("use_swiglu_ffn", 1)),
    "patches that do not fit": (edit_config(patch_size=16), ["70", "patch size 16"]),
    "config without heads": (
        write("config.json", '{"model_type": "dinov2"}'), ["config.json", "num_attention_heads", "missing"]),
}


def refuse_broken(folder, network, case, load):
    """Saves a random network, breaks it, and sees that loading it names what is wrong in one line."""
    pytest.importorskip("transformers")
    break_it, says = case
    save_random(folder, **network)
    break_it(folder)
    with pytest.raises(InputError) as error:
        load(folder)
    message = str(error.value)
    assert all(text in message for text in [str(folder), *says]), message
    assert "\n" not in message


@pytest.mark.parametrize("case", BROKEN_LLAMA)
def test_the_loader_names_what_is_wrong_with_a_llama(case, tmp_path):
    refuse_broken(tmp_path, LLAMA, BROKEN_LLAMA[case], Llama.load)


@pytest.mark.parametrize("case", BROKEN_VIT)
def test_the_loader_names_what_is_wrong_with_a_vit(case, tmp_path):
    refuse_broken(tmp_path, VIT, BROKEN_VIT[case], lambda folder: ViT.load(folder, image_size=70))


def test_fused_tensors_are_cut_in_order_and_what_is_not_needed_is_left(tmp_path):
    """Rows 0 to 3 of "qkv" become q, 4 to 7 k, 8 to 11 v, in the type asked for; "unused" is not an error."""
    from safetensors.torch import save_file
    rows = torch.arange(24.0).view(12, 2)
    save_file({"qkv": rows, "unused": torch.ones(5)}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.empty(4, 2)) for name in "qkv"})

    def rename(key):
        return [] if key == "unused" else ["q", "k", "v"]
    load_weights(model, tmp_path, rename, torch.float64, "cpu")
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert torch.equal(torch.cat([model[name] for name in "qkv"]), rows.double())


MEASURE = """if True:
    import sys, torch, llama

    def read(key):  # MiB
        return int(open("/proc/self/status").read().split(key + ":")[1].split()[0]) / 1024

    # a small one first: what torch imports along the way does not count
    llama.Llama.load(sys.argv[1], dtype=torch.bfloat16)
    open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
    before = read("VmRSS")
    model = llama.Llama.load(sys.argv[2], dtype=torch.bfloat16)
    print(read("VmHWM") - before, sum(p.nbytes for p in model.parameters()) / 2**20)"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_holds_the_model_and_one_shard_at_most(tmp_path):
    pytest.importorskip("transformers")
    small, big = tmp_path / "small", tmp_path / "big"
    save_random(small, **LLAMA)
    save_random(big, **LLAMA | dict(hidden_size=512, intermediate_size=3328, num_hidden_layers=5,
                                    max_shard_size="25MB"))
    command = [sys.executable, "-c", MEASURE, str(small), str(big)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    growth, size = map(float, said.split())
    shard = max(path.stat().st_size for path in big.iterdir()) / 2**20
    shutil.rmtree(big)  # 120 MB
    assert size < growth < size + shard + 12, f"{growth:.0f} MiB for {size:.0f} in shards of {shard:.0f}"
