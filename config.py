"""What a run is asked to do: every option, where its value comes from, and the checks made before anything starts."""

import contextlib
import dataclasses
import difflib
import io
import math
import runpy
import sys
import traceback
import types
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import tyro

import schedule
from data import load_meta
from errors import UserError
from model import GPTConfig

CONFIGS = {p.stem: f"configs/{p.name}" for p in sorted(Path(__file__).parent.joinpath("configs").glob("*.py"))}


@dataclass(frozen=True)
class Config:
    """Train a GPT-2, whole or stage by stage.

    python train.py [configs/A.py configs/B.py ...] [--key=value ...]: config files hold assignments `key = value`;
    later ones win. The defaults are the paper's baseline.
    """

    prog: ClassVar[str] = "train.py"

    # output
    out_dir: str = "out/gpt2_124m"
    """Folder of the run: config.json, plan.json, metrics.jsonl, checkpoints/."""
    init_from: Literal["scratch", "resume", "auto"] = "scratch"
    """"scratch" begins a run in a new folder, "resume" goes on from the newest checkpoint in out_dir, "auto" resumes where there
    is one and else begins."""
    dry_run: bool = False
    """Print the plan and what it costs, write plan.json, and stop: needs no data and no GPU."""
    log_interval: int = 10
    """Steps between rows of metrics.jsonl; only then the loss is read from the device."""
    eval_interval: int = 250
    """Steps between evaluations: validation loss and HellaSwag."""
    eval_tokens: int = 10_485_760
    """Validation tokens of an evaluation, always the same ones; as many as there are if fewer."""
    checkpoint_interval: int = 1000
    """Steps between checkpoints; more are written at the end of each stage and of the run, and when a signal stops it."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept; those at the end of a stage are kept for good."""

    # data
    data_dir: str = "data/fineweb_edu"
    """Folder of token shards and meta.json, as fineweb.py writes it."""
    verify_data: bool = False
    """Compare the sha256 of every shard with meta.json before the run starts."""
    hellaswag_data: str = "auto"
    """HellaSwag file; "auto" is data_dir/hellaswag.jsonl, or else the official set, downloaded once; "none" skips it."""
    hellaswag_limit: int = 0
    """Score only the first examples of the file; 0 is all."""

    # model
    n_layer: int = 12
    """Blocks of the finished model, the paper's L."""
    n_head: int = 12
    """Attention heads."""
    n_embd: int = 768
    """Width."""
    block_size: int = 1024
    """Context length in tokens."""
    dropout: float = 0.0
    """Dropout probability; 0 for pretraining."""
    bias: bool = True
    """Biases in linear layers and layer norms, as GPT-2 has."""

    # schedule
    stages: int = 1
    """Stages S of the incremental schedule; 1 is the baseline."""
    steps: int = 10_000
    """Steps T: the baseline's, or those of all stages together."""
    continual_steps: int | Literal["equal_cost", "equal_flops"] = 0
    """Steps after the last stage that train all blocks: a number, or up to the baseline's total in that currency."""
    stage_blocks: tuple[int, ...] | None = None
    """Cumulative block counts of the stages instead of even ones, for example 2 4 12; sets the number of stages."""
    phase_shares: tuple[float, ...] | None = None
    """Relative lengths of phase 1 and 2 of every stage (2 numbers), or of all phases (2S). Default: equal."""
    freezing: bool = True
    """False grows without freezing: no phase 1, every stage trains all its blocks."""
    phase1: Literal["paper", "script"] = "paper"
    """What phase 1 trains besides the new blocks and the final norm: "paper" nothing, "script" also embeddings and head."""

    # optimizer
    tokens_per_step: int = 524_288
    """Tokens of an optimizer step, over all processes and micro-steps."""
    batch_size: int = 16
    """Sequences per process and micro-step; memory decides."""
    learning_rate: float = 6e-4
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """"constant", "cosine" down to min_lr at the end, or "wsd": stable, then linear decay to min_lr."""
    warmup_iters: int = 0
    """Steps of linear warm-up at the start."""
    rewarm_iters: int = 0
    """Steps of linear warm-up at the start of every later phase."""
    min_lr: float = 6e-5
    """Rate at the end of "cosine" and "wsd"."""
    decay_share: float = 0.2
    """Share of all steps that "wsd" decays over."""
    weight_decay: float = 0.1
    """AdamW's weight decay on tensors of two or more dimensions."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    grad_clip: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    max_bad_steps: int = 10
    """Updates in a row that may be skipped because loss or gradient are not finite; then the run stops."""
    phase_optimizer: Literal["carry", "reset"] = "carry"
    """Optimizer state at a phase of a stage: carried over for all parameters that exist, or reset to zero."""
    continual_optimizer: Literal["carry", "reset"] = "carry"
    """The same for the continual phase; the released script resets."""

    # system
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; under torchrun every process takes the GPU of its local rank."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of matrix products; auto is bfloat16 where the GPU has it. Weights and optimizer are float32."""
    compile: Literal["blocks", "model", "none"] = "blocks"
    """torch.compile every block, which growth and freezing reuse; or the whole "model", anew in every phase, for narrow ones."""
    seed: int = 1337
    """Seed of the weights, the order of the data and dropout."""
    deterministic: bool = False
    """On a GPU, only kernels that give the same bits every time, at some cost in speed: a resumed run is then the uninterrupted one."""
    timeout: int = 600
    """Seconds that a process waits for the others before the run ends."""

    def model(self, vocab_size: int) -> GPTConfig:
        """Shape of the finished model."""
        return GPTConfig(self.block_size, vocab_size, self.n_layer, self.n_head, self.n_embd, self.dropout, self.bias)


def load_config(argv: list[str], quiet: bool = False, config: Config = Config()) -> Config:
    """The configuration of a command line: config files and --key=value options over `config`, in their order, later wins.

    Unknown and ill-typed keys of files and options alike end in tyro's message, which suggests the nearest key, and exit
    status 2. Raises UserError on a file that cannot be run and on values that no run can have. quiet: no message, for
    all ranks but one.
    """
    options = []
    for i, arg in enumerate(argv):
        if arg.endswith(".py") and not arg.startswith("-"):
            config, options = _override(config, options, quiet), []
            try:
                config = _override(config, _file_options(arg), quiet)
            except SystemExit:
                if not quiet:
                    print(f"error: the option above stands in config file {arg}", file=sys.stderr)
                raise
        elif arg in CONFIGS and not argv[max(0, i - 1)].startswith("--"):
            raise UserError(f"{arg}: did you mean {CONFIGS[arg]}?")
        elif arg in ("--dry_run", "--dry-run") and argv[i + 1 : i + 2] not in (["True"], ["False"]):
            options.append("--dry_run=True")
        else:
            options.append(arg)
    config = _override(config, options, quiet)
    _check(config)
    return config


def _override(config, options, quiet):
    out, err = (io.StringIO(), io.StringIO()) if quiet else (sys.stdout, sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        markers = (tyro.conf.FlagConversionOff,)
        return tyro.cli(type(config), args=options, default=config, prog=config.prog, use_underscores=True, config=markers)


def _file_options(path) -> list[str]:
    if not Path(path).is_file():
        near = difflib.get_close_matches(Path(path).stem, CONFIGS, n=1)
        hint = f"did you mean {CONFIGS[near[0]]}?" if near else "configs/ has: " + ", ".join(CONFIGS)
        raise UserError(f"config file {path}: not found; {hint}")
    try:
        assigned = runpy.run_path(path)
    except Exception as error:  # whatever the user's file does wrong, say where
        own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
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


def _check(c: Config) -> None:
    positive = ("log_interval eval_interval eval_tokens checkpoint_interval keep_checkpoints max_bad_steps timeout "
                "n_layer n_head n_embd block_size steps tokens_per_step batch_size").split()  # fmt: skip
    not_negative = "hellaswag_limit warmup_iters rewarm_iters min_lr learning_rate weight_decay grad_clip seed".split()
    below_one = "dropout beta1 beta2".split()
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{field.name}={value} must be finite")
        limit = 2**22 if field.name in ("n_layer", "n_head", "n_embd", "block_size") else 2**62  # beyond, torch cannot count
        if type(value) is int and value > limit:
            raise UserError(f"{field.name}={value} must be at most {limit}")
        if field.name in positive and value < 1:
            raise UserError(f"{field.name}={value} must be at least 1")
        if field.name in not_negative and value < 0:
            raise UserError(f"{field.name}={value} must not be negative")
        if field.name in below_one and not 0 <= value < 1:
            raise UserError(f"{field.name}={value} must lie in [0, 1)")
    if not 0 < c.decay_share <= 1:
        raise UserError(f"decay_share={c.decay_share} must lie in (0, 1]")
    if c.lr_schedule != "constant" and c.min_lr > c.learning_rate:
        raise UserError(f"min_lr={c.min_lr} must not exceed learning_rate={c.learning_rate}: {c.lr_schedule} ends there")
    if c.seed >= 2**32:
        raise UserError(f"seed={c.seed} must be below 2**32")
    if c.n_embd % c.n_head:
        raise UserError(f"n_embd={c.n_embd} must be a multiple of n_head={c.n_head}")


def vocab_size(config: Config, meta: dict | None) -> int:
    """The corpus's vocabulary padded up to a multiple of 64; GPT-2's where there is no corpus yet (--dry_run)."""
    size = meta["vocab_size"] if meta else 50257
    return -(-size // 64) * 64


def make_plans(config: Config, shape: GPTConfig) -> tuple[schedule.Plan, schedule.Plan]:
    """The plan of the run, and that of the baseline which it is measured against. Raises UserError."""
    baseline = schedule.make_plan(config.n_layer, config.steps)

    def plan(continual_steps):
        return schedule.make_plan(
            config.n_layer,
            config.steps,
            stages=config.stages,
            continual_steps=continual_steps,
            stage_blocks=config.stage_blocks,
            phase_shares=config.phase_shares,
            freezing=config.freezing,
            phase1=config.phase1,
            reset_at_phases=config.phase_optimizer == "reset",
            reset_at_continual=config.continual_optimizer == "reset",
        )

    if isinstance(config.continual_steps, int):
        return plan(config.continual_steps), baseline
    currency = config.continual_steps.removeprefix("equal_")
    equal = schedule.equal_steps(plan(0), baseline, shape)[currency]
    return plan(max(0, equal - config.steps)), baseline


def micro_steps(config: Config, world_size: int) -> int:
    """Forward and backward passes that every process makes per optimizer step.

    Raises UserError where tokens_per_step does not come out even, naming batch sizes that would.
    """
    c = config
    if c.tokens_per_step % (c.block_size * world_size):
        raise UserError(
            f"tokens_per_step={c.tokens_per_step} must be a multiple of block_size={c.block_size} x {world_size} processes "
            f"= {c.block_size * world_size}"
        )
    sequences = c.tokens_per_step // (c.block_size * world_size)
    if sequences % c.batch_size:
        fitting = [b for b in range(1, sequences + 1) if sequences % b == 0]
        near = sorted(sorted(fitting, key=lambda b: abs(b - c.batch_size))[:3])
        raise UserError(
            f"batch_size={c.batch_size} does not divide the {sequences} sequences that each of {world_size} processes has per "
            f"step (tokens_per_step={c.tokens_per_step}): use batch_size={', '.join(map(str, near))}"
        )
    return sequences // c.batch_size


def read_meta(config: Config) -> dict | None:
    """meta.json of the corpus; None where a dry run has no corpus. Raises UserError."""
    if config.dry_run and not Path(config.data_dir, "meta.json").exists():
        return None
    return load_meta(config.data_dir)
