"""Which presets fit on which hardware: to train, and to serve.

Pinned by tests/planner/test_plan.py.
"""

from nanods.config import PRESETS, Config
from nanods.planner.hardware import GPUS, Device
from nanods.planner.memory import ModelCost, activation_bytes, step_config
from nanods.planner.search import best_per_kind, make_job, preference

REFERENCE_HARDWARE = (
    "1 x v100-32gb",
    "1 x rtx4090-24gb",
    "1 x h100-80gb",
    "8 x a100-80gb",
    "16 x a100-80gb",
    "8 x h200-141gb",
)


def cache_bytes(config: Config) -> int:
    """Return the bytes of one sequence's cache at full context, in bf16 (nanods/cache.py).

    V3 keeps no cache.
    """
    m, attention = config.model, config.model.attention
    if config.multimodal.modalities:
        return 0
    recent = 2 * m.n_embd * (m.conv_width - 1)  # inputs that the convolution keeps
    if attention.kind != "block":
        return m.n_layer * (4 * m.n_embd * m.context_length + recent)  # keys and values
    N = -(-m.context_length // attention.block_size)  # blocks; the cache holds whole ones
    keys_and_values = 4 * m.n_embd * N * attention.block_size
    summaries = N * (2 if attention.pool == "bound" else 1) * m.n_embd * 2
    selections = N * m.n_head * attention.top_blocks * 8  # a tile's selection, in int64
    return m.n_layer * (keys_and_values + summaries + selections + recent)


def served_sequences(config: Config, cost: ModelCost, device: Device, gpus: int) -> int:
    """Return how many sequences of full context (V3: examples) are served at a time.

    The GPUs share bf16 weights. 0 if the weights do not fit.
    """
    free = gpus * device.usable_memory - 2 * cost.total
    per_sequence = cache_bytes(config)
    if not per_sequence:
        per_sequence = activation_bytes(config, cost, step_config(config, device.kind, 1))
    return max(0, int(free // per_sequence))


def capacity_table(hardware: tuple[str, ...] = REFERENCE_HARDWARE) -> list[dict[str, str]]:
    """Return for each preset of V1 to V3, from small on, how it trains and serves on some hardware.

    A cell is "kind of mesh / sequences": "dp / 120" is trained with dp and serves 120 at a time.
    On one GPU "yes" stands for the mesh, and "no" if training does not fit.
    """
    rows = []
    for name, config in PRESETS.items():
        if name.startswith("v0") or name.endswith(("tiny", "emoji")):
            continue
        row = {"preset": name}
        for words in hardware:
            number, gpu = words.split(" x ")
            job = make_job(config, GPUS[gpu], int(number))
            fitting = [c for c in best_per_kind(job)[0].values() if c.fits]
            if not fitting:
                trains = "no"
            elif job.gpus == 1:
                trains = "yes"
            else:
                trains = min(fitting, key=preference).mesh.kind
            serves = served_sequences(config, job.cost, job.device, job.gpus)
            row[words] = f"{trains} / {serves:,}"
        rows.append(row)
    return rows
