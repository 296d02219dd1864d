"""The voice of the entry files: a console of any encoding, and options by the names of the entry file that is run."""

import os
import subprocess
import sys

import pytest

from hafrm_ds.errors import DataError, ModelError, in_own_names


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("status", [0, 1])
def test_a_console_that_cannot_show_a_character_shows_another(encoding, status):
    code = (
        "from hafrm_ds.errors import UserError, run_alone\n"
        "def main():\n"
        "    print('a \\u2713 \\u732b \\udc80')\n"
        f"    if {status}: raise UserError('set \\u732b')\n"
        "run_alone(main)"
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == status
    assert done.stdout.startswith(b"a ") and b"Traceback" not in done.stderr
    assert not status or done.stderr.startswith(b"error: set ")


def test_options_have_the_names_of_the_entry_file():
    error = DataError("lower --data.max_length, or data.max_dropped_share, in /my/data.max_length")
    assert in_own_names(error) == "lower --max_length, or --max_dropped_share, in /my/data.max_length"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("model.name_or_path 'm' cannot be loaded", "--model 'm' cannot be loaded"),
        ("no local folder (model.name_or_path, or --model)", "no local folder (--model)"),
        ("--data.reasoning drop, --model.trust_remote_code true", "--reasoning drop, --trust_remote_code true"),
    ],
)
def test_the_model_has_its_own_name_too(said, expected):
    assert in_own_names(ModelError(said)) == expected
