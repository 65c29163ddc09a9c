"""Speed beside what people would use instead, Transformers and PEFT (requirements-dev.txt).

    python -m tools.bench --size small    tiny: to see that it runs; small: ViT-S and 8 layers of width 512;
                                          8b: the paper's ViT-L and Llama-3.1-8B, on a GPU of 80 GB

All ways share their weights, random and made in memory, and our ViT; they get the same inputs, and run in
turn in one process. First their results are compared: in fp32 they must be equal. Random networks do not keep
to the format of answers, so all are held to it. Columns: seconds, the median; how far the slowest run was
from the fastest; how many times our time.
"""

import time
from argparse import Namespace
from statistics import median

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from chat import IGNORE, AnswerFormat
from common import Parser, run, start_processes
from decode import locate
from llama import Llama, LlamaConfig
from model import DTYPES, CapeLLM, adapt
from vit import ViT, ViTConfig

SIZES = {  # of the ViT and the LLM; what is not said is DINOv2 ViT-L/14's and Llama-3.1-8B's
    "tiny": (dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
             dict(vocab_size=2000, hidden_size=128, head_dim=32, intermediate_size=128, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2)),
    "small": (dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6),
              dict(hidden_size=512, head_dim=64, intermediate_size=1792, num_hidden_layers=8,
                   num_attention_heads=8, num_key_value_heads=2)),
    "8b": ({}, {})}
OURS, PEFT, PUBLISHED, USED_WELL = "ours", "Transformers + PEFT", "published way", "Transformers, used well"

# What decode.py needs of a Chat, with made-up tokens. As with Llama-3, the numbers 000 ... 999 are one token
# each, here 10 ... 1009 in no order; words are 1010 ... 1999.
NUMBERS = (10 + torch.randperm(1000, generator=torch.Generator().manual_seed(0))).tolist()
CHAT = Namespace(bos=0, parse=tuple, coordinates=AnswerFormat([[3, 4, 5], [6, 4, 5]], NUMBERS, [-1], 8))
HELD = [[3], [4], [5], NUMBERS, [6], [4], [5], NUMBERS]  # what each token of an answer is chosen from


def make_networks(size, device, dtype):
    """-> CapeLLM with random weights and adapters that do something, and one around Transformers' Llama."""
    config = LlamaConfig(**SIZES[size][1])
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPES[dtype])
    with torch.device(device):
        vit = ViT(ViTConfig(image_size=224, **SIZES[size][0]))
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            **vars(config), rope_parameters=config.rope, max_position_embeddings=131072))
    torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        llama = Llama(config)
    llama.load_state_dict({k.removeprefix("model."): w for k, w in base.state_dict().items()}, assign=True)
    adapt(vit, "lora", ("q", "v"))
    adapt(llama, "lora", ("q_proj", "v_proj"))
    peft.inject_adapter_in_model(peft.LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"]), base)
    ours = CapeLLM(vit, llama).to(device).eval()
    theirs = Theirs(ours, base).eval()
    for p, shared in zip(trained(theirs), trained(ours), strict=True):
        p.data = shared.data
    for name, p in ours.named_parameters():
        if p.ndim > 1:  # attention is sharp, or nearly all questions would get the same answer
            nn.init.normal_(p, std=p[0].numel() ** -0.5 * (8 if "q_proj.base" in name else 1))
    return ours, theirs


def trained(network):
    return [p for p in network.parameters() if p.requires_grad]


class Theirs(nn.Module):
    """CapeLLM around Transformers' Llama."""

    def __init__(self, ours, llama):
        super().__init__()
        self.vit, self.llama, self.projection = ours.vit, llama, ours.projection
        self.see, self.embed = ours.see, ours.embed

    def forward(self, images, tokens, labels, photo_of):
        x = self.embed(images if photo_of is None else images[photo_of], tokens)
        labels = F.pad(labels, (x.shape[1] - labels.shape[1], 0), value=IGNORE).to(x.device)
        return self.llama(inputs_embeds=x, labels=labels, use_cache=False).loss

    @torch.no_grad()
    def generate(self, images, photo_of, questions, published=False):
        """Greedy answers, held to the format. published: as in the authors' code, the ViT runs for every
        token, logits are made at every position, and five tokens more are made than the coordinates need.
        """
        def keep_format(said, scores):
            if published and said.shape[1]:
                self.see(images[photo_of])
            barred = torch.ones_like(scores[0], dtype=torch.bool)
            barred[HELD[min(said.shape[1], 7)]] = False
            return scores.masked_fill(barred, -torch.inf)

        T = max(map(len, questions))  # what pads a question stands before it
        tokens = torch.tensor([[CHAT.bos] + [-1] * (T - len(q)) + q for q in questions], device=images.device)
        text, image = self.llama.get_input_embeddings()(tokens.clamp(0)), self.see(images)[photo_of]
        return self.llama.generate(
            inputs_embeds=torch.cat((text[:, :1], image, text[:, 1:]), dim=1),
            attention_mask=F.pad((tokens >= 0).long(), (image.shape[1], 0), value=1),
            logits_processor=[keep_format], do_sample=False, pad_token_id=0,
            max_new_tokens=13 if published else 8, logits_to_keep=0 if published else 1)[:, :8].tolist()


def answering(ours, theirs, P, K):
    """K questions about each of P photos -> {way: function that answers them}."""
    torch.manual_seed(K)
    images = torch.randn(P, 3, 224, 224).to(ours.projection.weight.device)
    # as long as those of descriptions.json with Llama-3's tokenizer, 40 to 94 tokens
    questions = [[[2, 7, 8, 9, 1] + torch.randint(1010, 2000, (n,)).tolist()
                  for n in torch.normal(57.0, 9.0, (K,)).round().int().clamp(35, 89)] for _ in range(P)]

    def answer():
        found = locate(ours, images, questions, CHAT, constrained=True)
        return [prediction.answer for of_photo in found for prediction in of_photo]

    def used_well():  # each photo seen once, all questions in one batch, no token and no logits too many
        return theirs.generate(images, torch.arange(P).repeat_interleave(K), sum(questions, []))

    def published():  # a copy of the photo with each question, 15 at a time
        chunks = [(p, asked[i:i + 15]) for p, asked in enumerate(questions) for i in range(0, K, 15)]
        return sum((theirs.generate(images[[p] * len(chunk)], range(len(chunk)), chunk, published=True)
                    for p, chunk in chunks), [])

    said = [torch.tensor(way()) for way in (answer, used_well, published)]
    assert len(said[0].unique(dim=0)) > P * K / 4, "nearly all questions get the same answer"
    compare(ours, USED_WELL, (said[0] != said[1]).float().mean())
    compare(ours, PUBLISHED, (said[0] != said[2]).float().mean())
    return {OURS: answer, USED_WELL: used_well, PUBLISHED: published}


def training(ours, theirs, P, n):
    """n conversations of 4 questions about each of P photos -> {way: function of a training step}."""
    torch.manual_seed(P)
    device, learned = ours.projection.weight.device, torch.tensor([0, 0] + 4 * ([0] * 62 + [1] * 11))
    tokens = torch.randint(1010, 2000, (P * n, len(learned))).index_fill(1, torch.tensor(0), CHAT.bos)
    labels, photo_of = tokens.where(learned > 0, IGNORE), torch.arange(P, device=device).repeat_interleave(n)
    batch = torch.randn(P, 3, 224, 224).to(device), tokens.to(device), labels, photo_of if n > 1 else None
    gradients = [torch.autograd.grad(network(*batch), trained(network)) for network in (ours, theirs)]
    a, b = (torch.cat([g.flatten() for g in of_network]) for of_network in gradients)
    compare(ours, PEFT, (a - b).norm() / a.norm())

    def step(network):
        network.zero_grad()
        network.train()(*batch).backward()
        network.eval()
    return {OURS: lambda: step(ours), PEFT: lambda: step(theirs)}


def compare(model, what, apart):
    """Prints by which share results differ. AssertionError if they do in fp32; bf16 rounds too much."""
    print(f"{what}: {apart:.1e} apart")
    assert model.llama.norm.weight.dtype == torch.bfloat16 or apart < 1e-3, what


def contest(title, ways, patience=40):
    """Runs all ways in turn, five times or for `patience` seconds each, and prints a line for each."""
    wait, times = torch.cuda.synchronize if torch.cuda.is_available() else int, {way: [] for way in ways}
    for way in 5 * [*ways]:
        if sum(times[way]) < patience:
            began = time.perf_counter()
            ways[way]()
            wait()
            times[way].append(time.perf_counter() - began)
    print(f"{title:50}{'seconds':>9}{'+-':>6}{'x ours':>8}")
    for way, seconds in times.items():
        s = median(seconds)
        spread, ratio = (max(seconds) - min(seconds)) / s, s / median(times[OURS])
        print(f"  {way:48}{s:9.4g}{spread:6.0%}{ratio:8.2f}", flush=True)


def main(argv):
    parser = Parser(description="Speed beside Transformers + PEFT.")
    parser.add_argument("--size", choices=SIZES, default="small")
    size, on_gpu = parser.parse_args(argv).size, torch.cuda.is_available()
    print(torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads", size,
          *(f"{m.__name__} {m.__version__}" for m in (torch, transformers, peft)), sep=", ")
    networks = make_networks(size, start_processes().device, "bf16" if on_gpu else "fp32")
    for P, n in [(1, 1), (4, 1), (1, 4)]:
        contest(f"training step, photos x conversations: {P} x {n}", training(*networks, P, n))
    for P, K in [(1, 8), (1, 17), (1, 68), *[(8, 17)] * on_gpu]:
        contest(f"answering, photos x keypoints: {P} x {K}", answering(*networks, P, K))


if __name__ == "__main__":
    run(main)
