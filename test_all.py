"""The tests, grouped by component: `pytest test_all.py -q`, or one group, `pytest test_all.py -k rvq`. Groups: shapes, reader, images, rvq,
tokenizer, losses, train, text, mllm, sample, fuzz, project. Seconds each; minutes are marked slow and wait for `-m slow`. Tests against
reference numbers and real images find them through the variable NANODUALTOKEN_SHARED and skip, with the reason, where it is not set; parity
tests skip where transformers is not installed."""

import ast
import base64
import collections
import contextlib
import copy
import errno
import functools
import gc
import glob
import http.server
import importlib.util
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import string
import struct
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import traceback
import unicodedata
import warnings
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import EpsImagePlugin, Image, ImageCms
from safetensors.torch import load_file, save_file
from torch._subclasses import FakeTensor

import mllm
import rvq
import sample
import train_mllm
import train_tokenizer
from data import hub, images, records, shapes
from data.shapes import World
from losses import (Discriminator, Moments, Weights, adaptive_weight, discriminator_loss, distance, frechet_distance, psnr,
                    sigmoid_contrastive, ssim,
                    tokenizer_losses, weighted)
from mllm import (KNOWN, LLM, LLMS, MARKS, SPECIALS, Cache, DualMLLM, LLMConfig, MLLMConfig, Picture, TextTokenizer, Words, code_tables,
                  document, pack, turn)
from rvq import QUANTIZERS, histogram, usage_and_perplexity
from tokenizer import (ACTIVATIONS, DESIGNS, DualTokenizer, Projection, SigLIP, TextConfig, TextVocabulary, TokenizerConfig, VisionConfig,
                       VisionTower, layer_similarity,
                       load_weights, preset_config, read_towers, split_layers)

HERE = os.path.dirname(os.path.abspath(__file__))
SHARED = os.environ.get("NANODUALTOKEN_SHARED", "/nowhere")
EMOJI, PHOTOS = os.path.join(SHARED, "data/fluent-emoji"), os.path.join(SHARED, "data/photos")
os.environ["NANODUALTOKEN_INDEX"] = ""      # nothing of the tests stays in the user's cache
if "PYTEST_XDIST_WORKER" in os.environ:     # -n 2: a thread each
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
os.environ["PYTHONFAULTHANDLER"] = "1"      # a process of the tests that crashes says where
with warnings.catch_warnings():
    warnings.simplefilter("ignore")         # there is no pytest.ini where the mark could be made known
    is_slow = pytest.mark.slow
is_skipped = pytest.mark.skipif("'slow' not in config.option.markexpr", reason="slow: python -m pytest test_all.py -q -m slow")
slow = lambda test: is_slow(is_skipped(test))
needs_shared = pytest.mark.skipif(not os.path.isdir(EMOJI), reason="no fluent-emoji and photos: set NANODUALTOKEN_SHARED")


# ---------------------------------------------------------------------------------------------------------------------
# data/shapes.py

SKILLS = {"single", "relation", "count", "differ", "compare", "negate", "universal"}


def worlds(**kw):
    return [shapes.World(d, **kw) for d in shapes.DIFFICULTIES]


def test_shapes_sample_is_a_function_of_seed_split_and_index():
    for world in worlds(seed=3, single=0.5):
        images, captions = world.batch(range(40))
        some, words = world.batch([33, 7, 7])
        assert torch.equal(some, images[[33, 7, 7]]) and words == [captions[33], captions[7], captions[7]]
        for other in (shapes.World(world.difficulty, seed=4, single=0.5), shapes.World(world.difficulty, seed=3, single=0.5, split="val")):
            assert not any(a == b for a, b in zip(world.scenes(range(40)), other.scenes(range(40))))


def test_shapes_images_have_the_promised_form():
    for world in worlds(size=48):
        images, captions = world.batch(range(16))
        assert images.shape == (16, 3, 48, 48) and images.dtype == torch.float32 and images.min() >= -1 and images.max() <= 1
        assert len(captions) == 16 and images.flatten(1).std(1).min() > 0.05


def test_shapes_validation_is_never_training():
    for difficulty in shapes.DIFFICULTIES:
        for seed in range(4):
            for single in (0.0, 1.0):
                drawn = {s: shapes.World(difficulty, seed=seed, split=s, single=single).scenes(range(500)) for s in shapes.SPLITS}
                assert not shapes.is_validation(drawn["train"]).any()
                assert shapes.is_validation(drawn["val"]).all() and shapes.is_validation(drawn["held_out"]).all()


def test_shapes_validation_does_not_depend_on_order_or_ground():
    scenes = shapes.World("textured", single=0, split="val").scenes(range(200))
    turned = shapes.pack([shapes.Scene(scene[::-1], (1, 3, 2, 0, 9, 9, 9, 0, 9)) for scene in scenes])
    assert shapes.is_validation(turned).all()


def test_shapes_held_out_pairs():
    assert [len(shapes.held_out_pairs(d)) for d in shapes.DIFFICULTIES] == [2, 8]
    for difficulty in shapes.DIFFICULTIES:
        held, seen = set(shapes.held_out_pairs(difficulty)), set(shapes.seen_pairs(difficulty))
        assert not held & seen and len(held | seen) == shapes.KINDS[difficulty] ** 2
        for split in ("train", "val"):
            for single in (0.0, 1.0):
                drawn = {(o.colour, o.shape) for scene in shapes.World(difficulty, split=split, single=single).scenes(range(2000))
                         for o in scene}
                assert drawn == seen
        alone = list(shapes.World(difficulty, split="held_out").scenes(range(300)))
        assert all(len(scene) == 1 for scene in alone) and {(s[0].colour, s[0].shape) for s in alone} == held
        mixed = list(shapes.World(difficulty, split="held_out", single=0.0).scenes(range(300)))
        assert all((s[0].colour, s[0].shape) in held and not held & {(o.colour, o.shape) for o in s[1:]} for s in mixed)


def test_shapes_never_overlap_and_lie_inside():
    for world in worlds(single=0.0):
        for scene in world.scenes(range(3000)):
            for i, o in enumerate(scene):
                r = shapes.RADIUS[o.size]
                assert r <= o.x <= 1 - r and r <= o.y <= 1 - r
                for p in scene[i + 1:]:
                    assert (o.x - p.x) ** 2 + (o.y - p.y) ** 2 >= (r + shapes.RADIUS[p.size] + shapes.GAP - 0.01) ** 2


def test_shapes_share_of_single_scenes_and_of_plain_captions():
    for world in worlds():
        scenes = world.scenes(range(2000))
        claims = [shapes.caption(scene, roll) for scene, roll in zip(scenes, scenes.roll.tolist())]
        assert abs((scenes.count == 1).float().mean() - 0.8) < 0.03
        assert set(scenes.count.tolist()) == {1, 2, 3, 4}
        named = [claim.text == shapes._a(scene[0].noun) for scene, claim in zip(scenes, claims) if len(scene) == 1]
        assert 0.65 < sum(named) / len(named) < 0.75
        skills = Counter(claim.skill for claim in claims)
        assert skills["negate"] + skills["universal"] < 0.1 * len(claims)


def test_shapes_pack_is_the_inverse_of_iteration():
    for world in worlds(single=0.3):
        scenes = world.scenes(range(200))
        again = shapes.pack(list(scenes))
        assert list(again) == list(scenes) and torch.equal(again.look, scenes.look)
        assert torch.equal(shapes.render(again, 32), shapes.render(scenes, 32))
    with pytest.raises(ValueError, match="0"):
        shapes.pack([shapes.Scene(())])


def test_shapes_claims_hold_of_their_scene_and_fail_of_others():
    for world in worlds(single=0.3, seed=5):
        scenes = list(world.scenes(range(300)))
        skills, truth = set(), {}
        for scene, other in zip(scenes, scenes[1:]):
            said = shapes.claims(scene)
            assert len({claim.text for claim in said}) == len(said)
            for claim in said:
                assert claim.holds(scene), claim.text
                truth.setdefault(claim.skill, []).append(claim.holds(other))
                # of another scene, a claim holds exactly where the templates would make it, or differ only in the order of two nouns
                if claim.skill in ("relation", "compare", "count", "negate", "universal"):
                    assert claim.holds(other) == (claim.text in {c.text for c in shapes.claims(other)}), claim.text
            skills |= {claim.skill for claim in said}
        assert skills == (SKILLS if world.difficulty == "textured" else SKILLS - {"compare"})
        assert all(sum(held) / len(held) < (0.8 if skill == "negate" else 0.4) for skill, held in truth.items())


def test_shapes_claims_by_hand():
    look = (1,) + (0,) * 8
    red = shapes.Object("circle", "red", "small", 0.2, 0.5)
    blue = shapes.Object("square", "blue", "large", 0.7, 0.45)
    texts = {claim.text: claim for claim in shapes.claims(shapes.Scene((red, blue), look))}
    assert {"a red circle left of a blue square", "a blue square right of a red circle", "a blue square larger than a red circle",
            "two shapes",
            "one red circle and one blue square", "no crosses"} <= set(texts)
    assert not any("above" in text or "below" in text or text.startswith("all") for text in texts)         # 0.05 apart: not said
    swapped = shapes.Scene((red._replace(x=0.7), blue._replace(x=0.2)), look)
    assert not texts["a red circle left of a blue square"].holds(swapped)
    both = shapes.Scene((red, red._replace(x=0.7, colour="orange")), look)
    assert {"one red and one orange circle", "two circles", "all shapes are circles", "a red circle left of an orange circle"} <= {
        claim.text for claim in shapes.claims(both)}


def test_shapes_text_is_short_plain_and_of_its_world():
    for world in worlds(single=0.3):
        n = shapes.KINDS[world.difficulty]
        foreign = set(shapes.SHAPES[n:] + shapes.COLOURS[n:] + (shapes.SIZES if n == 4 else ()))
        foreign |= {shapes._plural(shape) for shape in shapes.SHAPES[n:]}
        for scene in world.scenes(range(300)):
            texts = [claim.text for claim in shapes.claims(scene)]
            asked = [text for _, *pair in shapes.questions(scene) for text in pair]
            assert max(len(text.encode()) for text in texts) <= 60
            for text in texts + asked:
                assert text == text.lower() and not foreign & set(text.rstrip("?").split()), text
                assert not any(bad in f" {text}" for bad in (" a orange", " an red", "crosss", "one circles"))


def test_shapes_questions_are_balanced_and_right():
    for world in worlds(single=0.3):
        types = Counter()
        for scene in world.scenes(range(400)):
            nouns = [o.noun for o in scene]
            yes = Counter()
            for kind, question, answer in shapes.questions(scene):
                types[kind] += 1
                if answer in ("yes", "no"):
                    yes[kind] += 1 if answer == "yes" else -1
                words = question.rstrip("?").split()
                if kind == "existence":
                    assert (" ".join(words[-2:]) in nouns) == (answer == "yes")
                if kind == "colour":
                    named = [o.colour for o in scene if words[-1] in (o.shape, shapes._plural(o.shape))]
                    assert set(named) == {answer}
                if kind == "count":
                    what = words[2:-2]
                    number = sum(what == ["shapes"] or what[0] == o.colour or what[0] == shapes._plural(o.shape) for o in scene)
                    assert shapes.NUMBERS[number] == answer
                if kind == "relation" and "above" in question:
                    first, second = question.removeprefix("is the ").rstrip("?").split(" above the ")
                    a, b = ([o for o in scene if f"{o.size} {o.noun}".endswith(name)] for name in (first, second))
                    assert len(a) == len(b) == 1 and abs(a[0].y - b[0].y) >= shapes.MARGIN and (a[0].y < b[0].y) == (answer == "yes")
            assert not any(yes.values())
        assert set(types) == {"colour", "shape", "count", "existence", "relation", "comparison"}


def test_shapes_edits_are_valid_and_can_be_read():
    rng, done = random.Random(0), Counter()
    for world in worlds(single=0.4, size=64):
        scenes = list(world.scenes(range(120)))
        made = [(scene, shapes.edits(scene, rng)) for scene in scenes]
        made = [(before, *edit) for before, edit in made if edit]
        assert len(made) >= 0.98 * len(scenes)
        after = shapes.pack([edit[3] for edit in made])
        assert not shapes.is_validation(after).any()                        # from training scenes only
        read = shapes.read(shapes.render(after, 64), world.difficulty)
        for (before, kind, text, scene), seen in zip(made, read):
            done[kind] += 1
            assert scene != before and scene.look == before.look and shapes.same(seen, scene), text
            assert len(scene) - len(before) == {"add": 1, "remove": -1}.get(kind, 0)
            if kind == "move":
                (old,), (new,) = set(before) - set(scene), set(scene) - set(before)
                assert {"left": old.x - new.x, "right": new.x - old.x, "up": old.y - new.y,
                        "down": new.y - old.y}[text.split()[-1]] >= shapes.MARGIN
            assert {(o.colour, o.shape) for o in scene} <= set(shapes.seen_pairs(world.difficulty))
            assert shapes.carried_out(kind, before, scene, seen) and not shapes.carried_out(kind, before, scene, None)
            assert not shapes.carried_out(kind, before, scene, before)
            if kind == "move":          # the other way
                away = shapes.Scene([o._replace(x=2 * old.x - o.x, y=2 * old.y - o.y) if o == new else o for o in scene])
                assert not shapes.carried_out(kind, before, scene, away)
    assert set(done) == set(shapes.EDITS) and min(done.values()) > 20


@pytest.mark.parametrize("difficulty, size, least", [("plain", 32, 0.99), ("plain", 64, 0.99), ("textured", 64, 0.98),
                                                     ("textured", 32, 0.97),
                                                     ("textured", 100, 0.97)])
def test_reader_reads_what_is_drawn(difficulty, size, least):
    scenes = shapes.World(difficulty, split="val", single=0.25).scenes(range(200))
    read = shapes.read(shapes.render(scenes, size), difficulty)
    assert sum(shapes.same(a, b, 0.02) for a, b in zip(read, scenes)) >= least * 200


def test_reader_stands_mild_blur_and_noise():
    for difficulty in shapes.DIFFICULTIES:
        scenes = shapes.World(difficulty, split="val", single=0.25).scenes(range(200))
        images = shapes.render(scenes, 32)
        noise = 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        soft = F.avg_pool2d(F.pad(images, (1, 0, 1, 0), mode="replicate"), 2, 1)
        for worse in (images + noise, soft):
            assert sum(shapes.same(a, b) for a, b in zip(shapes.read(worse, difficulty), scenes)) >= 0.95 * 200


def test_reader_refuses_garbage():
    rng = torch.Generator().manual_seed(0)
    blank = (torch.rand(50, 3, 1, 1, generator=rng) * 2 - 1).expand(-1, -1, 32, 32)
    noise = torch.rand(50, 3, 32, 32, generator=rng) * 2 - 1
    clouds = F.interpolate(torch.rand(50, 3, 6, 6, generator=rng), 32, mode="bilinear") * 2 - 1
    ticks = (torch.arange(32) + 0.5) / 32 - 0.5
    bar = (ticks.abs() < 0.07) & (ticks[:, None].abs() < 0.2)
    bars = torch.where(bar, shapes.PALETTE[:, :, None, None] * 2 - 1, torch.tensor(0.8))
    for garbage in (blank, noise, clouds, bars):
        for difficulty in shapes.DIFFICULTIES:
            assert shapes.read(garbage, difficulty) == [None] * len(garbage)


def test_reader_refuses_colours_between_two_names(monkeypatch):
    scenes = shapes.World("plain", split="val", single=1.0).scenes(range(64))
    between = (shapes.PALETTE + shapes.PALETTE.roll(-1, 0)) / 2
    assert None not in shapes.read(shapes.render(scenes, 32))
    monkeypatch.setattr(shapes, "PALETTE", between)
    images = shapes.render(scenes, 32)
    monkeypatch.undo()
    assert sum(scene is not None for scene in shapes.read(images)) <= 6


def test_reader_same_ignores_order_but_nothing_else():
    a = shapes.Object("circle", "red", "large", 0.3, 0.3)
    b = shapes.Object("square", "blue", "large", 0.7, 0.7)
    pair = shapes.Scene((a, b))
    assert shapes.same(pair, shapes.Scene((b, a._replace(x=0.32))))
    for wrong in (shapes.Scene((a,)), shapes.Scene((a, b._replace(colour="red"))), shapes.Scene((a, b._replace(x=0.5))),
                  shapes.Scene((a, a)),
                  shapes.Scene((a, b._replace(size="small"))), None):
        assert not shapes.same(pair, wrong)
    assert not shapes.same(None, None)


def test_shapes_errors_are_sentences():
    for bad in (dict(difficulty="easy"), dict(split="test"), dict(size=8), dict(single=2.0)):
        with pytest.raises(ValueError, match=str(list(bad.values())[0])):
            shapes.World(**bad)
    with pytest.raises(ValueError, match="expected"):
        shapes.read(torch.zeros(3, 32, 32))
    assert shapes.read(torch.zeros(0, 3, 32, 32)) == []
    with pytest.raises(ValueError, match="at least one"):
        shapes.pack([])
    with pytest.raises(ValueError, match="easy"):
        shapes.read(torch.zeros(1, 3, 32, 32), "easy")


# ---------------------------------------------------------------------------------------------------------------------
# data/images.py

def encoded(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(number, side=16):
    """A picture that tells its number: red is the number."""
    return Image.new("RGB", (side, side), (number, 255 - number, 7))


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def shard(path, numbers):
    members = []
    for i in numbers:
        members += [(f"{i:05d}.txt", f"number {i}".encode()), (f"{i:05d}.png", encoded(flat(i)))]
    return write_tar(path, members)


def reds(batches):
    return [int(image[0, 0, 0]) for batch, _, _ in batches for image in batch]


def corners(image):
    w, h = image.size
    return [image.getpixel(xy) for xy in ((0, 0), (w - 1, 0), (0, h - 1), (w - 1, h - 1))]


def close(got, expected, tolerance):
    return all(abs(a - b) <= tolerance for x, y in zip(got, expected) for a, b in zip(x, y))


# --- decoding

@pytest.mark.parametrize("mode,kind,tolerance", [
    ("RGB", "png", 0), ("1", "png", 0), ("L", "png", 0), ("P", "png", 0), ("P", "gif", 0), ("RGBA", "png", 0),
    ("LA", "png", 0), ("CMYK", "tiff", 0), ("CMYK", "jpeg", 6), ("YCbCr", "tiff", 3), ("LAB", "tiff", 10),
    ("L", "jpeg", 3), ("RGB", "webp", 0), ("RGBA", "webp", 0), ("RGB", "bmp", 0), ("RGB", "tga", 0)])
def test_images_modes_give_the_right_colours(mode, kind, tolerance):
    grey = mode in ("1", "L", "LA")
    colours = [(0,) * 3, (255,) * 3, (255,) * 3, (0,) * 3] if mode == "1" else [(v,) * 3 for v in (0, 90, 180, 255)] if grey else \
        [(200, 30, 40), (20, 180, 60), (30, 60, 220), (240, 240, 10)]
    picture = Image.new("RGB", (32, 32))
    for i, colour in enumerate(colours):
        picture.paste(colour, (i % 2 * 16, i // 2 * 16, i % 2 * 16 + 16, i // 2 * 16 + 16))
    if mode == "LAB":
        other = ImageCms.profileToProfile(picture, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
    else:
        other = picture.convert(mode, palette=Image.Palette.ADAPTIVE) if mode == "P" else picture.convert(mode)
    lossless = {"lossless": True} if kind == "webp" else {}
    got = images.decode(encoded(other, kind, **lossless))
    assert got.mode == "RGB" and got.size == (32, 32)
    assert close(corners(got), colours, tolerance), (corners(got), colours)


def test_images_transparency_lies_on_white():
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half.paste((0, 0, 255, 128), (2, 0, 4, 4))
    for kind, options in (("png", {}), ("webp", {"lossless": True, "exact": True})):
        assert corners(images.decode(encoded(half, kind, **options)))[:2] == [(255, 255, 255), (127, 127, 255)]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 10, 200, 30])
    palette.paste(0, (2, 0, 4, 4))
    for kind in ("png", "gif"):
        assert corners(images.decode(encoded(palette, kind, transparency=0)))[:2] == [(10, 200, 30), (255, 255, 255)], kind
        assert corners(images.decode(encoded(palette, kind)))[:2] == [(10, 200, 30), (9, 9, 9)], kind
    assert corners(images.decode(encoded(palette, transparency=b"\x80\xff")))[1] == (132, 132, 132)      # an alpha per palette entry
    assert corners(images.decode(encoded(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3))))[0] == (255, 255, 255)
    assert corners(images.decode(encoded(Image.new("LA", (2, 2), (100, 0)))))[0] == (255, 255, 255)


def test_images_deep_grey_is_scaled_not_clipped():
    ramp = np.array([[0, 257 * 10, 32768, 65535]], np.uint16)
    expected = [[0, 10, 128, 255]]
    for kind in ("png", "tiff"):
        got = np.asarray(images.decode(encoded(Image.fromarray(ramp), kind)))
        assert (got == np.array(expected)[..., None]).all(), (kind, got)
    dark = np.array([[257 * 3, 257 * 90]], np.uint16)        # keeps its scale, is not stretched
    assert np.asarray(images.decode(encoded(Image.fromarray(dark))))[0, :, 0].tolist() == [3, 90]
    assert np.asarray(images.decode(b"P5 2 1 65535\n" + dark.astype(">u2").tobytes()))[0, :, 0].tolist() == [3, 90]
    pgm = b"P5 4 1 65535\n" + ramp.astype(">u2").tobytes()      # Pillow opens it as mode I
    assert (np.asarray(images.decode(pgm))[..., 0] == expected).all()
    for values in (np.array([[-1e6, 0, 1e6]], np.float32), np.array([[-70000, 0, 70000]], np.int32)):
        assert np.asarray(images.decode(encoded(Image.fromarray(values), "tiff")))[0, :, 0].tolist() == [0, 128, 255]
    wild = np.array([[np.nan, 1, 2, np.inf]], np.float32)
    assert np.asarray(images.decode(encoded(Image.fromarray(wild), "tiff")))[0, :, 0].tolist() == [0, 0, 255, 255]
    assert np.asarray(images.decode(encoded(Image.fromarray(np.full((2, 2), 5, np.float32)), "tiff"))).max() == 0


@pytest.mark.parametrize("near", [None, 16])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_exif_turns_upright(orientation, near):
    upright = Image.new("RGB", (192, 128))
    for i, colour in enumerate([(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]):
        upright.paste(colour, (i % 2 * 96, i // 2 * 64, i % 2 * 96 + 96, i // 2 * 64 + 64))
    T = Image.Transpose
    undo = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE,
            6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if undo is None else upright.transpose(undo)
    got = images.decode(encoded(stored, "jpeg", exif=exif, quality=95, subsampling=0), near=near)
    assert got.size == ((192, 128) if near is None else (48, 32))
    assert close(corners(got), corners(upright), 12), corners(got)


def test_images_draft_equals_full_decode():
    yy, xx = np.mgrid[:801, :1203] / 200
    smooth = np.stack([np.sin(xx) + np.cos(yy), np.sin(xx * yy), np.cos(xx - yy)], -1)
    data = encoded(Image.fromarray((127 + 60 * smooth).clip(0, 255).astype(np.uint8)), "jpeg", quality=95)
    full, draft = images.decode(data), images.decode(data, near=64)
    assert draft.width < full.width / 3 and min(draft.size) >= 128
    for crop in (lambda image: images.centre_crop(image, 64), lambda image: images.random_crop(image, 64, np.random.default_rng(5))):
        difference = (crop(full).float() - crop(draft).float()).abs()
        assert difference.mean() < 1 and difference.max() <= 12, (difference.mean(), difference.max())
    assert images.decode(data, near=256).size == full.size      # less than four times as large: no shortcut


def test_images_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), c) for c in ((255, 0, 0), (0, 255, 0))]
    for kind in ("gif", "png", "webp", "tiff"):
        assert close(corners(images.decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))), [(255, 0, 0)], 2), kind


def test_images_from_path_file_and_bytes(tmp_path):
    flat(77).save(tmp_path / "a.png")
    assert images.decode((tmp_path / "a.png").read_bytes()).getpixel((0, 0))[0] == 77
    (picture, reason), (_, missing) = images.Pictures([str(tmp_path / "a.png"), str(tmp_path / "b.png")], 8)
    assert picture[0, 0, 0] == 77 and reason == "" and "No such file" in missing and "b.png" in missing


def test_images_damage_is_one_clear_sentence(monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: started.append(1) or flat(0).im)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    good = {kind: encoded(noise, kind) for kind in ("jpeg", "png", "webp", "gif", "bmp", "tiff")}
    bad = [data[:len(data) // 2] for data in good.values()] + [b"", b"<html>404</html>", good["png"][:40], b"\xff\xd8\xff"]
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"      # would start Ghostscript
    for data in bad + [eps]:
        with pytest.raises(ValueError, match="x.jpg: cannot be read as an image") as caught:
            images.decode(data, "x.jpg")
        assert "\n" not in str(caught.value)
    assert not started, "a file was handed to Ghostscript"
    with pytest.raises(ValueError, match="0 bytes"):
        images.decode(b"", "x.jpg")


def test_images_bombs_are_refused_from_the_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert images.decode(encoded(flat(1, 10))).size == (10, 10)
        for side in (12, 30):       # in Pillow a warning, and an error
            with pytest.raises(ValueError, match=r"bomb.png: too many pixels .*at most 100"):
                images.decode(encoded(flat(1, side)), "bomb.png")


def test_images_crops_take_the_right_box():
    xx = np.arange(300, dtype=np.float32) / 299 * 255
    ramp = Image.fromarray(np.stack([np.tile(xx, (100, 1))] * 3, -1).astype(np.uint8))
    centre = images.centre_crop(ramp, 50)
    assert centre.shape == (3, 50, 50) and centre.dtype == torch.uint8 and centre.is_contiguous()
    assert abs(int(centre[0, 0, 0]) - 85) <= 2 and abs(int(centre[0, 0, -1]) - 170) <= 2       # the middle third
    square = ramp.resize((200, 200))
    shares, ratios, lefts = [], [], []
    for seed in range(200):
        seen = {}
        original, images._resize = images._resize, lambda image, size, left, top, w, h: seen.update(box=(left, top, left + w, top + h))
        try:
            images.random_crop(square, 50, np.random.default_rng(seed))
        finally:
            images._resize = original
        left, top, right, bottom = seen["box"]
        assert 0 <= left < right <= 200 + 1e-9 and 0 <= top < bottom <= 200 + 1e-9
        shares.append((right - left) * (bottom - top) / 200 ** 2)
        ratios.append((right - left) / (bottom - top))
        lefts.append(left)
    assert 0.9 <= min(shares) + 1e-9 and max(shares) <= 1 + 1e-9 and max(shares) - min(shares) > 0.05
    assert 0.74 < min(ratios) < 0.95 and 1.05 < max(ratios) < 1.34 and abs(np.log(ratios).mean()) < 0.05 and max(lefts) > 5
    same = [images.random_crop(square, 50, np.random.default_rng(3)) for _ in range(2)]
    assert torch.equal(*same) and not torch.equal(same[0], images.random_crop(square, 50, np.random.default_rng(4)))


@pytest.mark.parametrize("shape", [(1, 1), (20000, 3), (3, 20000), (1, 7)])
def test_images_extreme_shapes(shape):
    image = images.decode(encoded(Image.new("RGB", shape, (10, 20, 30))))
    for crop in (images.centre_crop(image, 32), images.random_crop(image, 32, np.random.default_rng(0))):
        assert crop.shape == (3, 32, 32) and (crop == torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None]).all()
        crop[0, 0, 0] = 1       # no read-only memory


# --- sources

def test_images_folder_captions(tmp_path):
    (tmp_path / "sub/deep").mkdir(parents=True)
    flat(1).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9 au lait\n")       # a byte order mark, and Latin-1
    flat(2).save(tmp_path / "sub/B.JPG", "jpeg")
    (tmp_path / "sub/metadata.jsonl").write_text('{"file_name": "B.JPG", "text": "bee"}\n\n{"file_name": "deep/c.webp", "caption": '
                                                 '"sea"}\n')
    flat(3).save(tmp_path / "sub/deep/c.webp", lossless=True)
    flat(4).save(tmp_path / "sub/deep/d.png")
    (tmp_path / "._a.png").write_bytes(b"a Mac's note")
    (tmp_path / "notes.md").write_text("no picture")
    os.symlink(tmp_path, tmp_path / "sub/loop")
    data = images.ImageData(str(tmp_path), 8, train=False)
    assert [data.sample(i)[1] for i in range(len(data))] == ["caf\N{REPLACEMENT CHARACTER} au lait", "bee", "sea", ""]
    assert abs(int(data.sample(2)[0][0, 0, 0]) - 3) <= 1 and data.broken == []


def test_images_metadata_lines_are_checked(tmp_path):
    flat(1).save(tmp_path / "a.png")
    for bad in ('{"file_name": "a.png", "text"', '["a.png"]', '{"text": "no name"}', '{"file_name": 3}'):
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + bad + "\n")
        with pytest.raises(ValueError, match="metadata.jsonl, line 2"):
            images.ImageData(str(tmp_path), 8)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ["x"]}\n{"file_name": "gone.png", "text": "y"}\n')
    data = images.ImageData(str(tmp_path), 8)
    assert len(data.broken) == 1 and "gone.png" in data.broken[0]
    _, caption, broken = data.sample(0)
    assert caption == "" and len(broken) == 1 and "a.png" in broken[0] and "caption" in broken[0]


def test_images_tar_captions_and_members(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 5000)
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        def add(name, data=b"", kind=tarfile.REGTYPE):
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, "0.png"
            tar.addfile(info, io.BytesIO(data))
        long = "d" * 150 + "/é.png"
        add("dir", kind=tarfile.DIRTYPE)
        add("link.png", kind=tarfile.SYMTYPE)
        add("hard.png", kind=tarfile.LNKTYPE)
        add("big.png", bytes(6000))
        add("0.json", json.dumps({"caption": "zero"}).encode())
        add("0.png", encoded(flat(10)))
        add("1.png", encoded(flat(11)))
        add("1.txt", b"one")
        add("1.json", b'{"caption": "not this"}')
        for i, entry in enumerate([b'{"caption": null}', b'{"caption": 5}', b"{", b"[1]"], 2):
            add(f"{i}.png", encoded(flat(10 + i)))
            add(f"{i}.json", entry)
        add(long, encoded(flat(16)))
    data = images.ImageData(str(path), 8, train=False)
    samples = [data.sample(i) for i in range(len(data))]
    assert [int(image[0, 0, 0]) for image, _, _ in samples] == [10, 11, 12, 13, 14, 15, 16]
    assert [caption for _, caption, _ in samples] == ["zero", "one", "", "", "", "", ""]
    assert [len(broken) for _, _, broken in samples] == [0, 0, 0, 1, 1, 1, 0] and "3.png: its caption" in samples[3][2][0]
    assert len(data.broken) == 1 and "big.png" in data.broken[0]
    assert not glob.glob(str(tmp_path / "*.png")), "an archive was unpacked"


def test_images_sources_and_ranges(tmp_path):
    for k in range(9, 12):
        shard(tmp_path / f"{k:05d}.tar", [10 * k, 10 * k + 1])
    (tmp_path / "more").mkdir()
    flat(200).save(tmp_path / "more/x.png")

    def content(source):
        data = images.ImageData(source, 4, train=False)
        return [int(data.sample(i)[0][0, 0, 0]) for i in range(len(data))]
    t = str(tmp_path)
    assert content(t + "/{00009..00010}.tar") == [90, 91, 100, 101]
    assert content(t + "/{00009,00011}.tar") == [90, 91, 110, 111]
    assert content(t + "/0*.tar") == [90, 91, 100, 101, 110, 111]
    assert content(t + "/00011.tar," + t + "/{00009..00009}.tar") == [110, 111, 90, 91]
    assert content(t + "/00011.tar," + t + "/00011.tar") == [110, 111]       # twice the same is once
    assert content(t) == [200, 90, 91, 100, 101, 110, 111]
    assert images._braces("{a,b}{8..10}") == [a + b for a in "ab" for b in ("8", "9", "10")]
    odd = tmp_path / "a,b [1] {x}"
    odd.mkdir()
    flat(5).save(odd / "a.png")
    assert content(str(odd)) == [5]


def test_images_missing_sources_in_words(tmp_path, monkeypatch):
    shard(tmp_path / "0.tar", [1])
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "none.tar", [("a.txt", b"no picture")])
    (tmp_path / "zip.zip").write_bytes(b"PK")
    monkeypatch.setenv("NANODUALTOKEN_INDEX", str(tmp_path / "index"))
    t = str(tmp_path)
    for source, error, words in [("/gone", FileNotFoundError, "/gone"), ("/{5..9}.tar", FileNotFoundError, r"\{5..9\}.tar"),
                                 ("/0.tar," + t + "/1.tar", FileNotFoundError, "/1.tar"),
                                 ("/{3..1}.tar", ValueError, "empty"),
                                 ("/*.gz", FileNotFoundError, r"\*.gz"), ("/empty", ValueError, "no images"),
                                 ("/none.tar", ValueError, "no images"),
                                 ("/zip.zip", ValueError, "folders and .tar files")]:
        with pytest.raises(error, match=words):
            images.ImageData(t + source, 8)
    with pytest.raises((ValueError, FileNotFoundError)):
        images.ImageData("", 8)
    for url in ("https://host.org/{0..3}.tar", "s3://bucket/0.tar"):
        with pytest.raises(ValueError, match="is a URL.*download the shards"):
            images.ImageData(url, 8)


def test_images_holes_in_a_range_are_counted_and_named(tmp_path):
    for k in (0, 2, 3):
        shard(tmp_path / f"{k:05d}.tar", [k])
    data = images.ImageData(f"{tmp_path}/{{00000..00015}}.tar", 8, train=False)
    assert reds(data.load(4)) == [0, 2, 3] and len(data.broken) == 1
    assert re.search(r"13 of 16 are missing and left out: \S+/00001.tar, \S+/00004.tar, .*\.\.\.$", data.broken[0])
    assert data.broken[0].count(".tar") == 11       # the range and ten names
    assert images.ImageData(f"{tmp_path}/{{00002..00003}}.tar", 8).broken == []


def test_images_odd_shards(tmp_path):
    """Captions far from their images; not a tar at all; a compressed one."""
    members = [(f"{i}.png", encoded(flat(i))) for i in range(5)] + [(f"{i}.{'json' if i % 2 else 'txt'}", b'{"caption": "c%d"}' % i)
                                                                    for i in reversed(range(5))]
    whole = write_tar(tmp_path / "far.tar", members)
    assert [images.ImageData(whole, 8, train=False).sample(i)[1] for i in range(5)] == ['{"caption": "c0"}', "c1", '{"caption": "c2"}',
                                                                                        "c3", '{"caption": "c4"}']
    (tmp_path / "page.tar").write_text("<html>404</html>" * 100)
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as tar:
        tar.add(whole, "far.png")
    data = images.ImageData(str(tmp_path), 8, train=False)
    assert len(data) == 5 and ["page.tar: cut, damaged or not a plain tar" in data.broken[0], "zipped.tar: cut" in data.broken[1]] == [True,
        True]
    with pytest.raises(ValueError, match="no images in .*page.tar: cut, damaged or not a plain tar"):
        images.ImageData(str(tmp_path / "page.tar"), 8)


def test_images_cut_tars_are_named(tmp_path):
    whole = shard(tmp_path / "whole.tar", range(6))
    data = open(whole, "rb").read()
    with tarfile.open(whole) as tar:
        headers = [member.offset for member in tar]
    expected = {"in_data": (data[:headers[7] + 540], 3), "in_header": (data[:headers[6] + 100], 3), "between": (data[:headers[6]], 3),
                "damaged": (data[:headers[6]] + b"\x07" * 512 + data[headers[6] + 512:], 3), "junk": (b"junk" * 500, 0),
                "nothing": (b"", 0)}
    for name, (content, count) in expected.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
        both = images.ImageData(f"{tmp_path}/{name}.tar,{whole}", 8, train=False)
        assert len(both) == count + 6, name
        assert len(both.broken) == 1 and f"{name}.tar" in both.broken[0], (name, both.broken)
        assert reds(both.load(4)) == [*range(count), *range(6)]
    assert images.ImageData(whole, 8).broken == []


def test_images_parallel_scan_equals_serial(tmp_path, monkeypatch):
    for k in range(9):
        shard(tmp_path / f"{k}.tar", [2 * k, 2 * k + 1])
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    parallel = images.ImageData(str(tmp_path), 8, train=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    serial = images.ImageData(str(tmp_path), 8, train=False)
    assert (parallel.records == serial.records).all() and parallel.names == serial.names
    assert reds(parallel.load(4)) == list(range(18))


def same_scan(a, b):
    return (a.records == b.records).all() and a.names == b.names and a.files == b.files


def test_images_index_of_a_shard_is_kept_while_it_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("NANODUALTOKEN_INDEX", str(tmp_path / "kept/index"))
    (tmp_path / "data").mkdir()
    path, scanned, scan = shard(tmp_path / "data/0.tar", range(6)), [], images._scan_tar
    shard(tmp_path / "data/1.tar", range(6, 9))
    monkeypatch.setattr(images, "_scan_tar", lambda path: scanned.append(os.path.basename(path)) or scan(path))
    read = lambda: (scanned.clear(), images.ImageData(str(tmp_path / "data"), 8, train=False))[1]
    fresh = read()
    assert sorted(scanned) == ["0.tar", "1.tar"] and same_scan(fresh, read()) and scanned == []
    files = glob.glob(str(tmp_path / "kept/index/*.npz"))
    assert len(files) == 2 and not glob.glob(str(tmp_path / "kept/index/*.tmp")) and reds(read().load(4)) == list(range(9))
    for file in files:
        with np.load(file, allow_pickle=False) as arrays:
            assert {array.dtype.hasobject for array in arrays.values()} == {False}

    before = os.stat(path)                                      # as large as before, but other images, and later
    shard(path, range(26, 20, -1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert os.stat(path).st_size == before.st_size and reds(read().load(4)) == [*range(26, 20, -1), 6, 7, 8] and scanned == ["0.tar"]
    for damage in (lambda d: b"", lambda d: b"junk", lambda d: d[:len(d) // 2], lambda d: d[:350] + bytes(100) + d[450:]):
        expected = read()
        for file in files:
            data = open(file, "rb").read()
            open(file, "wb").write(damage(data))
        assert same_scan(expected, read()) and len(scanned) == 2 and same_scan(expected, read()) and scanned == []
    with open(path, "r+b") as file:                             # what is cut is looked at, and reported, every time
        file.truncate(before.st_size // 2)
    assert all("0.tar: cut" in read().broken[0] and scanned == ["0.tar"] for _ in range(2))


def test_images_index_that_cannot_be_kept_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    shard(tmp_path / "0.tar", range(3)), shard(tmp_path / "1.tar", range(3))
    monkeypatch.setenv("NANODUALTOKEN_INDEX", str(tmp_path / "file/index"))
    data = images.ImageData(str(tmp_path), 8, train=False)
    assert reds(data.load(6)) == [0, 1,
        2] * 2 and len(data.broken) == 1 and "cannot be kept in" in data.broken[0] and "file/index" in data.broken[0]
    monkeypatch.setenv("NANODUALTOKEN_INDEX", str(tmp_path / "index"))
    monkeypatch.setattr(np, "savez_compressed",
                        lambda file, **arrays: (file.write(b"half"), (_ for _ in ()).throw(OSError(28, "No space left on device")))[0])
    assert "No space left" in images.ImageData(str(tmp_path), 8).broken[0] and not glob.glob(str(tmp_path / "index/*.npz"))
    monkeypatch.setenv("NANODUALTOKEN_INDEX", "")
    assert images.ImageData(str(tmp_path), 8).broken == []


def test_images_two_processes_scan_each_shard_once(tmp_path):
    for k in range(24):
        shard(tmp_path / f"{k:02d}.tar", range(k, k + 20))
    script = """import os, sys, time
from data import images
scan, scanned = images._scan_tar, []
images._scan_tar = lambda path: scanned.append(path) or time.sleep(0.02) or scan(path)
open(sys.argv[2], "w").close()
while not (os.path.exists(sys.argv[1] + "/ready0") and os.path.exists(sys.argv[1] + "/ready1")):
    time.sleep(0.002)
data = images.ImageData(sys.argv[1], 8)
print(len(scanned), data.broken, images.hashlib.sha256(data.records.tobytes() + data.names).hexdigest())"""
    environment = {**os.environ, "NANODUALTOKEN_INDEX": str(tmp_path / "index"), "LOCAL_WORLD_SIZE": "64"}      # one process each
    runs = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), f"{tmp_path}/ready{k}"], cwd=HERE, env=environment,
                             stdout=subprocess.PIPE, text=True) for k in range(2)]
    counts, *rest = zip(*(run.communicate()[0].split() for run in runs))
    data = images.ImageData(str(tmp_path), 8)
    assert sum(map(int, counts)) == 24 and min(map(int, counts)) > 0, counts
    assert rest == [("[]",) * 2, (images.hashlib.sha256(data.records.tobytes() + data.names).hexdigest(),) * 2]


def test_images_few_open_files(tmp_path):
    many = images.OPEN_SHARDS + 2
    for k in range(many):
        shard(tmp_path / f"{k:02}.tar", [k])
    data = images.ImageData(str(tmp_path), 8, seed=3)
    assert sorted(reds([data.sample(i)[0][None], 0, 0] for i in range(many))) == list(range(many))
    assert images._opened.cache_info().currsize == images.OPEN_SHARDS
    sent = pickle.loads(pickle.dumps(data))     # to a worker that is no fork
    assert all(torch.equal(data.sample(i)[0], sent.sample(i)[0]) for i in range(5))


# --- samples, order, batches

@pytest.fixture
def twenty(tmp_path):
    shard(tmp_path / "0.tar", range(12))
    shard(tmp_path / "1.tar", range(12, 20))
    return str(tmp_path)


def test_images_broken_samples_are_replaced_and_named(tmp_path):
    members = [(f"{i}.png", encoded(flat(i))) for i in range(6)]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    members[2], members[3], members[5] = ("2.png", b""), ("3.jpg", encoded(noise, "jpeg")[:1000]), ("5.png", b"junk")
    data = images.ImageData(write_tar(tmp_path / "x.tar", members), 8, train=False)
    (batch, captions, broken), = data.load(6)
    assert [int(image[0, 0, 0]) for image in batch] == [0, 1, 4, 4, 4, 0] and captions == [""] * 6
    assert len(broken) == 4 and all("x.tar/" in report for report in broken)
    assert [report.split("/")[-1].split(":")[0] for report in data.sample(2)[2]] == ["2.png", "3.jpg"]
    junk = images.ImageData(write_tar(tmp_path / "y.tar", [(f"{i}.png", b"junk") for i in range(3)]), 8)
    with pytest.raises(ValueError, match="nothing readable"):
        junk.sample(0)


def test_images_order_is_a_permutation_per_epoch(twenty):
    data = images.ImageData(twenty, 8, seed=1)
    epochs = [[data.order(p) for p in range(20 * e, 20 * e + 20)] for e in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(20))
    assert epochs[0] == [data.order(p) for p in range(20)]       # back again
    assert epochs[0] != [images.ImageData(twenty, 8, seed=2).order(p) for p in range(20)]
    assert [images.ImageData(twenty, 8, train=False).order(p) for p in range(20)] == list(range(20))


@pytest.fixture
def many(tmp_path):
    """40 shards of 24, and a folder of 50 files: 1,010 samples whose colour is their number."""
    (tmp_path / "many").mkdir()
    paint = lambda n: encoded(Image.new("RGB", (2, 2), (n % 256, n // 256, 7)))
    for k in range(40):
        write_tar(tmp_path / f"many/{k:02d}.tar", [(f"{n:05d}.png", paint(n)) for n in range(24 * k, 24 * k + 24)])
    for n in range(960, 1010):
        (tmp_path / f"many/{n:05d}.png").write_bytes(paint(n))
    return str(tmp_path / "many")


def numbers(batches):
    return [int(image[0, 0, 0]) + 256 * int(image[1, 0, 0]) for batch, _, _ in batches for image in batch]


def test_images_shuffle_goes_by_shards_and_windows(many, monkeypatch):
    data = images.ImageData(many + "/{00..39}.tar", 2, seed=4, buffer=64)
    order = np.array([[data.order(p) for p in range(960 * e, 960 * e + 960)] for e in range(2)])
    assert (np.sort(order) == np.arange(960)).all() and (order[0] != order[1]).mean() > 0.9
    assert (order == [[data.order(p) for p in range(960 * e, 960 * e + 960)] for e in (0, 1)]).all()       # back again
    shards = order // 24
    for epoch in shards:
        groups = np.array_split(epoch, [14 * 24, 27 * 24])      # 40 shards are groups of 14, 13 and 13
        assert [len(set(group)) for group in groups] == [14, 13, 13] and not set(groups[0]) & set(groups[1])
        windows = [window for group in groups for window in np.array_split(group, math.ceil(len(group) / 64))]
        assert all(6 <= len(set(window)) <= images.SHARDS for window in windows)
    assert set(shards[0][:14 * 24]) != set(shards[1][:14 * 24])
    windows = np.array_split(order[0][:14 * 24], 6)
    pieces = [np.sum(np.diff(np.sort(window)) > 1) + 1 for window in windows]
    assert max(pieces) <= images.SHARDS + 4, pieces         # neighbours in pieces of 4: a window cuts two, and 24 is 6 of them

    opened = []
    monkeypatch.setattr(images, "open", lambda path, mode: opened.append(path) or open(path, mode), raising=False)
    monkeypatch.setattr(images, "_opened", functools.lru_cache(images.SHARDS)(images._opened.__wrapped__))
    assert sorted(numbers([data.sample(p)[0][None], 0, 0]
                          for p in range(960))) == list(range(960)) and len(opened) == len(set(opened)) == 40


def test_images_small_or_single_files_are_shuffled_as_a_whole(many):
    """And as they always were, so that earlier runs can be repeated."""
    for source, buffer in ((many + "/{00..39}.tar", 960), (many + "/{00..02}.tar", images.BUFFER), (many + "/../files", 16)):
        if source.endswith("files"):
            os.mkdir(source)
            for path in glob.glob(many + "/*.png"):
                shutil.copy(path, source)
        data = images.ImageData(source, 2, seed=6, buffer=buffer)
        for epoch in range(2):
            expected = np.random.default_rng([6, 0, epoch]).permutation(np.arange(len(data), dtype=np.uint32))
            assert [data.order(p) for p in range(epoch * len(data), (epoch + 1) * len(data))] == expected.tolist()
    mixed = images.ImageData(many, 2, seed=6, buffer=64)
    order = np.array([mixed.order(p) for p in range(1010)])
    single = np.flatnonzero(order < 50)     # a folder's files come first in the records, and are dealt out over the whole epoch
    assert sorted(order) == list(range(1010)) and [len(part) for part in np.split(single, np.searchsorted(single, [353, 682]))] == [17, 17,
        16]
    assert mixed.records["image"][:50].max() == -1 and not (np.diff(order[single]) > 0).all()


def test_images_no_sample_comes_twice_in_an_epoch(many):
    """4 ranks of 2 workers; batches of 12, so that epochs end inside one; and resumed in the middle of a shard, on other ranks."""
    data = images.ImageData(many, 2, buffer=64)
    parts = [list(data.load(12, stop=170, rank=r, ranks=4, workers=2)) for r in range(4)]
    stream = [n for step in zip(*parts) for batch in step for n in numbers([batch])]
    assert sorted(stream[:1010]) == sorted(stream[1010:2020]) == list(range(1010)) and stream[:1010] != stream[1010:2020]
    assert numbers(images.ImageData(many, 2, buffer=64).load(12, start=31, stop=36)) == stream[31 * 12:36 * 12]
    train, val = data.split()
    order = [train.order(p) for p in range(len(train))]
    assert sorted(order) == list(range(len(train))) and len(train.starts) == 40 and len(val) == 50


def test_images_epochs_of_some_samples(many):
    data = images.ImageData(many, 2, num_samples=100, buffer=64)
    epochs = [numbers(data.load(10, start=10 * e, stop=10 * e + 10)) for e in range(3)]
    assert [len(set(epoch)) for epoch in epochs] == [100] * 3 and len(set(sum(epochs, []))) > 150
    whole = images.ImageData(many, 2, buffer=64)
    assert epochs[1] == numbers([whole.sample(p)[0][None], 0, 0] for p in range(1010, 1110))        # an epoch's first
    assert len({n // 24 for n in epochs[0] if n < 960}) <= images.SHARDS


@pytest.mark.parametrize("how", ["vanished", "cut", "rewritten"])
def test_images_shards_lost_while_training(many, how):
    """Their samples are replaced by many others, and reported in one sentence a shard."""
    data = images.ImageData(many, 2, buffer=64)
    data.sample(0)
    for k in range(0, 40, 2):
        path = f"{many}/{k:02d}.tar"
        if how == "vanished":
            os.remove(path)
        else:
            with open(path, "r+b") as file:
                file.truncate(5000) if how == "cut" else file.write(b"other " * (os.path.getsize(path) // 6))
    lost = {n for k in range(0, 40, 2) for n in range(24 * k + 5 * (how == "cut"), 24 * k + 24)}
    batches = list(data.load(10, stop=101, workers=2))
    got, reports = numbers(batches), Counter(report for _, _, reports in batches for report in reports)
    assert not lost & set(got) and set(got) >= set(range(1010)) - lost
    assert max(Counter(got).values()) < 20, "all samples of a shard became the same"
    if how != "rewritten":
        assert len(reports) == 20 and all(f"{k:02d}.tar: gone or cut since the scan" in " ".join(reports) for k in range(0, 40, 2))
        assert train_tokenizer.first_time([*reports.elements()], seen := set()) == list(reports) and len(seen) == 20
    for path in glob.glob(many + "/*"):
        os.remove(path)
    with pytest.raises(ValueError, match="100 samples tried are broken, the first: .*(gone or cut|No such file)"):
        images._opened.cache_clear(), data.sample(500)


def test_images_each_epoch_crops_anew(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8))
    data = images.ImageData(write_tar(tmp_path / "0.tar", [("0.png", encoded(noise))]), 8)
    assert torch.equal(data.sample(0)[0], data.sample(0)[0]) and not torch.equal(data.sample(0)[0], data.sample(1)[0])
    other = images.ImageData(str(tmp_path), 8, seed=1)
    assert not torch.equal(data.sample(0)[0], other.sample(0)[0])


def test_images_ranks_and_workers_change_nothing(tmp_path):
    rng = np.random.default_rng(0)
    members = [(f"{i}.png", encoded(Image.fromarray(rng.integers(0, 255, (12, 12, 3), np.uint8)))) for i in range(9)]
    write_tar(tmp_path / "0.tar", members + [("9.png", b"junk")])
    data = images.ImageData(str(tmp_path), 8)
    data.sample(0)      # opens the shard in this process before the workers are forked
    one = list(data.load(4, stop=6))
    for workers in (0, 2):
        two = [list(data.load(4, stop=6, rank=r, ranks=2, workers=workers)) for r in range(2)]
        for (whole, captions, broken), *parts in zip(one, *two):
            assert torch.equal(whole, torch.cat([part[0] for part in parts]))
            assert captions == sum((part[1] for part in parts), []) and broken == sum((part[2] for part in parts), [])
    assert sum(len(broken) for _, _, broken in one) >= 2 and one[0][0].shape == (4, 3, 8, 8)


def test_images_resume_equals_going_on(twenty):
    data = images.ImageData(twenty, 8, seed=5)
    state = torch.get_rng_state()
    through = list(data.load(6, stop=9))
    for start in (1, 4, 7):     # 20 images, batches of 6: epochs end inside a batch
        for workers in (0, 2):
            resumed = list(images.ImageData(twenty, 8, seed=5).load(6, start=start, stop=9, workers=workers))
            assert len(resumed) == 9 - start
            assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(through[start:], resumed))
    assert torch.equal(state, torch.get_rng_state()), "loading used up numbers of torch's generator"
    endless = iter(data.load(6))
    assert [torch.equal(next(endless)[0], batch) for batch, _, _ in through] == [True] * 9


def test_images_evaluation_goes_once_over_the_data(twenty):
    data = images.ImageData(twenty, 8, train=False)
    assert reds(data.load(6)) == list(range(20)) and len([*data.load(6)]) == 4
    parts = [reds(data.load(6, rank=r, ranks=3)) for r in range(3)]
    assert parts[1] == list(range(1, 20, 3)) and sorted(sum(parts, [])) == list(range(20))
    assert reds(data.load(64, rank=50, ranks=64)) == []


def test_images_split_never_overlaps(tmp_path):
    shard(tmp_path / "0.tar", range(100))
    shard(tmp_path / "1.tar", range(100, 200))
    whole = images.ImageData(str(tmp_path), 4)
    train, val = whole.split()
    assert len(whole) == 200 and len(val) == 10 and not val.train and train.train
    a, b = set(reds(train.load(190, stop=1))), set(reds(val.load(10)))
    assert not a & b and len(a | b) == 200
    assert b == set(reds(images.ImageData(str(tmp_path), 4, seed=9).split()[1].load(10)))       # whatever the seed
    (tmp_path / "moved").mkdir()
    os.rename(tmp_path / "0.tar", tmp_path / "moved/0.tar")
    assert {i for i in reds(images.ImageData(str(tmp_path / "moved"), 4).split()[1].load(5))} & a <= {i for i in a if i < 100}
    shard(tmp_path / "two.tar", [1, 2])
    assert [len(part) for part in images.ImageData(str(tmp_path / "two.tar"), 4).split()] == [1, 1]
    shard(tmp_path / "one.tar", [1])
    with pytest.raises(ValueError, match="at least 2"):
        images.ImageData(str(tmp_path / "one.tar"), 4).split()


def test_images_split_survives_a_new_shard(tmp_path):
    shard(tmp_path / "1.tar", range(100, 200))
    before = set(reds(images.ImageData(str(tmp_path), 4).split()[1].load(5)))
    shard(tmp_path / "0.tar", range(10))
    train, val = images.ImageData(str(tmp_path), 4).split()
    assert len(before & set(reds(val.load(6)))) >= 4, "one more shard moved the held-out images into the training set"


# --- real pictures

@needs_shared
def test_images_emoji_shards():
    data = images.ImageData(EMOJI + "/train-{00000..00003}.tar," + EMOJI + "/val-00000.tar", 64)
    assert len(data) == 3374 and data.broken == [] and data.records.nbytes < 60 * len(data)
    val = images.ImageData(EMOJI + "/val-00000.tar", 64, train=False)
    count = 0
    for batch, captions, broken in val.load(64):
        assert broken == [] and all(captions) and batch.shape[1:] == (3, 64, 64)
        count += len(batch)
    assert count == 345


@needs_shared
def test_images_photos():
    data = images.ImageData(PHOTOS, 64, train=False)
    samples = [data.sample(i) for i in range(len(data))]
    assert len(samples) == 7 and all(caption and not broken for _, caption, broken in samples)
    full = images.centre_crop(images.decode(Path(PHOTOS, "astronaut.jpg").read_bytes()), 64)
    assert (samples[0][0].float() - full.float()).abs().mean() < 2


# ---------------------------------------------------------------------------------------------------------------------
# rvq

designs = pytest.mark.parametrize("design", QUANTIZERS)
layouts = pytest.mark.parametrize("options", [dict(), dict(shared=False), dict(design="mcq")], ids=["rvq-shared", "rvq", "mcq"])


def filled(*, design="rvq", dim=8, codebook_size=64, depth=None, steps=30, **options):
    """A quantizer after some updates on gaussian vectors, in training mode. Tests of what does not depend on updates take none."""
    torch.manual_seed(0)
    vq = QUANTIZERS[design](dim, codebook_size, depth or {"rvq": 3, "mcq": 4}[design], **options)
    for _ in range(steps):
        vq(torch.randn(8, 32, dim))
        vq.update()
    return vq


def tables(vq):
    return {name: value.clone() for name, value in vq.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("shared", [True, False])
def test_rvq_codes_are_the_nearest_at_every_depth(shared):
    vq, z = filled(shared=shared, steps=0).eval(), torch.randn(4, 16, 8)
    codes, residual = vq(z)[1], z.double()
    for d in range(3):
        far = torch.cdist(residual.reshape(-1, 8), vq.table(d).double())
        assert torch.equal(codes[..., d].flatten(), far.argmin(1))
        residual = residual - vq.table(d).double()[codes[..., d]]


def test_rvq_mcq_codes_are_the_nearest_in_every_chunk():
    vq, z = filled(design="mcq", steps=0).eval(), torch.randn(4, 16, 8)
    codes = vq(z)[1]
    assert vq.codebook.shape == (4, 64, 2) and codes.dtype == torch.int64
    for d in range(4):
        far = torch.cdist(z.double().reshape(-1, 8)[:, 2 * d:2 * d + 2], vq.codebook[d].double())
        assert torch.equal(codes[..., d].flatten(), far.argmin(1))


@layouts
def test_rvq_embed_vectors_and_forward_agree(options):
    vq, z = filled(**options, steps=0).eval(), torch.randn(4, 16, 8)
    z_q, codes, _ = vq(z)
    assert codes.shape == (4, 16, vq.depth) and vq.vectors(codes).shape == (4, 16, vq.depth, 8)
    torch.testing.assert_close(vq.vectors(codes).sum(2), z_q, atol=1e-6, rtol=0)
    assert torch.equal(vq.encode(z), codes) and torch.equal(vq.embed(codes), vq.vectors(codes).sum(2))


@layouts
def test_rvq_full_tables_are_where_vectors_look(options):
    vq, codes = filled(**options, steps=0).eval(), torch.randint(64, (2, 5, 4 if "design" in options else 3))
    full = vq.full_tables()
    assert full.shape == (1 if vq.shared else vq.depth, 64, 8) and full.count_nonzero() == vq.codebook.numel()      # a chunk among zeros
    for d in range(vq.depth):
        assert torch.equal(F.embedding(codes[..., d], full[0 if vq.shared else d]), vq.vectors(codes)[:, :, d])
        chunk = slice(2 * d, 2 * d + 2) if "design" in options else slice(None)
        assert torch.equal(full[0 if vq.shared else d][:, chunk], vq.table(d))


@designs
def test_rvq_gradient_goes_straight_through(design):
    vq, z = filled(design=design, steps=0).eval(), torch.randn(2, 4, 8, requires_grad=True)
    weight = torch.randn(2, 4, 8)
    (vq(z)[0] * weight).sum().backward()
    assert torch.equal(z.grad, weight)


@designs
def test_rvq_commitment_is_the_mean_over_partial_sums_or_the_error(design):
    vq, z = filled(design=design, steps=0).eval(), torch.randn(2, 4, 8, requires_grad=True)
    _, codes, commitment = vq(z)
    sums = vq.vectors(codes).cumsum(2) if design == "rvq" else vq.embed(codes)[:, :, None]
    torch.testing.assert_close(commitment, torch.stack([(z - sums[:, :, d]).square().mean() for d in range(sums.shape[2])]).mean())
    commitment.backward()
    torch.testing.assert_close(z.grad, 2 * (z.detach()[:, :, None] - sums).mean(2) / z.numel())


@designs
def test_rvq_forward_never_changes_a_table(design):
    vq = filled(design=design)
    before = tables(vq)
    for _ in range(3):
        vq(torch.randn(8, 32, 8))
    assert equal(before, tables(vq))
    vq.update()
    assert not torch.equal(before["codebook"], vq.codebook)


@layouts
def test_rvq_ema_is_what_the_formula_says(options):
    vq = filled(**options, threshold=0.0)
    z, old = torch.randn(8, 32, 8), tables(vq)
    codes = vq.encode(z).reshape(-1, vq.depth)
    count, total, residual = old["ema_count"] * 0.99, old["ema_sum"] * 0.99, z.reshape(-1, 8)
    for d in range(vq.depth):
        seen = z.reshape(-1, 8)[:, 2 * d:2 * d + 2] if "design" in options else residual
        for n, k in enumerate(codes[:, d].tolist()):
            count[0 if vq.shared else d, k] += 0.01
            total[0 if vq.shared else d, k] += 0.01 * seen[n]       # what this depth saw, not what was left at the end
        residual = residual - vq.vectors(codes)[:, d]
    vq(z), vq.update()
    torch.testing.assert_close(vq.ema_count, count)
    expected = torch.where(count[..., None] > 0, total / count[..., None], old["codebook"])      # a code that was never used stays
    torch.testing.assert_close(vq.codebook, expected, atol=1e-5, rtol=1e-5)


def test_rvq_learns_as_well_as_true_residuals_allow():
    """The release's bug, every depth learning from the last residual, ends at 0.29 here."""
    vq = filled(steps=300).eval()
    z = torch.randn(64, 32, 8)
    assert (vq(z)[0] - z).square().mean() < 0.15


@designs
def test_rvq_restart_replaces_dead_codes_and_only_those(design):
    vq = filled(design=design, codebook_size=16, grace=0)
    vq.codebook[0, 3], vq.ema_count[0, 3], vq.ema_sum[0, 3] = 1000, 1e-4, 0.1
    z = torch.randn(8, 32, 8)
    alive = vq.codebook[0, 4].clone()
    vq(z), vq.update()
    assert vq.codebook[0, 3].norm() < 20 and vq.age[0, 3] == 0
    assert (vq.codebook[0, 4] - alive).norm() < 1 and vq.age[0, 4] > 0


def test_rvq_mcq_restarts_at_chunks_of_the_batch():
    """Each table from its own chunk, as it was when `forward` saw it."""
    vq, z = filled(design="mcq", codebook_size=16, grace=0, steps=0), torch.randn(8, 32, 8) + 100 * torch.arange(8)
    chunks = z.reshape(-1, 4, 2).clone()
    vq(z), z.zero_(), vq.update()
    assert (vq.age == 0).sum() >= 4 * 8
    for d, k in (vq.age == 0).nonzero():
        assert (chunks[:, d] - vq.codebook[d, k]).abs().amax(1).min() < 1e-3


@designs
def test_rvq_ranks_draw_what_one_process_draws(design, monkeypatch):
    whole, z, found = filled(design=design), torch.randn(8, 32, 8), 0
    parts = copy.deepcopy(whole), copy.deepcopy(whole)
    whole(z)
    expected = whole._candidates()
    for rank, part in enumerate(parts):
        group = dict(is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2, get_rank=lambda: rank,
                     all_reduce=lambda x: x)
        monkeypatch.setattr("rvq.dist", SimpleNamespace(**group))
        part(z[4 * rank:][:4])
        found = found + part._candidates()
    torch.testing.assert_close(found, expected)


def test_rvq_small_batches_do_not_churn():
    """0.4 vectors per code and step: the absolute rule "count < 1" restarts most of the table at every step."""
    vq = filled(codebook_size=1000, depth=1, steps=0)
    restarts = 0
    for step in range(300):
        vq(torch.randn(1, 400, 8))
        vq.update()
        restarts += (vq.age == 0).sum().item() if step >= 150 else 0
    assert restarts / 150 < 10


def test_rvq_restart_waits_for_the_grace_period():
    vq = filled(codebook_size=512, depth=1, steps=0, grace=20)
    for step in range(25):      # one vector only: all other codes stay dead
        before = vq.age.clone()
        vq(torch.ones(1, 4, 8)), vq.update()
        assert not ((vq.age == 0) & (before < 20)).any(), step


@designs
def test_rvq_accumulated_halves_are_one_batch(design):
    one, two, z = *(filled(design=design, threshold=0.9, grace=0) for _ in range(2)), torch.randn(8, 32, 8)
    one(z), two(z[:4]), two(z[4:])
    one.update(), two.update()
    assert (one.age == 0).sum() > 8      # restarts draw from both halves
    for name, value in tables(one).items():
        torch.testing.assert_close(two.state_dict()[name], value, atol=1e-6, rtol=1e-6)


@designs
def test_rvq_skipped_step_changes_nothing(design):
    vq = filled(design=design)
    before = tables(vq)
    vq(torch.full((8, 32, 8), float("nan")))
    vq.update(skip=torch.tensor(True))
    assert equal({k: v for k, v in before.items() if k != "updates"}, {k: v for k, v in tables(vq).items() if k != "updates"})
    vq(torch.randn(8, 32, 8)), vq.update()
    assert vq.codebook.isfinite().all()


@designs
def test_rvq_resumes_exactly(design):
    torch.manual_seed(1)
    batches = torch.randn(20, 2, 16, 8)
    whole, part, resumed = (QUANTIZERS[design](8, 256, 2, grace=5) for _ in range(3))       # restarts in either half
    part.load_state_dict(whole.state_dict())
    for vq, some in ((whole, batches), (part, batches[:10])):
        for i, z in enumerate(some):
            vq(z), vq.update(skip=torch.tensor(i == 7))
    resumed.load_state_dict(part.state_dict())
    for z in batches[10:]:
        resumed(z), resumed.update()
    assert equal(tables(whole), tables(resumed))


@designs
def test_rvq_ignores_autocast(design):
    vq, z = filled(design=design, steps=0).eval(), torch.randn(16, 64, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        z_q, codes, _ = vq(z)
        assert torch.equal(codes, vq.encode(z)) and z_q.dtype == torch.float32
    assert torch.equal(codes, vq(z.float())[1])


def test_rvq_memory_stays_bounded():
    """The paper's size: 32 images of 729 positions, K 16,384, E 32. The distances of one depth alone would be 1.4 GiB."""
    pytest.importorskip("resource", reason="no peak memory on this system")
    code = ("import resource, torch; from rvq import ResidualVQ; torch.set_num_threads(2); vq = ResidualVQ(32, 16384, 1); "
            "z = torch.randn(32, 729, 32);"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20; before = peak(); "
            "vq(z); vq.update(); print(peak() - before)")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1


FUSED = """
import torch, rvq
torch.manual_seed(0)
for m, k, e in ((300, 1000, 32), (129, 64, 8), (70, 200, 20), (1, 65, 3)):
    x, table = torch.randn(m, e), torch.randn(k, e)
    exact = torch.cdist(x.double(), table.double()).argmin(1)
    assert torch.equal(rvq.nearest(x, table, True), exact), (m, k, e)
for n in (64, 100):     # in the same column of the kernel, and in another
    twice = torch.randn(n, 8).repeat(2, 1)
    assert torch.equal(rvq.nearest(x := torch.randn(200, 8), twice, True), rvq.nearest(x, twice[:n]))      # of equals the first
vq, z = rvq.ResidualVQ(8, 50, 3), torch.randn(2, 40, 8)
plain = vq.encode(z)
vq.fused = True
assert torch.equal(vq.encode(z), plain)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
def test_rvq_fused_kernel_finds_the_nearest():
    """In Triton's interpreter, which needs no GPU."""
    done = subprocess.run([sys.executable, "-c", FUSED], cwd=HERE, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


def test_rvq_fused_kernel_without_triton_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    rvq.fused_kernel.cache_clear()
    vq = rvq.ResidualVQ(8, 50, 3)
    vq.fused = True
    with pytest.raises(ValueError, match="--fast-vq needs Triton"):
        vq(torch.randn(2, 40, 8))


def test_rvq_usage_and_perplexity():
    counts = histogram(torch.tensor([[[0, 1], [0, 2], [0, 3], [0, 3]]]), 4)
    assert counts.tolist() == [[4, 0, 0, 0], [0, 1, 1, 2]]
    usage, perplexity = usage_and_perplexity(counts)
    assert usage.tolist() == [0.25, 0.75] and abs(perplexity[0] - 1) < 1e-9 and abs(perplexity[1] - 2 ** 1.5) < 1e-9


@designs
def test_rvq_errors_are_sentences(design):
    vq = filled(design=design)
    for wrong in (lambda: vq(torch.randn(1, 4, 9)), lambda: vq.embed(torch.zeros(1, 4, 2).long()),
                  lambda: vq.embed(torch.full((1, 4, vq.depth), 64))):
        with pytest.raises(ValueError, match=f"^{type(vq).__name__}: .*expected"):
            wrong()
    with pytest.raises(RuntimeError, match=f"^{type(vq).__name__}.update: nothing was quantized"):
        vq.update()


def test_rvq_mcq_refuses_chunks_that_do_not_fit():
    with pytest.raises(ValueError, match="got vectors of 10 numbers for 4 chunks, expected a multiple of 4; "):
        QUANTIZERS["mcq"](10, 16, 4)


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer

def randomised(model, seed=0, scale=0.2):
    """All parameters random: with norms at one and biases at zero, forgetting them would not show."""
    torch.manual_seed(seed)
    for p in model.parameters():
        p.data.normal_(std=scale).add_(1.0 if p.dim() == 1 and p.numel() > 1 else 0.0)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    model = randomised(DualTokenizer(preset_config("nano")))
    for _ in range(3):
        model(torch.rand(8, 3, 32, 32) * 2 - 1)
        for quantizer in model.quantizers.values():
            quantizer.update()
    return model.eval()


@pytest.fixture
def pictures():
    return World("plain", 32).batch(range(6))[0]


def test_tokenizer_matches_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: no parity with it")
    vision = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=14)
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=60, max_position_embeddings=12)
    theirs = transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=dict(text, projection_size=48)))
    randomised(theirs).eval()
    ours = SigLIP(VisionConfig(**vision), TextConfig(**text))
    load_weights(ours, theirs.state_dict(), "transformers")
    x, ids = torch.rand(2, 3, 64, 64) * 2 - 1, torch.randint(60, (2, 12))
    with torch.no_grad():
        out = theirs(pixel_values=x, input_ids=ids)
        states = theirs.vision_model(pixel_values=x, output_hidden_states=True).hidden_states
        state = ours.vision_model.embeddings(x)
        for n in range(5):
            torch.testing.assert_close(state, states[n], atol=1e-4, rtol=0)
            state = ours.vision_model.run(state, n + 1, n + 1)
        pooled = theirs.vision_model(pixel_values=x).pooler_output
        torch.testing.assert_close(ours.vision_model(x)[1], pooled, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.text_model(ids), theirs.text_model(input_ids=ids).pooler_output, atol=1e-4, rtol=0)
        image, words, scale, bias = ours(x, ids)
        torch.testing.assert_close(image @ words.T * scale.exp() + bias, out.logits_per_image, atol=1e-4, rtol=0)


def test_tokenizer_resizes_positions_as_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: no parity with it")
    vision = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=16)
    theirs = transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision,
                                                                text_config=dict(vision, vocab_size=60, max_position_embeddings=12)))
    randomised(theirs).eval().save_pretrained(tmp_path)
    for side in (96, 40, 64):
        x, ours = torch.rand(2, 3, side, side) * 2 - 1, SigLIP.from_pretrained(tmp_path, side)
        with torch.no_grad():
            expected = theirs.vision_model(pixel_values=x, interpolate_pos_encoding=True).pooler_output
            torch.testing.assert_close(ours.vision_model(x)[1], expected, atol=1e-4, rtol=0)
        assert ours.vision_config.image_size == side
    with pytest.raises(ValueError, match="8 pixels are smaller than the patches"):
        SigLIP.from_pretrained(tmp_path, 8)


def test_tokenizer_reads_the_release_from_a_pt_file_and_sizes_from_its_siglip(tmp_path):
    folder = os.path.join(SHARED, "fixtures/released-layout")
    if not os.path.isdir(folder):
        pytest.skip("no released-layout fixture: set NANODUALTOKEN_SHARED")
    weights, config = load_file(os.path.join(folder, "weights.safetensors")), json.load(open(os.path.join(folder, "config.json")))
    (tmp_path / "siglip").mkdir()
    (tmp_path / "siglip/config.json").write_text(json.dumps(config.pop("siglip")))
    (tmp_path / "config.json").write_text(json.dumps(config))

    def words(*more):
        with pytest.raises(ValueError) as caught:
            DualTokenizer.from_released(tmp_path, *more)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    sizes = str(tmp_path / "siglip")
    assert "give its SigLIP's folder with --siglip" in words() and "has no weights, expected" in words(sizes)
    for kept in (weights, {"state_dict": {"module." + name: value for name, value in weights.items()}}):
        torch.save(kept, tmp_path / "dualtoken.pt")
        assert equal(DualTokenizer.from_released(tmp_path, sizes).state_dict(), DualTokenizer.from_released(folder).state_dict())
    one, more = "quantizer_pix.codebooks.{}.weight", weights["quantizer_sem.codebooks.0.weight"]
    for changed, expected in (({one.format(1): more + 1}, "quantizer_pix has several tables of weight, expected copies of one"),
                              ({one.format(9): more}, "unexpected quantizer_pix.codebooks.9.weight"),
                              ({"quantizer_zzz": more}, "unexpected")):
        torch.save(weights | changed, tmp_path / "dualtoken.pt")
        assert expected in words(sizes)
    torch.save(weights, tmp_path / "dualtoken.pt")
    vq = config["rqvaesiglip"]["vq_pix"]
    for other, expected in ((vq["n_embed"] // 2, "quantizer_pix.codebook is"), (vq["n_embed"], "vq_pix and vq_sem differ")):
        changed = copy.deepcopy(config)
        changed["rqvaesiglip"]["vq_pix"]["n_embed"] = vq["n_embed"] // 2
        changed["rqvaesiglip"]["vq_sem"]["n_embed"] = other
        (tmp_path / "config.json").write_text(json.dumps(changed))
        assert expected in words(sizes)
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"state_dict": {"a": 3}}, tmp_path / "dualtoken.pt")
    assert "no tensors" in words(sizes)
    (tmp_path / "dualtoken.pt").write_bytes(pickle.dumps(print, 2))        # what is no tensor is never run
    assert "cannot be read" in words(sizes)
    (tmp_path / "other.pt").write_bytes(b"")
    assert "has dualtoken.pt and other.pt" in words(sizes)


def test_tokenizer_matches_the_release():
    folder = os.path.join(SHARED, "fixtures/released-layout")
    if not os.path.isdir(folder):
        pytest.skip("no released-layout fixture: set NANODUALTOKEN_SHARED")
    model, io_ = DualTokenizer.from_released(folder), load_file(os.path.join(folder, "io.safetensors"))
    with torch.no_grad():
        pixel, semantic = model.latents(io_["image"].float())
        out = model(io_["image"].float())
        edited = model._decode(model.postquant_pix(model.quantizer_pix.embed(io_["code_pix_edited"].flatten(1, 2))))
        text = model.siglip_model.text_model(io_["text_ids"])
    assert torch.equal(out.codes[:, :, 0], io_["code_pix"].flatten(1, 2)) and torch.equal(out.codes[:, :, 1], io_["code_sem"].flatten(1, 2))
    for ours, theirs, tolerance in ((pixel, "latent_pix", 5e-6), (semantic, "latent_sem", 5e-6), (out.deep, "z_q_sem", 5e-6),
                                    (out.pooled, "image_pooled", 5e-6),
                                    (text, "text_pooled", 5e-6), (out.images, "recon", 5e-5), (edited, "recon_edited", 5e-5),
                                    (out.commitment["pixel"], "quant_loss_pix", 5e-6),
                                    (out.commitment["semantic"], "quant_loss_sem", 5e-6)):
        torch.testing.assert_close(ours.reshape(io_[theirs].shape), io_[theirs], atol=tolerance, rtol=0)


def test_tokenizer_encode_embed_decode_pool_agree_with_forward(tokenizer, pictures):
    with torch.no_grad():
        out, codes = tokenizer(pictures), tokenizer.encode(pictures)
        assert codes.shape == (6, 64, 2, 4) and codes.dtype == torch.int64 and torch.equal(codes, out.codes)
        torch.testing.assert_close(tokenizer.decode(codes), out.images.clamp(-1, 1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(tokenizer.pool(pictures), out.pooled, atol=1e-4, rtol=1e-4)
        vectors = tokenizer.embed(codes)
        assert vectors.shape == (6, 64, 64)
        torch.testing.assert_close(vectors[..., :32], tokenizer.quantizer_pix.embed(codes[:, :, 0]))
        torch.testing.assert_close(vectors[..., 32:], tokenizer.quantizer_sem.embed(codes[:, :, 1]))


def test_tokenizer_streams_do_not_mix(tokenizer, pictures):
    """Pixel codes come from the shallow layer alone, pictures from pixel codes alone, pooled embeddings from semantic codes alone."""
    model = copy.deepcopy(tokenizer)
    with torch.no_grad():
        codes = model.encode(pictures)
        for layer in model.siglip_model.vision_model.encoder.layers[model.config.shallow_layer:model.config.deep_layer]:
            randomised(layer, 5)
        moved = model.encode(pictures)
        assert torch.equal(moved[:, :, 0], codes[:, :, 0]) and not torch.equal(moved[:, :, 1], codes[:, :, 1])
        assert torch.equal(model.decode(moved), model.decode(codes))
        mixed = torch.stack([codes[:, :, 0].flip(1), codes[:, :, 1]], 2)
        assert torch.equal(model.pool_codes(mixed), model.pool_codes(codes)) and not torch.equal(model.decode(mixed), model.decode(codes))


def test_tokenizer_semantic_codes_replace_the_state(tokenizer, pictures):
    """What pooling sees is a function of the codes: another image with the same codes has the same embedding."""
    with torch.no_grad():
        codes = tokenizer.encode(pictures)
        torch.testing.assert_close(tokenizer.pool_codes(codes.clone()), tokenizer.pool(pictures), atol=1e-4, rtol=1e-4)
        other = codes.clone()
        other[:, 0, 1, 0] = (other[:, 0, 1, 0] + 1) % 256
        assert not torch.allclose(tokenizer.pool_codes(other), tokenizer.pool_codes(codes))


def test_tokenizer_projection_out_is_causal_and_in_is_not():
    torch.manual_seed(0)
    out, into = randomised(Projection(8, 32)), randomised(Projection(32, 8))
    x, y = torch.randn(1, 9, 8), torch.randn(1, 9, 32)
    later, later_in = x.clone(), y.clone()
    later[:, 6:], later_in[:, 6:] = 0, 0
    assert torch.allclose(out(x)[:, :6], out(later)[:, :6], atol=1e-5) and not torch.allclose(out(x)[:, 6:], out(later)[:, 6:], atol=1e-3)
    assert not torch.allclose(into(y)[:, :6], into(later_in)[:, :6], atol=1e-3)


def test_tokenizer_checkpointing_changes_nothing(pictures):
    grads, counts = [], []
    for on in (False, True):
        torch.manual_seed(0)        # of the codebooks
        model = randomised(DualTokenizer(preset_config("nano")), scale=0.05)
        model.checkpointing(on)
        out = model(pictures)
        (out.images.square().mean() + out.pooled.square().mean()).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
        counts.append(model.quantizer_pix.batch_count.sum().item())
    assert counts == [6 * 64 * 4] * 2       # recomputation is not counted twice
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_tokenizer_shortcut_layer_changes_the_pixel_latent(pictures):
    model = randomised(DualTokenizer(preset_config("nano", shortcut_layer=1)))
    pixel = model.latents(pictures)[0]
    model.config.shortcut_weight = 0.0
    plain = model.latents(pictures)[0]
    with torch.no_grad():
        x = model.prequant_shortcut(model.siglip_model.vision_model.run(model.siglip_model.vision_model.embeddings(pictures), 1, 1))
    torch.testing.assert_close(pixel, plain + 0.6 * x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name, positions, layers, depth", [("nano", 64, (2, 5, 6), 4), ("nano-64", 64, (2, 5, 6), 4),
                                                            ("small", 64, (2, 7, 8), 4), ("siglip-l-256", 256, (6, 23, 24), 4),
                                                            ("so400m-384", 729, (6, 26, 27), 8), ("siglip2-so-256", 256, (6, 26, 27), 8)])
def test_tokenizer_presets_have_the_papers_sizes(name, positions, layers, depth):
    c = preset_config(name)
    assert (c.positions, (c.shallow_layer, c.deep_layer, c.vision.num_hidden_layers), c.depth) == (positions, layers, depth)
    with torch.device("meta"):      # shapes without memory
        model = DualTokenizer(c)
        x = torch.zeros(1, c.positions, c.vision.hidden_size)
        assert model._decode(x).shape == (1, 3, c.vision.image_size, c.vision.image_size)


@pytest.mark.parametrize("design", DESIGNS)
def test_tokenizer_designs_are_what_their_row_says(pictures, tmp_path, design):
    """Codes of the row's streams; what the losses do not reach is not trained, and everything else is; a file gives the same codes and
    images; what a design cannot do ends in a sentence."""
    torch.manual_seed(0)
    c, row = preset_config("nano", design=design), DESIGNS[design]
    model = DualTokenizer(c)
    model.set_trainable()
    features = model.train()(pictures)
    terms = tokenizer_losses(features, pictures, (torch.randn(len(pictures), c.positions, 96), torch.randn(len(pictures), 96)), row.losses)
    assert {*terms} | {"perceptual", "adversarial"} >= {*row.losses} and {*terms} <= {*row.losses}
    assert (features.images is None) == (not row.paints) and (features.deep is None) == (not row.means)
    weighted(terms, Weights()).backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == (p.grad is not None), name        # DDP would wait for a gradient that never comes
    trained = {name.split(".encoder.layers.")[-1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad
               and "vision_model.encoder.layers" in name}
    assert len(trained) == {"dual": 6, "naive": 6, "recon-deep": 5, "recon-shallow": 2, "sde": 5, "sde-image": 5}.get(design, 0)
    model.eval().save_pretrained(tmp_path)
    again, codes = DualTokenizer.from_pretrained(str(tmp_path)), model.encode(pictures)
    assert codes.shape == (len(pictures), 64, len(row.streams), row.sizes.get("depth", 4)) and torch.equal(again.encode(pictures), codes)
    assert again.embed(codes).shape == (len(pictures), 64, 32 * len(row.streams))
    for function, able, words in ((lambda: again.decode(codes), row.paints, "no decoder"),
                                  (lambda: again.pool_codes(codes), row.means, "no semantics")):
        if able:
            assert function().isfinite().all()
        else:
            with pytest.raises(ValueError, match=words):
                function()


def test_tokenizer_designs_take_their_streams_from_the_right_place(pictures):
    """Perturbing a layer moves exactly the streams that lie behind it."""
    moved = {}
    for design in DESIGNS:
        torch.manual_seed(0)
        model = DualTokenizer(preset_config("nano", design=design)).eval()
        vit, before = model.siglip_model.vision_model, model.latents(pictures)
        for layer in (1, 4):
            with torch.no_grad():
                for p in vit.encoder.layers[layer - 1].mlp.parameters():
                    p.add_(torch.randn_like(p))
            moved[design, layer] = [not torch.equal(a, b) for a, b in zip(before, model.latents(pictures))]
            before = model.latents(pictures)
    two, one = {"dual": ([True, True], [False, True]), "recon-shallow": ([True], [False]),
                "dual-encoder": ([False, True], [False, True])}, [True]
    for design in DESIGNS:
        assert (moved[design, 1], moved[design, 4]) == two.get(design, (one, one)), design
    torch.manual_seed(0)
    model = DualTokenizer(preset_config("nano", design="sde"))
    found = model.sources(pictures)
    torch.testing.assert_close(found["teacher"], found["deep"])          # until the ViT has learned
    torch.testing.assert_close(model.latents(pictures)[0], model.prequant_uni(2 * found["deep"]))


@pytest.mark.parametrize("share", [1.0, 0.25, 0.0])
def test_tokenizer_shares_the_semantic_gradient(pictures, share):
    """Of the semantic loss, so much enters the shared layers, and all of it the later ones; reconstruction's gradient and the features stay
    as they are."""
    torch.manual_seed(0)
    model = DualTokenizer(preset_config("nano"))
    whole, layers = model.sources(pictures)["deep"], model.siglip_model.vision_model.encoder.layers
    gradient = lambda x, layer: torch.autograd.grad(x.square().mean(), layers[layer].mlp.fc1.weight)[0]
    expected = gradient(whole, 1), gradient(model.sources(pictures)["deep"], 2), gradient(model.sources(pictures)["shallow"], 1)
    model.shared_gradient = share
    found = model.sources(pictures)
    torch.testing.assert_close(found["deep"], whole, rtol=0, atol=0)
    deepest = DualTokenizer(preset_config("nano", shallow_layer=5))       # both streams leave after it: no layer is the deep one's alone
    deepest.shared_gradient = share
    weight = deepest.siglip_model.vision_model.encoder.layers[1].mlp.fc1.weight
    shallow, deep = (torch.autograd.grad(deepest.sources(pictures)[name].square().mean(), weight)[0] for name in ("shallow", "deep"))
    torch.testing.assert_close(deep, share * shallow)
    for factor, want, (name, layer) in zip((share, 1, 1), expected, (("deep", 1), ("deep", 2), ("shallow", 1))):
        torch.testing.assert_close(gradient(model.sources(pictures)[name], layer), factor * want)


def test_tokenizer_sizes_of_designs():
    c = preset_config("so400m-384", design="sde")
    assert (c.codebook_size, c.code_dim, c.depth) == (32_768, 8, 1) and preset_config("so400m-384", design="sde", depth=2).depth == 2
    for changes, words in ((dict(design="nonesuch"), "no design 'nonesuch'"), (dict(quantizer="lfq"), "no quantizer 'lfq'"),
                           (dict(quantizer="mcq", depth=5), "multiple of the depth 5"),
                           (dict(code_dim=7), "not a multiple of the code dimension"), (dict(design="naive", shortcut_layer=1), "shortcut"),
                           (dict(depth=-1), "depth is -1"),
                           (dict(vision=vars(VisionConfig(90, 180, 6, 3, image_size=32, patch_size=4)), code_dim=30), "90 channels"),
                           (dict(shallow_layer=7), "no shallow layer 7")):
        with pytest.raises(ValueError, match=words):
            preset_config("nano", **changes)


def test_tokenizer_files_round_trip_and_raise(tokenizer, pictures, tmp_path):
    tokenizer.save_pretrained(str(tmp_path / "a"))
    again = DualTokenizer.from_pretrained(str(tmp_path / "a"))
    assert again.config == tokenizer.config and torch.equal(again.encode(pictures),
                                                            tokenizer.encode(pictures)) and not list(tmp_path.rglob("*.tmp"))
    weights = load_file(tmp_path / "a/model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "decoder.conv_out.bias"}
              | {"stranger": torch.zeros(2), "decoder.conv_in.bias": torch.zeros(5)},
              tmp_path / "a/model.safetensors")
    with pytest.raises(ValueError, match=r"missing decoder.conv_out.bias \(3,\); unexpected stranger \(2,\); decoder.conv_in.bias is "
                                         r"\(5,\), expected \(64,\)"):
        DualTokenizer.from_pretrained(str(tmp_path / "a"))
    (tmp_path / "a/model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match="truncated or damaged"):
        DualTokenizer.from_pretrained(str(tmp_path / "a"))
    for content, words in (('{"model_type": "siglip"}', "no model of ours"), ("[1]", "JSON object"), ("{", "no JSON")):
        (tmp_path / "a/config.json").write_text(content)
        with pytest.raises(ValueError, match=words):
            DualTokenizer.from_pretrained(str(tmp_path / "a"))
    with pytest.raises(ValueError, match="no model in"):
        DualTokenizer.from_pretrained(str(tmp_path / "missing"))


def test_tokenizer_siglip_files_are_hugging_faces(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: no parity with it")
    c = preset_config("nano")
    ours = randomised(SigLIP(c.vision, c.text)).eval()
    ours.save_pretrained(str(tmp_path))
    theirs = transformers.SiglipModel.from_pretrained(tmp_path).eval()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(theirs.vision_model(pixel_values=x).pooler_output, ours.vision_model(x)[1], atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    assert equal(SigLIP.from_pretrained(str(tmp_path / "theirs")).state_dict(), ours.state_dict())


CLIP_PIXELS = [torch.tensor(x)[:, None, None] for x in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))]


def seen(images, mean=CLIP_PIXELS[0], std=CLIP_PIXELS[1]):
    """Images in [-1, 1] as a processor would give them to the model."""
    return (images / 2 + 0.5 - mean) / std


def clip(folder, vision={}, text={}, scale=0.2):
    """A small CLIP of transformers with random weights, saved as transformers saves it; token 49 is the end of a text."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: no parity with it")
    vision = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, image_size=32, patch_size=8) | vision
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=60, max_position_embeddings=12,
                eos_token_id=49) | text
    theirs = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=40))
    randomised(theirs, scale=scale).eval().save_pretrained(folder)
    return theirs


def same_towers(ours, theirs, x, pixels, ids):
    """Every state of the ViT, both embeddings and the logits are transformers', to 1e-4."""
    def near(a, b):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)

    with torch.no_grad():
        states = theirs.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states
        vit, out = ours.vision_model, theirs(pixel_values=pixels, input_ids=ids)
        state = vit.embeddings(x)
        for n, expected in enumerate(states[:-1]):
            near(state, expected)
            state = vit.run(state, n + 1, n + 1)
        near(vit(x)[0], states[-2][:, vit.prefix:])
        near(vit(x)[1], theirs.get_image_features(pixel_values=pixels).pooler_output)
        near(ours.text_model(ids), theirs.get_text_features(input_ids=ids).pooler_output)
        image, words, scale, bias = ours(x, ids)
        near(image @ words.T * scale.exp() + bias, out.logits_per_image)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("end", [2, 49])
def test_tokenizer_clip_matches_transformers(tmp_path, act, end):
    theirs = clip(tmp_path, dict(hidden_act=act), dict(hidden_act=act, eos_token_id=end))
    ours, x = SigLIP.from_pretrained(tmp_path), torch.rand(2, 3, 32, 32) * 2 - 1
    ids = torch.randint(3, 49, (3, 12))
    # an end repeated as padding; a token above the end; a 2
    ids[0, 3], ids[0, 7:], ids[1, 9], ids[2, 5], ids[2, 8], ids[2, 11] = 2, 49, 49, 49, 55, 2
    same_towers(ours, theirs, x, seen(x), ids)
    changed = ids.clone()
    changed[1, 10:] = 7         # after the end, which is the largest
    with torch.no_grad():
        assert torch.equal(ours.text_model(ids)[1], ours.text_model(changed)[1])


def test_tokenizer_activations_are_transformers():
    activations = pytest.importorskip("transformers.activations", reason="transformers is not installed: no parity with it")
    x = torch.linspace(-6, 6, 500)
    for name, function in ACTIVATIONS.items():      # the two GELUs differ by 5e-4 at most
        torch.testing.assert_close(function(x), activations.ACT2FN[name](x), atol=1e-6, rtol=1e-6)


def test_tokenizer_clip_defaults_are_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: no parity with it")
    (tmp_path / "config.json").write_text('{"model_type": "clip", "vision_config": {}, "text_config": {}}')
    theirs, (vision, text) = transformers.CLIPConfig(), read_towers(str(tmp_path))
    shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps", "hidden_act")
    for ours, other, names in ((vision, theirs.vision_config, (*shared, "image_size", "patch_size")),
                               (text, theirs.text_config, (*shared, "vocab_size", "max_position_embeddings", "eos_token_id"))):
        assert {name: getattr(ours, name) for name in names} == {name: getattr(other, name) for name in names}
    assert vision.class_token and text.causal and vision.projection_dim == theirs.projection_dim
    assert [torch.tensor(x)[:, None, None].equal(y) for x, y in zip((vision.pixel_mean, vision.pixel_std), CLIP_PIXELS)] == [True, True]
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 0.5]}')
    assert read_towers(str(tmp_path))[0].pixel_mean == [0.5] * 3 and read_towers(str(tmp_path))[0].pixel_std == [0.25, 0.5, 0.5]


def test_tokenizer_clip_resizes_positions_but_the_class_tokens(tmp_path):
    theirs = clip(tmp_path)
    for side in (48, 20, 32):
        x, ours = torch.rand(2, 3, side, side) * 2 - 1, SigLIP.from_pretrained(tmp_path, side)
        with torch.no_grad():
            expected = theirs.get_image_features(pixel_values=seen(x), interpolate_pos_encoding=True).pooler_output
            torch.testing.assert_close(ours.vision_model(x)[1], expected, atol=1e-4, rtol=0)


def test_tokenizer_clip_files_are_hugging_faces(tmp_path):
    transformers, theirs = pytest.importorskip("transformers"), clip(tmp_path / "theirs")
    ours = SigLIP.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(str(tmp_path / "ours"))
    assert equal(transformers.CLIPModel.from_pretrained(tmp_path / "ours").state_dict(), theirs.state_dict())
    again = SigLIP.from_pretrained(tmp_path / "ours")
    assert equal(again.state_dict(), ours.state_dict()) and (again.vision_config, again.text_config) == (ours.vision_config,
        ours.text_config)
    weights = load_file(tmp_path / "theirs/model.safetensors")
    positions = {f"{tower}_model.embeddings.position_ids": torch.arange(3)[None] for tower in ("vision", "text")}       # of old releases
    save_file(weights | positions, tmp_path / "theirs/model.safetensors")
    assert equal(SigLIP.from_pretrained(tmp_path / "theirs").state_dict(), ours.state_dict())
    for name in ("visual_projection.weight", "vision_model.embeddings.class_embedding", "text_model.final_layer_norm.bias"):
        save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "theirs/model.safetensors")
        with pytest.raises(ValueError, match="1 differences: missing"):
            SigLIP.from_pretrained(tmp_path / "theirs")


@pytest.mark.parametrize("change, words", [
    (lambda c: c.update(model_type="blip"), "has model_type 'blip', expected 'siglip'"),
    (lambda c: c.update(model_type="siglip2"), "SigLIP2 at fixed resolution"),
    (lambda c: c["vision_config"].update(hidden_act="relu6"), "hidden_act is 'relu6', expected one of gelu_pytorch_tanh, gelu, quick_gelu"),
    (lambda c: c["text_config"].update(num_attention_heads=5), "not a multiple of num_attention_heads 5")])
def test_tokenizer_clip_bad_configurations_are_sentences(tmp_path, change, words):
    config = {"model_type": "clip", "vision_config": {}, "text_config": {}}
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words) as caught:
        SigLIP.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def clip_tokenizer(vision, scale=0.1):
    """A small DualTokenizer around a small CLIP, or another ViT of this configuration, with random weights and trained codebooks."""
    more = dict(text=TextConfig(64, 96, 2, 4, vocab_size=60, causal=True, eos_token_id=49), codebook_size=64, depth=2, decoder_channels=16,
                decoder_multipliers=(1, 1, 2),
                decoder_blocks=0, decoder_groups=8, decoder_in=32, latent_grid=8)
    model = randomised(DualTokenizer(TokenizerConfig(vision=vision, **more)), scale=scale)
    for _ in range(3):
        model(torch.rand(8, 3, 32, 32) * 2 - 1)
        for quantizer in model.quantizers.values():
            quantizer.update()
    return model.eval()


def small_clip(**more):
    return VisionConfig(**dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, image_size=32,
                               patch_size=8, class_token=True, projection_dim=40,
                               hidden_act="quick_gelu", pixel_mean=CLIP_PIXELS[0].flatten().tolist(),
                               pixel_std=CLIP_PIXELS[1].flatten().tolist()) | more)


def test_tokenizer_clip_class_token_becomes_the_mean_of_quantized_patches(pictures):
    model = clip_tokenizer(small_clip())
    vit, codes = model.siglip_model.vision_model, model.encode(pictures)
    with torch.no_grad():
        state = vit.embeddings(pictures)
        for n in (1, 2, 3):
            state = vit.encoder.layers[n - 1](state)
            if n == 1:
                torch.testing.assert_close(model.latents(pictures)[0], model.prequant_pix(state[:, 1:]))
        torch.testing.assert_close(model.latents(pictures)[1], model.prequant_sem(state[:, 1:]))
        deep = model.postquant_sem(model.quantizer_sem.embed(codes[:, :, 1]))
        x = vit.encoder.layers[3](torch.cat([deep.sum(1, keepdim=True) / 16, deep], 1))
        by_hand = vit.post_layernorm(x[:, 0]) @ vit.head.weight.T
        torch.testing.assert_close(model.pool_codes(codes), by_hand, atol=1e-5, rtol=1e-4)
        assert by_hand.shape == (6, 40) and model.pool(pictures).shape == (6, 40)
        out = model(pictures)
        assert out.deep.shape == (6, 16, 64) and out.images.shape == pictures.shape and vit(pictures)[0].shape == out.deep.shape
        torch.testing.assert_close(out.pooled, by_hand, atol=1e-4, rtol=1e-4)
        vit.embeddings.class_embedding.normal_()        # it is seen by the patches, so codes may change, but nothing passes by them
        torch.testing.assert_close(model.pool_codes(codes), by_hand, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(vit(pictures)[0], state[:, 1:], atol=1e-3)


def test_tokenizer_clip_round_trips_and_old_configurations_load(tokenizer, pictures, tmp_path):
    model = clip_tokenizer(small_clip())
    model.save_pretrained(str(tmp_path / "clip"))
    again = DualTokenizer.from_pretrained(str(tmp_path / "clip"))
    assert again.config == model.config and equal(again.state_dict(), model.state_dict()) and torch.equal(again.pool(pictures),
        model.pool(pictures))
    tokenizer.save_pretrained(str(tmp_path / "old"))
    config = json.load(open(tmp_path / "old/config.json"))
    for name in ("hidden_act", "causal", "class_token", "projection_dim", "pixel_mean", "pixel_std", "timm", "eos_token_id"):
        assert config["vision"].pop(name, None) is not None or config["text"].pop(name) is not None
        config["text"].pop(name, None)
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    assert DualTokenizer.from_pretrained(str(tmp_path / "old")).config == tokenizer.config


def test_tokenizer_clip_gradient_reaches_all_of_it(pictures):
    """Also with recomputation; what DDP waits for must come."""
    model = clip_tokenizer(small_clip()).train()
    model.checkpointing(True)
    out = model(pictures)
    (out.images.square().mean() + out.pooled.square().mean() + sum(out.commitment.values())).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None and "text_model" not in name and "logit" not in name]


@pytest.mark.parametrize("name", ["siglip-l-256", "so400m-384", "siglip2-so-256"])
def test_tokenizer_paper_backbones_match_transformers(tmp_path, name):
    """A layer of full size, then all positions at a sixteenth of the width. SigLIP2's files at fixed resolution say siglip too, and
    transformers reads them so."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: no parity with it")
    c = preset_config(name)
    for full in (True, False):
        def scaled(t):
            if full:
                return dict(num_hidden_layers=1, hidden_size=t.hidden_size, intermediate_size=t.intermediate_size,
                            num_attention_heads=t.num_attention_heads)
            return dict(num_hidden_layers=3, hidden_size=t.hidden_size // 16, intermediate_size=t.intermediate_size // 16,
                        num_attention_heads=4)
        vision = scaled(c.vision) | dict(patch_size=c.vision.patch_size, image_size=2 * c.vision.patch_size
                                         if full else c.vision.image_size, model_type="siglip_vision_model")
        text = scaled(c.text) | dict(vocab_size=60, max_position_embeddings=8, projection_size=vision["hidden_size"],
                                     model_type="siglip_text_model")
        theirs = transformers.AutoModel.from_config(transformers.AutoConfig.for_model("siglip", vision_config=vision, text_config=text))
        assert type(theirs).__name__ == "SiglipModel"
        randomised(theirs, scale=0.02 if full else 0.1).eval().save_pretrained(tmp_path / str(full))
        ours, x = SigLIP.from_pretrained(tmp_path / str(full)), torch.rand(1, 3, vision["image_size"], vision["image_size"]) * 2 - 1
        assert ours.vision_model.embeddings.position_embedding.num_embeddings == (4 if full else c.positions)
        same_towers(ours, theirs, x, x, torch.randint(60, (2, 8)))


def test_tokenizer_clip_large_layer_matches_transformers(tmp_path):
    theirs = clip(tmp_path, dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=1, num_attention_heads=16, image_size=28,
                                 patch_size=14),
                  dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=1, num_attention_heads=12), scale=0.02)
    x, ids = torch.rand(1, 3, 28, 28) * 2 - 1, torch.randint(49, (2, 12))
    ids[:, 6] = 49
    same_towers(SigLIP.from_pretrained(tmp_path), theirs, x, seen(x), ids)


@pytest.mark.parametrize("vision, grids", [(dict(patch_size=14, image_size=224), (16, 14)), (dict(patch_size=16, image_size=224), (14, 14)),
                                           (dict(patch_size=14, image_size=336), (24, 21)),
                                           (dict(patch_size=14, image_size=384), (27, 24))])
def test_tokenizer_presets_take_patches_of_any_size(vision, grids):
    c = preset_config("siglip-l-256", vision=vars(small_clip(**vision, num_hidden_layers=9)), text=dict(num_hidden_layers=1, vocab_size=9),
                      codebook_size=64, decoder_channels=8, decoder_groups=8, decoder_in=8)
    assert (c.vision.grid, c.latent_grid, c.shallow_layer) == (*grids, 2)
    with torch.no_grad():
        assert DualTokenizer(c)._decode(torch.zeros(1, c.positions, c.vision.hidden_size)).shape == (1, 3, c.vision.image_size,
            c.vision.image_size)
    for width in (768, 1024, 1152, 1280):       # CLIP-B, -L, SigLIP So400m, CLIP-H
        assert preset_config("siglip-l-256",
                             vision=vars(small_clip(**vision, hidden_size=width, num_attention_heads=8))).vision.hidden_size == width
    with pytest.raises(ValueError, match="378 is not a multiple of 16 pixels"):
        preset_config("siglip-l-256", 378, vision=vision)


class StandIn(torch.nn.Module):
    """As timm's ViTs look from outside: a class token, a register, rotations that go to every block, and a head that pools."""

    def __init__(self, img_size=64, patch=8, width=64, num_classes=7, **known):
        super().__init__()
        self.patch_embed = torch.nn.Module()
        self.patch_embed.proj, self.patch_embed.img_size, self.patch_embed.grid_size = torch.nn.Conv2d(3, width, patch,
            patch), (img_size,) * 2, (img_size // patch,) * 2
        self.patch_embed.forward = lambda x: self.patch_embed.proj(x).flatten(2).mT
        self.before, self.num_prefix_tokens, self.embed_dim = torch.nn.Parameter(torch.randn(1, 2, width)), 2, width
        self.rope, self.dynamic_img_size = SimpleNamespace(get_embed=lambda shape: 0.5 if shape == [img_size // patch] * 2 else None), True
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(4))
        for block in self.blocks:       # each place sees the mean of all
            block.forward = lambda x, rope, block=block: x + rope * torch.tanh(F.linear(x + x.mean(1, keepdim=True), block.weight,
                                                                                        block.bias))
        self.norm_pre, self.norm = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, num_classes) if num_classes else torch.nn.Identity()
        self.pretrained_cfg = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}

    def _pos_embed(self, x):
        return torch.cat([self.before.expand(len(x), -1, -1), x], 1), 0.5

    def forward_head(self, x, pre_logits=False):
        return x[:, 0] if pre_logits else self.head(x[:, 0])

    def forward(self, images):
        x = self.norm_pre(self._pos_embed(self.patch_embed(images))[0])
        states = [x := block(x, rope=0.5) for block in self.blocks]
        return states, self.forward_head(self.norm(x), pre_logits=True)


@pytest.fixture
def timm_stand_in(monkeypatch):
    """A module timm, as far as the adapter needs it -> the calls of create_model."""
    calls = []

    def create_model(name, pretrained=False, **more):
        calls.append((name, pretrained, more))
        if name not in ("tiny", "local-dir:there", "plain"):
            raise RuntimeError(f"Unknown model ({name})")
        return torch.nn.Linear(1, 1) if name == "plain" else StandIn(**more)

    models = SimpleNamespace(load_model_config_from_path=lambda path: ({}, "tiny", {"width": 64, "num_classes": 7}))
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model, models=models))
    return calls


def test_tokenizer_timm_adapter_gives_states_and_pooled(timm_stand_in):
    vit = randomised(SigLIP.from_timm("tiny", 32, pretrained=True)).vision_model
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        states, pooled = vit.model(seen(x, torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.2, 0.25, 0.3])[:, None, None]))
        for n in range(1, 5):
            torch.testing.assert_close(vit.run(vit.embeddings(x), 1, n), states[n - 1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(vit(x), (states[2][:, 2:], pooled), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer_similarity(vit, x)[0, 3], F.cosine_similarity(*(states[n][:, 2:].mean(1) for n in (0, 3))).mean(),
                                   atol=1e-4, rtol=1e-4)
        patches = torch.randn(2, 16, 64)
        assert torch.equal(vit.reset(patches)[:, 2:], patches) and torch.allclose(vit.reset(patches)[:, :2],
                                                                                  patches.mean(1, keepdim=True).expand(-1, 2, -1))
    assert (vit.config.grid, vit.config.num_hidden_layers, vit.config.hidden_size) == (4, 4, 64)
    assert timm_stand_in == [("tiny", True, {"img_size": 32, "num_classes": 0})]
    again = SigLIP.from_timm("local-dir:there", pretrained=False).vision_config
    assert again.timm == {"model_name": "tiny", "img_size": 64, "width": 64, "num_classes": 7}


def test_tokenizer_timm_round_trips(timm_stand_in, pictures, tmp_path):
    model = clip_tokenizer(SigLIP.from_timm("tiny", 32).vision_config)
    model.save_pretrained(str(tmp_path / "tokenizer"))
    del timm_stand_in[:]
    again, codes = DualTokenizer.from_pretrained(str(tmp_path / "tokenizer")), model.encode(pictures)
    assert timm_stand_in == [("tiny", False, {"img_size": 32, "num_classes": 0})]
    assert again.config == model.config and equal(again.state_dict(), model.state_dict()) and torch.equal(again.pool(pictures),
        model.pool_codes(codes))
    assert model.decode(codes).shape == pictures.shape
    model.siglip_model.save_pretrained(str(tmp_path / "siglip"))
    assert equal(SigLIP.from_pretrained(str(tmp_path / "siglip")).state_dict(), model.siglip_model.state_dict())
    with pytest.raises(ValueError, match="not interpolated here; got image size 64"):
        SigLIP.from_pretrained(str(tmp_path / "siglip"), 64)


@pytest.mark.parametrize("design", DESIGNS)
def test_tokenizer_designs_train_what_gets_a_gradient_in_timms_vits_too(timm_stand_in, design):
    siglip = randomised(SigLIP.from_timm("tiny", 32))
    config = TokenizerConfig(vision=siglip.vision_config, text=TextConfig(64, 96, 2, 4), design=design, codebook_size=16, depth=2,
                             code_dim=32, decoder_channels=16, decoder_multipliers=(1, 1, 2),
                             decoder_blocks=0, decoder_groups=8, decoder_in=32, latent_grid=8)
    model, images = DualTokenizer(config, siglip), torch.rand(2, 3, 32, 32) * 2 - 1
    model.set_trainable()
    out = model(images)
    weighted(tokenizer_losses(out, images, (torch.randn(2, 16, 64), torch.randn(2, 64)), model.design.losses), Weights()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad != (p.grad is not None)]


@pytest.mark.parametrize("name, more", [("eva02_tiny_patch14_224", dict(img_size=56)), ("vitamin_small_224", dict(img_size=64))])
def test_tokenizer_timm_backbones_are_timms(tmp_path, name, more):
    timm = pytest.importorskip("timm", reason="timm or its torchvision cannot be imported: no parity with it", exc_type=ImportError)
    siglip = SigLIP.from_timm(name, more["img_size"], pretrained=False)
    vit, x = randomised(siglip, scale=0.05).eval().vision_model, torch.rand(2, 3, more["img_size"], more["img_size"]) * 2 - 1
    theirs = timm.create_model(name, num_classes=0, **more).eval()
    theirs.load_state_dict(vit.model.state_dict())
    layers, pixels = vit.config.num_hidden_layers, seen(x, *(torch.tensor(theirs.pretrained_cfg[key])[:, None, None]
                                                             for key in ("mean", "std")))
    with torch.no_grad():
        shallow, deep = theirs.forward_intermediates(pixels, indices=[layers // 4 - 1, layers - 2], output_fmt="NLC",
                                                     intermediates_only=True)
        torch.testing.assert_close(vit.run(vit.embeddings(x), 1, layers // 4)[:, vit.prefix:], shallow, atol=1e-4, rtol=0)
        torch.testing.assert_close(vit(x), (deep, theirs(pixels)), atol=1e-4, rtol=0)
        c = TokenizerConfig(vision=vit.config, codebook_size=64, depth=2, decoder_channels=8, decoder_groups=8, decoder_in=16,
                            latent_grid=more["img_size"] // 16)
        model = DualTokenizer(c, siglip).eval()
        model.save_pretrained(str(tmp_path))
        again, codes = DualTokenizer.from_pretrained(str(tmp_path)), model.encode(x)
        assert torch.equal(again.encode(x), codes) and torch.equal(again.pool_codes(codes), model.pool_codes(codes)) and again.config == c


@pytest.mark.parametrize("call, words", [
    (lambda: preset_config("tiny"), "no preset 'tiny'; expected one of nano"),
    (lambda: preset_config("nano", 38), "38 is not a multiple of 4"),
    (lambda: preset_config("so400m-384", 380), "380 is not a multiple of 16"),
    (lambda: preset_config("nano", shallow_layer=6), "1 <= shallow <= deep"),
    (lambda: preset_config("nano", shallow_layer=9), "there is no shallow layer 9: the ViT has layers 1 to 6"),
    (lambda: preset_config("nano", shallow_layer=-1), "shallow_layer is -1, expected a whole number from 0"),
    (lambda: preset_config("nano", deep_layer=7), "no deep layer 7"),
    (lambda: preset_config("nano", code_dim=40), "96 is not a multiple of the code dimension 40")])
def test_tokenizer_configuration_errors_are_sentences(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_tokenizer_shape_errors_are_sentences(tokenizer):
    for wrong in (lambda: tokenizer.encode(torch.zeros(1, 3, 64, 64)), lambda: tokenizer.decode(torch.zeros(1, 64, 1, 4).long()),
                  lambda: tokenizer.decode(torch.full((1, 64, 2, 4), 999))):
        with pytest.raises(ValueError, match="expected"):
            wrong()


@pytest.mark.parametrize("prefix", [0, 1])
def test_tokenizer_layer_similarity_is_equation_8(prefix):
    vit = randomised(VisionTower(VisionConfig(32, 48, 4, 2, image_size=32, patch_size=8, class_token=bool(prefix),
                                              projection_dim=16))).eval()
    images, rows = World("plain", 32).batch(range(18))[0], []
    with torch.no_grad():
        for image in images:
            features = np.stack([vit.run(vit.embeddings(image[None]), 1, n)[0, prefix:].double().numpy().mean(0) for n in range(1, 5)])
            features /= np.linalg.norm(features, axis=1, keepdims=True)
            rows.append(features @ features.T)
    found = layer_similarity(vit, images).numpy()
    assert np.abs(found - np.mean(rows, 0)).max() < 1e-5 and found[np.triu_indices(4, 1)].max() < 0.99


def test_tokenizer_layer_split_finds_the_blocks():
    for sizes in ((7, 10, 10), (2, 2, 2), (4, 3, 13), (15, 4, 5), (2, 20, 18)):
        part = torch.arange(3).repeat_interleave(torch.tensor(sizes))
        noise = 0.2 * torch.rand(len(part), len(part), generator=torch.Generator().manual_seed(0))
        assert split_layers(0.8 - 0.25 * (part[:, None] - part).abs() + noise) == (sizes[0], sizes[0] + sizes[1])
    fading = 1 - (torch.arange(27.0)[:, None] - torch.arange(27)).abs() / 27
    assert split_layers(fading) == (9, 18) and split_layers(torch.rand(3, 3)) == (1, 2)     # without blocks: thirds, no single layers
    fading[-1] = fading[:, -1] = 0.1        # nor one for a last layer that is unlike all others
    assert split_layers(fading) == (8, 17)
    with pytest.raises(ValueError, match="2 layers cannot be split"):
        split_layers(torch.eye(2))


# --- text

MIXED_TEXTS = ["A photo of a RED circle, left of a blue square!", "It's the dog's 2nd-best frisbee; nobody (really) threw it.",
               "Größe ÄÖÜ: naïve café, \u6771\u4eac 123",
         "two small   children\tplaying\nin THE snow", "", "  ", "dog " * 90, "unknown \U0001f436 \u03a9", "a.b,c <tag> {x}_y"]


def text_vocabulary(kind, folder, normaliser=True):
    """A small tokenizer.json of the published ones' form -> the number of its ids."""
    tk = pytest.importorskip("tokenizers", reason="tokenizers is not installed: no vocabularies")
    n, p, train = tk.normalizers, tk.pre_tokenizers, tk.trainers
    if kind == "SigLIP":
        t, cleaned = tk.Tokenizer(tk.models.Unigram()), [n.Lowercase(),
                                                         n.Replace(tk.Regex("[" + "".join("\\" + c for c in string.punctuation) + "]"), "")]
        t.normalizer = n.Sequence(cleaned * normaliser + [n.Replace(tk.Regex(r"\s+"), " "), n.Strip()])
        t.pre_tokenizer = p.Metaspace()
        t.train_from_iterator(MIXED_TEXTS[:4] * 50, train.UnigramTrainer(vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"],
                                                                         unk_token="<unk>", show_progress=False))
        t.post_processor = tk.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    elif kind == "SigLIP2":
        t = tk.Tokenizer(tk.models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        t.normalizer, t.pre_tokenizer = n.Replace(" ", "\u2581"), p.Split(" ", "merged_with_previous")
        specials = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        t.train_from_iterator([text.lower() for text in MIXED_TEXTS[:2]] + ["A B R", "</s>"],
                              train.BpeTrainer(vocab_size=380, special_tokens=specials, show_progress=False))
        t.post_processor = tk.processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    else:
        t = tk.Tokenizer(tk.models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
        t.normalizer = n.Sequence([n.NFC(), n.Replace(tk.Regex(r"\s+"), " "), n.Lowercase()])
        words = tk.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
        t.pre_tokenizer = p.Sequence([p.Split(words, "removed", invert=True), p.ByteLevel(add_prefix_space=False)])
        t.train_from_iterator(MIXED_TEXTS[:4], train.BpeTrainer(vocab_size=600, special_tokens=["<|startoftext|>", "<|endoftext|>"],
                                                                initial_alphabet=p.ByteLevel.alphabet(),
                                                          end_of_word_suffix="</w>", show_progress=False))
        t.post_processor = tk.processors.RobertaProcessing(("<|endoftext|>", 1), ("<|startoftext|>", 0), add_prefix_space=False)
    t.enable_padding(length=5)          # some published files ask for such things
    t.enable_truncation(max_length=5)
    os.makedirs(folder, exist_ok=True)
    t.save(os.path.join(folder, "tokenizer.json"))
    return t.get_vocab_size()


def text_reader(kind, folder, length=64, **more):
    size = text_vocabulary(kind, folder, **more)
    return TextVocabulary(TextConfig(vocab_size=size, max_position_embeddings=length), folder)


@pytest.mark.parametrize("kind, cls, length", [("SigLIP", "PreTrainedTokenizerFast", 64), ("SigLIP", "PreTrainedTokenizerFast", 16),
                                               ("SigLIP2", "Siglip2Tokenizer", 64),
                                               ("CLIP", "CLIPTokenizer", 77)])
def test_tokenizer_text_ids_are_transformers(kind, cls, length, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: no parity with it")
    marks = {"SigLIP": dict(eos_token="</s>", pad_token="</s>", unk_token="<unk>"),
             "CLIP": dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
             "SigLIP2": dict(eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", add_bos_token=False, add_eos_token=True)}[kind]
    ours = text_reader(kind, str(tmp_path), length)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**marks, "tokenizer_class": cls, "padding_side": "right",
                                                                "model_max_length": length}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ in (cls, "TokenizersBackend")
    expected = theirs(MIXED_TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
    assert expected.shape == (len(MIXED_TEXTS), length) and torch.equal(ours.ids(MIXED_TEXTS), expected) and ours.ids([]).shape == (0,
        length)


def test_tokenizer_text_is_prepared_as_in_training(tmp_path):
    """SigLIP reads neither capitals nor punctuation, also where its tokenizer.json leaves that to the processor; SigLIP2 reads punctuation;
    every text ends in its mark."""
    loud, quiet = "  It's THE\tdog's; (really)!", "its the dogs really"
    for kind, alike in (("SigLIP", True), ("SigLIP2", False), ("CLIP", False)):
        reader = text_reader(kind, str(tmp_path / kind), **({"normaliser": False} if kind == "SigLIP" else {}))
        ids = reader.ids([loud, quiet, loud.lower(), "dog " * 90])
        assert torch.equal(ids[0], ids[1]) == alike and torch.equal(ids[0], ids[2])
        assert ids[3, -1] == 1 and ids[1, -1] == {"SigLIP": 1, "SigLIP2": 0, "CLIP": 1}[kind] and (ids[:, 0] == 0).all() == (kind == "CLIP")


def test_tokenizer_text_ids_are_bytes():
    ids = TextVocabulary(TextConfig(vocab_size=257, max_position_embeddings=6)).ids(["ab", "", "é" * 9])
    assert ids.tolist() == [[97, 98, 256, 256, 256, 256], [256] * 6, [195, 169] * 3] and ids.dtype == torch.int64


def test_tokenizer_vocabulary_goes_with_the_weights(tmp_path):
    c = preset_config("nano")
    c.text.vocab_size = text_vocabulary("SigLIP", str(tmp_path / "a"))
    SigLIP(c.vision, c.text).save_pretrained(str(tmp_path / "a"))
    siglip = SigLIP.from_pretrained(str(tmp_path / "a"))
    siglip.save_pretrained(str(tmp_path / "b"))
    DualTokenizer(c, SigLIP.from_pretrained(str(tmp_path / "b"))).save_pretrained(str(tmp_path / "c"))
    again = DualTokenizer.from_pretrained(str(tmp_path / "c")).siglip_model
    assert torch.equal(again.text_ids(MIXED_TEXTS), siglip.text_ids(MIXED_TEXTS)) and (siglip.text_ids(MIXED_TEXTS)[:4,
        3] > 2).all() and not list(tmp_path.rglob("*.tmp"))
    DualTokenizer(preset_config("nano")).save_pretrained(str(tmp_path / "c"))  # a vocabulary that was left behind is not that of bytes
    again = DualTokenizer.from_pretrained(str(tmp_path / "c")).siglip_model
    assert again.text_ids(["a"])[0, :2].tolist() == [97, 256] and not again.vocabulary.files


def test_tokenizer_vocabulary_errors_are_sentences(tmp_path, monkeypatch):
    size = text_vocabulary("SigLIP", str(tmp_path))

    def words(content=None, size=size):
        if content is not None:
            (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ValueError) as caught:
            TextVocabulary(TextConfig(vocab_size=size), str(tmp_path)).ids(["a"])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    whole = (tmp_path / "tokenizer.json").read_bytes()
    assert f"has {size} ids up to {size - 1}, and the text tower a table of 32,000" in words(size=32000)
    assert "is damaged, or no vocabulary" in words(whole[:500]) and "is damaged, or no vocabulary" in words(b"{}")
    assert "is damaged, or no vocabulary" in words(pickle.dumps(print))
    assert "has the marks of none of CLIP, SigLIP2, SigLIP" in words(whole.replace(b"</s>", b"[SEP]"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install tokenizers" in words(whole)
    os.remove(tmp_path / "tokenizer.json")
    assert f"the text tower has {size} ids, and no {tmp_path}/tokenizer.json says which they are" in words()
    with pytest.raises(ValueError, match="put the checkpoint's tokenizer.json there"):
        SigLIP(VisionConfig(**preset_config("nano").vision.__dict__),
               TextConfig(**{**preset_config("nano").text.__dict__, "vocab_size": 300})).text_ids(["a"])


def test_tokenizer_attention_over_a_map_reads_rows(monkeypatch):
    """As fast kernels want queries, keys and values: the numbers of one place side by side."""
    module, seen = sys.modules["tokenizer"], []
    attend = module.attend
    monkeypatch.setattr(module, "attend", lambda *qkv: seen.extend(x.stride(-1) for x in qkv) or attend(*qkv))
    module.AttnBlock(16, 4)(torch.randn(2, 16, 3, 3))
    assert seen == [1, 1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# losses

def test_losses_semantic_is_eq_4():
    x, y = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    cos = (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)
    torch.testing.assert_close(distance(x, y), ((x - y) ** 2).mean() - cos.mean())
    torch.testing.assert_close(distance(x, x), torch.tensor(-1.0))
    low = x.bfloat16(), y.bfloat16()
    torch.testing.assert_close(distance(*low), distance(*(side.float() for side in low)))      # compared in fp32


def test_losses_every_weight_counts():
    terms = {name: torch.tensor(float(3 ** n)) for n, name in enumerate(("pixel", "perceptual", "deep", "pooled", "commitment"))}
    weights = Weights(pixel=2, perceptual=3, deep=5, pooled=7, commitment=11)
    assert weighted(terms, weights).item() == 2 * 1 + 3 * 3 + 5 * 9 + 7 * 27 + 11 * 81


@pytest.fixture
def lpips_files(tmp_path):
    """Random weights in the layouts of torchvision and lpips -> the two files."""
    torch.manual_seed(0)
    vgg, width, places = {"classifier.0.weight": torch.randn(3, 3)}, 3, (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    for place, w in zip(places, (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)):
        vgg |= {f"features.{place}.weight": torch.randn(w, width, 3, 3) * (2 / 9 / width) ** 0.5,
                f"features.{place}.bias": torch.randn(w) * 0.1}
        width = w
    torch.save(vgg, tmp_path / "vgg16.pth")
    torch.save({f"lin{n}.model.1.weight": torch.rand(1, w, 1, 1) for n, w in enumerate((64, 128, 256, 512, 512))}, tmp_path / "lpips.pth")
    return tmp_path / "vgg16.pth", tmp_path / "lpips.pth"


def test_losses_lpips_is_what_its_paper_says(lpips_files):
    """Against the formula, written out in float64: features after the last ReLU before each pooling, and after the last one."""
    vgg, heads = (torch.load(file, weights_only=True) for file in lpips_files)
    x, y = torch.rand(2, 2, 3, 40, 32) * 2 - 1
    expected, states = torch.zeros(2, dtype=torch.float64), []
    for image in (x, y):
        z, seen = ((image / 2 + 0.5).double() - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:,
            None, None], []
        for place in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28):
            z = F.max_pool2d(z, 2) if place in (5, 10, 17, 24) else z
            z = F.conv2d(z, vgg[f"features.{place}.weight"].double(), vgg[f"features.{place}.bias"].double(), padding=1).relu()
            seen += [z / (z ** 2).sum(1, keepdim=True).sqrt()] if place in (2, 7, 14, 21, 28) else []
        states.append(seen)
    for n, (a, b) in enumerate(zip(*states)):
        expected += ((a - b) ** 2 * heads[f"lin{n}.model.1.weight"]).sum(1).mean((1, 2))
    lpips = train_tokenizer.load_lpips(*map(str, lpips_files))
    assert expected.min() > 0.1
    # the constants have three digits
    torch.testing.assert_close(lpips(x, y), expected.mean().float(), atol=2e-3 * expected.mean().item(), rtol=0)
    x.requires_grad_(True)
    lpips(x, y.requires_grad_(True)).backward()
    assert x.grad.isfinite().all() and x.grad.any() and y.grad is None and not any(p.requires_grad for p in lpips.parameters())


def test_losses_lpips_matches_its_package(lpips_files):
    theirs = pytest.importorskip("lpips", reason="lpips is not installed: no parity with it").LPIPS(net="vgg", pretrained=False,
        pnet_rand=True, verbose=False).eval()
    vgg, heads = (torch.load(file, weights_only=True) for file in lpips_files)
    names = {int(name.split(".")[1]): name.rsplit(".", 1)[0] for name in theirs.net.state_dict()}
    theirs.net.load_state_dict({f"{names[int(key.split('.')[1])]}.{key.split('.')[2]}": value for key, value in vgg.items()
                                if key.startswith("features.")})
    theirs.load_state_dict(heads, strict=False)
    x, y = torch.rand(2, 2, 3, 40, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(train_tokenizer.load_lpips(*map(str, lpips_files))(x, y), theirs(x, y).mean(), atol=1e-4, rtol=0)


def test_losses_lpips_bad_files_end_in_a_sentence(lpips_files, tmp_path):
    vgg, heads = map(str, lpips_files)
    for files, words in (((heads, heads), "missing"), ((vgg, vgg), "missing"), ((vgg, str(tmp_path / "none.pth")), "cannot be read"),
                         ((str(tmp_path / "none.safetensors"), heads), "no weights at")):
        with pytest.raises(ValueError, match=words):
            train_tokenizer.load_lpips(*files)


def test_losses_perceptual_slot_is_used(tokenizer, pictures):
    with torch.no_grad():
        out, teacher = tokenizer(pictures), tokenizer.siglip_model.vision_model(pictures)
        terms = tokenizer_losses(out, pictures, teacher, tokenizer.design.losses, lambda a, b: (a - b).abs().mean())
    torch.testing.assert_close(terms["perceptual"], (out.images - pictures).abs().mean())
    assert "perceptual" not in tokenizer_losses(out, pictures, teacher, tokenizer.design.losses)


def test_losses_sigmoid_contrastive_is_every_pair():
    image, text = F.normalize(torch.randn(5, 8), dim=-1), F.normalize(torch.randn(5, 8), dim=-1)
    scale, bias = torch.tensor([2.0]), torch.tensor([-3.0])
    naive = sum(math.log1p(math.exp(-(1 if i == j else -1) * (math.e ** 2 * (image[i] @ text[j]).item() - 3))) for i in range(5)
                for j in range(5)) / 5
    assert abs(sigmoid_contrastive(image, text, scale, bias).item() - naive) < 1e-4


def test_losses_discriminator_treats_images_apart_and_hinges():
    d = Discriminator(32, 2)
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(d(x)[:1], d(x[:1]), atol=1e-5, rtol=1e-4)        # BatchNorm would couple them
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert discriminator_loss(real, fake).item() == (0.25 + 0.5) / 2


def test_losses_adaptive_weight_is_the_ratio_of_gradients():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    assert abs(adaptive_weight((6 * w).sum(), (2 * w).sum(), w).item() - 3) < 1e-3
    assert adaptive_weight((100 * w).sum(), w.sum(), w).item() == 10 and abs(adaptive_weight(w.sum(), (100 * w).sum(), w).item()
                                                                             - 0.3) < 1e-6


def test_losses_adaptive_weight_is_the_same_on_any_number_of_ranks(monkeypatch):
    w = torch.tensor([1e-4], requires_grad=True)
    alone = adaptive_weight((w * w).sum(), (w * w).sum(), w).item()       # gradients as small as what keeps it from dividing by zero
    for name, value in (("is_initialized", lambda: True), ("all_reduce", lambda x: x.mul_(4)), ("get_world_size", lambda: 4)):
        monkeypatch.setattr(torch.distributed, name, value)
    assert 0.5 < alone < 0.8 and abs(adaptive_weight((w * w).sum(), (w * w).sum(), w).item() - alone) < 1e-6


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_mllm_linear_cross_entropy_is_the_plain_one(rows, monkeypatch):
    """Value and gradients, in chunks and at once; in chunks, logits of a chunk alone exist."""
    monkeypatch.setattr(mllm, "LOGITS", rows * 300)
    h, weight, target = torch.randn(30, 16), torch.randn(300, 16), torch.randint(300, (30,))
    found, sizes, linear = [], [], F.linear
    monkeypatch.setattr(mllm.F, "linear", lambda x, w: (sizes.append(len(x)), linear(x, w))[1])
    for function in (mllm.linear_cross_entropy, lambda h, w, t: F.cross_entropy(h @ w.T, t, reduction="sum")):
        inputs = [h.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = function(*inputs, target)
        found.append((loss, *torch.autograd.grad(3 * loss, inputs)))
    for ours, plain in zip(*found):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4)
    assert max(sizes) == rows and sum(sizes) == 60
    monkeypatch.setattr(mllm, "LOGITS", 4 * 30 * 300)
    torch.testing.assert_close(mllm.linear_cross_entropy(h, weight, target), found[1][0].detach(), rtol=1e-5, atol=1e-4)
    assert sizes[-1] == 30 and mllm.linear_cross_entropy(h[:0], weight, target[:0]) == 0


def test_losses_psnr():
    x = torch.zeros(2, 3, 16, 16)
    y = torch.stack([torch.full((3, 16, 16), 0.2), torch.full((3, 16, 16), 5.0)])       # 0.1 of the range; clamped to 0.5 of it
    torch.testing.assert_close(psnr(x, y), torch.tensor([20.0, 6.0206]), atol=1e-3, rtol=0)


def test_losses_ssim_is_the_formula():
    x, y = torch.rand(1, 3, 11, 11) * 2 - 1, torch.rand(1, 3, 11, 11) * 2 - 1
    g = np.exp(-(np.arange(11) - 5.0) ** 2 / 4.5)
    w = np.outer(g, g) / g.sum() ** 2
    a, b = (t[0].double().numpy() / 2 + 0.5 for t in (x, y))
    values = []
    for c in range(3):      # one window, no padding: one value per channel
        ma, mb = (w * a[c]).sum(), (w * b[c]).sum()
        va, vb, vab = (w * (a[c] - ma) ** 2).sum(), (w * (b[c] - mb) ** 2).sum(), (w * (a[c] - ma) * (b[c] - mb)).sum()
        values.append((2 * ma * mb + 1e-4) * (2 * vab + 9e-4) / ((ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4)))
    assert abs(ssim(x, y).item() - np.mean(values)) < 1e-5
    torch.testing.assert_close(ssim(x, x), torch.ones(1))
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(x[..., :8, :8], y[..., :8, :8])


def test_losses_frechet_distance_has_the_closed_form():
    torch.manual_seed(0)
    x = torch.randn(4000, 3).double()
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T      # exactly zero mean, unit covariance
    y = x * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([1.0, 0.0, 2.0])
    assert abs(frechet_distance(x, y) - (5 + 0 + 1 + 4)) < 1e-6 and abs(frechet_distance(x, x)) < 1e-6
    with pytest.raises(ValueError, match="at least 2 samples"):
        frechet_distance(x[:1], y)


def test_losses_moments_come_batch_by_batch():
    """Against numpy, and scipy's matrix square root where there is one; far from zero, where float32 would fail."""
    torch.manual_seed(0)
    x, y = torch.randn(500, 6).double() @ torch.randn(6, 6).double() + 1e3, torch.randn(300, 6).double() + 1e3
    one, two = Moments(6), Moments(6)
    for part in x.split(64):
        one.add(part)
    two.add(y)
    np.testing.assert_allclose(one.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(one.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-6, atol=1e-6)
    assert abs(frechet_distance(one, two) - frechet_distance(x, y)) < 1e-6
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is not installed: no comparison with its matrix square root")
    a, b = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert abs(frechet_distance(one, two) - expected) < 1e-5 * expected


# ---------------------------------------------------------------------------------------------------------------------
# train_tokenizer

TINY = ["--siglip-steps", "6", "--steps", "8", "--batch-size", "16", "--log-every", "1", "--save-every", "4", "--eval-images", "24",
        "--device", "cpu", "--precision", "fp32"]


def train(out, *more, script=train_tokenizer):
    script.main([*TINY, "--out", str(out), *more])
    return out


def failing(error):
    def fail(*_, **__):
        raise error
    return fail


def stopped(*argv):
    """The words a run ends with when something is wrong; no traceback, exit status 1."""
    with pytest.raises(SystemExit) as end:
        train_tokenizer.run(lambda: train_tokenizer.main(list(argv)))
    assert isinstance(end.value.code, str) and end.value.code.startswith("error: ")
    return end.value.code


def log(out):
    return [json.loads(line) for line in open(os.path.join(out, "log.jsonl"), encoding="utf-8")]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run") / "tokenizer", "--gan", "--gan-start", "0.25", "--eval-every", "4")


def test_train_leaves_all_that_was_promised(run_folder):
    for path in ("model.safetensors", "config.json", "state.pt", "log.jsonl", "metrics.json", "curves.png", "samples/reconstructions.png",
                 "siglip/model.safetensors",
                 "siglip/metrics.json"):
        assert os.path.getsize(run_folder / path) > 0
    metrics = json.load(open(run_folder / "metrics.json"))
    expected = {"zero_shot", "teacher_zero_shot", "zero_shot_held_out", "retrieval", "psnr", "ssim", "fd", "usage", "perplexity",
                "reader_accuracy", "preset", "design",
                "streams", "steps", "seed", "device", "seconds", "peak_memory_gib", "images_per_second", "torch", "commit"}
    assert expected <= metrics.keys() and set(metrics["usage"]) == {"pixel", "semantic"} and set(metrics["retrieval"]) == {"i2t", "t2i"}
    steps = [line["step"] for line in log(run_folder) if "loss" in line]
    assert steps == list(range(1, 9)) and sum("eval_psnr" in line for line in log(run_folder)) == 2
    assert ["discriminator" in line for line in log(run_folder) if "loss" in line] == [False] * 2 + [True] * 6


def test_train_reuses_its_siglip_and_learns_from_it(run_folder, tmp_path, capsys):
    shutil.copytree(run_folder / "siglip", tmp_path / "siglip")
    train(tmp_path, "--steps", "30", "--lr", "1e-3", "--save-every", "30")
    assert "is kept from an earlier run" in capsys.readouterr().out
    losses = [line["loss"] for line in log(tmp_path) if "loss" in line]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_train_curves_have_the_last_evaluation(run_folder, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(train_tokenizer, "draw_curves", lambda lines, path: drawn.append(lines))
    train(tmp_path, "--siglip", str(run_folder / "siglip"), "--eval-every", "4")
    assert [line["step"] for line in drawn[-1] if "eval_psnr" in line] == [4, 8]


def test_train_an_evaluation_made_up_for_is_no_training_time(run_folder, tmp_path, monkeypatch):
    flags = ["--siglip", str(run_folder / "siglip"), "--eval-every", "4"]
    evaluate, metrics = train_tokenizer.TokenizerStage.evaluate, {}
    monkeypatch.setattr(train_tokenizer.TokenizerStage, "evaluate", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, *flags)
    later = []

    def takes_a_thousand_seconds(stage):
        later.append(1000)
        return metrics or metrics.update(evaluate(stage)) or metrics
    monkeypatch.setattr(train_tokenizer.TokenizerStage, "evaluate", takes_a_thousand_seconds)
    monkeypatch.setattr(train_tokenizer, "time", SimpleNamespace(**vars(time) | {"time": lambda: time.time() + sum(later)}))
    train(tmp_path, *flags, "--resume")
    assert log(tmp_path)[-2]["step"] == 8 and min(line["images_per_second"] for line in log(tmp_path) if line.get("loss")) > 0.1


@pytest.mark.parametrize("quantizer, usage", [("rvq", 1.0), ("mcq", 0.25)])
def test_train_log_counts_codes_of_each_table(quantizer, usage):
    """Four depths, each with 4 of 16 codes, others at each depth."""
    codes = torch.stack([torch.arange(4 * d, 4 * d + 4) for d in range(4)], 1).reshape(1, 4, 1, 4)
    stage = SimpleNamespace(codes=codes, streams=["pixel"], counted={"gan_skipped": torch.zeros(())},
                            model=SimpleNamespace(config=SimpleNamespace(codebook_size=16, shared_codebook=quantizer == "rvq")))
    assert train_tokenizer.TokenizerStage.log(stage) == {"usage_pixel": usage}


def test_muon_takes_the_layers_of_timms_vits_too(timm_stand_in):
    model = clip_tokenizer(SigLIP.from_timm("tiny", 32).vision_config)
    found = {name for name, p in model.named_parameters() if p.dim() == 2 and train_tokenizer.MATRICES.search(name)}
    assert {f"siglip_model.vision_model.model.blocks.{n}.weight" for n in range(4)} <= found
    assert not any("patch_embed" in name or "model.head" in name for name in found)


def test_train_takes_a_siglip_folder(run_folder, tmp_path):
    train(tmp_path, "--siglip", str(run_folder / "siglip"), "--steps", "2")
    assert not os.path.exists(tmp_path / "siglip")
    text = "siglip_model.text_model.head.weight"        # frozen
    assert torch.equal(load_file(tmp_path / "model.safetensors")[text],
                       load_file(run_folder / "siglip/model.safetensors")[text.split(".", 1)[1]])


@contextlib.contextmanager
def dying(monkeypatch, stage, step):
    """Ctrl-C as soon as this stage has logged this step."""
    write = train_tokenizer.write_log

    def dies(the_stage, line, broken):
        write(the_stage, line, broken)
        if the_stage.name == stage and line["step"] == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_tokenizer, "write_log", dies)
        yield


@pytest.mark.parametrize("stage, dies_at", [("siglip", 5), ("tokenizer", 6)])
def test_train_interrupted_and_resumed_is_uninterrupted(run_folder, tmp_path, monkeypatch, stage, dies_at):
    """Bit for bit, the log included; the discriminator was on."""
    more = "--gan", "--gan-start", "0.25", "--eval-every", "4"
    with dying(monkeypatch, stage, dies_at):
        train(tmp_path, *more)
    train(tmp_path, *more, "--resume")
    for path in ("siglip/model.safetensors", "model.safetensors"):
        assert equal(load_file(run_folder / path), load_file(tmp_path / path))
    ours, theirs = (torch.load(folder / "state.pt", weights_only=True) for folder in (run_folder, tmp_path))
    assert equal(ours["discriminator"], theirs["discriminator"])
    assert all(torch.equal(a[k], b[k]) for a, b in zip(*(s["optimizer"]["state"].values() for s in (ours, theirs)))
               for k in ("exp_avg", "exp_avg_sq", "step"))
    assert timeless(run_folder) == timeless(tmp_path)


@pytest.mark.parametrize("design, quantizer", [("naive", "mcq"), ("recon-shallow", "rvq"), ("quantised", "rvq"), ("dual-encoder", "mcq"),
                                               ("sde", "rvq"), *(pytest.param(*row, marks=[is_slow, is_skipped]) for row in (
                                                   ("recon-deep", "mcq"), ("sde-image", "rvq"), ("sde-semantic", "rvq")))])
def test_train_designs_resume_exactly_and_leave_alone_what_does_not_train(run_folder, tmp_path, monkeypatch, design, quantizer):
    more = ("--design", design, "--quantizer", quantizer, "--siglip", str(run_folder / "siglip"), "--eval-images", "4", "--steps", "6",
            "--save-every", "3", *(["--gan", "--gan-start", "0.25"] if DESIGNS[design].paints else []))
    train(tmp_path / "whole", *more)
    with dying(monkeypatch, "tokenizer", 5):
        train(tmp_path / "parts", *more)
    train(tmp_path / "parts", *more, "--resume")
    whole, parts, siglip = (load_file(folder / "model.safetensors")
                            for folder in (tmp_path / "whole", tmp_path / "parts", run_folder / "siglip"))
    assert equal(whole, parts)
    changed = {name for name, value in siglip.items() if not torch.equal(value, whole[f"siglip_model.{name}"])}
    layers = {int(name.split(".")[3]) + 1 for name in changed if name.startswith("vision_model.encoder.")}
    assert layers == {*range(1, 1 + {"naive": 6, "recon-shallow": 2, "recon-deep": 5, "sde": 5, "sde-image": 5}.get(design,
        0))} and not any(name.startswith("text_model.") for name in changed)
    assert any(name.startswith("vision_model.head.") for name in changed) == (design == "naive")
    if design == "sde":
        assert all(torch.equal(value, siglip[f"vision_model.{name.removeprefix('teacher.')}"]) for name, value in whole.items()
                   if name.startswith("teacher."))
    before = log(tmp_path / "whole")
    train(tmp_path / "whole", *more, "--resume")        # finished: nothing happens
    assert log(tmp_path / "whole") == before


def test_train_two_ranks_are_one_process(tmp_path):
    """Codebooks and discriminators bit-equal on both ranks, and the losses of one process; also where two ranks begin and one
    process goes on from a checkpoint of theirs."""
    code = textwrap.dedent("""
        import os, sys, torch, train_tokenizer as t
        fit = t.fit

        def kept(stage, *more):
            fit(stage, *more)
            if stage.name == "tokenizer":
                weights = {**stage.model.state_dict(), **stage.discriminator.state_dict(prefix="discriminator.")}
                torch.save(weights, f"{sys.argv[1]}/rank{os.environ.get('RANK', 0)}.pt")
        t.fit = kept
        t.cosine = lambda step, steps, warmup: (step + 1) / 50      # the beginning of a long run
        t.run(lambda: t.main(sys.argv[2:]))
        """)
    (tmp_path / "script.py").write_text(code)
    argv = [str(tmp_path / "script.py")]
    environment = {**os.environ, "PYTHONPATH": HERE, "OMP_NUM_THREADS": "1"}
    flags = [*TINY, "--steps", "12", "--gan", "--gan-start", "0.75", "--keep-checkpoints", "3"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, launch, more in (("one", [], []), ("two", torchrun, []), ("both", [], ["--resume"])):
        done = subprocess.run([sys.executable, *launch, *argv, str(tmp_path / name), *flags, *more, "--out", str(tmp_path / name / "run")],
                              cwd=HERE, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if name == "two":
            shutil.copytree(tmp_path / "two", tmp_path / "both")
            os.rename(tmp_path / "both/run/state-1.pt", tmp_path / "both/run/state.pt")
            os.remove(tmp_path / "both/run/metrics.json")
    assert "tokenizer: resumed at step 8 of 12" in done.stdout
    first, second = (torch.load(tmp_path / f"two/rank{r}.pt", weights_only=True) for r in range(2))
    assert equal(first, second)
    metrics = [json.load(open(tmp_path / name / "run/metrics.json")) for name in ("one", "two")]
    assert metrics[0]["images"] == metrics[1]["images"] == 24 and metrics[1]["ranks"] == 2
    for name, share in (("psnr", 0.01), ("ssim", 0.01), ("fd", 0.05)):      # of 24 images the distance moves with every code
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=share), name
    for stage in ("run/siglip", "run"):
        for other in ("two", "both"):
            curves = [[line["loss"] for line in log(tmp_path / name / stage) if "loss" in line] for name in ("one", other)]
            apart, largest = np.abs(np.subtract(*curves)), max(1, np.abs(curves[0]).max())
            # Rounding grows until a code flips, and the adversarial term, of the last three steps, magnifies that by its adaptive weight.
            assert len(apart) == (6 if "siglip" in stage else 12) and apart[:9].max() < 1e-5 * largest and apart.max() < 1e-3 * largest


def test_train_accumulation_is_the_whole_batch(run_folder, tmp_path):
    for name, micro in (("one", "1"), ("four", "4")):
        train(tmp_path / name, "--siglip", str(run_folder / "siglip"), "--accumulate", micro)
    for what in ("loss", "norm"):       # the norm too: to Adam, a gradient four times as large is the same
        curves = [[line[what] for line in log(tmp_path / name) if what in line] for name in ("one", "four")]
        assert np.abs(np.subtract(*curves)).max() < 1e-3 * max(curves[0])


def test_train_skips_steps_that_are_not_finite(run_folder, tmp_path, monkeypatch, capsys):
    """The weights before and after are the same, the term is named, and too many in a row end the run with the weights kept."""
    weights, original = [], train_tokenizer.TokenizerStage.loss

    def spoilt(self, images, captions, *, step):
        weights.append({name: p.detach().clone() for name, p in self.model.state_dict().items() if not name.endswith("updates")})
        total, terms = original(self, images, captions, step=step)
        if step >= 5:
            terms = {**terms, "deep": terms["deep"] * float("nan")}
            total = total * float("nan")
        return total, terms

    monkeypatch.setattr(train_tokenizer.TokenizerStage, "loss", spoilt)
    words = stopped(*TINY, "--out", str(tmp_path), "--siglip", str(run_folder / "siglip"), "--max-bad-steps", "2")
    assert "2 steps in a row were not finite (loss, deep)" in words
    assert not equal(weights[3], weights[4]) and equal(weights[5], weights[6])
    assert "1 steps skipped, not finite: loss, deep" in capsys.readouterr().out
    assert all(value.isfinite().all() for value in load_file(tmp_path / "model.safetensors").values())


def test_train_goes_on_from_another_tokenizer(run_folder, tmp_path, capsys):
    """At the start it is that tokenizer; and the released layout is taken as ours is."""
    state = lambda folder: {name: value for name, value in load_file(folder / "model.safetensors").items() if "quantizer" not in name}
    train(tmp_path / "on", "--init", str(run_folder), "--lr", "1e-12")
    near = lambda a, b: all((a[name] - b[name]).abs().max() < 1e-6 for name in a)
    assert near(state(run_folder), state(tmp_path / "on")) and not near(state(run_folder),
        state(train(tmp_path / "other", "--siglip", str(run_folder / "siglip"), "--lr", "1e-12")))
    assert "leave these flags out" in stopped(*TINY, "--init", str(run_folder), "--shallow-layer", "1", "--out", str(tmp_path / "x"))
    assert "is --out too" in stopped(*TINY, "--init", str(run_folder), "--out", str(run_folder))
    assert "the released layout" in stopped(*TINY, "--init", str(run_folder / "siglip"), "--siglip", str(run_folder / "siglip"), "--out",
                                            str(tmp_path / "x"))
    assert "give it with --siglip" in stopped(*TINY, "--init", str(run_folder / "siglip"), "--out", str(tmp_path / "x"))


def test_train_with_lpips(run_folder, lpips_files, tmp_path, capsys):
    files = ["--vgg", str(lpips_files[0]), "--lpips", str(lpips_files[1])]
    train(tmp_path / "run", "--siglip", str(run_folder / "siglip"), "--steps", "3", *files)
    assert all(line["perceptual"] > 0 for line in log(tmp_path / "run")
               if "loss" in line) and "perceptual term is off" not in capsys.readouterr().out
    train(tmp_path / "without", "--siglip", str(run_folder / "siglip"), "--steps", "1")
    assert capsys.readouterr().out.count("perceptual term is off") == 1
    assert "needs both files" in stopped(*TINY, *files[:2], "--out", str(tmp_path / "x"))


def test_train_on_larger_images_than_the_siglip_saw(run_folder, tmp_path, capsys):
    train(tmp_path, "--siglip", str(run_folder / "siglip"), "--image-size", "48")
    assert capsys.readouterr().out.count("is for 32 pixels: its position embeddings are interpolated for 48") == 1
    assert DualTokenizer.from_pretrained(tmp_path).config.positions == 144


def test_train_takes_a_quarter_of_the_layers(run_folder, tmp_path):
    train(tmp_path / "run", "--siglip", str(run_folder / "siglip"), "--steps", "1", "--shallow-layer", "quarter")
    assert [DualTokenizer.from_pretrained(folder).config.shallow_layer for folder in (tmp_path / "run", run_folder)] == [1, 2]
    for flag, words in (("--shallow-layer", "no shallow layer 9"), ("--deep-layer", "no deep layer 9"),
                        ("--shortcut-layer", "no shortcut layer 9")):
        assert words in stopped("--device", "cpu", "--out", str(tmp_path / "x"), flag, "9")
    assert [preset_config(name, shallow_layer=0).shallow_layer for name in ("nano", "small", "siglip-l-256", "so400m-384",
                                                                            "siglip2-so-256")] == [1, 2, 6, 6, 6]


def test_train_takes_a_clip_folder(tmp_path):
    """Its text tower has its own width; the tokenizer is made for its patches, and measured against it."""
    clip(tmp_path / "clip", text=dict(vocab_size=257))
    train(tmp_path / "run", "--siglip", str(tmp_path / "clip"), "--steps", "2")
    model, metrics = DualTokenizer.from_pretrained(tmp_path / "run"), json.load(open(tmp_path / "run/metrics.json"))
    assert model.config.vision.class_token and model.config.text.causal and model.config.positions == 16 and model.config.latent_grid == 8
    assert {"zero_shot", "teacher_zero_shot", "fd", "retrieval"} <= metrics.keys()
    text, saved = "text_model.embeddings.token_embedding.weight", load_file(tmp_path / "run/model.safetensors")
    assert torch.equal(saved["siglip_model." + text], load_file(tmp_path / "clip/model.safetensors")[text])       # frozen
    name = "vision_model.embeddings.class_embedding"
    assert not torch.equal(saved["siglip_model." + name], load_file(tmp_path / "clip/model.safetensors")[name])


def test_train_takes_a_backbone_of_timm(timm_stand_in, tmp_path, capsys):
    flags_ = ["--backbone", "timm:tiny", "--image-size", "32"]
    train(tmp_path / "run", *flags_, "--steps", "2", "--checkpointing")
    assert capsys.readouterr().out.count("no text tower") == 1 and timm_stand_in[0][1]
    metrics = json.load(open(tmp_path / "run/metrics.json"))
    assert {"psnr", "fd", "reader_accuracy"} <= metrics.keys() and not [name for name in metrics if "zero_shot" in name
                                                                        or "retrieval" in name]
    train(tmp_path / "on", "--init", str(tmp_path / "run"), *flags_[:2], "--steps", "1")
    del timm_stand_in[:]
    train_tokenizer.main([*TINY, *flags_, "--bench", "--out", str(tmp_path / "bench")])
    assert timm_stand_in == [("tiny", False, {"img_size": 32, "num_classes": 0})] and not os.path.exists(tmp_path / "bench")


def test_train_bad_backbones_end_in_a_sentence(timm_stand_in, run_folder, tmp_path, monkeypatch):
    words = lambda *argv: stopped("--device", "cpu", "--out", str(tmp_path / "run"), *argv)
    assert ("timm cannot make 'nothing' (RuntimeError: Unknown model (nothing)); expected a name that timm.list_models() gives"
            in words("--backbone", "timm:nothing"))
    assert "plain of timm has no patch_embed; expected a plain ViT" in words("--backbone", "timm:plain")
    assert "expected one of them" in words("--backbone", "timm:tiny", "--siglip", str(run_folder / "siglip"))
    assert "--backbone as timm:NAME" in words("--backbone", "tiny")
    assert "no shallow layer 5: the ViT has layers 1 to 4" in words("--backbone", "timm:tiny", "--image-size", "32", "--shallow-layer", "5")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "needs the package timm, which cannot be imported" in words("--backbone", "timm:tiny")
    assert not os.path.exists(tmp_path / "run")


def matrices():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(*shape)) for shape in ((24, 40), (40, 24), (24, 40), (2, 16, 48))]


def test_muon_takes_the_steps_of_torchs():
    """torch's own goes matrix by matrix, and computes in bf16."""
    ours, theirs = matrices()[:3], matrices()[:3]
    optimizers = (train_tokenizer.Muon(ours, 0.02, 0.1), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95,
                                                                          adjust_lr_fn="match_rms_adamw"))
    start = [p.detach().clone() for p in ours]
    for step in range(4):
        for parameters, optimizer in zip((ours, theirs), optimizers):
            for n, p in enumerate(parameters):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + n))
            train_tokenizer.step_or_skip(optimizer, 0.02, torch.tensor(False))
    for a, b, p in zip(ours, theirs, start):
        assert (a - b).norm() < 0.02 * (a - p).norm()


def test_muon_makes_every_matrix_orthogonal():
    for p in matrices():
        values = torch.linalg.svdvals(train_tokenizer.Muon.orthogonal(p.detach()))
        assert values.shape[:-1] == p.shape[:-2] and values.min() > 0.5 and values.max() < 1.3


def test_muon_steps_a_kernel_as_the_matrix_of_its_rows():
    """Also beside a matrix of the same number of weights, and in the second step, whose momentum is not the gradient."""
    torch.manual_seed(0)
    kernel, matrix = torch.nn.Parameter(torch.randn(8, 4, 3, 3)), torch.nn.Parameter(torch.zeros(8, 36))
    matrix.data.copy_(kernel.data.flatten(1))
    optimizer = train_tokenizer.Muon([kernel, matrix], 0.02, 0.1)
    for step in range(2):
        kernel.grad = torch.randn(8, 4, 3, 3)
        matrix.grad, before = kernel.grad.flatten(1), kernel.detach().clone()
        train_tokenizer.step_or_skip(optimizer, 0.02, torch.tensor(False))
        assert close(kernel.detach().flatten(1), matrix.detach(), 1e-6) and (kernel - before).norm() > 0.01


@pytest.mark.parametrize("flags, some", [([], True), (["--no-muon"], False)])
def test_muon_trains_the_layers_and_kernels_of_a_tokenizer(tmp_path, monkeypatch, flags, some):
    """And AdamW the rest, among it what reads colours and what writes them; without it, AdamW trains all."""
    stages = []
    monkeypatch.setattr(train_tokenizer, "train", lambda stage, *_: stages.append(stage))
    train_tokenizer.main(["--siglip", os.path.join(HERE, "weights/tokenizer/siglip"), "--out", str(tmp_path), "--device", "cpu", *flags])
    stage, = stages
    names = {id(p): name for name, p in stage.model.named_parameters() if p.requires_grad}
    muon, adamw = ({names[id(p)] for group in optimizer.param_groups for p in group["params"]} if optimizer else set()
                   for optimizer in (stage.muon, stage.optimizer))
    assert not muon & adamw and muon | adamw == {*names.values()} and stage.settings["muon"] == some
    assert ({"siglip_model.vision_model.encoder.layers.0.mlp.fc1.weight", "decoder.conv_in.weight", "decoder.mid.attn_1.q.weight",
             "decoder.up.0.block.0.conv1.weight"} <= muon) == some
    assert {"siglip_model.vision_model.embeddings.patch_embedding.weight", "decoder.conv_out.weight",
            "siglip_model.vision_model.encoder.layers.0.mlp.fc1.bias"} <= adamw


def test_train_settings_that_are_gone_are_differences():
    old, new = {"lr": 1, "perceptual": "x", "row": {"a": [1, 2]}}, {"lr": 1, "row": {"a": [1, 3]}, "more": 0}
    assert sorted(train_tokenizer.differences(old, new)) == ["more None -> 0", "perceptual x -> None", "row.a.1 2 -> 3"]


def test_train_mllm_captions_are_not_cut_inside_a_letter():
    cut = lambda words, n: train_mllm.Sequences.cut(SimpleNamespace(text=BYTES, args=SimpleNamespace(text_length=n)), words)
    assert cut("赤い円", 7) == "赤い" and cut("赤い円", 9) == "赤い円" and cut("red", 2) == "re"


def test_train_mllm_changed_pictures_behind_a_link_are_others(tmp_path):
    (tmp_path / "elsewhere").mkdir(), (tmp_path / "photos").mkdir()
    flat(3).save(tmp_path / "elsewhere" / "a.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "photos" / "more")
    of = lambda: train_mllm.fingerprint(images.ImageData(str(tmp_path / "photos"), 8, train=False))
    before = of()
    flat(200, 50).save(tmp_path / "elsewhere" / "a.png")
    os.utime(tmp_path / "elsewhere" / "a.png", (1, 1))
    assert of() != before and of() == of()


def test_muon_skipped_step_changes_nothing():
    parameters = matrices()
    optimizer, before = train_tokenizer.Muon(parameters, 0.02, 0.1), []
    for step, bad in enumerate((False, True, False)):
        for p in parameters:
            p.grad = torch.full_like(p, float("nan")) if bad else torch.randn_like(p)
        before.append([t.detach().clone() for p in parameters for t in (p, optimizer.state[p]["momentum"])])
        train_tokenizer.step_or_skip(optimizer, 0.02, torch.tensor(bad))
    after = [t for p in parameters for t in (p, optimizer.state[p]["momentum"])]
    assert all(map(torch.equal, before[1], before[2])) and not any(map(torch.equal, before[0], before[1])) and not any(map(torch.equal,
        before[2], after))


@contextlib.contextmanager
def full_disk(room):
    """No file of this process grows beyond so many bytes."""
    resource = pytest.importorskip("resource", reason="no file limits on this system, to stand for a full disk")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_train_full_disk_keeps_the_old_checkpoint(run_folder, tmp_path, monkeypatch):
    begun, save, before = ["--siglip", str(run_folder / "siglip"), "--save-every", "2"], train_tokenizer.save_state, {}
    files = "state.pt", "model.safetensors", "config.json"

    def saves(stage, step, *more):
        before.update({name: (tmp_path / name).read_bytes() for name in files if step == 4})
        with full_disk(100_000) if step == 4 else contextlib.nullcontext():
            save(stage, step, *more)
    monkeypatch.setattr(train_tokenizer, "save_state", saves)
    words = stopped(*TINY, "--out", str(tmp_path), *begun)
    assert "state.pt cannot be written at step 4" in words and "the checkpoint before it is kept" in words and "\n" not in words
    assert before == {name: (tmp_path / name).read_bytes() for name in files} and not glob.glob(str(tmp_path / "*.tmp"))
    monkeypatch.undo()
    train(tmp_path, *begun, "--resume")
    assert [line["step"] for line in log(tmp_path) if "loss" in line] == [*range(1, 9)]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("name, words", [("config.json", "state.pt cannot be written at step 4"),
                                         ("metrics.json", "make room or name another --out, then --resume goes on")])
def test_train_device_without_space_is_a_sentence(run_folder, tmp_path, name, words):
    begun = ["--siglip", str(run_folder / "siglip"), "--out", str(tmp_path)]
    (tmp_path / f"{name}.tmp").symlink_to("/dev/full")
    said = stopped(*TINY, *begun)
    assert words in said and "No space left on device" in said and "\n" not in said
    (tmp_path / f"{name}.tmp").unlink(missing_ok=True)
    train(tmp_path, *begun[:2], "--resume")
    assert [line["step"] for line in log(tmp_path) if "loss" in line] == [*range(1, 9)] and (tmp_path / "metrics.json").exists()


def test_train_what_torch_says_of_a_full_disk_is_a_sentence(run_folder, tmp_path, monkeypatch):
    """In none of its wordings a traceback; while an error of the device is none of the disk."""
    argv, real = [*TINY, "--siglip", str(run_folder / "siglip"), "--out", str(tmp_path)], torch.save

    def fails(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 2960768 vs 2960656")
    monkeypatch.setattr(torch, "save", fails)
    assert "state.pt cannot be written at step 4 " in stopped(*argv)
    monkeypatch.setattr(torch, "save", real)
    monkeypatch.setattr(train_tokenizer.TokenizerStage, "save", lambda self, weights: (_ for _ in ()).throw(RuntimeError("CUDA error")))
    with pytest.raises(RuntimeError, match="CUDA error"):
        train_tokenizer.main(argv)


@pytest.mark.parametrize("folder", ["/dev/null/run", "/proc/run"])
def test_train_folder_that_cannot_be_is_a_sentence(run_folder, folder):
    assert "run" in stopped(*TINY, "--siglip", str(run_folder / "siglip"), "--out", folder)


def test_train_one_run_a_folder(run_folder, tmp_path, monkeypatch):
    """A second one is refused while the first lives, on that folder alone."""
    code = (f"import train_tokenizer as t, time; t.lock({str(tmp_path / 'one')!r}, t.Ranks('cpu')); "
            "print('held', flush=True); time.sleep(600)")
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    flags_ = [*TINY, "--siglip", str(run_folder / "siglip"), "--steps", "1", "--out"]
    monkeypatch.setattr(train_tokenizer.time, "sleep", lambda _: None)
    assert f"another run is writing into {tmp_path / 'one'}" in stopped(*flags_, str(tmp_path / "one")) and not os.listdir(tmp_path / "one")
    train_tokenizer.main([*flags_, str(tmp_path / "two")])
    holder.kill(), holder.wait()
    for _ in range(2):      # a process may write into a folder that is its own twice
        train_tokenizer.main([*flags_, str(tmp_path / "one")])


def test_train_keeps_checkpoints_and_takes_the_newest_that_can_be_read(run_folder, tmp_path, capsys):
    more = ["--siglip", str(run_folder / "siglip"), "--save-every", "2", "--keep-checkpoints", "3"]
    train(tmp_path, *more)
    steps = lambda: {name: torch.load(tmp_path / name, weights_only=True)["step"] for name in os.listdir(tmp_path)
                     if re.fullmatch(r"state.*\.pt", name)}
    assert steps() == {"state.pt": 8, "state-1.pt": 6, "state-2.pt": 4}
    whole, lines = load_file(tmp_path / "model.safetensors"), timeless(tmp_path)
    (tmp_path / "state.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:5000]), (tmp_path / "metrics.json").unlink(), (tmp_path
        / "state-1.pt").unlink()
    train(tmp_path, *more, "--resume")
    said = capsys.readouterr().out
    assert "state.pt cannot be resumed from" in said and "an older one is taken" in said and "resumed at step 4 of 8" in said and (tmp_path
        / "state.pt.damaged").stat().st_size == 5000
    assert equal(load_file(tmp_path / "model.safetensors"), whole) and timeless(tmp_path) == lines
    for name in steps():
        (tmp_path / name).write_bytes(b"no checkpoint")
    (tmp_path / "metrics.json").unlink()
    assert stopped(*TINY, *more, "--out", str(tmp_path), "--resume").count("cannot be resumed from") == 3


def test_train_says_that_a_codebook_has_collapsed(run_folder, tmp_path, monkeypatch, capsys):
    low = iter([0.5, 0.05, 0.05, 0.05, 0.05, 0.5, 0.05, 0.05])
    monkeypatch.setattr(train_tokenizer, "LOW_STEPS", 3)
    monkeypatch.setattr(train_tokenizer.TokenizerStage, "log", lambda self: {"usage_pixel": next(low), "usage_semantic": 0.9})
    train(tmp_path, "--siglip", str(run_folder / "siglip"))
    assert [line.get("collapsed") for line in log(tmp_path) if "loss" in line] == [None] * 3 + [["pixel"]] * 2 + [None] * 3
    summary = train_tokenizer.summary       # one look, however late, tells nothing of the steps before it
    stage = SimpleNamespace(args=SimpleNamespace(log_every=9), log=lambda: {"usage_pixel": 0.05})
    line, low = summary(stage, 9, {}, torch.zeros(()), torch.ones(()), 1.0, {})
    assert "collapsed" not in line and "collapsed" in summary(stage, 18, {}, torch.zeros(()), torch.ones(()), 1.0, low)[0]
    assert capsys.readouterr().out.count("codebook pixel: under 10% of its codes") == 2


def test_train_workers_that_die_are_started_again(tmp_path, monkeypatch):
    """The same batches as if none had died; a step that kills them twice ends in a sentence; other errors go through."""
    for n in range(40):
        Image.new("RGB", (16, 16), (6 * n, 0, 0)).save(tmp_path / f"{n}.png")
    data, said = images.ImageData(str(tmp_path), 8, seed=5), []
    plain = [batch[0] for _, batch in zip(range(12), data.load(6, workers=0))]
    stream = train_tokenizer.never_ending(lambda start: ((batch[0],) for batch in data.load(6, start=start, workers=1)), 0, said.append)
    found = [next(stream)[0] for _ in range(3)]
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    found += [next(stream)[0] for _ in range(9)]
    assert all(map(torch.equal, found, plain)) and len(said) == 1 and "died at step" in said[0]

    def dies(start):
        yield from range(start, 3)
        raise RuntimeError(words)
    for words in ("DataLoader worker (pid 1) is killed by signal: Killed.", "Pin memory thread exited unexpectedly"):
        with pytest.raises(ValueError, match=f"for step 4 died twice .*{words[-10:]}.*lower --workers"):
            list(train_tokenizer.never_ending(dies, 0, said.append))
    with pytest.raises(RuntimeError, match="shapes"):
        list(train_tokenizer.never_ending(lambda start: (_ for _ in ()).throw(RuntimeError("shapes")), 0, print))


# A run that is asked to stop, and goes on

STOPS = [*TINY, "--steps", "12", "--log-every", "5", "--save-every", "50", "--eval-every", "4", "--eval-images", "8", "--gan",
         "--gan-start", "0.25"]


def timeless(folder):
    """The log without what depends on the clock."""
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second", "sequences_per_second", "waiting")}
            for line in log(folder)]


def same_run(one, other):
    """Bit for bit: weights, codebooks, discriminator, optimisers, log and pictures."""
    assert equal(load_file(one / "model.safetensors"), load_file(other / "model.safetensors")) and timeless(one) == timeless(other)
    states = [{k: v for k, v in torch.load(folder / "state.pt", weights_only=True).items() if k not in ("seconds", "settings")}
              for folder in (one, other)]
    flat = [torch.utils._pytree.tree_flatten_with_path(state)[0] for state in states]
    assert [path for path, _ in flat[0]] == [path for path, _ in flat[1]]
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for (_, a), (_, b) in zip(*flat))
    for picture in glob.glob(str(one / "samples/*.png")):
        assert Path(picture).read_bytes() == Path(str(picture).replace(str(one), str(other))).read_bytes()
    return True


def until(true, seconds=120):
    """Wait for it."""
    end = time.time() + seconds
    while not (found := true()):
        assert time.time() < end
        time.sleep(0.01)
    return found


def logged(folder):
    return len(log(folder)) if os.path.exists(folder / "log.jsonl") else 0


@pytest.fixture(scope="module")
def whole_run(run_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_tokenizer.main([*STOPS, "--siglip", str(run_folder / "siglip"), "--out", str(folder)])
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_train_signals_finish_the_step_and_save(run_folder, whole_run, tmp_path, number):
    """Wherever it is, and the folder may move before it goes on: the run is the same to the bit, its log too."""
    flags_ = [*STOPS, "--siglip", str(run_folder / "siglip"), "--out"]
    process = subprocess.Popen([sys.executable, "train_tokenizer.py", *flags_, str(tmp_path / "run")], cwd=HERE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    until(lambda: logged(tmp_path / "run"))
    process.send_signal(number)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number and "Traceback" not in errors and "the step is finished and saved first" in errors
    step = int(re.search(rf"{number.name}: tokenizer stopped after step (\d+) of 12, which is saved in (\S+)/run/state.pt", printed)[1])
    assert torch.load(tmp_path / "run/state.pt", weights_only=True)["step"] == step and 4 <= step <= 12
    os.rename(tmp_path / "run", tmp_path / "moved")
    train_tokenizer.main([*flags_, str(tmp_path / "moved"), "--resume"])
    assert same_run(whole_run, tmp_path / "moved")


@pytest.mark.parametrize("at", [3, 8, 12])
def test_train_stopped_at_any_step_is_the_same_run(run_folder, whole_run, tmp_path, monkeypatch, at):
    """Between log lines (every 5 steps) and checkpoints, before an evaluation (every 4), and at the end."""
    argv, step, count = [*STOPS, "--siglip", str(run_folder / "siglip"), "--out",
                         str(tmp_path / "run")], train_tokenizer.take_step, iter(range(1, 99))
    monkeypatch.setattr(train_tokenizer, "take_step", lambda *a: (os.kill(os.getpid(), signal.SIGTERM) if next(count) == at else None,
                                                                  step(*a))[1])
    with pytest.raises(SystemExit, match="143"):
        train_tokenizer.main(argv)
    monkeypatch.undo()
    assert torch.load(tmp_path / "run/state.pt", weights_only=True)["step"] == at and not os.path.exists(tmp_path / "run/metrics.json")
    train_tokenizer.main([*argv, "--resume"])
    assert same_run(whole_run, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_train_second_signal_stops_at_once(run_folder, tmp_path, number):
    code = ("import sys, time, train_tokenizer as t\n"
            "step = t.take_step\n"
            "t.take_step = lambda *a: (print('stepping', flush=True), time.sleep(100), step(*a))[2]\n"
            "t.run(lambda: t.main(sys.argv[1:]))")
    process = subprocess.Popen([sys.executable, "-c", code, *TINY, "--siglip", str(run_folder / "siglip"), "--out", str(tmp_path)],
                               cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "stepping" not in process.stdout.readline():
        pass
    process.send_signal(number)
    assert "the step is finished" in (process.stderr.readline() + process.stderr.readline())
    process.send_signal(number)     # at once: torchrun's
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == (130 if number == signal.SIGINT
                                  else -signal.SIGTERM) and "Traceback" not in errors and not os.path.exists(tmp_path / "state.pt")


def test_train_a_signal_to_one_rank_stops_all_and_they_go_on(run_folder, tmp_path):
    """Both save the same step; torchrun starts them again, and they end."""
    (tmp_path / "script.py").write_text("import os, train_tokenizer as "
                                        "t\nopen(f\"{os.path.dirname(__file__)}/{os.environ['TORCHELASTIC_RESTART_COUNT']}-"
                                        "{os.environ['RANK']}\", 'w').write(str(os.getpid()))\nt.run(t.main)\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1",
                str(tmp_path / "script.py"), *STOPS, "--siglip", str(run_folder / "siglip"), "--resume", "--out"]
    env = {**os.environ, "PYTHONPATH": HERE, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    process = subprocess.Popen([*torchrun, str(tmp_path / "run")], cwd=HERE, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    until(lambda: logged(tmp_path / "run"))
    os.kill(int((tmp_path / "0-1").read_text()), signal.SIGTERM)
    printed, errors = process.communicate(timeout=240)
    step = re.search(r"SIGTERM: tokenizer stopped after step (\d+)", printed)[1]
    assert process.returncode == 0 and f"tokenizer: resumed at step {step} of 12" in printed, errors
    assert [line["step"] for line in log(tmp_path / "run") if "loss" in line] == [5, 10, 12]


def killed_and_resumed(start, folder: Path, states: str, kills: int, rng: random.Random, longest: float) -> Counter:
    """Kills a run by SIGKILL so many times, half of them while it writes a checkpoint, starting it again each time, and lets it end.
    start() -> a process that resumes; states: a pattern of its checkpoints. Nothing that was saved may be lost. -> how often it was killed
    where."""
    found, last = Counter(), {}
    while found.total() < kills:
        process, at, saving = start(), time.time() + rng.uniform(0.2, longest), found.total() % 2
        while process.poll() is None and time.time() < (at if not saving else at + longest):
            if saving and time.time() > at and glob.glob(str(folder / states.replace("state.pt", "*.tmp")), recursive=True):
                break
            time.sleep(0.0005)
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read()
            return found        # it was faster
        with contextlib.suppress(ProcessLookupError):
            writing = bool(glob.glob(str(folder / states.replace("state.pt", "*.tmp")), recursive=True))
            process.destroy(rng)
        process.communicate()
        steps = {path: torch.load(path, weights_only=True, mmap=True)["step"] for path in glob.glob(str(folder / states), recursive=True)}
        assert all(steps[path] >= step for path, step in last.items()), (last, steps)
        found["while saving" if writing else "elsewhere"] += 1
        last = steps
    process = start()
    printed, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return found


class Run(subprocess.Popen):
    """A script, or torchrun and its ranks, in a process group of its own."""

    def __init__(self, argv, ranks=1, **env):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        self.ranks = ranks
        super().__init__([sys.executable, *torchrun, *map(str, argv)], cwd=HERE,
            env={**os.environ, "PYTHONPATH": HERE, "OMP_NUM_THREADS": "1", **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True, start_new_session=True)

    def destroy(self, rng):
        """All of it, or, of several ranks, one alone, which torchrun ends the others for."""
        if self.ranks > 1:
            children = [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
            if children:
                os.kill(rng.choice(children), signal.SIGKILL)
                self.communicate(timeout=120)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


@slow
@pytest.mark.parametrize("ranks, kills", [(1, 30), (2, 8)])
def test_train_killed_anywhere_loses_nothing(run_folder, tmp_path, ranks, kills):
    """At random moments and in the middle of saving; of two ranks, one: bit for bit the run that was never killed."""
    argv = ["train_tokenizer.py", *STOPS, "--siglip-steps", "120", "--steps", "240", "--save-every", "3", "--resume", "--keep-checkpoints",
            "2"]
    assert Run([*argv, "--out", tmp_path / "whole"], ranks).wait() == 0
    found = killed_and_resumed(lambda: Run([*argv, "--out", tmp_path / "run"], ranks), tmp_path / "run", "**/state.pt", kills,
                               random.Random(0), 12 * ranks)
    print(f"\n{ranks} ranks, killed {dict(found)}")
    assert same_run(tmp_path / "whole", tmp_path / "run") and same_run(tmp_path / "whole/siglip",
                                                                       tmp_path / "run/siglip") and found["while saving"] > kills // 4


@slow
def test_train_mllm_killed_anywhere_loses_nothing(tokenizer_folder, tmp_path):
    """In every stage, and while it extracts codes."""
    (tmp_path / "script.py").write_text("import train_mllm as t\nRow, t.SCENES['nano'] = t.Row, 300\nt.STAGES['nano'] = "
                                        "%r\nt.run(t.main)\n" % (tuple(replace(row, steps=25, batch=8) for row in train_mllm.NANO),))
    argv = [tmp_path / "script.py", *TINY_MLLM, "--save-every", "3", "--log-every", "5", "--eval-images", "8", "--tokenizer",
            tokenizer_folder, "--resume"]
    assert Run([*argv, "--out", tmp_path / "whole"]).wait() == 0
    found = killed_and_resumed(lambda: Run([*argv, "--out", tmp_path / "run"]), tmp_path / "run", "**/state.pt", 14, random.Random(1), 10)
    print(f"\nkilled {dict(found)}")
    assert all(same_run(tmp_path / "whole" / name, tmp_path / "run" / name)
               for name in (*(f"stage-{row.name}" for row in train_mllm.NANO[:-1]), "."))


@slow
def test_train_goes_on_for_long(tmp_path):
    """The nano preset for 20,000 steps, or the minutes in NANODUALTOKEN_SOAK: memory flat within 1 %, codes in use, no slower at the end
    than at the beginning."""
    minutes = float(os.environ.get("NANODUALTOKEN_SOAK", 60))
    process = subprocess.Popen([sys.executable, "train_tokenizer.py", "--siglip-steps", "20", "--steps", "20000", "--out", str(tmp_path),
                                "--device", "cpu"], cwd=HERE, stdout=subprocess.DEVNULL)
    until(lambda: logged(tmp_path) >= 10, 600)      # first allocations and the first checkpoint are over
    memory, end = [], time.time() + 60 * minutes
    while process.poll() is None and time.time() < end:
        memory.append(int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]))
        time.sleep(1)
    process.terminate()
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
    lines = [line for line in log(tmp_path) if "loss" in line]
    n = len(lines) // 4
    first, last = (np.median([line["images_per_second"] for line in part]) for part in (lines[:n], lines[-n:]))
    grown = np.median(memory[-len(memory) // 4:]) / np.median(memory[:len(memory) // 4]) - 1
    usage = {stream: np.mean([line[f"usage_{stream}"] for line in lines[-n:]]) for stream in ("pixel", "semantic")}
    print(f"\n{lines[-1]['step']} steps in {minutes:g} minutes: "
          f"memory {grown:+.2%}, {first:.0f} images/s at first, {last:.0f} at last, usage {usage}")
    assert abs(grown) < 0.01 and min(usage.values()) >= 0.9 and last > 0.9 * first


def test_tokenizer_full_disk_keeps_the_old_weights(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with full_disk(100_000), pytest.raises(OSError, match="model.safetensors cannot be written .*; what was there is kept: make room"):
        tokenizer.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"] and before == (tmp_path / "model.safetensors").read_bytes()


def test_train_counts_skipped_steps_of_the_discriminator(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train_tokenizer, "discriminator_loss", lambda real, fake: (real.mean() + fake.mean()) * float("nan"))
    train(tmp_path, "--siglip", str(run_folder / "siglip"), "--gan", "--gan-start", "0.5")
    lines = [line for line in log(tmp_path) if "loss" in line]
    assert [line.get("discriminator_skipped", 0) for line in lines] == [0] * 4 + [1] * 4 and not any("skipped" in line for line in lines)


def test_train_compiled_saves_the_same_names(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: setattr(self, "_compiled_call_impl", self._call_impl))
    train(tmp_path, "--siglip", str(run_folder / "siglip"), "--steps", "2", "--compile")
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(run_folder / "model.safetensors").keys()


@pytest.fixture
def compiled(monkeypatch):
    """torch.compile without code generation -> names of the compiled parts of which graphs were made, one for each graph."""
    made, whole = [], torch.nn.Module.compile
    torch.compiler.reset()

    def backend(part):
        def make(graph, inputs):
            made.append(type(part).__name__)
            return torch._dynamo.lookup_backend("eager" if "Layer" in made[-1] else "aot_eager")(graph, inputs)     # quicker
        return make
    monkeypatch.setattr(torch.nn.Module, "compile", lambda part, **how: whole(part, backend=backend(part), **how))
    yield made
    torch.compiler.reset()


def test_train_compiled_goes_through_the_adversarial_term(run_folder, tmp_path, compiled, monkeypatch):
    """`adaptive_weight` looks at the decoder twice, from a later step on; and a layer has more variants than the eight after
    which torch no longer compiles it by default. Evaluation compiles nothing: its batches would each need their own."""
    stage, made = train_tokenizer.TokenizerStage, []
    evaluate = stage.evaluate
    monkeypatch.setattr(stage, "evaluate", lambda self: (made.append(len(compiled)), evaluate(self), made.append(len(compiled)))[1])
    train(tmp_path, "--siglip", str(run_folder / "siglip"), "--steps", "4", "--gan", "--gan-start", "0.5", "--compile", "--checkpointing")
    assert "ResBlock" in compiled and compiled.count("Layer") > 8 and sum("adversarial" in line for line in log(tmp_path)) == 2
    assert made[0] == made[1] > 0


def test_train_bench_times_what_is_compiled(run_folder, tmp_path, compiled, monkeypatch):
    """Counting FLOPs comes first; compiled parts that are first called under a counter would never be compiled."""
    monkeypatch.setattr(train_tokenizer, "seconds_of", lambda one, device, times=1, **_: (one(), compiled.append("timed"), 1.0)[2])
    train(tmp_path, "--siglip", str(run_folder / "siglip"), "--bench", "--compile")
    assert {"Layer", "ResBlock", "AttnBlock"} <= {*compiled[:compiled.index("timed")]}


@pytest.mark.parametrize("failure, words, status", [(ValueError("no such file"), "error: no such file\n", 1),
                                                    (SystemExit(143), "", 143),
                                                    (ZeroDivisionError("why"), "ZeroDivisionError: why", 1)])
def test_train_a_failed_rank_says_why_and_leaves_without_the_others(monkeypatch, capsys, failure, words, status):
    """Where ending the process group would wait for ranks that wait for this one: on NCCL."""
    def fail():
        raise failure
    for name, value in (("is_initialized", True), ("get_backend", "nccl"), ("get_world_size", 2), ("destroy_process_group", None)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    with pytest.raises((SystemExit, ZeroDivisionError)):
        train_tokenizer.run(fail)
    said = capsys.readouterr().err
    assert left == [status] and (words in said if words else not said)


def test_train_on_a_folder_of_images(tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    for n in range(30):
        flat(8 * n, 40).save(tmp_path / f"images/{n}.png")
        (tmp_path / f"images/{n}.txt").write_text(f"colour number {n}")
    (tmp_path / "images/7.png").write_bytes(b"broken")
    gather = train_tokenizer.Ranks.gather_rows      # what another rank found broken is told too
    monkeypatch.setattr(train_tokenizer.Ranks, "gather_rows", lambda self, *rows: gather(self, *rows, *[{"broken": ["x.png"]}]
                                                                                           * ("broken" in rows[0])))
    train(tmp_path / "run", "--data", str(tmp_path / "images"), "--workers", "2")
    assert all("x.png" in line["broken"] for line in log(tmp_path / "run") if "loss" in line)
    out = capsys.readouterr().out
    metrics = json.load(open(tmp_path / "run/metrics.json"))
    assert "28 images to train on, 2 held out" in out and "broken samples replaced" in out and "7.png" in out
    assert metrics["retrieval"]["i2t"] >= 0 and "zero_shot" not in metrics


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_train_validates_on_as_many_images_as_asked_for_whatever_the_ranks(tmp_path, ranks):
    for n in range(60):
        flat(4 * n, 12).save(tmp_path / f"{n}.png")
    for asked, wanted in ((21, 21), (60, 60), (100, 60)):
        found = []
        for rank in range(ranks):
            one = SimpleNamespace(rank=rank, count=ranks, device=torch.device("cpu"))
            args = SimpleNamespace(eval_images=asked, workers=0)
            data = SimpleNamespace(ranks=one, args=args, worlds=None, val=images.ImageData(str(tmp_path), 8, train=False),
                                   _signed=lambda x: x.float())
            found += [image for part, _ in train_tokenizer.Data.validation(data, 8) for image in part]
        assert len(found) == wanted == len({image[0, 0, 0].item() for image in found})


def test_train_num_samples(run_folder, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for n in range(40):
        flat(6 * n, 40).save(tmp_path / f"images/{n}.png")
        (tmp_path / f"images/{n}.txt").write_text(f"colour number {n}")
    data = ["--data", str(tmp_path / "images"), "--workers", "0"]
    train(tmp_path / "run", *data, "--num-samples", "10", "--siglip", str(run_folder / "siglip"))
    out = capsys.readouterr().out
    steps, batch = (json.load(open(tmp_path / "run/metrics.json"))["settings"][key] for key in ("steps", "batch"))
    assert f"38 images to train on, 2 held out; 10 of 38 samples an epoch, epochs in this run: tokenizer {steps * batch / 10:.2f}" in out
    go = [*TINY, "--out", str(tmp_path / "run"), "--siglip", str(run_folder / "siglip"), "--resume"]
    assert "(10 an epoch)" in stopped(*go, *data)      # other images would follow
    assert "--num-samples is 39, expected at most the 38 images" in stopped(*go, *data, "--num-samples", "39")
    assert "--num-samples goes with images" in stopped(*go, "--num-samples", "3") and "--num-samples is -1" in stopped(*go, "--num-samples",
        "-1")


def dry_rows(capsys, script, *argv):
    """The printed table: stage -> {column: number or word}."""
    capsys.readouterr()
    script.main(["--dry-run", *argv])
    lines = capsys.readouterr().out.splitlines()
    head = next(n for n, line in enumerate(lines) if line.startswith("  stage "))
    names = lines[head][37:].replace("trained M", "trained").replace("80 GB", "fits").split()
    number = lambda x: float(x) if x[0].isdigit() else x
    return {line[:37].strip(): dict(zip(names, map(number, line[37:].split()))) for line in lines[head + 1:] if line.startswith("  ")}


def test_train_evaluates_alone_on_the_held_out_images_of_the_run(run_folder, captioned, tmp_path):
    """Not on a share of those that it was trained on."""
    train(tmp_path, "--siglip", str(run_folder / "siglip"), "--steps", "2", "--data", str(captioned / "train"), "--val-data",
          str(captioned / "val"), "--workers", "0")
    before = json.load(open(tmp_path / "metrics.json"))
    train_tokenizer.main(["--eval", "--out", str(tmp_path), "--device", "cpu", "--workers", "0"])
    after = json.load(open(tmp_path / "metrics.json"))
    assert after["evaluated"]["val_data"] == str(captioned
                                                 / "val") and after["images"] == before["images"] == 6 and after["psnr"] == before["psnr"]


def test_train_bench_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_tokenizer, "seconds_of", lambda one, *_, **__: (one(), 0.5)[1])
    train_tokenizer.main([*TINY, "--out", str(tmp_path / "run"), "--bench", "--no-muon"])       # whose products the dry run leaves out
    out = capsys.readouterr().out
    assert out.count("waiting for data") == 2 and not os.path.exists(tmp_path / "run")
    benched = [float(flops) for flops in re.findall(r"([\d.]+) GFLOP a step", out)]
    a, b = (rows := dry_rows(capsys, train_tokenizer, "--batch-size", "64", "--ranks", "4", "--siglip", "nowhere", "--utilisation",
                             "0.2")).values()
    assert list(rows) == ["tokenizer, 16", "tokenizer, 16, checkpointing"] and 16 * a["step"] == pytest.approx(benched[1],
        abs=0.9) and benched[1] > 10
    assert b["activations"] <= a["activations"] and b["step"] > a["step"] and a["fits"] == "fits" and not os.path.exists(tmp_path / "run")
    assert a["s/step"] == pytest.approx(16e9 * a["step"] / (0.2 * 989e12),
                                        rel=0.1) and a["hours"] == pytest.approx(a["s/step"] * 400 / 3600, rel=0.02)


def dry_stage(*argv, batch=4):
    """The tokenizer stage of a small nano preset with everything on, and a step's micro-batches, real or, inside `fake`, not."""
    args = train_tokenizer.flags(["--device", "cpu", "--precision", "fp32", *argv])
    vision = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=3, image_size=32, patch_size=4)
    settings, config = replace(train_tokenizer.SETTINGS["nano"], batch=batch, gan=True), preset_config("nano", vision=vision,
        shallow_layer=1)
    stage = train_tokenizer.TokenizerStage(args, train_tokenizer.Ranks("cpu"), settings, config,
                                           SimpleNamespace(source="plain", drawn="plain"), SigLIP(config.vision, config.text))
    size = batch // args.accumulate
    return stage, [(torch.rand(size, 3, 32, 32) * 2 - 1, [""] * size) for _ in range(args.accumulate)]


def allocated(run) -> int:
    """The most bytes that run() held at once, by the allocator's own account."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = sorted((e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(np.cumsum([size for _, size in events]))


@pytest.mark.parametrize("more", [(), ("--checkpointing", "--accumulate", "2")])
def test_train_dry_run_is_the_real_step(more):
    """On tensors without memory the same FLOPs and bytes as on real ones, and these are what the allocator gave."""
    with train_tokenizer.fake():
        dry = train_tokenizer.measure(*dry_stage(*more))
    real = train_tokenizer.measure(*dry_stage(*more))
    # some torch counts one product less
    assert dry.step == pytest.approx(real.step, rel=0.002) and dry.forward == real.forward and dry.step > 3 * dry.forward > 0
    assert dry.memory == pytest.approx(real.memory, rel=0.03) and dry.activations == pytest.approx(real.activations, rel=0.03)
    stage, parts = dry_stage(*more)
    stage.wrapped = stage.model
    peak = allocated(lambda: train_tokenizer.gradients(stage, parts, stage.steps, {}))
    assert dry.gradients + dry.activations == pytest.approx(peak, rel=0.15)
    train_tokenizer.take_step(stage, 1e-3)
    own = sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
    state = sum(x.nbytes for optimizer in (stage.optimizer, stage.muon, stage.gan_optimizer)
                for values in optimizer.state.values() for x in values.values() if x.dim())
    held = {x.untyped_storage().data_ptr(): x.nbytes for m in (stage.model, stage.teacher, stage.discriminator)
            for x in (*m.parameters(), *m.buffers())}
    assert dry.trained == own and dry.optimiser == state and dry.weights == sum(held.values())


def test_train_dry_run_shards_what_fsdp_shards():
    with train_tokenizer.fake():
        ddp, fsdp = (train_tokenizer.measure(*dry_stage(), ranks=4, fsdp=fsdp) for fsdp in (False, True))
    assert ddp.reduced == 4 * ddp.trained and fsdp.gradients == ddp.gradients / 4
    assert fsdp.optimiser == ddp.optimiser / 4 and fsdp.activations == ddp.activations
    assert ddp.weights / 4 < fsdp.weights < ddp.weights and 0 < fsdp.reduced < ddp.weights


def test_train_a_stage_is_freed_before_the_next():
    """Its functions refer to it, so that counting references does not free it, nor its optimiser."""
    gc.disable()
    try:
        stage = weakref.ref(dry_stage()[0])
        assert stage() is not None
        train_tokenizer.begin_peak(torch.device("cpu"))
        assert stage() is None
    finally:
        gc.enable()


def test_train_bench_takes_the_median_of_rounds():
    calls = []

    def one():
        calls.append(gc.isenabled())
        time.sleep(0.01 if len(calls) <= 12 else 0.1)       # the last of three rounds of five is slow
    seconds = train_tokenizer.seconds_of(one, torch.device("cpu"), times=5, warmup=2, rounds=3)
    assert calls == [True] * 17 and gc.isenabled() and seconds == pytest.approx(0.012, rel=0.5)


def test_train_checkpointing_keeps_one_block_at_a_time():
    """Of a level with three, recomputed together, three fifths of the memory would stay."""
    c = preset_config("siglip-l-256", decoder_channels=32, decoder_in=32)
    decoder, x, peaks = sys.modules["tokenizer"].Decoder(c), torch.randn(1, 32, 16, 16), []
    for on in (False, True):
        for part in decoder.modules():
            part.checkpointing = on
        peaks.append(allocated(lambda: decoder(x).sum().backward()))
    assert peaks[1] < 0.45 * peaks[0]


def test_train_stages_and_benches_begin_with_the_stage_before_freed(run_folder, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(train_tokenizer, "begin_peak", begun.append)
    monkeypatch.setattr(train_tokenizer, "seconds_of", lambda one, *_, **__: (one(), 0.5)[1])
    train(tmp_path, "--siglip", str(run_folder / "siglip"), "--steps", "1")
    assert len(begun) == 1
    train_tokenizer.main([*TINY, "--siglip", str(run_folder / "siglip"), "--bench", "--gan", "--out", str(tmp_path)])
    assert len(begun) == 5      # before and after FLOPs are counted, with the adversarial term and without


def test_train_fast_vq_is_for_cuda_and_short_codes(monkeypatch, capsys):
    assert "--fast-vq is a kernel for CUDA, and the device is cpu" in stopped(*TINY, "--fast-vq")
    train_tokenizer.main(["--dry-run", "--fast-vq"])        # what it costs does not depend on it
    monkeypatch.setattr(train_tokenizer, "Ranks", lambda device: SimpleNamespace(device=torch.device("cuda")))
    assert "up to 128 numbers a code, and --code-dim is 256" in stopped("--preset", "small", "--fast-vq", "--code-dim", "256")


@pytest.mark.parametrize("dtype, groups", [(torch.float32, 4), (torch.float16, 4), (torch.float16, 2)])
def test_train_flops_of_attention_are_counted(dtype, groups, monkeypatch):
    """On a CPU too, and on tensors without memory; 4 h N N d forward, 2.5 times that backward, where scores are computed again. Groups as
    well, of which torch 2.11 does not count any."""
    for name in ("sdpa_flop_count", "sdpa_backward_flop_count"):
        def strict(*shapes, count=getattr(torch.utils.flop_counter, name)):
            assert len({shape[1] for shape in shapes}) == 1
            return count(*shapes)
        monkeypatch.setattr(torch.utils.flop_counter, name, strict)
    for place in (contextlib.nullcontext, train_tokenizer.fake):
        with place(), train_tokenizer.flop_counter() as counter:
            q, k, v = (torch.rand(2, heads, 10, 8, dtype=dtype, requires_grad=True) for heads in (4, groups, groups))
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            forward = counter.get_total_flops()
            y.sum().backward()
        assert forward == 4 * 2 * 4 * 10 * 10 * 8 and counter.get_total_flops() == 3.5 * forward


def test_train_dry_run_keeps_norms_in_fp32_as_cuda_does():
    for precision, dtype in (("bf16", torch.float32), ("fp32", torch.float16)):
        with train_tokenizer.fake():
            stage, _ = dry_stage("--precision", precision)
            train_tokenizer.as_on_cuda(stage)
            with stage.autocast():
                assert stage.model.siglip_model.vision_model.post_layernorm(torch.rand(1, 64, 96).half()).dtype == dtype
                assert stage.model.decoder.conv_in(torch.rand(1, 64, 8, 8)).dtype == (torch.float16
                                                                                      if precision == "bf16" else torch.float32)


@pytest.mark.parametrize("more", [(), ("--design", "naive"), ("--precision", "bf16", "--quantizer", "mcq")])
def test_train_steps_never_wait_for_the_device(more):
    """Nothing in a step, optimisers, discriminator and codebooks included, is looked at by the host: it runs on tensors that have no
    values."""
    with train_tokenizer.fake():
        stage, parts = dry_stage(*more)
        stage.wrapped = stage.model
        for quantizer in stage.model.quantizers.values():
            quantizer._draws = 0        # at the start of a run it is read, once
        for _ in range(2):
            train_tokenizer.whole_step(stage, parts)


def test_train_benches_write_a_picture_of_growth_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_tokenizer, "seconds_of", lambda one, *_, **__: (one(), 0.5)[1])
    train_tokenizer.main(["--bench", "quantizer", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "4096 vectors" in out and float(re.search(r"([\d.]+)% of the codes are the nearest",
                                                     out)[1]) > 99.9 and abs(float(re.search(r"leave is (\S+) more", out)[1])) < 1e-6
    assert len(re.findall("exponent -?0.00", out)) == 3 and out.count("500.00 ms") >= 2
    train_tokenizer.main(["--bench", "growth", "--device", "cpu", "--batch-size", "2"])
    rows = re.findall(r"tokenizer, (.*?) (\d+), (\d+), (\d+): .*; ([\d.]+), ([\d.]+), ([\d.]+) GiB, exponent ([\d.]+)",
                      capsys.readouterr().out)
    assert [row[0] for row in rows] == ["image size", "codebook size", "depth"]
    written = {str(path) for path in Path(".").rglob("*") if path.is_file()}
    assert written == {os.path.join("out", "tokenizer", f"bench-{what}.png") for what in ("quantizer", "growth")}
    for path in written:
        with Image.open(path) as picture:       # three panels; six of time and memory
            assert picture.size == ((900, 150) if "quantizer" in path else (1200, 300))
    assert all(float(row[4]) <= float(row[6]) for row in rows) and float(rows[0][4]) < float(rows[0][6])
    for argv, words in ((["--bench", "speed"], "invalid choice"), (["--bench", "paint"], "invalid choice")):
        with pytest.raises(SystemExit):
            train_tokenizer.main(argv)
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("script, argv, status, words", [
    ("train_tokenizer.py", ["--presett", "nano"], 2, "did you mean --preset?"),
    ("train_tokenizer.py", ["--preset", "nanno"], 1, "did you mean nano?"),
    ("train_mllm.py", ["--streams-inn", "pixel"], 2, "did you mean --streams-in?"),
    ("train_mllm.py", ["--preset", "smal"], 1, "did you mean small?"), ("sample.py", ["--paintt", "x"], 2, "did you mean --paint?")])
def test_train_flags_that_are_not_there_are_guessed(script, argv, status, words):
    done = subprocess.run([sys.executable, script, *argv], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == status and words in done.stderr and "Traceback" not in done.stderr


def test_train_importing_takes_no_more_than_it_must():
    """What would make every start, and every error in a flag, seconds slower is imported where it is used."""
    heavy = ("torch._inductor", "torch._dynamo", "torch.distributed.fsdp", "torchvision", "transformers", "timm", "matplotlib", "scipy",
             "vector_quantize_pytorch")
    code = f"import sys, sample, train_tokenizer, train_mllm; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True).stdout.strip() == "[]"


def test_train_parameters_by_part_add_up(tokenizer):
    rows = dict(train_tokenizer.tokenizer_parts(tokenizer))
    assert sum(count for name, count in rows.items() if "tables" not in name) == sum(p.numel() for p in tokenizer.parameters())
    assert rows["ViT"] == sum(p.numel() for p in tokenizer.siglip_model.vision_model.parameters())


@pytest.mark.parametrize("flags", [[], ["-X", "dev"]])
def test_train_errors_have_a_traceback_for_whoever_develops(flags):
    end = subprocess.run([sys.executable, *flags, "train_tokenizer.py", "--steps", "-3"], capture_output=True, text=True)
    assert end.returncode == 1 and "error: --steps is -3" in end.stderr and ("Traceback" in end.stderr) == bool(flags)


def test_train_bad_input_ends_in_a_sentence(run_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for argv, words in ((["--preset", "huge"], "--preset is 'huge', expected one of nano"),
                        (["--data", str(tmp_path / "nothing")], "no such image data"),
                        (["--data", str(tmp_path / "empty")], "no images in"), (["--image-size", "30"], "30 is not a multiple of 4"),
                        (["--batch-size", "10", "--accumulate", "4"], "10 is not a multiple of 1 ranks x 4"),
                        (["--device", "warp"], "--device warp cannot be used"),
                        (["--steps", "-3"], "--steps is -3"), (["--val-data", "x"], "goes with images"),
                        (["--siglip", str(tmp_path / "no")], "no model in"),
                        (["--siglip", str(run_folder)], "is no SigLIP configuration"),
                        (["--dry-run", "--preset", "huge"], "--preset is 'huge', expected one of nano"),
                        (["--dry-run", "--utilisation", "1.5"], "--utilisation is 1.5"),
                        (["--dry-run", "--utilisation", "0"], "--utilisation is 0"),
                        (["--ranks", "8"], "go with --dry-run"), (["--dry-run", "--ranks", "-1"], "--ranks is -1"),
                        (["--dry-run", "--ranks", "7"], "not a multiple of 7 ranks"),
                        (["--gan-start", "0.5"], "--gan-start would do nothing, for the adversarial term is off"),
                        (["--dry-run", "--gan", "--design", "quantised"], "nothing that --gan could change"),
                        (["--gan", "--gan-start", "0.5", "--design", "quantised"], "nothing that --gan, --gan-start could change"),
                        (["--dry-run", "--init", str(run_folder)], "leave them out")):
        assert words in stopped("--device", "cpu", "--out", str(tmp_path / "run"), *argv)
    (tmp_path / "silent").mkdir()
    (tmp_path / "few").mkdir()
    flat(1).save(tmp_path / "few/1.png"), flat(2).save(tmp_path / "few/2.png")
    for n in range(40):
        flat(n).save(tmp_path / f"silent/{n}.png")
    assert "1 images to evaluate on, expected at least 2" in stopped("--device", "cpu", "--out", str(tmp_path / "run"), "--data",
                                                                     str(tmp_path / "few"))
    (tmp_path / "broken").mkdir()
    for n in range(60):
        (tmp_path / f"broken/{n}.png").write_bytes(b"no picture")
        (tmp_path / f"broken/{n}.txt").write_text("a caption")
    words = stopped("--device", "cpu", "--out", str(tmp_path / "run"), "--data", str(tmp_path / "broken"), "--workers", "1")
    assert "nothing readable at position 0" in words and "Traceback" not in words
    assert "have no captions" in stopped("--device", "cpu", "--out", str(tmp_path / "run"), "--data", str(tmp_path / "silent"))
    shutil.copytree(run_folder, tmp_path / "copy")
    same = [*TINY, "--gan", "--gan-start", "0.25", "--resume", "--out", str(tmp_path / "copy")]
    assert "lr 0.003 -> 0.1" in stopped(*same, "--lr", "0.1")
    (tmp_path / "copy/metrics.json").unlink()       # else it is finished, and kept
    (tmp_path / "copy/state.pt").write_bytes((tmp_path / "copy/state.pt").read_bytes()[:5000])
    assert "cannot be resumed from" in stopped(*same)


def test_train_never_unpickles_code(run_folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    shutil.copytree(run_folder, tmp_path / "copy")
    (tmp_path / "copy/metrics.json").unlink()       # else it is finished, and nothing is read
    torch.save({"settings": Bomb()}, tmp_path / "copy/state.pt")
    assert "cannot be resumed from" in stopped(*TINY, "--gan", "--gan-start", "0.25", "--resume", "--out", str(tmp_path / "copy"))
    assert not os.path.exists(tmp_path / "executed")


def test_train_cosine_schedule():
    values = [train_tokenizer.cosine(s, 100, 10) for s in range(100)]
    assert values[0] == 0.1 and values[9] == 1.0 and values[10] == 1.0 and values[99] < 1e-3 and all(a >= b for a,
        b in zip(values[10:], values[11:]))


def test_train_retrieval_counts_words_not_rows():
    e = torch.eye(4)
    assert train_tokenizer.retrieval(e, e[[1, 0, 2, 3]], ["a", "a", "b", "c"]) == {"i2t": 1.0, "t2i": 1.0}
    assert train_tokenizer.retrieval(e, e[[1, 0, 2, 3]], ["a", "d", "b", "c"]) == {"i2t": 0.5, "t2i": 0.5}
    assert train_tokenizer.retrieval(e, e, ["", "", "", "a"]) == {}


def test_train_retrieval_of_several_captions_is_the_slow_one():
    """Over chunks of pictures; a picture's caption may be another's too, and some have none."""
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(4200, 4), dim=-1), F.normalize(torch.randn(2500, 4), dim=-1)
    owner, words, own = [2 * (k % 2100) for k in range(2500)], [f"caption {k % 2450}" for k in range(2500)], {}
    for picture, caption in zip(owner, words):
        own.setdefault(picture, set()).add(caption)
    image[::200] = text[[k for k in range(2100) if 2 * k % 200 == 0]]      # chance alone would hit next to nothing
    pictures = sorted(own)
    similar = image[pictures] @ text.T
    i2t = [words[k] in own[p] for p, k in zip(pictures, similar.argmax(1).tolist())]
    t2i = [w in own[pictures[n]] for w, n in zip(words, similar.argmax(0).tolist())]
    assert sum(i2t) >= 20 and sum(t2i) >= 20
    assert train_tokenizer.retrieval(image, text, words, owner) == {"i2t": sum(i2t) / 2100, "t2i": sum(t2i) / 2500}


class Together:
    """Ranks as threads: what `gather_rows` exchanges, all of them see."""

    def __init__(self, rank, count, barrier=None, shared=None):
        self.rank, self.count, self.first, self.device, self.barrier, self.shared, self.said = (rank, count, rank == 0, torch.device("cpu"),
            barrier, shared, [])

    def say(self, *words):
        self.said += words if self.first else ()

    def gather_rows(self, *rows):
        self.shared[self.rank] = [*rows]
        self.barrier.wait()
        parts = sum((self.shared[r] for r in range(self.count)), [])
        self.barrier.wait()
        return {name: torch.cat([p[name] for p in parts]) if isinstance(value, torch.Tensor) else sum((p[name] for p in parts), [])
                for name, value in parts[0].items()}


def measured(files, count=1):
    """`evaluate_files` by models that see a picture's grey level and read its number in words; the teacher takes 40 for 79. -> metrics of
    all ranks, what was said."""
    spot = lambda levels: F.normalize(torch.exp(-(torch.arange(256) - levels[:, None]) ** 2 / 800), dim=-1)
    level = lambda images: ((images.mean((1, 2, 3)) + 1) * 127.5).round()
    siglip = SimpleNamespace(text_ids=lambda texts: torch.tensor([[int(re.search(r"\d+", text)[0])] for text in texts]),
                             encode_text=lambda ids: spot(ids[:, 0]))
    model = SimpleNamespace(training=False, eval=lambda: None, train=lambda on: None, siglip_model=siglip,
                            pool=lambda images: 3 * spot(level(images)))
    teacher = lambda images: (None, spot(torch.where(level(images) == 40, 79, level(images))))
    barrier, shared, found = threading.Barrier(count), {}, {}

    def work(rank):
        ranks = Together(rank, count, barrier, shared)
        data = SimpleNamespace(ranks=ranks, size=16, args=SimpleNamespace(workers=0), _signed=lambda images: images.float() / 127.5 - 1)
        found[rank] = train_tokenizer.evaluate_files(model, teacher, data, *files), ranks.said

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    return found


@pytest.fixture
def class_folders(tmp_path):
    """Three classes of grey pictures; two pictures in wrong folders, one broken."""
    for name, levels in {"c40": (40, 40, 80), "a120": (120,) * 4, "b80": (80, 80, 80, 120)}.items():
        (tmp_path / "val" / name).mkdir(parents=True)
        for n, value in enumerate(levels):
            Image.new("RGB", (20, 20), (value,) * 3).save(tmp_path / "val" / name / f"{n}.png")
    (tmp_path / "val/a120/9.jpg").write_bytes(b"broken")
    (tmp_path / "val/list.txt").write_text("no class")
    return str(tmp_path / "val")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_train_zero_shot_on_files_is_what_was_made(class_folders, tmp_path, count):
    (tmp_path / "names").write_text("120, the brightest\n80\n\n40\n")
    classes = train_tokenizer.read_classes(class_folders, str(tmp_path / "names"), "")
    assert classes[2] == [["a photo of a 120."], ["a photo of a 80."], ["a photo of a 40."]]
    found = measured((classes, ()), count)
    for metrics, _ in found.values():
        assert metrics == {"zero_shot": 9 / 11, "teacher_zero_shot": 7 / 11, "zero_shot_images": 11, "zero_shot_classes": 3,
                           "zero_shot_broken": 1}
    assert "9.jpg: cannot be read as an image" in " ".join(found[0][1]) and train_tokenizer.read_classes(class_folders, "",
        "")[2][1] == ["a photo of a b80."]


def test_train_templates_are_averaged_as_the_formula_says(tmp_path):
    torch.manual_seed(0)
    table = F.normalize(torch.randn(500, 8), dim=-1)
    siglip = SimpleNamespace(text_ids=lambda texts: torch.tensor([[int(text)] for text in texts]), encode_text=lambda ids: table[ids[:, 0]])
    prompts = [[str(3 * n + t) for t in range(3)] for n in range(100)]
    found = train_tokenizer.text_vectors(siglip, prompts, Together(0, 1, threading.Barrier(1), {}), "")
    torch.testing.assert_close(found, F.normalize(torch.stack([table[3 * n] + table[3 * n + 1] + table[3 * n + 2] for n in range(100)]),
                                                  dim=-1))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("form", ["csv", "token"])
def test_train_retrieval_on_files_is_what_was_made(tmp_path, count, form):
    (tmp_path / "Images").mkdir()
    for value in (40, 80, 120, 160):
        Image.new("RGB", (20, 20), (value,) * 3).save(tmp_path / f"Images/{value}.png")
    (tmp_path / "Images/7.png").write_bytes(b"broken")
    pairs = [("40.png", "grey, 40"), ("40.png", 'the "darkest" 41'), ("80.png", "about 80"), ("gone.png", "is 33"),
             ("120.png", "84 in words"), ("120.png", "120"), ("160.png", "44"),
             ("7.png", "7")]
    if form == "csv":
        text = "image,caption\n" + "".join(f'{name},"{words.replace(chr(34), chr(34) * 2)}"\r\n' for name, words in pairs)
    else:
        text = "".join(f"{name}#{n}\t{words}\n" for n, (name, words) in enumerate(pairs))
    (tmp_path / "captions.txt").write_text(text, newline="")
    captions = train_tokenizer.read_captions(str(tmp_path / "captions.txt"), "")
    assert captions[1][:2] == ["grey, 40", 'the "darkest" 41'] and captions[3] == ["gone.png"]
    found = measured(((), captions), count)
    for metrics, _ in found.values():       # 160 finds 120; 84 finds 80, and 44 finds 40
        numbers = {name: value for name, value in metrics.items() if name.startswith("retrieval_")}
        assert numbers == {"retrieval_images": 4, "retrieval_captions": 6, "retrieval_missing": 1, "retrieval_broken": 1}
        assert metrics["retrieval"] == {"i2t": 3 / 4, "t2i": 4 / 6} and metrics["teacher_retrieval"] == {"i2t": 2 / 4, "t2i": 4 / 6}
    said = " ".join(found[0][1])
    assert "gone.png is not there" in said and "7.png: cannot be read" in said
    shutil.move(tmp_path / "Images", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="of the 6 images that .* names, 0 are in .*; name their folder with --retrieval-images"):
        train_tokenizer.read_captions(str(tmp_path / "captions.txt"), "")
    assert train_tokenizer.read_captions(str(tmp_path / "captions.txt"), str(tmp_path / "elsewhere"))[1] == captions[1]


def test_train_bad_evaluation_files_end_in_a_sentence(class_folders, tmp_path):
    def words(*argv):
        return stopped("--device", "cpu", "--out", str(tmp_path / "run"), *argv)

    def written(text):
        (tmp_path / "file").write_bytes(text.encode() if isinstance(text, str) else text)
        return str(tmp_path / "file")

    classes = ["--zero-shot-data", class_folders]
    assert "has 3 folders, and" in words(*classes, "--class-names", written("a\nb\n")) and "names 2 classes" in words(*classes,
        "--class-names", written("a\nb\n"))
    assert "'a photo' has no {}" in words(*classes, "--templates", written("{}\na photo")) and "is empty" in words(*classes, "--templates",
        written("\n"))
    assert "expected a text file in UTF-8" in words(*classes, "--class-names",
                                                    written(b"\xff\xfe\0")) and "is no folder" in words("--zero-shot-data", written("x"))
    assert "go with --zero-shot-data" in words("--templates", written("{}")) and "--retrieval-images with" in words("--retrieval-images",
        str(tmp_path))
    for text, expected in (("picture,caption\na,b", "another first line"), ("image,caption\na.png\n", "line 2: got ['a.png']"),
                           ("image,caption\na.png,x\nb.png,y,z\n", "line 3"),
                           ('image,caption\na.png,"never closed', "cannot be read"), ("a.png#0\tx\nb.png x\n", "line 2"),
                           ("a.png\tx\n", "line 1"), (b"image,caption\na,\xff", "cannot be read"),
                           ("image,caption\na.png,x\n", "of the 1 images"), ("", "another first line")):
        assert expected in words("--retrieval-data", written(text)), text
    os.mkdir(os.path.join(class_folders, "d"))
    assert f"the class folder {class_folders}/d has no pictures" in words(*classes)
    assert not os.path.exists(tmp_path / "run")


def test_train_evaluates_alone_and_keeps_what_was_said_of_training(run_folder, class_folders, tmp_path, capsys):
    shutil.copytree(run_folder, tmp_path / "run")
    before = json.load(open(run_folder / "metrics.json"))
    (tmp_path / "run/metrics.json").write_text(json.dumps({**before, "psnr": -1.0, "of_an_older_evaluation": 3}))
    evaluate = lambda *more: train_tokenizer.main(["--eval", "--out", str(tmp_path / "run"), "--device", "cpu", "--eval-images", "24",
                                                   *more])
    evaluate()
    after = json.load(open(tmp_path / "run/metrics.json"))
    evaluated = after.pop("evaluated")
    assert after == before and evaluated["data"] == "plain" and evaluated["seconds"] > 0
    assert equal(load_file(tmp_path / "run/model.safetensors"),
                 load_file(run_folder / "model.safetensors")) and len(log(tmp_path / "run")) == len(log(run_folder))
    (tmp_path / "captions").write_text("image,caption\nc40/0.png,40\na120/1.png,120\n")
    more = ["--zero-shot-data", class_folders, "--retrieval-data", str(tmp_path / "captions"), "--retrieval-images", class_folders]
    evaluate("--data", "textured", *more)
    other = json.load(open(tmp_path / "run/metrics.json"))
    assert other["data"] == "plain" and other["evaluated"]["data"] == "textured"
    assert other["psnr"] != before["psnr"] and other["zero_shot_images"] == 11
    train(tmp_path / "trained", "--siglip", str(run_folder / "siglip"), "--steps", "2", *more)      # the same files at the end of training
    trained = json.load(open(tmp_path / "trained/metrics.json"))
    train_tokenizer.main(["--eval", "--init", str(tmp_path / "trained"), "--siglip", str(run_folder / "siglip"), "--out",
                          str(tmp_path / "there"), "--device", "cpu", "--eval-images", "24", *more])
    there = json.load(open(tmp_path / "there/metrics.json"))
    assert there["evaluated"]["tokenizer"] == str(tmp_path
        / "trained") and there["preset"] == "nano" and "steps" not in there and trained["retrieval_images"] == 2
    assert all(there[name] == trained[name] for name in trained if name not in train_tokenizer.FACTS)
    assert {name for name in trained if name in train_tokenizer.FACTS} == set(train_tokenizer.FACTS)
    assert "9.jpg" in capsys.readouterr().out
    # its teacher is remembered
    train_tokenizer.main(["--eval", "--out", str(tmp_path / "trained"), "--device", "cpu", "--eval-images", "24"])
    assert json.load(open(tmp_path / "trained/metrics.json"))["psnr"] == trained["psnr"]
    config = json.load(open(tmp_path / "trained/config.json"))
    (tmp_path / "trained/config.json").write_text(json.dumps({**config, "teacher": ""}))
    assert "--layers 3 is of a ViT" in stopped("--eval", "--layers", "3")
    assert "--precision would" in stopped("--eval", "--precision", "bf16")
    assert "--no-" not in stopped("--eval", "--no-muon") and "--muon would do nothing" in stopped("--eval", "--no-muon")
    assert "--steps would do nothing" in stopped("--eval", "--steps", "3") and "without the SigLIP" in stopped("--eval", "--out",
        str(tmp_path / "trained"))
    assert "holds another tokenizer" in stopped("--eval", "--init", str(run_folder), "--out", str(tmp_path / "trained"))
    (tmp_path / "run/metrics.json").write_text("[1")
    assert "is no JSON" in stopped("--eval", "--out", str(tmp_path / "run"), "--device", "cpu")


def test_train_evaluates_the_released_layout(tmp_path, monkeypatch):
    folder = os.path.join(SHARED, "fixtures/released-layout")
    if not os.path.isdir(folder):
        pytest.skip("no released-layout fixture: set NANODUALTOKEN_SHARED")
    decode = DualTokenizer.decode
    # the fixture's decoder paints 48 pixels of 56
    monkeypatch.setattr(DualTokenizer, "decode", lambda self, codes: F.interpolate(decode(self, codes), size=56))
    DualTokenizer.from_released(folder).siglip_model.save_pretrained(str(tmp_path / "siglip"))
    argv = ["--eval", "--init", folder, "--siglip", str(tmp_path / "siglip"), "--out", str(tmp_path / "out"), "--device", "cpu",
            "--eval-images", "4"]
    train_tokenizer.main(argv)
    metrics = json.load(open(tmp_path / "out/metrics.json"))
    assert metrics["preset"] == "released" and metrics["images"] == 4 and "zero_shot" not in metrics and sorted(os.listdir(tmp_path
        / "out")) == ["metrics.json"]


def test_train_reads_a_pretrained_vocabulary(class_folders, tmp_path, capsys):
    """And goes on without it, once told that text is not measured; then asking for such a measure is an error before any training."""
    c = preset_config("nano")
    c.text.vocab_size = text_vocabulary("SigLIP", str(tmp_path / "siglip"))
    SigLIP(c.vision, c.text).save_pretrained(str(tmp_path / "siglip"))
    shutil.copytree(tmp_path / "siglip", tmp_path / "silent")
    os.remove(tmp_path / "silent/tokenizer.json")
    train(tmp_path / "a", "--siglip", str(tmp_path / "siglip"), "--steps", "2")
    assert "not measured" not in capsys.readouterr().out and (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path
        / "siglip/tokenizer.json").read_bytes()
    train(tmp_path / "b", "--siglip", str(tmp_path / "silent"), "--steps", "2")
    assert capsys.readouterr().out.count("zero-shot and retrieval are not measured: the text tower has") == 1
    a, b = (json.load(open(tmp_path / name / "metrics.json")) for name in "ab")
    assert set(a) - set(b) == {"zero_shot", "teacher_zero_shot", "zero_shot_held_out", "teacher_zero_shot_held_out", "retrieval",
                               "teacher_retrieval"} and a["psnr"] == b["psnr"]
    for argv in (["--siglip", str(tmp_path / "silent")], ["--eval", "--init", str(tmp_path / "b"), "--siglip", str(tmp_path / "siglip")]):
        assert "tokenizer.json says which they are" in stopped("--device", "cpu", "--zero-shot-data", class_folders, "--out",
                                                               str(tmp_path / "c"), *argv)
    (tmp_path / "siglip/tokenizer.json").write_text("{")
    assert "is damaged, or no vocabulary" in stopped(*TINY, "--siglip", str(tmp_path / "siglip"), "--out", str(tmp_path / "c"))
    assert not os.path.exists(tmp_path / "c")


def test_train_own_siglips_read_bytes(tmp_path, monkeypatch):
    """Also where the preset's pretrained one does not."""
    monkeypatch.setitem(train_tokenizer.PRESETS, "nano",
                        {**train_tokenizer.PRESETS["nano"], "text": {**train_tokenizer.PRESETS["nano"]["text"], "vocab_size": 32000}})
    train(tmp_path, "--siglip-steps", "2", "--steps", "2")
    assert len(load_file(tmp_path / "siglip/model.safetensors")["text_model.embeddings.token_embedding.weight"]) == 257


def few_steps(patch):
    """Runs of two steps."""
    patch.setitem(train_tokenizer.SETTINGS, "nano", replace(train_tokenizer.SETTINGS["nano"], siglip_steps=2, siglip_batch=8, steps=2,
                                                            batch=8))


@pytest.mark.parametrize("name, seeds", [("3", 1), ("10", 2),
                                         *(pytest.param(name, 1, marks=[is_slow, is_skipped]) for name in ("7", "9", "trade"))])
def test_train_tables_train_what_they_name_and_nothing_twice(tmp_path, monkeypatch, capsys, name, seeds):
    """Rows of one seed share a SigLIP for each number of layers; finished rows are found again, by other tables too; mean and spread are
    those of the runs."""
    few_steps(monkeypatch)
    begun, train = [], train_tokenizer.train
    monkeypatch.setattr(train_tokenizer, "train", lambda stage, batches: (begun.append(os.path.relpath(stage.folder, tmp_path)),
                                                                          train(stage, batches)))
    argv = ["--table", name, "--seeds", str(seeds), "--out", str(tmp_path), *TINY[-6:]]
    train_tokenizer.main(argv)
    table, made = train_tokenizer.tables("nano")[name], json.loads((tmp_path / f"table-{name}.json").read_text())
    runs = {system.name: system for system in table.systems}
    vits = {"siglip", "siglip-12"} if name in "79" else {"siglip"}
    assert sorted(begun) == sorted(f"seed-{seed}/{folder}" for seed in range(seeds) for folder in {*runs} | vits)
    for system, row in zip(table.systems, made["rows"]):
        for seed in range(seeds):
            config = json.loads((tmp_path / f"seed-{seed}" / system.name / "config.json").read_text())
            wanted = {key: value for key, value in system.changes.items() if value and key in config}
            assert {key: config[key] for key in wanted} == wanted and config["vision"]["num_hidden_layers"] == (system.changes.get("layers")
                or 6)
        for column, cell in row["ours"].items():
            values = [json.loads((tmp_path / f"seed-{seed}" / system.name / "metrics.json").read_text())[system.rename.get(column, column)]
                      for seed in range(seeds)]
            assert cell["values"] == values and cell["mean"] == pytest.approx(sum(values)
                / seeds) and cell["spread"] == pytest.approx(max(values) - min(values))
        assert row["paper"].items() <= system.paper.items()
    if name == "3":
        assert [{*row["ours"]} for row in made["rows"]] == [{"zero_shot"}] * 2 + [{"zero_shot", "fd", "psnr", "ssim"}] + [{"fd", "psnr",
            "ssim"}] * 2 + [{"zero_shot", "fd", "psnr", "ssim"}]
    assert (tmp_path / f"table-{name}.md").read_text() in capsys.readouterr().out and Image.open(tmp_path / f"table-{name}.png").width > 400
    count = len(begun)
    train_tokenizer.main(argv)
    train_tokenizer.main([*argv[:1], "10", *argv[2:]])
    assert len(begun) == count + {"3": 2, "10": 0}.get(name, 2)      # dual is in all of them


def test_train_tables_compare_what_the_paper_does():
    tables = train_tokenizer.tables("nano")
    assert [system.changes["design"] for system in tables["3"].systems] == ["quantised", "quantised", "naive", "recon-deep",
                                                                            "recon-shallow", "dual"]
    layers = {name: [(system.changes["layers"] or 6, system.changes["shallow_layer"]) for system in tables[name].systems] for name in "79"}
    assert layers == {"7": [(6, 2), (6, 3), (6, 5), (12, 3), (12, 6), (12, 9)], "9": [(6, n) for n in (1, 2, 3, 4)]
                      + [(12, n) for n in (1, 2, 3, 4, 5)]}
    assert [(system.changes["design"], system.changes["quantizer"]) for system in tables["10"].systems] == [("naive", "mcq"), ("dual", ""),
        ("dual", "mcq")]
    assert [(*system.changes.values(),) for system in tables["trade"].systems[1:]] == [("dual", *row)
        for row in ((1, 1), (0.2, 1), (1, 0.3), (1, 0.1), (1, 0))]


def test_train_tables_of_bits_that_are_equal():
    for system in train_tokenizer.tables("nano")["10"].systems:
        c = preset_config("nano", **{key: value for key, value in system.changes.items() if value})
        assert len(c.streams) * c.depth * c.codebook_size == (1 if c.design == "naive" else 2) * 4 * 256


def test_train_tables_bad_input_ends_in_a_sentence(tmp_path, monkeypatch):
    few_steps(monkeypatch)
    train_tokenizer.main(["--design", "quantised", "--out", str(tmp_path / "seed-0/quantised"), *TINY[-6:]])
    shutil.copytree(tmp_path / "seed-0/quantised/siglip", tmp_path / "seed-0/siglip")
    there = ["--out", str(tmp_path)]
    for argv, words in ((["--table", "3", "--preset", "nano-64"], "other settings (preset nano -> nano-64; data plain -> textured"),
                        (["--table", "4"], "--table is '4', expected one of 3, 7, 9, 10, trade"),
                        (["--table", "3", "--design", "naive"], "have --design of their own"),
                        (["--table", "3", "--dry-run"], "without --bench"), (["--seeds", "2"], "--seeds goes with"),
                        (["--table", "3", "--depth", "5", "--quantizer", "mcq"], "--quantizer of their own"),
                        (["--table", "10", "--depth", "5"], "multiple of the depth 5"),
                        (["--design", "nonesuch"], "no design 'nonesuch'; expected one of dual"),
                        (["--design", "quantised", "--init", str(tmp_path / "seed-0/quantised")], "leave these flags out"),
                        (["--layers", "4", "--siglip", str(tmp_path / "seed-0/siglip")], "--layers 4"),
                        (["--shallow-layer", "9"], "no shallow layer 9"),
                        (["--design", "recon-deep", "--zero-shot-data", str(tmp_path)], "--zero-shot-data could change"),
                        (["--design", "naive", "--shallow-layer", "1"], "--shallow-layer could change"),
                        (["--design", "naive", "--shared-gradient", "0"], "--shared-gradient could change"),
                        (["--design", "quantised", "--gan"], "--gan could change"),
                        (["--design", "recon-deep", "--semantic-weight", "0"], "--semantic-weight could change"),
                        (["--table", "trade", "--semantic-weight", "2"], "--semantic-weight of their own"),
                        (["--table", "7", "--backbone", "timm:x"], "--siglip in place of --backbone")):
        assert words in stopped("--device", "cpu", *there, *argv), argv


# ---------------------------------------------------------------------------------------------------------------------
# sample

def sample_words(*argv):
    with pytest.raises(SystemExit) as end:
        train_tokenizer.run(lambda: sample.main(list(argv)))
    return str(end.value.code)


def test_sample_reconstructs_any_image(run_folder, tmp_path, capsys):
    flat(99, 1).save(tmp_path / "dot.png")
    Image.new("CMYK", (300, 40), (10, 200, 30, 0)).save(tmp_path / "wide.jpg")
    (tmp_path / "other").mkdir()
    flat(9, 50).save(tmp_path / "other/dot.png")
    paths = [str(tmp_path / p) for p in ("dot.png", "wide.jpg", "other/dot.png")]
    sample.main(["--reconstruct", *paths, "--tokenizer", str(run_folder), "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert out.count("PSNR") == 3 and out.count("SSIM") == 3
    assert sorted(os.listdir(tmp_path / "out")) == ["dot-0-reconstruction.png", "dot-2-reconstruction.png", "wide-1-reconstruction.png"]
    picture = Image.open(tmp_path / "out/wide-1-reconstruction.png")
    assert picture.height >= 256 and picture.width >= 512
    sample.main(["--reconstruct", "--n", "2", "--tokenizer", str(run_folder), "--out", str(tmp_path / "scenes")])
    assert len(os.listdir(tmp_path / "scenes")) == 2


def test_sample_bad_input_ends_in_a_sentence(run_folder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    there = ["--tokenizer", str(run_folder), "--out", str(tmp_path / "out")]
    assert "expected the path of an image" in sample_words("--reconstruct", str(tmp_path / "missing.png"), *there)
    assert "broken.png: cannot be read as an image" in sample_words("--reconstruct", str(tmp_path / "broken.png"), *there)
    assert "no model in" in sample_words("--reconstruct", "--tokenizer", str(tmp_path / "nowhere"))


@pytest.fixture
def drawn(run_folder, tmp_path, monkeypatch, capsys):
    words, text = [], sample.ImageDraw.ImageDraw.text
    monkeypatch.setattr(sample.ImageDraw.ImageDraw, "text",
                        lambda self, xy, string, *a, **k: (words.append(string), text(self, xy, string, *a, **k)))

    def draw(name, *more, folder=run_folder):
        words.clear()
        sample.main(["--figure", name, "--tokenizer", str(folder), "--out", str(tmp_path), "--device", "cpu", *more])
        assert capsys.readouterr().out.split()[-1] == str(tmp_path / f"figure-{name}.png")
        return words
    draw.world = World("plain", 32, train_tokenizer.VALIDATION_SEED, "val")
    return draw


def test_sample_figure_layers_shows_the_teacher(run_folder, tokenizer, tmp_path, drawn):
    words = drawn("layers", "--n", "20")
    similarity = layer_similarity(SigLIP.from_pretrained(run_folder / "siglip").vision_model, drawn.world.batch(range(20))[0])
    (a, b), name = split_layers(similarity), str(run_folder / "siglip")
    assert [w for w in words if re.fullmatch(r"\d\.\d\d", w)][6:] == [f"{x:.2f}" for x in similarity.flatten().tolist()]
    assert {f"shallow\n1 to {a}", f"middle\n{a + 1} to {b}",
            f"deep\n{b + 1} to 6"} <= set(words) and "ViT: " + name in words[-1].replace("\n", " ")
    for teacher, more, shown in ((name, [], name), ("gone", [], "as the tokenizer trained it"), ("gone", ["--siglip", name], name)):
        tokenizer.save_pretrained(tmp_path / "alone", teacher=teacher)
        assert shown in drawn("layers", "--n", "2", *more, folder=tmp_path / "alone")[-1].replace("\n", " ")


def test_sample_figure_clusters_are_blobs_and_say_what_they_follow(drawn, monkeypatch):
    truth, rng = torch.arange(4).repeat_interleave(torch.tensor([30, 20, 9, 1])), torch.Generator().manual_seed(0)
    x, order = 10 * torch.tensor([[0.0, 0], [1, 0], [0, 1], [2, 2]])[truth] + torch.randn(60, 2, generator=rng).double(), torch.randperm(60,
        generator=rng)
    cluster, distance = sample.kmeans(x[order], 4)
    assert torch.equal(cluster, truth[order])       # the largest comes first
    assert torch.allclose(distance, (x - torch.stack([x[truth == k].mean(0) for k in range(4)])[truth]).norm(dim=1)[order], atol=1e-4)
    scenes = World("plain", 32, train_tokenizer.VALIDATION_SEED, "val", single=1.0).scenes(range(64))
    monkeypatch.setattr(sample, "features_of", lambda tokenizer, images: {"shallow": torch.eye(4)[scenes.colour[:, 0]],
                                                                          "deep": torch.eye(8)[scenes.look[:, 1]]})
    (colour, _, shape, *_), (*rest, ground, chance) = ([int(x) for x in re.findall(r"(\d+)%", w)] for w in drawn("clusters", "--n", "64")
                                                       if "chance" in w)
    assert colour == ground == 100 > max(shape, chance, *rest)


def test_sample_figure_features_of_any_width_say_how_far_apart(run_folder, drawn, tmp_path, monkeypatch):
    x, y = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    sets = iter([{"encoder": x, "teacher": y}, {"encoder": x, "teacher": x + torch.eye(8)[0] * 100}])
    monkeypatch.setattr(sample, "features_of", lambda tokenizer, images: next(sets))
    words = drawn("features", "--n", "40", "--other", str(run_folder))
    near, far = (float(re.search(r"are ([\d.]+) spreads", w)[1]) for w in words if "spreads" in w)
    assert near < 0.5 and abs(far - 100 / (x - x.mean(0)).norm(dim=1).mean()) < 0.01 and sum("first component, 100%" in w
        for w in words) == 1
    assert words.count("encoder") == words.count("teacher") == 2 and Image.open(tmp_path / "figure-features.png").width > 800


def test_sample_figure_codes_mark_things_in_colours_of_their_own():
    codes = torch.zeros(60, 64, dtype=torch.int64)
    for i in range(60):
        codes[i, i * 7 % 48 + torch.tensor([0, 1, 8, 9])] = 1
    codes[:, 63], codes[0, 5], codes[1, 50] = 2, 3, 3       # in the corner of all; rare
    assert sample.telling_codes(codes, 2, 5)[0] == [1, 2]
    codes[:20, :60] = 4                                     # a ground in some pictures, a corner in the others
    codes[range(20, 60), [0, 7, 56, 61] * 10] = 4
    assert 4 not in sample.telling_codes(codes, 2, 5)[0]
    assert sample.telling_codes(torch.where(torch.arange(60)[:, None] == 7, codes, 0), 2, 1)[1] == [7]
    codes, pens = [5, 7, 7, 1, 5, 9, 1, 1, 7], {5: "#ff0000", 7: "#00ff00", 1: "#0000ff"}
    picture = np.asarray(sample.boxed(Image.new("RGB", (90, 90), "black"), codes, 30, pens))
    for n, code in enumerate(codes):
        box = picture[n // 3 * 30:n // 3 * 30 + 30, n % 3 * 30:n % 3 * 30 + 30]
        colours = {"#%02x%02x%02x" % tuple(pixel) for pixel in box.reshape(-1, 3)}
        assert colours == ({"#000000", "#ffffff", pens[code]} if code in pens else {"#000000"}) and not box[8:22, 8:22].any()


def test_sample_figure_depth_ends_at_the_reconstruction(run_folder, drawn):
    model, images = DualTokenizer.from_pretrained(run_folder), drawn.world.batch(range(20))[0]
    with torch.no_grad():
        codes = model.encode(images)
        steps, first = [model.decode(codes, d) for d in range(1, 5)], model.quantizer_pix.codebook[0][codes[:, :, 0, 0]]
        assert torch.allclose(steps[0], model._decode(model.postquant_pix(first)).clamp(-1, 1), atol=1e-5) and torch.allclose(steps[3],
            model.decode(codes), atol=1e-5)
    assert all((a - b).abs().max() > 1e-3 for a,
               b in zip(steps, steps[1:])) and f"4 codes\n{psnr(steps[3], images).mean().item():.2f} dB" in drawn("depth", "--n", "20")


def test_sample_figure_features_of_two_designs(run_folder, design_folders, drawn):
    """Beside dual's two layers, the encoder of its own that feeds a dual encoder's pixel stream."""
    words = " ".join(drawn("features", "--n", "20", "--other", str(design_folders["dual-encoder"])))
    names = ("shallow layer 2", "deep layer 5", "encoder", "dual\nthe", "dual-encoder\nthe")
    assert all(name in words for name in names) and words.count("spreads") == 2


def test_sample_figure_of_a_folder(tmp_path, drawn):
    for i in range(9):
        flat(20 * i, 40).save(tmp_path / f"{i}.png")
    for name in ("layers", "clusters", "features", "codes", "depth"):
        words = " ".join(drawn(name, "--images", str(tmp_path))).replace("\n", " ")
        assert min(Image.open(tmp_path / f"figure-{name}.png").size) > 300 and "pictures of" in words and "chance" not in words


def test_sample_figure_bad_input_ends_in_a_sentence(run_folder, tmp_path, capsys):
    (tmp_path / "none").mkdir(), flat(40, 20).save(tmp_path / "one.png")
    here, there = f"--images {tmp_path}", ["--tokenizer", str(run_folder), "--out", str(tmp_path / "out")]
    for argv, words in (("clusters " + here, "needs 8 pictures, got 1"), (f"depth {here} --n 3", "needs 3 pictures, got 1"),
                        ("codes --n 1", "needs 2 pictures, got 1"),
                        (f"layers {here}/none", "no images in"), ("layers --siglip none", "no model in"),
                        ("features --other none", "no model in")):
        assert words in sample_words("--figure", *argv.split(), *there), argv
    for argv, words in (("--figure cats", "invalid choice"), ("--reconstruct --images x", "--images goes with --figure"),
                        ("--fd x y --siglip x", "--siglip goes"),
                        ("--figure depth --siglip x", "--siglip goes with --figure layers"),
                        ("--reconstruct --compile", "--compile goes with --paint"),
                        ("--figure layers --other x", "--other goes with --figure features")):
        capsys.readouterr()
        assert sample_words(*argv.split(), *there) == "2" and words in capsys.readouterr().err.splitlines()[-1], argv
    assert not os.path.exists(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# mllm.py: the text tokenizer

VOCAB = Path(SHARED, "data", "vocab")
needs_vocab = pytest.mark.skipif(not (VOCAB / "qwen").is_dir(), reason="no vocabularies: set NANODUALTOKEN_SHARED")

SAMPLES = [
    "", " ", "a", "Hello world", "Hello, world! It's 3 o'clock.", "The quick brown fox jumps over the lazy dog.",
    "Ein Bär läuft über die Straße. ¿Dónde está? Ça va! Владимир пишет письмо. ελληνικά κείμενο",
    "一只红色的圆圈在蓝色方块的左边。赤い丸と青い四角。빨간 원과 파란 사각형 ไทย हिन्दी العربية עברית",
    "0 1 12 123 1234567890 3.14159 1,000,000 ½ Ⅷ ٣٤٥ 2x3 a1b2",
    "  two   three    four\t tab\t\ttabs \u00a0nbsp\u3000wide  ", "x  \n  y\n\n\nz\r\n\r\nw \n", "\n", "\n\n\n", "   ", " \n \n", "\t",
    "😀 👍🏽 👩‍👩‍👧‍👦 🇪🇺 ❤️ ok👌", "caf\u00e9 cafe\u0301 A\u030a \u212b n\u0303o\u0302\u0323 \ufb01 \uac00 \u1100\u1161",
    "I'm you're he's we've they'll she'd don't", "I'M YOU'RE HE'S WE'VE THEY'LL SHE'D DON'T 'S 'Tis",
    "x'sx ''s '' 'l 'll' l'l X'THEM Y'Div Z'RED",
    "def f(x):\n    return x ** 2  # square\n\n\tprint(f'{x!r}')\n", "<b>bold</b> &amp; https://example.org/a?b=c#d ... --- === !!!???",
    "\x00\x01\x7f\x80\xad control", "\u200b\u200d\ufeff\u2028\u2029\x85 \x0b\x0c separators", "<image_start><|endoftext",
    "a" * 600, "é" * 300, " " * 300 + "x",
]


def random_text(rng: random.Random, length: int) -> str:
    """Characters from everywhere but the surrogates, near neighbours more often, so that words, runs and combinations come up."""
    blocks = [(32, 127), (9, 14), (32, 33), (48, 58), (97, 123), (160, 592), (768, 880), (1024, 1280), (0x4E00, 0x9FFF), (0x1100, 0x1200),
              (0xAC00, 0xD7A4), (0x1F300, 0x1F700), (0x0900, 0x0980), (0x2000, 0x2070), (0xE000, 0x10FFFF), (0, 0xD800)]
    out = []
    while len(out) < length:
        block = rng.choice(blocks)
        out += [chr(rng.randrange(*block)) for _ in range(rng.randint(1, 6))]
    old = unicodedata.ucd_3_2_0.combining       # marks of later Unicode versions are in order in one normaliser and not yet in another
    return "".join(char for char in out if old(char) == unicodedata.combining(char))


@functools.cache
def loaded(name: str) -> TextTokenizer:
    return TextTokenizer.from_folder(VOCAB / name)


@functools.cache
def reference(name: str):
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    return getattr(transformers, {"gpt2": "GPT2Tokenizer", "qwen": "Qwen2Tokenizer"}[name]).from_pretrained(VOCAB / name)


def hugging_face(folder: Path, name: str, pairs: bool, added: list[tuple[str, int]]) -> Path:
    """Writes tokenizer.json in Hugging Face's layout from vocab.json and merges.txt: merges as pairs or as strings."""
    folder.mkdir(exist_ok=True)
    vocab = json.loads((VOCAB / name / "vocab.json").read_text("utf-8"))
    merges = [line for line in (VOCAB / name / "merges.txt").read_text("utf-8").splitlines() if line][1:]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": name == "gpt2"}
    split = {"type": "Split", "pattern": {"Regex": KNOWN[151643][0]}, "behavior": "Isolated", "invert": False}
    content = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": id, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                          "special": True} for token, id in added],
        "normalizer": None if name == "gpt2" else {"type": "NFC"},
        "pre_tokenizer": level if name == "gpt2" else {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": level, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                  "fuse_unk": False, "vocab": vocab, "merges": [merge.split(" ") for merge in merges] if pairs else merges}}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def same(a: TextTokenizer, b: TextTokenizer) -> bool:
    texts = SAMPLES + [random_text(random.Random(seed), 200) for seed in range(3)]
    return (a.encoding._mergeable_ranks == b.encoding._mergeable_ranks and all(a.encode(text) == b.encode(text) for text in texts)
            and (a.marks, a.end, a.turn_start, a.turn_end, a.size, a.nfc) == (b.marks, b.end, b.turn_start, b.turn_end, b.size, b.nfc))


def refuses(call, *words: str):
    """The call raises ValueError with one sentence that has the words in it, and shows no chain of other errors."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is ValueError and caught.value.__suppress_context__ | (caught.value.__context__ is None)
    assert "\n" not in message and 20 < len(message) < 700 and not re.search(r"\. [A-Z]", message), message
    for word in words:
        assert word in message, message


# ---------------------------------------------------------------------------------------------------------------------
# ids

def test_text_bytes_are_the_ids():
    text = TextTokenizer.bytes()
    assert text.encode("aé\n漢") == list("aé\n漢".encode()) and text.encode("") == []
    assert text.marks == dict(zip(MARKS, range(257, 261))) and text.end == 256 and text.size == 261
    assert text.turn_start is None and text.turn_end is None and text.nfc is False and not text.files
    assert text.encode("e\u0301") == [101, 204, 129]                                        # not composed


@needs_vocab
def test_text_known_ids():
    gpt2, qwen = loaded("gpt2"), loaded("qwen")
    assert gpt2.encode("Hello world") == [15496, 995] and qwen.encode("Hello world") == [9707, 1879]
    assert gpt2.end == 50256 and gpt2.size == 50261 and gpt2.turn_start is None and gpt2.turn_end is None and not gpt2.nfc
    assert gpt2.marks == dict(zip(MARKS, range(50257, 50261)))
    assert (qwen.end, qwen.turn_start, qwen.turn_end, qwen.size, qwen.nfc) == (151643, 151644, 151645, 151669, True)
    assert qwen.marks == {"<image_start>": 151665, "<image_end>": 151666, "<image_gen_start>": 151667, "<image_gen_end>": 151668}
    assert len(set(SPECIALS)) == 22 and qwen.specials["<|vision_start|>"] == 151652 and qwen.specials["<|file_sep|>"] == 151664
    assert [*qwen.files] == ["vocab.json", "merges.txt"]


@needs_vocab
@pytest.mark.parametrize("name", ["gpt2", "qwen"])
def test_text_equals_the_reference(name):
    text, other = loaded(name), reference(name)
    rng = random.Random(1)
    samples = SAMPLES + [random_text(rng, rng.randint(1, 300)) for _ in range(300)]
    samples += [unicodedata.normalize(form, sample) for form in ("NFC", "NFD") for sample in SAMPLES]
    wrong = [sample for sample in samples if text.encode(sample) != other(sample, add_special_tokens=False)["input_ids"]]
    assert not wrong, f"{len(wrong)} of {len(samples)} differ, such as {wrong[0]!r}"


@needs_vocab
def test_text_qwen_composes_and_gpt2_does_not():
    assert loaded("qwen").encode("cafe\u0301") == loaded("qwen").encode("caf\u00e9")
    assert loaded("gpt2").encode("cafe\u0301") != loaded("gpt2").encode("caf\u00e9")


# ---------------------------------------------------------------------------------------------------------------------
# layouts

@needs_vocab
@pytest.mark.parametrize("pairs, count", [(False, 22), (True, 3), (True, 26)])
def test_text_qwen_tokenizer_json_equals_vocab_and_merges(tmp_path, pairs, count):
    added = [(name, 151643 + n) for n, name in enumerate([*SPECIALS, *MARKS])][:count]   # Qwen2 lists 3, Qwen2.5 22; 26: and our marks
    text = TextTokenizer.from_folder(hugging_face(tmp_path, "qwen", pairs, added))
    assert same(text, loaded("qwen")) and [*text.files] == ["tokenizer.json"]


@needs_vocab
def test_text_gpt2_tokenizer_json_equals_vocab_and_merges(tmp_path):
    folder = hugging_face(tmp_path, "gpt2", True, [("<|endoftext|>", 50256)])
    assert same(TextTokenizer.from_folder(folder), loaded("gpt2"))
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    del content["model"]["type"]                                                             # as in older files
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert same(TextTokenizer.from_folder(str(folder)), loaded("gpt2"))


@needs_vocab
def test_text_qwen_tiktoken_equals_vocab_and_merges(tmp_path):
    shutil.copyfile(VOCAB / "qwen" / "qwen.tiktoken", tmp_path / "qwen.tiktoken")
    assert same(TextTokenizer.from_folder(tmp_path), loaded("qwen"))


@needs_vocab
def test_text_vocab_json_with_or_without_specials(tmp_path):
    vocab = json.loads((VOCAB / "qwen" / "vocab.json").read_text("utf-8"))
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {name: 151643 + n for n, name in enumerate(SPECIALS)}), encoding="utf-8")
    merges = (VOCAB / "qwen" / "merges.txt").read_bytes()
    (tmp_path / "merges.txt").write_bytes(merges.partition(b"\n")[2] + b"\n")                # no first line, an empty last one
    assert same(TextTokenizer.from_folder(tmp_path), loaded("qwen"))


# ---------------------------------------------------------------------------------------------------------------------
# encode and decode

@needs_vocab
@pytest.mark.parametrize("name", ["bytes", "gpt2", "qwen"])
def test_text_spelling_of_marks_stays_text(name):
    text = TextTokenizer.bytes() if name == "bytes" else loaded(name)
    for spelling in [*MARKS, *SPECIALS]:
        sample = f"see {spelling} and{spelling}{spelling}."
        ids = text.encode(sample)
        assert max(ids) < text.end and not set(ids) & set(text.specials.values())
        assert text.decode(ids) == sample


@needs_vocab
@pytest.mark.parametrize("name", ["bytes", "gpt2", "qwen"])
def test_text_round_trip(name):
    text = TextTokenizer.bytes() if name == "bytes" else loaded(name)
    rng = random.Random(2)
    for sample in SAMPLES + [random_text(rng, rng.randint(0, 400)) for _ in range(200)]:
        assert text.decode(text.encode(sample)) == (unicodedata.normalize("NFC", sample) if name == "qwen" else sample)


@needs_vocab
@pytest.mark.parametrize("name", ["bytes", "gpt2", "qwen"])
def test_text_decode_leaves_out_specials_and_strangers(name):
    text = TextTokenizer.bytes() if name == "bytes" else loaded(name)
    a, b = text.encode("red"), text.encode(" circle")
    assert text.decode([text.end, *a, *text.specials.values(), *b, text.size, 10 ** 9, -1]) == "red circle"
    assert text.decode([]) == "" and text.decode([text.end]) == ""
    cut = text.encode("é" if name == "bytes" else "\U000F1234")[:-1]                         # the start of a character
    assert text.decode([*a, *cut, *b]) == "red\ufffd circle"
    text.decode(random.Random(0).choices(range(text.size), k=2000))                          # any ids make some string


def test_text_lone_surrogates_do_not_fail():
    assert TextTokenizer.bytes().decode(TextTokenizer.bytes().encode("a\ud800b")) == "a\ufffdb"


# ---------------------------------------------------------------------------------------------------------------------
# SmolLM2's form: special tokens first, digits one by one, bytes that the corpus lacked

@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    """A small vocabulary made as SmolLM2's was -> its folder, tokenizers' own, and the entry that `KNOWN` would have."""
    tokenizers = pytest.importorskip("tokenizers", reason="parity needs tokenizers")
    folder, made = tmp_path_factory.mktemp("smollm"), tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Digits(True),
                                                             tokenizers.pre_tokenizers.ByteLevel(False)])
    made.decoder = tokenizers.decoders.ByteLevel()
    corpus = [re.sub("[\x00-\x08\x0e-\x1f\x7f]", "", sample) for sample in SAMPLES] * 3 + ["a--b ---- c !! 1  2   33    x.\n\n\n" * 3]
    made.train_from_iterator(corpus, tokenizers.trainers.BpeTrainer(vocab_size=900, special_tokens=mllm.SMOLLM_SPECIALS,
                                                                    show_progress=False))
    made.save(str(folder / "tokenizer.json"))
    single = sum(len(token) == 1 for token in made.get_vocab())
    return folder, made, {made.get_vocab_size() - 17: (mllm.SMOLLM_SPLIT, False, mllm.SMOLLM_SPECIALS, 17, single)}


def test_text_smollm_equals_the_reference(smollm, tmp_path, monkeypatch):
    """Every id, also beside bytes that the vocabulary lacks; special tokens where they are; the marks after all."""
    folder, other, known = smollm
    monkeypatch.setattr(mllm, "KNOWN", KNOWN | known)
    text = TextTokenizer.from_folder(folder)
    assert 100 < (single := known[len(text.ordinary)][4]) < 243 and len(text.lacking) == 256 - single
    assert (text.end, text.turn_start, text.turn_end) == (0, 1, 2) and text.ordinary == {*range(17, other.get_vocab_size())}
    assert [*text.marks.values()] == [*range(other.get_vocab_size(), text.size)] and len(text.marks) == 4
    rng = random.Random(3)
    samples = SAMPLES + ["1 2  3\n4 \t5x  y", "-\x01-", "a\x01b", "\x01", "!\x02\x01!!  \x03\n\x04", "\U000F1234-\U000F1234", "'\x05s 9's"]
    samples += [random_text(rng, rng.randint(1, 200)) for _ in range(150)] + ["".join(rng.choices("ab 1\n\t-!'s\x01\x02é", k=30))
                                                                              for _ in range(150)]
    wrong = [sample for sample in samples if text.encode(sample) != other.encode(sample, add_special_tokens=False).ids]
    assert not wrong, f"{len(wrong)} of {len(samples)} differ, such as {wrong[0]!r}"
    kept = [sample for sample in SAMPLES if not set(sample.encode()) & set(text.lacking)]
    assert all(text.decode(text.encode(sample)) == sample for sample in kept) and len(kept) > 15
    for spelling in [*MARKS, *mllm.SMOLLM_SPECIALS]:
        assert set(text.encode(f"a{spelling} b")) <= text.ordinary
    assert text.decode([0, *text.encode("red"), 1, 2, 16, *text.marks.values(), text.size, 10 ** 9, -1, *text.encode(" 12")]) == "red 12"
    text.save(tmp_path)
    assert same(TextTokenizer.from_folder(tmp_path), text)


def test_text_smollm_answers_nothing_but_text(smollm, monkeypatch):
    """Tokens 0 to 16 are special there: an answer has none of them but the end of its turn."""
    folder, _, known = smollm
    monkeypatch.setattr(mllm, "KNOWN", KNOWN | known)
    text = TextTokenizer.from_folder(folder)
    assert spelled(turn(text, ["hi"]), text) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    torch.manual_seed(0)
    model = DualMLLM(MLLMConfig(llm=small_llm(vocab_size=text.size, max_position_embeddings=200), positions=4, depth=3, codebook_size=11,
                                code_dim=5, head_width=8, head_heads=2, head_mlp=8), text)
    seen = []
    monkeypatch.setattr(text, "decode", lambda ids: seen.extend(ids) or "")
    monkeypatch.setattr(model.llm, "head", lambda h: torch.randn(len(h), text.size))
    model.answer(None, ["what?"] * 40, longest=40)
    assert len(seen) > 200 and set(seen) <= text.ordinary


def test_text_smollm_is_known_by_its_published_sizes(smollm, tmp_path):
    """17 special tokens, 235 bytes, 48,900 merges: 49,152. A vocabulary of its form and another size is refused."""
    (size, (_, _, specials, first, single)), = ((size, entry) for size, entry in KNOWN.items() if entry[3])
    assert first == len(specials) == 17 and size - single == 48_900 and size + first == 49_152 == LLMS["smollm2-135m"]["vocab_size"]
    refuses(lambda: TextTokenizer.from_folder(smollm[0]), "49135 of SmolLM2", "tokenizer.json")


# ---------------------------------------------------------------------------------------------------------------------
# files

@needs_vocab
@pytest.mark.parametrize("name, layout", [("gpt2", "vocab.json merges.txt"), ("qwen", "vocab.json merges.txt"), ("qwen", "qwen.tiktoken"),
                                          ("gpt2", "tokenizer.json")])
def test_text_save_and_from_folder(tmp_path, name, layout):
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    if layout == "tokenizer.json":
        hugging_face(source, name, False, [("<|endoftext|>", 50256)])
    else:
        source.mkdir()
        for file in layout.split():
            shutil.copyfile(VOCAB / name / file, source / file)
    text = TextTokenizer.from_folder(source)
    text.save(target)
    assert sorted(os.listdir(target)) == sorted(layout.split())                              # nothing temporary is left
    assert same(TextTokenizer.from_folder(target), loaded(name))
    before = {file: (source / file).read_bytes() for file in layout.split()}
    text.save(source)                                                                        # where it came from
    assert {file: (source / file).read_bytes() for file in os.listdir(source)} == before


@needs_vocab
def test_text_save_refuses_what_would_not_come_back(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    refuses(lambda: loaded("gpt2").save(tmp_path), "tokenizer.json", "another folder")
    TextTokenizer.bytes().save(tmp_path)        # is in no file, so none is read in its place
    with pytest.raises(ValueError, match="another folder"):     # and the weights that are there stay
        small_mllm(loaded("gpt2"), dict(vocab_size=loaded("gpt2").size)).save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    (tmp_path / "in").mkdir()
    shutil.copyfile(VOCAB / "qwen" / "qwen.tiktoken", tmp_path / "in" / "qwen.tiktoken")
    gone = TextTokenizer.from_folder(tmp_path / "in")
    (tmp_path / "in" / "qwen.tiktoken").unlink()
    gone.save(tmp_path / "out")         # what was read is kept
    assert same(TextTokenizer.from_folder(tmp_path / "out"), gone)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        loaded("gpt2").save(tmp_path / "file")


def test_text_bytes_save_nothing(tmp_path):
    TextTokenizer.bytes().save(tmp_path)
    assert os.listdir(tmp_path) == []


def tiny(**changes) -> str:
    """A small tokenizer.json, of which parts are replaced."""
    content = {"added_tokens": [], "normalizer": None, "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}
    return json.dumps(content | changes)


BROKEN = {
    "nothing": ({}, ["0 ordinary", "tokenizer.json", "merges.txt", "qwen.tiktoken"]),
    "merges missing": ({"vocab.json": "{}"}, ["merges.txt"]),
    "vocabulary missing": ({"merges.txt": "a b"}, ["vocab.json"]),
    "empty": ({"tokenizer.json": ""}, ["tokenizer.json", "Expecting value"]),
    "cut": ({"tokenizer.json": '{"model": {"vocab": {"a": 0, "b'}, ["tokenizer.json"]),
    "no UTF-8": ({"tokenizer.json": b"\xff\xfe{}"}, ["tokenizer.json", "utf-8"]),
    "too deep": ({"tokenizer.json": "[" * 200000}, ["tokenizer.json"]),
    "list": ({"tokenizer.json": "[1, 2]"}, ["tokenizer.json"]),
    "null": ({"tokenizer.json": "null"}, ["tokenizer.json"]),
    "number": ({"tokenizer.json": "7"}, ["tokenizer.json"]),
    "string": ({"tokenizer.json": '"x"'}, ["tokenizer.json"]),
    "no model": ({"tokenizer.json": '{"added_tokens": []}'}, ["tokenizer.json"]),
    "unigram": ({"tokenizer.json": tiny(model={"type": "Unigram", "vocab": [["a", -1.0]]})}, ["tokenizer.json"]),
    "vocabulary of another type": ({"tokenizer.json": tiny(model={"vocab": [1], "merges": []})}, ["tokenizer.json"]),
    "another vocabulary": ({"tokenizer.json": tiny()}, ["3 ordinary", "50256", "151643"]),
    "merges of numbers": ({"tokenizer.json": tiny(model={"vocab": {"a": 0}, "merges": [1, 2]})}, ["tokenizer.json"]),
    "merges of one": ({"tokenizer.json": tiny(model={"vocab": {"a": 0}, "merges": [["a"]]})}, ["tokenizer.json"]),
    "merges of lists": ({"tokenizer.json": tiny(model={"vocab": {"a": 0}, "merges": [[["a"], ["a"]]]})}, ["tokenizer.json"]),
    "ids as text": ({"tokenizer.json": tiny(model={"vocab": {"a": "0"}, "merges": []})}, ["tokenizer.json"]),
    "ids as lists": ({"tokenizer.json": tiny(model={"vocab": {"a": [0]}, "merges": []})}, ["tokenizer.json"]),
    "sentencepiece": ({"tokenizer.json": tiny(model={"vocab": {"\u2581a": 0}, "merges": []})}, ["\u2581", "spells no bytes"]),
    "vocab.json is a list": ({"vocab.json": "[]", "merges.txt": "a b"}, ["vocab.json", "merges.txt"]),
    "empty vocab.json": ({"vocab.json": "{}", "merges.txt": ""}, ["0 ordinary"]),
    "merges.txt is something else": ({"vocab.json": '{"a": 0}', "merges.txt": "<html> no such file </html>"}, ["merges.txt"]),
    "no base64": ({"qwen.tiktoken": "!!! 0\n"}, ["qwen.tiktoken", "base64"]),
    "no rank": ({"qwen.tiktoken": "IQ==\n"}, ["qwen.tiktoken"]),
    "rank is no number": ({"qwen.tiktoken": "IQ== x\n"}, ["qwen.tiktoken", "'x'"]),
    "few ranks": ({"qwen.tiktoken": "IQ== 0\nIg== 1\n"}, ["2 ordinary", "151643"]),
    "git lfs pointer": ({"qwen.tiktoken": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2561218\n"}, ["qwen.tiktoken"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_text_broken_files_are_refused(tmp_path, case):
    files, words = BROKEN[case]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refuses(lambda: TextTokenizer.from_folder(tmp_path), *words, "expected", "copy", str(tmp_path))


def test_text_missing_folder_is_refused(tmp_path):
    refuses(lambda: TextTokenizer.from_folder(str(tmp_path / "nowhere")), "nowhere", "tokenizer.json", "expected")
    (tmp_path / "file").write_text("x")
    refuses(lambda: TextTokenizer.from_folder(tmp_path / "file"), "file", "expected")


def swapped(lines, i, j):
    lines[i], lines[j] = lines[j], lines[i]
    return lines


@needs_vocab
@pytest.mark.parametrize("change, words", [
    (lambda m: swapped(m, 100, 101), "order"), (lambda m: m[:-1], "49999 merges"), (lambda m: m[:5] + m[6:], "merges"),
    (lambda m: m + m[-1:], "50001 merges"), (lambda m: m[:7] + ["qq zz"] + m[8:], "known"), (lambda m: [" Ġt"] + m[1:], "known"),
    (lambda m: [], "0 merges"),
    (lambda m: m[:9] + ["a b c"] + m[10:], "unpack"), (lambda m: m[:9] + ["ab"] + m[10:], "unpack")],
    ids=["order", "cut", "left out", "twice", "unknown", "empty", "none", "three", "one"])
def test_text_merges_that_do_not_fit_are_refused(tmp_path, change, words):
    shutil.copyfile(VOCAB / "gpt2" / "vocab.json", tmp_path / "vocab.json")
    merges = (VOCAB / "gpt2" / "merges.txt").read_text("utf-8").splitlines()
    (tmp_path / "merges.txt").write_text("\n".join(merges[:1] + change(merges[1:])), encoding="utf-8")
    refuses(lambda: TextTokenizer.from_folder(tmp_path), "merges.txt", words)


@needs_vocab
@pytest.mark.parametrize("change, words", [
    ({"!": 1}, "0, 1, 2"), ({"!": -1}, "0, 1, 2"), ({"!": 0.0}, "float"), ({"!": None}, "0, 1, 2"), ({"!": "0"}, "0, 1, 2"),
    ({"!": [0]}, "list"), ({"Ġgazed": 60000}, "merges"), ({"zqzqz": 50257}, "50257 ordinary"), ({"a b": 50257}, "spells no bytes")])
def test_text_ids_that_do_not_fit_are_refused(tmp_path, change, words):
    vocab = json.loads((VOCAB / "gpt2" / "vocab.json").read_text("utf-8"))
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | change), encoding="utf-8")
    shutil.copyfile(VOCAB / "gpt2" / "merges.txt", tmp_path / "merges.txt")
    refuses(lambda: TextTokenizer.from_folder(tmp_path), "vocab.json", words)


@needs_vocab
@pytest.mark.parametrize("added", [
    [("<|endoftext|>", 50257)], [("<|endoftext|>", 50256), ("<tool_response>", 50257)], [("<|im_start|>", 50257)],
    [("<image_start>", 50258)]])
def test_text_added_tokens_elsewhere_are_refused(tmp_path, added):
    refuses(lambda: TextTokenizer.from_folder(hugging_face(tmp_path, "gpt2", False, added)), "tokenizer.json", "added tokens", added[-1][0])


@needs_vocab
@pytest.mark.parametrize("added", [[7], [["<|endoftext|>", 50256]], [{"content": ["<|endoftext|>"], "id": 50256}]])
def test_text_added_tokens_of_another_type_are_refused(tmp_path, added):
    path = hugging_face(tmp_path, "gpt2", False, []) / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"added_tokens": added}), encoding="utf-8")
    refuses(lambda: TextTokenizer.from_folder(tmp_path), "tokenizer.json")


def test_text_unreadable_file_is_refused(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(Path, "read_bytes", denied)
    refuses(lambda: TextTokenizer.from_folder(tmp_path), "tokenizer.json", "Permission denied")


@needs_vocab
def test_text_missing_bytes_are_refused(tmp_path):
    lines = (VOCAB / "qwen" / "qwen.tiktoken").read_text("utf-8").splitlines()
    (tmp_path / "qwen.tiktoken").write_text("\n".join(["//79/A== 0", *lines[1:]]))           # four bytes where "!" was
    refuses(lambda: TextTokenizer.from_folder(tmp_path), "256 of them single bytes")


# ---------------------------------------------------------------------------------------------------------------------
# mllm: the LLM

def small_llm(**more):
    sizes = dict(vocab_size=264, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                 max_position_embeddings=200, rope_theta=100.0, tie_word_embeddings=True)
    return LLMConfig(**{**sizes, **more})


def their_llm(c, seed=0):
    """Qwen2, or Llama where there are no biases."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: no parity with it")
    name = "Qwen2" if c.attention_bias else "Llama"
    config = getattr(transformers, name + "Config")(**vars(c), bos_token_id=None, eos_token_id=None)
    return randomised(getattr(transformers, name + "ForCausalLM")(config), seed).eval()


@pytest.mark.parametrize("tied, groups, theta, eps, bias", [(True, 2, 1e6, 1e-6, True), (False, 4, 1e4, 1e-5, True),
                                                            (False, 1, 30.0, 0.3, True),
                                                            (True, 2, 1e5, 1e-5, False), (False, 4, 1e4, 1e-6, False)])
def test_mllm_llm_matches_transformers(tied, groups, theta, eps, bias, tmp_path):
    c = small_llm(tie_word_embeddings=tied, num_key_value_heads=groups, rope_theta=theta, rms_norm_eps=eps, attention_bias=bias)
    theirs, ids = their_llm(c), torch.randint(264, (2, 50), generator=torch.Generator().manual_seed(1))
    theirs.save_pretrained(tmp_path)
    ours = LLM.from_pretrained(tmp_path)
    assert ours.config == c and (ours.lm_head is None) == tied
    with torch.no_grad():
        expected = theirs(ids).logits
        assert expected.std() > 0.3
        torch.testing.assert_close(ours(ids), expected, atol=1e-4, rtol=0)


def test_mllm_llm_loads_the_layouts_of_hugging_face(tmp_path):
    """Shards with an index, bf16, a tied checkpoint that holds its table twice, and config.json as Qwen2.5's were published, defaults left
    out."""
    theirs, ids = their_llm(small_llm(rms_norm_eps=1e-6)), torch.randint(264, (1, 9))
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="15KB")
    assert len(glob.glob(str(tmp_path / "shards/*.safetensors"))) > 2
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    rounded = {name: value.float() for name, value in theirs.state_dict().items() if name != "lm_head.weight"}
    shutil.copytree(tmp_path / "bf16", tmp_path / "twice")
    save_file({name: value.bfloat16() for name, value in rounded.items()}
              | {"lm_head.weight": rounded["model.embed_tokens.weight"].bfloat16()},
              tmp_path / "twice/model.safetensors", metadata={"format": "pt"})
    published = {k: v for k, v in vars(small_llm()).items() if k != "rms_norm_eps"}
    (tmp_path / "twice/config.json").write_text(json.dumps({"model_type": "qwen2", "torch_dtype": "bfloat16", "use_sliding_window": False,
                                                            "sliding_window": 99, **published}))
    for name in ("bf16", "twice"):
        ours = LLM.from_pretrained(tmp_path / name)
        assert ours.config == small_llm(rms_norm_eps=1e-6) and equal(ours.state_dict(), rounded)
        assert {value.dtype for value in ours.state_dict().values()} == {torch.float32}
    theirs = their_llm(small_llm(rms_norm_eps=1e-6))
    with torch.no_grad():
        torch.testing.assert_close(LLM.from_pretrained(tmp_path / "shards")(ids), theirs(ids).logits, atol=1e-4, rtol=0)


def test_mllm_llm_bad_files_end_in_a_sentence(tmp_path):
    c, index = small_llm(), "model.safetensors.index.json"
    weights, shards = LLM(c).state_dict(), tmp_path / "shards"
    shards.mkdir()
    names = list(weights)
    for n in range(2):
        save_file({name: weights[name] for name in names[n::2]}, shards / f"part-{n}.safetensors")
    (shards / index).write_text(json.dumps({"weight_map": {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}}))
    config = {"model_type": "qwen2", **vars(c)}
    (shards / "config.json").write_text(json.dumps(config))
    assert equal(LLM.from_pretrained(shards).state_dict(), weights)

    def words(change):
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(shards, folder)
        change(folder)
        with pytest.raises(ValueError) as caught:
            LLM.from_pretrained(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def configured(**more):
        return words(lambda folder: (folder / "config.json").write_text(json.dumps({**config, **more})))

    assert "part-1.safetensors" in words(lambda folder: os.remove(folder / "part-1.safetensors"))
    assert "mlp_bias True" in configured(use_sliding_window=None, hidden_act=None, attention_bias=None, mlp_bias=True)      # null: left out
    assert "truncated or damaged" in words(lambda folder: (folder / "part-0.safetensors").write_bytes(b"x"))
    less = words(lambda folder: save_file({name: weights[name] for name in names[2::2]}, folder / "part-0.safetensors"))
    assert f"missing {names[0]}" in less and names[2] not in less
    assert "unexpected model.rotary (3,)" in words(lambda folder: save_file({**{n: weights[n] for n in names[::2]},
                                                                             "model.rotary": torch.ones(3)}, folder / "part-0.safetensors"))
    assert "model.norm.weight is (5,), expected (32,)" in words(lambda folder: save_file({**weights, "model.norm.weight": torch.ones(5)},
                                                                                         folder / "model.safetensors"))
    assert "no index of safetensors files" in words(lambda folder: (folder / index).write_text('{"weights": 3}'))
    assert "../part-0" in words(lambda folder: (folder / index).write_text('{"weight_map": {"a": "../part-0.safetensors"}}'))
    assert "config.json cannot be read" in words(lambda folder: os.remove(folder / "config.json"))
    assert "model_type 'mistral'" in configured(model_type="mistral") and "hidden_act 'gelu'" in configured(hidden_act="gelu")
    assert "attention_bias True, expected False" in configured(model_type="llama")
    assert "attention_bias False, expected True" in configured(attention_bias=False)
    assert "mlp_bias True" in configured(mlp_bias=True) and "head_dim 16" in configured(head_dim=16)
    assert "use_sliding_window True" in configured(use_sliding_window=True)
    for rope in ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, {"rope_scaling": {"rope_type": "yarn"}},
                 {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}):
        assert "rope_type 'yarn'" in configured(**rope)
    assert "5 heads" in configured(num_attention_heads=5)


def test_mllm_llm_reads_llamas_defaults(tmp_path):
    """What config.json leaves out, or says is null, is what transformers takes it for."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: no parity with it")
    for written in ({}, {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": None, "head_dim": 64, "rope_theta": 1e5,
                         "pretraining_tp": 1, "rope_scaling": None}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **written}))
        config, read = transformers.LlamaConfig(**written), []
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="no weights"):
            patch.setattr(mllm, "LLMConfig", lambda **sizes: read.append(LLMConfig(**sizes)) or read[-1])
            patch.setattr(mllm, "make_config",
                          lambda kind, values, folder, more: kind(**{k: v for k, v in (more | values).items() if k in vars(LLMConfig())}))
            LLM.from_pretrained(tmp_path)
        theta = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
        assert vars(read[0]) == {name: theta if name == "rope_theta" else getattr(config, name) for name in vars(read[0])}


def test_mllm_cache_decodes_what_transformers_generates():
    """Greedy, from prompts of unequal lengths, padded on the left."""
    c = small_llm(tie_word_embeddings=False)
    theirs, ours, steps = their_llm(c), LLM(c).eval(), 12
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(264, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(9) >= torch.tensor([0, 4, 7])[:, None]
    expected = theirs.generate(ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=steps, pad_token_id=0)[:, 9:]
    cache, got = Cache(c, 3, 9 + steps, "cpu", torch.float32), []
    with torch.no_grad():
        h = ours.hidden(ours.model.embed_tokens(ids), mask, cache)[:, -1]
        for _ in range(steps):
            got.append(ours.head(h).argmax(-1))
            h = ours.hidden(ours.model.embed_tokens(got[-1])[:, None], cache=cache)[:, -1]
    assert torch.equal(torch.stack(got, 1), expected) and len(set(expected.flatten().tolist())) > 6


@torch.no_grad()
def test_mllm_padding_and_cache_change_nothing():
    """Padding of random vectors on either side, in one pass or in chunks through a cache, and going on after it: what each sequence gives
    alone."""
    c, lengths = small_llm(), (4, 11, 7)
    llm = randomised(LLM(c))
    rows, more = [torch.randn(n, 32) for n in lengths], torch.randn(3, 2, 32)
    alone = [llm.hidden(row[None])[0] for row in rows]
    longer = [llm.hidden(torch.cat([row, end])[None])[0, -2:] for row, end in zip(rows, more)]
    for left in (True, False):
        x, mask = torch.randn(3, 11, 32), torch.zeros(3, 11, dtype=torch.bool)
        for b, row in enumerate(rows):
            place = slice(11 - len(row), 11) if left else slice(0, len(row))
            x[b, place], mask[b, place] = row, True
        results = [] if left else [llm.hidden(x)]
        for sizes in ((11,), (1, 6, 1, 3), (5, 6)):
            cache, parts = Cache(c, 3, 20, "cpu", torch.float32), []
            for part, known in zip(x.split(sizes, 1), mask.split(sizes, 1)):
                parts.append(llm.hidden(part, known, cache))
            results.append(torch.cat(parts, 1))
            torch.testing.assert_close(llm.hidden(more, cache=cache), torch.stack(longer), atol=1e-5, rtol=1e-4)
        for result in results:
            assert result.isfinite().all()
            for b, expected in enumerate(alone):
                torch.testing.assert_close(result[b][mask[b]], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_mllm_llm_is_causal():
    llm, x = randomised(LLM(small_llm())), torch.randn(2, 12, 32)
    later = x.clone()
    later[:, 5:] = torch.randn(2, 7, 32)
    for mask in (None, torch.arange(12) >= torch.tensor([[0], [3]])):
        a, b = (llm.hidden(y, mask, None if mask is None else Cache(llm.config, 2, 12, "cpu", torch.float32)) for y in (x, later))
        assert torch.allclose(a[:, :5], b[:, :5], atol=1e-6) and ((a - b).abs().amax(-1) > 1e-2)[:, 5:].all()
    with pytest.raises(ValueError, match="a mask without a cache"):
        llm.hidden(x, mask)


def test_mllm_checkpointing_changes_nothing():
    grads = []
    for on in (False, True):
        llm = randomised(LLM(small_llm()))
        llm.checkpointing = on
        llm(torch.arange(20)[None]).square().mean().backward()
        grads.append({name: p.grad for name, p in llm.named_parameters()})
    assert equal(*grads) and len(grads[0]) > 30


@pytest.mark.parametrize("name, count", [("qwen2.5-0.5b", 494_032_768), ("qwen2.5-1.5b", 1_543_714_304), ("qwen2.5-3b", 3_085_938_688),
                                         ("qwen2.5-7b", 7_615_616_512)])
def test_mllm_published_shapes_have_the_published_counts(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in LLM(LLMConfig(**LLMS[name])).parameters()) == count


# ---------------------------------------------------------------------------------------------------------------------
# mllm: sequences

BYTES = TextTokenizer.bytes()
CHAT = TextTokenizer({bytes([b]): b for b in range(256)}, mllm.QWEN_SPLIT, True, mllm.SPECIALS, [])        # Qwen's marks over bytes
START, END, GEN_START, GEN_END = (BYTES.marks[name] for name in mllm.MARKS)


def random_codes(*shape, seed=0, size=11):
    return torch.randint(size, shape, generator=torch.Generator().manual_seed(seed))


def laid_out(segments, text):
    """Segments -> (id, or None at a picture's positions; loss) for each place, written anew."""
    out = []
    for s in segments:
        if isinstance(s, Words):
            out += [(id, s.loss) for id in s.ids]
        else:
            first, last = (text.marks[f"<image_{'gen_' if s.paint else ''}{end}>"] for end in ("start", "end"))
            out += [(first, False), *[(None, False)] * len(s.data), (last, False)]
    return out


def spelled(segments, text, losses=False):
    names = {id: name for name, id in text.specials.items()} | {None: "#"}
    return "".join(names[id] if id in names else text.decode([id]) for id, loss in laid_out(segments, text) if loss or not losses)


def test_mllm_sequences_are_laid_out_as_the_docstring_says():
    a, b = random_codes(2, 3, 2, 3)
    line, stop = [(10, False)], (256, True)
    say = lambda words, loss: [(byte, loss) for byte in words.encode()]
    read, painted = ([(first, False), *[(None, False)] * 3, (last, False)] for first, last in ((START, END), (GEN_START, GEN_END)))
    for segments, expected in (
            (turn(BYTES, [Picture(a), "what?"], ["réd"]), read + say("what?", False) + line + say("réd", True) + [stop]),
            (turn(BYTES, [Picture(a), "what?"]), read + say("what?", False) + line),
            (turn(BYTES, ["red"], [Picture(b, True)]), say("red", False) + line + painted + [(256, False)]),
            (turn(BYTES, [Picture(a), "more", Picture(b)], ["so", Picture(b, True), "it is"]),
             read + say("more", False) + read + line + say("so", True) + painted + say("it is", True) + [stop]),
            (document(BYTES, ["one", Picture(a), "two", Picture(b, True)]), [(256, False)] + say("one", True) + read + say("two", True)
             + painted + [stop])):
        assert laid_out(segments, BYTES) == expected


@pytest.mark.parametrize("left", [True, False])
def test_mllm_pack_puts_losses_on_the_reply_alone(left):
    """A place's state predicts what follows: every target stands one place on, is the reply's or its end, and is never a picture's."""
    pictures = random_codes(5, 4, 2, 3)
    rows = [turn(BYTES, [Picture(pictures[0]), "what?"], ["red"]), turn(BYTES, ["a circle"], [Picture(pictures[1], True)]),
            document(BYTES, ["one", Picture(pictures[2]), "two", Picture(pictures[3], True, False), Picture(pictures[4], True), "three"]),
            [Words(list(b"hello"), True)]]
    batch = pack(rows, BYTES, 4, left=left)
    T, plain = batch.ids.shape[1], [laid_out(row, BYTES) for row in rows]
    starts = [T - len(row) if left else 0 for row in plain]
    assert T == max(map(len, plain))
    assert batch.mask.tolist() == [[start <= t < start + len(row) for t in range(T)] for start, row in zip(starts, plain)]
    wanted = [(b * T + start + p - 1, id) for b, (start, row) in enumerate(zip(starts, plain)) for p, (id, loss) in enumerate(row) if loss
              and p]
    assert list(zip(batch.text_from.tolist(), batch.text_target.tolist())) == wanted
    said = [bytes(id for place, id in wanted if place // T == b and id < 256) for b in range(4)]
    assert said == [b"red", b"", b"onetwothree", b"ello"]       # nothing stands before the h
    grid = batch.ids.flatten()
    assert torch.equal(grid[batch.text_from + 1], batch.text_target)
    assert torch.equal(batch.pictures, pictures) and batch.painted.tolist() == [False, True, False, True,
                                                                                True] and batch.learned.tolist() == [1, 4]
    for place, painted in zip(batch.at.tolist(), batch.painted.tolist()):
        assert grid[place - 1] == (GEN_START if painted else START) and grid[place + 4] == (GEN_END
            if painted else END) and not grid[place:place + 4].any()
        assert not set(range(place, place + 5)) & set((batch.text_from + 1).tolist())
    assert [place // T for place in batch.at.tolist()] == [0, 1, 2, 2, 2]
    for b, (start, row) in enumerate(zip(starts, plain)):
        assert batch.ids[b, start:start + len(row)].tolist() == [id or 0 for id, _ in row]
    none = pack([[Words([1, 2])]], BYTES, 4)
    assert len(none.pictures) == len(none.at) == len(none.learned) == len(none.text_from) == 0


def test_mllm_pack_refuses_what_does_not_fit():
    row = turn(BYTES, [Picture(random_codes(4, 2, 3)), "what?"], ["red"])
    length = len(laid_out(row, BYTES))
    assert pack([row], BYTES, 4, limit=length).ids.shape[1] == length
    with pytest.raises(ValueError, match=f"{length} tokens, expected at most {length - 1}"):
        pack([[Words([1])], row], BYTES, 4, limit=length - 1)
    with pytest.raises(ValueError, match="a picture of 4 positions, expected 5"):
        pack([row], BYTES, 5)


def test_mllm_chat_vocabularies_get_qwens_form():
    """In a tiny vocabulary, bytes with Qwen's marks, and in the real one where it is."""
    vocabulary, a = os.path.join(SHARED, "data/vocab/qwen"), random_codes(3, 2, 3)
    for text in (CHAT, *([TextTokenizer.from_folder(vocabulary)] if os.path.isdir(vocabulary) else [])):
        asked, painted = turn(text, [Picture(a), "what?"], ["red"]), turn(text, ["red"], [Picture(a, True)])
        assert spelled(asked,
                       text) == "<|im_start|>user\n<image_start>###<image_end>what?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
        assert spelled(asked, text, losses=True) == "red<|im_end|>" and spelled(painted, text, losses=True) == ""
        assert spelled(painted,
                       text) == "<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n<image_gen_start>###<image_gen_end><|im_end|>\n"
        assert spelled(turn(text, ["hi"]), text) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert spelled(document(text, ["one"]), text) == "<|endoftext|>one<|endoftext|>"


# ---------------------------------------------------------------------------------------------------------------------
# mllm: the loss

BOTH = ("pixel", "semantic")


def small_mllm(text=BYTES, llm=None, **more):
    """N 4, D 3, K 11, E 6; everything random, also the tables."""
    sizes = dict(positions=4, depth=3, codebook_size=11, code_dim=6, feature_width=10, head_width=16, head_layers=2, head_heads=2,
                 head_mlp=24)
    model = randomised(DualMLLM(MLLMConfig(llm=small_llm(**llm or {}), **{**sizes, **more}), text))
    model.tables.normal_()
    return model.eval()


def slow_head(head, state, codes, tables, eps=1e-6):
    """Logits of one stream at one position, depth by depth from scratch (Eq. 5): state (C,), codes (D,), a table (K, E) for each depth -> D
    x (K,)."""
    norm, width, logits = lambda x, weight: x / (x.square().mean() + eps).sqrt() * weight, len(head.norm.weight) // head.layers[0].heads, []
    for d in range(len(codes)):
        x = [head.projector(state)] + [head.code_in(sum(tables[j][codes[j]] for j in range(i))) for i in range(1, d + 1)]
        x = [a + head.depth[i] for i, a in enumerate(x)]
        for layer in head.layers:
            q, k, v = zip(*(layer.qkv(norm(a, layer.norm1.weight)).chunk(3) for a in x))
            for i in range(d, -1, -1):
                mixed = []
                for m in range(layer.heads):
                    part = slice(m * width, m * width + width)
                    p = torch.stack([q[i][part] @ k[j][part] / width ** 0.5 for j in range(i + 1)]).softmax(0)
                    mixed.append(sum(p[j] * v[j][part] for j in range(i + 1)))
                x[i] = x[i] + layer.proj(torch.cat(mixed))
                own = 0 if len(layer.down) == 1 else i
                gate, up = (norm(x[i], layer.norm2.weight) @ layer.gate_up[own]).chunk(2)
                x[i] = x[i] + (F.silu(gate) * up) @ layer.down[own]
        logits.append(norm(x[d], head.norm.weight) @ head.classifiers[d])
    return logits


def slow_embedding(model, s, codes):
    """What the LLM sees at a picture's position: codes (S, D), or features."""
    c, parts = model.config, []
    if c.continuous:
        return model.projector(codes)
    for stream in c.streams_in:
        i = c.streams.index(stream)
        vectors = [model.tables[i][d if c.tables > 1 else 0][codes[i, d]] for d in range(c.depth)]
        parts.append(sum(vectors) if not s.paint or stream in c.streams_out else torch.zeros(c.code_dim))
    return model.projector(torch.cat(parts))


def slow_losses(model, rows, deep=None):
    """Eq. 6-7 by loops over sequences, positions, streams and depths: sums of cross entropies by name. deep: the painted positions, counted
    over all rows, whose later depths are learned too; None: all."""
    c, total, count = model.config, {"text": torch.zeros(())}, 0
    total |= {f"{stream}_{d + 1}": torch.zeros(()) for stream in c.streams_out for d in range(c.depth)}
    for row in rows:
        x, said, painted = [], [], []
        for s in row:
            if isinstance(s, Words):
                said += [(len(x) + i, id) for i, id in enumerate(s.ids) if s.loss and len(x) + i]
                x += [model.llm.model.embed_tokens.weight[id] for id in s.ids]
            else:
                painted += [(len(x) + 1 + n, codes) for n, codes in enumerate(s.data)] if s.paint and s.loss else []
                x += [model.marks[2 * s.paint], *(slow_embedding(model, s, codes) for codes in s.data), model.marks[2 * s.paint + 1]]
        h = model.llm.hidden(torch.stack(x)[None])[0]
        for place, id in said:
            total["text"] = total["text"] - model.llm.head(h[place - 1]).log_softmax(0)[id]
        for place, codes in painted:
            count += 1
            for stream, head in model.heads.items():
                i = c.streams.index(stream)
                tables = [model.tables[i][d if c.tables > 1 else 0] for d in range(c.depth)]
                for d, logits in enumerate(slow_head(head, h[place - 1], codes[i], tables)):
                    if d and deep is not None and count - 1 not in deep:
                        continue
                    total[f"{stream}_{d + 1}"] = total[f"{stream}_{d + 1}"] - logits.log_softmax(0)[codes[i, d]]
    return total


def mixed_rows(text=BYTES):
    p = [Picture(codes) for codes in random_codes(6, 4, 2, 3)]
    paint = [picture._replace(paint=True) for picture in p]
    return [turn(text, [p[0], "what?"], ["red"]), turn(text, ["a red circle"], [paint[1]]), turn(text, [p[2], "make it blue"], [paint[3]]),
            document(text, ["one", p[0], "two", paint[4]._replace(loss=False), "three", paint[5]]), document(text, ["words alone"])]


@pytest.mark.parametrize("more", [dict(), dict(head_shared=True, tables=3, streams_out=("pixel",)),
                                  dict(tables=3, streams_in=("semantic",), llm=dict(tie_word_embeddings=False)),
                                  dict(streams_in=("pixel",), streams_out=("pixel",)),
                                  dict(head_shared=True, streams_out=("semantic",), tables=3)])
def test_mllm_loss_is_the_slow_one(more):
    model, rows = small_mllm(**more), mixed_rows()
    with torch.no_grad():
        expected, losses = slow_losses(model, rows), model(pack(rows, BYTES, 4))
        assert losses.keys() == expected.keys()
        for name in losses:
            torch.testing.assert_close(losses[name], expected[name], atol=1e-3, rtol=1e-5, msg=lambda words: f"{name}: {words}")
        batch = pack(rows, BYTES, 4, left=True)
        h = model.llm.hidden(model.embed(batch), batch.mask, Cache(model.config.llm, *batch.ids.shape, "cpu", torch.float32)).flatten(0, 1)
        text = F.cross_entropy(model.llm.head(h[batch.text_from]), batch.text_target, reduction="sum")
        torch.testing.assert_close(text, expected["text"], atol=1e-3, rtol=1e-5)


@torch.no_grad()
def test_mllm_later_depths_can_be_learned_at_a_share_of_positions():
    model, rows = small_mllm(tables=3), mixed_rows()
    draws = lambda seed: [random.Random(f"{seed} {b}") for b in range(len(rows))]
    batch = pack(rows, BYTES, 4, later=0.5, rngs=draws(0))
    assert [sum(n // 4 == picture for n in batch.all_depths.tolist()) for picture in range(3)] == [2, 2, 2]
    assert sorted(batch.all_depths.tolist() + batch.first_depth.tolist()) == list(range(12))
    expected, losses = slow_losses(model, rows, set(batch.all_depths.tolist())), model(batch)
    assert losses.keys() == expected.keys()
    for name in losses:
        torch.testing.assert_close(losses[name], expected[name], atol=1e-3, rtol=1e-5)
    drawn = [pack(rows, BYTES, 4, later=0.5, rngs=draws(seed)).all_depths for seed in range(200)]
    assert (torch.bincount(torch.cat(drawn), minlength=12) / 200 - 0.5).abs().max() < 0.15
    alone = [n + 4 * picture for picture, b in enumerate((1, 2, 3))
             for n in pack([rows[b]], BYTES, 4, later=0.5, rngs=[draws(0)[b]]).all_depths.tolist()]
    assert alone == batch.all_depths.tolist()         # so that micro-batches and ranks change nothing


@torch.no_grad()
def test_mllm_loss_of_continuous_features_is_the_slow_one():
    model, features = small_mllm(streams_in=("continuous",)), torch.randn(2, 4, 10)
    rows = [turn(BYTES, [Picture(features[0]), "what?", Picture(features[1])], ["red"]), document(BYTES, ["words alone"])]
    losses, expected = model(pack(rows, BYTES, 4)), slow_losses(model, rows)
    assert losses.keys() == expected.keys() == {"text"}
    torch.testing.assert_close(losses["text"], expected["text"], atol=1e-3, rtol=1e-5)


def test_mllm_loss_of_nothing_is_zero_with_gradients_for_all():
    """A batch of text, or of pictures without text: zero, not NaN, and every parameter takes part, as DDP wants."""
    model = small_mllm(llm=dict(tie_word_embeddings=False))
    for row, empty in ((document(BYTES, ["words"]), {f"{s}_{d}" for s in BOTH for d in (1, 2, 3)}),
                       (turn(BYTES, ["red"], [Picture(random_codes(4, 2, 3), True)]), {"text"})):
        model.zero_grad()
        losses = model(pack([row], BYTES, 4))
        sum(losses.values()).backward()
        assert {name for name, value in losses.items() if value == 0} == empty
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert any(p.grad.any() for p in model.heads.parameters()) == (len(empty) == 1)


def logits_of(head, h, vectors):
    """Of all depths at once, (D, M, K)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mllm, "linear_cross_entropy", lambda h, weight, target: F.linear(h, weight))
        return head(h, vectors, torch.zeros(vectors.shape[:2], dtype=torch.int64))


@torch.no_grad()
def test_mllm_depth_is_causal():
    """A code moves the logits of the depths after it, and of these alone; the last one moves none."""
    for shared in (True, False):
        head, h, vectors = small_mllm(head_shared=shared).heads["pixel"], torch.randn(5, 32), torch.randn(5, 3, 6)
        logits = logits_of(head, h, vectors)
        for d in range(3):
            changed = vectors.clone()
            changed[:, d] = torch.randn(5, 6)
            moved = (logits_of(head, h, changed) - logits).abs().amax((1, 2))
            assert (moved[:d + 1] < 1e-6).all() and (moved[d + 1:] > 1e-3).all()


@torch.no_grad()
def test_mllm_pictures_are_causal_over_positions():
    """Codes at a position leave the losses of the positions before it alone, and of itself at depth 1; they move those that follow."""
    model, codes = small_mllm(), random_codes(4, 2, 3)
    changed = codes.clone()
    changed[2] = (changed[2] + 1) % 11
    logits = [forced(model, ["red"], c[None]) for c in (codes, changed)]
    moved = (logits[0] - logits[1]).abs().amax(-1)[:, :, :, 0]       # (N, streams, D)
    assert (moved[:2] < 1e-6).all() and (moved[2, :, 0] < 1e-6).all() and (moved[2, :, 1:] > 1e-4).all() and (moved[3] > 1e-4).all()


# ---------------------------------------------------------------------------------------------------------------------
# mllm: generation

@torch.no_grad()
def forced(model, prompts, codes, given=None):
    """Teacher forcing over whole sequences, without a cache: prompts and codes (B, N, S, D) -> logits (N, painted streams, D, B, K)."""
    c = model.config
    rows = [turn(model.text, [*([] if given is None else [Picture(given[b])]), prompt], [Picture(codes[b], True)]) for b,
            prompt in enumerate(prompts)]
    batch = pack(rows, model.text, c.positions)
    places = batch.at[batch.painted][:, None] + torch.arange(c.positions) - 1                                # (B, N)
    h, logits = model.llm.hidden(model.embed(batch)).flatten(0, 1)[places.flatten()], []
    for stream, head in model.heads.items():
        s = c.streams.index(stream)
        logits.append(logits_of(head, h, model.vectors(codes[:, :, s].flatten(0, 1), s)).unflatten(1, places.shape))     # (D, B, N, K)
    return torch.stack(logits).permute(3, 0, 1, 2, 4)


def heard(monkeypatch):
    """What `choose` is asked to choose from, from now on."""
    seen, choose = [], mllm.choose
    monkeypatch.setattr(mllm, "choose", lambda logits, *a, **kw: seen.append(logits.clone()) or choose(logits, *a, **kw))
    return seen


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("edit", [False, True])
@pytest.mark.parametrize("more", [dict(), dict(head_shared=True, tables=3, streams_out=("pixel",))])
def test_mllm_painting_equals_teacher_forcing(monkeypatch, guidance, edit, more):
    """Logits that painting met, with its cache and prompts of unequal lengths, are those of the painted codes read back; guidance is u + s
    (c - u)."""
    model, prompts, seen = small_mllm(**more), ["red", "a blue square", ""], heard(monkeypatch)
    given = random_codes(3, 4, 2, 3, seed=5) if edit else None
    codes = model.paint(prompts, given, guidance=guidance)
    conditional, unconditional = forced(model, prompts, codes, given), forced(model, [""] * 3, codes, given)
    expected = unconditional + guidance * (conditional - unconditional)
    assert (conditional - unconditional)[..., :2, :].abs().max() > 0.05 and expected.std() > 0.2
    torch.testing.assert_close(torch.stack(seen).view(expected.shape), expected.float(), atol=1e-4, rtol=0)
    if "streams_out" in more:
        assert not codes[:, :, 1].any()
    assert codes.shape == (3, 4, 2, 3) and codes.dtype == torch.int64 and codes[:, :, 0].unique().numel() > 3


def test_mllm_generates_in_bf16():
    """Under autocast, cache included; the logits stay near those of fp32."""
    model, codes = small_mllm(), random_codes(1, 4, 2, 3)
    exact = forced(model, ["red"], codes)
    with torch.autocast("cpu", torch.bfloat16):
        near, painted = forced(model, ["red"], codes).float(), model.paint(["red", "blue"], guidance=2.0)
        assert len(model.answer(codes, ["what?"], longest=3)) == 1
    assert painted.shape == (2, 4, 2, 3) and painted.max() < 11
    assert not torch.equal(near, exact) and (near - exact).abs().mean() < 0.05 * exact.std()


@pytest.mark.parametrize("how", [dict(guidance=3.0, top_k=5, top_p=0.9), dict(guidance=1.0)])
def test_mllm_painting_never_waits_for_the_device(how):
    """The host looks at no number while it paints: on tensors that have none, it paints the same shapes."""
    model = small_mllm()
    with train_tokenizer.fake():
        copied = DualMLLM(model.config, model.text).eval()
        codes = copied.paint(["red", "blue"], **how)
    assert isinstance(codes, FakeTensor) and codes.shape == (2, 4, 2, 3)


def test_mllm_painting_by_default_is_guided_more_than_editing():
    model = small_mllm()
    given = random_codes(1, 4, 2, 3)
    for pictures, guidance, other in ((None, mllm.GUIDANCE, mllm.EDIT_GUIDANCE), (given, mllm.EDIT_GUIDANCE, mllm.GUIDANCE)):
        codes = model.paint(["red"], pictures)
        assert torch.equal(codes, model.paint(["red"], pictures, guidance))
        assert not torch.equal(codes, model.paint(["red"], pictures, other))


def test_mllm_painting_by_a_loaded_model_is_that_of_the_saved_one(monkeypatch, tmp_path):
    """The same bits: loaded weights are not parts of a mapped file, which need not be aligned, nor do gradients choose other products."""
    model, seen = small_mllm(head_width=64), heard(monkeypatch)
    model.save_pretrained(str(tmp_path))
    loaded = DualMLLM.from_pretrained(str(tmp_path)).requires_grad_(False)
    assert all(p.data_ptr() % 64 == 0 for p in loaded.state_dict().values())
    for one in (model, loaded):
        one.paint(["red", "a blue square"] * 9)
    assert len(seen) % 2 == 0 and all(map(torch.equal, seen[:len(seen) // 2], seen[len(seen) // 2:]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_mllm_painting_by_a_cuda_graph_changes_nothing():
    model = small_mllm().cuda()
    for seeds in ([0, 1], [5, 9]):
        assert torch.equal(model.paint(["red", "blue"], seeds=seeds), model.paint(["red", "blue"], seeds=seeds, graph=True))


@pytest.mark.parametrize("more", [dict(), dict(head_shared=True, tables=3)])
def test_mllm_painting_by_one_compiled_function_changes_nothing(monkeypatch, more):
    """A position has no graph breaks, and is traced once for all prompts of a length, seeds and guidances of one kind."""
    model, made = small_mllm(**more), []
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=lambda graph, _: made.append(1) or graph.forward,
                                                            fullgraph=True))
    for seeds, words in (([0, 1], "a blue one"), ([5, 9], "red and blue")):
        prompts = ["red", words]
        assert torch.equal(model.paint(prompts, seeds=seeds, graph=True), model.paint(prompts, seeds=seeds))
    assert len(made) == 1


@torch.no_grad()
def test_mllm_heads_sample_what_they_are_taught():
    """Depth by depth with a cache equals all depths at once, whatever is picked."""
    for more in (dict(), dict(head_shared=True, tables=3)):
        model, h, codes, seen = small_mllm(**more), torch.randn(6, 32), random_codes(6, 3), []
        head = model.heads["semantic"]
        got = head.sample(h, model.tables[1], lambda logits, d: seen.append(logits) or codes[:, d])
        assert torch.equal(got, codes)
        torch.testing.assert_close(torch.stack(seen), logits_of(head, h, model.vectors(codes, 1)), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_mllm_vectors_are_the_tables_rows():
    codes = random_codes(5, 4, 3)
    for tables in (1, 3):
        model = small_mllm(tables=tables)
        expected = torch.stack([torch.stack([model.tables[1][d if tables > 1 else 0][codes[i, j, d]] for d in range(3)]) for i in range(5)
                                for j in range(4)])
        assert torch.equal(model.vectors(codes, 1).flatten(0, 1), expected)


def test_mllm_seed_and_prompt_alone_decide_a_picture():
    model, prompts = small_mllm(), ["red", "a blue square above all the others", "red", "red"]
    for guidance in (1.0, 3.0):
        together = model.paint(prompts, guidance=guidance, seeds=[5, 6, 5, 7])
        assert torch.equal(together[0], together[2]) and not torch.equal(together[0], together[3])
        for b, seed in enumerate((5, 6, 5, 7)):
            assert torch.equal(model.paint([prompts[b]], guidance=guidance, seeds=[seed])[0], together[b])
    assert torch.equal(model.paint(["red"] * 2), model.paint(["red"] * 2, seeds=[0, 1]))
    assert torch.equal(model.paint(["red"], seeds=[0])[0], model.paint(["red"])[0])


def test_mllm_temperature_zero_is_the_likeliest(monkeypatch):
    model, seen = small_mllm(), heard(monkeypatch)
    codes = model.paint(["red", "blue"], temperature=0, seeds=[1, 2])
    assert torch.equal(torch.stack(seen).argmax(-1), codes.permute(1, 2, 3, 0).reshape(-1, 2))
    assert torch.equal(codes, model.paint(["red", "blue"], temperature=0, seeds=[3, 4]))
    assert torch.equal(codes, model.paint(["red", "blue"], top_k=1, seeds=[3, 4])) and torch.equal(codes,
        model.paint(["red", "blue"], top_p=1e-6, seeds=[3, 4]))


def test_mllm_choose_samples_what_it_should():
    """Frequencies over an even grid of noise, against top-k, then top-p, by a sort."""
    n = 5000
    logits, noise = torch.randn(9, generator=torch.Generator().manual_seed(3)) * 1.5, (torch.arange(n) + 0.5) / n
    for temperature in (0.5, 1.0, 2.0):
        for top_k in (0, 1, 4, 50):
            for top_p in (1.0, 0.8, 0.45, 0.01):
                order = sorted(range(9), key=lambda i: -logits[i])[:top_k or 9]
                weight = {i: math.exp(logits[i] / temperature) for i in order}
                share = {i: w / sum(weight.values()) for i, w in weight.items()}
                kept, mass = {}, 0.0
                for i in order:
                    if mass < top_p:
                        kept[i] = share[i]
                    mass += share[i]
                expected = torch.tensor([kept.get(i, 0.0) / sum(kept.values()) for i in range(9)])
                chosen = mllm.choose(logits.expand(n, 9), noise, temperature, top_k, top_p)
                counts = torch.bincount(chosen, minlength=9) / n
                assert set(chosen.tolist()) <= set(kept) and (counts - expected).abs().max() <= 1.5 / n, (temperature, top_k, top_p)
    torch.manual_seed(0)
    rows = torch.randn(300, 9) * 3
    assert torch.equal(mllm.choose(rows, torch.rand(300), temperature=0),
                       rows.argmax(1)) and torch.equal(mllm.choose(rows, torch.zeros(300)), rows.argmax(1))
    last = mllm.choose(rows, torch.full((300,), 1 - 2.0 ** -24), top_p=0.7)       # the largest noise never falls off the end
    likelier = torch.stack([row.softmax(0)[row > row[i]].sum() for row, i in zip(rows, last)])
    assert (likelier < 0.7 + 1e-6).all()
    each = torch.rand(300)
    assert torch.equal(mllm.choose(rows, each, top_p=0.9),
                       torch.cat([mllm.choose(rows[i:i + 1], each[i:i + 1], top_p=0.9) for i in range(300)]))


@torch.no_grad()
def test_mllm_answers_are_what_the_sequence_says():
    """Greedy answers, about pictures or without, in a batch or alone, are those of running the whole sequence again for every token."""
    model, pictures = small_mllm(llm=dict(tie_word_embeddings=False)), random_codes(3, 4, 2, 3)
    model.llm.lm_head.weight.mul_(3)
    questions = ["what?", "how many circles are there?", ""]
    for given in (pictures, None):
        answers = model.answer(given, questions, longest=8)
        for b, question in enumerate(questions):
            row, out = turn(BYTES, [*([] if given is None else [Picture(given[b])]), question]), []
            while len(out) < 8 and BYTES.end not in out:
                batch = pack([row + [Words(out)]], BYTES, 4)
                out.append(model.llm.head(model.llm.hidden(model.embed(batch))[0, -1])[:BYTES.end + 1].argmax().item())
            assert answers[b] == BYTES.decode(out[:out.index(BYTES.end)] if BYTES.end in out else out)
            assert model.answer(None if given is None else given[b:b + 1], [question], longest=8) == [answers[b]]
    assert model.answer(pictures, questions, longest=8) != model.answer(pictures.flip(0), questions, longest=8)


def test_mllm_answers_are_text_that_ends(monkeypatch):
    """Marks, special tokens and rows beyond the vocabulary are never written, whatever the logits; the end mark ends an answer; `longest`
    bounds it."""
    for text in (BYTES, CHAT):
        model, stop = small_mllm(text, llm=dict(vocab_size=290)), text.end if text.turn_end is None else text.turn_end
        scripts = [[104, 105, stop, 104], [stop], [104, text.marks["<image_end>"], 289, 105, 105]]

        def head(h):
            logits = torch.zeros(len(h), 290)
            logits[:, 256:], logits[:, 120], logits[:, stop] = 100.0, 90.0, -100.0         # all but text is likelier than x
            for row, script in zip(logits, scripts):
                row[script.pop(0) if script else 120] = 200.0
            return logits

        with monkeypatch.context() as patch:
            patch.setattr(model.llm, "head", head)
            assert model.answer(None, ["a", "b", "c"], longest=5) == ["hi", "", "hxxii"]
            assert model.answer(None, ["a", "b"], longest=3) == ["xxx"] * 2


def test_mllm_unpainted_streams_are_read_as_zeros():
    """What was read counts in all streams, what was painted in those that are painted: other semantic codes there change nothing."""
    model = small_mllm(streams_out=("pixel",))
    a, b = random_codes(2, 4, 2, 3)
    b = torch.stack([a[:, 0], b[:, 1]], 1)
    with torch.no_grad():
        for paint in (True, False):
            embedded = [model.embed(pack([[Words([256]), Picture(codes, paint)]], BYTES, 4)) for codes in (a, b)]
            assert torch.equal(*embedded) == paint
    assert not model.paint(["red"])[:, :, 1].any()


def test_mllm_streams_must_fit():
    for more in (dict(streams_in=("pixel",), streams_out=("semantic",)), dict(streams_in=()), dict(streams_in=("depth",)),
                 dict(streams_out=("depth",))):
        with pytest.raises(ValueError, match="streams"):
            MLLMConfig(**more)
    with pytest.raises(ValueError, match="paints nothing"):
        small_mllm(streams_in=("continuous",)).paint(["red"])
    model = small_mllm(streams_in=("continuous",))
    features = torch.randn(2, 4, 10)
    assert len(model.answer(features, ["what?", "why?"], longest=3)) == 2


def test_mllm_prompts_beyond_the_context_are_refused():
    """Exactly what fits with its picture or its answer is taken; one more is not."""
    model = small_mllm(llm=dict(max_position_embeddings=40))
    for call, room in ((lambda words: model.paint([words], guidance=1), 4 + 1), (lambda words: model.answer(None, [words], longest=6), 6)):
        call("x" * (40 - room - 1))         # the line break
        with pytest.raises(ValueError, match="expected at most"):
            call("x" * (40 - room))


def test_mllm_answers_that_fill_the_context_are_refused():
    """Room for as many tokens as the context has leaves none for the prompt."""
    model = small_mllm(llm=dict(max_position_embeddings=40))
    for longest in (40, 41):
        with pytest.raises(ValueError, match="expected at most"):
            model.answer(None, ["x"], longest=longest)


def test_mllm_score_is_the_logarithm_of_the_captions_probability(monkeypatch):
    model, pictures, captions = small_mllm(), random_codes(3, 4, 2, 3), ["red", "a blue square", "two"]
    expected = torch.stack([-slow_losses(model, [turn(BYTES, [Picture(p)], [c])])["text"] for p, c in zip(pictures, captions)])
    torch.testing.assert_close(model.score(pictures, captions), expected, atol=1e-3, rtol=1e-5)
    monkeypatch.setattr(mllm, "LOGITS", 3 * model.config.llm.vocab_size)        # three tokens at a time
    linear, sizes, words = F.linear, [], model.llm.classifier
    monkeypatch.setattr(mllm.F, "linear", lambda x, w, *b: (sizes.append(len(x)) if w is words else None, linear(x, w, *b))[1])
    torch.testing.assert_close(model.score(pictures, captions), expected, atol=1e-3, rtol=1e-5)
    assert max(sizes) == 3


def test_mllm_files_round_trip_and_raise(tmp_path):
    model = small_mllm(tables=3, head_shared=True, streams_out=("pixel",))
    model.save_pretrained(tmp_path / "a", stage="3")
    again = DualMLLM.from_pretrained(tmp_path / "a")
    assert again.config == model.config and equal(again.state_dict(), model.state_dict()) and not again.training
    assert torch.equal(again.paint(["red"]), model.paint(["red"])) and json.load(open(tmp_path / "a/config.json"))["stage"] == "3"
    weights = load_file(tmp_path / "a/model.safetensors")
    assert not any("lm_head" in name for name in weights) and "marks" in weights and "tables" in weights
    save_file({name: value for name, value in weights.items() if name != "marks"}, tmp_path / "a/model.safetensors")
    with pytest.raises(ValueError, match=r"missing marks \(4, 32\)"):
        DualMLLM.from_pretrained(tmp_path / "a")
    for change, words in (({"model_type": "qwen2"}, "expected 'dualmllm'"), ({"llm": 3}, "no sizes for a LLMConfig"),
                          ({"streams_in": ["depth"]}, "streams")):
        config = json.load(open(tmp_path / "a/config.json")) | change
        os.makedirs(tmp_path / "b", exist_ok=True)
        (tmp_path / "b/config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=words):
            DualMLLM.from_pretrained(tmp_path / "b")


def test_mllm_code_tables_tell_tokenizers_apart(tokenizer):
    tables, sha = code_tables(tokenizer)
    assert torch.equal(tables[0], tokenizer.quantizer_pix.codebook) and torch.equal(tables[1], tokenizer.quantizer_sem.codebook)
    other = copy.deepcopy(tokenizer)
    assert code_tables(other)[1] == sha
    other.quantizer_sem.codebook[0, 3, 4] += 1e-6
    assert code_tables(other)[1] != sha


# ---------------------------------------------------------------------------------------------------------------------
# data/hub

@pytest.fixture
def served(tmp_path, monkeypatch):
    """A hub on this machine -> its files {path: bytes}, to fill, and what was asked of it; b"cut" stands for a connection that breaks
    off, b"hang" for one that does in the middle of a chunk."""
    files, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            asked.append((self.command, self.path))
            data = files.get(self.path)
            status = data if isinstance(data, int) else 404 if data is None else 200
            self.send_response(status)
            if data == b"hang":
                self.send_header("Transfer-Encoding", "chunked")
            else:
                self.send_header("Content-Length", str(0 if status != 200 else 1000 if data == b"cut" else len(data)))
            self.end_headers()
            if self.command == "GET" and status == 200:
                self.wfile.write(b"9\r\nhang" if data == b"hang" else data)
        do_GET = do_HEAD = answer
        log_message = lambda *_: None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield files, asked
    server.shutdown()
    server.server_close()


def serve(files, name, folder):
    for file in os.listdir(folder):
        if os.path.isfile(os.path.join(folder, file)):
            files[f"/{name}/resolve/main/{file}"] = Path(folder, file).read_bytes()


def test_hub_fetches_a_model_once(served, tokenizer, tmp_path, monkeypatch):
    files, asked = served
    tokenizer.siglip_model.save_pretrained(tmp_path / "siglip")
    serve(files, "owner/siglip-1.0", tmp_path / "siglip")
    folder = hub.folder("owner/siglip-1.0")
    assert equal(SigLIP.from_pretrained(folder).state_dict(), tokenizer.siglip_model.state_dict())
    assert sorted(os.listdir(folder)) == [".lock", "config.json", "model.safetensors"]
    gets = [path for command, path in asked if command == "GET"]
    assert hub.folder("owner/siglip-1.0") == folder and [path for command, path in asked if command == "GET"] == gets
    monkeypatch.setenv("HF_ENDPOINT", os.environ["HF_ENDPOINT"] + "/")      # a system without locks, and an address that ends in a slash
    monkeypatch.setattr("fcntl.flock", failing(OSError(38, "Function not implemented")))
    serve(files, "owner/siglip-2", tmp_path / "siglip")
    assert os.path.exists(os.path.join(hub.folder("owner/siglip-2"), "model.safetensors"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")         # nobody listens: what is there does without a connection
    assert hub.folder("owner/siglip-1.0") == folder


def test_hub_fetches_shards_and_vocabulary(served, tokenizer, tmp_path):
    files, _ = served
    tokenizer.siglip_model.save_pretrained(tmp_path / "siglip")
    weights = load_file(tmp_path / "siglip/model.safetensors")
    parts = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(weights)}
    for part in {*parts.values()}:
        save_file({name: value for name, value in weights.items() if parts[name] == part}, tmp_path / "siglip" / part)
    (tmp_path / "siglip/model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    os.remove(tmp_path / "siglip/model.safetensors")
    serve(files, "owner/siglip", tmp_path / "siglip")
    assert equal(SigLIP.from_pretrained(hub.folder("owner/siglip")).state_dict(), weights)
    llm, folder = LLM(small_llm()), tmp_path / "llm"
    folder.mkdir()
    names = list(llm.state_dict())
    for n in range(2):
        save_file({name: llm.state_dict()[name] for name in names[n::2]}, folder / f"model-{n}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: f"model-{i % 2}.safetensors" for i,
                                                                                    name in enumerate(names)}}))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **vars(llm.config)}))
    (folder / "vocab.json").write_text("{}")
    serve(files, "owner/llm", folder)
    found = hub.folder("owner/llm")
    assert equal(LLM.from_pretrained(found).state_dict(), llm.state_dict()) and Path(found, "vocab.json").read_text() == "{}"
    files["/owner/other/resolve/main/config.json"] = b"{}"
    files["/owner/other/resolve/main/model.safetensors.index.json"] = b'{"weight_map": {"a": "../../x.safetensors"}}'
    with pytest.raises(ValueError, match="is no index of safetensors files"):
        hub.folder("owner/other")


def test_hub_breaks_off_with_a_sentence_and_leaves_no_half_file(served, monkeypatch):
    files, _ = served
    base = "/owner/model/resolve/main/"

    def words():
        with pytest.raises(ValueError) as caught:
            hub.folder("owner/model")
        left = os.path.join(torch.hub.get_dir(), "nanodualtoken/owner/model")
        assert "\n" not in str(caught.value) and sorted(os.listdir(left)) == sorted({".lock", *kept})
        return str(caught.value)

    kept = []
    assert "has no config.json; check the spelling" in words()
    files[base + "config.json"] = 401
    assert "answers 401" in words() and "check the spelling, or download it by hand" in words()      # what the hub says of no model
    files[base + "config.json"] = b"hang"
    assert "cannot be fetched" in words() and socket.getdefaulttimeout() is None
    files[base + "config.json"], kept = b"{}", ["config.json"]
    assert "has no weights as safetensors" in words()
    files[base + "model.safetensors"] = b"cut"
    assert "broke off after 3 of 1,000 bytes" in words()
    files[base + "model.safetensors"] = None
    files[base + "model.safetensors.index.json"] = b'{"weight_map": {"a": "a.safetensors"}}'
    kept += ["model.safetensors.index.json"]
    assert "lacks a.safetensors" in words()
    files[base + "a.safetensors"] = b"x"
    assert os.path.exists(os.path.join(hub.folder("owner/model"), "a.safetensors"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="no such folder is here, and .* cannot be fetched .*; without a connection, give a folder"):
        hub.folder("owner/else")


def test_hub_full_disk_is_none_of_the_connection(served, monkeypatch):
    files, _ = served
    files["/owner/model/resolve/main/config.json"] = b"{}"

    def full(url, path):
        Path(path).write_bytes(b"{")
        raise OSError(errno.ENOSPC, "No space left on device", path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        hub.folder("owner/model")
    assert os.listdir(os.path.join(torch.hub.get_dir(), "nanodualtoken/owner/model")) == [".lock"]


def test_hub_prefers_a_folder_and_hugging_faces_cache(served, tmp_path, monkeypatch):
    _, asked = served
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "hf/hub/models--owner--model"
    (model / "refs").mkdir(parents=True), (model / "snapshots/abc").mkdir(parents=True)
    (model / "refs/main").write_text("abc")
    for file in ("config.json", "model.safetensors"):
        with pytest.raises(ValueError, match="has no config.json"):      # not whole: the hub is asked
            hub.folder("owner/model")
        (model / "snapshots/abc" / file).write_text("{}")
    before = list(asked)
    assert hub.folder("owner/model") == str(model
                                            / "snapshots/abc") and hub.folder("some-model") == "some-model" and hub.folder("/a/b") == "/a/b"
    os.makedirs("owner/model")
    assert hub.folder("owner/model") == "owner/model" and asked == before


def test_hub_names_are_taken_by_the_scripts(served, run_folder, tmp_path):
    files, _ = served
    serve(files, "owner/siglip", run_folder / "siglip")
    train(tmp_path / "run", "--siglip", "owner/siglip")
    assert json.loads((tmp_path / "run/config.json").read_text())["teacher"] == "owner/siglip"      # which other machines know too
    os.makedirs(tmp_path / "run/siglip")        # of an earlier run in this folder
    assert train_tokenizer.teacher_of(str(tmp_path / "run")) == "owner/siglip"
    assert "broke off" in (files.update({"/owner/cut/resolve/main/config.json": b"cut"})
                           or stopped(*TINY, "--siglip", "owner/cut", "--out", str(tmp_path / "x")))
    assert "has no config.json" in mllm_words("--llm", "owner/none", "--tokenizer", str(run_folder), "--out", str(tmp_path / "y"))


# ---------------------------------------------------------------------------------------------------------------------
# train_mllm

TINY_MLLM = ["--device", "cpu", "--precision", "fp32", "--log-every", "1", "--save-every", "2", "--eval-images", "32", "--workers", "0"]
PARTS = ("llm", "projector", "heads")
MIXED = dict(caption=0.15, question=0.1, paint=0.2, edit=0.4, text=0.15)          # of three steps the last is one of edits
MIXED_ROW = train_mllm.Row("1", PARTS, 1e-3, 8, 3, MIXED)
TWO_ROWS = (train_mllm.Row("1", ("projector",), 1e-3, 4, 3, dict(caption=1.0)), train_mllm.Row("2", PARTS, 1e-3, 4, 5, MIXED))


def shrink(patch, *rows, evaluates=lambda stage: False):
    """These stages instead of nano's, on few scenes; evaluation only where asked."""
    evaluate = train_mllm.MLLMStage.evaluate
    patch.setitem(train_mllm.SCENES, "nano", 24)
    patch.setitem(train_mllm.STAGES, "nano", rows)
    patch.setattr(train_mllm.MLLMStage, "evaluate", lambda self: evaluate(self) if evaluates(self) else {})


def train_tiny(out, tokenizer_folder, *more):
    train_mllm.main([*TINY_MLLM, "--tokenizer", str(tokenizer_folder), "--out", str(out), *more])
    return out


def mllm_words(*argv):
    """The sentence that a run ends with."""
    with pytest.raises(SystemExit) as end:
        train_tokenizer.run(lambda: train_mllm.main([*TINY_MLLM, *argv]))
    assert isinstance(end.value.code, str) and end.value.code.startswith("error: ") and "\n" not in end.value.code
    return end.value.code


def losses_logged(out):
    return [{k: v for k, v in line.items() if k not in ("seconds", "sequences_per_second", "waiting")} for line in log(out)]


@pytest.fixture(scope="module")
def tokenizer_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder, data="plain")
    tokenizer.siglip_model.save_pretrained(folder / "siglip")
    return folder


@pytest.fixture(scope="module")
def mllm_stages(tokenizer_folder, tmp_path_factory):
    """All of nano's stages, two steps each, evaluated at the end -> the folder, and what was seen of each stage."""
    out, seen, train, take_step = tmp_path_factory.mktemp("mllm") / "run", [], train_mllm.train, train_tokenizer.take_step

    def watched(stage, batches):
        parts = [part for part, in next(iter(batches(0)))[0]]
        copies = lambda: {name: value.clone() for name, value in stage.model.state_dict().items()}
        with torch.no_grad():
            at_first = stage.model(parts[0])
        seen.append(dict(row=stage.row, stage=stage, kinds=stage.data.kinds_of(0), before=copies(), grads=set(), parts=parts,
                         at_first=at_first))
        train(stage, batches)
        names = {id(p): name for name, p in stage.model.named_parameters()}
        seen[-1] |= dict(after=copies(), states={names[id(p)] for optimizer in (stage.optimizer, stage.muon) for p in optimizer.state},
                         left=[n for n, p in stage.model.named_parameters() if p.grad is not None])

    def step(stage, lr):
        seen[-1]["grads"] |= {name for name, p in stage.model.named_parameters() if p.grad is not None}
        return take_step(stage, lr)

    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, *(replace(row, steps=2, batch=8) for row in train_mllm.NANO), evaluates=lambda stage: stage.folder == str(out))
        patch.setattr(train_mllm, "train", watched)
        patch.setattr(train_tokenizer, "take_step", step)
        train_tiny(out, tokenizer_folder)
    return out, seen


@pytest.mark.parametrize("kind", ["causal", "mask", "all"])
def test_mllm_attention_in_bf16_is_that_in_fp32(kind):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    mask = (torch.rand(2, 1, 9, 9) < 0.5) | torch.eye(9, dtype=torch.bool) if kind == "mask" else None
    bias = None if mask is None else torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    grouped = lambda bias, dtype: None if bias is None else bias.repeat(1, 1, 2, 1).to(dtype)
    exact = mllm.attend(q, k, v, grouped(bias, torch.float32), causal=kind == "causal")
    torch.testing.assert_close(exact, F.scaled_dot_product_attention(q, k, v, mask, is_causal=kind == "causal", enable_gqa=True))
    low = mllm.attend(q.bfloat16(), k, v, grouped(bias, torch.bfloat16), causal=kind == "causal")
    assert low.dtype == torch.bfloat16 and 0 < (low - exact).abs().max() < 0.05
    assert (mllm.attend(q, k, v) - exact).abs().max() > 0.5 or kind == "all"
    last = q.transpose(1, 2).contiguous().transpose(1, 2)[:, :, -1:]        # one position, laid out as the layers do
    row = None if bias is None else bias[:, :, -1:]
    for got, expected in ((mllm.attend(last, k, v, grouped(row, torch.float32)), exact),
                          (mllm.attend(last.bfloat16(), k, v, grouped(row, torch.bfloat16)), low)):
        torch.testing.assert_close(got, expected[:, :, -1:], atol=1e-5 if got.dtype == torch.float32 else 0.02, rtol=1e-4)


def test_train_mllm_trains_matrices_by_muon_and_the_rest_by_adamw(mllm_stages):
    stage = mllm_stages[1][-1]["stage"]
    names = {id(p): name for name, p in stage.model.named_parameters()}
    muon, adamw = ({names[id(p)] for group in optimizer.param_groups for p in group["params"]}
                   for optimizer in (stage.muon, stage.optimizer))
    assert not muon & adamw and muon | adamw == {*names.values()}
    assert {"llm.model.layers.0.mlp.up_proj.weight", "projector.0.weight", "heads.pixel.layers.0.gate_up"} <= muon
    assert {"llm.model.embed_tokens.weight", "llm.model.norm.weight", "marks", "heads.pixel.classifiers",
            "heads.pixel.projector.0.bias"} <= adamw


def test_train_mllm_stages_change_their_parts_alone(mllm_stages):
    """Bit for bit; what is frozen has neither gradient nor optimiser state."""
    _, seen = mllm_stages
    assert [record["row"].name for record in seen] == [row.name for row in train_mllm.NANO]
    for record, last in zip(seen, [None, *seen]):
        whose = {name: "projector" if name == "marks" else name.split(".")[0] for name in record["before"]}
        expected = {name for name in whose if whose[name] in record["row"].trains}
        assert {name for name in whose if not torch.equal(record["before"][name], record["after"][name])} == expected, record["row"].name
        assert record["states"] == record["grads"] == expected and record["left"] == []
        assert last is None or equal(last["after"], record["before"])
    assert {whose[name] for name in whose} == {*PARTS, "tables"}


def test_train_mllm_leaves_all_that_was_promised(mllm_stages, tokenizer_folder):
    out, seen = mllm_stages
    folders = [out / f"stage-{record['row'].name}" for record in seen[:-1]] + [out]
    assert sorted(os.listdir(out / "stage-4-1")) == ["config.json", "curves.png", "log.jsonl", "metrics.json", "model.safetensors",
                                                     "state.pt"]
    for folder, record in zip(folders, seen):
        for name in ("config.json", "curves.png", "log.jsonl", "metrics.json", "model.safetensors", "state.pt"):
            assert os.path.getsize(folder / name) > 0
        model = DualMLLM.from_pretrained(folder)
        assert equal(model.state_dict(),
                     record["after"]) and model.config.tables_sha256 == code_tables(DualTokenizer.from_pretrained(tokenizer_folder))[1]
        assert torch.equal(model.tables, code_tables(DualTokenizer.from_pretrained(tokenizer_folder))[0])
    metrics = json.load(open(out / "metrics.json"))
    expected = {"understanding", "caption_exact", "painting", "reader_accuracy", "fd", "preset", "design", "streams", "streams_in",
                "streams_out", "steps", "seed", "device",
                "seconds", "peak_memory_gib", "sequences_per_second", "torch", "commit"}
    assert expected <= metrics.keys() and os.path.getsize(out / "samples/painted.png") > 0
    assert set(metrics["understanding"]["all"]) == {"n", "right", "chance", "majority"}
    assert "all" in metrics["painting"] and {"all"} < set(metrics["editing"]) <= {"all", *shapes.EDITS}


def test_train_mllm_logs_means_over_the_batch_and_weighs_them(mllm_stages):
    """Text over its tokens, a stream's depths over painted positions; terms that the mixture lacks are not logged."""
    _, seen = mllm_stages
    for record in seen:
        line, kinds, (part,) = losses_logged(record["stage"].folder)[0], set(record["kinds"]), record["parts"]
        counts = [len(part.text_target), len(part.learned) * 64, len(part.all_depths)]
        means = {name: value.item() / max(1, counts[0 if name == "text" else 1 if name.endswith("_1") else 2]) for name,
                 value in record["at_first"].items()}
        weights = {name: train_mllm.LOSS[name.split("_")[0]] * (1.0 if name == "text" else train_mllm.DEPTHS["nano"][int(name[-1]) - 1])
                   for name in means}
        written = {name for name in means if kinds & ({"text", "caption", "question"} if name == "text" else {"paint", "edit"})}
        assert written == line.keys() & means.keys()
        assert all(abs(line[name] - means[name]) < 1e-5 * means[name] for name in written)
        assert abs(line["loss"] - sum(weights[name] * means[name] for name in means)) < 1e-5 * line["loss"]


def test_train_mllm_kinds_take_their_shares(mllm_stages, monkeypatch):
    """Of the steps for edits, which have steps of their own, and of every other batch for the rest; a step is a function of its number."""
    data, made = copy.copy(mllm_stages[1][-1]["stage"].data), []
    monkeypatch.setattr(data, "make", lambda kind, rng: made.append((kind, rng.random())) or [Words([1])])
    data.batches(replace(MIXED_ROW, batch=20, mixture=dict(caption=1.0, paint=2.0, unheard=5.0, edit=1.0, text=1.0)))
    for step in range(50):
        data[step]
    batches = [[kind for kind, _ in made[20 * step:20 * step + 20]] for step in range(50)]
    assert [batch.count("edit") for batch in batches].count(20) == 10
    assert all([batch.count(kind) for kind in ("caption", "paint", "text")] == [5, 10, 5] for batch in batches if "edit" not in batch)
    assert len({number for _, number in made}) == 1000
    again, made[:] = list(made), []
    data[7]
    assert made == again[140:160]


def test_train_mllm_sequences_say_what_is_true(mllm_stages):
    """Words, questions and edits belong to the scene whose codes stand beside them."""
    data, rng = mllm_stages[1][-1]["stage"].data, random.Random(0)
    scenes, edits = data.scenes, data.edits
    words = lambda segments, loss: bytes(id for s in segments if isinstance(s, Words) and s.loss == loss for id in s.ids
                                         if id < 256).decode().removesuffix("\n")
    pictures = lambda segments: [s for s in segments if isinstance(s, Picture)]
    index = lambda s: [i for i in range(len(data.pictures)) if np.array_equal(data.pictures[i], s.data.numpy())]
    for _ in range(40):
        for kind in ("caption", "question", "paint", "edit"):
            made = data.make(kind, rng)
            seen = [index(s) for s in pictures(made)]
            assert all(seen) and [s.paint for s in pictures(made)] == {"paint": [True], "edit": [False, True]}.get(kind, [False])
            if kind == "caption":
                assert words(made, False) == "" and any(words(made, True) in {c.text for c in shapes.claims(scenes[i])} for i in seen[0])
            if kind == "question":
                assert any((words(made, False), words(made, True)) in {(q, a) for _, q, a in shapes.questions(scenes[i])} for i in seen[0])
            if kind == "paint":
                assert words(made, True) == "" and (words(made, False) == ""
                    or any(words(made, False) in {c.text for c in shapes.claims(scenes[i])} for i in seen[0]))
            if kind == "edit":
                assert words(made, True) == "" and any(before in seen[0] and len(scenes) + e in seen[1]
                                                       and words(made, False) in ("", edit[1])
                                                       for e, (before, *edit) in enumerate(edits))
    text = words(data.make("text", rng), True)
    assert text.count("\n") == 2 and text.split("\n")[1].endswith("?")


def test_train_mllm_dropped_words_look_like_the_unconditional_prompt(monkeypatch):
    """A painted sample without its words begins exactly as what guidance steers away from, with or without a picture given."""
    model, codes, rows, pack_all = small_mllm(), random_codes(2, 4, 2, 3), [], mllm.pack
    monkeypatch.setattr(mllm, "pack", lambda sequences, *a, **kw: rows.extend(sequences) or pack_all(sequences, *a, **kw))
    fake = SimpleNamespace(text=BYTES, picture=lambda index, paint=False: Picture(codes[index], paint))
    for given in ([], [fake.picture(1)]):
        for drop, row in ((1.0, 1), (0.0, 0)):
            rows.clear()
            monkeypatch.setattr(train_mllm, "DROP", drop)
            made = laid_out(train_mllm.Sequences.painted(fake, 0, "red", random.Random(0), *given), BYTES)
            model.paint(["red"], codes[1:] if given else None, guidance=3.0)
            prompt = laid_out(rows[row], BYTES)
            assert len(rows) == 2 and made[:len(prompt)] == prompt and prompt[-1] == (GEN_START, False) and made[len(prompt)] == (None,
                False)
    monkeypatch.undo()
    dropped = [len(laid_out(train_mllm.Sequences.painted(fake, 0, "red", random.Random(n)), BYTES)) for n in range(1000)]
    assert abs(dropped.count(min(dropped)) / 1000 - train_mllm.DROP) < 0.03


def test_train_mllm_accumulation_is_the_whole_batch(tokenizer_folder, tmp_path, monkeypatch):
    shrink(monkeypatch, MIXED_ROW)
    runs = [train_tiny(tmp_path / n, tokenizer_folder, "--accumulate", n) for n in ("1", "4")]
    one, other = ((losses_logged(run), load_file(run / "model.safetensors")) for run in runs)
    assert len(one[0]) == 3 + 1 and {"text", "pixel_4", "semantic_1"} <= one[0][0].keys()
    for a, b in zip(one[0][:3], other[0][:3]):
        assert all(abs(a[name] - b[name]) < (1e-3 if name == "norm" else 1e-5) * abs(a[name]) for name in a)
    assert max((one[1][name] - other[1][name]).abs().mean().item() for name in one[1]) < 1e-5


EVERY_ROW = tuple(replace(row, steps=3, batch=8) for row in train_mllm.NANO)
SCRIPT = """import os, shutil, signal, train_mllm as t, train_tokenizer
Row, t.SCENES['nano'] = t.Row, 24
t.STAGES['nano'], t.LATER = %r, %r
write, train = train_tokenizer.write_log, t.train
def dies(stage, line, broken):
    write(stage, line, broken)
    if (os.environ.get('DIES') == f"{stage.name} {line['step']}" and os.environ['RANK'] == '1'
            and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'):
        shutil.copytree(stage.args.out, f'{stage.args.out}-died')
        os.kill(os.getpid(), signal.SIGKILL)
def told(stage, batches):
    train(stage, batches)
    with open(f"{os.path.dirname(__file__)}/digest-{os.environ['RANK']}", 'a') as file:
        file.write(stage.name + ' ' + t.digest(stage.model) + '\\n')
train_tokenizer.write_log, t.train = dies, told
t.run(t.main)
"""


def run_ranks(folder, tokenizer_folder, ranks, *flags, restarts=0, dies="", rows=EVERY_ROW, later=train_mllm.LATER):
    """torchrun over so many gloo processes, all stages -> exit status, what was printed, and errors."""
    os.makedirs(folder, exist_ok=True)
    (Path(folder) / "script.py").write_text(SCRIPT % (rows, later))
    torchrun = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                                 f"--max-restarts={restarts}", f"{folder}/script.py",
                                 *TINY_MLLM, "--eval-images", "16", "--tokenizer", str(tokenizer_folder), "--out", f"{folder}/run", *flags],
                                 cwd=HERE, start_new_session=True,
                                env={**os.environ, "PYTHONPATH": HERE, "OMP_NUM_THREADS": "1", "DIES": dies,
                                     "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        printed, errors = torchrun.communicate(timeout=240)
        return torchrun.returncode, printed, errors
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(torchrun.pid, signal.SIGKILL)     # the ranks too, which would wait for each other for ever


@pytest.fixture(scope="module")
def one_process(tokenizer_folder, tmp_path_factory):
    """Every stage, three steps each, in one process, evaluated at the end."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, *EVERY_ROW, evaluates=lambda stage: stage.row.name == "4-2")
        return train_tiny(tmp_path_factory.mktemp("one") / "run", tokenizer_folder, "--eval-images", "16")


def assert_same_training(one, other):
    """Weights, losses and what was counted, in every stage, to the rounding of sums in another order."""
    for row in EVERY_ROW:
        a, b = (run / (f"stage-{row.name}" if row.name != "4-2" else ".") for run in (one, other))
        weights = [load_file(folder / "model.safetensors") for folder in (a, b)]
        assert weights[0].keys() == weights[1].keys() and max((weights[0][name] - weights[1][name]).abs().mean().item()
                                                              for name in weights[0]) < 1e-5
        lines = [[line for line in losses_logged(folder) if "loss" in line] for folder in (a, b)]
        assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]] == [1, 2, 3]
        assert all(abs(x[name] - y[name]) < (1e-3 if name == "norm" else 1e-5) * abs(x[name]) for x, y in zip(*lines) for name in x)
    metrics = [json.load(open(run / "metrics.json")) for run in (one, other)]
    asked = [{kind: [row[k] for k in ("n", "chance", "majority")] for kind, row in m["understanding"].items()} for m in metrics]
    assert asked[0].keys() == asked[1].keys() and all(asked[0][kind] == pytest.approx(asked[1][kind])
                                                      for kind in asked[0]) and asked[0]["all"][0] == 16
    assert metrics[0]["reader_accuracy_by_skill"] == metrics[1]["reader_accuracy_by_skill"]
    assert os.listdir(one / "codes") == os.listdir(other / "codes")
    assert np.array_equal(*(np.load(glob.glob(str(run / "codes/*/pictures.npy"))[0]) for run in (one, other)))


def assert_equal_ranks(one_process, folder, ranks):
    """Weights equal on all ranks after every stage, and a checkpoint as one process writes it."""
    digests = {(folder / f"digest-{rank}").read_text() for rank in range(ranks)}
    assert len(digests) == 1 and digests.pop().count("\n") == len(EVERY_ROW)
    assert json.load(open(folder / "run/metrics.json"))["ranks"] == ranks
    state = torch.load(folder / "run/state.pt", weights_only=True)
    alone = torch.load(one_process / "state.pt", weights_only=True)
    assert state.keys() == alone.keys() and state["optimizer"]["state"].keys() == alone["optimizer"]["state"].keys()


@pytest.mark.parametrize("ranks, flags", [(2, []), pytest.param(4, ["--fsdp"], marks=[is_slow, is_skipped])])
def test_train_mllm_several_ranks_are_one_process(one_process, tokenizer_folder, tmp_path, ranks, flags):
    """Every stage, the weights copied (DDP) or shared (FSDP)."""
    status, _, errors = run_ranks(tmp_path, tokenizer_folder, ranks, *flags)
    assert status == 0, errors
    assert_same_training(one_process, tmp_path / "run")
    assert_equal_ranks(one_process, tmp_path, ranks)


def test_train_mllm_shares_weights_where_one_rank_paints_and_the_other_does_not(tokenizer_folder, tmp_path, monkeypatch):
    """Every forward pass gathers the same weights in the same order on all ranks."""
    rows = (train_mllm.Row("4-2", PARTS, 1e-3, 2, 3, dict(caption=0.5, paint=0.5)),)
    status, _, errors = run_ranks(tmp_path, tokenizer_folder, 2, "--fsdp", rows=rows, later={})
    assert status == 0, errors
    shrink(monkeypatch, *rows)
    monkeypatch.setattr(train_mllm, "LATER", {})
    train_tiny(tmp_path / "one", tokenizer_folder)
    one, two = ([line["loss"] for line in log(tmp_path / name) if "loss" in line] for name in ("one", "run"))
    assert len(one) == 3 and one == pytest.approx(two, rel=1e-5)


def test_train_mllm_a_killed_rank_comes_back(one_process, tokenizer_folder, tmp_path, monkeypatch, capsys):
    """Two share the weights; torchrun starts them again, and they go on from the last checkpoint; or one process, of what they left."""
    flags = ["--accumulate", "2", "--checkpointing", "--resume"]
    # As many restarts as the README has: a rank that crashes unasked (seen once, its heap damaged) is one more death to come back from.
    status, printed, errors = run_ranks(tmp_path, tokenizer_folder, 2, "--fsdp", *flags, restarts=3, dies="stage-4-1 3")
    assert status == 0 and "stage-4-1: resumed at step 2 of 3" in printed, printed + errors
    if errors.count("failed (exitcode") > 1:
        warnings.warn(f"a rank died that nobody killed: {errors}", stacklevel=1)
    assert_equal_ranks(one_process, tmp_path, 2)
    shrink(monkeypatch, *EVERY_ROW, evaluates=lambda stage: stage.row.name == "4-2")
    capsys.readouterr()
    train_tiny(tmp_path / "run-died", tokenizer_folder, "--eval-images", "16", *flags)
    said = capsys.readouterr().out
    assert "stage-4-1: resumed at step 2 of 3" in said and said.count("is kept") == 4
    for folder in ("run", "run-died"):
        assert_same_training(one_process, tmp_path / folder)


@pytest.fixture(scope="module")
def two_stages(tokenizer_folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, *TWO_ROWS)
        return train_tiny(tmp_path_factory.mktemp("two_stages") / "run", tokenizer_folder)


@pytest.mark.parametrize("stage, dies_at", [("stage-1", 3), ("stage-2", 3), ("stage-2", 4)])
def test_train_mllm_interrupted_and_resumed_is_uninterrupted(two_stages, tokenizer_folder, tmp_path, monkeypatch, capsys, stage, dies_at):
    """Bit for bit, optimiser and log included; a finished stage is kept."""
    shrink(monkeypatch, *TWO_ROWS)
    with dying(monkeypatch, stage, dies_at):
        train_tiny(tmp_path, tokenizer_folder)
    capsys.readouterr()
    train_tiny(tmp_path, tokenizer_folder, "--resume")
    said = capsys.readouterr().out
    assert ("stage 1:" in said and "is kept" in said) == (stage == "stage-2") and f"{stage}: resumed at step 2" in said
    for folder in ("stage-1", "."):
        assert equal(load_file(two_stages / folder / "model.safetensors"), load_file(tmp_path / folder / "model.safetensors"))
        assert losses_logged(two_stages / folder) == losses_logged(tmp_path / folder)
        states = [torch.load(run / folder / "state.pt", weights_only=True)["optimizer"]["state"] for run in (two_stages, tmp_path)]
        assert states[0].keys() == states[1].keys() and all(equal(states[0][key], states[1][key]) for key in states[0]) and states[0]


def test_train_mllm_resume_keeps_what_is_finished(two_stages, tokenizer_folder, tmp_path, monkeypatch, capsys):
    shrink(monkeypatch, *TWO_ROWS)
    shutil.copytree(two_stages, tmp_path / "run")
    monkeypatch.setattr(train_mllm, "train", lambda *a: pytest.fail("trained again"))
    train_tiny(tmp_path / "run", tokenizer_folder, "--resume")
    assert capsys.readouterr().out.count("is kept") == 2
    monkeypatch.undo()
    shrink(monkeypatch, *TWO_ROWS)
    assert "seed 0 -> 1" in mllm_words("--resume", "--seed", "1", "--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "run"))


def test_train_mllm_one_stage_starts_from_the_one_before(two_stages, tokenizer_folder, tmp_path, monkeypatch):
    shrink(monkeypatch, *TWO_ROWS)
    for name in ("stage-1", "codes"):
        shutil.copytree(two_stages / name, tmp_path / name)
    train_tiny(tmp_path, tokenizer_folder, "--stage", "2")
    assert equal(load_file(two_stages / "model.safetensors"),
                 load_file(tmp_path / "model.safetensors")) and losses_logged(two_stages) == losses_logged(tmp_path)
    train_tiny(tmp_path, tokenizer_folder, "--stage", "2", "--steps", "1", "--batch-size", "2", "--lr", "0.25")
    line, *_ = losses_logged(tmp_path)
    assert json.load(open(tmp_path / "metrics.json"))["settings"]["row"] | dict(mixture=0) == vars(TWO_ROWS[1]) | dict(trains=list(PARTS),
        steps=1, batch=2, lr=0.25, mixture=0)
    assert line["step"] == 1 and line["lr"] == 0.25
    os.remove(tmp_path / "stage-1/metrics.json")
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert "stage 1 is not finished" in mllm_words("--stage", "2", "--tokenizer", str(tokenizer_folder), "--out", str(folder))
    assert not os.path.exists(tmp_path / "nowhere/model.safetensors")


def test_train_mllm_one_stage_needs_the_data_of_that_stage_alone(tokenizer_folder, captioned, tmp_path, monkeypatch):
    """A stage of captions runs on captioned images, though the stage of text before it could not."""
    shrink(monkeypatch, train_mllm.Row("0", ("llm",), 1e-3, 4, 1, dict(text=1.0)), replace(TWO_ROWS[0], steps=1))
    train_tiny(tmp_path, tokenizer_folder, "--stage", "0")
    train_tiny(tmp_path, tokenizer_folder, "--stage", "1", "--data", str(captioned / "train"))
    assert os.path.exists(tmp_path / "metrics.json")


def test_train_mllm_one_stage_refuses_another_design(two_stages, tokenizer, tokenizer_folder, tmp_path, monkeypatch):
    shrink(monkeypatch, *TWO_ROWS)
    shutil.copytree(two_stages / "stage-1", tmp_path / "run/stage-1")
    there = ["--stage", "2", "--out", str(tmp_path / "run")]
    assert "streams_out" in mllm_words(*there, "--tokenizer", str(tokenizer_folder), "--streams-out", "pixel")
    other = copy.deepcopy(tokenizer)
    other.quantizer_pix.codebook[0, 0, 0] += 1
    other.save_pretrained(tmp_path / "other", data="plain")
    assert "another tokenizer" in mllm_words(*there, "--tokenizer", str(tmp_path / "other"))


def test_train_mllm_codes_are_kept_by_what_made_them(tokenizer, tokenizer_folder, tmp_path, monkeypatch):
    """Once for one tokenizer and one data; anew for others, in a folder of their own; kept ones are what encoding gives."""
    shrink(monkeypatch, replace(TWO_ROWS[0], steps=1, batch=2))
    calls, encode, train, known, data = [], DualTokenizer.encode, train_mllm.train, set(), []
    monkeypatch.setattr(train_mllm, "train", lambda stage, batches: data.append(stage.data) or train(stage, batches))
    monkeypatch.setattr(DualTokenizer, "encode", lambda self, images: calls.append(len(images)) or encode(self, images))
    other = copy.deepcopy(tokenizer)
    other.quantizer_sem.codebook.mul_(1.5)
    other.save_pretrained(tmp_path / "other", data="plain")
    for folder, more, new in ((tokenizer_folder, [], True), (tokenizer_folder, [], False), (tmp_path / "other", [], True),
                              (tokenizer_folder, ["--data", "textured"], True),
                              (tokenizer_folder, ["--seed", "1"], True), (tmp_path / "other", [], False),
                              (tokenizer_folder, ["--streams-in", "pixel"], False)):
        calls.clear()
        train_tiny(tmp_path / "run", folder, *more)
        made = set(os.listdir(tmp_path / "run/codes")) - known
        assert bool(calls) == new and len(made) == new, (folder, more)
        if new:
            key, = made
            known.add(key)
            codes = train_mllm.to_tensor(np.load(tmp_path / "run/codes" / key / "pictures.npy"))
            drawn = data[-1].scenes + [after for *_, after in data[-1].edits]
            fresh = encode(DualTokenizer.from_pretrained(folder), shapes.render(shapes.pack(drawn), 32))
            assert codes.dtype == torch.int64 and len(codes) == len(drawn) > 24 and (codes == fresh).float().mean() > 0.999
    train_tiny(tmp_path / "again", tokenizer_folder)
    for path in glob.glob(str(tmp_path / "again/codes/*/pictures.npy")):
        assert np.array_equal(np.load(path), np.load(path.replace("again", "run")))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Twelve captioned images, one of them broken, and six to evaluate on."""
    folder = tmp_path_factory.mktemp("images")
    images, captions = World("plain", 32, seed=3).batch(range(18))
    for n, (image, caption) in enumerate(zip(images, captions)):
        path = folder / ("train" if n < 12 else "val") / f"{n}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(((image.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()).save(path)
        path.with_suffix(".txt").write_text(f"{caption}, {n}")
    (folder / "train/7.png").write_bytes(b"broken")
    return folder


def test_train_mllm_on_a_folder_of_images(captioned, tokenizer_folder, tmp_path, monkeypatch, capsys):
    """Kinds that such data lacks are left out; a broken file is named and replaced, caption and all; captions are retrieved, pictures
    painted."""
    shrink(monkeypatch, TWO_ROWS[0], replace(TWO_ROWS[1], batch=8), evaluates=lambda stage: stage.name == "stage-2")
    (tmp_path / "words.txt").write_text("some words to learn. " * 40)
    train, seen = train_mllm.train, []
    monkeypatch.setattr(train_mllm, "train", lambda stage, batches: seen.append(stage.data) or train(stage, batches))
    train_tiny(tmp_path / "run", tokenizer_folder, "--data", str(captioned / "train"), "--val-data", str(captioned / "val"), "--text-data",
               str(tmp_path / "words.txt"),
               "--text-length", "80")
    out, metrics = capsys.readouterr().out, json.load(open(tmp_path / "run/metrics.json"))
    assert "7.png" in out and "7.png: cannot be read" in out
    assert 0 <= metrics["caption_retrieval"] <= 1 and "understanding" not in metrics and "painting" not in metrics
    assert os.path.getsize(tmp_path / "run/samples/painted.png") > 0
    assert {"text", "pixel_1"} <= losses_logged(tmp_path / "run")[0].keys()
    tokenizer, folders = DualTokenizer.from_pretrained(tokenizer_folder), glob.glob(str(tmp_path / "run/codes/*/"))
    said = {len(captions): (captions, folder) for folder in folders for captions in [[*train_mllm.Texts(folder)]]}
    captions, folder = said[12]
    numbers = [int(caption.split(", ")[1]) for caption in captions]
    assert set(numbers) == set(range(12)) - {7} and len(folders) == 2
    images = sample.read_images([str(captioned / f"train/{n}.png") for n in numbers], 32)
    assert (train_mllm.to_tensor(np.load(os.path.join(folder, "pictures.npy"))) == tokenizer.encode(images)).float().mean() > 0.999
    for n in range(20):
        for kind in ("caption", "paint"):
            made = seen[0].make(kind, random.Random(n))
            picture, = (s.data for s in made if isinstance(s, Picture))
            said = BYTES.decode(sum((s.ids for s in made if isinstance(s, Words)), [])).strip()
            assert said == "" if kind == "paint" and not said else any(said == caption and np.array_equal(codes, picture.numpy()) for codes,
                                                                       caption in zip(seen[0].pictures, captions))


@pytest.mark.parametrize("stops_at", [0, 1, 2, 3, 5])
def test_train_mllm_stopped_extraction_goes_on(captioned, tokenizer_folder, tmp_path, monkeypatch, stops_at):
    """Pictures and captions as if it had not stopped, and nothing encoded twice."""
    shrink(monkeypatch, replace(TWO_ROWS[0], steps=1, batch=2))
    monkeypatch.setattr(train_mllm, "CHUNK", 4)         # six to evaluate on: 4, 2; then twelve: 4, 4, 4
    flags, encode, calls = ["--data", str(captioned / "train"), "--val-data", str(captioned / "val")], DualTokenizer.encode, []

    def stops(self, images):
        calls.append(len(images))
        if len(calls) == stops_at + 1:
            raise KeyboardInterrupt
        return encode(self, images)
    with monkeypatch.context() as patch:
        patch.setattr(DualTokenizer, "encode", stops)
        with contextlib.suppress(KeyboardInterrupt):
            train_tiny(tmp_path / "stopped", tokenizer_folder, *flags)
    assert len(calls) == stops_at + 1 if stops_at < 5 else calls == [4, 2, 4, 4, 4]
    if stops_at == 3:       # killed while it wrote a caption: what follows the last whole chunk does not count
        part, = glob.glob(str(tmp_path / "stopped/codes/*.tmp/said.jsonl"))
        with open(part, "a") as file:
            file.write('"a caption of the chunk that was being written"\n"half a cap')
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(DualTokenizer, "encode", lambda self, images: calls.append(len(images)) or encode(self, images))
        train_tiny(tmp_path / "stopped", tokenizer_folder, *flags)
    assert calls == [4, 2, 4, 4, 4][stops_at:]
    train_tiny(tmp_path / "whole", tokenizer_folder, *flags)
    for folder in map(Path, glob.glob(str(tmp_path / "whole/codes/*"))):
        twin = tmp_path / "stopped/codes" / folder.name
        assert sorted(os.listdir(folder)) == sorted(os.listdir(twin)) == ["key.json", "pictures.npy", "said.jsonl", "said.npy"]
        assert np.array_equal(*(np.load(f / "pictures.npy") for f in (folder, twin)))
        assert [*train_mllm.Texts(folder)] == [*pickle.loads(pickle.dumps(train_mllm.Texts(twin)))]


def test_train_mllm_caption_retrieval_counts_pictures(monkeypatch):
    """The likeliest caption for each picture, among those of a group, a short one included; chance is one in its size."""
    captions = ["a", "b", "c", "d", "e", "f"]
    liked = torch.eye(6) + torch.tensor([9.0, 0, 0, 0, 0, 0])       # one caption is likely with any picture: it does not count
    model = SimpleNamespace(score=lambda pictures, words: torch.stack([liked[int(p), captions.index(w)] for p, w in zip(pictures, words)]))
    data, ranks = SimpleNamespace(val=np.arange(6, dtype=np.uint16), val_captions=captions), train_tokenizer.Ranks("cpu")
    assert train_mllm.caption_retrieval(model, data, ranks, 6)["caption_retrieval"] == 1.0
    liked = liked[[0, 1, 2, 4, 3, 5]]
    found = train_mllm.caption_retrieval(model, data, ranks, 6)
    assert found["caption_retrieval"] == pytest.approx(4 / 6)
    assert found["caption_retrieval_chance"] == pytest.approx(1 / 6)


def test_train_mllm_changed_images_are_encoded_again(captioned, tokenizer_folder, tmp_path, monkeypatch):
    """Another picture or caption under an old name is other data."""
    shrink(monkeypatch, replace(TWO_ROWS[0], steps=1, batch=2))
    shutil.copytree(captioned / "train", tmp_path / "images")
    flags = ["--data", str(tmp_path / "images"), "--val-data", str(captioned / "val")]
    kept, known = lambda: set(os.listdir(tmp_path / "run/codes")), set()
    for change in (lambda: None, lambda: shutil.copy(captioned / "train/1.png", tmp_path / "images/2.png"),
                   lambda: (tmp_path / "images/2.txt").write_text("other words")):
        change()
        train_tiny(tmp_path / "run", tokenizer_folder, *flags)
        assert kept() - known, "the old codes and captions were used"
        known = kept()


def test_train_mllm_held_out_images_may_have_no_captions(captioned, tokenizer_folder, tmp_path, monkeypatch):
    shrink(monkeypatch, replace(MIXED_ROW, steps=1), evaluates=lambda stage: True)
    (tmp_path / "images").mkdir()
    for path in glob.glob(str(captioned / "val/*.png")):
        shutil.copy(path, tmp_path / "images")
    train_tiny(tmp_path / "run", tokenizer_folder, "--data", str(captioned / "train"), "--val-data", str(tmp_path / "images"))
    assert os.path.exists(tmp_path / "run/metrics.json")


def test_train_mllm_text_data_is_read_in_pieces(tokenizer_folder, tmp_path, monkeypatch):
    shrink(monkeypatch, train_mllm.Row("0", ("llm",), 1e-3, 4, 2, dict(text=1.0)))
    words = "".join(chr(97 + n % 26) + str(n) for n in range(300))
    (tmp_path / "words.txt").write_text(words)
    rows, pack_all = [], train_mllm.pack
    monkeypatch.setattr(train_mllm, "pack", lambda sequences, *a, **kw: rows.extend(sequences) or pack_all(sequences, *a, **kw))
    flags = ["--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "run"), "--text-data"]
    train_tiny(tmp_path / "run", tokenizer_folder, "--text-data", str(tmp_path / "words.txt"), "--text-length", "40")
    pieces = [BYTES.decode(sum((s.ids for s in row), [])) for row in rows]
    assert len(pieces) == 8 and all(len(piece) == 40 and piece in words for piece in pieces) and len(set(pieces)) > 4
    assert "cannot be read" in mllm_words(*flags, str(tmp_path / "gone.txt"))
    (tmp_path / "few.txt").write_text("few words")
    assert "expected more than --text-length 40" in mllm_words(*flags, str(tmp_path / "few.txt"), "--text-length", "40")
    assert "context" in mllm_words(*flags, str(tmp_path / "words.txt"), "--text-length", "5000")


@pytest.mark.parametrize("flags", [["--streams-in", "continuous"], ["--streams-in", "pixel", "--streams-out", "pixel"],
                                   ["--streams-out", "pixel"], ["--streams-in", "semantic"]])
def test_train_mllm_streams(tokenizer_folder, tmp_path, monkeypatch, flags):
    rows = (TWO_ROWS[0], train_mllm.Row("3", ("heads",), 1e-3, 4, 2, dict(paint=1.0)), train_mllm.Row("4-1", PARTS, 1e-3, 8, 2, MIXED))
    shrink(monkeypatch, *(replace(row, steps=1) for row in rows))
    train_tiny(tmp_path, tokenizer_folder, *flags)
    model, painted = DualMLLM.from_pretrained(tmp_path), "pixel" in flags or "semantic" in flags
    assert list(model.config.streams_in) == (flags[1].split(",") if flags[0] == "--streams-in" else ["pixel", "semantic"])
    assert set(model.heads) == {"pixel", "semantic"} - ({"semantic"} if flags[-1] == "pixel" else set()
                                                        if painted else {"pixel", "semantic"})
    assert os.path.exists(tmp_path / "stage-3") == painted and ("pixel_1" in losses_logged(tmp_path)[0]) == painted


def test_train_mllm_takes_a_folder_of_qwen(tokenizer_folder, tmp_path, monkeypatch):
    """Its weights and vocabulary; no stage 0; saved beside the model."""
    vocabulary = os.path.join(SHARED, "data/vocab/qwen")
    if not os.path.isdir(vocabulary):
        pytest.skip("no vocabulary of Qwen2.5: set NANODUALTOKEN_SHARED")
    llm = randomised(LLM(small_llm(max_position_embeddings=600, vocab_size=151936, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
                                   num_attention_heads=2, num_key_value_heads=1)))
    shutil.copytree(vocabulary, tmp_path / "llm")
    save_file(llm.state_dict(), tmp_path / "llm/model.safetensors")
    (tmp_path / "llm/config.json").write_text(json.dumps({"model_type": "qwen2", **vars(llm.config)}))
    shrink(monkeypatch, replace(train_mllm.NANO[0], steps=1, batch=2), replace(TWO_ROWS[0], steps=1))
    train_tiny(tmp_path / "run", tokenizer_folder, "--llm", str(tmp_path / "llm"))
    model = DualMLLM.from_pretrained(tmp_path / "run")
    assert not os.path.exists(tmp_path / "run/stage-0") and equal(model.llm.state_dict(),
                                                                  llm.state_dict()) and model.text.turn_start == 151644
    assert spelled(turn(model.text, [Picture(torch.zeros(1, 2, 4)), "what is it?"], ["a cat"]), model.text) == (
        "<|im_start|>user\n<image_start>#<image_end>what is it?<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n")
    assert all(isinstance(answer, str) for answer in model.answer(torch.zeros(1, 64, 2, 4, dtype=torch.int64), ["what is it?"], longest=3))


def test_train_mllm_takes_a_folder_of_smollm(smollm, tokenizer_folder, tmp_path, monkeypatch, capsys):
    """Llama's weights and a vocabulary without a spare row, whose special tokens come first."""
    folder, other, known = smollm
    monkeypatch.setattr(mllm, "KNOWN", KNOWN | known)
    shutil.copytree(folder, tmp_path / "llm")
    llm = randomised(LLM(small_llm(max_position_embeddings=600, vocab_size=other.get_vocab_size(), num_hidden_layers=1,
                                   attention_bias=False)))
    save_file(llm.state_dict(), tmp_path / "llm/model.safetensors")
    (tmp_path / "llm/config.json").write_text(json.dumps({"model_type": "llama", **vars(llm.config)}))
    shrink(monkeypatch, replace(TWO_ROWS[1], steps=2))
    train_tiny(tmp_path / "run", tokenizer_folder, "--llm", str(tmp_path / "llm"))
    assert f"become tokens {other.get_vocab_size()} to {other.get_vocab_size() + 3}" in capsys.readouterr().out
    model = DualMLLM.from_pretrained(tmp_path / "run")
    assert model.text.turn_start == 1 and model.llm.config.vocab_size == other.get_vocab_size()
    assert all(isinstance(answer, str) for answer in model.answer(torch.zeros(1, 64, 2, 4, dtype=torch.int64), ["what is it?"], longest=3))
    few = json.loads((tmp_path / "llm/config.json").read_text()) | {"vocab_size": 100}
    (tmp_path / "llm/config.json").write_text(json.dumps(few))
    save_file(LLM(replace(llm.config, vocab_size=100)).state_dict(), tmp_path / "llm/model.safetensors")
    assert f"has {other.get_vocab_size()} tokens, its LLM 100 rows" in mllm_words("--llm", str(tmp_path / "llm"), "--tokenizer",
                                                                                  str(tokenizer_folder), "--out", str(tmp_path / "two"))


def test_train_mllm_bench_writes_nothing(tmp_path, monkeypatch, capsys):
    shrink(monkeypatch, replace(MIXED_ROW, batch=2))
    train_mllm.main([*TINY_MLLM, "--bench", "--tokenizer", "nano", "--out", str(tmp_path / "run")])
    assert capsys.readouterr().out.count("waiting for data") == 1 and not os.path.exists(tmp_path / "run")


def test_train_mllm_benches_write_a_picture_of_growth_alone(tmp_path, monkeypatch, capsys):
    there = [*TINY_MLLM, "--tokenizer", "nano", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(train_mllm, "seconds_of", lambda one, *_, **__: (one(), 0.5)[1])
    monkeypatch.setattr(train_tokenizer, "seconds_of", lambda one, *_, **__: (one(), 0.5)[1])
    first, bench_growth = ["ours: 500.0 ms until the first token"], train_mllm.bench_growth
    for what, more, words in (("paint", (), ["1 at a time, 64 positions, guided: 0.500 s, 2.00 images/s",
                                             "16 at a time, 64 positions, guided: 0.500 s, 32.00 images/s"]),
                              ("answer", (), first), ("answer", ("--streams-in", "continuous"), first),
                              ("growth", ("--batch-size", "1"), [
                                  "stage-4-2, positions 64, 128, 256: 0.500", "stage-4-2, words 256, 512, 1024",
                                  "stage-4-2, width 128, 256, 512", "stage-4-2, codebook size 256, 1024, 4096"]),
                              ("growth", ("--batch-size", "1", "--streams-in", "continuous"), ["stage-4-2, words 256, 512, 1024"])):
        if what == "answer":        # at an instant speed, tokens a second divide by zero
            took = iter((0.5, 1.0, 0.25, 0.75))
            monkeypatch.setattr(train_mllm, "seconds_of", lambda one, *_, **__: (one(), next(took))[1])
        if len(more) > 2:
            monkeypatch.setattr(train_mllm, "bench_growth", lambda *args: bench_growth(*args[:3], {"words": args[3]["words"]}, args[4]))
        train_mllm.main([*there, "--bench", what, *more])
        out = capsys.readouterr().out
        assert all(word in out for word in words), out
    assert os.listdir(tmp_path / "run") == ["bench-growth.png"]
    memory = [float(x) for x in re.search(r"words .*; ([\d.]+), ([\d.]+), ([\d.]+) GiB", out).groups()]
    assert memory[0] < memory[1] < memory[2]


def test_train_mllm_bad_input_ends_in_a_sentence(tokenizer_folder, tmp_path, monkeypatch):
    shrink(monkeypatch, *(replace(row, steps=1, batch=4) for row in train_mllm.NANO))
    (tmp_path / "llm").mkdir()
    there = ["--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "run")]
    for argv, words in ((["--preset", "huge"], "--preset is 'huge', expected one of nano"),
                        (["--stage", "5"], "--stage is '5', expected all"),
                        (["--preset", "qwen2.5-3b", "--stage", "0"], "--stage is '0'"),
                        (["--llm", "gpt5"], "--llm is 'gpt5', expected one of nano"),
                        (["--llm", str(tmp_path / "llm")], "config.json cannot be read"), (["--steps", "3"], "name the stage"),
                        (["--stage", "3"], "stage 2 is not finished"), (["--tokenizer", str(tmp_path / "nowhere")], "no model in"),
                        (["--streams-in", "pixel", "--streams-out", "semantic"], "streams"), (["--streams-in", "depth"], "streams"),
                        (["--streams-in", "none"], "streams in ('none',)"), (["--streams-in", "pixel,pixel"], "expected some of"),
                        (["--dry-run"], "expected a preset here"), (["--parameters"], "expected a preset here"),
                        (["--table", "4", "--batch-size", "8"], "have --batch-size, --tokenizer of their own"),
                        (["--table", "4"], "have --tokenizer of their own"), (["--eval-images", "3"], "at least 4"),
                        (["--streams-out", "depth"], "streams"),
                        (["--until", "9"], "--until is '9'"), (["--until", "2", "--stage", "1"], "--stage all"),
                        (["--until", "3", "--streams-out", "none"], "there is only 0, 1, 2, 4-1, 4-2"),
                        (["--streams-in", "continuous", "--streams-out", "pixel"], "paints nothing"),
                        (["--streams-in", "continuous", "--teacher", str(tmp_path / "gone")], "no model in"),
                        (["--streams-in", "continuous", "--stage", "3"], "--stage is '3'"),
                        (["--text-length", "1"], "--text-length is 1"), (["--teacher", "x"], "--teacher x would do nothing"),
                        (["--code-dim", "64"], "--code-dim 64 would do nothing"),
                        (["--vocabulary", "v", "--llm", str(tmp_path / "llm")], "--vocabulary v would do nothing"),
                        (["--data", str(tmp_path / "gone")], "no such image data"), (["--accumulate", "5"], "multiple"),
                        (["--data", str(tmp_path / "llm")], "no images in"), (["--device", "warp"], "--device warp cannot be used"),
                        (["--dry-run", "--preset", "huge"], "--preset is 'huge'"),
                        (["--dry-run", "--utilisation", "-1"], "--utilisation is -1"), (["--ranks", "2"], "go with --dry-run"),
                        (["--dry-run", "--llm", str(tmp_path / "llm")], "no preset"),
                        (["--dry-run", "--streams-in", "continuous"], "leave out")):
        assert words in mllm_words(*there, *argv), argv
        assert not glob.glob(str(tmp_path / "run/**/*.*"), recursive=True)       # no codes either


def test_train_mllm_a_stage_kept_unmeasured_is_measured_where_it_is_the_last(tokenizer_folder, tmp_path, monkeypatch):
    shrink(monkeypatch, *(replace(row, mixture=dict(caption=1.0), steps=1) for row in TWO_ROWS), evaluates=lambda stage: True)
    train_tiny(tmp_path, tokenizer_folder)
    read = lambda: json.load(open(tmp_path / "stage-1/metrics.json"))
    weights = (tmp_path / "stage-1/model.safetensors").read_bytes()
    assert read()["images"] == 0 and json.load(open(tmp_path / "metrics.json"))["images"] == 32
    train_tiny(tmp_path, tokenizer_folder, "--resume", "--until", "1")
    assert read()["images"] == 32 and (tmp_path / "stage-1/model.safetensors").read_bytes() == weights
    (tmp_path / "stage-1/metrics.json").write_text(json.dumps(read() | {"images": 0}))
    os.remove(tmp_path / "stage-1/state.pt")        # without a checkpoint it is not trained anew
    train_tiny(tmp_path, tokenizer_folder, "--resume", "--until", "1")
    assert read()["images"] == 0 and (tmp_path / "stage-1/model.safetensors").read_bytes() == weights


def test_train_mllm_dry_run_is_the_real_step(monkeypatch):
    """FLOPs, and bytes within a quarter of the allocator's own account, of a stage with all parts; and FLOPs of painting are those of
    `paint`."""
    args = train_mllm.flags(["--dry-run", "--precision", "fp32", "--text-length", "40"])
    config, text, _ = train_mllm.build(args, preset_config("nano"))
    ranks, row = train_tokenizer.Ranks("cpu"), replace(MIXED_ROW, batch=8)
    data = train_mllm.DrySequences("", args, ranks, text, config)
    parts = next(iter(data.batches(row)(0)))[0]
    assert parts[0][0].ids.shape == (8, 64 + 2 + 40 + 2) and len(parts[0][0].learned) == 3  # of captions, questions, paintings and texts
    stage = lambda: train_mllm.MLLMStage(args, ranks, row, False, DualMLLM(config, text), DualTokenizer(preset_config("nano")), None, data,
                                         None)
    with train_tokenizer.fake() as mode:
        there = [(part.map(mode.from_tensor),) for part, in parts]
        dry, painted = train_tokenizer.measure(stage(), there), train_mllm.painting_flops(DualMLLM(replace(config, positions=3), text), 9)
    real, again = train_tokenizer.measure(stage(), parts), stage()
    assert dry.step == real.step > 2.5 * dry.forward == 2.5 * real.forward > 0 and dry.memory == pytest.approx(real.memory, rel=0.01)
    again.wrapped = again.model
    assert dry.gradients + dry.activations == pytest.approx(allocated(lambda: train_tokenizer.gradients(again, parts, 0, {})), rel=0.25)
    with train_tokenizer.flop_counter() as counter:
        DualMLLM(replace(config, positions=3), text).paint(["1234567"], guidance=1)       # with the line break and the mark nine words
    assert counter.get_total_flops() == pytest.approx(painted[0], rel=0.02)


def test_train_mllm_dry_run_tells_of_every_stage(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shrink(monkeypatch, *(replace(row, batch=4) for row in train_mllm.NANO[3:5]))
    rows = dry_rows(capsys, train_mllm, "--text-length", "32")
    assert [name for name in rows if "check" not in name] == ["stage-3, 4", "stage-4-1, 4"] and not os.listdir(tmp_path)
    assert all(rows[f"{name}, checkpointing"]["activations"] <= row["activations"] for name, row in rows.items() if "check" not in name)
    assert [name for name in dry_rows(capsys, train_mllm, "--text-length", "32", "--until", "3") if "check" not in name] == ["stage-3, 4"]
    assert [name for name in dry_rows(capsys, train_mllm, "--text-length", "32", "--streams-out", "none")
            if "check" not in name] == ["stage-4-1, 4"]


def test_train_mllm_parameters_by_part_add_up():
    model = DualMLLM(MLLMConfig(llm=LLMConfig(**LLMS["nano"]), **mllm.HEADS["nano"]), TextTokenizer.bytes())
    assert sum(n for name, n in train_mllm.parameter_table(model) if "table" not in name) == sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def design_folders(tmp_path_factory):
    """An untrained tokenizer of every design -> {design: folder}."""
    folders = {}
    for design in DESIGNS:
        torch.manual_seed(0)
        model = DualTokenizer(preset_config("nano", design=design))
        folders[design] = tmp_path_factory.mktemp("design") / design
        model.save_pretrained(folders[design], data="plain")
        model.siglip_model.save_pretrained(folders[design] / "siglip")
    return folders


@pytest.mark.parametrize("design", DESIGNS)
def test_train_mllm_takes_a_tokenizer_of_any_design(design_folders, tmp_path, monkeypatch, design):
    """S = 1 or 2: it trains on its codes, resumes from a file, answers, and paints what the tokenizer decodes; without a decoder it has no
    heads and no stage 3."""
    shrink(monkeypatch, TWO_ROWS[0], train_mllm.Row("3", ("heads",), 1e-3, 4, 1, dict(paint=1.0)),
           train_mllm.Row("4-1", PARTS, 1e-3, 4, 1, MIXED))
    out = train_tiny(tmp_path / "run", design_folders[design])
    model, tokenizer = DualMLLM.from_pretrained(str(out)), DualTokenizer.from_pretrained(str(design_folders[design]))
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["design"], tuple(metrics["streams"])) == (design, tokenizer.config.streams)
    codes = tokenizer.encode(shapes.World("plain", 32).batch(range(2), "cpu")[0])
    assert codes.shape[2] == len(tokenizer.config.streams) and len(model.answer(codes, ["what?", "why?"], longest=2)) == 2
    if tokenizer.design.paints:
        assert tokenizer.decode(model.paint(["red"], guidance=1)).shape == (1, 3, 32, 32) and {*model.heads} == {*tokenizer.config.streams}
    else:
        assert not model.heads and not (out / "stage-3").exists()
        assert "has no decoder" in mllm_words("--tokenizer", str(design_folders[design]), "--out", str(tmp_path / "no"), "--streams-out",
                                              "unified")


@pytest.mark.parametrize("name", ["2", *(pytest.param(name, marks=[is_slow, is_skipped]) for name in ("4", "5", "6", "muse-6"))])
def test_train_mllm_tables_train_what_they_name_and_nothing_twice(tmp_path, monkeypatch, capsys, name):
    few_steps(monkeypatch)
    shrink(monkeypatch, replace(TWO_ROWS[0], name="2", trains=PARTS[:2], steps=1, mixture=dict(question=1.0)),
           train_mllm.Row("4-1", PARTS, 1e-3, 4, 1, MIXED), evaluates=lambda stage: True)
    table, begun, train = train_mllm.tables()[name], [], train_mllm.train
    monkeypatch.setattr(train_mllm, "train", lambda stage, batches: (begun.append(stage.folder), train(stage, batches)))
    assert {*train_mllm.tables()} == {"2", "4", "5", "6", "muse-6"}
    argv = ["--table", name, "--out", str(tmp_path), *TINY_MLLM]
    train_mllm.main(argv)
    made, seed = json.loads((tmp_path / f"table-{name}.json").read_text()), tmp_path / "seed-0"
    assert [row["run"] for row in made["rows"]] == [system.name for system in table.systems]
    for row, system in zip(made["rows"], table.systems):
        folder = seed / system.name / f"stage-{system.changes['until']}" if system.changes["until"] else seed / system.name
        metrics, config = (json.loads((folder / file).read_text()) for file in ("metrics.json", "config.json"))
        tokenizer = json.loads((seed / system.tokenizer[0] / "metrics.json").read_text())
        assert metrics["design"] == tokenizer["design"] == system.tokenizer[1]["design"] and metrics["seed"] == 0
        reads, paints = system.changes["streams_in"], system.changes["streams_out"]
        assert config["streams_in"] == (reads.split(",") if reads else tokenizer["streams"]) and config["streams_out"] == ([]
            if paints == "none" else [paints] if paints else tokenizer["streams"])
        for column, cell in row["ours"].items():
            at = functools.reduce(lambda found, key: found[key], column.split("."), metrics | {"tokenizer": tokenizer})
            assert cell["mean"] == at and cell["values"] == [at]
        # plain shapes have one size; the
        unmarked = {"painting.compare", "tokenizer.fd", "understanding.comparison.right", "understanding.relation.right"}
        assert {*table.columns} - {*row["ours"]} <= unmarked
        # semantic branch has no decoder; and few scenes ask few kinds of questions
        assert row["paper"] == system.paper
    assert len(begun) == len({*begun}) > 0 and (tmp_path
        / f"table-{name}.md").read_text() in capsys.readouterr().out and Image.open(tmp_path / f"table-{name}.png").width > 400
    train_mllm.main(argv)
    assert len(begun) == len({*begun})         # all was there


def test_train_mllm_tables_compare_what_the_papers_do():
    """(tokenizer, reads, paints, until) of each row."""
    rows = {name: [(system.tokenizer[0], *system.changes.values()) for system in table.systems] for name,
            table in train_mllm.tables().items()}
    reads = lambda design, streams="": (design, streams, "none", "2")
    assert rows == {"2": [reads("dual", "continuous"), reads("recon-deep")],
                    "4": [reads("dual", "continuous"), reads("naive"), reads("dual", "semantic"), reads("dual")],
                    "5": [("naive", "", "", ""), ("dual", "", "pixel", ""), ("dual", "", "", "")],
                    "6": [(design, "", "", "") for design in ("naive", "dual", "dual-encoder")],
                    "muse-6": [reads("sde-image"), reads("sde-semantic"), reads("sde")]}


def test_train_mllm_table_of_other_tokenizers_is_refused(tmp_path, monkeypatch):
    """Those of another preset, and those that were trained for longer than the rest."""
    few_steps(monkeypatch)
    folder = tmp_path / "seed-0" / "dual"
    folder.mkdir(parents=True)
    settings = {"preset": "small", **{name: 0 for name in ("data", "steps", "batch", "lr", "weights")}}
    (folder / "metrics.json").write_text(json.dumps({"settings": settings}))
    for argv, words in ((["--table", "4"], "preset nano -> small"), (["--table", "4", "--data", "photos"],
            "expected one of plain, textured"), (["--table", "4", "--tokenizer", "x"], "--tokenizer of their own"),
                        (["--table", "4", "--until", "2"], "have --until of their own"), (["--table", "12"], "--table is '12'"),
                        (["--seeds", "2"], "--seeds goes with --table"), (["--table", "4", "--bench"], "without --bench")):
        assert words in mllm_words("--out", str(tmp_path), *argv), argv
    shrink(monkeypatch, replace(TWO_ROWS[0], name="2", steps=1), replace(TWO_ROWS[1], name="4-1"))
    train_tokenizer.main(["--table", "10", "--out", str(tmp_path / "more"), "--precision", "fp32", *TINY[-8:-2]])
    monkeypatch.setitem(train_tokenizer.SETTINGS, "nano", replace(train_tokenizer.SETTINGS["nano"], steps=3))
    assert "(steps 2 -> 3)" in mllm_words("--out", str(tmp_path / "more"), "--table", "4")


def test_train_mllm_measures_in_the_teacher_and_says_where_it_cannot(tokenizer_folder, tokenizer, tmp_path, capsys):
    ranks, teacher = train_tokenizer.Ranks("cpu"), SigLIP.from_pretrained(tokenizer_folder / "siglip").vision_model
    assert equal(train_mllm.judge(tokenizer, str(tokenizer_folder), ranks).state_dict(),
                 teacher.state_dict()) and not capsys.readouterr().out
    tokenizer.save_pretrained(tmp_path)
    assert train_mllm.judge(tokenizer, str(tmp_path), ranks) is tokenizer.siglip_model.vision_model and "own ViT" in capsys.readouterr().out


def test_train_mllm_until_a_stage(tokenizer_folder, tmp_path, monkeypatch):
    """And, without it, on from there."""
    shrink(monkeypatch, TWO_ROWS[0], TWO_ROWS[1], train_mllm.Row("3", ("heads",), 1e-3, 4, 1, dict(paint=1.0)))
    argv = tmp_path / "run", tokenizer_folder, "--streams-in", "semantic", "--resume"
    out = train_tiny(*argv, "--until", "2")
    assert json.loads((out / "stage-2/config.json").read_text())["stage"] == "2" and (out / "stage-1").exists() and not (out
        / "model.safetensors").exists()
    before = os.stat(out / "stage-2/model.safetensors").st_mtime_ns
    train_tiny(*argv)
    assert json.loads((out / "config.json").read_text())["stage"] == "3" and os.stat(out
                                                                                     / "stage-2/model.safetensors").st_mtime_ns == before


def parameters_printed(capsys, *argv):
    capsys.readouterr()
    train_mllm.main(["--parameters", *argv])
    return {line.strip().rsplit(maxsplit=2)[0]: float(line.rsplit(maxsplit=2)[1]) for line in capsys.readouterr().out.splitlines()
            if line.endswith(" M")}


def test_train_mllm_parameters_are_the_papers(capsys):
    """Appendix D.1: 257.9 M for a head over depth, Qwen2.5-3B's 3,085.9 M, and 2.1 M more in the projector for the second stream."""
    two = parameters_printed(capsys, "--preset", "qwen2.5-3b", "--code-dim", "1024")
    one = parameters_printed(capsys, "--preset", "qwen2.5-3b", "--code-dim", "1024", "--streams-in", "pixel", "--streams-out", "pixel")
    depth = [value for name, value in two.items() if "over depth" in name]
    assert depth == [257.9, 257.9] and two["LLM"] == one["LLM"] == 3085.9
    assert round(two["input projector"] - one["input projector"], 1) == 2.1 and [value for name, value in one.items()
                                                                                 if "over depth" in name] == [257.9]


# ---------------------------------------------------------------------------------------------------------------------
# train_mllm: records

def chat(images, *turns):
    return {"image": images, "conversations": [{"from": ("human", "gpt")[n % 2], "value": words} for n, words in enumerate(turns)]}


CHATS = [chat("0.png", "<image>\nWhat is <|im_end|> this?", "A cat.", "And then?", "It sleeps."),
         chat(["0.png", "1.png"], "<image>\n<image>\nWhich?", "The second."),
         {"conversations": [{"from": "user", "value": 'Hi é, {["\\"}'}, {"from": "assistant", "value": "Hello"}]},
         chat("2.png", "before <image> after", "yes")]
EDIT = [{"image": "0.png"}, {"text": "make it red", "loss": False}, {"image": "1.png", "paint": True}]
STORY = [{"text": "one "}, {"image": "2.png", "paint": True}, {"text": "two", "loss": False}, {"image": "3.png"},
         {"image": "4.png", "paint": True, "loss": False}, {"text": "three"}]


@pytest.fixture(scope="module")
def recorded(captioned, tmp_path_factory):
    """Files of conversations (a list, and lines) and of edits and documents, beside the images they name, one of them broken."""
    folder = tmp_path_factory.mktemp("records")
    for n in range(7):
        shutil.copy(captioned / f"train/{n}.png", folder)
    (folder / "broken.png").write_bytes(b"broken")
    (folder / "chats.json").write_text(json.dumps(CHATS, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / "more.jsonl").write_text("\n".join(json.dumps(record) for record in CHATS) + "\n\n")
    (folder / "documents.jsonl").write_text("\n".join(json.dumps(record) for record in (EDIT, STORY)))
    return folder


def record_data(folder, tokenizer_folder, out, *flags, text=BYTES, ranks=None):
    """The sequences of these flags, as `main` makes them for --data none, with the codes of a small stand-in."""
    args = train_mllm.flags([*TINY_MLLM, "--data", "none", "--out", str(out), *flags])
    tokenizer = DualTokenizer.from_pretrained(tokenizer_folder)
    config = MLLMConfig(llm=LLMConfig(**LLMS["nano"]), positions=64, depth=4)
    ranks, encode = ranks or train_tokenizer.Ranks("cpu"), train_mllm.encoder(config, tokenizer, str(tokenizer_folder))
    data = train_mllm.Sequences("none", args, ranks, text, config)
    data.add(train_mllm.RecordSequences(args, ranks, text, config, 32, encode))
    return data


def shown_as(segments, data, folder, text=BYTES):
    """Segments, spelled: [loss], text, and pictures by the names of the images whose codes they are, > where painted, ! with a loss."""
    tokenizer, out = data.tokenizer, []
    for s in segments:
        if isinstance(s, Words):
            out.append(("*" if s.loss else "") + "".join({id: f"({name})" for name, id in text.specials.items()}.get(id) or chr(id)
                                                         for id in s.ids))
        else:
            name, = [n for n in range(7) if torch.equal(tokenizer.encode(sample.read_images([str(folder / f"{n}.png")], 32))[0], s.data)]
            out.append(("!>" if s.loss else ">") * s.paint + str(name))
    return "|".join(out)


def test_train_mllm_records_become_sequences_with_losses_on_what_is_learned(recorded, tokenizer_folder, tmp_path):
    """By hand: every reply and its end, painted pictures, marks spelled in text stay text; list and lines alike; chat vocabularies in
    Qwen's form."""
    flags = ["--conversations", f"{recorded}/chats.json,{recorded}/more.jsonl", "--documents", f"{recorded}/documents.jsonl"]
    data = record_data(recorded, tokenizer_folder, tmp_path, *flags)
    data.tokenizer, made = DualTokenizer.from_pretrained(tokenizer_folder), {}
    for rows in data.records.rows.values():
        for row in rows:
            made[int(row[1])] = shown_as(data.records.made(row), data, recorded)
    assert {kind: len(rows) for kind, rows in data.records.rows.items()} == {"question": 8, "edit": 1,
        "document": 1} and data.kinds == ("question", "edit", "document")
    end = "(<|endoftext|>)"
    chats = [f"|0|What is <|im_end|> this?|\n|*A cat.|*{end}||And then?|\n|*It sleeps.|*{end}", f"|0|1|Which?|\n|*The second.|*{end}",
             "|" + "".join(map(chr, 'Hi é, {["\\"}'.encode())) + f"|\n|*Hello|*{end}", f"|before|2|after|\n|*yes|*{end}"]
    assert [made[i] for i in range(8)] == chats * 2
    assert made[8] == f"|0|make it red|\n|!>1|{end}" and made[9] == f"{end}|*one |!>2|two|3|>4|*three|*{end}"
    data = record_data(recorded, tokenizer_folder, tmp_path, *flags, text=CHAT)
    data.tokenizer = DualTokenizer.from_pretrained(tokenizer_folder)
    row, = [row for row in data.records.rows["question"] if row[1] == 0]
    said = spelled(data.records.made(row), CHAT, losses=True)
    assert said == "A cat.<|im_end|>It sleeps.<|im_end|>" and "(<|im_end|>) this" not in shown_as(data.records.made(row), data,
        recorded, CHAT)


def test_train_mllm_records_are_batches_by_hand(recorded, tokenizer_folder, tmp_path):
    """Places of losses and pictures, and what is painted, in the `Batch` of one step of each kind."""
    data = record_data(recorded, tokenizer_folder, tmp_path, "--documents", f"{recorded}/documents.jsonl")
    data.batches(train_mllm.Row("4-1", PARTS, 1e-3, 2, 4, dict(edit=1.0, document=1.0, paint=1.0)))
    steps = {next(iter(data.kinds_of(step))): data[step][0] for step in range(2)}
    assert steps.keys() == {"edit", "document"} and data.mixture.keys() == steps.keys()
    edit, story = steps["edit"], steps["document"]
    assert edit.painted.tolist() == [False, True] * 2 and edit.learned.tolist() == [1, 3] and not len(edit.text_from)
    assert story.painted.tolist() == [True, False, True] * 2 and story.learned.tolist() == [0, 3]
    assert bytes(id for id in story.text_target.tolist() if id < 256) == b"one three" * 2 and story.text_target.tolist().count(256) == 2
    T = story.ids.shape[1]
    assert T == 1 + 4 + 66 + 3 + 66 + 66 + 5 + 1 and story.at[:3].tolist() == [6, 75, 141] and story.text_from[:5].tolist() == [0, 1, 2, 3,
        T - 7]
    assert story.ids[0, 5] == GEN_START and story.ids[0, 74] == START and story.ids[0, 206 - 1] == GEN_END


def test_train_mllm_bench_of_records_does_not_take_one_broken_picture_for_all(recorded, tokenizer_folder, tmp_path, capsys):
    """Though one picture, here the broken one, stands for all."""
    (tmp_path / "some.jsonl").write_text("\n".join(json.dumps([{"image": f"{recorded}/{name}.png"}, {"text": "x"}])
                                                   for name in ("broken", 0, 1)))
    record_data(recorded, tokenizer_folder, tmp_path, "--documents", str(tmp_path / "some.jsonl"), "--bench")
    assert "3 of kind document" in capsys.readouterr().out


def test_train_mllm_bad_records_are_left_out_counted_and_named(recorded, tokenizer_folder, tmp_path, capsys, monkeypatch):
    bad = {"expected an object": 7, "unknown speaker": {"conversations": [{"from": "system", "value": "x"}, {"from": "gpt", "value": "y"}]},
           "no list": {"conversations": "x"},
           '"image" is': chat([3], "<image>", "y"), "2 <image> marks for 1 images": chat("0.png", "<image><image>", "y"),
           "0 <image> marks for 1": chat("0.png", "x", "y"),
           "a reply has an <image>": chat("0.png", "x", "<image>"), "no reply": chat(None, "x", " "),
           "do not take turns": chat(None, "x", "y", "z"),
           "No such file or directory: ": chat("gone.png", "<image>", "y"),
           "broken.png: cannot be read": chat("broken.png", "<image>", "y"),
           "tokens, expected at most 300": chat(None, "x" * 300, "y")}
    documents = {"expected a list": {}, "is of pictures": [{"text": "a", "paint": True}], "is neither": [{"text": "a", "image": "0.png"}],
                 "nothing in it has a loss": [{"text": "a", "loss": False}, {"image": "0.png"}],
                 '"paint" is': [{"image": "0.png", "paint": 1}], "neither words nor a path": [{"text": ["x"]}],
                 "nothing that has a loss fits 300": [{"text": "x" * 400}],
                 "Expecting": None, "nested too deeply": 0, "gone.png": [{"text": "a"}, {"image": "gone.png"}]}
    raw = {None: "{broken", 0: "[" * 100_000}
    (tmp_path / "chats.json").write_text(json.dumps([*bad.values(), CHATS[0]]))
    (tmp_path / "documents.jsonl").write_text("\n".join(raw[record] if record in (None, 0) else json.dumps(record)
                                                        for record in [*documents.values(), EDIT]), encoding="utf-8")
    flags = ["--image-folder", str(recorded), "--max-tokens", "300", "--conversations"]
    data = record_data(recorded, tokenizer_folder, tmp_path / "run", *flags, str(tmp_path / "chats.json"), "--documents",
                       str(tmp_path / "documents.jsonl"))
    out = capsys.readouterr().out
    assert f"{len(bad) + len(documents)} left out" in out and {kind: len(rows) for kind,
                                                               rows in data.records.rows.items()} == {"question": 1, "edit": 1}
    assert len([line for line in out.splitlines() if ", record " in line]) == 10
    monkeypatch.setitem(train_mllm.STAGES, "nano", train_mllm.NANO[:1])
    for n, (words, record) in enumerate(bad.items()):
        (tmp_path / "one.jsonl").write_text(json.dumps(record))
        assert words in mllm_words("--tokenizer", str(tokenizer_folder), "--data", "none", "--out", str(tmp_path / "run"), *flags,
                                   str(tmp_path / "one.jsonl"))
        assert n >= 10 or f"chats.json, record {n + 1}: " in out and words in out
    for record, words in zip(documents.values(), documents):
        (tmp_path / "one.jsonl").write_text(raw[record] if record in (None, 0) else json.dumps(record))
        with pytest.raises(ValueError, match=re.escape(words)):
            record_data(recorded, tokenizer_folder, tmp_path / "run", "--image-folder", str(recorded), "--max-tokens", "300", "--documents",
                        str(tmp_path / "one.jsonl"))


def test_train_mllm_records_files_and_flags_end_in_a_sentence(recorded, tokenizer_folder, tmp_path, monkeypatch):
    asked = ["--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "run"), "--data", "none", "--conversations",
             str(recorded / "chats.json")]
    assert "stage 1 is of captioned images, and --data is none" in mllm_words(*asked) and not os.path.exists(tmp_path / "run/codes")
    monkeypatch.setitem(train_mllm.STAGES, "nano", train_mllm.NANO[:1])
    there = ["--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "run"), "--data", "none"]
    (tmp_path / "cut.json").write_text(json.dumps(CHATS)[:-20])
    (tmp_path / "empty.json").write_text("")
    for argv, words in ((["--conversations", str(tmp_path / "gone.json")], "gone.json cannot be read"),
                        (["--conversations", str(tmp_path / "cut.json")], "its list has no end"),
                        (["--conversations", str(tmp_path / "empty.json")], "none of the 0 records"), ([], "--data is none"),
                        (["--image-folder", "x", "--text-data", "y"], "--image-folder x would do nothing"),
                        (["--max-tokens", "9", "--text-data", "y"], "--max-tokens 9 would do nothing"),
                        (["--conversations", str(recorded / "chats.json"), "--max-tokens", "5000"], "context is 1024"),
                        (["--conversations", str(recorded / "chats.json"), "--val-data", "x"], "--val-data x would do nothing"),
                        (["--conversations", str(recorded / "chats.json")], "has none of text; it has question")):
        assert words in mllm_words(*there, *argv), argv


def test_train_mllm_edits_are_told_by_their_shape():
    read, told, painted = EDIT
    for parts, kind in ((EDIT, "edit"), ([read, read, told, painted], "edit"), ([read, {"text": "so"}, painted], "document"),
                        ([told, painted], "document"),
                        ([painted, told, painted], "document"), ([told, *EDIT], "document"), ([*EDIT, told], "document"),
                        ([read, told, read, {"text": "so"}], "document")):
        made, found = records.document(parts, "/there")
        assert made == kind and len(found) == len(parts)
    assert records.document(EDIT, "/there")[1][0] == records.Image("/there/0.png") and records.document([{"image": "/a.png",
        "paint": True}], "/there")[1][0].path == "/a.png"


def test_train_mllm_documents_are_cut_after_a_part(recorded, tokenizer_folder, tmp_path):
    """To what fits; pictures that are cut off are not read, broken or not."""
    parts = [{"text": "a" * 20}, {"image": "0.png"}, {"text": "b" * 30}, {"image": "gone.png"}, {"text": "c"}]
    (tmp_path / "documents.jsonl").write_text(json.dumps(parts))
    for limit, length in ((22, 22), (87, 22), (88, 88), (117, 88), (118, 118), (183, 118)):
        data = record_data(recorded, tokenizer_folder, tmp_path / "run", "--image-folder", str(recorded), "--documents",
                           str(tmp_path / "documents.jsonl"), "--max-tokens", str(limit))
        row, = data.records.rows["document"]
        assert row[0] == length == len(laid_out(data.records.made(row), BYTES))


def test_train_mllm_record_edits_drop_their_words_as_sampling_does(recorded, tokenizer_folder, tmp_path, monkeypatch):
    """What an edit trains begins with the very prompt of `paint(pictures=...)`: with words, and nine times fewer without."""
    data, rows = record_data(recorded, tokenizer_folder, tmp_path, "--documents", f"{recorded}/documents.jsonl"), []
    made = [laid_out(data.make("edit", random.Random(n)), BYTES) for n in range(300)]
    model = small_mllm(positions=64, llm=dict(max_position_embeddings=400), depth=4, codebook_size=512)
    monkeypatch.setattr(model, "_begin", lambda sequences, *_: rows.extend(sequences))        # no state to go on from
    with pytest.raises(TypeError):
        model.paint(["make it red"], train_mllm.to_tensor(data.records.pictures[:1]), guidance=3.0)
    prompts = [laid_out(row, BYTES) for row in rows]
    assert len(prompts) == 2 and all(any(m[:len(prompt)] == prompt and m[len(prompt)] == (None, False) for m in made) for prompt in prompts)
    dropped = sum(m[:len(prompts[1])] == prompts[1] for m in made)
    assert abs(dropped / 300 - train_mllm.DROP) < 0.06
    assert all(torch.equal(s.data, train_mllm.to_tensor(data.records.pictures[n])) for n,
               s in enumerate(s for s in data.make("edit", random.Random(0)) if isinstance(s, Picture)))


def test_train_mllm_records_keep_their_shares_and_a_length_a_step(recorded, tokenizer_folder, tmp_path, monkeypatch):
    """Each kind of record has steps of its own; from long lists, a step's sequences come from one eighth by length, and every record
    comes."""
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(chat(None, "x" * (n % 97), f"y{n}")) for n in range(4500)))
    data = record_data(recorded, tokenizer_folder, tmp_path, "--conversations", str(tmp_path / "chats.jsonl"), "--documents",
                       f"{recorded}/documents.jsonl")
    assert len(data.records.held["question"]) == 90 and len(data.records.rows["question"]) == 4410
    seen = collections.Counter(row[1] for row in [*data.records.held["question"].tolist(), *data.records.rows["question"].tolist()])
    assert len(seen) == 4500
    data.batches(replace(MIXED_ROW, batch=16, mixture=dict(question=0.5, edit=0.2, document=0.1, unheard=3.0)))
    kinds = [data.kinds_of(step) for step in range(160)]
    counts = Counter(next(iter(kind)) for kind in kinds)
    assert all(len(kind) == 1 for kind in kinds) and [counts[kind] for kind in ("question", "edit", "document")] == [100, 40, 20]
    data.mixture = dict(question=1.0, caption=1.0)
    assert [[*data.kinds_of(step)] for step in range(4)] == [["caption"], ["question"]] * 2
    data.mixture = dict(question=0.5, edit=0.2, document=0.1)
    lengths = [batch.mask.sum(1) for step in range(160) if "question" in kinds[step] for batch in data[step]]
    assert max(int(length.max() - length.min()) for length in lengths) <= 14 and max(map(max, lengths)) - min(map(min, lengths)) > 80


def test_train_mllm_record_parts_are_the_same_over_ranks(recorded, tokenizer_folder, tmp_path, monkeypatch):
    """Whatever the order in which ranks hand in what they read, and whoever makes which part."""
    (tmp_path / "documents.jsonl").write_text("\n".join(json.dumps([*EDIT[:1], {"text": f"edit {n}", "loss": False}, *EDIT[2:]])
                                                        for n in range(5)) + "\n" + json.dumps(STORY))
    flags = ["--image-folder", str(recorded), "--conversations", f"{recorded}/chats.json", "--documents", str(tmp_path / "documents.jsonl"),
             "--accumulate"]
    row = train_mllm.Row("4-1", PARTS, 1e-3, 8, 4, dict(question=1.0, edit=1.0, document=1.0))
    monkeypatch.setattr(train_mllm, "HELD_OUT", 3)
    one = record_data(recorded, tokenizer_folder, tmp_path, *flags, "2")
    other_order = train_tokenizer.Ranks("cpu")
    other_order.gather_rows = lambda rows: {name: value[::-1] for name, value in rows.items()}
    two = record_data(recorded, tokenizer_folder, tmp_path, *flags, "1", ranks=other_order)
    assert one.key == two.key and all(one.records.held[kind][:, 1].tolist() == two.records.held[kind][:, 1].tolist()
                                      for kind in ("question", "edit"))
    one.batches(row), two.batches(row)
    for step in range(6):
        whole = one[step]
        for rank in range(2):
            two.ranks = SimpleNamespace(rank=rank, count=2, device=torch.device("cpu"))
            part, = two[step]
            assert all(torch.equal(a, b) for a, b in zip(part, whole[rank]))


def test_train_mllm_trains_on_records_over_the_stages(recorded, captioned, tokenizer_folder, tmp_path, monkeypatch, capsys):
    """Stages 2 and 4-1 over images, conversations, edits and documents; held-out losses; pictures encoded once, again where one changes;
    stage 2 without --data."""
    (tmp_path / "more.jsonl").write_text("\n".join(json.dumps(record) for n in range(26) for record in (EDIT, STORY)) + "\n"
                                         + json.dumps(EDIT))
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(CHATS[n % 4]) for n in range(60)))
    mixture = dict(train_mllm._EVERYTHING, edit=1.0, document=1.0, question=1.0)
    rows = (TWO_ROWS[0], train_mllm.Row("2", ("projector", "llm"), 1e-3, 8, 4, train_mllm._UNDERSTAND),
            train_mllm.Row("4-1", PARTS, 1e-3, 8, 4, mixture))
    shrink(monkeypatch, *(replace(row, steps=4) for row in rows), evaluates=lambda stage: True)
    monkeypatch.setattr(train_mllm, "HELD_OUT", 20)
    flags = ["--image-folder", str(recorded), "--conversations", str(tmp_path / "chats.jsonl"), "--documents", str(tmp_path / "more.jsonl")]
    train_tiny(tmp_path / "run", tokenizer_folder, "--data", str(captioned / "train"), "--val-data", str(captioned / "val"), *flags)
    out, metrics = capsys.readouterr().out, json.load(open(tmp_path / "run/metrics.json"))
    assert ("57 of kind question (3 more held out), 26 of kind edit (1 more held out), 25 of kind document "
            "(1 more held out), 5 pictures, 0 left out" in out)
    assert {"held_out_question_text", "held_out_edit_codes", "held_out_document_text", "held_out_document_codes",
            "caption_retrieval"} <= metrics.keys() and "held_out_edit_text" not in metrics
    logged = losses_logged(tmp_path / "run")
    assert any({"text", "pixel_1"} <= line.keys() for line in logged) and any("pixel_1" in line and "text" not in line for line in logged)
    assert 3 < metrics["held_out_question_text"] < 8 and 5 < metrics["held_out_document_codes"] < 200
    folders = {folder: len(np.load(folder + "/pictures.npy")) for folder in glob.glob(str(tmp_path / "run/codes/*"))}
    assert sorted(folders.values()) == [5, 6, 12]
    train_tiny(tmp_path / "run", tokenizer_folder, "--data", "none", "--stage", "2", *flags)
    assert {*glob.glob(str(tmp_path / "run/codes/*"))} == {*folders} and "question" in capsys.readouterr().out
    assert {k for k in json.load(open(tmp_path / "run/stage-2/metrics.json")) if k.startswith("held")} == {"held_out_question_text"}


# ---------------------------------------------------------------------------------------------------------------------
# sample, with the MLLM

@pytest.fixture(scope="module")
def there(mllm_stages, tokenizer_folder):
    return ["--device", "cpu", "--tokenizer", str(tokenizer_folder), "--mllm", str(mllm_stages[0])]


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 70, 3), np.uint8)).save(path)
    return str(path)


def test_sample_paints(there, tmp_path, capsys):
    def painted(name, prompts, *more):
        sample.main(["--paint", *prompts, *there, "--out", str(tmp_path / name), *more])
        paths = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
        assert sorted(os.listdir(tmp_path / name)) == sorted(map(os.path.basename, paths)) and len(paths) == len(prompts)
        return [Image.open(path).copy() for path in paths]

    one, two = painted("one", ["a red circle", "two"])
    again, = painted("again", ["two"])
    four, = painted("four", ["two"], "--n", "4", "--guidance", "1", "--seed", "5")
    other, = painted("other", ["two"], "--guidance", "1", "--seed", "8")        # the fourth of those four
    cold, = painted("cold", ["two"], "--n", "2", "--guidance", "1", "--temperature", "0")
    side = cold.height - 8
    assert np.array_equal(*(np.asarray(cold)[4:4 + side, x:x + side] for x in (4, side + 8)))
    assert painted("unguided", ["two"], "--guidance", "1")[0] != two
    assert one != two and two == again and one.width == one.height and 3 * four.height < four.width < 5 * four.height
    pixels = lambda picture: np.asarray(picture.resize((32, 32), Image.Resampling.BOX), float)
    last = pixels(four.crop((four.width - four.height + 4, 4, four.width - 4, four.height - 4)))
    same, unlike = (np.abs(last - pixels(picture)).mean() for picture in (other, two))        # one alone has no frame
    assert same < 0.2 * unlike


def test_sample_alone_says_what_it_can_do():
    done = subprocess.run([sys.executable, "sample.py"], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and all(f"sample.py --{what}" in done.stdout
                                        for what in ("paint", "ask", "edit", "eval", "reconstruct", "figure", "fd"))


def test_sample_loads_models_without_torchs_compiler():
    """Whose import takes longer than painting a picture."""
    code = ("import sys; import mllm, tokenizer, sample; tokenizer.DualTokenizer.from_pretrained('weights/tokenizer'); "
            "mllm.DualMLLM.from_pretrained('weights/mllm'); sys.exit('torch._dynamo' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0


@pytest.mark.parametrize("mine", [False, True])
def test_sample_has_weights_of_its_own(tmp_path, monkeypatch, capsys, mine, run_folder):
    """Without a run, those that come with the code, with which the README's first commands do what they should; with a tokenizer alone,
    that reconstructs, and a model and its tokenizer come together."""
    monkeypatch.chdir(tmp_path)
    said = "these are the weights that come with the code"
    if mine:
        shutil.copytree(run_folder, "out/tokenizer")
    commands = re.findall(r"^python sample\.py (--(?:paint|ask|edit|reconstruct).*)", Path(HERE, "README.md").read_text("utf-8"), re.M)[:4]
    seen, nouns = [], lambda picture: {thing.noun for thing in shapes.read(picture, "plain")[0]}
    for command in commands:
        sample.main([*shlex.split(command), "--device", "cpu"])
        seen.append(capsys.readouterr().out)
    assert seen[0].count(said) == 1 and ("out/tokenizer and" in seen[0]) != mine
    for words, expected in (("a-yellow-circle-above-a-blue-square", {"yellow circle", "blue square"}), ("a-red-circle", {"red circle"})):
        assert nouns(sample.read_images([f"out/samples/{words}.png"], 32)) == expected
    assert seen[1].splitlines()[-1] == "yellow"
    both = Image.open(seen[2].splitlines()[-1])
    both.crop((both.height - 4, 4, both.width - 4, both.height - 4)).save("edited.png")       # the right one, without the frame
    assert nouns(sample.read_images(["edited.png"], 32)) == {"green circle"}
    assert (said in seen[3]) != mine and (mine or float(re.search(r"PSNR ([\d.]+)", seen[3])[1]) > 25)
    with pytest.raises(ValueError, match="no model in"):        # one that was named, though it is not there
        sample.main(["--paint", "x", "--mllm", "nowhere", *(["--tokenizer", "out/tokenizer"] if mine else [])])
    for folder in ("tokenizer", "mllm", "tokenizer/siglip"):
        made = json.load(open(os.path.join(HERE, "weights", folder, "config.json")))["made"]
        assert {"commit", "command", "machine", "minutes", "seed", "metrics"} <= made.keys() and re.fullmatch("[0-9a-f]{7}", made["commit"])
    assert sum(os.path.getsize(path) for path in glob.glob(os.path.join(HERE, "weights/**/*.safetensors"), recursive=True)) < 16 * 2 ** 20
    train(tmp_path / "run", "--siglip", os.path.join(HERE, "weights/tokenizer/siglip"), "--steps", "1")
    assert json.load(open(tmp_path / "run/metrics.json"))["teacher_zero_shot"] > 0.95


def test_sample_prompts_that_look_alike_get_files_of_their_own(there, tmp_path, capsys):
    sample.main(["--paint", "two!", "two?", *there, "--out", str(tmp_path / "out"), "--guidance", "1"])
    assert len(os.listdir(tmp_path / "out")) == 2 == len(set(capsys.readouterr().out.split()))


def test_sample_answers(there, photo, capsys):
    sample.main(["--ask", "what is it?", "--image", photo, *there])
    one = capsys.readouterr().out
    sample.main(["--ask", "--image", photo, photo, *there])
    assert one.endswith("\n") and capsys.readouterr().out.count("photo.png: ") == 2


def test_sample_paints_a_file_and_goes_on(there, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue\f square\n")      # what is no line break to people is none here
    agree, seen = train_tokenizer.Ranks.agree, []       # ranks wait for each other before one paints
    monkeypatch.setattr(train_tokenizer.Ranks, "agree",
                        lambda self, number: (seen.append(glob.glob(str(tmp_path / "out/*.png"))), agree(self, number))[1])
    load = DualMLLM.from_pretrained
    # batches round differently, and an untrained model is full of near ties
    monkeypatch.setattr(DualMLLM, "from_pretrained", lambda folder: load(folder).double())
    argv, out = ["--paint-file", str(tmp_path / "prompts.txt"), *there, "--out", str(tmp_path / "out"), "--guidance", "1", "--n",
                 "2"], tmp_path / "out"
    sample.main([*argv, "--batch-size", "3"])
    names = ["00000-0.png", "00000-1.png", "00002-0.png", "00002-1.png"]
    assert sorted(os.listdir(out)) == [*names, "asked.json"] and seen[0] == []
    monkeypatch.setattr(train_tokenizer.Ranks, "agree", agree)
    pixels = lambda: np.stack([np.asarray(Image.open(out / name), int) for name in names])
    before = pixels()
    assert before.shape == (4, 32, 32, 3) and len(np.unique(before, axis=0)) == 4
    os.remove(out / names[2])
    sample.main([*argv, "--batch-size", "1"])       # what is missing, the same in another batch
    assert np.abs(pixels() - before).max() <= 1 and "4 pictures, 3 of them already" in capsys.readouterr().out      # decoded in fp32
    sample.main(["--paint-file", str(tmp_path / "prompts.txt"), *there, "--out", str(tmp_path / "low"), "--precision", "bf16"])
    assert sorted(os.listdir(tmp_path / "low")) == ["00000.png", "00002.png", "asked.json"]
    for path in (str(tmp_path / "none.txt"), ""):
        assert "cannot be read" in sample_words("--paint-file", path, *there)
        assert "cannot be read" in sample_words("--answer-file", path, *there)
    assert "holds pictures of other prompts, or of another model, seed or sampling" in sample_words(*argv, "--seed", "1")


def test_sample_answers_a_file(there, photo, tmp_path, capsys):
    shutil.copy(photo, tmp_path / "photo.png")
    (tmp_path / "broken.png").write_bytes(b"x")
    records = [{"image": "photo.png", "question": "what is it?", "id": 7}, {"image": "broken.png", "question": "?"},
               {"question": "no image"}, {"image": "photo.png", "question": "is it\u2028é?"},
               {"image": "photo.png", "question": "a" * 2000}]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n{\n", encoding="utf-8")
    sample.main(["--answer-file", str(tmp_path / "questions.jsonl"), *there, "--out", str(tmp_path / "out"), "--batch-size", "1"])
    answers, said = [json.loads(line) for line in open(tmp_path / "out/answers.jsonl", encoding="utf-8")], capsys.readouterr().out
    assert [{k: v for k, v in answer.items() if k != "answer"} for answer in answers] == [records[0], records[3]]
    capsys.readouterr(), sample.main(["--ask", "what is it?", "--image", photo, *there])
    assert answers[0]["answer"] == capsys.readouterr().out.removesuffix("\n")
    assert "2 answers, 4 records left out" in said and "line 2: " in said and "line 5: a sequence of " in said
    assert "line 3 is no record" in said and "line 6 is no record" in said


def test_sample_compares_folders(run_folder, tmp_path, monkeypatch, capsys):
    pictures = World("plain", 32).batch(range(40))[0]
    for name, part in (("a", pictures[:24]), ("b", pictures[24:])):
        (tmp_path / name).mkdir()
        for i, picture in enumerate(train_tokenizer.to_picture(part)):
            picture.save(tmp_path / name / f"{i}.png")
    vit = DualTokenizer.from_pretrained(run_folder).siglip_model.vision_model
    see = lambda look: [look((torch.stack([torch.from_numpy(np.asarray(p).copy()) for p in train_tokenizer.to_picture(part)]).permute(0, 3,
        1, 2)).contiguous()) for part in (pictures[:24], pictures[24:])]
    with torch.no_grad():
        expected = frechet_distance(*see(lambda x: vit(x.float() / 127.5 - 1)[1]))

    class Inception(torch.nn.Module):
        def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            return x.float().mean((2, 3)) + 9 * float(not return_features)

    torch.jit.script(Inception()).save(str(tmp_path / "inception.pt"))
    argv = ["--fd", str(tmp_path / "a"), str(tmp_path / "b"), "--tokenizer", str(run_folder), "--batch-size", "7"]
    for more, value in (([], expected),
                        (["--inception", str(tmp_path / "inception.pt")], frechet_distance(*see(lambda x: x.float().mean((2, 3)))))):
        sample.main([*argv, *more])
        found = re.search(r"Frechet distance ([\d.]+) in .*, 24 and 16 pictures, 0 broken", capsys.readouterr().out)
        assert value > 0.1 and abs(float(found[1]) - value) < 1e-3 * value
    assert "is no TorchScript file" in sample_words(*argv, "--inception", str(tmp_path / "a/0.png"))
    gather = train_tokenizer.Ranks.gather_rows      # another rank's are counted too, each once
    monkeypatch.setattr(train_tokenizer.Ranks, "gather_rows", lambda self, *rows: gather(self, *rows, {"broken": ["x.png", "x.png"]}))
    sample.main(argv)
    assert "1 broken, whose neighbours stand in" in capsys.readouterr().out


def test_sample_edits(there, photo, tmp_path, capsys):
    contents = []
    for name in ("one", "again"):
        sample.main(["--edit", "make it green", "--image", photo, photo, *there, "--out", str(tmp_path / name), "--guidance", "1"])
        paths = capsys.readouterr().out.split()
        assert len(paths) == len(set(paths)) == 2 == len(os.listdir(tmp_path / name))
        contents.append([open(path, "rb").read() for path in paths])
    assert contents[0] == contents[1] and contents[0][0] == contents[0][1]
    picture = Image.open(paths[0])
    assert picture.width > 1.9 * picture.height


def test_sample_evaluates(mllm_stages, there, tmp_path, capsys):
    """As at the end of training: the same numbers."""
    sample.main(["--eval", "--eval-images", "32", *there, "--out", str(tmp_path)])
    said, metrics = capsys.readouterr().out, json.load(open(tmp_path / "metrics.json"))
    trained = json.load(open(mllm_stages[0] / "metrics.json"))
    assert str(tmp_path / "metrics.json") in said and "understanding all" in said and len(glob.glob(str(tmp_path / "**/painted.png"),
        recursive=True)) == 1
    for name in ("understanding", "caption_exact", "painting", "editing", "reader_accuracy"):
        assert metrics[name] == trained[name]
    assert metrics["fd"] == pytest.approx(trained["fd"], rel=1e-3)


def test_sample_evaluates_images_as_training_did(captioned, tokenizer_folder, tmp_path, monkeypatch, capsys):
    """On the pictures that were held out then, --val-data included, with captions as long as they were."""
    shrink(monkeypatch, replace(TWO_ROWS[0], trains=("projector", "llm")), evaluates=lambda stage: True)
    train_tiny(tmp_path / "run", tokenizer_folder, "--data", str(captioned / "train"), "--val-data", str(captioned / "val"),
               "--text-length", "9")
    before, scored = sorted(glob.glob(str(tmp_path / "run/codes/*"))), []
    score = DualMLLM.score
    monkeypatch.setattr(DualMLLM, "score", lambda self, pictures, captions: scored.extend(captions) or score(self, pictures, captions))
    sample.main(["--eval", "--eval-images", "32", "--device", "cpu", "--tokenizer", str(tokenizer_folder), "--mllm", str(tmp_path / "run"),
                 "--out", str(tmp_path / "out")])
    captions = {(captioned / f"val/{n}.txt").read_text()[:9] for n in range(12, 18)}
    assert {*scored} == captions and sorted(glob.glob(str(tmp_path / "run/codes/*"))) == before
    trained, metrics = (json.load(open(tmp_path / name / "metrics.json")) for name in ("run", "out"))
    assert metrics["caption_retrieval"] == trained["caption_retrieval"]


@pytest.mark.parametrize("n", [2, 16])
def test_sample_evaluates_on_few(there, tmp_path, n):
    sample.main(["--eval", "--eval-images", str(n), *there, "--out", str(tmp_path), "--guidance", "1"])
    assert json.load(open(tmp_path / "metrics.json"))["understanding"]["all"]["n"] <= n


def test_sample_with_an_mllm_bad_input_ends_in_a_sentence(there, mllm_stages, photo, tokenizer, tmp_path, capsys):
    """And nothing is written."""
    out = ["--out", str(tmp_path / "out")]
    other = copy.deepcopy(tokenizer)
    other.quantizer_sem.codebook[0, 0, 0] += 1
    other.save_pretrained(tmp_path / "other", data="plain")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    long = "x" * (json.load(open(mllm_stages[0] / "config.json"))["llm"]["max_position_embeddings"] + 1)
    for argv, words in ((["--paint", "red", *there, "--tokenizer", str(tmp_path / "other")], "another tokenizer"),
                        (["--ask", "what?", "--image", str(tmp_path / "bad.png"), *there], "bad.png: cannot be read as an image"),
                        (["--edit", "what?", "--image", str(tmp_path / "gone.png"), *there], "expected the path of an image"),
                        (["--paint", long, *there], "expected at most"), (["--ask", long, "--image", photo, *there], "expected at most"),
                        (["--paint", "red", *there, "--mllm", str(tmp_path / "nowhere")], "no model in"),
                        (["--eval", *there, "--tokenizer", str(tmp_path / "nowhere")], "no model in")):
        said = sample_words(*argv, *out)
        assert words in said and said.startswith("error: ") and "\n" not in said, argv
    for argv, words in ((["--ask", "what?"], "--image"), (["--edit", "what?"], "--image"),
                        (["--paint", "red", "--ask", "what?", "--image", photo], "expected one of"),
                        ([], "expected one of"), (["--paint", "red", "--top-p", "0"], "--top-p"),
                        (["--paint", "red", "--image", photo], "--image goes with")):
        capsys.readouterr()
        assert sample_words(*argv, *there, *out) == "2" and words in capsys.readouterr().err.splitlines()[-1]
    assert not os.path.exists(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# fuzz: files from strangers. A kind of input is a row of FUZZ: what makes valid files in a folder, which of them are mutated, and what
# reads them as the project does. Whatever is in them, the reader goes on or ends in one sentence: within seconds, without a GiB, without
# running or writing anything.

FUZZ, GUARD, WATCHING = {}, [], []      # kind -> (make, names); while an input is read, GUARD holds its folder
EXECUTED = os.path.join(tempfile.gettempdir(), f"nanodualtoken-executed-{os.getpid()}")       # what no input may make
CPU_SECONDS, ROOM = 5, 1 << 30


class Trespass(BaseException):
    """Not for an `except Exception` to catch."""


RUNS = {"pickle.find_class", "subprocess.Popen", "socket.connect", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn",
        "os.spawn", "os.startfile"}
WRITES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink", "os.link", "os.chmod", "os.chown", "shutil.move",
          "shutil.rmtree"}


def watch(event, args):
    """Audit hook: what reading may never do."""
    if GUARD and event in RUNS:
        raise Trespass(f"{event} {args}")
    if GUARD and (event in WRITES or event == "open" and (set("wax+") & set(args[1] or "")
            or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))) and not isinstance(args[0], int):
        path = os.path.realpath(os.fsdecode(args[0]))
        # torch makes one before it refuses a tar
        passing = event in ("os.mkdir", "os.rmdir", "shutil.rmtree") and os.path.dirname(path) == os.path.realpath(tempfile.gettempdir())
        if not (path + os.sep).startswith((GUARD[0] + os.sep, "/dev/null")) and "__pycache__" not in path and not passing:
            raise Trespass(f"{event} {path}")


def stop(*_):
    raise Trespass("a minute")


@contextlib.contextmanager
def guarded(folder):
    """Within it, what `watch` forbids, a minute, or ROOM bytes more than now are too much."""
    resource = pytest.importorskip("resource", reason="limits are those of Unix")
    limits, begun = resource.getrlimit(resource.RLIMIT_AS), time.process_time()
    if os.path.exists("/proc/self/statm"):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, limits[1]))
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)        # of the clock: for what waits; what computes has CPU_SECONDS
    GUARD.append(os.path.realpath(folder))
    try:
        yield
    finally:
        GUARD.clear()
        signal.alarm(0), signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert (took := time.process_time() - begun) < CPU_SECONDS, f"{took:.1f} s"


def kind(name, *names):
    """Decorates a maker of valid files, which returns their reader; names: those that are mutated."""
    return lambda make: FUZZ.setdefault(name, (make, names)) and make


# --- mutations

def odd(rng):
    """A value that nobody expects."""
    return rng.choice([None, True, False, -1, 0, 1, 2, 3.5, 10 ** 3, 10 ** 6, 2 ** 31, 2 ** 63, 10 ** 30, 1e308, math.nan, math.inf, "",
                       "x", "7", "\ud800", "a\0b", "a\nb",
                       "../../x", "/etc/passwd", "x" * 99_999, [], [1], ["x", None], {}, {"x": 1}, [[[]]], [0.5, 0.5], "@deep", "@long"])


def places(node):
    """(container, key) of everything in it."""
    for key in (list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()):
        yield node, key
        yield from places(node[key])


def change(content, rng, odd=odd):
    """Of a tree of dicts and lists, one to three values replaced, left out, copied, wrapped or scaled."""
    root = [content]
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, key = rng.choice(list(places(root)))
        what = rng.randrange(8)
        if what == 0 and at is not root:
            del at[key]
        elif what == 1:
            at[key] = copy.deepcopy(rng.choice([box[k] for box, k in places(root)]))
        elif what == 2:
            at[key] = [at[key]]
        elif what == 3 and isinstance(at, dict):
            at[rng.choice(("x", "", "type", "keys", "../x"))] = at[key]
        elif what == 4 and type(at[key]) in (int, float):
            at[key] *= rng.choice((-1, 0, 2, 3, 1000, 0.5))
        else:
            at[key] = odd(rng)
    return root[0]


def as_json(content, rng, head=b"") -> bytes:
    text = json.dumps(content, ensure_ascii=rng.random() < 0.7).replace('"@deep"', "[" * 50_000
                                                                        + "]" * 50_000 * rng.randrange(2)).replace('"@long"', "9" * 5000)
    return head + text.encode(rng.choice(["utf-8"] * 9 + ["utf-16", "utf-8-sig", "utf-32"]), "surrogatepass")


def mutate_json(data, rng):
    return as_json(change(json.loads(data), rng), rng)


def mutate_lines(data, rng):
    lines = data.split(b"\n")
    n = rng.randrange(len(lines))
    with contextlib.suppress(ValueError):
        lines[n] = mutate_json(lines[n], rng)
    return b"\n".join(lines)


def mutate_text(data, rng):
    words = [b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b'"', b",", b"\t", b"#", b"\r", b"{}", b"x" * 200_000, b"\xef\xbb\xbf",
             "\u2028".encode(), b"../../x", b"-1", b"99999999999999999999"]
    at = rng.randrange(len(data) + 1)
    return data.decode("utf-8").encode(rng.choice(("utf-16", "utf-32",
        "utf-8-sig"))) if rng.random() < 0.1 else data[:at] + rng.choice(words) * rng.choice((1, 1, 2)) + data[at:]


def mutate_image(data, rng):
    """A number of its header, or another picture: huge, of one pixel a side, of another format."""
    if rng.random() < 0.1:
        return encoded(Image.new("L", rng.choice(((9000, 900), (1, 1), (30_000, 1), (1, 30_000)))),
                       rng.choice(("png", "gif", "bmp", "tiff", "jpeg2000")))
    data, at = bytearray(data), rng.randrange(min(len(data), rng.choice((32, 64, 600))))
    field = struct.pack(rng.choice("<>") + rng.choice("HI"), rng.choice((0, 1, 7, 0x7fff, 0xffff, 60_000)))
    data[at:at + len(field)] = field if rng.random() < 0.7 else rng.choice((b"\xff", b"\x7f", b"\x00")) * 4
    return bytes(data)


def tar_bytes(members):
    """(TarInfo, data, raw size field or None) of each -> a tar, sums right."""
    out = b""
    for info, data, size in members:
        head = bytearray(info.tobuf(tarfile.PAX_FORMAT if info.pax_headers else tarfile.GNU_FORMAT))
        if size is not None:
            head[-512 + 124:-512 + 136] = size
            head[-512 + 148:-512 + 156] = b" " * 8
            head[-512 + 148:-512 + 156] = b"%06o\0 " % sum(head[-512:])
        out += bytes(head) + data + bytes(-len(data) % 512)
    return out + bytes(1024)


def mutate_tar(data, rng):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [[info, tar.extractfile(info).read(), None] for info in tar]
    for _ in range(rng.choice((1, 1, 2, 3))):
        member = rng.choice(members)
        info, what = member[0], rng.randrange(8)
        if what == 0:
            info.name = rng.choice(("/etc/x.png", "../../x.png", "a/../../b.png", "d" * 300 + ".png", "\udcff.png", "", ".png", "._x.png",
                                    "a\nb.png", "0.tar", "x.json", info.name))
        elif what == 1:
            info.type = bytes([rng.choice(b"0123456789LKxgSVDMNZ\0")])
            info.linkname = rng.choice(("0.png", "/etc/passwd", "../../x", ""))
        elif what in (2, 3):
            n = rng.choice((-1, -512, -1024, -2048, -10 ** 6, 2 ** 40, 2 ** 63, 2 ** 80, 10 ** 9, len(member[1]) + 1))
            member[2] = rng.choice((bytes([255 if n < 0 else 128]) + n.to_bytes(11, "big", signed=True), b"zz          ", b"\0" * 12,
                                    b"77777777777\0", b"%011o\0" % rng.randrange(9999)))
        elif what == 4:
            info.pax_headers = dict([rng.choice((("size", "-512"), ("size", "-1024"), ("size", "9" * 30), ("size", "x"),
                                                 ("path", "/etc/x.png"), ("path", "../x.png"), ("hdrcharset", "BINARY"),
                                                 ("path", ""), ("GNU.sparse.size", "-1"), ("GNU.sparse.map", "1,x"),
                                                 ("GNU.sparse.map", "0,99999999999,5,-7"), ("mtime", "nan"), ("uid", "x")))])
            if rng.random() < 0.2:
                info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "10",
                                    "GNU.sparse.name": "x.png"}
        elif what == 5:
            long = tarfile.TarInfo("././@LongLink")
            long.type, long.size = rng.choice((b"L", b"K", b"x", b"g")), 0
            members[0:0] = [[long, b"", None]] * rng.choice((1, 3000))
        elif what == 6:
            inner = tarfile.TarInfo(rng.choice(("in.tar", "in.png")))
            inner.size = len(data)
            members.append([inner, data, None])
        else:
            members.append(member)
    return tar_bytes(members)


def mutate_safetensors(data, rng):
    """Lies in its header."""
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8:8 + size]), data[8 + size:]
    name = rng.choice([name for name in header if name != "__metadata__"])
    row, what = header[name], rng.randrange(8)
    if what == 0:
        row["dtype"] = rng.choice(("F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "U16", "U64",
                                   "F128", ""))
    elif what == 1:
        row["dtype"], other = rng.choice((("I32", 4), ("F16", 2), ("BF16", 2), ("I16", 2), ("BOOL", 1), ("F8_E5M2", 1), ("U32", 4),
                                          ("F4", 0.5), ("C64", 8)))
        row["shape"] = [int((row["data_offsets"][1] - row["data_offsets"][0]) / other)] if rng.random() < 0.5 else row["shape"]
    elif what == 2:
        row["shape"] = rng.choice(([2 ** 62, 4], [0, 2 ** 63], [2 ** 32, 2 ** 32], [-1], row["shape"][::-1], [*row["shape"], 1], [],
                                   [1] * 3000, [0], [2 ** 40, 0]))
    elif what == 3:
        row["data_offsets"] = rng.choice(([0, 0], [0, 2 ** 62], row["data_offsets"][::-1], [0, len(rest)], [8, 12], [2 ** 63, 2 ** 64]))
    elif what == 4:
        other = header[rng.choice([n for n in header if n != "__metadata__"])]
        row.update(copy.deepcopy(other))
    elif what == 5:
        header[rng.choice(("extra", "", "\ud800", "x" * 5000))] = header.pop(name) if rng.random() < 0.5 else dict(row,
            data_offsets=[len(rest), len(rest)], shape=[0])
    else:
        head = mutate_json(json.dumps(header).encode(), rng)
        lie = rng.choice((len(head),) * 4 + (0, 1, len(head) - 1, len(head) + 1, 2 ** 31, 2 ** 62, 2 ** 64 - 1))
        return lie.to_bytes(8, "little") + head + rest
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + rest


def odd_tensor(rng):
    return rng.choice((lambda: torch.zeros(1).expand(2 ** 40), lambda: torch.zeros(1, dtype=torch.float64).expand(2 ** 20, 2 ** 20),
                       lambda: torch.zeros(3, device="meta"),
                       lambda: torch.zeros(3).to_sparse(), lambda: torch.zeros(0), lambda: torch.zeros((), dtype=torch.bool),
                       lambda: torch.zeros(4, 4, dtype=torch.complex64),
                       lambda: torch.full((4, 4), math.nan), lambda: torch.zeros(4, 4, dtype=torch.int64),
                       lambda: torch.nn.Parameter(torch.ones(4)), lambda: torch.zeros(2, 3, 4).transpose(0, 2), lambda: odd(rng),
                       lambda: odd(rng)))()


class Bomb:
    """What unpickling would call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def mutate_pickle(data, rng):
    """A value in it changed, or one that would write a file, or take all memory, if it was made."""
    executed, out = EXECUTED, io.BytesIO()
    content = torch.load(io.BytesIO(data), weights_only=True)
    if rng.random() < 0.3:
        bomb = Bomb(*rng.choice(((open, (executed, "w")), (os.system, (f"touch {executed}",)), (exec, (f"open({executed!r}, 'w')",)),
                                 (Path.touch, (Path(executed),)),
                                 (bytearray, (2 ** 40,)), (torch.Tensor, (2 ** 50,)), (torch.zeros, (2 ** 40,)), (os.mkdir, (executed,)),
                                 (pickle.loads, (pickle.dumps(Path),)))))
        content = rng.choice((bomb, {"model": bomb}, {**content, "x": bomb}, [bomb]))
        if rng.random() < 0.5:
            return pickle.dumps(content, rng.randrange(6))
    else:
        content = change(content, rng, odd_tensor)
    try:
        torch.save(content, out, _use_new_zipfile_serialization=rng.random() < 0.8)
    except Exception:       # not all of it can be saved
        return pickle.dumps({"model": rng.choice((content, 1, "x")) if not isinstance(content, dict) else 1}, 2)
    return out.getvalue()


def mutate_bytes(data, rng):
    """Cut, flip, overwrite, leave out, double, insert, zero; or nothing like it at all."""
    if rng.random() < 0.04:
        return rng.choice((b"", bytes(1000), b"<html>404</html>", pickle.dumps(Bomb(open, (EXECUTED, "w"))),
                           b"\x1f\x8b" + rng.randbytes(99), rng.randbytes(999), b"[" * 99_999))
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 16, 512, len(data) // 4))
        what = rng.randrange(8)
        if what == 0:
            del data[at:]
        elif what in (1, 2) and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif what == 3:
            data[at:at + size] = rng.randbytes(len(data[at:at + size]))
        elif what == 4:
            del data[at:at + size]
        elif what == 5:
            data[at:at] = data[at:at + size]
        elif what == 6:
            data[at:at] = rng.randbytes(size)
        else:
            data[at:at + size] = bytes(len(data[at:at + size]))
    return bytes(data)


MUTATE = {".json": mutate_json, ".jsonl": mutate_lines, ".txt": mutate_text, ".csv": mutate_text, ".tiktoken": mutate_text,
          ".tar": mutate_tar, ".safetensors": mutate_safetensors,
          ".pt": mutate_pickle, ".pth": mutate_pickle}


# --- kinds

IMAGE_MODES = {"AVIF": "RGB", "BLP": "P", "BMP": "RGB", "DDS": "RGBA", "DIB": "L", "GIF": "P", "ICNS": "RGBA", "ICO": "RGBA", "IM": "RGB",
               "JPEG": "CMYK", "JPEG2000": "RGB", "MPO": "RGB", "MSP": "1",
               "PCX": "P", "PNG": "I;16", "PPM": "RGB", "QOI": "RGB", "SGI": "RGB", "SPIDER": "F", "TGA": "RGBA", "TIFF": "RGB",
               "WEBP": "RGBA", "XBM": "1"}


def training_goes_on(source):
    """Every sample of it, also by the middle; the one in question may be replaced, and is then reported."""
    data, reports = images.ImageData(source, 16), []
    for train in (True, False):
        data.train = train
        for position in range(len(data)):
            picture, caption, broken = data.sample(position)
            assert picture.shape == (3, 16, 16) and isinstance(caption, str)
            BYTES.encode(caption), CAPTIONS.ids([caption])
            reports += broken
    return not data.broken + reports


CAPTIONS = TextVocabulary(TextConfig(vocab_size=257, max_position_embeddings=8))


def make_image(name, folder):
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    noise[:20] = 90
    picture = Image.fromarray(noise) if name != "ICNS" else Image.fromarray(noise).resize((64, 64))
    mode = IMAGE_MODES[name]
    picture = Image.fromarray(noise[..., 0].astype(np.uint16) * 256) if mode == "I;16" else picture.convert(mode)
    options = dict(compression="tiff_lzw", exif=Image.Exif()) if name == "TIFF" else dict(save_all=True,
        append_images=[picture]) if name in ("GIF", "WEBP", "MPO") else {}
    (folder / "a.png").write_bytes(encoded(picture, name, **options))       # not by its path: Pillow's SPIDER takes over the suffix that it
                                                                            # is saved under
    flat(7).save(folder / "b.png")

    def read():
        picture, reason = images.Pictures([str(folder / "a.png")], 16)[0]
        assert picture.shape == (3, 16, 16)
        if not training_goes_on(str(folder)) or reason:
            raise ValueError(reason or "b.png: reported by training alone")
    return read


for name in IMAGE_MODES:
    FUZZ["image " + name] = (functools.partial(make_image, name), ["a.png"])


@kind("shard", "x.tar")
def make_shard(folder):
    flat(7).save(folder / "b.png")
    shard(folder / "x.tar", range(3))

    def read():
        whole = training_goes_on(str(folder))
        images.ImageData(str(folder / "x.tar"), 16)
        if not whole:
            raise ValueError("x.tar: reported")
    return read


@kind("index", "i.npz")
def make_index(folder):
    (folder / "in").mkdir()
    shard(folder / "in/x.tar", range(3))
    os.environ["NANODUALTOKEN_INDEX"] = str(folder)

    def read():
        os.environ["NANODUALTOKEN_INDEX"] = str(folder)
        for path in folder.glob("*.npz"):
            if path.name != "i.npz":
                os.replace(folder / "i.npz", path)
        try:
            assert training_goes_on(str(folder / "in/x.tar"))
        finally:
            os.environ["NANODUALTOKEN_INDEX"] = ""
    images.ImageData(str(folder / "in/x.tar"), 16)
    os.environ["NANODUALTOKEN_INDEX"] = ""
    shutil.copyfile(next(folder.glob("*.npz")), folder / "i.npz")
    return read


@kind("captions", "a.txt", "metadata.jsonl", "c.json")
def make_captions(folder):
    (folder / "in").mkdir()
    for name in "ab":
        flat(ord(name)).save(folder / f"in/{name}.png")
    (folder / "a.txt").write_text("a red circle")
    (folder / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "a blue square"}\n\n')
    (folder / "c.json").write_text('{"caption": "a green cross", "url": "x", "size": [1, 2]}')

    def read():
        for name in ("a.txt", "metadata.jsonl"):
            os.replace(folder / name, folder / "in" / name)
        write_tar(folder / "in/x.tar", [("c.png", encoded(flat(3))), ("c.json", (folder / "c.json").read_bytes())])
        if not training_goes_on(str(folder / "in")):
            raise ValueError("in: reported")
    return read


@kind("records", "chats.json", "chats.jsonl", "documents.jsonl")
def make_records(folder):
    chats = [{"id": n, "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat \"is\" this?"},
                                                           {"from": "gpt", "value": "A cat."}]} for n in range(3)]
    (folder / "chats.json").write_text(json.dumps(chats, indent=1))
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "documents.jsonl").write_text('[{"image": "a.png"}, {"text": "make it blue", "loss": false}, {"image": "b.png", "paint": '
                                            'true}]\n[{"text": "words"}, {"image": "a.png"}]\n')

    def read():
        for name, parse in (("chats.json", records.conversation), ("chats.jsonl", records.conversation),
                            ("documents.jsonl", records.document)):
            of = train_mllm.RecordSequences.__new__(train_mllm.RecordSequences)
            of.text, of.positions, of.paints, of.limit, of.records = BYTES, 4, True, 200, records.Records([(str(folder / name), parse)])
            good, broken = of.read(train_tokenizer.Ranks("cpu"))
            paths = sorted({path for *_, shown in good for path in shown})
            "\n".join(map(train_mllm.state, paths)).encode("utf-8", "surrogatepass")
            broken += [(0, reason) for _, reason in map(images.Pictures(paths, 16).__getitem__, range(len(paths)))
                       if "No such file" not in reason]
            for _, reason in broken:
                one_sentence(reason)
            if broken or len(good) < 2:
                raise ValueError(f"{name}: {len(broken)} records left out")
    return read


@kind("answers", "ask.jsonl")
def make_answers(folder):
    flat(3).save(folder / "a.png")
    (folder / "ask.jsonl").write_text('{"image": "a.png", "question": "what is this?"}\n{"image": "a.png"}\n')
    stubs = (SimpleNamespace(answer_file=str(folder / "ask.jsonl"), out=str(folder), batch_size=1),
             SimpleNamespace(config=SimpleNamespace(vision=SimpleNamespace(image_size=16))),
             SimpleNamespace(config=SimpleNamespace(positions=4), lacks_room=lambda asked, room: "too long" * (len(asked[1]) > 1000),
                             answer=lambda codes, questions: [BYTES.decode(BYTES.encode(q)) for q in questions]), lambda x: x,
             train_tokenizer.Ranks("cpu"))

    def read():
        sample.answer_file(*stubs)
        if len((folder / "answers.jsonl").read_text().splitlines()) < 2:
            raise ValueError("ask.jsonl: left out")
    return read


@kind("classes", "names.txt", "templates.txt", "pairs.csv", "pairs.txt")
def make_evaluation(folder):
    for name in ("cat", "wild_dog"):
        (folder / name).mkdir()
        flat(5).save(folder / name / "a.png")
    (folder / "names.txt").write_text("cat, tabby\nwild dog\n")
    (folder / "templates.txt").write_text("a photo of a {}.\na {}.\n")
    (folder / "pairs.csv").write_text('image,caption\ncat/a.png,"a cat, asleep"\nwild_dog/a.png,a dog\nno.png,nothing\n')
    (folder / "pairs.txt").write_text("cat/a.png#0\ta cat\nwild_dog/a.png#0\ta dog\n")

    def read():
        _, _, prompts = train_tokenizer.read_classes(str(folder), str(folder / "names.txt"), str(folder / "templates.txt"))
        CAPTIONS.ids(sum(prompts, []))
        for name in ("pairs.csv", "pairs.txt"):
            CAPTIONS.ids(train_tokenizer.read_captions(str(folder / name), "")[1])
    return read


def used(model):
    """A little of what is done with a model that was read."""
    with torch.no_grad():
        if isinstance(model, DualTokenizer):
            side = model.config.vision.image_size
            assert model.decode(model.encode(torch.zeros(1, 3, side, side))).shape[0] == 1
        elif isinstance(model, SigLIP):
            side = model.vision_config.image_size
            model(torch.zeros(1, 3, side, side), torch.zeros(1, model.text_config.max_position_embeddings, dtype=torch.int64))
        elif isinstance(model, DualMLLM):
            if model.config.llm.max_position_embeddings > model.config.positions + 40:
                model.paint(["a"])
        else:
            model(torch.zeros(1, 3, dtype=torch.int64))


def small_tokenizer():
    return DualTokenizer(TokenizerConfig(vision=VisionConfig(32, 32, 3, 2, image_size=16, patch_size=8),
                                         text=TextConfig(16, 16, 1, 2, vocab_size=257, max_position_embeddings=8), codebook_size=8,
                                         depth=2, code_dim=8, decoder_channels=32, decoder_multipliers=(1, 1, 1, 1), decoder_blocks=0,
                                         decoder_in=32))


@kind("tokenizer", "config.json", "config.json", "model.safetensors")
def make_tokenizer(folder):
    small_tokenizer().save_pretrained(str(folder), teacher="siglip", data="plain")

    def read():
        train_tokenizer.teacher_of(str(folder))
        used(DualTokenizer.from_pretrained(str(folder)))
    return read


@kind("SigLIP", "config.json", "preprocessor_config.json", "model.safetensors")
def make_siglip(folder):
    small_tokenizer().siglip_model.save_pretrained(str(folder))
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": {"height": '
                                                     '16}}')
    return lambda: used(SigLIP.from_pretrained(str(folder)))


@kind("CLIP", "config.json", "preprocessor_config.json", "model.safetensors")
def make_clip(folder):
    SigLIP(VisionConfig(32, 32, 2, 2, image_size=16, patch_size=8, class_token=True, projection_dim=8),
           TextConfig(16, 16, 1, 2, vocab_size=257, max_position_embeddings=8, causal=True)).save_pretrained(str(folder))
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.4], "image_std": [0.5, 0.5, 0.3]}')
    return lambda: used(SigLIP.from_pretrained(str(folder), 24))


@kind("release", "config.json", "config.json", "dualtoken.pt")
def make_release(folder):
    """The released layout, of a small tokenizer, as one .pt file."""
    model = small_tokenizer()
    c, weights = model.config, model.state_dict()
    for stream in ("quantizer_pix", "quantizer_sem"):
        for ours, theirs in (("codebook", "weight"), ("ema_sum", "embed_ema"), ("ema_count", "cluster_size_ema")):
            table = weights.pop(f"{stream}.{ours}")[0]
            weights |= {f"{stream}.codebooks.{d}.{theirs}": torch.cat([table, table[:1]]) if theirs == "weight" else table.clone()
                        for d in range(c.depth)}
        del weights[f"{stream}.age"], weights[f"{stream}.updates"]
    torch.save({"state_dict": weights}, folder / "dualtoken.pt")
    sizes = {name: vars(part) for name, part in (("vision_config", c.vision), ("text_config", c.text))}
    vq = {"n_embed": 8, "code_shape": [2, 2, 2], "embed_dim": 8, "shared_codebook": True}
    (folder / "config.json").write_text(json.dumps({"siglip": sizes, "rqvaesiglip": {
        "layer_recon": c.shallow_layer, "layer_sem": c.deep_layer, "vq_pix": vq, "vq_sem": vq, "decoder_latent_shape": [2, 2],
        "ddconfig": {"attn_resolutions": [2], "resolution": 16, "ch_mult": [1, 1, 1, 1], "ch": 32, "num_res_blocks": 0,
                     "decoder_in_channels": 32}}}))
    return lambda: used(DualTokenizer.from_released(str(folder)))


@kind("LLM", "config.json", "model.safetensors.index.json", "part-0.safetensors")
def make_llm(folder):
    weights = LLM(small_llm()).state_dict()
    for n in range(2):
        save_file({name: weights[name] for name in list(weights)[n::2]}, folder / f"part-{n}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: f"part-{i % 2}.safetensors" for i,
                                                                                    name in enumerate(weights)}}))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **vars(small_llm()), "rope_scaling": {"type": "default"},
                                                    "head_dim": 8}))

    def read():
        with contextlib.suppress(ValueError):
            hub.weight_files(str(folder))
        used(LLM.from_pretrained(str(folder)))
    return read


@kind("MLLM", "config.json", "config.json", "model.safetensors")
def make_mllm(folder):
    small_mllm().save_pretrained(str(folder))
    return lambda: used(DualMLLM.from_pretrained(str(folder)))


def make_vocabulary(layout, folder):
    """300 tokens, as KNOWN is told to know them."""
    letters = list(mllm.BYTE)
    vocab, merges = {letter: i for i, letter in enumerate(letters)}, [f"{a} {b}" for a, b in zip(letters[:44], letters[60:104])]
    vocab |= {merge.replace(" ", ""): 256 + i for i, merge in enumerate(merges)}
    content = {"tokenizer.json": json.dumps({"added_tokens": [{"id": 300, "content": SPECIALS[0]}],
                                             "model": {"vocab": vocab, "merges": merges}}), "vocab.json": json.dumps(vocab),
               "merges.txt": "#version: 0.2\n" + "\n".join(merges),
               "qwen.tiktoken": "".join(f"{base64.b64encode(bytes(mllm.BYTE[c] for c in token)).decode()} {i}\n" for token,
                                        i in vocab.items())}
    for name in layout:
        (folder / name).write_text(content[name], encoding="utf-8")
    return lambda: TextTokenizer.from_folder(str(folder)).encode("a caption, of 2 words")


for names in (["tokenizer.json"], ["vocab.json", "merges.txt"], ["qwen.tiktoken"]):
    FUZZ[" + ".join(names)] = functools.partial(make_vocabulary, names), names


@kind("SigLIP's tokenizer.json", "tokenizer.json")
def make_text_vocabulary(folder):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed: no vocabulary of SigLIP's")
    vocab = [["</s>", 0.0], ["<unk>", 0.0], *([letter, -3.0] for letter in "\u2581" + string.ascii_lowercase)]
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
                                                       "post_processor": None, "decoder": None, "truncation": None, "padding": None,
                                                       "model": {"type": "Unigram", "unk_id": 1, "vocab": vocab, "byte_fallback": False}}))
    return lambda: TextVocabulary(TextConfig(vocab_size=len(vocab), max_position_embeddings=8),
                                  str(folder)).ids(["a photo of a cat", "caf\u00e9"])


@kind("checkpoint", "state.pt", "state.pt", "log.jsonl", "metrics.json")
def make_checkpoint(folder):
    def stage():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        made = SimpleNamespace(model=model, lr=0.1)
        train_tokenizer.Stage.optimise(made, (0.9, 0.95), 0.1, [model[0].weight])
        return SimpleNamespace(args=SimpleNamespace(keep_checkpoints=1), counted={"odd": torch.zeros(())}, name="tokenizer",
                               folder=str(folder), model=model, optimizer=made.optimizer, ranks=train_tokenizer.Ranks("cpu"), steps=9,
                               settings={"lr": 0.1, "sizes": {"width": [1, 2]}},
                               extra_state=lambda: {"muon": made.muon}, save=lambda weights: None)

    def step(stage):
        stage.model(torch.ones(2, 3)).sum().backward()
        for optimizer in (stage.optimizer, *stage.extra_state().values()):
            train_tokenizer.step_or_skip(optimizer, 0.1, torch.tensor(False))
    first = stage()
    step(first)
    (folder / "log.jsonl").write_text("".join(json.dumps({"step": n, "loss": 0.5, "broken": ["a.png"]}) + "\n" for n in (1, 2, 3)))
    train_tokenizer.save_state(first, 2, 1.5, {"sums": {"loss": torch.ones(1, 3)}, "bad": torch.zeros(3), "low": {"pixel": 1},
                                               "counted": {"odd": torch.zeros(())}})
    (folder / "metrics.json").write_text(json.dumps({"settings": first.settings, "psnr": 20.0}))
    (folder / "model.safetensors").write_bytes(b"")

    def read():
        again = stage()
        train_tokenizer.kept(again)
        at, seconds, _ = train_tokenizer.load_state(again)
        assert 0 <= at <= again.steps and seconds >= 0
        step(again)
        train_tokenizer.draw_curves(train_tokenizer.read_log(again.folder), str(folder / "curves.png"))
    return read


@kind("hub", "refs-main", "model.safetensors.index.json")
def make_hub(folder):
    found = folder / "hub/models--a--b/snapshots/1"
    found.mkdir(parents=True)
    for name in ("config.json", "part.safetensors"):
        (found / name).write_text("{}")
    (folder / "refs-main").write_text("1\n")
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "part.safetensors", "b": '
                                                         '"part.safetensors"}}')

    def read():
        (folder / "hub/models--a--b/refs").mkdir()
        os.replace(folder / "refs-main", folder / "hub/models--a--b/refs/main")
        os.replace(folder / "model.safetensors.index.json", found / "model.safetensors.index.json")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_HUB_CACHE", str(folder / "hub"))
            if not hub._cached("a/b"):
                raise ValueError("hub: not there")
        hub.weight_files(str(found))
    return read


# --- the run

def one_sentence(words):
    assert 10 < len(words) < 2000 and "\n" not in words.strip(), words
    # torch makes what these ask for, or refuses
    assert "MemoryError" not in words and "allocate" not in words or "state.pt" in words or "dualtoken.pt" in words, words


@pytest.fixture
def few_words(monkeypatch):
    """A vocabulary of 300 tokens is known, pictures are large from 4 million pixels on, and the guard stands."""
    monkeypatch.setitem(KNOWN, 300, (mllm.GPT2_SPLIT, False, SPECIALS[:1], 0, 256))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 22)
    importlib.import_module("torch._dynamo")        # which torch imports where it is first needed, at its leisure
    if not WATCHING:
        sys.addaudithook(watch)     # there is no way to take it away again
        WATCHING.append(True)


def fuzz(name, tmp_path, numbers, seed):
    """Inputs of one kind, a function of seed and number -> how many were accepted and refused. Fails with all that went wrong."""
    (make, names), folder, whole, counts, wrong = FUZZ[name], tmp_path / "in", tmp_path / "whole", Counter(), []
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # Pillow will drop IM
        read = make(folder)
    folder.rename(whole)
    for number in numbers:
        shutil.copytree(whole, folder)
        rng = random.Random(f"{seed} {name} {number}")
        if number:      # the first is as it was, and good
            path = folder / names[number % len(names)]
            data, structured = path.read_bytes(), mutate_image if name.startswith("image") else MUTATE.get(path.suffix)
            path.write_bytes(structured(data, rng) if structured and rng.random() < 0.6 else mutate_bytes(data, rng))
        try:
            with guarded(folder), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read()
            counts["accepted"] += 1
        except (ValueError, OSError) as error:
            counts["refused"] += 1
            try:
                one_sentence(str(error))
                assert number, error
                assert any(word in str(error) for word in [str(folder), *os.listdir(folder), *names]), f"names no file: {error!r}"
            except AssertionError as error:
                wrong.append(f"{name} {number}: {error}"[:300])
        except (Exception, Trespass) as error:
            wrong.append(f"{name} {number}: " + "".join(traceback.format_exception(error))[-1500:])
        assert not os.path.exists(EXECUTED), (name, number)
        shutil.rmtree(folder)
    assert not wrong, f"{len(wrong)} of {len(numbers)}:\n" + "\n".join(wrong)
    return counts


SEED = 7


@pytest.mark.parametrize("name", FUZZ)
def test_fuzz_a_few(name, tmp_path, few_words):
    fuzz(name, tmp_path, range(5), SEED)


@slow
@pytest.mark.parametrize("name", FUZZ)
def test_fuzz_many(name, tmp_path, few_words, capsys):
    """With NANODUALTOKEN_FUZZ as many inputs of each kind as it says."""
    begun, number = time.time(), int(os.environ.get("NANODUALTOKEN_FUZZ", 100))
    counts = fuzz(name, tmp_path, range(number), SEED)
    with capsys.disabled():
        print(f"fuzz, {name}: {number} inputs, {counts['accepted']} accepted, {counts['refused']} refused, "
              f"seed {SEED}, {time.time() - begun:.0f} s")


# --- what it found once

def sized(name, size, kind=tarfile.REGTYPE):
    """A member with this size field, as tar's binary numbers."""
    info = tarfile.TarInfo(name)
    info.type = kind
    return info, b"", bytes([255 if size < 0 else 128]) + size.to_bytes(11, "big", signed=True)


@pytest.mark.parametrize("member", [[sized("a.png", -512)], [sized("a.png", -10 ** 9)], [sized("a.png", 2 ** 80)],
                                    [sized("a.png", 2 ** 40, tarfile.GNUTYPE_LONGNAME)],
                                    [sized("a.png", 0, tarfile.GNUTYPE_LONGNAME)] * 3000],
                                    ids=["back", "far back", "far", "long name", "names"])
def test_fuzz_headers_of_a_shard_lead_nowhere(member, tmp_path, few_words):
    good = tarfile.TarInfo("0.png")
    good.size = len(encoded(flat(3)))
    (tmp_path / "x.tar").write_bytes(tar_bytes([(good, encoded(flat(3)), None), *member]))
    with guarded(tmp_path):
        data = images.ImageData(str(tmp_path), 8)
        assert len(data) == 1 and "x.tar" in data.broken[0] and data.sample(0)[0].shape == (3, 8, 8)


def test_fuzz_what_is_no_file_is_no_picture(tmp_path, few_words):
    """A pipe would wait, and /dev/zero has no end."""
    flat(3).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png"), os.symlink("/dev/zero", tmp_path / "c.png"), (tmp_path / "e").mkdir(), os.symlink(tmp_path / "e",
        tmp_path / "d.png")
    with guarded(tmp_path):
        data = images.ImageData(str(tmp_path), 8)
        assert len(data) == 3 and [data.sample(i)[0][2].unique().tolist() for i in range(3)] == [[7]] * 3
        assert all("expected a file" in images.Pictures([str(tmp_path / name)], 8)[0][1] for name in ("b.png", "c.png", "d.png"))


def test_fuzz_half_letters_and_other_names_stop_nothing(monkeypatch, tmp_path):
    """JSON can hold half a letter, which is no UTF-8; and what a terminal cannot write is written otherwise."""
    assert torch.equal(CAPTIONS.ids(["a\ud800b"]), CAPTIONS.ids(["a?b"])) and BYTES.decode(BYTES.encode("a\ud800b")) == "a\ufffdb"
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    train_tokenizer.run(lambda: print("\udcff.png cannot be read"))
    out.flush()
    assert out.buffer.getvalue() == b"\\udcff.png cannot be read\n"
    def silent():
        raise ValueError
    with pytest.raises(SystemExit, match="error: ValueError"):
        train_tokenizer.run(silent)


def test_fuzz_a_string_without_end_is_found_at_once(tmp_path, few_words):
    (tmp_path / "chats.json").write_text('[{"a": "' + '\\"' * 100_000)
    with guarded(tmp_path), pytest.raises(ValueError, match="its string at byte 7 has no end"):
        records.Records([(str(tmp_path / "chats.json"), records.conversation)])


@pytest.mark.parametrize("where, change, words", [
    ("vision", {"hidden_size": 1 << 20, "num_attention_heads": 1}, "differences"),
    ("vision", {"num_hidden_layers": 10 ** 9}, "num_hidden_layers is 1000000000, expected a whole number from 0 to 1,000"),
    ("vision", {"image_size": 1 << 20}, "differences"), ("text", {"vocab_size": 10 ** 15}, "vocab_size is"),
    ("", {"codebook_size": 1 << 24}, "differences"), ("", {"depth": 10 ** 6}, "depth is 1000000"),
    ("", {"latent_grid": 10 ** 5}, "make pictures of 800000 pixels"), ("", {"decoder_multipliers": [1] * 40}, "decoder_multipliers"),
    ("", {"decoder_blocks": 10 ** 7}, "decoder_blocks"),
    ("", {"code_dim": 8.0}, "code_dim is 8.0"), ("", {"design": {"x": 1}}, "design is"),
    ("vision", {"pixel_std": [0, 1, 1]}, "deviations above 0"), ("vision", {"layer_norm_eps": math.nan}, "layer_norm_eps is nan"),
    ("vision", {"timm": {"model_name": "hf-hub:a/b"}}, "weights come from model.safetensors alone"),
    ("vision", {"timm": {"model_name": "tiny", "checkpoint_path": "x.pth"}}, "model.safetensors alone")])
def test_fuzz_absurd_sizes_are_refused_before_they_are_made(where, change, words, tmp_path, few_words):
    small_tokenizer().save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (config[where] if where else config).update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with guarded(tmp_path):
        with pytest.raises(ValueError, match=words) as caught:
            DualTokenizer.from_pretrained(str(tmp_path))
        one_sentence(str(caught.value))


def test_fuzz_a_tensor_is_no_larger_than_its_file(tmp_path, few_words):
    for value in (torch.zeros(1, dtype=torch.float64).expand(2 ** 40), torch.zeros(3, device="meta"), torch.zeros(3).to_sparse()):
        torch.save({"a.weight": value}, tmp_path / "a.pth")
        with guarded(tmp_path):
            refuses(lambda: train_tokenizer.load_lpips(str(tmp_path / "a.pth"), ""), "a.pth holds 'a.weight'", "larger than the file")


# ---------------------------------------------------------------------------------------------------------------------
# the project

def test_project_readme_commands_and_files_exist():
    text = open(os.path.join(HERE, "README.md"), encoding="utf-8").read()
    every = text + Path(HERE, "assets/exercises.md").read_text("utf-8")
    parsers = {"train_tokenizer.py": train_tokenizer.flags, "train_mllm.py": train_mllm.flags, "sample.py": sample.flags}
    commands = re.findall(r"^ *(?:python|torchrun(?: --\S+)+) (\w+\.py)(.*?)(?:#.*)?$", every.replace("\\\n", " "), re.M)
    assert {script for script, _ in commands} == set(parsers)
    for script, arguments in commands:
        parsers[script](shlex.split(arguments))         # exits where a flag is unknown
    for path in re.findall(r"\]\(((?:assets|data)/[^)]+)\)", text) + re.findall(r"^\| `([\w/.]+)` \| \d+", text, re.M):
        assert os.path.exists(os.path.join(HERE, path)), path
    anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", text, re.M)}
    assert {*re.findall(r"\]\(#([^)]+)\)", text)} <= anchors
    for path, lines in re.findall(r"^\| `([\w/.]+)` \| (\d+)", text, re.M):
        assert int(lines) == open(os.path.join(HERE, path),
                                  encoding="utf-8").read().count("\n"), f"README: {path} has another number of lines"


@pytest.mark.parametrize("script", ["train_tokenizer.py", "train_mllm.py", "sample.py"])
def test_project_every_flag_is_read_and_explained(script):
    text = open(os.path.join(HERE, script), encoding="utf-8").read()
    for flag, rest in re.findall(r'add_argument\("--([\w-]+)"(.*?)(?=add_argument|\n    \w+ = )', text, re.S):
        assert re.search(rf"args\.{flag.replace('-', '_')}\b|\"{flag.replace('-', '_')}\"", text), flag
        assert "help=" in rest, flag


def test_project_no_line_is_wider_than_140_columns():
    for path in glob.glob(os.path.join(HERE, "*.py")) + glob.glob(os.path.join(HERE, "data/*.py")):
        wide = [number for number, line in enumerate(open(path, encoding="utf-8"), 1) if len(line.rstrip("\n")) > 140]
        assert not wide, (path, wide)


def test_project_imports_only_what_requirements_name():
    allowed = {"torch", "numpy", "PIL", "tqdm", "safetensors", "tiktoken", "data", "rvq", "losses", "tokenizer", "mllm", "train_tokenizer",
               "train_mllm", "tokenizers"}
    named = open(os.path.join(HERE, "requirements.txt"), encoding="utf-8").read().replace("pillow", "PIL")
    for path in glob.glob(os.path.join(HERE, "*.py")) + glob.glob(os.path.join(HERE, "data/*.py")):
        if not path.endswith("test_all.py"):
            tree = ast.parse(open(path, encoding="utf-8").read())
            optional = {"timm", "triton", "transformers", "vector_quantize_pytorch"}        # imported where they are asked for
            assert not optional & {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
            nodes = list(ast.walk(tree))
            found = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names} | {n.module.split(".")[0]
                for n in nodes if isinstance(n, ast.ImportFrom)}
            found -= {*optional, *sys.stdlib_module_names}
            assert found <= allowed, (path, found - allowed)
            assert all(name in named for name in found & {"torch", "numpy", "PIL", "tqdm", "safetensors", "tiktoken"})


# The exercises that empty a function: (file, function, -k of its component's unit group, -k of the tests that are named).
EXERCISES = re.findall(r'<!-- empty (\S+) (\S+), group (\S+) -->\n```\npython -m pytest test_all\.py -q -k "(.+)"\n```',
                       Path(HERE, "assets/exercises.md").read_text("utf-8"))


def emptied(source: str, name: str) -> str:
    """A file's text with the body of one function ("f" or "Class.f"), but its docstring, taken out."""
    node = ast.parse(source)
    for part in name.split("."):
        node = next(n for n in node.body if getattr(n, "name", "") == part)
    body, lines = node.body[ast.get_docstring(node) is not None:], source.splitlines(keepends=True)
    return "".join([*lines[:body[0].lineno - 1], " " * body[0].col_offset + "raise NotImplementedError\n", *lines[body[-1].end_lineno:]])


@functools.cache
def every_test() -> list[str]:
    names = []

    class Listener:
        def pytest_collection_finish(self, session):
            names.extend(item.name for item in session.items)
    assert pytest.main([os.path.join(HERE, "test_all.py"), "-q", "--collect-only", "-p", "no:cacheprovider"], plugins=[Listener()]) == 0
    return names


def taken(words: str) -> set[str]:
    """The names of the tests that `-k words` takes: and, or, not and brackets between parts of names."""
    return {test for test in every_test() if eval(re.sub(r"[^\s()]+", lambda word: word[0] if word[0] in ("and", "or", "not")
                                                         else str(word[0].lower() in test.lower()), words))}


def test_project_exercises_name_functions_and_tests():
    text = Path(HERE, "assets/exercises.md").read_text("utf-8")
    assert text.count("<!-- empty ") == len(EXERCISES) >= 8 and len(re.findall(r"^## \d+\. .+ \(.+\)$", text,
                                                                               re.M)) == text.count("\n## ") >= 10
    for path, name, group, words in EXERCISES:
        source = Path(HERE, path).read_text("utf-8")
        assert f"`{name}` in `{path}`" in text and emptied(source, name) != source
        assert taken(words) and taken(words) <= taken(group), name
    for words in re.findall(r'pytest test_all\.py -q -k "(.+?)"', text):
        assert taken(words), words


@slow
@pytest.mark.parametrize("number", range(len(EXERCISES)))
def test_project_an_emptied_function_fails_the_tests_of_its_exercise(tmp_path, number):
    """These and no others of its component's unit group. (By number, so that -k finds no test by the name of a function.)"""
    path, name, group, words = EXERCISES[number]
    shutil.copytree(HERE, tmp_path / "copy", ignore=shutil.ignore_patterns(".git", "out", "__pycache__", ".pytest_cache"))
    (tmp_path / "copy" / path).write_text(emptied(Path(HERE, path).read_text("utf-8"), name), "utf-8")
    subprocess.run([sys.executable, "-m", "pytest", "test_all.py", "-q", "--tb=no", "-k", group, "-p", "no:cacheprovider", "--junitxml",
                    tmp_path / "tests.xml"],
                   cwd=tmp_path / "copy", capture_output=True)
    tests = {case.get("name"): {part.tag for part in case} for case in ElementTree.parse(tmp_path / "tests.xml").iter("testcase")}
    skipped = {test for test, parts in tests.items() if "skipped" in parts}
    assert {test for test, parts in tests.items() if parts & {"failure", "error"}} == taken(words) - skipped, name
