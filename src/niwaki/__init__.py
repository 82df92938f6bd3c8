"""niwaki: train, compress and measure transformer language models."""

__version__ = "0.1.0"
