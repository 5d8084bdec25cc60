"""Print one number for a checkpoint of train_digits.py: the Fréchet distance of its samples to held-out digits.

phema sweep demo/run --sigma-rel 0.05:0.28:12 --eval "python examples/eval_digits.py {checkpoint}" --out sweep
"""

import sys

import torch
from digits import Judge
from safetensors.torch import load_file


def main() -> None:
    torch.set_num_threads(1)  # tensors this small gain nothing from more
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(Judge(device)(load_file(sys.argv[1]))["Fréchet distance"])


if __name__ == "__main__":
    main()
