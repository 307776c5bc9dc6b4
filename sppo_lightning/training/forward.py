"""The training forward, checked on the policy before its first batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from sppo_lightning.pair_forward import PairForward
from sppo_lightning.pair_forward.layouts import PairLayout
from sppo_lightning.pair_forward.parity import ParityCheck
from sppo_lightning.policy.loading import without_dropout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepared_layout(
    forward: PairForward,
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    trainer: pl.Trainer,
    *,
    longest: int,
) -> PairLayout:
    """Check a forward on the policy, say which one serves, and return the layout that micro-batches must have.

    Args:
        forward: of training.
        policy: that is trained.
        tokenizer: of the policy.
        trainer: whose precision it takes; all processes agree.
        longest: most tokens of prompt and response together that may come.

    Raises:
        UserError: if the model cannot take it.
    """
    check = ParityCheck(
        longest, trainer.precision_plugin.forward_context, trainer.strategy.reduce_boolean_decision
    )
    with without_dropout(policy):
        message = forward.prepare(policy, check)
    rank_zero_info(f"Training forward: {message}.")
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    return forward.layout(pad)
