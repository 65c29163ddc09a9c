"""The assembled network against the authors' numbers, and locate() against decoding one token at a time."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from chat import Chat, Form
from model import CapeLLM, Rows


@pytest.fixture(scope="module")
def authors(shared):
    """(the authors' tiny network as ours, their inputs and results)."""
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


def test_logits_loss_and_gradients_equal_the_published_code(authors):
    model, expected = authors
    image, text = model.see(expected["images"]), model.llama.embed_tokens(expected["tokens"])
    torch.testing.assert_close(image, expected["image_tokens"], atol=1e-5, rtol=0)
    hidden, _ = model.llama(torch.cat((text[:, :1], image, text[:, 1:]), dim=1))
    logits = model.llama.lm_head(hidden)
    torch.testing.assert_close(logits[:, 257:], expected["logits_text"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[:, [0, 64, 128, 192, 256]], expected["logits_image"], atol=1e-5, rtol=0)

    model.zero_grad()
    loss = model(expected["images"], expected["tokens"], expected["labels"])
    loss.backward()
    torch.testing.assert_close(loss, expected["loss"][0], atol=1e-5, rtol=0)
    grads = [name for name in expected if name.startswith("grad.")]
    assert len(grads) == len(trained(model)) == 26
    for name, p in trained(model).items():
        theirs = expected["grad." + their_name(name)]
        assert (p.grad - theirs).norm() <= 1e-4 * theirs.norm(), name


def test_greedy_tokens_equal_the_published_code(authors):
    model, expected = authors
    prompt = expected["greedy_prompt"]
    with torch.no_grad():
        image, text = model.see(expected["images"]), model.llama.embed_tokens(prompt)
        _, cache = model.llama(torch.cat((text[:, :1], image), dim=1))
        rows = Rows(model.llama, cache)
        blocks, said = prompt[:, 1:].tolist(), []
        for _ in range(13):
            said.append(model.llama.lm_head(rows.extend(blocks)[:, -1]).argmax(-1))
            blocks = said[-1][:, None].tolist()
    assert torch.equal(torch.stack(said, dim=1), expected["greedy_new"])


def test_padding_and_batching_change_nothing(authors):
    """A conversation's loss is the same alone and padded beside a longer one with other labels."""
    model, expected = authors
    images, tokens, labels = expected["images"], expected["tokens"].clone(), expected["labels"].clone()
    labels[1, 25:] = -100  # now the second row is shorter and has fewer labels
    tokens[1, 25:] = 0
    with torch.no_grad():
        both = model(images, tokens, labels)
        alone = [model(images[:1], tokens[:1], labels[:1]), model(images[1:], tokens[1:, :25], labels[1:, :25])]
    torch.testing.assert_close(both, sum(alone) / 2, atol=1e-6, rtol=0)


def test_packed_conversations_have_the_loss_and_gradients_of_separate_ones(authors):
    model, expected = authors
    image, tokens, labels = expected["images"][:1], expected["tokens"][:1], expected["labels"][:1]
    first, second = [(tokens[:, a:b], labels[:, a:b]) for a, b in ((2, 30), (30, 41))]  # 8 and 7 labels
    shared = tokens[:, :2], labels[:, :2]

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return loss.item(), [p.grad.clone() for p in trained(model).values()]

    apart = [model(image, torch.cat((shared[0], t), 1), torch.cat((shared[1], y), 1)) for t, y in (first, second)]
    apart_loss, apart_grads = gradients(sum(apart) / 2)
    groups = torch.tensor([[0, 0, *[1] * 28, *[2] * 11, *[0] * 3]])  # and padding
    packed = [F.pad(torch.cat(parts, 1), (0, 3), value=v) for parts, v in zip(zip(shared, first, second), (0, -100))]
    packed_loss, packed_grads = gradients(model(image, *packed, groups))
    assert packed_loss == pytest.approx(apart_loss, abs=1e-6)
    for a, b in zip(apart_grads, packed_grads):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


def test_checkpointing_activations_changes_no_gradient(authors):
    model, expected = authors
    grads = []
    for model.llama.checkpoint_activations in (False, True, False):
        model.zero_grad()
        model(expected["images"], expected["tokens"], expected["labels"]).backward()
        grads.append([p.grad.clone() for p in trained(model).values()])
    for plain, checkpointed, _ in zip(*grads):
        torch.testing.assert_close(plain, checkpointed)


# ------------------------------------------------------------------------------------------------------------ locate()


class TinyChat(Chat):
    """A Chat over the 512 made-up tokens of the authors' toy network, with `numbers` tokens a coordinate."""

    def __init__(self, numbers):
        self.bos, self.eos, self.newline, self.opening, self.words = 1, 2, [3], [], Form([None] * 5, [], [2])
        self.place = Form([10, 11, *[None] * numbers, 12, 11, *[None] * numbers], list(range(100, 400)), [13, 2])

    def learn(self, answer):
        """Makes the known tokens of all answers those of this one."""
        self.place.template[:] = [known and token for known, token in zip(self.place.template, answer)]


def last_state(model, image, ids):
    """The hidden state after BOS, a photo and more tokens, the whole sequence read at once."""
    text = model.llama.embed_tokens(torch.tensor(ids))
    return model.llama(torch.cat((text[:1], image, text[1:]))[None])[0][0, -1]


def say(model, image, ids, form):
    """Greedy decoding in the plain way: the whole sequence is read again for each new token."""
    answer = []
    while len(answer) < len(form.template) and answer[-1:] != form.closing[-1:]:
        answer.append(model.llama.lm_head(last_state(model, image, ids + answer)).argmax().item())
    return answer


def one_by_one(model, images, questions, chat):
    """Each question alone."""
    return [say(model, image, [chat.bos, *chat.newline, *question], chat.place)
            for image, asked in zip(model.see(images), questions) for question in asked]


def made_up(shared, counts):
    """An untrained network, photos of 4 x 4 patches, and counts[p] questions of unequal lengths about photo p."""
    folder = shared / "parity" / "llama31"
    torch.manual_seed(0)
    model = CapeLLM.load(folder / "vit", folder / "llm", image_size=56).eval()
    lengths = iter(torch.randint(1, 12, (sum(counts),)).tolist())
    questions = [[torch.randint(3, 512, (next(lengths),)).tolist() for _ in range(n)] for n in counts]
    return model, torch.randn(len(counts), 3, 56, 56), questions


@pytest.mark.parametrize("numbers", [1, 3])
@pytest.mark.parametrize("counts", [[1], [3, 0, 5], [2, 1, 4, 1, 1, 3, 2, 2], [70]])
@torch.no_grad()
def test_locate_gives_the_tokens_of_plain_greedy_decoding(shared, numbers, counts):
    model, images, questions = made_up(shared, counts)
    chat = TinyChat(numbers)
    expected = one_by_one(model, images, questions, chat)
    assert all(chat.place.template[0] != answer[0] for answer in expected)  # an untrained network follows no template
    for learned in [None, *expected[:3]]:  # then one that one of the rows follows to the end, and others in part
        if learned:
            chat.learn(learned)
        told = model.locate(images, questions, chat)
        assert [len(answers) for answers in told] == counts
        assert [ids for answers in told for ids, _ in answers] == expected


@pytest.mark.parametrize("numbers, passes", [(1, 3), (3, 7)])
@torch.no_grad()
def test_answers_on_the_template_take_one_pass_a_digit_and_few_logits(shared, numbers, passes):
    model, images, questions = made_up(shared, [4, 3])
    chat = TinyChat(numbers)
    seen, looked = [], []
    model.llama.norm.register_forward_hook(lambda *_: seen.append(1))
    model.llama.lm_head.register_forward_hook(lambda _, args, __: looked.append(len(args[0])))
    model.locate(images, questions, chat, constrained=True)
    assert len(seen) == passes  # the photos, then one a digit of x and y
    assert sum(looked) == 7 * len(chat.place.template)  # each token of an answer predicted once, and nothing else


@torch.no_grad()
def test_constrained_answers_follow_the_template_and_choose_digits(shared):
    model, images, questions = made_up(shared, [2, 3])
    chat = TinyChat(3)
    for ids, spread in sum(model.locate(images, questions, chat, constrained=True), []):
        assert all(token == known if known else token in chat.place.digits for known, token in zip(chat.place.template, ids))
        assert len(ids) == len(chat.place.template) and len(spread) == 6


@torch.no_grad()
def test_spread_is_the_distribution_over_the_digits(shared):
    model, images, questions = made_up(shared, [1])
    chat = TinyChat(1)
    [[(ids, spread)]] = model.locate(images, questions, chat, constrained=True)
    text, by_hand = [chat.bos, *chat.newline, *questions[0][0]], []
    for known, token in zip(chat.place.template, ids):
        embedded = model.llama.embed_tokens(torch.tensor(text))
        hidden, _ = model.llama(torch.cat((embedded[:1], model.see(images)[0], embedded[1:]))[None])
        if known is None:
            scores = model.llama.lm_head(hidden[0, -1])[chat.place.digits].exp()
            by_hand.append(scores / scores.sum())
            assert token == chat.place.digits[scores.argmax()]
        text.append(token)
    torch.testing.assert_close(torch.tensor(np.array(spread)), torch.stack(by_hand), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("numbers", [1, 3])
@torch.no_grad()
def test_cumulative_questions_follow_the_models_own_answers(shared, numbers):
    model, images, questions = made_up(shared, [3, 0, 5])
    chat = TinyChat(numbers)
    for learned in [None, *one_by_one(model, images, questions, chat)[:2]]:
        if learned:
            chat.learn(learned)
        told = model.locate(images, questions, chat, cumulative=True)
        for image, asked, answers in zip(model.see(images), questions, told, strict=True):
            ids = [chat.bos, *chat.newline]
            for question, (answer, _) in zip(asked, answers, strict=True):
                assert answer == say(model, image, ids + question, chat.place)
                ids += question + answer + (chat.place.closing if answer[-1] != chat.eos else [])


@pytest.mark.parametrize("cumulative", [False, True])
@torch.no_grad()
def test_what_the_object_is_comes_first_in_the_models_own_words(shared, cumulative):
    """Table 7. Each question about a photo follows the same answer, once a photo; when cumulative the first alone does so directly."""
    model, images, questions = made_up(shared, [2, 3])
    chat = TinyChat(3)
    chat.opening = [20, 21, 22]
    passes = []
    model.llama.norm.register_forward_hook(lambda _, args, __: passes.append(args[0].shape[:2]))
    told = model.locate(images, questions, chat, cumulative=cumulative)
    assert passes[1] == (2, 3)  # the opening, a row each photo
    for image, asked, answers in zip(model.see(images), questions, told, strict=True):
        ids = [chat.bos, *chat.newline, *chat.opening]
        what = say(model, image, ids, chat.words)
        ids += what + [chat.eos] * (what[-1] != chat.eos)
        for question, (answer, _) in zip(asked, answers, strict=True):
            assert answer == say(model, image, ids + question, chat.place)
            if cumulative:
                ids += question + answer + (chat.place.closing if answer[-1] != chat.eos else [])


@torch.no_grad()
def test_what_the_object_is_is_said_freely_and_at_any_length(shared):
    """Answers in words of unequal lengths, one ended by the end token; `constrained` is of places alone."""
    model, images, questions = made_up(shared, [2, 3])
    chat = TinyChat(3)
    chat.opening = [20, 21, 22]
    for ids, _ in sum(model.locate(images, questions, chat, constrained=True), []):
        assert all(token == known if known else token in chat.place.digits for known, token in zip(chat.place.template, ids, strict=True))
    start = [chat.bos, *chat.newline, *chat.opening]
    first, second = (say(model, image, start, chat.words) for image in model.see(images))
    chat.eos = next(token for token in second if token not in first)  # the second answer is over here
    chat.words.closing[-1] = chat.place.closing[-1] = chat.eos
    whats = [say(model, image, start, chat.words) for image in model.see(images)]
    assert len(whats[1]) < len(whats[0]) == 5 and whats[1][-1] == chat.eos
    told = model.locate(images, questions, chat)
    for image, what, asked, answers in zip(model.see(images), whats, questions, told, strict=True):
        before = [*start, *what, *[chat.eos] * (what[-1] != chat.eos)]
        assert [ids for ids, _ in answers] == [say(model, image, before + question, chat.place) for question in asked]


@torch.no_grad()
def test_mlps_skip_the_padding(shared):
    model, images, questions = made_up(shared, [3, 2])
    read = []
    model.llama.layers[0].mlp.register_forward_hook(lambda _, args, __: read.append(args[0].shape[:-1].numel()))
    model.locate(images, questions, TinyChat(1), constrained=True)
    assert read == [2 * (1 + 16 + 1), sum(len(q) + 2 for asked in questions for q in asked), 5 * 3]  # 2 and 3: with the draft


# --------------------------------------------------------------------------------------------------------- <KEYPOINT>


@pytest.fixture
def pointing(shared):
    """A network that answers with <KEYPOINT>, token 512 of it, a Chat for it, two photos, and tokens without it."""
    folder = shared / "parity" / "llama31"
    torch.manual_seed(0)
    model, chat = CapeLLM.load(folder / "vit", folder / "llm", image_size=56, answers="token").eval(), TinyChat(3)
    chat.keypoint, chat.place = 512, Form([512], [], [2])
    return model, chat, torch.randn(2, 3, 56, 56), torch.randint(3, 512, (2, 20))


def test_keypoint_token_is_new_and_embeddings_and_decoder_train(pointing, shared):
    model, *_ = pointing
    folder = shared / "parity" / "llama31"
    usual = CapeLLM.load(folder / "vit", folder / "llm", image_size=56)
    decoder = {f"decoder.{layer}.{p}" for layer in (0, 2) for p in ("weight", "bias")}
    assert trained(model).keys() == trained(usual).keys() | decoder | {"llama.embed_tokens.weight"}
    new, old = model.llama.embed_tokens.weight, usual.llama.embed_tokens.weight
    assert torch.equal(new[:512], old) and torch.allclose(new[512], old.mean(0)) and len(new) == 513
    assert new.dtype == torch.float32 and torch.equal(model.llama.lm_head.weight, usual.llama.lm_head.weight)


def test_loss_of_a_keypoint_token_is_its_distance_and_of_words_the_usual(pointing):
    """Row 0: two places and two words; row 1: a word. By hand, from the hidden states of the whole sequence."""
    model, chat, images, tokens = pointing
    tokens[0, [7, 15]] = chat.keypoint
    labels = torch.full_like(tokens, -100)
    labels[0, [7, 15]] = 512 + torch.tensor([123_456, 0])
    labels[0, 3:5], labels[1, 19] = tokens[0, 3:5], tokens[1, 19]
    text, image = model.llama.embed_tokens(tokens), model.see(images)
    hidden, _ = model.llama(torch.cat((text[:, :1], image, text[:, 1:]), dim=1))
    n = image.shape[1]

    def word(b, t):
        return -model.llama.lm_head(hidden[b, n + t - 1]).log_softmax(-1)[tokens[b, t]]

    def distance(t, x, y):
        return (model.decoder(hidden[0, n + t]) - torch.tensor([x, y])).abs().mean()
    expected = ((word(0, 3) + word(0, 4) + distance(7, 0.123, 0.456) + distance(15, 0, 0)) / 4 + word(1, 19)) / 2
    loss = model(images, tokens, labels)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    loss.backward()
    assert model.llama.embed_tokens.weight.grad[512].any() and all(p.grad.any() for p in model.decoder.parameters())


@pytest.mark.parametrize("cumulative", [False, True])
@torch.no_grad()
def test_a_place_is_read_off_the_keypoint_token_behind_its_question(pointing, cumulative):
    model, chat, images, tokens = pointing
    questions = [[tokens[0, :4].tolist(), tokens[0, 4:13].tolist()], [tokens[1, :7].tolist()]]
    told = model.locate(images, questions, chat, cumulative=cumulative)
    for image, asked, answers in zip(model.see(images), questions, told, strict=True):
        ids = [chat.bos, *chat.newline]
        for question, (answer, xy) in zip(asked, answers, strict=True):
            place = model.decoder(last_state(model, image, [*ids, *question, 512]))
            torch.testing.assert_close(torch.tensor(xy), place, atol=1e-5, rtol=0)
            assert answer == [512, chat.eos] and 0 < min(xy) and max(xy) < 1
            ids += [*question, 512, chat.eos] if cumulative else []


def test_keypoint_token_with_frozen_weights_in_bf16(pointing):
    """As on a GPU, where what trains stays fp32."""
    model, chat, images, tokens = pointing
    tokens[:, 9] = chat.keypoint
    labels = torch.full_like(tokens, -100)
    labels[:, 9] = 512 + 250_750
    loss, [[(_, xy)], _] = model(images, tokens, labels), model.locate(images, [[tokens[0, :9].tolist()], []], chat)
    for p in model.parameters():
        p.data = p.data if p.requires_grad else p.data.bfloat16()
    rough, [[(_, near)], _] = model(images, tokens, labels), model.locate(images, [[tokens[0, :9].tolist()], []], chat)
    assert rough.dtype == torch.float32 and rough.item() == pytest.approx(loss.item(), rel=0.05) and near == pytest.approx(xy, rel=0.05)
