"""
Real images with captions, from a few pictures in a folder to collections like CC12M. A source is one string:

    photos                       a folder, read recursively; the caption of a.jpg is in a.txt, or in a metadata.jsonl with
                                 "file_name" and "text" (or "caption") in each line, as Hugging Face's ImageFolder has it
    cc12m or cc12m/*.tar         tar shards as img2dataset writes them: NAME.jpg, and NAME.txt or NAME.json with a "caption"
    cc12m/{00000..01242}.tar     a range of shards; several sources are separated by commas

    train, held_out = ImageData("cc12m/{00000..01242}.tar", size=256).split()
    for images, captions, broken in train.load(batch_size=256, start=step, workers=8):      # (B, 3, 256, 256) uint8, lists of str

The scan notes where everything is (about 50 bytes per sample, and its name); from then on any sample can be read by its number. Which image
a training sample is, and which crop, follows from `seed` and its position in an endless stream, not from the number of ranks or workers: one
integer in a checkpoint is enough to go on exactly. A broken sample is replaced by a neighbour and reported: never fatal, never silent.
"""
import copy
import glob
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tarfile
import warnings
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from tqdm import tqdm

Image.preinit()     # asks BMP, GIF, JPEG, PPM and PNG first
Image.init()
# Without formats that Pillow recognises but cannot draw, and without EPS, for which it would run another program on the file's contents.
FORMATS = [name for name in Image.ID if name not in ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")]
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
MAX_BYTES = 256 << 20                   # what is larger is no picture
TRIES = 100                             # neighbours that may stand in for a broken sample
OPEN_SHARDS = 64                        # at a time and per process: 1,024 open files are a usual limit
HELD_OUT, MOST_HELD_OUT = 0.05, 5000    # of `split`: share, and samples
SCALE, RATIO = 0.9, 4 / 3               # of `random_crop`: smallest share of the area, most extreme width / height and height / width

# A sample: its name, a hash of that, the place of its image (offset -1: a file of its own in the folder `files[file]`) and of its
# caption (size 0: none; offset -1: the same-named .txt file). `files` are the folders, metadata.jsonl files and shards of the source.
RECORD = np.dtype([("name", "i8"), ("name_size", "i4"), ("hash", "u4"), ("file", "i4"), ("image", "i8"), ("image_size", "i4"),
                   ("text_file", "i4"), ("text", "i8"), ("text_size", "i4"), ("json", "?")])


# ---- pixels: bytes -> RGB picture -> (3, size, size) uint8 ----------------------------------------------------------

def decode(source, name=None, near=None):
    """Bytes, a path or an open binary file -> RGB PIL image: first frame, upright, transparency on white, deep grey scaled to 8 bits.
    `near`: the size in pixels it is needed at; a JPEG is then decoded at 1/2, 1/4 or 1/8 where that leaves both sides twice as long.
    Raises ValueError, with `name`, for what is damaged, cut, no image, or has more pixels than Pillow's limit."""
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            return decode(file, name, near)
    data, name = (source, name or "image") if isinstance(source, bytes) else (source.read(), name or source.name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)      # Pillow warns from its limit on, refuses from twice that
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if near:
                image.draft("RGB", (2 * near, 2 * near))    # a square, so it does not matter that the picture may yet be turned
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name}: too many pixels ({error}); expected at most {Image.MAX_IMAGE_PIXELS:,}: "
                         "shrink the image, or raise PIL.Image.MAX_IMAGE_PIXELS") from None
    except Exception as error:      # Pillow's plugins raise nearly anything on bad bytes: OSError, SyntaxError, struct.error, IndexError, ...
        reason = "0 bytes" if not data else "unknown format" if isinstance(error, UnidentifiedImageError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{name}: cannot be read as an image ({reason}); expected a complete file in a format that Pillow opens") from None


def _rgb(image):
    """PIL image of any mode -> RGB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_eight_bits(np.asarray(image), image.mode))     # Pillow's own conversion clips at 255
    elif image.mode == "LAB":       # the one mode that `convert` does not know
        return ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(values, mode):
    """Grey (H, W) uint16, int32 or float32 -> uint8. 16 bits keep their scale, in whichever type; anything else is scaled by its range."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if mode != "F" and 0 <= low and high <= 65535:
        low, high = 0.0, 65535.0
    values = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    return np.rint((values - low) * (255 / (high - low or 1))).astype(np.uint8)


def _resize(image, size, left, top, width, height):
    """A box of an RGB PIL image, in its pixels -> (3, size, size) uint8: cropped and resized (bicubic, antialiased) in one pass."""
    box = left, top, min(left + width, image.width), min(top + height, image.height)    # the sums may round beyond the edge
    return torch.from_numpy(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box)).transpose(2, 0, 1).copy())


def centre_crop(image, size):
    """RGB PIL image -> (3, size, size) uint8: the largest square in its middle. For evaluation."""
    side = min(image.size)
    return _resize(image, size, (image.width - side) / 2, (image.height - side) / 2, side, side)


def random_crop(image, size, rng):
    """RGB PIL image, numpy Generator -> (3, size, size) uint8. The box of torchvision's RandomResizedCrop, yet in fractions of a pixel: so
    a JPEG decoded at half its size is cut in the same place. No flip, because captions speak of left and right."""
    for _ in range(10):
        area = image.width * image.height * rng.uniform(SCALE, 1)
        aspect = math.exp(rng.uniform(-math.log(RATIO), math.log(RATIO)))
        width, height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if width <= image.width and height <= image.height:
            return _resize(image, size, rng.uniform(0, image.width - width), rng.uniform(0, image.height - height), width, height)
    width, height = min(image.width, image.height * RATIO), min(image.height, image.width * RATIO)      # too long or tall: its middle
    return _resize(image, size, (image.width - width) / 2, (image.height - height) / 2, width, height)


# ---- the scan: source -> files, records, names ----------------------------------------------------------------------

def _braces(pattern):
    """"a{08..10}.tar" -> ["a08.tar", "a09.tar", "a10.tar"]; also lists such as {0..3,7}, and several braces. An empty range is a ValueError."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    words = []
    for item in match[1].split(","):
        bounds = re.fullmatch(r"(\d+)\.\.(\d+)", item)
        if bounds and int(bounds[1]) > int(bounds[2]):
            raise ValueError(f"the range {{{item}}} in {pattern!r} is empty, expected {{first..last}} with first <= last: swap them")
        words += [f"{i:0{len(bounds[1])}d}" for i in range(int(bounds[1]), int(bounds[2]) + 1)] if bounds else [item]
    return [path for word in words for path in _braces(pattern[:match.start()] + word + pattern[match.end():])]


def _paths(source):
    """Source -> paths that exist, each once. Raises FileNotFoundError."""
    if os.path.exists(source):      # asked first: a folder's name may hold commas, brackets or braces
        return [source]
    paths = []
    for path in (path for part in re.split(r",(?![^{]*\})", source) for path in _braces(part.strip())):      # at commas outside braces
        found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not found:
            raise FileNotFoundError(f"no such image data: {path!r} of the source {source!r}; expected a folder of images, .tar shards, a pattern "
                                    "that matches some, or a range of them such as cc12m/{00000..01242}.tar: check the path")
        paths += found
    return list(dict.fromkeys(paths))


def _pack(rows, prefix=b""):
    """Rows of (name, and RECORD's fields from `file` on) -> RECORD array, their names run together (bytes)."""
    names = [os.fsencode(row[0]) for row in rows]
    starts = np.cumsum([0] + [len(name) for name in names])
    hashes = [int.from_bytes(hashlib.blake2b(prefix + name, digest_size=4).digest(), "little") for name in names]
    return np.array([(start, len(name), key, *row[1:]) for start, name, key, row in zip(starts, names, hashes, rows)], RECORD), b"".join(names)


def _is_image(name):
    return os.path.splitext(name)[1].lower() in SUFFIXES and not os.path.basename(name).startswith(".")      # ._a.jpg: a Mac's note on a.jpg


def _scan_tar(path):
    """Shard -> RECORD array, names, reports. Only headers are read; links, folders and sparse members are passed over."""
    members, rows, broken = {}, [], []
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            total = os.path.getsize(path)
            while member := tar.next():
                tar.members.clear()     # tarfile would keep them all
                if member.size > MAX_BYTES:
                    broken.append(f"{path}/{member.name}: left out for its {member.size:,} bytes, expected at most {MAX_BYTES:,}")
                elif member.isreg() and not member.issparse() and member.offset_data + member.size <= total:
                    members[member.name] = member.offset_data, member.size
            file.seek(tar.offset)       # tarfile takes a damaged or missing header for the end, but a complete archive ends in zeros
            if file.read(512) != bytes(512):
                raise ValueError(f"no header at byte {tar.offset:,} of {total:,}")
    except (OSError, ValueError, tarfile.TarError) as error:
        broken.append(f"{path}: cut, damaged or not a plain tar ({error}); the {len(members):,} members before that are used")
    for name in filter(_is_image, members):
        stem = os.path.splitext(name)[0]
        caption = next(((0, *members[stem + end], end == ".json") for end in (".txt", ".json") if stem + end in members), (0, 0, 0, False))
        rows.append((name, 0, *members[name], *caption))
    return *_pack(rows, os.fsencode(os.path.basename(path)) + b"/"), broken


def _scan_metadata(path):
    """metadata.jsonl -> {file_name: (offset, bytes) of its line}. Raises ValueError, with the line's number."""
    lines, offset = {}, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    lines[json.loads(line.decode("utf-8-sig", "replace"))["file_name"] + ""] = offset, len(line)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: got {line[:80]!r} ({type(error).__name__}), expected a JSON object "
                                 'such as {"file_name": "a.jpg", "text": "a caption"}: correct that line') from None
            offset += len(line)
    return lines


def _scan_folder(root, files, broken):
    """Folder -> [(RECORD array, names) of each folder in it], paths of the shards in it. Adds to `files` and `broken`."""
    home, packs, shards, captions, seen = len(files), [], [], {}, set()
    files.append(root)
    for folder, folders, names in os.walk(root, followlinks=True, onerror=lambda error: broken.append(f"cannot list a folder: {error}")):
        if os.path.realpath(folder) in seen:    # by way of a link
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names, within = sorted(names), lambda name: os.path.normpath(os.path.join(os.path.relpath(folder, root), name))
        if "metadata.jsonl" in names:
            files.append(os.path.join(folder, "metadata.jsonl"))
            captions |= {within(name): (len(files) - 1, *line, True) for name, line in _scan_metadata(files[-1]).items()}
        present, rows = set(names), []
        for name in filter(_is_image, names):
            beside = (home, -1, os.path.splitext(name)[0] + ".txt" in present, False)
            rows.append((within(name), home, -1, 0, *captions.pop(within(name), beside)))
        packs.append(_pack(rows))
        shards += [os.path.join(folder, name) for name in names if name.lower().endswith(".tar")]
    if captions:
        broken.append(f"{root}: {len(captions):,} lines of metadata.jsonl name a missing image, first {next(iter(captions))!r}")
    return packs, shards


def _scan(source):
    """Source -> files (paths), RECORD array, names (bytes), reports (str). Many shards are scanned in parallel."""
    files, packs, shards, broken = [], [], [], []
    for path in _paths(source):
        if not os.path.isdir(path) and not path.lower().endswith(".tar"):
            raise ValueError(f"the source {source!r} names {path!r}, expected folders and .tar files: name the folder the images are in")
        more_packs, more_shards = _scan_folder(path, files, broken) if os.path.isdir(path) else ([], [path])
        packs, shards = packs + more_packs, shards + more_shards
    shards = list(dict.fromkeys(shards))
    # torchrun starts several of us on one computer. Fork, because a fresh interpreter would run the calling script again.
    processes = min(len(shards) // 4, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    pool = ProcessPoolExecutor(processes, context) if processes > 1 else None
    scans = pool.map(_scan_tar, shards) if pool else map(_scan_tar, shards)
    quiet = len(shards) < 8 or os.environ.get("RANK", "0") != "0"
    for shard, (records, names, reports) in zip(shards, tqdm(scans, "scanning shards", len(shards), disable=quiet)):
        records["file"] = records["text_file"] = len(files)
        files.append(shard)
        packs.append((records, names))
        broken += reports
    if pool:
        pool.shutdown()
    offset = 0
    for records, names in packs:
        records["name"] += offset
        offset += len(names)
    if not offset:
        raise ValueError(f"no images in {source!r}, expected files such as .jpg, .png or .webp there: check the path"
                         + (f" ({len(broken)} problems, the first: {broken[0]})" if broken else ""))
    return files, np.concatenate([records for records, _ in packs]), b"".join(names for _, names in packs), broken


# ---- samples and batches --------------------------------------------------------------------------------------------

class ImageData:
    """The images of a source, `size` pixels square: for training shuffled anew in each epoch and cropped at random, else in order and
    cropped in the middle. `broken`: what the scan has to report. Raises FileNotFoundError or ValueError for a source without images."""

    def __init__(self, source, size, train=True, seed=0):
        if size < 1 or seed < 0:
            raise ValueError(f"got size {size} and seed {seed}, expected a size of at least 1 pixel and a seed of at least 0")
        self.size, self.train, self.seed = size, train, seed
        self.files, self.records, self.names, self.broken = _scan(source)
        self.epoch, self.permutation = None, None
        self.process, self.handles = None, {}

    def __len__(self):
        return len(self.records)

    def __getstate__(self):     # for copies and spawned workers: open files stay behind
        return {**self.__dict__, "epoch": None, "permutation": None, "process": None, "handles": {}}

    def split(self):
        """-> (train, held out): 5 % of the samples are held out, the same for every seed. Chosen by a hash of their names, so that a new or
        repaired shard does not carry old samples across. Raises ValueError for a single image."""
        if len(self) < 2:
            raise ValueError("got 1 image, expected at least 2 to hold one out: add images, or give a source for evaluation")
        held = min(max(round(HELD_OUT * len(self)), 1), MOST_HELD_OUT)
        ranked = np.argsort(self.records["hash"], kind="stable")
        train, val = copy.copy(self), copy.copy(self)
        train.records, train.train = self.records[np.sort(ranked[held:])], True
        val.records, val.train = self.records[np.sort(ranked[:held])], False
        return train, val

    def order(self, position):
        """Position in the endless stream -> index of its sample."""
        epoch, place = divmod(position, len(self))
        if not self.train:
            return place
        if epoch != self.epoch:     # 4 bytes per sample in each worker
            rng = np.random.default_rng([self.seed, 0, epoch])
            self.epoch, self.permutation = epoch, rng.permutation(np.arange(len(self), dtype=np.uint32))
        return int(self.permutation[place])

    def sample(self, position):
        """-> (image (3, size, size) uint8, caption, reports), a function of seed and position alone. For a broken image comes the next healthy
        one in index order; a missing caption is "". Raises ValueError if none of the next samples can be read."""
        first, broken = self.order(position), []
        for index in range(first, first + min(TRIES, len(self))):
            record = self.records[index % len(self)]
            path = os.path.join(os.fsencode(self.files[record["file"]]), self.names[record["name"]:record["name"] + record["name_size"]])
            name = path.decode("utf-8", "replace")
            try:
                image = decode(self._read(path, record["file"], record["image"], record["image_size"]), name, near=self.size)
            except (OSError, ValueError) as error:
                broken.append(str(error))
                continue
            try:
                caption = self._caption(path, record)
            except (OSError, ValueError, AttributeError, RecursionError) as error:     # AttributeError: other JSON than {"caption": "text"}
                caption = ""
                broken.append(f"{name}: its caption cannot be read ({type(error).__name__}: {error}) and is taken as empty")
            crop = random_crop(image, self.size, np.random.default_rng([self.seed, 1, position])) if self.train else centre_crop(image, self.size)
            return crop, caption, broken
        raise ValueError(f"nothing readable at position {position}: {len(broken)} samples in a row are broken, the first: {broken[0]}")

    __getitem__ = sample    # what DataLoader calls

    def load(self, batch_size, start=0, stop=None, rank=0, ranks=1, workers=0, pin=False):
        """-> DataLoader of (images (b, 3, size, size) uint8, captions, reports): this rank's b = batch_size / ranks samples of each global batch,
        from step `start` to before `stop`. In training step t has positions t * batch_size and on, a block per rank, without end unless `stop`
        is given. Evaluation goes once over the data, a rank over positions rank, rank + ranks, ...; its last batch may be smaller."""
        if batch_size < 1 or batch_size % ranks:
            raise ValueError(f"got a batch of {batch_size} for {ranks} ranks, expected a positive multiple of the number of ranks")
        local, mine = batch_size // ranks, range(rank, len(self), ranks)
        if self.train:
            end, positions = sys.maxsize, lambda step: range((step * ranks + rank) * local, (step * ranks + rank + 1) * local)
        else:
            end, positions = math.ceil(len(mine) / local), lambda step: mine[step * local:(step + 1) * local]
        steps = range(start, end if stop is None else min(stop, end))
        return torch.utils.data.DataLoader(
            self, batch_sampler=_Batches(steps, positions), collate_fn=_collate, num_workers=workers, worker_init_fn=start_worker,
            persistent_workers=workers > 0, prefetch_factor=4 if workers else None, pin_memory=pin,
            generator=torch.Generator())    # else every iterator takes a number from torch's own, and evaluating would change the training

    def _caption(self, path, record):
        """-> caption, "" where there is none. Raises what `sample` turns into a report."""
        if not record["text_size"]:
            return ""
        data = self._read(os.path.splitext(path)[0] + b".txt", record["text_file"], record["text"], record["text_size"])
        text = data.decode("utf-8-sig", "replace")      # captions come in any encoding; an odd letter should not cost the picture
        if record["json"]:
            keys = ("caption",) if record["image"] >= 0 else ("text", "caption")
            entry = json.loads(text)
            text = next((entry[key] for key in keys if entry.get(key) is not None), "")
        return text.strip()

    def _read(self, path, file, offset, size):
        """The bytes at an offset of `files[file]`, or, where that is -1, of the file `path`."""
        if offset < 0:
            if os.path.getsize(path) > MAX_BYTES:
                raise ValueError(f"{path.decode('utf-8', 'replace')}: {os.path.getsize(path):,} bytes, expected at most {MAX_BYTES:,}")
            with open(path, "rb") as handle:
                return handle.read()
        if self.process != os.getpid():     # a forked worker reads through handles of its own: shared ones would share their position
            self.process, self.handles = os.getpid(), {}
        if file not in self.handles:
            if len(self.handles) >= OPEN_SHARDS:
                self.handles.pop(next(iter(self.handles))).close()
            self.handles[file] = open(self.files[file], "rb")
        self.handles[file].seek(offset)
        return self.handles[file].read(size)


class _Batches:
    """What DataLoader draws batches from: the positions of each step."""

    def __init__(self, steps, positions):
        self.steps, self.positions = steps, positions

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        return map(self.positions, self.steps)


def _collate(samples):
    images, captions, broken = zip(*samples)
    return torch.stack(images), list(captions), sum(broken, [])


def start_worker(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C reaches every process; the training script decides when its workers stop
