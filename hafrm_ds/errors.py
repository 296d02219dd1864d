"""Errors that a user can act on.

Everything a user can get wrong is raised as one of these: the message names the file and row or the option, and what
to do. Entry files print the message without a traceback, from one rank, and exit with status 1.
"""

import io
import re
import sys
from collections.abc import Callable
from typing import NoReturn

INTERRUPTED_STATUS = 130
"""What a shell gives a program that Ctrl-C has ended."""


class UserError(Exception):
    """Something outside the code is wrong: the message is all a user needs."""


class ConfigError(UserError):
    """The configuration is wrong; `problems` holds one message for each fault found."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{head} in the configuration:\n" + "\n".join(f"  - {problem}" for problem in problems))


class DataError(UserError):
    """A data source cannot be used."""


class ModelError(UserError):
    """A model or tokenizer cannot be used."""


class NoRoomError(UserError):
    """A device has no room for a micro-batch."""


def in_own_names(error: "UserError") -> str:
    """The message of an error, with the options of a training by the names that entry files with few options give them:
    --max_length, where a training has data.max_length, and --model, where it has model.name_or_path."""
    names = "max_dropped_share|max_length|truncation|chat_template|cache_dir|reasoning"
    message = re.sub(rf"(?<![\w./])(?:--)?data\.({names})\b", r"--\1", str(error))
    message = message.replace("(model.name_or_path, or --model)", "(--model)")
    return re.sub(r"(?<![\w./])(?:--)?model\.(name_or_path|trust_remote_code)\b", own_model_option, message)


def own_model_option(found: re.Match) -> str:
    return "--model" if found[1] == "name_or_path" else f"--{found[1]}"


def print_in_any_encoding() -> None:
    """Let a console that cannot show a character show a question mark, instead of ending the job."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def run_alone(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry file that needs no launcher: a UserError becomes one message, and exit status 1.

    Those that a launcher may start use `processes.ranks.run_entry`.
    """
    print_in_any_encoding()
    try:
        status = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = INTERRUPTED_STATUS
    sys.exit(status)
