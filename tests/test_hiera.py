"""hiera.py against Transformers on tiny random checkpoints: image tokens, gradients, names; what the loader refuses; LoRA."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hiera import Hiera, HieraConfig, rename
from llama import InputError, Llama, LlamaConfig
from lora import add_lora, trainable_state
from model import CapeLLM

transformers = pytest.importorskip("transformers")

TINY = dict(embed_dim=8, depths=[1, 2, 3, 1], num_heads=[1, 2, 4, 8], image_size=[64, 64], layer_norm_eps=1e-2)
DECODER = dict(decoder_hidden_size=8, decoder_depth=1, decoder_num_heads=2)
SHAPES = {
    "tiny": TINY,
    "3 x 3 units": TINY | dict(image_size=[96, 96], depths=[2, 1, 2, 3]),
    "as wide as Hiera-L's heads": TINY | dict(embed_dim=16, num_heads=[2, 4, 8, 16], layer_norm_eps=1e-6),
    "uneven heads, narrow mlp": TINY | dict(embed_dim=12, num_heads=[3, 2, 8, 4], mlp_ratio=2.5, depths=[2, 2, 2, 2]),
}


@torch.no_grad()
def save_random(directory, kind="HieraModel", **config):
    """Written by Transformers itself, so that names and config.json are what a user downloads. -> its HieraModel"""
    torch.manual_seed(1)
    network = getattr(transformers, kind)(transformers.HieraConfig(**config)).eval()
    for name, p in network.named_parameters():  # every bias, norm and position weighs in, and attention is far from uniform
        gain = 2 if "qkv.weight" in name else 1
        p.normal_(float("norm" in name and "weight" in name), {1: 0.3, 3: 1}.get(p.ndim, gain * p[0].numel() ** -0.5))
    network.save_pretrained(directory)
    return network if kind == "HieraModel" else transformers.HieraModel.from_pretrained(directory).eval()


def random_photos(size=64):
    return torch.randn(2, 3, size, size, generator=torch.manual_seed(2))


close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_image_tokens_and_gradients_equal_transformers(shape, tmp_path):
    config = SHAPES[shape]
    size = config["image_size"][0]
    theirs, ours = save_random(tmp_path, **config), Hiera.load(tmp_path, size)
    with torch.no_grad():
        want = theirs(random_photos(size)).last_hidden_state
        assert want.shape == (2, (size // 32) ** 2, 8 * config["embed_dim"]) and want.std() > 0.3  # else 1e-5 would mean little
        assert want.shape[1:] == (ours.n_patches, ours.config.hidden_size)
        close(ours(random_photos(size)), want)
    # gradients in fp64: attention this sharp makes a hundred times the rounding errors of the forward pass
    theirs, ours = theirs.double(), Hiera.load(tmp_path, size, torch.float64)
    photos, same_photos = (random_photos(size).double().requires_grad_() for _ in range(2))
    (theirs(photos).last_hidden_state.sin().sum() + ours(same_photos).sin().sum()).backward()
    same = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    same(same_photos.grad, photos.grad)
    left = dict(ours.named_parameters())
    for key, p in theirs.named_parameters():
        names = rename(key, config["depths"])
        for name, grad in zip(names, p.grad.chunk(len(names)) if names else []):
            same(left.pop(name).grad, grad, msg=lambda m: f"{name}: {m}")
    assert not left


@torch.no_grad()
def test_every_parameter_matters_but_the_bias_of_k(tmp_path):
    save_random(tmp_path, **TINY)
    model = Hiera.load(tmp_path, 64)
    photos = random_photos()
    before = model(photos)
    for name, p in model.named_parameters():
        old = p.clone()
        p += 0.2 * torch.randn(p.shape, generator=torch.manual_seed(3))
        change = (model(photos) - before).abs().max()
        p.copy_(old)
        # a bias of k adds the same to all scores of a query, and softmax takes it away again
        assert change < 1e-4 if name.endswith("k.bias") else change > 1e-2, name


@torch.no_grad()
def test_the_hubs_three_kinds_of_checkpoint_hold_the_same_network(tmp_path):
    for kind in "HieraModel", "HieraForImageClassification", "HieraForPreTraining":
        theirs = save_random(tmp_path / kind, kind, **TINY, **DECODER)
        close(Hiera.load(tmp_path / kind, 64)(random_photos()), theirs(random_photos()).last_hidden_state)


@torch.no_grad()
def test_what_config_json_leaves_out_is_as_published(tmp_path):
    theirs = save_random(tmp_path, **TINY | dict(image_size=[224, 224], layer_norm_eps=1e-6))
    short = dict(model_type="hiera", **{k: TINY[k] for k in ("embed_dim", "depths", "num_heads")})
    (tmp_path / "config.json").write_text(json.dumps(short))
    photos = random_photos(224)
    close(Hiera.load(tmp_path)(photos), theirs(photos).last_hidden_state)


@torch.no_grad()
def test_the_defaults_are_hiera_large(tmp_path):
    large = transformers.HieraConfig(embed_dim=144, depths=[2, 6, 36, 4], num_heads=[2, 4, 8, 16])
    large.save_pretrained(tmp_path)
    config = vars(HieraConfig.from_json(tmp_path / "config.json"))
    assert HieraConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}) == HieraConfig()
    with torch.device("meta"):
        ours, theirs = Hiera(), transformers.HieraModel(large)
        tokens = ours(torch.empty(3, 3, 224, 224))
    assert tokens.shape == theirs(torch.empty(3, 3, 224, 224, device="meta")).last_hidden_state.shape == (3, 49, 1152)
    assert (ours.n_patches, ours.config.hidden_size, len(ours.blocks)) == (49, 1152, 48)
    shapes = {name: part.shape for key, p in theirs.named_parameters() for names in [rename(key, large.depths)] if names
              for name, part in zip(names, p.chunk(len(names)))}
    assert {name: p.shape for name, p in ours.named_parameters()} == shapes
    n_parameters = sum(p.numel() for p in ours.parameters())
    assert n_parameters == sum(p.numel() for p in theirs.parameters()) - 2 * 1152 == 212_584_608  # less the norm of the pooler


def test_in_bf16_with_lora_it_serves_capellm(tmp_path):
    save_random(tmp_path, **TINY)
    full, half = (Hiera.load(tmp_path, 64, dtype).requires_grad_(False) for dtype in (torch.float32, torch.bfloat16))
    llama = Llama(LlamaConfig(vocab_size=10, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                              num_key_value_heads=1, head_dim=8))
    plain = full(random_photos())
    for hiera in full, half:
        add_lora(hiera, ("q", "v"), dropout=0)
        assert trainable_state(hiera).keys() == {f"blocks.{i}.attn.{x}.lora_{m}" for i in range(7) for x in "qv" for m in "AB"}
    assert torch.equal(full(random_photos()), plain)
    tokens = half(random_photos().bfloat16())
    assert tokens.dtype == half.pos_embed.dtype == torch.bfloat16 and (tokens - plain).std() < 0.05 * plain.std()
    model = CapeLLM(half, llama)
    image = model.see(random_photos())
    assert image.shape == (2, half.n_patches, 16)
    image.sin().sum().backward()
    for name, p in trainable_state(half).items():
        grad = half.get_parameter(name).grad
        assert grad.dtype == torch.float32 and bool(grad.any()) == ("lora_B" in name), name  # B is still 0, which stops A's


def edit_config(**change):
    return lambda d: (d / "config.json").write_text(json.dumps(json.loads((d / "config.json").read_text()) | change))


def edit_weights(**change):
    """Puts tensors into the file, or drops them where None is given."""
    def edit(d):
        tensors = load_file(d / "model.safetensors") | change
        save_file({k: t.clone() for k, t in tensors.items() if t is not None}, d / "model.safetensors")
    return edit


QKV, LATE = "encoder.stages.1.layers.0.attn.qkv.weight", "encoder.stages.2.layers.2.mlp.fc1.bias"
BROKEN = {  # what is done to the folder, and what the message must say
    "missing qkv": (edit_weights(**{QKV: None}), ["model.safetensors: 3 tensors", "blocks.1.attn.k.weight"]),
    "missing tensor of a late block": (edit_weights(**{LATE: None}), ["model.safetensors: 1 tensors", "blocks.5.fc1.bias"]),
    "extra tensor": (edit_weights(**{"encoder.norm.weight": torch.ones(64)}), ["model.safetensors", "encoder.norm.weight"]),
    "tensor with and without prefix": (edit_weights(**{f"hiera.{QKV}": torch.ones(48, 8)}), [f"hiera.{QKV}"]),
    "wrong shape": (edit_weights(**{QKV: torch.ones(48, 16)}), [QKV, "(16, 16)", "(16, 8)"]),
    "wrong positions": (edit_config(image_size=[96, 96]), ["image size 64", "96 x 96"]),
    "oblong photos": (edit_config(image_size=[64, 96]), ["image size 64", "64 x 96"]),
    "blocks in other stages": (edit_config(depths=[1, 3, 2, 1]), ["encoder.stages.2.layers.2", "(32,)", "(64,)"]),
    "other network": (edit_config(model_type="dinov2"), ["config.json: model_type is 'dinov2'", "'hiera'"]),
    "no model_type": (edit_config(model_type=None), ["config.json: model_type is None", "'hiera'"]),
    **{key: (edit_config(**{key: value}), [f"config.json: {key} is {value!r}"]) for key, value in dict(
        patch_size=[4, 4], patch_stride=[8, 8], patch_padding=[0, 0], num_channels=1, hidden_act="relu", embed_dim_multiplier=1.5,
        masked_unit_size=[16, 16], masked_unit_attention=[True, True, True, False], num_query_pool=2, query_stride=[2, 1]).items()},
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_loader_names_what_is_wrong(case, tmp_path):
    break_it, says = BROKEN[case]
    save_random(tmp_path, **TINY)
    break_it(tmp_path)
    with pytest.raises(InputError) as error:
        Hiera.load(tmp_path, 64)
    message = str(error.value)
    assert all(text in message for text in [str(tmp_path), *says]) and "\n" not in message, message
