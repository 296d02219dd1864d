"""The virtual environment that launch/environment.sh puts first on PATH."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_an_environment_that_is_named_by_a_relative_path_is_found_from_any_folder(tmp_path):
    scripts = tmp_path / "mine" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "python").symlink_to(sys.executable)
    installed = subprocess.check_output(f"{{ echo {ROOT}; cat {ROOT}/setup.py; }} | cksum", shell=True, text=True)
    (tmp_path / "mine" / "hafrm_ds-installed").write_text(f"{installed}extras: \n")  # nothing is to be installed
    found = subprocess.check_output(
        ["bash", "-c", f'source {ROOT}/launch/environment.sh "" && cd / && command -v python && echo "$VIRTUAL_ENV"'],
        cwd=tmp_path,
        env=os.environ | {"HAFRM_VENV": "mine"},
        text=True,
    )
    assert found.split() == [str(scripts / "python"), str(tmp_path / "mine")]
