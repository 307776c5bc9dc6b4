"""The prompt files that a config names, read and encoded on demand."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sppo_lightning.prompts.encoding import EncodingResult, PromptError, encode_prompts
from sppo_lightning.prompts.reading import digest_of_turns, locate, read_every_record, read_prompts
from sppo_lightning.prompts.table import EncodedPrompts, PromptTable
from sppo_lightning.seeding import random_keys
from sppo_lightning.types import Prompt, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOGGER = logging.getLogger(__name__)
MOST_HELD_OUT = 200
LEAST_HELD_OUT = 20
LISTED = 10  # ids of dropped prompts that are shown


class PromptSets:
    """Prompts by config key (``prompts``, ``eval_prompts``, …); each file is read and encoded once.

    Args:
        sources: file(s), folder or hub dataset of each key; ``None`` where the config names none.
        max_tokens: longer prompts are left out.
        system_prompt: opens the conversations that have no system message.
        columns: the files' own names of ``prompt``, ``answer`` and ``id``.
        eval_share: share of ``prompts`` to hold out as ``eval_prompts`` where none are named, at most
            :data:`MOST_HELD_OUT`; none are where that would be fewer than :data:`LEAST_HELD_OUT`.
        seed: decides which.
    """

    def __init__(
        self,
        sources: Mapping[str, str | list[str] | None],
        max_tokens: int,
        system_prompt: str | None = None,
        columns: Mapping[str, str] = MappingProxyType({}),
        eval_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.sources = sources
        self.max_tokens = max_tokens
        self.system_prompt = system_prompt
        self.columns = columns
        self.eval_share = eval_share
        self.seed = seed
        self._read: dict[str, PromptTable] = {}
        self._encoded: dict[str, EncodedPrompts] = {}
        self._too_long: dict[str, list[str]] = {}

    def named(self, key: str) -> bool:
        """Whether there are prompts for ``key``: named by the config, or held out."""
        if key == "eval_prompts" and self.eval_share:
            self.read("prompts")
        return self.sources[key] is not None or key in self._read

    def read(self, key: str) -> PromptTable:
        """Return the prompts of ``key``.

        Raises:
            UserError: if the config names none, or they cannot be read.
        """
        if not self.named(key) if key == "eval_prompts" else self.sources[key] is None:
            raise UserError(f"data.{key} is not set: name a prompt file")
        if key not in self._read:
            source = self.sources[key]
            assert source is not None
            self._read[key] = read_prompts(source, key=f"data.{key}", columns=self.columns)
            if key == "prompts" and self.eval_share:
                self._hold_out()
        return self._read[key]

    def records(self, key: str) -> list[Prompt]:
        """Return the prompt of each record of the source that the config names, repeated ones as often as they stand.

        Raises:
            UserError: as :meth:`read` does.
        """
        self.read(key)
        source = self.sources[key]
        assert source is not None
        return read_every_record(source, key=f"data.{key}", columns=self.columns)

    def _hold_out(self) -> None:
        """Take some of the training prompts as held-out ones; prompts that say the same stay together."""
        prompts = self._read["prompts"]
        count = min(MOST_HELD_OUT, int(self.eval_share * len(prompts)))
        if count < LEAST_HELD_OUT:
            LOGGER.info(
                f"data.eval_prompts is not set, and {len(prompts)} prompts are too few to hold some out: nothing says "
                "how the policy does on other prompts."
            )
            return
        said = [digest_of_turns(prompt).hex() for prompt in prompts]
        keys = random_keys(said, self.seed, "held out")
        last = float(keys.sort().values[count - 1])
        held_out = [key <= last for key in keys.tolist()]
        for key, wanted in (("eval_prompts", True), ("prompts", False)):
            self._read[key] = PromptTable(
                prompt for prompt, held in zip(prompts, held_out, strict=True) if held is wanted
            )
        LOGGER.info(
            f"data.eval_prompts is not set: {len(self._read['eval_prompts'])} of the {len(prompts)} prompts of "
            f"data.prompts are held out, and not trained on (data.eval_share={self.eval_share:g}; 0: none)."
        )

    def keep_first(self, key: str, count: int) -> None:
        """Leave out all but the first ``count`` prompts of ``key``."""
        self._read[key] = self.read(key)[:count]

    def encode(
        self,
        key: str,
        tokenizer: PreTrainedTokenizerBase,
        arguments: Mapping[str, Any] | None = None,
    ) -> EncodedPrompts:
        """Return the prompts of ``key`` that fit, encoded; say which do not.

        Args:
            key: of the config.
            tokenizer: the policy's.
            arguments: further variables of its chat template.

        Raises:
            UserError: if none fits, or naming the file and line of one that the tokenizer cannot take.
        """
        if key not in self._encoded:
            prompts = self.read(key)
            try:
                kept, too_long = encode_prompts(
                    tokenizer,
                    prompts,
                    max_tokens=self.max_tokens,
                    system_prompt=self.system_prompt,
                    arguments=arguments or {},
                )
            except PromptError as error:
                source = self.sources[key] or self.sources["prompts"]
                assert source is not None
                place = locate(source, error.prompt_id, key=f"data.{key}", columns=self.columns)
                raise UserError(f"{place}: {error}") from error
            if too_long:
                more = " …" if len(too_long) > LISTED else ""
                LOGGER.info(
                    f"data.{key}: {len(too_long)} of {len(prompts)} prompts are over "
                    f"data.max_prompt_tokens={self.max_tokens} and left out: {', '.join(too_long[:LISTED])}{more}"
                )
            if not kept:
                raise UserError(
                    f"every prompt of data.{key} is over data.max_prompt_tokens={self.max_tokens}: raise it"
                )
            self._encoded[key] = kept
            self._too_long[key] = too_long
        return self._encoded[key]

    def encode_later(
        self,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        arguments: Mapping[str, Any] | None = None,
        *,
        max_tokens: int,
    ) -> EncodingResult:
        """Encode prompts that no file holds, as those of the files are.

        Args:
            prompts: what to encode.
            tokenizer: the policy's.
            arguments: further variables of its chat template.
            max_tokens: longest one; others are left out.

        Raises:
            PromptError: naming the prompt that the tokenizer cannot take.
        """
        return encode_prompts(
            tokenizer,
            prompts,
            max_tokens=max_tokens,
            system_prompt=self.system_prompt,
            arguments=arguments or {},
        )

    def too_long(self, key: str) -> list[str]:
        """Return the ids of the prompts of ``key`` that did not fit; after :meth:`encode`."""
        return self._too_long[key]
