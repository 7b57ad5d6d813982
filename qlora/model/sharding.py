"""The base model's layers, divided among all processes: for a model that no card holds by itself.

A layer is whole only while it computes (FSDP2: pytorch.org/docs/stable/distributed.fsdp.fully_shard.html). Only frozen
weights are divided. Those that are trained stay whole in every process, as DDP has them: they are few. So checkpoints,
the best weights and the adapter are written by one process, and look like those of a run without sharding.
"""

import itertools

import accelerate.accelerator
import torch
from bitsandbytes.nn import Linear4bit
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qlora import settings


def make_mesh():
    """The processes that share, in a row; all make it at the same time."""
    return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (settings.process_count(),))


def shard_layers(model, mesh) -> tuple[int, int]:
    """Leaves a share of each layer's frozen weights of a model on the CPU in this process, on its device.

    Returns the bytes of the base model here, and those of all of it. Scales of 4-bit weights stay whole (1/32 of them).
    """
    before = count_bytes(model)
    device = torch.device("cuda", settings.process_rank(local=True)) if mesh.device_type == "cuda" else "cpu"
    trained = {weight for weight in model.parameters() if weight.requires_grad}
    base = model.get_base_model()
    for layer in base.model.layers:
        keep_quant_states(layer, device)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    whole = {weight for weight in base.parameters() if not isinstance(weight, DTensor)}
    fully_shard(base.model, mesh=mesh, ignored_params=whole)  # the root, which fetches the next layer beforehand
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if not isinstance(tensor, DTensor):  # embeddings, head, LoRA; what is divided is there already
            tensor.data = tensor.data.to(device)
    base.hf_device_map = {"": device}  # which Trainer compares with its own
    accelerate.accelerator.model_has_dtensor = has_trained_shares  # it refuses DDP for any weight that is divided
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    model._ddp_params_and_buffers_to_ignore = frozen  # DDP would send the first process's share to all others
    return count_bytes(model), before


def has_trained_shares(model) -> bool:
    """Whether a weight that DDP would average is divided; frozen ones do not concern it."""
    return any(isinstance(weight, DTensor) and weight.requires_grad for weight in model.parameters())


def keep_quant_states(layer, device) -> None:
    """Notes the scales of 4-bit weights at their modules: sharding makes new weights, which have none."""
    for module in layer.modules():
        if isinstance(module, Linear4bit):
            module.quant_state = module.weight.quant_state
            module.quant_state.to(device)


def count_bytes(model) -> int:
    """Bytes of the frozen weights that this process holds."""
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in frozen]
    return sum(weight.numel() * weight.itemsize for weight in local)
