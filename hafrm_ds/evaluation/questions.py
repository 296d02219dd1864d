"""Questions with several answers, as benchmarks have them, as token ids."""

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.pairs import Message
from hafrm_ds.data.tokenization import ConversationIds, tokenize_conversation
from hafrm_ds.errors import DataError


def encode_question(
    formatter: ChatFormatter, place: str, prompt: list[Message], responses: list[list[Message]], max_length: int
) -> tuple[list[ConversationIds], bool]:
    """-> (ids of each conversation, whether its prompt was cut).

    A conversation of more than `max_length` tokens loses the start of its prompt, as data.truncation keep_prompt_end
    does it: a leading BOS stays. All answers keep the same prompt, cut for the longest.

    Raises:
        DataError: naming `place`, for a conversation that cannot be rendered, or an answer that is too long by itself.
    """
    try:
        conversations = [tokenize_conversation(formatter, [*prompt, *response]) for response in responses]
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    excess = max(len(ids.prompt) + len(ids.response) for ids in conversations) - max_length
    if excess <= 0:
        return conversations, False
    has_bos = conversations[0].prompt[0] == formatter.tokenizer.bos_token_id
    kept = conversations[0].prompt[:1] if has_bos else []
    if excess > min(len(ids.prompt) for ids in conversations) - len(kept) - 1:
        raise DataError(
            f"{place}: an answer leaves no room for its prompt in {max_length:,} tokens, the least of --max_length, "
            "--max_tokens_per_micro_batch and the positions that the model knows"
        )
    return [ConversationIds([*kept, *ids.prompt[len(kept) + excess :]], ids.response) for ids in conversations], True
