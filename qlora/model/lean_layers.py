"""A Llama's layers in fewer passes over memory: the same sums, and less kept for the backward pass.

On the CPU a pass over the activations costs as much as a small matrix product. PEFT makes five of them
per layer, and transformers' norm and gate keep what can be computed again. docs/packing.md derives the
backward passes.
"""

import functools

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from peft.tuners.lora import Linear, Linear4bit
from torch.nn.functional import linear, rms_norm, silu
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from qlora import machine

MANY = 32  # tokens from which low-rank products in 16 bit are faster than in fp32 on the CPU, copies included


class LoraLinear(torch.autograd.Function):
    """x W^T + scale (x A^T) B^T; a 4-bit W is dequantised in the forward and again in the backward pass."""

    @staticmethod
    def forward(ctx, x, a, b, weight, scale):
        ctx.shape, ctx.weight, ctx.scale = x.shape, weight, scale
        x = x.flatten(0, -2)
        inner = x @ a.T
        ctx.save_for_backward(x, a, b, inner)
        y = x @ dequantize(weight, x.dtype).T
        return y.addmm_(inner, b.T, alpha=scale).view(*ctx.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, a, b, inner = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        grad_inner = grad @ b
        grad_x = grad @ dequantize(ctx.weight, x.dtype)
        grad_x.addmm_(grad_inner, a, alpha=ctx.scale)
        grad_a, grad_b = grad_inner.T @ x, (inner.T @ grad).T
        return grad_x.view(ctx.shape), grad_a * ctx.scale, grad_b * ctx.scale, None, None


def dequantize(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The matrix in `dtype`; one that is in 16 bit is only cast."""
    return (dequantize_4bit(weight, weight.quant_state) if hasattr(weight, "quant_state") else weight).to(dtype)


class Norm(torch.autograd.Function):
    """x / rms(x) in fp32, times the weight, which is frozen; keeps x and one number per token."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square() / x.shape[-1] + eps
        scale = scale.rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        grad, normed = (grad * weight).float(), x * scale
        mean = torch.linalg.vecdot(grad, normed).unsqueeze(-1) / x.shape[-1]
        return grad.addcmul_(normed, mean, value=-1).mul_(scale).to(x.dtype), None, None


class Gate(torch.autograd.Function):
    """silu(x) y; keeps only x and y."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return silu(x).mul_(y)

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * y, x), silu(x).mul_(grad)


def make_lean(model) -> None:
    """Replaces the forward functions of the layers; without gradients the gate stays transformers' own.

    On a GPU the norm is torch's fused kernel, and the rest is as on the CPU. Liger's other kernels would save little
    here: the gate keeps the same two tensors as theirs, and the head runs over the labelled positions only.
    """
    on_gpu = model.device.type != "cpu"
    model.get_output_embeddings().register_forward_pre_hook(copy_input)
    for module in model.modules():
        if isinstance(module, Linear | Linear4bit):
            run = run_linear
        elif type(module) is LlamaRMSNorm:
            run = run_fused_norm if on_gpu else run_norm
        elif type(module) is LlamaMLP and module.config.hidden_act == "silu":
            run = run_mlp
        else:
            continue
        module.forward = functools.partial(run, module, module.forward)


def is_plain(layer: Linear | Linear4bit) -> bool:
    """Whether the layer now adds the product of two low-rank matrices and nothing else: no DoRA, no dropout."""
    if layer.disable_adapters or layer.merged:
        return False
    (name,) = layer.active_adapters
    drops = layer.training and not isinstance(layer.lora_dropout[name], torch.nn.Identity)
    return name not in layer.lora_variant and not drops


def cast_adapter(model) -> None:
    """Casts the LoRA weights of a model that answers on a GPU to its 16 bit, for fewer kernels per layer.

    Training keeps them in fp32, and so does the CPU, where small bf16 products are slower.
    """
    for name, weight in model.named_parameters():
        if ".lora_" in name and weight.device.type != "cpu":
            weight.data = weight.data.to(machine.compute_dtype())


def copy_input(head, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """The hidden states in their own memory, as the head's input.

    For a slice (`logits_to_keep`) torch 2.13 makes a batched product, and copies the whole vocabulary matrix: 0.05 to
    0.2 s per prompt on 2 cores.
    """
    return (inputs[0].clone(memory_format=torch.contiguous_format),)


def run_linear(layer: Linear | Linear4bit, ordinary, x: torch.Tensor) -> torch.Tensor:
    """The layer's output, by LoraLinear where gradients are wanted; by PEFT where the layer is not plain."""
    if not is_plain(layer):
        return ordinary(x)
    (name,) = layer.active_adapters
    base, a, b = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
    if not torch.is_grad_enabled():
        y = base(x)
        if x.numel() >= MANY * x.shape[-1]:
            a, b = a.to(y.dtype), b.to(y.dtype)
        inner = linear(x.to(a.dtype), a)
        if y.dtype == b.dtype:
            y.view(-1, y.shape[-1]).addmm_(inner.flatten(0, -2), b.T, alpha=layer.scaling[name])
            return y
        return y.add_(linear(inner, b), alpha=layer.scaling[name])
    if torch.is_autocast_enabled(x.device.type):  # the sum in LoraLinear is in place, where autocast casts nothing
        x = x.to(torch.get_autocast_dtype(x.device.type))
    a, b = a.to(x.dtype), b.to(x.dtype)
    if isinstance(base, bitsandbytes.nn.Linear4bit):
        fix_4bit_weight_quant_state_from_module(base)  # a weight that was divided has lost it
    y = LoraLinear.apply(x, a, b, base.weight, layer.scaling[name])
    return y if base.bias is None else y + base.bias


def run_norm(norm: LlamaRMSNorm, ordinary, x: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled() or norm.weight.requires_grad:
        return ordinary(x)
    return Norm.apply(x, norm.weight, norm.variance_epsilon)


def run_fused_norm(norm: LlamaRMSNorm, ordinary, x: torch.Tensor) -> torch.Tensor:
    """The norm in one kernel of the GPU."""
    with torch.autocast("cuda", enabled=False):  # which would have it return fp32
        return rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def run_mlp(mlp: LlamaMLP, ordinary, x: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return ordinary(x)
    return mlp.down_proj(Gate.apply(mlp.gate_proj(x), mlp.up_proj(x)))
