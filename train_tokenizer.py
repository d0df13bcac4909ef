"""Train the tokenizer: first a small SigLIP of its own (unless --siglip gives one), then both codebooks and the decoder, as in the paper.

    python train_tokenizer.py                                 # a CPU, minutes, the built-in world -> out/tokenizer
    python train_tokenizer.py --preset small                  # one GPU, textured world
    torchrun --nproc_per_node=8 train_tokenizer.py --preset so400m-384 --siglip google/siglip-so400m-patch14-384 --workers 8 \\
        --compile --checkpointing --data "cc12m/{00000..01242}.tar"
    python train_tokenizer.py --data photos --preset nano-64  # a folder of pictures with captions
    python train_tokenizer.py --design naive --out out/naive  # one codebook for both losses, or another of tokenizer.DESIGNS
    python train_tokenizer.py --table 3 --seeds 3             # all rows of the paper's Table 3, and the table -> out/tables
    python train_tokenizer.py --resume                        # go on where a run stopped
    python train_tokenizer.py --bench                         # seconds per step, and where they go; writes nothing
    python train_tokenizer.py --eval --out out/photos         # metrics.json anew, without training
    python train_tokenizer.py --eval --init DUALTOKEN --siglip SIGLIP --out out/released --zero-shot-data imagenet/val \\
        --class-names names.txt --retrieval-data flickr8k/captions.txt
    python train_tokenizer.py --preset so400m-384 --siglip NAME --dry-run   # FLOPs, memory and time of a run; needs no data, no weights

A run writes into --out: model.safetensors, config.json, state.pt (to resume), log.jsonl, metrics.json, curves.png, samples/*.png; the
SigLIP stage's are in --out/siglip. Read downward: settings, flags, plumbing, dry run and tables (these three shared with train_mllm.py),
data, evaluation, stages, runs.
"""

import argparse
import contextlib
import copy
import csv
import difflib
import errno
import gc
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import textwrap
import threading
import time
import timeit
import traceback
import warnings
import weakref
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import hub, shapes
from data.images import SUFFIXES, ImageData, Pictures, start_worker
from losses import (LPIPS, Discriminator, Weights, adaptive_weight, discriminator_loss, frechet_distance, psnr, sigmoid_contrastive, ssim,
                    tokenizer_losses, weighted)
from rvq import CELLS, ResidualVQ, all_reduce, histogram, usage_and_perplexity
from tokenizer import (BYTES, DESIGNS, PAPER, PRESETS, DualTokenizer, SigLIP, TimmTower, brief, check, first_line, layer_similarity,
                       load_weights, lower, preset_config, read_config, read_json, read_tensors, read_towers, split_layers, write_json)


# ---------------------------------------------------------------------------------------------------------------------
# settings of training, by preset: sizes are in tokenizer.py

@dataclass
class Settings:
    """How a preset is trained. The defaults are the release's (the paper: batch 64), but the SigLIP stage's and shared_gradient, ours."""
    data: str = "textured"          # plain or textured: the built-in world; else a source of images
    siglip_steps: int = 20_000      # of the stage that makes a SigLIP where none is given
    siglip_batch: int = 1024
    siglip_lr: float = 1e-3
    steps: int = 781_000
    batch: int = 256                # images a step, over all ranks
    lr: float = 7.2e-5              # peak, AdamW; cosine to zero
    betas: tuple = (0.5, 0.9)
    weight_decay: float = 1e-4      # not on biases and norms
    muon: bool = False              # Muon for the matrices and kernels of layers and decoder
    warmup: int = 10_000            # steps of linear rise
    shared_gradient: float = 1.0    # dual: share of the semantic gradient that enters the layers below the shallow one
    gan: bool = True
    gan_start: float = 20_000 / 781_000     # share of the run without the adversarial term
    gan_width: int = 64             # of the discriminator
    gan_layers: int = 3
    gan_lr: float = 7.2e-5
    weights: Weights = field(default_factory=Weights)


# Deep features of a small SigLIP from scratch are large (variance 25), so their squared error at the release's weight drowns the pixels'.
# In a trial of 300 steps (patches of 8, one seed), 0.02 in place of 0.2 gave 24.4 dB in place of 21.6, for a zero-shot accuracy of .973 in
# place of .984. With all of the semantic gradient in the shared layers dual reconstructs .6, .2 and -.4 dB better than recon-shallow (seeds
# 0 to 2), with a tenth .7, .5 and .1; with AdamW in place of Muon -.3 and -1.5 dB (seeds 0 and 1), and .3 and -.5.
_TOY = dict(betas=(0.9, 0.95), warmup=50, muon=True, shared_gradient=0.1, gan=False, gan_start=0.6, gan_width=32, gan_layers=2, gan_lr=2e-4,
            weights=Weights(pixel=5, deep=0.02, pooled=0.04, commitment=1))
SETTINGS = {
    "nano": Settings(data="plain", siglip_steps=1000, siglip_batch=128, siglip_lr=1e-3, steps=400, batch=64, lr=3e-3, **_TOY),
    "nano-64": Settings(data="textured", siglip_steps=500, siglip_batch=128, siglip_lr=1e-3, steps=500, batch=64, lr=2e-3, **_TOY),
    "small": Settings(data="textured", siglip_steps=3000, siglip_batch=256, siglip_lr=1e-3, steps=2500, batch=128, lr=1e-3, **_TOY),
    "siglip-l-256": Settings(), "so400m-384": Settings(), "siglip2-so-256": Settings(),
}
MATRICES = re.compile(r"layers\.|vision_model\.model\.blocks\.|^(semantic_)?decoder\.(?!conv_out)|^encoder\.(?!conv_in)")      # for Muon
VALIDATION_SEED = 12_345            # whatever --seed is, so that numbers of different runs compare


def or_nearest(words: str, given, known) -> str:
    """An error's words, and which of the known names may have been meant."""
    close = [match for name in given for match in difflib.get_close_matches(name, known, 1)]
    return words + (f"; did you mean {' and '.join(close)}?" if close else "")


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows defaults, where there are any."""

    def _get_help_string(self, action):
        none = action.default is None or action.default is False or action.default in ("", [])      # 0 says something
        return action.help if none else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Shows defaults; says what is wrong in a sentence, and which flag may have been meant."""

    def __init__(self, words: str):
        super().__init__(description=words.split("\n")[0], formatter_class=Defaults)

    def error(self, message):
        unknown = re.findall(r"--[\w-]+", message) if "unrecognized" in message else []
        self.exit(2, f"error: {or_nearest(message, unknown, [*self._option_string_actions])} ({self.prog} --help lists all flags)\n")


# flags that say nothing to --eval
TRAINING = ("bench", "dry_run", "resume", "steps", "siglip_steps", "batch_size", "lr", "gan", "gan_start", "vgg", "muon", "compile",
            "checkpointing", "precision", "clip", "accumulate", "semantic_weight", "shared_gradient", "max_bad_steps", "log_every",
            "eval_every", "save_every", "keep_checkpoints")


def flags(argv=None) -> argparse.Namespace:
    p = Parser(__doc__)
    g = p.add_argument_group("what")
    g.add_argument("--preset", default="nano", help=f"sizes and settings: {', '.join(PRESETS)}")
    g.add_argument("--out", default="out/tokenizer", help="run folder")
    g.add_argument("--data", default="", help="plain, textured, a folder of images, or shards (cc12m/{0..9}.tar); default: the preset's")
    g.add_argument("--val-data", default="", help="images to evaluate on; default: 5%% of --data, held out")
    g.add_argument("--num-samples", type=int, default=0, help="images of an epoch, drawn anew each time, by shards if many; 0: all")
    g.add_argument("--siglip", default="", help="folder of a pretrained SigLIP, SigLIP2 (fixed resolution) or CLIP in Hugging Face's "
                                                "layout, or its name on the hub; default: train one first")
    g.add_argument("--backbone", default="", help="timm:NAME, a pretrained ViT of timm's in place of --siglip; no text tower: no zero-shot")
    g.add_argument("--init", default="", help="folder of a tokenizer, ours or as released, to start from; its sizes replace the preset's")
    g.add_argument("--image-size", type=int, default=0,
                   help="pixels a side, to which position embeddings are interpolated; 0: those of --siglip or --backbone, or the preset's")
    g = p.add_argument_group("model")
    g.add_argument("--design", default="", metavar="NAME", help=f"{', '.join(DESIGNS)}; default: dual. tokenizer.DESIGNS says what each is")
    g.add_argument("--quantizer", default="", metavar="NAME", help="rvq (residual; default) or mcq (UniTok's: E in D chunks, a table each)")
    g.add_argument("--codebook-size", type=int, default=0, help="K of each stream; 0: the preset's")
    g.add_argument("--depth", type=int, default=0, help="D, codes of a position and stream; 0: the preset's")
    g.add_argument("--code-dim", type=int, default=0, help="E; 0: the preset's")
    g.add_argument("--layers", type=int, default=0, help="of the ViT, where it is trained here; 0: the preset's")
    layer = lambda word: word if word in ("quarter", "split") else int(word)
    layer.__name__ = "layer"        # what argparse calls it in an error
    g.add_argument("--shallow-layer", type=layer, default=0, help="layer the pixel stream leaves after; quarter: a quarter of all; split: "
                   "the last shallow one by the similarity of the layers; 0: the preset's, a quarter except in nano and nano-64")
    g.add_argument("--deep-layer", type=int, default=0, help="layer the semantic stream leaves after; 0: the last but one")
    g.add_argument("--shortcut-layer", type=int, default=0, help="layer added x 0.6 to the unquantised pixel stream (release: 4); 0: none")
    g = p.add_argument_group("evaluation at the end, on all of other data")
    g.add_argument("--eval", action="store_true", help="only evaluate --init, else --out; metrics.json keeps what it says of training")
    g.add_argument("--zero-shot-data", default="", help="a folder of pictures per class, as ImageNet's, to measure zero_shot on")
    g.add_argument("--class-names", default="", help="file with a line per class, in the order of the sorted folders; of several names, "
                                                     "after commas, the first counts. Default: the folders' names")
    g.add_argument("--templates", default="", help="file with a prompt a line, {} for the class, to average; default: a photo of a {}.")
    g.add_argument("--retrieval-data", default="", help="captions as Flickr8k's, image,caption or image#number TAB caption, for retrieval")
    g.add_argument("--retrieval-images", default="", help="folder of their images; default: Images or images beside the file, or its own")
    g = shared_flags(p, tables("nano"), ("quantizer", "growth"))
    g.add_argument("--vgg", default="", help="file of torchvision's VGG16 (.pth or .safetensors), for the perceptual term; default: none")
    g.add_argument("--lpips", default="", help="file of lpips' linear layers on VGG16; goes with --vgg")
    g.add_argument("--siglip-steps", type=int, default=0, help="steps of the SigLIP stage")
    g.add_argument("--semantic-weight", type=float, default=1.0, help="times the preset's weights of the semantic terms")
    g.add_argument("--shared-gradient", type=float, default=-1.0, help="part of the semantic gradient in shared layers; -1: the preset's")
    g.add_argument("--fast-vq", action=argparse.BooleanOptionalAction, default=False, help="our Triton kernel, for large codebooks (CUDA)")
    g.add_argument("--gan", action=argparse.BooleanOptionalAction, default=None, help="adversarial term; default: the preset's")
    g.add_argument("--gan-start", type=float, default=-1.0, help="share of the run after which it starts; -1: the preset's")
    args = p.parse_args(argv)
    check_shared(args, SETTINGS, siglip_steps=0, num_samples=0, image_size=0, deep_layer=0, shortcut_layer=0, layers=0, codebook_size=0,
                 depth=0, code_dim=0, semantic_weight=0)
    if args.backbone and (args.siglip or not args.backbone.startswith("timm:")):
        raise ValueError(f"--backbone is {args.backbone!r}, --siglip is {args.siglip!r}: expected one of them, and --backbone as timm:NAME")
    check(bool(args.vgg) == bool(args.lpips), f"--vgg is {args.vgg!r} and --lpips is {args.lpips!r}: the perceptual term needs both files")
    for name in ("gan_start", "shared_gradient"):
        given = getattr(args, name)
        check(given == -1 or 0 <= given <= 1, f"--{name.replace('_', '-')} is {given}, expected a share from 0 to 1, or -1")
    if (args.class_names or args.templates) and not args.zero_shot_data or args.retrieval_images and not args.retrieval_data:
        raise ValueError("--class-names and --templates go with --zero-shot-data, --retrieval-images with --retrieval-data")
    idle = [name for name in TRAINING if args.eval and getattr(args, name) != p.get_default(name)]
    check(not idle, f"--eval trains nothing, so that --{', --'.join(idle).replace('_', '-')} would do nothing; leave it out")
    return args


def shared_flags(p: argparse.ArgumentParser, tables, benches: tuple):
    """The flags of every training script, whose tables and measurements have these names -> the group on optimisation, to add to."""
    g = p.add_argument_group("machine")
    g.add_argument("--seed", type=int, default=0, help="of weights, data order and crops")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    g.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"),
                   help="auto: bf16 autocast on CUDA and on a CPU with AVX-512 BF16, else fp32; quantizers are always fp32")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile layers and the decoder's blocks")
    g.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=False, help="recompute activations to save memory")
    g.add_argument("--workers", type=int, default=2, help="processes that decode images; the built-in world needs none")
    g = p.add_argument_group("run")
    g.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False, help="go on from the state in --out")
    g.add_argument("--log-every", type=int, default=20, help="steps between log lines")
    g.add_argument("--eval-every", type=int, default=0, help="steps between evaluations; 0: only at the end")
    g.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    g.add_argument("--keep-checkpoints", type=int, default=1, help="newest ones; --resume takes an older one where the newest is damaged")
    g.add_argument("--eval-images", type=int, default=1024, help="images, at most, of an evaluation")
    g.add_argument("--table", default="", help=f"run the rows of a table of the papers ({', '.join(tables)}), each in a folder of its own "
                                               "in --out (default: out/tables), and write the table there")
    g.add_argument("--seeds", type=int, default=1, help="of every row of --table: --seed and those that follow it")
    g.add_argument("--bench", nargs="?", const="steps", default="", choices=("steps", *benches),
                   help="time 20 steps of each stage, and write nothing; or measure something else, and draw it into --out")
    g = p.add_argument_group("dry run: what a run would cost, before there are data, weights or a GPU")
    g.add_argument("--dry-run", action="store_true", help="print parameters, FLOPs, memory and time, with and without --checkpointing")
    g.add_argument("--ranks", type=int, default=0, help="GPUs that it is for; 0: 8 in the paper's presets, 1 in ours")
    g.add_argument("--utilisation", type=float, default=0.4, help="share of an H100's dense bf16 FLOP/s that is reached")
    g = p.add_argument_group("optimisation (0: the preset's)")
    g.add_argument("--steps", type=int, default=0, help="steps of the tokenizer stage; of train_mllm.py, of the --stage that is named")
    g.add_argument("--batch-size", type=int, default=0, help="samples a step over all ranks, in every stage")
    g.add_argument("--lr", type=float, default=0.0, help="peak learning rate, of the same stages")
    g.add_argument("--accumulate", type=int, default=1, help="micro-batches of a rank's share of a step, where memory is short")
    g.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    g.add_argument("--muon", action=argparse.BooleanOptionalAction, default=None,
                   help="Muon for the matrices in layers (and the tokenizer's decoder), AdamW for the rest; default: the preset's")
    g.add_argument("--max-bad-steps", type=int, default=20, help="stop after so many steps in a row whose gradient is not finite")
    return g


def check_shared(args, presets: dict, **more: int):
    """ValueError for a preset that is not there, or a flag below its least value; more: those of one script, by name."""
    check(args.preset in presets, or_nearest(f"--preset is {args.preset!r}, expected one of {', '.join(presets)}", [args.preset], presets))
    if args.seeds != 1 and not args.table or args.table and (args.bench or args.dry_run):
        raise ValueError("--seeds goes with --table, and --table goes without --bench and --dry-run")
    least = dict(steps=0, batch_size=0, accumulate=1, max_bad_steps=1, seed=0, workers=0, log_every=1, eval_every=0, save_every=1,
                 keep_checkpoints=1, eval_images=2, lr=0, ranks=0, seeds=1)
    for name, value in {**least, **more}.items():
        check(getattr(args, name) >= value, f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least {value}")
    check(args.clip > 0, f"--clip is {args.clip}, expected more than 0")
    check(0 < args.utilisation <= 1, f"--utilisation is {args.utilisation}, expected a share above 0 and up to 1")
    if (args.ranks or args.utilisation != 0.4) and not args.dry_run:
        raise ValueError("--ranks and --utilisation are those of an estimate; they go with --dry-run")


# ---------------------------------------------------------------------------------------------------------------------
# plumbing, shared with train_mllm.py: ranks, optimiser, the loop, checkpoints, log, pictures

class Ranks:
    """This process among those that torchrun started, or alone. NCCL on CUDA, gloo on a CPU."""
    hosts = None        # the group by which hosts agree; None: the only one, gloo's

    def __init__(self, device: str):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        try:
            self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
            if self.device.type == "cuda":
                self.device = torch.device("cuda", self.device.index or int(os.environ.get("LOCAL_RANK", 0)))
                torch.cuda.set_device(self.device)
                # The thread that runs backward passes begins at the first one. If it began after the thread that pins memory, which
                # sets the number of threads of later ones, compiled layers would be compiled again there, which checkpointing forbids.
                torch.ones(1, device=self.device, requires_grad=True).sum().backward()
                torch.backends.cudnn.allow_tf32 = False     # as for products: rounded features have other codes, and fp32 is wanted here
                torch.backends.cuda.enable_cudnn_sdp(False)     # cuDNN's attention takes a second to plan for each new length of a text
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {device} cannot be used here ({first_line(error)}); expected auto, cpu or one of torch's") from None
        if "RANK" in os.environ and not dist.is_initialized():
            if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                raise ValueError("after a restart, ranks would find the addresses of those before in torchrun's store: give each start its "
                                 "own, by TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, or leave out --max-restarts")
            # Two hours: after a long extraction or evaluation ranks wait for each other. That one died, torchrun notices (`leave_alone`).
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
        self.first = self.rank == 0
        if self.count > 1 and self.device.type == "cuda" and Ranks.hosts is None:
            Ranks.hosts = dist.new_group(backend="gloo", timeout=timedelta(hours=2))

    def agree(self, number: int) -> int:
        """The largest of all ranks' numbers. Only hosts wait for each other: what their devices have to do goes on."""
        if self.count > 1:
            numbers = torch.tensor(int(number))
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.hosts)
            number = int(numbers)
        return number

    def say(self, *words):
        """Print, on the first rank only."""
        if self.first:
            print(*words, flush=True)

    def wrap(self, model: nn.Module) -> nn.Module:
        """DDP where there are several ranks, unless they share the weights. No buffer is broadcast: all compute equal codebooks."""
        if self.count == 1 or hasattr(model, "reshard"):
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        with warnings.catch_warnings():     # torch 2.13 has another name for it, which does less
            warnings.simplefilter("ignore", FutureWarning)
            return nn.parallel.DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)

    def shard(self, model: nn.Module, parts: list[nn.Module]):
        """FSDP: every rank keeps a share of weights, gradients and optimiser state; a part's weights are gathered when it computes, what
        is in no part from the forward to the backward pass. In fp32, as in DDP, so that the results are the same."""
        from torch.distributed.fsdp import fully_shard      # a second of importing, for those who need it
        from torch.distributed.tensor import Shard

        def along(p):       # whichever dimension divides evenly: the first of a head's is its few depths
            return Shard(next((d for d, size in enumerate(p.shape) if size % self.count == 0), 0))
        mesh = dist.init_device_mesh(self.device.type, (self.count,))
        for part in [*parts, model]:
            fully_shard(part, mesh=mesh, shard_placement_fn=along)

    def gather_rows(self, *rows: dict) -> dict:
        """This rank's batches of {name: tensor or list}, maybe none -> those of all ranks in one, in rank order, tensors on the CPU."""
        rows = parts = [{name: value.cpu() if isinstance(value, Tensor) else value for name, value in row.items()} for row in rows]
        if self.count > 1:
            parts = [None] * self.count
            dist.all_gather_object(parts, rows)
            parts = sum(parts, [])
        return {name: torch.cat([p[name] for p in parts]) if isinstance(value, Tensor) else sum((p[name] for p in parts), [])
                for name, value in parts[0].items()}


def batched(items, size: int, ranks: Ranks, what: str = ""):
    """This rank's share of items, every R-th of R ranks, `size` at a time; what: the words of a bar on the screen."""
    mine = items[ranks.rank::ranks.count]
    return tqdm([mine[i:i + size] for i in range(0, len(mine), size)], what, leave=False, disable=not what or not ranks.first)


def whole(x):
    """A tensor that ranks share, gathered on each of them; anything else as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def share_of(x: Tensor, like: Tensor) -> Tensor:
    """This rank's share of a whole tensor that every rank has, in the manner of `like`; without one, the tensor itself."""
    if not hasattr(like, "placements"):
        return x
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_part(part, state: dict, source: str):
    """What `save_state` kept of a module or an optimiser, back into it, shared or not. Raises ValueError where it does not fit."""
    if isinstance(part, nn.Module):
        own = part.state_dict()
        return load_weights(part, {name: share_of(value, own.get(name)) for name, value in state.items()}, source)
    parameters = [p for group in part.param_groups for p in group["params"]]
    rows = state["state"]
    for i, p in enumerate(parameters):      # torch looks at none of this before it steps
        shapes = {"momentum": p.shape} if isinstance(part, Muon) else {"step": torch.Size(), "exp_avg": p.shape, "exp_avg_sq": p.shape}
        row = {name: x.is_floating_point() and x.shape for name, x in rows.get(i, {}).items()}
        if row != shapes and (row or p in part.state):
            raise ValueError(f"{source} has an optimiser's state {brief(row)} for parameter {i}, expected {shapes}; start anew")
    fit = lambda p, value: share_of(value, p) if value.shape == p.shape else value
    # Learning rates and the like are not the file's: `settings` says that they are the same.
    part.load_state_dict({"param_groups": part.state_dict()["param_groups"],
                          "state": {i: {name: fit(parameters[i], value) for name, value in row.items()} for i, row in rows.items()}})


class Muon(torch.optim.Optimizer):
    """Steps of a matrix's momentum, made orthogonal (Jordan et al. 2024), of the size of AdamW's, so that its learning rates and decay
    fit (Liu et al. 2025). For weights (m, n), stacks of them, and kernels (m, ., ., .), of which a row is all that makes one output. Unlike
    torch's: equal shapes go together, and a flag on the device can skip a step."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        for p in parameters:
            self.state[p]["momentum"] = torch.zeros_like(p)

    @staticmethod
    def orthogonal(x: Tensor) -> Tensor:
        """Newton-Schulz: (..., m, n) with its singular values brought near 1 (to .7 to 1.2, for those that were not tiny)."""
        if x.shape[-2] > x.shape[-1]:
            return Muon.orthogonal(x.mT).mT
        shape, x = x.shape, lower(x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).reshape(-1, *x.shape[-2:])
        for _ in range(5):      # x <- 3.4445 x + (2.0315 s^2 - 4.7750 s) x, of s = x x^T
            square = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
        return x.view(shape)

    @torch.no_grad()
    def step(self):
        """Nothing changes where `found_inf`, which `step_or_skip` sets, is 1."""
        good = 1 - self.found_inf
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for shape in dict.fromkeys(p.shape for p in trained):
                parameters = [p for p in trained if p.shape == shape]
                gradient = torch.stack([whole(p.grad) for p in parameters]).nan_to_num(0, 0, 0)
                old = torch.stack([whole(self.state[p]["momentum"]) for p in parameters])
                momentum = old.lerp(gradient, good * (1 - group["momentum"]))
                rows = gradient.lerp(momentum, group["momentum"])
                rows = rows.flatten(2) if len(shape) == 4 else rows
                size = good * group["lr"] * 0.2 * max(rows.shape[-2:]) ** 0.5           # 0.2: how large AdamW's steps are
                steps = (size * self.orthogonal(rows)).view(gradient.shape)
                for p, kept, change in zip(parameters, momentum, steps):
                    self.state[p]["momentum"].copy_(share_of(kept, p))
                    p.mul_(1 - good * group["lr"] * group["weight_decay"]).sub_(share_of(change, p))


def step_or_skip(optimizer, lr: float, bad: Tensor):
    """One optimiser step at this learning rate; where bad (bool scalar on the device) is true, nothing changes. No synchronisation."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.grad_scale, optimizer.found_inf = None, bad.float()       # the protocol of torch's GradScaler
    optimizer.step()
    optimizer.zero_grad()


def cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at a step: linear rise, then a cosine to zero."""
    warmup = min(warmup, steps // 10)
    return (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def precision(args, ranks: Ranks) -> str:
    """bf16 or fp32. auto is bf16 on CUDA and on a CPU that multiplies it (AVX-512 BF16; torch may not say): elsewhere it is slower."""
    native = ranks.device.type == "cuda" or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return args.precision if args.precision != "auto" else "bf16" if native else "fp32"


class Stage:
    """A step of the recipe, as `fit` sees it: `name`, `folder`, `model`, `optimizer`, `steps`, `batch` (samples of all ranks), `lr`,
    `warmup`, and `settings`, a dict that must not change when a run resumes. What is fitted, and how, is in the methods."""
    unit, design, streams = "images", "", ()        # what a batch is counted in; for the record

    def __init__(self, args, ranks: Ranks):
        self.args, self.ranks = args, ranks
        self.precision, self.counted = precision(args, ranks), {}      # counted: numbers of its own since the last log line
        keeps = not getattr(args, "fsdp", False)        # bf16 copies of the weights until the step ends: of shared ones, the whole model
        self.autocast = lambda: torch.autocast(ranks.device.type, torch.bfloat16, self.precision == "bf16", keeps)

    def optimise(self, betas: tuple, weight_decay: float, matrices: list[nn.Parameter] = ()):
        """Muon for these weights of the model, AdamW for the others that train, with no decay on biases, norms and other vectors."""
        by_muon = {*matrices}
        others = [p for p in self.model.parameters() if p.requires_grad and p not in by_muon]
        groups = [{"params": [p for p in others if p.dim() >= 2], "weight_decay": weight_decay},
                  {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, self.lr, betas, fused=True)      # fused: a flag on the device skips a step
        self.muon = Muon(matrices, self.lr, weight_decay) if matrices else None

    def before_step(self, parts: list[tuple]):
        """Before the first micro-batch of a step; parts are all of this rank's."""

    def loss(self, *part, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch -> what to differentiate, and its terms by name."""
        raise NotImplementedError

    def after_step(self, bad: Tensor):
        """After the optimisers' step, which was skipped where bad."""

    def extra_state(self) -> dict:
        """What to keep in a checkpoint besides model and AdamW: {name: module or optimiser}."""
        return {"muon": self.muon} if self.muon else {}

    def log(self) -> dict:
        """More numbers for the log line."""
        return {}

    def evaluate(self) -> dict:
        """Metrics; called on all ranks."""
        return {}

    def about(self) -> dict:
        """More for metrics.json, once trained."""
        return {}

    def save(self, weights: dict[str, Tensor]):
        """What others load, on the first rank; weights: the model's, whole."""


def gradients(stage: Stage, parts: list[tuple], step: int, sums: dict[str, Tensor]):
    """Forward and backward of a step's micro-batches. Adds to `sums` a row (sum, finite values, others) for the loss and each term."""
    stage.before_step(parts)
    for n, part in enumerate(parts):
        # DDP averages at the last micro-batch alone; FSDP at each, since between them whole gradients would have to stay.
        with stage.wrapped.no_sync() if n < len(parts) - 1 and hasattr(stage.wrapped, "no_sync") else contextlib.nullcontext():
            with stage.autocast():
                total, terms = stage.loss(*part, step=step)
            (total / len(parts)).backward()
        for name, value in {"loss": total, **terms}.items():
            value = value.detach().float()
            row = torch.stack([value.nan_to_num(0, 0, 0), value.isfinite().float(), 1 - value.isfinite().float()])
            sums[name] = sums[name] + row if name in sums else row


def take_step(stage: Stage, lr: float) -> tuple[Tensor, Tensor]:
    """Clip, step where the gradient is finite, and what comes after -> its norm, and if it was bad; equal on all ranks, not waited for."""
    norm = whole(nn.utils.clip_grad_norm_([p for p in stage.model.parameters() if p.requires_grad], stage.args.clip))
    bad = ~norm.isfinite()
    with stage.autocast():      # for Muon's products
        for optimizer in filter(None, (stage.optimizer, stage.muon)):
            step_or_skip(optimizer, lr, bad)
    stage.after_step(bad)
    return norm, bad


LOCKS = {}      # folder -> its open descriptor, which holds the lock until this process ends


def lock(folder: str, ranks: Ranks):
    """Makes the folder, and holds it until this process ends. Raises ValueError on all ranks where another run does."""
    os.makedirs(folder, exist_ok=True)
    if ranks.agree(ranks.first and not hold(folder, ranks)):
        raise ValueError(f"another run is writing into {folder}; wait for it, stop it, or name another --out")


def hold(folder: str, ranks: Ranks) -> bool:
    """Whether this process has the folder's lock, or nobody can have one."""
    if os.path.realpath(folder) in LOCKS:
        return True
    try:
        import fcntl
    except ImportError:
        raise ValueError("training needs Linux or macOS: this system has no locks of theirs, and no signals; on Windows, use WSL") from None
    descriptor = os.open(folder, os.O_RDONLY)
    for wait in range(21):      # a killed run's workers may live for some seconds
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            LOCKS[os.path.realpath(folder)] = descriptor
            return True
        except BlockingIOError:
            time.sleep(0.5 if wait < 20 else 0)
        except OSError as error:
            ranks.say(f"  {folder} cannot be locked ({error.strerror}): make sure that no other run writes there")
            return True
    return False


class Signals:
    """While training, the first SIGINT or SIGTERM is only noted, as `asked`, so that the step ends and is saved; one more acts at once,
    unless it comes within a second: torchrun sends on to its ranks what a job's end has sent to all of them already."""

    def __enter__(self):
        self.asked, self.first, self.before = 0, 0.0, {}
        if threading.current_thread() is threading.main_thread():       # elsewhere Python allows no handlers
            self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        if not self.asked:
            self.asked, self.first = number, time.monotonic()
            text = f"\n{signal.Signals(number).name}: the step is finished and saved first; once more, a second from now, stops at once\n"
            os.write(2, text.encode())      # print is not for handlers
        elif time.monotonic() > self.first + 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.default_int_handler(number, frame) if number == signal.SIGINT else os.kill(os.getpid(), number)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)       # None: it was not Python's


def never_ending(batches, start: int, say):
    """batches(start), begun anew at the step where a worker died, as of too little memory. Raises ValueError where one dies there again."""
    step, failed = start, None
    while True:
        try:
            for batch in batches(step):
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # torch's raises in mid-step; the loader notices too, in seconds
                yield batch
                step += 1
        except (RuntimeError, EOFError, ConnectionError) as error:      # the last two where it died in the middle of a batch
            if isinstance(error, RuntimeError) and not re.search("DataLoader worker|Pin memory thread", str(error)):
                raise
            if failed == step:
                raise ValueError(f"workers for step {step + 1} died twice ({first_line(error)}); add memory or lower --workers") from None
            failed = step
            say(f"  a process that reads data died at step {step + 1}; it and the others are started again")


LOW, LOW_STEPS = 0.1, 100       # a codebook of whose codes fewer than this share has been in use for so many steps has collapsed


def fit(stage: Stage, batches, start: int = 0, elapsed: float = 0.0, since_log: dict | None = None):
    """The training loop. batches(start) yields (micro-batches, reports of broken samples) from a step on. Nothing in a step waits for the
    device: losses, bad steps and code usage are looked at when a log line is due. since_log: what a checkpoint kept of the steps since.
    Asked to stop, by SIGINT or SIGTERM, it saves and raises SystemExit."""
    args, ranks, since_log = stage.args, stage.ranks, since_log or {"sums": {}, "bad": torch.zeros(3), "low": {}, "counted": {}}
    stage.wrapped = ranks.wrap(stage.model)
    stream, waited = never_ending(batches, start, lambda words: print(f"{words} (rank {ranks.rank})", flush=True)), 0.0
    broken, low = since_log.get("broken", []) * ranks.first, since_log["low"]      # low: streams, and since when they have used few codes
    # Of the steps since the last log line: the sums of `gradients`; bad steps in a row, the longest such row, and all of them.
    mine = lambda rows: rows[ranks.rank] if len(rows) == ranks.count else rows.sum(0) * ranks.first     # the ranks may be others now
    sums = {name: mine(rows).to(ranks.device) for name, rows in since_log["sums"].items()}
    streak, longest, skipped = since_log["bad"].to(ranks.device)
    stage.counted |= {name: value.to(ranks.device) for name, value in since_log["counted"].items()}
    begun, seen, training = time.time() - elapsed, start, 0.0
    evaluated = start and any(line["step"] == start and any(name.startswith("eval_") for name in line) for line in read_log(stage.folder))
    if ranks.agree(start == stage.steps or start and args.eval_every and start % args.eval_every == 0 and not evaluated):
        evaluate_and_log(stage, start, log=not evaluated)       # it died before it had, or before metrics.json
    since = time.time()
    with Signals() as signals:
        for step in range(start, stage.steps):
            before = time.time()
            parts, reports = next(stream)
            waited, broken = waited + time.time() - before, broken + reports
            lr = stage.lr * cosine(step, stage.steps, stage.warmup)
            gradients(stage, parts, step, sums)
            norm, bad = take_step(stage, lr)
            streak = (streak + 1) * bad
            longest, skipped, done = torch.maximum(longest, streak), skipped + bad, step + 1

            final = done == stage.steps
            if (final or done % min(args.log_every, args.max_bad_steps) == 0) and longest.item() >= args.max_bad_steps:
                for row in sums.values():       # the term may have been another rank's; all ranks are here together
                    all_reduce(row)
                raise ValueError(f"stopped at step {done} of {stage.name}: {int(longest)} steps in a row were not finite "
                                 f"({not_finite(sums)}); what was saved before is kept in {stage.folder}: lower --lr, or look at the data")
            if final or done % args.log_every == 0:
                line, low = summary(stage, done, sums, skipped, norm, lr, low)
                now = time.time()
                line |= {f"{stage.unit}_per_second": (done - seen) * stage.batch / (now - since)}
                line |= {"waiting": waited / (now - since), "seconds": now - begun}
                write_log(stage, line, [*dict.fromkeys(ranks.gather_rows({"broken": broken})["broken"])])
                training += now - since
                sums, waited, broken, since, seen = {}, 0.0, [], now, done
                longest, skipped = torch.zeros_like(longest), torch.zeros_like(skipped)

            asked = ranks.agree(signals.asked)
            before, due = time.time(), final or args.eval_every and done % args.eval_every == 0
            if asked or due or done % args.save_every == 0:     # before an evaluation too: it may be long, and nobody waits for its end
                rows = ranks.gather_rows({name: row[None] for name, row in sums.items()})
                since_log = {"sums": rows, "bad": torch.stack([streak, longest, skipped]), "low": low, "counted": stage.counted,
                             **ranks.gather_rows({"broken": broken})}
                save_state(stage, done, time.time() - begun, since_log)
            if due and not asked:
                evaluate_and_log(stage, done)
            since += time.time() - before       # evaluating and saving are not training
            if asked := asked or due and ranks.agree(signals.asked):
                ranks.say(f"{signal.Signals(asked).name}: {stage.name} stopped after step {done} of {stage.steps}, which is saved in "
                          f"{os.path.join(stage.folder, 'state.pt')}; --resume goes on")
                sys.exit(128 + asked)
    stage.seconds, stage.per_second = time.time() - begun, (stage.steps - start) * stage.batch / training if training else 0.0


def summary(stage: Stage, done: int, sums: dict[str, Tensor], skipped: Tensor, norm: Tensor, lr: float, low: dict) -> tuple[dict, dict]:
    """The log line of `fit` but its times: means of the terms where they were finite, and what went wrong; and `low` as it is now."""
    sums = {name: all_reduce(row) for name, row in sums.items()}
    means = {name: row[0].item() / row[1].item() if row[1] else None for name, row in sums.items()}
    line = {"step": done, **means, "norm": norm.item() if norm.isfinite() else None, "lr": lr, **stage.log()}
    if skipped.item():
        line |= {"skipped": int(skipped), "not_finite": not_finite(sums)}
    last = (done - 1) // stage.args.log_every * stage.args.log_every        # the step of the last log line
    before, low = low, {name[6:]: low.get(name[6:], last) for name, value in line.items() if name.startswith("usage_") and value < LOW}
    if collapsed := [stream for stream, since in low.items() if stream in before and done - since >= LOW_STEPS]:
        line["collapsed"] = collapsed
    return line, low


def evaluate_and_log(stage: Stage, step: int, log: bool = True):
    with torch.compiler.set_stance("force_eager"):      # its batches have sizes of their own, each of which would be compiled
        stage.metrics = stage.evaluate()
    metrics = {name: value for name, value in stage.metrics.items() if isinstance(value, float)}
    stage.ranks.say(f"{stage.name} {step}/{stage.steps}  evaluated: " + "  ".join(f"{name} {show(x)}" for name, x in metrics.items()))
    if stage.ranks.first and log:
        append_log(stage.folder, {"step": step, **{f"eval_{name}": value for name, value in metrics.items()}})


def not_finite(sums: dict[str, Tensor]) -> str:
    """The terms of `gradients` that were not finite at some step; the gradient itself where all of them were."""
    return ", ".join(name for name, row in sums.items() if row[2] > 0) or "gradient"


def show(value) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 else f"{value:.3g}"


def write_log(stage: Stage, line: dict, broken: list[str]):
    """One line for a person, the same as JSON in the run folder, and every broken sample by name."""
    if not stage.ranks.first:
        return
    left = (stage.steps - line["step"]) * stage.batch / line[f"{stage.unit}_per_second"]
    words = [f"{name} {show(x)}" for name, x in line.items() if name not in ("step", "seconds", "not_finite", "waiting", "collapsed")]
    print(f"{stage.name} {line['step']}/{stage.steps}  " + "  ".join(words) + f"  left {left / 60:.1f} min", flush=True)
    if "skipped" in line:
        print(f"  {line['skipped']} steps skipped, not finite: {line['not_finite']}", flush=True)
    if "collapsed" in line:
        print(f"  codebook {' and '.join(line['collapsed'])}: under {LOW:.0%} of its codes in use for {LOW_STEPS} steps or more; it has "
              "collapsed: lower --lr, or look at the data", flush=True)
    if broken:
        line["broken"] = broken
        print(f"  {len(broken)} broken samples replaced: " + "; ".join(broken[:3]) + (" ..." if len(broken) > 3 else ""), flush=True)
    append_log(stage.folder, line)


def append_log(folder: str, line: dict):
    with open(os.path.join(folder, "log.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_log(folder: str) -> list[dict]:
    """Its lines, each with its step. Raises ValueError for what is none, with the line's number."""
    path, lines = os.path.join(folder, "log.jsonl"), []
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):        # one that a kill cut short does not count
                try:
                    lines.append(json.loads(line))
                    lines[-1]["step"] += 0
                except (ValueError, TypeError, KeyError, RecursionError):
                    raise ValueError(f'{path}, line {number}: got {line[:60]!r}, expected an object with a "step"; take it out') from None
    return lines


def checkpoints(folder: str) -> list[str]:
    """state.pt, and those before it that were kept, state-1.pt, ...: the newest first."""
    found = [re.fullmatch(r"state(?:-(\d+))?\.pt", name) for name in (os.listdir(folder) if os.path.isdir(folder) else ())]
    return [os.path.join(folder, match[0]) for match in sorted(filter(None, found), key=lambda match: int(match[1] or 0))]


def save_state(stage: Stage, step: int, seconds: float, since_log: dict):
    """What others load, curves and samples; then state.pt, which holds the weights too: the same files whatever the ranks, and whether
    they share the weights. Raises OSError on all ranks where the first could not write; the checkpoint before it is then kept."""
    parts = {"model": stage.model, "optimizer": stage.optimizer, **stage.extra_state()}
    # on the CPU of the first rank alone, by single tensors, as the device may not hold all
    cpu = lambda x: x.cpu() if stage.ranks.first else None
    state = tree_map(lambda x: cpu(whole(x)) if isinstance(x, Tensor) else x,
                     {**{name: part.state_dict() for name, part in parts.items()}, "since_log": since_log})
    failed = None
    if stage.ranks.first:
        try:
            write_state(stage, {"stage": stage.name, "step": step, "seconds": seconds, "settings": stage.settings, **state})
        except (OSError, ValueError) as error:
            failed = error
    if stage.ranks.agree(failed is not None):
        raise failed or OSError(f"the first rank could not save step {step} in {stage.folder}")


def write_state(stage: Stage, state: dict):
    """One file, one rename, once it is on the disk, so that a kill never pairs weights and optimiser of different steps."""
    path, keep = os.path.join(stage.folder, "state.pt"), stage.args.keep_checkpoints
    try:
        stage.save(state["model"])
        draw_curves(read_log(stage.folder), os.path.join(stage.folder, "curves.png"))
        try:
            torch.save(state, path + ".tmp")
        except RuntimeError as error:       # torch's own, in several wordings, for a full disk
            raise OSError(first_line(error)) from None
        with open(path + ".tmp", "rb+") as file:
            os.fsync(file.fileno())
    except OSError as error:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        raise OSError(f"{path} cannot be written at step {state['step']} ({first_line(error)}); "
                      "the checkpoint before it is kept: make room, then --resume") from None
    copies = [path + ".tmp", path, *(os.path.join(stage.folder, f"state-{n}.pt") for n in range(1, keep))]
    for newer, older in reversed([*itertools.pairwise(copies)]):
        if os.path.exists(newer):
            os.replace(newer, older)


def load_state(stage: Stage) -> tuple[int, float, dict | None]:
    """Back to where `save_state` was, by the newest checkpoint that can be read -> step, seconds, and what it knew since the last log
    line. The log loses what came after. Raises ValueError for damaged files or other settings."""
    damaged, shapes = [], lambda counted: {name: value.shape for name, value in counted.items()}
    for path in checkpoints(stage.folder):
        try:
            # read where it is needed: ranks may share what none could hold
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            changed = differences(state["settings"], stage.settings)
            step, seconds, since_log = state["step"], state["seconds"], state.get("since_log")
            if type(step) is not int or not 0 <= step <= stage.steps or not isinstance(seconds, (int, float)):
                raise ValueError(f"step {step} of {stage.steps} after {seconds} seconds")
            check(not since_log or all(rows.shape[1:] == (3,) and rows.isfinite().all()
                                       for rows in (*since_log["sums"].values(), since_log["bad"][None]))
                  and all(type(value) is int for value in since_log["low"].values())
                  and shapes(since_log["counted"]) == shapes(stage.counted), "what it knew since the last log line is damaged")
            break
        except Exception as error:      # torch.load raises nearly anything on damaged bytes
            damaged.append((path, f"{path} cannot be resumed from ({first_line(error)})"))
    else:
        raise ValueError(f"{'; '.join(words for _, words in damaged)}; expected what a run of this script wrote")
    if stage.ranks.agree(step) != -stage.ranks.agree(-step):
        raise ValueError(f"ranks read different checkpoints in {stage.folder}, this one step {step} of {path}; look at the disk")
    words = "; ".join(changed[:4] + [f"{len(changed) - 4} more"] * (len(changed) > 4))
    check(not changed, f"{path} is of a run with other settings ({words}); resume with the same ones, or start anew in another --out")
    try:
        for name, part in {"model": stage.model, "optimizer": stage.optimizer, **stage.extra_state()}.items():
            load_part(part, state[name], path)
    except (KeyError, IndexError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint of this stage ({first_line(error)}); take an older copy of it") from None
    if stage.ranks.first:
        path, lines = os.path.join(stage.folder, "log.jsonl"), read_log(stage.folder)
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines if line["step"] <= step)
        os.replace(path + ".tmp", path)
        for damaged_path, words in damaged:
            os.replace(damaged_path, damaged_path + ".damaged")
            print(f"  {words}, and is now {os.path.basename(damaged_path)}.damaged: an older one is taken")
    stage.ranks.say(f"{stage.name}: resumed at step {step} of {stage.steps}")
    return step, seconds, since_log


def differences(old: dict, new: dict) -> list[str]:
    """Settings that are others in `new` than in `old`, or in one of them alone; those inside dicts and lists by dotted names."""
    name = lambda path: ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
    old, new = ({name(path): value for path, value in tree_flatten_with_path(settings)[0]} for settings in (old, new))
    short = lambda x: x if len(x) <= 80 else f"{x[:25]}...{x[-50:]}"
    said = lambda settings, key: short(" ".join(str(settings.get(key)).split()))
    return [f"{key} {said(old, key)} -> {said(new, key)}" for key in new | old if old.get(key) != new.get(key)]


def to_picture(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> B PIL images, rounded to 8 bits."""
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(p) for p in pixels]


def save_grid(rows: list[Tensor], path: str, cell: int = 96, titles: list[list[str]] | None = None):
    """A PNG with a row of pictures per tensor (B, 3, H, W), each at least `cell` wide, enlarged by a whole number, its title below."""
    pictures = [to_picture(row) for row in rows]
    side, cell = pictures[0][0].width, cell if titles is None else max(cell, 160)
    # one picture alone has no frame: it may be read again
    gap, cell = 4 if len(pictures) * len(pictures[0]) > 1 or titles else 0, side * max(1, cell // side)
    high = cell + gap + (36 if titles else 0)
    sheet = Image.new("RGB", (len(pictures[0]) * (cell + gap) + gap, len(rows) * high + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(pictures):
        for x, picture in enumerate(row):
            corner = gap + x * (cell + gap), gap + y * high
            sheet.paste(picture.resize((cell, cell), Image.Resampling.NEAREST), corner)
            if titles:
                lines = textwrap.wrap(titles[y][x].encode("ascii", "replace").decode(), cell // 6, max_lines=3, placeholder=" ...")
                draw.text((corner[0], corner[1] + cell + 1), "\n".join(lines), fill="black", font_size=10, spacing=1)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    sheet.save(path)


def draw_curves(log: list[dict], path: str):
    """A PNG with one small panel per number in the log, over steps."""
    names = dict.fromkeys(name for line in log for name in line if name not in ("step", "seconds", "waiting", "skipped"))
    draw_panels({name: [(line["step"], line[name]) for line in log
                        if isinstance(line.get(name), (int, float)) and math.isfinite(line[name])] for name in names}, path)


def draw_panels(series: dict[str, list], path: str, origin: bool = False, width: int = 300, height: int = 150):
    """A PNG of a small panel per series of two points or more: {name: [(step or size, value), ...]}. origin: from (0, 0), with dots."""
    series = {name: points for name, points in series.items() if len(points) > 1}
    if not series:
        return
    columns = min(4, len(series))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(series) / columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (name, points) in enumerate(series.items()):
        left, top = n % columns * width + 10, n // columns * height + 22
        w, h = width - 20, height - 42
        corners = [(0, 0), tuple(1.15 * most for most in map(max, zip(*points)))] * origin
        (first, last), (low, high) = ((min(values), max(values)) for values in zip(*points, *corners))
        line = [(left + w * (s - first) / max(1, last - first), top + h - h * (v - low) / ((high - low) or 1)) for s, v in points]
        draw.rectangle((left, top, left + w, top + h), outline=(220, 220, 220))
        draw.line(line, fill=(40, 90, 200), width=2)
        draw.text((left, top - 16), name if origin else f"{name}  {show(float(points[-1][1]))}", fill="black")
        if origin:
            for (x, y), (s, v) in zip(line, points):
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(40, 90, 200))
                draw.text((x - 4, y - 1), f"{v:.3g}", fill="black", anchor="rb")
                draw.text((x, top + h + 3), f"{s:,}", fill=(120, 120, 120), anchor="mt")
        else:
            draw.text((left, top + h + 3), f"{show(float(low))} .. {show(float(high))}   step {first} .. {last}", fill=(120, 120, 120))
    sheet.save(path + ".tmp", format="PNG")
    os.replace(path + ".tmp", path)


def begin_peak(device: torch.device):
    """Frees the stage before, which its own functions refer to, and on CUDA begins the peak of memory anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory used so far: the device's on CUDA, else this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    import resource     # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16 FLOP/s, for model FLOPs utilisation


def flop_counter() -> FlopCounterMode:
    """torch's, with a CPU's attention; what is masked counts too. Not by module: that would hold on to recomputed activations."""
    def for_all_heads(count, at: int):
        """A formula, given as many heads of keys and values as of queries (the argument number `at`): torch 2.11 wants them so."""
        def counted(*x, **more):
            k, v = (y[:, :1].expand(-1, x[at].shape[1], -1, -1) for y in x[at + 1:at + 3])
            return count(*x[:at + 1], k, v, *x[at + 3:], **more)
        return counted
    counter = FlopCounterMode(display=False)
    counter.mod_tracker.__enter__ = counter.mod_tracker.__exit__ = lambda: None
    for at, way in enumerate(("", "_backward")):
        known, unknown = (getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{where}{way}") for where in ("", "_for_cpu"))
        counter.flop_registry[known] = counter.flop_registry[unknown] = for_all_heads(counter.flop_registry[known], at)
    return counter


def seconds_of(one, device: torch.device, times: int = 1, warmup: int = 2, rounds: int = 5) -> float:
    """Seconds that one() takes: the median over some rounds of so many times."""
    def clock():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()
    for _ in range(warmup):
        one()
    # timeit turns the collection of garbage off; its setup turns it on again
    return statistics.median(timeit.repeat(one, gc.enable, clock, rounds, times)) / times


def whole_step(stage: Stage, parts: list[tuple]):
    gradients(stage, parts, stage.steps, {})        # a step past the end: everything is on
    take_step(stage, stage.lr)


def bench(stage: Stage, batches, what: str = ""):
    """Time 20 steps of a stage and print what they take; writes nothing."""
    device, stream, waited, counter = stage.ranks.device, iter(batches(0)), [], flop_counter()
    begin_peak(device)
    stage.wrapped = stage.ranks.wrap(stage.model)

    def one():
        begun = time.perf_counter()
        parts, _ = next(stream)
        waited.append(time.perf_counter() - begun)
        whole_step(stage, parts)
    with torch.compiler.set_stance("force_eager"), counter:     # what is first met while counting is never compiled
        one()
    one()               # where cuDNN tries its ways
    begin_peak(device)  # the steps that were for counting and trying took more
    seconds = seconds_of(one, device, times=4)
    peak = next((flops for name, flops in PEAK.items() if device.type == "cuda" and name in torch.cuda.get_device_name(device)), None)
    used = f", {counter.get_total_flops() / seconds / peak:.1%} of {peak / 1e12:.0f} TFLOP/s" if peak else ""
    stage.ranks.say(f"{stage.name}{what}: {seconds:.4f} s a step of {stage.batch}, {stage.batch / seconds:.1f} {stage.unit}/s, "
                    f"{counter.get_total_flops() / 1e9:.1f} GFLOP a step and rank{used}, "
                    f"{statistics.mean(waited[-20:]) / seconds:.2%} of it waiting for data, peak memory {peak_memory_gib(device):.2f} GiB")


def bench_quantizer(args, ranks: Ranks):
    """A residual quantizer's time, beside vector-quantize-pytorch's where that is installed, and how it grows; are codes the nearest?"""
    cuda = ranks.device.type == "cuda"
    M, K, E, D = (32 * 729, 16_384, 32, 8) if cuda else (4096, 1024, 32, 4)
    z = lambda M: torch.randn(1, M, E, generator=torch.Generator().manual_seed(args.seed)).to(ranks.device)

    def ours(M, K, D):
        vq, x = ResidualVQ(E, K, D).to(ranks.device), z(M)
        vq.fused = args.fast_vq
        return vq, lambda: (vq(x), vq.training and vq.update())
    rows = {"ours" + ", --fast-vq" * args.fast_vq: ours(M, K, D)}
    try:
        package, x = importlib.import_module("vector_quantize_pytorch"), z(M)
        peer = package.ResidualVQ(dim=E, codebook_size=K, num_quantizers=D, shared_codebook=True, decay=0.99).to(ranks.device)
        rows["vector-quantize-pytorch"] = peer, lambda: peer(x)
    except ImportError:
        ranks.say("vector-quantize-pytorch is not installed, so there is no peer to compare with")
    ranks.say(f"{M} vectors of {E} numbers, {D} codes each out of {K}, on {machine(ranks)['device']}, torch {torch.__version__}")
    with torch.no_grad():
        for training, (name, (vq, one)) in itertools.product((True, False), rows.items()):
            vq.train(training)
            begin_peak(ranks.device)
            ranks.say(f"  {name}, {'training with EMA' if training else 'evaluation'}: {1000 * seconds_of(one, ranks.device):.2f} ms"
                      + f", {peak_memory_gib(ranks.device):.2f} GiB" * cuda)
        vq, x = next(iter(rows.values()))[0], z(M)
        codes, wrong, ours_left, least_left = vq.encode(x)[0], 0, 0.0, 0.0
        for part, chosen in zip(x[0].split(1024), codes.split(1024)):
            left = part.double()        # what is left is that of our codes: each is judged by itself
            for d in range(D):
                distances = torch.cdist(left, vq.table(d).double())
                nearest, left = distances.min(1), left - vq.table(d)[chosen[:, d]].double()
                wrong = wrong + (nearest.indices != chosen[:, d]).sum()
                ours_left, least_left = ours_left + left.square().sum(), least_left + nearest.values.square().sum()
        ranks.say(f"  {1 - wrong / codes.numel():.4%} of the codes are the nearest in float64; what they leave is "
                  f"{ours_left / least_left - 1:.1e} more than the least")
        usual = {"vectors": M, "codebook size": K, "depth": D}
        growth(args, ranks, "ours", {what: [size * n for n in (1, 2, 4)] for what, size in usual.items()}, ("ms in training",),
               lambda what, size: [1000 * seconds_of(ours(*(usual | {what: size}).values())[1], ranks.device)])


def growth(args, ranks: Ranks, name: str, axes: dict, units: tuple, measured):
    """How measured(what, size), a number for each unit, grows along axes {what: sizes}: the power law's exponent, by least squares of the
    logarithms, and a picture in the run's folder, panels in which linear growth is a straight line."""
    curves, path = {}, os.path.join(args.out, f"bench-{args.bench}.png")
    for what, sizes in axes.items():
        said = []
        for values, unit in zip(zip(*(measured(what, size) for size in sizes)), units):
            law = statistics.linear_regression([*map(math.log, sizes)], [*map(math.log, values)])
            grows = f"{unit}, exponent {law.slope:.2f}"
            curves[f"{what}: {grows}"] = list(zip(sizes, values))
            said.append(f"{', '.join(f'{x:.3f}' for x in values)} {grows}")
        ranks.say(f"{name}, {what} {', '.join(map(str, sizes))}: {'; '.join(said)}")
    if ranks.first:
        os.makedirs(args.out, exist_ok=True)
        draw_panels(curves, path, origin=True)
    ranks.say(path)


def bench_growth(args, ranks: Ranks, name: str, axes: dict, make):
    """A step's time and memory, on CUDA the device's peak, else what the dry run counts. make(what, size) -> (stage, micro-batches)."""
    def measured(what, size):
        begin_peak(ranks.device)
        stage, parts = make(what, size)
        stage.wrapped = ranks.wrap(stage.model)
        seconds = seconds_of(lambda: whole_step(stage, parts), ranks.device, rounds=3)
        return seconds, peak_memory_gib(ranks.device) if ranks.device.type == "cuda" else measure(stage, parts).memory / 2 ** 30
    growth(args, ranks, name, axes, ("s a step", "GiB"), measured)


# ---------------------------------------------------------------------------------------------------------------------
# dry run, shared with train_mllm.py. A stage's own step runs once on fake tensors, which have shapes and dtypes but no memory, so that
# nothing here repeats what a model computes. Not counted, besides what `dry_run` names: the CUDA context, the optimiser's temporaries.

@contextlib.contextmanager
def fake():
    """Tensors made in it have no memory; modules stay where they are, as torch cannot move them; quantizers work in a GPU's portions."""
    moves, nn.Module.to, cells = nn.Module.to, lambda module, *_: module, CELLS.pop("cpu")
    try:
        with FakeTensorMode() as mode, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")       # which copy.deepcopy does
            mode.__deepcopy__ = lambda _: mode      # a copied tensor would take its own mode along
            yield mode
    finally:
        nn.Module.to, CELLS["cpu"] = moves, cells


class Live(TorchDispatchMode):
    """Bytes of all tensors alive: `now`, and at the `peak`, `gradients` of them those of parameters, of which a rank holds 1 / `shards`."""

    def __init__(self, tensors, shards: int = 1):
        super().__init__()
        self.shards, self.storages, self.owners, self.now, self.peak, self.done, self.gradients = shards, set(), set(), 0, 0, 0, 0
        for x in tensors:
            self.add(x)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.add(x)
        return out

    def add(self, x: Tensor):
        storage = x.untyped_storage()
        if id(storage) not in self.storages:        # a view, or changed in place
            self.storages.add(id(storage))
            weakref.finalize(storage, self.drop, id(storage), storage.nbytes()).atexit = False
            self.now += storage.nbytes()
            held = self.now - self.done + self.done / self.shards
            if held > self.peak:
                self.peak, self.gradients = held, self.done / self.shards

    def drop(self, name: int, size: int):
        self.storages.remove(name)
        self.now -= size

    def accumulated(self, p: nn.Parameter):
        """The hook of a parameter whose gradient is there."""
        self.done += p.grad.nbytes if id(p) not in self.owners else 0
        self.owners.add(id(p))


@dataclass
class Cost:
    """Of one rank's step; bytes are those at its peak."""
    trained: int            # parameters
    forward: float          # FLOPs of the model, without backward pass, teacher and discriminator
    step: float             # FLOPs of everything, recomputation included
    weights: float
    gradients: float
    optimiser: float
    reduced: float          # DDP's second copy of the gradients, or the layers and tables that FSDP gathers
    activations: float      # and what a backward pass needs besides

    @property
    def memory(self) -> float:
        return self.weights + self.gradients + self.optimiser + self.reduced + self.activations


def measure(stage: Stage, parts: list[tuple], ranks: int = 1, fsdp: bool = False) -> Cost:
    """One step's forward and backward over these micro-batches, of which two stand for all: the second finds the gradients of the first."""
    few, counter, marks, model = parts[:2], flop_counter(), [], stage.model
    modules, tensors = [x for x in vars(stage).values() if isinstance(x, nn.Module)], lambda x: [*x.parameters(), *x.buffers()]
    live, stage.wrapped = Live(itertools.chain(*map(tensors, modules)), ranks if fsdp else 1), model
    weights, own = live.now, sum({x.untyped_storage()._cdata: x.nbytes for x in tensors(model)}.values())
    hooks = [p.register_post_accumulate_grad_hook(live.accumulated) for x in modules for p in x.parameters() if p.requires_grad]
    hooks += [register(lambda *_: marks.append(counter.get_total_flops()))
              for register in (model.register_forward_pre_hook, model.register_forward_hook)]
    with live, counter:
        gradients(stage, few, stage.steps, {})      # a step past the end: everything is on
    for hook in hooks:
        hook.remove()
    for module in modules:
        module.zero_grad()      # another stage may follow with the same model
    optimisers = [x for x in vars(stage).values() if isinstance(x, torch.optim.Optimizer)]
    state = sum(p.nbytes * (1 if isinstance(x, Muon) else 2) for x in optimisers for group in x.param_groups for p in group["params"])
    trained, repeat = [p for p in model.parameters() if p.requires_grad], len(parts) / len(few)
    reduced, divisor = sum(p.nbytes for p in trained) if ranks > 1 else 0, 1
    if fsdp:        # layers are gathered one after the other, the next while one computes; what is in no layer stays gathered
        layers = [sum(p.nbytes for p in x.parameters()) for x in model.modules() if type(x).__name__ in ("Layer", "LLMLayer", "VisualHead")]
        reduced, divisor = own - sum(layers) + 2 * max(layers), ranks
    return Cost(sum(p.numel() for p in trained), repeat * (sum(marks[1::2]) - sum(marks[::2])), repeat * counter.get_total_flops(),
                weights - own + own / divisor, live.gradients, state / divisor, reduced, live.peak - weights - live.gradients)


def as_on_cuda(stage: Stage):
    """Makes autocast on a CPU, where fake tensors lie, keep norms in fp32 as CUDA's does. fp16 has bf16's bytes, and CUDA's attention."""
    if stage.precision == "bf16":
        stage.autocast = lambda: torch.autocast("cpu", torch.float16)
        for module in [m for x in vars(stage).values() if isinstance(x, nn.Module) for m in x.modules()]:
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                module.register_forward_pre_hook(lambda _, x: (x[0].float(),))


def dry_run(args, makers: list, ranks: int, unit: str):
    """The table of all stages. makers: functions that make (stage, micro-batches of a rank), all fake."""
    args.precision = "bf16" if args.precision == "auto" else args.precision
    fsdp, peak = getattr(args, "fsdp", False), PEAK["H100"] * args.utilisation
    print(f"\na rank of {ranks}, {args.precision}{', FSDP' if fsdp else ', DDP' if ranks > 1 else ''}; GFLOP per {unit}, GiB a rank at the "
          f"peak of a step; time at {args.utilisation:.0%} of an H100's {PEAK['H100'] / 1e12:.0f} TFLOP/s"
          + ", which fp32 has not: no time" * (args.precision == "fp32"))
    names = ("trained M", "forward", "step", "weights", "gradients", "optimiser", "gathered" if fsdp else "DDP's", "activations", "sum",
             "80 GB", "s/step", f"{unit}s/s", "hours")
    print(f"  {'stage':35}" + "".join(f"{name:>{max(9, len(name) + 2)}}" for name in names))
    for make, args.checkpointing in itertools.product(makers, (False, True)):
        stage, parts = make()
        as_on_cuda(stage)
        cost = measure(stage, parts, ranks, fsdp)
        share, seconds = stage.batch // ranks, cost.step / peak
        gib = [x / 2 ** 30 for x in (cost.weights, cost.gradients, cost.optimiser, cost.reduced, cost.activations, cost.memory)]
        # of the 79 GiB that such a device has, a tenth for what is not counted
        fits = "fits" if gib[-1] < 0.9 * 79 else "tight" if gib[-1] < 79 else "no"
        flops = [f"{x / share / 1e9:.1f}" for x in (cost.forward, cost.step)]
        times = [f"{seconds:.3g}", f"{stage.batch / seconds:.0f}", f"{stage.steps * seconds / 3600:.3g}"]
        times = ["-"] * 3 if args.precision == "fp32" else times
        row = [f"{cost.trained / 1e6:.1f}", *flops, *(f"{x:.2f}" for x in gib), fits, *times]
        title = f"{stage.name}, {share}" + f" in {args.accumulate}" * (args.accumulate > 1) + ", checkpointing" * args.checkpointing
        print(f"  {title:35}" + "".join(f"{x:>{max(9, len(name) + 2)}}" for x, name in zip(row, names)), flush=True)
    print("not counted: fragmentation, workspaces of kernels, NCCL's buffers, waiting for data and for other ranks, evaluation")


def print_parts(rows: list[tuple[str, int]]):
    """Parameters by part."""
    for name, count in rows:
        print(f"  {name:40} {count / 1e6:10.1f} M")


# ---------------------------------------------------------------------------------------------------------------------
# tables of the papers, shared with train_mllm.py: systems trained with the same data, steps and seeds, and the papers' numbers beside ours

@dataclass
class System:
    """A row: what it is, its run (folder, flags by name), the paper's numbers by metric, and metrics that have another name here."""
    label: str
    name: str
    changes: dict
    paper: dict = field(default_factory=dict)
    rename: dict = field(default_factory=dict)
    tokenizer: tuple = ()       # of a language model: the (folder, flags) of its tokenizer


@dataclass
class Table:
    """A table of a paper: its columns, its rows, and where the paper's numbers are from."""
    title: str
    columns: dict           # metric, such as painting.single -> what it is
    lower: tuple            # those of which less is better
    systems: list
    source: str             # of the paper's numbers
    curve: tuple = ()       # two metrics to draw against each other


def make_table(args, tables: dict[str, Table], measure):
    """Runs, or finds, every system of --table with every seed; measure(seed, system) -> its metrics. Prints the table and writes it into
    --out, as JSON, Markdown and bars. Raises ValueError for a table that is not there, and for rows that do not compare."""
    check(args.table in tables, f"--table is {args.table!r}, expected one of {', '.join(tables)}")
    table, seeds, begun = tables[args.table], range(args.seed, args.seed + args.seeds), time.time()
    found, rows = [[measure(seed, system) for seed in seeds] for system in table.systems], []
    for system, runs in zip(table.systems, found):
        ours = {}
        for column in table.columns:
            values = runs
            for key in system.rename.get(column, column).split("."):
                values = [value.get(key) if isinstance(value, dict) else None for value in values]
            if None not in values:
                ours[column] = {"mean": sum(values) / len(values), "spread": max(values) - min(values), "values": values}
        rows.append({"label": system.label, "run": system.name, "ours": ours, "paper": system.paper,
                     "seconds": [metrics["seconds"] for metrics in runs],
                     **{f"{what}s": sorted({metrics[what] for metrics in runs}) for what in ("commit", "device")}})
    if len(counts := {metrics["images"] for runs in found for metrics in runs if "images" in metrics}) > 1:
        raise ValueError(f"the rows of --table {args.table} were evaluated on {' and '.join(map(str, sorted(counts)))} images; name one "
                         "--eval-images, and another --out, or delete those of the others")
    ranks = Ranks(args.device)
    if ranks.first:
        path = os.path.join(args.out, f"table-{args.table}")
        write_json(path + ".json", {"table": table.title, "preset": args.preset, "seeds": [*seeds], "paper": table.source,
                                    **machine(ranks), "rows": rows})
        devices = sorted({device for row in rows for device in row["devices"]})
        text = table_text(table, rows, f"preset {args.preset}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}, "
                                       f"{' and '.join(devices)}, torch {torch.__version__}")
        with open(path + ".md", "w", encoding="utf-8") as file:
            file.write(text)
        draw_bars(table, rows, path + ".png")
        if table.curve and any({*table.curve} <= row["ours"].keys() for row in rows):
            draw_curve(table, rows, path + "-curve.png")
        print(f"\n{text}\n{path}.md, .json, .png; {(time.time() - begun) / 60:.1f} minutes")


def metrics_of(folder: str) -> dict:
    """Of a finished run, once the first rank has written them."""
    if dist.is_initialized():
        dist.barrier()
    return read_json(os.path.join(folder, "metrics.json"))


def table_text(table: Table, rows: list[dict], made: str) -> str:
    """The table in Markdown: ours, +- half the spread over seeds where there are several, and the paper's in brackets."""
    def cell(row, column):
        ours, paper = row["ours"].get(column), row["paper"].get(column)
        words = "-" if ours is None else f"{ours['mean']:.3f}" + (f" ± {ours['spread'] / 2:.3f}" if len(ours["values"]) > 1 else "")
        return words + (f" ({paper:g})" if paper is not None else "")
    head = ["", *(f"{what} {'↓' if name in table.lower else '↑'}" for name, what in table.columns.items())]
    lines = [head, ["---"] * len(head), *([row["label"], *(cell(row, column) for column in table.columns)] for row in rows)]
    body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"**{table.title}**; in brackets the paper's numbers, {table.source}. {made}.\n\n{body}"


def draw_bars(table: Table, rows: list[dict], path: str, room: int = 260, line: int = 20):
    """Two panels side by side, one per metric: a bar for each row, whose thin line spans the seeds, and in grey the paper's number."""
    names = [name for name in table.columns if any(name in row["ours"] for row in rows)]
    label = 12 + max(round(ImageDraw.Draw(Image.new("1", (1, 1))).textlength(row["label"], font_size=12)) for row in rows)
    width, height, top = label + room + 150, line * len(rows) + 44, 34
    sheet = Image.new("RGB", (2 * width, top + height * math.ceil(len(names) / 2)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 8), f"{table.title}; grey: the paper", fill="black", font_size=14)
    for n, name in enumerate(names):
        left, high = n % 2 * width + label, top + n // 2 * height
        most = max(max(row["ours"][name]["values"]) for row in rows if name in row["ours"]) or 1
        at = lambda value: left + max(0.0, room * value / most)
        draw.text((left, high), f"{table.columns[name]}, {'less' if name in table.lower else 'more'} is better", fill="black", font_size=12)
        for row in rows:
            high, ours, paper = high + line, row["ours"].get(name), row["paper"].get(name)
            draw.text((left - label + 8, high), row["label"], fill="black", font_size=12)
            if ours:
                draw.rectangle((left, high + 1, at(ours["mean"]), high + line - 6), fill=(90, 130, 210))
                draw.line((at(min(ours["values"])), high + line // 2 - 3, at(max(ours["values"])), high + line // 2 - 3), fill="black")
            end = at(max(ours["values"])) + 5 if ours else left
            draw.text((end, high), show(ours["mean"]) if ours else "-", fill="black", font_size=12)
            draw.text((left + room + 70, high), "" if paper is None else f"{paper:g}", fill=(130, 130, 130), font_size=12)
    sheet.save(path)


def draw_curve(table: Table, rows: list[dict], path: str, width: int = 620, height: int = 420):
    """Two metrics against each other: a numbered dot for each row that has both, a line for one with the first alone; labels below."""
    across, up = table.curve
    have = [row for row in rows if across in row["ours"]]
    values = {name: [row["ours"][name]["mean"] for row in have if name in row["ours"]] for name in table.curve}
    margin = {name: 0.08 * (max(means) - min(means)) or 1.0 for name, means in values.items()}
    low = {name: min(means) - margin[name] for name, means in values.items()}
    high = {name: max(means) + margin[name] for name, means in values.items()}
    left, top, right, bottom = 70, 54, width - 20, height - 50
    x = lambda v: left + (right - left) * (v - low[across]) / (high[across] - low[across])
    y = lambda v: bottom - (bottom - top) * (v - low[up]) / (high[up] - low[up])
    sheet = Image.new("RGB", (width, height + 20 * len(have) + 10), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 8), table.title, fill="black", font_size=14)
    draw.rectangle((left, top, right, bottom), outline=(180, 180, 180))
    for part in range(5):
        v, w = (low[name] + part / 4 * (high[name] - low[name]) for name in table.curve)
        draw.text((x(v), bottom + 6), f"{v:.2f}", fill="black", font_size=11, anchor="mt")
        draw.text((left - 6, y(w)), f"{w:.3f}", fill="black", font_size=11, anchor="rm")
    draw.text(((left + right) / 2, bottom + 26), table.columns[across], fill="black", font_size=12, anchor="mt")
    draw.text((8, top - 8), table.columns[up], fill="black", font_size=12, anchor="ls")
    for n, row in enumerate(have, 1):
        a, b, label = x(row["ours"][across]["mean"]), top + 18, f"{n}  {row['label']}"
        if up in row["ours"]:
            b = y(row["ours"][up]["mean"])
            draw.ellipse((a - 4, b - 4, a + 4, b + 4), fill=(40, 90, 200))
        else:
            draw.line((a, top, a, bottom), fill=(200, 60, 60), width=2)
            label += " (a line: it has no semantics)"
        draw.text((a + 7, b - 14), str(n), fill="black", font_size=13)
        draw.text((left, height + 20 * (n - 1)), label, fill="black", font_size=12)
    sheet.save(path)


# ---------------------------------------------------------------------------------------------------------------------
# data

def check_batch(batch: int, ranks: Ranks, accumulate: int):
    if batch % (ranks.count * accumulate):
        raise ValueError(f"--batch-size {batch} is not a multiple of {ranks.count} ranks x {accumulate} micro-batches; choose one that is")


def first_time(reports: list[str], seen: set[str]) -> list[str]:
    """Those not seen before, which they join: every sample of a lost shard, in every worker, reports the same."""
    return [report for report in reports if not (report in seen or seen.add(report))]


class Data:
    """Training and validation images with captions, of the built-in world or of real images, of which an epoch draws --num-samples
    anew. Captions become ids in the stages. runs: images that each stage takes, by its name, to say how many epochs that is."""

    def __init__(self, source: str, val_source: str, size: int, args, ranks: Ranks, runs: dict[str, int]):
        self.source, self.size, self.args, self.ranks, self.worlds = source, size, args, ranks, source in shapes.DIFFICULTIES
        self.drawn = source + f" ({args.num_samples:,} an epoch)" * bool(args.num_samples)        # what a resumed run must share
        least = max(2, ranks.count)
        check(args.eval_images >= least, f"--eval-images is {args.eval_images}, expected at least {least}")
        if self.worlds:
            if val_source or args.num_samples:
                raise ValueError(f"--{'val-data' if val_source else 'num-samples'} goes with images, not with {source!r}; leave it out")
            self.train, self.captioned = shapes.World(source, size, args.seed), True
            self.val = shapes.World(source, size, VALIDATION_SEED, "val")
            return
        data = ImageData(source, size, train=True, seed=args.seed, num_samples=args.num_samples)
        self.train, self.val = (data, ImageData(val_source, size, train=False)) if val_source else data.split()
        self.captioned = bool((data.records["text_size"] > 0).any())
        for report in dict.fromkeys(self.train.broken + self.val.broken):
            ranks.say(f"  {report}")
        n, held_out, epoch = len(self.train), len(self.val), args.num_samples or len(self.train)
        check(epoch <= n, f"--num-samples is {epoch:,}, expected at most the {n:,} images to train on, or 0 for all of them")
        epochs = ", epochs in this run: " * bool(runs) + ", ".join(f"{stage} {images / epoch:.2f}" for stage, images in runs.items())
        ranks.say(f"data: {n:,} images to train on, {held_out:,} held out; {epoch:,} of {n:,} samples an epoch{epochs}")
        check(held_out >= least, f"{held_out} images to evaluate on, expected at least {least}; add images, or name some with --val-data")

    def batches(self, batch: int, captions: bool = True):
        """-> function of a start step that yields this rank's part of each global batch, without end: micro-batches (images (b, 3, H, W) on
        the device in [-1, 1], captions, "" where the built-in world need not make any), and reports. Step t is the same whatever ranks
        there are: rank r has the r-th block."""
        ranks, local, accumulate = self.ranks, batch // self.ranks.count, self.args.accumulate
        check_batch(batch, ranks, accumulate)

        def drawn(start):
            for first in itertools.count(start * batch + ranks.rank * local, batch):
                yield *self.train.batch(range(first, first + local), ranks.device, captions), []

        def from_step(start):
            seen, loaded = set(), drawn(start) if self.worlds else self.train.load(
                batch, start, rank=ranks.rank, ranks=ranks.count, workers=self.args.workers, pin=ranks.device.type == "cuda")
            for images, captions, reports in loaded:
                images, size = self._signed(images), local // accumulate
                yield [(images[i:i + size], captions[i:i + size]) for i in range(0, local, size)], first_time(reports, seen)
        return from_step

    def _signed(self, images: Tensor) -> Tensor:
        """8-bit images on the device in [-1, 1], as the built-in world's are already."""
        return images if images.is_floating_point() else images.to(self.ranks.device, non_blocking=True).float() / 127.5 - 1

    def validation(self, batch: int = 64):
        """Yields (images, captions), this rank's share of the first --eval-images held-out samples."""
        rank, ranks, n = self.ranks.rank, self.ranks.count, self.args.eval_images
        if self.worlds:
            yield from (self.val.batch(part, self.ranks.device) for part in batched(range(n), batch, self.ranks))
            return
        local, left, seen = max(1, min(batch, len(self.val) // ranks)), len(range(rank, min(n, len(self.val)), ranks)), set()
        for images, captions, reports in self.val.load(local * ranks, stop=math.ceil(left / local), rank=rank, ranks=ranks,
                                                       workers=self.args.workers):
            for report in first_time(reports, seen):
                print(f"  {report}", flush=True)
            yield self._signed(images[:left]), captions[:left]
            left -= len(images)


# ---------------------------------------------------------------------------------------------------------------------
# evaluation

def retrieval(image: Tensor, text: Tensor, captions: list[str], owner: list[int] | None = None) -> dict[str, float]:
    """R@1 both ways over unit vectors (M, C) of images and (K, C) of captions; owner: the image of each caption, by default the one with
    its number. A hit is a right caption, word for word: several pictures may share it. Empty captions, and pictures without others, are
    left out; {} where no two captions are left."""
    told = [k for k, caption in enumerate(captions) if caption]
    pictures, of = torch.tensor([owner[k] if owner else k for k in told], dtype=torch.int64).unique(return_inverse=True)
    image, text, captions = image[pictures], text[told], [captions[k] for k in told]
    if len(set(captions)) < 2:
        return {}
    # of 31,000 pictures and 155,000 captions, all likenesses at once would be 19 GB
    right, nearest = set(zip(of.tolist(), captions)), lambda x, y: torch.cat([(part @ y.T).argmax(1) for part in x.split(1024)]).tolist()
    return {"i2t": sum((n, captions[k]) in right for n, k in enumerate(nearest(image, text))) / len(image),
            "t2i": sum((n, captions[k]) in right for k, n in enumerate(nearest(text, image))) / len(text)}


def zero_shot(pools: dict, siglip: SigLIP, data: Data) -> dict[str, float]:
    """Accuracy of `pools`, {name: images -> (B, C)}, on single-shape scenes of the built-in world among the captions "a COLOUR SHAPE": over
    the pairs seen in training, and, as NAME_held_out, over all pairs, on scenes with the others."""
    seen, ranks, found = shapes.seen_pairs(data.source), data.ranks, {}
    for split, end, pairs in (("val", "", seen), ("held_out", "_held_out", seen + shapes.held_out_pairs(data.source))):
        world, right = shapes.World(data.source, data.size, VALIDATION_SEED, split, single=1.0), []
        text = siglip.encode_text(siglip.text_ids([f"a {c} {s}" for c, s in pairs]).to(ranks.device))
        for part in batched(range(data.args.eval_images // 2), 128, ranks):
            scenes = world.scenes(part)
            label = torch.tensor([pairs.index((scene[0].colour, scene[0].shape)) for scene in scenes], device=ranks.device)
            images = shapes.render(scenes, data.size, ranks.device)
            right.append({name: (F.normalize(pool(images).float(), dim=-1) @ text.T).argmax(1) == label for name, pool in pools.items()})
        found |= {name + end: hits.double().mean().item() for name, hits in ranks.gather_rows(*right).items()}
    return found


def reader_accuracy(tokenizer: DualTokenizer, data: Data) -> tuple[float, float]:
    """On single-shape validation scenes: the share that the reader reads right, and the share of those right in reconstructions too."""
    world, counts = shapes.World(data.source, data.size, VALIDATION_SEED, "val", single=1.0), torch.zeros(3, device=data.ranks.device)
    for part in batched(range(data.args.eval_images // 2), 128, data.ranks):
        scenes = world.scenes(part)
        images = shapes.render(scenes, data.size, data.ranks.device)
        sides = [shapes.read(x, data.source) for x in (images, tokenizer.decode(tokenizer.encode(images)))]
        original, rebuilt = ([shapes.same(a, b) for a, b in zip(scenes, side)] for side in sides)
        counts += torch.tensor([len(scenes), sum(original), sum(a and b for a, b in zip(original, rebuilt))], device=counts.device)
    n, right, both = all_reduce(counts).tolist()
    return right / n, both / max(right, 1)


@torch.no_grad()
def evaluate_tokenizer(tokenizer: DualTokenizer, teacher: nn.Module, data: Data) -> dict:
    """Everything measured on codes and reconstructions, as far as the design has them; fd is the Frechet distance of the teacher's pooled
    features, on `images` samples. Without the text tower's vocabulary, what needs text is left out."""
    was_training, siglip, device, c = tokenizer.training, tokenizer.siglip_model, data.ranks.device, tokenizer.config
    tokenizer.eval()
    paints, streams = tokenizer.design.paints, c.streams
    reads = tokenizer.design.means and not siglip.vocabulary.lacking
    rows, counts = [], {s: torch.zeros(c.depth, c.codebook_size, device=device) for s in streams}
    for images, captions in data.validation():
        codes, look = tokenizer.encode(images), lambda x: teacher(x)[1].float()
        rows.append({"real": look(images), "captions": captions})
        if paints:
            rebuilt = tokenizer.decode(codes)
            rows[-1] |= {"psnr": psnr(rebuilt, images), "ssim": ssim(rebuilt, images), "fake": look(rebuilt)}
        if reads:
            rows[-1] |= {"image": F.normalize(tokenizer.pool_codes(codes).float(), dim=-1),
                         "text": siglip.encode_text(siglip.text_ids(captions).to(device))}
        for s, stream in enumerate(streams):
            counts[stream] += histogram(codes[:, :, s], c.codebook_size)
    rows = data.ranks.gather_rows(*rows)
    metrics = {"retrieval": retrieval(rows["image"], rows["text"], rows["captions"]),
               "teacher_retrieval": retrieval(F.normalize(rows["real"], dim=-1), rows["text"], rows["captions"])} if reads else {}
    metrics |= {"psnr": rows["psnr"].mean().item(), "ssim": rows["ssim"].mean().item(),
                "fd": frechet_distance(rows["fake"], rows["real"])} if paints else {}
    metrics["images"] = len(rows["captions"])
    counts = {s: all_reduce(count) for s, count in counts.items()}
    for what, index in (("usage", 0), ("perplexity", 1)):
        by_depth = {s: usage_and_perplexity(count)[index].tolist() for s, count in counts.items()}
        over_all = {s: usage_and_perplexity(count.sum(0))[index].item() for s, count in counts.items()}
        metrics[what] = over_all if c.shared_codebook else {s: sum(v) / len(v) for s, v in by_depth.items()}
        metrics[f"{what}_by_depth"] = by_depth
    if data.worlds and reads:
        metrics |= zero_shot({"zero_shot": tokenizer.pool, "teacher_zero_shot": lambda x: teacher(x)[1]}, siglip, data)
    if data.worlds and paints:
        metrics["reader_originals"], metrics["reader_accuracy"] = reader_accuracy(tokenizer, data)
    tokenizer.train(was_training)
    return metrics


def read_text(path: str) -> str:
    """A text file. Raises ValueError for none, or other bytes than UTF-8."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); expected a text file in UTF-8") from None


def told(path: str) -> list[str]:
    """Its lines that say something. Raises ValueError where there are none."""
    found = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    check(found, f"{path} is empty, expected something on each line")
    return found


def read_classes(folder: str, names: str, templates: str) -> tuple[list[str], list[int], list[list[str]]]:
    """--zero-shot-data, --class-names, --templates -> paths of pictures, their classes, each class's prompts; or ValueError."""
    check(os.path.isdir(folder), f"--zero-shot-data {folder!r} is no folder; expected one that holds a folder of pictures for each class")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    words = [line.split(",")[0].strip() for line in told(names)] if names else [name.replace("_", " ") for name in classes]
    if len(classes) < 2 or len(words) != len(classes):
        raise ValueError(f"{folder} has {len(classes)} folders, and {f'{names} names' if names else 'there are'} {len(words)} classes; "
                         "expected at least 2 folders, and a line for each, in sorted order")
    prompts = told(templates) if templates else ["a photo of a {}."]
    if wrong := [line for line in prompts if "{}" not in line]:
        raise ValueError(f"{templates}: {brief(wrong[0])} has no {{}}, where the class's name goes; correct that line")
    paths, labels = [], []
    for n, name in enumerate(classes):
        found = sorted(os.path.join(top, file) for top, _, files in os.walk(os.path.join(folder, name)) for file in files
                       if os.path.splitext(file)[1].lower() in SUFFIXES and not file.startswith("."))
        check(found, f"the class folder {os.path.join(folder, name)} has no pictures; fill it, or take the class out")
        paths += found
        labels += [n] * len(found)
    return paths, labels, [[line.replace("{}", word) for line in prompts] for word in words]


def read_captions(path: str, folder: str) -> tuple[list[str], list[str], list[int], list[str]]:
    """--retrieval-data, --retrieval-images -> the pictures' paths, captions, the picture of each, and the names of pictures that are
    missing. Raises ValueError, with the line's number, for another form than Kaggle's Flickr8k (CSV with the header image,caption) or the
    original one (image#number, a tab, caption)."""
    check(os.path.isfile(path), f"--retrieval-data {path!r} is no file; expected captions as Flickr8k has them")
    home = os.path.dirname(path)
    folder = folder or next((f for f in (os.path.join(home, "Images"), os.path.join(home, "images")) if os.path.isdir(f)), home)
    rows, expected = [], "expected the header image,caption and such lines, or lines of image#number, a tab and a caption"
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            tabs = "\t" in file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(file, strict=True)
            if not tabs and [word.strip().lower() for word in next(reader, [])] != ["image", "caption"]:
                raise ValueError(f"{path} has another first line; {expected}")
            for row in filter(None, reader):
                if len(row) != 2 or not row[0].strip() or not row[1].strip() or tabs and "#" not in row[0]:
                    raise ValueError(f"{path}, line {reader.line_num}: got {str(row)[:100]}; {expected}")
                rows.append((row[0].rsplit("#", 1)[0] if tabs else row[0].strip(), row[1].strip()))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read ({error}); {expected}, in UTF-8") from None
    names = list(dict.fromkeys(name for name, _ in rows))
    there = {name: n for n, name in enumerate(name for name in names if os.path.isfile(os.path.join(folder, name)))}
    if len(there) < 2:
        raise ValueError(f"of the {len(names)} images that {path} names, {len(there)} are in {folder or '.'}; "
                         "name their folder with --retrieval-images")
    rows, missing = [row for row in rows if row[0] in there], [name for name in names if name not in there]
    return [os.path.join(folder, name) for name in there], [words for _, words in rows], [there[name] for name, _ in rows], missing


def text_vectors(siglip: SigLIP, groups: list[list[str]], ranks: Ranks, what: str) -> Tensor:
    """G groups of equally many texts -> (G, C) on the CPU: the mean of a group's unit vectors, normalised again. Ranks take turns."""
    rows = []
    for part in batched(range(len(groups)), max(1, 256 // len(groups[0])), ranks, what):
        vectors = siglip.encode_text(siglip.text_ids(sum((groups[n] for n in part), [])).to(ranks.device)).float()
        rows.append({"group": [*part], "vector": F.normalize(vectors.unflatten(0, (len(part), -1)).mean(1), dim=-1)})
    rows = ranks.gather_rows(*rows)
    return rows["vector"][torch.tensor(rows["group"]).argsort()]


def on_pictures(paths: list[str], tokenizer: DualTokenizer, teacher: nn.Module, data: Data, what: str) -> dict:
    """-> "number" (n,) of the pictures that can be read, of all ranks, and their unit vectors (n, C), "codes" through the codes, "teacher"
    the teacher's, on the CPU; "broken": what is wrong with the others, said too. Raises ValueError where nothing is left."""
    ranks, rows = data.ranks, []
    check(len(paths) >= ranks.count, f"{what}: {len(paths)} pictures for {ranks.count} ranks; add pictures, or start fewer")
    mine = torch.arange(ranks.rank, len(paths), ranks.count)
    loader = torch.utils.data.DataLoader(Pictures(paths, data.size), 64, sampler=mine.tolist(), num_workers=data.args.workers,
                                         worker_init_fn=start_worker, generator=torch.Generator())
    for numbers, (images, reports) in zip(mine.split(64), tqdm(loader, what, disable=not ranks.first)):
        good, images = torch.tensor([not report for report in reports]), data._signed(images)
        codes, target = (F.normalize(pool(images).float(), dim=-1).cpu()[good] for pool in (tokenizer.pool, lambda x: teacher(x)[1]))
        rows.append({"number": numbers[good], "codes": codes, "teacher": target, "broken": [*filter(None, reports)]})
    rows = ranks.gather_rows(*rows)
    for report in rows["broken"]:
        ranks.say(f"  left out: {report}")
    if len(rows["broken"]) == len(paths):
        raise ValueError(f"{what}: none of {len(paths)} pictures can be read, the first: {rows['broken'][0]}")
    return rows


@torch.no_grad()
def evaluate_files(tokenizer: DualTokenizer, teacher: nn.Module, data: Data, classes: tuple, captions: tuple) -> dict:
    """zero_shot on what `read_classes` returned, retrieval on what `read_captions` did, each through the codes and by the teacher."""
    was_training, siglip, device, metrics = tokenizer.training, tokenizer.siglip_model, data.ranks.device, {}
    tokenizer.eval()
    if classes:
        paths, labels, prompts = classes
        text, labels = text_vectors(siglip, prompts, data.ranks, "class names"), torch.tensor(labels)
        rows = on_pictures(paths, tokenizer, teacher, data, "zero-shot")
        for name, side in (("zero_shot", "codes"), ("teacher_zero_shot", "teacher")):
            metrics[name] = ((rows[side] @ text.T).argmax(1) == labels[rows["number"]]).double().mean().item()
        metrics |= {"zero_shot_images": len(rows["number"]), "zero_shot_classes": len(prompts), "zero_shot_broken": len(rows["broken"])}
    if captions:
        paths, words, owner, missing = captions
        text = text_vectors(siglip, [[caption] for caption in words], data.ranks, "captions").to(device)
        rows = on_pictures(paths, tokenizer, teacher, data, "retrieval")
        place = {picture: n for n, picture in enumerate(rows["number"].tolist())}
        kept = [k for k, picture in enumerate(owner) if picture in place]      # not the captions of broken pictures
        for name, side in (("retrieval", "codes"), ("teacher_retrieval", "teacher")):
            metrics[name] = retrieval(rows[side].to(device), text[kept], [words[k] for k in kept], [place[owner[k]] for k in kept])
        for name in missing:
            data.ranks.say(f"  left out: {name} is not there")
        metrics |= {"retrieval_images": len(place), "retrieval_captions": len(kept),
                    "retrieval_missing": len(missing), "retrieval_broken": len(rows["broken"])}
    tokenizer.train(was_training)
    return metrics


# ---------------------------------------------------------------------------------------------------------------------
# the two stages

def compile_parts(*modules: nn.Module):
    """torch.compile in place, region by region: transformer layers and the decoder's blocks, not quantizers. Not the whole decoder either,
    all of whose backward pass `adaptive_weight` would then take, and compiled ones cannot be taken twice. Weights keep their names."""
    torch._dynamo.config.optimize_ddp = False       # it would cut layers up where DDP's buckets end
    torch._dynamo.config.recompile_limit = 64       # layers of one class share it: two towers, a teacher, with gradients and without
    for part in nn.ModuleList(modules).modules():
        if type(part).__name__ in ("Layer", "ResBlock", "AttnBlock"):
            part.compile(dynamic=False)     # kernels for maps of any size would not be channels-last
        elif type(part).__name__ in ("LLMLayer", "DepthLayer"):
            part.compile()
        for block in part.model.blocks if isinstance(part, TimmTower) else ():
            block.compile()


def common(args, ranks: Ranks) -> dict:
    """Settings of every stage that a resumed run must share."""
    return {"seed": args.seed, "accumulate": args.accumulate, "clip": args.clip, "precision": precision(args, ranks)}


def digest(model: nn.Module) -> str:
    """SHA-256 of all weights; of a dry run's, which have no values, nothing."""
    sha = hashlib.sha256()
    if any(isinstance(value, FakeTensor) for value in model.parameters()):
        return ""
    for value in model.state_dict().values():
        sha.update(whole(value).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def load_lpips(vgg: str, heads: str) -> LPIPS:
    """vgg: a file of torchvision's VGG16, heads: of lpips' linear layers on it. Raises ValueError if either is not what it should be."""
    model, names = LPIPS(), {f"lin{n}.model.1.weight": str(n) for n in range(len(LPIPS.WIDTHS))}
    features = {name.removeprefix("features."): value.float() for name, value in read_tensors(vgg).items()
                if not name.startswith("classifier.")}
    load_weights(model.features, features, vgg)
    load_weights(model.heads, {names.get(name, name): value.float() for name, value in read_tensors(heads).items()}, heads)
    return model


class SigLIPStage(Stage):
    """Sigmoid contrastive training on pairs of image and caption, from scratch."""
    name = "siglip"

    def __init__(self, args, ranks: Ranks, settings: Settings, config, data: Data, folder: str = ""):
        super().__init__(args, ranks)
        self.folder, self.data = folder or os.path.join(args.out, "siglip"), data
        self.steps, self.batch, self.lr, self.warmup = settings.siglip_steps, settings.siglip_batch, settings.siglip_lr, settings.warmup
        torch.manual_seed(args.seed)
        self.model = SigLIP(config.vision, config.text).to(ranks.device)
        nn.init.constant_(self.model.logit_bias, -math.log(self.batch))     # the share of pairs that match; SigLIP's -10 is for 32,768
        self.model.vision_model.checkpointing = args.checkpointing
        if args.compile:
            compile_parts(self.model)
        self.optimise((0.9, 0.95), settings.weight_decay)
        self.settings = {"stage": self.name, "preset": args.preset, "data": data.drawn, "val_data": args.val_data, "steps": self.steps,
                         "batch": self.batch, "lr": self.lr, "vision": asdict(config.vision),
                         "text": asdict(config.text), **common(args, ranks)}

    def loss(self, images, captions, *, step):
        ids = self.model.text_ids(captions).to(images.device, non_blocking=True)
        return sigmoid_contrastive(*self.wrapped(images, ids)), {"scale": self.model.logit_scale[0].exp(), "bias": self.model.logit_bias[0]}

    @torch.no_grad()
    def evaluate(self):
        siglip, data = self.model, self.data
        siglip.eval()
        read = lambda captions: siglip.encode_text(siglip.text_ids(captions).to(data.ranks.device))
        rows = data.ranks.gather_rows(*({"image": siglip.encode_image(images), "text": read(captions), "captions": captions}
                                        for images, captions in data.validation()))
        metrics = {f"retrieval_{k}": v for k, v in retrieval(**rows).items()}
        metrics |= zero_shot({"zero_shot": lambda x: siglip.vision_model(x)[1]}, siglip, data) if data.worlds else {}
        siglip.train()
        return metrics

    def save(self, weights):
        self.model.save_pretrained(self.folder)


class TokenizerStage(Stage):
    """Codebooks, projections, decoder and ViT, against a frozen copy of the ViT (paper §3.2). The text tower stays as it is."""
    name = "tokenizer"

    def __init__(self, args, ranks: Ranks, settings: Settings, config, data: Data, siglip: SigLIP, init: DualTokenizer | None = None,
                 files: tuple = ((), ())):
        """siglip: the teacher, and where the tokenizer starts too, unless it does from `init`. files: for `evaluate_files`, at the end."""
        super().__init__(args, ranks)
        self.folder, self.data, self.weights, self.files = args.out, data, settings.weights, files
        self.steps, self.batch, self.lr, self.warmup = settings.steps, settings.batch, settings.lr, settings.warmup
        torch.manual_seed(args.seed)
        self.model = (init or DualTokenizer(config, siglip)).to(ranks.device).train()
        own = None if init else self.model.teacher      # sde has one already
        self.teacher = (own or copy.deepcopy(siglip.vision_model)).eval().requires_grad_(False).to(ranks.device)
        self.design, self.streams = config.design, config.streams
        self.model.shared_gradient = settings.shared_gradient if config.design == "dual" else 1.0
        self.model.set_trainable()
        self.model.checkpointing(args.checkpointing)
        for quantizer in self.model.quantizers.values():
            quantizer.fused = args.fast_vq
        gan = settings.gan and self.model.design.paints
        self.perceptual = None
        if args.vgg and self.model.design.paints:       # channels last, as a GPU's convolutions in bf16 want it
            self.perceptual = load_lpips(args.vgg, args.lpips).to(ranks.device, memory_format=torch.channels_last)
        if args.compile:
            compile_parts(self.model, self.teacher)
        matrices = [p for name, p in self.model.named_parameters()
                    if settings.muon and p.requires_grad and p.dim() in (2, 4) and MATRICES.search(name)]
        self.optimise(settings.betas, settings.weight_decay, matrices)
        self.gan_from = round(settings.gan_start * self.steps) if gan else self.steps + 1
        if gan:
            self.discriminator = Discriminator(settings.gan_width, settings.gan_layers).to(ranks.device)
            self.gan_lr = settings.gan_lr
            self.gan_optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=self.gan_lr, betas=(0.5, 0.9), fused=True)
        self.codes, self.pictures, self.counted = None, None, {"gan_skipped": torch.zeros((), device=ranks.device)}
        digests = {name: "" if args.bench else digest(x)
                   for name, x in (("teacher", self.teacher), ("init", init), ("perceptual", self.perceptual)) if x}
        self.settings = {"stage": self.name, "preset": args.preset, "data": data.drawn, "val_data": args.val_data, "steps": self.steps,
                         "batch": self.batch, "lr": self.lr, "muon": settings.muon, "weights": asdict(settings.weights),
                         "shared_gradient": self.model.shared_gradient, "gan": gan, "gan_start": settings.gan_start,
                         "config": json.loads(json.dumps(asdict(config))), **digests, **common(args, ranks)}

    def loss(self, images, captions, *, step):
        features = self.wrapped(images)
        with torch.no_grad():
            target = self.teacher(images, self.model.config.deep_layer) if self.model.design.means else (None, None)
        terms = tokenizer_losses(features, images, target, self.model.design.losses, self.perceptual)
        total, more = weighted(terms, self.weights), {}
        self.codes = features.codes
        self.judges = step >= self.gan_from
        if self.judges:
            frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}  # its gradient is for the second pass alone
            adversarial = -torch.func.functional_call(self.discriminator, frozen, (features.images,)).float().mean()
            weight = adaptive_weight(terms["pixel"] + terms.get("perceptual", 0), adversarial, self.model.decoder.conv_out.weight)
            total = total + self.weights.adversarial * weight * adversarial
            judged = discriminator_loss(self.discriminator(images), self.discriminator(features.images.detach()))
            (judged / self.args.accumulate).backward()
            more = {"adversarial": adversarial, "adaptive": weight, "discriminator": judged}
        return total, {**terms, **{f"commitment_{name}": value for name, value in features.commitment.items()}, **more}

    def after_step(self, bad):
        for quantizer in self.model.quantizers.values():
            quantizer.update(skip=bad)
        if self.judges:
            for p in self.discriminator.parameters():
                all_reduce(p.grad).div_(self.ranks.count)
            norm = nn.utils.clip_grad_norm_(self.discriminator.parameters(), self.args.clip)
            step_or_skip(self.gan_optimizer, self.gan_lr, bad | ~norm.isfinite())
            self.counted["gan_skipped"] += ~norm.isfinite()

    def extra_state(self):
        gan = {"discriminator": self.discriminator, "gan_optimizer": self.gan_optimizer} if self.gan_from <= self.steps else {}
        return super().extra_state() | gan

    def log(self):
        c = self.model.config
        counts = (all_reduce(histogram(codes, c.codebook_size)) for codes in self.codes.unbind(2))
        line = {f"usage_{stream}": usage_and_perplexity(count.sum(0) if c.shared_codebook else count)[0].mean().item()
                for stream, count in zip(self.streams, counts)}
        if skipped := self.counted["gan_skipped"].item():
            line["discriminator_skipped"] = skipped
            self.counted["gan_skipped"].zero_()
        return line

    def evaluate(self):
        return evaluate_tokenizer(self.model, self.teacher, self.data)

    def about(self):
        return evaluate_files(self.model, self.teacher, self.data, *self.files)

    def save(self, weights):
        teacher = self.args.siglip or self.args.backbone
        self.model.save_pretrained(self.folder, data=self.data.source, val_data=self.args.val_data, teacher=teacher)
        if not self.model.design.paints:
            return
        if self.pictures is None:
            self.pictures = torch.cat([images for images, _ in itertools.islice(self.data.validation(8), 2)])
        images = self.pictures
        self.model.eval()
        with torch.no_grad():
            rebuilt = self.model.decode(self.model.encode(images))
        self.model.train()
        save_grid([images[:8], rebuilt[:8], images[8:], rebuilt[8:]] if len(images) == 16 else [images, rebuilt],
                  os.path.join(self.folder, "samples", "reconstructions.png"))


# ---------------------------------------------------------------------------------------------------------------------
# runs: what they leave behind, tables, main

FACTS = ("preset", "design", "streams", "steps", "seed", "data", "device", "ranks", "seconds", "peak_memory_gib", "images_per_second",
         "torch", "commit", "settings")


def machine(ranks: Ranks) -> dict:
    """What a number was computed on, and by which code."""
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    git = subprocess.run("git rev-parse --short HEAD", shell=True, cwd=os.path.dirname(os.path.abspath(__file__)), capture_output=True)
    return {"device": name, "ranks": ranks.count, "torch": torch.__version__, "commit": git.stdout.decode().strip() or "unknown"}


def tell(path: str, metrics: dict, **more):
    """A file of metrics and more, and a table of the metrics on the screen."""
    write_json(path, {**metrics, **more})
    print(f"\n{path}")
    report(metrics)


def report(metrics: dict):
    """A table on the screen: a line for each number, or for each row of numbers."""
    for name, value in metrics.items():
        rows = value if isinstance(value, dict) and any(isinstance(v, dict) for v in value.values()) else {"": value}
        for row, v in rows.items():
            if isinstance(v, dict):
                v = "  ".join(f"{k} {show(x)}" for k, x in v.items() if isinstance(x, (int, float)))
            if v != "":     # what is told per depth has its place in the file
                print(f"  {f'{name} {row}':28} {show(v)}")


def train_table(args):
    """The tokenizers of --table. Its rows have their designs and layers from it, and the other sizes that flags give all of them."""
    taken = [name for name in ("design", "quantizer", "layers", "shallow_layer", "init", "eval") if getattr(args, name)]
    if args.table == "trade":
        taken += [name for name, default in (("semantic_weight", 1), ("shared_gradient", -1)) if getattr(args, name) != default]
    check(not taken, f"the rows of a table have --{', --'.join(taken).replace('_', '-')} of their own, or the preset's; leave that out")
    if args.backbone and args.table in ("7", "9"):
        raise ValueError(f"--table {args.table} counts the layers of a SigLIP; give it with --siglip in place of --backbone, or train one")
    args.out = "out/tables" if args.out == "out/tokenizer" else args.out
    layers = (read_towers(hub.folder(args.siglip))[0].num_hidden_layers,) if args.siglip else ()
    make_table(args, tables(args.preset, layers), lambda seed, system: train_row(args, seed, system.name, system.changes))


def idle_flags(name: str) -> dict:
    """The flags that say nothing to a design, with their defaults."""
    design, files = DESIGNS[name], ("zero_shot_data", "class_names", "templates", "retrieval_data", "retrieval_images")
    return {**({} if "shallow" in design.features else {"shallow_layer": 0}), **({} if name == "dual" else {"shared_gradient": -1.0}),
            **({} if design.means else {"semantic_weight": 1.0, **dict.fromkeys(files, "")}),
            **({} if design.paints else {"gan": None, "gan_start": -1.0, "vgg": "", "lpips": ""})}


def check_idle(args, design: str):
    """Raises ValueError for flags that say nothing to a design."""
    idle = ", --".join(name for name, default in idle_flags(design).items() if getattr(args, name) != default).replace("_", "-")
    check(not idle, f"the design {design} has nothing that --{idle} could change; leave that out")


def train_row(args, seed: int, name: str, changes: dict) -> dict:
    """A tokenizer of a table, unless it is there, in a folder of --out that other tables look into too; rows of one seed share its SigLIP.
    Flags that say nothing to its design are left out. -> its metrics."""
    home = os.path.join(args.out, f"seed-{seed}")
    row = argparse.Namespace(**{**vars(args), "seed": seed, "out": os.path.join(home, name), "resume": True, "table": "",
                                **idle_flags(changes["design"]), **changes})
    main(args=row, siglip_folder=os.path.join(home, f"siglip-{row.layers}" if row.layers else "siglip"))
    return metrics_of(row.out)


def main(argv=None, args=None, siglip_folder: str = ""):
    """A run, or those of a table. args: in place of argv; siglip_folder: where a SigLIP trained first goes, by default into --out."""
    args = args or flags(argv)
    if args.table:
        return train_table(args)

    # ---- settings: the preset's, and what was given by hand
    s = SETTINGS[args.preset]
    weights = {name: args.semantic_weight * getattr(s.weights, name) for name in ("deep", "pooled", "cosine")}
    by_hand = {name: getattr(args, name) for name in ("data", "steps", "lr", "siglip_steps") if getattr(args, name)}
    by_hand |= {name: getattr(args, name) for name in ("gan", "muon", "gan_start", "shared_gradient")
                if getattr(args, name) not in (None, -1)}       # which say that nothing was given
    s = replace(s, batch=args.batch_size or s.batch, siglip_batch=args.batch_size or s.siglip_batch,
                weights=replace(s.weights, **weights), **by_hand)
    check(s.gan or args.gan_start == -1, "--gan-start would do nothing, for the adversarial term is off; leave it out, or add --gan")
    changes = {name: getattr(args, name) for name in ("design", "quantizer", "codebook_size", "depth", "code_dim", "shallow_layer",
                                                      "deep_layer", "shortcut_layer") if getattr(args, name)}
    changes |= {"shallow_layer": 0} if args.shallow_layer in ("quarter", "split") else {}
    if args.layers and (args.siglip or args.backbone or args.init or args.eval):
        raise ValueError(f"--layers {args.layers} is of a ViT that is trained here, and there is one already; leave it out")
    if args.dry_run:
        if args.init or args.backbone or args.shallow_layer == "split":
            raise ValueError("--dry-run is of a preset's sizes; --init, --backbone and --shallow-layer split bring others; leave them out")
        config = preset_config(args.preset, args.image_size, args.layers, **changes)
        check_idle(args, config.design)
        config.text.vocab_size = config.text.vocab_size if args.siglip else BYTES
        with fake():
            return estimate(args, s, config)
    ranks = Ranks(args.device)
    if args.fast_vq and ranks.device.type != "cuda":
        raise ValueError(f"--fast-vq is a kernel for CUDA, and the device is {ranks.device.type}; leave it out")
    torch.backends.cudnn.benchmark = ranks.device.type == "cuda"       # one image size per run
    if args.bench in ("quantizer", "growth"):
        return bench_quantizer(args, ranks) if args.bench == "quantizer" else bench_stage_growth(args, s, ranks, changes)
    args.init = args.init or (args.out if args.eval else "")
    init = load_init(args, changes) if args.init else None
    side = init.config.vision.image_size if init else args.image_size
    given = args.siglip and hub.folder(args.siglip)     # config.json keeps the name, which other machines know too
    siglip = (SigLIP.from_pretrained(given, side) if given else
              SigLIP.from_timm(args.backbone[5:], side, not args.bench) if args.backbone else None)
    if siglip:
        changes |= {"vision": asdict(siglip.vision_config), "text": asdict(siglip.text_config)}
    if init and siglip.vision_config != init.config.vision:
        raise ValueError(f"the SigLIP's sizes are {siglip.vision_config}, the tokenizer's {init.config.vision}; give its own with --siglip")
    config = init.config if init else preset_config(args.preset, args.image_size, args.layers, **changes)
    check_idle(args, config.design)
    if args.fast_vq and config.code_dim > 128:
        raise ValueError(f"--fast-vq is a kernel for up to 128 numbers a code, and --code-dim is {config.code_dim}; leave one of them out")
    if not siglip:
        config.text.vocab_size = BYTES      # a SigLIP of its own reads bytes, whatever the preset's pretrained one reads
    if args.eval:
        trained = {} if args.data else read_config(args.init)
        s, args.val_data = replace(s, data=trained.get("data") or s.data), args.val_data or trained.get("val_data", "")
    files = (read_classes(args.zero_shot_data, args.class_names, args.templates) if args.zero_shot_data else (),
             read_captions(args.retrieval_data, args.retrieval_images) if args.retrieval_data else ())

    # ---- data
    side = config.vision.image_size
    runs = {} if args.eval else {**({} if siglip else {"siglip": s.siglip_steps * s.siglip_batch}), "tokenizer": s.steps * s.batch}
    data = Data(s.data, args.val_data, side, args, ranks, runs)
    for batch in () if args.eval else (s.siglip_batch, s.batch):
        data.batches(batch)                 # raises before anything is written
    ranks.say(f"{args.init if args.eval else args.preset} on {ranks.device.type} x {ranks.count}, "
              f"{'fp32' if args.eval else precision(args, ranks) + ' (quantizers fp32)'}, data {s.data} at {side} px, out {args.out}")
    if given and (trained_for := read_towers(given)[0].image_size) != side:
        ranks.say(f"the SigLIP in {args.siglip} is for {trained_for} pixels: its position embeddings are interpolated for {side}")
    if siglip:
        reader = init.siglip_model if init else siglip
        if reader.vocabulary.lacking and not any(files):
            ranks.say(f"zero-shot and retrieval are not measured: {reader.vocabulary.lacking}")
        else:
            reader.text_ids([""])           # raises now, not after training, for a vocabulary that is damaged or another tower's

    # ---- evaluation alone: metrics.json keeps what it says of training; all numbers of evaluation are replaced
    if args.eval:
        begun, path = time.time(), os.path.join(args.out, "metrics.json")
        facts = {"preset": config.preset, "design": config.design, "streams": list(config.streams)}
        if os.path.exists(path):
            facts = {name: value for name, value in read_config(args.out, "metrics.json").items() if name in FACTS}
        tokenizer, teacher = init.to(ranks.device), siglip.vision_model.eval().requires_grad_(False).to(ranks.device)
        for quantizer in tokenizer.quantizers.values():
            quantizer.fused = args.fast_vq
        metrics = {**evaluate_tokenizer(tokenizer, teacher, data), **evaluate_files(tokenizer, teacher, data, *files)}
        about = {"tokenizer": args.init, "data": data.source, "val_data": args.val_data, "seconds": round(time.time() - begun, 1)}
        if ranks.first:
            os.makedirs(args.out, exist_ok=True)
            tell(path, metrics, **facts, evaluated={**about, **machine(ranks)})
        return

    # ---- stage 1: a SigLIP, given, kept from an earlier run, or trained now
    if not siglip:
        check(data.captioned, f"the images in {s.data!r} have no captions to train a SigLIP on; add .txt files, or give --siglip FOLDER")
        stage = SigLIPStage(args, ranks, s, config, data, siglip_folder)
        if args.bench:
            bench(stage, data.batches(stage.batch))
        elif kept(stage):
            ranks.say(f"siglip: {stage.folder} is kept from an earlier run with these settings; delete it to train it again")
        else:
            train(stage, data.batches(stage.batch))
        siglip = stage.model if args.bench else SigLIP.from_pretrained(stage.folder)
        config = replace(config, vision=siglip.vision_config, text=siglip.text_config)      # as if it had been given
        args.siglip = siglip_folder and os.path.relpath(siglip_folder, args.out)  # for the record, where it is not beside the tokenizer

    # ---- stage 2: the tokenizer
    if args.shallow_layer == "split":
        alike = layer_similarity(siglip.vision_model.to(ranks.device), next(iter(data.validation(max(1, 256 // ranks.count))))[0])
        config = replace(config, shallow_layer=split_layers(all_reduce(alike) / ranks.count)[0])
        ranks.say(f"the pixel stream leaves after the last shallow layer, {config.shallow_layer} of {config.vision.num_hidden_layers}")
    if not args.vgg:
        ranks.say("the perceptual term is off: it needs --vgg and --lpips")
    stage = TokenizerStage(args, ranks, s, config, data, siglip, init, files)
    if args.bench:
        bench(stage, data.batches(stage.batch, captions=False))
        without = ""
        for term, name, off in (("adversarial term", "gan_from", stage.steps + 1), ("LPIPS", "perceptual", None)):
            if getattr(stage, name) != off:
                setattr(stage, name, off)
                without += f", without {term}"
                bench(stage, data.batches(stage.batch, captions=False), without)
    elif args.resume and kept(stage) and not any(files):
        ranks.say(f"tokenizer: {stage.folder} is kept, since it is finished")
    else:
        train(stage, data.batches(stage.batch, captions=False))
        paths = ["curves.png", *([os.path.join("samples", "reconstructions.png")] if stage.model.design.paints else [])]
        ranks.say("pictures: " + ", ".join(path for path in (os.path.join(stage.folder, path) for path in paths) if os.path.exists(path)))


def tables(preset: str, layers: tuple = ()) -> dict[str, Table]:
    """The paper's tables about tokenizers. 7 and 9 have ViTs of `layers`, or, trained here, of the preset's number and twice as many."""
    every = dict(zero_shot="zero-shot accuracy", fd="Frechet distance", psnr="PSNR, dB", ssim="SSIM")
    some, lower = {name: every[name] for name in ("zero_shot", "fd", "psnr")}, ("fd",)
    own, usual = PRESETS[preset]["vision"]["num_hidden_layers"], preset_config(preset).shallow_layer
    quarters = {n: [math.ceil(n * part / 4) for part in (1, 2, 3)] for n in layers or (own, 2 * own)}

    def row(label, name, *paper, design="", rename={}, **changes):
        numbers = {metric: number for metric, number in zip(every, paper) if number is not None}
        return System(label, name, {"design": design or name, **changes}, numbers, rename)

    def at(n: int, shallow: int, *paper):
        name = "dual" if (n, shallow) == (own, usual) else f"dual-{shallow}-of-{n}"
        return row(f"layer {shallow} of {n}", name, *paper, design="dual", shallow_layer=shallow, layers=0 if layers or n == own else n)

    def trade(weight, share):
        name = "dual" if (weight, share) == (1, SETTINGS[preset].shared_gradient) else f"dual-weight-{weight:g}-shared-{share:g}"
        return row(f"dual, semantic weight x {weight:g}, shared gradient x {share:g}", name, design="dual", semantic_weight=weight,
                   shared_gradient=share)

    seven = ((78.8, 0.78), (76.3, 1.27), (72.9, 2.61)), ((81.0, 0.73), (79.5, 1.28), (74.3, 2.78))
    shallow = row("(c) reconstruction, shallow layer", "recon-shallow", None, 0.29, 28.12, 0.745)
    return {
        "3": Table("Table 3: reconstruction and semantics in one codebook, or in two", every, lower, [
            row("initial state, continuous", "quantised", 83.2, rename={"zero_shot": "teacher_zero_shot"}),
            row("initial state, quantised", "quantised", 82.4),
            row("(a) both losses, deep layer", "naive", 72.3, 3.86, 12.64, 0.574),
            row("(b) reconstruction, deep layer", "recon-deep", None, 0.27, 27.88, 0.722),
            shallow, row("(d) dual", "dual", 82.0, 0.25, 28.69, 0.744)], "So400m/14-384"),
        "7": Table("Tables 7 and 8: the layer that pixels leave after", some, lower,
                   [at(n, layer, *paper) for n, papers in zip(quarters, seven) for layer, paper in zip(quarters[n], papers)],
                   "SigLIP-L/16-256 at 6, 12, 18 of 24, and DFN-H/14-224 at 8, 16, 24 of 32"),
        "9": Table("Table 9: layers near the first quarter", some, lower,
                   [at(n, layer) for n in quarters for layer in range(quarters[n][0] - 2, quarters[n][0] + 3) if layer > 0],
                   "78.9 to 79.2 and 0.82 to 0.84 at 5 to 7 of 24 for DFN-L/14-224, "
                   "81.0 to 81.3 and 0.66 to 0.72 at 5 to 9 of 27 for SigLIP2-SO/16-256"),
        "10": Table("Table 10: residual and multi-codebook quantisation; (b) and (c) have as many bits, (a) half of them", every, lower, [
            row("(a) one codebook, MCQ", "naive-mcq", 78.6, 0.38, design="naive", quantizer="mcq"),
            row("(b) dual, RVQ", "dual", 80.3, 0.39, quantizer=""),
            row("(c) dual, MCQ", "dual-mcq", 82.2, 0.25, design="dual", quantizer="mcq")], "ViTamin-L/16; (a) is UniTok itself"),
        "trade": Table("What semantics cost reconstruction", every, lower,
                       [shallow, *(trade(*pair) for pair in ((1, 1), (0.2, 1), (1, 0.3), (1, 0.1), (1, 0)))],
                       "So400m/14-384, where dual has 28.69 dB", curve=("psnr", "zero_shot")),
    }


def tokenizer_parts(model: DualTokenizer) -> list[tuple[str, int]]:
    """(part, parameters) of a tokenizer; code tables are no parameters, and come last."""
    count = lambda *modules: sum(p.numel() for module in modules for p in module.parameters())
    siglip, projections = model.siglip_model, [x for name, x in model.named_children() if name.split("_")[0] in ("prequant", "postquant")]
    other = {"convolutional encoder": model.encoder, "semantic decoder": model.semantic_decoder, "ViT once more, frozen": model.teacher}
    return [("ViT" + ", frozen" * (not model.design.vit), count(siglip.vision_model)), ("text tower, frozen", count(siglip.text_model)),
            ("scale and bias, frozen", 2), ("projections", count(*projections)),
            ("decoder", count(*filter(None, (model.post_quant_conv, model.decoder)))),
            *((name, count(part)) for name, part in other.items() if part),
            ("code tables, not by gradient", sum(x.codebook.numel() for x in model.quantizers.values()))]


def estimate(args, s: Settings, config):
    """What the stages of a preset cost; with --siglip the tokenizer's alone, with --vgg LPIPS too, neither of which is read.
    --fast-vq changes none of it."""
    vgg, args.vgg, args.fast_vq = args.vgg, "", False
    ranks, count, side = Ranks("cpu"), args.ranks or (8 if args.preset in PAPER else 1), config.vision.image_size
    data = argparse.Namespace(drawn=s.data)

    def parts(batch):
        check_batch(batch, argparse.Namespace(count=count), args.accumulate)
        size = batch // count // args.accumulate
        return [(torch.empty(size, 3, side, side), [""] * size) for _ in range(args.accumulate)]

    def tokenizer_stage():
        stage = TokenizerStage(args, ranks, s, config, data, SigLIP(config.vision, config.text))
        stage.perceptual = LPIPS() if vgg else None
        return stage, parts(s.batch)

    stage = tokenizer_stage()[0]
    more = {"teacher, frozen": stage.teacher, "discriminator": getattr(stage, "discriminator", None)}
    print(f"dry run of {args.preset}: {side} px, {config.positions} positions, D {config.depth}, K {config.codebook_size}, E "
          f"{config.code_dim}, {'with' if vgg else 'without'} LPIPS")
    print_parts(tokenizer_parts(stage.model) + [(name, sum(p.numel() for p in part.parameters())) for name, part in more.items() if part])
    first = [] if args.siglip else [lambda: (SigLIPStage(args, ranks, s, config, data), parts(s.siglip_batch))]
    dry_run(args, [*first, tokenizer_stage], count, "image")


def bench_stage_growth(args, s: Settings, ranks: Ranks, changes: dict):
    """--bench growth: the tokenizer stage of a preset at other sizes, on random images."""
    usual = preset_config(args.preset, args.image_size, args.layers, **changes)

    def make(what, size):
        sizes = {"image_size": args.image_size, "layers": args.layers, **changes, what.replace(" ", "_"): size}
        config = preset_config(args.preset, **sizes)
        stage = TokenizerStage(args, ranks, s, config, argparse.Namespace(drawn="random"), SigLIP(config.vision, config.text))
        side, share = config.vision.image_size, s.batch // (args.accumulate * ranks.count)
        return stage, [(torch.randn(share, 3, side, side, device=ranks.device).clamp(-1, 1), [""] * share) for _ in range(args.accumulate)]
    bench_growth(args, ranks, "tokenizer", {"image size": [usual.vision.image_size * n // 2 for n in (2, 3, 4)],
                                            "codebook size": [usual.codebook_size * n for n in (1, 4, 16)],
                                            "depth": [usual.depth * n for n in (1, 2, 4)]}, make)


def teacher_of(folder: str) -> str:
    """Where the SigLIP is that a tokenizer of ours was trained from: a folder, a name on the hub, timm:NAME, or "" if it does not say."""
    told = read_config(folder).get("teacher", "")
    if not isinstance(told, str):
        raise ValueError(f"{folder}/config.json has the teacher {brief(told)}, expected a folder or a name; correct that, or take it out")
    beside = os.path.join(folder, told or "siglip")
    return beside if os.path.isdir(beside) else told


def load_teacher(folder: str, image_size: int, name: str = "") -> nn.Module:
    """The ViT of `name`, by default of what the tokenizer in a folder was trained from, frozen. Raises ValueError where it is not there."""
    name = name or teacher_of(folder) or os.path.join(folder, "siglip")
    siglip = SigLIP.from_timm(name[5:], image_size) if name.startswith("timm:") else SigLIP.from_pretrained(hub.folder(name), image_size)
    return siglip.vision_model.eval().requires_grad_(False)


def load_init(args, changes: dict) -> DualTokenizer:
    """The tokenizer of --init. Its teacher is --siglip or --backbone, by default the SigLIP that a tokenizer of ours was trained from."""
    if changes or args.image_size:
        raise ValueError(f"--image-size, the design, its sizes and layers are those of --init {args.init}; leave these flags out")
    elsewhere = os.path.realpath(args.init) != os.path.realpath(args.out)
    check(elsewhere or args.eval or args.bench, f"--init {args.init} is --out too, and training would overwrite it; name another --out")
    if args.eval and elsewhere and os.path.exists(os.path.join(args.out, "model.safetensors")):
        raise ValueError(f"--out {args.out} holds another tokenizer than --init {args.init}, and its metrics.json; name another --out")
    ours = read_config(args.init).get("model_type") == "dualtoken"
    teacher = args.siglip or args.backbone or (teacher_of(args.init) if ours else "")
    check(teacher, f"{args.init} holds a tokenizer without the SigLIP that it is compared with; give it with --siglip")
    args.backbone, args.siglip = (teacher, "") if teacher.startswith("timm:") else ("", teacher)
    return DualTokenizer.from_pretrained(args.init) if ours else DualTokenizer.from_released(args.init, hub.folder(args.siglip))


def kept(stage: Stage) -> bool:
    """Whether a finished stage with the same settings lies in its folder. Called on all ranks, before anyone writes."""
    path, weights = (os.path.join(stage.folder, name) for name in ("metrics.json", "model.safetensors"))
    metrics = read_json(path) if os.path.exists(path) and os.path.exists(weights) else None
    return isinstance(metrics, dict) and metrics.get("settings") == stage.settings


def train(stage: Stage, batches):
    """Fit a stage, from the beginning or from its checkpoint, on batches as in `fit`; metrics.json then says FACTS and the evaluation."""
    args, ranks, begun = stage.args, stage.ranks, ()
    begin_peak(ranks.device)
    lock(stage.folder, ranks)
    saved = checkpoints(stage.folder)
    old = saved + [path for name in ("metrics.json", "log.jsonl") if os.path.exists(path := os.path.join(stage.folder, name))]
    if args.resume and saved:
        begun = load_state(stage)
    elif old:
        ranks.say(f"{stage.name}: starting anew; the earlier run in {stage.folder} is overwritten")
        for path in old if ranks.first else ():
            os.remove(path)
    elif args.resume:
        ranks.say(f"{stage.name}: nothing to resume in {stage.folder}; starting at step 0")
    fit(stage, batches, *begun)
    about = {"preset": args.preset, "design": stage.design, "streams": list(stage.streams), "steps": stage.steps, "seed": args.seed,
             "data": stage.data.source, "seconds": round(stage.seconds, 1), "peak_memory_gib": round(peak_memory_gib(ranks.device), 2),
             f"{stage.unit}_per_second": round(stage.per_second, 1), **machine(ranks), **stage.about()}
    if ranks.first:
        draw_curves(read_log(stage.folder), os.path.join(stage.folder, "curves.png"))       # with the last evaluation
        tell(os.path.join(stage.folder, "metrics.json"), {**stage.metrics, **about}, settings=stage.settings)


def leave_alone(error: BaseException | None):
    """Ends a process that failed among others on NCCL, saying why: these may wait for it, and torchrun stops them once it is gone."""
    if error is not None and dist.get_backend() == "nccl" and dist.get_world_size() > 1:
        code = getattr(error, "code", None)     # of SystemExit: a number, or words
        if not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
        elif isinstance(code, str):
            print(code, file=sys.stderr)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def run(main, trains: bool = True):
    """A script's entry: what a user can put right ends in one sentence and exit status 1; a traceback too under `python -X dev`."""
    then = "--resume goes on from the last checkpoint" if trains else "start it again"
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")       # a broken file's name may be more than this terminal can write
        main()
        if dist.is_initialized():
            dist.barrier()      # a rank that leaves while others work may be taken for one that died
    except (ValueError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        if sys.flags.dev_mode:
            traceback.print_exc()
        words = (f"{error.strerror}: {error.filename or 'a file of this run'}; make room or name another --out, then {then}"
                 if full else (str(error).strip() or repr(error)).splitlines()[-1])
        sys.exit(f"error: {words}")       # of an error in a worker, torch gives the traceback too
    except torch.OutOfMemoryError:
        sys.exit(f"error: out of memory; try {'--checkpointing, --accumulate 2, or ' * trains}a smaller --batch-size")
    except KeyboardInterrupt:
        print(f"interrupted; {then}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        if dist.is_initialized():
            leave_alone(sys.exc_info()[1])
            gc.collect()  # what shards a model holds the process group in cycles, and its threads must end before the interpreter does
            dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
