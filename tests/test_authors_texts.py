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


def test_one_dictionary_a_file(tmp_path, capsys):
    assert_all_there(convert(write(tmp_path, one_file_each())))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 29
    assert said[2].split() == ["bird", "bird/DESCRIPTIONS", "(15)"]


def test_pairs(tmp_path):
    files = {"texts.py": {f"{s.upper()}_KEYPOINTS": list(texts(s).items()) for s in SETS}}
    assert_all_there(convert(write(tmp_path, files)))


def test_lists_get_our_names(tmp_path):
    files = {f"{s}_v4.py": {"names": SETS[s], "texts": list(texts(s).values())} for s in SETS}
    assert_all_there(convert(write(tmp_path, files)), with_names=False)


def test_by_category(tmp_path):
    """Every category has a table; those of one keypoint set are alike. Which face is told by the count."""
    named = [(entry["name"], entry["keypoint_set"]) for entry in OURS["categories"].values()]
    files = {"all.py": {"texts": {name: texts(s) for name, s in named if name != "face"}},
             "more.py": {"texts": {"set 1": {"face": texts("face_19")}, "set 2": {"face": texts("face_68")}}}}
    assert_all_there(convert(write(tmp_path, files)))


def test_without_a_label_names_or_the_size_must_tell(tmp_path):
    """Three sets have 10 keypoints: one table says whose it is, one has our names, the last is left over."""
    files = one_file_each()
    files["a.py"] = files.pop("bed.py")
    files["b.py"] = {"TEXTS": dict(zip(SETS["chair"], texts("chair").values()))}
    del files["chair.py"]
    theirs = convert(write(tmp_path, files))["keypoint_sets"]
    assert [k["name"] for k in theirs["bed"]] == list(texts("bed"))
    assert [k["name"] for k in theirs["chair"]] == SETS["chair"]


def test_names_that_two_sets_share_do_not_tell(tmp_path):
    files = one_file_each()
    for s, label in ("person", "a.py"), ("macaque", "b.py"):
        del files[f"{s}.py"]
        files[label] = {"TEXTS": dict(zip(SETS[s], texts(s).values()))}
    assert "person (17): none; macaque (17): none" in refusal(write(tmp_path, files))


def test_files_are_not_run(tmp_path):
    files = one_file_each()
    files["run.py"] = {"x": "1/0", "DESCRIPTIONS": f"open({str(tmp_path / 'ran')!r}, 'w')"}
    assert_all_there(convert(write(tmp_path, files)))
    assert not (tmp_path / "ran").exists()


def test_what_is_missing_is_listed_with_what_is_left_over(tmp_path):
    files = one_file_each()
    files["a.py"], files["b.py"] = files.pop("bed.py"), files.pop("chair.py")  # both of 10 texts
    said = refusal(write(tmp_path, files))
    assert "bed (10): none" in said and "chair (10): none" in said and "sofa" not in said
    assert "Left over: a/DESCRIPTIONS (10), b/DESCRIPTIONS (10)" in said


def test_a_wrong_count_is_not_made_to_fit(tmp_path):
    files = one_file_each()
    files["hand.py"]["DESCRIPTIONS"].popitem()
    files["face_68.py"] = {"person": texts("face_68")}  # its size is like no other's, but it says person
    said = refusal(write(tmp_path, files))
    assert "hand (21): none" in said and "face_68 (68): none" in said
    assert "hand/DESCRIPTIONS (20)" in said and "face_68/person (68)" in said


def test_two_different_texts_are_refused(tmp_path):
    files = one_file_each()
    files["old.py"] = {"bird": {name: f"Formerly {text}" for name, text in texts("bird").items()}}
    assert "bird (15): bird/DESCRIPTIONS (15), old/bird (15)" in refusal(write(tmp_path, files))


@pytest.mark.parametrize("content", ["x = (", "\0", "x = " + "[" * 5000])
def test_broken_files_are_named(tmp_path, content):
    clone = write(tmp_path, one_file_each())
    (clone / "datasets/descriptions_v4/bad.py").write_text(content)
    assert "bad.py: cannot be read" in refusal(clone)


def test_what_is_no_clone(tmp_path):
    assert "no Python files" in refusal(tmp_path)
