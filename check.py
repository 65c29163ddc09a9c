"""What can be known before a long training: whether data, weights, disk and memory will do.

    python train.py --split 1 --check [--missing-list missing.txt]

Nothing here comes from the paper but the numbers of categories. The weights and the disk are always looked at
before the weights are loaded, which takes no time; the photos, all of which are decoded, only with --check.
"""

import json
import math
import os
import shutil
import sys
from collections import Counter
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
from tqdm import tqdm

from annotations import annotation_file, is_readable, parse_descriptions, read_instances
from arguments import images_folder
from checkpoint import load_chat, load_model
from coco import read_coco, read_texts
from common import InputError, read_json, write_whole
from hiera import Hiera, read_hiera_config
from llama import Llama, read_llama_config
from model import CapeLLM, adapt
from vit import ViT, read_vit_config
from weights import find_shards

N_CATEGORIES = {"train": 70, "val": 10, "test": 20}  # of each of MP-100's splits (paper, section 4.1)
N_OBJECTS = 100  # of each category in a test file, as MP-100 publishes it
ACTIVATIONS = 56  # bytes a position, layer and channel of the LLM in bf16, a guess: 4 GB for 549 x 32 x 4096


# ------------------------------------------------------------------------------------------------------ data


def describe_shortfall(annotations):
    """What an MP-100 annotation file lacks of what is published, in a line; "" if nothing or not MP-100's."""
    subset = Path(annotations).stem.rpartition("_")[2]
    raw = read_json(annotations, dict)
    known = read_json(Path(__file__).parent / "descriptions.json")["categories"]
    names = {category["id"]: category["name"] for category in raw.get("categories", [])}
    is_mp100 = names and all(known.get(str(i), {}).get("name") == name for i, name in names.items())
    if subset not in N_CATEGORIES or not is_mp100:
        return ""
    counts = Counter(annotation["category_id"] for annotation in raw["annotations"])
    short = [f"{name} {counts[i]}" for i, name in names.items()
             if counts[i] < (N_OBJECTS if subset == "test" else 1)]
    lacks = []
    if len(names) < N_CATEGORIES[subset]:
        lacks.append(f"{len(names)} of {N_CATEGORIES[subset]} categories")
    if short and subset == "test":
        lacks.append(f"{counts.total():,} of {len(names) * N_OBJECTS:,} objects ({', '.join(short)}; "
                     f"published are {N_OBJECTS} of each)")
    elif short:
        lacks.append(f"no object of {', '.join(short)}")
    return f"{annotations}: holds only {' and '.join(lacks)}" if lacks else ""


def check_photos(args, instances, categories):
    """instances: of all subsets. -> a line for each problem; the missing photos go into --missing-list."""
    images = Path(images_folder(args))
    photos = sorted({instance.photo for instance in instances})
    decode = partial(is_readable, to_its_end=True)
    with ThreadPool() as pool:
        whole = dict(zip(photos, tqdm(pool.imap(decode, [images / photo for photo in photos], 16),
                                      "photos", len(photos), leave=False, dynamic_ncols=True)))
    missing = [photo for photo in photos if not whole[photo]]
    if args.missing_list:
        write_whole(args.missing_list, "".join(f"{photo}\n" for photo in missing).encode())
    if not missing:
        print(f"{len(photos):,} photos, all there and whole")
        return []
    absent = sum(not (images / photo).exists() for photo in missing)
    by_category = Counter(categories[o.category_id].name for o in instances if not whole[o.photo])
    by_folder = Counter(str(Path(photo).parent) for photo in missing)
    where = f"listed in {args.missing_list}" if args.missing_list else "--missing-list FILE lists them"
    return [f"{images}: of {len(photos):,} photos {absent:,} are missing and {len(missing) - absent:,} are "
            f"damaged ({where})",
            f"  objects without photo: {show(by_category)}", f"  photos by folder: {show(by_folder)}"]


def show(counts, n=12):
    said = ", ".join(f"{name} {count}" for name, count in counts.most_common(n))
    return said + (f" and {len(counts) - n} more" if len(counts) > n else "")


def print_found(path, instances):
    print(f"{path}: {len(instances):,} objects of {len({o.category_id for o in instances})} categories")


def check_own(args):
    """A COCO file and that of --val -> Instances, {id: Category}, and a line for each problem."""
    instances, categories, problems = [], {}, []
    for path in filter(None, (args.annotations, args.val)):
        try:
            texts = read_texts(args.descriptions) if args.descriptions else None
            found, descriptions = read_coco(path, args.images, texts, print)
            categories |= parse_descriptions(descriptions, path)
            instances += found
            print_found(path, found)
        except InputError as e:
            problems.append(str(e))
    return instances, categories, problems


def check_annotations(args, categories):
    """-> the Instances of all subsets, and a line for each problem."""
    instances, problems = [], []
    for subset in N_CATEGORIES:
        path = annotation_file(args.data, args.split, subset)
        if subset == "val" and not path.exists() and not args.validate:
            print(f"{path}: absent, which only --validate needs")
            continue
        try:
            found = read_instances(path, categories)
            instances += found
            print_found(path, found)
            if not found:
                problems.append(f"{path}: no object")
            if shortfall := describe_shortfall(path):
                problems.append(shortfall)
        except InputError as e:
            problems.append(str(e))
    return instances, problems


# -------------------------------------------------------------------------------------- weights, disk, memory


def check_weights(directory):
    """-> size in bytes of a folder's tensors. InputError if a file is not as long as its header says."""
    directory, total = Path(directory), 0
    read_json(directory / "config.json", dict)
    index, shards = find_shards(directory)
    for path in shards:
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, 10**8)))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            size, expected = path.stat().st_size, 8 + length + max(ends)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{path}: missing, damaged or truncated ({e}); download it again") from None
        if size != expected:
            raise InputError(f"{path}: damaged or truncated, {size:,} bytes and not {expected:,}; "
                             "download it again")
        total += max(ends)
    promised = read_json(index, dict).get("metadata", {}).get("total_size", 0) if len(shards) > 1 else 0
    if total < promised:
        raise InputError(f"{index}: promises {promised:,} bytes of tensors, but its files hold {total:,}; "
                         "download them again")
    return total


def sketch(args):
    """The network of these arguments without its weights, on the meta device."""
    vit_config, llm_config = Path(args.vit, "config.json"), Path(args.llm, "config.json")
    is_hiera = read_json(vit_config, dict).get("model_type") == "hiera"
    Encoder, read_config = (Hiera, read_hiera_config) if is_hiera else (ViT, read_vit_config)
    with torch.device("meta"):
        vit, llama = Encoder(read_config(vit_config)), Llama(read_llama_config(llm_config))
        adapt(vit, args.tune_vit, ("q", "v"))
        adapt(llama, args.tune_llm, ("q_proj", "v_proj"))
        return CapeLLM(vit, llama, args.answer)


def describe_disk(args):
    """-> a line, and a line of the problem or "". A checkpoint is written beside the old one and best.pt."""
    trained = sum(p.numel() for p in sketch(args).parameters() if p.requires_grad)
    size = 3 * 4 * trained  # weights and Adam's two averages, fp32
    folder = Path(args.out).absolute()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder}: cannot be written into; choose another --out")
    free, needed = shutil.disk_usage(folder).free, size * (3 if args.validate else 2)
    line = f"{args.out}: a checkpoint takes {size / 1e9:.2f} GB, {free / 1e9:,.1f} GB are free"
    return line, f"{line}, {needed / 1e9:.2f} are needed" if free < needed else ""


def check_memory(args):
    """On paper -> a line if a GPU here has less."""
    model, on_gpu = sketch(args), torch.cuda.is_available()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    c, p = model.llama.config, getattr(model.vit.config, "patch_size", 32)
    positions = math.ceil(args.image_size / p) ** 2 + 293  # of text, on average, with four rounds
    layers = 1 if args.checkpoint_activations else c.num_hidden_layers
    width = 2 if (args.dtype or ("bf16" if on_gpu else "fp32")) == "bf16" else 4  # bytes of a number
    numbers = ACTIVATIONS / 2 * positions * layers * c.hidden_size * args.micro_batch
    parts = {"frozen weights": frozen * width, "what trains, with gradients and Adam": trained * 16,
             "activations (a guess)": numbers * width}
    total = sum(parts.values())
    print(f"memory on paper {total / 1e9:.1f} GB a process: "
          + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items()))
    if on_gpu and (there := torch.cuda.get_device_properties(0).total_memory) < total:
        return [f"the GPU has {there / 1e9:.0f} GB; less is needed with --checkpoint-activations"]
    return []


def check_briefly(args):
    """What takes no time. InputError if weights or disk will not do."""
    for directory in args.vit, args.llm:
        check_weights(directory)
    if problem := describe_disk(args)[1]:
        raise InputError(problem)


def check_all(args):
    """Prints what there is and what is wrong, in one screen. Ends with exit code 2 if anything is."""
    problems = []

    def attempt(check, *arguments):
        try:
            return check(*arguments)
        except InputError as e:
            problems.append(str(e))

    if args.annotations:
        instances, categories, found = check_own(args)
    else:
        categories = attempt(lambda: parse_descriptions(read_json(args.descriptions), args.descriptions))
        instances, found = check_annotations(args, categories) if categories else ([], [])
    problems += found + (check_photos(args, instances, categories) if instances else [])
    sizes = {directory: attempt(check_weights, directory) for directory in (args.vit, args.llm)}
    for directory, size in sizes.items():
        if size:
            print(f"{directory}: weights of {size / 1e9:.2f} GB, whole")
    if all(sizes.values()):
        attempt(load_model, args, "meta")  # are the tensors those that config.json asks for?
    attempt(load_chat, args)  # does the tokenizer fit the LLM's vocabulary?
    line, problem = attempt(describe_disk, args) or ("", "")
    if line:
        print(line)
    problems += [problem] if problem else []
    problems += attempt(check_memory, args) or []
    problems = list(dict.fromkeys(problems))
    for line in problems:
        print(f"problem: {line}" if not line.startswith(" ") else line)
    if problems:
        sys.exit(2)
    print("all is well")
