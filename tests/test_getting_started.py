"""The code and the commands of docs/getting_started.md work in a copy of the repository."""

import json
import re
import shlex

import pytest
from conftest import ROOT, copy_repository, metrics, script

PAGE = (ROOT / "docs" / "getting_started.md").read_text()
TINY = ("n_layer=4", "n_embd=32", "block_size=64", "tokens_per_step=1024", "eval_tokens=2048")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


COMMANDS = [
    shlex.split(line) for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()
]


@pytest.fixture(scope="module")
def repository(tmp_path_factory, corpus):
    """A copy with what the page tells to write, and with shorter runs in its study."""
    copy = copy_repository(tmp_path_factory.mktemp("getting_started") / "copy")
    (copy / "data").mkdir()
    (copy / "data" / "stdlib").symlink_to(corpus)
    operator, method = blocks("python")
    (study,) = blocks("toml")
    with open(copy / "growth.py", "a") as file:
        file.write("\n\n" + operator)
    (copy / "results" / "mirror").mkdir(parents=True)
    (copy / "results" / "mirror" / "mirror.py").write_text(method)

    def shorter(match):
        return f"steps = {[int(n) // 5 for n in match[1].split(',')]}"

    study, n = re.subn(r"steps = \[(.*?)\]", shorter, study)
    assert n == 3
    (copy / "results" / "mirror" / "study.toml").write_text(study)
    return copy


def execute(repository, name, *options, only=lambda command: True) -> str:
    """Run the page's commands `python NAME ...` with additional options; return their output."""
    commands = [c for c in COMMANDS if c[:2] == ["python", name] and only(c)]
    assert commands
    outputs = [
        script(*command[1:], *options, cwd=repository, timeout=900).stdout for command in commands
    ]
    return "".join(outputs)


def is_dry_run(command):
    return "--dry_run" in command


def trains(command):
    return "--dry_run" not in command


def test_every_command_is_tested():
    """By the tests below, except for the demo and the activation of the environment."""
    assert COMMANDS[:2] == [["make", "demo"], ["source", ".venv/bin/activate"]]
    assert {tuple(command[:2]) for command in COMMANDS[2:]} == {
        ("python", name) for name in ("-c", "plot.py", "train.py", "study.py", "frontier.py")
    }
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo:", makefile, re.MULTILINE) and "--out plots/demo" in makefile


def test_the_method_of_the_page(repository):
    """The operator, the picture, the costs and the short run. The outputs shown are real."""
    source_map, costs = blocks("text")
    assert execute(repository, "-c") == source_map
    assert costs in execute(repository, "train.py", only=is_dry_run)
    tiny = [f"--{option}" for option in (*TINY, "steps=10", "eval_interval=5")]
    execute(repository, "train.py", *tiny, only=trains)
    execute(repository, "plot.py")
    rows = metrics(repository / "out" / "mirror_try")
    assert [row["blocks"] for row in rows[-10:]] == [2] * 4 + [4] * 6
    figures = {path.name for path in (repository / "out" / "figures").glob("*.png")}
    assert figures == {"schedule_mirror.png", "figure1_loss.png"}


@pytest.mark.slow
def test_the_study_of_the_page(repository):
    """All runs of the study, shorter and with a smaller model, and the page with the gains."""
    execute(repository, "study.py", "--options", *TINY, "warmup_steps=2")
    execute(repository, "frontier.py")
    results = repository / "results" / "mirror"
    page = (results / "README.md").read_text()
    assert "Not finished yet" not in page and (results / "gain.png").exists()
    for name in ("mirror", "stack"):
        for steps in (16, 32):
            gain = rf"\| {name} +\| +{steps} \|.*\| +[+-]0\.\d{{4}} ± \d+\.\d{{4}} \|"
            assert re.search(gain, page), page
    operators = {
        json.loads((results / f"{name}_16_seed1" / "config.json").read_text())["growth"]
        for name in ("mirror", "stack")
    }
    assert operators == {"mirror", "stack"}
