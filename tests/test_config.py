"""Options and config files: which ones win, and which are errors."""

import dataclasses

import pytest
from conftest import ROOT

import cost
import train
from stagewise.config import Config, grad_accum_steps, load_config, padded_vocab_size
from stagewise.errors import UserError

CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


def load(*argv, quiet=False):
    return load_config(list(map(str, argv)), Config(), quiet=quiet)


def schedules(config):
    model_config = train.make_model_config(config, 50304)
    return *cost.make_schedules(config, model_config), model_config


def test_later_files_and_options_override_earlier_ones(tmp_path):
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text(
        "import math\n_half = 0.5\nn_layer = 4\nsteps = int(math.pow(10, 2))\ngrad_clip = _half\n"
    )
    b.write_text("n_layer = 8\nstage_blocks = (2, 8)\n")
    c = load(a, b)
    assert (c.n_layer, c.steps, c.grad_clip, c.stage_blocks) == (8, 100, 0.5, (2, 8))
    assert load(b, a).n_layer == 4
    assert load(a, "--n_layer=16", "--steps", "7").n_layer == 16
    assert load("--n_layer=16", a).n_layer == 4
    assert load() == Config()


def test_options_are_typed():
    words = ("--learning_rate=1e-3", "--compile=none", "--continual_steps=match_flops")
    c = load(*words, "--phase_fractions", "1", "3")
    assert (c.learning_rate, c.compile, c.continual_steps) == (1e-3, "none", "match_flops")
    assert c.phase_fractions == (1.0, 3.0)
    assert load("--continual_steps=12", "--dry_run").continual_steps == 12
    assert load("--dry_run", "--steps=3").dry_run and not load("--dry_run=False").dry_run


@pytest.mark.parametrize(
    "argument, named",
    [
        ("--learning_rat=1", "--learning_rate"),
        ("--steps=many", "--steps"),
        ("--compile=maybe", "--compile"),
        ("--lr_schedule=linear", "'constant', 'cosine', 'wsd'"),
        ("--optimizer_state=keep", "'carry', 'copy', 'zero', 'reset'"),
        ("--continual_steps=equal", "--continual_steps"),
        ("surplus", "surplus"),
    ],
)
def test_unknown_and_ill_typed_options_end_with_a_suggestion(capsys, argument, named):
    with pytest.raises(SystemExit) as exit_:
        load(argument)
    assert exit_.value.code == 2 and named in capsys.readouterr().err
    with pytest.raises(SystemExit):
        load(argument, quiet=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "option, named",
    [
        ("--steps=0", "steps=0 must be "),
        ("--n_embd=0", "n_embd=0 must be "),
        ("--seed=-1", "seed=-1 must be "),
        ("--seed=4294967296", "seed=4294967296 must be "),
        ("--learning_rate=nan", "learning_rate=nan must be "),
        ("--learning_rate=inf", "learning_rate=inf must be "),
        ("--dropout=1", "dropout=1.0 must be "),
        ("--decay_fraction=0", "decay_fraction=0.0 must be "),
        ("--continual_steps=-1", "continual_steps=-1 must be "),
        ("--n_head=7", "n_embd=768 must be a multiple of n_head=7"),
    ],
)
def test_values_out_of_range_are_named(option, named):
    with pytest.raises(UserError, match=named):
        load(option)


@pytest.mark.parametrize(
    "options, named",
    [
        ("--sharding=fsdp --compile=model", "sharding=fsdp, .* use --compile=blocks"),
        ("--reduce_every_micro_batch=True", "no effect with sharding=ddp"),
        ("--plan_processes=8", "plan_processes requires dry_run"),
        ("--plan_processes=8", "plan_processes requires dry_run"),
    ],
)
def test_options_that_exclude_each_other(options, named):
    with pytest.raises(UserError, match=named):
        load(*options.split())


def test_the_last_learning_rate_must_not_exceed_the_peak():
    options = ("--learning_rate=1e-3", "--min_lr=2e-3")
    load(*options)  # a constant rate has no end
    for lr_schedule in ("cosine", "wsd"):
        with pytest.raises(UserError, match="min_lr=0.002 must not exceed learning_rate=0.001"):
            load(*options, f"--lr_schedule={lr_schedule}")


@pytest.mark.parametrize(
    "line, named",
    [("n_layers = 3", "--n_layer "), ("steps = 'many'", "--steps"), ("bias = None", "--bias")],
)
def test_config_files_are_checked_like_options_and_named(capsys, tmp_path, line, named):
    path = tmp_path / "mine.py"
    path.write_text(line)
    with pytest.raises(SystemExit) as exit_:
        load(path)
    message = capsys.readouterr().err
    assert exit_.value.code == 2
    assert named in message and f"the option is set in config file {path}" in message


@pytest.mark.parametrize(
    "content, named",
    [
        ("steps = 3\nsteps = (", "line 2: SyntaxError"),
        ("steps = 3\n\nsteps = x\n", "line 3: NameError"),
        ("import json\njson.loads('{')\n", "line 2: JSONDecodeError"),
        ("import sys\nsys.exit(0)\n", "line 2: SystemExit"),
    ],
)
def test_config_files_that_cannot_be_run_are_named_with_the_line(tmp_path, content, named):
    (tmp_path / "mine.py").write_text(content)
    with pytest.raises(UserError, match=f"mine.py, {named}"):
        load(tmp_path / "mine.py")


def test_missing_config_files_end_with_a_suggestion():
    with pytest.raises(UserError, match="did you mean configs/gpt2_124m.py"):
        load("configs/gpt2_124.py")
    with pytest.raises(UserError, match="did you mean configs/methods/layer_dropout.py"):
        load("configs/layer_dropout.py")
    with pytest.raises(UserError, match="s4: did you mean configs/s4.py"):
        load("configs/gpt2_124m.py", "s4")
    assert load("--out_dir", "s4").out_dir == "s4"  # a value, not a file
    with pytest.raises(UserError, match="not found; choose from baseline, "):
        load("zzzz.py")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_in_the_repository_makes_a_schedule(path):
    config = load(path)
    schedule, _, _ = schedules(config)
    for phase in schedule.phases:
        for n in (1,) if config.device == "cpu" else (1, 8):
            assert grad_accum_steps(config, phase.tokens_per_step, n) >= 1


@pytest.mark.parametrize("S", [4, 8, 12])
def test_the_papers_experiment(S):
    c = load("configs/gpt2_124m.py", "configs/paper_recipe.py", f"configs/s{S}.py")
    schedule, baseline, model_config = schedules(c)
    assert (c.n_layer, c.n_head, c.n_embd, c.block_size) == (12, 12, 768, 1024)
    assert (c.learning_rate, c.lr_schedule, c.warmup_steps) == (6e-4, "constant", 0)
    assert (c.weight_decay, c.beta1, c.beta2, c.grad_clip) == (0.1, 0.9, 0.95, 0.0)
    assert (c.tokens_per_step, c.eval_interval) == (524_288, 250)
    assert schedule.n_steps == 20_000 and len(schedule.phases) == 2 * S + 1
    states = [p.optimizer_state for p in schedule.phases]
    assert states == ["carry"] * 2 * S + ["reset"]
    matched = cost.compute_matched_steps(schedule, baseline, model_config)["paper_cost"]
    # The paper's formula assumes that the stages divide the blocks.
    assert (matched == cost.paper_compute_matched_step(S, 10_000)) == (S != 8)


def test_the_papers_baseline_is_the_default():
    c = load("configs/gpt2_124m.py", "configs/paper_recipe.py", "configs/baseline.py")
    assert dataclasses.replace(c, continual_optimizer_state="carry") == Config()
    schedule, baseline, _ = schedules(c)
    assert schedule == baseline and len(schedule.phases) == 1 and schedule.is_baseline


def test_vocabularies_are_padded():
    sizes = [padded_vocab_size({"vocab_size": v}) for v in (257, 64, 50257)]
    assert sizes == [320, 64, 50304] and padded_vocab_size(None) == 50304


def test_gradient_accumulation_divides_a_step_among_processes():
    c = load("--batch_size=16")
    assert [grad_accum_steps(c, 524_288, n) for n in (1, 2, 8)] == [32, 16, 4]
    with pytest.raises(UserError, match="block_size=1024 x 3 processes = 3072"):
        grad_accum_steps(c, 524_288, 3)
    with pytest.raises(
        UserError, match="batch_size=16 does not divide the 8 sequences .* use batch_size=2, 4, 8"
    ):
        grad_accum_steps(c, 524_288, 64)


def test_every_option_has_a_line_in_the_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        load("--help")
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    source = (ROOT / "stagewise" / "config.py").read_text()
    for field in dataclasses.fields(Config):
        assert f"--{field.name} " in text, field.name
        after = source.split(f"\n    {field.name}: ", 1)[1]
        assert after.split("\n")[1].startswith('    """'), field.name


def test_every_option_is_documented():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(page.read_text() for page in pages)
    missing = [f.name for f in dataclasses.fields(Config) if f"`{f.name}`" not in text]
    assert not missing


def test_options_that_are_on_or_off_need_no_value():
    on = load_config(
        ["--deterministic", "--dry_run", "--reduce-every-micro-batch", "--sharding=fsdp"], Config()
    )
    assert on.deterministic and on.dry_run and on.reduce_every_micro_batch and not on.verify_data
    assert not load_config(["--bias", "False"], Config()).bias
