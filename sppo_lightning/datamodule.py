"""The LightningDataModule: the loop's settings, their checks, and the dataloaders."""

from __future__ import annotations

import shutil
import tempfile
from datetime import date
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from sppo_lightning.difficulty import Reestimation, StatisticsTable
from sppo_lightning.evaluation.divergence import AnswerReader
from sppo_lightning.evaluation.held_out import EvaluationLoader, HeldOut
from sppo_lightning.generation import Generator
from sppo_lightning.iteration.builder import IterationBuilder
from sppo_lightning.iteration.rules import IterationRules
from sppo_lightning.iteration.state import IterationState
from sppo_lightning.pair_forward.layouts import PairLayout
from sppo_lightning.pairing import BestWorst, Pairing
from sppo_lightning.predictions import JSONLines, PredictionFormat
from sppo_lightning.predictions.answering import write_predictions
from sppo_lightning.preflight import encode_later, prepare_run, read_stage_prompts, shrink
from sppo_lightning.prompts.chat_template import set_template_clock
from sppo_lightning.prompts.reading import check_columns
from sppo_lightning.prompts.sets import PromptSets
from sppo_lightning.prompts.table import EncodedPrompts
from sppo_lightning.resume.position import fit_position, restore_position
from sppo_lightning.rewards import Reward
from sppo_lightning.rollouts.collector import Collector
from sppo_lightning.rollouts.scoring import UnfinishedRule
from sppo_lightning.selection import AllPairs, AllPrompts, Curriculum, RandomOrder, Schedule, Selection
from sppo_lightning.store.identity import identity
from sppo_lightning.store.legacy import legacy_description
from sppo_lightning.store.pairs import PairTable
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.system.rendezvous import FileRanks
from sppo_lightning.system.signals import StopSignal
from sppo_lightning.training.batching import PairBatch, PairDataset, check_pairs
from sppo_lightning.training.hardware import disable_slurm_requeue, is_dev_run, open_ranks
from sppo_lightning.training.protocol import (
    IterationObserver,
    PhaseObserver,
    SamplingObserver,
    SelfPlayModule,
)
from sppo_lightning.types import PhaseProgress, ResumeMode, UserError, first_line

Sources = str | list[str]


class SelfPlayDataModule(pl.LightningDataModule):
    """Samples, scores, selects and pairs, once an iteration, inside ``train_dataloader``.

    Args:
        prompts: training prompts: file(s), glob, folder, saved data set or data set of the hub, as
            :func:`~sppo_lightning.prompts.reading.read_prompts` takes them.
        iterations: self-play iterations.
        samples_per_prompt: responses that a pair is chosen from, at least 2.
        generator: answers prompts.
        reward: scores answers.
        selection: which prompts to train on, given their difficulty.
        pairs_per_step: pairs of one optimizer step, all devices together.
        batch_size: pairs of one micro-batch on one device.
        epochs_per_iteration: passes over an iteration's pairs.
        steps_per_iteration: optimizer steps of an iteration, instead: its pairs are passed over again, in another
            order, until these are taken; where there are more pairs, random ones are left out. For runs that are
            compared at equal training.
        probe_samples: responses that a difficulty is estimated from; ``None``: ``samples_per_prompt``.
        schedule: candidate prompts of each iteration; default ``AllPrompts``.
        curriculum: order of the pairs; default ``RandomOrder``.
        pairing: a prompt's pairs of a chosen and a rejected response; default ``BestWorst``.
        pair_selection: which pairs to keep, given their statistics; default ``AllPairs``.
        eval_prompts: held-out prompts, evaluated before the first and after each iteration.
        eval_share: share of ``prompts`` that is held out instead, and not trained on, where ``eval_prompts`` is not
            set: at most 200 prompts, and none where that would be fewer than 20. ``None``: none; the command line's
            default is 0.1.
        test_prompts: held-out prompts of ``test``.
        predict_prompts: prompts of ``predict``.
        predict_format: in which ``predict`` writes the answers; default ``JSONLines``. On the command line also
            ``--format NAME``: jsonl, alpaca_eval, arena_hard or mt_bench.
        columns: the files' own names of ``prompt``, ``answer`` and ``id``, where they have others; for all prompts.
        max_prompt_tokens: longer prompts are dropped and counted, never truncated.
        prompts_per_shard: prompts of one rollout file, the unit of work and of recovery; ``None``: by the number of
            prompts and of their responses, see :func:`~sppo_lightning.rollouts.shard_size.prompts_per_shard`.
        keep_iterations: how many of the latest finished iterations keep their responses on disk; the others keep
            manifest, difficulties and pairs. ``None``: all.
        system_prompt: opens the conversations that have no system message of their own; the policy sees it, the
            reward does not.
        unfinished: what becomes of a response that its length limit cut: ``keep`` it as it is, ``drop`` it, or
            ``penalise`` it. Held-out answers are always kept.
        unfinished_penalty: taken off the reward of such a response; with ``penalise`` only.
        max_failed_share: share of a phase's responses that may fail (no finite reward, no answer from a server),
            in [0, 1]; more is an error.
        memory_check: what becomes of a run that is estimated to need more memory than its device has.
        resume: what ``fit`` does with a folder that holds a run of this config: ``auto`` resumes it; ``never``
            refuses it; ``must`` refuses one that has no checkpoint. The command line reads it.
        seed: decides every random choice of the loop; linked to ``seed_everything`` by the CLI.
    """

    free_settings: ClassVar[frozenset[str]] = frozenset(
        {"batch_size", "resume", "keep_iterations", "max_failed_share", "memory_check"}
        | {"test_prompts", "predict_prompts", "predict_format"}
    )
    """Arguments that decide speed, place or display, never results: a run that resumes may change them."""

    def __init__(
        self,
        prompts: Sources,
        iterations: int,
        samples_per_prompt: int,
        generator: Generator,
        reward: Reward,
        selection: Selection,
        pairs_per_step: int,
        batch_size: int,
        epochs_per_iteration: int = 1,
        steps_per_iteration: int | None = None,
        probe_samples: int | None = None,
        schedule: Schedule | None = None,
        curriculum: Curriculum | None = None,
        pairing: Pairing | None = None,
        pair_selection: Selection | None = None,
        eval_prompts: Sources | None = None,
        eval_share: float | None = None,
        test_prompts: Sources | None = None,
        predict_prompts: Sources | None = None,
        predict_format: PredictionFormat | None = None,
        columns: dict[str, str] | None = None,
        max_prompt_tokens: int = 1024,
        prompts_per_shard: int | None = None,
        keep_iterations: int | None = None,
        system_prompt: str | None = None,
        unfinished: Literal["keep", "drop", "penalise"] = "keep",
        unfinished_penalty: float | None = None,
        max_failed_share: float = 0.5,
        memory_check: Literal["refuse", "warn"] = "refuse",
        resume: ResumeMode = "auto",
        seed: int = 42,
    ) -> None:
        super().__init__()
        sizes = {
            "epochs_per_iteration": epochs_per_iteration,
            "max_prompt_tokens": max_prompt_tokens,
            "prompts_per_shard": prompts_per_shard,
            "keep_iterations": keep_iterations,
        }
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{name}={value} must be at least 1")
        check_columns(columns or {})
        if eval_share is not None and not 0 <= eval_share < 1:
            raise ValueError(f"data.eval_share={eval_share} must lie in [0, 1)")
        if eval_share and eval_prompts is not None:
            raise ValueError(
                f"data.eval_share={eval_share} holds prompts out where data.eval_prompts is not set: leave out one of "
                "the two"
            )
        if steps_per_iteration is not None and epochs_per_iteration != 1:
            raise ValueError(
                f"data.steps_per_iteration={steps_per_iteration} says how often pairs are passed over: leave out "
                "data.epochs_per_iteration"
            )
        if not 0 <= max_failed_share <= 1:
            raise ValueError(f"data.max_failed_share={max_failed_share} must lie in [0, 1]")
        self.unfinished = UnfinishedRule(unfinished, unfinished_penalty)
        self.max_failed_share = max_failed_share
        self.memory_check = memory_check
        self.resume = resume
        self.rules = IterationRules(
            iterations=iterations,
            samples_per_prompt=samples_per_prompt,
            probe_samples=samples_per_prompt if probe_samples is None else probe_samples,
            pairs_per_step=pairs_per_step,
            batch_size=batch_size,
            schedule=schedule or AllPrompts(),
            selection=selection,
            pairing=pairing or BestWorst(),
            pair_selection=pair_selection or AllPairs(),
            seed=seed,
            curriculum=curriculum or RandomOrder(),
            steps_per_iteration=steps_per_iteration,
        )
        self.generator = generator
        self.reward = reward
        self.predict_format = predict_format or JSONLines()
        self._provenance, self._legacy_provenance = (
            {"generator": describe(generator), "reward": describe(reward), "system_prompt": system_prompt}
            for describe in (identity, legacy_description)
        )
        self.epochs_per_iteration = epochs_per_iteration
        self.prompts_per_shard = prompts_per_shard
        self.keep_iterations = keep_iterations
        self.prompt_sets = PromptSets(
            {
                "prompts": prompts,
                "eval_prompts": eval_prompts,
                "test_prompts": test_prompts,
                "predict_prompts": predict_prompts,
            },
            max_prompt_tokens,
            system_prompt,
            columns or {},
            eval_share or 0.0,
            seed,
        )
        self.stop = StopSignal()
        self.ranks: FileRanks = FileRanks(
            Path(), rank=0, world_size=1
        )  # until set-up says how many there are
        self.folder = RunFolder(Path())
        self._state = self._fresh_state()

    # ------------------------------------------------------------------ set-up

    def setup(self, stage: str) -> None:
        """Read and check the prompts, before any model loads."""
        assert self.trainer is not None
        self.folder = RunFolder(Path(self.trainer.default_root_dir))
        if self.keep_iterations is not None and stage == "fit" and not self.trainer.checkpoint_callbacks:
            raise UserError(
                f"data.keep_iterations={self.keep_iterations} deletes what a checkpoint has finished, but "
                "trainer.enable_checkpointing=false writes none: leave out one of them"
            )
        disable_slurm_requeue(self.trainer)
        self.ranks = open_ranks(self.trainer, self.folder.root)
        # of one process: others may have started on another side of midnight
        day = self.ranks.same(self.module.policy_spec.config.template_date)
        set_template_clock(None if day is None else date.fromisoformat(day))
        if stage == "fit" and is_dev_run(self.trainer):
            read_stage_prompts(self.prompt_sets, stage)
            self.rules = shrink(self.prompt_sets, self.rules)
        prepare_run(stage, self.trainer, self.module, self, self.ranks)
        if is_dev_run(self.trainer):
            own = tempfile.mkdtemp(prefix="sppo-dev-") if self.ranks.rank == 0 else ""
            self.folder = RunFolder(Path(self.ranks.same(own)))
        reverted = self._state.reverted
        self._state = self._fresh_state()
        if stage != "fit":  # of the policy that fit has left in memory
            self._state.reverted = reverted

    def _fresh_state(self) -> IterationState:
        return IterationState(self.folder, self.rules, epochs=self.epochs_per_iteration, ranks=self.ranks)

    def teardown(self, stage: str) -> None:
        """Listen to signals no longer, part from the other processes, and remove what a dev run left."""
        assert self.trainer is not None
        self.stop.ignore()
        self.ranks.close()
        if is_dev_run(self.trainer) and self.ranks.rank == 0:
            shutil.rmtree(self.folder.root, ignore_errors=True)

    def on_exception(self, exception: BaseException) -> None:
        """Listen to signals no longer, and tell the other processes that this one ends, and why."""
        self.stop.ignore()
        self.ranks.fail(first_line(exception))
        self.ranks.close()

    @property
    def module(self) -> SelfPlayModule:
        """The module that is being trained."""
        assert self.trainer is not None
        module = self.trainer.lightning_module
        if not isinstance(module, SelfPlayModule):
            raise UserError(
                f"SelfPlayDataModule feeds a PreferenceModule (or another module that has what "
                f"sppo_lightning.training.protocol.SelfPlayModule names), got {type(module).__name__}"
            )
        return module

    def _encoded(self, key: str) -> EncodedPrompts:
        spec = self.module.policy_spec
        return self.prompt_sets.encode(key, spec.tokenizer, spec.config.chat_template_kwargs)

    def _collector(self) -> Collector:
        return Collector(
            generator=self.generator,
            reward=self.reward,
            device=self.module.device,
            seed=self.rules.seed,
            prompts_per_shard=self.prompts_per_shard,
            ranks=self.ranks,
            report=self._report,
            unfinished=self.unfinished,
            max_failed_share=self.max_failed_share,
        )

    def _report(self, progress: PhaseProgress) -> None:
        """Tell the Trainer's callbacks how far a phase has come."""
        assert self.trainer is not None
        for callback in cast(Any, self.trainer).callbacks:
            if progress.under_way and isinstance(callback, SamplingObserver):
                callback.on_sampling_progress(self.trainer, progress)
            elif not progress.under_way and isinstance(callback, PhaseObserver):
                callback.on_phase_progress(self.trainer, progress)

    # ---------------------------------------------------------------- training

    def train_dataloader(self) -> DataLoader[PairBatch | None]:
        """Ensure the current iteration's data, and return its pairs in training order.

        After a resume, what is left of them.
        """
        assert self.trainer is not None
        self._listen()
        epochs, step = self.epochs_per_iteration, self.trainer.global_step
        policy = self.module.trained_policy.current()
        epoch = self._state.resume(step, embedding_rows=policy.embedding_rows)
        if epoch is not None:
            over = self.iteration_is_trained and epoch // epochs == self._state.current
            restore_position(self.trainer, epoch, only_its_end=over)
        # of a finished run Lightning asks for one epoch more, before it looks
        epoch = min(self.trainer.current_epoch, self.rules.iterations * epochs - 1)
        iteration, epoch_in_iteration = divmod(epoch, epochs)
        if iteration > self._state.current:
            for callback in cast(Any, self.trainer).callbacks:
                if isinstance(callback, IterationObserver):
                    callback.on_iteration_start(self.trainer, self, iteration)
            if iteration == 0 and self.prompt_sets.named("eval_prompts"):
                self._held_out("eval_prompts").measure(0)
            self._state.enter(
                iteration,
                policy_fingerprint=policy.fingerprint(),
                embedding_rows=policy.embedding_rows,
                builder=self._builder,
                global_step=step,
            )
        else:
            self._state.reopen(embedding_rows=policy.embedding_rows)
        check_pairs(self.pairs, self.module.loss)
        sampler = self._state.steps(epoch_in_iteration, global_step=step)
        if self.steps_taken == 0:
            self._log_iteration()
        dataset = PairDataset(self.pairs, self._pair_layout)
        return DataLoader(
            dataset,
            sampler=sampler,
            batch_size=None,
            pin_memory=self.module.device.type == "cuda",
            generator=torch.Generator(),  # else it draws from torch's own one, once more in a run that was resumed
        )

    @property
    def _pair_layout(self) -> PairLayout:
        return self.module.pair_layout(self.prompt_sets.max_tokens + self.generator.max_new_tokens)

    def _builder(self) -> IterationBuilder:
        return IterationBuilder(
            rules=self.rules,
            prompts=self._encoded("prompts").by_id(),
            too_long=self.prompt_sets.too_long("prompts"),
            collector=self._collector(),
            policy=self.module.trained_policy.current(),
            provenance={**self._provenance, "unfinished": vars(self.unfinished)},
            reference=self.module.reference if self.module.loss.needs_reference else None,
            stores_token_logps=self.module.loss.needs_token_logps,
            layout=self._pair_layout,
        )

    def _listen(self) -> None:
        """Listen to signals that ask the run to stop; Lightning's own handler waits for all processes inside of it."""
        assert self.trainer is not None
        launcher = self.trainer.strategy.launcher
        self.stop.listen(forward=None if launcher is None else launcher.kill)

    # -------------------------------------------------------------- iterations

    @property
    def steps_taken(self) -> int:
        """Optimizer steps taken in the current iteration."""
        assert self.trainer is not None
        return self._state.steps_taken(self.trainer.global_step)

    @property
    def iteration_is_trained(self) -> bool:
        """Whether all optimizer steps of the current iteration have been taken."""
        assert self.trainer is not None
        return self._state.is_trained(self.trainer.global_step)

    @property
    def current_iteration(self) -> int:
        """The iteration whose data was made last; -1 before the first."""
        return self._state.current

    @property
    def pairs(self) -> PairTable:
        """The current iteration's pairs, in pair order."""
        return self._state.pairs

    @property
    def reestimation(self) -> Reestimation | None:
        """What ``DifficultyReestimation`` found due when the next iteration starts."""
        return self._state.due

    @reestimation.setter
    def reestimation(self, due: Reestimation | None) -> None:
        self._state.due = due

    def difficulty_after(self, iteration: int) -> StatisticsTable:
        """Return the difficulties known once ``iteration``, the one made last, has all its rollouts."""
        return self._state.difficulty_after(iteration)

    @property
    def iteration_ends(self) -> bool:
        """Whether the trainer stands at the end of an iteration's last epoch."""
        assert self.trainer is not None
        position = fit_position(self.trainer)
        return position.epoch_is_over and position.trained % self.epochs_per_iteration == 0

    def reverted(self, finished: int, *, to: int) -> None:
        """Take note that the policy is an earlier one again.

        Args:
            finished: iterations that the policy was trained for that was given up.
            to: iterations that the policy was trained for which the run goes on from.
        """
        self._state.reverted = (finished, to)

    def policy_after(self, finished: int) -> int:
        """Return the iterations that the policy was trained for which the run has after ``finished`` iterations."""
        return self._state.evaluated_as(finished)

    def iteration_metrics(self) -> dict[str, float]:
        """Return what the loggers get about the current iteration's data."""
        return self._state.metrics()

    def _log_iteration(self) -> None:
        """Log what the current iteration's data is like, before its first step."""
        assert self.trainer is not None
        metrics = self.iteration_metrics()
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step)

    # -------------------------------------------------------------- evaluation

    def _held_out(self, key: str) -> HeldOut:
        prefix = "" if key == "eval_prompts" else f"{key.removesuffix('_prompts')}-"
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        return HeldOut(
            folder=self.folder,
            prefix=prefix,
            prompts=self._encoded(key),
            collector=self._collector(),
            policy=self.module.trained_policy,
            provenance=self._provenance,
            legacy_provenance=self._legacy_provenance,
            replace_others=fitting,
        )

    def _evaluation_loader(self, key: str) -> EvaluationLoader:
        assert self.trainer is not None
        self._listen()
        if self.trainer.state.fn != "fit" and self._state.ends_inside:
            raise UserError(
                "the checkpoint was saved inside an iteration: only the policy at an iteration's end is compared with "
                "others; let fit reach that end first"
            )
        held_out = self._held_out(key)
        return EvaluationLoader(
            lambda: held_out.measure(self._finished_iterations()), len(held_out.prompts), self.ranks
        )

    def val_dataloader(self) -> Any:
        """Return the held-out evaluation of the policy as it is when the loader is read."""
        return self._evaluation_loader("eval_prompts") if self.prompt_sets.named("eval_prompts") else []

    def test_dataloader(self) -> Any:
        """Return the evaluation on ``test_prompts``."""
        return self._evaluation_loader("test_prompts")

    def _finished_iterations(self) -> int:
        assert self.trainer is not None
        position = fit_position(self.trainer)
        trained = (position.trained + position.inside) // self.epochs_per_iteration
        return self._state.evaluated_as(max(trained, self._state.finished))

    def answer_reader(self) -> AnswerReader:
        """Return what reads held-out answers with the policy as it is now."""
        return AnswerReader(
            self._encoded("eval_prompts"),
            self.module.reference.policy_logps_by_token,
            self._pair_layout,
            self.rules.batch_size,
        )

    def predict_dataloader(self) -> DataLoader[Any]:
        """Answer ``predict_prompts`` greedily into a file of ``predict_format``."""
        self._listen()
        place, lines = write_predictions(
            self.folder,
            self.prompt_sets.records("predict_prompts"),
            self._encoded("predict_prompts"),
            format=self.predict_format,
            encode=encode_later(self.prompt_sets, self.module, self.generator),
            collector=self._collector(),
            policy=self.module.trained_policy.current(),
        )
        finished = self._finished_iterations()
        who = f"the policy after {finished} iteration(s)" if finished else "the initial policy"
        rank_zero_info(f"{len(lines)} answers of {who} written to {place}")
        return DataLoader(cast(Any, lines), batch_size=None)

    # ------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs in addition to the run folder."""
        assert self.trainer is not None
        finished = fit_position(self.trainer).trained // self.epochs_per_iteration
        return self._state.state_dict(finished=finished, global_step=self.trainer.global_step)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume where a checkpoint was saved."""
        self._state.load_state_dict(state_dict)


def self_play_data(trainer: pl.Trainer) -> SelfPlayDataModule:
    """Return a Trainer's data module, for callbacks of the loop.

    Raises:
        UserError: if it is none of this package's.
    """
    datamodule = cast(Any, trainer).datamodule
    if not isinstance(datamodule, SelfPlayDataModule):
        raise UserError(f"the loop's callbacks need a SelfPlayDataModule, got {type(datamodule).__name__}")
    return datamodule
