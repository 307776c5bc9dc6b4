"""The LightningModule: a policy, its frozen reference, a preference loss. Formulas live elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sppo_lightning.evaluation.measures import EvaluationBatch
from sppo_lightning.evaluation.metrics import EvaluationMetrics
from sppo_lightning.losses import PreferenceLoss
from sppo_lightning.pair_forward import AutoForward, PairForward
from sppo_lightning.pair_forward.layouts import PairLayout
from sppo_lightning.pair_forward.logprobs import summed
from sppo_lightning.policy.config import PolicyConfig
from sppo_lightning.policy.rounding import check_updates_survive
from sppo_lightning.policy.spec import PolicySpec
from sppo_lightning.policy.trained import TrainedPolicy, load_trained_policy
from sppo_lightning.schedules import LearningRateSchedule, Linear
from sppo_lightning.seeding import derive_seed
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.training.batching import PairBatch
from sppo_lightning.training.checkpoints import (
    DeferredOptimizers,
    check_trained_weights,
    keep_trained,
    leave_out_optimizer_state,
)
from sppo_lightning.training.forward import prepared_layout
from sppo_lightning.training.hardware import check_hardware, compute_dtype
from sppo_lightning.training.metrics import StepMetrics
from sppo_lightning.training.optimizers import (
    OptimizerFactory,
    build_optimizer,
    clip_gradients,
    clips_unscaled,
    reset_state,
)
from sppo_lightning.training.protocol import SelfPlayModule
from sppo_lightning.training.reference import FrozenReference


class PreferenceModule(SelfPlayModule):
    """Trains a policy on preference pairs against a frozen reference.

    Args:
        policy: which model, and how to hold it.
        loss: preference loss.
        learning_rate: peak rate of each iteration.
        reference: ``previous_iteration``: the policy as it was when the iteration started; ``initial``: the
            policy that the run started from.
        lr_schedule: the rate within an iteration, as a share of the peak; default: linear, warm-up 0.1.
        optimizer: optimizer class; default AdamW, fused unless gradients are scaled and clipped (float16). Its
            own ``lr`` and ``weight_decay`` are not used.
        weight_decay: decoupled decay of matrices (not of norms and biases), per step and unit of rate.
        carry_optimizer: keep the optimizer's state from one iteration to the next, instead of clearing it.
        pair_forward: how log-probs are computed; default: the fastest way that this model can take.
    """

    free_settings: ClassVar[frozenset[str]] = frozenset({"pair_forward"})
    """Arguments that decide speed or place, never results: a run that resumes may change them."""

    def __init__(
        self,
        policy: PolicyConfig,
        loss: PreferenceLoss,
        learning_rate: float,
        reference: Literal["previous_iteration", "initial"],
        lr_schedule: LearningRateSchedule | None = None,
        optimizer: OptimizerFactory | None = None,
        weight_decay: float = 0.0,
        carry_optimizer: bool = False,
        pair_forward: PairForward | None = None,
    ) -> None:
        super().__init__()
        if not learning_rate > 0:
            raise ValueError(f"model.learning_rate={learning_rate} must be greater than 0")
        if weight_decay < 0:
            raise ValueError(f"model.weight_decay={weight_decay} must be 0 or more")
        if type(loss) is PreferenceLoss:
            raise ValueError("model.loss: PreferenceLoss says only what a loss is; name one, e.g. DPOLoss")
        self.pair_forward = pair_forward or AutoForward()
        self.policy_spec = PolicySpec(policy)
        self.reference = FrozenReference(
            lambda: self.trained_policy, self.pair_forward, kind=reference, trainer=lambda: self.trainer
        )
        self.loss = loss
        self.learning_rate = learning_rate
        self.lr_schedule = lr_schedule or Linear()
        self.optimizer_factory = optimizer
        self.weight_decay = weight_decay
        self.carry_optimizer = carry_optimizer
        self.strict_loading = False  # checkpoints hold what was trained; their names are compared
        self.policy: nn.Module | None = None
        self._trained_policy: TrainedPolicy | None = None
        self.step_metrics = StepMetrics(loss)
        self.evaluation_metrics = EvaluationMetrics()
        self._deferred = DeferredOptimizers()  # while sharded weights are loaded
        self._pair_layout: PairLayout | None = None
        self._iteration_is_trained = False
        self._optimizers_are_reset = False

    # ------------------------------------------------------------------ set-up

    def setup(self, stage: str) -> None:
        """Check everything that can be checked before weights are loaded."""
        self.check()

    def teardown(self, stage: str) -> None:
        """Leave a policy that generates."""
        if self.policy is not None:
            self.trained_policy.cleanup_sampling_weights()
            self.pair_forward.release(self.policy)

    def check(self) -> None:
        """Raise :class:`~sppo_lightning.types.UserError` if the Trainer or the policy's settings do not fit."""
        check_hardware(self.trainer)
        self.policy_spec.check(compute_dtype=self.compute_dtype, device=self.trainer.strategy.root_device)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the trainer's matrix products."""
        return compute_dtype(self.trainer)

    def configure_model(self) -> None:
        """Load the policy, once."""
        if self.policy is not None:
            return
        mesh = None if self.device_mesh is None else self.device_mesh["data_parallel"]
        self._trained_policy = load_trained_policy(
            self.policy_spec,
            mesh,
            steps=lambda: self.trainer.global_step,
            release=self.pair_forward.release,
            workspace=RunFolder(Path(self.trainer.default_root_dir)).sampling,
        )
        self.policy = self._trained_policy.model
        check_updates_survive(self._trainable(), self.learning_rate)

    @property
    def trained_policy(self) -> TrainedPolicy:
        """The policy that is being trained, with its snapshots."""
        assert self._trained_policy is not None, "configure_model() comes first"
        return self._trained_policy

    def pair_layout(self, longest: int) -> PairLayout:
        """Return the layout that micro-batches must have; the first call checks the forward on the policy.

        Args:
            longest: most tokens of prompt and response together that may come.
        """
        assert self.policy is not None
        if self._pair_layout is None:
            self._pair_layout = prepared_layout(
                self.pair_forward, self.policy, self.policy_spec.tokenizer, self.trainer, longest=longest
            )
            if self.policy_spec.config.lora is not None and self.loss.needs_reference:
                self.reference.check_is_frozen(self._pair_layout)
        return self._pair_layout

    def _trainable(self) -> list[nn.Parameter]:
        assert self.policy is not None
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def configure_optimizers(self) -> Optimizer:
        """Build the optimizer; the rate is set at every batch."""
        return build_optimizer(
            self.optimizer_factory,
            self._trainable(),
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            clips_unscaled=clips_unscaled(self.compute_dtype, clips=bool(self.trainer.gradient_clip_val)),
        )

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of an optimizer step.

        Lightning refuses fused optimizers under every mixed precision, though only float16's scaler is in the way, and
        clips values in a way that sharded weights have not.
        """
        own = self.compute_dtype == torch.bfloat16 or self.trained_policy.is_sharded
        if own and gradient_clip_val is not None and gradient_clip_val > 0:
            clip_gradients(self._trainable(), gradient_clip_val, algorithm=gradient_clip_algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # ---------------------------------------------------------------- training

    def on_fit_start(self) -> None:
        """Defer the optimizers of sharded weights until those are loaded."""
        if self.trained_policy.is_sharded:
            self._deferred.take_from(self.trainer)

    def on_train_start(self) -> None:
        """Have the optimizers back."""
        self._deferred.give_back_to(self.trainer)

    def on_train_epoch_start(self) -> None:
        """Begin an epoch."""
        assert self.policy is not None
        self.trained_policy.cleanup_sampling_weights()
        self.policy.train()
        self._iteration_is_trained = False
        if self.learning_rate_factor != 1:
            check_updates_survive(self._trainable(), self.learning_rate * self.learning_rate_factor)

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        """Set the learning rate, a function of the step in the iteration."""
        slot = batch.slot
        if slot.first_in_step:  # an adapter's dropout draws from torch's own generator
            torch.manual_seed(
                derive_seed(slot.seed, "step", self.trainer.global_step, self.trainer.global_rank)
            )
        rate = self.learning_rate * self.learning_rate_factor * self.lr_schedule.factor(slot.step, slot.steps)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the micro-batch's share of the step's mean loss, scaled for Lightning's accumulation."""
        assert self.policy is not None
        if batch.slot.step == 0 and self.loss.needs_reference:
            self.reference.check_start(self.policy, batch, iteration_is_first=self.trainer.current_epoch == 0)
        tokens, entropy = self.pair_forward.read_pairs(
            self.policy, batch.rows, with_entropy=self.loss.needs_collision_entropy
        )
        policy = summed(tokens)
        read = tokens if self.loss.needs_token_logps else None
        terms = self.loss.terms(batch.loss_inputs(policy, read, entropy))
        self.step_metrics.update(policy, batch.reference, terms, batch.weights)
        if batch.slot.last_in_step:
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            self.log_dict({**self.step_metrics.result(), "train/lr": rate}, batch_size=1)
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / batch.slot.step_pairs
        return (terms.loss * batch.weights).sum() * scale

    def on_train_batch_end(self, outputs: Any, batch: PairBatch | None, batch_idx: int) -> None:
        """Free what is not needed any more."""
        if batch is None:  # a resumed run whose iteration has no step left
            self._iteration_is_trained = True
            return
        if batch.slot.last_in_step:
            self._optimizers_are_reset = False
            self._iteration_is_trained = batch.slot.ends_iteration
            for optimizer in self.trainer.optimizers:
                optimizer.zero_grad()  # Lightning would, but only after the next forward, whose peak they add to
                if batch.slot.ends_iteration and not self.carry_optimizer:
                    reset_state(optimizer)  # before the next iteration samples, rather than when it trains

    def reset_optimizers(self) -> None:
        """Clear what the optimizers know, and keep no state of theirs until they step again."""
        super().reset_optimizers()
        self._optimizers_are_reset = True

    # -------------------------------------------------------------- evaluation

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Aggregate stored, scored answers."""
        self.evaluation_metrics.update(batch)

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Aggregate stored, scored answers."""
        self.evaluation_metrics.update(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the evaluation."""
        self.log_dict(self.evaluation_metrics.result("val"), rank_zero_only=False)

    def on_test_epoch_end(self) -> None:
        """Log the evaluation."""
        self.log_dict(self.evaluation_metrics.result("test"), rank_zero_only=False)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Return stored answers."""
        return batch

    # ------------------------------------------------------------- checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the trained weights only: what checkpoints hold, and what is asked of them."""
        state = super().state_dict(*args, **kwargs)
        keep_trained(state, self.policy, prefix=kwargs.get("prefix", ""))
        return state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep no optimizer state that has been reset."""
        if self._optimizers_are_reset or (self._iteration_is_trained and not self.carry_optimizer):
            leave_out_optimizer_state(checkpoint, self.trainer.optimizers)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another policy; have the optimizers of sharded weights back, and load their state."""
        self._deferred.give_back_to(self.trainer)
        check_trained_weights(checkpoint, self, self.policy, sharded=self.trained_policy.is_sharded)
