"""Evaluate a model on preference pairs: accuracies with intervals, calibration, lengths, agreement of its heads; and on
public benchmarks by their own rules.

    deepspeed launch/evaluate.py --model RUN/final --data SOURCE [SOURCE ...] --output_dir DIR
    deepspeed launch/evaluate.py --model RUN/final --benchmarks rewardbench2 rm-bench=PATH --output_dir DIR
    deepspeed launch/evaluate.py ... --reference base [--fit_judge SOURCE]          both heads as one judge, too
    deepspeed launch/evaluate.py ... --deepspeed ds_configs/zero3.json              one model, sharded over the GPUs

The model is the final/ folder of a training, an export, another reward model (AutoModelForSequenceClassification with
one label), a causal LM, a function FILE.py:NAME or FILE.yaml, which composes rewards. A source is written as for
training (PATH, hub id or preset:NAME, with an optional row filter: 'pairs.jsonl?split=test'), or '{NAME: SOURCE, ...}'
to name the sets. A job that was killed resumes when it is started again.
"""

from hafrm_ds.errors import in_own_names
from hafrm_ds.evaluation.evaluate import evaluate
from hafrm_ds.evaluation.options import EvaluationOptions
from hafrm_ds.evaluation.reward_evaluation import evaluate_reward
from hafrm_ds.options import read
from hafrm_ds.processes.ownership import sole_owner
from hafrm_ds.processes.ranks import Processes, run_entry
from hafrm_ds.rewards.composition import is_model


def main(arguments: list[str], processes: Processes) -> None:
    options = read(EvaluationOptions, arguments, about=__doc__)
    processes.words = in_own_names
    with sole_owner(options.output_dir, processes):
        if is_model(options.model):
            evaluate(options, processes)
        else:
            evaluate_reward(options, processes)


if __name__ == "__main__":
    run_entry(main)
