"""Sharing across depth: the matrices of all layers, made from fewer.

| depth_sharing | layer l's matrix | source |
|---|---|---|
| ``masa`` | Σ_s c_{l,s}·D_s over S atoms D_s, a dictionary for each role | Zhussip et al., arXiv 2508.04581 |
| ``sequential`` | neighbours share one: A A A B B B | its baselines |
| ``repeat_all_over`` | the stack repeats: A B A B A B | |

`DepthSharing` belongs to the model and not to a layer, holds each shared tensor once, and makes the matrices of all
layers once per forward (not once per token in a generation), in the parameters' own dtype, even under autocast.
The layers take them as arguments (`SharedLinear`), so that checkpointing, DDP, FSDP and `torch.compile` see only
tensors. ``low_rank`` shares nothing between layers: its factors are in `LowRankLinear`.
"""

from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from .loading import check_loaded


def layer_groups(depth_sharing: str, num_layers: int, num_groups: int) -> list[int]:
    """Return the group of each layer in ``sequential`` or ``repeat_all_over``."""
    if depth_sharing == "sequential":
        return [layer * num_groups // num_layers for layer in range(num_layers)]
    return [layer % num_groups for layer in range(num_layers)]


def initial_coefficients(num_layers: int, num_atoms: int, how: str) -> torch.Tensor:
    """Return coefficients [layers, atoms] with rows of length one, which keep the variance of the atoms' entries.

    Args:
        how: "depth" spreads the atoms evenly over the depth and mixes the two nearest in each layer;
            "normal" draws a random direction for each layer.
    """
    if how == "normal":
        coefficients = torch.randn(num_layers, num_atoms)
    else:
        layers = torch.linspace(0, num_atoms - 1, num_layers) if num_layers > 1 else torch.zeros(1)
        coefficients = (1 - (layers[:, None] - torch.arange(num_atoms)).abs()).clamp(min=0)
    return nn.functional.normalize(coefficients, dim=1)


class LayerEmbedding(nn.Embedding):
    """An embedding of every layer. It is called, so that hooks can load what is offloaded."""

    def forward(self) -> torch.Tensor:
        """Return [layers, size]."""
        return self.weight


class CoefficientNetwork(nn.Module):
    """The network of three layers that makes the coefficients while training, from an embedding of each layer.

    `fix_coefficients` replaces it by its result for inference. The paper gives no sizes.
    """

    def __init__(self, num_layers: int, num_atoms: int, size: int = 64):
        super().__init__()
        # With at least as many hidden channels as layers, it can begin with any coefficients.
        size = max(size, num_layers)
        self.embedding = LayerEmbedding(num_layers, size)
        self.hidden = nn.ModuleList([nn.Linear(size, size), nn.Linear(size, size)])
        self.out = nn.Linear(size, num_atoms)

    def features(self) -> torch.Tensor:
        features = self.embedding()
        for layer in self.hidden:
            features = nn.functional.gelu(layer(features))
        return features

    def forward(self) -> torch.Tensor:
        """Return the coefficients [layers, atoms]."""
        return self.out(self.features())

    def init_weights(self, coefficients: torch.Tensor):
        """Start with the result `coefficients` [layers, atoms]."""
        if self.out.weight.is_meta:  # offloaded while it was loaded
            return
        init.normal_(self.embedding.weight)
        for layer in self.hidden:
            init.normal_(layer.weight, std=(2 / layer.in_features) ** 0.5)
            init.zeros_(layer.bias)
        init.zeros_(self.out.bias)
        features = self.features().double().cpu()
        init.copy_(self.out.weight, (torch.linalg.pinv(features) @ coefficients.double()).T)


class SharedMatrix(nn.Module):
    """One matrix in all layers, [width, in_features] each, made from `atoms` [atoms, width, in_features].

    ``masa`` has `coefficients`, too: a parameter [layers, atoms], or the network that makes it.

    Args:
        config: with the fields depth_sharing, num_atoms, num_groups, coefficient_source and coefficient_init of
            `SharedAttentionConfig`.
    """

    def __init__(self, config, num_layers: int, width: int, in_features: int):
        super().__init__()
        self.config = config
        self.num_layers = num_layers
        number = config.num_atoms if config.depth_sharing == "masa" else config.num_groups
        self.atoms = nn.Parameter(torch.empty(number, width, in_features))
        if config.depth_sharing != "masa":
            self.groups = layer_groups(config.depth_sharing, num_layers, number)
        elif config.coefficient_source == "network":
            self.coefficients = CoefficientNetwork(num_layers, number)
        else:
            self.coefficients = nn.Parameter(torch.empty(num_layers, number))

    def init_weights(self, std: float):
        """Start the matrix of every layer with entries of standard deviation `std`."""
        init.normal_(self.atoms, std=std)
        if self.config.depth_sharing == "masa":
            coefficients = initial_coefficients(self.num_layers, len(self.atoms), self.config.coefficient_init)
            if self.config.coefficient_source == "network":
                self.coefficients.init_weights(coefficients)
            else:
                init.copy_(self.coefficients, coefficients)

    def layer_coefficients(self) -> torch.Tensor:
        """Return the coefficients of ``masa``, [layers, atoms]."""
        return self.coefficients() if isinstance(self.coefficients, CoefficientNetwork) else self.coefficients

    def forward(self, layer: int | None = None) -> tuple[torch.Tensor, ...] | torch.Tensor:
        """Return the distinct matrices, [width, in_features] each: one per layer, or one per group.

        Args:
            layer: return the matrix of this layer only.
        """
        if self.config.depth_sharing != "masa":
            return self.atoms.unbind(0) if layer is None else self.atoms[self.groups[layer]]
        with torch.autocast(self.atoms.device.type, enabled=False):
            coefficients = self.layer_coefficients()
            assembled = (coefficients if layer is None else coefficients[layer]) @ self.atoms.flatten(1)
        assembled = assembled.unflatten(-1, self.atoms.shape[1:])
        return assembled.unbind(0) if layer is None else assembled


class DepthSharing(nn.ModuleDict):
    """All shared matrices of a model by their names in the scheme (`Scheme.matrices`), and "o" for the output."""

    def __init__(self, config):
        layers, size = config.num_hidden_layers, config.hidden_size
        super().__init__(
            {name: SharedMatrix(config, layers, width, size) for name, width in config.shared_widths.items()}
        )
        self.config = config
        self.mode_changes = 0

    def forward(self) -> list[tuple[torch.Tensor, ...]]:
        """Return the shared weights of each layer: its projection's [rows, hidden] and, if shared, its output's."""
        made = {name: matrix() for name, matrix in self.items()}
        maps = []
        for map_name in self.config.shared_maps:
            parts = zip(*(made[name] for name in self.config.matrix_widths(map_name)), strict=True)
            # With device_map="auto" the matrices of one map may lie on several devices.
            maps.append([torch.cat([p.to(part[0].device) for p in part]) if part[1:] else part[0] for part in parts])
        weights = list(zip(*maps, strict=True))
        if self.config.depth_sharing == "masa":
            return weights
        groups = next(iter(self.values())).groups
        return [weights[group] for group in groups]

    def kept_with(self, cache: Cache) -> list[tuple[torch.Tensor, ...]]:
        """Return the result of `forward`, assembled again only if a parameter has changed since the last call."""
        # Fused optimizers change parameters in place and do not count it; they need a model in training mode.
        state = {p: (p._version, p.data_ptr()) for p in self.parameters()}, self.mode_changes
        if cache not in _KEPT or _KEPT[cache][0] != state:
            _KEPT[cache] = state, self()
        return _KEPT[cache][1]

    def train(self, mode: bool = True):
        self.mode_changes += 1
        return super().train(mode)


# The matrices assembled for a generation and the state of the parameters then, kept while its cache lives. They are
# outside of cache and model, which are copied and saved.
_KEPT: WeakKeyDictionary[Cache, tuple[tuple, list]] = WeakKeyDictionary()


def fix_coefficients(model: nn.Module):
    """Prepare a trained model for inference: replace the networks that make the coefficients of ``masa`` by these.

    A model without such networks is unchanged. `scripts/pretrain.py` does this to the final model, not to checkpoints.

    Raises:
        ValueError: weights are offloaded.
    """
    matrices = [
        module
        for module in model.modules()
        if isinstance(module, SharedMatrix) and module.config.coefficient_source == "network"
    ]
    if matrices:
        check_loaded(model)
    for matrix in matrices:
        matrix.coefficients = nn.Parameter(matrix.layer_coefficients().detach().clone())
        matrix.config.coefficient_source = "direct"


def make_depth_sharing(config) -> DepthSharing | None:
    """Return the matrices that the layers of a model share; None if each layer has its own."""
    return DepthSharing(config) if config.depth_sharing in ("masa", "sequential", "repeat_all_over") else None


def shared_weights(
    depth_sharing: DepthSharing | None, num_layers: int, cache: Cache | None = None
) -> list[tuple[torch.Tensor, ...]]:
    """Return the shared weights of each layer, empty where it shares none.

    They are assembled once per forward or, for a generation without gradients, once for its `cache`. Compiled code,
    and parameters that are sharded, quantized or made under `torch.inference_mode`, cannot tell whether a parameter
    has changed, and assemble in every forward. A change through `parameter.data` in the middle of a generation goes
    unnoticed until the next one.
    """
    if depth_sharing is None:
        return [()] * num_layers
    if cache is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return depth_sharing()
    if cache.get_seq_length() == 0:  # a generation begins
        _KEPT.pop(cache, None)
        return depth_sharing()
    if all(type(p) is nn.Parameter and not p.is_inference() for p in depth_sharing.parameters()):
        return depth_sharing.kept_with(cache)
    return depth_sharing()
