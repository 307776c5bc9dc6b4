"""A language model as judge, on any server that speaks OpenAI's chat protocol."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

from sppo_lightning.judging.contract import Annotator, Answer, Shown, Verdict
from sppo_lightning.judging.verdict_formats import VerdictFormat, WrittenVerdict
from sppo_lightning.rewards.judge import filled
from sppo_lightning.rewards.pairwise import Comparison
from sppo_lightning.system.servers import Failure, ServerClient
from sppo_lightning.types import SPEED_OR_PLACE, Message, Prompt, UserError

MILLION = 1_000_000
_ASKED = "How many legs has a cat?"
_TRIAL_PROMPT = Prompt("trial", _ASKED, (Message(role="user", content=_ASKED),))
_TRIAL = Shown(_TRIAL_PROMPT, Answer(_TRIAL_PROMPT, "Four."), Answer(_TRIAL_PROMPT, "Seven."))


class ServerJudge(Annotator):
    """Asks a chat model which of two answers is better, in both orders.

    Args:
        base_url: of the server, e.g. ``http://localhost:8000/v1``.
        model: name of the model on the server.
        format: how it is asked; default: ``WrittenVerdict``.
        api_key_env: environment variable that holds the key; a key never stands in a command.
        prompt_price: of a million tokens that the judge reads, in any currency; ``None``: cost is not counted.
        completion_price: of a million tokens that it writes.
        max_concurrency: requests under way at once.
        timeout: seconds that one try may take.
        max_retries: tries after the first one.
        startup_timeout: seconds to wait for a server that accepts no connections, as it still loads its model.
    """

    name = "judge"
    free_settings: ClassVar[frozenset[str]] = SPEED_OR_PLACE | {"prompt_price", "completion_price"}

    def __init__(
        self,
        base_url: str,
        model: str,
        format: VerdictFormat | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        prompt_price: float | None = None,
        completion_price: float | None = None,
        max_concurrency: int = 32,
        timeout: float = 600.0,
        max_retries: int = 5,
        startup_timeout: float = 0.0,
    ) -> None:
        if (prompt_price is None) != (completion_price is None):
            raise ValueError(
                "ServerJudge: prompt_price and completion_price go together: give both, or neither"
            )
        self.model = model
        self.format = format or WrittenVerdict()
        missing = [
            place for place in ("prompt", "first", "second") if f"{{{place}}}" not in self.format.instructions
        ]
        if missing:
            names = ", ".join(f"{{{name}}}" for name in missing)
            raise ValueError(
                f"{type(self.format).__name__}.instructions lacks {names}: the judge would not see that text"
            )
        self.prompt_price = prompt_price
        self.completion_price = completion_price
        self._client = ServerClient(
            "ServerJudge",
            base_url,
            api_key_env=api_key_env,
            max_concurrency=max_concurrency,
            timeout=timeout,
            max_retries=max_retries,
            startup_timeout=startup_timeout,
        )

    def check(self) -> None:
        """Let the server judge one comparison, so that a wrong setting is found before anything is paid for."""
        self._client.check()
        ((_, verdict),) = self.judge([_TRIAL])
        if math.isnan(verdict.first_wins):
            told = f": {self._client.quoted(verdict.said)}" if verdict.said else ""
            raise UserError(
                f"ServerJudge.model={self.model!r} gave no verdict on a trial ({verdict.reason}{told}): correct the "
                "address, the model or the settings of --by.format"
            )

    def judge(self, comparisons: Sequence[Shown]) -> Iterator[tuple[int, Verdict]]:
        """Ask, concurrently."""
        self._client.open()
        try:
            yield from self._client.run(partial(self._ask, shown) for shown in comparisons)
        finally:
            self._client.close()

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Return what so many tokens cost, where prices are given."""
        if self.prompt_price is None or self.completion_price is None:
            return None
        return (prompt_tokens * self.prompt_price + completion_tokens * self.completion_price) / MILLION

    def _ask(self, shown: Shown) -> Verdict:
        comparison = Comparison(shown.prompt, shown.first.text, shown.second.text)
        message = filled(self.format.instructions, comparison)
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": message}],
            **self.format.options(),
        }
        verdict = self._client.read(self._client.post("chat/completions", body), self._read)
        return Verdict(math.nan, verdict.reason, verdict.message) if isinstance(verdict, Failure) else verdict

    def _read(self, answer: Any) -> Verdict:
        said = answer["choices"][0]["message"]["content"]
        reading = self.format.read(answer)
        usage = answer.get("usage") or {}
        return Verdict(
            reading.first_wins,
            reading.reason,
            said if isinstance(said, str) else "",
            reading.logprobs,
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
        )
