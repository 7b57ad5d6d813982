"""The base model's layers, divided among all processes: for a model that no card holds by itself.

A layer is whole only while it computes (FSDP2: pytorch.org/docs/stable/distributed.fsdp.fully_shard.html). Only frozen
weights are divided. Those that are trained stay whole in every process, as DDP has them: they are few. So checkpoints,
the best weights and the adapter are written by one process, and look like those of a run without sharding.
"""

import torch
from bitsandbytes.nn import Linear4bit
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from qlora import settings


def shard_layers(model) -> None:
    """Leaves a share of each layer's frozen weights in this process; every process calls it at the same point."""
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (settings.process_count(),))
    trained = {weight for weight in model.parameters() if weight.requires_grad}
    for layer in model.get_base_model().model.layers:
        keep_quant_states(layer)
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    model._ddp_params_and_buffers_to_ignore = frozen  # DDP would send the first process's share to all others


def keep_quant_states(layer) -> None:
    """Notes the scales of 4-bit weights at their modules: sharding makes new weights, which have none."""
    for module in layer.modules():
        if isinstance(module, Linear4bit):
            module.quant_state = module.weight.quant_state
