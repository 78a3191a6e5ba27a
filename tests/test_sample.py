"""Text from a checkpoint."""

import pytest
import torch
from conftest import script

import sample
from model import GPT
from stagewise.checkpoint import load_checkpoint
from stagewise.data import get_tokenizer
from stagewise.errors import UserError


def test_samples_continue_the_prompt(run_train, capsys):
    out = run_train("run", steps=2)

    def texts(**options):
        capsys.readouterr()
        sample.main(
            sample.Args(out, prompt="import os", max_new_tokens=20, device="cpu", **options)
        )
        return capsys.readouterr().out

    two = texts(num_samples=2)
    assert two.startswith("--- sample 1\nimport os") and "--- sample 2\nimport os" in two
    assert texts(num_samples=2) == two != texts(num_samples=2, seed=1)
    command = ("--prompt=import os", "--max_new_tokens=20", "--device=cpu", "--num_samples=2")
    assert script("sample.py", out, *command).stdout == two

    checkpoint = load_checkpoint(out)
    model = GPT.from_weights(checkpoint["model_config"], checkpoint["model"]).eval()
    prompt = torch.tensor([[256, *b"import os"]])
    greedy = model.generate(prompt, 20, temperature=0, n_vocab=257)[0, 1:].tolist()
    text = get_tokenizer("bytes").decode(greedy)
    assert texts(num_samples=1, temperature=0) == f"--- sample 1\n{text}\n"
    assert texts(num_samples=1, temperature=5, top_k=1) == f"--- sample 1\n{text}\n"
    for temperature in (0.01, 100):
        assert texts(temperature=temperature).count("--- sample") == 3


@pytest.mark.parametrize("temperature", ["nan", "inf", "-inf", "-1", "1e-30", "1e30"])
def test_bad_temperature(tmp_path, temperature):
    with pytest.raises(UserError, match="--temperature=.* must be 0 or between 0.01 and 100"):
        sample.main(sample.Args(tmp_path, temperature=float(temperature)))


@pytest.mark.parametrize(
    "option, value", [("num_samples", 0), ("max_new_tokens", 0), ("top_k", 0), ("seed", -1)]
)
def test_bad_numbers(tmp_path, option, value):
    with pytest.raises(UserError, match=f"--{option}={value} must be"):
        sample.main(sample.Args(tmp_path, **{option: value}))


def test_errors_are_one_line(tmp_path):
    result = script("sample.py", tmp_path, check=False)
    assert result.returncode == 1 and "has no checkpoint" in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
