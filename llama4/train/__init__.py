"""Fine-tuning of adapters and of whole models.

from llama4.train import LoraConfig, finetune
finetune("tiny", "train.jsonl", "adapter", eval="eval.jsonl", lora=LoraConfig(rank=8), steps=200)
"""

from llama4.adapters.config import LoraConfig
from llama4.train.loop import Result, Run, TrainingError, finetune
from llama4.train.options import TrainingOptions
from llama4.train.records import DataError

__all__ = ["DataError", "LoraConfig", "Result", "Run", "TrainingError", "TrainingOptions", "finetune"]
