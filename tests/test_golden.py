"""A checkpoint of format 1, stored in tests/golden/, must load and resume in every later version.

It was created by `python tests/test_golden.py`. Do not regenerate it: a new format gets a new
folder.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from model import GPT
from stagewise.checkpoint import FORMAT_VERSION, load_checkpoint, optimizer_state_from
from stagewise.data import write_shard
from stagewise.errors import UserError
from stagewise.fileio import sha256

GOLDEN = Path(__file__).parent / "golden" / "format_1"
OPTIONS = [
    *("--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=32", "--tokens_per_step=256"),
    *("--batch_size=4", "--steps=8", "--stages=2", "--continual_steps=4", "--growth=stack"),
    *("--optimizer_state=copy", "--learning_rate=1e-2", "--context_ramp=0:16 50%:32"),
    *("--checkpoint_interval=7", "--log_interval=1", "--eval_interval=4", "--eval_tokens=1024"),
    *("--hellaswag_data=none", "--device=cpu", "--compile=none", "--grad_clip=1"),
]


def write_corpus(folder: Path) -> None:
    """Write a deterministic corpus with a learnable pattern."""
    folder.mkdir(parents=True)
    random = np.random.RandomState(0)
    tokens = (np.arange(20_000) % 7 * 20 + random.randint(3, size=20_000)).astype(np.uint16)
    entries = []
    for split, part in (("val", tokens[:2000]), ("train", tokens[2000:])):
        path = folder / f"golden_{split}_{len(entries):06d}.bin"
        write_shard(path, part)
        entries.append({"file": path.name, "split": split, "tokens": len(part)})
        entries[-1]["sha256"] = sha256(path)
    meta = {"tokenizer": "bytes", "vocab_size": 257, "shards": entries}
    (folder / "meta.json").write_text(json.dumps(meta))


def logits(checkpoint) -> torch.Tensor:
    model = GPT.from_weights(checkpoint["model_config"], checkpoint["model"]).eval()
    with torch.no_grad():
        return model(torch.arange(32)[None] * 4)[0, -1, :8]


def test_the_golden_checkpoint_loads():
    checkpoint = load_checkpoint(GOLDEN / "step_00000007", optimizer=True)
    expected = json.loads((GOLDEN / "expected.json").read_text())
    assert (checkpoint["step"], checkpoint["n_blocks"]) == (7, 2)
    torch.testing.assert_close(
        logits(checkpoint), torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-5
    )
    model = GPT.from_weights(checkpoint["model_config"], checkpoint["model"])
    state = optimizer_state_from(checkpoint["optimizer"], dict(model.named_parameters()))
    assert len(state) == len(list(model.parameters()))


def test_the_golden_checkpoint_resumes(tmp_path, monkeypatch):
    write_corpus(tmp_path / "data")
    shutil.copytree(GOLDEN / "step_00000007", tmp_path / "run/checkpoints/step_00000007")
    places = [f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *OPTIONS, *places, "--init_from=resume"])
    train.main()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    expected = json.loads((GOLDEN / "expected.json").read_text())
    assert [row["step"] for row in rows] == [8, 9, 10, 11, 12]
    assert [row["loss"] for row in rows] == pytest.approx(expected["losses"], rel=1e-4)


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, "1", None])
def test_other_format_versions_raise_an_error(version, tmp_path):
    copy = shutil.copytree(GOLDEN / "step_00000007", tmp_path / "step_00000007")
    state = json.loads((copy / "state.json").read_text()) | {"format_version": version}
    if version is None:  # written before the field existed
        del state["format_version"]
    (copy / "state.json").write_text(json.dumps(state))
    lines = (copy / "SHA256SUMS").read_text().splitlines()
    lines = [line for line in lines if not line.endswith("state.json")]
    lines.append(f"{sha256(copy / 'state.json')}  state.json")
    (copy / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    said = "not a valid checkpoint" if version == "1" else f"checkpoint format {version or 0}, but"
    with pytest.raises(UserError, match=said):
        load_checkpoint(copy)


def make() -> None:
    """Write tests/golden/format_N from a run in the current folder."""
    write_corpus(Path("data/golden"))
    places = ["--data_dir=data/golden", "--out_dir=out/golden"]
    sys.argv = ["train.py", *OPTIONS, *places, "--keep_checkpoints=9"]
    train.main()
    out = Path("out/golden")
    shutil.copytree(out / "checkpoints/step_00000007", GOLDEN / "step_00000007")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    checkpoint = load_checkpoint(GOLDEN / "step_00000007")
    expected = {"logits": logits(checkpoint).tolist(), "losses": [r["loss"] for r in rows[8:]]}
    (GOLDEN / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    make()
