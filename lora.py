"""LoRA: low-rank adapters on frozen linear layers (Hu et al., 2022), the only change inside the two networks.

    y = W x + scale * B (A dropout(x))        W (out, in) frozen; A (rank, in) and B (out, rank) train
                                              scale = alpha / rank

A starts at random and B at zero, so a freshly adapted network computes exactly what it did before. The paper
(section 4.2) uses rank 8 on q and v of every attention layer. `python lora.py` counts what trains.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class LoRALinear(nn.Module):
    """An nn.Linear with a trainable low-rank update beside it. x (..., in) -> (..., out), in x's dtype."""

    def __init__(self, base, rank=8, alpha=16, dropout=0.05):
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        self.dropout = dropout
        # fp32 whatever the base is: Adam's small steps would be lost in bf16
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear: within 1/sqrt(in)

    def forward(self, x):
        # cast and scale the two small matrices, never the activations
        A, B = self.lora_A.to(x.dtype), (self.scale * self.lora_B).to(x.dtype)
        return self.base(x) + F.linear(F.linear(F.dropout(x, self.dropout, self.training), A), B)


def add_lora(network, names, **lora_args):
    """Wraps a LoRALinear around each nn.Linear of these names ("q", "v"); model.adapt() freezes the rest."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if name in names and isinstance(child, nn.Linear):
                setattr(module, name, LoRALinear(child, **lora_args))


def trainable_state(model):
    """{name: tensor} of what trains. A checkpoint needs no more, since the rest is the published weights."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load_trainable_state(model, state):
    """Loads what trainable_state() returned for a model built the same way. An error says what differs."""
    if different := trainable_state(model).keys() ^ state.keys():
        raise ValueError(f"{len(different)} trained tensors are only on one side, e.g. {min(different)}")
    model.load_state_dict(state, strict=False)  # what does not train is not in it


if __name__ == "__main__":
    layer, x = nn.Linear(4096, 4096, bias=False), torch.ones(1, 4096)  # q_proj of Llama-3.1-8B
    adapted = LoRALinear(layer)
    trained, total = adapted.lora_A.numel() + adapted.lora_B.numel(), layer.weight.numel()
    print(f"rank 8 beside 4096 x 4096: {trained:,} parameters train, {trained / total:.2%} of {total:,}")
    print(f"B = 0: the output is {'the same' if torch.equal(adapted(x), layer(x)) else 'different'}")
