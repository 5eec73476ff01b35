"""The ladder of presets: each version is derived from the one before.

    V0 = a dense GPT    V1 = replace(V0, attention=...)    V2 = replace(V1, moe=...)
    V3 = replace(V2, multimodal=...)

From V0 to V2 one idea changes at a time (v2-tiny also has fewer steps). V3's examples are short, so
it has dense attention, and sizes of its own (V3_TRUNKS).

A preset is a version at a scale: `v0-tiny`, `v1-small`. tiny trains on a CPU in minutes; small is
GPT-2's size (124M parameters, and 38M in a head of its own; one GPU); base needs one node of GPUs;
full is the article's size, for hundreds of GPUs: plan it first (--plan). Every field is a flag
(command_line.py), has a type, and is saved in every checkpoint.
"""

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nanods.errors import UserError
from nanods.flags import check_ranges
from nanods.gpt import AttentionConfig, GPTConfig, MoEConfig
from nanods.multimodal import MultimodalConfig


def flatten(config: "Config") -> dict[str, object]:
    """Return the fields by the names of their flags: {"n-layer": 5, "attention.kind": "dense",
    "steps": 800, ...}."""
    flat = dataclasses.asdict(config)
    model = flat.pop("model")
    nested = {
        "attention": model.pop("attention"),
        "moe": model.pop("moe"),
        "multimodal": flat.pop("multimodal"),
    }
    flat |= model
    for part, fields in nested.items():
        flat |= {f"{part}.{name}": value for name, value in fields.items()}
    return {name.replace("_", "-"): value for name, value in flat.items()}


@dataclass(frozen=True)
class Config:
    preset: tyro.conf.Suppress[str]
    model: Annotated[GPTConfig, tyro.conf.arg(name="")]
    steps: int
    """Optimizer steps of the whole run."""
    batch_size: int
    """Sequences in one optimizer step, over all micro-batches and processes: batch-size x
    context-length tokens. V3: examples, each in all its modalities; the loss compares each with all
    others, so a larger batch is a harder question."""
    lr: float
    """Peak learning rate. Of Muon, for the matrices; AdamW, for embeddings and head, gets half of
    it. With --optimizer adamw, of AdamW: 0.003 if you do not set it."""
    warmup: float = 0.02
    """Share of the steps, the first ones, in which the learning rate rises from zero."""
    decay: float = 1.0
    """Share of the steps, the last ones, in which the learning rate falls to zero."""
    short_context: float = 0.0
    """V0 to V2 on text: for this share of the steps, from the start, each window is cut into
    `short_parts` shorter ones. Attention then costs less, and what a model learns first depends
    mostly on near tokens. 0: never."""
    short_parts: int = 2
    """Into how many parts --short-context cuts each window; must divide context-length."""
    sampling: Literal["random", "epochs"] = "random"
    """V0 to V2 on text: where the windows of a batch begin. epochs: each epoch reads the text once,
    but for up to 2 T - 1 tokens at its ends, in windows side by side from a random offset, in a
    random order (window_starts in nanods/data/shards.py). random: anywhere, so that as many tokens
    as the text has leave out a share of 1 / e of it. Token shards are always read in epochs."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: Muon for matrices, AdamW for the rest. adamw: AdamW for everything, with weight decay
    on matrices only."""
    momentum: float = 0.9
    """Share of Muon's momentum that each step keeps: it averages the gradients of about 1 / (1 -
    momentum) steps."""
    equal_neurons: bool = False
    """Muon: scale each neuron's update to the same length, so that no neuron learns faster than the
    others. A neuron is a row of the matrix, or a column if the matrix is wide (the MLP's second).
    After NorMuon, arXiv:2510.05491."""
    weight_decay: float = 0.2
    """Decoupled weight decay: each step multiplies every matrix by 1 - lr * weight_decay. Reduces
    overfitting."""
    multimodal: MultimodalConfig = field(default_factory=MultimodalConfig)
    clip: float = 1.0
    """Largest norm of the gradient; a longer gradient is scaled down to it."""
    micro_batch: int | None = None
    """Sequences in one forward and backward pass; must divide batch-size. Default: the most that
    should fit in memory. V3's loss compares the whole batch all the same, by gradient caching."""
    activation_checkpointing: bool = False
    """Keep only each block's input and compute the rest again in backward: less memory, a third
    more arithmetic."""
    expert_optimizer: Literal["adamw", "muon"] = "muon"
    """Optimizer of the experts' matrices (V2) where --optimizer is muon."""
    expert_lr: float = 0.02
    """Peak learning rate of the experts. AdamW needs a tenth of Muon's or less."""
    expert_every: int = 4
    """Muon updates each stack of experts at every n-th step only, with n times the rate, since it
    takes longer than the rest of a step."""
    init_from: str | None = None
    """A run whose last weights to start from. The MLPs of a dense run of the same sizes become
    experts (upcycling)."""
    init_noise: float = 0.0
    """Upcycling: noise on each expert's copy, in multiples of the weights' root mean square."""
    stage: Literal["pretrain", "finetune"] = "pretrain"
    """finetune: go on from --init-from with other defaults: a quarter of the preset's steps and
    learning rates, --out-dir runs/PRESET-finetuned, and for V0 to V2 --data instructions."""
    mix: str | None = None
    """Instructions: how often each task is drawn for a row of a batch, as TASK=WEIGHT between
    commas, such as doctest=0.99,plain=0.01. Default: all tasks alike."""
    ewc: str | None = None
    """Elastic Weight Consolidation: a run whose task the model must not forget. Its weights are
    held near their values where that task needs them (nanods/ewc.py), and are what the run starts
    from unless you give --init-from."""
    ewc_lambda: float = 0.3
    """Strength of --ewc: the loss gains half of it times the sum of F (w - w_old)^2. F is summed
    over the positions of a sequence; make bench-adapt compares strengths."""
    ewc_fisher: Literal["sampled", "data", "batch", "none"] = "sampled"
    """F of --ewc. sampled: the Fisher information, with labels sampled from the model. data: with
    the labels of the data. batch: the squared gradients of batches, a common mistake. none: 1, an
    L2 penalty towards the old weights."""
    ewc_sequences: int = 512
    """Sequences of the other run's data from which F is computed."""
    quantize: Literal["off", "int8", "int4", "int2"] = "off"
    """Quantisation-aware training: round the weights to 8, 4 or 2 bits and the activations to 8, so
    that the model learns to do well when it is rounded (nanods/quantize.py)."""
    quantize_from: int = 0
    """The first step that rounds, counted from 0."""
    teacher: str | None = None
    """A finished run, or its preset, to learn from beside the data: distillation
    (nanods/training/distill.py)."""
    distill_weight: float = 0.5
    """Share of the distance to the teacher in the loss; the task's own loss has the rest. 0: the
    teacher is not used."""
    distill_temperature: float = 2.0
    """What divides the logits of teacher and student before they are compared; of V3, the cosines
    of the embeddings of two examples."""
    distill_cosine: float = 1.0
    """V3: weight of 1 - cosine of each embedding and the teacher's, beside the relations of the
    batch, whose weight is 1."""
    data: str = "pydocs"
    """pydocs, pydocs-train, instructions, shakespeare, wikitext-2, wikitext-103, fineweb-edu, or
    the path of a UTF-8 text, of a .jsonl, .csv or .parquet file, or of a folder of these. V3:
    scenes, emoji, or a folder of captioned images or sounds (docs/DATA.md)."""
    val_data: str | None = None
    """A file or a folder of texts, for V3 a folder of captioned images or sounds, for validation;
    all of --data is then trained on. Default: the validation split of the data set, else a part of
    --data."""
    val_fraction: float = 0.1
    """V0 to V2: share of --data held out for validation, if it has no validation split; of folders
    and tables about 1 MB at most."""
    eval_tokens: int = 1_200_000
    """V0 to V2: validation tokens that an evaluation reads at most, in windows spread evenly over
    the validation text."""
    out_dir: Path | None = None
    """Where checkpoints, metrics and pictures go. Default: runs/PRESET."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute. auto: the first of cuda, mps and cpu that this machine has."""
    dtype: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = "auto"
    """Precision of the computation. auto: bf16 where the GPU or the CPU gains from it, else
    fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile. auto: on CUDA only; on a CPU it takes longer than it saves."""
    seed: int = 0
    """Decides the initial weights and the order of the data."""
    eval_every: int = 250
    """Steps between two evaluations."""
    save_every: int = 250
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep, besides the best one."""
    tensorboard: bool = False
    """Also write the metrics and pictures as TensorBoard event files into out-dir (the extra
    tensorboard)."""
    mesh: str | None = None
    """How several processes split the work: dp=2, ep=2, fsdp=2, tp=2 (nanods/distributed/mesh.py).
    Default: dp where a whole step fits in each process's memory, else fsdp."""
    resume: bool = False
    """Continue from the last checkpoint in out-dir, with the configuration saved there."""

    def __post_init__(self) -> None:
        check_ranges(flatten(self))
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(
                f"--micro-batch {self.micro_batch} does not divide --batch-size {self.batch_size}: "
                "choose a divisor"
            )

        if self.short_context and self.model.context_length % self.short_parts:
            raise ValueError(
                f"--short-parts {self.short_parts} does not divide --context-length "
                f"{self.model.context_length}: choose a divisor"
            )

    @property
    def run_dir(self) -> Path:
        return self.out_dir or Path("runs") / self.preset

    def weight_bits(self, step: int) -> int | None:
        """Return the bits of the weights in a step of quantisation-aware training; None before it
        begins, and without it."""
        if self.quantize == "off" or step < self.quantize_from:
            return None
        return int(self.quantize.removeprefix("int"))


# The convolution was measured at tiny sizes alone (LOG.md).
TINY = GPTConfig(n_layer=4, n_head=6, n_embd=192, context_length=256, vocab_size=256, conv_width=4)
SMALL = GPTConfig(n_layer=12, n_head=12, n_embd=768, context_length=1024, vocab_size=50304)
BASE = GPTConfig(n_layer=24, n_head=16, n_embd=2048, context_length=4096, vocab_size=50304)
# The article's V2 has 100B parameters, 10B of them active. With its 16 experts and top-2 routing
# that is impossible: a block has 132 C^2 parameters and uses 20 C^2 (F = 4C). v2-full is the
# nearest, 96B and 14.7B; 24 experts give 96.2B and 10.0B: v2-full --n-layer 23 --moe.n-expert 24.
# The article's V1, "a third of BERT-large's" 340M, has the size of v1-small. v1-full is the dense
# trunk of 9.1B from which v2-full can start (--init-from).
FULL = GPTConfig(n_layer=34, n_head=36, n_embd=4608, context_length=4096, vocab_size=50304)

V0 = {
    "tiny": Config("v0-tiny", TINY, steps=1200, batch_size=8, lr=0.02),
    "small": Config("v0-small", SMALL, steps=20_000, batch_size=480, lr=0.02, data="wikitext-103"),
    "base": Config("v0-base", BASE, steps=50_000, batch_size=256, lr=0.02, data="wikitext-103"),
    # 100B tokens, if the data set had as many.
    "full": Config("v0-full", FULL, steps=24_000, batch_size=1024, lr=0.02, data="wikitext-103"),
}
V0 = {scale: replace(config, sampling="epochs") for scale, config in V0.items()}
V1_ATTENTION = {
    "tiny": AttentionConfig("block", block_size=16, top_blocks=2),
    "small": AttentionConfig("block", block_size=128, top_blocks=2, method="tile"),
    "base": AttentionConfig("block", block_size=128, top_blocks=4, method="tile"),
    "full": AttentionConfig("block", block_size=128, top_blocks=4, method="tile"),
}
V1 = {
    scale: replace(v0, preset=f"v1-{scale}", model=replace(v0.model, attention=V1_ATTENTION[scale]))
    for scale, v0 in V0.items()
}
V2_MOE = {scale: MoEConfig(n_expert=16, top_k=2) for scale in V1}
V2 = {
    scale: replace(v1, preset=f"v2-{scale}", model=replace(v1.model, moe=V2_MOE[scale]))
    for scale, v1 in V1.items()
}
V2["tiny"] = replace(V2["tiny"], steps=900)  # fewer than V1, since a token costs more

# V3's examples are short, so its attention is dense: at tiny size an image has 64 tokens, a sound
# 16, the caption of a scene 13. There it also has plain MLPs: 16 experts gain little over more
# steps in the same time (LOG.md).
# The small and base sizes are CLIP's ViT-B/16 and ViT-L/14, one trunk instead of two towers, with
# V2's experts, for captioned images such as COCO's.
MODALITY_CONFIGS = {
    "tiny": MultimodalConfig(("text", "image", "audio")),
    "small": MultimodalConfig(
        ("text", "image"), width=512, image_size=224, patch_size=16, entropy_coefficient=0.02
    ),
    "base": MultimodalConfig(
        ("text", "image"), width=768, image_size=336, patch_size=14, entropy_coefficient=0.02
    ),
    "full": MultimodalConfig(
        ("text", "image"), width=1024, image_size=336, patch_size=14, entropy_coefficient=0.02
    ),
}
V3_TRUNKS = {
    "tiny": {
        "n_layer": 3,
        "n_head": 4,
        "n_embd": 128,
        "vocab_size": 384,  # a BPE: a quarter as many tokens as bytes (LOG.md)
        "context_length": 80,
        "conv_width": 1,
        "moe": MoEConfig(n_expert=1),
    },
    "small": {"context_length": 80, "vocab_size": 16_384},
    "base": {"n_layer": 24, "n_embd": 1024, "context_length": 80, "vocab_size": 16_384},
    "full": {"context_length": 80, "vocab_size": 16_384},
}
V3 = {
    scale: replace(
        v2,
        preset=f"v3-{scale}",
        model=replace(v2.model, attention=AttentionConfig("dense"), **V3_TRUNKS[scale]),
        multimodal=MODALITY_CONFIGS[scale],
        distill_temperature=0.1,
        data="scenes" if scale == "tiny" else "data/coco",
    )
    for scale, v2 in V2.items()
}
V3["tiny"] = replace(
    V3["tiny"],
    steps=780,
    batch_size=128,
    lr=0.03,
    equal_neurons=True,
    weight_decay=0.0,
    eval_every=100,
    save_every=100,
)
# v3-tiny for real drawings and spoken names, which last up to 1.5 s (nanods/data/emoji.py).
V3["emoji"] = replace(
    V3["tiny"],
    preset="v3-emoji",
    # v3-tiny's faster settings were not tried on emoji. Bytes: letters spell what a voice says.
    model=replace(V3["tiny"].model, vocab_size=256),
    lr=0.02,
    equal_neurons=False,
    steps=1200,
    data="emoji",
    multimodal=replace(MODALITY_CONFIGS["tiny"], frames=48),
)
V3["small"] = replace(V3["small"], steps=12_000, batch_size=1024)
V3["base"] = replace(V3["base"], steps=12_000, batch_size=4096)
V3["full"] = replace(V3["full"], steps=50_000, batch_size=4096)

PRESETS = {config.preset: config for version in (V0, V1, V2, V3) for config in version.values()}


# ---- in checkpoints ------------------------------------------------------------------------------


def to_dict(config: Config) -> dict:
    """Return a configuration as JSON values, without the fields that belong to one start of the
    run."""
    saved = dataclasses.asdict(config)
    saved["out_dir"] = None  # a run directory may be moved
    saved["resume"] = False
    return saved


def from_dict(saved: dict) -> Config:
    """Do the inverse of `to_dict`. Raises UserError for an unknown field, or if one without a
    default is missing, as in a checkpoint of another version."""
    try:
        model = dict(saved["model"])
        model["attention"] = AttentionConfig(**model["attention"])
        model["moe"] = MoEConfig(**model["moe"])
        multimodal = {}
        for name, value in saved["multimodal"].items():
            multimodal[name] = tuple(value) if isinstance(value, list) else value
        return Config(
            **{
                **saved,
                "model": GPTConfig(**model),
                "multimodal": MultimodalConfig(**multimodal),
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the saved configuration cannot be read ({error}): was it saved by another version?"
        ) from None
