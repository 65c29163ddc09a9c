"""Makes the small Llama of assets/real from nothing, with photos of the training categories alone.

    python -m realworld.pretrain --data data/realworld --features runs/realworld --out runs/realworld/seed0

DINOv2 stays as published; of its patches (features.py) a projection makes what the Llama reads. First, words
are tied to patches: a patch is to look, to the Llama, like the words of the keypoint it shows. Then it also
answers questions. OUT gets llm/, laid out as the hub's folders, projection.pt for --init-projection, and
log.jsonl. The same command again goes on where it stopped.
"""

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from common import Parser, run
from llama import Cache, Llama, LlamaConfig
from realworld.data import read_categories
from realworld.lessons import BOS, EOS, PATCHES, Photos, Texts, make_batch, make_tokenizer

D, BATCH = 192, 24  # width of the Llama; photos
LOOK = 150  # steps before the first question


def new_model(vocabulary, width):
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=D, intermediate_size=384, num_hidden_layers=3,
                         num_attention_heads=6, num_key_value_heads=3, head_dim=32,
                         rope={"rope_theta": 10000.0, "rope_type": "default"})
    model = nn.ModuleDict({"llm": Llama(config), "projection": nn.Linear(width, D)})
    nn.init.normal_(model["llm"].embed_tokens.weight, std=0.5)
    return model


def show_places(projection, patches):
    """Adds to the projection what makes image tokens say where they are, as far as DINOv2's patches say it.

    patches (n, 64, 384). What is added is the linear map that comes nearest to the sines and cosines of a
    patch's column and row; it explains 86 % of them.
    """
    place = torch.arange(PATCHES * PATCHES)
    frequencies = 10 ** -(torch.arange(D // 4) / (D // 4))
    angles = torch.stack((place % PATCHES, place // PATCHES), 1)[..., None] * frequencies  # (64, 2, D/4)
    code = torch.cat((angles.sin(), angles.cos()), -1).flatten(1).repeat(len(patches), 1)  # (n * 64, D)
    x, mean = patches.flatten(0, 1), code.mean(0)
    with torch.no_grad():
        projection.weight += torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ (code - mean)).T
        projection.bias += mean


def losses(model, patches, photo_of, tokens, weights, first, seen, talks):
    """-> the loss of seeing; that of talking; the share of first digits that are right."""
    llm, image = model["llm"], model["projection"](patches)
    shown, words = seen.T
    likeness = image.flatten(0, 1)[shown] @ llm.embed_tokens.weight.T  # (n, vocabulary)
    look = F.cross_entropy(likeness / 4, words)
    if not talks:
        return look, torch.zeros(()), 0.0
    photos = Cache()
    bos = llm.embed_tokens(torch.full((len(image), 1), BOS))
    llm(torch.cat((bos, image), dim=1), photos)
    hidden = llm(llm.embed_tokens(tokens[:, :-1]), photos.fork(photo_of))
    learned = weights[:, 1:] > 0
    logits = llm.lm_head(hidden[learned])
    answers, counts = tokens[:, 1:][learned], weights[:, 1:][learned]
    talk = F.cross_entropy(logits, answers, reduction="none")
    right = (logits.argmax(-1) == answers)[first[:, 1:][learned]].float().mean().item()
    return look, (talk * counts).sum() / counts.sum(), right


class Muon(torch.optim.Optimizer):
    """PyTorch's Muon in 32 bits: its own computes in bf16, five times as long on a CPU without AVX512."""

    def __init__(self, params, lr=2e-3, weight_decay=0.05):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                update = orthogonal(p.grad.lerp(momentum, 0.95))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * group["lr"] * max(p.shape) ** 0.5)  # as long as AdamW's steps


def orthogonal(x):
    """The matrix with x's directions, but all singular values near 1 (Newton-Schulz)."""
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.T).T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x


def make_optimizers(model):
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    return [Muon(matrices.values()),
            torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.05)]


def learning_rate(step, steps):
    """Warm-up for seeing and again for talking, flat, and a cosine for the last half."""
    left, since = 1 - step / steps, step - LOOK * (step >= LOOK)
    decay = 1 if left > 0.5 else 0.03 + 0.97 * 0.5 * (1 - math.cos(math.pi * left / 0.5))
    return 2e-3 * min(1, (since + 1) / 100) * decay


def save(out, model, tokenizer, mean, std):
    """Writes OUT/llm as the hub keeps Llamas, in bf16, and the projection as a checkpoint keeps it.

    It was trained on patches less their mean, in units of their deviation; now it takes them as they come.
    """
    (out / "llm").mkdir(exist_ok=True)
    config = model["llm"].config
    tensors = {name if name.startswith("lm_head") else f"model.{name}": p.detach().bfloat16().contiguous()
               for name, p in model["llm"].named_parameters()}
    save_file(tensors, out / "llm/model.safetensors", {"format": "pt"})
    contents = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **vars(config), **config.rope,
                "hidden_act": "silu", "bos_token_id": BOS, "eos_token_id": EOS,
                "max_position_embeddings": 2048, "torch_dtype": "bfloat16"}
    for key in "rope", "rope_type":  # not in the hub's files
        contents.pop(key, None)
    (out / "llm/config.json").write_text(json.dumps(contents, indent=2))
    tokenizer.save(str(out / "llm/tokenizer.json"))
    weight = model["projection"].weight.detach() / std
    bias = model["projection"].bias.detach() - weight @ mean
    projection = {"projection.weight": weight, "projection.bias": bias}
    torch.save({"args": {}, "descriptions": {}, "model": projection, "optimizer": {}, "step": 0},
               out / "projection.pt")


def main(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    categories = read_categories()
    photos, others = (Photos(args.features, split, args.data) for split in ("train", "val"))
    others.mean, others.std = photos.mean, photos.std
    tokenizer = make_tokenizer([categories[number] for number in sorted(set(photos.category))])
    texts = Texts(categories, tokenizer)
    model = new_model(tokenizer.get_vocab_size(), photos.patches.shape[-1])
    sample = photos.patches[:6000:4].float()
    show_places(model["projection"], (sample - photos.mean) / photos.std)
    optimizers, start, seconds, recent = make_optimizers(model), 0, 0.0, []
    if (state := args.out / "state.pt").exists():
        kept = torch.load(state, weights_only=False)
        model.load_state_dict(kept["model"])
        for optimizer, contents in zip(optimizers, kept["optimizers"]):
            optimizer.load_state_dict(contents)
        start, seconds = kept["step"], kept["seconds"]
    for step in range(start, args.steps):
        began = time.perf_counter()
        rng = np.random.default_rng((args.seed, step))
        batch = make_batch(rng, photos, texts, photos.draw(rng, BATCH))
        look, talk, right = losses(model, *batch, step >= LOOK)
        (look if step < LOOK else talk + 0.3 * look).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps)
            optimizer.step()
            optimizer.zero_grad()
        seconds += time.perf_counter() - began
        recent.append((look.item(), talk.item(), right))
        if step % 50 == 49 or step + 1 == args.steps:
            rng = np.random.default_rng(step)
            with torch.no_grad():
                *_, unseen = losses(model, *make_batch(rng, others, texts, others.draw(rng, 2 * BATCH)), True)
            look, talk, right = np.mean(recent[-50:], axis=0).round(4).tolist()
            line = {"step": step + 1, "seconds": round(seconds), "look": look, "talk": talk,
                    "first_digits": right, "first_digits_val": round(unseen, 4)}
            print(line, flush=True)
            with open(args.out / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                        "step": step + 1, "seconds": seconds}, state)
            save(args.out, model, tokenizer, photos.mean, photos.std)


if __name__ == "__main__":
    run(main)
