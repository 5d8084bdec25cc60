"""Train a diffusion model of handwritten digits with Accelerate and FSDP2, and go on after a stop.

pip install accelerate '.[demo]'
accelerate launch --num-processes 2 <this file> --help

On CPUs, where `accelerate launch` starts one process: torchrun, and Accelerate uses DDP.
"""

import argparse
import os

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from digits import Denoiser, denoising_loss, load_digits

from phema_dist import PostHocEMA


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--save-every", type=int, default=1000, help="steps from one training checkpoint to the next")
    parser.add_argument("--state-dir", default="state", help="folder of the training checkpoints")
    parser.add_argument("--resume-from", type=int, default=0, help="step of a training checkpoint")
    parser.add_argument("--checkpoint-dir", required=True, help="folder or URL of the averages")
    args = parser.parse_args()

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
    )
    # Without `cpu`, and without a GPU, the processes of torchrun would train alone, each for itself.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), fsdp_plugin=plugin)
    assert accelerator.num_processes == int(os.environ.get("WORLD_SIZE", "1")), "Accelerate does not see all processes"
    torch.manual_seed(0)  # the same parameters on every rank
    model = Denoiser()
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=3e-3))

    ema = PostHocEMA.from_model(
        model, args.checkpoint_dir, checkpoint_every=args.steps // 20, resume=bool(args.resume_from)
    )
    # Accelerate saves registered objects on one rank only; but hooks are called on all, and each rank has averages.
    accelerator.register_save_state_pre_hook(
        lambda _, __, folder: dcp.save({"ema": ema.training_state}, checkpoint_id=f"{folder}/ema")
    )
    accelerator.register_load_state_pre_hook(
        lambda _, folder: dcp.load({"ema": ema.training_state}, checkpoint_id=f"{folder}/ema")
    )
    if args.resume_from:
        accelerator.load_state(f"{args.state_dir}/{args.resume_from}")

    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    images, labels = (part[mine].to(accelerator.device) for part in load_digits("train"))
    for step in range(args.resume_from + 1, args.steps + 1):
        torch.manual_seed(step * accelerator.num_processes + accelerator.process_index)
        batch = torch.randint(len(images), (32,), device=accelerator.device)
        loss = denoising_loss(model, images[batch], labels[batch])
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        ema.update_(model)
        if step % args.save_every == 0:
            accelerator.save_state(f"{args.state_dir}/{step}")
    ema.close()

    images, labels = (part.to(accelerator.device) for part in load_digits("held-out"))
    with ema.model(model, sigma_rel=0.15), torch.no_grad():
        loss = denoising_loss(model, images, labels, torch.Generator().manual_seed(0))
    accelerator.print(f"{type(model).__name__}: held-out loss {loss.item():.3f} with the average")
    accelerator.end_training()


if __name__ == "__main__":
    main()
