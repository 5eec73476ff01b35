"""What fully_shard is told: which weights are shared out, and in which dtype they travel. That the result is right, see
test_parallel.py."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from nanods.config import from_command_line
from nanods.training import checkpoint
from nanods.training.sharded import shard


def one_of(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=1)
    config = from_command_line("", ["v2-tiny", "--n-layer", "2", "--n-embd", "16", "--n-head", "2", "--moe.n-expert", "4"])
    for dtype in (torch.bfloat16, None):
        model, seen = checkpoint.build(config), {}
        shard(model, init_device_mesh("cpu", (1,)), dtype=dtype)
        sharded = {name for name, p in model.named_parameters() if isinstance(p, DTensor)}
        assert sharded == {name for name, _ in model.named_parameters() if not name.endswith("gate.weight")}
        block = model.blocks[0]
        names = ("attention.query.weight", "mlp.up", "mlp.gate.weight")
        note = lambda *_: seen.update({n: block.get_parameter(n).dtype for n in names})  # noqa: E731, B023
        block.attention.register_forward_pre_hook(note)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            logits, _ = model(torch.zeros(1, 4, dtype=torch.long))
            logits.float().square().sum().backward()
        assert seen == dict.fromkeys(names[:2], dtype or torch.float32) | {names[2]: torch.float32}
        assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_a_blocks_weights_travel_as_autocast_would_round_them_and_gates_stay(tmp_path):
    torch.multiprocessing.start_processes(one_of, (str(tmp_path),), nprocs=1, start_method="forkserver")
