"""Record what TRL's losses make of fixed log-probs, as ``trl_losses.json``.

TRL is no dependency of the project; ``record_trl.py`` says how to make an environment of its own. To record again::

    HF_HUB_OFFLINE=1 PYTHONPATH=tests trlvenv/bin/python -m support.golden.record_losses

TRL computes every value: ``DPOTrainer._compute_loss``, ``KTOTrainer._compute_loss``, ``CPOTrainer.cpo_loss`` and
``ORPOTrainer.odds_ratio_loss`` are called on an object that holds the attributes they read, with models that return
the log-probs below. Each pair is a batch of its own, as TRL averages some losses over a batch. Recorded are the loss of
each pair and its gradient in the policy's token log-probs, chosen response first; float64 unless TRL says float32.

What is not taken as it is:

- ``kto``: the reference point of a response is its pair's other response, by ``KL_`` fields of the batch; a pair's
  loss is the mean over its responses. TRL draws the reference point from other prompts of the batch.
- ``orpo``: without the likelihood term, which TRL takes over the prompt's tokens too.
- ``wpo``: the log of the sum of squared probabilities, that TRL takes off each log-prob, is 0. ``wpo_aligned``: it is
  half the log-prob less 0.25; its negative, summed over a response, is recorded with the pairs.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

OUT = Path(__file__).with_name("trl_losses.json")


class Pair(NamedTuple):
    """Log-probs of the tokens of a pair's responses, nats."""

    policy_chosen: list[float]
    policy_rejected: list[float]
    reference_chosen: list[float]
    reference_rejected: list[float]


PAIRS = (
    # chosen rises, rejected falls; the chosen one is longer
    Pair([-0.5, -1.25, -0.75], [-2.0, -3.5], [-1.0, -1.5, -2.25], [-1.5, -2.0]),
    # both fall, the chosen one further; the rejected one is longer
    Pair([-4.0], [-0.5, -0.25, -1.0, -0.125], [-1.5], [-0.25, -0.5, -0.5, -0.25]),
    # both rise, of one length
    Pair([-0.25, -0.5], [-0.75, -0.5], [-1.5, -2.5], [-1.0, -2.0]),
    # as the reference says
    Pair(
        [-1.0, -0.5, -2.0, -0.25, -1.5],
        [-0.5, -1.0, -0.125],
        [-1.0, -0.5, -2.0, -0.25, -1.5],
        [-0.5, -1.0, -0.125],
    ),
    # far apart
    Pair([-0.125, -0.25, -0.5], [-9.0, -8.0, -12.5], [-6.0, -4.5, -8.0], [-0.25, -0.5, -1.0]),
)
DPO: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss_types": ["sigmoid"]},
    "robust": {"loss_types": ["robust"], "label_smoothing": 0.2},
    "hinge": {"loss_types": ["hinge"]},
    "ipo": {"loss_types": ["ipo"]},
    "exo_pair": {"loss_types": ["exo_pair"], "label_smoothing": 0.1},
    "nca_pair": {"loss_types": ["nca_pair"]},
    "sppo_hard": {"loss_types": ["sppo_hard"]},
    "aot": {"loss_types": ["aot"], "label_smoothing": 0.1},
    "apo_zero": {"loss_types": ["apo_zero"]},
    "apo_down": {"loss_types": ["apo_down"]},
    "discopop": {"loss_types": ["discopop"]},
    "sigmoid_norm": {"loss_types": ["sigmoid_norm"]},
    "sft": {"loss_types": ["sft"]},
    "ld": {"loss_types": ["sigmoid"], "ld_alpha": 0.25},
    "forward_kl": {"loss_types": ["sigmoid"], "f_divergence_type": "forward_kl"},
    "js_divergence": {"loss_types": ["sigmoid"], "f_divergence_type": "js_divergence"},
    "alpha_divergence": {"loss_types": ["sigmoid"], "f_divergence_type": "alpha_divergence"},
    "wpo": {"loss_types": ["sigmoid"], "use_weighting": True},
    "wpo_aligned": {"loss_types": ["sigmoid"], "use_weighting": True},
    "rpo": {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
}
SETTINGS = {
    "beta": 0.5,
    "label_smoothing": 0.0,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.75,
    "loss_weights": [1.0],
    "use_weighting": False,
}
SIMPO_GAMMA = 0.75


def log_sum_sq_probs(log_probs: Tensor) -> Tensor:
    """Something else for each token, as if its distribution had it."""
    return 0.5 * log_probs.detach() - 0.25


def recorded_pair(pair: Pair) -> dict[str, Any]:
    entropies = [-float(log_sum_sq_probs(torch.tensor(side, dtype=torch.float64)).sum()) for side in pair[:2]]
    return {**pair._asdict(), "collision_entropy": entropies}


def padded(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0.0] * (longest - len(row))] for row in rows], dtype=dtype)


def inputs(rows: Sequence[Sequence[float]], prefix: str = "") -> dict[str, Tensor]:
    """A batch of one prompt token and responses of so many tokens."""
    longest = max(map(len, rows))
    mask = torch.tensor([[1, *[1] * len(row), *[0] * (longest - len(row))] for row in rows])
    response = mask.clone()
    response[:, 0] = 0
    return {f"{prefix}input_ids": mask, f"{prefix}attention_mask": mask, f"{prefix}completion_mask": response}


class Model(nn.Module):
    """Returns given log-probs, where TRL's fused head would compute them."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs: Tensor, log_sum_sq_probs: Tensor | None = None) -> None:
        super().__init__()
        self.log_probs = log_probs
        self.log_sum_sq_probs = torch.zeros_like(log_probs) if log_sum_sq_probs is None else log_sum_sq_probs

    def forward(self, **_: Any) -> Any:
        zeros = torch.zeros_like(self.log_probs)
        return SimpleNamespace(
            log_probs=self.log_probs,
            log_sum_sq_probs=self.log_sum_sq_probs,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )


def trainer(model: Model, reference: Model, **settings: Any) -> Any:
    """What TRL's methods read of a trainer."""

    def same(value: Any) -> Any:
        return value

    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=same, gather=same, unwrap_model=same
    )
    return SimpleNamespace(
        model=model,
        ref_model=reference,
        accelerator=accelerator,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def dpo(name: str) -> Callable[[Pair, Tensor], Tensor]:
    settings = {**SETTINGS, **DPO[name]}

    def loss(pair: Pair, tokens: Tensor) -> Tensor:
        aligned = log_sum_sq_probs(tokens) if name == "wpo_aligned" else None
        model, reference = Model(tokens, aligned), Model(padded(pair[2:], tokens.dtype))
        made = trainer(model, reference, **settings)
        return DPOTrainer._compute_loss(made, model, inputs(pair[:2]), False)

    return loss


def kto(pair: Pair, tokens: Tensor) -> Tensor:
    reference = padded(pair[2:], tokens.dtype)
    losses = []
    for own in (0, 1):
        other = 1 - own
        model = Model(tokens[own : own + 1])
        made = trainer(
            model,
            Model(reference[own : own + 1]),
            beta=SETTINGS["beta"],
            loss_type="kto",
            calculate_KL=True,
            desirable_weight=1.0,
            undesirable_weight=1.0,
        )
        kl_logps = {
            id(model): tokens[other].sum()[None].detach(),
            id(made.ref_model): reference[other].sum()[None],
        }
        made._compute_kl_logps = lambda asked, batch, known=kl_logps: known[id(asked)]
        full = [pair[own], *([[0.0] * tokens.shape[1]])]
        batch = {name: value[:1] for name, value in inputs(full).items()}
        losses.append(
            KTOTrainer._compute_loss(made, model, {**batch, "label": torch.tensor([own == 0])}, False)
        )
    return torch.stack(losses).mean()


def means(pair: Pair, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return tuple((side.sum() / len(row))[None] for side, row in zip(tokens, pair[:2], strict=True))


def simpo(pair: Pair, tokens: Tensor) -> Tensor:
    made = SimpleNamespace(
        alpha=0.0,
        loss_type="simpo",
        beta=SETTINGS["beta"],
        simpo_gamma=SIMPO_GAMMA,
        label_smoothing=0.0,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )
    return CPOTrainer.cpo_loss(made, *means(pair, tokens))[0].mean()


def orpo(pair: Pair, tokens: Tensor) -> Tensor:
    made = SimpleNamespace(beta=SETTINGS["beta"], accelerator=SimpleNamespace(device=torch.device("cpu")))
    return -ORPOTrainer.odds_ratio_loss(made, *means(pair, tokens))[0].mean()


def measure(loss: Callable[[Pair, Tensor], Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Return each pair's loss, and its gradient in the policy's token log-probs."""
    found: dict[str, Any] = {"loss": [], "gradient": []}
    for pair in PAIRS:
        tokens = padded(pair[:2], dtype).requires_grad_()
        value = loss(pair, tokens)
        (gradient,) = torch.autograd.grad(value, tokens)
        found["loss"].append(float(value.detach()))
        rows = zip(gradient.tolist(), pair[:2], strict=True)
        found["gradient"].append([row[: len(response)] for row, response in rows])
    return found


def main() -> None:
    losses: dict[str, Callable[[Pair, Tensor], Tensor]] = {name: dpo(name) for name in DPO}
    losses |= {"kto": kto, "simpo": simpo, "orpo": orpo}
    single = {"alpha_divergence", "orpo"}  # TRL knows them in float32 only
    recorded = {
        name: measure(loss, torch.float32 if name in single else torch.float64)
        for name, loss in losses.items()
    }
    changes = {name: {k: v for k, v in given.items() if k != "loss_types"} for name, given in DPO.items()}
    lines = {
        "versions": {name: version(name) for name in ("trl", "torch", "transformers")},
        "settings": {**SETTINGS, "simpo_gamma": SIMPO_GAMMA},
        "changes": changes,
        "pairs": [recorded_pair(pair) for pair in PAIRS],
        **recorded,
    }
    OUT.write_text(
        "{\n" + ",\n".join(f'"{key}": {json.dumps(value)}' for key, value in lines.items()) + "\n}\n"
    )


if __name__ == "__main__":
    main()
