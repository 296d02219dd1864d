"""Measure what models refuse, by either head, and how a training or another defence moved it.

    python launch/refusals.py --models BASE RUN/final --prompts xstest --output_dir DIR
    python launch/refusals.py --models RUN/final --prompts xstest=FILE.csv --answers ANSWERS.jsonl --output_dir DIR
    deepspeed launch/refusals.py ... --system FILE --rewrite true --generated 200

A policy says how probable openings of refusals are beside openings of compliances, and which of two options it takes
when it is asked. A reward head compares answers of --answers that refuse with answers that comply. Every other model,
and every model with a system message or with prompts that it has rewritten, is an arm that is compared with the first:
its shift moves all prompts alike, and its discrimination moves harmful and benign ones apart. DIR then holds
refusals.json, prompts.jsonl with what was measured on each prompt, and report.html. A job that was killed resumes when
it is started again.
"""

from hafrm_ds.errors import in_own_names
from hafrm_ds.evaluation.refusal.job import measure_refusals
from hafrm_ds.evaluation.refusal.options import RefusalOptions
from hafrm_ds.options import read
from hafrm_ds.processes.ownership import sole_owner
from hafrm_ds.processes.ranks import Processes, run_entry


def main(arguments: list[str], processes: Processes) -> None:
    options = read(RefusalOptions, arguments, about=__doc__)
    processes.words = in_own_names
    with sole_owner(options.output_dir, processes):
        measure_refusals(options, processes)


if __name__ == "__main__":
    run_entry(main)
