"""Keypoints as people give them: the name of a set, texts, a file -> Category."""

import difflib
import re
from dataclasses import replace
from pathlib import Path

from chat import Category
from common import InputError, read_json, reading
from data import parse_descriptions

DESCRIPTIONS = Path(__file__).parent.parent / "descriptions.json"


def read_sets(descriptions, path, more=None):
    """-> {name: Category}: the keypoint sets and categories of a checkpoint's descriptions, then of a file.

    path: where the descriptions are from. more: the file; descriptions.json beside this program if None.
    """
    sets = {}
    for raw, source in (descriptions, path), (read_json(more or DESCRIPTIONS, dict), more or DESCRIPTIONS):
        for number, category in parse_descriptions(raw, source).items():
            for name in raw["categories"][str(number)]["keypoint_set"], category.name:
                sets.setdefault(name, replace(category, name=name))
    return sets


def split_words(name):
    """left_eye, "Left eye" and left-eye are the same words."""
    return re.split(r"[\s_-]+", name.strip().casefold())


def find_set(name, sets):
    """The set of a name -> Category. If there is none, InputError says which others share a word with it."""
    words = split_words(name)
    alike = [one for one in sets if one == name] or [one for one in sets if split_words(one) == words]
    if alike:
        return sets[alike[0]]
    shared = [one for one in sets if {*words} <= {*split_words(one)} or {*words} > {*split_words(one)}]
    close = shared or difflib.get_close_matches(name.casefold(), sets, cutoff=0.7)
    known = f"did you mean {' or '.join(close[:3])}? Or" if close else "--list shows those there are; or"
    raise InputError(f'"{name}": no such set of keypoints; {known} describe each: '
                     '"name: where it is and what is beside it"')


def make_category(keypoints):
    """[(name, description), ...] -> Category. InputError if one is empty or two have one name."""
    keypoints = list(keypoints)
    for text in (text for keypoint in keypoints for text in keypoint):
        if not isinstance(text, str):
            raise InputError(f'{text!r} is not a text; keypoints are {{"name": "description", ...}}')
    keypoints = [(name.strip(), description.strip()) for name, description in keypoints]
    names = [name for name, _ in keypoints]
    for name, description in keypoints:
        if not name or not description:
            raise InputError(f'keypoint "{name}: {description}" lacks a name or a description')
        if names.count(name) > 1:
            raise InputError(f'two keypoints are named "{name}"; give each a name of its own')
    if not keypoints:
        raise InputError('no keypoint is asked for; write "name: where it is and what is beside it"')
    return Category("object", keypoints)


def parse_keypoint(text):
    """ "left eye: the eye ..." -> (name, description). The name may hold a colon, if no space follows it."""
    if ":" not in text:
        raise InputError(f'keypoint "{text.strip()}" has no description: write "name: where it is"')
    name, _, description = text.partition(": " if ": " in text else ":")
    return name, description


def parse_keypoints(keypoints, sets):
    """{name: description}, the name of a set, a file, or "name: description; name: ..." -> Category.

    A file is JSON, {name: description}, or text with a keypoint in each line. In a text, semicolons or line
    ends are between keypoints or, if there are none, commas after which "name:" follows.
    """
    if isinstance(keypoints, Category):
        return keypoints
    if isinstance(keypoints, dict):
        return make_category(keypoints.items())
    if not isinstance(keypoints, str):
        raise InputError('keypoints are {"name": "description", ...}, a text, or the name of a set')
    if keypoints.lower().endswith((".json", ".txt")) and keypoints not in sets:
        return read_keypoints(Path(keypoints))
    if ":" not in keypoints or keypoints in sets:
        return find_set(keypoints, sets)
    parts = re.split(r"[;\n]", keypoints)
    if len(parts) == 1:
        parts = re.split(r",\s*(?=[^,:]+{})".format(r":\s" if ": " in keypoints else ":"), keypoints)
    return make_category(parse_keypoint(part) for part in parts if part.strip())


def read_keypoints(path):
    try:
        if path.suffix.lower() == ".json":
            return make_category(read_json(path, dict).items())
        with reading(path):
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            return make_category(map(parse_keypoint, filter(str.strip, lines)))
    except InputError as e:
        raise InputError(f"{path}: {str(e).removeprefix(f'{path}: ')}") from None
