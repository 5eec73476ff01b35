"""Start a run from the weights of another one; a dense run's MLPs become experts (upcycling)."""

from pathlib import Path

from torch import nn

from nanods.config import Config, flatten, from_dict
from nanods.errors import UserError
from nanods.moe import upcycle
from nanods.training import checkpoint

TRUNK_FIELDS = (
    "n-layer",
    "n-head",
    "n-embd",
    "hidden-ratio",
    "conv-width",
    "vocab-size",
    "rope-base",
    "query-gain",
)
"""Fields of GPTConfig that must be those of the other run."""
MAY_DIFFER = ("pairs", "temperature", "hard-batches", "entropy-coefficient", "min-experts")
"""Fields of MultimodalConfig that need not match: those of the loss and of the batches."""


def warm_start(config: Config, model: nn.Module, tokenizer: str) -> str:
    """Load the last weights of the run `config.init_from` into `model`. Returns what was done, and
    which settings have changed, in words.

    Where the run has plain MLPs and the model has experts, each MLP is copied to all experts of its
    layer; the routers' gates keep their own initialisation. Raises UserError where sizes, tokenizer
    or number of experts do not fit.
    """
    path = Path(config.init_from)
    saved = checkpoint.load(path)
    checkpoint.require_floats(saved)
    source = from_dict(saved.state["config"])
    check_sizes(config, source, f"--init-from {path}")
    if saved.state["tokenizer"] != tokenizer:
        raise UserError(
            f"--init-from {path}: that run has another tokenizer; start from one that was "
            f"trained on --data {config.data}"
        )
    weights, done = saved.model, f"from {saved.path}"
    source_experts, n_expert = source.model.moe.n_expert, config.model.moe.n_expert
    if source_experts == 1 and n_expert > 1:
        if not config.model.moe.normalise:
            raise UserError(
                "--init-from: copies of one MLP give its output back only if the expert weights "
                "sum to 1; drop --moe.no-normalise"
            )
        weights = upcycle(weights, n_expert, config.init_noise, config.seed)
        initial = model.state_dict()
        new_names = initial.keys() - weights.keys()  # the gates and their biases
        weights |= {name: initial[name] for name in new_names}
        done += f", each MLP copied to {n_expert} experts (noise {config.init_noise:g})"
    elif source_experts != n_expert:
        raise UserError(
            f"--init-from {path}: that run has {source_experts} experts, asked for: {n_expert}; "
            f"take a dense run, or --moe.n-expert {source_experts}"
        )
    checkpoint.restore_model(model, weights, saved.path)
    if changed := changed_settings(config, source):
        done += f"\nnotice     that run had {changed}: the same weights give other outputs now"
    return done


def changed_settings(config: Config, source: Config) -> str:
    """Return in which settings of attention and routing, which no weight's size shows, the run of
    configuration `source` differs from `config`, in words; "" if in none."""
    has, wants = flatten(source), flatten(config)
    fields = []
    if {source.model.attention.kind, config.model.attention.kind} != {"dense"}:
        fields += [name for name in wants if name.startswith("attention.")]
    if source.model.moe.n_expert > 1:
        fields += ["moe.top-k", "moe.normalise", "moe.scores"]
        if (source.model.moe.bias_rate == 0) != (config.model.moe.bias_rate == 0):
            fields.append("moe.bias-rate")
    changed = [
        f"{name} {has[name]} (now {wants[name]})" for name in fields if has[name] != wants[name]
    ]
    return ", ".join(changed)


def check_sizes(config: Config, source: Config, named_by: str) -> None:
    """Raise UserError if the run that a flag names, of configuration `source`, has other sizes than
    `config`."""
    has, wants = flatten(source), flatten(config)
    must_match = list(TRUNK_FIELDS)
    for name in wants:
        if name.startswith("multimodal.") and name.split(".")[1] not in MAY_DIFFER:
            must_match.append(name)
    different = []
    for name in must_match:
        if has[name] != wants[name]:
            different.append(f"--{name} {has[name]} (asked for: {wants[name]})")
    if different:
        raise UserError(
            f"{named_by}: that run has {', '.join(different)}. Its weights fit only a "
            "model of the same sizes: ask for those, or train another run first"
        )
