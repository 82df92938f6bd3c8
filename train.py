"""Train, compress and measure a model: `python train.py task=... tuning=... 'compression=[...]'`.

python train.py +experiment=quickstart
python train.py -m seed=0,1,2 tuning=full,lora study=NAME
python train.py resume=logs/ner/2026-01-01_12-00-00
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("HYDRA_FULL_ERROR", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from niwaki.quiet import quiet_libraries

quiet_libraries()

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from niwaki import entry  # noqa: E402
from niwaki.compose import to_plain  # noqa: E402


@hydra.main(config_path="configs", config_name="train", version_base="1.3")
def train(cfg: DictConfig) -> None:
    """One run, in the folder that Hydra made for it."""
    entry.carry_out(to_plain(cfg), Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    sys.argv[1:] = entry.checked(sys.argv[1:])
    train()
