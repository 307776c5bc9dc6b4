"""Work on several gloo processes at once."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

WORLD = 2


def together(work: Callable[..., None], *arguments: Any) -> None:
    """Run ``work(mesh, *arguments)`` on two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_begin, (port, work, arguments), nprocs=WORLD)


def _begin(rank: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    try:
        work(init_device_mesh("cpu", (WORLD,), mesh_dim_names=("data_parallel",)), *arguments)
    finally:
        dist.destroy_process_group()
    # not through the interpreter's end: a mesh keeps gloo's threads, and one that lets go of a tensor then aborts
    os._exit(0)


class Processes:
    """Ranks of a mesh."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.rank, self.world_size = mesh.get_local_rank(), mesh.size()

    def check(self) -> None:
        """None fails here."""

    def barrier(self, name: str) -> None:
        dist.barrier()

    def gather(self, values: list[Any]) -> list[list[Any]]:
        gathered: list[list[Any]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(gathered, values)
        return gathered

    def same(self, value: Any) -> Any:
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]
