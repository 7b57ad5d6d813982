"""One bit per dimension instead of 16 (pgvector's binary_quantize): how many passages must be ranked again.

    python -m benchmarks.binary_vectors --documents squad_documents       # a minute on two cores

The passages nearest by Hamming distance are ranked again by their whole vectors. recall@10 is the share of the ten
nearest by the whole vectors that is found. Real passages, each of which asks for the others; no index, so that the
bits alone are at fault.
"""

import sys

import numpy

from benchmarks.fill_and_search import PROJECT
from benchmarks.retrieval_speed import load_ours, load_texts
from qlora import console
from qlora.markdown import as_markdown_table

NEAREST = 10
AGAIN = (10, 20, 40, 100, 200, 400)  # passages that are ranked again


def main(argv: list[str]) -> int:
    args, problems = console.parse_arguments(build_parser(), argv)
    problems.raise_if_any()
    embedder = load_ours()
    vectors = numpy.array(embedder.embed_documents(load_texts(args.documents, embedder)), dtype=numpy.float32)
    similarity = vectors @ vectors.T
    numpy.fill_diagonal(similarity, -2)
    wanted = numpy.argsort(-similarity, axis=1)[:, :NEAREST]
    bits = (vectors > 0).astype(numpy.float32)
    apart = bits @ (1 - bits).T
    apart += apart.T  # Hamming distances
    numpy.fill_diagonal(apart, numpy.inf)
    order = numpy.argsort(apart, axis=1, kind="stable")
    table = [["ranked again", f"recall@{NEAREST}"]]
    for count in AGAIN:
        found = [len(set(row[:count]) & set(right)) for row, right in zip(order, wanted, strict=True)]
        table.append([str(count), f"{numpy.mean(found) / NEAREST:.3f}"])
    console.note(f"{len(vectors):,} passages, {vectors.shape[1]} dimensions")
    print(as_markdown_table(table))
    return 0


def build_parser():
    title, _, text = __doc__.partition("\n\n")
    parser = console.Parser(usage="binary_vectors.py [flags]", description=title, epilog=text)
    folders = [str(PROJECT / "sample_data" / "documents")]
    parser.add_argument("--documents", nargs="+", metavar="FOLDER", default=folders, help="folders of documents")
    return parser


if __name__ == "__main__":
    sys.exit(console.run(main))
