"""Processes hold what the planner computes of a sharded model, and gather it in the right dtype.

tests/distributed/test_meshes.py shows that the results are right.
"""

import json
import os

import pytest
import torch
from torch.distributed.tensor import DTensor

from nanods.build import build_meta_model, build_model
from nanods.command_line import from_command_line
from nanods.distributed.mesh import Mesh
from nanods.distributed.process_groups import ProcessGroups
from nanods.distributed.sharding import to_local
from nanods.planner.cost import parameters_per_gpu
from nanods.planner.memory import model_cost
from tests.distributed.processes import forkserver, free_port

SMALL = ["--n-layer", "2", "--n-embd", "16", "--n-head", "2", "--context-length", "32"]
MODELS = {"v1-tiny": ["v1-tiny", *SMALL], "v2-tiny": ["v2-tiny", *SMALL, "--moe.n-expert", "4"]}
MESHES = {
    4: [("v2-tiny", "fsdp=2,ep=2"), ("v2-tiny", "dp=2,ep=2"), ("v2-tiny", "fsdp=4")],
    2: [("v1-tiny", "tp=2"), ("v2-tiny", "tp=2"), ("v1-tiny", "fsdp=2"), ("v2-tiny", "ep=2")],
}
CASES = [(P, preset, mesh) for P, cases in MESHES.items() for preset, mesh in cases]


def run_rank(rank, folder, world_size, ports):
    """Shard the model of each case, check its weights, and write the number of local elements."""
    torch.set_num_threads(1)
    os.environ |= {
        "WORLD_SIZE": str(world_size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
    }
    local_sizes = {}
    for (preset, mesh), port in zip(MESHES[world_size], ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        config = from_command_line("", MODELS[preset])
        processes = ProcessGroups(mesh, config.model.moe.n_expert)
        torch.manual_seed(0)
        whole = build_model(config)
        if processes.is_main_process:
            model = build_model(config)
            model.load_state_dict(whole.state_dict())
        else:
            model = build_meta_model(config)
        model = processes.shard_model(model, torch.device("cpu"), torch.bfloat16)
        local_sizes[f"{preset} {mesh}"] = sum(to_local(p).numel() for p in model.parameters())
        check_weights(model, whole, has_ep="ep" in processes.mesh.axes)
        if processes.mesh.is_fsdp:
            check_dtypes(model)
        processes.destroy()
    (folder / f"sizes-{world_size}-{rank}.json").write_text(json.dumps(local_sizes))
    os._exit(0)  # DTensor keeps its process groups, whose threads may outlive Python's own exit


def check_weights(model, whole, has_ep):
    """Check that the weights of rank 0 have arrived on this process."""
    for name, p in model.named_parameters():
        expected = whole.get_parameter(name)
        if isinstance(p, DTensor):
            if not has_ep:
                assert torch.equal(p.detach().full_tensor(), expected)
        elif p.shape == expected.shape:
            assert torch.equal(p, expected)


def check_dtypes(model):
    """Check that a block computes in bf16, as under autocast, but its gate in fp32.

    All local weights and gradients stay in fp32.
    """
    block, dtypes = model.blocks[0], {}
    names = []
    for name in ("attention.query.weight", "mlp.up.weight", "mlp.up", "mlp.gate.weight"):
        if name in dict(block.named_parameters()):
            names.append(name)

    def record_dtypes(*_):
        for name in names:
            dtypes[name] = block.get_parameter(name).dtype

    block.mlp.register_forward_pre_hook(record_dtypes)
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = model(torch.zeros(1, 4, dtype=torch.long))
    logits.float().square().sum().backward()
    assert dtypes == {n: torch.float32 if "gate" in n else torch.bfloat16 for n in names}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@pytest.fixture(scope="module")
def local_sizes(tmp_path_factory):
    """Return the local elements of each case, by the number of processes and by rank."""
    folder, sizes = tmp_path_factory.mktemp("fsdp"), {}
    forkserver()
    for world_size, cases in MESHES.items():
        ports = [free_port() for _ in cases]
        torch.multiprocessing.start_processes(
            run_rank, (folder, world_size, ports), world_size, start_method="forkserver"
        )
        files = [folder / f"sizes-{world_size}-{rank}.json" for rank in range(world_size)]
        sizes[world_size] = [json.loads(file.read_text()) for file in files]
    return sizes


@pytest.mark.parametrize(("world_size", "preset", "mesh"), CASES)
def test_each_process_holds_what_the_planner_computes(local_sizes, world_size, preset, mesh):
    config = from_command_line("", MODELS[preset])
    cost = model_cost(build_meta_model(config))
    expected = sum(parameters_per_gpu(cost, Mesh.parse(mesh, world_size)))
    if preset == "v2-tiny" and "fsdp" in mesh:  # gates are not sharded, which the planner ignores
        gates = config.model.n_layer * config.model.n_embd * 4
        expected += gates * (1 - 1 / world_size)
    n_row, row = config.model.conv_width - 1, config.model.n_layer * config.model.n_embd
    chunk = -(-n_row // world_size)  # rows of a convolution that one process holds at most
    for rank in range(world_size):
        more = 0.0
        if "fsdp" in mesh:  # the planner deals out the gains evenly, FSDP in whole rows
            more = row * (min(chunk, max(0, n_row - rank * chunk)) - n_row / world_size)
        held = local_sizes[world_size][rank][f"{preset} {mesh}"]
        assert held == pytest.approx(expected + more)
