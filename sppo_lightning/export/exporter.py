"""What an exporter is: a format that a run's policy is written in, or data that a run has made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn

from sppo_lightning.export.finished_run import FinishedRun
from sppo_lightning.export.saved_policy import SavedPolicy
from sppo_lightning.export.stored_run import StoredRun


class ExportFormat:
    """What ``--format`` chooses: one of our short names, or the dotted path of an exporter of policies or of data.

    Attributes:
        name: short, in the name of the folder that is written by default; empty: the class's.
        holds: what the folder holds, in the words of its card.
    """

    name: str = ""
    holds: str = ""


class Exporter(ExportFormat, ABC):
    """A format of a policy.

    They are called in the order in which they stand here. The folder has another name until all is done, and keeps it
    where the check fails. Only :meth:`write` is needed.

    Attributes:
        holds: ends the card's sentence "This folder holds …".
        library: the card's ``library_name``.
    """

    holds: str = "the policy in a format of the user's own"
    library: str = "transformers"

    def validate(self, run: FinishedRun, *, dtype: torch.dtype | None) -> None:
        """Refuse a run that the format does not fit, before anything loads.

        Args:
            run: to be exported.
            dtype: that the user asked for; ``None``: ``auto``.

        Raises:
            UserError: saying which format to take instead.
        """

    @abstractmethod
    def write(self, policy: SavedPolicy, folder: Path) -> None:
        """Write the policy. A ``README.md`` is replaced by the model card.

        Args:
            policy: to be loaded as it is needed, in full or as an adapter on its base.
            folder: empty.
        """

    def read_back(self, policy: SavedPolicy, folder: Path) -> nn.Module | None:
        """Load what was written as its users will.

        Args:
            policy: knows how such models are loaded.
            folder: that was written.

        Returns:
            A causal language model, full or PEFT's. It must give the trained policy's log-probs, and hold the weights
            that :meth:`SavedPolicy.load_full` changed, under the same names, bit by bit. ``None``: nothing is
            compared, and the card says so.
        """
        return None

    def how_to_load(self, policy: SavedPolicy) -> Iterable[str]:
        """Return the paragraphs of the card's section on loading, in Markdown, without paths of this machine."""
        return ()


class DataExporter(ExportFormat, ABC):
    """A format of what a run has made besides its policy: no model is loaded for it.

    Attributes:
        holds: opens the card's title.
        front_matter: the card's YAML.
    """

    holds: str = "data"
    front_matter: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @abstractmethod
    def write(self, run: StoredRun, iterations: Sequence[int], folder: Path) -> Iterable[str]:
        """Write the data. A ``README.md`` is replaced by the card.

        Args:
            run: that has made it.
            iterations: self-play iterations to write the data of, all of them complete, in ascending order.
            folder: empty.

        Returns:
            The paragraphs of the card's section on what is in the folder, in Markdown, without paths of this machine.

        Raises:
            UserError: if it cannot be written.
        """
