"""Speed and memory beside what people would use instead: Transformers and PEFT (requirements-dev.txt).

    python bench.py --size small    tiny: to see that it runs; small: ViT-S and 8 layers of width 512;
                                    8b: the paper's ViT-L and Llama-3.1-8B, on a GPU with room for them;
                                    real: published weights, in vit/ and llm/ of the folder CAPELLM_REAL

Contestants run in turn in one process, on the same weights and inputs, in bf16 on a GPU and in fp32 elsewhere
(real: also in bf16 where the CPU computes with it). A difference between their results ends the program
before they are timed. It prints, for a training step of the paper's conversation (549 positions, 4 rounds, 44
labels), for answering 8, 17 and 68 questions about a photo, and for loading a checkpoint of 2 GB in shards:

    seconds   of the median run; +-: how far the slowest was from the fastest, "!" if too far to be trusted
    x ours    how many times our time
    GiB       peak memory (GPU: allocated; CPU: of the process); before: without the run
    floor     8b: share of what an H200 can reach, if it ran at 790 TFLOP/s and 4.3 TB/s all the time
"""

import argparse
import ctypes
import math
import os
import tempfile
import time
import warnings
from functools import cache, partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import profile

from annotations import parse_descriptions
from chat import IGNORE, AnswerFormat, Category, Chat
from common import read_json, run, write_json
from decode import locate
from llama import Llama, LlamaConfig
from lora import add_lora
from model import CapeLLM
from vit import ViT, ViTConfig

SIZES = {  # of the ViT and the LLM; what is not said is DINOv2 ViT-L/14's and Llama-3.1-8B's
    "tiny": (dict(image_size=56, hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
             dict(vocab_size=2000, hidden_size=128, head_dim=32, intermediate_size=128, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2)),
    "small": (dict(image_size=224, hidden_size=384, num_hidden_layers=12, num_attention_heads=6),
              dict(hidden_size=512, head_dim=64, intermediate_size=1792, num_hidden_layers=8,
                   num_attention_heads=8, num_key_value_heads=2)),
    "8b": (dict(image_size=224), {})}
FLOORS = {8: 0.0175, 17: 0.0255, 68: 0.0875, "training": 0.0202}  # seconds a photo or conversation
OURS, PLAIN, CHECKPOINTED = "ours", "ours, plain loop", "ours, checkpointed activations"
PUBLISHED, USED_WELL, PEFT = "published way", "Transformers, used well", "Transformers + PEFT"

# ----------------------------------------------------------------------------------------------- contestants

NUMBER = 10  # the tokens of the numbers 000 ... 999 are 10 ... 1009, then come words
COLON, IMAGE, PADDING = 7, -2, -1


def make_chat(known):
    """What locate() needs of a Chat, with made-up tokens. As with Llama-3, a number is one token."""
    coordinates = AnswerFormat(known, list(range(NUMBER, NUMBER + 1000)), ending=[1], max_tokens=8)
    return SimpleNamespace(bos=0, newline=[2], opening=[], keypoint=None, coordinates=coordinates,
                           parse=lambda answer: tuple((token - NUMBER) / 1000 for token in answer[3::4]))


CHAT = make_chat([[3, 4, 5], [6, 4, 5]])  # " [" "0" "." ddd "," "0" "." ddd
CHAT_PLAIN = make_chat([[9] * 3] * 2)  # never said, so every answer is decoded again by the plain loop


@torch.no_grad()
def build(size, device, dtype):
    """CapeLLM with random weights, made on the device: there is never a second copy."""
    vit_args, llama_args = SIZES[size]
    with torch.device("meta"):
        vit, llama = ViT(ViTConfig(**vit_args)).to(dtype), Llama(LlamaConfig(**llama_args)).to(dtype)
        for network, names in (vit, ("q", "v")), (llama, ("q_proj", "v_proj")):
            add_lora(network.requires_grad_(False), names)
        model = CapeLLM(vit, llama)
    model.to_empty(device=device).eval()
    torch.manual_seed(0)
    small = (2 + len(llama.layers)) ** -0.5  # what the layers add must not drown the token itself
    gains = {"q_proj": 1.25, "k_proj": 1.25, "o_proj": small, "down_proj": small, "lora_B": 0.1,
             "lm_head": 0.1}
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.normal_(0.0 if name.endswith("bias") else 1.0, 0.1)
        else:
            table = name.endswith(("cls_token", "pos_embed", "embed_tokens.weight"))
            gain = next((gain for key, gain in gains.items() if key in name), 1)
            p.normal_(0, gain / (1 if table else p[0].numel()) ** 0.5)
    teach_format(llama)
    return model


def teach_format(llama):
    """Gives the output layer what training would: after ":" comes " [", after that "0", ... and after "." one
    of 1000 numbers. Which one is left to photo and question.

    How many passes locate() takes depends on whether the model keeps to the format, and a random one does
    not. It is fair: all have the same weights, and all decode greedily from the whole vocabulary. PLAIN shows
    what it takes when no answer keeps to the format.
    """
    head, embedding = llama.lm_head.weight, llama.embed_tokens.weight
    digits = torch.tensor(CHAT.coordinates.digits, device=head.device)
    embedding[digits] = 0.5 * embedding[digits] + embedding[NUMBER]  # numbers resemble each other
    head[digits] *= 10
    (bracket, zero, point), (comma, *_) = CHAT.coordinates.known
    for token, following in ((COLON, bracket), (bracket, zero), (zero, point), (NUMBER, comma), (comma, zero),
                             (point, digits)):
        direction = embedding[token] / embedding[token].norm()
        if following is digits:
            head[digits] -= torch.outer(head[digits] @ direction, direction)  # else "." has a favourite
        head[following] += (4 if following is digits else 8) / head.shape[1] ** 0.5 * direction


@cache
class Twin(nn.Module):
    """The same network of Transformers' Dinov2 and Llama with PEFT's adapters, on the tensors of `model`."""

    RENAMES = [
        ("llama.", "llama.model."), ("model.lm_head", "lm_head"), ("vit.norm", "vit.layernorm"),
        ("patch_embed", "embeddings.patch_embeddings.projection"), ("cls_token", "embeddings.cls_token"),
        ("pos_embed", "embeddings.position_embeddings"), ("blocks", "encoder.layer"),
        ("attn.proj", "attention.o_proj"), *((f"attn.{x}.", f"attention.{x}_proj.") for x in "qkv"),
        ("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1"),
        (".base.", ".base_layer."), ("lora_A", "lora_A.default.weight"), ("lora_B", "lora_B.default.weight")]

    def __init__(self, model):
        super().__init__()
        import transformers
        from peft import LoraConfig, get_peft_model

        warnings.simplefilter("ignore", FutureWarning)
        vit = {key: getattr(model.vit.config, key) for key in
               ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")}
        vit["image_size"] = math.isqrt(model.vit.n_patches) * vit["patch_size"]
        llama = {**vars(model.llama.config), "max_position_embeddings": 131072}
        rope = llama.pop("rope")
        with torch.device("meta"):
            self.vit = transformers.Dinov2Model(transformers.Dinov2Config(**vit, use_mask_token=False))
            self.llama = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**llama, rope_parameters=rope))
            for network in self.vit, self.llama:
                get_peft_model(network, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05,
                                                   target_modules=["q_proj", "v_proj"]))
        self.projection, rotary = model.projection, self.llama.model.rotary_emb
        # RoPE's frequencies are not in the state
        self.llama.model.rotary_emb = type(rotary)(self.llama.config).to(self.projection.weight.device)
        state = {}
        for name, p in model.state_dict(keep_vars=True).items():
            for ours, theirs in self.RENAMES:
                name = name.replace(ours, theirs)
            state[name] = p
        self.load_state_dict(state, assign=True)
        self.eval()

    def see(self, images):
        z = self.vit(images.to(self.vit.dtype)).last_hidden_state[:, 1:]
        return F.linear(z, self.projection.weight.to(z.dtype), self.projection.bias.to(z.dtype))

    def forward(self, images, tokens, labels):
        text = self.llama.model.embed_tokens(tokens)
        x = torch.cat((text[:, :1], self.see(images), text[:, 1:]), dim=1)
        labels = F.pad(labels, (x.shape[1] - labels.shape[1], 0), value=IGNORE)
        return self.llama(inputs_embeds=x, labels=labels, use_cache=False).loss

    @torch.no_grad()
    def generate(self, photos, photo_of, questions, chat, n_tokens, held=None, published=False):
        """What Transformers' generate() does, less its bookkeeping: greedy, cached, padded on the left.

        held: for each step the tokens it may choose from, all if None. published: the ViT runs again for
        every token, and logits are made at every position.
        """
        N, T = (photos.shape[-1] // 14) ** 2, max(map(len, questions))
        start = [chat.bos] + [IMAGE] * N + chat.newline
        tokens = torch.tensor([[PADDING] * (T - len(q)) + start + q for q in questions], device=photos.device)
        mask, embed, cached, said = (tokens != PADDING).long(), self.llama.model.embed_tokens, None, []
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        for step in range(n_tokens):
            if step == 0 or published:
                image = self.see(photos)[photo_of]
            x = embed(said[-1][:, None] if said else tokens.clamp(min=0))
            if step == 0:
                x = x.masked_scatter((tokens == IMAGE)[..., None], image.to(x.dtype))
            out = self.llama(inputs_embeds=x, attention_mask=mask, position_ids=positions,
                             past_key_values=cached, use_cache=True, logits_to_keep=0 if published else 1)
            choices = torch.arange(out.logits.shape[-1]) if held is None else torch.tensor(held[step])
            choices = choices.to(photos.device)
            said.append(choices[out.logits[:, -1, choices].argmax(-1)])
            cached, mask, positions = out.past_key_values, F.pad(mask, (0, 1), value=1), positions[:, -1:] + 1
        return torch.stack(said, dim=1).tolist()


# ------------------------------------------------------------------------------------------------- the tasks


def make_photos(n, model):
    side = 14 * math.isqrt(model.vit.n_patches)
    photos = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(n))
    return photos.to(model.projection.weight.device)


def make_questions(P, K, vocabulary):
    """K questions about each of P photos, of 39 to 93 random tokens, as in descriptions.json, and a colon."""
    rng = np.random.default_rng(K)
    lengths = rng.normal(61, 9, (P, K)).round().clip(39, 93).astype(int)
    return [[[*rng.integers(NUMBER + 1000, vocabulary, n - 1).tolist(), COLON] for n in row]
            for row in lengths]


def answer(way, model, photos, questions, chat=CHAT, held=None):
    """All questions of all photos in one of the ways -> the tokens of each answer, up to the last digit.

    held: for each step the tokens to choose from, if answers are held to the format.
    """
    n = len(held) if held else chat.coordinates.max_tokens
    if way in (OURS, PLAIN):
        predictions = locate(model, photos, questions, chat if way == OURS else CHAT_PLAIN,
                             constrained=held is not None)
        return [prediction.answer for of_photo in predictions for prediction in of_photo]
    twin = Twin(model)
    if way == USED_WELL:  # each photo seen once, all questions in one batch, no token and no logits too many
        photo_of = [p for p, asked in enumerate(questions) for _ in asked]
        return twin.generate(photos, photo_of, sum(questions, []), chat, n, held)
    answers = []
    for photo, asked in zip(photos, questions):  # a copy of the photo with each question, 15 at a time
        for chunk in (asked[i:i + 15] for i in range(0, len(asked), 15)):
            copies = photo.expand(len(chunk), -1, -1, -1)
            answers += twin.generate(copies, list(range(len(chunk))), chunk, chat, 13, published=True)
    return [tokens[:n] for tokens in answers]


def answering(model, P, K, ways=(OURS, PLAIN, PUBLISHED, USED_WELL)):
    """P photos with K questions each -> the ways to answer them."""
    photos, questions = make_photos(P, model), make_questions(P, K, model.llama.config.vocab_size)
    return {way: partial(answer, way, model, photos, questions) for way in ways}


def answering_really(model, K, chat):
    """A photo and K questions of descriptions.json. Untrained, the network must be held to the format."""
    path = Path(__file__).with_name("descriptions.json")
    category = max(parse_descriptions(read_json(path), path).values(), key=lambda c: len(c.keypoints))
    questions = [chat.questions(Category(category.name, category.keypoints[:K]))]
    held = [choices for known in chat.coordinates.known
            for choices in (*([token] for token in known), chat.coordinates.digits)]
    return {way: partial(answer, way, model, make_photos(1, model), questions, chat, held)
            for way in (OURS, USED_WELL)}


def training(model, B):
    """A micro-batch of B conversations -> the ways to take a step as train.py does, and the batch."""
    learned = np.concatenate([[0, 0], *([0] * n + [1] * 11 for n in (55, 61, 62, 69))])
    rng, vocabulary = np.random.default_rng(B), model.llama.config.vocab_size
    tokens = torch.from_numpy(rng.integers(NUMBER + 1000, vocabulary, (B, len(learned))))
    labels = tokens.where(torch.tensor(learned) > 0, IGNORE)
    batch = [t.to(model.projection.weight.device) for t in (make_photos(B, model), tokens, labels)]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=batch[0].is_cuda)

    def step(way):
        model.llama.checkpoint_activations = way == CHECKPOINTED
        (Twin(model) if way == PEFT else model).train()(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {way: partial(step, way) for way in (OURS, CHECKPOINTED, PEFT)}, batch


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
    """-> what a run returns, and GiB at most and before it; None where Linux does not tell."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return runner(), (torch.cuda.max_memory_allocated() / 2**30, before / 2**30)
    status = Path("/proc/self/status")
    if not status.exists():
        return runner(), None

    def gib(key):
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if key in line) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # gives back what was freed
    status.with_name("clear_refs").write_text("5")  # forgets the peak so far
    before = gib("VmRSS")
    return runner(), (gib("VmHWM"), before)


ROWS = []  # all that was printed, for --json


def contest(title, runners, check, unit, n=1, floor=None):
    """A group of the table: runs all, checks {way: result}, times them. n: units of work in a run."""
    done = {way: peak_memory(runner) for way, runner in runners.items()}
    check({way: result for way, (result, _) in done.items()})
    times = race(runners)
    for way in [way for way in times if noise(times[way]) > 0.25]:
        times[way] = min(times[way], race({way: runners[way]})[way], key=noise)
    print(f"\n{title:44}{'seconds':>9}{'+-':>6}{unit + '/s':>11}{'x ours':>8}{'GiB':>7}{'before':>8}"
          + f"{'floor':>7}" * bool(floor))
    for way, seconds in times.items():
        s, memory = median(seconds), done[way][1]
        spread = f"{noise(seconds):.0%}{'!' * (noise(seconds) > 0.25)}" if len(seconds) > 1 else "once"
        line = f"  {way:42}{s:9.4g}{spread:>6}{n / s:11,.2f}{s / median(times[OURS]):8.2f}"
        line += "{:7.2f}{:8.2f}".format(*memory) if memory else f"{'':15}"
        print(line + (f"{floor / s:7.0%}" if floor else ""), flush=True)
        ROWS.append({"title": title, "way": way, "seconds": seconds, "unit": unit, "n": n, "memory": memory})


def attention_kernels(runner):
    """The names of the operations in which a run's attention was computed."""
    with profile() as events:
        runner()
    return sorted({event.key for event in events.key_averages() if "_scaled_dot_product" in event.key})


# ---------------------------------------------------------------------------------------------------- tables


def check_answers(answers, exact, in_format=True):
    """answers: {way: tokens of each answer}. Fails if they differ, or if the comparison would be idle."""
    ours = np.array(answers[OURS])
    if in_format:
        template = [token for known in CHAT.coordinates.known for token in (*known, None)]
        for column, known in zip(ours.T, template, strict=True):
            assert known is None or (column == known).all(), "the network does not keep to the format"
        assert len(np.unique(ours[:, 3])) > len(ours) / 4, "nearly all questions get the same answer"
    for way, tokens in answers.items():
        # In bf16 products of other shapes round otherwise, and a close call between two numbers may go either
        # way. All tokens must be equal in fp32, in which a tiny network is checked before.
        equal = (np.array(tokens) == ours).mean()
        assert equal >= (1 if exact else 0.9), f"{way}: {equal:.1%} of the tokens are equal"


def check_training(model, batch, exact):
    """One step without dropout. Gradients lie in the same place in both, since the parameters are shared."""
    losses, gradients = [], []
    for network in model, Twin(model):
        loss = network.eval()(*batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        model.zero_grad()
    apart = ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()
    assert abs(losses[0] / losses[1] - 1) < (1e-4 if exact else 0.02), f"losses {losses}"
    # deep random networks amplify the rounding of bf16
    assert apart < (1e-3 if exact else 0.5), f"gradients {apart:.1e} apart"


def tables(size, model, exact, chat=None):
    """Trains and answers, in all ways that there are for this size."""
    is_big = size == "8b"
    floors = FLOORS if is_big else {}
    for B in (1, 2, 4) if is_big else (1,):
        runners, batch = training(model, B)
        check_training(model, batch, exact)
        runners[OURS]()  # the first step makes Adam's state
        T, floor = B * (model.vit.n_patches + batch[1].shape[1]), B * floors.get("training", 0)
        contest(f"training step, {B} x {T // B} positions", runners, lambda _: None, "tokens", T, floor)
    model.eval(), Twin(model).eval()
    for P, K in [(1, 8), (1, 17), (1, 68), *[(8, 17)] * is_big]:
        runners = answering_really(model, K, chat) if chat else answering(model, P, K)
        contest(f"answering, {K} keypoints, {P} photo{'s' * (P > 1)} at a time", runners,
                partial(check_answers, exact=exact, in_format=not chat), "photos", P, P * floors.get(K, 0))
    if is_big:
        print("\nattention of the last photo:", *attention_kernels(runners[OURS]))


def loading_table(device, dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=128256, hidden_size=2048, intermediate_size=5632, num_hidden_layers=12,
                         num_attention_heads=32, num_key_value_heads=8, head_dim=64, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM._from_config(config).save_pretrained(folder, max_shard_size="500MB")

        def load(way):
            model = (Llama.load(folder, dtype, device) if way == OURS else
                     LlamaForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device))
            return sum(p.flatten()[::1000].sum(dtype=torch.float64).item() for p in model.parameters())

        def check(sums):
            assert len(set(sums.values())) == 1, "the weights loaded differ"
        contest("loading 2.1 GB of bf16 in shards of 0.5", {way: partial(load, way) for way in
                (OURS, "from_pretrained")}, check, "GB", 2.1)


def main(argv):
    parser = argparse.ArgumentParser(description="Speed and memory beside Transformers + PEFT.")
    parser.add_argument("--size", choices=[*SIZES, "real"], default="small")
    parser.add_argument("--json", metavar="FILE", help="also write every run's seconds and GiB there")
    args = parser.parse_args(argv)
    import peft
    import transformers
    transformers.utils.logging.disable_progress_bar()
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    ROWS.clear()
    print(f"{where}, size {args.size}, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"peft {peft.__version__}")
    if args.size == "real":
        folder = Path(os.environ.get("CAPELLM_REAL", "no folder in CAPELLM_REAL"))
        cpu = Path("/proc/cpuinfo")
        has_bf16 = gpu or cpu.exists() and {"avx512_bf16", "amx_bf16"} & set(cpu.read_text().split())
        for name in ("fp32", "bf16") if has_bf16 else ("fp32",):
            print(f"\n{name}")
            model = CapeLLM.load(folder / "vit", folder / "llm", device=device, dtype=name)
            tables("real", model, name == "fp32", Chat(folder / "llm"))
    else:
        tiny = build("tiny", device, torch.float32)  # in which all must be equal
        check_training(tiny, training(tiny, 2)[1], exact=True)
        tiny.eval(), Twin(tiny).eval()
        check_answers({way: run() for way, run in answering(tiny, 3, 5).items()}, exact=True)
        tables(args.size, build(args.size, device, dtype), exact=not gpu)
    if args.size != "tiny":
        loading_table(device, dtype)
    if args.json:
        write_json(args.json, {"where": where, "size": args.size, "torch": torch.__version__, "rows": ROWS})


if __name__ == "__main__":
    run(main)
