"""A reward model on a server, and the formats in which servers are asked."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from sppo_lightning.policy.pretrained import load_tokenizer
from sppo_lightning.prompts.chat_template import template_owner, template_token_ids
from sppo_lightning.rewards.protocol import Reward, Scores
from sppo_lightning.system.servers import Failure, ServerClient
from sppo_lightning.types import SPEED_OR_PLACE, Message, Prompt, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TRIAL = Prompt(
    "trial", "How many legs has a cat?", (Message(role="user", content="How many legs has a cat?"),)
)


class ScoreFormat(ABC):
    """How a reward server is asked, and how its answer is read; chosen in the config by ``class_path``."""

    path: str
    """Where the server takes requests, below ``base_url``."""
    batch_size: int = 1
    """Most responses of one request."""
    free_settings: ClassVar[frozenset[str]] = SPEED_OR_PLACE
    """Arguments of the constructor that decide speed or place, never a score: a run that resumes may change them."""

    def check(self) -> None:
        """Raise :class:`~sppo_lightning.types.UserError` if requests cannot be made."""

    def advice(self, refusal: str) -> str | None:
        """Return what to do about a server that refuses the first request, where that is known.

        Args:
            refusal: what the server said, in one line.
        """
        return None

    @abstractmethod
    def body(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, Any]:
        """Return the JSON that asks for the scores of at most ``batch_size`` responses."""

    @abstractmethod
    def scores(self, answer: Any) -> list[float]:
        """Return one score for each response, NaN where the server has none.

        May raise anything if the answer has another shape: its responses are dropped as ``malformed_answer``.
        """


class VLLMPooling(ScoreFormat):
    """vLLM's ``/pooling``: a reward model with one logit, for the conversation or for each token; the last counts.

    The server applies the reward model's chat template, and no activation to the logit. ``base_url`` ends before
    ``/v1``: ``http://localhost:8000``.

    Args:
        model: name of the model on the server.
    """

    path = "pooling"

    def __init__(self, model: str) -> None:
        self.model = model

    def advice(self, refusal: str) -> str | None:
        """Say what a reward model without a chat template needs."""
        if "chat template" not in refusal.lower():
            return None
        return (
            "the reward model has none of its own: start the server with --chat-template FILE, the template that the "
            "model was trained with, or score in the process with sppo_lightning.rewards.SequenceClassificationReward, "
            "which makes a text pair of prompt and response for such a model"
        )

    def body(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, Any]:
        """Return a conversation to pool."""
        (conversation,) = _conversations(prompts, responses)
        return {"model": self.model, "messages": conversation, "use_activation": False}

    def scores(self, answer: Any) -> list[float]:
        """Return the only logit, or the last token's."""
        (pooled,) = answer["data"]
        logits = pooled["data"]
        (logit,) = logits[-1] if isinstance(logits[-1], list) else logits
        return [as_score(logit)]


class SGLangClassify(ScoreFormat):
    """SGLang's ``/classify``: a reward model with one logit.

    The conversations are sent as token ids, made here with the reward model's tokenizer and chat template: SGLang
    applies none. ``base_url`` ends before ``/v1``: ``http://localhost:30000``.

    Args:
        tokenizer: HF folder or hub id of the reward model.
        batch_size: responses of one request.
        trust_remote_code: run code that comes with the tokenizer.
    """

    path = "classify"

    def __init__(self, tokenizer: str, batch_size: int = 16, trust_remote_code: bool = False) -> None:
        if batch_size < 1:
            raise ValueError(f"SGLangClassify.batch_size={batch_size} must be at least 1")
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.trust_remote_code = trust_remote_code
        self._loaded: PreTrainedTokenizerBase | None = None

    def check(self) -> None:
        """Require a tokenizer with a chat template."""
        if self._own_tokenizer().chat_template is None:
            raise UserError(
                f"SGLangClassify.tokenizer={self.tokenizer!r} has no chat template: name the reward model's own"
            )

    def body(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, Any]:
        """Return the conversations' token ids."""
        tokenizer = self._own_tokenizer()
        conversations = _conversations(prompts, responses)
        owner = template_owner("SGLangClassify.tokenizer", self.tokenizer)
        ids = [
            template_token_ids(tokenizer, turns, add_generation_prompt=False, owner=owner)
            for turns in conversations
        ]
        return {"input_ids": ids}

    def scores(self, answer: Any) -> list[float]:
        """Return the only logit of each conversation."""
        logits = [item["embedding"] for item in answer]
        return [as_score(logit) for (logit,) in logits]

    def _own_tokenizer(self) -> PreTrainedTokenizerBase:
        if self._loaded is None:
            key = "SGLangClassify.tokenizer"
            self._loaded = load_tokenizer(self.tokenizer, key=key, trust_remote_code=self.trust_remote_code)
        return self._loaded


class JSONRewards(ScoreFormat):
    """A format that is easy to serve.

    The request is ``{"prompts": [{"id": …, "messages": [{"role": …, "content": …}], "answer": …}], "responses": […]}``,
    where ``answer`` is the reference answer or null; the answer is ``{"rewards": […]}``, one number a response, null
    for a response that cannot be scored.

    Args:
        path: where the server takes requests, below ``base_url``.
        batch_size: responses of one request.
    """

    def __init__(self, path: str = "rewards", batch_size: int = 16) -> None:
        if batch_size < 1:
            raise ValueError(f"JSONRewards.batch_size={batch_size} must be at least 1")
        self.path = path
        self.batch_size = batch_size

    def body(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, Any]:
        """Return prompts and responses, side by side."""
        return {
            "prompts": [
                {"id": prompt.id, "messages": list(prompt.messages), "answer": prompt.answer}
                for prompt in prompts
            ],
            "responses": list(responses),
        }

    def scores(self, answer: Any) -> list[float]:
        """Return the list called ``rewards``."""
        return [as_score(reward) for reward in answer["rewards"]]


class ServerReward(Reward):
    """Scores with a reward model that is served over HTTP.

    A response whose request fails is dropped as ``server_error`` or ``server_time_out``, one whose score cannot be
    read as ``malformed_answer``. Where a request for several responses fails, they are asked for one by one.

    Args:
        base_url: of the server, e.g. ``http://localhost:8000``.
        format: how the server is asked.
        api_key_env: environment variable that holds the server's key; ``None``: it asks for none.
        max_concurrency: requests under way at once.
        timeout: seconds that one try may take.
        max_retries: tries after the first one.
        startup_timeout: seconds to wait for a server that accepts no connections: it still loads its model.
    """

    remote = True

    def __init__(
        self,
        base_url: str,
        format: ScoreFormat,
        api_key_env: str | None = None,
        max_concurrency: int = 32,
        timeout: float = 120.0,
        max_retries: int = 5,
        startup_timeout: float = 600.0,
    ) -> None:
        self.format = format
        self._client = ServerClient(
            "ServerReward",
            base_url,
            api_key_env=api_key_env,
            max_concurrency=max_concurrency,
            timeout=timeout,
            max_retries=max_retries,
            startup_timeout=startup_timeout,
        )

    def check(self) -> None:
        """Let the server score one response, so that a wrong setting is found before anything is sampled."""
        self._client.check()
        self.format.check()
        self._client.open()
        try:
            found = self._call([_TRIAL], ["Four."])()
        finally:
            self._client.close()
        if isinstance(found, Failure):
            advice = self.format.advice(found.message)
            raise UserError(f"{found.message}: {advice or 'correct the address or the format of the reward'}")

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Require conversations that the format can send; each sequence of roles is tried once."""
        tried: set[tuple[str, ...]] = set()
        for prompt in prompts:
            roles = tuple(turn["role"] for turn in prompt.messages)
            if roles not in tried:
                tried.add(roles)
                self.format.body([prompt], ["a"])

    def load(self, device: torch.device) -> None:
        """Open the connections; the model stays on its server."""
        self._client.open()

    def unload(self) -> None:
        """Close the connections."""
        self._client.close()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        """Ask for all responses, concurrently."""
        size = self.format.batch_size
        rows = range(len(responses))
        batches = [rows[start : start + size] for start in rows[::size]]
        found = self._scored(prompts, responses, batches)
        together = [row for batch in batches if len(batch) > 1 for row in batch]
        refused = [row for row in together if _reason(found[row]) in ("server_error", "malformed_answer")]
        found |= self._scored(prompts, responses, [range(row, row + 1) for row in refused])
        failures = {row: failure for row, failure in sorted(found.items()) if isinstance(failure, Failure)}
        error = next((failure.message for failure in failures.values()), None)
        if error is not None:
            warnings.warn(
                f"{len(failures)} of {len(rows)} responses have no score, the first because {error}",
                stacklevel=2,
            )
        return Scores(
            [math.nan if isinstance(score := found[row], Failure) else score for row in rows],
            {row: failure.reason for row, failure in failures.items()},
            error=error,
        )

    def _scored(
        self, prompts: Sequence[Prompt], responses: Sequence[str], batches: Sequence[range]
    ) -> dict[int, float | Failure]:
        """Return the score of each row in ``batches``, or why it has none."""
        # the bodies are made in this thread, batch by batch: a tokenizer is not for several threads at once
        calls = (
            self._call([prompts[row] for row in batch], [responses[row] for row in batch])
            for batch in batches
        )
        found: dict[int, float | Failure] = {}
        for position, scores in self._client.run(calls):
            batch = batches[position]
            found.update(
                zip(batch, [scores] * len(batch) if isinstance(scores, Failure) else scores, strict=True)
            )
        return found

    def _call(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> Callable[[], list[float] | Failure]:
        return partial(self._ask, self.format.body(prompts, responses), len(responses))

    def _ask(self, body: dict[str, Any], count: int) -> list[float] | Failure:
        answer = self._client.post(self.format.path, body)
        return self._client.read(answer, partial(self._read, count))

    def _read(self, count: int, answer: Any) -> list[float]:
        scores = [as_score(score) for score in self.format.scores(answer)]
        if len(scores) != count:
            raise ValueError(f"{len(scores)} scores for {count} responses")
        return scores


def as_score(value: Any) -> float:
    """Return a number from JSON as a float, null as NaN.

    Raises:
        OverflowError: if it is too large for a float.
        TypeError: if it is no number.
    """
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _reason(found: float | Failure) -> str | None:
    return found.reason if isinstance(found, Failure) else None


def _conversations(prompts: Iterable[Prompt], responses: Iterable[str]) -> list[list[Message]]:
    return [
        [*prompt.messages, Message(role="assistant", content=response)]
        for prompt, response in zip(prompts, responses, strict=True)
    ]
