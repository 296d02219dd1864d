"""What a scenario file may say, and what is refused before anybody is asked."""

from pathlib import Path

import pytest

from hafrm_ds.corrections.scenario import Scenario, has
from hafrm_ds.errors import ConfigError, DataError
from hafrm_ds.options import read
from tests.corrections.desk import CASES, desk, seat

SCENARIOS = sorted((Path(__file__).parents[2] / "launch" / "scenarios").glob("*.yaml"))
URL = "http://127.0.0.1:9/v1"


@pytest.mark.parametrize("file", SCENARIOS, ids=lambda file: file.stem)
def test_a_scenario_that_is_shipped_is_valid_and_leaks_nothing(file, tmp_path):
    scenario = read(Scenario, ["--config", str(file), "--output_dir", str(tmp_path)])
    assert scenario.read_cases()
    (tmp_path / "again.yaml").write_text(scenario.to_yaml())
    assert read(Scenario, ["--config", str(tmp_path / "again.yaml")]) == scenario
    assert f"launch/correct.py --config launch/scenarios/{file.name}" in file.read_text()


def refused(folder, **more) -> str:
    with pytest.raises(ConfigError) as error:
        desk(folder, **more).read_cases()
    return str(error.value)


def seats_with(**systems: str) -> dict:
    plain = {"user": "You are {name}.", "assistant": "You answer.", "supervisor": "You supervise."}
    return {name: seat(URL, name, system) for name, system in (plain | systems).items()}


def test_a_template_that_names_a_field_which_the_seat_may_not_see_is_refused_by_name(tmp_path):
    said = refused(tmp_path, seats=seats_with(assistant="You know the cover: {cover}."))
    assert "seats.assistant.system: {cover} is a field that the assistant may not see" in said
    assert "seats.user.system: {code} is a field that the user may not see" in refused(
        tmp_path, seats=seats_with(user="Your code is {code}.")
    )
    assert "rewrite: {cover} is a field that the user may not see" in refused(
        tmp_path, rewrite="{draft} {advice} {cover}"
    )
    assert "opening: {cover}" in refused(tmp_path, opening="Begin: {cover}")


def test_a_value_that_stands_in_another_text_is_refused_by_case_field_and_seat(tmp_path):
    case = {"name": "Ines", "trouble": "your code 4711 does\nnot work", "cover": "repairs alone", "code": 4711}
    said = refused(tmp_path, cases=[CASES[1], case])
    assert "cases.1: seats.user.system tells the user the value of code, which it may not see" in said
    assert "cases.0" not in said
    said = refused(tmp_path, seats=seats_with(assistant="Customers have REPAIRS  alone as their cover."))
    assert "cases.0: seats.assistant.system tells the assistant the value of cover" in said


def test_values_are_looked_for_as_words_in_any_script():
    assert has("the code is\n4711.", "4711") and has("Repairs Alone", "repairs  alone") and has("订单4711号", "4711")
    assert has("我是张三。", "张三") and not has("the number 14711", "4711") and not has("meaning", "mean")


def test_short_values_and_flags_stand_in_texts_by_chance(tmp_path):
    fields = {"name": ["user"], "hurt": [], "bicycles": []}
    cases = [{"name": "Ines, whose story is true, with 2 children", "hurt": True, "bicycles": 2}]
    assert desk(tmp_path, seats=seats_with(), withhold=[], fields=fields, cases=cases).read_cases() == cases


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        ({"name": "Ines", "trouble": "none", "cover": "no"}, "cases.0: has no code"),
        (CASES[0] | {"age": 3}, "cases.0: has age, which is not in `fields`"),
        (CASES[0] | {"cover": {"a": 1}}, "cases.0: cover is no text, number"),
        (CASES[0] | {"cover": None}, "cases.0: cover is no text, number"),
    ],
)
def test_a_case_that_is_not_as_the_fields_say_is_refused(case, problem, tmp_path):
    assert problem in refused(tmp_path, cases=[case])


def test_cases_may_stand_in_a_file(tmp_path):
    file = tmp_path / "cases.jsonl"
    file.write_text('{"name": "Ines", "trouble": "a", "cover": "all", "code": 4711}\n{"name": "Ines"}\n')
    assert f"{file}:2: has no trouble" in refused(tmp_path, cases=file)
    file.write_text("")
    with pytest.raises(DataError, match="holds none"):
        desk(tmp_path, cases=file).read_cases()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"withhold": ["cod"]}, "withhold: cod is no field"),
        ({"train": "user"}, "rules: the user is to be trained (train), but has no rules"),
        ({"rewrite": "Anew: {draft}"}, "rewrite: has no {advice}"),
        ({"advice": "Well? {draft}"}, "advice: has no {no_problem}"),
        (
            {"seats": seats_with() | {"user": seat(URL, "m", "You") | {"model": "final"}}},
            "seats.user: give endpoint or model",
        ),
        ({"seats": seats_with() | {"user": {"system": "You"}}}, "seats.user: give endpoint or model"),
        ({"fields": {"due date": ["user"]}}, "fields: 'due date' cannot stand in a template"),
        ({"fields": {"draft": ["user"]}}, "fields: 'draft' cannot stand in a template"),
        ({"advice": "{draft} {no_problem} {rulez}"}, "advice: {rulez} is none of {history}, {seat}"),
    ],
)
def test_contradictions(changes, problem, tmp_path):
    assert any(problem in each for each in desk(tmp_path, **changes).contradictions())
