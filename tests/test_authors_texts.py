"""tools/authors_texts.py on clones that are made up: every shape it reads, and what it refuses."""

import json

import pytest
from conftest import ROOT

from common import InputError
from data import parse_descriptions
from tools.authors_texts import main

OURS = json.loads((ROOT / "descriptions.json").read_text(encoding="utf-8"))
SETS = {s: [k["name"] for k in keypoints] for s, keypoints in OURS["keypoint_sets"].items()}


def texts(s):
    return {f"part {name}": f"This is where the {s} has its {name}." for name in SETS[s]}


def write(clone, files):
    folder = clone / "datasets/descriptions_v4"
    folder.mkdir(parents=True)
    for name, variables in files.items():
        lines = [f"{variable} = {value if isinstance(value, str) else repr(value)}\n"
                 for variable, value in variables.items()]
        (folder / name).write_text("import os\n" + "".join(lines))
    return clone


def one_file_each():
    return {f"{s}.py": {"DESCRIPTIONS": texts(s)} for s in SETS}


def convert(clone):
    main([str(clone), "--out", str(clone / "theirs.json")])
    return json.loads((clone / "theirs.json").read_text())


def refusal(clone):
    with pytest.raises(InputError) as error:
        convert(clone)
    assert not (clone / "theirs.json").exists()
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def assert_all_there(theirs, with_names=True):
    assert theirs["categories"] == OURS["categories"]
    assert theirs["skeletons"] == OURS["skeletons"]
    for s, names in SETS.items():
        expected = texts(s) if with_names else dict(zip(names, texts(s).values()))
        assert [tuple(k.values()) for k in theirs["keypoint_sets"][s]] == list(expected.items())
    assert len(parse_descriptions(theirs, "theirs.json")) == 100


SHAPES = {
    "a dictionary a file": (one_file_each(), True),
    "pairs": ({"texts.py": {f"{s.upper()}_KEYPOINTS": list(texts(s).items()) for s in SETS}}, True),
    "lists, which get our names": (
        {f"{s}_v4.py": {"names": SETS[s], "texts": list(texts(s).values())} for s in SETS}, False)}


@pytest.mark.parametrize("shape", SHAPES)
def test_texts_are_found_in_every_shape(tmp_path, shape):
    files, with_names = SHAPES[shape]
    assert_all_there(convert(write(tmp_path, files)), with_names)


def test_by_category(tmp_path):
    """Every category has a table; those of one keypoint set are alike. Which face is told by the count."""
    named = [(entry["name"], entry["keypoint_set"]) for entry in OURS["categories"].values()]
    files = {"all.py": {"texts": {name: texts(s) for name, s in named if name != "face"}},
             "more.py": {"texts": {"set 1": {"face": texts("face_19")}, "set 2": {"face": texts("face_68")}}}}
    assert_all_there(convert(write(tmp_path, files)))


def test_files_are_not_run_and_what_cannot_be_parsed_is_named(tmp_path):
    files = one_file_each()
    files["run.py"] = {"x": "1/0", "DESCRIPTIONS": f"open({str(tmp_path / 'ran')!r}, 'w')"}
    assert_all_there(convert(write(tmp_path, files)))
    assert not (tmp_path / "ran").exists()
    (tmp_path / "theirs.json").unlink()
    (tmp_path / "datasets/descriptions_v4/bad.py").write_text("x = (")
    assert "bad.py: cannot be read" in refusal(tmp_path)


def test_a_wrong_count_is_not_made_to_fit(tmp_path):
    files = one_file_each()
    files["hand.py"]["DESCRIPTIONS"].popitem()
    files["face_68.py"] = {"person": texts("face_68")}  # its size is like no other's, but it says person
    said = refusal(write(tmp_path, files))
    assert "hand (21): none" in said and "face_68 (68): none" in said and "sofa" not in said
    assert "Left over: face_68/person (68), hand/DESCRIPTIONS (20)" in said


def test_two_different_texts_are_refused(tmp_path):
    files = one_file_each()
    files["old.py"] = {"bird": {name: f"Formerly {text}" for name, text in texts("bird").items()}}
    assert "bird (15): bird/DESCRIPTIONS (15), old/bird (15)" in refusal(write(tmp_path, files))


def test_what_is_no_clone(tmp_path):
    assert "no Python files" in refusal(tmp_path)
