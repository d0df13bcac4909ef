"""The tests, grouped by component: `pytest test_all.py -q`, or one group, `pytest test_all.py -k rvq`. Groups: shapes, reader, images, rvq, tokenizer, losses,
train, sample, project. Seconds each. Tests against reference numbers and real images find them through the variable NANODUALTOKEN_SHARED and
skip, with the reason, where it is not set; parity tests skip where transformers is not installed."""

import ast
import copy
import glob
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import EpsImagePlugin, Image, ImageCms
from safetensors.torch import load_file, save_file

import sample
import train_tokenizer
from data import images, shapes
from data.shapes import World
from losses import (Discriminator, Weights, adaptive_weight, discriminator_loss, distance, frechet_distance, psnr, sigmoid_contrastive, ssim,
                    tokenizer_losses, weighted)
from rvq import ResidualVQ, histogram, usage_and_perplexity
from tokenizer import DualTokenizer, Projection, SigLIP, TextConfig, VisionConfig, load_weights, preset_config, text_ids

HERE = os.path.dirname(os.path.abspath(__file__))
SHARED = os.environ.get("NANODUALTOKEN_SHARED", "/nowhere")
EMOJI, PHOTOS = os.path.join(SHARED, "data/fluent-emoji"), os.path.join(SHARED, "data/photos")
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
                drawn = {(o.colour, o.shape) for scene in shapes.World(difficulty, split=split, single=single).scenes(range(2000)) for o in scene}
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
        scenes, claims = world.scenes(range(2000)), world.claims(range(2000))
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
        assert scenes[7] == list(scenes)[7]
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
    assert {"a red circle left of a blue square", "a blue square right of a red circle", "a blue square larger than a red circle", "two shapes",
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
                assert {"left": old.x - new.x, "right": new.x - old.x, "up": old.y - new.y, "down": new.y - old.y}[text.split()[-1]] >= shapes.MARGIN
            assert {(o.colour, o.shape) for o in scene} <= set(shapes.seen_pairs(world.difficulty))
    assert set(done) == set(shapes.EDITS) and min(done.values()) > 20


@pytest.mark.parametrize("difficulty, size, least", [("plain", 32, 0.99), ("plain", 64, 0.99), ("textured", 64, 0.98), ("textured", 32, 0.97),
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
    for wrong in (shapes.Scene((a,)), shapes.Scene((a, b._replace(colour="red"))), shapes.Scene((a, b._replace(x=0.5))), shapes.Scene((a, a)),
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
    with open(tmp_path / "a.png", "rb") as file:
        assert images.decode(file).getpixel((0, 0))[0] == 77
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()):
        assert images.decode(source).getpixel((0, 0))[0] == 77
    with pytest.raises(FileNotFoundError):
        images.decode(tmp_path / "b.png")


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
    (tmp_path / "sub/metadata.jsonl").write_text('{"file_name": "B.JPG", "text": "bee"}\n\n{"file_name": "deep/c.webp", "caption": "sea"}\n')
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


def test_images_missing_sources_in_words(tmp_path):
    shard(tmp_path / "0.tar", [1])
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "none.tar", [("a.txt", b"no picture")])
    (tmp_path / "zip.zip").write_bytes(b"PK")
    t = str(tmp_path)
    for source, error, words in [("/gone", FileNotFoundError, "/gone"), ("/{0..1}.tar", FileNotFoundError, "/1.tar"),
                                 ("/{3..1}.tar", ValueError, "empty"),
                                 ("/*.gz", FileNotFoundError, r"\*.gz"), ("/empty", ValueError, "no images"), ("/none.tar", ValueError, "no images"),
                                 ("/zip.zip", ValueError, "folders and .tar files")]:
        with pytest.raises(error, match=words):
            images.ImageData(t + source, 8)
    with pytest.raises((ValueError, FileNotFoundError)):
        images.ImageData("", 8)


def test_images_cut_tars_are_named(tmp_path):
    whole = shard(tmp_path / "whole.tar", range(6))
    data = open(whole, "rb").read()
    with tarfile.open(whole) as tar:
        headers = [member.offset for member in tar]
    expected = {"in_data": (data[:headers[7] + 540], 3), "in_header": (data[:headers[6] + 100], 3), "between": (data[:headers[6]], 3),
                "damaged": (data[:headers[6]] + b"\x07" * 512 + data[headers[6] + 512:], 3), "junk": (b"junk" * 500, 0), "nothing": (b"", 0)}
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


def test_images_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "OPEN_SHARDS", 2)
    for k in range(5):
        shard(tmp_path / f"{k}.tar", [k])
    data = images.ImageData(str(tmp_path), 8, seed=3)
    assert sorted(reds([data.sample(i)[0][None], 0, 0] for i in range(5))) == list(range(5))
    assert len(data.handles) == 2


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
    loader = data.load(6)
    assert reds(loader) == list(range(20)) == reds(loader) and len(loader) == 4
    parts = [reds(data.load(6, rank=r, ranks=3)) for r in range(3)]
    assert parts[1] == list(range(1, 20, 3)) and sorted(sum(parts, [])) == list(range(20))
    assert reds(data.load(64, rank=50, ranks=64)) == []
    with pytest.raises(ValueError, match="multiple"):
        data.load(5, ranks=2)


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
    full = images.centre_crop(images.decode(os.path.join(PHOTOS, "astronaut.jpg")), 64)
    assert (samples[0][0].float() - full.float()).abs().mean() < 2


# ---------------------------------------------------------------------------------------------------------------------
# rvq

def filled(*, dim=8, codebook_size=64, depth=3, steps=30, **options):
    """A quantizer after some updates on gaussian vectors, in training mode."""
    torch.manual_seed(0)
    vq = ResidualVQ(dim, codebook_size, depth, **options)
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
    vq, z = filled(shared=shared).eval(), torch.randn(4, 16, 8)
    codes, residual = vq(z)[1], z.double()
    for d in range(3):
        far = torch.cdist(residual.reshape(-1, 8), vq.table(d).double())
        assert torch.equal(codes[..., d].flatten(), far.argmin(1))
        residual = residual - vq.table(d).double()[codes[..., d]]


@pytest.mark.parametrize("shared", [True, False])
def test_rvq_embed_vectors_and_forward_agree(shared):
    vq, z = filled(shared=shared).eval(), torch.randn(4, 16, 8)
    z_q, codes, _ = vq(z)
    assert vq.vectors(codes).shape == (4, 16, 3, 8)
    torch.testing.assert_close(vq.vectors(codes).sum(2), z_q, atol=1e-6, rtol=0)
    assert torch.equal(vq.encode(z), codes) and torch.equal(vq.embed(codes), vq.vectors(codes).sum(2))


def test_rvq_gradient_goes_straight_through():
    vq, z = filled().eval(), torch.randn(2, 4, 8, requires_grad=True)
    weight = torch.randn(2, 4, 8)
    (vq(z)[0] * weight).sum().backward()
    assert torch.equal(z.grad, weight)


def test_rvq_commitment_is_the_mean_over_depths():
    vq, z = filled().eval(), torch.randn(2, 4, 8, requires_grad=True)
    _, codes, commitment = vq(z)
    sums = vq.vectors(codes).cumsum(2)
    torch.testing.assert_close(commitment, torch.stack([(z - sums[:, :, d]).square().mean() for d in range(3)]).mean())
    commitment.backward()
    torch.testing.assert_close(z.grad, 2 * (z.detach()[:, :, None] - sums).mean(2) / z.numel())


def test_rvq_forward_never_changes_a_table():
    vq = filled()
    before = tables(vq)
    for _ in range(3):
        vq(torch.randn(8, 32, 8))
    assert equal(before, tables(vq))
    vq.update()
    assert not torch.equal(before["codebook"], vq.codebook)


@pytest.mark.parametrize("shared", [True, False])
def test_rvq_ema_is_what_the_formula_says(shared):
    vq = filled(shared=shared, threshold=0.0)
    z, old = torch.randn(8, 32, 8), tables(vq)
    codes = vq.encode(z).reshape(-1, 3)
    count, total, residual = old["ema_count"] * 0.99, old["ema_sum"] * 0.99, z.reshape(-1, 8)
    for d in range(3):
        for n, k in enumerate(codes[:, d].tolist()):
            count[0 if shared else d, k] += 0.01
            total[0 if shared else d, k] += 0.01 * residual[n]      # what this depth saw, not what was left at the end
        residual = residual - vq.table(d)[codes[:, d]]
    vq(z), vq.update()
    torch.testing.assert_close(vq.ema_count, count)
    expected = torch.where(count[..., None] > 0, total / count[..., None], old["codebook"])      # a code that was never used stays
    torch.testing.assert_close(vq.codebook, expected, atol=1e-5, rtol=1e-5)


def test_rvq_learns_as_well_as_true_residuals_allow():
    """The release's bug, every depth learning from the last residual, ends at 0.29 here."""
    vq = filled(steps=300).eval()
    z = torch.randn(64, 32, 8)
    assert (vq(z)[0] - z).square().mean() < 0.15


def test_rvq_restart_replaces_dead_codes_and_only_those():
    vq = filled(codebook_size=16, grace=0)
    vq.codebook[0, 3], vq.ema_count[0, 3], vq.ema_sum[0, 3] = 1000, 1e-4, 0.1
    z = torch.randn(8, 32, 8)
    alive = vq.codebook[0, 4].clone()
    vq(z), vq.update()
    assert vq.codebook[0, 3].norm() < 20 and vq.age[0, 3] == 0
    assert (vq.codebook[0, 4] - alive).norm() < 1 and vq.age[0, 4] > 0


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


def test_rvq_accumulated_halves_are_one_batch():
    one, two, z = filled(), filled(), torch.randn(8, 32, 8)
    one(z), two(z[:4]), two(z[4:])
    one.update(), two.update()
    for name, value in tables(one).items():
        torch.testing.assert_close(two.state_dict()[name], value, atol=1e-6, rtol=1e-6)


def test_rvq_skipped_step_changes_nothing():
    vq = filled()
    before = tables(vq)
    vq(torch.full((8, 32, 8), float("nan")))
    vq.update(skip=torch.tensor(True))
    assert equal({k: v for k, v in before.items() if k != "updates"}, {k: v for k, v in tables(vq).items() if k != "updates"})
    vq(torch.randn(8, 32, 8)), vq.update()
    assert vq.codebook.isfinite().all()


def test_rvq_resumes_exactly():
    torch.manual_seed(1)
    batches = torch.randn(20, 2, 16, 8)
    whole, part = ResidualVQ(8, 256, 2), ResidualVQ(8, 256, 2)
    part.load_state_dict(whole.state_dict())
    for z in batches:
        whole(z), whole.update()
    for z in batches[:10]:
        part(z), part.update()
    resumed = ResidualVQ(8, 256, 2)
    resumed.load_state_dict(part.state_dict())
    for z in batches[10:]:
        resumed(z), resumed.update()
    assert equal(tables(whole), tables(resumed))


def test_rvq_ignores_autocast():
    vq, z = filled().eval(), torch.randn(16, 64, 8)
    with torch.autocast("cpu", torch.bfloat16):
        z_q, codes, _ = vq(z)
    assert torch.equal(codes, vq(z)[1]) and z_q.dtype == torch.float32


def test_rvq_memory_stays_bounded():
    """The paper's size: 32 images of 729 positions, K 16,384, E 32. The distances of one depth alone would be 1.4 GiB."""
    pytest.importorskip("resource", reason="no peak memory on this system")
    code = ("import resource, torch; from rvq import ResidualVQ; torch.set_num_threads(2); vq = ResidualVQ(32, 16384, 1); z = torch.randn(32, 729, 32);"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20; before = peak(); vq(z); vq.update(); print(peak() - before)")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1


def test_rvq_usage_and_perplexity():
    counts = histogram(torch.tensor([[[0, 1], [0, 2], [0, 3], [0, 3]]]), 4)
    assert counts.tolist() == [[4, 0, 0, 0], [0, 1, 1, 2]]
    usage, perplexity = usage_and_perplexity(counts)
    assert usage.tolist() == [0.25, 0.75] and abs(perplexity[0] - 1) < 1e-9 and abs(perplexity[1] - 2 ** 1.5) < 1e-9


def test_rvq_errors_are_sentences():
    vq = filled()
    for wrong in (lambda: vq(torch.randn(1, 4, 9)), lambda: vq.embed(torch.zeros(1, 4, 2).long()), lambda: vq.embed(torch.full((1, 4, 3), 64))):
        with pytest.raises(ValueError, match="expected"):
            wrong()


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


def test_tokenizer_matches_the_release():
    folder = os.path.join(SHARED, "fixtures/released-layout")
    if not os.path.isdir(folder):
        pytest.skip("no released-layout fixture: set NANODUALTOKEN_SHARED")
    model, io_ = DualTokenizer.from_released(folder), load_file(os.path.join(folder, "io.safetensors"))
    with torch.no_grad():
        pixel, semantic = model.latents(io_["image"].float())
        out = model(io_["image"].float())
        edited = model._decode(model.quantizer_pix.embed(io_["code_pix_edited"].flatten(1, 2)))
        text = model.siglip_model.text_model(io_["text_ids"])
    assert torch.equal(out.codes[:, :, 0], io_["code_pix"].flatten(1, 2)) and torch.equal(out.codes[:, :, 1], io_["code_sem"].flatten(1, 2))
    for ours, theirs, tolerance in ((pixel, "latent_pix", 5e-6), (semantic, "latent_sem", 5e-6), (out.deep, "z_q_sem", 5e-6), (out.pooled, "image_pooled", 5e-6),
                                    (text, "text_pooled", 5e-6), (out.images, "recon", 5e-5), (edited, "recon_edited", 5e-5),
                                    (out.commitment["pixel"], "quant_loss_pix", 5e-6), (out.commitment["semantic"], "quant_loss_sem", 5e-6)):
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


@pytest.mark.parametrize("name, positions, layers, depth", [("nano", 64, (2, 5, 6), 4), ("nano-64", 64, (2, 5, 6), 4), ("small", 64, (2, 7, 8), 4), ("siglip-l-256", 256, (6, 23, 24), 4),
                                                            ("so400m-384", 729, (6, 26, 27), 8), ("siglip2-so-256", 256, (6, 26, 27), 8)])
def test_tokenizer_presets_have_the_papers_sizes(name, positions, layers, depth):
    c = preset_config(name)
    assert (c.positions, (c.shallow_layer, c.deep_layer, c.vision.num_hidden_layers), c.depth) == (positions, layers, depth)
    with torch.device("meta"):      # shapes without memory
        model = DualTokenizer(c)
        x = torch.zeros(1, c.positions, c.code_dim)
        assert model._decode(x).shape == (1, 3, c.vision.image_size, c.vision.image_size)


def test_tokenizer_files_round_trip_and_raise(tokenizer, pictures, tmp_path):
    tokenizer.save_pretrained(str(tmp_path / "a"))
    again = DualTokenizer.from_pretrained(str(tmp_path / "a"))
    assert again.config == tokenizer.config and torch.equal(again.encode(pictures), tokenizer.encode(pictures)) and not list(tmp_path.rglob("*.tmp"))
    weights = load_file(tmp_path / "a/model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "decoder.conv_out.bias"} | {"stranger": torch.zeros(2), "decoder.conv_in.bias": torch.zeros(5)},
              tmp_path / "a/model.safetensors")
    with pytest.raises(ValueError, match=r"missing decoder.conv_out.bias \(3,\); unexpected stranger \(2,\); decoder.conv_in.bias is \(5,\), expected \(64,\)"):
        DualTokenizer.from_pretrained(str(tmp_path / "a"))
    (tmp_path / "a/model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match="truncated or damaged"):
        DualTokenizer.from_pretrained(str(tmp_path / "a"))
    for content, words in (('{"model_type": "siglip"}', "no tokenizer of ours"), ("[1]", "JSON object"), ("{", "no JSON")):
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


@pytest.mark.parametrize("call, words", [
    (lambda: preset_config("tiny"), "no preset 'tiny'; expected one of nano"), (lambda: preset_config("nano", 38), "38 is not a multiple of 4"),
    (lambda: preset_config("so400m-384", 380), "380 is not a multiple of 16"), (lambda: preset_config("nano", shallow_layer=6), "1 <= shallow <= deep"),
    (lambda: preset_config("nano", code_dim=40), "96 is not a multiple of the code dimension 40")])
def test_tokenizer_configuration_errors_are_sentences(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_tokenizer_shape_errors_are_sentences(tokenizer):
    for wrong in (lambda: tokenizer.encode(torch.zeros(1, 3, 64, 64)), lambda: tokenizer.decode(torch.zeros(1, 64, 1, 4).long()),
                  lambda: tokenizer.decode(torch.full((1, 64, 2, 4), 999))):
        with pytest.raises(ValueError, match="expected"):
            wrong()


def test_tokenizer_text_ids_are_bytes():
    ids = text_ids(["ab", "", "é" * 9], 6)
    assert ids.tolist() == [[97, 98, 256, 256, 256, 256], [256] * 6, [195, 169] * 3]


# ---------------------------------------------------------------------------------------------------------------------
# losses

def test_losses_semantic_is_eq_4():
    x, y = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    cos = (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)
    torch.testing.assert_close(distance(x, y), ((x - y) ** 2).mean() - cos.mean())
    torch.testing.assert_close(distance(x, x), torch.tensor(-1.0))


def test_losses_every_weight_counts():
    terms = {name: torch.tensor(float(3 ** n)) for n, name in enumerate(("pixel", "perceptual", "deep", "pooled", "commitment"))}
    weights = Weights(pixel=2, perceptual=3, deep=5, pooled=7, commitment=11)
    assert weighted(terms, weights).item() == 2 * 1 + 3 * 3 + 5 * 9 + 7 * 27 + 11 * 81


def test_losses_perceptual_slot_is_used(tokenizer, pictures):
    with torch.no_grad():
        out, teacher = tokenizer(pictures), tokenizer.siglip_model.vision_model(pictures)
        terms = tokenizer_losses(out, pictures, teacher, perceptual=lambda a, b: (a - b).abs().mean())
    torch.testing.assert_close(terms["perceptual"], (out.images - pictures).abs().mean())
    assert "perceptual" not in tokenizer_losses(out, pictures, teacher)


def test_losses_sigmoid_contrastive_is_every_pair():
    image, text = F.normalize(torch.randn(5, 8), dim=-1), F.normalize(torch.randn(5, 8), dim=-1)
    scale, bias = torch.tensor([2.0]), torch.tensor([-3.0])
    naive = sum(math.log1p(math.exp(-(1 if i == j else -1) * (math.e ** 2 * (image[i] @ text[j]).item() - 3))) for i in range(5) for j in range(5)) / 5
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
    assert adaptive_weight((100 * w).sum(), w.sum(), w).item() == 10 and abs(adaptive_weight(w.sum(), (100 * w).sum(), w).item() - 0.3) < 1e-6


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


# ---------------------------------------------------------------------------------------------------------------------
# train_tokenizer

TINY = ["--siglip-steps", "6", "--steps", "8", "--batch-size", "16", "--log-every", "1", "--save-every", "4", "--eval-images", "24", "--device", "cpu"]


def train(out, *more, script=train_tokenizer):
    script.main([*TINY, "--out", str(out), *more])
    return out


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
    for path in ("model.safetensors", "config.json", "state.pt", "log.jsonl", "metrics.json", "curves.png", "samples/reconstructions.png", "siglip/model.safetensors",
                 "siglip/metrics.json"):
        assert os.path.getsize(run_folder / path) > 0
    metrics = json.load(open(run_folder / "metrics.json"))
    expected = {"zero_shot", "teacher_zero_shot", "zero_shot_held_out", "retrieval", "psnr", "ssim", "fd", "usage", "perplexity", "reader_accuracy", "preset", "design",
                "streams", "steps", "seed", "device", "seconds", "peak_memory_gib", "images_per_second", "torch", "commit"}
    assert expected <= metrics.keys() and set(metrics["usage"]) == {"pixel", "semantic"} and set(metrics["retrieval"]) == {"i2t", "t2i"}
    steps = [line["step"] for line in log(run_folder) if "loss" in line]
    assert steps == list(range(1, 9)) and sum("eval_psnr" in line for line in log(run_folder)) == 2
    assert ["discriminator" in line for line in log(run_folder) if "loss" in line] == [False] * 2 + [True] * 6


def test_train_reuses_its_siglip_and_learns_from_it(run_folder, tmp_path, capsys):
    shutil.copytree(run_folder / "siglip", tmp_path / "siglip")
    train(tmp_path, "--steps", "40", "--lr", "1e-3")
    assert "is kept from an earlier run" in capsys.readouterr().out
    losses = [line["loss"] for line in log(tmp_path) if "loss" in line]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_train_takes_a_siglip_folder(run_folder, tmp_path):
    train(tmp_path, "--siglip", str(run_folder / "siglip"), "--steps", "2")
    assert not os.path.exists(tmp_path / "siglip")
    text = "siglip_model.text_model.head.weight"        # frozen
    assert torch.equal(load_file(tmp_path / "model.safetensors")[text], load_file(run_folder / "siglip/model.safetensors")[text.split(".", 1)[1]])


@pytest.mark.parametrize("stage, dies_at", [("siglip", 5), ("tokenizer", 6)])
def test_train_interrupted_and_resumed_is_uninterrupted(run_folder, tmp_path, monkeypatch, stage, dies_at):
    """Bit for bit, the log included; the discriminator was on."""
    more, write = ("--gan", "--gan-start", "0.25", "--eval-every", "4"), train_tokenizer.write_log

    def dies(the_stage, line, broken):
        write(the_stage, line, broken)
        if the_stage.name == stage and line["step"] == dies_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_tokenizer, "write_log", dies)
        train(tmp_path, *more)
    train(tmp_path, *more, "--resume")
    for path in ("siglip/model.safetensors", "model.safetensors"):
        assert equal(load_file(run_folder / path), load_file(tmp_path / path))
    ours, theirs = (torch.load(folder / "state.pt", weights_only=True) for folder in (run_folder, tmp_path))
    assert equal(ours["discriminator"], theirs["discriminator"])
    assert all(torch.equal(a[k], b[k]) for a, b in zip(*(s["optimizer"]["state"].values() for s in (ours, theirs))) for k in ("exp_avg", "exp_avg_sq", "step"))
    timeless = [[{k: v for k, v in line.items() if k not in ("seconds", "images_per_second", "waiting")} for line in log(f)] for f in (run_folder, tmp_path)]
    assert timeless[0] == timeless[1]


def test_train_two_ranks_are_one_process(tmp_path):
    """Codebooks bit-equal on both ranks, and the loss curve of one process with the same global batch."""
    code = ("import os, sys, torch, train_tokenizer as t\n"
            "fit = t.fit\n"
            "def kept(stage, *a):\n"
            "    fit(stage, *a)\n"
            "    if stage.name == 'tokenizer': torch.save(stage.model.state_dict(), sys.argv[1] + '/rank' + os.environ.get('RANK', '0') + '.pt')\n"
            "t.fit = kept\n"
            "t.cosine = lambda step, steps, warmup: (step + 1) / 50\n"       # the beginning of a long run
            "t.run(lambda: t.main(sys.argv[2:]))\n")
    (tmp_path / "script.py").write_text(code)
    argv = [str(tmp_path / "script.py")]
    environment = {**os.environ, "PYTHONPATH": HERE, "OMP_NUM_THREADS": "1"}
    flags = [*TINY, "--steps", "20", "--gan", "--gan-start", "0.8"]
    for name, launch in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"])):
        os.mkdir(tmp_path / name)
        done = subprocess.run([sys.executable, *launch, *argv, str(tmp_path / name), *flags, "--out", str(tmp_path / name / "run")], cwd=HERE, env=environment,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"two/rank{r}.pt", weights_only=True) for r in range(2))
    assert equal(first, second)
    metrics = [json.load(open(tmp_path / name / "run/metrics.json")) for name in ("one", "two")]
    assert metrics[0]["images"] == metrics[1]["images"] == 24 and metrics[1]["ranks"] == 2
    assert all(abs(metrics[0][k] - metrics[1][k]) < 0.01 * abs(metrics[0][k]) for k in ("psnr", "ssim", "fd"))
    for stage in ("run/siglip", "run"):
        curves = [[line["loss"] for line in log(tmp_path / name / stage) if "loss" in line] for name in ("one", "two")]
        assert len(curves[0]) == (6 if "siglip" in stage else 20) and np.abs(np.subtract(*curves)).max() < 1e-5 * max(1, np.abs(curves[0]).max())


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_train_accumulation_is_the_whole_batch(run_folder, tmp_path):
    for name, micro in (("one", "1"), ("four", "4")):
        train(tmp_path / name, "--siglip", str(run_folder / "siglip"), "--accumulate", micro)
    for what in ("loss", "norm"):       # the norm too: to Adam, a gradient four times as large is the same
        curves = [[line[what] for line in log(tmp_path / name) if what in line] for name in ("one", "four")]
        assert np.abs(np.subtract(*curves)).max() < 1e-3 * max(curves[0])


def test_train_skips_steps_that_are_not_finite(run_folder, tmp_path, monkeypatch, capsys):
    """The weights before and after are the same, the term is named, and too many in a row end the run with the weights kept."""
    weights, original = [], train_tokenizer.TokenizerStage.loss

    def spoilt(self, images, captions, step):
        weights.append({name: p.detach().clone() for name, p in self.model.state_dict().items() if not name.endswith("updates")})
        total, terms = original(self, images, captions, step)
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


def test_train_counts_skipped_steps_of_the_discriminator(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train_tokenizer, "discriminator_loss", lambda real, fake: (real.mean() + fake.mean()) * float("nan"))
    train(tmp_path, "--siglip", str(run_folder / "siglip"), "--gan", "--gan-start", "0.5")
    lines = [line for line in log(tmp_path) if "loss" in line]
    assert [line.get("discriminator_skipped", 0) for line in lines] == [0] * 4 + [1] * 4 and not any("skipped" in line for line in lines)


def test_train_compiled_saves_the_same_names(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: setattr(self, "_compiled_call_impl", self._call_impl))
    train(tmp_path, "--siglip", str(run_folder / "siglip"), "--steps", "2", "--compile")
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(run_folder / "model.safetensors").keys()


def test_train_on_a_folder_of_images(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for n in range(30):
        flat(8 * n, 40).save(tmp_path / f"images/{n}.png")
        (tmp_path / f"images/{n}.txt").write_text(f"colour number {n}")
    (tmp_path / "images/7.png").write_bytes(b"broken")
    train(tmp_path / "run", "--data", str(tmp_path / "images"), "--workers", "2")
    out = capsys.readouterr().out
    metrics = json.load(open(tmp_path / "run/metrics.json"))
    assert "28 images to train on, 2 held out" in out and "broken samples replaced" in out and "7.png" in out
    assert metrics["retrieval"]["i2t"] >= 0 and "zero_shot" not in metrics


def test_train_bench_writes_nothing(tmp_path, capsys):
    train_tokenizer.main([*TINY, "--out", str(tmp_path / "run"), "--bench"])
    out = capsys.readouterr().out
    assert out.count("waiting for data") == 2 and not os.path.exists(tmp_path / "run")


def test_train_bad_input_ends_in_a_sentence(run_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for argv, words in ((["--preset", "huge"], "--preset is 'huge', expected one of nano"), (["--data", str(tmp_path / "nothing")], "no such image data"),
                        (["--data", str(tmp_path / "empty")], "no images in"), (["--image-size", "30"], "30 is not a multiple of 4"),
                        (["--batch-size", "10", "--accumulate", "4"], "10 is not a multiple of 1 ranks x 4"), (["--device", "warp"], "--device warp cannot be used"),
                        (["--steps", "-3"], "--steps is -3"), (["--val-data", "x"], "goes with images"), (["--siglip", str(tmp_path / "no")], "no model in"),
                        (["--siglip", str(run_folder)], "is no SigLIP configuration")):
        assert words in stopped("--device", "cpu", "--out", str(tmp_path / "run"), *argv)
    (tmp_path / "silent").mkdir()
    (tmp_path / "few").mkdir()
    flat(1).save(tmp_path / "few/1.png"), flat(2).save(tmp_path / "few/2.png")
    for n in range(40):
        flat(n).save(tmp_path / f"silent/{n}.png")
    assert "1 images to evaluate on, expected at least 2" in stopped("--device", "cpu", "--out", str(tmp_path / "run"), "--data", str(tmp_path / "few"))
    (tmp_path / "broken").mkdir()
    for n in range(60):
        (tmp_path / f"broken/{n}.png").write_bytes(b"no picture")
        (tmp_path / f"broken/{n}.txt").write_text("a caption")
    words = stopped("--device", "cpu", "--out", str(tmp_path / "run"), "--data", str(tmp_path / "broken"), "--workers", "1")
    assert "nothing readable at position 0" in words and "Traceback" not in words
    assert "have no captions" in stopped("--device", "cpu", "--out", str(tmp_path / "run"), "--data", str(tmp_path / "silent"))
    shutil.copytree(run_folder, tmp_path / "copy")
    same = [*TINY, "--gan", "--gan-start", "0.25", "--resume", "--out", str(tmp_path / "copy")]
    assert "lr 0.002 -> 0.1" in stopped(*same, "--lr", "0.1")
    (tmp_path / "copy/state.pt").write_bytes((tmp_path / "copy/state.pt").read_bytes()[:5000])
    assert "cannot be resumed from" in stopped(*same)


def test_train_never_unpickles_code(run_folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    shutil.copytree(run_folder, tmp_path / "copy")
    torch.save({"settings": Bomb()}, tmp_path / "copy/state.pt")
    assert "cannot be resumed from" in stopped(*TINY, "--gan", "--gan-start", "0.25", "--resume", "--out", str(tmp_path / "copy"))
    assert not os.path.exists(tmp_path / "executed")


def test_train_cosine_schedule():
    values = [train_tokenizer.cosine(s, 100, 10) for s in range(100)]
    assert values[0] == 0.1 and values[9] == 1.0 and values[10] == 1.0 and values[99] < 1e-3 and all(a >= b for a, b in zip(values[10:], values[11:]))


def test_train_retrieval_counts_words_not_rows():
    e = torch.eye(4)
    assert train_tokenizer.retrieval(e, e[[1, 0, 2, 3]], ["a", "a", "b", "c"]) == {"i2t": 1.0, "t2i": 1.0}
    assert train_tokenizer.retrieval(e, e[[1, 0, 2, 3]], ["a", "d", "b", "c"]) == {"i2t": 0.5, "t2i": 0.5}
    assert train_tokenizer.retrieval(e, e, ["", "", "", "a"]) == {}


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
    assert sorted(os.listdir(tmp_path / "out")) == ["dot-0-reconstruction.png", "dot-2-reconstruction.png", "wide-reconstruction.png"]
    picture = Image.open(tmp_path / "out/wide-reconstruction.png")
    assert picture.height >= 256 and picture.width >= 512
    sample.main(["--reconstruct", "--n", "2", "--tokenizer", str(run_folder), "--out", str(tmp_path / "scenes")])
    assert len(os.listdir(tmp_path / "scenes")) == 2


def test_sample_bad_input_ends_in_a_sentence(run_folder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    there = ["--tokenizer", str(run_folder), "--out", str(tmp_path / "out")]
    assert "expected the path of an image" in sample_words("--reconstruct", str(tmp_path / "missing.png"), *there)
    assert "broken.png: cannot be read as an image" in sample_words("--reconstruct", str(tmp_path / "broken.png"), *there)
    assert "no model in" in sample_words("--reconstruct", "--tokenizer", str(tmp_path / "nowhere"))


# ---------------------------------------------------------------------------------------------------------------------
# the project

def test_project_readme_commands_and_files_exist():
    text = open(os.path.join(HERE, "README.md"), encoding="utf-8").read()
    parsers = {"train_tokenizer.py": train_tokenizer.flags, "sample.py": sample.flags}
    commands = re.findall(r"^ *(?:python|torchrun --nproc_per_node=\d+) (\w+\.py)(.*?)(?:#.*)?$", text, re.M)
    assert {script for script, _ in commands} == set(parsers)
    for script, arguments in commands:
        parsers[script](shlex.split(arguments))         # exits where a flag is unknown
    for path in re.findall(r"\]\(((?:assets|data)/[^)]+)\)", text) + re.findall(r"^\| `([\w/.]+)` \| \d+", text, re.M):
        assert os.path.exists(os.path.join(HERE, path)), path
    for path, lines in re.findall(r"^\| `([\w/.]+)` \| (\d+)", text, re.M):
        assert int(lines) == open(os.path.join(HERE, path), encoding="utf-8").read().count("\n"), f"README: {path} has another number of lines"


@pytest.mark.parametrize("script", ["train_tokenizer.py", "sample.py"])
def test_project_every_flag_is_read_and_explained(script):
    text = open(os.path.join(HERE, script), encoding="utf-8").read()
    for flag, rest in re.findall(r'add_argument\("--([\w-]+)"(.*)', text):
        assert re.search(rf"args\.{flag.replace('-', '_')}\b|\"{flag.replace('-', '_')}\"", text), flag
        assert "help=" in rest, flag


def test_project_imports_only_what_requirements_name():
    allowed = {"torch", "numpy", "PIL", "tqdm", "safetensors", "tiktoken", "data", "rvq", "losses", "tokenizer", "train_tokenizer"}
    named = open(os.path.join(HERE, "requirements.txt"), encoding="utf-8").read().replace("pillow", "PIL")
    for path in glob.glob(os.path.join(HERE, "*.py")) + glob.glob(os.path.join(HERE, "data/*.py")):
        if not path.endswith("test_all.py"):
            nodes = list(ast.walk(ast.parse(open(path, encoding="utf-8").read())))
            found = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names} | {n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
            found -= set(sys.stdlib_module_names)
            assert found <= allowed, (path, found - allowed)
            assert all(name in named for name in found & {"torch", "numpy", "PIL", "tqdm", "safetensors", "tiktoken"})
