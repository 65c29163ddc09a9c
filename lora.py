"""LoRA: low-rank adapters on frozen linear layers (Hu et al., 2022), the only change inside the two networks.

    y = W x + scale * B (A dropout(x))        W (out, in) frozen; A (rank, in) and B (out, rank) train
                                              scale = alpha / rank

A starts at random and B at zero, so a freshly adapted network computes exactly what it did before. The paper
(section 4.2) uses rank 8 on the query and value projections of every attention layer. `python lora.py`
counts.
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
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        # cast the two small matrices down, never the activations up
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        update = F.linear(F.linear(F.dropout(x, self.dropout, self.training), A), B)
        return self.base(x) + self.scale * update


def add_lora(network, names, **lora_args):
    """Wraps a LoRALinear around each nn.Linear of `network` whose name is one of `names`, e.g. ("q", "v")."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if name in names and isinstance(child, nn.Linear):
                setattr(module, name, LoRALinear(child, **lora_args))


def trainable_state(model):
    """{name: tensor} of what trains. A checkpoint needs no more, since the rest is the published weights."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load_trainable_state(model, state):
    """Fills in what trainable_state() gave of a model built the same way. An error says what differs."""
    if different := trainable_state(model).keys() ^ state.keys():
        raise ValueError(f"{len(different)} trained tensors are only on one side, e.g. {min(different)}")
    model.load_state_dict(state, strict=False)  # what does not train is not in it


if __name__ == "__main__":
    torch.manual_seed(0)
    layer = nn.Linear(4096, 4096, bias=False)  # q_proj of Llama-3.1-8B
    adapted, x = LoRALinear(layer), torch.ones(1, 4096)
    trained, total = adapted.lora_A.numel() + adapted.lora_B.numel(), layer.weight.numel()
    print(f"rank 8 beside 4096 x 4096: {trained:,} parameters train, {trained / total:.2%} of {total:,}")
    print(f"B = 0: the output is {'the same' if torch.equal(adapted(x), layer(x)) else 'different'}")
    nn.init.ones_(adapted.lora_B)
    print(f"B = 1: it moves by scale * sum(A x) = {adapted.scale * adapted.lora_A.sum():.3f} "
          f"= {(adapted.eval()(x) - layer(x))[0, 0]:.3f}")
