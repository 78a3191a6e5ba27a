"""Checkpoints of nanoGPT: weights, prefixes, tokenizer, files that are not checkpoints."""

import math
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import SHARED_DATA, metrics, script
from torch import nn
from torch.nn import functional as F

import export
import hellaswag
import sample
from model import GPT
from stagewise.checkpoint import load_checkpoint
from stagewise.errors import UserError
from stagewise.nanogpt import load_nanogpt

SIZES = dict(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=50304, dropout=0.0)


class Reference(nn.Module):
    """nanoGPT's model with its parameter names, and with the tanh approximation of GELU."""

    def __init__(self, n_layer, n_head, n_embd, block_size, vocab_size, dropout, bias):
        super().__init__()
        C, self.n_head = n_embd, n_head

        def part(**modules):
            return nn.ModuleDict(modules)

        def linear(n, m):
            return nn.Linear(n, m, bias=bias)

        def norm():
            return nn.LayerNorm(C, bias=bias)

        blocks = [
            part(
                ln_1=norm(), attn=part(c_attn=linear(C, 3 * C), c_proj=linear(C, C)),
                ln_2=norm(), mlp=part(c_fc=linear(C, 4 * C), c_proj=linear(4 * C, C)),
            )
            for _ in range(n_layer)
        ]  # fmt: skip
        self.transformer = part(
            wte=nn.Embedding(vocab_size, C), wpe=nn.Embedding(block_size, C),
            h=nn.ModuleList(blocks), ln_f=norm(),
        )  # fmt: skip
        self.lm_head = nn.Linear(C, vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight
        for p in self.parameters():
            nn.init.normal_(p, std=0.2)

    def forward(self, idx):
        t, (B, T) = self.transformer, idx.shape
        x = t["wte"](idx) + t["wpe"](torch.arange(T))
        for block in t["h"]:
            q, k, v = (
                y.view(B, T, self.n_head, -1).transpose(1, 2)
                for y in block["attn"]["c_attn"](block["ln_1"](x)).chunk(3, dim=2)
            )
            scores = (q @ k.mT) / math.sqrt(q.shape[-1])
            scores = scores.masked_fill(torch.ones(T, T).triu(1) > 0, -math.inf)
            y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
            x = x + block["attn"]["c_proj"](y)
            y = F.gelu(block["mlp"]["c_fc"](block["ln_2"](x)), approximate="tanh")
            x = x + block["mlp"]["c_proj"](y)
        return self.lm_head(t["ln_f"](x))


def save(path, bias=True, prefix="", masks=False, **changes):
    """Write what nanoGPT's train.py writes, and return the model."""
    torch.manual_seed(0)
    args = SIZES | {"bias": bias}
    model = Reference(**args)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8)[None]).sum().backward()
    optimizer.step()
    weights = {prefix + name: w for name, w in model.state_dict().items()}
    if masks:
        for i in range(SIZES["n_layer"]):
            weights[f"{prefix}transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    checkpoint = {
        "model": weights,
        "optimizer": optimizer.state_dict(),
        "model_args": args,
        "iter_num": 1000,
        "best_val_loss": torch.tensor(3.5),
        "config": {"dataset": "openwebtext", "learning_rate": 6e-4, "compile": True},
    }
    torch.save(checkpoint | changes, path)
    return model


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"prefix": "_orig_mod."}, {"masks": True}], ids=str
)
def test_logits_are_equal(tmp_path, options):
    reference = save(tmp_path / "ckpt.pt", **options)
    checkpoint = load_checkpoint(tmp_path / "ckpt.pt")
    assert (checkpoint["step"], checkpoint["n_blocks"]) == (1000, 2)
    assert checkpoint["tokenizer"] == "gpt2"
    ours = GPT.from_weights(checkpoint["model_config"], checkpoint["model"]).eval()
    idx = torch.randint(50304, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(idx)
        assert expected.std() > 0.2
        torch.testing.assert_close(ours(idx), expected, rtol=1e-4, atol=1e-4)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"config": Harmful()}, "cannot|without executing code"),
        ({"config": SimpleNamespace(a=1)}, "without executing code"),  # such as build-nanogpt's
        ({"model": None}, "needs model and model_args"),
        ({"model": {}}, "KeyError: 'transformer.wte.weight'"),
        ({"model_args": {}}, "n_layer"),
        ({"model_args": SIZES | {"n_embd": "x"}}, "n_embd"),
        ({"model_args": SIZES | {"vocab_size": 65}}, "has a vocabulary of 65, but only"),
        ({"iter_num": "x"}, "ValueError"),
    ],
    ids=str,
)
def test_other_files_raise_an_error(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "ckpt.pt", **changes)
    with pytest.raises(UserError, match=f"ckpt.pt: .*({message})"):
        load_nanogpt(tmp_path / "ckpt.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04", b"text", bytes(9)], ids=str)
def test_corrupted_files_raise_an_error(tmp_path, content):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="ckpt.pt: is not a checkpoint of nanoGPT"):
        load_checkpoint(path)
    save(path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match="ckpt.pt: is not a checkpoint of nanoGPT"):
        load_checkpoint(path)


def test_weights_that_do_not_fit_raise_an_error(tmp_path):
    save(tmp_path / "ckpt.pt", model_args=SIZES | {"n_embd": 64})
    checkpoint = load_checkpoint(tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="do not fit"):
        GPT.from_weights(checkpoint["model_config"], checkpoint["model"])


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="needs GPT-2's vocabulary")
def test_every_command_reads_it(tmp_path, run_train, monkeypatch, capsys):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED_DATA / "tiktoken_cache"))
    path = tmp_path / "ckpt.pt"
    save(path, bias=False)
    (tmp_path / "text.txt").write_text("It was a dark and stormy night. " * 500)
    corpus = tmp_path / "corpus"
    script("fineweb.py", f"--source={tmp_path / 'text.txt'}", f"--out={corpus}")
    options = dict(data_dir=corpus, hellaswag_data="none", n_layer=3, bias=False, steps=1)
    options |= dict(tokens_per_step=512, eval_tokens=64, learning_rate=0, weight_decay=0)
    out = run_train("run", init_weights=path, growth="zero_output", **options)
    grown = load_checkpoint(out)
    for name, w in load_nanogpt(path)["model"].items():
        assert torch.equal(w, grown["model"][name])
    assert grown["n_blocks"] == 3 and grown["initial_cost"] == {}
    assert metrics(out)[0]["val_bpb"] > 0

    capsys.readouterr()
    sample.main(sample.Args(path, max_new_tokens=5, num_samples=1, device="cpu"))
    assert capsys.readouterr().out.startswith("--- sample 1\n")
    task = tmp_path / "hellaswag.jsonl"
    task.write_text('{"ctx": "A man", "endings": ["sits.", "flies."], "label": 1}\n')
    hellaswag.main(hellaswag.Args(path, data=task, device="cpu"))
    assert capsys.readouterr().out.startswith("step 1000, 2 blocks, 1 examples")
    export.main(export.Args(path, tmp_path / "export"))
    assert "schedule and cost are not known" in (tmp_path / "export/README.md").read_text()
