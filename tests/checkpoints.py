"""Tiny random networks in the hub's layout, and ways to spoil them."""

import json

import torch
from safetensors.torch import load_file, save_file

LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=8192)
LLAMA = dict(
    kind="LlamaForCausalLM", vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=131072, max_shard_size="64KB",
    rope_parameters=dict(LLAMA3, factor=8.0))
VIT = dict(kind="Dinov2Model", hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=70,
           layer_norm_eps=1e-2)


@torch.no_grad()
def save_random(directory, kind, max_shard_size="5GB", **config):
    """Written by Transformers itself, so that names, shards and config.json are what a user downloads."""
    import transformers

    kind = getattr(transformers, kind)
    torch.manual_seed(1)
    network = kind(kind.config_class(**config)).eval()
    for name, p in network.named_parameters():  # no parameter is left at 0 or 1, where it would not matter
        mean = float(p.ndim == 1 and "bias" not in name)
        std = {1: 0.3, 3: 1}.get(p.ndim, p[0].numel() ** -0.5)
        p.normal_(mean, std)
    network.save_pretrained(directory, max_shard_size=max_shard_size)
    return network


def edit_config(**change):
    """-> a function that changes values in a folder's config.json."""
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
    return edit


def edit_weights(file="model.safetensors", **change):
    """-> a function that puts tensors into a folder's file, or drops them where None is given."""
    def edit(folder):
        tensors = load_file(folder / file) | change
        tensors = {key: tensor.clone() for key, tensor in tensors.items() if tensor is not None}
        save_file(tensors, folder / file)
    return edit
