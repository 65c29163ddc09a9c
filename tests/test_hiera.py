"""paper/hiera.py against Transformers on random checkpoints: image tokens, gradients, names, errors, LoRA."""

import functools
import json

import pytest
import torch
from checkpoints import edit_config, edit_weights

from llama import Llama, LlamaConfig
from lora import add_lora, trainable_state
from model import CapeLLM
from paper.hiera import Hiera, HieraConfig, order_by_unit, read_config, rename

transformers = pytest.importorskip("transformers")

TINY = dict(embed_dim=8, depths=[1, 2, 3, 1], num_heads=[1, 2, 4, 8], image_size=[64, 64],
            layer_norm_eps=1e-2)
DECODER = dict(decoder_hidden_size=8, decoder_depth=1, decoder_num_heads=2)
SHAPES = {
    "tiny": TINY,
    "3 x 3 units": TINY | dict(image_size=[96, 96], depths=[2, 1, 2, 3]),
    "as wide as Hiera-L's heads": TINY | dict(embed_dim=16, num_heads=[2, 4, 8, 16], layer_norm_eps=1e-6),
    "uneven heads, narrow mlp": TINY | dict(embed_dim=12, num_heads=[3, 2, 8, 4], mlp_ratio=2.5,
                                            depths=[2, 2, 2, 2]),
}


@torch.no_grad()
def save_random(directory, kind="HieraModel", **config):
    """Written by Transformers itself, so that names and config.json are a download's. -> its HieraModel"""
    torch.manual_seed(1)
    network = getattr(transformers, kind)(transformers.HieraConfig(**config)).eval()
    # every bias, norm and position weighs in, and attention is far from uniform
    for name, p in network.named_parameters():
        mean = float("norm" in name and "weight" in name)
        gain = 2 if "qkv.weight" in name else 1
        std = {1: 0.3, 3: 1}.get(p.ndim, gain * p[0].numel() ** -0.5)
        p.normal_(mean, std)
    network.save_pretrained(directory)
    return network if kind == "HieraModel" else transformers.HieraModel.from_pretrained(directory).eval()


def random_photos(size=64):
    return torch.randn(2, 3, size, size, generator=torch.manual_seed(2))


close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def test_the_order_is_unit_by_unit_and_a_z_within():
    """The picture at the top of paper/hiera.py, and after each pooling the same picture of fewer tokens."""
    order = order_by_unit(torch.arange(576).view(1, 576, 1), 3).flatten()  # 3 x 3 units: 24 x 24 patches
    places = order.argsort().view(24, 24)
    assert places[:4, :6].tolist() == [[0, 1, 4, 5, 16, 17],
                                       [2, 3, 6, 7, 18, 19],
                                       [8, 9, 12, 13, 24, 25],
                                       [10, 11, 14, 15, 26, 27]]
    for size in 2, 4, 8:  # the places of each square of patches are a run of numbers
        squares = places.view(24 // size, size, 24 // size, size).transpose(1, 2).flatten(2)
        assert torch.equal(squares.amax(2) - squares.amin(2), torch.full(squares.shape[:2], size**2 - 1))
    units = places.view(3, 8, 3, 8).amin((1, 3)) // 64
    assert units.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize("shape", SHAPES)
def test_image_tokens_and_gradients_equal_transformers(shape, tmp_path):
    config = SHAPES[shape]
    size = config["image_size"][0]
    theirs, ours = save_random(tmp_path, **config), Hiera.load(tmp_path, size)
    with torch.no_grad():
        want = theirs(random_photos(size)).last_hidden_state
        assert want.shape == (2, (size // 32) ** 2, 8 * config["embed_dim"])
        assert want.shape[1:] == (ours.n_patches, ours.config.hidden_size)
        assert want.std() > 0.3  # else 1e-5 would mean little
        close(ours(random_photos(size)), want)
    # gradients in fp64: attention this sharp makes a hundred times the rounding errors of the forward pass
    theirs, ours = theirs.double(), Hiera.load(tmp_path, size, torch.float64)
    photos, same_photos = (random_photos(size).double().requires_grad_() for _ in range(2))
    theirs(photos).last_hidden_state.sin().sum().backward()
    ours(same_photos).sin().sum().backward()
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
        want = theirs(random_photos()).last_hidden_state
        close(Hiera.load(tmp_path / kind, 64)(random_photos()), want)


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
    read = vars(read_config(tmp_path / "config.json"))
    read = {k: tuple(v) if isinstance(v, list) else v for k, v in read.items()}
    assert HieraConfig(**read) == HieraConfig()

    with torch.device("meta"):
        ours, theirs = Hiera(), transformers.HieraModel(large)
        photos = torch.empty(3, 3, 224, 224)
    assert ours(photos).shape == theirs(photos).last_hidden_state.shape == (3, 49, 1152)
    assert (ours.n_patches, ours.config.hidden_size, len(ours.blocks)) == (49, 1152, 48)

    shapes = {}
    for key, p in theirs.named_parameters():
        if names := rename(key, large.depths):
            shapes |= {name: part.shape for name, part in zip(names, p.chunk(len(names)))}
    assert {name: p.shape for name, p in ours.named_parameters()} == shapes
    n_ours, n_theirs = (sum(p.numel() for p in network.parameters()) for network in (ours, theirs))
    assert n_ours == n_theirs - 2 * 1152 == 212_584_608  # less the norm of the pooler


def test_in_bf16_with_lora_it_serves_capellm(tmp_path):
    save_random(tmp_path, **TINY)
    full, half = (Hiera.load(tmp_path, 64, dtype).requires_grad_(False)
                  for dtype in (torch.float32, torch.bfloat16))
    plain = full(random_photos())
    for hiera in full, half:
        add_lora(hiera, ("q", "v"), dropout=0)
        names = {f"blocks.{i}.attn.{x}.lora_{m}" for i in range(7) for x in "qv" for m in "AB"}
        assert trainable_state(hiera).keys() == names
    assert torch.equal(full(random_photos()), plain)

    tokens = half(random_photos().bfloat16())
    assert tokens.dtype == half.pos_embed.dtype == torch.bfloat16
    assert (tokens - plain).std() < 0.05 * plain.std()

    llama = Llama(LlamaConfig(vocab_size=10, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                              num_attention_heads=2, num_key_value_heads=1, head_dim=8))
    image = CapeLLM(half, llama).see(random_photos())
    assert image.shape == (2, half.n_patches, 16)
    image.sin().sum().backward()
    for name in trainable_state(half):
        grad = half.get_parameter(name).grad
        assert grad.dtype == torch.float32, name
        assert bool(grad.any()) == ("lora_B" in name), name  # B is still 0, which stops A's


QKV, LATE = "encoder.stages.1.layers.0.attn.qkv.weight", "encoder.stages.2.layers.2.mlp.fc1.bias"
UNPUBLISHED = dict(
    patch_stride=[8, 8], patch_padding=[0, 0], hidden_act="relu", masked_unit_size=[16, 16],
    masked_unit_attention=[True, True, True, False], num_query_pool=2, query_stride=[2, 1])
BROKEN = {  # what is done to the folder, and what the message must say
    "missing qkv": (edit_weights(**{QKV: None}), ["Missing", *(f"blocks.1.attn.{x}.weight" for x in "qkv")]),
    "missing tensor of a late block": (edit_weights(**{LATE: None}), ["Missing", "blocks.5.fc1.bias"]),
    "extra tensor": (
        edit_weights(**{"encoder.norm.weight": torch.ones(64)}), ["Unexpected", "encoder.norm.weight"]),
    "wrong shape": (edit_weights(**{QKV: torch.ones(48, 16)}), ["blocks.1.attn.q", "[16, 16]", "[16, 8]"]),
    "patches of another size": (
        edit_weights(**{"embeddings.patch_embeddings.projection.weight": torch.ones(8, 3, 4, 4)}),
        ["patch_embed.weight", "[8, 3, 4, 4]"]),
    "wrong positions": (edit_config(image_size=[96, 96]), ["image size 64", "[96, 96]"]),
    "oblong photos": (edit_config(image_size=[64, 96]), ["image size 64", "[64, 96]"]),
    "blocks in other stages": (edit_config(depths=[1, 3, 2, 1]), ["Missing", "blocks.3.norm1.weight"]),
    "other network": (edit_config(model_type="dinov2"), ["model_type is 'dinov2'", "'hiera'"]),
    "no model_type": (edit_config(model_type=None), ["model_type is None", "'hiera'"]),
    **{key: (edit_config(**{key: value}), [f"{key} is {value!r}"]) for key, value in UNPUBLISHED.items()},
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_loader_names_what_is_wrong(case, tmp_path):
    break_it, says = BROKEN[case]
    save_random(tmp_path, **TINY)
    break_it(tmp_path)
    with pytest.raises((ValueError, RuntimeError)) as error:
        Hiera.load(tmp_path, 64)
    assert all(text in str(error.value) for text in says), error.value
