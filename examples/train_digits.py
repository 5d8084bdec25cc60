"""Train a diffusion model of handwritten digits, on as many processes as torchrun starts.

torchrun --standalone --nproc-per-node 2 <this file> --help
"""

import argparse
import os

import torch
import torch.distributed as dist
from digits import Denoiser, denoising_loss, load_digits
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from phema_dist import PostHocEMA


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--wrapper", choices=["ddp", "fsdp2"], default="ddp")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=32, help="of each process")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="constant, start to end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="raw.safetensors", help="the parameters after the last step")
    parser.add_argument("--checkpoint-dir", required=True, help="folder or URL of the averages")
    args = parser.parse_args()

    use_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_gpu else torch.device("cpu")
    dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpu else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(args.seed)  # the same parameters on every rank
    model = Denoiser().to(device)
    if args.wrapper == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh(device.type, (world_size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    ema = PostHocEMA.from_model(model, args.checkpoint_dir, checkpoint_every=args.steps // 20)

    torch.manual_seed(1000 * args.seed + rank + 1)  # other noise, and below other digits, on every rank
    images, labels = (part[rank::world_size].to(device) for part in load_digits("train"))
    for step in range(1, args.steps + 1):
        batch = torch.randint(len(images), (args.batch_size,), device=device)
        loss = denoising_loss(model, images[batch], labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update_(model)
        if rank == 0 and step % 500 == 0:
            print(f"step {step:5d}  loss {loss.item():.3f}", flush=True)
    ema.close()

    raw = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        save_file(raw, args.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
