"""Exports as transformers opens them: logits, greedy text, tokens, model card."""

import dataclasses
import json

import pytest
import torch
from conftest import SHARED_DATA, metrics, script
from huggingface_hub import constants
from safetensors.torch import load_file

import export
import hellaswag
from model import GPT
from stagewise import hf
from stagewise.checkpoint import load_checkpoint, tokenizer_folders
from stagewise.data import encode, get_tokenizer
from stagewise.errors import UserError

TEXTS = [
    "import os\n\n\tdef f(x):  # don't\r\n    return 'é中\U0001f600' + \"  \"  \n",
    " leading, 1234567890 and   trailing   ",
    "\x00\x7f\u00ad\u2028" + "a" * 50,
    "",
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def open_export(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def check_equal(source, folder, tolerance=1e-5):
    """Compare the export in `folder` with the checkpoint `source`."""
    checkpoint = load_checkpoint(source)
    ours = GPT.from_weights(checkpoint["model_config"], checkpoint["model"]).eval()
    encoding = get_tokenizer(checkpoint["tokenizer"], tokenizer_folders(source, checkpoint))
    theirs, tokenizer = open_export(folder)
    assert theirs.config.n_layer == ours.n_blocks
    assert len(tokenizer) == theirs.config.vocab_size == encoding.n_vocab
    assert tokenizer.eos_token_id == theirs.config.eos_token_id == encoding.eot_token
    for text in TEXTS:
        tokens = tokenizer(text)["input_ids"]
        assert tokens == encode(encoding, text).tolist()
        assert tokenizer.decode(tokens) == text
    # With everything that the tokenizer returns, as users call it.
    inputs = tokenizer("<|endoftext|>import os", return_tensors="pt")
    idx = inputs["input_ids"]
    assert idx[0].tolist() == [encoding.eot_token, *encode(encoding, "import os").tolist()]
    with torch.no_grad():
        logits = ours(idx)[..., : encoding.n_vocab]
        torch.testing.assert_close(theirs(**inputs).logits, logits, rtol=1e-4, atol=tolerance)
    n = ours.config.block_size - idx.shape[1]
    theirs.generation_config.eos_token_id = None  # ours does not stop at <|endoftext|>
    text = theirs.generate(**inputs, max_new_tokens=n, do_sample=False)
    assert torch.equal(text, ours.generate(idx, n, temperature=0, n_vocab=encoding.n_vocab))
    return theirs


def run_export(checkpoint, folder):
    export.main(export.Args(checkpoint, folder))
    return folder


def test_a_grown_model_and_its_first_stage(run_train, tmp_path, capsys):
    out = run_train("run", stages=2, steps=40, learning_rate=1e-2, dropout=0.1)
    capsys.readouterr()
    stage = out / "checkpoints/step_00000020"
    for source, n_blocks in ((out, 4), (stage, 2)):
        folder = run_export(source, tmp_path / "exports" / source.name)
        assert f"{n_blocks} blocks" in capsys.readouterr().out
        theirs = check_equal(source, folder)
        assert theirs.config.n_layer == n_blocks and theirs.config.resid_pdrop == 0.1
        assert {p.name for p in folder.iterdir()} == {
            *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
            *("README.md", "export.json"),
        }
        modes = {p.stat().st_mode for p in folder.iterdir()}
        assert len(modes) == 1  # those of the umask

    # the model card
    rows = metrics(out)
    for source, step in ((out, 40), (stage, 20)):
        record = json.loads((tmp_path / "exports" / source.name / "export.json").read_text())
        card = (tmp_path / "exports" / source.name / "README.md").read_text()
        at = next(row for row in rows if row["step"] == step)
        assert record["step"] == step
        for m in ("tokens", "paper_cost", "flops"):
            assert record["cost"][m] == at[m] == sum(p[m] for p in record["phases"])
        assert record["seconds"] == pytest.approx(at["seconds"], abs=0.01)
        evaluated = [row for row in rows if "val_loss" in row and row["step"] <= step][-1]
        for name in ("val_loss", "val_bpb", "hellaswag_acc_norm"):
            expected = {"step": evaluated["step"], "value": evaluated[name]}
            assert record["results"][name] == expected
            assert f"{evaluated[name]:.4f}" in card
        assert record["results"]["loss"] == {"step": step, "value": at["loss"]}
        assert [p["blocks"] for p in record["phases"]] == ([2, 2, 4, 4] if step == 40 else [2, 2])
        assert card.startswith("---\nlibrary_name: transformers\n")
        for words in ("| stage 1 phase 2 |", "`train.py --device=cpu", "Corpus `stdlib`", "torch "):
            assert words in card
        assert "10 examples of `hellaswag.jsonl`" in card


def test_a_biasless_model_with_scaled_residual_branches(run_train, tmp_path):
    """GPT2LMHeadModel has biases and no scale; both are expressed by the weights."""
    out = run_train("run", bias=False, base_depth=3, steps=8, learning_rate=1e-2)
    folder = run_export(out, tmp_path / "export")
    check_equal(out, folder)
    card = (folder / "README.md").read_text()
    assert "without biases" in card and "scaled by 3 / 4" in card
    weights = load_file(folder / "model.safetensors")
    assert not weights["transformer.h.0.mlp.c_fc.bias"].any()


def test_trained_tokenizer(run_train, tmp_path):
    (tmp_path / "text.txt").write_text("".join(TEXTS) + "It was a dark and stormy night. " * 4000)
    corpus = tmp_path / "corpus"
    script(
        "fineweb.py", f"--source={tmp_path / 'text.txt'}", f"--out={corpus}", "--tokenizer=bpe:300"
    )
    out = run_train("run", data_dir=corpus, steps=2, hellaswag_data="none", eval_tokens=256)
    check_equal(out, run_export(out, tmp_path / "export"))


def test_gpt2_tokenizer(run_train, tmp_path, monkeypatch):
    if not (SHARED_DATA / "tiktoken_cache").exists():
        pytest.skip("needs GPT-2's vocabulary")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED_DATA / "tiktoken_cache"))
    (tmp_path / "text.txt").write_text("It was a dark and stormy night. " * 4000)
    corpus = tmp_path / "corpus"
    script("fineweb.py", f"--source={tmp_path / 'text.txt'}", f"--out={corpus}")
    out = run_train(
        "run", data_dir=corpus, steps=1, tokens_per_step=512, eval_tokens=64, hellaswag_data="none"
    )
    folder = run_export(out, tmp_path / "export")
    check_equal(out, folder)

    # the original files of the vocabulary, as the tiktoken cache has them
    tokenizer = json.loads((folder / "tokenizer.json").read_text())["model"]
    contents = [p.read_text("utf-8") for p in (SHARED_DATA / "tiktoken_cache").iterdir()]
    bpe = next(text for text in contents if text.startswith("#version"))
    assert tokenizer["merges"] == [line.split() for line in bpe.splitlines()[1:]]
    assert tokenizer["vocab"] == json.loads(next(text for text in contents if text[0] == "{"))
    # A second opinion on many words.
    hellaswag_file = SHARED_DATA / "hellaswag" / "hellaswag_val_text.jsonl"
    if hellaswag_file.exists():
        theirs, encoding = open_export(folder)[1], get_tokenizer("gpt2")
        for line in hellaswag_file.read_text("utf-8").splitlines()[:500]:
            assert theirs(line)["input_ids"] == encode(encoding, line).tolist()


def test_an_export_can_be_replaced_but_nothing_else(run_train, tmp_path):
    out, folder = run_train("run", steps=1), tmp_path / "export"
    folder.mkdir()
    run_export(out, folder)
    (folder / "mine.txt").write_text("kept")
    (folder / "config.json").write_text("{}")
    run_export(out, folder)
    check_equal(out, folder)
    assert (folder / "mine.txt").read_text() == "kept"

    for other in (tmp_path / "other", out):
        other.mkdir(exist_ok=True)
        (other / "mine.txt").write_text("")
        before = sorted(p.name for p in other.iterdir())
        with pytest.raises(UserError, match="is not empty and is not an earlier export"):
            run_export(out, other)
        assert sorted(p.name for p in other.iterdir()) == before
    with pytest.raises(UserError, match="mine.txt: Not a directory: use another folder"):
        run_export(out, folder / "mine.txt")


def test_an_interrupted_export_cannot_be_opened(run_train, tmp_path, monkeypatch):
    out, folder = run_train("run", steps=1), tmp_path / "export"
    run_export(out, folder)

    def full(*args, **options):
        raise export.safetensors.SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_file", full)
        with pytest.raises(UserError, match="export: No space left on device: .*free disk space"):
            run_export(out, folder)
    assert not (folder / "config.json").exists()
    assert not list(folder.glob(".*"))
    run_export(out, folder)
    check_equal(out, folder)


def test_a_checkpoint_without_its_run(run_train, tmp_path):
    out = run_train("run", stages=2, steps=2)
    checkpoint = (out / "checkpoints/step_00000002").rename(tmp_path / "moved")
    folder = run_export(checkpoint, tmp_path / "export")
    card = (folder / "README.md").read_text()
    assert "| stage 2 phase 1 |" in card and "The command was not recorded." in card
    check_equal(checkpoint, folder)


def test_options_that_transformers_lacks_are_an_error(run_train, tmp_path, monkeypatch):
    out = run_train("run", steps=1)
    checkpoint = load_checkpoint(out)
    checkpoint["model_config"]["n_experts"] = 8
    monkeypatch.setattr(export, "load_checkpoint", lambda path: checkpoint)
    with pytest.raises(UserError, match="option n_experts=8 has no counterpart in transformers"):
        run_export(out, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_every_option_of_the_model_is_expressed():
    """A new field of GPTConfig must be exported, or raise an error."""
    assert {field.name for field in dataclasses.fields(export.GPTConfig)} == hf.EXPRESSED


def test_errors_are_one_line(tmp_path):
    result = script("export.py", tmp_path, tmp_path / "export", check=False)
    assert result.returncode == 1 and "has no checkpoint" in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


# --- lm-evaluation-harness


def with_parts(line):
    """Return a line with the official file's ctx_a and ctx_b; ctx_b is an unfinished sentence."""
    first, _, second = line["ctx"].rpartition(". ")
    if not second[:1].islower():
        return line | {"ctx_a": line["ctx"], "ctx_b": ""}
    return line | {"ctx_a": first + ".", "ctx_b": second}


@pytest.fixture
def harness(monkeypatch):
    """A function that runs lm-evaluation-harness's task hellaswag on the lines of a file."""
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install lm_eval[hf]")
    import datasets
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")

    def run(folder, lines):
        split = datasets.Dataset.from_list(lines)
        data = datasets.DatasetDict({"train": split, "validation": split})
        # The task downloads its data with this function.
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: data)
        model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8)
        result = simple_evaluate(
            model, tasks=["hellaswag"], task_manager=TaskManager(), log_samples=True,
            bootstrap_iters=0,
        )  # fmt: skip
        samples = sorted(result["samples"]["hellaswag"], key=lambda sample: sample["doc_id"])
        return result["results"]["hellaswag"], samples

    return run


MARKERS = [  # of WikiHow, which the local file does not have
    {"activity_label": "Home and Garden", "ctx_a": "[header] How to paint [title] Buy paint.",
     "ctx_b": "", "endings": ["[step] Go to  a shop. [substeps] Pay.", " Sell it. [title] Naïve",
                              "Wait [step]", "[step] Rest…"], "label": 1},
    {"activity_label": "Café", "ctx_a": "A man sits [step]", "ctx_b": "the LADY  sings [title]",
     "endings": ["élan [title]", "two words", "is 中文.", "x"], "label": "0"},
]  # fmt: skip


def test_lm_eval_protocol_gives_the_harness_predictions(run_train, tmp_path, harness, capsys):
    """On HellaSwag's own examples, each with and without ctx_a and ctx_b, and with markers."""
    path = SHARED_DATA / "hellaswag" / "hellaswag_val_text.jsonl"
    if not path.exists():
        pytest.skip("needs the validation set")
    found = [json.loads(line) for line in path.read_text("utf-8").splitlines()[::400]]
    lines = [with_parts(line) for line in found]
    assert 5 < sum(bool(line["ctx_b"]) for line in lines) < len(lines)
    lines += [line | {"ctx": f"{line['ctx_a']} {line['ctx_b']}".strip()} for line in MARKERS]
    # Some examples are longer than the context, so their beginning is removed.
    options = dict(block_size=384, tokens_per_step=3072, hellaswag_data="none")
    out = run_train("run", steps=30, learning_rate=1e-2, **options)
    folder = run_export(out, tmp_path / "export")

    checkpoint = load_checkpoint(out)
    model = GPT.from_weights(checkpoint["model_config"], checkpoint["model"]).eval()
    # Without ctx_a and ctx_b, the context is not divided, so the harness sees all of it as ctx_a.
    undivided = [{k: v for k, v in line.items() if k not in ("ctx_a", "ctx_b")} for line in found]
    for name, local in (("official", lines), ("local", undivided)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in local))
        examples = hellaswag.load_examples(
            file, get_tokenizer("bytes"), model.config.block_size, protocol="lm_eval"
        )
        sums, lengths = hellaswag.ending_losses(model, examples, n_vocab=257)
        scores = hellaswag.evaluate(model, examples, n_vocab=257)
        theirs = [{"ctx_a": line["ctx"] if name == "local" else "", "ctx_b": ""} | line
                  for line in local]  # fmt: skip
        fields = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
        expected, samples = harness(
            folder, [{f: int(d[f]) if f == "label" else d[f] for f in fields} for d in theirs]
        )
        assert len(samples) == len(examples)
        for sample, example, loss, length in zip(samples, examples, sums, lengths):
            log_likelihoods = [response[0] for (response,) in sample["resps"]]
            assert -loss == pytest.approx(log_likelihoods, rel=1e-4)
            choices = sample["doc"]["choices"]
            assert length.tolist() == [len(choice) for choice in choices]
            correct = (loss.argmin() == example.label, (loss / length).argmin() == example.label)
            assert correct == (sample["acc"], sample["acc_norm"])
        assert scores["acc"] == expected["acc,none"]
        assert scores["acc_norm"] == expected["acc_norm,none"]
        capsys.readouterr()
        hellaswag.main(hellaswag.Args(out, data=file, protocol="lm_eval", device="cpu"))
        assert f"acc_norm {expected['acc_norm,none']:.4f}" in capsys.readouterr().out
