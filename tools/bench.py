"""Speed and memory beside what people would use instead: Transformers and PEFT (requirements-dev.txt).

    python -m tools.bench --size small    tiny: to see that it runs; small: ViT-S and 8 layers of width 512;
                                          8b: the paper's ViT-L and Llama-3.1-8B, on a GPU of 80 GB;
                                          real: published weights, in vit/ and llm/ of the folder CAPELLM_REAL

The contestants share their weights, which are random but for "real", get the same inputs, and run in turn in
one process. A difference between their results ends the program before they are timed. Random networks do not
keep to the format of answers, so all are held to it. Columns:

    seconds   of the median run; +-: how far the slowest was from the fastest, "!" if too far to be trusted
    x ours    how many times our time
    GiB       peak memory of a run beyond what was held before (GPU: allocated; CPU: of the process)
    floor     our products of matrices, if each were as fast as a large one, as a share of the time
"""

import ctypes
import math
import os
import time
import warnings
from argparse import Namespace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from chat import IGNORE, AnswerFormat, Category
from common import Parser, read_json, run, start_processes, write_json
from data import parse_descriptions
from decode import locate
from llama import Llama, LlamaConfig
from model import DTYPES, CapeLLM, adapt, load_network
from vit import ViT, ViTConfig, rename

SIZES = {  # of the ViT and the LLM; what is not said is DINOv2 ViT-L/14's and Llama-3.1-8B's
    "tiny": (dict(image_size=56, hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
             dict(vocab_size=2000, hidden_size=128, head_dim=32, intermediate_size=128, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2)),
    "small": (dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6),
              dict(hidden_size=512, head_dim=64, intermediate_size=1792, num_hidden_layers=8,
                   num_attention_heads=8, num_key_value_heads=2)),
    "8b": ({}, {})}
OURS, CHECKPOINTED = "ours", "ours, checkpointed activations"
BEHIND = "ours, behind one copy of the photo"
PUBLISHED, USED_WELL, PEFT = "published way", "Transformers, used well", "Transformers + PEFT"

# What decode.py needs of a Chat, with made-up tokens. As with Llama-3, the numbers 000 ... 999 are one token
# each, here 10 ... 1009 in no order; words come after them.
CHAT = Namespace(
    bos=0, parse=lambda answer: (0.0, 0.0), coordinates=AnswerFormat(
        [[3, 4, 5], [6, 4, 5]], np.random.default_rng(0).permutation(range(10, 1010)).tolist(), [-1], 8))

# ----------------------------------------------------------------------------------------------- contestants


def random_network(size, device, dtype):
    """CapeLLM with random weights, made where they are used."""
    of_vit, of_llm = SIZES[size]
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPES[dtype])
    with torch.device(device):
        vit = ViT(ViTConfig(**dict(image_size=224) | of_vit))
        llama = Llama(LlamaConfig(**of_llm))
    torch.set_default_dtype(torch.float32)
    for name, p in [*vit.named_parameters(), *llama.named_parameters()]:
        if p.ndim > 1:  # wide enough that not all questions get the same answer
            nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.ndim == 2 else 0.02)
    adapt(vit, "lora", ("q", "v"))
    adapt(llama, "lora", ("q_proj", "v_proj"))
    return CapeLLM(vit, llama).to(device)


def with_adapters(model):
    """The same network with adapters that do something."""
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    return model.eval()


class Twin(nn.Module):
    """The same network of Transformers' Dinov2 and Llama with PEFT's adapters. All weights are shared."""

    def __init__(self, model):
        super().__init__()
        import transformers
        from peft import LoraConfig, get_peft_model

        warnings.simplefilter("ignore", FutureWarning)
        c, v = model.llama.config, model.vit.config
        llama = {k: x for k, x in vars(c).items() if k != "rope"} | {"rope_parameters": c.rope}
        side = v.patch_size * math.isqrt(model.vit.n_patches)  # our position table is resized already
        with torch.device("meta"):
            self.vit = transformers.Dinov2Model(transformers.Dinov2Config(**vars(v) | {"image_size": side}))
            self.llama = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**llama, max_position_embeddings=131072))
        ours = {name.replace(".base.", "."): p for name, p in model.named_parameters() if "lora" not in name}
        own_names = {key: key.replace("_proj.", ".").replace("attention.o.", "attn.proj.").replace(
            "attention.", "attn.") for key in self.vit.state_dict()}
        table = {key: ours["vit." + name] for key in own_names for name in rename(own_names[key])}
        self.vit.load_state_dict(table, strict=False, assign=True)  # less the mask token
        self.vit.embeddings.mask_token = None
        self.llama.load_state_dict({key: ours["llama." + key.removeprefix("model.")]
                                    for key in self.llama.state_dict()}, assign=True)
        device = model.projection.weight.device
        with torch.device(device):  # what no file holds
            self.llama.model.rotary_emb = type(self.llama.model.rotary_emb)(self.llama.config)
        for network in self.vit, self.llama:
            get_peft_model(network, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05,
                                               target_modules=["q_proj", "v_proj"]))
        self.projection = model.projection
        for own, p in zip(trained(self), trained(model), strict=True):
            own.data = p.data
        self.eval()

    def see(self, images):
        z = self.vit(images.to(self.llama.dtype)).last_hidden_state[:, 1:]
        return F.linear(z, self.projection.weight.to(z.dtype), self.projection.bias.to(z.dtype))

    def forward(self, images, tokens, labels, photo_of=None):
        text = self.llama.model.embed_tokens(tokens)
        image = self.see(images if photo_of is None else images[photo_of])
        x = torch.cat((text[:, :1], image, text[:, 1:]), dim=1)
        labels = F.pad(labels, (x.shape[1] - labels.shape[1], 0), value=IGNORE)
        return self.llama(inputs_embeds=x, labels=labels, use_cache=False).loss

    @torch.no_grad()
    def generate(self, photos, photo_of, questions, chat, published=False):
        """Greedy answers, held to the format.

        published: the ViT runs again for every token, logits are made at every position, and five tokens more
        are asked for than the coordinates need, as in the authors' code.
        """
        form, N, T = chat.coordinates, (photos.shape[-1] // 14) ** 2, max(map(len, questions))
        held = [choices for known in form.known for choices in (*([token] for token in known), form.digits)]
        start = [chat.bos] + [-2] * N  # -2: the photo, -1: padding
        tokens = torch.tensor([[-1] * (T - len(q)) + start + q for q in questions], device=photos.device)

        def keep_format(said, scores):
            if published and said.shape[1]:
                self.see(photos[photo_of])
            choices = held[said.shape[1]] if said.shape[1] < len(held) else range(scores.shape[1])
            choices = torch.tensor(choices, device=photos.device)
            return torch.full_like(scores, -math.inf).index_copy(1, choices, scores[:, choices])

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


def make_photos(n, model):
    side = model.vit.config.patch_size * math.isqrt(model.vit.n_patches)
    photos = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(n))
    return photos.to(model.projection.weight.device)


def make_questions(P, K, chat, model):
    """K questions about each of P photos, with Llama-3's 40 to 94 tokens or in a real tokenizer's."""
    if chat is not CHAT:
        path = Path(__file__).parents[1] / "descriptions.json"
        category = max(parse_descriptions(read_json(path), path).values(), key=lambda c: len(c.keypoints))
        return [chat.encode_questions(Category(category.name, category.keypoints[:K]))] * P
    rng, words = np.random.default_rng(K), model.llama.config.vocab_size
    lengths, common = rng.normal(62, 9, (P, K)).round().clip(40, 94).astype(int), [2, 7, 8, 9, 1]
    return [[common + rng.integers(1010, words, n - len(common)).tolist() for n in row] for row in lengths]


def answering(model, twin, chat, P, K):
    """K questions about each of P photos -> {way: function that answers all, with a token list for each}."""
    photos, questions = make_photos(P, model), make_questions(P, K, chat, model)
    flat, photo_of = sum(questions, []), [p for p, asked in enumerate(questions) for _ in asked]

    def ours():
        found = locate(model, photos, questions, chat, constrained=True)
        return [prediction.answer for of_photo in found for prediction in of_photo]

    def published():  # a copy of the photo with each question, 15 at a time
        answers = []
        for photo, asked in zip(photos, questions):
            for chunk in (asked[i:i + 15] for i in range(0, len(asked), 15)):
                copies = photo.expand(len(chunk), -1, -1, -1)
                answers += twin.generate(copies, list(range(len(chunk))), chunk, chat, published=True)
        return answers

    # used well: each photo seen once, all questions in one batch, no token and no logits too many
    used_well = partial(twin.generate, photos, photo_of, flat, chat)
    return {OURS: ours, USED_WELL: used_well, PUBLISHED: published}


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


def training(model, twin, P, n=1):
    """n conversations about each of P photos -> {way: function that takes a training step}, and the batch."""
    learned = np.concatenate([[0, 0], *([0] * n + [1] * 11 for n in (55, 61, 62, 69))])
    rng = np.random.default_rng(P)
    tokens = torch.from_numpy(rng.integers(0, model.llama.config.vocab_size, (P * n, len(learned))))
    tokens[:, 0] = CHAT.bos
    labels, photos = tokens.where(torch.tensor(learned) > 0, IGNORE), make_photos(P, model)
    photo_of = torch.arange(P, device=photos.device).repeat_interleave(n) if n > 1 else None
    batch = [photos, tokens.to(photos.device), labels, photo_of]

    def step(network, optimizer, batch, checkpointed=False):
        model.llama.checkpoint_activations = checkpointed
        network.train()(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        network.eval()

    own, theirs = (torch.optim.AdamW(trained(network), lr=1e-6, fused=photos.is_cuda)
                   for network in (model, twin))
    on_device = [*batch[:2], labels.to(photos.device), photo_of]
    runners = {OURS: partial(step, model, own, batch), PEFT: partial(step, twin, theirs, on_device)}
    return runners | ({CHECKPOINTED: partial(step, model, own, batch, True)} if n == 1 else {}), batch


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


def count_products(model, runner):
    """FLOP of the products with weights in a run, forward, and backward to inputs that need it."""
    total, hooks = [0], []

    def count(layer, inputs, output):
        passes = 2 if output.requires_grad else 1
        total[0] += passes * 2 * inputs[0].numel() * layer.out_features
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Linear)]
    runner()
    for hook in hooks:
        hook.remove()
    return total[0]


def speed_of_products(device, dtype):
    """FLOP/s of a large product of two matrices."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / median(race({"": lambda: a @ a})[""])


def contest(rows, model, speed, title, runners, check, unit, n=1):
    """Runs all, checks {way: result}, times them, prints a line for each way and adds it to `rows`.

    speed: of large products, FLOP/s. n: units of work in a run.
    """
    done = {way: peak_memory(runner) for way, runner in runners.items()}
    check({way: result for way, (result, _) in done.items()})
    floor, times = count_products(model, runners[OURS]) / speed, race(runners)
    for way in [way for way in times if noise(times[way]) > 0.25]:
        times[way] = min(times[way], race({way: runners[way]})[way], key=noise)
    print(f"\n{title:44}{'seconds':>9}{'+-':>6}{unit + '/s':>11}{'x ours':>8}{'GiB':>7}{'floor':>7}")
    for way, seconds in times.items():
        s, gib = median(seconds), done[way][1]
        spread = f"{noise(seconds):.0%}{'!' * (noise(seconds) > 0.25)}" if len(seconds) > 1 else "once"
        print(f"  {way:42}{s:9.4g}{spread:>6}{n / s:11,.2f}{s / median(times[OURS]):8.2f}{gib:7.2f}"
              f"{floor / s:7.0%}", flush=True)
        rows.append(dict(title=title, way=way, seconds=seconds, unit=unit, n=n, gib=gib, floor=floor))


# ------------------------------------------------------------------------------------------------- the whole


def compare(contest, model, twin, size, dtype, chat):
    """Trains and answers, in all ways that there are for this size."""
    exact, T = dtype == "fp32", model.vit.n_patches + 293
    for P, n in [(1, 1), *[(2, 1), (4, 1)] * (size == "8b"), (1, 4)]:
        runners, batch = training(model, twin, P, n)
        check_training(model, twin, batch, exact)
        title = f"training step, {P} photo{'s' * (P > 1)}" + f" x {n} conversations" * (n > 1)
        contest(title, runners, lambda _: None, "tokens", P * n * T)
    check = partial(check_answers, exact=exact, is_real=size == "real")
    for P, K in [(1, 8), (1, 17), (1, 68), *[(8, 17)] * (size == "8b")]:
        contest(f"answering, {K} keypoints, {P} photo{'s' * (P > 1)} at a time",
                answering(model, twin, chat, P, K), check, "photos", P)


def check_tiny(device):
    """In fp32 all answers must be equal to the last token."""
    model = with_adapters(random_network("tiny", device, "fp32"))
    twin = Twin(model)
    for n in 1, 3:
        check_training(model, twin, training(model, twin, 2, n)[1], exact=True)
    check_answers({way: run() for way, run in answering(model, twin, CHAT, 3, 5).items()}, exact=True)


def main(argv):
    parser = Parser(description="Speed and memory beside Transformers + PEFT.")
    parser.add_argument("--size", choices=[*SIZES, "real"], default="small")
    parser.add_argument("--dtype", choices=DTYPES, help="None: bf16 on a GPU, fp32 elsewhere")
    parser.add_argument("--json", metavar="FILE", help="also write every run's seconds and GiB there")
    args = parser.parse_args(argv)
    import peft
    import transformers
    transformers.utils.logging.set_verbosity_error()
    device, rows = start_processes().device, []
    dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    threads = f"CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device.type == "cuda" else threads
    print(f"{name}, {dtype}, size {args.size}, torch {torch.__version__}, transformers "
          f"{transformers.__version__}, peft {peft.__version__}")
    check_tiny(device)
    chat = CHAT
    if args.size != "real":
        model = random_network(args.size, device, dtype)
    else:
        real = os.environ.get("CAPELLM_REAL", "the folder CAPELLM_REAL")
        model, chat = load_network(Namespace(
            vit=f"{real}/vit", llm=f"{real}/llm", image_size=224, seed=0, tune_vit="lora", tune_llm="lora",
            answer="text", instruction="description", pretrain=None), device, dtype)
    twin, speed = Twin(with_adapters(model)), speed_of_products(device, DTYPES[dtype])
    compare(partial(contest, rows, model, speed), model, twin, args.size, dtype, chat)
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    run(main)
