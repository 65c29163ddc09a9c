"""The LLaMA-3.1 decoder, from token embeddings to hidden states, and the strict loader of published weights.

Follows "The Llama 3 Herd of Models" and the layout of the Hugging Face hub: config.json, one or many *.safetensors. The same
code runs every Llama-shaped model of the paper's Table 4: Llama-3.1-8B, Llama-3.2-1B, Mistral-7B-v0.3, Vicuna-7B-v1.5.

    x -> [ x + attention(norm(x)) -> x + mlp(norm(x)) ] * n_layers -> norm -> lm_head

Letters in shape comments: B rows, T new positions, S positions seen (cached + new), D width, H query heads, G key/value
heads, d width of a head.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint


class InputError(Exception):
    """Something the user can mend: a one-line message that says what, where and what to do. Programs exit with code 2."""


@dataclass(frozen=True)
class LlamaConfig:
    """The defaults are Llama-3.1-8B; names as in config.json."""

    vocab_size: int = 128256
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    rope: dict = field(default_factory=lambda: dict(
        rope_theta=500000.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192))

    @classmethod
    def from_json(cls, path):
        raw = read_json(path, dict)
        if raw.get("model_type") not in ("llama", "mistral") or raw.get("sliding_window"):
            raise InputError(f"{path}: model_type {raw.get('model_type')!r} is not a Llama-shaped model without sliding window")
        # newer files keep everything about RoPE in rope_parameters, older ones in rope_theta and rope_scaling
        rope = {"rope_theta": raw.get("rope_theta", 10000.0), **(raw.get("rope_scaling") or {}),
                **(raw.get("rope_parameters") or {})}
        if rope.setdefault("rope_type", rope.get("type", "default")) not in ("default", "llama3"):
            raise InputError(f"{path}: rope_type {rope['rope_type']!r} is not supported, only default and llama3")
        known = {k: v for k, v in raw.items() if k in cls.__dataclass_fields__ and v is not None}
        needed = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
        if rope["rope_type"] == "llama3":
            needed |= cls().rope.keys()
        if missing := needed - known.keys() - rope.keys():
            raise InputError(f"{path}: {min(missing)} is missing")
        known.setdefault("num_key_value_heads", raw["num_attention_heads"])
        known.setdefault("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
        return cls(**{"tie_word_embeddings": False, **known, "rope": rope})


def rope_frequencies(config, device=None):
    """Radians per position of each pair of dimensions: (d/2,), fp32.

    Llama 3.1 was trained on 8,192 positions and stretched to 131,072: waves longer than original/low_freq_factor positions are
    slowed by `factor`, waves shorter than original/high_freq_factor stay, those between are blended.
    """
    r, d = config.rope, config.head_dim
    freq = 1 / r["rope_theta"] ** (torch.arange(0, d, 2, device=device).float() / d)
    if r["rope_type"] == "llama3":
        turns = r["original_max_position_embeddings"] * freq / (2 * math.pi)  # within the original context
        keep = ((turns - r["low_freq_factor"]) / (r["high_freq_factor"] - r["low_freq_factor"])).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / r["factor"]
    return freq


def rotate(x, cos, sin):
    """Applies RoPE. x (B, heads, T, d); cos, sin (B or 1, 1, T, d/2).

    Dimension i is paired with i + d/2: the hub's weights are stored for this order, Meta's own files for (2i, 2i + 1).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share G key/value heads, which makes the cache H/G times smaller."""

    def __init__(self, c):
        super().__init__()
        self.d = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x, cos, sin, mask, past):
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.d).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, H, T, d), (B, G, T, d)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)  # (B, G, S, d)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1)), (k, v)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, mask, past, unpadded=None):
        attended, kv = self.self_attn(self.input_layernorm(x), cos, sin, mask, past)
        x = x + attended
        if unpadded is None:
            return x + self.mlp(self.post_attention_layernorm(x)), kv
        flat = x.flatten(0, 1)  # (B * T, D), the same memory
        flat[unpadded] += self.mlp(self.post_attention_layernorm(flat[unpadded]))
        return x, kv


class Llama(nn.Module):
    """Names of modules as in the hub's files, less the leading "model."."""

    def __init__(self, config=LlamaConfig()):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.checkpoint_activations = False  # keep a block's input only and compute the rest again in the backward pass

    def forward(self, x, positions=None, mask=None, past=None, unpadded=None):
        """x (B, T, D) embeddings -> hidden states (B, T, D) and the cache, a list of (k, v) per layer, each (B, G, S, d).

        positions (B, T), by default 0..T-1; mask (B, 1, T, S), true where a query may look. Without a mask attention is
        causal, which is right only without a cache: SDPA's is_causal lines up the first query with the first key.
        unpadded: indices into B * T of all that is not padding; the MLPs, four fifths of the work, then skip the rest.
        lm_head is left to the caller, since logits are wanted at few positions and cost a vocabulary each.
        """
        x = x.to(self.norm.weight.dtype)  # embeddings that train are fp32
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        angles = positions[:, None, :, None] * rope_frequencies(self.config, x.device)  # (B, 1, T, d/2), fp32
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        cache = []
        for i, layer in enumerate(self.layers):
            if self.checkpoint_activations and torch.is_grad_enabled() and not past:
                x, kv = checkpoint(layer, x, cos, sin, mask, None, use_reentrant=False)
            else:
                x, kv = layer(x, cos, sin, mask, past[i] if past else None, unpadded)
            cache.append(kv)
        return self.norm(x), cache

    @classmethod
    def load(cls, directory, dtype=torch.float32, device="cpu"):
        """Reads DIR/config.json and DIR/*.safetensors. InputError names the file and tensor at fault."""
        config = LlamaConfig.from_json(Path(directory) / "config.json")
        with torch.device("meta"):
            model = cls(config)
        skip = ("rotary_emb.inv_freq", "lm_head.weight") if config.tie_word_embeddings else ("rotary_emb.inv_freq",)
        load_weights(model, directory, lambda key: [] if key.endswith(skip) else [key.removeprefix("model.")], dtype, device)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        return model


def read_json(path, kind=object):
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, kind):
            raise ValueError(f"it holds a {type(content).__name__}, not a {kind.__name__}")
        return content
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read as JSON ({e})") from None


def load_weights(model, directory, rename, dtype, device):
    """Fills `model`, built on the meta device, from the safetensors of a hub-style directory. Strict: each tensor exactly once.

    rename(key) gives the model's names for a file's tensor: none (not needed), one, or several (fused rows, cut in equal parts).
    Each tensor goes to its device and type before the next is read, so host memory never holds more than one shard beyond the model.
    """
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        shards = sorted(set(read_json(index, dict).get("weight_map", {}).values()))
        if not shards:
            raise InputError(f"{index}: has no weight_map; download it again")
    elif (directory / "model.safetensors").exists():
        shards = ["model.safetensors"]
    else:
        raise InputError(f"{directory}: neither model.safetensors nor model.safetensors.index.json; download the weights there")
    wanted = dict(model.named_parameters())
    loaded = {}
    for shard in shards:
        path = directory / shard
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for key in file.keys():
                    names = rename(key)
                    for name, part in zip(names, file.get_tensor(key).chunk(max(len(names), 1))):
                        if name not in wanted or name in loaded:
                            raise InputError(f"{path}: unexpected tensor {key}; is config.json the one of these weights?")
                        if part.shape != wanted[name].shape:
                            raise InputError(f"{path}: {key} has shape {tuple(part.shape)}, config.json asks for "
                                             f"{tuple(wanted[name].shape)}")
                        loaded[name] = part.to(dtype)
        except (OSError, SafetensorError) as e:
            raise InputError(f"{path}: missing, damaged or truncated ({e}); download it again") from None
    if missing := wanted.keys() - loaded.keys():
        raise InputError(f"{index if index.exists() else path}: {len(missing)} tensors are missing, e.g. {min(missing)}")
    model.load_state_dict(loaded, strict=False, assign=True)  # strict by the checks above, which know of tied weights
