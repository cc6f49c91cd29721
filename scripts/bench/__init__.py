"""What is measured, one command each: a table on stdout, `--json FILE` for the numbers.

train_step.py    a training step of the real size, ours and DiffSynth's by turns
traffic.py       the bytes that a step's operations read and write, counted without a GPU
zero.py          a step under each strategy: time, collectives, and bytes beside the planned ones
startup.py       seconds until a command answers, and until the first training step
optimizer.py     the optimizer's part of a step
edit.py          an edit from request to picture, part by part: a bridge against 40 steps with guidance
memory.py        what each way of saving memory saves and costs an edit
data_prep.py     rows a second of `pairs` and `check`, and their memory as datasets grow
mutants.py       which planted faults the tests catch

`--tiny` makes the first six small enough for a CPU and a few seconds, which is how the tests run them. docs/performance.md
has the figures. A command starts with `sys.path[0]` at the repository's root, as all of this project's do.
"""
