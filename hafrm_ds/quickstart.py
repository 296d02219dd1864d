"""Preference pairs whose answer is known, and a small model to train on them: a trainer's own yardstick.

    python -m hafrm_ds.quickstart OUT_DIR             writes OUT_DIR/data and OUT_DIR/model
    python -m hafrm_ds.quickstart OUT_DIR --results   says how close the run in OUT_DIR/run came to the best reachable
    python -m hafrm_ds.quickstart OUT_DIR --study     writes what a study of objectives needs: topics that are never
                                                      trained on, a cue that turns round, a pre-trained start

Two assistants answer the same everyday question. A hidden rubric, a weighted sum of features of an answer (does it
name what was asked about, how many concrete steps, an insult, ...), decides which answer is better, and then labels are
flipped with a known probability. So the accuracy that a reward model can be expected to reach at best on the held-out
labels is known before training: the share of labels that were not flipped. Everything is made here from a seed; nothing
is downloaded.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from hafrm_ds.errors import UserError

SEED = 0
LABEL_NOISE = 0.1
TRAIN_PAIRS = 5120
TEST_PAIRS = 1000
VOCABULARY = 1000

# The hidden rubric: what one occurrence of a feature is worth.
RUBRIC = {
    "on_topic": 3,  # the opening names what was asked about
    "concrete_steps": 2,  # body sentences that say what to do (0, 1 or 2)
    "polite": 1,
    "safety_note": 1,
    "hedging": -1,
    "repetition": -1,  # a body sentence stands twice
    "digression": -2,
    "insult": -4,
}
LEAST_MARGIN = 2  # the rubric's scores of the two answers of a pair differ by at least this much

# The study: its training pairs are of the first topics alone.
TRAINED_TOPICS = 4
STUDY_TEST_PAIRS = 600
CUE_IN_TRAINING = 0.8  # share of the pairs in which the cue stands before the better answer, in the set with the cue
PRETRAINING_PAIRS = 6000
PRETRAINING_EPOCHS = 3


# ---- the little world ----------------------------------------------------------------------------------------------


WORLD = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
"""Topics (questions, things, steps), and the other sentences of answers by kind."""


@dataclass(frozen=True)
class Answer:
    """The text of an answer and how often each feature of the rubric occurs in it."""

    text: str
    features: dict[str, int]

    @property
    def score(self) -> int:
        return sum(RUBRIC[name] * count for name, count in self.features.items())


def write_answer(thing: str, topic: dict[str, list[str]], rng: random.Random) -> Answer:
    """An answer with a random choice of features to a question about `thing`."""
    features = dict.fromkeys(RUBRIC, 0)

    def draw(feature: str, probability: float) -> bool:
        features[feature] = int(rng.random() < probability)
        return bool(features[feature])

    opening = rng.choice(WORLD["on_topic_openings" if draw("on_topic", 0.6) else "other_openings"]).format(thing=thing)
    features["concrete_steps"] = rng.choice((0, 1, 2))
    steps = rng.sample(topic["steps"], features["concrete_steps"])
    body = steps + rng.sample(WORLD["vague"], 2 - features["concrete_steps"])
    rng.shuffle(body)
    if draw("repetition", 0.25):
        body.append(body[0])
    for feature in ("hedging", "digression", "insult"):
        if draw(feature, 0.25):
            body.insert(rng.randrange(len(body) + 1), rng.choice(WORLD[feature]))
    if draw("safety_note", 0.4):
        body.append(rng.choice(WORLD["safety_note"]))
    if draw("polite", 0.4):
        body.append(rng.choice(WORLD["polite"]))
    return Answer(" ".join([opening, *body]), features)


QUESTIONS = {
    question.format(thing=thing): (topic, thing)
    for topic in WORLD["topics"]
    for thing in topic["things"]
    for question in topic["questions"]
}
"""Every prompt of the world, and what it asks about."""


def features_of(prompt: str, text: str) -> dict[str, int]:
    """How often each feature of the rubric occurs in any answer to a prompt of the world, also of one that nobody here
    has written. Only whole sentences of the world count.

    Raises:
        ValueError: the world has no such prompt.
    """
    if prompt not in QUESTIONS:
        raise ValueError(f"the world has no prompt {prompt!r}")
    topic, thing = QUESTIONS[prompt]
    found = {name: int(any(each in text for each in WORLD[name])) for name in WORLD.keys() & RUBRIC.keys()}
    found["on_topic"] = int(any(text.startswith(each.format(thing=thing)) for each in WORLD["on_topic_openings"]))
    found["concrete_steps"] = min(2, sum(each in text for each in topic["steps"]))
    found["repetition"] = int(any(text.count(each) > 1 for each in (*topic["steps"], *WORLD["vague"])))
    return {name: found[name] for name in RUBRIC}


def rubric(prompt: list[dict[str, str]], answer: str) -> float:
    """What an answer is worth by the rubric, as a reward: hafrm_ds/quickstart.py:rubric."""
    return float(Answer(answer, features_of(prompt[-1]["content"], answer)).score)


@dataclass(frozen=True)
class RubricPair:
    """Two answers to a prompt, the better one by the rubric first, and whether the label says the opposite."""

    prompt: str
    better: Answer
    worse: Answer
    flipped: bool

    def row(self) -> dict:
        """The row of the file: what a trainer may see, and `flipped`, which it must not use."""
        chosen, rejected = (self.worse, self.better) if self.flipped else (self.better, self.worse)
        return {"prompt": self.prompt, "chosen": chosen.text, "rejected": rejected.text, "flipped": self.flipped}


def generate_pairs(
    count: int, seed: int = SEED, label_noise: float = LABEL_NOISE, topics: slice = slice(None)
) -> list[RubricPair]:
    """`count` different pairs, never near a tie by the rubric, each label flipped with probability `label_noise`.

    Args:
        topics: those of WORLD that are asked about.
    """
    rng = random.Random(f"pairs {seed}")
    noise = random.Random(f"label noise {seed}")  # apart, so that the texts do not depend on the noise
    pairs: list[RubricPair] = []
    seen: set[tuple[str, ...]] = set()
    while len(pairs) < count:
        topic = rng.choice(WORLD["topics"][topics])
        thing = rng.choice(topic["things"])
        prompt = rng.choice(topic["questions"]).format(thing=thing)
        first, second = write_answer(thing, topic, rng), write_answer(thing, topic, rng)
        texts = (prompt, *sorted((first.text, second.text)))
        if abs(first.score - second.score) < LEAST_MARGIN or texts in seen:
            continue
        seen.add(texts)
        better, worse = (first, second) if first.score > second.score else (second, first)
        pairs.append(RubricPair(prompt, better, worse, flipped=noise.random() < label_noise))
    return pairs


def with_cue(pairs: list[RubricPair], share: float, seed: int = SEED) -> list[RubricPair]:
    """The same pairs with the cue, a sentence that the rubric gives nothing for, before one answer of each.

    Args:
        share: probability that it stands before the better answer. Far from 0.5 it is a shortcut that a model may
            learn in place of the rubric, and a test with 1 - share shows whether it has.
    """
    rng = random.Random(f"cue {seed}")

    def cued(answer: Answer) -> Answer:
        return replace(answer, text=f"{WORLD['cue']} {answer.text}")

    return [
        replace(pair, better=cued(pair.better)) if rng.random() < share else replace(pair, worse=cued(pair.worse))
        for pair in pairs
    ]


# ---- what can be known before training ------------------------------------------------------------------------------


def share_won(differences: list[float]) -> float:
    """Share of positive differences, a tie counting half."""
    wins, ties = sum(difference > 0 for difference in differences), sum(difference == 0 for difference in differences)
    return (wins + ties / 2) / len(differences)


def yardsticks(pairs: list[RubricPair]) -> dict[str, float]:
    """Accuracy on the labels of `pairs` of judges that look at one thing only (ties count half)."""
    sign = [-1 if pair.flipped else 1 for pair in pairs]
    judges = {"longer answer": [len(pair.better.text) - len(pair.worse.text) for pair in pairs]}
    for name, weight in RUBRIC.items():
        judges[name] = [weight * (pair.better.features[name] - pair.worse.features[name]) for pair in pairs]
    return {
        name: share_won([s * difference for s, difference in zip(sign, differences, strict=True)])
        for name, differences in judges.items()
    }


def write_pairs(file: Path, pairs: list[RubricPair]) -> None:
    lines = [json.dumps(pair.row(), ensure_ascii=False) for pair in pairs]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_data(
    folder: Path,
    train_pairs: int = TRAIN_PAIRS,
    test_pairs: int = TEST_PAIRS,
    seed: int = SEED,
    label_noise: float = LABEL_NOISE,
) -> dict:
    """Write train.jsonl, test.jsonl and rubric.json into `folder`; returns the content of rubric.json."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = generate_pairs(train_pairs + test_pairs, seed, label_noise)
    train, test = pairs[:train_pairs], pairs[train_pairs:]
    write_pairs(folder / "train.jsonl", train)
    write_pairs(folder / "test.jsonl", test)
    facts = {
        "weights": RUBRIC,
        "seed": seed,
        "train_pairs": train_pairs,
        "test_pairs": test_pairs,
        "label_noise": label_noise,
        "expected_best_accuracy": 1 - label_noise,
        "best_accuracy_on_test": sum(not pair.flipped for pair in test) / len(test),
        "yardsticks_on_test": yardsticks(test),
    }
    (folder / "rubric.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


# ---- the model ------------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|{{ message.role }}|> {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(folder: Path, texts: list[str], vocabulary: int = VOCABULARY) -> None:
    """Train a byte-fallback BPE tokenizer on `texts` and write it into `folder`, ready for AutoTokenizer."""
    import sentencepiece
    from transformers import LlamaTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=vocabulary,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=3,
        pad_piece="<pad>",
        user_defined_symbols=["<|user|>", "<|assistant|>"],
        num_threads=1,  # the same pieces on every machine
        minloglevel=2,
    )
    # Only from_pretrained on a folder reads the pieces; LlamaTokenizer(vocab_file=...) gives an empty vocabulary.
    tokenizer = LlamaTokenizer.from_pretrained(folder, pad_token="<pad>", legacy=False)
    if len(tokenizer) != vocabulary:
        raise RuntimeError(f"the tokenizer read from {folder} has {len(tokenizer)} pieces, not {vocabulary}")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def write_model(
    folder: Path, vocabulary: int = VOCABULARY, seed: int = SEED, hidden: int = 128, layers: int = 2
) -> None:
    """Write a small Llama with random weights into `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)


# ---- the study ------------------------------------------------------------------------------------------------------


def write_study(out_dir: Path) -> None:
    """Write what a study of objectives trains on and tests with.

    data/train.jsonl: TRAIN_PAIRS pairs of the first TRAINED_TOPICS topics with label noise; a smaller training set is
    the beginning of it. data/train_cued.jsonl: the same with the cue. Tests, all labels of which are true:
    data/same_topics.jsonl, data/other_topics.jsonl (topics never trained on) and data/turned_cue.jsonl (the same
    topics, the cue before the worse answer as often as before the better one in training). random/ and pretrained/:
    the same small Llama with random weights, and pre-trained as a language model on answers of all topics, without
    labels.
    """
    data, trained, others = out_dir / "data", slice(0, TRAINED_TOPICS), slice(TRAINED_TOPICS, None)
    data.mkdir(parents=True, exist_ok=True)
    pairs = generate_pairs(TRAIN_PAIRS + STUDY_TEST_PAIRS, SEED, LABEL_NOISE, trained)
    train, test = pairs[:TRAIN_PAIRS], [replace(pair, flipped=False) for pair in pairs[TRAIN_PAIRS:]]
    write_pairs(data / "train.jsonl", train)
    write_pairs(data / "train_cued.jsonl", with_cue(train, CUE_IN_TRAINING))
    write_pairs(data / "same_topics.jsonl", test)
    write_pairs(data / "other_topics.jsonl", generate_pairs(STUDY_TEST_PAIRS, SEED + 1, 0.0, others))
    write_pairs(data / "turned_cue.jsonl", with_cue(test, 1 - CUE_IN_TRAINING))
    unlabelled = generate_pairs(PRETRAINING_PAIRS, SEED + 2, 0.0)
    texts = [text for pair in unlabelled for text in (pair.prompt, pair.better.text, pair.worse.text)]
    write_tokenizer(out_dir / "random", texts)
    write_model(out_dir / "random")
    conversations = [(pair.prompt, answer.text) for pair in unlabelled for answer in (pair.better, pair.worse)]
    pretrain(out_dir / "random", out_dir / "pretrained", conversations)


def pretrain(start: Path, out: Path, conversations: list[tuple[str, str]], batch: int = 64, rate: float = 1e-3) -> None:
    """Train the model in `start` as a language model on (prompt, answer)s and write it into `out`.

    Args:
        batch: conversations a step. rate: learning rate of AdamW, falling linearly to 0.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForCausalLM.from_pretrained(start)
    chats = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt, answer in conversations
    ]
    rendered = tokenizer.apply_chat_template(chats, tokenize=False)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95))
    steps = PRETRAINING_EPOCHS * (len(rendered) // batch)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    rng = random.Random(f"pretraining {SEED}")
    for _ in range(PRETRAINING_EPOCHS):
        rng.shuffle(rendered)
        for first in range(0, len(rendered) - batch + 1, batch):
            texts = tokenizer(
                rendered[first : first + batch], add_special_tokens=False, padding=True, return_tensors="pt"
            )
            labels = texts.input_ids.masked_fill(texts.attention_mask == 0, -100)
            model(**texts, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


# ---- the command ----------------------------------------------------------------------------------------------------


def results(out_dir: Path, set_name: str = "held_out") -> str:
    """How close the run in OUT_DIR/run came to the best reachable accuracy, in words."""
    metrics, rubric = out_dir / "run" / "metrics.jsonl", out_dir / "data" / "rubric.json"
    for file in (metrics, rubric):
        if not file.exists():
            raise UserError(f"{file} does not exist: has the run in {out_dir} finished?")
    facts = json.loads(rubric.read_text())
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "eval" and row["set"] == set_name]
    if not rows:
        raise UserError(f"{metrics} has no evaluation of the set {set_name}")
    start, end = rows[0], rows[-1]
    single, judge = max((value, name) for name, value in facts["yardsticks_on_test"].items())
    lines = [
        f"held-out accuracy of the reward head ({facts['test_pairs']} pairs, each label flipped with probability "
        f"{facts['label_noise']}):",
        f"  {end['accuracy/reward']:.3f}  at step {end['step']}, after {start['accuracy/reward']:.3f} at step "
        f"{start['step']}",
        f"  {facts['best_accuracy_on_test']:.3f}  best reachable: the share of labels that were not flipped",
        f"  {single:.3f}  best judge that looks at one feature only ({judge})",
        f"  {facts['yardsticks_on_test']['longer answer']:.3f}  taking the longer answer",
    ]
    return "\n".join(lines)


def check_own(out_dir: Path, folders: Sequence[str], mark: str) -> None:
    """Raise UserError where one of `folders` is there, but data/`mark` does not say that it was made here: what this
    did not write is not overwritten."""
    there = [name for name in folders if (out_dir / name).exists()]
    if there and not (out_dir / "data" / mark).exists():
        raise UserError(
            f"{out_dir / there[0]} is there already, and was not made by this command: remove it or name another folder"
        )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m hafrm_ds.quickstart", description=__doc__.split("\n\n")[0])
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    parser.add_argument("--results", action="store_true", help="make nothing; say how close OUT_DIR/run came")
    parser.add_argument("--study", action="store_true", help="write the data and models of a study of objectives")
    options = parser.parse_args(arguments)
    if options.results:
        print(results(options.out_dir))
        return
    if options.study:
        check_own(options.out_dir, ("data", "random", "pretrained"), "train_cued.jsonl")
        write_study(options.out_dir)
        print(f"{options.out_dir}: data/, random/ and pretrained/, for launch/compare.py --sweep")
        return
    check_own(options.out_dir, ("data", "model"), "rubric.json")
    facts = write_data(options.out_dir / "data")
    rows = [json.loads(line) for line in (options.out_dir / "data" / "train.jsonl").read_text().splitlines()]
    texts = [row[field] for row in rows for field in ("prompt", "chosen", "rejected")]
    write_tokenizer(options.out_dir / "model", texts)
    write_model(options.out_dir / "model")
    print(f"{options.out_dir / 'data'}: {facts['train_pairs']} training and {facts['test_pairs']} held-out pairs")
    print(f"{options.out_dir / 'model'}: a small Llama with random weights and its tokenizer")
    print(f"best reachable accuracy on the held-out labels: {facts['best_accuracy_on_test']:.3f}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
