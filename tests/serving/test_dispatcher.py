"""Which questions go through together."""

import asyncio
import contextlib
from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as some

from hafrm_ds.data.pairs import assistant, user
from hafrm_ds.serving.dispatcher import Dispatcher, Waiting, choose
from hafrm_ds.serving.options import ServingOptions
from hafrm_ds.serving.rendered import Rendered
from hafrm_ds.serving.worker import Question


def waiting(*prompts_and_answers, kind="score", rendered=False):
    def item(prompt, answer):
        return Rendered(prompt + answer, prompt) if rendered else [user(prompt), assistant(answer)]

    loop = asyncio.new_event_loop()
    return [Waiting.of(Question(kind, item(*each)), loop.create_future()) for each in prompts_and_answers]


def answers(chosen):
    return [each.question.item[-1]["content"] for each in chosen]


def test_answers_to_the_prompt_that_has_waited_longest_go_first():
    queue = waiting(("a", "1"), ("b", "2"), ("c", "3"), ("a", "4"), ("b", "5"))
    batch, rest = choose(queue, queue[0].shared + queue[1].shared + 3)
    assert answers(batch) == ["1", "4", "2"] and answers(rest) == ["3", "5"]
    batch, rest = choose(rest, 10_000)
    assert answers(batch) == ["3", "5"] and not rest


def test_a_prompt_counts_once_and_one_question_goes_at_least():
    queue = waiting(("long " * 100, "x"), ("long " * 100, "y"), ("long " * 100, "z"), rendered=True)
    assert [len(choose(queue, budget)[0]) for budget in (0, 502, 503, 2000)] == [1, 2, 3, 3]


def test_who_has_left_is_not_asked_about():
    queue = waiting(("a", "1"), ("a", "2"), ("b", "3"))
    queue[0].answer.cancel()
    batch, rest = choose(queue, queue[0].shared + 1)
    assert answers(batch) == ["2"] and answers(rest) == ["3"]


def test_who_has_left_takes_up_no_room_in_the_queue():
    """As while the reward is loaded: clients that give up and come again would fill it."""

    async def come_and_go() -> int:
        dispatcher = Dispatcher(ServingOptions(model=Path("model"), max_queue=2), 1, print)
        for _ in range(3):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(dispatcher.ask("score", [[user("a"), assistant("b")]] * 2), 0.01)
        return len(dispatcher.queue)

    assert asyncio.run(come_and_go()) == 0


def test_texts_of_unknown_prompts_share_nothing():
    loop = asyncio.new_event_loop()
    texts = ["one", "two"]
    queue = [Waiting.of(Question("score", Rendered(text, "")), loop.create_future()) for text in texts]
    assert len({each.prompt for each in queue}) == 2


@given(
    some.lists(some.tuples(some.sampled_from("abc"), some.sampled_from(["", "x", "xxxx"])), max_size=30), some.data()
)
def test_nothing_is_lost_and_nobody_waits_for_ever(asked, data):
    """Each batch takes the one that has waited longest; all are taken once."""
    queue, taken = waiting(*asked, rendered=True), []
    while queue:
        oldest = queue[0]
        batch, queue = choose(queue, data.draw(some.integers(0, 20)))
        assert oldest in batch
        taken += batch
    assert Counter(map(id, taken)) == Counter(map(id, set(taken))) and len(taken) == len(asked)
