"""A user's mistakes. Each message is one line that names the field, the value and what would be right."""


class UserError(ValueError):
    """A mistake that the user can mend; shown as one line, without a traceback."""


class ConfigError(UserError):
    """A setting that cannot be."""


class DataError(UserError):
    """Rows, columns or labels that cannot be used."""


class ArtifactError(UserError):
    """A saved model that is missing, damaged or of another kind."""
