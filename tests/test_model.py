"""model.py: the assembled network against the authors' numbers, and the loss that trains it."""

import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from chat import IGNORE
from decode import Conversations
from model import CapeLLM, separate


@pytest.fixture(scope="module")
def authors(shared):
    """The authors' tiny network as ours, and their inputs and results."""
    folder = shared / "parity" / "llama31"
    expected = load_file(folder / "expected.safetensors")
    model = CapeLLM.load(folder / "vit", folder / "llm").eval()
    with torch.no_grad():
        for name, p in trained(model).items():
            p.copy_(expected["param." + their_name(name)])
    return model, expected


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def their_name(name):
    """vit.blocks.0.attn.q.lora_A -> base_model.model.vision_model.blocks.0.attn.lora_A_q, and so on."""
    part, rest = name.split(".", 1)
    if part == "projection":
        return f"base_model.model.mm_projector.{rest}"
    if part == "llama":
        return f"base_model.model.model.{rest}.default.weight"
    *path, layer, matrix = rest.split(".")
    return ".".join(["base_model.model.vision_model", *path, f"{matrix}_{layer}"])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in trained(model).values()]


# -------------------------------------------------------------------------------------- the published network


def test_logits_loss_and_gradients_equal_the_published_code(authors):
    model, expected = authors
    image, text = model.see(expected["images"]), model.llama.embed_tokens(expected["tokens"])
    torch.testing.assert_close(image, expected["image_tokens"], atol=1e-5, rtol=0)
    logits = model.llama.lm_head(model.llama(torch.cat((text[:, :1], image, text[:, 1:]), dim=1)))
    of_image = logits[:, [0, 64, 128, 192, 256]]
    torch.testing.assert_close(logits[:, 257:], expected["logits_text"], atol=1e-5, rtol=0)
    torch.testing.assert_close(of_image, expected["logits_image"], atol=1e-5, rtol=0)

    model.zero_grad()
    loss = model(expected["images"], expected["tokens"], expected["labels"])
    loss.backward()
    torch.testing.assert_close(loss, expected["loss"][0], atol=1e-5, rtol=0)
    grads = [name for name in expected if name.startswith("grad.")]
    assert len(grads) == len(trained(model)) == 26
    for name, p in trained(model).items():
        theirs = expected["grad." + their_name(name)]
        assert (p.grad - theirs).norm() <= 1e-4 * theirs.norm(), name


@torch.no_grad()
def test_greedy_tokens_equal_the_published_code(authors):
    model, expected = authors
    prompt = expected["greedy_prompt"]
    image, text = model.see(expected["images"]), model.llama.embed_tokens(prompt)
    conversations = Conversations(model.llama, torch.cat((text[:, :1], image), dim=1))
    blocks, said = prompt[:, 1:].tolist(), []
    for _ in range(13):
        hidden = conversations.read(blocks)
        said.append(model.llama.lm_head(hidden[:, -1]).argmax(-1))
        blocks = said[-1][:, None].tolist()
    assert torch.equal(torch.stack(said, dim=1), expected["greedy_new"])


# ---------------------------------------------------------------------------- batches, packing, checkpointing


def test_padding_and_batching_change_nothing(authors):
    """A conversation's loss is the same alone and padded beside a longer one with other labels."""
    model, expected = authors
    images, tokens, labels = expected["images"], expected["tokens"].clone(), expected["labels"].clone()
    labels[1, 25:] = IGNORE  # so the second row is shorter and has fewer labels
    tokens[1, 25:] = 0
    with torch.no_grad():
        both = model(images, tokens, labels)
        first = model(images[:1], tokens[:1], labels[:1])
        second = model(images[1:], tokens[1:, :25], labels[1:, :25])
    torch.testing.assert_close(both, (first + second) / 2, atol=1e-6, rtol=0)


def test_packed_conversations_have_the_loss_and_gradients_of_separate_ones(authors):
    model, expected = authors
    image, tokens, labels = expected["images"][:1], expected["tokens"][:1], expected["labels"][:1]
    first, second = [0, 1, *range(2, 30)], [0, 1, *range(30, 41)]  # 8 and 7 labels; both begin BOS, "\n"
    apart = [model(image, tokens[:, part], labels[:, part]) for part in (first, second)]
    apart = sum(apart) / 2
    apart_gradients = gradients(model, apart)

    conversation = torch.tensor([[0, 0, *[1] * 28, *[2] * 11, *[0] * 3]])  # and padding
    tokens, labels = F.pad(tokens[:, :41], (0, 3)), F.pad(labels[:, :41], (0, 3), value=IGNORE)
    packed = model(image, tokens, labels, None, conversation)
    assert packed.item() == pytest.approx(apart.item(), abs=1e-6)
    for ours, theirs in zip(gradients(model, packed), apart_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-4)


def test_the_loss_is_averaged_over_conversations_wherever_they_are(authors):
    """Row 0 packs two conversations, row 1 holds one: each has a third of the loss."""
    model, expected = authors
    images, tokens, labels = expected["images"], expected["tokens"][:, :41], expected["labels"][:, :41]
    conversation = torch.tensor([[0, 0, *[1] * 28, *[2] * 11], [0, 0, *[1] * 39]])
    parts = [(0, [*range(30)]), (0, [0, 1, *range(30, 41)]), (1, [*range(41)])]
    with torch.no_grad():
        together = model(images, tokens, labels, None, conversation)
        alone = [model(images[[row]], tokens[[row]][:, part], labels[[row]][:, part]) for row, part in parts]
    torch.testing.assert_close(together, sum(alone) / 3, atol=1e-6, rtol=0)


def test_separate_is_the_picture_in_its_docstring():
    words = [line.split() for line in separate.__doc__.splitlines()]
    rows = [line[1:] for line in words if re.fullmatch("[x.]{8}", "".join(line[1:9]))]
    picture = torch.tensor([[mark == "x" for mark in row[:8]] for row in rows])
    numbers = [int(word) for row in rows for word in row[8:] if word.isdigit()]
    assert picture.shape == (8, 8) and numbers == [4, 5, 4, 5]

    positions, mask = separate(torch.tensor([[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 0]]), N=2)
    assert mask.shape == (2, 1, 8, 8) and mask.dtype == torch.bool
    assert torch.equal(mask[0, 0], picture)
    assert positions[0].tolist() == [0, 1, 2, 3, *numbers]
    # One conversation and padding: what comes before the padding is plainly causal.
    assert torch.equal(mask[1, 0, :7], torch.ones(7, 8).tril().bool())
    assert positions[1, :7].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_the_loss_of_a_network_in_bf16_is_fp32(shared):
    """As on a GPU, where logits are bf16."""
    folder = shared / "parity" / "llama31"
    torch.manual_seed(0)
    model = CapeLLM.load(folder / "vit", folder / "llm", image_size=56).eval()
    images, tokens = torch.randn(2, 3, 56, 56), torch.randint(3, 512, (2, 20))
    with torch.no_grad():
        exact = model(images, tokens, tokens)
        for p in model.parameters():
            p.data = p.data if p.requires_grad else p.data.bfloat16()
        rough = model(images, tokens, tokens)
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.05)


def test_checkpointing_activations_changes_no_gradient(authors):
    model, expected = authors
    grads = []
    for model.llama.checkpoint_activations in (False, True, False):
        loss = model(expected["images"], expected["tokens"], expected["labels"])
        grads.append(gradients(model, loss))
    for plain, checkpointed, _ in zip(*grads):
        torch.testing.assert_close(plain, checkpointed)


def test_the_last_layer_and_the_logits_are_made_only_where_there_is_a_label(authors):
    """The published network's loss and gradients above are those of this shorter computation."""
    model, expected = authors
    *_, before, last = model.llama.layers
    read, layers = {}, {"earlier": before.mlp, "o": last.self_attn.o_proj, "mlp": last.mlp,
                        "norm": model.llama.norm, "logits": model.llama.lm_head}
    hooks = [layer.register_forward_hook(
        lambda _, args, __, name=name: read.update({name: args[0].shape[:-1].numel()}))
        for name, layer in layers.items()]
    model(expected["images"], expected["tokens"], expected["labels"])
    for hook in hooks:
        hook.remove()
    B, T = expected["tokens"].shape
    n_labels = (expected["labels"] != IGNORE).sum()
    assert read == {"earlier": B * (256 + T), **dict.fromkeys(("o", "mlp", "norm", "logits"), n_labels)}


# ------------------------------------------------------------------------------------------------- <KEYPOINT>

KEYPOINT = 512  # the first token that the authors' toy network does not know


@pytest.fixture
def pointing(shared):
    """A network that answers with <KEYPOINT>, two photos of 4 x 4 patches, and tokens without <KEYPOINT>."""
    folder = shared / "parity" / "llama31"
    torch.manual_seed(0)
    model = CapeLLM.load(folder / "vit", folder / "llm", image_size=56, answers="token").eval()
    return model, torch.randn(2, 3, 56, 56), torch.randint(3, KEYPOINT, (2, 20))


def test_keypoint_token_is_new_and_embeddings_and_head_train(pointing, shared):
    model, *_ = pointing
    folder = shared / "parity" / "llama31"
    usual = CapeLLM.load(folder / "vit", folder / "llm", image_size=56)
    head = {f"keypoint_head.{layer}.{p}" for layer in (0, 2) for p in ("weight", "bias")}
    assert trained(model).keys() == trained(usual).keys() | head | {"llama.embed_tokens.weight"}
    new, old = model.llama.embed_tokens.weight, usual.llama.embed_tokens.weight
    assert torch.equal(new[:KEYPOINT], old)
    assert torch.allclose(new[KEYPOINT], old.mean(0))
    assert len(new) == KEYPOINT + 1
    assert new.dtype == torch.float32
    assert torch.equal(model.llama.lm_head.weight, usual.llama.lm_head.weight)


def test_loss_of_a_keypoint_token_is_its_distance_and_of_words_the_usual(pointing):
    """Row 0: two points and two words; row 1: a word. By hand, from the hidden states of the sequence."""
    model, images, tokens = pointing
    tokens[0, [7, 15]] = KEYPOINT
    labels = torch.full_like(tokens, IGNORE)
    labels[0, 3:5], labels[1, 19] = tokens[0, 3:5], tokens[1, 19]
    text, image = model.llama.embed_tokens(tokens), model.see(images)
    hidden = model.llama(torch.cat((text[:, :1], image, text[:, 1:]), dim=1))
    n = image.shape[1]

    def word(row, t):
        logits = model.llama.lm_head(hidden[row, n + t - 1])
        return -logits.log_softmax(-1)[tokens[row, t]]

    def distance(t, x, y):
        return (model.keypoint_head(hidden[0, n + t]) - torch.tensor([x, y])).abs().mean()
    row_0 = (word(0, 3) + word(0, 4) + distance(7, 0.12345, 0.456) + distance(15, 0, 0)) / 4
    expected = (row_0 + word(1, 19)) / 2

    loss = model(images, tokens, labels, torch.tensor([[0.12345, 0.456], [0, 0]]))
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    loss.backward()
    assert model.llama.embed_tokens.weight.grad[KEYPOINT].any()
    assert all(p.grad.any() for p in model.keypoint_head.parameters())


def test_points_are_not_rounded(pointing):
    model, images, tokens = pointing
    tokens[:, 9] = KEYPOINT
    labels = torch.full_like(tokens, IGNORE)

    def loss(x):
        return model(images, tokens, labels, torch.tensor([[x, 0.5], [0.5, 0.5]])).item()
    # Of four coordinates one moves by 0.0004.
    assert abs(loss(0.1234) - loss(0.1230)) == pytest.approx(0.0004 / 4, rel=0.01)


def test_points_of_packed_conversations_weigh_as_those_of_separate_ones(pointing):
    """The first has a point and three words, the second two points."""
    model, images, tokens = pointing
    tokens[0, [8, 12, 19]] = KEYPOINT
    labels = torch.full_like(tokens, IGNORE)
    labels[0, 3:6] = tokens[0, 3:6]
    points = torch.tensor([[0.1, 0.2], [0.8, 0.3], [0.5, 0.9]])
    first, second = [*range(10)], [0, 1, *range(10, 20)]

    def alone(part, points):
        return model(images[:1], tokens[:1, part], labels[:1, part], points)
    apart = (alone(first, points[:1]) + alone(second, points[1:])) / 2
    conversation = torch.tensor([[0, 0, *[1] * 8, *[2] * 10]])
    packed = model(images[:1], tokens[:1], labels[:1], points, conversation)
    torch.testing.assert_close(packed, apart, atol=1e-6, rtol=0)


def test_keypoint_token_with_frozen_weights_in_bf16(pointing):
    """As on a GPU, where what trains stays fp32."""
    model, images, tokens = pointing
    tokens[:, 9] = KEYPOINT
    labels = torch.full_like(tokens, IGNORE)
    points = torch.tensor([[0.25, 0.75], [0.25, 0.75]])
    loss = model(images, tokens, labels, points)
    for p in model.parameters():
        p.data = p.data if p.requires_grad else p.data.bfloat16()
    rough = model(images, tokens, labels, points)
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(loss.item(), rel=0.05)
