"""Scores and log-probs of exports in stock classes against those of the model they were made from.

    python -m tests.benchmarks.export_agreement FINAL CLASSIFIER POLICY ROWS.jsonl NUM_ROWS

CLASSIFIER and POLICY are the two exports of FINAL; rows have `prompt` and `responses`, each a text or messages. Prints
a line for each dtype.
"""

import json
import sys

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hafrm_ds import HybridRewardModel
from tests.benchmarks.scoring_speed import conversations_of

BATCH = 8


def rendered(tokenizer, conversations, **options):
    return tokenizer.apply_chat_template(conversations, return_tensors="pt", return_dict=True, **options)


def stock_scores(folder: str, conversations: list, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[C] each: one conversation at a time, and in padded batches."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    alone = [model(**rendered(tokenizer, each)).logits[0] for each in conversations]
    batches = [conversations[start : start + BATCH] for start in range(0, len(conversations), BATCH)]
    padded = [model(**rendered(tokenizer, batch, padding=True)).logits[:, 0] for batch in batches]
    return torch.cat(alone).float(), torch.cat(padded).float()


def stock_log_probs(folder: str, conversations: list, lengths: list[int], dtype: torch.dtype) -> Tensor:
    """[C]: summed over the last `lengths` tokens of each conversation, in fp64 from the logits on."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    values = []
    for conversation, length in zip(conversations, lengths, strict=True):
        ids = rendered(tokenizer, conversation)["input_ids"]
        logprobs = model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])
        values.append(logprobs[-length:].sum())
    return torch.stack(values)


def main(final: str, classifier: str, policy: str, rows_file: str, num_rows: str) -> None:
    with open(rows_file) as file:
        rows = [json.loads(line) for line in file][: int(num_rows)]
    conversations = [conversation for row in rows for conversation in conversations_of(row)]
    for dtype in ("float32", "bfloat16"):
        model = HybridRewardModel.from_pretrained(final, dtype=dtype)
        scores, log_probs = torch.tensor(model.score(conversations)), torch.tensor(model.log_probs(conversations))
        lengths = [len(model.encode(conversation).responses[0]) for conversation in conversations]
        with torch.no_grad():
            alone, padded = stock_scores(classifier, conversations, getattr(torch, dtype))
            stock = stock_log_probs(policy, conversations, lengths, getattr(torch, dtype))
        per_token = (stock - log_probs).abs() / torch.tensor(lengths)
        print(
            f"{dtype}: {len(conversations)} conversations; scores ({scores.min():.2f} to {scores.max():.2f}) differ by "
            f"{(alone - scores).abs().max():.2g} alone, {(padded - scores).abs().max():.2g} padded; log-probs "
            f"({log_probs.min():.0f} to {log_probs.max():.0f}) by {(stock - log_probs).abs().max():.2g}, "
            f"{per_token.max():.2g} a token, {((stock - log_probs).abs() / stock.abs()).max():.2g} relative"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
