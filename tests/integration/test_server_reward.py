"""A whole run whose rewards come from a server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import cli_arguments, letter_reward
from support.servers import Answer, Request, serving

from sppo_lightning.__main__ import main
from sppo_lightning.generation import HFGenerator
from sppo_lightning.store.shards import read_rollouts
from sppo_lightning.types import Rollout


def rollouts(run: Path) -> list[Rollout]:
    files = sorted(path for path in run.rglob("*.parquet") if "rollouts" in path.relative_to(run).parts)
    return [row for path in files for row in read_rollouts(path)]


def test_a_run_scored_by_a_server_is_that_of_the_same_reward_here(
    tiny_policy: Path,
    write_prompts: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server scores the first shard while the others are sampled."""
    asked, waited = threading.Event(), list[bool]()
    generate, calls = HFGenerator.generate, 0

    def generate_after_a_score(self: HFGenerator, requests: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            waited.append(asked.wait(60))
        return generate(self, requests)  # type: ignore[arg-type]

    def respond(request: Request) -> Answer:
        responses = request.body["responses"]
        if responses != ["Four."]:  # of the check at the start
            asked.set()
        return Answer(200, {"rewards": letter_reward([], responses, [])})

    prompts = write_prompts()
    here, there = tmp_path / "here", tmp_path / "there"
    held_out = {"data__eval_share": 0}
    main(["fit", *cli_arguments(tiny_policy, prompts, here, **held_out)])
    monkeypatch.setattr(HFGenerator, "generate", generate_after_a_score)
    with serving(respond) as server:
        changes = {
            "data__reward": "sppo_lightning.rewards.ServerReward",
            "data__reward__function": None,
            "data__reward__base_url": server.url.removesuffix("/v1"),
            "data__reward__format": "sppo_lightning.rewards.JSONRewards",
        }
        main(["fit", *cli_arguments(tiny_policy, prompts, there, **held_out, **changes)])
    assert waited == [True]
    assert len(rollouts(here)) > 20
    assert rollouts(there) == rollouts(here)
    weights = "policy/model.safetensors"
    assert (there / weights).read_bytes() == (here / weights).read_bytes()
