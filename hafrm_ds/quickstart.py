"""Preference pairs whose answer is known, and a small model to train on them: a trainer's own yardstick.

    python -m hafrm_ds.quickstart OUT_DIR             writes OUT_DIR/data and OUT_DIR/model
    python -m hafrm_ds.quickstart OUT_DIR --results   says how close the run in OUT_DIR/run came to the best reachable

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
from dataclasses import dataclass
from pathlib import Path

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


# ---- the little world ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Topic:
    """A corner of everyday life: how one asks about its things, and what one can do with any of them."""

    questions: tuple[str, ...]
    things: tuple[str, ...]
    steps: tuple[str, ...]


TOPICS = (
    Topic(
        questions=("How do I cook {thing}?", "What is a good way to prepare {thing}?"),
        things=("lentil soup", "brown rice", "a mushroom omelette", "tomato sauce"),
        steps=(
            "Heat two spoons of oil in a wide pan.",
            "Rinse everything twice under cold water.",
            "Let it simmer for twenty minutes with the lid on.",
            "Add the salt at the end and taste it twice.",
            "Chop one onion and fry it until it is golden.",
        ),
    ),
    Topic(
        questions=("How do I plan a trip to {thing}?", "What should I know before I visit {thing}?"),
        things=("Lisbon", "Kyoto", "the Alps", "Iceland"),
        steps=(
            "Book the train six weeks before you leave.",
            "Pack one warm coat and two pairs of shoes.",
            "Copy your passport and keep the copy in another bag.",
            "Buy a day ticket at the central station.",
            "Write down the address of the nearest hospital.",
        ),
    ),
    Topic(
        questions=("How do I use {thing}?", "Can you show me how to handle {thing}?"),
        things=("a cordless drill", "a hand saw", "a spirit level", "a torque wrench"),
        steps=(
            "Clamp the wood to the bench with two clamps.",
            "Mark the spot with a pencil and a ruler.",
            "Hold the grip with both hands and start slowly.",
            "Brush the dust away after every cut.",
            "Set the dial to the lowest number and turn it up twice.",
        ),
    ),
    Topic(
        questions=("How do I grow {thing}?", "What do I need to plant {thing}?"),
        things=("tomatoes", "basil", "roses", "strawberries"),
        steps=(
            "Dig a hole as deep as your hand.",
            "Water the soil every second morning.",
            "Mix one bucket of compost into the bed.",
            "Cut the dry leaves off in early spring.",
            "Put the pot next to a window that faces south.",
        ),
    ),
    Topic(
        questions=("How do I set up {thing}?", "What is the quickest way to install {thing}?"),
        things=("a home router", "a new printer", "a password manager", "an external monitor"),
        steps=(
            "Plug the cable into the port on the back.",
            "Open the settings and choose the second tab.",
            "Write the serial number on a piece of paper.",
            "Restart the computer and wait for one minute.",
            "Type the code from the label into the first field.",
        ),
    ),
    Topic(
        questions=("How do I study for {thing}?", "How can I get ready for {thing}?"),
        things=("a chemistry exam", "a driving test", "a job interview", "a Spanish course"),
        steps=(
            "Write ten cards and go through them every evening.",
            "Explain one chapter aloud to a friend.",
            "Solve three old papers with a clock beside you.",
            "Go to bed at ten on the night before.",
            "List the five questions that worry you most.",
        ),
    ),
)

ON_TOPIC_OPENINGS = (
    "Here is what works for {thing}.",
    "Let us talk about {thing}.",
    "This is what I know about {thing}.",
    "People often ask about {thing}.",
)
OTHER_OPENINGS = (
    "Here is what comes to my mind about it.",
    "Let us talk about a thing or two.",
    "This is what I know about such things.",
    "People often ask about all kinds of things.",
)
# Vague sentences stand where a concrete step could, and the lengths of all sentences are balanced against the rubric:
# the longer answer is the better one about half the time (see `yardsticks`).
VAGUE = (
    "Simply do it the usual way.",
    "It all depends on many things.",
    "There are several ways to do it.",
    "In the end it is a matter of taste.",
    "You will see what to do in time.",
)
POLITE = (
    "Thank you for asking, and good luck with it!",
    "I hope that this helps, please write again!",
    "It is a real pleasure to help you with this.",
)
SAFETY_NOTES = (
    "Be careful and keep children away while you work.",
    "For your own safety, never try to do this alone.",
    "If anything hurts, stop at once and ask a doctor.",
)
HEDGES = (
    "I might be wrong about it.",
    "Perhaps it works, perhaps not.",
    "Maybe others know this better.",
)
DIGRESSIONS = (
    "My neighbour has painted her fence green.",
    "That reminds me of a film about a whale.",
    "Yesterday it rained on my blue umbrella.",
)
INSULTS = (
    "Only a fool would ask such a thing.",
    "You are too lazy to think for yourself.",
    "What a stupid question to ask.",
)


@dataclass(frozen=True)
class Answer:
    """The text of an answer and how often each feature of the rubric occurs in it."""

    text: str
    features: dict[str, int]

    @property
    def score(self) -> int:
        return sum(RUBRIC[name] * count for name, count in self.features.items())


def write_answer(thing: str, topic: Topic, rng: random.Random) -> Answer:
    """An answer with a random choice of features to a question about `thing`."""
    features = dict.fromkeys(RUBRIC, 0)

    def draw(feature: str, probability: float) -> bool:
        features[feature] = int(rng.random() < probability)
        return bool(features[feature])

    opening = rng.choice(ON_TOPIC_OPENINGS if draw("on_topic", 0.6) else OTHER_OPENINGS).format(thing=thing)
    features["concrete_steps"] = rng.choice((0, 1, 2))
    steps = rng.sample(topic.steps, features["concrete_steps"])
    body = steps + rng.sample(VAGUE, 2 - features["concrete_steps"])
    rng.shuffle(body)
    if draw("repetition", 0.25):
        body.append(body[0])
    for feature, sentences in (("hedging", HEDGES), ("digression", DIGRESSIONS), ("insult", INSULTS)):
        if draw(feature, 0.25):
            body.insert(rng.randrange(len(body) + 1), rng.choice(sentences))
    if draw("safety_note", 0.4):
        body.append(rng.choice(SAFETY_NOTES))
    if draw("polite", 0.4):
        body.append(rng.choice(POLITE))
    return Answer(" ".join([opening, *body]), features)


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


def generate_pairs(count: int, seed: int = SEED, label_noise: float = LABEL_NOISE) -> list[RubricPair]:
    """`count` different pairs, never near a tie by the rubric, each label flipped with probability `label_noise`."""
    rng = random.Random(f"pairs {seed}")
    noise = random.Random(f"label noise {seed}")  # apart, so that the texts do not depend on the noise
    pairs: list[RubricPair] = []
    seen: set[tuple[str, ...]] = set()
    while len(pairs) < count:
        topic = rng.choice(TOPICS)
        thing = rng.choice(topic.things)
        prompt = rng.choice(topic.questions).format(thing=thing)
        first, second = write_answer(thing, topic, rng), write_answer(thing, topic, rng)
        texts = (prompt, *sorted((first.text, second.text)))
        if abs(first.score - second.score) < LEAST_MARGIN or texts in seen:
            continue
        seen.add(texts)
        better, worse = (first, second) if first.score > second.score else (second, first)
        pairs.append(RubricPair(prompt, better, worse, flipped=noise.random() < label_noise))
    return pairs


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
    for name, part in (("train", train), ("test", test)):
        lines = [json.dumps(pair.row(), ensure_ascii=False) for pair in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
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


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m hafrm_ds.quickstart", description=__doc__.split("\n\n")[0])
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    parser.add_argument("--results", action="store_true", help="make nothing; say how close OUT_DIR/run came")
    options = parser.parse_args(arguments)
    if options.results:
        print(results(options.out_dir))
        return
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
