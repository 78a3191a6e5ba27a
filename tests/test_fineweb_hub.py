"""Datasets of the Hugging Face Hub, from a local server that answers as the Hub does."""

import http.server
import json
import re
import threading
from urllib.parse import parse_qs, unquote

import pytest
from conftest import script
from test_fineweb import read_corpus, stream, write

from stagewise.data import load_meta

REPOSITORY = "HuggingFaceFW/fineweb-edu"
COMMIT, NEW_COMMIT = "a" * 40, "b" * 40
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
- config_name: tables
  data_files:
  - split: test
    path: tables/*
---
"""


def texts(number):
    return [f"file {number}, document {i} of a dataset" for i in range(50)]


class Hub(http.server.BaseHTTPRequestHandler):
    """The requests of `datasets` and `huggingface_hub` for one dataset."""

    def do_GET(self):
        hub, path = self.server, unquote(self.path.split("?")[0])
        hub.requests.append(f"{self.command} {path}")
        api = f"/api/datasets/{REPOSITORY}"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{hub.commit}"):
            about = {"id": REPOSITORY, "sha": hub.commit, "private": False, "tags": []}
            return self.send(about | {"siblings": [{"rfilename": name} for name in hub.files]})
        if path.startswith(f"{api}/revision/{COMMIT}"):
            return self.send({"id": REPOSITORY, "sha": COMMIT, "private": False, "tags": []})
        for commit in (COMMIT, NEW_COMMIT):
            if path.startswith(tree := f"{api}/tree/{commit}"):
                below = path.removeprefix(tree).strip("/")
                return self.send(self.tree(f"{below}/" if below else "", "recursive=true"))
            if path.startswith(resolve := f"/datasets/{REPOSITORY}/resolve/{commit}/"):
                data = hub.files.get(path.removeprefix(resolve))
                if data is not None:
                    headers = {"ETag": f'"{len(data)}"', "X-Repo-Commit": commit}
                    return self.send(data, headers)
        self.send_error(404)

    do_HEAD = do_GET

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"])).decode()
        files = self.server.files
        self.send([self.entry(name) for name in parse_qs(content)["paths"] if name in files])

    def tree(self, prefix, recursive):
        names = [name for name in self.server.files if name.startswith(prefix)]
        if recursive in self.path.lower():
            return [self.entry(name) for name in names]
        children = sorted({prefix + name.removeprefix(prefix).split("/")[0] for name in names})
        folder = {"type": "directory", "oid": "0" * 40}
        return [self.entry(c) if c in names else folder | {"path": c} for c in children]

    def entry(self, name):
        size = len(self.server.files[name])
        return {"type": "file", "oid": "0" * 40, "size": size, "path": name}

    def send(self, data, headers=()):
        if not isinstance(data, bytes):
            data, headers = json.dumps(data).encode(), {"Content-Type": "application/json"}
        self.send_response(200)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.commit, server.requests = COMMIT, []
    server.files = {"README.md": CARD.encode(), "tables/a.csv": b"text\nx\n"}
    for number in range(3):
        file = write(tmp_path / "x.parquet", texts(number)).read_bytes()
        server.files[f"sample/10BT/{number:03d}_00000.parquet"] = file
        file = write(tmp_path / "x.parquet", texts(10 + number)).read_bytes()
        server.files[f"data/CC-MAIN-{number}/train.parquet"] = file
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def tokenize(hub, tmp_path, *options, **kwargs):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf")}
    common = ("--tokenizer=bytes", "--shard_tokens=1500", "--processes=2")
    return script("fineweb.py", *common, *options, **environment, **kwargs)


def downloads(hub):
    return [r.rsplit("/", 1)[-1] for r in hub.requests if "GET" in r and ".parquet" in r]


def test_the_sample_and_the_full_dataset(hub, tmp_path):
    tokenize(hub, tmp_path, f"--out={tmp_path / 'sample'}")
    meta = load_meta(tmp_path / "sample")
    assert meta["source"] == f"{REPOSITORY} sample-10BT"
    assert (meta["split"], meta["revision"]) == ("train", COMMIT)
    assert meta["shards"][1]["file"] == "fineweb_edu_train_000001.bin"
    tokens = read_corpus(tmp_path / "sample", True).tolist()
    assert tokens == stream(text for number in range(3) for text in texts(number))
    assert downloads(hub) == [f"{number:03d}_00000.parquet" for number in range(3)]
    assert not list((tmp_path / "hf").rglob("*.parquet"))  # nothing is left in a cache

    tokenize(hub, tmp_path, f"--out={tmp_path / 'all'}", "--subset=default")
    assert (
        load_meta(tmp_path / "all")["shards"][1]["file"] == "fineweb_edu_default_train_000001.bin"
    )
    tokens = read_corpus(tmp_path / "all", True).tolist()
    assert tokens == stream(text for number in range(3) for text in texts(10 + number))


def test_a_rank_downloads_only_its_files_of_the_revision_of_the_first(hub, tmp_path):
    out = f"--out={tmp_path / 'out'}"
    tokenize(hub, tmp_path, out, "--rank=1", "--world_size=2")
    assert downloads(hub) == ["001_00000.parquet"]
    hub.commit = NEW_COMMIT  # somebody has changed the dataset
    tokenize(hub, tmp_path, out, "--rank=0", "--world_size=2")
    assert downloads(hub) == [f"{number:03d}_00000.parquet" for number in (1, 0, 2)]
    tokenize(hub, tmp_path, out, "--merge")
    assert load_meta(tmp_path / "out")["revision"] == COMMIT
    tokens = read_corpus(tmp_path / "out", True).tolist()
    assert tokens == stream(text for number in range(3) for text in texts(number))


@pytest.mark.slow
def test_an_interrupted_run_continues_with_its_revision(hub, tmp_path):
    name = "sample/10BT/002_00000.parquet"
    good = hub.files.pop(name)
    hub.files[name] = b"PAR1 not parquet"
    out = f"--out={tmp_path / 'out'}"
    failed = tokenize(hub, tmp_path, out, check=False)
    assert "002_00000.parquet: cannot be read as parquet" in failed.stderr
    assert "finished shards are kept" in failed.stderr
    hub.files[name], hub.commit = good, NEW_COMMIT
    before = len(downloads(hub))
    assert "continuing after" in tokenize(hub, tmp_path, out).stderr
    assert load_meta(tmp_path / "out")["revision"] == COMMIT
    assert "000_00000.parquet" not in downloads(hub)[before:]  # its shards are finished
    tokens = read_corpus(tmp_path / "out", True).tolist()
    assert tokens == stream(text for number in range(3) for text in texts(number))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, message",
    [
        (["--subset=sample-1000BT"], f"--source={REPOSITORY}: could not be loaded from the Hub"),
        (["--source=org/none"], "--source=org/none: could not be loaded from the Hub"),
        (["--split=test"], "--split=test: HuggingFaceFW/fineweb-edu has no such split: use train"),
        (["--subset=tables", "--split=test"], "has .csv files, .* --revision=refs/convert/parquet"),
        (["--column=body"], "needs a `body` column of strings; found id: int64, text: string"),
    ],
)
def test_errors_are_one_line(hub, tmp_path, options, message):
    out = tmp_path / "out"
    result = tokenize(hub, tmp_path, f"--out={out}", *options, check=False)
    assert result.returncode == 1
    error = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and re.search(message, error[0]), result.stderr
    assert "Traceback" not in result.stderr and not list(tmp_path.glob("out*"))
