"""descriptions.json: a name and a sentence or two for every keypoint of MP-100, and of a few more categories.

The model finds a keypoint by these texts alone, so a wrong one is a wrong label. Texts cannot be checked by a machine, their claims
can: the tests read them out of the texts and hold them against the benchmark's mean layouts and its single annotations. For the
categories beyond MP-100 (ids over 100) there is nothing to measure, so that only the form is checked. The grammar of claims:

    above N            below N              nearest to N, closest to N        of the keypoint described, which is always the subject;
    to the left of N   to the right of N    between A and B                   N, A, B: exact names of others, with or without "the"
    above and to the left of N: two claims;   above N and M: two claims;   any other relation ("beside N", "joined to N"): none
"""

import gzip
import json
import re
from collections import namedtuple

import numpy as np
import pytest
from conftest import ROOT

from chat import Chat
from data import Category

TEXTS = json.loads((ROOT / "descriptions.json").read_text(encoding="utf-8"))
RENAMED = json.loads((ROOT / "assets/animal_body_renamed.json").read_text(encoding="utf-8"))  # the same points under other names
SETS = TEXTS["keypoint_sets"] | RENAMED["keypoint_sets"]  # {set: [{"name", "description"}, ...]}
EXTRA = set(TEXTS["keypoint_sets"]) - {c["keypoint_set"] for id, c in TEXTS["categories"].items() if int(id) <= 100}
MP100 = {s: keypoints for s, keypoints in SETS.items() if s not in EXTRA}


def swap(text, a, b):
    return re.sub(rf"\b({a}|{b})\b", lambda m: b if m[0] == a else a, text.lower())


def mirrored(text):
    return swap(text, "left", "right")


# ---- reading claims ----

Claim = namedtuple("Claim", "kind subject others")
KINDS = {"above": "above", "below": "below", "nearest to": "nearest", "closest to": "nearest", "between": "between",
         "to the left of": "left", "to the right of": "right"}
RELATION = "|".join(KINDS)
NAME = r"(?:both )?(?:the )?<\d+>"
NAMES = rf"{NAME}(?:(?:,? {NAME})*,? and {NAME}(?! (?:is|are|lies|sits)\b))?"  # "the nose, the chin and the left eye"
CLAIMS = re.compile(rf"\b((?:{RELATION})(?:,? (?:and|but)(?: \w+)? (?:{RELATION}))*) ({NAMES})")  # "above and to the left of the nose"


def numbers_in(text):
    return tuple(map(int, re.findall(r"<(\d+)>", text)))


def read_claims(text, names, subject):
    """(claims, indices of the keypoints mentioned, relations that are followed by no name of the set)"""
    longest_first = sorted(names, key=len, reverse=True)  # so that no name is found inside a longer one
    pattern = r"(?<![\w-])(" + "|".join(map(re.escape, longest_first)) + r")(?![\w-])"
    text = re.sub(pattern, lambda m: f"<{names.index(m[1])}>", text.lower())  # "above the left eye" -> "above the <1>"
    claims, understood = [], []
    for m in CLAIMS.finditer(text):
        n = numbers_in(m[2])
        for kind in (KINDS[relation] for relation in re.findall(RELATION, m[1])):
            others = {"between": [n[:2]], "nearest": [n[:1]]}.get(kind, [(i,) for i in n])
            claims += [Claim(kind, subject, o) for o in others]
        understood.append(range(*m.span()))
    loose = [text[m.start():m.start() + 40] for m in re.finditer(rf"\b(?:{RELATION})\b", text)
             if not any(m.start() in span for span in understood)]
    return list(dict.fromkeys(claims)), set(numbers_in(text)), loose


def claims_of(keypoints):
    names = [k["name"] for k in keypoints]
    return [c for i, k in enumerate(keypoints) for c in read_claims(k["description"], names, i)[0]]


# ---- judging claims ----


def holds(claim, points, own_left, seen=True, tie=1.05):
    """Is the claim true of points (..., K, 2)? x right, y down; own_left: the direction of the subject's own left.

    between: seen from S, A and B lie in opposite directions (over 90 degrees apart), that is, S is inside the circle over AB.
    nearest: no other (visible) keypoint is nearer; one nearer by up to `tie` counts as equally near.
    """
    s, n = points[..., claim.subject, :], points[..., claim.others[0], :]
    if claim.kind in ("above", "below"):
        return s[..., 1] < n[..., 1] if claim.kind == "above" else s[..., 1] > n[..., 1]
    if claim.kind in ("left", "right"):
        return (s - n) @ own_left > 0 if claim.kind == "left" else (s - n) @ own_left < 0
    if claim.kind == "between":
        return ((n - s) * (points[..., claim.others[1], :] - s)).sum(-1) < 0
    distance = np.linalg.norm(points - s[..., None, :], axis=-1)
    to_n = distance[..., claim.others[0]].copy()
    distance[..., claim.subject] = np.inf
    return to_n <= tie * np.where(seen, distance, np.inf).min(-1)


class Geometry:
    """A set's mean layout and single annotations, in whatever pose and view they are."""

    def __init__(self, info, annotations):
        keypoints = np.array([a["keypoints"] for a in annotations], float).reshape(len(annotations), -1, 3)
        x, y, w, h = np.array([a["bbox"] for a in annotations], float).T
        self.points, self.seen = keypoints[..., :2], keypoints[..., 2] > 0
        self.layout = np.array([k["mean"] for k in info["keypoints"]]) * [np.median(w / h), 1]  # means are fractions of the box
        if info["keypoints"][0]["name"] == "wrist":  # no hand of MP-100 is here, and of the substitutes only one is open and points up
            self.layout = next(p for p, seen in zip(self.points, self.seen) if seen.all() and p[:, 1].argmax() == 0)
        # Own left is the image's right from the front; up, if seen from above with the head to the image's right (the insects).
        self.pairs = info["pairs"]
        higher = np.mean([p["left_is_higher"] for p in self.pairs] or np.nan)  # without sides there is no left, and no claim on it true
        self.own_left = np.array([0, -1] if higher > 0.9 else [1, 0] if higher <= 0.9 else [np.nan, np.nan])

    def on_means(self, claim):
        return bool(holds(claim, self.layout, self.own_left))

    def on_annotations(self, claim):
        """One truth value for every annotation that shows all points of the claim."""
        use = self.seen[:, [claim.subject, *claim.others]].all(1)
        return holds(claim, self.points[use], self.own_left, self.seen[use], tie=1.1)


@pytest.fixture(scope="module")
def geometry(shared):
    infos = json.loads((shared / "mp100/keypoint_sets.json").read_text(encoding="utf-8"))
    set_of = {c: name for name, info in infos.items() for c in info["categories"]}
    annotations = {name: [] for name in infos}
    for path in sorted((shared / "mp100/annotations").glob("*.json.gz")):
        for a in json.loads(gzip.decompress(path.read_bytes()))["annotations"]:
            annotations[set_of[a["category_id"]]].append(a)
    for path in sorted((shared / "mini_mp100/annotations").glob("*.json")):
        annotations["hand"] += [a for a in json.loads(path.read_text())["annotations"] if set_of.get(a["category_id"]) == "hand"]
    found = {name: Geometry(info, annotations[name]) for name, info in infos.items()}
    return found | {"animal_body_renamed": found["animal_body"]}


# ---- form: all sets ----


def test_categories_and_sets_belong_together():
    assert list(TEXTS["categories"])[:100] == [str(i) for i in range(1, 101)]
    assert {c["keypoint_set"] for c in TEXTS["categories"].values()} == set(TEXTS["keypoint_sets"])


def test_names_are_plain_words_and_cannot_be_mixed_up():
    for set_name, keypoints in SETS.items():
        names = [k["name"] for k in keypoints]
        assert all(re.fullmatch(r"[a-z]+([ -][a-z]+)*", n) for n in names), set_name
        words = {tuple(sorted(re.split("[ -]", n))) for n in names}
        assert len(words) == len(names), f"{set_name}: two names are equal, or differ only by the order of their words"


def test_descriptions_are_short_and_mention_others_by_name():
    problems = []
    for set_name, keypoints in SETS.items():
        names = [k["name"] for k in keypoints]
        for i, k in enumerate(keypoints):
            claims, mentioned, loose = read_claims(k["description"], names, i)
            wrong = {"keys": set(k) != {"name", "description"},
                     "not 15 to 45 words": not 15 <= len(k["description"].split()) <= 45,
                     "used twice in the set": [q["description"] for q in keypoints].count(k["description"]) > 1,
                     "fewer than two other keypoints mentioned": len(mentioned - {i}) < 2,
                     "fewer than two claims": set_name not in EXTRA and len(claims) < 2,
                     "a claim about itself": any(i in c.others for c in claims),
                     f"no name of the set after {loose}": loose}
            problems += [f"{set_name}, {k['name']}: {what}" for what, is_so in wrong.items() if is_so]
    assert not problems, "\n".join(problems)


def test_left_and_right_are_mirror_images():
    for set_name, keypoints in SETS.items():
        sided = {k["name"]: k["description"].lower() for k in keypoints if mirrored(k["name"]) != k["name"]}
        for name, description in sided.items():
            assert sided.get(mirrored(name)) == mirrored(description), f"{set_name}, {name}"


def test_questions_are_short(shared, tmp_path):
    (tmp_path / "tokenizer.json").symlink_to(shared / "llama3_tokenizer/tokenizer.json")
    (tmp_path / "config.json").write_text('{"bos_token_id": 128000, "eos_token_id": 128009, "vocab_size": 128256}')
    chat = Chat(tmp_path)
    lengths = {}
    for s, keypoints in SETS.items():
        questions = chat.questions(Category(s, [(k["name"], k["description"]) for k in keypoints]))
        lengths |= {(s, k["name"]): len(question) for k, question in zip(keypoints, questions)}
    longest = max(lengths, key=lengths.get)
    print(f"question tokens: mean {np.mean([*lengths.values()]):.1f}, max {lengths[longest]} {longest}")
    assert lengths[longest] < 110


def test_renamed_animal_body_is_the_same_in_other_words():
    original, (name, renamed) = TEXTS["keypoint_sets"]["animal_body"], *RENAMED["keypoint_sets"].items()
    bodies = {id: c for id, c in TEXTS["categories"].items() if c["keypoint_set"] == "animal_body"}
    assert RENAMED["categories"] == {id: c | {"keypoint_set": name} for id, c in bodies.items()}
    assert len(renamed) == len(original) and sum(a["name"] != b["name"] for a, b in zip(original, renamed)) >= 10
    assert not {k["description"] for k in original} & {k["description"] for k in renamed}


# ---- truth: MP-100's sets ----


def test_mp100_is_complete(shared):
    """Category ids and, in the sets, the number of keypoints are the annotations' own."""
    categories = json.loads((shared / "mp100/categories.json").read_text(encoding="utf-8"))
    assert len(categories) == 100
    for c in categories:
        ours = TEXTS["categories"][str(c["id"])]
        assert ours == {"name": c["name"], "keypoint_set": c["keypoint_set"]}
        assert len(TEXTS["keypoint_sets"][ours["keypoint_set"]]) == c["num_keypoints"], c["name"]


def test_sides_are_the_data_s(geometry):
    for set_name, keypoints in MP100.items():
        for pair in geometry[set_name].pairs:
            left, right = keypoints[pair["left"]]["name"], keypoints[pair["right"]]["name"]
            assert "left" in left.split() and mirrored(left) == right, f"{set_name}: {left} / {right}"


def test_claims_are_true(geometry):
    """In each set all of the mean layout, and 94 % on the single annotations, in whatever pose. (The project asks for 97 % and 85 %.)"""
    print("\nset                      points  claims  true on annotations   false on means")
    failed = []
    for set_name, keypoints in MP100.items():
        g, claims, names = geometry[set_name], claims_of(keypoints), [k["name"] for k in keypoints]
        false = [f"{names[c.subject]} {c.kind} {' and '.join(names[n] for n in c.others)}" for c in claims if not g.on_means(c)]
        cases = np.concatenate([g.on_annotations(c) for c in claims])
        print(f"{set_name:24s} {len(names):6d} {len(claims):7d} {cases.mean():10.1%} of {cases.size:6d}  ", *false or ["none"])
        if false or cases.mean() < 0.94 and set_name != "hand":  # of hands there are five, turned every way
            failed.append(set_name)
    assert not failed


@pytest.mark.parametrize("falsify, kinds", [
    (lambda keypoints, i: swap(keypoints[i]["description"], "above", "below"), ("above", "below")),
    (lambda keypoints, i: swap(keypoints[i]["description"], "to the left of", "to the right of"), ("left", "right")),
    (lambda keypoints, i: keypoints[i - 3]["description"], ("between", "nearest")),
])
def test_false_texts_are_found_out(geometry, falsify, kinds):
    for kind in kinds:
        judged = [geometry[s].on_means(c) for s, keypoints in MP100.items()
                  for c in claims_of([k | {"description": falsify(keypoints, i)} for i, k in enumerate(keypoints)]) if c.kind == kind]
        assert len(judged) > 20 and np.mean(judged) < 0.4


# ---- the reader and the judge themselves ----

FACE = ["left eye", "right eye", "inner left eye corner", "left eyebrow", "nose", "chin"]
FACE_XY = np.array([[70, 40], [30, 40], [60, 41], [70, 20], [50, 55], [50, 90]], float)  # from the front: own left is the image's right


@pytest.mark.parametrize("text, expected", [
    ("Well below both the left eye and the right eye, on the bone.", [("below", 0), ("below", 1)]),
    ("Just above the nose, and the left eye is elsewhere.", [("above", 4)]),
    ("Above and to the left of the nose, and below the left eyebrow.", [("above", 4), ("left", 4), ("below", 3)]),
    ("To the right of the left eyebrow, nearest to the inner left eye corner.", [("right", 3), ("nearest", 2)]),
    ("Closest to the chin, between the left eye and nose.", [("nearest", 5), ("between", 0, 4)]),
    ("Beside the left eye, joined to the nose.", []),
])
def test_reader_finds_claims(text, expected):
    claims, _, loose = read_claims(text, FACE, subject=9)
    assert sorted(claims) == sorted(Claim(kind, 9, tuple(others)) for kind, *others in expected) and not loose


def test_reader_takes_exact_names_only():
    claims, mentioned, loose = read_claims("Below the left eyebrows, near the inner left eye corner, above the mouth.", FACE, 4)
    assert not claims and mentioned == {2} and len(loose) == 2  # no left eye, no left eyebrow, no mouth


@pytest.mark.parametrize("subject, true, false", [
    ("nose", "above the chin", "above the left eye"),
    ("nose", "below the left eye", "below the chin"),
    ("left eye", "to the left of the nose", "to the right of the nose"),
    ("nose", "between the left eye and the right eye", "between the left eye and the inner left eye corner"),
    ("left eye", "nearest to the inner left eye corner", "nearest to the left eyebrow"),
])
def test_judge_knows_true_from_false(subject, true, false):
    (yes,), (no,) = (read_claims(text, FACE, FACE.index(subject))[0] for text in (true, false))
    assert holds(yes, FACE_XY, np.array([1, 0])) and not holds(no, FACE_XY, np.array([1, 0]))


def test_judge_asks_for_the_nearest_of_the_visible():
    seen = np.arange(6) != FACE.index("inner left eye corner")
    assert holds(Claim("nearest", 0, (3,)), FACE_XY, None, seen) and not holds(Claim("nearest", 0, (3,)), FACE_XY, None)
