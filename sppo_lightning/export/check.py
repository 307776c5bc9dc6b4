"""Whether an exported policy is the trained one: log-probs of the run's own responses, and weights, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sppo_lightning.export.exporter import Exporter
from sppo_lightning.export.logps import digests, own_dtype_logps, read, response_logps, sample_pairs
from sppo_lightning.export.saved_policy import SavedPolicy
from sppo_lightning.policy.agreement import TOLERANCES, compare_stored_sums, distance
from sppo_lightning.types import PreferencePair, UserError

EXACT = TOLERANCES[torch.float32].least  # models are read in float32
# weights rounded to 16 bits change log-probs 0.4 to 2.1 times as much as products in 16 bits do, on a 135M model; that
# it is the right weights which were rounded is compared bit by bit
ROUNDINGS = 4
STORED = 1e-3  # nats per token that another device and its kernels explain, in float32


@dataclass(frozen=True)
class Distance:
    """How far two models' log-probs of the same tokens lie apart.

    Args:
        between: the two models, in words.
        nats: mean absolute difference per response token.
        allowed: the most that it may be.
        because: what that covers.
        otherwise: what it means if it is more.
    """

    between: str
    nats: float
    allowed: float
    because: str
    otherwise: str = "the export is not the trained policy"

    @property
    def holds(self) -> bool:
        """Whether the distance is allowed; NaN is not."""
        return self.nats <= self.allowed


class Check(NamedTuple):
    """What the comparison of an export with the trained policy found."""

    pairs: Sequence[PreferencePair]  # that were read
    distances: Sequence[Distance]
    weights: int = 0  # compared bit by bit
    altered: Sequence[str] = ()  # those that are not what was to be written
    moved: float | None = None  # by training, nats per token; known for an adapter that began at the base
    rounded: float | None = None  # by rounding merged weights, nats per token

    def require(self, folder: Path) -> None:
        """Refuse an export that is not the trained policy.

        Args:
            folder: of the export.

        Raises:
            UserError: naming what differs, and by how much.
        """
        broken: dict[str, list[str]] = {}
        for found in self.distances:
            if not found.holds:
                broken.setdefault(found.otherwise, []).append(
                    f"{found.between} differ by {found.nats:.2g} nat per token, allowed are {found.allowed:.2g} "
                    f"({found.because})"
                )
        if self.altered:
            broken.setdefault(Distance.otherwise, []).append(
                f"{len(self.altered)} weights are not what was to be written, e.g. {self.altered[0]}"
            )
        if broken:
            reasons = "; ".join(f"{meaning}: {'; '.join(found)}" for meaning, found in broken.items())
            raise UserError(f"{reasons}. It stays in {folder} to be looked at, not used")


class _ReadBack(NamedTuple):
    """What the exported model makes of the run's responses."""

    logps: Tensor  # [N] nats
    rounding: float  # mean change per token by computing in the weights' own dtype; 0 in float32
    altered: list[str]


def check_export(exporter: Exporter, policy: SavedPolicy, folder: Path) -> Check | None:
    """Compare what was written with the trained policy, one model in memory at a time.

    Args:
        exporter: that wrote it.
        policy: the trained one.
        folder: that was written.

    Returns:
        What was found; ``None`` if the exporter reads nothing back.
    """
    found = _read_back(exporter, policy, folder)
    if found is None:
        return None
    run, own, merged = policy.run, policy.logps(), policy.merged_logps
    distances: list[Distance] = []
    trained, moved, rounded = own, None, None
    if run.has_adapter:
        model = policy.load_as_trained()
        trained = read(model, policy.pairs)
        distances += _compared_with_stored(model, trained.base, policy)
        if merged is not None:
            pair = "the merged weights, before rounding, and the adapter on the same base"
            distances.append(compared(pair, merged, own.policy))
        pair = "the export and the run's adapter, on the same base"
        same_base = compared(pair, found.logps, own.policy, rounding=found.rounding)
        distances.append(same_base)
        rounded = same_base.nats if merged is not None else None
        moved = distance(own.policy, own.base) if run.has_fresh_adapter else None
    pair = "the export and the trained policy"
    base = distance(own.base, trained.base)
    distances.append(compared(pair, found.logps, trained.policy, rounding=found.rounding, base=base))
    return Check(policy.pairs, distances, len(policy.expected), found.altered, moved, rounded)


def _read_back(exporter: Exporter, policy: SavedPolicy, folder: Path) -> _ReadBack | None:
    model = exporter.read_back(policy, folder)
    if model is None:
        return None
    model = model.to(policy.device).eval()
    expected = policy.expected
    weights = digests((name, weight) for name, weight in model.named_parameters() if name in expected)
    altered = [name for name, digest in expected.items() if weights.get(name) != digest]
    logps = response_logps(model, policy.pairs)
    rounding = 0.0  # an adapter is written as it was trained
    if not hasattr(model, "peft_config") and model.dtype not in (torch.float32, torch.float64):
        rounding = distance(logps, own_dtype_logps(model, policy.pairs))
    return _ReadBack(logps, rounding, altered)


def compared(
    between: str, one: Tensor, other: Tensor, *, rounding: float = 0.0, base: float = 0.0
) -> Distance:
    """Return how far two models are apart, and how far they may be.

    Args:
        between: the two, in words.
        one: log-probs of the one, ``[N]`` nats.
        other: of the other.
        rounding: mean change per token, nats, by computing in 16 bits.
        base: distance of the two bases, where they were held in two ways.
    """
    covers = [f"{EXACT:g} for float32 arithmetic"]
    if rounding:
        covers.append(f"{ROUNDINGS} times the {rounding:.2g} that computing in 16 bits changes")
    if base:
        covers.append(f"twice the {base:.2g} between the two bases alone")
    allowed = EXACT + ROUNDINGS * rounding + 2 * base
    return Distance(between, distance(one, other), allowed, " + ".join(covers))


def _compared_with_stored(model: nn.Module, base: Tensor, policy: SavedPolicy) -> Iterator[Distance]:
    """Yield how far the base is from the reference that training stored, where that was the base alone."""
    run = policy.run
    iteration = run.base_as_reference
    if iteration is None:
        return
    pairs = policy.pairs
    if iteration != run.iteration:
        pairs = sample_pairs(run.folder.iteration(iteration).read_pairs())
        base = read(model, pairs).base
    yield compared_with_stored(base, pairs, iteration=iteration, coarsest=run.coarsest_dtype)


def compared_with_stored(
    base: Tensor, pairs: Sequence[PreferencePair], *, iteration: int, coarsest: torch.dtype
) -> Distance:
    """Return how far a base is from the reference's log-probs that training stored: sums of whole responses.

    Args:
        base: log-probs of each response token of ``pairs``, ``[N]`` nats.
        pairs: with what was stored.
        iteration: that the pairs are of.
        coarsest: dtype of training's products or weights, the one with more rounding.
    """
    sides = ("chosen", "rejected")
    lengths = [len(getattr(pair, f"{side}_token_ids")) for pair in pairs for side in sides]
    stored = [getattr(pair, f"reference_{side}_logp") for pair in pairs for side in sides]
    sums = torch.stack([part.sum() for part in torch.split(base, lengths)])
    reference = torch.tensor(stored, dtype=sums.dtype)
    agreement = compare_stored_sums(sums, reference, tokens=sum(lengths), dtype=coarsest)
    return Distance(
        f"the base and the reference's log-probs that training stored in iteration {iteration}",
        *agreement.allowing(STORED),
        f"sums of whole responses, computed in {str(coarsest).removeprefix('torch.')} in training",
        "the base is not the one that the run was trained on",
    )
