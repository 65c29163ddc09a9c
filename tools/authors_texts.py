"""The authors' own texts as a file for --descriptions: python -m tools.authors_texts CLONE --out theirs.json

They lie in datasets/descriptions_v4/*.py of a clone of their repository, and are parsed, never run. This was
written without them at hand and reads the usual shapes. Variables at the top level hold, as literals,

    {"left eye": "text", ...}             keypoints' names and texts
    [("left eye", "text"), ...]           the same in pairs
    ["text", ...]                         texts alone, which get the names of descriptions.json
    {"horse_body": one of these, ...}     by category or keypoint set

in the order of MP-100's annotations. Anything else is passed over. The key, else the variable, else the file
is called like a keypoint set or category of descriptions.json, and the counts agree. Without such a label the
keypoints have the names of one set, or only one set and one table of a size are left over. If a set has no
texts, or different ones, nothing is written.
"""

import ast
import re
from collections import defaultdict, namedtuple
from contextlib import suppress
from pathlib import Path

from common import InputError, Parser, read_json, reading, run, write_json

Table = namedtuple("Table", "labels names texts")  # labels: key, variable, file; names may be None


def plain(label):
    """A label as it is compared: "Animal-Body_keypoints" -> "animalbody"."""
    return re.sub(r"_v\d+|[^a-z0-9]|keypoints?|kpts?|descriptions?|texts?", "", label.lower())


def read_tables(path):
    """Yields the Tables of a Python file."""
    with reading(path):
        for node in ast.parse(path.read_bytes()).body:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                variable = ast.unparse(getattr(node, "target", None) or node.targets[0])
                with suppress(ValueError, TypeError):  # no literal
                    yield from find_tables(ast.literal_eval(node.value), [variable, path.stem])


def are_strings(value):
    return isinstance(value, list | tuple) and {*map(type, value)} == {str}


def find_tables(value, labels, names=None):
    """Yields the Tables in what a literal holds."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from find_tables(inner, [str(key), *labels])
        value = [*value.items()]
    if isinstance(value, list) and value and all(are_strings(pair) and len(pair) == 2 for pair in value):
        names, value = zip(*value)
    if are_strings(value) and len(" ".join(value).split()) >= 4 * len(value):  # not a list of names
        yield Table(labels, names, [" ".join(text.split()) for text in value])


def list_places(tables):
    return ", ".join(f"{'/'.join(reversed(t.labels))} ({len(t.texts)})" for t in tables) or "none"


def match(tables, ours):
    """-> {keypoint set: [Table, ...]}, and the Tables that belong to none."""
    sets, called = ours["keypoint_sets"], defaultdict(set)
    for entry in ours["categories"].values():
        for label in entry["keypoint_set"], entry["name"]:
            called[plain(label)].add(entry["keypoint_set"])
    found, misfits, unlabelled = defaultdict(list), [], []
    for table in tables:
        meant = next((called[plain(label)] for label in table.labels if plain(label) in called), None)
        names = [plain(name) for name in table.names or []]
        fitting = [s for s, keypoints in sets.items() if len(keypoints) == len(table.texts)
                   and (s in meant if meant else names == [plain(k["name"]) for k in keypoints])]
        (found[fitting[0]] if len(fitting) == 1 else misfits if meant else unlabelled).append(table)
    for size in {len(keypoints) for keypoints in sets.values()}:
        left = [s for s, keypoints in sets.items() if s not in found and len(keypoints) == size]
        alike = [table for table in unlabelled if len(table.texts) == size]
        if len(left) == len(alike) == 1:
            found[left[0]] = alike
            unlabelled.remove(*alike)
    return found, misfits + unlabelled


def main(argv):
    parser = Parser(description="The authors' own texts as a file for --descriptions.")
    parser.add_argument("clone", help="a clone of the authors' repository")
    parser.add_argument("--out", required=True, help="the file to write, for --descriptions")
    args = parser.parse_args(argv)
    folder = Path(args.clone, "datasets/descriptions_v4")
    ours = read_json(Path(__file__).resolve().parent.parent / "descriptions.json")
    if not (paths := sorted(folder.glob("*.py"))):
        raise InputError(f"{folder}: no Python files; CLONE is to be a clone of the authors' repository")
    found, over = match([table for path in paths for table in read_tables(path)], ours)
    sets, problems = {}, []
    for s, keypoints in ours["keypoint_sets"].items():
        texts = [[*zip(t.names or [k["name"] for k in keypoints], t.texts)] for t in found[s]]
        if not texts or any(other != texts[0] for other in texts):
            problems.append(f"{s} ({len(keypoints)}): {list_places(found[s])}")
        else:
            sets[s] = [{"name": name, "description": text} for name, text in texts[0]]
    if problems:
        raise InputError(f"{folder}: not one text a keypoint for {'; '.join(problems)}. "
                         f"Left over: {list_places(over)}")
    print(*[f"{s:24s}{list_places(found[s])}" for s in sets], sep="\n")
    write_json(args.out, ours | {"keypoint_sets": sets})


if __name__ == "__main__":
    run(main)
