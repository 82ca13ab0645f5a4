"""The experiment: what runs, in which order, and what each cell leaves behind.

`setup` prepares the machine and the weights, `cells` serve traces, `execution` runs notebooks.
"""
