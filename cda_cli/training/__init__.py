"""Training: a configuration and data → a run folder of checkpoints and metrics.

A run: `run` is the whole of it, `setup` builds what `state` holds, `resume` finds where it goes on.
A step: `loop` has the order of things, `pipeline` works ahead, `gradients`, `optimizer` and `average` do one each,
`nonfinite` refuses a step, `schedule` says what is due.
Around it: `distributed` for several processes, `accounting` for speed and memory, `display` and `trackers` for people.
"""
