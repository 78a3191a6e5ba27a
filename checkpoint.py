"""Checkpoints: whole or not at all, checked before they are used, read without running code.

    RUN_DIR/checkpoints/step_00001000/model.safetensors       weights by nanoGPT's names, wte once for embedding and head
                                      optimizer.safetensors   AdamW's state: NAME/exp_avg, NAME/exp_avg_sq, NAME/step
                                      state.json              all else: position, options, plan, what is needed to rebuild both
                                      SHA256SUMS              of the three, as sha256sum -c reads it
"""

import dataclasses
import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from errors import UserError, first_line
from files import fsync, sha256
from model import GPT, GPTConfig
from pretrained import SIZES, load_pretrained

FOLDER = "checkpoints"
MODEL, OPTIMIZER, STATE, SUMS = "model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"
FIELDS = {  # of state.json
    "model_args": dict,
    "n_blocks": int,
    "step": int,
    "seconds": (int, float),
    "health": dict,
    "config": dict,
    "phases": list,
    "n_windows": int,
    "tokenizer": str,
}
TIED = {"lm_head.weight": "transformer.wte.weight"}  # safetensors stores no tensor twice


# ---------------------------------------------------------------------------------------------------------------------
# reading


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(p for p in Path(run_dir, FOLDER).glob("step_*") if re.fullmatch(r"step_\d{8}", p.name))


def damage(checkpoint: Path, files=(MODEL, OPTIMIZER, STATE)) -> str | None:
    """What is wrong with the files of a checkpoint, by its SHA256SUMS; None where nothing is."""
    try:
        lines = (checkpoint / SUMS).read_text().splitlines()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        for name in files:
            if name not in sums:
                return f"{SUMS} does not name {name}"
            if sha256(checkpoint / name) != sums[name]:
                return f"{name} is not what was written"
    except (OSError, ValueError) as error:
        return first_line(error)
    return None


def newest_checkpoint(run_dir: Path, files=(MODEL, OPTIMIZER, STATE)) -> Path | None:
    """The newest checkpoint of a run that is undamaged; None where the run has none at all.

    Says on stderr which it passes over. Raises UserError where all are damaged.
    """
    found = checkpoints(run_dir)
    for checkpoint in reversed(found):
        wrong = damage(checkpoint, files)
        if wrong is None:
            return checkpoint
        print(f"warning: {checkpoint} is damaged ({wrong}): the checkpoint before it is used", file=sys.stderr, flush=True)
    if found:
        raise UserError(f"{run_dir}: all its {len(found)} checkpoints are damaged: start again in another folder, or restore one")
    return None


def load_checkpoint(path: Path, optimizer: bool = False) -> dict:
    """FIELDS of a checkpoint, and its tensors by name: "model", and "optimizer" where asked for, in CPU memory.

    path: a checkpoint's folder, or a run's, for its newest undamaged one; or gpt2, gpt2-medium, gpt2-large, gpt2-xl, from the
    Hugging Face hub. Raises UserError where there is none.
    """
    path = Path(path)
    if str(path) in SIZES and not path.exists():
        return load_pretrained(str(path))
    files = (MODEL, STATE, OPTIMIZER) if optimizer else (MODEL, STATE)
    if checkpoints(path):
        path = newest_checkpoint(path, files)
    elif not (path / SUMS).exists():
        raise UserError(f"{path}: no checkpoint there; name a run folder that has one, or one of its {FOLDER}/step_*")
    elif wrong := damage(path, files):
        raise UserError(f"{path} is damaged ({wrong}): name another checkpoint")
    try:
        checkpoint = json.loads((path / STATE).read_text())
        checkpoint["model"] = load_file(path / MODEL)
        checkpoint["optimizer"] = load_file(path / OPTIMIZER) if optimizer else None
        for name, same in TIED.items():
            checkpoint["model"][name] = checkpoint["model"][same]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path}: is no readable checkpoint ({first_line(error)})") from None
    missing = [field for field, kind in FIELDS.items() if not isinstance(checkpoint.get(field), kind)]
    if not missing:
        missing = [name for name in ("seed", "tokens_per_step", "hellaswag_data", "data_dir") if name not in checkpoint["config"]]
        missing += [f.name for f in dataclasses.fields(GPTConfig) if f.name not in checkpoint["model_args"]]
    if missing:
        raise UserError(f"{path}: is no checkpoint of this train.py: it lacks {', '.join(missing)}")
    return checkpoint


def model_from(checkpoint: dict, device="cpu") -> GPT:
    """The model of a checkpoint, with the blocks that it had grown. Raises UserError where the weights do not fit."""
    try:
        model = GPT(GPTConfig(**checkpoint["model_args"]), n_blocks=0, device="meta")
        model.grow(checkpoint["n_blocks"], seed=0)
        model.to_empty(device=device)
        model.transformer.wte.weight = model.lm_head.weight  # to_empty unties them
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        said = str(error).splitlines()[-1].strip()
        raise UserError(f"the checkpoint's weights do not fit its own model_args: {said}") from None
    return model


def load_moments(optimizer: torch.optim.Optimizer, model: GPT, tensors: dict[str, torch.Tensor]) -> None:
    """Take over a checkpoint's optimizer state, and nothing else: options such as weight_decay are this run's own.

    Raises UserError where it belongs to other parameters: AdamW's kernel would read beyond their end.
    """
    params = dict(model.named_parameters())
    states = {}
    for name, tensor in tensors.items():
        param, _, key = name.rpartition("/")
        states.setdefault(param, {})[key] = tensor
    for name, state in states.items():
        shape = params[name].shape if name in params else None
        expected = {"exp_avg": shape, "exp_avg_sq": shape, "step": torch.Size()}
        if shape is None or {key: tensor.shape for key, tensor in state.items()} != expected:
            raise UserError(f"{OPTIMIZER}: {name}: optimizer state does not fit the model: the file is damaged, use an earlier one")
        optimizer.state[params[name]] = {key: tensor.to(params[name].device) for key, tensor in state.items()}


# ---------------------------------------------------------------------------------------------------------------------
# writing


class CheckpointWriter:
    """Writes checkpoints in the background: training goes on as soon as the tensors are copied to host memory.

    A checkpoint is written beside its place and moved there when it is whole and on the disk. Then the oldest ones go,
    but for the `keep` newest and those of the steps `milestones`. A checkpoint that cannot be written, or whose weights
    are no numbers, is left out with a warning, and `failure` says why until the next one succeeds.
    """

    def __init__(self, run_dir: Path, keep: int, milestones: set[int]):
        self.folder, self.keep, self.milestones = Path(run_dir, FOLDER), keep, milestones
        self.failure = None
        self._host = {}  # memory that all checkpoints are copied to
        self._thread, self._writing = ThreadPoolExecutor(1), None

    def save(self, model: GPT, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Begin to write a checkpoint: `state` has FIELDS. Waits for the one before."""
        self.wait()
        names = {p: name for name, p in model.named_parameters()}
        moments = {f"{names[p]}/{key}": t for p, entry in optimizer.state.items() for key, t in entry.items()}
        tensors = {
            MODEL: {name: self._copy(MODEL, name, t) for name, t in model.state_dict().items() if name not in TIED},
            OPTIMIZER: {name: self._copy(OPTIMIZER, name, t) for name, t in moments.items()},
        }
        copied = torch.cuda.current_stream().record_event() if model.lm_head.weight.is_cuda else None
        self._writing = self._thread.submit(self._write, tensors, state, copied)

    def wait(self) -> None:
        """Return when what was begun is on the disk, or has failed."""
        if self._writing:
            self._writing.result()
            self._writing = None

    def close(self) -> None:
        """Finish what was begun, and let go of the memory."""
        self.wait()
        self._thread.shutdown()
        self._host.clear()

    def _copy(self, file, name, tensor):
        buffer = self._host.get((file, name))
        if buffer is None:
            buffer = self._host[file, name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return buffer.copy_(tensor.detach(), non_blocking=True)

    def _write(self, tensors, state, copied):
        place = self.folder / f"step_{state['step']:08d}"
        partial, former = (self.folder / f".{kind}" for kind in ("partial", "former"))
        self.failure = None
        try:
            if copied:
                copied.synchronize()
            odd = next((name for name, t in tensors[MODEL].items() if not t.isfinite().all()), None)
            if odd:
                raise ValueError(f"{odd} is not finite")
            for folder in (partial, former):  # of a write that was interrupted
                shutil.rmtree(folder, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, contents in tensors.items():
                save_file(contents, partial / name)
            (partial / STATE).write_text(json.dumps(state, indent=1) + "\n")
            sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(partial.iterdir())]
            (partial / SUMS).write_text("".join(sums))
            for path in (*partial.iterdir(), partial):
                fsync(path)
            if place.exists():  # damaged, or of a run that was taken up again before it
                place.rename(former)
            partial.rename(place)
            fsync(self.folder)
            shutil.rmtree(former, ignore_errors=True)
            others = {p: int(p.name[5:]) for p in checkpoints(self.folder.parent) if p != place}
            beyond = [p for p, step in others.items() if step > state["step"]]  # damaged: the run went on from before them
            old = [p for p, step in others.items() if step < state["step"] and step not in self.milestones]
            for path in beyond + old[: max(0, len(old) - self.keep + 1)]:
                shutil.rmtree(path, ignore_errors=True)
        except (OSError, SafetensorError, ValueError) as error:
            self.failure = f"step {state['step']}: no checkpoint could be written ({first_line(error)})"
            shutil.rmtree(partial, ignore_errors=True)
            tqdm.write(f"warning: {self.failure}; earlier ones stay", file=sys.stderr)
