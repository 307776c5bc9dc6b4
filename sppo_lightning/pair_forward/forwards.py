"""The log-probs of a micro-batch of pairs: the forward pass of training, and of the reference.

Shapes: B pairs, S rows of T tokens, N response tokens, H hidden width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from sppo_lightning.losses import PairLogps, PairValues
from sppo_lightning.pair_forward.compiled import compile_layers, run_plain
from sppo_lightning.pair_forward.head import TokenReadings, read_tokens
from sppo_lightning.pair_forward.layouts import PairLayout, PairRows, PlainLayout, SharedLayout
from sppo_lightning.pair_forward.logprobs import by_response, summed
from sppo_lightning.pair_forward.parity import ParityCheck, parity_failure
from sppo_lightning.pair_forward.shared_attention import (
    MaskedAttention,
    SharedAttention,
    VarlenAttention,
    attach,
)
from sppo_lightning.policy.anatomy import decoders, window_of
from sppo_lightning.policy.attention import CannotAttendError, detach, whole_mask
from sppo_lightning.policy.sharding import as_forward
from sppo_lightning.types import UserError

ADVICE = "use sppo_lightning.pair_forward.AutoForward"
NO_OTHER = "no forward matches this model's own log-probs"
ELSEWHERE = "it differs on another process"
SHARED = "a prompt is read once for both of its responses"
PLAIN = "each response is read with its prompt, unshared"


class PairReadings(NamedTuple):
    """What is read of a micro-batch of pairs, float64, nats."""

    tokens: PairLogps  # [B, T] each, log-probs, 0 after a response's end
    collision_entropy: PairValues | None = None  # [B] each, summed over tokens; None: not asked for


class PairForward(ABC):
    """Reads the log-probs of chosen and rejected responses.

    Args:
        chunk: positions whose logits exist at once; ``None``: as many as 2^26 logits are (2^29 on CUDA).
        compiled: run the decoder's layers through ``torch.compile``; on a CPU that takes a C++ compiler.
    """

    half_only: ClassVar[bool] = False  # whether it computes in 16 bits only
    failing: ClassVar[str] = "cannot share a prompt"  # what is said of a model that raises
    differing: ClassVar[str] = "gives other log-probs when a prompt is shared"
    serving: ClassVar[str] = SHARED  # what is said of a model that it suits
    advice: ClassVar[str] = ADVICE

    def __init__(self, chunk: int | None = None, compiled: bool = False) -> None:
        if chunk is not None and chunk < 1:
            raise ValueError(f"{type(self).__name__}.chunk={chunk} must be at least 1")
        self.chunk = chunk
        self.compiled = compiled

    def prepare(self, model: nn.Module, check: ParityCheck) -> str:
        """Check the forward's parity with the model, once, before the first batch; return a message for the user.

        Raises:
            UserError: if the model cannot take it.
        """
        reason = parity_failure(self, model, check)
        if not check.agree(reason is None):
            raise UserError(f"model.pair_forward {type(self).__name__}: {reason or ELSEWHERE}: {self.advice}")
        return self.serving

    @abstractmethod
    def layout(self, pad_token_id: int) -> PairLayout:
        """Return the layout that batches must have."""

    @abstractmethod
    def read(self, model: nn.Module, rows: PairRows, *, with_entropy: bool = False) -> TokenReadings:
        """Return the log-prob of each response token, ``[N]``, and the collision entropy there if asked for."""

    def token_logps(self, model: nn.Module, rows: PairRows) -> Tensor:
        """Return the log-prob of each response token, ``[N]``, nats."""
        return self.read(model, rows).logps

    def read_pairs(self, model: nn.Module, rows: PairRows, *, with_entropy: bool = False) -> PairReadings:
        """Return the log-prob of each response token, and if asked for the collision entropy of each response."""
        if self.compiled:
            compile_layers(model)
        logps, entropy = self.read(model, rows, with_entropy=with_entropy)
        tokens = PairLogps(*self._padded(logps, rows))
        if entropy is None:
            return PairReadings(tokens)
        return PairReadings(tokens, PairValues(*(side.sum(-1) for side in self._padded(entropy, rows))))

    @staticmethod
    def _padded(values: Tensor, rows: PairRows) -> tuple[Tensor, ...]:
        return by_response(values, rows.places, rows.responses, rows.longest_response).chunk(2)

    def logps_by_token(self, model: nn.Module, rows: PairRows) -> PairLogps:
        """Return the log-prob of each response token, ``[B, T]`` each, 0 after a response's end, float64, nats."""
        return self.read_pairs(model, rows).tokens

    def logps(self, model: nn.Module, rows: PairRows) -> PairLogps:
        """Return the log-prob of each response given its prompt, ``[B]`` each, float64, nats."""
        return summed(self.logps_by_token(model, rows))

    def release(self, model: nn.Module) -> None:
        """Remove the attention override and compiled layers, before anything else uses or copies the model."""
        detach(model)
        run_plain(model)


class PlainForward(PairForward):
    """Each response with an unshared prompt, in rows that are padded on the right."""

    failing = "cannot be read in padded rows"
    differing = "gives other log-probs in padded rows"
    serving = PLAIN
    advice = NO_OTHER

    def layout(self, pad_token_id: int) -> PairLayout:
        """Return rows padded on the right."""
        return PlainLayout(pad_token_id)

    def read(self, model: nn.Module, rows: PairRows, *, with_entropy: bool = False) -> TokenReadings:
        """Return the log-prob of each response token, ``[N]``, and the collision entropy there if asked for."""
        return _read(model, rows, self.chunk, {"attention_mask": None}, with_entropy)


class SharedForward(PairForward):
    """A prompt is read once for both responses; attention by ``scaled_dot_product_attention``, on any device."""

    def layout(self, pad_token_id: int) -> PairLayout:
        """Return one row without padding."""
        return SharedLayout()

    def read(self, model: nn.Module, rows: PairRows, *, with_entropy: bool = False) -> TokenReadings:
        """Return the log-prob of each response token, ``[N]``, and the collision entropy there if asked for."""
        return _read_shared(model, rows, self.chunk, MaskedAttention, with_entropy)


class VarlenForward(PairForward):
    """A prompt is read once for both responses; attention by torch's flash kernel, without padding: CUDA, 16 bits."""

    half_only = True

    def layout(self, pad_token_id: int) -> PairLayout:
        """Return one row without padding."""
        return SharedLayout()

    def read(self, model: nn.Module, rows: PairRows, *, with_entropy: bool = False) -> TokenReadings:
        """Return the log-prob of each response token, ``[N]``, and the collision entropy there if asked for."""
        return _read_shared(model, rows, self.chunk, VarlenAttention, with_entropy)


class AutoForward(PairForward):
    """The fastest of these forwards that gives the model's own log-probs.

    On CUDA in 16 bits ``VarlenForward``, else ``SharedForward``, else ``PlainForward``.
    """

    def __init__(self, chunk: int | None = None, compiled: bool = False) -> None:
        super().__init__(chunk, compiled)
        self._chosen: PairForward | None = None

    @property
    def chosen(self) -> PairForward:
        """The forward that serves."""
        assert self._chosen is not None, "prepare() comes first"
        return self._chosen

    def prepare(self, model: nn.Module, check: ParityCheck) -> str:
        """Return a message for the user."""
        on_cuda = next(model.parameters()).is_cuda
        kinds: list[type[PairForward]] = [VarlenForward, SharedForward] if on_cuda else [SharedForward]
        reasons = []
        for candidate in (kind(self.chunk, self.compiled) for kind in kinds):
            reason = parity_failure(candidate, model, check)
            if check.agree(reason is None):
                self._chosen = candidate
                return f"{SHARED} ({type(candidate).__name__})"
            reasons.append(reason or ELSEWHERE)
        self._chosen = PlainForward(self.chunk, self.compiled)
        self._chosen.prepare(model, check)
        return f"{PLAIN}: {'; '.join(dict.fromkeys(reasons))}"

    def layout(self, pad_token_id: int) -> PairLayout:
        """Return the layout of the forward that serves."""
        return self.chosen.layout(pad_token_id)

    def read(self, model: nn.Module, rows: PairRows, *, with_entropy: bool = False) -> TokenReadings:
        """Return the log-prob of each response token, ``[N]``, and the collision entropy there if asked for."""
        return self.chosen.read(model, rows, with_entropy=with_entropy)


def _read(
    model: nn.Module, rows: PairRows, chunk: int | None, attention: dict[str, Any], with_entropy: bool
) -> TokenReadings:
    """Run the decoder, and its head where response tokens are predicted."""

    def read() -> TokenReadings:
        output = decoders(model)[0](
            input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False, **attention
        )
        hidden: Tensor = output.last_hidden_state
        predicting = hidden.flatten(0, 1).index_select(0, rows.predicting)
        return read_tokens(model, predicting, rows.targets, chunk=chunk, with_entropy=with_entropy)

    return as_forward(model, read)


def _read_shared(
    model: nn.Module,
    rows: PairRows,
    chunk: int | None,
    attention: type[SharedAttention],
    with_entropy: bool,
) -> TokenReadings:
    assert rows.shared is not None
    attach(model)
    mask = whole_mask(rows.input_ids.device)
    segments = attention(rows.shared)
    found = _read(model, rows, chunk, {"attention_mask": mask, "shared_attention": segments}, with_entropy)
    window = window_of(model)
    if (
        window is not None
        and not segments.windows
        and window < rows.shared.prompts[1] + rows.shared.responses[1]
    ):
        raise CannotAttendError(f"it does not tell its attention of its window of {window} tokens")
    return found
