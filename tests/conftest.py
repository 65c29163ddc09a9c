"""Shared by all tests: the top-level modules on the path, and the folder of reference data."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
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
