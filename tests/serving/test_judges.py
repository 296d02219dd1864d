"""What a server says of its judges, and that a start as it advises has them."""

import json

import pytest

from hafrm_ds.saved.export import export_model
from hafrm_ds.serving.judges import about
from hafrm_ds.serving.options import ServingOptions
from tests.test_objective import FIT
from tests.tiny_models import save_tiny_final, save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = save_tiny_model(folder / "base")
    save_tiny_final(folder / "final", base=base, objective={"beta": 0.4})
    save_tiny_final(folder / "orphan", base="")
    save_tiny_final(folder / "fitted", base=base, objective={"beta": 0.4})
    file = folder / "fitted" / "hafrm.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"judge": FIT.to_json()}))
    export_model(folder / "final", "sequence-classification", folder / "classifier")
    (folder / "f.py").write_text("def one(prompt, answer): return 1\n")
    return folder


def said(folder, name, **options):
    chosen = ServingOptions(model=folder / name, **options)
    return about(chosen, chosen.open())


@pytest.mark.parametrize(
    "name, options, scores, missing",
    [
        ("final", {}, "reward", {"implicit": "start the server with --credit"}),
        ("final", {"credit": True}, "reward", {"combined": "holds no fit"}),
        ("fitted", {"credit": True}, "reward", {}),
        ("fitted", {"judge": "implicit"}, "implicit", {"reward": "--judge implicit; leave that out and give --credit"}),
        ("fitted", {"judge": "combined"}, "combined", {"reward": "--judge combined; leave that out and give --credit"}),
        ("base", {"reference": "final"}, "implicit", {"reward": "has no reward head"}),
        ("classifier", {}, "reward", {"implicit": "has no LM head; serve the final/ folder"}),
        ("f.py:one", {}, "composition", {"implicit": "serve a single model"}),
    ],
)
def test_each_kind_says_what_it_has_and_what_is_missing(folder, name, options, scores, missing):
    if "reference" in options:
        options = {"reference": str(folder / "base")}
    found = said(folder, name, **options)
    assert found["scores"] == scores and found["logprobs"] == (name not in ("classifier", "f.py:one"))
    assert found["missing"].keys() == missing.keys()
    for judge, text in missing.items():
        assert text in found["missing"][judge]
    has_reference = bool(options)
    assert (found["reference"] is not None, found["beta"] is not None) == (has_reference, has_reference)


def test_the_combined_judge_counts_implicit_rewards_of_the_model_s_beta(folder):
    """The fit was made with a beta of its own."""
    found = said(folder, "fitted", credit=True)
    assert found["beta"] == 0.4 and FIT.beta == 0.2
    assert found["weights"] == [FIT.weights[0], pytest.approx(FIT.weights[1] * 0.2 / 0.4)]
    assert found["reference"] == str(folder / "base")


def test_a_model_that_does_not_say_what_it_was_trained_from(folder):
    assert "--credit and --reference MODEL" in said(folder, "orphan")["missing"]["implicit"]
    assert "--reference" not in said(folder, "orphan", reference="x", credit=True)["missing"].get("implicit", "")
