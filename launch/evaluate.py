"""Evaluate a model on preference pairs: accuracies with intervals, calibration, lengths, agreement of its heads; and on
public benchmarks by their own rules.

    deepspeed launch/evaluate.py --model RUN/final --data SOURCE [SOURCE ...] --output_dir DIR
    deepspeed launch/evaluate.py --model RUN/final --benchmarks rewardbench2 rm-bench=PATH --output_dir DIR
    deepspeed launch/evaluate.py ... --deepspeed ds_configs/zero3.json              one model, sharded over the GPUs

The model is the final/ folder of a training, an export, another reward model (AutoModelForSequenceClassification with
one label) or a causal LM. A source is written as for training (PATH, hub id or preset:NAME, with an optional row
filter: 'pairs.jsonl?split=test'), or '{NAME: SOURCE, ...}' to name the sets. A job that was killed goes on when it is
started again.
"""

import argparse
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from hafrm_ds.data.sources import EvalSources, Source, suggestion
from hafrm_ds.errors import ConfigError
from hafrm_ds.evaluation.benchmarks.catalogue import BENCHMARKS
from hafrm_ds.processes.ranks import Processes, run_entry


def read_command_line(arguments: list[str]) -> dict[str, Any]:
    """-> fields of EvaluationOptions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id")
    add("--data", nargs="+", default=[], help="one or more sources; each is a set")
    known = ", ".join(BENCHMARKS)
    add("--benchmarks", nargs="+", default=[], help=f"of {known}; NAME takes it from the hub, NAME=PATH from there")
    add("--output_dir", type=Path, required=True, help="where the results go")
    add("--reference", help="policy that the implicit reward is measured against: a folder, a hub id, or base: what "
        "the training started from")  # fmt: skip
    add("--beta", type=float, help="scale of the implicit reward (default: that of the training, else 0.1)")
    add("--max_pairs", type=int, help="use at most so many pairs of each set: a fixed random choice")
    add(
        "--max_length",
        type=int,
        help="longest conversation in tokens (default: that of the training, else what the "
        "model knows and a micro-batch holds)",
    )
    add("--truncation", choices=("drop", "keep_prompt_end", "cut_response"),
        help="what happens to longer ones (default: as in the training, else keep_prompt_end)")  # fmt: skip
    add("--max_dropped_share", type=float, help="stop when more of the pairs would be dropped (0.05)")
    add("--chat_template", help="name or file of a template, for a tokenizer without one")
    add("--dtype", choices=("bfloat16", "float32"), help="default: that of the saved weights")
    add("--max_tokens_per_micro_batch", type=int, default=8192, help="token budget of one forward pass (%(default)s)")
    add("--deepspeed", type=Path, help="a DeepSpeed JSON: shard the model over the processes")
    add("--trust_remote_code", action="store_true", help="run modelling code that comes with the model")
    add("--trust_pickle", action="store_true", help="read weights that are not in safetensors")
    add("--local_rank", help=argparse.SUPPRESS)  # given by the deepspeed launcher
    options = vars(parser.parse_args(arguments))
    del options["local_rank"]
    options["data"] = read_sets(options["data"])
    options["benchmarks"] = read_benchmark_names(options["benchmarks"])
    if not options["data"] and not options["benchmarks"]:
        raise ConfigError(["neither --data nor --benchmarks was given: there is nothing to evaluate on"])
    return options


def read_sets(words: list[str]) -> dict[str, list[Source]]:
    """Words after --data -> sources of each set."""
    adapter = TypeAdapter(EvalSources)
    found: dict[str, list[Source]] = {}
    for word in words:
        try:
            sets = adapter.validate_python(yaml.safe_load(word) if word.startswith("{") else [word])
        except yaml.YAMLError:
            raise ConfigError([f"--data {word}: is not of the form '{{NAME: SOURCE, ...}}'"]) from None
        except ValidationError as error:
            raise ConfigError(
                [f"--data: {fault['msg'].removeprefix('Value error, ')}" for fault in error.errors()]
            ) from None
        if again := sorted(sets.keys() & found):
            raise ConfigError(
                [f"--data names two sets {again[0]}; give them names of their own: '{{NAME: SOURCE, ...}}'"]
            )
        found |= sets
    return found


def read_benchmark_names(words: list[str]) -> dict[str, str | None]:
    """Words after --benchmarks -> where each lies; None: on the hub."""
    found = {}
    for word in words:
        name, _, path = word.partition("=")
        if name not in BENCHMARKS:
            raise ConfigError([f"--benchmarks {name}: not known{suggestion(name, BENCHMARKS)}"])
        if name in found:
            raise ConfigError([f"--benchmarks names {name} twice; evaluate the second into another --output_dir"])
        found[name] = path or None
    return found


def main(arguments: list[str], processes: Processes) -> None:
    options = read_command_line(arguments)
    from hafrm_ds.evaluation.evaluate import EvaluationOptions, evaluate

    evaluate(EvaluationOptions(**options), processes)


if __name__ == "__main__":
    run_entry(main)
