"""LoRA: low-rank adapters on frozen linear layers (Hu et al., 2022), the only change CapeLLM makes to its two networks.

    y = W x + scale * B (A dropout(x))        W (out, in) frozen, A (rank, in), B (out, rank), scale = alpha / rank

A starts at random and B at zero, so a freshly adapted network computes exactly what it did before. The paper (section 4.2)
uses rank 8 on the query and value projections of every attention layer.
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
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)  # cast the small matrices down, never the activations up
        update = F.linear(F.linear(F.dropout(x, self.dropout, self.training), A), B)
        return self.base(x) + self.scale * update


def add_lora(network, names, **lora_args):
    """Puts a LoRALinear around every nn.Linear of `network` whose own name is in `names`, e.g. ("q_proj", "v_proj")."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if name in names and isinstance(child, nn.Linear):
                setattr(module, name, LoRALinear(child, **lora_args))


def trainable_state(model):
    """{name: tensor} of the parameters that train: all a checkpoint needs, since the rest is the published weights."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trainable_state(model, state):
    """Copies what trainable_state() gave into a model built the same way. ValueError names what differs."""
    own = trainable_state(model)
    for problem, names in ("lacks", own.keys() - state.keys()), ("has unknown", state.keys() - own.keys()):
        if names:
            raise ValueError(f"the checkpoint {problem} {len(names)} trained tensors, e.g. {min(names)}")
    for name, parameter in own.items():
        if parameter.shape != state[name].shape:
            raise ValueError(f"{name} is {tuple(state[name].shape)} in the checkpoint, {tuple(parameter.shape)} here")
    for name, parameter in own.items():
        parameter.copy_(state[name])
