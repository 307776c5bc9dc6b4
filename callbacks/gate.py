"""Decides at an iteration's end whether the run goes on from the policy that it has just trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import ClassVar, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from sppo_lightning.callbacks.base import SelfPlayCallback
from sppo_lightning.datamodule import SelfPlayDataModule, self_play_data
from sppo_lightning.evaluation.gate import (
    Decision,
    best_result,
    read_decisions,
    steps_back,
    write_decisions,
)
from sppo_lightning.evaluation.held_out import load_evaluation
from sppo_lightning.evaluation.results import held_out_results
from sppo_lightning.resume.checkpoints import check_sharded_metadata
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.system.durable import fresh_folder, replace_folder, restore_replaced
from sppo_lightning.training.hardware import is_dev_run
from sppo_lightning.types import UserError

Action = Literal["warn", "stop", "revert"]
DIAGNOSTICS = ("learning/", "val/", "iteration/")


class IterationGate(SelfPlayCallback):
    """Compares the policy at each iteration's end with the best so far, and acts where it is a step back.

    A step back: its held-out reward lies below that of the best policy so far (the initial one included) by more than
    ``tolerance`` standard errors of their paired difference, or a diagnostic is over its bound. What was decided is
    stored in ``gate.json``, and a run that is resumed decides the same.

    To revert, the trained weights of the best policy are kept in ``checkpoints/weights-NNN``.

    Args:
        action: ``warn``: say so and go on; ``stop``: end the run; ``revert``: go on from the best policy so far, with a
            smaller learning rate.
        tolerance: standard errors that the held-out reward may fall, 0 or more.
        bounds: largest values of diagnostics, by the names that ``LearningDiagnostics`` logs them under, e.g.
            ``val/response_length/growth``.
        learning_rate_factor: scales the learning rate after each step back that is reverted, in (0, 1].
    """

    free_settings: ClassVar[frozenset[str]] = frozenset({"action"})
    """What a run that resumes may change: it decides the iterations to come."""

    def __init__(
        self,
        action: Action = "revert",
        tolerance: float = 1.0,
        bounds: dict[str, float] | None = None,
        learning_rate_factor: float = 0.5,
    ) -> None:
        if tolerance < 0:
            raise ValueError(f"IterationGate.tolerance={tolerance} must be 0 or more")
        if not 0 < learning_rate_factor <= 1:
            raise ValueError(f"IterationGate.learning_rate_factor={learning_rate_factor} must lie in (0, 1]")
        for name in bounds or {}:
            if not name.startswith(DIAGNOSTICS):
                raise ValueError(
                    f"IterationGate.bounds: {name!r} is no diagnostic; their names begin with {', '.join(DIAGNOSTICS)}"
                )
        self.action = action
        self.tolerance = tolerance
        self.bounds = bounds or {}
        self.learning_rate_factor = learning_rate_factor

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Require held-out prompts; put back what a killed run was about to replace."""
        data = self_play_data(trainer)
        if stage != "fit" or is_dev_run(trainer):
            return
        if not data.prompt_sets.named("eval_prompts"):
            raise UserError(
                "IterationGate compares policies on held-out prompts, and there are none: name data.eval_prompts, or "
                "leave the callback out"
            )
        if trainer.is_global_zero:
            for path in data.folder.last_checkpoint.parent.glob(".weights-*.old"):
                restore_replaced(path.with_name(path.name.removeprefix(".").removesuffix(".old")))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to go on with a run that was stopped."""
        data = self_play_data(trainer)
        finished = data.finished_iterations
        stopped = any(
            item.finished == finished and item.action == "stop" for item in self._decided(data, finished)
        )
        if stopped and self.action == "stop" and not is_dev_run(trainer):
            raise UserError(
                f"IterationGate stopped this run after {finished} iteration(s): to go on with it, set the callback's "
                "action to warn or revert"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the initial policy."""
        if trainer.global_step == 0 and self.action == "revert" and not is_dev_run(trainer):
            self._keep(trainer, self_play_data(trainer), 0)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the learning rate's factor of the iteration."""
        data = self_play_data(trainer)
        if not is_dev_run(trainer):
            decided = self._decided(data, data.current_iteration)
            data.module.learning_rate_factor = decided[-1].learning_rate_factor if decided else 1.0

    def on_iteration_end(self, trainer: pl.Trainer, data: SelfPlayDataModule, iteration: int) -> None:
        """Decide and act; all processes do the same."""
        if is_dev_run(trainer):
            return
        earlier = self._decided(data, iteration)
        decided = self._decide(data, iteration + 1, earlier) if data.ranks.rank == 0 else None
        state = data.ranks.same(None if decided is None else decided.state())
        if state is None:
            return
        decision = Decision.from_state(state)
        if trainer.is_global_zero:
            write_decisions(data.folder, [*earlier, decision])
        self._act(trainer, data, decision)
        for logger in trainer.loggers:
            logger.log_metrics(
                {"gate/accepted": float(decision.action == "accept"), "gate/best": float(decision.best)},
                step=trainer.global_step,
            )

    def _decided(self, data: SelfPlayDataModule, finished: int) -> list[Decision]:
        """Return what was decided about policies of up to ``finished`` iterations."""
        found = read_decisions(data.folder) if data.ranks.rank == 0 else []
        states = data.ranks.same([item.state() for item in found if item.finished <= finished])
        return [Decision.from_state(state) for state in states]

    def _decide(self, data: SelfPlayDataModule, finished: int, earlier: list[Decision]) -> Decision | None:
        folder = data.folder
        before = best_result(held_out_results(folder, finished - 1), earlier)
        rows = load_evaluation(folder.evaluation(f"{finished:03d}"))
        best = None if before is None else load_evaluation(folder.evaluation(f"{before.finished:03d}"))
        if before is None or rows is None or best is None:
            return None
        diagnostics = {
            **data.iteration_metrics(),
            **folder.iteration(finished - 1).read_diagnostics(),
        }
        for name in self.bounds.keys() - diagnostics.keys():
            rank_zero_warn(
                f"IterationGate.bounds: {name} was not measured in iteration {finished - 1}, and bounds nothing."
            )
        reasons, difference, stderr = steps_back(
            rows, best, diagnostics, tolerance=self.tolerance, bounds=self.bounds
        )
        factor = earlier[-1].learning_rate_factor if earlier else 1.0
        action = self.action
        if reasons and action == "revert" and not folder.kept_weights(before.finished).exists():
            action = "warn"  # not to be undone
            reasons.append(f"{folder.kept_weights(before.finished)}, to revert to, is not there")
        if reasons and action == "revert":
            factor *= self.learning_rate_factor
        return Decision(
            finished=finished,
            action=action if reasons else "accept",
            reasons=tuple(reasons),
            best=finished if not reasons and difference > 0 else before.finished,
            difference=difference,
            stderr=stderr,
            learning_rate_factor=factor,
        )

    def _act(self, trainer: pl.Trainer, data: SelfPlayDataModule, decision: Decision) -> None:
        finished = decision.finished
        if decision.action == "accept":
            if decision.best == finished and self.action == "revert":
                self._keep(trainer, data, finished)
            return
        said = f"The policy after {finished} iteration(s) is a step back: {'; '.join(decision.reasons)}."
        if decision.action == "warn":
            rank_zero_warn(f"{said} The run goes on from it.")
        elif decision.action == "stop":
            rank_zero_warn(f"{said} The run ends here (IterationGate.action=stop).")
            trainer.should_stop = True
        else:
            place = data.folder.kept_weights(decision.best)
            check_sharded_metadata(place)
            data.module.trained_policy.restore(place)
            data.module.reset_optimizers()
            data.reverted(finished, to=decision.best)
            rank_zero_info(
                f"{said} The run goes on from {_policy(decision.best)}, at {decision.learning_rate_factor:g} times the "
                "learning rate."
            )

    def _keep(self, trainer: pl.Trainer, data: SelfPlayDataModule, finished: int) -> None:
        """Keep the weights of a policy that is the best so far, instead of those kept before."""
        place = data.folder.kept_weights(finished)
        fresh = fresh_folder(place, clear=trainer.is_global_zero)
        data.ranks.barrier("weights to be kept")
        data.module.trained_policy.keep(fresh, is_rank0=trainer.is_global_zero)
        data.ranks.barrier("weights kept")
        if trainer.is_global_zero:
            replace_folder(place, fresh)
            _remove_others(data.folder, place)
        data.ranks.barrier("weights in place")


def _policy(finished: int) -> str:
    return f"the policy after {finished} iteration(s)" if finished else "the initial policy"


def _remove_others(folder: RunFolder, place: Path) -> None:
    for other in folder.last_checkpoint.parent.glob("weights-[0-9]*"):
        if other != place and not other.is_symlink():
            shutil.rmtree(other, ignore_errors=True)
