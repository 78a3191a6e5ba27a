"""Options and config files: who wins, what is refused."""

import dataclasses

import pytest

import config as cfg
import schedule
from config import Config, load_config
from errors import UserError

from conftest import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def test_later_wins_files_and_options_alike(tmp_path):
    (tmp_path / "a.py").write_text("import math\n_half = 0.5\nn_layer = 4\nsteps = int(math.pow(10, 2))\ngrad_clip = _half\n")
    (tmp_path / "b.py").write_text("n_layer = 8\nstage_blocks = (2, 8)\n")
    a, b = str(tmp_path / "a.py"), str(tmp_path / "b.py")
    c = load_config([a, b])
    assert (c.n_layer, c.steps, c.grad_clip, c.stage_blocks) == (8, 100, 0.5, (2, 8))
    assert load_config([b, a]).n_layer == 4
    assert load_config([a, "--n_layer=16", "--steps", "7"]).n_layer == 16
    assert load_config(["--n_layer=16", a]).n_layer == 4
    assert load_config([]) == Config()


def test_options_are_typed():
    c = load_config(["--learning_rate=1e-3", "--compile=none", "--continual_steps=equal_flops", "--phase_shares", "1", "3"])
    assert (c.learning_rate, c.compile, c.continual_steps, c.phase_shares) == (1e-3, "none", "equal_flops", (1.0, 3.0))
    assert load_config(["--continual_steps=12", "--dry_run"]).continual_steps == 12
    assert load_config(["--dry_run", "--steps=3"]).dry_run and not load_config(["--dry_run=False"]).dry_run


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--learning_rat=1", "--learning_rate"),
        ("--steps=many", "--steps"),
        ("--compile=maybe", "--compile"),
        ("--lr_schedule=linear", "'constant', 'cosine', 'wsd'"),
        ("--continual_steps=equal", "--continual_steps"),
        ("surplus", "surplus"),
    ],
)
def test_unknown_and_ill_typed_options_are_refused_with_a_suggestion(capsys, argument, said):
    with pytest.raises(SystemExit) as exit_:
        load_config([argument])
    assert exit_.value.code == 2 and said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        load_config([argument], quiet=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("line, said", [("n_layers = 3", "--n_layer "), ("steps = 'many'", "--steps"), ("bias = None", "--bias")])
def test_config_files_are_checked_like_options_and_named(capsys, tmp_path, line, said):
    path = tmp_path / "mine.py"
    path.write_text(line)
    with pytest.raises(SystemExit) as exit_:
        load_config([str(path)])
    message = capsys.readouterr().err
    assert exit_.value.code == 2 and said in message and f"stands in config file {path}" in message


def test_config_files_that_cannot_be_run_are_refused_by_line(tmp_path):
    for content, named in (("steps = 3\nsteps = (", "line 2: SyntaxError"), ("steps = 3\n\nsteps = x\n", "line 3: NameError"), ("import json\njson.loads('{')\n", "line 2: JSONDecodeError")):
        (tmp_path / "mine.py").write_text(content)
        with pytest.raises(UserError, match=named):
            load_config([str(tmp_path / "mine.py")])
    with pytest.raises(UserError, match="did you mean configs/gpt2_124m.py"):
        load_config(["configs/gpt2_124.py"])
    with pytest.raises(UserError, match="s4: did you mean configs/s4.py"):
        load_config(["configs/gpt2_124m.py", "s4"])
    assert load_config(["--out_dir", "s4"]).out_dir == "s4"  # a value, not a file
    with pytest.raises(UserError, match="configs/ has: baseline"):
        load_config(["zzzz.py"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_that_is_shipped_makes_a_plan(path):
    c = load_config([str(path)])
    cfg.make_plans(c, c.model(50304))
    assert cfg.micro_steps(c, 1) >= 1 and (c.device == "cpu" or cfg.micro_steps(c, 8) >= 1)


def test_the_papers_experiment():
    files = ["configs/gpt2_124m.py", "configs/paper_recipe.py"]
    for S in (4, 8, 12):
        c = load_config([*files, f"configs/s{S}.py"])
        plan, baseline = cfg.make_plans(c, c.model(50304))
        assert (c.n_layer, c.n_head, c.n_embd, c.block_size) == (12, 12, 768, 1024)
        assert (c.learning_rate, c.lr_schedule, c.warmup_iters, c.grad_clip) == (6e-4, "constant", 0, 0.0)
        assert (c.weight_decay, c.beta1, c.beta2, c.tokens_per_step, c.eval_interval) == (0.1, 0.9, 0.95, 524_288, 250)
        assert plan.n_steps == 20_000 and len(plan.phases) == 2 * S + 1 and plan.phases[-1].reset_optimizer
        assert not any(p.reset_optimizer for p in plan.phases[:-1])
        assert (S == 8) == (schedule.equal_steps(plan, baseline, c.model(50304))["cost"] != schedule.paper_equal_cost_step(S, 10_000))
    c = load_config([*files, "configs/baseline.py"])
    assert [p.name for p in cfg.make_plans(c, c.model(50304))[0].phases] == ["baseline"]


def test_the_defaults_are_the_papers_baseline():
    files = ["configs/gpt2_124m.py", "configs/paper_recipe.py", "configs/baseline.py"]
    assert dataclasses.replace(load_config(files), continual_optimizer="carry") == Config()


def test_vocabularies_are_padded():
    assert [cfg.vocab_size(Config(), {"vocab_size": v}) for v in (257, 64, 50257)] == [320, 64, 50304]
    assert cfg.vocab_size(Config(), None) == 50304


def test_micro_steps_share_a_step_among_processes():
    c = load_config(["--tokens_per_step=524288", "--batch_size=16"])
    assert [cfg.micro_steps(c, n) for n in (1, 2, 8)] == [32, 16, 4]
    with pytest.raises(UserError, match="block_size=1024 x 3 processes = 3072"):
        cfg.micro_steps(c, 3)
    with pytest.raises(UserError, match="batch_size=16 does not divide the 8 sequences .* use batch_size=2, 4, 8"):
        cfg.micro_steps(c, 64)


def test_every_option_has_a_help_line_and_its_place_in_the_readme(capsys):
    with pytest.raises(SystemExit) as exit_:
        load_config(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    source, readme = (ROOT / "config.py").read_text(), (ROOT / "README.md").read_text()
    for field in dataclasses.fields(Config):
        assert f"--{field.name} " in text and f"`{field.name}`" in readme
        assert f"    {field.name}: " in source and '    """' in source.split(f"    {field.name}: ")[1].split("\n")[1]
