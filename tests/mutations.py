"""Known mistakes of Llama 4 implementations, each made on purpose in a copy of this one, and the test that notices.

`python tests/mutations.py [WORD ...]` applies those whose names hold one of the words (all by default), one after the
other, and runs the test of each. It ends with 1 if a mistake goes unnoticed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARITY = "tests/parity/test_model.py"
CPP = "llama4/kernels/cpp"
KERNELS = "tests/kernels/test_cpu.py"
STEP = "tests/kernels/test_decoder.py::test_equals_token_by_token"


@dataclass(frozen=True)
class Mutation:
    """`right`, which stands once in `file`, becomes `wrong`, and so does a second pair if given; `test` must fail then.
    A mistake in C++ is compiled by the copy."""

    name: str
    file: str
    right: str
    wrong: str
    test: str
    second: tuple[str, str] | None = None


MUTATIONS = [
    Mutation(
        "the router's score multiplies the expert's output",
        "llama4/model/moe.py",
        "routed = self.dispatcher.dispatch(x_ND, scores_Nk, experts_Nk)\n"
        "        routed_RD = self.experts(routed.x_RD, routed.num_tokens_per_expert_E)",
        "routed = self.dispatcher.dispatch(x_ND, torch.ones_like(scores_Nk), experts_Nk)\n"
        "        routed_RD = self.experts(routed.x_RD, routed.num_tokens_per_expert_E)\n"
        "        scores_R = scores_Nk.flatten()[experts_Nk.flatten().argsort(stable=True)]\n"
        "        routed_RD = routed_RD * scores_R[:, None]",
        f"{PARITY}::test_text_across_chunk_borders",
    ),
    Mutation(
        "scores are a softmax over the chosen experts",
        "llama4/model/moe.py",
        "torch.sigmoid(logits_Nk)",
        "torch.softmax(logits_Nk, -1)",
        f"{PARITY}::test_more_than_one_expert_per_token",
    ),
    Mutation(
        "gate and up are swapped",
        "llama4/model/experts.py",
        "swiglu(*linear_in_out(x_RD, self.gate_up_proj[expert]).chunk(2, dim=-1))",
        "swiglu(*reversed(linear_in_out(x_RD, self.gate_up_proj[expert]).chunk(2, dim=-1)))",
        f"{PARITY}::test_text_across_chunk_borders",
    ),
    Mutation(
        "RMSNorm with eps 1e-6",
        "llama4/ops/norm.py",
        "x.square().mean(-1, keepdim=True) + eps",
        "x.square().mean(-1, keepdim=True) + eps / 10",
        f"{PARITY}::test_text_across_chunk_borders",
    ),
    Mutation(
        "chunks begin where the call begins",
        "llama4/cache/batch.py",
        "chunk_end(position, window) or end",
        "position + (window or end)",
        f"{PARITY}::test_prefill_in_pieces_and_token_by_token",
    ),
    Mutation(
        "no chunks while decoding",
        "llama4/cache/batch.py",
        "chunk_start(position, window, self.start[row])",
        "self.start[row]",
        f"{PARITY}::test_prefill_in_pieces_and_token_by_token",
    ),
    Mutation(
        "a session outlives a change of its cache",
        "llama4/engine/fused_cpu.py",
        "self.version == cache.version\n",
        "True\n",
        "tests/engine/test_fused_cpu.py::test_a_cache_that_others_use_too",
    ),
    Mutation(
        "a hook does not stop the fused runner",
        "llama4/engine/fused_cpu.py",
        "(hooked := self._description.hooked(self.model)) is not None",
        "(hooked := self._description.hooked(self.model)) == 0",
        "tests/engine/test_fused_cpu.py::test_hooks_are_called",
    ),
    Mutation(
        "RoPE pairs the first half with the second",
        "vision/rope.py",
        "pairs = torch.view_as_complex(x.to(rotation.real.dtype).unflatten(-1, (-1, 2)).contiguous())\n"
        "    return torch.view_as_real(pairs * rotation).flatten(-2)",
        "pairs = torch.view_as_complex(x.to(rotation.real.dtype).unflatten(-1, (2, -1)).mT.contiguous())\n"
        "    return torch.view_as_real(pairs * rotation).mT.flatten(-2)",
        f"{PARITY}::test_text_across_chunk_borders",
    ),
    Mutation(
        "QK-norm on NoPE layers too",
        "llama4/model/attention.py",
        "config.rms_norm_eps if config.use_qk_norm and self.uses_rope else None",
        "config.rms_norm_eps if config.use_qk_norm else None",
        f"{PARITY}::test_text_across_chunk_borders",
    ),
    Mutation(
        "temperature from position p instead of p + 1",
        "llama4/model/positions.py",
        "torch.div(positions_N + 1, config.floor_scale",
        "torch.div(positions_N, config.floor_scale",
        f"{PARITY}::test_text_across_chunk_borders",
    ),
    Mutation(
        "no RoPE scaling",
        "llama4/model/rope_scaling.py",
        "    if config.rope_scaling is None:",
        "    if True:",
        f"{PARITY}::test_text_across_chunk_borders",
    ),
    Mutation(
        "rows of q and k in halves of a head",
        "llama4/families/names.py",
        "return tensor.unflatten(0, (-1, 2, self.head_dim // 2)).transpose(1, 2).flatten(0, 2)",
        "return tensor",
        "tests/families/test_llama.py::test_logits",
    ),
    Mutation(
        "RoPE chosen by the length so far",
        "llama4/cache/batch.py",
        "known or end for known, end",
        "end for known, end",
        "tests/families/test_llama.py::test_pieces_and_ragged_batches",
    ),
    Mutation(
        "the vision tower's GELU approximated",
        "vision/encoder.py",
        "F.gelu(self.fc1(x))",
        'F.gelu(self.fc1(x), approximate="tanh")',
        f"{PARITY}::test_images",
    ),
    Mutation(
        "the adapter without its last GELU",
        "vision/projector.py",
        "F.gelu(self.fc2(F.gelu(self.fc1(x))))",
        "self.fc2(F.gelu(self.fc1(x)))",
        f"{PARITY}::test_images",
    ),
    Mutation(
        "2-D RoPE with rows first",
        "vision/rope.py",
        "torch.cat([columns, rows], dim=-1)",
        "torch.cat([rows, columns], dim=-1)",
        f"{PARITY}::test_images",
    ),
    Mutation(
        "<|image|> filled instead of <|patch|>",
        "llama4/model/multimodal.py",
        "is_patch = ids_N == self.config.image_token_index",
        "is_patch = ids_N == self.config.image_token_index - 2",
        f"{PARITY}::test_images",
    ),
    Mutation(
        "the pixel shuffle runs over columns first",
        "vision/projector.py",
        "x_nPW.view(n, merged, factor, merged, factor, W).transpose(2, 3)",
        "x_nPW.view(n, merged, factor, merged, factor, W).permute(0, 1, 3, 4, 2, 5)",
        f"{PARITY}::test_images",
    ),
    Mutation(
        "the global tile first",
        "vision/tiling.py",
        "torch.cat([tiles, _resize(pixels, tile, tile, resample).unsqueeze(0)])",
        "torch.cat([_resize(pixels, tile, tile, resample).unsqueeze(0), tiles])",
        "tests/vision/test_tiling.py::test_pixels_are_the_references",
    ),
    Mutation(
        "no row separator after the last row of tiles",
        "llama4/text/prompt.py",
        'ids += [*row, tokenizer.special("<|tile_y_separator|>")] * rows',
        'ids += ([*row, tokenizer.special("<|tile_y_separator|>")] * rows)[:-1]',
        "tests/text/test_prompt.py::test_image_tokens_are_transformers",
    ),
    Mutation(
        "under a chat template, names in a user's text are special tokens",
        "llama4/text/template.py",
        "found = [(a, b) for a, b in others if disguised[a:b] == text[a:b]]",
        "found = others",
        "tests/text/test_template.py::test_users_text_stays_text_under_every_template",
    ),
    Mutation(
        "a last message of the assistant is answered, not continued",
        "llama4/inputs.py",
        "continued = add_generation_prompt and is_continued(row)",
        "continued = False",
        "tests/test_inputs.py::test_a_last_message_of_the_assistant_is_continued",
    ),
    Mutation(
        "built-in names of stop tokens before the checkpoint's",
        "llama4/api.py",
        "named = self.generation_config.eos_token_id or self.config.text.eos_token_id",
        "named = self.tokenizer.stop_ids or self.generation_config.eos_token_id",
        "tests/test_generation.py::test_the_first_file_that_names_stop_tokens_decides",
    ),
    Mutation(
        "padding counts as a token that came before",
        "llama4/engine/prompt.py",
        "own = ids_T[mask_T][None]",
        "own = ids_T[None]",
        "tests/test_generation.py::test_a_repetition_penalty_of_a_batch_is_that_of_transformers",
    ),
    Mutation(
        "rows that end keep their penalty for others",
        "llama4/engine/running.py",
        "[self.requests[row] for row in rows]",
        "self.requests[: len(rows)]",
        "tests/test_generation.py::test_a_penalty_stays_with_its_row",
    ),
    Mutation(
        "the most likely token for all, where one takes it",
        "llama4/engine/choice.py",
        "if sampler.takes_largest and greedy is not None",
        "if greedy is not None",
        "tests/engine/test_scheduler.py::test_a_request_gets_what_it_gets_alone",
    ),
    Mutation(
        "the most likely token, though the form has it not",
        "llama4/engine/choice.py",
        "if requests[row].state.allows(greedy[0][row])",
        "if row >= 0",
        "tests/engine/test_grammar.py::test_forms_are_kept",
    ),
    Mutation(
        "what prompts have in common is read by each",
        "llama4/engine/shared_blocks.py",
        "if key not in blocks:",
        "if True:",
        "tests/engine/test_scheduler.py::test_what_prompts_that_come_together_have_in_common_is_read_once",
    ),
]

COMPILED = [
    Mutation(
        "compiled: the router's score multiplies the expert's output",
        f"{CPP}/decoder.h",
        "load_floats(from + d) * routes.scores[choice]);",
        "load_floats(from + d));",
        STEP,
        (
            "    multiply_experts(down, l.down, routed_inner, routed_out);",
            "    for (long i = 0; i < R * F_expert; i++)\n"
            "      assign(routed_inner[i],\n"
            "             upcast(routed_inner[i]) * routes.scores[routes.choices[i / F_expert]]);\n"
            "    multiply_experts(down, l.down, routed_inner, routed_out);",
        ),
    ),
    Mutation(
        "compiled: eps of a norm", f"{CPP}/elementwise.h", "squares / count + eps", "squares / count + eps / 10", STEP
    ),
    Mutation(
        "compiled: a token is written one slot too late",
        f"{CPP}/decoder.h",
        "const long slot = lengths[n] - 1;",
        "const long slot = lengths[n] % block_slots;",
        STEP,
    ),
    Mutation(
        "compiled: a token does not see itself",
        f"{CPP}/attention.h",
        "std::min(lengths[token] - block * block_slots, block_slots)",
        "std::min(std::max(lengths[token] - 1, 1l) - block * block_slots, block_slots)",
        STEP,
    ),
    Mutation(
        "compiled: tokens of a draft see those behind them",
        f"{CPP}/attention.h",
        "std::min(lengths[token] - block * block_slots, block_slots)",
        "std::min(lengths[sequences.end(b) - 1] - block * block_slots, block_slots)",
        STEP,
    ),
    Mutation(
        "compiled: logits of the first token that is wanted",
        f"{CPP}/decoder.h",
        "tokens.outputs ? tokens.outputs[i] : i, i)",
        "tokens.outputs ? tokens.outputs[0] : i, i)",
        "tests/kernels/test_decoder.py::test_logits_of_some_tokens",
    ),
    Mutation(
        "compiled: no temperature",
        f"{CPP}/decoder.h",
        "key < 0 ? s.temperatures[step * N + n] : 1;",
        "key < 0 ? 1 : 1;",
        STEP,
    ),
    Mutation(
        "compiled: RoPE turns backwards",
        f"{CPP}/elementwise.h",
        "v = v * re + other * im",
        "v = v * re - other * im",
        STEP,
    ),
    Mutation(
        "compiled: an output too few at the end of a gemv",
        f"{CPP}/gemv.h",
        "count < rows && i < count; i++) assign",
        "count < rows && i < count - 1; i++) assign",
        f"{KERNELS}::TestProducts::test_dense",
    ),
    Mutation(
        "compiled: a block too few at the end of a row of a gemv",
        f"{CPP}/gemv.h",
        "for (; U > 1 && block < end; block++)",
        "for (; U > 1 && block < end - 1; block++)",
        f"{KERNELS}::TestProducts::test_dense",
    ),
    Mutation(
        "compiled: a session runs past a chunk's border",
        "llama4/cache/view.py",
        "room += [end - p for",
        "room += [end - p + 64 for",
        "tests/engine/test_fused_cpu.py::test_equals_the_eager_step",
    ),
    Mutation(
        "compiled: every group of int4 has the scale of the first",
        f"{CPP}/gemv_int4.h",
        "f.scales.load(f.scale_at(o, g))",
        "f.scales.load(f.scale_at(o, 0))",
        f"{KERNELS}::TestProducts::test_int4",
    ),
    Mutation(
        "compiled: the last of equal logits is the greedy token",
        f"{CPP}/greedy_token.h",
        "where = v > most ?",
        "where = v >= most ?",
        f"{KERNELS}::TestGreedyToken::test_of_equals_the_first",
    ),
    Mutation(
        "compiled: of equal logits the last are left to draw from",
        f"{CPP}/draw_token.h",
        "place < later.place",
        "place > later.place",
        "tests/ops/test_draw_token.py::test_of_equals_the_first_are_left",
    ),
    Mutation(
        "compiled: another limit of gemv than in Python",
        f"{CPP}/matrix.h",
        "max_gemv_rows = 12;",
        "max_gemv_rows = 13;",
        f"{KERNELS}::test_they_are_built_where_there_is_a_compiler",
    ),
    Mutation(
        "shards of two models are one checkpoint",
        "llama4/weights/stamps.py",
        "if wanted is not None and strange:",
        "if False:",
        "tests/weights/test_directory.py::TestStamps",
    ),
    Mutation(
        "what a user has beside a model goes with the old one",
        "llama4/weights/directory.py",
        "        _link_rest(target, content, older)\n        exchange(content, target)\n",
        "        exchange(content, target)\n",
        "tests/weights/test_directory.py::TestWhatIsThere",
        ("        _link_rest(content, target, older)  # what", "        pass  # what"),
    ),
    Mutation(
        "zero points of dequantized weights are forgotten",
        "llama4/weights/compressed_formats.py",
        'if (zeros := parts.get("weight_zero_point")) is not None:',
        'if (zeros := parts.get("zero_point")) is not None:',
        "tests/quantization/test_presets.py::test_what_has_no_kernels_is_dequantized",
    ),
    Mutation(
        "columns have the groups of their places",
        "llama4/weights/compressed_formats.py",
        "            groups = order\n",
        "            pass\n",
        "tests/quantization/test_presets.py::test_groups_in_the_order_of_activations",
    ),
    Mutation(
        "inputs are not brought into the order of sorted columns",
        "llama4/quantization/weight.py",
        "x_NI if self.order is None else x_NI.index_select(1, self.order)",
        "x_NI",
        "tests/quantization/test_gptq.py::test_in_the_order_of_activations",
    ),
    Mutation(
        "the class of a module decides before patterns",
        "llama4/weights/compressed.py",
        "chain(exactly, by_pattern, by_class)",
        "chain(exactly, by_class, by_pattern)",
        "tests/quantization/test_presets.py::test_which_group_a_module_is_of",
    ),
]
"""Mistakes in C++."""


def check(mutation: Mutation) -> bool:
    """Whether the test fails, as it should, on a copy with the mistake in it."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache"))
        file = copy / mutation.file
        text = file.read_text()
        for right, wrong in filter(None, [(mutation.right, mutation.wrong), mutation.second]):
            assert text.count(right) == 1, f"{mutation.name}: {right!r} must stand once in {mutation.file}"
            text = text.replace(right, wrong)
        file.write_text(text)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "0",
            "-x",
            "-q",
            "-rf",
            "-p",
            "no:cacheprovider",
            mutation.test,
        ]
        environment = os.environ | {"PYTHONPATH": str(copy)}  # the copy is tested, not what is installed
        if mutation in COMPILED:
            environment |= {"XDG_CACHE_HOME": directory}
            script = [sys.executable, "-m", "llama4.kernels.build", "native"]
            subprocess.run(script, cwd=copy, env=environment, check=True, capture_output=True)
        run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        return run.returncode == 1 and f"FAILED {mutation.test}" in run.stdout


def main(words: list[str]) -> int:
    unnoticed = 0
    for mutation in [*MUTATIONS, *COMPILED]:
        if words and not any(word in mutation.name for word in words):
            continue
        noticed = check(mutation)
        unnoticed += not noticed
        print(f"{'noticed' if noticed else 'UNNOTICED':<10} {mutation.name} ({mutation.test})", flush=True)
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
