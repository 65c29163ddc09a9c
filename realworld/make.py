"""From two folders of photographs to a trained model and its table, by one command; what is done is kept.

    python -m realworld.make data/keypoint_photos data/real_photos --vit weights/dinov2-small --seeds 0 1 2

Every step is a command that can be run by itself; each is printed before it runs. OUT/results.json has PCK of
each seed and of both baselines. --ship copies what assets/real holds, of the first seed.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from common import Parser, run
from tools.score import COLUMNS

TUNING = ("--split 2 --image-size 112 --tune-vit frozen --epochs 1 --pack --batch 16 --micro-batch 8 "
          "--rounds 1 --lr 5e-4 --warmup 0.1 --workers 0 --save-every 10").split()


def do(module, *arguments):
    command = [sys.executable, *module.split(), *map(str, arguments)]
    print("$", *command[1:], flush=True)
    subprocess.run(command, check=True)


def is_new_bird(name):
    """Whether a row of a report is of one of the ten bird species of the test."""
    return "cub_" in name


def write_results(out, seeds):
    """OUT/results.json: for each test category, all birds and all objects, PCK in percent by each method."""
    reports = {f"seed {seed}": out / f"seed{seed}/tuned/report.json" for seed in seeds}
    reports = {method: json.loads(path.read_text()) for method, path in reports.items()}
    rows = {}
    for method, report in {**reports, **json.loads((out / "baselines.json").read_text())}.items():
        categories = report["per category"]
        birds = [row for name, row in categories.items() if is_new_bird(name)]
        mean = {column: sum(row[column] for row in birds) / len(birds) for column in COLUMNS}
        for name, row in {"ten bird species": mean, **categories, "all objects": report}.items():
            rows.setdefault(name, {})[method] = [round(100 * row[column], 1) for column in COLUMNS]
    (out / "results.json").write_text(json.dumps({"columns": COLUMNS, "rows": rows}, indent=1))
    for name, methods in rows.items():
        print(f"{name:32}", *(f"{method} {row[0]}/{row[1]}/{row[3]}" for method, row in methods.items()))


def ship(seed, to):
    """Copies the Llama, and the checkpoint without the optimizer's state; it names the published ViT."""
    shutil.copytree(seed / "llm", to / "llm", dirs_exist_ok=True)
    checkpoint = torch.load(seed / "tuned/ckpt.pt", weights_only=True)
    checkpoint["args"] |= {"llm": "assets/real/llm", "vit": "weights/dinov2-small", "data": "data/realworld",
                           "out": "runs/realworld/tuned", "init_projection": None}  # of no use elsewhere
    torch.save(checkpoint | {"optimizer": {}}, to / "ckpt.pt")


def main(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--vit", type=Path, required=True, help="DINOv2-S, as published")
    parser.add_argument("--data", type=Path, default="data/realworld", help="where MP-100's layout goes")
    parser.add_argument("--out", type=Path, default="runs/realworld")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=1800, help="of pre-training")
    parser.add_argument("--ship", type=Path, help="copy what users need of the first seed to this folder")
    args = parser.parse_args(argv)
    data, out = ["--data", args.data], args.out
    do("-m realworld.data", *args.folders, "--out", args.data)
    do("-m realworld.features", *data, "--vit", args.vit, "--out", out)
    if not (out / "baselines.json").exists():
        do("-m realworld.baselines", *data, "--vit", args.vit, "--out", out)
    for seed in args.seeds:
        pretrained, tuned = out / f"seed{seed}", out / f"seed{seed}/tuned"
        do("-m realworld.pretrain", *data, "--features", out, "--out", pretrained, "--seed", seed,
           "--steps", args.steps)
        do("train.py", *data, "--descriptions", "realworld/descriptions.json", "--vit", args.vit,
           "--llm", pretrained / "llm", "--init-projection", pretrained / "projection.pt",
           "--out", tuned, "--seed", seed, *TUNING)
        do("evaluate.py", tuned / "ckpt.pt", "--workers", 0)
        do("-m realworld.figures", pretrained, tuned, *data)
    write_results(out, args.seeds)
    if args.ship:
        ship(out / f"seed{args.seeds[0]}", args.ship)


if __name__ == "__main__":
    run(main)
