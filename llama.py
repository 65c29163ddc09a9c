"""The LLaMA-3.1 decoder: from token embeddings to hidden states (paper, section 3.1, equation 4).

    x -> [ x + attention(norm(x)) -> x + mlp(norm(x)) ] * n_layers -> norm -> hidden states

It follows "The Llama 3 Herd of Models" and reads the Hugging Face hub's files. The same code runs all LLMs of
the paper's Table 4: Llama-3.1-8B, Llama-3.2-1B, Mistral-7B-v0.3, Vicuna-7B-v1.5. This file needs no other.
Letters: B rows, T new tokens in a row, S all tokens of a row (both with padding), D width, H query heads,
G key/value heads, d width of a head. `python llama.py` shows the shapes of a small one.
"""

import json
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class LlamaConfig:
    """The defaults are Llama-3.1-8B; names as in config.json."""

    vocab_size: int = 128256  # tokens
    hidden_size: int = 4096  # D, numbers that stand for a token
    intermediate_size: int = 14336  # width of the MLP
    num_hidden_layers: int = 32
    num_attention_heads: int = 32  # H
    num_key_value_heads: int = 8  # G; H/G query heads share one, so that the cache is H/G times smaller
    head_dim: int = 128  # d
    rms_norm_eps: float = 1e-5  # keeps RMSNorm, x / sqrt(mean(x^2) + eps) * weight, from dividing by 0
    tie_word_embeddings: bool = False  # whether lm_head and embed_tokens are one matrix
    rope: dict = field(default_factory=lambda: dict(  # see rope_frequencies()
        rope_theta=500000.0, rope_type="llama3", original_max_position_embeddings=8192,
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0))


def rope_frequencies(config, device=None):
    """How far RoPE turns each pair of dimensions from one position to the next: (d/2,), radians, fp32.

    Llama 3.1 was trained on 8,192 positions, then stretched: pairs that turn fewer than
    low_freq_factor times within 8,192 are slowed down by `factor`, those that turn more than high_freq_factor
    times stay as they are, those between are blended.
    """
    r, d = config.rope, config.head_dim
    freq = 1 / r["rope_theta"] ** (torch.arange(0, d, 2, device=device).float() / d)
    if r["rope_type"] == "llama3":
        turns = r["original_max_position_embeddings"] * freq / (2 * math.pi)
        keep = ((turns - r["low_freq_factor"]) / (r["high_freq_factor"] - r["low_freq_factor"])).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / r["factor"]
    return freq


def rotate(x, cos, sin):
    """Turns queries or keys by their positions' angles: a pair (a, b) to (a cos - b sin, b cos + a sin).

    x (B, heads, T, d); cos, sin (B or 1, 1, T, d). Which dimensions form a pair is a convention of the
    weights. The hub's files and this code pair i with i + d/2; Meta's own files pair neighbours:

        hub   a0 a1 a2 a3 | b0 b1 b2 b3      (a0, b0) is one pair, (a1, b1) the next
        Meta  a0 b0 a1 b1   a2 b2 a3 b3
    """
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def attention_as_written(q, k, v, mask):
    """softmax(q k / sqrt d) v, to read and to test attend(): a mean of values, weighted by how q fits k.

    q (B, H, T, d); k, v (B, G, S, d); mask (..., T, S), True where a query may look -> (B, H, T, d). H/G
    query heads share a head of keys and values: for H = 4 and G = 2, [K1, K2] are used as [K1, K1, K2, K2].
    """
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))  # (B, H, S, d)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


def attend(q, k, v, mask):
    """The same without holding all T x S scores. mask None: T = S, and no query looks ahead."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    # The heads that share keys become one head with all their queries, so that no keys are copied. With a
    # mask, PyTorch has no fast kernel for grouped heads: in bf16 on a CPU that took six times as long.
    shared = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (B, G, H/G * T, d)
    mask = mask.repeat(1, 1, q.shape[1] // k.shape[1], 1)  # (B, 1, H/G * T, S)
    return F.scaled_dot_product_attention(shared, k, v, mask).reshape(q.shape)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.d = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x, cos, sin, mask, past):
        """x (B, T, D) -> what is added to it (B, T, D); its keys and values. past: a list of earlier ones."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.d)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, H, T, d), (B, G, T, d)
        all_k, all_v = (torch.cat(parts, dim=2) for parts in zip(*past, (k, v)))  # (B, G, S, d)
        y = attend(q, all_k, all_v, mask).transpose(1, 2).flatten(2)  # (B, T, H d)
        return self.o_proj(y), (k, v)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)  # how much of `up` passes
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # SwiGLU


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, mask, past):
        y, keys_and_values = self.self_attn(self.input_layernorm(x), cos, sin, mask, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), keys_and_values


class Cache:
    """Keys and values of all that rows have read, so that every token is read once.

    A row may go on in several ways, for example a photo with several questions. What they have in common is
    kept once. Rows read blocks of one length; no query attends to what pads them. Here a and b continue p:

        photos          photos.fork([0, 0, 1])      is_token of the fork
        p p p p         p p p p | a a a a a         1 1 1 1   1 1 1 1 1
                                | b b - - -         1 1 1 1   1 1 0 0 0
        q q q q         q q q q | c c c - -         1 1 1 1   1 1 1 0 0
    """

    def __init__(self, parent=None, rows=None):
        self.parent, self.rows = parent, rows
        self.own = {}  # {layer: a pair of keys and values (B, G, T, d) for each block read since the fork}
        self.is_token = None if parent is None else parent.is_token[rows]  # (B, S), False for padding

    def fork(self, rows):
        """A cache whose row b goes on from row rows[b] of this one, which stays as it is. rows: a tensor."""
        return Cache(self, rows)

    def get(self, layer):
        """-> a list of keys and values of all blocks that the rows have read."""
        shared = self.parent.get(layer) if self.parent else []
        return [(k[self.rows], v[self.rows]) for k, v in shared] + self.own.get(layer, [])


class Llama(nn.Module):
    def __init__(self, config=LlamaConfig()):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.checkpoint_activations = False  # keep only layer inputs, recompute the rest in the backward pass

    def forward(self, x, cache=None, is_token=None):
        """Embeddings x (B, T, D) -> hidden states (B, T, D), of which lm_head makes logits where needed.

        cache: what rows go on from, to which x is added. is_token (B, T): False for padding, on the right.
        """
        B, T, _ = x.shape
        cache = Cache() if cache is None else cache
        if is_token is None:
            is_token = torch.ones(B, T, dtype=torch.bool, device=x.device)
        positions = torch.arange(T, device=x.device)[None]  # (1, T)
        past, mask = cache.is_token, None  # where nothing was read yet, causal attention needs no mask
        if past is not None:  # a query sees what its row has read, and its own block up to itself
            positions = positions + past.sum(1, keepdim=True)  # (B, T)
            block = is_token[:, None] & is_token.new_ones(T, T).tril()  # (B, T, T)
            mask = torch.cat((past[:, None].expand(-1, T, -1), block), dim=2)[:, None]  # (B, 1, T, S)
        cache.is_token = is_token if past is None else torch.cat((past, is_token), dim=1)  # (B, S)
        x = x.to(self.norm.weight.dtype)  # where embeddings train (Table 8), they are fp32
        angles = positions[:, None, :, None] * rope_frequencies(self.config, x.device).repeat(2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)  # (1 or B, 1, T, d)
        for i, layer in enumerate(self.layers):
            run = partial(checkpoint, layer, use_reentrant=False) if self.checkpoint_activations else layer
            x, keys_and_values = run(x, cos, sin, mask, cache.get(i))
            cache.own.setdefault(i, []).append(keys_and_values)
        return self.norm(x)

    @classmethod
    def load(cls, directory, dtype=torch.float32, device="cpu"):
        """Reads DIR/config.json and DIR/*.safetensors. Strict: torch names a missing or misshapen tensor."""
        directory, state = Path(directory), {}
        config, index = read_config(directory / "config.json"), directory / "model.safetensors.index.json"
        with torch.device("meta"):  # where sizes are computed and nothing else
            model = cls(config)
            model(torch.empty(1, 1, config.hidden_size))  # settings that do not go together show here
        files = {"model.safetensors"}
        if index.exists():  # large models come in several files
            files = set(json.loads(index.read_text())["weight_map"].values())
        for name in sorted(files):
            try:
                file = safe_open(directory / name, framework="pt", device=str(device))
            except Exception as e:
                raise ValueError(f"{name}: {e}") from e
            for key in file.keys():
                if not key.endswith("rotary_emb.inv_freq"):  # in old files; it follows from the config
                    state[key.removeprefix("model.")] = file.get_tensor(key).to(dtype)
        if config.tie_word_embeddings:  # a Parameter is assigned as it is, so the two stay one
            embeddings = nn.Parameter(state["embed_tokens.weight"])
            state |= {"embed_tokens.weight": embeddings, "lm_head.weight": embeddings}
        model.load_state_dict(state, strict=True, assign=True)
        return model


def read_config(path):
    """A config.json of the hub -> LlamaConfig."""
    raw = json.loads(Path(path).read_text())
    if raw["model_type"] not in ("llama", "mistral") or raw.get("sliding_window"):
        raise ValueError(f"model_type {raw['model_type']} is not a Llama-shaped model without sliding window")
    # newer files keep everything about RoPE in rope_parameters, older ones in rope_theta and rope_scaling
    old, new = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    rope = {"rope_theta": raw.get("rope_theta", 10000.0), **old, **new}
    if rope.setdefault("rope_type", rope.get("type", "default")) not in ("default", "llama3"):
        raise ValueError(f"rope_type {rope['rope_type']} is not supported, only default and llama3")
    H = raw["num_attention_heads"]  # and what older files leave out:
    fields = dict(num_key_value_heads=H, head_dim=raw["hidden_size"] // H, rms_norm_eps=1e-6)
    fields |= {key: raw[key] for key in LlamaConfig.__dataclass_fields__ if raw.get(key) is not None}
    return LlamaConfig(**fields | {"rope": rope})


if __name__ == "__main__":
    llama, tokens = Llama.load(Path(__file__).parent / "assets/toy/llm"), torch.tensor([[1, 5, 6, 7]])
    x, cache = llama.embed_tokens(tokens), Cache()
    hidden, _, last = llama(x), llama(x[:, :3], cache), llama(x[:, 3:], cache)
    print(f"tokens {tuple(tokens.shape)} -> hidden states {tuple(hidden.shape)} "
          f"-> logits {tuple(llama.lm_head(hidden).shape)}")
    print("read in two parts with a cache, the same:", torch.allclose(last, hidden[:, 3:], atol=1e-4))
