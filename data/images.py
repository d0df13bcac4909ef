"""Real images with captions, from a few pictures in a folder to collections like CC12M. A source is one string:

    photos                       a folder, read recursively; the caption of a.jpg is in a.txt, or in a metadata.jsonl with
                                 "file_name" and "text" (or "caption") in each line, as Hugging Face's ImageFolder has it
    cc12m or cc12m/*.tar         tar shards as img2dataset writes them: NAME.jpg, and NAME.txt or NAME.json with a "caption"
    cc12m/{00000..01242}.tar     a range of shards, of which some may be missing; several sources are separated by commas

    train, held_out = ImageData("cc12m/{00000..01242}.tar", size=256).split()
    for images, captions, broken in train.load(batch_size=256, start=step, workers=8):      # (B, 3, 256, 256) uint8, lists of str

The scan notes where everything is (about 50 bytes per sample, and its name); from then on any sample can be read by its number. What it
finds in a shard is kept in torch's cache, or in the folder NANODUALTOKEN_INDEX (empty: nowhere), until its size or time changes.

Which image a training sample is, and which crop, follows from `seed` and its position in an endless stream, not from the number of ranks or
workers: one integer in a checkpoint is enough to go on exactly. Each epoch shuffles anew: everything at once where that is single files or
fits the buffer; else the shards, which are then read SHARDS at a time, by pieces in random order, through windows of a buffer's size. An
epoch may end inside a batch: nothing is dropped or comes twice. A broken sample is replaced and reported: never fatal, never silent.
"""
import contextlib
import copy
import functools
import glob
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import signal
import stat
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
# Of the shuffle. Random reads fall into 20,000 / 16 neighbouring samples of each of 16 shards, about 1 GB in all, which the page cache
# holds. Of fewer shards, a window would lack variety where they are sorted; of more, pieces would be shorter, and more files open.
SHARDS, BUFFER = 16, 20_000
HELD_OUT, MOST_HELD_OUT = 0.05, 5000    # of `split`: share, and samples
SCALE, RATIO = 0.9, 4 / 3               # of `random_crop`: smallest share of the area, most extreme width / height and height / width

# A sample: its name, a hash of that, the place of its image (offset -1: a file of its own in the folder `files[file]`) and of its
# caption (size 0: none; offset -1: the same-named .txt file). `files` are the folders, metadata.jsonl files and shards of the source.
RECORD = np.dtype([("name", "i8"), ("name_size", "i4"), ("hash", "u4"), ("file", "i4"), ("image", "i8"), ("image_size", "i4"),
                   ("text_file", "i4"), ("text", "i8"), ("text_size", "i4"), ("json", "?")])


# ---- pixels: bytes -> RGB picture -> (3, size, size) uint8 ----------------------------------------------------------

def decode(data, name="image", near=None):
    """A file's bytes -> RGB PIL image: first frame, upright, transparency on white, deep grey scaled to 8 bits.
    `near`: the size in pixels it is needed at; a JPEG is then decoded at 1/2, 1/4 or 1/8 where that leaves both sides twice as long.
    Raises ValueError, with `name`, for what is damaged, cut, no image, or has more pixels than Pillow's limit."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)      # Pillow warns from its limit on, refuses from twice that
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if near:
                image.draft("RGB", (2 * near, 2 * near))    # a square, so it does not matter that the picture may yet be turned
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"{name}: too many pixels (expected at most {Image.MAX_IMAGE_PIXELS:,}); shrink the image") from None
    except Exception as error:  # Pillow's plugins raise nearly anything on bad bytes: OSError, SyntaxError, struct.error, IndexError, ...
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "0 bytes" if not data else "unknown format" if unknown else f"{type(error).__name__}: {error}"
        raise ValueError(f"{name}: cannot be read as an image ({reason}); expected a complete file in a format that Pillow opens") from None


def _read_file(path, name):
    """-> bytes. Raises ValueError for what is no file, such as a device, which may have no end, or too large; OSError where nothing is."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
        got = f"{status.st_size:,} bytes" if stat.S_ISREG(status.st_mode) else "a folder, a pipe or a device"
        raise ValueError(f"{name}: {got}, expected a file of at most {MAX_BYTES:,} bytes")
    with open(path, "rb") as file:
        return file.read()


def _rgb(image):
    """PIL image of any mode -> RGB. Of deep grey 16 bits keep their scale, in whichever type; anything else is scaled by its range."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):       # Pillow's own conversion clips at 255
        values = np.asarray(image).astype(np.float64)
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
        if image.mode != "F" and 0 <= low and high <= 65535:
            low, high = 0.0, 65535.0
        values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
        image = Image.fromarray(np.rint((values - low) * (255 / (high - low or 1))).astype(np.uint8))
    elif image.mode == "LAB":       # the one mode that `convert` does not know
        return ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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
    """"a{08..10}.tar" -> ["a08.tar", "a09.tar", "a10.tar"]; also {0..3,7}, and several braces. Raises ValueError for an empty range."""
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
    """Source -> paths that exist, each once, and a report for each range that has holes. Raises FileNotFoundError, ValueError for a URL."""
    if os.path.exists(source):      # asked first: a folder's name may hold commas, brackets or braces
        return [source], []
    if "://" in source:
        raise ValueError(f"the source {source!r} is a URL, expected local files: download the shards first, and name their folder")
    paths, reports = [], []
    for part in map(str.strip, re.split(r",(?![^{]*\})", source)):      # at commas outside braces
        found = {path: [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True)) for path in _braces(part)}
        missing = [path for path in found if not found[path]]
        if len(missing) == len(found):
            raise FileNotFoundError(f"no such image data: {part!r} of the source {source!r}; expected a folder of images, .tar shards, "
                                    "a pattern that matches some, or a range of them such as cc12m/{00000..01242}.tar: check the path")
        if missing:
            reports.append(f"{part}: {len(missing):,} of {len(found):,} are missing and left out: "
                           f"{', '.join(missing[:10])}{', ...' * (len(missing) > 10)}")
        paths += sum(found.values(), [])
    return list(dict.fromkeys(paths)), reports


def _pack(rows, prefix=b""):
    """Rows of (name, and RECORD's fields from `file` on) -> RECORD array, their names run together (bytes); `_scan` sets their starts."""
    names = [os.fsencode(row[0]) for row in rows]
    hashes = [int.from_bytes(hashlib.blake2b(prefix + name, digest_size=4).digest(), "little") for name in names]
    records = [(0, len(name), key, *row[1:]) for name, key, row in zip(names, hashes, rows)]
    return np.array(records, RECORD), b"".join(names)


def _is_image(name):
    return os.path.splitext(name)[1].lower() in SUFFIXES and not os.path.basename(name).startswith(".")  # ._a.jpg: a Mac's note on a.jpg


class _Headers(io.BufferedReader):
    """A shard whose headers are read: tarfile takes a long name, or other words about a member, for as long as they say they are."""

    def read(self, size=-1):
        if not 0 <= size <= 1 << 20:
            raise ValueError(f"a header of {size:,} bytes")
        return super().read(size)


def _scan_tar(path):
    """Shard -> RECORD array, names, reports. Only headers are read; links, folders and sparse members are passed over."""
    members, rows, broken = {}, [], []
    try:
        with _Headers(io.FileIO(path)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            total = os.path.getsize(path)
            while member := tar.next():
                tar.members.clear()     # tarfile would keep them all
                if tar.offset <= member.offset:     # a size below zero, and tarfile would go round in circles
                    raise ValueError(f"a header that leads back at byte {member.offset:,} of {total:,}")
                if member.size > MAX_BYTES:
                    broken.append(f"{path}/{member.name}: left out for its {member.size:,} bytes, expected at most {MAX_BYTES:,}")
                elif member.isreg() and not member.issparse() and member.offset_data + member.size <= total:
                    members[member.name] = member.offset_data, member.size
            file.seek(tar.offset)       # tarfile takes a damaged or missing header for the end, but a complete archive ends in zeros
            if file.read(512) != bytes(512):
                raise ValueError(f"no header at byte {tar.offset:,} of {total:,}")
    except (OSError, ValueError, OverflowError, RecursionError, tarfile.TarError) as error:     # 90-bit sizes; a member of 1,000 headers
        broken.append(f"{path}: cut, damaged or not a plain tar ({error}); the {len(members):,} members before that are used")
    for name in filter(_is_image, members):
        stem = os.path.splitext(name)[0]
        caption = next(((0, *members[stem + end], end == ".json") for end in (".txt", ".json") if stem + end in members), (0, 0, 0, False))
        rows.append((name, 0, *members[name], *caption))
    return *_pack(rows, os.fsencode(os.path.basename(path)) + b"/"), broken


def _kept(path, stamp):
    """File of the cache -> RECORD array, names, [], as `_scan_tar` found them; None if it is missing, damaged or out of date."""
    with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as kept:    # a zip file: damaged, it may raise nearly anything
        records, names = kept["records"], kept["names"].tobytes()
        return (records, names, []) if kept["stamp"].tolist() == stamp and records.dtype == RECORD else None


def _scan_shard(path, folder):
    """`_scan_tar`, its result kept in `folder` ("": nowhere). Of several processes at it, one scans and the others wait; who ends leaves no
    lock. Of a shard with something to report nothing is kept: it may have been a bad moment of the disk, and is to be reported again."""
    if not folder:
        return _scan_tar(path)
    scan = None
    try:
        status, asked = os.stat(path), repr(["scan 2", os.path.abspath(path), sorted(SUFFIXES), MAX_BYTES])
        key, stamp = hashlib.blake2b(asked.encode(), digest_size=16).hexdigest(), [status.st_size, status.st_mtime_ns]
        file = os.path.join(folder, key + ".npz")
        if kept := _kept(file, stamp):
            return kept
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "lock"), "ab") as lock:
            with contextlib.suppress(ImportError):          # Windows: each scans for itself
                import fcntl
                fcntl.lockf(lock, fcntl.LOCK_EX, 1, int(key[:15], 16))      # one byte of it, so that other shards are not waited for
            if kept := _kept(file, stamp):
                return kept
            scan = _scan_tar(path)
            if not scan[2]:
                with open(file + ".tmp", "wb") as out:
                    np.savez_compressed(out, stamp=stamp, records=scan[0], names=np.frombuffer(scan[1], np.uint8))
                os.replace(out.name, file)
            return scan
    except OSError as error:
        records, names, broken = scan or _scan_tar(path)
        return records, names, broken or [f"what is in shards cannot be kept in {folder} ({error.strerror}), and is looked up in them "
                                          "at every start: set NANODUALTOKEN_INDEX to another folder, or to nothing"]


def _scan_metadata(path):
    """metadata.jsonl -> {file_name: (offset, bytes) of its line}. Raises ValueError, with the line's number."""
    lines = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    lines[json.loads(line.decode("utf-8-sig", "replace"))["file_name"] + ""] = file.tell() - len(line), len(line)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: got {line[:80]!r} ({type(error).__name__}), expected a JSON object "
                                 'such as {"file_name": "a.jpg", "text": "a caption"}: correct that line') from None
    return lines


def _scan_folder(root, files, packs, shards, broken):
    """Adds a folder to these: (RECORD array, names) of each folder in it to `packs`, the paths of the shards in it to `shards`."""
    home, captions, seen = len(files), {}, set()
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


def _scan(source):
    """Source -> files (paths), RECORD array, names (bytes), reports (str). Many shards are scanned in parallel."""
    files, packs, shards, (paths, broken) = [], [], [], _paths(source)
    for path in paths:
        if not os.path.isdir(path) and not path.lower().endswith(".tar"):
            raise ValueError(f"the source {source!r} names {path!r}, expected folders and .tar files: name the folder the images are in")
        _scan_folder(path, files, packs, shards, broken) if os.path.isdir(path) else shards.append(path)
    shards = list(dict.fromkeys(shards))
    # torchrun starts several of us on one computer. Fork, because a fresh interpreter would run the calling script again.
    processes = min(len(shards) // 4, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    folder = os.environ.get("NANODUALTOKEN_INDEX", os.path.join(torch.hub.get_dir(), "nanodualtoken", "index"))
    shuffled = np.random.default_rng().permutation(len(shards))      # every rank in another order: so they seldom wait for each other
    quiet = len(shards) < 8 or os.environ.get("RANK", "0") != "0"
    with ProcessPoolExecutor(processes, context) if processes > 1 else contextlib.nullcontext() as pool:
        scans = (pool.map if pool else map)(functools.partial(_scan_shard, folder=folder), [shards[i] for i in shuffled])
        scanned = sorted(zip(shuffled.tolist(), tqdm(scans, "scanning shards", len(shards), disable=quiet)))
    for i, (records, names, reports) in scanned:
        records["file"] = records["text_file"] = len(files)
        files.append(shards[i])
        packs.append((records, names))
        broken += reports
    names = b"".join(names for _, names in packs)
    if not names:
        raise ValueError(f"no images in {source!r}, expected files such as .jpg, .png or .webp there: check the path"
                         + (f" ({len(broken)} problems, the first: {broken[0]})" if broken else ""))
    records = np.concatenate([records for records, _ in packs])
    records["name"] = np.cumsum(records["name_size"], dtype=np.int64) - records["name_size"]
    return files, records, names, list(dict.fromkeys(broken))


# ---- samples and batches --------------------------------------------------------------------------------------------

class ImageData:
    """The images of a source, `size` pixels square: for training shuffled anew in each epoch and cropped at random, else in order and
    cropped in the middle. `broken`: what the scan has to report. `num_samples`: how many of them an epoch draws, each time anew; 0: all.
    `buffer`: samples that are shuffled with each other. Raises FileNotFoundError or ValueError for a source without images."""

    def __init__(self, source, size, train=True, seed=0, num_samples=0, buffer=BUFFER):
        self.size, self.seed, self.num_samples, self.buffer = size, seed, num_samples, buffer
        self.files, records, self.names, self.broken = _scan(source)
        _opened.cache_clear()       # a shard may have become another file since
        self._hold(records, train)

    def _hold(self, records, train):
        """Takes these records. `starts`, `sizes`: of the shards' runs among them; `loose`: indices of those shuffled as a whole."""
        starts = np.flatnonzero(np.r_[True, records["file"][1:] != records["file"][:-1]])
        sizes, tar = np.diff(starts, append=len(records)), (records["image"][starts] >= 0) & (len(records) > self.buffer)
        self.records, self.train, self.starts, self.sizes = records, train, starts[tar], sizes[tar]
        self.epoch = None       # `order` deals anew
        self.loose = np.flatnonzero(~np.repeat(tar, sizes)).astype(np.uint32)
        return self

    def __len__(self):
        return len(self.records)

    def split(self):
        """-> (train, held out): 5 % of the samples are held out, the same for every seed. Chosen by a hash of their names, so that a new or
        repaired shard does not carry old samples across. Raises ValueError for a single image."""
        if len(self) < 2:
            raise ValueError("got 1 image, expected at least 2 to hold one out: add images, or give a source for evaluation")
        held = min(max(round(HELD_OUT * len(self)), 1), MOST_HELD_OUT)
        chosen = np.zeros(len(self), bool)
        chosen[np.argpartition(self.records["hash"], held - 1)[:held]] = True       # the smallest, in a tenth of the time of sorting
        return copy.copy(self)._hold(self.records[~chosen], True), copy.copy(self)._hold(self.records[chosen], False)

    def order(self, position):
        """Position in the endless stream -> index of its sample."""
        if not self.train:
            return position % len(self)
        epoch, place = divmod(position, self.num_samples or len(self))
        if epoch != self.epoch:
            self.epoch, self.group, (self.groups, self.edges) = epoch, None, self._deal(epoch)
        group = int(np.searchsorted(self.edges, place, "right")) - 1
        if group != self.group:
            self.group, self.rows = group, self._shuffled(epoch, group)
        return int(self.rows[place - self.edges[group]])

    def _deal(self, epoch):
        """Epoch -> its groups, each of at most SHARDS shards (numbers) and a share of the loose samples (indices); where each begins."""
        rng = np.random.default_rng([self.seed, 0, epoch])
        loose, shards = rng.permutation(self.loose), rng.permutation(len(self.starts))      # 4 bytes a loose sample in each worker
        count = max(1, math.ceil(len(shards) / SHARDS))
        groups = list(zip(np.array_split(shards, count), np.array_split(loose, count)))
        return groups, np.cumsum([0] + [self.sizes[shards].sum() + len(loose) for shards, loose in groups])[:-1]

    def _shuffled(self, epoch, group):
        """A group's indices in order: its shards in pieces, SHARDS of which make a window, the pieces and then each window shuffled."""
        shards, loose = self.groups[group]
        if not len(shards):
            return loose
        rng = np.random.default_rng([self.seed, 2, epoch, group])
        parts = [np.arange(self.starts[i], self.starts[i] + self.sizes[i], dtype=np.uint32) for i in shards] + [loose]
        pieces = [piece for part in parts for piece in np.array_split(part, math.ceil(len(part) * SHARDS / self.buffer) or 1)]
        rows = np.concatenate([pieces[i] for i in rng.permutation(len(pieces))])
        for window in np.array_split(rows, math.ceil(len(rows) / self.buffer)):
            rng.shuffle(window)
        return rows

    def path(self, record):
        """Of a record's image, as bytes: its file, or its shard and its name there."""
        return os.path.join(os.fsencode(self.files[record["file"]]), self.names[record["name"]:record["name"] + record["name_size"]])

    def sample(self, position):
        """-> (image (3, size, size) uint8, caption, reports), a function of seed and position alone. For a broken image comes the next
        healthy one in index order, or one from anywhere, where its shard is gone or ten in a row are broken; a missing caption is "".
        Raises ValueError if none of TRIES samples can be read."""
        index, broken = self.order(position), []
        for attempt in range(TRIES):
            record = self.records[index]
            path = self.path(record)
            name = path.decode("utf-8", "replace")
            try:
                image = decode(self._read(path, record["file"], record["image"], record["image_size"]), name, near=self.size)
            except (OSError, ValueError) as error:
                broken.append(str(error))
                index = (index + 1) % len(self)
                if isinstance(error, OSError) and record["image"] >= 0 or attempt % 10 == 9:        # its neighbours are lost too
                    index = int(np.random.default_rng([self.seed, 3, position, attempt]).integers(len(self)))
                continue
            try:
                caption = self._caption(path, record)
            except (OSError, ValueError, AttributeError, RecursionError) as error:     # AttributeError: other JSON than {"caption": "text"}
                caption = ""
                broken.append(f"{name}: its caption cannot be read ({type(error).__name__}: {error}) and is taken as empty")
            rng = np.random.default_rng([self.seed, 1, position])
            crop = random_crop(image, self.size, rng) if self.train else centre_crop(image, self.size)
            return crop, caption, list(dict.fromkeys(broken))
        raise ValueError(f"nothing readable at position {position}: {len(broken)} samples tried are broken, the first: {broken[0]}")

    __getitem__ = sample    # what DataLoader calls

    def load(self, batch_size, start=0, stop=None, rank=0, ranks=1, workers=0, pin=False):
        """-> one pass over (images (b, 3, size, size) uint8, captions, reports): this rank's b = batch_size / ranks samples of each global
        batch, from step `start` to before `stop`. In training step t has positions t * batch_size and on, a block per rank, without end
        but for `stop`. Evaluation goes once over the data, a rank over positions rank, rank + ranks, ...; the last batch may be smaller."""
        local, mine = batch_size // ranks, range(rank, len(self), ranks)
        if self.train:
            end, positions = sys.maxsize, lambda step: range((step * ranks + rank) * local, (step * ranks + rank + 1) * local)
        else:
            end, positions = math.ceil(len(mine) / local), lambda step: mine[step * local:(step + 1) * local]
        steps = range(start, end if stop is None else min(stop, end))
        return torch.utils.data.DataLoader(
            self, batch_sampler=map(positions, steps), collate_fn=_collate, num_workers=workers, worker_init_fn=start_worker,
            prefetch_factor=4 if workers else None, pin_memory=pin,
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
            return _read_file(path, path.decode("utf-8", "replace"))
        try:
            shard = _opened(self.files[file], os.getpid())
            shard.seek(offset)
            if len(data := shard.read(size)) < size:
                raise OSError(None, "it was longer")
            return data
        except OSError as error:        # in the same words for all its samples, to be said once
            _opened.cache_clear()       # the next time it is opened anew
            raise OSError(f"{self.files[file]}: gone or cut since the scan ({error.strerror})") from None


@functools.lru_cache(OPEN_SHARDS)
def _opened(shard, process):    # a forked worker reads through handles of its own: shared ones would share their position
    return open(shard, "rb")


class Pictures(torch.utils.data.Dataset):
    """Image files by their paths: ((3, size, size) uint8, the largest square in the middle, and why it cannot be read, or "")."""

    def __init__(self, paths, size):
        self.paths, self.size = paths, size

    def __getitem__(self, i):
        path = self.paths[i]
        try:
            return centre_crop(decode(_read_file(path, path), path, self.size), self.size), ""
        except (OSError, ValueError) as error:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), str(error)[:500]        # a path can be of any length


def _collate(samples):
    images, captions, broken = zip(*samples)
    return torch.stack(images), list(captions), sum(broken, [])


def start_worker(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C reaches every process; the training script decides when its workers stop
