"""Responses of the policy that runs start from, kept for the next run that starts from it."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import torch

from sppo_lightning.generation.protocol import (
    EngineMemory,
    Generator,
    PolicySource,
    PromptResponses,
    SampleRequest,
)
from sppo_lightning.store.identity import identity
from sppo_lightning.store.tables import read_table, write_table
from sppo_lightning.system.durable import quarantine
from sppo_lightning.types import Response, UserError

LOGGER = logging.getLogger(__name__)
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("token_ids", pa.list_(pa.int64())),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
    ]
)
GREEDY = "greedy"
KEPT_AT_ONCE = 1024  # responses of one file, at most about


class CachedGenerator(Generator):
    """Answers from a folder what the same policy was asked before with the same settings; samples the rest.

    For runs that start from one policy and differ in what comes after: its held-out answers, its probe and its first
    rollouts are sampled once. A response is found again by the policy's fingerprint, the engine's settings, the
    prompt's token ids and the response's seed. Only responses of the first policy that a process samples from are
    kept, for a fresh run the initial one. A fingerprint names a frozen base, and does not read it: a folder is for runs
    whose ``model.policy`` and ``trainer.precision`` are the same.

    Args:
        generator: samples what is not there.
        folder: where responses are kept; several runs may share it at the same time.
    """

    free_settings = frozenset({"folder"})

    def __init__(self, generator: Generator, folder: str) -> None:
        super().__init__(
            max_new_tokens=generator.max_new_tokens,
            temperature=generator.temperature,
            top_p=generator.top_p,
            top_k=generator.top_k,
            stop=generator.stop,
            max_total_tokens=generator.max_total_tokens,
        )
        self.generator = generator
        self.folder = folder
        self._first: str | None = None  # fingerprint of the first policy
        self._policy: PolicySource | None = None
        self._place = Path()  # of the current policy's responses
        self._known: dict[str, Response] = {}
        self._fresh: dict[str, Response] = {}  # of the first policy, not yet written
        self._loaded = False  # whether the engine holds the policy
        self._found = 0  # responses that did not have to be sampled

    @property
    def streams(self) -> bool:
        """Whether the engine does; all requests are read first, for what is known of them."""
        return self.generator.streams

    @property
    def reproducible(self) -> bool:
        """Whether the engine is."""
        return self.generator.reproducible

    def check(self) -> None:
        """Check the engine."""
        self.generator.check()

    def memory(self, row: int, *, free: int, total: int, device: torch.device) -> EngineMemory:
        """Return what the engine takes."""
        return self.generator.memory(row, free=free, total=total, device=device)

    def total_limit(self) -> int | None:
        """Return the engine's own limit."""
        return self.generator.total_limit()

    def longest_response(self, prompt_tokens: int) -> int:
        """Return the engine's own limit."""
        return self.generator.longest_response(prompt_tokens)

    def load(self, policy: PolicySource) -> None:
        """Read what is known of the policy; the engine takes its weights once they are needed."""
        fingerprint = policy.fingerprint()
        if self._first is None:
            self._first = fingerprint
        settings = json.dumps(identity(self.generator), sort_keys=True)
        digest = hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()
        self._policy = policy
        self._place = Path(self.folder) / digest / fingerprint
        self._known, self._fresh = _read(self._place), {}

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
        """Yield the known responses first, then the others as the engine makes them."""
        partly: list[tuple[int, list[str]]] = []
        missing: list[SampleRequest] = []
        for number, request in enumerate(requests):
            keys = _keys(request)
            unknown = [place for place, key in enumerate(keys) if key not in self._known]
            self._found += len(keys) - len(unknown)
            if not unknown:
                yield PromptResponses(number, [self._known[key] for key in keys])
                continue
            partly.append((number, keys))
            missing.append(
                request._replace(seeds=tuple(request.seeds[place] for place in unknown if request.seeds))
            )
        if not missing:
            return
        assert self._policy is not None
        if not self._loaded:
            self.generator.load(self._policy)
            self._loaded = True
        self.generator.on_batch_progress = self._progress
        try:
            for answer in self.generator.generate(missing):
                number, keys = partly[answer.request]
                made = dict(zip(_keys(missing[answer.request]), answer.responses, strict=True))
                kept = {key: response for key, response in made.items() if response.drop_reason is None}
                if self._place.name == self._first:
                    self._fresh |= kept
                if len(self._fresh) >= KEPT_AT_ONCE:
                    self._keep()
                yield PromptResponses(
                    number, [made[key] if key in made else self._known[key] for key in keys]
                )
        finally:
            self._keep()

    def _keep(self) -> None:
        """Write what was sampled: a run that is stopped here does not ask for it again."""
        if self._fresh:
            self._place.mkdir(parents=True, exist_ok=True)
            write_table(self._place / f"{uuid4().hex}.parquet", _table(self._fresh))
            self._fresh = {}

    def _progress(self, prompts: float, tokens: int) -> None:
        if self.on_batch_progress is not None:
            self.on_batch_progress(prompts, tokens)

    def unload(self) -> None:
        """Free what was loaded."""
        assert self._policy is not None
        if self._loaded:
            self.generator.unload()
        if self._found:
            LOGGER.info("%d responses were found in %s", self._found, self.folder)
        self._loaded, self._policy, self._found = False, None, 0
        self._known = {}


def _keys(request: SampleRequest) -> list[str]:
    """Return what each response is found by: the prompt's tokens and its seed."""
    prompt = hashlib.blake2b(array("q", request.token_ids), digest_size=16).hexdigest()
    return [f"{prompt}-{seed}" for seed in request.seeds or (GREEDY,)]


def _table(responses: dict[str, Response]) -> pa.Table:
    found = responses.values()
    columns = {
        "key": list(responses),
        "token_ids": [response.token_ids for response in found],
        "text": [response.text for response in found],
        "finish_reason": [response.finish_reason for response in found],
    }
    return pa.table(columns, SCHEMA)


def _read(folder: Path) -> dict[str, Response]:
    """Return the responses of one policy by key; a damaged file's are sampled again."""
    found = {}
    for path in sorted(folder.glob("*.parquet")):
        try:
            table = read_table(path, SCHEMA)
        except UserError:
            with suppress(FileNotFoundError):  # another process has found it too
                quarantine(path)
            continue
        for row in table.to_pylist():
            found[row["key"]] = Response(tuple(row["token_ids"]), row["text"], row["finish_reason"])
    return found
