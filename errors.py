"""One exception for every mistake that a user can mend, and how the scripts report it."""

import contextlib
import os
import sys


LOST = ("Timed out", "timed out", "Connection closed", "Connection reset", "Broken pipe")  # what torch.distributed says of it


class UserError(ValueError):
    """Bad input: the message names the file or option, what is wrong with it, and what to do."""


def first_line(error: BaseException) -> str:
    """What an exception of a library says, fit for the one line of a UserError."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def report_user_errors():
    """Turn a `UserError` into one line on stderr and exit status 1; every other exception keeps its traceback.

    Under torchrun the line names the rank; there, a process that hung or ended is reported so too. Ctrl-C leaves quietly
    with the shell's status for it, 130.
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
        print(f"{prefix}error: another process hung or ended ({first_line(error)})", file=sys.stderr, flush=True)
        os._exit(1)  # the usual way out would wait for the other process once more
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
