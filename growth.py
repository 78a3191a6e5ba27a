"""Growth operators, which define the source of each block in a deeper model.

A growth operator is a pure function. It takes the old and the new number of blocks and returns a
source map: one `Source` for each block of the grown model, from bottom to top. Operators do not
depend on the model; `model.GPT.grow` applies a source map to parameters and optimizer state.

To add an operator, write a function in this file, decorate it with ``@operator``, and select it
with ``--growth=NAME``. See the worked example in CONTRIBUTING.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

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


@operator
def zero_output(old: int, new: int) -> SourceMap:
    """Add evenly spaced copies that start as the identity, so the model's function is preserved.

    Each copy is placed above its source. Both of its residual projections are zero (LLaMA Pro, Wu
    et al. 2024, arXiv:2401.02415).
    """
    sources = [i * old // new for i in range(new)]
    first = [i == 0 or sources[i - 1] != j for i, j in enumerate(sources)]
    return tuple(keep(j) if f else copy(j, zero_output=True) for j, f in zip(sources, first))


def source_map(name: str, old: int, new: int) -> SourceMap:
    """Return the source map of the operator `name` for growth from `old` to `new` blocks.

    Raises:
        UserError: if the operator does not exist, or copies blocks although there are none.
        ValueError: if the operator returns an invalid source map.
    """
    if name not in OPERATORS:
        raise UserError(f"growth={name!r} is unknown{did_you_mean(name, OPERATORS)}")
    if old == new:
        return tuple(map(keep, range(old)))
    try:
        sources = OPERATORS[name](old, new)
    except ArithmeticError:
        sources = ()
    used = {i for s in sources for i, _ in s.mix}
    if old == 0 and (used or not sources):
        raise UserError(
            f"growth={name} copies existing blocks, but the model has none: use growth=random"
        )
    kept = [s for s in sources if s.keep]
    valid = len(sources) == new and used <= set(range(old)) and len(set(kept)) == len(kept)
    if not valid or any(len(s.mix) != 1 or s != keep(s.mix[0][0]) for s in kept):
        raise ValueError(
            f"growth operator {name} returned an invalid map from {old} to {new} blocks: {sources}"
        )
    return sources


def new_blocks(sources: SourceMap) -> tuple[int, ...]:
    """Return the positions of the added blocks."""
    return tuple(i for i, source in enumerate(sources) if not source.keep)
