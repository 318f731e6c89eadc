"""The mark of a target that has no loss. The data sets it, the loss of the model obeys it, and both import it here."""

IGNORE = -100  # what torch.nn.functional.cross_entropy ignores unless told otherwise
