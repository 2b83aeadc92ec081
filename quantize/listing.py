"""What becomes of each parameter of a network, in words."""

from torch import nn

from quantize.modes import ProjectionMode
from quantize.selectors import FROZEN_BY, decides_itself, walk


def explain(model: nn.Module, mode: ProjectionMode) -> dict[str, str]:
    """Prints, for every parameter of a network, "quantized" or the reason why it is not; returns the same by name."""
    found = reasons(model, mode)
    width = max(map(len, found), default=0)
    print("\n".join(f"{name:{width}}  {reason}" for name, reason in found.items()))
    return found


def reasons(model: nn.Module, mode: ProjectionMode) -> dict[str, str]:
    """For every parameter of a network "quantized", or the reason why it is not."""
    layers, refused = {}, {}  # the weights of both, in the network's order: their identities, or names
    for name, parameter in walk(model):
        if isinstance(parameter, str):
            refused[name] = parameter
        layers.setdefault(name if isinstance(parameter, str) else id(parameter), name)
    if refused:  # then select() raises
        ends = int(mode.quantizer.spares_ends)
        selected = set([*layers][ends : len(layers) - ends])
    else:
        selected = {id(parameter) for _, parameter in mode.select(model)}
    asking = [name + "." if name else "" for name, module in model.named_modules() if decides_itself(module)]
    found = {}
    for prefix, module in model.named_modules():
        for own, parameter in module.named_parameters(prefix=prefix, recurse=False):
            layer = type(module).__name__
            if id(parameter) in selected and (parameter.requires_grad or hasattr(parameter, FROZEN_BY)):
                reason = "quantized"
            elif not parameter.requires_grad and id(parameter) in layers:
                reason = "left as it is: requires_grad is False"
            elif id(parameter) in layers:
                reason = f"in full precision: the first or last of the layers that can be quantized, which {mode.name} spares"
            elif any(own.startswith(one) for one in asking):
                reason = "in full precision: the network says so (its method quantizable())"
            elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                reason = "in full precision: an embedding is quantized only where asked, quantizable_layers(model, embeddings=True)"
            elif own.rpartition(".")[2].startswith("bias") or own.endswith("_bias"):
                reason = "in full precision: a bias"
            else:
                reason = f"in full precision: {layer} is none of the layers that are known to multiply with weights"
            found[own] = reason
    for name, reason in refused.items():
        found[name] = f"refused: {reason}"
    return found
