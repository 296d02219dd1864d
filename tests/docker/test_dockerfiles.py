"""What the RUN lines of the Dockerfiles do, as far as their text tells."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = [ROOT / "docker" / name for name in ("Dockerfile", "Dockerfile.cpu")]


def removals(dockerfile: Path) -> list[list[str]]:
    """The words of every `rm` that a RUN line runs itself."""
    text = re.sub(r"\\\n", " ", dockerfile.read_text())
    runs = [line.removeprefix("RUN ") for line in text.splitlines() if line.startswith("RUN ")]
    commands = [shlex.split(command) for run in runs for command in run.split("&&")]
    return [words for words in commands if words and words[0] == "rm"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_an_image_leaves_out_may_be_missing_from_a_wheel(dockerfile):
    """torch's wheel for CPUs has tests in it, the one for CUDA has none; a plain rm then ends the build."""
    found = removals(dockerfile)
    assert any("torch/test" in word for words in found for word in words)
    demanding = [words for words in found if not any(re.fullmatch("-[a-z]*f[a-z]*", word) for word in words)]
    assert demanding == []
