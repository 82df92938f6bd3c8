"""Train, compress and measure a model: behind `train.py` and `niwaki-train`, and `python -m niwaki.train` itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from niwaki.catalogue import config_folder
from niwaki.quiet import quiet_libraries


@hydra.main(config_path=str(config_folder()), config_name="train", version_base="1.3")
def train(cfg: DictConfig) -> None:
    """One run, in the folder that Hydra made for it."""
    from niwaki import entry
    from niwaki.compose import to_plain

    entry.carry_out(to_plain(cfg), Path(HydraConfig.get().runtime.output_dir))


def main() -> None:
    """Judge the command line, then hand it to Hydra."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    quiet_libraries()
    from niwaki import entry

    sys.argv[1:] = entry.checked(sys.argv[1:])
    train()


if __name__ == "__main__":
    main()
