"""A row of every format, in the layout of those who publish it; and the table of formats in data/README.md.

python -m tests.data.format_rows        # writes the table into the README
"""

import json
import re
from pathlib import Path

from hafrm_ds.data.formats import FORMATS
from hafrm_ds.data.pairs import assistant, user

README = Path(__file__).parents[2] / "hafrm_ds" / "data" / "README.md"
BEGIN, END = "<!-- formats -->\n", "<!-- end of formats -->"

EXAMPLES = {
    "explicit_prompt": {"prompt": "p", "chosen": "a", "rejected": "b"},
    "safe_rlhf": {"prompt": "p", "response_0": "b", "response_1": "a", "safer_response_id": 1},
    "alpaca_farm": {"instruction": "p", "input": "", "output_1": "a", "output_2": "b", "preference": 1},
    "arena": {
        "conversation_a": [user("p"), assistant("b")],
        "conversation_b": [user("p"), assistant("a")],
        "winner": "model_b",
    },
    "implicit_messages": {"chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]},
    "transcripts": {"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"},
    "implicit_text": {"chosen": "p\na", "rejected": "p\nb"},
    "alpaca_preference": {"instruction": "p", "input": "", "chosen": "a", "rejected": "b"},
    "question": {"system": "", "question": "p", "chosen": "a", "rejected": "b"},
    "conversations": {
        "conversations": [{"from": "human", "value": "p"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    "ms_swift": {"messages": [user("p"), assistant("a")], "rejected_response": "b"},
    "kaggle_arena": {
        "prompt": '["p"]',
        "response_a": '["b"]',
        "response_b": '["a"]',
        "winner_model_a": 0,
        "winner_model_b": 1,
        "winner_tie": 0,
    },
    "helpsteer3": {"context": [user("p")], "response1": "a", "response2": "b", "overall_preference": -2},
    "summaries": {"info": {"post": "p"}, "summaries": [{"text": " b"}, {"text": " a"}], "choice": 1},
    "shp": {"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 10, "score_B": 3},
    "webgpt": {
        "question": {"full_text": "p", "dataset": "eli5"},
        "answer_0": "b",
        "answer_1": "a",
        "score_0": -1.0,
        "score_1": 1.0,
    },
    "nectar": {
        "prompt": "\n\nHuman: p\n\nAssistant: ",
        "answers": [{"answer": "b", "model": "m", "rank": 2.0}, {"answer": "a", "model": "n", "rank": 1.0}],
        "turns": 1,
        "num_responses": 2,
    },
    "ultrafeedback": {
        "instruction": "p",
        "models": ["m", "n"],
        "completions": [{"response": "b", "overall_score": 3.0}, {"response": "a", "overall_score": 8.0}],
    },
    "ultra_interact": {
        "task": "Math_CoT",
        "trajectory": [{"from": "user", "value": "p"}],
        "chosen": "a",
        "rejected": "b",
        "parent_id": None,
    },
    "query": {"query": "p", "chosen": "a", "rejected": "b"},
    "input": {"system": "", "input": "p", "chosen": "a", "rejected": "b", "labelling_prompt": [user("Judge!")]},
    "messages": {"messages": [user("p")], "chosen": assistant("a"), "rejected": assistant("b")},
    "argilla": {"instruction": "p", "chosen_response": "a", "rejected_response": "b", "chosen_avg_rating": 5.0},
    "clair": {"task": "p", "student_solution": "b", "revision": "a", "rational": "It was short."},
    "stack_paired": {"qid": 1, "question": "p", "response_j": "a", "response_k": "b"},
    "helpsteer2": {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": -1},
    "stack_exchange": {
        "question": "p",
        "answers": [{"text": "b", "pm_score": 0, "selected": False}, {"text": "a", "pm_score": 3, "selected": True}],
    },
    "ratings": {"instruction": "p", "generations": ["b", "a"], "ratings": [2.0, 4.0]},
    "groups": {"prompt": "p", "responses": ["b", "a"], "scores": [0.5, 2.5]},
    "best_of_n": {
        "id": "candidates.jsonl:1",
        "prompt": "p",
        "model": "m",
        "pick": "b",
        "candidates": [
            {"response": "b", "score": 0.5, "rank": 1, "gold": -1.0},
            {"response": "a", "score": 0.2, "rank": 2, "gold": 1.0},
        ],
    },
    "oasst": {
        "message_tree_id": "1",
        "tree_state": "ready_for_export",
        "prompt": {
            "role": "prompter",
            "text": "p",
            "replies": [
                {"role": "assistant", "text": "b", "rank": 1, "replies": []},
                {"role": "assistant", "text": "a", "rank": 0, "replies": []},
            ],
        },
    },
}


def table() -> str:
    """Markdown: every format with its columns, whose it is and a row."""
    lines = ["| format | whose | a row |", "|---|---|---|"]
    for name, known in FORMATS.items():
        row = json.dumps(EXAMPLES[name]).replace("|", "\\|")
        lines.append(f"| {name} | {known.whose} | `{row}` |")
    return "\n".join(lines) + "\n"


def main() -> None:
    text = README.read_text()
    README.write_text(re.sub(f"(?s)(?<={BEGIN}).*(?={END})", lambda _: table(), text))


if __name__ == "__main__":
    main()
