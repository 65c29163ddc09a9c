"""Speed and memory beside what people would use instead: Transformers and PEFT (requirements-dev.txt).

    python bench.py --size small    tiny: to see that it runs; small: ViT-S and 8 layers of width 512;
                                    8b: the paper's ViT-L and Llama-3.1-8B, on a GPU of 80 GB;
                                    real: published weights, in vit/ and llm/ of the folder CAPELLM_REAL

Contestants load the same files, get the same inputs, and run in turn in one process. A difference between
their results ends the program before they are timed. Random networks do not keep to the format of answers,
so all are held to it, which saves none of them a product. Columns:

    seconds   of the median run; +-: how far the slowest was from the fastest, "!" if too far to be trusted
    x ours    how many times our time
    GiB       peak memory of a run beyond what was held before (GPU: allocated; CPU: of the process)
    floor     our products of matrices, if each were as fast as a large one, as a share of the time
"""

import argparse
import ctypes
import math
import os
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from annotations import parse_descriptions
from chat import IGNORE, AnswerFormat, Category, Chat
from common import read_json, run, write_json
from decode import answer_in_format, locate, start_conversations
from llama import LlamaConfig
from model import DTYPES, CapeLLM

SIZES = {  # of the ViT and the LLM; what is not said is DINOv2 ViT-L/14's and Llama-3.1-8B's
    "tiny": (dict(image_size=56, hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
             dict(vocab_size=2000, hidden_size=128, head_dim=32, intermediate_size=128, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2)),
    "small": (dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6),
              dict(hidden_size=512, head_dim=64, intermediate_size=1792, num_hidden_layers=8,
                   num_attention_heads=8, num_key_value_heads=2)),
    "8b": ({}, {})}
OURS, PLAIN, CHECKPOINTED = "ours", "ours, if no answer kept to the format", "ours, checkpointed activations"
PUBLISHED, USED_WELL, PEFT = "published way", "Transformers, used well", "Transformers + PEFT"

# ----------------------------------------------------------------------------------------------- contestants


def save_random_weights(size, folder, device):
    """Writes vit/ and llm/ as the hub would, with random weights in bf16."""
    import transformers

    vit, llama = SIZES[size]
    vit = dict(image_size=224, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16) | vit
    llama = vars(LlamaConfig(**llama)) | {"max_position_embeddings": 131072}
    llama["rope_parameters"] = llama.pop("rope")
    llama["initializer_range"] = llama["hidden_size"] ** -0.5  # else all questions get the same answer
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        vit = transformers.Dinov2Model(transformers.Dinov2Config(patch_size=14, **vit))
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama))
    torch.set_default_dtype(torch.float32)
    vit.save_pretrained(folder / "vit")
    llama.save_pretrained(folder / "llm", max_shard_size="500MB")


def load(folder, device, dtype):
    """CapeLLM with adapters that do something."""
    side = read_json(folder / "vit/config.json")["image_size"]
    model = CapeLLM.load(folder / "vit", folder / "llm", min(side, 224), device=device, dtype=dtype)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    return model.eval()


class Twin(nn.Module):
    """The same network of Transformers' Dinov2 and Llama with PEFT's adapters. What trains is shared."""

    def __init__(self, folder, model):
        super().__init__()
        import transformers
        from peft import LoraConfig, get_peft_model

        warnings.simplefilter("ignore", FutureWarning)
        where = dict(dtype=model.llama.norm.weight.dtype, device_map=model.projection.weight.device)
        self.vit = transformers.Dinov2Model.from_pretrained(folder / "vit", **where)
        self.llama = transformers.LlamaForCausalLM.from_pretrained(folder / "llm", **where)
        for network in self.vit, self.llama:
            get_peft_model(network, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05,
                                               target_modules=["q_proj", "v_proj"]))
        # Transformers fits the position table to 224 pixels otherwise, see ViT.resize_positions()
        self.vit.embeddings.position_embeddings.data = model.vit.pos_embed.data
        self.projection = model.projection
        for own, p in zip(trained(self), trained(model), strict=True):
            own.data = p.data
        self.eval()

    def see(self, images):
        z = self.vit(images.to(self.vit.dtype)).last_hidden_state[:, 1:]
        return F.linear(z, self.projection.weight.to(z.dtype), self.projection.bias.to(z.dtype))

    def forward(self, images, tokens, labels):
        text = self.llama.model.embed_tokens(tokens)
        x = torch.cat((text[:, :1], self.see(images), text[:, 1:]), dim=1)
        labels = F.pad(labels, (x.shape[1] - labels.shape[1], 0), value=IGNORE)
        return self.llama(inputs_embeds=x, labels=labels, use_cache=False).loss

    def generate(self, photos, photo_of, questions, chat, published=False):
        """Greedy answers, held to the format.

        published: the ViT runs again for every token, logits are made at every position, and five tokens more
        are asked for than the coordinates need, as in the authors' code.
        """
        form, N, T = chat.coordinates, (photos.shape[-1] // 14) ** 2, max(map(len, questions))
        held = [choices for known in form.known for choices in (*([token] for token in known), form.digits)]
        start = [chat.bos] + [-2] * N + chat.newline  # -2: the photo, -1: padding
        tokens = torch.tensor([[-1] * (T - len(q)) + start + q for q in questions], device=photos.device)

        def keep_format(said, scores):
            if published and said.shape[1]:
                self.see(photos[photo_of])
            choices = held[said.shape[1]] if said.shape[1] < len(held) else range(scores.shape[1])
            choices = torch.tensor(choices, device=photos.device)
            return torch.full_like(scores, -math.inf).index_copy(1, choices, scores[:, choices])

        with torch.no_grad():
            x, image = self.llama.model.embed_tokens(tokens.clamp(min=0)), self.see(photos)[photo_of]
            answers = self.llama.generate(
                inputs_embeds=x.masked_scatter((tokens == -2)[..., None], image.to(x.dtype)),
                attention_mask=tokens != -1, logits_processor=[keep_format], do_sample=False, eos_token_id=-1,
                max_new_tokens=len(held) + 5 * published, logits_to_keep=0 if published else 1)
        return answers[:, :len(held)].tolist()


def trained(network):
    """The adapters and the projection, in the same order in CapeLLM and Twin."""
    adapters = [p for name, p in network.named_parameters() if "lora" in name]
    return adapters + list(network.projection.parameters())


# ------------------------------------------------------------------------------------------------- the tasks

# What decode.py needs of a Chat, with made-up tokens. As with Llama-3, the numbers 000 ... 999 are one token
# each, here 10 ... 1009; words come after them.
CHAT = SimpleNamespace(
    bos=0, newline=[2], opening=[], keypoint=None, parse=lambda answer: (0.0, 0.0),
    coordinates=AnswerFormat([[3, 4, 5], [6, 4, 5]], list(range(10, 1010)), ending=[-1], max_tokens=8))


def make_photos(n, model):
    side = 14 * math.isqrt(model.vit.n_patches)
    photos = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(n))
    return photos.to(model.projection.weight.device)


def make_questions(P, K, chat, model):
    """K questions about each of P photos, with Llama-3's 39 to 93 tokens or in a real tokenizer's."""
    if chat is not CHAT:
        path = Path(__file__).with_name("descriptions.json")
        category = max(parse_descriptions(read_json(path), path).values(), key=lambda c: len(c.keypoints))
        return [chat.questions(Category(category.name, category.keypoints[:K]))] * P
    rng = np.random.default_rng(K)
    lengths = rng.normal(61, 9, (P, K)).round().clip(39, 93).astype(int)
    return [[rng.integers(1010, model.llama.config.vocab_size, n).tolist() for n in row] for row in lengths]


def answering(model, twin, chat, P, K):
    """K questions about each of P photos -> {way: function that answers all, with a token list for each}."""
    photos, questions = make_photos(P, model), make_questions(P, K, chat, model)
    flat, photo_of = sum(questions, []), [p for p, asked in enumerate(questions) for _ in asked]

    @torch.no_grad()
    def ours():
        conversations = start_conversations(model, photos, chat)
        conversations.select(photo_of)
        return answer_in_format(conversations, flat, chat.coordinates)[0]

    def plain():
        found = locate(model, photos, questions, chat)
        assert all(p.x_distribution is None for of_photo in found for p in of_photo), "some kept to it"

    def published():  # a copy of the photo with each question, 15 at a time
        answers = []
        for photo, asked in zip(photos, questions):
            for chunk in (asked[i:i + 15] for i in range(0, len(asked), 15)):
                copies = photo.expand(len(chunk), -1, -1, -1)
                answers += twin.generate(copies, list(range(len(chunk))), chunk, chat, published=True)
        return answers

    # used well: each photo seen once, all questions in one batch, no token and no logits too many
    used_well = partial(twin.generate, photos, photo_of, flat, chat)
    return {OURS: ours, PLAIN: plain, USED_WELL: used_well, PUBLISHED: published}


def check_answers(answers, exact, is_real=False):
    """answers: {way: tokens of each answer}. Fails if they differ, or if the comparison would be idle."""
    ours = np.array(answers[OURS])
    # a published LLM says nearly the same to all questions until it is trained
    assert is_real or len(np.unique(ours, axis=0)) > len(ours) / 4, "nearly all questions get the same answer"
    for way in USED_WELL, PUBLISHED:
        # In bf16 products of other shapes round otherwise, and a close call between two numbers may go either
        # way. All tokens must be equal in fp32, in which a tiny network is checked before.
        equal = (np.array(answers[way]) == ours).mean()
        assert equal >= (1 if exact else 0.9), f"{way}: {equal:.1%} of the tokens are equal"


def training(model, twin, B):
    """B conversations as a micro-batch -> {way: function that takes a step as train.py does}, the batch."""
    learned = np.concatenate([[0, 0], *([0] * n + [1] * 11 for n in (55, 61, 62, 69))])
    rng = np.random.default_rng(B)
    tokens = torch.from_numpy(rng.integers(0, model.llama.config.vocab_size, (B, len(learned))))
    labels = tokens.where(torch.tensor(learned) > 0, IGNORE)
    batch = [t.to(model.projection.weight.device) for t in (make_photos(B, model), tokens, labels)]

    def step(network, optimizer, checkpointed=False):
        model.llama.checkpoint_activations = checkpointed
        network.train()(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        network.eval()

    own, theirs = (torch.optim.AdamW(trained(network), lr=1e-6, fused=batch[0].is_cuda)
                   for network in (model, twin))
    return {OURS: partial(step, model, own), CHECKPOINTED: partial(step, model, own, True),
            PEFT: partial(step, twin, theirs)}, batch


def check_training(model, twin, batch, exact):
    """One step without dropout."""
    losses, gradients = [], []
    for network in model, twin:
        loss = network(*batch)
        losses.append(loss.item())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained(network))]))
    apart = ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()
    assert abs(losses[0] / losses[1] - 1) < (1e-4 if exact else 0.02), f"losses {losses}"
    # deep random networks amplify the rounding of bf16
    assert apart < (1e-3 if exact else 0.5), f"gradients {apart:.1e} apart"


# ------------------------------------------------------------------------------------------------- measuring


def race(runners, repeats=5, patience=40):
    """Runs {way: function} in turn -> {way: seconds of each run}, repeated less when over `patience` s."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = {way: [] for way in runners}
    for _ in range(repeats):
        for way in [way for way in runners if sum(times[way]) < patience]:
            wait()
            began = time.perf_counter()
            runners[way]()
            wait()
            times[way].append(time.perf_counter() - began)
    return times


def noise(seconds):
    return (max(seconds) - min(seconds)) / median(seconds)


def peak_memory(runner):
    """-> what a run returns, and the GiB that it needed at most, NaN where no Linux tells."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return runner(), (torch.cuda.max_memory_allocated() - before) / 2**30
    status = Path("/proc/self/status")
    if not status.exists():
        return runner(), math.nan

    def gib(key):
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if key in line) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # gives back what was freed
    status.with_name("clear_refs").write_text("5")  # forgets the peak so far
    before = gib("VmRSS")
    return runner(), gib("VmHWM") - before


def speed_of_products(device, dtype):
    """FLOP/s of a large product of two matrices."""
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / median(race({"": lambda: a @ a})[""])


def contest(rows, speed, title, runners, check, unit, n=1):
    """Runs all, checks {way: result}, times them, prints a line for each way and adds it to `rows`.

    speed: of large products, FLOP/s. n: units of work in a run.
    """
    done = {way: peak_memory(runner) for way, runner in runners.items()}
    check({way: result for way, (result, _) in done.items()})
    with FlopCounterMode(display=False) as counter:
        runners[OURS]()
    floor, times = counter.get_total_flops() / speed, race(runners)
    for way in [way for way in times if noise(times[way]) > 0.25]:
        times[way] = min(times[way], race({way: runners[way]})[way], key=noise)
    print(f"\n{title:44}{'seconds':>9}{'+-':>6}{unit + '/s':>11}{'x ours':>8}{'GiB':>7}{'floor':>7}")
    for way, seconds in times.items():
        s, gib = median(seconds), done[way][1]
        spread = f"{noise(seconds):.0%}{'!' * (noise(seconds) > 0.25)}" if len(seconds) > 1 else "once"
        print(f"  {way:42}{s:9.4g}{spread:>6}{n / s:11,.2f}{s / median(times[OURS]):8.2f}{gib:7.2f}"
              + f"{floor / s:7.0%}" * bool(floor), flush=True)
        rows.append(dict(title=title, way=way, seconds=seconds, unit=unit, n=n, gib=gib, floor=floor))
    # of a GPU; none is named where attention falls back to plain products
    if kernels := [str(op) for op in counter.get_flop_counts()["Global"] if "dot_product" in str(op)]:
        print("  attention by", *kernels)


# ------------------------------------------------------------------------------------------------- the whole


def compare(contest, folder, size, device, dtype, chat):
    """Loads, trains and answers, in all ways that there are for this size."""
    is_big, exact = size == "8b", dtype == "fp32"

    def load_only(way):
        network = load(folder, device, dtype) if way == OURS else Twin(folder, model)
        return sum(p.flatten()[::1000].sum().item() for p in network.parameters())  # reads what was put off

    model = load(folder, device, dtype)
    gb = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e9
    contest(f"loading {gb:.2g} GB", {way: partial(load_only, way) for way in (OURS, PEFT)},
            lambda _: None, "GB", gb)
    twin = Twin(folder, model)
    for B in (1, 2, 4) if is_big else (1,):
        runners, batch = training(model, twin, B)
        check_training(model, twin, batch, exact)
        T = model.vit.n_patches + batch[1].shape[1]
        contest(f"training step, {B} x {T} positions", runners, lambda _: None, "tokens", B * T)
    check = partial(check_answers, exact=exact, is_real=size == "real")
    for P, K in [(1, 8), (1, 17), (1, 68), *[(8, 17)] * is_big]:
        contest(f"answering, {K} keypoints, {P} photo{'s' * (P > 1)} at a time",
                answering(model, twin, chat, P, K), check, "photos", P)


def check_tiny(folder, device):
    """In fp32 all answers must be equal to the last token."""
    save_random_weights("tiny", folder, device)
    model = load(folder, device, "fp32")
    twin = Twin(folder, model)
    check_training(model, twin, training(model, twin, 2)[1], exact=True)
    check_answers({way: run() for way, run in answering(model, twin, CHAT, 3, 5).items()}, exact=True)


def main(argv):
    parser = argparse.ArgumentParser(description="Speed and memory beside Transformers + PEFT.")
    parser.add_argument("--size", choices=[*SIZES, "real"], default="small")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 elsewhere")
    parser.add_argument("--json", metavar="FILE", help="also write every run's seconds and GiB there")
    args = parser.parse_args(argv)
    import peft
    import transformers
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    gpu, rows = torch.cuda.is_available(), []
    device, dtype = "cuda" if gpu else "cpu", args.dtype or ("bf16" if gpu else "fp32")
    print(f"{torch.cuda.get_device_name() if gpu else f'CPU, {torch.get_num_threads()} threads'}, {dtype}, "
          f"size {args.size}, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"peft {peft.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        check_tiny(Path(folder, "tiny"), device)
        folder, chat = Path(folder, "weights"), CHAT
        if args.size == "real":
            folder = Path(os.environ.get("CAPELLM_REAL", "no folder in CAPELLM_REAL"))
            chat = Chat(folder / "llm")
        else:
            save_random_weights(args.size, folder, device)
        compare(partial(contest, rows, speed_of_products(device, DTYPES[dtype])), folder, args.size, device,
                dtype, chat)
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    run(main)
