"""Knowledge distillation: a small model, the student, learns from a finished one, the teacher.

The data say which answer is right. A teacher also says how likely every other answer is, so each
example teaches more (Hinton, Vinyals & Dean 2015, arXiv:1503.02531). The student minimises

    (1 - w) x the loss of its own task + w x its distance to the teacher      (w: --distill-weight)

    logit_loss       V0 to V2: the teacher's probabilities of the next token, at a temperature T
                     (Hinton et al.)
    cosine_loss      V3: the direction of each embedding, through a linear projection where the
                     widths differ (Romero et al. 2015, arXiv:1412.6550)
    relation_loss    V3: how similar each example is to each other one of the batch. It compares
                     similarities and no coordinates, so the widths do not matter (relational
                     distillation: Park et al. 2019, arXiv:1904.05068; for images: MobileCLIP,
                     Vasu et al. 2024, arXiv:2311.17049, and CLIP-KD, Yang et al. 2024,
                     arXiv:2307.12732)
    embedding_loss   the last two, over all modalities and pairs of them
    mix              the two losses in one
    Teacher          the finished model, which reads each batch of the student

The student runs once per step: both losses are computed from its one forward pass. The relation
compares all examples of the batch, as the contrastive loss does. So V3's task computes both where
the whole batch is: gathered from all processes, and in front of gradient caching
(nanods/training/contrastive_task.py).

The projection is trained with the student but is no part of it: nothing needs it once training is
over. Its weights are stored beside the optimizers' state, which a resumed run reads and sample.py
does not (nanods/training/checkpoint.py).

Left out on purpose: hidden layers and attention maps as targets, which tie the student to the
teacher's depth; teachers that are trained at the same time; storing the teacher's answers for the
whole data set, as MobileCLIP does, which would save its forward pass at every step.
nanods/training/teacher.py loads a teacher and checks that it fits.

Pinned by tests/training/test_distill.py: each loss equals its definition, written out in loops;
gradients with micro-batches and by two processes are those of the whole batch.

Shapes: B examples of the whole batch, R rows of it (of one process), T tokens, V vocabulary, M
width of the student's space, D of the teacher's.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanods.config import Config
from nanods.contrastive import promote_dtype, rows_of_present, split_batch

PROJECTION = "projection"  # the name in the student of its map to the teacher's space


def mix(own: Tensor, distance: Tensor, weight: float) -> Tensor:
    """Return (1 - weight) x own + weight x distance."""
    return (1 - weight) * own + weight * distance


# ---- language models -----------------------------------------------------------------------------


def logit_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) of the next token, in nats, the mean over all tokens.

    student, teacher: logits (B, T, V). Both are divided by the temperature before the softmax: a
    higher one shows more of the unlikely tokens. The gradient at a logit is T (q - p) for the
    probabilities p of the teacher and q of the student, and q - p shrinks as 1 / T: with the factor
    T^2 the weight of this loss means the same at every temperature. 0 if both agree.
    """
    student, teacher = promote_dtype(student, teacher)
    log_q = F.log_softmax(student.flatten(0, 1) / temperature, dim=-1)  # (B T, V)
    log_p = F.log_softmax(teacher.flatten(0, 1) / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


# ---- contrastive models --------------------------------------------------------------------------


def cosine_loss(
    student: Tensor,
    teacher: Tensor,
    projection: Tensor | None = None,
    rows: slice = slice(None),
    present: Tensor | None = None,
) -> Tensor:
    """Return 1 - cosine of each embedding and its teacher's: (B, M), (B, D) -> (), from 0 to 2.

    `projection` (D, M) maps the student's embeddings to the teacher's space. The mean is over
    `rows`, and of these over the examples that have the modality, `present` (B,) bool. It is scaled
    so that the mean over equal parts of the rows is the mean over all present examples.
    """
    student, teacher = promote_dtype(student[rows], teacher[rows])
    with torch.autocast(student.device.type, enabled=False):
        if projection is not None:
            student = F.linear(student, projection.to(student.dtype))
        distance = 1 - F.cosine_similarity(student, teacher, dim=-1)  # (R,)
        if present is None:
            return distance.mean()
        share = max(1, int(present.sum())) / len(present)
        return (distance * present[rows]).mean() / share


def relation_loss(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    temperature: float,
    rows: slice = slice(None),
    present: Tensor | None = None,
) -> Tensor:
    """Return KL(teacher || student) of which examples each one resembles, in nats, the mean over
    `rows`.

    student: embeddings of two modalities, each (B, M); teacher: each (B, D). Row i of a modality
    gives a distribution over the B examples of the other one: the softmax of its cosines, divided
    by the temperature, which is the same for both models. It is fixed: a student that could learn
    it would match the teacher by changing it alone. Both directions count alike. There is no factor
    T^2, since the contrastive loss, with which this is mixed, has a temperature of about that size.

    `present` (B,) bool leaves the other examples out, as in nanods/contrastive.py: 0 where fewer
    than two are left, and scaled so that the mean over equal parts of the rows is the whole mean.
    """
    if present is not None:
        present_rows, factor = rows_of_present(present, rows)
        if factor == 0:
            return 0 * sum(e.sum() for e in student)
        student, teacher = (tuple(e[present] for e in pair) for pair in (student, teacher))
        return factor * relation_loss(student, teacher, temperature, present_rows)
    student, teacher = promote_dtype(*student), promote_dtype(*teacher)
    total = 0
    with torch.autocast(student[0].device.type, enabled=False):
        for i, j in ((0, 1), (1, 0)):
            log_q = F.log_softmax(student[i][rows] @ student[j].T / temperature, dim=-1)  # (R, B)
            log_p = F.log_softmax(teacher[i][rows] @ teacher[j].T / temperature, dim=-1)
            total = total + F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return total / 2


def embedding_loss(
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
    pairs: dict[tuple[str, str], float],
    config: Config,
    projection: Tensor | None = None,
    rows: slice = slice(None),
    present: dict[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the relation's loss + --distill-cosine x the cosine's, and both as metrics.

    student: (B, M) by modality; teacher: (B, D); pairs: a weight for each pair of modalities, of
    whose relation losses this is the weighted mean; the cosine's is the mean over the modalities.
    """
    has = present or dict.fromkeys(student)
    relation, temperature = 0, config.distill_temperature
    for (a, b), weight in pairs.items():
        both = has[a] & has[b] if present else None
        models = ((model[a], model[b]) for model in (student, teacher))
        relation = relation + weight * relation_loss(*models, temperature, rows, both)
    loss = relation = relation / sum(pairs.values())
    metrics = {"relation_loss": relation.detach()}
    if config.distill_cosine:
        each = [cosine_loss(e, teacher[a], projection, rows, has[a]) for a, e in student.items()]
        cosine = torch.stack(each).mean()
        loss = relation + config.distill_cosine * cosine
        metrics["cosine_loss"] = cosine.detach()
    return loss, metrics


def add_projection(model: nn.Module, M: int, D: int, seed: int) -> None:
    """Give a student of width M a linear map to a teacher's space of width D, in place.

    It draws from a random stream of its own, so the student starts as it would without a teacher.
    """
    weight = torch.randn(D, M, generator=torch.Generator().manual_seed(seed)) * M**-0.5
    layer = nn.Linear(M, D, bias=False, device="meta")  # which draws nothing
    layer.weight = nn.Parameter(weight.to(next(model.parameters())))
    setattr(model, PROJECTION, layer)


def projection_of(model: nn.Module) -> Tensor | None:
    """Return the weight (D, M) of a student's projection, None if it has none."""
    layer = getattr(model, PROJECTION, None)
    return None if layer is None else layer.weight


# ---- the teacher ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Teacher:
    """A finished model in eval mode, without gradients: no expert drops a token."""

    model: nn.Module
    config: Config
    path: Path
    """The checkpoint."""
    state: dict
    """What its state.json holds."""
    sha256: str
    """Of its weights. Stored with the student, whose run resumes with the same teacher only."""

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next tokens: (B, T) -> (B, T, V)."""
        return self.model(tokens)[0]

    @torch.no_grad()
    def embeddings(self, inputs: dict[str, Tensor], size: int) -> dict[str, Tensor]:
        """Return the embeddings (B, D) by modality, computed `size` examples at a time."""
        parts = [self.model(part)[0] for part in split_batch(inputs, size)]
        return {name: torch.cat([part[name] for part in parts]) for name in inputs}
