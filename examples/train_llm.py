"""Train a small language model on Python's own source code, sharded over as many processes as torchrun starts.

torchrun --standalone --nproc-per-node 2 examples/train_llm.py --averages runs/llm --checkpoints runs/llm-training

The same command goes on where it was, on any number of processes that divides the batch. SIGUSR1 or SIGTERM, to any of
them, makes all of them save and end. Afterwards: phema synthesize runs/llm --sigma-rel 0.10 --out ema.safetensors
Lines that end in "# EMA" are all that the averages take; without them this is the same training.
"""

import argparse
import math
import os
import signal
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import phema_dist  # EMA


class Block(nn.Module):
    """Causal attention, then a two-layer perceptron, each on a normalized residual stream."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.join = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        heads = self.query_key_value(self.attention_norm(hidden)).view(batch, length, 3, self.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.join(mixed.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.down(functional.gelu(self.up(self.norm(hidden))))


class Transformer(nn.Module):
    """Logits (batch, length, 256) of the byte that follows each of the bytes (batch, length)."""

    def __init__(self, width: int, num_blocks: int, num_heads: int, length: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_blocks))
        self.norm, self.logits = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            hidden = block(hidden)
        return self.logits(self.norm(hidden))


class Batches:
    """Windows of a text in random order, epoch after epoch; of each batch a rank gets its share."""

    def __init__(self, text: Tensor, length: int, batch_size: int) -> None:
        self.windows, self.batch_size = text.unfold(0, length + 1, length), batch_size
        self.step = 0  # batches taken: all that a checkpoint needs

    def __next__(self) -> Tensor:
        """The next windows (batch_size / world_size, length + 1) of this rank."""
        batch = range(self.step * self.batch_size, (self.step + 1) * self.batch_size)
        epochs_and_places = [divmod(i, len(self.windows)) for i in batch[dist.get_rank() :: dist.get_world_size()]]
        self.step += 1
        return torch.stack([self.windows[order(len(self.windows), e)[i]] for e, i in epochs_and_places]).long()

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


@lru_cache(2)
def order(number: int, epoch: int) -> Tensor:
    return torch.randperm(number, generator=torch.Generator().manual_seed(epoch))


def read_text() -> Tensor:
    """The standard library's source code as bytes (N,): a text that is everywhere, and needs no network."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def learning_rate(step: int, last: int, highest: float, warmup: int) -> float:
    """A linear warmup, then half a cosine down to a tenth."""
    if step <= warmup:
        return highest * step / warmup
    return highest * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (last - warmup)))


def any_rank(flag: bool) -> bool:
    """Collective, on the CPU, so that the device need not stop for it."""
    told = torch.tensor(int(flag))
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return bool(told)


def train(args: argparse.Namespace, device: torch.device) -> None:
    signals: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    torch.manual_seed(0)  # the same parameters on every rank
    model = Transformer(args.width, args.blocks, args.heads, args.length).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    batches = Batches(read_text(), args.length, args.batch_size)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())  # of all ranks together
    plan = phema_dist.plan(args.steps, num_parameters, sigma_rels=(0.05, 0.28))  # EMA
    ema = phema_dist.PostHocEMA.from_model(model, args.averages, plan=plan, resume=True)  # EMA

    def state() -> dict[str, Any]:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        return {
            "model": model_state,
            "optimizer": optimizer_state,
            "batches": batches,
            "ema": ema.training_state,  # EMA
        }

    newest = [max(args.checkpoints.glob("*/.metadata"), default=None)]
    dist.broadcast_object_list(newest, device=torch.device("cpu"))  # file systems may tell some ranks later
    if newest[0]:
        saved = state()
        dcp.load(saved, checkpoint_id=newest[0].parent)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    say(f"{num_parameters} parameters on {dist.get_world_size()} ranks, from step {batches.step}")

    stopping = False
    while batches.step < args.steps and not stopping:
        windows = next(batches).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(batches.step, args.steps, args.learning_rate, args.warmup)
        loss = functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update_(model)  # EMA
        if batches.step % args.log_every == 0:
            say(f"step {batches.step}: loss {loss.item():.3f}, learning rate {optimizer.param_groups[0]['lr']:.2g}")
            say(f"step {batches.step}: {ema.status()}")  # EMA
        stopping = any_rank(bool(signals))
        if stopping or batches.step % args.save_every == 0 or batches.step == args.steps:
            dcp.save(state(), checkpoint_id=args.checkpoints / f"{batches.step:08d}")
    say(f"{'stopped' if stopping else 'ended'} and saved at step {batches.step}")
    ema.close()  # EMA


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True, help="shared folder of the training checkpoints")
    parser.add_argument("--averages", required=True, help="folder or URL of the averages")  # EMA
    for name, value in {
        "steps": 2000, "batch-size": 32, "length": 128, "width": 128, "blocks": 4, "heads": 4, "warmup": 100,
        "log-every": 50, "save-every": 500, "learning-rate": 1e-3,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default: {value}")
    return parser.parse_args(words)


def main() -> None:
    args = arguments()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        dist.init_process_group("gloo")
    else:
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        backend = dist.get_default_backend_for_device(accelerator)
        dist.init_process_group(f"cpu:gloo,{accelerator.type}:{backend}")
    train(args, accelerator or torch.device("cpu"))
    dist.barrier()  # torchrun ends the job on all nodes when it ends on one
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
