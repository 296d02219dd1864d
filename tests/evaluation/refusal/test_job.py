"""A measurement of refusals from folders to files: planted models, every defence, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers

from hafrm_ds.data.pairs import user
from hafrm_ds.errors import ConfigError, DataError, ModelError
from hafrm_ds.evaluation.refusal import job
from hafrm_ds.evaluation.refusal.job import measure_refusals
from hafrm_ds.evaluation.refusal.options import RefusalOptions
from hafrm_ds.options import read
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.export import export_model
from tests.data.row_files import write_lines
from tests.tiny_models import SHAPE, save_tiny_final, save_tiny_model, tiny_causal_lm
from tests.tiny_tokenizers import byte_level_tokenizer

NUM_PROMPTS = 40
SHIFTED = 1.5


def text_of(number: int) -> str:
    """Prompts of one length, of which the first half holds a ! and the other half a ?."""
    return f"{number:03}" + ("!" if number < NUM_PROMPTS // 2 else "?")


def save(folder: Path, model: transformers.PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    byte_level_tokenizer(pad_token="</s>").save_pretrained(folder)
    return folder


def keyword_model(tokens: dict[str, int], size: int, weight: float) -> transformers.PreTrainedModel:
    """A Llama of one layer whose logit of r rises where the prompt holds a !, and falls as much where it holds a ?.

    Its attention is uniform: the value of its only head is channel 0 of the embeddings, which is 1 for a !, -1 for a ?
    and 0 elsewhere, and goes to channel 1 of the state, which the LM head reads for r alone.
    """
    shape = SHAPE | {"vocab_size": size, "num_hidden_layers": 1, "num_attention_heads": 1, "tie_word_embeddings": False}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**shape | {"max_position_embeddings": 512}), dtype=torch.float32
    )
    [layer] = model.model.layers
    with torch.no_grad():
        for module in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.o_proj,
                       layer.mlp.down_proj):  # fmt: skip
            module.weight.zero_()
        embeddings, head = model.model.embed_tokens.weight, model.lm_head.weight
        embeddings[:, :2] = 0
        embeddings[tokens["?"]] = embeddings[tokens["!"]]
        embeddings[tokens["!"], 0], embeddings[tokens["?"], 0] = 1, -1
        layer.self_attn.v_proj.weight[0, 0] = layer.self_attn.o_proj.weight[1, 0] = 1
        head[:, 1] = 0
        head[tokens["r"], 1] = weight
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models with planted changes of what they refuse, prompts, openings of one token each, and trained models."""
    folder = tmp_path_factory.mktemp("refusals")
    tokenizer = byte_level_tokenizer()
    tokens = {letter: tokenizer(letter)["input_ids"][0] for letter in "!?rc"}
    plain = tiny_causal_lm("phi", vocab_size=len(tokenizer), max_position_embeddings=512)
    save(folder / "plain", plain)
    with torch.no_grad():
        plain.lm_head.bias[tokens["r"]] += SHIFTED
    save(folder / "shifted", plain)
    for name, weight in (("neutral", 0.0), ("keyword", 3.0)):
        torch.manual_seed(0)
        save(folder / name, keyword_model(tokens, len(tokenizer), weight))
    rows = [
        {"prompt": text_of(n), "label": "harmful" if n < NUM_PROMPTS // 2 else "benign", "category": f"kind {n % 2}"}
        for n in range(NUM_PROMPTS)
    ]
    write_lines(folder / "prompts.jsonl", rows)
    write_lines(
        folder / "answers.jsonl",
        [{"prompt": row["prompt"], "refusals": ["No.", "Never."], "compliance": "Yes, so."} for row in rows[5:25]],
    )
    (folder / "openings.yaml").write_text("refusals: [r]\ncompliances: [c]\n")
    (folder / "system.txt").write_text("Be good.")
    save_tiny_final(folder / "final", pad_token="</s>")
    save_tiny_final(folder / "dpo", "llama", objective={"rm_weight": 0.0}, pad_token="</s>")
    export_model(folder / "final", "sequence-classification", folder / "classifier")
    return folder


def options_for(folder: Path, output: Path, *models: str, **changes) -> RefusalOptions:
    given = {
        "models": {model: str(folder / model) for model in models},
        "prompts": [str(folder / "prompts.jsonl")],
        "openings": folder / "openings.yaml",
        "output_dir": output,
        "max_new_tokens": 4,
    }
    return RefusalOptions(**given | changes)


def alone() -> Processes:
    return Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore())


def measure(options: RefusalOptions) -> dict:
    measure_refusals(options, alone())
    return json.loads((options.output_dir / "refusals.json").read_text())


def test_a_planted_bias_is_a_shift_and_nothing_else(folder, tmp_path):
    found = measure(options_for(folder, tmp_path, "plain", "shifted"))["probes"]["openings"]["changes"]["shifted"]
    assert found["logit"]["shift"]["value"] == pytest.approx(SHIFTED, abs=1e-4)
    assert found["logit"]["discrimination"]["value"] == pytest.approx(0, abs=1e-4)
    low, high = (found["logit"]["discrimination"][end] for end in ("low", "high"))
    assert low - 1e-6 <= 0 <= high + 1e-6 and found["mechanism"] == "shift"
    arms = json.loads((tmp_path / "refusals.json").read_text())["probes"]["openings"]["arms"]
    assert 0 < arms["plain"]["covered"]["value"] < arms["shifted"]["covered"]["value"] < 1  # r, one of two, is likelier


def test_a_planted_keyword_is_discrimination_and_nothing_else(folder, tmp_path):
    probes = measure(options_for(folder, tmp_path, "neutral", "keyword"))["probes"]
    found = probes["openings"]["changes"]["keyword"]
    size = found["logit"]["discrimination"]["value"]
    assert size > 0.1 and found["logit"]["harmful"]["value"] == pytest.approx(size / 2, abs=1e-4)
    assert found["logit"]["benign"]["value"] == pytest.approx(-size / 2, abs=1e-4)
    assert found["logit"]["shift"]["value"] == pytest.approx(0, abs=1e-4)
    assert found["mechanism"] == "discrimination"
    assert probes["openings"]["arms"]["keyword"]["auroc"]["value"] == 1


def test_a_model_against_itself_has_not_moved(folder, tmp_path):
    options = options_for(folder, tmp_path, "plain")
    found = measure(options.model_copy(update={"models": {name: str(folder / "plain") for name in "AB"}}))
    for probe in ("openings", "question"):
        changes = found["probes"][probe]["changes"]["B"]
        assert all(each == {"value": 0, "low": 0, "high": 0} for each in changes["logit"].values())
        assert all(each == {"value": 0, "low": 0, "high": 0} for each in changes["probability"].values())
        assert changes["mechanism"] == "none"


def test_every_defence_and_combination_is_an_arm(folder, tmp_path, capsys):
    """Two models with a system message, rewriting, answers and generated answers."""
    (tmp_path / "judge.py").write_text("def refuses(prompt, answer):\n    return float('a' in answer)\n")
    options = options_for(
        folder,
        tmp_path / "out",
        "final",
        "dpo",
        system=folder / "system.txt",
        rewrite=True,
        answers=str(folder / "answers.jsonl"),
        generated=12,
        refusal_judge=f"{tmp_path / 'judge.py'}:refuses",
    )
    found = measure(options)
    names = [model + defence for model in ("final", "dpo")
             for defence in ("", " + rewriting", " + system message", " + system message + rewriting")]  # fmt: skip
    assert list(found["arms"]) == names
    assert found["prompts"]["harmful"] == found["prompts"]["benign"] == 20
    # The policy of both, the reward head of one; the others are compared with the first arm that has the probe.
    assert list(found["probes"]["openings"]["arms"]) == list(found["probes"]["question"]["arms"]) == names
    assert list(found["probes"]["reward"]["arms"]) == names[:4] and found["probes"]["reward"]["first"] == "final"
    assert found["probes"]["reward"]["arms"]["final"]["harmful"]["prompts"] == 15
    assert found["answers"]["prompts"] == 20
    assert all(0 <= each["empty"] <= each["truncated"] == NUM_PROMPTS for each in found["rewrites"].values())
    changes = found["probes"]["openings"]["changes"]
    assert "combination" not in changes["dpo"] and changes["dpo + rewriting"]["combination"] in (
        "within", "between", "unknown",
    )  # fmt: skip
    assert {name: list(each) for name, each in found["generated"].items()} == {
        name: ["openings", "refusal_judge"] for name in names
    }
    assert all(each["openings"]["prompts"] == 12 for each in found["generated"].values())

    rows = [json.loads(line) for line in (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()]
    assert [row["prompt"][0]["content"] for row in rows] == [text_of(n) for n in range(NUM_PROMPTS)]
    assert sum("answers" in row for row in rows) == 12 and all(
        set(row["rewritten"]) == {"final", "dpo"} for row in rows
    )
    harmful = [row["logits"]["openings"]["dpo"] for row in rows if row["label"] == "harmful"]
    measured = found["probes"]["openings"]["arms"]["dpo"]["harmful"]
    assert measured["logit"]["value"] == pytest.approx(np.mean(harmful))
    judged = found["generated"]["dpo"]["refusal_judge"]["refused"]
    answers = [row["answers"]["dpo"] for row in rows if "answers" in row]
    assert judged["both"] + judged["answers"] == sum("a" in answer for answer in answers)
    # The prompt that was asked is the rewritten one: its logits differ.
    assert changes["final + rewriting"]["logit"]["harmful"]["value"] != 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Policy: asked whether it refuses" in page and "dpo + system message + rewriting" in page
    printed = capsys.readouterr().out
    assert "dpo: no reward head that was trained" in printed and "over-refusal" in printed
    assert "20 of 40 prompts have no --answers" in printed and "(15 harmful and 5 benign prompts)" in printed
    assert (
        f"truncated at --max_new_tokens, and empty ones, which were asked as they are: final {NUM_PROMPTS}"
        in " ".join(printed.split())
    )
    judgements = [row["answer_refuses"]["dpo"]["refusal_judge"] for row in rows if "answers" in row]
    assert judgements == ["a" in answer for answer in answers]


def test_a_job_that_was_killed_resumes_and_one_that_is_finished_shows_its_results(
    folder, tmp_path, monkeypatch, capsys
):
    options = options_for(folder, tmp_path / "out", "plain", "shifted", rewrite=True)
    expected = measure(options_for(folder, tmp_path / "whole", "plain", "shifted", rewrite=True))
    scored = []

    score_parts = job.score_parts
    monkeypatch.setattr(job, "score_parts", lambda *a, **k: interrupted(score_parts, scored, *a, **k))
    with pytest.raises(KeyboardInterrupt):
        measure(options)
    monkeypatch.undo()
    capsys.readouterr()
    found = measure(options)
    printed = capsys.readouterr().out
    assert "parts of model-1-logprob are there already" in printed and "parts of rewrites-1" in printed
    assert found["probes"] == expected["probes"]
    monkeypatch.setattr(job, "score_parts", None)
    assert measure(options) == found
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(DataError, match="holds the results of another job"):
        measure(options.model_copy(update={"rewrite": False}))
    monkeypatch.undo()
    measure_refusals(options.model_copy(update={"rewrite": False}), alone(), replaces=True)
    assert list(json.loads((tmp_path / "out" / "refusals.json").read_text())["arms"]) == ["plain", "shifted"]


def interrupted(score_parts, scored, name, *arguments, **how):
    """Scores what is asked for first, and then is interrupted."""
    scored.append(name)
    if len(scored) == 2:
        raise KeyboardInterrupt
    return score_parts(name, *arguments, **how)


def test_a_system_message_of_a_prompt_stays_behind_that_of_the_arm(folder, tmp_path):
    own = {"role": "system", "content": "Be brief."}
    rows = [{"prompt": [own, user(text)], "label": "safe"} for text in ("abc", "def")]
    file = write_lines(tmp_path / "prompts.jsonl", rows)
    (tmp_path / "system.txt").write_text("Be good.\n")
    options = options_for(folder, tmp_path, "plain", prompts=[str(file)], system=tmp_path / "system.txt")
    measurement = job.Measurement.open(options, Console(alone()))
    arm = measurement.arms_of(measurement.subjects[0])[1]
    [asked, _] = measurement.asked(arm, [], {})
    assert asked.prompt == [{"role": "system", "content": "Be good.\n\nBe brief."}, user("abc")]


def test_answers_that_the_first_model_generates(folder, tmp_path):
    options = options_for(folder, tmp_path, "final", answers="generated", max_prompts=6)
    found = measure(options)
    assert found["probes"]["reward"]["arms"]["final"]["harmful"]["prompts"] < 6
    assert found["answers"] == {"from": "generated", "prompts": 6}


def test_prompts_of_one_kind_are_measured_and_what_needs_both_is_left_out(folder, tmp_path, capsys):
    lines = (folder / "prompts.jsonl").read_text().splitlines()[:10]
    (tmp_path / "harmful.jsonl").write_text("\n".join(lines))
    options = options_for(
        folder, tmp_path / "out", "plain", "shifted", prompts=[f"harmful={tmp_path / 'harmful.jsonl'}"]
    )
    found = measure(options)["probes"]["openings"]
    assert found["arms"]["plain"]["auroc"] is None and found["changes"]["shifted"]["mechanism"] is None
    assert found["changes"]["shifted"]["logit"]["harmful"]["value"] == pytest.approx(SHIFTED, abs=1e-4)
    assert (tmp_path / "out" / "report.html").exists() and "10 harmful and 0 benign prompts" in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "score_parts", None)
    monkeypatch.setattr(job, "Writer", None)

    def refused(error, message, *models, **changes):
        with pytest.raises(error, match=message):
            measure(options_for(folder, tmp_path / "out", *models, **changes))

    refused(ModelError, "classifier has a reward head alone, which compares answers: give --answers", "classifier")
    refused(
        ModelError,
        "classifier has no LM head, so it writes nothing, and --rewrite true asks it to",
        "classifier",
        answers=str(folder / "answers.jsonl"),
        rewrite=True,
    )
    refused(
        ModelError,
        "--answers is for reward heads, and none of the models",
        "dpo",
        answers=str(folder / "answers.jsonl"),
    )
    strange = write_lines(tmp_path / "strange.jsonl", [{"prompt": "z", "refusal": "No.", "compliance": "Yes."}])
    refused(DataError, "none of its prompts is among --prompts", "final", answers=str(strange))
    (tmp_path / "empty.txt").write_text("\n")
    refused(DataError, r"--system .*empty\.txt is empty", "final", system=tmp_path / "empty.txt")
    refused(DataError, r"--system .*nowhere cannot be read", "final", system=tmp_path / "nowhere")
    no_system = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    )
    no_system += "{{ m.role + ':' + m.content }}</s>{% endfor %}"
    save_tiny_model(tmp_path / "no_system", chat_template=no_system)
    refused(
        DataError,
        r"prompts\.jsonl:1: no_system cannot be asked \(no_system \+ system message\): .*no system message.*; where "
        "the template takes no system message, leave --system out",
        "no_system",
        models={"no_system": str(tmp_path / "no_system")},
        system=folder / "system.txt",
    )
    refused(DataError, r"prompts\.jsonl:1: \d+ tokens leave no room for --max_new_tokens 500", "final", generated=3,
            max_new_tokens=500)  # fmt: skip
    long = write_lines(tmp_path / "long.jsonl", [{"prompt": "x" * 600, "label": "safe"}])
    refused(DataError, r"long\.jsonl:1: final cannot be asked .* tokens, more than the positions", "final",
            prompts=[str(long)])  # fmt: skip
    assert not (tmp_path / "out" / "refusals.json").exists()


def test_options_that_contradict_themselves(folder):
    words = ["--models", "A", "A", "--prompts", "xstest", "--output_dir", "out"]
    with pytest.raises(ConfigError, match="names a model twice; give each a name"):
        read(RefusalOptions, words)
    words = ["--models", "A", "--prompts", "harmful", "--output_dir", "out"]
    with pytest.raises(ConfigError, match="harmful is written with the file: harmful=PATH"):
        read(RefusalOptions, words)
    words = ["--models", "A", "--prompts", "xstest", "--output_dir", "out", "--refusal_judge", "f.py:f"]
    with pytest.raises(ConfigError, match="--refusal_judge judges generated answers: give --generated N"):
        read(RefusalOptions, words)
    options = read(
        RefusalOptions, ["--models", "{base: A, trained: B}", "--prompts", "xstest", "or-bench", "--output_dir", "out"]
    )
    assert options.models == {"base": "A", "trained": "B"} and options.prompts == ["xstest", "or-bench"]
