"""Talk to an HTTP server that answers JSON: bounded concurrency, time-outs, retries with back-off.

Retries are the openai package's: broken connections, time-outs, 408, 409, 429 and 5xx, with growing, jittered waits,
or those that the server asks for. A server that accepts no connection is waited for. What a server says is never
trusted: see :meth:`ServerClient.read` and :meth:`ServerClient.quoted`.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit

from sppo_lightning.redaction import without_passwords
from sppo_lightning.system.outage import LOOK_EVERY, Outage
from sppo_lightning.system.workers import daemon_workers
from sppo_lightning.types import UserError, first_line

if TYPE_CHECKING:
    from openai import OpenAI

NO_KEY = "none"  # sent to servers that ask for no key
LONGEST_MESSAGE = 300  # characters; some servers send the whole request back
_AWAY = object()

Result = TypeVar("Result")


class Failure(NamedTuple):
    """A request that the server did not answer, although others may fare better."""

    reason: str  # ``server_error``, ``server_time_out`` or ``malformed_answer``
    message: str


class ServerUnreachableError(UserError):
    """The server accepts no connection: it is not up yet, or gone."""


class UnknownModelError(UserError):
    """The server knows no such address or model; one that was started again has lost what it was handed."""


class ServerClient:
    """A server at ``base_url``.

    Args:
        key: config key to name in errors, e.g. ``data.generator``.
        base_url: e.g. ``http://localhost:8000/v1``.
        api_key_env: environment variable that holds the key; ``None``: the server asks for none.
        max_concurrency: requests under way at once.
        timeout: seconds that one try may take, its answer's last byte included.
        max_retries: tries after the first one.
        startup_timeout: seconds to wait for a server that accepts no connection, once it is found so.
    """

    def __init__(
        self,
        key: str,
        base_url: str,
        *,
        api_key_env: str | None = None,
        max_concurrency: int = 32,
        timeout: float = 600.0,
        max_retries: int = 5,
        startup_timeout: float = 0.0,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"{key}.base_url={base_url!r} must start with http:// or https://")
        parts = urlsplit(base_url)
        if parts.username or parts.password or parts.query:
            raise ValueError(
                f"{key}.base_url must hold no user name, password or query: a key comes from the environment variable "
                "that api_key_env names"
            )
        if api_key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", api_key_env):
            raise ValueError(f"{key}.api_key_env must be the name of an environment variable, not a key")
        if max_concurrency < 1:
            raise ValueError(f"{key}.max_concurrency={max_concurrency} must be at least 1")
        if not timeout > 0:
            raise ValueError(f"{key}.timeout={timeout} must be greater than 0 seconds")
        if max_retries < 0:
            raise ValueError(f"{key}.max_retries={max_retries} must be 0 or more")
        if not startup_timeout >= 0:
            raise ValueError(f"{key}.startup_timeout={startup_timeout} must be 0 seconds or more")
        self.key = key
        self.base_url = base_url
        self.api_key_env = api_key_env
        self.max_concurrency = max_concurrency
        self.timeout = timeout
        self.max_retries = max_retries
        self.startup_timeout = startup_timeout
        self._outage = Outage(startup_timeout)
        self._client: OpenAI | None = None

    def check(self) -> None:
        """Raise :class:`~sppo_lightning.types.UserError` if the client library is missing or the key cannot be one."""
        if find_spec("openai") is None:
            raise UserError(f"{self.key} talks to a server: pip install 'sppo-lightning[server]'")
        if not (self._secret.isascii() and self._secret.isprintable()):
            raise UserError(
                f"the environment variable {self.api_key_env} holds a character that no key has: set it again"
            )

    def open(self) -> None:
        """Open the connection pool."""
        from openai import OpenAI

        from sppo_lightning.system.bounded_http import BoundedClient

        if self._client is None:
            key = self._secret or NO_KEY
            self._client = OpenAI(
                base_url=self.base_url,
                api_key=key,
                timeout=self.timeout,
                max_retries=self.max_retries,
                http_client=BoundedClient(key, timeout=self.timeout, connections=self.max_concurrency),
            )

    def close(self) -> None:
        """Close the connection pool."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def get(self, path: str) -> Any:
        """Return what the server answers at ``path`` (below ``base_url``, or a whole address).

        Returns:
            The JSON, the text of an answer that is none, or a :class:`Failure` that concerns this request only.

        Raises:
            UserError: if the server cannot be reached (:class:`ServerUnreachableError`), refuses the key, or knows no
                such address or model (:class:`UnknownModelError`).
        """
        return self._answer(lambda client, kind: client.get(path, cast_to=kind))

    def post(self, path: str, body: dict[str, Any], *, repeat: bool = True) -> Any:
        """Send ``body`` to ``path`` and return what comes back, as :meth:`get` does.

        Args:
            path: below ``base_url``, or a whole address.
            body: JSON.
            repeat: whether a failed try is repeated, up to ``max_retries`` times.
        """
        options: Any = {} if repeat else {"max_retries": 0}
        return self._answer(lambda client, kind: client.post(path, cast_to=kind, body=body, options=options))

    def read(self, answer: Any, reader: Callable[[Any], Result]) -> Result | Failure:
        """Return what ``reader`` makes of an answer; whatever it raises is this answer's failure, not the run's.

        Args:
            answer: what :meth:`get` or :meth:`post` returned; a failure comes back as it is.
            reader: may raise anything on an answer that is not what it expects.
        """
        if isinstance(answer, Failure):
            return answer
        try:
            return reader(answer)
        except Exception as error:
            return Failure(
                "malformed_answer",
                f"{self._where} answered what cannot be read ({self.quoted(error)}): {self.quoted(answer)}",
            )

    def quoted(self, said: object) -> str:
        """Return what a server said, or an error that quotes it, as one short line that holds no key.

        Args:
            said: an error, or anything that came from a server.
        """
        try:
            if isinstance(said, BaseException):
                text = f"{type(said).__name__}: {first_line(said)}"
            else:
                text = said if isinstance(said, str) else repr(said)
        except Exception:  # an answer that is nested too deeply to be shown
            text = f"a {type(said).__name__}"
        return self._one_line(text)

    def run(self, calls: Iterable[Callable[[], Result]]) -> Generator[tuple[int, Result], None, None]:
        """Run calls in threads, ``max_concurrency`` at once; yield (position, result) as they come.

        ``calls`` is read by the caller's thread, no further than what is under way. Whoever stops early, by an
        exception or Ctrl-C too, waits for nothing: requests under way end unheard.
        """
        queue = enumerate(calls)
        with daemon_workers() as (start, done):
            under_way = 0
            while True:
                for position, call in islice(queue, self.max_concurrency - under_way):
                    start(position, call)
                    under_way += 1
                if not under_way:
                    return
                position, answer = done.get()
                under_way -= 1
                yield position, answer.result()

    @property
    def _secret(self) -> str:
        return os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""

    @property
    def _where(self) -> str:
        return f"{self.key}.base_url={self.base_url!r}"

    def _answer(self, call: Callable[[OpenAI, Any], Any]) -> Any:
        while (answer := self._reached(call)) is _AWAY:
            time.sleep(LOOK_EVERY)
        return answer

    def _reached(self, call: Callable[[OpenAI, Any], Any]) -> Any:
        """Return the answer, or ``_AWAY`` where the server is not there and is still waited for."""
        try:
            answer = self._tried(call)
        except ServerUnreachableError as error:
            if self._outage.goes_on(str(error)):
                return _AWAY
            raise
        self._outage.over()
        return answer

    def _tried(self, call: Callable[[OpenAI, Any], Any]) -> Any:
        import openai

        from sppo_lightning.system.bounded_http import NotReachedError, response_type

        assert self._client is not None
        where = self._where
        # the causes are left out of what is raised: a traceback would show the key that they may quote
        try:
            response = call(self._client, response_type())
        except NotReachedError as error:
            raise self._unreachable(error) from None
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, NotReachedError):  # older versions of openai try again first
                raise self._unreachable(error.__cause__) from None
            if isinstance(error, openai.APITimeoutError):
                tries = self.max_retries + 1
                return Failure(
                    "server_time_out", f"{where} gave no answer within {self.timeout:g} s, {tries} times"
                )
            return Failure(
                "server_error", f"{where} broke the connection off: {self._said(error.__cause__ or error)}"
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(
                f"{where} refuses the key ({self._said(error)}): set the environment variable "
                f"{self.api_key_env or 'that api_key_env is to name'}"
            ) from None
        except openai.NotFoundError as error:
            raise UnknownModelError(
                f"{where} knows no such address or model ({self._said(error)}): correct base_url or model"
            ) from None
        except openai.APIStatusError as error:
            if 300 <= error.status_code < 400:
                place = self._one_line(error.response.headers.get("location", "nowhere"))
                return Failure(
                    "server_error",
                    f"{where} answered: {error.status_code}, go to {place} (not followed: correct base_url)",
                )
            return Failure("server_error", f"{where} answered: {self._said(error)}")
        except openai.APIError as error:
            return Failure("server_error", f"{where} answered: {self._said(error)}")
        return self.read(response, self._content)

    def _unreachable(self, error: BaseException) -> UserError:
        """Return what to raise where no connection can be made; a name that nobody knows is not waited for."""
        causes = list(_causes(error))
        unknown = any(isinstance(cause, socket.gaierror) for cause in causes)
        kind = UserError if unknown else ServerUnreachableError
        return kind(
            f"{self._where} cannot be reached ({self._said(causes[1] if len(causes) > 1 else error)}): start the "
            "server, or correct the address"
        )

    def _content(self, response: Any) -> Any:
        """Return an answer's JSON, or its text if it is none."""
        from sppo_lightning.system.bounded_http import REFUSED

        refused = response.extensions.get(REFUSED)
        if refused:
            return Failure("malformed_answer", f"{self._where} gave an answer that {refused}")
        kind = response.headers.get("content-type", "")
        return json.loads(response.content) if kind.endswith("json") else response.text

    def _said(self, error: BaseException) -> str:
        """Return what an error says, in one short line and without the key."""
        text = first_line(error)
        message: Any = getattr(error, "body", None)
        if isinstance(message, dict):
            message = message.get("message") or message.get("detail") or message
        if message:  # what the client's own text holds of it depends on its version
            text = f"{getattr(error, 'status_code', '')} {self.quoted(message)}".strip()
        return self._one_line(text)

    def _one_line(self, text: str) -> str:
        """Return a text without the key, bearer tokens and control characters, in one line that is not too long."""
        for spelling in sorted(self._spellings(), key=len, reverse=True):
            text = text.replace(spelling, "…")
        text = " ".join(without_passwords(text).split())
        text = text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + "…"
        return "".join(
            letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
        )

    def _spellings(self) -> set[str]:
        """Return the ways in which the key may be written in a quotation."""
        secret = self._secret
        return {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, safe="")} - {""}


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, what caused it, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
