"""The settings of the optimizer and its schedule."""

# Annotations are evaluated here: pydantic before 2.10 would look for their names in the module of the subclass.

from typing import Annotated, Literal

from cda_cli.settings.setting import Setting, Table


class OptimSettings(Table):
    """Optimisation. Tokens per step = batch_size × grad_accum × seq_len."""

    steps: Annotated[
        int,
        Setting(
            "Optimizer steps; may be raised when a run is resumed.", flag="--steps", short="-s", by_preset=True, ge=1
        ),
    ] = 1000
    schedule_steps: Annotated[int | None, Setting("Length of the learning-rate schedule; null: steps.", ge=1)] = None
    schedule: Annotated[Literal["cosine", "constant"], Setting("Learning rate after the warm-up.")] = "cosine"
    batch_size: Annotated[int, Setting("Sequences in a forward pass.", flag="--batch-size", by_preset=True, ge=1)] = 16
    grad_accum: Annotated[int, Setting("Forward passes in a step.", flag="--grad-accum", by_preset=True, ge=1)] = 1
    optimizer: Annotated[
        Literal["adamw", "muon"],
        Setting("adamw, or muon for the matrices within blocks and AdamW for the rest."),
    ] = "adamw"
    lr: Annotated[
        float, Setting("Peak learning rate, of Muon and AdamW alike.", flag="--lr", by_preset=True, gt=0, le=1e3)
    ] = 1e-3
    min_lr_ratio: Annotated[float, Setting("Final learning rate, as a share of lr.", ge=0, le=1)] = 0.1
    warmup_steps: Annotated[int, Setting("Steps of linear warm-up.", ge=0)] = 50
    weight_decay: Annotated[float, Setting("Weight decay, on matrices only.", ge=0)] = 0.1
    beta1: Annotated[float, Setting("AdamW's decay of the mean gradient.", ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Setting("AdamW's decay of the mean squared gradient.", ge=0, lt=1)] = 0.95
    clip: Annotated[float, Setting("Largest gradient norm; 0: no clipping.", ge=0)] = 1.0
    truncated_share: Annotated[
        float,
        Setting(
            "Share of the steps on which attention keeps only the truncated_keys largest weights of a row, as "
            "cda eval --cut top:N does; 0: none.",
            ge=0,
            le=1,
        ),
    ] = 0.0
    truncated_keys: Annotated[int, Setting("Keys that a row keeps on a truncated step.", ge=1)] = 16
    ff_l1: Annotated[
        float,
        Setting(
            "Coefficient, such as 3e-4, of an L1 norm in the loss: the mean over layers and tokens of Σ|h|, where h "
            "are the activations of the feed-forward; 0: none.",
            ge=0,
        ),
    ] = 0.0
    support_target: Annotated[
        float | None,
        Setting(
            "Largest mean effective support of attention, in keys, to which training constrains it; null: no "
            "constraint.",
            ge=1,
        ),
    ] = None
    support_rate: Annotated[
        float, Setting("Step of the multiplier of support_target where the support is twice that target.", gt=0)
    ] = 1e-3
    ema_decay: Annotated[
        float, Setting("Decay of a moving average of the weights, such as 0.999; 0: none.", ge=0, lt=1)
    ] = 0.0
    max_refused: Annotated[
        int, Setting("Batches in a row without a finite loss and gradient after which a run ends.", ge=1)
    ] = 5

    def warnings(self) -> list[str]:
        """Returns a sentence about settings that are allowed but can hardly be meant."""
        steps = max(self.steps, self.schedule_steps or 0)  # The run of a trunk ends before its schedule.
        if steps >= self.warmup_steps:
            return []
        return [
            f"the warm-up of {self.warmup_steps:,} steps is longer than the run of {steps:,}, so the learning "
            "rate never reaches its peak; set optim.warmup_steps"
        ]
