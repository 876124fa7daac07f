"""How a model is trained: what `llama4 finetune --method` may be."""

METHODS = ("lora", "qlora", "full", "dpo", "distill")
ALL_WEIGHTS = ("full", "distill")
"""Those that train the weights; the others train an adapter."""
PLANNED = ("lora", "qlora", "full")
"""Those that `llama4 plan --finetune` knows."""
