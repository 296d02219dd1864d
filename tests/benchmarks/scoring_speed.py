"""Rows a second of a trained model against its export, scored one conversation at a time by plain transformers.

    OMP_NUM_THREADS=1 python tests/benchmarks/scoring_speed.py FINAL CLASSIFIER ROWS.jsonl NUM_ROWS

CLASSIFIER is the sequence-classification export of FINAL; rows have `prompt` and `responses`, each a text or messages.
Processor time of one thread is given beside wall time, for machines that are shared. Loading is not counted.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hafrm_ds import HybridRewardModel


def conversations_of(row: dict) -> list[list[dict]]:
    def as_messages(content: str | list[dict], role: str) -> list[dict]:
        return content if isinstance(content, list) else [{"role": role, "content": content}]

    prompt = as_messages(row["prompt"], "user")
    return [prompt + as_messages(response, "assistant") for response in row["responses"]]


def main(final: str, classifier: str, rows_file: str, num_rows: str) -> None:
    with open(rows_file) as file:
        rows = [json.loads(line) for line in file][: int(num_rows)]
    conversations = [conversation for row in rows for conversation in conversations_of(row)]
    stock = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    model = HybridRewardModel.from_pretrained(final)

    def one_by_one() -> list[float]:
        scores = []
        with torch.no_grad():
            for conversation in conversations:
                inputs = tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)
                scores.append(stock(**inputs).logits[0, 0].item())
        return scores

    values = []
    for name, score in (("one by one", one_by_one), ("hafrm_ds", lambda: model.score(conversations))):
        wall, cpu = time.perf_counter(), time.process_time()
        values.append(score())
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(
            f"{name}: {len(rows):,} rows, {len(conversations):,} conversations in {wall:.1f} s, {cpu:.1f} s of the "
            f"processor: {len(rows) / cpu:.2f} rows a second of it"
        )
    difference = (torch.tensor(values[0]) - torch.tensor(values[1])).abs().max()
    print(f"largest difference of a score: {difference:.2g}")


if __name__ == "__main__":
    main(*sys.argv[1:])
