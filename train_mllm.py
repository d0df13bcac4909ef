"""Train the multimodal LLM on the tokenizer's codes, in the paper's four stages (§4.2, Tables 13 and 14).

    python train_mllm.py                                              # a CPU, minutes, after `python train_tokenizer.py` -> out/mllm
    python train_mllm.py --preset small --tokenizer out/small --out out/mllm-small   # one GPU
    torchrun --nproc_per_node=8 train_mllm.py --preset qwen2.5-3b --llm Qwen/Qwen2.5-3B --tokenizer FOLDER --fsdp --accumulate 8 \\
        --compile --checkpointing --data "cc12m/{00000..01242}.tar" --text-data text.txt --conversations llava_v1_5_mix665k.json \\
        --documents interleaved.jsonl,edits.jsonl --image-folder images           # the form of records: data/records.py
    python train_mllm.py --stage 3                                    # one stage, from the one before it in --out
    python train_mllm.py --table 4                                    # all rows of the paper's Table 4, and the table -> out/tables
    python train_mllm.py --resume                                     # go on: finished stages are kept, the one under way continues
    python train_mllm.py --bench                                      # seconds per step of every stage; writes nothing
    python train_mllm.py --preset qwen2.5-3b --parameters --code-dim 1024   # the table of the paper's App. D.1; needs no weights
    python train_mllm.py --preset qwen2.5-3b --dry-run --ranks 64     # FLOPs, memory and time of every stage; needs no weights

A stage is a row of a table: what trains, at which learning rate, on which mixture. Stage 0 stands in for Qwen2.5's pretraining where the
LLM starts from scratch. Every stage writes a folder of its own, --out/stage-0 and so on, the last one --out itself: model.safetensors,
config.json, state.pt (to resume), log.jsonl, metrics.json, curves.png, samples/*.png. Read downward: settings, flags, data, evaluation,
stages, main; the plumbing is train_tokenizer.py's.
"""

import argparse
import collections
import copy
import hashlib
import itertools
import json
import math
import os
import random
import re
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import train_tokenizer
from data import hub, shapes
from data.images import ImageData, Pictures, start_worker
from data.records import Image, Records, conversation, document as read_document, learned
from losses import frechet_distance
from mllm import HEADS, LLM, LLMS, Cache, DualMLLM, LLMConfig, MLLMConfig, Picture, TextTokenizer, Words, code_tables, document, pack, turn
from rvq import all_reduce
from tokenizer import PRESETS, DualTokenizer, check, preset_config, read_config, read_json, write_json
from train_tokenizer import (VALIDATION_SEED, Parser, Ranks, Stage, System, Table, batched, bench, bench_growth, check_batch,
                             check_shared, checkpoints, common, compile_parts, differences, digest, dry_run, fake, flop_counter, kept,
                             load_part, load_teacher, lock, make_table, metrics_of, precision, print_parts, read_text, run, save_grid,
                             seconds_of, shared_flags, teacher_of, train, whole)

# ---------------------------------------------------------------------------------------------------------------------
# settings: the stages, by preset

@dataclass(frozen=True)
class Row:
    """One stage: which parts train (`DualMLLM.parts`), how, and on what: shares of kinds of sequences, less those that the data lacks."""
    name: str
    trains: tuple
    lr: float
    batch: int          # sequences a step, over all ranks
    steps: int
    mixture: dict
    warmup: int = 30    # steps of linear rise


_ALL = ("llm", "projector", "heads")
_UNDERSTAND = dict(caption=0.2, question=0.6, text=0.2)
_EVERYTHING = dict(caption=0.03, question=0.17, paint=0.72, edit=0.05, text=0.03, document=0.03)  # documents: where --documents are given
# What trains, learning rates and batches are the paper's; steps, warm-up and shares are not in it.
PAPER = (
    Row("1", ("projector",), 1e-3, 64, 10_000, dict(caption=1.0), 500),
    Row("2", ("projector", "llm"), 2e-5, 256, 10_000, _UNDERSTAND, 500),
    Row("3", ("heads",), 1e-4, 128, 20_000, dict(paint=1.0), 500),
    Row("4-1", _ALL, 1e-5, 512, 20_000, _EVERYTHING, 500),
    Row("4-2", _ALL, 1e-5, 256, 10_000, _EVERYTHING, 500),
)
NANO = (
    Row("0", ("llm",), 2.5e-3, 64, 250, dict(text=1.0)),
    Row("1", ("projector",), 2.5e-3, 64, 40, dict(caption=1.0)),
    Row("2", ("projector", "llm"), 2.5e-3, 64, 350, _UNDERSTAND),
    Row("3", ("heads",), 2.5e-3, 32, 100, dict(paint=1.0)),
    Row("4-1", _ALL, 2.5e-3, 32, 4200, _EVERYTHING),
    Row("4-2", _ALL, 1.5e-3, 32, 800, _EVERYTHING),
)
SMALL = tuple(replace(row, steps=steps, batch=128, lr=lr) for row, steps, lr in zip(
    NANO, (500, 200, 1500, 500, 4000, 1000), (1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 3e-4)))
STAGES = {"nano": NANO, "small": SMALL, **{name: PAPER for name in LLMS if name not in ("nano", "small")}}
# Of the loss (Eq. 6-7): text is a mean over text tokens, a stream a mean over painted positions of the sum over depths, weighed by DEPTHS.
LOSS = {"text": 1.0, "pixel": 1.0, "semantic": 1.0, "unified": 1.0}
DEPTHS = {"nano": (1.0, 0.2, 0.1, 0.05), "small": (1.0, 0.2, 0.1, 0.05)}        # first depth, second, ...; default 1 for all, as in Eq. 7
HELD_OUT = 50           # every 50th record of a kind is held out; of more than 25,000 every n-th, so that they are about 500
DROP = 0.1              # share of painted samples without their words, for guidance
LATER = {"nano": 0.25}  # share of painted positions whose depths after the first are learned in a step; default 1. They are most of a
                        # head's work and little of a picture
MUON = ("nano", "small")        # the matrices of transformers and projectors train with Muon: at the nano size, the loss of AdamW in
                                # less than half the steps. Else AdamW alone, as in the paper
MATRICES = re.compile(r"layers\.|projector|code_in")
SCENES = {"nano": 16_384, "small": 65_536}      # of the built-in world, whose codes are extracted once; a quarter of them with an edit
POOL = (0.3, 0.5, 0.1, 0.1)                     # of these scenes, the shares with one, two, three and four shapes
# The same for the sequences of a kind. Two shapes are the hard part of painting, and enough for a text that answers its own questions.
COUNTS = {"caption": (0.6, 0.25, 0.1, 0.05), "question": (0.6, 0.25, 0.1, 0.05), "paint": (0.15, 0.75, 0.05, 0.05),
          "text": (0.3, 0.7, 0.0, 0.0)}
RELATIONS = 0.7  # share of the words painted from (and of the texts) that tell how two shapes stand to each other, where there are two
SAMPLING = dict(temperature=1.0, top_k=900, top_p=0.96)     # in evaluation; VILA-U's, since the papers name none


def flags(argv=None) -> argparse.Namespace:
    p = Parser(__doc__)
    g = p.add_argument_group("what")
    g.add_argument("--preset", default="nano", help=f"sizes and stages: {', '.join(STAGES)}")
    g.add_argument("--stage", default="all", help="all, or one of the preset's: 0 (text alone, for an LLM from scratch), 1, 2, 3, 4-1, 4-2")
    g.add_argument("--until", default="", metavar="STAGE", help="with --stage all: the last stage to run; default: all of them")
    g.add_argument("--out", default="out/mllm", help="run folder")
    g.add_argument("--tokenizer", default="out/tokenizer", help="run folder of train_tokenizer.py")
    g.add_argument("--llm", default="", help="preset, or folder of a Qwen2.5 or SmolLM2 checkpoint in Hugging Face's layout, or its name "
                                             "on the hub; default: --preset's shape, from scratch")
    g.add_argument("--data", default="", help="plain, textured, a folder of images, or tar shards; none: only records and --text-data; "
                                              "default: what the tokenizer was trained on")
    g.add_argument("--val-data", default="", help="images to evaluate on; default: 5%% of --data, held out")
    g.add_argument("--conversations", default="", metavar="FILE[,FILE...]",
                   help="LLaVA's JSON or JSON lines: in place of the data's own questions; see data/records.py")
    g.add_argument("--documents", default="", metavar="FILE[,FILE...]",
                   help="JSON lines of texts and pictures: interleaved documents, and edits in place of the data's own")
    g.add_argument("--image-folder", default="", help="of the images of --conversations and --documents; default: each file's own folder")
    g.add_argument("--text-data", default="", help="text file for the text share; default: the built-in world's sentences, or the captions")
    g.add_argument("--streams-in", default="", help="what is read: pixel,semantic or one of them, or continuous (the teacher's features); "
                                                    "default: all streams of the tokenizer")
    g.add_argument("--streams-out", default="", help="what is painted: pixel,semantic, or pixel (the other is fed back as zeros), or none; "
                                                     "default: all, none where the tokenizer has no decoder")
    g.add_argument("--teacher", default="", help="folder of the SigLIP whose features --streams-in continuous reads; default: "
                                                 "TOKENIZER/siglip, or what the tokenizer was trained from")
    g.add_argument("--parameters", action="store_true", help="print the parameter table (paper App. D.1) and stop")
    g.add_argument("--code-dim", type=int, default=0, help="E in that table, or in a dry run; 0: the tokenizer's")
    g.add_argument("--vocabulary", default="", help="folder of GPT-2's, Qwen2.5's or SmolLM2's, for an LLM from scratch; default: bytes")
    g = shared_flags(p, tables(), ("paint", "answer", "growth"))
    g.add_argument("--fsdp", action=argparse.BooleanOptionalAction, default=False,
                   help="share weights, gradients and optimiser state over ranks; an evaluation still needs all weights on each device")
    g.add_argument("--text-length", type=int, default=256, help="tokens of a piece of --text-data, and at most of a caption")
    g.add_argument("--max-tokens", type=int, default=0, help="of a record: documents are cut to this after one of their parts, other "
                                                             "longer records are left out; 0: the LLM's context, at most 2048")
    args = p.parse_args(argv)
    check_shared(args, STAGES, text_length=2, code_dim=0, max_tokens=0)
    names, records = [row.name for row in STAGES[args.preset]], args.conversations or args.documents
    check(args.stage in ("all", *names), f"--stage is {args.stage!r}, expected all, or one of {', '.join(names)}")
    if args.until and (args.stage != "all" or args.until not in names):
        raise ValueError(f"--until is {args.until!r} and --stage {args.stage!r}: expected --stage all, --until one of {', '.join(names)}")
    for name, wanted, goes_with in (("teacher", args.streams_in == "continuous", "--streams-in continuous"),
                                    ("code_dim", args.parameters or args.dry_run, "--parameters or --dry-run"),
                                    ("vocabulary", (args.llm or args.preset) in LLMS, "an LLM from scratch"),
                                    ("image_folder", records, "--conversations or --documents"),
                                    ("max_tokens", records, "--conversations or --documents"),
                                    ("val_data", args.data != "none", "images")):
        if (given := getattr(args, name)) and not wanted:
            raise ValueError(f"--{name.replace('_', '-')} {given} would do nothing here: it goes with {goes_with}")
    if args.streams_in == "continuous" and args.streams_out not in ("", "none"):
        raise ValueError(f"--streams-out is {args.streams_out!r}, but a model that reads continuous features paints nothing; leave it out")
    if args.data == "none" and not (records or args.text_data):
        raise ValueError("--data is none, and there are no --conversations, --documents or --text-data either; give some of them")
    if (args.steps or args.lr or args.batch_size) and args.stage == "all" and not (args.bench or args.dry_run or args.table):
        raise ValueError("--steps, --lr and --batch-size are those of one stage, and --stage is all; name the stage")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# data: codes, extracted once, and the sequences made of them

CHUNK = 128             # pictures encoded at a time


def extract(args, ranks: Ranks, key: dict, count: int, chunks, encode) -> tuple[np.ndarray, "Texts"]:
    """Codes or features of `count` pictures and what is said of them, kept in --out/codes/KEY, where no other tokenizer or data finds them
    -> memory map (count, ...), texts. chunks(mine) yields (images, texts), CHUNK at a time, of this rank's share of them, or of what a
    stopped extraction left. encode(images) -> (b, ...). For --bench the first stands for all; nothing is written."""
    if args.bench:
        images, texts = next(iter(chunks(range(min(count, CHUNK)))))
        values = kept_form(encode(images[:1].to(ranks.device)))
        return np.broadcast_to(values, (count, *values.shape[1:])), [next(filter(None, texts), "")] * count
    folder = os.path.join(args.out, "codes", hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16])
    there = lambda: not ranks.agree(not os.path.exists(folder))
    if not there():
        lock(args.out, ranks)
    if not there():     # another run may just have made it
        temporary, step = f"{folder}.tmp", CHUNK * ranks.count
        path, said = (os.path.join(temporary, name) for name in ("pictures.npy", "said.jsonl"))
        os.makedirs(temporary, exist_ok=True)
        done = ranks.agree(keep_whole(said, step) if ranks.first else 0)
        mine = range(done + ranks.rank, count, ranks.count)
        parts = iter(chunks(mine) if mine else ())
        for start in tqdm(range(done, count, step), "extracting codes", leave=False, disable=not ranks.first):
            rows = []
            for images, texts in itertools.islice(parts, 1):        # in the last round some ranks may have none
                rows = [*zip(range(start + ranks.rank, count, ranks.count), kept_form(encode(images.to(ranks.device))), texts)]
            rows = sorted(ranks.gather_rows({"rows": rows})["rows"], key=lambda row: row[0])
            if ranks.first:     # alone writes: ranks may be on several nodes
                _, values, texts = zip(*rows)
                kept = np.lib.format.open_memmap(path, "r+" if start else "w+", values[0].dtype, (count, *values[0].shape))
                kept[start:start + len(values)] = values
                kept.flush()
                with open(said, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(text) + "\n" for text in texts)
        if ranks.first:
            with open(said, "rb") as file:      # where its lines end
                np.save(os.path.join(temporary, "said.npy"), np.cumsum(np.fromiter(itertools.chain([0], map(len, file)), np.int64)))
            write_json(os.path.join(temporary, "key.json"), key)
            os.rename(temporary, folder)
        ranks.agree(0)          # all may read
    return np.load(os.path.join(folder, "pictures.npy"), mmap_mode="r"), Texts(folder)


def kept_form(values: Tensor) -> np.ndarray:
    """Codes in 16 bits, features in half precision; `to_tensor` is the way back."""
    values = values.cpu().numpy()
    return values.astype(np.uint16 if values.dtype == np.int64 else np.float16)


def keep_whole(path: str, step: int) -> int:
    """How many texts a stopped extraction wrote, in whole steps; what follows them is cut off."""
    with open(path, "a+b") as file:
        file.seek(0)
        ends = [0, *itertools.accumulate(len(line) for line in file if line.endswith(b"\n"))]
        done = (len(ends) - 1) // step * step
        file.truncate(ends[done])
    return done


class Texts:
    """Texts of pictures, one after the other or by number, mapped from disk: millions of captions are in no process's memory."""

    def __init__(self, folder: str):
        self.folder, mapped = folder, (np.memmap(os.path.join(folder, "said.jsonl"), mode="r"),
                                       np.load(os.path.join(folder, "said.npy"), mmap_mode="r"))
        self.lines, self.ends = map(np.asarray, mapped)     # plain arrays are sliced twice as fast

    def __reduce__(self):       # a worker that is no fork maps them itself
        return Texts, (self.folder,)

    def __getitem__(self, i):       # past the last, an IndexError ends a loop
        return json.loads(self.lines[self.ends[i]:self.ends[i + 1]].tobytes())


def to_tensor(values: np.ndarray) -> Tensor:
    """Kept codes to int64, kept features to float32."""
    return torch.from_numpy(np.asarray(values).astype(np.int64 if values.dtype == np.uint16 else np.float32))


class Sequences(torch.utils.data.Dataset):
    """Training sequences, a function of seed, step and place in the batch alone. `kinds`: those that this data has; `sequence(kind, rng)`
    makes one. By itself, data without captions, to which records are added."""
    kinds: tuple = ()
    apart: tuple = ("edit", "document")     # kinds in steps of their own, so that nothing else is padded to their length
    records, key, val_captions = None, {}, ()

    def __init__(self, source: str, args, ranks: Ranks, text: TextTokenizer, config: MLLMConfig, *_):
        self.source, self.args, self.ranks, self.text, self.positions, self.pieces = source, args, ranks, text, config.positions, None
        longest = 2 * (config.positions + 2) + args.text_length + 64        # an edit, with what stands around it
        if longest > (context := config.llm.max_position_embeddings):
            raise ValueError(f"two pictures and --text-length {args.text_length} make {longest} tokens, but the LLM's context is {context}")
        if args.text_data:
            self.pieces = np.array(text.encode(read_text(args.text_data)), dtype=np.uint32)
            if len(self.pieces) <= args.text_length:
                raise ValueError(f"{args.text_data} has {len(self.pieces)} tokens, expected more than --text-length {args.text_length}")
            self.kinds = tuple(dict.fromkeys((*self.kinds, "text")))

    def add(self, records: "RecordSequences"):
        """Their kinds, in place of this data's own."""
        self.records, self.key = records, {**self.key, "records": records.key}
        self.kinds = tuple(dict.fromkeys((*self.kinds, *records.kinds)))
        self.apart += ("question",) * ("question" in records.kinds)

    def picture(self, index: int, paint: bool = False) -> Picture:
        return Picture(to_tensor(self.pictures[index]), paint)

    def cut(self, words: str) -> str:
        """At most --text-length tokens of them."""
        return self.text.decode(self.text.encode(words)[:self.args.text_length]).rstrip("\ufffd")       # not half a letter

    def make(self, kind: str, rng: random.Random) -> list:
        """The segments of one sequence of this kind."""
        if self.records and kind in self.records.kinds:
            return self.records.sequence(kind, rng)
        if kind == "text" and self.pieces is not None:
            start = rng.randrange(len(self.pieces) - self.args.text_length + 1)
            return [Words(self.pieces[start:start + self.args.text_length].tolist(), loss=True)]  # from anywhere to anywhere: no end mark
        return self.sequence(kind, rng)

    def painted(self, index: int, words: str, rng: random.Random, *given: Picture) -> list:
        """A sequence that paints a picture, after its words (dropped now and then) and the pictures given."""
        return turn(self.text, [*given, "" if rng.random() < DROP else words], [self.picture(index, True)])

    def captioned(self, kind: str, index: int, words: str, rng: random.Random) -> list:
        """A picture's caption, the picture from its words, or these as a text."""
        if kind == "text":
            return document(self.text, [words])
        return self.painted(index, words, rng) if kind == "paint" else turn(self.text, [self.picture(index)], [words])

    def kinds_of(self, step: int) -> dict[str, float]:
        """Shares of the kinds in a step's global batch: one kind of those `apart`, or all the others."""
        rest = dict(self.mixture)
        for kind in self.apart:
            share = rest.get(kind, 0) / sum(rest.values())
            before = int(step * share + 1e-9)
            if int((step + 1) * share + 1e-9) > before:
                return {kind: 1.0}
            step -= before      # counted without this kind's steps
            rest.pop(kind, None)
        return rest

    def __getitem__(self, step: int) -> list:
        """This rank's micro-batches of a step: the same sequences whatever the number of ranks."""
        kinds, A = self.kinds_of(step), self.ranks.count * self.args.accumulate
        edges = np.cumsum(list(kinds.values())) / sum(kinds.values())
        if self.records:
            self.records.lengths = random.Random(f"{self.args.seed} {self.row.name} {step}").random()
        parts = []
        for first in range(self.ranks.rank, A, self.ranks.count):
            places = range(first, self.row.batch, A)
            rngs = [random.Random(f"{self.args.seed} {self.row.name} {step} {j}") for j in places]
            rows = [self.make([*kinds][np.searchsorted(edges[:-1], (j + 0.5) / self.row.batch)], rng) for j, rng in zip(places, rngs)]
            parts.append(pack(rows, self.text, self.positions, later=LATER.get(self.args.preset, 1.0), rngs=rngs))
        return parts

    def batches(self, row: Row):
        """-> function of a start step that yields each step's micro-batches of this rank, (batch on the device,), no reports, endlessly."""
        check_batch(row.batch, self.ranks, self.args.accumulate)
        self.row, self.mixture = row, {kind: share for kind, share in row.mixture.items() if kind in self.kinds}
        check(self.mixture, f"the data {self.source!r} has none of {', '.join(row.mixture)}; it has {', '.join(self.kinds)}")
        cuda = self.ranks.device.type == "cuda"

        def steps(start):
            workers = self.args.workers if cuda else 0      # on a CPU they would only take the model's cores
            if workers:     # which pass each tensor as an open file, and with --accumulate there are many
                import resource     # not on Windows
                resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
            loader = torch.utils.data.DataLoader(self, batch_size=None, sampler=itertools.count(start), num_workers=workers,
                                                 pin_memory=cuda, worker_init_fn=start_worker,
                                                 prefetch_factor=4 if workers else None, generator=torch.Generator())
            for parts in loader:
                yield [(part.to(self.ranks.device),) for part in parts], []
        return steps


class WorldSequences(Sequences):
    """The built-in world: captions, questions, edits. Its first scenes' codes are extracted once; words are drawn anew every time."""
    kinds = ("caption", "question", "paint", "edit", "text")

    def __init__(self, source, args, ranks, text, config, size, encode):
        if args.val_data:
            raise ValueError(f"--val-data {args.val_data!r} goes with images, and the data is the built-in world {source!r}; leave it out")
        super().__init__(source, args, ranks, text, config)
        n = 512 if args.bench else SCENES.get(args.preset, 65_536)
        world = list(shapes.World(source, size, args.seed, single=0.25).scenes(range(3 * n)))
        self.scenes = [scene for k, share in enumerate(POOL, 1) for scene in [s for s in world if len(s) == k][:round(share * n)]]
        random.Random(0).shuffle(self.scenes)
        self.by_count = [[i for i, scene in enumerate(self.scenes) if len(scene) == k] for k in range(1, len(POOL) + 1)]
        self.edits = [(i, *edit) for i in range(n // 4) if (edit := shapes.edits(self.scenes[i], random.Random(i)))]
        drawn = self.scenes + [after for *_, after in self.edits]

        def chunks(mine):
            for i in range(0, len(mine), CHUNK):
                part = mine[i:i + CHUNK]
                yield shapes.render(shapes.pack([drawn[j] for j in part]), size, ranks.device), [None] * len(part)
        self.key = {**encode.key, "data": source, "size": size, "seed": args.seed, "scenes": [n, POOL]}
        self.pictures, _ = extract(args, ranks, self.key, len(drawn), chunks, encode)

    def sequence(self, kind, rng):
        if kind == "edit":
            e = rng.randrange(len(self.edits))
            before, _, words, _ = self.edits[e]
            return self.painted(len(self.scenes) + e, words, rng, self.picture(before))
        i = rng.choice(rng.choices(self.by_count, COUNTS[kind])[0])
        scene, text = self.scenes[i], self.text
        if kind == "question":
            _, question, answer = ask(scene, rng)
            return turn(text, [self.picture(i), question], [answer])
        words = shapes.caption(scene, rng.randrange(1 << 30)).text
        related = (claim.text for claim in shapes.claims(scene) if claim.skill == "relation")
        if kind != "caption" and rng.random() < RELATIONS and (relations := [*related]):
            words = rng.choice(relations)
        return self.captioned(kind, i, "\n".join([words, *ask(scene, rng)[1:]]) if kind == "text" else words, rng)


class RecordSequences:
    """Sequences of --conversations and --documents: question, edit, document. In memory: where each record is, which pictures it shows."""

    def __init__(self, args, ranks: Ranks, text: TextTokenizer, config: MLLMConfig, size: int, encode):
        context = config.llm.max_position_embeddings
        self.text, self.positions, self.paints, self.lengths = text, config.positions, bool(config.streams_out), 0.0
        self.limit = args.max_tokens or min(2048, context)
        check(self.limit <= context, f"--max-tokens is {args.max_tokens}, but the LLM's context is {context}; choose fewer")
        given = ((args.conversations, conversation), (args.documents, read_document))
        self.records = Records([(path, parse) for files, parse in given for path in files.split(",") if path], args.image_folder)
        good, broken = self.read(ranks)
        paths = sorted({path for *_, shown in good for path in shown})
        states = ranks.gather_rows({"all": [state(path) for path in paths[ranks.rank::ranks.count]]})["all"]
        content = hashlib.sha256("\n".join(sorted(states)).encode("utf-8", "surrogatepass")).hexdigest()
        self.key = {"size": size, "limit": 0, "content": content}       # whatever the limit, codes are the same

        def chunks(mine):
            loader = torch.utils.data.DataLoader(Pictures(paths, size), CHUNK, sampler=mine, num_workers=args.workers,
                                                 worker_init_fn=start_worker, generator=torch.Generator())
            for images, reasons in loader:
                yield images.to(ranks.device).float() / 127.5 - 1, list(reasons)
        self.pictures, said = extract(args, ranks, {**encode.key, **self.key}, len(paths), chunks, encode) if paths else (None, [])
        self.key |= {"limit": self.limit, "files": sorted(state(path) for path, _ in self.records.sources)}
        # what is wrong with a picture: mostly ""; a bench, where one stands for all, does not ask
        number, said = {path: i for i, path in enumerate(paths)}, {} if args.bench else dict(zip(paths, said))
        rows, self.shown = collections.defaultdict(list), []
        for record, kind, length, shown in good:
            if reason := next(filter(None, map(said.get, shown)), ""):
                broken.append((record, reason))
                continue
            rows[kind].append((length, record, len(self.shown), len(shown)))
            self.shown += [number[path] for path in shown]
        self.shown = np.array(self.shown, np.int32)
        every = lambda rows: max(HELD_OUT, len(rows) // (10 * HELD_OUT))
        self.held = {kind: np.array(sorted(of[every(of) - 1::every(of)])) for kind, of in rows.items()}     # (records, 4), by length
        self.rows = {kind: np.array(sorted({*of} - {*map(tuple, self.held[kind].tolist())})) for kind, of in rows.items()}
        self.kinds = tuple(kind for kind in ("question", "edit", "document") if kind in rows)
        for record, reason in sorted(broken)[:10]:
            ranks.say(f"  {self.records.name(record)}: {reason}")
        used = [f"{len(self.rows[kind]):,} of kind {kind} ({len(self.held[kind])} more held out)" for kind in self.kinds]
        ranks.say(f"records: {', '.join(used) or 'none'}, {len(paths):,} pictures, {len(broken):,} left out")
        if not rows:
            sources = " and ".join(path for path, _ in self.records.sources)
            why = f"; the first: {min(broken)[1]} (--image-folder says where pictures are)" if broken else ", expected at least one"
            raise ValueError(f"none of the {len(self.records)} records in {sources} can be used{why}")

    def read(self, ranks: Ranks) -> tuple[list, list]:
        """All records once, each rank its share -> (record, kind, tokens, paths of pictures) of the good, (record, reason) of the rest."""
        rows, nothing = {"good": [], "broken": []}, torch.zeros(self.positions)
        for i in tqdm(range(ranks.rank, len(self.records), ranks.count), "reading records", leave=False, disable=not ranks.first):
            try:
                shown, (kind, parts) = [], self.records[i]

                def noted(image):       # not those cut off
                    shown.append(image.path)
                    return nothing
                made = self.segments(kind, parts, noted)
                rows["good"].append((i, kind, self.tokens(made), shown))
            except ValueError as error:
                rows["broken"].append((i, str(error)))
        rows = ranks.gather_rows(rows)
        return sorted(rows["good"]), rows["broken"]

    def tokens(self, segments: list) -> int:
        return sum(len(s.ids) if isinstance(s, Words) else self.positions + 2 for s in segments)

    def segments(self, kind: str, parts: list, codes, drop: bool = False) -> list:
        """A record's parts -> segments; codes(image): called in order; drop: without an edit's words. ValueError if it does not fit."""
        picture = lambda image: Picture(codes(image), image.paint and self.paints, image.loss)
        if kind == "question":
            made = [s for asked, reply in parts
                    for s in turn(self.text, [picture(part) if isinstance(part, Image) else part for part in asked], reply)]
        elif kind == "edit":        # the prompt is that of `paint(pictures=...)`
            *given, words, result = parts
            made = turn(self.text, [*map(picture, given), "" if drop else words.words], [picture(result)])
        else:
            pieces, room = [], self.limit - 2
            for part in parts:
                piece = [None] * (self.positions + 2) if isinstance(part, Image) else self.text.encode(part.words)
                room -= len(piece)
                if room < 0:
                    break
                pieces.append(picture(part) if isinstance(part, Image) else Words(piece, part.loss))
            check(learned(parts[:len(pieces)]), f"nothing that has a loss fits {self.limit} tokens")
            made = document(self.text, pieces)
        if (length := self.tokens(made)) > self.limit:
            raise ValueError(f"{length} tokens, expected at most {self.limit}")
        return made

    def made(self, row, drop: bool = False) -> list:
        _, record, first, count = row.tolist()
        codes = (to_tensor(self.pictures[i]) for i in self.shown[first:first + count])
        return self.segments(*self.records[record], lambda _: next(codes), drop)

    def sequence(self, kind: str, rng: random.Random) -> list:
        """Those of a step are of like length: its eighth of the records, where they are many."""
        rows, n = self.rows[kind], 8 if len(self.rows[kind]) >= 4096 else 1
        eighth = int(self.lengths * n)
        row = rows[rng.randrange(eighth * len(rows) // n, (eighth + 1) * len(rows) // n)]
        return self.made(row, kind == "edit" and rng.random() < DROP)


def state(path: str) -> str:
    """A file's path, size and time: what tells whether it changed."""
    try:
        status = os.stat(path)
        return f"{path} {status.st_size} {status.st_mtime_ns}"
    except (OSError, ValueError):
        return f"{path} missing"


def ask(scene, rng: random.Random) -> tuple[str, str, str]:
    """One question (type, question, answer): its type first, so that the many relations do not crowd out the rest."""
    asked = collections.defaultdict(list)
    for question in shapes.questions(scene):
        asked[question[0]].append(question)
    return rng.choice(asked[rng.choice(sorted(asked))])


def fingerprint(data: ImageData) -> str:
    """SHA-256 of which images there are, and of the sizes and times of the files that hold them and their captions."""
    sha = hashlib.sha256(data.records.tobytes() + data.names)
    alone = (os.path.splitext(data.path(record)) for record in data.records[data.records["image"] < 0])
    files = (os.fsdecode(stem + end) for stem, suffix in alone for end in (suffix, b".txt"))
    for path in itertools.chain(filter(os.path.isfile, data.files), files):
        sha.update(state(path).encode("utf-8", "surrogateescape"))
    return sha.hexdigest()


class ImageSequences(Sequences):
    """Real images with captions: captioning and painting; text is captions, unless --text-data is given."""
    kinds = ("caption", "paint", "text")

    def __init__(self, source, args, ranks, text, config, size, encode, train: bool = True):
        """Not train: held-out images alone, to evaluate on."""
        super().__init__(source, args, ranks, text, config)
        data = ImageData(source, size, train=False)
        parts = (data, ImageData(args.val_data, size, train=False)) if args.val_data else data.split()
        reports, self.key = [report for part in parts for report in part.broken], dict(encode.key)

        def codes(part: ImageData, name: str) -> tuple[np.ndarray, Texts]:
            def chunks(mine):
                for images, captions, broken in part.load(CHUNK * ranks.count, mine[0] // (CHUNK * ranks.count), rank=ranks.rank,
                                                          ranks=ranks.count, workers=args.workers):
                    reports.extend(broken)
                    yield images.to(ranks.device).float() / 127.5 - 1, captions
            part.train = False
            self.key[name] = {"size": size, "content": fingerprint(part)}
            return extract(args, ranks, {**encode.key, **self.key[name]}, len(part), chunks, encode)
        self.val, captions = codes(parts[1], "val")
        self.val_captions = [self.cut(caption) for caption in captions]
        if train:
            self.pictures, self.captions = codes(parts[0], "train")
            self.told = np.array([i for i, caption in enumerate(self.captions) if caption], np.uint32)
            check(len(self.told), f"the images in {source!r} have no captions; add .txt files or a metadata.jsonl")
            reports = list(dict.fromkeys(ranks.gather_rows({"reports": reports})["reports"]))
            for report in reports[:10]:
                ranks.say(f"  {report}")
            ranks.say(f"data: {len(self.told):,} captioned images, {len(self.val):,} held out, {len(reports)} broken among those read now")

    def sequence(self, kind, rng):
        i = self.told[rng.randrange(len(self.told))]
        return self.captioned(kind, i, self.cut(self.captions[i]), rng)


# ---------------------------------------------------------------------------------------------------------------------
# evaluation, also sample.py's

SKILLS = ("single", "relation", "count", "differ", "compare", "negate", "universal", "held_out")


class Validation:
    """Held-out scenes of the built-in world, the same for every run: a question about each of `n`, prompts for painting, n // 8 of each
    skill that this world has (`compare` speaks of sizes, and plain shapes have one), and n // 4 edits."""

    def __init__(self, source: str, size: int, n: int):
        self.source, self.size = source, size
        rng = random.Random(VALIDATION_SEED)
        self.scenes = list(shapes.World(source, size, VALIDATION_SEED, "val").scenes(range(n)))
        self.asked = [ask(scene, rng) for scene in self.scenes]     # (type, question, answer)
        self.claims = []                                            # (skill, claim, a scene that it is true of)
        for skill in SKILLS:
            split, said = ("held_out", "single") if skill == "held_out" else ("val", skill)
            world = shapes.World(source, size, VALIDATION_SEED + 1, split, single=float(said == "single"))
            true = ((scene, [claim for claim in shapes.claims(scene) if claim.skill == said]) for scene in world.scenes(range(n)))
            self.claims += itertools.islice(((skill, rng.choice(claims), scene) for scene, claims in true if claims), max(1, n // 8))
        made = ((scene, shapes.edits(scene, rng)) for scene in self.scenes[:max(1, n // 4)])
        self.edits = [(scene, *edit) for scene, edit in made if edit]       # (scene, kind, instruction, scene after it)

    def render(self, scenes: list, device) -> Tensor:
        return shapes.render(shapes.pack(scenes), self.size, device)


def shares(kinds, right) -> dict[str, float]:
    """Of what is of each kind and of all, the part that is right."""
    marks = collections.defaultdict(list)
    for kind, mark in zip(kinds, right):
        marks[kind].append(mark)
    return {**{kind: share(of) for kind, of in marks.items()}, "all": share(right)}


def share(right: list) -> float:
    return sum(right) / max(1, len(right))


def understanding(model: DualMLLM, val: Validation, encode, ranks: Ranks) -> dict:
    """Answers and captions, exactly right or not; chance: any of the type's answers; majority: its most frequent one in training scenes."""
    rows = []
    for part in batched(range(len(val.scenes)), 128, ranks, "answering"):
        pictures = encode(val.render([val.scenes[j] for j in part], ranks.device))
        rows.append({"index": [*part], "answers": model.answer(pictures, [val.asked[j][1] for j in part], longest=32),
                     "captions": model.answer(pictures, [""] * len(part), longest=64)})
    rows = ranks.gather_rows(*rows)
    usual, rng = collections.defaultdict(collections.Counter), random.Random(0)
    for scene in shapes.World(val.source, val.size).scenes(range(4000)):
        kind, _, answer = ask(scene, rng)
        usual[kind][answer] += 1
    marks = collections.defaultdict(list)
    for i, answer in zip(rows["index"], rows["answers"]):
        kind, _, truth = val.asked[i]
        mark = answer.strip() == truth, 1 / len(usual[kind]), usual[kind].most_common(1)[0][0] == truth
        marks["all"].append(mark), marks[kind].append(mark)
    table = {name: {"n": len(of), **dict(zip(("right", "chance", "majority"), map(share, zip(*of))))} for name, of in marks.items()}
    true = lambda i, caption: caption.strip() in {claim.text for claim in shapes.claims(val.scenes[i])}
    return {"understanding": table, "caption_exact": share([*map(true, rows["index"], rows["captions"])])}


def painting(model: DualMLLM, tokenizer: DualTokenizer, look, val: Validation, ranks: Ranks, grid: str, how: dict) -> dict:
    """Prompts painted and marked by the world's reader: whether the claim holds for what it reads. reader_accuracy, the ceiling: the same
    for the tokenizer's reconstructions of scenes they are true of. fd: Frechet distance to these in pooled features of `look`, a ViT."""
    shown = [row for s in SKILLS if (row := [i for i, (skill, *_) in enumerate(val.claims) if skill == s][:4])]
    rows = []
    for part in batched(range(len(val.claims)), 64, ranks, "painting"):
        claims, scenes = zip(*(val.claims[j][1:] for j in part))
        real = val.render(list(scenes), ranks.device)
        made = tokenizer.decode(model.paint([claim.text for claim in claims], seeds=list(part), **how))
        holds = lambda images: [scene is not None and claim.holds(scene) for claim, scene in zip(claims, shapes.read(images, val.source))]
        rows.append({"index": [*part], "painted": holds(made), "ceiling": holds(tokenizer.decode(tokenizer.encode(real))),
                     "real": look(real)[1].float(), "made": look(made)[1].float(),
                     "pictures": [(j, picture.cpu()) for j, picture in zip(part, made) if any(j in row for row in shown)]})
    rows = ranks.gather_rows(*rows)
    skills = [val.claims[i][0] for i in rows["index"]]
    metrics = {what: shares(skills, rows[name]) for what, name in (("painting", "painted"), ("reader_accuracy_by_skill", "ceiling"))}
    if ranks.first:
        pictures, right = dict(rows["pictures"]), dict(zip(rows["index"], rows["painted"]))
        save_grid([torch.stack([pictures[i] for i in row]) for row in shown], grid,
                  titles=[[f"{val.claims[i][1].text}: {'right' if right[i] else 'WRONG'}" for i in row] for row in shown])
    return {**metrics, "reader_accuracy": metrics["reader_accuracy_by_skill"]["all"], "fd": frechet_distance(rows["made"], rows["real"])}


def editing(model: DualMLLM, tokenizer: DualTokenizer, encode, val: Validation, ranks: Ranks, how: dict) -> dict:
    """Edits of pictures, marked by the world's reader: whether it reads the shapes, colours and sizes that should be there and, of a
    move, that shape where it was to go."""
    rows = [{"kinds": [], "right": []}]     # of few scenes, none may have an edit
    for part in batched(range(len(val.edits)), 64, ranks, "editing"):
        before, kinds, words, after = zip(*(val.edits[j] for j in part))
        codes = model.paint(list(words), encode(val.render(list(before), ranks.device)), seeds=list(part), **how)
        read = shapes.read(tokenizer.decode(codes), val.source)
        rows.append({"kinds": [*kinds], "right": [*map(shapes.carried_out, kinds, before, after, read)]})
    rows = ranks.gather_rows(*rows)
    return {"editing": shares(rows["kinds"], rows["right"])}


def caption_retrieval(model: DualMLLM, data: ImageSequences, ranks: Ranks, n: int, group: int = 32) -> dict:
    """Among the captions of `group` held-out pictures, the likeliest for each: by log p(caption | picture) minus its mean over them."""
    told = [i for i, caption in enumerate(data.val_captions) if caption][:n]
    groups, right = [told[i:i + group] for i in range(0, len(told) - 1, group)], []
    for g in tqdm(groups[ranks.rank::ranks.count], "retrieving", leave=False, disable=not ranks.first):
        scores = torch.stack([model.score(to_tensor(data.val[[i] * len(g)]), [data.val_captions[j] for j in g]) for i in g]).cpu()
        best = (scores - scores.mean(0)).argmax(1).tolist()
        right += [data.val_captions[g[b]] == data.val_captions[i] for i, b in zip(g, best)]
    return {"caption_retrieval": share(ranks.gather_rows({"right": right})["right"]),
            "caption_retrieval_chance": len(groups) / max(1, sum(map(len, groups)))}


@torch.no_grad()
def held_out_loss(model: DualMLLM, records: RecordSequences, ranks: Ranks, kinds) -> dict:
    """Mean cross entropy over the held-out records of each kind: `text` a token with a loss, `codes` a painted position, all its codes."""
    metrics = {}
    for kind in [kind for kind in records.kinds if kind in kinds and len(records.held[kind])]:
        sums = torch.zeros(4)
        for part in batched(records.held[kind], 8, ranks):
            batch = pack([records.made(row) for row in part], records.text, records.positions).to(ranks.device)
            text, *codes = map(float, model(batch).values())
            sums += torch.tensor([text, len(batch.text_target), sum(codes), len(batch.learned) * records.positions])
        text, tokens, codes, places = all_reduce(sums.to(ranks.device)).tolist()
        metrics |= {f"held_out_{kind}_{what}": value / n for what, value, n in (("text", text, tokens), ("codes", codes, places)) if n}
    return metrics


# ---------------------------------------------------------------------------------------------------------------------
# a stage

class MLLMStage(Stage):
    """One row of the table: freeze the rest, train its parts, evaluate what its mixture teaches."""
    unit = "sequences"

    def __init__(self, args, ranks: Ranks, row: Row, last: bool, model: DualMLLM, tokenizer: DualTokenizer, look, data: Sequences, encode):
        super().__init__(args, ranks)
        self.name, self.row, self.model, self.tokenizer = f"stage-{row.name}", row, model, tokenizer
        self.look, self.data, self.encode = look, data, encode
        self.design, self.streams = tokenizer.config.design, tokenizer.config.streams
        self.folder = args.out if last else os.path.join(args.out, self.name)
        self.steps, self.batch, self.lr, self.warmup = row.steps, row.batch, row.lr, row.warmup
        muon = args.preset in MUON if args.muon is None else args.muon
        pieces = "" if data.pieces is None else hashlib.sha256(data.pieces.tobytes()).hexdigest()
        self.settings = json.loads(json.dumps({
            "stage": row.name, "preset": args.preset, "data": data.source, "pictures": data.key, "text": [pieces, args.text_length],
            "row": {**asdict(row), "mixture": data.mixture}, "muon": muon, "loss": [LOSS, DEPTHS.get(args.preset), LATER.get(args.preset)],
            "config": asdict(model.config), "from": "" if args.bench else digest(model), **common(args, ranks)}))
        for part, parameters in model.parts().items():
            for parameter in parameters:
                parameter.requires_grad_(part in row.trains)
        model.llm.checkpointing = args.checkpointing
        self.optimise((0.9, 0.95), 0.01, [p for name, p in model.named_parameters()
                                          if muon and p.requires_grad and p.dim() >= 2 and MATRICES.search(name)])
        self.earlier = {}               # seconds of the stages before
        self.evaluated = True           # whether this stage is to be measured, which takes minutes

    def before_step(self, parts):
        """Means are over the tokens and positions of the whole global batch, however it is split over ranks and micro-batches."""
        counts = torch.tensor([[len(part.text_target), len(part.learned) * self.data.positions, len(part.all_depths)] for part, in parts],
                              dtype=torch.float32).sum(0)
        self.scale = len(parts) * self.ranks.count / all_reduce(counts.to(self.ranks.device, non_blocking=True)).clamp(min=1)

    def loss(self, batch, *, step):
        terms, total, depths, kinds = {}, 0.0, (1.0, *DEPTHS.get(self.args.preset, (1.0,))), self.data.kinds_of(step).keys()
        for name, value in self.wrapped(batch).items():
            stream, _, depth = name.partition("_")
            depth = int(depth or 0)         # 0: words
            mean = value * self.scale[min(depth, 2)]
            total = total + LOSS[stream] * depths[min(depth, len(depths) - 1)] * mean
            if kinds & ({"paint", "edit", "document"} if depth else {"text", "caption", "question", "document"}):
                terms[name] = mean
        return total, terms

    def evaluate(self):
        model, kinds = self.model, self.data.mixture.keys() if self.evaluated else ()
        if self.args.fsdp and kinds:        # a whole one: ranks generate texts of different lengths, so they cannot gather weights together
            with torch.device("meta"):
                model = DualMLLM(self.model.config, self.model.text)
            model.load_state_dict({name: whole(value) for name, value in self.model.state_dict().items()}, assign=True)
        c = self.model.config
        metrics = {"images": self.args.eval_images if kinds else 0, "streams_in": list(c.streams_in), "streams_out": list(c.streams_out)}
        metrics |= evaluate(model, self.tokenizer, self.look, self.data, self.encode, self.args.eval_images, self.ranks,
                            os.path.join(self.folder, "samples", "painted.png"), kinds)
        if self.data.records:
            metrics |= held_out_loss(model, self.data.records, self.ranks, kinds)
        return metrics

    def about(self):
        share = sum(self.data.mixture.values())
        pictures = sum(part * {"text": 0, "edit": 2}.get(kind, 1) for kind, part in self.data.mixture.items()) / share
        return {"images_per_second": round(self.per_second * pictures, 1), "stage_seconds": {**self.earlier, self.row.name: self.seconds}}

    def save(self, weights):
        self.model.save_pretrained(self.folder, weights, stage=self.row.name, data=self.data.source, val_data=self.args.val_data,
                                   text_length=self.args.text_length, teacher=self.args.teacher)


@torch.no_grad()
def evaluate(model: DualMLLM, tokenizer: DualTokenizer, look, data, encode, n: int, ranks: Ranks, grid: str, kinds,
             how: dict = SAMPLING) -> dict:
    """What these kinds of sequences teach, on n held-out pictures, and as many prompts, nearly; look: the ViT that Frechet distances are
    measured in; grid: where a picture of these goes. Called on all ranks."""
    metrics = {}
    if data.source in shapes.DIFFICULTIES:
        val = Validation(data.source, tokenizer.config.vision.image_size, n)
        if "question" in kinds:
            metrics |= understanding(model, val, encode, ranks)
        if "paint" in kinds:
            metrics |= painting(model, tokenizer, look, val, ranks, grid, how)
        if "edit" in kinds:
            metrics |= editing(model, tokenizer, encode, val, ranks, how)
    else:
        if "caption" in kinds:
            metrics |= caption_retrieval(model, data, ranks, n)
        shown = [i for i, caption in enumerate(data.val_captions) if caption][:16]
        if "paint" in kinds and ranks.first and shown:
            made = tokenizer.decode(model.paint([data.val_captions[i] for i in shown], **how))
            real = tokenizer.decode(to_tensor(data.val[shown]).to(ranks.device))
            rows = [images[i:i + 8] for i in range(0, len(shown), 8) for images in (real, made)]
            titles = [[data.val_captions[j] if row % 2 else "" for j in shown[row // 2 * 8:][:8]] for row in range(len(rows))]
            save_grid(rows, grid, titles=titles)
    return metrics


def parameter_table(model: DualMLLM) -> list[tuple[str, int]]:
    """(part, parameters), counted as the paper's App. D.1 does: a head is its transformer over depth, without projector or classifiers."""
    count = lambda parts: sum(p.numel() for p in parts)
    rows = [("LLM", count(model.llm.parameters())), ("input projector", count(model.projector.parameters())),
            ("image marks", model.marks.numel())]
    for stream, head in model.heads.items():
        norms, depth = ([p for name, p in head.layers.named_parameters() if ("norm" in name) == norm] for norm in (True, False))
        outside = [head.depth, *head.code_in.parameters(), *head.norm.parameters(), *norms]
        rows += [(f"{stream} head: projector from the LLM", count(head.projector.parameters())),
                 (f"{stream} head: transformer over depth", count(depth)),
                 (f"{stream} head: norms, codes and depths in", count(outside)),
                 (f"{stream} head: classifiers", head.classifiers.numel()),
                 (f"{stream} code table", model.tables[0].numel())]
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# main

def encoder(config: MLLMConfig, tokenizer: DualTokenizer, folder: str, teacher: str = ""):
    """-> function: images (B, 3, H, W) -> codes, or deep features of the teacher (default: the tokenizer's); `key` tells encoders apart."""
    c, device = tokenizer.config, next(tokenizer.parameters()).device
    model = load_teacher(folder, c.vision.image_size, teacher).to(device) if config.continuous else tokenizer

    @torch.no_grad()
    def encode(images):
        return model(images, c.deep_layer)[0] if config.continuous else model.encode(images)
    check(c.codebook_size <= 2 ** 16, f"a codebook of {c.codebook_size} codes, expected at most {2 ** 16}: codes are kept in 16 bits")
    encode.key = {"encoder": digest(model), "continuous": config.continuous, "layers": [c.shallow_layer, c.deep_layer]}
    return encode


def judge(tokenizer: DualTokenizer, folder: str, ranks: Ranks):
    """The ViT that Frechet distances are measured in: the tokenizer's teacher, or its own, and that is said, where there is none."""
    if teacher_of(folder):
        return load_teacher(folder, tokenizer.config.vision.image_size).to(ranks.device)
    ranks.say(f"Frechet distances are in the tokenizer's own ViT, since {folder} does not say where its teacher is")
    return tokenizer.siglip_model.vision_model


def build(args, c, tables: int = 1, sha256: str = "", say=print) -> tuple[MLLMConfig, TextTokenizer, LLM | None]:
    """The configuration that flags and a tokenizer's (c) give, the text tokenizer, and the LLM where one is loaded."""
    llm, name = None, args.llm or args.preset
    if name in LLMS:
        text, sizes = TextTokenizer.from_folder(args.vocabulary) if args.vocabulary else TextTokenizer.bytes(), LLMConfig(**LLMS[name])
        if args.vocabulary and sizes.vocab_size < 151_936:
            sizes = replace(sizes, vocab_size=math.ceil(text.size / 64) * 64)
        if STAGES[args.preset] is PAPER and not (args.bench or args.parameters or args.dry_run):
            raise ValueError(f"--preset {args.preset} starts from a pretrained LLM; give its folder with --llm, or take --preset small")
    elif os.path.isdir(name := hub.folder(name)):
        llm, text = LLM.from_pretrained(name), TextTokenizer.from_folder(name)
        sizes = llm.config
        if (last := max(*text.ordinary, text.end, text.turn_end or 0)) >= sizes.vocab_size:
            raise ValueError(f"the vocabulary in {name} has {last + 1} tokens, its LLM {sizes.vocab_size} rows; copy both from one model")
        if text.size > sizes.vocab_size:
            say(f"the vocabulary of {sizes.vocab_size} has no spare rows and grows by four: the image marks become tokens "
                f"{text.marks['<image_start>']} to {text.size - 1}")
    else:
        raise ValueError(f"--llm is {name!r}, expected one of {', '.join(LLMS)}, a checkpoint's folder, or a name such as Qwen/Qwen2.5-3B")
    usual = c.streams if c.image_stream else ()
    paints = () if args.streams_out == "none" else tuple(args.streams_out.split(",")) if args.streams_out else usual
    reads = tuple(args.streams_in.split(",")) if args.streams_in else c.streams
    config = MLLMConfig(llm=sizes, streams=c.streams, streams_in=reads, streams_out=paints,
                        positions=c.positions, depth=c.depth, codebook_size=c.codebook_size, code_dim=args.code_dim or c.code_dim,
                        tables=tables, feature_width=c.vision.hidden_size, text="files" if text.files else "bytes", tables_sha256=sha256,
                        **HEADS.get(args.preset, {}))
    if config.streams_out and c.image_stream not in config.streams_out:
        raise ValueError(f"--streams-out is {args.streams_out!r}: expected none, " + (
            f"or {c.image_stream} among them, since pictures are decoded from its codes" if c.image_stream else
            f"since the tokenizer's design, {c.design}, has no decoder"))
    return config, text, llm


def tables() -> dict[str, Table]:
    """The papers' tables about language models. Where only understanding is looked at, stage 2 is the last one, as in LLaVA-1.5."""
    kinds = ("colour", "shape", "count", "existence", "relation", "comparison")
    asked = {"understanding.all.right": "questions right"} | {f"understanding.{kind}.right": kind for kind in kinds}
    painted = {f"painting.{skill}": skill for skill in ("all", *SKILLS)} | {"fd": "Frechet distance"}

    def row(label, design, reads="", paints="", paper=None):
        """paints: "", all that the tokenizer can; none: up to stage 2 alone."""
        name = "-".join(filter(None, ("mllm", design, reads and f"reads-{reads}", paints and f"paints-{paints}")))
        return System(label, name, dict(streams_in=reads, streams_out=paints, until="2" if paints == "none" else ""), paper or {},
                      tokenizer=(design, dict(design=design)))
    right = "understanding.all.right"
    asked_by_genai = ("count", "differ", "compare", "negate", "universal", "all")
    genai = lambda *scores: {f"painting.{skill}": score for skill, score in zip(asked_by_genai, scores)}
    continuous = lambda paper: row("features of the teacher, continuous", "dual", "continuous", "none", {right: paper})
    return {
        "2": Table("Table 2: reading what was trained to reconstruct", asked, (), [
            continuous(78.5), row("codes of reconstruction alone, deep layer", "recon-deep", "", "none", {right: 47.5})],
            "VQAv2 within LLaVA-1.5; its encoder for reconstruction is trained from scratch, ours from the SigLIP"),
        "4": Table("Table 4: reading one stream or both", asked, (), [
            continuous(52.8), row("one codebook for both losses", "naive", "", "none", {right: 48.1}),
            row("dual, semantic codes alone", "dual", "semantic", "none", {right: 52.2}),
            row("dual, semantic and pixel codes", "dual", "", "none", {right: 53.9})],
            "the average of ten benchmarks within LLaVA-1.5; its one codebook is VILA-U"),
        "5": Table("Table 5 (b): painting with one stream or both", painted, ("fd",), [
            row("one codebook for both losses", "naive", paper=genai(0.68, 0.66, 0.70, 0.49, 0.64, 0.60)),
            row("dual, pixel codes alone", "dual", "", "pixel", genai(0.59, 0.59, 0.59, 0.47, 0.59, 0.55)),
            row("dual, pixel and semantic codes", "dual", paper=genai(0.76, 0.76, 0.78, 0.50, 0.72, 0.68))],
            "VQAScores on GenAI-Bench, 3B; its one codebook is VILA-U"),
        "6": Table("Table 6: one tokenizer with two codebooks, or two tokenizers", painted, ("fd",), [
            row("one codebook for both losses", "naive", paper=dict(fd=15.12)), row("dual", "dual", paper=dict(fd=7.88)),
            row("dual encoder", "dual-encoder", paper=dict(fd=17.55))],
            "MJHQ-30K, 3B; its one codebook is VILA-U"),
        "muse-6": Table("MUSE-VL, Table 6: the branches of its tokenizer", {"tokenizer.fd": "Frechet distance of reconstructions", **asked},
                        ("tokenizer.fd",), [
            row("image branch", "sde-image", "", "none", {"tokenizer.fd": 2.63, right: 43.1}),
            row("semantic branch", "sde-semantic", "", "none", {right: 62.7}),
            row("both (SDE)", "sde", "", "none", {"tokenizer.fd": 2.26, right: 63.6})], "the average of MMBench, SEED and MMStar"),
    }


def train_table(args):
    """The language models of a table, over the tokenizers of the same --out, which are trained first where they are missing."""
    own = ("streams_in", "streams_out", "teacher", "until", "parameters", "steps", "lr", "batch_size")
    taken = [name for name in own if getattr(args, name)] + ["stage"] * (args.stage != "all")
    taken += ["tokenizer"] * (args.tokenizer not in ("out/tokenizer", *PRESETS))
    check(not taken, f"the rows of a table have --{', --'.join(taken)} of their own; leave that out".replace("_", "-"))
    preset = tokenizer_preset(args)
    if args.data not in ("", *shapes.DIFFICULTIES):
        raise ValueError(f"--data is {args.data!r}, but tables are of the built-in world; expected one of {', '.join(shapes.DIFFICULTIES)}")
    args.out = "out/tables" if args.out == "out/mllm" else args.out
    below = train_tokenizer.flags([
        "--preset", preset, "--out", args.out, "--data", args.data, "--device", args.device, "--eval-images", str(args.eval_images),
        "--precision", args.precision, "--workers", str(args.workers),
        *(f"--{name}" for name in ("compile", "checkpointing") if getattr(args, name))])
    trained = {}

    def measure(seed, system):
        name, changes = system.tokenizer
        folder, out = os.path.join(args.out, f"seed-{seed}", name), os.path.join(args.out, f"seed-{seed}", system.name)
        there = os.path.exists(os.path.join(folder, "metrics.json"))       # of whatever settings, but all the same ones
        trained[folder] = metrics_of(folder) if there else train_tokenizer.train_row(below, seed, name, changes)
        alike = [{key: metrics["settings"].get(key) for key in ("preset", "data", "steps", "batch", "lr", "muon", "weights")}
                 for metrics in trained.values()]
        if apart := differences({**alike[0], "preset": preset}, alike[-1]):
            raise ValueError(f"{folder} holds a tokenizer of other settings ({'; '.join(apart)}); delete it, or name another --out")
        row = argparse.Namespace(**vars(args) | dict(seed=seed, out=out, tokenizer=folder, resume=True, table="") | system.changes)
        main(args=row)
        return {**metrics_of(os.path.join(out, f"stage-{row.until}") if row.until else out), "tokenizer": trained[folder]}
    make_table(args, tables(), measure)


def main(argv=None, args=None):
    """A run, or those of a table. args: in place of argv."""
    args = args or flags(argv)
    if args.table:
        return train_table(args)
    if args.parameters:
        c = preset_config(tokenizer_preset(args))
        with torch.device("meta"):
            config, text, _ = build(args, c)
            table = parameter_table(DualMLLM(config, text))
        print(f"{args.llm or args.preset} over {c.preset}, K {c.codebook_size}, E {config.code_dim}, D {c.depth}")
        print_parts([*table, ("a second stream in the projector", config.code_dim * config.llm.hidden_size)])
        print("paper, App. D.1 (3B, E 1024): a head 258 M, a code table 16 M, a second stream in the projector 2.1 M")
        return

    if args.dry_run:
        return estimate(args)

    # ---- device, tokenizer, LLM
    ranks = Ranks(args.device)
    if args.fsdp and ranks.count == 1:
        raise ValueError("--fsdp shares the model over ranks, and there is one; start more with torchrun --nproc_per_node, or leave it out")
    torch.manual_seed(args.seed)
    if args.bench == "growth":
        return bench_stage_growth(args, ranks)
    if args.bench and args.tokenizer in PRESETS:
        tokenizer, source = DualTokenizer(preset_config(args.tokenizer)).eval(), args.data      # random weights, for its shapes
    else:
        tokenizer, source = DualTokenizer.from_pretrained(args.tokenizer), args.data or read_config(args.tokenizer).get("data")
        check(source, f"{args.tokenizer}/config.json does not say what the tokenizer was trained on; name the --data")
    tokenizer.to(ranks.device).requires_grad_(False)
    tables, sha256 = code_tables(tokenizer)
    config, text, llm = build(args, tokenizer.config, tables.shape[1], sha256, ranks.say)
    if not config.streams_out:
        ranks.say("pictures are read alone: nothing is painted, and stage 3 is left out")
    rows = stages_for(args, config, bool(llm))
    names, chosen = [row.name for row in rows], named(rows, args)

    # ---- where to start
    first = 0 if args.stage == "all" else names.index(args.stage)
    if first and not args.bench:
        folder = os.path.join(args.out, f"stage-{names[first - 1]}")
        if not os.path.exists(os.path.join(folder, "metrics.json")):
            raise ValueError(f"stage {names[first - 1]} is not finished in {folder!r}; run it first, or --stage all")
        model = DualMLLM.from_pretrained(folder)
        if changed := differences(asdict(model.config), asdict(config)):
            raise ValueError(f"{folder} is of another tokenizer or design ({'; '.join(changed)}); use its flags, or another --out")
    else:
        with torch.device(ranks.device if args.bench and not args.fsdp else "cpu"):     # a bench's weights, where drawing them is quick
            model = DualMLLM(config, text, llm)
        model.take_tables(tables)
    model = model if args.fsdp else model.to(ranks.device)      # what is shared goes to the device part by part

    if args.bench in ("paint", "answer"):
        model = to_generate(model, args.precision, ranks.device)
        return bench_painting(args, ranks, model, tokenizer) if args.bench == "paint" else bench_answering(ranks, model)

    # ---- data
    if args.eval_images < 4 * ranks.count:
        raise ValueError(f"--eval-images is {args.eval_images}, expected at least {4 * ranks.count} for {ranks.count} ranks")
    for row in chosen:
        check_batch(row.batch, ranks, args.accumulate)
        if args.bench == "":
            text.check_room(args.out if row.name == names[-1] else os.path.join(args.out, f"stage-{row.name}"))
        if args.data == "none" and not {*row.mixture} - {"caption", "paint"}:
            raise ValueError(f"stage {row.name} is of captioned images, and --data is none; name some with --data, or another --stage")
    encode = encoder(config, tokenizer, args.tokenizer, args.teacher)
    look = judge(tokenizer, args.tokenizer, ranks) if source in shapes.DIFFICULTIES and config.streams_out and not args.bench else None
    kind_of_data = (WorldSequences if source in shapes.DIFFICULTIES else Sequences if source == "none" else
                    ImageSequences if source else DrySequences)
    size = tokenizer.config.vision.image_size
    data = kind_of_data(source, args, ranks, text, config, size, encode)
    if args.conversations or args.documents:
        data.add(RecordSequences(args, ranks, text, config, size, encode))
    for row in chosen:
        data.batches(row)       # raises before anything is trained
    if args.compile:
        compile_parts(model)
    parameters = sum(p.numel() for p in model.parameters())
    if args.fsdp:
        ranks.shard(model, [*model.llm.model.layers, *model.heads.values()])
    ranks.say(f"{args.preset} on {ranks.device.type} x {ranks.count}, {precision(args, ranks)}, {parameters / 1e6:.1f} M parameters, "
              f"data {source or 'of the right sizes alone'}, out {args.out}")

    # ---- the stages, in order
    earlier = {}
    for row in chosen:
        batches = data.batches(row)
        ranks.say(f"stage {row.name} trains {', '.join(row.trains)} on "
                  + ", ".join(f"{kind} {share:g}" for kind, share in data.mixture.items()))
        stage = MLLMStage(args, ranks, row, row.name == names[-1], model, tokenizer, look, data, encode)
        if args.bench:
            bench(stage, batches)
            continue
        stage.earlier, stage.evaluated = dict(earlier), row is chosen[-1] or args.eval_every > 0
        metrics = read_json(os.path.join(stage.folder, "metrics.json")) if args.resume and kept(stage) else {}
        # one that was kept unmeasured goes on from its last checkpoint, if that is still there, which measures it
        unmeasured = stage.evaluated and metrics.get("images") == 0 and checkpoints(stage.folder)
        if metrics and not unmeasured:
            ranks.say(f"stage {row.name}: {stage.folder} is kept from an earlier run with these settings")
            load_part(model, DualMLLM.from_pretrained(stage.folder).state_dict(), stage.folder)
            earlier[row.name] = metrics["seconds"]
        else:
            train(stage, batches)
            earlier[row.name] = stage.seconds


def stages_for(args, config: MLLMConfig, pretrained: bool) -> list[Row]:
    """The preset's, without those that a pretrained LLM, or a model that paints nothing, has no need of."""
    rows = [row for row in STAGES[args.preset] if not (row.name == "0" and pretrained or row.name == "3" and not config.streams_out)]
    if not config.streams_out:
        rows = [replace(row, mixture={kind: share for kind, share in row.mixture.items() if kind not in ("paint", "edit")}) for row in rows]
    return rows


def named(rows: list[Row], args) -> list[Row]:
    """Those that --stage and --until name, with --steps, --batch-size and --lr. Raises ValueError where one is not there."""
    names = [row.name for row in rows]
    if args.stage not in ("all", *names) or args.until not in ("", *names):
        raise ValueError(f"--stage is {args.stage!r} and --until {args.until!r}, but with these flags there is only {', '.join(names)}")
    rows = rows[:names.index(args.until) + 1] if args.until else [row for row in rows if args.stage in ("all", row.name)]
    return [replace(row, steps=args.steps or row.steps, batch=args.batch_size or row.batch, lr=args.lr or row.lr) for row in rows]


def tokenizer_preset(args) -> str:
    """The tokenizer whose shapes stand for one that is not there: --tokenizer, if it names a preset, else --preset, else the paper's."""
    check(args.tokenizer in ("out/tokenizer", *PRESETS), f"--tokenizer is {args.tokenizer!r}, expected a preset here: {', '.join(PRESETS)}")
    return args.tokenizer if args.tokenizer in PRESETS else args.preset if args.preset in PRESETS else "siglip-l-256"


class DrySequences(Sequences):
    """A dry run's, and a bench's without data: of one picture, whose codes are 0, and --text-length bytes, or of these alone. No edits,
    which have two pictures."""
    kinds = ("caption", "question", "paint", "text")

    def __init__(self, source, args, ranks: Ranks, text: TextTokenizer, config: MLLMConfig, *_):
        super().__init__(source, args, ranks, text, config)
        one = (1, config.positions)
        self.pictures = kept_form(torch.zeros(*one, config.feature_width) if config.continuous else
                                  torch.zeros(*one, len(config.streams), config.depth).long())

    def sequence(self, kind, rng):
        return self.captioned(kind, 0, "a" * self.args.text_length, rng)


def painting_flops(model: DualMLLM, words: int) -> tuple[float, float]:
    """FLOPs of painting one image after so many tokens, without guidance, which does all of it twice -> all, a position with its codes."""
    c, counter = model.config, flop_counter()
    cache, codes = Cache(c.llm, 1, words + c.positions, "cpu", torch.float32), torch.zeros(1, 1, len(c.streams), c.depth, dtype=torch.int64)
    with torch.no_grad(), counter:
        h = model.llm.hidden(torch.empty(1, words, c.llm.hidden_size), None, cache)[:, -1]
        prompt = counter.get_total_flops()
        for s, stream in enumerate(c.streams_out):
            model.heads[stream].sample(h, model.tables[s], lambda logits, d: logits.argmax(-1))
        written = counter.get_total_flops() - prompt
        model.llm.hidden(model.project(codes, torch.ones(1, dtype=torch.bool)), cache=cache)
    position = counter.get_total_flops() - prompt
    return prompt + c.positions * position - (position - written), position       # the last position is written, but not read


def to_generate(model: DualMLLM, precision: str, device: torch.device) -> DualMLLM:
    """For painting and answering: in bf16 on CUDA or by `precision`, but tables in fp32, since small residuals are added to large ones."""
    low = precision == "bf16" or precision == "auto" and device.type == "cuda"       # on a CPU the products are too small for bf16 to pay
    tables, model = model.tables, model.eval().requires_grad_(False).to(device, *[torch.bfloat16] * low)
    model.tables = tables.to(device)
    return model


def bench_painting(args, ranks: Ranks, model: DualMLLM, tokenizer: DualTokenizer):
    """--bench paint: guided pictures, from words to pixels, one at a time, 16, and on CUDA 64; with --compile also with a
    position compiled (CUDA: its layers) and made one graph. Weights need not be trained."""
    decoded = lambda n, graph: tokenizer.decode(model.paint(["a red circle above a blue square"] * n, graph=graph, **SAMPLING))
    for graph in (False, True) if args.compile else (False,):
        if graph and ranks.device.type == "cuda":
            compile_parts(model)
        for n in (1, 16, 64) if ranks.device.type == "cuda" else (1, 16):
            first, seconds = (seconds_of(lambda: decoded(n, graph), ranks.device, warmup=0, rounds=rounds) for rounds in (1, 3))
            ranks.say(f"painting{', compiled' * graph}, {n} at a time, {model.config.positions} positions, guided: {seconds:.3f} s, "
                      f"{n / seconds:.2f} images/s; the first time {first:.1f} s")


def bench_answering(ranks: Ranks, model: DualMLLM, words: int = 64):
    """--bench answer: a picture and a question, one at a time; beside transformers' Qwen2 of this shape, if it is installed."""
    c, device = model.config, ranks.device
    nothing = torch.zeros(c.positions, c.feature_width) if c.continuous else torch.zeros(c.positions, len(c.streams), c.depth).long()
    begin = lambda: model._begin([turn(model.text, [Picture(nothing), "what colour is the circle?"])], words)
    systems = {"ours": lambda n: list(model.write_words(*begin(), n, lambda logits: logits.argmax(-1)))}
    try:
        import transformers
        with torch.device(device):
            peer = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**asdict(c.llm))).to(next(model.parameters()).dtype).eval()
        ids = torch.randint(c.llm.vocab_size, (1, begin()[1].valid.sum().item()), device=device)        # as many places
        systems["transformers"] = lambda n: peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
                                                          do_sample=False, pad_token_id=0, eos_token_id=None)
    except ImportError:
        ranks.say("transformers is not installed, so there is no peer to compare with")
    with torch.no_grad():
        for name, write in systems.items():
            first, whole = (seconds_of(lambda n=n: write(n), device) for n in (1, words))
            ranks.say(f"answering, {name}: {1000 * first:.1f} ms until the first token, then {(words - 1) / (whole - first):.1f} tokens/s")


def bench_stage_growth(args, ranks: Ranks):
    """--bench growth: the last stage of a preset at other sizes, on one picture, whose codes are all 0."""
    tokenizer = preset_config(tokenizer_preset(args))
    usual, text, _ = build(args, tokenizer)
    row = stages_for(args, usual, False)[-1]
    row, width = replace(row, batch=args.batch_size or row.batch), usual.llm.hidden_size

    def make(what, size):
        wide = dict(hidden_size=size, intermediate_size=usual.llm.intermediate_size * size // width) if what == "width" else {}
        given = argparse.Namespace(**vars(args) | (dict(text_length=size) if what == "words" else {}))
        config = replace(usual, llm=replace(usual.llm, max_position_embeddings=32_768, **wide),
                         **({what.replace(" ", "_"): size} if what in ("positions", "codebook size") else {}))
        data = DrySequences("", given, ranks, text, config)
        parts, model = next(data.batches(row)(0))[0], DualMLLM(config, text).to(ranks.device)
        return MLLMStage(given, ranks, row, False, model, argparse.Namespace(config=tokenizer), None, data, None), parts
    bench_growth(args, ranks, f"stage-{row.name}", {
        "positions": [usual.positions * n for n in (1, 2, 4)], "words": [args.text_length * n for n in (1, 2, 4)],
        "width": [width * n for n in (1, 2, 4)], "codebook size": [usual.codebook_size * n for n in (1, 4, 16)]}, make)


def estimate(args):
    """What the stages of a preset cost, over the tokenizer of a preset, whose features or weights are not needed."""
    if args.streams_in == "continuous" or (args.llm and args.llm not in LLMS) or args.vocabulary:
        raise ValueError("--dry-run is of codes; leave out --streams-in continuous, --vocabulary, and an --llm that is no preset")
    tokenizer, ranks, count = preset_config(tokenizer_preset(args)), Ranks("cpu"), args.ranks or (8 if STAGES[args.preset] is PAPER else 1)
    config, text, _ = build(args, tokenizer)
    many, args.text_data = copy.copy(ranks), ""
    many.count = count

    def maker(row):     # the data are real, and what is made of them below is fake
        data = DrySequences("", args, many, text, config)
        parts = next(data.batches(row)(0))[0]
        return lambda: (MLLMStage(args, ranks, row, False, model, frozen, None, data, None), [(x.map(mode.from_tensor),) for x, in parts])
    makers = [maker(row) for row in named(stages_for(args, config, False), args)]

    with fake() as mode:
        model, frozen = DualMLLM(config, text), DualTokenizer(tokenizer)
        print(f"dry run of {args.llm or args.preset} over {tokenizer.preset}: sequences of {config.positions} positions and "
              f"{args.text_length} bytes, K {config.codebook_size}, E {config.code_dim}, D {config.depth}")
        print_parts([*parameter_table(model), ("tokenizer, frozen", sum(p.numel() for p in frozen.parameters()))])
        flops = {n: painting_flops(DualMLLM(replace(config, streams_in=config.streams[:n], streams_out=config.streams[:n]), text),
                                   args.text_length) for n in (1, 2)}
        dry_run(args, makers, count, "sequence")
    print(f"painting an image after {args.text_length} bytes, without guidance: {flops[2][0] / 1e9:,.0f} GFLOP with two streams, "
          f"{flops[2][0] / flops[1][0]:.3f} times those with one; a position and its codes: {flops[2][1] / 1e9:.2f}, "
          f"{flops[2][1] / flops[1][1]:.3f} times")
    print("paper, Table 11 (3B; of what, it does not say): 337.20 GFLOP a forward with two streams, 1.025 times the 328.98 with one")


if __name__ == "__main__":
    run(main)
