"""Log-probs, loss, rewards, metrics and gradients equal those of TRL's DPOTrainer.

The golden values come from ``golden/record_trl.py``, which says how and with which versions; float32, CPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.types import TRAIN_DATALOADERS
from support.golden import pairs as golden
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from sppo_lightning.losses import DPOLoss, PairLogps, dpo_loss
from sppo_lightning.module import PreferenceModule
from sppo_lightning.pair_forward import PairForward, PlainForward, SharedForward
from sppo_lightning.pair_forward.layouts import PairLayout
from sppo_lightning.policy.config import PolicyConfig
from sppo_lightning.training.batching import PairDataset, StepSampler, StepSlot, accumulation_steps, collate
from sppo_lightning.training.reference import FrozenReference
from sppo_lightning.types import PreferencePair

# the steps are too small on purpose
pytestmark = pytest.mark.filterwarnings("ignore:The first optimizer step moved no weight")
RECORDED = json.loads((Path(__file__).parents[1] / "support/golden/trl_dpo.json").read_text())
COUNT = len(golden.PAIRS)
LAST_STEP = 4  # pairs_per_step for which the recorded last pairs are a partial last step
METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margin",
    "rewards/accuracy",
    "logps/chosen",
    "logps/rejected",
)


def close(ours: Any, recorded: Any) -> None:
    ours = torch.as_tensor(ours, dtype=torch.float64)
    torch.testing.assert_close(ours, torch.tensor(recorded, dtype=torch.float64), atol=1e-5, rtol=0)


def close_gradient(ours: dict[str, float], recorded: dict[str, float]) -> None:
    assert {name: ours[name] for name in recorded} == pytest.approx(recorded, rel=1e-4)


@torch.no_grad()
def all_logps(
    model: LlamaForCausalLM, pairs: list[PreferencePair], forward: PairForward, batch_size: int = COUNT
) -> PairLogps:
    slot, layout = StepSlot(0, 1, len(pairs), True, True), forward.layout(golden.PAD)
    parts = [
        forward.logps(model, collate(part, layout=layout, real=len(part), slot=slot).rows)
        for part in (pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size))
    ]
    return PairLogps(*(torch.cat(side) for side in zip(*parts, strict=True)))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take five times as long where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def policy() -> LlamaForCausalLM:
    return golden.policy()


@pytest.fixture(params=[PlainForward, SharedForward])
def forward(request: pytest.FixtureRequest) -> PairForward:
    return request.param()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def pairs() -> list[PreferencePair]:
    """The recorded pairs, with the reference log-probs that we compute."""

    def build(numbered: tuple[int, golden.Pair], chosen: float, rejected: float) -> PreferencePair:
        number, (prompt, *responses) = numbered
        return PreferencePair(f"p{number}", prompt, *responses, "", "", 1.0, 0.0, chosen, rejected)

    unknown = [build(numbered, float("nan"), float("nan")) for numbered in enumerate(golden.PAIRS)]
    logps = all_logps(golden.reference(), unknown, PlainForward())
    return [
        build(*row)
        for row in zip(enumerate(golden.PAIRS), logps.chosen.tolist(), logps.rejected.tolist(), strict=True)
    ]


@pytest.fixture(
    params=RECORDED["settings"], ids=lambda one: f"beta={one['beta']},smoothing={one['label_smoothing']}"
)
def setting(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


@pytest.mark.parametrize("batch_size", [1, 2, COUNT])
@pytest.mark.parametrize("name", ["policy", "reference"])
def test_logps(name: str, batch_size: int, pairs: list[PreferencePair], forward: PairForward) -> None:
    ours = all_logps(getattr(golden, name)(), pairs, forward, batch_size)
    close(ours.chosen, RECORDED["logps"][name]["chosen"])
    close(ours.rejected, RECORDED["logps"][name]["rejected"])


def test_terms_of_each_pair(
    setting: dict[str, Any], policy: LlamaForCausalLM, pairs: list[PreferencePair], forward: PairForward
) -> None:
    logps = all_logps(policy, pairs, forward)
    reference = PairLogps(
        torch.tensor([pair.reference_chosen_logp for pair in pairs], dtype=torch.float64),
        torch.tensor([pair.reference_rejected_logp for pair in pairs], dtype=torch.float64),
    )
    knobs = {"beta": setting["beta"], "label_smoothing": setting["label_smoothing"]}
    terms = DPOLoss(**knobs)(logps, reference)
    close(terms.loss, setting["pairs"]["loss"])
    close(terms.chosen_reward, setting["pairs"]["rewards/chosen"])
    close(terms.rejected_reward, setting["pairs"]["rewards/rejected"])
    close(terms.chosen_reward - terms.rejected_reward, setting["pairs"]["rewards/margin"])
    assert [float(a > b) for a, b in zip(terms.chosen_reward, terms.rejected_reward, strict=True)] == (
        setting["pairs"]["rewards/accuracy"]
    )
    assert torch.equal(terms.loss, dpo_loss(logps, reference, **knobs).loss)


def test_gradient_of_one_batch(
    setting: dict[str, Any], policy: LlamaForCausalLM, pairs: list[PreferencePair], forward: PairForward
) -> None:
    slot = StepSlot(step=0, steps=1, step_pairs=COUNT, first_in_step=True, last_in_step=True)
    batch = collate(pairs, layout=forward.layout(golden.PAD), real=COUNT, slot=slot)
    loss = DPOLoss(setting["beta"], setting["label_smoothing"])
    loss(forward.logps(policy, batch.rows), batch.reference).loss.mean().backward()
    close_gradient(golden.gradient_summary(policy), setting["step"]["gradient"])


# ------------------------------------------------- PreferenceModule, driven by Lightning


class StoredPairs(pl.LightningDataModule):
    """What PreferenceModule needs of its data module, without self-play."""

    def __init__(self, pairs: list[PreferencePair], layout: PairLayout, sampler: StepSampler) -> None:
        super().__init__()
        self.loader = DataLoader(PairDataset(pairs, layout), sampler=sampler, batch_size=None)

    def train_dataloader(self) -> TRAIN_DATALOADERS:
        return self.loader

    def val_dataloader(self) -> list[Any]:
        return []


class StepGradients(pl.Callback):
    """Keeps a summary of the gradient of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        self.steps.append(golden.gradient_summary(module.policy))


def make_module(setting: dict[str, Any], policy: LlamaForCausalLM, forward: PairForward) -> PreferenceModule:
    loss = DPOLoss(setting["beta"], setting["label_smoothing"])
    config = PolicyConfig("made in the test")
    module = PreferenceModule(config, loss, 1e-30, reference="initial", pair_forward=forward)
    module.policy = policy
    return module


@pytest.fixture
def no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy comes from no folder, and differs from the reference before the first step."""
    monkeypatch.setattr(PreferenceModule, "setup", lambda self, stage: None)
    unsharded = SimpleNamespace(is_sharded=False, cleanup_sampling_weights=lambda: None)
    monkeypatch.setattr(PreferenceModule, "trained_policy", unsharded)
    monkeypatch.setattr(FrozenReference, "check_start", lambda *given, **named: None)


def fit(
    module: PreferenceModule, pairs: list[PreferencePair], *, pairs_per_step: int, batch_size: int
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Run one epoch; return what the last step logged, and every step's gradient."""
    gradients = StepGradients()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        accumulate_grad_batches=accumulation_steps(
            pairs_per_step=pairs_per_step, batch_size=batch_size, world_size=1
        ),
        callbacks=[gradients],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    sampler = StepSampler(range(len(pairs)), pairs_per_step=pairs_per_step, batch_size=batch_size)
    trainer.fit(module, datamodule=StoredPairs(pairs, module.pair_forward.layout(golden.PAD), sampler))
    return trainer.callback_metrics, gradients.steps


@pytest.mark.usefixtures("no_checks")
@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
def test_accumulated_step(
    setting: dict[str, Any],
    batch_size: int,
    policy: LlamaForCausalLM,
    pairs: list[PreferencePair],
    forward: PairForward,
) -> None:
    module = make_module(setting, policy, forward)
    logged, steps = fit(module, pairs, pairs_per_step=COUNT, batch_size=batch_size)
    assert len(steps) == 1
    trained = setting["trained"].get(str(batch_size), setting["trained"]["1"])
    for recorded in (setting["step"], trained):
        close([logged[f"train/{name}"] for name in METRICS], [recorded[name] for name in METRICS])
        close_gradient(steps[0], recorded["gradient"])


@pytest.mark.usefixtures("no_checks")
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_partial_last_step(
    setting: dict[str, Any],
    batch_size: int,
    policy: LlamaForCausalLM,
    pairs: list[PreferencePair],
    forward: PairForward,
) -> None:
    module = make_module(setting, policy, forward)
    logged, steps = fit(module, pairs, pairs_per_step=LAST_STEP, batch_size=batch_size)
    assert len(steps) == 2
    recorded = setting["last_step"]
    close([logged[f"train/{name}"] for name in METRICS], [recorded[name] for name in METRICS])
    close_gradient(steps[1], recorded["gradient"])


# ------------------------------------------------- several ranks, one after the other


def run_rank(
    module: PreferenceModule, pairs: list[PreferencePair], sampler: StepSampler, passes: int
) -> Iterator[Tensor]:
    """Yield the losses that Lightning would run backward on: ``training_step`` over the accumulation."""
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        accumulate_grad_batches=passes,
        world_size=sampler.world_size,
        current_epoch=1,
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.0}])],
    )
    dataset = PairDataset(pairs, module.pair_forward.layout(golden.PAD))
    for number, micro in enumerate(sampler):
        yield module.training_step(dataset[micro], number) / passes


@pytest.mark.parametrize(
    ("world_size", "batch_size", "pairs_per_step"),
    [(2, 3, 6), (2, 1, 6), (3, 1, 6), (2, 2, 8), (4, 1, 8), (4, 2, 8)],
    ids=["2x3", "2x1", "3x1", "2x2 partial", "4x1 a rank of fillers", "4x2 a rank of fillers"],
)
def test_ranks_average_to_the_same_gradient(
    setting: dict[str, Any],
    world_size: int,
    batch_size: int,
    pairs_per_step: int,
    policy: LlamaForCausalLM,
    pairs: list[PreferencePair],
    forward: PairForward,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PreferenceModule, "log_dict", lambda *args, **kwargs: None)
    module = make_module(setting, policy, forward)
    passes = accumulation_steps(pairs_per_step=pairs_per_step, batch_size=batch_size, world_size=world_size)
    for rank in range(world_size):
        sampler = StepSampler(
            range(COUNT),
            pairs_per_step=pairs_per_step,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
        )
        for loss in run_rank(module, pairs, sampler, passes):
            (loss / world_size).backward()  # data-parallel training averages over ranks
    close_gradient(golden.gradient_summary(policy), setting["step"]["gradient"])
