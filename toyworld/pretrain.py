"""Makes the backbones of assets/toy from nothing: `python toy.py --pretrain`, 23 minutes on one core.

ViT, projection and Llama learn together, from sheets alone. The projection is then thrown away, since CapeLLM
starts with a fresh one.
"""

import json
import math
import os
from multiprocessing import Pool

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from data import normalize
from llama import Llama, LlamaConfig
from toyworld.creatures import COLOURS, LIMBS, MARKS, ORDINALS, SAYINGS
from toyworld.sheets import ROUNDS, SIZE, WORDS, converse, draw_sheet, turn_sheet
from vit import ViT, ViTConfig

SHEETS, BATCH, STEPS = 20000, 32, 4000
LOOK = 1200  # of the steps come before the loss of talking
PATCHES = 8  # a side

# Long tokens, as real vocabularies have, make short sequences.
GLUE = ["<unk>", "<s>", "</s>", "\n", "User: where is the", "User: point at the", "User: what is at",
        "?\nReference:", "\nAssistant:", "?\nAssistant:", " [0.", ",0.", "]", ",", *"0123456789"]


def make_tokenizer():
    """Words with the space before them, digits one by one, and GLUE; words it does not know become <unk>."""
    phrases = sum([*WORDS.values(), *SAYINGS.values()], ())
    text = " ".join([*COLOURS, *LIMBS, *MARKS, *ORDINALS, "mark of a in its", *phrases])
    words = sorted({word for word in text.replace(",", "").split() if "{" not in word})
    vocabulary = {token: i for i, token in enumerate(GLUE + [f" {word}" for word in words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    glue = "|".join("".join(f"\\{c}" if c in "?[].," else c for c in token)
                    for token in sorted(GLUE[3:], key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(glue + r"| ?[^\s\d,?\]]+|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def new_backbones(vocabulary):
    D = 128
    llm = LlamaConfig(vocab_size=vocabulary, hidden_size=D, intermediate_size=344, num_hidden_layers=3,
                      num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                      rope={"rope_theta": 10000.0, "rope_type": "default"})
    vit = ViTConfig(hidden_size=D, num_hidden_layers=3, num_attention_heads=4, image_size=SIZE)
    model = nn.ModuleDict({"vit": ViT(vit), "llm": Llama(llm), "projection": nn.Linear(D, D)})
    nn.init.normal_(model["llm"].embed_tokens.weight, std=0.5)
    with torch.no_grad():  # positions start as sines and cosines of column and row
        row, column = torch.meshgrid(*[torch.arange(float(PATCHES))] * 2, indexing="ij")
        waves = 10 ** -(torch.arange(D // 4) / (D // 4))
        waves = torch.stack((column, row)).flatten(1)[..., None] * waves  # (2, 64, D/4)
        waves = torch.cat((waves.sin(), waves.cos()), -1)
        model["vit"].pos_embed[0, 1:] = waves.transpose(0, 1).flatten(1)
    return model


# ------------------------------------------------------------------------------------------------ training


def make_batch(rng, sheets, encode):
    """-> images, tokens, weights, and what is to be seen: rows of (patch of the batch, word it shows)."""
    pictures, seen = [], []
    tokens = torch.zeros(len(sheets), 2 + 19 * ROUNDS, dtype=torch.long)  # at most 19 tokens a round
    weights = torch.zeros(len(sheets), 2 + 19 * ROUNDS)
    for b, sheet in enumerate(sheets):
        picture, points = turn_sheet(sheet, *divmod(rng.integers(8), 4))
        said, counts = converse(rng, points, encode)
        tokens[b, :len(said)], weights[b, :len(said)] = torch.tensor(said), torch.tensor(counts)
        pictures.append(torch.from_numpy(picture.copy()))
        for *words, z in points:
            column, row = (min(int(PATCHES * v), PATCHES - 1) for v in (z.real, z.imag))
            patch = (b * PATCHES + row) * PATCHES + column
            seen += [(patch, *encode(f" {word}")) for word in words if word not in ("", "centre")]
    return normalize(torch.stack(pictures).permute(0, 3, 1, 2)), tokens, weights, torch.tensor(seen)


def losses(model, images, tokens, weights, seen, talks, before_digits):
    """-> the loss of seeing; that of talking; the share of first digits that are right.

    Seeing ties words to patches, which would take long by way of questions alone: a patch is to look, to the
    LLM, like the words for what it shows. talks: whether there is a loss of talking yet.
    """
    llm = model["llm"]
    image = model["projection"](model["vit"](images.bfloat16()))
    patches, words = seen.T
    look = F.cross_entropy((image.flatten(0, 1)[patches] @ llm.embed_tokens.weight.T).float(), words)
    if not talks:
        return look, 0, 0
    text = llm.embed_tokens(tokens)
    hidden = llm(torch.cat((text[:, :1], image, text[:, 1:]), dim=1))
    learned = weights[:, 1:] > 0
    logits = llm.lm_head(hidden[:, PATCHES**2:-1][learned]).float()
    answers = tokens[:, 1:][learned]
    talk = F.cross_entropy(logits, answers, reduction="none")
    first = torch.isin(tokens[:, :-1][learned], before_digits)
    right = (logits.argmax(-1) == answers)[first].float().mean().item()
    return look, (talk * weights[:, 1:][learned]).sum() / weights.sum(), right


def make_optimizers(weights):
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices = {name: p for name, p in weights.items()
                if p.ndim == 2 and ("blocks" in name or "layers" in name)}
    others = [p for name, p in weights.items() if name not in matrices]
    return [torch.optim.Muon(matrices.values(), weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.05)]


def learning_rate(step):
    """Warm-up for seeing and again for talking, flat, and a cosine for the last 40 %."""
    left, since = 1 - step / STEPS, step - LOOK * (step >= LOOK)
    decay = 1 if left > 0.4 else 0.03 + 0.97 * 0.5 * (1 - math.cos(math.pi * left / 0.4))
    return 2e-3 * (min(1, (since + 1) / 100) * decay)


@sdpa_kernel(SDPBackend.MATH)  # on CPUs the backward pass of the fused kernel is slow in 16 bits
def make_backbones(folder):
    """Trains in 16 bits, with weights kept in fp32. Writes FOLDER/vit and FOLDER/llm."""
    torch.manual_seed(0)
    with Pool(os.cpu_count()) as pool:
        seeds = [(7, i) for i in range(SHEETS)]
        sheets = list(tqdm(pool.imap(draw_sheet, seeds, chunksize=100), "drawing", SHEETS))
    tokenizer = make_tokenizer()
    before_digits = torch.tensor(tokenizer.encode(" [0.,0.").ids)
    model = new_backbones(tokenizer.get_vocab_size())
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    optimizers = make_optimizers(weights)
    model.bfloat16()
    order, right, bar = [], [], tqdm(range(STEPS), "pre-training")
    for step in bar:
        if len(order) < BATCH:
            order = np.random.default_rng((2, step)).permutation(SHEETS).tolist()
        chosen = [sheets[order.pop()] for _ in range(BATCH)]
        batch = make_batch(np.random.default_rng((1, step)), chosen, lambda text: tokenizer.encode(text).ids)
        look, talk, share = losses(model, *batch, step >= LOOK, before_digits)
        right.append(share)
        loss = look if step < LOOK else talk + 0.5 * look
        loss.backward()
        for name, p in model.named_parameters():
            weights[name].grad, p.grad = None if p.grad is None else p.grad.float(), None
        nn.utils.clip_grad_norm_(weights.values(), 1)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(step)
            optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(weights[name])
        if step % 100 == 99:
            bar.write(f"step {step + 1}  look {look:.3f}  loss {loss:.3f}  "
                      f"first digits {np.mean(right[-100:]):.1%} right")
    save_backbones(folder, weights, model["vit"].config, model["llm"].config, tokenizer)


# --------------------------------------------------------------------------------------------------- files

HUB_NAMES = [
    (".norm.", ".layernorm."),
    (".patch_embed.", ".embeddings.patch_embeddings.projection."),
    (".blocks.", ".encoder.layer."),
    (".pos_embed", ".embeddings.position_embeddings"),
    (".cls_token", ".embeddings.cls_token"),
    (".attn.q.", ".attention.attention.query."),
    (".attn.k.", ".attention.attention.key."),
    (".attn.v.", ".attention.attention.value."),
    (".attn.proj.", ".attention.output.dense."),
    (".ls1.gamma", ".layer_scale1.lambda1"),
    (".ls2.gamma", ".layer_scale2.lambda1"),
]


def save_backbones(folder, weights, vit, llm, tokenizer):
    """Writes FOLDER/vit and FOLDER/llm as the hub keeps facebook/dinov2-* and meta-llama/*, in fp16."""
    tensors = {"vit": {"embeddings.mask_token": torch.zeros(1, vit.hidden_size)}, "llm": {}}
    for name, tensor in weights.items():
        network, name = name.split(".", 1)
        if network == "vit":
            name = f".{name}"
            for ours, theirs in HUB_NAMES:
                name = name.replace(ours, theirs)
            tensors["vit"][name[1:]] = tensor
        elif network == "llm":
            tensors["llm"][name if name.startswith("lm_head") else f"model.{name}"] = tensor
    configs = {
        "vit": {"architectures": ["Dinov2Model"], "model_type": "dinov2", **vars(vit), "hidden_act": "gelu",
                "num_channels": 3, "qkv_bias": True, "layerscale_value": 1.0, "torch_dtype": "float16"},
        "llm": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **vars(llm), **llm.rope,
                "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048,
                "torch_dtype": "float16"}}
    for network, config in configs.items():
        (folder / network).mkdir(parents=True, exist_ok=True)
        half = {name: tensor.detach().half().contiguous() for name, tensor in tensors[network].items()}
        save_file(half, folder / network / "model.safetensors", {"format": "pt"})
        for key in "rope", "rope_type", "num_register_tokens":  # not in the hub's files
            config.pop(key, None)
        (folder / network / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer.save(str(folder / "llm/tokenizer.json"))
