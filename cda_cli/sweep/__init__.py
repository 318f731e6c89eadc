"""A sweep: arms × seeds from one file, each an ordinary run in a folder of its own, and the table that compares them.

`files` reads the file, `spec` says what it may hold, `plan` which runs it takes and where they lie, `jobs` runs them as
processes, `attempts` is the record of these, and `result` makes the tables of what the runs recorded, by their
`metrics`. `student_t` has the intervals over seeds.
"""
