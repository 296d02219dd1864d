"""Score the rows of a file one conversation at a time with plain transformers: what launch/score.py is compared with.

    python tests/benchmarks/score_one_by_one.py EXPORT IN.jsonl SCORED.jsonl

EXPORT is a sequence-classification export, SCORED.jsonl what launch/score.py made of IN.jsonl. Prints rows a second and
the largest difference of a score. Rows have `messages`, or `prompt` and `response` or `responses` as texts.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def conversations_of(row: dict) -> list[list[dict]]:
    def as_messages(content: str | list[dict], role: str) -> list[dict]:
        return content if isinstance(content, list) else [{"role": role, "content": content}]

    prompt = as_messages(row["prompt"], "user")
    return [prompt + as_messages(response, "assistant") for response in row["responses"]]


def main(export: str, rows_file: str, scored_file: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(export).eval()
    tokenizer = AutoTokenizer.from_pretrained(export)
    with open(rows_file) as file:
        rows = [json.loads(line) for line in file]
    with open(scored_file) as file:
        scored = [json.loads(line) for line in file]
    values, started = [], time.perf_counter()
    with torch.no_grad():
        for row in rows:
            for conversation in conversations_of(row):
                inputs = tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)
                values.append(model(**inputs).logits[0, 0].item())
    seconds = time.perf_counter() - started
    ours = [score for row in scored for score in row["scores"]]
    difference = (torch.tensor(ours) - torch.tensor(values)).abs().max().item()
    print(
        f"{len(rows):,} rows, {len(values):,} conversations: {len(rows) / seconds:.2f} rows/s "
        f"({seconds:.1f} s without loading); largest difference of a score {difference:.2g}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
