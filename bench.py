"""Speed and memory beside what people would use instead: Transformers and PEFT (requirements-dev.txt).

    python bench.py --size small    tiny: to see that it runs; small: ViT-S and 8 layers of width 512;
                                    8b: the paper's ViT-L and Llama-3.1-8B, on a GPU with room for them

Contestants run in turn in one process, on the same random weights and inputs, in bf16 on a GPU and in fp32
elsewhere. Their results are compared before anything is timed; a difference ends the program. It prints
medians for a training step of the paper's conversation (549 positions, 4 rounds, 44 labels), for answering
photos with 8, 17 and 68 keypoints (61 tokens a question), for cropping out of a photo of 12 megapixels on one
core, and, but with tiny, for loading a checkpoint of 2 GB in shards:

    seconds   of the median run; +-: how far the slowest was from the fastest, "!" if too far to be trusted
    x ours    how many times our time
    GiB       peak memory (GPU: allocated; CPU: of a process that does only this); before: without the run
    TFLOP/s   counting only what the task needs, the same for all; MFU: its share of the GPU's data sheet
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
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from chat import IGNORE, AnswerFormat
from common import write_json
from data import Crop
from decode import locate
from llama import Llama, LlamaConfig
from lora import add_lora
from model import CapeLLM
from train import PEAK_TFLOPS
from vit import ViT, ViTConfig

SIZES = {  # of the ViT and the LLM; what is not said is DINOv2 ViT-L/14's and Llama-3.1-8B's
    "tiny": (dict(image_size=56, hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
             dict(vocab_size=2000, hidden_size=128, head_dim=32, intermediate_size=128, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2)),
    "small": (dict(image_size=224, hidden_size=384, num_hidden_layers=12, num_attention_heads=6),
              dict(hidden_size=512, head_dim=64, intermediate_size=1792, num_hidden_layers=8,
                   num_attention_heads=8, num_key_value_heads=2)),
    "8b": (dict(image_size=224), {})}
OURS, PLAIN = "ours", "ours, plain loop"
PUBLISHED, USED_WELL, PEFT = "published way", "Transformers, used well", "Transformers + PEFT"

# ----------------------------------------------------------------------------------------------- contestants

NUMBER = 10  # the tokens of the numbers 000 ... 999 are 10 ... 1009, then come words
COLON, IMAGE, PADDING = 7, 8, 9


def make_chat(known):
    """What locate() needs of a Chat, with made-up tokens. As with Llama-3, a number is one token."""
    coordinates = AnswerFormat(known, list(range(NUMBER, NUMBER + 1000)), ending=[1], max_tokens=8)
    return SimpleNamespace(bos=0, newline=[2], opening=[], keypoint=None, coordinates=coordinates,
                           parse=lambda answer: tuple((token - NUMBER) / 1000 for token in answer[3::4]))


CHAT = make_chat([[3, 4, 5], [6, 4, 5]])  # " [" "0" "." ddd "," "0" "." ddd
CHAT_PLAIN = make_chat([[PADDING] * 3] * 2)  # never said, so every answer is decoded again by the plain loop


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
               ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")}
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
        for name, p in model.named_parameters():
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
    def generate(self, images, photo_of, questions, n_tokens, published=False):
        """What Transformers' generate() does, less its bookkeeping: greedy, cached, padded on the left.

        published: the ViT runs again for every token, and logits are made at every position.
        """
        n_patches, T = (images.shape[-1] // 14) ** 2, max(map(len, questions))
        start = [CHAT.bos] + [IMAGE] * n_patches + CHAT.newline
        tokens = torch.tensor([[PADDING] * (T - len(q)) + start + q for q in questions], device=images.device)
        mask, embed, cached, said = (tokens != PADDING).long(), self.llama.model.embed_tokens, None, []
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        for step in range(n_tokens):
            if step == 0 or published:
                image = self.see(images)[photo_of]
            if step == 0:
                x = embed(tokens).masked_scatter((tokens == IMAGE)[..., None], image)
            else:
                x = embed(said[-1][:, None])
            out = self.llama(inputs_embeds=x, attention_mask=mask, position_ids=positions,
                             past_key_values=cached, use_cache=True, logits_to_keep=0 if published else 1)
            said.append(out.logits[:, -1].argmax(-1))
            cached, mask, positions = out.past_key_values, F.pad(mask, (0, 1), value=1), positions[:, -1:] + 1
        return torch.stack(said, dim=1).tolist()


# ------------------------------------------------------------------------------------------------- the tasks


def make_photos(n, model):
    side = model.vit.config.image_size
    photos = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(n))
    return photos.to(model.projection.weight.device)


def answer(way, model, images, questions):
    """All questions of all photos in one of the ways -> the tokens of each answer, up to the last digit."""
    n = CHAT.coordinates.max_tokens
    if way in (OURS, PLAIN):
        predictions = locate(model, images, questions, CHAT if way == OURS else CHAT_PLAIN)
        return [prediction.answer for of_photo in predictions for prediction in of_photo]
    twin = Twin(model)
    if way == USED_WELL:  # each photo seen once, all questions in one batch, no token and no logits too many
        photo_of = [p for p, asked in enumerate(questions) for _ in asked]
        return twin.generate(images, photo_of, sum(questions, []), n)
    answers = []
    for image, asked in zip(images, questions):  # a copy of the photo with each question, 15 at a time
        for chunk in (asked[i:i + 15] for i in range(0, len(asked), 15)):
            copies = image.expand(len(chunk), -1, -1, -1)
            answers += twin.generate(copies, list(range(len(chunk))), chunk, 13, published=True)
    return [tokens[:n] for tokens in answers]


def answering(model, P, K):
    """P photos with K questions each -> the ways to answer them, and the questions.

    A question has 39 to 93 random tokens, as in descriptions.json; the last is the colon of "Assistant:".
    """
    rng, vocabulary = np.random.default_rng(K), model.llama.config.vocab_size
    lengths = rng.normal(61, 9, (P, K)).round().clip(39, 93).astype(int)
    questions = [[[*rng.integers(NUMBER + 1000, vocabulary, n - 1).tolist(), COLON] for n in row]
                 for row in lengths]
    photos = make_photos(P, model)
    return {way: partial(answer, way, model, photos, questions)
            for way in (OURS, PLAIN, PUBLISHED, USED_WELL)}, questions


def training(model, B):
    """A micro-batch of B conversations -> the ways to take a step as train.py does, and the batch."""
    learned = np.concatenate([[0, 0], *([0] * n + [1] * 11 for n in (55, 61, 62, 69))])
    rng, vocabulary = np.random.default_rng(B), model.llama.config.vocab_size
    tokens = torch.from_numpy(rng.integers(NUMBER + 1000, vocabulary, (B, len(learned))))
    labels = tokens.where(torch.tensor(learned) > 0, IGNORE)
    photos = make_photos(B, model)
    batch = photos, tokens.to(photos.device), labels.to(photos.device)

    def way_of(network_of):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=photos.is_cuda)

        def step():
            network_of(model).train()(*batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        return step

    return {OURS: way_of(lambda model: model), PEFT: way_of(Twin)}, batch


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


def host_memory(key):
    """GiB of this process: "VmHWM" at most, "VmRSS" at present. getrusage() may tell the parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**20


def peak_memory(run, *job):
    """(GiB at most, GiB before) of a run; on the CPU of the same job in a process of its own."""
    if not torch.cuda.is_available():
        return alone(*job)["memory"]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() / 2**30, before / 2**30


def alone(*job):
    done = subprocess.run([sys.executable, __file__, "--job", *map(str, job)], stdout=subprocess.PIPE,
                          check=True)
    return json.loads(done.stdout.splitlines()[-1])


def do_job(device, dtype, size, kind, way, *rest):
    """What alone() asks for: one contestant, and nothing but it in memory."""
    if kind == "loading":
        from transformers import LlamaForCausalLM
        load = {OURS: partial(Llama.load, device=device),
                "from_pretrained": partial(LlamaForCausalLM.from_pretrained, device_map=device)}[way]
        before, began = host_memory("VmRSS"), time.perf_counter()
        model = load(rest[0], dtype=dtype)
        some = [p.flatten()[::1000].sum(dtype=torch.float64).item() for p in model.parameters()]  # every page
        return {"seconds": time.perf_counter() - began, "sum": sum(some),
                "memory": (host_memory("VmHWM"), before)}
    model = build(size, device, dtype)
    if way not in (OURS, PLAIN):
        Twin(model)
    runners, _ = {"answering": answering, "training": training}[kind](model, *map(int, rest))
    before = host_memory("VmRSS")
    for _ in range(1 + (kind == "training")):  # Adam's state is made in the first step
        runners[way]()
    return {"memory": (host_memory("VmHWM"), before)}


def needed(model, n_photos, passes):
    """FLOP that a task needs: of the ViT, and of the LLM's passes over `new` positions.

    The positions of a pass look at `keys` others on average, and `logits` of them are asked for logits.
    """
    v, c, T = model.vit.config, model.llama.config, model.vit.n_patches + 1
    flop = n_photos * v.num_hidden_layers * T * (24 * v.hidden_size**2 + 4 * T * v.hidden_size)
    weights = sum(p.numel() for name, p in model.llama.layers.named_parameters()
                  if "proj" in name and "lora" not in name)
    width = c.num_hidden_layers * c.num_attention_heads * c.head_dim
    for new, keys, logits in passes:
        flop += 2 * new * weights + 4 * new * keys * width + 2 * logits * c.vocab_size * c.hidden_size
    return flop


ROWS = []  # all that was printed, for --json


def print_rows(title, unit, times, n, memory=None, flop=None):
    """A group of the table.

    times: {way: seconds of each run}; n: units of work in a run; memory: {way: GiB (at most, before)}; flop:
    what a run needs.
    """
    print(f"\n{title:44}{'seconds':>9}{'+-':>6}{unit + '/s':>11}{'x ours':>8}{'GiB':>7}{'before':>8}"
          f"{'TFLOP/s':>9}{'MFU':>6}")
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    for way, seconds in times.items():
        s = median(seconds)
        noise = (max(seconds) - min(seconds)) / s
        spread = f"{noise:.0%}{'!' * (noise > 0.25)}" if len(seconds) > 1 else "once"
        line = f"  {way:42}{s:9.4g}{spread:>6}{n / s:11,.2f}{s / median(times[OURS]):8.2f}"
        line += "{:7.2f}{:8.2f}".format(*memory[way]) if memory else f"{'':15}"
        if flop:
            speed = flop / s / 1e12
            line += f"{speed:9.3f}"
            line += "".join(f"{speed / peak:6.0%}" for name, peak in PEAK_TFLOPS.items() if name in card)
        print(line, flush=True)
        ROWS.append({"title": title, "way": way, "seconds": seconds, "unit": unit, "n": n,
                     "memory": memory and memory[way], "flop": flop})


# ---------------------------------------------------------------------------------------------------- tables


def check_answers(answers, exact):
    """answers: {way: tokens of each answer}. Fails if they differ, or if the comparison would be idle."""
    ours = np.array(answers[OURS])
    template = [token for known in CHAT.coordinates.known for token in (*known, None)]
    for column, known in zip(ours.T, template, strict=True):
        assert known is None or (column == known).all(), "the network does not keep to the format"
    assert len(np.unique(ours[:, 3])) > len(ours) / 4, "nearly all questions get the same answer"
    for way, tokens in answers.items():
        # In bf16 products of other shapes round otherwise, and a close call between two numbers may go either
        # way. All tokens must be equal in fp32, in which a tiny network is checked before.
        equal = (np.array(tokens) == ours).mean()
        assert equal >= (1 if exact else 0.9), f"{way}: {equal:.1%} of the tokens are equal"


def answers_table(model, size, cases, exact, timed=True):
    model.eval(), Twin(model).eval()
    for P, K in cases:
        runners, questions = answering(model, P, K)
        check_answers({way: run() for way, run in runners.items()}, exact)
        if not timed:
            continue
        memory = None
        if K == 17:
            memory = {way: peak_memory(run, size, "answering", way, P, K) for way, run in runners.items()}
        R, S = P * K, model.vit.n_patches + 2
        text = sum(len(question) + 3 for asked in questions for question in asked)
        flop = needed(model, P, [
            (P * S, S / 2, 0),  # photo
            (text, S + text / R / 2, 4 * R),  # questions and " [0.", which ends in 4 predictions
            (4 * R, S + text / R, 4 * R)])  # ddd ",0.", likewise
        title = f"answering, {K} keypoints, {P} photo{'s' * (P > 1)} at a time"
        print_rows(title, "photos", race(runners), P, memory, flop)


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


def training_table(model, size, batches, exact, timed=True):
    for B in batches:
        runners, batch = training(model, B)
        check_training(model, batch, exact)
        if not timed:
            continue
        for step in runners.values():
            step()  # the first makes Adam's state
        memory = {way: peak_memory(run, size, "training", way, B) for way, run in runners.items()}
        T, n_labels = model.vit.n_patches + batch[1].shape[1], (batch[2] != IGNORE).sum().item()
        # forward, and back to the inputs: frozen weights need no gradients
        flop = 2 * needed(model, B, [(B * T, T / 2, n_labels)])
        title = f"training step, {B} conversation{'s' * (B > 1)}"
        print_rows(title, "tokens", race(runners), B * T, memory, flop)


def cropping_table():
    rng = np.random.default_rng(0)
    scene = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8))
    scene = np.asarray(scene.resize((4000, 3000), Image.Resampling.BICUBIC))
    scene = (scene + rng.normal(0, 6, (3000, 4000, 1))).clip(0, 255).astype(np.uint8)

    def plain(path, box):
        with Image.open(path) as photo:
            square = photo.convert("RGB").crop(box).resize((224, 224), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "photo.jpg")
        Image.fromarray(scene).save(path, quality=90)
        for side in 500, 1800:
            box = 2000 - side // 2, 1500 - side // 2, 2000 + side // 2, 1500 + side // 2
            runners = {OURS: partial(Crop(2000, 1500, side).cut, path, 224),
                       "decode, crop, resize": partial(plain, path, box)}
            ours, theirs = (run().float() for run in runners.values())
            # of 255; not equal, since ours is decoded at a smaller scale
            assert (ours - theirs).abs().mean() < 2, "the crops differ"
            print_rows(f"crop of {side} x {side} from a 12-megapixel JPEG", "crops", race(runners, 9), 1)


def loading_table(size):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=128256, hidden_size=2048, intermediate_size=5632, num_hidden_layers=12,
                         num_attention_heads=32, num_key_value_heads=8, head_dim=64, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        model = LlamaForCausalLM._from_config(config)
        model.save_pretrained(folder, max_shard_size="500MB")
        done = {way: [alone(size, "loading", way, folder) for _ in range(3)]
                for way in (OURS, "from_pretrained")}
    assert len({run["sum"] for runs in done.values() for run in runs}) == 1, "the weights loaded differ"
    gigabytes = sum(p.numel() for p in model.parameters()) * 2 / 1e9
    times = {way: [run["seconds"] for run in runs] for way, runs in done.items()}
    memory = {way: max(run["memory"] for run in runs) for way, runs in done.items()}
    print_rows(f"loading {gigabytes:.1f} GB of bf16 in shards of 0.5", "GB", times, gigabytes, memory)


def main(argv):
    parser = argparse.ArgumentParser(description="Speed and memory beside Transformers + PEFT.")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--json", metavar="FILE", help="also write every run's seconds, GiB and FLOP there")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    if args.job:
        return print(json.dumps(do_job(device, dtype, *args.job)))
    import peft
    import transformers
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    ROWS.clear()
    print(f"{where}, size {args.size}, {dtype}, torch {torch.__version__}, "
          f"transformers {transformers.__version__}, peft {peft.__version__}")
    tiny = build("tiny", device, torch.float32)
    answers_table(tiny, "tiny", [(1, 17), (3, 5)], exact=True, timed=False)
    training_table(tiny, "tiny", [1, 2], exact=True, timed=False)
    model = build(args.size, device, dtype)
    training_table(model, args.size, [1, 4] if gpu else [1], exact=not gpu)
    answers_table(model, args.size, [(1, 8), (1, 17), (1, 68), *[(8, 17)] * gpu], exact=not gpu)
    cropping_table()
    if args.size != "tiny":
        loading_table(args.size)
    if args.json:
        write_json(args.json, {"where": where, "size": args.size, "torch": torch.__version__, "rows": ROWS})


if __name__ == "__main__":
    main(sys.argv[1:])
