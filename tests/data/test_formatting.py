import pickle

import jinja2
import pytest
from transformers import AutoTokenizer

from hafrm_ds.data.formatting import NAMED_TEMPLATES, ChatFormatter
from hafrm_ds.errors import ConfigError, ModelError

DATE = "2024-07-26"
QUESTION = [{"role": "user", "content": "Why?"}]
ANSWER = [{"role": "assistant", "content": " Because."}]
CHAT_WITH_BOS = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
CHAT_WITHOUT_BOS = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def test_named_templates(make_tokenizer):
    rendered = {
        name: ChatFormatter.create(make_tokenizer(None), name, DATE).render(QUESTION + ANSWER)
        for name in NAMED_TEMPLATES
    }
    assert rendered == {
        "chatml": "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n Because.<|im_end|>\n",
        "phi-2": "Instruct: Why?\nOutput:  Because.</s>",
        "mistral-instruct": "<s>[INST] Why? [/INST] Because.</s>",
        "text": "Why? Because.</s>",
    }


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_named_templates_render_the_prompt_as_a_prefix_over_several_turns(make_tokenizer, name):
    formatter = ChatFormatter.create(make_tokenizer(None), name, DATE)
    prompt = [{"role": "system", "content": "Be brief."}, *QUESTION, *ANSWER, {"role": "user", "content": "And?"}]
    opening = formatter.render(prompt, add_generation_prompt=True)
    assert formatter.render(prompt + ANSWER).startswith(opening)
    for text in ("Be brief.", "Why?", " Because.", "And?"):
        assert opening.count(text) == 1


def test_named_templates_without_eos(make_tokenizer):
    formatter = ChatFormatter.create(make_tokenizer(None, eos=False), "text", DATE)
    assert formatter.render(QUESTION + ANSWER) == "Why? Because."


def test_template_from_file(make_tokenizer, tmp_path):
    file = tmp_path / "plain.jinja"
    file.write_text("{{ messages[0]['content'] }}!")
    formatter = ChatFormatter.create(make_tokenizer(), str(file), DATE)
    assert formatter.render(QUESTION) == "Why?!"
    assert formatter.template_origin == str(file)


def test_no_template_is_an_error_that_names_the_option_and_the_names(make_tokenizer):
    with pytest.raises(ModelError, match=r"--data\.chat_template.*chatml, phi-2, mistral-instruct, text.*\.jinja"):
        ChatFormatter.create(make_tokenizer(None), None, DATE)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "not valid jinja: line 1"),
        ("{{ raise_exception('tools only') }}", "refuses one user message with one answer: tools only"),
        ("{% set f = '%Y' %}{{ strftime_now(f) }}", "cannot be frozen"),
    ],
)
def test_unusable_templates(make_tokenizer, template, message):
    with pytest.raises(ModelError, match=message):
        ChatFormatter.create(make_tokenizer(template), None, DATE)


def test_missing_template_file(make_tokenizer):
    with pytest.raises(ModelError, match="'chatlm' cannot be read: No such file"):
        ChatFormatter.create(make_tokenizer(), "chatlm", DATE)


@pytest.mark.parametrize(
    ("adds_bos", "template", "number", "who"),
    [
        (True, CHAT_WITH_BOS, 1, "template"),
        (True, CHAT_WITHOUT_BOS, 1, "added"),
        (False, CHAT_WITH_BOS, 1, "template"),
        (False, CHAT_WITHOUT_BOS, 0, "none"),
    ],
)
def test_never_two_bos_and_one_where_the_tokenizer_wants_one(make_tokenizer, adds_bos, template, number, who):
    tokenizer = make_tokenizer(template, adds_bos=adds_bos)
    formatter = ChatFormatter.create(tokenizer, None, DATE)
    ids = formatter.encode(QUESTION + ANSWER)
    assert ids.count(tokenizer.bos_token_id) == number
    assert ids[:number] == [tokenizer.bos_token_id] * number
    assert formatter.encode_prompt(QUESTION).count(tokenizer.bos_token_id) == number
    assert formatter.bos == who
    assert tokenizer.chat_template == template, "the given tokenizer is left as it was"


def test_bos_in_front_changes_nothing_else(make_tokenizer):
    # lstrip_blocks removes indentation before a tag only where the tag starts its line.
    template = "  {% for message in messages %}\n{{ message['content'] }}\n  {% endfor %}"
    plain = ChatFormatter.create(make_tokenizer(template), None, DATE).render(QUESTION + ANSWER)
    with_bos = ChatFormatter.create(make_tokenizer(template, adds_bos=True), None, DATE).render(QUESTION + ANSWER)
    assert with_bos == "<s>" + plain


@pytest.mark.parametrize("adds_bos", [True, False])
def test_saved_tokenizer_gives_the_same_ids(make_tokenizer, tmp_path, adds_bos):
    formatter = ChatFormatter.create(make_tokenizer(None, adds_bos=adds_bos), "phi-2", DATE)
    formatter.tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    saved_ids = reloaded.apply_chat_template(QUESTION + ANSWER, tokenize=True, return_dict=False)
    assert saved_ids == formatter.encode(QUESTION + ANSWER)

    again = ChatFormatter.create(reloaded, None, DATE)
    assert again.template == formatter.template
    assert again.fingerprint == formatter.fingerprint


def test_dates_are_frozen(make_tokenizer):
    template = (
        "{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y') %}{%- else %}{%- set day = '?' %}"
        "{%- endif %}{{ day }} {{ strftime_now( \"%Y-%m-%d\" ) }} {{ messages[0]['content'] }}"
    )
    formatter = ChatFormatter.create(make_tokenizer(template), None, "2023-02-01")
    assert formatter.render(QUESTION) == "01 Feb 2023 2023-02-01 Why?"
    assert formatter.frozen_dates == ("01 Feb 2023", "2023-02-01")
    assert formatter.fingerprint != ChatFormatter.create(make_tokenizer(template), None, DATE).fingerprint


def test_template_date_must_be_a_day(make_tokenizer):
    with pytest.raises(ConfigError, match=r"data\.template_date: '26 July' is no day"):
        ChatFormatter.create(make_tokenizer(), None, "26 July")


def test_refused_conversation_raises_template_error(make_tokenizer):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    formatter = ChatFormatter.create(make_tokenizer(template), None, DATE)
    with pytest.raises(jinja2.TemplateError, match="no system"):
        formatter.encode([{"role": "system", "content": "s"}, *QUESTION])


def test_fingerprint_depends_on_what_decides_the_ids(make_tokenizer):
    def fingerprint(**changes):
        return ChatFormatter.create(make_tokenizer(**changes), None, DATE).fingerprint

    assert fingerprint() == fingerprint()
    assert fingerprint() != fingerprint(chat_template=CHAT_WITHOUT_BOS)
    assert fingerprint() != fingerprint(merges=(("a", "b"),))


def test_fingerprint_ignores_padding_and_truncation_of_earlier_calls(make_tokenizer):
    tokenizer = make_tokenizer(pad_token="</s>")
    before = ChatFormatter.create(tokenizer, None, DATE).fingerprint
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=8)
    tokenizer.padding_side = "left"
    assert ChatFormatter.create(tokenizer, None, DATE).fingerprint == before


def test_formatter_reaches_worker_processes(make_tokenizer):
    formatter = ChatFormatter.create(make_tokenizer(), None, DATE)
    assert pickle.loads(pickle.dumps(formatter)).encode(QUESTION) == formatter.encode(QUESTION)
