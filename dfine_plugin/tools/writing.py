"""Files and folders that are there as a whole, or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path of the same name to write to, which takes its place when the block ends without an exception.

    Until then it lies in a folder of its own, beside ``path``, so that the last step is a rename on one disk; so do
    files that a writer puts beside it. A disk that is full, or an exception, leaves what was there before. So does a
    process that is killed, which also leaves that folder: it is named after the path, with a dot before it, and can be
    deleted. Where a folder replaces another, a process killed in between leaves neither.
    """
    path = path.resolve()  # through links, as a plain write would go
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        part = Path(folder) / path.name
        yield part
        for beside in Path(folder).iterdir():
            if beside != part:
                beside.replace(path.with_name(beside.name))
        if path.is_dir():
            path.replace(Path(folder) / "former")  # a rename replaces no folder that holds something
        part.replace(path)  # last, for it may name the others
