"""How far a run has come: which iteration's data is made, what is known about difficulty, what is due next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sppo_lightning.difficulty import Reestimation, StatisticsTable, empty_difficulty_table
from sppo_lightning.iteration.builder import IterationBuilder, difficulty_after
from sppo_lightning.iteration.rules import IterationRules
from sppo_lightning.seeding import distinct, random_keys
from sppo_lightning.store.integrity import check_trained, quarantine_damaged
from sppo_lightning.store.iterations import IterationStore
from sppo_lightning.store.pairs import PairTable
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.training.batching import StepSampler, pairs_consumed
from sppo_lightning.training.iteration_length import steps_taken
from sppo_lightning.types import Ranks, UserError


class IterationState:
    """What a run carries from one self-play iteration to the next, in addition to the policy's weights.

    The data itself lies in the run's folder. This says how far it goes, and is part of a checkpoint.

    Args:
        folder: the run.
        rules: settings of an iteration, and what its rules know.
        epochs: passes over an iteration's pairs.
        ranks: the processes that share the run.
    """

    def __init__(self, folder: RunFolder, rules: IterationRules, *, epochs: int, ranks: Ranks) -> None:
        self.folder = folder
        self.rules = rules
        self.epochs = epochs
        self.ranks = ranks
        self.current = -1  # iteration whose data was made last
        self.known = empty_difficulty_table()  # before that iteration
        self.pairs = PairTable.collect([])  # of that iteration, in pair order; not in a checkpoint
        self.due: Reestimation | None = None  # when the next iteration starts
        self.finished = 0  # iterations that the loaded checkpoint has finished
        self.reverted: tuple[int, int] | None = (
            None  # iterations of the policy given up, and of the one after
        )
        self._rule_states: Mapping[str, Any] | None = None  # what the rules know; None: they are fresh
        self._orders: list[Tensor] = []  # of the current iteration's pairs, one an epoch
        self._first_step = 0  # optimizer steps of the run before the current iteration
        self._provenance: dict[str, str | None] = {}  # fingerprints that the current data come from
        self._consumed: int | None = (
            None  # pairs of the current iteration, as a checkpoint says that was just loaded
        )

    def enter(
        self,
        iteration: int,
        *,
        policy_fingerprint: str,
        embedding_rows: int,
        builder: Callable[[], IterationBuilder],
        global_step: int,
    ) -> None:
        """Make the data of an iteration that no optimizer step has been taken in, as far as it is not stored.

        Args:
            iteration: self-play iteration, the one after the current.
            policy_fingerprint: of the weights that enter the iteration.
            embedding_rows: of the policy; stored data with other token ids is damaged.
            builder: called only where data is missing.
            global_step: optimizer steps of the run so far.

        Raises:
            UserError: if another policy's data is stored.
        """
        known = self.difficulty_after(iteration - 1) if iteration > 0 else self.known
        first = self.folder.iteration(0).read_manifest() if iteration > 0 else None
        store = self.folder.iteration(iteration)
        manifest = store.read_manifest()
        if manifest is not None and manifest["policy_fingerprint"] != policy_fingerprint:
            raise UserError(
                f"{store.folder} was sampled from another policy than the one that enters iteration {iteration}: "
                "delete the run folder to start anew, or continue from its checkpoints/last.ckpt"
            )
        if not quarantine_damaged(store, self.ranks, embedding_rows=embedding_rows):
            self._restore_rules()
            builder().build(
                store,
                iteration=iteration,
                previous=known,
                reestimation=self.due,
                policy_fingerprint=policy_fingerprint,
                first_reference=None if first is None else first.get("reference_fingerprint"),
                earlier=[self.folder.iteration(number) for number in range(iteration)],
            )
        if self.ranks.rank == 0:
            store.reference_parts.remove()
        # only now: a checkpoint that an error saved before is resumed with what was known then
        self.known, self.current, self._first_step = known, iteration, global_step
        self.pairs, self._orders = store.read_pairs(), []
        self._provenance = _provenance(store)

    def reopen(self, *, embedding_rows: int) -> None:
        """Read the pairs of the current iteration, which has been trained on, unless they are here.

        Args:
            embedding_rows: of the policy.

        Raises:
            UserError: if they are no longer stored, or are not those that the checkpoint was trained on.
        """
        if self.pairs:
            return
        store = self.folder.iteration(self.current)
        check_trained(store, embedding_rows=embedding_rows)
        if _provenance(store) != self._provenance:
            raise UserError(
                f"{store.folder} was made from other weights than the data that the checkpoint was trained on: restore "
                "it, or start anew in another trainer.default_root_dir"
            )
        self.pairs = store.read_pairs()

    def resume(self, global_step: int, *, embedding_rows: int) -> int | None:
        """Take up a loaded checkpoint, and return the run's epoch in which to resume.

        ``None`` if none was loaded since the last call.

        Args:
            global_step: optimizer steps before the checkpoint.
            embedding_rows: of the policy.
        """
        consumed, self._consumed = self._consumed, None
        if consumed is None:
            return None
        first = self.current * self.epochs
        self.reopen(embedding_rows=embedding_rows)
        self._first_step = global_step - self._steps(consumed)
        if self.finished > self.current:
            return first + self.epochs
        # the last epoch's end may still have to come
        return first + min(consumed // self.pairs_per_epoch, self.epochs - 1)

    def evaluated_as(self, finished: int) -> int:
        """Return the iterations after which the policy was evaluated, ``finished`` unless the run reverted then."""
        return self.reverted[1] if self.reverted is not None and self.reverted[0] == finished else finished

    @property
    def pairs_per_epoch(self) -> int:
        """Pairs that an epoch of the current iteration takes: all, unless its number of optimizer steps is set."""
        return self.rules.pairs_per_iteration or len(self.pairs)

    @property
    def ends_inside(self) -> bool:
        """Whether the loaded checkpoint was saved before its iteration was over."""
        return bool(self._consumed) and self.finished <= self.current

    def steps_taken(self, global_step: int) -> int:
        """Return the optimizer steps taken in the current iteration.

        Args:
            global_step: optimizer steps of the run so far.
        """
        return global_step - self._first_step

    def is_trained(self, global_step: int) -> bool:
        """Return whether all optimizer steps of the current iteration have been taken.

        Args:
            global_step: optimizer steps of the run so far.
        """
        every = self.pairs_per_epoch * self.epochs
        return len(self.pairs) > 0 and self.steps_taken(global_step) == self._steps(every)

    def _steps(self, consumed: int) -> int:
        """Return the optimizer steps that the first ``consumed`` pairs of the current iteration take."""
        return steps_taken(consumed, pairs=self.pairs_per_epoch, pairs_per_step=self.rules.pairs_per_step)

    def steps(self, epoch: int, *, global_step: int) -> StepSampler:
        """Return the optimizer steps of one epoch over the pairs that are still to be taken, in training order.

        Args:
            epoch: of the iteration, from 0.
            global_step: optimizer steps of the run so far.
        """
        if not self._orders:
            self._orders = self._ordered(self.folder.iteration(self.current))
        rules = self.rules
        return StepSampler(
            self._orders[epoch].tolist(),
            pairs_per_step=rules.pairs_per_step,
            batch_size=rules.batch_size,
            lengths=self.pairs.tokens().tolist(),
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            epoch=epoch,
            epochs=self.epochs,
            first_step=self.steps_taken(global_step) - epoch * self._steps(self.pairs_per_epoch),
            seed=rules.seed,
        )

    def _ordered(self, store: IterationStore) -> list[Tensor]:
        """Return the order of the pairs in each epoch, and remember what the rules know after.

        Where the number of optimizer steps is set, the only epoch passes over the pairs again, each time in an order
        of its own, until they are taken; a pass that is not whole leaves out random pairs.

        All epochs at once, from what the rules knew when the iteration's data was complete, so that a run that is
        resumed in any epoch gets the same.
        """
        self._rule_states = (store.read_manifest() or {}).get("rule_states", self._rule_states)
        self._restore_rules()
        rules = self.rules
        difficulty, _ = store.read_difficulty()
        ids = self.pairs.prompt_ids
        values, names = difficulty.rows(ids)["difficulty"], distinct(ids)
        passes = self.epochs * -(-self.pairs_per_epoch // len(ids))
        keys = [random_keys(names, rules.seed, self.current, number, "order") for number in range(passes)]
        orders = [rules.curriculum.order(values, each) for each in keys]
        if rules.pairs_per_iteration:
            left_out = passes * len(ids) - rules.pairs_per_iteration
            drawn = random_keys(names, rules.seed, self.current, "left out").argsort()[:left_out]
            orders[-1] = orders[-1][~torch.isin(orders[-1], drawn)]
            orders = [torch.cat(orders)]
        self._rule_states = rules.state_dict()
        return orders

    def _restore_rules(self) -> None:
        rules = self.rules
        rules.load_state_dict(rules.fresh_states if self._rule_states is None else self._rule_states)

    def difficulty_after(self, iteration: int) -> StatisticsTable:
        """Return the difficulties known once ``iteration``, the current one, has all its rollouts."""
        assert iteration == self.current
        store = self.folder.iteration(iteration)
        manifest = store.read_manifest()
        assert manifest is not None
        updated = partial(difficulty_after, iteration=iteration, smoothing=float(manifest["smoothing"]))
        probed, others = store.kept_shards().difficulty_rewards()
        at_random = bool(manifest.get("reestimated_at_random"))
        table = updated(probed, self.known, at_random=at_random)
        return updated(others, table, at_random=False)

    def metrics(self) -> dict[str, float]:
        """Return what the loggers get at the current iteration's start."""
        manifest = self.folder.iteration(self.current).read_manifest()
        assert manifest is not None
        dropped = {f"iteration/dropped/{reason}": float(n) for reason, n in manifest["dropped"].items()}
        return {"iteration/number": float(self.current), **manifest["metrics"], **dropped}

    def state_dict(self, *, finished: int, global_step: int) -> dict[str, Any]:
        """Return the state as plain containers and tensors.

        Args:
            finished: iterations trained to their end.
            global_step: optimizer steps of the run so far.
        """
        due = self.due
        consumed = (
            pairs_consumed(
                self.steps_taken(global_step),
                pairs=self.pairs_per_epoch,
                pairs_per_step=self.rules.pairs_per_step,
            )
            if self.pairs
            else self._consumed or 0
        )
        return {
            "iteration": self.current,
            "finished": finished,
            "pairs_consumed": consumed,
            "made_from": self._provenance,
            "table": self.known.state(),
            "reestimation": None
            if due is None
            else {
                "prompt_ids": list(due.prompt_ids),
                "samples": due.samples,
                "smoothing": due.smoothing,
                "at_random": due.at_random,
            },
            "rule_states": self._rule_states,
            "reverted": None if self.reverted is None else list(self.reverted),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state that :meth:`state_dict` came from."""
        self.current = state["iteration"]
        self.pairs, self._orders = PairTable.collect([]), []
        self.finished = state["finished"]
        self._rule_states = state.get("rule_states")
        reverted = state.get("reverted")
        self.reverted = None if reverted is None else (reverted[0], reverted[1])
        self._consumed = state["pairs_consumed"] if self.current >= 0 else None
        self._provenance = state["made_from"]
        self.known = StatisticsTable.from_state(state["table"])
        due = state["reestimation"]
        self.due = due and Reestimation(
            tuple(due["prompt_ids"]), due["samples"], due["smoothing"], due.get("at_random", False)
        )


def _provenance(store: IterationStore) -> dict[str, str | None]:
    """Return the fingerprints of the policy that answered and of the reference."""
    manifest = store.read_manifest() or {}
    return {name: manifest.get(name) for name in ("policy_fingerprint", "reference_fingerprint")}
