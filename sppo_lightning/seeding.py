"""Randomness derived from names: the same parts give the same draw on any rank, in any order."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on ``parts`` and on nothing else.

    >>> derive_seed(42, 0, "prompt-1") == derive_seed(42, 0, "prompt-1")
    True
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def random_keys(ids: Sequence[str], *parts: int | str) -> Tensor:
    """Return one uniform draw in [0, 1) for each id, shape ``[len(ids)]``, float64.

    Each key depends on its own id and ``parts`` only, so that sorting by it shuffles the ids the same way
    whatever order they come in.
    """
    return torch.tensor([derive_seed(*parts, key) / 2.0**63 for key in ids], dtype=torch.float64)


def distinct(ids: Sequence[str]) -> list[str]:
    """Return the ids, those that came before with a number, so that each row has a random key of its own.

    >>> distinct(["a", "b", "a", "a"])
    ['a', 'b', 'a#1', 'a#2']
    """
    seen: Counter[str] = Counter()
    found = []
    for key in ids:
        found.append(f"{key}#{seen[key]}" if key in seen else key)
        seen[key] += 1
    return found
