"""llama.py, vit.py, lora.py against Transformers, PEFT and the paper's own code, on tiny random checkpoints; KV cache; loader errors."""

import functools
import json
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file, save_file

from llama import InputError, Llama
from lora import LoRALinear, add_lora, load_trainable_state, trainable_state
from vit import ViT

transformers = pytest.importorskip("transformers")


@torch.no_grad()
def save_random(directory, kind, max_shard_size="5GB", **config):
    """Written by Transformers itself, so that names, shards and config.json are what a user downloads."""
    kind = getattr(transformers, kind)
    torch.manual_seed(1)
    network = kind(kind.config_class(**config)).eval()
    for name, p in network.named_parameters():
        p.normal_(float(p.ndim == 1 and "bias" not in name), {1: 0.3, 3: 1}.get(p.ndim, p[0].numel() ** -0.5))
    network.save_pretrained(directory, max_shard_size=max_shard_size)
    return network


close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)

# ---- Llama ----

LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
LLAMA = dict(kind="LlamaForCausalLM", vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=131072, max_shard_size="64KB", rope_parameters=dict(LLAMA3, factor=8.0))
FAMILIES = {
    "llama-3.1": LLAMA,
    "llama-3.2-1b": LLAMA | dict(rope_parameters=dict(LLAMA3, factor=32.0), head_dim=32, tie_word_embeddings=True, rms_norm_eps=1e-2),
    "mistral-v0.3": LLAMA | dict(kind="MistralForCausalLM", rope_parameters=dict(rope_theta=1e6), head_dim=24, sliding_window=None),
    "vicuna": LLAMA | dict(rope_parameters=dict(rope_theta=1e4), num_key_value_heads=4),
}
IDS = torch.randint(96, (2, 24), generator=torch.manual_seed(0))
# a usual prompt, and one that jumps past the 8,192 positions of the original context to the far end of the extended one
POSITIONS = torch.stack([torch.arange(24), torch.cat([torch.arange(8), 8186 + torch.arange(8), 100_000 + torch.arange(8)])])


def logits(model, positions=POSITIONS):
    return model.lm_head(model(model.embed_tokens(IDS), positions)[0]).float()


@pytest.fixture
def base(tmp_path):
    save_random(tmp_path, **LLAMA)
    return Llama.load(tmp_path).requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("old_config", [False, True], ids=["new config", "old config"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, old_config, tmp_path):
    theirs = save_random(tmp_path, **FAMILIES[family])
    if old_config:  # as written before rope_parameters; what equals the defaults of that time is left out
        config = json.loads((tmp_path / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config |= dict(rope_theta=rope.pop("rope_theta"), rope_scaling=rope if len(rope) > 1 else None)
        defaults = ("rope_theta", 1e4), ("head_dim", 16), ("num_key_value_heads", 4)
        (tmp_path / "config.json").write_text(json.dumps(dict(item for item in config.items() if item not in defaults)))
    ours = Llama.load(tmp_path)
    want = theirs(IDS, position_ids=POSITIONS, attention_mask=torch.ones_like(IDS)).logits
    assert want.std() > 0.5  # else 1e-5 would mean little
    close(logits(ours), want)
    close(logits(ours, None), theirs(IDS).logits)  # without positions they are 0, 1, 2, ...
    for key in ours.config.rope.keys() - {"rope_type"}:  # each setting matters here
        ours.config.rope[key] *= 1.5
        assert (logits(ours) - want).abs().max() > 1e-2, key
        ours.config.rope[key] /= 1.5


def test_blocks_behind_a_cache_equal_one_pass(base):
    x, causal = base.embed_tokens(IDS), torch.ones(24, 24, dtype=torch.bool).tril()
    want, whole_cache = base(x)
    outputs, cache = [], None
    for start, end in (0, 9), (9, 14), (14, 15), (15, 24):
        y, cache = base(x[:, start:end], torch.arange(start, end)[None], causal[None, None, start:end, :end], cache)
        outputs.append(y)
    close(torch.cat(outputs, dim=1), want)
    close(cache, whole_cache)
    assert cache[0][0].shape == (2, 2, 24, 16)  # only the key/value heads are kept


def test_padded_rows_of_different_lengths_share_a_prefix(base):
    """A photo's prefix of 7 runs once; three questions of 5, 2 and 3 tokens behind it, padded to 5; then a block of 2 for each."""
    prefix, lengths = IDS[:1, :7], torch.tensor([5, 2, 3])
    questions, seconds = IDS[0, 7:22].view(3, 5), IDS[1, :6].view(3, 2)
    keys = F.pad(torch.arange(5) < lengths[:, None], (7, 2), value=True)  # (3, 14): all but the padding of `questions`
    mask = torch.ones(14, 14, dtype=torch.bool).tril() & keys[:, None, None]  # (3, 1, 14, 14)
    cache = [(k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1)) for k, v in base(base.embed_tokens(prefix))[1]]
    first, cache = base(base.embed_tokens(questions), (7 + torch.arange(5)).expand(3, -1), mask[:, :, 7:12, :12], cache)
    second, _ = base(base.embed_tokens(seconds), 7 + lengths[:, None] + torch.arange(2), mask[:, :, 12:], cache)
    for row, n in enumerate(lengths):
        alone, _ = base(base.embed_tokens(torch.cat([prefix[0], questions[row, :n], seconds[row]]))[None])
        close(torch.cat([first[row, :n], second[row]]), alone[0, 7:])


# ---- ViT ----

VIT = dict(kind="Dinov2Model", hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=70, layer_norm_eps=1e-2)
REGISTERS = VIT | dict(kind="Dinov2WithRegistersModel", num_register_tokens=4, patch_size=14)


@torch.no_grad()
@pytest.mark.parametrize("config, size", [
    (VIT | dict(layer_norm_eps=1e-6), 70), (VIT | dict(mlp_ratio=3), 70), (VIT | dict(use_swiglu_ffn=True, hidden_size=40), 70),
    (REGISTERS, 70), (REGISTERS | dict(use_swiglu_ffn=True), 70), (REGISTERS | dict(image_size=518), 224), (REGISTERS, 112),
], ids=["plain", "narrow, large eps", "giant", "registers", "registers, giant", "registers, 518 to 224", "registers, 70 to 112"])
def test_patch_tokens_equal_transformers(config, size, tmp_path):
    theirs = save_random(tmp_path, **config)
    photos = torch.randn(2, 3, size, size, generator=torch.manual_seed(2))
    want = theirs(photos).last_hidden_state[:, 1 + config.get("num_register_tokens", 0):]
    assert want.shape[1] == (size // 14) ** 2 and want.std() > 0.3
    close(ViT.load(tmp_path, image_size=size)(photos), want)
    close(ViT.load(tmp_path, size, torch.bfloat16)(photos.bfloat16()), want.bfloat16(), atol=0.2)


@torch.no_grad()
@pytest.mark.parametrize("weights", ["vit/model.safetensors", "vit_official_names.safetensors"])
def test_image_tokens_equal_the_papers_code(weights, shared, tmp_path):
    """224 pixels on a table for 518 (Transformers resizes it otherwise), LoRA on q and v, then the projection."""
    parity = shared / "parity/llama31"
    shutil.copy(parity / "vit/config.json", tmp_path)
    shutil.copy(parity / weights, tmp_path / "model.safetensors")
    vit = ViT.load(tmp_path, image_size=224)
    add_lora(vit, ("q", "v"), dropout=0)
    expected = load_file(parity / "expected.safetensors")
    for name, p in vit.named_parameters():
        if "lora" in name:  # blocks.N.attn.q.lora_A is blocks.N.attn.lora_A_q there
            block, q_or_v, A_or_B = name.rsplit(".", 2)
            p.copy_(expected[f"param.base_model.model.vision_model.{block}.{A_or_B}_{q_or_v}"])
    weight, bias = (expected[f"param.base_model.model.mm_projector.{x}"] for x in ("weight", "bias"))
    close(F.linear(vit(expected["images"]), weight, bias), expected["image_tokens"])


# ---- LoRA ----

def adapt(network, random_B=True, **lora_args):
    """The network with adapters on q and v, the rest frozen."""
    torch.manual_seed(3)
    add_lora(network.requires_grad_(False), ("q_proj", "v_proj"), **lora_args)
    for name, p in trainable_state(network).items():
        if random_B and "lora_B" in name:
            p.normal_(0, 0.3)
    return network


def test_lora_equals_peft_in_forward_and_gradients(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = save_random(tmp_path, **LLAMA)
    ours = adapt(Llama.load(tmp_path), dropout=0)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0, target_modules=["q_proj", "v_proj"]))
    own = {f"base_model.model.model.{name}.default.weight": p for name, p in ours.named_parameters() if p.requires_grad}
    reference = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert own.keys() == reference.keys() and len(own) == 8  # only q and v are wrapped
    for name, p in reference.items():
        p.data.copy_(own[name])
    got, want = logits(ours, None), theirs(IDS).logits
    close(got, want)
    (got.sin().sum() + want.sin().sum()).backward()
    for name, p in reference.items():
        assert (own[name].grad - p.grad).norm() < 1e-4 * p.grad.norm(), name


def test_lora_starts_as_the_identity_and_training_leaves_the_base_bitwise_alone(base):
    plain = logits(base)
    model = adapt(base, random_B=False, dropout=0.5)
    assert torch.equal(logits(model), plain)
    A = model.layers[0].self_attn.q_proj.lora_A
    assert 0.11 < A.abs().max() <= 0.125 and 0.06 < A.std() < 0.085  # uniform within 1 / sqrt(64), as PEFT's
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert trainable_state(model).keys() == {name for name in before if "lora" in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        logits(model).square().mean().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != ("lora" in name), name


@torch.no_grad()
def test_dropout_acts_on_the_update_alone_and_in_training_alone():
    x = torch.randn(16, generator=torch.manual_seed(3)).expand(20_000, -1)
    layer = LoRALinear(torch.nn.Linear(16, 8), rank=4, dropout=0.3)
    layer.lora_B.normal_()
    still, moving = (layer.train(mode)(x) - layer.base(x) for mode in (False, True))
    assert still.std(dim=0).max() < 1e-5 and moving.std(dim=0).min() > 0.1
    close(moving.mean(0), still[0], atol=0.2)  # unbiased: what is kept is scaled up


def test_a_bf16_base_keeps_fp32_adapters_and_gives_bf16(base, tmp_path):
    full, half = adapt(base, dropout=0), adapt(Llama.load(tmp_path, dtype=torch.bfloat16), dropout=0)
    want, got = logits(full), logits(half)
    assert half(half.embed_tokens(IDS))[0].dtype == torch.bfloat16 and (got - want).std(dim=(1, 2)).max() < 0.03
    (want.sin().sum() + got.sin().sum()).backward()
    for (name, p), q in zip(full.named_parameters(), half.parameters(), strict=True):
        if p.requires_grad:
            assert q.dtype == q.grad.dtype == torch.float32 and (q.grad - p.grad).norm() < 0.1 * p.grad.norm(), name
        else:
            assert torch.equal(p.bfloat16(), q), name


def test_the_trained_state_makes_another_model_the_same_or_is_refused_whole(base, tmp_path):
    model, other = adapt(base).eval(), adapt(Llama.load(tmp_path), random_B=False).eval()
    state, before, name = trainable_state(model), logits(other), "layers.1.self_attn.v_proj.lora_B"
    for wrong, says in [({k: v for k, v in state.items() if k != name}, f"lacks 1 .*{name}"), (state | {"spare": 1}, "unknown 1 .*spare"),
                        (state | {name: torch.ones(32, 4)}, rf"{name} is \(32, 4\).* \(32, 8\)")]:
        with pytest.raises(ValueError, match=says):
            load_trainable_state(other, wrong)
    assert torch.equal(logits(other), before) and not torch.equal(logits(model), before)
    load_trainable_state(other, state)
    assert torch.equal(logits(other), logits(model))


# ---- the loader ----

def test_the_defaults_are_the_papers_networks():
    with torch.device("meta"):
        assert [sum(p.numel() for p in network().parameters()) for network in (Llama, ViT)] == [8_030_261_248, 304_367_616]


def edit_config(**change):
    return lambda d: (d / "config.json").write_text(json.dumps(json.loads((d / "config.json").read_text()) | change))


def edit_weights(file, **change):
    """Puts tensors into a file, or drops them where None is given."""
    return lambda d: save_file({k: t.clone() for k, t in (load_file(d / file) | change).items() if t is not None}, d / file)


INDEX, FIRST, LAST = "model.safetensors.index.json", "model-00001-of-00006.safetensors", "model-00006-of-00006.safetensors"
KEY, TWIN = "model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.k_proj.weight"  # in the first file, in the fourth
BROKEN = {  # what is done to the folder, and what the message must say
    "missing tensor": (edit_weights(FIRST, **{KEY: None}), [INDEX, "layers.0.self_attn.k_proj.weight"]),
    "extra tensor": (edit_weights(FIRST, spare=torch.ones(2)), [FIRST, "spare"]),
    "tensor twice": (edit_weights(FIRST, **{TWIN: torch.ones(32, 64)}), ["model-00004-of", TWIN]),
    "wrong shape": (edit_weights(FIRST, **{KEY: torch.ones(32, 48)}), [FIRST, KEY, "(32, 48)", "(32, 64)"]),
    "truncated shard": (lambda d: (d / LAST).write_bytes((d / LAST).read_bytes()[:-100]), [LAST, "truncated"]),
    "index names an absent shard": (lambda d: (d / LAST).unlink(), [LAST, "missing"]),
    "absent index": (lambda d: (d / INDEX).unlink(), [INDEX, "neither model.safetensors"]),
    "index without a map": (lambda d: (d / INDEX).write_text("{}"), [INDEX, "weight_map"]),
    "absent config": (lambda d: (d / "config.json").unlink(), ["config.json", "no such file"]),
    "broken config": (lambda d: (d / "config.json").write_text('{"model_type": '), ["config.json", "JSON"]),
    "config that is no object": (lambda d: (d / "config.json").write_text("[1]"), ["config.json"]),
    "config without sizes": (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), ["config.json", "hidden_size"]),
    "other network": (edit_config(model_type="gemma"), ["config.json", "gemma"]),
    "sliding window": (edit_config(model_type="mistral", sliding_window=4096), ["config.json", "sliding window"]),
    "other rope": (edit_config(rope_parameters=dict(rope_type="yarn")), ["config.json", "yarn"]),
    "llama3 rope without factor": (edit_config(rope_parameters=LLAMA3), ["config.json", "factor"]),
    "vit: missing tensor": (edit_weights("model.safetensors", **{"layernorm.bias": None}), ["model.safetensors: ", "norm.bias"]),
    "vit: other network": (edit_config(model_type="vit"), ["config.json", "'vit'"]),
    "vit: patches that do not fit": (edit_config(patch_size=16), ["70", "patch size 16"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_loader_names_what_is_wrong(case, tmp_path):
    vit, (break_it, says) = case.startswith("vit"), BROKEN[case]
    save_random(tmp_path, **(VIT if vit else LLAMA))
    break_it(tmp_path)
    with pytest.raises(InputError) as error:
        ViT.load(tmp_path, image_size=70) if vit else Llama.load(tmp_path)
    message = str(error.value)
    assert all(text in message for text in [str(tmp_path), *says]) and "\n" not in message, message


MEASURE = """if True:
    import sys, torch, llama
    read = lambda key: int(open("/proc/self/status").read().split(key + ":")[1].split()[0]) / 1024
    llama.Llama.load(sys.argv[1], dtype=torch.bfloat16)  # a small one first: what torch imports along the way does not count
    open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
    before = read("VmRSS")
    model = llama.Llama.load(sys.argv[2], dtype=torch.bfloat16)
    print(read("VmHWM") - before, sum(p.nbytes for p in model.parameters()) / 2**20)"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_holds_the_model_and_one_shard_at_most(tmp_path):
    small, big = tmp_path / "small", tmp_path / "big"
    save_random(small, **LLAMA)
    save_random(big, **LLAMA | dict(hidden_size=512, intermediate_size=3328, num_hidden_layers=5, max_shard_size="25MB"))
    command = [sys.executable, "-c", MEASURE, str(small), str(big)]
    growth, size = map(float, subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())
    shard = max(path.stat().st_size for path in big.iterdir()) / 2**20
    shutil.rmtree(big)  # 120 MB
    assert size < growth < size + shard + 12, f"{growth:.0f} MiB for a model of {size:.0f} in shards of {shard:.0f}"
