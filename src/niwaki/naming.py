"""A method is named after the place of its file: `niwaki/compression/prune/magnitude.py` is `prune/magnitude`."""

from pathlib import Path


def option_name(value: object) -> str:
    """The option that selects the class of `value` in its config group."""
    return type(value).__module__.split(".", 2)[2].replace(".", "/")


def is_plain(name: str) -> bool:
    """Whether a name is that of something right in a folder, and leads nowhere else."""
    return name not in ("", ".", "..") and "\\" not in name and Path(name).name == name
