"""Every command and every JSON of README, run in a folder laid out as README says, with tiny weights and made-up photos.

The two commands that install packages are run by .ci/run.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
from conftest import ROOT
from PIL import Image

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.strip().splitlines()]


def make_mp100(folder, subset, categories, n):
    """n photos of noise with one object each, keypoints anywhere inside the box, the first two visible; the same in all five splits."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(n):
        category, K = categories[i % len(categories)]
        file = f"{subset}/{i}.jpg"
        (folder / "images" / subset).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(folder / "images" / file)
        points = np.column_stack((rng.uniform(20, 90, (K, 2)), np.arange(K) < 2))
        images.append({"id": i, "file_name": file, "width": 120, "height": 90})
        annotations.append({"id": i, "image_id": i, "category_id": category, "bbox": [10, 5, 100, 80], "area": 8000, "iscrowd": 0,
                            "keypoints": points.flatten().tolist(), "num_keypoints": 2})
    (folder / "annotations").mkdir(exist_ok=True)
    contents = {"images": images, "annotations": annotations, "categories": [{"id": c, "name": str(c)} for c, _ in categories]}
    for split in range(1, 6):
        (folder / "annotations" / f"mp100_split{split}_{subset}.json").write_text(json.dumps(contents))


def test_commands_of_readme_run_as_written(tiny, tmp_path):
    for item in [*ROOT.glob("*.py"), ROOT / "descriptions.json", ROOT / "assets"]:
        (tmp_path / item.name).symlink_to(item)
    for name in "Llama-3.1-8B", "dinov2-large":
        shutil.copytree(tiny / ("llm" if "Llama" in name else "vit"), tmp_path / "weights" / name)
    make_mp100(tmp_path / "data/mp100", "train", [(1, 8), (98, 8)], 4)
    make_mp100(tmp_path / "data/mp100", "test", [(2, 17), (84, 10)], 4)
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (330, 350, 3), dtype=np.uint8)).save(tmp_path / "photo.jpg")

    blocks = re.findall(r"`([^`\n]+\.json)`[^`]*?(?:`[^`\n]+`[^`]*?)?:\n+```json\n(.*?)```", README, re.S)
    assert [name for name, _ in blocks] == ["teapots.json", "data/teapots/annotations/mp100_split1_train.json"]
    for name, text in blocks:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(json.loads(text)))
    shutil.copy(tmp_path / blocks[1][0], tmp_path / "data/teapots/annotations/mp100_split1_test.json")
    (tmp_path / "data/teapots/images/teapot").mkdir(parents=True)
    Image.new("RGB", (320, 240), "tan").save(tmp_path / "data/teapots/images/teapot/0001.jpg")

    bin_folder = os.path.dirname(sys.executable)
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    commands = [c for c in COMMANDS if not c.startswith("pip ")]
    # as written, but for the loop over splits, which would take minutes: one process and one epoch
    commands = [c.replace("torchrun --nproc_per_node 4", "python").replace("train.py", "train.py --epochs 1 --workers 1") if "do torch" in c
                else c for c in commands]
    assert len(commands) == 13
    said = {}
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        said[command.startswith("python -c")] = done.stdout
    for file in "ckpt.pt", "report.json", "predictions.json", "predictions.png":
        assert (tmp_path / "runs/split1" / file).exists() and (tmp_path / "runs/teapots" / file).exists()
    table = [list(map(float, line.split())) for line in said[True].splitlines()]  # Table 2: pairs and query, five splits and their mean
    assert [len(row) for row in table] == [6, 6] and all(abs(sum(row[:5]) / 5 - row[5]) < 0.02 for row in table)
    assert (tmp_path / "photo.keypoints.png").exists() and (tmp_path / "creature.keypoints.png").exists()


def test_commands_that_install_are_those_of_ci():
    ci = (ROOT / ".ci/run").read_text()
    for command in COMMANDS:
        if command.startswith("pip "):
            assert command in ci


def test_readme_names_every_module():
    for module in ROOT.glob("*.py"):
        assert f"`{module.name}`" in README
