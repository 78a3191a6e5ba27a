"""The exception for errors that the user can fix, and how the scripts report it."""

import contextlib
import difflib
import os
import signal
import sys
from collections.abc import Iterable, Iterator

from stagewise.console import protect_streams

# Messages of torch.distributed when another process has hung or exited.
LOST = ("Timed out", "timed out", "Connection closed", "Connection reset", "Broken pipe")
# Messages of PyTorch when memory cannot be allocated.
NO_MEMORY = (
    "out of memory",
    "t allocate memory",
    "not enough memory",
)


class UserError(ValueError):
    """Invalid input. The message names the file or option, the problem, and how to fix it."""


def first_line(error: BaseException) -> str:
    """Return what an exception says in one line.

    This is the operating system's message for an OSError, otherwise the first line of the message,
    or the type if there is none.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a suggestion for an error message: the closest known name, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {near[0]}?" if near else f": use one of {', '.join(known)}"


@contextlib.contextmanager
def file_errors(path: object, advice: str) -> Iterator[None]:
    """Turn errors at the boundary of a file into a `UserError` that names it and gives `advice`.

    These are errors of the operating system (permissions, a full disk, a name too long), of
    decoding (not UTF-8, a NUL byte), and of schemas (ValueError).
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {first_line(error)}: {advice}") from None


@contextlib.contextmanager
def report_user_errors() -> Iterator[None]:
    """Report a `UserError` as one line on stderr and exit with status 1.

    The same applies to other errors of the operating system, to insufficient memory, and, under
    torchrun, to another process that hung or exited; the line then includes the rank. Ctrl-C exits
    with status 130. Other exceptions keep their traceback. From here on, no output can raise; see
    `console.protect_streams`.
    """
    protect_streams()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # by stagewise.console
        signal.signal(signal.SIGINT, signal.default_int_handler)
    rank = os.environ.get("RANK")
    prefix = f"[rank {rank}] " if rank is not None else ""
    try:
        yield
    except UserError as error:
        message = str(error)
    except OSError as error:
        where = (
            f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        )
        message = where + first_line(error)
    except UnicodeError as error:
        message = f"text that cannot be encoded or decoded: {first_line(error)}"
    except MemoryError as error:
        message = f"out of memory ({first_line(error)}): lower batch_size or the model's size"
    except RuntimeError as error:
        said = first_line(error)
        if any(words in str(error) for words in NO_MEMORY):
            message = f"{said}: lower batch_size or the model's size"
        elif rank is not None and any(words in str(error) for words in LOST):
            print(f"{prefix}error: another process hung or ended ({said})", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)  # a normal exit would wait for the other process again
        else:
            raise
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    else:
        return
    print(f"{prefix}error: {message}", file=sys.stderr)
    sys.exit(1)
