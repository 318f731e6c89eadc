"""What a figure calls each measure, with its unit."""

from __future__ import annotations

LABELS = {
    "loss": "loss (nats per token)",
    "sparsity_k": "budget k (keys)",
    "effective_support": "effective support (keys)",
    "keys_95": "keys for 95 % of the mass",
    "capped_share": "capped keys / k",
    "gate_equivalent": "gate-equivalent rows",
    "sink_mass": "mass on a sink",
    "importance": "importance E|∂L/∂ξ| (nats)",
    "sparsity_k_gradient": "Σ ∂L/∂k (nats per key)",
    "median_distance": "median distance (tokens)",
    "support": "effective support (keys)",
    "capped": "capped keys / k",
    "k": "budget k (keys)",
    "gradient": "E|∂L/∂ξ| (nats)",
}
