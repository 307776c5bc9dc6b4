"""The reference's log-probs of an iteration's pairs: in parts, which are stored as they are done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sppo_lightning.iteration.reference_pass import reference_pass
from sppo_lightning.losses import PairLogps
from sppo_lightning.pair_forward.layouts import PlainLayout
from sppo_lightning.pair_forward.logprobs import by_response
from sppo_lightning.store.pairs import PairTable
from sppo_lightning.store.reference_parts import MOST, ReferenceParts, cut_into_parts
from sppo_lightning.system.rendezvous import FileRanks
from sppo_lightning.training.batching import PairBatch
from sppo_lightning.types import PreferencePair, UserError

ALONE = FileRanks(Path(), rank=0, world_size=1)


class PoweredDownError(Exception):
    """Ends a pass."""


class Reference:
    """Gives a pair the sum of its response's token ids, and may fail after some pairs."""

    def __init__(self, *, name: str = "first", fails_after: int = 10**9, stays: bool = False) -> None:
        self.name = name
        self.fails_after = fails_after
        self.is_fixed = stays
        self.forward_is_collective = False
        self.seen = 0

    def fingerprint(self) -> str:
        return self.name

    @contextmanager
    def held(self) -> Iterator[None]:
        yield

    def logps_by_token(self, batch: PairBatch) -> PairLogps:
        self.seen += len(batch.weights)
        if self.seen > self.fails_after:
            raise PoweredDownError
        rows = batch.rows
        tokens = by_response(-rows.targets.double(), rows.places, rows.responses, rows.longest_response)
        return PairLogps(*tokens.chunk(2))

    @staticmethod
    def sums(batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of the response tokens' ids, chosen and rejected, ``[B]`` each."""
        rows = batch.rows
        sums = torch.zeros(rows.responses, dtype=torch.float64)
        sums.index_add_(0, rows.places // rows.longest_response, rows.targets.double())
        chosen, rejected = sums.chunk(2)
        return chosen, rejected


def table(count: int) -> PairTable:
    return PairTable.collect(
        PreferencePair(f"p{n}", (5,) * (1 + n % 7), (n + 3, 4), (n + 4, 6, 7), "c", "r", 1.0, 0.0)
        for n in range(count)
    )


def run(pairs: PairTable, reference: Reference, folder: Path, *, first: str | None = None) -> PairTable:
    done, _ = reference_pass(
        pairs,
        reference,
        stored=ReferenceParts(folder),
        layout=PlainLayout(0),
        batch_size=3,
        first_fingerprint=first,
        stores_tokens=False,
        ranks=ALONE,
        report=lambda done, total, tokens: None,
    )
    return done


def sides(pairs: PairTable) -> list[tuple[float, float]]:
    return [(pair.reference_chosen_logp, pair.reference_rejected_logp) for pair in pairs]


EXPECTED = [(-(n + 3.0 + 4), -(n + 4.0 + 6 + 7)) for n in range(100)]


def test_golden(tmp_path: Path) -> None:
    """100 pairs are four parts of 32, the shortest prompts last; every pair gets its own sums."""
    reference = Reference()
    assert sides(run(table(100), reference, tmp_path)) == EXPECTED
    assert reference.seen == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"part-0000{n}.parquet" for n in range(4)]


def test_an_interrupted_pass_goes_on_behind_its_last_part(tmp_path: Path) -> None:
    with pytest.raises(PoweredDownError):
        run(table(100), Reference(fails_after=70), tmp_path)
    again = Reference()
    assert sides(run(table(100), again, tmp_path)) == EXPECTED
    assert again.seen == 100 - 2 * 32


def test_damaged_and_foreign_parts_are_computed_again(tmp_path: Path) -> None:
    run(table(100), Reference(), tmp_path)
    damaged = tmp_path / "part-00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    again = Reference()
    assert sides(run(table(100), again, tmp_path)) == EXPECTED
    assert again.seen == 32
    changed = list(table(100))
    changed[7] = PreferencePair("p7", changed[7].prompt_token_ids, (50,), (60,), "c", "r", 1.0, 0.0)
    other = Reference()
    found = sides(run(PairTable.collect(iter(changed)), other, tmp_path))
    assert found[7] == (-50.0, -60.0)
    assert found[:7] + found[8:] == EXPECTED[:7] + EXPECTED[8:]
    assert 0 < other.seen < 100
    renamed = Reference(name="another")
    run(table(100), renamed, tmp_path)
    assert renamed.seen == 100


def test_a_reference_that_has_to_stay_and_did_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has fingerprint second, but iteration 0 was trained against first"):
        run(table(3), Reference(name="second", stays=True), tmp_path, first="first")
    run(table(3), Reference(name="second"), tmp_path, first="first")


def test_removed_once_the_pairs_hold_it(tmp_path: Path) -> None:
    run(table(3), Reference(), tmp_path / "reference")
    ReferenceParts(tmp_path / "reference").remove()
    ReferenceParts(tmp_path / "reference").remove()
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=10, deadline=None)
@given(count=st.integers(0, 1_000_000))
def test_parts_are_not_too_many_and_not_too_large(count: int) -> None:
    parts = cut_into_parts(range(count))
    assert sum(map(len, parts)) == count
    assert all(len(part) <= MOST for part in parts)
    assert len(parts) <= min(count // 32 + 1, 3000)
