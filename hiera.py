"""Hiera: a hierarchical vision transformer without the bells and whistles (Ryali et al., 2023), the other eye of the paper's Table 4.

    photo (224 x 224) -> 56 x 56 patches that overlap, + positions: 7 x 7 mask units of 8 x 8 tokens
                      -> [ x + attention(norm1(x)) -> x + mlp(norm2(x)) ] * (2 + 6 + 36 + 4) -> a token for each unit, row by row

Plain blocks in four stages. Each stage but the first opens by pooling 2 x 2 tokens into one and doubling the width, until a mask unit
is one token: 49 image tokens where DINOv2 has 256. While there are many tokens, each attends within its mask unit only; later to all.

The trick is the order of the tokens: unit by unit, and within a unit along a Z-shaped curve,

     0  1  4  5 | 16 17 ..      so that a mask unit is 64 tokens in a row, and 2 x 2 neighbours are 4 in a row. Once those are
     2  3  6  7 | 18 19 ..      pooled, the tokens left are again in this order: a unit 16 in a row, neighbours 4 in a row.
     8  9 12 13 | 24 25 ..
    10 11 14 15 | 26 27 ..

Reads the hub's files (facebook/hiera-large-224-hf and its sisters); q, k and v are separate layers here, since LoRA goes on q and v.
Letters: B photos, N tokens, D width, H heads, U mask units in a row, S tokens that attend to each other.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from llama import InputError, load_weights, read_json

# What all published Hieras for photos have in common.
COMMON = dict(patch_size=[7, 7], patch_stride=[4, 4], patch_padding=[3, 3], num_channels=3, hidden_act="gelu", embed_dim_multiplier=2,
              masked_unit_size=[8, 8], masked_unit_attention=[True, True, False, False], num_query_pool=3, query_stride=[2, 2])


@dataclass(frozen=True)
class HieraConfig:
    """The defaults are Hiera-L; names as in config.json."""

    embed_dim: int = 144
    depths: tuple = (2, 6, 36, 4)
    num_heads: tuple = (2, 4, 8, 16)
    mlp_ratio: float = 4
    layer_norm_eps: float = 1e-6
    image_size: tuple = (224, 224)

    @classmethod
    def from_json(cls, path):
        raw = read_json(path, dict)
        for key, value in dict(model_type="hiera", **COMMON).items():
            if raw.get(key, COMMON.get(key)) != value:
                raise InputError(f"{path}: {key} is {raw.get(key)!r}, not {value!r} as in the published Hieras")
        return cls(**{k: v for k, v in raw.items() if k in cls.__dataclass_fields__})

    @property
    def hidden_size(self):
        """Of the image tokens: doubled three times."""
        return self.embed_dim * 8

    @property
    def units(self):
        """Mask units side by side; each is 8 patches of 4 pixels wide."""
        return self.image_size[0] // 32


def pool(x):
    """The maximum of 2 x 2 neighbours, channel by channel: (B, N, D) -> (B, N/4, D)."""
    return x.unflatten(1, (-1, 4)).amax(2)


class Attention(nn.Module):
    """Among the S tokens of a mask unit or of the whole photo. With pooled queries there are a quarter as many outputs."""

    def __init__(self, width_in, width, n_heads, S, pools):
        super().__init__()
        self.n_heads, self.S, self.pools = n_heads, S, pools
        self.q, self.k, self.v = (nn.Linear(width_in, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        units = x.reshape(-1, self.S, x.shape[2])  # (B U U, S, D), or (B, N, D) as it was
        q, k, v = self.q(units), self.k(units), self.v(units)
        if self.pools:
            q = pool(q)
        q, k, v = (y.unflatten(2, (self.n_heads, -1)).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (.., H, S or S/4, D/H) -> (.., S or S/4, D)
        return self.proj(y).reshape(len(x), -1, y.shape[2])


class Block(nn.Module):
    def __init__(self, c, stage, pools):
        super().__init__()
        before = stage - pools  # a block that pools receives the tokens of the stage before, and attends as is done there
        width_in, width = (c.embed_dim * 2**s for s in (before, stage))
        S = 64 // 4**before * (1 if before < 2 else c.units**2)
        self.norm1 = nn.LayerNorm(width_in, c.layer_norm_eps)
        self.attn = Attention(width_in, width, c.num_heads[stage], S, pools)
        self.proj = nn.Linear(width_in, width) if pools else None
        self.norm2 = nn.LayerNorm(width, c.layer_norm_eps)
        self.fc1 = nn.Linear(width, int(width * c.mlp_ratio))
        self.fc2 = nn.Linear(int(width * c.mlp_ratio), width)

    def forward(self, x):
        y = self.norm1(x)
        if self.proj is not None:  # the residual is pooled too, and starts from the normed tokens
            x = pool(self.proj(y))
        x = x + self.attn(y)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Hiera(nn.Module):
    def __init__(self, config=HieraConfig()):
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv2d(3, config.embed_dim, kernel_size=7, stride=4, padding=3)
        self.pos_embed = nn.Parameter(torch.zeros(1, (8 * config.units) ** 2, config.embed_dim))
        self.blocks = nn.ModuleList(Block(config, stage, pools=stage > 0 and i == 0)
                                    for stage, depth in enumerate(config.depths) for i in range(depth))

    def forward(self, images):
        """Normalised photos (B, 3, h, w) of the config's size -> image tokens (B, U U, 8 D), row by row, without a final norm."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed  # (B, N, D), row by row
        U = self.config.units
        x = x.unflatten(1, (U, 2, 2, 2, U, 2, 2, 2))  # a row's unit, and its half, quarter and eighth of it; then a column's
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4, 8, 9).flatten(1, 8)  # (B, N, D) in the order above
        for block in self.blocks:
            x = block(x)
        return x

    @property
    def n_patches(self):
        return self.config.units**2

    @classmethod
    def load(cls, directory, image_size=224, dtype=torch.float32, device="cpu"):
        """Reads DIR/config.json and DIR/model.safetensors. InputError names the file and tensor at fault."""
        config = HieraConfig.from_json(Path(directory) / "config.json")
        if [image_size] * 2 != list(config.image_size):
            raise InputError(f"image size {image_size} is not the {' x '.join(map(str, config.image_size))} of {directory}")
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, directory, lambda key: rename(key, config.depths), dtype, device)
        return model


# The heads of the hub's three kinds of Hiera: HieraModel's pooler norms the mean of the image tokens, which themselves it gives
# as they are; an image classifier's last layer; and what masked autoencoding needs.
HEADS = "pooler.layernorm.", "classifier.", "encoder_norm.", "multiscale_fusion.multi_scale_fusion_heads.", "decoder."
RENAMES = [("embeddings.patch_embeddings.projection.", "patch_embed."), ("embeddings.position_embeddings", "pos_embed"),
           ("layernorm_before.", "norm1."), ("layernorm_after.", "norm2."), ("mlp.", "")]


def rename(key, depths):
    """A tensor's name in a file -> its names here: one, none for those of the heads, three for the fused qkv."""
    key = key.removeprefix("hiera.")
    if key.startswith(HEADS):
        return []
    for theirs, ours in RENAMES:
        key = key.replace(theirs, ours)
    # blocks are counted anew in each stage there, and through all stages here
    key = re.sub(r"^encoder\.stages\.(\d+)\.layers\.(\d+)", lambda m: f"blocks.{sum(depths[:int(m[1])]) + int(m[2])}", key)
    return [key.replace("attn.qkv", f"attn.{x}") for x in "qkv"] if "attn.qkv" in key else [key]
