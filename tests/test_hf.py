"""Weights from and to transformers' GPT-2, and OpenAI's from a Hub over a faulty network."""

import hashlib
import http.server
import threading

import pytest
import torch

from model import GPT, GPTConfig
from stagewise import hf
from stagewise.checkpoint import load_checkpoint
from stagewise.errors import UserError

# --- state dicts


@pytest.fixture(scope="module")
def transformers_model():
    """transformers' GPT-2, small, with random weights and biases."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = dict(vocab_size=301, n_positions=64, n_embd=48, n_layer=3, n_head=4)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(
            p, std=0.2
        )  # large weights, so that a wrong activation or scale shows
    return model


def gpt(vocab_size):
    sizes = dict(block_size=64, vocab_size=vocab_size, n_layer=3, n_head=4, n_embd=48)
    return GPT(GPTConfig(**sizes))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_logits_and_loss_agree_with_transformers(transformers_model, dtype, tolerance):
    ours, theirs = gpt(301).to(dtype), transformers_model.to(dtype)
    ours.load_state_dict(hf.from_hf(theirs.state_dict()))
    idx = torch.randint(301, (2, 64), generator=torch.Generator().manual_seed(1))
    expected = theirs(idx, labels=idx)
    assert expected.logits.abs().max() > 1
    torch.testing.assert_close(ours(idx), expected.logits, rtol=tolerance, atol=tolerance)
    loss = ours(idx[:, :-1], idx[:, 1:])
    torch.testing.assert_close(loss.float(), expected.loss.float())  # theirs is float32


def test_weights_go_to_transformers_and_back_with_a_padded_vocabulary(transformers_model):
    theirs, ours = transformers_model.float(), gpt(320)
    ours.load_state_dict(hf.from_hf(theirs.state_dict(), vocab_size=320))
    back = hf.to_hf(ours.state_dict(), vocab_size=301)
    assert back.keys() == theirs.state_dict().keys()
    for name, w in theirs.state_dict().items():
        assert torch.equal(w, back[name]), name
    theirs.load_state_dict(back)
    idx = torch.randint(301, (2, 64), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(idx)[..., :301], theirs(idx).logits, rtol=1e-4, atol=1e-4)


# --- downloads


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with openai-community/gpt2 in a small size.

    `faults` is what it does wrong, request by request; `requests` the byte each request began at.
    """
    import huggingface_hub
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_layer=2, n_head=2, n_embd=32)
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    theirs.transformer.save_pretrained(tmp_path / "files")  # without prefix and head, as on the Hub
    content = (tmp_path / "files" / "model.safetensors").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    faults: list = []
    requests: list[int] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def do_HEAD(self):
            self.answer(content, 200)

        def do_GET(self):
            begin = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
            requests.append(begin)
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
            self.send_header("ETag", f'"{digest}"')
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(hf, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(hf, "PAUSES", (0, 0, 0))
    monkeypatch.setitem(hf.SIZES, "gpt2", sizes)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)  # it resumes after complete chunks
    monkeypatch.chdir(tmp_path)
    yield theirs, faults, requests
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "faults", [[], ["half"], [503], ["wrong"], ["half", "wrong", 503, "half"]], ids=str
)
def test_downloaded_weights_are_correct_whatever_the_network_does(hub, faults):
    theirs, to_come, requests = hub
    to_come += faults
    checkpoint = load_checkpoint("gpt2")
    ours = GPT.from_weights(checkpoint["model_config"], checkpoint["model"]).eval()
    idx = torch.arange(40)[None] * 1000
    with torch.no_grad():
        torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=1e-4, atol=1e-5)
    assert not to_come
    if faults == ["half"]:
        assert requests[1] > 0
    n = len(requests)
    load_checkpoint("gpt2")  # from the cache
    assert len(requests) == n


def test_a_network_that_stays_faulty_leaves_no_file(hub, tmp_path):
    _, faults, _ = hub
    faults += ["wrong"] * 4
    with pytest.raises(
        UserError,
        match="openai-community/gpt2 could not be downloaded .its checksum is wrong.: check the",
    ):
        load_checkpoint("gpt2")
    files = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert not [p for p in files if p.stat().st_size > 10_000]


def test_a_folder_of_that_name_takes_precedence(hub, tmp_path):
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(UserError, match="gpt2: has no checkpoint"):
        load_checkpoint("gpt2")
