"""llama.py, vit.py and lora.py against Transformers, PEFT and the paper's own code; the cache."""

import functools
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from checkpoints import LLAMA, LLAMA3, VIT, edit_weights, save_random
from safetensors.torch import load_file

from llama import Cache, Llama, attend, attention_as_written, rope_frequencies
from lora import LoRALinear, add_lora, load_trainable_state, trainable_state
from vit import ViT

pytest.importorskip("transformers")

close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def test_the_defaults_are_the_papers_networks():
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in network().parameters()) for network in (Llama, ViT)]
    assert sizes == [8_030_261_248, 304_367_616]


# ----------------------------------------------------------------------------------------------------- Llama

FAMILIES = {
    "llama-3.1": LLAMA,
    "llama-3.2-1b": LLAMA | dict(rope_parameters=dict(LLAMA3, factor=32.0), head_dim=32,
                                 tie_word_embeddings=True, rms_norm_eps=1e-2),
    "mistral-v0.3": LLAMA | dict(kind="MistralForCausalLM", rope_parameters=dict(rope_theta=1e6),
                                 head_dim=24, sliding_window=None),
    "vicuna": LLAMA | dict(rope_parameters=dict(rope_theta=1e4), num_key_value_heads=4),
}
TOKENS = torch.randint(96, (2, 24), generator=torch.manual_seed(0))


def logits(model):
    return model.lm_head(model(model.embed_tokens(TOKENS))).float()


@pytest.fixture
def base(tmp_path):
    save_random(tmp_path, **LLAMA)
    return Llama.load(tmp_path).requires_grad_(False)


def rewrite_in_old_style(path):
    """A config.json as written before rope_parameters; what equals that time's defaults is left out."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config |= dict(rope_theta=rope.pop("rope_theta"), rope_scaling=rope if len(rope) > 1 else None)
    defaults = ("rope_theta", 1e4), ("head_dim", 16), ("num_key_value_heads", 4), ("rms_norm_eps", 1e-6)
    path.write_text(json.dumps(dict(item for item in config.items() if item not in defaults)))


@torch.no_grad()
@pytest.mark.parametrize("old_config", [False, True], ids=["new config", "old config"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, old_config, tmp_path):
    theirs = save_random(tmp_path, **FAMILIES[family])
    if old_config:
        rewrite_in_old_style(tmp_path / "config.json")
    ours = Llama.load(tmp_path)
    want = theirs(TOKENS).logits
    assert want.std() > 0.5  # else 1e-5 would mean little
    close(logits(ours), want)
    # at 100,000 tokens a relative error of 1e-6 is a tenth of a radian
    frequencies, rotary = rope_frequencies(ours.config), theirs.model.rotary_emb
    close(frequencies, rotary.inv_freq, atol=0, rtol=1e-6)
    assert rotary.attention_scaling == 1
    for key in ours.config.rope.keys() - {"rope_type"}:  # each setting matters here
        ours.config.rope[key] *= 1.5
        assert not torch.allclose(rope_frequencies(ours.config), frequencies, atol=0, rtol=1e-2), key
        ours.config.rope[key] /= 1.5


@torch.no_grad()
def test_what_old_files_hold_in_addition_is_of_no_use(tmp_path):
    """A copy of tied weights, and the frequencies of RoPE, which follow from the config."""
    save_random(tmp_path, **FAMILIES["llama-3.2-1b"] | dict(max_shard_size="5GB"))
    want = logits(Llama.load(tmp_path))
    edit_weights(**{"lm_head.weight": torch.ones(96, 64),
                    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})(tmp_path)
    assert torch.equal(logits(Llama.load(tmp_path)), want)


@pytest.mark.parametrize("shared_by", [1, 2, 3])
@pytest.mark.parametrize("n_before", [0, 7])
def test_fused_attention_is_attention_as_written(n_before, shared_by):
    q, k, v = (torch.randn(2, heads, T, 8) for heads, T in ((6, 5), *[(6 // shared_by, n_before + 5)] * 2))
    causal = torch.ones(5, n_before + 5, dtype=torch.bool).tril(n_before)
    some = causal & (torch.rand(2, 1, 5, n_before + 5) < 0.7)
    some[..., n_before] = True  # nobody looks at nothing
    close(attend(q, k, v, some), attention_as_written(q, k, v, some))
    want = attention_as_written(q, k, v, causal)
    close(attend(q, k, v, causal.expand(2, 1, -1, -1)), want)
    if not n_before:
        close(attend(q, k, v, None), want)
    # by hand: the last query of the first row's last head, whose keys are those of the last shared head
    scores = (k[0, -1] @ q[0, -1, -1] / 8**0.5).exp()
    close(want[0, -1, -1], scores @ v[0, -1] / scores.sum())


def joined(cache, layer):
    """-> keys and values of all that was read."""
    return [torch.cat(parts, dim=2) for parts in zip(*cache.get(layer))]


def test_blocks_behind_a_cache_equal_one_pass(base):
    x = base.embed_tokens(TOKENS)
    want, whole = base(x), Cache()
    close(base(x, whole), want)  # a cache that is filled changes nothing

    outputs, cache = [], Cache()
    for start, end in (0, 9), (9, 14), (14, 15), (15, 24):
        outputs.append(base(x[:, start:end], cache))
        for layer in 0, 1:
            keys_and_values = joined(cache, layer)
            assert [t.shape for t in keys_and_values] == [(2, 2, end, 16)] * 2  # of the key/value heads alone
    close(torch.cat(outputs, dim=1), want)
    assert [*cache.own] == [*whole.own] == [0, 1]
    close([joined(cache, layer) for layer in (0, 1)], [joined(whole, layer) for layer in (0, 1)])


def read_padded(llama, cache, blocks):
    """Rows read blocks of unequal lengths, padded with noise -> the hidden states of each row's tokens."""
    T = max(map(len, blocks))
    x = torch.stack([torch.cat((llama.embed_tokens(block), 9 * torch.randn(T - len(block), 64)))
                     for block in blocks])
    is_token = torch.stack([torch.arange(T) < len(block) for block in blocks])
    return [row[:len(block)] for row, block in zip(llama(x, cache, is_token), blocks)]


def test_forks_go_on_from_what_they_share_and_never_look_at_padding(base):
    """Photos; a fork of four rows with two questions, twice; a fork of that in another order."""
    photos, more = TOKENS[:, :7], TOKENS[0, 7:].split([5, 2, 3, 7])
    rest = TOKENS[1, :20].split([2, 6, 1, 4, 7])
    of_photo, of_row = torch.tensor([1, 0, 0, 1]), torch.tensor([3, 0, 0, 2, 1])
    cache = Cache()
    base(base.embed_tokens(photos), cache)
    before = [joined(cache, layer) for layer in (0, 1)]  # copies
    child = cache.fork(of_photo)
    found = read_padded(base, child, more)
    grandchild = child.fork(of_row)
    found += read_padded(base, grandchild, rest)
    found += read_padded(base, child, more[::-1])  # the parent goes on, too

    texts = [torch.cat((photos[p], block)) for p, block in zip(of_photo, more)]
    ends = [*texts, *(torch.cat((texts[r], block)) for r, block in zip(of_row, rest)),
            *(torch.cat((text, block)) for text, block in zip(texts, more[::-1]))]
    for states, text in zip(found, ends, strict=True):
        close(states, base(base.embed_tokens(text[None]))[0, -len(states):])
    after = [joined(cache, layer) for layer in (0, 1)]
    assert [keys.shape for keys, _ in after] == [(2, 2, 7, 16)] * 2
    assert all(map(torch.equal, sum(before, []), sum(after, [])))


def test_what_rows_have_in_common_is_kept_once(base):
    """A fork holds what was read since; its parent's keys are not copied for keeps."""
    cache = Cache()
    base(torch.randn(1, 40, 64), cache)
    child = cache.fork(torch.zeros(50, dtype=torch.long))
    assert not child.own
    base(torch.randn(50, 2, 64), child)
    assert {t.shape for layer in cache.own.values() for pair in layer for t in pair} == {(1, 2, 40, 16)}
    assert {t.shape for layer in child.own.values() for pair in layer for t in pair} == {(50, 2, 2, 16)}
    assert child.is_token.shape == (50, 42)


def test_checkpointed_activations_cost_a_second_pass_and_change_nothing(base):
    model, calls = adapt(base, dropout=0.5), []
    model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append("pass"))

    def gradients(checkpoint_activations):
        model.checkpoint_activations = checkpoint_activations
        model.zero_grad()
        calls.clear()
        torch.manual_seed(0)  # dropout's
        logits(model).sin().sum().backward()
        return [p.grad.clone() for p in trained_parameters(model)], len(calls)

    (plain, one), (checkpointed, two) = gradients(False), gradients(True)
    assert (one, two) == (1, 2)
    assert all(map(torch.equal, plain, checkpointed))


# ------------------------------------------------------------------------------------------------------- ViT

REGISTERS = VIT | dict(kind="Dinov2WithRegistersModel", num_register_tokens=4, patch_size=14)
GIANT = dict(use_swiglu_ffn=True)


@torch.no_grad()
@pytest.mark.parametrize("config, size", [
    pytest.param(VIT | dict(layer_norm_eps=1e-6), 70, id="plain"),
    pytest.param(VIT | dict(mlp_ratio=3), 70, id="narrow, large eps"),
    pytest.param(VIT | GIANT | dict(hidden_size=40), 70, id="giant"),
    pytest.param(REGISTERS, 70, id="registers"),
    pytest.param(REGISTERS | GIANT, 70, id="registers, giant"),
    pytest.param(REGISTERS | dict(image_size=518), 224, id="registers, 518 to 224"),
    pytest.param(REGISTERS, 112, id="registers, 70 to 112"),
])
def test_patch_tokens_equal_transformers(config, size, tmp_path):
    theirs = save_random(tmp_path, **config)
    photos = torch.randn(2, 3, size, size, generator=torch.manual_seed(2))
    want = theirs(photos).last_hidden_state[:, 1 + config.get("num_register_tokens", 0):]
    assert want.shape[1] == (size // 14) ** 2
    assert want.std() > 0.3
    close(ViT.load(tmp_path, image_size=size)(photos), want)
    close(ViT.load(tmp_path, size, torch.bfloat16)(photos.bfloat16()), want.bfloat16(), atol=0.2)


@torch.no_grad()
def test_positions_can_be_resized_again(tmp_path):
    save_random(tmp_path, **REGISTERS)
    vit = ViT.load(tmp_path, image_size=112)
    vit.resize_positions(112)  # nothing to do
    assert torch.equal(vit.pos_embed, ViT.load(tmp_path, image_size=112).pos_embed)
    vit.resize_positions(140)
    assert vit.n_patches == 100
    assert vit(torch.zeros(1, 3, 140, 140)).shape == (1, 100, 48)


@torch.no_grad()
@pytest.mark.parametrize("weights", ["vit/model.safetensors", "vit_official_names.safetensors"])
def test_image_tokens_equal_the_papers_code(weights, shared, tmp_path):
    """Photos of 224 pixels on a position table for 518, LoRA on q and v, then the projection."""
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


# ------------------------------------------------------------------------------------------------------ LoRA


def adapt(network, random_B=True, **lora_args):
    """The network with adapters on q and v, the rest frozen."""
    torch.manual_seed(3)
    add_lora(network.requires_grad_(False), ("q_proj", "v_proj"), **lora_args)
    for name, p in trainable_state(network).items():
        if random_B and "lora_B" in name:
            p.normal_(0, 0.3)
    return network


def trained_parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_lora_equals_peft_in_forward_and_gradients(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = save_random(tmp_path, **LLAMA)
    ours = adapt(Llama.load(tmp_path), dropout=0)
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(theirs, config)
    own = {f"base_model.model.model.{name}.default.weight": p
           for name, p in ours.named_parameters() if p.requires_grad}
    reference = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert own.keys() == reference.keys()
    assert len(own) == 8  # only q and v are wrapped
    for name, p in reference.items():
        p.data.copy_(own[name])
    got, want = logits(ours), theirs(TOKENS).logits
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
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-2, weight_decay=0.1)
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
    assert still.std(dim=0).max() < 1e-5
    assert moving.std(dim=0).min() > 0.1
    close(moving.mean(0), still[0], atol=0.2)  # unbiased: what is kept is scaled up


def test_a_bf16_base_keeps_fp32_adapters_and_gives_bf16(base, tmp_path):
    full, half = adapt(base, dropout=0), adapt(Llama.load(tmp_path, dtype=torch.bfloat16), dropout=0)
    want, got = logits(full), logits(half)
    hidden, same = (half(half.embed_tokens(TOKENS).to(dtype)) for dtype in (torch.bfloat16, torch.float32))
    assert hidden.dtype == torch.bfloat16
    assert torch.equal(same, hidden)  # embeddings in fp32 are cast down
    assert (got - want).std(dim=(1, 2)).max() < 0.03
    (want.sin().sum() + got.sin().sum()).backward()
    for (name, p), q in zip(full.named_parameters(), half.parameters(), strict=True):
        if p.requires_grad:
            assert q.dtype == q.grad.dtype == torch.float32, name
            assert (q.grad - p.grad).norm() < 0.1 * p.grad.norm(), name
        else:
            assert torch.equal(p.bfloat16(), q), name


def test_the_trained_state_makes_another_model_the_same_or_is_refused(base, tmp_path):
    model, other = adapt(base).eval(), adapt(Llama.load(tmp_path), random_B=False).eval()
    state, before, name = trainable_state(model), logits(other), "layers.1.self_attn.v_proj.lora_B"
    lacking = {key: tensor for key, tensor in state.items() if key != name}
    for wrong, differs in (lacking, name), (state | {"spare": torch.ones(1)}, "spare"):
        with pytest.raises(ValueError, match=f"^1 trained tensors .*{differs}$"):
            load_trainable_state(other, wrong)
    assert torch.equal(logits(other), before)
    with pytest.raises(RuntimeError, match=rf"{name}: .*\[32, 4\].*\[32, 8\]"):
        load_trainable_state(other, state | {name: torch.ones(32, 4)})
    load_trainable_state(other, state)
    assert torch.equal(logits(other), logits(model)) and not torch.equal(logits(model), before)
