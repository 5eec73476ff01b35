"""Two processes that split the heads generate and embed what one process does.

tests/distributed/test_meshes.py shows the same of training.
"""

import contextlib
import io
import os
import sys
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sample
from nanods.attention import AttentionConfig
from nanods.distributed.process_groups import ProcessGroups
from nanods.distributed.tensor_parallel import all_reduced_numbers, split_heads
from nanods.errors import UserError
from nanods.gpt import GPT, GPTConfig
from nanods.moe import MoEConfig
from nanods.quantize import quantize
from tests.distributed.processes import forkserver, free_port
from tests.test_multimodal import MOE_TRUNK, make_inputs, make_model

V0 = GPTConfig(
    vocab_size=20, context_length=12, n_layer=2, n_head=2, n_embd=8,
    attention=AttentionConfig("dense"),
)  # fmt: skip
V1 = replace(V0, attention=AttentionConfig("block", block_size=4, top_blocks=1))
MODELS = {
    "V0": V0,
    "V1": replace(V1, attention=replace(V1.attention, method="tile")),
    "V2": replace(V1, moe=MoEConfig(n_expert=4)),
}
PROMPTS = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([5, 3, 4])
NEW = 10  # tokens of each row: more than fit in the context, so that it is read again


def make_gpt(config):
    torch.manual_seed(0)
    model = GPT(config).double()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def generated(model):
    return torch.stack(list(model.generate(PROMPTS, NEW, LENGTHS, top_k=12, seed=3)))


@torch.no_grad()
def decoded(model):
    """Return the logits of PROMPTS, and of four more tokens that are read one at a time."""
    cache = model.new_cache(len(PROMPTS))
    logits = [model(PROMPTS, cache, LENGTHS)[0]]
    for token in range(4):
        logits.append(model(torch.full((len(PROMPTS), 1), token), cache)[0])
    return torch.cat(logits, dim=1)[:, LENGTHS.min() :], cache


class Collectives(TorchDispatchMode):
    """Record the name and the size of what is communicated."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._opname
        is_communication = operation.namespace in ("_c10d_functional", "c10d")
        if is_communication and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            self.calls.append((name, args[0].numel()))
        return operation(*args, **(kwargs or {}))


def run_rank(rank, folder, port):
    """Compare every model with its copy that is split, and sample one by sample.py."""
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    stdout, processes, result = sys.stdout, ProcessGroups("tp=2"), {}
    for name, config in MODELS.items():
        whole = make_gpt(config)
        split = processes.shard_model(deepcopy(whole), torch.device("cpu"))
        with Collectives() as collectives:
            logits, cache = decoded(split)
        result[name] = {
            "error": (logits - decoded(whole)[0]).abs().max().item(),
            "same tokens": torch.equal(generated(split), generated(whole)),
            "heads": cache.keys[0].size(1),
            "last pass": collectives.calls[len(collectives.calls) * 4 // 5 :],
            "sizes": all_reduced_numbers(split.blocks),
        }
    whole, inputs = make_model(MOE_TRUNK).eval(), make_inputs()
    split = processes.shard_model(deepcopy(whole), torch.device("cpu"))
    with torch.no_grad():
        for name, x in inputs.items():
            difference = split.embed(name, x)[0] - whole.embed(name, x)[0]
            result[name] = difference.abs().max().item()
    processes.destroy()
    sys.stdout = stdout
    with contextlib.redirect_stdout(io.StringIO()) as output:
        sample.split_model(sample.Args("", device="cpu"), make_gpt(V0))
    result["printed"] = output.getvalue()
    torch.save(result, folder / f"{rank}.pt")
    os._exit(0)  # DTensor keeps its process groups, whose threads may outlive Python's own exit


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tp")
    forkserver()
    torch.multiprocessing.start_processes(
        run_rank, (folder, free_port()), 2, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_generate_the_tokens_of_one(results, name):
    """Also where rows have different lengths, and after the context was full and is read again."""
    for of_rank in results:
        result = of_rank[name]
        assert result["error"] < 1e-10 and result["same tokens"]
        assert result["heads"] == 1, "each process caches the keys and values of its own head"
        assert result["sizes"] == [8] * (2 if name == "V2" else 4)
        rows = len(PROMPTS)  # of one token each
        assert result["last pass"] == [("all_reduce", rows * size) for size in result["sizes"]]


@pytest.mark.parametrize("name", ["text", "image", "audio"])
def test_two_processes_embed_what_one_does(results, name):
    for of_rank in results:
        assert of_rank[name] < 1e-10


def test_the_bytes_of_a_token_are_printed_once(results):
    first, second = (of_rank["printed"] for of_rank in results)
    # 4 sums of 8 numbers in fp64; of a sum, each of two processes sends half there and half back.
    assert "2 processes, tp=2 (1/2 of the heads each), over gloo: a token sends 256 bytes" in first
    assert second == ""


def test_a_quantised_model_is_not_split():
    mesh = SimpleNamespace(size=lambda: 2)
    with pytest.raises(UserError, match="a rounded layer is not split"):
        split_heads(quantize(make_gpt(V0).float()), mesh)
