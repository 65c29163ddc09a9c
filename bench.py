"""Speed and memory, side by side with what people would use instead: Transformers and PEFT (pip install -r requirements-dev.txt).

    python bench.py --size small        tiny: to see that it runs; small: ViT-S and 8 layers of width 512; 8b: the paper's ViT-L and
                                        Llama-3.1-8B, on a GPU with room for them. The device is what is there.

Contestants run in turn in one process, on the very same random weights and inputs, bf16 on a GPU and fp32 elsewhere. Their results
are compared before anything is timed; a difference ends the program. It prints medians for a training step of the paper's
conversation (549 positions, 4 rounds, 44 labels), for answering photos with 8, 17 and 68 keypoints (61 tokens a question), for
cropping out of a photo of 12 megapixels on one core, and, but with tiny, for loading a checkpoint of 2 GB in shards:

seconds; how far the slowest run was from the fastest; photos, tokens, ... per second; how many times our time; peak memory (GPU:
allocated; CPU: of a process that does only this) and of it what was there before; TFLOP/s, counting only what the task needs, the
same for all; its share of the GPU's data sheet (MFU); and the share of the floor, the least time in which a GPU with the speed that
it reaches in practice can do those products and read the weights.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from functools import cache, partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from chat import IGNORE, Chat, Form
from data import Crop
from llama import Llama, LlamaConfig
from lora import add_lora
from model import CapeLLM
from train import PEAK_TFLOPS
from vit import ViT, ViTConfig

SIZES = {  # of the ViT and the LLM; what is not said is DINOv2 ViT-L/14's and Llama-3.1-8B's
    "tiny": (dict(image_size=56, hidden_size=32, num_hidden_layers=2, num_attention_heads=2), dict(vocab_size=2000, hidden_size=128,
             head_dim=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)),
    "small": (dict(image_size=224, hidden_size=384, num_hidden_layers=12, num_attention_heads=6), dict(hidden_size=512,
              head_dim=64, intermediate_size=1792, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2)),
    "8b": (dict(image_size=224), {})}
REACHED = {"H200": (790e12, 4.3e12), "A6000": (154.8e12, 768e9)}  # FLOP/s and bytes/s; the A6000's are its data sheet's
OURS, STRUCK, PUBLISHED, WELL, PEFT = "ours", "ours, no draft right", "published way", "Transformers, used well", "Transformers + PEFT"


class StandInChat(Chat):
    """What locate() needs of a Chat, with token ids made up: as with Llama-3, a number of three digits is one token."""

    def __init__(self, template=(3, 4, 5, None, 6, 4, 5, None)):  # " [" "0" "." ddd "," "0" "." ddd
        self.bos, self.newline, self.opening, self.colon, self.image, self.pad = 0, [2], [], 7, 8, 9
        self.place = Form(list(template), list(range(10, 1010)), [1])


CHAT, CHAT_WRONG = StandInChat(), StandInChat((9, 9, 9, None, 9, 9, 9, None))  # the latter drafts what is never said


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
    gains = {"q_proj": 1.25, "k_proj": 1.25, "o_proj": small, "down_proj": small, "lora_B": 0.1, "lm_head": 0.1}
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.normal_(0.0 if name.endswith("bias") else 1.0, 0.1)
        else:
            fan_in = 1 if name.endswith(("cls_token", "pos_embed", "embed_tokens.weight")) else p[0].numel()
            p.normal_(0, next((gain for key, gain in gains.items() if key in name), 1) / fan_in ** 0.5)
    # How many passes locate() takes depends on whether the model keeps to the format. A trained one does, a random one does not,
    # so the output layer gets what training would teach it: after ":" comes " [", after that "0", ... and after "." one of 1000
    # numbers; which one is left to photo and question. It is fair: the same weights for everybody, everybody decodes greedily from
    # the whole vocabulary, and nobody but locate() drafts, which checks its drafts. STRUCK shows what it takes if all are wrong.
    head, embedding, digits = llama.lm_head.weight, llama.embed_tokens.weight, torch.tensor(CHAT.place.digits, device=device)
    number = CHAT.place.digits[0]
    embedding[digits] = 0.5 * embedding[digits] + embedding[number]  # numbers resemble each other
    head[digits] *= 10
    opening, zero, point, _, comma, *_ = CHAT.place.template
    for token, following in (CHAT.colon, opening), (opening, zero), (zero, point), (number, comma), (comma, zero), (point, digits):
        direction = embedding[token] / embedding[token].norm()
        if following is digits:
            head[digits] -= torch.outer(head[digits] @ direction, direction)  # else "." has a favourite number
        head[following] += (4 if following is digits else 8) / head.shape[1] ** 0.5 * direction
    return model


@cache
class Twin(nn.Module):
    """The same network out of Transformers' Dinov2 and Llama with PEFT's adapters, on the very tensors of `model`."""

    RENAMES = [("llama.", "llama.model."), ("model.lm_head", "lm_head"), ("patch_embed", "embeddings.patch_embeddings.projection"),
               ("cls_token", "embeddings.cls_token"), ("pos_embed", "embeddings.position_embeddings"), ("vit.norm", "vit.layernorm"),
               ("blocks", "encoder.layer"), ("attn.proj", "attention.o_proj"), *((f"attn.{x}.", f"attention.{x}_proj.") for x in "qkv"),
               ("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1"), (".base.", ".base_layer."),
               ("lora_A", "lora_A.default.weight"), ("lora_B", "lora_B.default.weight")]

    def __init__(self, model):
        super().__init__()
        from peft import LoraConfig, get_peft_model
        from transformers import Dinov2Config, Dinov2Model, LlamaForCausalLM
        from transformers import LlamaConfig as TheirLlamaConfig

        warnings.simplefilter("ignore", FutureWarning)
        vit = {k: getattr(model.vit.config, k) for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size")}
        llama = {k: v for k, v in vars(model.llama.config).items() if k != "rope"} | {"max_position_embeddings": 131072}
        with torch.device("meta"):
            self.vit = Dinov2Model(Dinov2Config(**vit, patch_size=14, use_mask_token=False))
            self.llama = LlamaForCausalLM(TheirLlamaConfig(**llama, rope_parameters=model.llama.config.rope))
            for network in self.vit, self.llama:
                get_peft_model(network, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"]))
        self.projection, rotary = model.projection, self.llama.model.rotary_emb
        self.llama.model.rotary_emb = type(rotary)(self.llama.config).to(self.projection.weight.device)  # not in the state
        state = {}
        for name, p in model.named_parameters():
            for ours, theirs in self.RENAMES:
                name = name.replace(ours, theirs)
            state[name] = p
        self.load_state_dict(state, assign=True)
        self.eval()

    def see(self, images):
        features = self.vit(images.to(self.vit.dtype)).last_hidden_state[:, 1:]
        return F.linear(features, self.projection.weight.to(features.dtype), self.projection.bias.to(features.dtype))

    def forward(self, images, tokens, labels):
        text = self.llama.model.embed_tokens(tokens)
        x = torch.cat((text[:, :1], self.see(images), text[:, 1:]), dim=1)
        return self.llama(inputs_embeds=x, labels=F.pad(labels, (x.shape[1] - labels.shape[1], 0), value=IGNORE), use_cache=False).loss

    @torch.no_grad()
    def generate(self, images, photo_of, questions, n_tokens, published=False):
        """What Transformers' generate() does, without its bookkeeping: greedy, with a cache, rows padded on the left."""
        T, start = max(map(len, questions)), [CHAT.bos] + [CHAT.image] * (images.shape[-1] // 14) ** 2 + CHAT.newline
        ids = torch.tensor([[CHAT.pad] * (T - len(q)) + start + q for q in questions], device=images.device)
        mask, embed, cached, said = (ids != CHAT.pad).long(), self.llama.model.embed_tokens, None, []
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        for step in range(n_tokens):
            if step == 0 or published:  # the published code runs the ViT again for every token
                image = self.see(images)
            x = embed(said[-1][:, None]) if step else embed(ids).masked_scatter((ids == CHAT.image)[..., None], image[photo_of])
            out = self.llama(inputs_embeds=x, attention_mask=mask, position_ids=positions, past_key_values=cached, use_cache=True,
                             logits_to_keep=0 if published else 1)
            said.append(out.logits[:, -1].argmax(-1))
            cached, mask, positions = out.past_key_values, F.pad(mask, (0, 1), value=1), positions[:, -1:] + 1
        return torch.stack(said, dim=1).tolist()


def answer(way, model, images, questions):
    """All questions of all photos in one of the ways -> the tokens of each answer, up to the last digit."""
    n, answers = len(CHAT.place.template), []
    if way in (OURS, STRUCK):
        return [ids for told in model.locate(images, questions, CHAT if way == OURS else CHAT_WRONG) for ids, _ in told]
    if way == WELL:  # each photo seen once, all questions in one batch, logits at the last position, no token too many
        return Twin(model).generate(images, [p for p, asked in enumerate(questions) for _ in asked], sum(questions, []), n)
    for image, asked in zip(images, questions):  # a copy of the photo with each question, 15 questions at a time, 13 tokens
        for chunk in (asked[i:i + 15] for i in range(0, len(asked), 15)):
            answers += Twin(model).generate(image.expand(len(chunk), -1, -1, -1), list(range(len(chunk))), chunk, 13, published=True)
    return [ids[:n] for ids in answers]


def photos(n, model):
    side = model.vit.config.image_size
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(n)).to(model.projection.weight.device)


def answering(model, P, K):
    """P photos with K questions each, of 39 to 93 random tokens as in descriptions.json, the last the colon of "Assistant:".
    -> the ways to answer them, and the questions."""
    rng = np.random.default_rng(K)
    lengths = rng.normal(61, 9, (P, K)).round().clip(39, 93).astype(int)
    questions = [[[*rng.integers(1010, model.llama.config.vocab_size, n - 1).tolist(), CHAT.colon] for n in row] for row in lengths]
    return {way: partial(answer, way, model, photos(P, model), questions) for way in (OURS, STRUCK, PUBLISHED, WELL)}, questions


def training(model, B):
    """A micro-batch of B conversations -> the ways to take a step as train.py does, and the batch."""
    learned = np.concatenate([[0, 0], *([0] * n + [1] * 11 for n in (55, 61, 62, 69))])
    tokens = torch.from_numpy(np.random.default_rng(B).integers(1010, model.llama.config.vocab_size, (B, len(learned))))
    labels, device = tokens.where(torch.tensor(learned) > 0, IGNORE), model.projection.weight.device
    batch = photos(B, model), tokens.to(device), labels.to(device)

    def way_of(network_of):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=batch[0].is_cuda)

        def step():
            network_of(model).train()(*batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        return step
    return {OURS: way_of(lambda model: model), PEFT: way_of(Twin)}, batch


def race(runners, repeats=5, patience=40):
    """Runs {way: function} in turn -> {way: seconds of each run}; slow ones are repeated until `patience` seconds have passed."""
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


def host_memory(key):
    """GiB of this process: "VmHWM" at most, "VmRSS" now. (getrusage() would tell the parent's peak if that is higher.)"""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 2**20


def peak_memory(run, *job):
    """(GiB at most, GiB before) of a run; on the CPU of the same job in a process of its own."""
    if not torch.cuda.is_available():
        return alone(*job)["memory"]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() / 2**30, before / 2**30


def alone(*job):
    done = subprocess.run([sys.executable, __file__, "--job", *map(str, job)], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def needed(model, photos, passes):
    """(FLOP, bytes read) of the photos' way through the ViT and of the LLM's passes, each over `new` positions that look at `keys`
    others on average, `cached` of which are read from the cache, with `logits` of them."""
    v, c, T = model.vit.config, model.llama.config, model.vit.n_patches + 1
    work = [(photos * v.num_hidden_layers * T * (24 * v.hidden_size**2 + 4 * T * v.hidden_size), 0)]
    weights = sum(p.numel() for name, p in model.llama.layers.named_parameters() if "proj" in name and "lora" not in name)
    for new, keys, cached, logits in passes:
        head, width = c.vocab_size * c.hidden_size, c.head_dim * c.num_hidden_layers
        work.append((2 * new * weights + 2 * logits * head + 4 * new * keys * width * c.num_attention_heads,
                     2 * (weights + head * (logits > 0)) + 4 * cached * width * c.num_key_value_heads))
    return work


def print_rows(title, unit, times, n, memory=None, work=()):
    """A group of the table. times {way: seconds of each run}, n units of work in a run, memory {way: GiB (at most, before)}."""
    print(f"\n{title:44}{'seconds':>9}{'+-':>6}{unit + '/s':>11}{'x ours':>8}{'GiB':>7}{'before':>8}{'TFLOP/s':>9}{'MFU':>6}{'floor':>7}")
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    for way, seconds in times.items():
        s, spread = median(seconds), (max(seconds) - min(seconds)) / median(seconds)
        line = f"  {way:42}{s:9.4g}{f'{spread:.0%}' if len(seconds) > 1 else 'once':>6}{n / s:11,.2f}{s / median(times[OURS]):8.2f}"
        line += "{:7.2f}{:8.2f}".format(*memory[way]) if memory else f"{'':15}"
        speed = sum(flop for flop, _ in work) / s / 1e12
        line += f"{speed:9.3f}" if work else ""
        line += "".join(f"{speed / peak:6.0%}" for name, peak in PEAK_TFLOPS.items() if name in card and work)
        line += "".join(f"{sum(max(f / flops, b / bandwidth) for f, b in work) / s:7.0%}"
                        for name, (flops, bandwidth) in REACHED.items() if name in card and work)
        print(line, flush=True)


def answers_table(model, size, cases, exact, timed=True):
    model.eval(), Twin(model).eval()
    for P, K in cases:
        runners, questions = answering(model, P, K)
        results = {way: np.array(run()) for way, run in runners.items()}
        for column, known in zip(results[OURS].T, CHAT.place.template, strict=True):
            assert known is None or (column == known).all(), "the network does not keep to the format"
        assert len(np.unique(results[OURS][:, 3])) > P * K / 4, "nearly all questions get the same answer"
        for way, ids in results.items():
            # In bf16 products of other shapes round otherwise, and a close call between two numbers may go either way. All tokens
            # must be equal in fp32, in which a tiny network is checked before.
            assert (equal := (ids == results[OURS]).mean()) >= (1 if exact else 0.9), f"{way}: {equal:.1%} of the tokens are equal"
        if timed:
            memory = {way: peak_memory(run, size, "answering", way, P, K) for way, run in runners.items()} if K == 17 else None
            R, text, S = P * K, sum(len(q) + 3 for asked in questions for q in asked), model.vit.n_patches + 2
            work = needed(model, P, [(P * S, S / 2, 0, 0),  # photo
                                     (text, S + text / R / 2, P * S, 4 * R),  # questions and " [0.", which ends in 4 predictions
                                     (4 * R, S + text / R, R * (S + text / R), 4 * R)])  # ddd ",0.", likewise
            print_rows(f"answering, {K} keypoints, {P} photo{'s' * (P > 1)} at a time", "photos", race(runners), P, memory, work)


def training_table(model, size, batches, exact, timed=True):
    for B in batches:
        (runners, batch), results = training(model, B), []
        for network in model, Twin(model):  # without dropout; gradients have the same place in both, since the parameters are shared
            (loss := network.eval()(*batch)).backward()
            results += [loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])]
            model.zero_grad()
        loss, gradient, their_loss, their_gradient = results
        apart = ((gradient - their_gradient).norm() / gradient.norm()).item()
        assert abs(loss / their_loss - 1) < (1e-4 if exact else 0.02), f"losses {loss} and {their_loss}"
        assert apart < (1e-3 if exact else 0.5), f"gradients {apart:.1e} apart"  # deep random networks amplify the rounding of bf16
        if timed:
            for step in runners.values():
                step()  # the first makes Adam's state
            memory = {way: peak_memory(run, size, "training", way, B) for way, run in runners.items()}
            T = model.vit.n_patches + batch[1].shape[1]  # forward, and back to the inputs: frozen weights need no gradients
            work = 2 * needed(model, B, [(B * T, T / 2, 0, (batch[2] >= 0).sum().item())])
            print_rows(f"training step, {B} conversation{'s' * (B > 1)}", "tokens", race(runners), B * T, memory, work)


def cropping_table():
    rng = np.random.default_rng(0)
    scene = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).resize((4000, 3000), Image.Resampling.BICUBIC)
    scene = Image.fromarray((np.asarray(scene) + rng.normal(0, 6, (3000, 4000, 1))).clip(0, 255).astype(np.uint8))

    def plain(path, box):
        with Image.open(path) as photo:
            square = photo.convert("RGB").crop(box).resize((224, 224), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)

    with tempfile.TemporaryDirectory() as folder:
        scene.save(path := Path(folder, "photo.jpg"), quality=90)
        for side in 500, 1800:
            box = 2000 - side // 2, 1500 - side // 2, 2000 + side // 2, 1500 + side // 2
            runners = {OURS: partial(Crop(2000, 1500, side).cut, path, 224), "decode, crop, resize": partial(plain, path, box)}
            ours, theirs = (run().float() for run in runners.values())
            assert (ours - theirs).abs().mean() < 2, "the crops differ"  # of 255; not equal, since ours is decoded at a smaller scale
            print_rows(f"crop of {side} x {side} from a 12-megapixel JPEG", "crops", race(runners, 9), 1)


def loading_table(size):
    from transformers import LlamaConfig as TheirLlamaConfig
    from transformers import LlamaForCausalLM

    config = TheirLlamaConfig(vocab_size=128256, hidden_size=2048, intermediate_size=5632, num_hidden_layers=12, num_attention_heads=32,
                              num_key_value_heads=8, head_dim=64, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        model = LlamaForCausalLM._from_config(config)
        model.save_pretrained(folder, max_shard_size="500MB")
        done = {way: [alone(size, "loading", way, folder) for _ in range(3)] for way in (OURS, "from_pretrained")}
    assert len({run["sum"] for runs in done.values() for run in runs}) == 1, "the weights loaded differ"
    gigabytes = sum(p.numel() for p in model.parameters()) * 2 / 1e9
    times, memory = ({way: [run[key] for run in runs] for way, runs in done.items()} for key in ("seconds", "memory"))
    print_rows(f"loading {gigabytes:.1f} GB of bf16 in shards of 0.5", "GB", times, gigabytes, {way: max(m) for way, m in memory.items()})


def do_job(device, dtype, size, kind, way, *rest):
    """What alone() asks for: one contestant, and nothing but it in memory."""
    if kind == "loading":
        from transformers import LlamaForCausalLM
        load = partial(Llama.load, device=device) if way == OURS else partial(LlamaForCausalLM.from_pretrained, device_map=device)
        before, began = host_memory("VmRSS"), time.perf_counter()
        model = load(rest[0], dtype=dtype)
        total = sum(p.flatten()[::1000].sum(dtype=torch.float64).item() for p in model.parameters())  # so that every page is read
        return {"seconds": time.perf_counter() - began, "sum": total, "memory": (host_memory("VmHWM"), before)}
    model = build(size, device, dtype)
    if way not in (OURS, STRUCK):
        Twin(model)
    runners, _ = (answering if kind == "answering" else training)(model, *map(int, rest))
    before = host_memory("VmRSS")
    for _ in range(1 + (kind == "training")):  # Adam's state is made in the first step
        runners[way]()
    return {"memory": (host_memory("VmHWM"), before)}


def main(argv):
    parser = argparse.ArgumentParser(description="Speed and memory beside Transformers + PEFT.")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    if args.job:
        return print(json.dumps(do_job(device, dtype, *args.job)))
    import peft
    import transformers
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else f'CPU, {torch.get_num_threads()} threads'}, size {args.size}, {dtype}, "
          f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
    tiny = build("tiny", device, torch.float32)
    answers_table(tiny, "tiny", [(1, 17), (3, 5)], exact=True, timed=False)
    training_table(tiny, "tiny", [1, 2], exact=True, timed=False)
    model, exact, gpu = build(args.size, device, dtype), dtype == torch.float32, device == "cuda"
    training_table(model, args.size, [1, 4] if gpu else [1], exact)
    answers_table(model, args.size, [(1, 8), (1, 17), (1, 68), *[(8, 17)] * gpu], exact)
    cropping_table()
    if args.size != "tiny":
        loading_table(args.size)


if __name__ == "__main__":
    main(sys.argv[1:])
