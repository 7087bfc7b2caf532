"""Sharing across depth: the matrices of all layers, made from fewer.

| depth_sharing | layer l's matrix | source |
|---|---|---|
| ``masa`` | Σ_s c_{l,s}·D_s over S atoms D_s, a dictionary for each role | Zhussip et al., arXiv 2508.04581 |
| ``sequential`` | neighbours share one: A A A B B B | its baselines |
| ``repeat_all_over`` | the stack repeats: A B A B A B | |

`DepthSharing` belongs to the model and not to a layer, holds each shared tensor once, and makes the matrices of all
layers once per forward, in the parameters' own type also under autocast. The layers take them as arguments
(`SharedLinear`), so that checkpointing, DDP, FSDP and `torch.compile` see nothing but tensors. ``low_rank`` shares
nothing between layers: its factors are in `LowRankLinear`.
"""

import torch
from torch import nn
from transformers import initialization as init


def layer_groups(depth_sharing: str, num_layers: int, num_groups: int) -> list[int]:
    """Numbers the group whose matrix each layer takes, in ``sequential`` or ``repeat_all_over`` sharing."""
    if depth_sharing == "sequential":
        return [layer * num_groups // num_layers for layer in range(num_layers)]
    return [layer % num_groups for layer in range(num_layers)]


def initial_coefficients(num_layers: int, num_atoms: int, how: str) -> torch.Tensor:
    """Starts the coefficients [layers, atoms] with rows of length one: an assembled matrix varies as the atoms do.

    Args:
        how: "depth" spreads the atoms evenly over the depth and mixes in each layer the two that are nearest;
            "normal" draws a random direction for each layer.
    """
    if how == "normal":
        coefficients = torch.randn(num_layers, num_atoms)
    else:
        layers = torch.linspace(0, num_atoms - 1, num_layers) if num_layers > 1 else torch.zeros(1)
        coefficients = (1 - (layers[:, None] - torch.arange(num_atoms)).abs()).clamp(min=0)
    return nn.functional.normalize(coefficients, dim=1)


class CoefficientNetwork(nn.Module):
    """Makes the coefficients while training, from an embedding of each layer, by a network of three layers.

    For inference its result takes its place (`fix_coefficients`). The paper gives no sizes.
    """

    def __init__(self, num_layers: int, num_atoms: int, size: int = 64):
        super().__init__()
        # With at least as many hidden channels as layers, it can begin with any coefficients.
        size = max(size, num_layers)
        self.embedding = nn.Embedding(num_layers, size)
        self.hidden = nn.ModuleList([nn.Linear(size, size), nn.Linear(size, size)])
        self.out = nn.Linear(size, num_atoms)

    def features(self) -> torch.Tensor:
        features = self.embedding.weight
        for layer in self.hidden:
            features = nn.functional.gelu(layer(features))
        return features

    def forward(self) -> torch.Tensor:
        """Gives [layers, atoms]."""
        return self.out(self.features())

    def init_weights(self, coefficients: torch.Tensor):
        """Starts so that the result is `coefficients` [layers, atoms]."""
        init.normal_(self.embedding.weight)
        for layer in self.hidden:
            init.normal_(layer.weight, std=(2 / layer.in_features) ** 0.5)
            init.zeros_(layer.bias)
        init.zeros_(self.out.bias)
        features = self.features().double().cpu()
        init.copy_(self.out.weight, (torch.linalg.pinv(features) @ coefficients.double()).T)


class SharedMatrix(nn.Module):
    """One matrix of attention in all layers, [width, hidden] each, made from `atoms` [atoms, width, hidden].

    In ``masa`` there are `coefficients` besides: a parameter [layers, atoms], or the network that makes it.
    """

    def __init__(self, config, width: int):
        super().__init__()
        self.config = config
        num_layers = config.num_hidden_layers
        number = config.num_atoms if config.depth_sharing == "masa" else config.num_groups
        self.atoms = nn.Parameter(torch.empty(number, width, config.hidden_size))
        if config.depth_sharing != "masa":
            self.groups = layer_groups(config.depth_sharing, num_layers, number)
        elif config.coefficient_source == "network":
            self.coefficients = CoefficientNetwork(num_layers, number)
        else:
            self.coefficients = nn.Parameter(torch.empty(num_layers, number))

    def init_weights(self, std: float):
        """Starts the matrix of every layer with entries of standard deviation `std`."""
        init.normal_(self.atoms, std=std)
        if self.config.depth_sharing == "masa":
            coefficients = initial_coefficients(
                self.config.num_hidden_layers, len(self.atoms), self.config.coefficient_init
            )
            if self.config.coefficient_source == "network":
                self.coefficients.init_weights(coefficients)
            else:
                init.copy_(self.coefficients, coefficients)

    def layer_coefficients(self) -> torch.Tensor:
        """Gives the coefficients of ``masa``, [layers, atoms]."""
        return self.coefficients if isinstance(self.coefficients, nn.Parameter) else self.coefficients()

    @torch.no_grad()
    def fix_coefficients(self):
        """Puts what the network gives in its place."""
        self.coefficients = nn.Parameter(self.layer_coefficients().clone())

    def forward(self) -> tuple[torch.Tensor, ...]:
        """Gives what there are different matrices of, [width, hidden] each: per layer, or per group."""
        if self.config.depth_sharing != "masa":
            return self.atoms.unbind(0)
        assembled = self.layer_coefficients() @ self.atoms.flatten(1)
        return assembled.unflatten(1, self.atoms.shape[1:]).unbind(0)


class DepthSharing(nn.ModuleDict):
    """All shared matrices of a model by their names in the scheme (`Scheme.matrices`), and "o" for the output."""

    def __init__(self, config):
        widths = {name: width for linear in config.shared_maps for name, width in config.matrix_widths(linear).items()}
        super().__init__({name: SharedMatrix(config, width) for name, width in widths.items()})
        self.config = config

    def forward(self) -> list[tuple[torch.Tensor, ...]]:
        """Gives each layer its shared weights: that of its projection [rows, hidden] and, if shared, of its output."""
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            made = {name: matrix() for name, matrix in self.items()}
            maps = []
            for linear in self.config.shared_maps:
                parts = zip(*(made[name] for name in self.config.matrix_widths(linear)), strict=True)
                maps.append([part[0] if len(part) == 1 else torch.cat(part) for part in parts])
        weights = list(zip(*maps, strict=True))
        if self.config.depth_sharing == "masa":
            return weights
        groups = next(iter(self.values())).groups
        return [weights[group] for group in groups]


def fix_coefficients(model: nn.Module):
    """Makes a trained model one for inference: the coefficients of ``masa`` take the place of their networks.

    Nothing changes without such networks. `scripts/pretrain.py` does so when it saves a model, not with checkpoints.
    """
    if model.config.coefficient_source == "direct":
        return
    for module in model.modules():
        if isinstance(module, SharedMatrix):
            module.fix_coefficients()
    model.config.coefficient_source = "direct"


def make_depth_sharing(config) -> DepthSharing | None:
    """Makes what the layers of a model share; None where every layer has all of its own."""
    return DepthSharing(config) if config.depth_sharing in ("masa", "sequential", "repeat_all_over") else None


def shared_weights(depth_sharing: DepthSharing | None, num_layers: int) -> list[tuple[torch.Tensor, ...]]:
    """Gives each layer the weights it shares, once per forward; nothing where it shares none."""
    return [()] * num_layers if depth_sharing is None else depth_sharing()
