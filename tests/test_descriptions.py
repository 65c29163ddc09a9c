"""descriptions.json: a name and a sentence or two for every keypoint of MP-100's 100 categories.

The model finds a keypoint by these texts alone, so a wrong one is a wrong label. Texts cannot be checked by a machine, their claims
can: "above N", "below N", "between A and B", "nearest to N", "to the left of N", "to the right of N", where N is another keypoint's
name and the subject is always the keypoint described. The tests read these claims out of the texts and hold them against the benchmark's
mean layouts and its single annotations; and they check the form: complete, unique, mirrored, of sensible length.
"""

import gzip
import json
import re
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
RENAMED = "animal_body_renamed"  # the same 17 points under other names, to see whether a model reads the names or has learnt them by heart
MEANS_AT_LEAST, CASES_AT_LEAST = 1.0, 0.95  # the share of a set's claims that are true of its mean layout, and of its single annotations


# ---- the texts ----

def load(path):
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def texts():
    return load("descriptions.json")


@pytest.fixture(scope="module")
def all_sets(texts):
    """{set: [{"name", "description"}, ...]}, the renamed one too."""
    return texts["keypoint_sets"] | load(f"assets/{RENAMED}.json")["keypoint_sets"]


def question(keypoint):
    return f"User: where is the {keypoint['name']}?\nReference: {keypoint['description']}\nAssistant:"


def swap(text, a, b):
    return re.sub(rf"\b({a}|{b})\b", lambda m: b if m[0] == a else a, text)


def mirrored(text):
    return swap(text.lower(), "left", "right")


# ---- reading claims ----

Claim = namedtuple("Claim", "kind subject others")
KINDS = {"above": "above", "below": "below", "nearest to": "nearest", "closest to": "nearest",
         "to the left of": "left", "to the right of": "right"}
RELATION = "|".join(KINDS)
NAME = r"(?:both )?(?:the )?<\d+>"
NAMES = rf"{NAME}(?:(?:,? {NAME})*,? and {NAME}(?! (?:is|are|lies|sits)\b))?"  # "the nose", "the nose and the chin", "the nose, the chin and ..."
SIMPLE = re.compile(rf"\b((?:{RELATION})(?:,? (?:and|but)(?: \w+)? (?:{RELATION}))*) ({NAMES})")  # "above and to the left of the nose"
BETWEEN = re.compile(rf"\bbetween ({NAME} and {NAME})")
MENTION = re.compile(r"<(\d+)>")


def number_names(text, names):
    """'above the left eye' -> 'above the <1>': longest names first, so that no name is found inside a longer one."""
    longest_first = sorted(names, key=len, reverse=True)
    pattern = r"(?<![\w-])(" + "|".join(map(re.escape, longest_first)) + r")(?![\w-])"
    return re.sub(pattern, lambda m: f"<{names.index(m[1])}>", text.lower())


def read_claims(text, names, subject):
    """(claims, indices of the keypoints mentioned, relations that are followed by no name of the set)"""
    text = number_names(text, names)
    claims, understood = [], []
    for m in SIMPLE.finditer(text):
        others = [int(i) for i in MENTION.findall(m[2])]
        for relation in re.findall(RELATION, m[1]):
            kind = KINDS[relation]
            claims += [Claim(kind, subject, (n,)) for n in (others[:1] if kind == "nearest" else others)]
        understood.append(range(*m.span()))
    for m in BETWEEN.finditer(text):
        claims.append(Claim("between", subject, tuple(int(i) for i in MENTION.findall(m[1]))))
        understood.append(range(*m.span()))
    loose = [text[m.start():m.start() + 40] for m in re.finditer(rf"\b(?:{RELATION}|between)\b", text)
             if not any(m.start() in span for span in understood)]
    return list(dict.fromkeys(claims)), {int(i) for i in MENTION.findall(text)}, loose


def claims_of(keypoints):
    names = [k["name"] for k in keypoints]
    return [c for i, k in enumerate(keypoints) for c in read_claims(k["description"], names, i)[0]]


# ---- judging claims ----

def holds(claim, points, own_left, seen=None, tie=1.05):
    """Is the claim true of points (..., K, 2)? x right, y down; own_left: the direction of the subject's own left, None if it has no sides.

    between: seen from S, A and B lie in opposite directions (over 90 degrees apart), that is, S is inside the circle over AB.
    nearest: no other (visible) keypoint is nearer; one nearer by up to `tie` counts as equally near.
    """
    s, n = points[..., claim.subject, :], points[..., claim.others[0], :]
    if claim.kind == "above":
        return s[..., 1] < n[..., 1]
    if claim.kind == "below":
        return s[..., 1] > n[..., 1]
    if claim.kind in ("left", "right"):
        to_left = (s - n) @ np.array([np.nan, np.nan] if own_left is None else own_left)
        return to_left > 0 if claim.kind == "left" else to_left < 0
    if claim.kind == "between":
        return ((n - s) * (points[..., claim.others[1], :] - s)).sum(-1) < 0
    distance = np.linalg.norm(points - s[..., None, :], axis=-1)
    to_n = distance[..., claim.others[0]].copy()
    distance[..., claim.subject] = np.inf
    return to_n <= tie * (distance if seen is None else np.where(seen, distance, np.inf)).min(-1)


# Sets that face either way. A mean over both ways has neither front nor rear, so all are mirrored to face one way first.
FRONT_AND_REAR = {"animal_body": ([2], [4]), "bird": ([1], [13]), "vehicle": ([0, 1, 4, 5, 9, 10], [2, 3, 6, 7, 11, 12])}


class Geometry:
    """One set's mean layout and single annotations, and of each annotation whether it is upright and whether it is seen from the front."""

    def __init__(self, set_name, info, annotations):
        keypoints = np.array([a["keypoints"] for a in annotations], float).reshape(len(annotations), -1, 3)
        box = np.array([a["bbox"] for a in annotations], float)
        self.points, self.seen = keypoints[..., :2], keypoints[..., 2] > 0
        sized = (box[:, 2:] > 0).all(1)  # two annotations have a box of negative size
        scale = np.array([np.exp(np.log(box[sized, 2] / box[sized, 3]).mean()), 1])  # the boxes' mean shape
        self.measured = np.array([k["mean"] for k in info["keypoints"]]) * scale
        self.layout = self.measured
        if set_name in FRONT_AND_REAR:
            self.layout = self.one_way_layout(box, sized, *FRONT_AND_REAR[set_name]) * scale
        if set_name == "hand":  # no annotation of MP-100 is at hand, and of the substitutes only one is open and points up
            self.layout = next(p for p, v in zip(self.points, self.seen) if v.all() and p[:, 1].argmax() == 0)

        # Own left is the image's right from the front; up, if seen from above with the head to the image's right (the insects).
        self.own_left = None
        if info["pairs"]:
            self.own_left = np.array([0, -1] if np.mean([p["left_is_higher"] for p in info["pairs"]]) > 0.9 else [1, 0])
        self.upright, self.frontal = self.is_upright(), self.is_frontal(info["pairs"])

    def one_way_layout(self, box, sized, front, rear):
        x = np.ma.array(self.points[..., 0], mask=~self.seen)
        ahead = x[:, front].mean(1) - x[:, rear].mean(1)
        use = sized & ~np.ma.getmaskarray(ahead)
        p = (self.points[use] - box[use, None, :2]) / box[use, None, 2:]
        p[ahead.data[use] > 0, :, 0] = 1 - p[ahead.data[use] > 0, :, 0]
        return np.ma.array(p, mask=np.repeat(~self.seen[use][..., None], 2, 2)).mean(0).data

    def is_upright(self):
        """Turned by less than 45 degrees in the best fit (turned, shifted, scaled) of the mean layout or its mirror image to the visible points."""
        def centred(z):
            return np.where(self.seen, z - (z * self.seen).sum(1, keepdims=True) / np.maximum(self.seen.sum(1, keepdims=True), 1), 0)
        z = centred(self.points @ [1, 1j])
        layout = centred(np.broadcast_to(self.layout @ [1, 1j], z.shape))
        as_is, flipped = (layout.conj() * z).sum(1), -(layout * z).sum(1)
        turn = np.angle(np.where(abs(as_is) >= abs(flipped), as_is, flipped))
        return (abs(turn) < np.pi / 4) & (self.seen.sum(1) >= 3)

    def is_frontal(self, pairs):
        """At least two thirds of the visible left/right pairs lie in the usual order: an animal in profile or a back says nothing of sides."""
        usual, visible = np.zeros(len(self.points)), np.zeros(len(self.points))
        for left, right in ((p["left"], p["right"]) for p in pairs):
            both = self.seen[:, left] & self.seen[:, right]
            usual += both & ((self.points[:, left] - self.points[:, right]) @ self.own_left > 0)
            visible += both
        return (visible > 0) & (usual >= 2 / 3 * visible)

    def on_means(self, claim):
        return bool(holds(claim, self.measured if claim.kind in ("left", "right") else self.layout, self.own_left))

    def on_annotations(self, claim, all_poses=False):
        """One truth value for every upright annotation that shows all points of the claim (and, for sides, is frontal)."""
        use = self.seen[:, [claim.subject, *claim.others]].all(1)
        if not all_poses:
            use &= self.upright & (self.frontal | (claim.kind not in ("left", "right")))
        return holds(claim, self.points[use], self.own_left, self.seen[use], tie=1.1)


@pytest.fixture(scope="module")
def keypoint_sets(shared):
    return json.loads((shared / "mp100/keypoint_sets.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def geometry(shared, keypoint_sets):
    annotations = {name: [] for name in keypoint_sets}
    set_of = {c: name for name, info in keypoint_sets.items() for c in info["categories"]}
    for path in sorted((shared / "mp100/annotations").glob("*.json.gz")):
        for a in json.loads(gzip.decompress(path.read_bytes()))["annotations"]:
            annotations[set_of[a["category_id"]]].append(a)
    for path in sorted((shared / "mini_mp100/annotations").glob("*.json")):
        annotations["hand"] += [a for a in json.loads(path.read_text())["annotations"] if set_of.get(a["category_id"]) == "hand"]
    found = {name: Geometry(name, info, annotations[name]) for name, info in keypoint_sets.items()}
    return found | {RENAMED: found["animal_body"]}


def share_on_means(sets, geometry, kinds):
    return np.mean([geometry[s].on_means(c) for s, keypoints in sets.items() for c in claims_of(keypoints) if c.kind in kinds])


# ---- tests: form ----

def test_every_category_and_keypoint_is_there(texts, shared):
    """Category ids and, in the sets, the order of the keypoints are the annotations' own."""
    categories = json.loads((shared / "mp100/categories.json").read_text(encoding="utf-8"))
    assert len(categories) == 100 and set(texts["categories"]) == {str(c["id"]) for c in categories}
    for c in categories:
        ours = texts["categories"][str(c["id"])]
        assert ours == {"name": c["name"], "keypoint_set": c["keypoint_set"]}
        assert len(texts["keypoint_sets"][ours["keypoint_set"]]) == c["num_keypoints"], c["name"]


def test_every_set_is_used_and_no_other(texts):
    assert list(texts["categories"]) == [str(i) for i in range(1, 101)]
    assert {c["keypoint_set"] for c in texts["categories"].values()} == set(texts["keypoint_sets"])


def test_names(all_sets):
    for set_name, keypoints in all_sets.items():
        names = [k["name"] for k in keypoints]
        assert all(re.fullmatch(r"[a-z]+([ -][a-z]+)*", n) for n in names), set_name
        words = {tuple(sorted(re.split("[ -]", n))) for n in names}
        assert len(words) == len(names), f"{set_name}: two names are equal, or differ only by the order of their words"


def test_descriptions(all_sets):
    problems, words, seen = [], [], set()
    for set_name, keypoints in all_sets.items():
        names = [k["name"] for k in keypoints]
        for i, k in enumerate(keypoints):
            claims, mentioned, loose = read_claims(k["description"], names, i)
            words.append(len(k["description"].split()))
            wrong = [f"{words[-1]} words"] if not 15 <= words[-1] <= 45 else []
            wrong += ["fewer than two other keypoints mentioned"] if len(mentioned - {i}) < 2 else []
            wrong += ["fewer than two claims"] if len(claims) < 2 else []
            wrong += ["a claim about itself"] if any(i in c.others for c in claims) else []
            wrong += [f"no name of the set after {x!r}" for x in loose]
            wrong += ["used twice in the set"] if (set_name, k["description"]) in seen else []
            wrong += ["keys"] if set(k) != {"name", "description"} else []
            seen.add((set_name, k["description"]))
            problems += [f"{set_name}, {k['name']}: {w}" for w in wrong]
    print(f"{len(words)} descriptions of {min(words)} to {max(words)} words, {np.mean(words):.1f} on average")
    assert not problems, "\n".join(problems)


def test_left_and_right_are_mirror_images(all_sets):
    for set_name, keypoints in all_sets.items():
        sided = {k["name"]: k["description"].lower() for k in keypoints if mirrored(k["name"]) != k["name"]}
        for name, description in sided.items():
            assert sided.get(mirrored(name)) == mirrored(description), f"{set_name}, {name}"


def test_sides_are_the_data_s(all_sets, keypoint_sets):
    for set_name, keypoints in all_sets.items():
        for pair in keypoint_sets[set_name.removesuffix("_renamed")]["pairs"]:
            left, right = keypoints[pair["left"]]["name"], keypoints[pair["right"]]["name"]
            assert "left" in left.split() and mirrored(left) == right, f"{set_name}: {left} / {right}"


def test_questions_are_short(all_sets, shared):
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(shared / "llama3_tokenizer/tokenizer.json"))
    lengths = {s: [len(tokenizer.encode(question(k)).ids) for k in keypoints] for s, keypoints in all_sets.items()}
    for set_name, n in sorted(lengths.items(), key=lambda item: -max(item[1])):
        print(f"{set_name:24s} question tokens: mean {np.mean(n):5.1f}, max {max(n)}")
    assert max(map(max, lengths.values())) < 110


# ---- tests: truth ----

def test_claims_are_true(all_sets, geometry):
    Row = namedtuple("Row", "share true cases good set points claims means upright all_poses")
    rows, false = [], []
    for set_name, keypoints in all_sets.items():
        g, claims, names = geometry[set_name], claims_of(keypoints), [k["name"] for k in keypoints]
        means = np.array([g.on_means(c) for c in claims])
        cases = np.concatenate([g.on_annotations(c) for c in claims])
        all_poses = np.concatenate([g.on_annotations(c, all_poses=True) for c in claims]).mean()
        false += [f"  {set_name}: {names[c.subject]} {c.kind} {' and '.join(names[i] for i in c.others)}" for c, ok in zip(claims, means) if not ok]
        rows.append(Row(cases.mean(), means.sum(), cases.size, cases.sum(), set_name, len(names), len(claims), means.mean(), g.upright.mean(), all_poses))

    print("\nset, worst first         points claims  each   means annotations    cases  upright  any pose")
    for r in sorted(rows):
        print(f"{r.set:24s} {r.points:6d} {r.claims:6d} {r.claims / r.points:5.2f} {r.means:7.1%}"
              f" {r.share:11.1%} {r.cases:8d} {r.upright:8.0%} {r.all_poses:9.1%}")
    points, claims, true, cases, good = (sum(getattr(r, f) for r in rows if r.set != RENAMED) for f in ("points", "claims", "true", "cases", "good"))
    print(f"{'all but the renamed':24s} {points:6d} {claims:6d} {claims / points:5.2f} {true / claims:7.1%} {good / cases:11.1%} {cases:8d}")
    print(f"false of the means: {len(false)}", *false, sep="\n")
    failed = [r.set for r in rows if r.means < MEANS_AT_LEAST or (r.share < CASES_AT_LEAST and r.set != "hand")]  # of hands there are too few
    assert not failed
    assert np.mean([r.upright for r in rows if r.set != "hand"]) > 0.9  # leaving out other poses does not decide the outcome


@pytest.mark.parametrize("kinds, a, b", [(("above", "below"), "above", "below"), (("left", "right"), "to the left of", "to the right of")])
def test_swapped_texts_are_found_out(all_sets, geometry, kinds, a, b):
    swapped = {s: [k | {"description": swap(k["description"].lower(), a, b)} for k in keypoints] for s, keypoints in all_sets.items()}
    assert share_on_means(all_sets, geometry, kinds) > 0.95
    assert share_on_means(swapped, geometry, kinds) < 0.05


@pytest.mark.parametrize("kind", ["between", "nearest"])
def test_texts_of_other_keypoints_are_found_out(all_sets, geometry, kind):
    shifted = {s: [k | {"description": keypoints[i - 3]["description"]} for i, k in enumerate(keypoints)] for s, keypoints in all_sets.items()}
    assert share_on_means(all_sets, geometry, [kind]) > 0.95
    assert share_on_means(shifted, geometry, [kind]) < 0.4


def test_renamed_animal_body(texts):
    renamed, original = load(f"assets/{RENAMED}.json"), texts["keypoint_sets"]["animal_body"]
    assert list(renamed["keypoint_sets"]) == [RENAMED] and len(renamed["keypoint_sets"][RENAMED]) == len(original)
    assert renamed["categories"] == {i: c | {"keypoint_set": RENAMED} for i, c in texts["categories"].items() if c["keypoint_set"] == "animal_body"}
    assert sum(a["name"] != b["name"] for a, b in zip(original, renamed["keypoint_sets"][RENAMED])) >= 10
    assert not {k["description"] for k in original} & {k["description"] for k in renamed["keypoint_sets"][RENAMED]}


# ---- tests of the reader and the judge themselves ----

FACE = ["left eye", "right eye", "inner left eye corner", "left eyebrow", "nose", "chin"]
#                 left eye  right eye  corner   eyebrow   nose      chin; seen from the front, so that own left is the image's right
FACE_XY = np.array([[70, 40], [30, 40], [60, 41], [70, 20], [50, 55], [50, 90]], float)


@pytest.mark.parametrize("text, expected", [
    ("Just above the nose.", [("above", 4)]),
    ("Well below both the left eye and the right eye, on the bone.", [("below", 0), ("below", 1)]),
    ("Above the nose and below the left eyebrow.", [("above", 4), ("below", 3)]),
    ("Above the nose, and the left eye is elsewhere.", [("above", 4)]),
    ("Above and to the left of the nose.", [("above", 4), ("left", 4)]),
    ("To the right of the left eyebrow, nearest to the inner left eye corner.", [("right", 3), ("nearest", 2)]),
    ("Closest to the chin, between the left eye and nose.", [("nearest", 5), ("between", 0, 4)]),
    ("Beside the left eye, joined to the nose.", []),
])
def test_reader(text, expected):
    claims, _, loose = read_claims(text, FACE, subject=9)
    assert sorted(claims) == sorted(Claim(kind, 9, tuple(others)) for kind, *others in expected) and not loose


def test_reader_names_and_loose_relations():
    claims, mentioned, loose = read_claims("Below the left eyebrows, near the inner left eye corner, above the mouth.", FACE, 4)
    assert not claims and mentioned == {2} and len(loose) == 2  # no left eye in the corner, no left eyebrow in the plural, no mouth at all


@pytest.mark.parametrize("subject, true, false", [
    ("nose", "above the chin", "above the left eye"),
    ("nose", "below the left eye", "below the chin"),
    ("left eye", "to the left of the nose", "to the left of the inner left eye corner and the chin, to the right of the nose"),
    ("nose", "between the left eye and the right eye", "between the left eye and the inner left eye corner"),
    ("left eye", "nearest to the inner left eye corner", "nearest to the left eyebrow"),
])
def test_judge(subject, true, false):
    def judge(text):
        return [bool(holds(c, FACE_XY, np.array([1, 0]))) for c in read_claims(text, FACE, FACE.index(subject))[0]]
    assert judge(true) and all(judge(true))
    assert judge(false) and not all(judge(false))


def test_no_sides_no_left():
    assert not any(holds(Claim(side, 0, (1,)), FACE_XY, None) for side in ("left", "right"))


def test_nearest_is_among_the_visible():
    seen = np.array([[True, True, False, True, True, True]])  # with the corner hidden, the eyebrow is the nearest to the left eye
    assert holds(Claim("nearest", 0, (3,)), FACE_XY[None], None, seen).all() and not holds(Claim("nearest", 0, (3,)), FACE_XY[None], None).any()
