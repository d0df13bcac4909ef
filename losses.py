"""Losses of tokenizer training, and the metrics PSNR, SSIM and Frechet distance.

Every term comes back by name; what it weighs stands in one place, `Weights`. Paper: Eq. 1 (commitment, computed in rvq.py), Eq. 2 (total),
Eq. 3 (reconstruction), Eq. 4 (semantic). Where the paper leaves a number open, the authors' release gives it.
Letters: B batch, N positions, C width, H W pixels, R ranks.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Weights:
    """The weight of every term in the total (Eq. 2). The defaults are the release's."""
    pixel: float = 5.0          # mean squared error, images in [-1, 1]                     Eq. 3
    perceptual: float = 1.0     # LPIPS, where a perceptual function is given               Eq. 3
    adversarial: float = 0.75   # times the adaptive weight                                 Eq. 3
    deep: float = 5.0           # MSE - cos at the deep layer, against the teacher          Eq. 4
    pooled: float = 1.0         # the same at the pooled embedding                          release
    cosine: float = 1.0         # 1 - cos at the deep layer, in place of the two before     MUSE-VL
    commitment: float = 5.0     # of all streams                                            Eq. 1, 2


# ---------------------------------------------------------------------------------------------------------------------
# terms

def distance(x: Tensor, target: Tensor) -> Tensor:
    """Eq. 4: mean squared error minus cosine similarity over the last dimension; a scalar, at best -1. Both of one shape (..., C)."""
    x, target = x.float(), target.float()
    return F.mse_loss(x, target) - F.cosine_similarity(x, target, dim=-1).mean()


def tokenizer_losses(features, images: Tensor, teacher: tuple[Tensor, Tensor], names: tuple, perceptual=None) -> dict[str, Tensor]:
    """The unweighted terms of Eq. 2 but the adversarial one, those of `names`, a design's. features: DualTokenizer's; images (B, 3, H, W);
    teacher: deep feature (B, N, C) and pooled embedding (B, C) of the frozen ViT; perceptual: (made, original) -> scalar, or None."""
    terms = {"commitment": sum(features.commitment.values())}
    if "pixel" in names:
        terms["pixel"] = F.mse_loss(features.images.float(), images)
        if perceptual is not None:
            terms["perceptual"] = perceptual(features.images.float(), images)
    if "deep" in names:
        terms |= {"deep": distance(features.deep, teacher[0]), "pooled": distance(features.pooled, teacher[1])}
    if "cosine" in names:
        terms["cosine"] = 1 - F.cosine_similarity(features.deep.float(), teacher[0].float(), dim=-1).mean()
    return terms


def weighted(terms: dict[str, Tensor], weights: Weights) -> Tensor:
    """Eq. 2: the sum of the terms, each times its weight."""
    return sum(getattr(weights, name) * value for name, value in terms.items())


class LPIPS(nn.Module):
    """Perceptual distance (Zhang et al. 2018): at five depths of a VGG16, the squared difference of features of unit length, weighted by
    channel. Layers have torchvision's names. Frozen; the weights come from files that the user has (`train_tokenizer.load_lpips`)."""
    WIDTHS = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)     # of the convolutions between two poolings

    def __init__(self):
        super().__init__()
        layers, width, self.ends = [], 3, []        # ends: the layers looked at, the last of each group
        for group in self.WIDTHS:
            layers += [nn.MaxPool2d(2)] if layers else []
            for w in group:
                layers += [nn.Conv2d(width, w, 3, padding=1), nn.ReLU()]
                width = w
            self.ends.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.heads = nn.ParameterList(torch.ones(1, group[-1], 1, 1) for group in self.WIDTHS)
        # ImageNet's, for images in [-1, 1]
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    def looks(self, x: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) -> features at the five depths (B, width, h, w), of unit length."""
        x, found = (x - self.mean) / self.std, []
        for n, layer in enumerate(self.features):
            x = layer(x)
            if n in self.ends:
                found.append(F.normalize(x.float(), dim=1, eps=1e-10))
        return found

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], at least 16 pixels a side -> their mean distance, a scalar, without a gradient to y."""
        with torch.no_grad():
            wanted = self.looks(y)
        return sum(((a - b) ** 2 * weight).sum(1).mean() for a, b, weight in zip(self.looks(x), wanted, self.heads))


class _Gather(torch.autograd.Function):
    """All ranks' rows, in rank order; the gradient of each row goes back to the rank that owns it."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks, (B, ...) -> (R*B, ...), with gradient; the identity in a single process."""
    return _Gather.apply(x) if dist.is_available() and dist.is_initialized() else x


def sigmoid_contrastive(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss: every pair of an image and a text, of all ranks, is a yes-or-no question, and only an image's own text is a yes (Zhai
    et al. 2023, Algorithm 1). image, text (B, C) unit vectors; scale (log) and bias. Summed over texts, averaged over images; the mean over
    ranks is the global loss."""
    with torch.autocast(image.device.type, enabled=False):       # else `.float()` or not, the product is in bf16
        text = gather(text.float())                                                          # (R*B, C)
        logits = image.float() @ text.T * scale.float().exp() + bias.float()                 # (B, R*B)
    sign = torch.full_like(logits, -1)
    sign.diagonal(dist.get_rank() * len(image) if dist.is_available() and dist.is_initialized() else 0).fill_(1)
    return -F.logsigmoid(sign * logits).sum() / len(image)


# ---------------------------------------------------------------------------------------------------------------------
# adversarial

class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): images (B, 3, H, W) -> a logit per patch (B, 1, h, w). GroupNorm: BatchNorm needs large batches."""

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        blocks, i = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)], width
        for n in range(1, layers + 1):
            o = width * min(2 ** n, 8)
            convolution = nn.Conv2d(i, o, 4, stride=2 if n < layers else 1, padding=1, bias=False)
            blocks += [convolution, nn.GroupNorm(min(32, o // 4), o), nn.LeakyReLU(0.2)]
            i = o
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(i, 1, 4, padding=1))
        for module in self.blocks:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(images)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator's logits."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """|gradient of the reconstruction loss| / |gradient of the adversarial loss|, both at the decoder's last convolution and averaged over
    ranks, clamped to [0.3, 10] (Esser et al. 2021; bounds from the release)."""
    grads = [torch.autograd.grad(loss, last, retain_graph=True)[0].float() for loss in (reconstruction, adversarial)]
    if dist.is_available() and dist.is_initialized():
        for grad in grads:
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
    return (grads[0].norm() / (grads[1].norm() + 1e-4)).clamp(0.3, 10).detach()


# ---------------------------------------------------------------------------------------------------------------------
# metrics

def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image (equal: inf): x, y (B, 3, H, W) in [-1, 1], clamped and brought to [0, 1]; (B,)."""
    x, y = ((t.float() / 2 + 0.5).clamp(0, 1) for t in (x, y))
    return -10 * (x - y).square().mean((1, 2, 3)).log10()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004): Gaussian window 11x11, sigma 1.5, no padding, K1 .01, K2 .03, mean over RGB;
    range as in `psnr`; (B,). Raises ValueError for images smaller than the window."""
    if min(x.shape[2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11 pixels a side, got {tuple(x.shape[2:])}")
    x, y = ((t.float() / 2 + 0.5).clamp(0, 1) for t in (x, y))
    window = torch.exp(-(torch.arange(11, device=x.device) - 5.0) ** 2 / (2 * 1.5 ** 2))
    window = window / window.sum()

    def blur(t):
        across = F.conv2d(t.flatten(0, 1)[:, None], window.view(1, 1, 1, 11))
        return F.conv2d(across, window.view(1, 1, 11, 1)).unflatten(0, t.shape[:2])[:, :, 0]

    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    return ((2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean((1, 2, 3))


class Moments:
    """Mean and covariance of features that come batch by batch, in memory that does not grow with their number. float64."""

    def __init__(self, width: int, device="cpu"):
        self.count, self.sum, self.outer = (torch.zeros(shape, dtype=torch.float64, device=device)
                                            for shape in ((), (width,), (width, width)))

    def add(self, x: Tensor) -> "Moments":
        """Features (M, C)."""
        x = x.to(self.sum)
        self.count += len(x)
        self.sum += x.sum(0)
        self.outer += x.T @ x
        return self

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        return (self.outer - self.count * self.mean.outer(self.mean)) / (self.count - 1)


def frechet_distance(x: Tensor | Moments, y: Tensor | Moments) -> float:
    """Frechet distance of two sets of features (M, C), each taken as a Gaussian: |difference of means|^2 + trace(A + B - 2 (AB)^(1/2))
    (Heusel et al. 2017). The name of the feature function and M belong beside the number. Raises ValueError for fewer than two samples."""
    x, y = (z if isinstance(z, Moments) else Moments(z.shape[1]).add(z.cpu()) for z in (x, y))
    if min(x.count, y.count) < 2:
        raise ValueError(f"a Frechet distance needs at least 2 samples on each side, got {int(x.count)} and {int(y.count)}")
    a, b = x.covariance, y.covariance
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # trace of (AB)^(1/2), through a symmetric matrix of the same eigenvalues
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    return ((x.mean - y.mean).square().sum() + a.trace() + b.trace() - 2 * cross).item()
