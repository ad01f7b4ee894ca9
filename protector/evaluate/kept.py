"""What an interrupted run has paid for already: JSON lines by key, in the user's cache folder."""
import hashlib
import json
import threading

from ..base import cache_dir


def digest(text):
    """Hex SHA-256 of a text, whatever characters it holds."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


class Kept:
    """Values by key, in memory and in a file that grows by a line for each.

    Args:
        identity: what the values depend on: it names the file.
        folder: of the file; made if it isn't there.
        read: (row) -> value, of a line's object; raises ValueError, KeyError or TypeError where it isn't one.
    """

    def __init__(self, identity, folder, read):
        self.path = folder / f"{digest(repr(identity))[:16]}.jsonl"
        self.known, self._lock = {}, threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n") if self.path.exists() else ():
            try:
                row = json.loads(line)
                self.known[row["key"]] = read(row)
            except (ValueError, KeyError, TypeError):  # a line that an interruption cut: asked again
                continue

    def keep(self, key, value, row):
        """Know the value by this key from now on, and write the row that it will be read from."""
        with self._lock, open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"key": key, **row}))  # the break first: it ends a line that was cut
            self.known[key] = value
