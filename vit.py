"""DINOv2, the vision transformer that is CapeLLM's eye (paper, section 3.1, equation 1).

    photo (224 x 224) -> a grid of 16 x 16 patches -> [class token, patches] + positions, then registers
        -> [ x + ls1 * attention(norm1(x)) -> x + ls2 * mlp(norm2(x)) ] * n_layers -> norm -> the patch tokens

It follows Oquab et al., 2024 (registers: Darcet et al., 2024), and reads the hub's files, with tensors named
as there or as in the original release. Names here are the latter's, but q, k and v are separate, for LoRA.
This file needs no other. Letters: B photos, N patches, T tokens (class token, registers and patches), D
width, H heads. `python vit.py` shows the shapes of a small one.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn


@dataclass(frozen=True)
class ViTConfig:
    """The defaults are DINOv2 ViT-L/14; names as in config.json."""

    hidden_size: int = 1024  # D, numbers that stand for a patch
    num_hidden_layers: int = 24
    num_attention_heads: int = 16  # H
    mlp_ratio: float = 4  # width of the MLP / D
    layer_norm_eps: float = 1e-6  # keeps LayerNorm from dividing by 0
    image_size: int = 518  # pixels a side of the photos of pre-training
    patch_size: int = 14  # pixels a side of a patch
    use_swiglu_ffn: bool = False  # whether the MLP is a SwiGLU, as in ViT-g
    num_register_tokens: int = 0  # tokens without a place, in which the network may keep notes


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_heads = c.num_attention_heads
        self.q, self.k, self.v, self.proj = (nn.Linear(c.hidden_size, c.hidden_size) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, T, D/H)
                   for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1 = nn.Linear(c.hidden_size, int(c.hidden_size * c.mlp_ratio))
        self.fc2 = nn.Linear(int(c.hidden_size * c.mlp_ratio), c.hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    def __init__(self, c):
        super().__init__()
        # as there are three matrices, their width is two thirds of the usual, in multiples of 8
        width = (int(int(c.hidden_size * c.mlp_ratio) * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(c.hidden_size, 2 * width)
        self.w3 = nn.Linear(width, c.hidden_size)

    def forward(self, x):
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.attn = Attention(c)
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(c.hidden_size)})  # LayerScale, for each channel
        self.norm2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.mlp = SwiGLU(c) if c.use_swiglu_ffn else MLP(c)
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(c.hidden_size)})

    def forward(self, x):
        x = x + self.ls1["gamma"] * self.attn(self.norm1(x))
        return x + self.ls2["gamma"] * self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, config=ViTConfig()):
        super().__init__()
        self.config = config
        D, p, n_registers = config.hidden_size, config.patch_size, config.num_register_tokens
        self.patch_embed = nn.Conv2d(3, D, kernel_size=p, stride=p)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.register_tokens = nn.Parameter(torch.zeros(1, n_registers, D)) if n_registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (config.image_size // p) ** 2, D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(D, config.layer_norm_eps)

    def forward(self, images):
        """Normalised photos (B, 3, h, w) of load()'s image_size -> patch tokens (B, N, D), row by row."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, N, D)
        x = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1) + self.pos_embed
        if self.register_tokens is not None:  # they have no position
            registers = self.register_tokens.expand(len(x), -1, -1)
            x = torch.cat((x[:, :1], registers, x[:, 1:]), dim=1)  # (B, T, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1 + self.config.num_register_tokens:]

    @property
    def n_patches(self):
        return self.pos_embed.shape[1] - 1

    @torch.no_grad()
    def resize_positions(self, image_size):
        """Fits the position table, learned for 518 pixels (37 x 37 patches), to photos of another size.

        Bicubic, as in the original release: with registers to n x n patches, antialiased; without them by a
        factor of (n + 0.1) / 37. The 0.1 once guarded against a rounding error; without it, as in
        Transformers, patch tokens change slightly.
        """
        old, new = math.isqrt(self.n_patches), image_size // self.config.patch_size
        if old == new:
            return
        cls, table = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        table = table.float().unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, D, 37, 37)
        if self.config.num_register_tokens:
            table = F.interpolate(table, size=(new, new), mode="bicubic", antialias=True)
        else:
            table = F.interpolate(table, scale_factor=((new + 0.1) / old,) * 2, mode="bicubic")
        table = table.permute(0, 2, 3, 1).flatten(1, 2).to(cls.dtype)
        self.pos_embed = nn.Parameter(torch.cat((cls, table), dim=1))

    @classmethod
    def load(cls, directory, image_size=224, dtype=torch.float32, device="cpu"):
        """Reads DIR/config.json and DIR/model.safetensors, strictly. image_size: of the photos, in pixels."""
        config = read_config(Path(directory, "config.json"))
        if image_size % config.patch_size:
            raise ValueError(f"image size {image_size} is not a multiple of patch size {config.patch_size}")
        with torch.device("meta"):  # where sizes are computed and nothing else
            model = cls(config)
            model(torch.empty(1, 3, config.image_size, config.image_size))  # wrong settings show here
        state = {}
        with safe_open(Path(directory, "model.safetensors"), framework="pt", device=str(device)) as file:
            for key in file.keys():
                if names := rename(key):
                    state |= dict(zip(names, file.get_tensor(key).to(dtype).chunk(len(names))))
        model.load_state_dict(state, strict=True, assign=True)
        model.resize_positions(image_size)
        return model


def read_config(path):
    """A config.json of the hub -> ViTConfig. ValueError if it is of another network."""
    raw = json.loads(Path(path).read_text())
    if raw["model_type"] not in ("dinov2", "dinov2_with_registers"):
        raise ValueError(f"model_type {raw['model_type']} is not dinov2 or dinov2_with_registers")
    fields = {key: raw[key] for key in ViTConfig.__dataclass_fields__ if key in raw}
    # required, since with a wrong number of heads all shapes would still fit
    return ViTConfig(**fields | {"num_attention_heads": raw["num_attention_heads"]})


RENAMES = [  # from the hub's names, and in the last pair from the original release's; replaced in this order
    ("embeddings.patch_embeddings.projection.", "patch_embed."),
    ("embeddings.position_embeddings", "pos_embed"), ("embeddings.", ""), ("encoder.layer.", "blocks."),
    ("attention.attention.query", "attn.q"), ("attention.attention.key", "attn.k"),
    ("attention.attention.value", "attn.v"), ("attention.output.dense", "attn.proj"),
    ("layer_scale1.lambda1", "ls1.gamma"), ("layer_scale2.lambda1", "ls2.gamma"),
    ("mlp.weights_in", "mlp.w12"), ("mlp.weights_out", "mlp.w3"),
    ("layernorm.", "norm."), ("patch_embed.proj.", "patch_embed.")]


def rename(key):
    """A tensor's name in a file -> its names here: none for the mask token, three for a fused qkv."""
    for theirs, ours in RENAMES:
        key = key.replace(theirs, ours)
    if key == "mask_token":
        return []
    return [key.replace("attn.qkv", f"attn.{x}") for x in "qkv"] if "attn.qkv" in key else [key]


if __name__ == "__main__":
    vit = ViT.load(Path(__file__).parent / "assets/toy/vit", image_size=112)
    photo = torch.zeros(1, 3, 112, 112)
    print(f"photo {tuple(photo.shape)} -> patches {tuple(vit.patch_embed(photo).shape)} "
          f"-> patch tokens {tuple(vit(photo).shape)}")
    vit.resize_positions(224)
    print(f"for photos of 224 pixels the position table grows to {tuple(vit.pos_embed.shape)}")
