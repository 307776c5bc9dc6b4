"""Decides at an iteration's end whether the run goes on from the policy that it has just trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from sppo_lightning.callbacks.base import SelfPlayCallback
from sppo_lightning.callbacks.export import PolicyExport
from sppo_lightning.datamodule import SelfPlayDataModule, self_play_data
from sppo_lightning.evaluation.gate import (
    Decision,
    read_decisions,
    steps_back,
    write_decisions,
)
from sppo_lightning.evaluation.stored import load_evaluation
from sppo_lightning.resume.checkpoints import check_sharded_metadata
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.system.durable import fresh_folder, replace_folder, restore_replaced
from sppo_lightning.training.hardware import is_dev_run
from sppo_lightning.types import UserError

Action = Literal["warn", "stop", "revert"]
DIAGNOSTICS = ("learning/", "val/")


class IterationGate(SelfPlayCallback):
    """Compares the policy at each iteration's end with the best so far, and acts where it is a step back.

    A step back: its held-out reward lies below that of the best policy so far (the initial one included) by more than
    ``tolerance`` standard errors of their paired difference, more of its answers have no reward, or a diagnostic is
    over its bound. What was decided is stored in ``gate.json``, and a run that is resumed decides the same.

    A chance fall passes the tolerance too: of policies that are all alike, about one in six falls by more than 1
    standard error, one in forty by more than 2, and more against the best of several. The best one's reward was
    selected on these prompts, and is optimistic: ``data.test_prompts`` tell.

    To revert, the trained weights of the best policy are kept in ``checkpoints/weights-NNN``.

    Args:
        action: ``warn``: say so and go on; ``stop``: end the run; ``revert``: go on from the best policy so far, with a
            smaller learning rate.
        tolerance: standard errors that the held-out reward may fall, 0 or more.
        bounds: largest values of diagnostics, by the names that ``LearningDiagnostics`` logs them under, e.g.
            ``val/response_length/growth``, or the evaluation, e.g. ``val/failed/share``.
        learning_rate_factor: scales the learning rate after each step back that is reverted, in (0, 1].
    """

    free_settings: ClassVar[frozenset[str]] = frozenset({"action"})
    """What a run that resumes may change: it decides the iterations to come."""

    def __init__(
        self,
        action: Action = "revert",
        tolerance: float = 2.0,
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
        """Require held-out prompts, and to come before the export; put back what a killed run was about to replace."""
        data, callbacks = self_play_data(trainer), list(cast(Any, trainer).callbacks)
        if any(isinstance(other, IterationGate) for other in callbacks if other is not self):
            raise UserError("trainer.callbacks has two of IterationGate: leave one out")
        if any(isinstance(other, PolicyExport) for other in callbacks[: callbacks.index(self)]):
            raise UserError(
                "trainer.callbacks has PolicyExport before IterationGate, and would export what the gate gives up: put "
                "IterationGate first"
            )
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

    def on_iteration_start(self, trainer: pl.Trainer, data: SelfPlayDataModule, iteration: int) -> None:
        """Refuse to go on with a run that was stopped."""
        if is_dev_run(trainer) or self.action != "stop":
            return
        if any(
            item.finished == iteration and item.action == "stop" for item in self._decided(data, iteration)
        ):
            raise UserError(
                f"IterationGate stopped this run after {iteration} iteration(s): to go on from the policy that it "
                "refused, set the callback's action to warn or revert"
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
        fingerprint = data.module.trained_policy.current().fingerprint()
        decided = (
            self._before(data, iteration + 1, fingerprint)
            or self._decide(trainer, data, iteration + 1, earlier, fingerprint)
            if data.ranks.rank == 0
            else None
        )
        state = data.ranks.same(None if decided is None else decided.state())
        if state is None:
            rank_zero_warn(
                f"IterationGate decides nothing about the policy after {iteration + 1} iteration(s): its held-out "
                "answers, or those of the best policy so far, are not there."
            )
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

    def _before(self, data: SelfPlayDataModule, finished: int, fingerprint: str) -> Decision | None:
        """Return what was decided about this very policy before a kill, if it can be done now."""
        found = next((item for item in read_decisions(data.folder) if item.finished == finished), None)
        same = found is not None and found.fingerprint == fingerprint
        return found if same and found is not None and found.action in ("accept", self.action) else None

    def _decide(
        self,
        trainer: pl.Trainer,
        data: SelfPlayDataModule,
        finished: int,
        earlier: list[Decision],
        fingerprint: str,
    ) -> Decision | None:
        folder = data.folder
        before = earlier[-1].best if earlier else 0
        rows, best = (load_evaluation(folder.evaluation(f"{number:03d}")) for number in (finished, before))
        if rows is None or best is None:
            return None
        evaluated = {name: float(value) for name, value in trainer.callback_metrics.items()}
        diagnostics = {**evaluated, **folder.iteration(finished - 1).read_diagnostics()}
        for name in self.bounds.keys() - diagnostics.keys():
            rank_zero_warn(
                f"IterationGate.bounds: {name} was not measured in iteration {finished - 1}, and bounds nothing."
            )
        reasons, difference, stderr = steps_back(
            rows, best, diagnostics, tolerance=self.tolerance, bounds=self.bounds
        )
        factor = earlier[-1].learning_rate_factor if earlier else 1.0
        action = self.action
        if (
            reasons
            and action == "revert"
            and not data.module.trained_policy.keeps(folder.kept_weights(before))
        ):
            action = "warn"  # not to be undone
            reasons.append(
                f"{folder.kept_weights(before)}, to revert to, is not there, or of another strategy"
            )
        if reasons and action == "revert":
            factor *= self.learning_rate_factor
        return Decision(
            finished=finished,
            action=action if reasons else "accept",
            reasons=tuple(reasons),
            best=finished if not reasons and difference > 0 else before,
            difference=difference,
            stderr=stderr,
            learning_rate_factor=factor,
            fingerprint=fingerprint,
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
