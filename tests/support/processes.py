"""Work on several gloo processes at once, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

WORLD = 2
PROCESSES: Any = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "sppo_lightning.cli.main",
        "sppo_lightning.evaluation.metrics",
        "sppo_lightning.policy.trained",
        "peft.tuners.lora",
        "transformers.models.llama.modeling_llama",
        "torch.distributed.fsdp",
        "datasets",
        "pandas",
    ]
)
"""One server of forks a test process, by whichever test comes first; imports take longer than most of this work."""


def free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def run_command(
    arguments: Sequence[str], processes: int, *, log: Path, timeout_s: float = 300, **environment: str
) -> int | None:
    """Run the command line on several processes, as a launcher like torchrun does, and return the first one's status.

    Args:
        arguments: of the command line.
        processes: how many.
        log: where the first process writes its output.
        timeout_s: seconds after which all are ended.
        environment: variables of all of them.
    """
    port = free_port()
    started = []
    for rank in range(processes):
        place = {"LOCAL_RANK": rank, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = {
            **environment,
            **({key: str(value) for key, value in place.items()} if processes > 1 else {}),
        }
        output = log if rank == 0 else Path(os.devnull)
        started.append(PROCESSES.Process(target=_command, args=(list(arguments), variables, output)))
        started[-1].start()
    for process in started:
        process.join(timeout_s)
        process.kill()  # nothing, where it has ended
        process.join()
    status: int | None = started[0].exitcode
    return status


def _command(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    os.environ.update(environment, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    from sppo_lightning.__main__ import main

    main(arguments)


def together(work: Callable[..., None], *arguments: Any) -> None:
    """Run ``work(mesh, *arguments)`` on two processes."""
    mp.start_processes(_begin, (free_port(), work, arguments), nprocs=WORLD, start_method="forkserver")


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
