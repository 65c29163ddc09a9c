"""llama.py, vit.py and lora.py against Transformers, PEFT and the paper's own code, on tiny random checkpoints; cache; loader.

A checkpoint is written by Transformers' own save_pretrained, so that names, shards and config.json are what a user downloads.
"""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch import nn

from llama import InputError, Llama, LlamaConfig
from lora import LoRALinear, add_lora, load_trainable_state, trainable_state
from vit import ViT, ViTConfig

transformers = pytest.importorskip("transformers")


@torch.no_grad()
def save_random(directory, kind, max_shard_size="5GB", **config):
    kind = getattr(transformers, kind)
    torch.manual_seed(1)
    network = kind(kind.config_class(**config)).eval()
    for name, p in network.named_parameters():
        p.normal_(float(p.ndim == 1 and "bias" not in name), {1: 0.3, 3: 1}.get(p.ndim, p[0].numel() ** -0.5))
    network.save_pretrained(directory, max_shard_size=max_shard_size)
    return network


def close(got, want, rtol=1e-5, atol=1e-5):
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


# ---- Llama ----

LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
LLAMA = dict(kind="LlamaForCausalLM", vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=131072, rms_norm_eps=1e-5, max_shard_size="64KB",
             rope_parameters=dict(LLAMA3, factor=8.0))
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


def rewrite_as_before_rope_parameters(path):
    """What older versions wrote; settings that equal the defaults of that time are left out."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    theta, rope_type = rope.pop("rope_theta"), rope.pop("rope_type")
    config |= dict(rope_scaling=rope | dict(rope_type=rope_type) if rope else None, rope_theta=theta)
    for key, default in dict(rope_theta=1e4, head_dim=16, num_key_value_heads=4).items():
        if config[key] == default:
            del config[key]
    path.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_random(folder, **LLAMA)
    return Llama.load(folder).requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("old_config", [False, True], ids=["new config", "old config"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, old_config, tmp_path):
    theirs = save_random(tmp_path, **FAMILIES[family])
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    if old_config:
        rewrite_as_before_rope_parameters(tmp_path / "config.json")
    ours = Llama.load(tmp_path)
    want = theirs(IDS, position_ids=POSITIONS, attention_mask=torch.ones_like(IDS)).logits
    assert want.std() > 0.5  # else 1e-5 would mean little
    close(logits(ours), want)
    close(logits(ours, None), theirs(IDS).logits)  # without positions they are 0, 1, 2, ...


@pytest.mark.parametrize("change", [dict(rope_type="default"), dict(factor=32.0), dict(rope_theta=1e4), dict(low_freq_factor=2.0),
                                    dict(high_freq_factor=3.0), dict(original_max_position_embeddings=4096)], ids=str)
def test_the_comparison_feels_every_rope_setting(change, model, monkeypatch):
    before = logits(model)
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, rope=model.config.rope | change))
    assert (logits(model) - before).abs().max() > 1e-2


def test_blocks_behind_a_cache_equal_one_pass(model):
    x, causal = model.embed_tokens(IDS), torch.ones(24, 24, dtype=torch.bool).tril()
    want, whole_cache = model(x)
    outputs, cache = [], None
    for start, end in (0, 9), (9, 14), (14, 15), (15, 24):
        y, cache = model(x[:, start:end], torch.arange(start, end)[None], causal[None, None, start:end, :end], cache)
        outputs.append(y)
    close(torch.cat(outputs, dim=1), want)
    close(cache, whole_cache)
    assert cache[0][0].shape == (2, 2, 24, 16)  # only the key/value heads are kept


def test_padded_rows_of_different_lengths_share_a_prefix(model):
    """A photo's prefix of 7 runs once; three questions of 5, 2 and 3 tokens behind it, padded to 5; then a block of 2 for each."""
    prefix, lengths = IDS[:1, :7], torch.tensor([5, 2, 3])
    questions, seconds = IDS[0, 7:22].view(3, 5), IDS[1, :6].view(3, 2)
    real = torch.arange(5) < lengths[:, None]  # (3, 5); the rest of `questions` is padding that nobody may look at
    _, cache = model(model.embed_tokens(prefix))
    cache = [(k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1)) for k, v in cache]

    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    mask = F.pad(causal & real[:, None], (7, 0), value=True)[:, None]  # (3, 1, 5, 12)
    first, cache = model(model.embed_tokens(questions), (7 + torch.arange(5)).expand(3, -1), mask, cache)
    past = F.pad(real, (7, 0), value=True)[:, None].expand(-1, 2, -1)  # (3, 2, 12)
    mask = torch.cat([past, causal[:2, :2].expand(3, -1, -1)], dim=2)[:, None]  # (3, 1, 2, 14)
    second, _ = model(model.embed_tokens(seconds), 7 + lengths[:, None] + torch.arange(2), mask, cache)

    for row, n in enumerate(lengths):
        alone, _ = model(model.embed_tokens(torch.cat([prefix[0], questions[row, :n], seconds[row]]))[None])
        close(torch.cat([first[row, :n], second[row]]), alone[0, 7:])


# ---- ViT ----

VIT = dict(kind="Dinov2Model", hidden_size=48, num_hidden_layers=3, num_attention_heads=4, patch_size=14, image_size=70, layer_norm_eps=1e-2)
REGISTERS = VIT | dict(kind="Dinov2WithRegistersModel", num_register_tokens=4)
PHOTOS = torch.randn(2, 3, 224, 224, generator=torch.manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("config, size", [
    (VIT | dict(layer_norm_eps=1e-6), 70), (VIT | dict(mlp_ratio=3), 70), (VIT | dict(use_swiglu_ffn=True), 70), (REGISTERS, 70),
    (REGISTERS | dict(use_swiglu_ffn=True), 70), (REGISTERS | dict(image_size=518), 224), (REGISTERS, 112),
], ids=["plain", "narrow, large eps", "giant", "registers", "registers, giant", "registers, 518 to 224", "registers, 70 to 112"])
def test_patch_tokens_equal_transformers(config, size, tmp_path):
    theirs = save_random(tmp_path, **config)
    want = theirs(PHOTOS[:, :, :size, :size]).last_hidden_state[:, 1 + config.get("num_register_tokens", 0):]
    assert want.shape == (2, (size // 14) ** 2, 48) and want.std() > 0.3
    close(ViT.load(tmp_path, image_size=size)(PHOTOS[:, :, :size, :size]), want)


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
    param = {name.removeprefix("param.base_model.model."): tensor for name, tensor in expected.items()}
    for name, p in vit.named_parameters():
        if "lora" in name:  # blocks.N.attn.q.lora_A is blocks.N.attn.lora_A_q there
            block, q_or_v, A_or_B = name.rsplit(".", 2)
            p.copy_(param[f"vision_model.{block}.{A_or_B}_{q_or_v}"])
    tokens = F.linear(vit(expected["images"]), param["mm_projector.weight"], param["mm_projector.bias"])
    close(tokens, expected["image_tokens"])


@pytest.mark.parametrize("config", [VIT, REGISTERS | dict(use_swiglu_ffn=True)], ids=["plain", "registers, giant"])
def test_the_original_releases_names_load_the_same(config, tmp_path):
    save_random(tmp_path, **config)
    want = ViT.load(tmp_path, image_size=70).state_dict()
    fused = {name.replace("attn.q", "attn.qkv"): torch.cat([want[name.replace("attn.q", f"attn.{x}")] for x in "qkv"])
             for name in want if "attn.q." in name}
    rest = {name.replace("patch_embed.", "patch_embed.proj."): want[name].clone() for name in want if name[-9:-7] not in ("")}
    save_file(fused | rest | {"mask_token": torch.zeros(1, 48)}, tmp_path / "model.safetensors")
    got = ViT.load(tmp_path, image_size=70).state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


# ---- LoRA ----

def adapt(network, random_B=True, **lora_args):
    """The network with adapters on q and v, the rest frozen."""
    torch.manual_seed(3)
    add_lora(network.requires_grad_(False), ("q_proj", "v_proj"), **lora_args)
    for name, p in trainable_state(network).items():
        if random_B and "lora_B" in name:
            p.normal_(0, 0.3)
    return network


@pytest.fixture
def base(tmp_path):
    save_random(tmp_path, **LLAMA)
    return Llama.load(tmp_path)


def test_lora_equals_peft_in_forward_and_gradients(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = save_random(tmp_path, **LLAMA)
    ours = adapt(Llama.load(tmp_path), dropout=0)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0, target_modules=["q_proj", "v_proj"]))
    own = {f"base_model.model.model.{name}.default.weight": p for name, p in ours.named_parameters() if p.requires_grad}
    reference = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert own.keys() == reference.keys() and len(own) == 8
    for name, p in reference.items():
        p.data.copy_(own[name])
    got, want = logits(ours, None), theirs(IDS).logits
    close(got, want)
    (got.sin().sum() + want.sin().sum()).backward()
    for name, p in reference.items():
        assert p.grad.norm() > 0.1
        close(own[name].grad, p.grad, rtol=1e-4)


def test_lora_starts_as_the_identity_on_q_and_v_alone(base):
    before = logits(base)
    model = adapt(base, random_B=False, dropout=0.5)
    assert torch.equal(logits(model), before)
    wrapped = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert wrapped == {f"layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qv"}
    for name in wrapped:
        A = model.get_parameter(f"{name}.lora_A")
        assert A.shape == (8, 64) and 0.11 < A.abs().max() <= 0.125 and 0.06 < A.std() < 0.085  # uniform within 1 / sqrt(64), as PEFT's


def test_training_moves_the_adapters_and_not_a_bit_of_the_rest(base):
    model = adapt(base)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, model.parameters()), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        logits(model).square().mean().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != ("lora" in name), name


@torch.no_grad()
def test_dropout_acts_on_the_update_alone_and_in_training_alone():
    layer = LoRALinear(nn.Linear(16, 8), rank=4, dropout=0.3)
    layer.lora_B.normal_()
    x = torch.randn(16, generator=torch.manual_seed(3)).expand(20_000, -1)
    still, moving = (layer.train(mode)(x) - layer.base(x) for mode in (False, True))
    assert still.std(dim=0).max() < 1e-5 and moving.std(dim=0).min() > 0.1
    close(moving.mean(0), still[0], atol=0.05)  # unbiased: what is kept is scaled up
    layer.lora_B.zero_()
    assert torch.equal(layer(x), layer.base(x))


def test_a_bf16_base_keeps_fp32_adapters_and_gives_bf16(base):
    full, half = adapt(base, dropout=0), None
