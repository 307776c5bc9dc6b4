"""A policy's passes on tensors without data: what a training step takes, found by running it.

The forward of the package, a preference loss and autograd's backward run on torch's fake tensors, so that dtypes, saved
tensors, recomputed layers and chunks of the head are the real ones; the bytes of all storages that live at the same
time are counted. torch's own ``MemTracker`` refuses a model that is called several times in a step, as the head is.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sppo_lightning.generation.cache_size import held_bytes
from sppo_lightning.losses import DPOLoss, PairLogps
from sppo_lightning.memory.workload import PairShape
from sppo_lightning.pair_forward import AutoForward, PairForward, PlainForward, SharedForward, VarlenForward
from sppo_lightning.pair_forward.head import CHUNK_LOGITS
from sppo_lightning.pair_forward.layouts import PairRows
from sppo_lightning.training.optimizers import OptimizerFactory, build_optimizer

if TYPE_CHECKING:
    from transformers import DynamicCache

HALF = (torch.bfloat16, torch.float16)
# the optimizer is tried on so many weights: enough that 8-bit states are kept in 8 bits, and that one weight's
# temporary copies are little where weights are updated one after the other
TRIED_WEIGHTS, TRIED_SHAPE = 16, (128, 128)
ADAM_STATE = 8.0  # bytes a weight


class DryRun:
    """A policy with shapes but no data.

    Args:
        model: a transformers causal language model, PEFT's wrapper around it or not, on the meta device and not
            quantised; it is used up.
        compute_dtype: dtype of the trainer's matrix products.
    """

    def __init__(self, model: nn.Module, *, compute_dtype: torch.dtype) -> None:
        self.model = model
        self._compute_dtype = compute_dtype
        self._mode = FakeTensorMode()
        with self._mode:
            _replace_tensors(model)

    def training(self, forward: PairForward, shape: PairShape, *, accumulates: bool) -> int:
        """Return the most bytes in addition to the weights while a micro-batch runs forward and backward.

        Args:
            forward: one of :func:`cpu_forwards`.
            shape: of the micro-batch.
            accumulates: whether another micro-batch's gradients are there already.
        """
        self.model.train()
        rows = _rows(forward, shape)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

        def step() -> None:
            logps = self._logps(forward, rows)
            reference = PairLogps(*(torch.zeros_like(side) for side in logps))
            DPOLoss(beta=0.1)(logps, reference).loss.sum().backward()  # type: ignore[no-untyped-call]

        try:
            with self._mode:
                gradients = [torch.empty_like(parameter) for parameter in trained if accumulates]
                for parameter, gradient in zip(trained, gradients, strict=False):
                    parameter.grad = gradient
                return self._peak(step, gradients)
        finally:
            self.model.zero_grad()
            forward.release(self.model)

    def scoring(self, forward: PairForward, shape: PairShape) -> int:
        """Return the most bytes in addition to the weights while a micro-batch runs forward only.

        Args:
            forward: one of :func:`cpu_forwards`.
            shape: of the micro-batch.
        """
        self.model.train()
        rows = _rows(forward, shape)
        try:
            with self._mode, torch.no_grad():
                return self._peak(lambda: self._logps(forward, rows))
        finally:
            forward.release(self.model)

    def reading(self, prompt: int) -> int:
        """Return the most bytes in addition to the weights while a prompt is read, to be answered.

        Args:
            prompt: tokens.
        """
        with self._mode, torch.no_grad():
            return self._peak(lambda: self._read(prompt))

    def kept(self, tokens: int) -> int:
        """Return the bytes that are kept of a sequence, so that it can be continued.

        Args:
            tokens: of the sequence.
        """
        with self._mode, torch.no_grad():
            return held_bytes(self._read(tokens))

    def _read(self, tokens: int) -> DynamicCache:
        """Read a sequence as it is read to be answered, and return what is kept of it."""
        from sppo_lightning.generation.cache import reserved_cache
        from sppo_lightning.generation.steps import read

        self.model.eval()
        ids = torch.ones(1, tokens, dtype=torch.long)
        cache = reserved_cache(cast(Any, self.model).config)
        read(self.model, ids, ids, torch.arange(tokens)[None], cache)
        return cache

    def _logps(self, forward: PairForward, rows: PairRows) -> PairLogps:
        fake = tree_map_only(Tensor, lambda real: torch.empty(real.shape, dtype=real.dtype), rows)
        mixed = self._compute_dtype in HALF
        with torch.autocast("cpu", dtype=self._compute_dtype if mixed else None, enabled=mixed):
            return forward.logps(self.model, fake)

    def _peak(self, run: Callable[[], Any], held: list[Tensor] | None = None) -> int:
        """Return the most bytes that live while something runs, those of ``held`` counted, the weights' not."""
        live = LiveBytes()
        weights: int = live.count([*self.model.parameters(), *self.model.buffers()])
        live.count(held or [])
        with live:
            run()
        return int(live.peak - weights)


def cpu_forwards(forward: PairForward, *, device_type: str, vocabulary: int) -> list[PairForward]:
    """Return what runs in a forward's place, on fake tensors of a CPU; the first that the model takes is meant.

    Args:
        forward: of the run.
        device_type: where the run will be; decides how many positions' logits exist at once.
        vocabulary: tokens.
    """
    logits = CHUNK_LOGITS.get(device_type, CHUNK_LOGITS["cpu"])
    chunk = forward.chunk or max(1, logits // vocabulary)
    if isinstance(forward, AutoForward):
        return [SharedForward(chunk), PlainForward(chunk)]
    if isinstance(forward, VarlenForward):
        return [SharedForward(chunk)]  # pairs that are alike have no padding there either
    same = copy.copy(forward)
    same.chunk, same.compiled = chunk, False
    return [same]


class OptimizerMemory(NamedTuple):
    """What an optimizer takes for each trained weight, in bytes."""

    state: float  # on the device, from one step to the next
    step: float  # while it steps
    paged: bool = False  # whether its state moves to host memory where the device is full


def optimizer_memory(
    factory: OptimizerFactory | None, *, device_type: str, clips_unscaled: bool = False
) -> OptimizerMemory:
    """Let an optimizer take a step on a few weights of this process, and count what it keeps.

    A paged optimizer of bitsandbytes keeps nothing on a GPU that is full. One that cannot be tried here, made for a
    GPU or called with a closure, is taken for Adam.

    Args:
        factory: makes it; ``None``: the default.
        device_type: where the run will be.
        clips_unscaled: whether gradients are clipped after they were scaled for float16.
    """
    weights = [nn.Parameter(torch.zeros(TRIED_SHAPE)) for _ in range(TRIED_WEIGHTS)]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    count = sum(weight.numel() for weight in weights)
    live = LiveBytes()
    before: int = live.count([*weights, *(weight.grad for weight in weights)])
    try:
        optimizer = build_optimizer(
            factory, weights, learning_rate=1e-3, weight_decay=0.0, clips_unscaled=clips_unscaled
        )
        for group in optimizer.param_groups:
            if device_type == "cuda" and group.get("foreach", 0) is None and not group.get("fused"):
                group["foreach"] = True  # torch's choice there: all weights at once
        with live, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of paged optimizers, which a CPU cannot page
            optimizer.step()
    except Exception:  # of any optimizer's own code
        return OptimizerMemory(ADAM_STATE, 0.0)
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in states
        if isinstance(tensor, Tensor) and tensor.numel() > 1
    }
    state = sum(held.values())
    passing = max(0, live.peak - before - state)
    paged = device_type == "cuda" and bool(getattr(optimizer, "is_paged", False))
    return OptimizerMemory(0.0 if paged else state / count, passing / count, paged)


def _rows(forward: PairForward, shape: PairShape) -> PairRows:
    prompt, response = [0] * shape.prompt, [0] * shape.response
    return forward.layout(0).rows([prompt] * shape.pairs, [response] * shape.pairs, [response] * shape.pairs)


def _replace_tensors(model: nn.Module) -> None:
    """Give a model parameters and buffers of the mode that is on; what was shared still is."""
    replaced: dict[int, tuple[Tensor, Tensor]] = {}  # the old ones too, so that no id is used again

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in replaced:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            replaced[id(tensor)] = tensor, empty
        return replaced[id(tensor)][1]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = cast(Any, fake(tensor))


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that live, as operations make them and as they go."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}

    def count(self, found: Any) -> int:
        """Add the storages of tensors that are new, and return the bytes that live."""
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return self.now

    def _add(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def gone(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(result)
        return result
