"""The built-in world: one to four coloured shapes, drawn on the fly, with captions, questions, edits, and a reader of images.

    world = World("plain", size=32)                 # or "textured"; split="train", "val" or "held_out"
    images, captions = world.batch(range(64))       # (64, 3, 32, 32) in [-1, 1], ["a red circle", ...]
    read(images)[0]                                 # (Object(shape="circle", colour="red", size="large", x=0.41, y=0.63),)

A sample is a pure function of (seed, split, index): every number in it is a hash, so any batch can be drawn anywhere and in any order, with
no generator whose state would have to be saved. Scenes are small integer tensors on the CPU; only `render` and `read` touch the device.
`plain` has 4 shapes, 4 colours and one size on flat grounds; `textured` has 8 of each, two sizes, patterned grounds and shaded shapes. The
reader knows how shapes are drawn and nothing else, so it can mark reconstructed and generated images without any model.
"""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DIFFICULTIES = ("plain", "textured")
KINDS = {"plain": 4, "textured": 8}     # how many shapes, and how many colours
SPLITS = ("train", "val", "held_out")
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "star", "heart", "ring")     # plain: the first four
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "pink")           # plain: the first four
SIZES = ("small", "large")                                                                 # plain: large only
NUMBERS = ("zero", "one", "two", "three", "four")
SLOTS = 4                           # the most shapes in a scene
GRID = 256                          # positions are whole multiples of 1/256 of the image side
GAP = 0.06                          # least distance between the circles around two shapes, in image sides
BORDER = 8 / GRID                   # from such a circle to the edge as shapes are placed; 3 free bits of x may then take 7 of its 8 steps
MARGIN = 0.2                        # "left of" and its like are said, and hold, only from this distance on
RADII = torch.tensor([0.12, 0.18])  # of the circle around a shape, by size
PALETTE = torch.tensor([[0.86, 0.18, 0.18], [0.20, 0.66, 0.27], [0.16, 0.34, 0.86], [0.97, 0.83, 0.16],
                        [0.96, 0.52, 0.10], [0.50, 0.20, 0.68], [0.20, 0.78, 0.84], [0.97, 0.55, 0.76]])
GROUNDS = torch.tensor([[0.94, 0.93, 0.91], [0.85, 0.87, 0.90], [0.84, 0.80, 0.75], [0.70, 0.73, 0.71],      # from light to dark
                        [0.52, 0.53, 0.57], [0.37, 0.39, 0.43], [0.25, 0.25, 0.28], [0.15, 0.15, 0.17]])
# The colour that each shape never wears in training; every colour is left out once. In the plain world: blue circle, red triangle.
HELD_OUT = torch.tensor([2, 4, 0, 7, 1, 3, 6, 5])


def held_out_pairs(difficulty: str) -> list[tuple[str, str]]:
    """The (colour, shape) pairs that training never shows."""
    n = KINDS[difficulty]
    return [(COLOURS[c], SHAPES[s]) for s, c in enumerate(HELD_OUT[:n].tolist()) if c < n]


def seen_pairs(difficulty: str) -> list[tuple[str, str]]:
    """The (colour, shape) pairs of training and validation."""
    held, n = held_out_pairs(difficulty), KINDS[difficulty]
    return [pair for pair in itertools.product(COLOURS[:n], SHAPES[:n]) if pair not in held]


# ---------------------------------------------------------------- scenes

class Object(NamedTuple):
    """One shape: names, and the centre in image sides from the top left."""
    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def noun(self) -> str:
        return f"{self.colour} {self.shape}"


class Scene(tuple):
    """A tuple of `Object`s, from top to bottom. `look`: the integers behind ground and shading (see `_look`), no part of equality."""

    def __new__(cls, objects, look=(0,) * 9):
        self = super().__new__(cls, objects)
        self.look = tuple(look)
        return self

    @property
    def difficulty(self) -> str:
        return DIFFICULTIES[self.look[0]]


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes as int64 tensors on the CPU; slots from `count` on are unused. Iterating gives `Scene`s."""
    count: Tensor       # (B,)       1..4
    shape: Tensor       # (B, 4)     index into SHAPES
    colour: Tensor      # (B, 4)     index into COLOURS
    size: Tensor        # (B, 4)     index into SIZES
    xy: Tensor          # (B, 4, 2)  centres in steps of 1/256; slots are sorted by y, then x
    look: Tensor        # (B, 9)     ground and shading, see `_look`
    roll: Tensor        # (B,)       picks the caption

    def __len__(self):
        return len(self.count)

    def __iter__(self):
        columns = (t.tolist() for t in (self.count, self.shape, self.colour, self.size, self.xy, self.look))
        for n, shape, colour, size, xy, look in zip(*columns):
            slots = zip(shape[:n], colour, size, xy)
            yield Scene((Object(SHAPES[s], COLOURS[c], SIZES[r], x / GRID, y / GRID) for s, c, r, (x, y) in slots), look)


def pack(scenes: list[Scene]) -> Scenes:
    """The inverse of iterating over `Scenes`: readable scenes to tensors (objects sorted again), so that edited scenes can be rendered."""
    if not scenes or not all(1 <= len(scene) <= SLOTS for scene in scenes):
        raise ValueError(f"pack: scenes of {sorted({len(s) for s in scenes})} shapes, expected at least one, each of 1 to {SLOTS}")
    rows = []
    for scene in scenes:
        objects = sorted((round(o.y * GRID), round(o.x * GRID), SHAPES.index(o.shape), COLOURS.index(o.colour), SIZES.index(o.size))
                         for o in scene)
        rows.append(objects + [(0,) * 5] * (SLOTS - len(scene)))
    y, x, shape, colour, size = torch.tensor(rows).unbind(2)
    count = torch.tensor([len(scene) for scene in scenes])
    return Scenes(count, shape, colour, size, torch.stack([x, y], 2), torch.tensor([scene.look for scene in scenes]),
                  torch.zeros_like(count))


def _mix(x: Tensor) -> Tensor:
    """Integers to well-mixed 64-bit integers: the finaliser of splitmix64. The masks make torch's signed shifts unsigned."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -4658895280553007687
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -7723592293110705685
    return x ^ (x >> 31 & (1 << 33) - 1)


def _draw(key: Tensor, n: int) -> Tensor:
    """n random numbers in [0, 2^31) for every key: (B,) -> (B, n)."""
    return _mix(key[:, None] + torch.arange(1, n + 1) * -7046029254386353131) >> 33 & (1 << 31) - 1


def _residue(scenes: Scenes) -> Tensor:
    """(B,) in 0..7: a hash of all objects, without the lowest three bits of the first one's x. Grounds take no part."""
    x, y = scenes.xy.unbind(2)
    code = (((scenes.shape * 8 + scenes.colour) * 2 + scenes.size) * GRID + x) * GRID + y + 1
    code[:, 0] -= x[:, 0] % 8 * GRID
    code = code * (torch.arange(SLOTS) < scenes.count[:, None])
    total = torch.zeros_like(scenes.count)
    for slot in code.unbind(1):
        total = _mix(total + slot)
    return total & 7


def is_validation(scenes: Scenes) -> Tensor:
    """(B,) bool: whether the lowest three bits of the first x equal a hash of the rest, as in every validation and no training scene."""
    return scenes.xy[:, 0, 0] % 8 == _residue(scenes)


def _place(bits: Tensor, radius: Tensor, present: Tensor) -> Tensor:
    """Centres (B, 4, 2) such that no two shapes come near each other; bits (B, 9), radius (B, 4) in image sides. Random places are pulled
    towards the image's corners, each to its own, until none overlap. That takes at most eleven steps, all tried at once."""
    corner = torch.tensor([[0, 0], [1, 1], [1, 0], [0, 1]])[(torch.arange(SLOTS) + bits[:, 8:]) % 4]       # (B, 4, 2)
    pull = torch.linspace(0, 1, 12)[:, None, None, None]
    unit = (1 - pull) * (bits[:, :8].unflatten(1, (SLOTS, 2)) % 4096 / 4096) + pull * corner               # (12, B, 4, 2)
    low = (radius + BORDER)[..., None]
    xy = low + unit * (1 - 2 * low)
    near = torch.cdist(xy, xy) < radius[:, :, None] + radius[:, None] + GAP + 8 / GRID  # 8 / GRID: the free bits of x again
    pair = torch.ones(SLOTS, SLOTS, dtype=torch.bool).triu(1) & present[:, :, None] & present[:, None]
    step = (near & pair).flatten(2).any(2).int().argmin(0)             # the first step without overlap
    return (xy[step, torch.arange(len(bits))] * GRID).long()


def _look(bits: Tensor, difficulty: str) -> Tensor:
    """(B, 9): difficulty, ground, second ground, pattern of the ground (flat, gradient, stripes, noise), its angle, frequency and phase (of
    256), pattern of the shapes (flat, shaded, striped) and its angle. Plain scenes use the first two only."""
    look = bits % torch.tensor([1, len(GROUNDS), 1, 4, 256, 256, 256, 3, 256])
    if difficulty == "plain":
        return look * (torch.arange(9) == 1)
    look[:, 0] = 1
    look[:, 2] = look[:, 1] + (1 + bits[:, 2] % 2) * torch.where(look[:, 1] < len(GROUNDS) // 2, 1, -1)     # a near shade
    return look


class World:
    """An endless set of scenes. single: the share with one shape (default 0.8; 1 in `held_out`, where the first shape is always a held-out
    pair). ValueError: an unknown difficulty or split, fewer than 16 pixels, or a share outside [0, 1]."""

    def __init__(self, difficulty: str = "plain", size: int = 32, seed: int = 0, split: str = "train", single: float | None = None):
        for what, got, known in (("difficulty", difficulty, DIFFICULTIES), ("split", split, SPLITS)):
            if got not in known:
                raise ValueError(f"{what} is {got!r}, expected one of {', '.join(known)}")
        if size < 16:
            raise ValueError(f"size is {size} pixels, expected at least 16: smaller shapes cannot be told apart")
        self.difficulty, self.size, self.seed, self.split = difficulty, size, seed, split
        self.single = single if single is not None else 1.0 if split == "held_out" else 0.8
        if not 0 <= self.single <= 1:
            raise ValueError(f"single is {single}, expected a share from 0 to 1")

    def scenes(self, indices) -> Scenes:
        """The scenes at these indices (a range, list or integer tensor of B)."""
        key = _mix(_mix(torch.as_tensor(self.seed * len(SPLITS) + SPLITS.index(self.split))) + torch.as_tensor(indices, dtype=torch.int64))
        bits = _draw(key, 48)                                                                       # (B, 48)
        count = torch.where(bits[:, 0] % 1000 < round(self.single * 1000), 1, 2 + bits[:, 1] % (SLOTS - 1))
        present = torch.arange(SLOTS) < count[:, None]                                              # (B, 4)
        size = torch.ones_like(bits[:, :SLOTS]) if self.difficulty == "plain" else bits[:, 4:8] % 2
        xy = _place(bits[:, 8:17], RADII[size], present)
        order = (xy[..., 1] * GRID + xy[..., 0] + ~present * GRID ** 3).argsort(1)
        size, xy = size.gather(1, order), xy.take_along_dim(order[..., None], 1)
        shape, colour = self._kinds(bits[:, 20:30])
        scenes = Scenes(count, shape, colour, size, xy, _look(bits[:, 32:41], self.difficulty), bits[:, 41])
        residue = _residue(scenes)
        if self.split == "train":
            residue = (residue + 1 + bits[:, 42] % 7) % 8
        xy[:, 0, 0] += residue - xy[:, 0, 0] % 8
        return scenes

    def _kinds(self, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Shapes and colours (B, 4) from bits (B, 10). A quarter of the scenes share one shape, a quarter one colour."""
        n, common = KINDS[self.difficulty], bits[:, :1] % 4
        shape, colour = bits[:, 2:6] % n, bits[:, 6:] % n
        if self.split == "held_out":
            pairs = torch.tensor([(SHAPES.index(s), COLOURS.index(c)) for c, s in held_out_pairs(self.difficulty)])
            shape[:, 0], colour[:, 0] = pairs[bits[:, 1] % len(pairs)].unbind(1)
        shape, colour = torch.where(common == 0, shape[:, :1], shape), torch.where(common == 1, colour[:, :1], colour)
        held = HELD_OUT[shape] == colour
        if self.split == "held_out":
            held[:, 0] = False
        # A held-out pair gets another colour (another shape where colours are shared), all others with equal chance.
        shift = held * (1 + bits[:, 6:] // n % (n - 1))
        return torch.where(common == 1, shape + shift, shape) % n, torch.where(common == 1, colour, colour + shift) % n

    def batch(self, indices, device="cpu", captions: bool = True) -> tuple[Tensor, list[str]]:
        """Images (B, 3, size, size) float32 in [-1, 1] on the device, and their captions, which take longer to make, or "" for each."""
        scenes = self.scenes(indices)
        said = [caption(scene, roll).text for scene, roll in zip(scenes, scenes.roll.tolist())] if captions else [""] * len(indices)
        return render(scenes, self.size, device), said


# ---------------------------------------------------------------- drawing

def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: folded into a tenth of the circle, a star is one side of a straight line from an outer corner (1, 0) to an inner one."""
    turn = math.pi / 5
    angle = (torch.atan2(x, -y).abs() + turn) % (2 * turn) - turn
    r, inner = torch.hypot(x, y), 0.46
    nx, ny = inner * math.sin(turn), 1 - inner * math.cos(turn)
    return (r * (angle.cos() * nx + angle.abs().sin() * ny) - nx) / math.hypot(nx, ny)


# Signed distances to the outlines, in units of the circle around the shape, y downwards; one entry per shape, in SHAPES' order.
DISTANCES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda x, y: torch.hypot(x, y) - 0.9,
    lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.74,
    lambda x, y: torch.maximum(y, x.abs() * 0.866 - y * 0.5) - 0.52,
    lambda x, y: torch.minimum(torch.maximum(x.abs() - 0.95, y.abs() - 0.3), torch.maximum(x.abs() - 0.3, y.abs() - 0.95)),
    lambda x, y: (x.abs() / 0.66 + y.abs() - 1) * 0.551,
    _star,
    lambda x, y: torch.minimum((x.abs() + (y - 0.2).abs() - 0.8) * 0.707, torch.hypot(x.abs() - 0.4, y + 0.2) - 0.566),   # square, discs
    lambda x, y: (torch.hypot(x, y) - 0.7).abs() - 0.24,
)


def _cover(shape: Tensor, xy: Tensor, radius: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """How much of each pixel each shape covers, (O, H, W) in [0, 1], and the pixels' x (O, 1, W) and y (O, H, 1) in radii from its centre.
    shape (O,) sorted, on the CPU; centres xy (O, 2) in pixels and radius (O,) in pixels on the device."""
    ticks = torch.arange(size, device=xy.device) + 0.5
    x, y = ((ticks - xy[:, :1]) / radius[:, None])[:, None], ((ticks - xy[:, 1:]) / radius[:, None])[:, :, None]
    groups = torch.bincount(shape, minlength=len(SHAPES)).tolist()
    distance = torch.cat([outline(u, v) for outline, u, v in zip(DISTANCES, x.split(groups), y.split(groups)) if len(u)])
    return (0.5 - distance * radius[:, None, None]).clamp(0, 1), x, y         # edges one pixel wide


def _ground(look: Tensor, size: int, device) -> Tensor:
    """The empty images (B, 3, H, W) in [0, 1]."""
    first, second = (GROUNDS[look[:, i], :, None, None].to(device, non_blocking=True) for i in (1, 2))
    if not look[:, 3].any():
        return first.expand(-1, -1, size, size)
    angle, frequency, phase = look[:, 4] * math.tau / 256, (3 + look[:, 5] / 48) * math.tau, look[:, 6] * math.tau / 256
    table = torch.stack([look[:, 3], angle.cos(), angle.sin(), frequency, phase])[..., None, None]                # (5, B, 1, 1)
    kind, cos, sin, frequency, phase = table.to(device, non_blocking=True)
    ticks = (torch.arange(size, device=device) + 0.5) / size - 0.5
    along = cos * ticks + sin * ticks[:, None]                                                       # (B, H, W)
    lattice = (_draw(look[:, 4:7] @ torch.tensor([1, 256, 65536]), 196) % 256).to(torch.uint8)      # small, as a copy that is not to wait
    lattice = lattice.to(device, non_blocking=True).view(-1, 1, 14, 14) / 255
    noise = F.interpolate(lattice, (size, size), mode="bilinear", align_corners=True)[:, 0]
    stripes = 0.5 + (torch.sin(along * frequency + phase) * 1.5).clamp(-0.5, 0.5)
    blend = torch.where(kind == 1, along * 0.7 + 0.5, torch.where(kind == 2, stripes, noise)) * (kind > 0)
    return torch.lerp(first, second, blend[:, None])


def render(scenes: Scenes, size: int, device="cpu") -> Tensor:
    """Images (B, 3, size, size) float32 in [-1, 1]. Never waits for the device."""
    owner, slot = (torch.arange(SLOTS) < scenes.count[:, None]).nonzero(as_tuple=True)  # (O,): one row per shape in the whole batch
    shape, order = scenes.shape[owner, slot].sort()
    owner, slot = owner[order], slot[order]
    angle, pattern = scenes.look[owner, 8] * math.tau / 256, scenes.look[owner, 7]
    xy, radius, paint = scenes.xy[owner, slot] / GRID * size, RADII[scenes.size[owner, slot]] * size, PALETTE[scenes.colour[owner, slot]]
    table = torch.cat([xy, paint, torch.stack([radius, angle.cos(), angle.sin(), pattern], 1)], 1)                # (O, 9)
    table, rows = table.to(device, non_blocking=True), owner.to(device, non_blocking=True)
    cover, x, y = _cover(shape, table[:, :2], table[:, 5], size)
    paint = table[:, 2:5, None, None]
    if pattern.any():
        cos, sin, kind = table[:, 6:, None, None].unbind(1)
        along = cos * x + sin * y
        shade = torch.where(kind == 1, along * 0.15, torch.sin(along * 9) * 0.1) * (kind > 0)       # a light from the side, or stripes
        paint = paint * (1 + shade[:, None])
    ground = _ground(scenes.look, size, device)
    images = ground.index_add(0, rows, cover[:, None] * (paint - ground[rows]))  # shapes never overlap, so their order does not matter
    return images.clamp(0, 1) * 2 - 1


# ---------------------------------------------------------------- text

class Claim(NamedTuple):
    """A sentence about an image, and whether it holds of a scene. skill: single, relation, count, differ, compare, negate or universal."""
    skill: str
    text: str
    holds: Callable[[Scene], bool]


RELATIONS = {"left of": lambda a, b: b.x - a.x >= MARGIN, "right of": lambda a, b: a.x - b.x >= MARGIN,
             "above": lambda a, b: b.y - a.y >= MARGIN, "below": lambda a, b: a.y - b.y >= MARGIN}
COMPARISONS = {"larger than": lambda a, b: a.size == "large" != b.size, "smaller than": lambda a, b: b.size == "large" != a.size}

# How often each skill is drawn among those that have something to say.
WEIGHTS = {"single": 96, "relation": 50, "count": 25, "differ": 35, "compare": 20, "negate": 4, "universal": 8}


def _a(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _things(difficulty: str) -> list[tuple[str, Callable[[Object], bool]]]:
    """Plural words for the kinds of a difficulty, each with its test: ("circles", ...), ("red shapes", ...)."""
    n = KINDS[difficulty]
    return ([(_plural(s), lambda o, s=s: o.shape == s) for s in SHAPES[:n]]
            + [(f"{c} shapes", lambda o, c=c: o.colour == c) for c in COLOURS[:n]])


def claims(scene: Scene) -> list[Claim]:
    """Everything that the templates can truly say of a scene, each sentence once, "a red circle" (of scenes with one shape) first."""
    said: dict[str, Claim] = {}

    def say(skill, text, holds):
        said.setdefault(text, Claim(skill, text, holds))

    if len(scene) == 1:
        o = scene[0]
        for text in (_a(o.noun), f"one {o.noun}", f"there is {_a(o.noun)}", f"a picture of {_a(o.noun)}", f"the {o.shape} is {o.colour}"):
            say("single", text, lambda s: len(s) == 1 and s[0].noun == o.noun)
        if scene.difficulty == "textured":
            for text in (f"a {o.size} {o.noun}", f"one {o.size} {o.noun}", f"there is a {o.size} {o.noun}"):
                say("single", text, lambda s: len(s) == 1 and s[0][:3] == o[:3])
    else:
        say("count", f"{NUMBERS[len(scene)]} shapes", lambda s, n=len(scene): len(s) == n)
    for skill, tests in (("relation", RELATIONS), ("compare", COMPARISONS)):                # there is such a pair
        for (word, test), (a, b) in itertools.product(tests.items(), itertools.permutations(scene, 2)):
            if a.noun != b.noun and test(a, b):
                say(skill, f"{_a(a.noun)} {word} {_a(b.noun)}", lambda s, a=a.noun, b=b.noun, test=test: any(
                    (p.noun, q.noun) == (a, b) and test(p, q) for p, q in itertools.permutations(s, 2)))
    nouns = [o.noun for o in scene]
    for a, b in itertools.combinations(scene, 2):                                           # exactly one of each
        if nouns.count(a.noun) == nouns.count(b.noun) == 1:
            text, pair = f"one {a.colour if a.shape == b.shape else a.noun} and one {b.noun}", sorted((a.noun, b.noun))
            say("differ", text, lambda s, pair=pair: sorted(o.noun for o in s if o.noun in pair) == pair)
    for word, test in _things(scene.difficulty):
        n = sum(map(test, scene))
        if n >= 2:                                                                          # exactly so many
            say("count", f"{NUMBERS[n]} {word}", lambda s, n=n, test=test: sum(map(test, s)) == n)
        if n == 0:
            say("negate", f"no {word}", lambda s, test=test: not any(map(test, s)))
        if n == len(scene) > 1:                                                             # of two shapes or more
            say("universal", f"all shapes are {word.removesuffix(' shapes')}", lambda s, test=test: len(s) > 1 and all(map(test, s)))
    return list(said.values())


def caption(scene: Scene, roll: int) -> Claim:
    """One claim, picked by a non-negative random integer. Of one shape, seven captions in ten are exactly "a COLOUR SHAPE"."""
    true = claims(scene)
    skills = [skill for skill in dict.fromkeys(claim.skill for claim in true) for _ in range(WEIGHTS[skill])]
    roll, draw = divmod(roll, len(skills))
    found = [claim for claim in true if claim.skill == skills[draw]]
    pick = roll % (len(found) * 3 if skills[draw] == "single" else len(found))
    return found[pick if pick < len(found) else 0]


def _the(scene: Scene, o: Object) -> str | None:
    """The shortest name that only this object has: "the circle", "the red circle", "the small red circle", or None."""
    for fields, name in ((1, o.shape), (2, o.noun), (3, f"{o.size} {o.noun}")):
        if sum(o[:fields] == other[:fields] for other in scene) == 1:
            return f"the {name}"
    return None


def questions(scene: Scene) -> list[tuple[str, str, str]]:
    """(type, question, answer) for all that can be asked without ambiguity. Types: colour, shape, count, existence, relation, comparison.
    Within a type, the answers yes and no come in equal numbers."""
    n, asked, chance = KINDS[scene.difficulty], [], round(scene[0].x * GRID) + round(scene[0].y * GRID)
    for shape in sorted({o.shape for o in scene}):
        colours = [o.colour for o in scene if o.shape == shape]
        if len(set(colours)) == 1:
            asked.append(("colour", f"what colour {'is the ' + shape if len(colours) == 1 else 'are the ' + _plural(shape)}?", colours[0]))
    for colour in sorted({o.colour for o in scene}):
        shapes = [o.shape for o in scene if o.colour == colour]
        if len(set(shapes)) == 1:
            one = len(shapes) == 1
            asked.append(("shape", f"what {'shape is' if one else 'shapes are'} {colour}?", shapes[0] if one else _plural(shapes[0])))

    numbers = [(word, sum(map(test, scene))) for word, test in _things(scene.difficulty)]
    absent, numbers = [pair for pair in numbers if not pair[1]], [pair for pair in numbers if pair[1]]
    counted = numbers + [("shapes", len(scene)), *absent[chance % 3:][:1]]
    asked += [("count", f"how many {word} are there?", NUMBERS[k]) for word, k in counted]
    for (word, k), (other, m) in itertools.permutations(numbers, 2):
        if k != m and word.endswith(" shapes") == other.endswith(" shapes"):
            asked.append(("comparison", f"are there more {word} than {other}?", "yes" if k > m else "no"))

    nouns = sorted({o.noun for o in scene})
    # What is not there, but shares its colour or its shape with something that is: "no" cannot be told from one word alone.
    wrong = [f"{c} {s}" for c, s in itertools.product(COLOURS[:n], SHAPES[:n])
             if f"{c} {s}" not in nouns and any(o.colour == c or o.shape == s for o in scene)]
    for i, noun in enumerate(nouns):
        asked += [("existence", f"is there {_a(noun)}?", "yes"), ("existence", f"is there {_a(wrong[(chance + i) % len(wrong)])}?", "no")]
    for a, b in itertools.permutations([o for o in scene if _the(scene, o)], 2):
        sized = any(_the(scene, o).split()[1] in SIZES for o in (a, b))        # a name with a size would give the answer away
        for type, tests in (("relation", RELATIONS), ("comparison", {} if sized else COMPARISONS)):
            asked += [(type, f"is {_the(scene, a)} {word} {_the(scene, b)}?", "yes" if test(a, b) else "no")
                      for word, test in tests.items() if test(a, b) or test(b, a)]
    return asked


# ---------------------------------------------------------------- edits

EDITS = ("recolour", "remove", "add", "move")
RADIUS = dict(zip(SIZES, RADII.tolist()))


def _fits(o: Object, others) -> bool:
    """Whether an object lies inside the image and clear of the others, as `_place` puts them."""
    inside = all(RADIUS[o.size] + BORDER <= v <= 1 - RADIUS[o.size] - BORDER for v in (o.x, o.y))
    return inside and all(math.hypot(o.x - p.x, o.y - p.y) >= RADIUS[o.size] + RADIUS[p.size] + GAP for p in others)


def _edit(kind: str, scene: Scene, rng) -> tuple[str, list[Object]] | None:
    """A random instruction of one kind, and the objects after it; None if it cannot be carried out or would be ambiguous."""
    if kind == "add":
        (colour, shape), size = rng.choice(seen_pairs(scene.difficulty)), rng.choice(SIZES) if scene.difficulty == "textured" else "large"
        new = Object(shape, colour, size, rng.randrange(GRID) / GRID, rng.randrange(GRID) / GRID)
        words = f"{size} {new.noun}" if scene.difficulty == "textured" else new.noun
        return (f"add {_a(words)}", [*scene, new]) if len(scene) < SLOTS and _fits(new, scene) else None
    target = rng.choice(scene)
    name, rest = _the(scene, target), [o for o in scene if o is not target]
    if kind == "recolour":          # where one shape has no name of its own: "make the circles green"
        colour = rng.choice([c for c, s in seen_pairs(scene.difficulty) if s == target.shape and c != target.colour])
        changed = [target] if name else [o for o in scene if o.shape == target.shape]
        objects = [o._replace(colour=colour) if o in changed else o for o in scene]
        return f"make {name or 'the ' + _plural(target.shape)} {colour}", objects
    if not name:
        return None
    if kind == "remove":
        return (f"remove {name}", rest) if rest else None
    word, dx, dy = rng.choice((("to the left", -1, 0), ("to the right", 1, 0), ("up", 0, -1), ("down", 0, 1)))
    step = rng.randint(math.ceil(MARGIN * GRID), GRID // 2) / GRID
    moved = target._replace(x=target.x + dx * step, y=target.y + dy * step)
    return (f"move {name} {word}", rest + [moved]) if _fits(moved, rest) else None


def edits(scene: Scene, rng) -> tuple[str, str, Scene] | None:
    """One random edit (kind, instruction, scene after it); kind: recolour, remove, add or move; rng: a `random.Random`. None, rarely, where
    nothing fits. No edit leads from a training scene to a validation scene, nor to a held-out pair that was not there before."""
    free = bool(is_validation(pack([scene])))
    for kind in rng.sample(EDITS, len(EDITS)):
        for _ in range(40):
            if made := _edit(kind, scene, rng):
                after = Scene(sorted(made[1], key=lambda o: (o.y, o.x)), scene.look)
                if free or not is_validation(pack([after])):
                    return kind, made[0], after
    return None


def carried_out(kind: str, before: Scene, after: Scene, read: Scene | None) -> bool:
    """Whether a scene that was read is what an edit asked for: its shapes, colours and sizes and, of a move, that shape on that side of
    where it was, by half of what counts as a relation: no instruction says where exactly."""
    if read is None or sorted(o[:3] for o in read) != sorted(o[:3] for o in after):
        return False
    if kind != "move":
        return True
    (old,), (new,) = set(before) - set(after), set(after) - set(before)
    there = next(o for o in read if o[:3] == old[:3])           # the only one: else it could not have been named
    dx, dy = new.x - old.x, new.y - old.y                       # one of them is 0
    return (there.x - old.x) * dx + (there.y - old.y) * dy > MARGIN / 2 * abs(dx + dy)


# ---------------------------------------------------------------- reader

READ_SIZE = 64          # larger images are averaged down to this many pixels a side
# Lightness counts little, since shading and patterns change it; then red against green, and yellow against blue.
FEATURES = torch.tensor([[0.12, 0.12, 0.12], [0.7, -0.7, 0.0], [0.4, 0.4, -0.8]])
GROUND_CHROMA = 0.13    # below it, a pixel belongs to the ground
PURE = 0.25             # a colour's misfit must be at most this share of the next colour's; halfway colours stay unread
MATCH, AHEAD = 0.86, 0.008      # overlap that a shape needs with its template, and by how much it must beat every other shape's


@lru_cache(maxsize=8)
def _templates(size: int, difficulty: str, device: str) -> tuple[Tensor, list[tuple[int, int, float, float]]]:
    """Every shape, size and sub-pixel shift, drawn amid a window of w pixels: (M, w * w), and (shape, size, dx, dy) of each."""
    half, shifts = math.ceil(RADII[1].item() * size) + 2, [i / 4 for i in range(-4, 5)]
    rows = list(itertools.product(range(KINDS[difficulty]), (1,) if difficulty == "plain" else (0, 1), shifts, shifts))
    shape, radius = torch.tensor([row[0] for row in rows]), RADII[[row[1] for row in rows]] * size
    centre = torch.tensor([row[2:] for row in rows]) + half + 0.5
    return _cover(shape, centre.to(device), radius.to(device), 2 * half + 1)[0].flatten(1), rows


def _unmix(images: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Every pixel of images (B, 3, H, W) in [0, 1] as a mixture of the ground and each of n colours: the colour's share in [0, 1.2], and
    the squared misfit of the best mixture, both (B, n, H, W)."""
    matrix = FEATURES.to(images.device)
    f, p = torch.einsum("fc,bchw->bfhw", matrix, images), PALETTE[:n].to(images.device) @ matrix.T                # (B, 3, H, W), (n, 3)
    calm = (f[:, 1:].norm(dim=1, keepdim=True) < GROUND_CHROMA).to(f)
    calm = F.adaptive_avg_pool2d(torch.cat([f * calm, calm], 1), 8)                                               # (B, 4, 8, 8)
    calm = F.avg_pool2d(calm, 3, 1, 1) + 0.05 * calm.mean((2, 3), keepdim=True) + 1e-4  # the ground nearby, and a little of all of it
    ground = F.interpolate(calm[:, :3] / calm[:, 3:], images.shape[2:], mode="bilinear")
    d = f - ground
    dot = torch.einsum("bfhw,nf->bnhw", d, p) - (d * ground).sum(1, keepdim=True)
    length = (p * p).sum(1)[:, None, None] - 2 * torch.einsum("bfhw,nf->bnhw", ground, p) + (ground * ground).sum(1, keepdim=True)
    share = (dot / length).clamp(0, 1.2)
    return share, (d * d).sum(1, keepdim=True) - 2 * share * dot + share * share * length


def _components(solid: Tensor) -> Tensor:
    """Number the connected regions of a mask (B, H, W): every pixel gets its region's highest pixel number, counted from 1; 0 outside."""
    h, w = solid.shape[1:]
    solid = solid.to(torch.int16)
    ids = torch.arange(1, h * w + 1, device=solid.device, dtype=torch.int16).view(h, w) * solid
    for _ in range(w // 2):         # enough to run around the largest shape
        for axis in (1, 2):
            before, after = ids.narrow(axis, 0, h - 1), ids.narrow(axis, 1, h - 1)      # every pixel and its neighbour, as views of ids
            after.copy_(torch.maximum(before, after))
            before.copy_(torch.maximum(before, after))
            ids *= solid
    return ids.long()


def _regions(ids: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """(image, region number), (O,) each, of all regions of at least so many pixels, in images with up to four and hardly any crumbs."""
    ids = ids.flatten(1)
    area = torch.zeros(len(ids), ids.shape[1] + 1, device=ids.device).scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.float32))
    area[:, 0] = 0
    big = area >= least
    clean = (big.sum(1) <= SLOTS) & ((area * ~big).sum(1) <= least)
    return (big & clean[:, None]).nonzero(as_tuple=True)


def _match(images: Tensor, difficulty: str) -> list[list[Object | None]]:
    """The objects in each image (B, 3, H, W) in [0, 1]; None stands for a region that is no known shape in a known colour."""
    size, n = images.shape[-1], KINDS[difficulty]
    share, misfit = _unmix(images, n)
    best = misfit.argmin(1, keepdim=True)
    ids = _components(share.gather(1, best)[:, 0] > 0.5)
    smallest = RADIUS["large" if difficulty == "plain" else "small"] * size
    image, number = _regions(ids, 0.4 * smallest ** 2)
    found = [[] for _ in images]
    if not len(image):
        return found
    own = ids[image] == number[:, None, None]                                                   # (O, H, W)
    misfit, colours = (misfit[image] * own[:, None]).sum((2, 3)).topk(2, largest=False)         # (O, 2): of the best two colours
    colour = colours[:, 0]
    near = F.max_pool2d(own.float(), 5, 1, 2) * (own | (ids[image] == 0))                       # soft edges too, but nobody else's
    cover = share[image, colour].clamp(max=1) * near
    ticks, mass = torch.arange(size, device=images.device) + 0.5, cover.sum((1, 2))
    x, y = ((cover.sum(1) @ ticks) / mass).long(), ((cover.sum(2) @ ticks) / mass).long()
    templates, rows = _templates(size, difficulty, str(images.device))
    half = math.isqrt(templates.shape[1]) // 2
    window, each = torch.arange(2 * half + 1, device=images.device), torch.arange(len(x), device=images.device)
    patch = F.pad(cover, (half,) * 4)[each[:, None, None], (y[:, None] + window)[:, :, None], (x[:, None] + window)[:, None]].flatten(1)
    squares = (patch * patch).sum(1, keepdim=True) + (templates * templates).sum(1)
    overlap = 2 * patch @ templates.T / squares                                                 # soft Dice, (O, M)
    first, second = overlap.unflatten(1, (n, -1)).amax(2).topk(2)[0].unbind(1)                  # of the best two shapes
    sure = (misfit[:, 0] <= PURE * misfit[:, 1]) & (first >= MATCH) & (first - second >= AHEAD)
    for b, c, m, i, j, ok in zip(*(t.tolist() for t in (image, colour, overlap.argmax(1), x, y, sure))):
        s, r, dx, dy = rows[m]
        found[b].append(Object(SHAPES[s], COLOURS[c], SIZES[r], (i + 0.5 + dx) / size, (j + 0.5 + dy) / size) if ok else None)
    return found


@torch.no_grad()
def read(images: Tensor, difficulty: str = "textured") -> list[Scene | None]:
    """Images (B, 3, H, H) in [-1, 1], else ValueError, to scenes of what this world has; None where an image is no clear scene."""
    if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"read: images of shape {tuple(images.shape)}, expected (B, 3, H, H); add the batch dimension or crop to a square")
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"difficulty is {difficulty!r}, expected one of {', '.join(DIFFICULTIES)}")
    images = (images.float() / 2 + 0.5).clamp(0, 1)
    if images.shape[-1] > READ_SIZE:
        images = F.adaptive_avg_pool2d(images, READ_SIZE)
    look = (DIFFICULTIES.index(difficulty),) + (0,) * 8
    found = (objects for chunk in images.split(128) if len(chunk) for objects in _match(chunk, difficulty))
    return [Scene(sorted(objects, key=lambda o: (o.y, o.x)), look) if objects and None not in objects else None for objects in found]


def same(a: Scene | None, b: Scene | None, tolerance: float = 0.06) -> bool:
    """Whether two scenes show the same objects in any order, each within this distance in image sides; None (unreadable) equals none."""
    if a is None or b is None or len(a) != len(b):
        return False
    return any(all(p[:3] == q[:3] and math.hypot(p.x - q.x, p.y - q.y) <= tolerance for p, q in zip(a, order))
               for order in itertools.permutations(b))
