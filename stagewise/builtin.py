"""The built-in corpus: Python's standard library, with a task in HellaSwag's format."""

import json
import random
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from stagewise.fileio import atomic_write


def stdlib_documents() -> list[tuple[str, str]]:
    """Return (name, text) for the modules of Python's standard library, in a fixed random order.

    Tests, installed packages and the generated tables in `encodings` are excluded.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "encodings",
        "__pycache__",
    }
    paths = sorted(
        p for p in root.rglob("*.py") if not skip.intersection(p.relative_to(root).parts)
    )
    random.Random(0).shuffle(paths)
    return [
        (str(p.relative_to(root)), text) for p in paths if (text := p.read_text("utf-8", "replace"))
    ]


def continuation_task(
    held_out: list[tuple[str, str]], others: str, n_examples: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Return up to `n_examples` examples in HellaSwag's format that ask how a line ends.

    The wrong endings are line endings from other documents. A context has 100 characters and stops
    before a space, which the evaluation adds before each ending. An ending has 8 to 32 characters.

    Args:
        held_out: (name, text) of the documents from which examples are created.
        others: the text of all other documents. Passages that occur in it are not used.
    """
    rng = random.Random(seed)
    passages = []  # (name, context, ending)
    for name, text in held_out:
        matches = [
            m for m in re.finditer(r"(?<=\S) (\S[^\n]{7,31})(?=\n)", text) if m.start() >= 100
        ]
        for m in rng.sample(matches, min(len(matches), 24)):
            if text[m.start() - 100 : m.end()] not in others:
                passages.append((name, text[m.start() - 100 : m.start()], m[1]))
    rng.shuffle(passages)
    examples = []
    for i, (name, context, ending) in enumerate(passages[:n_examples]):
        wrong = [other for document, _, other in passages if document != name]
        if len(wrong) < 3:
            break
        endings, label = rng.sample(wrong, 3), rng.randrange(4)
        endings.insert(label, ending)
        examples.append(
            {
                "ind": i,
                "activity_label": name,
                "ctx": context,
                "split": "val",
                "label": label,
                "endings": endings,
            }
        )
    return examples


def write_continuation_task(path: Path, documents: list[tuple[str, str]], val_tokens: int) -> None:
    """Write up to 1,000 examples from the documents that end within the first `val_tokens`.

    If these documents are too short for an example, no file is written.
    """
    ends = np.cumsum([1 + len(text.encode()) for _, text in documents])
    n = int(np.searchsorted(ends, val_tokens, side="right"))
    others = "\n".join(text for _, text in documents[n:])
    examples = continuation_task(documents[:n], others, 1000)
    if examples:
        atomic_write(path, "".join(json.dumps(e) + "\n" for e in examples))
    else:
        print("note: the validation set is too short for a HellaSwag-style task", file=sys.stderr)
