"""Keeps other libraries' notices out of our output; their errors still show."""

from __future__ import annotations

import logging
import os
import warnings

NOISY = (
    "pytorch_lightning", "lightning_fabric", "torchao", "torch.utils._pytree", "fsspec", "datasets", "wandb",
    "transformers",
)  # fmt: skip


def quiet_libraries() -> None:
    """Call before torch, transformers and peft are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    quiet_loggers()
    for pattern in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*The number of training batches .* is smaller than the logging interval.*",
        ".*LeafSpec.*",
        ".*is an Enum subclass and is now natively supported.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)


def quiet_loggers() -> None:
    """Errors alone from here on. Call again after an import of Lightning, which sets its own level."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_progress() -> None:
    """Call after transformers and datasets are imported: turns their own progress bars off."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
