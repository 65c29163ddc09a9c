"""CapeLLM: DINOv2 sees, a linear layer translates, LLaMA-3.1 reads and answers (paper, section 3.1).

    photo --> ViT --> projection --+
                                   v
    embedding of BOS, [ 256 image tokens ], embeddings of "\\n", question, answer --> Llama --> next tokens

Here are the two networks joined, the loss that trains them, and the textbook's way to generate an answer.
decode.py answers faster. Letters: B conversations, P photos (here always crops, of an object each), N image
tokens, T tokens of text, D width of the LLM, R tokens that are to be learned.
"""

import torch
import torch.nn.functional as F
from torch import nn

from chat import IGNORE, Chat
from common import reading
from llama import Cache, Llama
from lora import add_lora, load_trainable_state
from vit import ViT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class CapeLLM(nn.Module):
    def __init__(self, vit, llama):
        super().__init__()
        self.vit = vit
        self.llama = llama
        # starts at random, trains, and stays in fp32
        self.projection = nn.Linear(vit.config.hidden_size, llama.config.hidden_size)

    def see(self, images):
        """Normalised photos (P, 3, h, w) -> image tokens (P, N, D) (equations 1 and 2)."""
        features = self.vit(images.to(self.vit.pos_embed.dtype))  # (P, N, width of the ViT)
        dtype = self.llama.norm.weight.dtype
        return F.linear(features.to(dtype), self.projection.weight.to(dtype), self.projection.bias.to(dtype))

    def embed(self, images, tokens):
        """Photos, texts (B, T) -> the LLM's input (B, N + T, D): BOS, photo, rest of text (equation 3)."""
        text = self.llama.embed_tokens(tokens)
        return torch.cat((text[:, :1], self.see(images), text[:, 1:]), dim=1)

    def forward(self, images, tokens, labels, photo_of=None):
        """The training loss: averaged over the labels of each conversation, then over conversations.

        images (P, 3, h, w), normalised. tokens (B, T): BOS, "\\n", a conversation, padding. labels (B, T):
        the token itself where it is to be learned, else IGNORE; best left on the CPU, so that finding these
        places does not wait for the GPU. photo_of (B,): the photo of each conversation; None if P = B.

        Token i > 0 is at position N + i, and read off the hidden state one position before. With N = 256:

            position   0     1 ... 256   257    258     259    260
            input      BOS   the photo   "\\n"   User    :      where
            token i    0                 1      2       3      4
            read from                    256    257     258    259
        """
        if photo_of is None:
            hidden = self.llama(self.embed(images, tokens))[:, -tokens.shape[1]:-1]  # (B, T - 1, D) (eq. 4)
        else:
            hidden = self.read_after_photos(images, tokens, photo_of)[:, :-1]
        # Nine positions in ten are photo and questions, and each row of logits is a product with the whole
        # vocabulary. So logits are made only where there is something to learn.
        rows, columns = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)  # (R,) each
        targets, counts = labels[:, 1:][rows, columns], rows.bincount(minlength=len(labels))  # (R,), (B,)
        weights = 1 / (counts[rows] * (counts > 0).sum())  # (R,), a mean of means
        rows, columns, targets, weights = (
            t.to(hidden.device, non_blocking=True) for t in (rows, columns, targets, weights))
        return (self.losses(hidden[rows, columns], targets) * weights).sum()

    def losses(self, hidden, targets):
        """Hidden states (R, D) and the tokens to be read off them (R,) -> their losses (R,) (equation 5)."""
        logits = self.llama.lm_head(hidden).float()  # (R, vocabulary)
        return F.cross_entropy(logits, targets, reduction="none")

    def read_after_photos(self, images, tokens, photo_of):
        """Reads P photos once each, and B conversations as rows that share their keys and values.

        -> hidden states (B, T, D) of the last image token and of all tokens but BOS. decode.py asks its
        questions likewise; here gradients flow through what is shared. See llama.Cache for a picture.
        """
        photos = Cache()
        bos = tokens[:1, :1].expand(len(images), 1)
        seen = self.llama(self.embed(images, bos), photos)  # (P, 1 + N, D)
        hidden = self.llama(self.llama.embed_tokens(tokens[:, 1:]), photos.fork(photo_of))  # (B, T - 1, D)
        return torch.cat((seen[photo_of, -1:], hidden), dim=1)

    @torch.no_grad()
    def generate(self, image, tokens, end, max_tokens):
        """Greedy decoding as in a textbook: for each token, the photo and all text so far are read anew.

        image (1, 3, h, w); tokens: a list, BOS, "\\n" and a question -> the list of tokens that follow, up to
        the token `end` or max_tokens of them.
        """
        answer = []
        while len(answer) < max_tokens and end not in answer:
            x = self.embed(image, torch.tensor([tokens + answer], device=image.device))
            logits = self.llama.lm_head(self.llama(x)[:, -1])  # (1, vocabulary)
            answer.append(logits.argmax().item())
        return answer


# ---------------------------------------------------------------------------------- networks from arguments


def adapt(network, tune, names):
    """Decides what of a network trains: "frozen", "lora" on the layers of these names, or "full"."""
    network.requires_grad_(tune == "full")
    if tune == "lora":
        add_lora(network, names)


def load_network(args, device="cpu", dtype=None):
    """A network of published weights with fresh adapters, and the Chat that belongs to it.

    args: train.py's arguments of group "network", and its seed. dtype: of frozen weights and of computing,
    "fp32" or "bf16"; by default bf16 on CUDA, fp32 elsewhere. What trains is fp32 and requires grad.
    InputError names the file that cannot be used.
    """
    torch.manual_seed(args.seed)  # adapters and projection start the same in all processes
    dtype = DTYPES[dtype or ("bf16" if torch.device(device).type == "cuda" else "fp32")]
    from paper import choose_parts  # other parts, which the paper's tables compare with these
    Encoder, Network, chat = choose_parts(args, ViT, CapeLLM, Chat)
    with reading(args.vit):
        vit_dtype = torch.float32 if args.tune_vit == "full" else dtype
        vit = Encoder.load(args.vit, args.image_size, vit_dtype, device)
    with reading(args.llm):
        llama = Llama.load(args.llm, torch.float32 if args.tune_llm == "full" else dtype, device)
    adapt(vit, args.tune_vit, ("q", "v"))
    adapt(llama, args.tune_llm, ("q_proj", "v_proj"))
    return Network(vit, llama).to(device), chat


def read_checkpoint(path):
    """-> what train.py saved, a dictionary. It may be a stranger's file: torch runs nothing of it."""
    with reading(path, "is it a checkpoint of train.py?"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for key in "args", "descriptions", "model", "optimizer", "step":
            checkpoint[key]  # KeyError if it is something else
        return checkpoint


def load_weights(model, checkpoint, path):
    """Fills in the trained weights of what read_checkpoint() gave."""
    with reading(path, "was it trained with these --llm and --vit?"):
        load_trainable_state(model, checkpoint["model"])
