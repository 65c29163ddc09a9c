"""The paper's variants in the toy world: `python toy.py --variants`. What is finished is not done again."""

import os
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

from common import InputError, read_json
from toyworld.creatures import draw_toy

ROOT = Path(__file__).parent.parent
VARIANTS = [  # name, flags of train.py, number of seeds
    ("capellm", "", 3), ("name", "--instruction name", 3), ("list", "--instruction list", 3),
    ("frozen", "--tune-vit frozen", 3), ("full", "--tune-vit full", 3),
    ("rounds-1", "--rounds 1", 1), ("rounds-2", "--rounds 2", 1), ("rounds-6", "--rounds 6", 1),
    ("rounds-8", "--rounds 8", 1), ("diverse", "--instruction diverse", 1),
    ("outline", "--instruction outline", 1), ("diverse-outline", "--instruction diverse-outline", 1),
    ("step", "--instruction step", 1), ("token", "--answer token", 1),
    ("token-step", "--answer token --instruction step", 1),
    ("pretrain-direct", "--pretrain direct", 1), ("pretrain-step", "--pretrain step", 1),
    ("dynamic", "--rounds dynamic", 1)]


def evaluations(flags):
    """How evaluate.py is asked about a variant: {folder of the report: flags}."""
    ways = {"greedy": [], "median": ["--decode", "median"]}
    if "token" in flags:  # a point read off <KEYPOINT> has no distributions
        del ways["median"]
    if "dynamic" in flags:
        ways |= {f"cumulative-{way}": [*how, "--cumulative"] for way, how in ways.items()}
    return ways


def call(folder, program, *args):
    with open(folder / "log.txt", "a") as log:
        subprocess.run([sys.executable, ROOT / program, *map(str, args)], stdout=log, stderr=log, check=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})


def train(folder, flags):
    """-> the checkpoint of a finished training, which resumes where it was stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    call(folder, "train.py", *flags, "--out", folder)
    return folder / "ckpt.pt"


def run_row(out, recipe, name, flags, seed):
    """Trains and evaluates a variant, from where it was stopped -> its name if that fails, None if not."""
    folder, world = out / f"{name}-{seed}", out / f"world-{seed}"
    missing = {way: how for way, how in evaluations(flags).items()
               if not (folder / way / "report.json").exists()}
    try:
        if missing:
            fixed = ["--data", world / "data", "--descriptions", world / "descriptions.json", "--seed", seed]
            own = flags.split()
            if "--pretrain" in own:
                own = ["--init-projection", train(folder / "pretraining", [*fixed, *recipe, *own])]
            checkpoint = train(folder, [*fixed, *recipe, *own])
            for way, how in missing.items():
                call(folder, "evaluate.py", checkpoint, "--out", folder / way, "--workers", 1, *how)
            print(f"{folder} is done", flush=True)
    except subprocess.CalledProcessError:
        return str(folder)


def cell(out, name, seeds, way, key):
    """PCK in percent: the mean over seeds and, in brackets, the lowest and the highest."""
    reports = [out / f"{name}-{seed}" / way / "report.json" for seed in range(seeds)]
    values = [100 * read_json(report)[key] for report in reports if report.exists()]
    spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.1f}{spread}" if values else ""


def write_table(path, out, variants):
    lines = ["| variant | flags | greedy PCK@0.05 | PCK@0.2 | median PCK@0.05 | PCK@0.2 |",
             "|---|---|---|---|---|---|"]
    for name, flags, seeds in variants:
        said = f"`{flags}`" if flags else ""
        said += ", then `--init-projection`" if "--pretrain" in flags else ""
        for kind, how in ("", ""), ("cumulative-", ", evaluated with `--cumulative`"):
            if f"{kind}greedy" in evaluations(flags):
                cells = [cell(out, name, seeds, kind + way, key) for way in ("greedy", "median")
                         for key in ("PCK@0.05", "PCK@0.2")]
                lines.append(f"| {' | '.join([name, said + how, *cells])} |")
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


def compare_variants(out, recipe, variants=VARIANTS):
    """Every row, as many at a time as there are cores, and then the table."""
    rows = [(out, recipe, name, flags, seed) for name, flags, seeds in variants for seed in range(seeds)]
    for seed in {row[-1] for row in rows}:
        if not (out / f"world-{seed}/descriptions.json").exists():  # what draw_toy() writes last
            draw_toy(out / f"world-{seed}", seed)
    with ThreadPool(os.cpu_count()) as pool:
        failed = list(filter(None, pool.starmap(run_row, rows, chunksize=1)))
    write_table(out / "table.md", out, variants)
    if failed:
        raise InputError(f"{', '.join(failed)}: failed, see log.txt there")
