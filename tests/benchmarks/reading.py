"""Processor seconds to read generated rows to pairs, in every layout that is read from rows of its own.

    python tests/benchmarks/reading.py NUM_ROWS [LAYOUT ...]

With PYTHONPATH set to another checkout of hafrm_ds it times that one.
"""

import json
import random
import sys
import tempfile
import time
from pathlib import Path

import datasets

from hafrm_ds.data.reading import read_pairs
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


def main() -> None:
    num_rows, names = int(sys.argv[1]), sys.argv[2:] or list(LAYOUTS)
    datasets.disable_progress_bars()
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            rng = random.Random(0)
            file = Path(folder, "pairs.jsonl")
            with file.open("w") as lines:
                for _ in range(num_rows):
                    lines.write(json.dumps(LAYOUTS[name](rng)) + "\n")
            start = time.process_time()
            rows = read_pairs([Source(path=str(file))], role="train", seed=0, cache_dir=Path(folder, "cache"))
            seconds = time.process_time() - start
            assert len(rows) == num_rows and not any(rows["dropped"][:])
            print(f"{name}: {seconds:.2f} s for {num_rows:,} rows", flush=True)


if __name__ == "__main__":
    main()
