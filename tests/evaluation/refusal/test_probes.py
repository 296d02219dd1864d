"""The probes of refusing: what is tokenised, and the logit of it against plain log-softmax."""

import math

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.pairs import user
from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.refusal.probes import (
    LETTERS,
    OPENINGS,
    QUESTION,
    REWARD,
    Openings,
    covered_by,
    groups_for,
    logit_of,
    orders,
    question,
    with_openings,
)
from hafrm_ds.evaluation.refusal.prompts import GivenAnswers
from hafrm_ds.saved.opening import load_scorer, open_model
from tests.tiny_models import save_tiny_final
from tests.tiny_tokenizers import byte_level_tokenizer

PROMPT = [user("How?")]


def formatter(**options) -> ChatFormatter:
    return ChatFormatter.create(byte_level_tokenizer(**options), options.get("chat_template"), "2024-07-26")


def test_openings_are_tokenised_as_the_beginnings_of_whole_conversations():
    own = formatter()
    ids = with_openings(own, PROMPT, ("No", "Yes"))
    decode = own.tokenizer.decode
    assert decode(ids.prompt) == "user:How?</s>assistant:"
    assert [decode(each) for each in ids.responses] == ["No", "Yes"]
    # A token that is merged over the boundary belongs to the openings.
    merged = formatter(merges=((":", "N"),))
    ids = with_openings(merged, PROMPT, ("No", "Yes"))
    assert merged.tokenizer.decode(ids.prompt) == "user:How?</s>assistant"
    assert [merged.tokenizer.decode(each) for each in ids.responses] == [":No", ":Yes"]
    assert len(ids.responses[0]) == 2


def test_text_of_the_template_before_an_answer_is_kept():
    thinking = (
        "{% for m in messages %}{{ m.role + ':' + ('<think></think>' if m.role == 'assistant' else '') + m.content }}"
        "</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    own = ChatFormatter.create(byte_level_tokenizer(chat_template=thinking), None, "2024-07-26")
    ids = with_openings(own, PROMPT, ("t", "No"))
    assert [own.tokenizer.decode(each) for each in ids.responses] == ["<think></think>t", "<think></think>No"]


def test_a_template_that_refuses_or_changes_what_is_asked_is_an_error():
    refusing = ChatFormatter.create(
        byte_level_tokenizer(
            chat_template="{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
            "{% endif %}{{ m.role + ':' + m.content }}</s>{% endfor %}"
        ),
        None,
        "2024-07-26",
    )
    system = [{"role": "system", "content": "Be good."}, *PROMPT]
    with pytest.raises(DataError, match="no system"):
        with_openings(refusing, system, ("No", "Yes"))
    silent = ChatFormatter.create(
        byte_level_tokenizer(
            chat_template="{% for m in messages if m.role != 'system' %}{{ m.role + ':' + m.content }}</s>{% endfor %}"
        ),
        None,
        "2024-07-26",
    )
    with pytest.raises(DataError, match="leaves out system messages"):
        with_openings(silent, system, ("No", "Yes"))
    upper = ChatFormatter.create(
        byte_level_tokenizer(
            chat_template="{% for m in messages %}{{ m.role + ':' }}"
            "{{ m.content if m.role == 'user' else m.content|upper }}</s>{% endfor %}"
        ),
        None,
        "2024-07-26",
    )
    with pytest.raises(DataError, match="does not write the opening 'No' as it is"):
        with_openings(upper, PROMPT, ("No", "Yes"))


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    final = save_tiny_final(tmp_path_factory.mktemp("model") / "final", pad_token="</s>")
    return load_scorer(open_model(final), torch.device("cpu"), 8192)


@pytest.fixture(scope="module")
def logprob(scorer):
    """log pi of an answer, by plain transformers in fp64."""
    model = AutoModelForCausalLM.from_pretrained(scorer.formatter.tokenizer.name_or_path, dtype=torch.float64)
    return lambda prompt, answer: naive_logprob(model, scorer.formatter.tokenizer, prompt, answer)


def naive_logprob(model, tokenizer, prompt: str, answer: str) -> float:
    ids, start = tokenizer(prompt + answer)["input_ids"], len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
    return sum(logprobs[place - 1, ids[place]].item() for place in range(start, len(ids)))


def test_the_probes_equal_naive_ones_in_fp64(scorer, logprob):
    """Through the layout that shares the prompt, to 1e-4."""
    openings, own = Openings(("No, I", "Sor"), ("Yes", "Sure", "He")), scorer.formatter
    assert scorer.layout == "shared_prefix"
    values = scorer.values(groups_for(OPENINGS, own, PROMPT, openings, None), ("logprob",))[:, 0]
    refuse, comply = (
        math.log(np.mean([math.exp(logprob(own.render_prompt(PROMPT), text)) for text in texts]))
        for texts in (openings.refusals, openings.compliances)
    )
    assert logit_of(OPENINGS, values, 2) == pytest.approx(refuse - comply, abs=1e-4)

    values = scorer.values(groups_for(QUESTION, own, PROMPT, openings, None), ("logprob",))[:, 0]
    differences = []
    for place, order in enumerate(orders()):
        a, b = (logprob(own.render_prompt(question(PROMPT, *order)), letter) for letter in LETTERS)
        differences.append((a - b) * (1 if place == 0 else -1))
    assert "refuses" in orders()[0][0] and "refuses" in orders()[1][1]
    assert logit_of(QUESTION, values, 0) == pytest.approx(np.mean(differences), abs=1e-4)

    answers = GivenAnswers(("No.", "Never ever."), ("Sure.", "Yes", "All right"))
    values = scorer.values(groups_for(REWARD, own, PROMPT, openings, answers), ("reward",))[:, 0]
    refuse, comply = (
        np.mean([scorer.score([*PROMPT, {"role": "assistant", "content": text}]) for text in texts])
        for texts in (answers.refusals, answers.compliances)
    )
    assert logit_of(REWARD, values, 2) == pytest.approx(refuse - comply, abs=1e-4)


def test_what_is_covered_is_the_probability_of_all_that_is_asked_for():
    values = np.log(np.array([0.125, 0.25, 0.0625, 0.5], dtype=np.float32))
    assert covered_by(OPENINGS, values) == pytest.approx(0.9375)
    assert covered_by(QUESTION, values) == pytest.approx(0.9375 / 2)


def test_generated_answers_are_judged_by_how_they_begin():
    own = Openings()
    assert own.refused("I\N{RIGHT SINGLE QUOTATION MARK}m sorry, but no") and own.refused("\n i CANNOT help")
    assert own.refused("**I apologize**, but no") and own.refused("It's not appropriate to ask")
    assert not own.refused("Sure, here you are. I cannot say more.") and not own.refused("")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"refusals": ["No"], "compliances": []}, "compliances is no list of texts, or an empty one"),
        ({"refusals": ["No"]}, "expected two lists, refusals and compliances"),
        ({"refusals": ["No", ""], "compliances": ["Yes"]}, "refusals holds ''; an opening is a text without"),
        ({"refusals": ["No"], "compliances": [" Yes"]}, "compliances holds ' Yes'"),
        ({"refusals": ["No"], "compliances": [True]}, "compliances holds True"),
        ({"refusals": ["No"], "compliances": ["No problem"]}, "'No problem' begins with 'No'"),
        ({"refusals": ["No", "No"], "compliances": ["Yes"]}, "'No' begins with 'No'"),
        ("- a", "expected two lists"),
        ("[", "cannot be read: while parsing"),
    ],
)
def test_openings_that_cannot_be_used_are_refused(tmp_path, content, message):
    file = tmp_path / "openings.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(DataError, match=message):
        Openings.read(file)


def test_own_openings_are_read(tmp_path):
    file = tmp_path / "openings.yaml"
    file.write_text("refusals: ['Nein']\ncompliances: [Ja, Gern]\n")
    assert Openings.read(file) == Openings(("Nein",), ("Ja", "Gern"))
