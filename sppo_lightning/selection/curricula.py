"""The order of the pairs inside an iteration."""

from __future__ import annotations

from torch import Tensor

from sppo_lightning.selection.contract import Curriculum


class RandomOrder(Curriculum):
    """A fresh random order in each epoch."""

    def order(self, difficulty: Tensor, keys: Tensor) -> Tensor:
        """Return rows by ascending key."""
        return keys.argsort(stable=True)


class EasyToHard(Curriculum):
    """Easiest prompts first."""

    def order(self, difficulty: Tensor, keys: Tensor) -> Tensor:
        """Return rows by descending mean reward, ties by key."""
        by_key = keys.argsort(stable=True)
        return by_key[difficulty[by_key].argsort(descending=True, stable=True)]


class HardToEasy(Curriculum):
    """Most difficult prompts first."""

    def order(self, difficulty: Tensor, keys: Tensor) -> Tensor:
        """Return rows by ascending mean reward, ties by key."""
        by_key = keys.argsort(stable=True)
        return by_key[difficulty[by_key].argsort(stable=True)]
