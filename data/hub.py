"""A checkpoint by its folder or by its name on the Hugging Face hub:

    folder("checkpoints/siglip")                        the folder itself
    folder("google/siglip-so400m-patch14-384")          in Hugging Face's cache; else in torch's, downloaded once

What is downloaded: config.json, the weights as safetensors (one file, or an index and its shards), the vocabulary, and the pixels' mean and
deviation. A file gets its name only when it is whole: a broken connection leaves nothing that looks finished, a whole file is kept.
"""
import contextlib
import errno
import http.client
import json
import os
import re
import socket
import urllib.error
import urllib.request

import torch

BESIDES = ("tokenizer.json", "vocab.json", "merges.txt", "preprocessor_config.json")     # of which a model has some


def folder(name: str) -> str:
    """The folder of a checkpoint. HF_HUB_CACHE and HF_HOME are looked into, HF_ENDPOINT is asked, as by Hugging Face's own library.
    Raises ValueError where the hub has no such model, or cannot be reached."""
    if os.path.exists(name) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return name         # a path that does not exist is reported by whoever opens it
    return _cached(name) or _downloaded(name)


def _cached(name: str) -> str | None:
    """Where Hugging Face's library keeps this model's configuration and weights; a vocabulary only if a program asked for it."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))
    model = os.path.join(cache, "models--" + name.replace("/", "--"))
    with contextlib.suppress(OSError, ValueError), open(os.path.join(model, "refs", "main"), encoding="utf-8") as file:
        found = os.path.join(model, "snapshots", file.read().strip())
        return found if all(os.path.exists(os.path.join(found, file)) for file in ("config.json", *weight_files(found))) else None


def weight_files(found: str) -> list[str]:
    """The weight files that a folder has or, by its index, should have. Raises ValueError for an index that is none."""
    path = os.path.join(found, "model.safetensors.index.json")
    if os.path.exists(os.path.join(found, "model.safetensors")) or not os.path.exists(path):
        return ["model.safetensors"]
    try:
        with open(path, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
        if odd := [name for name in names if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name)]:
            raise ValueError(f"got {odd[0][:100]!r}, expected files beside it")
        return names
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no index of safetensors files ({type(error).__name__}: {error}); copy or fetch it again") from None


def _downloaded(name: str) -> str:
    hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{hub}/{name}/resolve/main"
    found = os.path.join(torch.hub.get_dir(), "nanodualtoken", *name.split("/"))
    os.makedirs(found, exist_ok=True)
    with open(os.path.join(found, ".lock"), "w") as lock:
        with contextlib.suppress(ImportError, OSError):     # Windows, or a file system without locks: each downloads for itself
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX)        # of several processes on a machine one downloads; a process that ends leaves no lock
        if all(os.path.exists(os.path.join(found, file)) for file in ("config.json", *weight_files(found))):
            return found        # weights come last
        if not _fetch(url, found, "config.json"):
            raise ValueError(f"{name!r} is no folder here, and {url} has no config.json; check the spelling")
        for file in BESIDES:
            _fetch(url, found, file)
        if not _fetch(url, found, "model.safetensors") and not _fetch(url, found, "model.safetensors.index.json"):
            raise ValueError(f"{name!r} has no weights as safetensors at {url}; convert it, or name another model")
        for file in weight_files(found):
            if not _fetch(url, found, file):
                raise ValueError(f"{url} lacks {file}, which its index names; try again, or name another model")
    return found


def _fetch(url: str, found: str, file: str) -> bool:
    """Whether the hub has this file; if so, and not before, it lies in the folder under its name."""
    path, url = os.path.join(found, file), f"{url}/{file}"
    if os.path.exists(path):
        return True
    part, patience = f"{path}.{os.getpid()}.part", socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(60)        # seconds of silence; torch sets none
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as answer:
            size = int(answer.headers.get("Content-Length", -1))
        torch.hub.download_url_to_file(url, part)
        got = os.path.getsize(part)
        if size not in (-1, got):       # torch does not look
            raise ValueError(f"{url} broke off after {got:,} of {size:,} bytes; nothing of it is kept: try again")
        os.replace(part, path)
        return True
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return False
        closed = "no model has this name, or it is not open to all: check the spelling, or " * (error.code == 401)
        raise ValueError(f"{url} answers {error.code} ({error.reason}); {closed}download it by hand, and give its folder") from None
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise       # no matter of the connection
        raise ValueError(f"no such folder is here, and {url} cannot be fetched ({getattr(error, 'reason', error)}); "
                         "without a connection, give a folder that holds the model") from None
    finally:
        socket.setdefaulttimeout(patience)
        if os.path.exists(part):
            os.remove(part)
