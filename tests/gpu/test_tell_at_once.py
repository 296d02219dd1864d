"""The plugin of tests/gpu/first_run.sh that prints a failure when it happens."""

import subprocess
import sys

from tests.distributed.launching import REPOSITORY


def test_a_failure_is_told_before_the_next_test(tmp_path):
    (tmp_path / "test_two.py").write_text("def test_fails():\n    assert 1 == 2\n\n\ndef test_passes():\n    pass\n")
    options = ["-v", "--tb=no", "-p", "no:cacheprovider", "-p", "tests.gpu.tell_at_once", "--rootdir", tmp_path]
    command = [str(word) for word in (sys.executable, "-m", "pytest", *options, tmp_path)]
    told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True).stdout
    assert 0 < told.find("assert 1 == 2") < told.find("test_passes"), told
