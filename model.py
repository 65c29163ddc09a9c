"""CapeLLM: DINOv2 sees, a linear layer translates, LLaMA-3.1 reads and answers (paper, section 3.1).

    photo --> ViT --> projection --+
                                   v
    embedding of BOS, [ 256 image tokens ], embeddings of "\\n", question, answer --> Llama --> next tokens

Here are the two networks joined, and the loss that trains them. Answering questions is decode.py's.
Letters: B rows, N image tokens, T tokens of text, D width of the LLM. `python model.py` shows shapes and a
loss.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from chat import IGNORE, Category, Chat, Scene
from common import read_json
from hiera import Hiera
from llama import Llama
from lora import add_lora
from vit import ViT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class CapeLLM(nn.Module):
    """answers: "text", or "token" for Table 8's <KEYPOINT>, off whose hidden state the point is read."""

    def __init__(self, vit, llama, answers="text"):
        super().__init__()
        D = llama.config.hidden_size
        self.vit = vit
        self.llama = llama
        self.projection = nn.Linear(vit.config.hidden_size, D)  # starts at random, trains, and stays in fp32
        self.keypoint_head = None
        if answers == "token":  # the vocabulary grows by one, and all input embeddings train
            words = llama.embed_tokens.weight.float()
            words = torch.cat((words, words.mean(0, keepdim=True)))
            llama.embed_tokens = nn.Embedding.from_pretrained(words, freeze=False)
            self.keypoint_head = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, 2), nn.Sigmoid())

    @classmethod
    def load(cls, vit_directory, llm_directory, image_size=224, tune_vit="lora", tune_llm="lora",
             answers="text", device="cpu", dtype=None):
        """Published weights with fresh adapters. tune_*: "frozen", "lora" (the paper) or "full".

        dtype: of frozen weights and of computing, "fp32" or "bf16"; by default bf16 on CUDA, fp32 elsewhere.
        What trains is fp32 and requires grad.
        """
        dtype = DTYPES[dtype or ("bf16" if torch.device(device).type == "cuda" else "fp32")]
        kind = read_json(Path(vit_directory, "config.json"), dict).get("model_type")
        Encoder = Hiera if kind == "hiera" else ViT
        vit = Encoder.load(vit_directory, image_size, torch.float32 if tune_vit == "full" else dtype, device)
        llama = Llama.load(llm_directory, torch.float32 if tune_llm == "full" else dtype, device)
        adapt(vit, tune_vit, ("q", "v"))
        adapt(llama, tune_llm, ("q_proj", "v_proj"))
        return cls(vit, llama, answers).to(device)

    def see(self, images):
        """Normalised photos (B, 3, h, w) -> image tokens (B, N, D) (equations 1 and 2)."""
        features = self.vit(images.to(self.vit.pos_embed.dtype))  # (B, N, width of the ViT)
        dtype = self.llama.norm.weight.dtype
        return F.linear(features.to(dtype), self.projection.weight.to(dtype), self.projection.bias.to(dtype))

    def forward(self, images, tokens, labels, points=None, conversation=None):
        """The training loss: averaged over the labels of each conversation, then over conversations.

        images (B, 3, h, w), normalised. tokens (B, T): BOS, "\\n", a conversation, padding. labels (B, T):
        the token itself where it is to be learned, else IGNORE. points (n, 2): where the n <KEYPOINT>s among
        the tokens are, row by row; None if answers are text. conversation (B, T): if a row packs several
        conversations about its photo, the number of the one that a token belongs to; 0 for BOS and "\\n".

        The image tokens go between BOS and the rest, so token i > 0 is at position N + i. A token is read off
        the hidden state one position before, which predicts it; a point off that of its <KEYPOINT>. With
        N = 256:

            position   0     1 ... 256   257    258     259    260
            input      BOS   the photo   "\\n"   User    :      where
            token i    0                 1      2       3      4
            read from                    256    257     258    259
        """
        image, text = self.see(images), self.llama.embed_tokens(tokens)  # (B, N, D), (B, T, D)
        x = torch.cat((text[:, :1], image, text[:, 1:]), dim=1)  # (B, N + T, D) (equation 3)
        N = image.shape[1]
        positions, mask = (None, None) if conversation is None else separate(conversation, N)

        # Hidden states and logits are made only where they are read: nine positions in ten are photo and
        # questions, and each row of logits is a product with the whole vocabulary.
        learned, pointed = labels[:, 1:] != IGNORE, tokens[:, 1:] == self.llama.config.vocab_size  # (B, T-1)
        before, at = F.pad(learned, (N, 1)), F.pad(pointed, (N + 1, 0))  # the position before, or its own
        wanted = before | at  # (B, N + T)
        hidden = self.llama(x, positions, mask, wanted=wanted)  # (wanted positions, D) (equation 4)
        logits = self.llama.lm_head(hidden[before[wanted]]).float()  # (labels, vocabulary) (equation 5)
        losses = F.cross_entropy(logits, labels[:, 1:][learned], reduction="none")

        # which conversation, of all in the batch, each token belongs to
        owner = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)  # (B, T)
        if conversation is not None:
            owner = owner * (conversation.max() + 1) + conversation
        owners = owner[:, 1:][learned]
        if points is not None:  # the loss of a <KEYPOINT> is its distance along x and along y, averaged
            distances = (self.keypoint_head(hidden[at[wanted]].float()) - points).abs().mean(-1)
            losses, owners = torch.cat((losses, distances)), torch.cat((owners, owner[:, 1:][pointed]))
        return average(losses, owners)


def adapt(network, tune, names):
    """Decides what of a network trains: "frozen", "lora" on the layers of these names, or "full"."""
    network.requires_grad_(tune == "full")
    if tune == "lora":
        add_lora(network, names)


def average(losses, owners):
    """Averages losses over each conversation, then over conversations. owners: whose loss it is, a number."""
    counts = owners.bincount()
    return (losses / counts[owners]).sum() / (counts > 0).sum()


def separate(conversation, N):
    """Lets packed conversations see the photo and themselves, as if each were alone -> positions and mask.

    conversation (B, T) as in CapeLLM.forward(). Positions (B, N + T) count the tokens seen before; the mask
    (B, 1, N + T, N + T) for two image tokens p and conversations a and b of two tokens each:

               BOS p p \\n a a b b
        BOS     x  . . .  . . . .
        p       x  x . .  . . . .
        p       x  x x .  . . . .
        \\n      x  x x x  . . . .
        a       x  x x x  x . . .      position 4
        a       x  x x x  x x . .               5
        b       x  x x x  . . x .               4 again
        b       x  x x x  . . x x               5
    """
    c = F.pad(conversation, (N, 0))  # BOS and photo are 0, what all share: (B, N + T)
    mask = ((c[:, None] == c[:, :, None]) | (c[:, None] == 0)).tril()
    return mask.sum(-1) - 1, mask[:, None]


if __name__ == "__main__":
    toy = Path(__file__).parent / "assets/toy"
    torch.manual_seed(0)
    model, chat = CapeLLM.load(toy / "vit", toy / "llm", image_size=112), Chat(toy / "llm")
    foot = ("first leg foot", "the far end of the leg that is blue")
    tokens, labels, _ = chat.conversation(Scene(Category("creature", [foot]), [(foot, (0.25, 0.875))]))
    tokens = torch.tensor([[chat.bos, *chat.newline, *tokens]])
    labels = torch.tensor([[IGNORE] * (1 + len(chat.newline)) + labels])
    image = torch.rand(1, 3, 112, 112)
    print(f"photo {tuple(image.shape)} -> image tokens {tuple(model.see(image).shape)}")
    print(f"tokens {tuple(tokens.shape)}, of which {(labels != IGNORE).sum()} are learned")
    loss = model(image, tokens, labels)
    print(f"loss {loss:.3f}: the LLM knows how answers are written; the new projection shows it nothing yet")
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    print(f"gradients for {sum(p.numel() for p in trained):,} "
          f"of {sum(p.numel() for p in model.parameters()):,} parameters")
