"""Who draws the answers where the user has not said, and what transformers draws."""

from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hafrm_ds.errors import ModelError
from hafrm_ds.evaluation.best_of_n.options import SamplingOptions
from hafrm_ds.evaluation.best_of_n.sampling import request_for
from hafrm_ds.generation import samplers
from hafrm_ds.generation.samplers import (
    GREEDY,
    Answer,
    DrawOfEachRow,
    Request,
    TransformersSampler,
    choose_sampler,
    one_each,
)
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.opening import open_model
from tests.tiny_models import save_tiny_final, save_tiny_model

TEXTS = ["abc", "a much longer prompt than the others", "d", "what? " * 5]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return open_model(save_tiny_model(tmp_path_factory.mktemp("policy"), "gpt-neox"))


def sampler_of(policy, **how) -> TransformersSampler:
    processes = Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore())
    return TransformersSampler(policy, policy.formatter(), processes, **{"max_new_tokens": 12} | how)


def ids_of(policy, text: str) -> list[int]:
    return policy.formatter().encode_prompt([{"role": "user", "content": text}])


def most_probable(sampler: TransformersSampler, prompt: list[int], steps: int) -> Answer:
    """One forward a token, without a cache."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat([ids, sampler.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return sampler.read(ids[0, len(prompt) :].tolist())


@pytest.mark.parametrize("top_p", [1.0, 0.7, 1e-3])
def test_tokens_are_drawn_as_often_as_they_are_probable(top_p):
    """With evenly spaced random numbers, exactly: against the nucleus by its definition in NumPy."""
    draws, temperatures = 20_000, torch.tensor([0.5, 1.2])
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 50)).astype(np.float32) * 2)
    numbers = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    step = DrawOfEachRow(temperatures, numbers.expand(2, draws), top_p)
    drawn = torch.stack([step(torch.empty(2, 0), logits).argmax(-1) for _ in range(draws)], dim=1).numpy()
    for row, temperature in enumerate(temperatures.tolist()):
        wanted = np.exp(logits[row].numpy().astype(np.float64) / temperature)
        wanted /= wanted.sum()
        best_first = np.argsort(-wanted)
        kept = best_first[: np.searchsorted(wanted[best_first].cumsum(), top_p) + 1]
        nucleus = np.zeros(50)
        nucleus[kept] = wanted[kept] / wanted[kept].sum()
        assert np.abs(np.bincount(drawn[row], minlength=50) / draws - nucleus).max() < 1.5 / draws


def test_a_nucleus_is_the_same_wherever_it_is_looked_for(monkeypatch):
    """Its tokens lie among the first FEW or not, and some are as probable as its last."""
    logits = torch.randn(3, 80, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.1], [1.0], [6.0]])
    logits[2, :4] = 60.0
    numbers = torch.linspace(0, 0.999, 500, dtype=torch.float64).expand(3, 500)

    def drawn(few: int, rows: slice = slice(None)) -> torch.Tensor:
        monkeypatch.setattr(samplers, "FEW", few)
        step = DrawOfEachRow(torch.ones(3)[rows], numbers[rows], 0.5)
        return torch.stack([step(torch.empty(3, 0), logits[rows]).argmax(-1) for _ in range(500)])

    expected = drawn(1024)
    assert [len(set(row)) for row in expected.T.tolist()][2] == 4
    for few in (1, 5, 79, 80):
        assert torch.equal(drawn(few), expected)
    assert torch.equal(drawn(5, slice(2, 3)), expected[:, 2:])


def test_a_row_without_a_temperature_is_greedy_among_others():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    step = DrawOfEachRow(torch.tensor([GREEDY, 5.0, GREEDY]), torch.full((3, 1), 0.9, dtype=torch.float64), 1.0)
    drawn = step(torch.empty(3, 0), logits)
    assert (drawn.isfinite().sum(-1) == 1).all()
    same = drawn.argmax(-1) == logits.argmax(-1)
    assert same.tolist() == [True, False, True]


def test_each_draw_has_its_own_temperature(policy):
    sampler, prompt = sampler_of(policy, max_new_tokens=5), ids_of(policy, "abc")
    best = most_probable(sampler, prompt, 5)
    for seed in range(3):
        [answers] = sampler.answers([Request(prompt, (1e-4, 3.0, GREEDY, 3.0), seed)])
        assert answers[0] == answers[2] == best
        assert best not in (answers[1], answers[3]) and answers[1] != answers[3]
    options = SamplingOptions(prompts=Path("unused"), policy="unused")
    drawn = [request_for(prompt, number, 0, options) for number in range(200)]
    temperatures = [each for request in drawn for each in request.temperatures]
    assert 0.5 <= min(temperatures) < 0.51 and 1.19 < max(temperatures) <= 1.2
    assert len({request.seed for request in drawn}) == 200


@pytest.mark.parametrize("rows", [64, 5, 1])
def test_what_is_drawn_together_is_what_is_drawn_alone(policy, monkeypatch, rows):
    monkeypatch.setattr(samplers, "ROWS", rows)
    sampler = sampler_of(policy, top_p=0.9)
    requests = [Request(ids_of(policy, text), (0.7, 1.0, 1.5)[: place + 1], place) for place, text in enumerate(TEXTS)]
    alone = [sampler.answers([request])[0] for request in requests]
    assert [len(each) for each in alone] == [1, 2, 3, 3]
    assert len({answer.text for each in alone for answer in each}) == 9
    assert sampler.answers(requests) == alone
    assert sampler.answers(requests[::-1]) == alone[::-1]
    more = requests[0]._replace(temperatures=(0.7, 2.0))
    assert sampler.answers([more])[0][:1] == alone[0]  # a draw does not depend on those after it either


def test_where_memory_does_not_last_fewer_are_drawn_at_once(policy, monkeypatch):
    sampler = sampler_of(policy)
    requests = [Request(ids_of(policy, text), (1.0, 1.0), place) for place, text in enumerate(TEXTS)]
    expected = sampler.answers(requests)
    draw, asked = sampler.draw, []

    def full(draws):
        asked.append(len(draws))
        if len(draws) > 3:
            raise torch.OutOfMemoryError
        return draw(draws)

    monkeypatch.setattr(sampler, "draw", full)
    assert sampler.answers(requests) == expected
    assert asked == [8, 4, 2, 2, 2, 2]
    asked.clear()
    assert sampler.answers(requests[:1]) == expected[:1] and asked == [2]  # it has learned how many
    monkeypatch.setattr(sampler, "draw", lambda draws: full([None] * 4))
    with pytest.raises(torch.OutOfMemoryError):
        sampler.answers(requests)


def test_one_answer_to_each_of_many_prompts(policy):
    sampler = sampler_of(policy)
    prompts = [ids_of(policy, text) for text in TEXTS]
    greedy = one_each(sampler, prompts)
    assert greedy == [most_probable(sampler, prompt, 12) for prompt in prompts]
    assert len({answer.text for answer in greedy}) > 1
    assert one_each(sampler, prompts, temperature=1e-4, seed=5) == greedy
    drawn = one_each(sampler, prompts, temperature=1.0, seed=5)
    assert drawn != greedy and drawn == one_each(sampler, prompts, temperature=1.0, seed=5)
    assert drawn != one_each(sampler, prompts, temperature=1.0, seed=6)
    assert one_each(sampler, prompts[1:], temperature=1.0, seed=6) == drawn[1:]
    assert one_each(sampler, []) == []


def test_an_answer_ends_at_the_first_stop_token(policy):
    sampler, tokenizer = sampler_of(policy), policy.formatter().tokenizer
    text, end = tokenizer(" ab")["input_ids"], tokenizer.eos_token_id
    assert sampler.read([*text, end, *text]) == Answer(" ab", True, [*text, end])
    assert sampler.read(text) == Answer(" ab", False, text)


def test_what_vllm_cannot_load_is_drawn_from_by_transformers(tmp_path, monkeypatch):
    plain, final = open_model(save_tiny_model(tmp_path / "plain")), open_model(save_tiny_final(tmp_path / "final"))
    assert choose_sampler("auto", plain) == "transformers"
    monkeypatch.setattr(samplers.importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr(samplers.torch.cuda, "is_available", lambda: True)
    assert choose_sampler("auto", plain) == "vllm"
    assert choose_sampler("auto", final) == "transformers"
    with pytest.raises(ModelError, match=r"vLLM cannot load .*final, which has a reward head beside the policy"):
        choose_sampler("vllm", final)
