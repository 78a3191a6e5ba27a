"""Options of a run: types and ranges, config files, and the command line."""

import contextlib
import dataclasses
import difflib
import io
import os
import runpy
import sys
import traceback
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import tyro
from msgspec import Meta

from stagewise.console import ROOT
from stagewise.errors import UserError
from stagewise.fileio import convert

CONFIGS_DIR = ROOT / "configs"
CONFIGS = {
    p.stem: f"configs/{p.relative_to(CONFIGS_DIR)}" for p in sorted(CONFIGS_DIR.rglob("*.py"))
}

Positive = Annotated[int, Meta(ge=1, lt=2**62)]
NotNegative = Annotated[int, Meta(ge=0, lt=2**62)]
Depth = Annotated[int, Meta(ge=1, le=1024)]
Size = Annotated[int, Meta(ge=1, le=2**22)]  # larger ones overflow the number of parameters
Real = Annotated[float, Meta(ge=0, le=1e300)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]


@dataclass(frozen=True)
class Config:
    """Train a GPT-2, with all blocks from the start or in stages.

    python train.py [configs/A.py configs/B.py ...] [--key=value ...]

    Config files contain assignments `key = value`. Later files and options override earlier ones.

    The defaults are those of the paper's baseline.
    """

    prog: ClassVar[str] = "train.py"

    # output
    out_dir: str = "out/gpt2_124m"
    """Run folder for config.json, schedule.json, metrics.jsonl and checkpoints/."""
    init_from: Literal["scratch", "resume", "auto"] = "scratch"
    """Start a new run ("scratch"), resume out_dir ("resume"), or resume if possible ("auto")."""
    init_weights: str = ""
    """Initial weights: a run, a checkpoint, nanoGPT's ckpt.pt or gpt2. Missing blocks are added."""
    dry_run: bool = False
    """Print the schedule and its cost, write schedule.json, and exit. Needs no data or GPU."""
    plan_processes: NotNegative = 0
    """With dry_run: number of processes for the estimate of memory. 0: those of this command."""
    log_interval: Positive = 10
    """Steps between rows of metrics.jsonl. Logging synchronizes the CPU with the GPU."""
    eval_interval: Positive = 250
    """Steps between evaluations (validation loss, HellaSwag) at full context with all blocks."""
    eval_tokens: Positive = 10_485_760
    """Validation tokens per evaluation, always the same ones, or all if there are fewer."""
    checkpoint_interval: Positive = 1000
    """Steps between checkpoints. Others are saved at the end of each stage, where "wsd" starts to
    decay, and on a signal."""
    keep_checkpoints: Positive = 2
    """Number of recent checkpoints to keep. Those at the end of a stage and where "wsd" starts to
    decay are always kept."""
    wandb: str = ""
    """Weights & Biases project to log the rows of metrics.jsonl to. Needs the package wandb."""
    tensorboard: bool = False
    """Also write metrics.jsonl as event files to out_dir/tensorboard. Needs tensorboard."""

    # data
    data_dir: str = "data/fineweb_edu"
    """Folder with token shards and meta.json, written by fineweb.py."""
    verify_data: bool = False
    """Compare the SHA-256 checksum of every shard with meta.json before the run starts."""
    hellaswag_data: str = "auto"
    """HellaSwag file. "auto": the corpus's own, or else the official one. "none": no evaluation."""
    hellaswag_limit: NotNegative = 0
    """Number of examples to evaluate, from the start of the file. 0 evaluates all."""

    # model
    n_layer: Depth = 12
    """Number of blocks of the final model (L in the paper)."""
    n_head: Size = 12
    """Number of attention heads."""
    n_embd: Size = 768
    """Embedding dimension (width)."""
    block_size: Size = 1024
    """Context length of the final model, in tokens."""
    dropout: BelowOne = 0.0
    """Dropout probability; 0 for pretraining."""
    bias: bool = True
    """Biases in linear layers and layer norms, as in GPT-2."""
    base_depth: Annotated[int, Meta(ge=0, le=1024)] = 0
    """Base depth of CompleteP, so that one learning rate works for all depths; 0 disables it."""

    # schedule
    stages: int = 1
    """Number of stages (S in the paper). 1 trains the baseline."""
    steps: Positive = 10_000
    """Number of steps of the baseline, or of all stages together."""
    continual_steps: NotNegative | Literal["match_paper_cost", "match_flops"] = 0
    """Steps after the stages that train all blocks, or "match_*" to end compute-matched."""
    stage_blocks: tuple[int | str, ...] | None = None
    """Blocks at the end of each stage, for example 2 4 12 or 25% 100%. Default: even growth."""
    phase_fractions: tuple[float, ...] | None = None
    """Relative lengths of phases 1 and 2, or of all phases. Default: equal."""
    stage_alpha: Annotated[float, Meta(ge=0, le=100)] = 0.0
    """The length of stage s is proportional to s**stage_alpha (PROP-alpha of MIDAS)."""
    freezing: Literal["all_but_new", "preceding", "none"] = "all_but_new"
    """Blocks that phase 1 freezes. "none": no phase 1, each stage trains all its blocks."""
    phase1: Literal["paper", "released_code"] = "paper"
    """In phase 1, freeze embeddings and head ("paper") or train them ("released_code")."""
    growth: str = "random"
    """Operator in growth.py that creates new blocks, for example random or stack."""
    shrink: Annotated[float, Meta(ge=0, le=1)] = 1.0
    """Before growth, weights become shrink * weight + perturb * initial weight."""
    perturb: Real = 0.0
    """Weight of the new initial weights in shrink * weight + perturb * initial weight."""
    fade_in_steps: NotNegative = 0
    """Steps over which the residual branches of new blocks are scaled from 0 to 1 (MSG)."""
    optimizer_state: Literal["carry", "copy", "zero", "reset"] = "carry"
    """At phase starts, "carry" state over, also "copy" or "zero" it for new blocks, or "reset"."""
    continual_optimizer_state: Literal["carry", "reset"] = "carry"
    """optimizer_state for the continual phase. The released code uses "reset"."""
    rewarmup_steps: NotNegative = 0
    """Steps of linear learning-rate warm-up at the start of every phase after the first."""
    rewarmup: Literal["all", "new_blocks"] = "all"
    """What rewarmup_steps applies to: all parameters, or only new blocks where the model grows."""
    lr_setback: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Set lr_schedule back by this fraction of its position when the model grows; 1: restart it."""
    context_ramp: str = ""
    """Context length during training as START:LENGTH pairs, for example "0:512 50%:1024"."""
    tokens_per_step_ramp: str = ""
    """Tokens per step as START:VALUE pairs, for example "0:262144 100M:524288"."""
    skip_policy: str = "none"
    """Policy in policies.py for skipping blocks during training: none, or e.g. layer_dropout."""
    skip_rate: float | tuple[float, ...] = 0.2
    """Maximum probability or mean fraction of skipped blocks; one number, or one per stage."""
    freezeout: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """t_0 of FreezeOut: anneal and freeze blocks from the bottom; 0 disables it."""

    # optimizer
    tokens_per_step: Positive = 524_288
    """Tokens per optimizer step, over all processes and micro-batches."""
    batch_size: Size = 16
    """Sequences of block_size tokens per micro-batch and process. Limited by memory."""
    learning_rate: Real = 6e-4
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """Constant, or decay to min_lr: "cosine", or "wsd" (constant, then linear decay)."""
    warmup_steps: NotNegative = 0
    """Steps of linear learning-rate warm-up at the start of training."""
    min_lr: Real = 6e-5
    """Final learning rate of "cosine" and "wsd"."""
    decay_fraction: Annotated[float, Meta(gt=0, le=1)] = 0.2
    """Fraction of all steps over which "wsd" decays."""
    weight_decay: Real = 0.1
    """AdamW's weight decay, applied only to tensors with two or more dimensions."""
    beta1: BelowOne = 0.9
    """AdamW's coefficient for the running average of the gradient."""
    beta2: BelowOne = 0.95
    """AdamW's coefficient for the running average of the squared gradient."""
    grad_clip: Real = 0.0
    """Maximum gradient norm. 0 disables clipping."""
    max_skipped_steps: Positive = 10
    """Number of consecutive skipped (non-finite) updates after which the run stops."""

    # system
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. Under torchrun, every process uses the GPU of its local rank."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of matrix products. "auto": bfloat16 on hardware where it is faster."""
    compile: Literal["blocks", "model", "none"] = "blocks"
    """torch.compile each block ("blocks"), or the whole model in every phase ("model")."""
    seed: Annotated[int, Meta(ge=0, lt=2**32)] = 1337
    """Random seed for weights, data order, dropout and skipped blocks."""
    sharding: Literal["ddp", "zero1", "fsdp"] = "ddp"
    """What is divided over the processes: nothing, the optimizer state, or also the weights."""
    reduce_every_micro_batch: bool = False
    """With zero1 and fsdp, shard gradients after each micro-batch: less memory, more traffic."""
    deterministic: bool = False
    """Use only deterministic kernels on a GPU. This can reduce speed."""
    timeout: Annotated[int, Meta(ge=1, le=10**7)] = 600
    """Seconds that a process waits for the other processes before the run ends."""


# Options that need no value.
FLAGS = tuple(
    f"--{spelling}"
    for f in dataclasses.fields(Config)
    if f.type is bool
    for spelling in {f.name, f.name.replace("_", "-")}
)
INPUTS = ("data_dir", "hellaswag_data", "init_weights")  # options that may be paths to read

C = TypeVar("C", bound=Config)


def load_config(argv: list[str], config: C, quiet: bool = False) -> C:
    """Return `config` with the config files and --key=value options of a command line applied.

    Files and options are applied in order; later ones override earlier ones. An unknown option or a
    value of the wrong type, in a file or on the command line, prints tyro's error message and exits
    with status 2.

    Args:
        quiet: if True, print no messages. Set on all ranks but one.

    Raises:
        UserError: if a file cannot be executed, or a value is out of range.
    """
    options: list[str] = []
    for i, arg in enumerate(argv):
        if arg.endswith(".py") and not arg.startswith("-"):
            config, options = _override(config, options, quiet), []
            try:
                config = _override(config, _file_options(arg), quiet)
            except SystemExit:
                if not quiet:
                    print(f"error: the option is set in config file {arg}", file=sys.stderr)
                raise
        elif arg in CONFIGS and not argv[max(0, i - 1)].startswith("--"):
            raise UserError(f"{arg}: did you mean {CONFIGS[arg]}?")
        elif arg in FLAGS and argv[i + 1 : i + 2] not in (["True"], ["False"]):
            options.append(f"{arg}=True")
        else:
            options.append(arg)
    config = _override(config, options, quiet)
    check(config)
    found: dict[str, Any] = {key: find(getattr(config, key)) for key in INPUTS}
    return dataclasses.replace(config, **found)


def find(path: str) -> str:
    """Return the path of an input, or of the same input in this repository if only that exists."""
    elsewhere = path and not os.path.exists(path) and os.path.exists(ROOT / path)
    return str(ROOT / path) if elsewhere else path


def absolute_paths(config: Config) -> dict[str, str]:
    """Return the options of `config` that are existing paths, as absolute paths."""
    paths = {key: getattr(config, key) for key in ("out_dir", *INPUTS)}
    return {key: os.path.abspath(path) for key, path in paths.items() if os.path.exists(path)}


def _override(config, options, quiet):
    if not options:  # tyro takes 0.05 s
        return config
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


def _file_options(arg: str) -> list[str]:
    path = find(arg)
    if not Path(path).is_file():
        near = difflib.get_close_matches(Path(path).stem, CONFIGS, n=1)
        hint = f"did you mean {CONFIGS[near[0]]}?" if near else "choose from " + ", ".join(CONFIGS)
        raise UserError(f"config file {path}: not found; {hint}")
    try:
        assigned = runpy.run_path(path)
    except (Exception, SystemExit) as error:  # the user's file may raise anything
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
    """Check the ranges of all options, and the options that depend on each other.

    Raises:
        UserError: if a check fails. The message names the option.
    """
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        if isinstance(value, str) and "\0" in value:
            raise UserError(f"{field.name}={value!r} must not contain a NUL character")
        try:
            convert(value, field.type)
        except ValueError as error:
            needed = str(error).removeprefix("Expected ").replace("`", "")
            raise UserError(f"{field.name}={value} must be {needed}") from None
    if c.lr_schedule != "constant" and c.min_lr > c.learning_rate:
        raise UserError(
            f"min_lr={c.min_lr} must not exceed learning_rate={c.learning_rate}, because "
            f"lr_schedule={c.lr_schedule} decays to min_lr"
        )
    if c.compile == "model" and (c.skip_policy != "none" or c.fade_in_steps):
        name = "fade_in_steps" if c.fade_in_steps else "skip_policy"
        raise UserError(
            f"compile=model cannot be used with {name}={getattr(c, name)}, because it would "
            "compile the model again in many steps: use --compile=blocks"
        )
    if c.compile == "model" and c.sharding != "ddp":
        raise UserError(
            f"compile=model cannot be used with sharding={c.sharding}, which gathers parameters "
            "block by block: use --compile=blocks"
        )
    if c.reduce_every_micro_batch and c.sharding == "ddp":
        raise UserError(
            "reduce_every_micro_batch has no effect with sharding=ddp: remove it, or use "
            "--sharding=zero1 or --sharding=fsdp"
        )
    if c.init_weights and isinstance(c.continual_steps, str):
        raise UserError(
            f"continual_steps={c.continual_steps} cannot be used with init_weights, whose cost is "
            "not part of the schedule: use a number of steps"
        )
    if c.plan_processes and not c.dry_run:
        raise UserError(
            "plan_processes requires dry_run: add --dry_run, or start this many processes with "
            "torchrun"
        )
    if c.n_embd % c.n_head:
        raise UserError(f"n_embd={c.n_embd} must be a multiple of n_head={c.n_head}")


def padded_vocab_size(meta: dict | None) -> int:
    """Return a corpus's vocabulary size, padded to a multiple of 64.

    Without a corpus, use the size of GPT-2's vocabulary.
    """
    size = meta["vocab_size"] if meta else 50257
    return -(-size // 64) * 64


def grad_accum_steps(config: Config, tokens_per_step: int, world_size: int) -> int:
    """Return the number of micro-batches per process and optimizer step.

    Raises:
        UserError: if the number is not an integer. The message suggests valid batch sizes.
    """
    c = config
    if tokens_per_step % (c.block_size * world_size):
        raise UserError(
            f"tokens_per_step={tokens_per_step} must be a multiple of block_size={c.block_size} x "
            f"{world_size} processes = {c.block_size * world_size}"
        )
    sequences = tokens_per_step // (c.block_size * world_size)
    if sequences % c.batch_size:
        largest = min(sequences, 2 * c.batch_size)
        divisors = [b for b in range(1, largest + 1) if sequences % b == 0]
        near = sorted(sorted(divisors, key=lambda b: abs(b - c.batch_size))[:3])
        raise UserError(
            f"batch_size={c.batch_size} does not divide the {sequences} sequences per step of each "
            f"of {world_size} processes (tokens_per_step={tokens_per_step}): use "
            f"batch_size={', '.join(map(str, near))}"
        )
    return sequences // c.batch_size
