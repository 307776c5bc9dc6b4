"""What the arms of ``train_step.py`` must agree on before anything is timed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

LOSS_TOLERANCE = 1e-5
LOGP_TOLERANCE = 1e-5  # nat per response token
COSINE = 0.9999
NORM_TOLERANCE = 1e-3  # of the ratio of the gradients' lengths, which a cosine does not see


class FirstStep:
    """Loss, log-probs and gradient of an arm's first optimizer step."""

    def __init__(self) -> None:
        self.shared = False  # whether the arm reads a prompt once for both responses
        self._kept: dict[str, Tensor] = {}

    def keep_loss(self, loss: Tensor) -> None:
        """Keep the mean loss of the step."""
        self._kept["loss"] = loss.detach().double().cpu().reshape(1)

    def keep_logps(self, chosen: Tensor, rejected: Tensor) -> None:
        """Keep the log-probs of the responses, ``[B]`` each, nats; a later call replaces them."""
        self._kept["logps"] = torch.cat([chosen, rejected]).detach().double().cpu()

    def keep_gradient(self, model: nn.Module) -> None:
        """Keep the gradient of every trained parameter, as the optimizer is about to see it."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                self._kept[f"gradient/{name}"] = parameter.grad.float().cpu().clone()

    def write(self, path: Path) -> None:
        """Write everything that was kept."""
        tensors = {name: value.contiguous() for name, value in self._kept.items()}
        save_file(tensors, path, metadata={"shared": str(self.shared)})


def is_shared(path: Path) -> bool:
    """Return whether an arm read each prompt once for both responses."""
    with safe_open(path, "pt") as file:
        return bool(file.metadata()["shared"] == "True")


class Agreement(NamedTuple):
    """How far two arms are apart at their first step, where policy and reference are the same."""

    loss_from_ln2: float  # the larger one of both
    loss_apart: float
    logps_apart: float  # nat per token, of the worst response
    cosine: float  # of the gradients over all parameters
    norm_ratio: float  # of the gradients

    def failure(self) -> str | None:
        """Return what is wrong, ``None`` if nothing is."""
        checks = {
            "the loss is not ln 2": self.loss_from_ln2 < LOSS_TOLERANCE,
            "the losses differ": self.loss_apart < LOSS_TOLERANCE,
            "the log-probs differ": self.logps_apart < LOGP_TOLERANCE,
            "the gradients point elsewhere": self.cosine > COSINE,
            "the gradients differ in length": abs(self.norm_ratio - 1) < NORM_TOLERANCE,
        }
        return next((reason for reason, passed in checks.items() if not passed), None)


def compare(one: Path, other: Path, response_lengths: Tensor) -> Agreement:
    """Compare what two arms wrote.

    Args:
        one: file of the first arm.
        other: file of the second arm.
        response_lengths: tokens of each response, chosen ones first, ``[2B]``.
    """
    dot = squares = other_squares = 0.0
    with safe_open(one, "pt") as left, safe_open(other, "pt") as right:
        names = set(left.keys())
        if names != set(right.keys()):
            some = sorted(names ^ set(right.keys()))[0]
            raise SystemExit(f"the arms train other parameters ({some}): nothing is timed")
        for name in names:
            if name.startswith("gradient/"):  # one at a time: all of them twice would not fit everywhere
                a, b = left.get_tensor(name).flatten(), right.get_tensor(name).flatten()
                dot += float(torch.dot(a.double(), b.double()))
                squares += float(a.double().square().sum())
                other_squares += float(b.double().square().sum())
        losses = [float(file.get_tensor("loss")) for file in (left, right)]
        apart = (left.get_tensor("logps") - right.get_tensor("logps")).abs() / response_lengths
    return Agreement(
        loss_from_ln2=max(abs(loss - math.log(2)) for loss in losses),
        loss_apart=abs(losses[0] - losses[1]),
        logps_apart=float(apart.max()),
        cosine=dot / math.sqrt(squares * other_squares),
        norm_ratio=math.sqrt(squares / other_squares),
    )
