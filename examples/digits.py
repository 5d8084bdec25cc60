"""What the digit examples share: the images, a small diffusion model, a sampler and two metrics.

The model is preconditioned, trained and sampled as in Karras et al. 2022 (arXiv 2206.00364, "EDM", table 1).
"""

import itertools
import math

import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional

NUM_CLASSES, NUM_PIXELS = 10, 64
NUM_HELD_OUT = 600
SIGMA_DATA = 0.5


def load_digits(split: str) -> tuple[Tensor, Tensor]:
    """Return the images (N, 64) and labels (N,) of "train" or "held-out", with mean 0 and deviation SIGMA_DATA."""
    digits = datasets.load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32)
    images = (images - images.mean()) / images.std() * SIGMA_DATA
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    chosen = order[:NUM_HELD_OUT] if split == "held-out" else order[NUM_HELD_OUT:]
    return images[chosen], torch.tensor(digits.target)[chosen]


class Block(nn.Module):
    """A residual two-layer perceptron whose input is scaled and shifted by the embedding of noise and label."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.up = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(2 * width, width)
        nn.init.zeros_(self.down.weight)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding).chunk(2, dim=-1)
        update = functional.silu(self.up(self.norm(hidden) * (1 + scale) + shift))
        return hidden + self.down(self.dropout(update))


class Denoiser(nn.Module):
    """D(x; sigma, label): the expected clean image, given one with Gaussian noise of deviation sigma added."""

    def __init__(self, width: int = 128, num_blocks: int = 3, dropout: float = 0.2) -> None:
        super().__init__()
        self.read = nn.Linear(NUM_PIXELS, width)
        self.noise = nn.Linear(32, width)
        self.label = nn.Embedding(NUM_CLASSES, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width)
        self.write = nn.Linear(width, NUM_PIXELS)
        nn.init.zeros_(self.write.weight)
        frequencies = 2 * math.pi * torch.logspace(-1, 1, 16)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        sigma = sigma.reshape(-1, 1)
        total = (sigma**2 + SIGMA_DATA**2).sqrt()
        c_skip, c_out, c_in = (SIGMA_DATA / total) ** 2, sigma * SIGMA_DATA / total, 1 / total
        c_noise = sigma.log() / 4

        waves = c_noise * self.frequencies
        embedding = functional.silu(self.noise(torch.cat([waves.cos(), waves.sin()], dim=-1)) + self.label(labels))
        hidden = self.read(c_in * noisy)
        for block in self.blocks:
            hidden = block(hidden, embedding)
        return c_skip * noisy + c_out * self.write(functional.silu(self.norm(hidden)))


def denoising_loss(
    model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """EDM's loss: log-normal sigma, and a squared error weighted so that every sigma starts out at about one."""
    sigma = (-1.2 + 1.2 * torch.randn(len(images), 1, generator=generator)).exp().to(images.device)
    noise = sigma * torch.randn(images.shape, generator=generator).to(images.device)
    error = model(images + noise, sigma, labels) - images
    return (error**2 * (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2).mean()


@torch.no_grad()
def sample(model: nn.Module, latents: Tensor, labels: Tensor, num_steps: int = 12) -> Tensor:
    """EDM's deterministic second-order sampler (algorithm 1, Heun), from sigma = 20 down to 0."""
    rho, highest, lowest = 7, 20.0, 0.005
    ramp = torch.linspace(highest ** (1 / rho), lowest ** (1 / rho), num_steps) ** rho
    sigmas = torch.cat([ramp, torch.zeros(1)]).to(latents.device)
    x = latents * sigmas[0]
    for now, then in itertools.pairwise(sigmas):
        slope = (x - model(x, now, labels)) / now
        euler = x + (then - now) * slope
        if then > 0:
            slope = (slope + (euler - model(euler, then, labels)) / then) / 2
        x = x + (then - now) * slope
    return x


def train_classifier(images: Tensor, labels: Tensor, num_features: int = 32, epochs: int = 40) -> nn.Sequential:
    """Train a small convolutional classifier; all of it but the last layer is the feature map of the metric."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Dropout(), nn.Linear(32 * 16, num_features), nn.ReLU()),
        nn.Linear(num_features, NUM_CLASSES),
    ).to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval().requires_grad_(requires_grad=False)


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2)) of two sets of features (N, F): FID, with features of our own."""
    a, b = features.double().cpu(), reference.double().cpu()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    root_trace = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root_trace)


class Judge:
    """Two metrics of a denoiser, on held-out images and on noise that is the same for every candidate."""

    def __init__(self, device: torch.device) -> None:
        self.images, self.labels = (part.to(device) for part in load_digits("held-out"))
        classifier = train_classifier(*(part.to(device) for part in load_digits("train")))
        self.features = classifier[:-1]
        self.latents = torch.randn(2 * len(self.images), 64, generator=torch.Generator().manual_seed(1)).to(device)

    @torch.no_grad()
    def __call__(self, state: dict[str, Tensor]) -> dict[str, float]:
        """Return the Fréchet distance and the denoising loss; lower is better."""
        model = Denoiser().to(self.images.device).eval()
        model.load_state_dict(state)
        noise = torch.Generator().manual_seed(2)
        loss = denoising_loss(model, self.images.repeat(8, 1), self.labels.repeat(8), noise).item()
        samples = sample(model, self.latents, self.labels.repeat(2))
        distance = frechet_distance(self.features(samples), self.features(self.images))
        return {"Fréchet distance": distance, "denoising loss": loss}
