"""What people run to check and measure fastattn on their own machine: `python -m fastattn` and the suites
behind it.

Nothing in the library imports this package. `workloads` holds the one table of what is measured; `runner`
times it, `ceilings` says what the machine can do, `rivals` finds what else is installed, `report` prints
and draws.
"""
