"""A narrower standard model with as many parameters as a reduced one: what sharing has to beat."""

from collections.abc import Callable
from typing import Any

WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads")


def narrower_fields(
    fields: dict[str, Any], parameters: int, count: Callable[[dict[str, Any]], int], tolerance: float = 0.01
) -> dict[str, Any]:
    """Return the config fields of a narrower model with a given number of parameters.

    It has as many layers and heads. Of all widths that the heads divide into even parts, it is the one at which an MLP
    that makes up the rest has the ratio to the width nearest to the old one.

    Args:
        fields: of the standard model.
        parameters: what to match.
        count: returns the parameters of fields; they must grow linearly with `intermediate_size`.
        tolerance: the largest difference, as a share of `parameters`.

    Raises:
        ValueError: the architecture has no such fields, or no width matches.
    """
    if lacking := [name for name in WIDTHS if not isinstance(fields.get(name), int)]:
        raise ValueError(
            f"no narrower model can be found without {', '.join(lacking)} in its config: give narrow: false"
        )
    width, mlp, heads = (fields[name] for name in WIDTHS)
    candidates = []
    for narrower in range(width // (2 * heads) * 2 * heads, 0, -2 * heads):
        few, more = (count({**fields, "hidden_size": narrower, "intermediate_size": size}) for size in (1, 2))
        size = 1 + round((parameters - few) / (more - few))
        if size < 1:  # too wide even without an MLP
            continue
        found = {**fields, "hidden_size": narrower, "intermediate_size": size}
        candidates.append((abs(size / narrower - mlp / width), found))
        if size / narrower > mlp / width:  # still narrower ones are farther off
            break
    if candidates:
        _, found = min(candidates, key=lambda candidate: candidate[0])
        if abs(count(found) - parameters) <= tolerance * parameters:
            return found
    raise ValueError(f"no narrower standard model has {parameters:,} parameters, to within {tolerance:.0%}")
