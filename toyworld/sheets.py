"""The world that the backbones grow up with: loose parts on sheets of paper, and short questions about them.

It shares kinds of parts and colours with the creatures and little else, and no pair of UNSEEN is in it.
"""

import numpy as np

from chat import write_point
from toyworld.creatures import CIRCLE, COLOURS, LIMBS, PAIRS, TURN, UNSEEN, Pen, tint

SIZE = 112  # pixels
ROUNDS = 5  # questions about a sheet
PAPERS = [(250, 246, 236), (238, 240, 244), (226, 214, 190), (244, 232, 214), (206, 216, 220),
          (228, 236, 222), (240, 226, 232), (196, 186, 170)]
SCRAPS = [(222, 200, 168), (190, 204, 212), (196, 210, 184), (206, 190, 212), (232, 206, 188),
          (214, 214, 206), (150, 160, 172), (172, 146, 128)]
WORDS = {"foot": ("foot", "far end"), "knee": ("knee", "bend"), "tip": ("tip", "sharp end"),
         "ball": ("ball", "knob"), "edge": ("edge", "outer end"), "end": ("end", "arrow"),
         "centre": ("centre", "middle")}
# What the tokens of " [0.123,0.456]" and of the end count in the loss: the first digits most.
ANSWER_WEIGHTS = [0.1, 1, 0.3, 0.1, 0.1, 1, 0.3, 0.1, 0.1, 0.1]


# -------------------------------------------------------------------------------------------------- sheets


def draw_sheet(seed):
    """-> picture, uint8 (SIZE, SIZE, 3), and points [(kind, colour, keypoint, where)], in fractions of it.

    The middle of a limb is a point without a name: it is to be seen and is never asked for.
    """
    rng = np.random.default_rng(seed)
    paper = PAPERS[rng.integers(len(PAPERS))]
    pen = Pen(SIZE, paper)
    if rng.random() < 0.5:  # ruled, or squared
        for y in np.arange(0, SIZE, rng.uniform(7, 14)):
            pen.line([1j * y, SIZE + 1j * y], 0.5, tint(paper, -14))
            if paper[0] < 240:
                pen.line([y, y + 1j * SIZE], 0.5, tint(paper, -14))
    placed, points = place_parts(rng), []
    for at, r, *_ in placed:
        if rng.random() < 0.35:
            scrap = r * rng.uniform(1, 1.7) * CIRCLE * (1 + 0.1 * np.cos(3 * TURN + rng.uniform(0, 6)))
            pen.area(at + scrap, SCRAPS[rng.integers(len(SCRAPS))])
    for at, r, kind, colour in placed:
        limb = kind in LIMBS
        angle = rng.uniform(0, 6.28) if limb or rng.random() < 0.5 else rng.normal(0, 0.3)
        along = r * np.exp(1j * angle)
        rgb = tint(COLOURS[colour], rng.normal(0, 8, 3))
        rim = tint(rgb, -60) if rng.random() < 0.5 else None
        bend = rng.choice([-1, 1]) * rng.uniform(0.15, 0.5)
        found = pen.part(kind, rgb, at - along * limb, along * (1 + limb), bend, rim, 0.9)
        if limb:
            found[""] = at
        points += [(kind, colour, keypoint, z / SIZE) for keypoint, z in found.items()]
    return np.asarray(pen.picture()), points


def place_parts(rng):
    """-> (place, radius, kind, colour) of 5 to 10 parts, fewer where the sheet is full."""
    colours = rng.permutation(list(COLOURS))[:rng.integers(3, 6)]  # few: a colour alone finds no part
    parts = [pair for pair in PAIRS if pair[1] in colours and pair not in UNSEEN]
    rng.shuffle(parts)
    placed = []
    for kind, colour in parts[:rng.integers(5, 11)]:
        r = rng.uniform(12, 21) if kind in LIMBS else rng.uniform(7.5, 11)
        for _ in range(12):  # tries to find a free place
            at = complex(*rng.uniform(0.8 * r, SIZE - 0.8 * r, 2))
            if all(abs(at - other) > 0.85 * (r + s) for other, s, *_ in placed):
                placed.append((at, r, kind, colour))
                break
    return placed


def turn_sheet(sheet, mirrored, quarters):
    """One of the eight ways to lay a square sheet, and its points."""
    (picture, points), centre = sheet, 0.5 + 0.5j
    picture = np.rot90(picture[::-1] if mirrored else picture, -quarters)

    def turn(z):
        return centre + 1j**quarters * ((z - centre).conjugate() if mirrored else z - centre)

    return picture, [(*what, turn(z)) for *what, z in points]


# ---------------------------------------------------------------------------------------------------- talk


def phrase(rng, kind, colour, keypoint):
    """One of the ways to speak of a point of a sheet."""
    part = f"{colour} {kind}" if rng.random() < 0.6 else f"{kind} in {colour}"
    if keypoint == "centre" and rng.random() < 0.7:
        return part
    word = WORDS[keypoint][rng.integers(2)]
    return f"{word} of a {part}" if rng.random() < 0.6 else f"{part}, its {word}"


def converse(rng, points, encode):
    """Questions about a sheet and their answers -> tokens, and what each counts in the loss."""
    tokens, weights = [1, *encode("\n")], [0, 0]  # 1 is BOS
    asked = [point for point in points if point[2]]
    for i in np.resize(rng.permutation(len(asked)), ROUNDS):
        kind, colour, keypoint, z = asked[i]
        place = write_point((z.real, z.imag))
        if rng.random() < 0.75:
            question = encode(f"User: point at the {phrase(rng, kind, colour, keypoint)}\nAssistant:")
            answer = encode(place)
            weights += [0] * len(question) + ANSWER_WEIGHTS
        else:
            question = encode(f"User: what is at{place}?\nAssistant:")
            answer = encode(f" {colour} {kind}" + f" {keypoint}" * (keypoint != "centre"))
            weights += [0] * len(question) + [1] * len(answer) + [0.1]
        tokens += question + answer + [2]  # 2 is EOS
    return tokens, weights
