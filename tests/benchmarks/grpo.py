"""TRL's GRPOTrainer under ZeRO-3 with a reward of ours beside each rank: reward over steps, seconds a step, memory.

    deepspeed --num_gpus 2 tests/benchmarks/grpo.py --policy MODEL --reward COMPOSITION.yaml --data SOURCE \
        --output_dir DIR [--steps 20]

The prompts are those of preference pairs. Each step draws 4 answers to each of 4 prompts. The reward is held by a
process beside each rank, which ZeRO-3 does not partition; launch/score.py scores the answers of rank 0 again. That rank
prints Markdown; memory is the most that a process has had resident.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from datasets import Dataset
from pydantic import TypeAdapter
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from hafrm_ds.clients.for_trl import beside
from hafrm_ds.data.sources import TrainSources
from hafrm_ds.evaluation.pair_rows import rows_of_pairs

ROOT = Path(__file__).parents[2]
ANSWERS, PROMPTS_A_RANK, MAX_PROMPT_WORDS = 4, 2, 120


class SecondsOfSteps(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def score_again(reward: str, asked: list[dict[str, Any]], folder: Path) -> float:
    """The largest difference of the rewards in rows from those that launch/score.py gives."""
    given, scored = folder / "asked.jsonl", folder / "scored.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in asked))
    score = [sys.executable, str(ROOT / "launch" / "score.py"), "--model", reward]
    words = [*score, "--input", str(given), "--output", str(scored)]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=alone)  # a job of one process, not of this one's
    rows = map(json.loads, scored.read_text().splitlines())
    return max(abs(row["score"] - row["given"]) for row in rows if row["given"] is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--reward", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--local_rank", type=int)
    options = parser.parse_args()

    sources = TypeAdapter(TrainSources).validate_python(options.data)
    prompts = [row["prompt"] for row in rows_of_pairs(sources, None, None)]
    prompts = [each for each in prompts if sum(len(turn["content"].split()) for turn in each) <= MAX_PROMPT_WORDS]
    reward = beside(options.reward)
    asked: list[dict[str, Any]] = []

    def composition(prompts: list, completions: list, **columns: Any) -> list[float | None]:
        values = reward(prompts, completions, **columns)
        asked.extend(
            {"prompt": prompt, "response": answer, "given": value}
            for prompt, answer, value in zip(prompts, completions, values, strict=True)
        )
        return values

    # On CPUs transformers starts torch's group alone, and DeepSpeed's partitioning takes this process for the only one.
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    clock = SecondsOfSteps()
    trainer = GRPOTrainer(
        model=options.policy,
        reward_funcs=composition,
        processing_class=AutoTokenizer.from_pretrained(options.policy, padding_side="left"),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        args=GRPOConfig(
            output_dir=options.output_dir,
            deepspeed={
                "bf16": {"enabled": "auto"},
                "zero_optimization": {"stage": 3},
                "gradient_clipping": "auto",
                "train_batch_size": "auto",
                "train_micro_batch_size_per_gpu": "auto",
            },
            use_cpu=not torch.cuda.is_available(),
            bf16=True,
            gradient_checkpointing=False,
            per_device_train_batch_size=ANSWERS * PROMPTS_A_RANK,
            num_generations=ANSWERS,
            max_completion_length=48,
            learning_rate=2e-6,
            max_steps=options.steps,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=0,
        ),
        callbacks=[clock],
    )
    started = time.perf_counter()
    trainer.train()
    took = time.perf_counter() - started
    if dist.get_rank() == 0:
        rows = [row for row in trainer.state.log_history if "reward" in row]
        print("| step | reward | its deviation | tokens of an answer | seconds |\n|---|---|---|---|---|")
        for number, (row, seconds) in enumerate(zip(rows, clock.seconds, strict=True), start=1):
            length = row["completions/mean_length"]
            print(f"| {number} | {row['reward']:.3f} | {row['reward_std']:.3f} | {length:.0f} | {seconds:.1f} |")
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"\n{options.steps} steps in {took:.0f} s; {memory:.2f} GiB a rank")
        worst = score_again(options.reward, asked, Path(options.output_dir))
        print(f"largest difference of a reward from launch/score.py's: {worst:.1e}, {len(asked)} answers")


if __name__ == "__main__":
    main()
