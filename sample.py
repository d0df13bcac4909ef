"""Look at what was trained: reconstruct, paint, ask, edit, evaluate.

    python sample.py --paint "a red circle above a blue square"                 # a picture from text; --n 16 writes a grid
    python sample.py --ask "what colour is the circle?" --image x.png           # prints the answer; without a question, a caption
    python sample.py --edit "make the circle green" --image x.png               # original | edited
    python sample.py --eval                                                     # the table of metrics, and painted samples of every skill
    python sample.py --reconstruct cat.jpg dog.png                              # original | reconstruction from pixel codes, PSNR and SSIM
    python sample.py --reconstruct                                              # without a path: eight validation scenes of the built-in world
    python sample.py --paint-file prompts.txt --out out/painted                 # one prompt a line -> 00000.png, ...; again: what is missing
    python sample.py --answer-file questions.jsonl                              # lines {"image": path, "question": words} -> the same with "answer"
    python sample.py --fd out/painted photos                                    # Frechet distance between two folders of pictures

The last three also run under torchrun, each rank doing its share. Everything comes from the run folders (--tokenizer, --mllm); pictures go to --out, and their paths are printed. The same --seed gives the same picture.
"""

import argparse
import json
import os
import re
from types import SimpleNamespace

import torch
from tqdm import tqdm

from data import shapes
from data.images import ImageData, centre_crop, decode
from losses import Moments, frechet_distance, psnr, ssim
from mllm import DualMLLM, code_tables
from rvq import all_reduce
from tokenizer import DualTokenizer, read_config, read_json, write_json
from train_mllm import SAMPLING, ImageSequences, encoder, evaluate
from train_mllm import flags as train_flags
from train_tokenizer import VALIDATION_SEED, Ranks, digest, read_lines, report, run, save_grid, to_picture


def flags(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--paint", nargs="+", metavar="PROMPT", help="texts to paint")
    p.add_argument("--ask", nargs="?", const="", metavar="QUESTION", help="question about --image; none: a caption of it")
    p.add_argument("--edit", metavar="INSTRUCTION", help="what to change in --image")
    p.add_argument("--image", nargs="+", default=[], help="images to ask about or to edit")
    p.add_argument("--eval", action="store_true", help="understanding and painting on held-out data, as at the end of training")
    p.add_argument("--reconstruct", nargs="*", metavar="IMAGE", help="images to encode and decode; none: scenes of the built-in world")
    p.add_argument("--paint-file", metavar="FILE", help="texts to paint, one a line, each picture in a file of its own")
    p.add_argument("--answer-file", metavar="FILE", help='questions, as JSON lines {"image": path, "question": words}; answers go to --out/answers.jsonl')
    p.add_argument("--fd", nargs=2, metavar="FOLDER", help="two folders of pictures to compare: Frechet distance in the tokenizer's ViT, or in --inception")
    p.add_argument("--inception", default="", metavar="FILE", help="for --fd: the TorchScript Inception of the usual FID (a program, so from a source you trust)")
    p.add_argument("--batch-size", type=int, default=16, help="pictures at a time, for --paint-file, --answer-file and --fd")
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
    wishes = [name.replace("_", "-") for name in ("paint", "ask", "edit", "reconstruct", "paint_file", "answer_file", "fd") if getattr(args, name) is not None] + ["eval"] * args.eval
    if len(wishes) != 1:
        p.error(f"expected one of --paint, --ask, --edit, --eval, --reconstruct, --paint-file, --answer-file, --fd, got {', '.join('--' + w for w in wishes) or 'none'}")
    if wishes[0] in ("ask", "edit") and not args.image:
        p.error(f"--{wishes[0]} is about an image, and there is none; add --image IMAGE")
    if args.image and wishes[0] not in ("ask", "edit"):
        p.error(f"--image goes with --ask or --edit, not with --{wishes[0]}")
    if args.inception and wishes[0] != "fd":
        p.error(f"--inception goes with --fd, not with --{wishes[0]}")
    if args.batch_size < 1:
        p.error(f"--batch-size is {args.batch_size}, expected at least 1")
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


def batches(items: list, args, ranks: Ranks, what: str):
    """This rank's share, --batch-size at a time, with a bar."""
    mine = items[ranks.rank::ranks.count]
    return tqdm([mine[i:i + args.batch_size] for i in range(0, len(mine), args.batch_size)], what, disable=not ranks.first)


@torch.no_grad()
def paint_file(args, tokenizer: DualTokenizer, model: DualMLLM, ranks: Ranks, how: dict):
    """Line i -> OUT/i.png, or with --n pictures a prompt OUT/i-0.png, ... Those that are there are kept, so that a run that stopped goes on."""
    os.makedirs(args.out, exist_ok=True)
    prompts, n = read_lines(args.paint_file), args.n or 1
    wanted = [(i, k, os.path.join(args.out, f"{i:05}.png" if n == 1 else f"{i:05}-{k}.png")) for i, prompt in enumerate(prompts) if prompt.strip() for k in range(n)]
    missing = [item for item in wanted if not os.path.exists(item[2])]
    path, asked = os.path.join(args.out, "asked.json"), {"prompts": prompts, "n": n, "seed": args.seed, "model": digest(model), **how}
    if os.path.exists(path) and read_json(path) != asked:
        raise ValueError(f"{args.out} holds pictures of other prompts, or of another model, seed or sampling; name another --out")
    if ranks.first:
        write_json(path, asked)
    ranks.say(f"{len(wanted)} pictures, {len(wanted) - len(missing)} of them already in {args.out}")
    for part in batches(missing, args, ranks, "painting"):
        codes = model.paint([prompts[i].strip() for i, _, _ in part], seeds=[args.seed + i * n + k for i, k, _ in part], **how)
        for picture, (_, _, path) in zip(to_picture(tokenizer.decode(codes)), part):
            picture.save(path + ".tmp", format="PNG")
            os.replace(path + ".tmp", path)


@torch.no_grad()
def answer_file(args, tokenizer: DualTokenizer, model: DualMLLM, encode, ranks: Ranks):
    """Every record with its answer, in order. A record without a readable image is left out, counted and named. Paths are relative to the file."""
    records, broken, done = [], [], {}
    for number, line in enumerate(read_lines(args.answer_file), 1):
        try:
            record = json.loads(line)
            records.append((number, record, os.path.join(os.path.dirname(args.answer_file), record["image"]), str(record.get("question", ""))))
        except (ValueError, KeyError, TypeError, AttributeError):
            broken.append(f"line {number} is no record with an image: {line[:60]!r}") if line.strip() and ranks.first else None
    for part in batches(records, args, ranks, "answering"):
        images, whose = [], []
        for item in part:
            try:
                images.append(read_images([item[2]], tokenizer.config.vision.image_size))
                whose.append(item)
            except ValueError as error:
                broken.append(f"line {item[0]}: {error}")
        if whose:
            answers = model.answer(encode(torch.cat(images).to(ranks.device)), [question for *_, question in whose])
            done |= {number: {**record, "answer": answer} for (number, record, *_), answer in zip(whose, answers)}
    rows = ranks.gather_rows({"done": list(done.items()), "broken": broken})
    if not rows["done"]:
        raise ValueError(f'{args.answer_file} has no record that can be answered, such as {{"image": "a.png", "question": "what is this?"}}' + "".join(f"; the first: {b}" for b in rows["broken"][:1]))
    if ranks.first:
        os.makedirs(args.out, exist_ok=True)
        path = os.path.join(args.out, "answers.jsonl")
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for _, record in sorted(rows["done"], key=lambda row: row[0]))
        os.replace(path + ".tmp", path)
        print(f"{path}: {len(rows['done'])} answers, {len(rows['broken'])} records left out", *rows["broken"][:10], sep="\n  ")


@torch.no_grad()
def fd(args, tokenizer: DualTokenizer, ranks: Ranks):
    """Frechet distance between two folders, each picture cropped to the middle square at the tokenizer's size."""
    if args.inception:
        try:
            inception = torch.jit.load(args.inception, map_location=ranks.device).eval()
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{args.inception} is no TorchScript file ({str(error).splitlines()[0][:100]}); expected the Inception of the usual FID") from None
        look = lambda images: inception(images, return_features=True)
    else:
        look = lambda images: tokenizer.siglip_model.vision_model(images.float() / 127.5 - 1)[1]
    sides, broken = [], []
    for folder in args.fd:
        data, moments = ImageData(folder, tokenizer.config.vision.image_size, train=False), None
        broken += data.broken
        for images, _, reports in tqdm(data.load(args.batch_size * ranks.count, rank=ranks.rank, ranks=ranks.count), folder, disable=not ranks.first):
            broken += reports
            features = look(images.to(ranks.device))
            moments = moments or Moments(features.shape[1], ranks.device)
            moments.add(features)
        if moments is None:
            raise ValueError(f"{folder!r} has fewer pictures than there are ranks; start fewer")
        for part in (moments.count, moments.sum, moments.outer):
            all_reduce(part)
        sides.append(moments)
    ranks.say(f"Frechet distance {frechet_distance(*sides):.4f} in {args.inception or 'the ViT of ' + args.tokenizer}, {int(sides[0].count)} and {int(sides[1].count)} pictures, {len(broken)} broken")


def main(argv=None):
    args = flags(argv)
    ranks = Ranks(args.device)
    tokenizer = DualTokenizer.from_pretrained(args.tokenizer).to(ranks.device)
    if args.reconstruct is not None:
        return reconstruct(args, tokenizer, ranks.device)
    if args.fd:
        return fd(args, tokenizer, ranks)
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
        if data.source == "none":
            raise ValueError(f"{args.mllm} was trained on records alone, and none are held out for this script; its metrics.json has what training measured")
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
    if args.paint_file:
        return paint_file(args, tokenizer, model, ranks, how)
    if args.answer_file:
        return answer_file(args, tokenizer, model, encode, ranks)
    ask_or_edit(args, tokenizer, model, encode, ranks.device, how)


if __name__ == "__main__":
    run(main)
