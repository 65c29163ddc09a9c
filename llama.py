"""The LLaMA-3.1 decoder: from token embeddings to hidden states (paper, section 3.1, equation 4).

Follows "The Llama 3 Herd of Models" and the layout of the Hugging Face hub: config.json, *.safetensors. The
same code runs every Llama-shaped model of the paper's Table 4: Llama-3.1-8B, Llama-3.2-1B, Mistral-7B-v0.3
and Vicuna-7B-v1.5.

    x -> [ x + attention(norm(x)) -> x + mlp(norm(x)) ] * n_layers -> norm -> lm_head

Letters in shape comments: B rows, T new positions, S positions seen (cached and new), D width, H query heads,
G key/value heads, d width of a head. `python llama.py` shows the shapes of a small one.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import InputError, check, get_field, read_json
from weights import load_weights


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


def rope_frequencies(config, device=None):
    """How far RoPE turns each pair of dimensions from one position to the next: (d/2,), radians, fp32.

    Llama 3.1 was trained on 8,192 positions and then stretched to 131,072. Pairs that turn fewer than
    low_freq_factor times within the original 8,192 positions are slowed down by `factor`; pairs that turn
    more than high_freq_factor times stay as they are; those between are blended.
    """
    r, d = config.rope, config.head_dim
    freq = 1 / r["rope_theta"] ** (torch.arange(0, d, 2, device=device).float() / d)
    if r["rope_type"] == "llama3":
        turns = r["original_max_position_embeddings"] * freq / (2 * math.pi)
        keep = ((turns - r["low_freq_factor"]) / (r["high_freq_factor"] - r["low_freq_factor"])).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / r["factor"]
    return freq


def rotate(x, cos, sin):
    """Turns queries or keys by their positions' angles. x (B, heads, T, d); cos, sin (B or 1, 1, T, d/2).

    Which two dimensions form a pair is a convention of the weights. The hub's weights, and this code, pair
    dimension i with i + d/2; Meta's own files pair neighbours:

        hub   a0 a1 a2 a3 | b0 b1 b2 b3      (a0, b0) is one pair, (a1, b1) the next
        Meta  a0 b0 a1 b1   a2 b2 a3 b3
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


# Three arguments below, `prefix`, `real` and `wanted`, only save work. A first reading may take them for
# None: what remains is the textbook's decoder. For example, four questions a to d about two photos, p and q:
#
#     prefix         rows                         x, with `real`                  the result, with `wanted`
#
#     p p p p p p    a a a a a   continues p     a a a a a b b c c c d d d d     a b c d
#     q q q q q q    b b - - -   continues p     (N = 14, D)                     (the last token of each row)
#                    c c c - -   continues q
#                    d d d d -   continues q
#
# prefix: keys and values of a photo are kept once, and rows that continue it share them.
# real: only attention needs rows of one length, (B, T). All other layers treat each token by itself; they get
#     a list of the N tokens that are no padding. `real` is where in the rows these are: (rows, columns).
# wanted: an index of the tokens, in x as it is given, whose hidden states the caller needs. For the rest, the
#     last layer computes only keys and values.


class Attention(nn.Module):
    """Grouped-query attention: H/G query heads share a key/value head, so the cache is H/G times smaller."""

    def __init__(self, c):
        super().__init__()
        self.d = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x, cos, sin, mask, past, prefix, real, wanted):
        """x (B, T, D) -> what is to be added to it (B, T, D), and the keys and values to cache.

        prefix, past: keys and values of what comes before, in this order; None if nothing does.
        """
        q, k, v = (pad(proj(x), real, mask).unflatten(-1, (-1, self.d)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, H, T, d), (B, G, T, d)
        cached = append(past, (k, v))
        k, v = append(prefix, cached)  # (B, G, S, d)
        y = attend(q, k, v, mask).transpose(1, 2).flatten(2)  # (B, T, H * d)
        return self.o_proj(pick(pick(y, real), wanted)), cached


def attend(q, k, v, mask):
    """Queries (B, H, T, d), keys and values (B, G, S, d) -> a weighted mean of values each, (B, H, T, d)."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    # The heads that share keys become one head with all their queries, so the keys are read once. For single
    # queries in bf16 on a CPU, with three heads a key, that takes a sixth of the time.
    shared = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (B, G, H/G * T, d)
    mask = mask.repeat(1, 1, q.shape[1] // k.shape[1], 1)  # (B, 1, H/G * T, S)
    return F.scaled_dot_product_attention(shared, k, v, mask).reshape(q.shape)


def append(before, new):
    """Keys and values (B, G, ..., d) of some positions, or None, and of those that follow -> of all."""
    return new if before is None else tuple(torch.cat(pair, dim=2) for pair in zip(before, new))


def pad(x, real, mask):
    """The inverse of x[real]: (N, width) -> (B, T, width), 0 where there is padding."""
    if real is None:
        return x
    B, _, T, _ = mask.shape
    padded = x.new_zeros(B, T, x.shape[-1])
    padded[real] = x
    return padded


def pick(x, index):
    return x if index is None else x[index]


class MLP(nn.Module):
    """SwiGLU: the gate decides, dimension by dimension, how much of `up` passes."""

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

    def forward(self, x, cos, sin, mask, past=None, prefix=None, real=None, wanted=None):
        """-> x after this layer, and the keys and values to cache."""
        y, cached = self.self_attn(self.input_layernorm(x), cos, sin, mask, past, prefix, real, wanted)
        x = pick(x, wanted) + y
        return x + self.mlp(self.post_attention_layernorm(x)), cached


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
        self.checkpoint_activations = False  # keep only block inputs, recompute the rest in the backward

    def forward(self, x, positions=None, mask=None, cache=None, *, prefix=None, real=None, wanted=None):
        """Embeddings x (B, T, D) -> hidden states (B, T, D).

        positions (B, T), by default 0 ... T-1. mask (B, 1, T, S), True where a query may look; by default
        attention is causal. Once anything is cached, both must be given, since SDPA would line up the first
        query with the first key.

        cache: {layer: (keys, values)}, each (B, G, slots, d), empty at first; every call appends to it.

        The vocabulary's logits are lm_head(hidden), left to the caller: they are wanted at few positions, and
        each costs a product with the whole vocabulary.

        The other arguments save work, see above Attention. prefix: (another cache, rows); row b continues
        that cache's row rows[b]. real: x and the result are (N, D). wanted: the result is hidden[wanted].
        """
        x = x.to(self.norm.weight.dtype)  # embeddings that train are fp32
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        angles = positions[:, None, :, None] * rope_frequencies(self.config, x.device)  # (B, 1, T, d/2), fp32
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for i, layer in enumerate(self.layers):
            before = None
            if prefix is not None:  # copied for each row, one layer at a time
                shared, rows = prefix
                before = [t[rows] for t in shared[i]]
            is_last = i == len(self.layers) - 1
            past = None if cache is None else cache.get(i)
            args = x, cos, sin, mask, past, before, real, wanted if is_last else None
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, cached = checkpoint(layer, *args, use_reentrant=False)
            else:
                x, cached = layer(*args)
            if cache is not None:  # replaced layer by layer, so that no more than one layer is held twice
                cache[i] = cached
        return self.norm(x)

    @classmethod
    def load(cls, directory, dtype=torch.float32, device="cpu"):
        """Reads DIR/config.json and DIR/*.safetensors. InputError names the file and tensor at fault."""
        config = read_llama_config(Path(directory) / "config.json")
        with torch.device("meta"):
            model = cls(config)
        unused = ["rotary_emb.inv_freq"]  # in old files; it follows from the config
        if config.tie_word_embeddings:
            unused.append("lm_head.weight")

        def rename(key):
            return [] if key.endswith(tuple(unused)) else [key.removeprefix("model.")]
        load_weights(model, directory, rename, dtype, device)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        return model


# ------------------------------------------------------------------------------------------------ config.json

# What a field of config.json may be: arguments of common.check(). No published model comes near the bounds.
FIELDS = dict(
    vocab_size=(int,), hidden_size=(int,), intermediate_size=(int,), num_hidden_layers=(int, 1, 200),
    num_attention_heads=(int, 1, 10000), num_key_value_heads=(int, 1, 10000), head_dim=(int, 1, 10000),
    rms_norm_eps=(float, 0, 1), tie_word_embeddings=(bool,))
ROPE = dict(
    rope_theta=(float, 1, 10**12), factor=(float,), low_freq_factor=(float,), high_freq_factor=(float,),
    original_max_position_embeddings=(int, 1, 10**9))


def read_llama_config(path):
    """A config.json of the hub -> LlamaConfig. InputError if the model is not Llama-shaped."""
    raw = read_json(path, dict)
    if raw.get("model_type") not in ("llama", "mistral") or raw.get("sliding_window"):
        raise InputError(f"{path}: model_type {raw.get('model_type')!r} is not a Llama-shaped model "
                         "without sliding window")
    rope = read_rope(raw, path)
    known = {k: v for k, v in raw.items() if k in LlamaConfig.__dataclass_fields__ and v is not None}
    needed = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    if rope["rope_type"] == "llama3":
        needed |= LlamaConfig().rope.keys()
    if missing := needed - known.keys() - rope.keys():
        raise InputError(f"{path}: {min(missing)} is missing")
    for key in known.keys() & FIELDS.keys():
        get_field(known, key, path, *FIELDS[key])
    known.setdefault("rms_norm_eps", 1e-6)  # what older files leave out is as in Transformers
    known.setdefault("num_key_value_heads", raw["num_attention_heads"])
    known.setdefault("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
    check_heads_and_rope(path, known, rope)
    return LlamaConfig(**{**known, "rope": rope})


def read_rope(raw, path):
    """What a config.json says of RoPE, in one dictionary. InputError if it is of a kind not known here."""
    # newer files keep everything about RoPE in rope_parameters, older ones in rope_theta and rope_scaling
    old, new = (check(raw.get(key) or {}, f"{path}: {key}", dict, 0)
                for key in ("rope_scaling", "rope_parameters"))
    rope = {"rope_theta": raw.get("rope_theta", 10000.0), **old, **new}
    if rope.setdefault("rope_type", rope.get("type", "default")) not in ("default", "llama3"):
        raise InputError(f"{path}: rope_type {rope['rope_type']!r} is not supported, only default and llama3")
    return rope


def check_heads_and_rope(path, known, rope):
    """InputError if heads cannot share keys and values, or if RoPE cannot turn pairs of their dimensions."""
    H, G, d = known["num_attention_heads"], known["num_key_value_heads"], known["head_dim"]
    if H % G or d % 2 or not d:
        raise InputError(f"{path}: {H} heads do not share {G} key/value heads evenly, or their width {d} is "
                         "not even")
    for key in ROPE if rope["rope_type"] == "llama3" else ["rope_theta"]:
        get_field(rope, key, path, *ROPE[key])
    if rope["rope_type"] == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise InputError(f"{path}: low_freq_factor is not below high_freq_factor")


if __name__ == "__main__":
    llama = Llama.load(Path(__file__).parent / "assets/toy/llm")
    print(f"{sum(p.numel() for p in llama.parameters()):,} parameters")
    with torch.no_grad():
        cache, tokens = {}, torch.tensor([[1, 20, 30]])
        hidden = llama(llama.embed_tokens(tokens), cache=cache)
        print(f"tokens {tuple(tokens.shape)} -> hidden states {tuple(hidden.shape)} "
              f"-> logits {tuple(llama.lm_head(hidden).shape)}")
        print(f"cached in each of {len(cache)} layers: keys and values {tuple(cache[0][0].shape)}")
        print(f"RoPE turns the first pair by {rope_frequencies(llama.config)[0]:.3f} rad a position, "
              f"the last by {rope_frequencies(llama.config)[-1]:.6f}")
