"""Sampling from servers with OpenAI's completions API: vLLM, SGLang, ``transformers serve`` and others."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from sppo_lightning.generation.completions import Completion, prompt_text, read_completion, retokenised
from sppo_lightning.generation.on_policy import OnPolicyCheck
from sppo_lightning.generation.parity import PROBE_TOKENS, ProbeAnswer
from sppo_lightning.generation.protocol import (
    EngineMemory,
    Generator,
    PolicySource,
    PromptResponses,
    SampleRequest,
    malformed_ids,
)
from sppo_lightning.generation.served_models import served_models, token_limit
from sppo_lightning.generation.weight_sync import WeightSync
from sppo_lightning.system.server_pool import ServerPool
from sppo_lightning.system.servers import Failure, ServerClient
from sppo_lightning.types import SPEED_OR_PLACE, Response, UserError

if TYPE_CHECKING:
    import torch

LOOK = "look at the server's log; a server that takes strings or OpenAI's own fields only needs prompt_format: text"
FUTILE = 64  # failed requests without a single answer after which the others are not tried
SEEDS = 2**31  # vLLM takes 64 bits, SGLang has held a seed in 32 with a sign


class OpenAIServerGenerator(Generator):
    """Samples from the ``completions`` endpoint of servers, one request a response, many at once.

    Training sees the token ids that the server says it sampled (``return_token_ids``: vLLM, SGLang). Where it gives
    none, a response's text is tokenised again, and the response is dropped unless the text comes back from the ids
    and their number is the server's; ids that cut the same text into as many other tokens would pass unseen.

    The same seeds need not give the same responses: near-ties depend on what a server happens to batch together,
    and SGLang heeds seeds only with ``--enable-deterministic-inference``.

    Before each phase the policy is handed to every server, and each has to give its greedy answers: one with older or
    other weights is refused. Of several servers the least loaded gets a request. One that goes away is left out, what
    it was asked is asked elsewhere, and it is used again once it is back and has the policy.

    Run against a real ``transformers serve`` and a real vLLM on a CPU; against SGLang by its documented answers only.

    Args:
        base_url: e.g. ``http://localhost:8000/v1``; several servers are a list.
        weight_sync: how the servers get the current policy.
        model: served name to ask for; leave it out where ``weight_sync`` names the model.
        prompt_format: ``token_ids`` sends prompts as they are, with fields that vLLM and SGLang share. ``text`` is
            for servers that take strings and OpenAI's own fields only, like ``transformers serve``: a prompt that
            does not survive the way there is dropped, and ``stop`` cuts here, not at the server.
        api_key_env: environment variable that holds the servers' key; ``None``: they ask for none.
        max_concurrency: requests under way at once, at each server.
        timeout: seconds that one try of a request may take.
        max_retries: tries of a request after the first one.
        startup_timeout: seconds to wait while no server accepts connections: while it loads its model, or is started
            again.
        logp_tolerance: nats per token by which a server's log-probs may differ from the policy's on average, for one
            that computes otherwise by intention (fp8); ``None``: what rounding explains.
        sampling: lengths, temperature and the like, see :class:`~sppo_lightning.generation.Generator`.
    """

    reproducible: ClassVar[bool] = False
    streams: ClassVar[bool] = True
    free_settings: ClassVar[frozenset[str]] = SPEED_OR_PLACE | {"logp_tolerance"}

    def __init__(
        self,
        base_url: str | list[str],
        weight_sync: WeightSync,
        model: str | None = None,
        prompt_format: Literal["token_ids", "text"] = "token_ids",
        api_key_env: str | None = None,
        max_concurrency: int = 64,
        timeout: float = 600.0,
        max_retries: int = 5,
        startup_timeout: float = 600.0,
        logp_tolerance: float | None = None,
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
        if logp_tolerance is not None and not logp_tolerance > 0:
            raise ValueError(
                f"OpenAIServerGenerator.logp_tolerance={logp_tolerance} must be greater than 0 nats per token"
            )
        self.weight_sync = weight_sync
        self.model = model
        self.prompt_format = prompt_format
        self._pool = ServerPool(
            "data.generator",
            [base_url] if isinstance(base_url, str) else base_url,
            api_key_env=api_key_env,
            max_concurrency=max_concurrency,
            timeout=timeout,
            max_retries=max_retries,
            startup_timeout=startup_timeout,
        )
        self._on_policy = OnPolicyCheck(logp_tolerance)
        self._policy: PolicySource | None = None
        self._asked_models: dict[ServerClient, str] = {}
        self._limit: int | None = None  # of prompt and response together, at the server that takes least
        self._embedding_rows = 0
        self._answered = False  # since the policy was handed over
        self._failure: Failure | None = None  # the first one since then
        self._failures = 0

    def check(self) -> None:
        """Raise :class:`~sppo_lightning.types.UserError` if there is no client library."""
        self._pool.check()

    def total_limit(self) -> int | None:
        """Return the least that the servers say they take, once they are there."""
        if self._limit is None:
            self._pool.open(partial(self._read_limit, name=self.model))
            self._pool.close()
        return self._limit

    def memory(self, row: int, *, free: int, total: int, device: torch.device) -> EngineMemory:
        """Take nothing: responses are decoded at the server."""
        return EngineMemory(copies=False, rows=0)

    def load(self, policy: PolicySource) -> None:
        """Hand the policy to the servers, and see that they answer as it does.

        Raises:
            ParityError: if one of them does not.
            UserError: if none can be reached in time, or one does not take the policy.
        """
        self._policy = policy
        self._embedding_rows = policy.embedding_rows
        self._answered, self._failure, self._failures = False, None, 0
        self._pool.open(self._make_ready)

    def unload(self) -> None:
        """Close the connections; the servers keep what they have loaded."""
        self._pool.close()

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[PromptResponses]:
        """Yield a prompt's responses as soon as the last of them is there.

        Raises:
            UserError: if no server can be reached any more, one refuses the key, knows no such model or would cut a
                response short, or no request at all has been answered since the policy was handed over.
        """
        under_way: dict[int, _Asked] = {}  # by the number of the call
        found: dict[int, dict[int, Response]] = {}
        with closing(self._pool.run(self._calls(requests, under_way))) as answers:
            for number, answer in answers:
                index, place, request = under_way.pop(number)
                responses = found.setdefault(index, {})
                responses[place] = self._response(request, answer)
                if self._failures >= FUTILE:
                    self._check_answered()
                if len(responses) == max(1, len(request.seeds)):
                    yield PromptResponses(index, [responses[place] for place in sorted(found.pop(index))])
        self._check_answered()

    def _check_answered(self) -> None:
        if self._failure is not None and not self._answered:
            raise UserError(f"not one request was answered: {self._failure.message} ({LOOK})")

    def _make_ready(self, client: ServerClient) -> None:
        """Hand the policy to one server, and see that it answers as the policy does."""
        assert self._policy is not None
        name = self.weight_sync.hand_over(self._policy, client=client, model=self.model)
        self._asked_models[client] = name
        self._read_limit(client, name=name)
        model = self._policy.resident_model() if self.weight_sync.on_policy else None
        if model is not None:
            prompts = self._on_policy.prompts(self._policy.tokenizer, model, longest=self._limit)
            answers = self._probe(client, prompts)
            server = f"data.generator.base_url={client.base_url!r}"
            self._on_policy.check(model, prompts, answers, server=server, weights=name)

    def _read_limit(self, client: ServerClient, *, name: str | None) -> None:
        models = served_models(client)
        limit = None if isinstance(models, Failure) else token_limit(models, name)
        if limit is not None:
            self._limit = min(limit, self._limit or limit)

    def _probe(self, client: ServerClient, prompts: Sequence[tuple[int, ...]]) -> list[ProbeAnswer]:
        """Return a server's greedy answers, without tokens where these cannot be known."""
        settings = {"model": self._asked_models[client], "max_tokens": PROBE_TOKENS, **self._draw(None)}
        if self.prompt_format == "token_ids":
            settings |= {"logprobs": 1, "ignore_eos": True}
        found = [ProbeAnswer((), None)] * len(prompts)
        asked = {place: body for place, prompt in enumerate(prompts) if (body := self._prompt(prompt))}
        calls = [partial(client.post, "completions", settings | body) for body in asked.values()]
        for number, answer in client.run(calls):
            probe = client.read(answer, self._read_probe)
            if isinstance(probe, Failure):
                raise UserError(f"not one request was answered: {probe.message} ({LOOK})")
            found[list(asked)[number]] = probe
        return found

    def _read_probe(self, answer: Any) -> ProbeAnswer:
        completion = read_completion(answer)
        token_ids = self._sampled(completion) or ()
        wrong = malformed_ids(token_ids, embedding_rows=self._embedding_rows, longest=PROBE_TOKENS)
        if wrong is not None:
            raise ValueError(wrong)
        logps = completion.logps
        return ProbeAnswer(token_ids, logps if logps is not None and len(logps) == len(token_ids) else None)

    def _calls(
        self, requests: Sequence[SampleRequest], under_way: dict[int, _Asked]
    ) -> Iterator[Callable[[ServerClient], Any]]:
        """Yield what to ask, and note of each call whose response it is."""
        numbers = count()
        for index, request in enumerate(requests):
            body = self._body(request)
            for place, seed in enumerate(request.seeds or (None,)):
                under_way[next(numbers)] = _Asked(index, place, request)
                if isinstance(body, Response):
                    yield partial(_given, body)
                else:
                    yield partial(self._ask, body | self._draw(seed))

    def _ask(self, body: dict[str, Any], client: ServerClient) -> _Said:
        return _Said(client, client.post("completions", {"model": self._asked_models[client]} | body))

    def _body(self, request: SampleRequest) -> dict[str, Any] | Response:
        """Return what the requests for one prompt share, or why there can be none."""
        prompt = len(request.token_ids)
        longest = self.longest_response(prompt)
        if longest < 1:
            return _dropped("prompt_too_long")
        if self._limit is not None and prompt + longest > self._limit:
            raise UserError(
                f"data.generator.base_url: a server takes {self._limit} tokens of prompt and response together, but a "
                f"prompt of {prompt} with {longest} new ones needs {prompt + longest}: start it with more (vLLM: "
                f"--max-model-len {prompt + longest}), or set max_total_tokens: {self._limit}"
            )
        body = self._prompt(request.token_ids)
        if body is None:
            return _dropped("prompt_retokenised_differently")
        body |= {"max_tokens": longest}
        stop_sent = self.stop is not None and self.prompt_format == "token_ids"
        return body | {"stop": self.stop} if stop_sent else body

    def _prompt(self, token_ids: Sequence[int]) -> dict[str, Any] | None:
        """Return what requests say of a prompt, or ``None`` if it would not survive the way there."""
        assert self._policy is not None
        if self.prompt_format == "text":
            text = prompt_text(token_ids, self._policy.tokenizer)
            return None if text is None else {"prompt": text}
        # what is left open here, vLLM takes from the model's generation config
        neutral = {"repetition_penalty": 1.0, "min_p": 0.0}
        return {"prompt": list(token_ids), **neutral, "return_token_ids": True}

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
        if isinstance(answer, Failure):
            return self._failed(answer)
        client, said = answer
        found = client.read(said, partial(self._read, request, client))
        return self._failed(found) if isinstance(found, Failure) else found

    def _read(self, request: SampleRequest, client: ServerClient, answer: Any) -> Response | Failure:
        """Return the response in a server's answer, with token ids that the policy has and no more than were asked for.

        May raise anything where the answer has another shape.
        """
        completion = read_completion(answer)
        if completion.finish_reason not in ("stop", "length"):
            return Failure("server_error", f"the server answered no completion: {client.quoted(answer)}")
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
        self._failures += 1
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


class _Asked(NamedTuple):
    request_number: int
    sample: int  # which of the responses to the request
    request: SampleRequest


class _Said(NamedTuple):
    client: ServerClient  # whose answer it is
    answer: Any


def _dropped(reason: str) -> Response:
    return Response((), "", "failed", drop_reason=reason)


def _given(response: Response, client: ServerClient) -> Response:
    return response
