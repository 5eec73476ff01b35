"""Which optimizer updates each parameter: Muon matrices, AdamW the rest, experts a group apart.

Muon orthogonalises the update of a matrix that maps one vector to another. In a table (an
embedding, the output head, a router's gate) each row stands for one token, position or expert, so
AdamW updates those, as it updates vectors and single numbers (Jordan et al. 2024).

The rule: embeddings and everything that is not a matrix go to AdamW, other matrices to Muon. A
layer declares exceptions in the class that creates the parameters, by their names in the layer:

    class MoE(nn.Module):
        optimizers: ClassVar = {"gate.weight": "adamw", "up": "experts", "out": "experts"}

The class declares them, not the tensors, because FSDP and expert parallelism replace the tensors.

Pinned by tests/training/test_parameter_groups.py.
"""

from torch import nn


def optimizer_of(model: nn.Module) -> dict[str, str]:
    """Return the optimizer of each parameter, by name: "muon", "adamw" or "experts".

    The order is that of `model.named_parameters()`.
    """
    declared = {}
    for path, layer in model.named_modules():
        optimizers = {"weight": "adamw"} if isinstance(layer, nn.Embedding) else {}
        optimizers |= getattr(layer, "optimizers", {})
        for name, optimizer in optimizers.items():
            declared[f"{path}.{name}" if path else name] = optimizer
    return {
        name: declared.get(name, "muon" if parameter.ndim == 2 else "adamw")
        for name, parameter in model.named_parameters()
    }


def fp32_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters that layers declare to use in fp32, even under autocast.

    A layer declares them in the class attribute `fp32_parameters`: a router's gate.
    """
    names = []
    for path, layer in model.named_modules():
        for name in getattr(layer, "fp32_parameters", ()):
            names.append(f"{path}.{name}" if path else name)
    return names
