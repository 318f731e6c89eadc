"""Trains: a configuration and data → a run folder of checkpoints and metrics.

A run: `run` trains from start to end, `setup` builds what `state` holds, and `resume` finds where a run goes on.
A step: `loop` has the order of operations, and `pipeline` launches the next step early. `gradients`, `optimizer` and
`average` do what their names say. `nonfinite` refuses a step, and `schedule` says what is due.
Around it: `distributed` is for several processes, `accounting` counts speed and memory, and `display` and `trackers`
show a run to people.
"""
