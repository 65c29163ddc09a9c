"""CapeLLM: DINOv2 sees, a linear layer translates, LLaMA-3.1 reads the question and answers with coordinates (paper, section 3).

    photo ----> ViT ----> projection ----+
                                         v
    BOS embedding, [ 256 image tokens ], embeddings of "\\n", question, answer ... ----> Llama ----> next token at each position

forward() is the training loss; locate() answers questions. Letters: P photos, R rows (a conversation each), B conversations,
T tokens of text, N image tokens, D width of the LLM.
"""

from itertools import zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from hiera import Hiera
from llama import Llama, read_json
from lora import add_lora
from vit import ViT


class CapeLLM(nn.Module):
    def __init__(self, vit, llama, answers="text"):
        super().__init__()
        D = llama.config.hidden_size
        self.vit = vit
        self.llama = llama
        self.projection = nn.Linear(vit.config.hidden_size, D)  # trained from scratch, kept in fp32
        self.decoder = None
        if answers == "token":  # <KEYPOINT> joins the vocabulary, input embeddings train, and a place is read off the LLM's last layer
            words = llama.embed_tokens.weight.float()
            llama.embed_tokens = nn.Embedding.from_pretrained(torch.cat((words, words.mean(0, keepdim=True))), freeze=False)
            self.decoder = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, 2), nn.Sigmoid())

    @classmethod
    def load(cls, vit_directory, llm_directory, image_size=224, tune_vit="lora", tune_llm="lora", answers="text", device="cpu"):
        """Published weights with fresh adapters. tune_*: "frozen", "lora" (the paper) or "full"; only what is tuned requires grad.
        answers: "text", or "token" for Table 8's <KEYPOINT>.

        Frozen weights are bf16 on a GPU and fp32 elsewhere; what trains is always fp32.
        """
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        Encoder = Hiera if read_json(Path(vit_directory, "config.json"), dict).get("model_type") == "hiera" else ViT
        vit = Encoder.load(vit_directory, image_size, torch.float32 if tune_vit == "full" else dtype, device)
        llama = Llama.load(llm_directory, torch.float32 if tune_llm == "full" else dtype, device)
        for network, tune, names in (vit, tune_vit, ("q", "v")), (llama, tune_llm, ("q_proj", "v_proj")):
            network.requires_grad_(tune == "full")
            if tune == "lora":
                add_lora(network, names)
        return cls(vit, llama, answers).to(device)

    def see(self, images):
        """Normalised photos (P, 3, h, w) -> image tokens (P, N, D) (equation 2)."""
        features = self.vit(images.to(self.vit.pos_embed.dtype))
        dtype = self.llama.norm.weight.dtype
        return F.linear(features.to(dtype), self.projection.weight.to(dtype), self.projection.bias.to(dtype))

    def forward(self, images, tokens, labels, groups=None):
        """The training loss: cross-entropy, averaged over the labels of a conversation and then over conversations.

        images (B, 3, h, w) normalised; tokens (B, T) with BOS first, padded on the right; labels (B, T), negative where a token
        is not to be learned. A row may pack several conversations about its photo: groups (B, T) then says to which each token
        belongs, 0 being what all share (BOS and "\n"); each sees the photo and itself, as if it were alone. The label of a
        <KEYPOINT> is its place, see Chat.conversation(), and its loss the distance to it along x and y, in sides of the crop.
        """
        image = self.see(images)
        text = self.llama.embed_tokens(tokens)
        x = torch.cat((text[:, :1], image, text[:, 1:]), dim=1)  # (B, N + T, D)
        mask = positions = None  # causal attention over 0, 1, 2, ...
        if groups is not None:
            g = F.pad(groups, (image.shape[1], 0))  # BOS and photo are group 0
            mask = ((g[:, None] == g[:, :, None]) | (g[:, None] == 0)).tril()  # (B, N + T, N + T)
            positions, mask = mask.sum(-1) - 1, mask[:, None]  # a token's position is the number of tokens it sees before it
        hidden, _ = self.llama(x, positions, mask)
        N, learned = image.shape[1], labels[:, 1:] >= 0
        losses = self.losses(hidden[:, N:-1][learned], hidden[:, N + 1:][learned], labels[:, 1:][learned])
        conversation = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(learned)
        if groups is not None:
            conversation = conversation * (groups.max() + 1) + groups[:, 1:]
        n_labels = conversation[learned].bincount()
        return (losses / n_labels[conversation[learned]]).sum() / (n_labels > 0).sum()

    def losses(self, before, at, labels):
        """Of each labelled token, given the hidden states (n, D) at the position before it, which predicts it, and at its own: (n,).

        Logits are made only here, where there is something to learn: one position costs a product with the whole vocabulary, and
        nine positions in ten are questions and photo.
        """
        if self.decoder is None:
            return F.cross_entropy(self.llama.lm_head(before).float(), labels, reduction="none")
        places = labels >= (V := self.llama.config.vocab_size)  # see Chat.conversation()
        losses = torch.zeros(len(labels), device=labels.device)
        losses[~places] = F.cross_entropy(self.llama.lm_head(before[~places]).float(), labels[~places], reduction="none")
        code = labels[places] - V
        xy = torch.stack((code // 1000, code % 1000), dim=-1) / 1000
        losses[places] = (self.decoder(at[places].float()) - xy).abs().mean(-1)
        return losses

    @torch.no_grad()
    def locate(self, images, questions, chat, constrained=False, cumulative=False):
        """Asks each photo its questions. images (P, 3, h, w) normalised; questions: for each photo a list of token lists.

        -> for each photo a list of (ids, spread), one per question: the tokens that greedy decoding gives, up to the last digit
        of y, and for each digit token among them the distribution over chat.place.digits that it was chosen from. With <KEYPOINT>
        it is that token and the end, and (x, y).

        Greedy decoding one token at a time would take a dozen passes, yet most tokens of an answer, " [0." and ",0.", are known
        beforehand. They are fed along as a draft, and the logits of that same pass tell whether the model would have said so.
        Where it would not, its own token is taken, the rest of the draft is struck from the cache, and the row goes on token by
        token: the result is greedy decoding's by construction. With a tokenizer that has all three-digit numbers it takes three
        passes: photo, question -> x, ",0." -> y. `constrained` accepts every draft and chooses among digits only, so that no
        answer is malformed. `cumulative` asks the questions of a photo one after another in one conversation, each after the
        model's own answers to those before, in place of all at once.
        """
        rows = self.read_photos(images, chat)
        unread = [[] for _ in images]  # of each row, what the model has said but not read: its last token, the end of its answer
        if chat.opening:  # what is in the photo?
            unread = [chat.words.unread(ids) for ids, _ in self.answer(rows, [chat.opening] * len(images), chat.words)]
        if cumulative:  # a row each photo, a turn each question
            photos, turns = range(len(images)), zip_longest(*questions, fillvalue=[])
        else:  # a row each question, all in one turn
            photos, turns = [p for p, asked in enumerate(questions) for _ in asked], [sum(questions, [])]
            rows.select(photos)
            unread = [unread[p] for p in photos]
        told = [[] for _ in images]
        for turn in turns:
            blocks = [rest + question if question else [] for rest, question in zip(unread, turn)]
            answers = self.answer(rows, blocks, chat.place, constrained) if self.decoder is None else self.point(rows, blocks, chat)
            for p, (ids, spread) in zip(photos, answers):
                if ids:
                    told[p].append((ids, spread))
            unread = [chat.place.unread(ids) if ids else [] for ids, _ in answers]
        return told

    def read_photos(self, images, chat):
        """BOS, image tokens and "\n", read once per photo, whatever is asked about it: one row each."""
        start = self.llama.embed_tokens(torch.tensor([[chat.bos, *chat.newline]], device=images.device)).expand(len(images), -1, -1)
        _, cache = self.llama(torch.cat((start[:, :1], self.see(images), start[:, 1:]), dim=1))
        return Rows(self.llama, cache)

    def point(self, rows, questions, chat):
        """Answers each row's question, if it has one, with <KEYPOINT>, and reads its place off the hidden state: [(ids, (x, y)), ...]."""
        blocks = [question and [*question, chat.keypoint] for question in questions]
        if not any(blocks):
            return [([], None) for _ in blocks]
        hidden = rows.extend(blocks)[range(len(blocks)), [len(block) - 1 for block in blocks]]  # (R, D)
        return [([chat.keypoint, chat.eos] if block else [], xy) for block, xy in zip(blocks, self.decoder(hidden.float()).tolist())]

    def answer(self, rows, questions, form, constrained=False):
        """Asks each row its question, if it has one: a list of (ids, spread), see locate()."""
        answers, spreads = [[] for _ in questions], [[] for _ in questions]
        drafts = [form.draft([]) if question else [] for question in questions]
        blocks = [question + draft for question, draft in zip(questions, drafts)]
        while any(blocks):
            hidden = rows.extend(blocks)  # (R, T, D)
            # a block that ends in a draft of n tokens yields n + 1 predictions of use: n that check it and a new one
            places = [(r, t) for r, block in enumerate(blocks) if block for t in range(len(block) - len(drafts[r]) - 1, len(block))]
            logits = self.llama.lm_head(hidden[tuple(zip(*places))]).float()  # (places, vocabulary)
            predictions = iter(zip(logits.argmax(-1).tolist(), logits[:, form.digits].softmax(-1).cpu().numpy()))
            struck = [0] * len(blocks)
            for r, block in enumerate(blocks):
                going = bool(block)
                for expected in [*drafts[r], None] if block else []:
                    token, p = next(predictions)
                    if not going:  # this token of the draft came after one that was wrong
                        struck[r] += 1
                        continue
                    if constrained:
                        token = form.digits[p.argmax()] if expected is None else expected
                    if form.template[len(answers[r])] is None:
                        spreads[r].append(p)
                    answers[r].append(token)
                    going = token == expected
            rows.forget(struck)
            done = [not a or a[-1] == form.closing[-1] or len(a) == len(form.template) for a in answers]
            drafts = [[] if end else form.draft(answer) for end, answer in zip(done, answers)]
            blocks = [[] if end else [answer[-1], *draft] for end, answer, draft in zip(done, answers, drafts)]
        return list(zip(answers, spreads))


class Rows:
    """Conversations under way, one a row: the cached keys and values, and which of the cache's slots count."""

    def __init__(self, llama, cache):
        """cache: what llama() returned for the beginning of all rows, without padding."""
        self.llama, self.cache = llama, cache
        R, _, S, _ = cache[0][0].shape
        self.real = torch.ones(R, S, dtype=torch.bool, device=cache[0][0].device)

    def select(self, rows):
        """Goes on with these rows; one that is named several times goes several ways from here."""
        rows = torch.tensor(rows, dtype=torch.long, device=self.real.device)
        self.cache = [(k[rows], v[rows]) for k, v in self.cache]  # each (R, heads, S, d)
        self.real = self.real[rows]

    def extend(self, blocks):
        """Reads one more block of tokens in each row: a list of R token lists of any length -> hidden states (R, T, D)."""
        T, device = max(map(len, blocks)), self.real.device
        tokens = torch.tensor([b + [0] * (T - len(b)) for b in blocks], device=device)
        new = torch.arange(T, device=device) < torch.tensor([len(b) for b in blocks], device=device)[:, None]  # (R, T), not padding
        positions = self.real.sum(1, keepdim=True) + torch.arange(T, device=device)  # padding and struck tokens take no place
        past = self.real[:, None].expand(-1, T, -1)  # all that came before, and of the block what is not later: (R, T, S)
        mask = torch.cat((past, new[:, None] & new.new_ones(T, T).tril()), dim=2)[:, None]
        unpadded = new.flatten().nonzero()[:, 0] if min(map(len, blocks)) < T else None
        hidden, self.cache = self.llama(self.llama.embed_tokens(tokens), positions, mask, self.cache, unpadded)
        self.real = torch.cat((self.real, new), dim=1)
        return hidden

    def forget(self, counts):
        """Strikes the last counts[r] tokens of row r."""
        from_end = self.real.flip(1).cumsum(1).flip(1)  # 1 for the last token that counts, 2 for the one before, ...
        self.real &= from_end > torch.tensor(counts, device=self.real.device)[:, None]
