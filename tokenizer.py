"""The tokenizer: a SigLIP ViT whose shallow layer gives pixel codes, whose deep layer gives semantic codes, and a convolutional decoder.

    image -> ViT ... shallow layer -> projection to E -> RVQ -> pixel codes -> projection to C -> convolutional decoder -> image
               ... deep layer    -> projection to E -> RVQ -> semantic codes -> projection to C: *replaces the hidden state*
               ... last layers -> norm -> attention pooling -> pooled embedding, compared with text (zero-shot)

    tokenizer = DualTokenizer.from_pretrained("out/tokenizer")
    codes = tokenizer.encode(images)            # (B, 3, H, W) in [-1, 1] -> (B, N, S, D), pixel stream first
    images = tokenizer.decode(codes)            # from the pixel codes alone
    vectors = tokenizer.embed(codes)            # (B, N, S*E), what a language model reads
    pooled = tokenizer.pool(images)             # (B, C), through the semantic codes

That is the design `dual`. Those that the papers compare it with are rows of a table, DESIGNS: what feeds which stream, and the losses.

Papers: DualToken (ICLR 2026) §3.2, Appendices B and F.4; SigLIP (Zhai et al. 2023); MUSE-VL (Xie et al. 2025). SigLIP's parameters have
Hugging Face's names, the rest has the names of the authors' released checkpoints, so loading is nearly the identity. In SigLIP's place
there can be CLIP (Radford et al. 2021), or a ViT of the timm package.

Letters: B batch, N image positions, C width, E code dimension, D depth, K codebook size, S streams, L layers, T text length, V vocabulary.
"""

import copy
import functools
import importlib.util
import itertools
import json
import math
import os
import string
from collections import OrderedDict
from dataclasses import asdict, dataclass, field, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from rvq import QUANTIZERS


# ---------------------------------------------------------------------------------------------------------------------
# configuration and presets

ACTIVATIONS = {"gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"), "gelu": F.gelu,
               "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


@dataclass(frozen=True)
class Design:
    """Which features each stream's codes are made of, and which losses apply (names as in `losses.Weights`). The first stream is decoded to
    images where there is a loss of pixels; the last one becomes the deep state where there is a semantic loss. Features of one stream, if
    several, are added up:
    shallow, deep   the ViT's patches after that layer
    encoder         those of a convolutional encoder of its own, with no ViT
    teacher         patches after the deep layer of a frozen copy of the ViT"""
    streams: dict
    losses: tuple
    vit: bool = True                # whether the ViT trains; if not, it stays as it was pretrained
    semantic_layers: int = 0        # of a transformer between the codes and the deep state
    sizes: dict = field(default_factory=dict)           # in place of the preset's
    paper_sizes: dict = field(default_factory=dict)     # the same, in the papers' presets

    @property
    def features(self) -> set:
        return {name for stream in self.streams.values() for name in stream}

    @property
    def paints(self) -> bool:
        """Whether codes can be decoded to images."""
        return "pixel" in self.losses

    @property
    def means(self) -> bool:
        """Whether codes can be pooled, for zero-shot."""
        return "deep" in self.losses or "cosine" in self.losses


_PIXELS, _MEANING = ("pixel", "perceptual", "adversarial", "commitment"), ("deep", "pooled", "commitment")
# layers: BEiT v2's, which MUSE-VL follows
_SDE = dict(losses=("cosine", "commitment"), semantic_layers=3, sizes=dict(depth=1), paper_sizes=dict(codebook_size=32_768, code_dim=8))
DESIGNS = {
    "dual": Design(dict(pixel=("shallow",), semantic=("deep",)), _PIXELS + _MEANING),                     # DualToken, Table 3 (d)
    "naive": Design(dict(unified=("deep",)), _PIXELS + _MEANING),                                         # Table 3 (a), VILA-U's manner
    "recon-deep": Design(dict(unified=("deep",)), _PIXELS),                                               # (b)
    "recon-shallow": Design(dict(unified=("shallow",)), _PIXELS),                                         # (c)
    "quantised": Design(dict(unified=("deep",)), _MEANING, vit=False),                                    # "initial state, quantized"
    "dual-encoder": Design(dict(pixel=("encoder",), semantic=("deep",)), _PIXELS + _MEANING, vit=False),  # App. F.4, Table 6
    "sde": Design(dict(unified=("deep", "teacher")), **_SDE | dict(losses=_PIXELS + ("cosine",))),        # MUSE-VL
    "sde-image": Design(dict(unified=("deep",)), **_SDE | dict(losses=_PIXELS, semantic_layers=0)),       # its Table 6, image branch alone
    "sde-semantic": Design(dict(unified=("deep",)), **_SDE, vit=False),                                   # semantic branch alone
}
SHORT = {"pixel": "pix", "semantic": "sem", "unified": "uni"}       # of the streams, in the names of weights


def check_fields(config):
    """Of a dataclass of sizes, perhaps read from a stranger's file: each value has its field's type, and no number is beyond any model, so
    that nothing is built without end. Raises ValueError with the field's name."""
    for f in fields(config):
        value, counts = getattr(config, f.name), f.type is int
        most = 1 << 24 if counts and not any(word in f.name for word in ("layers", "blocks", "depth")) else 1000
        kinds = {float: (int, float), tuple: (tuple, list)}.get(f.type, (f.type,))
        if type(value) not in kinds or counts and not 0 <= value <= most or f.type is float and not math.isfinite(value):
            expected = f"a whole number from 0 to {most:,}" if counts else f"a {f.type.__name__}"
            raise ValueError(f"{f.name} is {brief(value)}, expected {expected}")


@dataclass
class TowerConfig:
    """Sizes of one transformer, by Hugging Face's names. The defaults are Hugging Face's too: a published config.json leaves them out."""
    hidden_size: int = 768              # C
    intermediate_size: int = 3072       # of the MLP
    num_hidden_layers: int = 12         # L
    num_attention_heads: int = 12
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    causal: bool = False                # positions see only themselves and those before: CLIP's text

    def __post_init__(self):
        check_fields(self)
        check(self.hidden_act in ACTIVATIONS, f"hidden_act is {brief(self.hidden_act)}, expected one of {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}")


@dataclass
class VisionConfig(TowerConfig):
    image_size: int = 224               # pixels a side
    patch_size: int = 16
    class_token: bool = False           # CLIP: before the patches, and pooled; then a norm precedes the layers, and patches have no bias
    projection_dim: int = 0             # CLIP: of the pooled embedding
    pixel_mean: list = field(default_factory=lambda: [0.5] * 3)     # of pixels in [0, 1], as the ViT was trained: see `Pixels`
    pixel_std: list = field(default_factory=lambda: [0.5] * 3)
    timm: dict = field(default_factory=dict)    # arguments that rebuild a ViT of the timm package; empty: SigLIP or CLIP

    def __post_init__(self):
        super().__post_init__()
        check(self.patch_size, "patch_size is 0, expected at least 1 pixel")
        numbers = lambda x: len(x) == 3 and all(isinstance(v, (int, float)) and math.isfinite(v) for v in x)
        check(numbers(self.pixel_mean) and numbers(self.pixel_std) and min(self.pixel_std) > 0, f"pixel_mean is {brief(self.pixel_mean)} "
              f"and pixel_std {brief(self.pixel_std)}, expected three numbers each, and deviations above 0")
        name, loads = self.timm.get("model_name"), any(word in key for key in self.timm for word in ("pretrained", "checkpoint"))
        if self.timm and (not isinstance(name, str) or ":" in name or loads):
            raise ValueError(f"timm is {brief(self.timm)}, expected the model_name of an architecture, and its arguments: "
                             "weights come from model.safetensors alone")

    @property
    def grid(self) -> int:
        """Positions a side. The convolution drops what is left over: 384 / 14 -> 27, as SigLIP-So400m/14-384 does."""
        return self.image_size // self.patch_size


@dataclass
class TextConfig(TowerConfig):
    vocab_size: int = 32000             # V
    max_position_embeddings: int = 64   # T
    projection_size: int = 0            # of the output; 0: hidden_size
    eos_token_id: int = 0               # CLIP, where it is pooled at: the first such token; 2, of old files, means the largest token


@dataclass
class TokenizerConfig:
    """Everything that rebuilds a DualTokenizer."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    preset: str = ""                    # what it was made from, for the record
    design: str = "dual"                # row of DESIGNS
    shallow_layer: int = 0              # pixel stream leaves after this layer, counted from 1; 0: a quarter of the layers (paper App. B)
    deep_layer: int = 0                 # semantic stream leaves after this one; 0: the last but one
    shortcut_layer: int = 0             # release: 0.6 x its projection is added to the pixel branch; 0: none (paper)
    shortcut_weight: float = 0.6
    codebook_size: int = 16384          # K, each stream
    depth: int = 4                      # D
    code_dim: int = 32                  # E
    quantizer: str = "rvq"              # residual, or mcq: a table for each of D chunks of E
    shared_codebook: bool = True        # one table for all depths of a stream; not with mcq
    decoder_channels: int = 128         # of the finest level
    decoder_multipliers: tuple = (1, 1, 4, 4, 8)    # per level, finest first; the side doubles between levels
    decoder_blocks: int = 2             # residual blocks a level, plus one
    decoder_groups: int = 32            # of every GroupNorm
    decoder_in: int = 1024              # channels that enter the decoder
    latent_grid: int = 0                # side that the latent is resized to before the decoder; 0: the ViT's grid

    def __post_init__(self):
        check_fields(self)
        for what, got, known in (("design", self.design, DESIGNS), ("quantizer", self.quantizer, QUANTIZERS)):
            check(got in known, f"there is no {what} {brief(got)}; expected one of {', '.join(known)}")
        self.decoder_multipliers = tuple(self.decoder_multipliers)
        if not 1 <= len(self.decoder_multipliers) <= 10 or not all(type(m) is int and 1 <= m <= 1000 for m in self.decoder_multipliers):
            raise ValueError(f"decoder_multipliers are {brief(self.decoder_multipliers)}, expected 1 to 10 whole numbers of at least 1")
        layers, width = self.vision.num_hidden_layers, self.vision.hidden_size
        self.shallow_layer = self.shallow_layer or max(1, layers // 4)
        self.deep_layer = self.deep_layer or layers - 1
        self.latent_grid = self.latent_grid or self.vision.grid
        if (painted := self.latent_grid * 2 ** (len(self.decoder_multipliers) - 1)) > 4 * self.vision.image_size:
            raise ValueError(f"latent_grid {self.latent_grid} and {len(self.decoder_multipliers)} decoder_multipliers make pictures of "
                             f"{painted} pixels out of {self.vision.image_size}; choose fewer")
        for name, n in (("shallow", self.shallow_layer), ("deep", self.deep_layer), ("shortcut", self.shortcut_layer)):
            check(0 <= n <= layers, f"there is no {name} layer {n}: the ViT has layers 1 to {layers}")
        if max(self.shallow_layer, self.shortcut_layer) > self.deep_layer:
            raise ValueError(f"shallow layer {self.shallow_layer}, deep layer {self.deep_layer}, shortcut layer {self.shortcut_layer}: "
                             f"expected 1 <= shallow <= deep <= {layers} and 0 <= shortcut <= deep")
        for name in ("codebook_size", "depth", "code_dim"):
            check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, expected at least 1")
        if width % self.code_dim:
            raise ValueError(f"the width {width} is not a multiple of the code dimension {self.code_dim}: projections have width / E heads")
        check(self.quantizer != "mcq" or self.code_dim % self.depth == 0, f"the code dimension {self.code_dim} is not a multiple of the "
              f"depth {self.depth}: mcq splits a vector into as many equal chunks; choose another --code-dim or --depth")
        self.shared_codebook &= self.quantizer != "mcq"
        if self.shortcut_layer and self.design != "dual":
            raise ValueError(f"a shortcut layer goes with the design dual, got {self.design}; leave it out")
        levels = (self.decoder_channels * m for m in self.decoder_multipliers)
        for channels in (*[width] * bool(self.image_stream), self.decoder_in, *levels):
            if channels % self.decoder_groups:
                raise ValueError(f"{channels} channels at the decoder are not a multiple of {self.decoder_groups} normalisation groups")

    @property
    def positions(self) -> int:
        return self.vision.grid ** 2    # N

    @property
    def streams(self) -> tuple:
        return tuple(DESIGNS[self.design].streams)

    @property
    def image_stream(self) -> str:
        """The one that is decoded; "": none."""
        return self.streams[0] if DESIGNS[self.design].paints else ""


def _sizes(width, mlp, layers, heads, **more):
    return dict(hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads, **more)


_LARGE, _SO400M = _sizes(1024, 4096, 24, 16), _sizes(1152, 4304, 27, 16)
_NANO = dict(vision=_sizes(96, 192, 6, 3, image_size=32, patch_size=4), text=_sizes(64, 128, 2, 4, vocab_size=257), shallow_layer=2,
             codebook_size=256, depth=4, code_dim=32, decoder_channels=32, decoder_multipliers=(1, 1, 2), decoder_blocks=0,
             decoder_groups=8, decoder_in=64)
PRESETS = {     # the last three, PAPER, are the papers' (Table 1): layers, K, D, E and decoder as released; the others are ours
    "nano": _NANO,      # and as many positions on four times the pixels, for real pictures on a CPU:
    "nano-64": dict(_NANO, vision=dict(_NANO["vision"], image_size=64, patch_size=8), codebook_size=512, decoder_multipliers=(1, 1, 2, 2)),
    "small": dict(vision=_sizes(256, 1024, 8, 4, image_size=64, patch_size=8), text=_sizes(256, 512, 3, 4, vocab_size=257),
                  codebook_size=1024, depth=4, code_dim=32, decoder_channels=64, decoder_multipliers=(1, 2, 2, 4), decoder_blocks=1,
                  decoder_groups=16, decoder_in=256),
    "siglip-l-256": dict(vision=dict(_LARGE, image_size=256), text=dict(_LARGE), depth=4, codebook_size=16384),
    "so400m-384": dict(vision=dict(_SO400M, image_size=384, patch_size=14), text=dict(_SO400M), depth=8, codebook_size=16384),
    "siglip2-so-256": dict(vision=dict(_SO400M, image_size=256), text=dict(_SO400M, vocab_size=256000), depth=8, codebook_size=16384),
}
PAPER = ("siglip-l-256", "so400m-384", "siglip2-so-256")


def preset_config(name: str, image_size: int = 0, layers: int = 0, **changes) -> TokenizerConfig:
    """The configuration of a preset, perhaps at another image_size or with other layers in the ViT (and then the pixel stream from their
    first quarter), the sizes of a design that has its own, and changes by field name. Raises ValueError where these do not exist or fit."""
    check(name in PRESETS, f"no preset {name!r}; expected one of {', '.join(PRESETS)}")
    design = DESIGNS.get(changes.get("design", "dual"), DESIGNS["dual"])
    row = PRESETS[name] | ({"shallow_layer": 0} if layers else {}) | design.sizes | (design.paper_sizes if name in PAPER else {}) | changes
    vision = dict(row["vision"], **({"image_size": image_size} if image_size else {}), **({"num_hidden_layers": layers} if layers else {}))
    side, scale = vision["image_size"], 2 ** (len(row.get("decoder_multipliers", TokenizerConfig.decoder_multipliers)) - 1)
    check(side >= 16, f"image size {side} is too small; expected at least 16 pixels")
    check(side % scale == 0, f"image size {side} is not a multiple of {scale} pixels, as the preset {name} needs; "
          f"choose one, such as {max(1, side // scale) * scale}")
    # Patches of any size: what the decoder gets is resized to its scale, such as 27 -> 24 -> 384 pixels for patches of 14.
    row |= dict(preset=name, vision=VisionConfig(**vision), text=TextConfig(**row["text"]), latent_grid=side // scale)
    return TokenizerConfig(**row)


# ---------------------------------------------------------------------------------------------------------------------
# text: captions to ids

BYTES, PAD = 257, 256       # ids of a tower that reads UTF-8 bytes, and the one after the 256 bytes


class TextVocabulary:
    """Captions to the ids that a text tower was trained on. A table of 257 rows reads UTF-8 bytes; any other goes with the tokenizer.json
    of its folder, SigLIP's (Unigram), SigLIP2's (Gemma's) or CLIP's, read by the package tokenizers when a caption first comes."""
    # First, last and padding mark as published, and what is done to captions: SigLIP learned without capitals or punctuation,
    # SigLIP2 without capitals.
    KINDS = {"CLIP": ("<|startoftext|>", "<|endoftext|>", "<|endoftext|>", str), "SigLIP2": ("", "<eos>", "<pad>", str.lower),
             "SigLIP": ("", "</s>", "</s>",
                        lambda text: " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split()))}

    def __init__(self, config: TextConfig | None, folder: str = ""):
        """config: None where there is no text tower."""
        self.size, self.length = (config.vocab_size, config.max_position_embeddings) if config else (0, 0)
        self.read(folder)

    def read(self, folder: str):
        """What the ids stand for, where they are not bytes: the tokenizer.json of a folder, if it has one."""
        self.path, self.files, self.reader = os.path.join(folder, "tokenizer.json"), {}, None
        if self.size not in (0, BYTES) and folder and os.path.isfile(self.path):
            with open(self.path, "rb") as file:
                self.files["tokenizer.json"] = file.read()

    @property
    def lacking(self) -> str:
        """Why captions cannot be read here, in a sentence; "" where nothing is missing."""
        if not self.size:
            return "a ViT of timm has no text tower"
        if self.size != BYTES and not self.files:
            return (f"the text tower has {self.size:,} ids, and no {self.path} says which they are; "
                    "put the checkpoint's tokenizer.json there")
        if self.files and not importlib.util.find_spec("tokenizers"):
            return f"the vocabulary {self.path} is read by the package tokenizers, which is not here: pip install tokenizers"
        return ""

    def ids(self, captions: list[str]) -> Tensor:
        """List of B strings -> (B, T) int64, padded to the tower's length; longer captions are cut before their last mark. Raises
        ValueError where the vocabulary or its package is missing, or it is damaged or not this tower's."""
        check(not self.lacking, self.lacking)
        first, last, pad, prepare, encode = self.reader = self.reader or self._read()
        rows = torch.full((len(captions), self.length), pad)
        for row, caption in zip(rows, captions):
            caption = caption.encode("utf-8", "replace").decode()       # JSON may hold half a letter, "\ud800", which is no UTF-8
            ids = first + encode(prepare(caption))[:self.length - len(first + last)] + last
            row[:len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return rows

    def _read(self) -> tuple:
        """-> first ids, last ids, padding id, what is done to a caption, and what then makes ids of it."""
        if self.size == BYTES:
            return [], [], PAD, str, lambda text: list(text.encode("utf-8"))
        from tokenizers import Tokenizer
        try:
            reader = Tokenizer.from_buffer(self.files["tokenizer.json"])
        except Exception as error:      # the package raises bare ones
            raise ValueError(f"{self.path} is damaged, or no vocabulary ({str(error)[:100]}); take the checkpoint's again") from None
        table = reader.get_vocab()
        last = max(table.values(), default=0)
        check(len(table) == self.size > last, f"{self.path} has {len(table):,} ids up to {last:,}, and the text tower "
              f"a table of {self.size:,}; take the tokenizer.json of the same checkpoint")
        found = next((marks for marks in self.KINDS.values() if all(mark in table for mark in marks[:3] if mark)), None)
        check(found, f"{self.path} has the marks of none of {', '.join(self.KINDS)}, such as </s>; expected the vocabulary of one")
        reader.no_padding(), reader.no_truncation()     # both are ours
        first, last, pad, prepare = found
        encode = lambda text: reader.encode(text, add_special_tokens=False).ids
        return [table[first]] if first else [], [table[last]], table[pad], prepare, encode


# ---------------------------------------------------------------------------------------------------------------------
# SigLIP: two transformers and a sigmoid; and CLIP, by fields of the configuration

class Attention(nn.Module):
    """Multi-head self-attention, every linear map with bias: (B, N, C) -> (B, N, C)."""

    def __init__(self, c: TowerConfig):
        super().__init__()
        self.heads, self.causal = c.num_attention_heads, c.causal
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(c.hidden_size, c.hidden_size) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        # (B, heads, N, C / heads)
        q, k, v = (p(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v, causal=self.causal).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c: TowerConfig):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c.hidden_size, c.intermediate_size), nn.Linear(c.intermediate_size, c.hidden_size)
        self.activation = ACTIVATIONS[c.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, c: TowerConfig):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps) for _ in range(2))
        self.self_attn, self.mlp = Attention(c), MLP(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(lower(self.layer_norm1(x)))
        return x + self.mlp(lower(self.layer_norm2(x)))


class Pixels(nn.Module):
    """Images in [-1, 1] -> with the mean and deviation that the ViT was trained on, (B, 3, H, W)."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        scale, shift = zip(*((0.5 / std, (0.5 - mean) / std) for mean, std in zip(c.pixel_mean, c.pixel_std)))
        self.register_buffer("scale", torch.tensor(scale)[:, None, None], persistent=False)
        self.register_buffer("shift", torch.tensor(shift)[:, None, None], persistent=False)
        self.same = c.pixel_mean == c.pixel_std == [0.5] * 3        # SigLIP's

    def forward(self, images: Tensor) -> Tensor:
        return images if self.same else images * self.scale + self.shift


class VisionEmbeddings(nn.Module):
    """Patches, row by row, after the class token if there is one, with positions: (B, 3, H, W) -> (B, N, C) or (B, 1 + N, C)."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, c.hidden_size, c.patch_size, stride=c.patch_size, bias=not c.class_token)
        self.position_embedding = nn.Embedding(c.grid ** 2 + c.class_token, c.hidden_size)
        self.class_embedding = nn.Parameter(torch.randn(c.hidden_size)) if c.class_token else None
        self.pre_layrnorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps) if c.class_token else nn.Identity()  # Hugging Face's spelling
        self.pixels = Pixels(c)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embedding(self.pixels(images)).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        return self.pre_layrnorm(x + self.position_embedding.weight)


class PoolingHead(nn.Module):
    """Attention pooling: one learned query, the probe, looks at all positions: (B, N, C) -> (B, C)."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, c.hidden_size))
        self.attention = nn.MultiheadAttention(c.hidden_size, c.num_attention_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(self.probe.expand(len(x), -1, -1), x, x, need_weights=False)[0]     # no residual round the attention
        return (y + self.mlp(self.layernorm(y)))[:, 0]


class VisionTower(nn.Module):
    """SigLIP's ViT, or CLIP's. A state is (B, prefix + N, C): `prefix` counts what stands before the patches, CLIP's class token.
    `checkpointing`: recompute each layer in the backward pass instead of keeping its activations."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.config, self.checkpointing, self.prefix = c, False, int(c.class_token)
        self.embeddings = VisionEmbeddings(c)
        self.encoder = nn.ModuleDict({"layers": nn.Sequential(*(Layer(c) for _ in range(c.num_hidden_layers)))})     # for the names
        self.post_layernorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.head = nn.Linear(c.hidden_size, c.projection_dim, bias=False) if c.class_token else PoolingHead(c)

    def run(self, x: Tensor, first: int, last: int) -> Tensor:
        """Layers first ... last, counted from 1, on a state."""
        for layer in self.encoder.layers[first - 1:last]:
            x = recomputed(self.checkpointing, layer, x)
        return x

    def pool(self, x: Tensor) -> Tensor:
        """State after the last layer -> pooled embedding (B, C), of CLIP (B, projection_dim), not normalised."""
        x = self.post_layernorm(x)
        return self.head(x[:, 0] if self.prefix else x)

    def up_to(self, layer: int) -> list[nn.Parameter]:
        """What the state after a layer depends on."""
        return [*self.embeddings.parameters(), *self.encoder.layers[:layer].parameters()]

    def patches(self, x: Tensor) -> Tensor:
        """A state without what stands before the patches: (B, N, C)."""
        return x[:, self.prefix:] if self.prefix else x     # even an empty slice would change the order in which gradients are added

    def reset(self, patches: Tensor) -> Tensor:
        """Patches (B, N, C) -> a state that knows nothing else: what stands before them becomes their mean."""
        return torch.cat([patches.mean(1, keepdim=True).expand(-1, self.prefix, -1), patches], 1) if self.prefix else patches

    def forward(self, images: Tensor, deep_layer: int = 0) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) -> patches after the deep layer (B, N, C), by default the last but one, and pooled embedding (B, C)."""
        layers = self.config.num_hidden_layers
        deep = deep_layer or layers - 1
        state = self.run(self.embeddings(images), 1, deep)
        return self.patches(state), self.pool(self.run(state, deep + 1, layers))


class TextTower(nn.Module):
    """ids (B, T) -> (B, C), a linear head on the last position of texts padded to full length, without a mask; of CLIP on the end token."""

    def __init__(self, c: TextConfig):
        super().__init__()
        self.config = c
        self.embeddings = nn.ModuleDict({"token_embedding": nn.Embedding(c.vocab_size, c.hidden_size),
                                         "position_embedding": nn.Embedding(c.max_position_embeddings, c.hidden_size)})
        self.encoder = nn.ModuleDict({"layers": nn.Sequential(*(Layer(c) for _ in range(c.num_hidden_layers)))})
        self.final_layer_norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.head = nn.Linear(c.hidden_size, c.projection_size or c.hidden_size, bias=not c.causal)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embeddings.token_embedding(ids) + self.embeddings.position_embedding.weight[:ids.shape[1]]
        x = self.final_layer_norm(self.encoder.layers(x))
        if not self.config.causal:
            return self.head(x[:, -1])
        end = (ids if self.config.eos_token_id == 2 else (ids == self.config.eos_token_id).int()).argmax(1)
        return self.head(x[torch.arange(len(x), device=x.device), end])


class SigLIP(nn.Module):
    """Image and text towers in one space (Zhai et al. 2023); function and files as Hugging Face's SiglipModel, or, where there is a class
    token, CLIPModel. Around a ViT of timm there is no text tower."""

    def __init__(self, vision: VisionConfig, text: TextConfig, vision_model: nn.Module | None = None):
        """vision_model: one that has its weights already."""
        super().__init__()
        text = replace(text, projection_size=vision.projection_dim if vision.class_token else vision.hidden_size)
        self.vision_config, self.text_config = vision, text
        self.vocabulary = TextVocabulary(None if vision.timm else text)
        if vision.timm:
            self.vision_model, self.text_model = vision_model or TimmTower(vision), None
            return
        self.vision_model, self.text_model = VisionTower(vision), TextTower(text)
        self.logit_scale = nn.Parameter(torch.full(() if vision.class_token else (1,), math.log(10.0)))
        if vision.class_token:      # CLIP has no bias
            self.register_buffer("logit_bias", torch.zeros(()), persistent=False)
        else:
            self.logit_bias = nn.Parameter(torch.full((1,), -10.0))
        self.apply(init)
        nn.init.normal_(self.text_model.embeddings.token_embedding.weight)  # padding is most of a text: small differences would drown in it
        places = self.vision_model.embeddings.position_embedding.weight
        if not places.is_meta:
            places.data[int(vision.class_token):] = 0.5 * _waves(vision.grid, vision.hidden_size)

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> unit vectors (B, C)."""
        return F.normalize(self.vision_model(images)[1], dim=-1)

    def text_ids(self, captions: list[str]) -> Tensor:
        """List of B strings -> (B, T) int64, as `TextVocabulary.ids`."""
        return self.vocabulary.ids(captions)

    def encode_text(self, ids: Tensor) -> Tensor:
        """(B, T) int64 -> unit vectors (B, C)."""
        return F.normalize(self.text_model(ids), dim=-1)

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> image vectors (B, C), text vectors (B, C), logit scale (log) and bias."""
        return self.encode_image(images), self.encode_text(ids), self.logit_scale, self.logit_bias

    def save_pretrained(self, folder: str):
        kind = "timm" if self.vision_config.timm else "clip" if self.vision_config.class_token else "siglip"
        config = {"model_type": kind, "vision_config": asdict(self.vision_config), "text_config": asdict(self.text_config)}
        config |= {"projection_dim": self.vision_config.projection_dim} if kind == "clip" else {}
        theirs = {ours: name for name, ours in CLIP_NAMES.items()} if kind == "clip" else {}
        save_model(folder, {renamed(name, theirs): value for name, value in self.state_dict().items()}, config)
        save_files(folder, self.vocabulary.files)

    @classmethod
    def from_pretrained(cls, folder: str, image_size: int = 0) -> "SigLIP":
        """A folder with config.json and model.safetensors in Hugging Face's layout, of SigLIP, SigLIP2 at fixed resolution, or CLIP; for
        another image_size its position embeddings are interpolated. Raises ValueError if anything is missing, left over or misshapen."""
        vision, text = read_towers(folder)
        check(not vision.timm or image_size in (0, vision.image_size), f"the ViT in {folder} is timm's, for {vision.image_size} pixels, "
              f"and positions of timm are not interpolated here; got image size {image_size}")
        # Checkpoints of old transformers releases also hold the positions 0, 1, 2, ... themselves.
        weights = read_shards(folder, ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"))
        if vision.class_token:
            weights = {renamed(name, CLIP_NAMES): value for name, value in weights.items()}
        new, name = replace(vision, image_size=image_size or vision.image_size), "vision_model.embeddings.position_embedding.weight"
        check(new.grid, f"images of {image_size} pixels are smaller than the patches of {folder}, {vision.patch_size} pixels a side")
        own = int(vision.class_token)       # the class token's position stays as it is
        if new.grid != vision.grid and name in weights and weights[name].dim() == 2 and len(weights[name]) == own + vision.grid ** 2:
            first, rest = weights[name].float().split([own, vision.grid ** 2])
            old, size = rest.T.unflatten(1, (vision.grid, vision.grid))[None], (new.grid, new.grid)
            grid = F.interpolate(old, size, mode="bicubic", align_corners=False)[0]
            weights[name] = torch.cat([first, grid.flatten(1).T])
        model = built(lambda: cls(new, text), weights, folder, bool(vision.timm))
        model.vocabulary.read(folder)
        return model

    @classmethod
    def from_timm(cls, name: str, image_size: int = 0, pretrained: bool = True) -> "SigLIP":
        """A ViT of the timm package by timm's name, such as "eva02_large_patch14_clip_224", "hf-hub:OWNER/NAME" or "local-dir:FOLDER", with
        its pretrained weights or, if not pretrained, random ones. What rebuilds it is kept: of a folder or a name on the hub, the
        architecture and its arguments. Raises ValueError as `timm_model` does."""
        model = timm_model(name, pretrained, **({"img_size": image_size} if image_size else {}))
        (side, _), source, path = model.patch_embed.img_size, *name.partition(":")[::2]
        again = {"model_name": name}
        if path:
            import timm
            read = getattr(timm.models, f"load_model_config_from_{'path' if source == 'local-dir' else 'hf'}")
            _, again["model_name"], arguments = read(path)
            again |= arguments or {}
        # heads and MLP are not timm's, but those of what stands beside its ViT
        heads = model.embed_dim // 64 if model.embed_dim % 64 == 0 else 1
        vision = VisionConfig(hidden_size=model.embed_dim, intermediate_size=4 * model.embed_dim, num_hidden_layers=len(model.blocks),
                              num_attention_heads=heads, image_size=side, patch_size=side // model.patch_embed.grid_size[0],
                              pixel_mean=list(model.pretrained_cfg["mean"]), pixel_std=list(model.pretrained_cfg["std"]),
                              timm=again | {"img_size": side})
        return cls(vision, TextConfig(), TimmTower(vision, model))


# What Hugging Face's configurations of CLIP leave out, vision and text (of SigLIP: the defaults of our classes), and OpenAI's pixels.
CLIP_DEFAULTS = (dict(patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5, class_token=True,
                      pixel_mean=[0.48145466, 0.4578275, 0.40821073], pixel_std=[0.26862954, 0.26130258, 0.27577711]),
                 dict(vocab_size=49408, hidden_size=512, intermediate_size=2048, num_attention_heads=8, max_position_embeddings=77,
                      hidden_act="quick_gelu", layer_norm_eps=1e-5, causal=True, eos_token_id=49407))
CLIP_NAMES = {"vision_model.pre_layrnorm.": "vision_model.embeddings.pre_layrnorm.", "visual_projection.": "vision_model.head.",
              "text_projection.": "text_model.head."}


def renamed(name: str, table: dict[str, str]) -> str:
    """A tensor's name with its beginning replaced by the table's."""
    return next((ours + name[len(theirs):] for theirs, ours in table.items() if name.startswith(theirs)), name)


def read_towers(folder: str) -> tuple[VisionConfig, TextConfig]:
    """The sizes in the config.json of a SigLIP or CLIP, else ValueError; pixels' mean and deviation in preprocessor_config.json, if any."""
    config = read_config(folder)
    check({"vision_config", "text_config"} <= config.keys(), f"{folder}/config.json is no SigLIP configuration: "
          f"expected vision_config and text_config, got {', '.join(config)[:120]}")
    kind, defaults = config.get("model_type"), {"siglip": ({}, {}), "timm": ({}, {}), "clip": CLIP_DEFAULTS}
    if not isinstance(kind, str) or kind not in defaults:
        raise ValueError(f"{folder}/config.json has model_type {brief(kind)}, expected 'siglip' (or SigLIP2 at fixed resolution) or 'clip'")
    name = "preprocessor_config.json"
    found = read_config(folder, name) if os.path.isfile(os.path.join(folder, name)) else {}
    pixels = {ours: found[theirs] for ours, theirs in (("pixel_mean", "image_mean"), ("pixel_std", "image_std")) if theirs in found}
    pooled = {"projection_dim": config.get("projection_dim", 512)} if kind == "clip" else {}
    vision = make_config(VisionConfig, config["vision_config"], folder, defaults[kind][0] | pixels, pooled)
    return vision, make_config(TextConfig, config["text_config"], folder, defaults[kind][1])


def init(module: nn.Module, embedding: float = 0.2):
    """Weights such that outputs are as large as inputs, zero biases; norms stay at one. Embeddings start large: at the usual 0.02 they
    drown in what the first layer adds, and training from scratch is slower."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=embedding)
    elif isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drawn(*shape: int, std: float) -> nn.Parameter:
    """Normal numbers of this deviation."""
    return nn.Parameter(nn.init.normal_(torch.empty(shape), std=std))


def _waves(grid: int, width: int) -> Tensor:
    """Sines and cosines of column and row, (grid^2, width): where learned positions start, since neighbours then look alike."""
    frequency = 100.0 ** -torch.linspace(0, 1, math.ceil(width / 4))
    angle = torch.arange(grid)[:, None] * frequency
    wave = torch.cat([angle.sin(), angle.cos()], 1)                                          # (grid, width / 2)
    return torch.cat([wave.repeat(grid, 1), wave.repeat_interleave(grid, 0)], 1)[:, :width]


def resized(x: Tensor, side: int) -> Tensor:
    """A feature map (B, C, g, g) -> (B, C, side, side), itself where that is the same."""
    return x if x.shape[-1] == side else F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


def lower(x: Tensor) -> Tensor:
    """To autocast's precision, once; autocast itself would do it again for every product that reads x."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention (B, heads, T, d), grouped where k and v have fewer heads, n a group: then bias, which is added to the scores, has n times
    T rows, (B, 1, n T, places). By hand where torch's kernels are slow: in bf16 on a CPU, and on CUDA over a handful of places, where flash
    attention keeps 128 for each head of each row of the batch, and fails above some thousand rows."""
    if bias is not None and (n := q.shape[1] // k.shape[1]) > 1:    # a group's heads become places: few kernels take both
        return attend(q.unflatten(1, (-1, n)).flatten(2, 3), k, v, bias).unflatten(2, (n, -1)).flatten(1, 2)
    by_hand = q.dtype == torch.bfloat16 if q.device.type == "cpu" else bias is None and causal and q.shape[2] <= 16
    with torch.autocast("cpu" if q.device.type == "meta" else q.device.type, enabled=False):       # meta has no autocast
        k, v = k.to(q.dtype), v.to(q.dtype)
        if not by_hand:
            return F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        if bias is None:
            bias = q.new_full((q.shape[2], k.shape[2]), -math.inf).triu(1) if causal else q.new_zeros(())
        else:
            bias = bias.expand(q.shape[0], q.shape[1], -1, -1).flatten(0, 1)
        # one pass over (T, T) where scaling and masking are two more
        scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=q.shape[3] ** -0.5)
        return scores.softmax(-1).unflatten(0, q.shape[:2]) @ v


def recomputed(on: bool, function, x: Tensor) -> Tensor:
    """function(x), and, if on and gradients are wanted, once more in the backward pass instead of keeping what it computed."""
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False) if on and torch.is_grad_enabled() else function(x)


# ---------------------------------------------------------------------------------------------------------------------
# ViTs of the timm package: EVA-02, ViTamin, ...

def timm_model(model_name: str, pretrained: bool, **more) -> nn.Module:
    """timm.create_model without a classifier. Raises ValueError where timm cannot be imported or make it, or it is no ViT of squares."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:        # RuntimeError: a torchvision for another torch
        raise ValueError(f"the backbone {model_name} needs the package timm, which cannot be imported "
                         f"({str(error).splitlines()[0][:100]}); pip install timm, with the torchvision that fits this torch") from None
    try:
        model = timm.create_model(model_name, pretrained=pretrained, **more | {"num_classes": 0})
    except Exception as error:      # timm and its hub raise nearly anything
        raise ValueError(f"timm cannot make {model_name!r} ({first_line(error)}); expected a name that timm.list_models() gives, "
                         "hf-hub:OWNER/NAME, or local-dir:FOLDER") from None
    if missing := [name for name in ("patch_embed", "_pos_embed", "norm_pre", "blocks", "norm", "forward_head", "num_prefix_tokens")
                   if not hasattr(model, name)]:
        raise ValueError(f"{model_name} of timm has no {missing[0]}; expected a plain ViT, such as EVA-02 or ViTamin")
    if len(set(model.patch_embed.grid_size)) > 1:
        raise ValueError(f"{model_name} of timm has {model.patch_embed.grid_size} positions; expected a square")
    return model


class TimmTower(VisionTower):
    """A ViT of timm. Class token and registers are the prefix; what is pooled is what timm's classifier would get."""

    def __init__(self, c: VisionConfig, model: nn.Module | None = None):
        nn.Module.__init__(self)        # none of SigLIP's parts
        self.model = model or timm_model(pretrained=False, **c.timm)
        self.config, self.checkpointing, self.prefix, self.pixels = c, False, self.model.num_prefix_tokens, Pixels(c)

    def embeddings(self, images: Tensor) -> Tensor:
        x = self.model._pos_embed(self.model.patch_embed(self.pixels(images)))
        return self.model.norm_pre(x[0] if isinstance(x, tuple) else x)         # EVA gives its rotations too

    def run(self, x: Tensor, first: int, last: int) -> Tensor:
        shape = [self.config.grid] * 2 if getattr(self.model, "dynamic_img_size", False) else None      # DINOv3 keeps no rotations ready
        rope = self.model.rope.get_embed(shape) if getattr(self.model, "rope", None) is not None else None
        for n in range(first - 1, last):
            more = {} if rope is None else {"rope": rope[n] if getattr(self.model, "rope_mixed", False) else rope}
            x = recomputed(self.checkpointing, functools.partial(self.model.blocks[n], **more), x)
        return x

    def up_to(self, layer: int) -> list[nn.Parameter]:
        later = ("blocks", "norm", "fc_norm", "attn_pool", "head")
        return [*(p for name, p in self.model.named_parameters() if name.split(".")[0] not in later),
                *self.model.blocks[:layer].parameters()]

    def pool(self, x: Tensor) -> Tensor:
        return self.model.forward_head(self.model.norm(x), pre_logits=True)


# ---------------------------------------------------------------------------------------------------------------------
# which layers are shallow (paper §3.2, Appendix F.1)

@torch.no_grad()
def layer_similarity(vit: VisionTower, images: Tensor) -> Tensor:
    """Eq. 8: cosine similarity between the layers, each averaged over positions, then over images (B, 3, H, W): (L, L), in order."""
    rows = []
    for part in images.split(16):
        x, means = vit.embeddings(part), []
        for n in range(1, vit.config.num_hidden_layers + 1):
            x = vit.run(x, n, n)
            means.append(F.normalize(vit.patches(x).float().mean(1), dim=-1))
        rows.append(torch.einsum("lbc,mbc->blm", *[torch.stack(means)] * 2))
    return torch.cat(rows).mean(0)


def split_layers(similarity: Tensor) -> tuple[int, int]:
    """Similarity (L, L) -> the last layers of the shallow and of the middle part. For the paper's bright squares: the three parts in which
    a layer is, on average over all layers, most similar to the others of its part. A layer that stands alone counts nothing, or the best
    parts would be single layers; since layers are counted, not pairs, no part wins by being long. Raises ValueError below three layers."""
    layers, others = len(similarity), similarity.double().cpu().clone().fill_diagonal_(0)
    check(layers >= 3, f"{layers} layers cannot be split into shallow, middle and deep; expected at least 3")
    # Over layers first + 1 ... last, the sum of each one's mean similarity to the others among them.
    bright = lambda first, last: others[first:last, first:last].sum().item() / max(1, last - first - 1)
    return max(itertools.combinations(range(1, layers), 2), key=lambda cut: bright(0, cut[0]) + bright(*cut) + bright(cut[1], layers))


# ---------------------------------------------------------------------------------------------------------------------
# projections into and out of the code space

class ProjectionAttention(nn.Module):
    """Attention from width i to width o. Heads = wide / narrow, each as wide as the narrow side. Going in (o <= i) the heads are averaged;
    coming out (o > i) they stand side by side, and positions see only themselves and those before."""

    def __init__(self, i: int, o: int):
        super().__init__()
        wide = max(i, o)
        self.heads, self.causal = wide // min(i, o), o > i
        self.qkv = nn.Linear(i, 3 * wide, bias=False)
        # a bias on the keys would cancel in the softmax
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(wide)), nn.Parameter(torch.zeros(wide))
        self.proj = nn.Linear(o, o)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, narrow) each
        y = attend(q, k, v, causal=self.causal)
        return self.proj(y.transpose(1, 2).flatten(2) if self.causal else y.mean(1))


class GeGLU(nn.Module):
    """Gated MLP with a norm of its own, hidden width twice the outer one."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.w0, self.w1, self.w2 = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.w2(F.gelu(self.w0(x), approximate="tanh") * self.w1(x))


class Projection(nn.Module):
    """Attention plus linear skip, then a gated MLP: (B, N, i) -> (B, N, o). C -> E before a quantizer, E -> C after (release alone)."""

    def __init__(self, i: int, o: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(i), nn.LayerNorm(o), nn.LayerNorm(i)
        self.attn, self.proj, self.mlp = ProjectionAttention(i, o), nn.Linear(i, o), GeGLU(o)

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(self.norm3(x)) + self.attn(self.norm1(x))
        return y + self.mlp(self.norm2(y))


# ---------------------------------------------------------------------------------------------------------------------
# convolutional decoder (VQGAN's, Esser et al. 2021)

class ResBlock(nn.Module):
    """Two convolutions round a skip: (B, i, h, w) -> (B, o, h, w)."""

    def __init__(self, i: int, o: int, groups: int, first_kernel: int = 3):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, i, eps=1e-6), nn.Conv2d(i, o, first_kernel, padding=first_kernel // 2)
        self.norm2, self.conv2 = nn.GroupNorm(groups, o, eps=1e-6), nn.Conv2d(o, o, 3, padding=1)
        if i != o:
            self.nin_shortcut = nn.Conv2d(i, o, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head attention over all places of a feature map."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        # (B, 1, hw, width); torch's fast kernels want them so in memory too
        q, k, v = (p(y).flatten(2).transpose(1, 2)[:, None].contiguous() for p in (self.q, self.k, self.v))
        return x + self.proj_out(attend(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention at the coarsest; then twice the side, except at the finest."""

    def __init__(self, i: int, o: int, c: TokenizerConfig, coarsest: bool, finest: bool):
        super().__init__()
        blocks, groups, self.checkpointing = c.decoder_blocks + 1, c.decoder_groups, False
        self.block = nn.ModuleList(ResBlock(i if n == 0 else o, o, groups) for n in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(o, groups) if coarsest else nn.Identity() for _ in range(blocks))
        self.upsample = nn.Identity() if finest else nn.Sequential(OrderedDict(
            nearest=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(o, o, 3, padding=1)))

    def forward(self, x: Tensor) -> Tensor:
        for part in (*map(nn.Sequential, self.block, self.attn), self.upsample):
            x = recomputed(self.checkpointing, part, x)
        return x


class Decoder(nn.Module):
    """(B, decoder_in, g, g) -> images (B, 3, g * 2^(levels - 1), ...), neither clamped nor squashed."""

    def __init__(self, c: TokenizerConfig):
        super().__init__()
        widths, groups = [c.decoder_channels * m for m in c.decoder_multipliers], c.decoder_groups
        self.checkpointing = False
        self.conv_in = nn.Conv2d(c.decoder_in, widths[-1], 3, padding=1)
        top, w = len(widths) - 1, widths[-1]
        self.mid = nn.ModuleDict({"block_1": ResBlock(w, w, groups), "attn_1": AttnBlock(w, groups), "block_2": ResBlock(w, w, groups)})
        self.up = nn.ModuleList(Level(widths[min(n + 1, top)], widths[n], c, n == top, n == 0) for n in range(top + 1))
        self.norm_out, self.conv_out = nn.GroupNorm(groups, widths[0], eps=1e-6), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(self.conv_in(x))))
        for level in reversed(self.up):     # up.0 is the finest
            x = level(x)
        return self.conv_out(recomputed(self.checkpointing, lambda x: F.silu(self.norm_out(x)), x))


class ConvEncoder(nn.Module):
    """The decoder's mirror image, for a pixel stream without a ViT: images (B, 3, H, W) -> (B, C, g, g), g the decoder's first side."""

    def __init__(self, c: TokenizerConfig):
        super().__init__()
        widths, groups = [c.decoder_channels * m for m in c.decoder_multipliers], c.decoder_groups
        top, w = len(widths) - 1, widths[-1]
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        halve = lambda n: nn.Identity() if n == top else nn.Conv2d(widths[n], widths[n], 3, stride=2, padding=1)
        self.down = nn.ModuleList(nn.Sequential(Level(widths[max(n - 1, 0)], widths[n], c, n == top, finest=True), halve(n))
                                  for n in range(top + 1))      # finest: it does not double the side
        self.mid = nn.Sequential(ResBlock(w, w, groups), AttnBlock(w, groups), ResBlock(w, w, groups))
        self.norm_out, self.conv_out = nn.GroupNorm(groups, w, eps=1e-6), nn.Conv2d(w, c.vision.hidden_size, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer

@dataclass
class Features:
    """What a training forward returns; None where the design has no such thing."""
    images: Tensor | None   # (B, 3, H, W) reconstructions, not clamped
    deep: Tensor | None     # (B, N, C) quantized deep feature, projected back
    pooled: Tensor | None   # (B, C) pooled embedding after the remaining layers
    commitment: dict        # stream -> scalar (Eq. 1)
    codes: Tensor           # (B, N, S, D)


class DualTokenizer(nn.Module):
    """One ViT, two codebooks (paper §3.2, Fig. 2 right), or another row of DESIGNS."""

    def __init__(self, config: TokenizerConfig, siglip: SigLIP | None = None):
        super().__init__()
        c = self.config = config
        width, self.design = c.vision.hidden_size, DESIGNS[c.design]
        self.siglip_model = siglip or SigLIP(c.vision, c.text)
        if self.siglip_model.vision_config != c.vision:
            raise ValueError(f"the SigLIP's sizes are {self.siglip_model.vision_config}, expected {c.vision}; train or name another SigLIP")
        for stream in c.streams:
            setattr(self, f"prequant_{SHORT[stream]}", Projection(width, c.code_dim))
        self.prequant_shortcut = Projection(width, c.code_dim) if c.shortcut_layer else None
        for stream in c.streams:
            setattr(self, f"postquant_{SHORT[stream]}", Projection(c.code_dim, width))
        for n, stream in enumerate(c.streams):
            more = {} if c.quantizer == "mcq" else {"shared": c.shared_codebook}
            setattr(self, f"quantizer_{SHORT[stream]}", QUANTIZERS[c.quantizer](c.code_dim, c.codebook_size, c.depth, seed=n, **more))
        self.post_quant_conv = ResBlock(width, c.decoder_in, c.decoder_groups, first_kernel=1) if self.design.paints else None
        self.decoder = Decoder(c) if self.design.paints else None
        self.encoder = ConvEncoder(c) if "encoder" in self.design.features else None
        self.semantic_decoder = nn.Sequential(*(Layer(c.vision) for _ in range(self.design.semantic_layers)))
        self.semantic_decoder.apply(init)
        self.teacher = copy.deepcopy(self.siglip_model.vision_model).requires_grad_(False) if "teacher" in self.design.features else None
        self.shared_gradient = 1.0      # share of the semantic losses' gradient that enters the layers which feed the pixel stream too

    def _of(self, part: str) -> list[nn.Module]:
        """prequant, postquant or quantizer of each stream."""
        return [getattr(self, f"{part}_{SHORT[stream]}") for stream in self.config.streams]

    @property
    def quantizers(self) -> dict[str, nn.Module]:
        return dict(zip(self.config.streams, self._of("quantizer")))

    def set_trainable(self):
        """Which weights training changes: the text tower stays, and so does what no loss reaches."""
        c, vit = self.config, self.siglip_model.vision_model
        self.siglip_model.requires_grad_(False)
        if self.design.vit and "pooled" in self.design.losses:
            vit.requires_grad_(True)
        elif self.design.vit:
            for p in vit.up_to(max({"shallow": c.shallow_layer, "deep": c.deep_layer}.get(name, 0) for name in self.design.features)):
                p.requires_grad_(True)

    def checkpointing(self, on: bool = True):
        """Trade compute for memory: recompute the ViT's layers and the blocks of decoder and encoder in the backward pass."""
        for part in self.modules():
            if part is not self and hasattr(part, "checkpointing"):
                part.checkpointing = on

    def sources(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) -> the features that feed the streams, by `Design`'s names, (B, N, C) each. ValueError for another size."""
        c, vit, side = self.config, self.siglip_model.vision_model, self.config.vision.image_size
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(f"got images of shape {tuple(images.shape)}, expected (B, 3, {side}, {side}): resize and crop them first")
        layers, found = {"shallow": c.shallow_layer, "shortcut": c.shortcut_layer, "deep": c.deep_layer}, {}
        at = {name: n for name, n in layers.items() if n and name in self.design.features | {"shortcut"}}
        x, taken = vit.embeddings(images) if at else None, 0
        for name in sorted(at, key=at.get):         # deep last, also where layers are the same
            if name == "deep" and taken and self.shared_gradient != 1:
                x = x.detach() + self.shared_gradient * (x - x.detach())
            x, taken = vit.run(x, taken + 1, at[name]), at[name]
            found[name] = vit.patches(x)
        if self.teacher is not None:
            found["teacher"] = self.teacher.patches(self.teacher.run(self.teacher.embeddings(images), 1, c.deep_layer))
        if self.encoder is not None:
            found["encoder"] = resized(self.encoder(images), c.vision.grid).flatten(2).transpose(1, 2)
        return found

    def latents(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) -> what the quantizers receive, (B, N, E) each."""
        found = self.sources(images)
        latents = [prequant(sum(found[name] for name in names))
                   for prequant, names in zip(self._of("prequant"), self.design.streams.values())]
        if self.prequant_shortcut is not None:
            # in code space, before quantising (release)
            latents[0] = latents[0] + self.config.shortcut_weight * self.prequant_shortcut(found["shortcut"])
        return latents

    def _pool(self, deep: Tensor) -> Tensor:
        """Quantized deep feature (B, N, C) -> pooled embedding (B, C): it *becomes* the state of the remaining layers (see `reset`)."""
        vit = self.siglip_model.vision_model
        return vit.pool(vit.run(vit.reset(deep), self.config.deep_layer + 1, self.config.vision.num_hidden_layers))

    def _decode(self, x: Tensor) -> Tensor:
        """Quantized features of the image stream, projected back (B, N, C) -> images (B, 3, H, W)."""
        c = self.config
        x = resized(x.transpose(1, 2).unflatten(2, (c.vision.grid, c.vision.grid)), c.latent_grid)  # (B, C, g, g), such as 27 -> 24
        return self.decoder(self.post_quant_conv(x))

    def forward(self, images: Tensor) -> Features:
        """The training pass: all streams, quantized straight-through."""
        quantized, codes, commitment = zip(*(quantizer(z) for quantizer, z in zip(self._of("quantizer"), self.latents(images))))
        features = [postquant(z_q) for postquant, z_q in zip(self._of("postquant"), quantized)]               # (B, N, C) each
        deep = self.semantic_decoder(features[-1]) if self.design.means else None
        painted = self._decode(features[0]) if self.design.paints else None
        pooled = self._pool(deep) if "pooled" in self.design.losses else None
        return Features(painted, deep, pooled, dict(zip(self.config.streams, commitment)), torch.stack(codes, 2))

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> codes (B, N, S, D) int64, pixel stream first."""
        return torch.stack([quantizer.encode(z) for quantizer, z in zip(self._of("quantizer"), self.latents(images))], 2)

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (B, N, S, D) -> code vectors summed over depth, streams side by side: (B, N, S*E). Raises ValueError for other codes."""
        self._check(codes)
        return torch.cat([quantizer.embed(codes[:, :, s]) for s, quantizer in enumerate(self._of("quantizer"))], -1)

    def decode(self, codes: Tensor, depth: int | None = None) -> Tensor:
        """Codes (B, N, S, D) -> images (B, 3, H, W) in [-1, 1], by its image stream's first `depth` codes or all. Else ValueError."""
        self._check(codes)
        if not self.design.paints:
            raise ValueError(f"the design {self.config.design} has no decoder: its codes stand for meaning alone; take another design's")
        z_q = self._of("quantizer")[0].vectors(codes[:, :, 0])[:, :, :depth].sum(2)                           # (B, N, E)
        return self._decode(self._of("postquant")[0](z_q)).clamp(-1, 1)

    def pool_codes(self, codes: Tensor) -> Tensor:
        """Codes (B, N, S, D) -> pooled embedding (B, C), not normalised, of the last stream. ValueError for a design that learns none."""
        self._check(codes)
        check(self.design.means, f"the design {self.config.design} learns no semantics: its codes are not pooled; take another design's")
        return self._pool(self.semantic_decoder(self._of("postquant")[-1](self._of("quantizer")[-1].embed(codes[:, :, -1]))))

    def pool(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> pooled embedding (B, C) through the semantic codes, for zero-shot; not normalised."""
        return self.pool_codes(self.encode(images))

    def _check(self, codes: Tensor):
        shape = (self.config.positions, len(self.config.streams), self.config.depth)
        if codes.dim() != 4 or tuple(codes.shape[1:]) != shape:
            raise ValueError(f"got codes of shape {tuple(codes.shape)}, expected (B, N, S, D) = (B, {', '.join(map(str, shape))})")

    def save_pretrained(self, folder: str, **more):
        """config.json, model.safetensors and the text tower's vocabulary; `more` goes into config.json too."""
        save_model(folder, self.state_dict(), {"model_type": "dualtoken", **asdict(self.config), **more})
        save_files(folder, self.siglip_model.vocabulary.files)

    @classmethod
    def from_pretrained(cls, folder: str) -> "DualTokenizer":
        """What `save_pretrained` wrote, in eval mode. Raises ValueError if anything is missing, left over or misshapen."""
        config = read_config(folder, kind="dualtoken")
        for name, kind in (("vision", VisionConfig), ("text", TextConfig)):
            config[name] = make_config(kind, config.get(name), folder)
        config = make_config(TokenizerConfig, config, folder)
        model = built(lambda: cls(config), read_weights(folder), folder, bool(config.vision.timm))
        model.siglip_model.vocabulary.read(folder)
        return model.eval()

    @classmethod
    def from_released(cls, folder: str, siglip_folder: str = "") -> "DualTokenizer":
        """The authors' released layout: their config.json and their weights, as safetensors or a .pt file (never unpickled). The backbone's
        sizes are under `siglip` in that config.json, or in siglip_folder's. In eval mode. Raises ValueError as `from_pretrained` does."""
        config = read_config(folder)
        c, siglip = config.get("rqvaesiglip"), config.get("siglip") or (read_config(siglip_folder) if siglip_folder else None)
        check(isinstance(c, dict), f"{folder}/config.json is not the released layout: expected rqvaesiglip, got {', '.join(config)[:120]}")
        if not isinstance(siglip, dict) or not {"vision_config", "text_config"} <= siglip.keys():
            raise ValueError(f"the sizes of the backbone of {folder} are not known; give its SigLIP's folder with --siglip")
        vision = make_config(VisionConfig, siglip["vision_config"], folder)
        text = make_config(TextConfig, siglip["text_config"], folder)
        try:
            dd, vq = c["ddconfig"], c["vq_pix"]
            if dd["attn_resolutions"] != [dd["resolution"] // 2 ** (len(dd["ch_mult"]) - 1)]:
                raise ValueError(f"it has decoder attention at {brief(dd['attn_resolutions'])}, expected it at the coarsest level alone")
            if any(c["vq_sem"][key] != vq[key] for key in ("n_embed", "code_shape", "embed_dim", "shared_codebook")):
                raise ValueError("its vq_pix and vq_sem differ, expected the same sizes")
            config = TokenizerConfig(
                vision=vision, text=text, preset="released", shallow_layer=c["layer_recon"], deep_layer=c["layer_sem"],
                shortcut_layer=c.get("layer_shortcut") or 0, shortcut_weight=c.get("weight_shortcut", 0.0),
                codebook_size=vq["n_embed"], depth=vq["code_shape"][-1], code_dim=vq["embed_dim"], shared_codebook=vq["shared_codebook"],
                decoder_channels=dd["ch"], decoder_multipliers=dd["ch_mult"], decoder_blocks=dd["num_res_blocks"],
                decoder_in=dd["decoder_in_channels"], latent_grid=(c.get("decoder_latent_shape") or [0])[0])
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(f"{folder}/config.json does not describe a released tokenizer ({first_line(error)}); copy it again") from None
        model = built(lambda: cls(config), _from_released(_read_released(folder), config), folder)
        model.siglip_model.vocabulary.read(siglip_folder or folder)
        return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# files

def _read_released(folder: str) -> dict[str, Tensor]:
    """The weights in a folder of the release: weights.safetensors, model.safetensors or the one .pt, .pth or .bin file; else ValueError."""
    for name in ("weights.safetensors", "model.safetensors"):
        if os.path.isfile(os.path.join(folder, name)):
            return read_weights(folder, name)
    found = sorted(name for name in os.listdir(folder) if name.endswith((".pt", ".pth", ".bin")))
    check(len(found) == 1, f"{folder} has {' and '.join(found) or 'no weights'}, "
          "expected weights.safetensors, model.safetensors, or one .pt file")
    return read_tensors(os.path.join(folder, found[0]))


def read_tensors(path: str) -> dict[str, Tensor]:
    """A file of tensors by name: safetensors, or torch's own, of which nothing is unpickled that is no tensor; a training checkpoint's
    `state_dict` or `model` is taken out. Raises ValueError for anything else."""
    if path.endswith(".safetensors"):
        return read_weights(os.path.dirname(path), os.path.basename(path))
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        weights = next((weights[key] for key in ("state_dict", "model") if isinstance(weights.get(key), dict)), weights)
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    except Exception as error:      # torch.load raises nearly anything on damaged bytes
        raise ValueError(f"{path} cannot be read ({first_line(error)}); expected a whole file of tensors by name") from None
    # A tensor may also claim more numbers than the file has, by repeating them: a copy of it would take all memory.
    plain = lambda x: (isinstance(x, Tensor) and x.layout == torch.strided and x.device.type == "cpu" and not x.is_quantized
                       and x.nbytes <= os.path.getsize(path))
    if odd := [name for name, value in weights.items() if not plain(value)]:
        raise ValueError(f"{path} holds {brief(', '.join(map(str, odd)))} which are no tensors, or larger than the file; "
                         "expected plain tensors by name")
    return weights


def _from_released(weights: dict[str, Tensor], c: TokenizerConfig) -> dict[str, Tensor]:
    """Names and shapes of the release to ours: tables lose their padding row, D copies of a shared table become one, the key bias (which
    cannot matter) is dropped, and what we count beyond the release starts fresh."""
    tables, out, used = 1 if c.shared_codebook else c.depth, {}, set()
    for stream in ("quantizer_pix", "quantizer_sem"):
        for ours, theirs, padding in (("codebook", "weight", 1), ("ema_sum", "embed_ema", 0), ("ema_count", "cluster_size_ema", 0)):
            names = [f"{stream}.codebooks.{d}.{theirs}" for d in range(c.depth)]
            found = [weights.get(name) for name in names]
            used.update(names)
            if all(value is not None and value.dim() and value.shape == found[0].shape for value in found):
                check(tables > 1 or all(torch.equal(value, found[0]) for value in found),
                      f"the release's {stream} has several tables of {theirs}, expected copies of one; copy its files again")
                out[f"{stream}.{ours}"] = torch.stack([value[:len(value) - padding].float() for value in found[:tables]])
        out[f"{stream}.age"] = torch.zeros(tables, c.codebook_size, dtype=torch.int32)
        out[f"{stream}.updates"] = torch.zeros((), dtype=torch.int64)
    return out | {name: value.float() for name, value in weights.items() if name not in used and not name.endswith("zero_k_bias")}


def save_model(folder: str, weights: dict[str, Tensor], config: dict):
    """model.safetensors, then config.json, each under a temporary name: where one cannot be written (OSError), the earlier one stays."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "model.safetensors")
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, path + ".tmp", metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        raise OSError(f"{path} cannot be written ({error}); what was there is kept: make room, or choose another folder") from None
    os.replace(path + ".tmp", path)
    write_json(os.path.join(folder, "config.json"), config)


def save_files(folder: str, files: dict[str, bytes]):
    """Files by name, each under a temporary one first."""
    os.makedirs(folder or ".", exist_ok=True)
    for name, content in files.items():
        with open(os.path.join(folder, name + ".tmp"), "wb") as file:
            file.write(content)
        os.replace(os.path.join(folder, name + ".tmp"), os.path.join(folder, name))


def write_json(path: str, content):
    """Pretty JSON under a temporary name, then renamed."""
    save_files(os.path.dirname(path), {os.path.basename(path): (json.dumps(content, indent=1) + "\n").encode()})


def check(right, words: str):
    """Raises ValueError with these words where something is not right."""
    if not right:
        raise ValueError(words)


def brief(value) -> str:
    """As Python writes it, cut: a file can hold anything."""
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


def first_line(error: Exception) -> str:
    """What another package says, which may be pages, or nothing."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:150]}"


def read_json(path: str):
    """Raises ValueError for what is no JSON."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:       # RecursionError: a hundred thousand brackets
        raise ValueError(f"{path} is no JSON: {error}; copy or write it again") from None


def read_config(folder: str, name: str = "config.json", kind: str = "") -> dict:
    """config.json of a folder, or another. Raises ValueError if there is none, it is no JSON object, or of no model of this kind."""
    path = os.path.join(folder, name)
    try:
        config = read_json(path)
    except OSError as error:
        raise ValueError(f"no model in {folder!r}: {path} cannot be read ({error.strerror}); "
                         "expected a folder with config.json and model.safetensors") from None
    check(isinstance(config, dict), f"{path} holds a {type(config).__name__}, expected a JSON object")
    if kind and config.get("model_type") != kind:
        raise ValueError(f"{path} is no model of ours: model_type is {brief(config.get('model_type'))}, expected {kind!r}")
    return config


def make_config(cls, values: dict, folder: str, defaults: dict = {}, given: dict = {}):
    """A dataclass from the values of its fields, `defaults` where they are left out or null, `given` in any case; others are ignored."""
    check(isinstance(values, dict), f"{folder}/config.json has no sizes for a {cls.__name__}: got {brief(values)}, expected an object")
    try:
        return cls(**defaults | {f.name: values[f.name] for f in fields(cls) if values.get(f.name) is not None} | given)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{folder}/config.json does not describe a {cls.__name__}: {error}") from None


def read_shards(folder: str, ignore: tuple = ()) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the files that model.safetensors.index.json names. ValueError: one is missing."""
    index, names = os.path.join(folder, "model.safetensors.index.json"), ["model.safetensors"]
    if not os.path.exists(os.path.join(folder, names[0])) and os.path.exists(index):
        try:
            with open(index, encoding="utf-8") as file:
                names = sorted(set(json.load(file)["weight_map"].values()))
            if odd := [name for name in names if os.path.basename(name) != name or not name.isprintable() or len(name) > 200]:
                raise ValueError(f"got {brief(odd[0])}, expected files beside it")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is no index of safetensors files ({type(error).__name__}: {error}); copy it again") from None
    return {key: value for name in names for key, value in read_weights(folder, name, ignore).items()}


def read_weights(folder: str, name: str = "model.safetensors", ignore: tuple = ()) -> dict[str, Tensor]:
    """All tensors of a safetensors file but the ignored. Raises ValueError for a missing, truncated or damaged file."""
    path = os.path.join(folder, name)
    check(os.path.isfile(path), f"no weights at {path}; expected a safetensors file")
    try:
        with safe_open(path, "pt") as file:
            # copied: parts of a mapped file are aligned by its header, and products of unaligned numbers round differently
            weights = {key: file.get_tensor(key).clone() for key in file.keys() if key not in ignore}
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} is truncated or damaged ({first_line(error)}); copy or save it again") from None
    if odd := [name for name, value in weights.items() if any(kind in str(value.dtype) for kind in ("float8", "float4", "complex"))]:
        raise ValueError(f"{path} holds {brief(odd[0])} of {weights[odd[0]].dtype}, expected numbers of 16 bits or more; "
                         "take a checkpoint that is not quantised")
    return weights


def built(make, weights: dict[str, Tensor], folder: str, timm: bool = False) -> nn.Module:
    """make(), with the weights of its folder. First without memory: the sizes are a config.json's, which can say anything, and what weights
    of these shapes are not there for is not to be allocated. Raises ValueError as `load_weights` does."""
    if not timm:        # which looks at numbers while it builds
        load_weights(unbuilt(make, folder), weights, folder, only_check=True)
    model = make()
    load_weights(model, weights, folder)
    return model


class Undrawn(TorchFunctionMode):
    """`nn.init.normal_` draws nothing. For tensors without numbers torch would import its compiler to do so, which takes seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return kwargs["tensor"] if function is nn.init.normal_ else function(*args, **(kwargs or {}))


def unbuilt(make, folder: str) -> nn.Module:
    """make() on the meta device, where tensors have shapes alone. Raises ValueError for sizes that nothing has."""
    try:
        with Undrawn(), torch.device("meta"):
            return make()
    except (RuntimeError, ValueError, LookupError, ArithmeticError) as error:       # widths of 0, tensors of 2^70 numbers
        raise ValueError(f"{folder}/config.json describes what cannot be built ({first_line(error)}); copy it again") from None


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str, assign: bool = False, only_check: bool = False):
    """Load all or raise ValueError with missing, unexpected and misshapen tensors by name. assign: of a model on the meta device."""
    own = model.state_dict()
    wrong = [f"missing {name} {tuple(own[name].shape)}" for name in own if name not in weights]
    wrong += [f"unexpected {name if name.isprintable() and len(name) < 100 else brief(name)} {brief(tuple(weights[name].shape))}"
              for name in weights if name not in own]
    both = [(name, weights[name], own[name]) for name in own if name in weights]
    wrong += [f"{name} is {brief(tuple(x.shape))}, expected {tuple(y.shape)}" for name, x, y in both if x.shape != y.shape]
    wrong += [f"{name} is of {x.dtype}, expected {y.dtype}" for name, x, y in both if x.is_floating_point() != y.is_floating_point()]
    check(not wrong, f"the weights in {source} are not those of this model; {len(wrong)} differences: {'; '.join(wrong[:10])}"
          + "; ..." * (len(wrong) > 10))
    if not only_check:
        model.load_state_dict(weights, assign=assign)
