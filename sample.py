"""Look at what was trained: reconstruct, paint, ask, edit, evaluate.

    python sample.py --paint "a red circle above a blue square"                 # a picture from text; --n 16 writes a grid
    python sample.py --ask "what colour is the circle?" --image x.png           # prints the answer; without a question, a caption
    python sample.py --edit "make the circle green" --image x.png               # original | edited
    python sample.py --eval                                                     # the table of metrics, and painted samples of every skill
    python sample.py --reconstruct cat.jpg dog.png                              # original | reconstruction from pixel codes, PSNR and SSIM
    python sample.py --reconstruct                                              # without a path: eight validation scenes of the built-in world

Everything comes from the run folders (--tokenizer, --mllm); pictures go to --out, and their paths are printed. The same --seed gives the same picture.
"""

import argparse
import os
import re
from types import SimpleNamespace

import torch

from data import shapes
from data.images import centre_crop, decode
from losses import psnr, ssim
from mllm import DualMLLM, code_tables
from tokenizer import DualTokenizer, read_config, write_json
from train_mllm import SAMPLING, ImageSequences, encoder, evaluate
from train_mllm import flags as train_flags
from train_tokenizer import VALIDATION_SEED, Ranks, report, run, save_grid


def flags(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--paint", nargs="+", metavar="PROMPT", help="texts to paint")
    p.add_argument("--ask", nargs="?", const="", metavar="QUESTION", help="question about --image; none: a caption of it")
    p.add_argument("--edit", metavar="INSTRUCTION", help="what to change in --image")
    p.add_argument("--image", nargs="+", default=[], help="images to ask about or to edit")
    p.add_argument("--eval", action="store_true", help="understanding and painting on held-out data, as at the end of training")
    p.add_argument("--reconstruct", nargs="*", metavar="IMAGE", help="images to encode and decode; none: scenes of the built-in world")
    p.add_argument("--tokenizer", default="out/tokenizer", help="run folder of train_tokenizer.py")
    p.add_argument("--mllm", default="out/mllm", help="run folder of train_mllm.py, or of one of its stages")
    p.add_argument("--out", default="out/samples", help="folder for pictures")
    p.add_argument("--n", type=int, default=0, help="pictures per prompt or image (0: one), or scenes to reconstruct (0: eight)")
    p.add_argument("--eval-images", type=int, default=1024, help="size of the evaluation, as in training")
    p.add_argument("--guidance", type=float, default=SAMPLING["guidance"], help="how strongly to follow the words; 1: as trained, and twice as fast")
    p.add_argument("--temperature", type=float, default=SAMPLING["temperature"], help="of sampling; 0: always the likeliest code")
    p.add_argument("--top-k", type=int, default=SAMPLING["top_k"], help="sample among so many codes; 0: all")
    p.add_argument("--top-p", type=float, default=SAMPLING["top_p"], help="sample among the likeliest codes that together have this probability")
    p.add_argument("--seed", type=int, default=0, help="of the first picture of each prompt; the next have the next seeds")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    args = p.parse_args(argv)
    wishes = [name for name in ("paint", "ask", "edit", "reconstruct") if getattr(args, name) is not None] + ["eval"] * args.eval
    if len(wishes) != 1:
        p.error(f"expected one of --paint, --ask, --edit, --eval, --reconstruct, got {', '.join('--' + w for w in wishes) or 'none'}")
    if wishes[0] in ("ask", "edit") and not args.image:
        p.error(f"--{wishes[0]} is about an image, and there is none; add --image IMAGE")
    if args.image and wishes[0] not in ("ask", "edit"):
        p.error(f"--image goes with --ask or --edit, not with --{wishes[0]}")
    if args.n < 0 or args.temperature < 0 or args.top_k < 0 or not 0 < args.top_p <= 1 or args.eval_images < 2:
        p.error(f"--n {args.n}, --temperature {args.temperature}, --top-k {args.top_k}: expected 0 or more; --top-p {args.top_p}: above 0, at most 1; --eval-images at least 2")
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


def numbered(names: list[str]) -> list[str]:
    """Names of pictures, numbered where two are equal."""
    return [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names)]


def stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:60] or "nothing"


@torch.no_grad()
def reconstruct(args, tokenizer: DualTokenizer, device):
    """Original and reconstruction side by side, one PNG per image."""
    size, n = tokenizer.config.vision.image_size, args.n or 8
    if args.reconstruct:
        images, names = read_images(args.reconstruct, size).to(device), numbered([stem(path) for path in args.reconstruct])
    else:
        source = read_config(args.tokenizer).get("data")       # what it was trained on
        difficulty = source if source in shapes.DIFFICULTIES else "plain"
        images, names = shapes.World(difficulty, size, VALIDATION_SEED, "val").batch(range(n), device)[0], [f"scene-{i}" for i in range(n)]
    rebuilt = torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in images.split(16)])
    for i, name in enumerate(names):
        pair, path = slice(i, i + 1), os.path.join(args.out, f"{name}-reconstruction.png")
        save_grid([torch.cat([images[pair], rebuilt[pair]])], path, cell=256)
        print(f"{path}  {size} px  PSNR {psnr(rebuilt[pair], images[pair]).item():.2f} dB  SSIM {ssim(rebuilt[pair], images[pair]).item():.3f}")


@torch.no_grad()
def paint(args, tokenizer: DualTokenizer, model: DualMLLM, how: dict):
    """One PNG per prompt, with --n samples."""
    n = args.n or 1
    for prompt, name in zip(args.paint, numbered([slug(prompt) for prompt in args.paint])):
        codes = model.paint([prompt] * n, seeds=list(range(args.seed, args.seed + n)), progress=True, **how)
        path = os.path.join(args.out, f"{name}.png")
        save_grid(list(tokenizer.decode(codes).split(min(n, 4))), path, cell=256 if n == 1 else 96)
        print(path)


@torch.no_grad()
def ask_or_edit(args, tokenizer: DualTokenizer, model: DualMLLM, encode, device, how: dict):
    """Answers on the screen, or original and edited side by side in a PNG, for each image."""
    images, n = read_images(args.image, tokenizer.config.vision.image_size).to(device), args.n or 1
    pictures = encode(images)
    if args.edit is None:
        for path, answer in zip(args.image, model.answer(pictures, [args.ask] * len(images))):
            print(answer if len(images) == 1 else f"{path}: {answer}")
        return
    for i, name in enumerate(numbered([stem(path) for path in args.image])):
        codes = model.paint([args.edit] * n, pictures[i:i + 1].expand(n, *pictures.shape[1:]), seeds=list(range(args.seed, args.seed + n)), progress=True, **how)
        path = os.path.join(args.out, f"{name}-{slug(args.edit)}.png")
        save_grid([torch.cat([images[i:i + 1], tokenizer.decode(codes)])], path, cell=256 if n == 1 else 96)
        print(path)


def main(argv=None):
    args = flags(argv)
    ranks = Ranks(args.device)
    tokenizer = DualTokenizer.from_pretrained(args.tokenizer).to(ranks.device)
    if args.reconstruct is not None:
        return reconstruct(args, tokenizer, ranks.device)
    model = DualMLLM.from_pretrained(args.mllm).to(ranks.device)
    if model.config.tables_sha256 != code_tables(tokenizer)[1]:
        raise ValueError(f"the model in {args.mllm} was trained on the codes of another tokenizer than {args.tokenizer}; give its --tokenizer")
    run_config = read_config(args.mllm)
    encode = encoder(model.config, tokenizer, args.tokenizer, run_config.get("teacher", ""))
    how = dict(guidance=args.guidance, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    if args.eval:
        data, grid = SimpleNamespace(source=run_config.get("data")), os.path.join(args.out, "painted.png")
        if not data.source:
            raise ValueError(f"{args.mllm}/config.json does not say what the model was trained on, so there is nothing to evaluate it on; name a run folder of train_mllm.py")
        os.makedirs(args.out, exist_ok=True)
        if data.source not in shapes.DIFFICULTIES:
            more = train_flags(["--out", args.out, "--val-data", run_config.get("val_data", "")])
            data = ImageSequences(data.source, more, ranks, model.text, model.config, tokenizer.config.vision.image_size, encode, train=False)
        kinds = ("caption", "question", *(["paint"] if model.heads else []))
        metrics = evaluate(model, tokenizer, data, encode, args.eval_images, ranks, grid, kinds, how)
        write_json(os.path.join(args.out, "metrics.json"), metrics)
        report(metrics)
        return print(os.path.join(args.out, "metrics.json"), grid if model.heads else "")
    if args.paint:
        return paint(args, tokenizer, model, how)
    ask_or_edit(args, tokenizer, model, encode, ranks.device, how)


if __name__ == "__main__":
    run(main)
