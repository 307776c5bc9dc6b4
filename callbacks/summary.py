"""The closing summary on the terminal."""

from __future__ import annotations

import shlex
import sys

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from sppo_lightning.callbacks.base import SelfPlayCallback
from sppo_lightning.callbacks.tables import AnswerTable, Part, SummaryTable, plain_text, print_parts
from sppo_lightning.datamodule import self_play_data
from sppo_lightning.evaluation.gate import best_finished, read_decisions
from sppo_lightning.evaluation.results import HEADINGS, held_out_results
from sppo_lightning.evaluation.stored import load_evaluation
from sppo_lightning.store.run_folder import RunFolder

ITERATION_COLUMNS = ("k", "reward", "difficulty q25 / q50 / q75", "selected", "pairs", "dropped")


class RunSummary(SelfPlayCallback):
    """Prints, when ``fit`` ends, what each iteration did, some answers, and where everything lies.

    Args:
        prompts: held-out prompts whose answers are shown before and after.
    """

    def __init__(self, prompts: int = 4) -> None:
        if prompts < 0:
            raise ValueError(f"RunSummary.prompts={prompts} must be 0 or more")
        self.prompts = prompts

    @rank_zero_only
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the summary."""
        datamodule = self_play_data(trainer)
        print()
        print_parts(self.parts(datamodule.folder, datamodule.rules.iterations), sys.stdout)

    def render(self, folder: RunFolder, iterations: int) -> str:
        """Return the summary of a run folder as plain lines."""
        return plain_text(self.parts(folder, iterations))

    def parts(self, folder: RunFolder, iterations: int) -> list[Part]:
        """Return the summary of a run folder.

        ``reward`` is the mean over the prompts sampled in the iteration: all candidates where difficulty is
        estimated anew, the selected ones otherwise.
        """
        rows = []
        for number in range(iterations):
            manifest = folder.iteration(number).read_manifest()
            if manifest is None or not manifest["complete"]:
                continue
            metrics, counts = manifest["metrics"], manifest["counts"]
            quartiles = " / ".join(f"{metrics[f'iteration/difficulty/q{q}']:.3f}" for q in (25, 50, 75))
            dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(manifest["dropped"].items()))
            reward = f"{metrics['iteration/reward/mean']:.3f}"
            sizes = (str(counts["selected"]), str(counts["pairs"]))
            rows.append((str(number), reward, quartiles, *sizes, dropped or "none"))
        lines: list[Part] = ["Iterations", SummaryTable(ITERATION_COLUMNS, rows, (2, 8, 27, 9, 6))]
        lines += self._evaluations(folder, iterations)
        lines += [
            f"  after {item.finished} iteration(s), {item.action}: {'; '.join(item.reasons)}"
            for item in read_decisions(folder)
            if item.reasons
        ]
        lines += [
            "",
            "Where everything lies",
            *_policies(folder, iterations),
            f"  {folder.metrics}   every metric; curves: "
            f"tensorboard --logdir {shlex.quote(str(folder.root))}",
            *(
                [f"  {folder.samples}    held-out answers before and after"]
                if folder.samples.exists()
                else []
            ),
            *(
                [f"  {folder.report}   all of this in a browser, with every answer"]
                if folder.report.exists()
                else []
            ),
            f"  {folder.iterations}    every response, reward, difficulty and pair, as Parquet",
            "What to do next",
            f"  answer prompts of your own:  sppo-lightning predict --config {folder.config} "
            "--data.predict_prompts FILE \\",
            f"                                 --ckpt_path {folder.last_checkpoint}",
            "  another rule, seed or model: add e.g. --data.selection.init_args.fraction 0.5 "
            "--trainer.default_root_dir runs/other",
        ]
        return lines

    def _evaluations(self, folder: RunFolder, iterations: int) -> list[Part]:
        initial = load_evaluation(folder.evaluation("000"))
        if initial is None:
            return []
        results = held_out_results(folder, iterations)
        table = SummaryTable(HEADINGS, [result.cells for result in results], (16, 16, 20, 9, 7))
        parts: list[Part] = ["", "Held-out prompts (greedy answers)", table]
        last = load_evaluation(folder.evaluation(f"{results[-1].finished:03d}"))
        if last is not None and results[-1].finished > 0 and self.prompts:
            now = {row.prompt_id: row for row in last}
            both = [(row, now[row.prompt_id]) for row in initial[: self.prompts] if row.prompt_id in now]
            answers = [(old.prompt, old.reward, old.response, new.reward, new.response) for old, new in both]
            parts += ["", "Some answers, before and after", AnswerTable(answers)]
        return parts


def _policies(folder: RunFolder, iterations: int) -> list[str]:
    """Return what ``policy/`` and ``best/`` hold."""
    decisions = read_decisions(folder)
    last = decisions[-1].policy if decisions else iterations
    lines = [f"  {folder.policy}        {_policy(last)}, a Hugging Face folder"]
    number = best_finished(folder, iterations)
    best = next((item for item in held_out_results(folder, iterations) if item.finished == number), None)
    if best is not None and best.finished > 0:
        reward = f"held-out reward {best.reward:.3f} ± {best.stderr:.3f}, selected on these prompts"
        lines.append(f"  {folder.best}          the best: {_policy(best.finished)}, {reward}")
    elif best is not None:
        lines.append("  No iteration had a better held-out reward than the initial policy.")
    return lines


def _policy(finished: int) -> str:
    return f"the policy after {finished} iteration(s)" if finished else "the initial policy"
