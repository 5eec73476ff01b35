"""V3's bench: prompts that differ in one fact, and what counts as right."""

from dataclasses import replace

import pytest
import torch

from nanods.bench.multimodal import VARIANTS, accuracy, fact_accuracy, flags, replace_fact, summary
from nanods.config import PRESETS, from_command_line
from nanods.data import scenes
from nanods.training.contrastive_task import ContrastiveTask
from tests.data.decoders import read_caption


def test_one_fact_is_replaced_by_each_of_its_values():
    told = [0, 3, 1, 0, 2, 3, 1]  # a large green circle left of a large green triangle
    assert [scene[0] for scene in replace_fact(told, 0)] == [
        0,
        1,
        3,
        4,
        5,
    ]  # not by a triangle: the two would be alike
    assert [scene[1] for scene in replace_fact(told, 1)] == list(range(8))
    assert [scene[3] for scene in replace_fact(told, 3)] == [0, 1, 2, 3]
    for column in (0, 1, 2, 3):
        for scene in replace_fact(told, column):
            assert [a == b for a, b in zip(scene, told, strict=True)].count(False) <= 1


def test_an_item_is_right_where_its_own_prompt_is_nearest():
    choices, told = [["a", "b"], ["c", "d", "e"]], ["a", "e"]
    prompts = (torch.eye(2), torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5]]))
    assert (
        accuracy(torch.tensor([[1.0, 0], [0, 1]]), prompts, choices, told) == 0.5
    )  # the second is nearest to "d"
    assert accuracy(torch.tensor([[0.0, 1], [0, 1]]), prompts, choices, told) == 0


class Reader(torch.nn.Module):
    """Embeds what the scene is, but for one fact, which it does not see: texts by reading them, images by their number."""

    def __init__(self, blind):
        super().__init__()
        self.blind, self.seen = blind, {"image": 0, "audio": 0}

    def forward(self, inputs):
        made = {}
        for name, x in inputs.items():
            if name == "text":
                told = [read_caption(bytes(int(b) for b in row if b >= 0).decode()) for row in x]
            else:
                start = self.seen[name]
                told = scenes.facts_of(scenes.gallery().ids[start : start + len(x)]).tolist()
                self.seen[name] += len(x)
            made[name] = torch.stack([self.embed(list(scene)) for scene in told])
        return made, {name: [{}] for name in inputs}

    def embed(self, scene):
        if scene[3] >= 2:
            scene = [*scene[4:], scene[3] - 2, *scene[:3]]
        if self.blind is not None:
            scene[self.blind] = 0
        return torch.cat(
            [torch.nn.functional.one_hot(torch.tensor(value), 8).float() for value in scene]
        )


@pytest.mark.parametrize("blind", [None, 1])
def test_who_sees_a_fact_is_right_and_who_does_not_guesses(blind):
    task = ContrastiveTask(PRESETS["v3-tiny"], torch.device("cpu"))
    task.gallery = scenes.gallery(64)
    right = fact_accuracy(task, Reader(blind))
    assert right.keys() == {"shape", "colour", "size", "relation"} and right["shape"].keys() == {
        "image",
        "audio",
    }
    for fact, by in right.items():
        assert by["image"] == by["audio"]
        if blind is None:
            assert by["image"] == 1, fact
    if blind == 1:
        assert right["colour"]["image"] < 0.3 and right["size"]["image"] == 1


def test_each_variant_is_what_the_command_line_takes():
    for name, settings in VARIANTS.items():
        config = from_command_line("", ["v3-tiny", *flags(settings | {"seed": 3})])
        assert config.seed == 3 and (config != replace(PRESETS["v3-tiny"], seed=3)) == (
            name != "as it is"
        )
    separate = from_command_line("", ["v3-tiny", *flags(VARIANTS["separate"])])
    assert not separate.multimodal.shared and separate.multimodal.hard_batches


def test_the_summary_keeps_every_seed():
    runs = [
        {"seed": s, "val_recall1": 0.5 + s, "facts": {"shape": {"image": 0.1 * s}}, "command": "x"}
        for s in (0, 1)
    ]
    told = summary(runs)
    assert told["val_recall1"] == {"mean": 1.0, "each": [0.5, 1.5]} and told["facts"]["shape"][
        "image"
    ]["each"] == [0, 0.1]
    assert "seed" not in told and "command" not in told
