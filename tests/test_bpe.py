"""Tokenizers that are trained on a sample of the corpus."""

import json
import shutil

import pytest
import tokenizers
from conftest import SHARED_DATA

import hellaswag
import sample
from stagewise import bpe
from stagewise.builtin import stdlib_documents
from stagewise.data import get_tokenizer
from stagewise.errors import UserError

TEXTS = ["the cat, the hat and the bat", "Grüße\n\n  an   alle\t12345 €!", "a" * 50, "x\x00y"] * 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / bpe.FILE
    bpe.train_bpe((text for _, text in stdlib_documents()[:40]), 1000, path)
    return path


def test_tokens_are_those_of_the_tokenizers_library(trained):
    encoding, reference = bpe.load_bpe(trained), tokenizers.Tokenizer.from_file(str(trained))
    assert (encoding.n_vocab, encoding.eot_token) == (1000, 999)
    assert reference.get_vocab_size() == 1000
    texts = [text for _, text in stdlib_documents()[20:60]] + TEXTS
    n_tokens = 0
    for text in texts:
        tokens = encoding.encode_ordinary(text)
        assert tokens == reference.encode(text).ids
        assert encoding.decode(tokens) == text == reference.decode(tokens)
        n_tokens += len(tokens)
    assert n_tokens < sum(len(text.encode()) for text in texts) / 2


@pytest.mark.skipif(
    not (SHARED_DATA / "edu_text").exists(), reason="needs the texts in shared/data/edu_text"
)
def test_tokens_of_prose_are_those_of_the_tokenizers_library(tmp_path):
    from pyarrow import parquet

    table = parquet.read_table(next((SHARED_DATA / "edu_text").glob("*.parquet")))
    texts = table["text"].to_pylist()[:300]
    bpe.train_bpe(texts[:200], 4096, tmp_path / bpe.FILE)
    encoding = bpe.load_bpe(tmp_path / bpe.FILE)
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / bpe.FILE))
    for text in texts:
        assert encoding.encode_ordinary(text) == reference.encode(text).ids


def test_training_is_reproducible_and_the_name_identifies_the_file(trained, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        bpe.train_bpe(iter(TEXTS), 300, tmp_path / name / bpe.FILE)
    first, second = (bpe.load_bpe(tmp_path / name / bpe.FILE) for name in ("a", "b"))
    assert first.name == second.name != bpe.load_bpe(trained).name
    found = get_tokenizer(first.name, [tmp_path / "none", trained.parent, tmp_path / "a"])
    assert found.encode_ordinary("the hat") == first.encode_ordinary("the hat")
    with pytest.raises(UserError, match=f"its file is not at {trained}: copy the tokenizer.json"):
        get_tokenizer(first.name, [trained.parent])


def test_too_few_pairs_give_a_smaller_vocabulary(tmp_path):
    bpe.train_bpe(["ab ab ab"], 5000, tmp_path / bpe.FILE)
    encoding = bpe.load_bpe(tmp_path / bpe.FILE)
    assert encoding.n_vocab == 259 and encoding.encode_ordinary("ab ab") == [256, 257]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: f["model"].update(type="Unigram"), "is not a byte-level BPE"),
        (lambda f: f["pre_tokenizer"].update(add_prefix_space=True), "without a prefix space"),
        (lambda f: f["pre_tokenizer"].update(use_regex=False), "is not a byte-level BPE"),
        (lambda f: f.update(normalizer={"type": "NFC"}), "has a normalizer"),
        (lambda f: f["added_tokens"].clear(), "has no token <|endoftext|>"),
        (lambda f: f["model"]["vocab"].pop("a"), "lacks tokens for some single bytes"),
        (lambda f: f["model"]["merges"].reverse(), "not in the order of its merges"),
        (lambda f: f["model"]["merges"].pop(), "not in the order of its merges"),
        (lambda f: f["added_tokens"][0].update(id=2000), "ids are not consecutive"),
        (lambda f: f.pop("model"), "missing required field `model`"),
    ],
)
def test_another_kind_of_tokenizer_is_an_error(trained, tmp_path, change, message):
    file = json.loads(trained.read_text())
    change(file)
    (tmp_path / bpe.FILE).write_text(json.dumps(file))
    with pytest.raises(UserError, match=f"tokenizer.json: .*{message}"):
        bpe.load_bpe(tmp_path / bpe.FILE)


def test_a_run_trains_evaluates_and_samples_with_the_tokenizer_of_its_corpus(
    monkeypatch, tmp_path, run_train, capsys
):
    """Also when the corpus is no longer there."""
    import fineweb

    source = tmp_path / "source.jsonl"
    texts = [text for _, text in stdlib_documents()[:60]]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = tmp_path / "task.jsonl"
    endings = ["import os", "return x", "self.y = 1", "pass # never"]
    example = {"ind": 0, "ctx": "def f(x):", "label": 1, "endings": endings}
    task.write_text(json.dumps(example) + "\n")
    corpus = tmp_path / "corpus"
    fineweb.main(fineweb.Args(str(source), corpus, tokenizer="bpe:500", processes=1))
    meta = json.loads((corpus / "meta.json").read_text())
    encoding = get_tokenizer(meta["tokenizer"], [corpus])
    assert meta["vocab_size"] == encoding.n_vocab == 500 and meta["eot_token"] == 499
    run = run_train("run", data_dir=corpus, hellaswag_data=task, steps=2)
    config = json.loads((run / "config.json").read_text())
    assert config["vocab_size"] == 512  # a multiple of 64
    again = fineweb.Args(str(source), tmp_path / "again", tokenizer=str(corpus), processes=1)
    fineweb.main(again)
    assert json.loads((tmp_path / "again/meta.json").read_text())["shards"] == meta["shards"]
    shutil.rmtree(corpus)
    capsys.readouterr()
    checkpoint = next((run / "checkpoints").iterdir())
    for path in (run, checkpoint):
        sample.main(
            sample.Args(path, prompt="import os", num_samples=1, max_new_tokens=5, device="cpu")
        )
        hellaswag.main(hellaswag.Args(path, task, device="cpu"))
    out = capsys.readouterr().out
    assert out.count("--- sample 1\nimport os") == 2 and out.count("acc_norm") == 2
    (run / bpe.FILE).unlink()
    with pytest.raises(UserError, match="was trained on a corpus, but its file is not at"):
        sample.main(sample.Args(run, device="cpu"))
