"""Sampling from a server with OpenAI's completions API: vLLM, SGLang, ``transformers serve`` and others."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from sppo_lightning.generation.protocol import (
    EngineMemory,
    Generator,
    PolicySource,
    PromptResponses,
    SampleRequest,
    malformed_ids,
)
from sppo_lightning.generation.weight_sync import WeightSync
from sppo_lightning.system.servers import Failure, ServerClient
from sppo_lightning.types import Response, UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

SEEDS = 2**31  # vLLM takes 64 bits, SGLang has held a seed in 32 with a sign


class OpenAIServerGenerator(Generator):
    """Samples from a server's ``completions`` endpoint, one request a response, many at once.

    Training sees the token ids that the server says it sampled (``return_token_ids``: vLLM, SGLang). Where it gives
    none, a response's text is tokenised again, and the response is dropped unless the text comes back from the ids
    and their number is the server's; ids that cut the same text into as many other tokens would pass unseen.

    The same seeds need not give the same responses: near-ties depend on what a server happens to batch together,
    and SGLang heeds seeds only with ``--enable-deterministic-inference``.

    Run against a real ``transformers serve``; against vLLM and SGLang by their documented answers only.

    Args:
        base_url: e.g. ``http://localhost:8000/v1``.
        weight_sync: how the server gets the current policy.
        model: served name to ask for; leave it out where ``weight_sync`` names the model.
        prompt_format: ``token_ids`` sends prompts as they are, with fields that vLLM and SGLang share. ``text`` is
            for servers that take strings and OpenAI's own fields only, like ``transformers serve``: a prompt that
            does not survive the way there is dropped, and ``stop`` cuts here, not at the server.
        api_key_env: environment variable that holds the server's key; ``None``: it asks for none.
        max_concurrency: requests under way at once.
        timeout: seconds that one try of a request may take.
        max_retries: tries of a request after the first one.
        sampling: lengths, temperature and the like, see :class:`~sppo_lightning.generation.Generator`.
    """

    reproducible: ClassVar[bool] = False

    def __init__(
        self,
        base_url: str,
        weight_sync: WeightSync,
        model: str | None = None,
        prompt_format: Literal["token_ids", "text"] = "token_ids",
        api_key_env: str | None = None,
        max_concurrency: int = 64,
        timeout: float = 600.0,
        max_retries: int = 5,
        **sampling: Any,
    ) -> None:
        super().__init__(**sampling)
        name = type(weight_sync).__name__
        if weight_sync.names_model and model is not None:
            raise ValueError(
                f"OpenAIServerGenerator.model={model!r} would not be asked for: {name} names the model; leave it out"
            )
        if not weight_sync.names_model and model is None:
            raise ValueError(
                f"OpenAIServerGenerator.model is missing: {name} needs the name of the served model"
            )
        self.weight_sync = weight_sync
        self.model = model
        self.prompt_format = prompt_format
        self._client = ServerClient(
            "data.generator",
            base_url,
            api_key_env=api_key_env,
            max_concurrency=max_concurrency,
            timeout=timeout,
            max_retries=max_retries,
        )
        self._policy: PolicySource | None = None
        self._asked_model = ""
        self._embedding_rows = 0
        self._answered = False  # since the policy was handed over
        self._failure: Failure | None = None  # the first one since then

    def check(self) -> None:
        """Raise :class:`~sppo_lightning.types.UserError` if there is no client library."""
        self._client.check()

    def memory(self, row: int, *, free: int, total: int, device: torch.device) -> EngineMemory:
        """Take nothing: responses are decoded at the server."""
        return EngineMemory(copies=False, rows=0)

    def load(self, policy: PolicySource) -> None:
        """Hand the policy to the server."""
        self._client.open()
        self._policy = policy
        self._embedding_rows = policy.embedding_rows
        self._answered, self._failure = False, None
        self._asked_model = self.weight_sync.hand_over(policy, client=self._client, model=self.model)

    def unload(self) -> None:
        """Close the connections; the server keeps what it has loaded."""
        self._client.close()

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
        """Yield a prompt's responses as soon as the last of them is there.

        Raises:
            UserError: if the server cannot be reached, refuses the key, knows no such model, or has answered no
                request at all since the policy was handed over.
        """
        places = [
            (index, place)
            for index, request in enumerate(requests)
            for place in range(max(1, len(request.seeds)))
        ]
        found: dict[int, dict[int, Response]] = {}
        with closing(self._client.run(self._calls(requests))) as answers:
            for number, answer in answers:
                index, place = places[number]
                responses = found.setdefault(index, {})
                responses[place] = self._response(requests[index], answer)
                if len(responses) == max(1, len(requests[index].seeds)):
                    yield PromptResponses(index, [responses[place] for place in sorted(found.pop(index))])
        if self._failure is not None and not self._answered:
            raise UserError(
                f"not one request was answered: {self._failure.message} (look at the server's log; a server that "
                "takes strings or OpenAI's own fields only needs prompt_format: text)"
            )

    def _calls(self, requests: Sequence[SampleRequest]) -> Iterator[Callable[[], Any]]:
        for request in requests:
            body = self._body(request)
            for seed in request.seeds or (None,):
                if isinstance(body, Response):
                    yield partial(_given, body)
                else:
                    yield partial(self._client.post, "completions", body | self._draw(seed))

    def _body(self, request: SampleRequest) -> dict[str, Any] | Response:
        """Return what the requests for one prompt share, or why there can be none."""
        assert self._policy is not None
        longest = self.longest_response(len(request.token_ids))
        if longest < 1:
            return _dropped("prompt_too_long")
        body: dict[str, Any] = {"model": self._asked_model, "max_tokens": longest}
        if self.prompt_format == "text":
            text = prompt_text(request.token_ids, self._policy.tokenizer)
            return _dropped("prompt_retokenised_differently") if text is None else body | {"prompt": text}
        # what is left open here, vLLM takes from the model's generation config
        body |= {"prompt": list(request.token_ids), "repetition_penalty": 1.0, "min_p": 0.0}
        body |= {"return_token_ids": True}
        return body if self.stop is None else body | {"stop": self.stop}

    def _draw(self, seed: int | None) -> dict[str, Any]:
        """Return the settings of one draw; without a seed, of the greedy answer."""
        if seed is None:
            return {"temperature": 0.0}
        draw = {"temperature": self.temperature, "top_p": self.top_p, "seed": seed % SEEDS}
        if self.top_k or self.prompt_format == "token_ids":
            draw["top_k"] = self.top_k or -1  # every server's word for all tokens
        return draw

    def _response(self, request: SampleRequest, answer: Any) -> Response:
        if isinstance(answer, Response):
            return answer
        found = self._client.read(answer, partial(self._read, request))
        return self._failed(found) if isinstance(found, Failure) else found

    def _read(self, request: SampleRequest, answer: Any) -> Response | Failure:
        """Return the response in a server's answer, with token ids that the policy has and no more than were asked for.

        May raise anything where the answer has another shape.
        """
        completion = read_completion(answer)
        if completion.finish_reason not in ("stop", "length"):
            return Failure(
                "server_error", f"the server answered no completion: {self._client.quoted(answer)}"
            )
        self._answered = True
        if not self._prompt_arrived(request, completion):
            return _dropped("prompt_retokenised_differently")
        token_ids = self._sampled(completion)
        if token_ids is None:
            return Response((), completion.text, "failed", drop_reason="retokenised_differently")
        if not token_ids:
            return Failure("server_error", "the server answered without a single token")
        longest = self.longest_response(len(request.token_ids))
        wrong = malformed_ids(token_ids, embedding_rows=self._embedding_rows, longest=longest)
        if wrong is not None:
            return Failure("malformed_answer", f"the server answered {wrong}")
        assert self._policy is not None
        return self.as_response(self._ended(token_ids), self._policy)

    def _failed(self, failure: Failure) -> Response:
        if self._failure is None:
            self._failure = failure
            warnings.warn(
                f"data.generator: a response is dropped as {failure.reason}: {failure.message}", stacklevel=2
            )
        return _dropped(failure.reason)

    def _prompt_arrived(self, request: SampleRequest, completion: Completion) -> bool:
        """Return whether the server continued exactly the prompt that was sent, as far as it tells."""
        if completion.prompt_token_ids is not None:
            return completion.prompt_token_ids == list(request.token_ids)
        if completion.prompt_tokens is None:
            return self.prompt_format == "token_ids"
        return completion.prompt_tokens == len(request.token_ids)

    def _sampled(self, completion: Completion) -> list[int] | None:
        """Return the token ids that were sampled, or ``None`` if that cannot be known."""
        if completion.token_ids is not None:
            return completion.token_ids
        assert self._policy is not None
        ends = self._policy.end_token_ids
        end = completion.stopped_by if completion.stopped_by in ends else None
        stop_sent = self.stop is not None and self.prompt_format == "token_ids"
        if completion.stopped_by is None and len(ends) == 1 and not stop_sent:
            (end,) = ends
        return retokenised(completion, self._policy.tokenizer, end_token=end)

    def _ended(self, token_ids: list[int]) -> list[int]:
        """Return the tokens up to the first end token or the one that completes a stop string.

        A server may know fewer ends than the policy; what it samples past one belongs to no response.
        """
        assert self._policy is not None
        policy = self._policy
        ends = [place for place, token in enumerate(token_ids) if token in policy.end_token_ids]
        if ends:
            token_ids = token_ids[: ends[0] + 1]

        def stopped(length: int) -> bool:
            text = str(policy.tokenizer.decode(token_ids[:length], skip_special_tokens=True))
            return any(stop in text for stop in self.stop or ())

        if self.stop is None or not stopped(len(token_ids)):
            return token_ids
        return token_ids[: 1 + bisect_left(range(1, len(token_ids)), True, key=stopped)]


class Completion(NamedTuple):
    """What a server says about one response; ``None`` where it says nothing."""

    text: str
    finish_reason: str | None
    stopped_by: int | str | None  # token id or stop string: vLLM's stop_reason, SGLang's matched_stop
    token_ids: list[int] | None
    prompt_token_ids: list[int] | None
    prompt_tokens: int | None
    completion_tokens: int | None


def read_completion(answer: Any) -> Completion:
    """Return the single completion in a server's answer.

    Raises:
        AttributeError, LookupError, TypeError, ValueError: if it holds none, or one whose parts are of another type.
    """
    (choice,) = answer["choices"]
    usage = answer.get("usage") or {}
    completion = Completion(
        text=choice["text"],
        finish_reason=choice.get("finish_reason"),
        stopped_by=choice.get("stop_reason", choice.get("matched_stop")),
        token_ids=choice.get("token_ids"),
        prompt_token_ids=choice.get("prompt_token_ids"),
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
    )
    completion.text.encode()  # a lone surrogate is text for JSON, but for no tokenizer and no file
    for ids in (completion.token_ids, completion.prompt_token_ids):
        if not isinstance(ids, list | None):
            raise TypeError(f"{type(ids).__name__} for token ids")
    return completion


def prompt_text(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the text that the tokenizer turns into exactly ``token_ids``, or ``None`` if there is none.

    The opening BOS is left out of the text where the tokenizer adds it by itself.
    """
    for ids in (token_ids, token_ids[1:]):
        text = str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if tokenizer(text)["input_ids"] == list(token_ids):
            return text
    return None


def retokenised(
    completion: Completion, tokenizer: PreTrainedTokenizerBase, *, end_token: int | None
) -> list[int] | None:
    """Return a response's token ids from its text and their number, or ``None`` if the two do not agree.

    Args:
        completion: the text, the number of sampled tokens, and how the response ended.
        tokenizer: the policy's.
        end_token: what ended the response, if an end token did and is known.
    """
    ids: list[int] = tokenizer(completion.text, add_special_tokens=False)["input_ids"]
    # a replacement character may stand for any bytes that are no text, as many as its own
    if "\ufffd" in completion.text or tokenizer.decode(ids, skip_special_tokens=True) != completion.text:
        return None
    if completion.finish_reason == "stop":
        if end_token is None:
            return None
        ids = [*ids, end_token]
    return ids if len(ids) == completion.completion_tokens else None


def _dropped(reason: str) -> Response:
    return Response((), "", "failed", drop_reason=reason)


def _given(response: Response) -> Response:
    return response
