"""The attention schemes as one table: which matrix plays which role.

A role (query, key, value) names the matrix that makes it. ``x`` is not a matrix: the role is the block's
input itself. Two roles with the same name share one matrix, and so one projection of the input.

| scheme | source |
|---|---|
| ``standard`` | Vaswani et al., arXiv 1706.03762 |
| ``symmetric``, ``pairwise`` | Courtois et al., arXiv 2406.06366: K = Q, and K = Q·U with one U per head |
| ``shared`` | Kowsher et al., arXiv 2412.00359: S = x·W_s, then Q = S·D_q, K = S·D_k, V = S·D_v |
| ``unified`` | ``shared`` with its diagonals fixed at one: Q = K = V |
| ``query_free``, ``key_free``, ``value_free`` | Karbevski & Mijoski, arXiv 2510.23912: one role is the input |
| ``shared_kv`` | Kayyam et al., arXiv 2606.04032: V = K |
"""

from dataclasses import dataclass

from .ingredients import Diagonals, Ingredient, Pairwise


@dataclass(frozen=True)
class Scheme:
    """A row of the table: the matrix of each role, and what the scheme has in addition."""

    query: str
    key: str
    value: str
    ingredient: Ingredient = Ingredient()  # noqa: RUF009 - it has no state
    scale: float = 1.0  # of the logits, as a multiple of 1/sqrt(head_dim)

    @property
    def roles(self) -> tuple[str, str, str]:
        """The matrices of query, key and value."""
        return self.query, self.key, self.value

    @property
    def matrices(self) -> tuple[str, ...]:
        """The distinct matrices, in the order in which the roles name them."""
        return tuple(dict.fromkeys(role for role in self.roles if role != "x"))

    @property
    def key_is_value(self) -> bool:
        """Whether the folded computation attends with one tensor as both key and value."""
        return self.key == self.value

    @property
    def can_group(self) -> bool:
        """Whether key and value may have fewer heads: neither is the query's matrix or the input."""
        return type(self.ingredient) is Ingredient and not {self.key, self.value} & {self.query, "x"}


SCHEMES = {
    "standard": Scheme("q", "k", "v"),
    "symmetric": Scheme("q", "q", "v"),
    "pairwise": Scheme("q", "q", "v", ingredient=Pairwise()),
    "shared": Scheme("s", "s", "s", ingredient=Diagonals()),
    "unified": Scheme("s", "s", "s"),
    "query_free": Scheme("x", "k", "v", scale=0.5),
    "key_free": Scheme("q", "x", "v"),
    "value_free": Scheme("q", "k", "x"),
    "shared_kv": Scheme("q", "k", "k"),
}
