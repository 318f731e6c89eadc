"""The mark of a target that has no loss. The data sets it, and the loss of the model skips it; both import it here."""

IGNORE = -100  # the default of torch.nn.functional.cross_entropy
