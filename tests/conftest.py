"""Shared by all tests: the top-level modules on the path, and the folder of reference data."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from chat import IGNORE, Chat  # noqa: E402

torch.set_num_threads(1)  # faster for tiny networks than two that wait for each other


@pytest.fixture(scope="session")
def shared():
    """Annotations, photographs and reference values that may not be redistributed; see README, "Tests"."""
    folder = Path(os.environ.get("CAPELLM_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no reference data: {folder} is absent (set CAPELLM_SHARED)")
    return folder.resolve()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with untrained backbones of a few thousand weights in the hub's layout: vit/ (4 x 4 patches) and llm/, whose
    tokenizer was made from descriptions.json and spells digits one by one."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from llama import Llama, LlamaConfig
    from vit import ViT, ViTConfig

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([(ROOT / "descriptions.json").read_text()], trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<bos>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    vit_config = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56)
    llm_config = dict(vocab_size=2000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2)
    for name, network, config in (("vit", ViT(ViTConfig(**vit_config)), {"model_type": "dinov2", **vit_config}),
                                  ("llm", Llama(LlamaConfig(**llm_config, head_dim=8, rope={"rope_theta": 1e4, "rope_type": "default"})),
                                   {"model_type": "llama", **llm_config, "bos_token_id": 0, "eos_token_id": 1})):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file(network.state_dict(), folder / name / "model.safetensors")
    tokenizer.save(str(folder / "llm" / "tokenizer.json"))
    return folder


def sentencepiece(*fused):
    """As Llama-2's: a space is "\u2581", one is put before any text, digits stand alone but for those fused, bytes for unknown letters."""
    merges, characters = [("\u2581", "["), ("\u2581", "U"), *fused], map(chr, range(33, 127))
    vocabulary = ["<s>", "</s>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", *characters, *map("".join, merges)]
    t = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, merges, unk_token="<unk>", byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    t.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return t.to_str()


@pytest.fixture(scope="session", params=["llama3", "tiny", "llama2", "lumps"])
def chat(request, tmp_path_factory):
    """The same code with Llama-3's own tokenizer, byte pairs with single digits, SentencePiece, and one that fuses some numbers."""
    folder, (bos, eos) = tmp_path_factory.mktemp("chat"), (128000, 128001) if request.param == "llama3" else (0, [1, 2])
    owner, name = {"llama3": ("shared", "llama3_tokenizer"), "tiny": ("tiny", "llm")}.get(request.param, (None, None))
    made = sentencepiece(*[("0", "0"), ("1", "2"), ("12", "3")] * (request.param == "lumps"))
    (folder / "tokenizer.json").write_text((request.getfixturevalue(owner) / name / "tokenizer.json").read_text() if owner else made)
    (folder / "config.json").write_text(json.dumps({"bos_token_id": bos, "eos_token_id": eos, "vocab_size": 128256}))
    chat = Chat(folder)
    chat.folder = folder
    chat.choices = {"llama3": 2, "lumps": 0}.get(request.param, 6)  # of an answer: x and y, or their digits; 0: no template holds
    return chat


def runs(ids, labels):
    """A sequence cut where supervision begins and ends: lists of ids, unsupervised and supervised in turn."""
    assert len(ids) == len(labels) and all(label in (IGNORE, id) for id, label in zip(ids, labels))
    edges = [0, *(i for i in range(1, len(ids)) if (labels[i] == IGNORE) != (labels[i - 1] == IGNORE)), len(ids)]
    return [ids[a:b] for a, b in zip(edges, edges[1:])]
