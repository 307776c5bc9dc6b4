"""What a run says on the terminal: its messages and warnings, as text that no terminal obeys."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any, cast

from lightning.pytorch.utilities import rank_zero_only

from sppo_lightning.text import for_terminal

# warnings that a user of the loop cannot act on
UNACTIONABLE = (
    r".*does not have many workers.*",
    r".*exists and is not empty.*",
    r".*train_dataloader yielded None.*",  # a resumed run whose iteration has no step left
    r".*args parameter is intended to run from within Python.*",
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*module\(s\) in eval mode at the start of training.*",
    r"Total length of `list` across ranks is zero.*",  # no data.eval_prompts
    r".*gradient_checkpointing(_enable)?` is deprecated.*",  # transformers 5.23, for what 5.17 needs
    r"\s*By default only one JsonargparseDeprecationWarning per type is shown",  # Lightning calls jsonargparse
    r"\s*``instantiate_classes`` was deprecated",
)


def hide_unactionable() -> None:
    """Leave out the warnings that a user of the loop cannot act on."""
    for message in UNACTIONABLE:
        warnings.filterwarnings("ignore", message=message)


def show_messages() -> None:
    """Print what the engines and rewards say about their choices, on the first process; as text, whatever it quotes."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns in every layer of every forward
    logger = logging.getLogger("sppo_lightning")
    logger.setLevel(logging.INFO if cast(Any, rank_zero_only).rank == 0 else logging.WARNING)
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
    for name in ("sppo_lightning", "lightning.pytorch", "lightning.fabric", "transformers"):
        for handler in logging.getLogger(name).handlers:
            handler.setFormatter(_PlainText())
    written = warnings.formatwarning
    if not isinstance(written, _PlainWarning):
        warnings.formatwarning = _PlainWarning(written)


class _PlainText(logging.Formatter):
    """Messages that no terminal obeys."""

    def format(self, record: logging.LogRecord) -> str:
        return for_terminal(super().format(record))


class _PlainWarning:
    """Warnings that no terminal obeys.

    Args:
        written: how they are written otherwise.
    """

    def __init__(self, written: Callable[..., str]) -> None:
        self.written = written

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        return for_terminal(self.written(*args, **kwargs))
