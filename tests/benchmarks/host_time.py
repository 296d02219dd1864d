"""What the host needs for a micro-batch, apart from what a device computes.

    python tests/benchmarks/host_time.py --tiny DIR --config FILE.yaml [--section.key value ...]
    OMP_NUM_THREADS=1 deepspeed --num_gpus 1 tests/benchmarks/host_time.py --config FILE.yaml \
        --model.name_or_path DIR [--section.key value ...]

--tiny makes a model of 30 layers, so narrow that a CPU computes next to nothing, with the tokenizer of the run's. Its
attention gives the queries back: what is left is Python, torch's dispatch and DeepSpeed, as they run beside a GPU. A
row of a Markdown table is printed, medians over all micro-batches: milliseconds for a layer in forward and in backward,
and for a micro-batch between the end of one backward and the next forward, which a GPU under ZeRO-3 waits for.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hafrm_ds.config import TrainConfig
from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.engine.engine import TrainingEngine
from hafrm_ds.model.attention import Kernel, segment_attention
from hafrm_ds.processes.ranks import Processes, run_entry
from hafrm_ds.training.benchmark import trainer_for_measuring
from hafrm_ds.training.logging import RunLog

LAYERS, WARM_UP, STEPS = 30, 2, 8
NO_ATTENTION = Kernel("none", lambda query, key, value, segments, rule: 1.0 * query, "torch", (), True)


def make_tiny(config: TrainConfig, folder: Path) -> None:
    shape = AutoConfig.from_pretrained(config.model.name_or_path)
    shape.update({"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2})
    shape.update({"num_key_value_heads": 1, "head_dim": 8, "layer_types": None})
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(config.model.name_or_path).save_pretrained(folder)


def main(arguments: list[str], processes: Processes) -> None:
    config = load_config(arguments)
    trainer = trainer_for_measuring(config, WARM_UP + STEPS, processes, RunLog(config, processes, files=False))
    engine = trainer.engine
    AttentionInterface.register(NO_ATTENTION.implementation, partial(segment_attention, NO_ATTENTION))
    engine.model.causal_lm.set_attn_implementation(NO_ATTENTION.implementation)
    times: dict[str, list[float]] = {"forward": [], "backward": [], "between": [], "step": []}
    ended: list[float] = []

    def timed(name: str, work: Callable) -> Callable:
        def run(*arguments, **options):
            started = time.process_time()
            if name == "forward" and ended:
                times["between"].append(started - ended[0])
            result = work(*arguments, **options)
            ended[:] = [time.process_time()] if name == "backward" else []
            times[name].append(time.process_time() - started)
            return result

        return run

    with mock.patch.multiple(
        TrainingEngine,
        __call__=timed("forward", TrainingEngine.__call__),
        backward=timed("backward", TrainingEngine.backward),
        step=timed("step", TrainingEngine.step),
    ):
        for step in range(WARM_UP + STEPS):
            if step == WARM_UP:
                for values in times.values():
                    values.clear()
            trainer.train_step(step)
    forward, backward, between = (1e3 * statistics.median(times[name]) for name in ("forward", "backward", "between"))
    print(
        f"| {engine.stage} | {config.model.gradient_checkpointing} | {forward / LAYERS:.2f} | "
        f"{backward / LAYERS:.2f} | {between:.2f} | {len(times['forward']) / STEPS:.1f} |",
        flush=True,
    )


if __name__ == "__main__":
    if sys.argv[1] == "--tiny":
        make_tiny(load_config(sys.argv[3:]), Path(sys.argv[2]))
    else:
        run_entry(main)
