"""The folder of a run, as every command sees it. None of it imports torch.

`records` holds the types of the records in metrics.jsonl, `metrics` reads and writes that file, `folder` has the folder
as a whole, `Run`, `early_stop` says when a run ends early, and `summary` finds runs and compares them.
"""
