"""HellaSwag: batched scores against those of one example at a time, bad files, downloads."""

import contextlib
import hashlib
import http.server
import io
import json
import math
import os
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED_DATA, TINY, script
from huggingface_hub import file_download
from torch.nn import functional as F

import hellaswag
from benchmarks.scoring import one_by_one
from hellaswag import Example, ending_losses, evaluate, load_examples
from model import GPT, GPTConfig
from stagewise.data import get_tokenizer
from stagewise.errors import UserError

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


# --------------------------------------------------------------------------------------------------
# scoring


def test_batched_scores_equal_those_of_one_example_at_a_time(model, examples):
    sums, counts = ending_losses(model, examples)
    assert sums.shape == (60, 4)
    for example, s, c in zip(examples, sums, counts):
        summed, mean = one_by_one(model, example)
        np.testing.assert_allclose(s, summed, rtol=1e-5)
        np.testing.assert_allclose(s / c, mean, rtol=1e-5)
    scores = evaluate(model, examples)
    labels = [e.label for e in examples]
    for name, which in (("acc", 0), ("acc_norm", 1)):
        correct = [
            one_by_one(model, e)[which].argmin().item() == label
            for e, label in zip(examples, labels)
        ]
        assert scores[name] == np.mean(correct)
        stderr = np.std(correct, ddof=1) / math.sqrt(60)
        assert scores[f"{name}_stderr"] == pytest.approx(stderr)


def test_acc_uses_the_sum_and_acc_norm_the_mean(model, examples):
    """On examples where the two choose different endings, relabelled with the choice of one."""
    by_sum, by_mean = zip(
        *(tuple(losses.argmin().item() for losses in one_by_one(model, e)) for e in examples)
    )
    differ = [(e, s, m) for e, s, m in zip(examples, by_sum, by_mean) if s != m]
    assert len(differ) > 3
    for chosen, expected in ((1, (1.0, 0.0)), (2, (0.0, 1.0))):
        relabelled = [Example(row[0].context, row[0].endings, row[chosen]) for row in differ]
        scores = evaluate(model, relabelled)
        assert (scores["acc"], scores["acc_norm"]) == expected


@pytest.mark.parametrize("batch_tokens", [1, 100, 1000, 10**6])
def test_scores_do_not_depend_on_the_batch_size(model, examples, batch_tokens):
    sums, _ = ending_losses(model, examples, batch_tokens=batch_tokens)
    np.testing.assert_allclose(sums, ending_losses(model, examples)[0], rtol=1e-5)


def test_scores_do_not_depend_on_padding(model, examples, monkeypatch):
    expected, shapes = ending_losses(model, examples)[0], []
    monkeypatch.setitem(hellaswag.LENGTH_MULTIPLE, "cpu", 32)
    hidden = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda *args: (shapes.append(args[0].shape), hidden(*args))[1]
    )
    np.testing.assert_allclose(ending_losses(model, examples)[0], expected, rtol=1e-5)
    assert all(T % 32 == 0 and B * T <= 1024 for B, T in shapes) and len(shapes) > 3


def test_scoring_and_sampling_exclude_cudnn_attention(model, examples):
    """It is the default on recent GPUs, but slow for inputs of many shapes."""
    enabled, idx = [], torch.zeros(1, 3, dtype=torch.long)

    def record(*args):
        backends = torch.backends.cuda
        enabled.append((backends.cudnn_sdp_enabled(), backends.flash_sdp_enabled()))

    hook = model.transformer.h[0].attn.register_forward_pre_hook(record)
    for function in (lambda: ending_losses(model, examples), lambda: model.generate(idx, 2)):
        function()
        assert set(enabled) == {(False, True)}
        enabled.clear()
    model(idx)
    hook.remove()
    assert enabled == [(True, True)]


def test_ranks_share_the_rows(model, examples, monkeypatch):
    # Leaves each rank with its own part of the sums.
    monkeypatch.setattr(hellaswag.dist, "all_reduce", lambda tensor: None)
    a, b = (ending_losses(model, examples, rank=rank, world_size=2)[0] for rank in (0, 1))
    assert ((a == 0) != (b == 0)).all()
    assert abs((a == 0).sum() - (b == 0).sum()) <= 1
    np.testing.assert_allclose(a + b, ending_losses(model, examples)[0], rtol=1e-5)


def test_ragged_endings_and_long_contexts(model):
    long = Example(list(range(200)), [[1, 2], [3], [4, 5, 6]], 1)
    short = Example([7], [[8] * 64, [9]], 0)
    sums, counts = ending_losses(model, [long, short])
    assert counts.tolist() == [[2, 1, 3], [64, 1, 1]]
    assert sums[1, 2] == math.inf and np.isfinite(sums[:, :2]).all()
    for i, example in enumerate((long, short)):
        expected = one_by_one(model, example)[0]
        np.testing.assert_allclose(sums[i, : len(example.endings)], expected, rtol=1e-5)


def test_model_that_knows_the_answers_gets_all_right(model):
    """It expects every number to be followed by the next one."""

    class Counter(torch.nn.Module):
        config, lm_head = model.config, SimpleNamespace(weight=10 * torch.eye(320))

        forward = GPT.forward

        def hidden(self, idx, positions, mask, residual_scales):
            return F.one_hot(idx + 1, 320).float()

    examples = []
    for i in range(20):
        endings = [[i + 10, i + 11], [i + 3], [i + 20, i + 5, i + 6]]
        endings.insert(i % 4, [i + 1, i + 2])
        examples.append(Example([5, i], endings, i % 4))
    scores = evaluate(Counter(), examples)
    assert scores == {"n": 20, "acc": 1, "acc_stderr": 0, "acc_norm": 1, "acc_norm_stderr": 0}


# --------------------------------------------------------------------------------------------------
# files


def write(path, *lines):
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return path


GOOD = {"ind": 1, "ctx": "A man", "endings": ["sits.", "flies."], "label": 1}


def test_any_file_in_the_format_is_read(tmp_path):
    path = write(tmp_path / "x.jsonl", GOOD, "", GOOD | {"label": "0", "more": None})
    a, b = load_examples(path, BYTES, 64)
    assert a == Example(list(b"A man"), [list(b" sits."), list(b" flies.")], 1) and b.label == 0
    assert len(load_examples(path, BYTES, 64, limit=1)) == 1
    odd = GOOD | {"ctx": "A\u2028B\u0085"}  # line separators, but not of JSON lines
    path.write_text(json.dumps(odd, ensure_ascii=False), encoding="utf-8")
    assert load_examples(path, BYTES, 64)[0].context == list("A\u2028B\u0085".encode())


def test_lm_eval_protocol(tmp_path):
    """The harness's text of lines with markers. tests/test_export.py runs the harness itself."""
    parts = {"activity_label": "Café", "ctx_a": " A  man [step] sat.", "ctx_b": "the LADY [title]"}
    endings = ["[step] sits [substeps]", "flies [title] Away", "é", "two  [x]words"]
    path = write(
        tmp_path / "x.jsonl",
        {"ctx": "unused"} | parts | {"endings": endings, "label": 1},
        GOOD | {"activity_label": "Sitting", "ctx": "A man. he"},
    )
    a, b = load_examples(path, BYTES, 64, protocol="lm_eval")
    assert bytes(a.context).decode() == "Café: A man sat. The lady."
    assert [bytes(ending).decode() for ending in a.endings] == [
        *("   sits ", "  flies. Away", "  é", "  two words")
    ]  # the space at the end of the context belongs to the ending
    assert a.lengths == [6, 11, 1, 9] and a.label == 1
    assert bytes(b.context) == b"Sitting: A man. he" and bytes(b.endings[0]) == b" sits."
    assert load_examples(path, BYTES, 64)[1].context == list(b"A man. he")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "activity_label: missing or empty, but the protocol lm_eval needs it"),
        ({"activity_label": ""}, "activity_label: missing or empty"),
        ({"activity_label": 1}, "activity_label: expected `str | null`"),
        ({"activity_label": "[x", "ctx": "y]"}, "has no text other than markers"),
    ],
)
def test_lines_without_what_the_protocol_needs(tmp_path, changes, message):
    path = write(tmp_path / "x.jsonl", GOOD | changes)
    with pytest.raises(UserError, match=f"x.jsonl, line 1: .*{message}"):
        load_examples(path, BYTES, 64, protocol="lm_eval")


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"ctx": "x', "truncated"),
        ('{"ctx": x}', "malformed"),
        ("[1]", "[Ee]xpected `object`, got `array`"),
        ({"ctx": "A man", "label": 1}, "missing required field `endings`"),
        (GOOD | {"ctx": ""}, "ctx: expected `str` of length >= 1"),
        (GOOD | {"ctx": None}, "ctx: expected `str`, got `null`"),
        (GOOD | {"endings": ["one"]}, "endings: expected `array` of length >= 2"),
        (GOOD | {"endings": "four"}, "endings: expected `array`, got `str`"),
        (GOOD | {"endings": ["a", 3]}, r"endings\[1\]: expected `str`, got `int`"),
        (GOOD | {"endings": ["a", ""]}, r"endings\[1\]: expected `str` of length >= 1"),
        (GOOD | {"label": 2}, "label: expected the index of an ending, 0 to 1, got 2"),
        (GOOD | {"label": -1}, "label: expected the index of an ending, 0 to 1, got -1"),
        (GOOD | {"label": 10**30}, "label: "),
        (GOOD | {"label": "9" * 5000}, "label: "),
        (GOOD | {"label": True}, "label: expected `int | str`, got `bool`"),
        (GOOD | {"label": 1.5}, "label: "),
        (GOOD | {"label": ""}, "label: "),
        (
            GOOD | {"endings": ["x" * 64, "y"]},
            "an ending has 65 tokens, more than block_size=64: .* the examples before it",
        ),
    ],
)
def test_errors_name_the_line(tmp_path, line, message):
    with pytest.raises(UserError, match=f"x.jsonl, line 2: .*{message}"):
        load_examples(write(tmp_path / "x.jsonl", GOOD, line), BYTES, 64)


def test_line_that_is_not_utf8(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"ctx": "\xff\xfe", "endings": ["a", "b"]}\n')
    with pytest.raises(UserError, match="x.jsonl, line 2: .*[uU]nicode|utf-8|UTF-8"):
        load_examples(path, BYTES, 64)


def test_missing_binary_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="x: No such file"):
        load_examples(tmp_path / "x", BYTES, 64)
    with pytest.raises(UserError, match="Is a directory"):
        load_examples(tmp_path, BYTES, 64)
    for content, message in ((b"\xff\xfe\x00", "x, line 1: "), (b"\n", "has no examples")):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_examples(tmp_path / "x", BYTES, 64)


# --------------------------------------------------------------------------------------------------
# downloads

CONTENT = bytes(range(256)) * 4000


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(hellaswag, "PAUSES", (0, 0, 0, 0))
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture
def serve(monkeypatch, no_pauses):
    """serve(respond): URL is a server that calls respond(handler, first byte that is wanted)."""
    with contextlib.ExitStack() as stack:

        def start(respond, content=CONTENT):
            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    assert self.headers["Accept-Encoding"] == "identity"
                    respond(self, int(self.headers.get("Range", "bytes=0-")[6:-1]))

                def log_message(self, *args):
                    pass

            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            monkeypatch.setattr(hellaswag, "URL", f"http://127.0.0.1:{server.server_port}/x")
            monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(content).hexdigest())
            return server

        yield start


def send(handler, start, part=None):
    """Respond with CONTENT from byte `start` on, or announce it and send `part` instead."""
    handler.send_response(206 if start else 200)
    handler.send_header("Content-Length", str(len(CONTENT) - start))
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
    handler.end_headers()
    handler.wfile.write(CONTENT[start:] if part is None else part)


def reset(handler):
    """Close the connection with a TCP reset."""
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.wfile = handler.rfile = io.BytesIO()


def test_failed_download_leaves_nothing(tmp_path, monkeypatch, no_pauses):
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9/x")  # nothing listens there
    with pytest.raises(
        UserError, match="could not be downloaded .*ConnectError.* file .* --hellaswag_data"
    ):
        hellaswag.download(tmp_path / "d" / "x.jsonl")
    assert not list((tmp_path / "d").iterdir())


def test_download_appears_only_with_the_right_checksum(tmp_path, serve):
    server = serve(lambda handler, start: send(handler, start), content=b"something else")
    with pytest.raises(UserError, match="its sha256 is .*, expected"):
        hellaswag.download(tmp_path / "x.jsonl")
    assert not list(tmp_path.iterdir())
    server.shutdown()
    server = serve(lambda handler, start: send(handler, start))
    with ThreadPoolExecutor(4) as several:  # as machines that share a folder do
        paths = several.map(hellaswag.download, [tmp_path / "x.jsonl"] * 4)
        assert all(path.read_bytes() == CONTENT for path in paths)
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]
    server.shutdown()
    assert hellaswag.download(tmp_path / "x.jsonl").read_bytes() == CONTENT  # without the server


def test_an_existing_file_is_used_if_it_is_the_official_one(tmp_path, monkeypatch):
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9/x")
    path = tmp_path / "x.jsonl"
    path.write_bytes(CONTENT)
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    assert hellaswag.download(path) == path
    path.write_text("mine")
    with pytest.raises(UserError, match="x.jsonl: is not the official validation set .* move it"):
        hellaswag.download(path)
    assert path.read_text() == "mine"


def test_download_continues_where_the_connection_broke(tmp_path, serve, capsys):
    starts = []
    half = len(CONTENT) // 2
    responses = [
        lambda handler, start: handler.send_error(503),
        lambda handler, start: send(handler, start, CONTENT[:half]),  # and closes
        lambda handler, start: handler.send_error(503),
        lambda handler, start: (
            send(handler, start, CONTENT[start : half + 200_000]),
            reset(handler),
        ),
        lambda handler, start: send(handler, start, CONTENT[start:-1] + b"x"),
        lambda handler, start: send(handler, start, CONTENT[:200_000]),
        lambda handler, start: send(handler, 0, CONTENT[:300_000]),  # does not support ranges
        lambda handler, start: send(handler, start),
    ]

    def respond(handler, start):
        assert not (tmp_path / "x.jsonl").exists()
        starts.append(start)
        responses[len(starts) - 1](handler, start)

    serve(respond)
    assert hellaswag.download(tmp_path / "x.jsonl").read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]
    chunk = 2**16  # what is received is written in chunks
    first, second, third, fourth, fifth, sixth, seventh, last = starts
    assert first == second == 0
    assert third == fourth and half - chunk < third <= half
    assert fourth <= fifth <= half + 200_000  # a reset may discard what was sent before it
    assert sixth == 0
    assert 200_000 - chunk < seventh <= 200_000
    assert 300_000 - chunk < last <= 300_000
    assert capsys.readouterr().err.count("; retrying") == 4


def test_download_continues_when_the_server_stalls(tmp_path, serve, monkeypatch):
    monkeypatch.setattr(file_download.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    starts = []

    def respond(handler, start):
        starts.append(start)
        if len(starts) == 1:
            send(handler, start, CONTENT[:500_000])
            time.sleep(1)
        else:
            send(handler, start)

    serve(respond)
    assert hellaswag.download(tmp_path / "x.jsonl").read_bytes() == CONTENT
    assert len(starts) == 2 and starts[1] > 0


def test_download_gives_up(tmp_path, serve):
    starts = []

    def respond(handler, start):
        starts.append(start)
        handler.send_error(503)

    serve(respond)
    with pytest.raises(UserError, match="could not be downloaded .*503"):
        hellaswag.download(tmp_path / "x.jsonl")
    assert starts == [0] * 5 and not list(tmp_path.iterdir())


def test_download_to_a_folder_that_cannot_be_written(serve):
    serve(lambda handler, start: send(handler, start))
    with pytest.raises(UserError, match="/proc/x.jsonl: No such file"):
        hellaswag.download(hellaswag.Path("/proc/x.jsonl"))


def test_full_disk(tmp_path, serve, monkeypatch):
    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    serve(lambda handler, start: send(handler, start))
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="x.jsonl: No space left"):
        hellaswag.download(tmp_path / "x.jsonl")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# the official task, the command


@pytest.mark.skipif(not (SHARED_DATA / "hellaswag").exists(), reason="needs the validation set")
def test_official_validation_set(monkeypatch):
    """Its known size and GPT-2 BPE statistics."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED_DATA / "tiktoken_cache"))
    examples = load_examples(
        SHARED_DATA / "hellaswag" / "hellaswag_val_text.jsonl", get_tokenizer("gpt2"), 1024
    )
    assert len(examples) == 10_042 and all(len(e.endings) == 4 for e in examples)
    assert np.mean([len(e.context) for e in examples]) == pytest.approx(45.4, abs=0.05)
    assert np.mean([len(t) for e in examples for t in e.endings]) == pytest.approx(29.3, abs=0.05)


def test_command_line(corpus, run_train, capsys):
    out = run_train("run", steps=2)
    task = corpus / "hellaswag.jsonl"
    result = script("hellaswag.py", out, f"--data={task}", "--limit=10", "--device=cpu")
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    score, stderr = last["hellaswag_acc_norm"], last["hellaswag_acc_norm_stderr"]
    assert f"acc_norm {score:.4f} +- {stderr:.4f}" in result.stdout
    capsys.readouterr()
    hellaswag.main(hellaswag.Args(out, limit=10, device="cpu"))  # the task that the run used
    assert capsys.readouterr().out == result.stdout
    assert f"10 examples of {task}" in result.stdout
    with pytest.raises(UserError, match="--limit=-1 must not be negative"):
        hellaswag.main(hellaswag.Args(out, limit=-1))


def test_errors_are_one_line(tmp_path):
    result = script("hellaswag.py", tmp_path, check=False)
    assert result.returncode == 1 and "has no checkpoint" in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_diverged_model_has_no_scores(model):
    """NaN is the smallest value for argmin: every score would depend on chance alone."""
    examples = [Example([5, 6], [[1, 2], [3], [4, 4]], 0), Example([5], [[1], [3]], 1)]
    assert not math.isnan(evaluate(model, examples)["acc"])
    with torch.no_grad():
        model.lm_head.weight[1] = math.nan
    scores = evaluate(model, examples)
    assert scores.pop("n") == 2 and all(map(math.isnan, scores.values()))


def test_thousands_of_endings_are_an_error(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(GOOD | {"endings": ["a"] * 10_000}))
    with pytest.raises(UserError, match="x.jsonl, line 1: endings: expected `array` of length <="):
        load_examples(tmp_path / "x.jsonl", get_tokenizer("bytes"), 64)


def test_a_run_is_scored_on_its_own_file_from_any_directory(run_train, corpus, tmp_path):
    out = run_train("run", steps=1, data_dir=os.path.relpath(corpus))
    result = script(ROOT / "hellaswag.py", out, "--limit=3", "--device=cpu", cwd=tmp_path)
    assert f"3 examples of {corpus}/hellaswag.jsonl" in result.stdout
