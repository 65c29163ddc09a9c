"""Kills training runs at random moments, and looks whether they end as a run that was never disturbed.

    python tests/kill.py 30

trains on a few creatures, 30 times: each run is killed (SIGKILL) once, wherever it happens to be, reading,
computing or writing, and the same command is given again. A third as many runs follow under torchrun with two
processes, of which one is killed; torchrun restarts them by itself. Every checkpoint must equal the straight
run's bit by bit. Takes about half a minute a kill on two cores; Linux only. The suite has one such kill
(test_train.py); this is for the rest.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from toyworld.creatures import draw_toy  # noqa: E402

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "3"]
TOY = ROOT / "assets/toy"


def start(folder, name, launcher):
    command = [sys.executable, *launcher, "train.py", "--data", folder / "data",
               "--descriptions", folder / "descriptions.json",
               "--llm", TOY / "llm", "--vit", TOY / "vit", "--image-size", "112",
               "--batch", "4", "--micro-batch", "2", "--epochs", "3", "--warmup", "0.1", "--save-every", "1",
               "--workers", "1", "--out", folder / name]
    with open(folder / f"{name}.txt", "a") as log:
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=log, stderr=log,
                                env={**os.environ, "OMP_NUM_THREADS": "1",
                                     "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})  # see REPRODUCE.md


def children_of(pid):
    """The processes of torchrun that train, by rank."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_for_step(step, program, folder, name):
    """Until so many steps are in the log."""
    log = folder / name / "log.jsonl"
    while program.poll() is None and not (log.exists() and log.read_text().count("\n") >= step):
        time.sleep(0.005)


def read(folder, name):
    contents = torch.load(folder / name / "ckpt.pt", weights_only=True)
    return {**contents["model"], **{f"{i}.{key}": value for i, state in contents["optimizer"]["state"].items()
                                    for key, value in state.items()}, "step": torch.tensor(contents["step"])}


def read_losses(folder, name):
    """{step: loss}; of a step that was repeated, the last line counts."""
    lines = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def kill_once(folder, name, launcher, seconds, straight):
    """Whether a run that is killed somewhere ends as the straight one, whose steps take `seconds` each."""
    program, step = start(folder, name, launcher), random.randrange(straight["step"].item())
    wait_for_step(step, program, folder, name)
    time.sleep(random.uniform(0, seconds))
    victims = children_of(program.pid) if launcher else [program.pid]
    if program.poll() is None and victims:
        os.kill(random.choice(victims), signal.SIGKILL)
    left = {path.name for path in (folder / name).glob("*.part")}
    if not launcher:
        program.wait()
        program = start(folder, name, launcher)
    code = program.wait()
    end = read(folder, name)
    same = code == 0 and read_losses(folder, name) == read_losses(folder, name.partition("-")[0])
    same = same and end.keys() == straight.keys()
    same = same and all(torch.equal(end[key], straight[key]) for key in straight)
    said = [line for line in (folder / f"{name}.txt").read_text().splitlines() if line.startswith("steps ")]
    print(name, f"killed after step {step}:", "the same" if same else "NOT the same", said[-1:], left or "",
          flush=True)
    return same


def main(kills):
    folder = Path(tempfile.mkdtemp())
    draw_toy(folder, 0, {"train": (2, 4), "val": (1, 1), "test": (1, 1)})
    random.seed(0)
    for kind, launcher, n in ("alone", [], kills), ("torchrun", TORCHRUN, -(-kills // 3)):
        program = start(folder, kind, launcher)
        assert program.wait() == 0, (folder / f"{kind}.txt").read_text()[-3000:]
        straight = read(folder, kind)
        lines = [json.loads(line) for line in (folder / kind / "log.jsonl").read_text().splitlines()]
        seconds = lines[-1]["seconds"]
        same = [kill_once(folder, f"{kind}-{i}", launcher, seconds, straight) for i in range(n)]
        print(f"{kind}: {sum(same)} of {n} runs end as the straight one, of {len(lines)} steps", flush=True)
    print(folder)


if __name__ == "__main__":
    main(int(sys.argv[1]))
