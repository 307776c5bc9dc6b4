"""The log-probs of a micro-batch of pairs: the forward pass of training, and of the reference.

Shapes: B pairs, S rows of T tokens, N response tokens, H hidden width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn

from sppo_lightning.adapters import decoders, unwrapped
from sppo_lightning.compiled_layers import compile_layers, run_plain
from sppo_lightning.layouts import PairLayout, PairRows, PlainLayout, SharedLayout
from sppo_lightning.logprobs import response_sums
from sppo_lightning.losses import PairLogps
from sppo_lightning.memory import ran_out
from sppo_lightning.response_head import response_logps
from sppo_lightning.shared_attention import MaskedAttention, SharedAttention, VarlenAttention, attach, detach
from sppo_lightning.types import UserError, first_line

# mean distance of a token's log-prob from the one of its sequence alone, nats
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
PROMPTS, RESPONSES = (11, 4), ((5, 9), (8, 2))  # tokens of the trial's two pairs
ADVICE = "use sppo_lightning.pair_forward.AutoForward"
ELSEWHERE = "it differs on another process"
SHARED = "a prompt is read once for both of its responses"
PLAIN = "each response is read with its own copy of the prompt"
OVER_WINDOW = 8  # tokens by which the trial's longest sequence is longer than a window


class Trial(NamedTuple):
    """What a forward is tried with at a run's start."""

    longest: int  # most tokens of prompt and response together
    precision: Callable[[], AbstractContextManager[Any]]  # the trainer's
    agree: Callable[[bool], bool]  # whether it is true on all processes


class PairForward(ABC):
    """Reads the log-probs of chosen and rejected responses.

    Args:
        chunk: positions whose logits exist at once; ``None``: as many as 2^26 logits are (2^29 on CUDA).
        compiled: run the decoder's layers through ``torch.compile``; on a CPU that takes a C++ compiler.
    """

    half_only: ClassVar[bool] = False  # whether it computes in 16 bits only
    failing: ClassVar[str] = "cannot share a prompt"  # what is said of a model that raises
    differing: ClassVar[str] = "gives other log-probs when a prompt is shared"

    def __init__(self, chunk: int | None = None, compiled: bool = False) -> None:
        if chunk is not None and chunk < 1:
            raise ValueError(f"{type(self).__name__}.chunk={chunk} must be at least 1")
        self.chunk = chunk
        self.compiled = compiled

    @abstractmethod
    def prepare(self, model: nn.Module, trial: Trial) -> str:
        """Try the forward on the model, once, before the first batch; return what to tell the user.

        Raises:
            UserError: if the model cannot take it.
        """

    @abstractmethod
    def layout(self, pad_token_id: int) -> PairLayout:
        """Return the layout that batches must have."""

    @abstractmethod
    def token_logps(self, model: nn.Module, rows: PairRows) -> Tensor:
        """Return the log-prob of each response token, ``[N]``, nats."""

    def logps(self, model: nn.Module, rows: PairRows) -> PairLogps:
        """Return the log-prob of each response given its prompt, ``[B]`` each, float64, nats."""
        if self.compiled:
            compile_layers(model)
        sums = response_sums(
            self.token_logps(model, rows), rows.places, rows.responses, rows.longest_response
        )
        return PairLogps(*sums.chunk(2))

    def release(self, model: nn.Module) -> None:
        """Give the model its own attention and layers back, for whoever samples from it or copies it."""
        detach(model)
        run_plain(model)


class PlainForward(PairForward):
    """Each response with its own copy of the prompt; every causal language model takes it."""

    failing = "cannot be read in padded rows"
    differing = "gives other log-probs in padded rows"

    def prepare(self, model: nn.Module, trial: Trial) -> str:
        """Return what to tell the user."""
        _require(self, model, trial, "this architecture cannot be trained")
        return PLAIN

    def layout(self, pad_token_id: int) -> PairLayout:
        """Return rows padded on the right."""
        return PlainLayout(pad_token_id)

    def token_logps(self, model: nn.Module, rows: PairRows) -> Tensor:
        """Return the log-prob of each response token, ``[N]``, nats."""
        return _token_logps(model, rows, self.chunk, {"attention_mask": None})


class SharedForward(PairForward):
    """A prompt is read once for both responses; attention by ``scaled_dot_product_attention``, on any device."""

    def prepare(self, model: nn.Module, trial: Trial) -> str:
        """Return what to tell the user."""
        _require(self, model, trial, ADVICE)
        return SHARED

    def layout(self, pad_token_id: int) -> PairLayout:
        """Return one row without padding."""
        return SharedLayout()

    def token_logps(self, model: nn.Module, rows: PairRows) -> Tensor:
        """Return the log-prob of each response token, ``[N]``, nats."""
        return _shared_token_logps(model, rows, self.chunk, MaskedAttention)


class VarlenForward(PairForward):
    """A prompt is read once for both responses; attention by torch's flash kernel, without padding: CUDA, 16 bits."""

    half_only = True

    def prepare(self, model: nn.Module, trial: Trial) -> str:
        """Return what to tell the user."""
        _require(self, model, trial, ADVICE)
        return SHARED

    def layout(self, pad_token_id: int) -> PairLayout:
        """Return one row without padding."""
        return SharedLayout()

    def token_logps(self, model: nn.Module, rows: PairRows) -> Tensor:
        """Return the log-prob of each response token, ``[N]``, nats."""
        return _shared_token_logps(model, rows, self.chunk, VarlenAttention)


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

    def prepare(self, model: nn.Module, trial: Trial) -> str:
        """Return what to tell the user."""
        on_cuda = next(model.parameters()).is_cuda
        kinds: list[type[PairForward]] = [VarlenForward, SharedForward] if on_cuda else [SharedForward]
        reasons = []
        for candidate in (kind(self.chunk, self.compiled) for kind in kinds):
            reason = _cannot(candidate, model, trial)
            if trial.agree(reason is None):
                self._chosen = candidate
                return f"{SHARED} ({type(candidate).__name__})"
            reasons.append(reason or ELSEWHERE)
        self._chosen = PlainForward(self.chunk, self.compiled)
        self._chosen.prepare(model, trial)
        return f"{PLAIN}: {'; '.join(dict.fromkeys(reasons))}"

    def layout(self, pad_token_id: int) -> PairLayout:
        """Return the layout of the forward that serves."""
        return self.chosen.layout(pad_token_id)

    def token_logps(self, model: nn.Module, rows: PairRows) -> Tensor:
        """Return the log-prob of each response token, ``[N]``, nats."""
        return self.chosen.token_logps(model, rows)


def _token_logps(model: nn.Module, rows: PairRows, chunk: int | None, attention: dict[str, Any]) -> Tensor:
    """Run the decoder, and its head where response tokens are predicted."""
    output = decoders(model)[0](
        input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False, **attention
    )
    hidden: Tensor = output.last_hidden_state
    return response_logps(
        model, hidden.flatten(0, 1).index_select(0, rows.predicting), rows.targets, chunk=chunk
    )


def _shared_token_logps(
    model: nn.Module, rows: PairRows, chunk: int | None, attention: type[SharedAttention]
) -> Tensor:
    assert rows.shared is not None
    attach(model)
    # a mask of four dimensions is handed on as it is: without one, restarting positions would be taken for documents
    mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=rows.input_ids.device)
    return _token_logps(
        model, rows, chunk, {"attention_mask": mask, "shared_attention": attention(rows.shared)}
    )


def _require(forward: PairForward, model: nn.Module, trial: Trial, advice: str) -> None:
    reason = _cannot(forward, model, trial)
    if not trial.agree(reason is None):
        raise UserError(f"model.pair_forward {type(forward).__name__}: {reason or ELSEWHERE}: {advice}")


def _cannot(forward: PairForward, model: nn.Module, trial: Trial) -> str | None:
    """Return why a forward does not give the model's own log-probs; ``None`` if it does."""
    inner, device = unwrapped(model), next(model.parameters()).device
    name = type(inner).__name__
    context, dtype = _precision(forward, model, trial)
    prompts, chosen, rejected = _trial_pairs(inner.config.get_text_config(), trial.longest)
    rows = move_data_to_device(forward.layout(0).rows(prompts, chosen, rejected), device)
    with torch.no_grad(), context:
        try:
            found = forward.token_logps(model, rows)
        except Exception as error:
            if ran_out(error):
                raise
            return f"{name} {forward.failing} ({first_line(error)})"
        finally:
            forward.release(model)
        pairs = zip([*prompts, *prompts], [*chosen, *rejected], strict=True)
        own = torch.cat([_alone(inner, torch.tensor([*p, *r], device=device), len(r)) for p, r in pairs])
    drift = (found - own).abs().mean().item()
    if drift <= TOLERANCE[dtype]:
        return None
    return f"{name} {forward.differing}, by {drift:.2g} nat per token (tolerance {TOLERANCE[dtype]:g})"


def _precision(
    forward: PairForward, model: nn.Module, trial: Trial
) -> tuple[AbstractContextManager[Any], torch.dtype]:
    """Return the most exact arithmetic in which weights and kernel can be compared."""
    weights = {parameter.dtype for parameter in model.parameters()}
    if weights <= {torch.float32, torch.float64} and not forward.half_only:
        return nullcontext(), torch.float32 if torch.float32 in weights else torch.float64
    device = next(model.parameters()).device.type
    with trial.precision():
        if torch.is_autocast_enabled(device):
            return trial.precision(), torch.get_autocast_dtype(device)
    return trial.precision(), torch.float16 if torch.float16 in weights else torch.bfloat16


def _alone(model: nn.Module, ids: Tensor, response: int) -> Tensor:
    """Return the log-probs of the last ``response`` tokens by the model's own logits, ``[response]``."""
    logits: Tensor = model(input_ids=ids[None], use_cache=False, logits_to_keep=response + 1).logits[0, :-1]
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return logps.gather(-1, ids[-response:, None]).squeeze(-1)


def _trial_pairs(config: Any, longest: int) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Return two pairs of random tokens, longer than the model's window if the run's sequences may be."""
    window = getattr(config, "sliding_window", None) or 0
    reach = window + OVER_WINDOW if window < longest else 0
    generator = torch.Generator().manual_seed(0)

    def drawn(length: int) -> list[int]:
        ids: list[int] = torch.randint(config.vocab_size, (length,), generator=generator).tolist()
        return ids

    prompts = [drawn(max(PROMPTS[0], reach)), drawn(PROMPTS[1])]
    return prompts, [drawn(c) for c, _ in RESPONSES], [drawn(r) for _, r in RESPONSES]
