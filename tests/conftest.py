"""What several test files share: the reference data, tiny networks, and tokenizers of four kinds."""

import json
import os
import random
import signal
import sys
from argparse import Namespace
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from chat import IGNORE, AnswerFormat, Chat  # noqa: E402
from llama import Llama, LlamaConfig  # noqa: E402
from model import CapeLLM, adapt  # noqa: E402
from vit import ViT, ViTConfig  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where a shell runs us with "&"
torch.set_num_threads(1)  # faster for tiny networks than two that wait for each other
SPACE = "\u2581"  # SentencePiece's letter for a space
LLAMA3_IDS = {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "vocab_size": 128256}


@pytest.fixture(scope="session")
def shared():
    """Annotations, photographs and reference values that may not be redistributed; see README, "Tests"."""
    folder = Path(os.environ.get("CAPELLM_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no reference data: {folder} is absent (set CAPELLM_SHARED)")
    return folder.resolve()


# --------------------------------------------------------------------------------------------------- networks


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Untrained backbones of a few thousand weights in the hub's layout.

    vit/ sees 4 x 4 patches. llm/ has a tokenizer made from descriptions.json, which spells digits one by one.
    """
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    vit = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56)
    save_network(folder / "vit", ViT(ViTConfig(**vit)), {"model_type": "dinov2", **vit})
    llm = dict(vocab_size=2000, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
               num_attention_heads=4, num_key_value_heads=2)
    rope = {"rope_theta": 1e4, "rope_type": "default"}
    save_network(folder / "llm", Llama(LlamaConfig(**llm, head_dim=8, rope=rope)),
                 {"model_type": "llama", **llm, "bos_token_id": 0, "eos_token_id": 1})
    byte_pairs().save(str(folder / "llm" / "tokenizer.json"))
    return folder


def save_network(folder, network, config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), folder / "model.safetensors")


def network_arguments(folder, **changes):
    """What train.py would hand to load_network() for the networks in a folder's vit/ and llm/."""
    arguments = dict(vit=folder / "vit", llm=folder / "llm", image_size=56, seed=0, tune_vit="lora",
                     tune_llm="lora", answer="text", instruction="description", pretrain=None)
    return Namespace(**arguments | changes)


def load_parity(shared, image_size=224):
    """The authors' tiny network, which has no tokenizer, with fresh adapters."""
    folder = shared / "parity/llama31"
    torch.manual_seed(0)
    vit, llama = ViT.load(folder / "vit", image_size), Llama.load(folder / "llm")
    adapt(vit, "lora", ("q", "v"))
    adapt(llama, "lora", ("q_proj", "v_proj"))
    return CapeLLM(vit, llama).eval()


def generate_all(model, images, questions, chat):
    """The answers of the textbook's decoder, one list over all photos: what decode.locate() must say."""
    form = chat.coordinates
    return [model.generate(image[None], [chat.bos, *question], form.ending[-1], form.max_tokens)
            for image, of_photo in zip(images, questions, strict=True) for question in of_photo]


# ------------------------------------------------------------------------------------------------- tokenizers


def byte_pairs():
    """Byte pairs as Llama-3's, but with single digits and of 2,000 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=["<bos>", "<eos>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([(ROOT / "descriptions.json").read_text()], trainer)
    return tokenizer


def sentencepiece(name):
    """Byte pairs over whole texts, whose spaces are letters, and bytes for what the vocabulary lacks.

    name: "vicuna" (as Llama-2), "mistral first" or "mistral always" (which texts get a space before them).
    Those spell digits one by one; "pairs" cuts numbers into two and one, and "lumps" joins only 00 and 123.
    Tokens such as "]U" join what the pieces of a conversation keep apart.
    """
    special = ["<unk>", "<s>", "</s>"]
    if name.startswith("mistral"):
        special += ["[INST]", "[/INST]", *(f"[control_{n}]" for n in range(8, 774))]
    spaced = [SPACE + word for word in "[ User where is the left ear begins".split()]
    numbers = {"pairs": [f"{n:02d}" for n in range(100)], "lumps": ["00", "123"]}.get(name, [])
    words = ["]U", "],", ":[", *spaced, "User", "Reference", "Assistant", *numbers]
    merges = [pair for word in words for pair in zip(accumulate(word), word[1:])]  # letter by letter
    merges = list(dict.fromkeys(merges))
    letters = [*(f"<0x{b:02X}>" for b in range(256)), SPACE, *map(chr, range(33, 127))]
    tokens = dict.fromkeys([*special, *letters, *map("".join, merges)])
    vocabulary = {token: i for i, token in enumerate(tokens)}

    t = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if name.startswith("mistral"):
        t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=name.split()[1], split=False)
    else:
        t.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    if name == "pairs":
        t.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d{1,2}"), "isolated")
    t.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                   decoders.Strip(" ", 1, 0)])
    t.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    t.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return t.to_str()


def make_chat(folder, tokenizer, bos_token_id, eos_token_id, vocab_size=128256):
    """The Chat of an LLM's folder with this tokenizer.json. chat.folder is the folder."""
    (folder / "tokenizer.json").write_text(tokenizer)
    config = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "vocab_size": vocab_size}
    (folder / "config.json").write_text(json.dumps(config))
    chat = Chat(folder)
    chat.folder = folder
    return chat


@pytest.fixture(scope="session", params=["llama3", "tiny", "vicuna", "lumps"])
def chat(request, tmp_path_factory):
    """Llama-3's own tokenizer, byte pairs with single digits, SentencePiece, and one that joins some digits.

    chat.choices is what an answer leaves to choose: x and y, or their digits; 0 if no format holds for all.
    """
    name, folder = request.param, tmp_path_factory.mktemp("chat")
    if name == "llama3":
        tokenizer = request.getfixturevalue("shared") / "llama3_tokenizer" / "tokenizer.json"
        chat = make_chat(folder, tokenizer.read_text(), **LLAMA3_IDS)
    elif name == "tiny":
        tokenizer = request.getfixturevalue("tiny") / "llm" / "tokenizer.json"
        chat = make_chat(folder, tokenizer.read_text(), 0, 1)
    else:
        chat = make_chat(folder, sentencepiece(name), 1, [2, 0])
    chat.choices = {"llama3": 2, "tiny": 6, "vicuna": 6, "lumps": 0}[name]
    return chat


def runs(tokens, labels):
    """A sequence cut where supervision begins and ends: token lists, unsupervised and supervised in turn."""
    assert len(tokens) == len(labels)
    assert all(label in (IGNORE, token) for token, label in zip(tokens, labels))
    learned = [label != IGNORE for label in labels]
    edges = [i for i in range(1, len(tokens)) if learned[i] != learned[i - 1]]
    return [tokens[start:end] for start, end in zip([0, *edges], [*edges, len(tokens)])]


class MadeUpChat:
    """A Chat of token numbers without texts, whose format is made up, with `n` choices a coordinate.

    With n = 1 a choice is from 250 tokens, with n = 3 from ten; their ids are in no order. Every answer in
    the format is the same point.
    """

    def __init__(self, n, instruction=None):
        self.bos, self.eos, self.newline, self.instruction = 1, 2, [3], instruction
        more, digits = [[]] * (n - 1), [*range(100, 350 if n == 1 else 110)]
        random.Random(0).shuffle(digits)
        self.coordinates = AnswerFormat([[10, 11], *more, [12, 11], *more], digits, [13, 2], 4 + 2 * n)

    def encode(self, text):
        return [20, 21, 22]

    def learn(self, answer):
        """Makes the format that of this answer: an untrained network's own, to which it keeps."""
        known, chosen = self.split(answer)
        others = [token for token in range(20, 512) if token not in chosen]
        digits = [*dict.fromkeys(chosen), *others][:len(self.coordinates.digits)]
        self.coordinates = replace(self.coordinates, known=known, digits=digits)

    def split(self, answer):
        """An answer as long as the format -> the tokens before each choice, and the choices."""
        rest = iter(answer)
        parts = [([next(rest) for _ in known], next(rest)) for known in self.coordinates.known]
        return [known for known, _ in parts], [choice for _, choice in parts]

    def parse(self, answer):
        form = self.coordinates
        if not form.known or len(answer) != form.max_tokens:
            return None
        known, chosen = self.split(answer)
        return (0.25, 0.75) if known == form.known and {*chosen} <= {*form.digits} else None
