"""tools/curve.py: which lines of log.jsonl count, and what is drawn of them."""

import json

import pytest
from PIL import Image

from common import InputError
from tools import curve


def write_log(folder, *lines):
    """Each line is a dictionary, or text as it is."""
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text)
    return folder / "log.jsonl"


def step(n, loss, lr=1e-4):
    return {"step": n, "epoch": 1, "loss": loss, "lr": lr, "norm": 1.0, "tokens_per_second": 5, "gib": 1.0,
            "seconds": 0.1}


def test_the_last_line_of_a_step_counts_and_what_is_cut_off_does_not(tmp_path):
    path = write_log(tmp_path, step(1, 3.0), step(2, 2.0), step(3, 9.0),
                     {"step": 2, "PCK@0.2": 0.25, "objects": 4}, "\0\0\n", "[1]\n", "7\n",
                     step(5, float("nan")), {"step": 6, "error": "loss nan"}, step(3, 1.5), step(4, 1.0),
                     {"step": 4, "PCK@0.2": 0.5, "objects": 4}, '{"step": 5, "lo')
    assert curve.read_curve(path, "loss") == [(1, 3.0), (2, 2.0), (3, 1.5), (4, 1.0)]
    assert curve.read_curve(path, "PCK@0.2") == [(2, 0.25), (4, 0.5)]
    curve.draw_curve(tmp_path)
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size == (900, 600)  # loss, learning rate, validation


def test_the_mean_is_of_the_last_values():
    points = [(10, 4.0), (11, 2.0), (12, 0.0), (13, 4.0)]
    assert curve.smooth(points, 2) == [(10, 4.0), (11, 3.0), (12, 1.0), (13, 2.0)]
    assert curve.smooth([(n, float(n)) for n in range(100)])[-1] == (99, 74.5)


def test_an_unfinished_picture_of_a_killed_run_is_not_left(tmp_path):
    write_log(tmp_path, step(1, 1.5))
    (tmp_path / "curve.png.part").write_bytes(b"half")
    curve.main([str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.png", "log.jsonl"]
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size == (900, 400)  # without a validation


@pytest.mark.parametrize("lines", [None, [], [{"step": 1, "PCK@0.2": 0.5, "objects": 3}]])
def test_a_folder_without_steps_is_one_line(tmp_path, lines):
    if lines is not None:
        write_log(tmp_path, *lines)
    with pytest.raises(InputError, match="log.jsonl: no step of a training in it$"):
        curve.draw_curve(tmp_path)
    assert not (tmp_path / "curve.png").exists()
