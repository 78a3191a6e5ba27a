"""Checkpoints: written atomically, verified before use, loaded without executing code.

    RUN_DIR/checkpoints/step_00001000/model.safetensors       weights by nanoGPT's names, wte once
                                      optimizer.safetensors   AdamW's state: NAME/exp_avg, ...
                                      state.json              everything else: see `State`
                                      SHA256SUMS              of the three, as sha256sum -c reads it

Checkpoints are loaded as plain dictionaries and tensors, from which the caller builds a model.
"""

import re
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from stagewise.device import pin
from stagewise.distributed import full_tensor, shard_like
from stagewise.errors import UserError, file_errors, first_line
from stagewise.fileio import decode_json, encode_json, fsync, read_bytes, sha256
from stagewise.hf import SIZES, load_pretrained
from stagewise.nanogpt import load_nanogpt

FORMAT_VERSION = 1
FOLDER = "checkpoints"
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
SUMS = "SHA256SUMS"
TIED = {"lm_head.weight": "transformer.wte.weight"}  # safetensors does not store shared tensors

ALIGNMENT = 64  # of the buffers of a `CheckpointWriter`, in bytes

Count = Annotated[int, Meta(ge=0, lt=2**53)]


@dataclass
class State:
    """The contents of state.json."""

    format_version: int
    step: Count  # completed optimizer steps
    n_blocks: Count  # number of blocks at this step
    model_config: dict[str, Any]  # model.GPTConfig
    seconds: float  # training time
    loss_history: dict[str, Any]  # monitor.LossHistory
    config: dict[str, Any]  # the options of the run
    phases: list[dict[str, Any]]  # every schedule.Phase of the schedule
    n_windows: Count  # number of windows in the training data
    tokenizer: str
    corpus: str = ""  # data.fingerprint; "" in checkpoints of earlier versions
    # What the initial weights have cost, by metric; empty if the run started without or unknown.
    initial_cost: dict[str, Annotated[int, Meta(ge=0)]] = field(default_factory=dict)


@dataclass
class _Version:
    format_version: int = 0


# --------------------------------------------------------------------------------------------------
# reading


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first.

    Raises:
        UserError: if the folder cannot be read, for example for lack of permission.
    """
    try:
        found = list(Path(run_dir, FOLDER).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unreadable(error, Path(run_dir, FOLDER)) from None
    return sorted(p for p in found if re.fullmatch(r"step_\d{8}", p.name))


def _unreadable(error, path):
    return UserError(
        f"{error.filename or path}: cannot be read ({first_line(error)}): it may be undamaged, so "
        "no older checkpoint is used; make it readable for this user"
    )


def verify(checkpoint: Path, files=(MODEL, OPTIMIZER, STATE)) -> str | None:
    """Check files of a checkpoint against its SHA256SUMS; return the error, or None if valid.

    Raises:
        UserError: if a file exists but cannot be read. It may be undamaged.
    """
    try:
        lines = read_bytes(checkpoint / SUMS).decode().splitlines()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        for name in files:
            if name not in sums:
                return f"{SUMS} does not list {name}"
            if sha256(checkpoint / name) != sums[name]:
                return f"the checksum of {name} is wrong"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
        return first_line(error)
    except OSError as error:
        raise _unreadable(error, checkpoint) from None
    return None


def newest_checkpoint(run_dir: Path, files=(MODEL, OPTIMIZER, STATE)) -> Path | None:
    """Return the newest valid checkpoint of a run, or None if the run has no checkpoints.

    Prints a warning on stderr for each corrupted checkpoint that is skipped.

    Raises:
        UserError: if all checkpoints are corrupted, or one cannot be read.
    """
    found = checkpoints(run_dir)
    for checkpoint in reversed(found):
        wrong = verify(checkpoint, files)
        if wrong is None:
            return checkpoint
        print(
            f"warning: {checkpoint} is corrupted ({wrong}): trying the previous checkpoint",
            file=sys.stderr,
            flush=True,
        )
    if found:
        raise UserError(
            f"{run_dir}: all {len(found)} checkpoints are corrupted: restore one, or start a new "
            "run in another folder"
        )
    return None


def load_checkpoint(
    path: Path, optimizer: bool = False, verified: bool = False, weights: bool = True
) -> dict[str, Any]:
    """Return the fields of `State`, and the tensors by name in "model" and "optimizer".

    Args:
        path: a checkpoint folder; a run folder, for its newest valid checkpoint; a ckpt.pt of
            nanoGPT (see `nanogpt.load_nanogpt`); or gpt2, gpt2-medium, gpt2-large or gpt2-xl, for
            weights from the Hugging Face Hub.
        optimizer: if False, "optimizer" is None.
        verified: whether the checkpoint folder `path` has been compared with its checksums.
        weights: if False, "model" is empty. Only for checkpoints and run folders.

    Raises:
        UserError: if there is no checkpoint, or it is corrupted or of another format version.
    """
    with file_errors(path, "name a run folder, or a checkpoint"):
        return _load_checkpoint(Path(path), optimizer, verified, weights)


def _load_checkpoint(path, optimizer, verified, weights):
    if str(path) in SIZES and not path.exists():
        return load_pretrained(str(path))
    if path.is_file():
        return load_nanogpt(path)
    files = (STATE,) + (MODEL,) * weights + (OPTIMIZER,) * optimizer
    if checkpoints(path):
        path = newest_checkpoint(path, files) or path
    elif not (path / SUMS).exists():
        raise UserError(
            f"{path}: has no checkpoint: name a run folder that has one, or a {FOLDER}/step_* "
            "folder"
        )
    elif not verified and (wrong := verify(path, files)):
        raise UserError(f"{path} is corrupted ({wrong}): use another checkpoint")
    try:
        text = read_bytes(path / STATE)
        version = decode_json(text, _Version).format_version
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path}: checkpoint format {version}, but this version of the code reads format "
                f"{FORMAT_VERSION}: use the version that wrote it"
            )
        state = decode_json(text, State)
        checkpoint: dict[str, Any] = {f.name: getattr(state, f.name) for f in fields(State)}
        checkpoint["model"] = load_file(path / MODEL) if weights else {}
        checkpoint["optimizer"] = load_file(path / OPTIMIZER) if optimizer else None
        n_blocks = len({name.split(".")[2] for name in checkpoint["model"] if ".h." in name})
        if weights and n_blocks != state.n_blocks:
            raise ValueError(f"n_blocks is {state.n_blocks}, but there are {n_blocks} blocks")
        for name, w in checkpoint["model"].items():
            if w.dtype != torch.float32:
                raise ValueError(f"{name} has type {w.dtype}, expected {torch.float32}")
        for name, same in TIED.items() if weights else ():
            checkpoint["model"][name] = checkpoint["model"][same]
    except UserError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{path} is not a valid checkpoint ({first_line(error)})") from None
    return checkpoint


def tokenizer_folders(path: Path, checkpoint: dict[str, Any]) -> list[Path]:
    """Return where the tokenizer.json of a checkpoint may be: its run folder, or the corpus.

    Args:
        path: the run folder or the checkpoint, from which `checkpoint` was loaded.
    """
    run_dir = path.absolute().parent.parent if (path / SUMS).exists() else path
    return [run_dir, path, Path(checkpoint["config"].get("data_dir", ""))]


def optimizer_state_from(
    tensors: dict[str, torch.Tensor], params: dict[str, torch.nn.Parameter]
) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
    """Return a checkpoint's optimizer state by parameter, placed and sharded like the parameter.

    Raises:
        UserError: if names, shapes or types do not match `params`, or a step count is not valid.
            AdamW's fused kernel does not check them and would read out of bounds.
    """
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        param, _, key = name.rpartition("/")
        by_name.setdefault(param, {})[key] = tensor
    result: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    for name, state in by_name.items():
        shape = params[name].shape if name in params else None
        expected = {"exp_avg": shape, "exp_avg_sq": shape, "step": torch.Size()}
        fits = shape is not None and {k: t.shape for k, t in state.items()} == expected
        fits = fits and all(t.dtype == torch.float32 for t in state.values())
        if not fits or not 0 <= state["step"].item() < 2**53:
            raise UserError(
                f"{OPTIMIZER}: {name}: the optimizer state does not match the model: the file is "
                "corrupted, use an earlier checkpoint"
            )
        p = params[name]
        result[p] = {key: shard_like(tensor, p) for key, tensor in state.items()}
    return result


# --------------------------------------------------------------------------------------------------
# writing


class CheckpointWriter:
    """Writes checkpoints in a background thread while training continues.

    A checkpoint is written to a temporary folder, flushed to disk, and then renamed. Afterwards old
    checkpoints are removed, except the `keep` newest and those at the steps in `milestones`. If a
    checkpoint cannot be written, or its weights are not finite, it is skipped with a warning, and
    `failure` holds the reason until another checkpoint succeeds.

    Sharded tensors are gathered one at a time, and rank 0 writes them. The files do not depend on
    whether or how a run was sharded.

    Args:
        keep, milestones: see above.
        master: True on rank 0. The writers of all other ranks only take part in gathering.
    """

    def __init__(self, run_dir: Path, keep: int, milestones: set[int], master: bool = True):
        self.folder, self.keep, self.milestones = Path(run_dir, FOLDER), keep, milestones
        self.master = master
        self.failure: str | None = None
        self._host: dict[tuple[str, str], torch.Tensor] = {}  # buffers reused by all checkpoints
        self._memory: list[torch.Tensor] = []  # that the buffers are parts of
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future | None = None

    def save(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Start writing a checkpoint, after waiting for the previous one.

        Collective if the model is sharded: all ranks must call it.

        Args:
            state: the fields of `State` except format_version.
        """
        self.wait()
        names: dict[torch.Tensor, str] = {p: name for name, p in model.named_parameters()}
        optimizer_tensors = {
            f"{names[p]}/{key}": t
            for p, entry in optimizer.state.items()
            for key, t in entry.items()
        }
        weights = {name: t for name, t in model.state_dict().items() if name not in TIED}
        sources = {MODEL: weights, OPTIMIZER: optimizer_tensors}
        if self.master:
            self._allocate(
                {(f, name): t for f, group in sources.items() for name, t in group.items()}
            )
        tensors = {
            f: {name: self._copy((f, name), t) for name, t in group.items()}
            for f, group in sources.items()
        }
        if not self.master:
            return
        on_gpu = next(model.parameters()).is_cuda
        copied = torch.cuda.current_stream().record_event() if on_gpu else None
        self._writing = self._thread.submit(self._write, tensors, state, copied)

    def busy(self) -> bool:
        """Return whether a checkpoint is being written."""
        return self._writing is not None and not self._writing.done()

    def wait(self) -> None:
        """Block until the last checkpoint is on disk or has failed."""
        if self._writing:
            self._writing.result()
            self._writing = None

    def close(self) -> None:
        """Wait for the last checkpoint and release the buffers."""
        self.wait()
        self._thread.shutdown()
        self._host.clear()
        self._memory.clear()

    def _allocate(self, tensors):
        """Allocate a buffer for each tensor that has none, pinned if the tensor is on a GPU."""
        new = {
            key: t
            for key, t in tensors.items()
            if key not in self._host or self._host[key].shape != t.shape
        }
        if not new:
            return
        sizes = [-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in new.values()]
        memory = torch.empty(sum(sizes), dtype=torch.uint8)
        if any(t.is_cuda for t in new.values()):
            pin(memory)
        self._memory.append(memory)
        for (key, t), part in zip(new.items(), memory.split(sizes)):
            self._host[key] = part[: t.nbytes].view(t.dtype).view(t.shape)

    def _copy(self, key, tensor):
        tensor = full_tensor(tensor.detach())
        return self._host[key].copy_(tensor, non_blocking=True) if self.master else None

    def _write(self, tensors, state, copied):
        final = self.folder / f"step_{state['step']:08d}"
        partial, former = (self.folder / f".{kind}" for kind in ("partial", "former"))
        self.failure = None
        try:
            if copied:
                copied.synchronize()
            bad = next((name for name, t in tensors[MODEL].items() if not t.isfinite().all()), None)
            if bad:
                raise ValueError(f"{bad} is not finite")
            self.folder.mkdir(exist_ok=True)  # not its parents: the run's folder must still exist
            for folder in (partial, former):  # left by an interrupted write
                if folder.is_symlink():
                    folder.unlink()
                shutil.rmtree(folder, ignore_errors=True)
            partial.mkdir()
            text = encode_json({"format_version": FORMAT_VERSION} | state, indent=1)
            (partial / STATE).write_text(text + "\n", "utf-8")
            for name, contents in tensors.items():
                save_file(contents, partial / name)
                # safetensors makes its files private, whatever the umask.
                shutil.copymode(partial / STATE, partial / name)
            sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(partial.iterdir())]
            (partial / SUMS).write_text("".join(sums), "utf-8")
            for path in (*partial.iterdir(), partial):
                fsync(path)
            if final.exists():  # corrupted, or from before the run was resumed at an earlier step
                final.rename(former)
            partial.rename(final)
            fsync(self.folder)
            shutil.rmtree(former, ignore_errors=True)
            self._remove_old(final, state["step"])
        except (OSError, SafetensorError, ValueError) as error:
            self.failure = f"step {state['step']}: checkpoint not written ({first_line(error)})"
            shutil.rmtree(partial, ignore_errors=True)
            remaining = "earlier checkpoints remain" if any(self.folder.glob("step_*")) else ""
            tqdm.write(
                f"warning: {self.failure}; {remaining or 'there is no earlier one'}",
                file=sys.stderr,
            )

    def _remove_old(self, final, step):
        others = {p: int(p.name[5:]) for p in checkpoints(self.folder.parent) if p != final}
        # Later ones are corrupted, because the run resumed from an earlier checkpoint.
        later = [p for p, s in others.items() if s > step]
        old = [p for p, s in others.items() if s < step and s not in self.milestones]
        for path in later + old[: max(0, len(old) - self.keep + 1)]:
            shutil.rmtree(path, ignore_errors=True)
