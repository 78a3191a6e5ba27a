"""GPT-2's weights from a hub: a server of this machine that has a small one, and all the faults of a network."""

import hashlib
import http.server
import threading

import pytest
import torch

import pretrained
from checkpoint import load_checkpoint, model_from
from errors import UserError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with openai-community/gpt2 in a small size; `faults` is what it does wrong, request by request."""
    import huggingface_hub
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, bos_token_id=0, eos_token_id=0)).eval()
    theirs.transformer.save_pretrained(tmp_path / "files")  # as the hub has it: without prefix and head
    content = (tmp_path / "files" / "model.safetensors").read_bytes()
    digest, faults, asked = hashlib.sha256(content).hexdigest(), [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def do_HEAD(self):
            self.answer(content, 200)

        def do_GET(self):
            begin = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
            asked.append(begin)
            fault = faults.pop(0) if faults else None
            if fault == 503:
                return self.send_error(503)
            part = content[begin:]
            self.answer(part, 206 if begin else 200)
            if fault == "half":
                part = part[: len(part) // 2]
            elif fault == "wrong":
                part = part[:-1] + bytes([part[-1] ^ 1])
            self.wfile.write(part)

        def answer(self, part, status):
            self.send_response(status)
            for name, value in (("ETag", f'"{digest}"'), ("X-Repo-Commit", "c" * 40), ("Content-Length", str(len(part)))):
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(pretrained, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(pretrained, "PAUSES", (0, 0, 0))
    monkeypatch.setitem(pretrained.SIZES, "gpt2", dict(n_layer=2, n_head=2, n_embd=32))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 2**16)  # it goes on after whole chunks
    monkeypatch.chdir(tmp_path)
    yield theirs, faults, asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("faults", [[], ["half"], [503], ["wrong"], ["half", "wrong", 503, "half"]], ids=str)
def test_the_weights_are_theirs_whatever_the_network_does(hub, faults):
    theirs, to_come, asked = hub
    to_come += faults
    ours = model_from(load_checkpoint("gpt2")).eval()
    idx = torch.arange(40)[None] * 1000
    with torch.no_grad():
        torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=1e-4, atol=1e-5)
    assert not to_come and (asked[1] > 0 if faults == ["half"] else True)
    n = len(asked)
    load_checkpoint("gpt2")  # from the cache
    assert len(asked) == n


def test_a_network_that_stays_wrong_leaves_no_file(hub, tmp_path):
    _, faults, _ = hub
    faults += ["wrong"] * 4
    with pytest.raises(UserError, match="openai-community/gpt2 could not be downloaded .it arrived damaged.: connect once"):
        load_checkpoint("gpt2")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.stat().st_size > 10_000]


def test_a_folder_of_that_name_comes_first(hub, tmp_path):
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(UserError, match="gpt2: no checkpoint there"):
        load_checkpoint("gpt2")
