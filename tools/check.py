"""The doctor: whether data, weights, tokenizer, disk and memory will do, known before a long training.

    python train.py --split 1 --check     prints what there is and what is wrong; exit code 2 if anything is
    python -m tools.check --split 1       the same

What takes no time, check_briefly(), is done at the start of every training.
"""

import json
import math
import os
import shutil
import sys
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import llama
import vit
from chat import Chat
from common import InputError, is_first, read_json, reading, run, say, write_whole
from data import annotation_file, parse_descriptions, read_instances
from model import CapeLLM, adapt
from paper import choose_parts

N_CATEGORIES = {"train": 70, "val": 10, "test": 20}  # of each of MP-100's splits (paper, section 4.1)
N_TEST = 100  # objects of each category in a test file, as MP-100 publishes it
N_TRAIN = 14000  # objects in a train file, about
ACTIVATIONS = 56  # bytes a position, layer and channel of the LLM in bf16, a guess: 4 GB for 549 x 32 x 4096
HELP = "REPRODUCE.md says where the weights are from; train.py --check looks at everything that a run needs"


# ------------------------------------------------------------------------------------------------------ data


def describe_shortfall(annotations):
    """What an MP-100 annotation file lacks of what is published, in a line; "" if nothing or not MP-100's."""
    subset = Path(annotations).stem.rpartition("_")[2]
    raw = read_json(annotations, dict)
    known = read_json(Path(__file__).parents[1] / "descriptions.json")["categories"]
    with reading(annotations):
        names = {category["id"]: category["name"] for category in raw.get("categories", [])}
        counts = Counter(annotation["category_id"] for annotation in raw["annotations"])
    is_mp100 = names and all(known.get(str(i), {}).get("name") == name for i, name in names.items())
    if subset not in N_CATEGORIES or not is_mp100 or "held out" in raw:
        return ""
    lacks = []
    if len(names) < N_CATEGORIES[subset]:
        lacks.append(f"{len(names)} of {N_CATEGORIES[subset]} categories")
    if subset == "test":
        short = [f"{name} {counts[i]}" for i, name in names.items() if counts[i] < N_TEST]
        if short:
            lacks.append(f"{counts.total():,} of {len(names) * N_TEST:,} objects ({', '.join(short)}; "
                         f"published are {N_TEST} of each)")
    elif absent := [name for i, name in names.items() if not counts[i]]:
        lacks.append(f"no object of {', '.join(absent)}")
    elif subset == "train" and counts.total() < 0.9 * N_TRAIN:
        lacks.append(f"{counts.total():,} of about {N_TRAIN:,} objects")
    return f"{annotations}: holds only {' and '.join(lacks)}" if lacks else ""


def keep_readable(instances, folder, categories, allow_missing=False):
    """-> the instances whose photo is there. The others are refused or, with allow_missing, left out."""
    photos = {instance.photo for instance in instances}
    # what is left out may break off anywhere, and would stop a training later
    readable = {photo: is_readable(Path(folder, photo), to_its_end=allow_missing) for photo in photos}
    kept = [instance for instance in instances if readable[instance.photo]]
    missing = [instance for instance in instances if not readable[instance.photo]]
    if missing and not (allow_missing and kept):
        counts = Counter(categories[instance.category_id].name for instance in missing)
        raise InputError(f"{folder}: photos of {len(missing)} of {len(instances)} objects are missing or "
                         f"unreadable ({', '.join(f'{name} {n}' for name, n in counts.items())}), e.g. "
                         f"{missing[0].photo}; complete the folder or leave them out with --allow-missing")
    return kept


def is_readable(path, to_its_end):
    """Whether a photo has a readable header or, to_its_end, can be decoded to its last pixel."""
    try:
        with Image.open(path) as photo:
            if to_its_end:
                photo.draft(None, (1, 1))  # a JPEG is read at an eighth of its size, which is fast
                photo.load()
        return True
    except Exception:  # pillow's decoders raise nearly anything
        return False


def check_annotations(args, categories):
    """-> the Instances of all subsets, and a line for each problem."""
    instances, problems, is_own = [], [], Path(args.data, "descriptions.json").exists()
    for subset in N_CATEGORIES:
        path = annotation_file(args.data, args.split, subset)
        needs_it = {"val": None if args.validate else "--validate", "test": "evaluate.py" if is_own else None}
        if not path.exists() and needs_it.get(subset):
            print(f"{path}: absent, which only {needs_it[subset]} needs")
            continue
        try:
            found = read_instances(path, categories)
            instances += found
            print(f"{path}: {len(found):,} objects of {len({o.category_id for o in found})} categories")
            shortfall = describe_shortfall(path)
            problems += [shortfall] if shortfall else []
        except InputError as e:
            problems.append(str(e))
    return instances, problems


def check_photos(args, instances, categories):
    """Decodes all photos -> a line for each problem. Those that are missing are listed in OUT/missing.txt."""
    folder = Path(args.data, "images")
    photos = sorted({instance.photo for instance in instances})
    with ThreadPool() as pool:
        decoded = pool.imap(lambda photo: is_readable(folder / photo, to_its_end=True), photos, 16)
        whole = dict(zip(photos, tqdm(decoded, "photos", len(photos), leave=False, dynamic_ncols=True)))
    missing = [photo for photo in photos if not whole[photo]]
    if not missing:
        print(f"{len(photos):,} photos, all there and whole")
        return []
    absent = sum(not (folder / photo).exists() for photo in missing)
    by_category = Counter(categories[o.category_id].name for o in instances if not whole[o.photo])
    by_folder = Counter(str(Path(photo).parent) for photo in missing)
    write_whole(Path(args.out, "missing.txt"), "".join(f"{photo}\n" for photo in missing).encode())
    return [f"{folder}: of {len(photos):,} photos {absent:,} are missing and {len(missing) - absent:,} are "
            f"damaged ({args.out}/missing.txt lists them)",
            f"  objects without photo: {show(by_category)}", f"  photos by folder: {show(by_folder)}"]


def show(counts, n=12):
    said = ", ".join(f"{name} {count}" for name, count in counts.most_common(n))
    return said + (f" and {len(counts) - n} more" if len(counts) > n else "")


# --------------------------------------------------------------------------------------------------- weights


def recognise(path, wanted):
    """InputError if what was given as weights is something else, as happens often. wanted: an example."""
    path = Path(path)
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    pointers = [name for name in names if name.endswith((".safetensors", ".json"))
                and (path / name).open("rb").read(24) == b"version https://git-lfs."]
    hub = f"wanted is a folder in the hub's layout, config.json and *.safetensors, such as {wanted}"
    if path.is_file():
        kind = "the original release's weights" if path.suffix == ".pth" else "a file"
        raise InputError(f"{path}: is {kind}; {hub}")
    if not path.exists():
        if len(path.parts) == 2 and path.parts[0] != "weights" and not path.parent.exists():
            raise InputError(f"{path}: no such folder; if this is a name on the hub, download it first: "
                             f"hf download {path} --local-dir weights/{path.name}")
        raise InputError(f"{path}: no such folder; {HELP}")
    is_metas = "params.json" in names or any(name.startswith("consolidated") for name in names)
    if is_metas and "config.json" not in names:
        raise InputError(f"{path}: holds Meta's own files, in which RoPE pairs other dimensions; {hub}")
    if pointers:
        raise InputError(f"{path}/{pointers[0]}: is a pointer of git-lfs; say `git lfs pull` there")
    if not any(name.endswith(".safetensors") for name in names):
        if any(name.endswith((".bin", ".pth")) for name in names):
            raise InputError(f"{path}: holds pickles (*.bin, *.pth), which this program does not open; "
                             f"{hub}")
        raise InputError(f"{path}: holds no *.safetensors; {HELP}")


def read_headers(directory):
    """-> {name: shape} of a folder's tensors, and their bytes. InputError if a file is not whole."""
    directory, shapes, total = Path(directory), {}, 0
    index, files = directory / "model.safetensors.index.json", {"model.safetensors"}
    if index.exists():
        with reading(index, "download it again"):
            files = set(read_json(index, dict)["weight_map"].values())
    for path in (directory / name for name in sorted(files)):
        with reading(path, "missing, damaged or truncated; download it again"), open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, 10**8)))
            header.pop("__metadata__", None)
            size = max(tensor["data_offsets"][1] for tensor in header.values())
            if path.stat().st_size != 8 + length + size:
                raise InputError(f"{path}: damaged or truncated, {path.stat().st_size:,} bytes and not "
                                 f"{8 + length + size:,}; download it again")
            shapes |= {name: tensor["shape"] for name, tensor in header.items()}
            total += size
    return shapes, total


def sketch(directory):
    """A folder's network without its weights, and the bytes of its files.

    InputError if the weights are not whole, or not the tensors that config.json asks for.
    """
    path = Path(directory, "config.json")
    kind = read_json(path, dict).get("model_type")
    shapes, size = read_headers(directory)
    with reading(directory, "is config.json the one of these weights?"), torch.device("meta"):
        if kind in ("llama", "mistral"):
            network = llama.Llama(llama.read_config(path))
            shapes = {key.removeprefix("model."): shape for key, shape in shapes.items()
                      if "inv_freq" not in key}
            if network.config.tie_word_embeddings:
                shapes["lm_head.weight"] = shapes["embed_tokens.weight"]
            state = {key: torch.empty(shape) for key, shape in shapes.items()}
        else:
            if kind == "hiera":
                from paper.hiera import Hiera as Encoder
                from paper.hiera import read_config, rename
            else:
                Encoder, read_config, rename = vit.ViT, vit.read_config, vit.rename
            network, state = Encoder(read_config(path)), {}
            for key, shape in shapes.items():
                names = rename(key, network.config.depths) if kind == "hiera" else rename(key)
                state |= dict(zip(names, torch.empty(shape).chunk(max(1, len(names)))))
        network.load_state_dict(state, strict=True, assign=True)
        if isinstance(network, llama.Llama) and network.config.tie_word_embeddings:
            network.lm_head.weight = network.embed_tokens.weight
    return network, size


def check_tokenizer(args):
    """InputError if the tokenizer is not the LLM's."""
    path = Path(args.llm, "tokenizer.json")
    if not path.exists():
        raise InputError(f"{path}: no such file; Transformers and sentencepiece make it of an old "
                         "model's tokenizer.model, see REPRODUCE.md")
    tokenizer, size = Chat(args.llm).tokenizer, read_json(Path(args.llm, "config.json"))["vocab_size"]
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    largest = max({*tokenizer.get_vocab().values()} - special, default=0)  # text never becomes a special one
    if largest >= size:
        raise InputError(f"{path}: has a token {largest}, but vocab_size in config.json is {size}; are they "
                         "of the same model?")


# -------------------------------------------------------------------------------------------- disk and memory


def check_disk(args, n_trained):
    """-> a line of what checkpoints take. InputError if there is no room, or no leave to write."""
    size = 3 * 4 * n_trained  # weights and Adam's two averages, fp32
    folder = Path(args.out).absolute()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK) or not folder.is_dir():
        raise InputError(f"{folder}: cannot be written into; choose another --out")
    # a checkpoint is written beside the old one, and best.pt beside both
    free, needed = shutil.disk_usage(folder).free, size * (3 if args.validate else 2)
    line = f"{args.out}: a checkpoint takes {size / 1e9:.2f} GB, {free / 1e9:,.1f} GB are free"
    if free < needed:
        raise InputError(f"{line}, {needed / 1e9:.2f} are needed")
    return line


def check_memory(args, model, n_processes):
    """-> a line of what a process takes on paper. InputError if a GPU, or this machine, has less."""
    on_gpu = torch.cuda.is_available()
    width = 2 if (args.dtype or ("bf16" if on_gpu else "fp32")) == "bf16" else 4  # bytes of a number
    trained, total = count(model, True), count(model, False)
    c = model.llama.config
    patches = math.ceil(args.image_size / getattr(model.vit.config, "patch_size", 32)) ** 2
    positions = patches + 293  # of text, on average, with four rounds
    layers = 1 if args.checkpoint_activations else c.num_hidden_layers
    numbers = args.micro_batch * positions * layers * c.hidden_size * ACTIVATIONS / 2
    parts = {"frozen weights": (total - trained) * width,
             "what trains, with gradients and Adam": trained * 16, "activations (a guess)": numbers * width}
    needed = sum(parts.values())
    line = (f"memory on paper {needed / 1e9:.1f} GB a process: "
            + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items()))
    if on_gpu and (there := torch.cuda.get_device_properties(0).total_memory) < needed:
        raise InputError(f"{line}; the GPU has {there / 1e9:.0f}"
                         + "; --checkpoint-activations needs less" * (not args.checkpoint_activations))
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not on_gpu and there < needed * n_processes:
        raise InputError(f"no GPU seen, and {line}; x {n_processes} processes, this machine has "
                         f"{there / 1e9:.0f} GB" + "; --dtype bf16 takes half" * (width == 4))
    return line


def count(model, trained_only):
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained_only)


def check_run(args, n_processes):
    """Weights, disk and memory -> a line for each. InputError for the first that will not do."""
    if args.batch % (args.micro_batch * n_processes):
        raise InputError(f"--batch {args.batch} is not a multiple of --micro-batch {args.micro_batch} "
                         f"x {n_processes} processes")
    for directory, wanted in (args.vit, "facebook/dinov2-large"), (args.llm, "meta-llama/Llama-3.1-8B"):
        recognise(directory, wanted)
    (encoder, vit_size), (decoder, llm_size) = sketch(args.vit), sketch(args.llm)
    if args.image_size % (patch := getattr(encoder.config, "patch_size", 32)):
        raise InputError(f"--image-size {args.image_size} is not a multiple of the ViT's patches, {patch}")
    check_tokenizer(args)
    # InputError if there is no such --instruction; the tokenizer need not be read again
    _, Network, _ = choose_parts(args, None, CapeLLM, lambda *_: None)
    with torch.device("meta"):
        adapt(encoder, args.tune_vit, ("q", "v"))
        adapt(decoder, args.tune_llm, ("q_proj", "v_proj"))
        model = Network(encoder, decoder)
    return [f"{args.vit}: weights of {vit_size / 1e9:.2f} GB, whole",
            f"{args.llm}: weights of {llm_size / 1e9:.2f} GB, whole",
            check_disk(args, count(model, True)), check_memory(args, model, n_processes)]


# ----------------------------------------------------------------------------------------------------- whole


def check_briefly(args, process):
    """What takes no time, at the start of a training. InputError if it will not do."""
    if process.device.type == "cpu":
        say(f"no GPU seen: CPU, {args.dtype or 'fp32'}")
    check_run(args, process.world)


def check_all(args):
    """Prints what there is and what is wrong, in one screen. Ends with exit code 2 if anything is."""
    if not is_first():
        return  # under torchrun one process looks for all
    problems = []
    try:
        categories = parse_descriptions(read_json(args.descriptions), args.descriptions)
        instances, problems = check_annotations(args, categories)
        problems += check_photos(args, instances, categories) if instances else []
    except InputError as e:
        problems.append(str(e))
    try:
        print(*check_run(args, int(os.environ.get("WORLD_SIZE", 1))), sep="\n")
    except InputError as e:
        problems.append(str(e))
    for line in problems:
        print(f"problem: {line}" if not line.startswith(" ") else line)
    if problems:
        sys.exit(2)
    print("all is well")


def main(argv):
    from train import parse_arguments
    check_all(parse_arguments(argv))


if __name__ == "__main__":
    run(main)
