"""`llama4 bench device`: what only an accelerator can show, in one command that takes minutes.

`python -m llama4.bench device --minutes 8 --out DIRECTORY [--steps NAME ...] [--dry-run]`

A card is often at hand for minutes only, so nothing may be lost to one fault. Each step runs in a process of its own,
forked from one that has imported torch; it is a list of cases, each with a time limit. A case that fails, hangs or
ends the process is recorded, and the step goes on behind it in a new process. Results are written as they come.

    command     the command line
    plan        the steps, in the order of their worth, with their limits
    runner      starts steps, watches them, ends what hangs
    record      inside a step: runs cases, writes what they give
    report      results -> files
    timing      seconds on a device, CUDA graphs, profiles
    workload    models and layers with random weights, made on the device
    machine, kernels, checks, scout, vision, long, offload, finetune, experts, suite    the steps
"""
