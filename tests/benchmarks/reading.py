"""Processor seconds to read generated rows to pairs, in every layout that is read from rows of its own.

    python tests/benchmarks/reading.py NUM_ROWS [LAYOUT ...]
    python tests/benchmarks/reading.py NUM_ROWS --tokenise MODEL   reads rows of texts and tokenises them for a model

With PYTHONPATH set to another checkout of hafrm_ds it times that one.
"""

import json
import os
import random
import sys
import tempfile
from pathlib import Path

import datasets
from transformers import AutoTokenizer

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.preparation import PreparationOptions, prepare_groups
from hafrm_ds.data.reading import read_groups
from hafrm_ds.data.sources import Source

WORDS = ("the", "tea", "of", "a", "large", "pot", "is", "good", "when", "it", "has", "cooked", "for", "ten", "minutes")


def text(rng: random.Random, length: int) -> str:
    return " ".join(rng.choices(WORDS, k=length)) + "."


def texts(rng: random.Random) -> dict:
    return {"prompt": text(rng, 30), "chosen": text(rng, 80), "rejected": text(rng, 80)}


def messages(rng: random.Random) -> dict:
    prompt = [{"role": "user", "content": text(rng, 30)}]
    answers = ([{"role": "assistant", "content": text(rng, 80)}] for _ in range(2))
    return dict(zip(("chosen", "rejected"), (prompt + answer for answer in answers)))


def transcripts(rng: random.Random) -> dict:
    start = f"\n\nHuman: {text(rng, 15)}\n\nAssistant: {text(rng, 15)}\n\nHuman: {text(rng, 15)}\n\nAssistant: "
    return {name: start + text(rng, 80) for name in ("chosen", "rejected")}


def with_other_columns(rng: random.Random) -> dict:
    return texts(rng) | {"prompt_id": "x" * 64, "model": "m", "score_chosen": 8.0, "score_rejected": 3.0, "votes": 3}


LAYOUTS = {each.__name__: each for each in (texts, messages, transcripts, with_other_columns)}


def write_rows(file: Path, name: str, num_rows: int) -> None:
    rng = random.Random(0)
    with file.open("w") as lines:
        for _ in range(num_rows):
            lines.write(json.dumps(LAYOUTS[name](rng)) + "\n")


def processor_seconds() -> float:
    """Of this process and of those it has waited for."""
    return sum(os.times()[:4])


def time_reading(num_rows: int, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_rows(file := Path(folder, "pairs.jsonl"), name, num_rows)
        start = processor_seconds()
        rows = read_groups([Source(path=str(file))], role="train", seed=0, cache_dir=Path(folder, "cache"))
        seconds = processor_seconds() - start
        assert len(rows) == num_rows and not any(rows["dropped"][:])
        print(f"{name}: {seconds:.2f} s for {num_rows:,} rows", flush=True)


def time_preparation(num_rows: int, model: str) -> None:
    formatter = ChatFormatter.create(AutoTokenizer.from_pretrained(model), None, "2026-01-01")
    with tempfile.TemporaryDirectory() as folder:
        write_rows(file := Path(folder, "pairs.jsonl"), "texts", num_rows)
        options = PreparationOptions(
            max_length=512, truncation="drop", max_dropped_share=0.0, cache_dir=Path(folder, "cache"), num_proc=1
        )
        start = processor_seconds()
        pairs = prepare_groups([Source(path=str(file))], formatter=formatter, options=options, role="train", seed=0)
        seconds = processor_seconds() - start
        assert len(pairs) == num_rows
        print(f"read and tokenised: {seconds:.2f} s for {num_rows:,} rows", flush=True)


def main() -> None:
    num_rows, names = int(sys.argv[1]), sys.argv[2:] or list(LAYOUTS)
    datasets.disable_progress_bars()
    if names[0] == "--tokenise":
        time_preparation(num_rows, names[1])
        return
    for name in names:
        time_reading(num_rows, name)


if __name__ == "__main__":
    main()
