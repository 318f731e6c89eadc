"""Where the keys of a row stand: distances, head types against chance, sinks.

Shapes: B batch, H heads, t queries of a block, S keys (null keys first), R keys that are no null keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cda_cli.inspection.seen_rows import SeenRows
from cda_cli.inspection.statistics import ZERO

SINK = 0.3  # the mean share of its queries' mass from which a key is a sink

Pattern = Callable[[SeenRows], Tensor]


def distance_back(rows: SeenRows) -> Tensor:
    """Σ p (t − s) / Σ p over the keys s of query t, [B, H, t]: how far back a row reads on average, in tokens.

    Null keys have no position and do not count. A row that reads nothing else is NaN.
    """
    back = rows.distance.clamp(min=0).to(rows.share.dtype)
    return (rows.real_share * back).sum(-1, dtype=torch.float64) / rows.real_mass


def null_share(rows: SeenRows) -> Tensor:
    """Σ p over the null keys, [B, H, t]."""
    return rows.share[..., : rows.seen.null_keys].sum(-1, dtype=torch.float64)


def by_distance(values: Tensor, position: int) -> Tensor:
    """Sums `values` [..., t, R] over the pairs of a query and a key at each distance: float64 [..., R].

    Row 0 is the query at `position`. Entries of keys that a query does not see must be 0.
    """
    t, R = values.shape[-2:]
    # Reversed and padded by t, row i of the flat tensor begins i places late in rows that are one place shorter. So
    # each column of these holds one distance.
    padded = F.pad(values.flip(-1), (0, t)).flatten(-2)[..., : t * (R + t - 1)]
    sums = padded.unflatten(-1, (t, R + t - 1)).sum(-2, dtype=torch.float64)  # Column j: distance position − R + 1 + j.
    first = R - 1 - position
    return F.pad(sums[..., first : first + R], (0, max(0, first + R - sums.shape[-1])))


def is_self(rows: SeenRows) -> Tensor:
    """The key of the query itself."""
    return (rows.distance == 0).unsqueeze(0)


def is_previous(rows: SeenRows) -> Tensor:
    """The key before the query."""
    return (rows.distance == 1).unsqueeze(0)


def is_first(rows: SeenRows) -> Tensor:
    """The first key of the window."""
    return (rows.position.unsqueeze(1) == rows.distance).unsqueeze(0)


def is_duplicate(rows: SeenRows) -> Tensor:
    """An earlier key with the token of the query."""
    return _same_token(rows) & (rows.distance > 0)


def is_induction(rows: SeenRows) -> Tensor:
    """A key after an earlier occurrence of the query's token."""
    return _same_token(rows, places_before=1) & (rows.distance >= 0)


def _same_token(rows: SeenRows, places_before: int = 0) -> Tensor:
    """Where the token so many places before a key is that of the query, [B, t, R]."""
    assert rows.tokens is not None, "these patterns need tokens"
    shifted = F.pad(rows.tokens, (places_before, 0), value=-1)[:, : rows.tokens.shape[1]]
    return rows.tokens[:, rows.position, None] == shifted[:, None]


# Head types by the 0/1 pattern of keys that make them, as in TransformerLens (`head_detector.py`): [B or 1, t, R].
POSITIONAL: dict[str, Pattern] = {"self": is_self, "previous": is_previous, "first": is_first}
OF_TOKENS: dict[str, Pattern] = {"duplicate": is_duplicate, "induction": is_induction}
PATTERNS = POSITIONAL | OF_TOKENS


def pattern_share(pattern: Pattern) -> Callable[[SeenRows], Tensor]:
    """Returns the measure Σ p D of each row, [B, H, t], D the 0/1 pattern of keys."""

    def share(rows: SeenRows) -> Tensor:
        D = pattern(rows).to(rows.share.dtype).expand(len(rows.share), -1, -1)
        return torch.einsum("bhts,bts->bht", rows.real_share, D).double()

    return share


class Distances:
    """The mass of p at each distance, [H, R], and what each pattern of keys would get of it by chance."""

    def __init__(self) -> None:
        self.mass = ZERO  # Σ p of the pairs at a distance, [H, R]
        self.pairs = ZERO  # their number, [R]
        self.first_mass = self.first_pairs = ZERO  # the part of both whose key is the first one
        self.hits = dict.fromkeys(OF_TOKENS, ZERO)  # how many of them are of a pattern, [R]
        self.uniform = dict.fromkeys(POSITIONAL, ZERO)  # mass under equal p, [H]

    def add(self, rows: SeenRows) -> None:
        position, B = rows.seen.position, len(rows.share)
        self.mass = self.mass + by_distance(rows.real_share, position).sum(0)
        self.pairs = self.pairs + B * by_distance((rows.distance >= 0).float(), position)
        around = (position, rows.distance.shape[1] - position - len(rows.position))
        self.first_mass = self.first_mass + F.pad(rows.real_share[..., 0].double().sum(0), around)
        self.first_pairs = self.first_pairs + B * F.pad(rows.visible[:, 0].double(), around)
        for name, pattern in OF_TOKENS.items():
            self.hits[name] = self.hits[name] + by_distance(pattern(rows).float(), position).sum(0)
        for name, pattern in POSITIONAL.items():
            equal = rows.real_mass * pattern(rows).sum(-1) / rows.real_keys
            self.uniform[name] = self.uniform[name] + equal.sum((0, 2))

    def chances(self) -> dict[str, Tensor]:
        """The mass that each pattern would have by chance, [H], on the CPU.

        A pattern of positions is compared with equal p for all keys of a row. A pattern of tokens is compared with keys
        at the same distances: Σ over distances d of the mass at d times the share of the pairs at d that are of the
        pattern. So a head that reads its neighbours, whatever they are, gets no credit for tokens that repeat there.
        The first key has no token before it, and pairs with it are left out for induction.
        """
        later = (self.mass - self.first_mass, self.pairs - self.first_pairs)
        matched = {
            name: (mass @ (self.hits[name] / pairs.clamp(min=1))).cpu()
            for name, (mass, pairs) in {"duplicate": (self.mass, self.pairs), "induction": later}.items()
        }
        return {name: mass.cpu() for name, mass in self.uniform.items()} | matched

    def shares(self) -> Tensor:
        """The share of each distance in the mass, [H, R], on the CPU; NaN for a head that reads null keys alone."""
        return (self.mass / self.mass.sum(-1, keepdim=True)).cpu()


def median_distance(shares: Tensor) -> Tensor:
    """Returns the least distance within which half of the mass lies, [H], from `shares` [H, R] of the distances."""
    within = shares.cumsum(-1)
    return torch.where(within[:, -1].isnan(), torch.nan, (within < 0.5 - 1e-9).sum(-1).double())


class Sinks:
    """Keys that most queries read: α_j = mean of p_tj over the queries t that see j (arXiv 2410.10781, with ε = 0.3).

    The last keys have few queries, of which each reads itself. So only null keys and keys in the first half of a window
    can be sinks. A window is complete when the next one begins.
    """

    def __init__(self) -> None:
        self.windows = 0
        self.largest = ZERO  # Σ over windows of the largest α, [H]
        self.sinks = ZERO  # windows in which it is above SINK, [H]
        self._mass: Tensor | None = None  # of each key in the windows that are being added, [B, H, S]
        self._seen_by: Tensor | None = None  # the queries that see each key in them, [S]
        self._null = 0

    def add(self, rows: SeenRows) -> None:
        if rows.seen.position == 0:
            self._close()
        mass = rows.share.sum(2, dtype=torch.float64)
        self._null = rows.seen.null_keys
        seen_by = F.pad(rows.visible.sum(0), (self._null, 0), value=len(rows.position))
        self._mass = mass if self._mass is None else self._mass + mass
        self._seen_by = seen_by if self._seen_by is None else self._seen_by + seen_by

    def _close(self) -> None:
        if self._mass is None or self._seen_by is None:
            return
        queries = self._mass.shape[-1] - self._null
        largest = (self._mass / self._seen_by)[..., : self._null + (queries + 1) // 2].amax(-1)
        self.largest = self.largest + largest.sum(0)
        self.sinks = self.sinks + (largest > SINK).double().sum(0)
        self.windows += len(largest)
        self._mass = self._seen_by = None

    def means(self) -> dict[str, Tensor]:
        """The largest α of a window, and the share of the windows that have a sink, each [H] on the CPU."""
        self._close()
        return {"sink_mass": self.largest.cpu() / self.windows, "sink_rate": self.sinks.cpu() / self.windows}
