"""common.py: errors in one line, processes, JSON. What is wrong with published weights is named, too."""

import os
import shutil
import signal
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path

import pytest
import torch
from checkpoints import LLAMA, VIT, edit_config, edit_weights, save_random
from conftest import ROOT, network_arguments
from torch.utils.data import DataLoader, Dataset

import common
from common import (
    InputError,
    Parser,
    is_first,
    loader_options,
    natural,
    positive,
    printable,
    read_json,
    reading,
    run,
    say,
    start_processes,
    write_json,
)
from data import Crop
from model import load_network

# -------------------------------------------------------------------------------------------------- programs


class Photos(Dataset):
    """The same photo, as often as one likes. Somebody presses Ctrl-C meanwhile."""

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 2

    def __getitem__(self, _):
        if torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGINT)
        return Crop(4, 4, 8).cut(self.path, 14)


def test_an_input_error_of_a_loaders_worker_arrives_as_its_one_line(tmp_path):
    path, messages = tmp_path / "absent.png", []
    for n_workers in 0, 1:
        with pytest.raises(InputError) as error:
            next(iter(DataLoader(Photos(path), **loader_options(n_workers))))
        messages.append(str(error.value))
        traceback.clear_frames(error.tb)  # ends the worker here and not in a later test
    here, from_worker = messages
    assert from_worker == here == f"{path}: no such file; replace or remove this photo"


def test_ctrl_c_does_not_end_a_loaders_worker():
    photo = ROOT / "assets/toy/creature.jpg"
    assert len([*DataLoader(Photos(photo), **loader_options(1))]) == 2


def start(monkeypatch, main):
    """Runs a program as if it had been called with the arguments a and b."""
    monkeypatch.setattr(sys, "argv", ["program.py", "a", "b"])
    run(main)


def raising(error):
    def main(argv):
        raise error
    return main


def parse(argv):
    Parser().parse_args(argv)


def test_a_reader_that_has_ended_is_no_defect(monkeypatch, capsys):
    """As in "| head": what is still to be printed at the end finds nobody."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    with pytest.raises(SystemExit) as end:
        start(monkeypatch, lambda argv: print("done"))
    assert end.value.code == 141 and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("main, code, said", [
    (raising(InputError("a.json: no such file")), 2, "error: a.json: no such file\n"),
    (parse, 2, "error: unrecognized arguments: a b; see --help\n"),
    (raising(OSError(28, "No space left on device")), 2, "error: [Errno 28] No space left on "),
    (raising(KeyboardInterrupt()), 130, "")])
def test_what_the_user_can_mend_is_one_line(monkeypatch, capsys, main, code, said):
    """Under torchrun the first process says it."""
    for rank in None, "0", "1":
        monkeypatch.setenv("RANK", rank) if rank else monkeypatch.delenv("RANK", raising=False)
        with pytest.raises(SystemExit) as end:
            start(monkeypatch, main)
        assert end.value.code == code
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == (bool(said) and rank != "1")
        assert err.startswith(said if rank != "1" else "")


@pytest.mark.parametrize("defect", [ZeroDivisionError(), RuntimeError("shapes cannot be multiplied"),
                                    OSError(2, "No such file")])
def test_defects_crash(monkeypatch, defect):
    with pytest.raises(type(defect)):
        start(monkeypatch, raising(defect))


@pytest.mark.parametrize("error, line", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "--micro-batch"),
    (RuntimeError("DataLoader timed out after 300 seconds"), "--workers 0"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "--workers 0"),
    (ConnectionRefusedError(111, "Connection refused"), "lost another process"),
    (OSError(28, "No space left on device"), "/dev/shm, which --workers 0 does without"),
    (RuntimeError("unable to write: No space left on device"), "a disk is full"),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None), (OSError(2, "No such file"), None)])
def test_errors_of_torch_that_are_no_defects_are_explained(error, line):
    said = common.explain(error)
    assert said is None if line is None else line in said and "\n" not in said


PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from common import InputError, run, say, start_processes

def main(argv):
    process = start_processes()
    say(f"{{process.world}} processes")
    open(f"I am {{process.rank}}", "w").close()
    if argv == ["fail"]:
        raise InputError("a.json: no such file")

run(main)
"""


@pytest.mark.parametrize("end", ["well", "fail"])
def test_under_torchrun_one_process_speaks_and_the_report_repeats_it(tmp_path, end):
    program, report = tmp_path / "program.py", tmp_path / "error.json"
    program.write_text(PROGRAM.format(root=str(ROOT)))
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", program, end],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env=os.environ | {"TORCHELASTIC_ERROR_FILE": str(report), "OMP_NUM_THREADS": "1"})
    assert sorted(path.name for path in tmp_path.glob("I am*")) == ["I am 0", "I am 1"]
    assert ended.stdout == "2 processes\n"  # which nothing cuts off
    ours = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ours == ["error: a.json: no such file"] * (end == "fail")
    assert ended.returncode == (end == "fail"), ended.stderr
    assert not report.exists() if end == "well" else "no such file" in report.read_text()


def test_a_process_alone_is_the_first_of_one_and_speaks(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    rank, world, device = start_processes()
    assert (rank, world) == (0, 1) and isinstance(device, torch.device)
    for rank, speaks in (None, True), ("0", True), ("1", False):
        if rank:
            monkeypatch.setenv("RANK", rank)
        assert is_first() is speaks
        say("step 5")
        assert capsys.readouterr().out == "step 5\n" * speaks


# -------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("text, is_natural, is_positive", [
    ("0", True, False), ("1", True, True), ("12", True, True), ("-1", False, False), ("1.5", False, False),
    ("1e3", False, False), ("", False, False), ("ten", False, False), ("\u00b2", False, False)])
def test_arguments_are_whole_numbers(text, is_natural, is_positive):
    for kind, is_fine in (natural, is_natural), (positive, is_positive):
        parser = Parser()
        parser.add_argument("--n", type=kind)
        if is_fine:
            assert parser.parse_args(["--n", text]).n == int(text)
        else:
            with pytest.raises(InputError, match=f"^argument --n: invalid .* value: '{text}'; see --help$"):
                parser.parse_args([f"--n={text}"])


def test_the_parser_takes_no_abbreviations_and_its_help_says_the_defaults(capsys):
    parser = Parser(prog="program.py")
    parser.add_argument("--batch", type=positive, default=128, help="examples in a step")
    with pytest.raises(InputError, match="^unrecognized arguments: --bat=3; see --help$"):
        parser.parse_args(["--bat=3"])
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--help"])
    assert end.value.code == 0 and "examples in a step (default: 128)" in capsys.readouterr().out


@pytest.mark.parametrize("program", ["train", "evaluate", "predict"])
def test_help_explains_every_option(program, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as end:
        import_module(program).main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and max(map(len, lines)) < 120 and "(default: " in "".join(lines)
    for line, after in zip(lines, lines[1:]):
        if line.startswith("  -"):  # an option, with an explanation behind it or below
            assert "  " in line[2:] or after.startswith(24 * " ")


# ------------------------------------------------------------------------------------------------------ files


def test_whatever_goes_wrong_in_reading_is_one_line_that_names_the_file_and_keeps_the_cause():
    for error, says in [(KeyError("name"), "a.json: cannot be read (KeyError: 'name'); is it yours?"),
                        (RuntimeError("two\nlines"), "a.json: cannot be read (RuntimeError: two lines)"),
                        (FileNotFoundError(2, "", "b.json"), "b.json: no such file; is it yours?"),
                        (FileNotFoundError("c.json"), "a.json: cannot be read (FileNotFoundError: c.json)")]:
        with pytest.raises(InputError) as caught, reading("a.json", "is it yours?"):
            raise error
        assert str(caught.value).startswith(says) and caught.value.__cause__ is error
    own = InputError("c.json: holds 7 keypoints")
    with pytest.raises(InputError) as caught, reading("a.json"):
        raise own
    assert caught.value is own
    for not_of_the_file in KeyboardInterrupt, SystemExit:
        with pytest.raises(not_of_the_file), reading("a.json"):
            raise not_of_the_file


def test_json_is_read_as_it_was_written_into_a_new_folder(tmp_path):
    contents = {"names": ["Öhr", "ear"], "points": [[0.5, None]]}
    path = tmp_path / "a/b/c.json"
    write_json(path, contents)
    assert read_json(path) == read_json(str(path), dict) == contents


@pytest.mark.parametrize("content, kind, says", [
    (None, dict, "no such file"),
    (b"", dict, r"cannot be read \(.+\)"),
    (b'{"a": ', object, r"cannot be read \(.+\)"),
    (b'{"a": "\xff"}', object, r"cannot be read \(.+\)"),
    (b"[" * 100_000, object, r"cannot be read \(RecursionError: .+\)"),
    (b"[1]", dict, "holds a list, not a dict"),
    (b"{}", list, "holds a dict, not a list"),
    ('{"a": 1}'.encode("utf-16"), dict, r"cannot be read \(.+\)"),
    (b"[1" + b"0" * 5000 + b"]", list, r"cannot be read \(.+\)"),
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


def test_json_that_cannot_be_read_or_written_for_a_folder_in_its_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in tmp_path, tmp_path / "file/a.json":
        with pytest.raises(InputError, match=rf"^{path}: cannot be written \([^\n]+\)$"):
            write_json(path, {})
    with pytest.raises(InputError, match=rf"^{tmp_path}: cannot be read \([^\n]+\)$"):
        read_json(tmp_path)


# --------------------------------------------------------------------------------------------------- weights


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    return lambda folder: (folder / name).unlink()


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


INDEX = "model.safetensors.index.json"
FIRST, LAST = "model-00001-of-00006.safetensors", "model-00006-of-00006.safetensors"
KEY = "model.layers.0.self_attn.k_proj.weight"  # in the first file
BROKEN_LLAMA = {  # what is done to the folder, and what the message must say
    "missing tensor": (edit_weights(FIRST, **{KEY: None}), ["Missing key", KEY.removeprefix("model.")]),
    "extra tensor": (edit_weights(FIRST, spare=torch.ones(2)), ["Unexpected key", "spare"]),
    "wrong shape": (edit_weights(FIRST, **{KEY: torch.ones(32, 48)}),
                    [KEY.removeprefix("model."), "[32, 48]", "[32, 64]"]),
    "truncated shard": (truncate(LAST), [LAST, "not fully covered"]),
    "index names an absent shard": (remove(LAST), [LAST, "No such file"]),
    "absent index": (remove(INDEX), ["model.safetensors", "No such file"]),
    "index without a map": (write(INDEX, "{}"), ["weight_map"]),
    "absent config": (remove("config.json"), ["config.json: no such file"]),
    "broken config": (write("config.json", '{"model_type": '), ["config.json: cannot be read (JSON"]),
    "config without sizes": (
        write("config.json", '{"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}'),
        ["hidden_size"]),
    "size of no kind": (edit_config(hidden_size="64"), ["TypeError"]),
    "other network": (edit_config(model_type="gemma"), ["model_type gemma is not a Llama"]),
    "sliding window": (edit_config(model_type="mistral", sliding_window=4096), ["without sliding window"]),
    "other rope": (edit_config(rope_parameters=dict(rope_type="yarn")), ["rope_type yarn is not supported"]),
    "absent tokenizer": (remove("tokenizer.json"), ["tokenizer.json", "--llm"]),
}
BROKEN_VIT = {
    "missing tensor": (edit_weights(**{"layernorm.bias": None}), ["Missing key", '"norm.bias"']),
    "extra tensor": (edit_weights(spare=torch.ones(2)), ["Unexpected key", "spare"]),
    "truncated": (truncate("model.safetensors"), ["not fully covered"]),
    "absent config": (remove("config.json"), ["config.json: no such file", "--vit"]),
    "other network": (edit_config(model_type="vit"), ["model_type vit is not dinov2"]),
    "no heads": (write("config.json", '{"model_type": "dinov2"}'), ["num_attention_heads"]),
    "patches that do not fit": (edit_config(patch_size=16), ["70", "patch size 16"]),
}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A folder with sound networks of random weights, and a tokenizer."""
    pytest.importorskip("transformers")
    folder, toy = tmp_path_factory.mktemp("networks"), ROOT / "assets/toy/llm"
    save_random(folder / "llm", **LLAMA)
    save_random(folder / "vit", **VIT)
    shutil.copy(toy / "tokenizer.json", folder / "llm")
    edit_config(eos_token_id=2)(folder / "llm")
    load_network(network_arguments(folder, image_size=70))
    return folder


@pytest.mark.parametrize("network, case", [*(("llm", case) for case in BROKEN_LLAMA),
                                           *(("vit", case) for case in BROKEN_VIT)])
def test_what_is_wrong_with_a_network_is_named_in_one_line(networks, tmp_path, network, case):
    break_it, says = (BROKEN_LLAMA if network == "llm" else BROKEN_VIT)[case]
    shutil.copytree(networks, tmp_path / "broken")
    break_it(tmp_path / "broken" / network)
    with pytest.raises(InputError) as error:
        load_network(network_arguments(tmp_path / "broken", image_size=70))
    message = str(error.value)
    assert all(text in message for text in [str(tmp_path / "broken" / network), *says]), message
    assert "\n" not in message


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
