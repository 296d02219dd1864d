"""Make preference pairs out of supervised dialogues: a draft is rejected, and what its author made of advice is chosen.

    python launch/correct.py --config launch/scenarios/bicycle_hire.yaml --output_dir DIR [--dialogues N] [--parallel 8]

A scenario file says who plays the user, the assistant and the supervisor (each a chat endpoint that speaks OpenAI's
JSON, or a policy that is loaded here), which cases they talk about, who may see which field of a case, and which rules
drafts are held to. The supervisor, who sees the whole case, answers each draft with advice, or that there is no
problem; a draft with advice is rewritten by its seat. DIR/pairs.jsonl is read by training as it is; DIR/report.json
says how often drafts were corrected and whether corrections are longer. A scenario that would tell a seat what it may
not see is refused before anybody is asked. Dialogues that failed are named, and the exit status is then 3. A job that
was killed resumes when it is started again.
"""

import sys

from hafrm_ds.corrections.job import correct
from hafrm_ds.corrections.scenario import Scenario
from hafrm_ds.options import read
from hafrm_ds.processes.ownership import sole_owner
from hafrm_ds.processes.ranks import Processes, run_entry

DIALOGUES_FAILED = 3


def main(arguments: list[str], processes: Processes) -> None:
    scenario = read(Scenario, arguments, about=__doc__)
    with sole_owner(scenario.output_dir, processes):
        num_failed = correct(scenario, processes)
    if num_failed:
        sys.exit(DIALOGUES_FAILED)


if __name__ == "__main__":
    run_entry(main)
