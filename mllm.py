"""The multimodal LLM: one decoder-only transformer that reads words and pictures, and writes both.

    words ------------------------------------------------> embedding --+
    codes -> code vectors, summed over depth, streams side by side       |-> Qwen2's transformer -> states h
             -> 2-layer projector ------------------------> embedding --+
    h before a word     -> the LLM's head -> the word
    h before a position -> per stream: 2-layer projector -> causal transformer over depth -> D codes

    model = DualMLLM.from_pretrained("out/mllm")
    codes = model.paint(["a red circle above a blue square"])                   # (B, N, S, D), for DualTokenizer.decode
    words = model.answer(codes, ["what colour is the circle?"])                 # ["red"]
    codes = model.paint(["make the circle green"], pictures=codes)              # edited

A sequence, as `pack` lays it out (bytes, GPT-2; Qwen's and SmolLM2's vocabularies have Qwen's chat form):

    <image_start> N positions <image_end> what colour is the circle? \n red <|endoftext|>     loss on: red <|endoftext|>
    a red circle \n <image_gen_start> N positions <image_gen_end> <|endoftext|>               loss on: the N positions, S x D codes each

Papers: DualToken (ICLR 2026) §3.3, Appendices D.1 and F.4; Qwen2 (Yang et al. 2024); RQ-Transformer (Lee et al. 2022). The LLM's parameters
have Hugging Face's names, so loading Qwen2.5 is the identity.

Letters: B batch, T sequence places, N image positions, C width, V vocabulary, M pictures (or positions of all pictures), S streams, D
depth, d the first of these, K codebook size, E code dimension, X places of text.
"""

import base64
import hashlib
import itertools
import json
import math
import unicodedata
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from tokenizer import (attend, brief, check, check_fields, drawn, init, load_weights, lower, make_config, read_config, read_shards,
                       read_weights, recomputed, save_files, save_model, unbuilt)

# ---------------------------------------------------------------------------------------------------------------------
# text as ids: UTF-8 bytes without any file, or a GPT-2, Qwen2.5 or SmolLM2 vocabulary from local files; in each, four marks for images

MARKS = ("<image_start>", "<image_end>", "<image_gen_start>", "<image_gen_end>")    # round an image that is read, round one that is painted
SPECIALS = ("<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> "
            "<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call> </tool_call> "
            "<|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>").split()     # Qwen2.5's; GPT-2: the first
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"     # pieces of text; no token crosses two
QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SMOLLM_SPECIALS = SPECIALS[:3] + ("<repo_name> <reponame> <file_sep> <filename> <gh_stars> <issue_start> <issue_comment> <issue_closed> "
                                  "<jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output> <jupyter_script> <empty_output>").split()
# GPT-2's pieces of the stretches between digits, each digit a piece: white space that ends a stretch is whole.
SMOLLM_SPLIT = GPT2_SPLIT.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
# Number of ordinary tokens: pieces, NFC, special tokens, the first ordinary token's id, how many are single bytes (a corpus may lack some)
KNOWN = {50256: (GPT2_SPLIT, False, SPECIALS[:1], 0, 256), 151643: (QWEN_SPLIT, True, SPECIALS, 0, 256),
         49135: (SMOLLM_SPLIT, False, SMOLLM_SPECIALS, 17, 235)}
HIDDEN = [b for b in range(256) if b == 32 or not chr(b).isprintable()]     # bytes that vocabulary files spell by characters 256, 257, ...
BYTE = {chr(256 + HIDDEN.index(b) if b in HIDDEN else b): b for b in range(256)}


def _files(folder: str, more: list[Path] = ()) -> list[Path]:
    """What `from_folder` reads, or would read if there were `more`; [] for nothing."""
    layouts = ([Path(folder, name) for name in names.split()] for names in ("tokenizer.json", "vocab.json merges.txt", "qwen.tiktoken"))
    return next((paths for paths in layouts if all(path in more or path.is_file() for path in paths)), [])


def _ranks(vocab: dict, merges: list) -> dict[bytes, int]:
    """Ordinary tokens {bytes: id}. tiktoken merges the lowest id first, so merges have to make the tokens in this order."""
    ordinary = {token: id for token, id in vocab.items() if token not in {*SPECIALS, *SMOLLM_SPECIALS}}
    if odd := set("".join(ordinary)) - BYTE.keys():
        raise ValueError(f"{''.join(sorted(odd))[:20]!r} in its tokens spells no bytes")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    made = [vocab.get(left + right) if left in vocab and right in vocab else None for left, right in pairs]
    *_, first, single = KNOWN.get(len(ordinary), (0, 0))
    if single and made != list(range(first + single, first + len(ordinary))):
        raise ValueError(f"its {len(merges)} merges do not make tokens {first + single}, ... in order, out of known ones")
    return {bytes(BYTE[char] for char in token): id for token, id in ordinary.items()}


class TextTokenizer:
    """`marks` {name: id}; `end`, `turn_start`, `turn_end` (or None); `ordinary` ids; `size`, highest id + 1; `files` as read."""

    def __init__(self, ranks: dict[bytes, int], split: str, nfc: bool, specials: list[str], files: dict[str, bytes]):
        self.ordinary, self.size = {*ranks.values()}, len(ranks) + len(specials) + len(MARKS)
        self.specials = dict(zip([*specials, *MARKS], (id for id in range(self.size) if id not in self.ordinary)))      # the free ids
        self.lacking = [b for b in range(256) if bytes([b]) not in ranks]       # these get ids that no text keeps
        self.encoding = tiktoken.Encoding("text", pat_str=split, mergeable_ranks=ranks | {bytes([b]): self.size + b for b in self.lacking},
                                          special_tokens=self.specials)
        self.marks = {name: self.specials[name] for name in MARKS}
        self.end, self.turn_start, self.turn_end = (self.specials.get(name) for name in SPECIALS[:3])
        self.nfc, self.files = nfc, files

    @classmethod
    def bytes(cls) -> "TextTokenizer":
        """UTF-8 bytes 0 to 255, <|endoftext|> 256, the marks 257 to 260."""
        return cls({bytes([b]): b for b in range(256)}, r"(?s).+", False, SPECIALS[:1], {})

    @classmethod
    def from_folder(cls, folder: str) -> "TextTokenizer":
        """GPT-2's, Qwen2.5's or SmolLM2's vocabulary. Raises ValueError if the folder has none, another, or a damaged one."""
        paths, ranks, added = _files(folder), {}, []
        try:
            files = {path.name: path.read_bytes() for path in paths}
            texts = {name: content.decode("utf-8") for name, content in files.items()}
            match [json.loads(text) if name.endswith(".json") else text.splitlines() for name, text in texts.items()]:
                case [{"model": {"vocab": dict(vocab), "merges": list(merges)}, "added_tokens": list(added)}]:
                    ranks = _ranks(vocab, merges)
                case [dict(vocab), list(lines)]:
                    ranks = _ranks(vocab, [line for line in lines if line and not line.startswith("#version:")])
                case [list(lines)]:
                    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in map(str.split, lines)}
            *how, first, single = KNOWN.get(len(ranks), (0, 256))
            if not how or {*ranks.values()} != {*range(first, first + len(ranks))} or [len(token) for token in ranks].count(1) != single:
                raise ValueError(f"{len(ranks)} ordinary tokens; their ids have to be {first}, {first + 1}, {first + 2}, ... "
                                 f"and {single} of them single bytes")
            made = cls(ranks, *how, files)
            if odd := [token.get("content") for token in added if made.specials.get(token.get("content")) != token.get("id")]:
                raise ValueError(f"the added tokens {str(odd)[:200]} are others, or have other ids")
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"no vocabulary in {' and '.join(map(str, paths)) or folder} ({error}); expected 50256 of GPT-2, 151643 of "
                             "Qwen2.5 or 49135 of SmolLM2: copy tokenizer.json, vocab.json + merges.txt or qwen.tiktoken") from None
        return made

    def encode(self, text: str) -> list[int]:
        """Text that spells a mark or another special token is never turned into it. A byte that the vocabulary lacks is left out."""
        ids = self.encoding.encode_ordinary(unicodedata.normalize("NFC", text) if self.nfc else text)
        if not self.lacking or max(ids, default=0) < self.size:
            return ids
        # As in the tokenizers library, what stands around it in its piece is merged without it. tiktoken tells no pieces; the pattern by
        # which its teaching version finds them is the same.
        from tiktoken._educational import SimpleBytePairEncoding
        pieces = SimpleBytePairEncoding(pat_str=self.encoding._pat_str, mergeable_ranks={})._pat.findall(text)
        kept = (bytes(b for b in piece.encode("utf-8", "replace") if b not in self.lacking) for piece in pieces)
        return [id for piece in kept if piece for id in self.encoding._encode_single_piece(piece)]

    def decode(self, ids: list[int]) -> str:
        """Bytes that are no UTF-8 become U+FFFD; special tokens, and ids outside the vocabulary, are left out."""
        return self.encoding.decode([id for id in ids if id in self.ordinary])

    def save(self, folder: str):
        """Writes `files`, so that `from_folder(folder)` gives the same tokenizer. Raises ValueError if it would not."""
        self.check_room(folder)
        save_files(folder, self.files)

    def check_room(self, folder: str):
        """Raises ValueError where another vocabulary in the folder would be read in place of this one, saved there."""
        copies = [Path(folder, name) for name in self.files]
        if self.files and (found := _files(folder, copies)) != copies:
            raise ValueError(f"{' and '.join(map(str, found))} would be read instead of what is saved; remove it or choose another folder")


# ---------------------------------------------------------------------------------------------------------------------
# sequences: text, images to read and images to paint, in any order

class Words(NamedTuple):
    """A piece of text; loss: whether the model is to learn to write it."""
    ids: list
    loss: bool = False


class Picture(NamedTuple):
    """A picture as codes (N, S, D), or as continuous features (N, C) where the model reads those; paint: whether the model writes it."""
    data: Tensor
    paint: bool = False
    loss: bool = True       # of a painted one


def turn(text: TextTokenizer, asked: list, reply: list | None = None) -> list:
    """One exchange, as segments: what is asked, without loss, and the reply, with loss; both are lists of strings and `Picture`s. Without a
    reply, the sequence ends where it begins. Vocabularies with chat marks get Qwen's chat form; others a line break, and the end mark."""
    chat, line = text.turn_start is not None, text.encode("\n")
    opening = [text.turn_start, *text.encode("user\n")] if chat else []
    between = [text.turn_end, *line, text.turn_start, *text.encode("assistant\n")] if chat else line
    segments = [Words(opening), *(Words(text.encode(a)) if isinstance(a, str) else a for a in asked), Words(between)]
    if reply is not None:
        segments += [Words(text.encode(r), loss=True) if isinstance(r, str) else r for r in reply]
        segments.append(Words([text.turn_end if chat else text.end], loss=not isinstance(reply[-1], Picture)))
        segments += [Words(line)] if chat else []
    return segments


def document(text: TextTokenizer, parts: list) -> list:
    """Plain or interleaved text, as segments: all strings with loss, pictures as they come, between two end marks."""
    middle = [Words(text.encode(p), loss=True) if isinstance(p, str) else p for p in parts]
    return [Words([text.end]), *middle, Words([text.end], loss=True)]


class Batch(NamedTuple):
    """Packed sequences. Places are indices into the flattened (B * T) grid; a place's hidden state predicts what comes next."""
    ids: Tensor             # (B, T) int64; 0 where a picture or nothing is
    mask: Tensor            # (B, T) bool: false in the padding
    text_from: Tensor       # (X,) places whose state predicts a text token that has a loss
    text_target: Tensor     # (X,) those tokens
    pictures: Tensor        # (M, N, S, D) int64, or (M, N, C) continuous; all pictures of the batch
    at: Tensor              # (M,) place of each one's first position
    painted: Tensor         # (M,) bool
    learned: Tensor         # (P,) indices into the M pictures: those painted, with a loss
    all_depths: Tensor      # (Q,) indices into their P * N positions: where all depths are learned
    first_depth: Tensor | None      # (P * N - Q,) where the first depth alone is; None where all are always learned

    def to(self, device) -> "Batch":
        return self.map(lambda x: x.to(device, non_blocking=True))

    def map(self, function) -> "Batch":
        """The same of other tensors."""
        return Batch(*(x if x is None else function(x) for x in self))


def pack(sequences: list, text: TextTokenizer, positions: int, left: bool = False, limit: int | None = None, later: float = 1.0,
         rngs: list = ()) -> Batch:
    """Sequences (lists of `Words` and `Picture`s) -> one `Batch`, padded to the longest (on the left where all must end together, for
    generation). A picture takes `positions` = N places between its two marks, and is never counted as text. later: share of a painted
    picture's positions, drawn by its sequence's `random.Random`, whose later depths are learned too. ValueError: longer than `limit`,
    or a picture of another size."""
    rows, places, targets, pictures, at, learned, all_depths = [], [], [], [], [], [], []
    for b, segments in enumerate(sequences):
        row = []
        for s in segments:
            if isinstance(s, Words):
                first = 0 if row else 1         # nothing predicts a row's first token
                if s.loss:
                    places += [(b, place) for place in range(len(row) + first - 1, len(row) + len(s.ids) - 1)]
                    targets += s.ids[first:]
                row += s.ids
                continue
            data, paint, loss = s
            check(len(data) == positions, f"a picture of {len(data)} positions, expected {positions}: was it encoded by another tokenizer?")
            if paint and loss:
                drawn = range(positions) if later == 1 else rngs[b].sample(range(positions), round(later * positions))
                all_depths += [len(learned) * positions + n for n in drawn]
                learned.append(len(pictures))
            pictures.append(s)
            at.append((b, len(row) + 1))
            opening, closing = MARKS[2:] if paint else MARKS[:2]
            row += [text.marks[opening], *[0] * positions, text.marks[closing]]
        rows.append(row)
    longest = max(map(len, rows))
    check(limit is None or longest <= limit, f"a sequence of {longest} tokens, expected at most {limit}; shorten the text")
    long = lambda values: torch.tensor(values, dtype=torch.int64)
    starts = [b * longest + (longest - len(row)) * left for b, row in enumerate(rows)]
    flat = lambda pairs: long([starts[b] + place for b, place in pairs])
    ids, mask = (nn.utils.rnn.pad_sequence(values, batch_first=True, padding_side="left" if left else "right")
                 for values in ([long(row) for row in rows], [torch.ones(len(row), dtype=torch.bool) for row in rows]))
    data = torch.stack([s.data for s in pictures]) if pictures else torch.zeros(0, positions, 1, 1, dtype=torch.int64)
    data, painted = data if data.is_floating_point() else data.long(), torch.tensor([s.paint for s in pictures], dtype=torch.bool)
    all_depths, first_depth = long(all_depths), None
    if later != 1:
        first_depth = torch.ones(len(learned) * positions, dtype=torch.bool).index_fill_(0, all_depths, False).nonzero()[:, 0]
    return Batch(ids, mask, flat(places), long(targets), data, flat(at), painted, long(learned), all_depths, first_depth)


# ---------------------------------------------------------------------------------------------------------------------
# the LLM: Qwen2's function, or Llama's, which is the same without biases, and Hugging Face's names

@dataclass
class LLMConfig:
    """Sizes by Hugging Face's names. The defaults are Hugging Face's for Qwen2: a published config.json leaves them out."""
    vocab_size: int = 151936            # V, rows of the table; may be more than there are tokens
    hidden_size: int = 4096             # C
    intermediate_size: int = 22016      # of the SwiGLU
    num_hidden_layers: int = 32         # L
    num_attention_heads: int = 32
    num_key_value_heads: int = 32       # fewer than heads: grouped-query attention
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = False   # the table of inputs is the head too
    attention_bias: bool = True         # on queries, keys and values; Llama has none

    def __post_init__(self):
        check_fields(self)
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads or heads % groups or self.hidden_size // heads % 2:
            raise ValueError(f"hidden_size {self.hidden_size}, {heads} heads, {groups} key-value heads: expected divisors and even width")


def _sizes(width, mlp, layers, heads, groups, tied=True, vocab=151936, theta=1e6, length=32768, **more):
    return dict(**more, max_position_embeddings=length, vocab_size=vocab, hidden_size=width, intermediate_size=mlp,
                num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups,
                rope_theta=theta, tie_word_embeddings=tied)


LLMS = {    # the first two are ours, from scratch, over bytes; the others are the published shapes of SmolLM2 and Qwen2.5
    "nano": _sizes(128, 352, 4, 4, 4, vocab=264, theta=1e4, length=1024),
    "small": _sizes(384, 1024, 8, 6, 2, vocab=264, theta=1e4, length=1024),
    "smollm2-135m": _sizes(576, 1536, 30, 9, 3, vocab=49152, theta=1e5, length=8192, attention_bias=False),
    "qwen2.5-0.5b": _sizes(896, 4864, 24, 14, 2), "qwen2.5-1.5b": _sizes(1536, 8960, 28, 12, 2),
    "qwen2.5-3b": _sizes(2048, 11008, 36, 16, 2), "qwen2.5-7b": _sizes(3584, 18944, 28, 28, 4, tied=False, vocab=152064),
}


class Cache:
    """Keys and values of `length` positions for every layer, allocated once: shapes never change, so a decoding step compiles once. Each
    layer has its own: of a part of a larger tensor, a compiled step would write all of it."""

    def __init__(self, c: LLMConfig, batch: int, length: int, device, dtype):
        shape = (batch, c.num_key_value_heads, length, c.hidden_size // c.num_attention_heads)
        self.k, self.v = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(c.num_hidden_layers)] for _ in range(2))
        self.valid = torch.zeros(batch, length, dtype=torch.bool, device=device)    # false: padding, or not yet written
        self.filled = torch.zeros((), dtype=torch.int64, device=device)             # slots written so far


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (RoPE): x (B, heads, T, d), angles (B or 1, 1, T, d). Channel i turns with i + d/2, as in Llama."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class LLMAttention(nn.Module):
    """Causal grouped-query attention; biases on q, k, v only, or nowhere."""

    def __init__(self, c: LLMConfig):
        super().__init__()
        self.width = c.hidden_size // c.num_attention_heads
        small = self.width * c.num_key_value_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c.hidden_size, width, bias=c.attention_bias)
                                                 for width in (c.hidden_size, small, small))
        self.o_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x, rope, bias, slots, cache_k, cache_v):
        q, k, v = (p(x).unflatten(2, (-1, self.width)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))  # (B, heads, T, d)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache_k is not None:
            k, v = cache_k.index_copy_(2, slots, k.to(cache_k.dtype)), cache_v.index_copy_(2, slots, v.to(cache_v.dtype))
        y = attend(q, k, v, bias, causal=bias is None)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, c: LLMConfig):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(c.hidden_size, c.intermediate_size, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LLMLayer(nn.Module):
    def __init__(self, c: LLMConfig):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps) for _ in range(2))
        self.self_attn, self.mlp = LLMAttention(c), SwiGLU(c)

    def forward(self, x, rope, bias=None, slots=None, cache_k=None, cache_v=None):
        x = x + self.self_attn(lower(self.input_layernorm(x)), rope, bias, slots, cache_k, cache_v)
        return x + self.mlp(lower(self.post_attention_layernorm(x)))


class LLM(nn.Module):
    """Decoder-only transformer; parameters, function and files as Hugging Face's Qwen2ForCausalLM and LlamaForCausalLM."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        c = self.config = config
        self.checkpointing = False      # recompute each layer in the backward pass instead of keeping its activations
        self.model = nn.Module()        # a bare module, for the names
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.model.layers = nn.ModuleList(LLMLayer(c) for _ in range(c.num_hidden_layers))
        self.model.norm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.lm_head = None if c.tie_word_embeddings else nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.apply(lambda module: init(module, c.hidden_size ** -0.5))
        for layer in self.model.layers:     # what joins the residual stream starts small, by the number of its summands (GPT-2)
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                module.weight.data /= math.sqrt(2 * c.num_hidden_layers)

    def hidden(self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Embeddings x (B, T, C) -> states after the last norm (B, T, C). With a cache, x continues what is in it, and mask (B, T) bool is
        false in padding, on either side (None: there is none). Without a cache it is on the right alone: nothing before it can see it."""
        check(mask is None or cache is not None, "a mask without a cache: pad on the right, where nothing sees it, and leave the mask out")
        c, (B, T, _) = self.config, x.shape
        steps = torch.arange(T, device=x.device)
        place, slots, bias = steps[None], None, None                                                    # (B or 1, T)
        if cache is not None:
            valid, slots = torch.ones(B, T, dtype=torch.bool, device=x.device) if mask is None else mask, cache.filled + steps
            place = cache.valid.sum(1, keepdim=True) + valid.cumsum(1) - 1
            cache.valid.index_copy_(1, slots, valid)
            order = torch.arange(cache.valid.shape[1], device=x.device)
            # (B, 1, T, length); padding sees itself: no empty softmax
            seen = (order <= slots[:, None]) & (cache.valid[:, None, None] | (order == slots[:, None]))
            bias = torch.zeros_like(seen, dtype=lower(x[:0]).dtype).masked_fill_(~seen, -math.inf)      # once for all layers
            bias = bias.repeat(1, 1, c.num_attention_heads // c.num_key_value_heads, 1)
        d = c.hidden_size // c.num_attention_heads
        angle = place.clamp(min=0)[..., None] * c.rope_theta ** -(torch.arange(0, d, 2, device=x.device, dtype=torch.float32) / d)
        angle = torch.cat([angle, angle], -1)[:, None]                                                  # (B or 1, 1, T, d)
        rope = [part.to(lower(x[:0]).dtype) for part in (angle.cos(), angle.sin())]                     # autocast's dtype, or x's own
        for n, layer in enumerate(self.model.layers):
            kept = () if cache is None else (slots, cache.k[n], cache.v[n])
            x = recomputed(self.checkpointing, lambda y, layer=layer, kept=kept: layer(y, rope, bias, *kept), x)
        if cache is not None:
            cache.filled += T
        return self.model.norm(x)

    @property
    def classifier(self) -> Tensor:
        """Of the words (V, C): the table of inputs where the head is tied."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight

    def head(self, h: Tensor) -> Tensor:
        """States (..., C) -> logits (..., V)."""
        return F.linear(h, self.classifier)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, V)."""
        return self.head(self.hidden(self.model.embed_tokens(ids)))

    @classmethod
    def from_pretrained(cls, folder: str) -> "LLM":
        """A folder in Hugging Face's layout: config.json, and model.safetensors or shards with their index; fp32 in memory. Raises
        ValueError if anything is missing, left over or misshapen, and for variants of Qwen2 and Llama that this is not."""
        config = {name: value for name, value in read_config(folder).items() if value is not None}
        rope, qwen = config.get("rope_parameters") or config.get("rope_scaling") or {}, config.get("model_type") == "qwen2"
        rope = rope if isinstance(rope, dict) else {"rope_type": rope}      # of another type, it is no known one
        # Llama's defaults, where they differ from Qwen2's
        llama = dict(vocab_size=32000, intermediate_size=11008, num_key_value_heads=config.get("num_attention_heads", 32),
                     max_position_embeddings=2048)
        defaults = {"rope_theta": rope.get("rope_theta", 10_000.0), "attention_bias": qwen} | ({} if qwen else llama)
        sizes = make_config(LLMConfig, config, folder, defaults)
        each = sizes.hidden_size // sizes.num_attention_heads
        for what, got, expected in (("model_type", config.get("model_type"), "qwen2" if qwen else "llama"),
                                    ("hidden_act", config.get("hidden_act", "silu"), "silu"),
                                    ("use_sliding_window", config.get("use_sliding_window", False), False),
                                    ("attention_bias", config.get("attention_bias", qwen), qwen),
                                    ("mlp_bias", config.get("mlp_bias", False), False), ("head_dim", config.get("head_dim") or each, each),
                                    ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default")):
            check(got == expected, f"{folder}/config.json has {what} {brief(got)}, expected {expected!r}: "
                                   "this LLM is Qwen2's (qwen2) or Llama's (llama)")
        model = unbuilt(lambda: cls(sizes), folder)      # no time for random weights that are not used
        ignore = ("lm_head.weight",) if model.lm_head is None else ()        # some tied checkpoints hold the table twice
        load_weights(model, {name: value.float() for name, value in read_shards(folder, ignore).items()}, folder, assign=True)
        return model


# ---------------------------------------------------------------------------------------------------------------------
# the loss over words or codes, and the visual heads

LOGITS = 2 ** 26        # at once, 256 MiB in fp32; a quarter of that may stay until the backward pass


def linear_cross_entropy(h: Tensor, weight: Tensor, target: Tensor, reduction: str = "sum") -> Tensor:
    """States h (M, C), classifier (V, C), classes (M,) -> the sum of the cross entropies of h @ weight.T, in fp32; "none": each, (M,). Many
    logits are made a chunk of rows at a time, and again in the backward pass: of 151,936 words at all places, they outgrow the model."""
    def part(h, target):
        return F.cross_entropy(F.linear(h, weight).float(), target, reduction=reduction)
    if len(h) * len(weight) <= LOGITS // 4:
        return part(h, target)
    rows = max(1, LOGITS // len(weight))
    losses = torch.hstack([checkpoint(part, *chunk, use_reentrant=False) for chunk in zip(h.split(rows), target.split(rows))])
    return losses if reduction == "none" else losses.sum()


class DepthLayer(nn.Module):
    """Causal transformer layer over the D codes of one position (RQ-Transformer, Lee et al. 2022); x is (M, d, C) with d of the D depths,
    from `first` on, and C the head's width. Feed-forward weights: one set per depth, or one for all. No biases."""

    def __init__(self, width: int, heads: int, mlp: int, sets: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up = drawn(sets, width, 2 * mlp, std=width ** -0.5)
        self.down = drawn(sets, mlp, width, std=mlp ** -0.5)

    def forward(self, x: Tensor, first: int = 0, cache: list | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)       # (M, heads, d, C / heads) each
        if cache is not None:           # keys and values of the depths before
            k, v = cache[:] = [torch.cat(pair, 2) for pair in zip(cache, (k, v))] if cache else (k, v)
        y = v if k.shape[2] == 1 else attend(q, k, v, causal=cache is None)     # alone, a depth sees itself
        x = x + self.proj(y.transpose(1, 2).contiguous().flatten(2))     # of a slice of qkv, it would be a small product a row
        y = self.norm2(x)
        if len(self.down) == 1:
            gate, up = (y @ self.gate_up[0]).chunk(2, -1)
            return x + (F.silu(gate) * up) @ self.down[0]
        sets = slice(first, first + x.shape[1])
        gate, up = torch.bmm(y.transpose(0, 1), self.gate_up[sets]).chunk(2, -1)                         # (d, M, mlp)
        return x + torch.bmm(F.silu(gate) * up, self.down[sets]).transpose(0, 1)


class VisualHead(nn.Module):
    """States of the LLM -> the codes of one stream (paper §3.3): a 2-layer projector, a causal transformer over depth whose input at depth
    d is the state (d = 1) or the sum of the code vectors before d (Eq. 5), each plus a learned vector of its depth, and one classifier per
    depth."""

    def __init__(self, c: "MLLMConfig"):
        super().__init__()
        width = c.head_width
        self.projector = nn.Sequential(nn.Linear(c.llm.hidden_size, width), nn.GELU(), nn.Linear(width, width))
        self.code_in, self.depth = nn.Linear(c.code_dim, width, bias=False), drawn(c.depth, width, std=0.02)
        self.layers = nn.ModuleList(DepthLayer(width, c.head_heads, c.head_mlp, 1 if c.head_shared else c.depth)
                                    for _ in range(c.head_layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.classifiers = drawn(c.depth, width, c.codebook_size, std=width ** -0.5)

    def inputs(self, h: Tensor, vectors: Tensor) -> Tensor:
        """Eq. 5: h (M, C), code vectors (M, d, E), the last not looked at -> what the depth transformer reads (M, d, head width)."""
        before = vectors[:, :-1].cumsum(1)                                                               # (M, d - 1, E)
        x = torch.cat([self.projector(h)[:, None], self.code_in(before.to(self.depth.dtype))], 1)
        return x + self.depth[:x.shape[1]]

    def forward(self, h: Tensor, vectors: Tensor, codes: Tensor) -> Tensor:
        """Teacher forcing, the first d depths at once: h (M, C), codes (M, d), their vectors (M, d, E), the last not looked at -> the
        sum of each depth's cross entropies (d,)."""
        x = self.inputs(h, vectors)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x).transpose(0, 1)                                                                 # (d, M, head width)
        return torch.stack([linear_cross_entropy(y, weight.T, wanted) for y, weight, wanted in zip(x, self.classifiers, codes.T)])

    def sample(self, h: Tensor, table: Tensor, pick) -> Tensor:
        """Depth by depth: h (M, C), the stream's table (1 or D, K, E), pick(logits (M, K), depth) -> codes (M,). -> codes (M, D)."""
        x, total, codes, caches = self.projector(h)[:, None], 0, [], [[] for _ in self.layers]
        for d in range(len(self.classifiers)):
            x = x + self.depth[d]
            for layer, cache in zip(self.layers, caches):
                x = layer(x, d, cache)
            codes.append(pick(self.norm(x[:, 0]) @ self.classifiers[d], d))
            total = total + F.embedding(codes[-1], table[d % len(table)])
            x = self.code_in(total.to(self.depth.dtype))[:, None]
        return torch.stack(codes, 1)


GUIDANCE, EDIT_GUIDANCE = 3.0, 1.5      # from words: arXiv v2's, ICLR's text names none; edits: ours, at nano 3 is worse


def guide(logits: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: logits (2M, K), with the words c and without them u, one half below the other -> u + s (c - u), (M, K)."""
    conditional, unconditional = logits.float().chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def choose(logits: Tensor, noise: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Sample one class per row by inverting the distribution: logits (M, K), noise (M,) uniform in [0, 1) -> (M,). A row's choice depends
    on its own noise alone, so a seed gives the same picture in any batch. top_k 0: all; temperature 0: the likeliest; top_p above 0."""
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = (logits.float() / temperature).topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    p = logits.softmax(-1)
    before = p.cumsum(-1) - p
    p = p * (before < top_p)                                            # the first is always kept
    cumulative = p.cumsum(-1)
    rank = (cumulative <= noise[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return order.gather(1, rank.clamp(max=order.shape[1] - 1))[:, 0]


def repeat(step, times: int, graph: str, progress: bool):
    """step(), so many times. graph "cpu": compiled into one; "cuda": all but the first three by a CUDA graph; "": as it is."""
    bar = iter(tqdm(range(times), "painting", leave=False, disable=not progress))
    if graph == "cpu":
        step = torch.compile(step)
    if graph == "cuda" and times > 3:
        side = torch.cuda.Stream()      # where torch wants a step warmed up before it is captured
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in itertools.islice(bar, 3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):        # records, and runs nothing
            step()
        step = captured.replay
    for _ in bar:
        step()


# ---------------------------------------------------------------------------------------------------------------------
# the whole: text, pictures in, pictures out

@dataclass
class MLLMConfig:
    """Everything that rebuilds a DualMLLM, besides a vocabulary's files. The heads' defaults make the paper's 258 M (App. D.1)."""
    llm: LLMConfig = field(default_factory=LLMConfig)
    streams: tuple = ("pixel", "semantic")      # of the tokenizer
    streams_in: tuple = ("pixel", "semantic")   # what is read; or ("continuous",): features (N, C) in place of codes
    streams_out: tuple = ("pixel", "semantic")  # what is painted, if anything; one that is read, but not painted, is fed back as zeros
    positions: int = 256                        # N
    depth: int = 4                              # D
    codebook_size: int = 16384                  # K
    code_dim: int = 32                          # E
    tables: int = 1                             # a stream: one for all depths, or D
    feature_width: int = 0                      # C of continuous features
    head_width: int = 2048
    head_layers: int = 3
    head_heads: int = 16
    head_mlp: int = 2816
    head_shared: bool = False                   # one set of feed-forward weights for all depths, or one each
    text: str = "bytes"                         # or "files": a vocabulary lies beside the config
    tables_sha256: str = ""                     # of the code tables: which tokenizer's codes these are

    def __post_init__(self):
        check_fields(self)
        self.streams, self.streams_in, self.streams_out = tuple(self.streams), tuple(self.streams_in), tuple(self.streams_out)
        if self.continuous:
            self.streams_out = ()
        elif (not self.streams_in or not {*self.streams_in, *self.streams_out} <= {*self.streams}
              or any(len({*names}) < len(names) for names in (self.streams_in, self.streams_out))):
            raise ValueError(f"streams in {brief(self.streams_in)}, streams out {brief(self.streams_out)}: "
                             f"expected some of {brief(self.streams)}, or to read ('continuous',)")
        if self.streams_out and not set(self.streams_in) & set(self.streams_out):
            raise ValueError(f"the painted streams {self.streams_out} are not among those read, {self.streams_in}: it could not see them")
        check(self.head_width % self.head_heads == 0, f"head_width {self.head_width} is not a multiple of head_heads {self.head_heads}")

    @property
    def continuous(self) -> bool:
        return self.streams_in == ("continuous",)


HEADS = {"nano": dict(head_width=64, head_heads=2, head_mlp=128, head_shared=True),
         "small": dict(head_width=256, head_heads=4, head_mlp=704, head_shared=True)}
HEADS["smollm2-135m"] = HEADS["small"]


class DualMLLM(nn.Module):
    """LLM, input projector, embeddings of the four image marks, a visual head per painted stream, frozen copies of the code tables."""

    def __init__(self, config: MLLMConfig, text: TextTokenizer, llm: LLM | None = None):
        super().__init__()
        c, self.text = config, text
        self.config, width = c, c.llm.hidden_size
        self.llm = llm or LLM(c.llm)
        # Rows of their own, not of the LLM's table: so they train with the projector while the table is frozen.
        self.marks = drawn(len(MARKS), width, std=width ** -0.5)
        read = c.feature_width if c.continuous else len(c.streams_in) * c.code_dim
        self.projector = nn.Sequential(nn.Linear(read, width), nn.GELU(), nn.Linear(width, width))
        self.heads = nn.ModuleDict({stream: VisualHead(c) for stream in c.streams_out})
        self.register_buffer("tables", torch.zeros(len(c.streams), c.tables, c.codebook_size, c.code_dim))      # (S, 1 or D, K, E)

    @torch.no_grad()
    def take_tables(self, tables: Tensor):
        """Copy the tokenizer's tables. Classifiers start as random maps of the code vectors: near codes begin with near logits."""
        self.tables.copy_(tables)
        for stream, head in self.heads.items():
            table = tables[self.config.streams.index(stream)]
            table = (table - table.mean(1, keepdim=True)) / table.std(1, keepdim=True).clamp(min=1e-6)  # (1 or D, K, E)
            maps = torch.randn(self.config.depth, self.config.head_width, self.config.code_dim)
            maps *= (self.config.head_width * self.config.code_dim) ** -0.5
            head.classifiers.copy_(maps @ table.transpose(1, 2).to(maps))

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the names that the stages use."""
        parts = {"llm": self.llm.parameters(), "projector": (self.marks, *self.projector.parameters()), "heads": self.heads.parameters()}
        return {name: list(parameters) for name, parameters in parts.items()}

    # ---- pictures in

    def vectors(self, codes: Tensor, stream: int) -> Tensor:
        """The first d codes (..., d) of one stream -> their code vectors (..., d, E)."""
        table = self.tables[stream]
        return F.embedding(codes, table[0]) if len(table) == 1 else table[torch.arange(codes.shape[-1], device=codes.device), codes]

    def project(self, pictures: Tensor, painted: Tensor) -> Tensor:
        """Codes (M, N, S, D) or features (M, N, C), and which pictures are painted (M,) -> embeddings (M, N, C) (paper §3.3)."""
        c, parts = self.config, [pictures]
        if not c.continuous:
            read = torch.ones_like(painted)
            parts = [self.vectors(pictures[:, :, c.streams.index(s)], c.streams.index(s)).sum(-2)
                     * (read if s in c.streams_out else ~painted)[:, None, None] for s in c.streams_in]          # (M, N, E) each
        return self.projector(torch.cat(parts, -1).to(self.marks.dtype))

    def embed(self, batch: Batch) -> Tensor:
        """What the LLM sees: words, marks and pictures, (B, T, C)."""
        first, N = self.text.marks[MARKS[0]], self.config.positions
        mark = batch.ids - first                                        # 0..3 for the marks, which follow each other
        is_mark = (mark >= 0) & (mark < len(MARKS))
        x = self.llm.model.embed_tokens(batch.ids.masked_fill(is_mark, 0))
        x = torch.where(is_mark[..., None], F.embedding(mark.clamp(0, len(MARKS) - 1), self.marks), x)
        c, pictures = self.config, batch.pictures
        if not len(pictures):       # a batch of text
            pictures = self.marks.new_zeros(0, N, c.feature_width) if c.continuous else batch.ids.new_zeros(0, N, len(c.streams), c.depth)
        y = self.project(pictures, batch.painted)
        places = (batch.at[:, None] + torch.arange(N, device=batch.at.device)).flatten()
        return x.flatten(0, 1).index_copy(0, places, y.flatten(0, 1).to(x.dtype)).view_as(x)

    # ---- training

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sums of cross entropies by name (Eq. 6-7): `text` over the text tokens that have a loss, `STREAM_d` over painted positions, for
        each depth d (later depths: those in `all_depths`). An empty part gives zero, and zero gradients: DDP wants every parameter."""
        h = self.llm.hidden(self.embed(batch)).flatten(0, 1)                                            # (B * T, C)
        terms = {"text": linear_cross_entropy(h[batch.text_from], self.llm.classifier, batch.text_target)}
        N, D = self.config.positions, self.config.depth
        # The state before a position predicts its codes: the first is predicted from the mark that opens the picture.
        before = (batch.at[batch.learned][:, None] + torch.arange(-1, N - 1, device=h.device)).flatten()
        codes = batch.pictures[batch.learned].flatten(0, 1) if len(batch.learned) else batch.ids.new_zeros(0, len(self.config.streams), D)
        for stream, head in self.heads.items():
            s = self.config.streams.index(stream)
            for rows, depths in ((batch.all_depths, D), (batch.first_depth, 1)):     # also empty ones: FSDP gathers weights on all ranks
                if rows is None:
                    continue
                target = codes[rows, s, :depths]                                                        # (M, depths)
                for d, loss in enumerate(head(h[before[rows]], self.vectors(target, s), target), 1):
                    terms[f"{stream}_{d}"] = terms.get(f"{stream}_{d}", 0) + loss
        return terms

    # ---- generation

    def lacks_room(self, asked: list, room: int) -> str:
        """Why what is asked, and so many tokens of a reply, would not fit; "" where they do."""
        try:
            pack([turn(self.text, asked)], self.text, self.config.positions, limit=self.config.llm.max_position_embeddings - room)
        except ValueError as error:
            return str(error)
        return ""

    def _begin(self, sequences: list, room: int, multiple: int = 16) -> tuple[Tensor, Cache]:
        """Read the prompts, padded on the left -> state at their ends (B, C), a cache with room for more, of a `multiple` of slots: CUDA's
        attention would copy a bias of other widths in every layer."""
        limit, device = self.config.llm.max_position_embeddings, self.marks.device
        batch = pack(sequences, self.text, self.config.positions, left=True, limit=limit - room).to(device)
        x = self.embed(batch)
        length = math.ceil((x.shape[1] + room) / multiple) * multiple
        cache = Cache(self.config.llm, len(x), length, device, lower(x[:0]).dtype)
        return self.llm.hidden(x, batch.mask, cache)[:, -1], cache

    @torch.no_grad()
    def paint(self, prompts: list[str], pictures: Tensor | None = None, guidance: float | None = None, temperature: float = 1.0,
              top_k: int = 0, top_p: float = 1.0, seeds: list[int] | None = None, progress: bool = False, graph: bool = False) -> Tensor:
        """Pictures from text, or, with pictures to read (B, N, S, D), edited by instructions: -> codes (B, N, S, D), zero in streams that
        are not painted. guidance s (default GUIDANCE, of edits EDIT_GUIDANCE): u + s (c - u) on all logits, u being those without the
        words; 1 needs no u. Sample i depends on seeds[i] (default i) and its prompt alone. graph: a position is one CUDA graph,
        recorded in each call, which pays if kernels are short; on a CPU one compiled function, which takes a minute to make, once for each
        size of batch, guidance and 64 places of length."""
        if guidance is None:
            guidance = GUIDANCE if pictures is None else EDIT_GUIDANCE
        c, n, guided = self.config, len(prompts), guidance != 1
        check(self.heads, "this model paints nothing: it was trained to read alone; train one with --streams-out")
        start = [Words([self.text.marks["<image_gen_start>"]])]
        given = [[] if pictures is None else [Picture(p)] for p in (prompts if pictures is None else pictures.cpu())]
        rows = [turn(self.text, [*g, prompt]) + start for g, prompt in zip(given, prompts)]
        rows += [turn(self.text, [*g, ""]) + start for g in given if guided]
        h, cache = self._begin(rows, c.positions, 64 if graph else 16)     # prompts of other lengths mostly find it compiled
        own = (torch.Generator().manual_seed(seed) for seed in seeds or range(n))       # each sample's: it depends on no other
        noise = torch.stack([torch.rand(c.positions, len(c.streams), c.depth, generator=generator) for generator in own]).to(h.device)
        codes, new = torch.zeros(noise.shape, dtype=torch.int64, device=h.device), torch.zeros_like(noise[:, :1], dtype=torch.int64)
        place, painted = torch.zeros(1, dtype=torch.int64, device=h.device), torch.ones(n, dtype=torch.bool, device=h.device)

        def write_codes(h):
            """Those of the next position."""
            drawn = noise.index_select(1, place)[:, 0]                                                  # (n, S, D)
            for stream, head in self.heads.items():
                s = c.streams.index(stream)

                def pick(logits, d):
                    if guided:
                        logits = guide(logits, guidance)
                    chosen = choose(logits, drawn[:, s, d], temperature, top_k, top_p)
                    return chosen.repeat(2) if guided else chosen
                new[:, 0, s] = head.sample(h, self.tables[s], pick)[:n]
            codes.index_copy_(1, place, new)
            place.add_(1)

        def step():
            """The codes of the last position are read, those of the next written: no new shapes, no look at values, as a graph wants."""
            x = self.project(new, painted)
            write_codes(self.llm.hidden(x.repeat(2, 1, 1) if guided else x, cache=cache)[:, -1])
        write_codes(h)
        repeat(step, c.positions - 1, h.device.type if graph else "", progress)
        return codes

    @torch.no_grad()
    def answer(self, pictures: Tensor | None, questions: list[str], longest: int = 64) -> list[str]:
        """The likeliest text, token by token, about pictures (B, N, S, D) (or features, or None), one question each, "" for a caption: up
        to `longest` tokens, no mark."""
        text, stop = self.text, self.text.turn_end if self.text.turn_start is not None else self.text.end
        rows = [turn(text, [*([] if pictures is None else [Picture(pictures[i].cpu())]), question]) for i, question in enumerate(questions)]
        h, cache = self._begin(rows, longest)
        written, done = [], torch.zeros(len(rows), dtype=torch.bool, device=h.device)
        barred = torch.ones(self.config.llm.vocab_size, dtype=torch.bool, device=h.device)
        barred[[*text.ordinary, stop]] = False
        for token in self.write_words(h, cache, longest, lambda logits: logits.masked_fill(barred, -math.inf).argmax(-1)):
            written.append(token)
            done |= token == stop
            if done.all():
                break
        rows = torch.stack(written, 1).tolist()
        return [text.decode(row[:row.index(stop)] if stop in row else row) for row in rows]

    def write_words(self, h: Tensor, cache: Cache, longest: int, pick):
        """Tokens (B,), one after the other, each read before the next: h (B, C) is the state before the first; pick(logits)."""
        for t in range(longest):
            token = pick(self.llm.head(h).float())
            yield token
            if t < longest - 1:
                h = self.llm.hidden(self.llm.model.embed_tokens(token)[:, None], cache=cache)[:, -1]

    @torch.no_grad()
    def score(self, pictures: Tensor, captions: list[str]) -> Tensor:
        """Log-probability of each caption given its picture (B, N, S, D): (B,)."""
        rows = [turn(self.text, [Picture(p)], [c]) for p, c in zip(pictures.cpu(), captions)]
        batch = pack(rows, self.text, self.config.positions).to(self.marks.device)
        h = self.llm.hidden(self.embed(batch)).flatten(0, 1)
        loss = linear_cross_entropy(h[batch.text_from], self.llm.classifier, batch.text_target, "none")
        return loss.new_zeros(len(captions)).index_add_(0, batch.text_from // batch.ids.shape[1], -loss)

    # ---- files

    def save_pretrained(self, folder: str, weights: dict[str, Tensor] | None = None, **more):
        """config.json, with `more`, model.safetensors and the vocabulary. weights: its own, gathered from the ranks that share them."""
        self.text.save(folder)      # first, for it may refuse
        save_model(folder, self.state_dict() if weights is None else weights, {"model_type": "dualmllm", **asdict(self.config), **more})

    @classmethod
    def from_pretrained(cls, folder: str) -> "DualMLLM":
        """What `save_pretrained` wrote, in eval mode. Raises ValueError if anything is missing, left over or misshapen."""
        config = read_config(folder, kind="dualmllm")
        config["llm"] = make_config(LLMConfig, config.get("llm"), folder)
        config = make_config(MLLMConfig, config, folder)
        text = TextTokenizer.bytes() if config.text == "bytes" else TextTokenizer.from_folder(folder)
        model = unbuilt(lambda: cls(config, text), folder)
        load_weights(model, read_weights(folder), folder, assign=True)
        return model.eval()


def code_tables(tokenizer) -> tuple[Tensor, str]:
    """A tokenizer's code tables (S, 1 or D, K, E), and their SHA-256: codes of another tokenizer mean something else."""
    tables = torch.stack([quantizer.full_tables() for quantizer in tokenizer.quantizers.values()]).detach().float().cpu()
    return tables, hashlib.sha256(tables.numpy().tobytes()).hexdigest()
