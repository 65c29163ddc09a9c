"""model.py: the assembled network against the authors' numbers, and the loss that trains it."""

import pytest
import torch
import torch.nn.functional as F
from conftest import load_parity
from safetensors.torch import load_file

from chat import IGNORE


@pytest.fixture(scope="module")
def authors(shared):
    """The authors' tiny network as ours, and their inputs and results."""
    expected = load_file(shared / "parity/llama31/expected.safetensors")
    model = load_parity(shared)
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
    torch.testing.assert_close(model.see(expected["images"]), expected["image_tokens"], atol=1e-5, rtol=0)
    logits = model.llama.lm_head(model.llama(model.embed(expected["images"], expected["tokens"])))
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


def test_generated_tokens_equal_the_published_code(authors):
    model, expected = authors
    for image, prompt, theirs in zip(expected["images"], expected["greedy_prompt"], expected["greedy_new"]):
        said = model.generate(image[None], prompt.tolist(), end=-1, max_tokens=13)
        assert said == theirs.tolist()
        end = said[5]
        assert model.generate(image[None], prompt.tolist(), end, 13) == said[:said.index(end) + 1]


# ----------------------------------------------------------------------------------------------- rows of text


PHOTO_OF = torch.tensor([1, 0, 1])  # three conversations about two photos


@pytest.fixture
def conversations(authors):
    """Tokens and labels of three conversations of different lengths, with 4, 9 and 7 labels."""
    _, expected = authors
    tokens, labels = expected["tokens"][0], expected["labels"][0]
    parts = [0, 1, *range(14, 25)], [*range(30)], [0, 1, *range(30, 41)]
    rows = [(F.pad(tokens[part], (0, 30 - len(part))), F.pad(labels[part], (0, 30 - len(part)), value=IGNORE))
            for part in parts]
    return tuple(map(torch.stack, zip(*rows)))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_conversations_behind_one_photo_have_the_loss_and_gradients_of_rows_of_their_own(
        authors, conversations, checkpointed):
    """Here each photo is read once; in a textbook, each conversation has a copy of it."""
    model, expected = authors
    images, (tokens, labels) = expected["images"], conversations
    apart = model(images[PHOTO_OF], tokens, labels)
    want = gradients(model, apart)
    model.llama.checkpoint_activations = checkpointed
    together = model(images, tokens, labels, PHOTO_OF)
    got = gradients(model, together)
    model.llama.checkpoint_activations = False
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=0)
    for ours, theirs in zip(got, want, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_each_conversation_has_the_same_share_of_the_loss(authors, conversations):
    """However many labels it has, how far it is padded, and whosever photo it shares; without labels none."""
    model, expected = authors
    images, (tokens, labels) = expected["images"], conversations
    with torch.no_grad():
        alone = [model(images[[p]], tokens[[row], :n], labels[[row], :n])
                 for row, (p, n) in enumerate([(1, 13), (0, 30), (1, 13)])]
        nothing = torch.full_like(labels[:1], IGNORE)
        for photos, photo_of in (images, PHOTO_OF), (images[PHOTO_OF], None):
            together = model(photos, tokens, labels, photo_of)
            torch.testing.assert_close(together, sum(alone) / 3, atol=1e-6, rtol=0)
            two = model(photos, tokens, torch.cat((labels[:2], nothing)), photo_of)
            torch.testing.assert_close(two, sum(alone[:2]) / 2, atol=1e-6, rtol=0)


def test_logits_are_made_only_where_there_is_a_label(authors):
    """The published network's loss and gradients above are those of this shorter computation."""
    model, expected = authors
    rows, head = [], model.llama.lm_head
    hook = head.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1].numel()))
    model(expected["images"], expected["tokens"], expected["labels"])
    hook.remove()
    assert rows == [(expected["labels"] != IGNORE).sum()]


@pytest.mark.parametrize("photo_of", [None, PHOTO_OF])
def test_the_loss_does_not_wait_for_the_device(shared, conversations, photo_of):
    """On the device "meta" nothing is ever computed, so that whatever looked at a value would raise."""
    model, (tokens, labels) = load_parity(shared, image_size=56).to("meta"), conversations
    images = torch.empty(3 if photo_of is None else 2, 3, 56, 56, device="meta")
    loss = model(images, tokens.to("meta"), labels, photo_of)
    loss.backward()
    assert loss.device.type == "meta" and all(p.grad is not None for p in trained(model).values())
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(images, tokens.to("meta"), labels.to("meta"), photo_of)


def test_the_loss_of_a_network_in_bf16_is_fp32(shared):
    """As on a GPU, where logits are bf16."""
    model = load_parity(shared, image_size=56)
    images, tokens = torch.randn(2, 3, 56, 56), torch.randint(3, 512, (2, 20))
    with torch.no_grad():
        exact = model(images, tokens, tokens)
        for p in model.parameters():
            p.data = p.data if p.requires_grad else p.data.bfloat16()
        rough = model(images, tokens, tokens)
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.05)
