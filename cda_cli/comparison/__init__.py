"""Comparison: the same questions about several runs, asked side by side.

`recorded` reads what a run wrote of itself, `comparable` says in what the runs differ and what follows from it,
`curves` compares losses at equal tokens and at equal time. None of these imports torch. `models` opens the models,
evaluates and inspects them on one text, and `overlap` compares what their heads read. `result` has all of it.
"""
