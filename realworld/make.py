"""From two folders of photographs to a trained model and its table, by one command; what is done is kept.

    python -m realworld.make data/keypoint_photos data/real_photos --vit facebook/dinov2-small --seeds 0 1 2

Every step is a command that can be run by itself; each is printed before it runs.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from common import run

TUNING = ("--split 2 --image-size 112 --tune-vit frozen --epochs 1 --pack --batch 16 --micro-batch 8 "
          "--lr 1e-3 --warmup 0.1 --workers 0 --save-every 10").split()


def do(module, *arguments):
    command = [sys.executable, *module.split(), *map(str, arguments)]
    print("$", *command[1:], flush=True)
    subprocess.run(command, check=True)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--vit", type=Path, required=True, help="DINOv2-S, as published")
    parser.add_argument("--data", type=Path, default="data/realworld", help="where MP-100's layout goes")
    parser.add_argument("--out", type=Path, default="runs/realworld")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=1250, help="of pre-training")
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


if __name__ == "__main__":
    run(main)
