"""What hosts must have in common: how differences are found and told."""

from hafrm_ds.processes.agreement import differences, disagreement, software


def test_only_what_differs_is_told_with_both_values():
    here = {"torch": "2.13.0", "peft": None, "numpy": "2.1"}
    there = {"torch": "2.13.0", "peft": "0.18", "python": "3.12.1"}
    assert differences(here, there) == {"peft": [None, "0.18"], "numpy": ["2.1", None], "python": [None, "3.12.1"]}
    assert differences(here, here) == {}


def test_hosts_with_the_same_difference_share_a_line():
    found = [(f"n{number}", {"torch": ["2.13.0", "2.12.1"]} if number > 1 else {}) for number in range(1, 10)]
    assert disagreement("software", "n1", found) == (
        "the hosts of this run differ from n1, where rank 0 runs, in software:\n"
        "  - n2, n3, n4, n5, n6 and 3 more: torch is 2.12.1, and 2.13.0 on n1"
    )


def test_ranks_of_one_host_are_one_host_and_hashes_are_short():
    different = {"train": ["a" * 64, "b" * 64]}
    message = disagreement("data", "n1", [("n1", {}), ("n2", different), ("n2", different)])
    assert message.splitlines()[1:] == ["  - n2: train is bbbbbbbbbbbb, and aaaaaaaaaaaa on n1"]


def test_no_difference_is_no_message():
    assert disagreement("data", "n1", [("n1", {}), ("n2", {})]) is None


def test_the_code_itself_counts_as_software():
    facts = software()
    assert len(facts["code of hafrm_ds"]) == 64
    assert facts["torch"] and facts["python"]
