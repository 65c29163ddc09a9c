"""Fills a network with published weights: *.safetensors in a folder, as the Hugging Face hub lays it out.

Nothing here comes from the paper, so a reader may skip this file.
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from common import InputError, check, get_field, read_json


def load_weights(model, directory, rename, dtype, device):
    """Fills `model`, built on the meta device, from the safetensors of a folder as the hub lays it out.

    rename(key) returns a list of our names for a tensor of the file. An empty list skips it. If there are
    several names, the file has fused them, and its rows are cut into that many equal parts. Loading is
    strict: every parameter must be found exactly once and in its own shape, and nothing else. InputError
    names the tensor at fault. Each tensor goes to its device and type before the next is read, so host memory
    never holds more than the model and one shard. For the device "meta", only names and shapes are looked at.
    """
    index, shards = find_shards(Path(directory))
    wanted, loaded = dict(model.named_parameters()), {}
    is_meta = str(device) == "meta"

    def read(file, key):
        shape = file.get_slice(key).get_shape()
        return torch.empty(shape, device=device) if is_meta else file.get_tensor(key)

    for path in shards:
        try:
            with safe_open(path, framework="pt", device="cpu" if is_meta else str(device)) as file:
                for key in file.keys():
                    names = rename(key)
                    for name, part in zip(names, read(file, key).chunk(len(names)) if names else []):
                        check_tensor(path, key, name, part.shape, wanted, loaded)
                        loaded[name] = part.to(dtype)
        except (OSError, SafetensorError) as e:
            raise InputError(f"{path}: missing, damaged or truncated ({e}); download it again") from None
    if missing := wanted.keys() - loaded.keys():
        raise InputError(f"{index}: {len(missing)} tensors are missing, e.g. {min(missing)}")
    # strict=False, since the checks above know of tied weights and load_state_dict() does not
    model.load_state_dict(loaded, strict=False, assign=True)


def find_shards(directory):
    """-> the file that lists the weights of a folder, and the files that hold them, one or several."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.exists():
        names = get_field(read_json(index, dict), "weight_map", index, dict).values()
        for name in names:  # of files of this folder
            if not re.fullmatch(r"[\w.-]+\.safetensors", check(name, f"{index}: a name of weight_map", str)):
                raise InputError(f"{index}: {name!r} in weight_map is no name of the hub; load it anew")
        return index, [directory / name for name in sorted(set(names))]
    if single.exists():
        return single, [single]
    raise InputError(f"{directory}: neither {single.name} nor {index.name}; download the weights there")


def check_tensor(path, key, name, shape, wanted, loaded):
    """InputError if a tensor of a file has no place in the network, or another shape than it has there."""
    if name not in wanted or name in loaded:
        raise InputError(f"{path}: unexpected tensor {key}; is config.json the one of these weights?")
    if shape != wanted[name].shape:
        raise InputError(
            f"{path}: {key} has shape {tuple(shape)}, config.json asks for {tuple(wanted[name].shape)}")
