"""Kills a small study at random points, gives the same command until it has ended, and compares what comes of it.

Two arms, two seeds, two iterations of a tiny model. A kill is SIGKILL to the study and its run, as where a machine
goes down, to the study alone, or to the run alone. The exit status is 1 if a table, the page, the figure or a run's
files differ from those of the study that nobody disturbed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from crash import write_policy


def main() -> None:
    """Print what was killed and what differed; leave with status 1 if anything did."""
    from support.crash_runs import write_prompts
    from support.studies import KilledStudies, Round, Victim

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the points")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sppo-study-kills-") as place:
        folder = Path(place)
        write_prompts(folder)
        studies = KilledStudies(folder, write_policy(folder / "model"), folder, seed=given.seed)
        print(f"undisturbed: {studies.seconds:.0f} s", file=sys.stderr)
        victims: list[Victim] = [("all", "study", "fit")[number % 3] for number in range(given.kills)]
        rounds: list[Round] = []
        while victims:  # a study may end before it was killed often enough
            rounds.append(studies.round(victims))
            victims = victims[len(rounds[-1].kills) :]
    kills = [kill for found in rounds for kill in found.kills]
    for kill in kills:
        print(f"{kill.victim} after {kill.after}")
    count = Counter(kill.victim for kill in kills)
    different = [what for found in rounds for what in found.differences]
    print(
        f"{len(kills)} kills ({', '.join(f'{number} of {kind}' for kind, number in count.items())}) of "
        f"{len(rounds)} studies in {sum(found.seconds for found in rounds):.0f} s, one undisturbed takes "
        f"{studies.seconds:.0f} s: {different or 'all equal'}"
    )
    if different:
        sys.exit(1)


if __name__ == "__main__":
    main()
