"""Every loss gives the same gradient however a step's pairs are laid out, accumulated and dealt to processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.golden import pairs as golden
from support.losses import LOSSES

from sppo_lightning.losses import PairLogps
from sppo_lightning.module import PreferenceModule
from sppo_lightning.pair_forward import PairForward, PlainForward, SharedForward
from sppo_lightning.policy.config import PolicyConfig
from sppo_lightning.training.batching import PairDataset, StepSampler, StepSlot, accumulation_steps, collate
from sppo_lightning.training.reference import FrozenReference
from sppo_lightning.types import PreferencePair

COUNT = len(golden.PAIRS)


def stored_pairs() -> list[PreferencePair]:
    """The golden pairs with the reference's log-probs of tokens, rewards and win probabilities."""
    plain = [
        PreferencePair(f"p{number}", *pair, "", "", 2.0 - 0.25 * number, -0.5 + 0.125 * number)
        for number, pair in enumerate(golden.PAIRS)
    ]
    slot = StepSlot(0, 1, COUNT, True, True)
    rows = collate(plain, layout=PlainForward().layout(golden.PAD), real=COUNT, slot=slot).rows
    with torch.no_grad():
        tokens: PairLogps = PlainForward().logps_by_token(golden.reference(), rows)

    def known(number: int, pair: PreferencePair) -> PreferencePair:
        sides = [
            tuple(side[number, : len(ids)].tolist())
            for side, ids in zip(tokens, (pair.chosen_token_ids, pair.rejected_token_ids), strict=True)
        ]
        fields = {name: value for name, value in vars(pair).items() if not name.startswith("reference")}
        return PreferencePair(
            **{
                **fields,
                "reference_chosen_logp": sum(sides[0]),
                "reference_rejected_logp": sum(sides[1]),
                "reference_chosen_token_logps": sides[0],
                "reference_rejected_token_logps": sides[1],
                "chosen_win_probability": 0.9 - 0.05 * number,
                "rejected_win_probability": 0.1 + 0.05 * number,
            }
        )

    return [known(number, pair) for number, pair in enumerate(plain)]


PAIRS = stored_pairs()


def gradient(
    name: str, forward: PairForward, *, pairs_per_step: int, batch_size: int, world_size: int
) -> dict[str, float]:
    """Return the gradient of one optimizer step, its ranks one after the other."""
    module = PreferenceModule(
        PolicyConfig("made in the test"), LOSSES[name], 1e-30, reference="initial", pair_forward=forward
    )
    policy = module.policy = golden.policy()
    passes = accumulation_steps(pairs_per_step=pairs_per_step, batch_size=batch_size, world_size=world_size)
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        accumulate_grad_batches=passes,
        world_size=world_size,
        current_epoch=1,
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.0}])],
    )
    dataset = PairDataset(PAIRS, forward.layout(golden.PAD))
    for rank in range(world_size):
        sampler = StepSampler(
            range(COUNT),
            pairs_per_step=pairs_per_step,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
        )
        for number, micro in enumerate(sampler):
            (module.training_step(dataset[micro], number) / passes / world_size).backward()
    return golden.gradient_summary(policy)


@pytest.mark.parametrize("name", LOSSES)
def test_one_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreferenceModule, "log_dict", lambda *given, **named: None)
    monkeypatch.setattr(FrozenReference, "check_start", lambda *given, **named: None)
    whole = gradient(name, PlainForward(), pairs_per_step=COUNT, batch_size=COUNT, world_size=1)
    assert whole["norm"] > 1e-3
    for forward, pairs_per_step, batch_size, world_size in (
        (SharedForward(), 6, 6, 1),  # prompts shared
        (PlainForward(), 6, 1, 1),  # accumulated
        (SharedForward(), 6, 2, 3),  # on several processes
        (SharedForward(), 8, 2, 4),  # one of which has padding pairs only
    ):
        found = gradient(
            name, forward, pairs_per_step=pairs_per_step, batch_size=batch_size, world_size=world_size
        )
        assert found == pytest.approx(whole, rel=1e-4, abs=1e-6)
