"""A conversation scores the same through our path and through the stock class on the stock rendering.

AutoModelForSequenceClassification reads the reward at the rightmost token that is not the pad token. Where a text ends
in eos and pad = eos, that is one token too early: so an exported model needs a pad token that ends no text.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.packing import lay_out
from hafrm_ds.model.hybrid import HybridModel, make_reward_head
from tests.tiny_models import tiny_causal_lm, use_layout
from tests.tiny_tokenizers import byte_level_tokenizer, tokenize_pair

ENDS_IN_EOS = (
    "{% for message in messages %}{{ message['role'] + ':' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
ENDS_IN_NEWLINE = ENDS_IN_EOS.replace("eos_token }}", "eos_token + '\\n' }}")
TEMPLATES = {"ends in eos": ENDS_IN_EOS, "ends in a newline after eos": ENDS_IN_NEWLINE}

QUESTION = [{"role": "user", "content": "Why?"}]
CHOSEN = [{"role": "assistant", "content": " Because."}]
REJECTED = [{"role": "assistant", "content": " It rains, and nobody knows why."}]
CONVERSATIONS = [QUESTION + CHOSEN, QUESTION + REJECTED]


@pytest.fixture(params=TEMPLATES)
def folder(request, tmp_path):
    """A tiny Llama whose tokenizer has pad = eos, as a user would find it."""
    tokenizer = byte_level_tokenizer(TEMPLATES[request.param], pad_token="</s>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    tokenizer.save_pretrained(tmp_path)
    tiny_causal_lm("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    return tmp_path


def reward_head() -> torch.nn.Linear:
    return make_reward_head(32, bias=False, init="normal", dtype=torch.float32, seed=0)


def our_scores(folder, layout: str) -> torch.Tensor:
    formatter = ChatFormatter.create(AutoTokenizer.from_pretrained(folder), None, "2024-07-26")
    ids = tokenize_pair(formatter, QUESTION, CHOSEN, REJECTED, max_length=128, truncation="drop").ids
    model = HybridModel(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), reward_head()).eval()
    use_layout(model, layout)
    with torch.no_grad():
        batch = lay_out([ids], layout)
        return model(batch, with_logprob=False).reward


def stock_classifier(folder, pad_token_id: int):
    classifier = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, pad_token_id=pad_token_id, dtype=torch.float32
    )
    with torch.no_grad():
        classifier.score.weight.copy_(reward_head().weight)
    return classifier.eval()


def rendered(tokenizer, conversation) -> torch.Tensor:
    return tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)["input_ids"]


@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
def test_our_score_is_the_stock_score(folder, layout):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<|im_start|>"  # ends no text
    classifier = stock_classifier(folder, tokenizer.pad_token_id)
    with torch.no_grad():
        alone = [classifier(rendered(tokenizer, conversation)).logits for conversation in CONVERSATIONS]
        padded = tokenizer.apply_chat_template(CONVERSATIONS, padding=True, return_tensors="pt", return_dict=True)
        assert (padded["attention_mask"] == 0).any()
        together = classifier(**padded).logits
    ours = our_scores(folder, layout)
    assert (ours[0] - ours[1]).abs() > 1e-2
    torch.testing.assert_close(ours, torch.cat(alone).squeeze(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, together.squeeze(1), rtol=0, atol=1e-5)


def test_with_pad_equal_to_eos_the_stock_class_reads_the_last_token_that_is_not_eos(folder):
    """One token early for a text that ends in eos, without any padding; the last token where a newline follows."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    classifier = stock_classifier(folder, tokenizer.eos_token_id)
    ours = our_scores(folder, "shared_prefix")
    for conversation, our_score in zip(CONVERSATIONS, ours, strict=True):
        ids = rendered(tokenizer, conversation)
        last = ids.shape[1] - 1
        ends_in_eos = ids[0, last] == tokenizer.eos_token_id
        assert ends_in_eos == (tokenizer.chat_template == ENDS_IN_EOS)
        read_out = last - 1 if ends_in_eos else last
        with torch.no_grad():
            score_at = classifier.score(classifier.model(ids).last_hidden_state)[0, :, 0]  # [tokens]
            stock_score = classifier(ids).logits.squeeze()
        torch.testing.assert_close(stock_score, score_at[read_out], rtol=0, atol=1e-5)
        torch.testing.assert_close(our_score, score_at[last], rtol=0, atol=1e-5)
        assert (score_at[last] - score_at[last - 1]).abs() > 1e-2
