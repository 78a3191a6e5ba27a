"""Text from a checkpoint."""

import torch

from checkpoint import load_checkpoint, model_from
from data import get_tokenizer

from conftest import script


def test_samples_go_on_from_the_prompt(run_train):
    out = run_train("run", steps=2)
    command = ("sample.py", out, "--prompt", "import os", "--max_new_tokens", "20", "--device", "cpu")
    result = script(*command, "--num_samples", "2")
    assert result.stdout.startswith("--- sample 1\nimport os") and "--- sample 2\nimport os" in result.stdout
    assert script(*command, "--num_samples", "2").stdout == result.stdout
    greedy = script(*command, "--num_samples", "1", "--temperature", "0").stdout
    model, bytes_ = model_from(load_checkpoint(out)).eval(), get_tokenizer("bytes")
    expected = model.generate(torch.tensor([[256, *b"import os"]]), 20, temperature=0, n_vocab=257)
    assert greedy == f"--- sample 1\n{bytes_.decode(expected[0, 1:].tolist())}\n"


def test_mistakes_are_one_line(tmp_path):
    for arguments in ((tmp_path,), (tmp_path, "--temperature", "-1")):
        result = script("sample.py", *arguments, check=False)
        assert result.returncode == 1 and result.stderr.startswith("error: ") and "Traceback" not in result.stderr
