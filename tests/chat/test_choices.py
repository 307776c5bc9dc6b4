"""Which policy a name means."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from chat.conftest import CPU, RunMaker

from sppo_lightning.chat.choices import Choice, choose
from sppo_lightning.export.stored_run import read_run
from sppo_lightning.types import UserError


def of(root: Path, given: str) -> Choice:
    return choose(given, device=CPU, run=read_run(root))


def test_a_runs_policies(make_run: RunMaker, tiny_policy: Path) -> None:
    root = make_run("mine", 0, 1)
    shutil.copytree(root / "policies/000", root / "best")
    last = choose(str(root), device=CPU)
    assert (last.name, last.config.pretrained) == ("mine, iteration 1", str(root / "policy"))
    assert of(root, "0").config.pretrained == str(root / "policies/000")
    assert (of(root, "best").name, of(root, "best").config.pretrained) == (
        "mine, iteration 0 (best)",
        str(root / "best"),
    )
    assert (of(root, "initial").name, of(root, "initial").config.pretrained) == (
        "mine, initial",
        str(tiny_policy),
    )
    assert {each.dtype for each in (last, of(root, "initial"))} == {torch.float32}


def test_adapters_name_the_same_base(make_run: RunMaker, tiny_policy: Path) -> None:
    root = make_run("mine", 0, 1, lora=True)
    found = [of(root, name) for name in ("0", "1", "initial")]
    assert {each.config.pretrained for each in found} == {str(tiny_policy)}
    assert [each.adapter for each in found] == [str(root / "policies/000"), str(root / "policies/001"), None]
    alone = choose(str(root / "policies/000"), device=CPU)
    assert (alone.adapter, alone.config.pretrained) == (str(root / "policies/000"), str(tiny_policy))


def test_a_run_that_began_with_an_adapter(make_run: RunMaker) -> None:
    before = make_run("before", 0, lora=True) / "policy"
    root = make_run("after", lora=False)
    config = (root / "config.yaml").read_text()
    (root / "config.yaml").write_text(
        config.replace("policy:\n", f"policy:\n    lora: {{adapter: {before}}}\n")
    )
    assert choose(str(root), device=CPU).adapter == str(before)


def test_a_run_without_a_finished_iteration_is_its_initial_policy(make_run: RunMaker) -> None:
    root = make_run("young")
    found = choose(str(root), device=CPU)
    assert found.name == "young, initial"
    assert found.note is not None
    assert "has no finished iteration yet: this is the policy that it starts from" in found.note


def test_a_run_that_reverted_to_its_beginning(make_run: RunMaker) -> None:
    root = make_run("back", 0)
    (root / "policy/run.json").write_text(json.dumps({"iteration": -1}))
    note = choose(str(root), device=CPU).note
    assert note is not None
    assert "reverted to the policy that it started from" in note


@pytest.mark.parametrize("name", ["0", "best", "initial"])
def test_a_folder_of_such_a_name_is_meant_by_it(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shutil.copytree(tiny_policy, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert choose(name, device=CPU).config.pretrained == name


def test_what_is_no_policy(make_run: RunMaker, tmp_path: Path) -> None:
    root = make_run("mine", 0, 1)
    for given, message in {
        str(tmp_path): r"is no run \(it has no config\.yaml\) and no model \(no config\.json\): give a run's",
        str(
            tmp_path / "gone"
        ): r"^chat='.*gone': no such model; give a model folder, a hub id or a \.gguf file$",
        "nobody/nothing": r"^chat='nobody/nothing' cannot be read as a model",
        "5": r"holds no policy of iteration 5, only of 0, 1: name one of those",
        "best": r"best is not there: no finished iteration had a better held-out reward",
    }.items():
        with pytest.raises(UserError, match=message) as found:
            of(root, given)
        assert "\n" not in str(found.value)
    with pytest.raises(
        UserError, match=r"^initial is a policy of a run, and the policy talked to is of none"
    ):
        choose("initial", device=CPU)
    gone = make_run("moved", pretrained="gone/away")
    with pytest.raises(UserError, match=r"the policy that \S*moved started from='gone/away' cannot be read"):
        choose(str(gone), device=CPU)
