"""Look at what was trained: reconstruct, paint, ask, edit, evaluate.

    python sample.py --paint "a red circle above a blue square"         # a picture from text; --n 16 writes a grid
    python sample.py --ask "what colour is the circle?" --image x.png   # prints the answer; without a question, a caption
    python sample.py --edit "make the circle green" --image x.png       # original | edited
    python sample.py --eval                                             # the table of metrics, and painted samples of every skill
    python sample.py --reconstruct cat.jpg dog.png                      # original | reconstruction from pixel codes, PSNR and SSIM
    python sample.py --reconstruct                                      # without a path: eight validation scenes of the built-in world
    python sample.py --figure layers                                    # or clusters, features, codes, depth; --images FOLDER
    python sample.py --paint-file prompts.txt --out out/painted         # one prompt a line -> 00000.png, ...; again: what is missing
    python sample.py --answer-file questions.jsonl                      # lines {"image": path, "question": words} -> the same with "answer"
    python sample.py --fd out/painted photos                            # Frechet distance between two folders of pictures

The last three also run under torchrun, each rank doing its share. Everything comes from the run folders (--tokenizer, --mllm), or else
from the weights that come with this code; pictures go to --out, and their paths are printed. The same --seed gives the same picture.
"""

import argparse
import json
import os
import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from tqdm import tqdm

from data import hub, shapes
from data.images import ImageData, Pictures
from losses import Moments, frechet_distance, psnr, ssim
from mllm import EDIT_GUIDANCE, GUIDANCE, DualMLLM, Picture, code_tables
from rvq import all_reduce
from tokenizer import DualTokenizer, check, first_line, layer_similarity, read_config, read_json, save_files, split_layers, write_json
from train_mllm import SAMPLING, ImageSequences, encoder, evaluate, judge, to_generate
from train_mllm import flags as train_flags
from train_tokenizer import (VALIDATION_SEED, Parser, Ranks, batched, compile_parts, digest, load_teacher, read_text, report, run,
                             save_grid, teacher_of, to_picture)


def flags(argv=None) -> argparse.Namespace:
    p = Parser(__doc__)
    p.add_argument("--paint", nargs="+", metavar="PROMPT", help="texts to paint")
    p.add_argument("--ask", nargs="?", const="", metavar="QUESTION", help="question about --image; none: a caption of it")
    p.add_argument("--edit", metavar="INSTRUCTION", help="what to change in --image")
    p.add_argument("--image", nargs="+", default=[], help="images to ask about or to edit")
    p.add_argument("--eval", action="store_true", help="understanding, painting and editing on held-out data, as at the end of training")
    p.add_argument("--reconstruct", nargs="*", metavar="IMAGE", help="images to encode and decode; none: scenes of the built-in world")
    p.add_argument("--paint-file", metavar="FILE", help="texts to paint, one a line, each picture in a file of its own")
    p.add_argument("--answer-file", metavar="FILE", help='JSON lines {"image": path, "question": words}; answers go to OUT/answers.jsonl')
    p.add_argument("--fd", nargs=2, metavar="FOLDER", help="Frechet distance of two folders, in the tokenizer's ViT or in --inception")
    p.add_argument("--figure", choices=("layers", "clusters", "features", "codes", "depth"), help="drawn to OUT/figure-NAME.png")
    p.add_argument("--images", default="", metavar="FOLDER", help="for --figure: pictures to draw it from")
    p.add_argument("--siglip", default="", metavar="FOLDER", help="for --figure layers: the ViT; else the tokenizer's teacher, or its own")
    p.add_argument("--other", default="", metavar="FOLDER", help="for --figure features: a second tokenizer to compare with")
    p.add_argument("--inception", default="", metavar="FILE", help="for --fd: FID's TorchScript Inception (a program: trust its source)")
    p.add_argument("--batch-size", type=int, default=16, help="pictures at a time, for --paint-file, --answer-file and --fd")
    p.add_argument("--tokenizer", default="out/tokenizer", help="run folder of train_tokenizer.py")
    p.add_argument("--mllm", default="out/mllm", help="run folder of train_mllm.py, or of one of its stages")
    p.add_argument("--out", default="out/samples", help="folder for pictures")
    p.add_argument("--n", type=int, default=0, help="pictures a prompt or image (0: one), scenes (0: eight), or of a figure (0: to 256)")
    p.add_argument("--eval-images", type=int, default=1024, help="size of the evaluation, as in training")
    p.add_argument("--guidance", type=float, help=f"weight of the words; 1: twice as fast (default: {GUIDANCE:g}, edits {EDIT_GUIDANCE:g})")
    p.add_argument("--temperature", type=float, default=SAMPLING["temperature"], help="of sampling; 0: always the likeliest code")
    p.add_argument("--top-k", type=int, default=SAMPLING["top_k"], help="sample among so many codes; 0: all")
    p.add_argument("--top-p", type=float, default=SAMPLING["top_p"],
                   help="sample among the likeliest codes that together have this probability")
    p.add_argument("--seed", type=int, default=0, help="of the first picture of each prompt; the next have the next seeds")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    p.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="of the LLM; auto: bf16 on CUDA, else fp32")
    p.add_argument("--compile", action="store_true",
                   help="paint a position as one compiled function (CPU) or graph (CUDA, where layers are compiled too): for many pictures")
    args = p.parse_args(argv)
    names = ("paint", "ask", "edit", "reconstruct", "figure", "paint_file", "answer_file", "fd")
    wishes = [name.replace("_", "-") for name in names if getattr(args, name) is not None] + ["eval"] * args.eval
    if not (sys.argv[1:] if argv is None else argv):
        print(f"{__doc__}\npython sample.py --help lists all flags.")
        p.exit()
    if len(wishes) != 1:
        p.error(f"expected one of --eval, --{', --'.join(names).replace('_', '-')}, got {', '.join('--' + w for w in wishes) or 'none'}")
    if wishes[0] in ("ask", "edit") and not args.image:
        p.error(f"--{wishes[0]} is about an image, and there is none; add --image IMAGE")
    for flag, goes in (("image", ("ask", "edit")), ("inception", ("fd",)), ("compile", ("paint", "edit", "paint-file", "eval"))):
        if getattr(args, flag) and wishes[0] not in goes:
            p.error(f"--{flag} goes with --{' or --'.join(goes)}, not with --{wishes[0]}")
    for flag, only in (("images", ""), ("siglip", "layers"), ("other", "features")):
        if getattr(args, flag) and (wishes[0] != "figure" or only not in ("", args.figure)):
            p.error(f"--{flag} goes with --figure {only or 'alone'}, not with --{wishes[0]} {args.figure or ''}")
    if args.batch_size < 1:
        p.error(f"--batch-size is {args.batch_size}, expected at least 1")
    if args.n < 0 or args.temperature < 0 or args.top_k < 0 or not 0 < args.top_p <= 1 or args.eval_images < 2:
        p.error(f"--n {args.n}, --temperature {args.temperature}, --top-k {args.top_k}: expected 0 or more; --top-p {args.top_p}: above 0, "
                "at most 1; --eval-images at least 2")
    return args


def read_images(paths: list[str], size: int) -> Tensor:
    """Images of any size, the middle square of each: (B, 3, size, size) in [-1, 1]. Raises ValueError for one that cannot be read."""
    images, broken = zip(*map(Pictures(paths, size).__getitem__, range(len(paths))))
    check(not any(broken), f"{next(filter(None, broken), '')}; expected the path of an image")
    return torch.stack(images).float() / 127.5 - 1


def numbered(names: list[str]) -> list[str]:
    """Names of pictures, numbered where two are equal."""
    return names if len({*names}) == len(names) else [f"{name}-{i}" for i, name in enumerate(names)]


def slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:60] or "nothing"


def pictures_for(args, size: int, least: int, device, most: int = 256, **world) -> tuple[Tensor, shapes.Scenes | None, str]:
    """-> --n images (B, 3, size, size), by default at most so many, spread evenly over --images; or else validation scenes of the world
    that the tokenizer was trained on, by default the plain one, and these scenes; and what they are, in words."""
    trained = read_config(args.tokenizer).get("data")
    source = args.images or (trained if trained in shapes.DIFFICULTIES else "plain")
    data = ImageData(source, size, train=False) if args.images else shapes.World(source, size, VALIDATION_SEED, "val", **world)
    there = len(data) if args.images else max(args.n, most)
    n = args.n or min(there, most)
    if not least <= n <= there:
        raise ValueError(f"{args.figure} needs {max(least, args.n)} pictures, got {min(n, there)} of {source}; add pictures, or change --n")
    if not args.images:
        return data.batch(range(n), device)[0], data.scenes(range(n)), f"{n} scenes of the {source} built-in world"
    images, _, broken = zip(*(data.sample(i * there // n) for i in range(n)))
    print("".join(f"  {report}\n" for report in dict.fromkeys(data.broken + sum(broken, []))), end="")
    return torch.stack(images).to(device).float() / 127.5 - 1, None, f"{n} pictures of {source}"


def reconstruct(args, tokenizer: DualTokenizer, device):
    """Original and reconstruction side by side, one PNG per image."""
    size = tokenizer.config.vision.image_size
    if args.reconstruct:
        images, names = read_images(args.reconstruct, size).to(device), numbered([Path(path).stem for path in args.reconstruct])
    else:
        images, names = pictures_for(args, size, 1, device, most=8)[0], [f"scene-{i}" for i in range(args.n or 8)]
    rebuilt = torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in images.split(16)])
    for name, image, again in zip(names, images.split(1), rebuilt.split(1)):
        path = os.path.join(args.out, f"{name}-reconstruction.png")
        save_grid([torch.cat([image, again])], path, cell=256)
        print(f"{path}  {size} px  PSNR {psnr(again, image).item():.2f} dB  SSIM {ssim(again, image).item():.3f}")


def paint(args, tokenizer: DualTokenizer, model: DualMLLM, how: dict):
    """One PNG per prompt, with --n samples."""
    n = args.n or 1
    for prompt, name in zip(args.paint, numbered([slug(prompt) for prompt in args.paint])):
        codes = model.paint([prompt] * n, seeds=range(args.seed, args.seed + n), progress=True, **how)
        path = os.path.join(args.out, f"{name}.png")
        save_grid(list(tokenizer.decode(codes).split(min(n, 4))), path, cell=256 if n == 1 else 96)
        print(path)


def ask_or_edit(args, tokenizer: DualTokenizer, model: DualMLLM, encode, device, how: dict):
    """Answers on the screen, or original and edited side by side in a PNG, for each image."""
    images, n = read_images(args.image, tokenizer.config.vision.image_size).to(device), args.n or 1
    pictures = encode(images)
    if args.edit is None:
        for path, answer in zip(args.image, model.answer(pictures, [args.ask] * len(images))):
            print(answer if len(images) == 1 else f"{path}: {answer}")
        return
    for name, image, picture in zip(numbered([Path(path).stem for path in args.image]), images.split(1), pictures.split(1)):
        codes = model.paint([args.edit] * n, torch.cat([picture] * n), seeds=range(args.seed, args.seed + n), progress=True, **how)
        path = os.path.join(args.out, f"{name}-{slug(args.edit)}.png")
        save_grid([torch.cat([image, tokenizer.decode(codes)])], path, cell=256 if n == 1 else 96)
        print(path)


def paint_file(args, tokenizer: DualTokenizer, model: DualMLLM, ranks: Ranks, how: dict):
    """Line i, from 0 -> OUT/0000i.png, or with --n pictures a prompt OUT/0000i-0.png, ... Those there are kept: a stopped run goes on."""
    os.makedirs(args.out, exist_ok=True)
    prompts, n = read_text(args.paint_file).removesuffix("\n").split("\n"), args.n or 1
    wanted = [(i, k, os.path.join(args.out, f"{i:05}.png" if n == 1 else f"{i:05}-{k}.png")) for i, prompt in enumerate(prompts)
              if prompt.strip() for k in range(n)]
    for i, prompt in enumerate(prompts, 1):
        if why := model.lacks_room([prompt.strip()], model.config.positions + 1):
            raise ValueError(f"{args.paint_file}, line {i}: {why}")
    missing = [item for item in wanted if not os.path.exists(item[2])]
    ranks.agree(0)      # all have looked before one paints: they share out the same list
    path, sampling = os.path.join(args.out, "asked.json"), {name: value for name, value in how.items() if name != "graph"}
    asked = {"prompts": prompts, "n": n, "seed": args.seed, "model": digest(model), **sampling}
    if os.path.exists(path) and read_json(path) != asked:
        raise ValueError(f"{args.out} holds pictures of other prompts, or of another model, seed or sampling; name another --out")
    if ranks.first:
        write_json(path, asked)
    ranks.say(f"{len(wanted)} pictures, {len(wanted) - len(missing)} of them already in {args.out}")
    for part in batched(missing, args.batch_size, ranks, "painting"):
        graph = how["graph"] and len(part) == args.batch_size       # what is left over is not worth another one
        codes = model.paint([prompts[i].strip() for i, _, _ in part], seeds=[args.seed + i * n + k for i, k, _ in part],
                            **how | {"graph": graph})
        for picture, (_, _, path) in zip(to_picture(tokenizer.decode(codes)), part):
            picture.save(path + ".tmp", format="PNG")
            os.replace(path + ".tmp", path)


def answer_file(args, tokenizer: DualTokenizer, model: DualMLLM, encode, ranks: Ranks):
    """Every record with its answer, in order; one without a readable image is left out, counted and named. Paths: relative to the file."""
    records, broken, done = [], [], {}
    for number, line in enumerate(read_text(args.answer_file).split("\n"), 1):
        try:
            record = json.loads(line)
            path, question = os.path.join(os.path.dirname(args.answer_file), record["image"]), str(record.get("question") or "")
            if why := model.lacks_room([Picture(torch.zeros(model.config.positions, 1, 1)), question], 64):
                broken.append(f"line {number}: {why}") if ranks.first else None
            else:
                records.append((number, record, path, question))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            broken.append(f"line {number} is no record with an image: {line[:60]!r}") if line.strip() and ranks.first else None
    for part in batched(records, args.batch_size, ranks, "answering"):
        pictures = Pictures([path for _, _, path, _ in part], tokenizer.config.vision.image_size)
        read = [(item, *pictures[n]) for n, item in enumerate(part)]
        broken += [f"line {number}: {reason}" for (number, *_), _, reason in read if reason]
        if whose := [(item, image) for item, image, reason in read if not reason]:
            images = torch.stack([image for _, image in whose]).to(ranks.device).float() / 127.5 - 1
            answers = model.answer(encode(images), [question for (*_, question), _ in whose])
            done |= {number: {**record, "answer": answer} for ((number, record, *_), _), answer in zip(whose, answers)}
    rows = ranks.gather_rows({"done": list(done.items()), "broken": broken})
    if not rows["done"]:
        raise ValueError(f'{args.answer_file} has no record that can be answered, such as {{"image": "a.png", "question": "what is this?"}}'
                         + "".join(f"; the first: {b}" for b in rows["broken"][:1]))
    if ranks.first:
        path = os.path.join(args.out, "answers.jsonl")
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for _, record in sorted(rows["done"], key=lambda row: row[0]))
        save_files(args.out, {"answers.jsonl": text.encode("utf-8", "backslashreplace")})       # half a letter stays: "\ud800"
        print(f"{path}: {len(rows['done'])} answers, {len(rows['broken'])} records left out", *rows["broken"][:10], sep="\n  ")


def fd(args, tokenizer: DualTokenizer, ranks: Ranks):
    """Frechet distance between two folders, each picture cropped to the middle square at the tokenizer's size."""
    if args.inception:
        try:
            inception = torch.jit.load(args.inception, map_location=ranks.device).eval()
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{args.inception} is no TorchScript file ({first_line(error)}); expected the Inception of FID") from None
        look = lambda images: inception(images, return_features=True)
    else:
        look = lambda images: tokenizer.siglip_model.vision_model(images.float() / 127.5 - 1)[1]
    both = [ImageData(folder, tokenizer.config.vision.image_size, train=False) for folder in args.fd]       # before one is read
    sides, broken = [], both[0].broken + both[1].broken
    for folder, data in zip(args.fd, both):
        moments, loader = None, data.load(args.batch_size * ranks.count, rank=ranks.rank, ranks=ranks.count)
        for images, _, reports in tqdm(loader, folder, -(-len(data) // (args.batch_size * ranks.count)), disable=not ranks.first):
            broken += reports
            features = look(images.to(ranks.device))
            moments = moments or Moments(features.shape[1], ranks.device)
            moments.add(features)
        check(moments, f"{folder!r} has fewer pictures than there are ranks; start fewer")
        for part in (moments.count, moments.sum, moments.outer):
            all_reduce(part)
        sides.append(moments)
    broken = [*dict.fromkeys(ranks.gather_rows({"broken": broken})["broken"])]
    ranks.say(f"Frechet distance {frechet_distance(*sides):.4f} in {args.inception or 'the ViT of ' + args.tokenizer}, "
              f"{int(sides[0].count)} and {int(sides[1].count)} pictures, {len(broken)} broken"
              + ", whose neighbours stand in for them" * bool(broken))


# ---------------------------------------------------------------------------------------------------------------------
# figures of the papers: each function draws on a sheet and returns a title and a sentence, which `figure` writes above it

PENS = ["#e6194b", "#0082c8", "#3cb44b", "#f58231", "#911eb4", "#00a6a6"]


def features_of(tokenizer: DualTokenizer, images: Tensor) -> dict[str, Tensor]:
    """What feeds the streams, averaged over positions: (B, C), by name and layer."""
    layers = {name: getattr(tokenizer.config, f"{name}_layer") for name in ("shallow", "deep")}
    parts = [{name: x.float().mean(1).cpu().double() for name, x in tokenizer.sources(part).items()} for part in images.split(16)]
    names = [name for stream in tokenizer.design.streams.values() for name in stream]       # the pixel stream's first
    return {f"{name} layer {layers[name]}" if name in layers else name: torch.cat([part[name] for part in parts]) for name in names}


def draw_layers(sheet, draw, args, tokenizer: DualTokenizer, device):
    """DualToken, Fig. 3 left and Fig. 7."""
    name = args.siglip or teacher_of(args.tokenizer)
    name = name if args.siglip or name.startswith("timm:") or os.path.isdir(hub.folder(name)) else ""
    vit = load_teacher(args.tokenizer, 0, name).to(device) if name else tokenizer.siglip_model.vision_model
    images, _, where = pictures_for(args, vit.config.image_size, 1, device)
    similarity = layer_similarity(vit, images).cpu()
    (shallow, middle), layers, low = split_layers(similarity), len(similarity), similarity.min().item()
    cell, left, colours = max(18, 480 // layers), 120, lambda grey: ImageOps.colorize(grey, "#440154", "#fde725", "#21918c")
    side, shades = cell * layers, ((similarity - low) / max(1 - low, 1e-6) * 255).clamp(0, 255).byte()
    sheet.paste(colours(Image.fromarray(shades.numpy())).resize((side, side), Image.Resampling.NEAREST), (left, 0))
    sheet.paste(colours(Image.linear_gradient("L").resize((18, side)).rotate(180)), (left + side + 24, 0))
    for n in range(6):
        draw.text((left + side + 48, 6 + (side - 12) * n / 5), f"{1 - n / 5 * (1 - low):.2f}", fill="black", font_size=11, anchor="lm")
    for i, at, row in zip(range(1, layers + 1), range(cell // 2, side, cell), similarity.tolist()):
        draw.text((left - 6, at), str(i), fill="black", font_size=11, anchor="rm")
        draw.text((left + at, side + 6), str(i), fill="black", font_size=11, anchor="mt")
        for j, value in enumerate(row if cell >= 40 else []):
            pen = "black" if value > (1 + low) / 2 else "white"
            draw.text((left + (j + 0.5) * cell, at), f"{value:.2f}", fill=pen, font_size=12, anchor="mm")
    draw.text((left + side / 2, side + 24), "layer of the ViT, counted from 1", fill="black", font_size=12, anchor="mt")
    for part, first, last in (("shallow", 0, shallow), ("middle", shallow, middle), ("deep", middle, layers)):
        draw.rectangle((left + first * cell, first * cell, left + last * cell - 1, last * cell - 1), outline="red", width=3)
        draw.text((left - 26, (first + last) / 2 * cell), f"{part}\n{first + 1} to {last}", "red", font_size=13, anchor="rm", align="right")
    vit = name or args.tokenizer + ", as the tokenizer trained it, since its teacher is not there"
    return ("How alike are the layers?", f"Cosine similarity of the layers' features, each averaged over positions; "
            f"mean over {where}. ViT: {vit}. Red: the split that is found.")


def kmeans(x: Tensor, k: int, rounds: int = 50) -> tuple[Tensor, Tensor]:
    """Rows of x (B, C) -> each one's cluster (B,), the largest first, and distance to its centre. Starts at the furthest rows."""
    centres = x[:1]
    while len(centres) < k:
        centres = torch.cat([centres, x[torch.cdist(x, centres).amin(1).argmax()][None]])
    for _ in range(rounds):
        member = F.one_hot(torch.cdist(x, centres).argmin(1), k).to(x).T                        # (k, B)
        centres = torch.where(member.any(1, keepdim=True), member @ x / member.sum(1, keepdim=True).clamp(min=1), centres)
    distance, cluster = torch.cdist(x, centres).min(1)
    return torch.bincount(cluster, minlength=k).argsort(descending=True).argsort()[cluster], distance


def draw_clusters(sheet, draw, args, tokenizer: DualTokenizer, device, clusters: int = 8, shown: int = 6, cell: int = 64):
    """DualToken, Fig. 3 right and Fig. 8. Told: the share of pictures of their cluster's commonest kind; chance: kinds shuffled."""
    images, scenes, where = pictures_for(args, tokenizer.config.vision.image_size, clusters, device, single=1.0)
    thumbs, step, mixed = to_picture(images), cell + 3, torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    kinds = {"colour": scenes.colour[:, 0], "shape": scenes.shape[:, 0], "ground": scenes.look[:, 1]} if scenes else {}
    for half, (name, x) in enumerate(features_of(tokenizer, images).items()):
        left, (cluster, distance) = 10 + half * (110 + shown * step), kmeans(x, clusters)
        purity = lambda kind: (F.one_hot(cluster).T @ F.one_hot(kind)).amax(1).sum().item() / len(kind)
        told = ", ".join(f"{kind} {purity(x):.0%} (chance {purity(x[mixed]):.0%})" for kind, x in kinds.items())
        told = f"Pictures that agree with most of their cluster in\n{told}" if kinds else ""
        draw.text((left, 4), f"FEATURES OF THE {name.upper()}\n{told}", fill="black", font_size=13)
        for k in range(clusters):
            members, y = (cluster == k).nonzero()[:, 0], 66 + k * step
            draw.text((left, y + cell / 2), f"cluster {k + 1}\n{len(members)} pictures", fill="black", font_size=12, anchor="lm")
            for n, i in enumerate(members[distance[members].argsort()][:shown].tolist()):
                sheet.paste(thumbs[i].resize((cell, cell), Image.Resampling.BOX), (left + 76 + n * step, y))
    return ("What do shallow and deep features tell apart?",
            f"k-means of features averaged over positions, of {where}. A row: the pictures nearest to a cluster's centre.")


def draw_features(sheet, draw, args, tokenizer: DualTokenizer, device, side: int = 400, top: int = 40):
    """DualToken, Fig. 6, with principal components in place of UMAP."""
    models = [(args.tokenizer, tokenizer)] + ([(args.other, DualTokenizer.from_pretrained(args.other).to(device))] if args.other else [])
    for panel, (folder, model) in enumerate(models):
        images, _, where = pictures_for(args, model.config.vision.image_size, 3, device)
        sets, left = features_of(model, images), 20 + panel * (side + 20)
        sets = {name: F.adaptive_avg_pool1d(x, min(x.shape[1] for x in sets.values())) for name, x in sets.items()}
        everything, centres = torch.cat(list(sets.values())), [x.mean(0) for x in sets.values()]
        u, s, _ = torch.linalg.svd(everything - everything.mean(0), full_matrices=False)
        xy, share = u[:, :2] * s[:2] * torch.tensor([1.0, -1.0]), s.square() / s.square().sum()
        parts = (torch.tensor([left, top]) + side / 2 + xy / xy.abs().amax() * 0.44 * side).split(len(images))  # one scale on both axes
        spread = torch.cat([x - centre for x, centre in zip(sets.values(), centres)]).norm(dim=1).mean()
        draw.rectangle((left, top, left + side, top + side), outline="gray")
        for x, y, pen in ((x, y, pen) for part, pen in zip(parts, PENS) for x, y in part.tolist()):
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=pen)
        for n, (name, part, pen) in enumerate(zip(sets, parts, PENS)):      # one name above its dots, the next below
            x, y = part[:, 0].mean().clamp(left + 60, left + side - 60), part[:, 1].amax() + 10 if n % 2 else part[:, 1].amin() - 10
            draw.text((x.item(), y.item()), name, fill=pen, font_size=14, anchor="mm", stroke_width=3, stroke_fill="white")
        draw.text((left, top + side + 6), f"to the right: first component, {share[0]:.0%} of the variance; up: second, {share[1]:.0%}",
                  fill="black", font_size=13)
        words = f"\nthe means of both are {(centres[0] - centres[-1]).norm() / spread:.2f} spreads apart"
        title = model.config.design if model is tokenizer or model.config.design != tokenizer.config.design else folder
        draw.text((left, 0), title + words * (len(sets) > 1), fill="black", font_size=13)
    return ("Do pixels and semantics lie in one space?", "Principal components of the features that feed the streams, averaged over "
            f"positions; dots: {where}. A spread is the mean distance from the mean of its set.")


def telling_codes(codes: Tensor, k: int, pictures: int) -> tuple[list[int], list[int]]:
    """Codes (B, N), one a position -> at most k codes that mark things, and the pictures that show them best. Of a thing, not a ground or
    a corner, the variance of the code's mean position between pictures, less that of its positions within one, is large."""
    grid, found = round(codes.shape[1] ** 0.5), codes.unique()
    place, scores = torch.cartesian_prod(*[torch.arange(grid) / grid] * 2), []                  # (N, 2)
    for code in found:
        member = (codes[(codes == code).any(1)] == code).float()                                # (pictures that have it, N)
        rare, wide = len(member) < max(2, len(codes) // 20), member.mean() > 0.25  # nowhere to be seen, or a ground that comes in patches
        member /= member.sum(1, keepdim=True)
        mean = member @ place
        within = (member @ place.square() - mean.square()).mean(0)
        scores.append((mean.var(0, correction=0) - within).sum().item() - 9.0 * (rare or wide))
    chosen = found[torch.tensor(scores).topk(min(k, len(found))).indices]
    has = (codes[..., None] == chosen).any(1).float()                                           # (B, k)
    return chosen.tolist(), (has / has.sum(0)).sum(1).topk(min(pictures, len(codes))).indices.tolist()


def boxed(picture: Image.Image, codes: list[int], patch: float, pens: dict[int, str]) -> Image.Image:
    """The picture with a box, edged with white, just inside each patch whose code has a pen. patch: its side in pixels."""
    draw, grid = ImageDraw.Draw(picture), round(len(codes) ** 0.5)
    for n, code in enumerate(codes):
        x, y = n % grid * patch, n // grid * patch
        for edge, pen in ((0, "white"), (1, pens[code])) if code in pens else ():
            draw.rectangle((x + edge, y + edge, x + patch - 1 - edge, y + patch - 1 - edge), outline=pen, width=max(2, round(patch / 12)))
    return picture


def draw_codes(sheet, draw, args, tokenizer: DualTokenizer, device, columns: int = 4, shown: int = 8):
    """MUSE-VL, Fig. 5."""
    images, _, where = pictures_for(args, tokenizer.config.vision.image_size, 2, device, single=0.0)
    if not tokenizer.design.means:
        raise ValueError(f"the design {tokenizer.config.design} learns no semantics: its codes mark nothing; name another tokenizer")
    codes, c = torch.cat([tokenizer.encode(part)[:, :, -1, 0].cpu() for part in images.split(16)]), tokenizer.config.vision
    chosen, order = telling_codes(codes, len(PENS), shown)
    cell, pens = max(224, 12 * c.grid), dict(zip(chosen, PENS))
    for n, (i, picture) in enumerate(zip(order, to_picture(images[order]))):
        left, top = 8 + n % columns * (cell + 8), n // columns * (cell + 60)
        picture = picture.resize((cell, cell), Image.Resampling.BOX)
        sheet.paste(boxed(picture, codes[i].tolist(), c.patch_size * cell / c.image_size, pens), (left, top))
        for m, code in enumerate(code for code in chosen if code in codes[i]):
            at = left + m % 2 * cell // 2, top + cell + 4 + m // 2 * 17
            draw.text(at, f"code {code}: {(codes[i] == code).sum()} x", fill=pens[code], font_size=14)
    return ("What do semantic codes mark?", "Boxes of one colour: patches with the same semantic code (the first of their position); "
            f"below, how often each is there. Of {where}, those codes whose place differs most between pictures and least within one.")


def draw_depth(sheet, draw, args, tokenizer: DualTokenizer, device, shown: int = 4, cell: int = 112):
    """What each further pixel code of a position adds."""
    images, _, where = pictures_for(args, tokenizer.config.vision.image_size, 1, device)
    codes, columns = torch.cat([tokenizer.encode(part) for part in images.split(16)]), [("original", images)]
    for d in range(1, codes.shape[-1] + 1):
        rebuilt = torch.cat([tokenizer.decode(part, d) for part in codes.split(16)])
        columns.append((f"{d} code{'s' * (d > 1)}\n{psnr(rebuilt, images).mean().item():.2f} dB", rebuilt))
    for left, (title, column) in zip(range(10, 10_000, cell + 4), columns):
        draw.text((left + cell / 2, 36), title, fill="black", font_size=14, anchor="md", align="center")
        for n, picture in enumerate(to_picture(column[:shown])):
            sheet.paste(picture.resize((cell, cell), Image.Resampling.BOX), (left, 42 + n * (cell + 4)))
    return ("What does each pixel code add?",
            f"Pictures decoded from the first codes of each position; above them, the mean PSNR over {where}.")


def figure(args, tokenizer: DualTokenizer, device):
    sheet = Image.new("RGB", (3000, 3000), "white")
    draws = {"layers": draw_layers, "clusters": draw_clusters, "features": draw_features, "codes": draw_codes, "depth": draw_depth}
    title, words = draws[args.figure](sheet, ImageDraw.Draw(sheet), args, tokenizer, device)
    _, _, width, height = ImageOps.invert(sheet).getbbox()      # what was drawn on
    lines = textwrap.wrap(words.encode("ascii", "replace").decode(), width // 6)
    sheet = ImageOps.expand(sheet.crop((0, 0, width + 10, height + 10)), (0, 40 + 16 * len(lines), 0, 0), "white")
    ImageDraw.Draw(sheet).text((10, 6), title, fill="black", font_size=20)
    ImageDraw.Draw(sheet).text((10, 32), "\n".join(lines), fill="#444444", font_size=12, spacing=2)
    path = os.path.join(args.out, f"figure-{args.figure}.png")
    os.makedirs(args.out, exist_ok=True)
    sheet.save(path)
    print(path)


def or_weights(args, needed: tuple, say):
    """Where no run was named, and none is there, the weights that come with this code, and says so. Model and tokenizer come together."""
    missing = [name for name in needed if not os.path.exists(os.path.join("out", name, "config.json"))]
    if missing and all(getattr(args, name) == f"out/{name}" for name in needed):
        for name in needed:
            setattr(args, name, os.path.relpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights", name)))
        say(f"nothing is trained in out/{' and out/'.join(missing)} yet: "
            "these are the weights that come with the code (preset nano, the built-in world)")


@torch.no_grad()
def main(argv=None):
    args = flags(argv)
    ranks = Ranks(args.device)
    or_weights(args, ("tokenizer",) if args.reconstruct is not None or args.figure or args.fd else ("tokenizer", "mllm"), ranks.say)
    tokenizer = DualTokenizer.from_pretrained(args.tokenizer).to(ranks.device)
    if args.reconstruct is not None:
        return reconstruct(args, tokenizer, ranks.device)
    if args.figure:
        return figure(args, tokenizer, ranks.device)
    if args.fd:
        return fd(args, tokenizer, ranks)
    model = to_generate(DualMLLM.from_pretrained(args.mllm), args.precision, ranks.device)
    if model.config.tables_sha256 != code_tables(tokenizer)[1]:
        raise ValueError(f"{args.mllm} was trained on the codes of another tokenizer than {args.tokenizer}; give its --tokenizer")
    run_config = read_config(args.mllm)
    encode = encoder(model.config, tokenizer, args.tokenizer, run_config.get("teacher", ""))
    how = dict(guidance=args.guidance, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, graph=args.compile)
    if args.compile and ranks.device.type == "cuda":
        compile_parts(model)
    if args.eval:
        data, grid = SimpleNamespace(source=run_config.get("data")), os.path.join(args.out, "painted.png")
        check(data.source, f"{args.mllm}/config.json names no data to evaluate it on; name a run folder of train_mllm.py")
        check(data.source != "none", f"{args.mllm} was trained on records alone; its metrics.json has what training measured of them")
        os.makedirs(args.out, exist_ok=True)
        if data.source not in shapes.DIFFICULTIES:
            more = train_flags(["--out", args.out, "--val-data", run_config.get("val_data", ""),
                                "--text-length", str(run_config.get("text_length", 256))])
            data = ImageSequences(data.source, more, ranks, model.text, model.config, tokenizer.config.vision.image_size, encode,
                                  train=False)
        kinds = ("caption", "question", *(("paint", "edit") if model.heads else ()))
        look = judge(tokenizer, args.tokenizer, ranks) if model.heads and data.source in shapes.DIFFICULTIES else None
        metrics = evaluate(model, tokenizer, look, data, encode, args.eval_images, ranks, grid, kinds, how)
        write_json(os.path.join(args.out, "metrics.json"), metrics)
        report(metrics)
        return print(os.path.join(args.out, "metrics.json"), grid if model.heads else "")
    if args.paint:
        return paint(args, tokenizer, model, how)
    if args.paint_file is not None:
        return paint_file(args, tokenizer, model, ranks, how)
    if args.answer_file is not None:
        return answer_file(args, tokenizer, model, encode, ranks)
    ask_or_edit(args, tokenizer, model, encode, ranks.device, how)


if __name__ == "__main__":
    run(main, trains=False)
