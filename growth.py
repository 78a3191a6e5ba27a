"""Growth operators, which define the source of each block in a deeper model.

A growth operator is a pure function. It takes the old and the new number of blocks and returns a
source map: one `Source` for each block of the grown model, from bottom to top. Operators do not
depend on the model; `model.GPT.grow` applies a source map to parameters and optimizer state.

To add an operator, write a function in this file, decorate it with ``@operator``, and select it
with ``--growth=NAME``. See the worked example in CONTRIBUTING.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from stagewise.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Source:
    """Source of one block of the grown model.

    The block's tensors are ``sum(weight * old[i] for i, weight in mix) + fresh * init``. Here
    ``old`` are the blocks before growth, and ``init`` is a newly initialized block.
    """

    mix: tuple[tuple[int, float], ...] = ()  # (old block, weight) pairs
    fresh: float = 0.0  # weight of the newly initialized tensors
    keep: bool = False  # reuse old block mix[0] itself, possibly at a different position
    zero_output: bool = False  # zero both residual projections; the block starts as the identity


FRESH = Source(fresh=1.0)


def keep(i: int) -> Source:
    """Old block `i` itself, with the same parameter objects."""
    return Source(mix=((i, 1.0),), keep=True)


def copy(i: int, zero_output: bool = False) -> Source:
    """A new block with a copy of the tensors of old block `i`."""
    return Source(mix=((i, 1.0),), zero_output=zero_output)


SourceMap = tuple[Source, ...]
OPERATORS: dict[str, Callable[[int, int], SourceMap]] = {}


def operator(function: Callable[[int, int], SourceMap]) -> Callable[[int, int], SourceMap]:
    """Register a growth operator under its function name."""
    OPERATORS[function.__name__] = function
    return function


@operator
def random(old: int, new: int) -> SourceMap:
    """Add newly initialized blocks on top (Li et al. 2024, arXiv:2411.18700)."""
    return tuple(map(keep, range(old))) + (FRESH,) * (new - old)


@operator
def copy_last(old: int, new: int) -> SourceMap:
    """Add a copy of the last blocks on top (gradual stacking, Reddi et al. 2023).

    As many blocks are copied as are added. If there are fewer, all blocks are copied repeatedly.
    """
    group = min(old, new - old)
    return tuple(map(keep, range(old))) + tuple(
        copy(old - group + i % group) for i in range(new - old)
    )


@operator
def stack(old: int, new: int) -> SourceMap:
    """Add copies of all existing blocks on top, in order, until there are `new` blocks.

    Progressive stacking (Gong et al. 2019) doubles the depth repeatedly. G_stack (Du et al. 2024,
    arXiv:2405.15319) stacks once. If `old` does not divide `new`, the last copy is incomplete.
    """
    return tuple(keep(i) if i < old else copy(i % old) for i in range(new))


def _evenly(old: int, new: int) -> list[tuple[int, int, int]]:
    """Spread additional blocks evenly over the old ones.

    Return (i, k, n) for every block of the new model: the k-th block after old block i, of n - 1
    additional ones. Of equal groups of old blocks, the last one gets the additional block.
    """
    added = new - old
    n = [1 + (i + 1) * added // old - i * added // old for i in range(old)]
    return [(i, k, n[i]) for i in range(old) for k in range(n[i])]


@operator
def interleave(old: int, new: int) -> SourceMap:
    """Add evenly spaced copies, each directly above its source: 0 0 1 1 2 2 for 3 to 6 blocks.

    Also called interposition (arXiv:2510.08008) and, in staged training (Shen et al. 2022,
    arXiv:2203.06211), alternate copy.
    """
    return tuple(copy(i) if k else keep(i) for i, k, _ in _evenly(old, new))


@operator
def zero_output(old: int, new: int) -> SourceMap:
    """Like `interleave`, but the copies start as the identity: the model's function is preserved.

    Both residual projections of a copy are zero (LLaMA Pro, Wu et al. 2024, arXiv:2401.02415).
    """
    return tuple(s if s.keep else replace(s, zero_output=True) for s in interleave(old, new))


@operator
def copy_middle(old: int, new: int) -> SourceMap:
    """Add a copy of the middle group of blocks directly above it (MIDAS, arXiv:2409.19044).

    A group has as many blocks as are added. Of n groups, group ceil(n / 2) is copied. This is
    the lower of the two middle groups if n is even.
    """
    size = min(old, new - old)
    stop = -(-(old // size) // 2) * size
    added = tuple(copy(stop - size + i % size) for i in range(new - old))
    return (*map(keep, range(stop)), *added, *map(keep, range(stop, old)))


@operator
def lidas(old: int, new: int) -> SourceMap:
    """Add the blocks around the upper end of the middle group (LIDAS, arXiv:2512.08819).

    Between the middle group, as in `copy_middle`, and the group above, insert a copy of the upper
    half of the former and the lower half of the latter. If there is no group above, copy the group.
    """
    size = min(old, new - old)
    stop = -(-(old // size) // 2) * size
    first = min(stop - size + size // 2, old - size)  # of the copied blocks
    added = tuple(copy(first + i % size) for i in range(new - old))
    return (*map(keep, range(stop)), *added, *map(keep, range(stop, old)))


@operator
def solar(old: int, new: int) -> SourceMap:
    """Stack two overlapping parts: the first m and the last m blocks, for 2 m new ones.

    This is the depth up-scaling of SOLAR (Kim et al. 2024, arXiv:2312.15166), which has old = 32
    and m = 24. Blocks that appear in both parts are copied into the upper one.
    """
    m = new // 2
    if old < new - m:
        raise ArithmeticError("the parts are longer than the model")
    upper = range(old - (new - m), old)
    return (*map(keep, range(m)), *(copy(i) if i < m else keep(i) for i in upper))


@operator
def interpolate(old: int, new: int) -> SourceMap:
    """Add evenly spaced blocks, interpolated linearly between the neighbors of each.

    Blocks above the last one are copies of it (multilevel training of transformers as ODEs, as in
    Salva4/multilevel_transformer).
    """
    sources = []
    for i, k, n in _evenly(old, new):
        between = Source(mix=((i, 1 - k / n), (i + 1, k / n)))
        sources.append(keep(i) if k == 0 else between if i + 1 < old else copy(i))
    return tuple(sources)


def source_map(name: str, old: int, new: int) -> SourceMap:
    """Return the source map of the operator `name` for growth from `old` to `new` blocks.

    Raises:
        UserError: if the operator does not exist, cannot grow the model, or returns an invalid map.
    """
    if name not in OPERATORS:
        raise UserError(f"growth={name!r} is unknown{did_you_mean(name, OPERATORS)}")
    if old == new:
        return tuple(map(keep, range(old)))
    where = f"growth={name} from {old} to {new} blocks"
    try:
        sources = OPERATORS[name](old, new)
    except ArithmeticError as error:
        if old:
            raise UserError(f"{where}: not defined for these numbers of blocks: {error}") from None
        sources = ()
    if old == 0 and (not sources or any(s.mix for s in sources)):
        raise UserError(
            f"growth={name} copies existing blocks, but the model has none: use --growth=random"
        )
    if len(sources) != new:
        raise UserError(f"{where}: the operator returned {len(sources)} sources")
    kept = set()
    for i, source in enumerate(sources):
        if not all(0 <= j < old for j, _ in source.mix):
            raise UserError(f"{where}: source {i} of the operator uses a block that does not exist")
        one = len(source.mix) == 1 and source == keep(source.mix[0][0])
        if source.keep and (not one or source in kept):
            raise UserError(f"{where}: source {i} of the operator must keep one block, only once")
        kept |= {source} if source.keep else set()
    if unused := set(range(old)) - {j for source in sources for j, _ in source.mix}:
        raise UserError(f"{where}: the operator does not use old blocks {sorted(unused)}")
    return sources


def new_blocks(sources: SourceMap) -> tuple[int, ...]:
    """Return the positions of the added blocks."""
    return tuple(i for i, source in enumerate(sources) if not source.keep)
