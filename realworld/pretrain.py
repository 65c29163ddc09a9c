"""Makes the small Llama of assets/real from nothing, with photos of the training categories alone.

    python -m realworld.pretrain --data data/realworld --features runs/realworld --out runs/realworld/seed0

DINOv2 stays as published; of its patches (features.py) a projection makes what the Llama reads. First, words
are tied to patches: a patch is to look, to the Llama, like the words of the keypoint it shows. Then it also
answers questions. OUT gets llm/, laid out as the hub's folders, projection.pt for --init-projection, and
log.jsonl. The same command again goes on where it stopped.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from annotations import read_descriptions
from chat import spell
from common import run
from llama import Llama, LlamaConfig

HERE = Path(__file__).parent
D, PATCHES, BATCH, ROUNDS = 192, 8, 16, 6  # width of the Llama; patches a side; photos; questions about each
LOOK = 300  # steps before the first question
QUESTION = "User: where is the {}?\nReference: {}\nAssistant:"
# What the tokens of " [0.123,0.456]" and of the end count in the loss: the first digits most.
ANSWER_WEIGHTS = [0.1, 1, 0.3, 0.1, 0.1, 1, 0.3, 0.1, 0.1, 0.1]
FIRST_DIGITS = [1, 5]  # places of the answer
UNK, BOS, EOS = 0, 1, 2
GLUE = ["<unk>", "<s>", "</s>", "\n", "User: where is the", "?\nReference:", "\nAssistant:",
        " [0.", ",0.", "]", *"0123456789"]
SILENT = {" the", " of", " and", " from", " in", " point"}  # words that no patch shows


# ------------------------------------------------------------------------------------------------------ text


def make_tokenizer(categories):
    """Words with the space before them, digits one by one, and GLUE. Commas and full stops are not heard.

    Words of no training category become <unk>.
    """
    texts = [text for category in categories for keypoint in category.keypoints for text in keypoint]
    words = sorted({word.strip(",.") for text in texts for word in text.split()})
    vocabulary = {token: i for i, token in enumerate(GLUE + [f" {word}" for word in words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    glue = "|".join("".join(f"\\{c}" if c in "?[].," else c for c in token)
                    for token in sorted(GLUE[3:], key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[,.](?=\s)"), "removed"),
        pre_tokenizers.Split(Regex(glue + r"| ?[^\s\d,?\]]+|."), "isolated")])
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


class Texts:
    """The tokens of each keypoint's question, and of the words of its name that a patch may show."""

    def __init__(self, categories, tokenizer):
        self.encode = lambda text: tokenizer.encode(text).ids
        silent = {i for word in SILENT for i in self.encode(word)}
        self.questions = {number: [self.encode(QUESTION.format(*keypoint)) for keypoint in category.keypoints]
                          for number, category in categories.items()}
        self.names = {number: [[i for i in self.encode(f" {name}") if i not in silent]
                               for name, _ in category.keypoints] for number, category in categories.items()}


# ----------------------------------------------------------------------------------------------------- photos


class Photos:
    """Cached patches, drawn by keypoint set: one with n photos n**0.85 times as often as one with a photo."""

    def __init__(self, features, split, data, categories):
        files = sorted(features.glob(f"{split}*.pt"))
        parts = [torch.load(file, weights_only=False) for file in files]
        self.patches = torch.cat([part["patches"] for part in parts])
        sample = self.patches[:4000].float().flatten(0, 1)
        self.mean, self.std = sample.mean(0), sample.std(0)
        self.points = sum((part["points"] for part in parts), [])
        annotations = json.loads((data / f"annotations/mp100_split1_{split}.json").read_text())["annotations"]
        annotations = {annotation["id"]: annotation for annotation in annotations}
        rows = [annotations[number] for part in parts for number in part["annotation"]]
        self.category = [row["category_id"] for row in rows]
        self.asked = []  # keypoints that are visible and in the crop
        for row, points in zip(rows, self.points):
            visible = np.array(row["keypoints"][2::3]) > 0
            self.asked.append(np.flatnonzero(visible & ((points >= 0) & (points < 1)).all(1)))
        of_set = {}
        for i, number in enumerate(self.category):
            if len(self.asked[i]):
                names = tuple(name for name, _ in categories[number].keypoints)
                of_set.setdefault(names, []).append(i)
        self.sets = list(of_set.values())
        weights = np.array([len(rows) ** 0.85 for rows in self.sets])
        self.shares = weights / weights.sum()

    def draw(self, rng, n):
        return [int(rng.choice(self.sets[s])) for s in rng.choice(len(self.sets), n, p=self.shares)]


def make_batch(rng, photos, texts, chosen):
    """-> patches (B, 64, 384), tokens (B, T), what they count (B, T), which are first digits (B, T), and what
    is to be seen: rows of (patch of the batch, word it shows)."""
    said, counts, firsts, seen = [], [], [], []
    for b, i in enumerate(chosen):
        number, points = photos.category[i], photos.points[i]
        tokens, weights, first = [BOS, *texts.encode("\n")], [0, 0], [False, False]
        for k in rng.permutation(photos.asked[i])[:ROUNDS]:
            x, y = (float(v) for v in points[k])
            question = [UNK if rng.random() < 0.03 else token for token in texts.questions[number][k]]
            answer = [*texts.encode(spell((x, y))), EOS]
            tokens += question + answer
            weights += [0] * len(question) + ANSWER_WEIGHTS
            first += [False] * len(question) + [place in FIRST_DIGITS for place in range(len(answer))]
            patch = (b * PATCHES + int(PATCHES * y)) * PATCHES + int(PATCHES * x)
            seen += [(patch, word) for word in texts.names[number][k]]
        said.append(torch.tensor(tokens))
        counts.append(torch.tensor(weights))
        firsts.append(torch.tensor(first))
    tokens, weights, first = (nn.utils.rnn.pad_sequence(rows, batch_first=True)
                              for rows in (said, counts, firsts))
    return (photos.patches[chosen].float() - photos.mean) / photos.std, tokens, weights, first, torch.tensor(seen)


# --------------------------------------------------------------------------------------------------- learning


def new_model(vocabulary, width):
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=D, intermediate_size=384, num_hidden_layers=3,
                         num_attention_heads=6, num_key_value_heads=3, head_dim=32,
                         rope={"rope_theta": 10000.0, "rope_type": "default"})
    model = nn.ModuleDict({"llm": Llama(config), "projection": nn.Linear(width, D)})
    nn.init.normal_(model["llm"].embed_tokens.weight, std=0.5)
    return model


def losses(model, patches, tokens, weights, first, seen, talks):
    """-> the loss of seeing; that of talking; the share of first digits that are right."""
    llm, image = model["llm"], model["projection"](patches)
    shown, words = seen.T
    likeness = image.flatten(0, 1)[shown] @ llm.embed_tokens.weight.T  # (n, vocabulary)
    look = F.cross_entropy(likeness / 4, words)
    if not talks:
        return look, torch.zeros(()), 0.0
    text = llm.embed_tokens(tokens)
    hidden = llm(torch.cat((text[:, :1], image, text[:, 1:]), dim=1))
    learned = weights[:, 1:] > 0
    logits = llm.lm_head(hidden[:, PATCHES**2:-1][learned])
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
    projection = {"projection.weight": weight, "projection.bias": model["projection"].bias.detach() - weight @ mean}
    torch.save({"args": {}, "descriptions": {}, "model": projection, "optimizer": {}, "step": 0},
               out / "projection.pt")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    categories = read_descriptions(HERE / "descriptions.json")
    photos, others = (Photos(args.features, split, args.data, categories) for split in ("train", "val"))
    others.mean, others.std = photos.mean, photos.std
    tokenizer = make_tokenizer([categories[number] for number in sorted(set(photos.category))])
    texts = Texts(categories, tokenizer)
    model = new_model(tokenizer.get_vocab_size(), photos.patches.shape[-1])
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
        if step % 50 == 49:
            rng = np.random.default_rng(step)
            with torch.no_grad():
                *_, unseen = losses(model, *make_batch(rng, others, texts, others.draw(rng, 2 * BATCH)), True)
            line = dict(zip(("look", "talk", "first_digits"), np.mean(recent[-50:], axis=0).round(4).tolist()))
            line = {"step": step + 1, "seconds": round(seconds), **line, "first_digits_val": round(unseen, 4)}
            print(line, flush=True)
            with open(args.out / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                        "step": step + 1, "seconds": seconds}, state)
            save(args.out, model, tokenizer, photos.mean, photos.std)


if __name__ == "__main__":
    run(main)
