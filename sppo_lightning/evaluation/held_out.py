"""Held-out evaluation: stored, scored, greedy answers, and what is measured on them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch

from sppo_lightning.evaluation.measures import EvaluationBatch, measure
from sppo_lightning.generation import PolicySource
from sppo_lightning.rollouts.collector import Collector
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.store.shards import ShardStore, read_rollouts, write_rollouts
from sppo_lightning.system.durable import quarantine, read_checksummed, with_checksum, write_atomically
from sppo_lightning.types import EncodedPrompt, Ranks, Rollout, UserError

BATCH = 256  # stored answers aggregated at once
FORMAT = 1  # of an evaluation's manifest; older ones have no number


class EvaluatedPolicy(Protocol):
    """The policy that is being trained."""

    def current(self) -> PolicySource:
        """Return a snapshot of the policy as it is now."""

    def initial(self) -> AbstractContextManager[PolicySource]:
        """Yield a snapshot of the policy that the run started from."""


@dataclass(frozen=True)
class HeldOut:
    """Evaluations of one set of held-out prompts, one folder for each number of finished iterations.

    Args:
        folder: the run.
        prefix: tells the folders of several sets apart, e.g. ``test-``; empty for ``eval_prompts``.
        prompts: the held-out prompts.
        collector: samples and scores.
        policy: who answers.
        provenance: identities of the generator and the reward, JSON types.
        legacy_provenance: the same as manifests without a format number have it; their answers are accepted.
        replace_others: make stored answers anew where another policy gave them (a restarted ``fit``), instead
            of refusing to touch them.
    """

    folder: RunFolder
    prefix: str
    prompts: Sequence[EncodedPrompt]
    collector: Collector
    policy: EvaluatedPolicy
    provenance: Mapping[str, Any]
    legacy_provenance: Mapping[str, Any]
    replace_others: bool

    def place(self, finished: int) -> Path:
        """Return the folder of the evaluation after ``finished`` iterations."""
        return self.folder.evaluation(f"{self.prefix}{finished:03d}")

    def measure(self, finished: int) -> EvaluationBatch:
        """Ensure the current policy's answers, and the initial policy's to compare with, and measure them."""
        baseline = self._stored(0) if finished > 0 else None
        if finished > 0 and baseline is None:
            with self.policy.initial() as initial:
                baseline = self.answer(0, initial)
        opponents = {row.prompt_id: row.response for row in baseline or () if row.drop_reason is None}
        rows = self.answer(finished, self.policy.current(), opponents=MappingProxyType(opponents))
        return measure(rows, rows if baseline is None else baseline)

    def _asked(self) -> str:
        """Return a digest of what decides the answers and their rewards, except the policy."""
        return _digest([self._prompts(), json.dumps(self.provenance, sort_keys=True)])

    def _prompts(self) -> list[Any]:
        return [[item.prompt.id, item.token_ids, item.prompt.answer] for item in self.prompts]

    def _stored(self, finished: int) -> list[Rollout] | None:
        """Return the stored answers to these prompts, whichever policy gave them.

        Raises:
            UserError: if the folder holds answers to other prompts, or scores of another reward.
        """
        manifest = self._manifest(finished)
        if manifest is None:
            return None
        place = self.place(finished)
        if manifest["asked"] != self._asked():
            raise UserError(
                f"{place} holds answers to other prompts, or from another data.generator or data.reward: use "
                "another trainer.default_root_dir, or delete that folder"
            )
        try:
            return read_rollouts(place / "rollouts.parquet")
        except UserError:
            self._quarantine(place / "rollouts.parquet")
            return None

    def _manifest(self, finished: int) -> dict[str, Any] | None:
        """Return what made the stored answers; one that is damaged is quarantined, since answers can be given again."""
        path = self.place(finished) / "manifest.json"
        if not path.exists():
            return None
        try:
            found = read_checksummed(path.read_bytes())
            if not all(isinstance(found.get(name), str) for name in ("asked", "policy_fingerprint")):
                raise ValueError("without what was asked, or of whom")
        except ValueError:
            self._quarantine(path)
            return None
        if "format" not in found and found["asked"] == _digest([self._prompts(), self.legacy_provenance]):
            return self._provenance(found["policy_fingerprint"])
        return found

    def _provenance(self, policy_fingerprint: str) -> dict[str, Any]:
        return {"format": FORMAT, "policy_fingerprint": policy_fingerprint, "asked": self._asked()}

    def _quarantine(self, path: Path) -> None:
        if self.collector.ranks.rank == 0 and path.exists():
            quarantine(path)

    def answer(
        self,
        finished: int,
        policy: PolicySource,
        *,
        opponents: Mapping[str, str] = MappingProxyType({}),
    ) -> list[Rollout]:
        """Answer and score the prompts greedily, once a policy; return the stored rows.

        Args:
            finished: self-play iterations that the policy was trained for.
            policy: who answers.
            opponents: by prompt id, the initial policy's answers, for a comparative reward.

        Raises:
            UserError: if the folder holds another policy's answers that are not to be replaced.
        """
        place = self.place(finished)
        provenance = self._provenance(policy.fingerprint())
        stored, manifest = self._stored(finished), self._manifest(finished)
        if stored is not None and manifest == provenance:
            self._remove_parts(place)  # a killed run may have left them
            return stored
        if manifest not in (None, provenance) and not self.replace_others:
            raise UserError(
                f"{place} holds the answers of another policy: name this one's checkpoint with --ckpt_path, or use "
                "another trainer.default_root_dir"
            )
        ranks = self.collector.ranks
        parts = place / f"parts-{_digest(provenance)[:12]}"
        rows = self.collector.collect_greedy(
            ShardStore(parts),
            "greedy",
            self.prompts,
            policy=policy,
            iteration=finished,
            phase="evaluating",
            opponents=opponents,
        )
        ranks.barrier("evaluation read")
        if ranks.rank == 0:
            write_rollouts(place / "rollouts.parquet", rows)
            write_atomically(place / "manifest.json", with_checksum(provenance))
        self._remove_parts(place)
        ranks.barrier("evaluation written")
        return rows

    def _remove_parts(self, place: Path) -> None:
        if self.collector.ranks.rank == 0:
            for parts in place.glob("parts-*"):
                shutil.rmtree(parts)


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


class EvaluationLoader:
    """Measured answers in batches, made when the loop asks for the first one.

    Lightning sets a validation loader up before training and keeps it through the first epoch, when the policy
    to evaluate is not there yet.

    Args:
        make: returns the measurements of all answers.
        prompts: how many answers there are.
        ranks: the processes; each yields its share.
    """

    def __init__(self, make: Callable[[], EvaluationBatch], prompts: int, ranks: Ranks) -> None:
        self._make = make
        self._mine = range(ranks.rank, prompts, ranks.world_size)

    def __len__(self) -> int:
        return max(1, -(-len(self._mine) // BATCH))  # a rank without a share still helps to make the answers

    def __iter__(self) -> Iterator[EvaluationBatch]:
        measured = self._make()
        for start in range(0, max(1, len(self._mine)), BATCH):
            rows = torch.tensor(self._mine[start : start + BATCH], dtype=torch.long)
            yield EvaluationBatch(*(column[rows] for column in measured))
