"""Vector quantization by D codes per vector, residual or chunk by chunk, with EMA codebooks.

`ResidualVQ` codes a vector z by the nearest code vector, then the nearest to what is left, and so on; their sum is the quantized vector
(Lee et al. 2022, RQ-VAE). `MultiCodebookVQ` cuts z into D chunks and codes each by a table of its own (Ma et al. 2025, UniTok, whose
release compares directions and learns its tables by gradient). Here, in both, the code vectors are running means of what they are chosen
for, so no gradient ever touches them.

    vq = ResidualVQ(dim=32, codebook_size=1024, depth=4)
    z_q, codes, commitment = vq(z)      # (B, N, E) -> (B, N, E) straight-through, (B, N, D) int64, scalar (paper Eq. 1)
    loss.backward(); optimizer.step()
    vq.update()                         # once after each optimiser step: this, and never `forward`, changes the table

What others get wrong, and why this file looks as it does: one table shared by all depths must not move between depths (so statistics wait
in buffers until `update`); distances in bf16 flip codes (so autocast is off inside); "restart codes used less than once" restarts most
codes of a small run at every step (so the threshold is relative, with a grace period); every rank must restart the same codes with the same
vectors (so they are drawn from the global batch by a seeded generator).

Letters: B batch, N positions, E code dimension, D depth, K codebook size, M = B*N vectors, T tables (1 if shared over depths, else D),
W numbers in a code vector.
"""

import functools

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def all_reduce(x: Tensor) -> Tensor:
    """Sum over ranks, in place; the identity in a single process."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


CELLS = {"cpu": 2 ** 20}        # distances at once: on a CPU what fits a cache, elsewhere 2^26, 256 MiB


def nearest(x: Tensor, table: Tensor, fused: bool = False) -> Tensor:
    """Index of the nearest row of table (K, E) for each row of x (M, E), by squared Euclidean distance in fp32: (M,) int64. |x|^2 is left
    out. The M x K distances exist only a chunk at a time; fused, by one kernel, they never leave the chip."""
    norms, codes = table.square().sum(1), torch.empty(len(x), dtype=torch.int64, device=x.device)
    if fused:
        rows = 64
        fused_kernel()[(-(-len(x) // rows),)](x.contiguous(), table.contiguous(), norms, codes, len(x), len(table), x.shape[1],
                                              max(16, 1 << (x.shape[1] - 1).bit_length()), rows, 64)
        return codes
    rows = max(1, CELLS.get(x.device.type, 2 ** 26) // len(table))
    distances = x.new_empty(min(rows, len(x)), len(table))      # one buffer, filled again and again
    for i in range(0, len(x), rows):
        part = x[i:i + rows]
        torch.addmm(norms, part, table.T, alpha=-2, out=distances[:len(part)])
        torch.argmin(distances[:len(part)], 1, out=codes[i:i + rows])
    return codes


@functools.cache
def fused_kernel():
    """`nearest` in Triton, which comes with torch's CUDA builds: a program keeps ROWS vectors and the best distance so far in each of COLS
    columns, and runs down the table. Products are three passes of TF32, as exact as fp32. Raises ValueError where there is no Triton."""
    global tl       # a kernel finds names among its module's
    try:
        import triton
        import triton.language as tl
    except ImportError:
        raise ValueError("--fast-vq needs Triton, which comes with torch's CUDA builds; leave it out, or pip install triton") from None

    @triton.jit
    def kernel(x, table, norms, codes, M, K: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
        row, e, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, COLS)
        query = -2.0 * tl.load(x + row[:, None] * E + e[None, :], (row[:, None] < M) & (e[None, :] < E), 0.0)  # (ROWS, WIDTH >= E)
        best, code = tl.full((ROWS, COLS), float("inf"), tl.float32), tl.zeros((ROWS, COLS), tl.int32)
        for start in range(0, K, COLS):
            k = start + column
            vectors = tl.load(table + k[None, :] * E + e[:, None], (k[None, :] < K) & (e[:, None] < E), 0.0)  # (WIDTH, COLS)
            distance = tl.dot(query, vectors, input_precision="tf32x3") + tl.load(norms + k, k < K, float("inf"))[None, :]
            closer = distance < best        # of equals the first stays, as in argmin
            best, code = tl.where(closer, distance, best), tl.where(closer, k[None, :], code)
        least = tl.min(best, 1)
        tl.store(codes + row, tl.min(tl.where(best == least[:, None], code, K), 1).to(tl.int64), row < M)
    return kernel


def straight_through(z: Tensor, z_q: Tensor) -> Tensor:
    """z_q, whose gradient goes to z as if nothing had been quantized: the nearest code has none of its own. Both of one shape."""
    return z + (z_q - z).detach()


def commitment_loss(z: Tensor, close: Tensor) -> Tensor:
    """Eq. 1: the mean over approximations of |z - approximation|^2, per element. z (M, 1, E), close (M, D or 1, E), without gradient."""
    return (z - close).square().mean()


class Quantizer(nn.Module):
    """What every quantizer of vectors of `dim` = E numbers into `depth` = D codes out of `codebook_size` = K has in common: tables,
    statistics, restarts. A design says in `_search` how it codes.

    decay       of the EMA
    shared      one table for all depths (T = 1, as the authors' release), or one per depth (T = D)
    threshold   a code is dead when its EMA count is below this share of the average; it restarts at a random vector of the global batch
    grace       updates that a restarted code has to find its place before it can be called dead again
    seed        of the restarts
    width       W, the numbers in a code vector, where a design has another than E"""

    fused = False       # nearest codes by one kernel: CUDA alone

    def __init__(self, dim: int, codebook_size: int, depth: int, decay: float = 0.99, shared: bool = True,
                 threshold: float = 0.1, grace: int = 20, seed: int = 0, width: int = 0):
        super().__init__()
        self.dim, self.codebook_size, self.depth, self.shared = dim, codebook_size, depth, shared
        tables, width = 1 if shared else depth, width or dim
        self.decay, self.threshold, self.grace, self.seed = decay, threshold, grace, seed
        self.register_buffer("codebook", torch.randn(tables, codebook_size, width))          # (T, K, W)
        # The EMA state is part of the weights: a run that resumes without it is another run.
        self.register_buffer("ema_count", torch.zeros(tables, codebook_size))                # (T, K)
        self.register_buffer("ema_sum", torch.zeros(tables, codebook_size, width))           # (T, K, W)
        self.register_buffer("age", torch.full((tables, codebook_size), grace, dtype=torch.int32))    # updates since the last restart
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        # Filled by `forward`, emptied by `update`.
        self.register_buffer("batch_count", torch.zeros(tables, codebook_size), persistent=False)
        self.register_buffer("batch_sum", torch.zeros(tables, codebook_size, width), persistent=False)
        self._seen: list[Tensor] = []            # (M, D, W) of each forward since the last update: what restarts draw from
        self._draws: int | None = None           # `updates` on the host, so that seeding costs no synchronisation

    def table(self, d: int) -> Tensor:
        """The table (K, W) of depth d."""
        return self.codebook[0 if self.shared else d]

    def _search(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors x (M, E) -> codes (M, D); what each code was chosen for (M, D, W); the approximations of x that commitment counts, the
        last one being what x is quantized to (M, D or 1, E)."""
        raise NotImplementedError

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (B, N, E) -> z_q (B, N, E) whose gradient goes straight to z, codes (B, N, D), commitment loss (Eq. 1)."""
        if z.shape[-1] != self.dim:
            raise ValueError(f"{type(self).__name__}: got vectors of {z.shape[-1]} numbers, expected {self.dim}; check the projection")
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            codes, seen, close = self._search(z.detach().reshape(-1, self.dim))              # (M, D), (M, D, W), (M, D or 1, E)
            if self.training:
                row = (codes if self.shared else codes + torch.arange(self.depth, device=codes.device) * self.codebook_size).flatten()
                self.batch_count.view(-1).index_add_(0, row, torch.ones_like(row, dtype=torch.float32))
                self.batch_sum.view(-1, seen.shape[-1]).index_add_(0, row, seen.flatten(0, 1))
                self._seen.append(seen)
            commitment = commitment_loss(z.reshape(-1, 1, self.dim), close)
            z_q = straight_through(z, close[:, -1].view_as(z))
        return z_q, codes.view(*z.shape[:-1], self.depth), commitment

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """z (B, N, E) -> codes (B, N, D), with no statistics kept."""
        with torch.autocast(z.device.type, enabled=False):
            return self._search(z.float().reshape(-1, self.dim))[0].view(*z.shape[:-1], self.depth)

    @torch.no_grad()
    def update(self, skip: Tensor | None = None):
        """Move the table by what was chosen since the last call, on all ranks alike. skip: a bool scalar on the device; where true (a step
        that was not taken) the statistics are dropped, and nothing else changes but `updates`, which numbers the draws of restarts."""
        if not self._seen:
            raise RuntimeError(f"{type(self).__name__}.update: nothing was quantized in training mode since the last update; "
                               "call it once after each optimiser step")
        new_count = self.ema_count.lerp(all_reduce(self.batch_count), 1 - self.decay)
        new_sum = self.ema_sum.lerp(all_reduce(self.batch_sum), 1 - self.decay)
        new_count, new_sum, dead = self._restart(new_count, new_sum)
        book = torch.where(new_count[..., None] > 0, new_sum / new_count.clamp(min=1e-12)[..., None], self.codebook)
        age = torch.where(dead, 0, self.age + 1)
        keep = torch.zeros((), dtype=torch.bool, device=book.device) if skip is None else skip
        for old, new in ((self.codebook, book), (self.ema_count, new_count), (self.ema_sum, new_sum), (self.age, age)):
            old.copy_(torch.where(keep, old, new))
        self.updates += 1        # skipped or not: the next draw is another one
        self.batch_count.zero_(), self.batch_sum.zero_(), self._seen.clear()

    def _restart(self, count: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """EMA counts (T, K) and sums (T, K, W) -> the same with dead codes begun anew, and which those are (T, K)."""
        candidates, mean = self._candidates(), count.mean(1, keepdim=True)                   # (T, K, W), (T, 1)
        dead = (count < self.threshold * mean) & (self.age >= self.grace)
        # A restarted code starts as light as a live code may be, so that its first hits soon move it to where it is needed.
        count = torch.where(dead, self.threshold * mean, count)
        return count, torch.where(dead[..., None], candidates * count[..., None], total), dead

    def _candidates(self) -> Tensor:
        """One vector of the global batch for every code, the same on all ranks (T, K, W). Vectors are numbered rank by rank, sample by
        sample, as they would be in a single process with the whole batch; every rank fills in those it owns."""
        local = torch.cat(self._seen)                                                        # (M, D, W)
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_available() and dist.is_initialized() else (1, 0)
        if self._draws is None:
            self._draws = int(self.updates)
        generator = torch.Generator(local.device).manual_seed(self.seed * 1_000_003 + self._draws)
        self._draws += 1
        draw = functools.partial(torch.randint, size=self.codebook.shape[:2], generator=generator, device=local.device)
        sample = draw(ranks * len(local)) - rank * len(local)
        depth = draw(self.depth) if self.shared else torch.arange(self.depth, device=local.device)[:, None]
        mine = (sample >= 0) & (sample < len(local))
        return all_reduce(local[sample.clamp(0, len(local) - 1), depth] * mine[..., None])

    def _load_from_state_dict(self, *args, **kwargs):
        self._draws = None       # to be read again from `updates`
        super()._load_from_state_dict(*args, **kwargs)

    def vectors(self, codes: Tensor) -> Tensor:
        """Codes (B, N, D) -> their code vectors (B, N, D, E), whose sum over D is `embed`. Raises ValueError for another D or a code
        outside 0..K-1 (on a CPU; on CUDA such a code is an indexing error, since looking would cost a synchronisation)."""
        name = type(self).__name__
        if codes.shape[-1] != self.depth:
            raise ValueError(f"{name}: got codes of depth {codes.shape[-1]}, expected {self.depth}")
        if codes.device.type == "cpu" and codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(f"{name}: got codes from {int(codes.min())} to {int(codes.max())}, expected 0 to {self.codebook_size - 1}")
        found = F.embedding(codes, self.codebook[0]) if self.shared else self.codebook[torch.arange(self.depth, device=codes.device), codes]
        return self._whole(found)

    def full_tables(self) -> Tensor:
        """The tables as a language model reads them, with code vectors as long as what is quantized: (T, K, E)."""
        return self._whole(self.codebook.transpose(0, 1)).transpose(0, 1).contiguous()

    def _whole(self, x: Tensor) -> Tensor:
        """Code vectors (..., T or D, W) -> the same as vectors of E numbers (..., T or D, E)."""
        return x

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (B, N, D) -> quantized vectors (B, N, E)."""
        return self.vectors(codes).sum(-2)


class ResidualVQ(Quantizer):
    """Residual quantizer: each code stands for what the codes before it left. Arguments: see `Quantizer`."""

    def _search(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Greedily, depth by depth. Commitment counts all partial sums (M, D, E)."""
        codes, chosen, residual = [], [], x
        for d in range(self.depth):
            codes.append(nearest(residual, self.table(d), self.fused))
            chosen.append(F.embedding(codes[-1], self.table(d)))
            residual = residual - chosen[-1]
        chosen = torch.stack(chosen, 1)                                                      # (M, D, E)
        partial = chosen.cumsum(1)
        return torch.stack(codes, 1), x[:, None] - partial + chosen, partial     # each depth with the residual that it saw, to rounding


class MultiCodebookVQ(Quantizer):
    """Multi-codebook quantizer: E numbers are D chunks of E/D, each coded by its own table of K x E/D, independently of the others.
    `more`: decay, threshold, grace, seed. Raises ValueError where E is not a multiple of D."""

    def __init__(self, dim: int, codebook_size: int, depth: int, **more):
        if dim % depth:
            raise ValueError(f"MultiCodebookVQ: got vectors of {dim} numbers for {depth} chunks, "
                             f"expected a multiple of {depth}; change the one or the other")
        super().__init__(dim, codebook_size, depth, shared=False, width=dim // depth, **more)

    def _search(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chunk by chunk. There are no partial sums: commitment counts the quantized vector alone (M, 1, E)."""
        chunks = x.unflatten(1, (self.depth, -1)).clone()        # (M, D, W), a copy: `update` needs it, and z belongs to the caller
        codes = torch.stack([nearest(chunks[:, d], self.table(d), self.fused) for d in range(self.depth)], 1)
        chosen = self.codebook[torch.arange(self.depth, device=x.device), codes]             # (M, D, W)
        return codes, chunks, chosen.reshape(len(x), 1, self.dim)

    def _whole(self, x: Tensor) -> Tensor:
        """Zeros outside the chunk, so that chunks are put side by side by a sum."""
        return torch.diag_embed(x.transpose(-1, -2), dim1=-3, dim2=-2).flatten(-2)           # (..., D, W) -> (..., D, D, W) -> (..., D, E)


QUANTIZERS = {"rvq": ResidualVQ, "mcq": MultiCodebookVQ}


def histogram(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs at each depth: codes (..., D) -> (D, K) int64."""
    depth = codes.shape[-1]
    row = codes.reshape(-1, depth) + torch.arange(depth, device=codes.device) * codebook_size
    return torch.bincount(row.flatten(), minlength=depth * codebook_size).view(depth, codebook_size)


def usage_and_perplexity(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Counts (..., K) -> share of codes that occur, and exp(entropy), the number of codes that are used as if evenly; (...,) each."""
    p = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    return (counts > 0).double().mean(-1), torch.special.entr(p).sum(-1).exp()
