"""common.py: what the user can mend is one line and exit code 2, defects crash, no file is half written."""

import os
import signal
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.utils.data import DataLoader, Dataset

import common
from common import InputError, Parser, loader_options, printable, read_json, reading, run, write_json
from data import Crop

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
    with pytest.raises(SystemExit) as end:
        start(monkeypatch, main)
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (code, "", bool(said)) and err.startswith(said)


@pytest.mark.parametrize("defect", [ZeroDivisionError(), RuntimeError("shapes"), OSError(2, "No such file")])
def test_defects_crash(monkeypatch, defect):
    with pytest.raises(type(defect)):
        start(monkeypatch, raising(defect))


@pytest.mark.parametrize("error, line", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "--micro-batch"),
    (RuntimeError("DataLoader timed out after 300 seconds"), "--workers 0"),
    (ConnectionRefusedError(111, "Connection refused"), "lost another process"),
    (RuntimeError("unable to write: No space left on device"), "/dev/shm, which --workers 0 does without")])
def test_errors_of_torch_that_are_no_defects_are_explained(error, line):
    assert line in common.explain(error) and "\n" not in common.explain(error)


PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from common import InputError, run, say, start_processes

def main(argv):
    process = start_processes()
    say(f"{{process.world}} processes")
    open(f"I am {{process.rank}}", "w").close()
    raise InputError("a.json: no such file")

run(main)
"""


def test_under_torchrun_one_process_speaks_and_the_report_repeats_it(tmp_path):
    program, report = tmp_path / "program.py", tmp_path / "error.json"
    program.write_text(PROGRAM.format(root=str(ROOT)))
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", program],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env=os.environ | {"TORCHELASTIC_ERROR_FILE": str(report), "OMP_NUM_THREADS": "1"})
    assert sorted(path.name for path in tmp_path.glob("I am*")) == ["I am 0", "I am 1"]
    assert ended.stdout == "2 processes\n"  # which nothing cuts off
    ours = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ours == ["error: a.json: no such file"] and ended.returncode == 1
    assert "no such file" in report.read_text()


# -------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("kind, smallest", [(common.natural, 0), (common.positive, 1)])
def test_arguments_are_whole_numbers(kind, smallest):
    parser = Parser()
    parser.add_argument("--n", type=kind)
    for number in smallest, 12:
        assert parser.parse_args(["--n", str(number)]).n == number
    for text in str(smallest - 1), "1.5", "1e3", "", "ten", "\u00b2":
        with pytest.raises(InputError, match=f"^argument --n: invalid .* value: '{text}'; see --help$"):
            parser.parse_args([f"--n={text}"])


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
                        (ValueError("no. In PyTorch 2.6, do"), "a.json: cannot be read (ValueError: no.)"),
                        (FileNotFoundError(2, "", "b.json"), "b.json: no such file; is it yours?"),
                        (FileNotFoundError("c.json"), "a.json: cannot be read (FileNotFoundError: c.json)")]:
        with pytest.raises(InputError) as caught, reading("a.json", "is it yours?"):
            raise error
        assert str(caught.value).startswith(says) and caught.value.__cause__ is error
    own = InputError("c.json: holds 7 keypoints")
    with pytest.raises(InputError) as caught, reading("a.json"):
        raise own
    assert caught.value is own
    for not_of_the_file in KeyboardInterrupt, SystemExit, torch.OutOfMemoryError:
        with pytest.raises(not_of_the_file), reading("a.json"):
            raise not_of_the_file


def test_json_is_read_as_it_was_written_into_a_new_folder(tmp_path):
    contents = {"names": ["\u00d6hr", "ear"], "points": [[0.5, None]]}
    write_json(path := tmp_path / "a/b/c.json", contents)
    assert read_json(path) == read_json(str(path), dict) == contents
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a mark before UTF-8 is no error
    assert read_json(path) == contents


@pytest.mark.parametrize("content, kind, says", [
    (None, dict, "no such file"), (b"[1]", dict, "holds a list, not a dict"),
    *((bad, object, r"cannot be read \(.+\)") for bad in (
        b"", b'{"a": ', b'{"a": "\xff"}', b"[" * 100_000, '{"a": 1}'.encode("utf-16"), b"[1" + b"0" * 5000))])
def test_json_that_cannot_be_read_is_named(tmp_path, content, kind, says):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^{path}: {says}$"):
        read_json(path, kind)


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


def test_json_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in tmp_path, tmp_path / "file/a.json":
        with pytest.raises(InputError, match=rf"^{tmp_path}[^\n]*: cannot be (written|made) \([^\n]+\)$"):
            write_json(path, {})
