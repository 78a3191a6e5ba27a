"""Scoring: batched against one by one, and bad files."""

import hashlib
import http.server
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import hellaswag
from data import get_tokenizer
from errors import UserError
from benchmarks.scoring import one_by_one
from hellaswag import Example, ending_losses, evaluate, load_examples
from model import GPT, GPTConfig

from conftest import SHARED_DATA, TINY, script

BYTES = get_tokenizer("bytes")


@pytest.fixture(scope="module")
def model():
    """Random weights, large enough that endings differ clearly."""
    model = GPT(GPTConfig(**TINY)).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def examples(corpus):
    return load_examples(corpus / "hellaswag.jsonl", BYTES, 64, limit=60)


def test_batched_scores_are_the_one_by_one_scores(model, examples):
    sums, counts = ending_losses(model, examples)
    assert sums.shape == (60, 4)
    for example, s, c in zip(examples, sums, counts):
        summed, mean = one_by_one(model, example)
        np.testing.assert_allclose(s, summed, rtol=1e-5)
        np.testing.assert_allclose(s / c, mean, rtol=1e-5)
    r = evaluate(model, examples)
    labels = [e.label for e in examples]
    for name, which in (("acc", 0), ("acc_norm", 1)):
        right = [one_by_one(model, e)[which].argmin().item() == label for e, label in zip(examples, labels)]
        assert r[name] == np.mean(right)
        assert r[f"{name}_stderr"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(60))


def test_acc_goes_by_the_sum_and_acc_norm_by_the_mean(model, examples):
    """On examples where the two choose different endings, relabelled with the choice of one of them."""
    by_sum, by_mean = zip(*(tuple(losses.argmin().item() for losses in one_by_one(model, e)) for e in examples))
    differ = [(e, s, m) for e, s, m in zip(examples, by_sum, by_mean) if s != m]
    assert len(differ) > 3
    for chosen, expected in ((1, (1.0, 0.0)), (2, (0.0, 1.0))):
        r = evaluate(model, [Example(row[0].context, row[0].endings, row[chosen]) for row in differ])
        assert (r["acc"], r["acc_norm"]) == expected


@pytest.mark.parametrize("batch_tokens", [1, 100, 1000, 10**6])
def test_the_batch_size_does_not_matter(model, examples, batch_tokens):
    np.testing.assert_allclose(ending_losses(model, examples, batch_tokens=batch_tokens)[0], ending_losses(model, examples)[0], rtol=1e-5)


def test_ranks_share_the_rows(model, examples, monkeypatch):
    monkeypatch.setattr(hellaswag.dist, "all_reduce", lambda tensor: None)  # what each rank has before they are added up
    a, b = (ending_losses(model, examples, rank=rank, world_size=2)[0] for rank in (0, 1))
    assert ((a == 0) != (b == 0)).all() and abs((a == 0).sum() - (b == 0).sum()) <= 1
    np.testing.assert_allclose(a + b, ending_losses(model, examples)[0], rtol=1e-5)


def test_ragged_endings_and_long_contexts(model):
    long = Example(list(range(200)), [[1, 2], [3], [4, 5, 6]], 1)
    short = Example([7], [[8] * 64, [9]], 0)
    sums, counts = ending_losses(model, [long, short])
    assert counts.tolist() == [[2, 1, 3], [64, 1, 1]] and sums[1, 2] == math.inf and np.isfinite(sums[:, :2]).all()
    for i, example in enumerate((long, short)):
        np.testing.assert_allclose(sums[i, : len(example.endings)], one_by_one(model, example)[0], rtol=1e-5)


def test_a_model_that_knows_the_answers_gets_all_right(model):
    """It expects every number to be followed by the next one."""

    class Counter(torch.nn.Module):
        config, lm_head = model.config, SimpleNamespace(weight=10 * torch.eye(320))

        def hidden(self, idx, positions, mask):
            return F.one_hot(idx + 1, 320).float()

    examples = []
    for i in range(20):
        endings = [[i + 10, i + 11], [i + 3], [i + 20, i + 5, i + 6]]
        endings.insert(i % 4, [i + 1, i + 2])
        examples.append(Example([5, i], endings, i % 4))
    assert evaluate(Counter(), examples) == {"n": 20, "acc": 1.0, "acc_stderr": 0.0, "acc_norm": 1.0, "acc_norm_stderr": 0.0}


# --- files


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


GOOD = {"ind": 1, "ctx": "A man", "endings": ["sits.", "flies."], "label": 1}


def test_any_file_of_the_form_is_read(tmp_path):
    (a, b) = load_examples(write(tmp_path / "x.jsonl", GOOD, "", GOOD | {"label": "0", "more": None}), BYTES, 64)
    assert a == Example(list(b"A man"), [list(b" sits."), list(b" flies.")], 1) and b.label == 0
    assert len(load_examples(tmp_path / "x.jsonl", BYTES, 64, limit=1)) == 1
    odd = GOOD | {"ctx": "A\u2028B\u0085"}  # line separators, but not of JSON lines
    (tmp_path / "y.jsonl").write_text(json.dumps(odd, ensure_ascii=False), encoding="utf-8")
    assert load_examples(tmp_path / "y.jsonl", BYTES, 64)[0].context == list("A\u2028B\u0085".encode())


@pytest.mark.parametrize(
    "line, named",
    [
        ('{"ctx": "x', "is no JSON"),
        ("[1]", "must be an object"),
        (GOOD | {"ctx": ""}, "`ctx`"),
        (GOOD | {"ctx": None}, "`ctx`"),
        (GOOD | {"endings": ["one"]}, "`endings`"),
        (GOOD | {"endings": "four"}, "`endings`"),
        (GOOD | {"endings": ["a", 3]}, "`endings`"),
        (GOOD | {"label": 2}, "`label` must be the number of an ending, 0 to 1"),
        (GOOD | {"label": True}, "`label`"),
        (GOOD | {"label": ""}, "`label`"),
        (GOOD | {"endings": ["x" * 64, "y"]}, "an ending of 65 tokens does not fit into block_size=64"),
    ],
)
def test_bad_lines_are_refused_by_number(tmp_path, line, named):
    with pytest.raises(UserError, match=f"x.jsonl, line 2: .*{named}"):
        load_examples(write(tmp_path / "x.jsonl", GOOD, line), BYTES, 64)


def test_missing_binary_and_empty_files_are_refused(tmp_path):
    for content, named in ((None, "cannot be read"), (b"\xff\xfe\x00", "cannot be read"), (b"\n", "holds no examples")):
        if content is not None:
            (tmp_path / "x").write_bytes(content)
        with pytest.raises(UserError, match=named):
            load_examples(tmp_path / "x", BYTES, 64)


def test_a_download_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(hellaswag, "PAUSES", (0, 0))
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9/hellaswag_val.jsonl")  # nothing listens there
    with pytest.raises(UserError, match="could not be downloaded .* name a file of its form with --hellaswag_data"):
        hellaswag.download(tmp_path / "d" / "x.jsonl")
    assert not list((tmp_path / "d").iterdir())


def test_a_download_is_checked_and_kept(tmp_path, monkeypatch):
    """Against a real server of this machine."""
    monkeypatch.setattr(hellaswag, "PAUSES", (0, 0))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"content")

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(hellaswag, "URL", f"http://127.0.0.1:{server.server_port}/x")
    with pytest.raises(UserError, match="arrived damaged"):
        hellaswag.download(tmp_path / "x.jsonl")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(b"content").hexdigest())
    with ThreadPoolExecutor(4) as several:  # as machines that share a folder do
        assert {p.read_bytes() for p in several.map(hellaswag.download, [tmp_path / "x.jsonl"] * 4)} == {b"content"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]
    server.shutdown()
    assert hellaswag.download(tmp_path / "x.jsonl").read_bytes() == b"content"  # without the server
    server.server_close()


def test_a_download_goes_on_where_it_broke(tmp_path, monkeypatch, capsys):
    """A server that answers 503, closes the connection half-way, sends wrong bytes, knows no ranges, and at last does its work."""
    content = bytes(range(256)) * 4000
    half = len(content) // 2
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
            asked.append(begin)
            turn = len(asked)
            if turn == 1:
                return self.send_error(503)
            ranged = begin and turn != 5
            part = content[begin:] if ranged else content
            self.send_response(206 if ranged else 200)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if turn in (2, 4):
                part = part[: half if turn == 2 else half // 2]  # and closes
            elif turn == 3:
                part = part[:-1] + b"x"
            self.wfile.write(part)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(hellaswag, "URL", f"http://127.0.0.1:{server.server_port}/x")
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(hellaswag, "PAUSES", (0, 0, 0, 0))
    assert hellaswag.download(tmp_path / "x.jsonl").read_bytes() == content
    assert asked[:2] == [0, 0] and 0 < asked[2] <= half
    assert asked[3] == 0 and 0 < asked[4] <= half // 2  # the third ended in wrong bytes, so the fourth began anew
    assert capsys.readouterr().err.count("trying again") == 4 and [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(not (SHARED_DATA / "hellaswag").exists(), reason="needs the real validation set in shared/data/hellaswag")
def test_the_real_validation_set(monkeypatch):
    """Its known size and GPT-2 BPE statistics."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED_DATA / "tiktoken_cache"))
    examples = load_examples(SHARED_DATA / "hellaswag" / "hellaswag_val_text.jsonl", get_tokenizer("gpt2"), 1024)
    assert len(examples) == 10_042 and all(len(e.endings) == 4 for e in examples)
    assert np.mean([len(e.context) for e in examples]) == pytest.approx(45.4, abs=0.05)
    assert np.mean([len(t) for e in examples for t in e.endings]) == pytest.approx(29.3, abs=0.05)


def test_from_the_command_line(corpus, run_train):
    out = run_train("run", steps=2)
    result = script("hellaswag.py", out, "--data", corpus / "hellaswag.jsonl", "--limit", "10", "--device", "cpu")
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"acc_norm {last['hellaswag_acc_norm']:.4f} +- {last['hellaswag_acc_norm_stderr']:.4f}" in result.stdout
    result = script("hellaswag.py", out, "--limit", "10", "--device", "cpu")  # the task that the run used
    assert f"10 examples of {corpus / 'hellaswag.jsonl'}" in result.stdout
    result = script("hellaswag.py", corpus, check=False)
    assert result.returncode == 1 and "no checkpoint there" in result.stderr and "Traceback" not in result.stderr
