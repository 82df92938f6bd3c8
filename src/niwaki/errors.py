"""A user's mistakes. Each message is one line that names the field, the value and what would be right."""

from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can mend; shown as one line, without a traceback."""


class ConfigError(UserError):
    """A setting that cannot be."""


class DataError(UserError):
    """Rows, columns or labels that cannot be used."""


class ArtifactError(UserError):
    """A saved model that is missing, damaged or of another kind."""


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.0) -> str:
    """The known name most like `name`, for a "did you mean"; "" where none is alike by `cutoff` (0 to 1) or more."""
    import difflib

    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), "")
