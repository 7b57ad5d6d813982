"""LoRA on the layers of a base model."""

from dataclasses import dataclass

from qlora.console import fail


@dataclass(frozen=True)
class Lora:
    """The shape of an adapter. `targets` names the linear layers; by default all of them but the head.

    `rslora` scales by alpha / sqrt(rank) (arXiv 2312.03732), `dora` also trains the magnitudes (arXiv 2402.09353).
    """

    rank: int
    alpha: int
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    rslora: bool = False
    dora: bool = False


def add_lora(model, lora: Lora, seed: int):
    """The model with trainable low-rank adapters, the rest frozen. Raises UserError for unknown layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(seed)  # the A matrices start random
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        linear = {name.rpartition(".")[2] for name, layer in model.named_modules() if "Linear" in type(layer).__name__}
        fix = f"name some of {', '.join(sorted(linear))}"
        raise fail(f"no layer is called that ({lora.targets})", "--target-modules", fix) from error


def count_parameters(model) -> tuple[int, int, int]:
    """(trainable, in 4-bit, all) weights; a 4-bit weight counts as one although two share a byte."""
    weights = list(model.parameters())
    packed = sum(weight.quant_state.shape.numel() for weight in weights if hasattr(weight, "quant_state"))
    return sum(weight.numel() for weight in weights if weight.requires_grad), packed, model.num_parameters()
