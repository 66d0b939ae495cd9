"""A network's modules under the names of other programs.

Each naming is a Table (convert.py). A module of one of them may hold several of another's: BFL's
`linear1` of FLUX.1 is diffusers' to_q, to_k, to_v and proj_mlp. The rows of their weights are then
side by side, and so are those of B in a LoRA, whose A they share.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from flax import nnx

from realgen_jax.nn.convert import Piece, Table, leaves, pieces, source_of

Span = tuple[int, int]  # rows [start, stop)


@dataclass(frozen=True)
class Share:
    """One of diffusers' modules, and the rows of another naming's module that it consists of."""

    module: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Shares:
    """What a module of another naming holds. rows: number of outputs of that module."""

    rows: int
    shares: tuple[Share, ...]


def shares(state: nnx.State, own: Table, other: Table) -> dict[str, Shares]:
    """Return {module of the naming `other`: what it holds of the modules of `own`}.

    state: the network's, of which shapes are read. Modules that `other` does not name are left out.
    """
    found: dict[str, list[Share]] = {}
    rows = {}
    for _, _, mine, theirs in projections(state, own, other):
        for piece in mine:
            spans = []
            for part in theirs:
                first = max(piece.begin, part.begin) - part.begin
                last = min(piece.end, part.end) - part.begin
                if first < last:
                    module = part.module
                    rows[module] = part.rows
                    spans.append((part.start + first, part.start + last))
            found.setdefault(module, []).append(Share(piece.module, tuple(spans)))
    return {module: Shares(rows[module], tuple(parts)) for module, parts in found.items()}


def projections(
    state: nnx.State, own: Table, other: Table
) -> Iterator[tuple[str, int, list[Piece], list[Piece]]]:
    """Yield (our module, layer, its pieces under `own`, and under `other`) of every projection."""
    for leaf, array in leaves(state).items():
        target, _, kind = leaf.rpartition(".")
        if kind != "kernel" or target not in other.rows:
            continue
        source = source_of(leaf, own)
        outputs = source.joined_shape(array.shape)[-1]
        for layer in range(array.shape[0] if source.stacked else 1):
            pair = (pieces(table.rows[target], outputs, layer) for table in (own, other))
            yield target, layer, *pair


def flat(module: str) -> str:
    """A module's name as sd-scripts, OneTrainer and LyCORIS write it, with "_" for "."."""
    return module.replace(".", "_")


def all_names(state: nnx.State, own: Table, others: Iterable[Table]) -> Mapping[str, Shares]:
    """Return {flat name in any naming: what that module holds of the modules of `own`}."""
    names = {}
    for other in (own, *others):
        for module, content in shares(state, own, other).items():
            names[flat(module)] = content
    return names
