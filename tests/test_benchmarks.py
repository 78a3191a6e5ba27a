"""The bench, run as a user runs it, at a size of no interest."""

import json
import shutil

import pytest

from conftest import script

SMALL = ["--n_layer=4", "--n_embd=32", "--n_head=2", "--block_size=32", "--tokens_per_step=256", "--batch_size=4"]
QUICK = [*SMALL, "--device=cpu", "--compile=none", "--rounds=3", "--min_seconds=0"]

PEER = '''
import torch
from torch import nn
from dataclasses import dataclass
from a_module_that_is_not_there import something

raise SystemExit("a peer's script must not run")

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, x, y):
        logits = self.wte(x) @ self.wte.weight.T
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
'''


def test_every_phase_is_timed_beside_what_its_flops_predict(tmp_path):
    (tmp_path / "train_gpt2.py").write_text(PEER)
    peers = ["--peer", f"build_nanogpt={tmp_path}", "--peer", "hf", "--variant", "erf"]
    result = script("bench.py", *QUICK, "--stages=2", *peers, f"--json={tmp_path / 'r.json'}")
    report = json.loads((tmp_path / "r.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    phases = [f"stage {s} phase {p}" for s in (1, 2) for p in (1, 2)]
    assert list(rows) == ["baseline", *phases, "erf", "build_nanogpt", "hf"]
    assert all(name in result.stdout for name in rows)
    assert [rows[p]["trained_blocks"] for p in phases] == [2, 2, 2, 4] and [rows[p]["blocks"] for p in phases] == [2, 2, 4, 4]
    assert rows["baseline"]["time_ratio"] == rows["baseline"]["flops_ratio"] == rows["stage 2 phase 2"]["time_ratio"] == 1
    assert rows["stage 1 phase 1"]["flops_ratio"] < rows["stage 2 phase 1"]["flops_ratio"] < 1
    for row in rows.values():
        assert row["tokens_per_second"] == pytest.approx(256 / row["seconds"]) and 0 <= row["data_wait"] < 1
    assert all(rows[p]["peak_memory"] > 2**20 and rows[p]["graphs"] == 0 for p in phases)
    assert report["machine"]["torch"] in result.stdout and report["matrix_product_flops"] > 1e9


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_graphs_and_compile_seconds_are_counted(tmp_path):
    script("bench.py", *QUICK, "--stages=2", "--compile=blocks", f"--json={tmp_path / 'r.json'}")
    rows = [row for row in json.loads((tmp_path / "r.json").read_text())["rows"] if "graphs" in row]
    assert rows[0]["graphs"] >= 2 and rows[0]["compile_seconds"] > 0 and 3 <= sum(row["graphs"] for row in rows) <= 4


@pytest.mark.parametrize(
    "options, named",
    [
        (["--peer", "nanogpt"], "--peer=nanogpt: model.py is not in 'DIR'; give a checkout"),
        (["--peer", "llmc=x"], "is none of nanogpt, build_nanogpt, hf"),
        (["--variant", "fast"], "--variant=fast is unknown: use none, blocks"),
        (["--peer_batch_size", "3"], "batch_size=3 does not divide"),
        (["--rounds=0"], "--rounds=0 must be at least 1"),
    ],
)
def test_bad_options_are_refused_by_name(options, named):
    result = script("bench.py", *QUICK, *options, check=False)
    assert result.returncode == 1 and named in result.stderr and "Traceback" not in result.stderr
