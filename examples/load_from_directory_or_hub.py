"""Load a model by its embedded name, from a directory, or from the Hugging Face Hub; save it, and load that.

python examples/load_from_directory_or_hub.py [NAME]

NAME may be a directory in Hugging Face's layout or a Hub id; meta-llama/Llama-4-Scout-17B-16E-Instruct works where
there is memory for it, its licence has been accepted, and `hf auth login` has been run.
"""

import argparse
import tempfile

from llama4 import Llama4

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("name", metavar="NAME", nargs="?", default="tiny")
args = parser.parse_args()

llm = Llama4.from_pretrained(args.name)
print(f"{args.name}: {llm.config.num_parameters():,} parameters, {llm.model.dtype} on {llm.model.device}")

if args.name == "tiny":
    with tempfile.TemporaryDirectory() as directory:
        llm.save_pretrained(directory)
        again = Llama4.from_pretrained(directory)
        question = "What can you do?"
        assert again.chat(question, max_new_tokens=40).text == llm.chat(question, max_new_tokens=40).text
        print("saved, loaded again, and it answers the same")
