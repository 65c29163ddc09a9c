"""Speed beside what people would use instead, Transformers and PEFT (requirements-dev.txt).

    python -m tools.bench --size small    tiny: to see that it runs; small: ViT-S and 8 layers of width 512;
                                          8b: the paper's ViT-L and Llama-3.1-8B, on a GPU of 80 GB

All ways share their weights, random and made in memory, get the same inputs, and run in turn in one process,
after it was checked that their results are equal. Random networks do not keep to the format of answers, so
all are held to it. Columns: seconds, the median, and how far the slowest run was from the fastest; how many
times our time; floor, our products of matrices, if each were as fast as a large one, as a share of the time;
on a GPU the GiB of a run beyond what was held before.
"""

import math
import time
import warnings
from argparse import Namespace
from functools import partial
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from chat import IGNORE, AnswerFormat
from common import Parser, run, start_processes
from decode import locate
from llama import Llama, LlamaConfig
from model import DTYPES, CapeLLM, adapt
from vit import ViT, ViTConfig

SIZES = {  # of the ViT and the LLM; what is not said is DINOv2 ViT-L/14's and Llama-3.1-8B's
    "tiny": (dict(image_size=56, hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
             dict(vocab_size=2000, hidden_size=128, head_dim=32, intermediate_size=128, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2)),
    "small": (dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6),
              dict(hidden_size=512, head_dim=64, intermediate_size=1792, num_hidden_layers=8,
                   num_attention_heads=8, num_key_value_heads=2)),
    "8b": ({}, {})}
OURS, PEFT = "ours", "Transformers + PEFT"
PUBLISHED, USED_WELL = "published way", "Transformers, used well"

# What decode.py needs of a Chat, with made-up tokens. As with Llama-3, the numbers 000 ... 999 are one token
# each, here 10 ... 1009 in no order; words come after them.
CHAT = Namespace(
    bos=0, parse=lambda answer: (0.0, 0.0), coordinates=AnswerFormat(
        [[3, 4, 5], [6, 4, 5]], np.random.default_rng(0).permutation(range(10, 1010)).tolist(), [-1], 8))


def random_network(size, device, dtype):
    """CapeLLM with random weights and adapters that do something, made where they are used."""
    of_vit, of_llm = SIZES[size]
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPES[dtype])
    with torch.device(device):
        vit, llama = ViT(ViTConfig(**dict(image_size=224) | of_vit)), Llama(LlamaConfig(**of_llm))
    torch.set_default_dtype(torch.float32)
    adapt(vit, "lora", ("q", "v"))
    adapt(llama, "lora", ("q_proj", "v_proj"))
    model = CapeLLM(vit, llama).to(device).eval()
    for name, p in model.named_parameters():
        if p.ndim > 1 and "lora_A" not in name:
            std = 0.02 if p.ndim > 2 or "lora" in name else p.shape[-1] ** -0.5
            # attention is sharp, or nearly all questions would get the same answer
            nn.init.normal_(p, std=8 * std if "q_proj.base" in name else std)
    return model


class Twin(nn.Module):
    """The same network of Transformers' Dinov2 and Llama with PEFT's adapters. All weights are shared."""

    def __init__(self, model):
        super().__init__()
        import transformers
        from peft import LoraConfig, get_peft_model

        warnings.simplefilter("ignore", FutureWarning)
        c, v = model.llama.config, model.vit.config
        c = {k: x for k, x in vars(c).items() if k != "rope"} | {"rope_parameters": c.rope}
        with torch.device("meta"):
            self.vit = transformers.Dinov2Model(transformers.Dinov2Config(**vars(v)))
            self.llama = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**c, max_position_embeddings=131072))
        self.vit.embeddings.mask_token = None
        with torch.device(model.projection.weight.device):  # what no file holds
            self.llama.model.rotary_emb = type(self.llama.model.rotary_emb)(self.llama.config)
        ours = {name.replace(".base.", "."): p for name, p in model.named_parameters() if "lora" not in name}
        self.llama.load_state_dict({key: ours["llama." + key.removeprefix("model.")]
                                    for key in self.llama.state_dict()}, assign=True)
        weights = [p for name, p in ours.items() if name.startswith("vit.")]  # in the same order
        self.vit.load_state_dict(dict(zip(self.vit.state_dict(), weights, strict=True)), assign=True)
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
        labels = F.pad(labels.to(x.device), (x.shape[1] - labels.shape[1], 0), value=IGNORE)
        return self.llama(inputs_embeds=x, labels=labels, use_cache=False).loss

    @torch.no_grad()
    def generate(self, photos, photo_of, questions, published=False):
        """Greedy answers, held to the format. published: as in the authors' code, the ViT runs for every
        token, logits are made at every position, and five tokens more are made than the coordinates need.
        """
        form, N, T = CHAT.coordinates, (photos.shape[-1] // 14) ** 2, max(map(len, questions))
        held = [choices for known in form.known for choices in (*([token] for token in known), form.digits)]
        start = [CHAT.bos] + [-2] * N  # -2: the photo, -1: padding
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


def make_photos(n, model):
    side = model.vit.config.image_size
    photos = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(n))
    return photos.to(model.projection.weight.device)


def answering(model, twin, exact, P, K):
    """K questions about each of P photos, answered in each way and compared -> {way: function that does it}.

    Questions are as long as those of the real descriptions, with Llama-3's 40 to 94 tokens.
    """
    rng, photos, words = np.random.default_rng(K), make_photos(P, model), model.llama.config.vocab_size
    lengths, common = rng.normal(62, 9, (P, K)).round().clip(40, 94).astype(int), [2, 7, 8, 9, 1]
    questions = [[common + rng.integers(1010, words, n - 5).tolist() for n in row] for row in lengths]

    def ours():
        found = locate(model, photos, questions, CHAT, constrained=True)
        return [prediction.answer for of_photo in found for prediction in of_photo]

    def used_well():  # each photo seen once, all questions in one batch, no token and no logits too many
        return twin.generate(photos, np.arange(P).repeat(K), sum(questions, []))

    def published():  # a copy of the photo with each question, 15 at a time
        chunks = [(p, asked[i:i + 15]) for p, asked in enumerate(questions) for i in range(0, K, 15)]
        return sum((twin.generate(photos[[p] * len(chunk)], np.arange(len(chunk)), chunk, published=True)
                    for p, chunk in chunks), [])

    said = np.array(ours())
    assert len(np.unique(said, axis=0)) > len(said) / 4, "nearly all questions get the same answer"
    for way, run_it in (USED_WELL, used_well), (PUBLISHED, published):
        # In bf16 products of other shapes round otherwise, and a close call between two numbers may go either
        # way. All tokens must be equal in fp32, in which a tiny network is compared before.
        equal = (np.array(run_it()) == said).mean()
        assert equal >= (1 if exact else 0.9), f"{way}: {equal:.1%} of the tokens are equal"
    return {OURS: ours, USED_WELL: used_well, PUBLISHED: published}


def training(model, twin, exact, P, n):
    """n conversations about each of P photos, loss and gradients compared -> {way: function of a step}."""
    device, words = model.projection.weight.device, model.llama.config.vocab_size
    learned = torch.tensor([0, 0] + sum(([0] * length + [1] * 11 for length in (55, 61, 62, 69)), []))
    tokens = torch.randint(words, (P * n, len(learned)), generator=torch.Generator().manual_seed(P))
    tokens[:, 0] = CHAT.bos
    labels = tokens.where(learned > 0, IGNORE)
    photo_of = torch.arange(P, device=device).repeat_interleave(n) if n > 1 else None
    batch = make_photos(P, model), tokens.to(device), labels, photo_of

    losses, gradients = [], []
    for network in model, twin:  # here without dropout
        losses.append(network(*batch))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(losses[-1], trained(network))]))
    apart = ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()
    assert abs(losses[0] / losses[1] - 1) < (1e-4 if exact else 0.02), f"losses {losses}"
    # deep random networks amplify the rounding of bf16
    assert apart < (1e-3 if exact else 0.5), f"gradients {apart:.1e} apart"

    def step(network, optimizer):
        network.train()(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        network.eval()
    return {way: partial(step, network, torch.optim.AdamW(trained(network), lr=1e-6))
            for way, network in ((OURS, model), (PEFT, twin))}


def count_products(model, runner):
    """FLOP of the products with weights in a run, forward, and backward to inputs that need it."""
    counts = []

    def count(layer, inputs, output):
        counts.append((2 if output.requires_grad else 1) * 2 * inputs[0].numel() * layer.out_features)
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Linear)]
    runner()
    for hook in hooks:
        hook.remove()
    return sum(counts)


def race(runners, patience=40):
    """Runs {way: function} in turn, five times or for `patience` s -> {way: seconds of each run}."""
    wait, times = torch.cuda.synchronize if torch.cuda.is_available() else int, {way: [] for way in runners}
    for way in 5 * [*runners]:
        if sum(times[way]) < patience:
            wait()
            began = time.perf_counter()
            runners[way]()
            wait()
            times[way].append(time.perf_counter() - began)
    return times


def peak_memory(runner):
    """-> the GiB of the GPU that a run needs beyond what was held before; NaN without a GPU."""
    if not torch.cuda.is_available():
        return math.nan
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    runner()
    return (torch.cuda.max_memory_allocated() - held) / 2**30


def contest(title, runners, model, speed):
    """Runs all and prints a line for each. speed: of large products, FLOP/s."""
    floor, times = count_products(model, runners[OURS]) / speed, race(runners)
    print(f"\n{title:50}{'seconds':>9}{'+-':>6}{'x ours':>8}{'floor':>7}{'GiB':>7}")
    for way, seconds in times.items():
        s = median(seconds)
        print(f"  {way:48}{s:9.4g}{(max(seconds) - min(seconds)) / s:6.0%}{s / median(times[OURS]):8.2f}"
              f"{floor / s:7.0%}{peak_memory(runners[way]):7.2f}", flush=True)


def main(argv):
    parser = Parser(description="Speed beside Transformers + PEFT.")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", choices=DTYPES, help="None: bf16 on a GPU, fp32 elsewhere")
    args = parser.parse_args(argv)
    import peft
    import transformers
    transformers.utils.logging.set_verbosity_error()
    device = start_processes().device
    on_gpu = device.type == "cuda"
    dtype, n = args.dtype or ("bf16" if on_gpu else "fp32"), 8192 if on_gpu else 2048
    print(torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads", dtype,
          args.size, *(f"{m.__name__} {m.__version__}" for m in (torch, transformers, peft)), sep=", ")
    tiny = random_network("tiny", device, "fp32")
    twin = Twin(tiny)
    training(tiny, twin, True, 2, 1), training(tiny, twin, True, 2, 3), answering(tiny, twin, True, 3, 5)
    model = random_network(args.size, device, dtype)
    twin, square = Twin(model), torch.randn(n, n, device=device, dtype=DTYPES[dtype])
    speed = 2 * n**3 / median(race({OURS: lambda: square @ square})[OURS])
    for P, conversations in [(1, 1), *[(4, 1)] * (args.size == "8b"), (1, 4)]:
        contest(f"training step, photos x conversations: {P} x {conversations}",
                training(model, twin, dtype == "fp32", P, conversations), model, speed)
    for P, K in [(1, 8), (1, 17), (1, 68), *[(8, 17)] * (args.size == "8b")]:
        contest(f"answering, photos x keypoints: {P} x {K}",
                answering(model, twin, dtype == "fp32", P, K), model, speed)


if __name__ == "__main__":
    run(main)
