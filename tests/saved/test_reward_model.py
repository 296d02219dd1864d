"""A trained model as its users have it: conversations in, rewards and log-probs out."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hafrm_ds import HybridRewardModel
from hafrm_ds.data.packing import lay_out, share_prompts, split_groups
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.errors import DataError, ModelError, UserError
from tests.tiny_models import save_tiny_final
from tests.tiny_tokenizers import tokenize_pair

QUESTIONS = [[{"role": "user", "content": text}] for text in ("Why?", "What is it, and since when?")]
ANSWERS = ["Because.", " It rains, and nobody knows why.", "", "Since May."]


def answered(question: list, answer: str) -> list:
    return [*question, {"role": "assistant", "content": answer}]


CONVERSATIONS = [answered(question, answer) for answer in ANSWERS for question in QUESTIONS]
"""Those of one question never stand side by side."""


@pytest.fixture(scope="module")
def final(tmp_path_factory):
    """The template ends in eos, and pad = eos."""
    return save_tiny_final(tmp_path_factory.mktemp("model") / "final", pad_token="</s>")


@pytest.fixture(scope="module")
def model(final) -> HybridRewardModel:
    return HybridRewardModel.from_pretrained(final)


def test_a_score_is_the_head_at_the_last_token_of_the_whole_rendering(model, final):
    tokenizer, stock = AutoTokenizer.from_pretrained(final), AutoModelForCausalLM.from_pretrained(final)
    for conversation in CONVERSATIONS:
        ids = tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            state = stock.model(ids, use_cache=False).last_hidden_state[0, -1]
        assert model.score(conversation) == pytest.approx((model.model.reward_head.weight[0] @ state).item(), abs=1e-5)


def test_many_are_scored_as_one_by_one_in_the_order_given(model):
    together = model.score(CONVERSATIONS)
    assert together == pytest.approx([model.score(conversation) for conversation in CONVERSATIONS], abs=1e-5)
    assert len({round(value, 3) for value in together}) == len(together)
    assert model.score(QUESTIONS[1], responses=ANSWERS) == pytest.approx(together[1::2], abs=1e-5)
    assert model.log_probs(CONVERSATIONS) == pytest.approx([model.log_probs(each) for each in CONVERSATIONS], abs=1e-4)
    assert model.score([]) == []


def test_the_gpu_of_the_model_is_the_current_one_while_it_scores(model, monkeypatch):
    """FlashAttention 4 and Triton compile for the current GPU, and a model may lie on another."""
    events: list = []

    class Current:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            events.append(("current", self.tensor))

        def __exit__(self, *error):
            events.append("as before")

    monkeypatch.setattr(torch.cuda, "device_of", Current)
    forward = model.model.forward

    def noted(*given, **heads):
        events.append("model")
        return forward(*given, **heads)

    monkeypatch.setattr(model.model, "forward", noted)
    model.score(CONVERSATIONS[0])
    assert events == [("current", model.model.reward_head.weight), "model", "as before"]


def test_an_amd_gpu_is_refused_by_name(final, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    with pytest.raises(UserError, match="on which hafrm_ds has never run"):
        HybridRewardModel.from_pretrained(final, device="cuda")


def test_answers_of_one_prompt_share_it(model):
    ids = [model.encode(conversation) for conversation in CONVERSATIONS]
    groups, places = share_prompts(ids)
    assert places == [0, 2, 4, 6, 1, 3, 5, 7]
    assert [len(group.responses) for group in groups] == [4, 4]
    assert split_groups(groups, "shared_prefix", 1000) == groups
    assert split_groups(groups, "padded", 1000) == [ids[place] for place in places]


def test_answers_that_exceed_the_budget_have_their_prompt_again():
    group = PromptWithResponses([1, 2, 3], ([4] * 5,) * 5)
    items = split_groups([group, group], "shared_prefix", 13)
    assert [len(item.responses) for item in items] == [2, 2, 1] * 2
    assert {tuple(item.prompt) for item in items} == {(1, 2, 3)}


def test_a_small_budget_changes_no_value(final, model):
    longest = max(model.encode(each).longest_conversation for each in CONVERSATIONS)
    narrow = HybridRewardModel.from_pretrained(final, max_tokens=longest)
    assert narrow.score(CONVERSATIONS) == pytest.approx(model.score(CONVERSATIONS), abs=1e-5)
    with pytest.raises(DataError, match=rf"has {longest} tokens, more than max_tokens \({longest - 1}\)"):
        HybridRewardModel.from_pretrained(final, max_tokens=longest - 1).score(CONVERSATIONS)


def test_log_probs_are_those_of_training(model):
    """The same split of prompt and response, the same sum, in the same network."""
    question, (chosen, rejected) = QUESTIONS[0], ANSWERS[:2]
    messages = [[{"role": "assistant", "content": answer}] for answer in (chosen, rejected)]
    pair = tokenize_pair(model.formatter, question, *messages, max_length=100, truncation="drop").ids
    with torch.no_grad():
        expected = model.model(lay_out([pair], "shared_prefix"))
    assert model.log_probs(question, [chosen, rejected]) == pytest.approx(expected.logprob.tolist(), abs=1e-4)
    assert model.score(question, [chosen, rejected]) == pytest.approx(expected.reward.tolist(), abs=1e-5)
    per_token = model.log_probs(question, [chosen, rejected], per_token=True)
    assert [len(tokens) for tokens in per_token] == [len(response) for response in pair.responses]
    assert [sum(tokens) for tokens in per_token] == pytest.approx(expected.logprob.tolist(), abs=1e-4)


def test_what_has_no_value_is_named(model):
    with pytest.raises(DataError, match="a conversation of two messages at least"):
        model.log_probs([QUESTIONS[0]])
    with pytest.raises(DataError, match="responses belong to one conversation"):
        model.score(CONVERSATIONS, ["Because."])
    with pytest.raises(DataError, match=r"more than the positions that the model knows \(512\)"):
        model.score(answered(QUESTIONS[0], "a" * 600))
    with pytest.raises(DataError, match="the conversation has no message"):
        model.score([[]])


def test_messages_are_read_as_those_of_a_file_are(model):
    """Other names of roles, contents in parts and reasoning beside them would else be rendered as they stand."""
    expected = model.score(answered(QUESTIONS[0], "Because."))
    parts = [{"type": "text", "text": "Why"}, {"type": "text", "text": "?"}]
    for question in ({"role": "human", "content": "Why?"}, {"from": "human", "value": "Why?"}, QUESTIONS[0][0]):
        for content in ("Because.", [{"type": "text", "text": "Because."}]):
            assert model.score([question, {"role": "gpt", "content": content}]) == pytest.approx(expected, abs=1e-5)
    assert model.score([{"role": "user", "content": parts}], ["Because."]) == [pytest.approx(expected, abs=1e-5)]
    thought = {"role": "assistant", "content": "Because.", "reasoning_content": "Hm."}
    assert model.score([*QUESTIONS[0], thought]) == pytest.approx(
        model.score(answered(QUESTIONS[0], "<think>\nHm.\n</think>\n\nBecause.")), abs=1e-5
    )


@pytest.mark.parametrize(
    ("messages", "responses", "fault"),
    [
        ("Why?", None, "`messages` is the text 'Why\\?', expected a list of messages"),
        (QUESTIONS[0][0], None, "`messages` is an object with the keys role, content"),
        (["Why?"], None, "the conversation: field 'messages' is the text"),
        ([{"role": "user"}], None, "the conversation: message 1 of field 'messages' is an object with the keys role"),
        ([QUESTIONS[0], [{"role": "user", "content": None}]], None, "conversation 2: content of message 1"),
        (QUESTIONS[0], "Because.", "`responses` is the text 'Because.', expected a list of answers"),
        (QUESTIONS[0], ["half \ud83d"], "half of a surrogate pair"),
        (QUESTIONS[0], [None], "content of message 2 of field 'messages' is null"),
        (
            [*QUESTIONS[0], {"role": "assistant", "content": "", "tool_calls": [{"name": "find", "arguments": {}}]}],
            None,
            "leaves out tool calls",
        ),
    ],
)
def test_what_is_no_conversation_is_named(messages, responses, fault, model):
    for ask in (model.score, model.rate, model.log_probs):
        with pytest.raises(DataError, match=fault):
            ask(messages, responses)


def test_dtype_is_that_of_the_weights_unless_given(tmp_path):
    final = save_tiny_final(tmp_path / "final", dtype=torch.bfloat16, bias=True)
    kept, widened = (HybridRewardModel.from_pretrained(final, dtype=dtype).model for dtype in (None, "float32"))
    assert {parameter.dtype for parameter in kept.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in widened.parameters()} == {torch.float32}
    assert kept.reward_head.bias is not None
    assert not kept.training
    assert torch.equal(kept.reward_head.weight.float(), widened.reward_head.weight)


def test_a_conversation_that_the_template_refuses_is_named(tmp_path):
    template = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    final = save_tiny_final(tmp_path / "final", chat_template=template + "{{ m['content'] }}{% endfor %}")
    model = HybridRewardModel.from_pretrained(final)
    with pytest.raises(DataError, match="the template refuses the conversation: no system"):
        model.score([{"role": "system", "content": "Be brief."}, *QUESTIONS[0]])


@pytest.fixture
def copied(final, tmp_path):
    return shutil.copytree(final, tmp_path / "final")


def test_another_template_or_tokenizer_is_refused(copied):
    template = copied / "chat_template.jinja"
    template.write_text(template.read_text().replace("':'", "': '"))
    with pytest.raises(ModelError, match="not the one that the model was trained with"):
        HybridRewardModel.from_pretrained(copied)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("hafrm.json", "has no hafrm.json: it is no final/ folder"),
        ("reward_head.safetensors", "reward head .* cannot be"),
    ],
)
def test_a_folder_that_is_no_trained_model_is_refused(copied, file, message):
    (copied / file).unlink()
    with pytest.raises(ModelError, match=message):
        HybridRewardModel.from_pretrained(copied)


def test_a_head_of_another_size_is_refused(copied):
    wide = save_tiny_final(copied.parent / "wide", family="llama-tied")
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1, 8)}, wide / "reward_head.safetensors")
    with pytest.raises(ModelError, match=r"reward_head.safetensors does not fit the model"):
        HybridRewardModel.from_pretrained(wide)


def test_pickles_are_read_on_demand_alone(copied, model):
    (copied / "model.safetensors").unlink()
    weights = {name: value for name, value in model.model.causal_lm.state_dict().items() if name != "lm_head.weight"}
    torch.save(weights, copied / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"as pickles \(pytorch_model.bin\).*trust_pickle"):
        HybridRewardModel.from_pretrained(copied)
    trusted = HybridRewardModel.from_pretrained(copied, trust_pickle=True)
    assert trusted.score(CONVERSATIONS) == model.score(CONVERSATIONS)
    # An index may name what it likes, and other safetensors beside it change nothing.
    shutil.copy(copied / "reward_head.safetensors", copied / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "pytorch_model.bin")}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"as pickles \(pytorch_model.bin\)"):
        HybridRewardModel.from_pretrained(copied)


def test_the_layout_of_the_training_is_used(copied):
    file = copied / "hafrm.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layout": "padded"}))
    model = HybridRewardModel.from_pretrained(copied)
    assert model.model.causal_lm.config._attn_implementation == "sdpa"
    assert model.score(CONVERSATIONS) == pytest.approx([model.score(each) for each in CONVERSATIONS], abs=1e-5)


def test_importing_is_cheap_and_loading_needs_no_deepspeed(final):
    code = (
        "import sys, hafrm_ds\n"
        "assert 'torch' not in sys.modules\n"
        f"hafrm_ds.HybridRewardModel.from_pretrained({str(final)!r})\n"
        "assert 'deepspeed' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
