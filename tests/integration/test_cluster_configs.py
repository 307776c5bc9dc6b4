"""The scripts and configs for clusters: what the scripts start, and whether all of it goes together.

The scripts really run, with stand-ins for what a cluster has (``srun``, ``scontrol``, ``vllm``, ``curl``) and for the
run itself: they write down how they were called.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sppo_lightning.__main__ import main
from sppo_lightning.training.batching import accumulation_steps

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "configs/cluster"
CONFIGS = sorted(CLUSTER.glob("*.yaml"))
MULTI_NODE, VLLM = CLUSTER / "multi-node.sbatch", CLUSTER / "vllm-and-training.sh"
VLLM_NODES = CLUSTER / "vllm-nodes.sbatch"
SCRIPTS = [MULTI_NODE, VLLM, VLLM_NODES]
SHARED = "lightning.pytorch.strategies.ModelParallelStrategy"

NOTE = 'printf "%s\\n" "$CUDA_VISIBLE_DEVICES" "$@" > "$NOTES/${0##*/}.$$"\n'
STAND_INS = {
    "srun": NOTE + 'while [ "${1:0:2}" = -- ]; do shift; done\nexec "$@"\n',
    "scontrol": '[ "$1" = show ] && printf "%s\\n" one two three && exit\n' + NOTE,
    "curl": 'ls "$NOTES"/vllm.* > /dev/null 2>&1\n',
    "vllm": NOTE
    + 'trap "touch $NOTES/ended; exit 0" TERM\n[ "$FAILS" ] && exit 3\nfor _ in {1..400}; do sleep 0.05; done\n',
    "sppo-lightning": NOTE
    + 'trap "sleep 0.3; exit 138" USR1\ntrap "sleep 0.3; exit 143" TERM\n'
    + '[ "$STATUS" ] && exit "$STATUS"\nfor _ in {1..400}; do sleep 0.05; done\n',
}


class Place:
    """Where a script runs."""

    def __init__(self, folder: Path) -> None:
        self.notes = folder / "notes"
        self.notes.mkdir()
        commands = folder / "bin"
        commands.mkdir()
        for name, text in STAND_INS.items():
            (commands / name).write_text(f"#!/bin/bash\n{text}")
            (commands / name).chmod(0o755)
        own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.environment = {
            **own,
            "PATH": f"{commands}:{os.environ['PATH']}",
            "NOTES": str(self.notes),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HOME": "/models",
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NUM_NODES": "4",
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_NTASKS": "1",
            "SLURM_JOB_NODELIST": "one,two,three",
        }

    def start(self, script: Path, *args: str, **environment: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["bash", str(script), *args], cwd=ROOT, env={**self.environment, **environment}
        )

    def run(self, script: Path, *args: str, **environment: str) -> int:
        return self.start(script, *args, **environment).wait(30)

    def calls(self, command: str) -> list[list[str]]:
        """How a command was called: its GPUs, then its arguments."""
        return [path.read_text().splitlines() for path in sorted(self.notes.glob(f"{command}.*"))]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def waited(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def directives(script: Path) -> dict[str, str]:
    """The options of a script's #SBATCH lines; one without a value is there with an empty one."""
    lines = re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script.read_text(), re.MULTILINE)
    return dict(lines)


def parsed(args: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What the command line makes of ``sppo-lightning`` arguments."""
    with pytest.raises(SystemExit) as left:
        main([*args, "--print_config"])
    assert left.value.code == 0
    shown: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return shown


def processes(config: dict[str, Any]) -> int:
    return int(config["trainer"]["devices"] * config["trainer"]["num_nodes"])


def check_sizes(config: dict[str, Any]) -> None:
    """Steps divide, and shared weights are spread over all processes."""
    accumulation_steps(
        pairs_per_step=config["data"]["pairs_per_step"],
        batch_size=config["data"]["batch_size"],
        world_size=processes(config),
    )
    strategy = config["trainer"]["strategy"]
    if strategy != "ddp":
        assert strategy["class_path"] == SHARED
        assert strategy["init_args"]["data_parallel_size"] == processes(config)
        assert strategy["init_args"]["tensor_parallel_size"] == 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_sizes_of_a_config_go_together(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_sizes(parsed(["fit", "--config", str(path)], capsys))


@pytest.mark.parametrize("path", [*SCRIPTS, *CONFIGS], ids=lambda path: path.name)
def test_a_file_says_that_it_has_not_been_run(path: Path) -> None:
    text = " ".join(line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    assert re.search(r"Not run on (hardware|a cluster) yet", text)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_job_is_told_of_its_end_in_time_and_may_be_queued_again(script: Path) -> None:
    options = directives(script)
    number, _, seconds = options["signal"].removeprefix("B:").partition("@")
    assert number == "USR1"  # TERM is what a cancelled job gets
    assert int(seconds) >= 120
    assert {"requeue", "time"} <= options.keys()
    assert options["open-mode"] == "append"


# ------------------------------------------------------------------- several nodes


def test_several_nodes_run_one_process_a_gpu(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run(MULTI_NODE, STATUS="0") == 0
    (command,) = place.calls("sppo-lightning")
    config = parsed(command[1:], capsys)
    options = directives(MULTI_NODE)
    assert int(options["nodes"]) == config["trainer"]["num_nodes"]
    assert int(options["ntasks-per-node"]) == int(options["gpus-per-node"]) == config["trainer"]["devices"]
    assert "--cpus-per-task=8" in place.calls("srun")[0]  # which srun does not take over from sbatch
    check_sizes(config)


def test_several_nodes_take_another_config_and_number(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the script's head says."""
    lines = re.sub(r" \\\n#\s+", " ", MULTI_NODE.read_text())
    commands = re.findall(r"^#   sbatch(.*?)(?:\s{2,}#.*)?$", lines, re.MULTILINE)
    assert len(commands) == 4
    for words in (line.split() for line in commands):
        at = words.index("configs/cluster/multi-node.sbatch")
        nodes = dict(word.lstrip("-").split("=") for word in words[:at]).get("nodes", "4")
        for path in place.notes.iterdir():
            path.unlink()
        assert place.run(MULTI_NODE, *words[at + 1 :], STATUS="0", SLURM_JOB_NUM_NODES=nodes) == 0
        config = parsed(place.calls("sppo-lightning")[0][1:], capsys)
        assert processes(config) == 8 * int(nodes)
        check_sizes(config)


@pytest.mark.parametrize(("status", "again"), [(138, True), (143, False), (1, False), (0, False)])
def test_only_a_job_whose_time_is_up_is_queued_again(place: Place, status: int, again: bool) -> None:
    assert place.run(MULTI_NODE, STATUS=str(status)) == status
    assert [call[1:] for call in place.calls("scontrol")] == ([["requeue", "17"]] if again else [])


def test_several_nodes_need_a_place_for_the_models(place: Place) -> None:
    del place.environment["HF_HOME"]
    assert place.run(MULTI_NODE, STATUS="0") != 0
    assert not place.calls("srun")


# ------------------------------------------------------------- beside a vLLM server


def check_served(config: dict[str, Any], verb: str, model: str, flags: list[str]) -> dict[str, str]:
    """A server takes what the run sends it; returns its flags."""
    said = dict(re.findall(r"--([\w-]+) ([^-]\S*)", " ".join(flags)))
    policy, generator = config["model"]["policy"], config["data"]["generator"]["init_args"]
    assert (verb, model) == ("serve", policy["pretrained"])
    assert generator["weight_sync"]["class_path"].endswith("VLLMAdapter")
    assert "--enable-lora" in flags
    assert int(said["max-lora-rank"]) >= policy["lora"]["rank"]
    assert int(said["max-model-len"]) >= config["data"]["max_prompt_tokens"] + generator["max_new_tokens"]
    return said


def test_the_server_and_the_run_go_together(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run(VLLM, STATUS="0") == 0
    assert (place.notes / "ended").exists()
    ((server_gpus, verb, model, *flags),) = place.calls("vllm")
    ((gpus, *args),) = place.calls("sppo-lightning")
    config = parsed(args, capsys)
    said = check_served(config, verb, model, flags)
    generator = config["data"]["generator"]["init_args"]
    assert generator["base_url"] == f"http://{said['host']}:{said['port']}/v1"
    assert said["host"] == "127.0.0.1"
    assert len(server_gpus.split(",")) == int(said["tensor-parallel-size"])
    assert len(gpus.split(",")) == processes(config)
    assert len(set(f"{server_gpus},{gpus}".split(","))) == int(directives(VLLM)["gpus-per-node"])
    check_sizes(config)


def test_servers_on_other_nodes_and_the_run_go_together(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stand-in of srun starts one process where the real one starts some; the nodes are called one, two, three."""
    script = place.start(VLLM_NODES)
    assert waited(lambda: bool(place.calls("sppo-lightning") and place.calls("vllm")))
    time.sleep(0.2)  # for its traps
    script.send_signal(signal.SIGUSR1)
    assert script.wait(20) == 138
    assert waited((place.notes / "ended").exists)
    assert [call[1:] for call in place.calls("scontrol")] == [["requeue", "17"]]
    ((_, verb, model, *flags),) = place.calls("vllm")
    ((_, *args),) = place.calls("sppo-lightning")
    config = parsed(args, capsys)
    said = check_served(config, verb, model, flags)
    generator = config["data"]["generator"]["init_args"]
    assert generator["base_url"] == [f"http://{node}:{said['port']}/v1" for node in ("two", "three")]
    assert generator["api_key_env"] == "VLLM_API_KEY"  # the script exports it, and vLLM reads it
    assert said["api-server-count"] == "1"
    options = directives(VLLM_NODES)
    assert int(said["data-parallel-size"]) == int(options["gpus-per-node"]) == processes(config)
    steps = [" ".join(call) for call in place.calls("srun")]
    assert any("--nodes=2 --nodelist=two,three --ntasks-per-node=1" in step for step in steps)
    assert any("--nodes=1 --nodelist=one --ntasks-per-node=8" in step for step in steps)
    check_sizes(config)


@pytest.mark.parametrize(
    ("number", "status", "again"),
    [(signal.SIGUSR1, 138, True), (signal.SIGTERM, 143, False), (signal.SIGINT, 143, False)],
)
def test_a_signal_reaches_the_run_which_ends_in_its_own_time(
    place: Place, number: signal.Signals, status: int, again: bool
) -> None:
    script = place.start(VLLM)
    assert waited(lambda: bool(place.calls("sppo-lightning")))
    time.sleep(0.2)  # for its traps
    script.send_signal(number)
    assert script.wait(20) == status
    assert bool(place.calls("scontrol")) == again
    assert (place.notes / "ended").exists()


def test_a_server_that_does_not_start_ends_the_job(place: Place) -> None:
    (Path(place.environment["PATH"].split(":")[0]) / "curl").write_text("#!/bin/bash\nexit 7\n")
    assert place.run(VLLM, FAILS="yes", STATUS="0") == 1
    assert not place.calls("sppo-lightning")


def test_a_server_that_is_starting_ends_with_the_script(place: Place) -> None:
    (Path(place.environment["PATH"].split(":")[0]) / "curl").write_text("#!/bin/bash\nexit 7\n")
    script = place.start(VLLM)
    assert waited(lambda: bool(place.calls("vllm")))
    time.sleep(0.2)
    script.terminate()
    script.wait(20)
    assert waited((place.notes / "ended").exists)


# ------------------------------------------------------------------------- the plan


def test_the_plan_computes_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    """Each row that the block of docs/scaling.md prints stands in the document above it."""
    text = (ROOT / "docs/scaling.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(block, "scaling.md", "exec"), {})
    rows = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(rows) > 20
    assert [row for row in rows if row not in text.splitlines()] == []
