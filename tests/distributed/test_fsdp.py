"""What each process holds of a model that is parted, against the planner's arithmetic; and in which dtype weights travel. That
the results are right, see test_parallel.py."""

import json
import os

import pytest
import torch
from torch.distributed.tensor import DTensor

from nanods.build import build_meta_model, build_model
from nanods.config import from_command_line
from nanods.distributed.process_groups import ProcessGroups
from nanods.distributed.sharding import to_local
from nanods.planner.cost import Mesh, held
from nanods.planner.memory import counts
from tests.distributed.processes import free_port

SMALL = ["--n-layer", "2", "--n-embd", "16", "--n-head", "2", "--context-length", "32"]
MODELS = {"v1-tiny": ["v1-tiny", *SMALL], "v2-tiny": ["v2-tiny", *SMALL, "--moe.n-expert", "4"]}
MESHES = {4: [("v2-tiny", "fsdp=2,ep=2"), ("v2-tiny", "dp=2,ep=2"), ("v2-tiny", "fsdp=4")]}
MESHES[2] = [("v1-tiny", "tp=2"), ("v2-tiny", "tp=2"), ("v1-tiny", "fsdp=2"), ("v2-tiny", "ep=2")]
CASES = [(P, *case) for P, cases in MESHES.items() for case in cases]


def one_of(rank, folder, processes, ports):
    torch.set_num_threads(1)
    os.environ |= {
        "WORLD_SIZE": str(processes),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
    }
    told = {}
    for (preset, mesh), port in zip(MESHES[processes], ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        config = from_command_line("", MODELS[preset])
        groups = ProcessGroups(mesh, config.model.moe.n_expert)
        torch.manual_seed(0)
        whole = build_model(config)
        model = (build_model if groups.is_main_process else build_meta_model)(config)
        if groups.is_main_process:
            model.load_state_dict(whole.state_dict())
        model = groups.shard_model(model, torch.device("cpu"), torch.bfloat16)
        told[f"{preset} {mesh}"] = sum(to_local(p).numel() for p in model.parameters())
        for name, p in model.named_parameters():  # the first process's values have arrived
            if isinstance(p, DTensor) and "ep" not in groups.mesh.axes:
                assert torch.equal(p.detach().full_tensor(), whole.get_parameter(name))
            elif not isinstance(p, DTensor) and p.shape == whole.get_parameter(name).shape:
                assert torch.equal(p, whole.get_parameter(name))
        if groups.mesh.is_fsdp:
            dtypes_that_meet(model)
        groups.destroy()
    (folder / f"told-{processes}-{rank}.json").write_text(json.dumps(told))
    os._exit(0)  # DTensor keeps its groups, whose threads may outlive Python's own end


def dtypes_that_meet(model):
    """While a block computes its weights are what autocast would have made of them; its gate, and what is kept, stay fp32."""
    block, seen = model.blocks[0], {}
    names = [
        n
        for n in ("attention.query.weight", "mlp.up.weight", "mlp.up", "mlp.gate.weight")
        if n in dict(block.named_parameters())
    ]
    block.mlp.register_forward_pre_hook(
        lambda *_: seen.update({n: block.get_parameter(n).dtype for n in names})
    )
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = model(torch.zeros(1, 4, dtype=torch.long))
    logits.float().square().sum().backward()
    assert seen == {n: torch.float32 if "gate" in n else torch.bfloat16 for n in names}
    assert (
        {p.dtype for p in model.parameters()}
        == {p.grad.dtype for p in model.parameters()}
        == {torch.float32}
    )


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parted")
    for processes, cases in MESHES.items():
        ports = [free_port() for _ in cases]
        torch.multiprocessing.start_processes(
            one_of, (folder, processes, ports), processes, start_method="forkserver"
        )
    return {
        P: [json.loads((folder / f"told-{P}-{rank}.json").read_text()) for rank in range(P)]
        for P in MESHES
    }


@pytest.mark.parametrize(("processes", "preset", "mesh"), CASES)
def test_each_process_holds_what_the_planner_says(told, processes, preset, mesh):
    config = from_command_line("", MODELS[preset])
    sizes = dict(part.split("=") for part in mesh.split(","))
    planned = Mesh(" x ".join(sizes), processes, int(sizes.get("ep", 1)))
    expected = sum(held(config, counts(build_meta_model(config)), planned))
    gates = (
        config.model.n_layer * config.model.n_embd * 4
        if preset == "v2-tiny" and "fsdp" in mesh
        else 0
    )  # which stay whole
    for rank in range(processes):
        assert told[processes][rank][f"{preset} {mesh}"] == pytest.approx(
            expected + gates * (1 - 1 / processes)
        )
