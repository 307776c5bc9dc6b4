"""Weights sharded over processes: torch's ``fully_shard`` (FSDP2), and the DTensors that it makes of parameters.

Every forward of a sharded model is a collective: all processes run it equally often, in the same order. So is each
function here that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from sppo_lightning.policy.anatomy import decoder_layers, unwrapped
from sppo_lightning.types import UserError, first_line

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
METHOD = "_run_as_forward"  # of a sharded model's root


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are sharded over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """Return the processes that a model is sharded over; ``None`` if it is not."""
    meshes = (parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor))
    return next(meshes, None)


def is_rank0(mesh: DeviceMesh | None) -> bool:
    """Whether this process is the first of some; always where there are no others."""
    return mesh is None or mesh.get_local_rank() == 0


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, sharing its memory; all of an unsharded one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor in full on every process, a collective; an unsharded one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's shard of a full tensor that is sharded as another one is.

    Args:
        tensor: the same on every process.
        like: of the same shape; an unsharded one leaves the tensor in full.
    """
    if not isinstance(like, DTensor):
        return tensor
    source = DTensor.from_local(tensor.to(like.device), like.device_mesh, [Replicate()], run_check=False)
    return source.redistribute(placements=like.placements).to_local()


def broadcast_from_rank0(mesh: DeviceMesh | None, value: T) -> T:
    """Return the value that the first process has, a collective; a value of any type that can be pickled."""
    if mesh is None:
        return value
    held = [value]
    dist.broadcast_object_list(held, group=mesh.get_group(), group_src=0, device=_device(mesh))
    return held[0]


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model's weights, layer by layer, so that no device ever holds more than one full layer; a collective.

    Weights keep their dtypes, and autocast converts them as it does unsharded ones, so that the numbers are the same.
    Whatever runs on the model has to be its own forward or go through :func:`as_forward`.

    Args:
        model: a transformers causal language model, PEFT's wrapper around it or not: on the first process with its
            weights, in host memory; on the others they may be on the meta device.
        mesh: the processes, in one dimension.

    Raises:
        UserError: if the model cannot be sharded.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    root = unwrapped(model)
    _check_alike(model, mesh)
    for holder, name in _constants(model):
        holder[name] = _broadcast_tensor(holder[name], mesh)
    # gradients are summed up in float32 whatever the weights are; inputs keep their dtypes for autocast
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in [*layers_to_shard(model), root]:
        _place(part, mesh)
        try:
            # the root too: between two forwards its parameters are then the sharded ones
            fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        except (ValueError, NotImplementedError, AssertionError) as error:
            raise UserError(
                f"{type(root).__name__} cannot be sharded over processes ({error}): use strategy ddp, or another model"
            ) from error
    setattr(root, METHOD, MethodType(_call, root))
    register_fsdp_forward_method(root, METHOD)


def as_forward(model: nn.Module, function: Callable[[], T]) -> T:
    """Run something as one forward of a model, so that its parts may be called one by one where weights are sharded.

    Args:
        model: sharded or not.
        function: returns tensors, or containers of them.
    """
    run = getattr(unwrapped(model), METHOD, None)
    return function() if run is None else cast(T, run(function))


def recover(model: nn.Module) -> None:
    """Let a model run again after a forward that raised on all processes.

    Raises:
        UserError: if torch is too old for that.
    """
    root = unwrapped(model)
    if not hasattr(root, METHOD) or root._get_fsdp_state()._state_ctx.iter_forward_root is None:
        return
    reset = getattr(root, "reset_iter_state", None)
    if reset is None:
        raise UserError(
            f"{type(root).__name__} cannot share a prompt, and torch {torch.__version__} cannot recover from "
            "a forward that failed where weights are sharded: set model.pair_forward to "
            "sppo_lightning.pair_forward.PlainForward, or use torch 2.13"
        )
    reset()


def gather_full_model(
    model: nn.Module, meta_model: Callable[[], nn.Module], *, dtype: torch.dtype | None
) -> nn.Module | None:
    """Gather a sharded model one weight at a time, a collective; return it, in host memory, on the first process.

    Args:
        model: sharded; of one with an adapter that alone is gathered, and the base stays on the meta device.
        meta_model: returns the same model on the meta device.
        dtype: of the weights; ``None``: their own.
    """
    first, adapted = is_rank0(mesh_of(model)), hasattr(model, "peft_config")
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not adapted or cast(Any, model).base_model.prefix in name:
            value = full_tensor(parameter.detach())
            if first:
                found[name] = value.to("cpu", dtype, copy=True)
    if not first:
        return None
    gathered = meta_model()
    _replace_parameters(gathered, found)
    buffers = dict(model.named_buffers())
    for name, module in gathered.named_modules():
        for key in module._buffers:
            buffer = buffers.get(f"{name}.{key}" if name else key)
            module._buffers[key] = None if buffer is None else buffer.to("cpu", copy=True)
    unwrapped(gathered).generation_config = unwrapped(model).generation_config
    return gathered


def save_shards(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write sharded weights, a part for each process; a collective.

    Args:
        weights: by name.
        folder: where to.
    """
    from torch.distributed.checkpoint import state_dict_saver

    state_dict_saver.save(dict(weights), checkpoint_id=folder)


def load_shards(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Overwrite sharded weights with those that :func:`save_shards` wrote, by any number of processes; a collective.

    Args:
        weights: by name, changed in place.
        folder: where they are; its metadata has been checked.

    Raises:
        UserError: if they cannot be read, or are another model's.
    """
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with torch.no_grad():
            state_dict_loader.load(dict(weights), checkpoint_id=folder)
    except CheckpointException as error:
        raise UserError(f"{folder} cannot be read ({first_line(error)}): restore it from a copy") from error


def load_rest(checkpoint: Path, module: nn.Module, optimizers: Sequence[Optimizer]) -> set[str]:
    """Load what a checkpoint holds in addition to a module's weights, a collective; return the names of its weights.

    Args:
        checkpoint: a folder with a part for each process that saved it, or a file of a run with unsharded weights.
        module: whose weights have been loaded.
        optimizers: of its weights; one whose state is not stored stays as it is.

    Raises:
        UserError: if the state of an optimizer of unsharded weights is stored.
    """
    from torch.distributed.checkpoint import filesystem, state_dict_loader
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    if not checkpoint.is_dir():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        if any(optimizer["state"] for optimizer in state["optimizer_states"]):
            raise UserError(
                f"{checkpoint} holds the optimizer state of unsharded weights, which sharded ones cannot take over: "
                "continue with the strategy that it was saved with, to the iteration's end at least"
            )
        return set(state["state_dict"])
    names = filesystem.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    for number, optimizer in enumerate(optimizers):
        key = f"optimizer_{number}"
        if any(name.startswith(f"{key}.state.") for name in names):
            stored = {key: get_optimizer_state_dict(module, optimizer)}
            state_dict_loader.load(stored, checkpoint_id=checkpoint)
            set_optimizer_state_dict(module, optimizer, optim_state_dict=stored[key])
    return {name.removeprefix("state_dict.") for name in names if name.startswith("state_dict.")}


def _call(root: nn.Module, function: Callable[[], T]) -> T:
    return function()


def layers_to_shard(model: nn.Module) -> Iterator[nn.Module]:
    """Yield what is gathered layer by layer: the decoder layers, without those that lie inside another."""
    inside: set[nn.Module] = set()
    for layer in decoder_layers(model):
        if layer not in inside:
            inside |= set(layer.modules())
            yield layer


def _place(part: nn.Module, mesh: DeviceMesh) -> None:
    """Give the unsharded parameters of a part the first process's values, on this process's device."""
    placed: dict[nn.Parameter, nn.Parameter] = {}  # shared weights stay shared
    for module in part.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or isinstance(parameter, DTensor):
                continue
            if parameter not in placed:
                value = _broadcast_tensor(parameter.detach(), mesh)
                placed[parameter] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            module._parameters[name] = placed[parameter]


def _replace_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Replace parameters by values of the same names; shared weights stay shared."""
    named = {parameter: name for name, parameter in model.named_parameters()}
    fresh = {
        parameter: nn.Parameter(values[name], requires_grad=parameter.requires_grad)
        for parameter, name in named.items()
        if name in values
    }
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter in fresh:
                module._parameters[name] = fresh[parameter]


def _constants(model: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield what holds each tensor that is no parameter, and its name there: buffers, and plain attributes."""
    for module in model.modules():
        for holder in (module._buffers, vars(module)):
            for name in [name for name, value in holder.items() if isinstance(value, Tensor)]:
                yield cast(dict[str, Any], holder), name


def _broadcast_tensor(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the first process's values on this process's device."""
    device = _device(mesh)
    if is_rank0(mesh):
        value = tensor.to(device, copy=True).contiguous()
    else:
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    dist.broadcast(value, group=mesh.get_group(), group_src=0)
    return value


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def _check_alike(model: nn.Module, mesh: DeviceMesh) -> None:
    """Refuse to broadcast between models that differ, which would hang or mix weights up."""
    mine = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]
    mine += [(name, tuple(b.shape), str(b.dtype), False) for name, b in model.named_buffers()]
    first = broadcast_from_rank0(mesh, mine)
    if mine != first:
        some = sorted(set(mine) ^ set(first))[:2]
        raise RuntimeError(f"the model that is read differs from the one that its config describes: {some}")
