"""Weights sharded over two gloo processes give what unsharded ones give."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from support.processes import Processes, together
from support.tiny import batch_of, new_model, pairs_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from sppo_lightning.iteration.reference_pass import reference_pass
from sppo_lightning.pair_forward import AutoForward, PlainForward
from sppo_lightning.pair_forward.layouts import PlainLayout
from sppo_lightning.pair_forward.parity import ParityCheck
from sppo_lightning.policy import sharding
from sppo_lightning.policy.fingerprint import fingerprint
from sppo_lightning.policy.loading import disable_dropout
from sppo_lightning.policy.rounding import check_updates_survive
from sppo_lightning.store import reference_parts
from sppo_lightning.store.pairs import PairTable
from sppo_lightning.store.reference_parts import ReferenceParts
from sppo_lightning.training.hardware import check_hardware
from sppo_lightning.training.optimizers import build_optimizer, clip_gradients
from sppo_lightning.types import UserError


def sharded(kind: str, mesh: DeviceMesh, *, checkpointed: bool = False) -> nn.Module:
    """The tiny model over all processes; all but the first start from a model without weights."""
    model = new_model(kind)
    if mesh.get_local_rank() > 0:
        model = model.to("meta")
        model.tie_weights()
    prepare(model, checkpointed=checkpointed)
    sharding.shard(model, mesh)
    return model


def prepare(model: Any, *, checkpointed: bool) -> None:
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    disable_dropout(model)
    model.train()


def a_step(model: nn.Module, *, half: bool) -> tuple[dict[str, Tensor], str, str]:
    """Log-probs, their clipped gradients and the weights after a step, the digest before, the forward that served."""

    def context() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if half else nullcontext()

    forward = AutoForward(chunk=4)  # several chunks of the head, most of them computed again
    digest = fingerprint(model, "tiny")
    told = forward.prepare(model, ParityCheck(30, context, lambda agreed: agreed))
    rows = batch_of(pairs_of(), forward.layout(2)).rows
    with torch.no_grad(), context():
        found = {"before": torch.cat(forward.logps(model, rows))}
    with context():
        logps = torch.cat(forward.logps(model, rows))
    (logps * torch.linspace(-1, 2, len(logps)).double()).sum().backward()
    clip_gradients(model.parameters(), 1.0, algorithm="norm")
    clip_gradients(model.parameters(), 0.05, algorithm="value")
    found["logps"] = logps.detach()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[name] = sharding.full_tensor(parameter.grad).clone()
    parameters = list(model.parameters())
    optimizer = build_optimizer(None, parameters, learning_rate=1e-3, weight_decay=0.1, clips_unscaled=False)
    optimizer.step()
    assert fingerprint(model, "tiny") != digest
    found |= {
        f"{name} after": sharding.full_tensor(p.detach()).clone() for name, p in model.named_parameters()
    }
    return found, digest, told


def compare_steps(mesh: DeviceMesh, kind: str, checkpointed: bool, half: bool) -> None:
    unsharded = new_model(kind)
    prepare(unsharded, checkpointed=checkpointed)
    expected, digest, told = a_step(unsharded, half=half)
    model = sharded(kind, mesh, checkpointed=checkpointed)
    assert sharding.is_sharded(model)
    assert all(sharding.local(p.detach()).numel() < p.numel() for p in model.parameters())
    found, sharded_digest, sharded_told = a_step(model, half=half)
    assert sharded_told == told
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)
    if not half:
        torch.testing.assert_close(found["logps"], expected["logps"], rtol=0, atol=0)
    assert sharded_digest == digest


@pytest.mark.parametrize(
    ("kind", "checkpointed", "half"),
    [("llama", False, False), ("llama", True, True), ("gemma3_capped", True, False), ("gpt2", False, False)],
)
def test_a_step_is_the_one_of_unsharded_weights(kind: str, checkpointed: bool, half: bool) -> None:
    """Tied and separate heads, shared and plain rows, recomputed layers: same log-probs, gradients and digest."""
    together(compare_steps, kind, checkpointed, half)


def recover_from_a_failure(mesh: DeviceMesh) -> None:
    model = sharded("llama", mesh)
    rows = batch_of(pairs_of(), PlainLayout(2)).rows
    expected = torch.cat(PlainForward().logps(model, rows))
    layer = model.model.layers[1]  # type: ignore[union-attr]
    own = layer.mlp.forward

    def failing(*args: Any) -> None:
        raise RuntimeError("cannot")

    layer.mlp.forward = failing
    with pytest.raises(RuntimeError, match="cannot"):
        PlainForward().logps(model, rows)
    layer.mlp.forward = own
    if not hasattr(model, "reset_iter_state"):  # before torch 2.13
        with pytest.raises(
            UserError, match=r"cannot recover from a forward that failed .* or use torch 2\.13"
        ):
            sharding.recover(model)
        return
    sharding.recover(model)
    assert all(isinstance(p, sharding.DTensor) for p in model.parameters())  # none is left gathered
    found = torch.cat(PlainForward().logps(model, rows))
    assert torch.equal(found, expected)
    found.sum().backward()
    assert all(isinstance(p, sharding.DTensor) and p.grad is not None for p in model.parameters())


def test_a_forward_that_failed_is_followed_by_one_that_does_not() -> None:
    together(recover_from_a_failure)


class SpreadReference:
    """Reads pairs with a spread model; counts how often."""

    is_fixed = False
    forward_is_collective = True

    def __init__(self, model: nn.Module) -> None:
        self.model, self.batches = model, 0

    def fingerprint(self) -> str:
        return fingerprint(self.model, "tiny")

    def held(self) -> Any:
        return nullcontext()

    def logps_by_token(self, batch: Any) -> Any:
        self.batches += 1
        with torch.no_grad():
            return PlainForward().logps_by_token(self.model, batch.rows)


def read_reference(mesh: DeviceMesh, folder: Path, pairs_count: int, passes: int) -> None:
    reference_parts.FEWEST = 1  # a part for each process, where there are pairs
    reference = SpreadReference(sharded("llama", mesh))
    reports: list[tuple[int, int, int]] = []
    pairs = pairs_of()[:pairs_count]
    found, _ = reference_pass(
        PairTable.collect(pairs),
        reference,
        stored=ReferenceParts(folder),
        layout=PlainLayout(2),
        batch_size=1,
        first_fingerprint=None,
        stores_tokens=False,
        ranks=Processes(mesh),
        report=lambda *progress: reports.append(progress),
    )
    assert reference.batches == passes
    mine = passes if mesh.get_local_rank() == 0 else pairs_count - passes
    assert [done for done, _, _ in reports[1:]] == list(range(1, mine + 1))
    with torch.no_grad():
        alone = PlainForward().logps(new_model(), batch_of(pairs, PlainLayout(2)).rows)
    torch.testing.assert_close(
        torch.tensor([pair.reference_chosen_logp for pair in found], dtype=torch.float64),
        alone.chosen,
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize(("count", "passes"), [(1, 1), (3, 2)])
def test_processes_without_a_batch_read_along(tmp_path: Path, count: int, passes: int) -> None:
    """Else the others would wait for their parts of the weights."""
    together(read_reference, tmp_path, count, passes)


def refuse(mesh: DeviceMesh) -> None:
    model = sharded("llama", mesh)
    check_updates_survive(model.parameters(), 1e-3)
    with pytest.raises(UserError, match="is lost to rounding in 100%"):
        check_updates_survive(model.parameters(), 1e-12)  # on all processes alike
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.optim import AdamW8bit

    with pytest.raises(UserError, match="AdamW8bit does not know sharded weights: leave"):
        build_optimizer(
            AdamW8bit, list(model.parameters()), learning_rate=1e-3, weight_decay=0.0, clips_unscaled=False
        )


def test_what_cannot_be_sharded_is_refused() -> None:
    together(refuse)


@pytest.mark.parametrize(
    ("settings", "wording"),
    [
        ({}, r"with data_parallel_size=auto, tensor_parallel_size=auto for 1 processes: .*say both sizes"),
        (
            {"data_parallel_size": 1},
            r"tensor_parallel_size=auto .*\{data_parallel_size: 1, tensor_parallel_size: 1\}",
        ),
        ({"data_parallel_size": 2, "tensor_parallel_size": 1}, "data_parallel_size=2, .* for 1 processes"),
        (
            {"data_parallel_size": 1, "tensor_parallel_size": 1, "save_distributed_checkpoint": False},
            "save_distributed_checkpoint=false would gather .*: leave it out",
        ),
    ],
)
def test_sizes_are_explicit(settings: dict[str, Any], wording: str) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=ModelParallelStrategy(**settings), logger=False
    )
    with pytest.raises(UserError, match=wording):
        check_hardware(trainer)


def test_one_size_per_process_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy: Any = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    trainer = pl.Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False)
    check_hardware(trainer)
    monkeypatch.setattr(type(trainer), "strategy", FSDPStrategy())
    with pytest.raises(
        UserError,
        match=r"strategy=FSDPStrategy is not supported: use one device or ddp; for a model .*FSDP2: strat",
    ):
        check_hardware(trainer)
