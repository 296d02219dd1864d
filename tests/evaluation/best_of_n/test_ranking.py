"""The job of best-of-N: its files, its stages stopped and started again, its sampling, and what it refuses."""

import dataclasses
import json
import random
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hafrm_ds import HybridRewardModel
from hafrm_ds.data.pairs import assistant, user
from hafrm_ds.errors import ConfigError, DataError, ModelError, UserError
from hafrm_ds.evaluation.best_of_n import ranking, sampling
from hafrm_ds.evaluation.best_of_n.options import RankingOptions, SamplingOptions
from hafrm_ds.evaluation.best_of_n.ranking import rank, read_candidates
from hafrm_ds.evaluation.best_of_n.sampling import SamplingJob
from hafrm_ds.generation import samplers
from hafrm_ds.generation.prompts import LEFT_OUT, TOO_LONG
from hafrm_ds.generation.samplers import Answer
from hafrm_ds.options import read
from hafrm_ds.processes import parts
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.opening import load_scorer, open_model
from tests.tiny_models import save_tiny_final, save_tiny_model

NUM_PROMPTS = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Reward models one/ and two/, policy/, candidates.jsonl with gold scores, and prompts.jsonl."""
    folder = tmp_path_factory.mktemp("best_of_n")
    save_tiny_final(folder / "one")
    save_tiny_final(folder / "two", "qwen2")
    save_tiny_model(folder / "policy")
    source = random.Random(0)

    def text() -> str:
        return "".join(source.choice("abc ") for _ in range(source.randrange(1, 30))) + "x"

    candidates = [
        {"prompt": text(), "responses": [text() for _ in range(3)], "gold": [source.random() for _ in range(3)]}
        for _ in range(NUM_PROMPTS)
    ]
    prompts = [{"id": number, "prompt": [{"role": "user", "content": text()}]} for number in range(NUM_PROMPTS)]
    for name, rows in (("candidates", candidates), ("prompts", prompts)):
        write(folder / f"{name}.jsonl", rows)
    return folder


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def alone() -> Processes:
    return Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore())


def from_candidates(folder, output, **changes) -> RankingOptions:
    models = [str(folder / "one"), str(folder / "two")]
    return RankingOptions(
        **{"model": models, "output_dir": output, "candidates": folder / "candidates.jsonl"} | changes
    )


def by_sampling(folder, output, **changes) -> RankingOptions:
    given = {"num_candidates": 3, "max_new_tokens": 6} | changes
    options = SamplingOptions(prompts=folder / "prompts.jsonl", policy=str(folder / "policy"), **given)
    return RankingOptions(model=[str(folder / "one")], output_dir=output, sampling=options, gold=str(folder / "two"))


def contents(output: Path) -> dict[str, bytes]:
    return {str(file.relative_to(output)): file.read_bytes() for file in output.rglob("*") if file.is_file()}


def test_candidates_are_ranked_by_each_model(folder, tmp_path):
    assert rank(from_candidates(folder, tmp_path / "out"), alone()) == 0
    ranked = lines(tmp_path / "out" / "ranked.jsonl")
    assert len(ranked) == 2 * NUM_PROMPTS
    for number, row in enumerate(lines(folder / "candidates.jsonl")):
        question = [{"role": "user", "content": row["prompt"]}]
        for name, found in zip(("one", "two"), ranked[2 * number :]):
            assert found["model"] == str(folder / name) and found["prompt"] == row["prompt"]
            scores = HybridRewardModel.from_pretrained(folder / name).score(question, row["responses"])
            expected = sorted(zip(scores, row["responses"], row["gold"]), reverse=True)
            assert [each["score"] for each in found["candidates"]] == pytest.approx([e[0] for e in expected], abs=1e-5)
            assert [(each["response"], each["gold"]) for each in found["candidates"]] == [e[1:] for e in expected]
            assert [each["rank"] for each in found["candidates"]] == [1, 2, 3] and found["pick"] == expected[0][1]
    results = json.loads((tmp_path / "out" / "best_of_n.json").read_text())
    picks = [row["candidates"][0]["gold"] for row in ranked[::2]]
    assert results["results"]["models"][str(folder / "one")]["pick"]["value"] == pytest.approx(sum(picks) / NUM_PROMPTS)
    assert (results["prompts"], results["gold"]) == (NUM_PROMPTS, "field gold")


def test_a_model_without_a_reward_head_ranks_by_its_implicit_reward(folder, tmp_path):
    dpo = save_tiny_final(tmp_path / "dpo", "llama", base="nowhere", objective={"rm_weight": 0.0, "beta": 0.5})
    models = [str(dpo), str(folder / "one")]
    options = from_candidates(folder, tmp_path / "out", model=models, reference=str(folder / "policy"))
    assert rank(options, alone()) == 0
    policy, reference = (load_scorer(open_model(each), torch.device("cpu"), 2000) for each in (dpo, folder / "policy"))
    ranked = lines(tmp_path / "out" / "ranked.jsonl")
    assert {row["model"] for row in ranked[1::2]} == {str(folder / "one")}
    for row, found in zip(lines(folder / "candidates.jsonl"), ranked[::2], strict=True):
        ids = [policy.encode([user(row["prompt"]), assistant(response)]) for response in row["responses"]]
        logprobs = [model.values(ids, ("logprob",))[:, 0] for model in (policy, reference)]
        expected = dict(zip(row["responses"], 0.5 * (logprobs[0] - logprobs[1])))
        assert found["pick"] == max(expected, key=expected.get)
        for candidate in found["candidates"]:
            assert candidate["score"] == pytest.approx(expected[candidate["response"]], abs=1e-4)


def test_answers_of_the_same_score_share_a_rank_and_keep_their_order():
    fields = {"id": 1, "prompt": "p", "responses": ["a", "b", "c"]}
    found = ranking.RankedPrompt(fields, {"m": np.array([1.0, 2.0, 2.0])}, None).ranking("m")
    assert [(each["response"], each["rank"]) for each in found["candidates"]] == [("b", 1), ("c", 1), ("a", 3)]


def test_an_answer_that_cannot_be_scored_costs_its_prompt(folder, tmp_path, capsys):
    rows = lines(folder / "candidates.jsonl")
    rows[2]["responses"][1] = "x" * 600  # the tiny models know 512 positions
    write(tmp_path / "in.jsonl", rows)
    assert rank(from_candidates(folder, tmp_path / "out", candidates=tmp_path / "in.jsonl"), alone()) == 1
    results = json.loads((tmp_path / "out" / "best_of_n.json").read_text())
    assert (results["prompts"], results["prompts_not_scored"]) == (NUM_PROMPTS - 1, 1)
    assert len(lines(tmp_path / "out" / "ranked.jsonl")) == 2 * (NUM_PROMPTS - 1)
    assert "candidates.jsonl:3: the conversation has" in capsys.readouterr().out


# ---- stages --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled(folder, tmp_path_factory) -> Path:
    """The output of a sampling job that was never stopped, in parts of 2 prompts."""
    output = tmp_path_factory.mktemp("sampled") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "PART", 2)
        assert rank(by_sampling(folder, output), alone()) == 0
    return output


def test_stopped_again_and_again_the_files_are_those_of_a_job_that_was_not(folder, tmp_path, sampled, monkeypatch):
    monkeypatch.setattr(sampling, "PART", 2)
    written, whole = [], parts.write_whole

    def stops_at_the_fourth(file, content):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(file)
        whole(file, content)

    for module in (parts, sampling, ranking):
        monkeypatch.setattr(module, "write_whole", stops_at_the_fourth)
    stops = 0
    while not (tmp_path / "out" / "best_of_n.json").exists():
        written.clear()
        try:
            rank(by_sampling(folder, tmp_path / "out"), alone())
        except KeyboardInterrupt:
            stops += 1
            assert written[1:], "nothing was added to what the last start had left"
    assert stops > 3
    assert contents(tmp_path / "out") == contents(sampled)
    assert sorted(contents(sampled)) == [
        "best_of_n.json", "candidates.jsonl", "gold.jsonl", "job.json", "ranked.jsonl", "sampling.json",
        "scores-1.jsonl",
    ]  # fmt: skip


def test_a_finished_job_computes_nothing_again(folder, sampled, monkeypatch):
    before = contents(sampled)
    monkeypatch.setattr(ranking, "score_file", None)
    monkeypatch.setattr(SamplingJob, "sample", None)
    rank(by_sampling(folder, sampled), alone())
    assert contents(sampled) == before


def test_another_job_does_not_take_the_folder(folder, sampled):
    with pytest.raises(DataError, match="with another model, input or setting"):
        rank(by_sampling(folder, sampled, seed=1), alone())


# ---- sampling ------------------------------------------------------------------------------------------------------


def test_sampled_candidates_that_are_given_keep_what_ended_them(sampled, folder, tmp_path):
    """The README says how another model is tried on them."""
    file = sampled / "candidates.jsonl"
    assert read_candidates(file) == lines(file)
    rank(from_candidates(folder, tmp_path / "out", candidates=file), alone())
    assert all("ended" in each for row in lines(tmp_path / "out" / "ranked.jsonl") for each in row["candidates"])
    foreign = write(tmp_path / "in.jsonl", [GOOD | {"ended": "yes"}, GOOD | {"ended": [True]}])
    assert [sorted(row) for row in read_candidates(foreign)] == [["id", "prompt", "responses"]] * 2


def test_every_prompt_has_different_answers_under_its_own_seed(folder, sampled, tmp_path):
    rows = lines(sampled / "candidates.jsonl")
    assert [row["id"] for row in rows] == list(range(NUM_PROMPTS))
    assert all(len(set(row["responses"])) == 3 and len(row["ended"]) == 3 for row in rows)
    fewer = write(tmp_path / "fewer.jsonl", lines(folder / "prompts.jsonl")[:3])
    options = by_sampling(folder, tmp_path / "out")
    changed = options.sampling.model_copy(update={"prompts": fewer})
    options = options.model_copy(update={"sampling": changed})
    rank(options, alone())
    assert lines(tmp_path / "out" / "candidates.jsonl") == rows[:3]


def test_prompts_without_n_answers_are_dropped_after_2n_draws(folder, tmp_path, monkeypatch):
    """The first prompt gets two answers in six draws, the others a third one in the second attempt."""
    job = SamplingJob.open(by_sampling(folder, tmp_path).sampling)
    asked = []

    class Stingy:
        def answers(self, requests):
            asked.append(len(requests))
            third = "a" if len(asked) == 1 else "c"
            return [[Answer(" a", True, []), Answer("b", False, []), Answer("" if k == 0 else third, True, [])]
                    for k, _ in enumerate(requests)]  # fmt: skip

    rows = [json.loads(line) for line in job.sample_part(range(3), Stingy()).splitlines()]
    assert asked == [3, 3]
    assert rows[0]["dropped"] == sampling.TOO_FEW and "responses" not in rows[0]
    assert [row["responses"] for row in rows[1:]] == [["a", "b", "c"]] * 2
    assert rows[1]["ended"] == [True, False, True]


def test_prompts_that_the_policy_cannot_take_are_dropped(folder, tmp_path, capsys):
    prompts = write(tmp_path / "in.jsonl", [{"prompt": "short"}, {"prompt": "long" * 200}])
    options = by_sampling(folder, tmp_path / "out")
    changed = options.sampling.model_copy(update={"prompts": prompts})
    options = options.model_copy(update={"sampling": changed})
    rank(options, alone())
    assert [row["prompt"] for row in lines(tmp_path / "out" / "candidates.jsonl")] == ["short"]
    results = json.loads((tmp_path / "out" / "best_of_n.json").read_text())
    assert results["sampling"]["dropped"] == {TOO_LONG: 1}
    assert "1 of 2 prompts are dropped: longer than the policy takes" in capsys.readouterr().out


def sampling_of(folder, output, **changes) -> RankingOptions:
    """As by_sampling, with the prompts or the policy of a test."""
    options = by_sampling(folder, output)
    return options.model_copy(update={"sampling": options.sampling.model_copy(update=changes)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 50}, "token id .* is beyond the embedding of .*, which has 50 rows"),
        ({"max_position_embeddings": 8}, "no prompt of .* can be asked: longer than the policy takes"),
    ],
)
def test_a_policy_without_room_for_the_prompts_is_refused_before_it_is_loaded(
    folder, tmp_path, monkeypatch, changes, message
):
    policy = save_tiny_model(tmp_path / "policy")
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | changes))
    monkeypatch.setitem(samplers.SAMPLERS, "transformers", None)
    with pytest.raises(DataError, match=message):
        rank(sampling_of(folder, tmp_path / "out", policy=str(policy)), alone())
    assert not (tmp_path / "out").exists()


def test_a_prompt_of_which_the_policy_sees_a_part_is_dropped(folder, tmp_path):
    policy = save_tiny_model(
        tmp_path / "policy",
        chat_template="{% for m in messages if m.role != 'system' %}{{ m.content }}</s>{% endfor %}",
    )
    prompts = write(tmp_path / "in.jsonl", [{"prompt": "a", "system": "Be brief."}, {"prompt": "b"}])
    rank(sampling_of(folder, tmp_path / "out", policy=str(policy), prompts=prompts), alone())
    assert [row["prompt"] for row in lines(tmp_path / "out" / "candidates.jsonl")] == ["b"]
    results = json.loads((tmp_path / "out" / "best_of_n.json").read_text())
    assert results["sampling"]["dropped"] == {LEFT_OUT: 1}


# ---- tools ---------------------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "f", "description": "Finds."}}]
WITH_TOOLS = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for message in messages %}"
    "{{ 'tool' if message.role == 'tool' else message.role }}:{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}</s>{% endfor %}"
)


def test_tools_belong_to_a_prompt(folder, tmp_path):
    """They are rendered for the policy and for the reward models, or the prompt is dropped."""
    model = save_tiny_final(tmp_path / "model", chat_template=WITH_TOOLS)
    policy = save_tiny_model(tmp_path / "policy", chat_template=WITH_TOOLS)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 7}}}]}
    rows = [
        {"prompt": "a", "tools": TOOLS},
        {"prompt": [user("b"), call, {"role": "tool", "content": "8"}], "tools": json.dumps(TOOLS)},
    ]
    prompts = write(tmp_path / "in.jsonl", rows)
    options = sampling_of(folder, tmp_path / "out", policy=str(policy), prompts=prompts)
    options = options.model_copy(update={"model": [str(model)], "gold": None})
    assert rank(options, alone()) == 0
    scorer = HybridRewardModel.from_pretrained(model)
    ranked = lines(tmp_path / "out" / "ranked.jsonl")
    assert [row["prompt"][0] for row in ranked] == [user("a") | {"tools": TOOLS}, user("b") | {"tools": TOOLS}]
    assert '{"name": "f", "arguments": {"x": 7}}</s>tool:8</s>' in scorer.formatter.render(ranked[1]["prompt"])
    for row in ranked:
        scores = scorer.score(row["prompt"], [each["response"] for each in row["candidates"]])
        assert [each["score"] for each in row["candidates"]] == pytest.approx(scores, abs=1e-5)
    with pytest.raises(DataError, match=f"can be asked: {LEFT_OUT}"):
        rank(sampling_of(folder, tmp_path / "other", prompts=prompts), alone())

    given = write(tmp_path / "given.jsonl", [row | {"responses": ["x", [call | {"content": "y"}]]} for row in rows])
    candidates = read_candidates(given)
    assert [row["prompt"] for row in candidates] == [row["prompt"] for row in ranked]
    assert candidates[0].keys() == {"id", "prompt", "responses"}


@dataclasses.dataclass
class SamplingParams:
    """Fields of vLLM's that are used here, with its defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = 16
    seed: int | None = None


class LLM:
    """Stands in for vLLM's: its documented arguments, and results of its form."""

    def __init__(self, model: str, *, dtype: str = "auto", trust_remote_code: bool = False):
        assert Path(model).is_dir() and dtype == "float32"

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        assert len(prompts) == len(sampling_params)
        assert all(prompt.keys() == {"prompt_token_ids"} for prompt in prompts)
        assert all(each.top_p == 0.85 and each.max_tokens == 6 for each in sampling_params)
        assert all(0.5 <= each.temperature <= 1.2 for each in sampling_params)
        return [
            SimpleNamespace(
                outputs=[SimpleNamespace(text=f" {each.seed}", finish_reason=("stop", "length")[k % 2], token_ids=(k,))]
            )
            for k, each in enumerate(sampling_params)
        ]


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams, module.__spec__ = LLM, SamplingParams, ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", module)


def test_vllm_gets_every_draw_with_its_own_temperature_and_seed(folder, tmp_path, vllm):
    rank(by_sampling(folder, tmp_path / "out", sampler="vllm"), alone())
    rows = lines(tmp_path / "out" / "candidates.jsonl")
    assert len({answer for row in rows for answer in row["responses"]}) == 3 * NUM_PROMPTS
    assert [ended for row in rows for ended in row["ended"]] == [k % 2 == 0 for k in range(3 * NUM_PROMPTS)]


def test_vllm_is_refused_where_it_cannot_be_used(folder, tmp_path, request):
    with pytest.raises(ModelError, match="--sampler vllm needs vLLM"):
        rank(by_sampling(folder, tmp_path / "out", sampler="vllm"), alone())
    request.getfixturevalue("vllm")
    options = by_sampling(folder, tmp_path / "out", sampler="vllm")
    changed = options.sampling.model_copy(update={"policy": str(folder / "one")})
    options = options.model_copy(update={"sampling": changed})
    with pytest.raises(ModelError, match=r"launch/export\.py --format policy"):
        rank(options, alone())


# ---- what is refused -----------------------------------------------------------------------------------------------

GOOD = {"prompt": "p", "responses": ["a", "b"]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p"}], "in.jsonl:1: field 'responses' is missing"),
        ([GOOD, {**GOOD, "responses": "a"}], "in.jsonl:2: field 'responses' is the text 'a', expected a list"),
        ([{**GOOD, "responses": ["a"]}], "in.jsonl:1: field 'responses' has 1 answer; a best of N needs 2"),
        ([{**GOOD, "gold": [1, 2, 3]}], "in.jsonl:1: field 'gold' is a list of 3, expected a list of 2 numbers"),
        ([{**GOOD, "gold": [1, "high"]}], r"in.jsonl:1: field 'gold\[1\]' is the text 'high', expected a finite"),
        ([{**GOOD, "gold": [1, 2]}, GOOD], "in.jsonl:2: either all rows have a field 'gold' or none"),
        ([GOOD | {"context": "c"}], "in.jsonl:1: context: filled, but not read"),
        (
            [{"messages": [user("p"), assistant("a")], "responses": ["b"]}],
            "in.jsonl:1: field 'responses' is a list of 1, expected answers to a prompt, or to messages that end with",
        ),
        ([], "in.jsonl is empty"),
    ],
)
def test_candidates_with_a_fault_are_named_and_leave_nothing_behind(folder, tmp_path, rows, message):
    file = write(tmp_path / "in.jsonl", rows)
    with pytest.raises(DataError, match=message):
        rank(from_candidates(folder, tmp_path / "out", candidates=file), alone())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["candidates.jsonl", "scores-2.jsonl", "best_of_n.json"])
def test_a_file_of_somebody_else_is_neither_taken_for_the_job_s_nor_written(folder, tmp_path, name):
    file = write(tmp_path / name, [GOOD])
    given = file if name == "candidates.jsonl" else folder / "candidates.jsonl"
    with pytest.raises(DataError, match=f"{name} is there already, and not of this job"):
        rank(from_candidates(folder, tmp_path, candidates=given), alone())
    assert lines(file) == [GOOD] and [each.name for each in tmp_path.iterdir()] == [name]


def test_what_stands_before_a_prompt_is_part_of_it(tmp_path):
    system = {"role": "system", "content": "s"}
    rows = [GOOD | {"system": "s"}, {"prompt": None, "messages": [user("p")], "responses": ["a", "b"]}, GOOD]
    kept = read_candidates(write(tmp_path / "in.jsonl", rows))
    assert [row["prompt"] for row in kept] == [[system, user("p")], [user("p")], "p"]


def test_files_and_models_that_are_not_there_are_named(folder, tmp_path):
    def refusal(options: RankingOptions) -> str:
        with pytest.raises(UserError) as error:
            rank(options, alone())
        return str(error.value)

    missing = from_candidates(folder, tmp_path / "out", candidates=tmp_path / "none.jsonl")
    assert "none.jsonl: cannot be read: No such file" in refusal(missing)
    options = by_sampling(folder, tmp_path / "out")
    for changes, message in (
        ({"policy": str(tmp_path / "nobody")}, "nobody' is no local folder"),
        ({"prompts": tmp_path / "none.jsonl"}, "none.jsonl: cannot be read"),
    ):
        changed = options.sampling.model_copy(update=changes)
        assert message in refusal(options.model_copy(update={"sampling": changed}))
    save_tiny_model(tmp_path / "bare", chat_template=None)
    changed = options.sampling.model_copy(update={"policy": str(tmp_path / "bare")})
    assert "--policy_chat_template takes a name" in refusal(options.model_copy(update={"sampling": changed}))
    without = str(folder / "policy")
    assert "policy: the model has no reward head" in refusal(options.model_copy(update={"gold": without}))
    assert "for models without a reward head" in refusal(options.model_copy(update={"reference": "base"}))
    assert not (tmp_path / "out").exists()


def test_all_options_that_make_no_sense_are_named_at_once():
    def problems(*words: str) -> list[str]:
        short = {name: f"sampling.{name}" for name in SamplingOptions.model_fields}
        with pytest.raises(ConfigError) as error:
            read(RankingOptions, ["--output_dir", "o", *words], short=short)
        return error.value.problems

    sampled = ["--prompts", "p.jsonl", "--policy", "p"]
    wrong = ["--num_candidates=1", "--temperature", "0", "1", "--top_p=0", "--max_new_tokens=0", "--model", "a", "a"]
    assert [problem.split(" ")[0] for problem in problems(*sampled, *wrong)] == [
        "num_candidates:", "temperature.0:", "top_p:", "max_new_tokens:", "--model",
    ]  # fmt: skip
    assert problems("--model", "a", "--temperature", "1", "0.5", *sampled) == [
        "--temperature 1.0 0.5: the lower of the two comes first"
    ]
    assert problems("--model", "a", "--policy", "p") == ["prompts: is required and was not given"]
    assert problems("--model", "a") == ["give --candidates FILE, or --prompts FILE with --policy MODEL"]
    (both,) = problems("--model", "a", "--candidates", "c.jsonl", *sampled)
    assert both.endswith("so nothing is sampled: leave out --prompts, --policy")
