"""A short run of the fuzzer; a long one is `python -m tests.data.fuzzing SECONDS`."""

import random
from collections import Counter

from tests.data.fuzzing import fuzz_once


def test_no_row_or_file_gives_anything_but_its_own_words_or_one_line(tmp_path):
    outcomes = Counter(fuzz_once(random.Random(f"0 {number}"), tmp_path) for number in range(1200))
    assert min(outcomes[kind] for kind in ("pairs", "groups", "refused", "left out", "file read", "file refused")) > 10
