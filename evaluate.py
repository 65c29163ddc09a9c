"""PCK, the metric of MP-100, and asking a checkpoint about a split (paper, section 4.1; Tables 2 to 9).

    python evaluate.py runs/split1/ckpt.pt                  the checkpoint says where data and weights are
    python evaluate.py --score predictions.json --split 1   only the metric, without network and photographs

PCK@t is the share of an object's visible keypoints that are predicted closer than t times the longer side of
its box, averaged over objects; mPCK is its mean over five thresholds. Letters: N objects, K keypoints.
"""

import random
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import Parser, is_first, loader_options, natural, positive, run, say, start_processes
from data import annotation_file, crop_of, normalize, read_instances
from decode import DECODINGS, check_decoding, load_trained, locate, read_trained
from model import DTYPES

# ---------------------------------------------------------------------------------------------------- metric

THRESHOLDS = 0.05, 0.1, 0.15, 0.2, 0.25


def find_hits(instance, points):
    """Which keypoints the predicted points (pixels, None for no answer) hit -> bool (5 thresholds, K)."""
    points = np.array([point or (np.inf, np.inf) for point in points])
    distance = np.linalg.norm(points - instance.keypoints, axis=1)
    return distance < np.array(THRESHOLDS)[:, None] * max(instance.box[2:])


def share(hits, counted):
    """hits (5, K), counted bool (K,) -> what share of the counted keypoints is hit (5,), 0 if none counts."""
    return hits[:, counted].sum(1) / max(1, counted.sum())


def pck_of_queries(instances, predicted):
    """The PCK of each object, over its visible keypoints -> (N, 5)."""
    return np.array([share(find_hits(o, points), o.visible) for o, points in zip(instances, predicted)])


def pck_of_pairs(instances, predicted, category_ids):
    """The 60,000 pairs of papers with a support photo: 20 categories x 200 draws of a support and 15 queries.

    category_ids: the draws depend on their order. Only keypoints visible in both count; a pair that shares
    none scores 0. -> (pairs, 5), and the pairs, (support, query) indices of instances.
    """
    hits = [find_hits(o, points) for o, points in zip(instances, predicted)]
    sampler, pairs = random.Random(1), []  # those papers' seed
    for category_id in category_ids:
        members = [i for i, o in enumerate(instances) if o.category_id == category_id]
        for _ in range(200 if members else 0):
            support, *queries = sampler.sample(members, min(16, len(members)))
            pairs += [(support, query) for query in queries]
    return np.array([share(hits[q], instances[s].visible & instances[q].visible) for s, q in pairs]), pairs


# ---------------------------------------------------------------------------------------- asking a checkpoint


class Photos(torch.utils.data.Dataset):
    """Instances -> an index and a crop, uint8 (3, size, size). folder: of the photos."""

    def __init__(self, instances, folder, size):
        self.instances, self.folder, self.size = instances, folder, size

    def __len__(self):
        return len(self.instances)

    def __getitem__(self, i):
        return i, crop_of(self.instances[i]).cut(Path(self.folder, self.instances[i].photo), self.size)


def make_batches(instances, most):
    """-> lists of indices of instances with at most `most` keypoints together; one with more is alone."""
    counts, batches, free = [len(instance.keypoints) for instance in instances], [], 0
    for i in sorted(range(len(counts)), key=lambda i: -counts[i]):  # first what may be too large for a GPU
        if counts[i] > free:
            batches.append([])
            free = most
        batches[-1].append(i)
        free -= counts[i]
    return batches


def ask(model, chat, photos, questions, process, locate, batch, workers):
    """Asks for all keypoints of Photos, shared out between the processes, `batch` questions at a time.

    questions: {category id: lists of tokens}. locate: decode.locate() or one like it. -> for each instance
    its points in pixels, None for no answer; likewise confidences. Every process has all.
    """
    instances, found = photos.instances, {}
    batches = make_batches(instances, batch)[process.rank::process.world]
    loader = DataLoader(photos, batch_sampler=batches, collate_fn=list, **loader_options(workers),
                        generator=torch.Generator())  # of its own: that of a training is left alone
    for items in tqdm(loader, disable=process.rank > 0, dynamic_ncols=True):
        indices, crops = zip(*items)
        images = normalize(torch.stack(crops).to(process.device))  # (P, 3, size, size), P objects
        predictions = locate(model, images, [questions[instances[i].category_id] for i in indices], chat)
        for i, of_photo in zip(indices, predictions):
            to_photo = crop_of(instances[i]).to_photo
            found[i] = ([p.point and tuple(to_photo(p.point).tolist()) for p in of_photo],
                        [p.confidence for p in of_photo])
    if process.world > 1:
        parts = [None] * process.world
        dist.all_gather_object(parts, found)
        found = {i: of_photo for part in parts for i, of_photo in part.items()}
    return zip(*(found[i] for i in range(len(instances))))


# --------------------------------------------------------------------------------------------------- program


def parse_arguments(argv):
    parser = Parser(description="Evaluates a checkpoint, or scores predictions.")
    add = parser.add_argument
    add("checkpoint", nargs="?", help="what train.py wrote")
    add("--score", metavar="JSON", help="score these predictions instead")
    add("--data", metavar="DIR", help="MP-100, or what tools/own.py made; by default the training's")
    add("--split", type=positive, metavar="N", help="of MP-100, 1 to 5; by default the training's")
    add("--subset", choices=["train", "val", "test"], default="test", help="of the split")
    add("--descriptions", metavar="JSON", help="texts that replace those of the same category")
    add("--allow-missing", action="store_true", help="leave out objects whose photo or prediction is missing")
    add("--decode", choices=DECODINGS, default="greedy", help="what to take of a coordinate's distribution")
    add("--constrained", action="store_true", help="hold answers to the format, so that none is malformed")
    add("--cumulative", action="store_true", help="ask in turns, after the model's own answers (ICCV)")
    add("--llm", metavar="DIR", help="where its weights are, if they were moved since the training")
    add("--vit", metavar="DIR", help="likewise")
    add("--dtype", choices=DTYPES, help="of frozen weights and computing; by default bf16 on CUDA, else fp32")
    add("--batch", type=positive, default=128, metavar="N", help="questions at a time: memory against speed")
    add("--workers", type=natural, default=2, metavar="N", help="processes that read photos, for each GPU")
    add("--protocol", choices=["query", "pairs"], default="query", help="each object, or support-query pairs")
    add("--out", metavar="DIR", help="folder of the results; by default the checkpoint's")
    add("--report", metavar="JSON", help="where the report goes; by default report.json in --out")
    args = parser.parse_args(argv)
    if bool(args.checkpoint) == bool(args.score):
        parser.error("give either a checkpoint or --score predictions.json")
    if args.score and (args.constrained or args.cumulative or args.decode != "greedy" or args.out):
        parser.error("--constrained, --cumulative, --decode and --out are for a checkpoint, not for --score")
    return args


def main(argv):
    from tools.check import describe_shortfall, keep_readable
    from tools.score import choose_folder, choose_texts, make_report, read_predictions, write_results
    args = parse_arguments(argv)
    checkpoint = read_trained(args.checkpoint) if args.checkpoint else None
    trained = checkpoint["args"] if checkpoint else {"data": "data/mp100", "split": 1}
    data, split = args.data or trained["data"], args.split or trained["split"]
    annotations, folder = annotation_file(data, split, args.subset), Path(data, "images")
    categories = choose_texts(args, checkpoint)
    instances = read_instances(annotations, categories)
    if shortfall := describe_shortfall(annotations):
        say(shortfall)
    facts = {"split": split, "subset": args.subset}
    if args.score:
        out = confidences = None
        instances, points, others = read_predictions(args.score, instances, args.allow_missing)
        facts |= others
    else:
        kept, out = keep_readable(instances, folder, categories, args.allow_missing), choose_folder(args)
        facts["without photo"], instances = len(instances) - len(kept), kept
        facts["decode"] = args.decode + " cumulative" * args.cumulative + " constrained" * args.constrained
        points, confidences = load_asker(args, checkpoint)(instances, categories, folder)
        facts["malformed"] = sum(point is None for of_photo in points for point in of_photo)
    if is_first():
        report = make_report(instances, points, categories, annotations, args.protocol, **facts)
        write_results(args.report, out, report, instances, points, confidences, categories, folder)


def load_asker(args, checkpoint):
    """Loads a checkpoint's network -> ask() of it as a function of instances, categories, photos' folder."""
    from paper import choose_locate
    process = start_processes()
    model, chat, _ = load_trained(args.checkpoint, process.device, args.llm, args.vit, args.dtype, checkpoint)
    check_decoding(chat, args.decode, args.constrained)
    trained, encode = Namespace(**checkpoint["args"]), chat.encode_questions
    if args.cumulative:
        from paper.iccv import encode_in_turns
        encode = partial(encode_in_turns, chat)
    way = choose_locate(trained, locate, args.cumulative)
    way = partial(way, decode=args.decode, constrained=args.constrained)

    def asker(instances, categories, folder):
        questions = {c: encode(categories[c]) for c in {o.category_id for o in instances}}
        photos = Photos(instances, folder, trained.image_size)
        return ask(model, chat, photos, questions, process, way, args.batch, args.workers)
    return asker


if __name__ == "__main__":
    run(main)
