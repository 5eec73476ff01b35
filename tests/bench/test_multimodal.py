"""V3's bench: prompts that differ in one fact, their accuracy, variants, the summary over seeds."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import one_hot

from nanods.bench.multimodal import VARIANTS, accuracy, fact_accuracy, replace_fact, summary
from nanods.bench.runs import flags_from_dict
from nanods.command_line import from_command_line
from nanods.config import PRESETS
from nanods.data import scenes
from nanods.training.contrastive_task import ContrastiveTask
from tests.data.decoders import decode_caption


def test_replace_fact_gives_each_value_of_one_fact():
    facts = [0, 3, 1, 0, 2, 3, 1]  # a large green circle left of a large green triangle
    # Not shape 2, a triangle: the two objects would be equal.
    assert [scene[0] for scene in replace_fact(facts, 0)] == [0, 1, 3, 4, 5]
    assert [scene[1] for scene in replace_fact(facts, 1)] == list(range(8))
    assert [scene[3] for scene in replace_fact(facts, 3)] == [0, 1, 2, 3]
    for column in (0, 1, 2, 3):
        for scene in replace_fact(facts, column):
            assert [a == b for a, b in zip(scene, facts, strict=True)].count(False) <= 1


def test_accuracy_counts_embeddings_whose_nearest_prompt_is_the_true_one():
    candidates, labels = [["a", "b"], ["c", "d", "e"]], ["a", "e"]
    prompts = (torch.eye(2), torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5]]))
    embeddings = torch.tensor([[1.0, 0], [0, 1]])  # the second is nearest to "d"
    assert accuracy(embeddings, prompts, candidates, labels) == 0.5
    assert accuracy(torch.tensor([[0.0, 1], [0, 1]]), prompts, candidates, labels) == 0


class FactsModel(torch.nn.Module):
    """Embed the facts of a scene, except for the column `blind`.

    It reads the facts from captions; for images and audio it takes them from the gallery, in order.
    """

    def __init__(self, blind, tokenizer):
        super().__init__()
        self.blind, self.tokenizer = blind, tokenizer
        self.n_embedded = {"image": 0, "audio": 0}

    def forward(self, inputs):
        embeddings = {}
        for name, x in inputs.items():
            if name == "text":
                captions = [self.tokenizer.decode(row[row >= 0].tolist()) for row in x]
                facts = [decode_caption(caption) for caption in captions]
            else:
                start = self.n_embedded[name]
                facts = scenes.facts_of(scenes.gallery().ids[start : start + len(x)]).tolist()
                self.n_embedded[name] += len(x)
            embeddings[name] = torch.stack([self.embed(list(scene)) for scene in facts])
        return embeddings, {name: [{}] for name in inputs}

    def embed(self, scene):
        if scene[3] >= 2:  # "right of" and "below": swap the objects
            scene = [*scene[4:], scene[3] - 2, *scene[:3]]
        if self.blind is not None:
            scene[self.blind] = 0
        return torch.cat([one_hot(torch.tensor(value), 8).float() for value in scene])


@pytest.mark.parametrize("blind", [None, 1])
def test_fact_accuracy_is_1_for_facts_in_the_embedding_and_chance_for_others(blind):
    task = ContrastiveTask(PRESETS["v3-tiny"], torch.device("cpu"))
    task.gallery = scenes.gallery(64)
    result = fact_accuracy(task, FactsModel(blind, task.tokenizer))
    assert result.keys() == {"shape", "colour", "size", "relation"}
    assert result["shape"].keys() == {"image", "audio"}
    for fact, by_modality in result.items():
        assert by_modality["image"] == by_modality["audio"]
        if blind is None:
            assert by_modality["image"] == 1, fact
    if blind == 1:
        assert result["colour"]["image"] < 0.3 and result["size"]["image"] == 1


def test_the_command_line_accepts_each_variant():
    preset = replace(PRESETS["v3-tiny"], seed=3)
    for name, settings in VARIANTS.items():
        config = from_command_line("", ["v3-tiny", *flags_from_dict(settings | {"seed": 3})])
        assert config.seed == 3 and (config != preset) == (name != "as it is")
    separate = from_command_line("", ["v3-tiny", *flags_from_dict(VARIANTS["separate"])])
    assert not separate.multimodal.shared and separate.multimodal.hard_batches


def a_run(seed, machine="A"):
    facts = {"shape": {"image": 0.1 * seed}}
    figures = {"val_recall1": 0.5 + seed, "cpu_seconds": 9.0, "facts": facts}
    return {"seed": seed, "machine": machine, "command": "x"} | figures


def test_the_summary_keeps_every_seed():
    table = summary([a_run(0), a_run(1)])
    assert table["val_recall1"] == {"mean": 1.0, "each": [0.5, 1.5]}
    assert table["facts"]["shape"]["image"]["each"] == [0, 0.1]
    assert table["cpu_seconds"]["mean"] == 9
    assert "seed" not in table and "command" not in table


def test_the_times_of_two_machines_have_no_mean():
    table = summary([a_run(0), a_run(1, "B")])
    assert "val_recall1" in table and "cpu_seconds" not in table
