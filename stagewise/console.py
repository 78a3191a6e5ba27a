"""Standard streams that cannot end a run, and Ctrl-C while a script is still importing.

Every script imports this module first.
"""

import io
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Without this, Ctrl-C during the imports, which take seconds, prints a long traceback. Not done if
# another program, such as pytest, imports the module. `errors.report_user_errors` restores it.
_script = Path(getattr(sys.modules["__main__"], "__file__", None) or "/")
if (
    _script.resolve().parent == ROOT
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class _Output(io.FileIO):
    """A file descriptor to which writing always succeeds. Text that cannot be written is lost."""

    def write(self, data) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:  # a full disk, a closed pipe, a terminal that is gone
            return len(data)


def protect_streams() -> None:
    """Replace sys.stdout and sys.stderr by streams that never raise.

    Full disks, closed pipes (`| head`), closed descriptors and characters that the locale's
    encoding lacks do not end a run.
    """
    # If a standard descriptor is closed, the next file that is opened would get its number, and
    # libraries that print would write into that file.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name, number in (("stdout", 1), ("stderr", 2)):
        former = getattr(sys, name)
        if former is not None:
            try:
                former.flush()
            except (OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)  # it would fail again at exit
        stream = io.TextIOWrapper(
            io.BufferedWriter(_Output(number, "wb", closefd=False)),
            encoding=getattr(former, "encoding", None) or "utf-8",
            errors="backslashreplace",
            line_buffering=True,
        )
        setattr(sys, name, stream)
