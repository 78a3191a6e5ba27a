"""Run the tests and all measurements on one GPU, the most important first.

    python benchmarks/gpu.py --nanogpt DIR --build_nanogpt DIR [--minutes 9] [--archive FILE.tar.gz]

Each measurement runs in its own process. It writes NAME.json with the command, the device, the
versions and the date, and its output to NAME.log. A step whose JSON file exists is skipped, so the
same command continues an interrupted series. To repeat a step, delete its JSON file. A step that
fails or exceeds its time limit does not stop the others. With --minutes, a step is started only if
its time limit fits into the remaining time. A rehearsal runs all steps at a tiny size, on any
device:

    python benchmarks/gpu.py --rehearsal --out out/rehearsal
"""

import contextlib
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hellaswag
from benchmarks.common import ROOT, machine, write_report
from stagewise.device import pick_device
from stagewise.errors import UserError, report_user_errors

TINY_MODEL = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--compile=none"]
TINY = [*TINY_MODEL, "--n_vocab=257", "--tokens_per_step=512", "--rounds=2", "--min_seconds=0"]
# The model of a study: 10M parameters, trained on bytes.
NARROW = ["--n_layer=12", "--n_head=4", "--n_embd=256", "--block_size=512", "--n_vocab=257"]
SAVING_RESULTS = 15  # seconds reserved for writing the archive


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
    """Print the names, time limits and commands of the steps, and whether they are done."""
    minutes: float | None = None
    """Time limit for all steps together. The same command continues. Default: no limit."""
    out: Path = Path("out/gpu")
    """Folder for the results."""
    archive: Path | None = None
    """Also write the results and logs to this .tar.gz, even if steps fail."""
    rehearsal: bool = False
    """Run all steps at a tiny size, on any device."""


@dataclass
class Step:
    """A process: Python with the arguments `command`."""

    command: list[str]
    seconds: float  # time limit
    env: dict[str, str] = field(default_factory=dict)


def steps(args: Args) -> dict[str, Step]:
    """Return the steps by name, the most important first."""
    tests = ["-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short"]
    if importlib.util.find_spec("xdist"):
        tests += ["-n", "4"]
    # Not all of them: a file that cannot be imported would stop the tests of the others.
    files = [] if args.rehearsal else ["tests/test_train.py", "tests/test_model.py"]
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "4"}
    result = {"tests": Step([*tests, "tests/test_gpu.py", *files], 400, threads)}

    def step(name, seconds, *options, env=None, stages=1):
        small = TINY if args.rehearsal else ["--rounds=4"]
        command = ["benchmarks/step.py", "configs/gpt2_124m.py", f"--stages={stages}"]
        result[name] = Step([*command, *small, *options], seconds, env or {})

    def micro_batch(n):
        return f"--batch_size={4 if args.rehearsal else n}"

    nanogpt = [f"--peer=nanogpt={args.nanogpt}"] if args.nanogpt else []
    build = [f"--peer=build_nanogpt={args.build_nanogpt}"] if args.build_nanogpt else []
    whole = "--variant=erf" if args.rehearsal else "--variant=model"
    step("micro_64", 200, micro_batch(64), whole, *nanogpt)
    step("micro_32", 150, micro_batch(32), *nanogpt)
    step("micro_16", 200, micro_batch(16), *nanogpt, *build)
    few = ["--rounds=2"] if args.rehearsal else ["--tokens_per_step=131072", "--rounds=2"]
    step("profile", 90, micro_batch(64), *few, "--profile=True")
    for backend in ("flash",) if args.rehearsal else ("flash", "cudnn", "efficient"):
        step(f"attention_{backend}", 90, micro_batch(64), f"--variant={backend}")

    # Candidates for a faster step. Those that set environment variables are compared with micro_64.
    step("bf16_residual", 120, micro_batch(64), "--variant=bf16_residual", "--dtype=bfloat16")
    step("fp8_head", 120, micro_batch(64), "--variant=fp8_head")
    if importlib.util.find_spec("liger_kernel"):
        step("liger_loss", 120, micro_batch(64), "--variant=liger_loss")
    step("cublaslt", 90, micro_batch(64), env={"TORCH_BLAS_PREFER_CUBLASLT": "1"})
    autotune = {"TORCHINDUCTOR_MAX_AUTOTUNE_GEMM": "1", "ENABLE_PERSISTENT_TMA_MATMUL": "1"}
    step("autotune_gemm", 240, micro_batch(64), env=autotune)
    coordinate = {"TORCHINDUCTOR_COORDINATE_DESCENT_TUNING": "1"}
    step("coordinate_descent", 150, micro_batch(64), env=coordinate)
    narrow = [] if args.rehearsal else [*NARROW, "--tokens_per_step=131072"]
    step("narrow", 150, *narrow, micro_batch(256), whole, *nanogpt)

    for stages in (2,) if args.rehearsal else (4, 12):
        options = [micro_batch(32), *few, "--steps=240"]
        step(f"phases_s{stages}", 60 + 15 * stages, *options, stages=stages)
    if args.rehearsal:  # the demo's model and tokenizer, which need no download
        scored = ["--data=data/stdlib/hellaswag.jsonl", "--checkpoint=out/demo_gpu", "--rounds=1"]
        limit = 4
    else:
        scored = [f"--data={args.hellaswag or hellaswag.DEFAULT_PATH}"]
        limit = 1500
    demo = ["train.py", "configs/demo.py", "--device=auto", "--init_from=auto"]
    demo += ["--out_dir=out/demo_gpu"]
    tiny_run = ["--steps=3", "--eval_tokens=512", "--hellaswag_data=none"]
    if not (ROOT / "data/stdlib/meta.json").exists():
        command = ["fineweb.py", "--source=stdlib", "--out=data/stdlib"]
        result["demo_corpus"] = Step(command, 60)
    result["demo"] = Step([*demo, *(tiny_run if args.rehearsal else ["--compile=blocks"])], 150)
    # A vocabulary as large as GPT-2's, so that the loss has several chunks. The reference in fp32
    # takes the longest, hence the small steps.
    vocabulary, tokens, rows = (300, 512, 16) if args.rehearsal else (49152, 32_768, 32)
    corpus = args.out / "corpus"
    command = ["fineweb.py", "--source=stdlib", f"--tokenizer=bpe:{vocabulary}", f"--out={corpus}"]
    result["losses_corpus"] = Step(command, 120)
    command = ["benchmarks/losses.py", "configs/gpt2_124m.py", *(TINY_MODEL * args.rehearsal)]
    command += [f"--data_dir={corpus}", "--steps=200", "--warmup_steps=50", "--lr_schedule=wsd"]
    command += [f"--tokens_per_step={tokens}", f"--batch_size={rows}", "--dtype=bfloat16"]
    command += [f"--variant={name}" for name in ("erf", "bf16_residual", "fp8_head")]
    command += [f"--nanogpt={args.nanogpt}"] if args.nanogpt else []
    result["losses"] = Step(command, 300)
    peer = [f"--peer={args.build_nanogpt}"] if args.build_nanogpt and not args.rehearsal else []
    command = ["benchmarks/scoring.py", *scored]
    result["scoring_all"] = Step([*command, f"--limit={4 * args.rehearsal}", "--alone=True"], 90)
    result["scoring"] = Step([*command, f"--limit={limit}", *peer], 150)
    # Peers may need more memory than there is.
    step("micro_128", 150, micro_batch(128), *nanogpt)
    sizes = ["--block_size=32", "--rounds=1"] if args.rehearsal else ["--sequences=16"]
    result["saving"] = Step(["benchmarks/saving.py", *sizes], 120)
    for s in result.values():
        if s.command[0].startswith("benchmarks/"):
            s.command.append("--json={file}")
    return result


def run(command: list[str], seconds: float, env: dict[str, str], log: Path) -> int | None:
    """Run Python with the arguments `command`; return its exit status, or None after the limit.

    Its output is shown and also written to the file `log`.
    """
    script = 'set -o pipefail; "$@" 2>&1 | tee "$LOG"'
    words = ["bash", "-c", script, "run", sys.executable, *command]
    env = os.environ | env | {"LOG": str(log)}
    with subprocess.Popen(words, cwd=ROOT, env=env, start_new_session=True) as process:
        try:
            return process.wait(seconds)
        except BaseException as error:
            # Also kills the processes that it has started, for example those that compile. They
            # would slow down whatever runs next.
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
    files = {name: args.out / f"{name}.json" for name in all_steps}
    if args.list:
        for name, s in all_steps.items():
            done = "done" if files[name].exists() else "-"
            words = [f"{key}={value}" for key, value in s.env.items()]
            print(f"{name:20s} {done:5s} {s.seconds:4.0f} s  {shlex.join([*words, *s.command])}")
        return

    def terminate(number, frame):
        raise SystemExit(128 + number)  # so that `run` ends its process

    signal.signal(signal.SIGTERM, terminate)
    args.out.mkdir(parents=True, exist_ok=True)
    failed, left = [], []
    try:
        deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
        for name in args.only or all_steps:
            s, file = all_steps[name], files[name]
            if file.exists():
                print(f"--- {name}: {file} exists")
            elif time.monotonic() + s.seconds + SAVING_RESULTS > deadline:
                left.append(name)
            elif not run_step(name, s, file, device, args):
                failed.append(name)
    finally:
        if args.archive:
            with tarfile.open(args.archive, "w:gz") as archive:
                archive.add(args.out, "gpu")
    if left:
        print(f"no time for: {', '.join(left)}; use the same command to continue")
    if failed:
        raise UserError(f"failed: {', '.join(failed)}: use the same command to run them again")


def run_step(name: str, s: Step, file: Path, device, args: Args) -> bool:
    """Run a step, and return whether it succeeded."""
    if name.startswith("scoring") and not (args.hellaswag or args.rehearsal):
        try:
            hellaswag.download()
        except UserError as error:
            print(f"--- {name}: failed: {error}")
            return False
    command = [word.replace("{file}", str(file)) for word in s.command]
    print(f"--- {name}: python {shlex.join(command)}", flush=True)
    start = time.perf_counter()
    status = run(command, s.seconds, s.env, file.with_suffix(".log"))
    elapsed = time.perf_counter() - start
    if status != 0:
        how = f"stopped after {s.seconds:g} s" if status is None else f"exit {status}"
        print(f"--- {name}: failed: {how}", flush=True)
        return False
    if not file.exists():  # the step is not a benchmark
        ran = machine(device) | {"command": f"python {shlex.join(command)}"}
        write_report(file, {"machine": ran, "seconds": elapsed})
    print(f"--- {name}: {elapsed:.0f} s", flush=True)
    return True


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(Args, use_underscores=True))
