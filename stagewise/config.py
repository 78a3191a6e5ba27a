"""The options of a run: their types and ranges, config files, and the command line."""

import contextlib
import dataclasses
import difflib
import io
import runpy
import sys
import traceback
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

import tyro
from msgspec import Meta

from stagewise.errors import UserError
from stagewise.fileio import convert

CONFIGS_DIR = Path(__file__).resolve().parent.parent / "configs"
CONFIGS = {
    p.stem: f"configs/{p.relative_to(CONFIGS_DIR)}" for p in sorted(CONFIGS_DIR.rglob("*.py"))
}

Positive = Annotated[int, Meta(ge=1, lt=2**62)]
NotNegative = Annotated[int, Meta(ge=0, lt=2**62)]
Size = Annotated[int, Meta(ge=1, le=2**22)]  # larger ones overflow the number of parameters
Real = Annotated[float, Meta(ge=0, le=1e300)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]


@dataclass(frozen=True)
class Config:
    """Train a GPT-2, whole or stage by stage.

    python train.py [configs/A.py configs/B.py ...] [--key=value ...]: config files hold assignments
    `key = value`; later files and options override earlier ones. The defaults are the paper's
    baseline.
    """

    prog: ClassVar[str] = "train.py"

    # output
    out_dir: str = "out/gpt2_124m"
    """Folder of the run: config.json, schedule.json, metrics.jsonl, checkpoints/."""
    init_from: Literal["scratch", "resume", "auto"] = "scratch"
    """Start in a new folder (scratch), continue in out_dir (resume), or what applies (auto)."""
    init_weights: str = ""
    """Start with the weights of a run, a checkpoint, or gpt2; growth adds missing blocks."""
    dry_run: bool = False
    """Print the schedule and its cost, and stop. Needs no data and no GPU."""
    log_interval: Positive = 10
    """Steps between rows of metrics.jsonl; only then does the host wait for the device."""
    eval_interval: Positive = 250
    """Steps between evaluations (validation loss, HellaSwag; full context, all blocks)."""
    eval_tokens: Positive = 10_485_760
    """Validation tokens per evaluation, always the same ones; all if there are fewer."""
    checkpoint_interval: Positive = 1000
    """Steps between checkpoints; more at the end of stages and when a signal stops the run."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints to keep; those at the end of a stage are always kept."""

    # data
    data_dir: str = "data/fineweb_edu"
    """Folder of token shards and meta.json, as fineweb.py writes it."""
    verify_data: bool = False
    """Compare the sha256 of every shard with meta.json before the run starts."""
    hellaswag_data: str = "auto"
    """HellaSwag file; "auto" is the corpus's own or the official one; "none" skips it."""
    hellaswag_limit: NotNegative = 0
    """Score only the first examples of the file; 0 scores all."""

    # model
    n_layer: Size = 12
    """Blocks of the finished model, the paper's L."""
    n_head: Size = 12
    """Attention heads."""
    n_embd: Size = 768
    """Width."""
    block_size: Size = 1024
    """Context length in tokens of the finished model."""
    dropout: BelowOne = 0.0
    """Dropout probability; 0 for pretraining."""
    bias: bool = True
    """Biases in linear layers and layer norms, as in GPT-2."""

    # schedule
    stages: int = 1
    """Stages S of the incremental schedule; 1 is the baseline."""
    steps: Positive = 10_000
    """Steps of the baseline, or of all stages together."""
    continual_steps: NotNegative | Literal["match_paper_cost", "match_flops"] = 0
    """Steps after the stages that train all blocks, or until compute-matched in a metric."""
    stage_blocks: tuple[int, ...] | None = None
    """Cumulative block counts of the stages instead of even ones, for example 2 4 12."""
    phase_fractions: tuple[float, ...] | None = None
    """Relative lengths of the phases: all of them, or of phases 1 and 2. Default: equal."""
    freezing: bool = True
    """False grows without phase 1: every stage trains all its blocks."""
    phase1: Literal["paper", "released_code"] = "paper"
    """What phase 1 trains besides new blocks: "released_code" also embeddings and head."""
    growth: str = "random"
    """How new blocks are made: an operator of growth.py, such as random or stack."""
    optimizer_state: Literal["carry", "copy", "reset"] = "carry"
    """At the start of a phase: "carry" it, "copy" it to copied blocks too, or "reset" it."""
    continual_optimizer_state: Literal["carry", "reset"] = "carry"
    """The same for the continual phase; the released code resets."""
    rewarmup_steps: NotNegative = 0
    """Steps of linear learning-rate warm-up at the start of every later phase."""
    context_ramp: str = ""
    """Context length over training as START:LENGTH pairs, for example "0:512 50%:1024"."""
    tokens_per_step_ramp: str = ""
    """The same for tokens_per_step, for example "0:262144 100M:524288"."""
    skip_policy: str = "none"
    """Skips blocks in training: none, or a policy of schedule.py, such as layer_dropout."""
    skip_rate: float = 0.2
    """Highest probability with which the policy skips a block."""

    # optimizer
    tokens_per_step: Positive = 524_288
    """Tokens per optimizer step, over all processes and micro-batches."""
    batch_size: Positive = 16
    """Micro-batch of a process, in sequences of block_size tokens. Limited by memory."""
    learning_rate: Real = 6e-4
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """constant; cosine, down to min_lr; or wsd: stable, then linear decay to min_lr."""
    warmup_steps: NotNegative = 0
    """Steps of linear learning-rate warm-up at the start."""
    min_lr: Real = 6e-5
    """Learning rate at the end of "cosine" and "wsd"."""
    decay_fraction: Annotated[float, Meta(gt=0, le=1)] = 0.2
    """Fraction of all steps over which "wsd" decays."""
    weight_decay: Real = 0.1
    """AdamW's weight decay of tensors with two or more dimensions."""
    beta1: BelowOne = 0.9
    """AdamW's decay rate of the first moment."""
    beta2: BelowOne = 0.95
    """AdamW's decay rate of the second moment."""
    grad_clip: Real = 0.0
    """Maximum norm of the gradient; 0 does not clip."""
    max_skipped_steps: Positive = 10
    """Non-finite updates in a row that may be skipped before the run stops."""

    # system
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; under torchrun every process uses the GPU of its local rank."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of matrix products; "auto" is bfloat16 on GPUs of compute capability 8.0, else float32."""
    compile: Literal["blocks", "model", "none"] = "blocks"
    """torch.compile each of the "blocks", or the whole "model" again in every phase."""
    seed: Annotated[int, Meta(ge=0, lt=2**32)] = 1337
    """Seed of the weights, the order of the data, dropout and skipped blocks."""
    deterministic: bool = False
    """On a GPU, use only kernels that give the same bits every time, at some cost in speed."""
    timeout: Positive = 600
    """Seconds that a process waits for the others before the run ends."""


C = TypeVar("C", bound=Config)


def load_config(argv: list[str], config: C, quiet: bool = False) -> C:
    """Return the options of a command line: config files and --key=value options over `config`.

    Files and options apply in their order; later ones win. Unknown and ill-typed keys, in files and
    options alike, end in tyro's message, which suggests the nearest key, and exit status 2.

    Args:
        quiet: print no message; for all ranks but one.

    Raises:
        UserError: if a file cannot be run, or a value is out of range.
    """
    options: list[str] = []
    for i, arg in enumerate(argv):
        if arg.endswith(".py") and not arg.startswith("-"):
            config, options = _override(config, options, quiet), []
            try:
                config = _override(config, _file_options(arg), quiet)
            except SystemExit:
                if not quiet:
                    print(f"error: the option above is in config file {arg}", file=sys.stderr)
                raise
        elif arg in CONFIGS and not argv[max(0, i - 1)].startswith("--"):
            raise UserError(f"{arg}: did you mean {CONFIGS[arg]}?")
        elif arg in ("--dry_run", "--dry-run") and argv[i + 1 : i + 2] not in (["True"], ["False"]):
            options.append("--dry_run=True")
        else:
            options.append(arg)
    config = _override(config, options, quiet)
    check(config)
    return config


def _override(config, options, quiet):
    out, err = (io.StringIO(), io.StringIO()) if quiet else (sys.stdout, sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        return tyro.cli(
            type(config),
            args=options,
            default=config,
            prog=config.prog,
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff,),
        )


def _file_options(path: str) -> list[str]:
    if not Path(path).is_file():
        near = difflib.get_close_matches(Path(path).stem, CONFIGS, n=1)
        hint = f"did you mean {CONFIGS[near[0]]}?" if near else "there are " + ", ".join(CONFIGS)
        raise UserError(f"config file {path}: not found; {hint}")
    try:
        assigned = runpy.run_path(path)
    except Exception as error:  # whatever the user's file does wrong, name the line
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame.lineno for frame in frames if frame.filename == path]
        line = own[-1] if own else getattr(error, "lineno", None)
        where = f"config file {path}, line {line}" if line else f"config file {path}"
        raise UserError(f"{where}: {type(error).__name__}: {error}") from None
    options = []
    for key, value in assigned.items():
        if key.startswith("_") or isinstance(value, types.ModuleType):
            continue
        if isinstance(value, (tuple, list)):
            options += [f"--{key}", *map(str, value)]
        else:
            options.append(f"--{key}={value}")
    return options


def check(c: Config) -> None:
    """Check what concerns single options, and those that must fit together.

    Raises:
        UserError: naming the option.
    """
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        try:
            convert(value, field.type)
        except ValueError as error:
            needed = str(error).removeprefix("Expected ").replace("`", "")
            raise UserError(f"{field.name}={value} must be {needed}") from None
    if c.lr_schedule != "constant" and c.min_lr > c.learning_rate:
        raise UserError(
            f"min_lr={c.min_lr} must not exceed learning_rate={c.learning_rate}: {c.lr_schedule} "
            "ends there"
        )
    if c.compile == "model" and c.skip_policy != "none":
        raise UserError(
            f"compile=model would compile the model again for every set of blocks that "
            f"skip_policy={c.skip_policy} skips: use --compile=blocks"
        )
    if c.n_embd % c.n_head:
        raise UserError(f"n_embd={c.n_embd} must be a multiple of n_head={c.n_head}")


def padded_vocab_size(meta: dict | None) -> int:
    """Return a corpus's vocabulary size, padded to a multiple of 64; GPT-2's if there is no
    corpus."""
    size = meta["vocab_size"] if meta else 50257
    return -(-size // 64) * 64


def grad_accum_steps(config: Config, tokens_per_step: int, world_size: int) -> int:
    """Return the number of micro-batches per process in an optimizer step of `tokens_per_step`
    tokens.

    Raises:
        UserError: if it is not a whole number; the message names batch sizes for which it is.
    """
    c = config
    if tokens_per_step % (c.block_size * world_size):
        raise UserError(
            f"tokens_per_step={tokens_per_step} must be a multiple of block_size={c.block_size} x "
            f"{world_size} processes = {c.block_size * world_size}"
        )
    sequences = tokens_per_step // (c.block_size * world_size)
    if sequences % c.batch_size:
        divisors = [b for b in range(1, sequences + 1) if sequences % b == 0]
        near = sorted(sorted(divisors, key=lambda b: abs(b - c.batch_size))[:3])
        raise UserError(
            f"batch_size={c.batch_size} does not divide the {sequences} sequences that each of "
            f"{world_size} processes has per step (tokens_per_step={tokens_per_step}): use "
            f"batch_size={', '.join(map(str, near))}"
        )
    return sequences // c.batch_size
