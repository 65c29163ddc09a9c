"""How much the texts are worth, and how exact the box must be: a checkpoint asked again with others.

    python -m tools.texts runs/split1/ckpt.pt                                        every kind of text below
    python -m tools.texts runs/split1/ckpt.pt --texts-as typo names --box-scale 0.8 1.2 --decode median

Texts are changed where the question is asked; nothing is trained. Other options are those of evaluate.py.
"""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

import evaluate
from common import Parser, is_first, natural, printable, run, write_json
from data import annotation_file, read_instances
from decode import read_trained
from tools.check import keep_readable
from tools.score import choose_texts, make_report

# Each kind makes the name and description to ask keypoint k with, of all (name, description) of the category.


def drop_sides(keypoints, k, rng):
    """Without the words left and right."""
    return tuple(" ".join(re.sub(r"\b(left|right)\b", "", text, flags=re.I).split()) for text in keypoints[k])


def misspell(keypoints, k, rng):
    """One in three of the description's words of four letters or more has two neighbours exchanged."""
    words = keypoints[k][1].split()
    for n, word in enumerate(words):
        if len(word) >= 4 and rng.random() < 1 / 3:
            i = rng.integers(1, len(word) - 2)  # the first letter and the last stay
            words[n] = word[:i] + word[i + 1] + word[i] + word[i + 2:]
    return keypoints[k][0], " ".join(words)


def use_name(keypoints, k, rng):
    """The name instead of the description."""
    return keypoints[k][0], keypoints[k][0]


def shuffle_words(keypoints, k, rng):
    """The description's words in another order."""
    return keypoints[k][0], " ".join(rng.permutation(keypoints[k][1].split()))


def swap(keypoints, k, rng):
    """The description of another keypoint of the category."""
    others = [text for j, (_, text) in enumerate(keypoints) if j != k]
    return keypoints[k][0], others[rng.integers(len(others))] if others else keypoints[k][1]


KINDS = {"sideless": drop_sides, "typo": misspell, "shuffled": shuffle_words, "names": use_name,
         "swapped": swap}


def change_texts(categories, kind, seed):
    """{id: Category} -> the same with other texts. All that is random is drawn from (seed, id, keypoint)."""
    return {c: replace(category, keypoints=[
                KINDS[kind](category.keypoints, k, np.random.default_rng((seed, c, k)))
                for k in range(len(category.keypoints))])
            for c, category in categories.items()}


def scale_box(instance, factor):
    """The box's sides times a factor, its centre kept. What is scored keeps the annotated box."""
    x, y, w, h = instance.box
    margin = (1 - factor) / 2
    return replace(instance, box=(x + margin * w, y + margin * h, factor * w, factor * h))


def main(argv):
    parser = Parser(description=__doc__.splitlines()[0],
                    epilog="Before these: the checkpoint; beside them: the options of evaluate.py.")
    add = parser.add_argument
    add("--texts-as", nargs="+", choices=KINDS, metavar="KIND", help=f"of {', '.join(KINDS)}; by default all")
    add("--box-scale", nargs="+", type=float, default=[], metavar="X", help="sides of the box times this")
    add("--seed", type=natural, default=0, metavar="N", help="of the changes")
    own, others = parser.parse_known_args(argv)
    if not all(0 < factor < 100 for factor in own.box_scale):
        parser.error("--box-scale: a factor must be above 0 and below 100")
    args = evaluate.parse_arguments(others)
    if args.score or args.out:
        parser.error("--score and --out are for evaluate.py; here --report takes all reports")
    checkpoint = read_trained(args.checkpoint)
    trained, categories = checkpoint["args"], choose_texts(args, checkpoint)
    data, split = args.data or trained["data"], args.split or trained["split"]
    annotations, images = annotation_file(data, split, args.subset), Path(data, "images")
    instances = keep_readable(read_instances(annotations, categories), images, categories, args.allow_missing)
    kinds = own.texts_as or ([] if own.box_scale else [*KINDS])
    rows = {"as they are": (categories, instances)}
    rows |= {kind: (change_texts(categories, kind, own.seed), instances) for kind in kinds}
    rows |= {f"box x {factor:g}": (categories, [scale_box(o, factor) for o in instances])
             for factor in own.box_scale}
    reports, asker = {}, evaluate.load_asker(args, checkpoint)
    for name, (texts, asked) in rows.items():
        points, _ = asker(asked, texts, images)
        reports[name] = make_report(instances, points, categories, annotations, args.protocol)
    if is_first():
        print_table(reports, {name: texts[instances[0].category_id] for name, (texts, _) in rows.items()})
        if args.report:
            write_json(args.report, reports)


def print_table(reports, examples):
    """In percent: a line for each report, with its Category's first question as an example."""
    print(f"\n{'':14}{'PCK@0.2':>8}{'95 % interval':>16}{'mPCK':>8}   e.g.")
    for name, report in reports.items():
        low, high = (100 * bound for bound in report["interval"]["PCK@0.2"])
        example = printable(": ".join(examples[name].keypoints[0]))
        print(f"{name:14}{100 * report['PCK@0.2']:8.1f}{f'{low:.1f}-{high:.1f}':>16}"
              f"{100 * report['mPCK']:8.1f}   {example:.60}")


if __name__ == "__main__":
    run(main)
