"""Run all measurements on one GPU, in steps of at most ten minutes, the most important first.

    python benchmarks/gpu.py --nanogpt DIR --build_nanogpt DIR

Each step is a process of its own and writes benchmarks/NAME_gpu.json with the command, the device,
the versions and the date. A step whose file exists is skipped, so an interrupted series continues
with the same command, and a step is repeated by deleting its file. A step that fails does not stop
the others. A rehearsal runs all steps at a tiny size, on any device:

    python benchmarks/gpu.py --rehearsal --out out/rehearsal
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hellaswag
from benchmarks.common import ROOT, machine, write_report
from stagewise.device import pick_device
from stagewise.errors import UserError, report_user_errors

TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--n_vocab=257"]
TINY += ["--tokens_per_step=512", "--rounds=2", "--min_seconds=0", "--compile=none"]
MICRO_BATCHES = (32, 16, 64, 128)
TINY_MICRO_BATCHES = (4, 8)
BACKENDS = ("flash", "cudnn", "efficient")


@dataclass
class Args:
    """Run the tests and the benchmarks on a GPU."""

    nanogpt: Path | None = None
    """A checkout of nanoGPT to compare with."""
    build_nanogpt: Path | None = None
    """A checkout of build-nanogpt to compare with."""
    hellaswag: Path | None = None
    """File in HellaSwag's format. Default: the official validation set (downloaded once)."""
    only: tuple[str, ...] = ()
    """Names of the steps to run; default: all. --list prints them."""
    list: bool = False
    """Print the names and commands of the steps, and whether they are done."""
    minutes: float = 10.0
    """Time limit of a step."""
    out: Path = Path("benchmarks")
    """Folder for the results."""
    rehearsal: bool = False
    """Run all steps at a tiny size, on any device."""


def steps(args: Args) -> dict[str, list[str]]:
    """Return the arguments of Python for each step, the most important first."""
    tests = ["-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short"]
    result = {"tests": [*tests, "tests/test_gpu.py"]}
    if not args.rehearsal:
        result["more_tests"] = [*tests, "--ignore=tests/test_gpu.py"]
    if not (ROOT / "data/stdlib/meta.json").exists():
        result["demo_corpus"] = ["fineweb.py", "--source=stdlib", "--out=data/stdlib"]
    demo = ["train.py", "configs/demo.py", "--device=auto", "--init_from=auto"]
    demo += ["--out_dir=out/demo_gpu"]
    tiny_run = ["--steps=3", "--eval_tokens=512", "--hellaswag_data=none"]
    result["demo"] = [*demo, *(tiny_run if args.rehearsal else ["--compile=blocks"])]

    def step(*options, baseline=True):
        model = ["--stages=1"] if baseline else []
        size = TINY if args.rehearsal else []
        return ["benchmarks/step.py", "configs/gpt2_124m.py", *options, *model, *size]

    folders = {"nanogpt": args.nanogpt, "build_nanogpt": args.build_nanogpt}
    peers = [f"--peer={name}={folder}" for name, folder in folders.items() if folder]
    whole = ["--variant=erf" if args.rehearsal else "--variant=model"]
    for n in TINY_MICRO_BATCHES if args.rehearsal else MICRO_BATCHES:
        result[f"step_micro_{n}"] = step(f"--batch_size={n}", *whole)
        if peers:
            # In a process of its own, because it needs more memory. The baseline is timed again.
            result[f"step_micro_{n}_peers"] = step(f"--batch_size={n}", *peers)
    first = (TINY_MICRO_BATCHES if args.rehearsal else MICRO_BATCHES)[0]
    result["profile"] = step(f"--batch_size={first}", "--profile=True")
    for backend in BACKENDS[:1] if args.rehearsal else BACKENDS:
        result[f"attention_{backend}"] = step(f"--batch_size={first}", f"--variant={backend}")
    for stages in (2,) if args.rehearsal else (4, 12):
        size = [f"--stages={stages}", f"--batch_size={first}", "--rounds=3", "--steps=240"]
        result[f"phases_s{stages}"] = step(*size, baseline=False)
    if args.rehearsal:  # the demo's model and tokenizer, which need no download
        scored = ["--data=data/stdlib/hellaswag.jsonl", "--checkpoint=out/demo_gpu"]
        scored += ["--limit=4", "--rounds=1"]
    else:
        scored = [f"--data={args.hellaswag or hellaswag.DEFAULT_PATH}", "--limit=0"]
        scored += [f"--peer={args.build_nanogpt}"] if args.build_nanogpt else []
    result["scoring"] = ["benchmarks/scoring.py", *scored]
    sizes = ["--block_size=32", "--rounds=1"] if args.rehearsal else ["--sequences=16"]
    result["saving"] = ["benchmarks/saving.py", *sizes]
    for command in result.values():
        if command[0].startswith("benchmarks/"):
            command.append("--json={file}")
    return result


def run(command: list[str], seconds: float) -> int | None:
    """Run Python with the arguments `command`; return its exit status, or None after the limit."""
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, start_new_session=True) as process:
        try:
            return process.wait(seconds)
        except BaseException as error:
            # Also kills the processes that it has started, for example those that compile.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return None
            raise


def main(args: Args) -> None:
    device = pick_device("auto")
    if device.type != "cuda" and not (args.rehearsal or args.list):
        raise UserError("no CUDA GPU is available: use --rehearsal to test the script without one")
    args.out = args.out.absolute()  # the steps run in the repository's folder
    for name in ("nanogpt", "build_nanogpt", "hellaswag"):
        path = getattr(args, name)
        if path and not path.exists():
            raise UserError(f"--{name}={path} does not exist")
        setattr(args, name, path and path.absolute())
    all_steps = steps(args)
    for name in args.only:
        if name not in all_steps:
            raise UserError(f"--only={name} is unknown: use {', '.join(all_steps)}")
    files = {name: args.out / f"{name}_gpu.json" for name in all_steps}
    if args.list:
        for name, command in all_steps.items():
            print(f"{name:24s} {'done' if files[name].exists() else '-':5s} {shlex.join(command)}")
        return
    failed = []
    for name in args.only or all_steps:
        file = files[name]
        if file.exists():
            print(f"--- {name}: {file} exists")
            continue
        if name == "scoring" and not (args.hellaswag or args.rehearsal):
            try:
                hellaswag.download()
            except UserError as error:
                failed.append(name)
                print(f"--- {name}: failed: {error}")
                continue
        command = [word.replace("{file}", str(file)) for word in all_steps[name]]
        print(f"--- {name}: python {shlex.join(command)}", flush=True)
        start = time.perf_counter()
        status = run(command, 60 * args.minutes)
        elapsed = time.perf_counter() - start
        if status != 0:
            failed.append(name)
            how = f"stopped after {args.minutes:g} minutes" if status is None else f"exit {status}"
            print(f"--- {name}: failed: {how}", flush=True)
        elif not file.exists():  # the step is not a benchmark
            ran = machine(device) | {"command": f"python {shlex.join(command)}"}
            write_report(file, {"machine": ran, "seconds": elapsed})
    if failed:
        raise UserError(f"failed: {', '.join(failed)}: use the same command to run them again")


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, use_underscores=True))
