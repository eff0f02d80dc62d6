"""
Error messages for users, and files that are written whole or not at all.
"""

import contextlib
import errno
import importlib.util
import math
import os
import secrets
import signal
import sys
import time
from pathlib import Path

import torch


class UserError(Exception):
    """A mistake the user can fix: shown as one line, exit code 2, no traceback."""


def some(names, n=5):
    """The first n names in one string, for a message; "..." if there are more."""
    names = [str(name) for name in names]
    return ", ".join(names[:n]) + " ..." * (len(names) > n)


def as_flag(name):
    """The option as it is typed: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def installed(package):
    """Whether an optional package can be imported."""
    return importlib.util.find_spec(package) is not None


LESS = "Use smaller batches or images, or --accumulate 2 in training."
ADVICE = {  # words in the error messages of torch and numpy: what to do
    "out of memory": LESS,
    "DefaultCPUAllocator": LESS,
    "Unable to allocate": LESS,
    "DataLoader worker": "For want of memory? Pass fewer --workers; a training goes on with "
    "--resume from where it was saved.",
    "Failed to find C compiler": "--compile on a GPU needs one: install gcc, or name one by CC.",
}


def cli(main, args):
    """Run a script's main; a UserError becomes one line on stderr and exit code 2.

    SIGTERM unwinds the stack, so that nothing half-written stays; under torchrun, whose processes
    may be waiting for each other, the process ends at once.
    """
    if "WORLD_SIZE" not in os.environ:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):  # names of any language, on any terminal
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # as by | head: nobody reads what Python flushes on exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (RuntimeError, MemoryError) as e:
        said = str(e) or "out of memory."
        advice = [advice for words, advice in ADVICE.items() if words in said]
        if not advice:
            raise
        print(f"error: {said.splitlines()[0]} {advice[0]}", file=sys.stderr)
        sys.exit(2)
    except (UserError, OSError) as e:  # a full disk, a folder without permission
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


def nearest_existing(path):
    """The path itself, or the nearest of its parents that exists."""
    path = Path(path).absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def check_folder(flag, path):
    """UserError if `path` cannot be a folder: it, or one of its parents, is a file."""
    existing = nearest_existing(path)
    if not existing.is_dir():
        raise UserError(f"{flag} {path}: {existing} is a file, not a folder")


class Progress:
    """Prints every few seconds how far a long job is and, if its total is known, the time left.

    first: how much was done before this job began.
    """

    def __init__(self, title, total, every=2.0, first=0):
        self.title, self.total, self.every, self.first = title, total, every, first
        self.start = self.printed = time.time()

    def at(self, done):
        now = time.time()
        if now - self.printed <= self.every or not self.first < done < (self.total or math.inf):
            return
        line = f"{self.title}: {done:.0f}"
        if self.total:
            left = (now - self.start) * (self.total - done) / (done - self.first)
            line += f"/{self.total:.0f}, {left:.0f} s left"
        print(line, flush=True)
        self.printed = now


@contextlib.contextmanager
def writing(path):
    """Turn an OSError into a UserError that names `path`: that of a full disk names no file."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left on the device that holds {path}") from e
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e


def beside(path):
    """A path beside `path`, for what is not finished. Of its own: containers share process ids."""
    return f"{os.fspath(path)}.tmp{secrets.token_hex(6)}"


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path`, renamed to it at the end: a whole file or none."""
    path = os.fspath(path)
    tmp = beside(path)
    try:
        with writing(path):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            yield tmp
            os.replace(tmp, path)
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)


def write_text(path, text):
    with atomic(path) as tmp:
        Path(tmp).write_text(text)


def save_tensors(path, tree):
    """torch.save through a temporary file; a failed write leaves the old file as it was."""
    with atomic(path) as tmp:
        try:
            torch.save(tree, tmp)
        except RuntimeError as e:  # torch's zip writer reports a full disk as a RuntimeError
            raise OSError(errno.ENOSPC, str(e)) from e


def load_tensors(path):
    """torch.load of tensors and plain values only: no code in a file is ever run."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as e:
        raise UserError(f"{path}: no permission to read it") from e
    except Exception as e:  # unpickling rubbish can raise anything
        what = f"not a checkpoint of tensors ({type(e).__name__})"
        raise UserError(f"{path}: {what}: cut off, damaged, or another kind of file") from e
