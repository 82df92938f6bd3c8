"""What a number was measured on."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch

LIBRARIES = ("niwaki", "torch", "transformers", "peft", "pytorch-lightning")


def machine() -> str:
    """The processor in words, with the widest vectors that torch uses on it, and the GPU where there is one."""
    name = platform.processor() or platform.machine()
    file = Path("/proc/cpuinfo")
    if file.is_file():
        facts = file.read_text()
        lines = [line for line in facts.splitlines() if line.startswith("model name")]
        name = f"{lines[0].partition(':')[2].strip()}, {len(lines)} cores" if lines else name
        vnni = " with VNNI" if "_vnni" in facts else ""
        name += f", {torch.backends.cpu.get_cpu_capability()}{vnni}"
    return f"{name}; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else name


def versions() -> dict[str, str]:
    """Python's version and those of the libraries that the numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
