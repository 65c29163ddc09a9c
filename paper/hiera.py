"""Hiera, a vision transformer in four stages, the other eye of the paper's Table 4 (Ryali et al., 2023).

    photo (224 x 224) -> 56 x 56 patches that overlap + positions
        -> [ x + attention(norm1(x)) -> x + mlp(norm2(x)) ] * (2 + 6 + 36 + 4) -> 7 x 7 image tokens

Stages 2, 3 and 4 open with a block that pools 2 x 2 tokens into one and doubles the width. So 49 image tokens
are left, where DINOv2 has 256.

Attention from each of 3,136 patches to all others would be slow. So the photo is divided into 7 x 7 squares
of 8 x 8 patches, called mask units because pre-training hides whole ones. In the first two stages a token
attends only to its own unit, later to the whole photo. At the end each unit is one token.

The trick is the order of the tokens: unit by unit, and within a unit along a Z-shaped curve,

     0  1  4  5 | 16 17 ..      A unit is 64 tokens in a row, and 2 x 2 neighbours are 4 in a row,
     2  3  6  7 | 18 19 ..      so both are found by a reshape.
     8  9 12 13 | 24 25 ..      Pooling keeps the order: a unit is then 16 in a row, 2 x 2 neighbours 4.
    10 11 14 15 | 26 27 ..

It reads the hub's files (facebook/hiera-large-224-hf and its sisters). q, k and v are separate layers here,
since LoRA goes on q and v. This file needs no other. Letters: B photos, N tokens, D width, H heads, U mask
units side by side, S tokens that attend to each other. `python -m paper.hiera` shows shapes.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn


@dataclass(frozen=True)
class HieraConfig:
    """The defaults are Hiera-L; names as in config.json."""

    embed_dim: int = 144  # numbers that stand for a patch; twice as many with each stage
    depths: tuple = (2, 6, 36, 4)  # blocks of each stage
    num_heads: tuple = (2, 4, 8, 16)  # H of each stage
    mlp_ratio: float = 4  # width of the MLP / D
    layer_norm_eps: float = 1e-6  # keeps LayerNorm from dividing by 0
    image_size: tuple = (224, 224)  # pixels of the photos

    @property
    def hidden_size(self):
        """The width of the image tokens: three stages double it."""
        return self.embed_dim * 8

    @property
    def units(self):
        """How many mask units lie side by side; each is 8 patches wide, a patch every 4 pixels."""
        return self.image_size[0] // 32


def pool(x):
    """The maximum of 2 x 2 neighbours, channel by channel: (B, N, D) -> (B, N/4, D)."""
    return x.unflatten(1, (-1, 4)).amax(2)


def order_by_unit(x, U):
    """Puts the tokens of U x U mask units, (B, N, D) row by row, into the order at the top."""
    # Each row and column is split into its unit, then its half, quarter and eighth of the unit.
    x = x.unflatten(1, (U, 2, 2, 2, U, 2, 2, 2))
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4, 8, 9).flatten(1, 8)


class Attention(nn.Module):
    """Attention among the S tokens of a mask unit or of the whole photo.

    pools: 2 x 2 queries are pooled into one, so a quarter of the tokens comes out.
    """

    def __init__(self, width_in, width, n_heads, S, pools):
        super().__init__()
        self.n_heads, self.S, self.pools = n_heads, S, pools
        self.q, self.k, self.v = (nn.Linear(width_in, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        units = x.reshape(-1, self.S, x.shape[2])  # (B U U, S, D); (B, N, D) if S is the whole photo
        q, k, v = self.q(units), self.k(units), self.v(units)
        if self.pools:
            q = pool(q)
        q, k, v = (y.unflatten(2, (self.n_heads, -1)).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)  # (B U U, H, S, D/H); S/4 if the queries are pooled
        y = self.proj(y.transpose(1, 2).flatten(2))  # (B U U, S, D)
        return y.reshape(len(x), -1, y.shape[2])  # (B, N, D)


class Block(nn.Module):
    def __init__(self, c, stage, pools):
        super().__init__()
        before = stage - pools  # a block that pools still attends among the tokens of the stage before
        width_in, width = (c.embed_dim * 2**s for s in (before, stage))
        S = 64 // 4**before  # tokens left of a mask unit
        if before >= 2:  # attention to the whole photo
            S *= c.units**2
        self.norm1 = nn.LayerNorm(width_in, c.layer_norm_eps)
        self.attn = Attention(width_in, width, c.num_heads[stage], S, pools)
        self.proj = nn.Linear(width_in, width) if pools else None
        self.norm2 = nn.LayerNorm(width, c.layer_norm_eps)
        self.fc1 = nn.Linear(width, int(width * c.mlp_ratio))
        self.fc2 = nn.Linear(int(width * c.mlp_ratio), width)

    def forward(self, x):
        y = self.norm1(x)
        if self.proj is not None:  # the shortcut shrinks too; Hiera pools the normed tokens for it
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
        """Normalised photos (B, 3, h, w) -> image tokens (B, U U, 8 D), row by row.

        h and w are the config's, since the position table is not resized. There is no final norm: the image
        tokens of the published networks have none either.
        """
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed  # (B, N, D), row by row
        x = order_by_unit(x, self.config.units)
        for block in self.blocks:
            x = block(x)
        return x

    @property
    def n_patches(self):
        return self.config.units**2

    @classmethod
    def load(cls, directory, image_size=224, dtype=torch.float32, device="cpu"):
        """Reads DIR/config.json and DIR/model.safetensors. Strict: torch names a missing or misshapen tensor.

        image_size: pixels a side of the photos. ValueError if the network is for others.
        """
        directory = Path(directory)
        config = read_config(directory / "config.json")
        if [image_size] * 2 != list(config.image_size):
            raise ValueError(f"image size {image_size} is not the network's, {config.image_size}")
        with torch.device("meta"):
            model = cls(config)
        state = {}
        with safe_open(directory / "model.safetensors", framework="pt", device=str(device)) as file:
            for key in file.keys():
                names = rename(key, config.depths)
                for name, part in zip(names, file.get_tensor(key).to(dtype).chunk(max(1, len(names)))):
                    state[name] = part
        model.load_state_dict(state, strict=True, assign=True)
        return model


# -------------------------------------------------------------------------------------------- the hub's files

# What all published Hieras for photos have in common, and no shape of a tensor tells.
PUBLISHED = dict(
    patch_stride=[4, 4], patch_padding=[3, 3], hidden_act="gelu", masked_unit_size=[8, 8],
    masked_unit_attention=[True, True, False, False], num_query_pool=3, query_stride=[2, 2])


def read_config(path):
    """A config.json of the hub -> HieraConfig. ValueError if it is not like the published ones."""
    raw = json.loads(Path(path).read_text())
    for key, value in {"model_type": "hiera", **PUBLISHED}.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{key} is {raw[key]!r}, not {value!r} as in the published Hieras")
    fields = {key: raw[key] for key in HieraConfig.__dataclass_fields__ if key in raw}
    return HieraConfig(**fields | {"num_heads": raw["num_heads"]})  # no shape tells it


# What files hold beyond the image tokens, by the hub's three kinds of Hiera.
HEADS = (
    "pooler.layernorm.",  # HieraModel: a norm of the mean of all image tokens
    "classifier.",  # HieraForImageClassification
    "encoder_norm.", "multiscale_fusion.multi_scale_fusion_heads.", "decoder.")  # HieraForPreTraining

# The hub's names -> ours.
RENAMES = [
    ("embeddings.patch_embeddings.projection.", "patch_embed."),
    ("embeddings.position_embeddings", "pos_embed"),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("mlp.", ""),
]


def rename(key, depths):
    """A tensor's name in a file -> its names here: one, none if it is a head's, three for a fused qkv."""
    key = key.removeprefix("hiera.")
    if key.startswith(HEADS):
        return []
    for theirs, ours in RENAMES:
        key = key.replace(theirs, ours)

    def number(match):  # the hub counts blocks anew in each stage, we count them through
        stage, layer = int(match[1]), int(match[2])
        return f"blocks.{sum(depths[:stage]) + layer}"

    key = re.sub(r"^encoder\.stages\.(\d+)\.layers\.(\d+)", number, key)
    return [key.replace("attn.qkv", f"attn.{x}") for x in "qkv"] if "attn.qkv" in key else [key]


if __name__ == "__main__":
    hiera = Hiera(HieraConfig(embed_dim=16, depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 8), image_size=(96, 96)))
    places = order_by_unit(torch.arange(576).view(1, 576, 1), hiera.config.units).flatten().argsort()
    print(f"96 x 96 pixels, 24 x 24 patches; their order begins\n{places.view(24, 24)[:4, :12].numpy()}")
    with torch.no_grad():
        x = torch.rand(1, 576, 16)
        for number, block in enumerate(hiera.blocks):
            before, x = x, block(x)
            reach = "the whole photo" if block.attn.S == before.shape[1] else "its mask unit"
            print(f"block {number}: {tuple(before.shape)} -> {tuple(x.shape)}, a token attends to {reach}")
