"""Small wrappers of models that let the compiler do what the model's interface forbids."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class LossOnly(nn.Module):
    """See ``loss_only``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss (a tensor) of ``model(*args, **kwargs)``; raises ValueError if the model computed none."""
        out = self.model(*args, **kwargs)
        loss = out["loss"] if isinstance(out, dict) else getattr(out, "loss", None)
        if loss is None and isinstance(out, (tuple, list)) and out:
            loss = out[0]
        if not isinstance(loss, torch.Tensor):
            raise ValueError("the model returned no loss: pass labels=..., or whatever makes it compute one")
        return loss


def loss_only(model: nn.Module) -> LossOnly:
    """A module that returns only the loss of a Hugging Face model (or of one that returns a tuple or dict with it).

    Training code mostly drops the logits that such a model returns with the loss. As long as they are a result they must
    be held in memory (2.1 GB for 8192 tokens and 128256 words, more for their gradient); without them the head and the
    loss run chunk by chunk (``passes/linear_cross_entropy.py``)::

        step = torch.compile(fusionc.loss_only(model), backend="fusionc")
        step(input_ids=ids, labels=ids).backward()

    Parameters, training mode and devices are those of ``model``, which is the wrapper's submodule ``model``.
    """
    return LossOnly(model)
