"""Documents in: readers for text, JSON lines, CSV, Parquet, folders and installed documentation."""

from kexue.corpus.docstrings import InstalledDocumentation, installed_documentation
from kexue.corpus.document import Document
from kexue.corpus.readers import DocumentReader, read_documents
from kexue.corpus.sections import split_see_also, split_summary
from kexue.corpus.streams import BinaryFileError, CorpusError

__all__ = [
    "BinaryFileError",
    "CorpusError",
    "Document",
    "DocumentReader",
    "InstalledDocumentation",
    "installed_documentation",
    "read_documents",
    "split_see_also",
    "split_summary",
]
