"""Which figures of metrics.jsonl are drawn."""

from hafrm_ds.evaluation.report.curves import TRAINING_PANELS, curves_of
from hafrm_ds.evaluation.report.reading import by_step


def test_every_loss_that_is_trained_has_a_curve_and_a_total_of_several_too():
    loss, *_ = TRAINING_PANELS

    def drawn(*parts: str) -> list[str]:
        row = {"step": 1, "loss/total": 1.0} | {f"loss/{part}": 0.5 for part in parts}
        return [curve.label for curve in curves_of(loss, by_step([row]))]

    assert drawn("reward") == ["reward"]
    assert drawn("reward", "policy") == ["total", "reward", "policy"]
    assert drawn("reward", "attributes") == ["total", "reward", "attributes"]
    assert drawn("policy", "router") == ["total", "policy", "router"]
