"""A secret that a user's own class is given stands in no file of a run, and a run is resumed without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from support.runs import cli_arguments

from sppo_lightning.__main__ import main
from sppo_lightning.redaction import MASK
from sppo_lightning.rewards import Reward
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.types import Prompt

SECRET = "sk-geheim-0123"


class OwnReward(Reward):
    """Asks a service of the user's, for which it has a key."""

    def __init__(
        self, api_key: str, headers: dict[str, str], house: str = "villa", scale: float = 1.0
    ) -> None:
        assert api_key.startswith("sk-")  # the class itself gets the value
        self.api_key = api_key
        self.headers = headers
        self.house = house
        self.scale = scale

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [self.scale * sum(map(str.islower, text)) / (len(text) + 1) for text in responses]


def holding(root: Path, text: str) -> list[str]:
    """The files of a run that hold a text."""
    return [path.name for path in root.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_a_secret_of_a_users_class_stands_nowhere(
    tiny_policy: Path, counting_prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"

    def arguments(secret: str = SECRET, **changes: object) -> list[str]:
        own = {
            "data__reward": f"{__name__}.OwnReward",
            "data__reward__function": None,
            "data__reward__api_key": secret,
            "data__reward__headers": f'{{"Authorization": "Basic {secret}", "accept": "json"}}',
            "data__iterations": 1,
            "data__eval_prompts": counting_prompts / "eval.jsonl",
            "trainer__logger": None,  # TensorBoard's
            **changes,
        }
        return ["fit", *cli_arguments(tiny_policy, counting_prompts / "train.jsonl", root, **own)]

    main(arguments())
    assert holding(root, SECRET) == []
    given = yaml.safe_load((root / "config.yaml").read_text())["data"]["reward"]["init_args"]
    assert given == {
        "api_key": MASK,
        "headers": {"Authorization": MASK, "accept": "json"},
        "house": "villa",
        "scale": 1.0,
    }
    manifest = RunFolder(root).iteration(0).read_manifest()
    assert manifest is not None
    assert manifest["reward"]["init_args"]["api_key"] == MASK
    assert manifest["reward"]["init_args"]["headers"] == {"Authorization": MASK, "accept": "json"}

    capsys.readouterr()
    main(arguments("sk-rotated-456"))  # the same run with a new key
    assert "Continuing the run in" in capsys.readouterr().err
    assert holding(root, "sk-rotated") == []
    with pytest.raises(SystemExit):
        main(arguments(data__reward__scale=2.0))
    assert (
        "holds a run with data.reward.init_args.scale=1.0, but this config has 2.0" in capsys.readouterr().err
    )

    with pytest.raises(SystemExit):
        main(["fit", f"--config={root / 'config.yaml'}"])
    said = capsys.readouterr().err
    assert (
        "data.reward.init_args.api_key is masked, as a run's config.yaml holds it: give the secret itself"
        in said
    )

    main(["export", str(root), "--format", "hf", "--output", str(tmp_path / "out")])
    card = (tmp_path / "out/README.md").read_text()
    assert "OwnReward(api_key=…, headers=…, house=…, scale=…)" in card
    assert "villa" not in card
    assert holding(tmp_path / "out", SECRET) == []


def test_a_run_whose_config_still_holds_the_secret_is_resumed_and_rid_of_it(
    tiny_policy: Path, counting_prompts: Path, tmp_path: Path
) -> None:
    """As an older version wrote it."""
    root = tmp_path / "run"
    own = {
        "data__reward": f"{__name__}.OwnReward",
        "data__reward__function": None,
        "data__reward__api_key": SECRET,
        "data__reward__headers": "{}",
        "data__iterations": 1,
    }
    command = ["fit", *cli_arguments(tiny_policy, counting_prompts / "train.jsonl", root, **own)]
    main(command)
    path = root / "config.yaml"
    path.write_text(path.read_text().replace(MASK, SECRET))
    main(command)
    assert holding(root, SECRET) == []
