"""How far scales from a teacher's weights alone are from scales that are fitted on text.

    python benchmarks/scales.py TEACHER [--text builtin] [--set FIELD=VALUE ...]

TEACHER is the folder of a trained Gemma-4 with its tokenizer, `runs/demo/teacher` for one. Its slots are built on 8,192
tokens of text, on fewer, and on noise; nothing else about them differs. Prints, for every converted layer, by what
factor value and output projection are larger than on 8,192 tokens. The norm behind the slot takes the product of both
out again, so that a factor changes no output of the student, only how large its weights are to an optimizer.
"""

import argparse
import sys

from trihybrid.data import Tokenizer, read_documents
from trihybrid.models.checkpoint import open_teacher
from trihybrid.models.teacher.source import FileSource
from trihybrid.recipe.convert import text_blocks
from trihybrid.recipe.load import load_section
from trihybrid.surgery.section import SurgerySection
from trihybrid.surgery.slots import build_slots

TOKENS = (8192, 1024, 256, 0)
PARTS = {"value": "rwkv7.value.weight", "output": "rwkv7.output.weight"}


def main() -> int:
    """Print one line a layer and projection."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    teacher = open_teacher(options.teacher)
    documents, tokenizer = read_documents(options.text), Tokenizer.from_file(options.teacher)
    norms: dict[tuple[int, str], dict[int, float]] = {}
    for tokens in TOKENS:
        fields = [*options.overrides, f"calibration_tokens={tokens}"]
        section = load_section(SurgerySection, {}, fields, "surgery")
        blocks = text_blocks(documents, tokenizer, tokens) if tokens else []
        for built in build_slots(FileSource(teacher.text), teacher.base, section, blocks):
            for part, name in PARTS.items():
                weight = dict(built.slot.named_parameters()).get(name)
                if weight is not None:
                    norms.setdefault((built.index, part), {})[tokens] = float(weight.detach().norm())
    print(f"{'layer':<7}{'part':<8}" + "".join(f"{tokens or 'noise':>9}" for tokens in TOKENS[1:]))
    for (layer, part), found in norms.items():
        factors = "".join(f"{found[tokens] / found[TOKENS[0]]:>9.3f}" for tokens in TOKENS[1:])
        print(f"{layer:<7}{part:<8}{factors}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
