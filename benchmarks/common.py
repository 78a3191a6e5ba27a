"""Shared by the benchmarks: the machine, reports, and other projects' GPT-2 implementations."""

import ast
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import torch

from model import GPTConfig
from stagewise.device import cpu_name, device_name

ROOT = Path(__file__).resolve().parent.parent


def synchronize(device: torch.device) -> None:
    """Return when the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> dict[str, str]:
    """Return where and when a benchmark ran, at which commit, and what the environment sets.

    The environment variable COMMIT names the commit where there is no git.
    """
    commit = os.environ.get("COMMIT", "")
    with contextlib.suppress(OSError):
        git = ["git", "describe", "--always", "--dirty"]
        described = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        commit = described or commit
    # Folders do not affect a measurement, and torch sets one itself.
    names = re.compile(r"(TORCH|ENABLE_|CUBLAS|PYTORCH)(?!.*_DIR$)")
    settings = {k: v for k, v in os.environ.items() if names.match(k)}
    return {
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "commit": commit,
        "settings": " ".join(f"{k}={v}" for k, v in sorted(settings.items())),
    }


def write_report(path: Path, report: dict) -> None:
    """Write the results of a benchmark as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, default=str) + "\n")
    print(f"written to {path}")


def load_definitions(path: Path) -> types.ModuleType:
    """Return a module with the imports, classes and functions of a script, without running it.

    Imports of modules that are not installed, or that lie beside the script, are left out.
    """
    body: list[ast.stmt] = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
            if not all(_can_be_imported(name, path.parent) for name in imported):
                continue
        elif not isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            continue
        body.append(node)
    module = types.ModuleType(f"peer_{path.stem}")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(ast.Module(body, type_ignores=[]), str(path), "exec"), vars(module))
    return module


def _can_be_imported(name, folder):
    installed = importlib.util.find_spec(name.split(".")[0]) is not None
    return installed and not (folder / f"{name}.py").exists()


def transformers_gpt2(model_config: GPTConfig) -> torch.nn.Module:
    """Return transformers' GPT-2 of the same sizes, with random weights and without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model_config
    options: dict[str, Any] = dict(n_positions=c.block_size, vocab_size=c.vocab_size)
    options |= dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
    options |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    options |= dict(bos_token_id=0, eos_token_id=0, attn_implementation="sdpa")
    return GPT2LMHeadModel(GPT2Config(**options))
