"""A method is named after the place of its file: `niwaki/compression/prune/magnitude.py` is `prune/magnitude`."""


def option_name(value: object) -> str:
    """The option that selects the class of `value` in its config group."""
    return type(value).__module__.split(".", 2)[2].replace(".", "/")
