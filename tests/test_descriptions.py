"""descriptions.json: a name and a sentence or two for every keypoint of MP-100.

The model finds a keypoint by these texts alone, so a wrong one is a wrong label. Texts cannot be checked by a
machine, their claims can: the tests read them out of the texts and hold them against the benchmark's mean
layouts and its single annotations. The subject of a claim is always the keypoint described. The grammar:

    above N                       below N                        nearest to N, closest to N
    to the wearer's left of N     to the wearer's right of N     between A and B
                                                                 with A and B on either side

N, A and B are exact names of other keypoints, with or without "the". The wearer may be an animal or another
subject. "Above and to the wearer's left of N" makes two claims, and so does "above N and M". Any other
relation, such as "beside N" or "joined to N", makes none. Above and below are the viewer's. Left and right
are the subject's, which from the front are the other way round. So every left and right says whose it is.
"""

import gzip
import json
import re
from collections import Counter, namedtuple

import numpy as np
import pytest
from conftest import ROOT

TEXTS = json.loads((ROOT / "descriptions.json").read_text(encoding="utf-8"))
# the same points under other names
RENAMED = json.loads((ROOT / "assets/animal_body_renamed.json").read_text(encoding="utf-8"))
SETS = TEXTS["keypoint_sets"] | RENAMED["keypoint_sets"]  # {set: [{"name", "description"}, ...]}


def swap(text, a, b):
    return re.sub(rf"\b({a}|{b})\b", lambda m: b if m[0] == a else a, text.lower())


def mirrored(text):
    return swap(text, "left", "right")


def names_of(keypoints):
    return [keypoint["name"] for keypoint in keypoints]


# -------------------------------------------------------------------------------------------- reading claims

Claim = namedtuple("Claim", "kind subject others")
KINDS = {"above": "above", "below": "below", "nearest to": "nearest", "closest to": "nearest",
         "between": "between", "left of": "left", "right of": "right"}
RELATION = r"above|below|nearest to|closest to|between|to (?:the|that) \w+'s (?:left|right) of"
# "above and to the wearer's left of"
RELATIONS = rf"(?:{RELATION})(?:,? (?:and|but)(?: \w+)? (?:{RELATION}))*"
NAME = r"(?:both )?(?:the )?<\d+>"
LAST_NAME = rf"{NAME}(?! (?:is|are|lies|sits)\b)"  # "above the nose, and the chin is ..." claims one thing
NAMES = rf"{NAME}(?:(?:,? {NAME})*,? and {LAST_NAME})?"  # "the nose, the chin and the left eye"
CLAIMS = re.compile(rf"\b({RELATIONS}) ({NAMES})")
EITHER_SIDE = re.compile(rf"\bwith ({NAME} and {NAME}) on either side\b")
WHOSE = re.compile(r"'s (?:own )?(?:left|right)\b|\b(?:left|right)(?: \w+)? of (?:someone|a person)\b")


def numbers_in(text):
    return tuple(map(int, re.findall(r"<(\d+)>", text)))


def number_names(text, names):
    """-> the text in lower case, with numbers for names: "above the left eye" -> "above the <1>"."""
    longest_first = sorted(names, key=len, reverse=True)  # so that no name is found inside a longer one
    pattern = r"(?<![\w-])(" + "|".join(map(re.escape, longest_first)) + r")(?![\w-])"
    return re.sub(pattern, lambda m: f"<{names.index(m[1])}>", text.lower())


def sides_in(text, names):
    """How often a text says left or right outside of names, and how often it says whose that is."""
    text = number_names(text, names)
    return len(re.findall(r"\b(?:left|right)\b", text)), len(WHOSE.findall(text))


def read_claims(text, names, subject):
    """-> claims, indices of the keypoints mentioned, relations that are followed by no name of the set."""
    text = number_names(text, names)
    claims = [Claim("either side", subject, numbers_in(match[1])) for match in EITHER_SIDE.finditer(text)]
    understood = []
    for match in CLAIMS.finditer(text):
        numbers = numbers_in(match[2])
        for relation in re.findall(RELATION, match[1]):
            kind = KINDS[" ".join(relation.split()[-2:])]
            others = {"between": [numbers[:2]], "nearest": [numbers[:1]]}.get(kind, [(n,) for n in numbers])
            claims += [Claim(kind, subject, o) for o in others]
        understood.append(range(*match.span()))
    loose = [text[m.start():m.start() + 40] for m in re.finditer(rf"\b(?:{RELATION})\b", text)
             if not any(m.start() in span for span in understood)]
    return list(dict.fromkeys(claims)), set(numbers_in(text)), loose


def claims_of(keypoints):
    names = names_of(keypoints)
    return [claim for i, keypoint in enumerate(keypoints)
            for claim in read_claims(keypoint["description"], names, i)[0]]


# -------------------------------------------------------------------------------------------- judging claims


def holds(claim, points, own_left, seen=True, tie=1.05):
    """Is the claim true of points (..., K, 2)? own_left: the direction (x, y) of the subject's own left.

    between: seen from S, the directions to A and B are more than 90 degrees apart; so S is inside the circle
    whose diameter is AB. nearest: no other keypoint that is seen is nearer, by more than the factor `tie`.
    """
    s, n = points[..., claim.subject, :], points[..., claim.others[0], :]
    if claim.kind == "above":
        return s[..., 1] < n[..., 1]
    if claim.kind == "below":
        return s[..., 1] > n[..., 1]
    if claim.kind == "left":
        return (s - n) @ own_left > 0
    if claim.kind == "right":
        return (s - n) @ own_left < 0
    if claim.kind == "either side":
        m = points[..., claim.others[1], :]
        return ((s - n) @ own_left) * ((s - m) @ own_left) < 0
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
        means = np.array([keypoint["mean"] for keypoint in info["keypoints"]])  # fractions of the box
        self.layout = means * [np.median(w / h), 1]
        if info["keypoints"][0]["name"] == "wrist":
            # No hand of MP-100 is here. Of the substitutes only one is open and points up.
            is_open_and_up = self.seen.all(1) & (self.points[..., 1].argmax(1) == 0)  # the wrist is lowest
            self.layout = self.points[is_open_and_up][0]
        self.pairs = info["pairs"]
        self.own_left = self.find_own_left()

    def find_own_left(self):
        """Which way the subject's own left is in the photo, as (x, y): nowhere for a set without sides.

        Right, seen from the front. Up for insects, seen from above with the head to the right.
        """
        if not self.pairs:
            return np.array([np.nan, np.nan])
        higher = np.mean([pair["left_is_higher"] for pair in self.pairs])
        return np.array([0, -1] if higher > 0.9 else [1, 0])

    def on_means(self, claim):
        return bool(holds(claim, self.layout, self.own_left))

    def on_annotations(self, claim):
        """One truth value for every annotation that shows all points of the claim."""
        use = self.seen[:, [claim.subject, *claim.others]].all(1)
        return holds(claim, self.points[use], self.own_left, self.seen[use], tie=1.1)


@pytest.fixture(scope="module")
def geometry(shared):
    infos = json.loads((shared / "mp100/keypoint_sets.json").read_text(encoding="utf-8"))
    set_of = {category_id: name for name, info in infos.items() for category_id in info["categories"]}
    annotations = {name: [] for name in infos}
    for path in sorted((shared / "mp100/annotations").glob("*.json.gz")):
        for a in json.loads(gzip.decompress(path.read_bytes()))["annotations"]:
            annotations[set_of[a["category_id"]]].append(a)
    for path in sorted((shared / "mini_mp100/annotations").glob("*.json")):
        for a in json.loads(path.read_text())["annotations"]:
            if set_of.get(a["category_id"]) == "hand":
                annotations["hand"].append(a)
    found = {name: Geometry(info, annotations[name]) for name, info in infos.items()}
    return found | {"animal_body_renamed": found["animal_body"]}


# ------------------------------------------------------------------------------------------------------ form


def test_the_file_has_612_keypoints_in_29_sets_and_1573_claims():
    assert {c["keypoint_set"] for c in TEXTS["categories"].values()} == set(TEXTS["keypoint_sets"])
    assert len(TEXTS["keypoint_sets"]) == 29
    assert sum(map(len, TEXTS["keypoint_sets"].values())) == 612
    assert sum(len(claims_of(keypoints)) for keypoints in TEXTS["keypoint_sets"].values()) == 1573


def test_names_are_plain_words_and_cannot_be_mixed_up():
    for set_name, keypoints in SETS.items():
        names = names_of(keypoints)
        assert all(re.fullmatch(r"[a-z]+([ -][a-z]+)*", name) for name in names), set_name
        words = {tuple(sorted(re.split("[ -]", name))) for name in names}
        assert len(words) == len(names), f"{set_name}: two names are equal but for the order of their words"


def test_descriptions_are_short_and_mention_others_by_name():
    problems = []
    for set_name, keypoints in SETS.items():
        names, descriptions = names_of(keypoints), [k["description"] for k in keypoints]
        for i, description in enumerate(descriptions):
            claims, mentioned, loose = read_claims(description, names, i)
            wrong = {
                "not 15 to 45 words": not 15 <= len(description.split()) <= 45,
                "used twice in the set": descriptions.count(description) > 1,
                "fewer than two other keypoints mentioned": len(mentioned - {i}) < 2,
                "fewer than two claims": len(claims) < 2,
                "a claim about itself": any(i in claim.others for claim in claims),
                f"no name of the set after {loose}": loose}
            problems += [f"{set_name}, {names[i]}: {what}" for what, is_so in wrong.items() if is_so]
    assert not problems, "\n".join(problems)


def test_left_and_right_say_whose():
    """Outside of names each is somebody's, and a keypoint named left or right says whose side it is on."""
    problems = []
    for set_name, keypoints in SETS.items():
        names = names_of(keypoints)
        for keypoint in keypoints:
            said, owned = sides_in(keypoint["description"], names)
            has_side = mirrored(keypoint["name"]) != keypoint["name"]
            if said != owned or has_side and not owned:
                problems.append(f"{set_name}, {keypoint['name']}: {keypoint['description']}")
    assert not problems, "\n".join(problems)


def test_left_and_right_are_mirror_images():
    for set_name, keypoints in SETS.items():
        sided = {k["name"]: k["description"].lower() for k in keypoints if mirrored(k["name"]) != k["name"]}
        for name, description in sided.items():
            assert sided.get(mirrored(name)) == mirrored(description), f"{set_name}, {name}"


def test_skeletons_are_the_benchmarks(shared):
    """They count from 1 there, for vehicles from 0."""
    found = {}
    for path in sorted((shared / "mp100/annotations").glob("*.json.gz")):
        for category in json.loads(gzip.decompress(path.read_bytes()))["categories"]:
            first = 0 if category["name"] in ("car", "bus", "suv") else 1
            set_name = TEXTS["categories"][str(category["id"])]["keypoint_set"]
            skeleton = [[a - first, b - first] for a, b in category["skeleton"]]
            assert found.setdefault(set_name, skeleton) == skeleton
    assert TEXTS["skeletons"] == {name: skeleton for name, skeleton in found.items() if skeleton}


def test_renamed_animal_body_is_the_same_in_other_words():
    original = TEXTS["keypoint_sets"]["animal_body"]
    (set_name, renamed), = RENAMED["keypoint_sets"].items()
    bodies = {i: c for i, c in TEXTS["categories"].items() if c["keypoint_set"] == "animal_body"}
    assert RENAMED["categories"] == {i: c | {"keypoint_set": set_name} for i, c in bodies.items()}
    assert len(renamed) == len(original)
    assert sum(a["name"] != b["name"] for a, b in zip(original, renamed)) >= 10
    assert not {k["description"] for k in original} & {k["description"] for k in renamed}


# ----------------------------------------------------------------------------------------------------- truth


def test_mp100_is_complete(shared):
    """Category ids and, in the sets, the number of keypoints are the annotations' own."""
    categories = json.loads((shared / "mp100/categories.json").read_text(encoding="utf-8"))
    assert len(categories) == 100
    for category in categories:
        ours = TEXTS["categories"][str(category["id"])]
        assert ours == {"name": category["name"], "keypoint_set": category["keypoint_set"]}
        n_keypoints = len(TEXTS["keypoint_sets"][ours["keypoint_set"]])
        assert n_keypoints == category["num_keypoints"], category["name"]


def test_sides_are_the_data_s(geometry):
    for set_name, keypoints in SETS.items():
        names = names_of(keypoints)
        for pair in geometry[set_name].pairs:
            left, right = names[pair["left"]], names[pair["right"]]
            assert "left" in left.split() and mirrored(left) == right, f"{set_name}: {left} / {right}"


def test_claims_are_true(geometry):
    """In each set all claims hold for the mean layout, and 94 % on single annotations, in whatever pose."""
    print("\nset                      points  claims  true on annotations   false on means")
    failed = []
    for set_name, keypoints in SETS.items():
        truth, claims, names = geometry[set_name], claims_of(keypoints), names_of(keypoints)
        false = [f"{names[c.subject]} {c.kind} {' and '.join(names[n] for n in c.others)}"
                 for c in claims if not truth.on_means(c)]
        cases = np.concatenate([truth.on_annotations(c) for c in claims])
        print(f"{set_name:24s} {len(names):6d} {len(claims):7d} {cases.mean():10.1%} of {cases.size:6d}  ",
              *false or ["none"])
        is_rare = set_name == "hand"  # there are five, turned every way
        if false or cases.mean() < 0.94 and not is_rare:
            failed.append(set_name)
    assert not failed


def test_tables_begin_most_often_where_the_texts_say(geometry):
    """Far are the two highest corners of the top, near the two others."""
    places = Counter()
    for top in geometry["table"].points[:, :4]:
        by_height = top[:, 1].argsort()
        for distance, pair in ("far", by_height[:2]), ("near", by_height[2:]):
            for side, corner in zip(("left", "right"), pair[top[pair, 0].argsort()]):
                places[corner, f"most often the {distance} one on the viewer's {side}"] += 1
    for corner in range(4):
        place, count = max((p for p in places.items() if p[0][0] == corner), key=lambda p: p[1])
        assert count > 50  # of 100
        for keypoint in TEXTS["keypoint_sets"]["table"][corner::4]:  # the corner and its leg
            assert place[1] in keypoint["description"]


@pytest.mark.parametrize("falsify, kinds", [
    (lambda keypoints, i: swap(keypoints[i]["description"], "above", "below"), ("above", "below")),
    (lambda keypoints, i: swap(keypoints[i]["description"], "'s left of", "'s right of"), ("left", "right")),
    (lambda keypoints, i: keypoints[i - 3]["description"], ("between", "nearest")),
], ids=["up for down", "left for right", "another's text"])
def test_false_texts_are_found_out(geometry, falsify, kinds):
    for kind in kinds:
        judged = []
        for set_name, keypoints in SETS.items():
            falsified = [k | {"description": falsify(keypoints, i)} for i, k in enumerate(keypoints)]
            judged += [geometry[set_name].on_means(c) for c in claims_of(falsified) if c.kind == kind]
        assert len(judged) > 20
        assert np.mean(judged) < 0.4


# ------------------------------------------------------------------------------------------ the judge itself

FACE = ["left eye", "right eye", "inner left eye corner", "left eyebrow", "nose", "chin"]
# from the front: own left is the image's right
FACE_XY = np.array([[70, 40], [30, 40], [60, 41], [70, 20], [50, 55], [50, 90]], float)
OWN_LEFT = np.array([1, 0])


@pytest.mark.parametrize("subject, true, false", [
    ("nose", "above the chin", "above the left eye"),
    ("nose", "below the left eye", "below the chin"),
    ("left eye", "to the person's left of the nose", "to the person's right of the nose"),
    ("nose", "with the left eye and the right eye on either side",
     "with the left eye and the inner left eye corner on either side"),
    ("nose", "between the left eye and the right eye", "between the left eye and the inner left eye corner"),
    ("left eye", "nearest to the inner left eye corner", "nearest to the left eyebrow"),
])
def test_judge_knows_true_from_false(subject, true, false):
    for text, truth in (true, True), (false, False):
        (claim,), *_ = read_claims(text, FACE, FACE.index(subject))
        assert holds(claim, FACE_XY, OWN_LEFT) == truth, text
