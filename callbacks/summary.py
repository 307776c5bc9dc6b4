"""The closing summary on the terminal."""

from __future__ import annotations

import shlex

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from sppo_lightning.callbacks.base import SelfPlayCallback
from sppo_lightning.datamodule import self_play_data
from sppo_lightning.evaluation.gate import best_finished, read_decisions
from sppo_lightning.evaluation.held_out import load_evaluation
from sppo_lightning.evaluation.results import HEADINGS, held_out_results
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.text import for_terminal


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
        summary = self.render(datamodule.folder, datamodule.rules.iterations)
        print("\n" + for_terminal(summary), flush=True)

    def render(self, folder: RunFolder, iterations: int) -> str:
        """Return the summary of a run folder.

        ``reward`` is the mean over the prompts sampled in the iteration: all candidates where difficulty is
        estimated anew, the selected ones otherwise.
        """
        lines = ["Iterations"]
        lines.append(
            f"  {'k':>2} {'reward':>8} {'difficulty q25 / q50 / q75':>27} {'selected':>9} {'pairs':>6}  dropped"
        )
        for number in range(iterations):
            manifest = folder.iteration(number).read_manifest()
            if manifest is None or not manifest["complete"]:
                continue
            metrics, counts = manifest["metrics"], manifest["counts"]
            quartiles = " / ".join(f"{metrics[f'iteration/difficulty/q{q}']:.3f}" for q in (25, 50, 75))
            dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(manifest["dropped"].items()))
            lines.append(
                f"  {number:>2} {metrics['iteration/reward/mean']:>8.3f} {quartiles:>27} "
                f"{counts['selected']:>9} {counts['pairs']:>6}  {dropped or 'none'}"
            )
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
        return "\n".join(lines)

    def _evaluations(self, folder: RunFolder, iterations: int) -> list[str]:
        initial = load_evaluation(folder.evaluation("000"))
        if initial is None:
            return []
        results = held_out_results(folder, iterations)
        lines = ["", "Held-out prompts (greedy answers)"]
        for after, reward, gain, wins, tokens in (HEADINGS, *(result.cells for result in results)):
            lines.append(f"  {after:>16} {reward:>16} {gain:>20} {wins:>9} {tokens:>7}")
        last = load_evaluation(folder.evaluation(f"{results[-1].finished:03d}"))
        if last is not None and results[-1].finished > 0 and self.prompts:
            lines += ["", "Some answers, before and after"]
            now = {row.prompt_id: row for row in last}
            for row in initial[: self.prompts]:
                lines += [
                    f"  {_line(row.prompt)}",
                    f"    before ({row.reward:.2f})  {_line(row.response)}",
                    f"    after  ({now[row.prompt_id].reward:.2f})  {_line(now[row.prompt_id].response)}",
                ]
        return lines


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


def _line(text: str, width: int = 96) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"
