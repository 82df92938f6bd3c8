"""Train, compress and measure a model: `python train.py task=... tuning=... 'compression=[...]'`.

python train.py +experiment=quickstart
python train.py -m seed=0,1,2 tuning=full,lora study=NAME
python train.py resume=logs/ner/2026-01-01_12-00-00
"""

from niwaki.train import main

if __name__ == "__main__":
    main()
