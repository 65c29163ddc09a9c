"""What a training run tells while it runs: log.jsonl in its folder.

Nothing here comes from the paper, so a reader may skip this file. log.jsonl has a line of JSON for each step,

    {"step": 7, "epoch": 1, "loss": 1.23, "lr": 0.0005, "norm": 0.8, "tokens_per_second": 5100,
     "gib": 21.5, "seconds": 9.8, "waited": 0.02}

where seconds are the step's own, without planning an epoch, saving and validating, and waited is their share
without data, and for each validation: {"step": 100, "PCK@0.2": 0.61, "objects": 100}.
"""

import json
from pathlib import Path

from common import InputError, read_json_lines, write_whole


def read_log(path):
    """log.jsonl -> its lines as dictionaries."""
    lines = read_json_lines(path) if path.exists() else []
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


class Log:
    """Writes a run's log.jsonl from the step on where the run starts or resumes.

    Lines of later steps, which a run that was killed may have left, are dropped: these steps are done again.
    Without a folder, in all processes but the first, nothing is written.
    """

    def __init__(self, folder, step):
        self.path, self.lines = None, []
        if folder is None:
            return
        self.path = Path(folder, "log.jsonl")
        try:
            self.lines = [line for line in read_log(self.path) if line["step"] <= step]
        except OSError as e:
            raise InputError(f"{self.path}: cannot be read ({e})") from None
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())

    def write(self, **line):
        if self.path is None:
            return
        self.lines.append(line)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as e:
            raise InputError(f"{self.path}: cannot be written ({e}); the checkpoint of an earlier step was "
                             "not touched") from None

    def series(self, key):
        """[(step, value), ...] of the lines that have such a value."""
        return [(line["step"], line[key]) for line in self.lines if key in line]
