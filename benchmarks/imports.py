"""What importing costs, in CPU seconds beyond `import torch`: the median of processes that have imported torch.

    python benchmarks/imports.py

Beside what people import instead. The limit is 0: whoever has torch has the interpreter and numpy as well.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
from functools import partial

REPEATS = 5
ROWS = {
    "import phema_dist": "phema_dist",
    "phema_dist.plan": "phema_dist",
    "phema_dist.PostHocEMA": "phema_dist",
    "phema_dist.synthesize": "phema_dist",
    "phema_dist.SynthesisReader": "phema_dist",
    "import phema_dist.cli": "phema_dist",
    "import torch.distributed.checkpoint": "torch",
    "import ema_pytorch": "ema_pytorch",
    "import posthoc_ema": "posthoc_ema",
    "import lightning": "lightning",
}
CHILD = """
import sys, time, torch
modules, begin = len(sys.modules), time.process_time()
{code}
print(time.process_time() - begin, len(sys.modules) - modules)
"""


def measured(what: str) -> tuple[float, int]:
    """Median seconds, and how many modules are loaded; the first of the processes fills the caches."""
    code = what if what.startswith("import ") else f"import phema_dist; {what}"
    command = [sys.executable, "-W", "ignore", "-c", CHILD.format(code=code)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    run = partial(subprocess.run, command, check=True, capture_output=True, text=True, env=environment)
    lines = [run().stdout for _ in range(REPEATS + 1)]
    seconds, modules = zip(*(line.splitlines()[-1].split() for line in lines[1:]), strict=True)
    return statistics.median(map(float, seconds)), int(modules[0])


def main() -> None:
    """Print the table."""
    print("| | CPU s beyond torch | modules |\n|---|---:|---:|")
    for what, package in ROWS.items():
        if importlib.util.find_spec(package):
            seconds, modules = measured(what)
            print(f"| `{what}` | {seconds:.3f} | {modules} |", flush=True)


if __name__ == "__main__":
    main()
