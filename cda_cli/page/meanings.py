"""What each measure of a head means, in a line for the page. docs/inspection.md has the formulas."""

from __future__ import annotations

ABLATION = "ablation_difference"
MEANINGS = {
    "sparsity_k": "the budget k, what the weights of a row sum to",
    "effective_support": "keys that a row spreads over: exp of the entropy of its weights",
    "capped_share": "m/k: the part of the budget in the m capped keys, λ = 1",
    "distance_back": "tokens back, on average over the mass",
    "row_sum": "Σλ of a row",
    "row_sum_error": "|Σλ − min(k, visible keys)|",
    "gate_equivalent": "share of the rows that see more than k keys and cap none: exactly k · softmax(s/ε)",
    "participation": "keys that a row spreads over: 1/Σp²",
    "keys_95": "the fewest keys that hold 95% of the mass of a row",
    "rest_1": "share of the mass that the largest key leaves out",
    "rest_4": "share of the mass that the 4 largest keys leave out",
    "rest_16": "share of the mass that the 16 largest keys leave out",
    "rest_64": "share of the mass that the 64 largest keys leave out",
    "null_share": "share of the mass on null keys",
    "self_share": "share of the mass on the query's own key",
    "previous_share": "share of the mass on the key before the query",
    "first_share": "share of the mass on the window's first key",
    "duplicate_share": "share of the mass on earlier keys with the query's token",
    "induction_share": "share of the mass on keys after an earlier occurrence of the query's token",
    "divergence": "bits: how far the head reads from what the heads of its layer read together",
    "moved_norm": "Σ ‖λ v W_O‖: the length of all that the keys of a row move",
    "written_norm": "‖Σ λ v W_O‖: the length of what the head adds to the residual stream",
    "sparsity_k_variance": "variance of the budget k over rows",
    "share_at_smallest_k": "share of the rows whose k is 1",
    "share_at_largest_k": "share of the rows whose k is the largest",
    "median_distance": "tokens back, within which half of the mass lies",
    "sink_mass": "the largest mean share of the mass that one key gets from all later queries",
    "sink_rate": "share of the windows in which one key gets more than 30% of the mass",
    "self_lift": "mass on the query's own key, over what equal weights would give",
    "previous_lift": "mass on the key before the query, over what equal weights would give",
    "first_lift": "mass on the window's first key, over what equal weights would give",
    "duplicate_lift": "mass on earlier keys with the query's token, over chance at the same distances",
    "induction_lift": "mass on keys after such a token, over chance at the same distances",
    # Those of gradients, and the one of ablations, are there where they were asked for.
    "importance": "E |∂L/∂ξ| of a factor ξ on the output of the head",
    "sparsity_k_gradient": "nats by which the loss changes if each row has one key more in its k, to first order",
    ABLATION: "bits per byte more when the output of the head is replaced by its mean",
}
