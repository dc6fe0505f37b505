"""Weights to start training from where no checkpoint is loaded."""

from __future__ import annotations

from torch import nn

from pizero.model.norm import AdaRMSNorm


def initialise(model: nn.Module) -> None:
    """Normal weights of variance 1 / fan_in, biases at zero; token embeddings of unit length.

    Adaptive norms keep their zeros: closed gates.
    """
    closed = {m.dense for m in model.modules() if isinstance(m, AdaRMSNorm)}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module not in closed:
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=fan_in**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
