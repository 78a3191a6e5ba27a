"""One exception for every mistake that a user can fix, and how the scripts report it."""

import contextlib
import difflib
import os
import sys
from collections.abc import Iterable, Iterator

# What torch.distributed says when another process hung or ended.
LOST = ("Timed out", "timed out", "Connection closed", "Connection reset", "Broken pipe")


class UserError(ValueError):
    """Bad input. The message names the file or option, what is wrong with it, and what to do."""


def first_line(error: BaseException) -> str:
    """Return the first line of what a library's exception says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message: the nearest known name, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {near[0]}?" if near else f": use one of {', '.join(known)}"


@contextlib.contextmanager
def report_user_errors() -> Iterator[None]:
    """Turn a `UserError` into one line on stderr and exit status 1; others keep their traceback.

    Under torchrun the line names the rank, and a process that hung or ended is reported as one
    line too. Ctrl-C exits with the shell's status for it, 130.
    """
    rank = os.environ.get("RANK")
    prefix = f"[rank {rank}] " if rank is not None else ""
    try:
        yield
    except UserError as error:
        print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except RuntimeError as error:
        if rank is None or not any(words in str(error) for words in LOST):
            raise
        message = f"another process hung or ended ({first_line(error)})"
        print(f"{prefix}error: {message}", file=sys.stderr, flush=True)
        os._exit(1)  # a normal exit would wait for the other process once more
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
