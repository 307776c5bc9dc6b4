"""The conversations behind a run's pairs: as the prompt file has them, checked against the token ids of the pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sppo_lightning.export.stored_run import StoredRun
from sppo_lightning.prompts.encoding import asked, encode_prompts, tools_of
from sppo_lightning.prompts.reading import read_prompts
from sppo_lightning.prompts.table import PromptTable
from sppo_lightning.types import Message, Prompt, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LIMIT = 2**31 - 1  # tokens: what is in a pair was not too long


class Conversation(NamedTuple):
    """What the policy was asked."""

    messages: tuple[Message, ...]
    tools: list[Any] | None  # JSON schemas of functions


class ConversationFinder:
    """Finds what each prompt of a run said: its token ids are stored, its messages are in the user's file.

    The file may have changed since. A conversation counts if the chat template makes the stored token ids of it; so
    does a single message of the user with the text that a response was stored with.

    Args:
        run: whose pairs they are.
        tokenizer: the policy's.
        sources: prompt files, in place of the run's ``data.prompts``.
    """

    def __init__(
        self, run: StoredRun, tokenizer: PreTrainedTokenizerBase, sources: str | Sequence[str] | None
    ) -> None:
        self.run = run
        self.tokenizer = tokenizer
        self.system_prompt: str | None = run.config["data"].get("system_prompt")
        self.arguments: Mapping[str, Any] = run.policy_config.chat_template_kwargs or {}
        self.sources = run.config["data"]["prompts"] if sources is None else sources
        self.key = "data.prompts" if sources is None else "--format.prompts"

    def find(self, iterations: Iterable[int]) -> dict[str, Conversation]:
        """Return the conversations behind the pairs of some iterations, by prompt id.

        Raises:
            UserError: naming a prompt whose messages are not known any more.
        """
        wanted: dict[str, tuple[int, ...]] = {}
        texts: dict[str, str] = {}
        for number in iterations:
            store = self.run.folder.iteration(number)
            wanted.update((pair.prompt_id, pair.prompt_token_ids) for pair in store.read_pairs())
            if not store.pruned:
                texts.update(store.shards.prompt_texts())
        found, trouble = self._in_files(wanted)
        rest = [prompt_id for prompt_id in wanted if prompt_id not in found]
        said = [
            Prompt(prompt_id, texts[prompt_id], (Message(role="user", content=texts[prompt_id]),))
            for prompt_id in rest
            if prompt_id in texts
        ]
        found |= self._matching(said, wanted)
        lost = [prompt_id for prompt_id in rest if prompt_id not in found]
        if lost:
            raise UserError(
                f"what {len(lost)} of {len(wanted)} prompts said is not known, e.g. {lost[0]!r}: {trouble}; name the "
                "file that the run was started with: --format.prompts FILE"
            )
        return found

    def _in_files(self, wanted: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Conversation], str]:
        """Return what the prompt files still say, and why it may not be all."""
        columns = self.run.config["data"].get("columns") or {}
        try:
            prompts = read_prompts(self.sources, key=self.key, columns=columns)
        except UserError as error:
            return {}, str(error)
        kept = (prompt for prompt in prompts if prompt.id in wanted)
        return self._matching(kept, wanted), f"{self.key}={self.sources!r} has changed since"

    def _matching(
        self, prompts: Iterable[Prompt], wanted: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Conversation]:
        """Return those of the prompts that are what the policy was asked."""
        table = PromptTable(prompts)
        if not table:
            return {}
        try:
            encoded = encode_prompts(
                self.tokenizer,
                table,
                max_tokens=NO_LIMIT,
                system_prompt=self.system_prompt,
                arguments=self.arguments,
            ).kept
        except UserError:  # of a prompt that the run cannot have had
            return {}
        return {
            item.prompt.id: Conversation(asked(item.prompt, self.system_prompt), tools_of(item.prompt))
            for item in encoded
            if item.token_ids == wanted[item.prompt.id]
        }
