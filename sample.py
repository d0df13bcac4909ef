"""Look at what was trained.

    python sample.py --reconstruct cat.jpg dog.png          # any images, of any size: original | reconstruction from pixel codes, PSNR and SSIM
    python sample.py --reconstruct                          # without a path: eight validation scenes of the built-in world

Everything comes from the run folder (--tokenizer); pictures go to --out, and their paths are printed.
"""

import argparse
import os

import torch

from data import shapes
from data.images import centre_crop, decode
from losses import psnr, ssim
from tokenizer import DualTokenizer, read_config
from train_tokenizer import VALIDATION_SEED, Ranks, run, save_grid


def flags(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--reconstruct", nargs="*", metavar="IMAGE", help="images to encode and decode; none: scenes of the built-in world")
    p.add_argument("--tokenizer", default="out/tokenizer", help="run folder of train_tokenizer.py")
    p.add_argument("--out", default="out/samples", help="folder for pictures")
    p.add_argument("--n", type=int, default=8, help="scenes, where no image is given")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    args = p.parse_args(argv)
    if args.reconstruct is None:
        p.error("nothing to do: give --reconstruct IMAGE...")
    if args.n < 1:
        p.error(f"--n is {args.n}, expected at least 1")
    return args


def read_images(paths: list[str], size: int) -> torch.Tensor:
    """Images of any size, resized by the short side and cropped in the middle, as in evaluation: (B, 3, size, size) in [-1, 1].
    Raises ValueError for one that cannot be read."""
    def load(path):
        try:
            return centre_crop(decode(path, near=size), size).float() / 127.5 - 1
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}; expected the path of an image") from None
    return torch.stack([load(path) for path in paths])


@torch.no_grad()
def reconstruct(args, ranks: Ranks):
    """Original and reconstruction side by side, one PNG per image."""
    tokenizer = DualTokenizer.from_pretrained(args.tokenizer).to(ranks.device)
    size = tokenizer.config.vision.image_size
    if args.reconstruct:
        images, names = read_images(args.reconstruct, size).to(ranks.device), [os.path.splitext(os.path.basename(p))[0] for p in args.reconstruct]
        names = [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names)]
    else:
        source = read_config(args.tokenizer).get("data")       # what it was trained on
        difficulty = source if source in shapes.DIFFICULTIES else "plain"
        images = shapes.World(difficulty, size, VALIDATION_SEED, "val").batch(range(args.n), ranks.device)[0]
        names = [f"scene-{i}" for i in range(args.n)]
    rebuilt = torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in images.split(16)])
    for i, name in enumerate(names):
        pair, path = slice(i, i + 1), os.path.join(args.out, f"{name}-reconstruction.png")
        save_grid([torch.cat([images[pair], rebuilt[pair]])], path, cell=256)
        print(f"{path}  {size} px  PSNR {psnr(rebuilt[pair], images[pair]).item():.2f} dB  SSIM {ssim(rebuilt[pair], images[pair]).item():.3f}")


def main(argv=None):
    args = flags(argv)
    reconstruct(args, Ranks(args.device))


if __name__ == "__main__":
    run(main)
