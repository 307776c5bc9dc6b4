"""Decoding steps of fixed shapes, which a CUDA graph replays.

A token of a large model takes thousands of small kernels, and a GPU is done with each before the next one is launched.
Recorded once, a step is launched as a whole. For that nothing it reads or writes may move from token to token: keys and
values lie in buffers with room for the longest response, and attention looks at a part of them that grows in blocks.

Shapes: B rows (active sequences), H query heads, K key heads, D head width, L tokens of room, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from sppo_lightning.generation.cache import ReservedLayer, reserved_cache
from sppo_lightning.generation.cuda_graph import RecordedStep
from sppo_lightning.generation.steps import DecodingSteps, PlainSteps, left_padded, read
from sppo_lightning.policy import attention as attention_override
from sppo_lightning.policy.agreement import compare_logits, product_dtype
from sppo_lightning.policy.anatomy import layer_types, unwrapped, window_of
from sppo_lightning.policy.attention import CannotAttendError
from sppo_lightning.policy.rounding import off_by_a_rounding
from sppo_lightning.system.device_memory import ran_out
from sppo_lightning.types import first_line

NAME = "sppo_fixed_steps"
BLOCK = 256  # tokens by which the part of the room that attention looks at grows; each is a graph of its own
ALIGNED = 64  # tokens that the room is a multiple of, so that attention's kernels take its mask
LAYERS = {"full_attention"}  # types that a model may have
FEW_ROWS = 16  # up to which a step takes as long as with one
PROBE_PROMPTS, PROBE_STEPS = (3, 9), 3  # tokens of the check's prompts; tokens after each


class FixedLayer(DynamicLayer):
    """Keys and values ``[B, K, L, D]`` of one layer in buffers that stay where they are.

    Args:
        layer: holds the prompts' keys and values, ``[prompts, K, T, D]``.
        source: ``[B]`` prompt of each row.
        room: L.
        place: ``[1]`` where the next token goes.
    """

    def __init__(self, layer: DynamicLayer, source: Tensor, room: int, place: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        assert layer.keys is not None
        assert layer.values is not None
        self.is_initialized = True
        self.dtype, self.device = layer.keys.dtype, layer.keys.device
        self._buffers = [self._spread(states, source, room) for states in (layer.keys, layer.values)]
        self._place = place

    @staticmethod
    def _spread(states: Tensor, source: Tensor, room: int) -> Tensor:
        _, heads, tokens, width = states.shape
        buffer = states.new_zeros(len(source), heads, room, width)  # what is masked must not be NaN
        buffer[:, :, :tokens] = states[source]
        return buffer

    def look_at(self, rows: int, length: int) -> None:
        """Let attention see the first rows and tokens of the buffers."""
        self.keys, self.values = (buffer[:rows, :, :length] for buffer in self._buffers)

    def keep(self, rows: Tensor) -> None:
        """Move some rows to the front."""
        for buffer in self._buffers:
            buffer[: len(rows)] = buffer[rows]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the keys and values of one token a row, and return all that are looked at."""
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self._place, key_states.to(self.dtype))
        self.values.index_copy_(2, self._place, value_states.to(self.dtype))
        return self.keys, self.values


class FixedSteps(DecodingSteps):
    """Steps that a CUDA graph replays; on a CPU the same ones, as they are.

    Args:
        model: to sample from; while the context lasts, it attends through this module.
        cache: holds the prompts' keys and values, in layers of full attention; it is used up.
        source: ``[B]`` prompt of each row.
        mask: ``[prompts, T + tokens to come]``, 1 where a prompt has a token, 0 elsewhere.
        width: T.

    Raises:
        CannotAttendError: if a layer of the cache is of another kind.
    """

    def __init__(
        self, model: nn.Module, cache: DynamicCache, source: Tensor, mask: Tensor, width: int
    ) -> None:
        self._model = model
        self._cache = cache
        self._room = -(-mask.shape[1] // ALIGNED) * ALIGNED
        self._seen = width
        rows, device = len(source), source.device
        self._place = torch.zeros(1, dtype=torch.long, device=device)
        self._layers = self._fixed_layers(source)
        self._bias = torch.zeros(rows, 1, 1, self._room, dtype=self._layers[0].dtype, device=device)
        self._bias[..., : mask.shape[1]].masked_fill_(mask[source, None, None] == 0, float("-inf"))
        self._bias[..., mask.shape[1] :] = float("-inf")
        self._tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._positions = torch.zeros_like(self._tokens)
        self._whole_mask = attention_override.whole_mask(device)
        self._rows = rows
        self._graph = RecordedStep(device) if device.type == "cuda" else None

    def _fixed_layers(self, source: Tensor) -> list[FixedLayer]:
        """Put layers with room in the place of the cache's, one after the other, so that only one is held twice."""
        found = []
        for number, each in enumerate(self._cache.layers):
            layer = cast(DynamicLayer, each)
            if type(layer) not in (DynamicLayer, ReservedLayer) or not layer.is_initialized:
                raise CannotAttendError(f"layer {number} keeps its keys in a {type(layer).__name__}")
            found.append(FixedLayer(layer, source, self._room, self._place))
            self._cache.layers[number] = found[-1]
        return found

    def __enter__(self) -> FixedSteps:
        attention_override.attach(self._model, NAME, _attend, LAYERS)
        return self

    def __exit__(self, *args: object) -> None:
        """Remove the attention override, and free the graph."""
        attention_override.detach(self._model)
        self._graph = None

    def logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the logits of the next token, ``[B, V]`` float32, until the next call."""
        self._tokens[: self._rows, 0] = tokens
        self._positions[: self._rows, 0] = positions
        self._place.fill_(self._seen)
        self._bias[..., self._seen] = 0.0
        self._seen += 1
        shape = (self._rows, min(self._room, -(-self._seen // BLOCK) * BLOCK))
        if self._graph is None:
            return self._step(*shape)
        return self._graph.replay(shape, lambda: self._step(*shape))

    def _step(self, rows: int, length: int) -> Tensor:
        for layer in self._layers:
            layer.look_at(rows, length)
        return read(
            self._model,
            self._tokens[:rows],
            self._whole_mask,
            self._positions[:rows],
            self._cache,
            fixed_bias=self._bias[:rows, ..., :length],
        )

    def worth_compacting(self, active: int, rows: int) -> bool:
        """Whether half of many rows are done: each compaction is another graph."""
        return rows > FEW_ROWS and active <= rows // 2

    def keep(self, rows: Tensor) -> None:
        """Compact to some rows."""
        for layer in self._layers:
            layer.keep(rows)
        self._bias[: len(rows)] = self._bias[rows]
        self._rows = len(rows)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    fixed_bias: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Take the place of a model's attention, for one token a row: ``[B, H, 1, D]`` in, ``[B, 1, H, D]`` out.

    The query heads that share a key head stand in the place of query tokens: they see the same keys, and no key has to
    be repeated for them.
    """
    if fixed_bias is None:
        raise CannotAttendError(f"{type(module).__name__} is not handed what its model is called with")
    attention_override.check_call(module, attention_mask, others)
    if sliding_window is not None:
        raise CannotAttendError(f"{type(module).__name__} has a window")
    rows, heads, _, width = query.shape
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], width).to(key.dtype)
    bias = fixed_bias.expand(*grouped.shape[:3], -1)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=bias, scale=scaling)
    return out.reshape(rows, 1, heads, -1), None


@torch.inference_mode()
def parity_failure(model: nn.Module) -> str | None:
    """Return why fixed steps would not give what a model's own steps do; ``None`` if they do: checked on random tokens.

    Args:
        model: a causal language model, in the state that responses are sampled from.
    """
    others = layer_types(model) - LAYERS
    if others:
        return f"it has layers of {', '.join(sorted(others))}"
    if window_of(model) is not None:
        return "its layers have a window"
    attention = unwrapped(model).config._attn_implementation
    if attention != "sdpa":
        return f"it attends by {attention}"  # which was chosen, or is all that it can
    try:
        own, fixed = (_probe(model, kind) for kind in (PlainSteps, FixedSteps))
    except Exception as error:  # of any model's own code, or of a kernel that cannot be recorded
        if ran_out(error):
            raise
        return first_line(error) or type(error).__name__
    dtype = product_dtype(model)
    agreement = compare_logits(own, fixed, dtype=dtype)
    if not agreement.holds:
        with off_by_a_rounding(unwrapped(model), dtype):
            agreement = agreement.allowing(compare_logits(own, _probe(model, PlainSteps), dtype=dtype).drift)
    return None if agreement.holds else f"log-probs differ by {agreement}"


def _probe(model: nn.Module, kind: type[PlainSteps] | type[FixedSteps]) -> Tensor:
    """Return the logits after each of a few tokens, ``[steps, rows, V]``."""
    device = next(model.parameters()).device
    config = unwrapped(model).config
    generator = torch.Generator().manual_seed(0)
    vocabulary = config.get_text_config(decoder=True).vocab_size
    prompts = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in PROBE_PROMPTS]
    tokens = torch.randint(vocabulary, (len(PROBE_PROMPTS), PROBE_STEPS), generator=generator).to(device)
    ids, mask, positions = left_padded(prompts, PROBE_STEPS, device)
    cache, width = reserved_cache(config), ids.shape[1]
    read(model, ids, mask[:, :width], positions, cache)
    source = torch.tensor([0, 1, 1], device=device)
    found = []
    with kind(model, cache, source, mask, width) as steps:
        for step in range(PROBE_STEPS):
            place = positions[source, -1] + 1 + step
            found.append(steps.logits(tokens[source, step], place).clone())
    return torch.stack(found)
